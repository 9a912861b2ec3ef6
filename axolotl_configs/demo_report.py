"""Show what a finished run of one of these configs did: losses, and a few held-out answers.

    python demo_report.py --config axolotl_configs/quickstart-cpu.yml

Reads the newest checkpoint's trainer_state.json in the config's output_dir, and lets the base model and the
merged model (output_dir/merged) answer the same held-out questions: the merged model is an ordinary model of
transformers. Run it from the repository root, where the paths in the configs start.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
from pathlib import Path
from typing import Any

from caft_plugin.logs import HEAD_LOSS, CAFTLog

WIDTH = 100
NEW_TOKENS = 80
HELDOUT = Path(__file__).parent / "data" / "molecules-heldout.jsonl"


class ReportError(Exception):
    """Something that the report needs is missing; the message says what to do."""


def read_config(path: Path) -> dict[str, Any]:
    """The YAML, checked for the keys that the report uses."""
    try:
        import yaml
    except ImportError as error:
        raise ReportError(f"{error}: run this with the Python that axolotl is installed in") from error
    if not path.is_file():
        raise ReportError(f"--config {path}: no such file")
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    missing = [key for key in ("base_model", "output_dir") if key not in (config or {})]
    if missing:
        raise ReportError(f"--config {path}: the report needs the keys {', '.join(missing)}")
    return config


def read_log(output_dir: Path) -> tuple[Path, list[dict[str, Any]]]:
    """The newest checkpoint that has a trainer state, and everything that training logged up to it."""
    states = list(output_dir.glob("checkpoint-*/trainer_state.json"))
    if not states:
        raise ReportError(f"no checkpoint in {output_dir}: run `axolotl train` with this config first")
    newest = max(states, key=lambda state: state.stat().st_mtime)  # an earlier run may have left a higher number
    return newest.parent, json.loads(newest.read_text(encoding="utf-8"))["log_history"]


def loss_table(log: list[dict[str, Any]]) -> str:
    """First and last logged value of each loss."""
    training = [entry for entry in log if "loss" in entry]
    if not training:
        raise ReportError("the newest checkpoint has logged no loss: set logging_steps below max_steps")
    columns = (training[0], training[-1])

    lines = [
        " " * 24 + "".join(f"{'step ' + str(entry['step']):>14}" for entry in columns),
    ]
    rows = {"loss": [entry["loss"] for entry in columns]}
    read = [found for found in map(CAFTLog.read, columns) if found is not None]
    heads = sorted({k for found in read for k in found.head_losses})
    if heads:
        rows["caft/next_token_loss"] = [found.next_token_loss for found in read]
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


def read_questions(path: Path, count: int) -> list[tuple[str, str]]:
    """(question, reference answer) of the first held-out rows."""
    if not path.is_file():
        raise ReportError(f"--heldout {path}: no such file; `make_molecules.py` beside it makes one")
    questions = []
    for line in path.read_text(encoding="utf-8").splitlines()[:count]:
        question, answer = json.loads(line)["messages"]
        questions.append((question["content"], answer["content"]))
    return questions


def generate(model_path: str, questions: list[str], label: str, dtype: str) -> list[str]:
    """The model's greedy answer to each question, through its own chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"loading the {label} model {model_path}", file=sys.stderr, flush=True)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
        model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ReportError(f"the {label} model {model_path} does not load: {error}") from error
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    answers = []
    for number, question in enumerate(questions, start=1):
        print(f"  the {label} model answers {number} of {len(questions)}", file=sys.stderr, flush=True)
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        ).to(model.device)
        with torch.inference_mode():
            output = model.generate(
                **inputs, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        answers.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return answers


def answer_block(question: str, named_answers: dict[str, str]) -> str:
    """A question and under it one line for each answer, cut where it would run beyond the page."""
    lines = [textwrap.shorten(question, WIDTH)]
    for name, answer in named_answers.items():
        line = f"  {name:<11}" + (" ".join(answer.split()) or "(nothing)")
        lines.append(line if len(line) <= WIDTH else line[: WIDTH - 4] + " ...")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Losses and held-out answers of a finished run.")
    parser.add_argument("--config", type=Path, required=True, help="the YAML that was trained and merged")
    parser.add_argument("--base-model", help="the same option that axolotl was given, if it was")
    parser.add_argument("--output-dir", help="the same option that axolotl was given, if it was")
    parser.add_argument("--bf16", choices=("true", "false"), default="true", help="the same option, if axolotl had it")
    parser.add_argument("--molecules", type=int, default=5, help="questions to ask (default: %(default)s)")
    parser.add_argument("--heldout", type=Path, default=HELDOUT, help="chat rows to ask (default: %(default)s)")
    options = parser.parse_args(arguments)
    try:
        config = read_config(options.config)
        output_dir = Path(options.output_dir or config["output_dir"])
        checkpoint, log = read_log(output_dir)
        table = loss_table(log)
        merged = output_dir / "merged"
        if not (merged / "config.json").is_file():
            raise ReportError(f"no merged model in {merged}: run `axolotl merge-lora` with this config first")
        rows = read_questions(options.heldout, options.molecules)
        questions = [question for question, _ in rows]
        dtype = "bfloat16" if options.bf16 == "true" else "float32"
        base_answers = generate(options.base_model or config["base_model"], questions, "base", dtype)
        merged_answers = generate(str(merged), questions, "merged", dtype)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1

    print(f"\nLosses, from {checkpoint}\n")
    print(table)
    print(f"\n{len(rows)} held-out molecules, greedy decoding\n")
    for (question, reference), base, tuned in zip(rows, base_answers, merged_answers, strict=True):
        print(answer_block(question, {"reference": reference, "base": base, "merged": tuned}) + "\n")
    print(f"The merged model is an ordinary transformers folder: {merged}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
