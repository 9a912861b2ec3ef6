"""The real `axolotl` commands, as processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from builders.axolotl import FULL
from builders.paths import ROOT
from caft_plugin.drafting.pace import Pace
from caft_plugin.precision import quick_dtype
from caft_plugin.tools.cli import commands

DEMO = ROOT / "axolotl_configs" / "demo"
sys.path.insert(0, str(DEMO))
import report as demo_report
from run_axolotl import LEFT_OUT

pytestmark = pytest.mark.slow

PLUGIN = {"plugins": ["caft_plugin"]}
LORA_RUN = {**PLUGIN, "caft": {"num_heads": 4, "beta": 0.01}}


def shapes(file):
    return {key: tuple(tensor.shape) for key, tensor in load_file(file).items()}


def numbers(logs, *keys):
    return [[entry[key] for key in keys] for entry in logs]


# -- training, and what comes out ------------------------------------------------------------------


def test_lora_logs_and_leaves_a_plain_adapter(project):
    plain = project.train("plain")
    ours = project.train("ours", **LORA_RUN)
    assert shapes(ours / "adapter_model.safetensors") == shapes(plain / "adapter_model.safetensors")
    assert shapes(ours / "checkpoint-3" / "adapter_model.safetensors") == shapes(
        plain / "checkpoint-3" / "adapter_model.safetensors"
    )
    adapter = [json.loads((p / "adapter_config.json").read_text()) for p in (plain, ours)]
    for config in adapter:
        config["target_modules"].sort()
    assert adapter[0] == adapter[1]

    log = project.logs("ours")
    assert len(log) == 5
    for entry in log:
        assert {f"caft/loss_head_{k}" for k in range(1, 5)} <= entry.keys()
        total = entry["caft/next_token_loss"] + entry["caft/aux_loss"]
        assert entry["loss"] == pytest.approx(total, rel=1e-6)
    assert log[0]["caft/gamma"] == 1.0
    assert log[0]["caft/next_token_loss"] == pytest.approx(
        project.logs("plain")[0]["loss"], rel=1e-6
    )


def test_heads_lie_beside_the_model(project):
    ours = project.train("ours", **LORA_RUN)
    record = json.loads((ours / "caft_heads" / "config.json").read_text())
    assert record["num_heads"] == 4 and record["base_model"] == "./tiny"
    assert sorted(p.name for p in (ours / "caft_heads").iterdir()) == [
        "config.json",
        "fingerprint.safetensors",
        "heads.safetensors",
        "losses.json",
    ]
    assert sorted(p.name for p in (ours / "checkpoint-3" / "caft_heads").iterdir()) == [
        "config.json",
        "fingerprint.safetensors",
        "heads.safetensors",
        "lora.safetensors",
        "losses.json",
    ]
    final = load_file(ours / "caft_heads" / "heads.safetensors")
    start = load_file(ours / "checkpoint-3" / "caft_heads" / "heads.safetensors")
    assert final.keys() == start.keys()
    # LoRA merged
    assert not torch.equal(final["0.mlp.up_proj.weight"], start["0.mlp.up_proj.weight"])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_beta_zero_is_a_run_without_the_plugin(project, kind):
    """Losses and gradient norms, digit for digit; by the plugin's dotted name.

    Axolotl does not seed the generator before it makes LoRA matrices, so the LoRA runs start from a
    saved adapter.
    """
    settings = FULL
    if kind == "lora":
        project.train("ours", **LORA_RUN)
        settings = {"lora_model_dir": "./ours"}
    project.train(f"plain_{kind}", **settings)
    project.train(f"zero_{kind}", **settings, plugins=["caft_plugin.CAFTPlugin"], caft={"beta": 0})
    keys = ("loss", "grad_norm")
    assert len(project.logs(f"plain_{kind}")) == 5
    assert numbers(project.logs(f"zero_{kind}"), *keys) == numbers(
        project.logs(f"plain_{kind}"), *keys
    )


def test_full_fine_tuning(project):
    plain = project.train("plain_full", **FULL)
    ours = project.train("full", **FULL, **PLUGIN, caft="bare")
    assert shapes(ours / "model.safetensors") == shapes(plain / "model.safetensors")
    assert "caft/loss_head_4" in project.logs("full")[0]  # a bare `caft:` is all defaults
    heads = load_file(ours / "caft_heads" / "heads.safetensors")
    before = load_file(project.folder / "tiny" / "model.safetensors")
    assert not torch.equal(
        heads["0.mlp.up_proj.weight"], before["model.layers.2.mlp.up_proj.weight"]
    )


def test_fused_loss(project):
    """Axolotl's own loss where the window is one batch, and the same however the window is cut,
    where Axolotl's is not.

    True is what a bare `on` is to YAML.
    """
    fused = {**FULL, **PLUGIN, "caft": {"fused_loss": True}}
    whole = {"micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 3}
    cut = {**whole, "micro_batch_size": 1, "gradient_accumulation_steps": 4}
    project.train("plain_whole", **FULL, **whole)
    project.train("fused_whole", **fused, **whole)
    project.train("fused_cut", **fused, **cut)
    project.train("plain_cut", **FULL, **cut)
    plain, plain_cut = (
        numbers(project.logs(name), "loss")[0] for name in ("plain_whole", "plain_cut")
    )
    ours, ours_cut = (project.logs(name) for name in ("fused_whole", "fused_cut"))
    assert ours[0]["caft/next_token_loss"] == pytest.approx(plain[0], rel=1e-5)
    # a random model: any token costs about the same
    assert plain_cut[0] != pytest.approx(plain[0], rel=2e-5)
    for one, other in zip(ours, ours_cut, strict=True):
        for key in (
            "loss",
            "grad_norm",
            "caft/next_token_loss",
            "caft/loss_head_1",
            "caft/aux_loss",
        ):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


COUNTING = """
import json
from pathlib import Path
from axolotl.integrations.base import BasePlugin
from torch._dynamo.utils import counters

