"""LoRA of fused experts, whose weights PEFT packs into two matrices: the packing of other versions and trainers.

A parameter of `E` experts has the shape `(E, first, second)`. Its LoRA of rank `r` is stored as `lora_A`, of shape
`(E * r, a)`, and `lora_B`, of shape `(b, r * E)`: in `lora_A` the rows of one expert are neighbours, in `lora_B` its columns
are `E` apart. PEFT below 0.19.1 and later versions differ in which of `first` and `second` is `a`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from packaging.version import InvalidVersion, Version
from torch import Tensor

from ..errors import IncompatibleSourceError
from ..internals import ExpertLayer
from .adapter_options import LAYOUT

BY_EXPERT, BY_RANK = "grouped_by_expert", "rank_major"


def repack_experts(
    weights: Mapping[str, Tensor], layers: Mapping[str, ExpertLayer], options: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the weights of an adapter, with the LoRA of fused experts packed as the installed PEFT reads it.

    Args:
        weights: The adapter's weights by their names in its file.
        layers: The adapted parameters of fused experts, by the name of the module that PEFT wraps around them.
        options: The content of adapter_config.json.

    Raises:
        IncompatibleSourceError: The packing is unknown, or the file does not show it.
    """
    found = dict(weights)
    layout = options.get(LAYOUT) or BY_RANK
    if layers and layout not in (BY_EXPERT, BY_RANK):
        raise IncompatibleSourceError(
            f"its adapter_config.json sets {LAYOUT}: '{layout}', expected '{BY_RANK}' or '{BY_EXPERT}'"
        )
    for name, layer in layers.items():
        key_a, key_b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"
        experts, first, second = layer.shape
        if key_a not in found or key_b not in found or len(found[key_a]) % experts or found[key_b].ndim != 2:
            continue  # the comparison of names and shapes reports this
        a, b = found[key_a], found[key_b]
        rank = len(a) // experts
        if {a.shape[1], b.shape[0]} != {first, second} or b.shape[1] != len(a):
            continue
        if layout == BY_EXPERT:
            b = b.unflatten(1, (experts, rank)).transpose(1, 2).flatten(1)
        if first != second:
            reads_second = a.shape[1] == second
        else:
            reads_second = _read_second(layer, name, options.get("peft_version"))
        if reads_second != layer.reads_second:
            split_a, split_b = a.unflatten(0, (experts, rank)), b.unflatten(1, (rank, experts))
            a, b = split_b.permute(2, 1, 0).flatten(0, 1), split_a.permute(2, 1, 0).flatten(1)
        found[key_a], found[key_b] = a.contiguous(), b.contiguous()
    return found


def _read_second(layer: ExpertLayer, name: str, written_by: str | None) -> bool:
    """Return whether `lora_A` belongs to the second dimension of a square parameter, from the version that wrote it."""
    if layer.is_transposed and written_by is None:
        return False
    try:
        version = Version(str(written_by).partition("@")[0])
    except InvalidVersion:
        raise IncompatibleSourceError(
            f"{name} adapts a parameter of shape {layer.shape}, and PEFT below 0.19.1 transposes it; expected the "
            'version that wrote the adapter in its adapter_config.json, such as "peft_version": "0.18.0", got '
            f"{written_by!r}"
        ) from None
    if version < Version("0.19.0.dev0"):
        return False
    return layer.is_transposed if version < Version("0.19.1.dev0") else not layer.is_transposed
