"""Axolotl's own config loading with our plugin, in this process: bad blocks, bad models, ready
YAMLs."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from transformers import (
    BertConfig,
    Gemma3nConfig,
    Gemma3nTextConfig,
    LlamaConfig,
    MixtralConfig,
    RwkvConfig,
    T5Config,
)

from builders.paths import ROOT
from builders.tiny import LLAMA
from caft_plugin import ConfigError
from caft_plugin.caft.heads_folder import write_heads
from caft_plugin.caft.heads_record import HeadsRecord

pytest.importorskip("axolotl")

from axolotl.cli.config import load_cfg
from axolotl.integrations.base import PluginManager
from axolotl.utils.config import prepare_plugins, validate_config
from axolotl.utils.dict import DictDefault

from caft_plugin.axolotl import slips

READY = sorted((ROOT / "axolotl_configs").glob("*.yml"))
USERS = sorted((ROOT / "tests" / "integration" / "users").glob("*.yml"))
H100 = {
    "bf16": True,
    "fp8": True,
    "n_gpu": 8,
    "n_node": 1,
    "compute_capability": "sm_90",
    "tf32": True,
}
ENVIRONMENT = {"torch_version": "2.13.0"}


@pytest.fixture(autouse=True)
def no_plugins_left():
    PluginManager.get_instance().plugins.clear()
    yield
    PluginManager.get_instance().plugins.clear()


@pytest.fixture
def config(tmp_path):
    LlamaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    ).save_pretrained(tmp_path)

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
        (
            "caft",
            {"num_heads": 0},
            "caft.num_heads: got 0, but it accepts a whole number at least 1 and at most 32.",
        ),
        (
            "caft",
            {"num_heads": -1},
            "caft.num_heads: got -1, but it accepts a whole number at least 1 and at most 32.",
        ),
        ("caft", {"beta": -1}, "caft.beta: got -1, but it accepts a number at least 0."),
        (
            "caft",
            {"alpha": 1.5},
            "caft.alpha: got 1.5, but it accepts a number above 0 and at most 1.",
        ),
        (
            "caft",
            {"schedule": "cosine"},
            "caft.schedule: got 'cosine', but it accepts one of rsine, sine, linear, con",
        ),
        ("caft", 7, "caft: got 7, but it accepts settings by name"),
        (
            "meap",
            {"mask_ratio": 0},
            "meap.mask_ratio: got 0, but it accepts a number above 0 and below 1.",
        ),
        (
            "meap",
            {"layout": "concta"},
            "meap.layout: got 'concta', but it accepts one of concat, separate.",
        ),
        (
            "meap",
            {"masks": 1},
            (
                "meap.masks: unknown setting. Accepted settings: mode, mask_ratio, layout,"
                " min_answer_tokens"
            ),
        ),
        ("meap", [], "meap: got [], but it accepts settings by name"),
    ],
)
def test_bad_blocks(config, name, block, message):
    with pytest.raises(ConfigError) as caught:
        load_cfg(str(config(**{name: block})))
    assert message in str(caught.value)


@pytest.fixture
def told(monkeypatch):
    """The warnings of slips.py; Axolotl's loggers do not propagate."""
    messages = []
    monkeypatch.setattr(
        slips.LOG, "warning", lambda words, *values: messages.append(words % values)
    )
    return messages


