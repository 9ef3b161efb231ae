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
        """Add the products of one tensor's vectors: `a`, and `b` or `b - minus`."""
        self._products[self._unit_of[tensor]][tensor] = inner_products(a, b, minus)

    def sums(self) -> dict[str, tuple[float, float, float] | None]:
        """Return the three sums per unit; `None` for a unit without any added tensor.

        Raises:
            NonFiniteError: A product is NaN or infinite, because a gradient is.
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
CPU_PIECE = 2**17  # elements; a piece of this size fits into the cache of a core
DEVICE_PIECE = 2**24
VANISHING = 1e-30  # in a float32 sum below this, some squares may have been rounded to zero


def inner_products(a: Tensor, b: Tensor, minus: Tensor | None = None) -> Tensor:
    """Return `<a, b>`, `<a, a>` and `<b, b>` over all elements, float64, shape `(3,)`, on the CPU.

    With `minus`, `b - minus` replaces `b`. The tensors are on one device; their dtypes may differ. The products are
    computed in float32, piece by piece, so that no tensor is copied as a whole, and the sums are added in float64. If
    squares vanish or overflow in float32, the piece is computed again in float64.
    """
    piece = CPU_PIECE if a.device.type == "cpu" else DEVICE_PIECE
    flat = [t.detach().flatten().split(piece) for t in (a, b, *(() if minus is None else (minus,)))]
    products = torch.stack([_products(*pieces, dtype=torch.float32) for pieces in zip(*flat, strict=True)])
    products = products.to("cpu", torch.float64)
    unsafe = (products[:, 1:] < VANISHING).any(1) | ~products.isfinite().all(1)
    for index in unsafe.nonzero().flatten().tolist():
        if flat[0][index].any():  # zeros need no second pass: most rows of an embedding's gradient are zero
            products[index] = _products(*(pieces[index].cpu() for pieces in flat), dtype=torch.float64)
    return products.sum(0)


def _products(a: Tensor, b: Tensor, minus: Tensor | None = None, *, dtype: torch.dtype) -> Tensor:
    a, b = a.to(dtype), b.to(dtype)
    if minus is not None:
        b = b - minus.to(dtype)
    return torch.stack([torch.dot(a, b), torch.dot(a, a), torch.dot(b, b)])


def cosine(dot: float, square_a: float, square_b: float, *, epsilon: float = 0.0) -> float | None:
    """Return `dot / (|a| |b| + epsilon)` from the inner product and the two squared norms.

    Without `epsilon`, the cosine of a zero vector is `None`, and short vectors lose no accuracy. With `epsilon`, the
    result is the score of arXiv:2606.14900, which falls towards 0 for short gradients.
    """
    norms = math.sqrt(square_a) * math.sqrt(square_b)
    if epsilon == 0.0 and norms == 0.0:
        return None
    return dot / (norms + epsilon)


def mean_defined(scores: list[float | None]) -> float | None:
    """Return the mean of the scores that are not `None`; `None` if there is none."""
    defined = [score for score in scores if score is not None]
    return sum(defined) / len(defined) if defined else None
