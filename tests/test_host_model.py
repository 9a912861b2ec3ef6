"""The model is the host's: outside of `train()` and evaluation it is what it would be without
us."""

from __future__ import annotations

import copy
import io
import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from builders.anatomy import anatomy
from builders.runs import DATA, CAFTTrainer, arguments, lora, losses, pad, trainer_of
from caft_plugin import ConfigError, with_caft
from caft_plugin.caft.heads import MODULE_NAME

pytestmark = pytest.mark.newest


def saved_how(model):
    """How `torch.save` of a whole model ends: some models cannot be pickled, whoever trained
    them."""
    try:
        torch.save(model, io.BytesIO())
    except (AttributeError, TypeError, pickle.PicklingError) as error:
        return type(error).__name__
    return "whole"


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if self.error and state.global_step == 2:
            raise self.error


AFTER = {
    "construction": lambda t: None,
    "training": lambda t: t.train(),
    "evaluation": lambda t: t.evaluate(),
    "prediction": lambda t: t.predict(DATA[:3]),
    "an interrupt": lambda t: t.train(),
    "a failure": lambda t: t.train(),
    "a loss by hand": lambda t: t.compute_loss(t.model, pad(DATA[:2])),
    "an optimizer by hand": lambda t: t.create_optimizer(),
}
ERRORS = {"an interrupt": KeyboardInterrupt, "a failure": RuntimeError}


@pytest.mark.parametrize("base", ["full", "lora"])
@pytest.mark.parametrize("after", AFTER)
def test_outside_of_training_and_evaluation_it_is_as_a_plain_trainer_leaves_it(
    tiny_model, tmp_path, base, after
):
    found = []
    for trainer_class in (Trainer, CAFTTrainer):
        model = copy.deepcopy(tiny_model)
        trainer = trainer_of(
            lora(model) if base == "lora" else model,
            tmp_path,
            caft={"num_heads": 2},
            trainer_class=trainer_class,
            evaluate=DATA[:4],
            callbacks=[Stop(ERRORS[after]() if after in ERRORS else None)],
        )
        if after in ERRORS:
            with pytest.raises(ERRORS[after]):
                AFTER[after](trainer)
        else:
            AFTER[after](trainer)
        assert "prepare" not in vars(trainer.accelerator)
        ids = pad(DATA[:2])["input_ids"]
        model = trainer.model.eval()
        assert torch.equal(copy.deepcopy(model)(ids).logits, model(ids).logits)
        found.append((anatomy(model), saved_how(model)))
    assert found[0] == found[1]


def names_in(model):
    """What a host's code finds when it looks through a model."""
    return [
        [name for name, _ in model.named_modules()],
        [name for name, _ in model.named_parameters()],
        [name for name, _ in model.named_children()],
        model.num_parameters(),
        list(model.state_dict()),
    ]


METHODS = {"compute_loss", "training_step", "prediction_step", "evaluate", "log"}
EVENTS = {"on_train_begin", "on_step_end", "on_prediction_step"}