INDENT = "found at the top level, where Axolotl ignores"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"CAFT": {"beta": 0.3}, "meap": {}},
            "CAFT: unknown key, which Axolotl ignores. Did you mean `caft:`?",
        ),
        ({"cafft": {"beta": 0.3}, "meap": {}}, "cafft: unknown key"),
        ({"cfat": None, "caft": {}}, "cfat: unknown key"),
        ({"caft_config": {"beta": 0.3}}, "caft_config: unknown key"),
        ({"caft.beta": 0.3, "caft": {}}, "caft.beta: unknown key"),
        (
            {"meep": {}, "caft": {}},
            "meep: unknown key, which Axolotl ignores. Did you mean `meap:`?",
        ),
        ({"MEAP": None, "caft": {}}, "MEAP: unknown key"),
        ({"pretrain-heads": {"targets": "model"}, "caft": {}}, "Did you mean `pretrain_heads:`?"),
        (
            {"caft": None, "num_heads": 2, "beta": 0.3},
            f"num_heads, beta: {INDENT} them. Indent them below `caft:`.",
        ),
        ({"meap": None, "layout": "separate"}, f"layout: {INDENT} it. Indent it below `meap:`."),
        (
            {"caft": {}, "targets": "model"},
            f"targets: {INDENT} it. Indent it below `pretrain_heads:`.",
        ),
        (
            {"plugins": ["caft-plugin"], "caft": {}},
            "plugins: got 'caft-plugin', which is no plugin. Did you mean `caft_plu",
        ),
        ({"plugins": ["CAFT_Plugin"], "caft": {}}, "Did you mean `caft_plugin`?"),
        ({"plugins": ["caft"], "caft": {}}, "plugins: got 'caft', which is no plugin"),
        (
            {"plugins": "caft_plugin", "caft": {}},
            "plugins: got 'caft_plugin', but it accepts a list of names",
        ),
        (
            {"plugins": [{"caft_plugin": None}], "caft": {}},
            "plugins: got {'caft_plugin': None}, but it accepts a list of",
        ),
        (
            {"plugins": ["caftplugin.CAFTPlugin"], "caft": {}},
            "plugins: caftplugin.CAFTPlugin could not be loaded",
        ),
        (
            {"plugins": ["caft_plugin.CaftPlugin"], "caft": {}},
            "plugins: got 'caft_plugin.CaftPlugin', which is no plug",
        ),
    ],
)
def test_slips_that_would_train_plainly(config, changes, message):
    with pytest.raises(ConfigError) as caught:
        load_cfg(str(config(**changes)))
    assert message in str(caught.value)


@pytest.mark.parametrize("key", ["caft", "meap", "CAFT", "caft.beta", "pretrain_heads"])
@pytest.mark.parametrize("plugins", [None, ["axolotl.integrations.liger.LigerPlugin"]])
def test_a_block_without_the_plugin_is_told_with_the_line_to_write(config, told, key, plugins):
    load_cfg(str(config(plugins=plugins, **{key: None})))
    assert len(told) == 1 and told[0].startswith(
        f"{key}: the config has this block, but `plugins:` does not list caft"
    )
    assert "plugins:\n      - caft_plugin" in told[0]


def test_a_plain_config_is_told_nothing(config, told):
    load_cfg(str(config(plugins=None)))
    assert not told


@pytest.mark.parametrize(
    "names",
    [
        ["caft_plugin", "caft_plugin.CAFTPlugin"],
        ["caft_plugin.CAFTPlugin", "caft_plugin"],
        [
            "caft_plugin.axolotl.plugin.CAFTPlugin",
            "axolotl.integrations.liger.LigerPlugin",
            "caft_plugin",
        ],
    ],
)
def test_the_plugin_under_several_names_is_loaded_once(config, names):
    cfg = load_cfg(str(config(plugins=names, caft={"num_heads": 2})))
    kinds = [type(plugin).__name__ for plugin in PluginManager.get_instance().plugins.values()]
    assert kinds.count("CAFTPlugin") == 1 and len(kinds) == len(names) - 1
    assert cfg.caft.num_heads == 2


def test_no_key_of_axolotl_is_taken_for_a_slip():
    slips.refuse_slips(dict.fromkeys(slips.known_keys()))


@pytest.mark.parametrize("command", ["train", "preprocess", "evaluate", "inference"])
@pytest.mark.parametrize("option", ["--caft.beta=0.6", "--caft__beta=0.6", "--meap.mode", "--caft"])
def test_options_for_a_block_are_refused(config, command, option):
    """Axolotl would hand them to the launcher."""
    from axolotl.cli.main import cli
    from click.testing import CliRunner

    rest = [option] if "=" in option else [option, "sft"]
    result = CliRunner().invoke(cli, [command, str(config(caft=None, meap=None)), *rest])
    assert (
        result.exit_code == 2
        and f"Error: {option}: Axolotl has no options for plugins" in result.output
    )


