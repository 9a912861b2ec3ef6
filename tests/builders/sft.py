"""Runs of TRL's SFTTrainer, with every setting that changes what it computes."""

from __future__ import annotations

import copy

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig

from builders.tiny import LLAMA

TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content"
    " }} </s>{% endgeneration %} {% else %}{{ m.content }} </s> {% endif %}{% endfor %}{% if"
    " add_generation_prompt %}assistant {% endif %}"
)


def answer(i):
    return " ".join(f"w{(i * 7 + j) % 90}" for j in range(3 + i % 9))


CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"w{i} w{i + 1}"},
            {"role": "assistant", "content": answer(i)},
        ]
    }
    for i in range(24)
]

COMPLETIONS = [{"prompt": f"w{i} w{i + 1} ", "completion": answer(i)} for i in range(24)]

TEXTS = [{"text": f"w{i} {answer(i)}"} for i in range(24)]


def custom_loss(outputs, labels, num_items_in_batch=None):
    flat = outputs.logits[:, :-1].flatten(0, 1).float()
    total = torch.nn.functional.cross_entropy(
        flat, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    return total / num_items_in_batch


# name: (rows, SFTConfig settings, SFTTrainer arguments)
FEATURES = {
    "conversational": (CHATS, {}, {}),
    "plain text": (TEXTS, {}, {}),
    "prompt and completion": (COMPLETIONS, {}, {}),
    "completion_only_loss off": (COMPLETIONS, {"completion_only_loss": False}, {}),
    "assistant_only_loss": (CHATS, {"assistant_only_loss": True}, {}),
    "packing bfd": (CHATS, {"packing": True, "max_length": 32}, {}),
    "packing bfd_split": (
        CHATS,
        {"packing": True, "max_length": 32, "packing_strategy": "bfd_split"},
        {},
    ),
    "packing wrapped": (
        CHATS,
        {"packing": True, "max_length": 32, "packing_strategy": "wrapped"},
        {},
    ),
    "padding_free": (CHATS, {"padding_free": True, "max_length": None}, {}),
    "padding_free with max_length": (CHATS, {"padding_free": True, "max_length": 32}, {}),
    "loss nll": (CHATS, {"loss_type": "nll"}, {}),
    "loss chunked_nll": (CHATS, {"loss_type": "chunked_nll"}, {}),
    "loss dft": (CHATS, {"loss_type": "dft"}, {}),
    "label smoothing": (CHATS, {"label_smoothing_factor": 0.1}, {}),
    "label smoothing nll": (CHATS, {"label_smoothing_factor": 0.1, "loss_type": "nll"}, {}),
    "compute_loss_func": (CHATS, {"loss_type": "nll"}, {"compute_loss_func": custom_loss}),
    "checkpointing": (CHATS, {"gradient_checkpointing": True}, {}),
    "checkpointing reentrant": (
        CHATS,
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "no checkpointing": (CHATS, {"gradient_checkpointing": False}, {}),
    "activation offloading": (CHATS, {"activation_offloading": True}, {}),
    "LoRA": (CHATS, {}, {"peft_config": LoraConfig(r=4, target_modules="all-linear")}),
    "bf16": (CHATS, {"bf16": True}, {}),
    "torch_compile": (
        CHATS,
        {
            "torch_compile": True,
            "torch_compile_backend": "aot_eager",
            "gradient_checkpointing": False,
        },
        {},
    ),
}


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**LLAMA, "eos_token_id": 1, **changes}))


def make(
    trainer_class,
    tokenizer,
    folder,
    rows=CHATS,
    settings=None,
    arguments=None,
    caft=None,
    model=None,
):
    config = SFTConfig(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 3,
            "logging_steps": 1,
            "report_to": [],
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "save_strategy": "no",
            **(settings or {}),
        }
    )
    more = {} if caft is None else {"caft": caft}
    return trainer_class(
        model=model if model is not None else model_of(),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=copy.deepcopy(tokenizer),
        **copy.deepcopy(arguments or {}),
        **more,
    )


def run(*args, **kwargs):
    trainer = make(*args, **kwargs)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]
