"""The heads draft, the model checks: the text that the model would have written, in fewer passes of the model."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Cache,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from caft_plugin.config import CAFTConfig, ConfigError
from caft_plugin.heads import AuxiliaryHeads, LayerCall, build_heads, replay
from caft_plugin.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.pace import Pace
from caft_plugin.storage import unsharded_twin
from caft_plugin.trunk import Trunk, find_trunk

ASKED = 2  # heads at a time: the next ones only where their guesses may be worth sending
LONGEST_LAG = 32  # passes that a head has not read


@dataclasses.dataclass
class Drafted:
    """What came of one text: of each head how often its guess was sent to the model and how often it was right there,
    and how many passes of the model brought 1, 2, ... tokens."""

    drafted: list[int]
    accepted: list[int]
    lengths: list[int]

    @classmethod
    def nothing(cls, num_heads: int) -> Drafted:
        return cls([0] * num_heads, [0] * num_heads, [0] * (num_heads + 1))

    def __iadd__(self, other: Drafted) -> Drafted:
        for name in ("drafted", "accepted", "lengths"):
            ours, theirs = getattr(self, name), getattr(other, name)
            setattr(self, name, [a + b for a, b in zip(ours, theirs, strict=True)])
        return self

    @property
    def tokens(self) -> int:
        return sum(length * passes for length, passes in enumerate(self.lengths, 1))

    @property
    def passes(self) -> int:
        return sum(self.lengths)

    @property
    def tokens_per_pass(self) -> float:
        return self.tokens / max(self.passes, 1)


class Drafter:
    """Makes `generate` faster by the heads that a model was fine-tuned with: pass it as `custom_generate`.

    Head k guesses the token k+1 ahead. The model checks all guesses in one pass, and what it would not have written is
    dropped, so the text is that of plain `generate`: greedy or sampled, the latter with the same random numbers.
    (Passes of several tokens round otherwise than passes of one: where two tokens are as good as equally likely, the
    other one may come out. In float32 that hardly ever happens.)

    Args:
        model: a decoder-only model, or one with an adapter of PEFT.
        heads: heads over it.
        config: how the heads are wired, `head_input` and `head_norm` filled in.
        num_draft: guesses a pass, at most as many as there are heads. None: chosen in every round, from what passes of
            each width cost on this machine and from which guesses were right so far. Where guesses do not pay, the
            text goes on without them.
        confidence: only guesses of at least this probability, and those before them, are checked; between 0 and 1.
            None: no such limit.

    `last` tells what came of the last text. One text at a time: batches, beams and caches that cannot be cropped are
    refused with a ConfigError.
    """

    def __init__(
        self,
        model: nn.Module,
        heads: AuxiliaryHeads,
        config: CAFTConfig,
        *,
        num_draft: int | None = None,
        confidence: float | None = None,
    ) -> None:
        if num_draft is not None and not 0 <= num_draft <= len(heads):
            raise ConfigError(
                f"num_draft: got {num_draft}, but it takes 0 to {len(heads)}, the number of heads, or None."
            )
        if confidence is not None and not 0 <= confidence <= 1:
            raise ConfigError(f"confidence: got {confidence}, but it takes a probability, 0 to 1, or None.")
        self.trunk = find_trunk(model)
        self.heads = heads
        self.config = config
        self.num_draft = num_draft
        self.confidence = confidence
        self.pace = Pace(len(heads))
        self.last = Drafted.nothing(len(heads))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        heads: str | os.PathLike[str],
        *,
        num_draft: int | None = None,
        confidence: float | None = None,
    ) -> Drafter:
        """Heads from a folder, a run's folder with `caft_heads/` in it, or a Hub id.

        Raises:
            ConfigError: no such folder, or heads that do not fit this model.
        """
        trunk = find_trunk(model)
        folder = HeadsFolder.open(heads)
        asked = CAFTConfig(num_heads=folder.record.num_heads, heads=os.fspath(heads), train_heads="frozen")
        config = resolve_wiring(asked, folder.record)
        folder.check_model(config, trunk.model.config)
        folder.check_layers(trunk.layer_class)
        built = build_heads(model, trunk, config, seed=0)
        folder.load_into(built, trunk.layer_class)
        folder.warn_of_model(built.origin, trunk.model.config)
        return cls(model, built, config, num_draft=num_draft, confidence=confidence)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        text_streamer: BaseStreamer | None = None,
        **model_kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """What `generate` calls: the prompt (1, length) in, the whole text out.

        `text_streamer` is what `streamer` is elsewhere: `generate` takes that one away before it comes here.

        Raises:
            ConfigError: a batch, beams, or another setting that drafts do not go with.
        """
        cache = self._cache(model, input_ids, generation_config, model_kwargs)
        cache.activate_past_recording()
        text = _Text(input_ids, logits_processor, stopping_criteria, generation_config, text_streamer)
        self.last = Drafted.nothing(len(self.heads))
        with _LastCall(self.trunk) as last_call:
            side = _Side(self, last_call) if self.num_draft != 0 and self.pace.awake() else None
            guesses: list[int] = []
            first = True
            while True:
                began = time.perf_counter()
                sent = guesses
                outputs = _one_pass(model, text.ids, sent, first, model_kwargs)
                came = text.check(outputs.logits[:, -len(sent) - 1 :], sent)
                model_kwargs = model._update_model_kwargs_for_generation(
                    outputs, model_kwargs, num_new_tokens=len(came)
                )
                if first:
                    _refuse_recurrent(model, cache)
                wrong = len(sent) + 1 - len(came)
                cache.crop(-wrong)
                self._note(sent, came)
                if not first:
                    self.pace.pass_took(len(sent), time.perf_counter() - began)
                if text.done:
                    break
                guesses = []
                if side is None:
                    self.pace.rested(len(came))
                else:
                    guesses = side.guess(wrong, came, generation_config.max_length - text.length - 1)
                    if not first:
                        self.pace.round_took(len(came), time.perf_counter() - began)
                        if self.num_draft is None and not self.pace.worth_it():
                            side, guesses = None, []
                first = False
        for layer in cache.layers:  # a cache that is used on without a drafter is not cropped
            if getattr(layer, "record_past", False):
                layer.record_past = False  # type: ignore[union-attr]
        return text.result(cache)

    def _note(self, sent: list[int], came: list[int]) -> None:
        self.last.lengths[len(came) - 1] += 1
        for head, guess in enumerate(sent):
            self.last.drafted[head] += 1
            self.last.accepted[head] += came[head : head + 1] == [guess]

    def _cache(
        self, model: nn.Module, input_ids: Tensor, config: GenerationConfig, model_kwargs: dict[str, Any]
    ) -> DynamicCache:
        """The cache that `generate` has made. Raises ConfigError where the drafter cannot follow."""
        if find_trunk(model).model is not self.trunk.model:
            raise ConfigError(
                f"Drafter: called by {type(model).__name__}, but made for another model "
                f"({type(self.trunk.model).__name__}). Make a drafter for each: Drafter.from_pretrained(model, heads)."
            )
        if model.training:
            raise ConfigError(
                "Drafter: the model is in training mode, where dropout changes each pass. Call model.eval()."
            )
        if len(input_ids) > 1:
            raise ConfigError(
                f"Drafter: got {len(input_ids)} texts at a time, but it takes 1: as soon as one text takes fewer "
                "guesses than another, their rows no longer line up. Generate one after the other, with "
                "num_return_sequences=1."
            )
        mode = config.get_generation_mode()
        if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
            raise ConfigError(f"Drafter: got {mode.value}, but it takes greedy search and sampling (num_beams: 1).")
        for key in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
            if getattr(config, key, None):
                raise ConfigError(
                    f"Drafter: {key} does not go with drafts. Leave it out, or leave custom_generate out."
                )
        cache = next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)
        if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
            found = "none (use_cache: false)" if cache is None else type(cache).__name__
            raise ConfigError(
                f"Drafter: needs a DynamicCache, which can be cropped, but the cache is {found}. Leave "
                "cache_implementation and use_cache out."
            )
        if any(layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")):
            raise ConfigError(
                "Drafter: the prompt is in the cache already, and what the heads would have kept of it is not. Pass "
                "the whole prompt without a cache."
            )
        return cache


class _LastCall:
    """While it is open: what the last layer was called with, and what the final norm returned, in the newest pass."""

    def __init__(self, trunk: Trunk) -> None:
        self.trunk = trunk
        self.call: LayerCall | None = None
        self.final: Tensor | None = None

    def __enter__(self) -> _LastCall:
        self.handles = [
            self.trunk.last_layer.register_forward_pre_hook(self._note_call, with_kwargs=True),
            self.trunk.norm.register_forward_hook(self._note_norm),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_call(self, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.call = LayerCall.of(args, kwargs)

    def _note_norm(self, norm: nn.Module, args: tuple, output: Tensor) -> None:
        self.final = output


@dataclasses.dataclass(frozen=True)
class _Pass:
    """What a head needs of a pass of the model: the call of the last layer, what heads read (1, length, hidden size),
    the last position that counts, (1,), and how many behind it were wrong guesses."""

    call: LayerCall
    source: Tensor
    at: Tensor
    wrong: int


class _Side:
    """The heads beside one text: a cache for each, and the guesses that no token has answered yet.

    A head is asked only where its guess may be worth sending. It then reads the passes since it was last asked, one
    after the other; a head that is not asked for long is out for the rest of the text, and those behind it.
    """

    def __init__(self, drafter: Drafter, last_call: _LastCall) -> None:
        self.drafter = drafter
        self.last_call = last_call
        trunk = drafter.trunk
        self.caches = [DynamicCache(config=trunk.model.config) for _ in drafter.heads.layers]
        for cache in self.caches:
            cache.activate_past_recording()
        self.norm = unsharded_twin(trunk.norm, trunk.model.dtype)  # without hooks: its use here is no pass of the model
        self.unread: list[list[_Pass]] = [[] for _ in self.caches]  # by head
        self.open: list[tuple[list[float], list[int], list[int]]] = []

    def guess(self, wrong: int, came: list[int], most: int) -> list[int]:
        """The guesses to check next, `most` at most. `came` are the tokens of this round, after `wrong` guesses less
        than were sent."""
        self._learn(came)
        self._note_pass(wrong)
        probabilities: list[float] = []
        guesses: list[int] = []
        most = min(max(most, 0), len(self.unread))
        while len(guesses) < most and self._how_many([*probabilities, *[1.0] * ASKED], most) > len(guesses):
            asked = range(len(guesses), min(len(guesses) + ASKED, most))
            hidden = torch.cat([self._read(head) for head in asked])
            if self.drafter.config.head_norm:
                hidden = self.norm(hidden)
            best = self.drafter.trunk.logits(hidden).float().softmax(-1).max(-1)
            probabilities += best.values.tolist()
            guesses += best.indices.tolist()
        self.open.append((probabilities, guesses, []))
        return guesses[: self._how_many(probabilities, most)]

    def _note_pass(self, wrong: int) -> None:
        call = self.last_call.call
        assert call is not None
        final = self.drafter.config.head_input == "final"
        source = self.last_call.final if final else call.hidden_states
        assert source is not None
        at = torch.tensor([source.shape[1] - 1 - wrong], device=source.device)
        for unread in self.unread:
            unread.append(_Pass(call, source, at, wrong))
        asleep = (head for head, unread in enumerate(self.unread) if len(unread) > LONGEST_LAG)
        del self.unread[next(asleep, len(self.unread)) :]

    def _read(self, head: int) -> Tensor:
        """A head's output (1, hidden size) at the newest position that counts."""
        layer, cache = self.drafter.heads.layers[head], self.caches[head]
        last = len(self.drafter.trunk.layers) - 1
        for a_pass in self.unread[head]:
            output = replay(layer, a_pass.source, a_pass.call, a_pass.at, cache)
            for own in cache.layers[last : last + 1]:  # none where the last layer reads another one's keys and values
                own.crop(-a_pass.wrong)  # type: ignore[union-attr]
        self.unread[head].clear()
        return output

    def _learn(self, came: list[int]) -> None:
        for _, _, answered in self.open:
            answered.extend(came)
        for probabilities, guesses, answered in self.open:
            if len(answered) >= len(guesses):
                self.drafter.pace.learn(probabilities, guesses, answered)
        self.open = [entry for entry in self.open if len(entry[2]) < len(entry[1])]

    def _how_many(self, probabilities: list[float], most: int) -> int:
        drafter, most = self.drafter, min(most, len(probabilities))
        if drafter.confidence is not None:
            sure = (at for at, p in enumerate(probabilities) if p < drafter.confidence)
            most = min(most, next(sure, most))
        if drafter.num_draft is not None:
            return min(most, drafter.num_draft)
        return drafter.pace.how_many(probabilities, most)


