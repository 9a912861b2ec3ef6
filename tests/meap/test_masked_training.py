"""MEAP on the plain transformers Trainer: what is logged, counted, evaluated, resumed and saved."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader, IterableDataset, Subset
from transformers import PreTrainedTokenizerFast, Trainer

from builders.masked import MASK, ROWS, Batches, duplication, pad, trainer_of
from builders.runs import CAFTTrainer, arguments, losses
from builders.tiny import word_tokenizer
from caft_plugin import ConfigError, MEAPConfig, with_caft
from caft_plugin.caft.window import Window
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.doubling import DoubledSet
from caft_plugin.meap.mask_token import FILE
from caft_plugin.targets import IGNORE, PLAN

pytestmark = pytest.mark.newest

LONG = sum(len(row["input_ids"]) > 54 for row in ROWS)  # answers of more than 50 tokens: 5 of 8


@pytest.fixture
def model(tiny_config):
    from transformers import LlamaForCausalLM

    tiny_config.max_position_embeddings = 256
    return LlamaForCausalLM(tiny_config)


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_logs_and_steps(model, tmp_path, layout, caplog):
    trainer = trainer_of(model, tmp_path, meap={"layout": layout}, per_device_train_batch_size=4)
    assert [r.getMessage() for r in caplog.records if "mask_token" in r.getMessage()] == [
        "meap.mask_token: 'w91' (id 96), as configured"
    ]
    seen = Batches(model)
    trainer.train()
    rows = 8 if layout == "concat" else 8 + LONG
    assert trainer.state.max_steps == 2 * -(-rows // 4)
    assert len(seen.train) == trainer.state.max_steps
    assert all(PLAN not in batch["keys"] for batch in seen.train)
    masked = sum((batch["input_ids"] == MASK).sum().item() for batch in seen.train)
    assert masked == 2 * sum(
        len(row["input_ids"][3:-1]) // 10 for row in ROWS if len(row["input_ids"]) > 54
    )
    logs = losses(trainer)
    assert sum(entry["meap/examples_masked"] for entry in logs) == 2 * LONG
    assert all(
        0.08 < entry["meap/masked_fraction"] <= 0.1
        for entry in logs
        if entry["meap/examples_masked"]
    )
    assert all("meap/masked_fraction" in entry for entry in logs if entry["meap/examples_masked"])
    assert all(entry["meap/examples_too_long"] == 0 for entry in logs)
    assert trainer.data_collator is pad


def test_it_is_training_on_rows_doubled_by_hand(model, tmp_path):
    """Same steps, same schedules of gamma and of the learning rate, and where nothing is masked the
    same losses."""
    by_hand = [
        {k: v * 2 for k, v in row.items()} if len(row["input_ids"]) > 54 else row for row in ROWS
    ]
    settings = {
        "caft": {},
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "per_device_train_batch_size": 2,
    }
    plain = trainer_of(copy.deepcopy(model), tmp_path, data=by_hand, **settings)
    ours = trainer_of(copy.deepcopy(model), tmp_path, meap={}, **settings)
    plain.train(), ours.train()
    assert plain.state.max_steps == ours.state.max_steps
    for key in ("caft/gamma", "learning_rate", "epoch"):
        assert [entry[key] for entry in losses(plain)] == [entry[key] for entry in losses(ours)]
    nothing = trainer_of(copy.deepcopy(model), tmp_path, meap={"min_answer_tokens": 1000})
    without = trainer_of(copy.deepcopy(model), tmp_path)
    nothing.train(), without.train()
    assert [entry["loss"] for entry in losses(nothing)] == [
        entry["loss"] for entry in losses(without)
    ]


def test_masks_are_new_every_epoch_and_the_same_with_workers(model, tmp_path):
    def masks(**settings):
        trainer = trainer_of(copy.deepcopy(model), tmp_path, meap={}, **settings)
        seen = Batches(trainer.model)
        trainer.train()
        return [batch["input_ids"] for batch in seen.train]

    plain = masks(per_device_train_batch_size=2, train_sampling_strategy="sequential")
    first, second = (
        torch.cat([p.flatten() for p in plain[:4]]),
        torch.cat([p.flatten() for p in plain[4:]]),
    )
    assert (first == MASK).sum() == (second == MASK).sum() > 0
    assert not torch.equal(first == MASK, second == MASK)
    for persistent in (False, True):
        settings = {"dataloader_num_workers": 2, "dataloader_persistent_workers": persistent}
        with_workers = masks(
            per_device_train_batch_size=2, train_sampling_strategy="sequential", **settings
        )
        assert all(torch.equal(a, b) for a, b in zip(plain, with_workers, strict=True))


def test_evaluation_is_never_masked(model, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    ours = trainer_of(model, tmp_path, meap={}, evaluate=ROWS, **settings)
    seen = Batches(model)
    ours.train()
    assert len(seen.evaluation) == 2 and len(seen.train) == 2
    for batch in seen.evaluation:
        assert not (batch["input_ids"] == MASK).any() and batch["labels"].min() == IGNORE
        assert batch["input_ids"].shape[1] < 66
    plain = trainer_of(model, tmp_path, evaluate=ROWS)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert not any(
        "meap" in key for entry in ours.state.log_history for key in entry if key.startswith("eval")
    )


@pytest.mark.parametrize("mask_token", [MASK, "add"])
def test_a_resumed_run_logs_the_same_digits(model, tmp_path, mask_token):
    """Stopped in the middle of the second epoch."""
    settings = {"save_strategy": "steps", "save_steps": 3, "meap": {"mask_token": mask_token}}
    settings["caft"] = {"beta": 0.5, "heads_per_step": 1}
    whole = trainer_of(copy.deepcopy(model), tmp_path / "a", **settings)
    whole.train()
    assert whole.state.max_steps == 4
    resumed = trainer_of(copy.deepcopy(model), tmp_path / "b", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    keys = losses(whole)[-1].keys() - {"epoch"}
    assert {k: losses(whole)[-1][k] for k in keys} == {k: losses(resumed)[-1][k] for k in keys}


@pytest.mark.parametrize("lora", [False, True])
def test_add_leaves_the_saved_model_as_it_was(model, tmp_path, lora):
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    plain = trainer_of(copy.deepcopy(model), tmp_path / "plain", save_strategy="no")
    plain.train(), plain.save_model()
    ours = trainer_of(model, tmp_path / "ours", meap={"mask_token": "add"})
    before = ours.caft_parts.meap.handle.vector.detach().clone()
    ours.train(), ours.save_model()
    assert torch.equal(before, ours.caft_parts.meap.handle.vector) == lora
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    shapes = [
        {k: v.shape for k, v in load_file(tmp_path / run / name).items()}
        for run in ("plain", "ours")
    ]
    assert shapes[0] == shapes[1]
    assert torch.equal(
        load_file(tmp_path / "ours" / FILE)["vector"], ours.caft_parts.meap.handle.vector
    )
    ours.caft_parts.remove()
    assert "prepare" not in vars(ours.accelerator)
    assert not any("caft" in key for key in dict(ours.model.named_modules()))


def tokenizer_with(kind):
    """A tokenizer for 97 embedding rows in which `auto` finds a mask token of this kind."""
    words = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(92))]
    words += {
        "reserved": ["<unused0>", "w92"],
        "a spare row": [],
        "special": ["<extra>", "w92"],
    }.get(kind, ["w92", "w93"])
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        ),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **({"mask_token": "w93"} if kind == "its own" else {}),
    )
    if kind == "special":
        made.add_special_tokens({"additional_special_tokens": ["<extra>"]})
    return made


KINDS = {
    "its own": "mask token",
    "reserved": "a reserved token",
    "a spare row": "embedding rows",
    "special": "neither in the chat",
}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "add"])
def test_no_mask_token_changes_the_models_shape(model, tmp_path, caplog, kind, lora):
    base = {key: tensor.shape for key, tensor in model.state_dict().items()}
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    trainer = trainer_of(
        model,
        tmp_path,
        meap={"mask_token": "add" if kind == "add" else "auto"},
        processing_class=tokenizer_with(kind),
        max_steps=2,
    )
    assert KINDS.get(kind, "added: id 97") in caplog.text
    trainer.train(), trainer.save_model()
    assert sum(entry["meap/examples_masked"] for entry in losses(trainer)) > 0
    if lora:
        trainer.caft_parts.remove()
        merged = trainer.model.merge_and_unload()
        merged.save_pretrained(tmp_path)
    saved = {key: tensor.shape for key, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert saved == base


def test_pretraining_masks_without_touching_the_data(model, tmp_path):
    rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    trainer = trainer_of(model, tmp_path, meap={"mode": "pretrain"}, data=rows)
    seen = Batches(model)
    trainer.train()
    assert len(trainer.train_dataset) == len(ROWS)
    lengths = [len(row["input_ids"]) for row in ROWS]
    masked = sum((batch["input_ids"] == MASK).sum().item() for batch in seen.train)
    assert masked == 2 * sum(int(length * 0.15) for length in lengths)
    labels = sum((batch["labels"] != IGNORE).sum().item() for batch in seen.train)
    assert labels == 2 * sum(lengths)
    assert sum(entry["meap/examples_masked"] for entry in losses(trainer)) == 2 * len(ROWS)


def test_pairs_too_long_for_the_model(model, tmp_path):
    model.config.max_position_embeddings = 120
    trainer = trainer_of(model, tmp_path, meap={}, num_train_epochs=1)
    trainer.train()
    too_long = sum(2 * len(row["input_ids"]) > 120 for row in ROWS)
    assert sum(entry["meap/examples_too_long"] for entry in losses(trainer)) == too_long > 0
    assert sum(entry["meap/examples_masked"] for entry in losses(trainer)) == LONG - too_long > 0


@pytest.mark.parametrize("column", ["length", "tokens"])
def test_the_column_of_lengths_counts_the_pair(model, tmp_path, column):
    """Whatever the host calls it: rows are grouped by it."""
    data = Dataset.from_list([{**row, column: len(row["input_ids"])} for row in ROWS])
    settings = {
        "length_column_name": column,
        "train_sampling_strategy": "group_by_length",
        "max_steps": 2,
    }
    trainer = trainer_of(model, tmp_path, meap={}, data=data, **settings)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    assert list(trainer.train_dataset[column]) == lengths != list(data[column])
    trainer.train()


def test_caft_and_meap_together(model, tmp_path, monkeypatch):
    """Heads' losses are means over what a plain computation says their targets are."""
    trainer = trainer_of(
        model, tmp_path, meap={}, caft={"beta": 0.5, "num_heads": 2}, max_steps=1, data=ROWS[:4]
    )
    seen = Batches(model)
    windows = []
    open_window = Window.open
    monkeypatch.setattr(
        Window,
        "open",
        lambda *args, **more: windows.append(open_window(*args, **more)) or windows[-1],
    )
    trainer.train()
    counts = [0, 0]
    (batch,) = seen.train
    rows = [row["input_ids"] for row in ROWS[:4]]
    for ids, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        start = next(len(r) for r in rows if ids[: len(r)] == r)
        for k in (1, 2):
            for part in (labels[:start], labels[start : 2 * start]):
                counts[k - 1] += sum(label != IGNORE for label in part[k + 1 :])
    assert windows[0].counts.tolist() == counts
    entry = losses(trainer)[0]
    assert entry["loss"] == pytest.approx(
        entry["caft/next_token_loss"] + entry["caft/aux_loss"], rel=1e-6
    )
    assert {"caft/loss_head_2", "meap/masked_fraction"} <= entry.keys()


