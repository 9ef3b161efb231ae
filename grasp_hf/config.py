"""What a merge does (`GraspConfig`) and what it is made of (`Recipe`), checked before anything is loaded."""

import dataclasses
import difflib
import json
import math
import typing
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import yaml
from peft import LoraConfig
from transformers import TrainingArguments

from . import mergekit
from .errors import ConfigError

METRICS = ("loss", "accuracy", "eval_loss", "eval_accuracy")  # that can choose the best epoch
OWN_ARGUMENTS = {  # of the Trainer, that a merge sets itself
    "output_dir": "checkpoints lie in the temporary directory (TMPDIR), and are removed",
    "push_to_hub": "push the merge, with push_to_hub() or --push-to-hub",
}
PAPER = {
    "method": "copy",
    "unit": "parameter",
    "threshold": 0.3,
    "num_batches": 1,
    "batch_size": 32,
    "gate": False,
    "order": "given",
    "initial_epochs": 3,
    "finetune_epochs": 3,
    "final_epochs": 0,
    "published": True,
    "training_arguments": {
        "learning_rate": 5.0e-5,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "metric_for_best_model": "accuracy",
    },
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
    names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
    names = names.replace("list", "list of str")
    advice = " (YAML reads 5e-5 as text: write 5.0e-5)" if isinstance(value, str) and float in kinds else ""
    return f"expected {names}{advice}"


def _problems(cls: type, values: dict[str, Any], beside: Collection[str] = ()) -> list[str]:
    """List every unknown key and every value of a wrong type among `values` for the dataclass `cls`.

    Keys `beside` those of the class may be meant by an unknown one, too.
    """
    hints = typing.get_type_hints(cls)
    found = []
    for key, value in values.items():
        if key not in hints:
            known = {*hints, *beside}
            advice = _meant(key, known) or f", expected one of {', '.join(sorted(known))}"
            if key in {field.name for field in dataclasses.fields(TrainingArguments)}:
                advice = f", did you mean training_arguments.{key}"
            found.append(f"{key}: unknown key{advice}")
        elif problem := _type_problem(value, hints[key]):
            found.append(f"{key}: got {value!r}, {problem}")
    return found


def _meant(key: Any, known: Collection[str]) -> str:
    """Return the question whether the known key most like `key` was meant; empty where none is like it."""
    close = difflib.get_close_matches(str(key), known, n=1)
    return f", did you mean {close[0]}" if close else ""


def _plain(value: Any) -> Any:
    """Return numpy scalars, enumerations, sets and paths in `value` as what YAML and JSON can hold."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=str)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def training_argument_problems(values: dict[str, Any]) -> list[str]:
    """List what `transformers.TrainingArguments` would not take: unknown names, and text where a number is due."""
    hints = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in dataclasses.fields(TrainingArguments)}
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
        elif set(get_args(hints[key]) or (hints[key],)) <= {int, float, bool, type(None)}:
            if problem := _type_problem(value, hints[key]):
                found.append(f"training_arguments.{key}: got {value!r}, {problem}")
            elif key.endswith("_batch_size") and value is not None and value < 1:
                found.append(f"training_arguments.{key}: got {value!r}, expected at least 1")
    return found


def lora_problems(values: dict[str, Any]) -> list[str]:
    """List what `peft.LoraConfig` would not take."""
    try:
        LoraConfig(**values)
    except (TypeError, ValueError) as error:
        return [f"lora: got {values!r}, expected arguments of peft.LoraConfig: {error}"]
    return []


@dataclass(frozen=True, kw_only=True)
class GraspConfig:
    """How each source is measured, transferred and followed by fine-tuning.

    Attributes:
        method: `"blend"` learns on the training data how much of the target and how much of the source each unit takes,
            counted from the weights that `merge` found, `B + k (T - B) + t (S - B)`, from the mean of all sources on;
            `"average"` keeps the mean of all accepted sources so far, unit by unit, `T + (S - T) / n`, and needs no
            gradients (and in the given order, without fine-tuning, no data); `"copy"` replaces the units whose gradients
            agree.
        unit: Tensors decided together. `"layer"`: a transformer block or a stage, and outside of those as `"module"`.
            `"module"`: the tensors of one module, a normalisation layer with its statistics. `"tensor"`: each tensor
            alone, but a normalisation layer still whole. `"parameter"`: each parameter alone, statistics never moved,
            as published.
        threshold: `copy` takes units whose gradient cosine is strictly greater than this; in [-1, 1].
        num_batches: Batches of training data that each source is measured on, but for an average. `copy` averages the
            cosine of each batch; `blend` makes one descent step on the coefficients per batch, for each half of the labels,
            and adds up Fisher information.
        accumulate_gradients: Let `copy` take the cosine of the gradients over all batches together, which is that of
            one large batch. Needs room for a second set of gradients on disk.
        batch_size: Samples per batch, in measuring and (unless `training_arguments` says otherwise) in fine-tuning.
        coefficient_lr: First step size of Adam on the coefficients of `blend`; it falls to 0. Adam moves a coefficient by at
            most about one step per batch, so `num_batches * coefficient_lr / 2` bounds how far one source can pull.
        gate: Undo a transfer that harms by more than its standard error on the samples that judge it, or ends above the
            loss before the first source, and keep of each fine-tuning only what lowers the loss of samples that it did
            not see (see `grasp_hf.gate`). Judges are the evaluation data and, as long as the model was not fine-tuned
            on them, the labels; each half of those judges coefficients that the other labels taught `blend`. What goes
            in is the mean of all accepted sources, that of `average`, unless the learned coefficients (their mean), or
            a mean weighted by Fisher information (arXiv:2111.09832), are ahead of it by more than a standard error.
        initial_epochs: Epochs of fine-tuning before the first source.
        finetune_epochs: Epochs of fine-tuning after each source.
        final_epochs: Epochs of fine-tuning after the last source. `num_train_epochs` in `training_arguments` replaces
            those of the three that are not 0.
        lora: Fine-tune a LoRA adapter instead of all weights, and merge it into the model at the end of each step:
            arguments of `peft.LoraConfig`, such as `{r: 8, target_modules: all-linear}`. The head is trained whole, and
            frozen layers are adapted too unless `target_modules` leaves them out.
        order: `"given"`; `"loss"`: the source first whose own loss on the labels (or evaluation data) is lowest; or
            `"rank"`: the most promising first, by the first-order gain (see `GraspMerger.rank`). The last two read every
            source twice.
        top: Merge only this many sources, the first in that order; not with `order="given"`.
        prefetch: Bring the following source to this machine while one is merged: at most two are on the disk then, else one.
        accepted_bases: Names (`org/name` or `org/name@revision`) that adapters may give as their base although the
            target started from another: you declare that they are the same weights.
        trust_remote_code: References whose own Python code may run: their configuration and model classes. Read the code
            first.
        seed: Seed of the batches; fine-tuning after source k is seeded with `seed + k`.
        published: Follow arXiv:2606.14900 to the letter, see `paper`.
        training_arguments: Anything that `transformers.TrainingArguments` takes; what stands here wins.

    Raises:
        ConfigError: A value has the wrong type or is out of range; all problems are listed.
    """

    method: Literal["average", "blend", "copy"] = "blend"
    unit: Literal["layer", "module", "tensor", "parameter"] = "layer"
    threshold: float = 0.3
    num_batches: int = 8
    accumulate_gradients: bool = False
    batch_size: int = 32
    coefficient_lr: float = 0.1
    gate: bool = True
    initial_epochs: float = 0
    finetune_epochs: float = 0
    final_epochs: float = 3
    lora: dict[str, Any] | None = None
    order: Literal["given", "loss", "rank"] = "loss"
    top: int | None = None
    prefetch: bool = True
    accepted_bases: list[str] = field(default_factory=list)
    trust_remote_code: list[str] = field(default_factory=list)
    seed: int = 42
    published: bool = False
    training_arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            object.__setattr__(self, name, _plain(value))
        problems = _problems(GraspConfig, vars(self)) or self._range_problems()
        if isinstance(self.training_arguments, dict):
            for key, value in self.training_arguments.items():
                if value is False and key.endswith("_strategy"):  # YAML reads no as that
                    self.training_arguments[key] = "no"
            problems += training_argument_problems(self.training_arguments)
        if isinstance(self.lora, dict):
            problems += lora_problems(self.lora)
        problems += [problem for name in ("training_arguments", "lora") if (problem := self._unwritable(name))]
        if problems:
            raise ConfigError("the configuration has problems:\n- " + "\n- ".join(problems))

    def _unwritable(self, name: str) -> str | None:
        """Say which value the record of a merge could not hold."""
        try:
            json.dumps(getattr(self, name))
        except (TypeError, ValueError) as error:
            return f"{name}: a value of it cannot be written to the record of a merge: {error}"
        return None

    def _range_problems(self) -> list[str]:
        checks = {
            "threshold: expected a cosine in [-1, 1]": -1 <= self.threshold <= 1,
            "num_batches: expected at least 1": self.num_batches >= 1,
            "batch_size: expected at least 1": self.batch_size >= 1,
            "coefficient_lr: expected a number in (0, 1]": 0 < self.coefficient_lr <= 1,
            "initial_epochs: expected a finite number of 0 or more": 0 <= self.initial_epochs < math.inf,
            "finetune_epochs: expected a finite number of 0 or more": 0 <= self.finetune_epochs < math.inf,
            "final_epochs: expected a finite number of 0 or more": 0 <= self.final_epochs < math.inf,
            "seed: expected 0 to 2**32 - 1000": 0 <= self.seed <= 2**32 - 1000,
            "top: expected at least 1, and an order other than 'given' with it": self.top is None
            or (self.top >= 1 and self.order != "given"),
            "accumulate_gradients: expected method='copy' with it, and not published": not self.accumulate_gradients
            or (self.method == "copy" and not self.published),
            "lora: expected none with published": self.lora is None or not self.published,
            "published: expected method='copy' and unit='parameter' with it": not self.published
            or (self.method, self.unit) == ("copy", "parameter"),
        }
        return [
            f"{message}, got {getattr(self, message.split(':')[0])!r}" for message, fine in checks.items() if not fine
        ]

    @property
    def needs_data(self) -> bool:
        """Whether a merge needs training data: always, but for an average without fine-tuning in the order given."""
        epochs = self.initial_epochs or self.finetune_epochs or self.final_epochs
        return self.method != "average" or self.order != "given" or bool(epochs)

    def total_epochs(self, sources: int) -> float:
        """Return the epochs of fine-tuning in a whole merge of so many sources."""
        return self.initial_epochs + self.finetune_epochs * min(sources, self.top or sources) + self.final_epochs

    @property
    def learns(self) -> bool:
        """Whether coefficients are learned, which needs the weights that a merge began with."""
        return self.method == "blend"

    @property
    def finetunes_between(self) -> bool:
        """Whether the model is fine-tuned before the last source."""
        return self.trains(self.initial_epochs) or self.trains(self.finetune_epochs)

    @property
    def compares_alone(self) -> bool:
        """Whether the fine-tuning at the end is also tried without any source, which needs the weights of the start."""
        return self.gate and self.trains(self.final_epochs) and not self.finetunes_between

    def trains(self, epochs: float) -> bool:
        """Whether fine-tuning that is due for so many epochs does anything."""
        asked = self.training_arguments
        return epochs > 0 and (asked.get("num_train_epochs", epochs) > 0 or asked.get("max_steps", 0) > 0)

    def for_part(self, share: float) -> "GraspConfig":
        """Return the configuration for training on this share of the labels in as many passes over them."""
        steps = self.training_arguments.get("max_steps", 0)
        if steps <= 0 or share == 1:
            return self
        fewer = {"max_steps": math.ceil(steps * share)}
        return dataclasses.replace(self, training_arguments=self.training_arguments | fewer)

    @classmethod
    def paper(cls, **overrides: Any) -> "GraspConfig":
        """Return the procedure of arXiv:2606.14900 (GRASP) as its code runs it, for comparison.

        Reproduced with its flaws: the target is measured in train mode (dropout on, its batch statistics changed by
        the measurement) against a source in eval mode, on a single batch, with 1e-8 added to the denominator of the
        cosine; parameters are copied one by one without the statistics that belong to them, heads included; nothing
        is undone. Fine-tuning is AdamW with a cosine schedule that steps once an epoch, and the epoch with the best
        accuracy on the evaluation data is kept. `overrides` replace single fields.
        """
        arguments = {**PAPER["training_arguments"], **overrides.pop("training_arguments", {})}  # type: ignore[dict-item]
        return cls(**{**PAPER, "training_arguments": arguments, **overrides})


def override_(values: dict[str, Any], text: str) -> None:
    """Change `values` as `text`, a `key=value` or `section.key=value`, says."""
    key, equals, value = text.partition("=")
    *sections, last = key.split(".")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"override '{text}': its value is not valid YAML: {error}") from error
    section: Any = values
    for name in sections:
        if section.get(name) is None:
            section[name] = {}
        section = section[name]
        if not isinstance(section, dict):
            raise ConfigError(f"override '{text}': '{name}' holds {section!r}, expected a section with keys")
    if not equals or not last:
        raise ConfigError(f"override '{text}': expected key=value or section.key=value")
    section[last] = parsed


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{twice[0]}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One merge as a file: which models, which data, which configuration.

    Attributes:
        sources: References `org/name`, `org/name@revision` or local folders; `config.order` says in which order they go.
        base_model: Where the target starts; left out, it starts as the first source.
        task: A pipeline name such as `image-classification`; left out, it is read from the base model's config.
        data: The labelled data set, see `grasp_hf.data`.
        record: What an earlier merge wrote of its run; not used.
        preset: `"paper"` starts from `GraspConfig.paper()` instead of the defaults.
        config: The method's settings; in the file they stand at the top level, beside `sources`.
        folder: Folder that relative paths are looked up in; the recipe's own.
    """

    sources: list[str]
    base_model: str | None = None
    task: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)
    preset: Literal["default", "paper"] = "default"
    config: GraspConfig = field(default_factory=GraspConfig)
    folder: Path = Path()

    @classmethod
    def from_yaml(cls, path: str | Path, overrides: Sequence[str] = ()) -> "Recipe":
        """Read a recipe and apply `key=value` overrides (`training_arguments.learning_rate=1.0e-5` reaches inside).

        Raises:
            ConfigError: The file cannot be read, or holds unknown keys or wrong values; all are listed at once.
        """
        path = Path(path)
        try:
            values = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
        except OSError as error:
            raise ConfigError(f"recipe '{path}' cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"recipe '{path}' is not a text file in UTF-8: {error}") from error
        except yaml.composer.ComposerError as error:
            several = "single document" in str(error.context)
            problem = mergekit.SEVERAL_DOCUMENTS if several else f"is not valid YAML: {error}"
            raise ConfigError(f"recipe '{path}' {problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"recipe '{path}' is not valid YAML: {error}") from error
        if not isinstance(values, dict):
            raise ConfigError(f"recipe '{path}' holds {type(values).__name__}, expected keys such as sources and data")
        for text in overrides:
            override_(values, text)
        return cls.from_dict(values, folder=path.parent, name=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, folder: Path = Path(), name: str = "recipe") -> "Recipe":
        """Build a recipe from the keys of a recipe file; `folder` and `name` say where it came from.

        A section that is null is taken as empty. The keys may be those of mergekit, see `grasp_hf.mergekit.translate`.
        """
        values = mergekit.translate(values, name=name)
        values = {key: value for key, value in values.items() if value is not None or key not in SECTIONS}
        own = {f.name for f in dataclasses.fields(cls)} - {"config", "folder"}
        recipe_values = {key: value for key, value in values.items() if key in own}
        settings = {key: value for key, value in values.items() if key not in own}
        problems = _problems(cls, recipe_values)
        config_problems = _problems(GraspConfig, settings, beside=own)
        problems += config_problems
        if not values.get("sources"):
            problems.append("sources: expected a list of at least one reference")
        elif values.get("base_model") is None and isinstance(values["sources"], list) and len(values["sources"]) == 1:
            problems.append("sources: one model alone has nothing to merge with; name a base_model or another source")
        config = None
        if not config_problems:
            try:
                config = GraspConfig.paper(**settings) if values.get("preset") == "paper" else GraspConfig(**settings)
            except ConfigError as error:
                problems += str(error).split("\n- ")[1:]
        if problems or config is None:
            raise ConfigError(f"{name} has problems:\n- " + "\n- ".join(problems))
        recipe = cls(**recipe_values, config=config, folder=folder)
        trusted = [recipe.locate(reference) for reference in config.trust_remote_code]
        return dataclasses.replace(recipe, config=dataclasses.replace(config, trust_remote_code=trusted))

    def locate(self, reference: str) -> str:
        """Return `reference` as a path where it names something in the recipe's folder, else unchanged."""
        inside = self.folder / reference
        return str(inside.resolve()) if inside.exists() else reference

    def locate_pattern(self, reference: str) -> str:
        """Return `reference` as `locate` does, and a pattern such as `*.csv` in the recipe's folder where it fits files."""
        matched = any(character in reference for character in "*?[") and any(self.folder.glob(reference))
        return str(self.folder.resolve() / reference) if matched else self.locate(reference)


SECTIONS = {
    f.name for cls in (Recipe, GraspConfig) for f in dataclasses.fields(cls) if f.default_factory in (dict, list)
}
