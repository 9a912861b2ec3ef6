"""All heads in one forward pass of vLLM's parallel drafter (`"method": "eagle3",
"parallel_drafting": true`).

Per request, vLLM gives its parallel drafter the target's hidden states at the new positions,
followed by `num_speculative_tokens - 1` mask slots. The drafter's outputs at the last position and
at the mask slots are the draft tokens. Heads draft from the last position and not from mask slots.
Therefore all heads run over all slots, and mask slot j returns head j+1's output at the last real
position before it. The keys and values of mask slots come after every real position, so no real
query attends to them, and later steps overwrite them.

Only vLLM imports this module. It was tested with the versions in TESTED.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

import torch
import vllm
from packaging.version import Version
from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    get_draft_quant_config,
)

from caft_plugin.serving.families import FAMILIES, Family

TESTED = ("0.32.0", "0.33")  # from, to below

if not Version(TESTED[0]) <= Version(vllm.__version__.split("+")[0]) < Version(TESTED[1]):
    raise RuntimeError(
        f"caft_plugin: this is vLLM {vllm.__version__}, but the drafter of CAFT heads was tested"
        f" with vLLM >= {TESTED[0]}, < {TESTED[1]}. Install one of these versions, or serve head 1"
        " without the plugin: caft export-drafter --format eagle3."
    )


class Heads(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".q_proj": (".qkv_proj", "q"),
            ".k_proj": (".qkv_proj", "k"),
            ".v_proj": (".qkv_proj", "v"),
            ".gate_proj": (".gate_up_proj", 0),
            ".up_proj": (".gate_up_proj", 1),
        }
    )

    def __init__(
        self,
        vllm_config: VllmConfig,
        config: PretrainedConfig,
        first: int,
        prefix: str,
    ) -> None:
        super().__init__()
        wiring = config.caft_heads
        self.normed_input = wiring["head_input"] == "final"
        self.normed_output = wiring["head_norm"]
        build = _builder_of(FAMILIES[wiring["model_type"]], vllm_config, config)
        asked = vllm_config.speculative_config.num_speculative_tokens
        self.layers = nn.ModuleList(build(f"{prefix}.layers.{first + k}") for k in range(asked))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        # vLLM replaces it by the target's; heads use none
        self.embed_tokens = nn.Embedding(1, config.hidden_size)

    def forward(self, positions: Tensor, hidden_states: Tensor) -> Tensor:
        """Return the heads' outputs (heads, slots, hidden size), the unembedding's input."""
        source = self.norm(hidden_states) if self.normed_input else hidden_states
        return torch.stack(
            [self._finished(*layer(positions, source.clone(), None)) for layer in self.layers]
        )

    def _finished(self, hidden_states: Tensor, residual: Tensor) -> Tensor:
        return (
            self.norm(hidden_states, residual)[0]
            if self.normed_output
            else hidden_states + residual
        )


def _builder_of(
    family: Family,
    vllm_config: VllmConfig,
    config: PretrainedConfig,
) -> Callable[[str], nn.Module]:
    """Return a function that builds a layer with a given prefix. Heads are not quantised, even if
    the target is."""
    module, name = family.vllm_layer
    layer_class = getattr(import_module(module), name)
    quantisation = get_draft_quant_config(vllm_config)
    if not family.takes_vllm_config:
        return lambda prefix: layer_class(
            config, vllm_config.cache_config, quantisation, prefix=prefix
        )

    class HeadLayer(layer_class):  # type: ignore[misc, valid-type]
        def get_quant_config(self, vllm_config: VllmConfig) -> object:
            return quantisation

    return lambda prefix: HeadLayer(vllm_config, prefix=prefix, config=config)


class CaftHeadsEagle3(Eagle3LlamaForCausalLM):
    """The draft model. It only has its base class because vLLM's proposer checks the type.

    Raises:
        ValueError: the heads were made for another model than the served one, or a weight is
            missing.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)
        self.config = config = vllm_config.speculative_config.draft_model_config.hf_config
        target = vllm_config.model_config
        config.target_layer_count = layers = target.get_total_num_hidden_layers()
        _check(
            config,
            target.hf_text_config,
            layers,
            vllm_config.speculative_config.num_speculative_tokens,
        )
        self.mask = config.mask_token_id
        name = f"{prefix}.model" if prefix else "model"
        self.model = Heads(vllm_config, config, layers, name)
        self.logits_processor = LogitsProcessor(
            config.vocab_size, scale=getattr(config, "logit_scale", 1.0)
        )
        self.register_buffer("mask_hidden", torch.zeros(1, config.hidden_size), persistent=False)

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        return hidden_states

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        inputs_embeds: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        outputs = self.model(positions, hidden_states)
        slots = torch.arange(len(input_ids), device=input_ids.device)
        real = torch.where(input_ids == self.mask, -1, slots).cummax(0).values.clamp_(min=0)
        head = (slots - real).clamp_(max=len(outputs) - 1)
        drafted = outputs[head, real]
        return drafted, drafted

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        unused = tuple(
            f"layers.{k}." for k in range(len(self.model.layers), self.config.num_hidden_layers)
        )
        wanted = (
            (name, tensor)
            for name, tensor in weights
            if name != "mask_hidden" and not name.startswith(unused)
        )
        named = ((f"model.{name}", tensor) for name, tensor in wanted)
        loaded = AutoWeightsLoader(self).load_weights(named, mapper=Heads.hf_to_vllm_mapper)
        missing = (
            {name for name, _ in self.named_parameters()} - loaded - {"model.embed_tokens.weight"}
        )
        if missing:
            raise ValueError(
                f"caft_plugin: the drafter's model.safetensors lacks {len(missing)} weights, the"
                f" first of them {min(missing)}. Write the folder again with caft export-drafter."
            )


def _check(
    config: PretrainedConfig,
    target: PretrainedConfig,
    layers: int,
    num_speculative_tokens: int,
) -> None:
    """Raise ValueError if a drafter was made for another model than the target, or has too few
    heads."""
    made_for = {
        "num_hidden_layers": (config.caft_heads["target_layers"], layers),
        "hidden_size": (config.hidden_size, target.hidden_size),
        "vocab_size": (config.vocab_size, target.vocab_size),
    }
    for key, (of_drafter, of_target) in made_for.items():
        if of_drafter != of_target:
            raise ValueError(
                f"caft_plugin: this drafter was made for a model with {key} {of_drafter}, but the"
                f" served model has {of_target}. Make a drafter from this model's heads: caft"
                " export-drafter."
            )
    if num_speculative_tokens > config.num_hidden_layers:
        raise ValueError(
            f"caft_plugin: num_speculative_tokens is {num_speculative_tokens}, but this drafter has"
            f" {config.num_hidden_layers} heads. Use at most {config.num_hidden_layers}."
        )
