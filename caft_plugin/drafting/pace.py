"""Choose the draft length from measured forward-pass times and from the acceptance of earlier draft
tokens."""

from __future__ import annotations

import functools
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

BINS = 10  # bins of a head's probability of its draft token
FADING = 0.98  # decay per step of past tokens and seconds
FIRST_ROUNDS = 10  # steps before drafting is judged
# tokens without drafting
FIRST_REST = 32
LONGEST_REST = 2048
FIRST_PASSES = 3  # forward passes of a width before their median is used

P = ParamSpec("P")
T = TypeVar("T")


def _in_turn(method: Callable[Concatenate[Pace, P], T]) -> Callable[Concatenate[Pace, P], T]:
    @functools.wraps(method)
    def in_turn(self: Pace, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.turn:
            return method(self, *args, **kwargs)

    return in_turn


class Pace:
    """Statistics of drafting, over steps and texts. A step is a forward pass over the last token
    and its draft tokens.

    A head's draft token counts as accepted if it and those of all earlier heads match the text,
    whether they were verified or not. Its estimated acceptance rate is the one among draft tokens
    with a similar probability; before there are any, that probability. Texts in several threads may
    share one Pace.
    """

    def __init__(self, num_heads: int) -> None:
        heads = range(num_heads)
        self.tried = [[0] * BINS for _ in heads]
        self.right = [[0] * BINS for _ in heads]
        lengths = range(num_heads + 1)
        self.seconds: list[deque[float]] = [deque(maxlen=9) for _ in lengths]  # by draft length
        # tokens without drafting: in the next rest, and left in this one
        self.rest = FIRST_REST
        self.resting = 0
        self._start_afresh()
        self.turn = threading.RLock()

    def _start_afresh(self) -> None:
        self.rounds = 0
        self.recent_tokens = 0.0
        self.recent_seconds = 0.0

    @_in_turn
    def awake(self) -> bool:
        """Return True if heads should draft for the text that starts now."""
        return self.resting <= 0

    @_in_turn
    def rested(self, tokens: int) -> None:
        """Record that `tokens` tokens were generated without drafting."""
        self.resting -= tokens

    @_in_turn
    def learn(
        self,
        probabilities: Sequence[float],
        guesses: Sequence[int],
        came: Sequence[int],
    ) -> None:
        """Record one step.

        Args:
            probabilities: each head's probability of its draft token.
            guesses: each head's draft token.
            came: the generated tokens at these positions.
        """
        # `came` may be longer: the model also writes the token after the last draft token
        heads = zip(probabilities, guesses, came, strict=False)
        for head, (probability, guess, token) in enumerate(heads):
            at = _bin(probability)
            self.tried[head][at] += 1
            if guess != token:
                return  # later draft tokens follow another text
            self.right[head][at] += 1

    @_in_turn
    def chance(self, head: int, probability: float) -> float:
        """Return the estimated acceptance rate of a head's draft token, given that all earlier ones
        are accepted."""
        at = _bin(probability)
        # the head's own probability counts as two draft tokens
        right = self.right[head][at] + 2 * probability
        return right / (self.tried[head][at] + 2)

    @_in_turn
    def pass_took(self, drafts: int, seconds: float) -> None:
        self.seconds[drafts].append(seconds)

    @_in_turn
    def round_took(self, tokens: int, seconds: float) -> None:
        """Record a step with drafting: its tokens, and its time including the heads'."""
        self.rounds += 1
        self.recent_tokens = FADING * self.recent_tokens + tokens
        self.recent_seconds = FADING * self.recent_seconds + seconds

    @_in_turn
    def cost(self, drafts: int) -> float:
        """Return the median seconds of a forward pass with this draft length.

        A length with few measurements costs at most as much as the next shorter one, so that it is
        tried.
        """
        seconds = self.seconds[drafts]
        if len(seconds) >= FIRST_PASSES:
            return statistics.median(seconds)
        below = [self.cost(drafts - 1)] if drafts else []
        return min([*seconds, *below], default=0.0)

    @_in_turn
    def how_many(self, probabilities: Sequence[float], most: int) -> int:
        """Return the draft length with the largest expected gain: tokens gained, minus the tokens
        its time costs."""
        if len(self.seconds[0]) < FIRST_PASSES:
            return 0  # a plain forward pass is measured first, for comparison
        tokens_a_second = self.recent_tokens / self.recent_seconds if self.recent_seconds else 0.0
        best = 0
        chance = 1.0  # that this draft token and all earlier ones are accepted
        gained = 0.0
        best_gain = 0.0
        for head, probability in enumerate(probabilities[:most]):
            chance *= self.chance(head, probability)
            gained += chance
            drafts = head + 1
            seconds = self.cost(drafts) - self.cost(0)
            gain = gained - tokens_a_second * seconds
            if gain > best_gain:
                best = drafts
                best_gain = gain
        return best

    @_in_turn
    def worth_it(self) -> bool:
        """Return True if drafting was faster over recent steps; if not, switch it off for a while,
        longer each time."""
        if self.rounds < FIRST_ROUNDS:
            return True
        if self.recent_seconds <= self.recent_tokens * self.cost(0):
            if self.rounds >= 5 * FIRST_ROUNDS:
                self.rest = FIRST_REST
            return True
        self.resting = self.rest
        self.rest = min(2 * self.rest, LONGEST_REST)
        self._start_afresh()
        return False


def _bin(probability: float) -> int:
    return min(int(probability * BINS), BINS - 1)
