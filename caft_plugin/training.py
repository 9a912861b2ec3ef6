"""`with_caft`: any `transformers.Trainer` class, its loss plus the auxiliary heads' loss."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from caft_plugin import checkpoint
from caft_plugin.config import CAFTConfig, ConfigError
from caft_plugin.heads import AttachedHeads, Reading, build_heads, find_trunk
from caft_plugin.loss import count_targets, gamma, head_targets, head_weights

logger = logging.getLogger(__name__)


# What accelerate's ParallelismConfig can share out among processes besides rows and weights.
CUTTING = {"cp_size": "sequences", "sp_size": "sequences", "tp_size": "layers"}


@dataclasses.dataclass
class Window:
    """One accumulation window, that is one optimisation step."""

    gamma: float
    counts: Tensor  # valid targets of each head, over all micro-batches and processes
    run: list[bool]  # heads that run


class Tally:
    """What was summed since the last log, on this process. Heads' values are shares of the global means."""

    def __init__(self, num_heads: int, step: int, device: torch.device) -> None:
        self.since_step = step
        self.next_token = torch.zeros((), dtype=torch.float64, device=device)
        self.aux = torch.zeros_like(self.next_token)
        self.gamma = 0.0
        self.heads = torch.zeros(num_heads, dtype=torch.float64, device=device)
        self.steps_of_head = [0] * num_heads

    def local(self) -> Tensor:
        return torch.cat([self.next_token[None], self.aux[None], self.heads])


@functools.cache
def with_caft(trainer_class: type[Trainer]) -> type[Trainer]:
    """A subclass of `trainer_class` that adds the loss of auxiliary heads to the loss the class computes.

    It takes one argument more than `trainer_class`: `caft`, a CAFTConfig, a dict of its keys, or None (the
    class then does what it did before). No training loop is touched: `compute_loss` calls the class's own and
    adds to it. Heads are saved beside the model, in `caft_heads/`; the model's own files stay as they were.

    Raises:
        ConfigError: on construction, when the settings or the model do not fit.
        TypeError: `trainer_class` is not a Trainer.
    """
    if not (isinstance(trainer_class, type) and issubclass(trainer_class, Trainer)):
        raise TypeError(f"with_caft takes a subclass of transformers.Trainer, got {trainer_class!r}")
    if issubclass(trainer_class, CAFTTrainerMixin):
        return trainer_class
    name = f"CAFT{trainer_class.__name__}"
    return type(name, (CAFTTrainerMixin, trainer_class), {"__doc__": trainer_class.__doc__})


