"""The settings of a merge as rows for a reader: the help of the command line, and the tables of `recipes/README.md`."""

import inspect
import json
import re
import textwrap
import types
import typing
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any, Literal, get_args, get_origin

from .grasp import GraspConfig

GROUPS = {
    "Merging": (
        "method",
        "unit",
        "threshold",
        "num_batches",
        "accumulate_gradients",
        "batch_size",
        "coefficient_lr",
    ),
    "Validation": ("gate",),
    "Fine-tuning": ("initial_epochs", "finetune_epochs", "final_epochs", "lora", "training_arguments"),
    "Sources": ("order", "top", "prefetch", "accepted_bases", "source_options", "untie", "check", "trust_remote_code"),
    "Reproduction": ("seed", "published"),
}
TYPES = {
    bool: "true | false",
    int: "integer",
    float: "number",
    str: "text",
    list: "list",
    dict: "section",
    types.NoneType: "null",
}
ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)  # of a Google-style section, indented by four
SENTENCE = re.compile(r"(.+?)\.( |$)")


@dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: Field of `GraspConfig`, and key of a recipe.
        group: Its group in `GROUPS`.
        values: The type, or the choices with `|` between them.
        default: As YAML writes it.
        meaning: The whole description, in Markdown, on one line.
    """

    name: str
    group: str
    values: str
    default: str
    meaning: str

    @property
    def summary(self) -> str:
        """The first sentence of the description, without its full stop and without Markdown."""
        sentence = SENTENCE.match(self.meaning)
        return sentence[1].replace("`", "") if sentence else ""


def settings() -> list[Setting]:
    """Return every field of `GraspConfig` as a row, in the order of `GROUPS`."""
    hints = typing.get_type_hints(GraspConfig)
    meanings = {name: " ".join(text.split()) for name, text in ENTRY.findall(inspect.getdoc(GraspConfig) or "")}
    by_name = {field.name: field for field in fields(GraspConfig)}
    return [
        Setting(name, group, _values(hints[name]), _default(by_name[name]), meanings.get(name, ""))
        for group, names in GROUPS.items()
        for name in names
    ]


def settings_help(width: int) -> str:
    """Return all settings for a terminal of `width` columns: `name=default`, and the first sentence of each."""
    rows = settings()
    column = max(len(f"  {row.name}={row.default}  ") for row in rows)
    lines = ["settings (key=value), with their defaults:"]
    for group in GROUPS:
        lines.append(f" {group}")
        for row in rows:
            if row.group == group:
                start = f"  {row.name}={row.default}".ljust(column)
                text = f"{row.summary} ({row.values})"
                lines += textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * column)
    return "\n".join(lines)


def _values(hint: Any) -> str:
    """Return the values that a type allows, in the words of YAML."""
    if get_origin(hint) is Literal:
        return " | ".join(get_args(hint))
    options = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " | ".join(TYPES[get_origin(option) or option] for option in options)


def _default(field: "Field[Any]") -> str:
    value = field.default if field.default_factory is MISSING else field.default_factory()
    return value if isinstance(value, str) else json.dumps(value)
