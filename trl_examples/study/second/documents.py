"""Task C, retrieval with headroom: questions on one of 6 to 8 documents."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import DataCollatorForSeq2Seq

from caft_plugin import MEAPConfig
from caft_plugin.meap.doubling import Duplication
from caft_plugin.meap.masking import MEAPCollator
from caft_plugin.targets import IGNORE, MASKED, PLAN
from study import measure
from study.measure import Model, Tokenizer
from study.protocol import Line, Run, Settings
from study.second import data, protocol
from study.second.data import Row
from study.second.fine_tuning import Places, saved_model, sft_trainer, train
from study.second.gradients import MeasuredSFT

IN_TEST = 7  # documents of a held-out question


def do(run: Run, settings: Settings, sizes: protocol.Sizes, places: Places) -> Line:
    """Train on questions, and count the held-out ones whose number is the model's first choice,
    token by token."""
    trainer = sft_trainer(run, settings, sizes, rows_of(settings, run.seed), places)
    tokenizer, is_pilot = trainer.processing_class, run.task == "documents-pilot"
    figures = train(trainer)
    model = saved_model(trainer, settings, places)
    if is_pilot:
        rows = middle_questions(data.read("records-validation"), sizes.validation_questions)
    else:
        rows = middle_questions(data.read("records-heldout"), sizes.questions)
    found = measure.judge(model, measure.asked(tokenizer, rows, end=False), tokenizer.pad_token_id)
    metrics = {
        "found": measure.mean(one.right for one in found),
        "answer_loss": measure.mean_loss(found),
    }
    if trainer.caft_parts.meap is not None and not is_pilot:
        metrics |= copying(trainer, model, tokenizer, settings, sizes)
    return {**figures, "metrics": metrics, "items": {"found": [float(one.right) for one in found]}}


def rows_of(settings: Settings, seed: int) -> list[Row]:
    """Draw a seed's questions, each on one of 6 to 8 documents; every place among them is asked for
    as often."""
    records = data.read("records-train")
    draw = random.Random(seed)
    chosen = draw.sample(records, settings["rows"])
    rows = []
    for number, compound in enumerate(chosen):
        size = settings["documents"][number % len(settings["documents"])]
        place = number // len(settings["documents"]) % size
        others = draw.sample([row for row in records if row is not compound], size - 1)
        rows.append(
            {"prompt": asked_of(compound, others, place), "completion": data.answer(compound)}
        )
    return rows


def middle_questions(records: Sequence[Row], number: int) -> list[Row]:
    """Make so many questions on seven records each, the answer's in the middle. No record is there
    twice."""
    if IN_TEST * number > len(records):
        raise ValueError(
            f"{number} questions need {IN_TEST * number} records, and there are {len(records)}"
        )
    rows = []
    for first in range(0, IN_TEST * number, IN_TEST):
        compound, *others = records[first : first + IN_TEST]
        prompt = asked_of(compound, others, IN_TEST // 2) + data.opening(compound)
        rows.append({"prompt": prompt, "completion": f" {compound['cas']}"})
    return rows


def asked_of(compound: Row, others: Sequence[Row], place: int) -> str:
    shown = [data.document(one) for one in (*others[:place], compound, *others[place:])]
    return data.question(shown, compound)


# -- how much MEAP's copy copies from its original -------------------------------------------------


def copying(
    trainer: MeasuredSFT,
    model: Model,
    tokenizer: Tokenizer,
    settings: Settings,
    sizes: protocol.Sizes,
) -> dict[str, float]:
    """Return the loss on masked tokens of rows that were not trained on: new documents, whose
    answer is in the prompt, and molecules, whose answer is not."""
    documents = rows_of({**settings, "rows": sizes.masked}, seed=1_000)
    least = protocol.MEAP["min_answer_tokens"]
    molecules = [
        row
        for row in data.read("molecules-heldout")
        # the first is never masked, nor the last
        if len(tokenizer(row["completion"]).input_ids) >= least + 2
    ][: sizes.masked]
    shorter = {**settings["meap"], "min_answer_tokens": least}
    return {
        **masked_losses("masked_loss", trainer, model, tokenizer, documents, settings["meap"]),
        **masked_losses("masked_molecule_loss", trainer, model, tokenizer, molecules, shorter),
    }


@torch.no_grad()
def masked_losses(
    metric: str,
    trainer: MeasuredSFT,
    model: Model,
    tokenizer: Tokenizer,
    rows: Sequence[Row],
    block: Settings,
) -> dict[str, float]:
    """Return the loss on masked tokens with the original in view before the copy, and without
    it."""
    assert trainer.caft_parts.meap is not None and trainer.caft_parts.meap.collator is not None
    mask_id, asked, found = (
        trainer.caft_parts.meap.collator.mask_id,
        measure.asked(tokenizer, rows),
        {},
    )
    for name, layout in (("with_original", "concat"), ("alone", "separate")):
        config = MEAPConfig(**{**block, "layout": layout})
        make = Duplication.of(config, tokenizer, None)
        collate = MEAPCollator(DataCollatorForSeq2Seq(tokenizer), config, mask_id, seed=0)
        total, count = 0.0, 0
        for prompt, answer in asked:
            *_, copy = make(
                {"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer}
            )
            batch = measure.on(model.device, collate([copy]))
            places = (batch[PLAN] & MASKED).bool()[0].nonzero()[:, 0]
            with measure.quickly(model.device):
                logits = model(
                    input_ids=batch["input_ids"], use_cache=False, logits_to_keep=places - 1
                ).logits[0]
            wanted = batch["labels"][0, places]
            total += torch.nn.functional.cross_entropy(
                logits.float(), wanted, reduction="sum"
            ).item()
            count += len(places)
        found[f"{metric}_{name}"] = total / count
    return found
