"""What heads bring as drafters: tokens per step and speed, against plain generation and prompt
lookup. `make bench-decoding`.

    python tests/benchmarks/decoding.py --model outputs/smollm2-135m-instruct
        [--tasks molecules descriptions]
        [--prompts 60] [--out outputs/decoding]

Makes the models and heads of drafting_heads.py. Then writes greedy texts to held-out prompts in
float32: plain, with each set of heads and with prompt lookup, all in turn; on the first task also
with untrained heads, and sampled texts; and measures what a forward pass over 1 to 5 positions
costs. Prints Markdown, and keeps the figures in OUT.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from drafting_heads import (
    FRESH,
    FRESH_LONGER,
    FURTHER,
    PLAIN_MODEL,
    TUNED,
    Task,
    add_options,
    make,
    tasks,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from caft_plugin import CAFTConfig, Drafter
from caft_plugin.caft.heads import build_heads, replay
from caft_plugin.caft.heads_folder import resolve_wiring
from caft_plugin.drafting.pass_notes import noted_pass
from caft_plugin.model.trunk import find_trunk
from caft_plugin.precision import choice
from caft_plugin.stage1.data import read_prompts
from caft_plugin.tools.speculate import PLAIN, Comparison, as_table, speculate

NEW_TOKENS = 80
UNTRAINED = "untrained heads (copies of the last layer)"
RUN = 10  # prompts: the unit whose speeds the medians are over
WIDTHS = range(1, 6)
TITLES = {
    TUNED: "CAFT: heads as fine-tuned",
    FURTHER: "CAFT, then heads trained further",
    FRESH: "plain fine-tuning, then fresh heads",
    FRESH_LONGER: "the same, as long as both of CAFT's",
}
# models, and whose heads draft for them
ARMS = {TUNED: (TUNED, FURTHER), PLAIN_MODEL: (FRESH, FRESH_LONGER)}


def untrained(model: Any, num_heads: int) -> Drafter:
    config = resolve_wiring(CAFTConfig(num_heads=num_heads, train_heads="frozen"), None)
    return Drafter(model, build_heads(model, find_trunk(model), config, seed=0), config)


def add(sum_: Comparison | None, found: Comparison) -> Comparison:
    """Return the sum of runs over some prompts and runs over others."""
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
    sum_.at_limit += found.at_limit
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
    return dataclasses.replace(
        found, written=f"{len(prompts)} prompts, speeds of runs of {RUN}\n{machine}"
    )


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
    """Return the times of a forward pass over 1 to 5 positions behind 60: the model, a head for
    each draft token, and their logits."""
    trunk, heads = drafter.trunk, drafter.heads.layers
    last = len(trunk.layers) - 1
    caches = [DynamicCache(config=model.config) for _ in range(1 + len(heads))]
    lines = [
        (
            "| positions | forward pass, ms | relative to one | draft tokens | their heads, ms |"
            " their logits, ms |"
        ),
        "| --- " * 6 + "|",
    ]
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
                drafts = [
                    f"{median_ms(their_heads):.1f}",
                    f"{median_ms(lambda: trunk.logits(hidden)):.1f}",  # noqa: B023
                ]
            lines.append(
                f"| {width} | {own:.1f} | {own / first:.2f} | {width - 1} | {drafts[0]} |"
                f" {drafts[1]} |"
            )
    return "\n".join(lines)


def markdown(found: Comparison) -> str:
    lines = [
        (
            "| | tokens per step, 4 draft tokens | Drafter: tokens per step "
            "| tokens per second | relative to plain | same text |"
        ),
        "| --- " * 6 + "|",
    ]
    for name, way in found.ways.items():
        same = "" if name == PLAIN else f"{way.same} of {found.texts}"
        always = f"{way.steps.tokens_per_step()[-1]:.2f}" if way.steps is not None else "-"
        speed = statistics.median(way.speeds())
        against = way.against(found.ways[PLAIN])
        lines.append(
            f"| {name} | {always} | {way.tokens_per_pass:.2f} | {speed:.1f} | {against:.2f} |"
            f" {same} |"
        )
    return "\n".join(
        [*lines, "", f"{found.at_limit} of {found.texts} plain texts ended at the limit."]
    )


def load(folder: Path) -> tuple[Any, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def show(title: str, found: Comparison, out: Path) -> None:
    print(f"\n## {title}\n\n{as_table(found)}\n\n{markdown(found)}\n", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{title.replace(', ', '-').replace(' ', '-')}.json"
    file.write_text(json.dumps(dataclasses.asdict(found), indent=1) + "\n")


def measure(options: argparse.Namespace, task: Task, extras: bool) -> None:
    folders = make(options, task, *TITLES)
    for model_name, arms in ARMS.items():
        model, tokenizer = load(folders[model_name])
        prompts = read_prompts(task.file("heldout"), tokenizer)[: options.prompts]
        drafters = {TITLES[name]: Drafter.from_pretrained(model, folders[name]) for name in arms}
        with_untrained = {UNTRAINED: untrained(model, 4)} if extras and model_name == TUNED else {}
        found = compare(model, tokenizer, {**drafters, **with_untrained}, prompts, 0.0, lookup=True)
        show(f"{task.name}, {model_name} model, greedy", found, options.out)
        if with_untrained:
            further = {TITLES[FURTHER]: drafters[TITLES[FURTHER]]}
            found = compare(model, tokenizer, further, prompts, 0.7, lookup=False)
            show(f"{task.name}, {model_name} model, sampled", found, options.out)
            print(costs(further[TITLES[FURTHER]], model))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=("molecules", "descriptions"),
        default=["molecules", "descriptions"],
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=60,
        help="held-out prompts of each task (default: %(default)s)",
    )
    options = parser.parse_args()
    print(choice())
    for number, name in enumerate(options.tasks):
        measure(options, tasks(options.out)[name], extras=number == 0)


if __name__ == "__main__":
    main()
