"""CAFT in a trainer: a loss's accumulation window, the heads' part of the loss, evaluation and log
entries."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from caft_plugin.caft import heads_folder
from caft_plugin.caft.attach import AttachedHeads, Request
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_record import FOLDER, TRAINING, LoggedLosses, read_losses
from caft_plugin.caft.loss import TOKENS, Lesson
from caft_plugin.caft.window import (
    LossShare,
    MicroBatch,
    Tally,
    Totals,
    Window,
    has_targets,
    next_tokens_in,
    over_processes,
)
from caft_plugin.config import CAFTConfig
from caft_plugin.errors import ConfigError, RunError
from caft_plugin.logs import CAFTLog, HeadsEvaluation, evaluated_sets
from caft_plugin.model.trunk import find_trunk
from caft_plugin.refusals import (
    may_fuse,
    refuse_step_without_heads,
    refuse_trainer,
    refuse_without_labels,
)
from caft_plugin.targets import Batch, count_targets

HostLoss = Tensor | tuple  # what compute_loss returns: a loss, or a loss and the model's outputs


class AuxiliaryObjective:
    """The heads' objective in one trainer. `handle` attaches the heads to the model and detaches
    them.

    Raises:
        ConfigError: the model, the trainer's settings or the heads folder do not fit.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: CAFTConfig,
        lesson: Lesson = TOKENS,
    ) -> None:
        refuse_trainer(trainer)
        model = cast(nn.Module, trainer.model)
        trunk = find_trunk(model)
        folder = None
        if config.heads is not None:
            folder = heads_folder.HeadsFolder.open(config.heads)
            folder.refuse_other_model(config, trunk.model.config)
            folder.warn_of_wiring(config)
        config = heads_folder.resolve_wiring(config, None if folder is None else folder.record)
        heads = build_heads(model, trunk, config, seed=trainer.args.seed)
        if folder is not None:
            folder.load_into(heads, trunk.layer_class)
            folder.warn_of_model(heads.origin, trunk.model.config)
        if trainer.optimizer is not None and any(p.requires_grad for p in heads.parameters()):
            raise ConfigError(
                "caft.train_heads: the trainer was given a finished optimizer (optimizers=...),"
                " which cannot contain the heads' parameters. Pass optimizer_cls_and_kwargs"
                " instead, or set train_heads: frozen."
            )
        self.trainer = trainer
        self.lesson = lesson
        self.config = config
        self.trunk = trunk
        self.heads = heads
        self.handle = AttachedHeads(model, heads, trunk, config)
        self.fused = may_fuse(trainer, trunk.model, config.fused_loss)
        # what was logged of these heads last, saved with them
        self.losses: dict[str, LoggedLosses] = {}
        self.start_afresh()
        self._step: tuple[Window, MicroBatch] | None = None  # of the current training_step
        self._totals: Totals | None = None  # of the current evaluation

    def start_afresh(self) -> None:
        """Reset the sums at the start of a training loop.

        A loop is the first one, one after an interrupt, or one with smaller batches
        (auto_find_batch_size).
        """
        self._window: Window | None = None
        self._tally: Tally | None = None
        self._ran = False  # whether heads ran since the reset

    # -- training ----------------------------------------------------------------------------------

    def begin_window(self, batches: Sequence[Batch]) -> None:
        """Open the window of the next optimisation step's micro-batches. Every process must call
        it."""
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
        """Assign losses to the micro-batch `inputs` of the current window."""
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
            refuse_step_without_heads(self.trainer)
        # These heads are in the graph only for DDP. Their gradient is None, not zero, so that
        # neither the gradient norm nor the optimizer includes them.
        for layer, ran in zip(self.heads.layers, window.run, strict=True):
            if not ran:
                layer.zero_grad(set_to_none=True)

    def loss(
        self,
        model: nn.Module,
        inputs: Batch,
        host_loss: Callable[[], HostLoss],
        items: Tensor | int | None,
    ) -> HostLoss:
        """Return the host's loss plus the heads' loss, for `compute_loss`; in evaluation, only the
        host's.

        Args:
            model: the model that `host_loss` calls, wrapped or not.
            inputs: the batch, with the keys that mark documents.
            host_loss: computes the host's loss, with or without outputs.
            items: `num_items_in_batch`, as `compute_loss` received it.

        Raises:
            ConfigError: the batch has no `labels`, or the model was called with other tokens or
                another shape.
            RunError: `host_loss` did not call the model with gradients.
        """
        training = torch.is_grad_enabled()
        if not has_targets(inputs) and training:
            refuse_without_labels(self.trainer, inputs)
        if not training:
            if self._totals is None or not has_targets(inputs):
                return host_loss()
            return self._evaluated(model, inputs, host_loss, self._totals)
        if self._step is None:  # called by user code, outside of training_step
            window = self._open_window([inputs])
            micro_batch = window.micro_batches[0]
        else:
            window, micro_batch = self._step
        share = self._share(items)
        tokens = next_tokens_in(inputs)
        request = dataclasses.replace(window.request(micro_batch, inputs), lesson=self.lesson)
        if self.fused:
            request = request.with_next_tokens(inputs["labels"], window.mean_weight(share))
        ids = inputs.get("input_ids")
        returned, result = self.handle.answer(request, host_loss, called=model, input_ids=ids)
        if result is None:
            raise RunError(
                "caft: the trainer computed its loss without calling the model with gradients, so"
                " the auxiliary heads did not run. Use a trainer whose compute_loss calls the"
                " model."
            )
        self._ran = True
        loss, *outputs = returned if isinstance(returned, tuple) else (returned,)
        # the host divides the loss and averages gradients over processes: scale undoes both
        aux = result.loss.to(loss.device) * share.scale
        total = loss + aux
        own_loss = loss.double() / share.divisor
        own_aux = aux.double() / share.divisor
        window.sums.add(own_loss, own_aux, result.sums, tokens)
        return (total, *outputs) if isinstance(returned, tuple) else total

    def _share(self, items: Tensor | int | None) -> LossShare:
        """Return how the trainer scales the loss.

        `training_step` divides it by the accumulation steps, unless the host's loss is already a
        share of the complete window, or is computed outside of `training_step`.
        """
        trainer = self.trainer
        counted = items if trainer.model_accepts_loss_kwargs else None
        divides = self._step is not None and counted is None and trainer.compute_loss_func is None
        steps = getattr(trainer, "current_gradient_accumulation_steps", 1) if divides else 1
        return LossShare(steps, trainer.accelerator.num_processes, counted)

    # -- evaluation --------------------------------------------------------------------------------

    def _evaluated(
        self,
        model: nn.Module,
        inputs: Batch,
        host_loss: Callable[[], HostLoss],
        totals: Totals,
    ) -> HostLoss:
        """Return the host's loss unchanged, and add the heads' losses to `totals`."""
        request = Request.for_evaluation(inputs, len(self.heads))
        ids = inputs.get("input_ids")
        returned, result = self.handle.answer(request, host_loss, called=model, input_ids=ids)
        if result is not None:
            totals.add(result, count_targets(request.targets))
        return returned

    @contextlib.contextmanager
    def evaluation(self, prefix: str) -> Iterator[dict[str, float]]:
        """Evaluate the heads together with the model; the yielded dict has their metrics at the
        end.

        Every process must call it.
        """
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
        """Save the heads, and for exact resuming (`resumable`) their LoRA factors. Every process
        must call it."""
        heads_folder.save_heads(
            folder,
            self.heads,
            self.trunk,
            self.config,
            resumable=resumable,
            write=self.trainer.args.should_save,
            losses=self.losses,
        )

    def load(self, folder: str) -> None:
        """Load the heads from a checkpoint."""
        heads_folder.load_checkpoint(folder, self.heads, self.config)
        self.losses = read_losses(Path(folder) / FOLDER)

    def log_entries(self) -> dict[str, float]:
        """Return the log entries since the last call. Every process must call it."""
        self.end_window()
        trainer = self.trainer
        tally = self._tally
        self._tally = None
        if tally is None:
            return {}
        processes = trainer.accelerator.num_processes
        return tally.log(trainer.state.global_step, processes, self.over_processes).entries()

    def note_log(self, logs: Mapping[str, float]) -> None:
        """Keep the heads' losses in a line of the log, in the place of those logged before."""
        step = self.trainer.state.global_step
        training = CAFTLog.read(logs)
        if training is not None:
            # of heads not drawn since
            before = self.losses[TRAINING].losses if TRAINING in self.losses else {}
            self.losses[TRAINING] = LoggedLosses(
                step=step, losses={**before, **training.head_losses}
            )
        for name in evaluated_sets(logs):
            found = HeadsEvaluation.read(logs, name)
            self.losses[name] = LoggedLosses(
                step=step, losses=dict(found.losses), tokens_per_pass=found.tokens_per_pass
            )

    def over_processes(self, tensor: Tensor) -> Tensor:
        return over_processes(self.trainer.accelerator, tensor)
