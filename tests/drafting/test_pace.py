"""How many tokens are drafted, against cases that can be worked out by hand."""

from __future__ import annotations

from caft_plugin.drafting.pace import FIRST_PASSES, FIRST_REST, FIRST_ROUNDS, LONGEST_REST, Pace

SURE, DOUBTFUL = 0.95, 0.05


def pace_of(costs, tokens_a_second=1.0):
    """Passes with 0, 1, ... drafts take `costs` seconds."""
    pace = Pace(len(costs) - 1)
    for drafts, seconds in enumerate(costs):
        for _ in range(3):
            pace.pass_took(drafts, seconds)
    pace.round_took(tokens=1, seconds=1 / tokens_a_second)
    return pace


def test_a_chance_is_the_share_of_guesses_that_came_true():
    pace = Pace(2)
    assert pace.chance(0, SURE) == SURE  # before there are any, what the head says
    for came in (7, 7, 7, 8):
        pace.learn([SURE, SURE], [7, 5], [came, 5])
    assert pace.chance(0, SURE) == (3 + 2 * SURE) / 6
    assert pace.chance(1, SURE) == (3 + 2 * SURE) / 5  # asked only where the first was right
    assert pace.chance(0, DOUBTFUL) == DOUBTFUL  # guesses of another probability are another matter


def test_as_many_as_pay():
    sure = [SURE] * 3
    # a pass costs the same whatever its width: as on a GPU
    assert pace_of([1, 1, 1, 1]).how_many(sure, 3) == 3
    assert pace_of([1, 1, 1, 1]).how_many(sure, 2) == 2
    # 0.95 tokens for 0.5; 1.81 for 2.5; 2.66 for 2.6
    assert pace_of([1, 1.5, 3.5, 3.6]).how_many(sure, 3) == 1
    assert pace_of([1, 1.5, 3.5, 3.0]).how_many(sure, 3) == 3  # 2.66 for 2.0
    assert pace_of([1, 3, 3, 9]).how_many(sure, 3) == 0
    assert pace_of([1, 1.5, 1.6, 1.7]).how_many([DOUBTFUL, SURE, SURE], 3) == 0
    assert pace_of([1, 1.5, 1.6, 1.7], tokens_a_second=0.05).how_many([DOUBTFUL, SURE, SURE], 3) > 0


def test_before_the_first_round_nothing_is_too_slow():
    pace = Pace(1)
    for drafts, seconds in ((0, 1.0), (1, 9.0)):
        for _ in range(FIRST_PASSES):
            pace.pass_took(drafts, seconds)
    assert pace.how_many([SURE], 1) == 1
    pace.round_took(1, 1.0)
    assert pace.how_many([SURE], 1) == 0


def test_plain_passes_are_measured_first_and_every_width_is_tried():
    pace = Pace(3)
    for _ in range(FIRST_PASSES):
        assert pace.how_many([SURE] * 3, 3) == 0
        pace.pass_took(0, 1.0)
        pace.round_took(1, 1.0)
    sent = []
    for _ in range(10):
        sent.append(pace.how_many([SURE] * 3, 3))
        pace.pass_took(sent[-1], 9.0 if sent[-1] else 1.0)
    # each may cost nothing more
    assert sent == [3] * FIRST_PASSES + [2] * FIRST_PASSES + [1] * FIRST_PASSES + [0]


def test_a_width_that_was_slow_once_is_tried_again():
    """The first pass of a width may have been slow for other reasons."""
    pace = pace_of([1, 1])
    pace.seconds[1].clear()
    pace.pass_took(1, 50.0)
    assert pace.how_many([SURE], 1) == 1
    pace.pass_took(1, 1.1), pace.pass_took(1, 1.1)
    assert pace.how_many([SURE], 1) == 1 and pace.cost(1) == 1.1


def rounds(pace, count, tokens, seconds):
    """So many rounds, until drafts are given up."""
    for done in range(1, count + 1):
        pace.round_took(tokens, seconds)
        if not pace.worth_it():
            return done
    return None


def test_heads_that_do_not_pay_rest_longer_each_time():
    pace, rests = pace_of([1, 1]), []
    for _ in range(9):
        assert pace.awake()
        pace._start_afresh()
        assert rounds(pace, 99, tokens=1, seconds=1.2) == FIRST_ROUNDS
        rests.append(0)
        while not pace.awake():
            pace.rested(8)
            rests[-1] += 8
    assert rests == [32, 64, 128, 256, 512, 1024, 2048, 2048, 2048]
    assert rests[0] == FIRST_REST and rests[-1] == LONGEST_REST


def test_heads_that_pay_go_on_and_one_bad_text_does_not_end_it():
    pace = pace_of([1, 1])
    assert rounds(pace, 100, tokens=2, seconds=1.5) is None
    assert rounds(pace, 20, tokens=1, seconds=1.5) is None  # a text in which no guess is right
    assert rounds(pace, 100, tokens=1, seconds=1.5) is not None  # no text goes well any more
    assert not pace.awake() and pace.rest == 2 * FIRST_REST


def test_a_trial_that_went_well_for_long_makes_the_next_rest_short():
    pace = pace_of([1, 1])
    pace.rest = LONGEST_REST
    assert rounds(pace, 5 * FIRST_ROUNDS - 2, tokens=2, seconds=1) is None
    assert pace.rest == LONGEST_REST
    assert rounds(pace, 1, tokens=2, seconds=1) is None
    assert pace.rest == FIRST_REST
