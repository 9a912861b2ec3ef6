"""`caft import-heads`: the authors' heads through the user's path, and every file it has to
refuse."""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    LlamaForCausalLM,
    T5Config,
    Trainer,
    TrainerState,
    TrainingArguments,
)

from caft_plugin import ConfigError, with_caft
from caft_plugin.caft.heads_record import RECORD, WEIGHTS, read_record
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.cli import commands
from caft_plugin.tools.import_heads import import_heads

SCHEDULES = ("rsine", "sine", "linear", "constant")
AT_STEPS = (0, 25, 50, 99)


@pytest.fixture(scope="module")
def state(golden):
    """The heads as the authors' file has them: K.layers.0.NAME."""
    prefix = "weights.auxiliary_head."
    return OrderedDict(
        (k.removeprefix(prefix), v) for k, v in golden[0].items() if k.startswith(prefix)
    )


@pytest.fixture(scope="module")
def base(golden, tmp_path_factory):
    """The golden's base model, a folder."""
    weights = {
        k.removeprefix("weights."): v for k, v in golden[0].items() if k.startswith("weights.")
    }
    model = LlamaForCausalLM(golden[1])
    model.load_state_dict(
        {k: v for k, v in weights.items() if not k.startswith("auxiliary_head.")}, strict=True
    )
    folder = tmp_path_factory.mktemp("golden") / "base"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def imported(state, base, tmp_path_factory):
    """The heads folder that the command line makes of heads.pth."""
    folder = tmp_path_factory.mktemp("imported")
    torch.save(state, folder / "heads.pth")
    command = [
        "import-heads",
        str(folder / "heads.pth"),
        "--base-model",
        str(base),
        str(folder / "out"),
    ]
    result = CliRunner().invoke(commands, command)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in folder.iterdir()) == ["heads.pth", "out"]
    return folder / "out"


@pytest.fixture
def config_only(golden, tmp_path):
    """A base model folder without weights."""
    golden[1].save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_folder(imported, base, state):
    assert sorted(path.name for path in imported.iterdir()) == [RECORD, WEIGHTS]
    assert read_record(imported).model_dump(exclude_none=True) == {
        "format_version": 1,
        "num_heads": 4,
        "head_input": "final",
        "head_norm": False,
        "layer_class": "LlamaDecoderLayer",
        "model_type": "llama",
        "hidden_size": 32,
        "vocab_size": 89,
        "base_model": str(base),
    }
    tensors = load_file(imported / WEIGHTS)
    assert len(tensors) == len(state)
    for name, tensor in state.items():
        assert torch.equal(tensors[name.replace(".layers.0.", ".")], tensor)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_golden_totals(golden, base, imported, tmp_path, schedule):
    trainer = with_caft(Trainer)(
        model=AutoModelForCausalLM.from_pretrained(base, attn_implementation="sdpa"),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        caft={"heads": str(imported), "schedule": schedule},
    )
    trainer.model.eval()
    for step in AT_STEPS:
        trainer.state = TrainerState(global_step=step, max_steps=100)
        inputs = {"input_ids": golden[0]["input_ids"], "labels": golden[0]["labels"].clone()}
        total = trainer.compute_loss(trainer.model, inputs)
        expected = golden[0][f"total.{schedule}.{step}"]
        torch.testing.assert_close(total.detach(), expected, rtol=0, atol=1e-5)


def write(state, file, how):
    match how:
        case "safetensors":
            save_file(dict(state), file.with_suffix(".safetensors"))
            return file.with_suffix(".safetensors")
        case "prefixed":
            torch.save({f"auxiliary_head.{name}": tensor for name, tensor in state.items()}, file)
        case "old torch.save format":
            torch.save(state, file, _use_new_zipfile_serialization=False)
        case "parameters":
            torch.save({name: torch.nn.Parameter(tensor) for name, tensor in state.items()}, file)
        case "shared memory, not contiguous":
            shared = {name: torch.stack([tensor, tensor], dim=-1) for name, tensor in state.items()}
            torch.save({name: tensor[..., 1] for name, tensor in shared.items()}, file)
    return file


@pytest.mark.parametrize(
    "how",
    [
        "safetensors",
        "prefixed",
        "old torch.save format",
        "parameters",
        "shared memory, not contiguous",
    ],
)
def test_other_ways_to_write_the_same_heads(state, imported, config_only, tmp_path, how):
    folder = import_heads(
        write(state, tmp_path / "heads.pth", how), str(config_only), tmp_path / "out"
    )
    ours, theirs = load_file(folder / WEIGHTS), load_file(imported / WEIGHTS)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_heads_that_share_their_memory(state, config_only, tmp_path):
    torch.save({name: state["0" + name[1:]] for name in state}, tmp_path / "heads.pth")
    tensors = load_file(
        import_heads(tmp_path / "heads.pth", str(config_only), tmp_path / "out") / WEIGHTS
    )
    assert all(torch.equal(tensors[name], tensors["0" + name[1:]]) for name in tensors)


