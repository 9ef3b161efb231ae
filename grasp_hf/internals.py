"""Private and undocumented names of transformers, peft, datasets, huggingface_hub, accelerate and torch.

An upstream release may rename these without notice. Every use goes through a function here, so a change upstream is
repaired in one file. `tests/test_internals.py` calls each function and fails if a name is gone or has a new meaning.
It also fails if another module of the package uses such a name.

The file is at the top level because `hub` and `tensors`, which may not import from `models`, need it too. Each
function imports its library itself, so a library that a command does not use costs no start-up time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from peft import PeftModel, PeftType
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel, Trainer, WeightConverter
    from transformers.core_model_loading import WeightRenaming


# torch


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """Whether `state_dict()` holds a buffer of `module`.

    torch has no query for one buffer. A whole `state_dict()` lists tied tensors twice and runs hooks.
    """
    return buffer not in module._non_persistent_buffers_set


def child_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return a copy of the table of children of `module`.

    `named_children()` leaves out empty entries, and lists a child with two names only once.
    """
    return dict(module._modules)


def restore_child_modules_(module: nn.Module, children: Mapping[str, nn.Module | None]) -> None:
    """Restore the children of `module` that `child_modules` returned.

    PEFT replaces layers in place, and its `unload()` keeps the layers of `modules_to_save`.
    """
    module._modules.update(children)


def forward_hooks(module: nn.Module) -> dict[int, Callable]:
    """Return a copy of the table of forward hooks of `module`; torch has no public list of them."""
    return dict(module._forward_hooks)


def restore_forward_hooks_(module: nn.Module, hooks: Mapping[int, Callable]) -> None:
    """Restore the forward hooks of `module` that `forward_hooks` returned.

    torch removes a hook only by its handle, and the Trainer and PEFT do not give out their handles.
    """
    module._forward_hooks.clear()
    module._forward_hooks.update(hooks)


def normalizes_batches(model: nn.Module) -> bool:
    """Whether a layer of `model` is a BatchNorm of any number of dimensions; torch has no public class for all."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return any(isinstance(module, _BatchNorm) for module in model.modules())


# transformers: models and their configurations


def computed_patterns(model: PreTrainedModel) -> list[str]:
    """Return regular expressions for the names of tensors that the model computes, so that a checkpoint may lack them.

    The class keeps them in private attributes, which `save_pretrained` and `from_pretrained` read.
    """
    return [*(model._keys_to_ignore_on_save or ()), *(model._keys_to_ignore_on_load_missing or ())]


def ignored_patterns(model: PreTrainedModel) -> list[str]:
    """Return regular expressions for the names of tensors in files that `from_pretrained` leaves out without a word.

    They belong to buffers that older versions saved, or to parts that the model does not have. The class keeps them in a
    private attribute, and `from_pretrained` adds those of buffers that many models have.
    """
    buffers = {name.rpartition(".")[2] for name, _ in model.named_buffers()} & {"inv_freq", "position_ids"}
    return [*(model._keys_to_ignore_on_load_unexpected or ()), *(rf"(^|\.){name}$" for name in sorted(buffers))]


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors of `model` as `save_pretrained` writes them: under their names in files, tied tensors once.

    `save_pretrained` writes all files at once. This package writes them shard by shard.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    state = model.state_dict()
    for name in model._keys_to_ignore_on_save or ():
        state.pop(name, None)
    return dict(revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model)))


def initialize_(module: nn.Module, model: PreTrainedModel) -> None:
    """Replace the own parameters of `module`, a part of `model`, by fresh ones, as the class of `model` draws them.

    `init_weights()` initializes a whole model, and skips weights that are marked as loaded.
    """
    for marked in (module, *module.parameters(recurse=False)):
        vars(marked).pop("_is_hf_initialized", None)
    model._init_weights(module)


@contextmanager
def checkpoints_in_runtime_names(model: PreTrainedModel) -> Iterator[None]:
    """Let the Trainer's checkpoints use the names that the model has in memory.

    transformers saves some models (ViT, Mixtral, old BERT) under other names than those in memory. The Trainer loads
    its best checkpoint by the names in memory and skips all others, so most weights of a ViT were those of the last
    epoch (transformers issue 48805).
    """
    conversions = vars(model).get("_weight_conversions")
    vars(model)["_weight_conversions"] = []
    try:
        yield
    finally:
        del vars(model)["_weight_conversions"]
        if conversions is not None:
            vars(model)["_weight_conversions"] = conversions


def use_plain_attention_(config: PretrainedConfig) -> None:
    """Set the attention in `config` to the plain one, so that a class without its own attention accepts `config`.

    A loaded config names the attention of its parts, and the public ways to choose another attention need a model.
    """
    config._attn_implementation = "eager"


# transformers: auto classes, tasks, models with code of their own


def task_classes() -> dict[str, tuple[Any, ...]]:
    """Return the auto classes of each pipeline task: `{"text-classification": (AutoModelForSequenceClassification,)}`.

    `pipelines.get_supported_tasks` names the tasks without their classes.
    """
    from transformers import pipelines

    tasks: dict[str, Any] = pipelines.SUPPORTED_TASKS
    return {task: tuple(details["pt"]) for task, details in tasks.items()}


def class_of(auto: Any, config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the model class that an auto class chooses for `config`; `None` if it has none.

    The public `from_config` builds the model, with all its weights.
    """
    if type(config) not in auto._model_mapping:
        return None
    found: Any = auto._model_mapping[type(config)]
    return found[0] if isinstance(found, tuple) else found


