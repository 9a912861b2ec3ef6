"""`caft export-drafter`: what is written, from which files, and what is refused before anything is.
No engine is run here: tests/serving does that."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config, Qwen3Config

from builders.quantised import quantise
from builders.tiny import LLAMA
from caft_plugin import CAFTConfig, ConfigError
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.model.trunk import find_trunk
from caft_plugin.serving.export import export_drafter
from caft_plugin.serving.recommendation import keep
from caft_plugin.tools.cli import commands

HEADS = 3
FIGURES = {
    "model": "mine",
    "weights": "0" * 64,
    "prompts": 7,
    "temperature": 0.0,
    "tokens_per_step": [1.5],
}


def made(folder, config=None, model=None, num_heads=HEADS, **wiring):
    """A model's folder and, in the same, its heads."""
    if model is None:
        model = AutoModelForCausalLM.from_config(config or LlamaConfig(**LLAMA))
    model.save_pretrained(folder, max_shard_size="40KB")
    trunk = find_trunk(model)
    settings = resolve_wiring(CAFTConfig(num_heads=num_heads, train_heads="frozen", **wiring), None)
    heads = build_heads(model, trunk, settings, seed=0)
    save_heads(folder, heads, trunk, settings, resumable=False)
    return model, heads


def written(folder):
    return json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_heads_as_layers(tmp_path, dtype):
    """Weights keep their dtype; the model's file is in shards."""
    model, heads = made(
        tmp_path / "out", model=AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).to(dtype)
    )
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    guide = export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter")
    config, tensors = written(tmp_path / "drafter")
    assert config["architectures"] == ["CaftHeadsEagle3"] and config["num_hidden_layers"] == HEADS
    assert config["eagle_aux_hidden_state_layer_ids"] == [LLAMA["num_hidden_layers"] - 1]
    assert config["mask_token_id"] == LLAMA["vocab_size"]
    assert torch.equal(tensors["norm.weight"], model.model.norm.weight)
    for k, layer in enumerate(heads.layers):
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensors[f"layers.{k}.{name}"], tensor) and tensor.dtype == dtype
    assert guide == (tmp_path / "drafter" / "README.md").read_text()
    assert '"num_speculative_tokens": 3, "parallel_drafting": true}' in guide


def test_head_1_as_an_eagle3_layer(tmp_path):
    made(tmp_path / "out", Qwen2Config(**LLAMA))
    guide = export_drafter(
        str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter", "eagle3"
    )
    config, tensors = written(tmp_path / "drafter")
    hidden = LLAMA["hidden_size"]
    assert (
        config["architectures"] == ["LlamaForCausalLMEagle3"] and config["attention_bias"] is True
    )
    assert config["draft_vocab_size"] is None and config["num_hidden_layers"] == 1
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [
        LLAMA["num_hidden_layers"] - 2
    ]
    query = tensors["midlayer.self_attn.q_proj.weight"]
    assert (
        query.shape == (hidden, 2 * hidden)
        and not query[:, :hidden].any()
        and query[:, hidden:].any()
    )
    assert torch.equal(tensors["fc.weight"], torch.eye(hidden))
    assert not tensors["midlayer.self_attn.o_proj.bias"].any()
    assert "sglang.launch_server" in guide and '"num_speculative_tokens": 1}' in guide


def test_the_authors_wiring_reads_the_last_layers_output(tmp_path):
    made(tmp_path / "out", Qwen3Config(**LLAMA), head_input="final", head_norm=False)
    export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter", num_heads=2)
    config, tensors = written(tmp_path / "drafter")
    assert config["eagle_aux_hidden_state_layer_ids"] == [LLAMA["num_hidden_layers"]]
    assert (
        config["caft_heads"]["head_input"] == "final" and config["caft_heads"]["head_norm"] is False
    )
    assert config["num_hidden_layers"] == 2 and not any(
        name.startswith("layers.2.") for name in tensors
    )
    assert "layers.1.self_attn.q_norm.weight" in tensors


