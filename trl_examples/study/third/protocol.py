"""The third study's protocol: few data, many epochs, from a random start.

Declared before any run that counts. Small Llamas are trained on part of the King James Bible until
they overfit. Pilots choose learning rate, weight decay and dropout of next-token training; every
arm then has the same. The tier `small` is for two cores or a GPU, the tier `large` for a GPU. The
two questions are asked of `small`; `large` shows whether its answers hold for a larger model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from study import protocol, results
from study.protocol import Arm, Lines, Metric, NotYet, Question, Run, Settings, Task

FIVE, EIGHT = tuple(range(5)), tuple(range(8))
PILOT_SEED = 100
PATIENCE = 3  # epochs without a better validation loss, after which a run ends
MORE = 1.5  # times as many rows, for comparison
RATIO = 0.15  # of the tokens that MEAP masks, and that the control replaces by others
VOCABULARY = 2_048

# -- the methods: every key written out, so that a change of a default changes nothing here --------

CAFT: Settings = {
    "num_heads": 2,
    "train_heads": "auto",
    "beta": 0.3,
    "alpha": 0.8,
    "schedule": "constant",
    "head_input": "penultimate",
    "head_norm": True,
    "heads_per_step": None,
}
MEAP: Settings = {"mode": "pretrain", "mask_ratio": RATIO, "mask_token": "auto"}

# -- the tiers -------------------------------------------------------------------------------------

COMMON: Settings = {
    "vocabulary": VOCABULARY,
    "tied": True,  # one matrix for embeddings and unembedding
    "length": 256,  # tokens of a row
    "times_rows": 1.0,
    "patience": PATIENCE,
    "optim": "adamw_torch_fused",
    "lr_scheduler_type": "constant_with_warmup",
    "max_grad_norm": 1.0,
    "learning_rate": None,  # these three are the pilot's choice
    "weight_decay": None,
    "dropout": None,  # of embeddings, attention weights, and the outputs of attention and MLP
    "caft": None,
    "meap": None,
    "noise": 0.0,  # share of the input tokens that are replaced by others at random
}
SMALL: Settings = {
    **COMMON,
    "layers": 4,
    "width": 128,
    "inner_width": 344,
    "attention_heads": 4,
    "bf16": False,  # products in float32, on a GPU in TF32
    "rows": 480,
    "batch": 16,
    "epochs": 60,
    "warmup_steps": 10,
}
# Five million tokens of plain text are not at hand (all of the pool is one million), and would not
# fit into fifteen minutes of a GPU: this is what fits.
LARGE: Settings = {
    **COMMON,
    "layers": 9,
    "width": 512,
    "inner_width": 1_408,
    "attention_heads": 8,
    "bf16": True,  # products in bfloat16 by autocast, on a GPU
    "rows": 2_048,
    "batch": 32,
    "epochs": 40,
    "warmup_steps": 40,
}

CHOSEN = ("learning_rate", "weight_decay", "dropout")
GRIDS = {
    "small": [
        (rate, *against_overfitting)
        for rate in (1e-3, 2e-3, 4e-3)
        for against_overfitting in ((0.1, 0.0), (0.1, 0.1), (0.1, 0.2), (1.0, 0.1))
    ],
    "large": [
        (rate, *against_overfitting)
        for rate in (5e-4, 1e-3)
        for against_overfitting in ((0.1, 0.0), (0.1, 0.2), (1.0, 0.2))
    ],
}

NTP = Arm("ntp", "next-token", EIGHT, against=())
NOISE = Arm(
    "noise",
    f"next-token, {100 * RATIO:.0f} % of the input replaced at random",
    EIGHT,
    {"noise": RATIO},
)
MASKED = Arm(
    "meap-0.15", "MEAP `pretrain`, ratio 0.15", EIGHT, {"meap": MEAP}, against=("ntp", "noise")
)
AHEAD = Arm("caft", "CAFT, beta 0.3, constant, two heads", EIGHT, {"caft": CAFT})
SMALL_ARMS = (
    NTP,
    Arm("ntp-more", "next-token, 50 % more rows, for comparison", EIGHT, {"times_rows": MORE}),
    MASKED,
    Arm("meap-0.3", "MEAP `pretrain`, ratio 0.3", EIGHT, {"meap": {**MEAP, "mask_ratio": 0.3}}),
    AHEAD,
    Arm("both", "CAFT and MEAP 0.15", EIGHT, {"caft": CAFT, "meap": MEAP}, ("ntp", "meap-0.15")),
    NOISE,
)
LARGE_ARMS = tuple(
    Arm(arm.name, arm.says, FIVE, arm.changes, arm.against) for arm in (NTP, MASKED, AHEAD, NOISE)
)
TIERS = {"small": (SMALL, SMALL_ARMS), "large": (LARGE, LARGE_ARMS)}
MINUTES = {"small": 6.0, "large": 300.0}  # of a run, on two cores


def pilot_of(tier: str) -> Task:
    arms = tuple(
        Arm(f"{rate:g}-{decay:g}-{dropout:g}", "next-token", (PILOT_SEED,), one, against=())
        for rate, decay, dropout in GRIDS[tier]
        for one in [dict(zip(CHOSEN, (rate, decay, dropout), strict=True))]
    )
    return Task(f"{tier}-pilot", TIERS[tier][0], arms, MINUTES[tier])


TASKS: dict[str, Task] = {
    task.name: task
    for tier, (settings_, arms) in TIERS.items()
    for task in (pilot_of(tier), Task(tier, settings_, arms, MINUTES[tier]))
}


@dataclass(frozen=True)
class Sizes:
    """How much a run is measured on: rows for the two losses, and verses to continue."""

    validation: int = 96
    test: int = 286
    verses: int = 20
    new_tokens: int = 48


SIZES = Sizes()
READ = ("small", 0)  # the tier and the seed whose models continue verses, for people to read

# -- the pilots' choices, and the plan -------------------------------------------------------------


def pilot(tier: str, lines: Lines) -> dict[str, Mapping[str, float]]:
    """Return the metrics of a tier's pilot by arm, in the order of its arms.

    Raises:
        NotYet: one of its runs is not in `lines`.
    """
    task = TASKS[f"{tier}-pilot"]
    found = {line["arm"]: line["metrics"] for line in lines if line["task"] == task.name}
    lacking = [arm.name for arm in task.arms if arm.name not in found]
    if lacking:
        raise NotYet(f"{task.name} {lacking[0]} is missing (make study does it)")
    return {arm.name: found[arm.name] for arm in task.arms}


def chosen(tier: str, lines: Lines) -> Settings:
    """Return learning rate, weight decay and dropout of the lowest validation loss."""
    found = pilot(tier, lines)
    name = min(found, key=lambda name: found[name]["validation_loss"])
    return dict(TASKS[f"{tier}-pilot"].arm(name).changes)


def plan(lines: Lines) -> list[Run]:
    """Return the pilots, and the runs of each tier whose pilot is complete, seed by seed."""
    ready = {f"{tier}-pilot" for tier in TIERS}
    for tier in TIERS:
        names = [arm.name for arm in TASKS[f"{tier}-pilot"].arms]
        pilots = [Run(f"{tier}-pilot", name, PILOT_SEED) for name in names]
        if not results.missing(pilots, lines):
            ready.add(tier)
    runs = [run for run in protocol.declared(TASKS) if run.task in ready]
    return sorted(runs, key=lambda run: (not run.task.endswith("-pilot"), run.seed))


def settings(run: Run, lines: Lines) -> Settings:
    """Return every hyperparameter of a run; `lines` hold the pilots.

    Raises:
        NotYet: a pilot's run is missing.
    """
    task = TASKS[run.task]
    found: Settings = {**task.settings, **task.arm(run.arm).changes}
    return found if run.task.endswith("-pilot") else {**found, **chosen(run.task, lines)}


# -- metrics and questions -------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    "test_loss": Metric("test loss", True, 4),
    "best_epoch": Metric("best epoch", True, 1),
}
QUESTIONS = (
    Question("Does MEAP help where data are few?", "small", "test_loss", "meap-0.15", "ntp"),
    Question("Does CAFT help where data are few?", "small", "test_loss", "caft", "ntp"),
)
