"""Rows of stage 1, which are a prompt and an answer, and the chat template of their tokenizer."""

from __future__ import annotations

from caft_plugin.stage1.data import with_answer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def counting(count=28):
    """Rows that count on from where the prompt stops, and end."""
    return [with_answer([5 + i, 6 + i, 7 + i], [*range(8 + i, 14 + i), 1]) for i in range(count)]
