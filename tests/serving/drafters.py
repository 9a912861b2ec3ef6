"""Tiny random models with heads over them, the drafters written from their files, and vLLM asked
for texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from builders.quantised import quantise
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.config import CAFTConfig
from caft_plugin.model.trunk import find_trunk
from caft_plugin.serving.export import export_drafter

HEADS, VOCABULARY, TOKENS = 4, 32, 40
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=None),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
}
DEFAULT, AUTHORS, NORMED, UNNORMED = (
    ("penultimate", True),
    ("final", False),
    ("final", True),
    ("penultimate", False),
)
CASES = [
    *((family, *DEFAULT) for family in CONFIGS),
    *(("llama", *wiring) for wiring in (AUTHORS, NORMED, UNNORMED)),
]
# By scheme, the type of the rest. vLLM's kernel for 4 bits takes no float32, and needs AVX-512.
QUANTISED = {"int8": "float32"} | ({"int4": "float16"} if torch.cpu._is_avx512_supported() else {})


def name_of(case) -> str:
    return "-".join(map(str, case))


def make(
    folder: Path, family: str, head_input: str, head_norm: bool, scheme: str | None = None
) -> None:
    """A model with noise on its norms and biases too, and heads that drift off the last layer one
    by one. `scheme`: the model is quantised then, and its weights as they are now are in
    `dequantised`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    settings = CAFTConfig(
        num_heads=HEADS, head_input=head_input, head_norm=head_norm, train_heads="frozen"
    )
    trunk, config = find_trunk(model), resolve_wiring(settings, None)
    heads = build_heads(model, trunk, config, seed=0)
    with torch.no_grad():
        for k, layer in enumerate(heads.layers):
            for parameter in layer.parameters():
                parameter.add_(0.02 * k * torch.randn_like(parameter))
    save_heads(folder, heads, trunk, config, resumable=False)
    if scheme is not None:
        model.save_pretrained(folder / "dequantised")
        weights = quantise(folder / "model", scheme)
        save_file(weights, folder / "dequantised" / "model.safetensors", {"format": "pt"})
    export_drafter(str(folder / "model"), str(folder), folder / "vllm")
    if head_norm:
        export_drafter(str(folder / "model"), str(folder), folder / "eagle3", "eagle3")


def make_adapter(folder: Path) -> None:
    """A base, an adapter on it with heads of its own, and their drafter."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(folder / "model")
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    tuned = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(folder / "out")
    settings, trunk = CAFTConfig(num_heads=HEADS, train_heads="frozen"), find_trunk(tuned)
    config = resolve_wiring(settings, None)
    save_heads(
        folder / "out", build_heads(tuned, trunk, config, seed=0), trunk, config, resumable=False
    )
    export_drafter(str(folder / "out"), str(folder / "out"), folder / "vllm")


def lacking(drafter: Path) -> None:
    tensors = load_file(drafter / "model.safetensors")
    del tensors["layers.2.mlp.down_proj.weight"]
    save_file(tensors, drafter / "model.safetensors", {"format": "pt"})


def of_another_model(drafter: Path) -> None:
    config = json.loads((drafter / "config.json").read_text())
    config["caft_heads"]["target_layers"] += 1
    (drafter / "config.json").write_text(json.dumps(config))


# name: (what is done to the drafter, the draft tokens asked for, vLLM's message)
DAMAGED = {
    "a weight is missing": (
        lacking,
        4,
        "lacks 1 weights, the first of them model.layers.2.mlp.down_proj.weight",
    ),
    "another model": (
        of_another_model,
        4,
        "was made for a model with num_hidden_layers 4, but the served model has",
    ),
    "more tokens than heads": (
        lambda drafter: None,
        5,
        "num_speculative_tokens is 5, but this drafter has 4 heads",
    ),
}


def all_heads(folder: Path, tokens: int) -> dict[str, object]:
    return {
        "method": "eagle3",
        "model": str(folder / "vllm"),
        "num_speculative_tokens": tokens,
        "parallel_drafting": True,
    }


def first_head(folder: Path) -> dict[str, object]:
    return {"method": "eagle3", "model": str(folder / "eagle3"), "num_speculative_tokens": 1}


ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


def run_jobs(folder: Path, jobs: list[dict]) -> subprocess.CompletedProcess:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(Path(__file__).with_name("ask.py")), str(folder / "jobs.json")]
    return subprocess.run(
        command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=3600
    )
