"""The commands `caft ...` and `axolotl caft ...`. Each command imports its modules when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import click
from pydantic import BaseModel

from caft_plugin.config import CAFTConfig, HeadInput, PretrainConfig, Targets
from caft_plugin.errors import (
    CAFTError,
    ConfigError,
    given_as_options,
    heads_named,
    on_command_line,
)

if TYPE_CHECKING:
    from caft_plugin.axolotl.finished_run import FinishedRun
    from caft_plugin.stage1.pretraining import Stage1
    from caft_plugin.tools.speculate import Comparison


class CAFTCommands(click.Group):
    """A group of commands that may raise CAFTError: it prints the message without a traceback;
    exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            with on_command_line():
                return super().invoke(ctx)
        except CAFTError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=CAFTCommands)
def commands() -> None:
    """Work with the auxiliary heads of concept-aware fine-tuning (CAFT), and inspect models trained
    with MEAP."""


model_option = click.option(
    "--model", help="Folder or Hub id of the fine-tuned model, or of its adapter."
)
heads_option = click.option(
    "--heads", help="The model's heads: a heads folder, a run's folder or a Hub id."
)
load_in_4bit_option = click.option(
    "--load-in-4bit",
    "load_in_4bit",
    is_flag=True,
    help="Load the model in 4 bits (bitsandbytes NF4).",
)
# One rule for all commands that compute with a model: precision.asked_dtype.
float32_option = click.option(
    "--float32",
    is_flag=True,
    help="Compute in float32. Default: bfloat16 where this machine is fast at it, else float32.",
)
png_option = click.option(
    "--png", type=click.Path(path_type=Path), help="Also draw the figures into this file."
)


@commands.command("import-heads", short_help="Convert the authors' heads.pth into a heads folder.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--base-model",
    required=True,
    help="Folder or Hub id of the model that the heads were trained with.",
)
@click.option(
    "--head-input",
    type=click.Choice(get_args(HeadInput)),
    default="final",
    show_default=True,
    help="The heads' input: the last layer's input, or the normalised final hidden state.",
)
@click.option(
    "--head-norm/--no-head-norm",
    default=False,
    show_default=True,
    help="Apply the base model's final norm to the heads' output.",
)
def import_heads_command(
    file: Path,
    out: Path,
    base_model: str,
    head_input: HeadInput,
    head_norm: bool,
) -> None:
    """Convert the CAFT authors' heads FILE (heads.pth) into the heads folder OUT.

    Only the base model's config is read. The defaults of --head-input and --head-norm are those of
    the authors' fine-tuning.
    """
    from caft_plugin.tools.import_heads import import_heads
    from caft_plugin.tools.inspect_heads import describe

    import_heads(file, base_model, out, head_input=head_input, head_norm=head_norm)
    click.echo(describe(out))


@commands.command("keep-mtp", short_help="Put a base model's own MTP layers into a saved model.")
@click.option(
    "--base", required=True, help="Folder or Hub id of the base model, with its MTP layers."
)
@click.option(
    "--model",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder of the model that was fine-tuned from it, merged if by an adapter.",
)
def keep_mtp_command(base: str, model: Path) -> None:
    """Put the MTP layers of a base model into a model that was fine-tuned from it by any trainer.

    transformers does not save MTP layers (multi-token prediction), with which vLLM, SGLang and
    llama.cpp draft. If the model has them, nothing is changed.
    """
    from caft_plugin.mtp.keep import Base, keep_mtp

    click.echo(keep_mtp(Base.open(base, "--base"), model, "--model"))


def setting(
    model: type[BaseModel],
    key: str,
    **more: Any,
) -> Any:
    """Return an option for a key of a config class, with the key's description and default."""
    field = model.model_fields[key]
    default = "" if field.default is None else f" [default: {field.default}]"
    text = f"{field.description}{default}".replace("`", "")
    return click.option(f"--{key.replace('_', '-')}", key, help=text[0].upper() + text[1:], **more)


