"""The temporary files of a merge."""

import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .mapped import MappedTensors


class Scratch:
    """The temporary files of a merge: earlier weights of the target, and buffers for gradients.

    Each file is made when it is first needed, and used again by every later step.

    Args:
        directory: Folder for the files.
        like: The target's tensors by name; their shapes and dtypes are those of the files. No value is copied.

    Attributes:
        directory: Folder of the files.
        kept: Objects that a method keeps from one source to the next, by a name of its choice. They may use the files
            `line`. A fine-tuning needs these files for itself, so `make_room` removes the objects.
    """

    def __init__(self, directory: Path, like: Mapping[str, Tensor]) -> None:
        self.directory = directory
        self.kept: dict[str, Any] = {}
        self._like = like
        self._source_folder = directory / "source"
        self._parameters = {name: t for name, t in like.items() if isinstance(t, torch.nn.Parameter)}

    @cached_property
    def start(self) -> MappedTensors:
        """Buffer for the target's tensors before the present step; the caller fills it."""
        return MappedTensors(self.directory / "start", self._like)

    @cached_property
    def base(self) -> MappedTensors:
        """Buffer for the target's tensors before the first step of the merge; the caller fills it."""
        return MappedTensors(self.directory / "base", self._like)

    @cached_property
    def gradients(self) -> MappedTensors:
        """Buffer for the gradient of each parameter."""
        return MappedTensors(self.directory / "gradients", self._parameters)

    @cached_property
    def source_gradients(self) -> MappedTensors:
        """Buffer for a second set of gradients."""
        return MappedTensors(self.directory / "source-gradients", self._parameters)

    @cached_property
    def line(self) -> tuple[MappedTensors, MappedTensors]:
        """Buffers for the target's tensors before a fine-tuning, and for the mean of its fold models."""
        before, after = (MappedTensors(self.directory / f"line-{k}", self._like) for k in range(2))
        return before, after

    @cached_property
    def fold(self) -> MappedTensors:
        """Buffer for the target's tensors after the training on one fold."""
        return MappedTensors(self.directory / "fold", self._like)

    @cached_property
    def mean_alone(self) -> MappedTensors:
        """Buffer for the mean of the fold models of a fine-tuning without any source."""
        return MappedTensors(self.directory / "mean-alone", self._like)

    def make_room(self) -> None:
        """Empty `kept`, and remove the files that only the next source needs.

        A fine-tuning needs the disk space and the files `line`. It also changes the target, so that the objects in
        `kept` no longer describe it.
        """
        self.kept.clear()
        for name in ("gradients", "source_gradients"):
            vars(self).pop(name, None)
        for name in ("gradients", "source-gradients"):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self._source_folder, ignore_errors=True)

    def source_folder(self) -> Path:
        """Return an empty folder for the temporary files of one source; the folder of the last source is removed."""
        shutil.rmtree(self._source_folder, ignore_errors=True)
        self._source_folder.mkdir(exist_ok=True)
        return self._source_folder
