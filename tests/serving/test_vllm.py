"""vLLM with heads as its drafter: the texts of plain vLLM, and the counts of a slow reference, to
the digit.

The reference runs every head over whole texts by `replay` and counts what drafting would bring by
that.
"""

from __future__ import annotations

import pytest
import torch
from drafters import CASES, DAMAGED, DEFAULT, HEADS, QUANTISED, TOKENS, name_of
from transformers import AutoModelForCausalLM

from builders.quantised import rounded_as_int8
from caft_plugin import CAFTConfig
from caft_plugin.caft.heads import LayerCall, build_heads, replay
from caft_plugin.caft.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.model.trunk import find_trunk

BEYOND = HEADS + 2  # tokens, so that the last step of a text is known to its end
NEAR = 4  # draft tokens by which counts may differ for rounding
WAYS = {
    "1": 1,
    "2, in chunks, nothing cached": 2,
    "3, one at a time": 3,
    "4": 4,
    "4, cached prompts": 4,
    "eagle3": 1,
}


@torch.no_grad()
def proposals(folder, model, prompts, texts):
    """Each text, written on by BEYOND tokens; what each head proposes at each position of prompt
    and text; and how many tokens of the texts the model itself writes."""
    heads_folder, trunk = HeadsFolder.open(folder), find_trunk(model)
    asked = CAFTConfig(num_heads=HEADS, heads=str(folder), train_heads="frozen")
    config = resolve_wiring(asked, heads_folder.record)
    heads = build_heads(model, trunk, config, seed=0)
    heads_folder.load_into(heads, trunk.layer_class)
    longer, proposed, own, noted = [], [], 0, {}
    trunk.last_layer.register_forward_pre_hook(
        lambda layer, args, kwargs: noted.update(call=LayerCall.of(args, kwargs)), with_kwargs=True
    )
    trunk.norm.register_forward_hook(lambda norm, args, output: noted.update(final=output))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt + text])
        for _ in range(BEYOND):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        logits, by_head = model(ids, use_cache=False).logits, []
        own += int(
            (
                logits[0, len(prompt) - 1 :].argmax(-1)[:TOKENS] == ids[0, len(prompt) :][:TOKENS]
            ).sum()
        )
        call, final = noted["call"], noted["final"]
        source = final if config.head_input == "final" else call.hidden_states
        for layer in heads.layers:
            hidden = replay(layer, source, call, torch.arange(ids.shape[1]))
            hidden = trunk.norm(hidden) if config.head_norm else hidden
            by_head.append(trunk.logits(hidden).argmax(-1).tolist())
        longer.append(ids[0, len(prompt) :].tolist())
        proposed.append(by_head)
    return longer, proposed, own


def simulated(prompts, texts, proposed, tokens):
    """Drafts and accepted draft tokens by place: a step for the prompt, then a draft in each
    step."""
    drafts, accepted = 0, [0] * tokens
    for prompt, text, heads in zip(prompts, texts, proposed, strict=True):
        have = 1
        while have < TOKENS:
            at = len(prompt) + have - 2  # the last position that the model has read
            right = 0
            while right < tokens and heads[right][at] == text[have + right]:
                accepted[right] += 1
                right += 1
            drafts += 1
            have += right + 1
    return drafts, accepted


def counted(result):
    before, after = result["before"], result["after"]
    places = "num_accepted_tokens_per_pos"
    by_place = [there - here for there, here in zip(after[places], before[places], strict=True)]
    return after["num_drafts"] - before["num_drafts"], by_place


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("case", [name_of(case) for case in CASES])
def test_texts_and_counts(asked, prompts, case):
    found = asked[case]
    [plain] = asked[name_of((case.split("-")[0], *DEFAULT))]["plain"]
    longer, proposed, own = proposals(
        found["folder"], loaded(found["folder"] / "model"), prompts, plain["texts"]
    )
    assert own == TOKENS * len(prompts)
    ways = WAYS.keys() & found.keys()
    assert ways
    for way in ways:
        result = found[way][-1]
        assert result["texts"] == plain["texts"], way
        drafts, accepted = simulated(prompts, longer, proposed, WAYS[way])
        assert counted(result) == (drafts, accepted), way
        assert accepted[0] > 0


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_quantised_model(asked, prompts, scheme):
    """Texts are those of the same model without drafter, and its heads, which stay plain, draft as
    well as by the reference: up to ties, since vLLM's kernels round activations (int8) or compute
    in float16 (int4)."""
    if scheme not in QUANTISED:
        pytest.skip("vLLM's kernel for weights in 4 bits needs a CPU with AVX-512")
    found = asked[scheme]
    [plain], [result] = found["plain"], found["4"]
    assert result["texts"] == plain["texts"]
    model = loaded(found["folder"] / "dequantised")
    for name, module in model.named_modules():
        if scheme == "int8" and name.endswith("_proj"):
            module.register_forward_pre_hook(lambda module, args: (rounded_as_int8(*args),))
    longer, proposed, own = proposals(found["folder"], model, prompts, plain["texts"])
    assert own >= 0.97 * TOKENS * len(prompts)
    drafts, accepted = simulated(prompts, longer, proposed, 4)
    assert accepted[0] > 10
    assert counted(result)[0] == pytest.approx(drafts, abs=NEAR)
    assert counted(result)[1] == pytest.approx(accepted, abs=NEAR)


def test_an_adapter_served_next_to_its_base(asked):
    """Texts are plain vLLM's, with the adapter named in the request and without; its heads draft
    for both, and better for it."""
    found, rates = asked["adapter"], []
    for plain, result in zip(found["plain"], found["2"], strict=True):
        assert result["texts"] == plain["texts"]
        drafts, accepted = counted(result)
        rates.append(accepted[0] / drafts)
    of_base, of_adapter = rates
    assert found["plain"][0]["texts"] != found["plain"][1]["texts"] and of_adapter > of_base


@pytest.mark.parametrize("name", DAMAGED)
def test_a_drafter_that_does_not_fit_stops_the_start(asked, name):
    assert DAMAGED[name][2] in asked[name]["damaged"]["error"]
