"""Messages use the caller's words: a command's options, Python's arguments. A YAML's words are for
its readers."""

from __future__ import annotations

import json
import re
import shutil

import pytest
import torch
from click.testing import CliRunner
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import CAFTConfig, ConfigError, Drafter
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.caft.heads_record import FOLDER, RECORD
from caft_plugin.model.trunk import find_trunk
from caft_plugin.tools.cli import commands

OF_YAML = re.compile(
    r"YAML|\bkeys?\b|`\w+:`|\bblocks?\b|(caft|pretrain_heads|meap)\.\w|nothing at all|base_model:"
)
TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What a run leaves: a model with a tokenizer, its heads, and two rows; next to it an
    encoder-decoder model."""
    folder = tmp_path_factory.mktemp("words")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LLAMA)).eval()
    trunk, config = find_trunk(model), resolve_wiring(CAFTConfig(num_heads=2), None)
    model.save_pretrained(folder / "run")
    word_tokenizer(TEMPLATE).save_pretrained(folder / "run")
    save_heads(
        folder / "run", build_heads(model, trunk, config, seed=0), trunk, config, resumable=False
    )
    small = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 97}
    T5ForConditionalGeneration(T5Config(**small)).save_pretrained(folder / "t5")
    word_tokenizer(TEMPLATE).save_pretrained(folder / "t5")
    (folder / "rows.jsonl").write_text('{"text": "a b c d"}\n' * 2)
    (folder / "pairs.jsonl").write_text('{"prompt": "a b", "completion": "c d"}\n' * 2)
    torch.save({"0.layers.0.mlp.up_proj.weight": torch.ones(2, 2)}, folder / "heads.pth")
    (folder / "rows.txt").write_text("a b c d\n")
    shutil.copytree(folder / "run" / FOLDER, folder / "other")
    record = json.loads((folder / "other" / RECORD).read_text())
    (folder / "other" / RECORD).write_text(json.dumps({**record, "hidden_size": 1024}))
    return folder


def told(folder, command):
    """The message of a command whose words in capitals are paths in the folder."""
    words = {
        "MODEL": "run",
        "HEADS": f"run/{FOLDER}",
        "OTHER": "other",
        "T5": "t5",
        "ROWS": "rows.jsonl",
    }
    words |= {
        "PAIRS": "pairs.jsonl",
        "TEXT": "rows.txt",
        "FILE": "heads.pth",
        "OUT": "out",
        "NOWHERE": "nowhere",
    }
    arguments = [str(folder / words[word]) if word in words else word for word in command.split()]
    result = CliRunner().invoke(commands, arguments)
    assert result.exit_code == 1 and "Error: " in result.output, (result.output, result.exception)
    return result.output.partition("Error: ")[2].strip().replace(str(folder), "")


STAGE1 = "pretrain-heads --data PAIRS --output OUT"
WRONG = {
    f"{STAGE1} --model MODEL --num-heads 0": (
        "--num-heads: got 0, but it accepts a whole number at least 1"
    ),
    f"{STAGE1} --model MODEL --top-p 2": "--top-p: got 2.0, but it accepts",
    f"{STAGE1} --model MODEL --seed -1": "--seed: got -1, but it accepts",
    f"{STAGE1} --model MODEL": "--max-new-tokens: row 0 has a prompt of 2 tokens",
    "pretrain-heads --data ROWS --output OUT --model MODEL": "--targets: `model` needs prompts",
    f"{STAGE1} --model MODEL --heads NOWHERE": "--heads: got ",
    f"{STAGE1} --model MODEL --heads MODEL --num-heads 3 --targets dataset": (
        "--num-heads: got 3, but the folder"
    ),
    f"{STAGE1} --model MODEL --heads OTHER --targets dataset": (
        "--heads: /other was made for hidden_size 1024"
    ),
    f"{STAGE1} --model T5": "caft: /t5 is an encoder-decoder model",
    f"{STAGE1} --model HEADS": "--model: got ",
    "speculate --model HEADS --heads HEADS --prompts ROWS": "--model: got ",
    "speculate --model T5 --heads HEADS --prompts ROWS": "caft: /t5 is an encoder-decoder model",
    "speculate --model MODEL --heads OTHER --prompts ROWS": (
        "--heads: /other was made for hidden_size 1024"
    ),
    "speculate --model MODEL --heads NOWHERE --prompts ROWS": "--heads: got ",
    "export-drafter --model HEADS --heads HEADS --output OUT": "--model: got ",
    "export-drafter --model MODEL --heads HEADS --output OUT --num-heads 3": "--num-heads: got 3",
    "export-drafter --model MODEL --heads NOWHERE --output OUT": "--heads: got ",
    "attention-report --base HEADS --tuned MODEL --text TEXT": "--base: got ",
    "attention-report --base MODEL --tuned HEADS --text TEXT": "--tuned: got ",
    "import-heads FILE OUT --base-model HEADS": "--base-model: got ",
    "import-heads FILE OUT --base-model NOWHERE": "--base-model: got ",
    "inspect NOWHERE": "FOLDER: got ",
}


@pytest.mark.parametrize("command", WRONG)
def test_commands(run, command):
    message = told(run, command)
    assert message.startswith(WRONG[command]), message
    assert not OF_YAML.search(message), message
    if re.search(r"(model|base|tuned) HEADS", command):
        assert "which is a heads folder. Give the model that the heads were trained with" in message


def test_a_heads_folder_of_the_hub_is_no_model(run, monkeypatch, tmp_path):
    """Its config.json alone is read there: the record, from which transformers makes a config of
    some size."""
    from caft_plugin.model.loading import Source

    config = AutoConfig.from_pretrained(run / "run" / FOLDER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **_: config)
    monkeypatch.setattr("caft_plugin.model.loading.find_adapter_config_file", lambda name: None)
    with pytest.raises(ConfigError, match="model: got 'owner/heads', which is a heads folder"):
        Source.of("owner/heads")


def drafter_errors(folder):
    """Python's callers: a wrong model, heads that are not there or not this model's, settings out
    of their range."""
    model = LlamaForCausalLM.from_pretrained(folder / "run")
    encoder_decoder = T5ForConditionalGeneration.from_pretrained(folder / "t5")
    heads = folder / "run" / FOLDER
    yield lambda: Drafter.from_pretrained(encoder_decoder, heads)
    yield lambda: Drafter.from_pretrained(torch.nn.Linear(2, 2), heads)
    yield lambda: Drafter.from_pretrained(model, folder / "nowhere")
    yield lambda: Drafter.from_pretrained(model, folder / "rows.jsonl")
    yield lambda: Drafter.from_pretrained(model, folder / "other")
    yield lambda: Drafter.from_pretrained(model, folder / "t5")
    yield lambda: Drafter.from_pretrained(model, heads, num_draft=9)
    drafter = Drafter.from_pretrained(model, heads)
    ids = torch.ones(1, 4, dtype=torch.long)
    yield lambda: drafter.generate(model, ids.repeat(2, 1))
    yield lambda: drafter.generate(model, ids, num_beams=2)
    yield lambda: drafter.generate(model, ids, use_cache=False)
    yield lambda: drafter.generate(model, ids, output_attentions=True)
    yield lambda: drafter.generate(model.train(), ids)


def test_drafter(run):
    for wrong in drafter_errors(run):
        with pytest.raises(ConfigError) as error:
            wrong()
        assert not OF_YAML.search(str(error.value)) and "--" not in str(error.value), str(
            error.value
        )
