"""Hide caft_plugin's modules on a model from the host: from state dict, parameter count, copies and
the host's code."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.trainer_callback import CallbackHandler

from caft_plugin.errors import ConfigError
from caft_plugin.model.sharding import give_memory


class Handle(Protocol):
    """Attaches something to a model and detaches it."""

    def attach(self) -> object: ...
    def detach(self) -> None: ...


def refuse_taken_model(model: nn.Module, taken: bool) -> None:
    """Raise ConfigError if `taken`: another trainer has attached something to this model."""
    if taken:
        raise ConfigError(
            f"caft: this {type(model).__name__} is in use by another trainer with `caft` or `meap`."
            " Trainers can share a model one after the other, not at the same time: let the other"
            " train() or evaluate() finish first."
        )


class HiddenSubmodule:
    """A handle that adds a submodule to a model and removes it again.

    Optimizers and distributed wrappers find it; the model's state dict and `num_parameters` do not
    include it.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        module: nn.Module,
    ) -> None:
        self.model = model
        self.name = name
        self.module = module
        self.attached = False
        self.ran = False  # whether the model was called since attaching
        self._out_of_sight = False
        self._shown: Literal["all", "frozen"] | None = None
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Add the module to the model.

        Raises:
            ConfigError: the model already has a submodule with this name.
        """
        refuse_taken_model(self.model, taken=hasattr(self.model, self.name))
        give_memory(self.module)
        self.model.add_module(self.name, None if self._out_of_sight else self.module)
        self._handles = [
            # functools.partial, because torch sets an attribute on the function
            self.model.register_state_dict_post_hook(functools.partial(self._hide)),
            self.model.register_load_state_dict_post_hook(self._forgive),
        ]
        # it writes its count into the index of a sharded save
        if isinstance(self.model, PreTrainedModel):
            self._count = self.model.num_parameters
            self.model.num_parameters = self._num_parameters  # type: ignore[method-assign]
        self.attached = True

    def detach(self) -> None:
        """Remove the module from the model; a no-op if it is detached."""
        if not self.attached:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        delattr(self.model, self.name)
        if isinstance(self.model, PreTrainedModel):
            vars(self.model).pop("num_parameters", None)
        self.attached = False

    @contextlib.contextmanager
    def out_of_sight(self) -> Iterator[None]:
        """Hide the submodule from the model's modules and parameters.

        The host's own code (a penalty on all parameters, an average of them) then finds the model
        as it would be without caft_plugin. A no-op if nothing is attached, if nested, and in a
        model sharded by FSDP2 that was not called yet: its first call must find every module that
        it shards.
        """
        waits = isinstance(self.model, FSDPModule) and not self.ran
        if not self.attached or self._out_of_sight or waits:
            yield
            return
        self._out_of_sight = True
        setattr(self.model, self.name, None)  # keeps its place among the submodules
        try:
            yield
        finally:
            self._out_of_sight = False
            if self.attached:
                setattr(self.model, self.name, self.module)

    def _num_parameters(
        self, only_trainable: bool = False, exclude_embeddings: bool = False
    ) -> int:
        """Return `PreTrainedModel.num_parameters` without the submodule."""
        with self.out_of_sight():
            return self._count(only_trainable, exclude_embeddings)

    @contextlib.contextmanager
    def in_state_dict(self, which: Literal["all", "frozen"] = "all") -> Iterator[None]:
        """Show the submodule, or only its frozen parameters, in the model's state dict.

        Two hosts need it. With FSDP2's `cpu_ram_efficient_loading`, accelerate sends the state dict
        of the process that read the weights to the others; parameters missing from it would never
        reach them. And torch's `ignore_frozen_params` removes every frozen parameter from the state
        dict and fails if one is missing.
        """
        self._shown = which
        try:
            yield
        finally:
            self._shown = None

    def _hide(
        self,
        owner: nn.Module,
        state: dict[str, Tensor],
        prefix: str,
        metadata: object,
    ) -> None:
        start = f"{prefix}{self.name}."
        shown = set()
        if self._shown == "all":
            return
        if self._shown == "frozen":
            for name, parameter in self.module.named_parameters():
                if not parameter.requires_grad:
                    shown.add(f"{start}{name}")
        hidden = [key for key in state if key.startswith(start) and key not in shown]
        for key in hidden:
            del state[key]

    def _forgive(self, owner: nn.Module, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [key for key in missing if not key.startswith(f"{self.name}.")]


class CopyWithoutUs:
    """Makes copies of a module as it would be without the attached handles.

    Hosts copy a model for an average of weights, a teacher, the best model so far, or a file;
    copies outlive training. The methods are set on the module's instance, where `copy.deepcopy` and
    pickle find them.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.handles: list[Handle] = []

    def copied(self, memo: dict[int, object]) -> nn.Module:
        """Implement `__deepcopy__`."""
        handles = list(self.handles)
        for handle in reversed(handles):
            handle.detach()
        try:
            return copy.deepcopy(self.module, memo)
        finally:
            for handle in handles:
                handle.attach()

    def reduced(self, protocol: object) -> tuple[Callable, tuple[nn.Module]]:
        """Implement `__reduce_ex__`: a pickle holds a copy instead of the module."""
        return itself, (self.copied({}),)


