"""`caft speculate`: the speed of generation with heads, compared with plain generation and prompt
lookup."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
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

    @classmethod
    def of(cls, drafter: Drafter | None, runs: int) -> Way:
        """Return empty results of that many runs; without a drafter nothing is drafted."""
        drafted = None
        if drafter is not None:
            drafted = Drafted.nothing(len(drafter.heads))
        return cls([0] * runs, [0.0] * runs, drafted=drafted)

    def speeds(self) -> list[float]:
        """Return the tokens per second of each run."""
        runs = zip(self.tokens, self.seconds, strict=True)
        return [tokens / seconds for tokens, seconds in runs]

    def against(self, other: Way) -> float:
        """Return the speed as a multiple of the other way's: the median over the runs."""
        # Run by run: a machine that slows down slows both.
        runs = zip(self.speeds(), other.speeds(), strict=True)
        return statistics.median(own / its for own, its in runs)

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
    ways = arguments_of(drafters, lookup)
    # The same ends for all ways: prompt lookup and plain generation stop where the heads do.
    ends = sorted(end_tokens(model, tokenizer))
    settings = {
        **sampling(temperature, top_p),
        "eos_token_id": ends,
        "pad_token_id": ends[0],
        "use_cache": True,
    }
    generate: Any = model.generate
    figures = {name: Way.of(drafters.get(name), runs) for name in ways}
    plain: dict[int, list[int]] = {}  # by prompt
    at_limit = 0

    def write(
        number: int,
        length: int,
        way: dict[str, object],
    ) -> Tensor:
        ids = torch.tensor([list(prompts[number])], device=model.device)
        torch.manual_seed(seed + number)  # the same for all ways and runs
        out = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=length,
            **settings,
            **way,
        )
        return out[0, ids.shape[1] :]

    def measure(
        name: str,
        run: int,
        number: int,
        passes: Callable[[], int],
    ) -> Tensor:
        before = passes()
        began = time.perf_counter()
        text = write(number, max_new_tokens, ways[name])
        if model.device.type == "cuda":  # which returns before it has computed
            torch.cuda.synchronize()
        way = figures[name]
        way.seconds[run] += time.perf_counter() - began
        way.tokens[run] += len(text)
        way.passes += passes() - before
        if way.drafted is not None:
            way.drafted += drafters[name].last
        return text

    model.eval()
    write(0, 8, {})  # warm-up: a process is slower at its first text
    every = list(itertools.product(range(runs), range(len(prompts))))
    with count_passes(model) as passes:
        for run, number in tqdm(every, unit="prompt", desc="generating"):
            # Each way is the first one equally often, so a machine that slows down slows all.
            order = turned(list(ways), run + number)
            texts = {name: measure(name, run, number, passes) for name in order}
            for name, text in texts.items():
                figures[name].same += torch.equal(text, texts[PLAIN])
            plain[number] = texts[PLAIN].tolist()
            at_limit += len(plain[number]) == max_new_tokens and plain[number][-1] not in ends
    written = [(prompts[number], text) for number, text in plain.items()]
    for name, drafter in drafters.items():
        figures[name].steps = steps_with(drafter, written)
    how = "greedy"
    if temperature > 0:
        how = f"sampled at temperature {temperature:g}, top_p {top_p:g}"
    described = (
        f"{len(prompts)} prompts, runs over them: {runs}, {how}, at most {max_new_tokens} tokens\n"
        f"{machine_of(model)}"
    )
    return Comparison(figures, runs * len(prompts), described, at_limit)


def arguments_of(drafters: Mapping[str, Drafter], lookup: bool) -> dict[str, dict[str, object]]:
    """Return the arguments of `generate` of each way to generate, by the way's name."""
    ways: dict[str, dict[str, object]] = {PLAIN: {}}
    for name, drafter in drafters.items():
        ways[name] = {"custom_generate": drafter}
    if lookup:
        ways[LOOKUP] = {"prompt_lookup_num_tokens": LOOKUP_TOKENS}
    return ways


def sampling(temperature: float, top_p: float) -> dict[str, object]:
    """Return arguments of `generate`; those of the model's generation config are not used."""
    if temperature > 0:
        return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


