"""The files that a merge works with, and what it knows of its target between two steps."""

import math
import shutil
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..methods.fisher import RunningFisher
from ..validation.losses import Judgement
from .mapped import MappedTensors


class Scratch:
    """The files of a merge: the target as it was at the start of a step, and room for sets of gradients.

    The files are made when they are first needed and used again by every later step.

    Args:
        directory: Where the files are made.
        like: The target's tensors; nothing is copied yet.

    Attributes:
        directory: See above.
        judged: The losses of the target as it is, where they are known; whoever changes it says so here.
        floor: The mean calibrated loss before the first transfer since the target was last fine-tuned; infinite before it.
        warned: Whether it was said that few samples judge.
    """

    def __init__(self, directory: Path, like: Mapping[str, Tensor]) -> None:
        self.directory = directory
        self.judged: Judgement | None = None
        self.floor = math.inf
        self.warned = False
        self._like = like
        self._source_folder = directory / "source"
        self._parameters = {name: t for name, t in like.items() if isinstance(t, torch.nn.Parameter)}

    @cached_property
    def start(self) -> MappedTensors:
        """Room for the target's tensors as they were; the caller fills it."""
        return MappedTensors(self.directory / "start", self._like)

    @cached_property
    def base(self) -> MappedTensors:
        """Room for the target's tensors as the merge found them; the caller fills it."""
        return MappedTensors(self.directory / "base", self._like)

    @cached_property
    def gradients(self) -> MappedTensors:
        """Room for the gradient of each parameter."""
        return MappedTensors(self.directory / "gradients", self._parameters)

    @cached_property
    def fisher(self) -> RunningFisher:
        """The Fisher information of the sources in the mean."""
        return RunningFisher(*({name: _ranging(tensor) for name, tensor in room.items()} for room in self.line))

    def make_room(self) -> None:
        """Forget the Fisher information, and remove what only the next source needs.

        A fine-tuning changes the model by other means than a mean, takes the same files, and has more of its own.
        """
        for name in ("fisher", "gradients", "source_gradients"):
            vars(self).pop(name, None)
        for name in ("gradients", "source-gradients"):
            (self.directory / name).unlink(missing_ok=True)
        shutil.rmtree(self._source_folder, ignore_errors=True)

    @cached_property
    def line(self) -> tuple[MappedTensors, MappedTensors]:
        """Room for the target's tensors before a fine-tuning and after it."""
        before, after = (MappedTensors(self.directory / f"line-{k}", self._like) for k in range(2))
        return before, after

    def source_folder(self) -> Path:
        """Make an empty folder for what the next source needs beside its own files; there is one at a time."""
        shutil.rmtree(self._source_folder, ignore_errors=True)
        self._source_folder.mkdir(exist_ok=True)
        return self._source_folder

    @cached_property
    def source_gradients(self) -> MappedTensors:
        """Room for a second set of gradients."""
        return MappedTensors(self.directory / "source-gradients", self._parameters)


def _ranging(tensor: Tensor) -> Tensor:
    """Return `tensor`, in the same place, as a type with the range of float32 if it is one of half its size."""
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.float16 else tensor
