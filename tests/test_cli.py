"""`caft`: its start, its errors, `caft inspect`. `caft import-heads` is in test_import_heads.py."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from caft_plugin import CAFTConfig, ConfigError
from caft_plugin.heads import build_heads
from caft_plugin.heads_folder import FOLDER, METRICS, RECORD, WEIGHTS, resolve_wiring, save_heads
from caft_plugin.tools.cli import CAFTCommands, commands
from caft_plugin.trunk import find_trunk

HELP = """
import sys
from caft_plugin.tools.cli import commands
for arguments in (["--help"], ["inspect", "--help"], ["import-heads", "--help"]):
    try:
        commands(arguments)
    except SystemExit as stop:
        assert stop.code == 0
slow = {"torch", "transformers", "peft", "safetensors", "huggingface_hub"} & sys.modules.keys()
assert not slow, slow
"""


def run(*arguments):
    return CliRunner().invoke(commands, list(map(str, arguments)))


def save(model, folder, *, resumable=False, **settings):
    config = resolve_wiring(CAFTConfig(**settings), None)
    trunk = find_trunk(model)
    save_heads(folder, build_heads(model, trunk, config, seed=0), trunk, config, resumable=resumable)
    return folder / FOLDER


@pytest.fixture
def folder(tiny_model, tmp_path):
    return save(tiny_model, tmp_path, num_heads=2)


def metrics(**changes):
    heads = [{"loss": 3.14159, "accuracy": 0.4321}, {"loss": 4.5, "accuracy": 0.25}]
    return json.dumps({"heads": heads, "targets": "model", "steps": 1200, **changes})


def test_help_is_fast():
    result = subprocess.run([sys.executable, "-c", HELP], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "import-heads" in result.stdout and "--head-input [penultimate|final]" in result.stdout


def test_inspect(tiny_model, folder, tmp_path):
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in tiny_model.model.layers[-1].parameters())
    one, both = f"{parameters:,}    F32  {parameters * 4 / 1e6:.2f} MB", f"{parameters * 2:,}"
    assert result.output == (
        f"Folder       {folder}\n"
        "Base model   llama\n"
        "Layer class  LlamaDecoderLayer (llama)\n"
        "Wiring       head_input penultimate, head_norm true\n"
        "Hidden size  32\n"
        "Vocabulary   97\n"
        "Heads        2\n"
        "\n"
        "head  predicts  parameters  dtype     size  held-out loss  held-out accuracy\n"
        f"   1   2 ahead       {one}              -                  -\n"
        f"   2   3 ahead       {one}              -                  -\n"
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
    assert "Started from ./run\n" in output and "As drafters  2.35 tokens a pass of the model, held out\n" in output

    (folder / METRICS).write_text(metrics(heads=[], rows=50, untrained=[]))  # nothing was held out
    output = run("inspect", folder).output
    assert "50 rows" in output and re.search(r"1   2 ahead .* - +-\n", output)


def test_inspect_a_checkpoint(tiny_model, tmp_path):
    folder = save(tiny_model, tmp_path, resumable=True, train_heads="lora")
    assert "LoRA         not merged, in lora.safetensors" in run("inspect", folder).output


def test_inspect_reads_headers_only(folder):
    """Two heads of 40 GB, all holes: only the header is on the disk."""
    size = 40 * 10**9
    head = {"dtype": "BF16", "shape": [size // 2]}
    header = json.dumps({f"{k}.w": {**head, "data_offsets": [k * size, (k + 1) * size]} for k in (0, 1)}).encode()
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
            save_file({name: tensor for name, tensor in tensors.items() if name.startswith("0.")}, weights)
        case "no record":
            (folder / RECORD).unlink()
        case "half-written figures":
            (folder / METRICS).write_text(metrics()[:40])
        case "figures of another kind":
            (folder / METRICS).write_text('{"eval_loss": 3.0}')
        case "figures of other heads":
            (folder / METRICS).write_text(metrics(heads=[{"loss": 1.0, "accuracy": 0.5}]))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "heads.safetensors cannot be read as safetensors"),
        ("cut header", "heads.safetensors cannot be read as safetensors"),
        ("no weights", "has no readable heads.safetensors"),
        ("fewer heads", "heads.safetensors holds heads 0, but config.json beside it says there are 2"),
        ("no record", "has no readable config.json"),
        ("half-written figures", "metrics.json cannot be read"),
        ("figures of another kind", "metrics.json cannot be read"),
        ("figures of other heads", "metrics.json holds figures of 1 heads, but the folder holds 2"),
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
    last = result.stderr.splitlines()[-1]  # before it, what other libraries say as they are imported
    assert last.startswith("Error: FOLDER: got './nowhere', which is not a folder")
    assert "Traceback" not in result.stderr


def test_errors_under_another_group():
    """`axolotl caft ...`: the group is a command of another one. Later commands need to do nothing of their own."""

    @click.group(cls=CAFTCommands)
    def ours():
        pass

    @ours.command()
    def fail():
        raise ConfigError("caft.beta: got -1")

    host = click.Group("axolotl", commands={"caft": ours})
    result = CliRunner().invoke(host, ["caft", "fail"])
    assert (result.exit_code, result.output) == (1, "Error: caft.beta: got -1\n")
