"""Every command in a shell block of a page is run: here as it is written, or by another test, or it
says why not.

A block of `caft ...` runs here from its first line to its last, in a folder that holds what the
pages assume: a tuned model `out` with its heads, prompts and rows. Other commands are listed in
ELSEWHERE, by how they begin.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from builders.answers import TEMPLATE, counting
from builders.paths import PAGES, ROOT
from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import with_caft
from caft_plugin.caft.heads_folder import FOLDER
from caft_plugin.stage1.data import pad_rows
from caft_plugin.tools.cli import commands

AXOLOTL, EXAMPLES = "tests/integration/test_axolotl.py", "tests/integration/test_examples.py"
HEADS_EXAMPLE = "test_pretrain_heads_and_a_run_that_starts_from_them"
# A test (file::name) that runs commands which begin like this, or why none does.
ELSEWHERE = {
    "pip install": "an installation; .ci/run and tests/house/test_install.py do the same",
    "vllm serve": "tests/serving/test_server.py::test_one_and_eight_at_a_time",
    "axolotl train": f"{AXOLOTL}::test_lora_logs_and_leaves_a_plain_adapter",
    "axolotl merge-lora": f"{AXOLOTL}::test_merged_model_is_plain",
    "axolotl caft pretrain-heads": f"{AXOLOTL}::test_pretrain_heads_from_a_yaml",
    "axolotl caft speculate": f"{AXOLOTL}::test_heads_go_on_over_the_tuned_model_and_draft_for_it",
    "axolotl caft plan": "tests/plan/test_plan.py::test_shipped_configs",
    "caft keep-mtp": "tests/mtp/test_keep_mtp.py::test_the_command",
    "caft plan": "tests/plan/test_plan.py::test_shipped_configs",
    ".venv/bin/caft speculate": (
        "of the demo's model, a quarter of an hour; the same command is run here with others"
    ),
    "accelerate launch trl_examples/sft.py": f"{EXAMPLES}::test_sft_with_caft",
    "accelerate launch trl_examples/sft.py --meap": f"{EXAMPLES}::test_sft_with_meap",
    "accelerate launch trl_examples/pretrain_heads.py": f"{EXAMPLES}::{HEADS_EXAMPLE}",
    "accelerate launch --num_processes 1 trl_examples/pretrain_heads.py": (
        f"{EXAMPLES}::{HEADS_EXAMPLE}"
    ),
    "git clone": "this checkout is one",
    "make environments": ".ci/run runs it",
    ".venv/bin/pytest": "pytest is running",
    "make test": "it runs this test",
    "make test-quick": "a part of make test, which runs this test",
    "make lint": ".ci/run runs it",
    "make format": "it changes files; .ci/run checks that it has nothing to do",
    "make demo": (
        "downloads and a quarter of an hour; tests/integration/test_axolotl.py runs its steps on a"
        " tiny model"
    ),
    "make soak": "an hour; tests/integration/test_restart.py does a few of its kills",
    "make bench": "hours",
    "make gpu": "needs a GPU; tests/house/test_gpu_check.py runs the program without one",
    "make study": "days",
    "python tests/gpu/check.py": (
        "needs a GPU; tests/house/test_gpu_check.py runs the program without one"
    ),
    "python -m study": "days; tests of the study run its parts",
}


def blocks(text: str) -> list[list[str]]:
    """The commands of each shell block of a page, without comments, each on one line."""
    found = re.findall(r"(?ms)^ *```(?:bash|sh|shell|console)\n(.*?)^ *```$", text)
    lines = [
        [shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines()]
        for block in found
    ]
    return [[shlex.join(words) for words in block if words] for block in lines]


BLOCKS = [(page, block) for page in PAGES for block in blocks(page.read_text(encoding="utf-8"))]
NAMES = [f"{page.relative_to(ROOT)}: {block[0][:40]}" for page, block in BLOCKS]


def listed(command: str) -> str | None:
    """What is said of a command: of the longest beginning in the list."""
    plain = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
    return max(
        ((len(key), value) for key, value in ELSEWHERE.items() if plain.startswith(key)),
        default=(0, None),
    )[1]


def runs_here(command: str) -> bool:
    return command.startswith("caft ") and listed(command) is None


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """What the pages assume to be there: models (`out` with heads, BASE, TUNED, M), heads, rows,
    prompts and texts."""
    folder, tokenizer = tmp_path_factory.mktemp("pages"), word_tokenizer(TEMPLATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, "vocab_size": 98, "max_position_embeddings": 1024})
    )
    model.generation_config.eos_token_id = model.config.eos_token_id = 1
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        save_strategy="no",
        max_steps=60,
        per_device_train_batch_size=28,
        learning_rate=1e-2,
    )
    for name in ("M", "BASE"):
        model.save_pretrained(folder / name), tokenizer.save_pretrained(folder / name)
    trainer = with_caft(Trainer)(
        model=model,
        args=arguments,
        train_dataset=counting(),
        data_collator=lambda rows: pad_rows(rows, 0),
        processing_class=tokenizer,
        caft={"num_heads": 4, "beta": 0.3},
    )
    trainer.train()
    trainer.save_model()
    shutil.copytree(folder / "out", folder / "TUNED")
    shutil.copytree(folder / "out" / FOLDER, folder / "DIR")
    head = {
        f"{k}.layers.0.{n}": t
        for k in range(4)
        for n, t in model.model.layers[-1].state_dict().items()
    }
    torch.save(OrderedDict(head), folder / "heads.pth")
    lines = [
        {"prompt": f"w{i} w{i + 1} w{i + 2}", "completion": f"w{i + 3} w{i + 4} w{i + 5}"}
        for i in range(24)
    ]
    for name, part in (("rows.jsonl", lines[4:]), ("held-out.jsonl", lines[:4])):
        (folder / name).write_text("\n".join(map(json.dumps, part)))
    texts = [{"text": " ".join(f"w{i + j}" for j in range(12))} for i in range(4)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)))
    return folder


@pytest.mark.parametrize(
    ("page", "block"),
    [case for case in BLOCKS if any(map(runs_here, case[1]))],
    ids=[name for name, case in zip(NAMES, BLOCKS, strict=True) if any(map(runs_here, case[1]))],
)
def test_a_block_runs_as_it_stands(page, block, prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(prepared, tmp_path / "here"))
    for command in filter(runs_here, block):
        words = shlex.split(command)[1:]
        if "DIR" in words and "--output" in words:
            shutil.rmtree("DIR")  # here it is made
        result = CliRunner().invoke(commands, words, catch_exceptions=False)
        assert result.exit_code == 0, f"{command}\n{result.output}"


@pytest.mark.parametrize(("page", "block"), BLOCKS, ids=NAMES)
def test_every_other_command_is_run_by_a_test_or_says_why_not(page, block):
    for command in block:
        where = listed(command)
        assert runs_here(command) or where, (
            f"{command}: say in ELSEWHERE which test runs it, or why none does"
        )
        if where is not None and "::" in where:
            file, name = where.split("::")
            assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), where
        target = re.match(r"make ([a-z-]+)", command)
        if target is not None:
            assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), command
        for script in re.findall(r"\S+\.(?:py|yml)\b", command):
            assert script == "config.yml" or (ROOT / script).is_file(), command


def test_the_recipe_is_among_them():
    recipe = next(
        block for page, block in BLOCKS if page == ROOT / "README.md" and "caft " in block[0]
    )
    assert [command.split()[1] for command in recipe if runs_here(command)] == [
        "pretrain-heads",
        "speculate",
        "export-drafter",
    ]


def test_a_command_that_nobody_listed_is_found():
    (block,) = blocks(
        "```bash\n# why\nA=1 make \\\n    test   # all\ncaft inspect DIR\nrm -r out\n```\n"
    )
    assert block == ["A=1 make test", "caft inspect DIR", "rm -r out"]
    assert (
        listed(block[0])
        and runs_here(block[1])
        and not listed(block[2])
        and not runs_here(block[2])
    )
