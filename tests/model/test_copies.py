"""What a fresh head is: its logits are the model's own, its tensors are plain, and the model is as
it was.

Over every method that PEFT lists, every start of LoRA, and every quantisation that works on a CPU.
Float32 throughout; a copy's weights come out of sums in another order than the model's, so logits
agree to 1e-5 of their norm (they were seen to agree to 5e-7), where leaving an adapter out moves
them by a hundredth or more.
"""

from __future__ import annotations

import copy
import dataclasses

import bitsandbytes
import peft
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from peft import LoraConfig, PeftType, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    TorchAoConfig,
)

from builders.copies import EXACT, MOE, assert_plain, gap, moved, tiny, without_adapter
from builders.heads import attach, batch, read
from builders.tiny import LLAMA, add_adapter
from caft_plugin import ConfigError
from caft_plugin.model.copies import plain_copy
from caft_plugin.model.trunk import find_trunk

pytestmark = pytest.mark.newest

TARGETS = ["q_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _four_bits_in_float32(monkeypatch):
    """On a CPU with instructions for bfloat16, bitsandbytes computes 4-bit products in it when a
    model is in evaluation mode, whatever compute dtype was asked for."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: False)


# What a method needs beside the modules it is put on.
NEEDS = {
    "ADALORA": {"total_step": 10, "tinit": 1, "tfinal": 5},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2, "target_modules": "self_attn"},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 8},
    "CPT": {"cpt_token_ids": [1, 2], "cpt_mask": [1, 1], "cpt_tokens_type_mask": [1, 2]},
    "FOURIERFT": {"n_frequency": 10},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "norm"]},
    "MISS": {"r": 8},
    "MULTITASK_PROMPT_TUNING": {"num_tasks": 2},
    "OFT": {"oft_block_size": 4},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None},
    "SHIRA": {"r": 2},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [5, 6, 7]},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 10},
}
PROMPTS = {
    "PROMPT_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "P_TUNING",
    "PREFIX_TUNING",
    "CPT",
    "CARTRIDGE",
}
# Methods whose effect is no matrix: a copy can be taken where it is still zero, or (None) never.
NO_MATRIX = {"ADAPTION_PROMPT": True, "LILY": True, "POLY": None, "SHADOW": None}


def config_of(method, **settings):
    if method.name == "ADAMSS":
        pytest.importorskip("sklearn", reason="PEFT's AdaMSS needs scikit-learn")
    config = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    takes = {field.name for field in dataclasses.fields(config)}
    given = {
        "target_modules": TARGETS,
        "num_virtual_tokens": 4,
        **NEEDS.get(method.name, {}),
        **settings,
    }
    return config(
        task_type="CAUSAL_LM", **{key: value for key, value in given.items() if key in takes}
    )


@pytest.mark.parametrize(
    "method", [m for m in PeftType if m.name != "XLORA"], ids=lambda method: method.name
)
def test_every_method_of_peft(method):
    """The list is PEFT's own: a new method comes up here by itself."""
    model = tiny()
    plain = copy.deepcopy(model.model.layers[-1])
    model = get_peft_model(model, config_of(method)).eval()
    name = type(model.peft_config["default"]).__name__
    if method.name in PROMPTS:
        with pytest.raises(
            ConfigError, match=f"adapter of PEFT's {name}, whose virtual tokens .* such as LoRA"
        ):
            attach(model)
        return
    if NO_MATRIX.get(method.name, True):
        assert gap(model) < EXACT
    moved(model)
    if method.name in NO_MATRIX:
        with pytest.raises(ConfigError, match=f"a PEFT {method.name.lower()} .* such as LoRA"):
            attach(model)
        return
    assert gap(model) < EXACT
    if method.name != "TRAINABLE_TOKENS":  # not in a layer
        assert without_adapter(model, plain) > 1e-3
    assert attach(model).heads.lora is not None  # `auto`


@pytest.mark.parametrize(
    "method", [m for m in PeftType if m.name not in PROMPTS | {"XLORA"}], ids=lambda m: m.name
)
def test_every_method_of_peft_in_half_precision(method):
    """Adapters in float32 over a bfloat16 base, as PEFT has it: logits agree to what bfloat16
    keeps, 2^-8 a product."""
    model = moved(get_peft_model(tiny().bfloat16(), config_of(method)))
    if method.name in NO_MATRIX:
        with pytest.raises(ConfigError, match=f"a PEFT {method.name.lower()} "):
            attach(model)
    else:
        assert gap(model) < 0.02


def test_what_follows_the_text_is_refused_by_name(tmp_path):
    moved(get_peft_model(tiny(), LoraConfig(target_modules=TARGETS))).save_pretrained(
        tmp_path / "one"
    )
    mixture = tiny()
    mixture.config.use_cache = False
    config = peft.XLoraConfig(
        task_type="CAUSAL_LM", hidden_size=32, adapters={"one": str(tmp_path / "one")}
    )
    with pytest.raises(
        ConfigError, match="adapter of PEFT's XLoraConfig, whose effect depends on the text"
    ):
        attach(get_peft_model(mixture, config))
    invoked = LoraConfig(
        task_type="CAUSAL_LM", target_modules=TARGETS, alora_invocation_tokens=[5, 6]
    )
    with pytest.raises(
        ConfigError,
        match="LoraConfig with alora_invocation_tokens, whose effect depends on the text",
    ):
        attach(get_peft_model(tiny(), invoked))


STARTS = {
    **{
        str(start): {"init_lora_weights": start}
        for start in (True, False, "gaussian", "orthogonal")
    },
    **{
        start: {"init_lora_weights": start, "lora_alpha": 4}
        for start in ("pissa", "pissa_niter_4", "olora")
    },
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"q_proj": 3}},
    "bias": {"lora_bias": True},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [0]},
    "modules_to_save": {"modules_to_save": ["input_layernorm", "norm", "lm_head"]},
    "modules_to_save, layer": {"modules_to_save": ["layers.2"], "layers_to_transform": [0]},
    "target_parameters": {
        "target_modules": [],
        "target_parameters": ["q_proj.weight", "down_proj.weight"],
    },
}


