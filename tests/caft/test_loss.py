from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from caft_plugin import ConfigError
from caft_plugin.caft import loss
from caft_plugin.caft.loss import (
    cross_entropy_of,
    distributions_at,
    gamma,
    head_weights,
    weighted_sum,
)
from caft_plugin.targets import (
    BOUNDARY,
    EXAMPLE,
    IGNORE,
    MASKED,
    MAY_MASK,
    OVERLONG,
    PLAN,
    count_targets,
    document_ids,
    head_targets,
)

LABELS = torch.tensor(
    [[IGNORE, 1, 2, 3, 4, 5, 6, 7], [IGNORE, IGNORE, 8, 9, 10, IGNORE, IGNORE, IGNORE]]
)


# M-RoPE: time, height and width (3, batch, length). Row 0: a token, an image of 2 x 2, a token;
# then a document of two tokens. Row 1: an image of 2 x 2, two tokens, two frames of one token each.
IMAGES = torch.tensor(
    [
        [[0, 1, 1, 1, 1, 3, 0, 1], [0, 0, 0, 0, 2, 3, 4, 5]],
        [[0, 1, 1, 2, 2, 3, 0, 1], [0, 0, 1, 1, 2, 3, 4, 4]],
        [[0, 1, 2, 1, 2, 3, 0, 1], [0, 1, 0, 1, 2, 3, 4, 4]],
    ]
)
TEXT_AXIS = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]])


def slow_targets(labels, documents, num_heads):
    """Token by token, from the definition."""
    out = torch.full((num_heads, *labels.shape), IGNORE)
    rows, length = labels.shape
    for k in range(1, num_heads + 1):
        for row in range(rows):
            for t in range(length):
                there = t + k + 1
                if there < length and documents[row][t] == documents[row][there] != "pad":
                    out[k - 1, row, t] = labels[row, there]
    return out


ONE = [["a"] * 8, ["b"] * 8]


@pytest.mark.parametrize(
    ("marks", "documents"),
    [
        ({}, ONE),
        ({"position_ids": torch.arange(8)[None]}, ONE),
        (
            {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]])},
            [list("aaabbccc"), list("dddddddE")],
        ),
        (
            {
                "position_ids": torch.tensor(
                    [[[0, 1, 2, 0, 1, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 0]]] * 3
                )
            },
            [list("aaabbccc"), list("dddddddE")],
        ),
        ({"position_ids": IMAGES}, [list("aaaaaabb"), list("cccccccc")]),
        ({"position_ids": torch.stack([TEXT_AXIS, *IMAGES])}, [list("aaaaaabb"), list("cccccccc")]),
        (
            {"attention_mask": torch.tensor([[1, 1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 0, 0, 0]])},
            [list("aaabbbcc"), [*"ddddd", "pad", "pad", "pad"]],
        ),
        (
            {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1], [1] * 8])},
            [["pad", "pad", *"aaaaaa"], list("bbbbbbbb")],
        ),
        (
            {"cu_seq_lens_q": torch.tensor([0, 3, 8, 12, 16], dtype=torch.int32)},
            [list("aaabbbbb"), list("ccccdddd")],
        ),
    ],
)
def test_targets_follow_the_definition(marks, documents):
    torch.testing.assert_close(
        head_targets({"labels": LABELS, **marks}, 5),
        slow_targets(LABELS, documents, 5),
        rtol=0,
        atol=0,
    )


BITS = {
    "BOUNDARY": BOUNDARY,
    "MAY_MASK": MAY_MASK,
    "MASKED": MASKED,
    "EXAMPLE": EXAMPLE,
    "OVERLONG": OVERLONG,
}


@pytest.mark.parametrize("bit", BITS)
def test_of_the_bits_of_a_plan_only_the_boundary_separates_documents(bit):
    plan = torch.zeros_like(LABELS)
    plan[:, 3] = BITS[bit]
    expected = [0, 0, 0, 1, 1, 1, 1, 1] if bit == "BOUNDARY" else [0] * 8
    assert document_ids({"labels": LABELS, PLAN: plan}).tolist() == [expected, expected]


