"""The start-up bridge: lets Axolotl find plugins by a bare name (`plugins: [caft_plugin]`).

The wheel puts this file beside the package, as `caft_plugin_startup.py`, and `caft_plugin_startup.pth` imports
it whenever Python starts, unless the environment variable CAFT_PLUGIN_NO_STARTUP is set. It only puts a finder on
`sys.meta_path`; nothing else happens unless `axolotl.integrations.base` is imported. Then `load_plugin` of that
module is wrapped: a name without a dot is looked up in the entry-point group `axolotl.plugins`. The finder takes
itself off the path at that moment.
"""

import sys

TARGET = "axolotl.integrations.base"
GROUP = "axolotl.plugins"


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != TARGET:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module):  # type: ignore[no-untyped-def]
            execute(module)
            module.load_plugin = with_bare_names(module.load_plugin)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def with_bare_names(load_plugin):  # type: ignore[no-untyped-def]
    """Axolotl's `load_plugin`, which also takes the name of an entry point of the group `axolotl.plugins`."""
    from functools import wraps
    from importlib.metadata import entry_points

    @wraps(load_plugin)
    def load(plugin_name):  # type: ignore[no-untyped-def]
        if "." not in plugin_name:
            for entry in entry_points(group=GROUP, name=plugin_name):
                return entry.load()()
        return load_plugin(plugin_name)

    return load


def install() -> None:
    if _Finder not in sys.meta_path and TARGET not in sys.modules:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


install()