@pytest.mark.parametrize("block", [{"mode": "pretrain"}, None, {"layout": "separate"}])
def test_masks_with_a_processor(config, block):
    with pytest.raises(
        ConfigError, match="meap: cannot be used together with `processor_type: AutoProcessor`"
    ):
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
@pytest.mark.parametrize(
    "other", [{"rl": "dpo"}, {"reward_model": True}, {"process_reward_model": True}]
)
def test_other_kinds_of_training(config, other, block):
    with pytest.raises(ConfigError, match=f"{block}: cannot be used together with"):
        load_cfg(str(config(**{block: {}}, **other)))


SHARED = [
    "context_parallel_size",
    "sequence_parallel_degree",
    "tensor_parallel_size",
    "expert_parallel_size",
]


@pytest.mark.parametrize("key", SHARED)
def test_processes_that_share_one_models_work(config, key):
    with pytest.raises(ConfigError, match=f"caft: got {key}: 2, but it accepts 1"):
        load_cfg(str(config(caft={}, **{key: 2})))


WRAP = {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        (
            {"fsdp": ["full_shard", "auto_wrap"], "fsdp_config": WRAP},
            "fsdp_config without fsdp_version",
        ),
        ({"fsdp": ["full_shard", "auto_wrap"]}, "fsdp without fsdp_version"),
        ({"fsdp_config": WRAP}, "fsdp_config without fsdp_version"),
        ({"fsdp_version": 1, "fsdp_config": WRAP}, "fsdp_version: 1"),
        ({"fsdp_config": {**WRAP, "fsdp_version": 1}}, "fsdp_config.fsdp_version: 1"),
        ({"fsdp_config": {**WRAP, "version": "1"}}, "fsdp_config.version: 1"),
        (
            {"fsdp_version": 2, "fsdp_config": {**WRAP, "fsdp_version": 1}},
            "fsdp_config.fsdp_version: 1",
        ),
    ],
)
def test_fsdp1(config, changes, got):
    with pytest.raises(
        ConfigError,
        match=f"caft: got {got}, which is FSDP1, but it accepts FSDP2.* fsdp_version: 2 ",
    ):
        load_cfg(str(config(caft={}, **changes)))
    with pytest.raises(
        ConfigError, match=f"meap.mask_token: got {got}, which is FSDP1.* hides the added vector"
    ):
        load_cfg(str(config(meap={"mask_token": "add"}, **changes)))


def registered(file):
    """What the plugin says of a YAML before Axolotl looks at it, on a machine where Axolotl would
    not go on."""
    prepare_plugins(DictDefault(yaml.safe_load(file.read_text())))


@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp_version": 2, "fsdp_config": WRAP},
        {"fsdp_config": {**WRAP, "fsdp_version": 2}},
        {"fsdp_config": {**WRAP, "version": "2"}},
        {"fsdp_version": 1},  # of nothing
        {"fsdp": [], "fsdp_config": {}},
        {"deepspeed": {"zero_optimization": {"stage": 2}}},
        {"deepspeed": {"train_batch_size": 1}},
        {"deepspeed": "nowhere/zero3.json"},  # Axolotl's own error
        {"tensor_parallel_size": 1, "context_parallel_size": None},
    ],
)
def test_processes_that_share_rows_and_weights(config, changes):
    registered(config(caft={}, **changes))


def test_deepspeed_zero3(config, tmp_path, monkeypatch):
    """The config as a dict, or in a file, whose path is relative to where Axolotl was started."""
    stage3 = {"zero_optimization": {"stage": 3}}
    (tmp_path / "deepspeed_configs").mkdir()
    (tmp_path / "deepspeed_configs" / "zero3.json").write_text(json.dumps(stage3))
    monkeypatch.chdir(tmp_path)
    words = (
        r"zero_optimization.stage: 3{}, but it accepts 0, 1 or 2: heads are copies .* Use stage 2,"
        r" or FSDP2"
    )
    for deepspeed, where in (
        (stage3, ""),
        ("deepspeed_configs/zero3.json", r" \(deepspeed_configs/zero3.json\)"),
    ):
        with pytest.raises(ConfigError, match="caft: got DeepSpeed's " + words.format(where)):
            load_cfg(str(config(caft={}, deepspeed=deepspeed)))
        with pytest.raises(
            ConfigError, match="meap.mask_token: got DeepSpeed's zero_optimization.stage: 3"
        ):
            load_cfg(str(config(meap={"mask_token": "add"}, deepspeed=deepspeed)))


