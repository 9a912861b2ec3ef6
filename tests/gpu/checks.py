"""What is checked, what each run is compared with, and how far it may be from that."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch
from described import LARGE, SMALL, WHOLE, Figures, Run, Size

from caft_plugin.precision import cpu_has_bf16

UNTIMED = "CAFT_GPU_CHECK_UNTIMED"  # set in the environment: times are left out
# steps that are not timed: allocations, a kernel compiled for one length and once more for all
WARM_UP = 3
ROUNDS = 2  # timed runs of each kind, in turn


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a run may be from its reference, the same run on a CPU in float32, relative to it:
    the losses of the first step, its gradients (the length of the difference, of the model's own
    and of each head's), and the losses of the last step, into which the optimizer's work has
    gone."""

    loss: float
    gradient: float
    last: float


# Gradients tell faults apart best: those of heads that learn the token one too far are 0.5 off.
# Measured on a CPU, beside float32: gradients in bfloat16 are 0.008 off, over a base in 4 bits
# 0.011; losses are 3e-5 and 1e-4 off at the first step, 4e-4 at the last, by which they have fallen
# by a tenth. Sums in another order, as packed rows have them, are off by 1e-6 in float32. The
# optimizer of the last kind keeps its state in 8 bits.
FLOAT32 = Tolerance(loss=1e-5, gradient=1e-3, last=1e-3)
HALF = Tolerance(loss=1e-3, gradient=0.05, last=0.01)
FOUR_BITS = Tolerance(loss=3e-3, gradient=0.1, last=0.02)
EIGHT_BIT_STATE = Tolerance(loss=1e-5, gradient=1e-3, last=0.05)

# Runs on a CPU in float32, with nothing that only makes them faster or smaller; size and settings.
REFERENCES: dict[str, tuple[Size, Run]] = {
    "lora": (SMALL, Run()),
    "full": (SMALL, Run(how="full")),
    "qlora": (SMALL, Run(how="qlora")),
    "masked": (SMALL, Run(meap={"min_answer_tokens": 3, "mask_token": "add"})),
    "all rows at once": (WHOLE, Run()),
    "all rows at once, qlora": (WHOLE, Run(how="qlora")),
}


@dataclasses.dataclass(frozen=True)
class Row:
    """Of the table."""

    check: str
    result: str
    difference: str = ""
    time: str = ""
    memory: str = ""

    @property
    def failed(self) -> bool:
        return self.result.startswith(("failed", "differs"))


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the table.

    `reference` names the run on a CPU beside which it stands, `packages` have to be installed,
    `cuda` is what a CPU cannot do, `alone` what changes classes for its whole process.
    """

    name: str
    _: dataclasses.KW_ONLY
    reference: str | None = None
    packages: tuple[str, ...] = ()
    cuda: bool = False
    alone: bool = False
    processes: int = 1

    def why_not(self, device: str) -> str | None:
        """Why it cannot be run here, None where it can."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if device == "cuda":
            gpus = torch.cuda.device_count()
            return f"{gpus} GPU, it takes {self.processes}" if gpus < self.processes else None
        return "it takes CUDA" if self.cuda else None

    def measure(self, device: str, folder: Path) -> Row:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class TrainerCheck(Check):
    """A run with heads, beside the run without us on the same device and beside `reference`. Where
    that is None, heads weigh nothing, and every step is compared with the run without us."""

    run: Run
    tolerance: Tolerance
    _: dataclasses.KW_ONLY
    reference: str | None = "lora"

    def why_not(self, device: str) -> str | None:
        if device == "cpu" and self.run.args.get("bf16") and not cpu_has_bf16():
            return "this CPU has no instructions for bfloat16"
        return super().why_not(device)

    def measure(self, device: str, folder: Path) -> Row:
        from runs import train

        reference = None if self.reference is None else load(folder, self.reference)
        start = None if reference is None else reference.start
        try:
            plain = train(self.run, SMALL, device, folder, ours=False, start=start)
        except Exception as error:
            return Row(self.name, f"not run: without us it fails too, {in_one_line(error)}")
        ours = train(self.run, SMALL, device, folder, start=start)
        result, difference = verdict(
            [*self.compared(ours, plain, reference), saved_plainly(ours, plain)]
        )
        if UNTIMED in os.environ:
            return Row(self.name, result, difference)
        pairs = [(plain, ours)]  # on a CPU times say little, so nothing is run for them alone
        if device == "cuda":
            pairs = pairs_of_runs(self.run, LARGE, device, folder)
        return Row(self.name, result, difference, *ratios(pairs))

    def compared(
        self, ours: Figures, plain: Figures, reference: Figures | None
    ) -> Iterator[Difference]:
        if reference is None:
            yield from without_us(ours, plain, self.tolerance)
            return
        if self.run.meap is None:  # without us nothing is masked
            yield losses(
                "next-token loss without us",
                ours,
                plain,
                0,
                "caft/next_token_loss",
                "loss",
                self.tolerance.loss,
            )
        yield from on_cpu(ours, reference, self.tolerance)


