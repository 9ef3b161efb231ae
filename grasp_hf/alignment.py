"""Scores and coefficients from inner products. Pure tensor mathematics: knows nothing of models or files."""

from collections.abc import Sequence

import torch

LARGEST = 2.0  # coefficient


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
