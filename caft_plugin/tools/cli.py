"""`caft ...`, and the same as `axolotl caft ...`. Each command imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import click
from pydantic import BaseModel

from caft_plugin.config import CAFTConfig, ConfigError, HeadInput, PretrainConfig, Targets, heads_named

if TYPE_CHECKING:
    from caft_plugin.stage1.pretraining import Stage1
    from caft_plugin.tools.speculate import Comparison


class CAFTCommands(click.Group):
    """A group whose commands may raise ConfigError: the user sees its message, not a traceback; exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=CAFTCommands)
def commands() -> None:
    """Auxiliary heads of concept-aware fine-tuning (CAFT): make, import and look at them. What MEAP did to a model."""


@commands.command("import-heads", short_help="Turn the authors' heads.pth into a heads folder.")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--base-model", required=True, help="Folder or Hub id of the model the heads were trained on.")
@click.option(
    "--head-input",
    type=click.Choice(get_args(HeadInput)),
    default="final",
    show_default=True,
    help="What the heads read.",
)
@click.option(
    "--head-norm/--no-head-norm",
    default=False,
    show_default=True,
    help="Apply the base model's final norm to a head's output.",
)
def import_heads_command(file: Path, out: Path, base_model: str, head_input: HeadInput, head_norm: bool) -> None:
    """Turn the CAFT authors' heads FILE (heads.pth) into the heads folder OUT.

    Of the base model only the config is read. The wiring recorded by default is the one the authors fine-tune
    with.
    """
    from caft_plugin.tools.import_heads import import_heads
    from caft_plugin.tools.inspect_heads import describe

    import_heads(file, base_model, out, head_input=head_input, head_norm=head_norm)
    click.echo(describe(out))


def setting(model: type[BaseModel], key: str, **more: Any) -> Any:
    """An option for a key of a config class, described as the class describes it; left out, the default stays."""
    field = model.model_fields[key]
    text = f"{field.description} [default: {field.default}]".replace("`", "")
    return click.option(f"--{key.replace('_', '-')}", key, help=text[0].upper() + text[1:], **more)


@commands.command("pretrain-heads", short_help="Train heads on a frozen base model (stage 1).")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Folder or Hub id of the model that stays as it is: a base model, or a fine-tuned one.")
@click.option("--heads", help="Go on from these heads: a heads folder, a run's folder or a Hub id. Left out: new ones.")
@click.option("--data", type=click.Path(path_type=Path), help="JSONL: messages, prompt and completion, or text.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder for answers, checkpoints and heads.")
@setting(PretrainConfig, "targets", type=click.Choice(get_args(Targets)))
@setting(PretrainConfig, "max_new_tokens", type=int)
@setting(PretrainConfig, "temperature", type=float)
@setting(PretrainConfig, "top_p", type=float)
@setting(PretrainConfig, "generation_batch_size", type=int)
@setting(PretrainConfig, "seed", type=int)
@setting(PretrainConfig, "vllm", type=bool)
@setting(CAFTConfig, "num_heads", type=int)
@setting(CAFTConfig, "head_input", type=click.Choice(get_args(HeadInput)))
@setting(CAFTConfig, "head_norm", type=bool)
@click.option("--steps", type=int, default=-1, help="Optimiser steps; left out, --epochs says how long.")
@click.option("--epochs", type=float, default=1.0, show_default=True, help="Passes over the data.")
@click.option("--batch-size", type=int, default=8, show_default=True, help="Rows in a step.")
@click.option("--learning-rate", type=float, default=1e-4, show_default=True, help="The paper's.")
@click.option("--max-length", type=int, default=1024, show_default=True, help="Longer rows are cut, in tokens.")
@click.option("--save-steps", type=int, default=200, show_default=True, help="Steps between checkpoints.")
@click.option("--load-in-4bit", "load_in_4bit", is_flag=True, help="Keep the base in 4 bits (bitsandbytes NF4).")
@click.option("--float32", is_flag=True, help="Compute in float32 instead of bfloat16.")
@click.option("--push-to-hub", metavar="REPO", help="Upload the heads folder to this Hub repository at the end.")
@click.pass_context
def pretrain_heads_command(
    context: click.Context, config: Path | None, push_to_hub: str | None, **options: Any
) -> None:
    """Train heads on a frozen model: once on a base model, for every later fine-tuning (stage 1), or on a fine-tuned
    one, going on from its --heads, so that they draft better.

    With an Axolotl YAML as CONFIG, the model, tokenizer, chat template, data sets, quantisation and trainer settings
    come from it; --model, --heads, --output and the options of its `caft:` and `pretrain_heads:` blocks go before it,
    others are refused. Without one, --model, --data and --output are needed. Started again after an interruption, it
    goes on where it stopped.
    """
    given = {key: value for key, value in options.items() if value is not None}
    settings = {key: given[key] for key in PretrainConfig.model_fields if key in given}
    caft = {key: given[key] for key in CAFTConfig.model_fields if key in given}
    if config is None:
        for name in ("model", "data", "output"):
            if name not in given:
                raise click.UsageError(f"--{name} is needed where no CONFIG is given")
        stage1 = plain_stage1(given, caft, PretrainConfig(**settings))
    else:
        refuse_no_file(config, "pretrain-heads")
        refuse_beside_config(context, {*settings, *caft, "model", "output", "config", "push_to_hub"})
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


