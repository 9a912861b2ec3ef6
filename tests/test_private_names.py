"""Private names of other packages that caft_plugin uses: each is there, with the parameters that
are counted on.

Where one is gone, the failure says in one sentence what needs it. `python
tests/test_private_names.py` writes the table in caft_plugin/README.md.
"""

from __future__ import annotations

import importlib
import inspect
import re
from typing import NamedTuple

import pytest
from paths import ROOT

README = ROOT / "caft_plugin" / "README.md"
START, END = "<!-- private names -->\n", "<!-- end of private names -->\n"


class PrivateName(NamedTuple):
    """`owner` is a module, or a module and a class with a colon between; `parameters` are the first
    ones of a function, None where it is no function; `instance` marks what is set on instances
    alone and found in the owner's source."""

    owner: str
    name: str
    purpose: str
    file: str
    parameters: tuple[str, ...] | None = None
    instance: bool = False

    def __str__(self):
        return f"{self.owner}.{self.name}"


TRAINER, MODULE = "transformers:Trainer", "torch.nn:Module"
NAMES = [
    PrivateName(
        TRAINER,
        "_save_checkpoint",
        "tell a half-written checkpoint",
        "training.py",
        ("self", "model", "trial"),
    ),
    PrivateName(
        TRAINER,
        "_get_output_dir",
        "find the checkpoint that is written",
        "training.py",
        ("self", "trial"),
    ),
    PrivateName(
        TRAINER,
        "_save_optimizer_and_scheduler",
        "keep heads out of the adapter that FSDP2 saves",
        "training.py",
        ("self", "output_dir"),
    ),
    PrivateName(
        TRAINER,
        "_load_from_checkpoint",
        "resume heads and an added mask token",
        "training.py",
        ("self", "resume_from_checkpoint", "model"),
    ),
    PrivateName(
        TRAINER,
        "_load_best_model",
        "load the heads of the best checkpoint",
        "training.py",
        ("self",),
    ),
    PrivateName(
        "transformers:GenerationMixin",
        "_update_model_kwargs_for_generation",
        "lengthen masks and positions by several tokens",
        "drafting/decoding.py",
        ("self", "outputs", "model_kwargs", "is_encoder_decoder", "num_new_tokens"),
    ),
    PrivateName(
        "transformers:GenerationMixin",
        "_extract_generation_mode_kwargs",
        "get `streamer` and `tokenizer` from `generate`",
        "drafting/generate_arguments.py",
        ("self", "custom_generate", "kwargs", "synced_gpus", "assistant_model", "streamer"),
    ),
    PrivateName(
        "transformers:PreTrainedModel",
        "_no_split_modules",
        "find the list of decoder layers",
        "model/trunk.py",
    ),
    PrivateName(
        "transformers.integrations.peft:PeftAdapterMixin",
        "_hf_peft_config_loaded",
        "let the Trainer accept a quantised base of which only the heads train",
        "stage1/pretraining.py",
    ),
    PrivateName(
        "accelerate.hooks", "_hf_hook", "tell offloaded modules", "model/trunk.py", instance=True
    ),
    PrivateName(
        "accelerate.hooks",
        "_old_forward",
        "copy a layer without its hooks",
        "model/copies.py",
        instance=True,
    ),
    PrivateName(
        "peft.utils.other:AuxiliaryTrainingWrapper",
        "_adapters",
        "know what a wrapper calls",
        "model/trunk.py",
        instance=True,
    ),
    PrivateName(
        "trl:SFTTrainer",
        "_prepare_dataset",
        "double a training set between tokenising and packing",
        "trl.py",
        (
            "self",
            "dataset",
            "processing_class",
            "args",
            "packing",
            "formatting_func",
            "dataset_name",
        ),
    ),
    PrivateName(
        "axolotl.loaders:ModelLoader",
        "_set_auto_model_loader",
        "build the model before its weights are loaded",
        "axolotl/loading.py",
        ("self",),
    ),
    PrivateName(
        "axolotl.loaders:ModelLoader",
        "auto_model_loader",
        "the same",
        "axolotl/loading.py",
        instance=True,
    ),
    PrivateName(
        "axolotl.loaders:ModelLoader",
        "_configure_embedding_dtypes",
        "load a frozen base in one dtype",
        "axolotl/loading.py",
        ("self",),
    ),
    PrivateName(
        "axolotl.loaders:ModelLoader",
        "_load_adapters",
        "load a frozen base without an adapter",
        "axolotl/loading.py",
        ("self",),
    ),
    PrivateName(
        "axolotl.core.builders.causal:HFCausalTrainerBuilder",
        "_get_trainer_cls",
        "have the settings that it would give a trainer",
        "axolotl/trainer_settings.py",
        ("self",),
    ),
    PrivateName(
        "transformers.utils",
        "cached_file",
        "find the config next to an adapter",
        "model/loading.py",
        ("path_or_repo_id", "filename"),
    ),
    *(
        PrivateName(f"vllm.model_executor.{owner}", name, purpose, f"serving/{file}.py")
        for owner, name, purpose, file in (
            (
                "models.llama_eagle3",
                "Eagle3LlamaForCausalLM",
                "be accepted by vLLM's proposer",
                "parallel",
            ),
            (
                "models.utils",
                "get_draft_quant_config",
                "keep heads plain next to a quantised model",
                "parallel",
            ),
            ("models.utils", "AutoWeightsLoader", "load the heads", "parallel"),
            ("models.utils", "WeightsMapper", "stack q, k, v and gate, up", "parallel"),
            ("layers.logits_processor", "LogitsProcessor", "compute the heads' logits", "parallel"),
            ("models.llama", "LlamaDecoderLayer", "run a head", "families"),
            ("models.qwen2", "Qwen2DecoderLayer", "the same", "families"),
            ("models.qwen3", "Qwen3DecoderLayer", "the same", "families"),
        )
    ),
    PrivateName(
        MODULE,
        "_parameters",
        "use a norm with its unsharded parameters",
        "model/sharding.py",
        instance=True,
    ),
    PrivateName(MODULE, "_modules", "the same", "model/sharding.py", instance=True),
    PrivateName(
        MODULE,
        "_forward_hooks",
        "leave a user's hooks out of the heads",
        "model/sharding.py",
        instance=True,
    ),
    PrivateName(
        MODULE,
        "_compiled_call_impl",
        "tell a compiled module",
        "drafting/pass_notes.py",
        instance=True,
    ),
    PrivateName(
        "torch._dynamo.eval_frame",
        "_torchdynamo_orig_callable",
        "tell a compiled forward",
        "drafting/pass_notes.py",
        instance=True,
    ),
    PrivateName(
        "torch.utils._pytree",
        "tree_map",
        "cast what a layer was called with",
        "caft/heads.py",
        ("func", "tree"),
    ),
    PrivateName(
        "torch._subclasses.fake_tensor",
        "FakeTensorMode",
        "follow a forward pass by its shapes",
        "plan/activations.py",
    ),
]


