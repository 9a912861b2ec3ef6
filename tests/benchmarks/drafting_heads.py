"""The models and heads whose drafting is measured: two ways to get heads, on two tasks.

- With CAFT: full fine-tuning with four heads (`tuned`), then these heads trained further on the
  tuned model's answers (`further`).
- Afterwards: the same fine-tuning by TRL without caft_plugin (`plain`), then heads that start as
  copies of its last layer, trained on that model's answers: for as many steps as `further`
  (`fresh`), and for as many as fit into the time that CAFT and `further` took together
  (`fresh-longer`).

A folder that exists is not made again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from caft_plugin.precision import quick_dtype

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MOLECULES = ROOT / "axolotl_configs" / "data"
TUNED, FURTHER, FRESH, FRESH_LONGER = "tuned", "further", "fresh", "fresh-longer"
PLAIN_MODEL = "plain"
ASKED = 400  # rows of the training file whose prompts the tuned model answers
BATCH, FURTHER_BATCH = 8, 16  # rows a step


@dataclasses.dataclass(frozen=True)
class Task:
    """Rows to train on and prompts that are held out.

    Lengths are in tokens: of rows in fine-tuning and in heads' training, of the answers that heads
        are trained on.
    """

    name: str
    folder: Path
    max_length: int
    heads_length: int
    answer_length: int
    steps: int  # of fine-tuning
    longer: int  # steps of fresh-longer

    def file(self, part: str) -> Path:
        return self.folder / f"{self.name}-{part}.jsonl"


def tasks(out: Path) -> dict[str, Task]:
    """Return the tasks by name. The rows of `descriptions` are made in `out`."""
    molecules = Task(
        "molecules",
        MOLECULES,
        max_length=128,
        heads_length=128,
        answer_length=64,
        steps=150,
        longer=225,
    )
    descriptions = Task(
        "descriptions",
        out / "data",
        max_length=160,
        heads_length=192,
        answer_length=80,
        steps=100,
        longer=175,
    )
    return {task.name: task for task in (molecules, descriptions)}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="the base model's folder")
    parser.add_argument(
        "--steps", type=int, help="of fine-tuning, 8 rows each (default: the task's, 150 or 100)"
    )
    parser.add_argument(
        "--further", type=int, default=75, help="steps on own answers, 16 rows each (default: 75)"
    )
    parser.add_argument(
        "--longer", type=int, help="the same, for fresh-longer (default: the task's, 225 or 175)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/decoding"))


def make(options: argparse.Namespace, task: Task, *wanted: str) -> dict[str, Path]:
    """Make the wanted folders of a task, and what they start from. Return them by name."""
    folder = options.out / task.name
    paths = {name: folder / name for name in (TUNED, FURTHER, PLAIN_MODEL, FRESH, FRESH_LONGER)}
    if not task.file("train").is_file():
        run(str(HERE / "descriptions.py"), str(task.folder))
    if not has_heads(paths[TUNED]) and {TUNED, FURTHER} & {*wanted}:
        fine_tune(options, task, paths[TUNED], ROOT / "trl_examples" / "sft.py", num_heads=4)
    if not (paths[PLAIN_MODEL] / "config.json").is_file() and {FRESH, FRESH_LONGER} & {*wanted}:
        fine_tune(options, task, paths[PLAIN_MODEL], HERE / "plain_sft.py")
    starts = {
        FURTHER: (TUNED, {"heads": paths[TUNED], "steps": options.further}),
        FRESH: (PLAIN_MODEL, {"steps": options.further}),
        FRESH_LONGER: (PLAIN_MODEL, {"steps": options.longer or task.longer}),
    }
    for name, (model, settings) in starts.items():
        if name in wanted and not has_heads(paths[name]):
            train_heads(task, paths[model], paths[name], **settings)
    return paths


def fine_tune(
    options: argparse.Namespace, task: Task, folder: Path, script: Path, **more: Any
) -> None:
    """Fine-tune fully, at the learning rate that the study has chosen."""
    steps = options.steps or task.steps
    settings = {
        "model_name_or_path": options.model,
        "dataset_name": task.file("train"),
        "learning_rate": 4e-4,
        "lr_scheduler_type": "linear",
        "max_steps": steps,
        "warmup_steps": round(0.05 * steps),
        "per_device_train_batch_size": BATCH,
        "max_length": task.max_length,
        "weight_decay": 0,
        "dtype": "float32",
        "bf16": quick_dtype() == torch.bfloat16,
        "report_to": "none",
        "save_strategy": "no",
        "output_dir": folder,
        **more,
    }
    flags = [] if torch.accelerator.is_available() else ["--use_cpu"]
    run(str(script), *as_options(settings), *flags)


def train_heads(task: Task, model: Path, folder: Path, **more: Any) -> None:
    """Train heads on the model's own answers to the first prompts of the training file."""
    folder.mkdir(parents=True, exist_ok=True)
    asked = folder / "asked.jsonl"
    with open(task.file("train")) as lines:
        asked.write_text("".join(itertools.islice(lines, ASKED)))
    settings = {
        "model": model,
        "data": asked,
        "output": folder,
        "targets": "model",
        "max-new-tokens": task.answer_length,
        "generation-batch-size": 64,
        "max-length": task.heads_length,
        "batch-size": FURTHER_BATCH,
        "learning-rate": 5e-4,
        "save-steps": 1000,
        **more,
    }
    flags = [] if quick_dtype() == torch.bfloat16 else ["--float32"]
    run("-m", "caft_plugin.tools.cli", "pretrain-heads", *as_options(settings), *flags)


def has_heads(folder: Path) -> bool:
    return (folder / "caft_heads" / "config.json").is_file()


def as_options(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def run(*command: str) -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, *command], check=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes: {' '.join(command)}", flush=True)
