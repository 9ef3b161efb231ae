"""Whether the inputs of a source were prepared like those of the target: pictures by image processors, texts by tokenizers."""

from __future__ import annotations

from typing import Any

from .architecture import show, values_equal

PICTURES = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)


def preparation_notes(target: Any, source: Any) -> list[str]:
    """Return a note that lists how the preparation of a source's inputs differs from that of the target's.

    The merge keeps the preparation of the target, so that the source sees its inputs in another form.

    Args:
        target: The target's tokenizer or processor; `None` if it has none.
        source: The source's.
    """
    ours, theirs = (_settings(processing_class) for processing_class in (source, target))
    found = [
        f"{name}: got {show(ours[name])}, expected {show(theirs[name])}"
        for name in theirs
        if name in ours and not values_equal(ours[name], theirs[name])
    ]
    return [f"its inputs were prepared in another way than the target's: {'; '.join(found)}"] if found else []


def _settings(processing_class: Any) -> dict[str, Any]:
    """Return the settings that change what a model sees of an input, without the vocabulary."""
    images = getattr(processing_class, "image_processor", processing_class)
    if hasattr(images, "image_mean"):
        values = images.to_dict()
        return {name: _plain(values[name]) for name in PICTURES if values.get(name) is not None}
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if hasattr(tokenizer, "backend_tokenizer"):
        return {"normalizer": repr(tokenizer.backend_tokenizer.normalizer)}
    return {}


def _plain(value: Any) -> Any:
    """Return a value as `values_equal` compares it: a tuple as a list, a size without its missing entries."""
    if isinstance(value, tuple | list):
        return list(value)
    if isinstance(value, int | float | str):
        return value
    return {key: size for key, size in dict(value).items() if size is not None}