def test_wiring_can_be_said_and_the_dtype_is_kept(state, config_only, tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in state.items()}, tmp_path / "heads.pth")
    (tmp_path / "out").mkdir()  # an empty folder is as good as none
    command = [
        "import-heads",
        str(tmp_path / "heads.pth"),
        "--base-model",
        str(config_only),
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(commands, [*command, "--head-input", "penultimate", "--head-norm"])
    assert result.exit_code == 0, result.output
    assert "head_input penultimate, head_norm true" in result.output and "BF16" in result.output
    record = read_record(tmp_path / "out")
    assert (record.head_input, record.head_norm) == ("penultimate", True)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / WEIGHTS).values()} == {
        torch.bfloat16
    }


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


UP = "0.layers.0.mlp.up_proj.weight"
CONTENTS = {
    "an object": (
        lambda s: {**s, "extra": Executes()},
        r"holds an object \(posix.system\), which is refused",
    ),
    "a config beside the tensors": (
        lambda s: {**s, "alpha": 0.8},
        r"holds a float, not a tensor, under 'alpha'",
    ),
    "a state dict in a dict": (
        lambda s: {"state_dict": dict(s)},
        r"holds a dict, not a tensor, under 'state_dict'",
    ),
    "a key that is a number": (lambda s: {0: s[UP]}, r"holds a key that is not a string under 0"),
    "a list": (lambda s: list(s.values()), r"holds a list\. import-heads accepts the state dict"),
    "a tensor": (lambda s: s[UP], r"holds a Tensor\. import-heads accepts the state dict"),
    "nothing": (lambda s: {}, r"holds an empty dict"),
    "quantised weights": (
        lambda s: {**s, UP: s[UP].to(torch.int8)},
        r"not a plain weight \(torch.int8.*'0.layers.0.mlp",
    ),
    "sparse weights": (
        lambda s: {**s, UP: s[UP].to_sparse()},
        r"not a plain weight \(.*torch.sparse_coo",
    ),
    "weights without data": (
        lambda s: {**s, UP: s[UP].to("meta")},
        r"not a plain weight \(.* meta\)",
    ),
    "a whole model": (
        lambda s: {**s, "lm_head.weight": s[UP]},
        r"holds the unknown key 'lm_head.weight'",
    ),
    "another prefix": (
        lambda s: {f"module.{k}": v for k, v in s.items()},
        r"the unknown key 'module.0.layers.0",
    ),
    "several layers": (
        lambda s: {**s, UP.replace("s.0", "s.1"): s[UP]},
        r"several layers for head 0, .*one layer each",
    ),
    "linear blocks": (
        lambda s: {
            "0.layers.0.linear.weight": torch.eye(32),
            "0.layers.0.linear.bias": torch.zeros(32),
        },
        r"holds 0.layers.0.linear.weight, a `linear` residual block .*--head-arch transformer",
    ),
    "an unembedding": (
        lambda s: {**s, "3.lm_head.weight": torch.ones(89, 32)},
        r"separate unembedding for head 3",
    ),
    "a gap": (
        lambda s: {k: v for k, v in s.items() if not k.startswith("1.")},
        r"holds heads numbered 0, 2, 3, but .* from 0 without gaps",
    ),
    "a missing tensor": (
        lambda s: {k: v for k, v in s.items() if k != "2.layers.0.mlp.up_proj.weight"},
        r"lacks 2.layers.0.mlp.up_proj.weight, which a LlamaDecoderLayer of .*base has",
    ),
    "an unknown tensor": (
        lambda s: {**s, "1.layers.0.mlp.up_proj.bias": torch.ones(64)},
        r"holds 1.layers.0.mlp.up_proj.bias, which a LlamaDecoderLayer of .*base does not have",
    ),
    "a misshapen tensor": (
        lambda s: {**s, UP: torch.ones(48, 32)},
        r"holds 0.layers.0.mlp.up_proj.weight with shape \(48, 32\), but .* has shape \(64, 32\)",
    ),
    "another hidden size": (
        lambda s: {k: torch.ones([48 if n == 32 else n for n in v.shape]) for k, v in s.items()},
        r"was made for hidden size 48, but .*base has 32",
    ),
}


