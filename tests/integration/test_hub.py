"""What `push_to_hub` uploads, with a folder in the place of the Hub: the plain model, and the heads
next to it."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest

pytest.importorskip("trl")

import huggingface_hub
import torch
from huggingface_hub import HfApi, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig
from safetensors.torch import load_file
from trl import SFTTrainer

from builders.sft import TEMPLATE, make
from builders.tiny import word_tokenizer
from caft_plugin.tools.cli import push_heads
from caft_plugin.trl import CAFTSFTTrainer

KINDS = {
    "full": ({}, "model.safetensors"),
    "LoRA": (
        {"peft_config": LoraConfig(r=4, target_modules="all-linear")},
        "adapter_model.safetensors",
    ),
}
FILES = {"config.json", "fingerprint.safetensors", "heads.safetensors", "losses.json"}
HEADS = {f"caft_heads/{name}" for name in FILES}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder with one folder a repository, and the Hub client's methods that make requests
    written for it."""
    hub = tmp_path / "hub"

    def create_repo(api, repo_id, **options):
        (hub / repo_id).mkdir(parents=True, exist_ok=True)
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(
        api, *, repo_id, folder_path, ignore_patterns=None, path_in_repo="", **options
    ):
        for name in filter_repo_objects(
            sorted(files(Path(folder_path))), ignore_patterns=ignore_patterns
        ):
            copy(Path(folder_path) / name, hub / repo_id / path_in_repo / name)
        done = Future()
        done.set_result(None)
        return done

    def create_commit(api, repo_id, operations, **options):
        for operation in operations:
            copy(Path(operation.path_or_fileobj), hub / repo_id / operation.path_in_repo)

    def snapshot_download(repo_id, allow_patterns):
        for name in filter_repo_objects(
            sorted(files(hub / repo_id)), allow_patterns=allow_patterns
        ):
            copy(hub / repo_id / name, tmp_path / "downloaded" / repo_id / name)
        return str(tmp_path / "downloaded" / repo_id)

    def no_card(*args, **options):
        raise EntryNotFoundError

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.repocard, "hf_hub_download", no_card)
    return hub


def copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, to)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def shapes(file: Path) -> dict[str, tuple]:
    return {name: tuple(tensor.shape) for name, tensor in load_file(file).items()}


def assert_same_heads(trainer, file: Path) -> None:
    torch.testing.assert_close(
        dict(trainer.caft_parts.caft.heads.layers.state_dict()), load_file(file), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_push_to_hub(hub, tmp_path, kind):
    arguments, weights = KINDS[kind]
    tokenizer = word_tokenizer(TEMPLATE)
    for name, trainer_class, caft in [("plain", SFTTrainer, None), ("ours", CAFTSFTTrainer, {})]:
        settings = {"hub_model_id": f"me/{name}", "save_strategy": "steps", "save_steps": 2}
        trainer = make(
            trainer_class,
            tokenizer,
            tmp_path / name,
            settings=settings,
            arguments=arguments,
            caft=caft,
        )
        trainer.train()
        trainer.push_to_hub()
        trainer.model.push_to_hub(f"me/{name}-model")

    plain, ours = hub / "me/plain", hub / "me/ours"
    assert weights in files(plain)
    assert files(ours) == files(plain) | HEADS
    assert shapes(ours / weights) == shapes(plain / weights)
    assert files(hub / "me/ours-model") == files(hub / "me/plain-model")
    assert shapes(hub / "me/ours-model" / weights) == shapes(hub / "me/plain-model" / weights)

    config = {"heads": "me/ours", "train_heads": "frozen"}
    later = make(CAFTSFTTrainer, tokenizer, tmp_path / "later", arguments=arguments, caft=config)
    assert_same_heads(later, ours / "caft_heads/heads.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_goes_up_during_training_is_plain(hub, tmp_path, kind):
    """`push_to_hub=True` with every checkpoint uploaded too."""
    arguments, weights = KINDS[kind]
    settings = {
        "hub_strategy": "all_checkpoints",
        "push_to_hub": True,
        "save_strategy": "steps",
        "save_steps": 1,
    }
    for name, trainer_class, caft in [("plain", SFTTrainer, None), ("ours", CAFTSFTTrainer, {})]:
        settings["hub_model_id"] = f"me/{name}"
        tokenizer = word_tokenizer(TEMPLATE)
        trainer = make(
            trainer_class,
            tokenizer,
            tmp_path / name,
            settings=settings,
            arguments=arguments,
            caft=caft,
        )
        trainer.train()
        trainer.save_model()
    plain, ours = hub / "me/plain", hub / "me/ours"
    uploaded = [name for name in files(plain) if name.endswith(weights)]
    assert weights in uploaded and f"checkpoint-3/{weights}" in uploaded
    for name in uploaded:
        assert shapes(ours / name) == shapes(plain / name), name
    assert all("caft_heads/" in name for name in files(ours) - files(plain))
    assert HEADS <= files(ours)


def test_heads_alone_go_up_and_serve_a_run(hub, tmp_path):
    tokenizer = word_tokenizer(TEMPLATE)
    first = make(CAFTSFTTrainer, tokenizer, tmp_path / "first", caft={})
    first.train()
    first.save_model()
    push_heads(tmp_path / "first" / "caft_heads", "me/heads")
    assert files(hub / "me/heads") == FILES
    later = make(CAFTSFTTrainer, tokenizer, tmp_path / "later", caft={"heads": "me/heads"})
    assert_same_heads(later, hub / "me/heads/heads.safetensors")
