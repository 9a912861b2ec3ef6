"""What a drafter's folder says of itself: the commands that serve it, and how many draft tokens a step should have."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from caft_plugin.config import named
from caft_plugin.model_loading import Source
from caft_plugin.serving.recommendation import Cost, Drafting, recommended, speeds

Format = Literal["vllm", "eagle3"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """How many draft tokens a step should have, and the lines that say why."""

    draft_tokens: int
    why: list[str]


def advice_on(found: Drafting | None, cost: Cost, count: int) -> Advice:
    """Advice on a drafter with `count` heads, by what `caft speculate` found with them."""
    if found is None:
        return Advice(
            count,
            [
                "How many draft tokens are best depends on the model and on what it writes. `caft speculate` finds",
                "out: run it with these heads, then export them again.",
            ],
        )
    tokens = found.tokens_per_step[:count]
    against_plain = speeds(tokens, cost)
    lines = [
        f"`caft speculate` found, with {named(found.model)} on {found.prompts} prompts at temperature "
        f"{found.temperature:g}:",
        "",
        "| draft tokens in every step | tokens a step | speed against plain serving |",
        "| --- | --- | --- |",
        *(
            f"| {number} | {brings:.2f} | {speed:.2f} |"
            for number, (brings, speed) in enumerate(zip(tokens, against_plain, strict=True), 1)
        ),
        "",
        "The last column is an estimate for one request at a time, where reading weights takes a step's time. With",
        "many requests at a time each draft token costs more, so the recommended number is the smallest that is within",
        "5 % of the fastest.",
    ]
    if max(against_plain) <= 1:
        lines += ["", "These heads do not pay. Train them further: `caft pretrain-heads --targets model`."]
    return Advice(recommended(tokens, cost), lines)


def how_to_serve(source: Source, output: Path, form: Format, advice: Advice) -> str:
    """The README of a drafter's folder: the commands that serve it."""
    count = advice.draft_tokens
    speculative: dict[str, object] = {"method": "eagle3", "model": str(output), "num_speculative_tokens": count}
    if form == "vllm":
        speculative["parallel_drafting"] = True
    adapter = source.base != source.name
    lora = f" --enable-lora --lora-modules tuned={source.name}" if adapter else ""
    lines = [
        "# A drafter made of CAFT heads",
        "",
        f"It proposes {count} draft token{'s' * (count > 1)} in each step for {source.name}.",
        "",
        "vLLM" + (", in an environment with caft_plugin (`pip install caft_plugin`):" if form == "vllm" else ":"),
        "",
        f"    vllm serve {source.base}{lora} --speculative-config '{json.dumps(speculative)}'",
        "",
        *advice.why,
    ]
    if adapter:
        lines += [
            "",
            "Requests name the adapter as their model (`tuned`). `--max-lora-rank` is needed for a rank above 16. All",
            "adapters of a server share one drafter, which drafts well for this one only. To serve the merged model,",
            "give its folder in place of the base model, and leave the options for LoRA out.",
        ]
    if form == "eagle3":
        lines += [
            "",
            "SGLang (its source was read, it was not run), with the merged model:"
            if adapter
            else "SGLang (its source was read, it was not run):",
            "",
            f"    python -m sglang.launch_server --model-path {'MERGED' if adapter else source.name} \\",
            f"        --speculative-algorithm EAGLE3 --speculative-draft-model-path {output} \\",
            "        --speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2",
        ]
    return "\n".join(lines) + "\n"
