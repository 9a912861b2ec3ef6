"""A run's files next to the model: heads, mask token, section of the card, and its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from caft_plugin import checkpoints
from caft_plugin.caft.heads_record import FOLDER
from caft_plugin.errors import ConfigError
from caft_plugin.meap.mask_token import FILE as MASK_FILE
from caft_plugin.model_card import FrameworkCard, section
from caft_plugin.precision import warn_of_slow_bf16
from caft_plugin.trainer_parts import TrainerParts


class RunFiles:
    """The files of one trainer's CAFT and MEAP.

    With `saves_model`, the trainer's checkpoints hold the weights of the model or adapter.
    """

    def __init__(self, parts: TrainerParts, saves_model: bool) -> None:
        self.parts = parts
        self.trainer = parts.trainer
        self.saves_model = saves_model
        self._saving_checkpoint = False

    @property
    def requested(self) -> bool:
        """True if the run has CAFT, also at beta 0, or MEAP."""
        return self.parts.caft_config is not None or self.parts.meap_config is not None

    def checkpoint_to_resume(self, asked: str | bool | None) -> str | bool | None:
        """Return the complete checkpoint for `train(resume_from_checkpoint=asked)`.

        Raises:
            ConfigError: the requested checkpoint is incomplete, or there is none.
        """
        if not self.requested:
            return asked
        warn_of_slow_bf16(self.trainer.args, self.trainer.model)
        if not asked:
            return asked
        folder = str(self.trainer.args.output_dir)
        return checkpoints.to_resume_from(asked, folder, self._in_checkpoints())

    def newest_whole_checkpoint(self) -> str | None:
        """Return the newest complete checkpoint of the output folder, or None.

        A warning names newer ones that are incomplete.
        """
        folder = str(self.trainer.args.output_dir)
        newest = checkpoints.newest_warning_of_others(folder, self._in_checkpoints())
        return None if newest is None else str(newest)

    def _in_checkpoints(self) -> checkpoints.Parts:
        trainer = self.trainer
        # FSDP and DeepSpeed have files of their own
        plain = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        return checkpoints.Parts(
            weights=plain and self.saves_model,
            optimizer=plain and not trainer.args.save_only_model,
        )

    @contextlib.contextmanager
    def saving_checkpoint(self, checkpoint: Path) -> Iterator[None]:
        """Save for exact resuming while this is open, in a checkpoint that is incomplete so far."""
        if self.requested and self.trainer.args.should_save:
            checkpoints.begin_overwriting(checkpoint)
        self._saving_checkpoint = True
        try:
            yield
        finally:
            self._saving_checkpoint = False

    def save(self, output_dir: str | None) -> None:
        """Save the heads to `caft_heads/` and an added mask token to `caft_meap/` in `output_dir`.

        In a checkpoint, the heads' LoRA stays separate, for exact resuming.
        """
        if output_dir is None:
            return
        if self.trainer.args.should_save:
            self._set_aside_earlier(Path(output_dir))
        for part in self.parts.objectives:
            part.save(Path(output_dir), resumable=self._saving_checkpoint)

    def complete_model(self, output_dir: str | None) -> None:
        """Put the base's MTP layers into the model that the host saved, if it is no checkpoint."""
        mtp = self.parts.mtp
        if mtp is None or output_dir is None or self._saving_checkpoint:
            return
        if self.trainer.args.should_save:
            mtp.save(Path(output_dir))
        self.trainer.accelerator.wait_for_everyone()

    def _set_aside_earlier(self, folder: Path) -> None:
        """Rename heads and mask token of an earlier run where this run saves its model without."""
        if self.parts.removed or not self.requested:
            return
        meap = self.parts.meap
        saved = {
            FOLDER: self.parts.caft,
            MASK_FILE.parent.name: None if meap is None else meap.handle,
        }
        for name, part in saved.items():
            if part is None:
                checkpoints.set_aside(folder / name)

    def load(self, folder: str) -> None:
        """Load the heads and an added mask token from a checkpoint.

        Raises:
            ConfigError: the checkpoint was made with other settings.
        """
        for part in self.parts.objectives:
            part.load(folder)
        without_heads = self.parts.caft_config is not None and self.parts.caft is None
        if without_heads and (Path(folder) / FOLDER).exists():
            raise ConfigError(
                f"caft.beta: this run has 0 and so no heads, but the checkpoint {folder} was made"
                " with heads. Resume with the beta it was made with, or start from the beginning."
            )

    def framework_card(self, folder: str | None = None) -> FrameworkCard:
        """Return the card that the framework is about to write, by default in the run's folder."""
        folder = folder or str(self.trainer.args.output_dir)
        return FrameworkCard(Path(folder), section(self.parts.caft_config, self.parts.meap_config))