@dataclasses.dataclass(frozen=True)
class DrafterCheck(Check):
    """Texts written with heads that draft, all four in every round, beside those that the model
    writes plainly."""

    def measure(self, device: str, folder: Path) -> Row:
        from runs import written_twice

        pairs = written_twice(SMALL, device, folder, num_draft=4)
        others = sum(plain != drafted for plain, drafted, _, _ in pairs)
        result = verdict([Difference("texts that differ", others, 0)])
        if UNTIMED in os.environ:
            return Row(self.name, *result)
        size = LARGE if device == "cuda" else SMALL
        timed = written_twice(size, device, folder, num_draft=None)
        ratio = statistics.median(after / before for _, _, before, after in timed[1:])
        return Row(self.name, *result, time=f"{ratio:.2f}")


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of one figure: what it is, how far off, and how far it may be."""

    what: str
    size: float
    allowed: float

    @property
    def share(self) -> float:
        """Of what is allowed; infinite where the size is no number."""
        return math.inf if not math.isfinite(self.size) else self.size / max(self.allowed, 1e-12)

    def __str__(self) -> str:
        return f"{self.what}: {self.size:.1e} of {self.allowed:.0e}"


def verdict(found: list[Difference]) -> tuple[str, str]:
    """Equal or not, and what is furthest off."""
    worst = max(found, key=lambda difference: difference.share)
    wrong = [difference.what for difference in found if difference.share > 1]
    return f"differs: {', '.join(wrong)}" if wrong else "equal", str(worst)


def losses(
    what: str, one: Figures, other: Figures, step: int, mine: str, theirs: str, allowed: float
) -> Difference:
    """The relative difference of what two logs have at a step."""
    if len(one.logs) != len(other.logs) or mine not in one.logs[step]:
        return Difference(what, math.inf, allowed)
    return Difference(what, abs(one.logs[step][mine] / other.logs[step][theirs] - 1), allowed)


def on_cpu(ours: Figures, reference: Figures, tolerance: Tolerance) -> Iterator[Difference]:
    """What was logged, and the gradients of the first step."""
    for step, allowed in ((0, tolerance.loss), (-1, tolerance.last)):
        for key in reference.logs[step]:
            if key == "loss" or (key.startswith("caft/") and "loss" in key):
                yield losses(
                    f"{key} of the {'last' if step else 'first'} step",
                    ours,
                    reference,
                    step,
                    key,
                    key,
                    allowed,
                )
    for step in range(len(reference.logs)):
        # which tokens are masked depends on nothing here
        for key in ("meap/examples_masked", "meap/masked_fraction"):
            if key in reference.logs[step]:
                yield losses(f"{key} of step {step + 1}", ours, reference, step, key, key, 1e-6)
    mine = ours.gradients
    for part, gradient in reference.gradients.items():
        same = part in mine and mine[part].shape == gradient.shape
        size = ((mine[part] - gradient).norm() / gradient.norm()).item() if same else math.inf
        yield Difference(f"gradient of {part}", size, tolerance.gradient)


def without_us(ours: Figures, plain: Figures, tolerance: Tolerance) -> Iterator[Difference]:
    for step in range(len(plain.logs)):
        what = f"next-token loss of step {step + 1} without us"
        yield losses(what, ours, plain, step, "caft/next_token_loss", "loss", tolerance.loss)


def saved_plainly(ours: Figures, plain: Figures) -> Difference:
    """How many names of tensors, shapes and modules are not those of a plain run."""
    theirs = {str(item) for item in plain.saved.items()}
    others = {str(item) for item in ours.saved.items()} ^ theirs
    return Difference(
        "saved tensors and modules left on the model", len(others) + len(ours.left_behind), 0
    )


def pairs_of_runs(run: Run, size: Size, device: str, folder: Path) -> list[tuple[Figures, Figures]]:
    """Runs without us and with heads, in turn."""
    from runs import train

    return [
        (train(run, size, device, folder, ours=False), train(run, size, device, folder))
        for _ in range(ROUNDS)
    ]


def ratios(pairs: list[tuple[Figures, Figures]]) -> tuple[str, str]:
    """Of time, by the medians of all steps after the first ones, and of memory, where it was
    measured."""
    plain, ours = (
        statistics.median(second for pair in pairs for second in pair[kind].seconds[WARM_UP:])
        for kind in (0, 1)
    )
    before, after = (max(pair[kind].memory for pair in pairs) for kind in (0, 1))
    return f"{ours / plain:.2f}", f"{after / before:.2f}" if before else ""


def save(folder: Path, name: str) -> Row:
    """Does a reference's run, and keeps it for `load`."""
    from runs import train

    size, run = REFERENCES[name]
    torch.save(vars(train(run, size, "cpu", folder)), folder / f"{name}.pt")
    return Row(name, "ran")


