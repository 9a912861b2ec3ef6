"""A model as Axolotl's own loader loads it for a YAML, as it is and not to be trained."""

from __future__ import annotations

from typing import cast

import torch
import transformers
from axolotl.loaders import ModelLoader
from axolotl.utils.dict import DictDefault
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from caft_plugin.trunk import trunk_without_weights

# Keys of a YAML that say how several processes share a model, how it is trained in little memory, or with which
# kernels its adapter computes. A frozen model in one process has no use for them.
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
    """Axolotl's loader without what makes a model ready to be trained: the adapter, and norms and embeddings in another
    dtype than the layers."""

    def _configure_embedding_dtypes(self) -> None:
        pass

    def _load_adapters(self) -> None:
        return None


def frozen(cfg: DictDefault) -> DictDefault:
    """A copy of a config without the keys that a frozen model has no use for."""
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
    """Load the base of a YAML with all that the YAML says of it: tokens that are added, overrides of its config,
    revision, quantisation, attention.

    Args:
        model: what the run has left, in the place of the base: a merged model, or an adapter that is put over it.
        dtype: in the place of the YAML's.
        quantised: follow the YAML's quantisation.

    Raises:
        ConfigError: before weights are loaded, where heads cannot be built for the model.
    """
    cfg = frozen(cfg)
    if dtype is not None:
        cfg.torch_dtype = dtype
    if not quantised:
        cfg.load_in_4bit = cfg.load_in_8bit = False
    adapter = model if model is not None and find_adapter_config_file(model) is not None else None
    if model is not None and adapter is None:
        cfg.base_model = cfg.base_model_config = model
        cfg.revision_of_model = None
    loader = FrozenLoader(cfg, tokenizer)
    trunk_without_weights(loader.model_config, cfg.base_model, lambda: build_empty(loader))
    loaded, _ = loader.load()
    return cast(PreTrainedModel, loaded if adapter is None else PeftModel.from_pretrained(loaded, adapter))


def build_empty(loader: ModelLoader) -> nn.Module:
    """The model, of the class that `ModelLoader` will take, from its config."""
    cfg = loader.cfg
    loader._set_auto_model_loader()
    model_class = loader.auto_model_loader
    if cfg.type_of_model not in (None, "AutoModelForCausalLM") and not cfg.trust_remote_code and not cfg.gptq:
        model_class = getattr(transformers, cfg.type_of_model)
    if issubclass(model_class, transformers.PreTrainedModel):
        return model_class(loader.model_config)
    trust_remote_code = bool(cfg.trust_remote_code)
    return model_class.from_config(loader.model_config, trust_remote_code=trust_remote_code)