@pytest.mark.parametrize(
    "ours", [{"caft": {}}, {"meap": {"mode": "pretrain", "mask_token": "add"}}]
)
def test_the_hosts_own_code_finds_the_model_as_without_us(tiny_model, tmp_path, ours):
    """In its loss, its steps and its callbacks. What its loop needs (the optimizer, clipping) has
    what is ours."""
    seen = {}

    class Looks(Trainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.setdefault("compute_loss", names_in(model))
            return super().compute_loss(model, *args, **kwargs)

        def training_step(self, model, *args, **kwargs):
            loss = super().training_step(model, *args, **kwargs)
            seen.setdefault("training_step", names_in(model))
            return loss

        def prediction_step(self, model, *args, **kwargs):
            seen.setdefault("prediction_step", names_in(model))
            return super().prediction_step(model, *args, **kwargs)

        def evaluate(self, *args, **kwargs):
            seen.setdefault("evaluate", names_in(self.model))
            return super().evaluate(*args, **kwargs)

        def log(self, *args, **kwargs):
            seen.setdefault("log", names_in(self.model))
            super().log(*args, **kwargs)

        def create_optimizer(self, *args, **kwargs):
            seen.setdefault("create_optimizer", names_in(self.model))
            return super().create_optimizer(*args, **kwargs)

    class Look(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            seen.setdefault("on_train_begin", names_in(model))

        def on_step_end(self, args, state, control, model=None, **kwargs):
            seen.setdefault("on_step_end", names_in(model))

        def on_prediction_step(self, args, state, control, model=None, **kwargs):
            seen.setdefault("on_prediction_step", names_in(model))

    plain = names_in(tiny_model)
    settings = {
        "callbacks": [Look()],
        "evaluate": DATA[:4],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 1,
    }
    trainer_of(tiny_model, tmp_path, trainer_class=with_caft(Looks), **ours, **settings).train()
    assert {place for place, found in seen.items() if found == plain} == METHODS | EVENTS
    loop = [set(names) for names in seen["create_optimizer"][:3]]
    assert all(any("caft" in name for name in names) for names in loop)
    assert not hasattr(tiny_model, MODULE_NAME)


class KeepsCopies(Trainer):
    """Copies the model, or a part of it, wherever a user may: for an average of weights or as a
    teacher."""

    def compute_loss(self, model, *args, **kwargs):
        self.copies.setdefault("compute_loss", copy.deepcopy(model))
        return super().compute_loss(model, *args, **kwargs)

    def training_step(self, model, *args, **kwargs):
        loss = super().training_step(model, *args, **kwargs)
        self.copies.setdefault("training_step", copy.deepcopy(model))
        return loss


class CopyIn(TrainerCallback):
    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.copies.setdefault("on_step_begin", copy.deepcopy(model))
        self.copies.setdefault("average", torch.optim.swa_utils.AveragedModel(model).module)
        if "saved" not in self.copies and saved_how(model) == "whole":
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            self.copies["saved"] = torch.load(file, weights_only=False)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.copies.setdefault("on_step_end", copy.deepcopy(model))
        for average, own in zip(
            self.copies["average"].parameters(), model.parameters(), strict=True
        ):
            average.data.lerp_(own.data, 0.5)


BOTH = {"caft": {"num_heads": 2}, "meap": {"mode": "pretrain", "mask_token": "add"}}


@pytest.mark.parametrize("ours", [{"caft": {}}, BOTH], ids=["caft", "both"])
@pytest.mark.parametrize("base", ["full", "lora"])
def test_copies_made_in_mid_training_are_those_of_a_plain_run(tiny_model, tmp_path, base, ours):
    """They have its parts and nothing of ours, can be pickled and saved, and a second trainer takes
    them."""
    found = []
    for trainer_class, more in ((KeepsCopies, {}), (with_caft(KeepsCopies), ours)):
        model = copy.deepcopy(tiny_model)
        keep = CopyIn()
        trainer = trainer_of(
            lora(model) if base == "lora" else model,
            tmp_path,
            trainer_class=trainer_class,
            callbacks=[keep],
            max_steps=2,
            **more,
        )
        trainer.copies = keep.copies = {}
        trainer.train()
        assert len(losses(trainer)) == 2
        found.append(
            {place: (anatomy(made), saved_how(made)) for place, made in keep.copies.items()}
        )
    assert found[0] == found[1] and len(found[0]) == 5 + ("saved" in found[0])
    made = keep.copies["on_step_end"]
    trainer_of(made, tmp_path / "second", caft={"num_heads": 2}, max_steps=1).train()


def test_a_copy_of_a_part_has_nothing_of_ours(tiny_model, tmp_path):
    parts = {}

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            parts["trunk"] = copy.deepcopy(model.model)
            parts["layers"] = copy.deepcopy(model.model.layers)
            parts["norm"] = copy.deepcopy(model.model.norm)

    wanted = copy.deepcopy(tiny_model.model)
    trainer_of(tiny_model, tmp_path, caft={}, callbacks=[Copies()], max_steps=1).train()
    for part, whole in zip(parts.values(), (wanted, wanted.layers, wanted.norm), strict=True):
        for made, plain in zip(part.modules(), whole.modules(), strict=True):
            assert (
                type(made) is type(plain)
                and not made._forward_hooks
                and "__deepcopy__" not in vars(made)
            )


def test_a_sharded_save_in_mid_training_is_the_plain_one(tiny_model, tmp_path):
    """Keys, shapes, config and the counts in the index."""

    class Save(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.save_pretrained(f"{args.output_dir}/mid", max_shard_size="20KB")

    for name, trainer_class in (("plain", Trainer), ("ours", CAFTTrainer)):
        model = copy.deepcopy(tiny_model)
        trainer_of(
            model, tmp_path / name, {}, trainer_class, callbacks=[Save()], max_steps=1
        ).train()

    def content(folder):
        tensors = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                tensors |= {key: opened.get_slice(key).get_shape() for key in opened.keys()}
        texts = {file.name: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
        return tensors, texts

    plain, ours = (content(tmp_path / name / "mid") for name in ("plain", "ours"))
    assert (
        ours == plain and "total_parameters" in ours[1]["model.safetensors.index.json"]["metadata"]
    )


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize(
    "name", ["layers.2", "layers.2.mlp", "norm", "lm_head", "layers.1", "embed_tokens"]
)
def test_a_users_hooks_see_what_they_see_without_heads(tiny_model, tmp_path, name, drop):
    """Forward hooks: as often and the same tensors; backward hooks: as often. `drop` is that of a
    LoRA."""
    runs = []
    for trainer_class in (Trainer, CAFTTrainer):
        model = copy.deepcopy(tiny_model)
        module = model.lm_head if name == "lm_head" else model.model.get_submodule(name)
        before, after, backward = [], [], []
        if drop:
            torch.manual_seed(0)
            model = get_peft_model(
                model, LoraConfig(r=2, lora_dropout=drop, target_modules=["lm_head", "up_proj"])
            )
            module = model.get_submodule(
                next(n for n, _ in model.named_modules() if n.endswith(name))
            )
        module.register_forward_pre_hook(
            lambda module, args, before=before: before.append(args[0].clone())
        )
        module.register_forward_hook(
            lambda module, args, output, after=after: after.append(output.clone())
        )
        module.register_full_backward_hook(
            lambda module, given, made, backward=backward: backward.append(made)
        )
        caft = {"num_heads": 2, "train_heads": "frozen"}
        trainer_of(model, tmp_path, caft, trainer_class, max_steps=1, learning_rate=0.0).train()
        runs.append((before, after, len(backward)))
    assert runs[0][2] == runs[1][2] and len(runs[0][1]) == len(runs[1][1]) == 1
    for kind in (0, 1):
        for a, b in zip(runs[0][kind], runs[1][kind], strict=True):
            assert torch.equal(a, b)


def test_flops_are_counted_without_heads(tiny_model, tmp_path):
    """The Trainer counts them from the model's number of parameters."""
    counts = []
    for trainer_class in (Trainer, CAFTTrainer):
        trainer = trainer_of(copy.deepcopy(tiny_model), tmp_path, {}, trainer_class)
        trainer.train()
        counts.append(trainer.state.total_flos)
    assert counts[0] == counts[1] > 0


def test_the_trainer_goes_on_with_its_heads(tiny_model, tmp_path):
    """Two calls of train() with a save, an evaluation and a deepcopy between them are as without
    these."""
    runs = []
    for between in (False, True):
        trainer = trainer_of(
            copy.deepcopy(tiny_model),
            tmp_path,
            {"num_heads": 2, "beta": 0.5},
            evaluate=DATA[:4],
            max_steps=2,
        )
        trainer.train()
        if between:
            copy.deepcopy(trainer.model)
            trainer.evaluate()
            trainer.save_model()
        trainer.train()
        runs.append((losses(trainer), trainer.caft_parts.caft.heads.state_dict()))
    for key in ("loss", "grad_norm", "caft/loss_head_1", "caft/loss_head_2"):
        assert [e[key] for e in runs[0][0]] == [e[key] for e in runs[1][0]], key
    assert all(torch.equal(runs[0][1][name], tensor) for name, tensor in runs[1][1].items())


def test_trainers_take_turns_on_one_model(tiny_model, tmp_path):
    """A second trainer, then a plain one, on the model that came out: as on one read from disk."""
    first = trainer_of(tiny_model, tmp_path / "first", {"num_heads": 2})
    first.train()
    first.save_model()
    results = []
    for model in (first.model, LlamaForCausalLM.from_pretrained(tmp_path / "first")):
        second = trainer_of(model, tmp_path / "second", {"num_heads": 3}, data=DATA[:8])
        second.train()
        plain = trainer_of(model, tmp_path / "plain", trainer_class=Trainer, data=DATA[8:])
        plain.train()
        results.append([[(e["loss"], e["grad_norm"]) for e in losses(t)] for t in (second, plain)])
        assert plain.get_num_trainable_parameters() == model.num_parameters()
    assert results[0] == results[1]


@pytest.mark.parametrize("how", ["train", "evaluate", "construct"])
def test_a_second_attach_is_refused_by_name(tiny_model, tmp_path, how):
    plain = copy.deepcopy(tiny_model)
    trainer_of(plain, tmp_path, trainer_class=Trainer).train()
    other = trainer_of(tiny_model, tmp_path / "other", {}, evaluate=DATA[:2])

    class Meddle(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(ConfigError, match="LlamaForCausalLM is in use by another trainer"):
                (
                    trainer_of(tiny_model, tmp_path, {})
                    if how == "construct"
                    else getattr(other, how)()
                )

    trainer = trainer_of(tiny_model, tmp_path, {}, callbacks=[Meddle()])
    trainer.train()
    assert len(losses(trainer)) == 3 and anatomy(tiny_model) == anatomy(plain)


# -- optimizers ------------------------------------------------------------------------------------


def test_an_optimizer_made_by_hand_holds_the_heads(tiny_model, tmp_path):
    trainer = trainer_of(tiny_model, tmp_path, {"beta": 0.5})
    trainer.create_optimizer_and_scheduler(num_training_steps=3)
    before = [p.detach().clone() for p in trainer.caft_parts.caft.heads.parameters()]
    trainer.train()
    assert not any(
        torch.equal(a, b)
        for a, b in zip(before, trainer.caft_parts.caft.heads.parameters(), strict=True)
    )


def test_an_optimizer_without_the_heads_is_refused(tiny_model, tmp_path):
    class Own(Trainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.model.lm_head.parameters(), lr=0.1)
            return self.optimizer

    trainer = CAFTTrainer(
        model=tiny_model, args=arguments(tmp_path), train_dataset=DATA, data_collator=pad, caft={}
    )
    trainer.optimizer = torch.optim.SGD(tiny_model.parameters(), lr=0.1)  # given after construction
    for late in (
        trainer_of(
            copy.deepcopy(tiny_model), tmp_path, {}, type("CAFTOwn", (CAFTTrainer, Own), {})
        ),
        trainer,
    ):
        with pytest.raises(
            ConfigError, match=r"the optimizer SGD of \w+ lacks 36 of the 36 tensors that caft"
        ):
            late.train()
    frozen = trainer_of(
        tiny_model, tmp_path, {"train_heads": "frozen"}, type("CAFTOwn", (CAFTTrainer, Own), {})
    )
    frozen.train()
