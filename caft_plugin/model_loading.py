"""Load a model with transformers: a folder or a Hub id, of a model or of an adapter, which brings its base with it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, Unpack, cast

import torch
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, CONFIG_NAME, cached_file, find_adapter_config_file

from caft_plugin.config import ConfigError, first_line, shown
from caft_plugin.storage import read_text
from caft_plugin.trunk import auto_class, input_embedding, trunk_without_weights

logger = logging.getLogger(__name__)

IN_ADAPTER = "base_model.model."  # PEFT's prefix of a module's name in an adapter's file
# By the end of its name in an adapter's file, which dimension of a tensor is the vocabulary's.
VOCABULARY = {"weight": 0, "base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}


def base_of(name: str) -> str:
    """The base model that an adapter's folder or Hub id names; of any other model the name itself.

    Raises:
        ConfigError: an adapter that names none.
    """
    return _base_and_revision(name)[0]


def _base_and_revision(name: str) -> tuple[str, str | None]:
    file = find_adapter_config_file(name)
    if file is None:
        return name, None
    try:
        keys = json.loads(read_text(Path(file), "--model", "the folder of an adapter"))
        base, revision = keys["base_model_name_or_path"], keys.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        base = revision = None
    if not isinstance(base, str):
        raise ConfigError(f"--model: {name} is an adapter, but its {Path(file).name} names no base_model_name_or_path.")
    return base, revision if isinstance(revision, str) else None


MERGED = "merged"  # Axolotl's folder for the merged model, in the run's
# Keys of a config in which a run's and its merged model's may differ, both being right.
NOT_OF_RUN = {
    "_name_or_path",
    "architectures",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "quantization_config",
    "text_config",
    "transformers_version",
    "use_cache",
    "vocab_size",
}


class Loading(TypedDict, total=False):
    """How weights are loaded: quantised by bitsandbytes or not, and with which attention."""

    load_in_4bit: bool
    load_in_8bit: bool
    attn_implementation: str | None


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a model comes from: its base, at a revision, the config to load that with, and how many tokens the
    config of the adapter beside it gives the vocabulary (None: what the base has)."""

    name: str
    base: str
    revision: str | None
    config: PretrainedConfig
    tokens: int | None
    trust_remote_code: bool

    @classmethod
    def of(cls, name: str, trust_remote_code: bool = False) -> Source:
        """Read what `name` is. No weights are read.

        Raises:
            ConfigError: an adapter that names no base.
        """
        base, revision = _base_and_revision(name)
        read = functools.partial(AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
        config = read(base, **({} if revision is None else {"revision": revision}))
        if base == name:
            with_overrides_of_run(config, name, read)
            return cls(name, base, revision, config, None, trust_remote_code)
        own = _own_config(name, config, read)
        if own is None:
            return cls(name, base, revision, config, None, trust_remote_code)
        # What the run changed is followed (overrides_of_model_config). Vocabulary and quantisation are as the base's
        # files have them: these are what is read first.
        text, tokens = own.get_text_config(), own.get_text_config().vocab_size
        text.vocab_size = config.get_text_config().vocab_size
        vars(own).pop("quantization_config", None)
        if getattr(config, "quantization_config", None) is not None:
            own.quantization_config = config.quantization_config
        return cls(name, base, revision, own, tokens, trust_remote_code)

    def build(self) -> nn.Module:
        """Make the model from its config."""
        trust_remote_code = self.trust_remote_code
        return auto_class(self.config).from_config(self.config, trust_remote_code=trust_remote_code)

    def load(self, dtype: torch.dtype | str, **loading: Unpack[Loading]) -> PreTrainedModel:
        """Load the weights: the base's, quantised by bitsandbytes as QLoRA does (NF4, double quantisation) if asked,
        its vocabulary as large as the adapter needs, and the adapter."""
        trust_remote_code = self.trust_remote_code
        options: dict[str, object] = {} if self.revision is None else {"revision": self.revision}
        model = auto_class(self.config).from_pretrained(
            self.base,
            config=self.config,
            dtype=dtype,
            quantization_config=quantisation(dtype, loading),
            attn_implementation=loading.get("attn_implementation"),
            trust_remote_code=trust_remote_code,
            device_map={"": 0} if torch.cuda.is_available() else None,
            **options,
        )
        model.config.use_cache = False
        if self.base == self.name:
            return model
        tokens = tokens_in_adapter(self.name, model) or self.tokens
        if tokens is not None and tokens != input_embedding(model).num_embeddings:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        # Not left to transformers: of a folder with a config.json beside the adapter it takes all weights to be there.
        return cast(PreTrainedModel, PeftModel.from_pretrained(model, self.name))


def _own_config(
    name: str, base: PretrainedConfig, read: functools.partial[PretrainedConfig]
) -> PretrainedConfig | None:
    """The config that lies beside an adapter, as Axolotl leaves it with what the run changed in it; None without one,
    or with one of another kind of model than the adapter's base."""
    try:
        file = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
        own = None if file is None else read(name)
    except (OSError, ValueError) as error:
        logger.warning("--model: %s of the adapter in %s is not read (%s)", CONFIG_NAME, name, first_line(error))
        return None
    if own is not None and own.model_type != base.model_type:
        logger.warning(
            "--model: %s in %s is not read: it is of a %s, but the adapter's base is a %s",
            CONFIG_NAME,
            name,
            own.model_type,
            base.model_type,
        )
        return None
    return own


def with_overrides_of_run(config: PretrainedConfig, name: str, read: functools.partial[PretrainedConfig]) -> None:
    """Put into `config`, of the model in the folder `name`, what the run whose adapter it has merged had changed of its
    base's config. `axolotl merge-lora` writes the base's config beside the merged weights, without the YAML's
    `overrides_of_model_config`: with that it would be another model than the one that was trained."""
    run = Path(name).absolute().parent
    if Path(name).name != MERGED or find_adapter_config_file(str(run)) is None:
        return
    own = _own_config(str(run), config, read)
    trained, written = ({} if own is None else own.to_dict()), config.to_dict()
    changed = {
        key: value
        for key, value in trained.items()
        if key in written and key not in NOT_OF_RUN and value != written[key]
    }
    for key in changed:
        setattr(config, key, getattr(own, key))
    if changed:
        logger.warning(
            "--model: %s/%s lacks what the run in %s was trained with (overrides_of_model_config): %s. The model is "
            "loaded with it; write it into that file before you use the model elsewhere",
            name,
            CONFIG_NAME,
            run,
            ", ".join(f"{key}: {shown(value)}" for key, value in changed.items()),
        )


def quantisation(dtype: torch.dtype | str, loading: Loading) -> BitsAndBytesConfig | None:
    if loading.get("load_in_4bit"):
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if loading.get("load_in_8bit") else None


def tokens_in_adapter(name: str, model: PreTrainedModel) -> int | None:
    """How many tokens the embeddings have that an adapter's file holds, whole or as LoRA factors; None without any."""
    file = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [f"{IN_ADAPTER}{at}." for at, module in model.named_modules() if id(module) in embeddings]
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (OSError, SafetensorError):
        return None  # PEFT says what is wrong with it
    return _tokens(shapes, names)


def _tokens(shapes: Mapping[str, tuple[int, ...]], names: list[str]) -> int | None:
    found = [
        shape[VOCABULARY[key.removeprefix(name)]]
        for key, shape in shapes.items()
        for name in names
        if key.startswith(name) and key.removeprefix(name) in VOCABULARY and len(shape) == 2
    ]
    return max(found, default=None)


def load_model(name: str, dtype: torch.dtype | str, **loading: Unpack[Loading]) -> PreTrainedModel:
    """Load a model, or an adapter over its base, as `Source.load` does.

    Raises:
        ConfigError: an adapter that names no base.
    """
    return Source.of(name).load(dtype, **loading)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """The model with its adapter in its weights; as it is, where it has none or one that no weight can hold."""
    if isinstance(model, PeftModel) and hasattr(model.base_model, "merge_and_unload"):
        return model.base_model.merge_and_unload()
    return model


def load_for_heads(source: Source, dtype: torch.dtype | str, **loading: Unpack[Loading]) -> PreTrainedModel:
    """As `Source.load`, of a model that heads can be built for.

    Raises:
        ConfigError: before weights are loaded, where heads cannot be built for the model.
    """
    trunk_without_weights(source.config, source.base, source.build)
    return source.load(dtype, **loading)


def load_tokenizer(name: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; of an adapter without one its base's."""
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        base = base_of(name)
        if base == name:
            raise
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
