"""How many tokens are drafted, against cases that can be worked out by hand."""

from __future__ import annotations

from caft_plugin.pace import FIRST_ROUNDS, LONGEST_REST, Pace

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
    assert pace_of([1, 1, 1, 1]).how_many(sure, 3) == 3  # a pass costs the same whatever its width: as on a GPU
    assert pace_of([1, 1, 1, 1]).how_many(sure, 2) == 2
    assert pace_of([1, 1.5, 3.5, 3.6]).how_many(sure, 3) == 1  # 0.95 tokens for 0.5; 1.81 for 2.5; 2.66 for 2.6
    assert pace_of([1, 1.5, 3.5, 3.0]).how_many(sure, 3) == 3  # 2.66 for 2.0
    assert pace_of([1, 3, 3, 9]).how_many(sure, 3) == 0
    assert pace_of([1, 1.5, 1.6, 1.7]).how_many([DOUBTFUL, SURE, SURE], 3) == 0
    assert pace_of([1, 1.5, 1.6, 1.7], tokens_a_second=0.05).how_many([DOUBTFUL, SURE, SURE], 3) > 0


def test_plain_passes_are_measured_first_and_every_width_is_tried():
    pace = Pace(3)
    assert pace.how_many([SURE] * 3, 3) == 0
    pace.pass_took(0, 1.0), pace.pass_took(0, 1.0)
    pace.round_took(1, 1.0)
    assert pace.how_many([SURE] * 3, 3) == 3  # not tried, so it may cost nothing more
    pace.pass_took(3, 9.0)
    assert pace.how_many([SURE] * 3, 3) == 2
    pace.pass_took(2, 9.0)
    assert pace.how_many([SURE] * 3, 3) == 1
    pace.pass_took(1, 9.0)
    assert pace.how_many([SURE] * 3, 3) == 0


def test_heads_that_do_not_pay_rest_longer_each_time():
    pace, rests = Pace(2), []
    pace.pass_took(0, 1.0), pace.pass_took(0, 1.0)
    for _ in range(7):
        assert pace.begin_text()
        for _ in range(FIRST_ROUNDS):
            pace.round_took(tokens=1, seconds=1.2)
        assert not pace.worth_it()
        rests.append(0)
        while pace.resting:
            assert not pace.begin_text()
            rests[-1] += 1
    assert rests == [1, 2, 4, 8, 16, 16, LONGEST_REST]


def test_heads_that_pay_go_on():
    pace = Pace(2)
    pace.pass_took(0, 1.0)
    assert pace.begin_text()
    for _ in range(100):
        pace.round_took(tokens=2, seconds=1.5)
        assert pace.worth_it()
    assert pace.begin_text()