@pytest.mark.parametrize("private", NAMES, ids=str)
def test_it_is_there(private):
    module, _, inside = private.owner.partition(":")
    package = module.split(".")[0]
    if package in ("axolotl", "trl", "vllm"):
        pytest.importorskip(package)
    owner = importlib.import_module(module)
    owner = getattr(owner, inside) if inside else owner
    needs = f"caft_plugin needs it to {private.purpose} (caft_plugin/{private.file})"
    if private.instance:
        there = re.search(rf"\b{private.name}\b", inspect.getsource(owner))
    else:
        there = hasattr(owner, private.name)
    assert there, f"{private.owner} has no {private.name} any more: {needs}"
    if private.parameters is not None:
        found = tuple(inspect.signature(getattr(owner, private.name)).parameters)
        first = found[: len(private.parameters)]
        assert first == private.parameters, f"{private} accepts {', '.join(found)} now: {needs}"


@pytest.mark.parametrize("private", NAMES, ids=str)
def test_it_is_used_where_the_table_says(private):
    assert private.name in (ROOT / "caft_plugin" / private.file).read_text(encoding="utf-8")


def table():
    lines = ["| package | private name | used to | in |", "| --- | --- | --- | --- |"]
    for private in NAMES:
        owner = private.owner.replace(":", ".")
        lines.append(
            f"| {owner.split('.')[0]} | `{owner}.{private.name}` | {private.purpose} |"
            f" `{private.file}` |"
        )
    return "\n".join(lines) + "\n"


def with_table(text):
    before, rest = text.split(START)
    return before + START + table() + END + rest.split(END)[1]


def test_the_table_in_the_readme():
    text = README.read_text(encoding="utf-8")
    assert text == with_table(text), "run: python tests/test_private_names.py"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
