"""Write a YAML again without its `caft:` block, for a plain run with the same settings.

python plain_config.py axolotl_configs/quickstart-cpu.yml outputs/quickstart-cpu-plain.yml

The plugin stays: it is what lets Axolotl train in bfloat16 on a CPU. Without a block it warns and
    changes nothing else.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write a YAML without its caft: block.")
    parser.add_argument("config", type=Path, help="the YAML to read")
    parser.add_argument("out", type=Path, help="the YAML to write")
    options = parser.parse_args(arguments)
    try:
        config = yaml.safe_load(options.config.read_text(encoding="utf-8"))
        if "caft" not in config:
            print(f"error: {options.config} has no caft: block to leave out", file=sys.stderr)
            return 1
        del config["caft"]
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
