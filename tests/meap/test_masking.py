"""Duplication and masking, against the authors' rows, a slow formula and statistics; under every
collator."""

from __future__ import annotations

import copy
import json
import math
import re
import sys
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    TrainerState,
)

from builders.masked import EOS, MASK, PAD, duplication, example, pad
from builders.paths import GOLDENS, ROOT
from builders.tiny import word_tokenizer
from caft_plugin import ConfigError, MEAPConfig
from caft_plugin.meap.doubling import DoubledSet, Duplication, nothing_to_mask
from caft_plugin.meap.label_codes import COPY, COPY_START, ELIGIBLE, KEPT, TOO_LONG, plain_labels
from caft_plugin.meap.masking import EpochOfMasks, MEAPCollator
from caft_plugin.meap.training_set import used_ids
from caft_plugin.targets import (
    BOUNDARY,
    EXAMPLE,
    IGNORE,
    MASKED,
    MAY_MASK,
    OVERLONG,
    PLAN,
    head_targets,
)

pytestmark = pytest.mark.newest

CASES = json.loads((GOLDENS / "meap_official_sft.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    return word_tokenizer("")


def conversation(*turns, seed=0):
    """Alternating (prompt, answer) lengths, an end token after each answer."""
    rows = [example(p, a, seed + i) for i, (p, a) in enumerate(turns)]
    return {key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}


def collator(host=pad, seed=0, **settings):
    return MEAPCollator(host, MEAPConfig(**settings), MASK, seed)


# -- the authors' rows -----------------------------------------------------------------------------


def as_the_authors_cut(row, length):
    """Their rows end in the end token, which the host's cutting would have lost; nothing else is
    done here."""
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    if len(row["input_ids"]) > length:
        ids[-1] = EOS_OF_AUTHORS
        if labels[-1] >= ELIGIBLE:
            labels[-1] = KEPT
    return {"input_ids": ids, "labels": labels}


EOS_OF_AUTHORS = 2


@pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{len(c['answer'])} tokens in {c['max_length']}"
)
def test_separate_rows_are_the_authors(case, monkeypatch):
    ids = [case["bos"], *case["prompt"], *case["answer"], case["eos"]]
    row = {
        "input_ids": ids,
        "labels": [IGNORE] * (len(case["prompt"]) + 1) + [*case["answer"], case["eos"]],
    }
    duplicate = Duplication(
        "separate", 51, case["max_length"], special=(case["bos"], case["eos"]), blank=()
    )
    rows = [as_the_authors_cut(r, case["max_length"]) for r in duplicate(row)]
    assert len(rows) == len(case["rows"])

    collate = MEAPCollator(
        pad, MEAPConfig(mask_ratio=case["mask_ratio"], layout="separate"), case["mask"], seed=0
    )
    own = collate(copy.deepcopy(rows))
    theirs = [
        [i for i, id_ in enumerate(r["input_ids"]) if id_ == case["mask"]] for r in case["rows"]
    ]
    assert [(r == case["mask"]).sum().item() for r in own["input_ids"]] == [len(m) for m in theirs]

    monkeypatch.setattr(collate, "_draw", lambda generator, eligible, tokens: theirs[1])
    batch = collate(rows)
    for got_ids, got_labels, wanted in zip(
        batch["input_ids"], batch["labels"], case["rows"], strict=True
    ):
        assert got_ids.tolist() == wanted["input_ids"]
        assert got_labels.tolist() == wanted["labels"]


# -- duplication -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "masked"), [(50, False), (51, True)])
@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_answers_of_more_than_50_tokens(layout, answer, masked):
    rows = duplication(layout)(example(answer=answer))
    assert len(rows) == (2 if masked and layout == "separate" else 1)
    coded = sum(label >= ELIGIBLE for row in rows for label in row["labels"])
    assert coded == (answer if masked else 0)


def test_a_pair_is_the_example_twice_with_positions_running_on():
    row = {
        **example(),
        "position_ids": list(range(64)),
        "attention_mask": [1] * 64,
        "length": 64,
        "tag": "x",
    }
    (pair,) = duplication()(row)
    assert pair["input_ids"] == row["input_ids"] * 2
    assert pair["position_ids"] == list(range(128))
    assert (pair["attention_mask"], pair["length"], pair["tag"]) == ([1] * 128, 128, "x")
    assert pair["labels"][:64] == row["labels"]
    assert pair["labels"][64:] == [
        COPY_START,
        COPY,
        COPY,
        *(i + ELIGIBLE for i in row["input_ids"][3:-1]),
        KEPT,
    ]


def test_rule_and_end_tokens_go_by_turn():
    row = conversation((3, 60), (4, 10), (2, 55))
    copy_ = duplication().copy_labels(np.array(row["input_ids"]), np.array(row["labels"]))
    eligible = np.flatnonzero(copy_ >= ELIGIBLE)
    assert eligible.tolist() == [*range(3, 63), *range(81, 136)]
    assert (copy_[68:79] == KEPT).all() and copy_[63] == copy_[136] == KEPT


def test_white_space_behind_an_end_token_belongs_to_the_template(tokenizer):
    special, blank = (EOS,), (95,)
    duplicate = Duplication("concat", 3, None, special, blank)
    ids = np.array([7, 7, 10, 95, 11, 12, EOS, 95])  # white space in the answer, and behind its end
    coded = duplicate.copy_labels(ids, np.where(np.arange(8) < 2, IGNORE, ids))
    assert (coded >= ELIGIBLE).tolist() == [False, False, True, True, True, True, False, False]
    coded = duplicate.copy_labels(ids[:6], np.where(np.arange(6) < 2, IGNORE, ids[:6]))
    assert (coded >= ELIGIBLE).sum() == 4


def test_special_tokens_of_a_tokenizer(tokenizer):
    made = Duplication.of(MEAPConfig(), tokenizer, 128)
    assert made.special == (0, 1, 2)
    assert (made.layout, made.min_answer_tokens, made.max_length) == ("concat", 51, 128)


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [5], "labels": [5]},
        {"input_ids": [5, 6, 7], "labels": [IGNORE] * 3},
        {"input_ids": [5, EOS, EOS, 2], "labels": [IGNORE, EOS, EOS, 2]},
        {"input_ids": [], "labels": []},
    ],
    ids=["one token", "nothing supervised", "special tokens alone", "empty"],
)
@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_what_cannot_be_masked_stays_as_it_is(row, layout):
    assert duplication(layout, min_answer_tokens=1)(row) == [row]


