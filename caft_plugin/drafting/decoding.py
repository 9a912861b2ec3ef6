"""Speculative decoding with the heads: the same text as plain generation, in fewer forward passes
of the model."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import threading
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

from caft_plugin.caft.heads import AuxiliaryHeads, LayerCall, build_heads, replay, turn_with
from caft_plugin.caft.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.config import CAFTConfig
from caft_plugin.drafting.generate_arguments import TakesModeArguments
from caft_plugin.drafting.pace import Pace
from caft_plugin.drafting.pass_notes import PassNotes, compiled_around, noted_pass
from caft_plugin.drafting.rotary import borders
from caft_plugin.errors import ConfigError, heads_named
from caft_plugin.model.sharding import unsharded_twin
from caft_plugin.model.trunk import Trunk, find_trunk

ASKED = 2  # heads that run at a time; the next ones run only if their draft tokens may pay off
LONGEST_LAG = 32  # forward passes that a head may leave unread

# the model's keyword arguments, which `generate` updates after each forward pass
Kwargs = dict[str, Any]


@dataclasses.dataclass(repr=False)
class Drafted:
    """The draft tokens of one text: how many each head proposed and how many were accepted, and the
    number of forward passes (`lengths`) that gave 1, 2, ... tokens."""

    drafted: list[int]
    accepted: list[int]
    lengths: list[int]

    @classmethod
    def nothing(cls, num_heads: int) -> Drafted:
        return cls([0] * num_heads, [0] * num_heads, [0] * (num_heads + 1))

    def __iadd__(self, other: Drafted) -> Drafted:
        for name in ("drafted", "accepted", "lengths"):
            pairs = zip(getattr(self, name), getattr(other, name), strict=True)
            setattr(self, name, [a + b for a, b in pairs])
        return self

    def __repr__(self) -> str:
        by_head = zip(self.accepted, self.drafted, strict=True)
        accepted = ", ".join(f"{right} of {sent}" for right, sent in by_head)
        return (
            f"<{self.tokens} tokens in {self.passes} forward passes, draft tokens accepted by head:"
            f" {accepted}>"
        )

    def note(self, sent: list[int], came: list[int]) -> None:
        """Count a forward pass that verified the draft tokens `sent` and gave the tokens `came`."""
        self.lengths[len(came) - 1] += 1
        for head, token in enumerate(sent):
            self.drafted[head] += 1
            # `came` ends where the model's token differed from the draft token
            self.accepted[head] += came[head : head + 1] == [token]

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
    """Speeds up `generate` with the heads that a model was fine-tuned with: pass it as
    `custom_generate`.

    Head k predicts the token k+1 ahead. The model verifies all draft tokens in one forward pass,
    and tokens that it would not have generated are dropped. So the text is that of plain
    `generate`, greedy or sampled, the latter with the same random numbers. (A forward pass over
    several tokens rounds differently from one over a single token: where two tokens are almost
    equally likely, the other one may be chosen. In float32 this is rare.)

    Args:
        model: a decoder-only model, or one with a PEFT adapter.
        heads: heads for this model.
        config: the heads' wiring, with `head_input` and `head_norm` filled in.
        num_draft: draft tokens per step, at most the number of heads. None: chosen each step from
            measured forward-pass times and recent acceptance rates; if drafting does not pay off,
            it is switched off.

    A drafter can generate in several threads at the same time, and several drafters can share a
    model or heads. Each call has one prompt: batches, beams and caches that cannot be cropped are
    refused with a ConfigError. The model may change between texts (adapters set, merged or
    unloaded, modules replaced, `compile`).
    """

    __signature__ = TakesModeArguments()

    def __init__(
        self,
        model: nn.Module,
        heads: AuxiliaryHeads,
        config: CAFTConfig,
        *,
        num_draft: int | None = None,
    ) -> None:
        if num_draft is not None and not 0 <= num_draft <= len(heads):
            raise ConfigError(
                f"num_draft: got {num_draft}, but it accepts 0 to {len(heads)}, the number of"
                " heads, or None."
            )
        self.model = find_trunk(model).model
        self.heads = heads
        self.config = config
        self.num_draft = num_draft
        self.pace = Pace(len(heads))
        self._newest = Drafted.nothing(len(heads))
        self._own = threading.local()

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        heads: str | os.PathLike[str],
        *,
        num_draft: int | None = None,
    ) -> Drafter:
        """Load heads from a folder, a run's folder with `caft_heads/` in it, or a Hub id.

        Raises:
            ConfigError: the folder does not exist, or the heads do not fit this model.
        """
        with heads_named("heads"):
            trunk = find_trunk(model)
            folder = HeadsFolder.open(heads)
            asked = CAFTConfig(
                num_heads=folder.record.num_heads, heads=os.fspath(heads), train_heads="frozen"
            )
            config = resolve_wiring(asked, folder.record)
            folder.refuse_other_model(config, trunk.model.config)
            folder.refuse_other_layers(trunk.layer_class)
            built = build_heads(model, trunk, config, seed=0)
            folder.load_into(built, trunk.layer_class)
            folder.warn_of_model(built.origin, trunk.model.config)
        return cls(model, built, config, num_draft=num_draft)

    def __repr__(self) -> str:
        model = type(self.model).__name__
        length = "chosen" if self.num_draft is None else str(self.num_draft)
        return (
            f"<Drafter for {model}: {len(self.heads)} heads, draft tokens: {length} in every step>"
        )

    @property
    def trunk(self) -> Trunk:
        """Return the parts of the model in its current state."""
        return find_trunk(self.model)

    @property
    def last(self) -> Drafted:
        """Return the counts of this thread's last text; in a thread without one, those of any
        thread's last text."""
        return getattr(self._own, "last", self._newest)

    def generate(
        self,
        model: Any,
        *inputs: Tensor,
        **settings: object,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate a text: `model.generate(*inputs, **settings)` with this drafter as its
        `custom_generate`.

        Raises:
            ConfigError: a batch, beams, or another setting that drafting does not support.
        """
        return model.generate(*inputs, custom_generate=self, **settings)

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        text_streamer: BaseStreamer | None = None,
        begun_streamer: BaseStreamer | None = None,
        tokenizer: object = None,
        **model_kwargs: object,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate a text when `generate` calls this: from the prompt (1, length) to the complete
        text.

        `begun_streamer` is the `streamer` of `generate`, which already has the prompt; a
        `text_streamer` does not have it yet. `tokenizer` is only used by `generate`, for
        `stop_strings`.

        Raises:
            ConfigError: a batch, beams, or another setting that drafting does not support.
        """
        trunk = self._trunk_of(model)
        _refuse_settings(model, input_ids, generation_config)
        passes = _Passes(model, trunk, model_kwargs)

        if text_streamer is not None:
            text_streamer.put(input_ids.cpu())
        streamer = text_streamer if begun_streamer is None else begun_streamer
        text = _Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)

        drafted = Drafted.nothing(len(self.heads))
        try:
            self._write(text, passes, drafted, generation_config.max_length)
        finally:
            # also when an error ends the text early
            self._own.last = drafted
            self._newest = drafted
        return text.result(passes.end())

    def _write(
        self,
        text: _Text,
        passes: _Passes,
        drafted: Drafted,
        max_length: int,
    ) -> None:
        """Generate step by step: a forward pass verifies the draft tokens, then heads propose the
        next ones."""
        side: _Side | None = None
        if self.num_draft != 0 and self.pace.awake():
            side = _Side(self, passes.trunk)
        sent: list[int] = []
        while True:
            first = passes.first
            began = time.perf_counter()
            logits, notes, sent = passes.run(text.ids, sent)
            came = text.check(logits, sent)
            wrong = len(sent) + 1 - len(came)
            passes.keep(len(came), wrong)
            drafted.note(sent, came)
            if not first:  # the first forward pass reads the prompt
                self.pace.pass_took(len(sent), time.perf_counter() - began)
            if text.done:
                return

            if side is None:
                sent = []
                self.pace.rested(len(came))
                continue
            room = passes.room(text.length)
            most = int(min(room, max_length - text.length - 1))
            sent = side.propose(notes, wrong, came, most)
            # without room the heads only read, which says nothing about drafting
            if first or not room:
                continue
            self.pace.round_took(len(came), time.perf_counter() - began)
            if self.num_draft is None and not self.pace.worth_it():
                side = None
                sent = []

    def _trunk_of(self, model: nn.Module) -> Trunk:
        """Return the parts of the model. Raise ConfigError if it is another model, or in training
        mode."""
        trunk = find_trunk(model)
        if trunk.model is not self.model:
            raise ConfigError(
                f"Drafter: called by {type(model).__name__}, but made for another model"
                f" ({type(self.model).__name__}). Make a drafter for each model:"
                " Drafter.from_pretrained(model, heads)."
            )
        if model.training:
            raise ConfigError(
                "Drafter: the model is in training mode, where dropout changes each forward pass."
                " Call model.eval()."
            )
        device = next(trunk.last_layer.parameters()).device
        if next(self.heads.parameters()).device != device:  # the model was moved
            self.heads.to(device)
        return trunk


