"""Quantise a tiny model's folder as llm-compressor does, in the format of compressed-tensors."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

GROUP = 32  # weights of a row with one scale, in 4 bits
# `int8`: weights by row, and activations by token as they come. `int4`: weights only, in groups.
WEIGHTS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
    "int4": {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": GROUP,
    },
}
ACTIVATIONS = {
    "int8": {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "token", "dynamic": True}
}
FORMATS = {"int8": "int-quantized", "int4": "pack-quantized"}


def quantise(folder: Path, scheme: str) -> dict[str, Tensor]:
    """Quantise the projections in a model's file. Returns all its weights, those dequantised."""
    file, config_file = folder / "model.safetensors", folder / "config.json"
    plain, written = load_file(file), {}
    for name, weight in plain.items():
        if name.endswith("_proj.weight"):
            tensors, plain[name] = {"int8": int8, "int4": int4}[scheme](weight)
            written |= {
                name.removesuffix("weight") + key: tensor for key, tensor in tensors.items()
            }
        else:
            written[name] = weight
    save_file(written, file, {"format": "pt"})
    group = {
        "targets": ["Linear"],
        "weights": WEIGHTS[scheme],
        "input_activations": ACTIVATIONS.get(scheme),
    }
    config = json.loads(config_file.read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": FORMATS[scheme],
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    config_file.write_text(json.dumps(config))
    return plain


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Up to 63 only: a CPU without VNNI adds two products in 16 bits, and what is above 32767 is
    lost."""
    scale = weight.abs().amax(1, keepdim=True) / 63
    rounded = (weight / scale).round()
    return {"weight": rounded.to(torch.int8), "weight_scale": scale}, rounded * scale


def int4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(2, keepdim=True) / 7
    rounded = (groups / scale).round()
    eights = (rounded.flatten(1) + 8).to(torch.int32).unflatten(1, (-1, 8))
    packed = (eights << torch.arange(0, 32, 4, dtype=torch.int32)).sum(2, dtype=torch.int32)
    tensors = {
        "weight_packed": packed,
        "weight_scale": scale.squeeze(2),
        "weight_shape": torch.tensor(weight.shape),
    }
    return tensors, (rounded * scale).flatten(1)


def rounded_as_int8(activations: Tensor) -> Tensor:
    """What a matrix product in int8 reads: 256 steps between each token's least and largest
    value."""
    least, most = activations.aminmax(dim=-1, keepdim=True)
    step = (most - least).clamp(min=1e-12) / 255
    zero = (-128 - least / step).round()
    return (((activations / step).round() + zero).clamp(-128, 127) - zero) * step
