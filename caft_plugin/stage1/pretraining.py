"""Stage 1: heads are pretrained once per base model, on answers that the base model itself wrote.

METHOD: arXiv 2506.07833, section 3 (pseudo-labels; the base frozen, only the heads train, each with
    weight alpha^k,
constant schedule, learning rate 1e-4). Besides the published way (`targets: model`) there are the
data set's own answers (`dataset`, the authors' warm-up on task data) and `distribution`: head k at
position t learns the base model's whole next-token distribution at position t+k, which the same
forward pass of the frozen base gives.

It also trains heads as drafters (`caft.heads` names them): with a fine-tuned model as the frozen
base, they continue to learn its answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from caft_plugin.caft.attach import LAST_POSITION
from caft_plugin.caft.heads_folder import HeadsFolder
from caft_plugin.caft.heads_record import (
    CARD,
    FOLDER,
    METRICS,
    HeadFigures,
    HeadsMetrics,
    HeadsRecord,
    read_record,
)
from caft_plugin.caft.loss import DISTRIBUTIONS, TOKENS
from caft_plugin.caft.objective import AuxiliaryObjective, HostLoss
from caft_plugin.checkpoints import Parts
from caft_plugin.config import CAFTConfig, PretrainConfig
from caft_plugin.errors import ConfigError
from caft_plugin.files import write_json, write_text
from caft_plugin.logs import HeadsEvaluation
from caft_plugin.precision import warn_of_slow_bf16
from caft_plugin.stage1.answers import ANSWERS, write_answers
from caft_plugin.stage1.data import Row, pad_rows, prompt_of, supervised, with_answer
from caft_plugin.stage1.figures import drafting, figures_as_markdown
from caft_plugin.targets import Batch
from caft_plugin.training import with_caft


def heads_block(keys: dict[str, Any]) -> CAFTConfig:
    """Return the CAFT settings of stage 1. With `heads` and no `num_heads`, the number is that of
    the folder.

    Raises:
        ConfigError: a wrong key or value, or no readable folder of heads.
    """
    if keys.get("heads") is not None and "num_heads" not in keys:
        keys = {**keys, "num_heads": HeadsFolder.open(keys["heads"]).record.num_heads}
    return CAFTConfig.read(keys)


class TrunkTrainer(Trainer):
    """Calls the frozen base without asking it for logits; its own loss is 0, the heads' is all
    there is."""

    def __init__(self, *, model: PreTrainedModel, **kwargs) -> None:
        # The Trainer refuses quantised models that have no adapter; here the heads are what trains.
        quantised = getattr(model, "is_quantized", False) and not getattr(
            model, "_hf_peft_config_loaded", False
        )
        if quantised:
            model._hf_peft_config_loaded = True
        try:
            super().__init__(model=model, **kwargs)
        finally:
            if quantised:
                model._hf_peft_config_loaded = False

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> HostLoss:
        # No logits are needed but those of one position, by which the heads' unembedding is
        # checked.
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**inputs, logits_to_keep=LAST_POSITION.clone(), use_cache=False)
        loss = outputs.logits.new_zeros((), dtype=torch.float32)
        return (loss, {"loss": loss}) if return_outputs else loss


class Stage1Objective(AuxiliaryObjective):
    """The heads' objective where nothing else trains: evaluation has the accuracy of heads too, and
    their summed loss as its own. Heads are measured against tokens, whatever they learn."""

    def metrics(self, evaluation: HeadsEvaluation, prefix: str) -> dict[str, float]:
        losses = evaluation.losses.values()
        mean = sum(losses) / max(len(losses), 1)
        return {**evaluation.entries(prefix, details=True), f"{prefix}_loss": mean}


class HeadsTrainer(with_caft(TrunkTrainer)):  # type: ignore[misc]
    """Trains heads on a frozen base, which does not change. Checkpoints hold only the heads."""

    def __init__(self, *args, distribution: bool = False, **kwargs) -> None:
        self.caft_objective = functools.partial(
            Stage1Objective, lesson=DISTRIBUTIONS if distribution else TOKENS
        )
        super().__init__(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.save_ours(output_dir or self.args.output_dir)

    def checkpoint_parts(self) -> Parts:
        return dataclasses.replace(super().checkpoint_parts(), weights=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        self._load_ours(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._load_ours(self.state.best_model_checkpoint)


@dataclasses.dataclass
class Stage1:
    """What stage 1 works on. `rows` and `heldout` are token rows; without `heldout` a part of the
    rows is held out. `name` is the base model's name for the card, `trainer` what makes the
    trainer: HeadsTrainer, or as it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    heldout: Sequence[Row] | None
    arguments: TrainingArguments
    caft: CAFTConfig
    config: PretrainConfig
    name: str
    callbacks: Sequence[TrainerCallback] = ()
    trainer: Callable[..., HeadsTrainer] = HeadsTrainer


