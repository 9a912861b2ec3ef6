"""`caft`: its start, its errors, `caft inspect`. `caft import-heads` is in test_import_heads.py."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from caft_plugin import CAFTConfig, ConfigError, with_caft
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.caft.heads_record import FOLDER, LOSSES, METRICS, RECORD, WEIGHTS
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.cli import CAFTCommands, commands

QUICK = """
import json, sys
from caft_plugin.tools.cli import commands
for arguments in json.loads(sys.argv[1]):
    try:
        commands(arguments)
    except SystemExit as stop:
        assert stop.code == 0, arguments
slow = {"torch", "transformers", "peft", "accelerate", "huggingface_hub", "matplotlib"}
slow &= sys.modules.keys()
assert not slow, slow
"""


def quickly(*commands_given):
    """The output of commands that answer at once: nothing that takes seconds is imported for
    them."""
    arguments = json.dumps([list(map(str, arguments)) for arguments in commands_given])
    result = subprocess.run(
        [sys.executable, "-c", QUICK, arguments], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def run(*arguments):
    return CliRunner().invoke(commands, list(map(str, arguments)))


def save(model, folder, *, resumable=False, **settings):
    config = resolve_wiring(CAFTConfig(**settings), None)
    trunk = find_trunk(model)
    save_heads(
        folder, build_heads(model, trunk, config, seed=0), trunk, config, resumable=resumable
    )
    return folder / FOLDER


@pytest.fixture
def folder(tiny_model, tmp_path):
    return save(tiny_model, tmp_path, num_heads=2)


def metrics(**changes):
    heads = [{"loss": 3.14159, "accuracy": 0.4321}, {"loss": 4.5, "accuracy": 0.25}]
    return json.dumps({"heads": heads, "targets": "model", "steps": 1200, **changes})


def test_help_is_fast():
    output = quickly(["--help"], *([name, "--help"] for name in commands.commands))
    assert "import-heads" in output and "--head-input [penultimate|final]" in output


def test_inspect_is_fast(folder):
    (folder / METRICS).write_text(metrics())
    (folder / LOSSES).write_text(json.dumps({"training": {"step": 7, "losses": {"1": 2.5}}}))
    assert "held-out loss" in quickly(["inspect", folder]) and "training loss" in quickly(
        ["inspect", folder.parent]
    )


def test_inspect(tiny_model, folder, tmp_path):
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in tiny_model.model.layers[-1].parameters())
    one, both = f"{parameters:,}    F32  {parameters * 4 / 1e6:.2f} MB", f"{parameters * 2:,}"
    assert (
        result.output == f"Folder       {folder}\n"
        "Base model   llama\n"
        "Layer class  LlamaDecoderLayer (llama)\n"
        "Wiring       head_input penultimate, head_norm true\n"
        "Hidden size  32\n"
        "Vocabulary   97\n"
        "Heads        2\n"
        "\n"
        "head  predicts  parameters  dtype     size\n"
        f"   1   2 ahead       {one}\n"
        f"   2   3 ahead       {one}\n"
        f" all                {both}    F32  {parameters * 8 / 1e6:.2f} MB\n"
    )
    assert run("inspect", tmp_path).output == result.output  # the folder of a run


def test_inspect_with_held_out_figures(folder):
    (folder / METRICS).write_text(metrics())
    output = run("inspect", folder).output
    assert "Trained on   targets model, 1,200 steps\n" in output
    assert re.search(r"1   2 ahead .* 3\.142 +43\.2%\n", output) and re.search(
        r"2   3 ahead .* 4\.500 +25\.0%\n", output
    )

    (folder / METRICS).write_text(metrics(started_from="./run", before=[], tokens_per_pass=2.345))
    output = run("inspect", folder).output
    assert (
        "Started from ./run\n" in output
        and "As drafters  2.35 tokens per step (held out)\n" in output
    )

    (folder / METRICS).write_text(metrics(heads=[], rows=50, untrained=[]))  # nothing was held out
    output = run("inspect", folder).output
    assert "50 rows" in output and "loss" not in output


def test_inspect_after_a_fine_tuning(tiny_model, tmp_path):
    """The figures of the run itself, wherever its heads are moved: in training and on each
    evaluation set."""
    rows = [{"input_ids": [*range(k, k + 12)], "labels": [*range(k, k + 12)]} for k in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        use_cpu=True,
        report_to=[],
        max_steps=4,
        logging_steps=2,
        eval_strategy="steps",
        eval_steps=3,
    )
    sets = {"ours": rows[:4], "theirs": rows[4:]}
    trainer = with_caft(Trainer)(
        model=tiny_model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=sets,
        caft={"num_heads": 2},
    )
    trainer.train()
    trainer.save_model()
    shutil.move(tmp_path / "run" / FOLDER, tmp_path / "moved")
    output = run("inspect", tmp_path / "moved").output
    assert "Logged at    step 4 (training), step 4 (eval_ours), step 4 (eval_theirs)\n" in output
    history = trainer.state.log_history
    last = {key: value for line in history for key, value in line.items()}
    assert (
        f"As drafters  {last['eval_ours_caft/tokens_per_pass']:.2f} tokens per step (eval_ours), "
        in output
    )
    assert re.search(r"training loss +eval_ours loss +eval_theirs loss\n", output)
    for k in (1, 2):
        found = [
            last[f"{prefix}caft/loss_head_{k}"] for prefix in ("", "eval_ours_", "eval_theirs_")
        ]
        assert re.search(
            rf" {k} +{k + 1} ahead .*" + " +".join(f"{loss:.3f}" for loss in found) + "\n", output
        )


def test_figures_are_those_of_the_heads_that_are_saved(tiny_model, tmp_path):
    """Of a checkpoint that is loaded again, its own; of heads that were replaced, none."""
    rows = [{"input_ids": [*range(k, k + 12)], "labels": [*range(k, k + 12)]} for k in range(8)]
    arguments = TrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to=[],
        max_steps=3,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        greater_is_better=True,  # the loss falls, so the first evaluation stays the best
        learning_rate=0.01,
    )
    trainer = with_caft(Trainer)(
        model=tiny_model,
        args=arguments,
        train_dataset=rows,
        eval_dataset=rows,
        caft={"num_heads": 2},
    )
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / METRICS).write_text(metrics())  # of heads that were here before
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    trainer.save_model()
    output = run("inspect", tmp_path).output
    assert "Logged at    step 1 (training), step 1 (eval)\n" in output and "held-out" not in output
    first = trainer.state.log_history[0]
    assert f"{first['caft/loss_head_1']:.3f}" in output


def test_inspect_a_checkpoint(tiny_model, tmp_path):
    folder = save(tiny_model, tmp_path, resumable=True, train_heads="lora")
    assert "LoRA         not merged, in lora.safetensors" in run("inspect", folder).output


def test_inspect_reads_headers_only(folder):
    """Two heads of 40 GB, all holes: only the header is on the disk."""
    size = 40 * 10**9
    head = {"dtype": "BF16", "shape": [size // 2]}
    header = json.dumps(
        {f"{k}.w": {**head, "data_offsets": [k * size, (k + 1) * size]} for k in (0, 1)}
    ).encode()
    with open(folder / WEIGHTS, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * size)
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "20,000,000,000   BF16  40,000.00 MB" in result.output


def damage(folder, how):
    weights = folder / WEIGHTS
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "cut header":
            weights.write_bytes(weights.read_bytes()[:6])
        case "no weights":
            weights.unlink()
        case "fewer heads":
            tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
            save_file(
                {name: tensor for name, tensor in tensors.items() if name.startswith("0.")}, weights
            )
        case "no record":
            (folder / RECORD).unlink()
        case "half-written figures":
            (folder / METRICS).write_text(metrics()[:40])
        case "figures of another kind":
            (folder / METRICS).write_text('{"eval_loss": 3.0}')
        case "figures of other heads":
            (folder / METRICS).write_text(metrics(heads=[{"loss": 1.0, "accuracy": 0.5}]))
        case "damaged losses":
            (folder / LOSSES).write_text('{"training": {"step": 3}}')


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "heads.safetensors cannot be read as safetensors"),
        ("cut header", "heads.safetensors cannot be read as safetensors"),
        ("no weights", "has no readable heads.safetensors"),
        (
            "fewer heads",
            "heads.safetensors holds heads 0, but config.json next to it says there are 2",
        ),
        ("no record", "has no readable config.json"),
        ("half-written figures", "metrics.json cannot be read"),
        ("figures of another kind", "metrics.json cannot be read"),
        ("figures of other heads", "metrics.json holds figures of 1 heads, but the folder holds 2"),
        ("damaged losses", "losses.json cannot be read (Field required). Remove it"),
    ],
)
def test_errors_are_one_line(folder, how, message):
    damage(folder, how)
    result = run("inspect", folder)
    assert result.exit_code == 1
    assert result.output.startswith("Error: ") and result.output.count("\n") == 1
    assert message in result.output


def test_errors_as_the_shell_sees_them():
    command = [sys.executable, "-m", "caft_plugin.tools.cli", "inspect", "./nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 1 and result.stdout == ""
    # before it, what other libraries say as they are imported
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: FOLDER: got './nowhere', which is not a folder")
    assert "Traceback" not in result.stderr


def test_errors_under_another_group():
    """`axolotl caft ...`: the group is a command of another one. Later commands need to do nothing
    of their own."""

    @click.group(cls=CAFTCommands)
    def ours():
        pass

    @ours.command()
    def fail():
        raise ConfigError("caft.beta: got -1")

    host = click.Group("axolotl", commands={"caft": ours})
    result = CliRunner().invoke(host, ["caft", "fail"])
    assert (result.exit_code, result.output) == (1, "Error: caft.beta: got -1\n")