class _Passes:
    """The model's forward passes for one text, with its cache and keyword arguments."""

    def __init__(
        self,
        model: Any,
        trunk: Trunk,
        kwargs: Kwargs,
    ) -> None:
        self.model = model
        self.trunk = trunk
        self.kwargs = kwargs
        self.cache = _croppable_cache(kwargs)
        self.cache.activate_past_recording()
        self.borders = borders(trunk.model)
        self.eager = compiled_around(trunk)
        self.first = True

    def run(self, ids: Tensor, sent: list[int]) -> tuple[Tensor, PassNotes, list[int]]:
        """Run the model over the tokens that are not in its cache and the draft tokens after them.

        Returns:
            The logits (1, draft tokens + 1, vocabulary) at the last of these tokens, the notes of
            the forward pass, and the draft tokens that were in it: none if the model discards its
            cache, which can be because of them.
        """
        inputs = self._inputs(ids, sent)
        # The model may have dropped its cache because the draft tokens reach too far.
        if sent and self._thrown_away(inputs):
            inputs = self._inputs(ids, [])
            sent = []
        restart = self._thrown_away(inputs)
        if restart:
            self._restart(inputs)
        checked = len(sent) + 1
        if "logits_to_keep" in inputs:
            inputs["logits_to_keep"] = checked
        with noted_pass(self.trunk, self.eager) as notes:
            outputs = self.model(**inputs, return_dict=True)
        notes.restart = restart
        self.kwargs = self._lengthened(self.kwargs, 1, outputs)
        return outputs.logits[:, -checked:], notes, sent

    def _inputs(self, ids: Tensor, sent: list[int]) -> Kwargs:
        kwargs = self.kwargs
        if sent:
            drafts = ids.new_tensor([sent])
            ids = torch.cat([ids, drafts], dim=1)
            kwargs = self._lengthened(dict(kwargs), len(sent))  # not kept: they may be rejected
        width = None if self.first else len(sent) + 1
        return self.model.prepare_inputs_for_generation(
            ids, next_sequence_length=width, is_first_iteration=self.first, **kwargs
        )

    def _thrown_away(self, inputs: Kwargs) -> bool:
        return not any(value is self.cache for value in inputs.values())

    def _restart(self, inputs: Kwargs) -> None:
        """Give the model a new cache that can be cropped. Phi-3 discards its own when its rotary
        embeddings change."""
        name = next(name for name, value in self.kwargs.items() if value is self.cache)
        self.cache = DynamicCache(config=self.model.config.get_text_config())
        self.cache.activate_past_recording()
        inputs[name] = self.cache

    def keep(self, came: int, wrong: int) -> None:
        """Keep the `came` tokens of this forward pass, and remove its `wrong` draft tokens from the
        cache."""
        self.kwargs = self._lengthened(self.kwargs, came - 1)
        if self.first:
            _refuse_recurrent(self.model, self.cache)
        self.cache.crop(-wrong)
        self.first = False

    def _lengthened(
        self,
        kwargs: Kwargs,
        tokens: int,
        outputs: object = None,
    ) -> Kwargs:
        # one by one: several at a time would repeat several token types instead of the last one
        for _ in range(tokens):
            kwargs = self.model._update_model_kwargs_for_generation(
                outputs or {}, kwargs, is_encoder_decoder=False
            )
        return kwargs

    def room(self, length: int) -> float:
        """Return how many draft tokens the next forward pass may have without changing the text, at
        this length."""
        positions = self.kwargs.get("position_ids") if self.borders else None
        reach = length if positions is None else int(positions.max()) + 1
        return min((border.room(reach) for border in self.borders), default=math.inf)

    def end(self) -> DynamicCache:
        """Return the cache as plain `generate` does, so that it can be used without a drafter."""
        for layer in self.cache.layers:
            if getattr(layer, "record_past", False):
                layer.record_past = False  # type: ignore[union-attr]
        return self.cache


