"""What a user says about single sources: the entries of `sources:` that are more than a reference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError
from .checks import plain_value, value_problems


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """What the user says about one source.

    Attributes:
        labels: Names of its classes by class id, instead of the names in its files.
        same_tokenizer: Whether its tokens have the numbers that they have in the target; its own tokenizer is not read.
        accept: Settings of its config whose difference from the target's the user accepts, by their paths.
    """

    labels: list[str] | None = None
    same_tokenizer: bool = False
    accept: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, reference: str, given: Mapping[str, Mapping[str, Any]]) -> SourceOptions:
        """Return the options of a source from those of all sources, by reference, with its revision or without."""
        by_name = {_normalized(name): options for name, options in given.items()}
        name = _normalized(reference)
        return cls(**by_name.get(name, by_name.get(name.partition("@")[0], {})))


NO_OPTIONS = SourceOptions()


def recipe_entry(reference: str, **options: Any) -> str:
    """Return a line of a recipe that names a source with options, for the advice in an error.

    >>> recipe_entry("org/name", same_tokenizer=True)
    'sources: [{id: org/name, same_tokenizer: true}]'
    """
    entry = {"id": reference, **options}
    return f"sources: [{yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, width=math.inf).strip()}]"


def _normalized(reference: str) -> str:
    return str(Path(reference).expanduser())


@dataclass(frozen=True, kw_only=True)
class _Entry(SourceOptions):
    """An entry of `sources:` as a section; the parts of its reference may have keys of their own."""

    id: str = ""
    revision: str | None = None
    subfolder: str | None = None

    @property
    def reference(self) -> str:
        if not self.subfolder and not self.revision:
            return self.id
        name, _, revision = self.id.partition("@")
        name = f"{name}/{self.subfolder}" if self.subfolder else name
        revision = self.revision or revision
        return f"{name}@{revision}" if revision else name


def option_problems(options: Any) -> list[str]:
    """Return the problems of the setting `source_options`."""
    if not isinstance(options, Mapping):
        return []  # the check of types reports it
    found = []
    for name, values in options.items():
        if not isinstance(values, Mapping):
            found.append(f"source_options['{name}']: got {values!r}, expected a section with keys")
            continue
        found += [f"source_options['{name}'].{problem}" for problem in _problems(SourceOptions, values)]
    return found


def split_entries(entries: Iterable[Any]) -> tuple[list[Any], dict[str, dict[str, Any]], list[str]]:
    """Divide the entries of `sources:` into references and options.

    Args:
        entries: References, and sections such as `{id: org/name, labels: [negative, positive]}`.

    Returns:
        The references, the options of those sources that have some, by reference, and a list of problems.
    """
    references: list[Any] = []
    options: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for number, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            references.append(entry)
            continue
        entry = plain_value(dict(entry))
        found = _problems(_Entry, entry)
        if not found and not entry.get("id"):
            found.append("id: missing, expected a reference, such as org/name")
        if not found and entry.get("revision") and "@" in entry["id"]:
            found.append(
                f"revision: got {entry['revision']!r}, but the id names one: '{entry['id']}'; leave out one of them"
            )
        problems += [f"sources[{number}].{problem}" for problem in found]
        if found:
            continue
        reference = _Entry(**entry).reference
        own = {f.name: entry[f.name] for f in fields(SourceOptions) if f.name in entry}
        if reference in references and own != options.get(reference, {}):
            problems.append(f"sources[{number}]: '{reference}' occurs twice with other keys; expected the same keys")
        references.append(reference)
        if own:
            options[reference] = own
    return references, options, problems


def _problems(cls: type[SourceOptions], values: Mapping[str, Any]) -> list[str]:
    found = value_problems(cls, dict(values))
    for key in ("labels", "accept"):
        listed = values.get(key)
        if isinstance(listed, list) and any(not isinstance(item, str) for item in listed):
            found = [problem for problem in found if not problem.startswith(f"{key}: ")]
            found.append(f"{key}: got {listed!r}, expected texts; put each in quotes, such as 'no' or '1'")
    labels = values.get("labels")
    if isinstance(labels, list) and not labels:
        found.append("labels: got [], expected a name for each class")
    return found


def require_entries(entries: Iterable[Any]) -> tuple[list[Any], dict[str, dict[str, Any]]]:
    """Return the references and the options of `split_entries`; raise `ConfigError` with all problems."""
    references, options, problems = split_entries(entries)
    if problems:
        raise ConfigError("the sources have problems", problems=problems)
    return references, options
