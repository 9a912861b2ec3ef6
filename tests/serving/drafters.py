"""Tiny random models with heads over them, the drafters written from their files, and vLLM asked for texts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from caft_plugin.config import CAFTConfig
from caft_plugin.heads import build_heads
from caft_plugin.heads_folder import resolve_wiring, save_heads
from caft_plugin.serving.export import export_drafter
from caft_plugin.trunk import find_trunk

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
DEFAULT, AUTHORS, NORMED, UNNORMED = ("penultimate", True), ("final", False), ("final", True), ("penultimate", False)
CASES = [*((family, *DEFAULT) for family in CONFIGS), *(("llama", *wiring) for wiring in (AUTHORS, NORMED, UNNORMED))]


def name_of(case) -> str:
    return "-".join(map(str, case))


def make(folder: Path, family: str, head_input: str, head_norm: bool) -> None:
    """A model with noise on its norms and biases too, and heads that drift off the last layer one by one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    settings = CAFTConfig(num_heads=HEADS, head_input=head_input, head_norm=head_norm, train_heads="frozen")
    trunk, config = find_trunk(model), resolve_wiring(settings, None)
    heads = build_heads(model, trunk, config, seed=0)
    with torch.no_grad():
        for k, layer in enumerate(heads.layers):
            for parameter in layer.parameters():
                parameter.add_(0.02 * k * torch.randn_like(parameter))
    save_heads(folder, heads, trunk, config, resumable=False)
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
    save_heads(folder / "out", build_heads(tuned, trunk, config, seed=0), trunk, config, resumable=False)
    export_drafter(str(folder / "out"), str(folder / "out"), folder / "vllm")


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
    return subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=1200)
