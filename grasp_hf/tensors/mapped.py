"""Tensors that live in a file: pages of the system's cache, which it can write out, and no private memory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DiskFullError

ALIGNMENT = 64  # bytes


class MappedTensors(Mapping[str, Tensor]):
    """Room for tensors in one new file, mapped into memory and shared with it.

    Writing to a tensor writes to the file. The space is taken when the file is made, so a full disk is an error then and
    not a crash later.

    Args:
        path: The file; an existing one is replaced, and tensors mapped from it stay what they are.
        like: Tensors whose names, shapes and dtypes the new ones have; nothing is copied.

    Raises:
        DiskFullError: There is no room for the file.
    """

    def __init__(self, path: Path, like: Mapping[str, Tensor]) -> None:
        offsets, size = {}, 0
        for name, tensor in like.items():
            offsets[name] = size
            size += -(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT
        path.unlink(missing_ok=True)
        try:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, max(size, 1))
                else:  # macOS has no such call; a full disk is then noticed late
                    file.truncate(max(size, 1))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DiskFullError(
                f"no room for {size / 1e6:,.1f} MB in '{path.parent}' ({error.strerror}); free some space there, or set "
                "TMPDIR to a folder on a larger disk"
            ) from error
        memory = torch.from_file(str(path), shared=True, size=max(size, 1), dtype=torch.uint8)
        self._tensors = {
            name: memory[offset : offset + like[name].numel() * like[name].element_size()]
            .view(like[name].dtype)
            .view(like[name].shape)
            for name, offset in offsets.items()
        }

    @torch.no_grad()
    def copy_(self, tensors: Mapping[str, Tensor]) -> "MappedTensors":
        """Overwrite all of them with `tensors`, from any device, one after the other."""
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])
        return self

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
