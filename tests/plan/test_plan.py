"""`caft plan`: counts against models that are really built, memory against runs that are really
made."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import weakref

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    T5Config,
    TrainingArguments,
)
from transformers import Trainer as HFTrainer

from builders.images import model_of
from builders.paths import ROOT
from builders.tiny import LLAMA
from caft_plugin import CAFTConfig, ConfigError, with_caft
from caft_plugin.axolotl.run import read_run
from caft_plugin.caft.heads import build_heads
from caft_plugin.caft.heads_folder import resolve_wiring, save_heads
from caft_plugin.model.trunk import find_trunk
from caft_plugin.plan.estimate import expected_heads, make_plan, optimizer_states
from caft_plugin.plan.ways_out import WaysOut
from caft_plugin.plan.words import parse_memory
from caft_plugin.precision import cpu_has_bf16
from caft_plugin.tools.cli import commands

BASE = {
    "caft": {"num_heads": 2},
    "bf16": False,
    "micro_batch_size": 2,
    "sequence_len": 64,
    "optimizer": "adamw_torch",
}
LORA = {"adapter": "lora", "lora_r": 8, "lora_alpha": 16, "lora_target_linear": True}
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
}


def plan_of(keys, gpus=1, supervised=0.3, **more):
    return make_plan(read_run(keys), gpus, supervised, **more)


@pytest.fixture
def tiny(tiny_config, tmp_path):
    """Keys of a YAML over a tiny Llama of which there is only the config."""
    tiny_config.save_pretrained(tmp_path / "tiny")
    return {**BASE, "base_model": str(tmp_path / "tiny")}


@pytest.fixture
def yml(tmp_path):
    def write(keys):
        (tmp_path / "config.yml").write_text(
            keys if isinstance(keys, str) else yaml.safe_dump(keys)
        )
        return tmp_path / "config.yml"

    return write


def run(*arguments):
    return CliRunner().invoke(commands, ["plan", *map(str, arguments)])


def bytes_of(parameters):
    return sum(p.numel() * p.element_size() for p in parameters)


def trained(module):
    return [p for p in module.parameters() if p.requires_grad]


def adapted(model):
    return get_peft_model(
        model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize(
    ("keys", "how"),
    [
        ({}, "full"),
        ({"caft": {"num_heads": 2, "train_heads": "frozen"}}, "frozen"),
        (LORA, "lora"),
        ({**LORA, "bf16": True}, "lora"),
        ({**LORA, "caft": {"num_heads": 2, "train_heads": "full"}}, "full"),
    ],
)
def test_parameters_gradients_and_states(tiny, tiny_config, keys, how):
    """Exactly those of a built model, its heads, and AdamW after a step."""
    keys = {**tiny, **keys}
    plan = plan_of(keys)
    model = LlamaForCausalLM(tiny_config).to(torch.bfloat16 if keys["bf16"] else torch.float32)
    model = adapted(model) if "adapter" in keys else model
    heads = build_heads(
        model, find_trunk(model), resolve_wiring(CAFTConfig.read(keys["caft"]), None), seed=0
    )
    of_lora = sum(p.numel() for name, p in heads.named_parameters() if ".lora_" in name)
    assert (plan.how, plan.heads) == (how, 2)
    assert plan.parameters == sum(p.numel() for p in heads.parameters()) - of_lora
    assert plan.trained == sum(p.numel() for p in trained(heads))
    for share, module in [(plan.base, model), (plan.added, heads)]:
        assert share.weights == bytes_of(module.parameters())
        assert share.gradients == bytes_of(trained(module))
        states = []
        if trained(module):
            optimizer = torch.optim.AdamW(trained(module))
            for parameter in trained(module):
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            states = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        assert share.states == bytes_of(states)


@pytest.mark.parametrize("family", ["Qwen2VL", "Qwen3_5", "Gemma3"])
def test_vision_language_models_are_counted_whole(family, tmp_path):
    """As Axolotl loads them, also where transformers has a class for the text part alone
    (Qwen3_5)."""
    model = model_of(family)
    model.config.save_pretrained(tmp_path / "model")
    plan = plan_of({**BASE, "base_model": str(tmp_path / "model")})
    heads = build_heads(
        model, find_trunk(model), resolve_wiring(CAFTConfig(num_heads=2), None), seed=0
    )
    assert plan.base_parameters == sum(p.numel() for p in model.parameters())
    assert plan.base.weights == bytes_of(model.parameters()) and plan.added.weights == bytes_of(
        heads.parameters()
    )
    assert [note for note in plan.notes if "rough estimate" in note] == []
    assert "Rows are counted as text: the weights of the vision part are included" in " ".join(
        plan.notes
    )
    trained_on_text = plan_of({**BASE, **LORA, "base_model": str(tmp_path / "model")})
    assert trained_on_text.how == "lora" and 1 < trained_on_text.ratio < 2


def test_activations_are_those_that_autograd_saves(tiny, tiny_config):
    """Of the decoder of a real model without padding, exactly."""
    tiny_config.use_cache = False
    model = LlamaForCausalLM(tiny_config)
    known = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.model(input_ids=torch.zeros(2, 64, dtype=torch.long))
    assert output is not None
    assert plan_of(tiny).base.activations == sum(storage.nbytes() for storage in saved.values())


def test_checkpointing_and_supervised_tokens(tiny):
    plan, fewer = plan_of(tiny, supervised=1.0), plan_of(tiny, supervised=0.1)
    assert fewer.added.activations < plan.added.activations and fewer.ratio < plan.ratio
    cut = plan_of({**tiny, "gradient_checkpointing": True}, supervised=1.0)
    assert cut.base.activations + cut.base.work < plan.base.activations
    assert cut.added.activations < plan.added.activations / 3
    assert (cut.added.weights, cut.added.gradients) == (plan.added.weights, plan.added.gradients)


def test_step_time_by_hand(tiny, tiny_config):
    hidden, vocab, length, share = 32, 97, 64, 0.3
    mlp, attention = 3 * hidden * 64, 2 * hidden * hidden + 2 * hidden * 16
    layer = attention + mlp + 2 * length * hidden
    head = attention + 2 * length * hidden + share * (mlp + hidden * vocab)
    plain = 3 * layer + hidden * vocab
    assert plan_of(tiny).ratio == pytest.approx(1 + 2 * head / plain)
    # frozen heads: two of three products; attention takes all
    frozen = (2 * attention + 3 * 2 * length * hidden + share * (2 * mlp + 3 * hidden * vocab)) / 3
    keys = {**tiny, "caft": {"num_heads": 2, "train_heads": "frozen"}}
    assert plan_of(keys).ratio == pytest.approx(1 + 2 * frozen / plain)
    drawn = plan_of({**tiny, "caft": {"num_heads": 2, "heads_per_step": 1}})
    assert (
        drawn.ratio_drawn == pytest.approx(1 + head / plain) and drawn.ratio == plan_of(tiny).ratio
    )
    fused = plan_of({**tiny, "caft": {"num_heads": 2, "fused_loss": "on"}})
    assert fused.ratio == pytest.approx(1 + (2 * head - 0.7 * hidden * vocab) / plain)


def test_heads_drawn_on_average():
    """Two draws of two heads, weights 1 and 0.5: head 1 runs unless missed twice, (1/3)^2; head 2,
    (2/3)^2."""
    config = CAFTConfig(num_heads=2, heads_per_step=2, alpha=0.5)
    assert expected_heads(config) == pytest.approx(8 / 9 + 5 / 9)


def test_experts_count_as_far_as_they_are_active(tmp_path):
    config = MixtralConfig(**{**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 1})
    config.save_pretrained(tmp_path)
    one = plan_of({**BASE, "base_model": str(tmp_path)}).ratio
    config.num_experts_per_tok = 4
    config.save_pretrained(tmp_path)
    four = plan_of({**BASE, "base_model": str(tmp_path)})
    experts, attention, rest = 4 * 3 * 32 * 64, 2 * 32 * 32 + 2 * 32 * 16, 4 * 32 + 2 * 64 * 32
    head = attention + rest + experts + 0.3 * 32 * 97
    plain = 3 * (attention + rest + experts) + 32 * 97
    assert four.ratio == pytest.approx(1 + 2 * head / plain)
    head, plain = head - 0.75 * experts, plain - 3 * 0.75 * experts
    assert one == pytest.approx(1 + 2 * head / plain)


def test_fsdp_divides_what_stands(tiny):
    alone, shared = (
        plan_of({**tiny, "fsdp_version": 2, "fsdp_config": {"x": 1}}, gpus=n) for n in (1, 4)
    )
    for part in ("weights", "gradients", "states"):
        for of in ("base", "added"):
            assert getattr(getattr(shared, of), part) == getattr(getattr(alone, of), part) / 4
    assert shared.added.activations == alone.added.activations and shared.gathered > 0
    assert plan_of(tiny, gpus=4).added == plan_of(tiny).added  # nothing is sharded


def test_quantised_weights_are_those_of_bitsandbytes(tmp_path):
    import bitsandbytes as bnb

    config = LlamaConfig(
        **{**LLAMA, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 128}
    )
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config).bfloat16()
    total = 0
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            packed = packed.to("cpu")
            state = packed.quant_state
            total += packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    linear = {
        p
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
        for p in m.parameters()
    }
    total += bytes_of(p for p in model.parameters() if p not in linear)
    keys = {
        **BASE,
        **LORA,
        "base_model": str(tmp_path),
        "adapter": "qlora",
        "load_in_4bit": True,
        "bf16": True,
    }
    factors = bytes_of(trained(adapted(LlamaForCausalLM(config))))
    plan = plan_of(keys)
    assert plan.base.weights == pytest.approx(total + factors, rel=0.01)
    heads = 2 * bytes_of(model.model.layers[-1].parameters())  # the heads are not quantised
    assert plan.added.weights - plan.added.gradients == heads


def test_unfrozen_parameters(tiny):
    plan = plan_of({**tiny, "unfrozen_parameters": ["^model.layers.", "^model.norm.weight$"]})
    assert plan.base.gradients == plan.base.weights - 2 * 97 * 32 * 4


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("adamw_torch_fused", (2, None), None),
        ("adamw_bnb_8bit", (2, 1), None),
        ("paged_adamw_8bit", (2, 1), "host memory"),
        ("paged_adamw_32bit", (2, 4), "host memory"),
        ("lion_8bit", (1, 1), None),
        ("sgd", (0, None), "without states"),
        ("adafactor", (0, None), "without states"),
        ("of_tomorrow", (2, None), "unknown, counted as AdamW"),
    ],
)
def test_optimizers(name, values, said):
    found, notes = optimizer_states(name)
    assert found == values and len(notes) == (said is not None) and (said or "") in "".join(notes)


def test_beta_0_adds_nothing(tiny, yml):
    plan = plan_of({**tiny, "caft": {"beta": 0}})
    assert plan.added.total == 0 and plan.ratio == 1 and plan.peak == plan.plain_peak
    output = run(yml({**tiny, "caft": {"beta": 0}}), "--gpu-memory", "1GB").output
    assert "caft.beta is 0: no heads are built" in output and "fits" in output


@pytest.mark.parametrize(
    ("text", "amount"), [("24GB", 24e9), ("24", 24e9), ("80 GB", 80e9), ("24GiB", 24 * 2**30)]
)
def test_memory_sizes(text, amount):
    assert parse_memory(text) == amount


def test_output(tiny, yml):
    result = run(yml(tiny), "--gpu-memory", "0.0005 GB", "--supervised", "0.5")
    assert result.exit_code == 0, result.output
    assert "tokens per GPU" in result.output and "The heads add, in GB per GPU" in result.output
    assert "trying changes" in result.stderr
    assert (
        "0.00 GB: does not fit" in result.output and "  caft.train_heads: frozen " in result.output
    )
    group = click.Group("axolotl", commands={"caft": commands})
    result = CliRunner().invoke(group, ["caft", "plan", str(yml(tiny)), "--gpu-memory", "24GB"])
    assert result.exit_code == 0 and "24.00 GB: fits" in result.output


def fitting(ways, pool):
    """All combinations that fit, the smallest and then the cheapest first, each tried."""
    for size in range(2, len(pool) + 1):
        for some in itertools.combinations(pool, size):
            if not any(
                one.excludes(other) for one, other in itertools.combinations(some, 2)
            ) and ways.fits(some):
                yield list(some)


# few changes are left
FEW = {"gradient_checkpointing": True, "micro_batch_size": 1, "optimizer": "adamw_bnb_8bit"}


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_first_combination_that_fits(tiny, share):
    """Where no change suffices: the first of all combinations, tried one by one, and one that keeps
    the heads."""
    plan = plan_of({**tiny, **FEW})
    with WaysOut(plan, 0, 1, 0.3) as ways:
        best = min(ways.peak([change]) for change in ways.single())
        least = ways.peak([change for change in ways.changes if not change.caft])  # without heads
        assert ways.combination() is None and least < best and len(ways.changes) == 7
    with WaysOut(plan, best - 1 - share * (best - 1 - least), 1, 0.3) as ways:
        pool, chosen = ways.changes, ways.combination()
        assert ways.fits(chosen) and len(chosen) > 1
        keeping = next(fitting(ways, [change for change in pool if not change.without_heads]), None)
        first = keeping or next(fitting(ways, [change for change in pool if not change.caft]))
        keys = [change.words.partition(": ")[0] for change in first]
        # of num_heads the largest that fits
        assert [change.words.partition(": ")[0] for change in chosen] == keys


def test_where_nothing_fits_the_plan_says_what_does(tiny, yml):
    peak = plan_of(tiny).peak / 1e9
    with WaysOut(plan_of(tiny), 0, 1, 0.3) as ways:
        best = min(ways.peak([change]) for change in ways.single()) / 1e9
    output = run(yml(tiny), "--gpu-memory", f"{(best + peak) / 2:.9f}GB").stdout
    assert "  fits" in output and "combination" not in output
    output = run(yml(tiny), "--gpu-memory", f"{best * 0.98:.9f}GB").stdout
    single, together = output.split("The first combination that fits, with a peak of")
    assert "  fits" not in single and together.count("\n  ") >= 2
    output = run(yml(tiny), "--gpu-memory", "0.000000001GB").stdout
    assert "No combination of changes fits: the lowest peak is 0.00 GB." in output


def test_plans_of_a_search_are_those_of_single_plans(tiny):
    """Whatever they share: in any order, with any change, the same peak."""
    plan = plan_of({**tiny, **LORA, "gradient_accumulation_steps": 2})
    with WaysOut(plan, 0, 1, 0.3) as ways:
        for size in (1, len(ways.changes) - 2):
            for some in list(itertools.combinations(ways.changes, size))[:8]:
                run_with, caft = plan.run, plan.run.caft.model_dump(exclude_unset=True)
                for change in some:
                    run_with = dataclasses.replace(run_with, **dict(change.run))
                    caft |= dict(change.caft)
                caft = {"beta": 0} if any(change.without_heads for change in some) else caft
                alone = make_plan(dataclasses.replace(run_with, caft=CAFTConfig.read(caft)), 1, 0.3)
                assert ways.peak(some) == alone.peak, [change.words for change in some]


def encoder_decoder(folder):
    T5Config().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model": None}, "base_model: got None"),
        (
            {"base_model": "./nowhere"},
            "base_model: got './nowhere', whose config could not be read",
        ),
        ({"base_model": encoder_decoder}, "is an encoder-decoder model"),
        (
            {"caft": {"num_heads": 33}},
            "caft.num_heads: got 33, but it accepts a whole number at least 1 and at most 32",
        ),
        ({"caft": {"nun_heads": 3}}, "caft.nun_heads: unknown setting"),
        ({"caft": {"heads": "./nowhere"}}, "caft.heads: got './nowhere'"),
        (
            {"micro_batch_size": 0},
            "micro_batch_size: got 0, but it accepts a whole number at least 1",
        ),
        ({"sequence_len": "long"}, "sequence_len: got 'long'"),
        (
            {"adapter": "llama-adapter"},
            "adapter: got 'llama-adapter', but plan accepts lora, qlora or no adapter",
        ),
        (
            {**LORA, "lora_target_linear": False, "lora_target_modules": ["no_such"]},
            "no LoRA adapter can be put on",
        ),
    ],
)
def test_wrong_values(tiny, yml, tmp_path, change, message):
    change = {
        key: value(tmp_path / "other") if callable(value) else value
        for key, value in change.items()
    }
    result = run(yml({**tiny, **change}))
    assert (
        result.exit_code == 1 and result.output.startswith("Error: ") and message in result.output
    ), result.output


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "is not YAML"),
        ("just words", "holds 'just words', but CONFIG accepts an Axolotl YAML"),
        (
            "base_model: x",
            "the YAML has no `caft:` block, so it is a plain run without added cost. Add",
        ),
    ],
)
def test_wrong_files(yml, text, message):
    result = run(yml(text))
    assert result.exit_code == 1 and message in result.output


def test_missing_file_and_wrong_memory(tiny, yml, tmp_path):
    assert "nowhere.yml cannot be read" in run(tmp_path / "nowhere.yml").output
    result = run(yml(tiny), "--gpu-memory", "much")
    assert (
        result.exit_code == 1
        and "--gpu-memory: got 'much', but it accepts gigabytes above 0" in result.output
    )


def test_more_heads_than_the_folder_holds(tiny, tiny_model, tmp_path):
    config = resolve_wiring(CAFTConfig(num_heads=2), None)
    trunk = find_trunk(tiny_model)
    save_heads(
        tmp_path / "run",
        build_heads(tiny_model, trunk, config, seed=0),
        trunk,
        config,
        resumable=False,
    )
    keys = {**tiny, "caft": {"heads": str(tmp_path / "run"), "num_heads": 2}}
    assert plan_of(keys).heads == 2
    with pytest.raises(ConfigError, match="caft.num_heads: got 3, but the folder .* holds 2 heads"):
        plan_of({**keys, "caft": {**keys["caft"], "num_heads": 3}})


def test_shipped_configs(tmp_path):
    """Every shipped YAML with a `caft:` block, over the published sizes of its kind of model,
    without weights."""
    LlamaConfig(**LLAMA_8B).save_pretrained(tmp_path / "8b")
    LlamaConfig(**LLAMA, tie_word_embeddings=True).save_pretrained(tmp_path / "small")
    planned = {}
    for file in sorted((ROOT / "axolotl_configs").glob("*.yml")):
        keys = yaml.safe_load(file.read_text())
        if "caft" not in keys or "70B" in keys["base_model"]:
            continue
        keys["base_model"] = str(tmp_path / ("8b" if "8B" in keys["base_model"] else "small"))
        planned[file.name] = plan_of(keys, gpus=8)
    assert len(planned) >= 4
    qlora, full = planned["llama-3.1-8b-qlora-24gb.yml"], planned["llama-3.1-8b-full-fsdp2.yml"]
    assert (qlora.base_parameters, qlora.parameters) == (8_030_261_248, 4 * 218_112_000)
    assert qlora.peak < 24e9 and full.peak < 80e9
    assert full.how == "full" and full.added.states == 4 * 218_112_000 * 4 / 8


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most of them at a time."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        self.alive = {}
        for tensor in known:
            self.note(tensor)

    def note(self, tensor):
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.forget(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def forget(self, key, size):
        del self.alive[key]
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.note(leaf)
        return result


def measured(model, tmp_path, caft, keys):
    """Of two real steps: the trainer, and the most bytes alive at a time."""
    rows, window, length = (
        keys[k] for k in ("micro_batch_size", "gradient_accumulation_steps", "sequence_len")
    )
    ids = torch.randint(10, 40_000, (2 * rows * window, length)).tolist()
    trainer = with_caft(HFTrainer)(
        model=model,
        args=TrainingArguments(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=keys["bf16"],
            report_to=[],
            save_strategy="no",
            max_steps=2,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=window,
            optim=keys["optimizer"],
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        caft=caft,
    )
    live = LiveBytes(*model.parameters(), *model.buffers())
    with live:
        trainer.train()
    return trainer, live.peak


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{"bf16": False}, {"bf16": cpu_has_bf16(), **LORA}], ids=["full", "lora"]
)
def test_memory_of_real_runs(smollm2, tmp_path, keys):
    """SmolLM2-135M, two windows of two passes: what stands exactly, the peak without and with
    heads, and what heads add to it, to 15 %."""
    keys = {
        **keys,
        "base_model": str(smollm2),
        "caft": {"num_heads": 4, "schedule": "constant"},
        "micro_batch_size": 2,
        "sequence_len": 128,
        "gradient_accumulation_steps": 2,
        "optimizer": "adamw_torch",
    }
    plan = plan_of(keys, supervised=1.0, device="cpu")
    model = AutoModelForCausalLM.from_pretrained(
        smollm2, dtype=torch.bfloat16 if keys["bf16"] else torch.float32
    )
    peaks = []
    for settings in (None, keys["caft"]):
        of_run = copy.deepcopy(model)
        of_run = adapted(of_run) if "adapter" in keys else of_run
        trainer, peak = measured(of_run, tmp_path, settings, keys)
        peaks.append(peak)
    heads = trainer.caft_parts.caft.heads
    states = [t for p in trained(heads) for t in trainer.optimizer.state[p].values() if t.dim()]
    assert plan.added.weights == bytes_of(heads.parameters())
    assert plan.added.gradients == bytes_of(trained(heads))
    assert plan.added.states == bytes_of(states)
    assert (plan.plain_peak, plan.peak) == pytest.approx(peaks, rel=0.15)
    assert plan.peak - plan.plain_peak == pytest.approx(peaks[1] - peaks[0], rel=0.15)
