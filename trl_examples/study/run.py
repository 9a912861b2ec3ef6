"""One run of the studies: trains one arm with one seed, measures it and adds a line to results.jsonl.

    python trl_examples/study/run.py --task few --arm caft --seed 0

Tasks, arms and seeds are those of design2.py and, of the first study, of design.py. The model is what
axolotl_configs/make_base_model.py leaves in outputs/smollm2-135m-instruct. Settings are chosen by runs of the tasks
`...-pilot` and `rates-...`, heads are made by runs of the tasks `few-heads` and `stage1`; `make study` does all of it
in the right order. A run that was interrupted leaves nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import data
import design
import design2
import results

from caft_plugin.precision import cpu_has_bf16

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "outputs" / "smollm2-135m-instruct"
HEADS = ROOT / "outputs" / "study" / "heads"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "rdkit", "caft_plugin")


def training_rows(task: design.Task, steps: int, batch: int, seed: int, lengths: Sequence[int]) -> list[int]:
    """Which rows a run sees, in order: `batch` of them at a step. It depends on the seed alone, so that arms are
    paired; more steps go on where fewer stop.

    Each epoch is a shuffle. Within windows of eight batches rows of like length come together, to save padding.
    """
    draw = random.Random(seed)
    chosen = draw.sample(range(len(lengths)), task.rows or len(lengths))
    batches: list[list[int]] = []
    while len(batches) < steps:
        epoch = draw.sample(chosen, len(chosen))
        for start in range(0, len(epoch), 8 * batch):
            window = sorted(epoch[start : start + 8 * batch], key=lambda i: (lengths[i], i))
            whole = [window[i : i + batch] for i in range(0, len(window) - batch + 1, batch)]
            batches += draw.sample(whole, len(whole))
    return [i for one in batches[:steps] for i in one]


def train_and_measure(run: design.Run, settings: dict[str, Any], sizes: design.Sizes, folder: Path) -> dict[str, Any]:
    """A line's figures: metrics, marks, loss curve, tokens, seconds. `folder` is for what the trainer writes."""
    import measure
    import torch
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig

    from caft_plugin import CAFTConfig, MEAPConfig
    from caft_plugin.trl import CAFTSFTTrainer

    torch.set_num_threads(settings["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    task = design.TASKS[run.task]
    arm, full = task.arm(run.arm), settings["method"] == "full"
    half = settings["dtype"] != design.FLOAT32
    tokenizer = AutoTokenizer.from_pretrained(MODEL)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16 if half and not full else torch.float32)

    rows = data.read(f"{task.data}-train")
    heldout = data.read(f"{task.data}-heldout")
    marked = measure.asked(tokenizer, heldout[: sizes.marked]) if task.marks else []
    steps, batch = settings["steps"], settings["batch"]
    figures: dict[str, Any] = {"marks": [], "curve": [], "tokens": 0, "train_seconds": 0.0}

    class Marks(TrainerCallback):
        """Follows the held-out loss; the seconds that this takes are none of training's."""

        def __init__(self) -> None:
            self.at = {round(steps * i / task.marks) for i in range(1, task.marks + 1)} if task.marks else set()
            self.outside = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step in self.at:
                began = time.perf_counter()
                loss = measure.mean_loss(measure.judge(model, marked, tokenizer.pad_token_id))
                seconds = round(began - self.start - self.outside, 1)
                mark = {"step": state.global_step, "train_seconds": seconds, "loss": round(loss, 6)}
                figures["marks"].append(mark)
                self.outside += time.perf_counter() - began

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            figures["train_seconds"] = round(time.perf_counter() - self.start - self.outside, 1)

    if steps:
        content = ("text",) if "text" in rows[0] else ("prompt", "completion")
        lengths = [sum(len(tokenizer(row[key]).input_ids) for key in content) for row in rows]
        separate = settings["meap"] is not None and settings["meap"]["layout"] == "separate"
        examples = batch // 2 if separate else batch  # the trainer puts each one's copy behind it
        order = training_rows(task, steps, examples, run.seed, lengths)
        model = load()
        if full:  # as the authors do; SmolLM2 ties the two
            model.get_input_embeddings().requires_grad_(False)
        caft = None
        if settings["caft"] is not None:
            heads = None if arm.heads is None else str(HEADS / arm.heads)
            caft = CAFTConfig(**{**settings["caft"], "heads": heads})
        set_seed(run.seed)  # TRL draws the adapter before its own seed is set
        trainer = CAFTSFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(folder),
                max_steps=steps,
                per_device_train_batch_size=batch,
                train_sampling_strategy="sequential",
                max_length=settings["max_length"],
                learning_rate=settings["learning_rate"],
                warmup_steps=settings["warmup_steps"],
                **{key: settings[key] for key in design.TRAINING},
                bf16=half,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=sizes.log_every,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=run.seed,
            ),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{key: rows[i][key] for key in content} for i in order]),
            peft_config=None if full else LoraConfig(task_type="CAUSAL_LM", **design.LORA),
            caft=caft,
            meap=None if settings["meap"] is None else MEAPConfig(**settings["meap"]),
            callbacks=[Marks()],
        )
        trainer.train()
        for entry in trainer.state.log_history:
            if "loss" in entry:
                losses = {key: round(entry[key], 6) for key in entry if key == "loss" or key.startswith("caft/")}
                figures["curve"].append({"step": entry["step"], **losses})
                figures["tokens"] = int(entry["num_tokens"])
        trainer.save_model()
        del trainer, model

    # What is measured is what a user gets: the saved model, loaded anew, without heads.
    if steps and full:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(load(), folder) if steps else load()
    model.eval()
    metrics: dict[str, float] = {}
    if "validation" in task.measures:
        questions = measure.asked(tokenizer, data.read(f"{task.data}-validation")[: sizes.validation])
        metrics["validation_loss"] = measure.mean_loss(measure.judge(model, questions, tokenizer.pad_token_id))
    if "loss" in task.measures:
        questions = measure.asked(tokenizer, heldout[: sizes.heldout])
        metrics["heldout_loss"] = measure.mean_loss(measure.judge(model, questions, tokenizer.pad_token_id))
    if "generation" in task.measures:
        shown = heldout[: sizes.generated]
        written = measure.write(model, tokenizer, [row["prompt"] for row in shown])
        metrics |= measure.molecule_metrics(written, [row["smiles"] for row in shown])
    if {"mdqa", "needle"} & set(task.measures):
        records = data.read("records-heldout")
        if "mdqa" in task.measures:
            cells = measure.document_questions(records, sizes.document_questions)
            metrics |= measure.retrieval_metrics(model, tokenizer, cells, "mdqa")
        plain = task.data == "passages"
        cells = measure.needle_questions(tokenizer, records, plain, sizes.needle_questions)
        metrics |= measure.retrieval_metrics(model, tokenizer, cells, "needle")
    return {"metrics": {key: round(value, 6) for key, value in metrics.items()}, **figures}


