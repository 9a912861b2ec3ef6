"""The TRL door: `CAFTSFTTrainer`, a drop-in for `trl.SFTTrainer` with two arguments more, `caft` and `meap`."""

from __future__ import annotations

try:
    from trl import SFTTrainer
except ImportError as error:
    raise ImportError(
        f"caft_plugin.trl needs TRL, which could not be imported ({error}). Install it: pip install 'caft_plugin[trl]'"
    ) from error

from caft_plugin.training import with_caft

CAFTSFTTrainer = with_caft(SFTTrainer)
