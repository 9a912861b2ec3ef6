"""The heads' memory and step time, compared with the formula in caft_plugin/MANUAL.md, for three
model sizes.

    python tests/benchmarks/growth.py [--pairs 10]

For each size: bytes of weights, gradients and AdamW states that the heads add, and the median ratio
    of alternating
steps (forward, backward, optimizer) with heads and without, full fine-tuning in float32, 30 % of
tokens supervised.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from caft_plugin import with_caft

# name: hidden size, layers, vocabulary, heads
SIZES = {
    "9M": (256, 6, 8_192, 4),
    "26M": (384, 8, 16_384, 2),
    "76M": (640, 10, 32_768, 4),
}
BATCH, LENGTH, SUPERVISED = 2, 256, 0.3


def predicted(config: LlamaConfig, heads: int) -> tuple[int, float]:
    """Return the formula's bytes added by full training of the heads in float32, and its ratio of
    step times."""
    hidden, layers, vocab = config.hidden_size, config.num_hidden_layers, config.vocab_size
    mlp = 3 * hidden * config.intermediate_size  # weights of the matrices
    layer = 4 * hidden * hidden + mlp
    attention = 2 * LENGTH * hidden  # scores and sums, every position against every other
    head = layer - mlp + attention + SUPERVISED * (mlp + hidden * vocab)
    plain = layers * (layer + attention) + hidden * vocab
    return heads * (layer + 2 * hidden) * 16, 1 + heads * head / plain


def steps(model: Any, rows: list[dict[str, list[int]]], caft: dict | None) -> Iterator[Any]:
    """Yield the trainer first, then the seconds of each step."""
    trainer = with_caft(Trainer)(
        model=model,
        args=TrainingArguments(
            tempfile.mkdtemp(), use_cpu=not torch.cuda.is_available(), report_to=[], max_steps=1
        ),
        train_dataset=rows,
        caft=caft,
    )
    trainer.create_optimizer()
    yield trainer
    batch = {
        key: torch.tensor([row[key] for row in rows[:BATCH]], device=trainer.args.device)
        for key in rows[0]
    }
    while True:
        start = time.perf_counter()
        (inputs,), items = trainer.get_batch_samples(iter([dict(batch)]), 1, trainer.args.device)
        trainer.training_step(trainer.model, inputs, items)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield time.perf_counter() - start


def added_bytes(trainer: Any) -> int:
    heads = list(trainer.caft_parts.caft.heads.parameters())
    states = [trainer.optimizer.state[p] for p in heads]
    moments = [t for state in states for t in state.values() if torch.is_tensor(t) and t.dim()]
    # weights, gradients, moments
    return sum(t.numel() * t.element_size() for t in [*heads, *heads, *moments])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=10)
    pairs = parser.parse_args().pairs
    print("| model | heads | memory, MB | predicted | step time (quartiles) | predicted |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, (hidden, layers, vocab, heads) in SIZES.items():
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=int(2.75 * hidden) // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
        )
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, vocab, (BATCH, LENGTH), generator=generator).tolist()
        prompt = round(LENGTH * (1 - SUPERVISED))
        rows = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in ids]
        plain, ours = (
            steps(LlamaForCausalLM(config), rows, caft) for caft in (None, {"num_heads": heads})
        )
        next(plain)
        trainer = next(ours)
        next(plain), next(ours)
        ratios = []
        for pair in range(pairs):
            order = (plain, ours) if pair % 2 == 0 else (ours, plain)
            seconds = {which: next(which) for which in order}
            ratios.append(seconds[ours] / seconds[plain])
        low, middle, high = statistics.quantiles(ratios, n=4)
        memory, ratio = predicted(config, heads)
        print(
            f"| {name} | {heads} | {added_bytes(trainer) / 1e6:.1f} | {memory / 1e6:.1f} "
            f"| {middle:.2f} ({low:.2f} to {high:.2f}) | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
