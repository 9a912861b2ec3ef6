"""The choice of a mask token, on tokenizers shaped like those of five families, and the added
vector."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from datasets import Dataset, IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
)

from builders.images import FAMILIES as FAMILIES_WITH_IMAGES
from builders.images import IMAGE, MROPE_FAMILIES, VISION_START
from builders.tokenizers_of_families import FAMILIES, WORDS
from caft_plugin import ConfigError
from caft_plugin.meap.mask_token import FILE, AddedMaskToken, choose_mask_token, row_norms
from caft_plugin.meap.roles import placeholder_ids
from caft_plugin.meap.training_set import used_ids

pytestmark = pytest.mark.newest


@pytest.mark.parametrize("family", FAMILIES)
def test_auto(family):
    make, rows, wanted = FAMILIES[family]
    made = make()
    token = choose_mask_token("auto", made, rows, frozenset(range(3)))
    assert token.id == (wanted if isinstance(wanted, int) else made.convert_tokens_to_ids(wanted))
    assert not token.added and str(token.id) in token.words


def test_smollm2_itself(smollm2):
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(smollm2)
    used = frozenset(made.encode("<|endoftext|>")) | {
        made.convert_tokens_to_ids(t) for t in ("<repo_name>",)
    }
    token = choose_mask_token("auto", made, len(made), used)
    assert made.convert_ids_to_tokens(token.id) == "<reponame>"
    with pytest.raises(ConfigError, match="streamed data"):
        choose_mask_token("auto", made, len(made), None)


def test_auto_passes_over_what_the_data_uses():
    made = FAMILIES["SmolLM2"][0]()
    used = {made.convert_tokens_to_ids(token) for token in ("<|endoftext|>", "<repo_name>")}
    token = choose_mask_token("auto", made, 55, frozenset(used))
    assert made.convert_ids_to_tokens(token.id) == "<empty_output>"
    with pytest.raises(ConfigError, match="mask_token: add, which adds one input vector"):
        choose_mask_token("auto", made, 55, frozenset(range(55)))
    with pytest.raises(ConfigError, match="streamed data"):
        choose_mask_token("auto", made, 55, None)


def test_a_token_by_name_or_id():
    made = FAMILIES["SmolLM2"][0]()
    assert choose_mask_token("<repo_name>", made, 55, frozenset()).id == made.convert_tokens_to_ids(
        "<repo_name>"
    )
    assert choose_mask_token(7, made, 55, frozenset()).id == 7
    with pytest.raises(ConfigError, match=r"got 'w7' \(id 7\), but the training data contains it"):
        choose_mask_token("w7", made, 55, frozenset([7]))
    with pytest.raises(ConfigError, match="got 'w700', which is not a token of this tokenizer"):
        choose_mask_token("w700", made, 55, frozenset())
    with pytest.raises(
        ConfigError, match=r"got 55 \(id 55\), but the model's input embedding has 55 rows"
    ):
        choose_mask_token(55, made, 55, frozenset())


@pytest.mark.parametrize("family", FAMILIES)
def test_auto_passes_over_rows_that_were_never_trained(family):
    """And takes one all the same, with a warning, where there is no other."""
    make, rows, _ = FAMILIES[family]
    made, used = make(), frozenset(range(3))
    norms = torch.ones(rows)
    first = choose_mask_token("auto", made, rows, used, norms)
    assert first == choose_mask_token("auto", made, rows, used)
    norms[first.id] = 0.11
    assert choose_mask_token("auto", made, rows, used, norms) == first
    norms[first.id] = 0.09
    second = choose_mask_token("auto", made, rows, used, norms)
    assert second.id != first.id and "untrained" not in second.words
    words = torch.tensor([made.convert_tokens_to_ids(word) for word in WORDS])
    alone = torch.zeros(rows).index_fill(0, words, 1.0)
    last = choose_mask_token("auto", made, rows, used, alone)
    assert last.id == first.id and "is untrained: its norm is 0" in last.words


def test_a_token_named_by_the_user_is_warned_of():
    made, norms = FAMILIES["SmolLM2"][0](), torch.full((55,), 2.0)
    norms[7] = 0.1
    token = choose_mask_token(7, made, 55, frozenset(), norms)
    assert (
        token.words
        == "'w7' (id 7), as configured, but its input vector is untrained: its norm is 0.1, the"
        " embedding's median is 2, so the first gradients will be large. Use mask_token: add, or"
        " another token"
    )
    assert choose_mask_token(8, made, 55, frozenset(), norms).words == "'w8' (id 8), as configured"


def test_norms_are_read_where_they_can_be():
    table = torch.nn.Embedding(5000, 4)
    torch.testing.assert_close(row_norms(table), table.weight.detach().norm(dim=1))
    torch.testing.assert_close(
        row_norms(table.bfloat16()), table.weight.detach().float().norm(dim=1)
    )
    assert row_norms(torch.nn.Embedding(5, 4, device="meta")) is None
    assert row_norms(torch.nn.Module()) is None
    # as 4 bits are
    table.weight = torch.nn.Parameter(torch.zeros(20, 1, dtype=torch.uint8), requires_grad=False)
    assert row_norms(table) is None
    table.weight = torch.nn.Parameter(torch.zeros(0))  # as ZeRO-3 leaves it
    assert row_norms(table) is None


@pytest.mark.parametrize("family", FAMILIES_WITH_IMAGES)
def test_placeholders_are_read_from_the_config(family):
    config = getattr(transformers, f"{family}Config")(**copy.deepcopy(FAMILIES_WITH_IMAGES[family]))
    ids = placeholder_ids(config)
    assert IMAGE in ids and not ids & {
        config.get_text_config().eos_token_id,
        config.get_text_config().pad_token_id,
    }
    if family in MROPE_FAMILIES:
        assert {91, VISION_START, 93} <= ids


def test_placeholders_of_parts_and_in_lists():
    thinker = {"audio_token_id": 5, "audio_config": {"audio_end_token_id": 6}}
    config = PreTrainedConfig(
        thinker_config=thinker, visual_indicator_token_ids=[7, 8], boi_token_index=9
    )
    assert placeholder_ids(config) == {5, 6, 7, 8, 9}
    assert placeholder_ids(LlamaConfig()) == frozenset()


def test_a_placeholder_is_no_mask_token():
    made = FAMILIES["Gemma"][0]()
    unused = made.convert_tokens_to_ids("<unused0>")
    assert choose_mask_token("auto", made, 60, frozenset(), None, {unused}).id == unused + 1
    with pytest.raises(
        ConfigError, match=r"got '<unused0>' \(id 6\), but the model's config uses it for images"
    ):
        choose_mask_token("<unused0>", made, 60, frozenset(), None, {unused})


def test_used_ids():
    rows = [{"input_ids": [1, 2, 2]}, {"input_ids": []}, {"input_ids": [9]}]
    assert used_ids(rows) == {1, 2, 9}
    assert used_ids(Dataset.from_list(rows)) == {1, 2, 9}
    assert used_ids(Dataset.from_list(rows).select([0])) == {1, 2}
    assert used_ids(IterableDataset.from_generator(lambda: iter(rows))) is None
    assert (
        used_ids(Dataset.from_list([{"text": "w1"}])) is None and used_ids([{"text": "w1"}]) is None
    )


# -- the added vector ------------------------------------------------------------------------------


def added(model):
    base = getattr(model, "base_model", model)
    token = choose_mask_token("add", None, base.get_input_embeddings().num_embeddings, None)
    return AddedMaskToken(model, token).attach()


def test_add_changes_no_shape_and_no_other_output(tiny_model):
    tiny_model.eval()
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    ids = torch.tensor([[5, 6, 7, 8]])
    plain = tiny_model(input_ids=ids).logits
    mask = added(tiny_model)
    assert mask.token.id == 97 and mask.token.added
    assert tiny_model.state_dict().keys() == before.keys()
    assert torch.equal(tiny_model(input_ids=ids).logits, plain)
    vectors = tiny_model.get_input_embeddings()(torch.tensor([[5, 97]]))[0]
    assert torch.equal(vectors[0], before["model.embed_tokens.weight"][5])
    assert torch.allclose(vectors[1], before["model.embed_tokens.weight"].mean(0), atol=1e-7)
    assert tiny_model.load_state_dict(before).missing_keys == []
    mask.detach(), mask.detach()
    assert not any("caft" in name for name, _ in tiny_model.named_modules())
    with pytest.raises(IndexError):
        tiny_model(input_ids=torch.tensor([[97]]))


def test_add_trains_where_the_embedding_trains(tiny_model):
    mask = added(tiny_model)
    ids = torch.tensor([[5, 97, 7, 97]])
    tiny_model(input_ids=ids, labels=ids.clamp(max=96)).loss.backward()
    assert mask.vector.grad.norm() > 0
    # what stands in for it inside the table
    assert tiny_model.get_input_embeddings().weight.grad[96].norm() == 0
    mask.detach()
    lora = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear"))
    frozen = added(lora)
    assert not frozen.vector.requires_grad
    lora(input_ids=ids, labels=ids.clamp(max=96)).loss.backward()


def test_add_starts_as_the_mean_of_what_the_embedding_gives():
    """Gemma scales what it looks up; an added vector that is not scaled would be out of place."""
    config = Gemma3TextConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        head_dim=16,
    )
    model = Gemma3ForCausalLM(config)
    embedding = model.get_input_embeddings()
    mean = embedding(torch.arange(30)).mean(0)
    assert torch.allclose(added(model).vector, mean, atol=1e-6)
    assert torch.allclose(mean, embedding.weight.mean(0) * 32**0.5, atol=1e-6)


def test_add_is_saved_and_loaded(tiny_model, tmp_path):
    mask = added(tiny_model)
    mask.save(tmp_path, write=False)
    assert not (tmp_path / FILE).exists()
    with pytest.raises(ConfigError, match="was not made with mask_token: add"):
        mask.load(tmp_path)
    mask.save(tmp_path, write=True)
    saved = mask.vector.detach().clone()
    mask.vector.data.zero_()
    mask.load(tmp_path)
    assert torch.equal(mask.vector, saved)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        mask.load(tmp_path)
