"""Run by conftest.py: has vLLM write texts, each job in a fork of this process. Argument: a JSON
file of jobs."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.plugins import load_general_plugins

AT_A_TIME = 2
# What brings in all that an engine imports as it starts: once here, and not in each fork.
AHEAD = (
    "caft_plugin.serving.parallel",
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors",
    "vllm.model_executor.models.config",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
)


def counts(engine: LLM) -> dict[str, Any]:
    """vLLM's own counts of drafts and of draft tokens accepted, in all and by place."""
    found = {}
    for metric in engine.get_metrics():
        if metric.name.startswith("vllm:spec_decode_"):
            values = getattr(metric, "values", None) or getattr(metric, "value", None)
            found[metric.name.removeprefix("vllm:spec_decode_")] = values
    return found


def run(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The texts of each round, and the counts before and after it. A round is asked for with an
    adapter or None."""
    batch, rounds, written = job.get("batch", 8), job.get("rounds", [None]), []
    engine = LLM(
        job["model"],
        dtype=job.get("dtype", "float32"),
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=max(batch, 2),
        max_num_batched_tokens=job.get("chunk", 1024),
        enforce_eager=True,
        speculative_config=job["speculative"],
        disable_log_stats=False,
        enable_prefix_caching=job.get("prefix", True),
        **({"enable_lora": True, "max_lora_rank": 8} if any(rounds) else {}),
    )
    sampling = SamplingParams(
        temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False
    )
    asked = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for adapter in rounds:
        lora = LoRARequest("tuned", 1, adapter) if adapter else None
        before, texts = counts(engine), []
        for at in range(0, len(asked), batch):
            outputs = engine.generate(
                asked[at : at + batch], sampling, use_tqdm=False, lora_request=lora
            )
            texts += [list(output.outputs[0].token_ids) for output in outputs]
        written.append({"texts": texts, "before": before, "after": counts(engine)})
    return written


def answer(job: dict[str, Any]) -> None:
    try:
        written: Any = run(job)
    except BaseException:
        written = {"error": traceback.format_exc()}
    Path(job["out"]).write_text(json.dumps(written))


def main() -> None:
    load_general_plugins()
    for module in AHEAD:
        import_module(module)
    # an engine's start collects garbage several times, and need not search what is imported
    gc.freeze()
    jobs = json.loads(Path(sys.argv[1]).read_text())
    for number, job in enumerate(jobs):
        if number >= AT_A_TIME:
            os.wait()
        if os.fork() == 0:
            answer(job)
            os._exit(0)
    for _ in jobs[:AT_A_TIME]:
        os.wait()


if __name__ == "__main__":
    main()