def class_names(auto: Any) -> set[str]:
    """Return the names of all model classes of an auto class.

    The values of the table of classes import every model of transformers when they are read. The names are in a
    private table inside it.
    """
    names: set[str] = set()
    for value in auto._model_mapping._model_mapping.values():
        names |= set(value) if isinstance(value, tuple | list) else {value}
    return names


def has_own_code(config: PretrainedConfig) -> bool:
    """Whether the class of `config` was loaded from the files of a model, not from transformers.

    transformers imports such classes as part of one package, whose name is an undocumented constant.
    """
    from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

    return type(config).__module__.startswith(TRANSFORMERS_DYNAMIC_MODULE_NAME)


def own_class(reference: str, config: PretrainedConfig) -> Any:
    """Return the class `reference` (`modeling_x.XForY`) in the folder of a loaded `config`; its code runs.

    An auto class finds the class only for its own task, and builds the model.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    return get_class_from_dynamic_module(reference, str(config.name_or_path))


# transformers: names in files and names in memory


def weight_conversions(model: PreTrainedModel) -> tuple[list[WeightRenaming], list[WeightConverter]]:
    """Return the changes by `from_pretrained` to tensors in files: renamings, and conversions of several into one.

    No public function loads a checkpoint into an existing model, or lists the changes of its names. PEFT uses this
    function.
    """
    from transformers import WeightConverter
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming

    entries = get_model_conversion_mapping(model)
    renamings = [entry for entry in entries if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in entries if isinstance(entry, WeightConverter)]


def runtime_name(
    name: str,
    renamings: list[WeightRenaming],
    converters: list[WeightConverter] | None = None,
    prefix: str | None = None,
    expected: dict[str, Tensor] | None = None,
) -> tuple[str, str | None]:
    """Return the name in memory of a tensor in a file, and the pattern of its converter, if any.

    See `weight_conversions` for the reason.

    Args:
        name: Name in the file.
        renamings: Renamings of `weight_conversions`.
        converters: Converters of `weight_conversions`.
        prefix: Name of the base model in a model with a head. It is added to the name or removed, as the model needs
            it.
        expected: Tensors of the model, by name; required with `prefix`.
    """
    from transformers.core_model_loading import rename_source_key

    new, pattern = rename_source_key(name, renamings, converters or [], prefix, expected)
    return new, pattern


def in_loading_order(names: Iterable[str]) -> list[str]:
    """Return names of tensors in the order in which `from_pretrained` reads them: sorted by number, 2 before 10.

    A converter stacks tensors in the order in which they are added.
    """
    from transformers.core_model_loading import dot_natural_key

    return sorted(names, key=dot_natural_key)


def collect_(converter: WeightConverter, name: str, key: str, pattern: str, tensor: Tensor) -> None:
    """Add to `converter` a tensor, called `key` in its file, as a part of the tensor `name` in memory.

    The class is public, but only `from_pretrained` is meant to call its methods.
    """
    adding: Any = converter  # upstream annotates a future, and accepts a tensor
    adding.add_tensor(name, key, pattern, tensor)


def convert(converter: WeightConverter, name: str, model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the tensors that `converter` makes from its parts, by name in memory; `name` is the first of them.

    The converter is empty afterwards. See `collect_` for the reason.
    """
    made: dict[str, Any] = converter.convert(name, model=model, config=model.config)
    return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}


# transformers: the Trainer


def keeping_columns(collator: Callable, columns: Sequence[str]) -> Callable[[list], dict[str, Any]]:
    """Return a collator that keeps only `columns` of each sample and then calls `collator`.

    The Trainer uses the same class, so measuring and training see the same inputs.
    """
    from transformers.trainer_utils import RemoveColumnsCollator

    return RemoveColumnsCollator(collator, [*columns])


def average_each_batch_(trainer: Trainer) -> None:
    """Change `trainer` so that it divides the loss by the number of accumulated batches.

    The Trainer assumes that a model whose `forward` has keyword arguments divides the loss itself. No argument
    corrects this.
    """
    trainer.model_accepts_loss_kwargs = False


# accelerate


def forget_original_forward_(model: nn.Module) -> None:
    """Remove from `model` the reference to the `forward` that accelerate wrapped in autocast.

    The public `unwrap_model` of accelerate also removes decorators that transformers itself puts on `forward`.
    """
    vars(model).pop("_original_forward", None)


