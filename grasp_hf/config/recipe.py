"""A recipe: the file that describes one merge."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ConfigError
from ..files import exists
from . import mergekit
from .checks import value_problems
from .grasp import GraspConfig
from .sources import split_entries
from .yaml_loader import LARGEST_TEXT, load_yaml


def override_(values: dict[str, Any], text: str) -> None:
    """Apply an override `key=value` or `section.key=value` to `values`.

    Raises:
        ConfigError: `text` is no override, its value is not valid YAML, or its section holds no keys.
    """
    key, equals, value = text.partition("=")
    *sections, last = key.split(".")
    try:
        parsed = load_yaml(value)
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


def _read(path: Path) -> str:
    """Return the text of a file in UTF-8; of a file that is much too large for YAML only the beginning."""
    with open(path, encoding="utf-8") as file:
        return file.read(LARGEST_TEXT + 1)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One merge as a file: its models, its data and its settings.

    Attributes:
        sources: Models and adapters to merge: `org/name`, `org/name@revision` or folders.
            `order` in the settings decides their order. In the file, an entry may be a section with the key `id`, the keys
            `revision` and `subfolder`, and those of `source_options`.
        base_model: Model that the target starts from; the first source if left out.
        task: Name of a pipeline such as `image-classification`.
            If left out, the task is read from the config of the base model.
        data: The labelled data set, see `grasp_hf.data.section`.
        record: Details of an earlier run, as written by a merge; not used.
        preset: Starting values of the settings: `"default"`, or `"paper"` for `GraspConfig.paper()`.
        config: Settings of the merge, see `GraspConfig`.
            In the file they are keys at the top level, next to `sources`.
        folder: Folder that relative paths start from; the folder of the recipe file.
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
        """Read a recipe file and apply overrides.

        Args:
            path: The file, in YAML.
            overrides: Texts such as `threshold=0.2` or `training_arguments.learning_rate=1.0e-5`.

        Raises:
            ConfigError: The file cannot be read, or holds unknown keys or wrong values. The error lists all of them.
        """
        path = Path(path)
        try:
            values = load_yaml(_read(path))
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
        """Build a recipe from the keys of a recipe file.

        A section that is null counts as empty.

        Args:
            values: The keys, of a recipe or of a mergekit configuration, see `grasp_hf.config.mergekit.translate`.
            folder: Folder that relative paths start from.
            name: Name of the recipe in error messages.

        Raises:
            ConfigError: There are unknown keys or wrong values. The error lists all of them.
        """
        values = mergekit.translate(values, name=name)
        values = {key: value for key, value in values.items() if value is not None or key not in SECTIONS}
        problems: list[str] = []
        if isinstance(values.get("sources"), list):
            values["sources"], options, problems = split_entries(values["sources"])
            given = values.get("source_options", {})
            values |= {"source_options": {**given, **options}} if options and isinstance(given, dict) else {}
        own = {f.name for f in dataclasses.fields(cls)} - {"config", "folder"}
        recipe_values = {key: value for key, value in values.items() if key in own}
        settings = {key: value for key, value in values.items() if key not in own}
        problems += value_problems(cls, recipe_values)
        config_problems = value_problems(GraspConfig, settings, also_known=own)
        problems += config_problems
        if not values.get("sources"):
            problems.append("sources: expected a list of at least one reference")
        elif values.get("base_model") is None and isinstance(values["sources"], list) and len(values["sources"]) == 1:
            problems.append(
                "sources: got one model and no base_model, expected two models; add a base_model or a source"
            )
        config = None
        if not config_problems:
            try:
                config = GraspConfig.paper(**settings) if values.get("preset") == "paper" else GraspConfig(**settings)
            except ConfigError as error:
                problems += error.problems
        if problems or config is None:
            raise ConfigError(f"{name} has problems", problems=problems)
        recipe = cls(**recipe_values, config=config, folder=folder)
        trusted = [recipe.locate(reference) for reference in config.trust_remote_code]
        options = {recipe.locate(reference): keys for reference, keys in config.source_options.items()}
        config = dataclasses.replace(config, trust_remote_code=trusted, source_options=options)
        return dataclasses.replace(recipe, config=config)

    def locate(self, reference: str) -> str:
        """Return the full path of `reference` if the recipe's folder contains it, otherwise `reference` unchanged."""
        inside = self.folder / reference
        return str(inside.resolve()) if exists(inside) else reference

    def locate_pattern(self, reference: str) -> str:
        """Return the full path of a pattern such as `*.csv` that matches files; otherwise the same as `locate`."""
        matched = any(character in reference for character in "*?[") and any(self.folder.glob(reference))
        return str(self.folder.resolve() / reference) if matched else self.locate(reference)


# The keys that hold further keys or a list.
SECTIONS = {
    f.name for cls in (Recipe, GraspConfig) for f in dataclasses.fields(cls) if f.default_factory in (dict, list)
}
