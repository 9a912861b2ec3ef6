"""Checks whose runs are processes of their own: `axolotl train`, and what `make bench` compares."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cost
import yaml
from checks import (
    FOUR_BITS,
    HALF,
    REFERENCES,
    Check,
    Difference,
    Row,
    Tolerance,
    in_one_line,
    load,
    verdict,
)

KERNELS = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), True)
FOUR = {"adapter": "qlora", "load_in_4bit": True}
# least relative fall of each loss from the first step to the last: in float32 on a CPU it is 0.13
LEARNS = 0.05


@dataclasses.dataclass(frozen=True)
class AxolotlCheck(Check):
    """`axolotl train` with heads, compared with a plain run and with the Trainer's run on a CPU in
    float32.

    Every step takes all rows. Axolotl draws the start of LoRA on its own, so beside the CPU's run
    stand the losses of the first step, when LoRA does nothing yet; that the losses fall shows that
    gradients do what they should.
    """

    options: dict[str, Any]
    tolerance: Tolerance

    def measure(self, device: str, folder: Path) -> Row:
        from runs import data_of, model_of

        from builders.tiny import word_tokenizer

        reference = str(self.reference)
        size, run = REFERENCES[reference]
        base = folder / "axolotl"
        model_of(dataclasses.replace(run, how="full"), size, "cpu", folder).save_pretrained(base)
        word_tokenizer("").save_pretrained(base)
        rows = [{**row, "attention_mask": [1] * len(row["labels"])} for row in data_of(size)]
        (base / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "base_model": str(base),
            "datasets": [{"path": str(base / "rows.jsonl"), "ds_type": "json", "type": None}],
            "adapter": "lora",
            "lora_r": 8,
            "lora_alpha": 16,
            "lora_target_linear": True,
            "sequence_len": 128,
            "micro_batch_size": size.rows,
            "gradient_accumulation_steps": 1,
            "max_steps": size.steps,
            "save_steps": size.steps,
            "logging_steps": 1,
            "optimizer": "adamw_torch",
            "learning_rate": size.learning_rate,
            "lr_scheduler": "constant",
            "max_grad_norm": 1e9,
            "bf16": device == "cuda",
            "attn_implementation": "sdpa",
            **dict.fromkeys(KERNELS, False),
            **self.options,
        }
        ours = {**config, "plugins": ["caft_plugin.CAFTPlugin"], "caft": run.caft}
        with (
            axolotl_train(base / "plain", config) as plain,
            axolotl_train(base / "ours", ours) as with_heads,
        ):
            try:
                before = logs(base / "plain", plain)
            except RuntimeError as error:
                return Row(self.name, f"not run: without us it fails too, {in_one_line(error)}")
            after = logs(base / "ours", with_heads)
        return Row(
            self.name, *verdict([*self.compared(before, after, load(folder, reference).logs)])
        )

    def compared(
        self, plain: list[dict], ours: list[dict], on_cpu: list[dict]
    ) -> Iterator[Difference]:
        first, last, allowed = ours[0], ours[-1], self.tolerance.loss
        next_token = "caft/next_token_loss"
        yield Difference(
            "next-token loss without us", abs(first[next_token] / plain[0]["loss"] - 1), allowed
        )
        for key, value in on_cpu[0].items():
            if key == next_token or key.startswith("caft/loss_head"):
                yield Difference(f"{key} of the first step", abs(first[key] / value - 1), allowed)
                # at most 1 where the loss fell by LEARNS or more
                fall = 1 - last[key] / first[key]
                yield Difference(
                    f"{key} has to fall", LEARNS / fall if fall > 0 else float("inf"), 1
                )


@contextlib.contextmanager
def axolotl_train(folder: Path, config: dict[str, Any]) -> Iterator[subprocess.Popen]:
    """The process of a run, whose output goes to `folder`; ended with this."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {"output_dir": str(folder / "out"), "dataset_prepared_path": str(folder / "prepared")}
    (folder / "config.yml").write_text(yaml.safe_dump({**config, **paths}))
    environment = {
        **os.environ,
        "AXOLOTL_DO_NOT_TRACK": "1",
        "AXOLOTL_DATASET_NUM_PROC": "0",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        sys.executable,
        "-m",
        "axolotl.cli.main",
        "train",
        str(folder / "config.yml"),
        "--launcher",
        "python",
    ]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def logs(folder: Path, process: subprocess.Popen) -> list[dict[str, float]]:
    """What a run logged at each step.

    Raises:
        RuntimeError: it failed.
    """
    if process.wait() != 0:
        raise RuntimeError(last_words((folder / "log").read_text()))
    (state,) = (folder / "out").glob("checkpoint-*/trainer_state.json")
    return [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]


def last_words(log: str) -> str:
    """Of a process that failed: the last line in which an error is named."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    named = [line for line in lines if "Error: " in line]
    return (named or lines or ["no word"])[-1]


@dataclasses.dataclass(frozen=True)
class BenchCheck(Check):
    """Runs of `make bench` that take steps in turn, on a model of random weights. Nothing is equal
    here or not."""

    how: str

    def measure(self, device: str, folder: Path) -> Row:
        return self.compared(folder, BENCH_MODEL, ARMS, length=512, steps=9)

    def compared(
        self, folder: Path, model: dict[str, Any], arms: dict[str, dict], length: int, steps: int
    ) -> Row:
        made: Any = model
        if self.how == "qlora":
            from transformers import LlamaConfig, LlamaForCausalLM

            made = str(folder / "bench")
            LlamaForCausalLM(LlamaConfig(**model)).save_pretrained(made)
        base = {
            "door": "trainer",
            "how": self.how,
            "batch": 4,
            "length": length,
            "supervised": 0.3,
            "model": made,
        }
        runs = {"plain": base} | {name: {**base, "caft": caft} for name, caft in arms.items()}
        comparison = cost.Comparison(self.name, runs, {})
        try:
            found = cost.measured(comparison, {"this": sys.executable}, "", steps)
        except SystemExit as error:
            return Row(self.name, f"failed: {last_words(str(error))}")
        plain = found.pop("plain")
        time = "; ".join(
            f"{name} {cost.spread(cost.ratios(run, plain))}" for name, run in found.items()
        )
        memory = "; ".join(f"{name} {run.memory / plain.memory:.2f}" for name, run in found.items())
        return Row(self.name, "ran", "", time, memory)


ARMS: dict[str, dict] = {
    "4 heads": {},
    "one head a step": cost.ONE,
    "4 heads, fused_loss": {"fused_loss": "on"},
}
BENCH_MODEL: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "max_position_embeddings": 2048,
}
PROCESS_CHECKS: list[Check] = [
    AxolotlCheck("axolotl train", {}, HALF, reference="all rows at once", packages=("axolotl",)),
    AxolotlCheck(
        "axolotl train, Triton LoRA kernels",
        KERNELS,
        HALF,
        reference="all rows at once",
        packages=("axolotl",),
        cuda=True,
    ),
    AxolotlCheck(
        "axolotl train, QLoRA with Triton LoRA kernels",
        {**KERNELS, **FOUR},
        FOUR_BITS,
        reference="all rows at once, qlora",
        packages=("axolotl", "bitsandbytes"),
        cuda=True,
    ),
    # `make bench` itself runs on a CPU too, for an hour
    BenchCheck("make bench, LoRA", "lora", cuda=True),
    BenchCheck("make bench, full fine-tuning", "full", cuda=True),
    BenchCheck("make bench, QLoRA", "qlora", packages=("bitsandbytes",), cuda=True),
]
