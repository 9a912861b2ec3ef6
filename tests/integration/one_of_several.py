"""Run by test_processes.py, alone or under torchrun: trains a tiny model in each of the given ways.

Arguments: a folder, and a JSON object of cases. A case is a dict of TrainingArguments and of `caft`
    and `meap` (their
settings, None for a plain run), `lora` and `tied` (what the model is), `loaded` (how it is loaded,
see `loaded`), `only_first` (every process but the first begins with "zeros" for weights, or with
frozen ones on "meta"), `parallelism` (accelerate's ParallelismConfig), `axolotl` (shard as Axolotl
does it, in this case and all that follow) and `resume` (train again, from the checkpoint of step
2).

The first process writes `CASE.json` (what the model was wrapped in, what was logged) and
`CASE.safetensors` (the gradients of every step, whole) into the folder, and the Trainer what it
saves into `CASE/`.
"""

from __future__ import annotations

import faulthandler
import gc
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
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import caft_plugin.caft.loss
from builders.runs import arguments, pad, rows
from builders.tiny import LLAMA, parameters_with_ours, word_tokenizer
from caft_plugin import ConfigError, with_caft
from caft_plugin.model.sharding import gather
from caft_plugin.model.trunk import find_trunk

# Rows of very different lengths and few logits at a time: processes then differ in how often they
# unembed.
DATA = rows([4, 120, 7, 3, 22, 90, 5, 15, 60, 6, 3, 12, 100, 4, 8, 25], prompt=1)
caft_plugin.caft.loss.LOGITS_AT_A_TIME["cpu"] = 1


# bitsandbytes quantises in blocks of 64, and in evaluation mode on a CPU it wants whole blocks in
# each row (0.50).
WIDE = {"hidden_size": 64, "intermediate_size": 128}


class Gradients(TrainerCallback):
    def __init__(self) -> None:
        self.whole: dict[str, torch.Tensor] = {}
        self.sharded: set[bool] = set()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        for name, parameter in parameters_with_ours(model):
            self.sharded.add(isinstance(parameter, DTensor))
            if parameter.grad is not None:
                self.whole[f"{state.global_step}.{name}"] = gather(parameter.grad)


class Host(Trainer):
    """Notes what its own loss finds: the fields of the model's output, and parameters of ours."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.fields = list(outputs.keys())
        self.found = [name for name, _ in model.named_parameters() if "caft" in name]
        return (loss, outputs) if return_outputs else loss


def shard_on_cpu() -> None:
    """Lets accelerate shard on a CPU: it shards only on accelerators, and silently uses DDP on
    CPUs."""
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def shard_as_axolotl() -> None:
    """What Axolotl changes for `fsdp_version: 2` with `load_in_4bit: true`, by its own
    functions."""
    from axolotl.monkeypatch import fsdp2_qlora
    from axolotl.monkeypatch.accelerate.fsdp2 import patch_accelerate_fsdp2
    from axolotl.monkeypatch.accelerate.parallelism_config import patch_parallelism_config

    patch_parallelism_config()
    patch_accelerate_fsdp2()
    fsdp2_qlora.apply_init_sharded_param_patch()
    fsdp2_qlora.apply_init_unsharded_param_patch()
    fsdp2_qlora.apply_init_dtype_attrs_patch()


def forget_weights(model: torch.nn.Module, how: str) -> None:
    """What a process has for a model of which the first one alone has read the weights: zeros in
    transformers; with an adapter in Axolotl, nothing in the place of frozen ones."""
    for parameter in model.parameters():
        if how == "zeros":
            parameter.data.zero_()
        elif not parameter.requires_grad:
            nowhere = torch.nn.Parameter(parameter.to("meta"), requires_grad=False)
            torch.utils.swap_tensors(parameter, nowhere)


def loaded(model: LlamaForCausalLM, dtype: str, in_4_bits: bool = False) -> LlamaForCausalLM:
    """The model as `from_pretrained` loads it in `dtype`, quantised as one that FSDP2 is to shard
    has to be."""
    options: dict[str, Any] = {}
    if in_4_bits:
        options["device_map"] = {"": "cpu"}
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_quant_storage=dtype,
        )
    state, config = model.state_dict(), model.config
    return LlamaForCausalLM.from_pretrained(
        None, config=config, state_dict=state, dtype=getattr(torch, dtype), **options
    )


def trained(
    folder: Path, settings: dict[str, Any], resume: bool = False
) -> tuple[Trainer, Gradients]:
    settings = dict(settings)
    torch.manual_seed(0)
    wide = WIDE if "loaded" in settings else {}
    model = LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, **wide, "tie_word_embeddings": settings.pop("tied", False)})
    )
    if "loaded" in settings:
        model = loaded(model, **settings.pop("loaded"))
    if settings.pop("lora", False):
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    only_first = settings.pop("only_first", None)
    if only_first is not None and int(os.environ["RANK"]) > 0:
        forget_weights(model, only_first)
    if settings.pop("axolotl", False):
        shard_as_axolotl()
    caft, meap = settings.pop("caft"), settings.pop("meap", None)
    if "parallelism" in settings:
        settings["parallelism_config"] = ParallelismConfig(**settings.pop("parallelism"))
    args = arguments(folder, learning_rate=1e-3, **settings)
    if args.fsdp or args.parallelism_config:
        shard_on_cpu()
    seen = Gradients()
    ours = type("Ours", (with_caft(Host),), {"caft_reads_loss_alone": (Host,)})
    trainer = ours(
        model=model,
        args=args,
        train_dataset=DATA,
        data_collator=pad,
        processing_class=word_tokenizer(""),
        caft=caft,
        meap=meap,
        callbacks=[seen],
    )
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer, seen


def logged(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    gc.freeze()  # as in conftest.py
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
        result |= {"fields": trainer.fields, "found": trainer.found}
        if "save_steps" in settings:
            trainer.save_model(str(folder / case / "final"))
        if resume:
            resumed, _ = trained(folder / case, settings, resume=True)
            result["resumed"] = logged(resumed)
        layers = find_trunk(trainer.model).layers  # FSDP2 puts a class of its own upon each class
        trainer.caft_parts.remove()
        names = [name for name, _ in trainer.model.named_modules() if "caft" in name]
        classes = [
            [c for c in type(layer).__mro__ if not c.__name__.startswith("FSDP")]
            for layer in layers
        ]
        result["left_behind"] = names + [str(mro) for mro in classes if mro != classes[0]]
        if trainer.args.process_index == 0:
            (folder / f"{case}.json").write_text(json.dumps(result))
            save_file(seen.whole, folder / f"{case}.safetensors")
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    faulthandler.enable()  # a process that crashes says where
    # processes that wait for each other say where
    faulthandler.dump_traceback_later(540, exit=True)
    main()
    # Taking the process group down, gloo's threads now and then abort the interpreter ("terminate
    # called without an active exception") or wait for ever; the figures are out, so nothing is left
    # to be done here.
    os._exit(0)
