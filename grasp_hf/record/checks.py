"""The checks of a record: a stranger may have written the file, so every value is checked like input."""

import math
import re
import types
import typing
from collections.abc import Hashable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, Literal, get_args, get_origin

from ..config.methods import METHODS
from ..errors import ConfigError, one_line

LONGEST_TEXT = 20_000  # characters


def check_record(record: Any) -> None:
    """Raise `ConfigError` with all problems if a value in a record has another type or range than this package writes."""
    problems = list(_problems(record))
    if not problems:
        problems = list(_contradictions(record))
    if problems:
        raise ConfigError("the record has wrong values", problems=problems[:10])


@cache
def _hints(cls: Hashable) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _problems(entry: Any, path: str = "") -> Iterator[str]:
    """Yield a problem for each field of a dataclass, at any depth, whose value has another type than its hint."""
    hints = _hints(type(entry))  # type: ignore[arg-type]
    for name in (field.name for field in fields(entry)):
        yield from _value_problems(getattr(entry, name), hints[name], f"{path}{name}")


def _value_problems(value: Any, hint: Any, path: str) -> Iterator[str]:
    origin, options = get_origin(hint), get_args(hint)
    if hint is Any:
        return
    if origin in (types.UnionType, typing.Union):
        if value is not None or type(None) not in options:
            others = [option for option in options if option is not type(None)]
            yield from _value_problems(value, others[0], path)
    elif origin is Literal:
        if value not in options:
            yield f"{path}: got {one_line(repr(value), 100)}, expected one of {', '.join(map(repr, options))}"
    elif origin is list:
        if not isinstance(value, list):
            yield _wrong(path, value, "a list")
        else:
            for number, item in enumerate(value):
                yield from _value_problems(item, options[0], f"{path}[{number}]")
    elif origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            yield _wrong(path, value, "texts with values")
        else:
            for key, item in value.items():
                yield from _value_problems(item, options[1], f"{path}.{one_line(key, 100)}")
    elif is_dataclass(hint):
        if type(value) is not hint:
            yield _wrong(path, value, "an entry")
        else:
            yield from _problems(value, f"{path}.")
    elif hint is float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            yield _wrong(path, value, "a number")
    elif hint is int:  # every integer of a record counts something
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            yield _wrong(path, value, "an integer of 0 or more")
    elif hint is str and isinstance(value, str) and len(value) > LONGEST_TEXT:
        yield f"{path}: got {len(value)} characters, expected at most {LONGEST_TEXT}"
    elif not isinstance(value, hint):
        yield _wrong(path, value, {str: "a text", bool: "true or false"}.get(hint, hint.__name__))


def _wrong(path: str, value: Any, expected: str) -> str:
    return f"{path}: got {one_line(repr(value), 100)}, expected {expected}"


def _contradictions(record: Any) -> Iterator[str]:
    """Yield a problem for each value of a record that has the right type, but that another value excludes."""
    run = record.run
    method = run.config.get("method")
    if run.config and (not isinstance(method, str) or method not in METHODS):
        yield _wrong("run.config.method", method, f"one of {', '.join(METHODS)}")
    if record.continued_steps > len(record.steps):
        yield _wrong("continued_steps", record.continued_steps, f"at most {len(record.steps)}, the number of steps")
    if record.start and "loss" not in record.start:
        yield "start: expected a loss"
    data = run.recipe.get("data")
    if data is not None and not isinstance(data, dict):
        yield _wrong("run.recipe.data", data, "a section")
    for name, split in run.data.items():
        if split is not None and (not isinstance(split, dict) or not isinstance(split.get("samples", 0), int)):
            yield _wrong(f"run.data.{one_line(name, 100)}", split, "a number of samples and a digest")
    # The card shows these words as they are, in sentences of this package.
    said = {
        **{f"run.controls[{k}].name": control.name for k, control in enumerate(run.controls)},
        **{f"run.controls[{k}].validated_by": control.validated_by for k, control in enumerate(run.controls)},
        **{f"steps[{k}].validated_by": step.validated_by for k, step in enumerate(record.steps)},
        **({"run.final.validated_by": run.final.validated_by} if run.final else {}),
    }
    for path, text in said.items():
        if not re.fullmatch(r"[A-Za-z0-9 ,.()-]{0,200}", text):
            yield _wrong(path, text, "words of this package")
    measured = [record.start, run.test, *([run.final.after] if run.final else [])]
    measured += [values for step in record.steps for values in (step.before, step.after_transfer, step.after)]
    measured += [values for control in run.controls for values in (control.alone, control.merged)]
    for name in sorted({name for values in measured for name in values} - {"loss", "accuracy"}):
        yield _wrong("a measurement", name, "loss or accuracy")
    for number, row in enumerate(run.ranking):
        if not isinstance(row.get("reference"), str):
            yield _wrong(f"run.ranking[{number}].reference", row.get("reference"), "a text")
    for number, control in enumerate(run.controls):
        if control.alone.keys() != control.merged.keys():
            yield f"run.controls[{number}]: expected the same measurements of both models"
    shas = {"base_sha": record.base_sha, **{f"steps[{k}].sha": step.sha for k, step in enumerate(record.steps)}}
    for path, sha in shas.items():
        if sha is not None and not (sha.isalnum() and sha.isascii() and len(sha) <= 64):
            yield _wrong(path, sha, "a commit")
    finetuned = {f"steps[{k}].finetuned": step.finetuned for k, step in enumerate(record.steps)} | {
        "run.final": run.final
    }
    for path, entry in finetuned.items():
        if entry is None:
            continue
        if not 0 <= entry.fraction <= 1:
            yield _wrong(f"{path}.fraction", entry.fraction, "a number from 0 to 1")
        elif entry.losses and not {"0.0", str(entry.fraction)} <= entry.losses.keys():
            yield f"{path}.losses: expected those at 0.0 and at {entry.fraction}"
        elif not all(_is_number(key) for key in entry.losses):
            yield f"{path}.losses: expected numbers from 0 to 1 as keys"
        if entry.gain is not None and not entry.losses:
            yield f"{path}.gain: expected losses with it"
    for number, step in enumerate(record.steps):
        if step.chosen and len(step.candidates) > 1 and step.chosen not in step.candidates:
            yield _wrong(f"steps[{number}].chosen", step.chosen, f"one of {', '.join(step.candidates)}")
        if step.kind not in ("full", "adapter"):
            yield _wrong(f"steps[{number}].kind", step.kind, "full or adapter")
        if not (step.seconds >= 0 and 0 <= step.weight < math.inf):
            yield f"steps[{number}]: got {step.seconds} seconds and weight {step.weight}, expected 0 or more"


def _is_number(text: str) -> bool:
    try:
        return 0 <= float(text) <= 1
    except ValueError:
        return False
