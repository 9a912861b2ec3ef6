from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from caft_plugin import CAFTConfig, ConfigError
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import HeadsFolder, load_checkpoint, resolve_wiring, save_heads
from caft_plugin.caft.heads_record import FOLDER, LORA, RECORD, WEIGHTS, locate_heads
from caft_plugin.files import write_atomically
from caft_plugin.model.trunk import find_trunk
from caft_plugin.serving.export import export_drafter


def make(model, **settings):
    config = resolve_wiring(CAFTConfig(**settings), None)
    trunk = find_trunk(model)
    heads = build_heads(model, trunk, config, seed=0)
    for parameter in heads.parameters():
        nn.init.normal_(parameter, std=0.1)
    return heads, trunk, config


@pytest.fixture
def folder(tiny_model, tmp_path):
    save_heads(tmp_path, *make(tiny_model), resumable=False)
    return tmp_path / FOLDER


def load(model, folder, **settings):
    heads, trunk, config = make(model, **settings)
    opened = HeadsFolder.open(folder)
    opened.refuse_other_model(config, model.config)
    opened.load_into(heads, trunk.layer_class)
    return heads


def test_a_models_folder_is_told_from_a_heads_folder(tiny_model, folder):
    """The likely slip: the merged model's folder given as heads."""
    tiny_model.save_pretrained(folder.parent / "merged")
    with pytest.raises(
        ConfigError,
        match=rf"merged, which is a model's folder without heads. Its heads are in {folder}",
    ):
        HeadsFolder.open(folder.parent / "merged")
    elsewhere = folder.parent / "elsewhere" / "model"
    tiny_model.save_pretrained(elsewhere)
    with pytest.raises(
        ConfigError, match="model's folder without heads. A run saves its heads in caft_heads/"
    ):
        HeadsFolder.open(elsewhere)
    keys = json.loads((elsewhere / "config.json").read_text())
    # What tells it is the keys, not the text: one without `architectures`, one that speaks of heads
    # somewhere inside.
    for other in (
        {"architectures": None},
        {"note": '"head_input"'},
        {"text_config": {"head_input": "final"}},
    ):
        (elsewhere / "config.json").write_text(json.dumps({**keys, **other}))
        with pytest.raises(ConfigError, match="model's folder without heads"):
            HeadsFolder.open(elsewhere)
    keys.pop("architectures")
    (elsewhere / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match="model's folder without heads"):
        HeadsFolder.open(elsewhere)


def test_a_drafters_folder_is_told_from_a_heads_folder(tiny_model, folder):
    tiny_model.save_pretrained(folder.parent)
    for form in ("vllm", "eagle3"):
        drafter = folder.parent / form
        export_drafter(str(folder.parent), str(folder), drafter, form, num_heads=1)
        with pytest.raises(
            ConfigError, match="which is a drafter's folder for an inference engine. Give the heads"
        ):
            HeadsFolder.open(drafter)


def test_a_damaged_record_is_no_models(folder):
    """Of a record that lacks a key, the message says which."""
    record = json.loads((folder / RECORD).read_text())
    record["architectures"] = ["LlamaForCausalLM"]
    del record["head_norm"]
    (folder / RECORD).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="is not a heads record .*head_norm: Field required"):
        HeadsFolder.open(folder)


def test_a_file_with_more_heads_serves_its_first_ones(tiny_model, folder):
    saved = load_file(folder / WEIGHTS)
    heads = load(tiny_model, folder, num_heads=2)
    for name, tensor in heads.layers.state_dict().items():
        assert torch.equal(tensor, saved[name])
    assert sorted({name.split(".")[0] for name in saved}) == ["0", "1", "2", "3"]