@commands.command("pretrain-heads", short_help="Train heads on a frozen model (stage 1).")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--model", help="Folder or Hub id of the frozen model: a base model or a fine-tuned one."
)
@click.option(
    "--heads",
    help="Start from these heads: a heads folder, a run's folder or a Hub id. Default: new heads.",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="JSONL with messages, prompt and completion, or text.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Folder for answers, checkpoints and heads."
)
@setting(PretrainConfig, "targets", type=click.Choice(get_args(Targets)))
@setting(PretrainConfig, "max_new_tokens", type=int)
@setting(PretrainConfig, "temperature", type=float)
@setting(PretrainConfig, "top_p", type=float)
@setting(PretrainConfig, "generation_batch_size", type=int)
@setting(PretrainConfig, "seed", type=int)
@setting(CAFTConfig, "num_heads", type=int)
@setting(CAFTConfig, "head_input", type=click.Choice(get_args(HeadInput)))
@setting(CAFTConfig, "head_norm", type=bool)
@click.option(
    "--steps", type=int, default=-1, help="Optimiser steps. Default: as many as --epochs needs."
)
@click.option(
    "--epochs",
    type=float,
    default=1.0,
    show_default=True,
    help="Epochs over the data.",
)
@click.option(
    "--batch-size",
    type=int,
    default=8,
    show_default=True,
    help="Rows per step.",
)
@click.option(
    "--learning-rate",
    type=float,
    default=1e-4,
    show_default=True,
    help="Learning rate; the default is the paper's.",
)
@click.option(
    "--max-length",
    type=int,
    default=1024,
    show_default=True,
    help="Maximum tokens per row; longer rows are cut.",
)
@click.option(
    "--save-steps",
    type=int,
    default=200,
    show_default=True,
    help="Steps between checkpoints.",
)
@load_in_4bit_option
@float32_option
@click.option(
    "--push-to-hub",
    metavar="REPO",
    help="Upload the heads folder to this Hub repository at the end.",
)
@click.pass_context
def pretrain_heads_command(
    context: click.Context,
    config: Path | None,
    push_to_hub: str | None,
    **options: Any,
) -> None:
    """Train heads on a frozen model: on a base model, once for all later fine-tuning (stage 1), or
    on a fine-tuned model, starting from its --heads, so that they draft better.

    With an Axolotl YAML as CONFIG, the model, tokenizer, chat template, data sets, quantisation and
    trainer settings come from the YAML. --model, --heads, --output and the options of the `caft:`
    and `pretrain_heads:` blocks take precedence over it; other options are refused. Without a
    CONFIG, --model, --data and --output are required. After an interruption, the same command
    resumes.
    """
    given = {key: value for key, value in options.items() if value is not None}
    settings = {key: given[key] for key in PretrainConfig.model_fields if key in given}
    caft = {key: given[key] for key in CAFTConfig.model_fields if key in given}
    # without a YAML, which has keys
    options_only = {*PretrainConfig.model_fields, *CAFTConfig.model_fields}
    context.with_resource(given_as_options(options_only if config is None else {*settings, *caft}))
    if config is None:
        refuse_missing(**{name: given.get(name) for name in ("model", "data", "output")})
        stage1 = plain_stage1(given, caft, PretrainConfig(**settings))
    else:
        refuse_no_file(config, "pretrain-heads")
        refuse_with_config(context, {*settings, *caft, "model", "output", "config", "push_to_hub"})
        from caft_plugin.axolotl.stage1 import read_stage1

        keys = {"output_dir": str(given["output"])} if "output" in given else {}
        stage1 = read_stage1(config, settings, caft, given.get("model"), **keys)

    from caft_plugin.stage1.figures import before_and_after
    from caft_plugin.stage1.pretraining import pretrain_heads
    from caft_plugin.tools.inspect_heads import describe

    folder = pretrain_heads(stage1)
    click.echo(f"{describe(folder)}\n\n{before_and_after(folder)}")
    if push_to_hub:
        push_heads(folder, push_to_hub)


