"""Measure the next-token loss under MEAP of masked and of other tokens, from the forward pass of
training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from caft_plugin.caft.attach import without_dropout
from caft_plugin.caft.loss import rows_at_a_time
from caft_plugin.errors import ConfigError
from caft_plugin.model.hidden import copies_hold_again, copies_leave_out
from caft_plugin.model.sharding import unsharded_twin
from caft_plugin.model.trunk import Trunk, find_trunk
from caft_plugin.targets import IGNORE, Batch

HALF = (torch.bfloat16, torch.float16)


class LossesByKind:
    """Hooks on a model that read its predictions in training, with methods to attach and detach
    them.

    A token is masked where the model's input has the mask token in its place and its label is
    another. The logits are the model's own where it makes them, else those of its final hidden
    states at supervised positions.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_id: int,
        found: Callable[[Tensor, Tensor], object],
    ) -> None:
        """`found` receives the summed loss of masked and of other tokens, float32 (2,), and their
        numbers, (2,)."""
        self.model = model
        self.mask_id = mask_id
        self.found = found
        try:
            self.trunk: Trunk | None = find_trunk(model)
        except ConfigError:  # then only the model's own logits can be read
            self.trunk = None
        self._handles: list[RemovableHandle] = []
        self._final: Tensor | None = None
        self._batch: Batch | None = None

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    @property
    def _modules(self) -> list[nn.Module]:
        return [self.model] if self.trunk is None else [self.model, self.trunk.norm]

    def attach(self) -> LossesByKind:
        """Attach the hooks to the model; if they are attached, do nothing."""
        if self.attached:
            return self
        self._handles = [self.model.register_forward_hook(self._after_forward, with_kwargs=True)]
        if self.trunk is not None:
            self._handles.append(self.trunk.norm.register_forward_hook(self._after_norm))
        copies_leave_out(self, *self._modules)
        return self

    def __enter__(self) -> LossesByKind:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def detach(self) -> None:
        """Detach the hooks; if they are detached, do nothing."""
        for handle in self._handles:
            handle.remove()
        copies_hold_again(self, *self._modules)
        self._handles = []
        self._final = None

    @contextlib.contextmanager
    def reading(self, inputs: Batch) -> Iterator[None]:
        """Read forward passes with gradients as those of the batch `inputs`, or of parts of it,
        while this is open."""
        self._batch = {key: inputs.get(key) for key in ("input_ids", "labels")}
        try:
            yield
        finally:
            self._batch = self._final = None

    def _after_norm(
        self,
        norm: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> None:
        self._final = output

    @torch.compiler.disable
    def _after_forward(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, object],
        output: object,
    ) -> None:
        final = self._final
        self._final = None
        if self._batch is None or not torch.is_grad_enabled():
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        labels = kwargs.get("labels")
        if labels is None:  # a host that computes its loss itself keeps them from the model
            labels = self._batch["labels"]
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor):
            return
        if ids.shape != labels.shape:
            return
        logits = getattr(output, "logits", None)
        with torch.no_grad(), contextlib.ExitStack() as stack:
            logits_of = self._logits_of(logits, final, ids.shape, stack)
            if logits_of is not None:
                self._read(ids, labels, logits_of)

    def _logits_of(
        self,
        logits: Tensor | None,
        final: Tensor | None,
        shape: torch.Size,
        stack: contextlib.ExitStack,
    ) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return a function from positions (rows, places) to their logits, or None if there are
        none."""
        if isinstance(logits, Tensor) and not isinstance(logits, DTensor):
            if logits.shape[:-1] == shape:
                return lambda rows, places: logits[rows, places]
        if self.trunk is None or final is None or final.shape[:-1] != shape:
            return None
        # Every process comes here, whatever its batch: gathering a sharded unembedding waits for
        # all of them.
        unembedding = unsharded_twin(self.trunk.unembedding, final.dtype)
        dtypes = [p.dtype for p in unembedding.parameters() if p.is_floating_point()]
        # in half precision if either is: the other one's dtype would not match in the product
        half = next((dtype for dtype in (final.dtype, *dtypes[:1]) if dtype in HALF), None)
        autocast = torch.autocast(final.device.type, dtype=half, enabled=half is not None)
        stack.enter_context(autocast)
        stack.enter_context(without_dropout(unembedding))
        transform = self.trunk.transform or (lambda made: made)
        return lambda rows, places: transform(unembedding(final[rows, places]))

    def _read(
        self,
        ids: Tensor,
        labels: Tensor,
        logits_of: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        targets = labels[:, 1:]
        device = targets.device
        masked = (ids[:, 1:].to(device) == self.mask_id) & (targets != self.mask_id)
        rows, places = (targets != IGNORE).nonzero(as_tuple=True)
        sums = torch.zeros(2, device=device)
        counts = torch.zeros(2, dtype=torch.long, device=device)
        vocabulary = self.trunk.vocab_size if self.trunk is not None else 2**16
        # a few rows at a time: no float32 logits of the whole batch are made
        size = rows_at_a_time(device, vocabulary)
        for start in range(0, len(rows), size):
            at = rows[start : start + size], places[start : start + size]
            logits = logits_of(*at).float()
            wanted = targets[at].to(logits.device)
            losses = F.cross_entropy(logits, wanted, reduction="none").to(device)
            kind = 1 - masked[at].long()  # masked tokens come first
            sums.index_add_(0, kind, losses)
            counts.index_add_(0, kind, torch.ones_like(kind))
        self.found(sums, counts)