def test_what_cannot_work_is_said(model, tmp_path):
    def make(**changes):
        settings = {
            "model": model,
            "args": arguments(tmp_path),
            "train_dataset": ROWS,
            "data_collator": pad,
            "processing_class": word_tokenizer(""),
            "meap": {"mask_token": MASK},
        }
        return CAFTTrainer(**{**settings, **changes})

    with pytest.raises(ConfigError, match="no tokenizer.*Pass processing_class=tokenizer"):
        make(processing_class=None)
    with pytest.raises(ConfigError, match="the training data contains it"):
        make(meap={"mask_token": ROWS[0]["input_ids"][0]})
    finished = (torch.optim.SGD(model.parameters()), None)
    with pytest.raises(
        ConfigError, match="got add, but the trainer was given a finished optimizer"
    ):
        make(meap={"mask_token": "add"}, optimizers=finished)
    assert not any("caft" in name for name, _ in model.named_modules())
    with pytest.raises(ConfigError, match="meap: got 3, but it accepts settings by name"):
        make(meap=3)

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    with pytest.raises(ConfigError, match="is a Stream, a stream that cannot be doubled"):
        make(train_dataset=Stream())
    assert make(train_dataset=None, meap=MEAPConfig(mask_token=MASK)).train_dataset is None


def said(caplog):
    return [
        r.getMessage()
        for r in caplog.records
        if r.name == "caft_plugin.meap.masking" or "masked copy" in r.getMessage()
    ]


