"""MEAP on the real SFTTrainer of whichever TRL is installed: plain, packed and flattened, alone and
with CAFT."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

from builders.sft import CHATS, COMPLETIONS, FEATURES, TEMPLATE, make, model_of, run
from builders.tiny import word_tokenizer
from caft_plugin import ConfigError
from caft_plugin.targets import IGNORE, PLAN
from caft_plugin.trl import CAFTSFTTrainer

pytestmark = pytest.mark.newest

MASK = 95  # w90, in no row
MEAP = {"mask_token": MASK, "min_answer_tokens": 4}
ONE_BATCH = {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "max_steps": 1}
RUNS = (
    "conversational",
    "prompt and completion",
    "completion_only_loss off",
    "assistant_only_loss",
    "packing bfd",
    "packing bfd_split",
    "packing wrapped",
    "padding_free with max_length",
    "loss nll",
    "loss chunked_nll",
    "loss dft",
    "label smoothing nll",
    "compute_loss_func",
    "checkpointing",
    "LoRA",
)


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer(TEMPLATE)


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
@pytest.mark.parametrize("feature", RUNS)
def test_what_the_plain_trainer_runs_masked_training_runs(tokenizer, tmp_path, feature, mode):
    rows, settings, arguments = FEATURES[feature]
    try:
        run(SFTTrainer, tokenizer, tmp_path, rows, settings, arguments)
    except Exception as refused:
        with pytest.raises(type(refused)):
            run(
                CAFTSFTTrainer,
                tokenizer,
                tmp_path,
                rows,
                settings,
                {**arguments, "meap": MEAP},
                caft={"beta": 0.05},
            )
        return
    logs = run(
        CAFTSFTTrainer,
        tokenizer,
        tmp_path,
        rows,
        settings,
        {**arguments, "meap": {**MEAP, "mode": mode}},
        caft={},
    )
    assert sum(entry["meap/examples_masked"] for entry in logs) > 0
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)
    assert {"caft/loss_head_4", "mean_token_accuracy"} <= logs[
        0
    ].keys() or feature == "compute_loss_func"


@pytest.mark.parametrize("layout", ["concat", "separate"])
@pytest.mark.parametrize(
    "packing", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}]
)
def test_packed_pairs_give_what_padded_ones_give(tokenizer, tmp_path, packing, layout):
    """Masks and losses: neither original nor copy reaches into a neighbour. All rows in one
    step."""
    meap = {"meap": {**MEAP, "layout": layout}}
    padded = run(CAFTSFTTrainer, tokenizer, tmp_path, CHATS, ONE_BATCH, meap, caft={})[0]
    packed = run(
        CAFTSFTTrainer, tokenizer, tmp_path, CHATS, {**ONE_BATCH, **packing}, meap, caft={}
    )[0]
    for key in ("caft/next_token_loss", *(f"caft/loss_head_{k}" for k in range(1, 5))):
        assert packed[key] == pytest.approx(padded[key], rel=1e-5), key
    for key in ("meap/masked_fraction", "meap/examples_masked", "meap/examples_too_long"):
        assert packed[key] == padded[key]


def test_steps_are_those_of_a_set_doubled_by_hand(tokenizer, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1, "packing": True, "max_length": 48}
    plain = make(SFTTrainer, tokenizer, tmp_path, CHATS, {**settings, "packing": False})
    rows = [{k: row[k] * 2 for k in ("input_ids", "labels")} for row in plain.train_dataset]
    by_hand = make(SFTTrainer, tokenizer, tmp_path, rows, settings)
    ours = make(
        CAFTSFTTrainer,
        tokenizer,
        tmp_path,
        CHATS,
        settings,
        {"meap": {**MEAP, "min_answer_tokens": 1}},
    )
    assert len(ours.train_dataset) == len(by_hand.train_dataset)
    assert sorted(ours.train_dataset["seq_lengths"]) == sorted(by_hand.train_dataset["seq_lengths"])


def test_turns_of_a_conversation(tokenizer, tmp_path):
    """The rule goes by answer; roles, prompts and end tokens are never masked."""
    turns = [
        {"role": "user", "content": "w1 w2"},
        {"role": "assistant", "content": " ".join(f"w{i}" for i in range(10, 20))},
        {"role": "user", "content": "w3"},
        {"role": "assistant", "content": "w4 w5"},
        {"role": "user", "content": "w6"},
        {"role": "assistant", "content": " ".join(f"w{i}" for i in range(30, 60))},
    ]
    settings = {"assistant_only_loss": True, "max_length": 256, **ONE_BATCH}
    meap = {"meap": {**MEAP, "mask_ratio": 0.5}}
    trainer = make(CAFTSFTTrainer, tokenizer, tmp_path, [{"messages": turns}], settings, meap)
    (batch,) = list(trainer.get_train_dataloader())
    ids = tokenizer.apply_chat_template(turns)["input_ids"]
    assert batch["input_ids"][0][: len(ids)].tolist() == ids
    copy = batch["input_ids"][0][len(ids) :].tolist()
    replaced = {ids[i] - 5 for i, id_ in enumerate(copy) if id_ == MASK}
    assert len(replaced & set(range(10, 20))) == 5 and len(replaced & set(range(30, 60))) == 15
    assert len(replaced) == 20
    wanted = [ids[i] if id_ == MASK else IGNORE for i, id_ in enumerate(copy)]
    assert batch["labels"][0][len(ids) :].tolist() == wanted
    assert PLAN in batch
    (evaluation,) = list(trainer.get_eval_dataloader(trainer.train_dataset.select([])))[:1] or [{}]
    assert PLAN not in evaluation


def test_streamed_and_evaluated_data(tokenizer, tmp_path):
    model = model_of()
    shapes = []
    model.register_forward_pre_hook(
        lambda m, a, kwargs: shapes.append(
            (torch.is_grad_enabled(), (kwargs["input_ids"] == MASK).any().item())
        ),
        with_kwargs=True,
    )
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    arguments = {"meap": MEAP, "eval_dataset": Dataset.from_list(COMPLETIONS[10:16])}
    trainer = make(
        CAFTSFTTrainer, tokenizer, tmp_path, COMPLETIONS, settings, arguments, model=model
    )
    trainer.train()
    assert any(masked for training, masked in shapes if training)
    assert not any(masked for training, masked in shapes if not training)

    streamed = IterableDataset.from_generator(lambda: iter(COMPLETIONS))
    trainer = CAFTSFTTrainer(
        model=model_of(),
        args=trainer.args,
        train_dataset=streamed,
        eval_dataset=Dataset.from_list(COMPLETIONS[:4]),
        processing_class=tokenizer,
        meap=MEAP,
    )
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["meap/examples_masked"] > 0 for entry in logs)


@pytest.mark.parametrize("layout", ["concat", "separate"])
@pytest.mark.parametrize(
    "packing", [{}, {"packing": True, "max_length": 48}], ids=["rows", "packed"]
)
def test_evaluation_sets_are_what_the_plain_trainer_makes_of_them(
    tokenizer, tmp_path, packing, layout
):
    """Whatever they are called, the training set itself too: the same rows and the same digits."""
    sets = {"train": Dataset.from_list(CHATS[:6]), "test": Dataset.from_list(CHATS[6:12])}
    settings = {"max_length": 64, "shuffle_dataset": True, **packing}
    evaluated = []
    for trainer_class, meap in (
        (SFTTrainer, {}),
        (CAFTSFTTrainer, {"meap": {**MEAP, "layout": layout}}),
    ):
        trainer = make(
            trainer_class, tokenizer, tmp_path, CHATS, settings, {"eval_dataset": sets, **meap}
        )
        rows = {name: made[:] for name, made in trainer.eval_dataset.items()}
        calls = (
            None,
            trainer.train_dataset,
            {"train": trainer.train_dataset},
            {"train": sets["test"]},
        )
        metrics = [trainer.evaluate(*[] if given is None else [given]) for given in calls]
        metrics.append(trainer.predict(trainer.train_dataset).metrics)
        evaluated.append(
            (rows, [{k: v for k, v in m.items() if k.endswith("_loss")} for m in metrics])
        )
    assert evaluated[0] == evaluated[1]
    assert all(len(losses) in (1, 2) for losses in evaluated[0][1])
    trainer.train()
    assert sum(entry.get("meap/examples_masked", 0) for entry in trainer.state.log_history) > 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_copies_that_are_cut_to_nothing_are_dropped(tokenizer, tmp_path, mode, streamed):
    """As the plain trainer drops their originals: as many copies as there are originals stay."""
    rows = [
        {"input_ids": [5, 6, 7, 8, 9, 10], "labels": [IGNORE] * 4 + [9, 10]},
        {"input_ids": [11, 12, 13, 14], "labels": [IGNORE, 12, 13, 14]},
        {"input_ids": [15, 16, 17, 18, 19, 20], "labels": [IGNORE, 16, *[IGNORE] * 4]},
        {"input_ids": [21, 22, 23, 24, 25, 1], "labels": [IGNORE, IGNORE, IGNORE, 24, 25, 1]},
    ]
    kept = {"keep_start": {11, 15, 21}, "keep_end": {7, 11, 23}}[mode]
    made = Dataset.from_list(rows)
    trainer = CAFTSFTTrainer(
        model=model_of(),
        args=make(
            SFTTrainer, tokenizer, tmp_path, rows, {"max_length": 4, "truncation_mode": mode}
        ).args,
        train_dataset=made.to_iterable_dataset() if streamed else made,
        processing_class=tokenizer,
        meap={**MEAP, "layout": "separate", "min_answer_tokens": 1},
    )
    firsts = sorted(row["input_ids"][0] for row in trainer.train_dataset)
    assert firsts == sorted([*kept, *kept])
    assert all(any(label >= 0 for label in row["labels"]) for row in trainer.train_dataset)


def test_rows_that_are_made_when_they_are_read(tokenizer, tmp_path):
    """The way that TRL's own message names. Masks are drawn in them, or the mode that needs copies
    is refused."""

    def ready(batch):
        ids = [tokenizer(text)["input_ids"] for text in batch["text"]]
        return {"input_ids": ids, "labels": ids}

    rows = Dataset.from_list([{"text": " ".join(f"w{i + j}" for j in range(20))} for i in range(8)])
    for mode in ("sft", "pretrain"):
        trainer = functools.partial(
            CAFTSFTTrainer,
            model=model_of(),
            args=make(
                SFTTrainer,
                tokenizer,
                tmp_path,
                settings={
                    "dataset_kwargs": {"skip_prepare_dataset": True},
                    "remove_unused_columns": False,
                },
                rows=[{"input_ids": [5], "labels": [5]}],
            ).args,
            train_dataset=rows.with_transform(ready),
            processing_class=tokenizer,
            meap={**MEAP, "mode": mode},
        )
        if mode == "sft":
            with pytest.raises(
                ConfigError, match="meap.mode: got sft, but the training set makes its rows when"
            ):
                trainer()
            continue
        made = trainer()
        made.train()
        assert (
            sum(entry.get("meap/examples_masked", 0) for entry in made.state.log_history) == 4 * 3
        )


@pytest.mark.parametrize("how", ["model", "adapter", "name", "by position"])
@pytest.mark.parametrize(
    "settings", [{}, {"max_length": None}, {"packing": True, "max_length": 96}], ids=str
)
def test_pairs_fit_the_models_positions(tokenizer, tmp_path, how, settings):
    """A pair that would be longer is trained plainly and counted, whatever SFTTrainer's own limit
    is."""
    model = model_of(max_position_embeddings=30)
    if how == "adapter":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    elif how == "name":
        model.save_pretrained(tmp_path / "base")
        model = str(tmp_path / "base")
    args = SFTConfig(
        tmp_path / "run",
        use_cpu=True,
        bf16=False,
        report_to=[],
        logging_steps=1,
        **ONE_BATCH,
        **settings,
    )
    given = {"args": args, "train_dataset": Dataset.from_list(CHATS), "processing_class": tokenizer}
    given["meap"] = {**MEAP, "min_answer_tokens": 1}
    trainer = (
        CAFTSFTTrainer(model, **given)
        if how == "by position"
        else CAFTSFTTrainer(model=model, **given)
    )
    trainer.train()
    entry = trainer.state.log_history[0]
    assert entry["meap/examples_too_long"] > 0
    if "packing" not in settings:
        lengths = [len(row["input_ids"]) for row in trainer.caft_parts.meap.data.plain()]
        assert (
            entry["meap/examples_too_long"]
            == sum(2 * length > 30 for length in lengths)
            < len(CHATS)
        )
        assert max(map(len, trainer.train_dataset["input_ids"])) <= max(30, *lengths)
