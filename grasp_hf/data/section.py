"""The `data:` section of a recipe."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..errors import ConfigError
from ..internals import file_formats

SPLITS = ("train", "validation", "test")
UNLABELED = "unlabeled"
FILES = ("data_dir", "data_files")


@dataclass(frozen=True, kw_only=True)
class DataSection:
    """The keys of `data:` in a recipe.

    Attributes:
        path: A path for `datasets.load_dataset` (`imagefolder`, `csv`, `json`, `parquet`, a Hub id), or a folder that
            `save_to_disk` wrote. The split `train` is required; the splits `validation` and `test` are optional.
        name: Configuration of a data set on the Hub.
        revision: Branch, tag or commit of a data set on the Hub.
        data_dir: Folder of an `imagefolder`, relative to the recipe.
        data_files: Files per split, relative to the recipe.
        unlabeled: Inputs without labels: the name of a further split, or files (of an `imagefolder` a folder), relative to
            the recipe.
        image: Column of the images.
        text: Column of the texts.
        label: Column of the labels: class ids or names. Language models do not use it.
        max_length: Largest number of tokens per sample; longer texts are cut.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    data_dir: str | None = None
    data_files: Any = None
    unlabeled: Any = None
    image: str = "image"
    text: str = "text"
    label: str = "label"
    max_length: int = 128

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> "DataSection":
        """Read the section of a recipe; its files are relative to the recipe's folder.

        Raises:
            ConfigError: `path` is missing, a key is unknown, or a value is wrong; the error lists all problems.
        """
        known = {f.name for f in fields(cls)}
        problems = [
            f"data.{key}: unknown key, expected one of {', '.join(sorted(known))}"
            for key in recipe.data
            if key not in known
        ]
        if "path" not in recipe.data:
            problems.append("data.path: missing, expected imagefolder, csv, json, parquet, a folder or a Hub id")
        problems += [problem for key in recipe.data if (problem := cls._type_problem(key, recipe.data[key]))]
        if recipe.data.get("path") in file_formats() and not any(recipe.data.get(key) for key in FILES):
            problems.append(
                f"data.{' or data.'.join(FILES)}: missing, expected the location of the files for "
                f"'{recipe.data['path']}'"
            )
        if problems:
            raise ConfigError("the recipe has problems", problems=problems)

        def locate(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: locate(item) for key, item in value.items()}
            if isinstance(value, list):
                return [locate(item) for item in value]
            return recipe.locate_pattern(value)

        return cls(
            **{
                key: locate(value) if key in ("path", UNLABELED, *FILES) else value
                for key, value in recipe.data.items()
            }
        )

    def given(self) -> dict[str, Any]:
        """Return the keys that have a value, as in a recipe."""
        return {key: value for key, value in vars(self).items() if value is not None}

    @property
    def is_saved(self) -> bool:
        """Whether `path` is a folder that `save_to_disk` wrote."""
        return any((Path(self.path) / file).exists() for file in ("dataset_dict.json", "state.json"))

    @property
    def location_overrides(self) -> str:
        """The overrides on the command line that set the location of the files, such as `data.data_dir=…`."""
        if isinstance(self.data_files, dict):
            return " ".join(f"data.data_files.{split}=…" for split in self.data_files)
        key = next((key for key in FILES[::-1] if getattr(self, key)), "path")
        return f"data.{key}=…"

    @staticmethod
    def _type_problem(key: str, value: Any) -> str | None:
        """Return the problem of the value of a known key; unknown keys have their own message."""

        def is_files(files: Any) -> bool:
            if isinstance(files, dict):
                return all(isinstance(name, str) and is_files(item) for name, item in files.items())
            return isinstance(files, str) or (isinstance(files, list) and all(isinstance(f, str) for f in files))

        if key == "data_files":
            fits, expected = is_files(value), "a file, a list of files, or files per split"
            if fits and isinstance(value, dict) and not value.keys() <= {*SPLITS}:
                fits, expected = False, f"no other splits than {', '.join(SPLITS)}"
        elif key == UNLABELED:
            fits = is_files(value) and not isinstance(value, dict)
            expected = "the name of a split, a file, or a list of files"
        elif key == "max_length":
            fits, expected = type(value) is int and value > 0, "a number of tokens above 0"
        else:
            fits, expected = isinstance(value, str) or key not in {f.name for f in fields(DataSection)}, "text"
        return None if fits else f"data.{key}: got {value!r}, expected {expected}"
