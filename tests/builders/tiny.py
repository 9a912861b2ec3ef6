"""What tests build tiny models and tokenizers from."""

from __future__ import annotations

import contextlib

import peft
from packaging import version
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from transformers.integrations.peft import MIN_PEFT_VERSION

from caft_plugin.caft import attach
from caft_plugin.model.hidden import copier_of

# Keys that Llama's config shares with many families'.
LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def word_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """97 words: pad 0, end 1, unknown 2, the roles user 3 and assistant 4, and w0 to w91."""
    words = ["<pad>", "</s>", "<unk>", "user", "assistant", *(f"w{i}" for i in range(92))]
    model = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = template
    return made


def add_adapter(model, config):
    """The adapter put on by transformers itself; skips where transformers takes no PEFT as old as
    this one (5.24 asks for PEFT 0.22, which was not out when it came)."""
    if version.parse(peft.__version__) < version.parse(MIN_PEFT_VERSION):
        import pytest  # tests/gpu runs where there is none

        pytest.skip(
            f"this transformers' add_adapter needs PEFT {MIN_PEFT_VERSION}, and this is"
            f" {peft.__version__}"
        )
    model.add_adapter(config)
    return model


def parameters_with_ours(model):
    """Names and parameters of a model in mid-training, and of the heads and mask token on it, which
    callbacks and a host's own code do not find there."""
    yield from model.named_parameters()
    copier = copier_of(model)
    for handle in [] if copier is None else (h for h in copier.handles if hasattr(h, "hidden")):
        for name, parameter in handle.hidden.module.named_parameters():
            yield f"{handle.hidden.name}.{name}", parameter


@contextlib.contextmanager
def head_outputs():
    """While this is open, each call of a head adds to the list its positions and its output at
    them."""
    seen, original = [], attach.run_head

    def noting(layer, source, call, positions, checkpointing):
        seen.append((positions, original(layer, source, call, positions, checkpointing)))
        return seen[-1][1]

    attach.run_head = noting
    try:
        yield seen
    finally:
        attach.run_head = original
