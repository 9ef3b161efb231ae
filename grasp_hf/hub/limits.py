"""Limits on the files of a source, checked before a library reads them.

A small file of a stranger may cost minutes or gigabytes: a library allocates the numbers that the file names, or takes
time that grows with the square of its size. The limits are several times what the largest published models need.
"""

import json
import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import IncompatibleSourceError, describe, first_few

MB = 1_000_000
# Largest size in bytes of a file, by pattern of its name; the first pattern that matches counts.
SIZES = {
    "tokenizer.json": 100 * MB,
    "vocab*": 100 * MB,
    "*.model": 100 * MB,
    "*.spm": 100 * MB,
    "*.tiktoken": 100 * MB,
    "*.txt": 100 * MB,
    "*": 25 * MB,
}
WEIGHTS = ("*.safetensors", "*.bin")
LARGEST_COUNTS = {  # largest number in a field of a config, by the word in the name of the field
    "label": 250_000,
    "layer": 2_000,
    "block": 2_000,
    "stage": 2_000,
    "depth": 2_000,
    "expert": 10_000,
}
MOST_EXPERTS = 200_000  # in all layers together
NO_COUNT = re.compile("size|dim|token|capacity|length|rank|factor|coef|width|norm|drop|scale|prob|id$")
DEEPEST = 100  # levels of lists and objects


def check_sizes(ref: object, sizes: Mapping[str, int]) -> None:
    """Raise `IncompatibleSourceError` if a file of a source is too large; `sizes` are in bytes, by path."""
    for path, size in sizes.items():
        name = path.rpartition("/")[2]
        limit = next(limit for pattern, limit in SIZES.items() if fnmatch(name, pattern))
        if size > limit and not any(fnmatch(name, pattern) for pattern in WEIGHTS):
            raise IncompatibleSourceError(
                f"{name} has {size / MB:,.0f} MB, expected at most {limit / MB:,.0f} MB", subject=ref
            )


def check_folder(ref: object, folder: Path) -> None:
    """Raise `IncompatibleSourceError` if the configuration files in a folder are too large, or name too large numbers.

    A config that is no JSON object is refused too, and so is a pipe or a device, which a library would read for ever.
    """
    for path in sorted(folder.iterdir()):
        if path.exists() and not path.is_file() and not path.is_dir():
            raise IncompatibleSourceError(f"{path.name} is neither a file nor a folder", subject=ref)
    patterns = [*SIZES, "*.json", "*.md", "*.yaml", "*.jinja"]
    names = {path for pattern in patterns if pattern != "*" for path in folder.glob(pattern) if path.is_file()}
    check_sizes(ref, {path.name: path.stat().st_size for path in sorted(names)})
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            _check_keys(folder / name, ref)
    for name in ("config.json", "adapter_config.json"):
        if (folder / name).is_file():
            values = read_object(folder / name, ref)
            for problem in _count_problems(values):
                raise IncompatibleSourceError(f"{name} holds {problem}", subject=ref)


def _check_keys(path: Path, ref: object) -> None:
    """Raise `IncompatibleSourceError` if a key in a JSON file has control characters: tokenizers prints unknown keys."""
    try:
        found = [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return  # the error of the library says more
    while found:
        value = found.pop()
        if isinstance(value, dict):
            if wrong := [key for key in value if not key.isprintable()]:
                raise IncompatibleSourceError(
                    f"{path.name} holds the key {first_few(wrong, 1)}, expected no control characters in it",
                    subject=ref,
                )
            found += value.values()
        elif isinstance(value, list):
            found += value


def read_object(path: Path, ref: object) -> dict[str, Any]:
    """Return the content of a JSON file that must hold an object.

    Raises:
        IncompatibleSourceError: The file cannot be read, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise IncompatibleSourceError(f"{path.name} cannot be used: {describe(error)}", subject=ref) from error
    if not isinstance(values, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(values), "a number")
        raise IncompatibleSourceError(f"{path.name} holds {kind}, expected an object with keys", subject=ref)
    return values


def _count_problems(values: dict[str, Any]) -> Iterator[str]:
    """Yield a problem for each number of labels, layers or experts in a config that is too large, and for their product."""
    largest: dict[str, float] = {}
    for word, key, count in _counts(values, "", 0):
        if word == "levels":
            yield f"more than {DEEPEST} levels"
        elif not count <= LARGEST_COUNTS[word]:
            yield f"{key}: {count:,}, expected at most {LARGEST_COUNTS[word]:,}"
        else:
            largest[word] = max(largest.get(word, 1), count)
    experts = largest.get("expert", 1) * largest.get("layer", 1)
    if experts > MOST_EXPERTS:
        yield f"{experts:,} experts in all layers, expected at most {MOST_EXPERTS:,}"


def _counts(value: Any, key: str, depth: int) -> Iterator[tuple[str, str, float]]:
    """Yield word, field and number for each number in a config, at any depth, that counts something."""
    if depth > DEEPEST:
        yield "levels", key, depth
        return
    word = None if NO_COUNT.search(key) else next((word for word in LARGEST_COUNTS if word in key), None)
    if isinstance(value, dict | list):
        if word:
            yield word, f"entries in {key}", len(value)
        if "label2id" in key:
            return  # its numbers are class ids
        for name, item in value.items() if isinstance(value, dict) else [("", item) for item in value]:
            if not isinstance(item, str):
                yield from _counts(item, key if not name or name.isdigit() else name, depth + 1)
    elif word and isinstance(value, int | float):
        yield word, key, value
