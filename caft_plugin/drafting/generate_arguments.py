"""Arguments of `generate` that it does not pass on to a callable `custom_generate`: they are passed
on, or refused.

`generate` keeps `streamer`, `tokenizer`, `assistant_model` and `synced_gpus` for its own modes. A
callable only gets the keyword arguments in its signature. `generate` asks for it in the method that
holds the other arguments.
"""

from __future__ import annotations

import inspect
from types import FrameType, MethodType

from caft_plugin.errors import ConfigError

HOLDER = "_extract_generation_mode_kwargs"  # the method of `generate` that holds them
# Arguments that are passed on, by the parameter that gets them: `generate` never passes on the name
# `streamer`.
HANDED_OVER = {"tokenizer": "tokenizer", "streamer": "begun_streamer"}


class TakesModeArguments:
    """The signature of a callable `custom_generate`. When `generate` asks for it, the arguments
    that it would drop are passed on."""

    def __get__(self, instance: object, owner: type) -> inspect.Signature:
        if instance is None:
            raise AttributeError("__signature__")  # for the class, Python makes one
        frame = inspect.currentframe()
        while frame is not None and not _holds(frame, instance):
            frame = frame.f_back
        if frame is not None:
            _hand_over(frame.f_locals["generation_mode_kwargs"], frame.f_locals["kwargs"])
        return inspect.signature(MethodType(owner.__call__, instance))


def _holds(frame: FrameType, instance: object) -> bool:
    return frame.f_code.co_name == HOLDER and frame.f_locals.get("custom_generate") is instance


def _hand_over(given: dict[str, object], kwargs: dict[str, object]) -> None:
    """Add the arguments of `generate` to the keyword arguments that it passes on.

    Raises:
        ConfigError: an argument that drafting does not support.
    """
    if given.get("assistant_model") is not None:
        raise ConfigError(
            f"Drafter: got assistant_model ({type(given['assistant_model']).__name__}), but the"
            " heads propose the draft tokens. Remove assistant_model, or remove custom_generate."
        )
    if given.get("synced_gpus"):
        raise ConfigError(
            "Drafter: got synced_gpus (the default for FSDP and ZeRO-3 with several processes),"
            " which needs the same number of forward passes in every process; with drafting this"
            " number depends on the text. Generate without custom_generate, or gather the model"
            " into one process first."
        )
    kwargs.update(
        {name: given[argument] for argument, name in HANDED_OVER.items() if argument in given}
    )
