"""`caft speculate`: the speed of generation with heads, compared with plain generation and prompt
lookup."""

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
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from caft_plugin.drafting.decoding import Drafted, Drafter
from caft_plugin.model.trunk import find_trunk
from caft_plugin.stage1.answers import end_tokens
from caft_plugin.tools.pictures import write_png
from caft_plugin.tools.steps import Steps, steps_with

PLAIN = "plain"
HEADS = "with the heads"
LOOKUP = "prompt lookup"
LOOKUP_TOKENS = 10  # copied at most by transformers' prompt lookup, as in its documentation
BLUE = "#2f6f9f"
GREY = "#9aa5b1"


@dataclasses.dataclass
class Way:
    """Results of one way to generate.

    `tokens` and `seconds` are by run over the prompts; `passes`, the model's forward passes, and
    `same`, the number of texts identical to plain generation's, are sums. With heads, `drafted`
    counts draft tokens and `steps` has the steps that an inference engine would need.
    """

    tokens: list[int]
    seconds: list[float]
    passes: int = 0
    same: int = 0
    drafted: Drafted | None = None
    steps: Steps | None = None

    def speeds(self) -> list[float]:
        """Return the tokens per second of each run."""
        return [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]

    def against(self, other: Way) -> float:
        """Return the speed as a multiple of the other way's: the median over the runs."""
        return statistics.median(
            own / its for own, its in zip(self.speeds(), other.speeds(), strict=True)
        )

    @property
    def tokens_per_pass(self) -> float:
        return sum(self.tokens) / self.passes


@dataclasses.dataclass
class Comparison:
    """The results of all ways, for `texts` generated texts each; `written` describes the settings
    and the machine.

    `at_limit` of the plain texts ended at `max_new_tokens`, before an end token.
    """

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
    """Generate a text for each prompt in several ways, in turn: plain, with each drafter, and with
    prompt lookup.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        drafters: drafters by name.
        prompts: token ids of each prompt.
        max_new_tokens: maximum length of a text, in tokens.
        runs: repetitions of all prompts.
        temperature: sampling temperature; 0: greedy decoding.
        top_p: nucleus sampling.
        seed: sampling seed. Each text has its own, the same for all ways.
        lookup: include prompt lookup.
    """
    ways: dict[str, dict[str, object]] = {PLAIN: {}}
    ways |= {name: {"custom_generate": drafter} for name, drafter in drafters.items()}
    if lookup:
        ways[LOOKUP] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    settings: dict[str, object] = {
        "do_sample": False,
        "temperature": None,
        "top_p": None,
        "top_k": None,
    }
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
        out = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            **settings,
            **way,
        )
        return out[0, ids.shape[1] :]

    model.eval()
    write(0, 8, {})  # warm-up: a process is slower at its first text
    with (
        count_passes(model) as passes,
        tqdm(total=runs * len(prompts), unit="prompt", desc="generating") as bar,
    ):
        for run in range(runs):
            for number in range(len(prompts)):
                texts = {}
                for name in turned(list(ways), run + number):
                    before = passes()
                    began = time.perf_counter()
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
        figures[name].steps = steps_with(
            drafter, [(prompts[at], text) for at, text in plain.items()]
        )
    how = (
        "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}, top_p {top_p:g}"
    )
    written = (
        f"{len(prompts)} prompts, runs over them: {runs}, {how}, at most {max_new_tokens} tokens\n"
        f"{named_dtype(model)} on {processor(model.device)}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}"
    )
    return Comparison(figures, runs * len(prompts), written, at_limit)


@contextlib.contextmanager
def count_passes(model: PreTrainedModel) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of forward passes since the start."""
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
    return (
        f"{'4 or 8 bits, ' if getattr(model, 'is_quantized', False) else ''}{model.dtype}".replace(
            "torch.", ""
        )
    )


def processor(device: torch.device) -> str:
    """Return the device's name, which every figure of speed needs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    has = torch.cpu.get_capabilities()
    kinds = {"avx512_bf16": "AVX-512 BF16", "avx512_f": "AVX-512", "avx2": "AVX2"}
    kind = next((f" with {name}" for key, name in kinds.items() if has.get(key)), "")
    return f"a CPU ({platform.machine()}{kind}), {torch.get_num_threads()} threads"


def as_table(found: Comparison) -> str:
    plain = found.ways[PLAIN]
    """Return the results as text."""
    lines = [
        found.written,
        "",
        f"{'':<20}{'tokens/s':>10}{'speed-up':>10}{'tokens/step':>13}  identical texts",
    ]
    for name, way in found.ways.items():
        same = "" if name == PLAIN else f"  {way.same} of {found.texts}"
        lines.append(
            f"{name:<20}{statistics.median(way.speeds()):>10.1f}{way.against(plain):>10.2f}"
            f"{way.tokens_per_pass:>13.2f}{same}"
        )
    for name, way in found.ways.items():
        if way.drafted is None:
            continue
        lines += [
            "",
            f"{'head':<6}{'predicts':<10}{'proposed':>10}{'accepted':>10}{'rate':>9}   ({name})",
        ]
        for k, (sent, right) in enumerate(
            zip(way.drafted.drafted, way.drafted.accepted, strict=True), 1
        ):
            share = f"{right / sent:.1%}" if sent else "-"
            lines.append(f"{k:<6}{f'{k + 1} ahead':<10}{sent:>10,}{right:>10,}{share:>9}")
        lines.append(
            "tokens in a step: "
            + ", ".join(f"{n} in {share:.0%}" for n, share in lengths(way.drafted))
        )
        if way.steps is not None:
            tokens = ", ".join(
                f"{n}: {tokens:.2f}" for n, tokens in enumerate(way.steps.tokens_per_step(), 1)
            )
            lines.append(
                f"tokens per step in an inference engine, by its number of draft tokens: {tokens}"
            )
        if not any(way.drafted.accepted):
            lines.append(
                "No draft token was accepted: these heads belong to another model or were hardly"
                " trained. Train them\non answers of this model: caft pretrain-heads --targets"
                " model --help"
            )
    if any(way.drafted is not None and way.same < found.texts for way in found.ways.values()):
        lines += [
            "",
            (
                "A text can differ where two tokens are almost equally likely, since a forward pass"
                " of several tokens\nrounds differently from a pass of one token. In float32 this"
                " is rare."
            ),
        ]
    return "\n".join(lines)


def lengths(drafted: Drafted) -> list[tuple[int, float]]:
    """Return the fraction of steps with 1, 2, ... tokens."""
    return [
        (length, passes / max(drafted.passes, 1))
        for length, passes in enumerate(drafted.lengths, 1)
    ]


def draw(found: Comparison, file: Path) -> None:
    """Draw the acceptance rate of each head and the distribution of tokens per step into a PNG
    file.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    way = found.ways[HEADS]
    drafted = found.ways[HEADS].drafted
    assert drafted is not None
    shares = [
        right / max(sent, 1) for sent, right in zip(drafted.drafted, drafted.accepted, strict=True)
    ]

    def fill(axes: Any) -> None:
        axes[0].bar([str(k) for k in range(1, len(shares) + 1)], shares, color=BLUE)
        axes[0].set(
            title="draft tokens accepted", xlabel="head", ylabel="acceptance rate", ylim=(0, 1)
        )
        axes[1].bar(
            *zip(*((str(n), share) for n, share in lengths(drafted)), strict=True), color=GREY
        )
        axes[1].set(
            title=f"{way.tokens_per_pass:.2f} tokens per step on average",
            xlabel="tokens in a step",
            ylabel="fraction of steps",
        )

    write_png(file, (8, 3.6), 2, fill)
