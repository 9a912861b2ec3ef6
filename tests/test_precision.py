"""Whether this CPU computes in bfloat16, and the warning of a run that does so without instructions
for it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time

import pytest
import torch
from paths import ROOT

from caft_plugin.precision import cpu_has_bf16

# What makes any x86 processor one without instructions for bfloat16.
SLOW = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
CHOICES = {
    "--bf16=true": "== computing in bfloat16 on the",
    "--bf16=false": "== computing in float32: this CPU has no",
}
WARNING = (
    "but this CPU has no bfloat16 instructions: a step takes about 30 times as long as in float32"
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", **environment}
    result = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def seconds(dtype: torch.dtype) -> float:
    """Of the product that passes a gradient back through a linear layer; the best of three."""
    gradient, weight = torch.randn(512, 1536).to(dtype), torch.randn(1536, 576).to(dtype)
    took = []
    for _ in range(4):
        start = time.perf_counter()
        gradient @ weight
        took.append(time.perf_counter() - start)
    return min(took[1:])


def test_the_answer_is_the_measured_one():
    ratio = seconds(torch.bfloat16) / seconds(torch.float32)
    if cpu_has_bf16():
        assert ratio < 8
    elif torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert ratio > 8


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the accelerator decides")
@pytest.mark.parametrize(
    "environment", [{}, SLOW, {"ONEDNN_MAX_CPU_ISA": "AVX2"}], ids=["as it is", "slow", "oneDNN"]
)
def test_the_makefile_gets_an_option_and_the_user_a_line(environment):
    result = python("-m", "caft_plugin.precision", **environment)
    option = result.stdout.strip()
    assert option == ("--bf16=true" if cpu_has_bf16() and not environment else "--bf16=false")
    (line,) = result.stderr.splitlines()
    assert line.startswith(CHOICES[option])


RUNS = """
import sys
from test_precision import run
from tiny import LLAMA, word_tokenizer
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
made = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 64}))
made.save_pretrained(folder)
in_4_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def load(dtype, compute=None):
    more = {}
    if compute is not None:
        settings = {**in_4_bits, "bnb_4bit_compute_dtype": compute}
        more["quantization_config"] = BitsAndBytesConfig(**settings)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **more)


tokenizer = word_tokenizer("")
run("asked for", folder, load("float32"), caft={}, bf16=True)
run("beta 0", folder, load("float32"), caft={"beta": 0}, bf16=True)
masks = {"mode": "pretrain", "mask_token": "add"}
run("masks", folder, load("float32"), meap=masks, tokenizer=tokenizer, bf16=True)
run("weights", folder, load("bfloat16"), caft={})
run("4 bits", folder, load("float32", "bfloat16"), caft={}, adapter=True)
run("neither", folder, load("float32"), bf16=True)
run("float32", folder, load("float32"), caft={})
run("4 bits, float32", folder, load("float32", "float32"), caft={}, adapter=True)
"""


def run(name, folder, model, caft=None, meap=None, tokenizer=None, adapter=False, **settings):
    """Prints the name, and trains two runs of one step."""
    from test_training import DATA, arguments, lora, pad
    from transformers import Trainer

    from caft_plugin import precision, with_caft

    precision._warn.cache_clear()
    print(f"\nRUN {name}", file=sys.stderr, flush=True)  # noqa: T201
    trainer = with_caft(Trainer)(
        model=lora(model) if adapter else model,
        args=arguments(folder, max_steps=1, **settings),
        train_dataset=DATA,
        data_collator=pad,
        processing_class=tokenizer,
        caft=caft,
        meap=meap,
    )
    trainer.train(), trainer.train()


def test_a_slow_run_is_warned_of_once(tmp_path):
    """In a process without instructions for bfloat16, whatever this machine has."""
    said = python("-c", RUNS, str(tmp_path), OMP_NUM_THREADS="1", **SLOW).stderr
    found = {}
    for part in said.split("\nRUN ")[1:]:
        name, _, output = part.partition("\n")
        found[name] = [line.split(",")[0] for line in output.splitlines() if WARNING in line]
    loaded = ["the model was loaded to compute in bfloat16"]
    assert found == {
        "asked for": ["got bf16: true"],
        "beta 0": ["got bf16: true"],
        "masks": ["got bf16: true"],
        "weights": loaded,
        "4 bits": loaded,
        "neither": [],
        "float32": [],
        "4 bits, float32": [],
    }
    assert "`bf16: false` in an Axolotl YAML" in said


@pytest.mark.parametrize("quick", [True, False])
def test_the_trl_examples_choose_what_is_quick_here(quick, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    monkeypatch.syspath_prepend(ROOT / "trl_examples")
    sft = importlib.import_module("sft")
    monkeypatch.setattr(sft, "cpu_has_bf16", lambda: quick)

    def bf16(**arguments):
        return sft.Training(output_dir=str(tmp_path), use_cpu=True, **arguments).bf16

    assert bf16() is quick
    assert bf16(bf16=True) is True and bf16(bf16=False) is False
