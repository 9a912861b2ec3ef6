"""What a trained model is measured by: losses and first choices on given answers, and molecules that it writes.

A question of retrieval counts as found when every token of the number asked for is the model's likeliest one, the
answer's opening and the tokens before it given: greedy decoding would write exactly that number.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import data
import design
import torch

from caft_plugin.precision import cpu_has_bf16


class Asked(NamedTuple):
    """A prompt and its answer, as token ids."""

    prompt: list[int]
    answer: list[int]


class Judged(NamedTuple):
    """Of one answer: its tokens' summed loss in nats, their number, and whether each was the likeliest."""

    loss: float
    tokens: int
    right: bool


def asked(tokenizer: Any, rows: Sequence[data.Row], end: bool = True) -> list[Asked]:
    """Rows of `prompt` and `completion`; with `end` the end token is part of the answer."""
    ends = [tokenizer.eos_token_id] if end else []
    return [Asked(tokenizer(row["prompt"]).input_ids, tokenizer(row["completion"]).input_ids + ends) for row in rows]


def padded(rows: Sequence[Sequence[int]], pad: int) -> dict[str, torch.Tensor]:
    """A batch padded on the left, so that answers end together."""
    length = max(map(len, rows))
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    ids = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def on(device: torch.device, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.to(device) for key, value in inputs.items()}


def quickly(device: torch.device) -> torch.autocast:
    """Products in bfloat16 on a CPU that has instructions for it, elsewhere as the weights are."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cpu" and cpu_has_bf16())


@torch.no_grad()
def judge(model: Any, rows: Sequence[Asked], pad: int, tokens_in_batch: int = 4096) -> list[Judged]:
    """Each answer judged in one forward pass, rows of like length together. The model is left in training mode if it
    was."""
    training = model.training
    model.eval()
    found: dict[int, Judged] = {}
    for batch in by_length([len(row.prompt) + len(row.answer) for row in rows], tokens_in_batch):
        inputs = on(model.device, padded([rows[i].prompt + rows[i].answer for i in batch], pad))
        longest = max(len(rows[i].answer) for i in batch)
        # A tensor, because what a number cuts is not contiguous, and the unembedding is then copied for every row.
        keep = torch.arange(-longest - 1, 0, device=model.device)
        with quickly(model.device):
            logits = model(**inputs, logits_to_keep=keep, use_cache=False).logits.float()
        for i, of_row in zip(batch, logits, strict=True):
            answer = torch.tensor(rows[i].answer, device=model.device)
            before = of_row[-len(answer) - 1 : -1]
            loss = torch.nn.functional.cross_entropy(before, answer, reduction="sum").item()
            found[i] = Judged(loss, len(answer), bool((before.argmax(-1) == answer).all()))
    model.train(training)
    return [found[i] for i in range(len(rows))]


def by_length(lengths: Sequence[int], tokens_in_batch: int) -> list[list[int]]:
    """Indices in batches of at most so many tokens (but at least one row), padding counted, shortest first."""
    batches: list[list[int]] = [[]]
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > tokens_in_batch:
            batches.append([])
        batches[-1].append(i)
    return batches


def mean_loss(judged: Sequence[Judged]) -> float:
    """Nats a token, over all tokens."""
    return sum(one.loss for one in judged) / sum(one.tokens for one in judged)


# -- molecules --------------------------------------------------------------------------------------


@torch.no_grad()
def write(model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int = 48, batch: int = 100) -> list[str]:
    """What the model writes after each prompt, greedily, with a key-value cache."""
    model.eval()
    ids = [tokenizer(prompt).input_ids for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = on(model.device, padded([ids[i] for i in chosen], tokenizer.pad_token_id))
        del inputs["position_ids"]  # generate makes its own from the mask
        with quickly(model.device):
            out = model.generate(
                **inputs,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        written = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        texts.update(zip(chosen, written, strict=True))
    return [texts[i].strip() for i in range(len(prompts))]


GROUPS = {"benzene": "c1ccccc1", "amide": "[NX3][CX3](=[OX1])", "carboxyl": "[CX3](=O)[OX2H1]"}


def molecule_items(written: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Of each SMILES that a model wrote: whether it is the reference's molecule (by canonical SMILES), whether RDKit
    can read it, and its Tanimoto similarity to the reference (Morgan, radius 2, 2,048 bits; 0 where it cannot be
    read)."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    pairs = list(zip(map(molecule, written), map(molecule, references), strict=True))
    return {
        "exact": [float(a is not None and Chem.MolToSmiles(a) == Chem.MolToSmiles(b)) for a, b in pairs],
        "valid": [float(a is not None) for a, _ in pairs],
        "tanimoto": [
            0.0 if a is None else DataStructs.TanimotoSimilarity(morgan.GetFingerprint(a), morgan.GetFingerprint(b))
            for a, b in pairs
        ],
    }


def molecule(smiles: str) -> Any:
    """What RDKit reads, None where it reads nothing."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    return Chem.MolFromSmiles(smiles) if smiles else None