@pytest.mark.parametrize(
    "blocks", [{"caft": {"beta": 0}}, {"meap": {}}, {"caft": {"beta": 0}, "meap": {}}]
)
@pytest.mark.parametrize(
    "changes",
    [
        {"fsdp_config": WRAP},
        {"deepspeed": {"zero_optimization": {"stage": 3}}},
        {"tensor_parallel_size": 2},
    ],
)
def test_where_nothing_is_added_to_the_model_it_is_shared_as_the_host_likes(
    config, blocks, changes
):
    registered(config(**blocks, **changes))


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
        '{"format_version": 1, "num_heads": 4, "head_input": "final", "head_norm": false,'
        ' "layer_class": "LlamaDecoderLayer", "model_type": "llama", "hidden_size": 64,'
        ' "vocab_size": 97, "base_model": "m"}'
    )
    with pytest.raises(
        ConfigError, match="made for hidden_size 64 .* but this model has hidden_size 32"
    ):
        before_weights(config(caft={"heads": str(folder)}))


def test_heads_of_another_layer_class_are_refused_before_weights_load(config, tmp_path):
    record = HeadsRecord(
        num_heads=4,
        head_input="final",
        head_norm=False,
        layer_class="Qwen2DecoderLayer",
        model_type="qwen2",
        hidden_size=32,
        vocab_size=97,
        base_model="m",
    )
    folder = tmp_path / "heads"
    write_heads(folder, record, {"0.w": torch.zeros(1)}, {})
    with pytest.raises(
        ConfigError,
        match=r"are of class Qwen2DecoderLayer .* this model's layers are of class Llama",
    ):
        before_weights(config(caft={"heads": str(folder)}))


T5 = T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
RWKV = RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("model_config", "changes", "message"),
    [
        (T5, {}, "caft: .* is an encoder-decoder model, but CAFT accepts decoder-only"),
        (
            T5,
            {"caft": None, "meap": {}},
            "meap: .* is an encoder-decoder model, but MEAP accepts .* without MEAP",
        ),
        (RWKV, {}, "passes a running state from layer to layer, which heads do not support"),
        (Gemma3nConfig(), {}, "passes several hidden states per token from layer to layer"),
        (Gemma3nTextConfig(), {}, "passes several hidden states per token from layer to layer"),
        (
            LlamaConfig(**LLAMA),
            {"type_of_model": "LlamaModel"},
            r"LlamaModel has no .*unembedding \(lm_head\)",
        ),
        (
            LlamaConfig(**LLAMA),
            {"model_type": "LlamaForSequenceClassification"},
            "has no .*unembedding",
        ),
        (BertConfig(num_hidden_layers=1, is_decoder=True), {}, "BertLMHeadModel has no"),
    ],
)
def test_unfit_models_are_refused_before_weights_load(
    config, tmp_path, model_config, changes, message
):
    """Where Axolotl has no weights to load, and of some models could not even build the class."""
    changes = {"caft": {}, **changes}
    file = config(**{key: value for key, value in changes.items() if value is not None})
    model_config.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=message):
        before_weights(file)


def test_fused_loss_that_cannot_be_is_refused_before_weights_load(config, tmp_path):
    fused = {"fused_loss": True}
    before_weights(config(caft=fused))
    with pytest.raises(
        ConfigError,
        match="caft.fused_loss: got true, but label smoothing and compute_loss_func need",
    ):
        before_weights(config(caft=fused, use_eaft=True))
    MixtralConfig(**LLAMA, output_router_logits=True).save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match="got true, but MixtralForCausalLM computes more than the next-token loss"
    ):
        before_weights(config(caft=fused))
    # read as false here, once the trainer exists; Axolotl's schema keeps it
    assert before_weights(config(caft={"fused_loss": "auto"})).caft.fused_loss == "auto"


