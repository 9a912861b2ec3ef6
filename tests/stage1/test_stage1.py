"""Stage 1 on a tiny model: targets, answers, interruptions, the card. The base never changes."""

from __future__ import annotations

import json
import re

import pytest
import torch
from click.testing import CliRunner
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, RwkvConfig, TrainingArguments

from builders.answers import TEMPLATE, counting
from builders.tiny import word_tokenizer
from caft_plugin import CAFTConfig, ConfigError, with_caft
from caft_plugin.caft.loss import cross_entropy_and_hit_of, divergence_of, weighted_sum
from caft_plugin.config import PretrainConfig
from caft_plugin.model.loading import load_model
from caft_plugin.stage1 import answers as answers_room
from caft_plugin.stage1.answers import ANSWERS, AnswerFile, write_answers
from caft_plugin.stage1.data import pad_rows, prompt_of, read_prompts, read_rows, with_answer
from caft_plugin.stage1.figures import before_and_after
from caft_plugin.stage1.pretraining import (
    HeadsTrainer,
    Stage1,
    heads_block,
    pretrain_heads,
)
from caft_plugin.targets import IGNORE
from caft_plugin.tools.attention_report import read_texts
from caft_plugin.tools.cli import commands


@pytest.fixture
def tokenizer():
    return word_tokenizer(TEMPLATE)


@pytest.fixture
def base(tiny_model):
    tiny_model.generation_config.eos_token_id = 1
    tiny_model.generation_config.pad_token_id = 0
    return tiny_model


def rows(count=24):
    generator = torch.Generator().manual_seed(3)
    made = []
    for i in range(count):
        ids = torch.randint(5, 97, (6 + i % 5,), generator=generator).tolist()
        made.append(with_answer(ids[:3], ids[3:]))
    return made


def job(
    base,
    tokenizer,
    folder,
    targets="dataset",
    data=None,
    heldout=None,
    steps=3,
    caft=None,
    **settings,
):
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        seed=1,
    )
    config = PretrainConfig(
        targets=targets, **{"max_new_tokens": 8, "generation_batch_size": 5, **settings}
    )
    data = rows() if data is None else data
    return Stage1(
        base, tokenizer, data, heldout, arguments, CAFTConfig(**caft or {}), config, "tiny"
    )


@pytest.fixture
def taught(base):
    """A base model that has learnt to count and to end its answers."""
    optimizer = torch.optim.Adam(base.parameters(), lr=1e-2)
    batch = pad_rows(counting(), 0)
    for _ in range(40):
        base(**batch).loss.backward()
        optimizer.step(), optimizer.zero_grad()
    return base


@pytest.mark.parametrize("targets", ["model", "dataset", "distribution"])
def test_only_the_heads_change(taught, tokenizer, tmp_path, targets):
    before = {name: parameter.clone() for name, parameter in taught.named_parameters()}
    folder = pretrain_heads(
        job(
            taught,
            tokenizer,
            tmp_path,
            targets,
            data=counting(),
            temperature=1.0,
            max_new_tokens=60,
        )
    )
    for name, parameter in before.items():
        assert torch.equal(parameter, taught.get_parameter(name)), name
    for name, parameter in load_file(folder / "heads.safetensors").items():
        last = name.split(".", 1)[1]
        assert not torch.equal(parameter, before[f"model.layers.2.{last}"]), name
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "config.json",
        "fingerprint.safetensors",
        "heads.safetensors",
        "losses.json",
        "metrics.json",
    ]
    checkpoint = next(tmp_path.glob("checkpoint-2"))
    # the base is not copied into every checkpoint
    assert not (checkpoint / "model.safetensors").exists()


