"""What vLLM writes with each drafter. `make test` runs these tests in an environment of their own,
`.venv-vllm`."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from drafters import (
    CASES,
    DAMAGED,
    DEFAULT,
    QUANTISED,
    TOKENS,
    VOCABULARY,
    all_heads,
    first_head,
    make,
    make_adapter,
    name_of,
    run_jobs,
)


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    generator = random.Random(3)
    return [
        [generator.randrange(2, VOCABULARY) for _ in range(generator.randrange(5, 30))]
        for _ in range(6)
    ]


def drafted(folder: Path, tokens: int, **settings) -> dict[str, object]:
    return {"speculative": all_heads(folder, tokens), **settings}


PLAIN: dict[str, object] = {"speculative": None}


def ways_of(folder: Path, case) -> dict[str, dict[str, object]]:
    """How vLLM is asked in a case. Without a drafter once a family: its wirings have the same
    model."""
    make(folder, *case)
    ways = {"4": drafted(folder, 4)}
    if case[1:] == DEFAULT:
        ways["plain"] = PLAIN
    if case[2]:
        ways["eagle3"] = {"speculative": first_head(folder)}
    if case == ("llama", *DEFAULT):
        ways |= {
            "1": drafted(folder, 1),
            "2, in chunks, nothing cached": drafted(folder, 2, chunk=24, prefix=False),
            "3, one at a time": drafted(folder, 3, batch=1),
            "4, cached prompts": drafted(folder, 4, rounds=[None, None]),
        }
    return ways


def ways_of_all(root: Path) -> dict[str, dict[str, dict[str, object]]]:
    ways = {name_of(case): ways_of(root / name_of(case), case) for case in CASES}
    for scheme, dtype in QUANTISED.items():
        make(root / scheme, "llama", *DEFAULT, scheme)
        ways[scheme] = {
            "plain": {**PLAIN, "dtype": dtype},
            "4": drafted(root / scheme, 4, dtype=dtype),
        }
    make_adapter(root / "adapter")
    rounds = [None, str(root / "adapter" / "out")]
    ways["adapter"] = {
        "plain": {**PLAIN, "rounds": rounds},
        "2": drafted(root / "adapter", 2, rounds=rounds),
    }
    for name, (damage, tokens, _) in DAMAGED.items():
        make(root / name, "llama", *DEFAULT)
        damage(root / name / "vllm")
        ways[name] = {"damaged": drafted(root / name, tokens)}
    return ways


@pytest.fixture(scope="session")
def asked(tmp_path_factory, prompts) -> dict[str, dict[str, dict]]:
    """What vLLM wrote and counted in each round, by case and by way; each case's folder is in it
    too."""
    root = tmp_path_factory.mktemp("serving")
    ways = ways_of_all(root)
    jobs = [
        {
            "model": str(root / case / "model"),
            "prompts": prompts,
            "tokens": TOKENS,
            "out": str(root / case / f"{way}.json"),
            **settings,
        }
        for case, of_case in ways.items()
        for way, settings in of_case.items()
    ]
    result = run_jobs(root, jobs)
    found: dict[str, dict] = {case: {"folder": root / case} for case in ways}
    for case, way in ((case, way) for case, of_case in ways.items() for way in of_case):
        file = root / case / f"{way}.json"
        assert file.exists(), result.stderr[-6000:]
        found[case][way] = written = json.loads(file.read_text())
        assert "error" not in written or case in DAMAGED, written["error"]
    return found
