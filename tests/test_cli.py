"""The command line: its output, its exit codes, and that it overwrites no files of the user."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import grasp_hf
from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.cli import main
from grasp_hf.comparison.methods import METHODS
from grasp_hf.config.arguments import COMMANDS, EXIT_CODES, parse
from grasp_hf.config.recipe import Recipe
from grasp_hf.errors import ConfigError, DataError, IncompatibleSourceError, SourceNotFoundError
from grasp_hf.record.entries import ALONE, BEST_SOURCE, PLACEBO, Reason
from grasp_hf.record.report import RunReport
from grasp_hf.record.saving import read_record
from grasp_hf.record.text import format_size
from grasp_hf.runs.costs import cost_lines, disk_warnings, estimate
from grasp_hf.runs.plan import plan, plan_table
from grasp_hf.runs.planned import PlannedSource
from grasp_hf.runs.prepare import prepare
from grasp_hf.tensors.units import movable_tensors
from tests.support.hub.server import HubServer
from tests.support.models import (
    LABELS,
    NO_TUNING,
    copied,
    perturbed,
    saved,
    saved_adapter,
    tiny_data,
    tiny_model,
    write_images,
)

QUICK = {**NO_TUNING, "method": "blend", "finetune_epochs": 1, "num_batches": 2, "batch_size": 4, "gate": False}
AVERAGE = {"method": "average", "order": "given", "finetune_epochs": 0, "final_epochs": 0, "data": {}}
DATA = {"path": "imagefolder", "data_dir": "images"}
LORA: dict[str, Any] = {"target_modules": ["q_proj"]}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Return a folder with a base, two fine-tunes and an adapter of it, images, and a recipe of all."""
    base = saved(tiny_model("vit"), tmp_path / "base")
    for seed in (1, 2):
        saved(perturbed(tiny_model("vit"), seed=seed), tmp_path / f"fine-{seed}")
    saved_adapter(tiny_model("vit"), base, tmp_path / "lora", **LORA)
    write_images(tmp_path / "images", {"train": 4, "validation": 2, "test": 1})
    write_recipe(tmp_path, sources=["fine-1", "lora", "fine-2"])
    return tmp_path


def write_recipe(folder: Path, **values: Any) -> str:
    recipe = {"base_model": "base", "data": DATA, **QUICK, **values}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a new process."""
    code = "from grasp_hf.cli import run; run()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def help_of(*command: str) -> str:
    """Return a help text as a wide terminal shows it."""
    done = subprocess.run(
        [sys.executable, "-c", "from grasp_hf.cli import run; run()", *command, "-h"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"COLUMNS": "200"},
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert max(map(len, done.stdout.splitlines())) <= 100
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_shows_an_example(command: str) -> None:
    text = help_of(command)
    assert f"example:\n  grasp-hf {command} " in text
    assert " ".join(EXIT_CODES.split()) in " ".join(text.split())


def test_the_help_lists_the_commands() -> None:
    text = help_of()
    assert re.findall(r"^  (\w+) +\w", text.partition("commands:")[2], flags=re.MULTILINE) == [*COMMANDS]


@pytest.mark.parametrize("command", ["rank", "merge", "compare"])
def test_the_help_lists_every_setting_with_its_default(command: str) -> None:
    settings = help_of(command).partition("settings (key=value)")[2]
    found = dict(re.findall(r"^  (\w+)=(\S+) +\S", settings, flags=re.MULTILINE))
    assert found.keys() == {field.name for field in fields(GraspConfig)}
    assert (found["method"], found["gate"], found["lora"], found["final_epochs"]) == ("weighted", "true", "null", "3")


def test_the_help_lists_every_compared_method() -> None:
    text = help_of("compare").partition("methods: ")[2].partition("\n\n")[0]
    assert text.replace("\n", " ").replace(",", "").split() == [*METHODS]


def test_the_help_fits_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit, match="^0$"):
        main(["compare", "-h"])
    text = capsys.readouterr().out.partition("methods: ")[2]
    assert len(text.splitlines()) > 30 and max(map(len, text.splitlines())) <= 60


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$"):
        main(["--version"])
    assert capsys.readouterr().out == f"grasp-hf {grasp_hf.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected a command: plan, rank, merge, append, push, reproduce, compare, demo"),
        (["merge"], "recipe"),
        (["plan"], "the following arguments are required: recipe"),
        (["merge", "recipe.yaml"], "--output"),
        (["blend", "recipe.yaml"], "invalid choice: 'blend'"),
        (["plan", "recipe.yaml", "--outptu", "x"], "unrecognized arguments: --outptu"),
        (["demo", "--seed", "one"], "expected numbers, got 'one'"),
        (["merge", "recipe.yaml", "--output", "x", "--private"], "--private: expected --push-to-hub as well"),
        (["append", "merged", "org/a", "--output", "x", "--create-pr"], "--create-pr: expected --push-to-hub as well"),
    ],
)
def test_wrong_usage_is_code_2(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit, match="^2$"):
        main(arguments)
    output = capsys.readouterr()
    assert message in " ".join(output.err.split()) and output.out == ""
    assert max(map(len, output.err.splitlines())) <= 100


def test_a_plan_without_problems(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(world / "recipe.yaml")]) == 0
    output = capsys.readouterr()
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.out.splitlines()]
    assert lines[0] == ["", "model", "kind", "size", "download", "problems"]
    assert lines[2:6] == [
        ["base", "base", "full", "0.0 MB", "0.0 MB", "none"],
        ["source", "fine-1", "full", "0.0 MB", "0.0 MB", "none"],
        ["source", "lora", "adapter", "0.0 MB", "0.0 MB", "none"],
        ["source", "fine-2", "full", "0.0 MB", "0.0 MB", "none"],
    ]
    assert "download: 0.0 MB, 0 s at 50 MB/s\n" in output.out
    assert not any(word in output.out for word in ("dtype", "revision", "bird, cat, dog"))


def test_a_verbose_plan_shows_all_facts_about_each_model(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (world / "lora" / "README.md").write_text("---\nlicense: mit\n---\n")
    assert main(["plan", str(world / "recipe.yaml"), "-v"]) == 0
    text = capsys.readouterr().out
    assert (
        f"""
