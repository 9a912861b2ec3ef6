"""A model's own MTP layers are put back into what transformers saves without them."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM

from builders.mtp import LAYOUTS, publish, qwen, tensors_in
from caft_plugin.errors import ConfigError
from caft_plugin.mtp.checkpoint import Checkpoint
from caft_plugin.mtp.keep import Base, keep_mtp, mtp_names
from caft_plugin.tools.cli import commands


@pytest.fixture(params=list(LAYOUTS))
def published(request, tmp_path):
    return tmp_path / "base", publish(request.param, tmp_path / "base")


def fine_tuned(base, folder, shard="5GB"):
    """What transformers saves of a model that was changed."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_saved_model_has_the_bases_names_again(published, tmp_path, shard):
    base, tensors = published
    out = tmp_path / "out"
    model = fine_tuned(base, out, shard)
    without = tensors_in(out)
    assert set(tensors).isdisjoint(without), "transformers saved them itself"
    kept = keep_mtp(Base.open(str(base), "base"), out, "model")

    found = tensors_in(out)
    assert set(found) == set(tensors_in(base)) and set(kept.names) == set(tensors)
    for name, value in without.items():
        assert torch.equal(found[name], value), name
    own = {
        "embed_tokens": model.model.embed_tokens.weight,
        "shared_head.head": model.lm_head.weight,
    }
    for name, value in tensors.items():
        copied = next((own[part] for part in own if f".{part}." in name), value)
        assert torch.equal(found[name], copied.bfloat16()), name
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

    names = sorted(file.name for file in out.glob("*.safetensors"))
    number = len(names)
    assert names == [f"model-{k:05d}-of-{number:05d}.safetensors" for k in range(1, number + 1)]
    about = json.loads((out / "model.safetensors.index.json").read_text())["metadata"]
    assert about["total_size"] == sum(value.nbytes for value in found.values())
    assert about["total_parameters"] == sum(value.numel() for value in found.values())


def test_a_second_time_changes_nothing_and_a_second_save_is_completed_again(published, tmp_path):
    base, _ = published
    out = tmp_path / "out"
    model = fine_tuned(base, out, "40KB")
    keep_mtp(Base.open(str(base), "base"), out, "model")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}
    kept = keep_mtp(Base.open(str(base), "base"), out, "model")
    assert not kept.names and "already" in str(kept)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in out.iterdir()}

    model.save_pretrained(out)
    keep_mtp(Base.open(str(base), "base"), out, "model")
    assert set(tensors_in(out)) == set(tensors_in(base))


def test_stale_copies_of_the_embedding_are_replaced(published, tmp_path):
    base, tensors = published
    copies = {name for name in tensors if "embed_tokens" in name or "shared_head.head" in name}
    if not copies:
        pytest.skip("this layout holds no copies")
    out = tmp_path / "out"
    model = fine_tuned(base, out)
    Checkpoint.open(str(out), "model").put(tensors)  # copied by hand, with the base's copies
    kept = keep_mtp(Base.open(str(base), "base"), out, "model")
    assert set(kept.names) == copies
    found = tensors_in(out)
    name = "model.layers.2.embed_tokens.weight"
    assert torch.equal(found[name], model.model.embed_tokens.weight.bfloat16())


@pytest.mark.parametrize("step", ["save_file", "_second_name", "write_json", "unlink"])
def test_an_interruption_leaves_a_complete_model(published, tmp_path, monkeypatch, step):
    base, _ = published
    out = tmp_path / "out"
    model = fine_tuned(base, out, "40KB")

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        where = "pathlib.Path" if step == "unlink" else "caft_plugin.mtp.checkpoint"
        patched.setattr(f"{where}.{step}", stop)
        with pytest.raises(KeyboardInterrupt):
            keep_mtp(Base.open(str(base), "base"), out, "model")
    again = AutoModelForCausalLM.from_pretrained(out)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    keep_mtp(Base.open(str(base), "base"), out, "model")
    assert set(tensors_in(out)) == set(tensors_in(base))


def test_an_announcement_that_a_tool_removed_is_back(published, tmp_path):
    base, _ = published
    out = tmp_path / "out"
    fine_tuned(base, out)
    key = next(
        key
        for key in ("mtp_num_hidden_layers", "num_nextn_predict_layers")
        if key in json.loads((base / "config.json").read_text())
    )
    config = json.loads((out / "config.json").read_text())
    del config[key]
    (out / "config.json").write_text(json.dumps(config))
    kept = keep_mtp(Base.open(str(base), "base"), out, "model")
    assert kept.announced == (key,)
    assert json.loads((out / "config.json").read_text())[key] == 1


