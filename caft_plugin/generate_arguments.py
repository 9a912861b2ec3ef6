"""Arguments of `generate` that it drops before a callable `custom_generate`: they are handed over, or refused.

`generate` keeps `streamer`, `tokenizer`, `assistant_model` and `synced_gpus` for its own modes. A callable gets only
those further keyword arguments that its signature names, and it asks for that signature where it holds the rest.
"""

from __future__ import annotations

import inspect
from types import FrameType, MethodType

from caft_plugin.config import ConfigError

HOLDER = "_extract_generation_mode_kwargs"  # the method of `generate` that holds them
# What is handed over, and the parameter it comes in: `streamer` is no name that `generate` gives away.
HANDED_OVER = {"tokenizer": "tokenizer", "streamer": "begun_streamer"}


class TakesModeArguments:
    """The signature of a callable that is passed as `custom_generate`: who asks for it in `generate` hands over what
    would be dropped."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # the class has its own
        frame = inspect.currentframe()
        while frame is not None and not _holds(frame, instance):
            frame = frame.f_back
        if frame is not None:
            _hand_over(frame.f_locals["generation_mode_kwargs"], frame.f_locals["kwargs"])
        return inspect.signature(MethodType(owner.__call__, instance))


def _holds(frame: FrameType, instance: object) -> bool:
    return frame.f_code.co_name == HOLDER and frame.f_locals.get("custom_generate") is instance


def _hand_over(given: dict[str, object], kwargs: dict[str, object]) -> None:
    """Puts what `generate` was given among the keyword arguments that it passes on.

    Raises:
        ConfigError: an argument that a drafter cannot follow.
    """
    if given.get("assistant_model") is not None:
        raise ConfigError(
            f"Drafter: got assistant_model ({type(given['assistant_model']).__name__}), but the heads draft in its "
            "place. Leave assistant_model out, or leave custom_generate out."
        )
    if given.get("synced_gpus"):
        raise ConfigError(
            "Drafter: got synced_gpus (the default under FSDP and ZeRO-3 with several processes), which needs the same "
            "number of forward passes in every process; with draft tokens each text has its own. Generate without "
            "custom_generate, or gather the model into one process first."
        )
    kwargs.update({name: given[argument] for argument, name in HANDED_OVER.items() if argument in given})
