"""What a data set holds, as hashes: to find a sample again, and to tell whether the data is still the same."""

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import DataError

MASKS = ("attention_mask", "token_type_ids")
SAMPLES = 1000  # of which a description is made, evenly spaced: more would cost as much as an epoch


def described(dataset: Any) -> dict[str, Any] | None:
    """Return the number of samples and, of a `datasets.Dataset`, a digest of up to `SAMPLES` of them."""
    if dataset is None:
        return None
    count = len(dataset)
    if not hasattr(dataset, "with_format"):
        return {"samples": count, "digest": None}
    some = dataset.select(range(0, count, -(-count // SAMPLES)))
    return {"samples": count, "digest": digest(contents(some), some)}


def digest(hashes: set[str], dataset: Any) -> str:
    """Return a hash of all samples, with `contents` as known, and of their labels in order."""
    labels = [
        label
        for column in ("labels", "label")
        if column in dataset.column_names
        for label in dataset.with_format(None)[column][:]
    ]
    return hashlib.sha256(repr((sorted(hashes), labels)).encode()).hexdigest()[:16]


def contents(dataset: Any) -> set[str]:
    """Return a hash of what each sample holds beside its label; of a picture, its pixels."""
    return {*_hashes(dataset, picture)}


def shared_samples(splits: Mapping[str, Any]) -> list[str]:
    """Say which samples stand in more than one of `splits`, or twice in `train`; pictures are compared as files."""
    hashes = {name: [*_hashes(split, _encoded)] for name, split in splits.items()}
    twice = len(hashes["train"]) - len({*hashes["train"]})
    found = [f"{twice} samples of the split 'train' stand there again"] if twice else []
    for of, split in combinations(hashes, 2):
        if shared := {*hashes[of]} & {*hashes[split]}:
            found.append(f"{len(shared)} samples of the split '{split}' also stand in the split '{of}'")
    return found


def _hashes(dataset: Any, picture_of: Callable[[Any], Any]) -> Iterator[str]:
    columns = [name for name in dataset.column_names if name not in ("label", "labels", *MASKS)]
    for row in dataset.with_format(None).select_columns(columns):
        digest = hashlib.sha256()
        for value in row.values():
            if hasattr(value, "convert") or is_encoded(value):  # a picture, in whatever way it is kept
                value = picture_of(value)
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
        yield digest.hexdigest()


def _encoded(value: Any) -> bytes:
    """Return a picture as it is kept; where that is a file, what it holds."""
    try:
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    except OSError:  # who needs it will say so
        return repr(value).encode()


def is_encoded(value: Any) -> bool:
    """Whether it is a picture as datasets keeps it."""
    return isinstance(value, dict) and value.keys() == {"bytes", "path"}


def picture(value: Any) -> Image.Image:
    """Return a picture in RGB, of 16 bits per pixel the upper 8; `value` is one, or the bytes or the file of one.

    Raises:
        DataError: It cannot be read, or its pixels have no range that is known.
    """
    name = (value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)) or "of a data set"
    try:
        image = value
        if isinstance(value, dict):
            image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        if image.mode.startswith("I;16"):
            image = image.point(lambda level: level / 256, "L")
        if image.mode in ("I", "F"):
            raise ValueError(f"its pixels are of type {image.mode}, of which no range is known; save it with 8 bits")
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
        raise DataError(f"the picture '{name}' cannot be read: {error}") from error
