"""One run of the second study, see design2.py. `run.do` does it and adds its line to results.jsonl."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import data
import design2
import graphs
import measure
import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from trl import SFTConfig

from caft_plugin import CAFTConfig, MEAPConfig, with_caft
from caft_plugin.loss import IGNORE, MASKED, PLAN
from caft_plugin.meap.masking import Duplication, MEAPCollator
from caft_plugin.precision import cpu_has_bf16
from caft_plugin.trl import CAFTSFTTrainer

Figures = dict[str, Any]


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype() -> str:
    """What products are computed in; weights are float32."""
    if device() == "cuda":
        return "TF32"
    return "bfloat16" if cpu_has_bf16() else "float32"


class Places:
    """Where the model, the heads of stage 1 and the base model's answers are."""

    def __init__(self, model: Path, heads: Path) -> None:
        self.model, self.heads = model, heads
        self.answers = heads.parent / "base-answers.json"


def do(run: design2.Run, settings: dict[str, Any], sizes: design2.Sizes, folder: Path, places: Places) -> Figures:
    """Metrics and all else that a line holds of a run. `folder` is for what a trainer writes."""
    torch.set_float32_matmul_precision("high")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    if run.task.startswith("graphs"):
        return look_ahead(run, settings, sizes, folder)
    return fine_tune(run, settings, sizes, folder, places)


# -- molecules and documents --------------------------------------------------------------------------


def fine_tune(
    run: design2.Run, settings: dict[str, Any], sizes: design2.Sizes, folder: Path, places: Places
) -> Figures:
    tokenizer = AutoTokenizer.from_pretrained(places.model)
    few, is_pilot = run.task.startswith("few"), run.task.endswith("pilot")
    if few:
        rows = few_rows(settings, run.seed)
        validation = measure.asked(tokenizer, data.read("molecules-validation")[: sizes.validation])
    else:
        rows = document_rows(settings, run.seed)
    set_seed(run.seed)
    model = load(places.model, attention_dropout=settings.get("attention_dropout", 0.0))
    full = settings["method"] == "full"
    if full:  # as the authors do; SmolLM2 ties the two
        model.get_input_embeddings().requires_grad_(False)
    caft = None
    if settings.get("caft") is not None:
        heads = None if settings["heads"] is None else str(places.heads / settings["heads"])
        caft = CAFTConfig(**settings["caft"], heads=heads)
    separate = settings["meap"] is not None and settings["meap"]["layout"] == "separate"
    batch = settings["batch"] * (2 if separate else 1)  # originals and their copies
    warmup = settings.get("warmup_steps")
    if warmup is None:
        warmup = round(settings["warmup_share"] * settings["epochs"] * settings["rows"] / settings["batch"])
    trainer = Watched(
        model=model,
        args=SFTConfig(
            output_dir=str(folder),
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=50,
            warmup_steps=warmup,
            **{
                key: settings[key]
                for key in (
                    "max_length",
                    "learning_rate",
                    "weight_decay",
                    "max_grad_norm",
                    "lr_scheduler_type",
                    "optim",
                    "loss_type",
                )
            },
            bf16=dtype() == "bfloat16",
            use_cpu=device() == "cpu",
            gradient_checkpointing=False,
            logging_steps=sizes.log_every,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
        ),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{key: row[key] for key in ("prompt", "completion")} for row in rows]),
        peft_config=None if full else LoraConfig(task_type="CAUSAL_LM", **design2.design.LORA),
        caft=caft,
        meap=None if settings["meap"] is None else MEAPConfig(**settings["meap"]),
        dose_every=sizes.dose_every,
    )
    if settings.get("noise"):
        trainer.data_collator = Noise(trainer.data_collator, settings["noise"], len(tokenizer), run.seed)
    epochs = None
    if few:
        epochs = BestEpoch(trainer, validation, tokenizer.pad_token_id, settings["patience"])
        trainer.add_callback(epochs)
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    figures = figures_of(trainer, clock)
    metrics = figures["metrics"] = {}
    if epochs is not None:
        epochs.restore()
        metrics |= {
            "validation_loss": min(epochs.losses),
            "best_epoch": epochs.best,
            "epochs": len(epochs.losses),
        }
        figures["validation"] = [round(loss, 6) for loss in epochs.losses]
        figures["train_seconds"] = round(figures["train_seconds"] - epochs.seconds, 1)
    if is_pilot and few:
        return figures

    # What is measured is what a user gets: the saved model, loaded anew, without heads.
    trainer.save_model()
    tuned = load(folder) if full else PeftModel.from_pretrained(load(places.model), folder)
    tuned.eval()
    if few:
        heldout = data.read("molecules-heldout")
        questions = measure.asked(tokenizer, heldout[: sizes.heldout])
        metrics["heldout_loss"] = measure.mean_loss(measure.judge(tuned, questions, tokenizer.pad_token_id))
        shown = heldout[: sizes.generated]
        written = measure.write(tuned, tokenizer, [row["prompt"] for row in shown], max_new_tokens=64, batch=250)
        items = measure.molecule_items(written, [row["smiles"] for row in shown])
        metrics |= {name: measure.mean(values) for name, values in items.items()}
        figures["items"] = {name: [round(value, 4) for value in values] for name, values in items.items()}
        if trainer.caft is not None:
            own = [
                measure.Asked(tokenizer(row["prompt"]).input_ids, tokenizer(f" {text}").input_ids)
                for row, text in zip(shown, written, strict=True)
                if text
            ]
            metrics["tokens_per_pass"] = trainer.evaluate(as_dataset(own))["eval_caft/tokens_per_pass"]
        metrics["forgetting"] = forgetting(tuned, tokenizer, sizes.base_answers, places)
    else:
        records = data.read("records-validation" if is_pilot else "records-heldout")
        asked = middle_questions(records, sizes.validation_questions if is_pilot else sizes.questions)
        found = measure.judge(tuned, measure.asked(tokenizer, asked, end=False), tokenizer.pad_token_id)
        metrics |= {"found": measure.mean(one.right for one in found), "answer_loss": measure.mean_loss(found)}
        figures["items"] = {"found": [float(one.right) for one in found]}
        if trainer.meap is not None and not is_pilot:
            new_rows = document_rows({**settings, "rows": sizes.masked}, seed=1_000)
            metrics |= masked_losses("masked_loss", trainer, tuned, tokenizer, new_rows, settings["meap"])
            # Of these the answer does not stand in the prompt.
            least = design2.MEAP["min_answer_tokens"]
            molecules = [
                row
                for row in data.read("molecules-heldout")
                if len(tokenizer(row["completion"]).input_ids) >= least + 2  # the first is never masked, nor the last
            ][: sizes.masked]
            shorter = {**settings["meap"], "min_answer_tokens": least}
            metrics |= masked_losses("masked_molecule_loss", trainer, tuned, tokenizer, molecules, shorter)
    return figures


