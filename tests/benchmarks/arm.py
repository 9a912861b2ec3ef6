"""One training run of a benchmark, to be started by cost.py: `python arm.py SPEC`, SPEC a JSON
object.

door    sft (TRL), trainer (transformers only) or official (caft-llm, in its own environment)
how     full, lora, qlora
caft    the plugin's settings, or left out: a plain run
model   a folder, or {"vocab_size": ..., ...}: a Llama of random weights
batch, length, supervised       rows per step, tokens per row, fraction of them with a label
dtype   bfloat16 or float32
args    more training arguments
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from typing import Any

import torch
from pace import Pace
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS = 1000


def rows(vocab_size: int, count: int, length: int, supervised: float) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(0)
    prompt = round(length * (1 - supervised))
    ids = torch.randint(10, min(vocab_size, 40_000), (count, length), generator=generator).tolist()
    return [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]


def load(spec: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    dtype = getattr(torch, spec["dtype"])
    if isinstance(spec["model"], dict):
        return LlamaForCausalLM(LlamaConfig(**spec["model"])).to(dtype)
    options: dict[str, Any] = {"dtype" if spec["door"] != "official" else "torch_dtype": dtype}
    if spec["how"] == "qlora":
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    return AutoModelForCausalLM.from_pretrained(spec["model"], **options)


def as_tensors(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {
        key: torch.tensor([example[key] for example in examples]) for key in ("input_ids", "labels")
    }


def main() -> None:
    spec = json.loads(sys.argv[1])
    door, caft = spec["door"], spec.get("caft")
    model = load(spec)
    lora = None if spec["how"] == "full" else LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    data = rows(
        model.config.vocab_size, spec["batch"] * STEPS // 10, spec["length"], spec["supervised"]
    )
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": spec["batch"],
        "max_steps": STEPS,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": STEPS,
        **spec.get("args", {}),
    }
    common: dict[str, Any] = {"model": model, "train_dataset": data, "callbacks": [Pace()]}
    if door == "sft":
        from datasets import Dataset
        from trl import SFTConfig

        from caft_plugin.trl import CAFTSFTTrainer

        settings["max_length"] = None
        common["train_dataset"] = Dataset.from_list(data)
        trainer = CAFTSFTTrainer(**common, args=SFTConfig(**settings), peft_config=lora, caft=caft)
    else:
        import transformers

        common |= {"args": transformers.TrainingArguments(**settings), "data_collator": as_tensors}
        if door == "official" and caft is not None:
            import caft as official

            # As its scripts do: heads first, LoRA on base and heads alike.
            model.add_auxiliary_heads = official.add_auxiliary_heads.__get__(model)
            model.add_auxiliary_heads(**caft)
            official.add_caft_loss(transformers, 0.01, 0.8, "rsine")
        if lora is not None:
            common["model"] = get_peft_model(model, lora)
        if door == "official":
            trainer = transformers.Trainer(**common)
        else:
            from caft_plugin import with_caft

            trainer = with_caft(transformers.Trainer)(**common, caft=caft)
    assert not inspect.isabstract(type(trainer))
    trainer.train()


if __name__ == "__main__":
    main()
