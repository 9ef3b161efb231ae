"""Configurations of mergekit, read as recipes.

What mergekit's keys become:

- `models`, a list of `model: org/name@revision+org/adapter@revision`, and `base_model`: the sources and the model
  that the target starts from. A base model that is listed among the models too is no source. An adapter is named
  with its base model in mergekit and is a source of its own here; one of another model is refused.
- `merge_method: linear` with equal weights: `method: average`, the mean, without fine-tuning and without the gate.
  The base model counts where mergekit counts it: listed among the models, or given a weight by `parameters`.
- Every other `merge_method` (`ties`, `slerp`, ...) has no counterpart. With `data` the same models are merged by the
  recipe's method, `blend` where none is named, which learns coefficients from the data; with `method: average`
  their mean is kept. `ties` and the others that look at differences from a base model do not count it.
- `slices` and `modules`, which put a model together from layers of others, are refused.
- `parameters` (`weight`, `density`, `normalize`, `int8_mask`, ...), `dtype` and `out_dtype` (all is computed and
  saved in float32), `tokenizer`, `tokenizer_source` and `chat_template` (the start's are kept), `name`: a warning
  names those that are not used.

The recipe's own keys (`method`, `data`, `finetune_epochs`, ...) may stand beside mergekit's and win.
"""

import logging
import math
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

logger = logging.getLogger(__name__)

MARKS = ("merge_method", "models", "slices", "modules")
NOT_USED = ("dtype", "out_dtype", "tokenizer_source", "tokenizer", "chat_template", "name")
CONSUMED = {*MARKS, *NOT_USED, "base_model", "parameters"}
BASE_IS_AN_END = ("slerp", "nearswap", "arcee_fusion")  # between two models, of which one is the base model
MEAN = {
    "method": "average",
    "initial_epochs": 0,
    "finetune_epochs": 0,
    "final_epochs": 0,
    "order": "given",
    "gate": False,
}
SEVERAL_DOCUMENTS = (
    "holds several YAML documents, expected one; where mergekit runs them in turn, write one file for each and name "
    "the output folder of the earlier as a model of the later"
)


def is_mergekit(values: dict[str, Any]) -> bool:
    """Whether these are the keys of a mergekit configuration, and not those of a recipe."""
    return "sources" not in values and any(key in values for key in MARKS)


def translate(values: dict[str, Any], *, name: str = "recipe") -> dict[str, Any]:
    """Return the keys of a recipe that merges what a mergekit configuration names; other keys stay as they are.

    Args:
        values: The keys of a file. Without `merge_method`, `models`, `slices` or `modules`, or with `sources`, they are
            returned unchanged.
        name: What error messages call it.

    Raises:
        ConfigError: It asks for what cannot be merged here; all problems are listed.
    """
    if not is_mergekit(values):
        return values
    own = {key: value for key, value in values.items() if key not in CONSUMED}
    reader = _Reader(values, own)
    recipe = reader.recipe()
    if reader.problems:
        raise ConfigError(f"{name}, a mergekit configuration, has problems", problems=reader.problems)
    if unused := reader.not_used():
        logger.warning("%s is a mergekit configuration; not used of it: %s", name, ", ".join(unused))
    if reader.method == "average" and reader.has_adapters:
        logger.warning(
            "%s: an adapter counts in the mean of the units that it adapts only; mergekit counts it as its base model "
            "in the others",
            name,
        )
    return recipe


@dataclass(frozen=True)
class _Entry:
    """One of `models`, or the base model.

    Attributes:
        where: Its place in the file.
        model: `name` or `name@revision` of the full model.
        adapter: The adapter of that model, if one is named.
        parameters: The mergekit parameters of this model alone.
        unused: Its other keys.
    """

    where: str
    model: str
    adapter: str | None
    parameters: dict[str, Any]
    unused: tuple[str, ...] = ()

    def is_model(self, model: str | None) -> bool:
        """Whether this is the full model that `model` names."""
        return self.adapter is None and _same(self.model, model)


