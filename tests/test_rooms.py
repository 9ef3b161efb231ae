"""The rooms of the package: imports run one way, downwards, and each room says what it is for."""

import ast
from pathlib import Path

import pytest

import grasp_hf

PACKAGE = Path(grasp_hf.__file__).parent
# From the top. A module may import from its own room and from those below it.
ROOMS = (
    "cli",
    "comparison",
    "demo",
    "runs",
    "merger",
    "merging",
    "methods",
    "teaching",
    "validation",
    "data",
    "sources",
    "record",
    "models",
    "hub",
    "config",
    "tensors",
    "files",
    "internals",
    "errors",
)
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def name_of(path: Path) -> str:
    """Return the name of a module within the package, such as `hub.client`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """Return the modules of the package that a module imports, also late ones, and ones for types only."""
    parts = ("grasp_hf", *path.relative_to(PACKAGE).with_suffix("").parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            origin = [*parts[: len(parts) - node.level], *(node.module or "").split(".")] if node.level else []
            module = ".".join(filter(None, origin)) if node.level else str(node.module)
            folder = PACKAGE.joinpath(*module.split(".")[1:])
            names = [f"{module}.{alias.name}" for alias in node.names if (folder / f"{alias.name}.py").is_file()]
            found |= {*names} if folder.is_dir() else {module}
    return {module.removeprefix("grasp_hf.") for module in found if module.startswith("grasp_hf.")}


def test_every_module_is_in_a_room() -> None:
    assert {name_of(path).partition(".")[0] for path in MODULES} == {*ROOMS}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    own = name_of(path).partition(".")[0]
    above = {module for module in imports_of(path) if ROOMS.index(module.partition(".")[0]) < ROOMS.index(own)}
    assert not above, f"{own} lies below what it imports"


def test_no_modules_import_each_other_in_a_circle() -> None:
    graph = {name_of(path): imports_of(path) for path in MODULES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module) :], module])}"
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("folder", sorted(path.parent for path in MODULES if path.name == "__init__.py"), ids=name_of)
def test_a_room_is_named_in_one_line_and_passes_nothing_on(folder: Path) -> None:
    lines = (folder / "__init__.py").read_text().splitlines()
    assert len(lines) == 1 and ast.get_docstring(ast.parse(lines[0]))