@pytest.mark.parametrize("trained", [False, True], ids=["start", "trained"])
@pytest.mark.parametrize("start", STARTS)
def test_every_start_of_lora(start, trained):
    model = tiny()
    original = {name: p.clone() for name, p in model.model.layers[-1].named_parameters()}
    settings = {"r": 4, "target_modules": TARGETS, **STARTS[start]}
    if start == "loftq" and not torch.cuda.is_available():
        pytest.skip("PEFT computes LoftQ's start on a GPU alone")
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    if trained:
        moved(model)
    assert gap(model) < EXACT
    # all others start as the model they are put on
    if not trained and start not in ("False", "loftq"):
        copied = plain_copy(find_trunk(model).last_layer, None)
        for name, wanted in original.items():
            torch.testing.assert_close(copied.get_parameter(name).data, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("start", ["eva", "corda"])
def test_starts_that_look_at_data(start):
    model = tiny()
    inputs = batch()

    def run(model=model):
        model(input_ids=inputs["input_ids"][:1])

    if start == "eva":
        config = LoraConfig(
            r=2, target_modules=TARGETS, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0)
        )
        model = get_peft_model(model, config)
        peft.initialize_lora_eva_weights(model, [{"input_ids": inputs["input_ids"]}])
    else:
        pytest.importorskip("attr", reason="PEFT's CorDA needs attrs")
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        config = LoraConfig(
            r=2, target_modules=TARGETS, init_lora_weights="corda", corda_config=CordaConfig()
        )
        preprocess_corda(model, config, run_model=run)
        model = get_peft_model(model, config)
    assert gap(model.eval()) < EXACT
    assert gap(moved(model)) < EXACT


