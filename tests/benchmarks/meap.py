"""A `concat` step of MEAP compared with a step on the same rows doubled by hand, with the same
lengths.

    python tests/benchmarks/meap.py --model outputs/smollm2-135m-instruct
        [--pairs 20] [--length 128]

Both steps draw a batch through the data loader and run forward and backward; they alternate, and
the median of the pairs' ratios is printed with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from caft_plugin import with_caft
from caft_plugin.precision import choice, quick_dtype


def steps(model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], meap: dict | None) -> Any:
    """Yield the seconds of each step; `next` runs one."""
    trainer = with_caft(Trainer)(
        model=model,
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            per_device_train_batch_size=2,
            use_cpu=not torch.cuda.is_available(),
            report_to=[],
            max_steps=1,
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
        meap=meap,
    )
    batches = iter(trainer.get_train_dataloader())
    if trainer.caft_parts.meap is not None:
        # as `train()` does: the log has the losses of masked and of other tokens
        trainer.caft_parts.meap.losses.attach()
    while True:
        start = time.perf_counter()
        (inputs,), items = trainer.get_batch_samples(batches, 1, trainer.args.device)
        trainer.training_step(model, inputs, items)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        yield time.perf_counter() - start
        model.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument(
        "--length", type=int, default=128, help="tokens of an example before it is doubled"
    )
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=quick_dtype())
    print(choice())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(
        100, 10_000, (2 * (options.pairs + 2), options.length), generator=generator
    ).tolist()
    rows = [{"input_ids": row, "labels": [-100] * 16 + row[16:]} for row in ids]
    doubled = [{"input_ids": row * 2, "labels": ([-100] * 16 + row[16:]) * 2} for row in ids]
    plain = steps(model, tokenizer, doubled, None)
    masked = steps(model, tokenizer, rows, {"mask_token": 5})
    next(plain), next(masked)
    ratios = []
    for pair in range(options.pairs):
        order = (plain, masked) if pair % 2 == 0 else (masked, plain)
        seconds = {which: next(which) for which in order}
        ratios.append(seconds[masked] / seconds[plain])
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"concat / doubled by hand: median {middle:.3f}, quartiles {low:.3f} and {high:.3f},"
        f" {options.pairs} pairs"
    )


if __name__ == "__main__":
    main()
