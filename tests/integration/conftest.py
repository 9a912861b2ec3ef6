"""A folder to run the real `axolotl` in: a tiny random Llama with SmolLM2's tokenizer, and 40 chat
rows."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from builders.axolotl import Project


@pytest.fixture(scope="session")
def project(tmp_path_factory, smollm2) -> Project:
    pytest.importorskip("axolotl")
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("axolotl")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.save_pretrained(folder / "tiny")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
    ).save_pretrained(folder / "tiny")
    with open(folder / "rows.jsonl", "w") as file:
        for i in range(40):
            answer = " ".join(str(j) for j in range(1, i % 7 + 4))
            messages = [
                {"role": "user", "content": f"Count to {i % 7 + 3}."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    made = Project(folder)
    yield made
    made.close()
    shutil.rmtree(folder, ignore_errors=True)
