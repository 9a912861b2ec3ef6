"""Stage 1: heads are pretrained once per base model, on answers that the base model itself wrote.

METHOD: arXiv 2506.07833, section 3 (pseudo-labels; the base frozen, only the heads train, each with weight alpha^k,
constant schedule, learning rate 1e-4). Besides the published way (`targets: model`) there are the data set's own
answers (`dataset`, the authors' warm-up on task data) and `distribution`: head k at position t learns the base
model's whole next-token distribution at position t+k, which the same forward pass of the frozen base gives.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from caft_plugin import checkpoint
from caft_plugin.config import CAFTConfig, ConfigError, PretrainConfig
from caft_plugin.heads import LAST_POSITION, Reading
from caft_plugin.importing import trunk_without_weights
from caft_plugin.loss import IGNORE
from caft_plugin.precision import warn_of_slow_bf16
from caft_plugin.resume import Parts
from caft_plugin.training import CAFTTrainerMixin, with_caft

logger = logging.getLogger(__name__)

ANSWERS = "answers.jsonl"

Row = dict[str, list[int]]


# -- prompts and answers -----------------------------------------------------------------------------


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first supervised one: what the base model is asked."""
    first = next((i for i, label in enumerate(row["labels"]) if label != IGNORE), len(row["labels"]))
    return list(row["input_ids"][:first])


def supervised(row: Row) -> bool:
    return any(label != IGNORE for label in row["labels"])


def with_answer(prompt: Sequence[int], answer: Sequence[int]) -> Row:
    """A training row: the loss is on the answer alone."""
    return {"input_ids": [*prompt, *answer], "labels": [IGNORE] * len(prompt) + list(answer)}


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids that end an answer.

    Raises:
        ConfigError: neither the model nor the tokenizer names one.
    """
    generation = getattr(model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    ids = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise ConfigError(
            "pretrain_heads.targets: `model` needs to know where an answer ends, but neither the model's "
            "generation_config nor its tokenizer has an eos_token_id. Set one, or use targets: dataset."
        )
    return ids


def check_prompts(prompts: Sequence[Sequence[int]], config: PretrainConfig, context: int | None) -> None:
    """Raises ConfigError where a row asks nothing, or leaves no room to answer."""
    empty = sum(not prompt for prompt in prompts)
    if empty:
        raise ConfigError(
            f"pretrain_heads.targets: `model` needs prompts, but {empty} of {len(prompts)} rows have none (every "
            "token is supervised). Use targets: dataset or distribution for plain text."
        )
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    length = len(prompts[longest])
    if context is not None and length + config.max_new_tokens > context:
        raise ConfigError(
            f"pretrain_heads.max_new_tokens: row {longest} has a prompt of {length} tokens; with "
            f"{config.max_new_tokens} new ones that is more than the model's context of {context}. Take long rows out "
            "of the data, or lower max_new_tokens."
        )


class AnswerFile:
    """Answers as JSON lines, one a prompt, in the order of the prompts; a broken last line is dropped on opening.

    The first line holds what the answers depend on: model, prompts and sampling. A file with another first line is
    refused rather than mixed.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.answers: list[list[int]] = []
        whole = 0
        if path.exists():
            with open(path, "rb") as file:
                for number, line in enumerate(file):
                    if not line.endswith(b"\n"):
                        break
                    content = json.loads(line)
                    if number == 0 and content != header:
                        changed = [k for k in {**header, **content} if content.get(k) != header.get(k)]
                        raise ConfigError(
                            f"pretrain_heads: {path} holds answers made with another {' and '.join(changed)}. Go on "
                            "with the settings it was made with, or move the file away to start anew."
                        )
                    if number:
                        self.answers.append(content["answer"])
                    whole += len(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "ab")
        self.file.truncate(whole)
        if not whole:
            self._write(header)

    def _write(self, content: dict[str, Any]) -> None:
        self.file.write((json.dumps(content) + "\n").encode())

    def add(self, answers: Iterable[list[int]]) -> None:
        for answer in answers:
            self._write({"answer": answer})
            self.answers.append(answer)
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()