@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_a_run_in_which_nothing_can_be_masked_says_so_once(model, tmp_path, caplog, kind):
    short = trainer_of(model, tmp_path, meap={"min_answer_tokens": 1000}, data=kind(ROWS))
    assert (
        len(said(caplog)) == 1
        and "none of the 8 training rows has a masked copy" in said(caplog)[0]
    )
    short.train()
    assert len(said(caplog)) == 1 and not short.caft_parts.meap.collator.masked
    caplog.clear()
    model.config.max_position_embeddings = 100
    trainer_of(model, tmp_path, meap={}, data=kind(ROWS)).train()
    assert len(said(caplog)) == 1 and f"{LONG} examples are too long for a pair" in said(caplog)[0]
    caplog.clear()
    model.config.max_position_embeddings = 256
    for meap in ({}, {"layout": "separate"}, {"mode": "pretrain"}):
        trainer_of(model, tmp_path, meap=meap, data=kind(ROWS)).train()
    assert said(caplog) == []


def test_what_only_training_can_show_is_said_at_its_end(model, tmp_path, caplog):
    from datasets import IterableDataset as Stream

    stream = Stream.from_generator(lambda: iter(ROWS))
    trainer_of(model, tmp_path, meap={"min_answer_tokens": 1000}, data=stream, max_steps=2).train()
    assert len(said(caplog)) == 1 and "no token was masked in 2 steps" in said(caplog)[0]
    caplog.clear()
    ones = [{"input_ids": [7], "labels": [7]}] * 8
    trainer_of(model, tmp_path, meap={"mode": "pretrain"}, data=ones, max_steps=1).train()
    assert len(said(caplog)) == 1 and "No document had two tokens of text" in said(caplog)[0]
    caplog.clear()
    masked = trainer_of(model, tmp_path, meap={}, data=stream, max_steps=2)
    assert not masked.caft_parts.meap.collator.masked
    masked.train()
    assert said(caplog) == [] and masked.caft_parts.meap.collator.masked


