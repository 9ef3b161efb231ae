"""Replace the values of a model's tensors, permanently or inside a block."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def overwrite_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Change `tensors` in place to `values`; storage, device and dtype stay the same."""
    for name, value in values.items():
        tensors[name].data.copy_(value)


@contextmanager
def placed(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace `tensors` by `values` inside the block, and restore them after it, even if the block raises.

    If device and dtype agree, only pointers change. That costs nothing and is undone bit for bit. A parameter with
    another device or dtype is overwritten, so that there is never a second copy, and restored from `start`, which must
    hold its earlier values. A buffer is small: it is converted to its device and dtype, and its storage is exchanged.
    """
    replaced: dict[str, Tensor] = {}
    overwritten = []
    try:
        for name, value in values.items():
            tensor = tensors[name]
            same = value.device == tensor.device and value.dtype == tensor.dtype
            if same or not isinstance(tensor, nn.Parameter):
                replaced[name] = tensor.data
                tensor.data = value.detach().to(tensor.device, tensor.dtype)
            else:
                overwritten.append(name)
                overwrite_(tensors, {name: value})
        yield
    finally:
        for name, data in replaced.items():
            tensors[name].data = data
        overwrite_(tensors, {name: start[name] for name in overwritten})
