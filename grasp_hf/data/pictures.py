"""Pictures of a data set, which are decoded only when they are needed."""

import io
from pathlib import Path
from typing import Any, Literal

from PIL import Image, ImageOps

from ..errors import DataError, first_line
from ..files import LFS_ADVICE, is_lfs_pointer

DEEP = ("I", "F")  # Pillow's modes of pictures with 16 or 32 bits per pixel begin with these letters


def is_picture(value: Any) -> bool:
    """Whether `value` is a picture, decoded or not."""
    return hasattr(value, "convert") or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def picture_bytes(value: Any) -> bytes:
    """Return the bytes of a picture's file, or the pixels of a decoded picture; for a missing file, its name."""
    if not isinstance(value, dict):
        return value.tobytes()
    try:
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    except OSError:  # `load_picture` reports a missing file
        return repr(value).encode()


def load_picture(value: Any, mode: Literal["RGB", "L"] = "RGB") -> Image.Image:
    """Return a picture as a pipeline of transformers sees it: in RGB, and upright as its EXIF orientation says.

    Args:
        value: A decoded picture, or a dictionary with the bytes or the path of its file.
        mode: `L` for a model of one channel, which no pipeline runs.

    Raises:
        DataError: The picture cannot be read, is larger than Pillow allows, or has more than 8 bits per pixel. Pipelines cut
            such pixels off at 255, so the merged model would see another picture than the one it was trained on.
    """
    name = (value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)) or "of a data set"
    try:
        image = value
        if isinstance(value, dict):
            image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        if image.mode.startswith(DEEP):
            raise ValueError(
                f"its pixels are of type {image.mode}, which pipelines cut off at 255; save the picture with 8 bits per "
                "pixel"
            )
        return ImageOps.exif_transpose(image).convert(mode)
    except Exception as error:  # a damaged file makes Pillow raise errors of many types
        pointer = isinstance(value, dict) and is_lfs_pointer(picture_bytes(value))
        reason = f"it is {LFS_ADVICE}" if pointer else first_line(error)
        raise DataError(f"the picture '{name}' cannot be read: {reason}") from error
