"""The README of a drafter's folder: the commands that serve it, and the recommended number of draft
tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Literal

from caft_plugin.errors import named
from caft_plugin.model.loading import Source
from caft_plugin.serving.recommendation import Cost, Drafting, recommended, speeds

Format = Literal["vllm", "eagle3"]


@dataclasses.dataclass(frozen=True)
class Advice:
    """The recommended number of draft tokens per step, and the lines that explain it."""

    draft_tokens: int
    why: list[str]


def advice_on(
    found: Drafting | None,
    cost: Cost,
    count: int,
) -> Advice:
    """Return advice for a drafter with `count` heads, from the results of `caft speculate` (None:
    not known)."""
    if found is None:
        return Advice(
            count,
            [
                (
                    "The best number of draft tokens depends on the model and on the text. To"
                    " measure it, run"
                ),
                "`caft speculate` with these heads, then export them again.",
            ],
        )
    tokens = found.tokens_per_step[:count]
    against_plain = speeds(tokens, cost)
    lines = [
        (
            f"`caft speculate` measured, with {named(found.model)} on {found.prompts} prompts at"
            f" temperature {found.temperature:g}:"
        ),
        "",
        "| draft tokens per step | tokens per step | speed compared with plain serving |",
        "| --- | --- | --- |",
        *(
            f"| {number} | {per_step:.2f} | {speed:.2f} |"
            for number, (per_step, speed) in enumerate(zip(tokens, against_plain, strict=True), 1)
        ),
        "",
        (
            "The last column is an estimate for one request at a time, when a step takes as long as"
            " reading the weights."
        ),
        (
            "With many requests at a time each draft token costs more, so the recommended number is"
            " the smallest that is"
        ),
        "within 5 % of the fastest.",
    ]
    if max(against_plain) <= 1:
        lines += [
            "",
            (
                "Serving with these heads is slower. Train them further: `caft pretrain-heads"
                " --targets model`."
            ),
        ]
    return Advice(recommended(tokens, cost), lines)


def how_to_serve(
    source: Source,
    output: Path,
    form: Format,
    advice: Advice,
) -> str:
    """Return the README of a drafter's folder.

    Args:
        source: the served model, or its adapter with the base.
        output: the drafter's folder.
        form: its format.
        advice: the recommended number of draft tokens.
    """
    count = advice.draft_tokens
    speculative: dict[str, object] = {
        "method": "eagle3",
        "model": str(output),
        "num_speculative_tokens": count,
    }
    if form == "vllm":
        speculative["parallel_drafting"] = True
    adapter = source.base != source.name
    lora = f" --enable-lora --lora-modules tuned={source.name}" if adapter else ""
    # vLLM finds the draft class by caft_plugin's entry point; EAGLE-3 drafters need none.
    needs = ""
    if form == "vllm":
        needs = ", in an environment with caft_plugin (`pip install caft_plugin`)"
    lines = [
        "# A drafter made of CAFT heads",
        "",
        f"It proposes {count} draft token{'s' * (count > 1)} in each step for {source.name}.",
        "",
        f"vLLM{needs}:",
        "",
        f"    vllm serve {source.base}{lora} --speculative-config '{json.dumps(speculative)}'",
        "",
        *advice.why,
    ]
    if adapter:
        lines += [
            "",
            (
                "In requests, `tuned` is the model's name. For a LoRA rank above 16 add"
                " `--max-lora-rank`. All adapters of"
            ),
            (
                "a server share one drafter, which drafts well only for this one. To serve the"
                " merged model instead, give"
            ),
            "its folder in place of the base model and leave out the LoRA options.",
        ]
    if form == "eagle3":
        lines += sglang("MERGED" if adapter else source.name, output, adapter)
    return "\n".join(lines) + "\n"


def sglang(
    model: str,
    output: Path,
    merged: bool,
) -> list[str]:
    """Return the lines on serving with SGLang, which reads the same folder."""
    which = ", with the merged model" if merged else ""
    return [
        "",
        f"SGLang{which} (written from SGLang's source, not tested):",
        "",
        f"    python -m sglang.launch_server --model-path {model} \\",
        f"        --speculative-algorithm EAGLE3 --speculative-draft-model-path {output} \\",
        "        --speculative-num-steps 1 --speculative-eagle-topk 1"
        " --speculative-num-draft-tokens 2",
    ]
