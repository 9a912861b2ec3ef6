"""The same rows through both doors, `axolotl train` and CAFTSFTTrainer: the same losses."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("axolotl")

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig

from builders.axolotl import FULL
from caft_plugin.trl import CAFTSFTTrainer

pytestmark = pytest.mark.slow

CAFT = {"num_heads": 4, "beta": 0.05}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOSSES = (
    "loss",
    "caft/next_token_loss",
    "caft/aux_loss",
    *(f"caft/loss_head_{k}" for k in range(1, 5)),
)
# Changes to the Axolotl config, steps, and what is compared. LoRA's A is random and B is 0, so
# under LoRA only the losses of the first step do not depend on A.
KINDS = {
    "lora": (
        {"lora_dropout": 0.0, "lora_target_linear": None, "lora_target_modules": TARGETS},
        1,
        LOSSES,
    ),
    "full": (FULL, 3, (*LOSSES, "grad_norm")),
}


def tokenised_rows(tokenizer):
    """Eight rows of different length; the loss is on the answer, which in some rows is too short
    for some heads."""
    rows = []
    for i in range(8):
        prompt = tokenizer(f"Count to {i + 2}.").input_ids
        answer = tokenizer(" ".join(str(j) for j in range(1, i + 2))).input_ids
        rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [-100] * len(prompt) + answer,
                "attention_mask": [1] * len(prompt + answer),
            }
        )
    return rows


@pytest.mark.parametrize("kind", KINDS)
def test_axolotl_and_trl_log_the_same_losses(project, tmp_path, kind):
    changes, steps, keys = KINDS[kind]
    tokenizer = AutoTokenizer.from_pretrained(project.folder / "tiny")
    rows = tokenised_rows(tokenizer)
    (project.folder / "tokenised.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    project.train(
        f"doors_{kind}",
        **changes,
        plugins=["caft_plugin"],
        caft=CAFT,
        datasets=[{"path": "./tokenised.jsonl", "ds_type": "json", "type": ""}],
        dataset_prepared_path="./prepared_tokenised",
        micro_batch_size=len(rows),
        gradient_accumulation_steps=1,
        max_steps=steps,
        save_steps=steps,
    )
    through_axolotl = project.logs(f"doors_{kind}")

    trainer = CAFTSFTTrainer(
        model=str(project.folder / "tiny"),
        args=SFTConfig(
            output_dir=str(tmp_path),
            model_init_kwargs={"dtype": "float32"},
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=len(rows),
            max_steps=steps,
            learning_rate=0.001,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=(
            LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS) if kind == "lora" else None
        ),
        caft=CAFT,
    )
    trainer.train()
    through_trl = [entry for entry in trainer.state.log_history if "loss" in entry]

    assert len(through_axolotl) == len(through_trl) == steps
    for of_axolotl, of_trl in zip(through_axolotl, through_trl, strict=True):
        for key in keys:
            assert of_axolotl[key] == pytest.approx(of_trl[key], rel=1e-4), key
