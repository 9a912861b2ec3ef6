"""`caft attention-report`: how masked training changed a model's attention (arXiv 2502.07490,
section 5)."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from caft_plugin.config import DEFAULT_MASK_RATIO
from caft_plugin.errors import ConfigError, asked_as
from caft_plugin.files import numbered_lines, read_text
from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.mask_token import (
    FILE,
    AddedMaskToken,
    MaskToken,
    choose_mask_token,
    row_norms,
)
from caft_plugin.meap.roles import Roles
from caft_plugin.model.loading import Source, load_tokenizer, merged
from caft_plugin.model.trunk import input_embedding
from caft_plugin.tools.pictures import write_png

SEGMENTS = ("context", "answer", "query")
MODELS = ("base", "tuned")
INPUTS = ("unmasked", "masked")
COLOURS = {"base": "#9aa5b1", "tuned": "#2f6f9f", "unmasked": "#9aa5b1", "masked": "#2f6f9f"}
# the two that the paper compares
FIRST = ("base", "unmasked")
LAST = ("tuned", "masked")

ByModelAndInput = Mapping[tuple[str, str], float]


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, and the segment of each of its characters ("" for none)."""

    text: str
    segments: list[str]


@dataclasses.dataclass(frozen=True)
class Figures:
    """Means over texts, layers, heads and queries.

    `masked` and `variance` have a value for each model and input: the attention weight on the
    positions that the masked input masks (the same positions of the unmasked input), and the
    variance of the weights on all others. Both leave out the first token, which gets the attention
    that no other token needs. `segments`, by model and segment: share of the last token's attention
    on unmasked input, over texts with segments.
    """

    texts: int
    mask_token: str
    masked: ByModelAndInput
    variance: ByModelAndInput
    segments: ByModelAndInput


def changed(before: float, after: float) -> str:
    """Return a change in words: `28.0 % lower`."""
    if before == 0:
        return "not comparable with 0"
    change = round(100 * (after / before - 1), 1)
    if change == 0:
        return "unchanged"
    return f"{abs(change):.1f} % {'lower' if change < 0 else 'higher'}"


def read_texts(file: Path) -> list[Text]:
    """Read the texts of a file: JSON lines with `text`, or with `context`, `answer` and `query`; or
    paragraphs.

    An answer that the context contains is a segment there; any other answer follows the context.

    Raises:
        ConfigError: the file does not exist, has no text, or has a line of another kind.
    """
    content = read_text(file, asked_as("text"), "JSON lines or plain text")
    if file.suffix not in (".jsonl", ".json"):
        paragraphs = [part.strip() for part in content.split("\n\n")]
        texts = [_plain(paragraph) for paragraph in paragraphs if paragraph]
    else:
        texts = [_of_line(file, number, line) for number, line in numbered_lines(content)]
    if not texts:
        raise ConfigError(
            f"{asked_as('text')}: {file} has no text in it. Give a file with at least one text."
        )
    return texts


def _plain(text: str) -> Text:
    return Text(text, [""] * len(text))


def _of_line(
    file: Path,
    number: int,
    line: str,
) -> Text:
    try:
        row = json.loads(line)
        if "text" in row:
            return _plain(row["text"])
        context, answer, query = (row[name] for name in SEGMENTS)
        before, found, after = context.partition(answer)
        parts = [("context", before), ("answer", answer), ("context", after)]
        if not found:
            parts = [("context", context + "\n"), ("answer", answer)]
        parts.append(("query", "\n" + query))
        segments = [name for name, part in parts for _ in part]
        return Text("".join(part for _, part in parts), segments)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ConfigError(
            f"{asked_as('text')}: line {number} of {file} is not a JSON object with `text`, or with"
            " `context`, `answer` and `query`, all of them texts."
        ) from None


def attention_report(
    base: str,
    tuned: str,
    texts: list[Text],
    *,
    mask_ratio: float | None,
    mask_token: str,
    max_length: int,
    seed: int,
    dtype: torch.dtype,
) -> Figures:
    """Compare the attention of two models with one tokenizer, over the same masked positions.

    Args:
        base: folder or Hub id of the model before tuning.
        tuned: the model after tuning, or its adapter, which is merged.
        texts: the texts to read.
        mask_ratio: fraction of the tokens to mask. None: the default of mode `pretrain`.
        mask_token: as `mask_token` of MEAPConfig.
        max_length: longer texts are cut, in tokens.
        seed: of the masked positions.
        dtype: to compute in.

    Raises:
        ConfigError: a model cannot be loaded, no mask token is available, or all texts are too
            short to mask.
    """
    # names and texts are checked before any weights are loaded
    sources = {
        name: Source.of(of, key=asked_as(name))
        for name, of in zip(MODELS, (base, tuned), strict=True)
    }
    tokenizer = load_tokenizer(tuned, key=asked_as("tuned"))
    rows = encode(texts, tokenizer, max_length)
    # Only the eager implementation returns attention weights.
    models = {}
    for name, source in sources.items():
        loaded = source.load(dtype, attn_implementation="eager")
        models[name] = merged(loaded).eval()
    used = frozenset(token for row in rows for token in row.ids)
    token = _mask_token(mask_token, tuned, tokenizer, models, used)
    ratio = DEFAULT_MASK_RATIO["pretrain"] if mask_ratio is None else mask_ratio
    generator = random.Random(seed)
    sums: dict[tuple[str, str, str], float] = defaultdict(float)
    for row in tqdm(rows, unit="text", desc="computing attention"):
        length = len(row.ids)
        count = max(1, int(length * ratio))
        # Both models mask the same positions. The first and the last token are never masked.
        drawn = generator.sample(range(1, length - 1), count)
        masked = torch.zeros(length, dtype=torch.bool)
        masked[drawn] = True
        for name, model in models.items():
            for (figure, part), value in figures_of(model, row, masked, token.id).items():
                sums[figure, name, part] += value
    return means(sums, rows, token.words)