def refuse_missing(**options: object) -> None:
    """Raise UsageError if an option that a CONFIG would replace was not given."""
    for name, value in options.items():
        if value is None:
            raise click.UsageError(f"--{name} is required if no CONFIG is given")


def model_and_heads(
    config: Path | None,
    command: str,
    model: str | None,
    heads: str | None,
) -> tuple[str, str, FinishedRun | None]:
    """Return the model, its heads and the run that left them: those of the YAML's run, unless the
    options name others. Without a YAML there is no run, and both options are required.

    Raises:
        ConfigError: the YAML cannot be read.
        UsageError: an option is missing.
    """
    run = None
    if config is not None:
        refuse_no_file(config, command)
        from caft_plugin.axolotl.finished_run import FinishedRun

        run = FinishedRun.of(config, command)
        model = model or run.model
        heads = heads or run.heads
    refuse_missing(model=model, heads=heads)
    return cast(str, model), cast(str, heads), run


def refuse_no_file(config: Path, command: str) -> None:
    if not config.is_file():
        raise ConfigError(f"{command}: {config} is not a file. CONFIG must be an Axolotl YAML.")


def refuse_with_config(context: click.Context, accepted: set[str]) -> None:
    """Raise UsageError if an option was given for which an Axolotl YAML has a key."""
    for name in context.params.keys() - accepted:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(
                f"{option} cannot be used with a CONFIG, which has a key for it. Set it there."
            )


def push_heads(
    folder: Path,
    repo: str,
    token: str | None = None,
) -> None:
    """Upload a heads folder to a Hub repository. A repository that does not exist is created."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id=repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="CAFT heads")
    click.echo(f"Uploaded to {repo}")


def plain_stage1(
    given: dict[str, Any],
    caft: dict[str, Any],
    config: PretrainConfig,
) -> Stage1:
    """Return stage 1 as the command line's options describe it, without a YAML."""
    if not given["data"].is_file():
        raise ConfigError(f"--data: {given['data']} is not a file. Give a JSONL file.")

    import torch
    from transformers import TrainingArguments

    from caft_plugin.model.loading import load_model, load_tokenizer
    from caft_plugin.precision import asked_dtype
    from caft_plugin.stage1.data import read_rows
    from caft_plugin.stage1.pretraining import Stage1, heads_block

    caft_config = heads_block(caft)
    dtype = asked_dtype(given["float32"])
    tokenizer = load_tokenizer(given["model"])
    rows = read_rows(given["data"], tokenizer, given["max_length"])
    arguments = TrainingArguments(
        output_dir=str(given["output"]),
        max_steps=given["steps"],
        num_train_epochs=given["epochs"],
        per_device_train_batch_size=given["batch_size"],
        learning_rate=given["learning_rate"],
        save_steps=given["save_steps"],
        save_total_limit=2,  # the newest can be incomplete after a crash
        logging_steps=10,
        bf16=dtype == torch.bfloat16,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        seed=config.seed,
    )
    model = load_model(given["model"], dtype, for_heads=True, load_in_4bit=given["load_in_4bit"])
    return Stage1(model, tokenizer, rows, None, arguments, caft_config, config, given["model"])


