"""Moving weights into a model and taking them back. Pure tensor work: knows nothing of models or files."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor, nn


@torch.no_grad()
def overwrite_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Change `tensors` in place to the numbers of `values`, in their own storage, device and dtype."""
    for name, value in values.items():
        tensors[name].data.copy_(value)


@torch.no_grad()
def interpolate_(tensor: Tensor, start: Tensor, end: Tensor, coefficient: float) -> None:
    """Change `tensor` in place to `start + coefficient * (end - start)`, exactly an end for 0 and for 1.

    Integer tensors (such as the batch count of a BatchNorm) have no point in between: they are `end` for a coefficient
    of at least one half.
    """
    if coefficient == 0 or (coefficient < 0.5 and not tensor.is_floating_point()):
        tensor.data.copy_(start)
    elif coefficient == 1 or not tensor.is_floating_point():
        tensor.data.copy_(end)
    else:
        device = tensor.device
        dtype = torch.promote_types(tensor.dtype, torch.float32)  # half precision has no room for the difference
        out = tensor.data if tensor.dtype == dtype else None
        mixed = torch.lerp(start.to(device, dtype), end.to(device, dtype), coefficient, out=out)
        if out is None:
            tensor.data.copy_(mixed)


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


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is ever interrupted
        yield
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    previous = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if waiting:
        signal.raise_signal(signal.SIGINT)