@pytest.mark.parametrize("targets", ["dataset", "distribution"])
def test_training_lowers_the_held_out_loss_of_every_head(taught, tokenizer, tmp_path, targets):
    data = counting()
    folder = pretrain_heads(
        job(taught, tokenizer, tmp_path, targets, data=data, heldout=data[:7], steps=25)
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    for before, after in zip(metrics["untrained"], metrics["heads"], strict=True):
        assert after["loss"] < 0.5 * before["loss"]
        assert after["accuracy"] > before["accuracy"] + 0.2
    card = (folder / "README.md").read_text()
    assert f"targets `{targets}`" in card and f" | {metrics['heads'][3]['loss']:.4f} | " in card


def test_distribution_is_the_divergence_from_the_base_k_ahead(base, tokenizer, tmp_path):
    """The first logged loss of each head, against the definition written out."""
    data = rows(4)
    torch.manual_seed(0)
    done = job(
        base,
        tokenizer,
        tmp_path,
        "distribution",
        data=data,
        heldout=[],
        steps=1,
        caft={"num_heads": 2},
    )
    done.arguments.learning_rate = 0.0
    trainers = []
    original = HeadsTrainer.train
    HeadsTrainer.train = lambda self, *a, **k: trainers.append(self) or original(self, *a, **k)
    try:
        pretrain_heads(done)
    finally:
        HeadsTrainer.train = original
    log = next(entry for entry in trainers[0].state.log_history if "loss" in entry)

    total = 0.0
    for k in (1, 2):
        summed, count = 0.0, 0
        # an untrained head is a copy of the last layer, so it gives the base's own logits
        for row in data:
            logits = base(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
            for t in range(len(logits) - k - 1):
                teacher = logits[t + k]
                summed += (teacher.exp() * (teacher - logits[t])).sum().item()
                count += 1
        assert log[f"caft/loss_head_{k}"] == pytest.approx(summed / count, rel=1e-4)
        total += 0.8**k * summed / count
    assert log["loss"] == pytest.approx(total, rel=1e-4)


def test_summed_divergence_and_hits():
    weight, hidden, teacher = (
        torch.randn(11, 4),
        torch.randn(70, 4, requires_grad=True),
        torch.randn(70, 4),
    )
    targets = torch.randint(0, 11, (70,))
    p, q = (teacher @ weight.T).log_softmax(-1), (hidden @ weight.T).log_softmax(-1)
    slow = (p.exp() * (p - q)).sum()
    total, rows = weighted_sum(
        divergence_of(lambda h: h @ weight.T), torch.ones(70), hidden, teacher, 11
    )
    torch.testing.assert_close(total, slow)
    torch.testing.assert_close(rows.sum(), slow)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden)[0] for x in (total, slow)))
    of_rows = cross_entropy_and_hit_of(lambda h: h @ weight.T)
    _, rows = weighted_sum(of_rows, torch.ones(70), hidden, targets, 11)
    assert rows[:, 1].sum() == (q.argmax(-1) == targets).sum()


