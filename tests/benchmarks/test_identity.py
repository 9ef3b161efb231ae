"""The comparison of two versions' outputs finds each difference in weights and numbers, and nothing else."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.benchmarks import identity
from tests.benchmarks.identity import compare_folders, copy_commit, copy_working_tree

RECORD: dict[str, Any] = {
    "base": "org/base",
    "start": {"loss": 2.25, "accuracy": 0.3},
    "control": None,
    "config": {"gate": True, "final_epochs": 18},
    "versions": {"torch": "2.13.0", "api": 1},
    "steps": [{"source": "bold", "before": {"loss": 2.25}, "seconds": 0.5, "peak_memory": 801013760}],
}
NUMBERS = 5  # of RECORD that are compared


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal outputs: weights of two data types, weights of PyTorch's own format, and a record."""
    for name in ("old", "new"):
        (folder := tmp_path / name / "merged").mkdir(parents=True)
        weights = {"layer.weight": torch.arange(6.0).reshape(2, 3), "norm.batches": torch.tensor(7)}
        save_file(weights, folder / "model.safetensors")
        torch.save({"head.bias": torch.ones(2, dtype=torch.bfloat16)}, folder / "adapter_model.bin")
        write(tmp_path / name, RECORD)
    return tmp_path / "old", tmp_path / "new"


def write(folder: Path, record: Any, name: str = "report.json") -> None:
    (folder / "merged" / name).write_text(json.dumps(record))


def test_equal_outputs_have_no_difference(folders: tuple[Path, Path]) -> None:
    outcome = compare_folders(*folders)
    assert outcome.differences == []
    assert str(outcome) == f"tensors equal 3/3, numbers equal {NUMBERS}/{NUMBERS}"


def test_one_flipped_bit_is_found_and_its_tensor_is_named(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["layer.weight"].view(torch.int32)[1, 2] ^= 1
    save_file(weights, path)
    outcome = compare_folders(*folders)
    (line,) = outcome.differences
    assert line.startswith("merged/model.safetensors/layer.weight: float32 [2, 3] ")
    assert line.endswith(", by up to 4.77e-07")  # the last bit of 5.0, 2**-21
    assert str(outcome) == f"tensors equal 2/3, numbers equal {NUMBERS}/{NUMBERS}"


def test_the_sign_of_a_zero_is_a_bit_too(folders: tuple[Path, Path]) -> None:
    path = folders[1] / "merged" / "model.safetensors"
    weights = load_file(path)
    weights["layer.weight"][0, 0] = -0.0
    save_file(weights, path)
    (line,) = compare_folders(*folders).differences
    assert line.endswith(", by up to 0")


@pytest.mark.parametrize(
    ("tensor", "described"),
    [
        (torch.arange(6.0).reshape(3, 2), "float32 [3, 2]"),
        (torch.arange(6.0).reshape(2, 3).double(), "float64 [2, 3]"),
    ],
)
def test_another_shape_or_data_type_is_found(folders: tuple[Path, Path], tensor: torch.Tensor, described: str) -> None:
    path = folders[1] / "merged" / "model.safetensors"
    save_file(load_file(path) | {"layer.weight": tensor}, path)
    (line,) = compare_folders(*folders).differences
    assert "layer.weight: float32 [2, 3] " in line
    assert f" != {described} " in line


def test_a_tensor_that_one_side_lacks_is_found(folders: tuple[Path, Path]) -> None:
    (folders[1] / "merged" / "adapter_model.bin").unlink()
    outcome = compare_folders(*folders)
    assert outcome.differences == ["merged/adapter_model.bin/head.bias: only in the commit"]
    assert compare_folders(*folders[::-1]).differences == [
        "merged/adapter_model.bin/head.bias: only in the working tree"
    ]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"start": {"loss": 2.2500000000000004, "accuracy": 0.3}}, "start/loss: 2.25 != 2.2500000000000004"),
        ({"start": {"loss": None, "accuracy": 0.3}}, "start/loss: only in the commit"),
        ({"start": {"loss": "2.25", "accuracy": 0.3}}, "start/loss: only in the commit"),
        ({"start": {"loss": float("nan"), "accuracy": 0.3}}, "start/loss: 2.25 != nan"),
        ({"config": {"gate": False, "final_epochs": 18}}, "config/gate: True != False"),
        ({"config": {"gate": 1, "final_epochs": 18}}, "config/gate: True != 1"),
        ({"steps": [{"before": {"loss": 2.5}}]}, "steps/0/before/loss: 2.25 != 2.5"),
        ({"control": {"loss": 1}}, "control/loss: only in the working tree"),
    ],
)
def test_one_changed_number_is_found_with_both_values(
    folders: tuple[Path, Path], change: dict[str, Any], difference: str
) -> None:
    write(folders[1], RECORD | change)
    assert compare_folders(*folders).differences == [f"merged/report.json/{difference}"]