def means(
    sums: Mapping[tuple[str, str, str], float],
    rows: list[Row],
    mask_token: str,
) -> Figures:
    """Return the means of figures that were summed by figure, model, and input or segment."""

    def mean(
        figure: str,
        parts: tuple[str, ...],
        texts: int,
    ) -> dict[tuple[str, str], float]:
        at = itertools.product(MODELS, parts)
        return {(model, part): sums[figure, model, part] / texts for model, part in at}

    in_segments = sum(any(row.text.segments) for row in rows)
    return Figures(
        texts=len(rows),
        mask_token=mask_token,
        masked=mean("masked", INPUTS, len(rows)),
        variance=mean("variance", INPUTS, len(rows)),
        segments=mean("segments", SEGMENTS, in_segments) if in_segments else {},
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """A text, its token ids, and the segment of each token."""

    text: Text
    ids: list[int]
    segments: list[str]


def encode(
    texts: list[Text],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[Row]:
    """Return the texts of at least three tokens, cut to `max_length` tokens.

    Raises:
        ConfigError: all texts are shorter.
    """
    rows = []
    for text in texts:
        encoded = tokenizer(
            text.text, return_offsets_mapping=True, truncation=True, max_length=max_length
        )
        spans = encoded["offset_mapping"]  # of special tokens: empty
        segments = [text.segments[start] if start < end else "" for start, end in spans]
        rows.append(Row(text, encoded["input_ids"], segments))
    rows = [row for row in rows if len(row.ids) > 2]
    if not rows:
        raise ConfigError(
            f"{asked_as('text')}: every text is shorter than three tokens, so nothing can be"
            " masked. Give longer texts."
        )
    return rows


def figures_of(
    model: PreTrainedModel,
    row: Row,
    masked: Tensor,
    mask_token: int,
) -> dict[tuple[str, str], float]:
    """Return a model's figures on a text: `masked` and `variance` by input, `segments` by segment.

    Args:
        model: the model.
        row: the text.
        masked: (length,), True at the positions to mask.
        mask_token: id of the mask token.
    """
    ids = torch.tensor(row.ids)
    inputs = {"unmasked": ids, "masked": ids.masked_fill(masked, mask_token)}
    found = {}
    for given, input_ids in inputs.items():
        weights = attention(model, input_ids)
        on_masked, variance = on_masked_and_variance_of_rest(weights, masked)
        found["masked", given] = on_masked
        found["variance", given] = variance
        if given == "unmasked":
            by_segment = shares_of_segments(weights[:, -1], row.segments)
            found |= {("segments", segment): share for segment, share in by_segment.items()}
    return found


def shares_of_segments(weights: Tensor, segments: list[str]) -> dict[str, float]:
    """Return each segment's share of one query's attention weights (maps, length)."""
    shares = {}
    for segment in SEGMENTS:
        where = torch.tensor([of_token == segment for of_token in segments])
        shares[segment] = weights[:, where].sum(-1).mean().item()
    return shares


def _mask_token(
    wanted: str,
    tuned: str,
    tokenizer: PreTrainedTokenizerBase,
    models: dict[str, PreTrainedModel],
    used: frozenset[int],
) -> MaskToken:
    rows = input_embedding(models["tuned"]).num_embeddings
    # An added mask token lies next to the model that was trained with it.
    if wanted == "auto" and (Path(tuned) / FILE).is_file():
        wanted = "add"
    # Choose as the training run did: by the embedding rows of the base.
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
    """Return the attention weights (layers * heads, length, length), in float32, of token ids
    (length,)."""
    ids = ids[None].to(model.device)
    layers = model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    # hybrids have layers without attention
    layers = [layer for layer in layers if layer is not None]
    if not layers:
        raise ConfigError(
            f"{type(model).__name__} returns no attention weights. Give a model with attention"
            " layers."
        )
    return torch.cat([layer[0].float().cpu() for layer in layers])


def on_masked_and_variance_of_rest(weights: Tensor, masked: Tensor) -> tuple[float, float]:
    """Return the mean weight on masked positions and the variance of the weights on all others,
    over the queries that attend to both.

    Args:
        weights: (maps, length, length), each row of a map a distribution over positions up to its
            own.
        masked: (length,), True at masked positions.
    """
    length = len(masked)
    earlier = torch.ones(length, length).tril().bool()  # (queries, positions)
    earlier[:, 0] = False  # it gets the attention that no other token needs
    on_masked = earlier & masked
    rest = earlier & ~masked
    seeing = (on_masked.sum(-1) > 0) & (rest.sum(-1) > 1)
    masked_count = on_masked.sum(-1).clamp(min=1)
    mean = (weights * on_masked).sum(-1) / masked_count
    rest_count = rest.sum(-1).clamp(min=2)
    centre = (weights * rest).sum(-1) / rest_count
    squares = (weights - centre[..., None]).square() * rest
    variance = squares.sum(-1) / rest_count
    return mean[:, seeing].mean().item(), variance[:, seeing].mean().item()


def as_table(figures: Figures) -> str:
    """Return the figures as text: each model on unmasked and on masked text, then the paper's
    comparison."""
    on_masked = (
        "Mean attention weight on the masked positions (of unmasked text: on the same positions)"
    )
    lines = [
        f"{figures.texts} texts, masked with {figures.mask_token}",
        *_by_model_and_input(on_masked, figures.masked),
        *_by_model_and_input(
            "Variance of the attention weights on all other positions", figures.variance
        ),
    ]
    if figures.segments:
        lines += [
            "",
            "Share of the last token's attention (unmasked text)",
            f"  {'':<18}{'base':>16}{'tuned':>16}",
        ]
        for segment in SEGMENTS:
            shares = [f"{figures.segments[model, segment]:>16.2%}" for model in MODELS]
            lines.append(f"  {segment:<18}{''.join(shares)}")
    lines += [
        "",
        "The tuned model on masked text, compared with the base model on unmasked text, as in the"
        " paper:",
    ]
    for name, values in compared(figures).items():
        lines.append(f"  {name}: {changed(values[FIRST], values[LAST])}")
    return "\n".join(lines)


def _by_model_and_input(title: str, values: ByModelAndInput) -> list[str]:
    """Return the lines of a table: the effect of masking by rows, that of tuning by columns."""
    lines = [
        "",
        title,
        f"  {'':<18}{'unmasked text':>16}{'masked text':>16}{'effect of masking':>20}",
    ]
    for model in MODELS:
        unmasked, masked = (values[model, given] for given in INPUTS)
        effect = changed(unmasked, masked)
        lines.append(f"  {model:<18}{unmasked:>16.3e}{masked:>16.3e}{effect:>20}")
    cells = ""
    for given in INPUTS:
        base, tuned = (values[model, given] for model in MODELS)
        cells += f"{changed(base, tuned):>16}"
    return [*lines, f"  {'effect of tuning':<18}{cells}"]


def compared(figures: Figures) -> dict[str, ByModelAndInput]:
    return {
        "attention on masked positions": figures.masked,
        "variance of the attention on other positions": figures.variance,
    }


def draw(figures: Figures, file: Path) -> None:
    """Draw the figures into a PNG file.

    Raises:
        ConfigError: matplotlib is not installed.
    """

    labels = ["mean attention weight", "variance of the attention weights"]

    def fill(axes: Any) -> None:
        # a third panel has the segments
        panels = zip(axes, compared(figures).items(), labels, strict=False)
        for axis, (name, values), label in panels:
            heights = {given: [values[model, given] for model in MODELS] for given in INPUTS}
            bars(axis, MODELS, heights, "text")
            title = f"{name}:\n{changed(values[FIRST], values[LAST])}"
            axis.set(title=title, xlabel="model", ylabel=label)
        if figures.segments:
            shares = figures.segments
            heights = {model: [shares[model, part] for part in SEGMENTS] for model in MODELS}
            bars(axes[2], SEGMENTS, heights, "model")
            axes[2].set(
                title="attention of the last token",
                xlabel="segment",
                ylabel="share of the attention",
            )
        axes[0].figure.suptitle(
            "Changes: the tuned model on masked text, compared with the base model on unmasked text"
        )

    write_png(file, (13, 4.4), 3 if figures.segments else 2, fill)


def bars(
    axis: Any,
    groups: tuple[str, ...],
    heights: Mapping[str, list[float]],
    legend: str,
) -> None:
    """Draw two bars in each group, one for each key of `heights`."""
    for offset, (name, values) in zip((-0.2, 0.2), heights.items(), strict=True):
        places = [at + offset for at in range(len(groups))]
        axis.bar(places, values, width=0.4, label=name, color=COLOURS[name])
    axis.set_xticks(range(len(groups)), groups)
    axis.margins(y=0.3)  # room for the legend
    axis.legend(title=legend, ncols=2, loc="upper center")
