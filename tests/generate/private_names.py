"""Private names of other packages that caft_plugin uses, and what for.

`python tests/generate/private_names.py` writes the table in caft_plugin/README.md;
test_private_names.py checks every name.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

README = Path(__file__).parents[2] / "caft_plugin" / "README.md"
START, END = "<!-- private names -->\n", "<!-- end of private names -->\n"


class PrivateName(NamedTuple):
    """`owner` is a module, or a module and a class with a colon between; `parameters` are the first
    ones of a function, None where it is no function; `instance` marks a name that is
    set only on instances, and so is looked for in the owner's source."""

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


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
