"""The card that a framework writes next to a model says what CAFT and MEAP did; where it writes
none, there is none."""

from __future__ import annotations

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from builders.masked import MASK, trainer_of
from builders.tiny import LLAMA
from caft_plugin import CAFTConfig, MEAPConfig
from caft_plugin.model_card import END, START, FrameworkCard, section

pytestmark = pytest.mark.newest


def model_of(kind):
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "max_position_embeddings": 256}))
    return (
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
        if kind == "lora"
        else model
    )


def run(folder, kind="lora", **blocks):
    trainer = trainer_of(
        model_of(kind),
        folder,
        max_steps=2,
        num_train_epochs=1,
        save_strategy="steps",
        save_steps=1,
        **blocks,
    )
    trainer.train()
    trainer.save_model()
    return trainer


def keys_in(card):
    """What the section says, and that it is there once, at the end."""
    assert card.count(START) == card.count(END) == 1 and card.endswith(f"{END}\n")
    text = card.split(START)[1]
    return text, yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])


def test_an_adapters_card(tmp_path):
    """PEFT's, in the run's folder and in each checkpoint; saved twice, and with other settings the
    second time."""
    run(tmp_path, caft={"num_heads": 2}, meap={})
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        text, keys = keys_in((folder / "README.md").read_text())
        wired = CAFTConfig(num_heads=2, head_input="penultimate", head_norm=True)
        assert keys["caft"] == wired.model_dump(exclude_none=True)
        assert keys["meap"] == MEAPConfig(mask_token=MASK).model_dump(exclude_none=True)
        assert "arxiv.org/abs/2506.07833" in text and "arxiv.org/abs/2502.07490" in text
        assert "`caft_heads/`" in text and (folder / "caft_heads").is_dir()
        assert "library_name: peft" in (folder / "README.md").read_text()
    trainer = run(tmp_path, caft={"num_heads": 3})
    trainer.save_model()
    text, keys = keys_in((tmp_path / "README.md").read_text())
    assert keys.keys() == {"caft"} and keys["caft"]["num_heads"] == 3 and "2502.07490" not in text


def test_a_plain_run_says_nothing_also_in_the_folder_of_another(tmp_path):
    plain, zero = tmp_path / "plain", tmp_path / "zero"
    run(plain)
    run(zero, caft={"beta": 0})
    assert (zero / "README.md").read_bytes() == (plain / "README.md").read_bytes()
    run(tmp_path / "both", caft={"num_heads": 1})
    run(tmp_path / "both", caft={"beta": 0})
    assert START not in (tmp_path / "both" / "README.md").read_text()


@pytest.mark.parametrize("blocks", [{"caft": {"num_heads": 1}}, {"meap": {}}])
def test_a_models_card_is_completed_when_the_trainer_makes_it(tmp_path, blocks):
    (tmp_path / "README.md").write_text("# Mine\n")
    trainer = run(tmp_path, "full", **blocks)
    # the Trainer writes none with a model
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    (tmp_path / "README.md").unlink()
    trainer.save_model()
    assert not (tmp_path / "README.md").exists()
    for _ in range(2):
        trainer.create_model_card(model_name="tuned", tags=["mine"])
        card = (tmp_path / "README.md").read_text()
        assert keys_in(card)[1].keys() == blocks.keys() and "- mine" in card and "# tuned" in card


def test_a_card_that_nobody_wrote_since_stays(tmp_path):
    said = section(CAFTConfig(), None)
    FrameworkCard(tmp_path, said).complete()
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("# A\n")
    FrameworkCard(tmp_path, said).complete()
    assert (tmp_path / "README.md").read_text() == "# A\n"
    assert section(CAFTConfig(beta=0), None) == section(None, None) == ""
