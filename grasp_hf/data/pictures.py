"""Pictures of a data set, which are decoded only when they are needed."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError


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


def load_picture(value: Any) -> Image.Image:
    """Return a picture in RGB; of 16 bits per pixel, the upper 8 are kept.

    `value` is a decoded picture, or a dictionary with the bytes or the path of its file.

    Raises:
        DataError: The picture cannot be read, or the range of its pixels is unknown.
    """
    name = (value.get("path") if isinstance(value, dict) else getattr(value, "filename", None)) or "of a data set"
    try:
        image = value
        if isinstance(value, dict):
            image = Image.open(io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"])
        if image.mode.startswith("I;16"):
            image = image.point(lambda level: level / 256, "L")
        if image.mode in ("I", "F"):
            raise ValueError(
                f"its pixels are of type {image.mode}, whose range is unknown; save the picture with 8 bits per pixel"
            )
        return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # Pillow calls a broken PNG a SyntaxError
        raise DataError(f"the picture '{name}' cannot be read: {error}") from error
