"""The files that belong to a model besides its weights and its config: tokenizer, processor, templates, modules, code."""

import logging
import re
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import first_few
from .reference import Source

logger = logging.getLogger(__name__)

TOKENIZERS = ("*.model", "*.spm", "*.tiktoken", "bpe.codes")  # files of tokenizers with other suffixes
CHAT_TEMPLATES = "additional_chat_templates"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
    f"{CHAT_TEMPLATES}/*.jinja",
)
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)
MODULES = "modules.json"  # lists the modules of a sentence-transformers model, which have folders such as 1_Pooling
MODULE_FILE = re.compile(r"\d+_\w+/[\w.-]+\.(json|txt|safetensors|bin)")
OTHER_FILES = (
    "generation_config.json",
    *TOKENIZERS,  # a fast tokenizer is saved without them, and converters to other formats need them
    MODULES,
    "sentence_*_config.json",
    "config_sentence_transformers.json",
)


def files_below(paths: Iterable[str]) -> list[str]:
    """Return those of the relative paths of a repository's files that are in a folder and belong to its model."""
    paths = [*paths]
    return [
        path
        for path in paths
        if path.startswith(f"{CHAT_TEMPLATES}/") or (MODULES in paths and MODULE_FILE.fullmatch(path))
    ]


def copy_companions(base: Source, directory: Path, *, saved: Collection[str]) -> None:
    """Copy the files that belong to the model `base` into `directory`; a file that cannot be copied is a warning.

    Weights and config are never among them, and Python files only if the user trusts the model.

    Args:
        base: The model that a merge started from.
        directory: Folder for the copies.
        saved: Patterns of files that are not copied, because the merge writes them itself.
    """
    patterns = (*TOKENIZER_FILES, *PROCESSOR_FILES, *OTHER_FILES, *(["*.py"] if base.trusted else []))
    wanted = [pattern for pattern in patterns if pattern not in saved]
    for name in [*_paths(base.folder, "*", wanted), *_paths(base.folder, "*/*", wanted), *_module_files(base.folder)]:
        try:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(base.folder / name, directory / name)
        except shutil.SameFileError:  # the merge is saved where it was loaded from
            continue
        except OSError as error:
            logger.warning("%s of '%s' could not be copied to '%s': %s", name, base.ref, directory, error)


def compare_modules(source: Source, base: Source | None) -> list[str]:
    """Return a note if the sentence-transformers modules of a source differ from those of the base, which stay."""
    if base is None or not _module_files(base.folder) or not _module_files(source.folder):
        return []

    def content(folder: Path, name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    names = sorted({*_module_files(base.folder), *_module_files(source.folder)})
    different = [name for name in names if content(source.folder, name) != content(base.folder, name)]
    return (
        [f"modules: those of the target stay, and the source has others: {first_few(different)}"] if different else []
    )


def _module_files(folder: Path) -> list[str]:
    """Return the files of the modules of a sentence-transformers model; none for another model."""
    if not (folder / MODULES).is_file():
        return []
    return [name for name in _paths(folder, "*/*", ["*/*"]) if MODULE_FILE.fullmatch(name)]


def _paths(folder: Path, depth: str, patterns: Collection[str]) -> list[str]:
    """Return the relative paths at `depth` (`*`, `*/*`) of the files in `folder` that match one of `patterns`."""
    found = (path.relative_to(folder).as_posix() for path in folder.glob(depth) if path.is_file())
    return sorted(name for name in found if any(Path(name).match(pattern) for pattern in patterns))