def test_lora_is_merged_at_the_end_and_kept_apart_in_a_checkpoint(tiny_model, tmp_path):
    heads, trunk, config = make(tiny_model, train_heads="lora")
    source = torch.randn(1, 5, 32)
    module = heads.layers[1].mlp.up_proj
    expected = module(source)
    save_heads(tmp_path / "final", heads, trunk, config, resumable=False)
    merged = load_file(tmp_path / "final" / FOLDER / WEIGHTS)
    torch.testing.assert_close(
        source @ merged["1.mlp.up_proj.weight"].T, expected, rtol=1e-5, atol=1e-5
    )
    assert not (tmp_path / "final" / FOLDER / LORA).exists()

    save_heads(tmp_path / "checkpoint-1", heads, trunk, config, resumable=True)
    other, _, _ = make(tiny_model, train_heads="lora")
    load_checkpoint(tmp_path / "checkpoint-1", other, config)
    for (name, ours), (_, theirs) in zip(
        heads.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    with pytest.raises(ConfigError, match="LoRA is not merged"):
        load(tiny_model, tmp_path / "checkpoint-1" / FOLDER)
    with pytest.raises(
        ConfigError, match="caft.train_heads: this run has full, but .* was made with lora"
    ):
        load_checkpoint(tmp_path / "checkpoint-1", make(tiny_model)[0], config)


def test_locate(folder, tmp_path, monkeypatch):
    assert locate_heads(str(folder)) == folder
    assert locate_heads(str(tmp_path)) == folder  # the folder of a finished run
    with pytest.raises(ConfigError, match=r"caft.heads: got './nowhere', which is not a folder"):
        locate_heads("./nowhere")
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="is not a folder"):
        locate_heads(str(file))
    with pytest.raises(ConfigError, match="neither a local folder nor a Hub id"):
        locate_heads("nobody/no-such-heads-anywhere")


def test_misfits_are_named(tiny_model, folder):
    opened = HeadsFolder.open(folder)
    with pytest.raises(
        ConfigError, match=r"caft.num_heads: got 5, but the folder .* holds 4 heads"
    ):
        opened.refuse_other_model(CAFTConfig(num_heads=5), tiny_model.config)
    config = LlamaConfig(**{**tiny_model.config.to_dict(), "hidden_size": 64})
    with pytest.raises(
        ConfigError, match="made for hidden_size 32 .* but this model has hidden_size 64"
    ):
        opened.refuse_other_model(CAFTConfig(), config)
    with pytest.raises(
        ConfigError, match="are of class LlamaDecoderLayer .* of class MistralDecoderLayer"
    ):
        HeadsFolder.open(folder).load_into(make(tiny_model)[0], "MistralDecoderLayer")
    wide = LlamaForCausalLM(
        LlamaConfig(**{**tiny_model.config.to_dict(), "intermediate_size": 128})
    )
    with pytest.raises(ConfigError, match=r"holds 0.mlp.down_proj.weight with shape \(32, 64\)"):
        load(wide, folder)


@pytest.mark.parametrize("tokens", [11, 128])
def test_heads_hold_no_vocabulary(tiny_model, folder, tokens):
    tiny_model.resize_token_embeddings(tokens)
    assert tiny_model.config.vocab_size == tokens != HeadsFolder.open(folder).record.vocab_size
    HeadsFolder.open(folder).refuse_other_model(CAFTConfig(), tiny_model.config)
    load(tiny_model, folder)


def damaged(folder, how):
    weights, record = folder / WEIGHTS, folder / RECORD
    # not the mapped file
    tensors = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    match how:
        case "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "cut header":
            weights.write_bytes(weights.read_bytes()[:6])
        case "pickle":
            torch.save(tensors, weights)
        case "no weights":
            weights.unlink()
        case "missing tensor":
            save_file({k: v for k, v in tensors.items() if k != "2.mlp.up_proj.weight"}, weights)
        case "extra tensor":
            save_file({**tensors, "2.mlp.bias": torch.ones(1)}, weights)
        case "no record":
            record.unlink()
        case "record of another kind":
            record.write_text('{"model_type": "llama"}')
        case "record not JSON":
            record.write_bytes(b"\xff\xfe\x00")
        case "record from the future":
            record.write_text(json.dumps({**json.loads(record.read_text()), "format_version": 2}))


@pytest.mark.parametrize(
    "how",
    [
        "truncated",
        "cut header",
        "pickle",
        "no weights",
        "missing tensor",
        "extra tensor",
        "no record",
        "record of another kind",
        "record not JSON",
        "record from the future",
    ],
)
def test_damage_is_named_and_nothing_changes(tiny_model, folder, how):
    damaged(folder, how)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ConfigError, match=r"caft.heads: .*caft_heads"):
        load(tiny_model, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_lora_on_transposed_weights_is_merged_the_right_way_round(tmp_path):
    """GPT-2's linear layers are Conv1D, weights (in, out); that of attention's output is square."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    )
    heads, trunk, config = make(model, train_heads="lora", num_heads=1)
    save_heads(tmp_path, heads, trunk, config, resumable=False)
    merged = load_file(tmp_path / FOLDER / WEIGHTS)
    source = torch.randn(1, 5, 32)
    for name in ("attn.c_proj", "attn.c_attn", "mlp.c_fc"):
        expected = heads.layers[0].get_submodule(name)(source)
        ours = source @ merged[f"0.{name}.weight"] + merged[f"0.{name}.bias"]
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