def molecule_metrics(written: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The means of `molecule_items`, and the F1 of groups (a group is in none that cannot be read)."""
    from rdkit import Chem

    metrics = {name: mean(values) for name, values in molecule_items(written, references).items()}
    made, meant = (list(map(molecule, texts)) for texts in (written, references))
    for name, smarts in GROUPS.items():
        pattern = Chem.MolFromSmarts(smarts)
        in_made = [a is not None and a.HasSubstructMatch(pattern) for a in made]
        in_meant = [b.HasSubstructMatch(pattern) for b in meant]
        both = sum(a and b for a, b in zip(in_made, in_meant, strict=True))
        total = sum(in_made) + sum(in_meant)
        metrics[f"f1_{name}"] = 2 * both / total if total else 0.0
    return metrics


def mean(values: Any) -> float:
    values = list(values)
    return sum(map(float, values)) / len(values)


# -- retrieval --------------------------------------------------------------------------------------


def document_questions(records: Sequence[data.Row], each: int) -> dict[str, list[data.Row]]:
    """By cell (`10_first` ...): questions whose document stands first, in the middle or last among others. The same
    questions and the same other documents in each place."""
    draw = random.Random(10)
    cells: dict[str, list[data.Row]] = {}
    for number in design.MDQA_DOCUMENTS:
        places = dict(zip(design.MDQA_PLACES, (0, number // 2, number - 1), strict=True))
        for _ in range(each):
            compound, *others = draw.sample(records, number)
            for place, index in places.items():
                shown = [data.document(one) for one in (*others[:index], compound, *others[index:])]
                row = {
                    "prompt": data.question(shown, compound) + data.opening(compound),
                    "completion": f" {compound['cas']}",
                }
                cells.setdefault(f"{number}_{place}", []).append(row)
    return cells


def needle_questions(tokenizer: Any, records: Sequence[data.Row], plain: bool, each: int) -> dict[str, list[data.Row]]:
    """By cell (`512_0.25` ...): one record somewhere in verses of the New Testament, a few other records evenly between
    them, the whole prompt just below a length in tokens. `plain` tells and asks by a sentence and its beginning, else
    it is as in fine-tuning. The same questions and verses at each depth."""

    def said(record: data.Row) -> str:
        return f"{data.opening(record).strip()} {record['cas']}." if plain else data.document(record)

    verses = data.verses(2)
    sizes = [len(tokenizer(verse + " ").input_ids) for verse in verses]
    cells: dict[str, list[data.Row]] = {}
    for length in design.NEEDLE_LENGTHS:
        draw = random.Random(length)
        for _ in range(each):
            record, *others = draw.sample(records, 1 + design.NEEDLE_OTHERS)
            start = draw.randrange(len(verses) // 2)
            asking = (
                f"\n{data.opening(record).strip()}" if plain else data.question([""], record) + data.opening(record)
            )
            needle, *other_needles = (said(one) for one in (record, *others))
            room = length - len(tokenizer(" ".join((needle, *other_needles, asking))).input_ids) - 24
            hay: list[str] = []
            for verse, size in zip(verses[start:], sizes[start:], strict=True):
                if size <= room:
                    hay.append(verse)
                    room -= size
            apart = len(hay) / max(len(others), 1)
            for number, other in reversed(list(enumerate(other_needles))):
                hay.insert(round((number + 0.5) * apart), other)
            for depth in design.NEEDLE_DEPTHS:
                place = round(depth * len(hay))
                text = " ".join((*hay[:place], needle, *hay[place:]))
                prompt = f"{text}{asking}" if plain else data.question([text], record) + data.opening(record)
                row = {"prompt": prompt, "completion": f" {record['cas']}"}
                cells.setdefault(f"{length}_{depth:g}", []).append(row)
    return cells


def retrieval_metrics(model: Any, tokenizer: Any, cells: dict[str, list[data.Row]], name: str) -> dict[str, float]:
    """Share of questions found and loss of the numbers' tokens: of each cell the former, and both over all."""
    flat = [row for rows in cells.values() for row in rows]
    judged = judge(model, asked(tokenizer, flat, end=False), tokenizer.pad_token_id)
    metrics, at = {}, 0
    for cell, rows in cells.items():
        metrics[f"{name}_{cell}"] = mean(one.right for one in judged[at : at + len(rows)])
        at += len(rows)
    overall = {f"{name}_accuracy": mean(one.right for one in judged), f"{name}_loss": mean_loss(judged)}
    return {**overall, **metrics}