class Counting(BasePlugin):
    def post_train(self, cfg, model):
        Path("compiled.json").write_text(json.dumps(counters["stats"]))
"""


def test_torch_compile(project):
    """The losses of the run that is not compiled, to 1e-5; and the model is compiled: where that
    fails, Axolotl has torch go on without."""
    settings = {**FULL, "caft": "bare"}
    project.train("full", **PLUGIN, **settings)
    (project.folder / "counting.py").write_text(COUNTING)
    settings |= {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    project.config("compiled", plugins=["caft_plugin", "counting.Counting"], **settings)
    path = os.pathsep.join([".", os.environ.get("PYTHONPATH", "")])
    environment = {"AXOLOTL_DATASET_NUM_PROC": "0", "PYTHONPATH": path}
    project.launch("train", "compiled.yml", "--launcher", "python", **environment)
    compiled = json.loads((project.folder / "compiled.json").read_text())
    # the first shape, and all others
    assert 1 <= compiled["unique_graphs"] <= 2 and compiled["calls_captured"] > 50
    for one, other in zip(project.logs("full"), project.logs("compiled"), strict=True):
        for key in one:
            if key == "loss" or key.startswith("caft/"):
                assert other[key] == pytest.approx(one[key], rel=1e-5), key


def test_saved_model_loads_where_the_plugin_is_not_installed(project):
    ours = project.train("ours", **LORA_RUN)
    full = project.train("full", **FULL, **PLUGIN, caft="bare")
    code = f"""
