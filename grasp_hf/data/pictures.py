"""Pictures as datasets keeps them: as bytes or files, until they are needed."""

import io
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import DataError


def is_picture(value: Any) -> bool:
    """Whether it is a picture, decoded or not."""
    return hasattr(value, "convert") or (isinstance(value, dict) and value.keys() == {"bytes", "path"})


def encoded(value: Any) -> bytes:
    """Return what a picture is kept as, of a decoded one its pixels; where its file is missing, the name of that."""
    if not isinstance(value, dict):
        return value.tobytes()
    try:
        return Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
    except OSError:  # who needs it will say so
        return repr(value).encode()


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
