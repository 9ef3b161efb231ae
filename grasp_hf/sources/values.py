"""The values of a source's weights: finite, and in proportion to those of the target."""

import math
from collections.abc import Mapping

from torch import Tensor

from ..errors import IncompatibleSourceError, NonFiniteError
from ..tensors.units import largest_weight

# Between 132 pairs of trained models of one architecture, among them bases and their fine-tunes, the largest weight of a
# tensor differs by a factor of 2.7 at most. One wrong bit of an exponent makes it 10**4 to 10**38.
LARGEST_FACTOR = 1_000
LARGEST_OVERALL = 100


def check_values(ref: object, tensors: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    """Raise an error if a weight is NaN, infinite, or out of all proportion to the target's.

    Out of proportion is a weight that is `LARGEST_FACTOR` times larger than the largest one of the same tensor of the
    target, and `LARGEST_OVERALL` times larger than the largest one of the whole target. The second condition matters for
    tensors that begin at zero, such as the biases of a new head.

    Args:
        ref: Reference of the source.
        tensors: The source's tensors by name.
        target: The target's tensors by name.

    Raises:
        NonFiniteError: A weight is NaN or infinite.
        IncompatibleSourceError: A weight is out of proportion.
    """
    overall: float | None = None
    for name, tensor in tensors.items():
        largest = largest_weight(tensor)
        if not math.isfinite(largest):
            raise NonFiniteError(f"{name} holds NaN or infinite weights; expected finite ones", subject=ref)
        if name not in target or largest <= LARGEST_FACTOR * (own := largest_weight(target[name])):
            continue
        if overall is None:
            overall = max(map(largest_weight, target.values()), default=0.0)
        if overall and largest > LARGEST_OVERALL * overall:  # a target of zeros has no scale
            raise IncompatibleSourceError(
                f"{name}: its largest weight is {largest:.3g}, that of the target {own:.3g} (of all its tensors "
                f"{overall:.3g}); expected at most {LARGEST_FACTOR:,} times as much, or {LARGEST_OVERALL} times that of all: "
                "the file is damaged, so download it again, or it is no fine-tune of this model",
                subject=ref,
            )
