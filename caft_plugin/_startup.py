"""Start-up hook: lets Axolotl load plugins by a bare name (`plugins: [caft_plugin]`) and reports common mistakes.

The wheel installs this file next to the package as `caft_plugin_startup.py`, and `caft_plugin_startup.pth` imports
it when Python starts, unless the environment variable CAFT_PLUGIN_NO_STARTUP is set. It only puts a finder on
`sys.meta_path`. When one of the modules in CHANGES is imported, one name of that module is wrapped:

- `load_plugin` looks up a name without a dot in the entry-point group `axolotl.plugins`;
- `prepare_plugins` warns if a YAML asks for CAFT or MEAP without listing the plugin;
- `cli` rejects options such as `--caft.beta=0.6`, which Axolotl would pass to its launcher.

The finder removes itself when all of them have been imported.
"""

import sys

GROUP = "axolotl.plugins"
BLOCKS = ("caft", "meap", "pretrain_heads", "pretrain-heads")


def with_bare_names(base):  # type: ignore[no-untyped-def]
    """Make Axolotl's `load_plugin` also accept the name of an entry point in the group `axolotl.plugins`."""
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
        except (AttributeError, ValueError) as error:  # no such class, or a name without a dot
            from caft_plugin.axolotl.slips import unknown_name

            raise unknown_name(plugin_name, sorted(entries.names)) or error from None

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
        for option in () if name in ("caft", None) else rest:
            key = option.lstrip("-").replace("__", ".").split("=")[0]
            block, _, inner = key.partition(".")
            if option.startswith("--") and block in BLOCKS:
                from click import UsageError

                where = f"`{inner}:` below `{block}:`" if inner else f"a block `{block}:`"
                raise UsageError(
                    f"{option}: Axolotl has no options for plugins and would pass this one to its launcher. Write "
                    f"{where} in the YAML."
                )
        return name, command, rest

    main.cli.resolve_command = resolve


CHANGES = {
    "axolotl.integrations.base": with_bare_names,
    "axolotl.cli.config": with_slips_told,
    "axolotl.cli.main": with_options_refused,
}


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name not in CHANGES:
            return None
        from importlib.util import find_spec

        change = CHANGES.pop(name)
        if not CHANGES:
            sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    if _Finder not in sys.meta_path and not CHANGES.keys() & sys.modules.keys():
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


install()