def refused(file, base, out, match):
    """Neither the output nor anything else is there afterwards, and the command line says the
    same."""
    before = sorted(file.parent.iterdir()) if file.parent.is_dir() else None
    with pytest.raises(ConfigError, match=match) as caught:
        import_heads(file, str(base), out)
    result = CliRunner().invoke(
        commands, ["import-heads", str(file), "--base-model", str(base), str(out)]
    )
    assert (result.exit_code, result.output) == (
        1,
        "Error: " + re.sub("^base_model:", "--base-model:", str(caught.value)) + "\n",
    )
    assert not Path(out).is_dir()
    assert before is None or sorted(file.parent.iterdir()) == before


@pytest.mark.parametrize("what", CONTENTS)
def test_contents_that_are_refused(state, config_only, tmp_path, monkeypatch, what):
    monkeypatch.chdir(tmp_path)
    change, match = CONTENTS[what]
    torch.save(change(state), tmp_path / "heads.pth")
    refused(tmp_path / "heads.pth", config_only, tmp_path / "out", match)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut at the end", "cut at the start", "empty", "text"])
def test_damaged_files(state, config_only, tmp_path, suffix, damage):
    file = tmp_path / f"heads{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(dict(state), file)
    whole = file.read_bytes()
    parts = {
        "cut at the end": whole[:-100],
        "cut at the start": whole[:50],
        "empty": b"",
        "text": b"K.layers.0\n",
    }
    file.write_bytes(parts[damage])
    refused(
        file,
        config_only,
        tmp_path / "out",
        r"cannot be read as .* incomplete, damaged or of another kind",
    )


def test_a_missing_file(config_only, tmp_path):
    refused(
        tmp_path / "heads.pth",
        config_only,
        tmp_path / "out",
        r"got '.*heads.pth', which is not a file",
    )


def test_base_models_that_are_refused(state, tmp_path):
    file, out = tmp_path / "heads.pth", tmp_path / "out"
    torch.save(state, file)
    refused(
        file,
        "nobody/no-such-model",
        out,
        r"base_model: got 'nobody/no-such-model', whose config could not be",
    )
    (tmp_path / "empty").mkdir()
    refused(
        file, tmp_path / "empty", out, r"base_model: got '.*empty', whose config could not be read"
    )
    T5Config().save_pretrained(tmp_path / "t5")
    refused(
        file, tmp_path / "t5", out, r"t5 is an encoder-decoder model, but CAFT accepts decoder-only"
    )
    BertConfig(num_hidden_layers=2).save_pretrained(tmp_path / "bert")
    refused(file, tmp_path / "bert", out, r"BertLMHeadModel has no")
    (tmp_path / "remote").mkdir()
    text = json.dumps(
        {"model_type": "unheard_of", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}
    )
    (tmp_path / "remote" / "config.json").write_text(text)
    (tmp_path / "remote" / "configuration_x.py").write_text("raise SystemExit('executed')")
    refused(
        file,
        tmp_path / "remote",
        out,
        r"base_model: got '.*remote', whose config could not be read",
    )


def test_an_output_that_is_there_is_left_alone(state, config_only, tmp_path):
    torch.save(state, tmp_path / "heads.pth")
    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "heads.pth", config_only, tmp_path / "file", r"file exists\.")
    assert (tmp_path / "file").read_text() == "mine"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="out exists. Give the name of a new folder"):
        import_heads(tmp_path / "heads.pth", str(config_only), tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes"]
    refused(tmp_path / "heads.pth", config_only, tmp_path / "file" / "out", r"cannot be written \(")


def test_a_failed_write_leaves_nothing(state, config_only, tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    torch.save(state, tmp_path / "heads.pth")
    monkeypatch.setattr("caft_plugin.caft.heads_folder.save_file", full)
    refused(
        tmp_path / "heads.pth",
        config_only,
        tmp_path / "out",
        r"cannot be written \(OSError: no space left\)",
    )


def test_a_wiring_that_does_not_exist(state, config_only, tmp_path):
    torch.save(state, tmp_path / "heads.pth")
    with pytest.raises(
        ConfigError, match=r"caft.head_input: got 'last', but it accepts one of penultimate, final"
    ):
        import_heads(tmp_path / "heads.pth", str(config_only), tmp_path / "out", head_input="last")


def test_only_the_config_of_the_base_is_read(state, config_only, tmp_path, monkeypatch):
    """The model it is held against is built without memory."""
    devices = []
    monkeypatch.setattr(
        "caft_plugin.model.loading.find_trunk",
        lambda model: (
            devices.extend({p.device.type for p in model.parameters()}) or find_trunk(model)
        ),
    )
    torch.save(state, tmp_path / "heads.pth")
    import_heads(tmp_path / "heads.pth", str(config_only), tmp_path / "out")
    assert devices == ["meta"]
