"""The tokenizer or processor of a model."""

import logging
from importlib.util import find_spec
from typing import Any

import transformers
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, IncompatibleSourceError
from ..files import LFS_ADVICE, lfs_pointers
from ..hub.companions import TOKENIZERS
from ..hub.reference import Source
from .classes import quiet_transformers

logger = logging.getLogger(__name__)

TOKENIZER_FILES = ("tokenizer*.json", "vocab*", *TOKENIZERS)
PROCESSING_FILES = (*TOKENIZER_FILES, "preprocessor_config.json", "processor_config.json")
SENTENCEPIECE = ("*.model", "*.spm")


def read_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`; `None` if the folder holds no files of one.

    Raises:
        IncompatibleSourceError: The files cannot be read, or need a package that is not installed.
    """
    # Without these files, transformers makes up a tokenizer that knows no word.
    names = _names(source, PROCESSING_FILES)
    if not names:
        return None
    if pointers := lfs_pointers(source.folder, names):
        raise IncompatibleSourceError(f"{', '.join(pointers)}: got {LFS_ADVICE}", subject=source.ref)
    problems = []
    # A speech processor needs more files than its tokenizer.
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            with quiet_transformers():
                found = auto.from_pretrained(source.folder, trust_remote_code=source.trusted)
            _require_words(found)
            if not source.trusted:  # the code of a stranger does not come along, so nothing may name it
                getattr(found, "init_kwargs", {}).pop("auto_map", None)
            return found
        except Exception as error:  # tokenizers raises a bare Exception, transformers errors of many types
            problems.append(error)
    tokenizer = _names(source, TOKENIZER_FILES)
    problem = problems[1] if tokenizer else problems[0]
    reason = " ".join(str(problem).split())[:200].rstrip(".")
    if find_spec("sentencepiece") is None and _names(source, SENTENCEPIECE):
        reason = f"it may need sentencepiece: pip install 'grasp_hf[sentencepiece]' ({reason})"
    else:
        reason += f" (transformers {transformers.__version__}); it may be damaged, or need a newer version"
    raise IncompatibleSourceError(
        f"its {'tokenizer' if tokenizer else 'processor'} ({', '.join(tokenizer or names)}) cannot be read: {reason}",
        subject=source.ref,
    ) from problem


def _require_words(processor: Any) -> None:
    """Raise `ValueError` for a tokenizer without its vocabulary, which transformers makes up if files are missing."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if isinstance(tokenizer, PreTrainedTokenizerBase) and set(tokenizer.get_vocab()) <= {
        *tokenizer.all_special_tokens
    }:
        raise ValueError("it knows no word, because the file of its vocabulary is missing or empty")


def _names(source: Source, patterns: tuple[str, ...]) -> list[str]:
    return sorted({path.name for pattern in patterns for path in source.folder.glob(pattern)})


def load_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`; `None` if there is none or it cannot be read."""
    try:
        return read_processing_class(source)
    except IncompatibleSourceError as error:
        logger.warning("%s; it is not used", error)
        return None


def required_processing_class(base: Source) -> Any:
    """Return the tokenizer or image processor of `base`.

    Raises:
        DataError: It has none.
        IncompatibleSourceError: It cannot be read.
    """
    processor = read_processing_class(base)
    if processor is None:
        raise DataError(
            f"'{base.ref}' holds no tokenizer or image processor, and the data cannot be prepared without one; add "
            "its files"
        )
    return processor
