"""What runs of all studies share: a training loop with its log, the best epoch, random noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from transformers import DataCollator, Trainer, TrainerCallback, TrainerControl

from study.protocol import Line


class Clock(TrainerCallback):
    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        self.seconds = time.perf_counter() - self.began


def train(trainer: Trainer) -> Line:
    """Train, and return the log and what it took."""
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    log = trainer.state.log_history
    curve = [
        {
            "step": entry["step"],
            **{
                key: round(entry[key], 5)
                for key in entry
                if key == "loss" or key.startswith("caft/loss")
            },
        }
        for entry in log
        if "loss" in entry
    ]
    return {
        "curve": curve[:: max(1, len(curve) // 40)],
        "tokens": next(
            (int(entry["num_tokens"]) for entry in reversed(log) if "num_tokens" in entry), None
        ),
        "steps": trainer.state.global_step,
        "train_seconds": round(clock.seconds, 1),
    }


class BestEpoch(TrainerCallback):
    """Measures the validation loss after each epoch, and ends the run when it has not improved for
    `patience` epochs. `restore` brings back the model and the heads of the best epoch."""

    def __init__(self, trainer: Trainer, loss: Callable[[], float], patience: int) -> None:
        self.trainer, self.loss, self.patience = trainer, loss, patience
        self.losses: list[float] = []
        self.kept: list[dict[str, torch.Tensor]] = []
        self.best = 0
        self.seconds = 0.0  # that this took, not counted as training

    def parts(self) -> Iterator[torch.nn.Module]:
        if self.trainer.model is not None:
            yield self.trainer.model
        parts = getattr(self.trainer, "caft_parts", None)
        if parts is not None and parts.caft is not None:
            yield parts.caft.heads

    def on_epoch_end(
        self, args: object, state: object, control: TrainerControl, **kwargs: object
    ) -> None:
        began = time.perf_counter()
        self.losses.append(self.loss())
        if self.losses[-1] == min(self.losses):
            self.best = len(self.losses)
            self.kept = [
                {key: value.clone() for key, value in part.state_dict().items()}
                for part in self.parts()
            ]
        control.should_training_stop |= len(self.losses) >= self.best + self.patience
        self.seconds += time.perf_counter() - began

    def restore(self) -> None:
        for part, kept in zip(self.parts(), self.kept, strict=True):
            part.load_state_dict(kept)

    def figures(self) -> dict[str, float]:
        return {
            "validation_loss": min(self.losses),
            "best_epoch": self.best,
            "epochs": len(self.losses),
        }


class Noise:
    """A collator that replaces a share of the input tokens by others at random; labels stay."""

    def __init__(self, host: DataCollator, share: float, vocabulary: int, seed: int) -> None:
        self.host, self.share, self.vocabulary = host, share, vocabulary
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, examples: list[dict[str, object]]) -> dict[str, torch.Tensor]:
        batch = self.host(examples)
        ids = batch["input_ids"]
        others = torch.randint(self.vocabulary, ids.shape, generator=self.generator)
        replaced = torch.rand(ids.shape, generator=self.generator) < self.share
        if "attention_mask" in batch:
            replaced &= batch["attention_mask"].bool()
        return {**batch, "input_ids": torch.where(replaced, others, ids)}
