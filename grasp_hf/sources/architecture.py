"""Whether two configurations describe the same function of the same weights."""

from __future__ import annotations

import inspect
import math
import re
import reprlib
import sys
from collections.abc import Collection, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..config.sources import recipe_entry

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Settings without an effect on the outputs of a model in eval mode, by name, at any depth of a configuration.
IRRELEVANT = re.compile(
    "|".join(
        (
            r"_?name_or_path|architectures|auto_map|transformers_version|(tokenizer|processor)_class",
            r"finetuning_task|task_specific_params|id2label|label2id|num_labels|problem_type",
            # Inputs: tokens are matched by their strings, and the target's tokenizer goes with the merge.
            r"vocab_size|\w*(token_id|token_index|token_ids)|(bos|eos|pad|unk|mask|sep|cls)_(index|id)",
            # What else is returned, and how the same numbers are computed and stored.
            r"output_(attentions|hidden_states|past|router_logits|scores)|return_dict\w*|use_cache",
            r"tie_last_hidden_states|(torch_)?dtype|_?(attn|experts)_implementation\w*|chunk_size_(feed_forward|lm_head)",
            r"pretraining_tp|quantization_config|use_mamba_kernels|use_mambapy|disable_custom_kernels",
            # Training. ESM scales its embeddings by `token_dropout`, and SpeechT5 drops units in eval mode too.
            r"(?!token_dropout$|speech_decoder_prenet_dropout$)"
            r"\w*(dropout|pdrop|layer_?drop|drop_?path|drop_rate|drop_connect)\w*",
            r"\w*init(ializer)?_(std|range|factor|values?|xavier_std|cutoff_factor|bias_prior_prob|variance_scale|scheme)",
            r"(\w*_)?(loss|cost)(_\w+)?|(router|input)_jitter_noise|label_smoothing\w*|ctc_zero_infinity",
            r"mask_(time|feature)_(prob|length|min_masks)|apply_spec_augment|gradient_checkpointing",
            # Generation.
            r"(begin_)?suppress_tokens|forced_\w+|num_beams|early_stopping|length_penalty|(encoder_)?no_repeat_ngram_size",
        )
    )
)
# These only choose the `layer_types`, which are compared themselves.
CHOOSES_LAYER_TYPES = re.compile("max_window_layers|use_sliding_window|_?sliding_window_pattern")
# Exceptions to `IRRELEVANT`: a setting, and what the code of the models contains in which it matters.
MATTERS = {
    # RoBERTa and kin count positions from it.
    "pad_token_id": re.compile(r"padding_idx \+|pad_token_id \+"),
    # ESM scales its embeddings by the share of masked tokens.
    "mask_token_id": re.compile(r"\.token_dropout\b"),
    # CLIP finds the last token of a text in another way if it is 2.
    "eos_token_id": re.compile(r"if self\.eos_token_id == 2\b"),
    # Switch Transformers and kin scale the output of the decoder.
    "tie_word_embeddings": re.compile(r"if self\.config\.tie_word_embeddings:\s+(#.*\s+)*\w+ = "),
}
# Rotary positions: what missing parameters mean, and the types that depend on the longest input.
ROPE_DEFAULTS = {"partial_rotary_factor": 1.0, "beta_fast": 32, "beta_slow": 1, "truncate": True}
SCALED_BY_LENGTH = ("dynamic", "longrope")
SAME_ACTIVATIONS = (
    {"gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu_accurate"},
    {"gelu", "gelu_python"},
    {"silu", "swish"},
)
# Modules of transformers that load, save, quantize, distribute and generate; their code names settings of all models.
NOT_THE_MODEL = re.compile(
    r"transformers\.((generation|quantizers|distributed|utils|tokenization|conversion|core_model|dynamic_module)\w*"
    r"|(configuration|modeling|modeling_flash_attention)_utils|integrations\.(peft|accelerate|deepspeed|hub_kernels))\b"
)


def architecture_problems(
    config: PretrainedConfig, target: PreTrainedModel, reference: str, accepted: Collection[str] = ()
) -> list[str]:
    """List the settings in a source's config that make another function of the same weights than those of `target`.

    All settings are compared at any depth, as the classes of both configs resolve them, but those without an effect on
    the outputs in eval mode, and those that no code of the model reads.

    Args:
        config: The source's configuration.
        target: The model that the source will be merged into.
        reference: The source, for the advice in the last problem.
        accepted: Paths of settings whose difference the user accepts, such as `text_config.rope_parameters`.
    """
    if config.model_type != target.config.model_type:
        return [f"different architecture: got {config.model_type}, expected {target.config.model_type}"]
    found = _relevant_differences(config, target)
    if found and all(isinstance(value, bool) for values in found.values() for value in values):
        # Some classes set fields such as `is_decoder` in their configuration.
        with torch.device("meta"):
            found = _relevant_differences(type(target)(deepcopy(config)).config, target)
    refused = {
        _printable(path): values
        for path, values in found.items()
        if not any(f"{path}.".startswith(f"{name}.") for name in accepted)
    }
    problems = [
        f"different {path}: got {show(got)}, expected {show(expected)}" for path, (got, expected) in refused.items()
    ]
    if problems:
        advice = recipe_entry(reference, accept=[*refused])
        problems[-1] += f"; if the weights are to be merged all the same, accept this for the source: {advice}"
    return problems


