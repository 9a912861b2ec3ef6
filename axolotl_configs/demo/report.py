"""Show the result of a finished run: its losses, its answers to held-out questions, and the speed
with its heads.

    python report.py --config CONFIG.yml [--plain PLAIN_RUN] [--heads HEADS]

Reads the newest checkpoint's trainer_state.json in the config's output_dir. The base model, the
plain fine-tuned model (an adapter's folder, with `--plain`) and the merged model
(output_dir/merged) answer the same questions; the merged model is an ordinary transformers model.
It writes its answers again with its heads' draft tokens, and with those of heads that were trained
further (`--heads`). Run it from the repository root, where the paths in the configs start.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caft_plugin.logs import HEAD_LOSS, CAFTLog

WIDTH = 100
NEW_TOKENS = 48
HELDOUT = Path(__file__).parent / "docstrings-heldout.jsonl"


class ReportError(Exception):
    """Something that the report needs is missing; the message says what to do."""


def read_config(path: Path) -> dict[str, Any]:
    """Return the YAML, checked for the keys that the report uses."""
    try:
        import yaml
    except ImportError as error:
        raise ReportError(
            f"{error}: run this with the Python that axolotl is installed in"
        ) from error
    if not path.is_file():
        raise ReportError(f"--config {path}: no such file")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    missing = [key for key in ("base_model", "output_dir") if key not in (config or {})]
    if missing:
        raise ReportError(f"--config {path}: the report needs the keys {', '.join(missing)}")
    return config


def read_log(output_dir: Path) -> tuple[Path, list[dict[str, Any]]]:
    """Return the newest checkpoint that has a trainer state, and everything that training logged up
    to it."""
    states = list(output_dir.glob("checkpoint-*/trainer_state.json"))
    if not states:
        raise ReportError(
            f"no checkpoint in {output_dir}: run `axolotl train` with this config first"
        )
    # an earlier run may have left a higher number
    newest = max(states, key=lambda state: state.stat().st_mtime)
    return newest.parent, json.loads(newest.read_text(encoding="utf-8"))["log_history"]


def loss_table(log: list[dict[str, Any]], plain_log: list[dict[str, Any]] | None = None) -> str:
    """Return the first and last logged value of each loss, and of the plain run's loss."""
    columns = ends(log)
    lines = [
        " " * 24 + "".join(f"{'step ' + str(entry['step']):>14}" for entry in columns),
    ]
    rows = {"loss": [entry["loss"] for entry in columns]}
    read = [found for found in map(CAFTLog.read, columns) if found is not None]
    heads = sorted({k for found in read for k in found.head_losses})
    if heads:
        rows["caft/next_token_loss"] = [found.next_token_loss for found in read]
    if plain_log is not None:
        rows["loss of the plain run"] = [entry["loss"] for entry in ends(plain_log)]
    for k in heads:
        rows[f"{HEAD_LOSS}{k}"] = [found.head_losses.get(k) for found in read]
    for name, values in rows.items():
        cells = ["-" if value is None else f"{float(value):.4f}" for value in values]
        lines.append(f"  {name:<22}" + "".join(f"{cell:>14}" for cell in cells))
    if heads:
        lines.append("  Head k predicts the token k+1 ahead.")
    else:
        lines.append(f"  No {HEAD_LOSS}k was logged: this run trained without the caft: block.")
    return "\n".join(lines)


