"""One optimisation step, without a trainer: against counts, weights and draws written out
slowly."""

from __future__ import annotations

import math

import pytest
import torch

from caft_plugin import CAFTConfig
from caft_plugin.caft.window import LossShare, Tally, Window, draw_heads, next_tokens_in
from caft_plugin.targets import IGNORE

CPU = torch.device("cpu")


def batch(*rows):
    """Rows of labels, padded with -100 and masked there."""
    length = max(map(len, rows))
    labels = torch.tensor([[*row, *[IGNORE] * (length - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": labels.clamp(min=0), "labels": labels, "attention_mask": mask}


def opened(batches, processes=1, step=3, **settings):
    config = CAFTConfig(**{"num_heads": 2, "beta": 0.5, "alpha": 0.8, **settings})
    more = {"step": step, "total_steps": 10, "seed": 0, "device": CPU}
    return Window.open(batches, config, over_processes=lambda tensor: tensor * processes, **more)


def slow_targets(batch, ahead):
    """Labels that lie `ahead` tokens after a token that is not padding."""
    found = 0
    for labels, mask in zip(
        batch["labels"].tolist(), batch["attention_mask"].tolist(), strict=True
    ):
        for at in range(len(labels)):
            there = at + ahead
            found += (
                mask[at] == 1
                and there < len(labels)
                and mask[there] == 1
                and labels[there] != IGNORE
            )
    return found


BATCHES = [batch([IGNORE, 5, 6, 7, 8], [IGNORE, IGNORE, 9]), batch([1, 2, 3]), batch([4])]


@pytest.mark.parametrize("processes", [1, 3])
def test_counts_are_those_of_all_processes(processes):
    window = opened(BATCHES, processes)
    counts = [sum(slow_targets(b, k + 1) for b in BATCHES) for k in (1, 2)]
    assert (
        window.counts.tolist()
        == window.drawn_counts.tolist()
        == [processes * count for count in counts]
    )
    next_tokens = sum(slow_targets(b, 1) for b in BATCHES)
    assert window.next_tokens == processes * next_tokens and window.own_tokens == next_tokens
    assert [int(next_tokens_in(b)) for b in BATCHES] == [5, 2, 0]


def test_the_weights_make_a_mean_over_the_window():
    """Weights times the sums of all micro-batches are beta gamma alpha^k times the mean over all
    targets."""
    window = opened(BATCHES)
    gamma = math.sin((1 - 3 / 10) * math.pi / 2)
    assert window.gamma == pytest.approx(gamma)
    for k, (weight, count) in enumerate(
        zip(window.weights([1, 1]).tolist(), window.counts.tolist(), strict=True), 1
    ):
        assert weight == pytest.approx(0.5 * gamma * 0.8**k / count, rel=1e-6)


def test_the_weights_of_drawn_heads_are_those_of_all_on_average():
    """Over all outcomes of two draws, probability times weight is the weight that a head has where
    all run."""
    every, drawn = opened(BATCHES).weights([1, 1]), opened(BATCHES, heads_per_step=2)
    shares = [0.8**k / (1 + 0.8) for k in (0, 1)]
    mean = torch.zeros(2)
    for first in (0, 1):
        for second in (0, 1):
            draws = [(first, second).count(head) for head in (0, 1)]
            mean += shares[first] * shares[second] * drawn.weights(draws)
    torch.testing.assert_close(mean, every)


def test_a_head_without_a_target_weighs_nothing_that_is_not_a_number():
    window = opened([batch([4, 5])])
    assert window.counts.tolist() == [0, 0] and torch.isfinite(window.weights([1, 1])).all()


def test_begun_knows_a_micro_batch_by_what_it_is_or_by_its_labels_or_by_its_turn():
    window = opened(BATCHES)
    # the second is asked for first; the first was copied
    second, first = BATCHES[1], {**BATCHES[0], "more": 1}
    assert window.begun(second).inputs is second
    assert window.begun(first).inputs is BATCHES[0]
    made_anew = {key: value.clone() for key, value in BATCHES[2].items()}
    assert window.begun(made_anew).inputs is BATCHES[2]
    assert window.begun(made_anew) is None  # all had their turn


def test_a_request_for_labels_that_the_host_has_made_is_for_these():
    window = opened([BATCHES[0]])
    (micro_batch,) = window.micro_batches
    assert window.request(micro_batch, {**BATCHES[0]}) is micro_batch.request
    fewer = {**BATCHES[0], "labels": BATCHES[0]["labels"].clone()}
    fewer["labels"][0, 3] = IGNORE
    made = window.request(micro_batch, fewer)
    assert (made.targets != IGNORE).sum() < (micro_batch.request.targets != IGNORE).sum()
    assert (
        torch.equal(made.weights, micro_batch.request.weights)
        and made.run == micro_batch.request.run
    )


def test_a_request_undoes_what_the_host_will_do():
    window = opened(BATCHES)
    request, labels = window.request(window.micro_batches[0], BATCHES[0]), BATCHES[0]["labels"]
    assert request.next_tokens is None
    fused = request.with_next_tokens(labels, window.mean_weight(LossShare(divisor=4, processes=2)))
    assert fused.run == [True, True] and fused.training
    assert fused.next_tokens.tolist() == [[5, 6, 7, 8, IGNORE], [IGNORE, 9, IGNORE, IGNORE, IGNORE]]
    assert float(fused.next_token_weight) == pytest.approx(4 * 2 / 7)  # 7 next tokens in the window
    assert window.mean_weight(LossShare(divisor=1, processes=2, items=5)) == pytest.approx(1 / 5)
    of_one_token = opened([batch([4, 5])]).mean_weight(LossShare(divisor=3, processes=1))
    assert float(of_one_token) == pytest.approx(3)


def test_no_head_runs_where_gamma_is_0():
    window = opened(BATCHES, step=0, schedule="linear")
    assert window.run == [False, False]
    assert window.request(window.micro_batches[0], BATCHES[0]).run == [False, False]


def test_the_log_has_means_over_steps_and_a_batch_asked_for_twice_counts_once():
    tally = Tally(2, 3, CPU)
    for times in (1, 2):
        window = opened(BATCHES[:1])
        for _ in range(times):
            sums = torch.tensor([6.0, 4.0]) * window.counts
            window.sums.add(torch.tensor(2.0), torch.tensor(0.5), sums, next_tokens_in(BATCHES[0]))
        tally.add(window)
    log = tally.log(5, 1, lambda tensor: tensor)
    assert log.next_token_loss == pytest.approx(2.0) and log.aux_loss == pytest.approx(0.5)
    assert log.head_losses == pytest.approx({1: 6.0, 2: 4.0}) and log.gamma == pytest.approx(
        window.gamma
    )


def test_a_batch_that_the_host_passed_over_makes_the_others_no_larger_in_the_log():
    window = opened(BATCHES)
    sums = torch.tensor([6.0, 4.0])
    window.sums.add(torch.tensor(2.0), torch.tensor(0.5), sums, next_tokens_in(BATCHES[1]))
    tally = Tally(2, 3, CPU)
    tally.add(window)
    log = tally.log(4, 1, lambda tensor: tensor)
    assert log.next_token_loss == pytest.approx(2.0) and log.aux_loss == pytest.approx(0.5)


def test_heads_are_drawn_in_proportion_to_alpha():
    config = CAFTConfig(num_heads=3, alpha=0.5, heads_per_step=1)
    drawn = torch.tensor(draw_heads(config, 4000, seed=0, step=0)).float().mean(0)
    torch.testing.assert_close(drawn, torch.tensor([4.0, 2.0, 1.0]) / 7, rtol=0, atol=0.03)


def test_a_head_that_was_not_drawn_is_not_logged():
    seed = next(
        s
        for s in range(100)
        if draw_heads(CAFTConfig(num_heads=2, heads_per_step=1), 1, s, 3) == [[0, 1]]
    )
    config = CAFTConfig(num_heads=2, heads_per_step=1)
    more = {"step": 3, "total_steps": 10, "seed": seed, "device": CPU}
    window = Window.open(BATCHES[:1], config, over_processes=lambda tensor: tensor, **more)
    assert window.run == [False, True] and window.drawn_counts.tolist() == [
        0,
        slow_targets(BATCHES[0], 3),
    ]
    window.sums.add(
        torch.tensor(2.0), torch.tensor(0.5), torch.tensor([0.0, 8.0]), next_tokens_in(BATCHES[0])
    )
    tally = Tally(2, 3, CPU)
    tally.add(window)
    assert tally.log(4, 1, lambda tensor: tensor).head_losses == pytest.approx(
        {2: 8.0 / slow_targets(BATCHES[0], 3)}
    )