def load(folder: Path, **settings: Any) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings)
    return model.to(device())


def few_rows(settings: dict[str, Any], seed: int) -> list[data.Row]:
    """A seed's molecules. Of more rows the first are those of fewer; stage 1 sees none of these."""
    pool = data.read("molecules-train")[design2.STAGE1["rows"] :]
    drawn = random.Random(seed).sample(pool, len(pool))
    return drawn[: round(settings["rows"] * settings["times_rows"])]


def document_rows(settings: dict[str, Any], seed: int) -> list[data.Row]:
    """A seed's questions, each on one of 6 to 8 documents; every place among them is asked for as often."""
    records = data.read("records-train")
    draw = random.Random(seed)
    chosen = draw.sample(records, settings["rows"])
    rows = []
    for number, compound in enumerate(chosen):
        size = settings["documents"][number % len(settings["documents"])]
        place = number // len(settings["documents"]) % size
        others = draw.sample([row for row in records if row is not compound], size - 1)
        rows.append({"prompt": asked_of(compound, others, place), "completion": data.answer(compound)})
    return rows


def middle_questions(records: Sequence[data.Row], number: int) -> list[data.Row]:
    """So many questions on seven records each, that of the answer in the middle. No record comes twice."""
    if 7 * number > len(records):
        raise ValueError(f"{number} questions take {7 * number} records, and there are {len(records)}")
    rows = []
    for first in range(0, 7 * number, 7):
        compound, *others = records[first : first + 7]
        prompt = asked_of(compound, others, 3) + data.opening(compound)
        rows.append({"prompt": prompt, "completion": f" {compound['cas']}"})
    return rows


