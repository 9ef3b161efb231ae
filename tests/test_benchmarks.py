"""The benchmarks run; their numbers on tiny models mean nothing, so none is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("benchmark", "names", "keys"),
    [
        (
            "memory",
            ["published alignment", "grasp_hf run, LoRA"],
            ["anon", "seconds"],
        ),
        ("speed", ["copy alignment", "rank", "rank from disk", "average"], ["seconds", "baseline seconds", "ratio"]),
    ],
)
def test_a_benchmark_measures_what_it_is_asked_for(
    benchmark: str, names: list[str], keys: list[str], tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "-m",
        f"tests.benchmarks.{benchmark}",
        "--model",
        "tiny",
        "--json",
        str(tmp_path / "out.json"),
    ]
    extra = ["--sources", "3"] if benchmark == "speed" else []
    run = subprocess.run([*command, *extra, "--only", *names], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    written = json.loads((tmp_path / "out.json").read_text())
    assert list(written["measurements"]) == names
    assert all(row[key] > 0 for row in written["measurements"].values() for key in keys)
    assert all(name in run.stdout for name in names)
