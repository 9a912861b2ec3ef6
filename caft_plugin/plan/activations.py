"""Count the bytes that a forward pass keeps for the backward pass, without weights, data or a GPU.

The model is called once with fake tensors, which have shapes and no values, and the tensors that
autograd saves are added up. So it works with any architecture.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from caft_plugin.caft.heads import AuxiliaryHeads, pointwise_parts
from caft_plugin.model.trunk import Trunk


@dataclasses.dataclass(frozen=True)
class Kept:
    """Bytes that one forward pass on one GPU keeps for the backward pass, without gradient
    checkpointing.

    `base`: the model up to its final norm; `layers`: each of its layers; `hidden`: the last layer's
    input; `head`: a head at all positions, including `pointwise`, the part that runs at supervised
    positions only; `norm`: the final norm of a head's output.
    """

    base: float
    layers: list[float]
    hidden: float
    head: float = 0
    pointwise: float = 0
    norm: float = 0


class SavedBytes:
    """Counts the bytes of tensors that autograd saves, each once, without those of `known`
    modules."""

    def __init__(self, *known: nn.Module) -> None:
        self.bytes = 0
        self.figures: Counter[str] = Counter()
        # A storage is kept with its number, which torch would use again after it is freed.
        self._seen: dict[int, UntypedStorage] = {}
        for module in known:
            for tensor in (*module.parameters(), *module.buffers()):
                storage = tensor.untyped_storage()
                self._seen[storage._cdata] = storage

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen[storage._cdata] = storage
            self.bytes += storage.nbytes()
        return tensor

    def watch(self, module: nn.Module, name: str) -> None:
        """Count the bytes saved during the module's calls in `figures[name]`."""

        def before(*_: object) -> None:
            self.figures[name] -= self.bytes

        def after(*_: object) -> None:
            self.figures[name] += self.bytes

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def keeps(
    model: nn.Module,
    trunk: Trunk,
    heads: AuxiliaryHeads | None,
    rows: int,
    length: int,
    dtype: torch.dtype,
) -> tuple[Kept, list[str]]:
    """Call the model, and one head with the arguments of the model's last layer, with fake tensors.

    Args:
        model: the model; it holds fake tensors afterwards.
        trunk: its parts.
        heads: the heads, which hold fake tensors afterwards, or None.
        rows: of the micro-batch.
        length: tokens per row.
        dtype: of the activations.

    Returns:
        The bytes, and notes on estimates.
    """
    try:
        return _keeps(model, trunk, heads, rows, length, dtype), []
    # any model's code can read values, which fake tensors do not have, or devices
    except Exception as error:
        hidden = rows * length * trunk.hidden_size * dtype.itemsize
        layers = [17.0 * hidden] * len(trunk.layers)
        estimate = Kept(
            base=sum(layers),
            layers=layers,
            hidden=hidden,
            head=layers[-1],
            norm=2.0 * hidden,
        )
        return estimate, [
            "Activations are a rough estimate, 17 values per token and hidden unit in each layer"
            f" (arXiv 2205.05198): {type(trunk.model).__name__} cannot run with fake tensors"
            f" ({type(error).__name__})."
        ]


def _keeps(
    model: nn.Module,
    trunk: Trunk,
    heads: AuxiliaryHeads | None,
    rows: int,
    length: int,
    dtype: torch.dtype,
) -> Kept:
    call: dict[str, Any] = {}

    def note_call(
        _: nn.Module,
        args: Any,
        kwargs: Any,
    ) -> None:
        call.update(args=args, kwargs=kwargs)

    decoder = trunk.model.get_decoder()
    half = dtype != torch.float32
    with contextlib.ExitStack() as stack:
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        fake = [m.to_empty(device="cpu") for m in (model, heads) if m is not None]
        saved = SavedBytes(*fake)
        stack.enter_context(
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
        )
        stack.enter_context(torch.autocast("cpu", dtype if half else torch.bfloat16, enabled=half))
        # Rows without padding: a mask would be saved, and keys and values repeated, at every layer.
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = lambda *_, **__: None
        # transformers' own is back
        stack.callback(ALL_MASK_ATTENTION_FUNCTIONS.__delitem__, "sdpa")
        # A head is called as the last layer is, so it keeps what a layer keeps.
        trunk.last_layer.register_forward_pre_hook(note_call, with_kwargs=True)
        for index, layer in enumerate(trunk.layers):
            saved.watch(layer, f"layer {index}")
        model.train()
        ids = torch.zeros(rows, length, dtype=torch.long)
        decoder(input_ids=ids, use_cache=False)
        base = saved.bytes
        source = call["args"][0] if call["args"] else call["kwargs"]["hidden_states"]
        hidden = source.untyped_storage().nbytes()
        names = [f"layer {index}" for index in range(len(trunk.layers))]
        by_layer = [float(saved.figures[name]) for name in names]
        if heads is None:
            return Kept(base, by_layer, hidden)
        head = heads.layers[0]
        for part in pointwise_parts(head):
            saved.watch(part, "pointwise")
        output = head(*call["args"], **call["kwargs"])
        kept_by_head = saved.bytes - base
        trunk.norm(output if isinstance(output, Tensor) else output[0])
        norm = saved.bytes - base - kept_by_head
    return Kept(base, by_layer, hidden, kept_by_head, saved.figures["pointwise"], norm)
