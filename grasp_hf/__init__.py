"""Merge many fine-tuned models into one, one at a time, guided by gradients of your own data."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison.run import compare
    from .config.grasp import GraspConfig
    from .config.recipe import Recipe
    from .errors import GraspError, IncompatibleSourceError
    from .merger import GraspMerger, merge_pretrained
    from .methods.copy import gradient_alignment
    from .record.report import MergeReport
    from .record.step import StepReport

__version__ = "0.1.0"

__all__ = [
    "GraspConfig",
    "GraspError",
    "GraspMerger",
    "IncompatibleSourceError",
    "MergeReport",
    "Recipe",
    "StepReport",
    "compare",
    "gradient_alignment",
    "merge_pretrained",
]

# Each name is imported at its first use: torch and transformers take seconds, and help texts do not need them.
_MODULES = {
    "GraspConfig": "config.grasp",
    "GraspError": "errors",
    "GraspMerger": "merger",
    "IncompatibleSourceError": "errors",
    "MergeReport": "record.report",
    "Recipe": "config.recipe",
    "StepReport": "record.step",
    "compare": "comparison.run",
    "gradient_alignment": "methods.copy",
    "merge_pretrained": "merger",
}


if not TYPE_CHECKING:  # a type checker that sees this function accepts every name

    def __getattr__(name: str) -> Any:
        """Import a public name from its module (PEP 562)."""
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f".{_MODULES[name]}", __name__), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    """List the public names, also those that are not imported yet."""
    return sorted({*globals(), *__all__})
