"""The benchmarks run; their numbers on tiny models mean nothing, so none is asserted."""

import json
import subprocess
import sys
from pathlib import Path


def test_the_memory_benchmark_measures_what_it_is_asked_for(tmp_path: Path) -> None:
    names = ["published alignment", "grasp_hf run of 2"]
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.memory",
        "--model",
        "tiny",
        "--json",
        str(tmp_path / "out.json"),
    ]
    run = subprocess.run([*command, "--only", *names], capture_output=True, text=True, check=True)
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["measurements"]) == names
    assert all(row["anon"] > 0 and row["seconds"] > 0 for row in written["measurements"].values())
    assert all(name in run.stdout for name in names)
