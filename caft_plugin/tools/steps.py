"""Tokens per step of an inference engine with 1, 2, ... draft tokens, computed from generated
texts.

An engine uses the same number of draft tokens in every step. One forward pass over a text gives
each head's proposals at every position, so the steps for all numbers of draft tokens can be counted
at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from transformers.utils.logging import tqdm

from caft_plugin.caft.heads import replay, turn_with
from caft_plugin.drafting.decoding import Drafter
from caft_plugin.drafting.pass_notes import compiled_around, noted_pass


@dataclasses.dataclass
class Steps:
    """The tokens of texts, and the steps they take with 1, 2, ... draft tokens (up to the number of
    heads)."""

    tokens: int
    steps: list[int]

    def __iadd__(self, other: Steps) -> Steps:
        self.tokens += other.tokens
        both = zip(self.steps, other.steps, strict=True)
        self.steps = [own + its for own, its in both]
        return self

    def tokens_per_step(self) -> list[float]:
        return [self.tokens / max(steps, 1) for steps in self.steps]


def steps_with(drafter: Drafter, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Steps:
    """Return the steps that an engine would need with a drafter's heads.

    `texts` are pairs of a prompt and the text that the model has generated for it, both token ids.
    """
    numbers = range(1, len(drafter.heads) + 1)
    found = Steps(0, [0 for _ in numbers])
    for prompt, text in tqdm(texts, unit="text", desc="counting steps"):
        proposed = proposals(drafter, prompt, text)
        found += Steps(len(text), [steps_of(text, proposed, number) for number in numbers])
    return found


@torch.no_grad()
def proposals(
    drafter: Drafter,
    prompt: Sequence[int],
    text: Sequence[int],
) -> list[list[int]]:
    """Return each head's proposals (heads, tokens of the text), token ids: at the prompt's last
    position and at every position of the text except the last."""
    model: nn.Module = drafter.model
    trunk = drafter.trunk
    config = drafter.config
    device = next(trunk.last_layer.parameters()).device
    ids = torch.tensor([[*prompt, *text[:-1]]], device=device)
    # The forward pass notes what each head reads: the arguments of the last layer, and the hidden
    # state that the wiring names.
    with noted_pass(trunk, compiled_around(trunk)) as notes:
        model(input_ids=ids, use_cache=False)
    call, source = notes.read_by(config.head_input)
    positions = torch.arange(len(prompt) - 1, ids.shape[1], device=source.device)
    proposed = []
    with turn_with(drafter.heads):
        for layer in drafter.heads.layers:
            hidden = replay(layer, source, call, positions)
            if config.head_norm:
                hidden = trunk.norm(hidden)
            logits = trunk.logits(hidden)
            proposed.append(logits.argmax(-1).tolist())
    return proposed


def steps_of(
    text: Sequence[int],
    proposed: Sequence[Sequence[int]],
    number: int,
) -> int:
    """Return the steps that a text takes with `number` draft tokens, including the prompt's step,
    which has none."""
    written = 1
    steps = 1
    while written < len(text):
        right = 0
        # At the last position that the model has read, head 1 proposes the token after the newest
        # one.
        drafts = [of_head[written - 1] for of_head in proposed[:number]]
        for draft, token in zip(drafts, text[written : written + number], strict=False):
            if draft != token:
                break
            right += 1
        written += right + 1  # the model itself adds one token in each step
        steps += 1
    return steps
