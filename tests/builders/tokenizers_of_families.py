"""Tokenizers shaped like those of five families."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}{{ m.content }}<|im_end|>{%"
    " endfor %}"
)


def tokenizer(words, special, template=TEMPLATE, **named):
    vocabulary = {
        word: i for i, word in enumerate([*words, *(word for word in special if word not in words)])
    }
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=words[0])), **named
    )
    made.add_special_tokens(
        {"additional_special_tokens": [AddedToken(word, special=True) for word in special]}
    )
    made.chat_template = template
    return made


WORDS = [f"w{i}" for i in range(50)]

# family: (tokenizer, embedding rows, ids in the data, the token that auto takes)
FAMILIES = {
    "Llama 3": (
        lambda: tokenizer(
            WORDS,
            [
                "<|begin_of_text|>",
                "<|end_of_text|>",
                "<|reserved_special_token_0|>",
                "<|reserved_special_token_1|>",
            ],
            bos_token="<|begin_of_text|>",
            eos_token="<|end_of_text|>",
        ),
        54,
        "<|reserved_special_token_0|>",
    ),
    "Llama 3, the first one taken": (
        lambda: tokenizer(
            WORDS,
            ["<|begin_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"],
            template=TEMPLATE + "<|reserved_special_token_0|>",
        ),
        53,
        "<|reserved_special_token_1|>",
    ),
    "Qwen": (
        lambda: tokenizer(
            WORDS,
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
        ),
        64,
        53,
    ),
    "Gemma": (
        lambda: tokenizer(
            [
                "<pad>",
                "<eos>",
                "<bos>",
                "<unk>",
                "<mask>",
                "[multimodal]",
                "<unused0>",
                "<unused1>",
                *WORDS,
            ],
            [],
        ),
        60,
        "<unused0>",
    ),
    "Mistral": (
        lambda: tokenizer(
            ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[control_8]", "[control_9]", *WORDS], []
        ),
        57,
        "[control_8]",
    ),
    "SmolLM2": (
        lambda: tokenizer(
            WORDS,
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<empty_output>"],
            bos_token="<|im_start|>",
            eos_token="<|im_end|>",
            pad_token="<|im_end|>",
        ),
        55,
        "<|endoftext|>",
    ),
    "BERT's": (lambda: tokenizer(WORDS, ["[MASK]"], mask_token="[MASK]"), 60, "[MASK]"),
}