def asked_of(compound: data.Row, others: Sequence[data.Row], place: int) -> str:
    shown = [data.document(one) for one in (*others[:place], compound, *others[place:])]
    return data.question(shown, compound)


def as_dataset(rows: Sequence[measure.Asked]) -> Dataset:
    """Rows as SFTTrainer has them when it has tokenised them."""
    return Dataset.from_list(
        [
            {
                "input_ids": row.prompt + row.answer,
                "completion_mask": [0] * len(row.prompt) + [1] * len(row.answer),
            }
            for row in rows
        ]
    )


class Dosed(Trainer):
    """At every `dose_every`th step of a run with heads notes how long their gradient is on the model's own weights,
    beside that of next-token training, and the cosine between them."""

    caft: Any  # the trainer's own

    def __init__(self, *args: Any, dose_every: int, **kwargs: Any) -> None:
        self.dose_every = dose_every
        self.dose: list[dict[str, float]] = []
        super().__init__(*args, **kwargs)

    def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.caft is None or self.state.global_step % self.dose_every:
            return super().training_step(model, inputs, *args, **kwargs)
        batch = {key: inputs[key] for key in ("input_ids", "attention_mask", "labels")}
        drawn = random_state()
        loss = super().training_step(model, inputs, *args, **kwargs)
        after = random_state()
        restore(drawn)  # the same dropout
        own = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        with torch.enable_grad(), self.compute_loss_context_manager():
            alone = measure.on(self.model.device, batch)
            labels = alone.pop("labels")[:, 1:]
            logits = model(**alone, use_cache=False).logits[:, :-1].float()
            next_token = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
        gradients = torch.autograd.grad(next_token, own, allow_unused=True)
        restore(after)
        theirs = ours = both = torch.zeros((), device=self.model.device)
        for parameter, gradient in zip(own, gradients, strict=True):
            if gradient is not None:
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
        return loss


class Watched(Dosed, CAFTSFTTrainer):
    """That of molecules and documents."""


class WatchedPlain(Dosed, with_caft(Trainer)):  # type: ignore[misc]
    """That of star graphs."""


def random_state() -> tuple[torch.Tensor, torch.Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state() if device() == "cuda" else None


def restore(state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])


class Noise:
    """A collator whose input tokens are others at random in a share of all places; labels stay."""

    def __init__(self, host: Any, share: float, vocabulary: int, seed: int) -> None:
        self.host, self.share, self.vocabulary = host, share, vocabulary
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, examples: list[Any]) -> dict[str, torch.Tensor]:
        batch = self.host(examples)
        ids = batch["input_ids"]
        others = torch.randint(self.vocabulary, ids.shape, generator=self.generator)
        replaced = (torch.rand(ids.shape, generator=self.generator) < self.share) & batch["attention_mask"].bool()
        return {**batch, "input_ids": torch.where(replaced, others, ids)}


class BestEpoch(TrainerCallback):
    """After each epoch the next-token loss on validation molecules; ends the run when it has not been better for
    `patience` epochs. `restore` brings back the model and the heads of the best one."""

    def __init__(self, trainer: Watched, validation: Sequence[measure.Asked], pad: int, patience: int) -> None:
        self.trainer, self.validation, self.pad, self.patience = trainer, validation, pad, patience
        self.losses: list[float] = []
        self.kept: list[dict[str, torch.Tensor]] = []
        self.best = 0
        self.seconds = 0.0  # that this took, none of training's

    def parts(self) -> Iterator[torch.nn.Module]:
        yield self.trainer.model
        if self.trainer.caft is not None:
            yield self.trainer.caft.heads

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        self.losses.append(measure.mean_loss(measure.judge(self.trainer.model, self.validation, self.pad)))
        if self.losses[-1] == min(self.losses):
            self.best = len(self.losses)
            self.kept = [{key: value.clone() for key, value in part.state_dict().items()} for part in self.parts()]
        control.should_training_stop |= len(self.losses) >= self.best + self.patience
        self.seconds += time.perf_counter() - began

    def restore(self) -> None:
        for part, kept in zip(self.parts(), self.kept, strict=True):
            part.load_state_dict(kept)


