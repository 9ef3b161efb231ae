"""What is imported when: help and wrong usage need no torch, and the public names come at their first use."""

import ast
import pickle
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import grasp_hf

HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "scipy", "matplotlib", "huggingface_hub", "numpy"}
# Everything but `compare`. `transformers` itself is imported, but not its code of models.
LIGHT_NAMES = [name for name in grasp_hf.__all__ if name != "compare"]
LATE = {"transformers.modeling_utils", "peft", "datasets", "matplotlib", "sklearn"}


def imported_by(code: str, *arguments: str) -> set[str]:
    """Return the names of all modules that a process has imported when it has run `code`, however it ends."""
    script = f"import atexit, sys\natexit.register(lambda: print('modules:', *sys.modules))\n{code}"
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr, done.stderr
    return set(done.stdout.rpartition("modules: ")[2].split())


@pytest.mark.parametrize(
    "arguments",
    [["-h"], ["merge", "-h"], ["compare", "-h"], ["--version"], [], ["blend"], ["merge", "recipe.yaml"]],
    ids=lambda arguments: " ".join(arguments) or "nothing",
)
def test_help_and_wrong_usage_import_nothing_heavy(arguments: list[str]) -> None:
    found = imported_by("from grasp_hf.cli import run; run()", *arguments)
    assert "grasp_hf.config.arguments" in found and not found & HEAVY


def test_a_mistake_in_a_recipe_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("sources: [a, b]\ngate: 1\n")
    found = imported_by("from grasp_hf.cli import run; run()", "plan", str(tmp_path / "recipe.yaml"))
    assert "grasp_hf.config.recipe" in found and not found & HEAVY


def test_the_package_imports_nothing_heavy() -> None:
    found = imported_by("import grasp_hf; dir(grasp_hf)")
    assert "grasp_hf" in found and not found & HEAVY


def test_the_public_names_import_no_model_code() -> None:
    found = imported_by(f"from grasp_hf import {', '.join(LIGHT_NAMES)}")
    assert "grasp_hf.merger" in found and not found & LATE


def test_every_public_name_is_that_of_its_module() -> None:
    assert grasp_hf._MODULES.keys() == {*grasp_hf.__all__}
    for name, module in grasp_hf._MODULES.items():
        value = getattr(grasp_hf, name)
        assert value is getattr(import_module(f"grasp_hf.{module}"), name)
        assert value.__module__ == f"grasp_hf.{module}"


def test_type_checkers_see_the_same_names() -> None:
    blocks = [node for node in ast.parse(Path(grasp_hf.__file__).read_text()).body if isinstance(node, ast.If)]
    imports = [node for node in blocks[0].body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == grasp_hf._MODULES


def test_the_names_are_listed_before_they_are_imported() -> None:
    code = "import sys, grasp_hf; print(*dir(grasp_hf)); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    names, torch_is_imported = done.stdout.splitlines()
    assert {*grasp_hf.__all__, "__version__"} <= set(names.split()) and torch_is_imported == "False"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'grasp_hf' has no attribute 'GraspMergr'"):
        assert grasp_hf.GraspMergr  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="cannot import name 'GraspMergr' from 'grasp_hf'"):
        from grasp_hf import GraspMergr  # type: ignore[attr-defined]  # noqa: F401


@pytest.mark.parametrize("name", grasp_hf.__all__)
def test_every_public_name_can_be_pickled(name: str) -> None:
    value = getattr(grasp_hf, name)
    assert pickle.loads(pickle.dumps(value)) is value


def test_documentation_shows_every_public_name() -> None:
    done = subprocess.run([sys.executable, "-m", "pydoc", "grasp_hf"], capture_output=True, text=True, check=True)
    assert all(f"class {name}(" in done.stdout for name in ("GraspConfig", "GraspMerger", "Recipe", "StepReport"))
    assert all(f"    {name}(" in done.stdout for name in ("compare", "gradient_alignment", "merge_pretrained"))
