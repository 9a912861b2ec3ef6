"""Fine-tune with MEAP on TRL's SFTTrainer: LoRA (`--use_peft`), QLoRA (`--use_peft --load_in_4bit`)
or fully.

    accelerate launch trl_examples/sft_meap.py \\
        --model_name_or_path Qwen/Qwen3-0.6B --dataset_name trl-lib/Capybara \\
        --use_peft --output_dir outputs/qwen3-meap --mask_ratio 0.1

`--dataset_name` is a data set for `datasets.load_dataset`, or a JSONL file. Every key of the
`meap:` block is an option of the same name; `--num_heads` adds CAFT's auxiliary heads. The others
are TRL's (`--help` lists them). Without a GPU add `--use_cpu`. Without `--bf16` or `--fp16`,
training runs in bfloat16 on a GPU or a CPU with instructions for it, and in float32 elsewhere.
"""

from __future__ import annotations

import dataclasses

from sft_caft import Training, given, how_to_load, load, options
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from caft_plugin import CAFTConfig, MEAPConfig
from caft_plugin.trl import CAFTSFTTrainer


@dataclasses.dataclass
class HeadArguments:
    num_heads: int | None = dataclasses.field(
        default=None, metadata={"help": "Use CAFT too, with this many heads."}
    )


def main() -> None:
    kinds = (
        ScriptArguments,
        Training,
        ModelConfig,
        options(MEAPConfig, "MEAPArguments"),
        HeadArguments,
    )
    script, training, model, meap, heads = TrlParser(kinds).parse_args_and_config()
    training.model_init_kwargs = how_to_load(model)
    trainer = CAFTSFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=load(script.dataset_name, script.dataset_train_split),
        peft_config=get_peft_config(model),
        meap=MEAPConfig(**given(meap)),
        caft=None if heads.num_heads is None else CAFTConfig(num_heads=heads.num_heads),
    )
    trainer.train()
    trainer.save_model()
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main()
