"""Run by test_processes.py, alone or under torchrun: trains a tiny model and prints what it logged as JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from peft import LoraConfig, get_peft_model
from test_training import DATA, arguments, pad
from tiny import LLAMA
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from caft_plugin import with_caft


def main() -> None:
    folder, settings = sys.argv[1], json.loads(sys.argv[2])
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    if settings.pop("lora"):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    caft = settings.pop("caft")
    trainer = with_caft(Trainer)(
        model=model,
        args=arguments(folder, learning_rate=1e-3, **settings),
        train_dataset=DATA,
        data_collator=pad,
        caft=caft,
    )
    trainer.train()
    if os.environ.get("RANK", "0") == "0":
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        print(json.dumps({"wrapped": type(trainer.model_wrapped).__name__, "logs": logs}), flush=True)  # noqa: T201
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
    # gloo's threads now and then abort an interpreter that ends beside another one ("terminate called without an
    # active exception"); the figures are out and the process group is gone, so nothing is left to be done here.
    os._exit(0)
