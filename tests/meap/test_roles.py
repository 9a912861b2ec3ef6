"""No token with a role is masked or taken as the mask token, whoever gives it the role; pairs fit
the base model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    BloomConfig,
    Gemma3Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    OPTConfig,
)

from builders.masked import pad
from builders.runs import CAFTTrainer, arguments
from builders.tiny import LLAMA, word_tokenizer
from builders.tokenizers_of_families import FAMILIES, WORDS, tokenizer
from caft_plugin import ConfigError, MEAPConfig
from caft_plugin.meap.base_model import BaseModel, positions_of
from caft_plugin.meap.doubling import Duplication
from caft_plugin.meap.label_codes import ELIGIBLE
from caft_plugin.meap.mask_token import choose_mask_token
from caft_plugin.meap.masking import MEAPCollator
from caft_plugin.meap.roles import Roles, Said, role_ids
from caft_plugin.targets import MASKED, PLAN

CHAT = "{% for m in messages %}<BEGIN>{{ m.role }}{{ m.content }}<END>[STOP]{% endfor %}"


def with_added_tokens():
    made = word_tokenizer(CHAT)
    made.add_tokens(["<BEGIN>", "<END>", "<tool>", "aspirin", "@end@", "@turn@"])
    return made


def maskable(made, **settings):
    """The words that may be masked in an answer that holds all of them."""
    words = ["w1", "<BEGIN>", "<tool>", "aspirin", "@end@", "w2", "w3", "@turn@", "w4", "<END>"]
    ids = [5, *made.convert_tokens_to_ids(words)]
    duplicate = Duplication.of(MEAPConfig(min_answer_tokens=2), made, None, **settings)
    copy = duplicate.copy_labels(np.array(ids), np.array([-100, *ids[1:]]))
    return set(made.convert_ids_to_tokens(copy[copy >= ELIGIBLE] - ELIGIBLE))


def test_added_tokens_with_a_role_are_never_masked():
    made = with_added_tokens()
    assert maskable(made) == {"w1", "w2", "w3", "w4", "aspirin", "@end@", "@turn@"}
    said = Said(ends=["@end@"], added=["aspirin"], templates=["{{ x }}@turn@"])
    assert maskable(made, said=said) == {"w1", "w2", "w3", "w4"}
    ids = made.convert_tokens_to_ids(["w2", "w3"])
    config = LlamaConfig(**{**LLAMA, "eos_token_id": ids[:1]})
    in_configs = role_ids(config, GenerationConfig(eos_token_id=[1, ids[1]]))
    assert maskable(made, base=BaseModel(roles=in_configs)) == {
        "w1",
        "w4",
        "aspirin",
        "@end@",
        "@turn@",
    }


def test_a_mark_in_the_template_has_a_role_though_it_was_not_added():
    made = tokenizer(["<unk>", "[STOP]", "<END>", "[note]", "user", *WORDS], [], template=CHAT)
    assert Roles.of(made).given == {1, 2}


GIVEN = {
    "the padding": (
        lambda made: made.add_special_tokens({"pad_token": "<|reserved_special_token_0|>"}) and {}
    ),
    "an end token of the model": lambda made: {
        "in_configs": role_ids(GenerationConfig(eos_token_id=[51, 52]))
    },
    "an end of a turn": lambda made: {"said": Said(ends=["<|reserved_special_token_0|>"])},
    "the template": lambda made: {"said": Said(templates=["<|reserved_special_token_0|>"])},
}


@pytest.mark.parametrize("given", GIVEN)
def test_a_token_with_a_role_is_not_taken_as_the_mask(given):
    made = FAMILIES["Llama 3"][0]()
    first, second = made.convert_tokens_to_ids(
        ["<|reserved_special_token_0|>", "<|reserved_special_token_1|>"]
    )
    assert choose_mask_token("auto", made, 54, frozenset()).id == first
    roles = Roles.of(made, **(GIVEN[given](made) or {}))
    assert choose_mask_token("auto", made, 54, frozenset(), roles=roles).id == second
    for asked in (first, "<|reserved_special_token_0|>"):
        with pytest.raises(
            ConfigError,
            match=r"meap.mask_token: got .* \(id 52\), but the chat template, .* gives it a",
        ):
            choose_mask_token(asked, made, 54, frozenset(), roles=roles)


def test_a_token_that_was_added_may_be_named_as_the_mask():
    made = FAMILIES["Llama 3"][0]()
    roles = Roles.of(made, said=Said(added=["<|reserved_special_token_0|>"]))
    assert choose_mask_token("auto", made, 54, frozenset(), roles=roles).id == 53
    assert (
        choose_mask_token("<|reserved_special_token_0|>", made, 54, frozenset(), roles=roles).id
        == 52
    )
    bert = FAMILIES["BERT's"][0]()
    assert (
        choose_mask_token(
            "auto", bert, 60, frozenset(), roles=Roles.of(bert, said=Said(added=["[MASK]"]))
        ).id
        == 50
    )


def test_pretraining_masks_no_token_with_a_role():
    collate = MEAPCollator(pad, MEAPConfig(mode="pretrain", mask_ratio=0.9), 96, 0, roles=[7, 8])
    ids = [7, 8, *range(10, 20), 7, 1] * 3
    batch = collate([{"input_ids": ids, "labels": ids}])
    masked = (batch[PLAN] & MASKED).bool()
    assert (
        not (torch.tensor([ids])[masked] < 10).all()
        and not torch.isin(torch.tensor([ids])[masked], torch.tensor([7, 8])).any()
    )


def test_a_trainer_goes_by_the_models_end_tokens(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": 256}))
    model.generation_config.eos_token_id = [1, 40]
    row = {"input_ids": [3, *range(10, 80)], "labels": [-100, *range(10, 80)]}
    trainer = CAFTTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=[row],
        data_collator=pad,
        processing_class=word_tokenizer(""),
        meap={"mask_token": 96},
    )
    labels = np.array(trainer.train_dataset[0]["labels"])
    assert 40 not in labels - ELIGIBLE and {39, 41} <= set(labels - ELIGIBLE)


ROPE = {"rope_theta": 10000.0}
POSITIONS = {
    "GPT-2": (GPT2Config(n_positions=64), 64),
    "OPT": (OPTConfig(max_position_embeddings=64), 64),
    "MPT": (MptConfig(max_seq_len=64), 64),
    "Bloom": (BloomConfig(), None),
    "a vision model's text": (Gemma3Config(text_config={"max_position_embeddings": 64}), 64),
    "default": (LlamaConfig(max_position_embeddings=64), 64),
    "linear": (
        LlamaConfig(
            max_position_embeddings=64,
            rope_parameters={"rope_type": "linear", "factor": 2.0, **ROPE},
        ),
        128,
    ),
    "YaRN, not yet lengthened": (
        LlamaConfig(
            max_position_embeddings=64,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            },
        ),
        256,
    ),
    "YaRN, lengthened": (
        LlamaConfig(
            max_position_embeddings=256,
            rope_parameters={
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                **ROPE,
            },
        ),
        256,
    ),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_of_a_base_model(name):
    config, positions = POSITIONS[name]
    assert positions_of(config) == positions


def test_the_smaller_limit_holds():
    assert BaseModel(positions=64).limit(None) == BaseModel(positions=64).limit(1024) == 64
    assert BaseModel(positions=64).limit(32) == BaseModel().limit(32) == 32
    assert BaseModel().limit(None) is None


def test_a_base_model_by_name(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.generation_config.eos_token_id = [1, 40]
    model.save_pretrained(tmp_path)
    assert BaseModel.named(str(tmp_path)) == BaseModel.of_model(model)
    assert BaseModel.named(str(tmp_path)).roles >= {0, 1, 40}
    assert (
        BaseModel.named(str(tmp_path), max_position_embeddings=64, dtype="float32").positions == 64
    )