class _Reader:
    """Reads one configuration, and collects its problems."""

    def __init__(self, values: dict[str, Any], own: dict[str, Any]) -> None:
        self.values = values
        self.own = own
        self.problems: list[str] = []
        self.parameters = self._mapping("parameters", values.get("parameters"))
        self.entries = self._entries()
        self.merge_method = values.get("merge_method")
        paper = "copy" if own.get("preset") == "paper" else None
        self.chosen = own.get("method", paper)
        self.method = self.chosen or ("average" if self.merge_method == "linear" else "blend")

    @property
    def has_adapters(self) -> bool:
        """Whether any of the models is named as an adapter of another."""
        return any(entry.adapter for entry in self.entries)

    def recipe(self) -> dict[str, Any]:
        """Return the recipe, of which only the problems matter where there are any."""
        base = self._base()
        others = [entry for entry in self.entries if not entry.is_model(base)]
        sources = [self._source(entry, base) for entry in others]
        counts = self.method == "average" and base is not None and self._counts(base)
        self._check_method()
        if self.chosen is None and self.merge_method == "linear":
            unlisted = [None] if counts and len(others) == len(self.entries) else []
            self._check_weights([*self.entries, *unlisted])
        settings = MEAN if self.method == "average" else {} if self.chosen else {"method": self.method}
        recipe = {**settings, **self.own}
        if counts:
            times = len(self.entries) - len(others) if self.merge_method == "linear" else 1
            return {**recipe, "sources": [base] * max(times, 1) + sources}
        if not sources and not self.problems:
            self.problems.append(f"models: '{base}' is the base model; expected another model to merge into it")
        return {**recipe, "sources": sources, **({"base_model": base} if base else {})}

    def not_used(self) -> list[str]:
        """Return the settings that have no effect, as they stand in the file."""
        mean = self.chosen is None and self.merge_method == "linear"
        honoured = ("weight", "normalize") if mean else ()
        found = [] if mean else [f"merge_method: {self.merge_method} (method {self.method} instead)"]
        found += [f"parameters.{key}" for key in self.parameters if key not in honoured]
        of_models = {key: None for entry in self.entries for key in entry.parameters if key not in honoured}
        found += [f"models.parameters.{key}" for key in of_models]
        found += [f"{entry.where}.{key}" for entry in self.entries for key in entry.unused]
        for key in NOT_USED:
            value = self.values.get(key)
            if value is not None and not (key.endswith("dtype") and value == "float32"):
                found.append(f"{key}: {value}" if isinstance(value, str) and len(value) < 40 else key)
        return found

    def _mapping(self, where: str, value: Any) -> dict[str, Any]:
        if value is None or isinstance(value, dict):
            return value or {}
        self.problems.append(f"{where}: got {value!r}, expected keys such as weight")
        return {}

    def _entries(self) -> list[_Entry]:
        models = self.values.get("models")
        if pieces := [key for key in ("slices", "modules") if self.values.get(key) is not None]:
            self.problems += [
                f"{key}: a model made of layers or parts of others is not supported, expected models: whole ones of "
                "one architecture"
                + (" (slices of all layers, too, can be written as models)" if key == "slices" else "")
                for key in pieces
            ]
        elif not isinstance(models, list) or not models:
            self.problems.append(
                f"models: got {models!r}, expected a list such as [{{model: org/a}}, {{model: org/b}}]"
            )
        if not isinstance(models, list):
            return []
        found = [self._entry(f"models[{index}]", value) for index, value in enumerate(models)]
        return [entry for entry in found if entry]

    def _entry(self, where: str, value: Any) -> _Entry | None:
        if not isinstance(value, dict) or "model" not in value:
            self.problems.append(f"{where}: got {value!r}, expected a key model, as in {{model: org/name}}")
            return None
        parameters = self._mapping(f"{where}.parameters", value.get("parameters"))
        unused = [key for key in value if key not in ("model", "parameters")]
        if isinstance(value["model"], dict):
            unused += [f"model.{key}" for key in value["model"] if key not in ("model", "lora")]
        try:
            return _Entry(where, *_reference(value["model"]), parameters, tuple(unused))
        except ConfigError as error:
            self.problems.append(f"{where}.model: {error}")
            return None

    def _base(self) -> str | None:
        """Return the base model; where none is named, the one model that all adapters belong to."""
        value = self.values.get("base_model")
        if value is None:
            named = {entry.model for entry in self.entries if entry.adapter}
            return named.pop() if len(named) == 1 else None
        try:
            model, adapter = _reference(value)
        except ConfigError as error:
            self.problems.append(f"base_model: {error}")
            return None
        if adapter:
            self.problems.append(
                f"base_model: '{model}+{adapter}' names an adapter, expected a full model; merge it into '{model}' "
                "first (merge_and_unload() of PEFT) and name the result"
            )
        return model

    def _source(self, entry: _Entry, base: str | None) -> str:
        if entry.adapter and not _same(entry.model, base):
            expected = f"the base model '{base}'" if base else "one base model for all, named as base_model"
            self.problems.append(
                f"{entry.where}.model: '{entry.adapter}' is named as an adapter of '{entry.model}', expected one of "
                f"{expected}; merge it into '{entry.model}' first (merge_and_unload() of PEFT) and name the result"
            )
        return entry.adapter or entry.model

    def _counts(self, base: str) -> bool:
        """Whether the mean of this configuration is one over its base model, too."""
        if self.merge_method == "linear":
            weighted = self.values.get("base_model") is not None and "weight" in self.parameters
            return weighted or any(entry.is_model(base) for entry in self.entries)
        return self.merge_method in BASE_IS_AN_END

    def _check_method(self) -> None:
        if not isinstance(self.merge_method, str):
            self.problems.append(
                f"merge_method: got {self.merge_method!r}, expected a name such as linear; a recipe that is not "
                "mergekit's names its models under sources"
            )
        elif self.merge_method != "linear" and self.chosen is None and not self.own.get("data"):
            self.problems.append(
                f"merge_method: {self.merge_method} is not done here, where coefficients are learned from labelled "
                "data; add data: to merge the same models so, or method=average for their mean"
            )

    def _check_weights(self, counted: Sequence[_Entry | None]) -> None:
        """Check that the weights of a linear merge make a mean; `None` stands for a base model that is not listed."""
        common = self.parameters.get("weight")
        given = [entry.parameters.get("weight", common) if entry else common for entry in counted]
        normalize = self.parameters.get("normalize", True)
        if not isinstance(normalize, (bool, int)):
            self.problems.append(f"parameters.normalize: got {normalize!r}, expected true or false")
        if all(weight is None for weight in given):
            return
        advice = "leave the weights out for the mean, or add data: and method: blend to learn coefficients from data"
        weights = [_number(weight) for weight in given]
        first = weights[0] or 0.0
        if not all(weight is not None and math.isclose(weight, first, rel_tol=1e-6) for weight in weights):
            shown = ", ".join("none" if weight is None else str(weight) for weight in given)
            self.problems.append(f"weight: got {shown}, expected one number, equal for all models; {advice}")
        elif first == 0:
            self.problems.append(f"weight: got 0 for all models; {advice}")
        elif not normalize and not math.isclose(first * len(weights), 1, rel_tol=1e-6):
            self.problems.append(
                f"parameters.normalize: got false with weights that sum to {first * len(weights):g}, expected "
                f"1; {advice}"
            )