def make_heads(
    settings: dict[str, Any], rows: Sequence[data.Row], out: Path, float32: bool, threads: int | None = None
) -> dict[str, Any]:
    """Stage 1 by the shipped command, anew; the figures are those that it leaves beside the heads."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    file = out / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = {key: value for key, value in settings.items() if key not in ("model", "threads", "dtype", "rows")}
    command = [sys.executable, "-m", "caft_plugin.tools.cli", "pretrain-heads", "--model", str(MODEL)]
    command += ["--data", str(file), "--output", str(out)]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    command += ["--float32"] if float32 else []
    environment = {**os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}
    start = time.perf_counter()
    subprocess.run(command, check=True, env=environment)
    seconds = time.perf_counter() - start
    found = json.loads((out / "caft_heads" / "metrics.json").read_text())
    metrics = {
        f"{when}_{what}_head_{k}": round(head[what], 6)
        for when, heads in (("untrained", found["untrained"]), ("trained", found["heads"]))
        for k, head in enumerate(heads, 1)
        for what in ("loss", "accuracy")
    }
    return {"metrics": metrics, "marks": [], "curve": [], "tokens": None, "train_seconds": round(seconds, 1)}


def heads_are_there(kind: str) -> bool:
    return (HEADS / kind / "caft_heads" / "metrics.json").is_file()


def processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name")), "")


def commit() -> str:
    """The commit of the code, and whether code was changed since."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)

    head = git("rev-parse", "HEAD").stdout.strip()
    if not head:  # a copy without its history
        return os.environ.get("STUDY_COMMIT", "unknown")
    return head + ("-changed" if git("diff", "--quiet", "HEAD", "--", "*.py").returncode != 0 else "")