def lacks_memory(error: Exception) -> bool:
    """Whether the cause of `error` is a device without free memory.

    The public `find_executable_batch_size` uses the same test, but runs the function again.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    return bool(should_reduce_batch_size(error))


# peft


def merging_layer(kind: PeftType) -> Any:
    """Return the class of the layers of an adapter of this type; `None` if PEFT cannot merge the type into weights.

    PEFT has no public list of the types that can be merged.
    """
    from peft import PEFT_TYPE_TO_TUNER_MAPPING

    tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(kind)
    return getattr(tuner, "tuner_layer_cls", None) if hasattr(tuner, "merge_and_unload") else None


def unloads_itself(module: nn.Module) -> bool:
    """Whether `module` removes its adapter itself, as the modules of trained tokens do.

    `merge_and_unload()` looks for the method by name; there is no common class.
    """
    return hasattr(module, "unload_and_optionally_merge_module")


def parameter_prefix(kind: PeftType) -> str:
    """Return the prefix of the parameters of an adapter of this type, such as `lora_`; PEFT's table is not public."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return str(PEFT_TYPE_TO_PREFIX_MAPPING[kind])


def lora_rank(module: Any) -> int | None:
    """Return the rank of the change that a layer of plain LoRA makes; `None` for another module.

    Variants such as DoRA change a weight by a matrix of full rank. An adapter of single parameters has no weight of its own.
    """
    from peft.tuners.lora import LoraLayer, ParamWrapper

    if not isinstance(module, LoraLayer) or isinstance(module, ParamWrapper) or module.lora_variant:
        return None
    (rank,) = module.r.values()
    return int(rank)


class ExpertLayer(NamedTuple):
    """A parameter of fused experts that a LoRA adapts.

    Attributes:
        shape: Its shape, with the number of experts first.
        is_transposed: Whether the model says that it holds its weights by input.
        reads_second: Whether PEFT takes the second dimension as the one that `lora_A` belongs to.
    """

    shape: tuple[int, int, int]
    is_transposed: bool
    reads_second: bool


def expert_layers(adapted: PeftModel) -> dict[str, ExpertLayer]:
    """Return the parameters of several fused experts that a LoRA adapts, by the name of PEFT's module around each.

    PEFT wraps such a parameter in an undocumented layer, which alone knows how it packs the experts.
    """
    from peft.tuners.lora import ParamWrapper

    found = {}
    modules: Iterator[tuple[str, Any]] = adapted.named_modules()
    for name, module in modules:
        if isinstance(module, ParamWrapper) and module.num_experts > 1:
            transposed = bool(getattr(module.get_base_layer(), "is_transposed", False))
            found[name] = ExpertLayer(tuple(module.get_param().shape), transposed, module._did_swap_in_out_features)
    return found


def matching_pattern(patterns: Collection[str], name: str) -> str:
    """Return the pattern that the name of a module matches; `name` itself if none matches.

    `patterns` are keys of `rank_pattern` or `alpha_pattern`. The rule is PEFT's own, and is not documented.
    """
    from peft.utils.other import get_pattern_key

    return str(get_pattern_key(list(patterns), name))


def adapter_weights_in_runtime_names(adapted: PeftModel, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights in the file of an adapter under their names in memory, as `PeftModel.load_adapter` uses them.

    `load_adapter` puts them into the model at once. Weights that fit nowhere can then no longer be found.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    return dict(convert_peft_adapter_state_dict_for_transformers(adapted, adapted.active_peft_config, dict(weights)))


def forget_adapter_(model: nn.Module) -> None:
    """Remove from a base model the configuration that PEFT leaves on it.

    PEFT removes it when it merges or unloads an adapter. After an error it stays, and PEFT warns of several adapters
    when the next one is loaded.
    """
    vars(model).pop("peft_config", None)


# datasets


def file_formats() -> frozenset[str]:
    """Return the names of file formats that `load_dataset` accepts, such as `imagefolder` and `csv`.

    The documentation names each on a page of its own, and there is no public list.
    """
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES

    return frozenset(_PACKAGED_DATASETS_MODULES)


# huggingface_hub


def cache_folder_name(repo_id: str) -> str:
    """Return the name of a model's folder in the cache: `models--org--name`.

    The layout is documented; the function that makes the name is not.
    """
    from huggingface_hub.file_download import repo_folder_name

    return str(repo_folder_name(repo_id=repo_id, repo_type="model"))


def client_factory() -> Callable[[], Any]:
    """Return the function that makes the HTTP sessions of huggingface_hub; the public API can only set it."""
    from huggingface_hub.utils import _http

    return _http._GLOBAL_CLIENT_FACTORY


def replace_client_factory(make: Callable[[], Any]) -> None:
    """Set the function that makes the next HTTP session of huggingface_hub.

    The public `set_client_factory` also closes the session that downloads in other threads are using.
    """
    from huggingface_hub.utils import _http

    _http._GLOBAL_CLIENT_FACTORY = make
