"""Tensors in a mapped file: they use page cache, which the system can write to disk, and no private memory."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import DiskFullError

ALIGNMENT = 64  # bytes


class MappedTensors(Mapping[str, Tensor]):
    """Buffers for tensors in one new file, which is mapped into memory.

    Writing to a tensor writes to the file. The constructor reserves the disk space: a full disk is an error there and
    not a crash later.

    Args:
        path: The file. An existing file is replaced; tensors that are mapped from the old file keep their values.
        like: Tensors with the names, shapes and dtypes of the new ones; no value is copied.

    Raises:
        DiskFullError: The disk has no space for the file.
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
                else:  # macOS lacks posix_fallocate: it reserves no space, and a full disk shows up later
                    file.truncate(max(size, 1))
        except OSError as error:
            path.unlink(missing_ok=True)
            raise DiskFullError(
                f"no space for {size / 1e6:,.1f} MB in '{path.parent}' ({error.strerror}); free some space there, or "
                "set TMPDIR to a folder on a larger disk"
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
        """Overwrite all tensors with the values of `tensors`, which may be on any device."""
        for name, tensor in self._tensors.items():
            tensor.copy_(tensors[name])
        return self

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
