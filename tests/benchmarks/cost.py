"""The cost of CAFT compared with plain fine-tuning and the authors' package, and its scaling. `make
bench`.

    python tests/benchmarks/cost.py --model outputs/smollm2-135m-instruct
        [--newest .venv-trl/bin/python]
        [--official .venv-official/bin/python] [--only NAME ...] [--steps 9] [--out outputs/bench]

Each run of a comparison is a separate process. The runs alternate their steps (A B A B), one at a
time, so that other work on the machine affects all of them equally. Prints medians with quartiles,
ratios of paired steps, and peak memory: of tensors on a GPU, of the process on a CPU. Uses CUDA if
there is a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from caft_plugin.precision import choice, quick_dtype

HERE = Path(__file__).parent
WARM_UP = 2
SHAPE = {"batch": 4, "length": 512, "supervised": 0.3}
ONE = {"heads_per_step": 1}


@dataclasses.dataclass
class Comparison:
    """Runs that alternate their steps; the others are relative to the first. `limits` are the
    project's targets for step time and memory."""

    title: str
    runs: dict[str, dict[str, Any]]
    limits: dict[str, tuple[float, float]]
    python: str = "this"


def sft(
    how: str, title: str, limits: tuple[float, float, float], python: str = "this"
) -> Comparison:
    base = {"door": "sft", "how": how, **SHAPE}
    runs = {
        "plain": base,
        "4 heads": {**base, "caft": {}},
        "one head a step": {**base, "caft": ONE},
    }
    return Comparison(title, runs, {"4 heads": limits[::2], "one head a step": limits[1:]}, python)  # type: ignore[dict-item]


def comparisons() -> dict[str, Comparison]:
    axolotl = {"door": "axolotl", "how": "lora", **SHAPE}
    trl = {"door": "sft", **SHAPE}
    official = {"door": "official", **SHAPE}
    bare = {"args": {"bf16": False}}  # half-precision weights without autocast
    return {
        "lora": sft("lora", "SFTTrainer (TRL 1.9, chunked_nll), LoRA", (1.40, 1.10, 1.10)),
        "qlora": sft("qlora", "SFTTrainer (TRL 1.9, chunked_nll), QLoRA", (1.40, 1.10, 1.10)),
        "full": sft(
            "full", "SFTTrainer (TRL 1.9, chunked_nll), full fine-tuning", (1.50, 1.15, 1.15)
        ),
        "newest": sft(
            "lora",
            "SFTTrainer (TRL 1.16 with default settings), LoRA",
            (1.30, 1.05, 1.10),
            "newest",
        ),
        "axolotl": Comparison(
            "axolotl train, LoRA",
            {
                "plain": axolotl,
                "4 heads": {**axolotl, "caft": {}},
                "4 heads, fused_loss": {**axolotl, "caft": {"fused_loss": "on"}},
                "one head a step, fused_loss": {**axolotl, "caft": {**ONE, "fused_loss": "on"}},
            },
            {"4 heads, fused_loss": (1.0, 1.0)},
        ),
        "official": Comparison(
            "caft-llm 0.0.1 on torch 2.5.1, LoRA",
            {
                "caft-llm": {**official, "how": "lora", "caft": {"caft_num_heads": 4}},
                "its plain step": {**official, "how": "lora"},
                "SFTTrainer (TRL 1.9), 4 heads": {
                    **trl,
                    "how": "lora",
                    "caft": {},
                    "python": "this",
                },
            },
            {"SFTTrainer (TRL 1.9), 4 heads": (0.30, 0.60)},
            "official",
        ),
        "official-full": Comparison(
            "caft-llm 0.0.1 on torch 2.5.1, full fine-tuning, without autocast",
            {
                "caft-llm": {**official, **bare, "how": "full", "caft": {"caft_num_heads": 4}},
                "its plain step": {**official, **bare, "how": "full"},
                "SFTTrainer (TRL 1.9), 4 heads": {
                    **trl,
                    **bare,
                    "how": "full",
                    "caft": {},
                    "python": "this",
                },
            },
            {"SFTTrainer (TRL 1.9), 4 heads": (0.30, 0.60)},
            "official",
        ),
    }


