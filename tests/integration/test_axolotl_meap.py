"""MEAP through the real `axolotl`: plain, packed and flattened batches, chat, completion and
pretraining data."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow

MEAP = {"plugins": ["caft_plugin"], "meap": {"min_answer_tokens": 4}}
# all 40 rows in one step
ONE_STEP = {
    "micro_batch_size": 40,
    "gradient_accumulation_steps": 1,
    "max_steps": 1,
    "save_steps": 1,
}
EPOCH = {
    "max_steps": None,
    "num_epochs": 1,
    "save_strategy": "epoch",
    "save_steps": None,
    "lora_dropout": 0.0,
}


def counts(project, name, key):
    return sum(entry[f"meap/{key}"] for entry in project.logs(name))


def steps(project, name):
    newest = max(
        (project.folder / name).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
    )
    return json.loads((newest / "trainer_state.json").read_text())["max_steps"]


def test_with_caft_it_leaves_a_plain_adapter(project):
    """An answer counts 2 tokens a number ("1 2 3": 1, space, 2 ...), so every one of the 40 is
    masked."""
    out = project.train("meap", **{**MEAP, "caft": {"num_heads": 2}})
    for entry in project.logs("meap"):
        assert entry["meap/examples_masked"] == 4
        assert {"caft/loss_head_2", "caft/next_token_loss"} <= entry.keys()
        assert 0.05 < entry["meap/masked_fraction"] < 0.4
    assert not any("caft" in key for key in load_file(out / "adapter_model.safetensors"))


def test_packed_pairs_give_what_padded_ones_give(project):
    """The first row that multipack fills in order, against a padded batch of the same pairs."""
    in_order = {
        "curriculum_sampling": True,
        "shuffle_merged_datasets": False,
        "max_steps": 1,
        "save_steps": 1,
    }
    in_order |= {
        "gradient_accumulation_steps": 1,
        "caft": "bare",
        "dataset_prepared_path": "./prepared_in_order",
    }
    packing = {"sample_packing": True, "sample_packing_sequentially": True, "micro_batch_size": 4}
    project.train("meap_packed", **{**MEAP, **in_order, **packing})
    (packed,) = project.logs("meap_packed")
    pairs = int(packed["meap/examples_masked"])
    assert pairs > 4
    project.train("meap_padded", **{**MEAP, **in_order, "micro_batch_size": pairs})
    (padded,) = project.logs("meap_padded")
    assert padded["meap/examples_masked"] == pairs
    for key in (
        "meap/masked_fraction",
        "caft/next_token_loss",
        *(f"caft/loss_head_{k}" for k in range(1, 5)),
    ):
        assert packed[key] == pytest.approx(padded[key], rel=1e-5), key


def test_steps_are_those_of_a_doubled_set(project):
    """Through a prepared cache that a run without `meap:` has left, and one that `axolotl
    preprocess` has made."""
    project.train("epoch_plain", **EPOCH, dataset_prepared_path="./prepared_first")
    assert steps(project, "epoch_plain") == 10
    separate = {**MEAP, **EPOCH, "meap": {**MEAP["meap"], "layout": "separate"}}
    project.train("epoch_separate", **separate, dataset_prepared_path="./prepared_first")
    assert steps(project, "epoch_separate") == 20
    assert counts(project, "epoch_separate", "examples_masked") == 40

    project.config("epoch_preprocessed", **separate, dataset_prepared_path="./prepared_second")
    project.axolotl("preprocess", "epoch_preprocessed.yml")
    output = project.axolotl("train", "epoch_preprocessed.yml")
    assert "Loading prepared dataset from disk" in output.stdout + output.stderr
    assert steps(project, "epoch_preprocessed") == 20
    assert counts(project, "epoch_preprocessed", "examples_masked") == 40


def test_pairs_that_do_not_fit(project):
    project.train("meap_short", **{**MEAP, **ONE_STEP, "sequence_len": 90})
    (entry,) = project.logs("meap_short")
    assert entry["meap/examples_masked"] + entry["meap/examples_too_long"] == 40
    assert entry["meap/examples_too_long"] > 0 < entry["meap/examples_masked"]


def test_evaluation_is_the_hosts_own(project):
    held_out = {
        "val_set_size": 8,
        "eval_steps": 2,
        "eval_batch_size": 4,
        "lora_dropout": 0.0,
        "learning_rate": 0.0,
    }
    for name, more in (("evaluated_plain", {}), ("evaluated_meap", MEAP)):
        project.train(name, **{**held_out, **more, "dataset_prepared_path": "./prepared_evaluated"})
    evaluations = []
    for name in ("evaluated_plain", "evaluated_meap"):
        newest = max(
            (project.folder / name).glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1])
        )
        history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
        evaluations.append([entry["eval_loss"] for entry in history if "eval_loss" in entry])
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) > 1


@pytest.fixture
def texts(project):
    with open(project.folder / "texts.jsonl", "w") as file:
        for i in range(40):
            file.write(
                json.dumps({"text": f"Text {i}: " + " ".join(str(j) for j in range(i, i + 12))})
                + "\n"
            )
    return "./texts.jsonl"


def test_completion_data(project, texts):
    data = [{"path": texts, "ds_type": "json", "type": "completion"}]
    project.train(
        "meap_completion",
        **{**MEAP, **ONE_STEP, "datasets": data, "meap": {"min_answer_tokens": 5}},
    )
    (entry,) = project.logs("meap_completion")
    assert entry["meap/examples_masked"] == 40
    assert entry["meap/masked_fraction"] == pytest.approx(0.1, abs=0.03)


@pytest.mark.parametrize("packed", [False, True])
def test_pretraining_data(project, texts, packed):
    name = f"meap_pretraining_{packed}"
    project.train(
        name,
        **{
            **MEAP,
            "datasets": None,
            "pretraining_dataset": [
                {"path": "json", "data_files": texts, "split": "train", "type": "pretrain"}
            ],
            "meap": {"mode": "pretrain", "mask_token": "<|endoftext|>" if packed else "add"},
            "sample_packing": packed,
            "pretrain_multipack_attn": packed,
            "streaming_multipack_buffer_size": 40,
            "max_steps": 2,
            "save_steps": 2,
            "caft": {"num_heads": 1},
        },
    )
    for entry in project.logs(name):
        assert entry["meap/examples_masked"] >= 2  # documents, several in a row when packed
        assert entry["meap/masked_fraction"] == pytest.approx(0.15, abs=0.03)
        assert entry["caft/loss_head_1"] > 0


def test_full_fine_tuning_with_an_added_token_leaves_a_plain_model(project):
    from builders.axolotl import FULL

    meap = {"mask_token": "add", "layout": "separate", "min_answer_tokens": 4}
    out = project.train("meap_full", **{**MEAP, **FULL, **ONE_STEP, "meap": meap})
    saved = {k: v.shape for k, v in load_file(out / "model.safetensors").items()}
    base = {k: v.shape for k, v in load_file(project.folder / "tiny" / "model.safetensors").items()}
    assert saved == base
    assert (out / "caft_meap" / "mask_token.safetensors").is_file()


def test_a_mask_token_that_is_in_the_data(project):
    project.config("bad_token", **{**MEAP, "meap": {"mask_token": "<|im_end|>"}})
    result = project.axolotl("train", "bad_token.yml", check=False)
    assert (
        result.returncode != 0
        and "but the training data contains it" in result.stdout + result.stderr
    )


def test_pairs_fit_the_models_positions(project):
    """`sequence_len` is 256, the model has 90 positions."""
    short = {"overrides_of_model_config": {"max_position_embeddings": 90}}
    project.train("meap_positions", **{**MEAP, **ONE_STEP, **short})
    (entry,) = project.logs("meap_positions")
    assert entry["meap/examples_masked"] + entry["meap/examples_too_long"] == 40
    assert entry["meap/examples_too_long"] > 0 < entry["meap/examples_masked"]


TURNS = (
    "{% for m in messages %}<BEGIN>{{ m['role'] }}\n{{ m['content'] }}@end@\n{% endfor %}"
    "{% if add_generation_prompt %}<BEGIN>assistant\n{% endif %}"
)


def test_end_tokens_of_turns_are_not_masked(project):
    """An added token that ends a turn by `eot_tokens:`, and one that only stands in the data and
    under `tokens:`."""
    turns = {
        "chat_template": "jinja",
        "chat_template_jinja": TURNS,
        "tokens": ["<BEGIN>", "@end@", "<note>"],
        "eot_tokens": ["@end@"],
        "lora_modules_to_save": ["embed_tokens", "lm_head"],
        "dataset_prepared_path": "./prepared_turns",
    }
    project.train(
        "meap_turns",
        **{**MEAP, **ONE_STEP, **turns, "meap": {"min_answer_tokens": 4, "mask_ratio": 0.99}},
    )
    (turned,) = project.logs("meap_turns")
    project.train(
        "meap_no_turns",
        **{**MEAP, **ONE_STEP, "meap": {"min_answer_tokens": 4, "mask_ratio": 0.99}},
    )
    (plain,) = project.logs("meap_no_turns")
    assert turned["meap/examples_masked"] == plain["meap/examples_masked"] == 40
    assert turned["meap/masked_fraction"] == pytest.approx(plain["meap/masked_fraction"])
