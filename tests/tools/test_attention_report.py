"""`caft attention-report` on tiny models: its figures against slow formulas, its table, its
picture, its messages."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model

from builders.tiny import word_tokenizer
from caft_plugin import ConfigError
from caft_plugin.tools.attention_report import (
    as_table,
    attention,
    attention_report,
    changed,
    draw,
    on_masked_and_variance_of_rest,
    read_texts,
)
from caft_plugin.tools.cli import commands

ROW = {"context": "w1 w2 w3 w4 w5 w6", "answer": "w3 w4", "query": "w7 w8"}


@pytest.fixture
def folder(tiny_model, tmp_path):
    for name in ("base", "tuned"):
        with torch.no_grad():
            for parameter in tiny_model.model.layers.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        tiny_model.save_pretrained(tmp_path / name)
        word_tokenizer("").save_pretrained(tmp_path / name)
    rows = [ROW, {"text": " ".join(f"w{i}" for i in range(40))}, {"text": "w1"}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def report(folder, base="base", tuned="tuned", mask_token="95", **changes):
    texts = read_texts(folder / "texts.jsonl")
    settings = {
        "mask_ratio": 0.2,
        "mask_token": mask_token,
        "max_length": 64,
        "seed": 0,
        "dtype": torch.float32,
        **changes,
    }
    return attention_report(str(folder / base), str(folder / tuned), texts, **settings)


def test_figures_of_one_map():
    torch.manual_seed(0)
    weights = torch.rand(2, 6, 6).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    masked = torch.tensor([False, False, True, False, True, False])
    means, variances = [], []
    for of_map in weights:
        # from here on a query sees a masked position and two others behind the first
        for query in (3, 4, 5):
            seen = [key for key in range(1, query + 1)]
            others = [of_map[query, key].item() for key in seen if not masked[key]]
            if len(others) < 2:
                continue
            on = [of_map[query, key].item() for key in seen if masked[key]]
            means.append(sum(on) / len(on))
            centre = sum(others) / len(others)
            variances.append(sum((x - centre) ** 2 for x in others) / len(others))
    mean, variance = on_masked_and_variance_of_rest(weights, masked)
    assert mean == pytest.approx(sum(means) / len(means), rel=1e-6)
    assert variance == pytest.approx(sum(variances) / len(variances), rel=1e-5)


def test_attention_is_the_models(tiny_model):
    tiny_model.set_attn_implementation("eager")
    weights = attention(tiny_model.eval(), torch.tensor([5, 6, 7]))
    assert weights.shape == (3 * 4, 3, 3)
    assert torch.allclose(weights.sum(-1), torch.ones(12, 3), atol=1e-6)
    assert torch.equal(weights, weights.tril())


def test_report(folder):
    figures = report(folder)
    assert figures.texts == 2  # one is too short to mask
    for model in ("base", "tuned"):  # one of the two has segments, and every token of it is in one
        shares = [figures.segments[model, segment] for segment in ("context", "answer", "query")]
        assert sum(shares) == pytest.approx(1, rel=1e-5) and min(shares) > 0
    same = report(folder, tuned="base")
    for of in (same.masked, same.variance):
        assert (
            of["base", "masked"] == of["tuned", "masked"]
            and of["base", "unmasked"] == of["tuned", "unmasked"]
        )
        assert of["base", "unmasked"] != of["base", "masked"]
    assert figures.masked["base", "unmasked"] == same.masked["base", "unmasked"]
    assert report(folder, seed=1).masked != figures.masked


def test_adapters_and_added_tokens(folder, tiny_model):
    from caft_plugin.meap.mask_token import AddedMaskToken, choose_mask_token

    tiny_model.config.name_or_path = str(folder / "base")
    lora = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    lora.peft_config["default"].base_model_name_or_path = str(folder / "base")
    lora.save_pretrained(folder / "adapter")
    word_tokenizer("").save_pretrained(folder / "adapter")
    assert (
        report(folder, tuned="adapter").masked["tuned", "unmasked"]
        != report(folder).masked["base", "unmasked"]
    )

    added = AddedMaskToken(lora, choose_mask_token("add", None, 97, None))
    added.vector.data.add_(5)
    added.save(folder / "adapter", write=True)
    figures = report(folder, tuned="adapter", mask_token="auto")
    assert "added: id 97" in figures.mask_token
    assert (
        figures.masked["base", "masked"] != report(folder, mask_token="95").masked["base", "masked"]
    )


def test_command_table_and_picture(folder):
    arguments = [
        "--base",
        str(folder / "base"),
        "--tuned",
        str(folder / "tuned"),
        "--mask-token",
        "w90",
    ]
    picture = folder / "new" / "report.png"
    result = CliRunner().invoke(
        commands,
        [
            "attention-report",
            *arguments,
            "--text",
            str(folder / "texts.jsonl"),
            "--png",
            str(picture),
        ],
    )
    assert result.exit_code == 0, result.output
    assert "  attention on masked positions: " in result.output and "  query" in result.output
    assert (
        "computing attention: 100%" in result.stderr and "computing attention" not in result.stdout
    )
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain = folder / "plain.txt"
    plain.write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8 w9\n")
    result = CliRunner().invoke(commands, ["attention-report", *arguments, "--text", str(plain)])
    assert result.exit_code == 0 and "2 texts" in result.output and "query" not in result.output


def test_the_effect_of_masking_and_that_of_tuning_are_apart(folder):
    """Each model on unmasked and on masked text, the four changes between neighbours, and the
    paper's across."""
    figures = report(folder)
    lines = as_table(figures).splitlines()
    for title, values in (
        ("Mean attention weight on", figures.masked),
        ("Variance of", figures.variance),
    ):
        at = next(number for number, line in enumerate(lines) if line.startswith(title))
        assert lines[at + 1].split("  ")[-1].strip() == "effect of masking"
        for line, model in zip(lines[at + 2 : at + 4], ("base", "tuned"), strict=True):
            unmasked, masked = values[model, "unmasked"], values[model, "masked"]
            assert line.split()[:3] == [model, f"{unmasked:.3e}", f"{masked:.3e}"]
            assert line.endswith(changed(unmasked, masked))
        for given in ("unmasked", "masked"):
            assert changed(values["base", given], values["tuned", given]) in lines[at + 4]
    across = changed(figures.masked["base", "unmasked"], figures.masked["tuned", "masked"])
    assert f"  attention on masked positions: {across}" in lines


