"""Load a YAML's model with Axolotl's loader, frozen, without preparing it for training."""

from __future__ import annotations

from typing import cast

import torch
import transformers
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from caft_plugin.errors import asked_as
from caft_plugin.model.loading import base_of, reading
from caft_plugin.model.trunk import trunk_without_weights

# Keys for sharding a model, saving memory in training, or the adapter's kernels. A frozen model in
# one process does not need them.
OF_TRAINING = (
    "fsdp",
    "fsdp_config",
    "fsdp_version",
    "deepspeed",
    "gradient_checkpointing",
    "selective_checkpointing",
    "activation_offloading",
    "layer_offloading",
    "lora_mlp_kernel",
    "lora_qkv_kernel",
    "lora_o_kernel",
    "lora_embedding_kernel",
    "lora_model_dir",
)


class FrozenLoader(ModelLoader):
    """Axolotl's loader without the preparation for training: no adapter, norms and embeddings in
    the layers' dtype."""

    def _configure_embedding_dtypes(self) -> None:
        pass

    def _load_adapters(self) -> None:
        return None


def frozen(cfg: DictDefault) -> DictDefault:
    """Return a copy of a config without the keys that a frozen model does not need."""
    copied = DictDefault(dict(cfg))
    for key in OF_TRAINING:
        copied[key] = None
    return copied


def load_frozen(
    cfg: DictDefault,
    tokenizer: PreTrainedTokenizerBase,
    model: str | None = None,
    dtype: torch.dtype | None = None,
    quantised: bool = True,
) -> PreTrainedModel:
    """Load a YAML's base with its settings: added tokens, config overrides, revision, quantisation,
    attention.

    Args:
        cfg: the YAML as Axolotl reads it.
        tokenizer: the YAML's tokenizer.
        model: a merged model that replaces the base, or an adapter that is loaded over it.
        dtype: replaces the YAML's.
        quantised: whether to use the YAML's quantisation.

    Raises:
        ConfigError: heads cannot be built for the model; raised before weights are loaded.
    """
    cfg = frozen(cfg)
    if dtype is not None:
        cfg.torch_dtype = dtype
    if not quantised:
        cfg.load_in_4bit = cfg.load_in_8bit = False
    key = "base_model" if model is None else asked_as("model")
    adapter = model if model is not None and base_of(model) != model else None
    if model is not None and adapter is None:
        cfg.base_model = cfg.base_model_config = model
        cfg.revision_of_model = None
    with reading("config", cfg.base_model, key):
        loader = FrozenLoader(cfg, tokenizer)
    trunk_without_weights(loader.model_config, cfg.base_model, lambda: build_empty(loader))
    with reading("weights", cfg.base_model, key):
        loaded, _ = loader.load()
    if adapter is None:
        return loaded
    with reading("weights", adapter, key):
        return cast(PreTrainedModel, PeftModel.from_pretrained(loaded, adapter))


def build_empty(loader: ModelLoader) -> nn.Module:
    """Build the model from its config, with the class that `ModelLoader` will use."""
    cfg = loader.cfg
    loader._set_auto_model_loader()
    model_class = loader.auto_model_loader
    if (
        cfg.type_of_model not in (None, "AutoModelForCausalLM")
        and not cfg.trust_remote_code
        and not cfg.gptq
    ):
        model_class = getattr(transformers, cfg.type_of_model)
    if issubclass(model_class, transformers.PreTrainedModel):
        return model_class(loader.model_config)
    trust_remote_code = bool(cfg.trust_remote_code)
    return model_class.from_config(loader.model_config, trust_remote_code=trust_remote_code)
