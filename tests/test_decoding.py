"""A Drafter writes the text that plain `generate` writes, in fewer passes, whatever the model, the prompt and the settings;
or it refuses by name."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from test_families import FAMILIES, model_of
from tiny import LLAMA
from transformers import (
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StopStringCriteria,
)

from caft_plugin import CAFTConfig, ConfigError, Drafter, decoding
from caft_plugin.heads import build_heads, replay
from caft_plugin.heads_folder import save_heads
from caft_plugin.trunk import find_trunk

RECURRENT = ("RecurrentGemma", "Mamba", "Mamba2", "Jamba", "Bamba", "FalconH1", "GraniteMoeHybrid", "Qwen3Next")
NEW = 24  # tokens


def drafter_of(model, num_heads=4, head_input="penultimate", head_norm=True, **settings):
    """Heads that are copies of the last layer, the later ones a little off, so that some guesses are right."""
    model.eval()
    config = CAFTConfig(num_heads=num_heads, head_input=head_input, head_norm=head_norm, train_heads="frozen")
    heads = build_heads(model, find_trunk(model), config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(heads.layers):
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.01 * index * noise.to(parameter)
    return Drafter(model, heads, config, **settings)


def prompt(length=9, vocab_size=97, seed=1, padding=0):
    ids = torch.randint(3, vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :padding], mask[0, :padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def written(model, inputs, seed=5, **settings):
    torch.manual_seed(seed)
    return model.generate(
        **inputs, **{"max_new_tokens": NEW, "eos_token_id": None, "pad_token_id": 0, "use_cache": True, **settings}
    )


GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.5, "top_k": 8}


@contextlib.contextmanager
def all_guesses():
    """While this is open: of each round, how long the text was and what each head guessed, sent or not."""
    rounds, guess = [], decoding._Side.guess

    def noting(side, wrong, came, most):
        sent = guess(side, wrong, came, most)
        rounds.append((len(came), list(side.open[-1][1])))
        return sent

    decoding._Side.guess = noting
    try:
        yield rounds
    finally:
        decoding._Side.guess = guess


def guesses_without_a_cache(drafter, ids):
    """What the heads guess behind the last but one token of `ids`, everything computed anew."""
    trunk = drafter.trunk
    with torch.no_grad(), decoding._LastCall(trunk) as last:
        trunk.model(input_ids=ids[:, :-1], use_cache=False)
        source = last.call.hidden_states if drafter.config.head_input == "penultimate" else last.final
        at = torch.tensor([source.shape[1] - 1])
        hidden = torch.cat([replay(layer, source, last.call, at) for layer in drafter.heads.layers])
        if drafter.config.head_norm:
            hidden = trunk.norm(hidden)
        return trunk.logits(hidden).argmax(-1).tolist()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RECURRENT])
def test_the_same_text_in_every_family(family):
    model = model_of(family)
    drafter = drafter_of(model, num_draft=4)
    for inputs in (prompt(), prompt(padding=3)):
        for how in (GREEDY, SAMPLED):
            assert torch.equal(written(model, inputs, custom_generate=drafter, **how), written(model, inputs, **how))
            assert drafter.last.tokens == NEW and drafter.last.passes <= NEW


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in RECURRENT])
def test_guesses_are_those_of_heads_without_a_cache(family):
    model = model_of(family)
    drafter = drafter_of(model, num_draft=4)
    inputs = prompt()
    with all_guesses() as rounds:
        text = written(model, inputs, custom_generate=drafter, **SAMPLED)
    length = inputs["input_ids"].shape[1]
    assert len(rounds) >= 3
    for came, guesses in rounds:
        length += came
        assert guesses == guesses_without_a_cache(drafter, text[:, :length])


@pytest.mark.parametrize("family", RECURRENT)
def test_recurrent_models_are_refused(family):
    model = model_of(family)
    drafter = drafter_of(model)
    with pytest.raises(ConfigError, match=rf"{type(model).__name__} has recurrent layers|needs a DynamicCache"):
        written(model, prompt(), custom_generate=drafter)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("head_input", ["penultimate", "final"])
@pytest.mark.parametrize("head_norm", [True, False])
def test_both_wirings(tiny_model, head_input, head_norm):
    drafter = drafter_of(tiny_model, head_input=head_input, head_norm=head_norm, num_draft=4)
    with all_guesses() as rounds:
        text = written(tiny_model, prompt(), custom_generate=drafter, **GREEDY)
    assert torch.equal(text, written(tiny_model, prompt(), **GREEDY))
    length = 9
    for came, guesses in rounds:
        length += came
        assert guesses == guesses_without_a_cache(drafter, text[:, :length])