# -- answers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_interrupted_answers_go_on_where_they_stopped(
    taught, tokenizer, tmp_path, monkeypatch, temperature
):
    prompts = [prompt_of(row) for row in counting(17)]
    config = PretrainConfig(max_new_tokens=60, temperature=temperature, generation_batch_size=5)
    whole = write_answers(taught, tokenizer, prompts, config, tmp_path / "whole.jsonl", "tiny")
    assert len(whole) == 17 and any(answer[-1] == 1 for answer in whole)

    calls = []
    original = answers_room.generate

    def killed(*arguments):
        calls.append(arguments[-1])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(answers_room, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        write_answers(taught, tokenizer, prompts, config, tmp_path / "parts.jsonl", "tiny")
    with open(tmp_path / "parts.jsonl", "a") as file:
        file.write('{"answer": [1, 2')  # killed in the middle of a line
    resumed = write_answers(taught, tokenizer, prompts, config, tmp_path / "parts.jsonl", "tiny")
    assert calls == [0, 5, 10, 10, 15]  # nothing lost but the current batch
    assert resumed == whole
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_answers_made_with_other_settings_are_not_mixed(tmp_path):
    AnswerFile(tmp_path / "a.jsonl", {"base model": "a", "sampling": 1}).close()
    with pytest.raises(ConfigError, match="holds answers made with another sampling"):
        AnswerFile(tmp_path / "a.jsonl", {"base model": "a", "sampling": 2})
    AnswerFile(tmp_path / "b.jsonl", {"base model": "a", "engine": "another"}).close()
    with pytest.raises(ConfigError, match="holds answers made with another engine"):
        AnswerFile(tmp_path / "b.jsonl", {"base model": "a"})


def test_a_batch_answers_as_its_prompts_one_by_one(taught, tokenizer, tmp_path):
    prompts = [[5, 6, 7], [8, 9], [30, 31, 32, 33, 34]]
    answers = []
    for size in (1, 3):
        config = PretrainConfig(max_new_tokens=60, generation_batch_size=size)
        answers.append(
            write_answers(taught, tokenizer, prompts, config, tmp_path / f"{size}.jsonl", "tiny")
        )
    assert answers[0] == answers[1]
    assert answers[0][0][:3] == [8, 9, 10]


def test_training_goes_on_from_the_newest_whole_checkpoint(base, tokenizer, tmp_path, caplog):
    torch.manual_seed(0)
    start = {name: p.clone() for name, p in base.state_dict().items()}

    def run(folder, steps):
        model = LlamaForCausalLM(base.config)
        model.load_state_dict(start)
        made = pretrain_heads(job(model, tokenizer, folder, steps=steps))
        return (made / "heads.safetensors").read_bytes()

    whole = run(tmp_path / "whole", 6)
    run(tmp_path / "parts", 6)
    # half a file
    (tmp_path / "parts" / "checkpoint-6" / "trainer_state.json").write_text('{"global_st')
    assert run(tmp_path / "parts", 6) == whole
    assert "checkpoint-6 has no readable trainer_state.json" in caplog.text


# -- bad input -------------------------------------------------------------------------------------


def test_bad_settings():
    with pytest.raises(
        ConfigError,
        match=r"pretrain_heads.targets: got 'teacher', but it accepts one of model, dataset",
    ):
        PretrainConfig(targets="teacher")
    for unknown in ({"tempratur": 1}, {"vllm": False}):  # the second was a setting
        with pytest.raises(ConfigError, match="pretrain_heads.(tempratur|vllm): unknown setting"):
            PretrainConfig(**unknown)


def test_empty_data(base, tokenizer, tmp_path):
    for data in ([], [{"input_ids": [5, 6], "labels": [IGNORE, IGNORE]}]):
        with pytest.raises(ConfigError, match="has no row with an answer to learn from"):
            pretrain_heads(job(base, tokenizer, tmp_path, data=data))


def test_prompts_longer_than_the_context(base, tokenizer, tmp_path):
    data = [*rows(3), with_answer([5] * 130, [6])]
    with pytest.raises(
        ConfigError, match="row .* has a prompt of 130 tokens; with 8 new ones .* context of 128"
    ):
        pretrain_heads(job(base, tokenizer, tmp_path, "model", data=data))
    assert not (tmp_path / ANSWERS).exists()


def test_rows_without_a_prompt(base, tokenizer, tmp_path):
    with pytest.raises(ConfigError, match="1 of 3 rows have none"):
        pretrain_heads(
            job(
                base,
                tokenizer,
                tmp_path,
                "model",
                data=[*rows(2), with_answer([], [6, 7])],
                heldout=[],
            )
        )


def test_no_answer_ends(base, tokenizer, tmp_path):
    with torch.no_grad():
        base.lm_head.weight[1] = 0  # the end token is never the likeliest
    data, length = rows(2), PretrainConfig().max_new_tokens
    base.config.max_position_embeddings = 2 * length
    with pytest.raises(
        ConfigError, match=f"none of the 2 answers came to an end within {length} tokens"
    ):
        pretrain_heads(
            job(base, tokenizer, tmp_path, "model", data=data, heldout=[], max_new_tokens=length)
        )


def test_no_answer_ends_where_short_ones_were_asked_for(base, tokenizer, tmp_path, caplog):
    with torch.no_grad():
        base.lm_head.weight[1] = 0
    pretrain_heads(job(base, tokenizer, tmp_path, "model"))
    assert "13 of 13 answers did not end within 8 tokens" in caplog.text


def test_no_end_token(base, tokenizer, tmp_path):
    base.generation_config.eos_token_id = None
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="got a model without an eos_token_id"):
        pretrain_heads(job(base, tokenizer, tmp_path, "model"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="vLLM may run here")
def test_a_base_that_heads_cannot_follow_is_refused_before_its_weights_are_loaded(tmp_path):
    # and no weights
    RwkvConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="passes a running state from layer to layer"):
        load_model(str(tmp_path), torch.float32, for_heads=True)


