"""How many tokens to draft: what passes of each width cost on this machine, and which guesses were right so far."""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Sequence

BINS = 10  # of a head's own probability of its guess
FADING = 0.98  # what tokens and seconds of the past count, a round later
FIRST_ROUNDS = 10  # of a text, before its drafts are judged
LONGEST_REST = 16  # texts


class Pace:
    """Learns over rounds and texts. A round is a pass of the model over the last token and the drafts behind it.

    A head's guess counts as right where it and those of the heads before it came true, whether it was sent to the
    model or not. Its chance is the share of right ones among guesses of about the same probability; before there are
    any, that probability itself.
    """

    def __init__(self, num_heads: int) -> None:
        self.tried = [[0] * BINS for _ in range(num_heads)]
        self.right = [[0] * BINS for _ in range(num_heads)]
        self.seconds: list[deque[float]] = [deque(maxlen=9) for _ in range(num_heads + 1)]  # of a pass, by drafts
        self.rests, self.resting = 0, 0  # texts to be written plainly: at a time, and still
        self._start_of_text()

    def _start_of_text(self) -> None:
        self.rounds = 0
        self.recent_tokens, self.recent_seconds = 0.0, 0.0

    def begin_text(self) -> bool:
        """Whether the heads are to draft for the text that begins."""
        self._start_of_text()
        if self.resting:
            self.resting -= 1
            return False
        return True

    def learn(self, probabilities: Sequence[float], guesses: Sequence[int], came: Sequence[int]) -> None:
        """Of one round: each head's probability of its guess, its guess, and the tokens that came."""
        for head, (probability, guess, token) in enumerate(zip(probabilities, guesses, came, strict=False)):
            at = _bin(probability)
            self.tried[head][at] += 1
            if guess != token:
                return
            self.right[head][at] += 1

    def chance(self, head: int, probability: float) -> float:
        """Of a head's guess, given that those of the heads before it are right."""
        at = _bin(probability)
        return (self.right[head][at] + 2 * probability) / (self.tried[head][at] + 2)

    def pass_took(self, drafts: int, seconds: float) -> None:
        self.seconds[drafts].append(seconds)

    def round_took(self, tokens: int, seconds: float) -> None:
        """A round with heads, the heads' own time included."""
        self.rounds += 1
        self.recent_tokens = FADING * self.recent_tokens + tokens
        self.recent_seconds = FADING * self.recent_seconds + seconds

    def cost(self, drafts: int) -> float:
        """Seconds of a pass; of a width that was not tried, those of the widest below it, so that it will be."""
        for width in range(drafts, -1, -1):
            if self.seconds[width]:
                return statistics.median(self.seconds[width])
        return 0.0

    def how_many(self, probabilities: Sequence[float], most: int) -> int:
        """How many of the guesses to send: as many as bring more tokens than the time that they cost would."""
        if len(self.seconds[0]) < 2:
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

    def worth_it(self) -> bool:
        """Whether drafts make this text faster; if not, heads rest for this text, and for more of the next ones each
        time."""
        if self.rounds < FIRST_ROUNDS or not self.seconds[0]:
            return True
        if self.recent_seconds <= self.recent_tokens * self.cost(0):
            self.rests = 0
            return True
        self.rests = min(max(1, 2 * self.rests), LONGEST_REST)
        self.resting = self.rests
        return False


def _bin(probability: float) -> int:
    return min(int(probability * BINS), BINS - 1)
