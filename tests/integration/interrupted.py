"""Run by test_restart.py as a process of its own that may be killed at any moment: a run that goes
on by itself."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
)

from builders.runs import arguments, pad, rows
from builders.tiny import LLAMA
from caft_plugin import with_caft
from caft_plugin.checkpoints import Parts, newest_whole

PARTS = Parts(weights=True, optimizer=True)
STEPS = 20
# 4 steps an epoch, 2 micro-batches each
DATA = rows([4, 30, 7, 3, 22, 9, 5, 15, 28, 6, 3, 12, 19, 4, 8, 25])


def base_model(base: str, folder: Path) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {**LLAMA, "hidden_size": 64, "intermediate_size": 128}
    model: torch.nn.Module = LlamaForCausalLM(LlamaConfig(**sizes))
    if base == "qlora":
        model.bfloat16().save_pretrained(folder / "base")
        four_bit = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base", quantization_config=four_bit, dtype=torch.bfloat16, device_map="cpu"
        )
    if base != "full":
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
        model = get_peft_model(model, adapter)
    return model


def run(folder: str, base: str, train_heads: str) -> None:
    """Trains to the end, from the newest whole checkpoint if there is one."""
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    out = Path(folder)
    with open(out / "output.txt", "a", buffering=1) as output:
        sys.stdout = sys.stderr = output
        trainer = with_caft(Trainer)(
            model=base_model(base, out),
            args=arguments(
                out,
                max_steps=STEPS,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                learning_rate=1e-3,
                lr_scheduler_type="cosine",
                save_strategy="steps",
                save_steps=1,
                save_total_limit=3,
                bf16=base == "qlora",
            ),
            train_dataset=DATA,
            data_collator=pad,
            caft={"train_heads": train_heads, "beta": 0.5},
        )
        newest, _ = newest_whole(out, PARTS)
        trainer.train(resume_from_checkpoint=newest is not None)
        trainer.save_model()
