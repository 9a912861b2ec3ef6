"""The trainer class of an Axolotl run: made by with_caft, whoever calls it and whatever class the
YAML names."""

from __future__ import annotations

import pytest

pytest.importorskip("axolotl")

import trl
from axolotl.core.trainers import AxolotlTrainer
from axolotl.core.trainers.mixins import SchedulerMixin
from axolotl.utils.dict import DictDefault
from transformers import Trainer, TrainerCallback

from builders.runs import trainer_of
from caft_plugin import with_caft
from caft_plugin.axolotl.plugin import CAFTPlugin
from caft_plugin.axolotl.trainer import AxolotlMixin
from caft_plugin.trl import CAFTSFTTrainer, SFTMixin


class OverAxolotl(AxolotlTrainer):
    """A user's class for `trainer_cls:`."""


class OverTransformers(Trainer):
    """The same, not built on Axolotl's."""


class OverBoth(SchedulerMixin, trl.SFTTrainer):
    """The same, with parts of two frameworks."""


AlreadyCaft = with_caft(OverTransformers)


def in_a_run(name: str | None) -> type[Trainer]:
    cls = None if name is None else f"{__name__}.{name}"
    return CAFTPlugin().get_trainer_cls(DictDefault({"caft": {}, "trainer_cls": cls}))


def test_the_plugin_and_with_caft_make_the_same_class():
    assert in_a_run(None) is with_caft(AxolotlTrainer) is in_a_run(None)
    assert in_a_run("OverAxolotl") is with_caft(OverAxolotl)
    assert with_caft(with_caft(AxolotlTrainer)) is with_caft(AxolotlTrainer)
    assert with_caft(AxolotlTrainer).__name__ == "CAFTAxolotlTrainer"


@pytest.mark.parametrize("name", ["OverAxolotl", "OverTransformers", "OverBoth", "AlreadyCaft"])
def test_any_class_that_a_yaml_names_has_axolotls_part(name):
    made = in_a_run(name)
    assert issubclass(made, globals()[name]) and issubclass(made, AxolotlMixin)
    assert issubclass(made, SFTMixin) == (name == "OverBoth")


def test_each_framework_has_its_own_part_only():
    assert not issubclass(CAFTSFTTrainer, AxolotlMixin)
    assert not issubclass(with_caft(AxolotlTrainer), SFTMixin)
    assert not issubclass(with_caft(OverTransformers), AxolotlMixin)
    assert {AxolotlMixin, SFTMixin} <= {*with_caft(OverBoth).__mro__}


class Stopped(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise SystemExit  # as Axolotl's handler of Ctrl-C does


@pytest.mark.parametrize("framework", ["axolotl", None])
def test_heads_are_saved_when_axolotl_stops_the_run(tiny_model, tmp_path, framework):
    trainer = trainer_of(
        tiny_model,
        tmp_path,
        caft={"num_heads": 1},
        trainer_class=with_caft(Trainer, framework=framework),
        callbacks=[Stopped()],
    )
    with pytest.raises(SystemExit):
        trainer.train()
    saved = (tmp_path / "caft_heads" / "heads.safetensors").is_file()
    assert saved == (framework == "axolotl")
