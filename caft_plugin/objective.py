"""What a trainer does of CAFT: which window a loss belongs to, the heads' part of it, evaluation, what the log says."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from caft_plugin import heads_folder
from caft_plugin.attach import AttachedHeads, Request
from caft_plugin.config import CAFTConfig, ConfigError
from caft_plugin.heads import AuxiliaryHeads, build_heads
from caft_plugin.logs import HeadsEvaluation
from caft_plugin.loss import Batch, count_targets, head_targets
from caft_plugin.refusals import check_trainer, no_heads_ran, no_labels, not_fused, why_not_fused
from caft_plugin.trunk import Trunk, find_trunk
from caft_plugin.window import MicroBatch, Share, Tally, Window, has_targets, next_tokens_in

logger = logging.getLogger(__name__)


def over_processes(trainer: Trainer, tensor: Tensor) -> Tensor:
    """The sum of what all processes hold."""
    accelerator = trainer.accelerator
    return accelerator.reduce(tensor, reduction="sum") if accelerator.num_processes > 1 else tensor


class AuxiliaryObjective:
    """The heads' objective in one trainer. `handle` puts the heads on the model and takes them off.

    Raises:
        ConfigError: the model, the trainer's settings or the heads folder do not fit.
    """

    def __init__(self, trainer: Trainer, config: CAFTConfig) -> None:
        check_trainer(trainer)
        model: Any = trainer.model
        trunk = find_trunk(model)
        folder = None
        if config.heads is not None:
            folder = heads_folder.HeadsFolder.open(config.heads)
            folder.check_model(config, trunk.model.config)
            folder.warn_of_differences(config, trunk.model.config)
        config = heads_folder.resolve_wiring(config, None if folder is None else folder.record)
        heads = build_heads(model, trunk, config, seed=trainer.args.seed)
        if folder is not None:
            folder.load_into(heads, trunk.layer_class)
        if trainer.optimizer is not None and any(p.requires_grad for p in heads.parameters()):
            raise ConfigError(
                "caft.train_heads: the trainer was given a finished optimizer (optimizers=...), which cannot hold "
                "the heads' parameters. Pass optimizer_cls_and_kwargs instead, or set train_heads: frozen."
            )
        self.trainer = trainer
        self.config = config
        self.fused = config.fused_loss != "off" and self._may_fuse(trunk)
        self.handle = AttachedHeads(model, heads, trunk, config)
        self.start_afresh()
        self._step: tuple[Window, MicroBatch] | None = None  # what training_step is about, while it runs
        self._evaluation: Tensor | None = None  # sums, hits and counts of each head (3, num_heads)

    @property
    def heads(self) -> AuxiliaryHeads:
        return self.handle.heads

    @property
    def trunk(self) -> Trunk:
        return self.handle.trunk

    def _may_fuse(self, trunk: Trunk) -> bool:
        """Whether `fused_loss` can compute the next-token loss; where it cannot, `on` raises ConfigError."""
        trainer = self.trainer
        takes_logits = trainer.label_smoother is not None or trainer.compute_loss_func is not None
        why = why_not_fused(type(trainer), trunk.model, takes_logits)
        if why is None:
            return True
        if self.config.fused_loss == "on":
            raise ConfigError(not_fused(why))
        logger.warning("caft.fused_loss: auto leaves the next-token loss to the framework: %s", why)
        return False

    def start_afresh(self) -> None:
        """Forgets what was summed: a loop begins, be it the first, one after an interrupt, or one with smaller batches
        (auto_find_batch_size)."""
        self._window: Window | None = None
        self._tally: Tally | None = None
        self._ran = False  # whether heads ran since then

    # -- training ----------------------------------------------------------------------------------

    def begin_window(self, batches: Sequence[Batch]) -> None:
        """The micro-batches of the next optimisation step. Every process has to call it."""
        self.end_window()
        if self._tally is None:
            trainer = self.trainer
            self._tally = Tally(len(self.heads), trainer.state.global_step, trainer.args.device)
        self._window = self._open_window(batches)

    def end_window(self) -> None:
        if self._window is not None and self._tally is not None:
            self._tally.add(self._window)
        self._window = None

    def _open_window(self, batches: Sequence[Batch]) -> Window:
        trainer = self.trainer
        return Window.open(
            batches,
            self.config,
            step=trainer.state.global_step,
            total_steps=trainer.state.max_steps,
            seed=trainer.args.seed,
            device=trainer.args.device,
            over_processes=lambda tensor: over_processes(trainer, tensor),
        )

    def _window_of_its_own(self, inputs: Batch) -> tuple[Window, MicroBatch]:
        """What a loss that is asked for by hand is about."""
        window = self._open_window([inputs])
        return window, window.micro_batches[0]

    @contextlib.contextmanager
    def training_step(self, inputs: Batch) -> Iterator[None]:
        """While this is open, losses are about the micro-batch that `inputs` are, in the window that is open."""
        window = self._window
        begun = None if window is None else window.begun(inputs)
        if window is None or begun is None:
            window, begun = self._window_of_its_own(inputs)
        self._step = window, begun
        try:
            yield
        finally:
            self._step = None
        if not self.trainer.accelerator.sync_gradients:
            return
        if not self._ran:
            raise no_heads_ran(self.trainer)
        # Joined to the graph for DDP's sake only: no gradient, not one of zeros, so that neither the
        # gradient norm nor the optimizer sees these heads.
        for layer, ran in zip(self.heads.layers, window.run, strict=True):
            if not ran:
                layer.zero_grad(set_to_none=True)

    def loss(
        self, inputs: Batch, host_loss: Callable[[], Any], return_outputs: bool, items: Tensor | int | None
    ) -> Any:
        """The host's loss with the heads' added, as `compute_loss` returns it; in evaluation the host's alone.

        Args:
            inputs: the batch, with what marks documents in it.
            host_loss: computes the host's loss, alone or with outputs (`return_outputs`).
            items: `num_items_in_batch`, as `compute_loss` got it.

        Raises:
            ConfigError: the batch has no `labels`, or the model was called with another shape than they have.
            RuntimeError: `host_loss` did not call the model with gradients.
        """
        training = torch.is_grad_enabled()
        if not has_targets(inputs):
            if training:
                raise no_labels(self.trainer, inputs)
            return host_loss()
        if not training:
            return host_loss() if self._evaluation is None else self._evaluated(inputs, host_loss, self._evaluation)
        window, micro_batch = self._step or self._window_of_its_own(inputs)
        share, tokens = self._share(items), next_tokens_in(inputs)
        request = self.request(window, micro_batch, inputs, share)
        returned, result = self.handle.answer(request, host_loss)
        if result is None:
            raise RuntimeError(
                "caft: the trainer computed its loss without calling the model with gradients, so the auxiliary "
                "heads did not run. CAFT works with trainers whose compute_loss calls the model."
            )
        self._ran = True
        loss = returned[0] if return_outputs else returned
        aux = result.loss.to(loss.device) * share.scale
        total = loss + aux
        window.sums.add(loss.double() / share.divisor, aux.double() / share.divisor, result.sums, tokens)
        return (total, *returned[1:]) if return_outputs else total

    def request(self, window: Window, micro_batch: MicroBatch, inputs: Batch, share: Share) -> Request:
        return window.request(micro_batch, inputs, share, self.fused)

    def _share(self, items: Tensor | int | None) -> Share:
        """What the trainer will do to the loss: `training_step` divides it by the accumulation steps, unless the host's
        loss is already a share of the whole window, or was asked for by hand."""
        trainer = self.trainer
        counted = items if trainer.model_accepts_loss_kwargs else None
        divides = self._step is not None and counted is None and trainer.compute_loss_func is None
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1) if divides else 1
        return Share(steps, trainer.accelerator.num_processes, counted)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluated(self, inputs: Batch, host_loss: Callable[[], Any], figures: Tensor) -> Any:
        """The host's loss alone; the heads' own losses are summed beside it."""
        num_heads = len(self.heads)
        targets = head_targets(inputs, num_heads)
        request = Request(targets, torch.zeros(num_heads), [True] * num_heads, training=False)
        returned, result = self.handle.answer(request, host_loss)
        if result is not None and result.hits is not None:
            figures += torch.stack([result.sums, result.hits, count_targets(targets).to(result.sums)]).to(figures)
        return returned

    @contextlib.contextmanager
    def evaluation(self, prefix: str) -> Iterator[dict[str, float]]:
        """While this is open, the heads are evaluated beside the model. The dict that it gives has their metrics at its
        end. Every process has to call it."""
        shape, metrics = (3, len(self.heads)), dict[str, float]()
        self._evaluation = torch.zeros(shape, dtype=torch.float64, device=self.trainer.args.device)
        try:
            yield metrics
        finally:
            figures, self._evaluation = self._evaluation, None
        figures = over_processes(self.trainer, figures)
        found = {k: row for k, row in enumerate(figures.T.tolist(), 1) if row[2]}
        losses = {k: total / count for k, (total, _, count) in found.items()}
        accuracies = {k: hits / count for k, (_, hits, count) in found.items()}
        metrics.update(self.metrics(HeadsEvaluation(losses, accuracies), prefix))

    def metrics(self, evaluation: HeadsEvaluation, prefix: str) -> dict[str, float]:
        return evaluation.entries(prefix)

    # -- log and checkpoints -----------------------------------------------------------------------

    def log_entries(self) -> dict[str, float]:
        """What the log says since the last one. Every process has to call it."""
        self.end_window()
        trainer, tally, self._tally = self.trainer, self._tally, None
        if tally is None:
            return {}
        processes = trainer.accelerator.num_processes
        return tally.log(trainer.state.global_step, processes, lambda t: over_processes(trainer, t)).entries()

    def save(self, folder: str, resumable: bool) -> None:
        """Writes `caft_heads/` into `folder`. Every process has to call it."""
        write = self.trainer.args.should_save
        heads_folder.save_heads(folder, self.heads, self.trunk, self.config, resumable=resumable, write=write)

    def load(self, folder: str) -> None:
        """Puts the heads back as a checkpoint holds them."""
        heads_folder.load_checkpoint(folder, self.heads, self.config)
