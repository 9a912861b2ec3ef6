"""Heads on a model without a trainer, and what one batch gives them."""

from __future__ import annotations

import torch

from builders.tiny import head_outputs
from caft_plugin import CAFTConfig
from caft_plugin.caft.attach import AttachedHeads, Request
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring
from caft_plugin.model.trunk import find_trunk
from caft_plugin.targets import IGNORE, head_targets


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
    request = Request(targets, torch.ones(len(targets)), [True] * len(targets), training=True)
    output, result = attached.answer(request, lambda: (model or attached.model)(**inputs))
    return result, output


def assert_the_models_own_logits(attached, inputs):
    """The first head, a copy of the last layer, gives the model's logits wherever it has a
    target."""
    with head_outputs() as seen:
        result, output = read(attached, inputs)
    positions, hidden = seen[0]
    logits = attached.trunk.logits(attached.trunk.norm(hidden))
    assert 0 < len(positions) < output.logits.shape[:-1].numel()
    torch.testing.assert_close(logits, output.logits.flatten(0, 1)[positions], rtol=0, atol=1e-5)
    return result, output
