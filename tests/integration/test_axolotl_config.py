"""Axolotl's own config loading with our plugin, in this process: bad blocks, bad models, ready YAMLs."""

from __future__ import annotations

import pytest
import yaml
from paths import ROOT
from transformers import LlamaConfig, T5Config

from caft_plugin import ConfigError

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

READY = sorted((ROOT / "axolotl_configs").glob("*.yml"))
H100 = {"bf16": True, "fp8": True, "n_gpu": 8, "n_node": 1, "compute_capability": "sm_90", "tf32": True}
ENVIRONMENT = {"torch_version": "2.13.0"}


@pytest.fixture(autouse=True)
def no_plugins_left():
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@pytest.fixture
def config(tmp_path):
    LlamaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2).save_pretrained(tmp_path)

    def write(**changes):
        content = {
            "base_model": str(tmp_path),
            "plugins": ["caft_plugin"],
            "datasets": [{"path": "x.jsonl", "type": "chat_template"}],
            "sequence_len": 64,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "max_steps": 1,
            "learning_rate": 1e-4,
            "bf16": False,
            "fp16": False,
            "output_dir": str(tmp_path / "out"),
            **changes,
        }
        file = tmp_path / "config.yml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


def before_weights(file):
    """What `axolotl train` does before it loads data and weights."""
    cfg = load_cfg(str(file))
    assert PluginManager.get_instance().load_datasets(cfg, preprocess=False) is None
    return cfg


@pytest.mark.parametrize(
    ("name", "block", "message"),
    [
        ("caft", {"num_heads": 0}, "caft.num_heads: got 0, but it takes a whole number at least 1 and at most 32."),
        ("caft", {"num_heads": -1}, "caft.num_heads: got -1, but it takes a whole number at least 1 and at most 32."),
        ("caft", {"beta": -1}, "caft.beta: got -1, but it takes a number at least 0."),
        ("caft", {"alpha": 1.5}, "caft.alpha: got 1.5, but it takes a number above 0 and at most 1."),
        ("caft", {"schedule": "cosine"}, "caft.schedule: got 'cosine', but it takes one of rsine, sine, linear, con"),
        ("caft", 7, "caft: got 7, but it takes a block of keys"),
        ("meap", {"mask_ratio": 0}, "meap.mask_ratio: got 0, but it takes a number above 0 and below 1."),
        ("meap", {"layout": "concta"}, "meap.layout: got 'concta', but it takes one of concat, separate."),
        ("meap", {"masks": 1}, "meap.masks: unknown key. Accepted keys: mode, mask_ratio, layout, min_answer_tokens"),
        ("meap", [], "meap: got [], but it takes a block of keys"),
    ],
)
def test_bad_blocks(config, name, block, message):
    with pytest.raises(ConfigError) as caught:
        load_cfg(str(config(**{name: block})))
    assert message in str(caught.value)


@pytest.mark.parametrize("block", [{"mode": "pretrain"}, None, {"layout": "separate"}])
def test_masks_with_a_processor(config, block):
    with pytest.raises(ConfigError, match="meap: cannot be used together with `processor_type: AutoProcessor`"):
        load_cfg(str(config(meap=block, processor_type="AutoProcessor")))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"pretraining_dataset": "x.jsonl", "datasets": None}, "pretraining_dataset"),
        ({"streaming": True, "sample_packing": True}, "streaming"),
    ],
)
def test_pairs_cannot_be_made_where_rows_are_packed_while_read(config, changes, key):
    with pytest.raises(ConfigError, match=f"meap.mode: got sft, but `{key}` packs its rows"):
        load_cfg(str(config(meap=None, **changes)))


@pytest.mark.parametrize("block", ["caft", "meap"])
@pytest.mark.parametrize("other", [{"rl": "dpo"}, {"reward_model": True}, {"process_reward_model": True}])
def test_other_kinds_of_training(config, other, block):
    with pytest.raises(ConfigError, match=f"{block}: cannot be used together with"):
        load_cfg(str(config(**{block: {}}, **other)))


@pytest.mark.parametrize("key", ["context_parallel_size", "sequence_parallel_degree", "tensor_parallel_size"])
def test_processes_that_share_one_models_work(config, key):
    with pytest.raises(ConfigError, match=f"caft: got {key}: 2, but it takes 1"):
        load_cfg(str(config(caft={}, **{key: 2})))


def test_bare_blocks_survive(config):
    cfg = before_weights(config(caft=None))
    assert cfg.caft is not None and cfg.caft.num_heads == 4 and cfg.meap is None
    cfg = load_cfg(str(config(meap=None)))
    assert cfg.meap is not None and cfg.meap.min_answer_tokens == 51 and cfg.caft is None
    assert PluginManager.get_instance().get_trainer_cls(cfg) is not None


def test_without_a_block_it_warns(config, caplog):
    cfg = before_weights(config())
    assert cfg.caft is None
    assert PluginManager.get_instance().get_trainer_cls(cfg) is None


def test_heads_folder_is_checked_before_weights_load(config, tmp_path):
    with pytest.raises(ConfigError, match=r"caft.heads: got './nowhere', which is not a folder"):
        before_weights(config(caft={"heads": "./nowhere"}))
    folder = tmp_path / "heads"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"has no readable config.json"):
        before_weights(config(caft={"heads": str(folder)}))
    (folder / "config.json").write_text(
        '{"format_version": 1, "num_heads": 4, "head_input": "final", "head_norm": false, "layer_class": '
        '"LlamaDecoderLayer", "model_type": "llama", "hidden_size": 64, "vocab_size": 97, "base_model": "m"}'
    )
    with pytest.raises(ConfigError, match="made for hidden_size 64 .* but this model has hidden_size 32"):
        before_weights(config(caft={"heads": str(folder)}))


def test_encoder_decoder_is_refused_before_weights_load(config, tmp_path):
    file = config(caft={})
    T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="is an encoder-decoder model"):
        before_weights(file)


def test_another_plugins_trainer_stops_the_run(config):
    from axolotl.integrations.base import BasePlugin
    from transformers import Trainer

    class Other(BasePlugin):
        def get_trainer_cls(self, cfg):
            return Trainer

    cfg = before_weights(config(caft={}))
    manager = PluginManager.get_instance()
    manager.plugins["other.Other"] = Other()
    with pytest.raises(ConfigError, match=r"other.Other brings a trainer of its own"):
        manager.get_trainer_cls(cfg)


@pytest.mark.parametrize("file", READY, ids=[file.name for file in READY])
def test_ready_configs_pass_axolotls_schema(file):
    raw = DictDefault(yaml.safe_load(file.read_text()))
    prepare_plugins(raw)
    cfg = validate_config(raw, capabilities=H100, env_capabilities=ENVIRONMENT)
    assert (cfg.caft is not None or cfg.meap is not None) and cfg.plugins == ["caft_plugin"]


def test_there_are_ready_configs():
    names = {file.name for file in READY}
    assert {"quickstart-cpu.yml", "llama-3.1-8b-qlora-24gb.yml", "llama-3.1-8b-full-fsdp2.yml"} <= names
    assert {"meap-sft.yml", "meap-pretrain.yml", "caft-meap.yml"} <= names
    assert "llama-3.1-70b-qlora-fsdp2-2nodes.yml" in names