def test_quantised_tensors_are_copied_with_their_scales(published, tmp_path):
    base, tensors = published
    name = sorted(name for name in tensors if name.endswith("q_proj.weight"))[0]
    raw = {
        name: torch.randint(0, 255, tensors[name].shape, dtype=torch.uint8).view(
            torch.float8_e4m3fn
        ),
        f"{name}_scale_inv": torch.rand(1, 1),
    }
    Checkpoint.open(str(base), "base").put(raw)
    out = tmp_path / "out"
    fine_tuned(base, out)
    keep_mtp(Base.open(str(base), "base"), out, "model")
    found = tensors_in(out)
    for key, value in raw.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key].view(torch.uint8), value.view(torch.uint8))


# -- what is refused -------------------------------------------------------------------------------


def test_a_base_without_mtp_layers(tmp_path):
    qwen().save_pretrained(tmp_path / "base")
    with pytest.raises(
        ConfigError, match=r"--base: .* has no MTP layers .* layers\.2\.\* and above"
    ):
        Base.open(str(tmp_path / "base"), "--base")


def test_an_adapter(published, tmp_path):
    base, _ = published
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="--model: .* is an adapter, and lacks nothing"):
        keep_mtp(Base.open(str(base), "--base"), tmp_path / "adapter", "--model")


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 64), ("num_hidden_layers", 1)])
def test_another_models_folder(published, tmp_path, key, value):
    base, _ = published
    out = tmp_path / "out"
    fine_tuned(base, out)
    config = json.loads((out / "config.json").read_text()) | {key: value}
    (out / "config.json").write_text(json.dumps(config))
    before = {file: file.read_bytes() for file in out.iterdir()}
    with pytest.raises(ConfigError, match=f"was not fine-tuned from .*{key}: {value} .base:"):
        keep_mtp(Base.open(str(base), "--base"), out, "--model")
    assert before == {file: file.read_bytes() for file in out.iterdir()}


def test_weights_in_other_files_and_broken_ones(published, tmp_path):
    base, _ = published
    out = tmp_path / "out"
    model = fine_tuned(base, out)
    (out / "model.safetensors").unlink()
    torch.save(model.state_dict(), out / "pytorch_model.bin")
    with pytest.raises(
        ConfigError, match="--model: .* has neither model.safetensors.index.json nor"
    ):
        keep_mtp(Base.open(str(base), "--base"), out, "--model")
    (out / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(
        ConfigError, match="--model: got .*, whose weights could not be read .SafetensorError"
    ):
        keep_mtp(Base.open(str(base), "--base"), out, "--model")
    next(iter(sorted(base.glob("model-*.safetensors"), reverse=True))).unlink()
    fine_tuned_again = tmp_path / "again"
    model.save_pretrained(fine_tuned_again)
    with pytest.raises(ConfigError, match="--base: .* has no model-.*, which its index names"):
        keep_mtp(Base.open(str(base), "--base"), fine_tuned_again, "--model")


def test_names_of_families():
    config = {"num_hidden_layers": 4}
    mtp = [
        "mtp.fc.weight",
        "model.mtp.layers.0.enorm.weight",
        "model.mtp_layers.0.input_proj.weight",
        "model.mtp_block.0.mlp.up_proj.weight",
        "model.layers.4.eh_proj.weight",
        "model.language_model.layers.5.enorm.weight",
    ]
    others = [
        "model.layers.3.mlp.up_proj.weight",
        "model.visual.layers.7.norm.weight",
        "visual.blocks.9.norm.weight",
        "vision_tower.layers.6.weight",
        "lm_head.weight",
    ]
    assert mtp_names([*others, *mtp], config) == tuple(sorted(mtp))
    assert mtp_names(mtp, {"text_config": config, "vision_config": {"num_hidden_layers": 1}})


def test_the_command(published, tmp_path):
    base, tensors = published
    out = tmp_path / "out"
    fine_tuned(base, out)
    command = ["keep-mtp", "--base", str(base), "--model", str(out)]
    first, second = (CliRunner().invoke(commands, command) for _ in range(2))
    assert first.exit_code == second.exit_code == 0, first.output + second.output
    assert first.output.startswith(f"mtp: put {len(tensors)} MTP tensors (")
    assert second.output == f"mtp: {out} has every MTP tensor of its base already\n"
    refused = CliRunner().invoke(commands, [*command[:3], "--model", str(tmp_path / "nowhere")])
    assert refused.exit_code == 1
    assert "--model: got" in refused.output and "whose config could not be read" in refused.output