def test_a_model_of_code_of_its_own(config, tmp_path, caplog):
    """Its class is built from the config, without weights, where the YAML allows the code to run;
    where it cannot be built so, the run goes on, with a warning."""
    file = config(caft={}, trust_remote_code=True)
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    }
    (tmp_path / "config.json").write_text(json.dumps(content))
    code = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        {line}
"""
    (tmp_path / "own.py").write_text(code.format(line="pass"))
    before_weights(file)
    (tmp_path / "own.py").write_text(code.format(line="del self.model.norm"))
    with pytest.raises(ConfigError, match="OwnForCausalLM has no .*final norm"):
        before_weights(file)
    (tmp_path / "own.py").write_text(code.format(line="self.model.norm.weight.sum().item()"))
    before_weights(file)
    assert (
        "can be checked only after its weights are loaded" in caplog.text
        and "cannot be built without them (RuntimeError: " in caplog.text
    )


@pytest.mark.parametrize("block", [{"caft": {}}, {"meap": {}}])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    ("plugin", "changes"),
    [
        ("axolotl.integrations.diffusion.DiffusionPlugin", {"diffusion": {}}),
        ("axolotl.integrations.kd.KDPlugin", {"kd_trainer": True}),
        ("axolotl.integrations.hatchery.HatcheryPlugin", {}),
    ],
)
def test_another_plugins_trainer_stops_the_run_before_weights_load(
    config, plugin, changes, first, block
):
    """Axolotl takes the trainer of the plugin that is listed first."""
    plugins = [plugin, "caft_plugin"] if first else ["caft_plugin", plugin]
    with pytest.raises(ConfigError, match=f"{plugin} sets its own trainer class"):
        before_weights(config(plugins=plugins, **block, **changes))


def test_another_plugin_without_a_trainer(config):
    before_weights(config(caft={}, plugins=["axolotl.integrations.kd.KDPlugin", "caft_plugin"]))


def validated(file):
    raw = DictDefault(yaml.safe_load(file.read_text()))
    prepare_plugins(raw)
    cfg = validate_config(raw, capabilities=H100, env_capabilities=ENVIRONMENT)
    assert cfg.caft is not None or cfg.meap is not None
    return raw, cfg


@pytest.mark.parametrize("file", READY, ids=[file.name for file in READY])
def test_ready_configs_pass_axolotls_schema(file):
    _, cfg = validated(file)
    assert cfg.plugins == ["caft_plugin"]


@pytest.mark.parametrize("file", USERS, ids=[file.name for file in USERS])
def test_configs_as_users_have_them_pass_axolotls_schema(file):
    """Five families with the options that Axolotl's users set most, and our blocks added: every key
    stays."""
    raw, cfg = validated(file)
    assert {"caft_plugin"} < set(cfg.plugins) or cfg.plugins == ["caft_plugin"]
    assert not {key for key in raw if key not in cfg}


def test_users_of_five_families():
    assert [file.stem for file in USERS] == ["gemma3", "gpt-oss", "llama-3", "mistral", "qwen3"]


def test_there_are_ready_configs():
    names = {file.name for file in READY}
    assert {
        "quickstart-cpu.yml",
        "llama-3.1-8b-qlora-24gb.yml",
        "llama-3.1-8b-full-fsdp2.yml",
    } <= names
    assert {"meap-sft.yml", "meap-pretrain.yml", "caft-meap.yml"} <= names
    assert "llama-3.1-70b-qlora-fsdp2-2nodes.yml" in names


def test_what_a_config_says_of_tokens():
    from caft_plugin.axolotl.plugin import said_of_tokens
    from caft_plugin.meap.roles import Said

    assert said_of_tokens(DictDefault({})) == Said((), [], [])
    said = said_of_tokens(
        DictDefault(
            {
                "eot_tokens": ["<E>"],
                "tokens": ["<A>"],
                "special_tokens": {"pad_token": "<P>", "additional_special_tokens": ["<S>"]},
                "added_tokens_overrides": {7: "<O>"},
                "datasets": [{"path": "x"}, {"path": "y", "chat_template_jinja": "{{ x }}<T>"}],
            }
        )
    )
    assert said == Said(["<E>"], ["<A>", "<S>", "<O>"], ["{{ x }}<T>"])
