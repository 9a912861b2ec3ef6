"""Concept-aware fine-tuning (CAFT) and mask-enhanced prediction (MEAP) for Axolotl, TRL and any
`transformers.Trainer`.

Names are imported on first use, so that `import caft_plugin` is fast and needs no optional package.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CAFTConfig": "caft_plugin.config",
    "CAFTError": "caft_plugin.errors",
    "ConfigError": "caft_plugin.errors",
    "Drafter": "caft_plugin.drafting.decoding",
    "MEAPConfig": "caft_plugin.config",
    "MTPConfig": "caft_plugin.config",
    "with_caft": "caft_plugin.training",
    "CAFTPlugin": "caft_plugin.axolotl.plugin",
}
__all__ = [
    "CAFTConfig",
    "CAFTError",
    "CAFTPlugin",
    "ConfigError",
    "Drafter",
    "MEAPConfig",
    "MTPConfig",
    "with_caft",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'caft_plugin' has no attribute {name!r}")
    try:
        return getattr(import_module(_HOMES[name]), name)
    except ImportError as error:
        if name != "CAFTPlugin":
            raise
        # Axolotl only logs a plugin's ImportError and trains on without the plugin.
        raise RuntimeError(
            f"caft_plugin could not be loaded ({error}), so nothing is trained. "
            "Install both with: pip install 'caft_plugin[axolotl]'"
        ) from error
