"""A base with MTP layers through the real `axolotl train`: the `mtp:` block keeps them."""

from __future__ import annotations

import pytest

pytest.importorskip("axolotl")

from transformers import AutoTokenizer

from builders.mtp import publish, tensors_in

pytestmark = pytest.mark.slow

RUN = {
    "base_model": "./glm",
    "gradient_checkpointing": False,
    "max_steps": 1,
    "save_steps": 1,
    "sequence_len": 64,
}
FULL = {key: None for key in ("adapter", "lora_r", "lora_alpha", "lora_dropout")}
FULL |= {key: None for key in ("lora_target_linear", "lora_mlp_kernel", "lora_qkv_kernel")}
FULL |= {"lora_o_kernel": None}
OURS = {"plugins": ["caft_plugin.CAFTPlugin"]}


@pytest.fixture(scope="module")
def bases(project, smollm2):
    """The project, with the bases `qwen` and `glm`, whose MTP layer is behind its last one."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    for name, layout in (("glm", "layer behind"), ("qwen", "own name")):
        tokenizer.save_pretrained(project.folder / name)
        publish(layout, project.folder / name, vocab_size=len(tokenizer))
    return project.folder


def test_full_fine_tuning_keeps_them(project, bases):
    plain = project.train("mtp-plain", **RUN, **FULL)
    kept = project.train("mtp-kept", **RUN, **FULL, **OURS, mtp="bare")
    assert tensors_in(plain).keys() < tensors_in(bases / "glm").keys()
    assert tensors_in(kept).keys() == tensors_in(bases / "glm").keys()
    checkpoint = next(kept.glob("checkpoint-*"))
    assert tensors_in(checkpoint).keys() == tensors_in(plain).keys()
    assert "MTP tensors" in (project.folder / "mtp-kept.log").read_text()


def test_beside_heads(project, bases):
    caft = {"num_heads": 1}
    kept = project.train("mtp-heads", **RUN, **FULL, **OURS, mtp={"mode": "keep"}, caft=caft)
    assert tensors_in(kept).keys() == tensors_in(bases / "glm").keys()
    assert (kept / "caft_heads" / "heads.safetensors").is_file()


def test_an_adapter_needs_nothing_and_axolotl_merges_it_with_them(project, bases):
    adapter = {"lora_target_linear": None, "lora_target_modules": ["q_proj", "v_proj"]}
    run = {**RUN, "base_model": "./qwen"}
    out = project.train("mtp-lora", **run, **adapter, **OURS, mtp="bare")
    log = (project.folder / "mtp-lora.log").read_text()
    assert "is an adapter, to which nothing is added" in log
    assert not list(out.glob("model*.safetensors"))
    project.axolotl("merge-lora", "mtp-lora.yml")
    assert tensors_in(out / "merged").keys() == tensors_in(bases / "qwen").keys()


def test_a_base_without_them_stops_before_its_weights_are_read(project):
    project.config("mtp-none", **{**RUN, "base_model": "./tiny"}, **FULL, **OURS, mtp="bare")
    result = project.axolotl("train", "mtp-none.yml", check=False)
    assert result.returncode != 0
    assert "mtp.mode: keep: ./tiny has no MTP layers" in result.stdout
    assert "Loading weights" not in result.stdout