import sys
sys.modules["caft_plugin"] = None
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained({str(full)!r})
base = AutoModelForCausalLM.from_pretrained({str(project.folder / "tiny")!r})
print(PeftModel.from_pretrained(base, {str(ours)!r}).peft_config["default"].r)
"""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=project.folder
    )
    assert result.stdout.strip().endswith("8"), result.stderr[-2000:]


def test_resuming_continues_to_the_digit(project):
    project.train("ours", **LORA_RUN)
    out = project.folder / "ours"
    config = yaml.safe_load((project.folder / "ours.yml").read_text())
    config |= {"output_dir": "./resumed", "resume_from_checkpoint": "./ours/checkpoint-3"}
    (project.folder / "resumed.yml").write_text(yaml.safe_dump(config))
    project.launch("train", "resumed.yml")
    keys = ("loss", "grad_norm", *(f"caft/loss_head_{k}" for k in range(1, 5)))
    assert numbers(project.logs("resumed"), *keys) == numbers(project.logs("ours"), *keys)
    for name, tensor in load_file(out / "caft_heads" / "heads.safetensors").items():
        resumed = load_file(project.folder / "resumed" / "caft_heads" / "heads.safetensors")
        assert torch.equal(tensor, resumed[name]), name


def test_half_a_checkpoint_is_passed_over_or_refused(project):
    """Axolotl's auto-resume takes the highest number; a checkpoint that is asked for has to be
    whole."""
    ours = project.train("ours", **LORA_RUN)
    out = project.folder / "auto"
    shutil.copytree(ours, out)
    (out / "checkpoint-5" / "trainer_state.json").write_bytes(b'{"best_gl')
    config = yaml.safe_load((project.folder / "ours.yml").read_text()) | {"output_dir": "./auto"}

    def train(**changes):
        (project.folder / "auto.yml").write_text(yaml.safe_dump(config | changes))
        result = project.axolotl("train", "auto.yml", check=False)
        return result.returncode, " ".join((result.stdout + result.stderr).split())

    code, output = train(resume_from_checkpoint="./auto/checkpoint-5")
    assert code != 0
    assert (
        "resume_from_checkpoint: got ./auto/checkpoint-5, which has no readable trainer_state.json"
        in output
    )
    assert "use auto/checkpoint-3, the newest complete one there" in output
    code, output = train(auto_resume_from_checkpoints=True)
    assert code == 0, output[-3000:]
    assert (
        "auto/checkpoint-5 has no readable trainer_state.json, which is written last; it is skipped"
        in output
    )
    keys = ("loss", "grad_norm", *(f"caft/loss_head_{k}" for k in range(1, 5)))
    assert numbers(project.logs("auto"), *keys) == numbers(project.logs("ours"), *keys)
    assert [entry["step"] for entry in project.logs("auto")] == [1, 2, 3, 4, 5]


def test_pretrained_heads_start_the_next_run(project):
    full = project.train("full", **FULL, **PLUGIN, caft="bare")
    assert (full / "caft_heads").is_dir()
    project.train(
        "second", **PLUGIN, caft={"heads": "./full", "num_heads": 2, "train_heads": "frozen"}
    )
    trained = load_file(full / "caft_heads" / "heads.safetensors")
    kept = load_file(project.folder / "second" / "caft_heads" / "heads.safetensors")
    assert len(kept) == len(trained) / 2
    for name, tensor in kept.items():
        assert torch.equal(tensor, trained[name]), name
    assert "caft/loss_head_2" in project.logs("second")[0]
    assert "caft/loss_head_3" not in project.logs("second")[0]


def test_interrupt_leaves_a_plain_adapter_and_the_heads(project):
    """Ctrl-C: Axolotl saves the model from its signal handler and exits."""
    plain = project.train("plain")
    project.config("stopped", **LORA_RUN, max_steps=2000, save_steps=2000)
    scripts = Path(sys.executable).parent
    process = subprocess.Popen(
        [sys.executable, "-m", "axolotl.cli.train", "stopped.yml"],
        cwd=project.folder,
        env={
            **os.environ,
            "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    seen = ""
    deadline = time.time() + 240
    while "caft/loss_head_1" not in seen and time.time() < deadline:
        seen += process.stdout.read(200)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    assert process.returncode == 0
    stopped = project.folder / "stopped"
    assert shapes(stopped / "adapter_model.safetensors") == shapes(
        plain / "adapter_model.safetensors"
    )
    assert (stopped / "caft_heads" / "heads.safetensors").is_file()
    assert (stopped / "caft_heads" / "config.json").is_file()


# -- the other commands never build heads ----------------------------------------------------------


@pytest.mark.parametrize("method", ["memory_efficient", "legacy"])
def test_merged_model_is_plain(project, method):
    project.train("ours", **LORA_RUN)
    config = yaml.safe_load((project.folder / "ours.yml").read_text())
    # where merging happens the heads folder need not exist any more
    config |= {"merge_method": method, "caft": {"heads": "./gone", "num_heads": 4}}
    (project.folder / f"{method}.yml").write_text(yaml.safe_dump(config))
    project.axolotl("merge-lora", f"{method}.yml")
    merged = project.folder / "ours" / "merged"
    files = list(merged.glob("*.safetensors"))
    keys = {key for file in files for key in load_file(file)}
    assert keys == set(load_file(project.folder / "tiny" / "model.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(project.folder / "tiny")
    model = AutoModelForCausalLM.from_pretrained(merged)
    assert model.state_dict().keys() == base.state_dict().keys()
    assert model.generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=3).shape[1] >= 4
    assert any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    )


def passes_in(report):
    """Return the forward passes of all answers without and with heads, from a table that agrees
    with itself."""
    rows = [line.split() for line in report.split("  function ")[1].splitlines()[1:4]]
    assert [row[:-5] for row in rows] == [["1", "same"], ["2", "same"], ["all", "2", "of", "2"]]
    plain, drafted = ([int(row[at]) for row in rows] for at in (-5, -4))
    assert plain[0] + plain[1] == plain[2] and drafted[0] + drafted[1] == drafted[2]
    assert [row[-3] for row in rows] == [
        f"{one / other:.2f}" for one, other in zip(plain, drafted, strict=True)
    ]
    assert f"Same text in 2 of 2; {drafted[2]} forward passes instead of {plain[2]}, " in report
    return plain[2], drafted[2]


def test_demo_report(project, monkeypatch, capsys):
    """The last part, answers without and with heads, agrees with itself, for heads as fine-tuned
    and for heads trained further, and a run's folder without heads says so. All draft tokens are
    proposed, whatever they cost: on a model as small as this one they never pay off."""
    out, plain_out = project.train("ours", **LORA_RUN), project.train("plain")
    if not (out / "merged").exists():
        project.axolotl("merge-lora", "ours.yml")
    monkeypatch.chdir(project.folder)
    monkeypatch.setattr(Pace, "how_many", lambda pace, probabilities, most: most)
    monkeypatch.setattr(Pace, "worth_it", lambda pace: True)
    # so many that draft tokens of random heads are accepted too
    monkeypatch.setattr(demo_report, "NEW_TOKENS", 80)
    heldout = ROOT / "axolotl_configs" / "data" / "molecules-heldout.jsonl"
    report = ["--config=ours.yml", "--functions=2", f"--heldout={heldout}"]
    assert demo_report.main([*report, f"--plain={plain_out}"]) == 0
    printed = capsys.readouterr().out
    assert "caft/loss_head_4" in printed and "loss of the plain run" in printed
    assert [
        printed.count(f"\n  {name:<11}") for name in ("reference", "base", "plain", "CAFT")
    ] == [2, 2, 2, 2]
    plain, tuned = passes_in(printed)
    assert tuned < plain and "heads: as fine-tuned, ours/caft_heads\n" in printed
    assert "trains them further." in printed and "rounds differently" not in printed

    stage1 = [
        "--model=ours/merged",
        "--heads=ours",
        f"--data={heldout}",
        "--output=further",
        "--batch-size=4",
    ]
    made = CliRunner().invoke(
        commands, ["pretrain-heads", *stage1, "--max-new-tokens=80", "--steps=2", "--float32"]
    )
    assert made.exit_code == 0, made.output
    capsys.readouterr()
    assert demo_report.main([*report, "--heads=further"]) == 0
    printed = capsys.readouterr().out
    again, further = passes_in(printed)
    assert again == plain and further < plain and "heads: trained further, further\n" in printed
    before = re.search(
        r"^Heads before the further training: ([\d.]+) tokens per step, [\d.]+ x the speed\.$",
        printed,
        re.M,
    )
    assert before[1] == f"{plain / tuned:.2f}" and "trains them further." not in printed
    assert demo_report.main([*report, "--heads=nowhere"]) == 1
    assert "--heads nowhere: no such folder" in capsys.readouterr().err

    shutil.copytree(out, "headless", ignore=shutil.ignore_patterns("caft_heads"))
    assert demo_report.main([*report, "--output-dir=headless"]) == 0
    printed = capsys.readouterr().out
    assert (
        printed.count("\n  CAFT  ") == 2
        and "\n  plain  " not in printed
        and "Same text" not in printed
    )
    assert (
        "The heads draft nothing here: no heads in headless/caft_heads; a run with the caft: block"
        in printed
    )


def test_demo_report_of_a_text_that_differs():
    plain = [demo_report.Answer("CC", [1, 1, 2], 3, 0.3), demo_report.Answer("C", [1, 2], 2, 0.2)]
    drafted = [
        demo_report.Answer("CN", [1, 3, 3, 2], 2, 0.2),
        demo_report.Answer("C", [1, 2], 1, 0.1),
    ]
    table = demo_report.draft_table(demo_report.Answers(plain, [drafted]))
    _, _, first, second, both, _, closing, _, why, _ = table.splitlines()
    assert first.split() == ["1", "differs", "3", "2", "2.00", "0.30", "0.20"]
    assert second.split() == ["2", "same", "2", "1", "2.00", "0.20", "0.10"]
    assert both.split() == ["all", "1", "of", "2", "5", "3", "2.00", "0.50", "0.30"]
    assert closing == "Same text in 1 of 2; 3 forward passes instead of 5, 1.67 x the speed."
    assert why.startswith("A forward pass over several tokens rounds differently")


def test_demo_report_of_heads_that_were_trained_further():
    """The table is that of the last heads; those from which they started have a line."""
    plain, before = (
        [demo_report.Answer("CC", [1, 1, 2], 3, 0.3)],
        [demo_report.Answer("CC", [1, 1, 2], 2, 0.4)],
    )
    *_, row, _, closing, line = demo_report.draft_table(
        demo_report.Answers(plain, [before, [demo_report.Answer("CC", [1, 1, 2], 1, 0.1)]])
    ).splitlines()
    assert row.split() == ["all", "1", "of", "1", "3", "1", "3.00", "0.30", "0.10"]
    assert closing == "Same text in 1 of 1; 1 forward passes instead of 3, 3.00 x the speed."
    assert line == "Heads before the further training: 1.50 tokens per step, 0.75 x the speed."


def test_the_demo_starts_axolotl_without_warnings_that_look_like_a_broken_installation(project):
    """`axolotl` prints them, the demo's program does not; a mistake in the YAML ends it with an
    error all the same."""
    project.config("loud", **LORA_RUN, load_in_4bit=True, adapter="qlora")
    command = [
        sys.executable,
        str(DEMO / "run_axolotl.py"),
        "train",
        "loud.yml",
        "--launcher=python",
        "--max-steps=1",
    ]
    run = {"cwd": project.folder, "capture_output": True, "text": True, "timeout": 600}
    quiet = subprocess.run(command, **run)
    output = quiet.stdout + quiet.stderr
    assert quiet.returncode == 0, output[-3000:]
    assert "Training completed" in output and (project.folder / "loud" / "caft_heads").is_dir()
    assert not [
        line
        for line in output.splitlines()
        if any(p in line for parts in LEFT_OUT.values() for p in parts)
    ]
    assert (
        "default" not in output.split("Attempting to load plugin")[0].split("accelerate launch")[-1]
    )

    project.config("bad", **PLUGIN, caft={"num_heads": "four"})
    failed = subprocess.run([*command[:3], "bad.yml", *command[4:]], **run)
    assert failed.returncode != 0 and "caft.num_heads: got 'four'" in failed.stdout + failed.stderr


def test_inference_and_preprocess(project):
    project.train("ours", **LORA_RUN)
    config = yaml.safe_load((project.folder / "ours.yml").read_text())
    config |= {"caft": {"heads": "./gone"}, "dataset_prepared_path": "./prepared_anew"}
    (project.folder / "gone.yml").write_text(yaml.safe_dump(config))
    project.axolotl("preprocess", "gone.yml")
    assert any((project.folder / "prepared_anew").iterdir())
    result = project.axolotl(
        "inference", "gone.yml", "--lora-model-dir=./ours", stdin="Count to 3.\n"
    )
    assert (
        "Count to 3." in result.stdout + result.stderr or "Give me an instruction" in result.stdout
    )


# -- QLoRA with the real model and real 4-bit weights ----------------------------------------------


def test_qlora_on_the_real_model(project, smollm2):
    settings = {
        "base_model": str(smollm2),
        "datasets": [
            {
                "path": str(ROOT / "axolotl_configs/data/molecules-train.jsonl"),
                "ds_type": "json",
                "type": "chat_template",
            }
        ],
        "adapter": "qlora",
        "load_in_4bit": True,
        "bf16": quick_dtype() == torch.bfloat16,
        "fp16": None,
        "max_steps": 3,
        "save_steps": 3,
        "micro_batch_size": 1,
        "dataset_prepared_path": "./prepared_molecules",
    }
    ours = project.train("qlora", **{**settings, **LORA_RUN})
    log = project.logs("qlora")
    assert all(torch.isfinite(torch.tensor(entry["loss"])) for entry in log)
    assert log[-1]["caft/loss_head_1"] < log[0]["caft/loss_head_1"] * 1.5
    adapter = load_file(ours / "adapter_model.safetensors")
    assert len(adapter) == 30 * 7 * 2
    # LoRA B starts at zero: every one of them has moved
    assert all(tensor.abs().sum() > 0 for key, tensor in adapter.items() if "lora_B" in key)
    heads = load_file(ours / "checkpoint-3" / "caft_heads" / "heads.safetensors")
    base = load_file(smollm2 / "model.safetensors")
    copied = heads["0.mlp.up_proj.weight"].float()
    original = base["model.layers.29.mlp.up_proj.weight"].float()
    assert (copied - original).norm() / original.norm() < 0.12  # nf4's own error is about 0.09
    lora = load_file(ours / "checkpoint-3" / "caft_heads" / "lora.safetensors")
    assert all(tensor.abs().sum() > 0 for key, tensor in lora.items() if "lora_B" in key)


# -- bad configs: one clear message, exit code not 0 -----------------------------------------------

BAD = {
    "no number": (
        {"caft": {"num_heads": "four"}},
        "caft.num_heads: got 'four', but it accepts a whole number at least 1",
    ),
    "with rl": ({"caft": {}, "rl": "dpo"}, "caft: cannot be used together with `rl: dpo`"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_config_stops_before_anything_is_loaded(project, case):
    changes, message = BAD[case]
    project.config("bad", **PLUGIN, **changes)
    result = project.axolotl("train", "bad.yml", check=False)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert output.count(f"ConfigError: {message}") == 1, output[-3000:]
    assert not (project.folder / "bad" / "adapter_config.json").exists()


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun", "python"])
def test_our_error_is_the_last_that_is_said(project, launcher):
    """Below the tracebacks of the training process and of what has launched it; nothing of it stays
    on disk."""
    project.config(f"wrong_{launcher}", **PLUGIN, caft={"beta": -1, "alpha": 2})
    temporary = project.folder / f"temporary_{launcher}"
    temporary.mkdir()
    command = ("train", f"wrong_{launcher}.yml", "--launcher", launcher)
    result = project.launch(*command, check=False, TMPDIR=str(temporary))
    assert result.returncode != 0
    last = result.stderr.rstrip("\n").splitlines()[-2:]
    assert last[0].endswith("caft.beta: got -1, but it accepts a number at least 0.")
    assert last[1].startswith("caft.alpha: got 2, but it accepts a number above 0")
    assert not list(temporary.glob("caft_plugin-*"))


def test_what_heads_cannot_follow_stops_before_weights_are_loaded(project):
    """A model without an unembedding, of which there are no weights to load."""
    folder = project.folder / "no weights"
    shutil.copytree(project.folder / "tiny", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    project.config(
        "unfit", **FULL, **PLUGIN, caft={}, base_model=str(folder), model_type="LlamaModel"
    )
    result = project.axolotl("train", "unfit.yml", check=False)
    output = result.stdout + result.stderr
    assert result.returncode != 0
    assert output.count("ConfigError: caft: LlamaModel has no ") == 1, output[-3000:]


# -- stage 1 ---------------------------------------------------------------------------------------


def test_pretrain_heads_from_a_yaml(project, short_smollm2):
    """The shipped YAML, shortened, on the real model's first layers in 4 bits; killed with SIGKILL
    while it writes answers, and again while it trains."""
    config = yaml.safe_load((ROOT / "axolotl_configs" / "pretrain-heads-cpu.yml").read_text())
    (project.folder / "few.jsonl").write_text(
        "".join(
            (ROOT / "axolotl_configs/data/molecules-train.jsonl").read_text().splitlines(True)[:32]
        )
    )
    (project.folder / "held.jsonl").write_text(
        "".join(
            (ROOT / "axolotl_configs/data/molecules-heldout.jsonl").read_text().splitlines(True)[:8]
        )
    )
    config["datasets"][0]["path"], config["test_datasets"][0]["path"] = (
        "./few.jsonl",
        "./held.jsonl",
    )
    config |= {"base_model": str(short_smollm2), "output_dir": "./heads"}
    config |= {"max_steps": 6, "save_steps": 2}
    config |= {
        "dataset_prepared_path": "./prepared_heads",
        "load_in_4bit": True,
        "adapter": "qlora",
        "lora_r": 8,
    }
    config["bf16"] = quick_dtype() == torch.bfloat16
    config |= {"lora_alpha": 16, "lora_target_linear": True, "micro_batch_size": 4}
    config |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o")}
    config["pretrain_heads"] |= {
        "max_new_tokens": 48,
        "generation_batch_size": 8,
        "temperature": 1.0,
    }
    (project.folder / "heads.yml").write_text(yaml.safe_dump(config))

    scripts = Path(sys.executable).parent
    out = project.folder / "heads"
    answers = out / "answers.jsonl"

    def kill_when(reached):
        process = subprocess.Popen(
            [scripts / "axolotl", "caft", "pretrain-heads", "heads.yml"],
            cwd=project.folder,
            env={
                **os.environ,
                "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.time() + 600
        while time.time() < deadline and not reached():
            time.sleep(0.1)
        process.kill()
        process.wait()
        assert reached()

    kill_when(lambda: answers.exists() and len(answers.read_bytes().splitlines()) > 8)
    written = answers.read_bytes()
    kill_when((out / "checkpoint-2" / "trainer_state.json").exists)

    result = project.axolotl("caft", "pretrain-heads", "heads.yml")
    # nothing was written anew
    assert answers.read_bytes().startswith(written[: written.rfind(b"\n") + 1])
    folder = out / "caft_heads"
    assert "held-out loss" in result.stdout
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["targets"] == "model" and metrics["steps"] == 6
    for before, after in zip(metrics["untrained"], metrics["heads"], strict=True):
        assert after["loss"] < before["loss"]
    inspected = project.axolotl("caft", "inspect", "heads")
    assert "LlamaDecoderLayer" in inspected.stdout


def test_heads_go_on_over_the_tuned_model_and_draft_for_it(project, monkeypatch):
    """`pretrain-heads CONFIG --model --heads --output`, then `speculate CONFIG`: adapter, heads and
    held-out prompts are found in the YAML."""
    ours = project.train("ours", **LORA_RUN)
    config = yaml.safe_load((project.folder / "ours.yml").read_text())
    config["test_datasets"] = [{**config["datasets"][0], "split": "train"}]
    config["dataset_prepared_path"] = "./prepared_drafting"
    (project.folder / "drafting.yml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(project.folder)
    adapter = (ours / "adapter_model.safetensors").read_bytes()

    def run(*arguments):
        return CliRunner().invoke(commands, [*arguments, "drafting.yml"])

    options = [
        "--model",
        "./ours",
        "--heads",
        "./ours",
        "--output",
        "./boosted",
        "--targets",
        "distribution",
    ]
    made = run("pretrain-heads", *options)
    assert made.exit_code == 0, made.output
    assert re.search(r"^Started from +./ours$", made.stdout, re.M) and re.search(
        r"^Heads +4$", made.stdout, re.M
    )
    heads, boosted = (
        load_file(folder / "caft_heads" / "heads.safetensors") for folder in (ours, Path("boosted"))
    )
    assert heads.keys() == boosted.keys() and not any(
        torch.equal(heads[key], boosted[key]) for key in heads
    )
    metrics = json.loads(Path("boosted/caft_heads/metrics.json").read_text())
    assert all(
        after["loss"] < before["loss"]
        for before, after in zip(metrics["before"], metrics["heads"], strict=True)
    )
    assert (ours / "adapter_model.safetensors").read_bytes() == adapter and not Path(
        "boosted/adapter_config.json"
    ).exists()

    said = run(
        "speculate",
        "--heads",
        "./boosted",
        "--limit",
        "3",
        "--runs",
        "1",
        "--max-new-tokens",
        "8",
        "--float32",
    )
    assert said.exit_code == 0, said.output
    assert re.search(r"with the heads +[\d.]+ +[\d.]+ +[\d.]+  3 of 3", said.stdout)
    assert "speculate: got" not in said.output

    # other tests merge this run, in whichever order
    shutil.rmtree("ours/merged", ignore_errors=True)
    exported = run("export-drafter", "--output", "./drafter")
    assert exported.exit_code == 0, exported.output
    # layers of nine tensors, norm, mask slot
    assert len(load_file("drafter/model.safetensors")) == 4 * 9 + 2
    assert "--enable-lora --lora-modules tuned=ours --speculative-config" in exported.stdout
    shutil.copytree("tiny", "ours/merged", copy_function=shutil.copyfile)  # newer than the adapter
    exported = run("export-drafter", "--output", "./drafter-of-merged")
    shutil.rmtree("ours/merged")
    assert exported.exit_code == 0, exported.output
    assert "vllm serve ours/merged --speculative-config" in exported.stdout

    refused = run("pretrain-heads", "--steps", "3")
    assert (
        refused.exit_code == 2
        and "--steps cannot be used with a CONFIG, which has a key for it" in refused.stderr
    )
    del config["test_datasets"]
    Path("drafting.yml").write_text(yaml.safe_dump(config))
    refused = run("speculate")
    assert (
        refused.exit_code == 1
        and "drafting.yml has no test_datasets with prompts." in refused.stderr
    )