@pytest.mark.parametrize("trains_norm", [False, True])
def test_an_adapters_folder(tmp_path, trains_norm):
    """The norm is the base's, or the adapter's where that trains it."""
    base = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA))
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    more = {"modules_to_save": ["norm"]} if trains_norm else {}
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], **more))
    if trains_norm:
        model.model.norm.modules_to_save["default"].weight.data += 1
    made(tmp_path / "out", model=tuned)
    guide = export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter")
    _, tensors = written(tmp_path / "drafter")
    assert torch.equal(tensors["norm.weight"], base.model.norm.weight + trains_norm)
    assert (
        f"vllm serve {tmp_path}/base --enable-lora --lora-modules tuned={tmp_path}/out --spec"
        in guide
    )


def row(guide, number):
    """Of the guide's table: tokens per step and speed with this number of draft tokens."""
    found = re.search(rf"^\| {number} \| ([\d.]+) \| ([\d.]+) \|$", guide, re.M)
    return float(found[1]), float(found[2])


@pytest.mark.parametrize("tokens", [[1.5, 1.8, 1.81], [1.5, 2.4, 3.6], [1.0, 1.0, 1.0]])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shards", [False, True])
def test_the_number_of_draft_tokens_is_recommended_by_what_speculate_found(
    tmp_path, tokens, tied, shards
):
    """A step reads the model's weights (not the embedding), a head's for each draft token, and the
    unembedding's."""
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "tie_word_embeddings": tied}))
    made(tmp_path / "out", model=model)
    if not shards:
        for file in (tmp_path / "out").glob("model*"):
            file.unlink()
        model.save_pretrained(tmp_path / "out")
    head = sum(parameter.numel() for parameter in model.model.layers[-1].parameters())
    unembedding = model.lm_head.weight.numel()
    read = sum(parameter.numel() for parameter in model.parameters()) - (0 if tied else unembedding)
    keep(tmp_path / "out" / "caft_heads", "mine", 7, 0.0, tokens)
    guide = export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter")
    speeds = [sum_ / (1 + (n * head + unembedding) / read) for n, sum_ in enumerate(tokens, 1)]
    for number, (brings, speed) in enumerate(zip(tokens, speeds, strict=True), 1):
        assert row(guide, number) == pytest.approx((brings, speed), abs=0.006)  # two digits
    assert "measured, with mine on 7 prompts at temperature 0:" in guide
    few = min(number for number in (1, 2, 3) if speeds[number - 1] >= 0.95 * max(speeds))
    assert (
        f'"num_speculative_tokens": {few}, ' in guide and f"It proposes {few} draft token" in guide
    )
    assert ("Serving with these heads is slower" in guide) == (max(speeds) <= 1)


def test_fewer_heads_than_would_be_fastest(tmp_path):
    made(tmp_path / "out")
    keep(tmp_path / "out" / "caft_heads", "mine", 7, 0.0, [2.0, 3.0, 4.0])
    guide = export_drafter(
        str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter", num_heads=2
    )
    assert '"num_speculative_tokens": 2, ' in guide and "| 3 |" not in guide
    guide = export_drafter(
        str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "eagle3", "eagle3"
    )
    assert (
        '"num_speculative_tokens": 1}' in guide and "| 1 | 2.00 |" in guide and "| 2 |" not in guide
    )


def test_heads_saved_again_are_not_recommended_by_what_their_predecessors_did(tmp_path):
    model, heads = made(tmp_path / "out")
    keep(tmp_path / "out" / "caft_heads", "mine", 7, 0.0, [2.0, 2.0, 2.0])
    config = resolve_wiring(CAFTConfig(num_heads=HEADS, train_heads="frozen"), None)
    save_heads(tmp_path / "out", heads, find_trunk(model), config, resumable=False)
    guide = export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter")
    assert '"num_speculative_tokens": 3, ' in guide


def test_without_what_speculate_finds_all_heads_draft(tmp_path):
    made(tmp_path / "out")
    guide = export_drafter(str(tmp_path / "out"), str(tmp_path / "out"), tmp_path / "drafter")
    assert '"num_speculative_tokens": 3, ' in guide and "To measure it, run" in guide


