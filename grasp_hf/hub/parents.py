"""The float model that a quantized model on the Hub was made from."""

from __future__ import annotations

import json

from ..errors import GraspError
from .download import fetch, resolve
from .listing import Listing
from .reference import SourceRef

LARGEST_CONFIG = 2**20  # bytes


def float_parent(name: str, *, token: str | None = None) -> str | None:
    """Return the name of the float model that a quantized model was made from, as its card says.

    Return `None` if `name` is not quantized, if its card names no base model or several, or if the Hub does not tell.

    Args:
        name: Hub id.
        token: Hub token.
    """
    seen: set[str] = set()
    found: str | None = None
    while name not in seen:  # a quantized model may be made from another one
        seen.add(name)
        listing = _listing(name, token)
        if listing is None or not _is_quantized(listing, token) or len(listing.base_models) != 1:
            return found
        found = name = listing.base_models[0]
    return None


def is_same_repository(name: str, other: str, *, token: str | None = None) -> bool:
    """Whether two Hub ids name one repository, perhaps before and after a renaming."""
    if name == other:
        return True
    listings = [_listing(each, token) for each in (name, other)]
    return None not in listings and len({listing.repo_id for listing in listings if listing}) == 1


def _listing(name: str, token: str | None) -> Listing | None:
    try:
        ref = SourceRef.parse(name)
        return None if ref.is_local else resolve(ref, token=token)
    except GraspError:
        return None


def _is_quantized(listing: Listing, token: str | None) -> bool:
    path = f"{listing.folder}config.json"
    if path not in listing.files or listing.files[path].size > LARGEST_CONFIG:
        return False
    try:
        config = json.loads(fetch(listing, path, token=token).read_text(encoding="utf-8"))
    except (GraspError, ValueError, OSError, RecursionError):
        return False
    return isinstance(config, dict) and bool(config.get("quantization_config"))