def with_experts():
    model = tiny(
        Qwen3MoeConfig(
            **MOE, num_experts=4, moe_intermediate_size=32, head_dim=8, mlp_only_layers=[]
        )
    )
    assert model.model.layers[-1].mlp.experts.down_proj.dim() == 3
    return model


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Mixtral"])
def test_lora_on_experts(family, quantised):
    """Which PEFT nests, one wrapper a parameter."""
    model = (
        with_experts() if family == "Qwen3Moe" else tiny(MixtralConfig(**MOE, num_local_experts=4))
    )
    if quantised:
        quantise_experts(model)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets)
    ).eval()
    assert gap(model) < EXACT
    plain = plain_copy(find_trunk(model).last_layer, None)
    moved(model)
    assert gap(model) < EXACT
    assert without_adapter(model, plain) > 1e-3


def quantise_experts(model):
    """As Axolotl's quantize_moe_experts does while it loads a model."""
    for name, module in list(model.named_modules()):
        if name.endswith("experts"):
            for key in list(module._parameters):
                replace_parameter_4bit(module, key, compress_statistics=True, quant_type="nf4")


def test_experts_in_four_bits_are_copied_whole():
    """The copy fits another base: its tensors have the names, shapes and dtype of an unquantised
    one."""
    plain, model = with_experts(), with_experts()
    model.load_state_dict(plain.state_dict())
    quantise_experts(model)
    experts = model.model.layers[-1].mlp.experts
    kind = type(experts)
    assert gap(model) < EXACT
    copied = plain_copy(model.model.layers[-1], model.config.dtype)
    shapes = {name: (p.shape, p.dtype) for name, p in plain.model.layers[-1].named_parameters()}
    assert {name: (p.shape, p.dtype) for name, p in copied.named_parameters()} == shapes
    assert torch.equal(copied.mlp.experts.down_proj, experts.down_proj)
    assert (
        type(experts) is kind
        and experts.parametrizations["down_proj"].original.dtype == torch.uint8
    )


def test_a_parametrised_weight_is_its_value():
    model = tiny()
    layer = model.model.layers[-1]
    parametrizations.weight_norm(layer.mlp.up_proj)
    parametrizations.spectral_norm(layer.mlp.down_proj)
    layer.mlp.up_proj.parametrizations.weight.original0.data *= 1.5
    model.eval()
    assert gap(model) < EXACT
    model = get_peft_model(model, LoraConfig(target_modules=["down_proj"]))
    assert gap(moved(model)) < EXACT


def test_a_copy_has_one_dtype_that_of_its_largest_tensor():
    layer = tiny().model.layers[-1].bfloat16()
    layer.input_layernorm.float()  # as prepare_model_for_kbit_training makes it
    assert {p.dtype for p in plain_copy(layer, None).parameters()} == {torch.bfloat16}
    assert layer.input_layernorm.weight.dtype == torch.float32


@pytest.mark.parametrize("put_on", [get_peft_model, add_adapter])
def test_which_adapters_are_on(put_on):
    """None, several, merged, merged and switched off: the copy does what the layer does."""
    model = put_on(tiny(), LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))
    model.add_adapter(
        *(
            ("b", LoraConfig(r=3, target_modules=["q_proj"]))
            if put_on is get_peft_model
            else (LoraConfig(r=3, target_modules=["q_proj"]), "b")
        )
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.1)
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]

    def one_by_one(does):
        for layer in layers:
            does(layer)
        copied = plain_copy(find_trunk(model).last_layer, None)
        assert gap(model) < EXACT
        return copied.self_attn.q_proj.weight.data

    weights = [
        one_by_one(lambda layer: layer.set_adapter("default")),
        one_by_one(lambda layer: layer.set_adapter("b")),
        one_by_one(lambda layer: layer.set_adapter(["default", "b"])),
        one_by_one(lambda layer: layer.enable_adapters(False)),
    ]
    for index, one in enumerate(weights):
        assert all((one - other).abs().max() > 1e-3 for other in weights[:index])
    merged = one_by_one(
        lambda layer: (layer.enable_adapters(True), layer.set_adapter("b"), layer.merge())
    )
    torch.testing.assert_close(merged, weights[1], rtol=0, atol=1e-6)


