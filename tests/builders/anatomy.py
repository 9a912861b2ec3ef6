"""What a model is made of."""

from __future__ import annotations

import torch

HOOKS = [name for name in vars(torch.nn.Linear(1, 1)) if name.endswith("_hooks")]


def anatomy(model):
    """All of a model that a plugin might leave something on."""
    return {
        "modules": [(name, type(module)) for name, module in model.named_modules()],
        "parameters": [
            (name, tuple(p.shape), p.requires_grad) for name, p in model.named_parameters()
        ],
        "state": list(model.state_dict()),
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [[len(getattr(module, name)) for name in HOOKS] for module in model.modules()],
        "count": model.num_parameters(),
    }
