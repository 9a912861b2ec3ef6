"""The options of trl_examples/sft.py: each key of both blocks, and which objectives they select."""

from __future__ import annotations

import importlib

import pytest

from builders.paths import ROOT

pytest.importorskip("trl")

from caft_plugin import CAFTConfig, ConfigError, MEAPConfig


@pytest.fixture
def parse(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "trl_examples")
    sft = importlib.import_module("sft")
    required = ["--dataset_name", "D", "--output_dir", str(tmp_path), "--use_cpu"]
    return lambda *options: sft.parse([*required, *options])[3]


@pytest.mark.parametrize(
    ("options", "selected"),
    [
        (["--caft"], {"caft": CAFTConfig()}),
        (["--meap"], {"meap": MEAPConfig()}),
        (["--caft", "--meap"], {"caft": CAFTConfig(), "meap": MEAPConfig()}),
        (["--num_heads", "2"], {"caft": CAFTConfig(num_heads=2)}),
        (["--mask_ratio", "0.2"], {"meap": MEAPConfig(mask_ratio=0.2)}),
        (
            ["--meap", "--layout", "separate", "--num-heads", "1"],
            {"caft": CAFTConfig(num_heads=1), "meap": MEAPConfig(layout="separate")},
        ),
        (["--fused_loss", "--head_norm", "false"], {"caft": {"fused_loss": 1, "head_norm": 0}}),
        (["--fused_loss", "off"], {"caft": {"fused_loss": False}}),
        (["--fused_loss", "auto"], {"caft": {"fused_loss": "auto"}}),
        (
            ["--mask_token", "add", "--beta", "1e-3"],
            {"meap": {"mask_token": "add"}, "caft": {"beta": 0.001}},
        ),
    ],
    ids=str,
)
def test_options_select_objectives_and_set_their_keys(parse, options, selected):
    kinds = {"caft": CAFTConfig, "meap": MEAPConfig}
    assert parse(*options) == {name: kinds[name].read(keys) for name, keys in selected.items()}


def test_every_key_is_an_option(parse):
    values = {"caft": {"heads": "H", "heads_per_step": 2}, "meap": {"mask_token": "<m>"}}
    for config_class in (CAFTConfig, MEAPConfig):
        block = config_class.read(values[config_class.block])
        for key, value in block.model_dump(exclude_none=True).items():
            assert getattr(parse(f"--{key}", str(value))[config_class.block], key) == value


def test_a_file_of_options_selects_too(parse, tmp_path):
    file = tmp_path / "options.yml"
    file.write_text("caft: true\nfused_loss: on\n")
    assert parse("--config", str(file)) == {"caft": CAFTConfig(fused_loss=True)}


def refused(parse, capsys, *options) -> str:
    with pytest.raises(SystemExit):
        parse(*options)
    return capsys.readouterr().err.splitlines()[-1]


def test_without_an_objective_it_stops(parse, tmp_path, capsys):
    assert refused(parse, capsys).endswith("select an objective: --caft, --meap or both")
    file = tmp_path / "options.yml"
    file.write_text("caft:\n  num_heads: 4\n")
    nested = refused(parse, capsys, "--config", str(file))
    assert nested.endswith(
        "caft: got {'num_heads': 4}, but it accepts true or false; its keys are not nested"
    )


def test_a_wrong_value_is_the_blocks_error(parse):
    with pytest.raises(ConfigError, match="caft.num_heads: got 99, but it accepts a whole number"):
        parse("--num_heads", "99")