def test_merged_adapters_that_are_switched_off_again():
    model = get_peft_model(tiny(), LoraConfig(r=2, target_modules=TARGETS))
    before = model.base_model.model.model.layers[-1].self_attn.q_proj.weight.clone()
    moved(model).merge_adapter()
    layer = find_trunk(model).last_layer
    assert (layer.self_attn.q_proj.weight - before).abs().max() > 1e-3
    model.base_model.disable_adapter_layers()
    copied = plain_copy(layer, None)
    torch.testing.assert_close(copied.self_attn.q_proj.weight.data, before, rtol=0, atol=1e-6)
    assert layer.self_attn.q_proj.merged  # the model's own is left as it is


def test_mixed_methods_on_one_layer():
    model = get_peft_model(tiny(), peft.LoHaConfig(r=4, target_modules=TARGETS), mixed=True)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["down_proj", "up_proj"]))
    model.add_adapter("c", peft.OFTConfig(oft_block_size=4, target_modules=["down_proj"]))
    model.set_adapter(["default", "b", "c"])
    assert gap(moved(model)) < EXACT
    assert attach(model).heads.lora.r == 2  # of the one LoRA


@pytest.mark.parametrize("method", ["LORA", "OFT", "IA3", "LOHA", "BOFT"])
def test_layers_with_transposed_weights(method):
    """GPT-2's linear layers are of another class, weights (in, out)."""
    model = tiny(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    given = {
        "target_modules": ["c_fc", "c_attn"],
        "fan_in_fan_out": True,
        "feedforward_modules": ["c_fc"],
    }
    try:
        model = get_peft_model(model, config_of(PeftType[method], **given))
    except (ValueError, TypeError):
        pytest.skip(f"PEFT's {method} does not take Conv1D")
    assert gap(moved(model)) < EXACT
    heads = attach(model).heads
    assert sorted(heads.lora.target_modules) == [
        "attn.c_attn",
        "attn.c_proj",
        "mlp.c_fc",
        "mlp.c_proj",
    ]
    assert any(p.requires_grad for p in heads.parameters())


BITS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4, twice": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    },
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "8 bits": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = LlamaConfig(
        **{**LLAMA, "hidden_size": 128, "intermediate_size": 256, "initializer_range": 0.1}
    )
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def quantised(folder, bits):
    options = BITS[bits] if "8" in bits else {**BITS[bits], "bnb_4bit_compute_dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(**options),
        dtype=torch.float32,
        device_map="cpu",
    ).eval()
    assert type(model.model.layers[-1].mlp.down_proj).__module__.startswith("bitsandbytes")
    # In 4 bits the product is with the dequantised weight, so logits agree as those of plain
    # layers. In 8 bits the model rounds activations to 8 bits, too, about 1 % off in each product,
    # which plain layers do not.
    return model, 0.03 if "8" in bits else EXACT


@pytest.mark.parametrize("bits", BITS)
def test_every_quantisation_of_bitsandbytes(folder, bits):
    """Without an adapter, and with one of no effect yet, to the bit."""
    model, tolerance = quantised(folder, bits)
    layer = model.model.layers[-1]
    assert gap(model) < tolerance
    plain = plain_copy(layer, torch.float32)
    if "8" not in bits:
        state = layer.mlp.down_proj.weight.quant_state
        wanted = bitsandbytes.functional.dequantize_4bit(layer.mlp.down_proj.weight.data, state)
        assert torch.equal(plain.mlp.down_proj.weight, wanted)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    assert gap(model) < tolerance
    copied = plain_copy(find_trunk(model).last_layer, torch.float32)
    assert all(
        torch.equal(tensor, plain.get_parameter(name)) for name, tensor in copied.named_parameters()
    )
    assert gap(moved(model)) < tolerance
    assert without_adapter(model, plain) > 0.1


@pytest.mark.parametrize("bits", ["nf4", "8 bits"])
@pytest.mark.parametrize(
    "method", [m for m in PeftType if m.name not in PROMPTS | {"XLORA"}], ids=lambda m: m.name
)
def test_every_method_of_peft_on_quantised_weights(folder, method, bits):
    """Wherever PEFT itself can put it on them and call it."""
    model, tolerance = quantised(folder, bits)
    try:
        model = moved(get_peft_model(model, config_of(method)))
        with torch.no_grad():
            model(**batch())
    except Exception as error:  # each method has its own way of not knowing what it is put on
        pytest.skip(f"PEFT's {method.name} cannot do it: {type(error).__name__}: {error}")
    if method.name in NO_MATRIX:
        with pytest.raises(ConfigError, match=f"a PEFT {method.name.lower()} "):
            attach(model)
        return
    assert gap(model) < tolerance


def test_pissa_on_four_bits(folder, tmp_path):
    """As PEFT's documents have it: the residual is quantised, the adapter starts with the rest."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model = get_peft_model(
        model, LoraConfig(r=8, lora_alpha=8, target_modules=TARGETS, init_lora_weights="pissa")
    )
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "adapter")
    model.unload().save_pretrained(tmp_path / "residual")
    model, _ = quantised(tmp_path / "residual", "nf4")
    plain = plain_copy(model.model.layers[-1], torch.float32)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    assert gap(model) < EXACT
    assert without_adapter(model, plain) > 0.1


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_weights_of_torchao(folder, adapter):
    quantization = pytest.importorskip("torchao.quantization")
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=TorchAoConfig(quantization.Int8WeightOnlyConfig()),
        dtype=torch.float32,
        device_map="cpu",
    ).eval()
    assert type(model.model.layers[-1].mlp.down_proj.weight).__module__.startswith("torchao")
    if adapter == "lora":
        model = moved(get_peft_model(model, LoraConfig(r=4, target_modules=TARGETS)))
    assert gap(model) < EXACT


def test_what_cannot_be_dequantised_is_refused_by_name():
    model = tiny()
    up = model.model.layers[-1].mlp.up_proj
    up.weight = nn.Parameter(up.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(
        ConfigError,
        match=r"weight of the last layer's mlp.up_proj \(Linear\) is a Parameter of .*float8",
    ):
        attach(model)


class Recorder:
    """A user's, which cannot be copied."""

    def __init__(self):
        self.seen = []
        self.stream = (i for i in range(3))

    def __call__(self, module, args, output):
        self.seen.append(output if isinstance(output, torch.Tensor) else output[0])

    def note(self, module, args, output):
        self(module, args, output)


def test_a_users_hook_runs_as_often_as_without_heads():
    model, recorder = tiny(), Recorder()
    layer = model.model.layers[-1]
    # a bound method: a copy of it would be one of its owner
    layer.register_forward_hook(recorder.note)
    layer.mlp.register_forward_hook(lambda *_: None)
    layer.register_forward_pre_hook(lambda *_: None)
    layer.register_full_backward_hook(lambda *_: None)
    layer.register_state_dict_post_hook(lambda *_: None)
    layer.register_load_state_dict_post_hook(lambda *_: None)
    inputs = batch()
    model(**inputs)
    with attach(model, num_heads=3, train_heads="frozen") as attached:
        for head in attached.heads.layers:
            assert_plain(head)
        read(attached, inputs)
    first, second = recorder.seen
    assert torch.equal(first, second)
    assert layer._forward_hooks and layer._backward_hooks and layer.mlp._forward_hooks
