"""The study's protocol: every task, arm, seed, setting, metric and comparison, declared once and before any run.

Nothing is chosen after the fact: what is run follows from `plan()`, what the report claims from `COMPARISONS`. Numbers
of steps are what two cores can do in the time that is given in `Task.minutes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MODEL = "SmolLM2-135M-Instruct"
THREADS = 2
RUN_MINUTES = 15  # what a run should take at most
MAIN_HEADS = "distribution"  # the stage 1 whose heads the arms named stage1 start from

# The authors' rank and alpha. The learning rate is what a run adds.
LORA = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRAINING = {
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "lr_scheduler_type": "linear",
    "loss_type": "chunked_nll",
}
WARMUP = 0.05  # share of the steps

# The blocks, every key written out, so that a later change of a default changes nothing here.
CAFT = {
    "num_heads": 4,
    "train_heads": "auto",
    "beta": 0.01,
    "alpha": 0.8,
    "schedule": "rsine",
    "head_input": "penultimate",
    "head_norm": True,
    "heads_per_step": None,
}
MEAP = {"mode": "sft", "mask_ratio": 0.1, "layout": "concat", "min_answer_tokens": 51, "mask_token": "auto"}


class Run(NamedTuple):
    task: str
    arm: str
    seed: int


@dataclass(frozen=True)
class Arm:
    """One way to train. `caft` and `meap` are what differs from CAFT and MEAP above, None leaves the method out. `rate`
    is a learning rate or the name of the choice that makes it. Of what else is None the task's counts."""

    name: str
    says: str
    rate: float | str
    caft: Mapping[str, Any] | None = None
    heads: str | None = None
    meap: Mapping[str, Any] | None = None
    full: bool = False
    steps: int | None = None
    batch: int | None = None
    seeds: tuple[int, ...] | None = None
    against: tuple[str, ...] = ()
    knob: str = ""


@dataclass(frozen=True)
class Task:
    """`data` names what is trained on, `rows` how many of these rows a run sees again in each epoch (None: all)."""

    name: str
    data: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    steps: int
    batch: int
    max_length: int
    minutes: float
    rows: int | None = None
    measures: tuple[str, ...] = ()
    marks: int = 0

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)


# -- learning rates, chosen for the next-token arm on validation rows -------------------------------

# Where the highest rate of a range was the best on validation rows, a higher one was added before the arms ran: once to
# every range after the first four runs (4e-3), once to retrieval's (4e-3 again).
RATES: dict[str, tuple[float, ...]] = {
    "molecules-lora": (5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
    "molecules-full": (1e-4, 2e-4, 4e-4, 8e-4),
    "retrieval-lora": (1e-3, 2e-3, 4e-3, 8e-3),
}
CHOICE_SEED = 100  # none of the study's own


def candidates(choice: str) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{choice}-{rate:g}", f"next-token, learning rate {rate:g}", rate, full=choice.endswith("full"))
        for rate in RATES[choice]
    )


def chosen_rate(choice: str, lines: Iterable[Mapping[str, Any]]) -> float:
    """The learning rate of the lowest validation loss; of equal ones the lowest.

    Raises:
        ValueError: a run that the choice needs is not in `lines`.
    """
    losses = {(line["task"], line["arm"]): line["metrics"]["validation_loss"] for line in lines if is_choice(line)}
    found = []
    for rate in RATES[choice]:
        run = Run(f"rates-{choice}", f"{choice}-{rate:g}", CHOICE_SEED)
        if run[:2] not in losses:
            raise ValueError(
                f"the learning rate of {choice} is not chosen yet: run.py --task {run.task} --arm {run.arm} "
                f"--seed {run.seed} is missing (make study does it)"
            )
        found.append((losses[run[:2]], rate))
    return min(found)[1]


def is_choice(line: Mapping[str, Any]) -> bool:
    return str(line["task"]).startswith("rates-")


# -- arms -------------------------------------------------------------------------------------------

LORA_RATE, FULL_RATE, RETRIEVAL_RATE = "molecules-lora", "molecules-full", "retrieval-lora"
ALL: dict[str, Any] = {}  # CAFT or MEAP as they stand above

