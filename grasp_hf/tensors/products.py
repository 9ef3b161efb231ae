"""Inner products and cosines of gradients and differences, per unit."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .units import Unit

Scores = dict[str, float | None]


class UnitProducts:
    """Inner products `<a, b>`, `<a, a>` and `<b, b>` summed over the tensors of each unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._unit_of = {name: unit.name for unit in units for name in unit.tensors}
        self._products: dict[str, dict[str, Tensor]] = {unit.name: {} for unit in units}

    def __contains__(self, tensor: str) -> bool:
        return tensor in self._unit_of

    def add(self, tensor: str, a: Tensor, b: Tensor, minus: Tensor | None = None) -> None:
        """Take in the vectors of one tensor: `a`, and `b` or `b - minus`."""
        self._products[self._unit_of[tensor]][tensor] = inner_products(a, b, minus)

    def sums(self) -> dict[str, tuple[float, float, float] | None]:
        """Return the three sums per unit; `None` for a unit of which no tensor was taken in.

        Raises:
            NonFiniteError: A product is NaN or infinite, so a gradient is.
        """
        found: dict[str, tuple[float, float, float] | None] = {}
        for unit, products in self._products.items():
            if not products:
                found[unit] = None
                continue
            rows = torch.stack(list(products.values())).tolist()
            for tensor, row in zip(products, rows, strict=True):
                if not all(map(math.isfinite, row)):
                    raise NonFiniteError(f"the gradient of {tensor} is NaN or infinite; expected finite numbers")
            found[unit] = (sum(r[0] for r in rows), sum(r[1] for r in rows), sum(r[2] for r in rows))
        return found


PAPER_EPSILON = 1e-8
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
