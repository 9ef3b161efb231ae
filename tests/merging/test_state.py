"""A merge that was killed goes on, and ends with the same bits."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.resumable import run_process, write_world

MERGES: dict[str, dict[str, Any]] = {
    "weighted": {},
    "taught": {"taught": True},
    "blend, evaluated": {"method": "blend", "evaluates": True},
    "copy, ranked, fine-tuned between": {"method": "copy", "order": "rank", "finetune_epochs": 1, "initial_epochs": 1},
    "average with LoRA": {"method": "average", "lora": {"r": 2}},
    "one adapter": {"output": "adapter", "rank": 3},
}


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_that_is_killed_goes_on_with_the_same_bits(name: str, tmp_path: Path) -> None:
    asked, whole, killed = MERGES[name], tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        write_world(folder, adapters=3 if "output" in asked else 1)
    assert run_process(whole, asked) == 0
    expected, changes = json.loads((whole / "result.json").read_text()), int((whole / "changes.txt").read_text())
    assert changes > 10
    for kill_at in (changes // 3, changes // 4, changes // 6, changes // 5):
        assert run_process(killed, asked, kill_at) == -9
    assert run_process(killed, asked) == 0
    found = json.loads((killed / "result.json").read_text())
    assert found["weights"] == expected["weights"]
    replaced = json.loads(json.dumps(found["report"]).replace(str(killed), str(whole)))
    assert replaced == expected["report"]