def test_rows_shorter_than_the_reach_of_a_head():
    targets = head_targets({"labels": torch.tensor([[1, 2, 3]])}, 4)
    assert count_targets(targets).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("schedule", "formula"),
    [
        ("rsine", lambda s, total: math.sin((total - s) / total * math.pi / 2)),
        ("sine", lambda s, total: math.sin(s / total * math.pi / 2)),
        ("linear", lambda s, total: s / total),
        ("constant", lambda s, total: 1.0),
    ],
)
def test_schedules(schedule, formula):
    for step in range(11):
        assert gamma(schedule, step, 10) == pytest.approx(formula(step, 10), abs=1e-12)


def test_weights():
    assert head_weights(0.01, 0.8, 0.5, 3) == pytest.approx([0.004, 0.0032, 0.00256])


@pytest.mark.parametrize("frozen", [(), ("hidden",), ("weight",), ("hidden", "weight")])
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 150])
def test_weighted_sum(rows, frozen, monkeypatch):
    # chunks of 64 rows, so 150 has a partial one
    monkeypatch.setitem(loss.LOGITS_AT_A_TIME, "cpu", 1)
    weight = torch.randn(31, 8, requires_grad="weight" not in frozen)
    unused = torch.randn(3, requires_grad=True)
    hidden = torch.randn(rows, 8, requires_grad="hidden" not in frozen)
    weights, targets = torch.rand(rows) / 1000, torch.randint(0, 31, (rows,))
    slow = F.cross_entropy(hidden @ weight.T, targets, reduction="none")
    total, figures = weighted_sum(
        cross_entropy_of(lambda h: h @ weight.T), weights, hidden, targets, 31, [weight, unused]
    )
    torch.testing.assert_close(total, (slow * weights).sum())
    torch.testing.assert_close(figures[:, 0], slow)
    assert not figures.requires_grad
    learning = [t for t in (hidden, weight) if t.requires_grad]
    if learning:
        wanted = torch.autograd.grad((slow * weights).sum() * 3, learning)
        torch.testing.assert_close(torch.autograd.grad(total * 3, learning), wanted)
    with torch.no_grad():
        without, _ = weighted_sum(
            cross_entropy_of(lambda h: h @ weight.T), weights, hidden, targets, 31, [weight]
        )
    torch.testing.assert_close(without, total.detach(), rtol=0, atol=0)


def test_half_precision_losses_are_summed_in_float32():
    weight, hidden = torch.randn(1000, 64).bfloat16(), torch.randn(500, 64).bfloat16()
    targets = torch.randint(0, 1000, (500,))
    total, _ = weighted_sum(
        cross_entropy_of(lambda h: h @ weight.T), torch.ones(500), hidden, targets, 1000
    )
    assert total.dtype == torch.float32
    exact = F.cross_entropy((hidden @ weight.T).double(), targets, reduction="sum")
    assert total.item() == pytest.approx(exact.item(), rel=1e-6)


def test_float16_gradients_of_small_weights_do_not_vanish():
    """A head's weight for one of 100,000 targets is about 1e-7; the smallest float16 is 6e-8."""
    weight, hidden = torch.randn(1000, 64).half(), torch.randn(50, 64).half().requires_grad_()
    targets, weights = torch.randint(0, 1000, (50,)), torch.full((50,), 1e-7)
    total, _ = weighted_sum(
        cross_entropy_of(lambda h: h @ weight.T), weights, hidden, targets, 1000
    )
    (got,) = torch.autograd.grad(total * 2.0**20, hidden)  # the factor is a GradScaler's
    exact = hidden.detach().float().requires_grad_()
    slow = F.cross_entropy(exact @ weight.float().T, targets, reduction="sum") * 1e-7 * 2.0**20
    torch.testing.assert_close(
        got.float(), torch.autograd.grad(slow, exact)[0], rtol=0.01, atol=2e-3
    )


# -- masks of queries and keys ---------------------------------------------------------------------


def masks_of(allowed):
    """One mask in all the forms that hosts give it in; `allowed` (batch, length, length) is True
    where a query sees a key."""
    four = allowed[:, None]
    added = torch.zeros(four.shape)
    return {
        "boolean": four,
        "one of three axes": allowed,
        "numbers": four.long(),
        "of two attention heads": torch.cat([four, four], dim=1),
        "least float": added.masked_fill(~four, torch.finfo(torch.float32).min),
        "infinite": added.masked_fill(~four, float("-inf")),
        "-1e9": added.masked_fill(~four, -1e9),
        "half precision": added.half().masked_fill(~four, torch.finfo(torch.float16).min),
        "with a bias": (added - torch.arange(four.shape[-1]) * 0.1).masked_fill(~four, -1e4),
        "by kind of layer": {
            "full_attention": four,
            "sliding_attention": four & torch.ones_like(four).triu(-1),
        },
    }


