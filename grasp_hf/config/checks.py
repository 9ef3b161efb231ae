"""Checks of the settings that a user gives, made before anything is loaded."""

import dataclasses
import difflib
import typing
from collections.abc import Collection
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

METRICS = ("loss", "accuracy", "eval_loss", "eval_accuracy")  # accepted for the choice of the best epoch
TYPE_NAMES = {type(None): "null", list: "list of str"}  # names for users, where Python's own differ
# Arguments of the Trainer that a merge sets itself, and the advice for each.
OWN_ARGUMENTS = {
    "output_dir": "checkpoints are written to the temporary directory (TMPDIR) and then removed",
    "push_to_hub": "push the merged model with push_to_hub() or --push-to-hub",
}


def _check_type(value: Any, hint: Any) -> str | None:
    """Return a text that names the expected type, or `None` if `value` fits the type `hint`.

    A number written as text does not count as a number.
    """
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else "expected one of " + ", ".join(map(repr, get_args(hint)))
    options = get_args(hint) if get_origin(hint) not in (None, list, dict) else (hint,)
    types = tuple(get_origin(option) or option for option in options)
    if isinstance(value, bool):  # Python takes a bool for an int
        fits = bool in types
    else:
        fits = isinstance(value, types) or (float in types and isinstance(value, int))
    if fits and isinstance(value, list) and not all(isinstance(item, str) for item in value):
        fits = False
    if fits:
        return None
    names = " or ".join(TYPE_NAMES.get(kind, kind.__name__) for kind in types)
    advice = " (YAML reads 5e-5 as text: write 5.0e-5)" if isinstance(value, str) and float in types else ""
    return f"expected {names}{advice}"


def value_problems(cls: type, values: dict[str, Any], also_known: Collection[str] = ()) -> list[str]:
    """Return a problem for each unknown key and each value of a wrong type in `values`.

    Args:
        cls: The dataclass whose fields are the known keys.
        values: The values to check, by key.
        also_known: Further keys that the advice on an unknown key may suggest.
    """
    hints = typing.get_type_hints(cls)
    found = []
    for key, value in values.items():
        if key not in hints:
            known = {*hints, *also_known}
            advice = _suggest(key, known) or f", expected one of {', '.join(sorted(known))}"
            if key in _training_arguments():
                advice = f", did you mean training_arguments.{key}"
            found.append(f"{key}: unknown key{advice}")
        elif problem := _check_type(value, hints[key]):
            found.append(f"{key}: got {value!r}, {problem}")
    return found


def _suggest(key: Any, known: Collection[str]) -> str:
    """Return advice that names the known key most similar to `key`; empty if no key is similar."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f", did you mean {close[0]}" if close else ""


def plain_value(value: Any) -> Any:
    """Return `value` with numpy scalars, enumerations, sets and paths converted to types that YAML and JSON can hold."""
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
    """Return the problems of arguments for `transformers.TrainingArguments`: unknown names and wrong values."""
    if not values:
        return []
    known = _training_arguments()
    found = []
    for key, value in values.items():
        if key not in known:
            advice = _suggest(key, known) or ", see transformers.TrainingArguments"
            found.append(f"training_arguments.{key}: unknown key{advice}")
        elif key.endswith("_token"):
            found.append(
                f"training_arguments.{key}: expected none, because the record and the card would show it; set HF_TOKEN"
            )
        elif key in OWN_ARGUMENTS or key.startswith("hub_"):
            advice = OWN_ARGUMENTS.get(key, OWN_ARGUMENTS["push_to_hub"])
            found.append(f"training_arguments.{key}: expected none; {advice}")
        elif key == "metric_for_best_model" and value not in METRICS:
            found.append(f"training_arguments.{key}: got {value!r}, expected {' or '.join(METRICS[:2])}")
        elif set(get_args(known[key]) or (known[key],)) <= {int, float, bool, type(None)}:
            if problem := _check_type(value, known[key]):
                found.append(f"training_arguments.{key}: got {value!r}, {problem}")
            elif key.endswith("_batch_size") and value is not None and value < 1:
                found.append(f"training_arguments.{key}: got {value!r}, expected at least 1")
    return found


def lora_problems(values: dict[str, Any]) -> list[str]:
    """Return the problem that `peft.LoraConfig` has with these arguments, if any."""
    from peft import LoraConfig

    try:
        LoraConfig(**values)
    except (TypeError, ValueError) as error:
        return [f"lora: got {values!r}, expected arguments of peft.LoraConfig: {error}"]
    return []
