"""Options of Axolotl beside ours: with `beta: 0` a run is the one without the plugin digit for
digit, and beside heads an option does what it does without them.

All runs but one are forks of one process (builders/forks.py), so that those of one YAML start from
the same adapter.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from builders.axolotl import BASE, FULL, Project

pytestmark = pytest.mark.slow

SHORT = {"max_steps": 4, "save_steps": 2}
# 10 of the 40 rows; Axolotl evaluates before the first step too
EVALUATED = {"val_set_size": 0.25, "eval_steps": 2}
ARMS = {
    "plain": {},
    "zero": {"plugins": ["caft_plugin"], "caft": {"beta": 0}},
    "ours": {"plugins": ["caft_plugin"], "caft": {"beta": 0.3, "num_heads": 2}},
}
HEADS = (1, 2)


@pytest.fixture(scope="module", autouse=True)
def letters(project):
    """Rows of which a model that learns to count knows less and less."""
    words = (
        "ant bee cat dog eel fox gnu hen ibis jay koi lynx mole newt owl pig quail ram seal toad"
    ).split()
    with open(project.folder / "letters.jsonl", "w") as file:
        for i in range(4):
            answer = " ".join(words[i:] + words[:i])
            messages = [
                {"role": "user", "content": "Name animals."},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")


def run(project: Project, option: str, arm: str) -> str:
    """The name of a finished run."""
    name = f"{option}_{arm}"
    settings = OPTIONS[option].settings if option in OPTIONS else {}
    project.train(name, **{**SHORT, **settings, **ARMS[arm]})
    return name


def evaluations(project: Project, name: str) -> list[dict]:
    return [entry for entry in project.history(name) if "eval_loss" in entry]


def adapter_config(project: Project, name: str) -> dict:
    return json.loads((project.folder / name / "adapter_config.json").read_text())


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What lies in a run's folder and its checkpoints, by file; heads left out."""
    files = [file for file in folder.rglob("*.safetensors") if file.parent.name != "caft_heads"]
    return {str(file.relative_to(folder)): load_file(file) for file in files}


def shapes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


# -- that an option was on -------------------------------------------------------------------------


def is_packed(project: Project, name: str) -> None:
    """Four sequences hold more than half of the 30 rows. Axolotl's evaluation loss is a mean of
    means of batches, so it tells whether evaluation rows were packed; before the first step there
    is nothing else that it could tell."""
    assert project.logs(name)[0]["epoch"] > 0.5
    unpacked = run(project, "val_set_size", name.rpartition("_")[2])
    assert (
        evaluations(project, name)[0]["eval_loss"] != evaluations(project, unpacked)[0]["eval_loss"]
    )


def is_evaluated(project: Project, name: str) -> None:
    assert [entry["step"] for entry in evaluations(project, name)] == [0, 2, 4]
    assert project.logs(name)[0]["epoch"] == pytest.approx(4 / 30)  # of 40 rows, 30 are trained on


def stopped_early(project: Project, name: str) -> None:
    """At the first evaluation after a step that was not better than the one before."""
    losses = {entry["step"]: entry["eval_loss"] for entry in evaluations(project, name)}
    last = max(losses)
    assert 2 <= last < OPTIONS["early_stopping_patience"].settings["max_steps"]
    assert losses[last] > min(losses.values())
    assert [entry["step"] for entry in project.logs(name)] == list(range(1, last + 1))


def has_the_best(project: Project, name: str) -> None:
    """The model that is left is the best checkpoint's, which is not the last one's; so are the
    heads."""
    out = project.folder / name
    losses = {
        entry["step"]: entry["eval_loss"] for entry in evaluations(project, name) if entry["step"]
    }
    best = min(losses, key=losses.__getitem__)
    assert best < max(losses)
    assert same(adapter(out), adapter(out / f"checkpoint-{best}"))
    assert not same(adapter(out), adapter(out / f"checkpoint-{max(losses)}"))
    if name.endswith("ours"):
        left = load_file(out / "caft_heads" / "heads.safetensors")
        assert same(left, merged_heads(out / f"checkpoint-{best}"))
        assert not same(left, merged_heads(out / f"checkpoint-{max(losses)}"))