def test_a_set_in_which_nothing_is_masked_does_not_answer_for_the_next_one(model, tmp_path, caplog):
    from datasets import IterableDataset as Stream

    trainer = trainer_of(model, tmp_path, meap={"min_answer_tokens": 1000}, max_steps=2)
    assert len(said(caplog)) == 1 and "none of the 8 training rows" in said(caplog)[0]
    trainer.train_dataset = Stream.from_generator(lambda: iter(ROWS))
    trainer.train()
    assert len(said(caplog)) == 2 and "no token was masked in 2 steps" in said(caplog)[1]


def test_the_set_without_copies_belongs_to_one_doubled_set():
    data = DoubledSet(MEAPConfig())
    doubled = data.double(
        ROWS, word_tokenizer(""), BaseModel(), finish=lambda rows: [*rows, "the host's"]
    )
    assert len(doubled) == len(ROWS) + 1 and data.current is doubled
    data.use(doubled)
    assert data.as_evaluated(doubled) == [*ROWS, "the host's"]
    assert data.as_evaluated(ROWS) is ROWS
    other = list(doubled)
    data.use(other)
    assert data.as_evaluated(other) is other


class OwnLoader(Trainer):
    """A trainer with a data loader of its own, as the recipes for weighted sampling have it."""

    def get_train_dataloader(self):
        collate = {"own": pad, "late": lambda rows: self.data_collator(rows)}.get(
            self.how, self.data_collator
        )
        if self.how == "drops keys":
            ours = self.data_collator
            collate = lambda rows: {key: ours(rows)[key] for key in ("input_ids", "labels")}  # noqa: E731
        return DataLoader(self.train_dataset, batch_size=4, collate_fn=collate)


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
@pytest.mark.parametrize("how", ["own", "late", "drops keys", "the trainer's"])
def test_a_data_loader_of_the_users(model, tmp_path, how, mode):
    trainer = with_caft(OwnLoader)(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=ROWS,
        data_collator=pad,
        processing_class=word_tokenizer(""),
        meap={"mask_token": MASK, "mode": mode},
    )
    trainer.how = how
    if how == "the trainer's":
        seen = Batches(model)
        trainer.train()
        assert sum(entry["meap/examples_masked"] for entry in losses(trainer)) > 0
        assert any((batch["input_ids"] == MASK).any() for batch in seen.train)
        return
    with pytest.raises(
        ConfigError,
        match=r"batch of CAFTOwnLoader was not masked.*'input_ids'.*self.data_collator as",
    ):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("layout", ["concat", "separate"])
