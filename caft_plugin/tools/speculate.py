"""`caft speculate`: how much faster the heads make a model write, beside plain generation and prompt lookup."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from caft_plugin.decoding import Drafted, Drafter
from caft_plugin.stage1.answers import end_tokens
from caft_plugin.storage import write_png
from caft_plugin.tools.steps import Steps, steps_with
from caft_plugin.trunk import find_trunk

PLAIN, HEADS, LOOKUP = "plain", "with the heads", "prompt lookup"
LOOKUP_TOKENS = 10  # that transformers' prompt lookup copies at most, as its documentation has it
BLUE, GREY = "#2f6f9f", "#9aa5b1"


@dataclasses.dataclass
class Way:
    """One way to write all texts: in each run over the prompts its tokens and seconds, in all of them its passes of the
    model, how many texts were those of plain generation; with heads, what came of their guesses, and the steps of an
    engine."""

    tokens: list[int]
    seconds: list[float]
    passes: int = 0
    same: int = 0
    drafted: Drafted | None = None
    steps: Steps | None = None

    def speeds(self) -> list[float]:
        """Tokens a second, of each run."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    def against(self, other: Way) -> float:
        """How many times as fast as the other way: the median over the runs."""
        return statistics.median(own / its for own, its in zip(self.speeds(), other.speeds(), strict=True))

    @property
    def tokens_per_pass(self) -> float:
        return sum(self.tokens) / self.passes


@dataclasses.dataclass
class Comparison:
    """So many texts, each written in all ways; `written` says how. `at_limit` of the plain ones ended at the limit."""

    ways: dict[str, Way]
    texts: int
    written: str
    at_limit: int = 0


