from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import LLAMA
from torch import nn
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
    Qwen2Config,
    T5Config,
    T5ForConditionalGeneration,
)

from caft_plugin import CAFTConfig, ConfigError
from caft_plugin.checkpoint import resolve_wiring
from caft_plugin.heads import MODULE_NAME, AttachedHeads, Reading, build_heads, find_trunk, plain_copy, pointwise_parts
from caft_plugin.loss import IGNORE, LOGITS_AT_A_TIME, head_targets

FAMILIES = {
    "plain": LlamaConfig(**LLAMA),
    "bias": Qwen2Config(**LLAMA),
    "soft-capped": Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0),
    "multiplied": Cohere2Config(**LLAMA, logit_scale=0.25),
    "divided": GraniteConfig(**LLAMA, logits_scaling=4.0),
}


def attach(model, **settings):
    config = resolve_wiring(CAFTConfig(**settings), None)
    trunk = find_trunk(model)
    return AttachedHeads(model, build_heads(model, trunk, config, seed=0), trunk, config).attach()


def batch(rows=2, length=12):
    ids = torch.randint(1, 97, (rows, length))
    labels = ids.clone()
    labels[:, :4] = IGNORE
    return {"input_ids": ids, "labels": labels}


def read(attached, inputs, model=None):
    targets = head_targets(inputs, len(attached.heads))
    reading = Reading(targets, torch.ones(len(targets)), [True] * len(targets), training=True)
    with attached.reading(reading):
        output = (model or attached.model)(**inputs)
    return reading, output


def assert_the_models_own_logits(attached, inputs):
    """The first head, a copy of the last layer, gives the model's logits wherever it has a target."""
    seen = []
    original = attached.head_output
    attached.head_output = lambda *args: seen.append((args[-1], original(*args))) or seen[-1][1]
    reading, output = read(attached, inputs)
    positions, hidden = seen[0]
    logits = attached.trunk.logits(attached.trunk.norm(hidden))
    assert 0 < len(positions) < output.logits.shape[:-1].numel()
    torch.testing.assert_close(logits, output.logits.flatten(0, 1)[positions], rtol=0, atol=1e-5)
    return reading, output


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
    model.lm_head.register_forward_hook(lambda module, args, out: out * (5.0 if out.dim() == 3 else 1.0))
    assert inner is not None
    with pytest.raises(ConfigError, match="LlamaForCausalLM makes its logits in a way"):
        read(attached, batch())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("how", ["full", "lora", "frozen"])
@pytest.mark.parametrize("wiring", [("penultimate", True), ("final", False)])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, wiring, how, lora):
    """Loss and gradients, relative difference at most 1e-6 in float32, base, LoRA and head parameters."""
    results = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
        if lora:
            model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
            nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B.default.weight)
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
        assert reading.loss > 0 and output.caft_loss is reading.loss
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
    reading = Reading(targets, torch.ones(4), [True] * 4, training=True)
    with attached.reading(reading):
        with torch.no_grad():
            model(**second)
        assert reading.loss is None
        model(**first)
        loss = reading.loss
        with torch.no_grad():
            model(**second)
        assert reading.loss is loss
    expected, _ = read(attached, first)
    torch.testing.assert_close(loss, expected.loss)
    assert attached._call is None
    model.generate(first["input_ids"], max_new_tokens=2)
    assert attached._call is None


