"""`caft attention-report` on tiny models: its figures against slow formulas, its table, its picture, its messages."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from tiny import word_tokenizer

from caft_plugin import ConfigError
from caft_plugin.meap.attention_report import attention, attention_report, on_masked_and_variance_of_rest, read_texts
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
    settings = {"mask_ratio": 0.2, "mask_token": mask_token, "max_length": 64, "seed": 0, **changes}
    return attention_report(str(folder / base), str(folder / tuned), texts, **settings)


def test_figures_of_one_map():
    torch.manual_seed(0)
    weights = torch.rand(2, 6, 6).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    masked = torch.tensor([False, False, True, False, True, False])
    means, variances = [], []
    for of_map in weights:
        for query in (3, 4, 5):  # from here on a query sees a masked position and two others behind the first
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
    assert figures.decay == pytest.approx(1 - figures.masked["tuned", "masked"] / figures.masked["base", "plain"])
    same = report(folder, tuned="base")
    for of in (same.masked, same.variance):
        assert of["base", "masked"] == of["tuned", "masked"] and of["base", "plain"] == of["tuned", "plain"]
        assert of["base", "plain"] != of["base", "masked"]
    assert figures.masked["base", "plain"] == same.masked["base", "plain"]
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
    assert report(folder, tuned="adapter").masked["tuned", "plain"] != report(folder).masked["base", "plain"]

    added = AddedMaskToken(lora, choose_mask_token("add", None, 97, None))
    added.vector.data.add_(5)
    added.save(folder / "adapter", write=True)
    figures = report(folder, tuned="adapter", mask_token="auto")
    assert "added: id 97" in figures.mask_token
    assert figures.masked["base", "masked"] != report(folder, mask_token="95").masked["base", "masked"]


def test_command_table_and_picture(folder):
    arguments = ["--base", str(folder / "base"), "--tuned", str(folder / "tuned"), "--mask-token", "w90"]
    picture = folder / "new" / "report.png"
    result = CliRunner().invoke(
        commands, ["attention-report", *arguments, "--text", str(folder / "texts.jsonl"), "--png", str(picture)]
    )
    assert result.exit_code == 0, result.output
    assert "attention decay at masked positions" in result.output and "  query" in result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    plain = folder / "plain.txt"
    plain.write_text("w1 w2 w3 w4\n\nw5 w6 w7 w8 w9\n")
    result = CliRunner().invoke(commands, ["attention-report", *arguments, "--text", str(plain)])
    assert result.exit_code == 0 and "2 texts" in result.output and "query" not in result.output


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": 5}\n', "line 1 of .* is not a JSON object with `text`"),
        ("a.jsonl", '{"text": "w1"}\n{"context": "w1"}\n', "line 2 of"),
        ("a.jsonl", "nothing", "line 1 of"),
        ("a.jsonl", "[1]\n", "line 1 of"),
        ("a.txt", " \n\n ", "holds no text"),
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