MOLECULES = (
    Arm("ntp", "next-token, LoRA", LORA_RATE),
    Arm("ntp-time", "next-token, LoRA, as many steps as take CAFT's time", LORA_RATE, steps=225, against=("ntp",)),
    Arm("caft-copy", "CAFT, LoRA, untrained heads (copies of the last layer)", LORA_RATE, ALL, against=("ntp",)),
    Arm(
        "caft-stage1",
        "CAFT, LoRA, heads from stage 1",
        LORA_RATE,
        ALL,
        heads=MAIN_HEADS,
        against=("ntp", "ntp-time", "caft-copy"),
    ),
    Arm(
        "caft-one",
        "CAFT, LoRA, heads from stage 1, one drawn head a step",
        LORA_RATE,
        {"heads_per_step": 1},
        heads=MAIN_HEADS,
        against=("ntp", "caft-stage1"),
    ),
    Arm("ntp-full", "next-token, full fine-tuning", FULL_RATE, full=True),
    Arm(
        "caft-stage1-full",
        "CAFT, full fine-tuning, heads from stage 1",
        FULL_RATE,
        ALL,
        heads=MAIN_HEADS,
        full=True,
        against=("ntp-full",),
    ),
)

RETRIEVAL = (
    Arm("base", "the model as it comes, untrained", RETRIEVAL_RATE, steps=0, seeds=(0,)),
    Arm("ntp", "next-token, one epoch", RETRIEVAL_RATE),
    Arm("ntp-2x", "next-token, two epochs (MEAP's number of tokens)", RETRIEVAL_RATE, steps=80, against=("ntp",)),
    Arm(
        "meap-concat",
        "MEAP, the copy behind its original",
        RETRIEVAL_RATE,
        meap=ALL,
        against=("ntp", "ntp-2x"),
    ),
    Arm(
        "meap-separate",
        "MEAP, the copy a row of its own",
        RETRIEVAL_RATE,
        meap={"layout": "separate"},
        batch=8,  # four pairs
        against=("ntp", "ntp-2x"),
    ),
    Arm(
        "caft-meap",
        "CAFT (heads from stage 1) and MEAP concat",
        RETRIEVAL_RATE,
        ALL,
        heads=MAIN_HEADS,
        meap=ALL,
        against=("ntp", "ntp-2x", "meap-concat"),
    ),
)

PRETRAIN = (
    Arm("base", "the model as it comes, untrained", RETRIEVAL_RATE, steps=0, seeds=(0,)),
    Arm("ntp", "next-token on plain text, LoRA", RETRIEVAL_RATE),
    Arm(
        "meap",
        "MEAP pretraining on plain text (0.15), LoRA",
        RETRIEVAL_RATE,
        meap={"mode": "pretrain", "mask_ratio": 0.15},
        against=("ntp",),
    ),
)


def ablation(name: str, knob: str, says: str, caft: Mapping[str, Any] | None = None, **more: Any) -> Arm:
    return Arm(name, says, LORA_RATE, caft, knob=knob, against=("ntp",), **more)


def ablations() -> tuple[Arm, ...]:
    wiring, start, masks = "head input and norm (copies)", "start of the heads", "MEAP on answers of 12 tokens and more"
    arms = [
        Arm("ntp", "next-token", LORA_RATE),
        ablation("copy", start, "copies of the last layer: input penultimate, norm, 4 heads", ALL),
        *(
            ablation(f"stage1-{kind}" if kind != MAIN_HEADS else "stage1", start, f"stage 1, {kind}", ALL, heads=kind)
            for kind in STAGE1_KINDS
        ),
        ablation(
            "penultimate-plain", wiring, "penultimate, no norm", {"head_input": "penultimate", "head_norm": False}
        ),
        ablation("final-norm", wiring, "final, norm", {"head_input": "final", "head_norm": True}),
        ablation("final-plain", wiring, "final, no norm (the authors')", {"head_input": "final", "head_norm": False}),
    ]
    for beta in (0.003, 0.03, 0.1):
        arms.append(ablation(f"beta-{beta:g}", "beta (stage 1)", f"{beta:g}", {"beta": beta}, heads=MAIN_HEADS))
    for heads in (1, 2, 8):
        arms.append(ablation(f"heads-{heads}", "number of heads (copies)", str(heads), {"num_heads": heads}))
    for name in ("sine", "linear", "constant"):
        arms.append(ablation(f"schedule-{name}", "schedule (stage 1)", name, {"schedule": name}, heads=MAIN_HEADS))
    for drawn in (1, 2):
        block = {"heads_per_step": drawn}
        arms.append(ablation(f"drawn-{drawn}", "heads_per_step (stage 1)", str(drawn), block, heads=MAIN_HEADS))
    for ratio in (0.05, 0.1, 0.15, 0.2):
        meap = {"mask_ratio": ratio, "min_answer_tokens": 12}
        arms.append(ablation(f"meap-{ratio:g}", masks, f"ratio {ratio:g}, concat", meap=meap))
    separate = {"layout": "separate", "min_answer_tokens": 12}
    arms.append(
        ablation(
            "meap-separate",
            masks,
            "ratio 0.1, separate (short answers have no copy, so one row in seven comes twice)",
            meap=separate,
            batch=32,
        )
    )
    return tuple(arms)


