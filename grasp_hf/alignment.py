"""Scores and coefficients from inner products. Pure tensor mathematics: knows nothing of models or files."""

import math

import torch
from torch import Tensor

PUBLISHED_EPSILON = 1e-8


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """Return `<a, b>` over all elements as a scalar tensor on their device, computed in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    return torch.dot(a.detach().flatten().to(dtype), b.detach().flatten().to(dtype))


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
