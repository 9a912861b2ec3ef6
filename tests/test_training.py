"""`with_caft` on the plain transformers Trainer, float32, tiny models."""

from __future__ import annotations

import copy
import json
import math
import random

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from builders.runs import (
    DATA,
    CAFTTrainer,
    Gradients,
    arguments,
    lora,
    losses,
    pad,
    rows,
    trainer_of,
)
from caft_plugin import CAFTConfig, CAFTError, ConfigError, with_caft
from caft_plugin.caft import window
from caft_plugin.caft.heads import MODULE_NAME
from caft_plugin.caft.window import draw_heads
from caft_plugin.targets import IGNORE

pytestmark = pytest.mark.newest


def test_names_on_the_trainer_begin_with_caft(tiny_model, tmp_path):
    """Also after training: a user's own trainer class may have any other name."""
    plain = trainer_of(copy.deepcopy(tiny_model), tmp_path, trainer_class=Trainer)
    ours = trainer_of(
        tiny_model,
        tmp_path,
        caft=CAFTConfig(num_heads=1),
        meap={"mode": "pretrain", "mask_token": "add"},
    )
    for trainer in (plain, ours):
        trainer.train()
    added = {*vars(ours), *dir(type(ours))} - {*vars(plain), *dir(type(plain))}
    assert {"caft_parts", "caft_files"} <= added
    assert [name for name in added if not name.startswith(("caft_", "__"))] == []


def test_one_class_for_one_class():
    assert with_caft(Trainer) is CAFTTrainer
    assert with_caft(CAFTTrainer) is CAFTTrainer
    with pytest.raises(TypeError, match="subclass of transformers.Trainer"):
        with_caft(dict)


def test_without_caft_it_is_the_class_it_was(tiny_model, tmp_path):
    plain = trainer_of(copy.deepcopy(tiny_model), tmp_path, trainer_class=Trainer)
    ours = trainer_of(copy.deepcopy(tiny_model), tmp_path, caft=None)
    plain.train(), ours.train()
    assert [(e["loss"], e["grad_norm"]) for e in losses(plain)] == [
        (e["loss"], e["grad_norm"]) for e in losses(ours)
    ]


def test_beta_zero_is_a_plain_run_to_the_digit(tiny_model, tmp_path):
    plain = trainer_of(
        lora(copy.deepcopy(tiny_model)), tmp_path, trainer_class=Trainer, max_steps=5
    )
    plain.train()
    ours = trainer_of(lora(copy.deepcopy(tiny_model)), tmp_path, caft={"beta": 0}, max_steps=5)
    ours.train()
    assert [(e["loss"], e["grad_norm"]) for e in losses(plain)] == [
        (e["loss"], e["grad_norm"]) for e in losses(ours)
    ]
    assert losses(plain)[0].keys() == losses(ours)[0].keys()


def test_the_base_sees_the_same_random_numbers(tiny_model, tmp_path):
    """With a vanishing beta the base, dropout included, trains as without heads."""
    plain = trainer_of(
        lora(copy.deepcopy(tiny_model)), tmp_path, trainer_class=Trainer, max_steps=4
    )
    plain.train()
    ours = trainer_of(lora(copy.deepcopy(tiny_model)), tmp_path, caft={"beta": 1e-12}, max_steps=4)
    ours.train()
    for a, b in zip(losses(plain), losses(ours), strict=True):
        assert b["caft/next_token_loss"] == pytest.approx(a["loss"], rel=1e-6)