def test_a_pair_that_does_not_fit_is_trained_plainly_and_counted():
    row = example()
    (fits,) = duplication(max_length=128)(row)
    assert len(fits["input_ids"]) == 128
    (plain,) = duplication(max_length=127)(row)
    batch = collator()([plain, fits])
    assert batch["labels"][0][:64].tolist() == row["labels"]
    assert batch["input_ids"][0][:64].tolist() == row["input_ids"]
    assert ((batch[PLAN] & OVERLONG) > 0).sum(1).tolist() == [1, 0]
    assert len(duplication("separate", max_length=64)(row)) == 2


def test_rows_that_are_not_tokenised():
    with pytest.raises(ConfigError, match="need `input_ids` and `labels`, but these have text"):
        duplication()({"text": "w1"})
    with pytest.raises(ConfigError, match="mode: pretrain"):
        duplication()({"input_ids": [1]})
    with pytest.raises(ConfigError, match="but these have text"):
        duplication().doubled(Dataset.from_list([{"text": "w1"}]))


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_data_sets_of_every_kind_become_the_same_rows(layout):
    rows = [example(answer=n, seed=n) for n in (10, 60, 70)]
    double = duplication(layout)
    wanted = [row for r in rows for row in double(r)]
    assert double.doubled(rows) == wanted
    assert list(double.doubled(Dataset.from_list(rows))) == wanted
    assert list(double.doubled(IterableDataset.from_generator(lambda: iter(rows)))) == wanted
    tensors = double.doubled(Dataset.from_list(rows).with_format("torch"))
    assert [{k: v.tolist() for k, v in row.items()} for row in tensors] == wanted
    arrays = double.doubled([{k: np.array(v) for k, v in row.items()} for row in rows])
    assert [{k: v.tolist() for k, v in row.items()} for row in arrays] == wanted


