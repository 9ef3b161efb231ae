"""Scores and coefficients from inner products. Pure tensor mathematics: knows nothing of models or files."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

PUBLISHED_EPSILON = 1e-8
LARGEST = 2.0  # coefficient
CPU_PIECE = 2**17  # elements; pieces of this size stay in a core's cache
DEVICE_PIECE = 2**24
VANISHING = 1e-30  # below this a sum of float32 squares may have lost some of them


def inner_products(a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """Return `<a, b>`, `<a, a>` and `<b, b>` over all elements, float64, shape `(3,)`, on the CPU.

    With `minus`, `b - minus` takes the place of `b`. All of one device; dtypes may differ. Computed in float32, piece by
    piece, so that no copy of the whole is made; the sums of pieces are added in float64. Where squares vanish in float32
    or overflow, a piece is computed in float64.
    """
    piece = CPU_PIECE if a.device.type == "cpu" else DEVICE_PIECE
    flat = [t.detach().flatten().split(piece) for t in (a, b, *(() if minus is None else (minus,)))]
    products = torch.stack([_products(*pieces, dtype=torch.float32) for pieces in zip(*flat, strict=True)])
    products = products.to("cpu", torch.float64)
    unsafe = (products[:, 1:] < VANISHING).any(1) | ~products.isfinite().all(1)
    for index in unsafe.nonzero().flatten().tolist():
        if flat[0][index].any():  # an embedding has a gradient for few of its tokens
            products[index] = _products(*(pieces[index].cpu() for pieces in flat), dtype=torch.float64)
    return products.sum(0)


def _products(a: Tensor, b: Tensor, minus: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    a, b = a.to(dtype), b.to(dtype)
    if minus is not None:
        b = b - minus.to(dtype)
    return torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])


def cosine(dot: float, square_a: float, square_b: float, *, epsilon: float = 0.0) -> float | None:
    """Return `dot / (|a| |b| + epsilon)` from the inner product and the two squared norms.

    Without `epsilon` the cosine of a zero vector is undefined, which is `None`, and that of equal vectors is exactly
    as large as rounding allows, however short they are. With `epsilon` it is the score of arXiv:2606.14900, which
    falls towards 0 for short gradients.
    """
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    if epsilon == 0.0 and norms == 0.0:
        return None
    return dot / (norms + epsilon)


def mean_defined(scores: list[float | None]) -> float | None:
    """Return the mean of the scores that are defined; `None` where none is."""
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined) if defined else None


class CoefficientDescent:
    """Projected Adam on two coefficients per unit, with a step size that falls linearly to 0.

    With weights `W = B + k (T - B) + t (S - B)` the chain rule gives `dL/dk = <dL/dW, T - B>` and
    `dL/dt = <dL/dW, S - B>`. Adam divides by the gradient's own size, so that a coefficient moves by about the step size
    per step whatever the size of its unit. Both stay in [0, 2]: more than 1 goes beyond what a model learned, as the scaled
    sums of task arithmetic do (arXiv:2212.04089).

    Args:
        initial: Shape `(units, 2)`.
        lr: Size of the first step.
        steps: How many there will be.
    """

    def __init__(self, initial: Sequence[Sequence[float]], lr: float, steps: int) -> None:
        self._values = torch.tensor(initial, dtype=torch.float64)
        self._adam = torch.optim.Adam([self._values], lr=lr)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adam, lambda step: max(0.0, 1 - step / steps))

    @property
    def values(self) -> list[list[float]]:
        """The coefficients, two per unit."""
        return self._values.tolist()

    def step(self, slopes: Sequence[Sequence[float]]) -> None:
        """Go down along `slopes`, the derivative of the loss for each coefficient, and back into [0, 2]."""
        self._values.grad = torch.tensor(slopes, dtype=torch.float64)
        self._adam.step()
        self._schedule.step()
        self._values.clamp_(0.0, LARGEST)
