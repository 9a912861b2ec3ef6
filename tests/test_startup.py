"""The start-up bridge: bare plugin names, its cost, and how to switch it off. Needs the installed
wheel."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

BARE = """
import sys
from axolotl.integrations.base import PluginManager, load_plugin
plugin = load_plugin("caft_plugin")
assert type(plugin).__name__ == "CAFTPlugin", plugin
assert type(load_plugin("caft_plugin.CAFTPlugin")) is type(plugin)
import axolotl.cli.config, axolotl.cli.main
assert not any(getattr(f, "__module__", "") == "caft_plugin_startup" for f in sys.meta_path)
try:
    load_plugin("no_such_plugin")
except ValueError:
    print("fine")
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_bare_and_dotted_names():
    pytest.importorskip("axolotl")
    result = python(BARE)
    assert result.stdout.strip().endswith("fine"), result.stderr[-2000:]


def test_switched_off_by_the_environment():
    seen = "import sys; print('caft_plugin_startup' in sys.modules)"
    assert python(seen).stdout.strip() == "True"
    assert python(seen, CAFT_PLUGIN_NO_STARTUP="1").stdout.strip() == "False"


def test_starting_python_imports_nothing_of_the_package():
    code = (
        "import sys; print([m for m in sys.modules if m.split('.')[0] in ('caft_plugin', 'torch',"
        " 'axolotl')])"
    )
    assert python(code).stdout.strip() == "[]"


def test_importing_the_package_needs_nothing_optional():
    code = (
        "import sys, caft_plugin; print([m for m in ('torch', 'axolotl', 'trl', 'transformers') if"
        " m in sys.modules])"
    )
    assert python(code).stdout.strip() == "[]"


def test_starting_python_imports_no_other_module_for_the_bridge():
    """What it costs is timed in tests/benchmarks/startup.py."""
    code = "import sys; print(len(sys.modules))"
    with_bridge, without = python(code).stdout, python(code, CAFT_PLUGIN_NO_STARTUP="1").stdout
    assert int(with_bridge) == int(without) + 1


def test_import_error_is_not_swallowed():
    """Axolotl only logs a plugin's ImportError; ours must stop the run."""
    code = """
import sys
sys.modules["axolotl"] = None
import caft_plugin
try:
    caft_plugin.CAFTPlugin
except RuntimeError as error:
    print(error)
"""
    assert "pip install 'caft_plugin[axolotl]'" in python(code).stdout
