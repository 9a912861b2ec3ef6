"""What heads bring as the drafter of a vLLM server, with 1, 4 and 16 requests at a time. `make
bench-serving`.

    python tests/benchmarks/serving.py --model outputs/smollm2-135m-instruct
        --vllm .venv-vllm/bin/python

The model and its heads are those of drafting_heads.py, on the molecules: SmolLM2 fine-tuned with
heads, and those heads trained further on the tuned model's own answers. Each way to serve (plain,
heads with 1 to 4 draft tokens, vLLM's n-gram matching) is a process that keeps its engine. In each
round all of them write texts to the same held-out prompts, in turn, and the ratios to plain are
taken within the round. With one request at a time transformers writes these texts too, plain and
with the Drafter. Prints Markdown; OUT/serving.md and OUT/serving.json, with the figures of each
round, are written after each round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from decoding import NEW_TOKENS
from drafting_heads import FURTHER, TUNED, add_options, make, tasks
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from caft_plugin import Drafter
from caft_plugin.precision import choice
from caft_plugin.serving.export import export_drafter
from caft_plugin.stage1.data import read_prompts
from caft_plugin.tools.speculate import PLAIN, Way, processor, speculate, turned

LOOKUP = "n-gram matching"
IN_TRANSFORMERS = "transformers"
NAMES = {FURTHER: "heads trained further", TUNED: "heads as fine-tuned"}
WAYS = {
    "plain": (PLAIN, 0),
    **{f"further-{n}": (FURTHER, n) for n in (1, 2, 3, 4)},
    **{f"tuned-{n}": (TUNED, n) for n in (1, 2, 4)},
    "ngram": (LOOKUP, 5),  # as in vLLM's documentation
}
ENGINE: dict[str, object] = {
    "max_model_len": 512,
    "max_num_batched_tokens": 1024,
    "enable_prefix_caching": False,  # rounds share prompts: later ones would find them cached
    "kv_cache_memory_bytes": 1 << 28,  # for 5,000 tokens; all of it is resident, in each server
}
PAUSE = 0.1  # seconds before each timing, for the threads of the process before to fall asleep


@dataclasses.dataclass
class Round:
    """The texts of one way to the prompts of one round."""

    way: str
    requests: int
    number: int
    seconds: float
    tokens: int
    steps: int  # forward passes that brought a request at least one token, summed over the requests
    same: int = 0  # texts that are those of plain serving
    texts: int = 0
    drafts: int = 0
    # draft tokens by place, as vLLM counts them
    accepted: list[int] = dataclasses.field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds


class Server:
    """A process with an engine."""

    def __init__(self, python: Path, settings: dict[str, object], log: Path) -> None:
        command = [
            str(python),
            str(Path(__file__).with_name("serving_arm.py")),
            json.dumps(settings),
        ]
        self.log = log
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                command,
                env=environment(python),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.about = self._read()

    def write(self, prompts: list[list[int]], requests: int, tokens: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        asked = {"prompts": prompts, "requests": requests, "tokens": tokens}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"a server stopped: {self.log} ends with\n{self.log.read_text()[-3000:]}"
            )
        return json.loads(line)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()


def environment(python: Path) -> dict[str, str]:
    """With Intel's OpenMP, where vLLM's environment has it: vLLM asks for it where it drafts on a
    CPU."""
    settings = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",
    }
    library = python.parents[1] / "lib" / "libiomp5.so"
    if library.is_file():
        # the latter two as vLLM does
        settings |= {"LD_PRELOAD": str(library), "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0"}
    return {**os.environ, **settings}


def speculative(key: str, heads: dict[str, Path], out: Path) -> dict[str, object] | None:
    """vLLM's `speculative_config` of a way. A drafter is exported with as many heads as it drafts
    tokens."""
    name, tokens = WAYS[key]
    if name == PLAIN:
        return None
    if name == LOOKUP:
        return {"method": "ngram", "num_speculative_tokens": tokens, "prompt_lookup_max": 4}
    drafter = out / "drafters" / key
    shutil.rmtree(drafter, ignore_errors=True)
    export_drafter(str(heads[TUNED]), str(heads[name]), drafter, num_heads=tokens)
    return {
        "method": "eagle3",
        "model": str(drafter),
        "num_speculative_tokens": tokens,
        "parallel_drafting": True,
    }


@contextlib.contextmanager
def started(options: argparse.Namespace, heads: dict[str, Path]) -> Iterator[dict[str, Server]]:
    servers: dict[str, Server] = {}
    settings = {
        **ENGINE,
        "model": str(heads[TUNED]),
        "dtype": options.dtype,
        "enforce_eager": options.eager,
    }
    settings["max_num_seqs"] = max(*options.requests, 2)
    try:
        for key in tqdm(options.ways, desc="starting servers"):
            way = {**settings, "speculative_config": speculative(key, heads, options.out)}
            servers[key] = Server(options.vllm, way, options.out / f"serving-{key}.log")
        yield servers
    finally:
        for server in servers.values():
            server.end()


def one_round(
    servers: dict[str, Server], prompts: list[list[int]], requests: int, number: int
) -> Iterator[tuple[Round, list[list[int]]]]:
    """Each way's texts to the same prompts, in an order that turns from round to round."""
    for key in turned(list(servers), number):
        time.sleep(PAUSE)
        found = servers[key].write(prompts, requests, NEW_TOKENS)
        texts = found.pop("texts")
        yield Round(key, requests, number, texts=len(texts), **found), texts


