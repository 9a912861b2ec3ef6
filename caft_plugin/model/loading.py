"""Load a model with transformers, given a folder or Hub id of a model, or of an adapter, which
names its base.

All commands that read a model's files do so here, so they accept the same names and report the same
problems.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

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
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    CONFIG_NAME,
    cached_file,
    find_adapter_config_file,
)

from caft_plugin.errors import ConfigError, asked_as, first_line, shown
from caft_plugin.files import read_text
from caft_plugin.model.heads_as_model import refuse_heads_as_model
from caft_plugin.model.trunk import (
    Trunk,
    auto_class,
    find_trunk,
    input_embedding,
    refuse_unfit,
    trunk_without_weights,
)

logger = logging.getLogger(__name__)

IN_ADAPTER = "base_model.model."  # PEFT's prefix of a module's name in an adapter's file
# The vocabulary's dimension of a tensor in an adapter's file, by the end of the tensor's name.
VOCABULARY = {"weight": 0, "base_layer.weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}


# What to do about a part of a model that cannot be read.
CHECK = {
    "config": (
        "It accepts a model folder or a Hub id: check the name, your connection and your Hub token."
    ),
    "tokenizer": "Give a model with a tokenizer: save one in its folder.",
    "weights": "Check that its files are complete, and that the packages they need are installed.",
}


@contextlib.contextmanager
def reading(
    part: str,
    name: str,
    key: str,
) -> Iterator[None]:
    """Report an error of another library as ConfigError while a part of a model is read.

    Args:
        part: `config`, `tokenizer` or `weights`.
        name: the model's folder or Hub id.
        key: the option, key or argument that named the model.
    """
    with _reported(f"{key}: got {name!r}, whose {part} could not be read", CHECK[part]):
        yield


@contextlib.contextmanager
def _reported(problem: str, advice: str) -> Iterator[None]:
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    # no such name, offline, no permission, damaged: each library has its own kinds
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"{problem}: it needs code of its own, which is executed only if trust_remote_code"
                " is set. Set it in an Axolotl YAML if the command accepts one, or use a model that"
                " transformers supports without such code."
            ) from error
        raise ConfigError(f"{problem} ({first_line(error)}). {advice}") from error


def base_of(name: str, key: str | None = None) -> str:
    """Return the base model named by an adapter's folder or Hub id; for any other model, the name
    itself.

    Raises:
        ConfigError: a heads folder, an adapter that names no base, or a name of nothing.
    """
    return _base_and_revision(name, key or asked_as("model"))[0]


def _base_and_revision(name: str, key: str) -> tuple[str, str | None]:
    refuse_heads_folder(name, key)
    with reading("config", name, key):
        file = find_adapter_config_file(name)
    if file is None:
        return name, None
    try:
        keys = json.loads(read_text(Path(file), key, "the folder of an adapter"))
        base = keys["base_model_name_or_path"]
        revision = keys.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError):
        base = revision = None
    if not isinstance(base, str):
        raise ConfigError(
            f"{key}: {name} is an adapter, but its {Path(file).name} names no"
            " base_model_name_or_path."
        )
    return base, revision if isinstance(revision, str) else None


def refuse_heads_folder(name: str, key: str) -> None:
    """Raise ConfigError if the model folder `name`, given with this key, is a heads folder."""
    file = Path(name) / CONFIG_NAME
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError):
        return  # loading reports the problem
    refuse_heads_as_model(config, name, key)


MERGED = "merged"  # Axolotl's subfolder of a run for the merged model
# Config keys in which a run and its merged model may differ.
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
    """Options of loading weights: quantisation by bitsandbytes, and the attention
    implementation."""

    load_in_4bit: bool
    load_in_8bit: bool
    attn_implementation: str | None


@dataclasses.dataclass(frozen=True)
class Source:
    """The source of a model: its base and revision, the config to load it with, and its vocabulary
    size.

    `tokens` is the vocabulary size in the adapter's config.json (None: the base's), `key` the
    option, key or argument that named the model.
    """

    name: str
    base: str
    revision: str | None
    config: PretrainedConfig
    tokens: int | None
    trust_remote_code: bool
    key: str

    @classmethod
    def of(
        cls,
        name: str,
        *,
        key: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> Source:
        """Resolve `name`, without reading weights.

        Args:
            name: folder or Hub id of a model or of an adapter.
            key: the option, key or argument that named it, for messages. None: `model`.
            revision: of the Hub id. An adapter names that of its base itself.
            trust_remote_code: execute the model's own code.

        Raises:
            ConfigError: a heads folder, an adapter that names no base, or no readable config.
        """
        key = asked_as("model") if key is None else key
        base, revision_of_base = _base_and_revision(name, key)
        revision = revision if base == name else revision_of_base
        read = functools.partial(AutoConfig.from_pretrained, trust_remote_code=trust_remote_code)
        with reading("config", base, key):
            config = read(base, **({} if revision is None else {"revision": revision}))
        refuse_heads_as_model(config.to_dict(), name, key)  # from the Hub
        found = cls(name, base, revision, config, None, trust_remote_code, key)
        if base == name:
            with_overrides_of_run(config, name, read)
            return found
        own = _own_config(name, config, read)
        if own is None:
            return found
        # The run's changes (overrides_of_model_config) are used. Vocabulary size and quantisation
        # stay the base's, because the base's files are read first.
        text = own.get_text_config()
        tokens = own.get_text_config().vocab_size
        text.vocab_size = config.get_text_config().vocab_size
        vars(own).pop("quantization_config", None)
        if getattr(config, "quantization_config", None) is not None:
            own.quantization_config = config.quantization_config
        return dataclasses.replace(found, config=own, tokens=tokens)

    def build(self) -> nn.Module:
        """Build the model from its config."""
        trust_remote_code = self.trust_remote_code
        return auto_class(self.config).from_config(self.config, trust_remote_code=trust_remote_code)

    def empty_trunk(
        self,
        overrides: Mapping[str, object] | None = None,
        whole: bool = False,
        **building: Any,
    ) -> Trunk:
        """Return the trunk of the model built from its config only, on the meta device, without an
        adapter.

        Args:
            overrides: values that replace those of its config.
            whole: see `auto_class`.
            building: arguments of `from_config` (dtype, attn_implementation).

        Raises:
            ConfigError: heads cannot be built for the model, or transformers cannot build it.
        """
        config = copy.deepcopy(self.config)
        for name, value in (overrides or {}).items():
            setattr(config, name, value)
        refuse_unfit(config, self.base)
        trust_remote_code = self.trust_remote_code
        # a config with impossible values fails wherever it is first used
        with (
            _reported(
                f"{self.key}: got {self.name!r}, from which transformers cannot build a language"
                " model",
                "It accepts a decoder-only model that transformers supports without remote code.",
            ),
            torch.device("meta"),
        ):
            model = auto_class(config, whole).from_config(
                config, trust_remote_code=trust_remote_code, **building
            )
        return find_trunk(model)

    def load(self, dtype: torch.dtype | str, **loading: Unpack[Loading]) -> PreTrainedModel:
        """Load the base's weights, resize its vocabulary if the adapter needs it, and load the
        adapter.

        With `load_in_4bit`, bitsandbytes quantises the base as in QLoRA (NF4, double quantisation).

        Raises:
            ConfigError: the weights cannot be read.
        """
        trust_remote_code = self.trust_remote_code
        options: dict[str, object] = {} if self.revision is None else {"revision": self.revision}
        with reading("weights", self.base, self.key):
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
        model.config.use_cache = False  # generation turns it on where it needs it
        if self.base == self.name:
            return model
        tokens = tokens_in_adapter(self.name, model) or self.tokens
        if tokens is not None and tokens != input_embedding(model).num_embeddings:
            model.resize_token_embeddings(tokens, mean_resizing=False)
        # Not left to transformers: in a folder with an adapter and a config.json it expects the
        # complete weights.
        with reading("weights", self.name, self.key):
            return cast(PreTrainedModel, PeftModel.from_pretrained(model, self.name))


def _own_config(
    name: str,
    base: PretrainedConfig,
    read: functools.partial[PretrainedConfig],
) -> PretrainedConfig | None:
    """Return the config.json next to an adapter, in which Axolotl saves the run's changes.

    None if there is none, or if its model type is not the base's.
    """
    try:
        file = cached_file(name, CONFIG_NAME, _raise_exceptions_for_missing_entries=False)
        own = None if file is None else read(name)
    except (OSError, ValueError) as error:
        logger.warning(
            "%s: the %s of the adapter in %s was ignored (%s)",
            asked_as("model"),
            CONFIG_NAME,
            name,
            first_line(error),
        )
        return None
    if own is not None and own.model_type != base.model_type:
        logger.warning(
            "%s: the %s in %s was ignored: its model type is %s, but that of the adapter's base"
            " is %s",
            asked_as("model"),
            CONFIG_NAME,
            name,
            own.model_type,
            base.model_type,
        )
        return None
    return own


def with_overrides_of_run(
    config: PretrainedConfig,
    name: str,
    read: functools.partial[PretrainedConfig],
) -> None:
    """Apply a run's changes of the base's config to `config`, the config of its merged model in the
    folder `name`.

    `axolotl merge-lora` saves the base's config with the merged weights, without the YAML's
    `overrides_of_model_config`. The merged model would then differ from the one that was trained.
    """
    run = Path(name).absolute().parent
    if Path(name).name != MERGED or find_adapter_config_file(str(run)) is None:
        return
    own = _own_config(str(run), config, read)
    trained = {} if own is None else own.to_dict()
    written = config.to_dict()
    changed = {
        key: value
        for key, value in trained.items()
        if key in written and key not in NOT_OF_RUN and value != written[key]
    }
    for key in changed:
        setattr(config, key, getattr(own, key))
    if changed:
        logger.warning(
            "%s: %s/%s lacks settings that the run in %s was trained with"
            " (overrides_of_model_config): %s. They were used to load the model; add them to that"
            " file before you use the model elsewhere",
            asked_as("model"),
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
    """Return the vocabulary size of the embeddings in an adapter's file (or their LoRA factors);
    None without any."""
    file = cached_file(name, ADAPTER_SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    embeddings = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    names = [
        f"{IN_ADAPTER}{at}." for at, module in model.named_modules() if id(module) in embeddings
    ]
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}
    except (OSError, SafetensorError):
        return None  # PEFT reports the problem
    return _tokens(shapes, names)


def _tokens(shapes: Mapping[str, tuple[int, ...]], names: list[str]) -> int | None:
    found = [
        shape[VOCABULARY[key.removeprefix(name)]]
        for key, shape in shapes.items()
        for name in names
        if key.startswith(name) and key.removeprefix(name) in VOCABULARY and len(shape) == 2
    ]
    return max(found, default=None)


def load_model(
    name: str,
    dtype: torch.dtype | str,
    *,
    key: str | None = None,
    for_heads: bool = False,
    trust_remote_code: bool = False,
    **loading: Unpack[Loading],
) -> PreTrainedModel:
    """Load a model, or an adapter and its base; see `Source.load`.

    Args:
        name: folder or Hub id.
        dtype: to compute in.
        key: the option, key or argument that named the model, for messages. None: `model`.
        for_heads: check before weights are loaded that heads can be built for the model.
        trust_remote_code: execute the model's own code.
        loading: quantisation and attention implementation.

    Raises:
        ConfigError: see `Source.of` and `Source.load`; heads cannot be built for the model.
    """
    source = Source.of(name, key=key, trust_remote_code=trust_remote_code)
    if for_heads:
        trunk_without_weights(source.config, source.base, source.build)
    return source.load(dtype, **loading)


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with its adapter merged; unchanged if it has none, or one that cannot be
    merged."""
    if isinstance(model, PeftModel) and hasattr(model.base_model, "merge_and_unload"):
        return model.base_model.merge_and_unload()
    return model


def load_tokenizer(
    name: str,
    trust_remote_code: bool = False,
    key: str | None = None,
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; for an adapter without one, its base's.

    Raises:
        ConfigError: a heads folder, or no readable tokenizer.
    """
    key = asked_as("model") if key is None else key
    refuse_heads_folder(name, key)
    with reading("tokenizer", name, key):
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (OSError, ValueError):
            # a name that is no model's at all is reported as such
            base = Source.of(name, key=key, trust_remote_code=trust_remote_code).base
        return AutoTokenizer.from_pretrained(base, trust_remote_code=trust_remote_code)
