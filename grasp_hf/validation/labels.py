"""Which labels teach, and which validate."""

import random
from collections.abc import Sequence


def halves(indices: Sequence[int], seed: int) -> tuple[list[int], list[int]]:
    """Return two random halves of `indices`, sorted."""
    order = list(indices)
    random.Random(seed).shuffle(order)
    middle = len(order) // 2
    return sorted(order[:middle]), sorted(order[middle:])
