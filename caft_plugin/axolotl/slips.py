"""Report mistakes in a YAML that Axolotl ignores: misspelt blocks, keys outside their block, wrong
plugin names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, MutableMapping

from axolotl.integrations.base import PluginManager
from axolotl.integrations.config import merge_input_args
from axolotl.utils.logging import get_logger

from caft_plugin.config import CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig
from caft_plugin.errors import ConfigError, shown

LOG = get_logger(__name__)

BLOCKS = {block.block: block for block in (CAFTConfig, MEAPConfig, MTPConfig, PretrainConfig)}
NAME = "caft_plugin"
FIX = f"Write:\n\n    plugins:\n      - {NAME}\n"


def meant(key: object) -> str | None:
    """Return the caft_plugin block that a YAML key misspells (`CAFT`, `cafft`, `caft.beta`), or
    None."""
    if not isinstance(key, str) or key in BLOCKS:
        return None
    plain = re.sub(r"[^a-z]+", "_", key.lower()).strip("_")
    first_word = plain.split("_")[0]
    for name in (plain, first_word):
        if name in BLOCKS:
            return name
    near = difflib.get_close_matches(plain, ("caft", "meap"), n=1, cutoff=0.75)
    # a long name resembles others more easily
    near += difflib.get_close_matches(plain, ("pretrain_heads",), n=1, cutoff=0.9)
    return near[0] if near else None


def refuse_slips(cfg: Mapping) -> None:
    """Raise ConfigError for top-level keys of a YAML that were meant for a caft_plugin block.

    Keys that Axolotl or another plugin defines are theirs.
    """
    known = known_keys()
    for key in cfg:
        block = meant(key)
        if block is not None and key not in known:
            raise ConfigError(
                f"{key}: unknown key, which Axolotl ignores. Did you mean `{block}:`? It accepts"
                f" the keys {', '.join(BLOCKS[block].model_fields)}, each on a line below it."
            )
    for name, block_class in BLOCKS.items():
        stray = [key for key in block_class.model_fields if key in cfg and key not in known]
        if stray:
            them = "it" if len(stray) == 1 else "them"
            raise ConfigError(
                f"{', '.join(stray)}: found at the top level, where Axolotl ignores {them}. Indent"
                f" {them} below `{name}:`."
            )


def known_keys() -> set[str]:
    """Return the top-level keys of the schema of Axolotl and its plugins."""
    _, schema = merge_input_args()
    aliases = {field.alias for field in schema.model_fields.values() if field.alias}
    return aliases | schema.model_fields.keys()


def ours(name: object) -> bool:
    """Return True if an entry of `plugins:` names caft_plugin, in any spelling."""
    package = re.sub(r"[^a-z.]", "", str(name).lower()).split(".")[0]
    return bool(difflib.get_close_matches(package, ("caftplugin",), cutoff=0.85))


def settle_names(cfg: MutableMapping) -> None:
    """Keep only one of several names of caft_plugin in `plugins:`, because each would add the
    blocks' schema again.

    Raises:
        ConfigError: `plugins:` mentions caft_plugin, but is not a list of names.
    """
    names = cfg.get("plugins")
    if isinstance(names, list):
        wrong = next((name for name in names if not isinstance(name, str)), None)
    else:
        wrong = names
    if wrong is not None and "caft" in str(wrong).lower():
        raise ConfigError(f"plugins: got {shown(wrong)}, but it accepts a list of names. {FIX}")
    if wrong is not None or not names:
        return
    of_ours = [name for name in names if ours(name)]
    if len(of_ours) > 1:
        cfg["plugins"] = [name for name in names if name is of_ours[0] or not ours(name)]


def check_loaded(cfg: Mapping) -> None:
    """Stop or warn if a YAML asks for CAFT or MEAP and the plugin was not loaded.

    Raises:
        ConfigError: the plugin is listed but failed to load (Axolotl only logs the reason).
    """
    plugins = PluginManager.get_instance().plugins.values()
    if any(type(plugin).__module__.split(".")[0] == NAME for plugin in plugins):
        return
    listed = [name for name in cfg.get("plugins") or [] if ours(name)]
    if listed:
        raise ConfigError(
            f"plugins: {listed[0]} could not be loaded; see the log lines above for the reason."
            f" {FIX}"
        )
    known = known_keys()
    blocks = [key for key in cfg if key in BLOCKS or (meant(key) and key not in known)]
    if blocks:
        LOG.warning(
            "%s: the config has this block, but `plugins:` does not list %s, so this is a plain run"
            " without CAFT and MEAP. %s",
            ", ".join(blocks),
            NAME,
            FIX,
        )


def refuse_misspelt(name: str, known: Iterable[str]) -> None:
    """Raise ConfigError for an unknown name in `plugins:` that resembles a `known` one."""
    spelt = {re.sub(r"[^a-z]", "", entry.lower()): entry for entry in known}
    near = difflib.get_close_matches(
        re.sub(r"[^a-z]", "", name.split(".")[0].lower()), spelt, n=1, cutoff=0.55
    )
    if near:
        raise ConfigError(
            f"plugins: got {name!r}, which is no plugin. Did you mean `{spelt[near[0]]}`? {FIX}"
        ) from None
