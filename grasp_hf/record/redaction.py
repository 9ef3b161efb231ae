"""Removes from a record what others must not see: secrets in URLs, and paths on this machine."""

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

SECRET = re.compile("auth|credential|key|pass|secret|sig|token", re.IGNORECASE)  # in names of a URL's parameters


def without_secrets(value: Any) -> Any:
    """Return `value` without the passwords, tokens and signatures of the URLs in it, at any depth."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if not isinstance(value, str) or "://" not in value:
        return value
    return "::".join(map(_redact_url, value.split("::")))  # `datasets` chains URLs, such as "zip://a.csv::https://…"


def _redact_url(url: str) -> str:
    if "://" not in url:
        return url
    parts = urlsplit(url)
    query, fragment = (
        "&".join(pair for pair in part.split("&") if not SECRET.search(pair.partition("=")[0]))
        for part in (parts.query, parts.fragment)
    )
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query, fragment=fragment))


def names_of_paths(value: Any) -> Any:
    """Return `value` with the last part of every absolute path in it, at any depth, instead of the path."""
    if isinstance(value, dict):
        return {names_of_paths(key): names_of_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [names_of_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value
