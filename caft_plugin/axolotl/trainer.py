"""The part of `with_caft` for Axolotl's trainers."""

from __future__ import annotations

from axolotl.core.trainers import AxolotlTrainer
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from caft_plugin.training import CAFTTrainerMixin


class AxolotlMixin(CAFTTrainerMixin):
    """The part that also saves the heads when training is interrupted."""

    caft_reads_loss_alone = (*CAFTTrainerMixin.caft_reads_loss_alone, AxolotlTrainer)

    def train(self, *args, **kwargs) -> TrainOutput:
        card = self.caft_files.framework_card()
        try:
            return super().train(*args, **kwargs)
        except SystemExit:  # Ctrl-C: Axolotl's handler has saved the model into the output folder
            self.caft_files.save(self.args.output_dir)
            if self.is_world_process_zero():
                card.complete()
            raise


def mixin_of(trainer_class: type[Trainer]) -> type[CAFTTrainerMixin]:
    """Return the mixin that `with_caft` uses for any trainer that is built on one of Axolotl's."""
    return AxolotlMixin
