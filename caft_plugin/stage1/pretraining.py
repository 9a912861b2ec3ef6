"""Stage 1: heads are pretrained once per base model, on answers that the base model itself wrote.

METHOD: arXiv 2506.07833, section 3 (pseudo-labels; the base frozen, only the heads train, each with
weight alpha^k, constant schedule, learning rate 1e-4). Besides the published way (`targets: model`)
there are the data set's own answers (`dataset`, the authors' warm-up on task data) and
`distribution`: head k at position t learns the base model's whole next-token distribution at
position t+k, which the same forward pass of the frozen base gives.

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
    """A Trainer that asks the frozen base for no logits: its own loss is 0, the heads' is all there
    is."""

    def __init__(self, *, model: PreTrainedModel, **kwargs) -> None:
        # The Trainer refuses quantised models that have no adapter; here the heads are what trains.
        adapted = getattr(model, "_hf_peft_config_loaded", False)
        quantised = getattr(model, "is_quantized", False) and not adapted
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
    """The heads' objective where nothing else trains. Evaluation logs the heads' accuracies too,
    and their mean loss as its own. Heads are measured against tokens, whatever they learn."""

    def metrics(self, evaluation: HeadsEvaluation, prefix: str) -> dict[str, float]:
        losses = evaluation.losses.values()
        mean = sum(losses) / max(len(losses), 1)
        return {**evaluation.entries(prefix, details=True), f"{prefix}_loss": mean}


class HeadsTrainer(with_caft(TrunkTrainer)):  # type: ignore[misc]
    """A trainer of heads on a frozen base, which does not change. Checkpoints hold only the
    heads."""

    caft_saves_model = False

    def __init__(
        self,
        *args,
        distribution: bool = False,
        **kwargs,
    ) -> None:
        self.caft_objective = functools.partial(
            Stage1Objective, lesson=DISTRIBUTIONS if distribution else TOKENS
        )
        super().__init__(*args, **kwargs)

    # The Trainer would save the base with the heads, into every checkpoint.
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.caft_files.save(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: object = None) -> None:
        self.caft_files.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self.caft_files.load(self.state.best_model_checkpoint)


@dataclasses.dataclass
class Stage1:
    """The inputs of stage 1. `rows` and `heldout` are token rows; without `heldout` a part of the
    rows is held out. `name` is the base model's name for the card, `trainer` what makes the
    trainer: HeadsTrainer or a subclass."""

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
    """Train heads on the frozen model and write a heads folder with a card into the output folder.

    An interrupted run resumes: with the answers in the file, and training from the latest complete
    checkpoint.

    Returns:
        The heads folder.

    Raises:
        ConfigError: the data or the settings do not fit.
    """
    arguments = stage1.arguments
    # Each process would write answers into the same file.
    if arguments.world_size > 1:
        raise ConfigError(
            f"pretrain_heads: {arguments.world_size} processes were started, but it accepts one."
            " Start it with `accelerate launch --num_processes 1`, or without a launcher."
        )
    warn_of_slow_bf16(arguments, stage1.model)
    out = Path(str(arguments.output_dir))
    rows, heldout = rows_and_heldout(stage1)
    stage1.model.requires_grad_(False)
    stage1.model.eval()
    rows, heldout = with_targets(stage1, rows, heldout, out)
    trainer = make_trainer(stage1, rows, heldout)
    # Also when it resumes: the checkpoint is loaded after this, so the figures are the same.
    before = trainer.evaluate() if heldout else {}
    trainer.train(resume_from_checkpoint=trainer.caft_files.newest_whole_checkpoint())
    after = trainer.evaluate() if heldout else {}
    trainer.save_model(str(out))
    folder = out / FOLDER
    metrics = metrics_of(stage1, trainer, len(rows), before, after)
    write_json(folder / METRICS, metrics.model_dump(exclude_none=True))
    write_text(folder / CARD, model_card(read_record(folder), stage1.name, metrics))
    return folder


def rows_and_heldout(stage1: Stage1) -> tuple[list[Row], list[Row]]:
    """Return the rows to train on and the held-out ones, which have an answer.

    Raises:
        ConfigError: there is no row to train on.
    """
    rows = list(stage1.rows)
    if stage1.config.targets != "distribution":  # which learns from any text
        rows = [row for row in rows if supervised(row)]
    heldout = stage1.heldout
    if heldout is None:
        share = min(max(len(rows) // 20, 1), 200) if len(rows) > 1 else 0
        heldout = rows[:share]
        rows = rows[share:]
    if not rows:
        raise ConfigError(
            "pretrain_heads: the data set has no row with an answer to learn from. Each row needs a"
            " prompt and an assistant's answer; check the data sets and the chat template."
        )
    arguments = stage1.arguments
    if arguments.max_steps > 0:  # no more answers than training will see
        rows_a_step = arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows = rows[: arguments.max_steps * rows_a_step]
    return rows, [row for row in heldout if supervised(row)]


def with_targets(
    stage1: Stage1,
    rows: list[Row],
    heldout: list[Row],
    out: Path,
) -> tuple[list[Row], list[Row]]:
    """Return the rows and the held-out ones with the labels that `targets` asks for.

    The base model's answers are kept in the folder `out`.

    Raises:
        ConfigError: the base model cannot answer the prompts.
    """
    if stage1.config.targets == "distribution":
        # All positions have a label, which only says where the base's distribution is learnt.
        texts = [row["input_ids"] for row in rows]
        return [{"input_ids": ids, "labels": ids} for ids in texts], heldout
    if stage1.config.targets == "dataset":
        return rows, heldout
    prompts = [prompt_of(row) for row in (*heldout, *rows)]
    answers = write_answers(
        stage1.model, stage1.tokenizer, prompts, stage1.config, out / ANSWERS, stage1.name
    )
    answered = [
        with_answer(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return answered[len(heldout) :], answered[: len(heldout)]


def make_trainer(
    stage1: Stage1,
    rows: list[Row],
    heldout: list[Row],
) -> HeadsTrainer:
    """Return the trainer of the heads, with the settings that stage 1 has by definition."""
    pad = stage1.tokenizer.pad_token_id
    if pad is None:  # any id will do, since padding is masked and has no labels
        pad = 0
    # The heads' loss is the only one, so it is not scaled down.
    caft = stage1.caft.model_copy(
        update={"beta": 1.0, "schedule": "constant", "train_heads": "full"}
    )
    return stage1.trainer(
        model=stage1.model,
        args=stage1.arguments,
        train_dataset=rows,
        eval_dataset=heldout or None,
        data_collator=lambda batch: pad_rows(batch, pad),
        processing_class=stage1.tokenizer,
        callbacks=list(stage1.callbacks),
        caft=caft,
        distribution=stage1.config.targets == "distribution",
    )


def metrics_of(
    stage1: Stage1,
    trainer: HeadsTrainer,
    rows: int,
    before: dict[str, float],
    after: dict[str, float],
) -> HeadsMetrics:
    """Return the figures for the heads folder.

    Args:
        stage1: what was trained.
        trainer: of the heads, after training.
        rows: number of rows trained on.
        before: metrics of the evaluation before training; empty without held-out rows.
        after: those after training.
    """
    num_heads = len(trainer.caft_parts.caft.heads)
    figures_before = figures_of(before, num_heads)
    new = stage1.caft.heads is None
    first = {"untrained": figures_before} if new else {"before": figures_before}
    held_out = HeadsEvaluation.read(after, "eval")
    return HeadsMetrics(
        targets=stage1.config.targets,
        rows=rows,
        steps=trainer.state.global_step,
        heads=figures_of(after, num_heads),
        started_from=stage1.caft.heads,
        tokens_per_pass=held_out.tokens_per_pass,
        tokens_per_pass_before=HeadsEvaluation.read(before, "eval").tokens_per_pass,
        positions=held_out.positions,
        **first,
    )


def figures_of(metrics: dict[str, float], num_heads: int) -> list[HeadFigures]:
    """Return the figures of all heads, or of none if a head has no held-out target."""
    found = HeadsEvaluation.read(metrics, "eval")
    if len(found.losses) < num_heads or len(found.accuracies) < num_heads:
        return []
    return [
        HeadFigures(loss=loss, accuracy=found.accuracies[k]) for k, loss in found.losses.items()
    ]


def model_card(
    record: HeadsRecord,
    name: str,
    metrics: HeadsMetrics,
) -> str:
    """Return README.md of a heads folder."""
    on_the_hub = "/" in name and not Path(name).exists()
    started_from = []
    if metrics.started_from is not None:
        started_from = [f"- started from the heads in: {metrics.started_from}"]
    lines = [
        "---",
        "library_name: caft_plugin",
        f"base_model: {name}" if on_the_hub else "tags: [caft]",
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
        *started_from,
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
