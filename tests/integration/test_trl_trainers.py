"""Every trainer that TRL exports, with our class over it and neither `caft` nor `meap`: it does
what it did."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

pytest.importorskip("trl")

import trl
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer

from builders.sft import CHATS, COMPLETIONS, TEMPLATE, model_of
from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import with_caft
from caft_plugin.meap.label_codes import ELIGIBLE
from caft_plugin.trl import SFTMixin

pytestmark = pytest.mark.newest

EXPORTED = [
    name
    for name in trl.__all__
    # newer versions may export other kinds
    if name.endswith("Trainer") and issubclass(getattr(trl, name), Trainer)
]
PAIRS = [{"prompt": "w1 w2 ", "chosen": f"w{i} w5", "rejected": f"w{i + 1} w6"} for i in range(8)]
JUDGED = [{**row, "label": i % 2 == 0} for i, row in enumerate(COMPLETIONS[:8])]


def classifier():
    torch.manual_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))


# Those that train here within a second: what they train, and on what.
TRAINED = {
    "SFTTrainer": (model_of, CHATS),
    "DPOTrainer": (model_of, PAIRS),
    "KTOTrainer": (model_of, JUDGED),
    "RewardTrainer": (classifier, PAIRS),
}


def test_all_are_found():
    assert {*TRAINED, "GRPOTrainer", "RLOOTrainer"} <= set(EXPORTED)


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_a_trainers_own_stays_its_own(name):
    """Only methods of transformers' Trainer are overridden, and of SFTTrainer the one that packs
    its data."""
    host = getattr(trl, name)
    ours = with_caft(host)
    assert ours.__name__ == f"CAFT{name}" and with_caft(ours) is ours is with_caft(host)
    added = [base for base in ours.__mro__ if base not in host.__mro__]
    overridden = {key for base in added for key in vars(base) if hasattr(host, key)} - set(
        dir(object)
    )
    allowed = {"_prepare_dataset"} if issubclass(host, trl.SFTTrainer) else set()
    assert {key for key in overridden if not hasattr(Trainer, key)} <= allowed
    assert (
        getattr(ours, "_prepare_dataset", None) is getattr(host, "_prepare_dataset", None)
        or allowed
    )


@pytest.mark.parametrize("name", TRAINED)
def test_it_trains_as_it_did(name, tmp_path):
    """One step and an evaluation, the same digits."""
    make, rows = TRAINED[name]
    make().save_pretrained(tmp_path)  # the reference model is read from there
    logs = []
    for trainer_class in (getattr(trl, name), with_caft(getattr(trl, name))):
        arguments = getattr(trl, name.replace("Trainer", "Config"))(
            output_dir=str(tmp_path / "out"),
            use_cpu=True,
            bf16=False,
            max_steps=1,
            logging_steps=1,
            per_device_train_batch_size=4,
            report_to=[],
            save_strategy="no",
        )
        trainer = trainer_class(
            model=type(make()).from_pretrained(tmp_path),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            eval_dataset={"train": Dataset.from_list(rows[:4])},
            processing_class=word_tokenizer(TEMPLATE),
        )
        trainer.train()
        trainer.evaluate()
        logs.append(
            [
                {
                    key: value
                    for key, value in entry.items()
                    if not key.endswith(("time", "per_second"))
                }
                for entry in trainer.state.log_history
            ]
        )
    plain, ours = logs
    assert plain == ours
    assert "loss" in plain[0] and "eval_train_loss" in plain[-1]


class Mine(trl.SFTTrainer):
    """A user's own, which prepares another set in the name of training."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        held_out = Dataset.from_list(CHATS[:4])
        self.held_out = self._prepare_dataset(
            held_out,
            self.processing_class,
            self.args,
            False,
            formatting_func=None,
            dataset_name="train",
        )


def test_a_users_class_over_sfttrainer_gets_what_sfttrainer_gets(tmp_path):
    made = with_caft(Mine)
    assert issubclass(made, SFTMixin) and not issubclass(with_caft(Trainer), SFTMixin)
    trainer = made(
        model=model_of(),
        args=trl.SFTConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, max_steps=1, report_to=[]
        ),
        train_dataset=Dataset.from_list(CHATS),
        processing_class=word_tokenizer(TEMPLATE),
        meap={"mask_token": 95, "min_answer_tokens": 1},
    )
    assert max(map(max, trainer.train_dataset["labels"])) >= ELIGIBLE
    assert trainer.held_out.num_rows == 4 and max(map(max, trainer.held_out["labels"])) < 97


@pytest.mark.parametrize(
    "first",
    [
        "from caft_plugin import with_caft; from trl import SFTTrainer; C = with_caft(SFTTrainer)",
        "from caft_plugin.trl import CAFTSFTTrainer as C",
    ],
)
def test_the_door_opens_by_itself(first):
    """In a process of its own, in both orders of import."""
    code = (
        f"{first}; import sys; from trl import SFTTrainer; from caft_plugin.trl import"
        " CAFTSFTTrainer, SFTMixin; from caft_plugin import with_caft; assert C is CAFTSFTTrainer"
        " is with_caft(SFTTrainer); assert issubclass(C, SFTMixin)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_engine_alone_opens_no_door():
    code = (
        "import sys; from caft_plugin import with_caft; from transformers import Trainer;"
        " with_caft(Trainer); assert 'caft_plugin.trl' not in sys.modules and 'trl' not in"
        " sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