@pytest.mark.parametrize("host_divides", [True, False])
@pytest.mark.parametrize("rows_in_data", [8, 11])
@pytest.mark.parametrize("wiring", [{}, {"head_input": "final", "head_norm": False}])
def test_accumulation_layouts_agree(tiny_model, tmp_path, host_divides, rows_in_data, wiring):
    """8x1, 4x2, 2x4, 1x8: head losses, auxiliary loss and its gradients; also in a last window that
    is not full (11 rows), also where a micro-batch has no target for some head (rows of 3
    tokens)."""
    results = []
    for batch, accumulation in [(8, 1), (4, 2), (2, 4), (1, 8)]:
        seen = Gradients()
        trainer = trainer_of(
            copy.deepcopy(tiny_model),
            tmp_path,
            caft={"beta": 0.5, **wiring},
            callbacks=[seen],
            data=DATA[:rows_in_data],
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=-1,
            num_train_epochs=1,
            learning_rate=1e-12,
            max_grad_norm=0.0,
        )
        if host_divides:  # as Axolotl's trainer does
            trainer.model_accepts_loss_kwargs = False
        trainer.train()
        heads = [{n: g for n, g in step.items() if MODULE_NAME in n} for step in seen.steps]
        results.append((losses(trainer), heads))
    assert len(results[0][0]) == math.ceil(rows_in_data / 8)
    for logs, gradients in results[1:]:
        for one, other in zip(results[0][0], logs, strict=True):
            for key in one:
                if key.startswith("caft/loss_head") or key == "caft/aux_loss":
                    assert other[key] == pytest.approx(one[key], rel=1e-5), key
        for one, other in zip(results[0][1], gradients, strict=True):
            for name in one:
                torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("host_divides", [True, False])
def test_loss_and_gradients_equal_the_formula(tiny_model, tmp_path, host_divides):
    """One window of two uneven micro-batches against the paper's formula over all rows at once."""
    seen = Gradients()
    model = copy.deepcopy(tiny_model)
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft={"beta": 0.3, "alpha": 0.7, "schedule": "constant", "num_heads": 2},
        callbacks=[seen],
        data=DATA[:4],
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
    )
    heads = copy.deepcopy(trainer.caft_parts.caft.heads.layers)
    if host_divides:
        trainer.model_accepts_loss_kwargs = False
    trainer.train()

    trunk = model.model
    rope = trunk.rotary_emb
    last = trunk.layers[-1]
    means, own = [], []
    for k in (1, 2):
        logits, targets = [], []
        for example in DATA[:4]:
            ids = example["input_ids"][None]
            positions = torch.arange(ids.shape[1])[None]
            hidden = trunk.embed_tokens(ids)
            embeddings = rope(hidden, positions)
            for layer in trunk.layers[:-1]:
                hidden = layer(hidden, position_embeddings=embeddings)
            head = heads[k - 1](hidden, position_embeddings=embeddings)
            logits.append(model.lm_head(trunk.norm(head))[0, : -(k + 1)])
            targets.append(example["labels"][k + 1 :])
            if k == 1:
                out = model.lm_head(trunk.norm(last(hidden, position_embeddings=embeddings)))
                own.append((out[0, :-1], example["labels"][1:]))
        means.append(F.cross_entropy(torch.cat(logits), torch.cat(targets), ignore_index=IGNORE))
    aux = 0.3 * (0.7 * means[0] + 0.7**2 * means[1])
    log = losses(trainer)[0]
    assert log["caft/loss_head_1"] == pytest.approx(means[0].item(), rel=1e-5)
    assert log["caft/loss_head_2"] == pytest.approx(means[1].item(), rel=1e-5)
    assert log["caft/aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    assert log["loss"] == pytest.approx(
        log["caft/next_token_loss"] + log["caft/aux_loss"], rel=1e-6
    )

    if not host_divides:  # an exact host: the total is exact too
        next_token = F.cross_entropy(
            torch.cat([o for o, _ in own]), torch.cat([t for _, t in own]), ignore_index=IGNORE
        )
        (next_token + aux).backward()
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(seen.steps[0][name], parameter.grad, rtol=1e-4, atol=1e-6)
    else:
        aux.backward()
    for name, parameter in heads.named_parameters():
        full = seen.steps[0][f"{MODULE_NAME}.layers.{name}"]
        torch.testing.assert_close(full, parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("base", ["full", "lora"])
@pytest.mark.parametrize("how", ["auto", "full", "lora", "frozen"])
def test_what_trains_changes_and_what_is_frozen_does_not(tiny_model, tmp_path, base, how):
    model = lora(tiny_model) if base == "lora" else tiny_model
    trainer = trainer_of(model, tmp_path, caft={"train_heads": how, "beta": 0.1})
    heads = trainer.caft_parts.caft.heads
    before = {n: p.detach().clone() for n, p in heads.named_parameters()}
    trainer.train()
    expected = {"auto": "full" if base == "full" else "lora"}.get(how, how)
    changed = {n for n, p in heads.named_parameters() if not torch.equal(p, before[n])}
    trainable = {n for n in before if expected == "full" or (expected == "lora" and ".lora_" in n)}
    assert changed == trainable
    assert bool(trainable) == (how != "frozen")
    assert any(".lora_" in n for n in before) == (expected == "lora")


def test_logs(tiny_model, tmp_path):
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft=CAFTConfig(num_heads=2),
        logging_steps=2,
        max_steps=4,
        evaluate=DATA[:6],
    )
    trainer.train()
    first, second = losses(trainer)
    assert {k for k in first if k.startswith("caft/")} == {
        "caft/next_token_loss",
        "caft/loss_head_1",
        "caft/loss_head_2",
        "caft/gamma",
        "caft/aux_loss",
    }
    gammas = [math.sin((4 - s) / 4 * math.pi / 2) for s in range(4)]
    assert first["caft/gamma"] == pytest.approx(sum(gammas[:2]) / 2)
    assert second["caft/gamma"] == pytest.approx(sum(gammas[2:]) / 2)
    assert second["caft/aux_loss"] < first["caft/aux_loss"]  # gamma falls from 1 to 0


