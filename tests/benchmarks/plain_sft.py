"""Fine-tune with TRL's own SFTTrainer, without caft_plugin: the baseline of decoding.py. Options
are TRL's."""

from __future__ import annotations

from datasets import load_dataset
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser


def main() -> None:
    script, training, model = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config()
    training.model_init_kwargs = {"dtype": model.dtype}
    rows = load_dataset("json", data_files=script.dataset_name, split="train")
    trainer = SFTTrainer(model=model.model_name_or_path, args=training, train_dataset=rows)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
