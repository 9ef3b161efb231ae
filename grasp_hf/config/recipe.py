"""A recipe: one merge as a file."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ..errors import ConfigError
from . import mergekit
from .checks import value_problems
from .grasp import GraspConfig


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
        data: The labelled data set, see `grasp_hf.data.section`.
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
        problems = value_problems(cls, recipe_values)
        config_problems = value_problems(GraspConfig, settings, beside=own)
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
                problems += error.problems
        if problems or config is None:
            raise ConfigError(f"{name} has problems", problems=problems)
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
