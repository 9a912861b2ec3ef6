"""How strongly the heads pull: the length and the direction of their gradient next to next-token
training's."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from caft_plugin import with_caft
from caft_plugin.targets import IGNORE
from caft_plugin.trainer_parts import TrainerParts
from caft_plugin.trl import CAFTSFTTrainer
from study import measure

RandomState = tuple[torch.Tensor, torch.Tensor | None]


class Measured(Trainer):
    """Notes in `dose`, every so many steps of a run with heads, the length of the heads' gradient
    on the model's own weights as a ratio to that of next-token training, and the cosine between the
    two."""

    model: PreTrainedModel
    processing_class: PreTrainedTokenizerBase
    caft_parts: TrainerParts  # the CAFT trainer's

    def __init__(self, *args: object, dose_every: int, **kwargs: object) -> None:
        self.dose_every = dose_every
        self.dose: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        *args: object,
        **kwargs: object,
    ) -> torch.Tensor:
        if self.caft_parts.caft is None or self.state.global_step % self.dose_every:
            return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[arg-type]
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
        drawn = random_state()
        loss = super().training_step(model, inputs, *args, **kwargs)  # type: ignore[arg-type]
        after = random_state()
        restore(drawn)  # the same dropout
        self.compare(*self.next_token_gradients(model, batch))
        restore(after)
        return loss

    def next_token_gradients(
        self, model: torch.nn.Module, batch: dict[str, torch.Tensor]
    ) -> tuple[list[torch.nn.Parameter], tuple[torch.Tensor | None, ...]]:
        """Return the model's parameters that the step gave a gradient, and their gradients without
        heads."""
        own = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        with torch.enable_grad(), self.compute_loss_context_manager():
            inputs = measure.on(self.model.device, batch)
            labels = inputs.pop("labels")[:, 1:]
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE
            )
        return own, torch.autograd.grad(loss, own, allow_unused=True)

    def compare(
        self, own: list[torch.nn.Parameter], gradients: tuple[torch.Tensor | None, ...]
    ) -> None:
        theirs = ours = both = torch.zeros((), device=self.model.device)
        for parameter, gradient in zip(own, gradients, strict=True):
            if gradient is not None and parameter.grad is not None:
                heads = parameter.grad - gradient
                theirs, ours = theirs + gradient.square().sum(), ours + heads.square().sum()
                both = both + (gradient * heads).sum()
        self.dose.append(
            {
                "step": self.state.global_step,
                "ratio": round((ours / theirs).sqrt().item(), 5),
                "cosine": round((both / (ours * theirs).sqrt().clamp(min=1e-30)).item(), 4),
            }
        )


class MeasuredSFT(Measured, CAFTSFTTrainer):  # type: ignore[misc,valid-type]
    """For molecules and documents."""


class MeasuredPlain(Measured, with_caft(Trainer)):  # type: ignore[misc]
    """For star graphs."""


def random_state() -> RandomState:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_available() else None


def restore(state: RandomState) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
