"""`torch_compile`: beside a compiled model heads learn what they learn beside an eager one, and it
is compiled as a plain run compiles it, as a whole and as often; float32, tiny models.

Losses are equal to 1e-5, gradient norms to 1e-4 (sums in another order), under bf16 to 4e-3 (it
keeps 8 bits).
"""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from torch._dynamo import OptimizedModule
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

from builders.anatomy import anatomy
from builders.runs import arguments, lora, losses, pad, rows
from builders.tiny import LLAMA, word_tokenizer
from caft_plugin import with_caft

CAFTTrainer = with_caft(Trainer)

DRAWN = {"beta": 0.5, "heads_per_step": 1}
# Batches of four rows, and the longest of a batch never as long as that of another.
VARIED = rows([4, 30, 7, 3, 22, 9, 5, 15, 28, 6, 3, 12, 19, 4, 8, 25, 11, 13, 5, 9])
ALIKE = rows([12] * 16)


@pytest.fixture(autouse=True)
def _compiled_anew():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@dataclasses.dataclass
class Run:
    """What a run logged, and what of it was compiled by the end of each step: graphs and operations
    in them."""

    logs: list[dict[str, float]]
    compiled: list[tuple[int, int]]
    breaks: list[str]


class Compiled(TrainerCallback):
    def __init__(self):
        counters.clear()
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append((counters["stats"]["unique_graphs"], counters["stats"]["calls_captured"]))


def model_of(how, layers):
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": layers}))
    return lora(model) if how == "lora" else model


def trainer_of(folder, backend, ours, how="full", layers=2, data=ALIKE, **settings):
    """`ours` has what CAFTTrainer takes; empty, the trainer is the plain one."""
    torch._dynamo.reset()
    if backend is not None:
        settings = {"torch_compile": True, "torch_compile_backend": backend, **settings}
    return (CAFTTrainer if ours else Trainer)(
        model=model_of(how, layers),
        args=arguments(folder, **settings),
        train_dataset=data,
        eval_dataset=ALIKE[:4],
        data_collator=pad,
        processing_class=word_tokenizer(""),
        **ours,
    )


def trained(folder, backend, ours, **settings):
    trainer, seen = trainer_of(folder, backend, ours, **settings), Compiled()
    trainer.add_callback(seen)
    trainer.train()
    return Run(losses(trainer), seen.steps, list(counters["graph_break"]))


def assert_same(eager, compiled, norms=1e-4):
    for one, other in zip(eager.logs, compiled.logs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            if key == "loss" or key.startswith(("caft/", "meap/")):
                assert other[key] == pytest.approx(one[key], rel=1e-5), key
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=norms)


@pytest.mark.slow
def test_the_model_is_compiled_as_in_a_plain_run(tmp_path):
    """As a whole, once for the first shape and once for all others, while heads are drawn and rows
    change in length. What is ours adds no graph and no operation."""
    settings = {"data": VARIED, "max_steps": 5}
    plain = trained(tmp_path, "aot_eager", {}, **settings)
    ours = trained(tmp_path, "aot_eager", {"caft": DRAWN}, **settings)
    assert ours.compiled == plain.compiled and not ours.breaks and not plain.breaks
    assert [graphs for graphs, _ in ours.compiled] == [1, 2, 2, 2, 2] and ours.compiled[0][1] > 100
    eager = trained(tmp_path, None, {"caft": DRAWN}, **settings)
    assert eager.compiled[-1] == (0, 0)
    assert_same(eager, ours)
    assert (
        len({key for entry in ours.logs for key in entry if key.startswith("caft/loss_head")}) > 1
    )


def checkpointing(reentrant):
    return {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": reentrant},
    }


# name: (what CAFTTrainer takes, what `trainer_of` takes)
CASES = {
    "LoRA, accumulation": (
        {"caft": {"beta": 0.5}},
        {"how": "lora", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    "frozen heads, checkpointing reentrant": (
        {"caft": {**DRAWN, "train_heads": "frozen", "head_input": "final"}},
        checkpointing(True),
    ),
    "fused_loss, checkpointing": ({"caft": {**DRAWN, "fused_loss": "on"}}, checkpointing(False)),
    "bf16": ({"caft": DRAWN}, {"bf16": True, "max_steps": 1}),
    "MEAP": ({"caft": DRAWN, "meap": {"mode": "pretrain", "mask_token": "add"}}, {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_is_the_eager_one(tmp_path, case):
    """Also with the model's own dropout, whose random numbers heads leave alone."""
    ours, settings = CASES[case]
    eager = trained(tmp_path, None, ours, **settings)
    compiled = trained(tmp_path, "aot_eager", ours, **settings)
    assert_same(eager, compiled, norms=4e-3 if case == "bf16" else 1e-4)
    assert {graphs for graphs, _ in compiled.compiled} == {1} and not compiled.breaks


@pytest.mark.slow
def test_what_the_host_compiles_in_pieces(tmp_path):
    """LoRA with checkpointing: the Trainer's hook on the embeddings breaks the graph, and nothing
    of ours does."""
    settings = {"how": "lora", "max_steps": 2, **checkpointing(True)}
    compiled = trained(tmp_path, "aot_eager", {"caft": DRAWN}, **settings)
    assert_same(trained(tmp_path, None, {"caft": DRAWN}, **settings), compiled)
    first, second = compiled.compiled
    assert first == second and first[0] > 1
    assert all("requires_grad_()" in why for why in compiled.breaks)


@pytest.mark.slow
def test_the_model_is_the_hosts_again(tmp_path):
    """Heads that are put on again, for evaluation or training, find the model compiled; afterwards
    it is what a plain trainer leaves, and what is left of the compiled one computes without
    heads."""
    plain = trainer_of(tmp_path, "aot_eager", {}, max_steps=1)
    plain.train()
    metrics = []
    for backend in (None, "aot_eager"):
        trainer = trainer_of(tmp_path, backend, {"caft": DRAWN}, max_steps=2)
        counters.clear()
        found = [trainer.evaluate(), trainer.evaluate()]
        assert counters["stats"]["unique_graphs"] == (backend is not None)
        trainer.train(), trainer.train()
        # the second with gradients
        assert counters["stats"]["unique_graphs"] == 2 * (backend is not None)
        found.append(trainer.evaluate())
        metrics.append([{k: v for k, v in entry.items() if "loss" in k} for entry in found])
    for one, other in zip(*metrics, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
    model, compiled = trainer.model.eval(), trainer.model_wrapped
    assert isinstance(compiled, OptimizedModule) and anatomy(model) == anatomy(plain.model.eval())
    batch = pad(ALIKE[:4])
    made, wanted = compiled(**batch), model(**batch)
    assert made.keys() == wanted.keys()
    torch.testing.assert_close(made.logits, wanted.logits, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))),
    reason=(
        "inductor, torch_compile's default, needs a C++ compiler on a CPU: neither g++ nor clang++"
        " nor c++ is here"
    ),
)
def test_inductor(tmp_path, monkeypatch):
    """Compiled once, for all lengths, as it takes its time."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    settings = {"data": VARIED, "max_steps": 4, "layers": 1}
    with torch._dynamo.config.patch(assume_static_by_default=False):
        eager = trained(tmp_path, None, {"caft": DRAWN}, **settings)
        compiled = trained(tmp_path, "inductor", {"caft": DRAWN}, **settings)
    assert_same(eager, compiled)
    assert [graphs for graphs, _ in compiled.compiled] == [1, 1, 1, 1] and not compiled.breaks
