"""The regular expressions in an adapter's configuration, tried with a time limit before PEFT uses them."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import first_few

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