def test_the_package_datasets_is_not_needed(monkeypatch):
    """The wheel does not require it: `with_caft(Trainer)` trains on a list of rows where it is not
    installed."""
    rows = [example(answer=n, seed=n) for n in (10, 60)]
    wanted = [row for r in rows for row in duplication()(r)]
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it now fails
    assert duplication().doubled(rows) == wanted
    assert used_ids(rows) == {token for row in rows for token in row["input_ids"]}


def test_labels_in_a_narrow_column():
    from datasets import Features, Sequence, Value

    narrow = Features({"input_ids": Sequence(Value("int32")), "labels": Sequence(Value("int16"))})
    made = duplication().doubled(Dataset.from_list([example()], features=narrow))
    assert max(made[0]["labels"]) > ELIGIBLE


class Endless:
    """Says that it has three rows, and has one for any number: random crops of a long text do
    so."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 3

    def __getitem__(self, index):
        assert index < len(self), "read past its length"
        self.read.append(index)
        return example(seed=index)


def test_a_data_set_is_as_long_as_it_says():
    endless = Endless()
    assert duplication().doubled(endless) == [
        row for i in range(3) for row in duplication()(example(seed=i))
    ]
    assert endless.read == [0, 1, 2]
    assert used_ids(Endless()) == {id_ for i in range(3) for id_ in example(seed=i)["input_ids"]}


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_a_set_that_is_doubled_already_is_named(layout):
    double = duplication(layout, max_length=128)
    rows = [row for n in (10, 60, 70) for row in double(example(answer=n, seed=n))]
    for again in (rows, Dataset.from_list(rows)):
        with pytest.raises(ConfigError, match="already has masked copies"):
            double.doubled(again)


@pytest.mark.parametrize("how", ["with_transform", "set_transform"])
def test_a_set_with_a_transform_is_named(how):
    rows = Dataset.from_list([{"text": "w1"}])
    made = getattr(rows, how)(lambda batch: {key: [value] for key, value in example().items()})
    with pytest.raises(
        ConfigError, match="with_transform or set_transform.*Dataset.map.*mode: pretrain"
    ):
        duplication().doubled(made if made is not None else rows)
    assert used_ids(made if made is not None else rows) is None


def test_rows_with_images_are_copied_in_sequences_of_their_own_alone():
    row = example(prompt=8)
    row["input_ids"][2:6] = [91] * 4
    row["input_ids"][20:23] = [92] * 3  # a model may be asked to answer with them
    row["labels"][20:23] = [92] * 3
    of_media = {"special": (PAD, EOS, 2, 91, 92), "blank": (), "placeholders": (91, 92)}
    with pytest.raises(ConfigError, match="meap.layout: got concat.*token id 91.*layout: separate"):
        Duplication("concat", 51, None, **of_media)(row)
    with pytest.raises(ConfigError, match="the column pixel_values"):
        duplication()({**example(), "pixel_values": np.zeros(3)})
    _, copy_ = Duplication("separate", 51, None, **of_media)(row)
    assert [label >= ELIGIBLE for label in copy_["labels"][19:24]] == [
        True,
        False,
        False,
        False,
        True,
    ]
    short = {**row, "labels": [IGNORE] * len(row["labels"])}
    assert Duplication("concat", 51, None, **of_media)(short) == [short]


def test_whether_anything_is_masked_is_counted():
    rows = [example(answer=n, seed=n) for n in (10, 60, 20)]
    for kind in (list, Dataset.from_list):
        assert nothing_to_mask(kind([r for row in rows for r in duplication()(row)])) is None
        short = nothing_to_mask(kind([r for row in rows for r in duplication(max_length=100)(row)]))
        assert (
            "none of the 3 training rows has a masked copy" in short
            and "1 examples are too long" in short
        )
    assert nothing_to_mask(IterableDataset.from_generator(lambda: iter(rows))) is None


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_doubled_rows_are_evaluated_as_they_were(layout):
    row = conversation((3, 60), (4, 10), (2, 55))
    length = len(row["labels"])
    for made in duplication(layout)(row):
        labels = plain_labels(
            torch.tensor(made["input_ids"]), torch.tensor(made["labels"]), layout
        ).tolist()
        assert labels == row["labels"] + [IGNORE] * (len(labels) - length)
    (marked,) = duplication(max_length=100)(row)
    assert max(marked["labels"]) >= TOO_LONG
    assert (
        plain_labels(
            torch.tensor(marked["input_ids"]), torch.tensor(marked["labels"]), "concat"
        ).tolist()
        == (row["labels"])
    )


def test_codes_are_read_and_written_in_one_file():
    names = re.compile(r"\b(COPY_START|ELIGIBLE|TOO_LONG)\b")
    files = {
        file.name
        for file in (ROOT / "caft_plugin").rglob("*.py")
        if names.search(file.read_text(encoding="utf-8"))
    }
    assert files == {"label_codes.py"}


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_a_batch(layout):
    row = conversation((3, 60), (4, 10), (2, 55))
    rows = duplication(layout)(row)
    batch = collator(layout=layout)(copy.deepcopy(rows))
    assert batch["labels"][0][: len(row["labels"])].tolist() == row["labels"]
    ids, labels, plan = (
        batch[key].flatten()[-len(row["labels"]) :] for key in ("input_ids", "labels", PLAN)
    )
    masked = (ids == MASK).nonzero().flatten()
    assert len(masked) == 6 + 5  # int(60 * 0.1) and int(55 * 0.1), by turn
    assert ((masked >= 3) & (masked < 63)).sum() == 6
    assert labels[masked].tolist() == [row["input_ids"][i] for i in masked]
    assert (labels != IGNORE).sum() == 11
    assert ((plan & MASKED) > 0).nonzero().flatten().tolist() == masked.tolist()
    assert ((plan & MAY_MASK) > 0).sum() == 115 and ((plan & EXAMPLE) > 0).sum() == 1
    assert (plan[0] & BOUNDARY) == (BOUNDARY if layout == "concat" else 0)


def test_every_eligible_position_is_hit_alike_and_no_other():
    """Chi-square over 10,000 epochs: 60 positions, 6 drawn in each. Its 0.9999 quantile is 109 at
    59 degrees of freedom (fewer in truth: draws are without replacement, which only makes the sum
    smaller)."""
    (pair,) = duplication()(example())
    collate, hits = collator(), Counter()
    for epoch in range(10_000):
        collate.epoch.fill_(epoch)
        hits.update((collate([pair])["input_ids"][0] == MASK).nonzero().flatten().tolist())
    assert set(hits) == set(range(67, 127))
    assert sum(hits.values()) == 60_000
    assert sum((count - 1000) ** 2 / 1000 for count in hits.values()) < 109


def test_pretraining_draws_alike_too_and_never_the_last():
    """15 of 100 positions, 99 of them eligible; 0.9999 quantile of chi-square at 98 degrees of
    freedom: 159."""
    ids = list(range(5, 95)) + list(range(5, 15))
    row = {"input_ids": ids, "labels": ids}
    collate, hits = collator(mode="pretrain"), Counter()
    for epoch in range(10_000):
        collate.epoch.fill_(epoch)
        batch = collate([row])
        hits.update((batch["input_ids"][0] == MASK).nonzero().flatten().tolist())
    assert batch["labels"][0].tolist() == ids
    assert set(hits) == set(range(99))
    assert sum(hits.values()) == 150_000
    expected = 150_000 / 99
    assert sum((count - expected) ** 2 / expected for count in hits.values()) < 159


@pytest.mark.parametrize("length", [1, 2, 6, 7, 19, 20, 1000])
def test_shares_are_rounded_as_the_authors_round(length):
    row = {"input_ids": [7] * length, "labels": [7] * length}
    batch = collator(mode="pretrain")([row])
    assert (batch["input_ids"] == MASK).sum() == (0 if length == 1 else max(1, int(length * 0.15)))
    answer = example(answer=length)
    batch = collator()(duplication(min_answer_tokens=1)(answer))
    assert (batch["input_ids"] == MASK).sum() == max(1, int(length * 0.10))


def test_draws_depend_on_seed_epoch_and_tokens_alone():
    rows = [example(seed=s) for s in range(6)]
    pairs = [row for r in rows for row in duplication()(r)]

    def masks(collate, order=range(6), epoch=0):
        collate.epoch.fill_(epoch)
        ids = collate([pairs[i] for i in order])["input_ids"]
        return {
            i: (row == MASK).nonzero().flatten().tolist() for i, row in zip(order, ids, strict=True)
        }

    first = masks(collator())
    assert masks(collator()) == first
    assert masks(collator(), order=[5, 3, 0, 1, 4, 2]) == first
    assert masks(collator(), order=[3]) == {3: first[3]}
    assert masks(collator(), epoch=1) != first != masks(collator(seed=1))
    separate = [row for r in rows for row in duplication("separate")(r)]
    ids = collator(layout="separate")(separate)["input_ids"][1::2]
    assert [[i + 64 for i in (row == MASK).nonzero().flatten().tolist()] for row in ids] == list(
        first.values()
    )


@pytest.mark.parametrize(("stopped_in", "epoch"), [(None, 0), (0, 0), (0.5, 0), (2.5, 2)])
def test_masks_are_those_of_the_epoch_in_which_a_run_goes_on(stopped_in, epoch):
    made = collator()
    callback = EpochOfMasks(made, DoubledSet(MEAPConfig()))
    callback.on_train_begin(None, TrainerState(epoch=stopped_in), None)
    for later in (0, 1):
        callback.on_epoch_begin(None, None, None)
        assert int(made.epoch) == epoch + later


@pytest.mark.parametrize("text", [1, 2, 20])
def test_pretraining_never_masks_placeholders_and_takes_its_share_of_the_rest(text):
    """As many image tokens as a real picture has: 15 % of the row would be more than all of its
    text."""
    ids = [91] * 576 + list(range(5, 5 + text)) + [92]
    collate = MEAPCollator(pad, MEAPConfig(mode="pretrain"), MASK, 0, placeholders={91, 92})
    hit = set()
    for epoch in range(100):
        collate.epoch.fill_(epoch)
        batch = collate([{"input_ids": ids, "labels": ids}])
        masked = (batch["input_ids"][0] == MASK).nonzero().flatten().tolist()
        assert len(masked) == max(1, int(text * 0.15))
        hit.update(masked)
    assert hit == set(range(576, 576 + text))
    assert ((batch[PLAN] & MAY_MASK) > 0).sum() == text
    nothing = collate([{"input_ids": [91] * 9, "labels": [91] * 9}])
    assert nothing["input_ids"].tolist() == [[91] * 9] and not nothing[PLAN].any()


def test_documents_of_a_pretraining_row_draw_on_their_own():
    lengths = [40, 1, 30, 29]
    ids = np.random.default_rng(0).integers(5, 90, 100).tolist()
    positions = [i for length in lengths for i in range(length)]

    def host(rows):
        return {**pad(rows), "position_ids": torch.tensor([positions])}

    packed = collator(host, mode="pretrain")([{"input_ids": ids, "labels": ids}])
    parts = np.split(np.array(ids), np.cumsum(lengths)[:-1])
    alone = [
        collator(mode="pretrain")([{"input_ids": p.tolist(), "labels": p.tolist()}]) for p in parts
    ]
    assert packed["input_ids"][0].tolist() == [
        t for batch in alone for t in batch["input_ids"][0].tolist()
    ]
    assert packed[PLAN][0].tolist() == [t for batch in alone for t in batch[PLAN][0].tolist()]
    assert ((packed[PLAN] & EXAMPLE) > 0).sum() == 3
    assert packed["labels"][0].tolist() == ids


def test_a_collator_that_makes_its_own_labels_is_named(tokenizer):
    rows = duplication()(example())
    host = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    with pytest.raises(
        ConfigError, match="DataCollatorForLanguageModeling replaces the rows' labels"
    ):
        collator(host)(rows)
    with pytest.raises(ConfigError, match="without labels"):
        collator(lambda rows: {"input_ids": torch.tensor([[1]])})(rows)
    plain = [{"input_ids": [5, 6, 7]}]
    assert (collator(host, mode="pretrain")(plain)["input_ids"] == MASK).sum() == 1


def test_a_collator_that_cuts_a_copy_to_nothing_is_not_blamed():
    _, copy_ = duplication("separate")(example(prompt=8))
    batch = collator(
        lambda rows: pad([{k: v[:6] for k, v in r.items()} for r in rows]), layout="separate"
    )([copy_])
    assert batch["labels"].tolist() == [[IGNORE] * 6] and not batch[PLAN].any()


@pytest.mark.parametrize("mode", ["sft", "pretrain"])
def test_masks_are_never_drawn_twice(mode):
    with pytest.raises(ConfigError, match="MEAPCollator already draws masks"):
        collator(collator(mode=mode), mode=mode)(duplication()(example()))


# -- under every collator that hosts use -----------------------------------------------------------


def hosts(tokenizer):
    """name: (the collator, rows to what it is called with)"""

    def as_packed(rows):
        return [rows]

    def without_positions(rows):  # which this collator does not pad
        return [{key: value for key, value in row.items() if key != "position_ids"} for row in rows]

    made = {
        "transformers seq2seq": (DataCollatorForSeq2Seq(tokenizer), without_positions),
        "transformers flattening": (DataCollatorWithFlattening(), list),
        "transformers flattening, flash": (
            DataCollatorWithFlattening(return_flash_attn_kwargs=True),
            list,
        ),
    }
    try:
        from trl.trainer.sft_trainer import DataCollatorForLanguageModeling as TRLCollator

        made["trl"] = (TRLCollator(pad_token_id=PAD), list)
        made["trl padding_free"] = (TRLCollator(pad_token_id=PAD, padding_free=True), list)
    except ImportError:
        pass
    try:
        from axolotl.utils import collators

        made["axolotl"] = (collators.DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=64), list)
        made["axolotl multipack"] = (
            collators.BatchSamplerDataCollatorForSeq2Seq(tokenizer),
            as_packed,
        )
        made["axolotl multipack v2"] = (
            collators.V2BatchSamplerDataCollatorForSeq2Seq(tokenizer),
            as_packed,
        )
    except ImportError:
        pass
    return made


HOSTS = list(hosts(word_tokenizer("")))


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("layout", ["concat", "separate"])
def test_every_collator_gives_the_same_masks(tokenizer, name, layout):
    """What stands at a token, its label and its marks, is what the plainest collator gives, row
    after row."""
    rows = [example(answer=n, seed=n) for n in (60, 20, 75)]
    rows.append({"input_ids": [7, 8], "labels": [7, 8]})
    doubled = [
        {
            **row,
            "attention_mask": [1] * len(row["input_ids"]),
            "position_ids": list(range(len(row["input_ids"]))),
        }
        for r in rows
        for row in duplication(layout)(r)
    ]
    plain = collator(layout=layout)(copy.deepcopy(doubled))
    host, shape = hosts(tokenizer)[name]
    batch = collator(host, layout=layout)(shape(copy.deepcopy(doubled)))

    def tokens(batch, key):
        lengths = [len(row["input_ids"]) for row in doubled]
        if batch[key].shape[0] == 1:
            return [t.tolist() for t in batch[key][0][: sum(lengths)].split(lengths)]
        return [row[:length].tolist() for row, length in zip(batch[key], lengths, strict=True)]

    assert tokens(batch, "input_ids") == tokens(plain, "input_ids")
    assert tokens(batch, PLAN) == tokens(plain, PLAN)
    for ours, theirs in zip(tokens(batch, "labels"), tokens(plain, "labels"), strict=True):
        # flattening collators ignore the first token's label, which nothing predicts
        assert ours[1:] == theirs[1:]
    assert (batch["input_ids"] == MASK).sum() == 6 + 7


# -- the loss --------------------------------------------------------------------------------------


def slow_concat_loss(model, row, masked):
    """The paper's equation, fine-tuning, position by position: all answer tokens of the original,
    and in the copy, which attends to the original, the masked ones. Sum and number of terms."""
    ids = row["input_ids"]
    answer = [i for i, label in enumerate(row["labels"]) if i > 0 and label != IGNORE]
    sequence = ids + [MASK if i in masked else id_ for i, id_ in enumerate(ids)]
    logits = model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0].double()
    terms = [-logits[i - 1].log_softmax(-1)[ids[i]] for i in answer]
    terms += [-logits[len(ids) + i - 1].log_softmax(-1)[ids[i]] for i in masked]
    return sum(terms), len(terms)


@pytest.mark.parametrize("packed", [False, True])
def test_concat_loss_is_the_papers(tiny_model, packed):
    """1e-6 relative, float32: the padded or packed forward sums the same terms in another order."""
    rows = [example(answer=n, seed=n) for n in (20, 52, 55)]
    rows[0]["labels"][:3] = rows[0]["input_ids"][:3]  # supervised from its first token
    doubled = [
        {**row, "position_ids": list(range(len(row["input_ids"])))}
        for r in rows
        for row in duplication()(r)
    ]
    batch = collator(DataCollatorWithFlattening() if packed else pad)(doubled)
    assert (batch.pop(PLAN) & BOUNDARY).sum() == 2
    labels = batch.pop("labels")
    lengths = [len(row["input_ids"]) for row in doubled]
    documents = batch["input_ids"][0].split(lengths) if packed else batch["input_ids"]
    with torch.no_grad():
        logits = tiny_model(**batch, use_cache=False).logits
        ours = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE
        )
        parts = []
        for row, document in zip(rows, documents, strict=True):
            length = len(row["input_ids"])
            masked = (document[length : 2 * length] == MASK).nonzero().flatten().tolist()
            parts.append(slow_concat_loss(tiny_model, row, masked))
    assert [count for _, count in parts] == [23, 53 + 5, 56 + 5]
    slow = sum(total for total, _ in parts) / sum(count for _, count in parts)
    assert ours.item() == pytest.approx(slow.item(), rel=1e-6)


def test_targets_of_heads_are_masked_tokens_and_never_cross_into_the_copy():
    # supervised from the first token: a target near the copy's start is possible
    row = example(prompt=0, answer=60)
    batch = collator(mask_ratio=0.9)(duplication()(row))
    length = len(row["input_ids"])
    targets = head_targets(batch, 4)
    masked = set((batch["input_ids"][0] == MASK).nonzero().flatten().tolist())
    for k, of_head in enumerate(targets, 1):
        for position, target in enumerate(of_head[0].tolist()):
            at = position + k + 1
            same_part = (position < length) == (at < length)
            wanted = at < 2 * length and same_part and (at < length or at in masked)
            assert target == (row["input_ids"][at % length] if wanted else IGNORE)


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 1.5, math.nan, "x", True])
def test_ratios_that_are_none(ratio):
    with pytest.raises(
        ConfigError, match="meap.mask_ratio: got .*accepts a number above 0 and below 1"
    ):
        MEAPConfig(mask_ratio=ratio)


def test_layout_misspelt():
    with pytest.raises(
        ConfigError, match="meap.layout: got 'concta', but it accepts one of concat, separate"
    ):
        MEAPConfig(layout="concta")
