"""`caft attention-report`: what masked training did to a model's attention (arXiv 2502.07490, section 5)."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from caft_plugin.config import DEFAULT_MASK_RATIO, ConfigError
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.mask_token import FILE, AddedMaskToken, MaskToken, choose_mask_token, row_norms
from caft_plugin.meap.roles import Roles
from caft_plugin.model_loading import load_model, load_tokenizer, merged
from caft_plugin.storage import numbered_lines, read_text, write_png
from caft_plugin.trunk import input_embedding

SEGMENTS = ("context", "answer", "query")
MODELS, INPUTS = ("base", "tuned"), ("plain", "masked")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and for each of its characters the segment it belongs to, "" for none."""

    text: str
    segments: list[str]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Means over texts, layers, heads and queries.

    `masked` and `variance` are by (model, input): the attention weight on positions that the masked input masks, and
    the variance of the weights on all others (the first token, which takes up what no token needs, left out of both).
    `segments`, by model and segment: share of the last token's attention, plain input, over texts that have segments.
    """

    texts: int
    mask_token: str
    masked: dict[tuple[str, str], float]
    variance: dict[tuple[str, str], float]
    segments: dict[tuple[str, str], float]

    @property
    def decay(self) -> float:
        """How much less attention masked positions get: the tuned model on masked input, against the base on plain."""
        return 1 - self.masked["tuned", "masked"] / self.masked["base", "plain"]

    @property
    def variance_increase(self) -> float:
        """How much more attention varies over the other positions, between the same two."""
        return self.variance["tuned", "masked"] / self.variance["base", "plain"] - 1


def read_texts(file: Path) -> list[Text]:
    """Texts of a file: JSON lines with `text`, or with `context`, `answer` and `query`; or plain text by paragraph.

    An answer that the context contains is a segment there; any other follows the context.

    Raises:
        ConfigError: no such file, no text in it, or a line of another kind.
    """
    content = read_text(file, "--text", "JSON lines or plain text")
    if file.suffix not in (".jsonl", ".json"):
        texts = [Text(part.strip(), [""] * len(part.strip())) for part in content.split("\n\n") if part.strip()]
    else:
        texts = [_of_line(file, number, line) for number, line in numbered_lines(content)]
    if not texts:
        raise ConfigError(f"--text: {file} holds no text.")
    return texts


def _of_line(file: Path, number: int, line: str) -> Text:
    try:
        row = json.loads(line)
        if "text" in row:
            return Text(row["text"], [""] * len(row["text"]))
        context, answer, query = (row[name] for name in SEGMENTS)
        before, found, after = context.partition(answer)
        parts = [("context", before), ("answer", answer), ("context", after)]
        if not found:
            parts = [("context", context + "\n"), ("answer", answer)]
        parts.append(("query", "\n" + query))
        return Text("".join(part for _, part in parts), [name for name, part in parts for _ in part])
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"--text: line {number} of {file} is not a JSON object with `text`, or with `context`, `answer` and "
            "`query`, all of them texts."
        ) from None


def attention_report(
    base: str, tuned: str, texts: list[Text], *, mask_ratio: float | None, mask_token: str, max_length: int, seed: int
) -> Figures:
    """The figures of two models with one tokenizer, over the same masked positions. An adapter's are those of the model
    that it is merged into.

    Raises:
        ConfigError: no mask token to be had, or texts too short to mask.
    """
    tokenizer = load_tokenizer(tuned)
    models = {
        name: merged(load_model(of, dtype="auto", attn_implementation="eager")).eval()
        for name, of in zip(MODELS, (base, tuned), strict=True)
    }
    encoded = [
        tokenizer(text.text, return_offsets_mapping=True, truncation=True, max_length=max_length) for text in texts
    ]
    kept = [(text, e) for text, e in zip(texts, encoded, strict=True) if len(e["input_ids"]) > 2]
    if not kept:
        raise ConfigError("--text: every text is shorter than three tokens, so nothing can be masked.")
    token = _mask_token(mask_token, tuned, tokenizer, models, frozenset(i for _, e in kept for i in e["input_ids"]))
    ratio = DEFAULT_MASK_RATIO["pretrain"] if mask_ratio is None else mask_ratio
    generator = random.Random(seed)
    sums: dict[tuple[str, ...], float] = {}
    for text, row in kept:
        ids = torch.tensor(row["input_ids"])
        drawn = generator.sample(range(1, len(ids) - 1), max(1, int(len(ids) * ratio)))
        masked = torch.zeros(len(ids), dtype=torch.bool)
        masked[drawn] = True
        inputs = {"plain": ids, "masked": ids.masked_fill(masked, token.id)}
        segment_of_token = [text.segments[start] if start < end else "" for start, end in row["offset_mapping"]]
        for model_name, model in models.items():
            for input_name, input_ids in inputs.items():
                weights = attention(model, input_ids)
                on_masked, variance = on_masked_and_variance_of_rest(weights, masked)
                for key, value in (("masked", on_masked), ("variance", variance)):
                    sums[key, model_name, input_name] = sums.get((key, model_name, input_name), 0.0) + value
                if input_name == "plain":
                    for segment in SEGMENTS:
                        where = torch.tensor([name == segment for name in segment_of_token])
                        share = weights[:, -1, where].sum(-1).mean().item()
                        sums[segment, model_name] = sums.get((segment, model_name), 0.0) + share
    in_segments = sum(any(text.segments) for text, _ in kept)
    return Figures(
        texts=len(kept),
        mask_token=token.words,
        masked={(m, i): sums["masked", m, i] / len(kept) for m in MODELS for i in INPUTS},
        variance={(m, i): sums["variance", m, i] / len(kept) for m in MODELS for i in INPUTS},
        segments={(m, s): sums[s, m] / in_segments for m in MODELS for s in SEGMENTS} if in_segments else {},
    )


def _mask_token(
    wanted: str,
    tuned: str,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
    used: frozenset[int],
) -> MaskToken:
    rows = input_embedding(models["tuned"]).num_embeddings
    if wanted == "auto" and (Path(tuned) / FILE).is_file():
        wanted = "add"
    # As the training run chose it, that is by the rows that the base has.
    norms = row_norms(input_embedding(models["base"]))
    base = BaseModel.of_model(models["base"])
    roles = Roles.of(tokenizer, base.roles)
    asked = int(wanted) if wanted.isdigit() else wanted
    token = choose_mask_token(asked, tokenizer, rows, used, norms, base.placeholders, roles)
    if token.added:
        for name, model in models.items():
            added = AddedMaskToken(model, token).attach()
            if name == "tuned" and (Path(tuned) / FILE).is_file():
                added.load(Path(tuned))
    return token


@torch.no_grad()
def attention(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Attention weights (layers * heads, length, length) of one sequence of token ids (length,), float32."""
    layers = model(input_ids=ids[None].to(model.device), output_attentions=True, use_cache=False).attentions
    layers = [layer for layer in layers if layer is not None]  # hybrids have layers without attention
    if not layers:
        raise ConfigError(f"{type(model).__name__} has no attention weights to report on.")
    return torch.cat([layer[0].float().cpu() for layer in layers])