def refuse_no_file(config: Path, command: str) -> None:
    if not config.is_file():
        raise ConfigError(f"{command}: {config} is not a file. CONFIG takes an Axolotl YAML.")


def refuse_beside_config(context: click.Context, taken: set[str]) -> None:
    """Raises UsageError where an option was written that an Axolotl YAML speaks for."""
    for name in context.params.keys() - taken:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            option = "--" + name.replace("_", "-")
            raise click.UsageError(f"{option} does not go with a CONFIG, which has a key for it. Write it there.")


def push_heads(folder: Path, repo: str, token: str | None = None) -> None:
    """Uploads a heads folder to a Hub repository, which is made if it is not there."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    api.create_repo(repo_id=repo, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=folder, commit_message="CAFT heads")
    click.echo(f"Uploaded to {repo}")


def plain_stage1(given: dict[str, Any], caft: dict[str, Any], config: PretrainConfig) -> Stage1:
    """Stage 1 from the command line's options alone."""
    if not given["data"].is_file():
        raise ConfigError(f"--data: {given['data']} is not a file. It takes a JSONL file.")

    import torch
    from transformers import TrainingArguments

    from caft_plugin.model_loading import load_tokenizer
    from caft_plugin.stage1.data import read_rows
    from caft_plugin.stage1.pretraining import Stage1, heads_block, load_base

    caft_config = heads_block(caft)
    half = not given["float32"]
    tokenizer = load_tokenizer(given["model"])
    rows = read_rows(given["data"], tokenizer, given["max_length"])
    arguments = TrainingArguments(
        output_dir=str(given["output"]),
        max_steps=given["steps"],
        num_train_epochs=given["epochs"],
        per_device_train_batch_size=given["batch_size"],
        learning_rate=given["learning_rate"],
        save_steps=given["save_steps"],
        save_total_limit=2,
        logging_steps=10,
        bf16=half,
        use_cpu=not torch.accelerator.is_available(),
        report_to=[],
        seed=config.seed,
    )
    model = load_base(
        given["model"],
        torch.bfloat16 if half else torch.float32,
        load_in_4bit=given["load_in_4bit"],
        vllm=config.vllm,
    )
    return Stage1(model, tokenizer, rows, None, arguments, caft_config, config, given["model"])


