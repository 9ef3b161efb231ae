"""CPU seconds that start-up takes: help, wrong usage, and the public names, against `import torch, transformers`.

Run it with `python -m tests.benchmarks.startup`. Each row runs in a fresh process, all rows in turns; a figure is the
median over turns of the user and system time of the process. A turn before the first fills the caches and does not
count.
"""

import argparse
import resource
import statistics
import subprocess
import sys

import grasp_hf
from grasp_hf.record.text import markdown_table

BASELINE = "import torch, transformers"
COMMAND = "from grasp_hf.cli import run; run()"
NAMES = [name for name in grasp_hf.__all__ if name != "compare"]
ROWS = {  # the code, and the arguments of the process
    BASELINE: [BASELINE],
    "grasp-hf -h": [COMMAND, "-h"],
    "grasp-hf merge -h": [COMMAND, "merge", "-h"],
    "grasp-hf --version": [COMMAND, "--version"],
    "grasp-hf merge (wrong usage)": [COMMAND, "merge"],
    "import grasp_hf": ["import grasp_hf"],
    "all public names but compare": [f"from grasp_hf import {', '.join(NAMES)}"],
    "all public names": ["from grasp_hf import *"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """Return the CPU time of a fresh Python process that runs some code."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def measure(turns: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every row in every turn."""
    found: dict[str, list[float]] = {name: [] for name in ROWS}
    for turn in range(turns + 1):
        for name, arguments in ROWS.items():
            seconds = cpu_seconds(arguments)
            if turn:
                found[name].append(seconds)
    return found


def table(found: dict[str, list[float]]) -> str:
    """Return medians, ranges and ratios to the baseline as Markdown."""
    baseline = statistics.median(found[BASELINE])
    return markdown_table(
        [
            {
                "start-up": name,
                "CPU seconds": f"{statistics.median(seconds):.2f}",
                "range": f"{min(seconds):.2f}–{max(seconds):.2f}",
                "of the baseline": f"{statistics.median(seconds) / baseline:.2f}",
            }
            for name, seconds in found.items()
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=7, help="fresh processes of each row (default: 7)")
    print(table(measure(parser.parse_args().turns)))


if __name__ == "__main__":
    main()