def served(
    servers: dict[str, Server], prompts: list[list[int]], requests: int, number: int
) -> list[Round]:
    rounds = list(one_round(servers, prompts, requests, number))
    plain = next(texts for found, texts in rounds if found.way == "plain")
    for found, texts in rounds:
        found.same = sum(text == its for text, its in zip(texts, plain, strict=True))
    return [found for found, _ in rounds]


class InTransformers:
    """The same texts by `caft speculate`: plain, with a Drafter that chooses the number of draft
    tokens, and with those that draft as many tokens as vLLM does."""

    def __init__(self, options: argparse.Namespace, heads: dict[str, Path]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(heads[TUNED])
        dtype = getattr(torch, options.dtype)
        self.model: Any = AutoModelForCausalLM.from_pretrained(heads[TUNED], dtype=dtype).eval()
        self.drafters = {FURTHER: Drafter.from_pretrained(self.model, heads[FURTHER])}
        for key in options.ways:
            name, tokens = WAYS[key]
            if name in heads:
                self.drafters[key] = Drafter.from_pretrained(
                    self.model, heads[name], num_draft=tokens
                )

    def write(self, prompts: list[list[int]], number: int) -> list[Round]:
        time.sleep(PAUSE)
        found = speculate(
            self.model,
            self.tokenizer,
            self.drafters,
            prompts,
            max_new_tokens=NEW_TOKENS,
            runs=1,
            lookup=False,
        )
        return [self._round(name, way, found.texts, number) for name, way in found.ways.items()]

    def _round(self, name: str, way: Way, texts: int, number: int) -> Round:
        name = f"{IN_TRANSFORMERS}, {name}"
        return Round(name, 1, number, way.seconds[0], way.tokens[0], way.passes, way.same, texts)


def named(key: str) -> str:
    name, tokens = WAYS[key]
    if name == PLAIN:
        return "plain"
    return f"{NAMES.get(name, name)}, {tokens} draft token{'s' * (tokens > 1)}"


def of_way(rounds: list[Round], way: str, requests: int) -> list[Round]:
    return [found for found in rounds if (found.way, found.requests) == (way, requests)]


def tokens_per_step(rounds: list[Round]) -> float:
    return sum(found.tokens for found in rounds) / sum(found.steps for found in rounds)


def against(rounds: list[Round], plain: list[Round]) -> str:
    """The median of the rounds' ratios of speed, with quartiles."""
    ratios = [found.speed / its.speed for found, its in zip(rounds, plain, strict=True)]
    if len(ratios) < 2:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def table(rounds: list[Round], requests: int, ways: dict[str, str]) -> str:
    lines = [
        "| | tokens per step | tokens per second | relative to plain | same text |",
        "| --- " * 5 + "|",
    ]
    plain = of_way(rounds, "plain", requests)
    for way, name in ways.items():
        found = of_way(rounds, way, requests)
        speed = statistics.median(one.speed for one in found)
        same = f"{sum(one.same for one in found)} of {sum(one.texts for one in found)}"
        cells = [name, f"{tokens_per_step(found):.2f}", f"{speed:.1f}", against(found, plain)]
        lines.append(f"| {' | '.join([*cells, '' if way == 'plain' else same])} |")
    return "\n".join(lines)


def beside_speculate(rounds: list[Round], ways: list[str]) -> str:
    """The tokens per step of the same heads in vLLM and in transformers, one request at a time."""
    lines = [
        "| | accepted by position, % | tokens per step | `caft speculate` | difference |",
        "| --- " * 5 + "|",
    ]
    for key in ways:
        if WAYS[key][0] not in (FURTHER, TUNED):
            continue
        found, theirs = of_way(rounds, key, 1), of_way(rounds, f"{IN_TRANSFORMERS}, {key}", 1)
        drafts = sum(one.drafts for one in found)
        places = zip(*(one.accepted for one in found), strict=True)
        accepted = ", ".join(f"{100 * sum(place) / drafts:.0f}" for place in places)
        here, there = tokens_per_step(found), tokens_per_step(theirs)
        lines.append(
            f"| {named(key)} | {accepted} | {here:.3f} | {there:.3f} | {here / there - 1:+.1%} |"
        )
    return "\n".join(lines)


def about_run(options: argparse.Namespace, server: dict[str, str]) -> str:
    return (
        f"{options.dtype} on {processor(torch.device('cpu'))}, greedy, at most {NEW_TOKENS} tokens"
        f" a text; vLLM {server['vllm']}, {'eager' if options.eager else 'compiled'}, torch"
        f" {server['torch']}, {server['openmp']}; transformers {transformers.__version__}, torch"
        f" {torch.__version__}"
    )


def markdown(about: str, rounds: list[Round], ways: list[str]) -> str:
    parts = [about]
    for requests in sorted({found.requests for found in rounds}):
        rows = {key: named(key) for key in ways}
        if requests == 1:
            rows |= {
                f"{IN_TRANSFORMERS}, {name}": f"{IN_TRANSFORMERS}, {NAMES.get(name, name)}"
                for name in (PLAIN, FURTHER)
            }
        plain = of_way(rounds, "plain", requests)
        title = (
            f"{requests} at a time, {sum(found.texts for found in plain)} texts in {len(plain)}"
            " rounds"
        )
        parts.append(f"## {title}\n\n{table(rounds, requests, rows)}")
        if requests == 1:
            parts.append(f"## Tokens per step, 1 at a time\n\n{beside_speculate(rounds, ways)}")
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument(
        "--vllm", type=Path, required=True, help="the Python of an environment with vLLM"
    )
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=list(WAYS),
        help="methods to compare with plain (default: all)",
    )
    parser.add_argument(
        "--requests",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        help="numbers of concurrent requests (default: 1 4 16)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--prompts",
        type=int,
        default=8,
        help="prompts per round, at least two per concurrent request",
    )
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--eager", action="store_true", help="vLLM without torch.compile")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)"
    )
    options = parser.parse_args()
    options.ways = ["plain", *(key for key in options.ways if key != "plain")]
    options.out = options.out.resolve()
    torch.set_num_threads(options.threads)
    print(choice())
    task = tasks(options.out)["molecules"]
    heads = make(options, task, FURTHER)

    in_transformers = InTransformers(options, heads)
    prompts = read_prompts(task.file("heldout"), in_transformers.tokenizer)
    rounds: list[Round] = []
    with started(options, heads) as servers:
        about = about_run(options, servers["plain"].about)
        for requests in options.requests:
            for server in servers.values():
                server.write(prompts[:requests], requests, 8)
        for number, requests in tqdm(
            [(n, r) for n in range(options.rounds) for r in options.requests], desc="rounds"
        ):
            count = max(options.prompts, 2 * requests)
            asked = [
                prompts[at % len(prompts)] for at in range(number * count, (number + 1) * count)
            ]
            rounds += served(servers, asked, requests, number)
            if requests == 1:
                rounds += in_transformers.write(asked, number)
            kept = {"about": about, "rounds": [dataclasses.asdict(found) for found in rounds]}
            (options.out / "serving.json").write_text(json.dumps(kept, indent=1) + "\n")
            (options.out / "serving.md").write_text(markdown(about, rounds, options.ways))
    print(markdown(about, rounds, options.ways))


if __name__ == "__main__":
    main()
