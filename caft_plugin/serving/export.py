"""Write a drafter's folder for vLLM or SGLang from the files of a model and of its heads. No model
is loaded.

`vllm`: all heads, which caft_plugin's draft class runs in one forward pass of vLLM's parallel
drafter. `eagle3`: head 1 as the only layer of an EAGLE-3 drafter. Such a layer's input is
`[norm(embedding) | norm(hidden state)]`, so the embedding's half of q, k and v is 0, and the
projection of the hidden state is the identity.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig
from transformers.utils import (
    ADAPTER_SAFE_WEIGHTS_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
)

from caft_plugin.caft.heads_folder import HeadsFolder, read_fingerprint
from caft_plugin.caft.heads_record import WEIGHTS, own_file
from caft_plugin.errors import ConfigError, asked_as, first_line, heads_as, heads_named, named
from caft_plugin.files import write_json, write_text
from caft_plugin.model.fingerprint import GRIDS, sample_of
from caft_plugin.model.loading import IN_ADAPTER, Source
from caft_plugin.serving.families import ARCHITECTURE, Family, family_of
from caft_plugin.serving.guide import Format, advice_on, how_to_serve
from caft_plugin.serving.recommendation import Cost, kept

# Keys of the model's config on which the shape of a layer, its rotary embedding and its norms
# depend.
KEPT = (
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim hidden_act"
    " rms_norm_eps max_position_embeddings vocab_size rope_theta rope_scaling rope_parameters"
    " attention_bias mlp_bias bos_token_id eos_token_id pad_token_id dtype"
).split()
NORM = "model.norm.weight"


@dataclasses.dataclass(frozen=True)
class Target:
    """The served model, read from its files: its source, the file of each tensor by name, and the
    size of all tensors in bytes (None: unknown)."""

    source: Source
    files: dict[str, str]
    size: int | None

    @classmethod
    def of(cls, name: str) -> Target:
        """Read a model's files, or those of an adapter and its base.

        Raises:
            ConfigError: the model does not exist or has no safetensors files.
        """
        source = Source.of(name)
        try:
            return cls(source, *_where_tensors_are(source))
        except (OSError, ValueError, SafetensorError) as error:
            raise ConfigError(
                f"{asked_as('model')}: got {name!r}, whose files cannot be read"
                f" ({first_line(error)}). It accepts the folder or Hub id of a model with"
                " safetensors files, or of its adapter."
            ) from error

    @property
    def config(self) -> PretrainedConfig:
        return self.source.config.get_text_config()

    @property
    def is_adapter(self) -> bool:
        return self.source.base != self.source.name

    def tensor(self, name: str) -> Tensor:
        if name not in self.files:
            raise ConfigError(
                f"{asked_as('model')}: {self.source.base} has no tensor {name}, which every"
                f" {self.config.model_type} model has. Give a complete model."
            )
        with safe_open(self.files[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def norm(self) -> Tensor:
        """Return the final norm's weight (hidden size,); the adapter's if it trained the norm."""
        norm = self.tensor(NORM)
        if not self.is_adapter:
            return norm
        # PEFT saves a module that trained whole (modules_to_save) under the name of the original.
        prefix = IN_ADAPTER + NORM.removesuffix("weight")
        file = cached_file(self.source.name, ADAPTER_SAFE_WEIGHTS_NAME)
        with safe_open(file, framework="pt") as opened:
            trained = [key for key in opened.keys() if key.startswith(prefix)]
            return opened.get_tensor(trained[0]).to(norm.dtype) if trained else norm

    def check(self, heads: HeadsFolder) -> None:
        """Raise ConfigError if the heads were trained with another last layer or final norm than
        this model's."""
        fingerprint = read_fingerprint(heads.path)
        if fingerprint is None or self.is_adapter:
            return
        names = self.names_of(fingerprint.before.values)
        tensors = {
            ours: self.tensor(theirs)
            for ours, theirs in names.items()
            if theirs in self.files or theirs == NORM
        }
        complete = len(tensors) == len(names)
        if not complete or any(tensor.dtype not in GRIDS for tensor in tensors.values()):
            # Quantised weights need scales, and smoothing changes the layer's norms. Compare only
            # the final norm.
            tensors = {ours: tensor for ours, tensor in tensors.items() if names[ours] == NORM}
        now = sample_of(tensors, fingerprint.before)
        if fingerprint.of(tensors).verdict(now) == "other":
            raise ConfigError(
                f"{heads_as()}: the heads in {heads.path} (base model"
                f" {named(heads.record.base_model)}) were trained with another last layer or final"
                f" norm than that of {self.source.name}. Give the model that they were trained"
                " with."
            )

    def names_of(self, parts: Iterable[str]) -> dict[str, str]:
        """Return the names in the model's files of a fingerprint's `layer. ...` and `norm. ...`."""
        prefixes = {"layer": last_layer_in(self.source), "norm": NORM.removesuffix("weight")}
        names = {}
        for name in parts:
            part, _, rest = name.partition(".")
            names[name] = prefixes[part] + rest
        return names