def test_evaluation_adds_nothing_and_reports_the_heads(tiny_model, tmp_path):
    plain = trainer_of(
        copy.deepcopy(tiny_model), tmp_path, trainer_class=Trainer, evaluate=DATA[:6]
    )
    ours = trainer_of(copy.deepcopy(tiny_model), tmp_path, caft={}, evaluate=DATA[:6])
    metrics = ours.evaluate()
    assert metrics["eval_loss"] == plain.evaluate()["eval_loss"]
    small = trainer_of(
        tiny_model, tmp_path, caft={}, evaluate=DATA[:6], per_device_eval_batch_size=1
    )
    one_by_one = small.evaluate()
    for k in range(1, 5):
        key = f"eval_caft/loss_head_{k}"
        assert metrics[key] > 0
        assert one_by_one[key] == pytest.approx(metrics[key], rel=1e-5)
    assert f"eval_caft/loss_head_{1}" in ours.state.log_history[-1]


def test_tokens_per_pass_against_a_slow_formula(tiny_model, tmp_path):
    """Fresh heads say what the model says, so head k is right where the model's likeliest token at
    t is the target at t + k + 1."""
    generator, data = random.Random(0), rows([30, 7, 22, 3, 2])
    runs = []
    for row in data:
        best = tiny_model(input_ids=row["input_ids"][None]).logits[0].argmax(-1).tolist()
        labels = [best[max(t - generator.choice([2, 2, 3, 4, 5]), 0)] for t in range(len(best))]
        labels = [-100 if generator.random() < 0.1 else label for label in labels]
        row["labels"] = torch.tensor(labels)
        for t, guess in enumerate(best):
            ahead = labels[t + 2 : t + 6]
            if not ahead or ahead[0] == -100:
                continue
            runs.append(next((i for i, label in enumerate(ahead) if label != guess), len(ahead)))
    assert 0 < sum(runs) and max(runs) > 1
    metrics = trainer_of(
        tiny_model, tmp_path, caft={}, evaluate=data, per_device_eval_batch_size=2
    ).evaluate()
    assert metrics["eval_caft/tokens_per_pass"] == pytest.approx(
        1 + sum(runs) / len(runs), rel=1e-6
    )


def test_no_head_works_where_gamma_is_zero(tiny_model, tmp_path):
    seen = Gradients()
    trainer = trainer_of(
        tiny_model, tmp_path, caft={"schedule": "linear"}, callbacks=[seen], max_steps=2
    )
    trainer.train()
    heads = [{n: g for n, g in step.items() if MODULE_NAME in n} for step in seen.steps]
    assert all(g is None for g in heads[0].values())
    assert all(g is not None for g in heads[1].values())
    assert "caft/loss_head_1" not in losses(trainer)[0]
    assert losses(trainer)[0]["caft/aux_loss"] == 0