@dataclasses.dataclass(frozen=True)
class _Pass:
    """The data of a forward pass that a head needs: the call of the last layer, the heads' input
    (1, length, hidden size), the last valid position, (1,), and the number of rejected draft tokens
    after it."""

    call: LayerCall
    source: Tensor
    at: Tensor
    wrong: int


@dataclasses.dataclass(frozen=True)
class _Proposal:
    """The heads' draft tokens of one step with their probabilities, and the tokens that the text
    got at these positions so far."""

    probabilities: list[float]
    tokens: list[int]
    answered: list[int] = dataclasses.field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.answered) >= len(self.tokens)


class _Side:
    """The drafting state of one text: a KV cache for each head, and the draft tokens that are not
    verified yet.

    A head runs only if its draft token may pay off. It then reads the forward passes since its last
    run, one after the other. A head that has not run for too long is switched off for the rest of
    the text, with all later heads.
    """

    def __init__(self, drafter: Drafter, trunk: Trunk) -> None:
        self.drafter = drafter
        # copies without hooks, since this is not a forward pass of the model
        dtype = trunk.model.dtype
        self.trunk = dataclasses.replace(
            trunk,
            norm=unsharded_twin(trunk.norm, dtype),
            unembedding=unsharded_twin(trunk.unembedding, dtype),
        )
        self.open: list[_Proposal] = []
        self._start()

    def _start(self) -> None:
        self.caches = [
            DynamicCache(config=self.trunk.model.config) for _ in self.drafter.heads.layers
        ]
        for cache in self.caches:
            cache.activate_past_recording()
        self.unread: list[list[_Pass]] = [[] for _ in self.caches]  # by head

    def propose(
        self,
        notes: PassNotes,
        wrong: int,
        came: list[int],
        most: int,
    ) -> list[int]:
        """Return the draft tokens to verify next.

        Args:
            notes: of this step's forward pass.
            wrong: number of this step's draft tokens that were rejected.
            came: the tokens of this step.
            most: maximum number of draft tokens.
        """
        self._learn(came)
        self._note_pass(notes, wrong)
        proposal = _Proposal([], [])
        most = min(max(most, 0), len(self.unread))
        while len(proposal.tokens) < most and self._more_may_pay(proposal, most):
            begin = len(proposal.tokens)
            self._draft(range(begin, min(begin + ASKED, most)), proposal)
        self.open.append(proposal)
        return proposal.tokens[: self._how_many(proposal.probabilities, most)]

    def _draft(self, heads: range, proposal: _Proposal) -> None:
        """Run heads, in one multiplication by the unembedding, and add their draft tokens."""
        hidden = torch.cat([self._read(head) for head in heads])
        if self.drafter.config.head_norm:
            hidden = self.trunk.norm(hidden)
        logits = self.trunk.logits(hidden).float()
        best = logits.softmax(-1).max(-1)
        proposal.probabilities.extend(best.values.tolist())
        proposal.tokens.extend(best.indices.tolist())

    def _more_may_pay(self, proposal: _Proposal, most: int) -> bool:
        """Return True if the next heads' draft tokens would be verified if they were certain."""
        at_best = [*proposal.probabilities, *[1.0] * ASKED]
        return self._how_many(at_best, most) > len(proposal.tokens)

    def _note_pass(self, notes: PassNotes, wrong: int) -> None:
        call, source = notes.read_by(self.drafter.config.head_input)
        last_valid = source.shape[1] - 1 - wrong
        at = torch.tensor([last_valid], device=source.device)
        if notes.restart:
            self._start()
        for unread in self.unread:
            unread.append(_Pass(call, source, at, wrong))
        # a head's draft token is of use only after all earlier heads' ones
        for head, unread in enumerate(self.unread):
            if len(unread) > LONGEST_LAG:
                del self.unread[head:]
                break

    def _read(self, head: int) -> Tensor:
        """Return a head's output (1, hidden size) at the newest valid position."""
        layer = self.drafter.heads.layers[head]
        cache = self.caches[head]
        last = len(self.trunk.layers) - 1
        with turn_with(self.drafter.heads):
            for a_pass in self.unread[head]:
                output = replay(layer, a_pass.source, a_pass.call, a_pass.at, cache)
                if len(cache.layers) > last:  # not if the last layer uses another layer's cache
                    cache.layers[last].crop(-a_pass.wrong)  # type: ignore[union-attr]
        self.unread[head].clear()
        return output

    def _learn(self, came: list[int]) -> None:
        for proposal in self.open:
            proposal.answered.extend(came)
            if proposal.complete:
                pace = self.drafter.pace
                pace.learn(proposal.probabilities, proposal.tokens, proposal.answered)
        self.open = [proposal for proposal in self.open if not proposal.complete]

    def _how_many(self, probabilities: list[float], most: int) -> int:
        drafter = self.drafter
        most = min(most, len(probabilities))
        if drafter.num_draft is not None:
            return min(most, drafter.num_draft)
        return drafter.pace.how_many(probabilities, most)


