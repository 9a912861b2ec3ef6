"""`caft speculate`: its figures against what the texts themselves say, its table, its picture, its
errors."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from click.testing import CliRunner

from builders.answers import TEMPLATE
from builders.drafters import drafter_of, few_words_model
from builders.tiny import word_tokenizer
from caft_plugin.caft.heads_folder import save_heads
from caft_plugin.drafting.decoding import Drafted
from caft_plugin.serving.recommendation import kept
from caft_plugin.tools.cli import commands
from caft_plugin.tools.speculate import HEADS, LOOKUP, PLAIN, as_table, speculate

PROMPTS = [[5, 6, 7, 8], [9, 10, 11], [12, 13, 12, 13, 12]]
NEW = 20


@pytest.fixture
def model():
    made = few_words_model()
    made.generation_config.eos_token_id = 1  # as the tokenizer has it
    return made


def compared(model, drafter, **settings):
    return speculate(
        model, word_tokenizer(TEMPLATE), {HEADS: drafter}, PROMPTS, max_new_tokens=NEW, **settings
    )


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_figures_are_those_of_the_texts(model, temperature):
    """Each way alone, by hand: tokens, calls of the model, texts."""
    drafter = drafter_of(model, num_draft=3)
    found = compared(model, drafter, runs=2, temperature=temperature, seed=3)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0}
        if temperature
        else {"do_sample": False}
    )
    plain, drafted, passes = [], Drafted.nothing(4), 0
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt])
        usual = {
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": NEW,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        torch.manual_seed(3 + number)
        plain.append(model.generate(ids, **usual, **sampling))
        torch.manual_seed(3 + number)
        model.generate(ids, **usual, **sampling, custom_generate=drafter)
        drafted += drafter.last
        passes += drafter.last.passes
    tokens = sum(text.shape[1] for text in plain) - sum(map(len, PROMPTS))
    assert found.texts == 6
    for name, way in found.ways.items():
        if name != LOOKUP or not temperature:  # prompt lookup draws other random numbers
            assert way.tokens == [tokens, tokens] and way.same == 6, (name, way)
        assert len(way.seconds) == 2 and min(way.seconds) > 0
    assert found.ways[PLAIN].passes == 2 * tokens and found.ways[PLAIN].tokens_per_pass == 1
    assert found.ways[HEADS].passes == 2 * passes < 2 * tokens
    drafted += dataclasses.replace(drafted)
    assert found.ways[HEADS].drafted == drafted and found.ways[PLAIN].drafted is None
    assert LOOKUP not in compared(model, drafter, runs=1, lookup=False).ways


@pytest.mark.parametrize("wiring", [{}, {"head_input": "final", "head_norm": False}])
def test_steps_are_those_of_a_drafter_that_always_sends(model, wiring):
    """What is computed from whole texts is what a drafter counts that writes them, for each number
    of draft tokens."""
    drafter = drafter_of(model, **wiring)
    steps = compared(model, drafter, runs=2, lookup=False).ways[HEADS].steps
    assert len(steps.steps) == 4 and steps.steps[0] > steps.steps[3]
    for number, counted in enumerate(steps.steps, 1):
        drafted = Drafted.nothing(4)
        always = drafter_of(model, num_draft=number, **wiring)
        way = compared(model, always, runs=1, lookup=False).ways[HEADS]
        drafted += way.drafted
        assert (
            (counted, steps.tokens)
            == (drafted.passes, drafted.tokens)
            == (way.passes, way.tokens[0])
        )
    assert steps.tokens_per_step()[0] == steps.tokens / steps.steps[0]


def test_heads_of_which_nothing_is_accepted(model):
    found = compared(model, drafter_of(model, num_draft=4), runs=1, lookup=False)
    assert "No draft token was accepted" not in as_table(found)
    found.ways[HEADS].drafted.accepted = [0, 0, 0, 0]
    assert "No draft token was accepted" in as_table(found)


def test_texts_that_differ_are_counted(model, monkeypatch):
    """The greatest fault there could be: a drafter that writes something else."""
    drafter = drafter_of(model)
    monkeypatch.setattr(
        type(drafter),
        "__call__",
        lambda self, model, input_ids, *a, **k: torch.cat([input_ids, input_ids], 1),
    )
    found = compared(model, drafter, runs=1, lookup=False)
    assert found.ways[HEADS].same == 0 and found.ways[PLAIN].same == 3


@pytest.fixture
def folder(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    word_tokenizer(TEMPLATE).save_pretrained(tmp_path / "model")
    drafter = drafter_of(model)
    save_heads(tmp_path / "run", drafter.heads, drafter.trunk, drafter.config, resumable=False)
    lines = [
        {
            "messages": [
                {"role": "user", "content": "w3 w4"},
                {"role": "assistant", "content": "w5"},
            ]
        },
        {"prompt": "w3 w4 w5"},
        {"text": "w7 w8 w9"},
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def run(folder, *arguments):
    paths = {
        "model": folder / "model",
        "heads": folder / "run",
        "prompts": folder / "prompts.jsonl",
    }
    given = [
        part
        for name, path in paths.items()
        for part in (f"--{name}", path)
        if f"--{name}" not in arguments
    ]
    return CliRunner().invoke(commands, [*map(str, ["speculate", *given, "--float32", *arguments])])


def test_the_command(folder):
    result = run(
        folder, "--max-new-tokens", "9", "--runs", "1", "--png", folder / "out" / "heads.png"
    )
    assert result.exit_code == 0, result.output
    table = result.stdout
    assert "3 prompts, runs over them: 1, greedy, at most 9 tokens\nfloat32 on " in table
    assert re.search(r"^plain +[\d.]+ +1\.00 +1\.00$", table, re.M)
    assert re.search(r"^with the heads +[\d.]+ +[\d.]+ +[\d.]+  3 of 3$", table, re.M)
    assert re.search(r"^prompt lookup +[\d.]+ +[\d.]+ +[\d.]+  3 of 3$", table, re.M)
    assert re.search(r"^4 +5 ahead +[\d,]+ +[\d,]+ +(-|[\d.]+%)$", table, re.M)
    assert re.search(
        r"^tokens in a step: 1 in \d+%, 2 in \d+%, 3 in \d+%, 4 in \d+%, 5 in \d+%$", table, re.M
    )
    assert (folder / "out" / "heads.png").read_bytes().startswith(b"\x89PNG")
    said = re.search(
        r"number of draft tokens: 1: ([\d.]+), 2: ([\d.]+), 3: ([\d.]+), 4: ([\d.]+)$", table, re.M
    )
    found = kept(folder / "run" / "caft_heads")
    assert [f"{tokens:.2f}" for tokens in found.tokens_per_step] == list(said.groups())
    assert (found.model, found.prompts, found.temperature) == (str(folder / "model"), 3, 0)
    assert "generating: 100%" in result.stderr and "counting steps: 100%" in result.stderr
    assert (
        f"Saved the tokens per step in {folder / 'run' / 'caft_heads' / 'drafting.json'}" in table
    )
    assert (
        "2 prompts, runs over them: 1"
        in run(folder, "--limit", "2", "--runs", "1", "--temperature", "0.5").stdout
    )


def test_a_folder_that_cannot_be_written_to(folder):
    (folder / "run" / "caft_heads" / "drafting.json").mkdir()
    result = run(folder, "--max-new-tokens", "4", "--runs", "1")
    assert result.exit_code == 0, result.output
    assert (
        "Not saved for `caft export-drafter`: " in result.stdout
        and "drafting.json" in result.stdout
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads", "./nowhere"], "Error: --heads: got './nowhere', which is not a folder"),
        (
            ["--num-draft", "5"],
            "num_draft: got 5, but it accepts 0 to 4, the number of heads, or None",
        ),
        (["--prompts", "nowhere.jsonl"], "--prompts: nowhere.jsonl cannot be read"),
        (["nowhere.yml"], "speculate: nowhere.yml is not a file. CONFIG must be an Axolotl YAML."),
    ],
)
def test_bad_input(folder, arguments, message):
    result = run(folder, *arguments)
    assert result.exit_code == 1 and message in result.stderr
    assert "Traceback" not in result.output


def test_bad_prompts(folder):
    for content, message in {
        "": "--prompts: .* is empty. Give a JSONL file",
        '{"prompt": ""}\n': "--prompts: line 1 of .* is not a row .*its prompt has no tokens",
        '{"text": "w1"}\n{"question": 1}\n': "--prompts: line 2 of .* is not a row",
    }.items():
        (folder / "bad.jsonl").write_text(content)
        result = run(folder, "--prompts", folder / "bad.jsonl")
        assert result.exit_code == 1 and re.search(message, result.stderr)


def test_what_is_needed_without_a_config():
    result = CliRunner().invoke(commands, ["speculate", "--model", "m", "--heads", "h"])
    assert result.exit_code == 2 and "--prompts is required if no CONFIG is given" in result.stderr
