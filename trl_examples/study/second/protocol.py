"""The second study's protocol: where the methods should help. Declared before any run that counts.

Pilots choose the settings of next-token training on validation rows, and decide by the rules here
whether a task is done at all. The runs that count follow, seed by seed: `plan()` says which,
`QUESTIONS` what is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from scipy import stats

from study import protocol, results
from study.protocol import Arm, Lines, Metric, NotYet, Question, Run, Settings, Task

MODEL = "SmolLM2-135M-Instruct"
FIVE, EIGHT = tuple(range(5)), tuple(range(8))
INTERIM = 4  # seeds after which an arm may stop
PILOT_SEED = 100

# -- rules for pilots and for the first seeds ------------------------------------------------------

PATIENCE = 2  # epochs without a better validation loss, after which a run of few molecules ends
EPOCHS = 12
FEW, FEWER = 500, 250  # molecules; the latter where the pilot does not overfit on the former
MORE = 1.3  # times as many molecules, for comparison
HEADROOM = (0.25, 0.75)  # of the questions have to be found by next-token training
CONTROL = 0.95  # of the paths have to be found by the control
LEARNED = 0.9  # of the paths right: a seed that has learned them
CONFIDENCE_TO_STOP = 0.8

# -- the methods: every key written out, so that a changed default changes nothing here ------------

# the authors'
LORA: Settings = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}
CAFT_DEFAULTS: Settings = {
    "num_heads": 4,
    "train_heads": "auto",
    "beta": 0.01,
    "alpha": 0.8,
    "schedule": "rsine",
    "head_input": "penultimate",
    "head_norm": True,
    "heads_per_step": None,
}
MEAP_DEFAULTS: Settings = {
    "mode": "sft",
    "mask_ratio": 0.1,
    "layout": "concat",
    "min_answer_tokens": 51,
    "mask_token": "auto",
}
CAFT = {**CAFT_DEFAULTS, "beta": 0.3, "schedule": "constant"}
FROZEN = {**CAFT_DEFAULTS, "train_heads": "frozen"}
MEAP = {**MEAP_DEFAULTS, "layout": "separate", "mask_ratio": 0.15, "min_answer_tokens": 12}

# -- A. few molecules, many epochs -----------------------------------------------------------------

MOLECULES: Settings = {
    "model": MODEL,
    "method": "full",
    "frozen": "embeddings and unembedding",
    "rows": FEW,
    "times_rows": 1.0,
    "epochs": EPOCHS,
    "patience": PATIENCE,
    "batch": 16,
    "max_length": 128,
    "optim": "adamw_torch",
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "max_grad_norm": 1.0,
    "loss_type": "chunked_nll",
    "learning_rate": None,  # these three are the pilot's choice
    "weight_decay": None,
    "attention_dropout": None,
    "caft": None,
    "heads": None,
    "meap": None,
    "noise": 0.0,  # share of the input tokens that are replaced by others at random
}
CHOSEN = ("learning_rate", "weight_decay", "attention_dropout")
GRID = tuple(
    dict(zip(CHOSEN, (rate, decay, dropout), strict=True))
    for rate in (1e-4, 2e-4, 4e-4)
    for decay, dropout in ((0.0, 0.0), (1.0, 0.1))
)

FEW_ARMS = (
    Arm("ntp", "next-token", EIGHT, against=()),
    Arm("ntp-more", "next-token, 30 % more molecules, for comparison", FIVE, {"times_rows": MORE}),
    Arm(
        "caft",
        "CAFT, beta 0.3, constant, heads trained (from copies of the last layer)",
        EIGHT,
        {"caft": CAFT},
    ),
    Arm("meap", "MEAP separate, ratio 0.15, answers of 12 tokens and more", EIGHT, {"meap": MEAP}),
    Arm(
        "caft-frozen",
        "CAFT with default settings (beta 0.01, rsine), frozen heads from stage 1",
        EIGHT,
        {"caft": FROZEN, "heads": "few-heads"},
    ),
    Arm("noise", "next-token, 5 % of the input tokens replaced at random", FIVE, {"noise": 0.05}),
)

# Stage 1 of the frozen heads, by `caft pretrain-heads`: 2,500 molecules that no other run of the
# second study trains on. The heads have seen more molecules than the other arms; this arm asks what
# strong heads do, not what few data do.
STAGE1: Settings = {
    "model": MODEL,
    "rows": 2_500,
    "targets": "dataset",
    "num-heads": 4,
    "head-input": "penultimate",
    "head-norm": True,
    "steps": 400,
    "batch-size": 32,
    "learning-rate": 1e-3,
    "max-length": 128,
    "save-steps": 400,
    "seed": 0,
}

# -- B. looking ahead: paths in star graphs --------------------------------------------------------

GRAPHS: Settings = {
    "layers": 3,
    "width": 96,
    "attention_heads": 6,
    "nodes": 20,  # numbers that nodes have
    "arms": 3,
    "length": 6,  # nodes of a path, its start and its goal among them
    "reversed": False,
    # one matrix for embeddings and unembedding: found to learn in hundreds of steps, not in
    # thousands
    "tied": True,
    "steps": 1_500,
    "batch": 256,
    "optim": "adamw_torch",
    "learning_rate": 1e-3,
    "adam_beta2": 0.95,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 100,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "caft": None,
}
GRAPH_ARMS = (
    Arm("ntp", "next-token", FIVE, against=()),
    Arm(
        "caft-1",
        "CAFT, beta 1, constant",
        FIVE,
        {"caft": {**CAFT_DEFAULTS, "beta": 1.0, "schedule": "constant"}},
    ),
    Arm(
        "caft-0.01",
        "CAFT with default settings (beta 0.01, rsine)",
        FIVE,
        {"caft": dict(CAFT_DEFAULTS)},
    ),
    Arm("control", "next-token on reversed paths", (0, 1), {"reversed": True}, against=()),
)

# -- C. retrieval with headroom --------------------------------------------------------------------

DOCUMENTS: Settings = {
    "model": MODEL,
    "method": "lora",
    **{f"lora_{key.removeprefix('lora_')}": value for key, value in LORA.items()},
    "documents": (6, 7, 8),
    "rows": None,  # the pilot's choice
    "epochs": 2,
    "batch": 8,
    "max_length": 2048,
    "optim": "adamw_torch",
    "learning_rate": 4e-3,  # the best of four on the first study's validation questions
    "lr_scheduler_type": "linear",
    "warmup_share": 0.05,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "loss_type": "chunked_nll",
    "meap": None,
}
# At first 80 to 640: 80 questions, the pilot's first run, left no headroom (89 % found), so the
# range was moved down before anything else of this task was run. And at first the number nearest to
# half was to be taken: 20 questions, three steps of MEAP, found 60 %, 40 found 64 %, so before any
# run that counts the rule became the most that leave headroom.
ROWS = (20, 40, 80)
DOCUMENT_ARMS = (
    Arm("ntp", "next-token, two epochs (MEAP's number of tokens)", EIGHT, against=()),
    Arm(
        "meap-separate",
        "MEAP, the copy a row of its own, one epoch",
        EIGHT,
        {"meap": {**MEAP_DEFAULTS, "layout": "separate"}, "epochs": 1},
        against=("ntp", "ntp-once", "meap-concat"),  # the last says which layout is the default
    ),
    Arm(
        "meap-concat",
        "MEAP, the copy behind its original, one epoch",
        EIGHT,
        {"meap": MEAP_DEFAULTS, "epochs": 1},
        against=("ntp", "ntp-once"),
    ),
    # Added when seed 0 of the others was done: a batch of MEAP holds twice the tokens, so `ntp`
    # takes twice as many optimizer steps, and this arm as many as MEAP.
    Arm("ntp-once", "next-token, one epoch (MEAP's number of steps)", EIGHT, {"epochs": 1}),
)

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "few-heads",
            STAGE1,
            (Arm("few-heads", "stage 1 on 2,500 other molecules", (0,)),),
            minutes=30,
        ),
        Task(
            "few-pilot",
            MOLECULES,
            tuple(
                Arm(
                    f"{one['learning_rate']:g}-{one['weight_decay']:g}-{one['attention_dropout']:g}",
                    "next-token, learning rate, weight decay and attention dropout",
                    (PILOT_SEED,),
                    one,
                )
                for one in GRID
            ),
            minutes=10,
        ),
        Task("few", MOLECULES, FEW_ARMS, minutes=12),
        Task(
            "documents-pilot",
            DOCUMENTS,
            tuple(
                Arm(f"rows-{rows}", f"next-token, {rows} questions", (PILOT_SEED,), {"rows": rows})
                for rows in ROWS
            ),
            minutes=5,
        ),
        Task("documents", DOCUMENTS, DOCUMENT_ARMS, minutes=10),
        Task(
            "graphs-pilot",
            GRAPHS,
            (Arm("control", "reversed paths", (PILOT_SEED,), {"reversed": True}),),
            minutes=5,
        ),
        Task("graphs", GRAPHS, GRAPH_ARMS, minutes=10),
    )
}


@dataclass(frozen=True)
class Sizes:
    """How much a run is measured on."""

    heldout: int = 1_000
    validation: int = 500
    generated: int = 500
    questions: int = 400
    validation_questions: int = 140  # of distinct documents, 7 each
    graphs: int = 1_000
    base_answers: int = 200
    masked: int = 50
    dose_every: int = 10  # steps
    log_every: int = 5


SIZES = Sizes()

# -- the pilots' choices, by the rules above -------------------------------------------------------


def pilot(task: str, lines: Lines) -> dict[str, Mapping[str, float]]:
    """Return the metrics of a pilot's runs by arm, in the order of its arms.

    Raises:
        NotYet: one of them is not in `lines`.
    """
    found = {line["arm"]: line["metrics"] for line in lines if line["task"] == task}
    names = [arm.name for arm in TASKS[task].arms]
    lacking = [name for name in names if name not in found]
    if lacking:
        raise NotYet(f"{task} {lacking[0]} is missing (make study does it)")
    return {name: found[name] for name in names}


def chosen_few(lines: Lines) -> Settings:
    """Return learning rate, weight decay and dropout of the lowest validation loss, and the number
    of molecules: 250 where that run continued to the last epoch, because it did not overfit
    then."""
    found = pilot("few-pilot", lines)
    name = min(found, key=lambda name: found[name]["validation_loss"])
    rows = FEW if found[name]["epochs"] < EPOCHS else FEWER
    return {**TASKS["few-pilot"].arm(name).changes, "rows": rows}


def chosen_rows(lines: Lines) -> int | None:
    """Return the most questions after which next-token training leaves headroom on the validation
    questions, None where it never does."""
    found = pilot("documents-pilot", lines)
    fitting = [
        rows for rows in ROWS if HEADROOM[0] <= found[f"rows-{rows}"]["found"] <= HEADROOM[1]
    ]
    return max(fitting, default=None)


def control_works(lines: Lines) -> bool:
    return pilot("graphs-pilot", lines)["control"]["paths"] >= CONTROL


def stopped(lines: Lines) -> set[str]:
    """Return the arms of `few` that end after four seeds: the 80 % interval of their difference to
    next-token training holds no gain of half of what 30 % more molecules bring. Pairs are of runs
    on the same kind of machine."""
    first = [line for line in lines if line["seed"] < INTERIM]
    apart = {
        arm.name: [
            a["metrics"]["heldout_loss"] - b["metrics"]["heldout_loss"]
            for a, b in results.pairs(first, "few", arm.name, "ntp")
        ]
        for arm in FEW_ARMS
        if arm.against
    }
    more = apart.pop("ntp-more")
    if len(more) < INTERIM:
        return set()
    half_a_gain = sum(more) / INTERIM / 2
    quantile = stats.t.ppf((1 + CONFIDENCE_TO_STOP) / 2, INTERIM - 1)
    return {
        name
        for name, found in apart.items()
        if len(found) == INTERIM
        and sum(found) / INTERIM - quantile * stats.sem(found) > half_a_gain
    }


# -- the plan --------------------------------------------------------------------------------------


def allowed(rule: Callable[[Lines], object], lines: Lines) -> bool:
    """Whether a rule lets its task be done; not as long as its pilot is missing."""
    try:
        return bool(rule(lines))
    except NotYet:
        return False


def plan(lines: Lines) -> list[Run]:
    """Return the runs that the rules ask for as far as `lines` tell: those that wait for others are
    not in it yet."""
    runs = protocol.declared(TASKS)
    wanted = [run for run in runs if run.task.endswith("-pilot") or run.task == "few-heads"]
    if allowed(chosen_few, lines):
        first = [run for run in runs if run.task == "few" and run.seed < INTERIM]
        wanted += first
        if not results.missing(first, lines):
            out = stopped(lines)
            wanted += [
                run
                for run in runs
                if run.task == "few" and run.seed >= INTERIM and run.arm not in out
            ]
    for task, rule in (("graphs", control_works), ("documents", chosen_rows)):
        if allowed(rule, lines):
            wanted += [run for run in runs if run.task == task]
    return wanted


def settings(run: Run, lines: Lines) -> Settings:
    """Return every hyperparameter of a run; `lines` hold the pilots.

    Raises:
        NotYet: a run by which a setting is chosen has not been done.
    """
    task = TASKS[run.task]
    found: Settings = {**task.settings, **task.arm(run.arm).changes}
    if run.task == "few":
        found |= chosen_few(lines)
    elif found.get("rows", 0) is None:  # documents, but not their pilot
        found["rows"] = chosen_rows(lines)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


# -- metrics and questions -------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    "heldout_loss": Metric("held-out loss", True, 4),
    "exact": Metric("exact match", False, 1, percent=True),
    "valid": Metric("valid", False, 1, percent=True),
    "tanimoto": Metric("Tanimoto", False, 3),
    "best_epoch": Metric("best epoch", True, 1),
    "forgetting": Metric("KL to the base model on its own answers", True, 3),
    "found": Metric("found", False, 1, percent=True),
    "answer_loss": Metric("loss of the number", True, 3),
    "paths": Metric("paths right", False, 1, percent=True),
    "first": Metric("first step right", False, 1, percent=True),
}
QUESTIONS = (
    Question("A. Does CAFT help where data are few?", "few", "heldout_loss", "caft", "ntp"),
    Question("A. Does MEAP help where data are few?", "few", "heldout_loss", "meap", "ntp"),
    Question(
        "B. Does CAFT learn to look ahead?", "graphs", "paths", "caft-1", "ntp", learned=LEARNED
    ),
    Question(
        "C. Does MEAP help retrieval where there is room?",
        "documents",
        "found",
        "meap-separate",
        "ntp",
    ),
)
