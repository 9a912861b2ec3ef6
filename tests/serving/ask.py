"""Run by conftest.py: has vLLM write texts, each job in a fork of this process. Argument: a JSON file of jobs."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def counts(engine: LLM) -> dict[str, Any]:
    """vLLM's own counts of drafts and of draft tokens accepted, in all and by place."""
    found = {}
    for metric in engine.get_metrics():
        if metric.name.startswith("vllm:spec_decode_"):
            values = getattr(metric, "values", None) or getattr(metric, "value", None)
            found[metric.name.removeprefix("vllm:spec_decode_")] = values
    return found


def run(job: dict[str, Any]) -> None:
    batch = job.get("batch", 8)
    engine = LLM(
        job["model"],
        dtype="float32",
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=max(batch, 2),
        max_num_batched_tokens=job.get("chunk", 1024),
        enforce_eager=True,
        speculative_config=job["speculative"],
        disable_log_stats=False,
        enable_prefix_caching=job.get("prefix", True),
        **({"enable_lora": True, "max_lora_rank": 8} if "adapter" in job else {}),
    )
    adapter = LoRARequest("tuned", 1, job["adapter"]) if job.get("adapter") else None
    sampling = SamplingParams(temperature=0, max_tokens=job["tokens"], ignore_eos=True, detokenize=False)
    asked = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    for _ in range(2 if job.get("twice") else 1):
        before, texts = counts(engine), []
        for at in range(0, len(asked), batch):
            outputs = engine.generate(asked[at : at + batch], sampling, use_tqdm=False, lora_request=adapter)
            texts += [list(output.outputs[0].token_ids) for output in outputs]
    after = counts(engine)
    Path(job["out"]).write_text(json.dumps({"texts": texts, "before": before, "after": after}))


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        process = os.fork()
        if process == 0:
            code = 1
            try:
                run(job)
                code = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        if os.waitpid(process, 0)[1]:
            sys.exit(f"failed: {job['out']}")


if __name__ == "__main__":
    main()