def speculate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    runs: int = 3,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    lookup: bool = True,
) -> Comparison:
    """Writes a text to each prompt (token ids) in each way, the ways in turn, `runs` times over: plain, with each of
    the drafters, and with prompt lookup.

    With a temperature of 0 the likeliest token is taken. Each text has a random seed of its own, the same for all ways.
    """
    ways: dict[str, dict[str, object]] = {PLAIN: {}}
    ways |= {name: {"custom_generate": drafter} for name, drafter in drafters.items()}
    if lookup:
        ways[LOOKUP] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    settings: dict[str, object] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        settings = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ends = sorted(end_tokens(model, tokenizer))
    settings |= {"eos_token_id": ends, "pad_token_id": ends[0], "use_cache": True}
    generate: Any = model.generate
    drafted = {name: Drafted.nothing(len(drafter.heads)) for name, drafter in drafters.items()}
    figures = {name: Way([0] * runs, [0.0] * runs, drafted=drafted.get(name)) for name in ways}
    plain: dict[int, list[int]] = {}  # by prompt
    at_limit = 0

    def write(number: int, length: int, way: dict[str, object]) -> Tensor:
        ids = torch.tensor([list(prompts[number])], device=model.device)
        torch.manual_seed(seed + number)
        out = generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=length, **settings, **way)
        return out[0, ids.shape[1] :]

    model.eval()
    write(0, 8, {})  # the first text of a process takes longer
    with count_passes(model) as passes, tqdm(total=runs * len(prompts), unit="prompt", desc="writing") as bar:
        for run in range(runs):
            for number in range(len(prompts)):
                texts = {}
                for name in turned(list(ways), run + number):
                    before, began = passes(), time.perf_counter()
                    texts[name] = write(number, max_new_tokens, ways[name])
                    if model.device.type == "cuda":
                        torch.cuda.synchronize()
                    figures[name].seconds[run] += time.perf_counter() - began
                    figures[name].tokens[run] += len(texts[name])
                    figures[name].passes += passes() - before
                    if name in drafters:
                        drafted[name] += drafters[name].last
                for name, text in texts.items():
                    figures[name].same += torch.equal(text, texts[PLAIN])
                plain[number] = texts[PLAIN].tolist()
                at_limit += len(plain[number]) == max_new_tokens and plain[number][-1] not in ends
                bar.update()
    for name, drafter in drafters.items():
        figures[name].steps = steps_with(drafter, ((prompts[at], text) for at, text in plain.items()))
    how = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}, top_p {top_p:g}"
    written = (
        f"{len(prompts)} prompts, runs over them: {runs}, {how}, at most {max_new_tokens} tokens\n"
        f"{named_dtype(model)} on {processor(model.device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    return Comparison(figures, runs * len(prompts), written, at_limit)


@contextlib.contextmanager
def count_passes(model: PreTrainedModel) -> Iterator[Callable[[], int]]:
    """While it is open, a function says how often the model was called."""
    passes = [0]

    def note(*_: object) -> None:
        passes[0] += 1

    handle = find_trunk(model).model.register_forward_pre_hook(note)
    try:
        yield lambda: passes[0]
    finally:
        handle.remove()


def turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def named_dtype(model: PreTrainedModel) -> str:
    return f"{'4 or 8 bits, ' if getattr(model, 'is_quantized', False) else ''}{model.dtype}".replace("torch.", "")


def processor(device: torch.device) -> str:
    """What a figure of speed is about."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    has = torch.cpu.get_capabilities()
    kinds = {"avx512_bf16": "AVX-512 BF16", "avx512_f": "AVX-512", "avx2": "AVX2"}
    kind = next((f" with {name}" for key, name in kinds.items() if has.get(key)), "")
    return f"a CPU ({platform.machine()}{kind}), {torch.get_num_threads()} threads"


def as_table(found: Comparison) -> str:
    plain = found.ways[PLAIN]
    lines = [found.written, "", f"{'':<20}{'tokens a second':>17}{'against plain':>15}{'tokens a pass':>15}  same text"]
    for name, way in found.ways.items():
        same = "" if name == PLAIN else f"  {way.same} of {found.texts}"
        lines.append(
            f"{name:<20}{statistics.median(way.speeds()):>17.1f}{way.against(plain):>15.2f}"
            f"{way.tokens_per_pass:>15.2f}{same}"
        )
    for name, way in found.ways.items():
        if way.drafted is None:
            continue
        lines += ["", f"{'head':<6}{'predicts':<10}{'sent':>8}{'right':>8}{'share':>9}   ({name})"]
        for k, (sent, right) in enumerate(zip(way.drafted.drafted, way.drafted.accepted, strict=True), 1):
            share = f"{right / sent:.1%}" if sent else "-"
            lines.append(f"{k:<6}{f'{k + 1} ahead':<10}{sent:>8,}{right:>8,}{share:>9}")
        lines.append("passes that brought " + ", ".join(f"{n}: {share:.0%}" for n, share in lengths(way.drafted)))
        if way.steps is not None:
            tokens = ", ".join(f"{n}: {tokens:.2f}" for n, tokens in enumerate(way.steps.tokens_per_step(), 1))
            lines.append(f"served with so many draft tokens in every step, tokens a step {tokens}")
        if not any(way.drafted.accepted):
            lines.append(
                "No draft token was accepted: these heads are of another model, or hardly trained. Train them on what\n"
                "this model writes: caft pretrain-heads --targets model --help"
            )
    if any(way.drafted is not None and way.same < found.texts for way in found.ways.values()):
        lines += [
            "",
            "A text can differ where two tokens are nearly as likely as each other: a pass of several tokens rounds\n"
            "otherwise than a pass of one. In float32 that hardly ever shows.",
        ]
    return "\n".join(lines)


def lengths(drafted: Drafted) -> list[tuple[int, float]]:
    """Of all passes the share that brought so many tokens."""
    return [(length, passes / max(drafted.passes, 1)) for length, passes in enumerate(drafted.lengths, 1)]


def draw(found: Comparison, file: Path) -> None:
    """Writes acceptance by head, and how many tokens a pass brought, as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    way, drafted = found.ways[HEADS], found.ways[HEADS].drafted
    assert drafted is not None
    shares = [right / max(sent, 1) for sent, right in zip(drafted.drafted, drafted.accepted, strict=True)]

    def fill(axes: Any) -> None:
        axes[0].bar([str(k) for k in range(1, len(shares) + 1)], shares, color=BLUE)
        axes[0].set(title="guesses that were right", xlabel="head", ylim=(0, 1))
        axes[1].bar(*zip(*((str(n), share) for n, share in lengths(drafted)), strict=True), color=GREY)
        axes[1].set(
            title=f"passes, {way.tokens_per_pass:.2f} tokens each on average", xlabel="tokens that a pass brought"
        )

    write_png(file, (8, 3.6), 2, fill)
