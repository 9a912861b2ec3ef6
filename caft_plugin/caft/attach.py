"""Attach heads to a model, run them inside its forward pass, and detach them: a Request in, a
Result out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle
from transformers.utils import ModelOutput

from caft_plugin.caft.heads import (
    MODULE_NAME,
    NOTING,
    AuxiliaryHeads,
    LayerCall,
    refuse_taken,
    run_head,
)
from caft_plugin.caft.loss import (
    TOKENS,
    TOKENS_AND_HITS,
    Lesson,
    RowLoss,
    cross_entropy_of,
    weighted_sum,
)
from caft_plugin.config import CAFTConfig
from caft_plugin.errors import ConfigError
from caft_plugin.model.hidden import HiddenSubmodule, copies_hold_again, copies_leave_out
from caft_plugin.model.sharding import unsharded_twin
from caft_plugin.model.trunk import Trunk
from caft_plugin.targets import IGNORE, Batch, head_targets

# `logits_to_keep` for the fewest logits. With a plain integer, Gemma 4 would cut the hidden states
# inside its layers.
LAST_POSITION = torch.tensor([-1])

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Request:
    """The heads' work during one loss of the host.

    `targets` is (num_heads, batch, length), `weights` (num_heads,) the weight of each head's summed
    loss, and `run` selects the heads that run. In training, the result is part of the graph and
    `lesson` defines what heads learn; in evaluation, the result says where heads were right. With
    `next_tokens` (batch, length), the model's own targets, the model is called without labels and
    builds no logits; the loss in its output is their summed cross-entropy times
    `next_token_weight`.
    """

    targets: Tensor
    weights: Tensor
    run: list[bool]
    training: bool
    lesson: Lesson = TOKENS
    next_tokens: Tensor | None = None
    next_token_weight: Tensor | float = 1.0

    @classmethod
    def for_evaluation(cls, inputs: Batch, num_heads: int) -> Request:
        """Return the request that evaluates all heads on a batch."""
        targets = head_targets(inputs, num_heads)
        return cls(targets, torch.zeros(num_heads), [True] * num_heads, training=False)

    def with_next_tokens(self, labels: Tensor, weight: Tensor | float) -> Request:
        """Return this request with the model's own loss: `weight` times the cross-entropy of each
        next token."""
        next_tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        return dataclasses.replace(self, next_tokens=next_tokens, next_token_weight=weight)


@dataclasses.dataclass(frozen=True)
class Result:
    """The result of a request.

    `loss` is the weighted sum (part of the graph), `sums` (num_heads,) the summed loss of each
    head, float32, 0 for heads that did not run. In evaluation, `right` (num_heads, batch * length)
    is True where a head's top-1 prediction was its target.
    """

    loss: Tensor
    sums: Tensor
    right: Tensor | None


@dataclasses.dataclass
class _Reading:
    """An open request: the noted call of the model, and the result.

    `input_ids` are the batch's (None if it has none). `calls` holds the shape of the input_ids of
    each candidate call (None for a call without input_ids). `of_batch` is True while the current
    call runs on the batch.
    """

    request: Request
    input_ids: Tensor | None = None
    calls: list[torch.Size | None] = dataclasses.field(default_factory=list)
    of_batch: bool = False
    on_trust: bool = False
    call: LayerCall | None = None
    final: Tensor | None = None
    result: Result | None = None

    @property
    def counts(self) -> bool:
        """True if heads may train on, or be evaluated in, a call made now."""
        return not self.request.training or torch.is_grad_enabled()

    @property
    def wants_notes(self) -> bool:
        return self.of_batch and self.result is None and self.counts

    def begin_call(self, input_ids: Tensor | None) -> None:
        self.calls.append(None if input_ids is None else input_ids.shape)
        if self.result is None:
            of_batch = self.input_ids
            self.on_trust = input_ids is None and of_batch is not None
            self.of_batch = input_ids is None or of_batch is None or _same(input_ids, of_batch)

    def refuse_other_calls(self, name: str) -> None:
        """Raise ConfigError if heads did not train on the batch, or if that cannot be determined.

        `name` is the model's name in the message.
        """
        if self.input_ids is None or not self.calls or not self.request.training:
            return
        if self.result is None:
            asked = ", ".join(str(tuple(shape or ())) for shape in self.calls)
            raise ConfigError(
                f"caft: the loss called {name} with different input_ids than the batch (called with"
                f" shapes {asked}; the batch has {tuple(self.input_ids.shape)}), so heads would"
                " learn the wrong tokens. Use a trainer that passes the batch to the model"
                " unchanged (no reshaping, merging or replacing of rows), or train without CAFT."
            )
        if self.on_trust and len(self.calls) > 1:
            raise ConfigError(
                f"caft: the loss called {name} {len(self.calls)} times, the first time without"
                " input_ids (inputs_embeds), so caft_plugin cannot tell which call uses the batch."
                " Pass the batch's input_ids in the call that the heads should learn from, or"
                " train without CAFT."
            )


class AttachedHeads:
    """A handle that attaches heads to a model and detaches them, also as a context manager.

    While attached, the heads are the submodule `caft_heads` of `model`, so that optimizers and
    distributed wrappers see them, but they are not in its state dict. They run in a forward hook of
    `model`, inside any wrapper, and only within `answer`. While detached, they leave nothing on the
    model. If `model` is compiled, noting the heads' input is part of its graph; the heads
    themselves are not, because which heads run, and where, changes every step.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: AuxiliaryHeads,
        trunk: Trunk,
        config: CAFTConfig,
    ) -> None:
        self.model = model
        self.heads = heads
        self.trunk = trunk
        self.from_final = config.head_input == "final"
        self.apply_norm = bool(config.head_norm)
        self.hidden = HiddenSubmodule(model, MODULE_NAME, heads)
        self._handles: list[RemovableHandle] = []
        self._wrapper = WatchedWrapper()
        self._own_class: type = type(trunk.last_layer)
        self._noting_class: type | None = None
        self._reading: _Reading | None = None
        self._logits_checked = False

    @property
    def attached(self) -> bool:
        return bool(self._handles)

    def attach(self) -> AttachedHeads:
        """Attach the heads to the model; a no-op if they are attached.

        Raises:
            ConfigError: another trainer's heads are attached to the model or its last layer.
        """
        if self.attached:
            return self
        refuse_taken(self.trunk)
        layer = self.trunk.last_layer
        self.hidden.attach()
        device = next(layer.parameters()).device
        if device.type != "meta" and next(self.heads.parameters()).device != device:
            self.heads.to(device)
        if self._noting_class is None or type(layer) is not self._own_class:
            self._own_class = type(layer)
            self._noting_class = _noting(type(layer), self._note_call)
        # the same each time, or a compiled model would be compiled again
        layer.__class__ = self._noting_class
        self._handles = [
            self.trunk.norm.register_forward_hook(self._note_norm),
            self.model.register_forward_pre_hook(self._before_forward, with_kwargs=True),
            self.model.register_forward_hook(self._after_forward),
        ]
        copies_leave_out(self, self.model, self.trunk.norm, layer)
        return self

    def detach(self) -> None:
        """Remove the heads and every hook from the model; a no-op if they are detached."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._wrapper.watch(None)
        layer = self.trunk.last_layer
        copies_hold_again(self, self.model, self.trunk.norm, layer)
        wrapper = type(layer)
        if wrapper is self._noting_class:
            layer.__class__ = self._own_class
        elif self._noting_class in wrapper.__bases__:  # FSDP2 derived its own class from this one
            wrapper.__bases__ = tuple(
                self._own_class if base is self._noting_class else base
                for base in wrapper.__bases__
            )
            self._noting_class = None
        self.hidden.detach()

    def __enter__(self) -> AttachedHeads:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def answer(
        self,
        request: Request,
        host_loss: Callable[[], T],
        *,
        called: nn.Module | None = None,
        input_ids: Tensor | None = None,
    ) -> tuple[T, Result | None]:
        """Return the result of `host_loss`, and the heads' result, or None if the model was not
        called.

        Heads run in the first call of the model on the batch (in training: the first one with
        gradients).

        Args:
            request: what the heads compute.
            host_loss: computes the host's loss; it calls the model.
            called: the model that `host_loss` calls, wrapped or not.
            input_ids: the batch's (batch, length), which identify its call; None: use the first
                call.

        Raises:
            ConfigError: in training, no call used the batch, or it cannot be determined which one
                did.
        """
        with contextlib.nullcontext() if self.attached else self:
            reading = self._reading = _Reading(request, input_ids)
            self._wrapper.watch(wrapper_of(self.model, called))
            try:
                returned = host_loss()
            finally:
                self._reading = None
                self._wrapper.runs = False  # a wrapper that raised did not reset it
        reading.refuse_other_calls(type(self.trunk.model).__name__)
        return returned, reading.result

    def _note_call(
        self,
        layer: nn.Module,
        args: tuple,
        kwargs: dict[str, object],
    ) -> None:
        reading = self._reading
        if layer is not self.trunk.last_layer or reading is None or not reading.wants_notes:
            return
        reading.call = LayerCall.of(args, kwargs)

    def _note_norm(
        self,
        norm: nn.Module,
        args: tuple,
        output: Tensor,
    ) -> None:
        reading = self._reading
        if reading is not None and reading.call is not None and reading.wants_notes:
            reading.final = output

    @torch.compiler.disable
    def _before_forward(
        self,
        model: nn.Module,
        args: tuple,
        kwargs: dict[str, object],
    ) -> tuple[tuple, dict[str, object]] | None:
        reading = self._reading
        if reading is None or not reading.counts:
            return None
        reading.begin_call(_input_ids(args, kwargs))
        if reading.request.next_tokens is None or not reading.wants_notes:
            return None
        return args, {**kwargs, "labels": None, "logits_to_keep": LAST_POSITION.clone()}

    @torch.compiler.disable
    def _after_forward(
        self,
        model: nn.Module,
        args: tuple,
        output: object,
    ) -> ModelOutput | None:
        self.hidden.ran = True
        reading = self._reading
        if reading is None or reading.call is None or not reading.wants_notes:
            return None
        if not isinstance(output, ModelOutput):
            raise ConfigError(
                f"caft: the model returned a {type(output).__name__} instead of a ModelOutput; CAFT"
                " needs `return_dict` (the default of transformers) switched on."
            )
        request = reading.request
        call = reading.call
        final = reading.final
        reading.call = None  # from here on, calls of the norm are the heads'
        device, dtype, enabled = call.autocast
        trunk = self._unsharded_trunk(call.hidden_states.dtype)
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            self._refuse_other_logits(output, final, trunk)
            if request.next_tokens is not None:
                loss = self._next_token_loss(request, final, trunk)
                fields = dict(output.items())  # which keep their order
                output = type(output)(**{**fields, "loss": loss})
            with without_dropout(trunk.norm, trunk.unembedding):
                reading.result = self._run(request, call, final, trunk)
        if request.training and self._wrapper.runs:
            return _with_aux_loss(output, reading.result.loss)
        return output

    def _next_token_loss(
        self,
        request: Request,
        final: Tensor | None,
        trunk: Trunk,
    ) -> Tensor:
        if final is None or request.next_tokens is None:
            raise ConfigError(
                f"caft.fused_loss: {type(self.trunk.model).__name__} did not call its final norm,"
                " so the plugin cannot compute the next-token loss. Use fused_loss: false."
            )
        _refuse_other_shape(self.trunk.model, final, request.next_tokens)
        targets = request.next_tokens.to(final.device)
        positions = _with_target(targets)
        learned = targets.flatten()[positions]
        weights = final.new_ones(len(positions), dtype=torch.float32) * request.next_token_weight
        hidden = final.flatten(0, 1)[positions]
        row_loss = cross_entropy_of(trunk.logits)
        loss, _ = _weighted_loss(row_loss, weights, hidden, learned, trunk)
        return loss

    def _unsharded_trunk(self, dtype: torch.dtype) -> Trunk:
        """Return the trunk with norm and unembedding unsharded and without hooks (the user's and
        FSDP2's).

        The number of uses differs between processes (chunks of rows), so none of them may
        communicate; and hooks on these modules expect only the model's own hidden states.
        """
        norm = unsharded_twin(self.trunk.norm, dtype)
        unembedding = unsharded_twin(self.trunk.unembedding, dtype)
        return dataclasses.replace(self.trunk, norm=norm, unembedding=unembedding)

    def _refuse_other_logits(
        self,
        output: ModelOutput,
        final: Tensor | None,
        trunk: Trunk,
    ) -> None:
        """Raise ConfigError, at the first logits of the host, if `trunk.logits` computes others."""
        logits = output.get("logits")
        if self._logits_checked or logits is None or final is None:
            return
        has_shape = logits.dim() == 3 and len(logits) == len(final)
        if not has_shape or active_dropouts(trunk.unembedding):
            return
        self._logits_checked = True
        with torch.no_grad():
            # one position is enough: families differ by a factor or a cap on all logits
            theirs = logits[:1, -1].float()
            ours = trunk.logits(final[:1, -1]).float()
            same = (ours - theirs).norm() <= 0.05 * theirs.norm() + 1e-3
        if not same:
            raise ConfigError(
                f"caft: {type(self.trunk.model).__name__} computes its logits in a way that CAFT"
                " does not support, so heads would be trained on different logits than the"
                " model's. Please report the model's name."
            )

    def _run(
        self,
        request: Request,
        call: LayerCall,
        final: Tensor | None,
        trunk: Trunk,
    ) -> Result:
        source = final if self.from_final else call.hidden_states
        if source is None:
            raise ConfigError(
                f"caft: {type(self.trunk.model).__name__} did not call its final norm, so heads"
                " cannot read the final hidden state. Use head_input: penultimate."
            )
        _refuse_other_shape(self.trunk.model, source, request.targets[0])
        device = source.device
        num_heads = len(self.heads)
        lesson = request.lesson if request.training else TOKENS_AND_HITS
        checkpointing = bool(getattr(self.trunk.model, "is_gradient_checkpointing", False))
        zero = source.new_zeros((), dtype=torch.float32)
        rows: list[Tensor] = []
        learned: list[Tensor] = []
        numbers: list[Tensor] = []  # the head index of each row
        places: list[Tensor] = []  # the position of each row
        for index, layer in enumerate(self.heads.layers):
            if not request.run[index]:
                if request.training:
                    zero = zero + joined_zero(layer)
                continue
            targets = request.targets[index]
            positions = _with_target(targets.to(device))
            rows.append(run_head(layer, source, call, positions, checkpointing))
            learned.append(lesson.learned(targets, index, positions, final))
            numbers.append(torch.full_like(positions, index))
            places.append(positions)
        loss = zero
        sums = zero.new_zeros(num_heads)
        right = None
        if not request.training:
            everywhere = request.targets.flatten(1)
            right = torch.zeros(everywhere.shape, dtype=torch.bool, device=device)
        if rows:
            # the rows of all heads together, so that chunks of logits are full
            hidden = torch.cat(rows)
            number = torch.cat(numbers)
            if self.apply_norm:
                hidden = trunk.norm(hidden)
            weights = request.weights.to(device)[number]
            row_loss = lesson.row_loss(trunk.logits)
            total, figures = _weighted_loss(row_loss, weights, hidden, torch.cat(learned), trunk)
            loss = zero + total
            sums = sums.index_add(0, number, figures[:, 0])
            if right is not None:
                right[number, torch.cat(places)] = figures[:, 1].bool()
        return Result(loss, sums, right)


def _input_ids(args: tuple, kwargs: dict[str, object]) -> Tensor | None:
    """Return the token ids that a model is called with, or None if it is called with embeddings."""
    found = kwargs.get("input_ids", args[0] if args else None)
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None


def _same(ids: Tensor, others: Tensor) -> bool:
    """Return True if two tensors hold the same token ids.

    Identical tensors are not compared: on a GPU, a comparison would synchronise.
    """
    if ids is others:
        return True
    return ids.shape == others.shape and torch.equal(ids, others.to(ids.device))


def wrapper_of(model: nn.Module, called: nn.Module | None) -> nn.Module | None:
    """Return the module that searches the output of `model` for the graph when `called` is called.

    That is a distributed wrapper around the model, or the model itself under FSDP2; None otherwise,
    also for a compiled model.
    """
    called = getattr(called, "_orig_mod", called)
    return called if called is not model or isinstance(called, FSDPModule) else None


class WatchedWrapper:
    """Notes while a distributed wrapper runs, and removes the field `caft_loss` from the output it
    returns."""

    def __init__(self) -> None:
        self.runs = False
        self._wrapper: nn.Module | None = None
        self._handles: list[RemovableHandle] = []

    def watch(self, wrapper: nn.Module | None) -> None:
        """Watch this wrapper from now on. Its hooks stay until another one is watched: compiled
        code refers to them."""
        if wrapper is self._wrapper:
            return
        for handle in self._handles:
            handle.remove()
        self._wrapper = wrapper
        self._handles = []
        if wrapper is not None:
            self._handles = [
                wrapper.register_forward_pre_hook(self._enter),
                wrapper.register_forward_hook(self._leave),
            ]

    @torch.compiler.disable
    def _enter(self, wrapper: nn.Module, args: tuple) -> None:
        self.runs = True

    @torch.compiler.disable
    def _leave(
        self,
        wrapper: nn.Module,
        args: tuple,
        output: object,
    ) -> object:
        self.runs = False
        return _without_aux_loss(output)


def _with_target(targets: Tensor) -> Tensor:
    """Return the positions (n,) in the flattened batch where there is a target."""
    return (targets.flatten() != IGNORE).nonzero().squeeze(1)


def _refuse_other_shape(
    model: nn.Module,
    hidden: Tensor,
    targets: Tensor,
) -> None:
    """Raise ConfigError unless `hidden` (batch, length, hidden size) fits `targets` (batch,
    length)."""
    if hidden.shape[:-1] != targets.shape:
        raise ConfigError(
            f"caft: {type(model).__name__} received inputs whose shape differs from the labels"
            f" (hidden states {tuple(hidden.shape[:-1])}, targets {tuple(targets.shape)}, as"
            " (batch, length)), so heads would learn the wrong tokens. Use a trainer that passes"
            " the batch to the model unchanged (no prompt tuning, reshaping or merging of rows),"
            " or train without CAFT."
        )


def _weighted_loss(
    row_loss: RowLoss,
    weights: Tensor,
    hidden: Tensor,
    learned: Tensor,
    trunk: Trunk,
) -> tuple[Tensor, Tensor]:
    return weighted_sum(
        row_loss, weights, hidden, learned, trunk.vocab_size, trunk.unembedding.parameters()
    )


def joined_zero(module: nn.Module) -> Tensor:
    """Return 0, connected to every trainable tensor of `module`: DDP needs them all in the graph
    (FSDP2 does not)."""
    zero = torch.zeros((), device=next(module.parameters()).device)
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            zero = zero + 0.0 * parameter.sum(dtype=torch.float32)
    return zero


def active_dropouts(module: nn.Module) -> list[nn.Module]:
    dropouts = [m for m in module.modules() if "dropout" in type(m).__name__.lower()]
    return [dropout for dropout in dropouts if dropout.training]


@contextlib.contextmanager
def without_dropout(*modules: nn.Module) -> Iterator[None]:
    """Disable dropout inside `modules` (such as that of a LoRA on the unembedding): it draws no
    random numbers."""
    dropouts = [dropout for module in modules for dropout in active_dropouts(module)]
    for dropout in dropouts:
        dropout.training = False
    try:
        yield
    finally:
        for dropout in dropouts:
            dropout.training = True


def _noting(own_class: type, note: Callable[[nn.Module, tuple, dict[str, object]], None]) -> type:
    """Return a subclass of a layer's class that passes the arguments of each call to `note`.

    It overrides `__call__` because module hooks run inside gradient checkpointing, where tensors
    are detached from the graph. It keeps the class's name, because wrapping policies use it.
    """

    def __call__(self: nn.Module, *args: object, **kwargs: object) -> object:
        note(self, args, kwargs)
        return super(noting_class, self).__call__(*args, **kwargs)  # type: ignore[arg-type]

    noting_class = type(
        own_class.__name__,
        (own_class,),
        {
            "__call__": __call__,
            NOTING: True,
            "__module__": own_class.__module__,
            "__qualname__": own_class.__qualname__,
        },
    )
    return noting_class


@functools.cache
def _output_class(output_class: type) -> type:
    return dataclasses.make_dataclass(
        output_class.__name__,
        [("caft_loss", Tensor | None, dataclasses.field(default=None))],
        bases=(output_class,),
    )


def _with_aux_loss(output: ModelOutput, loss: Tensor) -> ModelOutput:
    """Return the model's output with a field `caft_loss`: distributed wrappers search the output
    for the graph."""
    return _output_class(type(output))(**dict(output.items()), caft_loss=loss)


def _without_aux_loss(output: object) -> object:
    """Return the model's own output, in its own class."""
    if not isinstance(output, ModelOutput) or "caft_loss" not in output:
        return output
    own_class = type(output).__bases__[0]
    return own_class(**{key: value for key, value in output.items() if key != "caft_loss"})