base {world / "base"}
  revision:     local
  architecture: vit
  dtype:        float32
  labels:       bird, cat, dog
"""
        in text
    )
    assert (
        f"""
source {world / "lora"}
  licence:      mit
  revision:     local
  architecture: LORA
  adapter of:   {world / "base"}
  dtype:        float32
"""
        in text
    )


def test_a_plan_fits_in_a_terminal() -> None:
    """The names are the longest usual ones of the Hub, and one is longer."""
    name, long = "cardiffnlp/twitter-roberta-base", "mrm8488/distilroberta-finetuned-financial-news-sentiment-analysis"
    rows = [
        PlannedSource(name, "base", "adapter", num_bytes=123_456_000_000, problems=[""] * 12),
        PlannedSource(long, "source", "full", num_bytes=987_654_000),
    ]
    recipe = Recipe(sources=[long], base_model=name, config=GraspConfig(order="rank", batch_size=2))
    lines = plan_table([*rows, rows[1]], recipe).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:4]]
    assert cells[0] == ["base", name, "adapter", "123.46 GB", "123.46 GB", "12"]
    assert cells[1][1:] == ["mrm8488/distilroberta…s-sentiment-analysis", "full", "987.7 MB", "987.7 MB", "none"]
    assert max(map(len, lines)) <= 100
    assert [line.partition(":")[0] for line in lines[6:11]] == [
        *("download", "  of it, to compare the sources", "disk at most", "memory", ""),
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0.0 MB"), (999_940_000, "999.9 MB"), (999_960_000, "1.00 GB"), (12_345_678_900, "12.35 GB")],
)
def test_sizes_are_in_megabytes_below_one_gigabyte(size: int, text: str) -> None:
    assert format_size(size) == text


def test_no_progress_bar_is_printed_outside_a_terminal(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # without any prepared data set
    done = run("plan", str(world / "recipe.yaml"))
    assert done.returncode == 0 and done.stderr == ""


def test_a_plan_names_models_that_the_recipe_names_twice(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, sources=["fine-1", "fine-2", "fine-1", "base"])
    assert main(["plan", recipe]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.endswith("counts twice in a mean")]
    assert told == [
        f"- {world / name}: the recipe names it twice, so it counts twice in a mean" for name in ("fine-1", "base")
    ]


def test_a_plan_lists_all_problems_of_all_sources(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("resnet"), world / "resnet")
    saved(tiny_model("vit", labels=["x", "y", "z", "w"]), world / "labels")
    saved_adapter(tiny_model("vit"), "org/elsewhere", world / "stray", **LORA)
    (world / "damaged").mkdir()
    (world / "damaged" / "adapter_config.json").write_text("{")
    (world / "damaged" / "adapter_model.safetensors").write_bytes(b"")
    (world / "empty").mkdir()
    names = ["resnet", "labels", "fine-1", "stray", "empty", "damaged", "./nowhere"]
    assert main(["plan", write_recipe(world, sources=names)]) == 1
    text = capsys.readouterr().out
    problems = [line for line in text.splitlines() if line.startswith("- ") and "head stays" not in line]
    expected = [
        ("resnet", "different architecture: got resnet, expected vit"),
        ("stray", "it is an adapter of 'org/elsewhere', expected an adapter of '"),
        ("empty", "holds no config.json and no adapter_config.json"),
        ("damaged", "adapter_config.json cannot be used: JSONDecodeError: "),
        ("nowhere", "is neither an existing folder nor a Hub id"),
    ]
    assert len(problems) == len(expected)
    for line, (name, problem) in zip(problems, expected, strict=True):
        assert f"{name}: " in line and problem in line
    counts = [line.strip("|").split("|")[-1].strip() for line in text.splitlines()[2:10]]
    assert counts == ["none", "1", "none", "none", "1", "1", "1", "1"]


def test_a_plan_lists_the_problems_of_the_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, sources=["fine-1"], data={**DATA, "label": "animal"})
    assert main(["plan", recipe]) == 1
    assert "no column 'animal' for labels; found image, label" in capsys.readouterr().out

    recipe = write_recipe(world, sources=["fine-1"], data={**DATA, "image": "picture"})
    assert main(["plan", recipe]) == 1
    assert "- data: split 'train' has no column 'picture' for images; found image, label\n" in capsys.readouterr().out
    recipe = write_recipe(world, sources=["fine-1"], data={"colour": "red", "label": 3})
    assert main(["plan", recipe]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- ")]
    assert [line.partition(":")[0] for line in told] == ["- data.colour", "- data.path", "- data.label"]


def test_a_plan_names_each_model_once(world: Path) -> None:
    (world / "damaged").mkdir()
    (world / "damaged" / "config.json").write_text("{")
    (world / "damaged" / "model.safetensors").write_bytes(b"")
    recipe = write_recipe(world, sources=["damaged", "fine-1"], data={**DATA, "label": "animal"})
    base, damaged, fine = plan(Recipe.from_yaml(recipe))
    assert base.problems == [] and fine.problem_lines() == []
    assert base.problem_lines() == ["data: the data set has no column 'animal' for labels; found image, label"]
    assert damaged.problems[0].startswith("config.json cannot be used: JSONDecodeError: ")
    assert damaged.problem_lines() == [f"{world / 'damaged'}: {damaged.problems[0]}"]
    assert [row.row()["problems"] for row in (base, damaged, fine)] == ["1", "1", "none"]


def test_a_plan_without_data_matches_the_labels_of_the_base(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("vit", labels=["x", "y"]), world / "other")
    saved(tiny_model("vit", labels=["cat", "bird", "dog"]), world / "order")
    recipe = write_recipe(world, sources=["other", "order"], **AVERAGE)
    assert main(["plan", recipe]) == 0
    text = capsys.readouterr().out
    notes = [line.partition("head")[1:] for line in text.splitlines() if line.startswith("- ")]
    assert main(["merge", recipe, "--output", str(world / "merged")]) == 0
    report = json.loads((world / "merged" / "grasp_report.json").read_text())
    assert ["".join(note) for note in notes] == [note for step in report["steps"] for note in step["notes"]]
    assert "classes matched by name, 3 of 3" in notes[1][1]


@pytest.mark.parametrize("damage", ["shard", "tensor", "shape", "expert"])
def test_a_base_whose_files_lack_weights(damage: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model("mixtral" if damage == "expert" else "vit")
    base = Path(saved(model, world / "base"))
    saved(perturbed(model, seed=1), world / "fine-1")
    model.save_pretrained(base, max_shard_size="5KB" if damage == "shard" else "5GB")
    tensors = load_file(base / "model.safetensors") if damage != "shard" else {}
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight" if damage == "expert" else "vit.layernorm.weight"
    expected = name
    if damage == "shard":
        index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
        (base / "model.safetensors").unlink()
        (base / index[name]).unlink()
        expected = f"is not complete: {index[name]} missing"
    elif damage == "shape":
        tensors[name] = torch.zeros(7)
        expected = f"1 of its tensors: {name} (got shape (7,), expected (16,))"
    else:
        del tensors[name]
        expected = (
            "mlp.experts.gate_up_proj cannot be made from the tensors in the files" if damage == "expert" else name
        )
    if tensors:
        save_file(tensors, base / "model.safetensors", {"format": "pt"})
    recipe = write_recipe(world, sources=["fine-1"], **AVERAGE)
    assert main(["plan", recipe]) == 1
    text = capsys.readouterr().out
    told = [line for line in text.splitlines() if line.startswith(f"- {base}: ")]
    assert expected in told[0] and len(told) == 1
    assert main(["merge", recipe, "--output", str(world / "merged")]) == 1 and not (world / "merged").exists()
    with pytest.raises(SourceNotFoundError if damage == "shard" else IncompatibleSourceError, match=str(base)):
        GraspMerger.from_pretrained(str(base))


def test_a_base_without_a_head_needs_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    body: Any = tiny_model("vit")
    saved(body.vit, world / "body")
    common = {"base_model": "body", "sources": ["fine-1"], "task": "image-classification"}
    recipe = write_recipe(world, **common)
    assert main(["plan", recipe]) == 0
    assert main(["plan", write_recipe(world, **common, **AVERAGE)]) == 1
    text = capsys.readouterr().out
    assert (
        "body: its files hold no head that fits, and no head is trained without data: 2 of its tensors: classif"
        in text
    )


def test_a_plan_of_models_that_generate_names_no_labels(world: Path, tmp_path: Path) -> None:
    for name in ("base", "fine-1"):
        saved(tiny_model("gpt2"), world / name)
    recipe = write_recipe(world, sources=["fine-1"], **AVERAGE)
    assert main(["plan", recipe, "--json", str(tmp_path / "plan.json")]) == 0
    assert [row["labels"] for row in json.loads((tmp_path / "plan.json").read_text())] == [None, None]


def test_unknown_values_in_a_plan_are_dashes(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", write_recipe(world, sources=["fine-1", "./nowhere"])]) == 1
    lines = capsys.readouterr().out.splitlines()
    row = dict(zip(*[[cell.strip() for cell in lines[at].strip("|").split("|")] for at in (0, 4)], strict=True))
    assert row["model"] == "./nowhere" and row["size"] == row["download"] == row["kind"] == "–"
    assert any(line.startswith("download: ") for line in lines)
    assert main(["plan", write_recipe(world, sources=["fine-1"], base_model="./nowhere")]) == 1
    assert "download: " not in capsys.readouterr().out, "without the base, the costs are unknown"


def test_the_download_of_a_plan_includes_that_for_the_order() -> None:
    """An order needs every source, and the merged ones are downloaded again; cached files are never downloaded."""
    base = PlannedSource("base", "base", "full", num_bytes=10**9)
    sources = [PlannedSource(f"{size}", "source", "full", num_bytes=size * 10**9) for size in (2, 4, 3)]
    sources[2].cached_bytes = sources[2].num_bytes

    def lines(**config: Any) -> list[str]:
        return cost_lines([base, *sources], GraspConfig(**config))

    assert lines(order="given", method="average")[0] == "download: 7.00 GB, 2 min at 50 MB/s"
    assert not any("compare" in line for line in lines(order="given", method="average"))
    assert lines(order="rank")[0].startswith("download: 19.00 GB, ")  # for the gains, the weights, and the merge
    for config in ({"order": "given"}, {"order": "loss"}, {"order": "rank", "top": 2, "method": "average"}):
        assert lines(**config)[:2] == [
            "download: 13.00 GB, 4 min at 50 MB/s",
            "  of it, to compare the sources: 6.00 GB; they are then downloaded again",
        ]
    assert lines(order="loss", top=1)[0].startswith("download: 11.00 GB, ")


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [("initial_epochs", "AdamW"), ("finetune_epochs", "AdamW"), ("final_epochs", "AdamW"), ("none", "no fine-tuning")],
)
def test_the_memory_of_a_plan_counts_all_fine_tuning(epochs: str, expected: str) -> None:
    names = ("initial_epochs", "finetune_epochs", "final_epochs")
    given: dict[str, Any] = {name: int(name == epochs) for name in names}
    config = GraspConfig(**given)
    assert expected in cost_lines([PlannedSource("base", "base", "full", num_bytes=1)], config)[2]


@pytest.mark.parametrize(
    ("config", "copies"),
    [
        ({}, 8),
        ({"final_epochs": 1}, 7),
        ({"method": "average"}, 8),
        ({"method": "average", "finetune_epochs": 1}, 6),
        ({"gate": False}, 3),
        ({"final_epochs": 0}, 2),
        ({"final_epochs": 0, "gate": False}, 2),
        ({"final_epochs": 0, "order": "rank"}, 2),
        ({"order": "rank"}, 8),
        ({"method": "copy", "accumulate_gradients": True}, 8),
        ({"method": "copy", "accumulate_gradients": True, "final_epochs": 0}, 3),
        ({"method": "average", "order": "given", "final_epochs": 0, "gate": False}, 0),
    ],
)
def test_the_temporary_files_of_a_plan_are_copies_of_the_target(config: dict[str, Any], copies: int) -> None:
    base = PlannedSource("base", "base", "full", num_bytes=10**9)
    line = cost_lines([base], GraspConfig(**config))[1]
    size = f"{copies}.00 GB" if copies else "0.0 MB"
    assert f"of models, {size} of temporary files, " in line


def test_a_disk_that_may_be_too_small_is_named_before_the_merge(tmp_path: Path) -> None:
    base = PlannedSource("base", "base", "full", num_bytes=10**15)
    (text,) = disk_warnings(estimate([base], GraspConfig(method="average", order="given", final_epochs=0)), tmp_path)
    assert "1000000.00 GB for the base model (HF_HOME)" in text and "the state of the merge is kept" in text
    assert f"the disk of '{tmp_path}'" in text or "HF_HOME" in text
    small = PlannedSource("base", "base", "full", num_bytes=1000)
    assert disk_warnings(estimate([small], GraspConfig()), tmp_path / "missing" / "folder") == []


@pytest.mark.parametrize("command", ["plan", "rank"])
def test_a_file_that_cannot_be_written(command: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = world / "missing" / "rows.json"
    for file, problem in ((missing, f"there is no folder '{missing.parent}'"), (world, "it is a folder")):
        assert main([command, str(world / "recipe.yaml"), "--json", str(file)]) == 1
        output = capsys.readouterr()
        assert output.err == f"error: --json: '{file}' cannot be written: {problem}; name another file\n"
        assert output.out == "", "the check comes before the work"


def test_a_plan_shows_changes_of_heads_and_the_units(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tiny_model("vit", labels=["x", "y"]), world / "other")
    saved(tiny_model("vit", labels=["cat", "bird", "dog"]), world / "order")
    assert main(["plan", write_recipe(world, sources=["other", "order"]), "unit=layer"]) == 0
    text = capsys.readouterr().out
    assert "other: head stays: no label name is shared: got x, y, expected bird, cat, dog" in text
    assert "order: head: classes matched by name, 3 of 3: got cat, bird, dog, expected bird, cat, dog" in text
    assert "6 units with 5,411 parameters (unit: layer):\n" in text
    assert "  2 × vit.layers.*: 2,224\n" in text and "  classifier: 51\n" in text


def test_a_merge_in_a_new_process(world: Path) -> None:
    output = world / "merged"
    copying = ("method=copy", "unit=module", "threshold=-1")
    done = run("merge", str(world / "recipe.yaml"), "--output", str(output), *copying)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for number, name in enumerate(["fine-1", "lora", "fine-2"], start=1):
        assert len([line for line in lines if line.startswith(f"{number}/3 {name}: merged")]) == 1
    assert any(line.startswith("| source ") for line in lines)
    for name in ("fine-1", "lora"):
        assert "merged" in next(line for line in lines if line.startswith(f"| {name} ")).split()
    assert any(line.startswith("- test: loss ") and ", accuracy " in line for line in lines)
    assert lines[-1] == f"saved: {output}"
    assert "error" not in done.stderr.lower() and "Traceback" not in done.stderr
    assert "held-out loss" not in done.stderr

    model = AutoModelForImageClassification.from_pretrained(output)
    report = json.loads((output / "grasp_report.json").read_text())
    steps = [(Path(step["source"]).name, step["kind"]) for step in report["steps"]]
    assert steps == [("fine-1", "full"), ("lora", "adapter"), ("fine-2", "full")]
    assert report["run"]["config"]["method"] == "copy" and report["run"]["config"]["threshold"] == -1
    units = [[unit["decision"] for unit in step["units"]] for step in report["steps"][:2]]
    assert units == [["moved"] * 20, ["moved"] * 2]
    samples = {split: data["samples"] for split, data in report["run"]["data"].items()}
    assert samples == {"train": 12, "eval": 6, "test": 3}
    with torch.no_grad():
        assert torch.isfinite(model(tiny_data("vit", 2)[:]["pixel_values"]).logits).all()
    assert list(model.config.id2label.values()) == ["bird", "cat", "dog"]


def test_an_error_by_the_console_script(world: Path) -> None:
    script = str(Path(sys.executable).with_name("grasp-hf"))
    recipe = write_recipe(world, sources=["fine-1", "nowhere/at/all"])
    command = [script, "merge", recipe, "--output", str(world / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert (
        "error: nothing was merged, because of these problems:\n- nowhere/at/all: no such model on the Hub"
        in done.stderr
    )
    assert "Traceback" not in done.stderr and done.stdout == ""
    assert not (world / "merged").exists()


def test_a_merge_in_this_process(
    world: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = world / "merged"
    arguments = ["merge", str(world / "recipe.yaml"), "--output", str(output)]
    assert main(arguments) == 0
    assert [record.getMessage().split(" ")[0] for record in caplog.records if record.name == "grasp_hf.merger"] == [
        "1/3",
        "2/3",
        "3/3",
    ]
    first = capsys.readouterr()
    assert f"saved: {output}" in first.out
    weights = (output / "model.safetensors").read_bytes()
    assert main([*arguments, "seed=7"]) == 0, "an earlier merge is replaced"
    assert (output / "model.safetensors").read_bytes() != weights
    assert main(arguments) == 0
    assert (output / "model.safetensors").read_bytes() == weights, "the same recipe gives the same weights"


def test_an_output_folder_that_holds_something_else(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("base", "images"):
        before = {path: path.read_bytes() for path in (world / name).rglob("*") if path.is_file()}
        assert main(["merge", str(world / "recipe.yaml"), "--output", str(world / name)]) == 1
        output = capsys.readouterr()
        assert f"error: '{world / name}' already holds something that is not a merge" in output.err
        assert output.out == "", "the check of the folder comes before the work"
        assert {path: path.read_bytes() for path in (world / name).rglob("*") if path.is_file()} == before
    assert main(["merge", str(world / "recipe.yaml"), "--output", str(world / "recipe.yaml")]) == 1


@pytest.mark.parametrize("command", ["plan", "merge"])
def test_all_problems_of_a_recipe_are_printed(command: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, sources=[], treshold=0.2)
    assert main([command, recipe, "gate=1", *(["--output", str(world / "out")] if command == "merge" else [])]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines[0] == f"error: {recipe} has problems:"
    assert sorted(line.split(":")[0] for line in lines[1:]) == ["- gate", "- sources", "- treshold"]


def test_verbose_shows_the_traceback(world: Path) -> None:
    with pytest.raises(ConfigError, match="gate: got 1"):
        main(["plan", str(world / "recipe.yaml"), "gate=1", "-v"])


@pytest.mark.parametrize("key", ["training_arguments.learning_rat=1.0e-3", "training_arguments.learning_rate=1e-3"])
def test_training_arguments_are_checked_before_anything_is_merged(
    key: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(world / "recipe.yaml"), key]) == 1
    assert main(["merge", str(world / "recipe.yaml"), "--output", str(world / "merged"), key]) == 1
    output = capsys.readouterr()
    assert "error: " in output.err and "learning_rat" in output.err
    assert "while merging" not in output.err


def test_a_data_section_with_an_unknown_key(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", str(world / "recipe.yaml"), "--output", str(world / "merged"), "data.colour=red"]) == 1
    assert "- data.colour: unknown key, expected one of data_dir, data_files, image" in capsys.readouterr().err


def test_a_recipe_without_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, sources=["fine-1"], data={})
    assert main(["plan", recipe]) == 1
    assert "- data.path: missing, expected imagefolder, csv" in capsys.readouterr().out
    assert main(["merge", recipe, "--output", str(world / "merged")]) == 1
    assert "- data.path: missing, expected imagefolder, csv" in capsys.readouterr().err


def test_a_recipe_with_one_model_has_nothing_to_merge(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, sources=["fine-1"], base_model=None)
    assert main(["merge", recipe, "--output", str(world / "merged")]) == 1
    assert "sources" in capsys.readouterr().err


def test_a_merge_is_pushed(
    hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    merge = ["merge", str(world / "recipe.yaml"), "--output", str(world / "merged")]
    assert main([*merge, "--push-to-hub", "org/cli-merged", "--private"]) == 0
    assert f"pushed: {hub.url}/org/cli-merged/commit/" in capsys.readouterr().out
    assert hub.repos["org/cli-merged"].private
    loaded = AutoModelForImageClassification.from_pretrained("org/cli-merged")
    here = AutoModelForImageClassification.from_pretrained(world / "merged")
    for name, value in here.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_push_that_is_refused(hub: HubServer, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merge = ["merge", str(world / "recipe.yaml"), "--output", str(world / "merged")]
    assert main([*merge, "--push-to-hub", "org/cli-refused"]) == 1
    assert "error: " in (output := capsys.readouterr()).err and "org/cli-refused" in output.err
    assert output.out == "" and not (world / "merged").exists(), "the check comes before the work"
    assert "org/cli-refused" not in hub.repos
    (world / "merged").mkdir()
    since = len(hub.requests)
    assert main([*merge, "--push-to-hub", "org/cli/refused", "data.label=animal"]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("error: 'org/cli/refused' cannot be a repository on the Hub, expected 'org/name'")
    assert "animal" not in output.err and len(hub.requests) == since and (world / "merged").is_dir(), (
        "an existing folder stays"
    )


def test_the_sources_merged_before_an_error_are_saved(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = perturbed(tiny_model("vit"), seed=3)
    broken.get_parameter("classifier.weight").data.fill_(
        float("nan")
    )  # a plan reads no weights, so it does not notice
    saved(broken, world / "broken")
    output = world / "merged"
    assert main(["merge", write_recipe(world, sources=["fine-1", "broken", "fine-2"]), "--output", str(output)]) == 1
    printed = capsys.readouterr()
    assert f"saved the merge so far, 1 of 3 sources: {output}" in printed.out
    assert "classifier.weight holds NaN or infinite weights" in printed.err
    AutoModelForImageClassification.from_pretrained(output)
    report = json.loads((output / "grasp_report.json").read_text())
    assert [Path(step["source"]).name for step in report["steps"]] == ["fine-1"]


@pytest.mark.parametrize(("splits", "judges"), [(("test",), "test data"), ((), "evaluation data")])
def test_a_merge_with_its_control(
    splits: tuple[str, ...], judges: str, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_images(world / "own", {"train": 4, "validation": 6, **dict.fromkeys(splits, 5)})
    settings = {"finetune_epochs": 0, "final_epochs": 2, "order": "given"}
    recipe = write_recipe(world, sources=["fine-1"], data={**DATA, "data_dir": "own"}, method="average", **settings)
    assert main(["merge", recipe, "--output", str(world / "merged"), "--control"]) == 0
    printed = capsys.readouterr().out
    controls = json.loads((world / "merged" / "grasp_report.json").read_text())["run"]["controls"]
    assert [own["name"] for own in controls] == [ALONE, BEST_SOURCE, PLACEBO]
    assert controls[1]["alone"]["loss"] != controls[0]["alone"]["loss"] != controls[2]["alone"]["loss"]
    control = controls[0]
    assert control["validated_by"] == judges
    samples = len(LABELS) * (5 if splits else 6)
    assert control["change"]["samples"] == samples and control["change"]["loss"] != 0
    card = (world / "merged" / "README.md").read_text()
    for text in (" ".join(printed.split()), card):  # the terminal wraps long lines
        assert f"from fine-tuning alone to the merge, loss {control['alone']['loss']:.3f} -> " in text
        assert f"on {samples} samples of the {judges}" in text
        assert ("these samples also chose what was kept" in text) is (judges == "evaluation data")

    merged, data = GraspMerger.from_pretrained(str(world / "merged")), prepare(Recipe.from_yaml(recipe))[2]
    judged = data.test if splits else data.validation
    assert merged.evaluate(judged, data_collator=data.collator) == pytest.approx(control["merged"], rel=1e-4)


@pytest.mark.parametrize("final_epochs", [0, 2])
def test_a_strict_merge_exits_with_3_unless_the_sources_help(
    final_epochs: int, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {
        "gate": True,
        "initial_epochs": 0,
        "finetune_epochs": 0,
        "final_epochs": final_epochs,
        "order": "given",
    }
    recipe = write_recipe(world, sources=["fine-1"], method="average", **settings)
    code = main(["merge", recipe, "--output", str(world / "merged"), "--strict"])
    if not final_epochs:
        assert code == 1 and "--strict: nothing would compare the merge" in capsys.readouterr().err
        return
    record = read_record(world / "merged")
    assert record and record.run.verdict in (Reason.HELPS, Reason.HARMS, Reason.NO_EFFECT)
    assert code == (0 if record.run.verdict == Reason.HELPS else 3)


@pytest.mark.parametrize("verdict", [Reason.HELPS, Reason.HARMS, Reason.NO_EFFECT, Reason.NONE])
def test_the_exit_code_of_a_strict_merge_is_its_verdict(
    verdict: Reason, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RunReport, "verdict", verdict)
    tuned = {"gate": True, "initial_epochs": 0, "finetune_epochs": 0, "final_epochs": 1}
    recipe = write_recipe(world, sources=["fine-1"], method="average", order="given", **tuned)
    command = ["merge", recipe, "--output", str(world / "merged")]
    assert main([*command, "--strict"]) == (0 if verdict == Reason.HELPS else 3)
    said = f"--strict: against fine-tuning alone: {verdict or 'no source is in the model'}"
    assert (said in capsys.readouterr().err) is (verdict != Reason.HELPS)
    assert (world / "merged" / "model.safetensors").exists(), "the merge is saved all the same"
    assert main(command) == 0


def test_a_strict_merge_on_learned_labels_needs_other_samples(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**DATA, "data_dir": str(write_images(world / "own", {"train": 4}))}
    tuned = {"gate": True, "initial_epochs": 0, "finetune_epochs": 0, "final_epochs": 1}
    settings = {"method": "average", "order": "given", "data": data, **tuned}
    assert main(["merge", write_recipe(world, sources=["fine-1"], **settings), "--output", str(world / "one")]) == 0
    again = write_recipe(world, sources=["fine-2"], base_model="one", **settings)
    assert main(["merge", again, "--output", str(world / "two"), "--strict"]) == 1
    assert "or a split 'validation', because the model has learned the labels" in capsys.readouterr().err
    assert not (world / "two").exists()


def test_a_control_needs_samples_and_epochs(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {**DATA, "data_dir": str(write_images(world / "own", {"train": 4}))}
    recipe = write_recipe(world, sources=["fine-1"], data=data)
    assert main(["merge", recipe, "--output", str(world / "merged"), "--control"]) == 1
    assert "--control: expected data with the splits 'train' and 'test'" in capsys.readouterr().err
    untuned = write_recipe(world, sources=["fine-1"], finetune_epochs=0)
    assert main(["merge", untuned, "--output", str(world / "merged"), "--control"]) == 1
    assert "--control: expected epochs of fine-tuning" in capsys.readouterr().err
    assert not (world / "merged").exists()


def test_a_merge_that_cannot_be_evaluated_is_saved(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: Any, **settings: Any) -> None:
        raise DataError("a test image is broken")

    monkeypatch.setattr(GraspMerger, "evaluate", fails)
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 1
    printed = capsys.readouterr()
    assert "a test image is broken" in printed.err
    assert f"saved the merge so far, 1 of 1 sources: {world / 'merged'}" in printed.out
    assert AutoModelForImageClassification.from_pretrained(world / "merged")


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_merge_is_saved_elsewhere_if_the_output_folder_is_full(
    elsewhere: bool, world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = GraspMerger.save_pretrained
    (world / "work").mkdir()
    monkeypatch.chdir(world / "work")

    def full(self: GraspMerger, folder: Path) -> None:
        if not elsewhere or Path(folder) == world / "merged":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, folder)

    monkeypatch.setattr(GraspMerger, "save_pretrained", full)
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 1
    printed = capsys.readouterr()
    assert f"could not be saved in '{world / 'merged'}': [Errno 28] No space left on device" in printed.err
    where = "it is in 'merged'" if elsewhere else "it could not be saved"
    assert f"error: the merged model is not in '{world / 'merged'}'; {where}, see the errors above" in printed.err
    assert ("saved: merged" in printed.out) is elsewhere
    if elsewhere:
        assert AutoModelForImageClassification.from_pretrained(world / "work" / "merged")


def test_the_first_error_is_reported_even_if_the_merge_cannot_be_saved(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: GraspMerger, folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails(*arguments: Any, **settings: Any) -> None:
        raise DataError("a test image is broken")

    monkeypatch.setattr(GraspMerger, "save_pretrained", full)
    monkeypatch.setattr(GraspMerger, "evaluate", fails)
    monkeypatch.chdir(world)
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: a test image is broken"


def test_the_configuration_of_a_merge_is_a_recipe_again(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = world / "merged", world / "again"
    assert main(["merge", str(world / "recipe.yaml"), "--output", str(first)]) == 0
    assert main(["merge", str(first / "grasp_config.yaml"), "--output", str(second)]) == 0
    models = [AutoModelForImageClassification.from_pretrained(folder) for folder in (first, second)]
    for name, value in models[0].state_dict().items():
        assert torch.equal(value, models[1].state_dict()[name]), name


def test_an_override_without_a_value_is_wrong_usage(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^2$"):
        main(["plan", str(world / "recipe.yaml"), "gate"])
    assert "expected key=value, got: gate" in capsys.readouterr().err


def test_a_merge_that_cannot_be_saved_leaves_the_earlier_one(world: Path) -> None:
    """Otherwise the record of one merge could describe the weights of another."""
    merger = GraspMerger.from_pretrained(str(world / "base"), config=GraspConfig(**{**NO_TUNING, "method": "average"}))
    merger.merge([str(world / "fine-1")])
    merger.save_pretrained(world / "merged")
    merger.merge([str(world / "fine-2")])
    limit = (world / "merged" / "model.safetensors").stat().st_size // 2
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for folder, steps in {"merged": 1, "new": None}.items():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
        try:
            with pytest.raises((OSError, SafetensorError), match="File too large"):
                merger.save_pretrained(world / folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        record = read_record(world / folder)
        assert (record and len(record.steps)) == steps and not [*world.glob(".grasp_hf-saving-*")]
        merger.save_pretrained(world / folder)
        again = GraspMerger.from_pretrained(str(world / folder))
        assert len(again.report.steps) == 2
        ours, theirs = movable_tensors(again.model), movable_tensors(merger.model)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_merge_that_was_not_fully_saved_in_place_is_refused(
    world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory cannot be exchanged, so that its files are written one by one."""
    merger = GraspMerger.from_pretrained(str(world / "base"), config=GraspConfig(**{**NO_TUNING, "method": "average"}))
    merger.merge([str(world / "fine-1")])
    merger.save_pretrained(world / "merged")
    monkeypatch.chdir(world / "merged")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (Path("model.safetensors").stat().st_size // 2, before[1]))
    try:
        with pytest.raises((OSError, SafetensorError), match="File too large"):
            merger.save_pretrained(".")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert main(["push", str(world / "merged"), "org/never"]) == 1
    assert f"the merge in '{world / 'merged'}' was not saved completely" in capsys.readouterr().err


def test_a_merge_in_the_folder_where_it_is_saved(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (world / "here").mkdir()
    monkeypatch.chdir(world / "here")
    merger = GraspMerger.from_pretrained(str(world / "base"), config=GraspConfig(**{**NO_TUNING, "method": "average"}))
    merger.merge([str(world / "fine-1")])
    merger.save_pretrained(".")
    assert "\n# here\n" in Path("README.md").read_text()


RUN = "from grasp_hf.cli import run; run()"
LONG: dict[str, Any] = {"finetune_epochs": 0, "final_epochs": 2}  # all training is at the end


def merging(world: Path, *options: str, max_steps: int = -1, **settings: Any) -> subprocess.Popen[str]:
    """Start a merge of one source in a new process."""
    training = {"use_cpu": True, "max_steps": max_steps}
    recipe = write_recipe(world, sources=["fine-1"], training_arguments=training, **settings)
    command = [sys.executable, "-c", RUN, "merge", recipe, "--output", "merged", *options]
    return subprocess.Popen(command, cwd=world, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_job_keeps_its_state(number: signal.Signals, world: Path) -> None:
    """Schedulers and containers stop a job by SIGTERM; a lack of memory or a lost machine is like SIGKILL."""
    with merging(world, **LONG, max_steps=4000) as process:
        assert process.stdout and any(line.startswith("1/1 fine-1: ") for line in process.stdout)
        process.send_signal(number)
        printed, errors = process.communicate(timeout=60)
    assert not (world / "merged").exists(), "the output is the whole merge or nothing"
    if number == signal.SIGKILL:
        assert process.returncode == -9
        return
    assert process.returncode == 130 and errors.endswith("interrupted\n"), errors
    kept = f"what was done is kept in '{world / 'merged.partial'}': the same command goes on after 1 of 1 sources"
    assert kept in printed
    other = write_recipe(world, sources=["fine-1"], **LONG)
    done = subprocess.run(
        [sys.executable, "-c", RUN, "merge", other, "--output", "merged"], cwd=world, capture_output=True, text=True
    )
    assert done.returncode == 1 and "holds the state of another merge" in done.stderr
    assert "- config.training_arguments.max_steps: the state has 4000, this merge null" in done.stderr
    with merging(world, "--fresh", **LONG, max_steps=4) as process:
        process.communicate(timeout=120)
    assert process.returncode == 0 and not (world / "merged.partial").exists()
    AutoModelForImageClassification.from_pretrained(world / "merged")


def test_a_second_merge_into_a_folder_is_told_of_the_first(world: Path) -> None:
    with merging(world, **LONG, max_steps=100_000) as process:
        assert process.stdout and any(line.startswith("1/1 fine-1: ") for line in process.stdout)
        with merging(world) as second:
            _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"another process is merging with the state in '{world / 'merged.partial'}'" in errors
        process.kill()


def test_an_earlier_merge_survives_a_kill_while_the_next_is_saved(world: Path) -> None:
    """At any moment the folder holds one merge, with the record and the weights of each other."""
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 0
    before = {path.name: path.read_bytes() for path in (world / "merged").iterdir()}
    (world / "merged" / "notes.txt").write_text("mine")
    with merging(world, final_epochs=2) as process:
        while not [*world.glob(".grasp_hf-saving-*/merge/model.safetensors")]:
            assert process.poll() is None
            time.sleep(0.001)
        process.kill()
        process.communicate(timeout=60)
    after = {path.name: path.read_bytes() for path in (world / "merged").iterdir() if path.name != "notes.txt"}
    assert after == before or after["model.safetensors"] != before["model.safetensors"]
    record = read_record(world / "merged")
    assert record and record.run.complete
    with merging(world, final_epochs=2) as process:
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and ("the merge was finished before" in printed or after != before)
    assert (world / "merged" / "notes.txt").read_text() == "mine", "files of others stay"
    assert not [*world.glob(".grasp_hf-saving-*")]


def test_the_score_on_the_test_data_is_recorded(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 0
    record = read_record(world / "merged")
    assert record and record.run.test.keys() == {"loss", "accuracy"}
    line = f"test: loss {record.run.test['loss']:.3f}, accuracy {record.run.test['accuracy']:.3f}"
    assert line in capsys.readouterr().out and line in (world / "merged" / "README.md").read_text()
    rows = ModelCard.load(world / "merged" / "README.md").data.eval_results
    assert {row.metric_type: row.metric_value for row in rows} == pytest.approx(record.run.test, abs=1e-4)
    count = record.run.data["test"]["samples"]
    assert {row.dataset_name for row in rows} == {f"test data, which chose nothing ({count} samples)"}
    assert count == sum(1 for _ in (world / "images" / "test").glob("*/*"))


def test_a_broken_picture_in_the_test_split_loses_no_merge(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = world / "images" / "test" / LABELS[0] / "0.png"
    broken.write_bytes(broken.read_bytes()[:50])
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 1
    printed = capsys.readouterr()
    assert f"error: the picture '{broken}' cannot be read" in printed.err
    assert "saved the merge so far, 1 of 1 sources" in printed.out


def test_samples_in_two_splits_cause_a_warning(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = world / "images"
    shutil.copy(images / "train" / LABELS[0] / "0.png", images / "train" / LABELS[0] / "again.png")
    shutil.copy(images / "train" / LABELS[0] / "1.png", images / "test" / LABELS[0] / "same.png")
    assert main(["merge", write_recipe(world, sources=["fine-1"]), "--output", str(world / "merged")]) == 0
    told = (
        "1 samples of the split 'train' are duplicates; 1 samples of the split 'test' also occur in the split 'train'"
    )
    assert f"{told}; the reported losses will be too low. Remove the duplicates" in capsys.readouterr().err


def test_a_source_whose_folder_has_an_equals_sign(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(world, **AVERAGE, sources=["fine-1"], initial_epochs=0)
    assert main(["merge", recipe, "--output", str(world / "merged")]) == 0
    source = copied(str(world / "fine-2"), world / "lr=1e-5")
    assert main(["append", str(world / "merged"), str(source), "--output", str(world / "more")]) == 0
    record = read_record(world / "more")
    assert record and [step.name for step in record.steps] == ["fine-1", "lr=1e-5"]


def test_a_file_instead_of_the_folder_of_a_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["demo", "--output", str(tmp_path / "file")]) == 1
    assert f"error: '{tmp_path / 'file'}' is a file; name a new folder with --output" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "recipe.yaml", "--output", "out", "--no-check", "seed=1"],
        ["append", "org/merged", "org/source", "--output", "out", "--no-check", "seed=1"],
        ["rank", "--no-check", "recipe.yaml", "seed=1"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_check_is_an_override(arguments: list[str]) -> None:
    assert sorted(parse(arguments, "0").overrides) == ["check=false", "seed=1"]