class _Text:
    """A text while it is written: token by token, as plain `generate` picks or draws them."""

    def __init__(
        self,
        ids: Tensor,
        processors: LogitsProcessorList,
        stopping: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        self.ids = ids
        self.processors = processors
        self.stopping = stopping
        self.config = config
        self.streamer = streamer
        self.done = False
        wants = config.return_dict_in_generate
        self.scores: tuple[Tensor, ...] | None = () if wants and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if wants and config.output_logits else None
        if streamer is not None:
            streamer.put(ids.cpu())

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def check(self, logits: Tensor, sent: list[int]) -> list[int]:
        """Adds the model's own tokens, one after the other, up to the first that is not the guess that was sent for it.
        `logits` (1, guesses + 1, vocabulary). Returns the tokens."""
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        came: list[int] = []
        for row, guess in enumerate([*sent, None]):
            scores = self.processors(self.ids, logits[:, row])  # type: ignore[arg-type]
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (logits[:, row],)
            if self.config.do_sample:
                token = torch.multinomial(scores.softmax(-1), num_samples=1)
            else:
                token = scores.argmax(-1, keepdim=True)
            self.ids = torch.cat([self.ids, token], dim=1)
            if self.streamer is not None:
                self.streamer.put(token[0].cpu())
            came.append(int(token))
            self.done = bool(self.stopping(self.ids, self.scores).all())
            if self.done or came[-1] != guess:
                break
        return came

    def result(self, cache: Cache) -> Tensor | GenerateDecoderOnlyOutput:
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        name = "cache" if "cache" in inspect.signature(GenerateDecoderOnlyOutput).parameters else "past_key_values"
        fields = {"sequences": self.ids, "scores": self.scores, "logits": self.logits, name: cache}
        return GenerateDecoderOnlyOutput(**fields)  # type: ignore[arg-type]


def _one_pass(model: Any, ids: Tensor, sent: list[int], first: bool, model_kwargs: dict[str, Any]) -> Any:
    """The model over the tokens that its cache lacks and the guesses behind them."""
    if sent:
        ids = torch.cat([ids, ids.new_tensor([sent])], dim=1)
        model_kwargs = model._update_model_kwargs_for_generation({}, dict(model_kwargs), num_new_tokens=len(sent))
    inputs = model.prepare_inputs_for_generation(
        ids, next_sequence_length=None if first else len(sent) + 1, is_first_iteration=first, **model_kwargs
    )
    if "logits_to_keep" in inputs:
        inputs["logits_to_keep"] = len(sent) + 1
    return model(**inputs, return_dict=True)


def _refuse_recurrent(model: nn.Module, cache: DynamicCache) -> None:
    """Raises ConfigError after the first pass where a layer has a state that cannot be put back to before a wrong
    guess: a recurrent one, in the cache or (the cache's layer is then still empty) in the layer itself. A convolution's
    is cropped as keys and values are."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "recurrent_states"):
            recurrent = any(layer.is_recurrent_states_initialized.values())
            fit = any(layer.is_conv_states_initialized.values()) and not recurrent
        else:
            fit = layer.is_initialized
        if not fit:
            raise ConfigError(
                f"Drafter: {type(model).__name__} has recurrent layers, whose state cannot be put back to before a "
                "wrong guess. Generate without custom_generate."
            )
