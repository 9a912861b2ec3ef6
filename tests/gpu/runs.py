"""One run: a Llama of random weights is trained for a few steps, and what is seen of it is
noted."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from described import LARGE, Figures, Run, Size
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from builders.tiny import parameters_with_ours, word_tokenizer
from caft_plugin import CAFTConfig, Drafter, with_caft
from caft_plugin.caft.heads import MODULE_NAME, build_heads
from caft_plugin.caft.heads_folder import resolve_wiring
from caft_plugin.model.sharding import gather
from caft_plugin.model.trunk import find_trunk
from caft_plugin.targets import IGNORE

HEAD = re.compile(rf"\b{MODULE_NAME}\.layers\.(\d+)\.")
Row = dict[str, list[int]]
Batch = dict[str, Tensor]


def config_of(size: Size, attention: str) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 2,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.hidden // 128,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        # Three times Llama's: else all positions are alike, and a wrong target changes little.
        initializer_range=0.06,
        attn_implementation=attention,  # type: ignore[call-arg]
    )


def data_of(size: Size) -> list[Row]:
    """Rows of very different lengths, whose first two tokens have no labels."""
    generator = torch.Generator().manual_seed(5)
    low, high = size.lengths
    made = []
    for length in torch.randint(
        low, high + 1, (size.batches * size.rows,), generator=generator
    ).tolist():
        ids = torch.randint(5, size.ids, (length,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [IGNORE, IGNORE, *ids[2:]]})
    return made


class Notes(TrainerCallback):
    def __init__(self, device: str) -> None:
        self.on_gpu = device == "cuda"
        self.gradients: dict[str, Tensor] = {}
        self.seconds: list[float] = []
        self.memory = 0
        self.before = 0.0

    def now(self) -> float:
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.before = self.now()

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        """Gradients as the optimizer is about to see them: whole, and without a scaler's factor."""
        if state.global_step == 0:
            named = [
                (name.replace("_orig_mod.", ""), p.grad) for name, p in parameters_with_ours(model)
            ]
            self.gradients = {
                name: gather(gradient).float() for name, gradient in named if gradient is not None
            }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self.now()
        self.seconds.append(now - self.before)
        self.before = now

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.memory = torch.cuda.max_memory_allocated() if self.on_gpu else 0


class SavesOnCPU(Trainer):
    """Activation offloading as torch has it: what the backward pass needs waits in the CPU's
    memory."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return super().training_step(*args, **kwargs)


def pad(examples: list[Row]) -> Batch:
    def padded(key: str, value: int) -> Tensor:
        rows = [torch.tensor(example[key]) for example in examples]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)

    ids = padded("input_ids", 0)
    return {
        "input_ids": ids,
        "labels": padded("labels", IGNORE),
        "attention_mask": (ids != 0).long(),
    }


def one_behind_the_other(examples: list[Row]) -> Batch:
    """One row for all, in which position ids begin again with each example."""
    ids, labels = (
        [token for example in examples for token in example[key]] for key in ("input_ids", "labels")
    )
    positions = [position for example in examples for position in range(len(example["input_ids"]))]
    columns = {"input_ids": ids, "labels": labels, "position_ids": positions}
    return {key: torch.tensor([column]) for key, column in columns.items()}


def model_of(run: Run, size: Size, device: str, folder: Path) -> Any:
    torch.manual_seed(0)
    dtype = getattr(torch, run.weights)
    # A CPU draws the same weights everywhere; those that are only timed may be others, which a GPU
    # draws sooner. All are rounded to bfloat16, whatever they are kept in, so that all runs begin
    # with the same.
    with torch.device(device if size is LARGE and processes() == 1 else "cpu"):
        model: Any = LlamaForCausalLM(config_of(size, run.attention))
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().to(dtype)
    if run.how == "qlora":
        model.save_pretrained(folder / "base")
        model = AutoModelForCausalLM.from_pretrained(
            folder / "base",
            dtype=dtype,
            attn_implementation=run.attention,
            device_map={"": 0 if device == "cuda" else "cpu"},
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            ),
        )
    if run.cce:
        from cut_cross_entropy.transformers import cce_patch

        model = cce_patch(model)
    if run.how != "full":
        lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=run.dropout)
        model = get_peft_model(model, lora)
    return model


def trainer_of(run: Run, size: Size, device: str, folder: Path, ours: bool) -> tuple[Any, Notes]:
    notes = Notes(device)
    settings = {
        "output_dir": str(folder / "out"),
        "use_cpu": device == "cpu",
        "max_steps": size.steps,
        "per_device_train_batch_size": size.rows // processes(),
        "learning_rate": size.learning_rate,
        "lr_scheduler_type": "constant",
        # nothing is clipped, but a scaler's factor is taken out before gradients are noted
        "max_grad_norm": 1e9,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        **run.args,
    }
    common: dict[str, Any] = {
        "model": model_of(run, size, device, folder),
        "train_dataset": data_of(size),
        "callbacks": [notes],
        "processing_class": word_tokenizer(""),
    }
    host: Any = {"Trainer": Trainer, "save_on_cpu": SavesOnCPU}.get(run.host)
    if run.host == "SFTTrainer":
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        host, common["train_dataset"] = SFTTrainer, Dataset.from_list(data_of(size))
        common["args"] = SFTConfig(**settings, max_length=None)
    else:
        common |= {
            "args": TrainingArguments(**settings),
            "data_collator": one_behind_the_other if run.packed else pad,
        }
    if common["args"].fsdp and device == "cpu":
        # accelerate shards only on accelerators, and silently uses DDP on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if not ours:
        return host(**common), notes
    return with_caft(host)(**common, caft=run.caft, meap=run.meap), notes  # type: ignore[call-arg]


def processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def trainable(trainer: Any) -> dict[str, Tensor]:
    """By name, the parameters that are trained, the heads' too."""
    parts = {"model": trainer.model}
    if getattr(trainer, "caft", None) is not None:
        parts["heads"] = trainer.caft_parts.caft.heads
    named = [
        (f"{part}.{name}", p)
        for part, module in parts.items()
        for name, p in module.named_parameters()
    ]
    return {name: parameter for name, parameter in named if parameter.requires_grad}