def test_nothing_supervised(tiny_model, tmp_path):
    data = [{**row, "labels": torch.full_like(row["labels"], IGNORE)} for row in DATA[:4]]

    class ZeroLoss(Trainer):  # the plain Trainer's own loss is not a number here
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs).logits.sum() * 0

    trainer = trainer_of(
        tiny_model, tmp_path, caft={}, trainer_class=with_caft(ZeroLoss), data=data, max_steps=1
    )
    trainer.train()
    log = losses(trainer)[0]
    assert log["loss"] == 0 and log["grad_norm"] == 0 and log["caft/aux_loss"] == 0


def test_a_subclass_with_its_own_loss_keeps_it(tiny_model, tmp_path):
    class Doubled(Trainer):
        calls = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            Doubled.calls += 1
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    plain = trainer_of(copy.deepcopy(tiny_model), tmp_path, trainer_class=Doubled, max_steps=1)
    plain.train()
    assert Doubled.calls == 1
    ours = trainer_of(tiny_model, tmp_path, caft={}, trainer_class=with_caft(Doubled), max_steps=1)
    ours.train()
    assert Doubled.calls == 2
    log = losses(ours)[0]
    assert log["caft/next_token_loss"] == pytest.approx(losses(plain)[0]["loss"], rel=1e-6)
    assert log["loss"] == pytest.approx(
        log["caft/next_token_loss"] + log["caft/aux_loss"], rel=1e-6
    )


@pytest.mark.parametrize("extra", ["label_smoothing", "compute_loss_func"])
def test_hosts_that_take_the_labels_away(tiny_model, tmp_path, extra):
    """Label smoothing and a custom loss remove `labels` from the inputs before they call the
    model."""

    def custom(outputs, labels, num_items_in_batch=None):
        flat = outputs.logits[:, :-1].flatten(0, 1)
        return (
            F.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=IGNORE, reduction="sum")
            / num_items_in_batch
        )

    settings = {"label_smoothing_factor": 0.1} if extra == "label_smoothing" else {}
    reference = trainer_of(copy.deepcopy(tiny_model), tmp_path, caft={"beta": 0.5}, max_steps=1)
    reference.train()
    trainer = CAFTTrainer(
        model=tiny_model,
        args=arguments(tmp_path, max_steps=1, **settings),
        train_dataset=DATA,
        data_collator=pad,
        compute_loss_func=custom if extra == "compute_loss_func" else None,
        caft={"beta": 0.5},
    )
    trainer.train()
    for k in range(1, 5):
        key = f"caft/loss_head_{k}"
        assert losses(trainer)[0][key] == pytest.approx(losses(reference)[0][key], rel=1e-6)


@pytest.mark.parametrize("base", ["full", "lora"])
@pytest.mark.parametrize("how", ["auto", "frozen"])
def test_resuming_continues_to_the_digit(tiny_model, tmp_path, base, how):
    def run(folder, steps, resume=None):
        model = copy.deepcopy(tiny_model)
        model = lora(model) if base == "lora" else model
        trainer = trainer_of(
            model,
            folder,
            caft={"train_heads": how, "beta": 0.5},
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
        )
        if steps < 6:
            trainer.add_callback(StopAt(steps))
        trainer.train(resume_from_checkpoint=resume)
        return losses(trainer)

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "halves", 3)
    resumed = run(tmp_path / "halves", 6, resume=str(tmp_path / "halves" / "checkpoint-3"))
    drop = ("epoch",)
    assert [{k: v for k, v in e.items() if k not in drop} for e in resumed] == [
        {k: v for k, v in e.items() if k not in drop} for e in whole
    ]


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_resuming_without_heads_says_so(tiny_model, tmp_path):
    plain = trainer_of(
        copy.deepcopy(tiny_model),
        tmp_path,
        trainer_class=Trainer,
        save_strategy="steps",
        save_steps=3,
    )
    plain.train()
    ours = trainer_of(tiny_model, tmp_path, caft={})
    with pytest.raises(ConfigError, match="checkpoint-3 has no caft_heads/ folder"):
        ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def shapes(file):
    return {key: tuple(tensor.shape) for key, tensor in load_file(file).items()}


