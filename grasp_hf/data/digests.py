"""What a data set holds, as hashes: to find a sample again, and to tell whether the data is still the same."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from itertools import combinations
from typing import Any

from .pictures import encoded, is_picture, picture

MASKS = ("attention_mask", "token_type_ids")
SAMPLES = 1000  # of which a description is made, evenly spaced: more would cost as much as an epoch


def fingerprint(dataset: Any) -> dict[str, Any] | None:
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
    hashes = {name: [*_hashes(split, encoded)] for name, split in splits.items()}
    twice = len(hashes["train"]) - len({*hashes["train"]})
    found = [f"{twice} samples of the split 'train' stand there again"] if twice else []
    for of, split in combinations(hashes, 2):
        if shared := {*hashes[of]} & {*hashes[split]}:
            found.append(f"{len(shared)} samples of the split '{split}' also stand in the split '{of}'")
    return found


def _hashes(dataset: Any, read: Callable[[Any], Any]) -> Iterator[str]:
    """Yield a hash of each sample, beside its label; `read` says what of a picture counts."""
    columns = [name for name in dataset.column_names if name not in ("label", "labels", *MASKS)]
    for row in dataset.with_format(None).select_columns(columns):
        digest = hashlib.sha256()
        for value in row.values():
            if is_picture(value):
                value = read(value)
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
        yield digest.hexdigest()
