"""The tokenizer or processor of a model."""

import logging
from typing import Any

import transformers

from ..errors import DataError, first_line
from ..hub.listing import TOKENIZERS
from ..hub.reference import Source
from .classes import quiet_transformers

logger = logging.getLogger(__name__)

PROCESSING_FILES = ("tokenizer*.json", "vocab*", *TOKENIZERS, "preprocessor_config.json", "processor_config.json")


def load_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`; `None` if there is none or it cannot be loaded."""
    # Without these files, transformers makes up a tokenizer that knows no word.
    if not any(path for pattern in PROCESSING_FILES for path in source.folder.glob(pattern)):
        return None
    problem: Exception | None = None
    # A speech processor needs more files than its tokenizer.
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            with quiet_transformers():
                return auto.from_pretrained(source.folder, trust_remote_code=False)
        except (ValueError, OSError, KeyError, ImportError) as error:
            problem = error
    if problem:
        reason = first_line(problem)
        logger.warning("%s: its tokenizer or processor cannot be loaded and is not used: %s", source.ref, reason)
    return None


def required_processing_class(base: Source) -> Any:
    """Return the tokenizer or image processor of `base`; raise `DataError` if it has none."""
    processor = load_processing_class(base)
    if processor is None:
        raise DataError(
            f"'{base.ref}' holds no tokenizer or image processor, and the data cannot be prepared without one; add "
            "its files"
        )
    return processor