def load(folder: Path, name: str) -> Figures:
    return Figures(**torch.load(folder / f"{name}.pt"))


def in_one_line(error: BaseException) -> str:
    text = " ".join(f"{type(error).__name__}: {error}".split()).replace("|", "/")
    return text if len(text) <= 200 else f"{text[:200]} ..."


BF16 = {"bf16": True}
FP16 = {"fp16": True}
SHARDED = {
    "fsdp": True,
    "fsdp_config": {
        "version": 2,
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": False,
        "state_dict_type": "FULL_STATE_DICT",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    },
}
FLASH = Run(weights="bfloat16", attention="flash_attention_2", args=BF16)
MASKED = REFERENCES["masked"][1]
BITS = ("bitsandbytes",)


CHECKS: list[Check] = [
    TrainerCheck("LoRA, float32", Run(), FLOAT32),
    TrainerCheck("full fine-tuning, float32", Run(how="full"), FLOAT32, reference="full"),
    TrainerCheck("LoRA, bf16", Run(args=BF16), HALF),
    TrainerCheck("full fine-tuning, bf16", Run(how="full", args=BF16), HALF, reference="full"),
    TrainerCheck("LoRA, weights in bf16", Run(weights="bfloat16", args=BF16), HALF),
    TrainerCheck("LoRA, fp16 with a scaler", Run(args=FP16), HALF, cuda=True),
    TrainerCheck(
        "full fine-tuning, fp16 with a scaler",
        Run(how="full", args=FP16),
        HALF,
        reference="full",
        cuda=True,
    ),
    TrainerCheck(
        "QLoRA in 4 bits",
        Run(how="qlora", weights="bfloat16", args=BF16),
        FOUR_BITS,
        reference="qlora",
        packages=BITS,
    ),
    TrainerCheck(
        "dropout, heads that weigh nothing",
        Run(dropout=0.1, caft={"beta": 1e-12}),
        FLOAT32,
        reference=None,
    ),
    TrainerCheck("fused_loss", Run(caft={"beta": 0.5, "fused_loss": "on"}, args=BF16), HALF),
    TrainerCheck("MEAP", Run(meap=MASKED.meap, args=BF16), HALF, reference="masked"),
    TrainerCheck("rows packed into one", Run(packed=True), FLOAT32),
    TrainerCheck(
        "gradient checkpointing", Run(args={**BF16, "gradient_checkpointing": True}), HALF
    ),
    TrainerCheck(
        "activation offloading, torch's save_on_cpu", Run(host="save_on_cpu", args=BF16), HALF
    ),
    TrainerCheck("SFTTrainer", Run(host="SFTTrainer", args=BF16), HALF, packages=("trl",)),
    TrainerCheck(
        "activation offloading, TRL's",
        Run(host="SFTTrainer", args={**BF16, "activation_offloading": True}),
        HALF,
        packages=("trl",),
        cuda=True,
    ),
    TrainerCheck(
        "paged_adamw_8bit",
        Run(how="full", args={"optim": "paged_adamw_8bit"}),
        EIGHT_BIT_STATE,
        reference="full",
        packages=BITS,
        cuda=True,
    ),
    TrainerCheck(
        "paged_adamw_32bit",
        Run(args={"optim": "paged_adamw_32bit"}),
        FLOAT32,
        packages=BITS,
        cuda=True,
    ),
    TrainerCheck("flash attention", FLASH, HALF, packages=("flash_attn",), cuda=True),
    TrainerCheck(
        "flash attention, rows packed into one",
        dataclasses.replace(FLASH, packed=True),
        HALF,
        packages=("flash_attn",),
        cuda=True,
    ),
    TrainerCheck(
        "Liger",
        Run(args={**BF16, "use_liger_kernel": True}),
        HALF,
        packages=("liger_kernel",),
        cuda=True,
        alone=True,
    ),
    TrainerCheck(
        "CCE",
        Run(weights="bfloat16", cce=True, args=BF16),
        HALF,
        packages=("cut_cross_entropy",),
        cuda=True,
        alone=True,
    ),
    TrainerCheck("torch_compile", Run(args={**BF16, "torch_compile": True}), HALF, alone=True),
    DrafterCheck("Drafter, float32"),
    TrainerCheck("FSDP2, LoRA", Run(args=SHARDED), FLOAT32, processes=2),
    TrainerCheck(
        "FSDP2, full fine-tuning",
        Run(how="full", args=SHARDED),
        FLOAT32,
        reference="full",
        processes=2,
    ),
]