def do(
    run: design.Run,
    file: Path = results.FILE,
    sizes: design.Sizes = design.SIZES,
    changes: dict[str, Any] | None = None,
) -> results.Line:
    """Does a run of the first study and adds its line, unless it is there already (then only heads that are gone are
    made again). A test makes runs small with `sizes` and `changes` to the settings.

    Raises:
        ValueError: the run is not declared, or one that it needs has not been done.
    """
    lines = results.read(file)
    settings = {**design.settings(run, lines), **(changes or {})}
    if not cpu_has_bf16():
        settings["dtype"] = design.FLOAT32
    arm = design.TASKS[run.task].arm(run.arm)
    if arm.heads is not None and not heads_are_there(arm.heads):
        raise ValueError(
            f"arm {run.arm} starts from heads that are not in {HEADS / arm.heads}: run.py --task stage1 --arm "
            f"{arm.heads} --seed 0 makes them (make study does it)"
        )
    digest = data.prepare()
    start = time.perf_counter()
    if run.task == "stage1":
        rows = data.read("stage1")[: sizes.stage1]
        float32 = settings.get("dtype") == design.FLOAT32
        figures = make_heads(settings, rows, HEADS / run.arm, float32, settings["threads"])
    else:
        with tempfile.TemporaryDirectory(prefix="caft-study-") as folder:
            figures = train_and_measure(run, settings, sizes, Path(folder))
    line = line_of(run, figures, settings, digest, time.perf_counter() - start)
    if run not in {results.run_of(one) for one in lines}:
        results.add(line, file)
    return line


def measured(
    run: design.Run,
    lines: Sequence[results.Line],
    sizes: design2.Sizes = design2.SIZES,
    changes: dict[str, Any] | None = None,
) -> results.Line:
    """Does a run of the second study: its line, which is not added anywhere. `lines` hold the pilots.

    Raises:
        ValueError: the run is not declared, or one that it needs has not been done.
    """
    import run2
    import torch

    settings = {**design2.settings(run, lines), **(changes or {})}
    if settings.get("heads") is not None and not heads_are_there(settings["heads"]):
        raise ValueError(f"heads are not in {HEADS / settings['heads']}: run.py --task few-heads --arm few-heads")
    digest = data.prepare()
    start = time.perf_counter()
    if run.task == "few-heads":
        rows = data.read("molecules-train")[: settings["rows"]]
        figures = make_heads(settings, rows, HEADS / run.arm, run2.dtype() != "bfloat16")
    else:
        with tempfile.TemporaryDirectory(prefix="caft-study-") as folder:
            figures = run2.do(run, settings, sizes, Path(folder), run2.Places(MODEL, HEADS))
    figures["dtype"] = run2.dtype()
    line = line_of(run, figures, settings, digest, time.perf_counter() - start)
    if torch.cuda.is_available():
        line["processor"] = torch.cuda.get_device_name()
    return line


def line_of(
    run: design.Run, figures: dict[str, Any], settings: dict[str, Any], digest: str, seconds: float
) -> results.Line:
    metrics = figures.pop("metrics")
    return {
        **run._asdict(),
        "metrics": {key: round(value, 6) for key, value in metrics.items()},
        "wall_seconds": round(seconds, 1),
        **figures,
        "settings": settings,
        "data": digest,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "processor": processor(),
        "commit": commit(),
    }


def check(run: design.Run) -> None:
    """Raises ValueError where a run is not declared in design.py or design2.py."""
    tasks: dict[str, Any] = {**design2.TASKS, **design.TASKS}
    if run.task not in tasks:
        raise ValueError(f"--task: got {run.task!r}, but it takes one of {', '.join(tasks)}")
    names = [arm.name for arm in tasks[run.task].arms]
    if run.arm not in names:
        raise ValueError(f"--arm: got {run.arm!r}, but task {run.task} takes one of {', '.join(names)}")
    runs = [*design.plan(), *design2.declared()]
    if run not in runs:
        raise ValueError(
            f"--seed: got {run.seed}, but {run.task} {run.arm} takes one of "
            f"{', '.join(str(one.seed) for one in runs if one[:2] == run[:2])}"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True)
    parser.add_argument("--arm", required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=results.FILE, help="file that gets the line")
    options = parser.parse_args(arguments)
    run = design.Run(options.task, options.arm, options.seed)
    try:
        check(run)
        if not (MODEL / "config.json").is_file():
            raise ValueError(f"{MODEL} is not there: python axolotl_configs/make_base_model.py --out {MODEL}")
        lines = results.read(options.results)
        if run.task not in ("stage1", "few-heads") and run in map(results.run_of, lines):
            raise ValueError(f"{options.results} has this run already. Delete its line to do it again.")
        if run.task in design2.TASKS:
            line = measured(run, lines)
            if run not in map(results.run_of, lines):
                results.add(line, options.results)
        else:
            line = do(run, options.results)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps({key: line[key] for key in ("task", "arm", "seed", "metrics", "wall_seconds", "train_seconds")}))
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.exit(main())
