"""Read an Axolotl YAML as Axolotl's schema does (old key names, numbers as text, defaults), for all
commands."""

from __future__ import annotations

import copy
import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from pydantic import ValidationError

from caft_plugin.errors import ConfigError, first_line, shown
from caft_plugin.files import read_text
from caft_plugin.quiet import quiet

if TYPE_CHECKING:
    from axolotl.utils.dict import DictDefault

Keys = dict[str, Any]  # of a YAML file
BLOCKS = ("caft", "meap", "mtp", "pretrain_heads")
# Keys that Axolotl's schema requires and `caft plan` does not need.
NOT_NEEDED: Keys = {"learning_rate": 1e-4, "micro_batch_size": 1, "gradient_accumulation_steps": 1}
# Axolotl's old attention keys, and their value of `attn_implementation`.
OLD_ATTENTION = {
    "flash_attention": "flash_attention_2",
    "sdp_attention": "sdpa",
    "eager_attention": "eager",
    "flex_attention": "flex_attention",
    "xformers_attention": "xformers",
    "sage_attention": "sage",
}
WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def read_keys(file: Path, command: str) -> Keys:
    """Read the keys of a YAML file as written. `command` is named in errors.

    Raises:
        ConfigError: it is not a file, not YAML, or has no keys.
    """
    try:
        keys = yaml.safe_load(read_text(file, command, "an Axolotl YAML"))
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{command}: {file} is not YAML ({reason}). CONFIG accepts an Axolotl YAML."
        ) from error
    if not isinstance(keys, dict):
        raise ConfigError(
            f"{command}: {file} holds {shown(keys)}, but CONFIG accepts an Axolotl YAML of keys."
        )
    return keys


def has_axolotl() -> bool:
    return importlib.util.find_spec("axolotl") is not None


def read_config(
    file: Path,
    command: str,
    **keys: object,
) -> DictDefault:
    """Read a YAML file as `axolotl train` does; `keys` replace the file's.

    Raises:
        ConfigError: the file cannot be read, or Axolotl rejects a key.
    """
    from axolotl.cli.config import load_cfg

    read_keys(file, command)
    try:
        return load_cfg(str(file), **keys)
    except ConfigError:
        raise
    # Axolotl's validators, and readers of the base's config, raise many kinds
    except Exception as error:
        _refuse(command, error)


def read_for_plan(file: Path, command: str) -> Keys:
    """Read a YAML file for a command that needs no data, weights or GPU.

    If Axolotl is installed, its schema is used, without its checks of this machine. Otherwise only
    old attention keys, and numbers and booleans written as text, are converted.

    Raises:
        ConfigError: the file cannot be read, or Axolotl rejects a key.
    """
    keys = read_keys(file, command)
    whole = isinstance(keys.get("base_model"), str)  # else the command reports the missing key
    return _by_schema(keys, command) if whole and has_axolotl() else _by_hand(keys)


def _by_schema(keys: Keys, command: str) -> Keys:
    with quiet():  # packages log warnings about this machine when imported
        from axolotl.utils.config import prepare_plugins, validate_config
        from axolotl.utils.dict import DictDefault

    filled = {**NOT_NEEDED, **copy.deepcopy(keys)}
    if keys.get("batch_size") is not None:  # two of the three determine the third
        others = ("gradient_accumulation_steps", "micro_batch_size")
        unset = [key for key in others if keys.get(key) is None]
        if unset:
            del filled[unset[0]]
    if not (keys.get("datasets") or keys.get("pretraining_dataset")):
        filled["datasets"] = [{"path": "none", "type": "completion"}]
    cfg = DictDefault(filled)
    try:
        with quiet(logging.INFO):
            prepare_plugins(cfg)
        with quiet():  # warnings about old names, which `axolotl train` shows
            read = validate_config(cfg).to_dict()
    except ConfigError:
        raise
    except Exception as error:
        _refuse(command, error)
    # The schema has the blocks only if the plugin is listed, and drops an empty one.
    return {**read, **{block: keys[block] for block in BLOCKS if block in keys}}


def _by_hand(keys: Keys) -> Keys:
    read = {key: _value(value) for key, value in keys.items()}
    for old, new in OLD_ATTENTION.items():
        if read.pop(old, None) and read.get("attn_implementation") is None:
            read["attn_implementation"] = new
    return read


def _value(value: object) -> object:
    """Convert a number or boolean written as text, as Axolotl does."""
    if not isinstance(value, str):
        return value
    word = value.strip().lower()
    if word in WORDS:
        return WORDS[word]
    try:
        return int(value)
    except ValueError:
        return value


def _refuse(command: str, error: Exception) -> NoReturn:
    said = first_line(error)
    if isinstance(error, ValidationError):
        lines = []
        for found in error.errors():
            key = ".".join(map(str, found["loc"]))
            lines.append(
                f"{key}: got {shown(found['input'])}: {found['msg']}" if key else found["msg"]
            )
        said = "; ".join(lines)
    raise ConfigError(f"{command}: Axolotl rejects this YAML: {said}") from error
