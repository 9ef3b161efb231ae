"""Appends sources to an earlier merge, and reproduces a merge from its record."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.recipe import Recipe, override_
from ..config.yaml_loader import load_yaml
from ..data.digests import fingerprint
from ..errors import ConfigError
from ..files import find_folder
from ..hub.download import locate
from ..hub.reference import Source
from ..internals import saved_state
from ..models.mixture import mixture_of
from ..record.adapter import adapter_weights
from ..record.redaction import without_secrets
from ..record.report import MergeReport
from ..record.saving import CONFIG_FILE, read_record
from ..record.text import wrap
from ..sources.checkpoint import file_tensors
from .prepare import prepare

logger = logging.getLogger(__name__)

# Settings of a record whose values may be texts.
RECORDED_TEXTS = {
    "training_arguments": {
        *("optim", "lr_scheduler_type", "metric_for_best_model"),
        *("eval_strategy", "save_strategy", "logging_strategy"),
    },
    "lora": {"target_modules", "modules_to_save", "exclude_modules", "bias", "task_type", "init_lora_weights"},
}
# Keys of a record that a user should check.
LOGGED = ("data", "training_arguments", "accepted_bases", "source_options")


def append_recipe(
    merged: str, sources: Sequence[str], overrides: Sequence[str] = (), *, token: str | None = None
) -> Recipe:
    """Return the recipe that appends `sources` to a merge, with the data and the settings of its last run.

    The new sources are ordered by the same rule as the earlier ones. Relative paths start in the working directory. A
    stranger may have written the record, so Python code of a model runs only if `overrides` names the model in
    `trust_remote_code`.

    Args:
        merged: Hub id or folder of a merge by this package.
        sources: References of the new sources.
        overrides: Texts `key=value`, such as `data.data_files.train=...` if the data has moved.
        token: Hub token.

    Raises:
        ConfigError: `merged` is not such a merge, or an override is wrong.
    """
    values, record, _ = _read_merge(merged, token)
    if text := record.incompleteness():
        logger.warning("the merge in '%s' is %s; the new sources are merged into it as it is", merged, text)
    values |= {"base_model": merged, "sources": list(sources), "source_options": {}}
    # The saved recipe has the order that was found, for `reproduce`; the record has the rule that found it.
    values |= {key: record.run.config[key] for key in ("order", "top") if key in record.run.config}
    recipe = _recorded_recipe(merged, values, overrides)
    if recipe.config.needs_data and not recipe.data:
        raise ConfigError(
            f"the record of '{merged}' names no data, because the data was given from Python; name it with "
            "data.path=..."
        )
    return recipe


@dataclass(frozen=True)
class Replay:
    """The result of reproducing a merge.

    Attributes:
        report: Report of the new merge.
        differences: Largest absolute difference of each tensor that is not equal bit for bit.
        tensors: Number of compared tensors.
    """

    report: MergeReport
    differences: dict[str, float]
    tensors: int

    def __str__(self) -> str:
        if not self.differences:
            return f"reproduced: all {self.tensors} tensors are equal, bit for bit"
        worst = sorted(self.differences, key=lambda name: self.differences[name], reverse=True)[:5]
        lines = [f"- {name}: differs by up to {self.differences[name]:.3g}" for name in worst]
        count = f"not reproduced: {len(self.differences)} of {self.tensors} tensors differ; the largest differences:"
        return "\n".join([count, *lines])


def reproduce(merged: str, overrides: Sequence[str] = (), *, token: str | None = None) -> Replay:
    """Run the last run of a merge again, with its recorded revisions, data and seeds, and compare the weights.

    The weights are equal bit for bit on the same platform with the same versions and number of threads. A stranger may
    have written the record, so Python code of a model runs only if `overrides` names the model in `trust_remote_code`.

    Args:
        merged: Hub id or folder of a merge by this package.
        overrides: Texts `key=value`, such as `data.data_files.train=...` if the data has moved.
        token: Hub token.

    Raises:
        ConfigError: `merged` is not such a merge; or only its author has something that the record names: a local
            folder, or data that was given from Python; or the data has changed.
    """
    values, record, located = _read_merge(merged, token)
    recipe = _recorded_recipe(merged, values, overrides)
    named = [*([recipe.base_model] if recipe.base_model else []), *recipe.sources]
    if missing := [name for name in named if "@" not in name and not find_folder(name)]:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: these folders of its recipe do not exist here: {', '.join(missing)}"
        )
    if recipe.config.needs_data and not recipe.data:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: its record names no data, because the data was given from Python; name "
            "the same data with data.path=..."
        )
    if (dtypes := located.float_dtypes()) and "F32" not in dtypes:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: got weights of type {', '.join(sorted(dtypes))}, expected F32; a "
            "recipe always gives F32, so the merge was made from Python with a `dtype`, which its record does not name"
        )
    merger, sources, data = prepare(recipe, token=token)
    if merger.report.continued_steps != record.continued_steps:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: it was appended to a merge in '{recipe.base_model}', which now holds "
            f"another merge: got {merger.report.continued_steps} earlier steps, expected {record.continued_steps}"
        )
    for split, dataset in {"train": data.train, "eval": data.validation}.items():
        recorded, found = record.run.data.get(split) or {}, fingerprint(dataset) or {}
        if not record.run.recipe.get("data"):  # data from Python has other columns, and so another digest
            found.pop("digest", None)
        if changed := {key: value for key, value in found.items() if value != recorded.get(key, value)}:
            raise ConfigError(
                f"'{merged}' cannot be reproduced: the {split} data is not the recorded data: got {changed}, expected "
                f"{recorded}; name the recorded data with data.path=... or data.data_dir=..."
            )
    # Of a merge that was interrupted, as many sources are merged as its record has, and nothing is done at the end.
    stop_after = None if record.run.complete else len(record.steps) - record.continued_steps
    merger.merge(sources, token=token, stop_after=stop_after, **data.keywords())
    earlier = file_tensors(located)
    return Replay(merger.report, _differences(merger.model, earlier), len(earlier))


def _differences(model: Any, earlier: dict[str, torch.Tensor]) -> dict[str, float]:
    """Return the largest difference of each tensor that differs; infinity if it is missing or has another shape."""
    mixture = mixture_of(model)
    made = saved_state(model) if mixture is None else adapter_weights(mixture)
    found = dict.fromkeys(made.keys() ^ earlier.keys(), float("inf"))
    for name in made.keys() & earlier.keys():
        ours, theirs = made[name].cpu(), earlier[name]
        if ours.shape != theirs.shape:
            found[name] = float("inf")
        elif ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            found[name] = float((ours.double() - theirs.double()).abs().max())
    return found


def _read_merge(merged: str, token: str | None) -> tuple[dict[str, Any], MergeReport, Source]:
    """Return the saved recipe of a merge, its record, and its files."""
    located = locate(merged, token=token)
    record = read_record(located.folder)
    path = located.folder / CONFIG_FILE
    if record is None or not path.is_file():
        raise ConfigError(
            f"'{merged}' is not a merge by grasp_hf: expected a {CONFIG_FILE} and a record in it; name another model"
        )
    try:
        values = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"its {CONFIG_FILE} cannot be read: {error}", subject=merged) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"its {CONFIG_FILE} holds {type(values).__name__}, expected the keys of a recipe", subject=merged
        )
    values.pop("record", None)
    return values, record, located


def _refused_settings(values: dict[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the training arguments and arguments of LoRA in a record that only the user may give, as `key=value`.

    Numbers are harmless, and so are the texts and names of modules that choose among what is installed.
    """

    def harmless(section: str, key: str, value: Any) -> bool:
        items = [*value.values()] if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if all(item is None or isinstance(item, bool | int | float) for item in items):
            return True
        return key in RECORDED_TEXTS[section] and all(isinstance(item, str) for item in items)

    given = {text.partition("=")[0] for text in overrides}
    sections = {name: found for name in RECORDED_TEXTS if isinstance(found := values.get(name), dict)}
    return [
        f"{section}.{key}={value!r}"
        for section, found in sections.items()
        for key, value in found.items()
        if not harmless(section, str(key), value) and not {section, f"{section}.{key}"} & given
    ]


def _recorded_recipe(merged: str, values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """Return the recipe of a record, changed by the user's `overrides`, and log the keys that a user should check.

    The `trust_remote_code` of the record is dropped, because only the user may allow code to run.
    """
    recorded = values.pop("trust_remote_code", None)
    if refused := _refused_settings(values, overrides):
        raise ConfigError(
            f"the record of '{merged}' has settings that may read files, load code or reach other machines, so they are "
            "used only if you give them yourself, as key=value, or key=null to go on without",
            problems=refused,
        )
    for text in overrides:
        override_(values, text)
    recipe = Recipe.from_dict(values, folder=Path.cwd(), name=f"the record of '{merged}'")
    names = [str(name) for name in recorded] if isinstance(recorded, list) else []
    untrusted = [name for name in names if name not in recipe.config.trust_remote_code]
    if untrusted:
        logger.warning(
            "the record of '%s' was made with Python code of %r. This code does not run unless you allow it: read it, "
            "then add trust_remote_code=%r",
            merged,
            untrusted,
            untrusted,
        )
    for key in LOGGED:
        if values.get(key):
            value = without_secrets(values[key])
            logger.info(wrap(f"from the record of '{merged}': {key}: {value!r}", "", "    "))
    return recipe
