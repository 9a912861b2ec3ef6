"""Task A, few data and many epochs: systematic names to SMILES from 500 molecules."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from datasets import Dataset

from study import measure
from study.measure import Asked, Model, Tokenizer
from study.protocol import Line, Run, Settings
from study.second import data, protocol
from study.second.data import Row
from study.second.fine_tuning import Places, saved_model, sft_trainer, train
from study.second.gradients import MeasuredSFT
from study.training import BestEpoch, Noise

if TYPE_CHECKING:
    from rdkit.Chem import Mol


def do(run: Run, settings: Settings, sizes: protocol.Sizes, places: Places) -> Line:
    """Train until the validation loss stops improving, and measure the model of the best epoch."""
    trainer = sft_trainer(run, settings, sizes, rows_of(settings, run.seed), places)
    tokenizer = trainer.processing_class
    if settings["noise"]:
        trainer.data_collator = Noise(
            trainer.data_collator, settings["noise"], len(tokenizer), run.seed
        )
    validation = measure.asked(tokenizer, data.read("molecules-validation")[: sizes.validation])

    def loss() -> float:
        return measure.mean_loss(measure.judge(trainer.model, validation, tokenizer.pad_token_id))

    epochs = BestEpoch(trainer, loss, settings["patience"])
    trainer.add_callback(epochs)
    figures = train(trainer)
    epochs.restore()
    figures["train_seconds"] = round(figures["train_seconds"] - epochs.seconds, 1)
    figures["validation"] = [round(loss, 6) for loss in epochs.losses]
    metrics = epochs.figures()
    if run.task == "few":
        model = saved_model(trainer, settings, places)
        metrics["heldout_loss"] = heldout_loss(model, tokenizer, sizes)
        rows = data.read("molecules-heldout")[: sizes.generated]
        written = measure.write(
            model, tokenizer, [row["prompt"] for row in rows], max_new_tokens=64, batch=250
        )
        items = items_of(written, [row["smiles"] for row in rows])
        metrics |= {name: measure.mean(values) for name, values in items.items()}
        figures["items"] = {
            name: [round(value, 4) for value in values] for name, values in items.items()
        }
        if trainer.caft_parts.caft is not None:
            metrics["tokens_per_pass"] = tokens_per_step(trainer, rows, written)
        metrics["forgetting"] = forgetting(model, tokenizer, sizes.base_answers, places)
    return {**figures, "metrics": metrics}


def rows_of(settings: Settings, seed: int) -> list[Row]:
    """Draw a seed's molecules. The first of more rows are those of fewer; stage 1 sees none of
    these."""
    pool = data.read("molecules-train")[protocol.STAGE1["rows"] :]
    drawn = random.Random(seed).sample(pool, len(pool))
    return drawn[: round(settings["rows"] * settings["times_rows"])]


# -- measures --------------------------------------------------------------------------------------


def heldout_loss(model: Model, tokenizer: Tokenizer, sizes: protocol.Sizes) -> float:
    questions = measure.asked(tokenizer, data.read("molecules-heldout")[: sizes.heldout])
    return measure.mean_loss(measure.judge(model, questions, tokenizer.pad_token_id))


def molecule(smiles: str) -> Mol | None:
    """Read a SMILES with RDKit; None where it cannot be read."""
    from rdkit import Chem, rdBase

    rdBase.DisableLog("rdApp.*")
    return Chem.MolFromSmiles(smiles) if smiles else None


def items_of(written: Sequence[str], references: Sequence[str]) -> dict[str, list[float]]:
    """Judge each SMILES that a model wrote: is it the reference's molecule (by canonical SMILES),
    can RDKit read it, and its Tanimoto similarity to the reference (Morgan, radius 2, 2,048 bits; 0
    where it cannot be read)."""
    from rdkit import Chem, DataStructs
    from rdkit.Chem import rdFingerprintGenerator

    morgan = rdFingerprintGenerator.GetMorganGenerator(radius=2, fpSize=2048)
    pairs = list(zip(map(molecule, written), map(molecule, references), strict=True))
    return {
        "exact": [
            float(a is not None and Chem.MolToSmiles(a) == Chem.MolToSmiles(b)) for a, b in pairs
        ],
        "valid": [float(a is not None) for a, _ in pairs],
        "tanimoto": [
            (
                0.0
                if a is None
                else DataStructs.TanimotoSimilarity(
                    morgan.GetFingerprint(a), morgan.GetFingerprint(b)
                )
            )
            for a, b in pairs
        ],
    }


def tokens_per_step(trainer: MeasuredSFT, rows: Sequence[Row], written: Sequence[str]) -> float:
    """Return what heads bring as drafters on the model's own greedy texts."""
    tokenizer = trainer.processing_class
    own = [
        Asked(tokenizer(row["prompt"]).input_ids, tokenizer(f" {text}").input_ids)
        for row, text in zip(rows, written, strict=True)
        if text
    ]
    tokenised = [  # as SFTTrainer has them
        {"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)}
        for prompt, answer in own
    ]
    return trainer.evaluate(Dataset.from_list(tokenised))["eval_caft/tokens_per_pass"]


@torch.no_grad()
def forgetting(model: Model, tokenizer: Tokenizer, number: int, places: Places) -> float:
    """Return KL(base || tuned) of the next-token distributions on the base model's own answers, in
    nats per token."""
    base = measure.load(places.model).eval()
    rows = [Asked(*pair) for pair in base_answers(base, tokenizer, number, places)]
    total, count = 0.0, 0
    for chosen in measure.by_length([len(row.prompt) + len(row.answer) for row in rows], 4096):
        inputs = measure.padded(
            [rows[i].prompt + rows[i].answer for i in chosen], tokenizer.pad_token_id
        )
        inputs = measure.on(base.device, inputs)
        longest = max(len(rows[i].answer) for i in chosen)
        keep = torch.arange(-longest - 1, -1, device=base.device)
        with measure.quickly(base.device):
            theirs, own = (
                one(**inputs, logits_to_keep=keep, use_cache=False).logits.float().log_softmax(-1)
                for one in (base, model)
            )
        apart = (theirs.exp() * (theirs - own)).sum(-1)
        for i, of_row in zip(chosen, apart, strict=True):
            total += of_row[-len(rows[i].answer) :].sum().item()
            count += len(rows[i].answer)
    return total / count


def base_answers(
    base: Model, tokenizer: Tokenizer, number: int, places: Places
) -> list[list[list[int]]]:
    """Return pairs of token ids, kept in a file: passages that nothing is trained on, and the base
    model's greedy continuation of each."""
    file = places.base_answers
    if file.is_file():
        return json.loads(file.read_text())[:number]
    prompts = [
        data.continuation(row["text"])["prompt"] for row in data.read("passages-heldout")[:number]
    ]
    written = measure.write(base, tokenizer, prompts, max_new_tokens=48, batch=50)
    pairs = [
        [tokenizer(prompt).input_ids, tokenizer(f" {text}").input_ids]
        for prompt, text in zip(prompts, written, strict=True)
        if text
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{random.getrandbits(32)}")
    unfinished.write_text(json.dumps(pairs))
    unfinished.replace(file)
    return pairs
