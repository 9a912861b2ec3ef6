"""How many tokens to draft: what passes of each width cost on this machine, and which guesses were right so far."""

from __future__ import annotations

import functools
import itertools
import statistics
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Concatenate, ParamSpec, TypeVar

BINS = 10  # of a head's own probability of its guess
FADING = 0.98  # what tokens and seconds of the past count, a round later
FIRST_ROUNDS = 10  # before drafts are judged
FIRST_REST, LONGEST_REST = 32, 2048  # tokens
FIRST_PASSES = 3  # of a width, before their median is what it costs

P = ParamSpec("P")
T = TypeVar("T")


def _in_turn(method: Callable[Concatenate[Pace, P], T]) -> Callable[Concatenate[Pace, P], T]:
    @functools.wraps(method)
    def in_turn(self: Pace, *args: P.args, **kwargs: P.kwargs) -> T:
        with self.turn:
            return method(self, *args, **kwargs)

    return in_turn


class Pace:
    """Learns over rounds and texts. A round is a pass of the model over the last token and the drafts behind it.

    A head's guess counts as right where it and those of the heads before it came true, whether it was sent to the
    model or not. Its chance is the share of right ones among guesses of about the same probability; before there are
    any, that probability itself. Texts in several threads may share one.
    """

    def __init__(self, num_heads: int) -> None:
        self.tried = [[0] * BINS for _ in range(num_heads)]
        self.right = [[0] * BINS for _ in range(num_heads)]
        self.seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(num_heads + 1)]  # of a pass, by drafts
        self.rest, self.resting = FIRST_REST, 0  # tokens to be written plainly: the next time, and still
        self._start_afresh()
        self.turn = threading.RLock()

    def _start_afresh(self) -> None:
        self.rounds = 0
        self.recent_tokens, self.recent_seconds = 0.0, 0.0

    @_in_turn
    def awake(self) -> bool:
        """Whether the heads are to draft for the text that begins."""
        return self.resting <= 0

    @_in_turn
    def rested(self, tokens: int) -> None:
        """So many tokens were written without the heads."""
        self.resting -= tokens

    @_in_turn
    def learn(self, probabilities: Sequence[float], guesses: Sequence[int], came: Sequence[int]) -> None:
        """Of one round: each head's probability of its guess, its guess, and the tokens that came."""
        for head, (probability, guess, token) in enumerate(zip(probabilities, guesses, came, strict=False)):
            at = _bin(probability)
            self.tried[head][at] += 1
            if guess != token:
                return
            self.right[head][at] += 1

    @_in_turn
    def chance(self, head: int, probability: float) -> float:
        """Of a head's guess, given that those of the heads before it are right."""
        at = _bin(probability)
        return (self.right[head][at] + 2 * probability) / (self.tried[head][at] + 2)

    @_in_turn
    def pass_took(self, drafts: int, seconds: float) -> None:
        self.seconds[drafts].append(seconds)

    @_in_turn
    def round_took(self, tokens: int, seconds: float) -> None:
        """A round with heads, the heads' own time included."""
        self.rounds += 1
        self.recent_tokens = FADING * self.recent_tokens + tokens
        self.recent_seconds = FADING * self.recent_seconds + seconds

    @_in_turn
    def cost(self, drafts: int) -> float:
        """Seconds of a pass; of a width that was hardly tried, at most those of the next one below it, so that it will
        be."""
        seconds = self.seconds[drafts]
        if len(seconds) >= FIRST_PASSES:
            return statistics.median(seconds)
        below = [self.cost(drafts - 1)] if drafts else []
        return min([*seconds, *below], default=0.0)

    @_in_turn
    def how_many(self, probabilities: Sequence[float], most: int) -> int:
        """How many of the guesses to send: as many as bring more tokens than the time that they cost would."""
        if len(self.seconds[0]) < FIRST_PASSES:
            return 0  # what a plain pass costs is what drafts are held against
        tokens_a_second = self.recent_tokens / self.recent_seconds if self.recent_seconds else 0.0
        chances = itertools.accumulate(
            (self.chance(head, p) for head, p in enumerate(probabilities)), lambda a, b: a * b
        )
        best, gained, best_gain = 0, 0.0, 0.0
        for drafts, chance in enumerate(itertools.islice(chances, most), 1):
            gained += chance
            gain = gained - tokens_a_second * (self.cost(drafts) - self.cost(0))
            if gain > best_gain:
                best, best_gain = drafts, gain
        return best

    @_in_turn
    def worth_it(self) -> bool:
        """Whether drafts make writing faster, over the newest rounds; if not, heads rest, for longer each time."""
        if self.rounds < FIRST_ROUNDS:
            return True
        if self.recent_seconds <= self.recent_tokens * self.cost(0):
            if self.rounds >= 5 * FIRST_ROUNDS:
                self.rest = FIRST_REST
            return True
        self.resting, self.rest = self.rest, min(2 * self.rest, LONGEST_REST)
        self._start_afresh()
        return False


def _bin(probability: float) -> int:
    return min(int(probability * BINS), BINS - 1)
