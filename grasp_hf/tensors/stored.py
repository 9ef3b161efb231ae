"""Tensors in a file that is written once and read back, one tensor at a time."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Header = Sequence[Sequence[Any]]  # name, dtype and shape of each tensor
PIECE = 2**24  # bytes that are read at once


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[Header, str]:
    """Write tensors to a new file and flush it; return their header, which `read_tensors` needs, and the SHA-256 sum."""
    digest, header = hashlib.sha256(), []
    with open(path, "wb") as file:
        for name, tensor in tensors.items():
            data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            file.write(data.data)
            digest.update(data.data)
            header.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        file.flush()
        os.fsync(file.fileno())
    return header, digest.hexdigest()


def read_tensors(path: Path, header: Header) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the values of each tensor of a file, in its order."""
    with open(path, "rb") as file:
        for name, dtype, shape in header:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            if tensor.numel():
                file.readinto(tensor.reshape(-1).view(torch.uint8).numpy().data)
            yield name, tensor


def file_sum(path: Path) -> str:
    """Return the SHA-256 sum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def sum_of(tensors: Mapping[str, Tensor]) -> str:
    """Return one SHA-256 sum of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
