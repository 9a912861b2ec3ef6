"""Fine-tuning SmolLM2 on molecules or documents: the trainer, its log, and the saved model without
heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoTokenizer, Trainer, set_seed
from trl import SFTConfig

from caft_plugin import CAFTConfig, MEAPConfig
from study import measure, training
from study.measure import Model
from study.protocol import Line, Run, Settings
from study.second import protocol
from study.second.data import Row
from study.second.gradients import Measured, MeasuredSFT

SFT_KEYS = (
    "max_length",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "lr_scheduler_type",
    "optim",
    "loss_type",
)


@dataclass(frozen=True)
class Places:
    """Folders: the model, the heads of stage 1, and what a run's trainer writes."""

    model: Path
    heads: Path
    trainer: Path

    @property
    def base_answers(self) -> Path:
        return self.heads.parent / "base-answers.json"


def sft_trainer(
    run: Run, settings: Settings, sizes: protocol.Sizes, rows: Sequence[Row], places: Places
) -> MeasuredSFT:
    """Make the trainer of a run on these rows."""
    set_seed(run.seed)
    model = measure.load(places.model, attention_dropout=settings.get("attention_dropout", 0.0))
    full = settings["method"] == "full"
    if full:  # as the authors do; SmolLM2 ties the two
        model.get_input_embeddings().requires_grad_(False)
    caft = None
    if settings.get("caft") is not None:
        heads = None if settings["heads"] is None else str(places.heads / settings["heads"])
        caft = CAFTConfig(**settings["caft"], heads=heads)
    separate = settings["meap"] is not None and settings["meap"]["layout"] == "separate"
    warmup = settings.get("warmup_steps")
    if warmup is None:
        warmup = round(
            settings["warmup_share"] * settings["epochs"] * settings["rows"] / settings["batch"]
        )
    return MeasuredSFT(
        model=model,
        args=SFTConfig(
            output_dir=str(places.trainer),
            num_train_epochs=settings["epochs"],
            # originals and their copies
            per_device_train_batch_size=settings["batch"] * (2 if separate else 1),
            per_device_eval_batch_size=50,
            warmup_steps=warmup,
            **{key: settings[key] for key in SFT_KEYS},
            bf16=measure.dtype() == "bfloat16",
            use_cpu=measure.device() == "cpu",
            gradient_checkpointing=False,
            logging_steps=sizes.log_every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
        ),
        processing_class=AutoTokenizer.from_pretrained(places.model),
        train_dataset=Dataset.from_list(
            [{key: row[key] for key in ("prompt", "completion")} for row in rows]
        ),
        peft_config=None if full else LoraConfig(task_type="CAUSAL_LM", **protocol.LORA),
        caft=caft,
        meap=None if settings["meap"] is None else MEAPConfig(**settings["meap"]),
        dose_every=sizes.dose_every,
    )


def train(trainer: Measured) -> Line:
    """Train, and return the log, what it took and how strongly the heads pulled."""
    return {**training.train(trainer), "dose": trainer.dose}


def saved_model(trainer: Trainer, settings: Settings, places: Places) -> Model:
    """Save, and load what a user gets: the model without heads."""
    trainer.save_model()
    if settings["method"] == "full":
        return measure.load(places.trainer).eval()
    return PeftModel.from_pretrained(measure.load(places.model), places.trainer).eval()