def write_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    path: Path,
    name: str,
) -> list[list[int]]:
    """The base model's answer to each prompt, token ids with the end token where one came.

    Answers are appended to `path` batch by batch, so an interrupted run goes on where it stopped.

    Raises:
        ConfigError: no end token is known, a prompt leaves no room, `path` holds other answers, or vLLM cannot run.
    """
    ends = end_tokens(model, tokenizer)
    check_prompts(prompts, config, getattr(model.config.get_text_config(), "max_position_embeddings", None))
    if config.vllm:
        check_vllm(bool(getattr(model, "is_quantized", False)))
    digest = hashlib.sha256(json.dumps([list(p) for p in prompts]).encode()).hexdigest()
    header = {
        "base model": name,
        "prompts": digest,
        "sampling": config.model_dump(include={"max_new_tokens", "temperature", "top_p", "seed"}),
        **({"engine": "vllm"} if config.vllm else {}),
    }
    file = AnswerFile(path, header)
    try:
        done = len(file.answers)
        if done < len(prompts):
            with tqdm(total=len(prompts), initial=done, unit="answer", desc="the base model answers") as bar:
                tokens, start = 0, time.monotonic()
                vllm = start_vllm(model, name) if config.vllm else None
                for first in range(done, len(prompts), config.generation_batch_size):
                    batch = prompts[first : first + config.generation_batch_size]
                    if vllm is not None:
                        answers = generate_with_vllm(vllm, batch, config, ends, first)
                    else:
                        answers = generate(model, tokenizer, batch, config, ends, first)
                    file.add(answers)
                    tokens += sum(map(len, answers))
                    bar.update(len(batch))
                    bar.set_postfix_str(f"{tokens / (time.monotonic() - start):.0f} tokens/s")
    finally:
        file.close()
    unfinished = sum(not answer or answer[-1] not in ends for answer in file.answers)
    if unfinished == len(prompts):
        raise ConfigError(
            f"pretrain_heads.max_new_tokens: none of the {len(prompts)} answers came to an end within "
            f"{config.max_new_tokens} tokens. Raise max_new_tokens, or check the chat template and the end token. The "
            f"answers are in {path}: move the file away before you start again."
        )
    if unfinished:
        logger.warning(
            "%d of %d answers did not end within %d tokens; they are used as far as they go",
            unfinished,
            len(prompts),
            config.max_new_tokens,
        )
    return file.answers


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    config: PretrainConfig,
    ends: set[int],
    first: int,
) -> list[list[int]]:
    """Answers to one batch of prompts. The batch that starts at prompt `first` draws random numbers of its own, so an
    interrupted run writes what an uninterrupted one would have."""
    length = max(map(len, prompts))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if config.temperature > 0:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    generating: Any = model
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(config.seed * 1_000_003 + first)
        out = generating.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=config.max_new_tokens,
            pad_token_id=pad,
            eos_token_id=sorted(ends),
            use_cache=True,
            **sampling,
        )
    answers = []
    for row in out[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append(row if end is None else row[: end + 1])
    return answers


def check_vllm(quantised: bool) -> None:
    """Raises ConfigError where vLLM cannot write a base model's answers."""
    reasons = {
        "it is not installed (`pip install vllm`)": importlib.util.find_spec("vllm") is None,
        "there is no GPU that CUDA can use": not torch.cuda.is_available(),
        "the base is quantised, which vLLM would load unquantised": quantised,
    }
    why = [reason for reason, holds in reasons.items() if holds]
    if why:
        raise ConfigError(
            f"pretrain_heads.vllm: got true, but vLLM cannot write the answers: {', and '.join(why)}. Take the key "
            "out: the base model then writes them by itself."
        )


def start_vllm(model: PreTrainedModel, name: str) -> Any:
    """A vLLM engine beside the model, on half of the GPU's memory. Never run by us."""
    from vllm import LLM

    return LLM(model=name, dtype=str(model.dtype).removeprefix("torch."), gpu_memory_utilization=0.5)


def generate_with_vllm(
    engine: Any, prompts: Sequence[Sequence[int]], config: PretrainConfig, ends: set[int], first: int
) -> list[list[int]]:
    """As `generate`, by vLLM."""
    from vllm import SamplingParams

    sampling = SamplingParams(
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_new_tokens,
        stop_token_ids=sorted(ends),
        seed=config.seed * 1_000_003 + first,
    )
    outputs = engine.generate([{"prompt_token_ids": list(p)} for p in prompts], sampling, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


# -- model and data without Axolotl -------------------------------------------------------------------


def load_base(
    name: str,
    dtype: torch.dtype,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    vllm: bool = False,
) -> PreTrainedModel:
    """The base model, quantised by bitsandbytes as QLoRA does (NF4, double quantisation) if asked; with `vllm` one
    that vLLM can load too.

    Raises:
        ConfigError: before weights are loaded, where heads cannot be built for the model or vLLM cannot run it.
    """
    model_config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    if vllm:
        check_vllm(load_in_4bit or load_in_8bit or getattr(model_config, "quantization_config", None) is not None)
    build = functools.partial(AutoModelForCausalLM.from_config, model_config, trust_remote_code=trust_remote_code)
    trunk_without_weights(model_config, name, build)
    quantisation = None
    if load_in_4bit:
        quantisation = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    elif load_in_8bit:
        quantisation = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        dtype=dtype,
        quantization_config=quantisation,
        attn_implementation=attn_implementation,
        trust_remote_code=trust_remote_code,
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    model.config.use_cache = False
    return model


def read_rows(file: Path, tokenizer: Any, max_length: int, option: str = "--data") -> list[Row]:
    """Token rows of a JSONL file: `messages` (the first assistant's turn is the answer), `prompt` and `completion`, or
    plain `text` (all of it supervised), one kind a line. Longer rows are cut at `max_length`. Errors name `option`, by
    which the file was given.

    Raises:
        ConfigError: no such file, or a line that is none of these.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"{option}: {file} cannot be read ({error.strerror}). It takes a JSONL file.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            prompt, answer = _prompt_and_answer(json.loads(line), tokenizer)
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise ConfigError(
                f"{option}: line {number} of {file} is not a row ({type(error).__name__}: {error}). A line takes "
                '{"messages": [...]}, {"prompt": "...", "completion": "..."} or {"text": "..."}.'
            ) from None
        row = with_answer(prompt, answer)
        rows.append({key: values[:max_length] for key, values in row.items()})
    return rows


def _prompt_and_answer(content: dict[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    if "messages" in content:
        messages = content["messages"]
        turn = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
        template = functools.partial(tokenizer.apply_chat_template, tokenize=True, return_dict=False)
        prompt = template(messages[:turn], add_generation_prompt=True)
        whole = template(messages[: turn + 1])
        if whole[: len(prompt)] != prompt:
            raise ValueError("the chat template gives the prompt other tokens once the answer follows")
        return prompt, whole[len(prompt) :]
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    if "prompt" in content:
        completion = tokenizer(content["completion"], add_special_tokens=False).input_ids
        return tokenizer(content["prompt"]).input_ids, completion + end
    return [], tokenizer(content["text"]).input_ids + end


# -- training the heads ------------------------------------------------------------------------------


class TrunkTrainer(Trainer):
    """Calls the frozen base without asking it for logits; its own loss is 0, the heads' is all there is."""

    def __init__(self, *, model: Any, **kwargs: Any) -> None:
        # The Trainer refuses quantised models that have no adapter; here the heads are what trains.
        quantised = getattr(model, "is_quantized", False) and not getattr(model, "_hf_peft_config_loaded", False)
        if quantised:
            model._hf_peft_config_loaded = True
        try:
            super().__init__(model=model, **kwargs)
        finally:
            if quantised:
                model._hf_peft_config_loaded = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        # No logits are needed but those of one position, by which the heads' unembedding is checked.
        inputs = {k: v for k, v in inputs.items() if k != "labels"}
        outputs = model(**inputs, logits_to_keep=LAST_POSITION.clone(), use_cache=False)
        loss = outputs.logits.new_zeros((), dtype=torch.float32)
        return (loss, {"loss": loss}) if return_outputs else loss


class HeadsTrainer(with_caft(TrunkTrainer)):  # type: ignore[misc]
    """Trains heads on a frozen base. Checkpoints hold the heads alone, the base stays as it is."""

    def __init__(self, *args: Any, distribution: bool = False, **kwargs: Any) -> None:
        self.distribution = distribution
        super().__init__(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.save_ours(output_dir or self.args.output_dir)

    def _checkpoint_parts(self) -> Parts:
        return dataclasses.replace(super()._checkpoint_parts(), weights=False)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        checkpoint.load_checkpoint(resume_from_checkpoint, self.caft.heads, self.caft_config)

    def _load_best_model(self) -> None:
        checkpoint.load_checkpoint(self.state.best_model_checkpoint, self.caft.heads, self.caft_config)

    def _reading(self, *args: Any) -> Reading:
        return dataclasses.replace(super()._reading(*args), distribution=self.distribution)

    def _evaluation_metrics(self, figures: Tensor, prefix: str) -> dict[str, float]:
        metrics = super()._evaluation_metrics(figures, prefix)
        metrics[f"{prefix}_loss"] = sum(metrics.values()) / max(len(metrics), 1)
        for k, (_, hits, count) in enumerate(figures.T.tolist(), 1):
            if count:
                metrics[f"{prefix}_caft/accuracy_head_{k}"] = hits / count
        return metrics


def pad_rows(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """A batch: input_ids, labels and attention_mask (batch, longest row), padded on the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def padded(values: Sequence[Sequence[int]], fill: int) -> Tensor:
        return torch.tensor([[*v, *[fill] * (length - len(v))] for v in values])

    return {
        "input_ids": padded([row["input_ids"] for row in rows], pad),
        "labels": padded([row["labels"] for row in rows], IGNORE),
        "attention_mask": padded([[1] * len(row["input_ids"]) for row in rows], 0),
    }


@dataclasses.dataclass
class Job:
    """What stage 1 works on. `rows` and `heldout` are token rows: `input_ids`, and `labels` with -100 where there is
    no loss. Without `heldout` a part of the rows is held out. `name` is the base model's name for the card."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    rows: Sequence[Row]
    heldout: Sequence[Row] | None
    arguments: TrainingArguments
    caft: CAFTConfig
    config: PretrainConfig
    name: str
    callbacks: Sequence[TrainerCallback] = ()


def pretrain_heads(job: Job) -> Path:
    """Trains heads on the frozen model and leaves a heads folder with a card in the job's output folder.

    An interrupted run goes on where it stopped: answers from the file, training from the newest whole checkpoint.

    Returns:
        The heads folder.

    Raises:
        ConfigError: the data or the settings do not fit.
    """
    model, tokenizer, arguments, config, name = job.model, job.tokenizer, job.arguments, job.config, job.name
    if arguments.world_size > 1:
        raise ConfigError(
            f"pretrain_heads: {arguments.world_size} processes were started, but stage 1 takes one. Start it with "
            "`accelerate launch --num_processes 1`, or without a launcher."
        )
    warn_of_slow_bf16(arguments, model)
    out = Path(str(arguments.output_dir))
    rows = [row for row in job.rows if config.targets == "distribution" or supervised(row)]
    heldout = job.heldout
    if heldout is None:
        share = min(max(len(rows) // 20, 1), 200) if len(rows) > 1 else 0
        rows, heldout = rows[share:], rows[:share]
    heldout = [row for row in heldout if supervised(row)]
    if not rows:
        raise ConfigError(
            "pretrain_heads: the data set has no row with an answer to learn from. Each row needs a prompt and an "
            "assistant's answer; look at `datasets:` and the chat template."
        )
    model.requires_grad_(False)
    model.eval()
    if arguments.max_steps > 0:  # no more answers than training will see
        shown = arguments.train_batch_size * arguments.gradient_accumulation_steps
        rows = rows[: arguments.max_steps * shown]
    if config.targets == "model":
        prompts = [prompt_of(row) for row in (*heldout, *rows)]
        answers = write_answers(model, tokenizer, prompts, config, out / ANSWERS, name)
        made = [with_answer(p, a) for p, a in zip(prompts, answers, strict=True)]
        heldout, rows = made[: len(heldout)], made[len(heldout) :]
    if config.targets == "distribution":
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    caft = job.caft.model_copy(update={"beta": 1.0, "schedule": "constant", "train_heads": "full"})
    trainer = HeadsTrainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        eval_dataset=list(heldout) or None,
        data_collator=lambda batch: pad_rows(batch, pad),
        processing_class=tokenizer,
        callbacks=list(job.callbacks),
        caft=caft,
        distribution=config.targets == "distribution",
    )
    before = trainer.evaluate() if heldout else {}
    trainer.train(resume_from_checkpoint=trainer.newest_whole_checkpoint())
    after = trainer.evaluate() if heldout else {}
    trainer.save_model(str(out))
    folder = out / checkpoint.FOLDER
    metrics = figures(trainer, config, len(rows), before, after)
    checkpoint.write_whole(
        folder / checkpoint.METRICS, lambda path: path.write_text(json.dumps(metrics, indent=2) + "\n")
    )
    card = model_card(checkpoint.read_record(folder), name, metrics)
    checkpoint.write_whole(folder / checkpoint.CARD, lambda path: path.write_text(card, encoding="utf-8"))
    return folder


def figures(
    trainer: CAFTTrainerMixin, config: PretrainConfig, rows: int, before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    """What the card and `caft inspect` say of the heads."""

    def by_head(metrics: dict[str, float]) -> list[dict[str, float]]:
        """All heads or none: a head without a held-out target leaves no table to speak of."""
        assert trainer.caft is not None
        keys = [f"eval_caft/{{}}_head_{k}" for k in range(1, len(trainer.caft.heads) + 1)]
        if not all(key.format("loss") in metrics for key in keys):
            return []
        return [{what: metrics[key.format(what)] for what in ("loss", "accuracy")} for key in keys]

    return {
        "targets": config.targets,
        "rows": rows,
        "steps": trainer.state.global_step,
        "heads": by_head(after),
        "untrained": by_head(before),
    }


def model_card(record: checkpoint.HeadsRecord, name: str, metrics: dict[str, Any]) -> str:
    """README.md of a heads folder."""
    lines = [
        "---",
        "library_name: caft_plugin",
        f"base_model: {name}" if "/" in name and not Path(name).exists() else "tags: [caft]",
        "---",
        "",
        f"# CAFT heads for {name}",
        "",
        f"{record.num_heads} auxiliary heads ({record.layer_class}) for concept-aware fine-tuning. Head k predicts",
        "the token k+1 ahead. They serve fine-tuning with caft_plugin (`caft: {heads: THIS_FOLDER}`).",
        "",
        f"- wiring: head_input `{record.head_input}`, head_norm `{str(record.head_norm).lower()}`",
        f"- trained on: {metrics['rows']} rows, targets `{metrics['targets']}`, {metrics['steps']} steps, base frozen",
        "",
    ]
    if metrics["heads"]:
        lines += ["| head | held-out loss | top-1 accuracy |", "| --- | --- | --- |"]
        lines += [f"| {k} | {h['loss']:.4f} | {h['accuracy']:.2%} |" for k, h in enumerate(metrics["heads"], 1)]
    return "\n".join(lines) + "\n"