# A model of random weights, small enough that its longest step takes seconds; one thing is varied
# at a time.
SMALL = {
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
USUAL = {"heads": 4, "vocabulary": 32_768, "supervised": 0.3, "length": 512}
AXES = {
    "heads": [1, 2, 4, 8],
    "vocabulary": [32_768, 65_536, 131_072, 262_144],
    "supervised": [0.1, 0.3, 0.6, 1.0],
    "length": [256, 512, 1024, 2048, 4096],
}


def at_point(axis: str, value: float) -> Comparison:
    point = {**USUAL, axis: value}
    model = {**SMALL, "vocab_size": point["vocabulary"], "max_position_embeddings": 4096}
    shape = {
        "batch": 2,
        "length": point["length"],
        "supervised": point["supervised"],
        "model": model,
    }
    base = {"door": "trainer", "how": "lora", **shape}
    caft = {"num_heads": point["heads"]}
    runs = {"plain": base, "heads": {**base, "caft": {**caft, "fused_loss": "on"}}}
    return Comparison(f"{axis} {value}", runs, {})


# -- running ---------------------------------------------------------------------------------------


def command(spec: dict[str, Any], python: str, folder: Path) -> list[str]:
    if spec["door"] != "axolotl":
        return [python, str(HERE / "arm.py"), json.dumps(spec)]
    sys.path.insert(0, str(HERE))
    from arm import STEPS, TARGETS, rows

    data = folder / "rows.jsonl"
    made = rows(40_000, spec["batch"] * STEPS // 10, spec["length"], spec["supervised"])
    data.write_text(
        "".join(
            json.dumps({**row, "attention_mask": [1] * len(row["labels"])}) + "\n" for row in made
        )
    )
    config: dict[str, Any] = {
        "base_model": str(Path(spec["model"]).resolve()),
        "plugins": ["caft_plugin", "pace.PacePlugin"],
        "datasets": [{"path": str(data), "ds_type": "json", "type": None}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(folder / "output"),
        "sequence_len": spec["length"],
        "micro_batch_size": spec["batch"],
        "gradient_accumulation_steps": 1,
        "max_steps": STEPS,
        "learning_rate": 5e-5,
        "optimizer": "adamw_torch",
        "lr_scheduler": "linear",
        "bf16": spec["dtype"] == "bfloat16",
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "attn_implementation": "sdpa",
        "adapter": "lora",
        "lora_r": 8,
        "lora_alpha": 16,
        "lora_target_modules": TARGETS,
    }
    if not torch.cuda.is_available():
        config |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
    if "caft" in spec:
        config["caft"] = spec["caft"]
    (folder / "config.yml").write_text(yaml.safe_dump(config))
    return [
        python,
        "-m",
        "axolotl.cli.main",
        "train",
        str(folder / "config.yml"),
        "--launcher",
        "python",
    ]


@dataclasses.dataclass
class Run:
    process: subprocess.Popen
    listener: Listener
    log: Any
    connection: Connection | None = None
    seconds: list[float] = dataclasses.field(default_factory=list)
    memory: int = 0

    def wait_for_start(self) -> None:
        self.listener._listener._socket.settimeout(1)  # type: ignore[attr-defined]
        while self.connection is None:
            if self.process.poll() is not None:
                raise SystemExit(f"a run stopped before its first step:\n{self.said()}")
            with contextlib.suppress(TimeoutError):
                self.connection = self.listener.accept()

    def step(self, counts: bool) -> None:
        assert self.connection is not None
        try:
            self.connection.send("go")
            seconds, self.memory = self.connection.recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"a run stopped in a step:\n{self.said()}") from None
        if counts:
            self.seconds.append(seconds)

    def said(self) -> str:
        self.log.seek(0)
        return self.log.read()[-3000:]


@contextlib.contextmanager
def launched(spec: dict[str, Any], python: str, **settings: str) -> Iterator[Run]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = {
            **os.environ,
            **settings,
            "CAFT_BENCH_SOCKET": str(folder / "socket"),
            "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
            "AXOLOTL_DO_NOT_TRACK": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        with (
            Listener(environment["CAFT_BENCH_SOCKET"], family="AF_UNIX") as listener,
            open(folder / "log", "w+") as log,
        ):
            process = subprocess.Popen(
                command(spec, python, folder),
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                # with whatever it starts itself, so that all of it can be ended
                start_new_session=True,
            )
            try:
                yield Run(process, listener, log)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def all_launched(
    comparison: Comparison, pythons: dict[str, str], model: str, **settings: str
) -> Iterator[dict[str, Run]]:
    with contextlib.ExitStack() as stack:
        runs = {}
        for name, spec in comparison.runs.items():
            python = pythons[spec.get("python", comparison.python)]
            spec = {"model": model, "dtype": str(quick_dtype()).removeprefix("torch."), **spec}
            runs[name] = stack.enter_context(launched(spec, python, **settings))
        for run in runs.values():
            run.wait_for_start()
        yield runs


def measured(
    comparison: Comparison, pythons: dict[str, str], model: str, steps: int
) -> dict[str, Run]:
    with all_launched(comparison, pythons, model) as runs:
        for step in tqdm(range(steps + WARM_UP), comparison.title, leave=False):
            order = list(runs.values())
            for run in order if step % 2 else order[::-1]:
                run.step(counts=step >= WARM_UP)
    if not torch.cuda.is_available():
        # glibc keeps what was freed, more or less of it by chance: up to half a GB. Told to keep
        # nothing, which takes time, a process is as large as what it holds.
        with all_launched(comparison, pythons, model, MALLOC_MMAP_THRESHOLD_="65536") as again:
            for name, run in again.items():
                run.step(counts=False), run.step(counts=False)
                runs[name].memory = run.memory
    return runs


# -- reporting -------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def ratios(run: Run, against: Run) -> list[float]:
    return [mine / theirs for mine, theirs in zip(run.seconds, against.seconds, strict=True)]


def table(comparison: Comparison, runs: dict[str, Run]) -> Iterator[str]:
    yield f"\n{comparison.title}\n"
    yield "| run | seconds per step | step time, x | at most | peak memory, GB | x | at most |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    first = next(iter(runs.values()))
    for name, run in runs.items():
        time, memory = (
            (f"{limit:.2f}" for limit in comparison.limits[name])
            if name in comparison.limits
            else ("", "")
        )
        if run is first:
            yield f"| {name} | {spread(run.seconds)} | 1 | | {run.memory / 1e9:.2f} | 1 | |"
        else:
            of_memory = f"{run.memory / 1e9:.2f} | {run.memory / first.memory:.2f}"
            yield (
                f"| {name} | {spread(run.seconds)} | {spread(ratios(run, first))} | {time} |"
                f" {of_memory} | {memory} |"
            )


def curves(found: dict[str, dict[float, dict[str, Run]]], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        2, len(found), figsize=(3.6 * len(found), 6), layout="constrained"
    )
    for column, (axis, points) in zip(axes.T, found.items(), strict=True):
        for name, label in (("plain", "plain Trainer"), ("heads", "with heads, fused_loss: on")):
            runs = [of_point[name] for of_point in points.values()]
            column[0].plot(
                list(points),
                [statistics.median(run.seconds) for run in runs],
                marker="o",
                label=label,
            )
            column[1].plot(
                list(points), [run.memory / 1e9 for run in runs], marker="o", label=label
            )
        column[0].set_ylabel("seconds per step")
        column[1].set_ylabel("peak memory, GB")
        column[1].set_xlabel(axis)
        for part in column:
            part.set_ylim(bottom=0)
    axes[0, 0].legend()
    figure.savefig(file, dpi=110)


def growth_table(found: dict[str, dict[float, dict[str, Run]]]) -> Iterator[str]:
    yield "\nScaling\n"
    yield "| | plain, s | with heads, s | plain, GB | with heads, GB |"
    yield "| --- | --- | --- | --- | --- |"
    for axis, points in found.items():
        for value, runs in points.items():
            seconds = " | ".join(f"{statistics.median(run.seconds):.2f}" for run in runs.values())
            memory = " | ".join(f"{run.memory / 1e9:.2f}" for run in runs.values())
            yield f"| {axis} {value} | {seconds} | {memory} |"


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        names = [
            line.split(":")[1].strip()
            for line in open("/proc/cpuinfo")
            if line.startswith("model name")
        ]
        name = names[0] if names else name
    return f"{name}, {torch.get_num_threads()} threads, no GPU"


def main() -> None:
    known = comparisons()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="outputs/smollm2-135m-instruct")
    parser.add_argument("--newest", help="python of an environment with the newest TRL")
    parser.add_argument("--official", help="python of an environment with caft-llm")
    parser.add_argument(
        "--only", nargs="+", choices=[*known, "growth"], help="some of the comparisons"
    )
    parser.add_argument(
        "--steps", type=int, default=9, help="measured steps of each run, after two to warm up"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    options = parser.parse_args()
    pythons = {"this": sys.executable, "newest": options.newest, "official": options.official}
    options.out.mkdir(parents=True, exist_ok=True)
    model = str(Path(options.model).resolve())
    with open(options.out / "tables.md", "a" if options.only else "w") as file:

        def say(lines: Iterator[str]) -> None:
            for line in lines:
                tqdm.write(line)
                file.write(line + "\n")
            file.flush()

        say(
            iter(
                [
                    f"\nMachine: {machine()}; torch {torch.__version__}; {options.steps} steps"
                    f" each, {choice()}"
                ]
            )
        )
        for name, comparison in known.items():
            if pythons[comparison.python] and (not options.only or name in options.only):
                say(table(comparison, measured(comparison, pythons, model, options.steps)))
        if not options.only or "growth" in options.only:
            once: dict[str, dict[str, Run]] = {}  # the usual point is on every axis
            found: dict[str, dict[float, dict[str, Run]]] = {axis: {} for axis in AXES}
            for axis, values in AXES.items():
                for value in values:
                    comparison = at_point(axis, value)
                    key = json.dumps(comparison.runs)
                    if key not in once:
                        once[key] = measured(comparison, pythons, model, options.steps)
                    found[axis][value] = once[key]
            say(growth_table(found))
            curves(found, options.out / "growth.png")


if __name__ == "__main__":
    main()
