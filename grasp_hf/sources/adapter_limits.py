"""Limits on an adapter's configuration, checked before PEFT allocates its ranks and matches its expressions."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import first_few, one_line

USUAL_RANKS = 1_024  # PEFT may allocate ranks up to this one, whatever the file holds
SECONDS = 3.0
FIELDS = (
    "target_modules",
    "exclude_modules",
    "target_parameters",
    "modules_to_save",
    "feedforward_modules",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
)
# PEFT matches whole names, ends of names, and the part before the number of a layer.
TRY = r"""
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (pattern, rf"(.*\.)?({pattern})$", rf".*\.{pattern}\.(\d+)\."):
        try:
            expression = re.compile(form)
        except (re.error, RecursionError, OverflowError):
            continue
        for name in names:
            expression.match(name)
            expression.fullmatch(name)
"""


def limit_problems(config: Any, tensors: Mapping[str, Tensor], names: Sequence[str]) -> list[str]:
    """Return the problems of an adapter's configuration that would cost much memory or time.

    Args:
        config: The adapter's configuration.
        tensors: The tensors in the adapter's file; only their shapes are read. Empty if they are not known yet.
        names: Names of the modules of the model that it adapts.
    """
    return (rank_problems(config, tensors) if tensors else []) or pattern_problems(config, names)


def rank_problems(config: Any, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return a problem for each rank in an adapter's configuration that its file cannot hold; PEFT allocates them first.

    LoRA of rank `r` has a matrix with `r` rows and one with `r` columns, and a rank above the other sizes of both is of no
    use. Other types store their ranks in other ways, or cut them after the training.
    """
    kind = one_line(getattr(config.peft_type, "value", config.peft_type))
    shapes = [tensor.shape for tensor in tensors.values() if tensor.numel()]
    limit = max((min(shape[0], shape.numel() // shape[0]) for shape in shapes if shape), default=0)
    if kind == "LOKR":  # a rank above the size of its matrices means whole matrices
        return []
    if kind != "LORA":
        limit = max([USUAL_RANKS, *(max(shape) for shape in shapes if shape)])
    patterns = getattr(config, "rank_pattern", None)
    ranks = {name: getattr(config, name, None) for name in ("r", "init_r", "target_r")}
    if isinstance(patterns, dict):
        ranks |= {f"rank_pattern.{one_line(key, 100)}": value for key, value in patterns.items()}
    return [
        f"{name}: got {one_line(value, 100)}, but its file holds ranks of at most {limit}"
        for name, value in ranks.items()
        if isinstance(value, int | float) and not value <= limit
    ]


def pattern_problems(config: Any, names: Sequence[str]) -> list[str]:
    """Return a problem if the expressions in an adapter's configuration take too long on the names of a model's modules.

    Some expressions take time that doubles with each character of a name. Nothing can interrupt the search in a thread,
    so it runs in a process of its own.
    """
    found = [(field, pattern) for field in FIELDS for pattern in _texts(getattr(config, field, None))]
    if too_long := [field for field, pattern in found if len(pattern) > 100_000]:
        return [f"{too_long[0]}: got an expression of more than 100,000 characters"]
    slow = [pattern for _, pattern in found if re.search(r"[*+?{]", pattern)]
    if not slow:
        return []
    try:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY],
            input=json.dumps([slow, [*names]]).encode(),
            timeout=SECONDS,
            check=True,
            capture_output=True,
        )
    except subprocess.TimeoutExpired:
        fields = sorted({field for field, pattern in found if pattern in slow})
        return [
            f"{', '.join(fields)}: the expression {first_few(slow, 1)} takes longer than {SECONDS:.0f} s to find its "
            "modules; list the names of the modules instead"
        ]
    except subprocess.CalledProcessError as error:
        return [f"the expression {first_few(slow, 1)} cannot be matched: exit code {error.returncode}"]
    return []


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | set | tuple):
        yield from (item for item in value if isinstance(item, str))