@commands.command(
    "speculate", short_help="Measure how much faster a model generates with its heads."
)
@click.argument("config", required=False, type=click.Path(path_type=Path))
@model_option
@heads_option
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="JSONL with messages, prompt or text on each line.",
)
@click.option(
    "--limit",
    type=click.IntRange(1),
    default=50,
    show_default=True,
    help="Number of prompts to use.",
)
@click.option(
    "--runs",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Repetitions of all prompts.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    help="Maximum length of a text, in tokens.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Sampling temperature; 0: greedy decoding.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Nucleus sampling.",
)
@click.option("--seed", default=0, show_default=True, help="Sampling seed.")
@click.option(
    "--num-draft", type=int, help="Draft tokens per step. Default: chosen during generation."
)
@load_in_4bit_option
@float32_option
@png_option
def speculate_command(
    config: Path | None,
    model: str | None,
    heads: str | None,
    prompts: Path | None,
    limit: int,
    num_draft: int | None,
    load_in_4bit: bool,
    float32: bool,
    png: Path | None,
    **settings: Any,
) -> None:
    """Measure how much faster a fine-tuned model generates with its heads: tokens per second and
    tokens per step, compared with plain generation and with transformers' prompt lookup on the same
    prompts.

    With an Axolotl YAML as CONFIG, the model and heads in its output_dir are used (the merged model
    if it is newer than the adapter) with the prompts of its test_datasets, loaded as in the YAML;
    --model, --heads and --prompts take precedence. Without a CONFIG, all three are required.
    """
    model, heads, run = model_and_heads(config, "speculate", model, heads)
    refuse_missing(prompts=prompts or config)

    from caft_plugin.drafting.decoding import Drafter
    from caft_plugin.model.loading import load_model, load_tokenizer
    from caft_plugin.precision import asked_dtype
    from caft_plugin.stage1.data import read_prompts
    from caft_plugin.tools.speculate import HEADS, as_table, draw, speculate

    dtype = asked_dtype(float32)
    trusts = run is not None and run.trusts_code
    tokenizer = load_tokenizer(model, trusts)
    if run is not None and prompts is None:
        asked = run.prompts()
    else:
        asked = read_prompts(cast(Path, prompts), tokenizer)
    if run is not None and not load_in_4bit:
        loaded = run.load(tokenizer, model, dtype)
    else:
        loaded = load_model(
            model, dtype, for_heads=True, trust_remote_code=trusts, load_in_4bit=load_in_4bit
        )
    with heads_named("--heads"):
        drafter = Drafter.from_pretrained(loaded, heads, num_draft=num_draft)
    comparison = speculate(loaded, tokenizer, {HEADS: drafter}, asked[:limit], **settings)
    click.echo(as_table(comparison))
    click.echo(
        keep_steps(comparison, model, heads, min(limit, len(asked)), settings["temperature"])
    )
    if png is not None:
        draw(comparison, png)


def keep_steps(
    found: Comparison,
    model: str,
    heads: str,
    prompts: int,
    temperature: float,
) -> str:
    """Save the tokens per step next to the heads, for `caft export-drafter`.

    Args:
        found: the results.
        model: the model's name.
        heads: the heads, as given.
        prompts: number of prompts.
        temperature: sampling temperature.

    Returns:
        The line to print.
    """
    from caft_plugin.caft.heads_record import locate_heads
    from caft_plugin.serving.recommendation import keep
    from caft_plugin.tools.speculate import HEADS

    # The Hub's cache is no place for results: the next revision has another folder.
    if not Path(heads).is_dir():
        return (
            "\nNot saved for `caft export-drafter`, since these heads are on the Hub: download them"
            " into a folder."
        )
    steps = found.ways[HEADS].steps
    assert steps is not None
    try:
        file = keep(locate_heads(heads), model, prompts, temperature, steps.tokens_per_step())
    except OSError as error:
        return f"\nNot saved for `caft export-drafter`: {error}"
    return f"\nSaved the tokens per step in {file}, for `caft export-drafter`."


@commands.command("export-drafter", short_help="Write the heads as a drafter for vLLM or SGLang.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Folder or Hub id of the served model, or of its adapter.")
@heads_option
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Folder to write; new or empty.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["vllm", "eagle3"]),
    default="vllm",
    show_default=True,
    help=(
        "vllm: all heads, for vLLM with caft_plugin. eagle3: head 1, for any engine that supports"
        " EAGLE-3."
    ),
)
@click.option(
    "--num-heads", type=int, help="Number of heads to write, from head 1 on. Default: all."
)
def export_drafter_command(
    config: Path | None,
    model: str | None,
    heads: str | None,
    output: Path,
    form: Literal["vllm", "eagle3"],
    num_heads: int | None,
) -> None:
    """Write a model's heads as a drafter's folder, and print the command that serves it.

    With an Axolotl YAML as CONFIG, the model and heads in its output_dir are used; --model and
    --heads take precedence. Without a CONFIG, both are required. Only files are read; no model is
    loaded.
    """
    model, heads, _ = model_and_heads(config, "export-drafter", model, heads)

    from caft_plugin.serving.export import export_drafter

    with heads_named("--heads"):
        guide = export_drafter(model, heads, output, form, num_heads)
    click.echo(guide, nl=False)