# What an ablation's setting is compared with besides next-token training: the product's default of that knob.
DEFAULT_OF_KNOB = {
    "start of the heads": "copy",
    "head input and norm (copies)": "copy",
    "number of heads (copies)": "copy",
    "beta (stage 1)": "stage1",
    "schedule (stage 1)": "stage1",
    "heads_per_step (stage 1)": "stage1",
    "MEAP on answers of 12 tokens and more": "meap-0.1",
}

# -- stage 1, by the shipped command ----------------------------------------------------------------

STAGE1_KINDS = ("distribution", "model", "dataset")


@dataclass(frozen=True)
class Stage1:
    """Options of `caft pretrain-heads`, the same for each kind of target."""

    options: Mapping[str, Any] = field(
        default_factory=lambda: {
            "num-heads": 4,
            "head-input": "penultimate",
            "head-norm": True,
            "steps": 300,
            "batch-size": 8,
            "learning-rate": 1e-3,  # the paper's 1e-4 is for longer training
            "max-length": 256,
            "save-steps": 100,
            "seed": 0,
        }
    )
    answers: Mapping[str, Any] = field(
        default_factory=lambda: {
            "max-new-tokens": 48,
            "temperature": 0.7,
            "top-p": 0.95,
            "generation-batch-size": 64,
        }
    )

    def of(self, kind: str) -> dict[str, Any]:
        return {"targets": kind, **self.options, **(self.answers if kind == "model" else {})}


STAGE1 = Stage1()

# -- tasks ------------------------------------------------------------------------------------------

SEEDS = (0, 1, 2, 3, 4)
MOLECULE_STEPS, MOLECULE_BATCH = 150, 16
MDQA_DOCUMENTS, MDQA_PLACES = (10, 20), ("first", "middle", "last")
NEEDLE_LENGTHS, NEEDLE_DEPTHS = (512, 1024, 2048), (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLE_OTHERS = 4


@dataclass(frozen=True)
class Sizes:
    """How much a run is measured on: the first rows of a split, and questions of each cell."""

    heldout: int = 1_000
    validation: int = 500
    generated: int = 200  # molecules for which SMILES are written
    marked: int = 200  # molecules on which the loss is followed during training
    document_questions: int = 20
    needle_questions: int = 4
    log_every: int = 5  # steps
    stage1: int = 4_800  # rows that stage 1 is given


SIZES = Sizes()

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "stage1",
            "stage1",
            tuple(Arm(kind, f"stage 1 with targets {kind}", 0.0) for kind in STAGE1_KINDS),
            (0,),
            STAGE1.options["steps"],
            STAGE1.options["batch-size"],
            STAGE1.options["max-length"],
            minutes=12,
        ),
        *(
            Task(
                f"rates-{choice}",
                "molecules",
                candidates(choice),
                (CHOICE_SEED,),
                MOLECULE_STEPS,
                MOLECULE_BATCH,
                128,
                minutes=6,
                measures=("validation",),
            )
            for choice in (LORA_RATE, FULL_RATE)
        ),
        Task(
            "molecules",
            "molecules",
            MOLECULES,
            SEEDS,
            MOLECULE_STEPS,
            MOLECULE_BATCH,
            128,
            minutes=8,
            measures=("loss", "generation"),
            marks=5,
        ),
        Task(
            f"rates-{RETRIEVAL_RATE}",
            "records",
            candidates(RETRIEVAL_RATE),
            (CHOICE_SEED,),
            40,
            4,
            1024,
            minutes=4,
            rows=160,
            measures=("validation",),
        ),
        Task(
            "retrieval",
            "records",
            RETRIEVAL,
            SEEDS[:3],
            40,
            4,
            1024,
            minutes=9,
            rows=160,
            measures=("mdqa", "needle"),
        ),
        Task("pretrain", "passages", PRETRAIN, SEEDS[:3], 40, 4, 512, minutes=8, measures=("needle",)),
        Task(
            "ablations",
            "molecules",
            ablations(),
            SEEDS[:1],
            MOLECULE_STEPS // 3,
            MOLECULE_BATCH,
            128,
            minutes=3,
            measures=("loss",),
        ),
    )
}

CUTS = (
    "The ablations take one seed on a third of the molecules' steps (a second seed was planned, and was cut before any "
    "of them ran, when the ten hours were spent); retrieval and pretraining take three seeds; a molecules run takes "
    "150 steps of 16, which is 2,400 of the 5,000 training molecules, drawn anew by each seed; retrieval is learnt "
    "from 160 questions."
)