def ends(log: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the first and the last entry that training logged."""
    training = [entry for entry in log if "loss" in entry]
    if not training:
        raise ReportError(
            "the newest checkpoint has logged no loss: set logging_steps below max_steps"
        )
    return training[0], training[-1]


def read_questions(path: Path, count: int) -> list[tuple[str, str]]:
    """Return (question, reference answer) of the first held-out rows."""
    if not path.is_file():
        raise ReportError(f"--heldout {path}: no such file; `make_docstrings.py` makes one")
    questions = []
    # not str.splitlines, which also cuts a row at U+2028 and its like inside of a text
    for line in path.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")[:count]:
        question, answer = json.loads(line)["messages"]
        questions.append((question["content"], answer["content"]))
    return questions


@dataclasses.dataclass
class Answer:
    """A greedy answer: its text, its tokens, and the forward passes and seconds it took."""

    text: str
    tokens: list[int]
    passes: int  # without draft tokens: one for each token
    seconds: float


@dataclasses.dataclass
class Answers:
    """A model's answers to the questions, and the same with each heads' draft tokens, or why there
    are none."""

    plain: list[Answer]
    drafted: list[list[Answer]] = dataclasses.field(default_factory=list)
    why_not_drafted: str = ""


def ask(
    model_path: str,
    questions: list[str],
    label: str,
    adapter: Path | None = None,
    heads: Sequence[Path] = (),
) -> Answers:
    """Return a model's greedy answers, in float32 and through its own chat template.

    Args:
        model_path: folder or Hub id of the model.
        questions: what the user says, one chat each.
        label: the model's name on the screen.
        adapter: folder of a PEFT adapter to merge into the model.
        heads: folders of heads; each answer is written again with the draft tokens of each.

    Raises:
        ReportError: if the model or the adapter does not load.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from caft_plugin import ConfigError, Drafter

    print(f"loading the {label} model {adapter or model_path}", file=sys.stderr, flush=True)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        if adapter is not None:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    except (OSError, ValueError) as error:
        raise ReportError(
            f"the {label} model {adapter or model_path} does not load: {error}"
        ) from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def answer(question: str, drafter: Drafter | None = None, longest: int = NEW_TOKENS) -> Answer:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        settings = {
            "max_new_tokens": longest,
            "do_sample": False,
            "pad_token_id": tokenizer.eos_token_id,
        }
        began = time.perf_counter()
        output = model.generate(**inputs, **settings, custom_generate=drafter)
        seconds = time.perf_counter() - began
        tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
        passes = drafter.last.passes if drafter else len(tokens)
        return Answer(tokenizer.decode(tokens, skip_special_tokens=True), tokens, passes, seconds)

    drafters: list[Drafter] = []
    answers = Answers([], [[] for _ in heads])
    try:
        for folder in heads:
            if not folder.is_dir():
                raise ConfigError(
                    f"no heads in {folder}; a run with the caft: block saves them there."
                )
            drafters.append(Drafter.from_pretrained(model, folder))
        for warm_up in (None, *drafters):
            answer(questions[0], warm_up, longest=8)
    except ConfigError as error:
        drafters, answers = [], Answers([], why_not_drafted=str(error))
    for number, question in enumerate(questions, start=1):
        print(
            f"  the {label} model answers {number} of {len(questions)}", file=sys.stderr, flush=True
        )
        answers.plain.append(answer(question))
        for drafter, drafted in zip(drafters, answers.drafted, strict=True):
            drafted.append(answer(question, drafter))
    return answers


def answer_block(question: str, named_answers: dict[str, str]) -> str:
    """Return a question and under it the answers, each cut at the page's width."""
    lines = question.replace("```python\n", "").replace("```", "").rstrip().splitlines()
    for name, answer in named_answers.items():
        line = f"  {name:<11}" + (" ".join(answer.split()) or "(nothing)")
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 4] + " ...")
    return "\n".join(lines)


def total(answers: list[Answer]) -> Answer:
    return Answer(
        "\n".join(one.text for one in answers),
        [token for one in answers for token in one.tokens],
        sum(one.passes for one in answers),
        sum(one.seconds for one in answers),
    )


