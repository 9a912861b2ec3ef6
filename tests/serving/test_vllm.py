"""vLLM with heads as its drafter: the texts of plain vLLM, and the counts of a slow reference, to the digit.

The reference runs every head over whole texts by `replay` and counts what drafting would bring by that.
"""

from __future__ import annotations

import json

import pytest
import torch
from drafters import CASES, HEADS, TOKENS, all_heads, make_adapter, name_of, run_jobs
from transformers import AutoModelForCausalLM

from caft_plugin import CAFTConfig
from caft_plugin.heads import LayerCall, build_heads, replay
from caft_plugin.heads_folder import HeadsFolder, resolve_wiring
from caft_plugin.trunk import find_trunk

BEYOND = HEADS + 2  # tokens, so that the last step of a text is known to its end
WAYS = {"1": 1, "2, in chunks, nothing cached": 2, "3, one at a time": 3, "4": 4, "4, cached prompts": 4, "eagle3": 1}


@torch.no_grad()
def proposals(folder, prompts, texts):
    """Each text, written on by BEYOND tokens, and what each head proposes at each position of prompt and text."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    heads_folder, trunk = HeadsFolder.open(folder), find_trunk(model)
    asked = CAFTConfig(num_heads=HEADS, heads=str(folder), train_heads="frozen")
    config = resolve_wiring(asked, heads_folder.record)
    heads = build_heads(model, trunk, config, seed=0)
    heads_folder.load_into(heads, trunk.layer_class)
    longer, proposed, noted = [], [], {}
    trunk.last_layer.register_forward_pre_hook(
        lambda layer, args, kwargs: noted.update(call=LayerCall.of(args, kwargs)), with_kwargs=True
    )
    trunk.norm.register_forward_hook(lambda norm, args, output: noted.update(final=output))
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([prompt + text])
        for _ in range(BEYOND):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        logits, by_head = model(ids, use_cache=False).logits, []
        assert logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == ids[0, len(prompt) :].tolist()
        call, final = noted["call"], noted["final"]
        source = final if config.head_input == "final" else call.hidden_states
        for layer in heads.layers:
            hidden = replay(layer, source, call, torch.arange(ids.shape[1]))
            hidden = trunk.norm(hidden) if config.head_norm else hidden
            by_head.append(trunk.logits(hidden).argmax(-1).tolist())
        longer.append(ids[0, len(prompt) :].tolist())
        proposed.append(by_head)
    return longer, proposed


def simulated(prompts, texts, proposed, tokens):
    """Drafts and accepted draft tokens by place: a step for the prompt, then a draft in each step."""
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


@pytest.mark.parametrize("case", [name_of(case) for case in CASES])
def test_texts_and_counts(asked, prompts, case):
    found = asked[case]
    plain = found["texts"]["plain"]["texts"]
    assert all(len(text) == TOKENS for text in plain)
    longer, proposed = proposals(found["folder"], prompts, plain)
    assert len(found["ways"]) >= 2
    for way in found["ways"][1:]:
        result = found["texts"][way]
        assert result["texts"] == plain, way
        drafts, accepted = simulated(prompts, longer, proposed, WAYS[way])
        assert counted(result) == (drafts, accepted), way
        assert accepted[0] > 0


def test_an_adapter_served_next_to_its_base(tmp_path, prompts):
    """Texts are plain vLLM's, with the adapter named in the request and without; its heads draft for both, and better
    for it."""
    make_adapter(tmp_path)
    jobs, accepted = [], {}
    for of in ("adapter", "base"):
        for way, speculative in (("plain", None), ("drafted", all_heads(tmp_path, 2))):
            job = {"model": str(tmp_path / "model"), "speculative": speculative, "prompts": prompts, "tokens": TOKENS}
            adapter = str(tmp_path / "out") if of == "adapter" else None
            jobs.append({**job, "adapter": adapter, "out": str(tmp_path / f"{of} {way}.json")})
    result = run_jobs(tmp_path, jobs)
    assert result.returncode == 0, result.stderr[-6000:]
    texts = {}
    for of in ("adapter", "base"):
        plain, drafted = (json.loads((tmp_path / f"{of} {way}.json").read_text()) for way in ("plain", "drafted"))
        assert drafted["texts"] == plain["texts"]
        texts[of], accepted[of] = plain["texts"], counted(drafted)[1][0] / counted(drafted)[0]
    assert texts["adapter"] != texts["base"] and accepted["adapter"] > accepted["base"]
