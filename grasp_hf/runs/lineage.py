"""The life of a merge after it was made: sources appended to it, and its record replayed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config.recipe import Recipe, override_
from ..data.digests import fingerprint
from ..errors import ConfigError
from ..hub.download import locate
from ..hub.reference import Source
from ..internals import saved_state
from ..record.redaction import without_secrets
from ..record.report import MergeReport
from ..record.saving import CONFIG_FILE, read_record
from ..sources.checkpoint import file_tensors
from .prepare import prepare

logger = logging.getLogger(__name__)

SHOWN_FIRST = ("data", "training_arguments", "accepted_bases")  # what a record decides beyond weights and numbers


def append_recipe(
    merged: str, sources: Sequence[str], overrides: Sequence[str] = (), *, token: str | None = None
) -> Recipe:
    """Return the recipe that appends `sources` to a merge, with the data and the settings of its last run.

    The new sources are ordered as those were. Relative paths are looked up in the working directory. The record is a
    stranger's data: Python code of a model runs only if `overrides` name it in `trust_remote_code`.

    Args:
        merged: Hub id or folder of a merge by this package.
        sources: References of the new sources.
        overrides: `key=value`, such as `data.data_files.train=...` where the data lies elsewhere now.
        token: Hub token.

    Raises:
        ConfigError: It is not such a merge, or an override is wrong.
    """
    values, record, _ = _recorded(merged, token)
    values |= {"base_model": merged, "sources": list(sources)}
    # What is saved pins the order that was found, so that it can be replayed.
    values |= {key: record.run.config[key] for key in ("order", "top") if key in record.run.config}
    recipe = _recorded_recipe(merged, values, overrides)
    if recipe.config.needs_data and not recipe.data:
        raise ConfigError(
            f"the data of '{merged}' was given from Python, and its record names none; name it with data.path=..."
        )
    return recipe


@dataclass(frozen=True)
class Replay:
    """A merge made again from its record.

    Attributes:
        report: Of the new merge.
        differences: The largest absolute difference by tensor, of those that are not equal bit for bit.
        tensors: Number of tensors compared.
    """

    report: MergeReport
    differences: dict[str, float]
    tensors: int

    def __str__(self) -> str:
        if not self.differences:
            return f"reproduced: all {self.tensors} tensors are equal, bit for bit"
        worst = sorted(self.differences, key=lambda name: self.differences[name], reverse=True)[:5]
        lines = [f"- {name}: differs by up to {self.differences[name]:.3g}" for name in worst]
        count = f"not reproduced: {len(self.differences)} of {self.tensors} tensors differ, most of all"
        return "\n".join([count, *lines])


def reproduce(merged: str, overrides: Sequence[str] = (), *, token: str | None = None) -> Replay:
    """Make the last run of a merge again, from its recorded revisions, data and seeds, and compare the weights.

    Equal bits are expected on the same platform with the same versions and number of threads. The record is a
    stranger's data: Python code of a model runs only if `overrides` name it in `trust_remote_code`.

    Args:
        merged: Hub id or folder of a merge by this package.
        overrides: `key=value`, such as `data.data_files.train=...` where the data lies elsewhere now.
        token: Hub token.

    Raises:
        ConfigError: It is not such a merge, or its record names something that only its author had: a local folder, or
            data that was given from Python; or the data is another one.
    """
    values, record, located = _recorded(merged, token)
    recipe = _recorded_recipe(merged, values, overrides)
    named = [*([recipe.base_model] if recipe.base_model else []), *recipe.sources]
    if lost := [name for name in named if "@" not in name and not Path(name).is_dir()]:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: it was made with folders that are not here: {', '.join(lost)}"
        )
    if recipe.config.needs_data and not recipe.data:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: its data was given from Python, and its record names none; name the same "
            "data with data.path=..."
        )
    if (dtypes := located.float_dtypes()) and "F32" not in dtypes:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: its weights are {', '.join(sorted(dtypes))}, so it was made from Python with "
            "a dtype of its own, which the record does not name; a recipe's are F32"
        )
    merger, sources, data = prepare(recipe, token=token)
    if merger.report.continued_steps != record.continued_steps:
        raise ConfigError(
            f"'{merged}' cannot be reproduced: it was appended to a merge that is not there any more: "
            f"'{recipe.base_model}' holds another one now"
        )
    for split, dataset in {"train": data.train, "eval": data.validation}.items():
        recorded, found = record.run.data.get(split) or {}, fingerprint(dataset) or {}
        if not record.run.recipe.get("data"):  # given from Python, with columns of its own
            found.pop("digest", None)
        if other := {key: value for key, value in found.items() if value != recorded.get(key, value)}:
            raise ConfigError(
                f"'{merged}' cannot be reproduced: the {split} data is not the recorded one: got {other}, expected "
                f"{recorded}; name the same data with data.path=... or data.data_dir=..."
            )
    merger.merge(sources, token=token, **data.keywords())
    pushed = file_tensors(located)
    return Replay(merger.report, _differences(merger.model, pushed), len(pushed))


def _differences(model: Any, pushed: dict[str, torch.Tensor]) -> dict[str, float]:
    made = saved_state(model)
    found = dict.fromkeys(made.keys() ^ pushed.keys(), float("inf"))
    for name in made.keys() & pushed.keys():
        ours, theirs = made[name].cpu(), pushed[name]
        if ours.dtype != theirs.dtype or not torch.equal(ours, theirs):
            found[name] = (
                float((ours.double() - theirs.double()).abs().max()) if ours.shape == theirs.shape else float("inf")
            )
    return found


def _recorded(merged: str, token: str | None) -> tuple[dict[str, Any], MergeReport, Source]:
    located = locate(merged, token=token)
    record = read_record(located.folder)
    path = located.folder / CONFIG_FILE
    if record is None or not path.is_file():
        raise ConfigError(f"'{merged}' is not a merge by grasp_hf: it holds no {CONFIG_FILE} or no record beside it")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"its {CONFIG_FILE} cannot be read: {error}", subject=merged) from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"its {CONFIG_FILE} holds {type(values).__name__}, expected the keys of a recipe", subject=merged
        )
    values.pop("record", None)
    return values, record, located


def _recorded_recipe(merged: str, values: dict[str, Any], overrides: Sequence[str]) -> Recipe:
    """Return the recipe that a record holds, changed by the user's `overrides`, and log what the record decides in it.

    Only the user lets code run: the record's own `trust_remote_code` is dropped.
    """
    recorded = values.pop("trust_remote_code", None)
    for text in overrides:
        override_(values, text)
    recipe = Recipe.from_dict(values, folder=Path.cwd(), name=f"the record of '{merged}'")
    names = [str(name) for name in recorded] if isinstance(recorded, list) else []
    untrusted = [name for name in names if name not in recipe.config.trust_remote_code]
    if untrusted:
        logger.warning(
            "the record of '%s' was made with Python code of %r. That code does not run here unless you name it: read it, "
            "then add trust_remote_code=%r",
            merged,
            untrusted,
            untrusted,
        )
    for key in SHOWN_FIRST:
        if values.get(key):
            logger.info("from the record of '%s': %s: %r", merged, key, without_secrets(values[key]))
    return recipe
