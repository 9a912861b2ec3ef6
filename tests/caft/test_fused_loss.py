"""`fused_loss`: the plugin computes the next-token loss too, and it is the framework's; float32,
tiny models."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer

from builders.families import FAMILIES, model_of
from builders.runs import DATA, Gradients, lora, losses, trainer_of
from caft_plugin import ConfigError, with_caft
from caft_plugin.caft.objective import AuxiliaryObjective

pytestmark = pytest.mark.newest


def trained(model, folder, fused, host_divides=False, checkpointing=False, **settings):
    """Logs and gradients of a run."""
    seen = Gradients()
    settings = {"max_grad_norm": 0.0, "gradient_checkpointing": checkpointing, **settings}
    caft = {"beta": 0.5, "fused_loss": fused}
    trainer = trainer_of(copy.deepcopy(model), folder, caft=caft, callbacks=[seen], **settings)
    if host_divides:  # as Axolotl's trainer does
        trainer.model_accepts_loss_kwargs = False
    trainer.train()
    return losses(trainer), seen.steps


def assert_same(one, other):
    """Losses to 1e-5, gradients to 1e-4 of their largest entry (sums in another order)."""
    for a, b in zip(one[0], other[0], strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if key == "loss" or key.startswith("caft/"):
                assert b[key] == pytest.approx(a[key], rel=1e-5), key
    for a, b in zip(one[1], other[1], strict=True):
        for name, gradient in a.items():
            if gradient is not None:
                largest = gradient.abs().max().item()
                torch.testing.assert_close(
                    b[name], gradient, rtol=1e-4, atol=1e-4 * largest + 1e-8, msg=name
                )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("how", ["full", "lora"])
@pytest.mark.parametrize("host_divides", [False, True])
def test_it_is_the_frameworks_own_loss(tiny_model, tmp_path, how, host_divides, checkpointing):
    model = lora(tiny_model) if how == "lora" else tiny_model
    runs = [
        trained(
            model,
            tmp_path,
            fused,
            host_divides,
            checkpointing,
            per_device_train_batch_size=8,
            max_steps=2,
        )
        for fused in (False, True, "auto")
    ]
    assert_same(runs[0], runs[1])
    assert runs[1][0][0]["caft/next_token_loss"] == runs[2][0][0]["caft/next_token_loss"]


@pytest.mark.parametrize("host_divides", [False, True])
def test_accumulation_layouts_agree(tiny_model, tmp_path, host_divides):
    """Rows of 3 to 30 tokens as 8x1, 4x2, 2x4 and 1x8. Without fused_loss a host that divides is
    off by percents."""

    def as_layout(fused, batch, steps):
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": steps,
            "learning_rate": 1e-12,
        }
        return trained(tiny_model, tmp_path, fused, host_divides, max_steps=2, **settings)

    whole = as_layout(True, 8, 1)
    for batch, steps in [(4, 2), (2, 4), (1, 8)]:
        assert_same(whole, as_layout(True, batch, steps))
    if host_divides:
        apart = as_layout(False, 2, 4)[0][0]["caft/next_token_loss"]
        assert apart != pytest.approx(whole[0][0]["caft/next_token_loss"], rel=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, tmp_path):
    """It is the model's own loss: soft caps, scales, biases, mixtures, hybrids; and the model
    builds few logits."""
    model = model_of(family)
    settings = {"max_steps": 1, "per_device_train_batch_size": 4}
    assert_same(*(trained(model, tmp_path, fused, **settings) for fused in (False, True)))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_builds_logits_of_one_position(family, tmp_path):
    shapes = []
    model = model_of(family)
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: shapes.append(output.shape)
    )
    trainer_of(model, tmp_path, caft={"fused_loss": True}, max_steps=1).train()
    assert shapes[0][:2] == (4, 1) and all(len(shape) == 2 for shape in shapes[1:])


def test_evaluation_stays_the_frameworks(tiny_model, tmp_path):
    plain = trainer_of(
        copy.deepcopy(tiny_model), tmp_path, trainer_class=Trainer, evaluate=DATA[:4]
    )
    fused = trainer_of(
        copy.deepcopy(tiny_model), tmp_path, caft={"fused_loss": True}, evaluate=DATA[:4]
    )
    assert plain.evaluate()["eval_loss"] == fused.evaluate()["eval_loss"]


def test_beta_zero_ignores_it(tiny_model, tmp_path):
    plain = trainer_of(copy.deepcopy(tiny_model), tmp_path, trainer_class=Trainer)
    ours = trainer_of(copy.deepcopy(tiny_model), tmp_path, caft={"beta": 0, "fused_loss": True})
    plain.train(), ours.train()
    assert [e["grad_norm"] for e in losses(plain)] == [e["grad_norm"] for e in losses(ours)]


def of_auto(caplog) -> list[str]:
    return [line for line in caplog.messages if line.startswith("caft.fused_loss")]


class AllLogits(LlamaForCausalLM):
    def forward(self, input_ids=None, attention_mask=None, labels=None):
        return super().forward(input_ids, attention_mask, labels=labels)


class OwnLoss(Trainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs)


def test_where_it_cannot_be_done(tiny_model, tmp_path, caplog):
    def refused(message, model=tiny_model, **more):
        with pytest.raises(ConfigError, match=f"caft.fused_loss: got true, but {message}"):
            trainer_of(copy.deepcopy(model), tmp_path, caft={"fused_loss": True}, **more)
        caplog.clear()
        trainer = trainer_of(
            copy.deepcopy(model), tmp_path, caft={"fused_loss": "auto"}, max_steps=1, **more
        )
        trainer.train()
        (warning,) = of_auto(caplog)
        assert re.search(f"caft.fused_loss: auto .*write false, because {message}", warning)

    refused("OwnLoss computes its own loss", trainer_class=with_caft(OwnLoss))
    refused("label smoothing and compute_loss_func need all logits", label_smoothing_factor=0.1)
    refused("AllLogits always builds all logits", AllLogits(tiny_model.config))
    routed = model_of("Mixtral")
    routed.config.output_router_logits = True
    refused("MixtralForCausalLM computes more than the next-token loss", routed)


def test_auto_warns_once_and_says_what_to_write(tiny_model, tmp_path, caplog):
    trainer_of(tiny_model, tmp_path, caft={"fused_loss": "auto"}, max_steps=1).train()
    (warning,) = of_auto(caplog)
    assert warning.startswith("caft.fused_loss: auto") and warning.endswith("write true")
    trainer_of(tiny_model, tmp_path, caft={"fused_loss": "on"})
    trainer_of(tiny_model, tmp_path, caft={"fused_loss": "off"})
    assert len(of_auto(caplog)) == 1


def test_what_is_attached_is_taken_off(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, caft={"fused_loss": True})
    assert isinstance(trainer.caft_parts.caft, AuxiliaryObjective)
    trainer.caft_parts.remove()
    assert not tiny_model._forward_pre_hooks and not tiny_model._forward_hooks
