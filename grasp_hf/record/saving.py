"""Saves a merge: a model folder with its card, its configuration and its record."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..errors import ConfigError, OutputExistsError, describe
from ..files import flush_tree, link_or_copy, replace_folder, workspace, write_whole
from ..hub.companions import PROCESSOR_FILES, TOKENIZER_FILES, copy_companions
from ..hub.reference import FULL_WEIGHTS, Source
from ..internals import saved_state
from ..models.classes import quiet_transformers
from ..models.mixture import mixture_of
from ..models.padding import tokenizer_of
from . import adapter
from .card import model_card
from .figures import save_figures
from .report import MergeReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

REPORT_FILE = "grasp_report.json"
CONFIG_FILE = "grasp_config.yaml"
PARTIAL = ".partial"  # the state of a merge, in an output folder beside which nothing can be written
SAVING = ".grasp_hf-saving-"  # begins the names of folders beside the output, while it is written
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
    """Check that a merge can be saved in `directory`, which is not created.

    Raises:
        OutputExistsError: The directory holds something that is not an earlier merge, or it cannot be written.
    """
    directory = directory.expanduser()
    try:
        holds_files = directory.exists() and any(path.name != PARTIAL for path in directory.iterdir())
        holds_other_files = holds_files and not (directory / REPORT_FILE).exists()
        nearest = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    except OSError as error:
        raise OutputExistsError(f"'{directory}' cannot be written: {error.strerror}; name another folder") from error
    if holds_other_files:
        raise OutputExistsError(
            f"'{directory}' already holds something that is not a merge; expected a new or empty folder, or an earlier "
            f"merge with its {REPORT_FILE}"
        )
    if not nearest.is_dir():
        raise OutputExistsError(f"'{directory}' cannot be written: '{nearest}' is a file; name another folder")
    if not os.access(nearest, os.W_OK):
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
    """Write the model, its tokenizer or processor, the card, the configuration and the record to `directory`.

    They are written beside it, flushed to the disk, and put in its place in one step. So a kill or a power cut leaves the
    earlier merge or the new one. Files in it that the earlier merge did not write stay.

    Where the folder cannot be exchanged (a mount point, the working directory, a read-only parent), it is written in place,
    and `read_record` raises an error until all is written.
    """
    place = directory.expanduser().resolve()
    options: dict[str, Any] = {"base": base, "model_id": model_id or place.name, "weights": True}
    if not _is_replaceable(place):
        save_record(place, model, processing_class, report, **options)
        return
    with workspace(place.parent, SAVING) as beside:
        new = beside / "merge"
        save_record(new, model, processing_class, report, **options)
        if place.exists():
            for path in _files_of_others(place):
                if not (new / path.name).exists():
                    link_or_copy(path, new / path.name)
            shutil.copymode(place, new)
        flush_tree(new)
        try:
            replace_folder(new, place)
        except OSError:
            save_record(place, model, processing_class, report, **options)


def _is_replaceable(place: Path) -> bool:
    """Whether a folder can be exchanged: a mount point, a read-only parent and the working directory prevent it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    return (
        os.access(place.parent, os.W_OK | os.X_OK)
        and not (place.exists() and place.is_mount())
        and place not in (Path.cwd(), *Path.cwd().parents)
    )


def _files_of_others(directory: Path) -> list[Path]:
    """Return the files and folders that the merge in `directory` did not write.

    A record of an earlier version does not list its files. Then these are all files but the weights.
    """
    try:
        written = set(json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        written = {path.name for path in directory.glob("*.safetensors*")}
    return [path for path in directory.iterdir() if path.name not in written]


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
    # It is made first, so that an error in it leaves the record of an earlier merge in place.
    configuration = report.configuration()
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / REPORT_FILE, UNFINISHED)
    (directory / CONFIG_FILE).write_text(configuration, encoding="utf-8")
    _remove_other_kind(directory, model)
    if (mixture := mixture_of(model)) is not None:
        adapter.save_adapter_config(directory, mixture, report.base_id, report.base_sha)
        if weights:
            adapter.save_adapter_weights(directory, mixture)
    else:
        if base is not None:
            from transformers import ProcessorMixin  # imports code of models, which only a merge needs

            tokenizer = TOKENIZER_FILES if tokenizer_of(processing_class) else ()
            processor = PROCESSOR_FILES if isinstance(processing_class, ProcessorMixin) else ()
            copy_companions(base, directory, saved=tokenizer + processor)
        with quiet_transformers(), _settings_of_generation(model, directory):
            model.save_pretrained(directory, state_dict=None if weights else {})
    if processing_class is not None:
        processing_class.save_pretrained(directory)
    _save_card(directory, model, report, model_id, with_pipeline=processing_class is not None)
    for path in directory.glob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    report.to_json(directory / REPORT_FILE, files=sorted(path.name for path in directory.iterdir()))


def _save_card(
    directory: Path, model: PreTrainedModel, report: MergeReport, model_id: str | None, *, with_pipeline: bool
) -> None:
    """Write the card and its figures; an error is only a warning, because the weights are worth hours."""
    path, shown = directory / "README.md", report.without_paths()
    path.unlink(missing_ok=True)  # that of an earlier merge
    try:
        figures = save_figures(shown, directory)
        name = model_id or directory.resolve().name
        model_card(model, shown, name, figures, with_pipeline=with_pipeline, gated=report.gated).save(path)
    except OSError:  # a full disk: the record could not be written either
        raise
    except Exception as error:
        logger.warning(
            "the model is saved, but its card could not be made: %s; write %s by hand, and report this error",
            describe(error),
            path.name,
        )


def _remove_other_kind(directory: Path, model: PreTrainedModel) -> None:
    """Remove the weights of an earlier merge of the other kind: a folder holds a whole model or an adapter, never both."""
    patterns = [f"{name}*" for name in (*FULL_WEIGHTS, "model-*-of-*.safetensors")]
    for pattern in patterns if mixture_of(model) is not None else [adapter.CONFIG, adapter.WEIGHTS]:
        for path in directory.glob(pattern):
            path.unlink()


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

    An adapter is one file.

    The files are those of `save_pretrained`, byte for byte. The caller may delete a shard before it asks for the next.
    """
    if (mixture := mixture_of(model)) is not None:
        yield adapter.save_adapter_weights(directory, mixture)
        return
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