@pytest.mark.parametrize("base", ["full", "lora"])
def test_what_is_saved_is_what_a_plain_run_saves(tiny_model, tmp_path, base):
    """On every path: checkpoint, save_model, save_pretrained in mid-run and after,
    merge_and_unload."""
    file = "adapter_model.safetensors" if base == "lora" else "model.safetensors"

    class SaveInMidRun(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                model.save_pretrained(f"{args.output_dir}/mid")

    found = {}
    for name, trainer_class in (("plain", Trainer), ("ours", CAFTTrainer)):
        model = copy.deepcopy(tiny_model)
        if base == "lora":
            # bias="all" makes PEFT save every tensor with "bias" in its name, "lora_" or not
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", bias="all"))
        trainer = trainer_of(
            model,
            tmp_path / name,
            trainer_class=trainer_class,
            caft={} if trainer_class is CAFTTrainer else None,
            callbacks=[SaveInMidRun()],
            max_steps=2,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train()
        trainer.save_model(str(tmp_path / name / "final"))
        trainer.model.save_pretrained(tmp_path / name / "after")
        if base == "lora":
            merged = trainer.model.merge_and_unload()
            merged.save_pretrained(tmp_path / name / "merged")
            found[name, "merged"] = shapes(tmp_path / name / "merged" / "model.safetensors")
        for folder in ("checkpoint-2", "final", "mid", "after"):
            found[name, folder] = shapes(tmp_path / name / folder / file)
    for (name, folder), keys in found.items():
        if name == "ours":
            assert keys == found["plain", folder], folder
    assert (tmp_path / "ours" / "final" / "caft_heads" / "heads.safetensors").is_file()
    assert not (tmp_path / "ours" / "final" / "caft_heads" / "lora.safetensors").exists()
    assert (tmp_path / "ours" / "checkpoint-2" / "caft_heads" / "lora.safetensors").exists() == (
        base == "lora"
    )
    if base == "full":
        loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ours" / "final")
        assert loaded.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2).shape == (1, 5)


def test_pretrained_heads_are_used(tiny_model, tmp_path):
    first = trainer_of(
        copy.deepcopy(tiny_model), tmp_path / "a", caft={"beta": 0.5, "head_input": "final"}
    )
    first.train()
    first.save_model()
    second = trainer_of(
        copy.deepcopy(tiny_model),
        tmp_path / "b",
        caft={"heads": str(tmp_path / "a"), "num_heads": 2},
    )
    assert second.caft_parts.caft_config.head_input == "final"  # as the folder records
    for ours, theirs in zip(
        second.caft_parts.caft.heads.layers, first.caft_parts.caft.heads.layers[:2], strict=True
    ):
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b)


def test_wiring_that_differs_from_the_folder_is_warned_of(tiny_model, tmp_path, caplog):
    first = trainer_of(copy.deepcopy(tiny_model), tmp_path / "a", caft={})
    first.save_model()
    caplog.clear()
    trainer_of(tiny_model, tmp_path / "b", caft={"heads": str(tmp_path / "a"), "head_norm": False})
    assert "caft.head_norm: got False, but these heads were made with True" in caplog.text


def test_best_model_brings_its_heads(tiny_model, tmp_path):
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft={"beta": 0.5},
        evaluate=DATA[:4],
        max_steps=4,
        learning_rate=0.01,
        greater_is_better=True,  # the loss falls, so the first evaluation stays the best
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-1")
    saved = load_file(f"{best}/caft_heads/heads.safetensors")
    for name, tensor in trainer.caft_parts.caft.heads.layers.state_dict().items():
        assert torch.equal(tensor, saved[name])


@pytest.mark.parametrize(
    ("metric", "best"),
    [
        ("caft/loss_head_1", min),
        ("eval_caft/loss_head_2", min),
        ("eval_few_caft/loss_head_1", min),
        ("caft/tokens_per_pass", max),
        ("loss", min),
    ],
)
def test_the_best_checkpoint_is_that_of_the_best_heads(tiny_model, tmp_path, metric, best):
    """Trainer takes metrics whose names do not end in `loss` for greater-is-better."""
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft={"beta": 1.0, "schedule": "constant"},
        evaluate={"few": DATA[:4]} if "few" in metric else DATA[:4],
        max_steps=4,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model=metric,
    )
    trainer.train()
    key = metric if metric.startswith("eval_") else f"eval_{metric}"
    values = {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}
    assert len(set(values.values())) > 1
    kept = int(trainer.state.best_model_checkpoint.rsplit("-", 1)[1])
    assert values[kept] == best(values.values())


