"""PEFT adapters as sources: what they say of themselves, and what they make of their base model."""

from json import JSONDecodeError
from pathlib import Path

from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from . import hub
from .errors import IncompatibleSourceError
from .sources import Source, SourceRef


def load_adapter_config(source: Source) -> PeftConfig:
    """Return the configuration of an adapter.

    Raises:
        IncompatibleSourceError: It cannot be read, or is of a type that PEFT does not know.
    """
    try:
        return PeftConfig.from_pretrained(str(source.folder))
    except (ValueError, KeyError, TypeError, OSError, JSONDecodeError) as error:
        message = f"'{source.ref}': its adapter_config.json cannot be used: {type(error).__name__}: {error}"
        raise IncompatibleSourceError(message) from error


def adapter_problems(config: PeftConfig, adapter: Source, base: Source | None) -> list[str]:
    """List what an adapter's config alone says against applying it to `base`."""
    problems = []
    kind = PeftType(config.peft_type)
    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    if config.is_prompt_learning or tuner is None or not hasattr(tuner, "merge_and_unload"):
        problems.append(f"an adapter of type {kind.value} cannot be merged into weights; expected LoRA or alike")
    named = config.base_model_name_or_path or ""
    if base is None:
        problems.append(
            f"it is an adapter of '{named}', but where the target started is not known; load the target with "
            "GraspMerger.from_pretrained"
        )
    elif named != base.ref.name and not _is_folder(named, adapter, base):
        problems.append(
            f"it is an adapter of '{named}', expected an adapter of '{base.ref.name}'; if they are the same, name it so "
            "in base_model_name_or_path of adapter_config.json"
        )
    elif config.revision and base.sha and not _is_commit(named, config.revision, base):
        problems.append(f"it is an adapter of '{named}' at revision '{config.revision}', expected '{base.ref}'")
    return problems


def _is_folder(name: str, adapter: Source, base: Source) -> bool:
    """Whether `name` is the folder of `base`, seen from here or from the adapter's own folder."""
    paths = (Path(name), adapter.folder / name)
    return bool(name) and any(path.is_dir() and path.samefile(base.folder) for path in paths)


def _is_commit(name: str, revision: str, base: Source) -> bool:
    """Whether `revision` (a branch, a tag, a sha) is the commit that `base` was taken from."""
    return revision in (base.sha, base.ref.revision) or hub.commit_of(SourceRef(name, revision)) == base.sha


def apply_adapter_(
    base: PreTrainedModel, adapter: Source, *, ignore_mismatched_sizes: bool = False
) -> tuple[PreTrainedModel, set[str]]:
    """Change `base` in place to what the adapter makes of it, and return it with the modules that were touched.

    With `ignore_mismatched_sizes`, a module saved whole (a head of other labels) may have another shape; it is left out.

    Raises:
        IncompatibleSourceError: The adapter's file lacks weights, or holds some that belong nowhere or have other shapes.
        ValueError, RuntimeError, OSError: PEFT cannot read it or apply it to this model.
    """
    adapted = PeftModel.from_pretrained(base, str(adapter.folder), ignore_mismatched_sizes=ignore_mismatched_sizes)
    # Saving embedding layers is left out because PEFT would ask the Hub about the base model.
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    weights = load_peft_weights(str(adapter.folder), device="cpu")
    # The weights below an adapted embedding or output layer are saved along, although they are the base model's.
    expected, found = ({key for key in keys if ".base_layer." not in key} for keys in (state, weights))
    if found != expected:
        some = sorted(found ^ expected)
        raise IncompatibleSourceError(
            f"'{adapter.ref}' does not fit its own configuration on this model: {len(expected - found)} weights are not "
            f"in its file and {len(found - expected)} belong nowhere, starting with {some[0]}"
        )
    whole = [f".{name}." for name in getattr(adapted.active_peft_config, "modules_to_save", None) or ()]
    for key in sorted(expected):
        if weights[key].shape != state[key].shape and not any(name in key for name in whole):
            raise IncompatibleSourceError(
                f"'{adapter.ref}' does not fit this model: {key} has shape {tuple(weights[key].shape)}, expected "
                f"{tuple(state[key].shape)}"
            )
    touched = _touched_modules(adapted, expected)
    return adapted.merge_and_unload(), touched


def _touched_modules(adapted: PeftModel, keys: set[str]) -> set[str]:
    """Return the runtime names of the base model's modules that the adapter changes or brings along whole."""
    modules = dict(adapted.get_base_model().named_modules())
    touched = {name for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    for key in keys:
        name = key.removeprefix("base_model.model.")
        while name not in modules:
            name = name.rpartition(".")[0]
        touched |= {name} - {""}
    return touched