@pytest.mark.parametrize("kind", [list, Dataset.from_list])
def test_evaluating_the_training_set_is_evaluating_it_plainly(model, tmp_path, kind, layout):
    settings = {"per_device_eval_batch_size": 3, "label_names": ["labels"]}
    plain = trainer_of(model, tmp_path, data=kind(ROWS), **settings)
    ours = trainer_of(model, tmp_path, meap={"layout": layout}, data=kind(ROWS), **settings)
    wanted = plain.evaluate(plain.train_dataset)["eval_loss"]
    for evaluate in (
        lambda: ours.evaluate(ours.train_dataset),
        lambda: ours.evaluate({"train": ours.train_dataset}),
    ):
        seen = Batches(model)
        metrics = evaluate()
        assert metrics.get("eval_loss", metrics.get("eval_train_loss")) == wanted
        assert [row.tolist() for b in seen.evaluation for row in b["labels"]] == [
            row.tolist()
            for b in plain.get_eval_dataloader(plain.train_dataset)
            for row in b["labels"]
        ]
    assert ours.predict(ours.train_dataset).metrics["test_loss"] == wanted
    ours.train()
    assert sum(entry["meap/examples_masked"] for entry in losses(ours)) == 2 * LONG


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_evaluating_a_part_of_the_training_set(model, tmp_path, layout):
    """One example at a time, so that the mean over batches is over examples, and each copy counts
    as its example."""
    settings = {"per_device_eval_batch_size": 1}
    plain = trainer_of(model, tmp_path, **settings)
    ours = trainer_of(
        model, tmp_path, meap={"layout": layout}, data=Dataset.from_list(ROWS), **settings
    )
    of_rows = [plain.evaluate([row])["eval_loss"] for row in ROWS]
    indices = {"concat": [0, 1, 2], "separate": [0, 0, 1, 2, 2]}[layout]
    wanted = np.mean([of_rows[i] for i in indices])
    for part in (
        ours.train_dataset.select(range(len(indices))),
        Subset(ours.train_dataset, range(len(indices))),
    ):
        assert ours.evaluate(part)["eval_loss"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
@pytest.mark.parametrize("before", [None, ROWS[:2]], ids=["none", "another"])
def test_a_training_set_that_is_set_later(model, tmp_path, before, mode):
    settings = {"max_steps": -1, "num_train_epochs": 2}
    at_once = trainer_of(copy.deepcopy(model), tmp_path, meap={"mode": mode}, **settings)
    later = trainer_of(copy.deepcopy(model), tmp_path, meap={"mode": mode}, data=before, **settings)
    later.train_dataset = ROWS
    at_once.train(), later.train()
    keys = ("loss", "meap/examples_masked")
    for key in keys:
        assert [entry[key] for entry in losses(at_once)] == [entry[key] for entry in losses(later)]
    assert (
        later.evaluate(later.train_dataset)["eval_loss"]
        == at_once.evaluate(at_once.train_dataset)["eval_loss"]
    )
    later.train_dataset = [{"input_ids": [5, MASK, 7], "labels": [5, MASK, 7]}]
    with pytest.raises(
        ConfigError, match="meap.mask_token: got 96, which chose id 96 before this training"
    ):
        later.train()


def test_masks_are_asked_for_once(model, tmp_path):
    trainer = trainer_of(model, tmp_path, meap={})
    with pytest.raises(ConfigError, match="already draws masks"):
        trainer.caft_parts.attach_meap(MEAPConfig(mask_token=MASK))


def test_a_zero_vector_is_passed_over_or_warned_of(model, tmp_path, caplog):
    """Of two reserved tokens the first was never trained; the model's first norm would blow its
    gradients up."""
    words = ["<pad>", "</s>", "<unk>", "<unused0>", "<unused1>", *(f"w{i}" for i in range(92))]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(
            WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
        ),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    with torch.no_grad():
        model.get_input_embeddings().weight[3] = 0.0
    chosen = trainer_of(model, tmp_path, meap={"mask_token": "auto"}, processing_class=tokenizer)
    assert chosen.caft_parts.meap.collator.mask_id == 4 and "untrained" not in caplog.text
    named = trainer_of(
        model, tmp_path, meap={"mask_token": "<unused0>"}, processing_class=tokenizer
    )
    assert (
        named.caft_parts.meap.collator.mask_id == 3
        and "its input vector is untrained: its norm is 0" in caplog.text
    )


class PreparesItself(Trainer):
    """A trainer with a method that TRL's has too, with parameters of its own."""

    def __init__(self, *args, train_dataset=None, **kwargs):
        super().__init__(*args, train_dataset=self._prepare_dataset(train_dataset), **kwargs)

    def _prepare_dataset(self, dataset):
        return [row for row in dataset if len(row["input_ids"]) > 20]

    def get_eval_dataloader(self):
        return super().get_eval_dataloader(self.eval_dataset)


@pytest.mark.parametrize(
    "more", [{}, {"caft": {"num_heads": 1}}, {"meap": {"mask_token": MASK}}], ids=str
)
def test_a_host_with_methods_of_its_own(model, tmp_path, more):
    trainer = with_caft(PreparesItself)(
        model=model,
        args=arguments(tmp_path, max_steps=1),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        data_collator=pad,
        processing_class=word_tokenizer(""),
        **more,
    )
    trainer.train()
    assert len(trainer.train_dataset) == 7 and len(trainer.get_eval_dataloader()) == 1


def test_a_stream_of_datasets(model, tmp_path):
    from datasets import IterableDataset as Stream

    rows = Stream.from_generator(lambda: iter(ROWS))
    trainer = trainer_of(
        model, tmp_path, meap={}, data=rows, max_steps=2, per_device_train_batch_size=4
    )
    seen = Batches(model)
    trainer.train()
    wanted = [row["input_ids"] for r in ROWS for row in duplication(max_length=256)(r)]
    got = [ids for batch in seen.train for ids in batch["input_ids"]]
    for ids, mine in zip(wanted, got, strict=True):
        same = np.array(ids) == mine[: len(ids)].numpy()
        assert (~same).sum() == (mine == MASK).sum()