def on_masked_and_variance_of_rest(weights: Tensor, masked: Tensor) -> tuple[float, float]:
    """Mean weight on masked positions, and variance of the weights on all others, over queries that see both.

    Args:
        weights: (maps, length, length), each row of a map a distribution over positions up to its own.
        masked: (length,) True where the masked input masks.
    """
    length = len(masked)
    earlier = torch.ones(length, length).tril().bool()
    earlier[:, 0] = False
    on_masked, rest = earlier & masked, earlier & ~masked
    seeing = (on_masked.sum(-1) > 0) & (rest.sum(-1) > 1)
    mean = (weights * on_masked).sum(-1) / on_masked.sum(-1).clamp(min=1)
    count = rest.sum(-1).clamp(min=2)
    centre = (weights * rest).sum(-1, keepdim=True) / count[:, None]
    variance = ((weights - centre).square() * rest).sum(-1) / count
    return mean[:, seeing].mean().item(), variance[:, seeing].mean().item()


def as_table(figures: Figures) -> str:
    lines = [
        f"{figures.texts} texts, masks written with {figures.mask_token}",
        "",
        "attention on masked positions, and variance over the others",
        "                base, plain  base, masked  tuned, plain  tuned, masked",
    ]
    order = [(m, i) for m in MODELS for i in INPUTS]
    for name, values in (("masked", figures.masked), ("variance", figures.variance)):
        lines.append(f"  {name:<12}" + "".join(f"{values[key]:>14.3e}" for key in order))
    lines += [
        "",
        f"attention decay at masked positions   {figures.decay:8.2%}   (tuned, masked against base, plain)",
        f"variance increase elsewhere           {figures.variance_increase:8.2%}",
    ]
    if figures.segments:
        lines += ["", "attention of the last token", "                base     tuned"]
        for segment in SEGMENTS:
            lines.append(f"  {segment:<10}" + "".join(f"{figures.segments[m, segment]:>9.2%}" for m in MODELS))
    return "\n".join(lines)


def draw(figures: Figures, file: Path) -> None:
    """Writes the figures as a PNG.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    def fill(axes: Any) -> None:
        bars = [f"{m}\n{i}" for m in MODELS for i in INPUTS]
        for axis, title, values in (
            (axes[0], f"on masked positions\ndecay {figures.decay:.1%}", figures.masked),
            (axes[1], f"variance over the others\nincrease {figures.variance_increase:.1%}", figures.variance),
        ):
            axis.bar(
                bars, [values[m, i] for m in MODELS for i in INPUTS], color=["#9aa5b1", "#9aa5b1", "#2f6f9f", "#2f6f9f"]
            )
            axis.set_title(title)
        if figures.segments:
            for offset, model in ((-0.2, "base"), (0.2, "tuned")):
                axes[2].bar(
                    [i + offset for i in range(len(SEGMENTS))],
                    [figures.segments[model, segment] for segment in SEGMENTS],
                    width=0.4,
                    label=model,
                    color={"base": "#9aa5b1", "tuned": "#2f6f9f"}[model],
                )
            axes[2].set_xticks(range(len(SEGMENTS)), SEGMENTS)
            axes[2].set_title("of the last token")
            axes[2].legend()

    write_png(file, (11, 3.6), 3 if figures.segments else 2, fill)
