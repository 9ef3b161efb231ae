"""The tokenizer or processor of a model."""

import logging
from typing import Any

import transformers

from ..errors import DataError, IncompatibleSourceError
from ..hub.listing import TOKENIZERS
from ..hub.reference import Source, reading
from .classes import quiet_transformers

logger = logging.getLogger(__name__)

PROCESSING_FILES = ("tokenizer*.json", "vocab*", *TOKENIZERS, "preprocessor_config.json", "processor_config.json")


def load_processing_class(source: Source) -> Any:
    """Return the tokenizer or processor in the folder of `source`; `None` if there is none or it cannot be loaded."""
    # Without these files, transformers makes up a tokenizer that knows no word.
    if not any(path for pattern in PROCESSING_FILES for path in source.folder.glob(pattern)):
        return None
    reason = ""
    # A speech processor needs more files than its tokenizer.
    for auto in (transformers.AutoProcessor, transformers.AutoTokenizer):
        try:
            with (
                reading(source.ref, "its tokenizer or processor cannot be loaded and is not used"),
                quiet_transformers(),
            ):
                return auto.from_pretrained(source.folder, trust_remote_code=False)
        except IncompatibleSourceError as error:
            reason = str(error)
    logger.warning("%s", reason)
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