def blocks(*lengths):
    allowed = torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()
    return allowed.tril()[None].repeat(2, 1, 1)


INTERLEAVED = (torch.arange(9)[:, None] % 2 == torch.arange(9) % 2).tril()[None].repeat(2, 1, 1)


@pytest.mark.parametrize(
    "allowed", [blocks(4, 5), blocks(1, 6, 2), INTERLEAVED], ids=["two", "three", "interleaved"]
)
@pytest.mark.parametrize("form", masks_of(blocks(1)))
def test_a_target_is_valid_where_its_position_sees_the_heads(allowed, form):
    labels = torch.arange(1, 19).view(2, 9)
    found = head_targets({"labels": labels, "attention_mask": masks_of(allowed)[form]}, 3)
    for k in range(1, 4):
        for row in range(2):
            for t in range(9):
                there = t + k + 1
                valid = there < 9 and bool(allowed[row, there, t])
                assert found[k - 1, row, t] == (labels[row, there] if valid else IGNORE), (
                    k,
                    row,
                    t,
                )


@pytest.mark.parametrize("form", masks_of(blocks(1)))
def test_such_a_mask_separates_documents(form):
    documents = document_ids(
        {"labels": torch.ones(2, 9).long(), "attention_mask": masks_of(blocks(1, 6, 2))[form]}
    )
    assert documents.diff(dim=1).ne(0).tolist() == [[True, *[False] * 5, True, False]] * 2


def test_position_ids_and_such_a_mask_both_count():
    batch = {
        "labels": torch.ones(2, 9).long(),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
    }
    alone = head_targets(batch, 2)
    assert torch.equal(head_targets({**batch, "attention_mask": blocks(9)[:, None]}, 2), alone)
    both = head_targets({**batch, "attention_mask": blocks(7, 2)[:, None]}, 2)
    assert (both[0, 0] != IGNORE).tolist() == [
        True,
        True,
        False,
        False,
        True,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("mask", [torch.ones(2, 1, 9, 12), torch.ones(2, 12), object()])
def test_a_mask_that_cannot_be_read_is_an_error(mask):
    with pytest.raises(
        ConfigError, match="attention_mask is .*, from which documents cannot be separated"
    ):
        head_targets({"labels": torch.ones(2, 9).long(), "attention_mask": mask}, 2)


def test_a_hosts_saved_tensor_hooks_see_nothing_of_a_chunk(monkeypatch):
    """What is saved and used within one chunk is no activation of the host's."""
    monkeypatch.setitem(loss.LOGITS_AT_A_TIME, "cpu", 64 * 11)
    weight, hidden = torch.randn(11, 4, requires_grad=True), torch.randn(200, 4, requires_grad=True)
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: seen.append("saved") or t, lambda t: seen.append("used") or t
    ):
        total, _ = weighted_sum(
            cross_entropy_of(lambda h: h @ weight.T),
            torch.ones(200),
            hidden,
            torch.randint(0, 11, (200,)),
            11,
            [weight],
        )
        total.backward()
    assert seen == []


def test_a_dict_without_any_mask_is_no_mask():
    """On torch's meta device too, on which a tensor left on the CPU is found out as on a GPU."""
    nothing = {"attention_mask": {"full_attention": None, "sliding_attention": None}}
    labels, positions = torch.arange(1, 10)[None], torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    for batch in ({"labels": labels}, {"labels": labels, "position_ids": positions}):
        assert torch.equal(head_targets({**batch, **nothing}, 3), head_targets(batch, 3))
        there = {key: value.to("meta") for key, value in batch.items()}
        assert head_targets({**there, **nothing}, 3).shape == (3, 1, 9)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_teacher_is_the_state_from_which_the_model_predicts_the_target(index):
    """Head k = index + 1 at position t: the model's final state at t + k."""
    final = torch.arange(2 * 6 * 3.0).view(2, 6, 3)
    targets = torch.zeros(2, 6, dtype=torch.long)
    found = distributions_at(targets, index, torch.tensor([0, 7]), final)
    assert torch.equal(found, torch.stack([final[0, index + 1], final[1, 1 + index + 1]]))