@contextlib.contextmanager
def count_passes(model: PreTrainedModel) -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of forward passes since the start."""
    passes = [0]

    def note(*_: object) -> None:
        passes[0] += 1

    # Drafting runs the heads' layers, not the model, so it is not counted.
    handle = find_trunk(model).model.register_forward_pre_hook(note)
    try:
        yield lambda: passes[0]
    finally:
        handle.remove()


def turned(names: list[str], by: int) -> list[str]:
    by %= len(names)
    return names[by:] + names[:by]


def machine_of(model: PreTrainedModel) -> str:
    """Return the model's dtype, its device and the versions, which every figure of speed needs."""
    bits = "4 or 8 bits, " if getattr(model, "is_quantized", False) else ""
    dtype = str(model.dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    return f"{bits}{dtype} on {processor(model.device)}, {versions}"


def processor(device: torch.device) -> str:
    """Return the device's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    has = torch.cpu.get_capabilities()
    kinds = {"avx512_bf16": "AVX-512 BF16", "avx512_f": "AVX-512", "avx2": "AVX2"}
    kind = next((f" with {name}" for key, name in kinds.items() if has.get(key)), "")
    return f"a CPU ({platform.machine()}{kind}), {torch.get_num_threads()} threads"


def as_table(found: Comparison) -> str:
    """Return the results as text."""
    plain = found.ways[PLAIN]
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
    with_heads = {name: way for name, way in found.ways.items() if way.drafted is not None}
    for name, way in with_heads.items():
        lines += _table_of_heads(name, way)
    if any(way.same < found.texts for way in with_heads.values()):
        lines += [
            "",
            "A text can differ where two tokens are almost equally likely, since a forward pass of"
            " several tokens",
            "rounds differently from a pass of one token. In float32 this is rare.",
        ]
    return "\n".join(lines)


def _table_of_heads(name: str, way: Way) -> list[str]:
    drafted = way.drafted
    assert drafted is not None
    lines = [
        "",
        f"{'head':<6}{'predicts':<10}{'proposed':>10}{'accepted':>10}{'rate':>9}   ({name})",
    ]
    counts = zip(drafted.drafted, drafted.accepted, strict=True)
    for k, (sent, right) in enumerate(counts, 1):
        share = f"{right / sent:.1%}" if sent else "-"
        lines.append(f"{k:<6}{f'{k + 1} ahead':<10}{sent:>10,}{right:>10,}{share:>9}")
    shares = [f"{number} in {share:.0%}" for number, share in lengths(drafted)]
    lines.append(f"tokens in a step: {', '.join(shares)}")
    if way.steps is not None:
        tokens = enumerate(way.steps.tokens_per_step(), 1)
        by_number = ", ".join(f"{number}: {per_step:.2f}" for number, per_step in tokens)
        lines.append(
            f"tokens per step in an inference engine, by its number of draft tokens: {by_number}"
        )
    if not any(drafted.accepted):
        lines.append(
            "No draft token was accepted: these heads belong to another model or were hardly"
            " trained. Train them\non answers of this model: caft pretrain-heads --targets"
            " model --help"
        )
    return lines


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
    drafted = way.drafted
    assert drafted is not None
    counts = zip(drafted.drafted, drafted.accepted, strict=True)
    rates = [right / max(sent, 1) for sent, right in counts]
    heads = [str(k) for k in range(1, len(rates) + 1)]
    tokens = [str(number) for number, _ in lengths(drafted)]
    shares = [share for _, share in lengths(drafted)]

    def fill(axes: Any) -> None:
        axes[0].bar(heads, rates, color=BLUE)
        axes[0].set(
            title="draft tokens accepted",
            xlabel="head",
            ylabel="acceptance rate",
            ylim=(0, 1),
        )
        axes[1].bar(tokens, shares, color=GREY)
        axes[1].set(
            title=f"{way.tokens_per_pass:.2f} tokens per step on average",
            xlabel="tokens in a step",
            ylabel="fraction of steps",
        )

    write_png(file, (8, 3.6), 2, fill)