@commands.command(
    "attention-report", short_help="Compare attention before and after masked training (MEAP)."
)
@click.option("--base", required=True, help="Folder or Hub id of the model before training.")
@click.option(
    "--tuned", required=True, help="Folder or Hub id of the trained model, or of its adapter."
)
@click.option(
    "--text",
    "file",
    required=True,
    type=click.Path(path_type=Path),
    help="JSONL with text, or with context, answer and query; or .txt.",
)
@png_option
@click.option(
    "--mask-ratio",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Fraction of the tokens to mask. Default: 0.15.",
)
@click.option(
    "--mask-token", default="auto", show_default=True, help="As mask_token of masked training."
)
@click.option(
    "--max-length",
    type=click.IntRange(3),
    default=512,
    show_default=True,
    help="Maximum tokens per text; longer texts are cut.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the masked positions.")
@float32_option
def attention_report_command(
    base: str,
    tuned: str,
    file: Path,
    png: Path | None,
    mask_ratio: float | None,
    mask_token: str,
    max_length: int,
    seed: int,
    float32: bool,
) -> None:
    """Compare the attention of two models on unmasked and masked text: on the masked positions, its
    variance on the other positions (arXiv 2502.07490, section 5), and the last token's attention by
    segment."""
    from caft_plugin.precision import asked_dtype
    from caft_plugin.tools.attention_report import as_table, attention_report, draw, read_texts

    figures = attention_report(
        base,
        tuned,
        read_texts(file),
        mask_ratio=mask_ratio,
        mask_token=mask_token,
        max_length=max_length,
        seed=seed,
        dtype=asked_dtype(float32),
    )
    click.echo(as_table(figures))
    if png is not None:
        draw(figures, png)


@commands.command("plan", short_help="Estimate the memory and time that heads add to a run.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--gpu-memory", metavar="SIZE", help="Memory of one GPU, e.g. 24GB: does the run fit?"
)
@click.option(
    "--gpus",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="GPUs over which FSDP shards.",
)
@click.option(
    "--supervised",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    show_default=True,
    help="Fraction of the tokens with a label.",
)
def plan_command(
    config: Path,
    gpu_memory: str | None,
    gpus: int,
    supervised: float,
) -> None:
    """Estimate what auxiliary heads add to the run of CONFIG, an Axolotl YAML: parameters, memory
    and time.

    Only the base model's config is read; no weights, no data and no GPU are needed.
    """
    from caft_plugin.quiet import quiet

    with quiet():  # packages warn of this machine as they are imported; the run is elsewhere
        from caft_plugin.axolotl.config_reading import read_for_plan
        from caft_plugin.axolotl.run import read_run
        from caft_plugin.plan.estimate import make_plan
        from caft_plugin.plan.words import as_text, parse_memory, run_as_text, verdict

    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    plan = make_plan(read_run(read_for_plan(config, "plan")), gpus, supervised)
    click.echo(as_text(plan))
    if memory is not None:
        click.echo(f"\n{run_as_text(plan)}\n\n{verdict(plan, memory, gpus, supervised)}")


@commands.command("inspect", short_help="Describe a heads folder.")
@click.argument("folder")
def inspect_command(folder: str) -> None:
    """Describe the heads in FOLDER, which is a heads folder, a run's folder or a Hub id: their
    sizes, wiring, and the losses that training logged."""
    from caft_plugin.tools.inspect_heads import describe

    with heads_named("FOLDER"):
        click.echo(describe(folder))


if __name__ == "__main__":
    commands(prog_name="caft")
