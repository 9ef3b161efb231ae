"""Configurations of mergekit, read as recipes.

The keys of mergekit are translated as follows:

- `models` and `base_model` become the sources and the model that the target starts from. `models` is a list of
  `model: org/name@revision+org/adapter@revision`. A base model that is also in `models` is not a source. mergekit
  names an adapter together with its base model; here the adapter alone is the source. An adapter of another base model
  is refused.
- `merge_method: linear` with equal weights becomes `method: average`, without fine-tuning and without the gate. The
  base model is part of the mean if it is part of mergekit's: if it is in `models`, or if `parameters` gives it a
  weight.
- Any other `merge_method` (`ties`, `slerp`, ...) has no counterpart. With `data`, the same models are merged by the
  method of the recipe; the default is `weighted`, which weighs the sources by the data. With `method: average`, the
  result is their mean. The base model is part of the mean of a method between two models, such as `slerp`. It is not
  part of the mean of a method that uses differences from a base model, such as `ties`.
- `slices` and `modules`, which build a model from layers of other models, are refused.
- `parameters` (`weight`, `density`, `normalize`, `int8_mask`, ...), `dtype` and `out_dtype` (everything is computed
  and saved in float32), `tokenizer`, `tokenizer_source` and `chat_template` (those of the target are kept) and `name`:
  a warning lists the keys that are not used.

A file may also contain keys of a recipe (`method`, `data`, `finetune_epochs`, ...). These keys win.
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
BETWEEN_TWO_MODELS = ("slerp", "nearswap", "arcee_fusion")  # one of the two is the base model
MEAN_SETTINGS = {
    "method": "average",
    "initial_epochs": 0,
    "finetune_epochs": 0,
    "final_epochs": 0,
    "order": "given",
    "gate": False,
}
SEVERAL_DOCUMENTS = (
    "holds several YAML documents, expected one; mergekit runs them in turn: write one file for each document, and "
    "name the output folder of each merge as a model of the next"
)


def is_mergekit(values: dict[str, Any]) -> bool:
    """Whether the keys of a file are those of a mergekit configuration, not those of a recipe."""
    return "sources" not in values and any(key in values for key in MARKS)


def translate(values: dict[str, Any], *, name: str = "recipe") -> dict[str, Any]:
    """Return the keys of a recipe that merges the models of a mergekit configuration.

    Args:
        values: The keys of a file. The keys of a recipe are returned unchanged.
        name: Name of the file in messages.

    Raises:
        ConfigError: The configuration cannot be translated. The error lists all problems.
    """
    if not is_mergekit(values):
        return values
    own = {key: value for key, value in values.items() if key not in CONSUMED}
    reader = _Reader(values, own)
    recipe = reader.recipe()
    if reader.problems:
        raise ConfigError(f"{name}, a mergekit configuration, has problems", problems=reader.problems)
    if unused := reader.not_used():
        logger.warning("%s is a mergekit configuration; these keys are not used: %s", name, ", ".join(unused))
    if reader.method == "average" and reader.has_adapters:
        logger.warning(
            "%s: an adapter is part of the mean only in the units that it adapts; in the other units, mergekit adds its "
            "base model to the mean",
            name,
        )
    return recipe


@dataclass(frozen=True)
class _Entry:
    """One entry of `models`.

    Attributes:
        where: Place of the entry in the file, such as `models[0]`.
        model: `name` or `name@revision` of the full model.
        adapter: Adapter of the full model, if the entry names one.
        parameters: mergekit parameters of this entry alone.
        unused: Other keys of the entry.
    """

    where: str
    model: str
    adapter: str | None
    parameters: dict[str, Any]
    unused: tuple[str, ...] = ()

    def is_model(self, model: str | None) -> bool:
        """Whether this entry is the full model `model`, without an adapter."""
        return self.adapter is None and _is_same_model(self.model, model)


class _Reader:
    """Translates one configuration and collects its problems."""

    def __init__(self, values: dict[str, Any], own: dict[str, Any]) -> None:
        self.values = values
        self.own = own
        self.problems: list[str] = []
        self.parameters = self._read_mapping("parameters", values.get("parameters"))
        self.entries = self._read_entries()
        self.merge_method = values.get("merge_method")
        paper = "copy" if own.get("preset") == "paper" else None
        self.chosen = own.get("method", paper)
        self.method = self.chosen or ("average" if self.merge_method == "linear" else "weighted")

    @property
    def has_adapters(self) -> bool:
        """Whether any entry names an adapter."""
        return any(entry.adapter for entry in self.entries)

    def recipe(self) -> dict[str, Any]:
        """Return the keys of the recipe; they are only valid if `problems` is empty."""
        base = self._find_base()
        others = [entry for entry in self.entries if not entry.is_model(base)]
        sources = [self._find_source(entry, base) for entry in others]
        counts = self.method == "average" and base is not None and self._counts_base(base)
        self._check_method()
        if self.chosen is None and self.merge_method == "linear":
            unlisted = [None] if counts and len(others) == len(self.entries) else []
            self._check_weights([*self.entries, *unlisted])
        settings: dict[str, Any] = {}
        if self.method == "average":
            settings = MEAN_SETTINGS
        elif not self.chosen:
            settings = {"method": self.method}
        recipe = {**settings, **self.own}
        if counts:
            times = len(self.entries) - len(others) if self.merge_method == "linear" else 1
            return {**recipe, "sources": [base] * max(times, 1) + sources}
        if not sources and not self.problems:
            self.problems.append(f"models: '{base}' is the base model; expected a second model to merge into it")
        return {**recipe, "sources": sources, **({"base_model": base} if base else {})}

    def not_used(self) -> list[str]:
        """Return the settings without effect, named as in the file."""
        is_mean = self.chosen is None and self.merge_method == "linear"
        used = ("weight", "normalize") if is_mean else ()
        found = [] if is_mean else [f"merge_method: {self.merge_method} (method {self.method} instead)"]
        found += [f"parameters.{key}" for key in self.parameters if key not in used]
        of_models = {key: None for entry in self.entries for key in entry.parameters if key not in used}
        found += [f"models.parameters.{key}" for key in of_models]
        found += [f"{entry.where}.{key}" for entry in self.entries for key in entry.unused]
        for key in NOT_USED:
            value = self.values.get(key)
            if value is not None and not (key.endswith("dtype") and value == "float32"):
                found.append(f"{key}: {value}" if isinstance(value, str) and len(value) < 40 else key)
        return found

    def _read_mapping(self, where: str, value: Any) -> dict[str, Any]:
        if value is None or isinstance(value, dict):
            return value or {}
        self.problems.append(f"{where}: got {value!r}, expected keys such as weight")
        return {}

    def _read_entries(self) -> list[_Entry]:
        models = self.values.get("models")
        if pieces := [key for key in ("slices", "modules") if self.values.get(key) is not None]:
            for key in pieces:
                problem = (
                    f"{key}: a model made of layers or parts of others is not supported, expected models: whole models "
                    "of one architecture"
                )
                if key == "slices":
                    problem += " (write slices that cover all layers as models)"
                self.problems.append(problem)
        elif not isinstance(models, list) or not models:
            self.problems.append(
                f"models: got {models!r}, expected a list such as [{{model: org/a}}, {{model: org/b}}]"
            )
        if not isinstance(models, list):
            return []
        found = [self._read_entry(f"models[{index}]", value) for index, value in enumerate(models)]
        return [entry for entry in found if entry]

    def _read_entry(self, where: str, value: Any) -> _Entry | None:
        if not isinstance(value, dict) or "model" not in value:
            self.problems.append(f"{where}: got {value!r}, expected the key model, as in {{model: org/name}}")
            return None
        parameters = self._read_mapping(f"{where}.parameters", value.get("parameters"))
        unused = [key for key in value if key not in ("model", "parameters")]
        if isinstance(value["model"], dict):
            unused += [f"model.{key}" for key in value["model"] if key not in ("model", "lora")]
        try:
            return _Entry(where, *_read_reference(value["model"]), parameters, tuple(unused))
        except ConfigError as error:
            self.problems.append(f"{where}.model: {error}")
            return None

    def _find_base(self) -> str | None:
        """Return the base model. If the file names none, it is the one model that all adapters belong to, if any."""
        value = self.values.get("base_model")
        if value is None:
            named = {entry.model for entry in self.entries if entry.adapter}
            return named.pop() if len(named) == 1 else None
        try:
            model, adapter = _read_reference(value)
        except ConfigError as error:
            self.problems.append(f"base_model: {error}")
            return None
        if adapter:
            self.problems.append(
                f"base_model: '{model}+{adapter}' names an adapter, expected a full model; merge it into '{model}' "
                "first (merge_and_unload() of PEFT) and name the result"
            )
        return model

    def _find_source(self, entry: _Entry, base: str | None) -> str:
        """Return the source of an entry: its adapter, if it names one, otherwise its model."""
        if entry.adapter and not _is_same_model(entry.model, base):
            expected = f"the base model '{base}'" if base else "one base model for all adapters, named in base_model"
            self.problems.append(
                f"{entry.where}.model: '{entry.adapter}' is named as an adapter of '{entry.model}', expected an adapter "
                f"of {expected}; merge it into '{entry.model}' first (merge_and_unload() of PEFT) and name the result"
            )
        return entry.adapter or entry.model

    def _counts_base(self, base: str) -> bool:
        """Whether the base model is part of the mean of this configuration."""
        if self.merge_method == "linear":
            weighted = self.values.get("base_model") is not None and "weight" in self.parameters
            return weighted or any(entry.is_model(base) for entry in self.entries)
        return self.merge_method in BETWEEN_TWO_MODELS

    def _check_method(self) -> None:
        if not isinstance(self.merge_method, str):
            self.problems.append(
                f"merge_method: got {self.merge_method!r}, expected a name such as linear; a recipe of grasp_hf names "
                "its models under sources"
            )
        elif self.merge_method != "linear" and self.chosen is None and not self.own.get("data"):
            self.problems.append(
                f"merge_method: {self.merge_method} is not supported; add data: to merge the same models with "
                "coefficients learned from labelled data, or set method=average for their mean"
            )

    def _check_weights(self, counted: Sequence[_Entry | None]) -> None:
        """Check that the weights of a linear merge form a mean.

        Args:
            counted: Entries in the mean; `None` is a base model that is not in `models`.
        """
        common = self.parameters.get("weight")
        given = [entry.parameters.get("weight", common) if entry else common for entry in counted]
        normalize = self.parameters.get("normalize", True)
        if not isinstance(normalize, (bool, int)):
            self.problems.append(f"parameters.normalize: got {normalize!r}, expected true or false")
        if all(weight is None for weight in given):
            return
        advice = "leave the weights out for the mean, or add data: and method: blend to learn coefficients from data"
        weights = [_read_number(weight) for weight in given]
        first = weights[0] or 0.0
        if not all(weight is not None and math.isclose(weight, first, rel_tol=1e-6) for weight in weights):
            got = ", ".join("none" if weight is None else str(weight) for weight in given)
            self.problems.append(f"weight: got {got}, expected the same number for all models; {advice}")
        elif first == 0:
            self.problems.append(f"weight: got 0 for all models, expected a number other than 0; {advice}")
        elif not normalize and not math.isclose(first * len(weights), 1, rel_tol=1e-6):
            self.problems.append(
                f"parameters.normalize: got false with weights that sum to {first * len(weights):g}, expected "
                f"1; {advice}"
            )


def _is_same_model(model: str, other: str | None) -> bool:
    return other is not None and posixpath.normpath(model) == posixpath.normpath(other)


def _read_number(value: Any) -> float | None:
    """Return a weight as a number; `None` for mergekit's lists over layers and its filters.

    YAML reads a number such as `5e-1` as text, which is accepted too.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _read_reference(value: Any) -> tuple[str, str | None]:
    """Return the full model and the adapter of a reference, which is text or has the keys `model` and `lora`."""
    if isinstance(value, str):
        model, plus, adapter = value.partition("+")
        if plus and (not adapter or "+" in adapter):
            raise ConfigError(f"got '{value}', expected a model, or model+adapter")
        return _read_path(model), _read_path(adapter) if plus else None
    if not isinstance(value, dict):
        raise ConfigError(f"got {value!r}, expected org/name, org/name@revision or a folder")
    lora = value.get("lora")
    return _read_path(value.get("model")), None if lora is None else _read_path(lora)


def _read_path(value: Any) -> str:
    """Return `name` or `name@revision`, given as text or with the keys `path` and `revision`."""
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
