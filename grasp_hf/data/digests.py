"""Hashes of a data set: they find samples that occur twice, and show whether the data has changed."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from .pictures import is_picture, load_picture, picture_bytes

MASKS = ("attention_mask", "token_type_ids")
SAMPLES = 1000  # evenly spaced samples in a fingerprint: reading all of them could cost as much as an epoch


def fingerprint(dataset: Any) -> dict[str, Any] | None:
    """Return the number of samples and a digest of up to `SAMPLES` of them; `None` for no data set.

    Only a `datasets.Dataset` has a digest; for other data sets it is `None`.
    """
    if dataset is None:
        return None
    count = len(dataset)
    if not hasattr(dataset, "with_format"):
        return {"samples": count, "digest": None}
    some = dataset.select(range(0, count, -(-count // SAMPLES)))
    return {"samples": count, "digest": digest(sample_hashes(some), some)}


def full_digest(dataset: Any) -> str:
    """Return one hash of all samples in their order, with their labels; pictures are hashed as files."""
    found, count = hashlib.sha256(), len(dataset)
    if hasattr(dataset, "with_format"):  # rows of a `datasets.Dataset` are read many at a time
        rows = dataset.with_format(None)
        for start in range(0, count, SAMPLES):
            _update(found, rows[start : start + SAMPLES])
    else:
        for index in range(count):
            _update(found, dataset[index])
    return f"{count} samples, {found.hexdigest()[:16]}"


def _update(found: Any, value: Any) -> None:
    """Add a sample, or a part of one, to a hash."""
    if is_picture(value):
        found.update(picture_bytes(value))
    elif isinstance(value, Mapping):
        for name in sorted(value):
            found.update(str(name).encode())
            _update(found, value[name])
    elif isinstance(value, list) and value and is_picture(value[0]):
        for picture in value:
            found.update(picture_bytes(picture))
    elif hasattr(value, "numpy"):
        found.update(value.detach().cpu().contiguous().numpy().tobytes())
    elif hasattr(value, "tobytes"):
        found.update(value.tobytes())
    else:
        found.update(repr(value).encode())


def digest(hashes: set[str], dataset: Any) -> str:
    """Return one hash of the `sample_hashes` of `dataset` and of its labels in order."""
    labels = [
        label
        for column in ("labels", "label")
        if column in dataset.column_names
        for label in dataset.with_format(None)[column][:]
    ]
    return hashlib.sha256(repr((sorted(hashes), labels)).encode()).hexdigest()[:16]


def sample_hashes(dataset: Any) -> set[str]:
    """Return a hash of each sample without its label; of a picture, the pixels are hashed."""
    return {*_hash_samples(dataset, load_picture)}


def shared_samples(splits: Mapping[str, Any]) -> list[str]:
    """List the samples that occur in two of `splits`, or more than once in `train`; pictures are compared as files."""
    hashes = {name: [*_hash_samples(split, picture_bytes)] for name, split in splits.items()}
    duplicates = len(hashes["train"]) - len({*hashes["train"]})
    found = []
    if duplicates:
        found.append(f"{duplicates} samples of the split 'train' are duplicates")
    for first, second in combinations(hashes, 2):
        if shared := {*hashes[first]} & {*hashes[second]}:
            found.append(f"{len(shared)} samples of the split '{second}' also occur in the split '{first}'")
    return found


def _hash_samples(dataset: Any, read: Callable[[Any], Any]) -> Iterator[str]:
    """Yield a hash of each sample without its label; `read` returns the data of a picture to hash."""
    columns = [name for name in dataset.column_names if name not in ("label", "labels", *MASKS)]
    for row in dataset.with_format(None).select_columns(columns):
        digest = hashlib.sha256()
        for value in row.values():
            if is_picture(value):
                value = read(value)
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
        yield digest.hexdigest()