def _where_tensors_are(source: Source) -> tuple[dict[str, str], int | None]:
    """Return the files of the last layer's and the final norm's tensors, by name, and the size of
    all tensors."""
    options: dict[str, object] = {} if source.revision is None else {"revision": source.revision}
    index = cached_file(
        source.base, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False, **options
    )
    if index is not None:
        content = json.loads(Path(index).read_text(encoding="utf-8"))
        last_layer = last_layer_in(source)
        shard_of = {
            name: shard
            for name, shard in content["weight_map"].items()
            if name == NORM or name.startswith(last_layer)
        }
        # Only the shards that hold them are downloaded.
        file_of = {
            shard: str(cached_file(source.base, shard, **options)) for shard in shard_of.values()
        }
        size = content.get("metadata", {}).get("total_size")
        return {name: file_of[shard] for name, shard in shard_of.items()}, size
    file = str(cached_file(source.base, SAFE_WEIGHTS_NAME, **options))
    with open(file, "rb") as raw:
        header = int.from_bytes(raw.read(8), "little")  # the file begins with the header's length
    size = os.path.getsize(file) - header - 8
    with safe_open(file, framework="pt") as opened:
        return dict.fromkeys(opened.keys(), file), size


def last_layer_in(source: Source) -> str:
    """Return the prefix of the last layer's tensor names."""
    return f"model.layers.{source.config.get_text_config().num_hidden_layers - 1}."


