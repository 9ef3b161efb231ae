"""Scores and coefficients from inner products. Pure tensor mathematics: knows nothing of models or files."""

import math

import torch
from torch import Tensor

PUBLISHED_EPSILON = 1e-8
CPU_PIECE = 2**17  # elements; pieces of this size stay in a core's cache
DEVICE_PIECE = 2**24


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """Return `<a, b>`, `<a, a>` and `<b, b>` over all elements, shape `(3,)`, on their device.

    Computed in float64, since squares of short gradients vanish in float32 (float32 where the device has no other), in
    pieces, so that no copy of the whole is made.
    """
    dtype = torch.float32 if a.device.type == "mps" else torch.float64
    piece = CPU_PIECE if a.device.type == "cpu" else DEVICE_PIECE
    total = torch.zeros(3, dtype=dtype, device=a.device)
    for x, y in zip(a.detach().flatten().split(piece), b.detach().flatten().split(piece), strict=True):
        x, y = x.to(dtype), y.to(dtype)
        total += torch.stack([torch.dot(x, y), torch.dot(x, x), torch.dot(y, y)])
    return total


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
    """Projected Adam on one coefficient in [0, 1] per unit, all starting at 0.

    With weights `W_u = T_u + c_u (S_u - T_u)` the chain rule gives `dL/dc_u = <dL/dW_u, S_u - T_u>`. Adam divides by
    the gradient's own size, so a coefficient moves by about `lr` per step whatever the size of its unit.
    """

    def __init__(self, size: int, lr: float) -> None:
        self._values = torch.zeros(size, dtype=torch.float64)
        self._adam = torch.optim.Adam([self._values], lr=lr)

    @property
    def values(self) -> list[float]:
        """The coefficients, one per unit."""
        return [float(value) for value in self._values]

    def step(self, slopes: list[float]) -> None:
        """Go down along `slopes`, the derivative of the loss for each coefficient, and back into [0, 1]."""
        self._values.grad = torch.tensor(slopes, dtype=torch.float64)
        self._adam.step()
        self._values.clamp_(0.0, 1.0)
