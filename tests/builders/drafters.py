"""Drafters whose guesses are sometimes right."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from builders.tiny import LLAMA
from caft_plugin import CAFTConfig, Drafter
from caft_plugin.caft.heads import build_heads
from caft_plugin.model.trunk import find_trunk


def drafter_of(model, num_heads=4, head_input="penultimate", head_norm=True, **settings):
    """Heads that are copies of the last layer, the later ones a little off, so that some guesses
    are right."""
    model.eval()
    config = CAFTConfig(
        num_heads=num_heads, head_input=head_input, head_norm=head_norm, train_heads="frozen"
    )
    heads = build_heads(model, find_trunk(model), config, seed=0)
    generator = torch.Generator().manual_seed(0)
    for index, layer in enumerate(heads.layers):
        for parameter in layer.parameters():
            if parameter.is_floating_point():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data += 0.01 * index * noise.to(parameter)
    return Drafter(model, heads, config, **settings)


def few_words_model():
    """Of few words, so that guesses are often right."""
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "vocab_size": 24}))