@commands.command("speculate", short_help="How much faster the heads make a model write.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Folder or Hub id of the fine-tuned model, or of its adapter.")
@click.option("--heads", help="Its heads: a heads folder, a run's folder or a Hub id.")
@click.option("--prompts", type=click.Path(path_type=Path), help="JSONL: messages, prompt or text, one a line.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Take the first prompts alone.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="How often over the prompts.")
@click.option(
    "--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Longest text, in tokens."
)
@click.option(
    "--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 takes the likeliest token."
)
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True, help="Of sampling."
)
@click.option("--seed", default=0, show_default=True, help="Of sampling.")
@click.option("--num-draft", type=int, help="Guesses a pass. Left out: chosen while it writes.")
@click.option("--confidence", type=float, help="Send only guesses of at least this probability.")
@click.option("--load-in-4bit", "load_in_4bit", is_flag=True, help="Load the model in 4 bits (bitsandbytes NF4).")
@click.option("--float32", is_flag=True, help="Compute in float32 where bfloat16 would be quick.")
@click.option("--png", type=click.Path(path_type=Path), help="Draw the heads' figures into this file too.")
def speculate_command(
    config: Path | None,
    model: str | None,
    heads: str | None,
    prompts: Path | None,
    limit: int,
    num_draft: int | None,
    confidence: float | None,
    load_in_4bit: bool,
    float32: bool,
    png: Path | None,
    **settings: Any,
) -> None:
    """How much faster its heads make a fine-tuned model write: tokens a second and tokens a pass, beside plain
    generation and transformers' prompt lookup, the three in turn on the same prompts.

    With an Axolotl YAML as CONFIG, model and heads are those in its output_dir (the merged model, if there is one that
    is newer than the adapter), loaded as the YAML says, and the prompts its test_datasets'; --model, --heads and
    --prompts go before them. Without one, all three are needed.
    """
    run = None
    if config is not None:
        refuse_no_file(config, "speculate")
        from caft_plugin.axolotl.finished_run import FinishedRun

        run = FinishedRun.of(config, "speculate")
        model, heads = model or run.model, heads or run.heads
    for name, value in (("model", model), ("heads", heads), ("prompts", prompts or config)):
        if value is None:
            raise click.UsageError(f"--{name} is needed where no CONFIG is given")
    model, heads = cast(str, model), cast(str, heads)

    import torch

    from caft_plugin.decoding import Drafter
    from caft_plugin.model_loading import load_tokenizer
    from caft_plugin.precision import quick_dtype
    from caft_plugin.stage1.data import read_prompts
    from caft_plugin.stage1.pretraining import load_base
    from caft_plugin.tools.speculate import HEADS, as_table, draw, speculate

    dtype = torch.float32 if float32 else quick_dtype()
    tokenizer = load_tokenizer(model)
    asked = run.prompts() if run is not None and prompts is None else read_prompts(cast(Path, prompts), tokenizer)
    if run is None or load_in_4bit:
        loaded = load_base(model, dtype, load_in_4bit=load_in_4bit)
    else:
        loaded = run.load(tokenizer, model, dtype)
    with heads_named("--heads"):
        drafter = Drafter.from_pretrained(loaded, heads, num_draft=num_draft, confidence=confidence)
    comparison = speculate(loaded, tokenizer, {HEADS: drafter}, asked[:limit], **settings)
    click.echo(as_table(comparison))
    click.echo(keep_steps(comparison, model, heads, min(limit, len(asked)), settings["temperature"]))
    if png is not None:
        draw(comparison, png)


def keep_steps(found: Comparison, model: str, heads: str, prompts: int, temperature: float) -> str:
    """Save the tokens per step next to the heads, for `caft export-drafter`. Return the line to print."""
    from caft_plugin.heads_folder import locate_heads
    from caft_plugin.serving.recommendation import keep
    from caft_plugin.tools.speculate import HEADS

    if not Path(heads).is_dir():
        return "\nNot kept for `caft export-drafter`, since these heads are on the Hub: download them into a folder."
    steps = found.ways[HEADS].steps
    assert steps is not None
    try:
        file = keep(locate_heads(heads), model, prompts, temperature, steps.tokens_per_step())
    except OSError as error:
        return f"\nNot kept for `caft export-drafter`: {error}"
    return f"\nThe tokens a step are kept in {file}, for `caft export-drafter`."