@pytest.mark.parametrize(("family", "attention"), [("plain", "sdpa"), ("plain", "eager"), ("soft-capped", "eager")])
@pytest.mark.parametrize("wiring", [{}, {"head_input": "final", "head_norm": False}])
def test_a_packed_row_gives_what_its_documents_give(family, attention, wiring):
    """Sums of each head and gradients, float32, 1e-5 relative: documents of very uneven length, one of one token."""
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation=attention).train()
    model.config.use_cache = False  # as the Trainer has it; with a cache transformers does not look for documents
    attached = attach(model, **wiring)
    documents = [batch(rows=1, length=length) for length in (9, 1, 23, 5)]
    packed = {key: torch.cat([d[key] for d in documents], dim=1) for key in documents[0]}
    packed["position_ids"] = torch.cat([torch.arange(d["labels"].shape[1]) for d in documents])[None]

    def gradients(batches):
        model.zero_grad()
        readings = [read(attached, inputs)[0] for inputs in batches]
        sum(reading.loss for reading in readings).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        return sum(reading.sums for reading in readings), found

    one_by_one, packed_row = gradients(documents), gradients([packed])
    torch.testing.assert_close(packed_row[0], one_by_one[0], rtol=1e-5, atol=0)
    assert packed_row[1].keys() == one_by_one[1].keys() and any(MODULE_NAME in name for name in one_by_one[1])
    for name, wanted in one_by_one[1].items():
        torch.testing.assert_close(packed_row[1][name], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


def test_a_heads_mlp_runs_where_there_is_a_target():
    """Which children of a layer may do so is found by their structure; test_families.py has the numbers."""
    attached = attach(AutoModelForCausalLM.from_config(FAMILIES["plain"]), num_heads=2)
    head = attached.heads.layers[1]
    assert pointwise_parts(head) == [head.mlp]
    experts = AutoModelForCausalLM.from_config(MixtralConfig(**LLAMA, num_local_experts=4))
    assert pointwise_parts(experts.model.layers[-1]) == []
    shapes = []
    for layer in (attached.trunk.last_layer, head):
        for part in (layer.self_attn.k_proj, layer.mlp.up_proj):
            part.register_forward_hook(lambda module, args, output: shapes.append(output.shape[:-1]))
    reading, _ = read(attached, batch(rows=2, length=12))
    targets = int((reading.targets[1] != IGNORE).sum())
    assert targets == 2 * 8 and shapes == [(2, 12), (2, 12), (2, 12), (1, targets)]
    assert not head.mlp._forward_hooks and not head.mlp._forward_pre_hooks


def test_no_tensor_is_as_large_as_the_logits_of_a_batch(monkeypatch):
    """Forward and backward over heads alone, every position supervised; the host is not asked for logits."""

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
    reading = Reading(targets, torch.ones(4), [True] * 4, training=True)
    with Largest() as largest, attached.reading(reading):
        model(input_ids=ids, logits_to_keep=1)
        reading.loss.backward()
    assert 64 * vocab <= largest.numel < rows * length * vocab / 4
    assert model.lm_head.weight.grad is not None


def test_what_attention_kernels_need_is_passed_on_as_received():
    """Sequence lengths of flash attention, or a block mask of flex attention: the objects that the last layer got."""
    model = AutoModelForCausalLM.from_config(FAMILIES["plain"])
    attached = attach(model, num_heads=2)
    seen = []
    for layer in (attached.trunk.last_layer, *attached.heads.layers):
        layer.register_forward_pre_hook(lambda layer, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    lengths = torch.tensor([0, 5, 12], dtype=torch.int32)
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 7, "max_length_k": 7}
    mask = torch.ones(1, 1, 12, 12).tril().bool()
    read(attached, {**batch(rows=1), "attention_mask": mask, **given})
    (_, of_layer), *of_heads = seen
    assert len(of_heads) == 2 and of_layer["attention_mask"] is mask
    for args, kwargs in of_heads:
        received = {id(value) for value in (*args, *kwargs.values())}
        assert {id(of_layer[name]) for name in ("attention_mask", "position_ids", "position_embeddings")} <= received
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


@pytest.mark.parametrize("ran_before", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_copies_are_dequantised(tmp_path, bits, ran_before):
    config = LlamaConfig(**{**LLAMA, "hidden_size": 128, "intermediate_size": 256})
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(tmp_path)
    quantisation = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
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
        assert type(ours) is nn.Parameter and ours.dtype == torch.bfloat16 and ours.shape == parameter.shape
        # 4 bits: nf4 blocks of 64 keep about 10 % of the norm as error; 8 bits: about 1 %.
        error = (ours.float() - parameter.float()).norm() / parameter.float().norm()
        assert error < (0.12 if bits == 4 else 0.02), (name, error)


def test_encoder_decoder_is_refused_by_name():
    model = T5ForConditionalGeneration(T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        find_trunk(model)


def test_a_model_of_another_kind_is_refused_by_name():
    from transformers import LlamaForSequenceClassification

    with pytest.raises(ConfigError, match="LlamaForSequenceClassification has no .*unembedding"):
        find_trunk(LlamaForSequenceClassification(FAMILIES["plain"]))
