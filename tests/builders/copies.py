"""How far a fresh head's logits are from the model's own, for any adapter and quantisation."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from builders.heads import attach, batch
from builders.tiny import LLAMA, head_outputs
from caft_plugin.caft.attach import Request
from caft_plugin.model.copies import plain_copy
from caft_plugin.model.trunk import find_trunk
from caft_plugin.targets import head_targets

EXACT = 1e-5

# Larger weights than a model starts with, so that what an adapter does to the last layer shows in
# the logits.
CONFIG = LlamaConfig(**LLAMA, initializer_range=0.1)

MOE = {**LLAMA, "num_experts_per_tok": 2, "initializer_range": 0.1}


def tiny(config=CONFIG):
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def moved(model):
    """The model, its adapters with random weights."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def remember(model):
    """What a copy must not change of the model that it is taken from."""
    state = {
        name: tensor.clone()
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, torch.Tensor)
    }
    hooks = [
        {k: dict(v) for k, v in vars(m).items() if "_hooks" in k and isinstance(v, dict)}
        for m in model.modules()
    ]
    forwards = [vars(m).get("forward") for m in model.modules()]
    return state, [type(m) for m in model.modules()], hooks, forwards, torch.get_rng_state()


def whole(tensor):
    return tensor.dequantize() if hasattr(tensor, "tensor_impl") else tensor


def assert_same(before, after):
    states = before[0], after[0]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(whole(states[0][name]), whole(states[1][name])) for name in states[0])
    assert before[1:4] == after[1:4] and torch.equal(before[4], after[4])


def assert_plain(layer):
    for name, module in layer.named_modules():
        assert not type(module).__module__.startswith(("peft", "bitsandbytes", "torchao")), name
        assert not hasattr(module, "parametrizations"), name
        assert not {"forward", "_old_forward", "_hf_hook"} & vars(module).keys(), name
        for key, hooks in vars(module).items():
            assert not ("_hooks" in key and isinstance(hooks, dict) and hooks), (name, key)
    for name, parameter in layer.named_parameters():
        assert type(parameter) is nn.Parameter and parameter.is_floating_point(), name
    for name, buffer in layer.named_buffers():
        assert type(buffer) is torch.Tensor, name


def gap(model):
    """How far a fresh head's logits are from the model's own, at every target, relative to their
    norm. What is copied is plain, and the model is as it was."""
    before = remember(model)
    layer = find_trunk(model).last_layer
    assert_plain(plain_copy(layer, model.config.dtype))
    attached = attach(model, num_heads=1, train_heads="frozen")
    attached.detach()
    assert_same(before, remember(model))

    attached = attach(model, num_heads=1, train_heads="frozen")
    with torch.no_grad(), head_outputs() as seen:
        output = read_without_gradients(attached)
    attached.detach()
    positions, hidden = seen[0]
    trunk = find_trunk(model)
    with torch.no_grad():
        ours = trunk.logits(trunk.norm(hidden)).float()
    theirs = output.logits.flatten(0, 1)[positions].float()
    return ((ours - theirs).norm() / theirs.norm()).item()


def read_without_gradients(attached):
    """As in evaluation, where a model takes no gradients (some quantised products have none on a
    CPU)."""
    inputs = batch()
    targets = head_targets(inputs, len(attached.heads))
    request = Request(targets, torch.ones(len(targets)), [True] * len(targets), training=False)
    return attached.answer(request, lambda: attached.model(**inputs))[0]


def without_adapter(model, plain):
    """How far the logits are from those of the model with the last layer of `plain` in the place of
    its own."""
    inputs = batch()
    trunk = find_trunk(model)
    with torch.no_grad():
        with_it = model(**inputs).logits
        caught = {}
        handle = trunk.last_layer.register_forward_hook(
            lambda layer, args, kwargs, output: caught.setdefault(
                "out", plain(*args, **{**kwargs, "use_cache": False})
            ),
            with_kwargs=True,
        )
        without = model(**inputs, use_cache=False).logits
        handle.remove()
    return ((with_it - without).norm() / without.norm()).item()
