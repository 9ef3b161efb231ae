"""Merge many fine-tuned models into one, one at a time, guided by gradients of your own data."""

from .config import GraspConfig, Recipe
from .errors import GraspError, IncompatibleSourceError
from .measure import gradient_alignment
from .merger import GraspMerger, merge_pretrained
from .report import MergeReport, StepReport

__version__ = "0.1.0"

__all__ = [
    "GraspConfig",
    "GraspError",
    "GraspMerger",
    "IncompatibleSourceError",
    "MergeReport",
    "Recipe",
    "StepReport",
    "gradient_alignment",
    "merge_pretrained",
]
