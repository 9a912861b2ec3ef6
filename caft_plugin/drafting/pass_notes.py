"""Note the last layer's call and the final norm's output in one forward pass of the current thread.

Other threads may use the same model at the same time, so nothing is stored on its modules and no
hook is registered: hook tables must not change while another thread iterates over them, and
compiled code ignores later hooks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from caft_plugin.caft.heads import LayerCall
from caft_plugin.errors import ConfigError
from caft_plugin.model.trunk import Trunk


@dataclasses.dataclass
class PassNotes:
    """The last layer's call and the final norm's output (batch, length, hidden size) of one forward
    pass.

    `restart` is True if the model started it without the KV cache of earlier forward passes.
    """

    trunk: Trunk
    call: LayerCall | None = None
    final: Tensor | None = None
    restart: bool = False

    def read_by(self, head_input: str | None) -> tuple[LayerCall, Tensor]:
        """Return the call that heads repeat, and their input (batch, length, hidden size).

        Raises:
            ConfigError: the forward pass did not call these modules.
        """
        source = self.final
        if self.call is not None and head_input != "final":
            source = self.call.hidden_states
        if self.call is None or source is None:
            part = "its last decoder layer" if self.call is None else "its final norm"
            raise ConfigError(
                f"Drafter: {type(self.trunk.model).__name__} ran a forward pass without calling"
                f" {part} ({type(self.trunk.last_layer).__name__}) as a module, so the heads have"
                " no input. The usual cause is a replaced forward: by torch.compile inside another"
                " wrapper, by torch.jit or torch.export, or by a library's fast inference. Undo"
                " that (compile the model after the drafter's first use), or generate without"
                " custom_generate."
            )
        return self.call, source


_notes: ContextVar[PassNotes | None] = ContextVar("caft_pass_notes", default=None)


@contextlib.contextmanager
def noted_pass(trunk: Trunk, eager: bool) -> Iterator[PassNotes]:
    """Note the calls of the last layer and the final norm in this thread's forward pass.

    `eager` is for a model that is compiled around its last layer: compiled code then runs eagerly.
    Calls inside a graph cannot be noted, and its outputs may be overwritten by its next run (CUDA
    graphs).
    """
    notes = PassNotes(trunk)
    with ExitStack() as stack:
        for module in (trunk.last_layer, trunk.norm):
            stack.enter_context(_shared(module, functools.partial(_noting, module)))
        if eager:
            uncompiled = functools.partial(torch.compiler.set_stance, "force_eager")
            stack.enter_context(_shared("eager", uncompiled))
        token = _notes.set(notes)
        stack.callback(_notes.reset, token)
        yield notes


_lock = threading.Lock()
_open: dict[Hashable, tuple[ExitStack, int]] = {}


@contextlib.contextmanager
def _shared(key: Hashable, enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Keep the context `enter()` open while any thread uses this key."""
    with _lock:
        stack, inside = _open.get(key) or (ExitStack(), 0)
        if not inside:
            stack.enter_context(enter())
        _open[key] = stack, inside + 1
    try:
        yield
    finally:
        with _lock:
            stack, inside = _open.pop(key)
            if inside > 1:
                _open[key] = stack, inside - 1
            else:
                stack.close()


@contextlib.contextmanager
def _noting(module: nn.Module) -> Iterator[None]:
    own = type(module)
    module.__class__ = _noting_class(own)  # type: ignore[arg-type]
    try:
        yield
    finally:
        module.__class__ = own


@functools.cache
def _noting_class(own: type) -> type:
    """Return a subclass of a module's class that notes its call if it is the last layer or norm of
    this thread's trunk.

    It is cached by class: a new one would recompile compiled code in each forward pass.
    """

    def __call__(self: nn.Module, *args: object, **kwargs: object) -> object:
        notes = _notes.get()
        if notes is not None and self is notes.trunk.last_layer:
            notes.call = LayerCall.of(args, kwargs)
        output = own.__call__(self, *args, **kwargs)
        if notes is not None and self is notes.trunk.norm and isinstance(output, Tensor):
            notes.final = output
        return output

    def __reduce_ex__(self: nn.Module, protocol: int) -> tuple:
        """Give copies and pickles made by another thread the module's own class."""
        reduced = super(noting_class, self).__reduce_ex__(protocol)  # type: ignore[arg-type, misc]
        make, (first, *rest), *state = reduced
        if first is noting_class:
            first = own
        return make, (first, *rest), *state

    names = {
        "__call__": __call__,
        "__reduce_ex__": __reduce_ex__,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
    }
    noting_class = type(own.__name__, (own,), names)
    return noting_class


def compiled_around(trunk: Trunk) -> bool:
    """Return True if a module around the last layer is compiled, by `compile()` or `torch.compile`
    of its forward."""
    return any(
        _is_compiled(module)
        and module is not trunk.last_layer
        and trunk.last_layer in set(module.modules())
        for module in trunk.model.modules()
    )


def _is_compiled(module: nn.Module) -> bool:
    compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_call or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