def draft_table(answers: Answers) -> str:
    """Return the cost of the answers without and with the last heads: forward passes, tokens per
    step, seconds. Heads before these, from which they were trained further, have one line."""
    if not answers.drafted:
        return f"The heads draft nothing here: {answers.why_not_drafted}"
    *before, shown = answers.drafted
    pairs = list(zip(answers.plain, shown, strict=True))
    same = [plain.tokens == drafted.tokens for plain, drafted in pairs]
    rows = [
        (str(number), "same" if alike else "differs", *pair)
        for number, (alike, pair) in enumerate(zip(same, pairs, strict=True), start=1)
    ]
    plain, drafted = total(answers.plain), total(shown)
    rows.append(("all", f"{sum(same)} of {len(same)}", plain, drafted))
    lines = [
        f"{'':>20}{'forward passes':>20}{'tokens per step':>18}{'seconds':>20}",
        f"{'function':>10}{'text':>10}{'no heads':>10}{'heads':>10}{'heads':>18}"
        f"{'no heads':>10}{'heads':>10}",
    ]
    for name, text, one, other in rows:
        lines.append(
            f"{name:>10}{text:>10}{one.passes:>10}{other.passes:>10}"
            f"{len(other.tokens) / other.passes:>18.2f}"
            f"{one.seconds:>10.2f}{other.seconds:>10.2f}"
        )
    lines.append(
        f"\nSame text in {sum(same)} of {len(same)}; {drafted.passes} forward passes instead of"
        f" {plain.passes}, {plain.seconds / drafted.seconds:.2f} x the speed."
    )
    for cost in map(total, before):
        lines.append(
            f"Heads before the further training: {len(cost.tokens) / cost.passes:.2f} tokens per"
            f" step, {plain.seconds / cost.seconds:.2f} x the speed."
        )
    if not before:
        lines.append(
            "Heads of so short a run are weak drafters. README.md, 'Make the model write faster',"
            " trains them further."
        )
    if not all(same):
        lines.append(
            "A forward pass over several tokens rounds differently from one over a single token."
            " Where two tokens are\nalmost equally likely, the other one can be chosen: in bfloat16"
            " now and then, in float32 very rarely."
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Show losses, held-out answers and speed of a finished run."
    )
    parser.add_argument(
        "--config", type=Path, required=True, help="the YAML that was trained and merged"
    )
    parser.add_argument("--base-model", help="the same option that axolotl was given, if it was")
    parser.add_argument("--output-dir", help="the same option that axolotl was given, if it was")
    parser.add_argument("--plain", type=Path, help="output folder of the same run without caft:")
    parser.add_argument(
        "--heads", type=Path, help="output folder of `caft pretrain-heads` for the merged model"
    )
    parser.add_argument(
        "--functions", type=int, default=5, help="questions to ask (default: %(default)s)"
    )
    parser.add_argument(
        "--heldout", type=Path, default=HELDOUT, help="chat rows to ask (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config)
        output_dir = Path(options.output_dir or config["output_dir"])
        checkpoint, log = read_log(output_dir)
        table = loss_table(log, read_log(options.plain)[1] if options.plain else None)
        merged = output_dir / "merged"
        if not (merged / "config.json").is_file():
            raise ReportError(
                f"no merged model in {merged}: run `axolotl merge-lora` with this config first"
            )
        if options.heads and not options.heads.is_dir():
            raise ReportError(
                f"--heads {options.heads}: no such folder; `caft pretrain-heads` makes it"
            )
        rows = read_questions(options.heldout, options.functions)
        questions = [question for question, _ in rows]
        base_model = options.base_model or config["base_model"]
        texts = {"base": ask(base_model, questions, "base").plain}
        if options.plain:
            texts["plain"] = ask(base_model, questions, "plain", adapter=options.plain).plain
        heads = [output_dir / "caft_heads", *([options.heads] if options.heads else [])]
        tuned = ask(str(merged), questions, "CAFT", heads=heads)
        texts["CAFT"] = tuned.plain
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"\nLosses, from {checkpoint}\n")
    print(table)
    print(f"\n{len(rows)} held-out functions, greedy decoding in float32")
    print(
        "base: before fine-tuning; plain: fine-tuned without caft:; CAFT: the merged model\n"
        if options.plain
        else "base: before fine-tuning; CAFT: the merged model\n"
    )
    for number, (question, reference) in enumerate(rows):
        written = {name: answers[number].text for name, answers in texts.items()}
        print(answer_block(question, {"reference": reference, **written}) + "\n")
    print(
        "The merged model's answers in float32, without heads and with the heads' draft tokens,"
        " which it verifies"
    )
    print(
        "heads: "
        + (
            f"trained further, {options.heads}\n"
            if options.heads
            else f"as fine-tuned, {heads[0]}\n"
        )
    )
    print(draft_table(tuned))
    print(f"\nThe merged model is an ordinary transformers folder: {merged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