def merged_heads(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The heads of a checkpoint, which keeps LoRA factors apart, as a run leaves them."""
    heads, lora = (
        load_file(checkpoint / "caft_heads" / f"{file}.safetensors") for file in ("heads", "lora")
    )
    scaling = BASE["lora_alpha"] / BASE["lora_r"]
    for key in [key for key in lora if "lora_A" in key]:
        heads[key.replace(".lora_A", "")] += scaling * (
            lora[key.replace("lora_A", "lora_B")] @ lora[key]
        )
    return heads


def is_noisy(project: Project, name: str) -> None:
    assert (
        project.logs(name)[0]["loss"]
        != project.logs(run(project, "none", name.rpartition("_")[2]))[0]["loss"]
    )


def is_dora(project: Project, name: str) -> None:
    assert adapter_config(project, name)["use_dora"]
    assert sum("lora_magnitude_vector" in key for key in adapter(project.folder / name)) == 3 * 7


def is_rslora(project: Project, name: str) -> None:
    assert adapter_config(project, name)["use_rslora"]


def has_two_rates(project: Project, name: str) -> None:
    """Every matrix B learns 16 times as fast, those of the heads too; 3 layers and 2 heads have 7
    each."""
    state = torch.load(project.folder / name / "checkpoint-4" / "optimizer.pt", weights_only=True)
    numbers = {
        group["lr"]: len(group["params"]) for group in state["param_groups"] if group["params"]
    }
    heads = 2 * 7 if name.endswith("ours") else 0
    assert numbers == {0.001: 3 * 7 + heads, 0.016: 3 * 7 + heads}


def saves_modules(project: Project, name: str) -> None:
    before = load_file(project.folder / "tiny" / "model.safetensors")
    tensors = adapter(project.folder / name)
    for module in ("model.embed_tokens", "lm_head"):
        assert not torch.equal(
            tensors[f"base_model.model.{module}.weight"], before[f"{module}.weight"]
        )


def saves_the_model_alone(project: Project, name: str) -> None:
    files = {file.name for file in (project.folder / name / "checkpoint-4").iterdir()}
    assert {"adapter_model.safetensors", "trainer_state.json"} <= files
    assert not files & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
    assert ("caft_heads" in files) == name.endswith("ours")


@dataclasses.dataclass
class Option:
    """Keys of a YAML, and what raises AssertionError where a run was made as if they were not
    there."""

    settings: dict
    check: Callable[[Project, str], None]


OTHER_ROWS = {  # their loss rises while numbers are learnt
    "test_datasets": [
        {"path": "./letters.jsonl", "ds_type": "json", "type": "chat_template", "split": "train"}
    ],
    "eval_steps": 2,
    "learning_rate": 0.05,
    "max_steps": 10,
}
OPTIONS = {
    "packing": Option(
        {**EVALUATED, "sample_packing": True, "eval_sample_packing": True, "num_epochs": 10},
        is_packed,
    ),
    "val_set_size": Option(EVALUATED, is_evaluated),
    "early_stopping_patience": Option({**OTHER_ROWS, "early_stopping_patience": 1}, stopped_early),
    "load_best_model_at_end": Option({**OTHER_ROWS, "load_best_model_at_end": True}, has_the_best),
    "neftune_noise_alpha": Option({"neftune_noise_alpha": 5}, is_noisy),
    "peft_use_dora": Option({"peft_use_dora": True}, is_dora),
    "peft_use_rslora": Option({"peft_use_rslora": True}, is_rslora),
    "loraplus_lr_ratio": Option({"loraplus_lr_ratio": 16}, has_two_rates),
    "lora_modules_to_save": Option(
        {"lora_modules_to_save": ["embed_tokens", "lm_head"]}, saves_modules
    ),
    "save_only_model": Option({"save_only_model": True}, saves_the_model_alone),
}


# -- each option beside ours -----------------------------------------------------------------------


@pytest.mark.parametrize("option", OPTIONS)
def test_beta_zero_is_a_run_without_the_plugin(project, option):
    """All that is logged and saved, digit for digit."""
    plain, zero = (run(project, option, arm) for arm in ("plain", "zero"))
    OPTIONS[option].check(project, plain)
    OPTIONS[option].check(project, zero)
    assert "Plugin loaded successfully: caft_plugin" in (project.folder / f"{zero}.log").read_text()
    figures = [
        [
            {k: v for k, v in e.items() if "runtime" not in k and "per_sec" not in k}
            for e in project.history(name)
        ]
        for name in (plain, zero)
    ]
    assert {"loss", "grad_norm", "learning_rate"} <= {key for entry in figures[0] for key in entry}
    assert figures[0] == figures[1]
    files, theirs = (saved(project.folder / name) for name in (plain, zero))
    assert "adapter_model.safetensors" in files and files.keys() == theirs.keys()
    for file, tensors in files.items():
        assert same(tensors, theirs[file]), file


@pytest.mark.parametrize("option", OPTIONS)
def test_heads_train_beside_it(project, option):
    """The first step's next-token loss and the evaluation before it are those of the run without
    heads: heads change neither the adapter's start nor what noise, dropout and the order of rows
    are drawn from. 1e-5, because `caft/next_token_loss` is a sum of micro-batches in float64 and
    `loss` one in float32."""
    plain, ours = (run(project, option, arm) for arm in ("plain", "ours"))
    OPTIONS[option].check(project, ours)
    log = project.logs(ours)
    assert log[0]["caft/next_token_loss"] == pytest.approx(project.logs(plain)[0]["loss"], rel=1e-5)
    for entry in log:
        assert all(math.isfinite(entry[f"caft/loss_head_{k}"]) for k in HEADS)
        assert entry["loss"] == pytest.approx(
            entry["caft/next_token_loss"] + entry["caft/aux_loss"], rel=1e-6
        )
    files, theirs = (saved(project.folder / name) for name in (plain, ours))
    both = files.keys() & theirs.keys()  # of the checkpoints, runs that stop early have others
    assert len(both) >= 2
    for file in both:
        assert shapes(files[file]) == shapes(theirs[file]), file

    evaluated = evaluations(project, ours)
    assert bool(evaluated) == ("eval_steps" in OPTIONS[option].settings)
    for entry in evaluated:
        assert all(math.isfinite(entry[f"eval_caft/loss_head_{k}"]) for k in HEADS)
    if evaluated:
        assert evaluated[0]["eval_loss"] == evaluations(project, plain)[0]["eval_loss"]


def test_heads_losses_of_packed_evaluation_rows_are_those_of_padded_ones(project):
    """They are means over targets, so they do not depend on how rows are put into batches. 1e-5:
    float32."""
    packed, padded = (
        evaluations(project, run(project, option, "ours"))[0]
        for option in ("packing", "val_set_size")
    )
    for k in HEADS:
        assert packed[f"eval_caft/loss_head_{k}"] == pytest.approx(
            padded[f"eval_caft/loss_head_{k}"], rel=1e-5
        )


def by_command(project: Project, **settings) -> Path:
    project.config("by_command", **settings)
    project.launch("train", "by_command.yml", "--launcher", "python", AXOLOTL_DATASET_NUM_PROC="0")
    return project.folder / "by_command"


def test_a_fork_is_the_command(project):
    """The same YAML by `axolotl train` in a process of its own: all tests of this file rest on
    this. It starts from a saved adapter, since Axolotl makes LoRA matrices before it seeds the
    generator."""
    settings = {
        **SHORT,
        **EVALUATED,
        **ARMS["ours"],
        "lora_model_dir": f"./{run(project, 'none', 'plain')}",
    }
    fork, command = project.train("in_fork", **settings), by_command(project, **settings)
    keys = (
        "loss",
        "grad_norm",
        "eval_loss",
        *(f"{kind}/loss_head_{k}" for kind in ("caft", "eval_caft") for k in HEADS),
    )
    one, other = (
        [[e.get(key) for key in keys] for e in project.history(name)]
        for name in (fork.name, command.name)
    )
    assert len(one) > 4 and one == other
    files, theirs = saved(fork), saved(command)
    assert files.keys() == theirs.keys()
    assert all(same(files[file], theirs[file]) for file in files)
    heads = "caft_heads/heads.safetensors"
    assert same(load_file(fork / heads), load_file(command / heads))


# -- other plugins' kernels beside ours ------------------------------------------------------------

LIGER = "axolotl.integrations.liger.LigerPlugin"
KERNELS = (
    "liger_rope",
    "liger_rms_norm",
    "liger_glu_activation",
    "liger_fused_linear_cross_entropy",
)
ONE_ROW = {  # the interpreter takes 10 s for it
    "max_steps": 1,
    "save_steps": 1,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}


@pytest.mark.parametrize(
    "name, plugins, changes, fused_loss",
    [
        ("before", [LIGER, "caft_plugin"], FULL, False),
        ("after", ["caft_plugin", LIGER], FULL, False),
        ("fused", [LIGER, "caft_plugin"], {}, True),
    ],
    ids=["before", "after", "fused"],
)
def test_liger_before_and_after_ours(project, name, plugins, changes, fused_loss):
    """All of Liger's kernels that take part in training a Llama, run by Triton's interpreter:
    losses and the gradient norm are those of the run without Liger, to float32's 1e-5.

    Its norm, rotary embedding and MLP are the heads' too, and write gradients over what they were
    given; its forward has a loss and no logits. With `fused_loss` the next-token loss is ours.
    """
    caft = {"beta": 0.3, "num_heads": 2, "fused_loss": fused_loss}
    settings = {**ONE_ROW, **changes, "caft": caft}
    project.train(f"no_liger_{name}", **settings, plugins=["caft_plugin"])
    kernels = dict.fromkeys(KERNELS, True)
    project.train(f"liger_{name}", interpret_triton=True, **settings, **kernels, plugins=plugins)
    printed = (project.folder / f"liger_{name}.log").read_text()
    for patched in ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"):
        assert (
            f"'{patched}': True"
            in printed.partition("Applying LIGER to llama with kwargs: ")[2].splitlines()[0]
        )
    (ours,), (plain,) = (project.logs(run) for run in (f"liger_{name}", f"no_liger_{name}"))
    for key in (
        "loss",
        "grad_norm",
        "caft/next_token_loss",
        "caft/aux_loss",
        *(f"caft/loss_head_{k}" for k in HEADS),
    ):
        assert ours[key] == pytest.approx(plain[key], rel=1e-5), key


CUT = "axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"


@pytest.mark.skipif(
    find_spec("cut_cross_entropy") is None,
    reason=(
        "Axolotl's fork of cut_cross_entropy is on no package index; Axolotl's own error names what"
        " installs it"
    ),
)
@pytest.mark.parametrize(
    "name, plugins",
    [("before", [CUT, "caft_plugin"]), ("after", ["caft_plugin", CUT])],
    ids=["before", "after"],
)
def test_cut_cross_entropy_before_and_after_ours(project, name, plugins):
    """Losses and the gradient norm are those of the run without it. 1e-4, because it takes bf16
    alone. On a CPU it computes with `torch.compile`; its kernels need a GPU."""
    settings = {**ONE_ROW, "bf16": True, "caft": {"beta": 0.3, "num_heads": 2}}
    project.train("not_cut", **settings, plugins=["caft_plugin"])
    project.train(f"cut_{name}", **settings, plugins=plugins, cut_cross_entropy=True)
    assert (
        "Applying Cut Cross Entropy to model type: llama"
        in (project.folder / f"cut_{name}.log").read_text()
    )
    (ours,), (plain,) = (project.logs(run) for run in (f"cut_{name}", "not_cut"))
    for key in (
        "loss",
        "grad_norm",
        "caft/next_token_loss",
        "caft/aux_loss",
        *(f"caft/loss_head_{k}" for k in HEADS),
    ):
        assert ours[key] == pytest.approx(plain[key], rel=1e-4), key
