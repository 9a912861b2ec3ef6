"""Keep a base model's MTP layers in what a trainer saves."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import cast

from peft import PeftModel
from transformers import PreTrainedModel, Trainer
from transformers.utils import ADAPTER_CONFIG_NAME

from caft_plugin.errors import ConfigError
from caft_plugin.mtp.keep import ADAPTER_HAS_THEM, Base, keep_mtp

logger = logging.getLogger(__name__)

KEY = "mtp.mode: keep"
IN_ADAPTER = (
    f"mtp: %s is an adapter, to which nothing is added: {ADAPTER_HAS_THEM}, use `caft keep-mtp`"
)


class KeptMTP:
    """The MTP layers of a trainer's base model, put into each model that it saves for good.

    Checkpoints stay as they are: the Trainer reads them again.
    """

    def __init__(self, base: Base) -> None:
        self.base = base

    @classmethod
    def of(cls, trainer: Trainer) -> KeptMTP:
        """Find the MTP layers of a trainer's model where it was loaded from.

        Raises:
            ConfigError: the model was not loaded from a folder or Hub id, or that has none.
        """
        model = trainer.model
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        config = cast(PreTrainedModel, model).config
        name = config._name_or_path
        if not name:
            raise ConfigError(
                f"{KEY}: the model was not loaded from a folder or Hub id, so there are no MTP"
                " layers to keep. Load it with from_pretrained, or remove mtp."
            )
        return cls(Base.open(name, KEY, getattr(config, "_commit_hash", None)))

    def save(self, folder: Path) -> None:
        """Put the layers into the model that was saved in `folder`; one process calls it.

        Raises:
            ConfigError: the folder has no safetensors files (a sharded state dict, say).
        """
        if (folder / ADAPTER_CONFIG_NAME).is_file():
            logger.warning(IN_ADAPTER, folder)
            return
        logger.warning("%s", keep_mtp(self.base, folder, KEY))