class _Text:
    """A text during generation: tokens are chosen one by one, as plain `generate` does."""

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
        self.scores: tuple[Tensor, ...] | None = None
        self.logits: tuple[Tensor, ...] | None = None
        if config.return_dict_in_generate and config.output_scores:
            self.scores = ()
        if config.return_dict_in_generate and config.output_logits:
            self.logits = ()

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def check(self, logits: Tensor, sent: list[int]) -> list[int]:
        """Append the model's tokens up to the first that differs from its draft token, and return
        them.

        `logits` has the shape (1, draft tokens + 1, vocabulary).
        """
        # as plain `generate` does: a copy, since processors may change it in place, in float32
        logits = logits.to(copy=True, dtype=torch.float32, device=self.ids.device)
        came: list[int] = []
        for row, draft in enumerate([*sent, None]):  # after the last one, any token is new
            here = logits[:, row]
            scores = self.processors(self.ids, here)  # type: ignore[arg-type]
            if self.scores is not None:
                self.scores += (scores,)
            if self.logits is not None:
                self.logits += (here,)
            came.append(self._append_token(scores))
            self.done = bool(self.stopping(self.ids, self.scores).all())
            if self.done or came[-1] != draft:
                break
        return came

    def _append_token(self, scores: Tensor) -> int:
        """Choose the next token and append it.

        Random numbers are drawn as plain `generate` draws them: once for each token of the text.
        """
        if self.config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)
        else:
            token = scores.argmax(-1, keepdim=True)
        self.ids = torch.cat([self.ids, token], dim=1)
        if self.streamer is not None:
            self.streamer.put(token[0].cpu())
        return int(token)

    def result(self, cache: Cache) -> Tensor | GenerateDecoderOnlyOutput:
        if self.streamer is not None:
            self.streamer.end()
        if not self.config.return_dict_in_generate:
            return self.ids
        known = inspect.signature(GenerateDecoderOnlyOutput).parameters
        name = "cache" if "cache" in known else "past_key_values"
        fields = {"sequences": self.ids, "scores": self.scores, "logits": self.logits, name: cache}
        return GenerateDecoderOnlyOutput(**fields)  # type: ignore[arg-type]


