"""What heads bring as drafters: tokens a pass and a second, beside plain generation and prompt lookup. `make
bench-decoding`.

    python tests/benchmarks/decoding.py --model outputs/smollm2-135m-instruct [--steps 150] [--boost 250]
        [--prompts 200] [--out outputs/decoding]

The commands of the README, each done only if its folder is not there yet: full fine-tuning with heads on the molecules
(trl_examples/sft_caft.py), then `caft pretrain-heads` on the tuned model's own answers. Then greedy and sampled texts
to held-out prompts, in float32, plain, with the heads of both and with untrained ones, and with prompt lookup, all in
turn; and what a pass of 1 to 5 positions costs. Prints Markdown, and keeps the figures in OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from caft_plugin import CAFTConfig, Drafter
from caft_plugin.heads import build_heads, replay
from caft_plugin.heads_folder import resolve_wiring
from caft_plugin.pass_notes import noted_pass
from caft_plugin.precision import choice, quick_dtype
from caft_plugin.stage1.data import read_prompts
from caft_plugin.tools.speculate import PLAIN, Comparison, as_table, speculate
from caft_plugin.trunk import find_trunk

ROOT = Path(__file__).parents[2]
DATA = ROOT / "axolotl_configs" / "data"
TUNED, FURTHER, UNTRAINED = "heads as fine-tuned", "heads trained further", "untrained heads"
NEW_TOKENS = 80
RUN = 20  # prompts: the unit whose speeds the medians are over
WIDTHS = range(1, 6)


def fine_tune(options: argparse.Namespace, folder: Path) -> None:
    """Full fine-tuning at the rate that the study has chosen, heads trained beside it."""
    settings = {
        "model_name_or_path": options.model,
        "dataset_name": DATA / "molecules-train.jsonl",
        "learning_rate": 4e-4,
        "lr_scheduler_type": "linear",
        "max_steps": options.steps,
        "warmup_steps": round(0.05 * options.steps),
        "per_device_train_batch_size": 8,
        "max_length": 128,
        "weight_decay": 0,
        "dtype": "float32",
        "bf16": quick_dtype() == torch.bfloat16,
        "report_to": "none",
        "save_strategy": "no",
        "num_heads": 4,
        "output_dir": folder,
    }
    flags = [] if torch.accelerator.is_available() else ["--use_cpu"]
    run([str(ROOT / "trl_examples" / "sft_caft.py"), *as_options(settings), *flags])


def train_further(options: argparse.Namespace, tuned: Path, folder: Path) -> None:
    settings = {
        "model": tuned,
        "heads": tuned,
        "data": DATA / "molecules-train.jsonl",
        "output": folder,
        "targets": "model",
        "max-new-tokens": 64,
        "generation-batch-size": 64,
        "max-length": 128,
        "steps": options.boost,
        "batch-size": 16,
        "learning-rate": 5e-4,
        "save-steps": 100,
    }
    flags = [] if quick_dtype() == torch.bfloat16 else ["--float32"]
    run(["-m", "caft_plugin.tools.cli", "pretrain-heads", *as_options(settings), *flags])


def make_heads(options: argparse.Namespace) -> dict[str, Path]:
    """Make the folders of the tuned model and of its heads trained further, each only if it is not there yet."""
    tuned, further = options.out / "tuned", options.out / "boosted"
    if not has_heads(tuned):
        fine_tune(options, tuned)
    if not has_heads(further):
        train_further(options, tuned, further)
    return {TUNED: tuned, FURTHER: further}


def has_heads(folder: Path) -> bool:
    return (folder / "caft_heads" / "config.json").is_file()


def as_options(settings: dict[str, Any]) -> list[str]:
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def run(command: list[str]) -> None:
    began = time.monotonic()
    subprocess.run([sys.executable, *command], check=True)
    print(f"{(time.monotonic() - began) / 60:.1f} minutes: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)


def untrained(model: Any, num_heads: int) -> Drafter:
    config = resolve_wiring(CAFTConfig(num_heads=num_heads, train_heads="frozen"), None)
    return Drafter(model, build_heads(model, find_trunk(model), config, seed=0), config)


def add(sum_: Comparison | None, found: Comparison) -> Comparison:
    """Runs over some prompts and runs over others."""
    if sum_ is None:
        return found
    for name, way in sum_.ways.items():
        other = found.ways[name]
        way.tokens += other.tokens
        way.seconds += other.seconds
        way.passes += other.passes
        way.same += other.same
        if way.drafted is not None and other.drafted is not None:
            way.drafted += other.drafted
        if way.steps is not None and other.steps is not None:
            way.steps += other.steps
    sum_.texts += found.texts
    return sum_


def compare(
    model: Any,
    tokenizer: Any,
    drafters: dict[str, Drafter],
    prompts: Sequence[list[int]],
    temperature: float,
    lookup: bool,
) -> Comparison:
    found: Comparison | None = None
    for first in range(0, len(prompts), RUN):
        part = speculate(
            model,
            tokenizer,
            drafters,
            prompts[first : first + RUN],
            max_new_tokens=NEW_TOKENS,
            runs=1,
            temperature=temperature,
            seed=first,
            lookup=lookup,
        )
        found = add(found, part)
    assert found is not None
    machine = found.written.splitlines()[1]
    return dataclasses.replace(found, written=f"{len(prompts)} prompts, speeds of runs of {RUN}\n{machine}")


def median_ms(function: Callable[[], object], times: int = 25) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return 1000 * statistics.median(taken)


@torch.no_grad()
def costs(drafter: Drafter, model: Any) -> str:
    """Of a pass over 1 to 5 positions behind 60: the model, as many heads as it has drafts, and their logits."""
    trunk, heads = drafter.trunk, drafter.heads.layers
    last = len(trunk.layers) - 1
    caches = [DynamicCache(config=model.config) for _ in range(1 + len(heads))]
    lines = ["| positions | pass, ms | against one | drafts | their heads, ms | their logits, ms |", "| --- " * 6 + "|"]
    first = 0.0
    with noted_pass(trunk, eager=False) as noted:
        for cache in caches:
            cache.activate_past_recording()
        ids = torch.randint(5, model.config.vocab_size, (1, 60), device=model.device)
        model(input_ids=ids, past_key_values=caches[0])
        at = torch.tensor([ids.shape[1] - 1], device=model.device)
        for layer, cache in zip(heads, caches[1:], strict=True):
            replay(layer, noted.call.hidden_states, noted.call, at, cache)  # type: ignore[union-attr]

        def of_heads(number: int, width: int) -> None:
            at = torch.tensor([width - 1], device=model.device)
            for layer, cache in zip(heads[:number], caches[1:], strict=False):
                source = noted.call.hidden_states  # type: ignore[union-attr]
                replay(layer, source, noted.call, at, cache)  # type: ignore[arg-type]
                cache.layers[last].crop(-width)  # type: ignore[attr-defined]

        for width in WIDTHS:

            def one_pass(width: int = width) -> None:
                model(input_ids=ids[:, :width], past_key_values=caches[0], logits_to_keep=width)
                caches[0].crop(-width)

            def their_heads(width: int = width) -> None:
                of_heads(width - 1, width)

            hidden = torch.randn(max(width - 1, 1), trunk.hidden_size, device=model.device)
            one_pass()
            own = median_ms(one_pass)
            first = first or own
            drafts = ["-", "-"]
            if width > 1:
                drafts = [f"{median_ms(their_heads):.1f}", f"{median_ms(lambda: trunk.logits(hidden)):.1f}"]  # noqa: B023
            lines.append(f"| {width} | {own:.1f} | {own / first:.2f} | {width - 1} | {drafts[0]} | {drafts[1]} |")
    return "\n".join(lines)


def markdown(found: Comparison) -> str:
    lines = ["| | tokens a pass | tokens a second | against plain | same text |", "| --- " * 5 + "|"]
    for name, way in found.ways.items():
        same = "" if name == PLAIN else f"{way.same} of {found.texts}"
        speed = statistics.median(way.speeds())
        against = way.against(found.ways[PLAIN])
        lines.append(f"| {name} | {way.tokens_per_pass:.2f} | {speed:.1f} | {against:.2f} | {same} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the base model's folder")
    parser.add_argument("--steps", type=int, default=150, help="of fine-tuning, 8 rows each (default: %(default)s)")
    parser.add_argument("--boost", type=int, default=250, help="steps on the model's own answers, 16 rows each")
    parser.add_argument("--prompts", type=int, default=200, help="held-out prompts")
    parser.add_argument("--out", type=Path, default=Path("outputs/decoding"))
    options = parser.parse_args()
    print(choice())
    folders = make_heads(options)
    tuned = folders[TUNED]

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    model: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32).to(device).eval()
    prompts = read_prompts(DATA / "molecules-heldout.jsonl", tokenizer)[: options.prompts]

    def drafters(names: Sequence[str], **settings: Any) -> dict[str, Drafter]:
        return {name: Drafter.from_pretrained(model, folders[name], **settings) for name in names}

    kept = {}
    for title, ways, asked, temperature in (
        ("greedy", {**drafters([TUNED, FURTHER]), UNTRAINED: untrained(model, 4)}, prompts, 0.0),
        ("sampled", drafters([FURTHER]), prompts, 0.7),
        (
            "greedy, 4 guesses in every round",
            drafters([TUNED, FURTHER], num_draft=4),
            prompts[: len(prompts) // 2],
            0.0,
        ),
    ):
        found = compare(model, tokenizer, ways, asked, temperature, lookup=title == "greedy")
        kept[title] = dataclasses.asdict(found)
        print(f"\n## {title}\n\n{as_table(found)}\n\n{markdown(found)}\n", flush=True)
    (options.out / "figures.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(costs(Drafter.from_pretrained(model, folders[FURTHER]), model))


if __name__ == "__main__":
    main()
