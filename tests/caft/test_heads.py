from __future__ import annotations

import copy

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    Cohere2Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.modeling_outputs import CausalLMOutput

from builders.heads import assert_the_models_own_logits, attach, batch, read
from builders.tiny import LLAMA, add_adapter, head_outputs
from caft_plugin import ConfigError
from caft_plugin.caft.attach import Request
from caft_plugin.caft.heads import MODULE_NAME, pointwise_parts
from caft_plugin.caft.loss import LOGITS_AT_A_TIME
from caft_plugin.model.copies import plain_copy
from caft_plugin.model.trunk import find_trunk
from caft_plugin.targets import IGNORE, head_targets

pytestmark = pytest.mark.newest

FAMILIES = {
    "plain": LlamaConfig(**LLAMA),
    "bias": Qwen2Config(**LLAMA),
    "soft-capped": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0),
    "multiplied": Cohere2Config(**LLAMA, logit_scale=0.25),
    "divided": GraniteConfig(**LLAMA, logits_scaling=4.0),
}


@pytest.mark.parametrize(
    ("family", "attention"),
    # Gemma 2 soft-caps its attention, which sdpa cannot
    [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("soft-capped", "sdpa")],
)
def test_a_copy_of_the_last_layer_gives_the_models_own_logits(family, attention):
    """Proves masks, rotary embeddings, norms and logit transforms at once."""
    config = copy.deepcopy(FAMILIES[family])
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config).eval()
    attached = attach(model, num_heads=1)
    inputs = batch()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][0, 9:] = 0
    inputs["labels"][0, 9:] = IGNORE
    reading, output = assert_the_models_own_logits(attached, inputs)

    targets = head_targets(inputs, 1)[0]
    slow = nn.functional.cross_entropy(
        output.logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    torch.testing.assert_close(reading.sums[0], slow.detach(), rtol=1e-5, atol=0)


def test_unknown_logit_transform_is_refused():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    attached = attach(model, num_heads=1)
    inner = model.lm_head.forward
    model.lm_head.register_forward_hook(
        lambda module, args, out: out * (5.0 if out.dim() == 3 else 1.0)
    )
    assert inner is not None
    with pytest.raises(ConfigError, match="LlamaForCausalLM computes its logits in a way"):
        read(attached, batch())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("how", ["full", "lora", "frozen"])
@pytest.mark.parametrize("wiring", [("penultimate", True), ("final", False)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, wiring, how, lora):
    """Loss and gradients, relative difference at most 1e-6 in float32, base, LoRA and head
    parameters."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
            nn.init.normal_(
                model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight
            )
            model.enable_input_require_grads()
        attached = attach(model, train_heads=how, head_input=wiring[0], head_norm=wiring[1])
        for name, parameter in attached.heads.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.train()
        torch.manual_seed(1)
        reading, output = read(attached, batch())
        (output.loss + reading.loss).backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        results.append((output.loss.detach(), reading.loss.detach(), gradients))
    (own, aux, plain), (own_c, aux_c, checkpointed) = results
    torch.testing.assert_close((own_c, aux_c), (own, aux), rtol=1e-6, atol=0)
    assert plain.keys() == checkpointed.keys()
    for name in plain:
        assert plain[name] is not None, name
        scale = plain[name].norm()
        assert (plain[name] - checkpointed[name]).norm() <= 1e-6 * scale + 1e-12, name


def test_attach_changes_and_detach_restores():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    inputs = batch()
    before = model(**inputs)
    layer = model.model.layers[-1]
    layer_class, keys = type(layer), list(model.state_dict())
    hooks = [len(m._forward_hooks) for m in model.modules()]
    with attach(model) as attached:
        reading, output = read(attached, inputs)
        assert reading.loss > 0 and type(output) is type(before)
        assert type(layer) is not layer_class and type(layer).__name__ == layer_class.__name__
        assert hasattr(model, MODULE_NAME)
        assert list(model.state_dict()) == keys
        assert len(list(model.parameters())) > len(keys)
        model.load_state_dict(model.state_dict(), strict=True)
    assert type(layer) is layer_class
    assert not hasattr(model, MODULE_NAME)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    after = model(**inputs)
    assert torch.equal(before.logits, after.logits) and "caft_loss" not in after
    attached.detach()


def test_detach_undoes_itself_when_the_model_fails():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    layer_class = type(model.model.layers[-1])
    with pytest.raises(RuntimeError), attach(model) as attached:
        read(attached, {**batch(), "position_ids": torch.zeros(3, 7, 5)})
    assert type(model.model.layers[-1]) is layer_class and not model._forward_hooks


def test_detach_after_another_class_was_put_on_top():
    """FSDP2 gives every sharded module a class of its own, derived from the one it has."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    layer = model.model.layers[-1]
    original = type(layer)
    attached = attach(model)
    layer.__class__ = type("FSDPLayer", (type("Mixin", (), {}), type(layer)), {})
    attached.detach()
    assert type(layer).__name__ == "FSDPLayer" and original in type(layer).__mro__
    assert "__call__" not in vars(type(layer).__bases__[1]) or type(layer).__bases__[1] is original


def test_only_the_call_with_gradients_is_read():
    """Some hosts call the model a second time without gradients within one loss."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    attached = attach(model)
    first, second = batch(), batch()
    targets = head_targets(first, 4)
    request = Request(targets, torch.ones(4), [True] * 4, training=True)

    def host_loss():
        with torch.no_grad():
            model(**second)
        assert not seen
        output = model(**first)
        assert len(seen) == 4
        with torch.no_grad():
            model(**second)
        return output.loss

    with head_outputs() as seen:
        _, result = attached.answer(request, host_loss)
        expected, _ = read(attached, first)
        torch.testing.assert_close(result.loss, expected.loss)
        assert len(seen) == 8
        model.generate(first["input_ids"], max_new_tokens=2)
        assert len(seen) == 8


def test_after_a_loss_that_failed_heads_run_in_no_later_call():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    attached = attach(model)
    request = Request(head_targets(batch(), 4), torch.ones(4), [True] * 4, training=True)

    def host_loss():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attached.answer(request, host_loss)
    with head_outputs() as seen:
        model(**batch())
    assert not seen


@pytest.mark.parametrize(
    ("family", "attention"), [("plain", "sdpa"), ("plain", "eager"), ("soft-capped", "eager")]
)
@pytest.mark.parametrize("wiring", [{}, {"head_input": "final", "head_norm": False}])
def test_a_packed_row_gives_what_its_documents_give(family, attention, wiring):
    """Sums of each head and gradients, float32, 1e-5 relative: documents of very uneven length, one
    of one token."""
    model = AutoModelForCausalLM.from_config(
        FAMILIES[family], attn_implementation=attention
    ).train()
    # as the Trainer has it; with a cache transformers does not look for documents
    model.config.use_cache = False
    attached = attach(model, **wiring)
    documents = [batch(rows=1, length=length) for length in (9, 1, 23, 5)]
    packed = {key: torch.cat([d[key] for d in documents], dim=1) for key in documents[0]}
    packed["position_ids"] = torch.cat([torch.arange(d["labels"].shape[1]) for d in documents])[
        None
    ]

    def gradients(batches):
        model.zero_grad()
        readings = [read(attached, inputs)[0] for inputs in batches]
        sum(reading.loss for reading in readings).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return sum(reading.sums for reading in readings), found

    one_by_one, packed_row = gradients(documents), gradients([packed])
    torch.testing.assert_close(packed_row[0], one_by_one[0], rtol=1e-5, atol=0)
    assert packed_row[1].keys() == one_by_one[1].keys() and any(
        MODULE_NAME in name for name in one_by_one[1]
    )
    for name, wanted in one_by_one[1].items():
        torch.testing.assert_close(
            packed_row[1][name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item()
        )


def test_a_heads_mlp_runs_where_there_is_a_target():
    """Which children of a layer may do so is found by their structure; test_families.py has the
    numbers."""
    attached = attach(AutoModelForCausalLM.from_config(FAMILIES["plain"]), num_heads=2)
    head = attached.heads.layers[1]
    assert pointwise_parts(head) == [head.mlp]
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, num_local_experts=4))
    assert pointwise_parts(experts.model.layers[-1]) == []
    shapes = []
    for layer in (attached.trunk.last_layer, head):
        for part in (layer.self_attn.k_proj, layer.mlp.up_proj):
            part.register_forward_hook(
                lambda module, args, output: shapes.append(output.shape[:-1])
            )
    inputs = batch(rows=2, length=12)
    read(attached, inputs)
    targets = int((head_targets(inputs, 2)[1] != IGNORE).sum())
    assert targets == 2 * 8 and shapes == [(2, 12), (2, 12), (2, 12), (1, targets)]
    assert not head.mlp._forward_hooks and not head.mlp._forward_pre_hooks


def test_no_tensor_is_as_large_as_the_logits_of_a_batch(monkeypatch):
    """Forward and backward over heads alone, every position supervised; the host is not asked for
    logits."""

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return made

    vocab, rows, length = 1009, 4, 80
    monkeypatch.setitem(LOGITS_AT_A_TIME, "cpu", 64 * vocab)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**{**LLAMA, "vocab_size": vocab}))
    attached = attach(model)
    ids = torch.randint(1, vocab, (rows, length))
    targets = head_targets({"labels": ids}, 4)
    request = Request(targets, torch.ones(4), [True] * 4, training=True)
    with Largest() as largest:
        attached.answer(request, lambda: model(input_ids=ids, logits_to_keep=1))[1].loss.backward()
    assert 64 * vocab <= largest.numel < rows * length * vocab / 4
    assert model.lm_head.weight.grad is not None


def test_what_attention_kernels_need_is_passed_on_as_received():
    """Sequence lengths of flash attention, or a block mask of flex attention: the objects that the
    last layer got."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    attached = attach(model, num_heads=2)
    seen = []
    for layer in (attached.trunk.last_layer, *attached.heads.layers):
        layer.register_forward_pre_hook(
            lambda layer, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
        )
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {
        "cu_seq_lens_q": lengths,
        "cu_seq_lens_k": lengths,
        "max_length_q": 7,
        "max_length_k": 7,
    }
    mask = torch.ones(1, 1, 12, 12).tril().bool()
    read(attached, {**batch(rows=1), "attention_mask": mask, **given})
    (_, of_layer), *of_heads = seen
    assert len(of_heads) == 2 and of_layer["attention_mask"] is mask
    for args, kwargs in of_heads:
        received = {id(value) for value in (*args, *kwargs.values())}
        assert {
            id(of_layer[name]) for name in ("attention_mask", "position_ids", "position_embeddings")
        } <= received
        for name, value in given.items():
            assert kwargs[name] is of_layer[name] is value


def test_heads_draw_nothing_from_the_global_generator():
    config = copy.deepcopy(FAMILIES["plain"])
    config.attention_dropout = 0.5
    model = AutoModelForCausalLM.from_config(config).train()
    inputs = batch()

    def state_after(attached):
        torch.manual_seed(7)
        if attached is None:
            model(**inputs)
        else:
            read(attached, inputs)[0].loss.backward()
        return torch.get_rng_state()

    plain = state_after(None)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    attached = attach(model, train_heads="lora")
    assert torch.equal(before, torch.get_rng_state())
    model.train()
    assert torch.equal(plain, state_after(attached))


def test_copies_leave_patched_forwards_out():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    layer = model.model.layers[-1]
    layer.mlp.forward = lambda hidden: hidden * 0
    copied = plain_copy(layer, None)
    assert "forward" not in vars(copied.mlp)
    assert copied.state_dict().keys() == layer.state_dict().keys()
    assert layer.mlp.forward(torch.ones(1)) == 0  # the base keeps its own


@pytest.mark.parametrize("how", ["full", "lora"])
def test_heads_over_weights_that_another_process_reads_have_addresses(how):
    """accelerate tells the parameters of an optimizer apart by their address, which is 0 for all on
    the meta device."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"]).to("meta")
    attached = attach(model, train_heads=how)
    trained = [parameter for parameter in attached.heads.parameters() if parameter.requires_grad]
    assert trained
    assert len({parameter.data_ptr() for parameter in trained} - {0}) == len(trained)


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_are_dequantised(tmp_path, bits, ran_before):
    config = LlamaConfig(**{**LLAMA, "hidden_size": 128, "intermediate_size": 256})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    quantisation = (
        BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        if bits == 4
        else BitsAndBytesConfig(load_in_8bit=True)
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantisation, dtype=torch.bfloat16, device_map="cpu"
    )
    assert type(model.model.layers[-1].mlp.up_proj) is not nn.Linear
    if ran_before:
        with torch.no_grad():
            model.eval()(torch.ones(1, 4, dtype=torch.long))
    copied = plain_copy(find_trunk(model).last_layer, model.config.dtype)
    for name, parameter in plain.model.layers[-1].named_parameters():
        ours = copied.get_parameter(name)
        assert (
            type(ours) is nn.Parameter
            and ours.dtype == torch.bfloat16
            and ours.shape == parameter.shape
        )
        # 4 bits: nf4 blocks of 64 keep about 10 % of the norm as error; 8 bits: about 1 %.
        error = (ours.float() - parameter.float()).norm() / parameter.float().norm()
        assert error < (0.12 if bits == 4 else 0.02), (name, error)


def test_encoder_decoder_is_refused_by_name():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        find_trunk(model)


@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("LlamaForSequenceClassification", r"has no unembedding \(lm_head\) where"),
        ("LlamaModel", r"has no unembedding \(lm_head\) where"),
        ("BertForMaskedLM", "has no final norm where"),
    ],
)
def test_a_model_of_another_kind_is_refused_by_name(kind, named):
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model_class = getattr(transformers, kind)
    with pytest.raises(ConfigError, match=f"{kind} {named}"):
        find_trunk(model_class(model_class.config_class(vocab_size=97, **sizes)))


class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, hidden_size=32, vocab_size=97, depth=3, **others):
        super().__init__(**others)
        self.hidden_size, self.vocab_size, self.depth = hidden_size, vocab_size, depth


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(3))

    def forward(self, hidden):
        length = hidden.shape[1]
        normed = self.norm(hidden)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        hidden = (
            hidden + self.attention(normed, normed, normed, attn_mask=later, need_weights=False)[0]
        )
        return hidden + self.mlp(hidden) + sum(expert(hidden) for expert in self.experts)


class OwnModel(PreTrainedModel):
    """A user's: Karpathy's names, a config without num_hidden_layers."""

    config_class = OwnConfig

    def __init__(self, config, other=lambda: nn.Linear(32, 32), others=3):
        super().__init__(config)
        parts = {
            "wte": nn.Embedding(97, 32),
            "others": nn.ModuleList(other() for _ in range(others)),
        }
        parts["h"] = nn.ModuleList(Block() for _ in range(config.depth))
        self.transformer = nn.ModuleDict({**parts, "ln_f": nn.LayerNorm(32)})
        self.lm_head = nn.Linear(32, 97, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer["wte"]

    def forward(self, input_ids, labels=None, **_):
        hidden = self.transformer["wte"](input_ids)
        for other in self.transformer["others"]:
            hidden = hidden + 0.01 * other(hidden)
        for block in self.transformer["h"]:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.lm_head(self.transformer["ln_f"](hidden)))


def gate():
    return nn.Sequential(nn.Linear(32, 32), nn.GELU())


@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 3}])
def test_layers_of_a_users_own_model_are_found(config):
    """A second list as long, of modules without children, lies before them, and lists of experts
    lie in them."""
    model = OwnModel(OwnConfig(**config)).eval()
    trunk = find_trunk(model)
    assert (
        trunk.last_layer is model.transformer["h"][-1] and trunk.norm is model.transformer["ln_f"]
    )
    assert_the_models_own_logits(attach(model, num_heads=1), batch())


def test_which_of_several_lists_holds_the_layers():
    """By the model's word, else by the config's number, else nobody guesses."""
    model = OwnModel(OwnConfig(), other=gate)
    lists = r"transformer.others \(3 Sequential\), transformer.h \(3 Block\)"
    for config in ({}, {"num_hidden_layers": 3}):
        with pytest.raises(
            ConfigError, match=f"OwnModel has several lists .*: {lists}. Name .*_no_split_modules"
        ):
            find_trunk(OwnModel(OwnConfig(**config), other=gate))
    model._no_split_modules = ["Block"]
    assert find_trunk(model).last_layer is model.transformer["h"][-1]
    model = OwnModel(OwnConfig(num_hidden_layers=3), other=gate, others=2)
    assert find_trunk(model).last_layer is model.transformer["h"][-1]
    with pytest.raises(
        ConfigError, match="OwnModel has no list of decoder layers and no final norm where"
    ):
        find_trunk(OwnModel(OwnConfig(num_hidden_layers=7), other=gate))


def test_a_model_with_fewer_layers_than_its_config_says():
    """Pruned by hand: its class tells its layers."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    model.model.layers = model.model.layers[:2]
    assert find_trunk(model).last_layer is model.model.layers[1]


def test_a_size_that_the_config_does_not_name():
    config = OwnConfig()
    del config.hidden_size
    with pytest.raises(
        ConfigError, match="OwnConfig of OwnModel has no hidden_size, .*attribute_map"
    ):
        find_trunk(OwnModel(config))


class Wrapper(nn.Module):
    def __init__(self, model, config=None):
        super().__init__()
        self.lm = model
        if config is not None:
            self.config = config


def test_a_model_in_a_wrapper_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    wrappers = [
        Wrapper(model),
        Wrapper(model, model.config),
        nn.Sequential(model),
        nn.DataParallel(model),
    ]
    wrappers.append(get_peft_model(Wrapper(model), LoraConfig(target_modules=["q_proj"])))
    for wrapper in wrappers:
        inside = wrapper.get_base_model() if isinstance(wrapper, PeftModel) else wrapper
        name = next(iter(dict(inside.named_children())))
        match = rf"a model of class {type(inside).__name__}, .*Pass its {name} \(LlamaForCausalLM\)"
        with pytest.raises(ConfigError, match=match):
            find_trunk(wrapper)
    with pytest.raises(
        ConfigError, match="a model of class Linear, .*Derive its class from PreTrainedModel"
    ):
        find_trunk(nn.Linear(1, 1))


@pytest.mark.parametrize("where", ["disk", "cpu"])
@pytest.mark.parametrize("part", ["model.layers.0", "model.layers.2", "model.norm", "lm_head"])
def test_parts_that_accelerate_brings_for_each_call(tmp_path, part, where):
    """The first layer may lie elsewhere. Of the others heads need the weights themselves."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"]).eval()
    inputs = batch()
    wanted = model(**inputs).logits
    parts = [
        "model.embed_tokens",
        "model.rotary_emb",
        *(f"model.layers.{i}" for i in range(3)),
        "model.norm",
        "lm_head",
    ]
    at = {name: where if name == part else "cpu" for name in parts}
    if where == "disk":
        model = accelerate.dispatch_model(model, at, offload_dir=tmp_path, main_device="cpu")
    else:  # as of a model on a GPU with parts in the CPU's memory, on a machine that has none
        accelerate.cpu_offload(model.get_submodule(part), "cpu")
        accelerate.hooks.add_hook_to_module(
            model, accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
        )
    assert all(p.is_meta for p in model.get_submodule(part).parameters())
    assert torch.equal(model(**inputs).logits, wanted)
    if part == "model.layers.0":
        assert_the_models_own_logits(attach(model, num_heads=1), inputs)
        return
    with pytest.raises(
        ConfigError, match=rf"accelerate offloads {part} of LlamaForCausalLM to disk .*device_map"
    ):
        attach(model)
    assert torch.equal(model(**inputs).logits, wanted)


def test_a_copy_has_no_hooks_of_accelerate():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"]).eval()
    hook = accelerate.hooks.AlignDevicesHook("cpu", io_same_device=True)
    accelerate.hooks.add_hook_to_module(model.model.layers[-1], hook, append=True)
    accelerate.hooks.add_hook_to_module(model.model.layers[-1].mlp, hook)
    copied = plain_copy(model.model.layers[-1], None)
    for module in copied.modules():
        assert not {"forward", "_old_forward", "_hf_hook"} & vars(module).keys()
    assert "_hf_hook" in vars(model.model.layers[-1]) and "forward" in vars(
        model.model.layers[-1].mlp
    )
    assert_the_models_own_logits(attach(model, num_heads=1), batch())


def test_a_layer_that_cannot_be_copied_is_named():
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    model.model.layers[-1].recorder = (i for i in range(3))
    with pytest.raises(
        ConfigError, match=r"last layer \(LlamaDecoderLayer\) cannot be copied .*generator"
    ):
        attach(model)


def with_adapter(model, how, config):
    if how == "add_adapter":
        return add_adapter(model, config)
    return get_peft_model(model, config, mixed=how == "mixed")


@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "mixed"])
def test_auto_is_lora_where_the_base_has_an_adapter(how):
    """With the rank and alpha of its LoRA, if it is one."""
    plain = attach(AutoModelForCausalLM.from_config(FAMILIES["plain"]))
    assert plain.heads.lora is None and all(p.requires_grad for p in plain.heads.parameters())
    base = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj"])
    for config, wanted in (
        (base, (3, 5, True)),
        (OFTConfig(oft_block_size=4, target_modules=["q_proj"]), (8, 16, False)),
    ):
        model = with_adapter(AutoModelForCausalLM.from_config(FAMILIES["plain"]), how, config)
        heads = attach(model).heads
        assert (heads.lora.r, heads.lora.lora_alpha, heads.lora.use_rslora) == wanted
        assert all(p.requires_grad == (".lora_" in name) for name, p in heads.named_parameters())


def test_lora_leaves_out_what_is_never_called():
    """nn.MultiheadAttention takes its output projection's weight and does not call it."""
    attached = attach(OwnModel(OwnConfig()), num_heads=1, train_heads="lora")
    targets = set(attached.heads.lora.target_modules)
    assert targets == {"mlp.0", "mlp.2", *(f"experts.{i}.0" for i in range(3))}
    reading, _ = read(attached, batch())
    reading.loss.backward()
    assert all(p.grad is not None for p in attached.heads.parameters() if p.requires_grad)


def test_lora_without_a_linear_layer_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

    model = OwnModel(OwnConfig())
    model.transformer["h"] = nn.ModuleList(Bare() for _ in range(3))
    with pytest.raises(
        ConfigError, match="caft.train_heads: got lora, .* Bare has no linear layer"
    ):
        attach(model, train_heads="lora")


def test_lora_on_multihead_attention_is_in_the_copy():
    """PEFT wraps both its projections, the outer one inside of the other's base."""
    model = get_peft_model(
        OwnModel(OwnConfig()), LoraConfig(r=2, target_modules=["attention", "mlp.0"])
    ).eval()
    before = plain_copy(find_trunk(model).last_layer, None)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    copied = plain_copy(find_trunk(model).last_layer, None)
    assert (copied.attention.in_proj_weight - before.attention.in_proj_weight).abs().max() > 0.01
    assert (
        type(copied.attention.out_proj)
        is type(before.attention.out_proj)
        is NonDynamicallyQuantizableLinear
    )
    assert_the_models_own_logits(attach(model, num_heads=1), batch())
