"""A plugin of Axolotl that does on a CPU what its `quantize_moe_experts` does on a GPU."""

from __future__ import annotations

import torch
from axolotl.integrations.base import BasePlugin
from axolotl.monkeypatch import moe_quant
from bitsandbytes.functional import int8_vectorwise_quant
from bitsandbytes.nn.parametrize import replace_parameter_4bit


def quantise_experts(model: torch.nn.Module, bits: int = 4) -> None:
    """Calls what Axolotl calls for each of the experts' three-dimensional parameters while a GPU
    loads them, with its defaults: each becomes a parametrisation of its quantised values. It passes
    over parameters that lie elsewhere."""
    for name, module in list(model.named_modules()):
        parameters = dict(module.named_parameters(recurse=False))
        if "expert" not in name or not any(
            parameter.dim() == 3 for parameter in parameters.values()
        ):
            continue
        moe_quant._moe_load_state["expert_param_order"][name] = list(parameters)
        for key, parameter in parameters.items():
            if parameter.dim() == 3 and bits == 4:
                replace_parameter_4bit(module, key, compress_statistics=True, quant_type="nf4")
            elif parameter.dim() == 3:
                moe_quant.replace_parameter_8bit(module, key)


def rows_in_8_bits(values: torch.Tensor, threshold: float = 0.0):
    """bitsandbytes quantises nothing but matrices on a CPU."""
    quantised, row_stats, _ = int8_vectorwise_quant(values.flatten(0, -2), threshold)
    return quantised.view(values.shape), row_stats, None


class QuantisedExperts(BasePlugin):
    def post_model_build(self, cfg, model):
        quantise_experts(model)
