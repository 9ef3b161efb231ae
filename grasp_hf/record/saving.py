"""Saves a merge: a model folder with its card, its configuration and its record."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..errors import ConfigError, OutputExistsError
from ..files import write_whole
from ..hub.companions import PROCESSOR_FILES, TOKENIZER_FILES, copy_companions
from ..hub.reference import Source
from ..internals import saved_state
from ..models.classes import quiet_transformers
from ..models.padding import tokenizer_of
from .card import model_card
from .figures import save_figures
from .report import MergeReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REPORT_FILE = "grasp_report.json"
CONFIG_FILE = "grasp_config.yaml"
# This text replaces the record until all files are written, because the weights may still be those of another merge.
UNFINISHED = '{"unfinished": "this merge was not saved to its end"}\n'


def read_record(folder: Path) -> MergeReport | None:
    """Return the record of the merge in `folder`; `None` if the folder holds no merge.

    Raises:
        ConfigError: The record cannot be read, or the merge was not saved completely.
    """
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    if path.read_bytes() == UNFINISHED.encode():
        raise ConfigError(
            f"the merge in '{folder}' was not saved completely; merge again, into the same folder or into another one"
        )
    return MergeReport.from_json(path)


def check_output(directory: Path) -> None:
    """Create `directory` if it is missing, and check that a merge can be saved in it.

    Raises:
        OutputExistsError: The directory holds something that is not an earlier merge, or it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        holds_other_files = any(directory.iterdir()) and not (directory / REPORT_FILE).exists()
    except OSError as error:
        raise OutputExistsError(f"'{directory}' cannot be written: {error.strerror}; name another folder") from error
    if holds_other_files:
        raise OutputExistsError(
            f"'{directory}' already holds something that is not a merge; expected a new or empty folder, or an earlier "
            f"merge with its {REPORT_FILE}"
        )
    if not os.access(directory, os.W_OK):
        raise OutputExistsError(f"'{directory}' cannot be written: no permission; name another folder")


def save_merge(
    directory: Path,
    model: PreTrainedModel,
    processing_class: Any,
    report: MergeReport,
    *,
    base: Source | None = None,
    model_id: str | None = None,
) -> None:
    """Write the model, its tokenizer or processor, the card, the configuration and finally the record to `directory`.

    Until all are written, `read_record` raises an error.
    """
    save_record(directory, model, processing_class, report, base=base, model_id=model_id, weights=True)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read


def save_record(
    directory: Path,
    model: PreTrainedModel,
    processing_class: Any,
    report: MergeReport,
    *,
    base: Source | None = None,
    model_id: str | None = None,
    weights: bool = False,
) -> None:
    """Write configuration, tokenizer or processor, card, figures and record to `directory`, and the weights if asked for.

    Args:
        directory: Created if it is missing; an earlier merge in it is replaced.
        model: The merged model.
        processing_class: Its tokenizer or processor; `None` if there is none.
        report: The record of the merge.
        base: The model that the merge started from. Files that belong to it, such as chat templates, are copied.
        model_id: The repository that the usage snippet of the card loads; the name of the folder if left out.
        weights: Whether to write the weights too.
    """
    # Configuration and card are made first, so that an error in them leaves the record of an earlier merge in place.
    configuration = report.configuration()
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / REPORT_FILE).exists():
        write_whole(directory / REPORT_FILE, UNFINISHED)
    figures = save_figures(report.without_paths(), directory)
    card = model_card(
        model,
        report.without_paths(),
        model_id or directory.resolve().name,
        figures,
        with_pipeline=processing_class is not None,
        gated=report.gated,
    )
    write_whole(directory / REPORT_FILE, UNFINISHED)
    (directory / CONFIG_FILE).write_text(configuration, encoding="utf-8")
    card.save(directory / "README.md")
    if base is not None:
        from transformers import ProcessorMixin  # imports code of models, which only a merge needs

        tokenizer = TOKENIZER_FILES if tokenizer_of(processing_class) else ()
        processor = PROCESSOR_FILES if isinstance(processing_class, ProcessorMixin) else ()
        copy_companions(base, directory, saved=tokenizer + processor)
    with quiet_transformers(), _settings_of_generation(model, directory):
        model.save_pretrained(directory, state_dict=None if weights else {})
    if processing_class is not None:
        processing_class.save_pretrained(directory)
    report.to_json(directory / REPORT_FILE)


@contextmanager
def _settings_of_generation(model: PreTrainedModel, directory: Path) -> Iterator[None]:
    """Write the settings of generation after the block, in which `save_pretrained` writes defaults.

    transformers loads a temperature without sampling, as many published models have it, and refuses to save it.
    """
    settings = getattr(model, "generation_config", None)
    if settings is None or not model.can_generate():
        yield
        return
    model.generation_config = type(settings)()
    try:
        yield
    finally:
        model.generation_config = settings
    settings.to_json_file(directory / "generation_config.json", keys_to_pop=["compile_config"])


def saved_shards(directory: Path, model: PreTrainedModel, max_shard_size: int | str) -> Iterator[Path]:
    """Write the weights as `save_pretrained` does, one shard for each path that is asked for, and finally the index.

    The files are those of `save_pretrained`, byte for byte. The caller may delete a shard before it asks for the next.
    """
    state = saved_state(model)
    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_size)
    for name, tensors in split.filename_to_tensors.items():
        shard = {tensor: state.pop(tensor).contiguous() for tensor in tensors}
        save_file(shard, directory / name, metadata={"format": "pt"})
        del shard
        yield directory / name
    if split.is_sharded:
        metadata = {"total_parameters": model.num_parameters(), **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        path = directory / SAFE_WEIGHTS_INDEX_NAME
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield path