class NamesByPosition(Trainer):
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        output = self.evaluation_loop(
            self.get_eval_dataloader(eval_dataset), "Evaluation", None, ignore_keys, "valid"
        )
        return output.metrics


class TakesAnything(NamesByPosition):
    def evaluation_loop(self, *args, **kwargs):
        return super().evaluation_loop(*args, **kwargs)


@pytest.mark.parametrize("host", [NamesByPosition, TakesAnything])
def test_a_prefix_given_by_position(tiny_model, tmp_path, host):
    metrics = trainer_of(tiny_model, tmp_path, {}, with_caft(host), evaluate=DATA[:4]).evaluate()
    assert {"valid_loss", "valid_caft/loss_head_1", "valid_caft/tokens_per_pass"} <= metrics.keys()
    assert not any(key.startswith("eval_") for key in metrics)


def test_refusals(tiny_model, tmp_path):
    with pytest.raises(ConfigError, match=r"caft.num_heads: got 0"):
        trainer_of(tiny_model, tmp_path, caft={"num_heads": 0})
    optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="finished optimizer"):
        CAFTTrainer(
            model=tiny_model,
            args=arguments(tmp_path),
            train_dataset=DATA,
            optimizers=(optimizer, None),
            caft={},
        )
    with pytest.raises(ConfigError, match="model_init creates a new model"):
        CAFTTrainer(
            model_init=lambda: tiny_model, args=arguments(tmp_path), train_dataset=DATA, caft={}
        )
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(ConfigError, match="2 GPUs"):
        CAFTTrainer(model=tiny_model, args=several, train_dataset=DATA, caft={})


