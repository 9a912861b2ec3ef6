"""Run by test_precision.py in a process without instructions for bfloat16: runs that are warned of
it, and runs that are not."""

from __future__ import annotations

import gc
import sys

from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer

from builders.runs import DATA, arguments, lora, pad
from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import precision, with_caft


def run(name, folder, model, caft=None, meap=None, tokenizer=None, adapter=False, **settings):
    """Prints the name, and trains two runs of one step."""
    precision._warn.cache_clear()
    print(f"\nRUN {name}", file=sys.stderr, flush=True)
    trainer = with_caft(Trainer)(
        model=lora(model) if adapter else model,
        args=arguments(folder, max_steps=1, **settings),
        train_dataset=DATA,
        data_collator=pad,
        processing_class=tokenizer,
        caft=caft,
        meap=meap,
    )
    trainer.train(), trainer.train()


gc.freeze()  # as in conftest.py
folder = sys.argv[1]
made = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "hidden_size": 64}))
made.save_pretrained(folder)
in_4_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def load(dtype, compute=None):
    more = {}
    if compute is not None:
        settings = {**in_4_bits, "bnb_4bit_compute_dtype": compute}
        more["quantization_config"] = BitsAndBytesConfig(**settings)
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu", **more)


tokenizer = word_tokenizer("")
run("asked for", folder, load("float32"), caft={}, bf16=True)
run("beta 0", folder, load("float32"), caft={"beta": 0}, bf16=True)
masks = {"mode": "pretrain", "mask_token": "add"}
run("masks", folder, load("float32"), meap=masks, tokenizer=tokenizer, bf16=True)
run("weights", folder, load("bfloat16"), caft={})
run("4 bits", folder, load("float32", "bfloat16"), caft={}, adapter=True)
run("neither", folder, load("float32"), bf16=True)
run("float32", folder, load("float32"), caft={})
run("4 bits, float32", folder, load("float32", "float32"), caft={}, adapter=True)