def test_rows_from_a_file(tokenizer, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [
        {
            "messages": [
                {"role": "user", "content": "w1 w2"},
                {"role": "assistant", "content": "w3"},
            ]
        },
        {"prompt": "w1 w2", "completion": "w3 w4"},
        {"text": "w1 w2 w3"},
    ]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    chat, completion, text = read_rows(file, tokenizer, 100)
    assert tokenizer.decode(prompt_of(chat)).endswith("assistant")
    assert tokenizer.decode([label for label in chat["labels"] if label != IGNORE]) == "w3 </s>"
    assert (
        prompt_of(completion) == tokenizer("w1 w2").input_ids and completion["input_ids"][-1] == 1
    )
    assert prompt_of(text) == [] and text["labels"] == text["input_ids"]
    assert all(len(row["input_ids"]) <= 2 for row in read_rows(file, tokenizer, 2))

    file.write_text('{"text": "w1"}\n{"messages": []}\n')
    with pytest.raises(ConfigError, match=r"--data: line 2 of .* is not a row"):
        read_rows(file, tokenizer, 100)
    with pytest.raises(ConfigError, match=r"--data: .* cannot be read"):
        read_rows(tmp_path / "nowhere.jsonl", tokenizer, 100)


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\x85", "\x0b", "\f", "\x1c"])
@pytest.mark.parametrize(
    "start, end", [("", "\n"), ("\ufeff", "\n"), ("", "\r\n"), ("\ufeff", "\r\n")]
)
def test_a_line_of_json_ends_at_a_newline_as_for_datasets(tokenizer, tmp_path, inside, start, end):
    rows = [{"text": f"w{i} w2{inside}w3"} for i in range(3)]
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes((start + "".join(line + end for line in lines) + end).encode())
    theirs = [
        row["text"]
        for row in load_dataset("json", data_files=str(file), cache_dir=str(tmp_path))["train"]
    ]
    assert theirs == [row["text"] for row in rows]
    assert [text.text for text in read_texts(file)] == theirs
    wanted = [tokenizer(text).input_ids for text in theirs]
    assert read_prompts(file, tokenizer) == wanted
    assert [
        row["input_ids"][: len(ids)]
        for row, ids in zip(read_rows(file, tokenizer, 9), wanted, strict=True)
    ] == wanted
    file.write_bytes((start + lines[0] + end + end + "{" + end).encode())
    with pytest.raises(ConfigError, match="--data: line 3 of"):
        read_rows(file, tokenizer, 9)


def test_pretrained_heads_serve_fine_tuning(base, tokenizer, tmp_path):
    from transformers import Trainer

    folder = pretrain_heads(job(base, tokenizer, tmp_path / "stage1", caft={"head_norm": False}))
    trained = load_file(folder / "heads.safetensors")
    model = LlamaForCausalLM(base.config)
    trainer = with_caft(Trainer)(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]),
        caft={"heads": str(tmp_path / "stage1")},
    )
    assert trainer.caft_parts.caft_config.head_norm is False
    ours = dict(trainer.caft_parts.caft.heads.layers.named_parameters())
    assert ours.keys() == trained.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in trained.items())


# -- heads that go on over a tuned model -----------------------------------------------------------


def test_heads_go_on_from_a_folder(taught, tokenizer, tmp_path):
    """They start as they are in the folder, as many as there are, and learn; the model stays bit
    for bit."""
    data = counting()
    first = pretrain_heads(
        job(taught, tokenizer, tmp_path / "a", data=data, heldout=data[:7], caft={"num_heads": 3})
    )
    block = heads_block({"heads": str(first)})
    assert block.num_heads == 3
    before = {name: parameter.clone() for name, parameter in taught.named_parameters()}
    settings = {"max_new_tokens": 60, "steps": 8, "heldout": data[:7], "data": data}
    going_on = job(taught, tokenizer, tmp_path / "b", "model", caft=block.model_dump(), **settings)
    folder = pretrain_heads(going_on)
    earlier, metrics = (json.loads((made / "metrics.json").read_text()) for made in (first, folder))
    assert metrics["started_from"] == str(first) and "started_from" not in earlier
    assert "untrained" not in metrics or metrics["untrained"] == []
    for old, start, end in zip(earlier["heads"], metrics["before"], metrics["heads"], strict=True):
        assert end["loss"] < start["loss"] < 1.5 * old["loss"]  # other answers than the data's
    assert all(
        torch.equal(parameter, taught.get_parameter(name)) for name, parameter in before.items()
    )
    assert metrics["tokens_per_pass"] > 1
    assert f"started from the heads in: {first}" in (folder / "README.md").read_text()


