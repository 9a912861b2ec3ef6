"""TRL support: `CAFTSFTTrainer`, a drop-in replacement for `trl.SFTTrainer` with the arguments
`caft` and `meap`."""

from __future__ import annotations

import copy
import inspect

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        f"caft_plugin.trl needs TRL, which could not be imported ({error}). Install it: pip install"
        " 'caft_plugin[trl]'"
    ) from error

from torch import nn
from transformers import Trainer

from caft_plugin.meap.base_model import BaseModel
from caft_plugin.meap.label_codes import has_target
from caft_plugin.meap.training_set import TrainingSet
from caft_plugin.training import CAFTTrainerMixin, with_caft

ARGUMENTS = inspect.signature(SFTTrainer._prepare_dataset)


class SFTMixin(CAFTTrainerMixin):
    """The part for SFTTrainer, which tokenises, truncates and packs its data in its constructor."""

    def __init__(self, *args, **kwargs) -> None:
        # `_prepare_dataset` needs the model before SFTTrainer sets it
        host = inspect.signature(super(CAFTTrainerMixin, self).__init__)
        of_host = {key: kwargs[key] for key in kwargs.keys() - {"caft", "meap", "mtp"}}
        given = host.bind_partial(*args, **of_host).arguments
        named = given.get("kwargs", {})
        self.caft_model_given = given.get("model", named.get("model"))
        super().__init__(*args, **kwargs)
        self.caft_model_given = None

    def _prepare_dataset(
        self,
        dataset: TrainingSet,
        *args,
        **kwargs,
    ) -> TrainingSet:
        """Tokenise first, without truncation, add the masked copies, then run the rest of
        SFTTrainer's preparation.

        Only the first data set named "train" is doubled: evaluation sets may have any name.
        """
        prepare = super()._prepare_dataset  # type: ignore[misc]
        dataset = self.caft_parts.as_evaluated(dataset)
        meap = self.caft_parts.meap
        if meap is None or meap.config.mode != "sft" or meap.data.current is not None:
            return prepare(dataset, *args, **kwargs)
        given = ARGUMENTS.bind(self, dataset, *args, **kwargs).arguments
        name = given["dataset_name"]
        if name != "train":
            return prepare(dataset, *args, **kwargs)
        settings = given["args"]
        tokenizer = given["processing_class"]
        packing = given["packing"]
        cut = settings.max_length is not None and not packing

        def finish(rows: TrainingSet) -> TrainingSet:
            rows = prepare(rows, tokenizer, settings, packing, None, name)
            # SFTTrainer drops rows that were cut before their first target, but in the labels of a
            # copy it sees codes.
            if cut and meap.config.layout == "separate":
                rows = rows.filter(has_target)
            return rows

        # A copy must follow its whole original: both are cut together afterwards.
        uncut = copy.copy(settings)
        uncut.max_length = None
        uncut.shuffle_dataset = False
        tokenised = prepare(dataset, tokenizer, uncut, False, given["formatting_func"], name)
        base = base_model(self.caft_model_given, settings)
        return meap.data.double(
            tokenised, tokenizer, base, settings.max_length, args=settings, finish=finish
        )


def base_model(model: object, settings: SFTConfig) -> BaseModel:
    """Return MEAP's facts about the model that SFTTrainer was given or will load; none if it
    creates its own model.

    SFTTrainer prepares its data before it sets `self.model`.
    """
    if isinstance(model, str):
        return BaseModel.named(model, **dict(settings.model_init_kwargs or {}))  # type: ignore[arg-type]
    return BaseModel.of_model(model) if isinstance(model, nn.Module) else BaseModel()


def mixin_of(trainer_class: type[Trainer]) -> type[CAFTTrainerMixin]:
    """Return the mixin that `with_caft` uses for one of TRL's trainers."""
    return SFTMixin if issubclass(trainer_class, SFTTrainer) else CAFTTrainerMixin


CAFTSFTTrainer = with_caft(SFTTrainer)
