"""The third study's data: the King James Bible, as rows of token ids.

Chapters are split at random: some are for validation, some for tests, and the others are the pool
from which each seed draws its rows. A verse of the pool that is in a chapter of the other two, word
for word, is left out. The tokenizer is a byte-level BPE trained on the pool, so on more text than
one seed's rows. A row is a piece of the split's chapters, each of which ends with the end token.

The files are made once, and are enough for the runs. Their digest is in every line of results.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Sequence

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from study.protocol import OUTPUTS
from study.second.data import Verse, bible, continuation, script
from study.third.protocol import COMMON, VOCABULARY

FOLDER = OUTPUTS / "third-data"
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
LENGTH: int = COMMON["length"]
VERSES = "verses.jsonl"
CHAPTERS = {"test": 75, "validation": 25}
CONTINUED, CHARACTERS = 20, (100, 250)  # verses of the test chapters that the models continue
END, MASK = "<|end|>", "<|mask|>"

Chapter = list[Verse]


def split() -> dict[str, list[str]]:
    """Return the texts of chapters by split, one verse a line."""
    chapters = [
        list(verses) for _, verses in itertools.groupby(bible(), key=lambda verse: verse[:3])
    ]
    random.Random(0).shuffle(chapters)
    found: dict[str, list[Chapter]] = {}
    for name, number in CHAPTERS.items():
        found[name], chapters = chapters[:number], chapters[number:]
    seen = {verse.text for kept in found.values() for chapter in kept for verse in chapter}
    found["pool"] = [[verse for verse in chapter if verse.text not in seen] for chapter in chapters]
    return {name: [text_of(chapter) for chapter in kept if chapter] for name, kept in found.items()}


def text_of(chapter: Chapter) -> str:
    return "\n".join(verse.text for verse in chapter)


def trained_tokenizer(texts: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END, MASK], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows_of(tokenizer: Tokenizer, chapters: Sequence[str]) -> np.ndarray:
    """Return rows (number, LENGTH); what is left behind the last is dropped."""
    end = tokenizer.token_to_id(END)
    ids = [id_ for text in chapters for id_ in [*tokenizer.encode(text).ids, end]]
    number = len(ids) // LENGTH
    return np.array(ids[: number * LENGTH], dtype=np.uint16).reshape(number, LENGTH)


def cut_verses(chapters: Sequence[str]) -> list[dict[str, str]]:
    """Draw verses, each in its two halves."""
    least, most = CHARACTERS
    verses = [verse for text in chapters for verse in text.split("\n") if least < len(verse) < most]
    halves = map(continuation, random.Random(0).sample(verses, CONTINUED))
    return [{**one, "prompt": one["prompt"].removeprefix("Continue this text: ")} for one in halves]


def prepare() -> str:
    """Write the files unless they are there, and return the digest of all of them."""
    manifest = FOLDER / MANIFEST
    if not manifest.exists():
        texts = split()
        tokenizer = trained_tokenizer(texts["pool"])
        rows = {name: rows_of(tokenizer, chapters) for name, chapters in texts.items()}
        verses = [json.dumps(one) for one in cut_verses(texts["test"])]
        FOLDER.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(FOLDER / TOKENIZER))
        for name, ids in rows.items():
            np.save(FOLDER / f"{name}.npy", ids)
        parts = [tokenizer.to_str(), *verses, *(str(rows[name].tolist()) for name in sorted(rows))]
        digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
        write_rows = script().write_rows
        write_rows(FOLDER / VERSES, verses)
        # Last, so that a folder with a manifest is complete.
        counts = {name: len(ids) for name, ids in rows.items()}
        write_rows(manifest, [json.dumps({"digest": digest, "rows": counts})])
    return str(json.loads(manifest.read_text())["digest"])


@functools.cache
def read(split: str) -> np.ndarray:
    """Return the rows of `pool`, `validation` or `test`."""
    return np.load(FOLDER / f"{split}.npy").astype(np.int64)


def verses() -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / VERSES).open(encoding="utf-8")]


def load_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_file=str(FOLDER / TOKENIZER), eos_token=END, pad_token=END, mask_token=MASK
    )


def drawn(number: int, seed: int) -> np.ndarray:
    """Draw a seed's rows from the pool. The first of more rows are those of fewer."""
    pool = read("pool")
    if number > len(pool):
        raise ValueError(f"{number} rows were asked for, and the pool has {len(pool)}")
    return pool[random.Random(seed).sample(range(len(pool)), len(pool))[:number]]