def test_a_loss_that_never_calls_the_model_is_an_error(tiny_model, tmp_path):
    class Blind(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return next(model.parameters()).sum()

    trainer = trainer_of(tiny_model, tmp_path, caft={}, trainer_class=with_caft(Blind))
    with pytest.raises(RuntimeError, match="without calling the model with gradients") as raised:
        trainer.train()
    assert isinstance(raised.value, CAFTError) and not isinstance(raised.value, ConfigError)


def test_record(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, caft={"num_heads": 3})
    trainer.save_model()
    record = json.loads((tmp_path / "caft_heads" / "config.json").read_text())
    assert record == {
        "format_version": 1,
        "num_heads": 3,
        "head_input": "penultimate",
        "head_norm": True,
        "layer_class": "LlamaDecoderLayer",
        "model_type": "llama",
        "hidden_size": 32,
        "vocab_size": 97,
        "base_model": "llama",
    }


# -- heads drawn for each micro-batch --------------------------------------------------------------


def test_drawn_heads_give_the_gradient_of_all_on_average(tiny_model, tmp_path, monkeypatch):
    """One head a step: over the heads, probability times gradient adds up to the gradient of all
    four (1e-5)."""
    caft = {"beta": 0.5, "schedule": "constant"}
    mean = gradients_of(tiny_model, tmp_path, {**caft, "beta": 0})
    everything = gradients_of(tiny_model, tmp_path, caft)
    weights = [0.8**k for k in range(1, 5)]
    sums = {name: torch.zeros_like(g) for name, g in everything.items() if g is not None}
    for head in range(4):
        drawn = [[int(k == head) for k in range(4)]] * 2
        monkeypatch.setattr(window, "draw_heads", lambda *_, drawn=drawn: drawn)
        one = gradients_of(tiny_model, tmp_path, {**caft, "heads_per_step": 1})
        for name, gradient in one.items():
            if MODULE_NAME in name and f"layers.{head}." not in name:
                assert gradient is None, name
            elif gradient is not None:
                sums[name] += gradient * weights[head] / sum(weights)
    for name, wanted in everything.items():
        assert torch.allclose(sums[name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max()), name
    assert any(not torch.allclose(everything[name], g, rtol=1e-3) for name, g in mean.items())


def gradients_of(model, folder, caft):
    seen = Gradients()
    trainer = trainer_of(
        copy.deepcopy(model),
        folder,
        caft,
        callbacks=[seen],
        max_steps=1,
        max_grad_norm=0,
        gradient_accumulation_steps=2,
    )
    trainer.train()
    return {name: g for name, g in seen.steps[0].items()}


def test_draws_are_in_proportion_to_alpha_and_the_same_everywhere():
    config = CAFTConfig(heads_per_step=2, alpha=0.5)
    counts = torch.zeros(4)
    for step in range(3000):
        draws = draw_heads(config, 2, seed=42, step=step)
        assert draws == draw_heads(config, 2, seed=42, step=step) and all(
            sum(times) == 2 for times in draws
        )
        counts += torch.tensor(draws).sum(0)
    share = torch.tensor([0.5**k for k in range(1, 5)])
    # 12,000 draws: 0.02 is four standard deviations of the largest share
    assert torch.allclose(counts / counts.sum(), share / share.sum(), atol=0.02)


def test_only_drawn_heads_are_logged_and_updated(tiny_model, tmp_path):
    trainer = trainer_of(
        tiny_model, tmp_path, caft={"heads_per_step": 1, "num_heads": 3}, max_steps=6
    )
    before = [p.detach().clone() for p in trainer.caft_parts.caft.heads.parameters()]
    draws = [
        draw_heads(trainer.caft_parts.caft_config, 1, trainer.args.seed, step)[0]
        for step in range(6)
    ]
    trainer.train()
    for times, entry in zip(draws, losses(trainer), strict=True):
        assert [f"caft/loss_head_{k}" in entry for k in (1, 2, 3)] == [count > 0 for count in times]
        assert entry["loss"] == pytest.approx(
            entry["caft/next_token_loss"] + entry["caft/aux_loss"], rel=1e-6
        )
    ever = [any(times[k] for times in draws) for k in range(3)]
    per_head = len(before) // 3
    for index, (old, new) in enumerate(
        zip(before, trainer.caft_parts.caft.heads.parameters(), strict=True)
    ):
        assert torch.equal(old, new) != ever[index // per_head]


def test_a_drawn_heads_loss_is_its_mean_where_it_was_drawn(tiny_model, tmp_path, monkeypatch):
    """Two micro-batches, head 1 drawn for the first alone: its logged loss is that of a run over
    the first alone."""
    monkeypatch.setattr(window, "draw_heads", lambda config, n, *_: [[1, 0], [0, 1]][:n])
    settings = {"max_steps": 1, "learning_rate": 0.0, "train_sampling_strategy": "sequential"}
    caft = {"heads_per_step": 1, "num_heads": 2}
    both = trainer_of(
        copy.deepcopy(tiny_model), tmp_path, caft, gradient_accumulation_steps=2, **settings
    )
    first = trainer_of(copy.deepcopy(tiny_model), tmp_path, caft, **settings)
    both.train(), first.train()
    assert losses(both)[0]["caft/loss_head_1"] == pytest.approx(
        losses(first)[0]["caft/loss_head_1"], rel=1e-6
    )
    assert "caft/loss_head_2" in losses(both)[0] and "caft/loss_head_2" not in losses(first)[0]


@pytest.mark.parametrize("caft", [None, {}, {"fused_loss": "on"}])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_what_a_host_saves_comes_back_in_one_backward_pass(
    tiny_model, tmp_path, gradient_checkpointing, caft
):
    """As TRL's activation offloading needs it: it takes the first tensor that comes back for the
    start of the backward pass, and lets go of all others when the gradient computation ends in
    which that was."""

    class Offloading(Trainer):
        def training_step(self, *args, **kwargs):
            saved, passes = {}, set()

            def pack(tensor):
                saved[len(saved)] = tensor
                return len(saved) - 1

            def unpack(key):
                passes.add(torch._C._current_graph_task_id())
                tensor, saved[key] = saved[key], None
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                loss = super().training_step(*args, **kwargs)
            steps.append((len(passes), sum(tensor is not None for tensor in saved.values())))
            return loss

    steps = []
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft,
        with_caft(Offloading),
        gradient_checkpointing=gradient_checkpointing,
    )
    trainer.train()
    assert [passes for passes, _ in steps] == [1, 1, 1]
    if not caft:  # the fused loss leaves one position's logits unused
        assert [left for _, left in steps] == [0, 0, 0]
