"""Run by test_processes.py, alone or under torchrun: trains a tiny model in each of the given ways.

Arguments: a folder, and a JSON object of cases. A case is a dict of TrainingArguments and of `caft` and `meap` (their
settings), `lora` and `tied` (what the model is), `only_first` (every process but the first begins with zeros for
weights), `parallelism` (accelerate's ParallelismConfig) and `resume` (train again, from the checkpoint of step 2).

The first process writes `CASE.json` (what the model was wrapped in, what was logged) and `CASE.safetensors` (the
gradients of every step, whole) into the folder, and the Trainer what it saves into `CASE/`.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
torch.set_num_threads(1)

from accelerate import DistributedType, ParallelismConfig, PartialState
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_training import arguments, pad, rows
from tiny import LLAMA, word_tokenizer
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import caft_plugin.loss
from caft_plugin import ConfigError, with_caft
from caft_plugin.storage import gather

# Rows of very different lengths and few logits at a time: processes then differ in how often they unembed.
DATA = rows([4, 120, 7, 3, 22, 90, 5, 15, 60, 6, 3, 12, 100, 4, 8, 25], prompt=1)
caft_plugin.loss.LOGITS_AT_A_TIME["cpu"] = 1


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.whole: dict[str, torch.Tensor] = {}
        self.sharded: set[bool] = set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        for name, parameter in model.named_parameters():
            self.sharded.add(isinstance(parameter, DTensor))
            if parameter.grad is not None:
                self.whole[f"{state.global_step}.{name}"] = gather(parameter.grad)


def shard_on_cpu() -> None:
    """Lets accelerate shard on a CPU: it shards on accelerators alone, and quietly takes DDP for CPUs."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def trained(folder: Path, settings: dict[str, Any], resume: bool = False) -> tuple[Trainer, Gradients]:
    settings = dict(settings)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "tie_word_embeddings": settings.pop("tied", False)}))
    if settings.pop("lora", False):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    caft, meap, only_first = settings.pop("caft"), settings.pop("meap", None), settings.pop("only_first", False)
    if "parallelism" in settings:
        settings["parallelism_config"] = ParallelismConfig(**settings.pop("parallelism"))
    args = arguments(folder, learning_rate=1e-3, **settings)
    if args.fsdp or args.parallelism_config:
        shard_on_cpu()
    seen = Gradients()
    trainer = with_caft(Trainer)(
        model=model,
        args=args,
        train_dataset=DATA,
        data_collator=pad,
        processing_class=word_tokenizer(""),
        caft=caft,
        meap=meap,
        callbacks=[seen],
    )
    if only_first and args.process_index > 0:
        for parameter in model.parameters():
            parameter.data.zero_()
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer, seen


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    folder = Path(sys.argv[1])
    for case, settings in json.loads(sys.argv[2]).items():
        resume = settings.pop("resume", False)
        try:
            trainer, seen = trained(folder / case, settings)
        except ConfigError as error:
            (folder / f"{case}.json").write_text(json.dumps({"refused": str(error)}))
            continue
        wrapped = type(trainer.model_wrapped).__name__
        result = {"wrapped": wrapped, "sharded": sorted(seen.sharded), "logs": logged(trainer)}
        if "save_steps" in settings:
            trainer.save_model(str(folder / case / "final"))
        if resume:
            resumed, _ = trained(folder / case, settings, resume=True)
            result["resumed"] = logged(resumed)
        layers = trainer.caft.trunk.model.model.layers  # FSDP2 puts a class of its own upon each class
        trainer.detach_ours()
        names = [name for name, _ in trainer.model.named_modules() if "caft" in name]
        classes = [[c for c in type(layer).__mro__ if not c.__name__.startswith("FSDP")] for layer in layers]
        result["left_behind"] = names + [str(mro) for mro in classes if mro != classes[0]]
        if trainer.args.process_index == 0:
            (folder / f"{case}.json").write_text(json.dumps(result))
            save_file(seen.whole, folder / f"{case}.safetensors")
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    faulthandler.enable()  # a process that crashes says where
    faulthandler.dump_traceback_later(540, exit=True)  # processes that wait for each other say where
    main()
    # Taking the process group down, gloo's threads now and then abort the interpreter ("terminate called without an
    # active exception") or wait for ever; the figures are out, so nothing is left to be done here.
    os._exit(0)
