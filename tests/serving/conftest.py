"""What vLLM writes with each drafter. `make test` runs these tests in an environment of their own, `.venv-vllm`."""

from __future__ import annotations

import json
import random

import pytest
from drafters import CASES, DEFAULT, TOKENS, VOCABULARY, all_heads, first_head, make, name_of, run_jobs


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = random.Random(3)
    return [[generator.randrange(2, VOCABULARY) for _ in range(generator.randrange(5, 30))] for _ in range(6)]


@pytest.fixture(scope="session")
def asked(tmp_path_factory, prompts) -> dict[str, dict[str, dict]]:
    """What vLLM wrote and counted, by case and by way; each case's folder is in it too."""
    root = tmp_path_factory.mktemp("serving")
    jobs, found = [], {}
    for case in CASES:
        folder = root / name_of(case)
        make(folder, *case)
        ways = {"plain": (None, {}), "4": (all_heads(folder, 4), {})}
        if case[2]:
            ways["eagle3"] = (first_head(folder), {})
        if case == ("llama", *DEFAULT):
            ways |= {
                "1": (all_heads(folder, 1), {}),
                "2, in chunks, nothing cached": (all_heads(folder, 2), {"chunk": 24, "prefix": False}),
                "3, one at a time": (all_heads(folder, 3), {"batch": 1}),
                "4, cached prompts": (all_heads(folder, 4), {"twice": True}),
            }
        for way, (speculative, settings) in ways.items():
            job = {"model": str(folder / "model"), "speculative": speculative, "prompts": prompts, "tokens": TOKENS}
            jobs.append({**job, **settings, "out": str(folder / f"{way}.json")})
        found[name_of(case)] = {"folder": folder, "ways": list(ways)}
    result = run_jobs(root, jobs)
    assert result.returncode == 0, result.stderr[-6000:]
    for case in found.values():
        case["texts"] = {way: json.loads((case["folder"] / f"{way}.json").read_text()) for way in case["ways"]}
    return found
