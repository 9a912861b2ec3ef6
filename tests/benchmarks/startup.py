"""What the start-up bridge adds to the start of a Python that never imports Axolotl.

    python tests/benchmarks/startup.py

Starts Python with and without the bridge in turn and prints the median difference and the
quartiles, in milliseconds.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time

PAIRS = 200


def start(**environment: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", "pass"], env={**os.environ, **environment}, check=True)
    return (time.perf_counter() - begin) * 1000


def main() -> None:
    differences = [start() - start(CAFT_PLUGIN_NO_STARTUP="1") for _ in range(PAIRS)]
    low, middle, high = statistics.quantiles(differences, n=4)
    print(f"the bridge adds {middle:.2f} ms (quartiles {low:.2f} to {high:.2f}, {PAIRS} pairs)")


if __name__ == "__main__":
    main()
