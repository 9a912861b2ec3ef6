"""Stage 1 compared: heads untrained and trained on each kind of target, at equal wall time.

    python tests/benchmarks/stage1.py --model outputs/smollm2-135m-instruct
        --seconds 240 --seeds 0 1

With --heads, training continues from these heads instead, on a fine-tuned model (--model) and with
greedy answers, to find what improves heads as drafters. The time includes generation of the answers
(`model`). Every kind is measured on the same held-out prompts, with the model's answers and with
the data's own. Prints Markdown; each run adds a JSON line to --results, and runs that are already
there are skipped.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, TrainerCallback, TrainingArguments

from caft_plugin.config import CAFTConfig, PretrainConfig
from caft_plugin.model.loading import load_model
from caft_plugin.precision import choice, quick_dtype
from caft_plugin.stage1.answers import write_answers
from caft_plugin.stage1.data import pad_rows, prompt_of, read_rows, with_answer
from caft_plugin.stage1.pretraining import HeadsTrainer, Stage1, pretrain_heads

DATA = Path(__file__).parents[2] / "axolotl_configs" / "data"
KINDS = ("untrained", "model", "dataset", "distribution")


class StopAfter(TrainerCallback):
    """End training at the deadline, which counts from the start of the run."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = time.monotonic() >= self.deadline


def arguments(folder: str, seed: int, steps: int = 100_000) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        use_cpu=not torch.accelerator.is_available(),
        bf16=quick_dtype() == torch.bfloat16,
        max_steps=steps,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        learning_rate=1e-3,  # high, because the runs are short
        lr_scheduler_type="constant",
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        seed=seed,
        disable_tqdm=True,
    )


def run(kind: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = read_rows(DATA / "molecules-train.jsonl", tokenizer, 256)
    heldout = read_rows(DATA / "molecules-heldout.jsonl", tokenizer, 256)[:64]
    sampling = {} if options.heads else {"temperature": 0.7, "top_p": 0.95}
    settings = PretrainConfig(max_new_tokens=48, generation_batch_size=32, **sampling)
    start_from: dict[str, Any] = {"heads": options.heads} if options.heads else {}
    base = load_model(options.model, quick_dtype(), for_heads=True)
    base.eval()
    prompts = [prompt_of(row) for row in heldout]
    said = write_answers(base, tokenizer, prompts, settings, options.heldout_answers, options.model)
    sets = {
        "model": [with_answer(p, a) for p, a in zip(prompts, said, strict=True)],
        "dataset": heldout,
    }

    with tempfile.TemporaryDirectory() as folder:
        caft: dict[str, Any] = {"train_heads": "frozen", "beta": 1.0, **start_from}
        steps = 0
        start = time.monotonic()
        if kind != "untrained":
            config = settings.model_copy(update={"targets": kind, "seed": seed})
            shown = rows[: options.prompts] if kind == "model" else rows
            stop = StopAfter(start + options.seconds)
            job = Stage1(
                base,
                tokenizer,
                shown,
                [],
                arguments(folder, seed),
                CAFTConfig(**start_from),
                config,
                options.model,
                [stop],
            )
            heads = pretrain_heads(job)
            steps = json.loads((heads / "metrics.json").read_text())["steps"]
            caft["heads"] = str(heads)
        seconds = time.monotonic() - start
        fresh = load_model(options.model, quick_dtype(), for_heads=True)
        trainer = HeadsTrainer(
            model=fresh,
            args=arguments(folder, seed),
            data_collator=lambda batch: pad_rows(batch, tokenizer.pad_token_id),
            eval_dataset=sets["model"],
            caft=caft,
        )
        found = {name: trainer.evaluate(eval_dataset=data) for name, data in sets.items()}
    figures = {
        name: [
            [metrics[f"eval_caft/{what}_head_{k}"] for what in ("loss", "accuracy")]
            for k in range(1, 5)
        ]
        for name, metrics in found.items()
    }
    drafts = {name: metrics["eval_caft/tokens_per_pass"] for name, metrics in found.items()}
    return {
        "kind": kind,
        "seed": seed,
        "seconds": round(seconds),
        "steps": steps,
        "figures": figures,
        "drafts": drafts,
    }


def table(results: list[dict[str, Any]], against: str) -> str:
    columns = ["steps", "head 1", "head 2", "head 3", "head 4", "tokens per step"]
    lines = [f"| held out: {against} | {' | '.join(columns)} |", "| --- " * 7 + "|"]
    for kind in KINDS:
        runs = [r for r in results if r["kind"] == kind]
        if runs:
            cells = []
            for k in range(4):
                losses, right = zip(*(r["figures"][against][k] for r in runs), strict=True)
                spread = f" (spread {max(losses) - min(losses):.3f})" if len(losses) > 1 else ""
                cells.append(f"{statistics.mean(losses):.3f}{spread}, {statistics.mean(right):.1%}")
            cells.append(f"{statistics.mean(r['drafts'][against] for r in runs):.2f}")
            steps = ", ".join(str(r["steps"]) for r in runs)
            lines.append(f"| {kind} | {steps} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--heads", help="continue from these heads")
    parser.add_argument("--seconds", type=int, default=240)
    parser.add_argument(
        "--prompts", type=int, default=256, help="prompts that the base answers for `model`"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--results", type=Path, default=Path("outputs/stage1.jsonl"))
    options = parser.parse_args()
    options.results.parent.mkdir(parents=True, exist_ok=True)
    options.heldout_answers = options.results.with_suffix(".answers.jsonl")
    results = (
        [json.loads(line) for line in options.results.read_text().splitlines()]
        if options.results.exists()
        else []
    )
    print(choice())
    for seed in options.seeds:
        for kind in KINDS:
            if kind == "untrained" and seed != options.seeds[0]:
                continue  # nothing random in it
            if not any(r["kind"] == kind and r["seed"] == seed for r in results):
                results.append(run(kind, seed, options))
                with open(options.results, "a") as file:
                    file.write(json.dumps(results[-1]) + "\n")
    for against in ("model", "dataset"):
        print(table(results, against) + "\n")
    print("Mean loss in nats and top-1 accuracy over seeds.")


if __name__ == "__main__":
    main()