if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class CAFTTrainerMixin(_Base):
    """The part of `with_caft` that is the same for every trainer class."""

    def __init__(self, *args: Any, caft: CAFTConfig | dict | None = None, **kwargs: Any) -> None:
        self.caft: AttachedHeads | None = None
        self.caft_config: CAFTConfig | None = None
        self._caft_window: Window | None = None
        self._caft_tally: Tally | None = None
        self._caft_eval: Tensor | None = None  # sums, hits and counts of each head (3, num_heads)
        super().__init__(*args, **kwargs)
        if caft is not None:
            self.attach_caft(CAFTConfig.read(caft))

    def attach_caft(self, config: CAFTConfig) -> None:
        """Builds the heads and attaches them to the model, before the optimizer exists.

        At beta 0 no head is built: the run is the host's own.

        Raises:
            ConfigError: the model, the trainer's settings or the heads folder do not fit.
        """
        self._check_trainer()
        model: Any = self.model
        trunk = find_trunk(model)
        record = folder = None
        if config.heads is not None:
            folder = checkpoint.locate_heads(config.heads)
            record = checkpoint.read_record(folder)
            checkpoint.check_record(record, folder, config, trunk.model.config)
            warn_of_differences(config, record, trunk.model.config)
        config = checkpoint.resolve_wiring(config, record)
        self.caft_config = config
        if config.beta == 0:
            logger.info("caft.beta is 0: no auxiliary heads are built, this is a plain run")
            return
        heads = build_heads(model, trunk, config, seed=self.args.seed)
        if folder is not None:
            checkpoint.load_pretrained(folder, heads, trunk.layer_class)
        if self.optimizer is not None and any(p.requires_grad for p in heads.parameters()):
            raise ConfigError(
                "caft.train_heads: the trainer was given a finished optimizer (optimizers=...), which cannot hold "
                "the heads' parameters. Pass optimizer_cls_and_kwargs instead, or set train_heads: frozen."
            )
        self.caft = AttachedHeads(model, heads, trunk, config)
        self.accelerator.prepare = functools.partial(prepare_with_heads, self.caft, self.accelerator.prepare)

    def _check_trainer(self) -> None:
        if self.args.n_gpu > 1:
            raise ConfigError(
                f"caft: one process drives {self.args.n_gpu} GPUs (nn.DataParallel), which CAFT does not support. "
                "Start one process a GPU with `accelerate launch` or `torchrun`, or show it one GPU with "
                "CUDA_VISIBLE_DEVICES=0."
            )
        if self.model_init is not None:
            raise ConfigError(
                "caft: model_init makes a new model at every train(), which would lose the heads. Pass model=..."
            )
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if deepspeed is not None and deepspeed.zero_stage == 3:
            raise ConfigError(
                "caft: got DeepSpeed's zero_optimization.stage: 3, but it takes 0, 1 or 2: heads are copies of a layer "
                "and use the unembedding, which ZeRO-3 has cut up. Use stage 2, or FSDP2, which CAFT works with."
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        sizes = {key: getattr(parallelism, key, None) or 1 for key in CUTTING}
        sizes["tp_size"] = max(sizes["tp_size"], self.get_tp_size())
        for key, size in sizes.items():
            if size > 1:
                raise ConfigError(cut_up(f"parallelism_config.{key}", size, CUTTING[key]))

    # -- the loss ----------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.caft is not None and samples:
            self._caft_window = self._open_window(samples)
        return samples, num_items

    def _open_window(self, batches: list[dict[str, Any]]) -> Window:
        assert self.caft is not None and self.caft_config is not None
        num_heads = len(self.caft.heads)
        counts = torch.zeros(num_heads, dtype=torch.long, device=self.args.device)
        for batch in batches:
            if "labels" in batch:
                counts += count_targets(head_targets(batch, num_heads)).to(counts.device)
        if self.accelerator.num_processes > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        factor = gamma(self.caft_config.schedule, self.state.global_step, self.state.max_steps)
        run = [factor != 0.0] * num_heads
        window = Window(gamma=factor, counts=counts, run=run)
        tally = self._tally()
        tally.gamma += factor
        for index, count in enumerate(counts.tolist()):
            tally.steps_of_head[index] += run[index] and count > 0
        return window

    def _tally(self) -> Tally:
        assert self.caft is not None
        if self._caft_tally is None:
            self._caft_tally = Tally(len(self.caft.heads), self.state.global_step, self.args.device)
        return self._caft_tally

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        def host_loss() -> Any:
            return super(CAFTTrainerMixin, self).compute_loss(
                model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )

        if self.caft is None or "labels" not in inputs:
            return host_loss()
        targets = head_targets(inputs, len(self.caft.heads))
        if not torch.is_grad_enabled():
            return self._evaluated(targets, host_loss)

        window = self._caft_window or self._open_window([inputs])
        reading = self._reading(targets, window)
        with self.caft.reading(reading):
            result = host_loss()
        if reading.loss is None:
            raise RuntimeError(
                "caft: the trainer computed its loss without calling the model with gradients, so the auxiliary "
                "heads did not run. CAFT works with trainers whose compute_loss calls the model."
            )
        assert reading.sums is not None
        loss = result[0] if return_outputs else result
        scale = self._scale(num_items_in_batch)
        aux = reading.loss.to(loss.device) * scale
        total = loss + aux

        steps = self._accumulation_divisor(num_items_in_batch)
        tally = self._tally()
        tally.next_token += loss.detach().double() / steps
        tally.aux += aux.detach().double() / steps
        tally.heads += (reading.sums / window.counts.clamp(min=1)).double()
        return (total, *result[1:]) if return_outputs else total

    def _reading(self, targets: Tensor, window: Window) -> Reading:
        return Reading(targets, self._weights(window), window.run, training=True)

    def _weights(self, window: Window) -> Tensor:
        """The weight of each head's summed loss in the window's mean: beta gamma alpha^k / its targets."""
        assert self.caft_config is not None
        weights = head_weights(self.caft_config.beta, self.caft_config.alpha, window.gamma, self.caft_config.num_heads)
        return torch.tensor(weights, device=window.counts.device) / window.counts.clamp(min=1)

    def _accumulation_divisor(self, num_items_in_batch: Tensor | int | None) -> int:
        """What `Trainer.training_step` will divide the loss by: the accumulation steps, or 1 where the host's
        loss is already a share of the whole window."""
        if (not self.model_accepts_loss_kwargs or num_items_in_batch is None) and self.compute_loss_func is None:
            return getattr(self, "current_gradient_accumulation_steps", 1)
        return 1

    def _scale(self, num_items_in_batch: Tensor | int | None) -> int:
        """Undoes what happens to the loss later: the division by accumulation steps, and the mean of gradients
        over processes. A share of the window's global mean times this comes out as that mean."""
        return self._accumulation_divisor(num_items_in_batch) * self.accelerator.num_processes

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.caft is not None and self._caft_window is not None and self.accelerator.sync_gradients:
            # Joined to the graph for DDP's sake only: no gradient, not one of zeros, so that neither the
            # gradient norm nor the optimizer sees these heads.
            for layer, ran in zip(self.caft.heads.layers, self._caft_window.run, strict=True):
                if not ran:
                    layer.zero_grad(set_to_none=True)
        return loss

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluated(self, targets: Tensor, host_loss: Any) -> Any:
        """The host's loss alone; the heads' own losses are summed beside it."""
        assert self.caft is not None
        if self._caft_eval is None:
            return host_loss()
        num_heads = len(targets)
        reading = Reading(targets, torch.zeros(num_heads), [True] * num_heads, training=False)
        with self.caft.reading(reading):
            result = host_loss()
        if reading.sums is not None and reading.hits is not None:
            figures = torch.stack([reading.sums, reading.hits, count_targets(targets).to(reading.sums)])
            self._caft_eval += figures.to(self._caft_eval)
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        if self.caft is None:
            return super().evaluation_loop(*args, **kwargs)
        shape = (3, len(self.caft.heads))
        self._caft_eval = torch.zeros(shape, dtype=torch.float64, device=self.args.device)
        try:
            output: Any = super().evaluation_loop(*args, **kwargs)
        finally:
            figures, self._caft_eval = self._caft_eval, None
        if self.accelerator.num_processes > 1:
            figures = self.accelerator.reduce(figures, reduction="sum")
        output.metrics.update(self._evaluation_metrics(figures, kwargs.get("metric_key_prefix", "eval")))
        return output

    def _evaluation_metrics(self, figures: Tensor, prefix: str) -> dict[str, float]:
        """`figures`: summed loss, hits and targets of each head over the evaluation set (3, num_heads)."""
        return {
            f"{prefix}_caft/loss_head_{k}": total / count
            for k, (total, _, count) in enumerate(figures.T.tolist(), 1)
            if count
        }

    # -- logs --------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._caft_tally is not None:
            logs.update(self._caft_logs(self._caft_tally))
            self._caft_tally = None
        super().log(logs, *args, **kwargs)

    def _caft_logs(self, tally: Tally) -> dict[str, float]:
        """Means over the steps since the last log and over all processes."""
        steps = max(self.state.global_step - tally.since_step, 1)
        shares = tally.local()
        processes = self.accelerator.num_processes
        if processes > 1:
            shares = self.accelerator.reduce(shares, reduction="sum")
        next_token, aux, *heads = shares.tolist()
        logs = {"caft/next_token_loss": next_token / processes / steps}
        for index, (share, of_head) in enumerate(zip(heads, tally.steps_of_head, strict=True)):
            if of_head:
                logs[f"caft/loss_head_{index + 1}"] = share / of_head
        logs["caft/gamma"] = tally.gamma / steps
        logs["caft/aux_loss"] = aux / processes / steps
        return logs

    # -- saving and resuming -----------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        self.save_heads(output_dir or self.args.output_dir)

    def save_heads(self, output_dir: str | None) -> None:
        """Writes `caft_heads/` into `output_dir`; a checkpoint's keeps what exact resuming needs."""
        if self.caft is None or self.caft_config is None or output_dir is None:
            return
        checkpoint.save_heads(
            output_dir,
            self.caft.heads,
            self.caft.trunk,
            self.caft_config,
            resumable=Path(output_dir).name.startswith(f"{PREFIX_CHECKPOINT_DIR}-"),
            write=self.args.should_save,
        )

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Under FSDP2 this saves the adapter once more: newer accelerate takes every frozen parameter out of the state
        dict, and so has to find the heads' there."""
        adapter_alone = self.is_fsdp_enabled and isinstance(self.model, PeftModel)
        with self.caft.in_state_dict("frozen") if self.caft and adapter_alone else contextlib.nullcontext():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.caft is not None:
            checkpoint.load_checkpoint(resume_from_checkpoint, self.caft.heads)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self.caft is not None and self.state.best_model_checkpoint is not None:
            checkpoint.load_checkpoint(self.state.best_model_checkpoint, self.caft.heads)


def cut_up(key: str, size: int, what: str) -> str:
    """Why `size` processes may not share one model's sequences or layers."""
    why = "targets k ahead would lie on another one" if what == "sequences" else "heads are whole layers"
    return (
        f"caft: got {key}: {size}, but it takes 1: CAFT does not work where processes share the {what} of one model "
        f"({why}). Leave the key out and share rows and weights among the processes, with DDP or FSDP2."
    )


def prepare_with_heads(caft: AttachedHeads, prepare: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls an accelerator's `prepare` with the heads in the model's state dict.

    Where one process alone has read the weights, accelerate gives the others what the state dict holds."""
    with caft.in_state_dict():
        return prepare(*args, **kwargs)


def warn_of_differences(config: CAFTConfig, record: checkpoint.HeadsRecord, model_config: Any) -> None:
    """Warns where pretrained heads meet another base model or wiring than they were made with."""
    base = model_config.name_or_path
    if base and record.base_model != base:
        logger.warning(
            "caft.heads: these heads were made with base model %s, this run uses %s", record.base_model, base
        )
    for key in ("head_input", "head_norm"):
        written, recorded = getattr(config, key), getattr(record, key)
        if written is not None and written != recorded:
            logger.warning(
                "caft.%s: got %s, but these heads were made with %s; leave the key out to follow the folder",
                key,
                written,
                recorded,
            )
