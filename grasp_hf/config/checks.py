"""Checks of values that a user wrote, before anything is loaded."""

import dataclasses
import difflib
import typing
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

METRICS = ("loss", "accuracy", "eval_loss", "eval_accuracy")  # that can choose the best epoch
KIND_NAMES = {type(None): "null", list: "list of str"}  # of those that Python calls otherwise
OWN_ARGUMENTS = {  # of the Trainer, that a merge sets itself
    "output_dir": "checkpoints lie in the temporary directory (TMPDIR), and are removed",
    "push_to_hub": "push the merge, with push_to_hub() or --push-to-hub",
}


def _type_problem(value: Any, hint: Any) -> str | None:
    """Say what `hint` expects where `value` is something else; a number in a string is never taken for a number."""
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else "expected one of " + ", ".join(map(repr, get_args(hint)))
    options = get_args(hint) if get_origin(hint) not in (None, list, dict) else (hint,)
    kinds = tuple(get_origin(option) or option for option in options)
    if isinstance(value, bool):
        fits = bool in kinds
    else:
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
    if fits and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        fits = False
    if fits:
        return None
    names = " or ".join(KIND_NAMES.get(kind, kind.__name__) for kind in kinds)
    advice = " (YAML reads 5e-5 as text: write 5.0e-5)" if isinstance(value, str) and float in kinds else ""
    return f"expected {names}{advice}"


def value_problems(cls: type, values: dict[str, Any], beside: Collection[str] = ()) -> list[str]:
    """List every unknown key and every value of a wrong type among `values` for the dataclass `cls`.

    Keys `beside` those of the class may be meant by an unknown one, too.
    """
    hints = typing.get_type_hints(cls)
    found = []
    for key, value in values.items():
        if key not in hints:
            known = {*hints, *beside}
            advice = _meant(key, known) or f", expected one of {', '.join(sorted(known))}"
            if key in _training_arguments():
                advice = f", did you mean training_arguments.{key}"
            found.append(f"{key}: unknown key{advice}")
        elif problem := _type_problem(value, hints[key]):
            found.append(f"{key}: got {value!r}, {problem}")
    return found


def _meant(key: Any, known: Collection[str]) -> str:
    """Return the question whether the known key most like `key` was meant; empty where none is like it."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f", did you mean {close[0]}" if close else ""


def plain_value(value: Any) -> Any:
    """Return numpy scalars, enumerations, sets and paths in `value` as what YAML and JSON can hold."""
    import numpy as np

    if isinstance(value, dict):
        return {key: plain_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_value(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(plain_value, value), key=str)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _training_arguments() -> dict[str, Any]:
    """Return the type of each training argument."""
    from transformers import TrainingArguments

    types = typing.get_type_hints(TrainingArguments)
    return {field.name: types[field.name] for field in dataclasses.fields(TrainingArguments)}


def training_argument_problems(values: dict[str, Any]) -> list[str]:
    """List what `transformers.TrainingArguments` would not take: unknown names, and text where a number is due."""
    if not values:
        return []
    known = _training_arguments()
    found = []
    for key, value in values.items():
        if key not in known:
            advice = _meant(key, known) or ", see transformers.TrainingArguments"
            found.append(f"training_arguments.{key}: unknown key{advice}")
        elif key.endswith("_token"):
            found.append(
                f"training_arguments.{key}: expected none, as the record and the card would show it; set HF_TOKEN"
            )
        elif key in OWN_ARGUMENTS or key.startswith("hub_"):
            advice = OWN_ARGUMENTS.get(key, OWN_ARGUMENTS["push_to_hub"])
            found.append(f"training_arguments.{key}: expected none; {advice}")
        elif key == "metric_for_best_model" and value not in METRICS:
            found.append(f"training_arguments.{key}: got {value!r}, expected {' or '.join(METRICS[:2])}")
        elif set(get_args(known[key]) or (known[key],)) <= {int, float, bool, type(None)}:
            if problem := _type_problem(value, known[key]):
                found.append(f"training_arguments.{key}: got {value!r}, {problem}")
            elif key.endswith("_batch_size") and value is not None and value < 1:
                found.append(f"training_arguments.{key}: got {value!r}, expected at least 1")
    return found


def lora_problems(values: dict[str, Any]) -> list[str]:
    """List what `peft.LoraConfig` would not take."""
    from peft import LoraConfig

    try:
        LoraConfig(**values)
    except (TypeError, ValueError) as error:
        return [f"lora: got {values!r}, expected arguments of peft.LoraConfig: {error}"]
    return []