class Clock(TrainerCallback):
    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def figures_of(trainer: Any, clock: Clock) -> Figures:
    """The log of a training, and what it took."""
    curve = []
    for entry in trainer.state.log_history:
        if "loss" in entry:
            losses = {key: round(entry[key], 5) for key in entry if key == "loss" or key.startswith("caft/loss")}
            curve.append({"step": entry["step"], **losses})
    return {
        "curve": curve[:: max(1, len(curve) // 40)],
        "dose": getattr(trainer, "dose", []),
        "tokens": next((int(e["num_tokens"]) for e in reversed(trainer.state.log_history) if "num_tokens" in e), None),
        "steps": trainer.state.global_step,
        "train_seconds": round(clock.seconds, 1),
    }


@torch.no_grad()
def masked_losses(
    metric: str, trainer: Watched, tuned: Any, tokenizer: Any, rows: Sequence[data.Row], block: dict[str, Any]
) -> dict[str, float]:
    """Loss on the masked tokens of rows that were not trained on, the original in view before the copy and not in view:
    how much a copy behind its original can copy in place of understanding."""
    found = {}
    asked = measure.asked(tokenizer, rows)
    for name, layout in (("with_original", "concat"), ("alone", "separate")):
        config = MEAPConfig(**{**block, "layout": layout})
        make = Duplication.of(config, tokenizer, None)
        collate = MEAPCollator(DataCollatorForSeq2Seq(tokenizer), config, trainer.meap.collator.mask_id, seed=0)
        total, count = 0.0, 0
        for prompt, answer in asked:
            *_, copy = make({"input_ids": prompt + answer, "labels": [IGNORE] * len(prompt) + answer})
            batch = measure.on(tuned.device, collate([copy]))
            places = (batch[PLAN] & MASKED).bool()[0].nonzero()[:, 0]
            with measure.quickly(tuned.device):
                logits = tuned(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=places - 1).logits[0]
            wanted = batch["labels"][0, places]
            total += torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="sum").item()
            count += len(places)
        found[f"{metric}_{name}"] = total / count
    return found


@torch.no_grad()
def forgetting(tuned: Any, tokenizer: Any, number: int, places: Places) -> float:
    """Nats a token by which the tuned model's next-token distribution is off the base model's, on the base model's own
    answers: KL(base || tuned)."""
    base = load(places.model).eval()
    rows = [measure.Asked(*pair) for pair in base_answers(base, tokenizer, number, places)]
    total, count = 0.0, 0
    for chosen in measure.by_length([len(row.prompt) + len(row.answer) for row in rows], 4096):
        inputs = measure.on(
            base.device, measure.padded([rows[i].prompt + rows[i].answer for i in chosen], tokenizer.pad_token_id)
        )
        longest = max(len(rows[i].answer) for i in chosen)
        keep = torch.arange(-longest - 1, -1, device=base.device)
        with measure.quickly(base.device):
            theirs, own = (
                model(**inputs, logits_to_keep=keep, use_cache=False).logits.float().log_softmax(-1)
                for model in (base, tuned)
            )
        apart = (theirs.exp() * (theirs - own)).sum(-1)
        for i, of_row in zip(chosen, apart, strict=True):
            total += of_row[-len(rows[i].answer) :].sum().item()
            count += len(rows[i].answer)
    return total / count


def base_answers(base: Any, tokenizer: Any, number: int, places: Places) -> list[list[list[int]]]:
    """What the base model writes greedily after passages that nothing is trained on: pairs of token ids, kept."""
    if places.answers.is_file():
        return json.loads(places.answers.read_text())[:number]
    prompts = [data.continuation(row["text"])["prompt"] for row in data.read("passages-heldout")[:number]]
    written = measure.write(base, tokenizer, prompts, max_new_tokens=48, batch=50)
    pairs = [
        [tokenizer(prompt).input_ids, tokenizer(f" {text}").input_ids]
        for prompt, text in zip(prompts, written, strict=True)
        if text
    ]
    places.answers.parent.mkdir(parents=True, exist_ok=True)
    unfinished = places.answers.with_suffix(f".{random.getrandbits(32)}")
    unfinished.write_text(json.dumps(pairs))
    unfinished.replace(places.answers)
    return pairs


# -- paths in star graphs -----------------------------------------------------------------------------


def on_paths(ids: torch.Tensor, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A batch of graphs (batch, length) whose loss is that of their paths."""
    labels = ids.clone()
    labels[:, : -settings["length"]] = IGNORE
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


class FreshGraphs(torch.utils.data.Dataset):
    """One item a step: a whole batch of graphs that no other step sees."""

    def __init__(self, settings: dict[str, Any], seed: int) -> None:
        self.settings, self.seed = settings, seed

    def __len__(self) -> int:
        return self.settings["steps"]

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        ids = torch.from_numpy(graphs.make(self.settings, self.settings["batch"], [1, self.seed, step]))
        return on_paths(ids, self.settings)


def look_ahead(run: design2.Run, settings: dict[str, Any], sizes: design2.Sizes, folder: Path) -> Figures:
    """A small Llama trained from its random start on paths, and the share of fresh ones that it finds."""
    set_seed(run.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=graphs.vocabulary(settings),
            hidden_size=settings["width"],
            intermediate_size=settings["width"] * 8 // 3,
            num_hidden_layers=settings["layers"],
            num_attention_heads=settings["attention_heads"],
            num_key_value_heads=settings["attention_heads"],
            max_position_embeddings=256,
            tie_word_embeddings=settings["tied"],
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    keys = (
        "learning_rate",
        "adam_beta2",
        "weight_decay",
        "max_grad_norm",
        "lr_scheduler_type",
        "optim",
        "warmup_steps",
    )
    trainer: Any = WatchedPlain(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=settings["steps"],
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,  # an item is a whole batch
            **{key: settings[key] for key in keys},
            use_cpu=device() == "cpu",
            logging_steps=max(1, settings["steps"] // 40),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            seed=run.seed,
        ),
        train_dataset=FreshGraphs(settings, run.seed),
        data_collator=the_batch,
        caft=None if settings["caft"] is None else CAFTConfig(**settings["caft"]),
        dose_every=sizes.dose_every,
    )
    clock = Clock()
    trainer.add_callback(clock)
    trainer.train()
    right = paths_right(model.eval(), settings, sizes.graphs)
    metrics = {"paths": float(right.all(1).mean()), "first": float(right[:, 1].mean())}
    if trainer.caft is not None:
        own = [on_paths(ids, settings) for ids in written_paths(model, settings, sizes.graphs)]
        metrics["tokens_per_pass"] = trainer.evaluate(own)["eval_caft/tokens_per_pass"]
    return {**figures_of(trainer, clock), "metrics": metrics}


def the_batch(items: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    (batch,) = items
    return batch


@torch.no_grad()
def paths_right(model: Any, settings: dict[str, Any], number: int) -> np.ndarray:
    """Of fresh graphs, whether each node of the path is the model's first choice, those before it given (number,
    length). A path whose every node is, is what the model would write."""
    length, found = settings["length"], []
    for ids in tested_graphs(settings, number):
        logits = model(input_ids=ids[:, :-1].to(model.device), logits_to_keep=length).logits.cpu()
        found.append((logits.argmax(-1) == ids[:, -length:]).numpy())
    return np.concatenate(found)


@torch.no_grad()
def written_paths(model: Any, settings: dict[str, Any], number: int) -> Iterator[torch.Tensor]:
    """The fresh graphs with the paths that the model writes greedily, in batches (batch, length)."""
    length = settings["length"]
    for ids in tested_graphs(settings, number):
        asked = ids[:, :-length].to(model.device)
        seen = torch.ones_like(asked)
        yield model.generate(input_ids=asked, attention_mask=seen, do_sample=False, max_new_tokens=length).cpu()


def tested_graphs(settings: dict[str, Any], number: int) -> list[torch.Tensor]:
    """So many graphs that no run trains on, in batches (batch, length)."""
    rows = graphs.make(settings, number, [2])
    return [torch.from_numpy(part) for part in np.array_split(rows, max(1, number // 250))]