def speculated(folder, content=None, further=False):
    """A heads folder in which `caft speculate` has left its figures, and what went wrong with
    them."""
    folder /= "caft_heads"
    keep(folder, "mine", 7, 0.0, [1.5, 1.8, 2.0])
    if content is not None:
        (folder / "drafting.json").write_text(content)
    if further:
        tensors = load_file(folder / "heads.safetensors")
        save_file(
            {name: tensor + 1 for name, tensor in tensors.items()}, folder / "heads.safetensors"
        )
    return str(folder)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_heads_of_a_quantised_model_stay_plain(tmp_path, scheme):
    """The model was quantised after its heads were trained over it. Its final norm still tells
    whose it is."""
    model, heads = made(tmp_path / "out", LlamaConfig(**LLAMA))
    model.save_pretrained(tmp_path / "model")
    quantise(tmp_path / "model", scheme)
    export_drafter(str(tmp_path / "model"), str(tmp_path / "out"), tmp_path / "drafter")
    config, tensors = written(tmp_path / "drafter")
    assert "quantization_config" not in config
    for name, tensor in heads.layers[0].state_dict().items():
        assert torch.equal(tensors[f"layers.0.{name}"], tensor)
    with torch.no_grad():
        model.model.norm.weight.mul_(torch.rand_like(model.model.norm.weight))
    model.save_pretrained(tmp_path / "other")
    quantise(tmp_path / "other", scheme)
    with pytest.raises(ConfigError, match="trained with another last layer or final norm than"):
        export_drafter(
            str(tmp_path / "other"), str(tmp_path / "out"), tmp_path / "drafter of another"
        )
    assert not (tmp_path / "drafter of another").exists()


def of_kind(folder, config):
    made(folder, config)
    return folder


def another(folder):
    torch.manual_seed(5)
    AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).save_pretrained(folder)
    return folder


def full(folder):
    folder.mkdir()
    (folder / "kept.txt").write_text("mine")
    return folder


def with_unknown_tensor(folder):
    file = folder / "caft_heads" / "heads.safetensors"
    save_file({**load_file(file), "9.extra": torch.zeros(1)}, file)
    return folder