def _refuse_settings(
    model: nn.Module,
    input_ids: Tensor,
    config: GenerationConfig,
) -> None:
    """Raise ConfigError for settings of `generate` that drafting does not support."""
    if len(input_ids) > 1:
        raise ConfigError(
            f"Drafter: got a batch of {len(input_ids)} texts, but it accepts 1: when texts accept"
            " different numbers of draft tokens, their rows no longer line up. Generate one text"
            " after the other, with num_return_sequences=1."
        )
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ConfigError(
            f"Drafter: got {mode.value}, but it accepts greedy search and sampling (num_beams=1)."
        )
    for key in ("output_attentions", "output_hidden_states", "prefill_chunk_size"):
        if getattr(config, key, None):
            raise ConfigError(
                f"Drafter: {key} is not supported with drafting. Remove it, or remove"
                " custom_generate."
            )


def _croppable_cache(model_kwargs: Kwargs) -> DynamicCache:
    """Return the cache that `generate` has made. Raise ConfigError if it cannot be cropped."""
    cache = next((value for value in model_kwargs.values() if isinstance(value, Cache)), None)
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        found = "none (use_cache=False)" if cache is None else type(cache).__name__
        raise ConfigError(
            f"Drafter: needs a DynamicCache, which can be cropped, but the cache is {found}. Remove"
            " cache_implementation and use_cache."
        )
    if any(layer.get_seq_length() for layer in cache.layers if hasattr(layer, "get_seq_length")):
        raise ConfigError(
            "Drafter: the cache already has the prompt, but the heads have not read it. Pass the"
            " complete prompt without a cache."
        )
    return cache


def _refuse_recurrent(model: nn.Module, cache: DynamicCache) -> None:
    """Raise ConfigError, after the first forward pass, if a layer has a state that cannot be
    restored after a rejected draft token.

    That is a recurrent state, in the cache or (if the cache's layer is still empty) in the layer
    itself. A convolution's state is cropped like keys and values.
    """
    layers: list[Any] = cache.layers
    for layer in layers:
        if hasattr(layer, "recurrent_states"):
            recurrent = any(layer.is_recurrent_states_initialized.values())
            fit = any(layer.is_conv_states_initialized.values()) and not recurrent
        else:
            fit = layer.is_initialized
        if not fit:
            raise ConfigError(
                f"Drafter: {type(model).__name__} has recurrent layers, whose state cannot be"
                " restored after a rejected draft token. Generate without custom_generate."
            )
