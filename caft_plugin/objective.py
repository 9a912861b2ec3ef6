"""What a trainer does of CAFT: which window a loss belongs to, the heads' part of it, evaluation, what the log says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from caft_plugin import heads_folder
from caft_plugin.attach import AttachedHeads, Request
from caft_plugin.config import CAFTConfig, ConfigError
from caft_plugin.heads import build_heads
from caft_plugin.logs import HeadsEvaluation
from caft_plugin.loss import TOKENS, Batch, Lesson, count_targets
from caft_plugin.refusals import check_trainer, may_fuse, no_heads_ran, no_labels
from caft_plugin.trunk import find_trunk
from caft_plugin.window import (
    LossShare,
    MicroBatch,
    Tally,
    Totals,
    Window,
    has_targets,
    next_tokens_in,
    over_processes,
)

HostLoss = Tensor | tuple  # what compute_loss returns: a loss, or a loss and the model's outputs


class AuxiliaryObjective:
    """The heads' objective in one trainer. `handle` puts the heads on the model and takes them off.

    Raises:
        ConfigError: the model, the trainer's settings or the heads folder do not fit.
    """

    def __init__(self, trainer: Trainer, config: CAFTConfig, lesson: Lesson = TOKENS) -> None:
        check_trainer(trainer)
        model = cast(nn.Module, trainer.model)
        trunk = find_trunk(model)
        folder = None
        if config.heads is not None:
            folder = heads_folder.HeadsFolder.open(config.heads)
            folder.check_model(config, trunk.model.config)
            folder.warn_of_wiring(config)
        config = heads_folder.resolve_wiring(config, None if folder is None else folder.record)
        heads = build_heads(model, trunk, config, seed=trainer.args.seed)
        if folder is not None:
            folder.load_into(heads, trunk.layer_class)
            folder.warn_of_model(heads.origin, trunk.model.config)
        if trainer.optimizer is not None and any(p.requires_grad for p in heads.parameters()):
            raise ConfigError(
                "caft.train_heads: the trainer was given a finished optimizer (optimizers=...), which cannot hold "
                "the heads' parameters. Pass optimizer_cls_and_kwargs instead, or set train_heads: frozen."
            )
        self.trainer = trainer
        self.lesson = lesson
        self.config = config
        self.trunk = trunk
        self.heads = heads
        self.handle = AttachedHeads(model, heads, trunk, config)
        self.fused = may_fuse(trainer, trunk.model, config.fused_loss)
        self.start_afresh()
        self._step: tuple[Window, MicroBatch] | None = None  # what training_step is about, while it runs
        self._totals: Totals | None = None  # of the evaluation that is open

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
        if not batches:
            return
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
            over_processes=self.over_processes,
        )

    @contextlib.contextmanager
    def training_step(self, inputs: Batch) -> Iterator[None]:
        """While this is open, losses are about the micro-batch that `inputs` are, in the window that is open."""
        window = self._window
        begun = None if window is None else window.begun(inputs)
        if window is None or begun is None:
            window = self._open_window([inputs])
            begun = window.micro_batches[0]
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
        self, model: nn.Module, inputs: Batch, host_loss: Callable[[], HostLoss], items: Tensor | int | None
    ) -> HostLoss:
        """Return the host's loss with the heads' added, as `compute_loss` does; in evaluation the host's alone.

        Args:
            model: what `host_loss` calls, the trainer's model or what wraps it.
            inputs: the batch, with what marks documents in it.
            host_loss: computes the host's loss, alone or with outputs.
            items: `num_items_in_batch`, as `compute_loss` got it.

        Raises:
            ConfigError: the batch has no `labels`, or the model was called with another text or shape than it has.
            RuntimeError: `host_loss` did not call the model with gradients.
        """
        training = torch.is_grad_enabled()
        if not has_targets(inputs):
            if training:
                raise no_labels(self.trainer, inputs)
            return host_loss()
        if not training:
            return host_loss() if self._totals is None else self._evaluated(model, inputs, host_loss, self._totals)
        if self._step is None:  # asked for by hand
            window = self._open_window([inputs])
            micro_batch = window.micro_batches[0]
        else:
            window, micro_batch = self._step
        share, tokens = self._share(items), next_tokens_in(inputs)
        request = dataclasses.replace(window.request(micro_batch, inputs), lesson=self.lesson)
        if self.fused:
            request = request.with_next_tokens(inputs["labels"], window.mean_weight(share))
        ids = inputs.get("input_ids")
        returned, result = self.handle.answer(request, host_loss, called=model, input_ids=ids)
        if result is None:
            raise RuntimeError(
                "caft: the trainer computed its loss without calling the model with gradients, so the auxiliary "
                "heads did not run. CAFT works with trainers whose compute_loss calls the model."
            )
        self._ran = True
        loss, *outputs = returned if isinstance(returned, tuple) else (returned,)
        aux = result.loss.to(loss.device) * share.scale
        total = loss + aux
        window.sums.add(loss.double() / share.divisor, aux.double() / share.divisor, result.sums, tokens)
        return (total, *outputs) if isinstance(returned, tuple) else total

    def _share(self, items: Tensor | int | None) -> LossShare:
        """What the trainer will do to the loss: `training_step` divides it by the accumulation steps, unless the host's
        loss is already a share of the whole window, or was asked for by hand."""
        trainer = self.trainer
        counted = items if trainer.model_accepts_loss_kwargs else None
        divides = self._step is not None and counted is None and trainer.compute_loss_func is None
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1) if divides else 1
        return LossShare(steps, trainer.accelerator.num_processes, counted)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluated(
        self, model: nn.Module, inputs: Batch, host_loss: Callable[[], HostLoss], totals: Totals
    ) -> HostLoss:
        """The host's loss alone; the heads' own losses are summed beside it."""
        request = Request.for_evaluation(inputs, len(self.heads))
        ids = inputs.get("input_ids")
        returned, result = self.handle.answer(request, host_loss, called=model, input_ids=ids)
        if result is not None:
            totals.add(result, count_targets(request.targets))
        return returned

    @contextlib.contextmanager
    def evaluation(self, prefix: str) -> Iterator[dict[str, float]]:
        """While this is open, the heads are evaluated beside the model. The dict that it gives has their metrics at its
        end. Every process has to call it."""
        metrics: dict[str, float] = {}
        totals = self._totals = Totals(len(self.heads), self.trainer.args.device)
        try:
            yield metrics
        finally:
            self._totals = None
        metrics.update(self.metrics(totals.means(self.over_processes), prefix))

    def metrics(self, evaluation: HeadsEvaluation, prefix: str) -> dict[str, float]:
        return evaluation.entries(prefix)

    # -- files and log -----------------------------------------------------------------------------

    def save(self, folder: Path, *, resumable: bool) -> None:
        """Write the heads; a checkpoint's keep what exact resuming needs."""
        write = self.trainer.args.should_save
        heads_folder.save_heads(folder, self.heads, self.trunk, self.config, resumable=resumable, write=write)

    def load(self, folder: str) -> None:
        """Put the heads back as a checkpoint holds them."""
        heads_folder.load_checkpoint(folder, self.heads, self.config)

    def log_entries(self) -> dict[str, float]:
        """What the log says since the last one. Every process has to call it."""
        self.end_window()
        trainer, tally, self._tally = self.trainer, self._tally, None
        if tally is None:
            return {}
        processes = trainer.accelerator.num_processes
        return tally.log(trainer.state.global_step, processes, self.over_processes).entries()

    def over_processes(self, tensor: Tensor) -> Tensor:
        return over_processes(self.trainer.accelerator, tensor)