def itself(module: nn.Module) -> nn.Module:
    return module


ON_MODULE = {"__deepcopy__": CopyWithoutUs.copied, "__reduce_ex__": CopyWithoutUs.reduced}


def copier_of(module: nn.Module) -> CopyWithoutUs | None:
    """Return the copier of a module, or None if no handle is attached to it."""
    return getattr(vars(module).get("__deepcopy__"), "__self__", None)


def copies_leave_out(handle: Handle, *modules: nn.Module) -> None:
    """Make copies of `modules`, and of modules that contain them, without what `handle`
    attached."""
    for module in modules:
        copier = copier_of(module) or CopyWithoutUs(module)
        copier.handles.append(handle)
        for name, method in ON_MODULE.items():
            vars(module)[name] = method.__get__(copier)


def copies_hold_again(handle: Handle, *modules: nn.Module) -> None:
    """Undo `copies_leave_out`."""
    for module in modules:
        copier = copier_of(module)
        if copier is None or handle not in copier.handles:
            continue
        copier.handles.remove(handle)
        if not copier.handles:
            for name in ON_MODULE:
                del vars(module)[name]


@contextlib.contextmanager
def all_out_of_sight(parts: list[HiddenSubmodule]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.out_of_sight())
        yield


@contextlib.contextmanager
def shown_to(accelerator: Accelerator, parts: list[HiddenSubmodule]) -> Iterator[None]:
    """Show `parts` in the model's state dict during `accelerator.prepare`.

    If only one process has read the weights, accelerate sends its state dict to the others.
    """
    prepare = accelerator.prepare
    own = "prepare" in vars(accelerator)

    def prepare_with_ours(*args: object, **kwargs: object) -> object:
        with contextlib.ExitStack() as stack:
            for part in parts:
                stack.enter_context(part.in_state_dict())
            return prepare(*args, **kwargs)

    accelerator.prepare = prepare_with_ours
    try:
        yield
    finally:
        if own:
            accelerator.prepare = prepare
        else:
            del accelerator.prepare


@contextlib.contextmanager
def hidden_from(callbacks: CallbackHandler, parts: list[HiddenSubmodule]) -> Iterator[None]:
    """Hide `parts` of the model from callbacks."""
    call_event = callbacks.call_event
    own = "call_event" in vars(callbacks)

    def call_without_ours(*args, **kwargs):
        with all_out_of_sight(parts):
            return call_event(*args, **kwargs)

    callbacks.call_event = call_without_ours  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own:
            callbacks.call_event = call_event  # type: ignore[method-assign]
        else:
            del callbacks.call_event
