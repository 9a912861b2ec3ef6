"""Start-up hook: lets Axolotl load plugins by a bare name (`plugins: [caft_plugin]`) and reports
common mistakes.

The wheel installs this file next to the package as `caft_plugin_startup.py`, and
`caft_plugin_startup.pth` imports it when Python starts, unless the environment variable
CAFT_PLUGIN_NO_STARTUP is set. It only puts a finder on `sys.meta_path`. When one of the modules in
CHANGES is imported, one name of that module is wrapped:

- `load_plugin` looks up a name without a dot in the entry-point group `axolotl.plugins`;
- `prepare_plugins` warns if a YAML asks for CAFT or MEAP without listing the plugin;
- `cli` rejects options such as `--caft.beta=0.6`, which Axolotl would pass to its launcher.

The last two also repeat an error as the last line: when training stops with a ConfigError, its
launcher (`accelerate launch`) prints a traceback of its own below it, and then `axolotl` prints the
error's message again.

The finder removes itself when all of them have been imported.
"""

import os
import sys

GROUP = "axolotl.plugins"
BLOCKS = ("caft", "meap", "mtp", "pretrain_heads", "pretrain-heads")


def with_bare_names(base):  # type: ignore[no-untyped-def]
    """Make Axolotl's `load_plugin` also accept the name of an entry point in the group
    `axolotl.plugins`."""
    from functools import wraps
    from importlib.metadata import entry_points

    load_plugin = base.load_plugin

    @wraps(load_plugin)
    def load(plugin_name):  # type: ignore[no-untyped-def]
        entries = entry_points(group=GROUP)
        for entry in entries.select(name=plugin_name):
            return entry.load()()
        try:
            return load_plugin(plugin_name)
        except (AttributeError, ValueError):  # no such class, or a name without a dot
            from caft_plugin.axolotl.slips import refuse_misspelt

            refuse_misspelt(plugin_name, sorted(entries.names))
            raise

    base.load_plugin = load


def with_slips_told(config):  # type: ignore[no-untyped-def]
    """Make Axolotl's `prepare_plugins` also check that the plugin the YAML asks for was loaded."""
    from functools import wraps

    prepare_plugins = config.prepare_plugins

    @wraps(prepare_plugins)
    def prepare(cfg):  # type: ignore[no-untyped-def]
        from caft_plugin.axolotl.slips import check_loaded, settle_names

        settle_names(cfg)
        prepare_plugins(cfg)
        check_loaded(cfg)

    config.prepare_plugins = prepare


def with_options_refused(main):  # type: ignore[no-untyped-def]
    """Make Axolotl's commands reject options named like caft_plugin's blocks."""
    resolve_command = main.cli.resolve_command

    def resolve(ctx, args):  # type: ignore[no-untyped-def]
        name, command, rest = resolve_command(ctx, args)
        if name not in ("caft", None):  # `axolotl caft` has options of its own
            for option in rest:
                _refuse_option_of_a_block(option)
        return name, command, rest

    main.cli.resolve_command = resolve


def _refuse_option_of_a_block(option: str) -> None:
    key = option.lstrip("-").replace("__", ".").split("=")[0]
    block, _, inner = key.partition(".")
    if option.startswith("--") and block in BLOCKS:
        from click import UsageError

        where = f"`{inner}:` below `{block}:`" if inner else f"a block `{block}:`"
        raise UsageError(
            f"{option}: Axolotl has no options for plugins and would pass this one to its launcher."
            f" Write {where} in the YAML."
        )


# In the environment: the process that `axolotl` is, which becomes its launcher, and a name that
# nobody can guess.
LAUNCHER = "CAFT_PLUGIN_LAUNCHER"


def _is_launcher() -> bool:
    return os.environ.get(LAUNCHER, "").partition("-")[0] == str(os.getpid())


def _last_word_file() -> str:
    from tempfile import gettempdir

    return os.path.join(gettempdir(), f"caft_plugin-{os.environ[LAUNCHER]}")


def with_last_word_passed_on(config):  # type: ignore[no-untyped-def]
    """A process that reads an Axolotl config leaves the ConfigError that stops it to its launcher,
    in a file."""
    excepthook = sys.excepthook

    def hook(
        kind,
        error,
        trace,
    ):  # type: ignore[no-untyped-def]
        excepthook(kind, error, trace)
        # by name: the class itself would have to be imported
        package = kind.__module__.partition(".")[0]
        ours = kind.__name__ == "ConfigError" and package == "caft_plugin"
        if ours and LAUNCHER in os.environ and not _is_launcher():
            try:
                file = os.open(_last_word_file(), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            except OSError:  # another process of the same run was faster
                return
            with open(file, "w", encoding="utf-8") as opened:
                opened.write(str(error))

    sys.excepthook = hook


def with_last_word(main):  # type: ignore[no-untyped-def]
    """The `axolotl` command announces itself to the processes that it starts."""
    from secrets import token_hex

    os.environ[LAUNCHER] = f"{os.getpid()}-{token_hex(16)}"
    _speak_last()


def _speak_last() -> None:
    import atexit

    @atexit.register
    def speak() -> None:
        try:
            with open(_last_word_file(), encoding="utf-8") as opened:
                message = opened.read()
            os.unlink(opened.name)
        except OSError:  # the usual case: nothing was left
            return
        sys.stderr.write(f"\n{message}\n")


CHANGES = {
    "axolotl.integrations.base": (with_bare_names,),
    "axolotl.cli.config": (with_slips_told, with_last_word_passed_on),
    "axolotl.cli.main": (with_options_refused, with_last_word),
}


class _Finder:
    @staticmethod
    def find_spec(
        name,
        path=None,
        target=None,
    ):  # type: ignore[no-untyped-def]
        if name not in CHANGES:
            return None
        from importlib.util import find_spec

        changes = CHANGES.pop(name)
        if not CHANGES:
            sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            for change in changes:
                change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    if _is_launcher():  # `axolotl train` has become `accelerate launch`
        _speak_last()
    if _Finder not in sys.meta_path and not CHANGES.keys() & sys.modules.keys():
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


install()
