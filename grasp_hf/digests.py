"""What a data set holds, as hashes: to find a sample again, and to tell whether the data is still the same."""

import hashlib
from typing import Any

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
    """Return a hash of what each sample holds beside its label."""
    columns = [name for name in dataset.column_names if name not in ("label", "labels", *MASKS)]
    found = set()
    for row in dataset.with_format(None).select_columns(columns):
        digest = hashlib.sha256()
        for value in row.values():
            if hasattr(value, "convert"):  # an image, in whatever mode it is kept
                value = value.convert("RGB")
            digest.update(value.tobytes() if hasattr(value, "tobytes") else repr(value).encode())
        found.add(digest.hexdigest())
    return found