def plan() -> list[Run]:
    """Every run, in the order in which they are done: seed by seed, so that arms stay paired wherever it stops."""

    def of(task: str, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None) -> list[Run]:
        declared = TASKS[task]
        return [
            Run(task, arm.name, seed)
            for seed in (declared.seeds if seeds is None else seeds)
            for arm in declared.arms
            if (arms is None or arm.name in arms) and seed in (arm.seeds or declared.seeds)
        ]

    return [
        *of("stage1", [MAIN_HEADS]),
        *of(f"rates-{LORA_RATE}"),
        *of(f"rates-{FULL_RATE}"),
        *of("molecules"),
        *of(f"rates-{RETRIEVAL_RATE}"),
        *of("retrieval"),
        *of("pretrain"),
        *of("stage1", [kind for kind in STAGE1_KINDS if kind != MAIN_HEADS]),
        *of("ablations"),
    ]


# -- metrics and comparisons ------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    title: str
    lower_is_better: bool
    digits: int
    percent: bool = False


METRICS: dict[str, Metric] = {
    "heldout_loss": Metric("held-out loss", True, 4),
    "exact": Metric("exact match", False, 1, percent=True),
    "valid": Metric("valid", False, 1, percent=True),
    "tanimoto": Metric("Tanimoto", False, 3),
    "f1_benzene": Metric("F1 benzene", False, 3),
    "f1_amide": Metric("F1 amide", False, 3),
    "f1_carboxyl": Metric("F1 carboxyl", False, 3),
    "mdqa_accuracy": Metric("documents: found", False, 1, percent=True),
    "mdqa_loss": Metric("documents: loss", True, 3),
    "needle_accuracy": Metric("needle: found", False, 1, percent=True),
    "needle_loss": Metric("needle: loss", True, 3),
}
SHOWN = {
    "molecules": ("heldout_loss", "exact", "valid", "tanimoto", "f1_benzene", "f1_amide", "f1_carboxyl"),
    "retrieval": ("mdqa_accuracy", "mdqa_loss", "needle_accuracy", "needle_loss"),
    "pretrain": ("needle_accuracy", "needle_loss"),
    "ablations": ("heldout_loss",),
}


@dataclass(frozen=True)
class Comparison:
    """A primary comparison: one question, one metric, two arms."""

    method: str
    task: str
    metric: str
    arm: str
    against: str
    question: str


COMPARISONS = (
    Comparison(
        "CAFT", "molecules", "heldout_loss", "caft-stage1", "ntp", "Does CAFT help LoRA fine-tuning, step for step?"
    ),
    Comparison(
        "CAFT", "molecules", "heldout_loss", "caft-stage1", "ntp-time", "Does CAFT help LoRA fine-tuning at equal time?"
    ),
    Comparison("CAFT", "molecules", "heldout_loss", "caft-stage1-full", "ntp-full", "Does CAFT help full fine-tuning?"),
    Comparison(
        "MEAP", "retrieval", "mdqa_accuracy", "meap-concat", "ntp-2x", "Does MEAP help fine-tuning for retrieval?"
    ),
    Comparison(
        "MEAP", "pretrain", "needle_accuracy", "meap", "ntp", "Does MEAP help continued pretraining for retrieval?"
    ),
)


# -- the settings of one run, as its line in results.jsonl records them ------------------------------


FLOAT32 = "float32"  # the dtype of runs on a CPU without instructions for bfloat16


def settings(run: Run, lines: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Every hyperparameter of a run; `lines` hold the runs by which its learning rate was chosen."""
    task, arm = TASKS[run.task], TASKS[run.task].arm(run.arm)
    if run.task == "stage1":
        return {"model": MODEL, "threads": THREADS, **STAGE1.of(run.arm)}
    steps = task.steps if arm.steps is None else arm.steps
    return {
        "model": MODEL,
        "threads": THREADS,
        "method": "full" if arm.full else "lora",
        **({} if arm.full else {f"lora_{key.removeprefix('lora_')}": value for key, value in LORA.items()}),
        "frozen": "embeddings and unembedding" if arm.full else "base",
        "dtype": "float32 weights, bfloat16 autocast" if arm.full else "bfloat16 base, float32 adapter, autocast",
        **TRAINING,
        "steps": steps,
        "batch": arm.batch or task.batch,
        "warmup_steps": round(steps * WARMUP),
        "learning_rate": chosen_rate(arm.rate, lines) if isinstance(arm.rate, str) else arm.rate,
        "max_length": task.max_length,
        "rows": task.rows,
        "caft": None if arm.caft is None else {**CAFT, **arm.caft},
        "heads": arm.heads,
        "meap": None if arm.meap is None else {**MEAP, **arm.meap},
    }
