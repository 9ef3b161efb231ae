"""Runs the inputs of a hostile kind: through the plan, and through a merge that must leave the target as it was."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import tests.hostile
from grasp_hf import GraspConfig, GraspError, GraspMerger
from grasp_hf.config.recipe import Recipe
from grasp_hf.runs.plan import plan
from tests.support.models import NO_TUNING, perturbed, saved, saved_adapter, tiny_model

SECONDS, BYTES = 10.0, 2_000_000_000
CONFIG = GraspConfig(method="average", **NO_TUNING)
MESSAGE = 2_500  # characters of the longest message

Damage = Callable[[Path], object]


def modules() -> dict[str, ModuleType]:
    """Return the modules of all kinds, by name."""
    names = [found.name for found in pkgutil.iter_modules(tests.hostile.__path__)]
    loaded = {name: importlib.import_module(f"tests.hostile.{name}") for name in names if name != "__main__"}
    return {name: module for name, module in loaded.items() if hasattr(module, "SAYS")}


@dataclass
class Bench:
    """Good models of one kind in a folder: a base, a source, and a target that was loaded from the base."""

    folder: Path
    kind: str = "bert"
    base: Path = field(init=False)
    good: Path = field(init=False)

    def __post_init__(self) -> None:
        model = "bert" if self.kind == "adapter" else self.kind
        self.base, self.good = self.folder / "base", self.folder / "good"
        saved(tiny_model(model), self.base)
        if self.kind == "adapter":
            saved_adapter(tiny_model(model), str(self.base), self.good, target_modules=["query", "value"])
        else:
            saved(perturbed(tiny_model(model), seed=1), self.good)
        self.merger = GraspMerger.from_pretrained(str(self.base), config=CONFIG)
        self.before = {name: tensor.clone() for name, tensor in self.merger.model.state_dict().items()}

    @contextmanager
    def hostile(self, damage: Damage) -> Iterator[Path]:
        """Yield a copy of the good source after `damage`, and remove it at the end."""
        folder = self.folder / "hostile"
        shutil.copytree(self.good, folder)
        try:
            damage(folder)
            yield folder
        finally:
            folder.chmod(0o755)
            shutil.rmtree(folder)

    def plan(self, folder: Path) -> list[str]:
        """Return the problems of a hostile source in the plan; its neighbours have none."""
        recipe = Recipe(base_model=str(self.base), sources=[str(self.good), str(folder)], config=CONFIG)
        base, good, hostile = plan(recipe)
        assert not base.problems and not good.problems, (base.problems, good.problems)
        return hostile.problems

    def merge(self, folder: Path) -> str:
        """Return the error of a merge of a hostile source; empty if it was merged. The target comes back unchanged."""
        try:
            self.merger.merge([str(folder)])
        except GraspError as error:
            text = str(error)
        else:
            text = ""
            self.merger.model.load_state_dict(self.before)
            self.merger.report.steps.clear()
        after = self.merger.model.state_dict()
        assert all(torch.equal(after[name], self.before[name]) for name in self.before), "the target has changed"
        assert len(text) <= MESSAGE, f"a message of {len(text)} characters"
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e]", text), "control characters"
        return text


@contextmanager
def limited() -> Iterator[None]:
    """Fail if the block takes too long, or more memory than allowed."""
    began, memory = time.perf_counter(), peak_bytes()
    yield
    seconds, grown = time.perf_counter() - began, peak_bytes() - memory
    assert seconds < SECONDS, f"{seconds:.1f} s"
    assert grown < BYTES, f"{grown / 1e9:.1f} GB"


def peak_bytes() -> int:
    """Return the largest memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def check(module: ModuleType, bench: Bench, name: str) -> tuple[list[str], str]:
    """Check one input of a kind, and return the problems in its plan and the error of its merge."""
    with bench.hostile(module.INPUTS[name]) as folder:
        with limited():
            problems = bench.plan(folder)
        with limited():
            error = bench.merge(folder)
    assert re.search(module.ERROR, error), error or "it was merged"
    if not getattr(module, "ONLY_MERGE", False):  # the plan reads no weights
        assert any(re.search(module.ERROR, problem) for problem in problems), problems
    return problems, error


def main(module: ModuleType | None = None) -> None:
    """Print what each input of a kind gets; without a kind, the table of all kinds."""
    if module is None:
        print("| kind | inputs | an error |\n|---|---|---|")
        for name, kind in modules().items():
            what = " ".join(str(kind.__doc__).split()).rstrip(".")
            print(f"| {what} ([`{name}`](hostile/{name}.py)) | {len(kind.INPUTS)} | {kind.SAYS} |")
        return
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), getattr(module, "MODEL", "bert"))
        for name in module.INPUTS:
            print(f"{name}: {check(module, bench, name)[1]}")


# Ways to damage a folder


def text(file: str, content: str) -> Damage:
    """Replace the content of a file."""
    return lambda folder: (folder / file).write_text(content, encoding="utf-8")


def raw(file: str, content: bytes) -> Damage:
    """Replace the content of a file by bytes."""
    return lambda folder: (folder / file).write_bytes(content)


def keys(file: str, **values: Any) -> Damage:
    """Change keys of a JSON file."""

    def change(folder: Path) -> None:
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**content, **values}))

    return change


def pickled(file: str, value: Any) -> Damage:
    """Replace the weights by a pickled file."""

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        torch.save(value, folder / file)

    return change


def safetensors(header: Mapping[str, Any] | bytes, body: bytes = b"") -> Damage:
    """Replace the weights by a file with this header."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()

    def change(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            path.write_bytes(len(content).to_bytes(8, "little") + content + body)

    return change


if __name__ == "__main__":
    main()