@heads_named("heads")
def export_drafter(
    model: str,
    heads: str,
    output: Path,
    form: Format = "vllm",
    num_heads: int | None = None,
) -> str:
    """Write a drafter's folder.

    Args:
        model: folder or Hub id of the served model, or of its adapter.
        heads: the model's heads: a heads folder, a run's folder or a Hub id.
        output: the folder to write, which must be new or empty.
        form: `vllm` (all heads) or `eagle3` (head 1).
        num_heads: number of heads to write, from head 1 on. None: all heads.

    Returns:
        The text of the folder's README: how to serve the drafter.

    Raises:
        ConfigError: the engine cannot serve the heads or the model, they do not fit each other, or
            the output folder is not empty. In that case nothing is written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ConfigError(
            f"{asked_as('output')}: {output} exists and is not empty. Give a new folder."
        )
    folder = HeadsFolder.open(heads)
    target = Target.of(model)
    family = family_of(target.config)
    _check(folder, target, family, form, num_heads)
    weights = _head_weights(folder)
    count = num_heads or (1 if form == "eagle3" else folder.record.num_heads)
    config = _config(target, family, folder, form, count)
    norm = target.norm()
    if form == "eagle3":
        tensors = as_eagle3(weights, norm, family, normed_input=folder.record.head_input == "final")
    else:
        tensors = as_heads(weights, norm, count)
    advice = advice_on(kept(folder.path), _cost(target, weights[0], norm), count)
    guide = how_to_serve(target.source, output, form, advice)
    _write(output, config, tensors, guide)
    return guide


def _check(
    folder: HeadsFolder,
    target: Target,
    family: Family,
    form: Format,
    num_heads: int | None,
) -> None:
    record = folder.record
    config = target.config
    folder.refuse_other_layers(family.layer_class)
    if record.hidden_size != config.hidden_size:
        raise ConfigError(
            f"{heads_as()}: {folder.path} was made for hidden_size {record.hidden_size}, but"
            f" {target.source.name} has {config.hidden_size}. Give the model that the heads were"
            " trained with."
        )
    most = record.num_heads
    accepted = f"1 to {most}, the number of heads in the folder"
    if form == "eagle3":
        most = 1
        accepted = "1, since an EAGLE-3 drafter has one layer"
    if num_heads is not None and not 1 <= num_heads <= most:
        raise ConfigError(f"{asked_as('num_heads')}: got {num_heads}, but it accepts {accepted}.")
    if form == "eagle3" and not record.head_norm:
        raise ConfigError(
            f"{asked_as('form', '--format')}: got eagle3, but the heads in {folder.path} have"
            " head_norm: false, and an EAGLE-3 drafter always applies a norm. Use vllm."
        )
    target.check(folder)


def _head_weights(folder: HeadsFolder) -> list[dict[str, Tensor]]:
    """Return the weights of each head, by their names in the layer."""
    try:
        with safe_open(own_file(folder.path, WEIGHTS), framework="pt") as opened:
            found = {key: opened.get_tensor(key) for key in opened.keys()}
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{heads_as()}: {folder.path / WEIGHTS} cannot be read ({first_line(error)})."
        ) from error
    heads: dict[str, dict[str, Tensor]] = {str(k): {} for k in range(folder.record.num_heads)}
    for key, tensor in found.items():
        number, _, name = key.partition(".")
        if number not in heads:
            raise ConfigError(
                f"{heads_as()}: {folder.path / WEIGHTS} has an unknown tensor {named(key)}. Make or"
                " download the heads folder again."
            )
        heads[number][name] = tensor
    return list(heads.values())


def as_eagle3(
    heads: list[dict[str, Tensor]],
    norm: Tensor,
    family: Family,
    normed_input: bool,
) -> dict[str, Tensor]:
    """Return head 1 as the only layer of an EAGLE-3 drafter.

    Args:
        heads: the weights of each head, by their names in the layer.
        norm: the model's final norm (hidden size,).
        family: the model's family.
        normed_input: the head's input is the normalised final hidden state.
    """
    size = norm.numel()
    reading_both = {f"self_attn.{part}_proj.weight" for part in "qkv"}
    weights = {}
    for name, tensor in heads[0].items():
        if name in reading_both:
            tensor = torch.cat([torch.zeros_like(tensor), tensor], dim=1)
        in_midlayer = name.replace("input_layernorm", "hidden_norm")
        weights[f"midlayer.{in_midlayer}"] = tensor.contiguous()
    if family.qkv_bias:  # the engine's layer has a bias on all four projections or on none
        out = weights["midlayer.self_attn.o_proj.weight"]
        weights["midlayer.self_attn.o_proj.bias"] = out.new_zeros(out.shape[0])
    # for the embedding, times 0
    weights["midlayer.input_layernorm.weight"] = torch.ones(size, dtype=norm.dtype)
    weights["fc.weight"] = torch.eye(size, dtype=norm.dtype)
    weights["norm.weight"] = norm
    if normed_input:  # safetensors saves no tensor twice
        weights["input_norm.weight"] = norm.clone()
    return weights


def as_heads(
    heads: list[dict[str, Tensor]],
    norm: Tensor,
    count: int,
) -> dict[str, Tensor]:
    """Return the first `count` heads as layers 0, 1, ..."""
    weights = {}
    for k, head in enumerate(heads[:count]):
        for name, tensor in head.items():
            weights[f"layers.{k}.{name}"] = tensor.contiguous()
    # vLLM's parallel drafter needs a hidden state for mask slots, which heads do not use.
    return weights | {
        "norm.weight": norm,
        "mask_hidden": torch.zeros(1, norm.numel(), dtype=norm.dtype),
    }


def _config(
    target: Target,
    family: Family,
    folder: HeadsFolder,
    form: Format,
    count: int,
) -> dict[str, object]:
    theirs = target.config.to_dict()
    record = folder.record
    layers = target.config.num_hidden_layers
    # the heads' input: the output of this many layers
    read = layers if record.head_input == "final" else layers - 1
    config = {key: theirs[key] for key in KEPT if theirs.get(key) is not None}
    config |= {
        "model_type": target.config.model_type,
        "num_hidden_layers": count,
        "eagle_aux_hidden_state_layer_ids": [read],
        "num_aux_hidden_states": 1,
        "tie_word_embeddings": False,
    }
    if form == "eagle3":
        return config | _as_eagle3_reads(family, record.head_input == "final", read)
    return config | {
        "architectures": [ARCHITECTURE],
        "mask_token_id": target.config.vocab_size,  # not the id of any token
        "caft_heads": {  # vLLM replaces the outer model_type
            "model_type": target.config.model_type,
            "head_input": record.head_input,
            "head_norm": record.head_norm,
            "target_layers": layers,
        },
    }


def _as_eagle3_reads(
    family: Family,
    final: bool,
    read: int,
) -> dict[str, object]:
    model_type = "qwen3" if family.eagle3.startswith("Eagle3Qwen3") else "llama"
    return {
        "model_type": model_type,
        "architectures": [family.eagle3],
        "draft_vocab_size": None,  # SGLang uses the target's lm_head only if this is null
        **({"attention_bias": True} if family.qkv_bias else {}),
        # SGLang reads the layers here, counted from one less.
        "eagle_config": {
            "use_aux_hidden_state": True,
            "eagle_aux_hidden_state_layer_ids": [read - 1],
            "norm_before_fc": final,
        },
    }


def _cost(
    target: Target,
    head: Mapping[str, Tensor],
    norm: Tensor,
) -> Cost:
    config = target.config
    of_head = sum(tensor.nbytes for tensor in head.values())
    matrix = config.vocab_size * config.hidden_size * norm.itemsize
    if target.size is None:  # a head is as large as a layer
        layers = config.num_hidden_layers * of_head
        return Cost(layers + matrix, of_head, matrix)
    # a forward pass reads only a few of its rows
    embedding = 0 if config.tie_word_embeddings else matrix
    return Cost(target.size - embedding, of_head, matrix)


def _write(
    output: Path,
    config: Mapping[str, object],
    tensors: dict[str, Tensor],
    guide: str,
) -> None:
    """Write the folder under a temporary name and rename it, so that it is never incomplete."""
    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    unfinished.mkdir()
    try:
        save_file(tensors, unfinished / SAFE_WEIGHTS_NAME, {"format": "pt"})
        write_json(unfinished / "config.json", config)
        write_text(unfinished / "README.md", guide)
        if output.exists():  # an empty folder, as was checked
            output.rmdir()
        os.replace(unfinished, output)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