@contextlib.contextmanager
def own_environment() -> Iterator[None]:
    """What TrainingArguments leaves in the environment (torch_compile, fsdp) would be obeyed by the
    next run."""
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def train(
    run: Run,
    size: Size,
    device: str,
    folder: Path,
    ours: bool = True,
    start: dict[str, Tensor] | None = None,
) -> Figures:
    """Trains, with heads or without, in a folder of its own in `folder`. `start` are the values
    that trainable tensors begin with: a GPU draws other random numbers for LoRA than a CPU does."""
    with own_environment(), tempfile.TemporaryDirectory(dir=folder) as name:
        own = Path(name)
        trainer, notes = trainer_of(run, size, device, own, ours)
        with torch.no_grad():
            for name, parameter in trainable(trainer).items():
                if start is not None:
                    parameter.copy_(start[name])
        begun = {
            name: parameter.detach().float().cpu().clone()
            for name, parameter in trainable(trainer).items()
        }
        trainer.train()
        trainer.save_model(str(own / "saved"))
        trainer.accelerator.wait_for_everyone()
        return Figures(
            logs=[entry for entry in trainer.state.log_history if "loss" in entry],
            start=begun,
            gradients=by_part(notes.gradients),
            saved=shapes(own / "saved"),
            left_behind=[name for name, _ in trainer.model.named_modules() if "caft" in name],
            seconds=notes.seconds,
            memory=notes.memory,
        )


def by_part(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the model itself and of each head, as one vector."""
    parts: dict[str, list[Tensor]] = {}
    for name in sorted(gradients):
        head = HEAD.search(name)
        parts.setdefault(f"head {int(head[1]) + 1}" if head else "the model", []).append(
            gradients[name].flatten()
        )
    return {part: torch.cat(tensors) for part, tensors in parts.items()}


def shapes(folder: Path) -> dict[str, list[int]]:
    """The tensors that a model's or an adapter's own files hold."""
    found: dict[str, list[int]] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            found |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    return found


def written_twice(
    size: Size, device: str, folder: Path, num_draft: int | None
) -> list[tuple[list[int], list[int], float, float]]:
    """Of greedy and of sampled texts: the plain one, the drafted one, and the seconds of both.
    Heads are untrained."""
    model = model_of(Run(how="full"), size, device, folder).eval()
    config = resolve_wiring(CAFTConfig(train_heads="frozen"), None)
    drafter = Drafter(
        model, build_heads(model, find_trunk(model), config, seed=0), config, num_draft=num_draft
    )
    found = []
    for row in data_of(size)[:4]:
        ids = torch.tensor([row["input_ids"]], device=device)
        for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.5}):
            texts, seconds = [], []
            for way in (None, drafter):
                torch.manual_seed(0)
                began = time.perf_counter()
                text = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=32,
                    min_new_tokens=32,
                    custom_generate=way,
                    **sampling,
                )
                texts.append(text[0].tolist())
                seconds.append(time.perf_counter() - began)
            found.append((*texts, *seconds))
    return found
