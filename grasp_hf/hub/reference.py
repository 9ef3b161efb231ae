"""References to sources, and the kind of a source: a full model or an adapter."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import Concatenate, Literal, ParamSpec, TypeVar

from ..errors import (
    LONGEST_NAME,
    GraspError,
    IncompatibleSourceError,
    SourceNotFoundError,
    describe,
    first_few,
    one_line,
)
from ..files import LFS_ADVICE, find_folder, lfs_pointers
from ..tensors.safetensors_files import read_header
from .limits import check_folder

INDEX = ".index.json"
FULL_WEIGHTS = (  # transformers looks for them in this order
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
FLOATING = ("F64", "F32", "F16", "BF16")
QUANTIZED = {"U8", "I8", "I4", "F8_E4M3", "F8_E5M2", "F4"}
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


S = TypeVar("S", bound="Source")
P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def reading(ref: object, problem: str) -> Iterator[None]:
    """Turn whatever goes wrong in the block, where a stranger's file is read, into one error that names the source.

    The libraries that read the files document no errors, and a damaged file raises errors of any class. The code in
    Rust of safetensors and tokenizers even raises one that is no `Exception`.

    Args:
        ref: Reference of the source.
        problem: Begins the message, such as `"its config.json cannot be used"`.

    Raises:
        IncompatibleSourceError: The block raised an error. Errors of this package stay as they are.
    """
    try:
        yield
    except (GraspError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise IncompatibleSourceError(f"{problem}: {describe(error)}", subject=ref) from error


def reads(problem: str) -> Callable[[Callable[Concatenate[S, P], R]], Callable[Concatenate[S, P], R]]:
    """Decorate a function whose first argument is the source that it reads; see `reading`."""

    def decorate(function: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
        @wraps(function)
        def wrapped(source: S, *args: P.args, **kwargs: P.kwargs) -> R:
            with reading(source.ref, problem):
                return function(source, *args, **kwargs)

        return wrapped

    return decorate


@dataclass(frozen=True)
class SourceRef:
    """A reference to a model: a local folder, or a Hub id with an optional revision.

    Attributes:
        name: Folder, or `org/name` on the Hub.
        revision: Branch, tag or commit on the Hub; the main branch if `None`.
        subfolder: Folder in the repository; the root if `None`.
    """

    name: str
    revision: str | None = None
    subfolder: str | None = None

    @classmethod
    def parse(cls, text: str) -> "SourceRef":
        """Read `org/name`, `org/name@revision`, `org/name/subfolder@revision`, or the path of a folder.

        >>> SourceRef.parse("org/name@v1.0")
        SourceRef(name='org/name', revision='v1.0')

        Raises:
            SourceNotFoundError: `text` is neither an existing folder nor a valid Hub id.
        """
        if text and (folder := find_folder(text)):
            return cls(str(folder))
        name, _, revision = text.partition("@")
        if name and find_folder(name):
            raise SourceNotFoundError(
                f"'{name}' is a folder, which has no revisions; leave out '@{revision}'", subject=text
            )
        no_id = name.startswith((".", "/", "~")) or "//" in name or name.endswith("/") or not text.isprintable()
        if not name or no_id or text.endswith("@"):
            raise SourceNotFoundError(
                f"'{one_line(text, LONGEST_NAME)}' is neither an existing folder nor a Hub id; expected 'org/name', 'org/name@revision' or a "
                "folder that holds config.json or adapter_config.json"
            )
        org, _, rest = name.partition("/")
        repository, _, subfolder = rest.partition("/")
        return cls(f"{org}/{repository}" if repository else name, revision or None, subfolder or None)

    def below(self, folder: str) -> "SourceRef":
        """Return the reference to a folder inside this one."""
        if self.is_local:
            return replace(self, name=str(Path(self.name, folder)))
        return replace(self, subfolder=f"{self.subfolder}/{folder}" if self.subfolder else folder)

    @property
    def is_local(self) -> bool:
        """Whether the name is a folder on this machine."""
        return find_folder(self.name) is not None

    def is_among(self, names: Collection[str]) -> bool:
        """Whether `names` contains this reference, with or without its revision."""
        return not {self.name, str(self)}.isdisjoint(names)

    def __str__(self) -> str:
        name = f"{self.name}/{self.subfolder}" if self.subfolder else self.name
        return f"{name}@{self.revision}" if self.revision else name


@dataclass(frozen=True)
class Source:
    """A source with its files in a folder on this machine.

    Attributes:
        ref: Reference from the user.
        folder: Folder with the files.
        sha: Commit of the files on the Hub; `None` for a local folder.
        kind: `"full"` for a full model, `"adapter"` for an adapter.
        gated: Whether the Hub asks users to accept conditions before a download.
        trusted: Whether the user allows the source's own Python code to run.
    """

    ref: SourceRef
    folder: Path
    sha: str | None
    kind: Literal["full", "adapter"]
    gated: bool = False
    trusted: bool = False

    @classmethod
    def inspect(
        cls,
        ref: SourceRef,
        folder: Path,
        sha: str | None = None,
        files: Sequence[str] | None = None,
        below: Sequence[str] = (),
    ) -> "Source":
        """Return the source in `folder`, after a check that the needed files exist.

        Args:
            ref: Reference from the user.
            folder: Folder with the files.
            sha: Commit of the files on the Hub.
            files: Names of the files before they are downloaded; those in `folder` if left out.
            below: Paths of files in folders below, relative to `folder`. They are not used, but an error names the folders
                that hold a model, or the format of an export.

        Raises:
            SourceNotFoundError: The configuration or the weights are missing, or are git-LFS pointers.
        """
        on_disk = files is None
        if files is None:
            with reading(ref, "its folder cannot be read"):
                files = sorted(path.name for path in folder.iterdir() if path.is_file())
        kind: Literal["full", "adapter"] = "adapter" if "adapter_config.json" in files else "full"
        problem = None
        if kind == "full" and "config.json" not in files:
            problem = "holds no config.json and no adapter_config.json, so it is neither a model nor an adapter"
        elif main_weights(files) is None:
            expected = ADAPTER_WEIGHTS if kind == "adapter" else FULL_WEIGHTS
            problem = f"holds no weights: expected one of {', '.join(expected)}"
        if problem:
            if on_disk:
                below = [
                    path.relative_to(folder).as_posix() for deep in ("*/*", "*/*/*") for path in folder.glob(deep)
                ]
            advice = _advice(ref, files, below)
            raise SourceNotFoundError(f"'{ref}' {problem}; found: {', '.join(files) or 'no files'}{advice}")
        source = cls(ref, folder, sha, kind)
        if on_disk:
            with reading(ref, "its folder cannot be read"):
                _refuse_pointers(source)
                check_folder(ref, folder)
        return source

    @property
    def weight_names(self) -> list[str]:
        """Names of the weight files, in safetensors if possible; an index lists those of several files.

        Some of them may be missing in the folder, see `missing_weights`.
        """
        main = main_weights({path.name for path in self.folder.iterdir() if path.is_file()})
        if main is None:
            return []
        return shards_of(self.folder / main, self.ref) if main.endswith(INDEX) else [main]

    @property
    def weight_files(self) -> list[Path]:
        """Paths of the weight files that are in the folder."""
        return [path for name in self.weight_names if (path := self.folder / name).is_file()]

    @property
    def missing_weights(self) -> list[str]:
        """Names of the weight files that are missing in the folder."""
        return [name for name in self.weight_names if not (self.folder / name).is_file()]

    @property
    def num_bytes(self) -> int:
        """Size of the weights in bytes."""
        return sum(path.stat().st_size for path in self.weight_files)

    def dtypes(self) -> set[str]:
        """Return the dtypes in the safetensors headers, spelled as there (`F32`, `BF16`); none for `.bin` files.

        Raises:
            IncompatibleSourceError: A weight file cannot be read.
        """
        found = set()
        for path in self.weight_files:
            if path.suffix != ".safetensors":
                continue
            with reading(self.ref, f"{path.name} cannot be read as safetensors"):
                found |= {dtype for _, dtype, _ in read_header(path)}
        return found

    def float_dtypes(self) -> set[str]:
        """Return the float dtypes in the safetensors headers.

        Raises:
            IncompatibleSourceError: The weights are quantized, or a weight file cannot be read.
        """
        found = self.dtypes()
        if quantized := found & QUANTIZED:
            raise IncompatibleSourceError(
                f"its weights are quantized ({', '.join(sorted(quantized))}), expected float weights; name the model "
                "that it was made from, or dequantize the weights and save them first",
                subject=self.ref,
            )
        return {name for name in found if name in FLOATING}


def local_files(ref: SourceRef) -> dict[str, list[int]] | None:
    """Return size in bytes and time of the last change (in nanoseconds) of each file of a folder; `None` for the Hub."""
    if not ref.is_local:
        return None
    found = {path.name: path.stat() for path in sorted(Path(ref.name).glob("*")) if path.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _refuse_pointers(source: Source) -> None:
    """Raise `SourceNotFoundError` if the configuration or a weight file of a folder is a git-LFS pointer."""
    main = main_weights([path.name for path in source.folder.iterdir()])
    small = ["config.json", "adapter_config.json", *([main] if main else [])]
    if pointers := lfs_pointers(source.folder, small) or lfs_pointers(source.folder, source.weight_names):
        raise SourceNotFoundError(f"{first_few(pointers)}: got {LFS_ADVICE}", subject=source.ref)


def _advice(ref: SourceRef, files: Sequence[str], below: Sequence[str]) -> str:
    """Return what to name instead of a folder that holds no model; empty if its files do not tell."""
    everything = [*files, *below]
    if models := _model_folders(below):
        return f"; a model or adapter is in {first_few(models)}: name the one to use, such as '{ref.below(models[0])}'"
    if any(name.endswith("zero_to_fp32.py") for name in everything):
        return "; DeepSpeed has saved a part of the weights for each process: join them with its zero_to_fp32.py"
    if any("pytorch_model_fsdp" in name for name in everything):
        return "; FSDP has saved a part of the weights for each process: join them with `accelerate merge-weights`"
    if any(name.endswith(".gguf") for name in everything):
        return "; a GGUF file has quantized weights: name the float model that it was made from"
    if any(name.endswith((".onnx", ".h5", ".msgpack")) for name in everything):
        return "; an export for another framework cannot be merged: name the PyTorch model that it was made from"
    return ""


def _model_folders(paths: Collection[str]) -> list[str]:
    """Return the folders that hold a configuration with its weights, such as `checkpoint-500`; later ones come first."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folder, _, name = path.rpartition("/")
        folders.setdefault(folder, []).append(name)
    found = [
        folder
        for folder, names in folders.items()
        if not {"config.json", "adapter_config.json"}.isdisjoint(names) and main_weights(names)
    ]
    return sorted(found, key=lambda folder: [int(n) for n in re.findall(r"\d+", folder)], reverse=True)


def main_weights(files: Collection[str]) -> str | None:
    """Return the name of the single weight file in `files`, or of the index of several; `None` if there is none."""
    expected = ADAPTER_WEIGHTS if "adapter_config.json" in files else FULL_WEIGHTS
    return next((name for name in expected if name in files), None)


def shards_of(index: Path, ref: SourceRef) -> list[str]:
    """Return the names of the weight files that an index lists.

    Other weight files in the folder may be left from an earlier version.

    Raises:
        IncompatibleSourceError: The file is not an index, or lists files outside its folder.
    """
    with reading(ref, f"{index.name} cannot be read as an index of weight files"):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        outside = [name for name in names if Path(name).name != name or len(name) > 255 or not name.isprintable()]
    if outside:
        raise IncompatibleSourceError(
            f"{index.name} lists '{first_few(outside, 1)}', expected only files in its own folder",
            subject=ref,
        )
    return names
