"""Moving weights into a model and taking them back. Pure tensor work: knows nothing of models or files."""

import math
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

PIECE = 2**20  # elements that are worked on at once


class Mix(NamedTuple):
    """How much of two models goes into one: `base + keep * (target - base) + take * (source - base)`.

    With a sum of 1 the base drops out, and it is the point `take` of the line from the target to the source.
    """

    keep: float
    take: float

    @classmethod
    def on_line(cls, take: float) -> "Mix":
        """Return that point of the line from the target (0) to the source (1)."""
        return cls(1.0 - take, take)

    @classmethod
    def mean(cls, mixes: Sequence["Mix"]) -> "Mix":
        """Return what makes the mean of the models that `mixes` make; of statistics, which have proportions, nearly so."""
        return cls(fmean(mix.keep for mix in mixes), fmean(mix.take for mix in mixes))

    @property
    def moves(self) -> bool:
        """Whether anything but the target comes out."""
        return self != (1.0, 0.0)


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


@torch.no_grad()
def mix_(tensor: Tensor, start: Tensor, end: Tensor, base: Tensor | None, mix: Mix) -> None:
    """Change `tensor` in place to the mix of `start` (the target), `end` (the source) and `base`.

    Statistics, which are no parameters, have a mean but no direction: of those comes the point of the line between the
    two that has the same proportions. `base` may be `None` where the mix has a sum of 1.
    """
    total = mix.keep + mix.take
    if base is None or math.isclose(total, 1.0, abs_tol=1e-9):
        interpolate_(tensor, start, end, mix.take)
    elif not isinstance(tensor, nn.Parameter):
        interpolate_(tensor, start, end, mix.take / total if total else 0.0)
    else:
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        in_place = tensor.dtype == dtype
        mixed = tensor.data if in_place else torch.empty_like(tensor, dtype=dtype)
        torch.mul(start.to(tensor.device, dtype), mix.keep, out=mixed)
        mixed.add_(end.to(tensor.device, dtype), alpha=mix.take)
        mixed.add_(base.to(tensor.device, dtype), alpha=1.0 - total)
        if not in_place:
            tensor.data.copy_(mixed)


def in_rows(tensor: Tensor) -> Sequence[Tensor]:
    """Return views of `tensor`, each a few of its rows, so that no arithmetic needs room for the whole."""
    tensor = torch.atleast_1d(tensor)
    return tensor.split(max(1, PIECE * len(tensor) // max(1, tensor.numel())))


@torch.no_grad()
def weigh_(tensor: Tensor, start: Tensor, end: Tensor, shares: Iterable[Tensor]) -> None:
    """Change `tensor` in place to `start + share * (end - start)`, element by element; `shares` come as `in_rows` does."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    for rows, share in zip(zip(*map(in_rows, (tensor.data, start, end)), strict=True), shares, strict=True):
        place, *ends = rows
        place.copy_(torch.lerp(*(each.to(tensor.device, dtype) for each in (*ends, share))))


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
    """Let Ctrl-C, and the SIGTERM of who stops a job, wait until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # no other thread is ever interrupted
        yield
        return
    waiting: list[int] = []

    def hold(number: int, frame: FrameType | None) -> None:
        waiting.append(number)

    previous = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    for received in waiting:  # of which one may be ignored, the others not
        signal.raise_signal(received)