def test_a_change_says_its_direction():
    assert changed(4.0, 3.0) == "25.0 % lower" and changed(4.0, 5.0) == "25.0 % higher"
    assert changed(4.0, 4.0001) == "unchanged" and changed(0.0, 1.0) == "not comparable with 0"


def test_axes_of_the_picture_are_labelled(folder, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *_, **__: drawn.append(figure) or (folder / "x").touch()
    )
    with pytest.raises(FileNotFoundError):  # nothing was saved
        draw(report(folder), folder / "report.png")
    (figure,) = drawn
    assert len(figure.axes) == 3
    for axes in figure.axes:
        assert (
            axes.get_xlabel()
            and axes.get_ylabel()
            and axes.get_title()
            and axes.get_legend() is not None
        )


@pytest.mark.parametrize("command", ["pretrain-heads", "speculate", "attention-report"])
@pytest.mark.parametrize("float32", [False, True])
def test_all_commands_have_one_rule_of_dtype(folder, monkeypatch, command, float32):
    """What a model is loaded in: what is quick here, whatever dtype its files have, or float32
    where asked for."""
    quick = torch.bfloat16
    monkeypatch.setattr("caft_plugin.precision.quick_dtype", lambda: quick)
    loaded = []

    def load(self, dtype, **_):
        loaded.append(dtype)
        raise ConfigError("loaded")

    monkeypatch.setattr("caft_plugin.model.loading.Source.load", load)
    base, texts = str(folder / "base"), str(folder / "texts.jsonl")
    options = {
        "pretrain-heads": ["--model", base, "--data", texts, "--output", str(folder / "out")],
        "speculate": ["--model", base, "--heads", str(folder / "out"), "--prompts", texts],
        "attention-report": ["--base", base, "--tuned", base, "--text", texts],
    }[command]
    if command != "attention-report":
        (folder / "texts.jsonl").write_text('{"text": "w1 w2 w3"}\n')
    for quick in (torch.bfloat16, torch.float32):
        result = CliRunner().invoke(
            commands, [command, *options, *(["--float32"] if float32 else [])]
        )
        assert result.output.endswith("Error: loaded\n"), result.output
        assert loaded.pop() == (torch.float32 if float32 else quick)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 5}\n', "line 1 of .* is not a JSON object with `text`"),
        ("a.jsonl", '{"text": "w1"}\n{"context": "w1"}\n', "line 2 of"),
        ("a.jsonl", "nothing", "line 1 of"),
        ("a.jsonl", "[1]\n", "line 1 of"),
        ("a.txt", " \n\n ", "has no text in it"),
        ("a.txt", None, "cannot be read"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_texts(tmp_path / name)


def test_nothing_to_mask(folder):
    (folder / "texts.jsonl").write_text('{"text": "w1 w2"}\n')
    with pytest.raises(ConfigError, match="shorter than three tokens"):
        report(folder)
    (folder / "texts.jsonl").write_text('{"text": "w90 w2 w3"}\n')
    with pytest.raises(ConfigError, match="the training data contains it"):
        report(folder)


def test_segments_of_a_text(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": "w9"}) + "\n")
    inside, behind = read_texts(file)
    assert inside.text == "w1 w2 w3 w4 w5 w6\nw7 w8"
    assert inside.segments[6:11] == ["answer"] * 5 and inside.segments[12] == "context"
    assert behind.text == "w1 w2 w3 w4 w5 w6\nw9\nw7 w8"
