"""Runs everything that a new user runs: the demo, every recipe, every notebook, the examples of the README."""

import json
import os
import re
import shutil
from pathlib import Path

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from transformers import AutoModelForImageClassification

import grasp_hf
from grasp_hf import Recipe
from grasp_hf.cli import main
from grasp_hf.demo.run import run_demo
from grasp_hf.errors import OutputExistsError
from grasp_hf.record.saving import REPORT_FILE
from tests.support.processes import made_once

ROOT = Path(__file__).parent.parent
# The recipes of the benchmarks need models and data that `tests.benchmarks` makes.
RECIPES = sorted(path for path in ROOT.glob("recipes/**/*.yaml") if path.parent.name != "benchmarks")
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))
README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a folder with the demo, where the recipes expect it, and the printed text of the demo."""

    def make(folder: Path) -> None:
        shutil.copytree(ROOT / "recipes", folder / "recipes")
        (folder / "printed.txt").write_text(run_demo(folder / "grasp-demo"))

    folder = made_once(tmp_path_factory, "demo", make)
    return folder, (folder / "printed.txt").read_text()


def test_the_demo_shows_every_source_every_control_and_an_honest_verdict(demo: tuple[Path, str]) -> None:
    folder, text = demo
    rows = re.findall(r"^\| (\S.*?) +\| (0\.\d{3}) ± 0\.\d{3} ", text, flags=re.MULTILINE)
    names = [name for name, _ in rows]
    assert [name.split()[0] for name in names] == ["source"] * 5 + ["fine-tuning"] * 2 + ["the", "grasp_hf,"]
    assert sum("(adapter)" in name for name in names) == 1
    scores = {name: float(score) for name, score in rows}
    ours = scores.pop("grasp_hf, default")
    best = max(scores, key=scores.__getitem__)
    verdicts = {True: "\ngrasp_hf is best, ", False: f"\n{best} is best; grasp_hf is "}
    equal = f"grasp_hf and {best} are equally good"
    assert (equal if ours == scores[best] else verdicts[ours > scores[best]]) in text
    assert max(map(len, text.replace(str(folder), "").splitlines())) <= 100
    assert ours > scores["source scanned (full)"] > 0.1
    model = AutoModelForImageClassification.from_pretrained(folder / "grasp-demo/merged")
    assert sorted(model.config.label2id) == sorted(path.name for path in (folder / "grasp-demo/data/test").iterdir())


def test_the_demo_refuses_a_folder_with_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="holds something else"):
        run_demo(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs_by_the_command_in_its_header(
    recipe: Path, demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo[0])
    command = re.search(r"^#   grasp-hf (.*)$", recipe.read_text(), flags=re.MULTILINE)
    assert command, "a recipe begins with the command that runs it"
    name, path, *rest = command[1].split()
    assert (name, path) == ("merge", str(recipe.relative_to(ROOT)))
    assert main(["plan", path]) == 0
    output = Path(recipe.stem)
    assert main([name, path, *rest[:-1], str(output)]) == 0
    printed = capsys.readouterr().out
    sources = yaml.safe_load(recipe.read_text())["sources"]
    expected = [Path(source).name for source in (sources if "base_model" in recipe.read_text() else sources[1:])]
    ranking = json.loads((output / REPORT_FILE).read_text())["run"]["ranking"]
    assert sorted(Path(row["reference"]).name for row in ranking) in ([], sorted(expected))
    order = [Path(row["reference"]).name for row in ranking] or expected
    assert re.findall(r"^\d/\d (\w+): ", printed, flags=re.MULTILINE) == order
    score = r"^- test: loss \d+\.\d+, accuracy 0\.\d+, \d+ samples, which chose nothing$"
    assert re.search(score, printed, flags=re.MULTILINE)
    assert max(map(len, printed.splitlines())) <= 100
    assert (output / REPORT_FILE).exists()
    AutoModelForImageClassification.from_pretrained(output)


def test_the_recipes_hold_every_kind_of_source(demo: tuple[Path, str]) -> None:
    kinds = {
        recipe.stem: {
            "adapter"
            if (demo[0] / recipe.parent.relative_to(ROOT) / source / "adapter_config.json").exists()
            else "full"
            for source in yaml.safe_load(recipe.read_text())["sources"]
        }
        for recipe in RECIPES
    }
    assert kinds == {"full": {"full"}, "lora": {"adapter"}, "mixed": {"full", "adapter"}, "paper": {"full"}}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_runs(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept under version control"
    assert "colab-badge.svg" in notebook.cells[0].source
    assert f"/blob/main/notebooks/{path.name})" in notebook.cells[0].source, "the badge opens another notebook"
    kernel = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute(env=kernel)
    for cell in notebook.cells:
        if "plt.show()" in cell.source:
            assert [output for output in cell.outputs if "image/png" in output.get("data", {})], "no figure was drawn"
    if path.stem == "quick_start":
        last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
        assert "'score'" in last.outputs[-1]["data"]["text/plain"]
        assert (tmp_path / "merged/model.safetensors").exists()


def test_the_explanation_uses_public_names_only() -> None:
    notebook = nbformat.read(ROOT / "notebooks/how_it_works.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imported = re.findall(r"^(?:from|import) grasp_hf\b(.*)$", code, flags=re.MULTILINE)
    assert imported
    for names in imported:
        assert set(names.removeprefix(" import ").split(", ")) <= set(grasp_hf.__all__)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250 and len(README.encode()) <= 14_000


def test_the_readmes_python_runs_and_prints_what_the_readme_shows(
    demo: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (printed,) = re.findall(r"It prints:\n\n```\n(.*?)```", README, flags=re.DOTALL)
    monkeypatch.chdir(demo[0])
    capsys.readouterr()
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    found = capsys.readouterr().out

    def shape(text: str) -> list[str]:
        """Return the lines that every run has, without their numbers: start, head of the table, answer."""
        lines = [line for line in text.splitlines() if not line.startswith(("- ", "  ", "| ", "|-"))]
        head = next(line for line in text.splitlines() if line.startswith("| source"))
        return [re.sub(r"[\d.]+", "0", line) for line in [*lines, re.sub(" +", " ", head)] if line]

    assert shape(found) == shape(printed)
    assert float(re.findall(r"^- test: .*accuracy ([\d.]+)", found, flags=re.MULTILINE)[0]) > 0.8
    assert max(map(len, [*found.splitlines(), *printed.splitlines()])) <= 100


def test_the_readmes_commands_run(
    demo: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = re.findall(r"^grasp-hf (.*?) *(?:  #.*)?$", README, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["plan", "rank", "merge", "compare", "append"]
    for name in ("recipes", "grasp-demo"):
        (tmp_path / name).symlink_to(demo[0] / name)
    monkeypatch.chdir(tmp_path)
    for command in commands:
        assert main(command.split()) == 0, command
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100, command
    AutoModelForImageClassification.from_pretrained("merged-2")


def test_the_readmes_python_uses_public_names_only() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    for block in blocks:
        for names in re.findall(r"^from grasp_hf import (.*)$", block, flags=re.MULTILINE):
            assert set(names.split(", ")) <= set(grasp_hf.__all__)


def test_the_readmes_recipes_are_recipes() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    plain, adapters = (Recipe.from_dict(yaml.safe_load(block)).config for block in blocks)
    assert plain.training_arguments == {"learning_rate": 2.0e-5}
    assert adapters.adapts and adapters.rank == 32


def test_the_readmes_commands_are_the_ones_that_are_checked() -> None:
    commands = re.findall(
        r"^python -m pip install -c .ci/constraints.txt -e '.\[(\w+)\]' && (.*)$", README, re.MULTILINE
    )
    assert commands == [("demo", "grasp-hf demo"), ("test", "python -m pytest -n auto")]
