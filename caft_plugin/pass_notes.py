"""Note the last layer's call and the final norm's output in one forward pass, of this thread alone.

Other threads may use the same model meanwhile, so nothing is kept on its modules and no hook is registered: tables of
hooks must not change while another thread goes through them, and compiled code does not see later ones.
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

from caft_plugin.config import ConfigError
from caft_plugin.heads import LayerCall
from caft_plugin.trunk import Trunk


@dataclasses.dataclass
class PassNotes:
    """The last layer's call and the final norm's output (batch, length, hidden size) of one forward pass, and whether
    the model began it without what earlier passes had cached."""

    trunk: Trunk
    call: LayerCall | None = None
    final: Tensor | None = None
    restart: bool = False

    def read_by(self, head_input: str | None) -> tuple[LayerCall, Tensor]:
        """Return the call that heads repeat, and their input (batch, length, hidden size).

        Raises:
            ConfigError: the pass did not come through these modules.
        """
        source = self.final if head_input == "final" or self.call is None else self.call.hidden_states
        if self.call is None or source is None:
            part = "its last decoder layer" if self.call is None else "its final norm"
            raise ConfigError(
                f"Drafter: {type(self.trunk.model).__name__} ran a forward pass without calling {part} "
                f"({type(self.trunk.last_layer).__name__}) as a module, so the heads have nothing to read. The usual "
                "cause is a forward that was replaced: by torch.compile inside of another wrapper, by torch.jit or "
                "torch.export, or by a library's fast inference. Undo that (compile the model after the drafter has "
                "written), or generate without custom_generate."
            )
        return self.call, source


_notes: ContextVar[PassNotes | None] = ContextVar("caft_pass_notes", default=None)


@contextlib.contextmanager
def noted_pass(trunk: Trunk, eager: bool) -> Iterator[PassNotes]:
    """While this is open, note what this thread's call of the model does with the last layer and the final norm.

    With `eager`, for a model that is compiled around its last layer, compiled code runs as it was written meanwhile:
    what a graph calls cannot be noted, and what it returns may be overwritten by its next run (CUDA graphs).
    """
    notes = PassNotes(trunk)
    with ExitStack() as stack:
        for module in (trunk.last_layer, trunk.norm):
            stack.enter_context(_shared(module, functools.partial(_noting, module)))
        if eager:
            stack.enter_context(_shared("eager", functools.partial(torch.compiler.set_stance, "force_eager")))
        token = _notes.set(notes)
        stack.callback(_notes.reset, token)
        yield notes


_lock = threading.Lock()
_open: dict[Hashable, tuple[ExitStack, int]] = {}


@contextlib.contextmanager
def _shared(key: Hashable, enter: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    """Keep `enter()` open as long as any thread is in here with this key."""
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
    """A subclass of a module's class that notes its call where it is the last layer or the norm of this thread's pass.

    Always the same one for a class, or compiled code would be compiled again for each pass.
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
        """A copy or a pickle that another thread makes meanwhile is of the module's own class."""
        make, (first, *rest), *state = super(noting_class, self).__reduce_ex__(protocol)  # type: ignore[arg-type, misc]
        return make, (own if first is noting_class else first, *rest), *state

    names = {"__call__": __call__, "__reduce_ex__": __reduce_ex__, "__module__": own.__module__}
    noting_class = type(own.__name__, (own,), {**names, "__qualname__": own.__qualname__})
    return noting_class


def compiled_around(trunk: Trunk) -> bool:
    """Whether a module around the last layer is compiled, by its `compile()` or by `torch.compile` of its forward."""
    return any(
        _is_compiled(module) and module is not trunk.last_layer and trunk.last_layer in set(module.modules())
        for module in trunk.model.modules()
    )


def _is_compiled(module: nn.Module) -> bool:
    compiled_call = getattr(module, "_compiled_call_impl", None) is not None
    return compiled_call or hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
