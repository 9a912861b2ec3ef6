"""Number formats: what is logged is exact to float32 whatever training runs in, and nothing becomes
NaN."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import Trainer

from builders.runs import DATA, Gradients, losses, pad, rows, trainer_of
from builders.tiny import head_outputs
from caft_plugin import with_caft
from caft_plugin.caft.heads import MODULE_NAME
from caft_plugin.targets import IGNORE, head_targets

pytestmark = pytest.mark.newest

# name: (weights, autocast); what a head's gradient may be off by, as a share of its largest entry
FORMATS = {
    "float32": (torch.float32, None),
    "bf16 weights": (torch.bfloat16, None),
    "bf16 autocast": (torch.float32, torch.bfloat16),
    "fp16 autocast": (torch.float32, torch.float16),
}
TOLERANCE = {"float32": 0, "bf16 weights": 0.1, "bf16 autocast": 0.05, "fp16 autocast": 0.01}


@pytest.fixture
def outputs():
    """The list to which each call of a head adds its positions and its output at them."""
    with head_outputs() as seen:
        yield seen


def autocast(dtype):
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def slow_means(trainer, batches, outputs, dtype):
    """Mean cross-entropy of each head over all batches: the model's own logits, the rest in
    float64."""
    sums, counts = torch.zeros(4, dtype=torch.float64), torch.zeros(4)
    trunk = trainer.caft_parts.caft.trunk
    for batch in batches:
        for k, targets in enumerate(head_targets(batch, 4)):
            with torch.no_grad(), autocast(dtype):
                logits = trunk.model.lm_head(trunk.model.model.norm(outputs.pop(0)[1]))
            for row, target in zip(logits, targets[targets != IGNORE], strict=True):
                sums[k] -= row.double().log_softmax(-1)[target]
                counts[k] += 1
    assert not outputs
    return (sums / counts).tolist()


@pytest.mark.parametrize("name", ["float32", "bf16 weights", "bf16 autocast"])
def test_logged_losses_are_exact(tiny_model, tmp_path, outputs, name):
    weights, dtype = FORMATS[name]
    trainer = trainer_of(
        tiny_model.to(weights),
        tmp_path,
        caft={"beta": 0.5},
        max_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=0.0,
        bf16=dtype is torch.bfloat16,
    )
    batches, original = [], trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        batches.append({key: value.clone() for key, value in inputs.items()})
        return original(model, inputs, *args, **kwargs)

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(batches) == 2 and len(outputs) == 8
    log = losses(trainer)[0]
    means = slow_means(trainer, batches, outputs, dtype)
    for k, mean in enumerate(means, 1):
        assert log[f"caft/loss_head_{k}"] == pytest.approx(mean, rel=1e-6), k
    aux = sum(0.5 * 0.8**k * mean for k, mean in enumerate(means, 1))
    assert log["caft/aux_loss"] == pytest.approx(aux, rel=1e-6)


def gradients_of_heads(trainer, batch, dtype, scaler=None):
    """Of the total loss of one batch; with a scaler, scaled for the backward pass and unscaled
    afterwards."""
    model = trainer.model
    with trainer.caft_parts.caft.handle:
        model.zero_grad(set_to_none=True)
        with autocast(dtype):
            loss = trainer.compute_loss(model, {key: value.clone() for key, value in batch.items()})
        assert loss.dtype == torch.float32
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
        return (
            loss.detach(),
            {n: p.grad for n, p in model.named_parameters() if MODULE_NAME in n},
            optimizer,
        )


def at_start(trainer, steps=10):
    trainer.state.global_step, trainer.state.max_steps = 0, steps
    return trainer


@pytest.mark.parametrize("name", FORMATS)
def test_gradients_are_those_of_float32(tiny_model, tmp_path, name):
    weights, dtype = FORMATS[name]
    batch = pad(DATA[:6])
    caft = {"beta": 0.5}
    exact = at_start(trainer_of(copy.deepcopy(tiny_model), tmp_path, caft=caft))
    expected_loss, expected, _ = gradients_of_heads(exact, batch, None)
    trainer = at_start(trainer_of(tiny_model.to(weights), tmp_path, caft=caft))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12) if dtype is torch.float16 else None
    loss, found, _ = gradients_of_heads(trainer, batch, dtype, scaler)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-2 if TOLERANCE[name] else 0, atol=0)
    assert found.keys() == expected.keys() and len(found) == 36
    for key, gradient in found.items():
        error = (gradient.float() - expected[key]).abs().max() / expected[key].abs().max()
        assert error <= TOLERANCE[name], (key, error)


def test_fp16_scaling_skips_a_step_that_overflows_and_goes_on(tiny_model, tmp_path):
    """By hand, because on a CPU the Trainer's own fp16 runs in float32 without a scaler."""
    trainer = at_start(trainer_of(tiny_model, tmp_path, caft={"beta": 0.5}))
    batch = pad(DATA[:6])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    heads = trainer.caft_parts.caft.heads
    seen, skipped = [], 0
    while len(seen) < 8:
        before = {name: p.detach().clone() for name, p in heads.named_parameters()}
        loss, _, optimizer = gradients_of_heads(trainer, batch, torch.float16, scaler)
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        overflowed = scaler.get_scale() < scale
        skipped += overflowed
        seen += [] if overflowed else [loss.item()]
        changed = [name for name, p in heads.named_parameters() if not torch.equal(p, before[name])]
        assert len(changed) == (0 if overflowed else len(before))
    assert 0 < skipped < 40
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert seen[-1] < seen[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("lengths", [[2, 2], [3, 3, 2], [4, 2, 5]])
def test_rows_too_short_for_some_heads(tiny_model, tmp_path, outputs, name, lengths):
    """Head k needs k+2 tokens in a row: those without any give 0, and no gradient that is not a
    number."""
    weights, dtype = FORMATS[name]
    trainer = at_start(trainer_of(tiny_model.to(weights), tmp_path, caft={"beta": 0.5}))
    batch = pad(rows(lengths, prompt=1))
    loss, gradients, _ = gradients_of_heads(trainer, batch, dtype)
    means = torch.tensor(slow_means(trainer, [batch], outputs, dtype))
    with_targets = torch.tensor([max(lengths) >= k + 2 for k in range(1, 5)])
    assert torch.equal(with_targets, ~means.isnan())
    with torch.no_grad(), autocast(dtype):
        own = trainer.model(**batch).loss.float()
    aux = sum(0.5 * 0.8**k * mean for k, mean in enumerate(means.nan_to_num().tolist(), 1))
    assert loss.item() == pytest.approx(own.item() + aux, rel=1e-6)
    for key, gradient in gradients.items():
        assert gradient.isfinite().all()
        # (at the first position there is nothing to attend to, so q and k get no gradient there)
        if "mlp" in key or not with_targets[int(key.split(".")[2])]:
            assert bool(gradient.any()) == bool(with_targets[int(key.split(".")[2])]), key


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_supervised_adds_nothing(tiny_model, tmp_path, name):
    weights, dtype = FORMATS[name]

    class ZeroLoss(Trainer):  # the plain Trainer's own loss is not a number here
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.float().sum() * 0

    trainer = trainer_of(
        tiny_model.to(weights), tmp_path, caft={}, trainer_class=with_caft(ZeroLoss)
    )
    batch = pad(DATA[:4])
    batch["labels"] = torch.full_like(batch["labels"], IGNORE)
    loss, gradients, _ = gradients_of_heads(at_start(trainer), batch, dtype)
    assert loss.item() == 0
    assert len(gradients) == 36 and not any(gradient.any() for gradient in gradients.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in trainer.model.parameters())


def test_training_in_bf16_is_finite_and_learns(tiny_model, tmp_path):
    seen = Gradients()
    trainer = trainer_of(
        tiny_model.bfloat16(), tmp_path, caft={"beta": 0.5}, callbacks=[seen], max_steps=8
    )
    trainer.train()
    logs = losses(trainer)
    for k in range(1, 5):
        assert logs[-1][f"caft/loss_head_{k}"] < logs[0][f"caft/loss_head_{k}"]
    assert all(gradient.isfinite().all() for step in seen.steps for gradient in step.values())