def pretrain_heads(stage1: Stage1) -> Path:
    """Trains heads on the frozen model and leaves a heads folder with a card in the output folder.

    An interrupted run resumes: with the answers in the file, and training from the latest complete
        checkpoint.

    Returns:
        The heads folder.

    Raises:
        ConfigError: the data or the settings do not fit.
    """
    model = stage1.model
    tokenizer = stage1.tokenizer
    arguments = stage1.arguments
    config = stage1.config
    if arguments.world_size > 1:
        raise ConfigError(
            f"pretrain_heads: {arguments.world_size} processes were started, but it accepts one."
            " Start it with `accelerate launch --num_processes 1`, or without a launcher."
        )
    warn_of_slow_bf16(arguments, model)
    out = Path(str(arguments.output_dir))
    rows = [row for row in stage1.rows if config.targets == "distribution" or supervised(row)]
    heldout = stage1.heldout
    if heldout is None:
        share = min(max(len(rows) // 20, 1), 200) if len(rows) > 1 else 0
        rows, heldout = rows[share:], rows[:share]
    heldout = [row for row in heldout if supervised(row)]
    if not rows:
        raise ConfigError(
            "pretrain_heads: the data set has no row with an answer to learn from. Each row needs a"
            " prompt and an assistant's answer; check the data sets and the chat template."
        )
    model.requires_grad_(False)
    model.eval()
    if arguments.max_steps > 0:  # no more answers than training will see
        shown = arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows = rows[: arguments.max_steps * shown]
    if config.targets == "model":
        prompts = [prompt_of(row) for row in (*heldout, *rows)]
        answers = write_answers(model, tokenizer, prompts, config, out / ANSWERS, stage1.name)
        made = [with_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        heldout, rows = made[: len(heldout)], made[len(heldout) :]
    if config.targets == "distribution":
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    caft = stage1.caft.model_copy(
        update={"beta": 1.0, "schedule": "constant", "train_heads": "full"}
    )
    trainer = stage1.trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(heldout) or None,
        data_collator=lambda batch: pad_rows(batch, pad),
        processing_class=tokenizer,
        callbacks=list(stage1.callbacks),
        caft=caft,
        distribution=config.targets == "distribution",
    )
    before = trainer.evaluate() if heldout else {}
    trainer.train(resume_from_checkpoint=trainer.newest_whole_checkpoint())
    after = trainer.evaluate() if heldout else {}
    trainer.save_model(str(out))
    folder = out / FOLDER
    first = figures_of(before, len(trainer.caft.heads))
    held_out = HeadsEvaluation.read(after, "eval")
    metrics = HeadsMetrics(
        targets=config.targets,
        rows=len(rows),
        steps=trainer.state.global_step,
        heads=figures_of(after, len(trainer.caft.heads)),
        started_from=caft.heads,
        tokens_per_pass=held_out.tokens_per_pass,
        tokens_per_pass_before=HeadsEvaluation.read(before, "eval").tokens_per_pass,
        positions=held_out.positions,
        **{"untrained" if caft.heads is None else "before": first},  # type: ignore[arg-type]
    )
    write_json(folder / METRICS, metrics.model_dump(exclude_none=True))
    write_text(folder / CARD, model_card(read_record(folder), stage1.name, metrics))
    return folder


def figures_of(metrics: dict[str, float], num_heads: int) -> list[HeadFigures]:
    """Of all heads, or of none: a head without a held-out target leaves no table to speak of."""
    found = HeadsEvaluation.read(metrics, "eval")
    if len(found.losses) < num_heads or len(found.accuracies) < num_heads:
        return []
    return [
        HeadFigures(loss=loss, accuracy=found.accuracies[k]) for k, loss in found.losses.items()
    ]


def model_card(record: HeadsRecord, name: str, metrics: HeadsMetrics) -> str:
    """Return README.md of a heads folder."""
    lines = [
        "---",
        "library_name: caft_plugin",
        f"base_model: {name}" if "/" in name and not Path(name).exists() else "tags: [caft]",
        "---",
        "",
        f"# CAFT heads for {name}",
        "",
        (
            f"{record.num_heads} auxiliary heads ({record.layer_class}) for concept-aware"
            " fine-tuning. Head k predicts"
        ),
        (
            "the token k+1 ahead. Fine-tuning with caft_plugin can start from them (`caft: {heads:"
            " THIS_FOLDER}`)."
        ),
        "They draft for the model over which they were trained.",
        "",
        f"- wiring: head_input `{record.head_input}`, head_norm `{str(record.head_norm).lower()}`",
        (
            f"- trained on: {metrics.rows} rows, targets `{metrics.targets}`, {metrics.steps}"
            " steps, base frozen"
        ),
        *(
            []
            if metrics.started_from is None
            else [f"- started from the heads in: {metrics.started_from}"]
        ),
        "",
    ]
    if metrics.heads:
        lines += ["## Figures", "", *figures_as_markdown(metrics), "", drafting(metrics), ""]
    lines += [
        "## Drafting",
        "",
        "```python",
        "from caft_plugin import Drafter",
        "",
        'drafter = Drafter.from_pretrained(model, "THIS_FOLDER")',
        "model.generate(**inputs, custom_generate=drafter)",
        "```",
        "",
        "- measure it: `caft speculate --model MODEL --heads THIS_FOLDER --prompts FILE`",
        (
            "- serve it with vLLM: `caft export-drafter --model MODEL --heads THIS_FOLDER --output"
            " DRAFTER`"
        ),
        "",
        "## Papers",
        "",
        "CAFT: [arXiv 2506.07833](https://arxiv.org/abs/2506.07833)",
    ]
    return "\n".join(lines) + "\n"