# name: (how the model and its heads are made, what is asked for besides, the error)
BAD = {
    "no heads": ({}, lambda t: {"heads": str(t / "out" / "nothing")}, "heads: got"),
    "a folder without heads": ({}, lambda t: {"heads": str(another(t / "other"))}, "heads: got"),
    "heads of another base": (
        {},
        lambda t: {"model": str(another(t / "other"))},
        "trained with another last layer",
    ),
    "a damaged file of heads": (
        {},
        lambda t: {"heads": str(with_unknown_tensor(t / "out"))},
        "unknown tensor 9.extra",
    ),
    "heads trained further": (
        {},
        lambda t: {"heads": speculated(t / "out", further=True)},
        "drafting.json was written for other heads than those in",
    ),
    "damaged figures": (
        {},
        lambda t: {"heads": speculated(t / "out", '{"tokens_per_step": "many"')},
        "Run `caft speculate` again with these heads, or remove",
    ),
    **{
        f"figures of another kind: {key} {value}": (
            {},
            lambda t, key=key, value=value: {
                "heads": speculated(t / "out", json.dumps({**FIGURES, key: value}))
            },
            "drafting.json cannot be read",
        )
        for key, value in [
            *(
                ("tokens_per_step", found)
                for found in ([], [0.5], [math.nan], [math.inf], "many", [[1.5]], None)
            ),
            ("prompts", 0),
            ("temperature", -1),
            ("weights", None),
            ("more", 1),
        ]
    },
    "figures that are no JSON": (
        {},
        lambda t: {"heads": speculated(t / "out", "\x00[" * 1000)},
        "drafting.json cannot be read",
    ),
    "figures that are too long": (
        {},
        lambda t: {"heads": speculated(t / "out", " " * 200_000)},
        "drafting.json is longer than",
    ),
    "another size": (
        {},
        lambda t: {"model": str(of_kind(t / "wide", LlamaConfig(**{**LLAMA, "hidden_size": 64})))},
        "was made for hidden_size 32",
    ),
    "another family's heads": (
        {},
        lambda t: {"model": str(of_kind(t / "qwen", Qwen3Config(**LLAMA)))},
        "are of class LlamaDecoderLayer",
    ),
    "no norm in EAGLE-3": (
        {"head_norm": False},
        lambda t: {"form": "eagle3"},
        "form: got eagle3, but the heads in",
    ),
    "an unsupported family": (
        {"config": Gemma2Config(**LLAMA, head_dim=8)},
        lambda t: {},
        "got a model of type gemma2, but heads can be served for llama, mistral, qwen2, qwen3",
    ),
    "a sliding window": (
        {
            "config": Qwen2Config(
                **LLAMA, use_sliding_window=True, sliding_window=8, max_window_layers=0
            )
        },
        lambda t: {},
        "attends to a sliding window",
    ),
    "more heads than there are": (
        {},
        lambda t: {"num_heads": 4},
        "num_heads: got 4, but it accepts 1 to 3",
    ),
    "two heads in EAGLE-3": (
        {},
        lambda t: {"form": "eagle3", "num_heads": 2},
        "num_heads: got 2, but it accepts 1,",
    ),
    "a folder in use": ({}, lambda t: {"output": full(t / "drafter")}, "exists and is not empty"),
    "no such model": ({}, lambda t: {"model": str(t / "nothing")}, "model: got "),
    "no network": (
        {},
        lambda t: {"model": "nobody/nothing"},
        "model: got 'nobody/nothing', whose config could not be",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_served_is_refused_before_anything_is_written(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    how, asked, message = BAD[name]
    made(tmp_path / "out", **how)
    out = str(tmp_path / "out")
    arguments = {"model": out, "heads": out, "output": tmp_path / "drafter", **asked(tmp_path)}
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ConfigError) as caught:
        export_drafter(**arguments)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_the_command(tmp_path):
    made(tmp_path / "out")
    out, drafter = str(tmp_path / "out"), str(tmp_path / "drafter")
    result = CliRunner().invoke(
        commands, ["export-drafter", "--model", out, "--heads", out, "--output", drafter]
    )
    assert result.exit_code == 0 and f"vllm serve {out} --speculative-config '{{" in result.output
    again = CliRunner().invoke(
        commands, ["export-drafter", "--model", out, "--heads", out, "--output", drafter]
    )
    assert again.exit_code == 1 and "Error: --output: " in again.output
    missing = CliRunner().invoke(commands, ["export-drafter", "--model", out, "--output", drafter])
    assert missing.exit_code == 2 and "--heads is required if no CONFIG is given" in missing.output


@pytest.mark.parametrize("name", ["heads", "model", "num_heads", "output"])
def test_messages_name_arguments_as_the_caller_does(tmp_path, name):
    """The command's options, and the function's parameters."""
    made(tmp_path / "out")
    out = str(tmp_path / "out")
    wrong = {"num_heads": 9, "output": out}.get(name, str(tmp_path / "nowhere"))
    arguments = {"model": out, "heads": out, "output": str(tmp_path / "drafter"), name: wrong}
    options = [
        part
        for key, value in arguments.items()
        for part in (f"--{key.replace('_', '-')}", str(value))
    ]
    result = CliRunner().invoke(commands, ["export-drafter", *options])
    assert result.output.startswith(f"Error: --{name.replace('_', '-')}: "), result.output
    with pytest.raises(ConfigError, match=f"^{name}: "):
        export_drafter(**{**arguments, "output": Path(arguments["output"])})


def test_damaged_figures_are_named_after_the_heads(tmp_path):
    """Also in the files that are read after the heads' own."""
    made(tmp_path / "out")
    speculated(tmp_path / "out", "{}")
    out = str(tmp_path / "out")
    options = ["--model", out, "--heads", out, "--output", str(tmp_path / "drafter")]
    assert (
        CliRunner()
        .invoke(commands, ["export-drafter", *options])
        .output.startswith("Error: --heads: ")
    )
    with pytest.raises(ConfigError, match="^heads: .*drafting.json cannot be read"):
        export_drafter(out, out, tmp_path / "drafter")