def _same(model: str, other: str | None) -> bool:
    return other is not None and posixpath.normpath(model) == posixpath.normpath(other)


def _number(value: Any) -> float | None:
    """Return a weight as a number, also one that YAML reads as text (`5e-1`); `None` for gradients and filters."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _reference(value: Any) -> tuple[str, str | None]:
    """Return the full model and the adapter that a reference names, as text or with the keys `model` and `lora`."""
    if isinstance(value, str):
        model, plus, adapter = value.partition("+")
        if plus and (not adapter or "+" in adapter):
            raise ConfigError(f"got '{value}', expected a model, or model+adapter")
        return _path(model), _path(adapter) if plus else None
    if not isinstance(value, dict):
        raise ConfigError(f"got {value!r}, expected org/name, org/name@revision or a folder")
    lora = value.get("lora")
    return _path(value.get("model")), None if lora is None else _path(lora)


def _path(value: Any) -> str:
    """Return `name` or `name@revision` from text, or from a mapping with the keys `path` and `revision`."""
    name: Any = value
    revision: Any = None
    if isinstance(value, str):
        name, _, revision = value.partition("@")
    elif isinstance(value, dict):
        name, revision = value.get("path"), value.get("revision")
    if not isinstance(name, str) or not name or not (revision is None or isinstance(revision, str)):
        raise ConfigError(f"got {value!r}, expected org/name, org/name@revision or a folder")
    if "@" in (revision or ""):
        raise ConfigError(f"got {value!r}, expected one @ before the revision")
    return f"{name}@{revision}" if revision else name