def _relevant_differences(config: PretrainedConfig, target: PreTrainedModel) -> dict[str, tuple[Any, Any]]:
    """Return the values of the source and of the target by the path of each setting that matters and differs."""
    found = [*_differences(config.to_dict(), target.config.to_dict())]
    code = code_of(target) if found else ""
    found = [difference for difference in found if _matters(difference, code)]
    if not any(hasattr(module, "eos_token_id") for module in target.modules()):  # the vision model of CLIP has none
        found = [difference for difference in found if difference.field != "eos_token_id"]
    return {difference.path: difference.values for difference in found}


@dataclass(frozen=True)
class _Difference:
    """A setting that differs.

    Attributes:
        path: Names from the outermost configuration to the value, with dots between them.
        field: Field of a configuration that holds the value; the last name of the path unless the field is a dictionary.
        values: The source's value and the target's; `None` if it is missing.
    """

    path: str
    field: str
    values: tuple[Any, Any]


def _differences(
    got: Mapping[str, Any], expected: Mapping[str, Any], path: str = "", field: str | None = None
) -> Iterator[_Difference]:
    """Yield the settings that differ and may matter; `field` is the field that holds a plain dictionary."""
    for key in sorted({*got, *expected}, key=str):
        known = IRRELEVANT.fullmatch(str(key)) and key not in MATTERS
        if known or _is_derived(str(key), got, expected):
            continue
        name = f"{path}{key}"
        ours, theirs = got.get(key), expected.get(key)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            nested = "model_type" in ours and "model_type" in theirs
            inside = None if nested else field or str(key)
            yield from _differences(_with_rope_defaults(ours), _with_rope_defaults(theirs), f"{name}.", inside)
        elif not values_equal(ours, theirs) and not _same_activation(ours, theirs):
            yield _Difference(name, field or str(key), (ours, theirs))


def _is_derived(key: str, *configs: Mapping[str, Any]) -> bool:
    """Whether the effect of a setting shows in other settings, which are compared."""
    if CHOOSES_LAYER_TYPES.fullmatch(key):
        return all(config.get("layer_types") for config in configs)
    return key == "max_position_embeddings" and not any(map(_depends_on_length, configs))


def _depends_on_length(config: Mapping[str, Any]) -> bool:
    """Whether the number of positions may change the function: not with rotary positions of most types."""
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return True
    parts = [part for part in rope.values() if isinstance(part, Mapping)] or [rope]
    return any(
        part.get("rope_type") in SCALED_BY_LENGTH or (part.get("rope_type") == "yarn" and not part.get("factor"))
        for part in parts
    )


def _with_rope_defaults(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return parameters of rotary positions with their defaults; other settings as they are."""
    if "rope_type" not in settings:
        return settings
    given = {key: value for key, value in settings.items() if value is not None and key != "type"}
    return ROPE_DEFAULTS | given


def values_equal(got: Any, expected: Any) -> bool:
    """Whether two values of a configuration are equal; numbers may differ by rounding."""
    if isinstance(got, list) and isinstance(expected, list):
        return len(got) == len(expected) and all(map(values_equal, got, expected))
    if isinstance(got, int | float) and isinstance(expected, int | float):
        return got == expected or math.isclose(got, expected, rel_tol=1e-6)
    return bool(got == expected)


def _same_activation(got: Any, expected: Any) -> bool:
    return isinstance(got, str) and any(got in names and expected in names for names in SAME_ACTIVATIONS)


def _matters(difference: _Difference, code: str | None) -> bool:
    """Whether a difference can change the function of a model with this code; without the code, it is assumed to."""
    field, name = difference.field, difference.path.rpartition(".")[2]
    if name == "model_type":
        return True
    if name in MATTERS:
        return code is None or bool(MATTERS[name].search(code))
    return code is None or bool(re.search(rf"\.{re.escape(field)}\b|[\"']{re.escape(field)}[\"']", code))


def code_of(model: PreTrainedModel) -> str | None:
    """Return the Python code of the modules and configurations of `model`; `None` if some of it cannot be read.

    A setting that the code does not name has no effect. The code includes the modules of the same package that its
    modules import from, but not those that load, save and generate.
    """
    configs = [getattr(module, "config", None) for module in model.modules()]
    shared = {*transformers.PreTrainedModel.__mro__, *transformers.PreTrainedConfig.__mro__}
    classes = {cls for part in [*model.modules(), *configs] for cls in type(part).__mro__} - shared
    packages = {"transformers", *(type(part).__module__.partition(".")[0] for part in (model, model.config))}

    def describe_model(names: Collection[Any]) -> set[str]:
        own = {name for name in names if isinstance(name, str) and name.partition(".")[0] in packages}
        return {name for name in own if not NOT_THE_MODEL.match(name)}

    names = describe_model({cls.__module__ for cls in classes})
    imported = {getattr(value, "__module__", None) for name in names for value in vars(sys.modules[name]).values()}
    code = [_code_of_module(name) for name in sorted(names | describe_model(imported))]
    return None if None in code else "\n".join(filter(None, code))


@cache
def _code_of_module(name: str) -> str | None:
    try:
        return inspect.getsource(sys.modules[name])
    except (OSError, TypeError, KeyError):
        return None


def _printable(text: str) -> str:
    return text if text.isprintable() else ascii(text)[1:-1]


def show(value: Any) -> str:
    """Return a value of a stranger's config as short text without control characters; a word without quotes."""
    if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,80}", value, re.ASCII):
        return value
    shortener = reprlib.Repr()
    shortener.maxlist = shortener.maxdict = 8
    shortener.maxstring = shortener.maxother = 80
    return shortener.repr(value)
