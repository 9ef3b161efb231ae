"""Values that take the place of a model's tensors, for good or for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@torch.no_grad()
def overwrite_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Change `tensors` in place to the numbers of `values`, in their own storage, device and dtype."""
    for name, value in values.items():
        tensors[name].data.copy_(value)


@contextmanager
def placed(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Iterator[None]:
    """Let `tensors` hold `values` inside the block, and after it what they held before, whatever happens.

    Where device and dtype agree only pointers move, which costs nothing and is undone bit for bit. A parameter on
    another device or in another dtype is overwritten, so that there is never room for two, and comes back from `start`,
    which must hold what it held. Buffers are small; they keep their storage, and what measuring has made of it.
    """
    kept: dict[str, Tensor] = {}
    overwritten = []
    try:
        for name, value in values.items():
            tensor = tensors[name]
            same = value.device == tensor.device and value.dtype == tensor.dtype
            if same or not isinstance(tensor, nn.Parameter):
                kept[name] = tensor.data
                tensor.data = value.detach().to(tensor.device, tensor.dtype)
            else:
                overwritten.append(name)
                overwrite_(tensors, {name: value})
        yield
    finally:
        for name, data in kept.items():
            tensors[name].data = data
        overwrite_(tensors, {name: start[name] for name in overwritten})
