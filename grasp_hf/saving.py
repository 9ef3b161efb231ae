"""What a merge leaves: a model folder with its card, its configuration and its record."""

import os
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .card import model_card
from .errors import OutputExistsError
from .loading import quiet_transformers
from .report import MergeReport

REPORT_FILE = "grasp_report.json"
CONFIG_FILE = "grasp_config.yaml"


def check_output(directory: Path) -> None:
    """Make `directory` where it is missing.

    Raises:
        OutputExistsError: It holds something that is not an earlier merge, or nothing can be written there.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        taken = any(directory.iterdir()) and not (directory / REPORT_FILE).exists()
    except OSError as error:
        raise OutputExistsError(f"'{directory}' cannot be written: {error.strerror}; name another folder") from error
    if taken:
        raise OutputExistsError(
            f"'{directory}' already holds something that is not a merge; expected a new or empty folder, or one with "
            f"{REPORT_FILE} in it"
        )
    if not os.access(directory, os.W_OK):
        raise OutputExistsError(f"'{directory}' cannot be written: no permission; name another folder")


def save_merge(
    directory: Path,
    model: PreTrainedModel,
    processing_class: Any,
    report: MergeReport,
    *,
    model_id: str | None = None,
) -> None:
    """Write the model, its tokenizer or processor, the card, the configuration and the report to `directory`."""
    # The small files are made first: what is wrong with them is wrong before any weight is written.
    configuration = report.configuration()
    card = model_card(model, report.without_paths(), model_id or directory.name)
    directory.mkdir(parents=True, exist_ok=True)
    report.to_json(directory / REPORT_FILE)
    (directory / CONFIG_FILE).write_text(configuration, encoding="utf-8")
    card.save(directory / "README.md")
    with quiet_transformers():
        model.save_pretrained(directory)
    if processing_class is not None:
        processing_class.save_pretrained(directory)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes them for the owner alone
