"""One way of serving.py: a vLLM engine in this process. Runs in vLLM's environment: `python
serving_arm.py SETTINGS`.

SETTINGS is a JSON object of LLM's arguments. When the engine is ready, it writes a line. Then it
answers each line that it reads (JSON: `prompts`, `requests` at a time, `tokens`) with one: seconds,
tokens, steps, drafts, accepted draft tokens by place, and texts.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any

# an idle engine then waits for a line, and uses no CPU
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import torch
import vllm
from vllm import LLM, SamplingParams


def counts(engine: LLM) -> tuple[int, list[int]]:
    """Drafts, and accepted draft tokens by place, since the engine started: vLLM's own counts."""
    drafts, accepted = 0, []
    for metric in engine.get_metrics():
        if metric.name == "vllm:spec_decode_num_drafts":
            drafts = int(metric.value)
        if metric.name == "vllm:spec_decode_num_accepted_tokens_per_pos":
            accepted = list(metric.values)
    return drafts, accepted


def write(engine: LLM, prompts: list[list[int]], requests: int, tokens: int) -> dict[str, Any]:
    """Write a text for each prompt, so many requests at a time: the next one is sent when one is
    finished.

    `steps`: the forward passes that brought a request at least one token, summed over the requests.
    """
    core = engine.llm_engine
    sampling = SamplingParams(temperature=0, max_tokens=tokens)
    waiting = iter(enumerate(prompts))
    texts: dict[str, list[int]] = {}
    steps = 0
    drafts, accepted = counts(engine)

    def send(number: int) -> None:
        for at, prompt in islice(waiting, number):
            core.add_request(str(at), {"prompt_token_ids": prompt}, sampling)

    began = time.perf_counter()
    send(requests)
    while core.has_unfinished_requests():
        for output in core.step():
            steps += 1
            if output.finished:
                texts[output.request_id] = list(output.outputs[0].token_ids)
                send(1)
    seconds = time.perf_counter() - began

    now, accepted_now = counts(engine)
    return {
        "seconds": seconds,
        "tokens": sum(map(len, texts.values())),
        "steps": steps,
        "drafts": now - drafts,
        "accepted": [
            new - old
            for new, old in zip(accepted_now, accepted or [0] * len(accepted_now), strict=True)
        ],
        "texts": [texts[str(at)] for at in range(len(prompts))],
    }


def openmp() -> str:
    """Intel's library where it was preloaded: torch calls it then, though its own is loaded as
    well."""
    mapped = re.findall(r"lib(?:gomp|iomp5|omp)\b", Path("/proc/self/maps").read_text())
    return f"{'Intel' if 'libiomp5' in mapped else 'GNU'} OpenMP"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM's log is kept apart from the answers
    engine = LLM(**json.loads(sys.argv[1]), disable_log_stats=False)
    print(
        json.dumps({"vllm": vllm.__version__, "torch": torch.__version__, "openmp": openmp()}),
        file=answers,
    )
    for line in sys.stdin:
        print(json.dumps(write(engine, **json.loads(line))), file=answers)


if __name__ == "__main__":
    main()