def test_heads_before_are_those_of_the_folder(taught, tokenizer, tmp_path):
    data = counting()
    first = pretrain_heads(job(taught, tokenizer, tmp_path / "a", data=data, heldout=data[:7]))
    again = pretrain_heads(
        job(
            taught,
            tokenizer,
            tmp_path / "b",
            data=data,
            heldout=data[:7],
            caft={"heads": str(first)},
            steps=1,
        )
    )
    earlier, metrics = (json.loads((made / "metrics.json").read_text()) for made in (first, again))
    assert metrics["before"] == earlier["heads"]


def test_an_adapter_is_loaded_over_its_base(base, tokenizer, tmp_path):
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules="all-linear", init_lora_weights=False),
    ).eval()
    model.save_pretrained(tmp_path / "adapter")
    base.config.save_pretrained(tmp_path / "adapter")  # as Axolotl does
    loaded = load_model(str(tmp_path / "adapter"), torch.float32, for_heads=True).eval()
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    pretrain_heads(job(loaded, tokenizer, tmp_path / "out"))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ConfigError, match=r"adapter is an adapter, but its adapter_config.json names no base_model"
    ):
        load_model(str(tmp_path / "adapter"), torch.float32, for_heads=True)


def test_answers_of_a_model_that_was_trained_again_are_not_taken(taught, tokenizer, tmp_path):
    prompts, config = [[5, 6, 7]], PretrainConfig(max_new_tokens=60)
    write_answers(taught, tokenizer, prompts, config, tmp_path / "a.jsonl", "tiny")
    with torch.no_grad():
        taught.model.layers[1].mlp.up_proj.weight[0, 3] += 0.1
    with pytest.raises(ConfigError, match="holds answers made with another weights"):
        write_answers(taught, tokenizer, prompts, config, tmp_path / "a.jsonl", "tiny")


# -- what is printed and written at the end --------------------------------------------------------


def test_figures_before_and_after_are_printed_and_in_the_card(taught, tokenizer, tmp_path):
    """By the command, over a tuned model, first with new heads and then with theirs."""
    taught.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    lines = [
        {"prompt": f"w{i} w{i + 1}", "completion": " ".join(f"w{j}" for j in range(i + 2, i + 9))}
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def run(output, *more):
        command = ["pretrain-heads", "--model", tmp_path / "out", "--data", tmp_path / "rows.jsonl"]
        command += [
            "--output",
            tmp_path / output,
            "--targets",
            "dataset",
            "--float32",
            "--steps",
            "12",
            *more,
        ]
        result = CliRunner().invoke(
            commands, [*map(str, command), "--learning-rate", "0.01"], catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        folder = tmp_path / output / "caft_heads"
        return (
            result.output,
            json.loads((folder / "metrics.json").read_text()),
            (folder / "README.md").read_text(),
        )

    run("first")
    printed, metrics, card = run("second", "--heads", tmp_path / "first")
    # the words and the end of two rows that were held out
    assert metrics["positions"] == 2 * (7 + 1)
    for k, (before, after) in enumerate(zip(metrics["before"], metrics["heads"], strict=True), 1):
        cells = [
            f"{before['loss']:.4f}",
            f"{after['loss']:.4f}",
            f"{before['accuracy']:.2%}",
            f"{after['accuracy']:.2%}",
        ]
        assert re.search(rf"^ *{k} +{k + 1} ahead +{' +'.join(cells)}$", printed, re.MULTILINE)
        assert f"| {k} | {k + 1} ahead | {' | '.join(cells)} |" in card
    assert metrics["tokens_per_pass_before"] != metrics["tokens_per_pass"]
    said = (
        f"As drafters these heads give {metrics['tokens_per_pass']:.2f} tokens per step"
        f" ({metrics['tokens_per_pass_before']:.2f} before this training), estimated at"
        f" {metrics['positions']} held-out positions. Plain generation gives 1."
    )
    assert said in printed and said in card
    assert "Drafter.from_pretrained" in card and "caft speculate --model" in card


def test_without_held_out_rows_it_says_that_there_are_no_figures(base, tokenizer, tmp_path):
    folder = pretrain_heads(job(base, tokenizer, tmp_path, data=rows(1), steps=1))
    assert (
        before_and_after(folder)
        == "No figures before and after: no held-out row has a target of every head."
    )
    assert "## Figures" not in (folder / "README.md").read_text()
