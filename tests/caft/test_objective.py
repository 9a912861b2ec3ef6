"""Hosts that ask for the loss more often than once a micro-batch, for parts of it, by hand, or not
at all; and what sums begin with."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import DynamicCache, Trainer, TrainerCallback

from builders.runs import DATA, CAFTTrainer, Gradients, losses, pad, trainer_of
from caft_plugin import ConfigError, with_caft
from caft_plugin.caft.heads import LayerCall, replay
from caft_plugin.targets import IGNORE

pytestmark = pytest.mark.newest

KEYS = (
    "loss",
    "grad_norm",
    "caft/next_token_loss",
    "caft/loss_head_1",
    "caft/gamma",
    "caft/aux_loss",
)


class AsksTwice(Trainer):
    """As adversarial training does (FGM): the same batch once more within the step."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        again = [
            self.compute_loss(
                model, self._prepare_inputs(inputs), num_items_in_batch=num_items_in_batch
            )
        ]
        again.append(self.compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch))
        assert torch.equal(again[0], again[1]) and torch.equal(again[0].detach(), loss)
        return loss


class AsksForHalves(Trainer):
    """The rows of a micro-batch one half after the other."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        model.train()
        whole = 0
        for half in (slice(0, 2), slice(2, 4)):
            part = {key: value[half] for key, value in inputs.items()}
            loss = self.compute_loss(model, part, num_items_in_batch=num_items_in_batch)
            self.accelerator.backward(loss)
            whole = whole + loss.detach()
        return whole


class AsksOnceForAll(Trainer):
    """All micro-batches of a window in one, at its last step."""

    held: ClassVar[list] = []

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.held.append(inputs)
        if len(self.held) < 2:
            return torch.zeros(())
        length = max(batch["labels"].shape[1] for batch in self.held)
        fill = {"input_ids": 0, "labels": IGNORE, "attention_mask": 0}
        joined = {
            key: torch.cat(
                [F.pad(b[key], (0, length - b[key].shape[1]), value=value) for b in self.held]
            )
            for key, value in fill.items()
        }
        self.held.clear()
        return super().training_step(model, joined, num_items_in_batch)


@pytest.mark.parametrize(
    ("host", "drawn"),
    [
        (AsksTwice, None),
        (AsksTwice, 1),
        (AsksForHalves, None),
        (AsksForHalves, 1),
        (AsksOnceForAll, None),
    ],
)
def test_how_a_host_asks_changes_nothing(tiny_model, tmp_path, host, drawn):
    """Losses, logs and gradients against the Trainer's own step: float32, 1e-5 relative."""
    runs = []
    for trainer_class in (CAFTTrainer, with_caft(host)):
        seen = Gradients()
        trainer = trainer_of(
            copy.deepcopy(tiny_model),
            tmp_path,
            {"beta": 0.5, "num_heads": 2, "heads_per_step": drawn},
            trainer_class,
            callbacks=[seen],
            gradient_accumulation_steps=2,
            max_steps=2,
        )
        trainer.train()
        runs.append((losses(trainer), seen.steps))
    for one, other in zip(runs[0][0], runs[1][0], strict=True):
        assert one.keys() == other.keys()
        assert [other[k] for k in KEYS if k in one] == pytest.approx(
            [one[k] for k in KEYS if k in one], rel=1e-5
        )
    for one, other in zip(runs[0][1], runs[1][1], strict=True):
        for name, gradient in one.items():
            if gradient is None:
                assert other[name] is None
            else:
                torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_whose_inputs_the_host_has_changed_keeps_its_draws(tiny_model, tmp_path):
    """Other dicts and other labels than those that were counted: micro-batches are then taken in
    turn."""

    class Relabels(CAFTTrainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            inputs = {key: value.clone() for key, value in inputs.items()}
            return super().training_step(model, inputs, num_items_in_batch)

    runs = []
    for trainer_class in (CAFTTrainer, Relabels):
        trainer = trainer_class(
            model=copy.deepcopy(tiny_model),
            args=trainer_of(tiny_model, tmp_path, {}, gradient_accumulation_steps=2).args,
            train_dataset=DATA,
            data_collator=pad,
            caft={"heads_per_step": 1, "beta": 0.5},
        )
        trainer.train()
        runs.append(
            [{k: v for k, v in e.items() if "caft" in k or k == "loss"} for e in losses(trainer)]
        )
    assert runs[0] == runs[1]


def test_a_loss_by_hand_is_a_window_of_its_own(tiny_model, tmp_path):
    """The same before training, twice, within it and after it; and the logs do not see it."""

    class ByHand(TrainerCallback):
        def __init__(self):
            self.losses = []

        def on_step_end(self, args, state, control, **kwargs):
            self.ask()

        on_substep_end = on_step_end

        def ask(self):
            self.losses.append(self.trainer.compute_loss(self.trainer.model, pad(DATA[:3])).item())

    runs = []
    for by_hand in (None, ByHand()):
        trainer = trainer_of(
            copy.deepcopy(tiny_model),
            tmp_path,
            {"schedule": "constant", "beta": 0.5},
            callbacks=[by_hand] if by_hand else None,
            gradient_accumulation_steps=2,
            learning_rate=0.0,
        )
        if by_hand:
            by_hand.trainer = trainer
            by_hand.ask(), by_hand.ask()
        trainer.train()
        if by_hand:
            by_hand.ask()
            trainer.training_step(trainer.model, pad(DATA[:3]))
            trainer.training_step(trainer.model, pad(DATA[4:6]))
        runs.append([{key: e[key] for key in KEYS} for e in losses(trainer)])
    assert runs[0] == runs[1]
    # Within training the model is in training mode, which changes nothing: it has no dropout.
    assert by_hand.losses == pytest.approx([by_hand.losses[0]] * 9, rel=1e-6)


class MakesItsOwnTargets(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(input_ids=inputs["input_ids"])
        loss = F.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), inputs["input_ids"][:, 1:].flatten()
        )
        return (loss, outputs) if return_outputs else loss