@commands.command("export-drafter", short_help="Write the heads as a drafter for vLLM or SGLang.")
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--model", help="Folder or Hub id of the model that is served, or of its adapter.")
@click.option("--heads", help="Its heads: a heads folder, a run's folder or a Hub id.")
@click.option(
    "--output", required=True, type=click.Path(path_type=Path), help="Folder to write; not there yet, or empty."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["vllm", "eagle3"]),
    default="vllm",
    show_default=True,
    help="All heads, for vLLM with caft_plugin; or head 1, for any engine that knows EAGLE-3.",
)
@click.option("--num-heads", type=int, help="Write the first heads only. Left out: all of them.")
def export_drafter_command(
    config: Path | None,
    model: str | None,
    heads: str | None,
    output: Path,
    form: Literal["vllm", "eagle3"],
    num_heads: int | None,
) -> None:
    """Write a model's heads as a drafter's folder, and print the command that serves it.

    With an Axolotl YAML as CONFIG, model and heads are those in its output_dir; --model and --heads go before them.
    Without one, both are needed. Only files are read, no model is loaded.
    """
    if config is not None:
        refuse_no_file(config, "export-drafter")
        from caft_plugin.axolotl.finished_run import FinishedRun

        run = FinishedRun.of(config, "export-drafter")
        model, heads = model or run.model, heads or run.heads
    for name, value in (("model", model), ("heads", heads)):
        if value is None:
            raise click.UsageError(f"--{name} is needed where no CONFIG is given")

    from caft_plugin.serving.export import export_drafter

    with heads_named("--heads"):
        guide = export_drafter(cast(str, model), cast(str, heads), output, form, num_heads)
    click.echo(guide, nl=False)


@commands.command("attention-report", short_help="What masked training (MEAP) did to a model's attention.")
@click.option("--base", required=True, help="Folder or Hub id of the model before.")
@click.option("--tuned", required=True, help="Folder or Hub id of the model after, or of its adapter.")
@click.option(
    "--text",
    "file",
    required=True,
    type=click.Path(path_type=Path),
    help="JSON lines (text; or context, answer, query) or .txt.",
)
@click.option("--png", type=click.Path(path_type=Path), help="Draw the figures into this file too.")
@click.option("--mask-ratio", type=click.FloatRange(0, 1, min_open=True, max_open=True), help="Default: 0.15.")
@click.option("--mask-token", default="auto", show_default=True, help="As in the `meap:` block.")
@click.option("--max-length", type=click.IntRange(3), default=512, show_default=True, help="Longer texts are cut.")
@click.option("--seed", default=0, show_default=True, help="Which positions are masked.")
def attention_report_command(
    base: str,
    tuned: str,
    file: Path,
    png: Path | None,
    mask_ratio: float | None,
    mask_token: str,
    max_length: int,
    seed: int,
) -> None:
    """How attention on masked positions fell and how it varies elsewhere (arXiv 2502.07490, section 5), and the last
    token's attention by segment."""
    from caft_plugin.meap.attention_report import as_table, attention_report, draw, read_texts

    figures = attention_report(
        base, tuned, read_texts(file), mask_ratio=mask_ratio, mask_token=mask_token, max_length=max_length, seed=seed
    )
    click.echo(as_table(figures))
    if png is not None:
        draw(figures, png)


@commands.command("plan", short_help="What the heads will add to a run: memory and time.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--gpu-memory", metavar="SIZE", help="Of one GPU, e.g. 24GB: will the whole run fit?")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="GPUs over which FSDP shards.")
@click.option(
    "--supervised",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.3,
    show_default=True,
    help="Share of the tokens that are trained on.",
)
def plan_command(config: Path, gpu_memory: str | None, gpus: int, supervised: float) -> None:
    """What auxiliary heads will add to the run of CONFIG, an Axolotl YAML: parameters, memory and time.

    Of the base model only the config is read; no weights, no data and no GPU are needed.
    """
    from caft_plugin.quiet import quiet

    with quiet():
        from caft_plugin.axolotl.config_reading import read_for_plan
        from caft_plugin.axolotl.run import read_run
        from caft_plugin.plan.estimate import make_plan
        from caft_plugin.plan.words import as_text, parse_memory, run_as_text, verdict

    memory = None if gpu_memory is None else parse_memory(gpu_memory)
    plan = make_plan(read_run(read_for_plan(config, "plan")), gpus, supervised)
    click.echo(as_text(plan))
    if memory is not None:
        click.echo(f"\n{run_as_text(plan)}\n\n{verdict(plan, memory, gpus, supervised)}")


@commands.command("inspect", short_help="Show what is in a heads folder.")
@click.argument("folder")
def inspect_command(folder: str) -> None:
    """Show what the heads in FOLDER are: a heads folder, a run's folder, or a Hub id."""
    from caft_plugin.tools.inspect_heads import describe

    with heads_named("FOLDER"):
        click.echo(describe(folder))


if __name__ == "__main__":
    commands(prog_name="caft")
