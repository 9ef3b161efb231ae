"""Merge many fine-tuned models into one, one at a time, guided by gradients of your own data."""

from typing import TYPE_CHECKING, Any

from .config.grasp import GraspConfig
from .config.recipe import Recipe
from .errors import GraspError, IncompatibleSourceError
from .merger import GraspMerger, merge_pretrained
from .methods.copy import gradient_alignment
from .record.report import MergeReport, StepReport

if TYPE_CHECKING:
    from .comparison.run import compare

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


def __getattr__(name: str) -> Any:
    """Import `compare` where it is used: with it comes datasets, which not everyone needs to wait for."""
    if name == "compare":
        from .comparison.run import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