class StepsByItself(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_host_that_passes_over_a_batch_trains_on_the_others(tiny_model, tmp_path):
    class PassesOver(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if not self.accelerator.sync_gradients:
                return torch.zeros(())
            return super().training_step(model, inputs, num_items_in_batch)

    trainer = trainer_of(
        tiny_model, tmp_path, {"beta": 0.5}, with_caft(PassesOver), gradient_accumulation_steps=2
    )
    trainer.train()
    for entry in losses(trainer):
        assert entry["loss"] == pytest.approx(
            entry["caft/next_token_loss"] + entry["caft/aux_loss"], rel=1e-5
        )


def only_ids(rows):
    return {key: value for key, value in pad(rows).items() if key != "labels"}


def one_label_a_row(rows):
    return {**pad(rows), "labels": torch.zeros(len(rows), dtype=torch.long)}


@pytest.mark.parametrize(
    ("host", "collator", "words"),
    [
        (MakesItsOwnTargets, only_ids, "the batches of MakesItsOwnTargets have no `labels`"),
        (MakesItsOwnTargets, one_label_a_row, "the batches of MakesItsOwnTargets have no `labels`"),
        (StepsByItself, pad, "StepsByItself made its first step without calling compute_loss"),
    ],
)
def test_a_host_that_heads_cannot_follow_is_named_at_the_first_step(
    tiny_model, tmp_path, host, collator, words
):
    trainer = trainer_of(tiny_model, tmp_path, {}, with_caft(host))
    trainer.data_collator = collator
    with pytest.raises(ConfigError, match=words):
        trainer.train()
    assert trainer.state.global_step == 0


# -- which call is read ----------------------------------------------------------------------------


def other_text(inputs):
    return {**inputs, "input_ids": (inputs["input_ids"] + 1) % 97}


def as_embeddings(model, inputs):
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    return {
        **{key: value for key, value in inputs.items() if key != "input_ids"},
        "inputs_embeds": embedded,
    }


def calling(*calls):
    """A host whose loss is that of the batch and that calls the model with what `calls` make of it,
    in this order."""

    class Calls(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = [model(**call(model, inputs)) for call in calls]
            loss = outputs[-1].loss
            return (loss, outputs[-1]) if return_outputs else loss

    return Calls


CALLS = {
    "batch": lambda model, inputs: inputs,
    "equal": lambda model, inputs: {key: value.clone() for key, value in inputs.items()},
    "other": lambda model, inputs: other_text(inputs),
    "embeddings": as_embeddings,
    "embeddings of other": lambda model, inputs: as_embeddings(model, other_text(inputs)),
    "part": lambda model, inputs: {key: value[:1] for key, value in inputs.items()},
}
READ = {
    ("batch",): None,
    ("equal",): None,
    ("embeddings",): None,
    ("other", "batch"): None,
    ("part", "equal"): None,
    ("other", "part", "batch"): None,
    ("batch", "other"): None,
    ("other",): (
        r"with different input_ids than the batch \(called with shapes \(4, 30\); the batch has"
        r" \(4, 30\)\)"
    ),
    ("part", "other"): "with different input_ids than the batch",
    ("embeddings of other", "batch"): "2 times, the first time without input_ids",
    ("embeddings of other", "embeddings"): "2 times, the first time without input_ids",
}


@pytest.mark.parametrize("calls", READ, ids=" then ".join)
def test_heads_learn_from_the_call_about_the_batch(tiny_model, tmp_path, calls):
    """Whatever else a host's loss calls the model with, before or after. It is the first step's
    loss and gradients of the heads that are compared with those of a host that calls it once, to
    1e-5 relative (float32)."""
    settings = {"data": DATA[:4], "max_steps": 1, "max_grad_norm": 0.0}
    found = []
    for kinds in (("batch",), calls):
        seen = Gradients()
        host = with_caft(calling(*(CALLS[kind] for kind in kinds)))
        trainer = trainer_of(
            copy.deepcopy(tiny_model), tmp_path, {"beta": 0.5}, host, callbacks=[seen], **settings
        )
        if READ[kinds] is not None:
            with pytest.raises(ConfigError, match=READ[kinds]):
                trainer.train()
            return
        trainer.train()
        heads = {name: gradient for name, gradient in seen.steps[0].items() if "caft" in name}
        found.append((losses(trainer)[0]["caft/loss_head_1"], heads))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, rtol=1e-5, atol=1e-7)


# -- the model's output ----------------------------------------------------------------------------


class UnpacksTuple(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        loss, _ = outputs.to_tuple()
        return (loss, outputs) if return_outputs else loss


class SumsKeys(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        loss = sum(value for key, value in outputs.items() if "loss" in key)
        return (loss, outputs) if return_outputs else loss


class TakesLast(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs, use_cache=False)
        loss = F.cross_entropy(outputs[-1][:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
        return (loss, outputs) if return_outputs else loss


class PenalisesAll(Trainer):
    """Towards the weights at the start (L2-SP), over every parameter that it finds."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.start = {
            name: parameter.detach().clone() for name, parameter in self.model.named_parameters()
        }

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        penalties = [
            (p - self.start[name] + 0.01).pow(2).sum() for name, p in model.named_parameters()
        ]
        return loss + 0.1 * sum(penalties)


@pytest.mark.parametrize("host", [UnpacksTuple, SumsKeys, TakesLast, PenalisesAll])
def test_a_hosts_own_loss_is_what_it_is_without_heads(tiny_model, tmp_path, host):
    """To the digit, at the first step."""
    plain = trainer_of(copy.deepcopy(tiny_model), tmp_path, trainer_class=host, max_steps=1)
    ours = trainer_of(tiny_model, tmp_path, {"beta": 0.5}, with_caft(host), max_steps=1)
    plain.train()
    ours.train()
    assert losses(ours)[0]["caft/next_token_loss"] == pytest.approx(
        losses(plain)[0]["loss"], rel=1e-6
    )


# -- shapes ----------------------------------------------------------------------------------------


def joined(batch):  # as preference training does
    return {key: torch.cat([value, value]) for key, value in batch.items()}


def flattened(batch):
    return {key: value.reshape(1, -1) for key, value in batch.items()}


def shortened(batch):
    return {key: value[:, :-1] for key, value in batch.items()}


@pytest.mark.parametrize("fused", ["off", "on"])
@pytest.mark.parametrize("reshape", [joined, flattened, shortened])
def test_a_host_that_reshapes_the_batch_is_an_error_with_both_shapes(
    tiny_model, tmp_path, reshape, fused
):
    class Reshapes(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = model(**reshape(inputs)).loss
            return (loss, None) if return_outputs else loss

    trainer_class = type("Fusing", (with_caft(Reshapes),), {"caft_reads_loss_alone": (Reshapes,)})
    trainer = trainer_class(
        model=tiny_model,
        args=trainer_of(tiny_model, tmp_path, {}).args,
        train_dataset=DATA[:4],
        data_collator=pad,
        caft={"fused_loss": fused},
    )
    found = tuple(reshape(pad(DATA[:4]))["labels"].shape)
    words = rf"called with shapes \({found[0]}, {found[1]}\); the batch has \(4, 30\)"
    with pytest.raises(ConfigError, match=words):
        trainer.train()


# -- sums ------------------------------------------------------------------------------------------


class LossWithoutLabels(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(**inputs)
        loss = outputs.logits.square().mean()
        return (loss, outputs) if return_outputs else loss


def test_batches_without_labels_are_evaluated_as_without_heads(tiny_model, tmp_path):
    metrics = []
    for trainer_class in (LossWithoutLabels, with_caft(LossWithoutLabels)):
        trainer = trainer_of(
            copy.deepcopy(tiny_model),
            tmp_path,
            None if trainer_class is LossWithoutLabels else {},
            trainer_class,
            evaluate=DATA[:4],
            label_names=["input_ids"],  # else the Trainer computes no loss
        )
        trainer.data_collator = lambda rows: {k: v for k, v in pad(rows).items() if k != "labels"}
        metrics.append(trainer.evaluate())
    assert metrics[0]["eval_loss"] == metrics[1]["eval_loss"]


@pytest.mark.parametrize("how", ["interrupted", "smaller batches"])
def test_whatever_starts_a_loop_starts_with_empty_sums(tiny_model, tmp_path, how):
    """The first log line after a loop that broke off between two lines is the mean of its own
    steps."""

    class BreaksOff(TrainerCallback):
        broken = False

        def on_step_end(self, args, state, control, **kwargs):
            if not self.broken and state.global_step == 8:
                BreaksOff.broken = True
                raise (
                    KeyboardInterrupt
                    if how == "interrupted"
                    else RuntimeError("CUDA out of memory.")
                )

    settings = {
        "logging_steps": 5,
        "max_steps": 10,
        "learning_rate": 0.0,
        "per_device_train_batch_size": 8,
    }
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        {"num_heads": 2, "schedule": "constant"},
        callbacks=[BreaksOff()],
        auto_find_batch_size=how == "smaller batches",
        **settings,
    )
    if how == "interrupted":
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    trainer.train()
    assert BreaksOff.broken
    for entry in losses(trainer):
        assert entry["caft/gamma"] == 1.0
        assert entry["loss"] == pytest.approx(
            entry["caft/next_token_loss"] + entry["caft/aux_loss"], rel=1e-5
        )
        assert 4 < entry["caft/loss_head_1"] < 6


# -- random numbers and caches ---------------------------------------------------------------------


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], "all-linear"])
def test_the_host_draws_its_own_random_numbers_where_the_unembedding_has_dropout(
    tiny_model, tmp_path, targets
):
    """With a vanishing beta the losses are the plain run's, to the digit that float32 has."""
    runs = []
    for trainer_class in (Trainer, CAFTTrainer):
        torch.manual_seed(0)
        modules = ["q_proj", "lm_head"] if targets != "all-linear" else targets
        model = get_peft_model(
            copy.deepcopy(tiny_model),
            LoraConfig(r=4, lora_dropout=0.3, target_modules=modules, init_lora_weights=False),
        )
        trainer = trainer_of(
            model, tmp_path, {"train_heads": "frozen", "beta": 1e-12}, trainer_class, max_steps=6
        )
        trainer.train()
        runs.append([entry["loss"] for entry in losses(trainer)])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


@pytest.mark.parametrize(
    "name", ["cache", "past_key_values", "past_key_value", "layer_past", "kv_cache", "state"]
)
def test_a_head_never_gets_the_models_cache(name):
    """Whatever a family or version calls that argument (transformers 5.24: `cache`)."""
    received = {}

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.eye(4))

        def forward(self, hidden_states, cache_position=None, use_cache=True, **kwargs):
            received.update(kwargs, use_cache=use_cache, cache_position=cache_position)
            return hidden_states @ self.weight

    cache, hidden, positions = DynamicCache(), torch.randn(1, 3, 4), torch.arange(3)
    kwargs = {name: cache, "cache_position": positions, "use_cache": True}
    call = LayerCall((hidden,), kwargs, ("cpu", torch.bfloat16, False))
    assert torch.equal(replay(Layer(), hidden, call, positions), hidden[0])
    assert (
        received[name] is None
        and received["use_cache"] is False
        and received["cache_position"] is positions
    )


@pytest.mark.parametrize("padded", [False, True])
def test_a_model_with_a_cache_trains_as_one_without(tiny_model, tmp_path, padded):
    runs = []
    for use_cache in (False, True):
        model = copy.deepcopy(tiny_model)
        model.config.use_cache = use_cache
        data = DATA[:4] if padded else [DATA[1]] * 4
        trainer = trainer_of(
            model, tmp_path, {"num_heads": 2}, data=data, max_steps=1, use_cache=use_cache
        )
        trainer.train()
        runs.append([losses(trainer)[0][key] for key in KEYS])
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
