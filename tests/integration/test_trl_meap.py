"""MEAP on the real SFTTrainer of whichever TRL is installed: plain, packed and flattened, alone and with CAFT."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")

from datasets import Dataset, IterableDataset
from test_trl import CHATS, COMPLETIONS, FEATURES, TEMPLATE, make, model_of, run
from tiny import word_tokenizer
from trl import SFTTrainer

from caft_plugin.loss import IGNORE, PLAN
from caft_plugin.trl import CAFTSFTTrainer

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
            run(CAFTSFTTrainer, tokenizer, tmp_path, rows, settings, {**arguments, "meap": MEAP}, caft={"beta": 0.05})
        return
    logs = run(
        CAFTSFTTrainer, tokenizer, tmp_path, rows, settings, {**arguments, "meap": {**MEAP, "mode": mode}}, caft={}
    )
    assert sum(entry["meap/examples_masked"] for entry in logs) > 0
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in logs)
    assert {"caft/loss_head_4", "mean_token_accuracy"} <= logs[0].keys() or feature == "compute_loss_func"


@pytest.mark.parametrize("layout", ["concat", "separate"])
@pytest.mark.parametrize("packing", [{"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}])
def test_packed_pairs_give_what_padded_ones_give(tokenizer, tmp_path, packing, layout):
    """Masks and losses: neither original nor copy reaches into a neighbour. All rows in one step."""
    meap = {"meap": {**MEAP, "layout": layout}}
    padded = run(CAFTSFTTrainer, tokenizer, tmp_path, CHATS, ONE_BATCH, meap, caft={})[0]
    packed = run(CAFTSFTTrainer, tokenizer, tmp_path, CHATS, {**ONE_BATCH, **packing}, meap, caft={})[0]
    for key in ("caft/next_token_loss", *(f"caft/loss_head_{k}" for k in range(1, 5))):
        assert packed[key] == pytest.approx(padded[key], rel=1e-5), key
    for key in ("meap/masked_fraction", "meap/examples_masked", "meap/examples_too_long"):
        assert packed[key] == padded[key]


def test_steps_are_those_of_a_set_doubled_by_hand(tokenizer, tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 1, "packing": True, "max_length": 48}
    plain = make(SFTTrainer, tokenizer, tmp_path, CHATS, {**settings, "packing": False})
    rows = [{k: row[k] * 2 for k in ("input_ids", "labels")} for row in plain.train_dataset]
    by_hand = make(SFTTrainer, tokenizer, tmp_path, rows, settings)
    ours = make(CAFTSFTTrainer, tokenizer, tmp_path, CHATS, settings, {"meap": {**MEAP, "min_answer_tokens": 1}})
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
        lambda m, a, kwargs: shapes.append((torch.is_grad_enabled(), (kwargs["input_ids"] == MASK).any().item())),
        with_kwargs=True,
    )
    settings = {"eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    arguments = {"meap": MEAP, "eval_dataset": Dataset.from_list(COMPLETIONS[10:16])}
    trainer = make(CAFTSFTTrainer, tokenizer, tmp_path, COMPLETIONS, settings, arguments, model=model)
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