def test_nan_equals_nan(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        write(folder, RECORD | {"start": {"loss": float("nan"), "accuracy": 0.3}})
    assert compare_folders(*folders).differences == []


def test_durations_memory_versions_and_texts_may_differ(folders: tuple[Path, Path]) -> None:
    step = RECORD["steps"][0] | {"seconds": 9.5, "peak_memory": 1, "source": "other"}
    write(folders[1], RECORD | {"base": "a new text", "versions": {"api": 2, "more": 3}, "steps": [step]})
    assert compare_folders(*folders).differences == []


def test_fields_of_a_run_may_stand_under_run(folders: tuple[Path, Path]) -> None:
    nested = {"base": "org/base", "steps": RECORD["steps"]}
    run = {name: value for name, value in RECORD.items() if name not in nested}
    write(folders[1], nested | {"run": run})
    outcome = compare_folders(*folders)
    assert (outcome.differences, outcome.numbers) == ([], NUMBERS)
    write(folders[1], nested | {"run": run | {"start": {"loss": 2.5, "accuracy": 0.3}}})
    assert compare_folders(*folders).differences == ["merged/report.json/start/loss: 2.25 != 2.5"]


def test_a_field_that_stands_twice_is_refused(folders: tuple[Path, Path]) -> None:
    write(folders[1], RECORD | {"run": {"start": {}}})
    with pytest.raises(ValueError, match="expected each field once, got start also under 'run'"):
        compare_folders(*folders)


def test_a_renamed_field_or_file_is_compared_by_its_new_name(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "RENAMED", {"report.json": "record.json", "start": "first"})
    (folders[1] / "merged" / "report.json").unlink()
    record = {"first" if name == "start" else name: value for name, value in RECORD.items()}
    write(folders[1], record, "record.json")
    assert compare_folders(*folders).differences == []
    write(folders[1], record | {"first": {"loss": 2.5, "accuracy": 0.3}}, "record.json")
    assert compare_folders(*folders).differences == ["merged/record.json/first/loss: 2.25 != 2.5"]


def test_scores_that_only_the_printed_table_holds_are_compared(folders: tuple[Path, Path]) -> None:
    old = "1.0 s\n\n| | accuracy |\n|---|---|\n| source bold (full) | 0.715 ± 0.013   |\n| ours | -0.879 ± 0.010 |\n"
    new = old.replace("source", "the source").replace("1.0 s", "2.0 s")
    outcome = compare_folders(*folders, printed=(old, new))
    assert (outcome.differences, outcome.numbers) == ([], NUMBERS + 4)
    other = compare_folders(*folders, printed=(old, new.replace("-0.879", "0.879")))
    assert other.differences == ["printed/1/0: -0.879 != 0.879"]


def test_the_working_tree_is_copied_with_its_changes_and_without_ignored_files(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "package").mkdir(parents=True)
    (root / ".gitignore").write_text("build/\n")
    for name in ("changed.py", "removed.py"):
        (root / "package" / name).write_text("committed")
    git = ["git", "-C", str(root), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message", "first"]):
        subprocess.run([*git, *command], check=True)
    (root / "package" / "changed.py").write_text("changed")
    (root / "package" / "removed.py").unlink()
    (root / "package" / "new.py").write_text("new")
    (root / "build").mkdir()
    (root / "build" / "ignored.py").write_text("ignored")

    copy_commit(root, "HEAD", tmp_path / "commit")
    copy_working_tree(root, tmp_path / "tree")
    assert contents(tmp_path / "commit") == {
        ".gitignore": "build/\n",
        "package/changed.py": "committed",
        "package/removed.py": "committed",
    }
    assert contents(tmp_path / "tree") == {
        ".gitignore": "build/\n",
        "package/changed.py": "changed",
        "package/new.py": "new",
    }


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}
