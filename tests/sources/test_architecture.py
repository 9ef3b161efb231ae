"""Settings that change the function of the same weights are refused at any depth; settings without effect are not."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    CLIPConfig,
    CLIPModel,
    ConvNextConfig,
    ConvNextForImageClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    EsmConfig,
    EsmForMaskedLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError, merge_pretrained
from grasp_hf.config.recipe import Recipe
from grasp_hf.runs.plan import plan
from grasp_hf.sources.architecture import architecture_problems
from tests.support.models import NO_TUNING, copied, saved, saved_adapter, tiny_model

SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "pad_token_id": 1,
}
TEXT: dict[str, Any] = {**SMALL, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 3}
ENCODER: dict[str, Any] = {**SMALL, "max_position_embeddings": 64}
VISION = {**{key: SMALL[key] for key in SMALL if "token" not in key and "vocab" not in key}, "image_size": 28}
VISION["patch_size"] = 14
WORDS: dict[str, Any] = {
    "vocab_size": 50,
    "pad_token_id": 1,
    "decoder_start_token_id": 1,
    "d_model": 16,
    "num_heads": 2,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
BUCKETS: dict[str, Any] = {"position_buckets": 8}  # DebertaV2Config does not declare it, but the model reads it
MODELS: dict[str, tuple[type[PreTrainedModel], PretrainedConfig]] = {
    "llama": (LlamaForCausalLM, LlamaConfig(**TEXT)),
    "llama3": (
        LlamaForCausalLM,
        LlamaConfig(**TEXT, rope_parameters={**LLAMA3, "original_max_position_embeddings": 16, "rope_theta": 1e4}),
    ),
    "yarn": (LlamaForCausalLM, LlamaConfig(**TEXT, max_position_embeddings=64, rope_parameters=YARN)),
    "dynamic": (
        LlamaForCausalLM,
        LlamaConfig(
            **TEXT,
            max_position_embeddings=16,
            rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        ),
    ),
    "llama classifier": (LlamaForSequenceClassification, LlamaConfig(**TEXT)),
    "mistral": (MistralForCausalLM, MistralConfig(**TEXT, sliding_window=8)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**TEXT)),
    "sliding qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    ),
    "gemma2": (Gemma2ForCausalLM, Gemma2Config(**TEXT, head_dim=8, sliding_window=8)),
    "gemma3": (
        Gemma3ForConditionalGeneration,
        Gemma3Config(
            text_config={**TEXT, "head_dim": 8, "sliding_window": 8},
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=40,
            boi_token_index=41,
            eoi_token_index=42,
        ),
    ),
    "llava": (
        LlavaForConditionalGeneration,
        LlavaConfig(
            text_config={"model_type": "llama", **TEXT},
            vision_config={"model_type": "clip_vision_model", **VISION},
            image_token_index=40,
        ),
    ),
    "granite": (GraniteForCausalLM, GraniteConfig(**TEXT)),
    "mixtral": (MixtralForCausalLM, MixtralConfig(**TEXT, num_local_experts=4)),
    "gpt2": (GPT2LMHeadModel, GPT2Config(vocab_size=50, n_positions=64, n_embd=16, n_layer=2, n_head=2)),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(**WORDS, d_kv=8, d_ff=32, num_layers=2, relative_attention_num_buckets=8),
    ),
    "switch": (
        SwitchTransformersForConditionalGeneration,
        SwitchTransformersConfig(**WORDS, d_kv=8, d_ff=32, num_layers=2, num_decoder_layers=2, num_experts=2),
    ),
    "whisper": (
        WhisperForConditionalGeneration,
        WhisperConfig(
            vocab_size=50,
            num_mel_bins=4,
            d_model=16,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=8,
            max_target_positions=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            decoder_start_token_id=4,
        ),
    ),
    "bert": (BertForSequenceClassification, BertConfig(**ENCODER)),
    "roberta": (RobertaForSequenceClassification, RobertaConfig(**ENCODER)),
    "albert": (AlbertForSequenceClassification, AlbertConfig(**ENCODER, embedding_size=8)),
    "deberta": (
        DebertaV2ForSequenceClassification,
        DebertaV2Config(**ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], **BUCKETS),
    ),
    "esm": (EsmForMaskedLM, EsmConfig(**ENCODER, mask_token_id=4)),
    "clip": (
        CLIPModel,
        CLIPConfig(text_config={**ENCODER, "eos_token_id": 2}, vision_config=VISION, projection_dim=8),
    ),
    "vit": (ViTForImageClassification, ViTConfig(**VISION)),
    "convnext": (
        ConvNextForImageClassification,
        ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=28),
    ),
    "wav2vec2": (
        Wav2Vec2ForCTC,
        Wav2Vec2Config(
            **SMALL,
            conv_dim=[8, 8],
            conv_stride=[5, 2],
            conv_kernel=[10, 3],
            num_conv_pos_embeddings=4,
            num_conv_pos_embedding_groups=2,
        ),
    ),
}
# Model, path of a setting, another value. Each change is known to change the output for the same weights.
DIFFERENT: list[tuple[str, str, Any]] = [
    ("llama", "rope_parameters.rope_theta", 1234.0),
    ("llama", "rope_parameters", {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}),
    ("llama", "rms_norm_eps", 0.1),
    ("llama", "hidden_act", "relu"),
    ("llama3", "rope_parameters.high_freq_factor", 2.0),
    ("llama3", "rope_parameters.original_max_position_embeddings", 64),
    ("yarn", "rope_parameters.factor", 8.0),
    ("yarn", "rope_parameters.attention_factor", 2.0),
    ("dynamic", "max_position_embeddings", 32),
    ("mistral", "sliding_window", 4),
    ("mistral", "sliding_window", None),
    ("sliding qwen2", "layer_types", ["sliding_attention", "full_attention"]),
    ("sliding qwen2", "sliding_window", 4),
    ("gemma2", "attn_logit_softcapping", 1.0),
    ("gemma2", "final_logit_softcapping", None),
    ("gemma2", "query_pre_attn_scalar", 1),
    ("gemma2", "hidden_activation", "relu"),
    ("gemma2", "layer_types", ["full_attention", "full_attention"]),
    ("gemma3", "text_config.rope_parameters.sliding_attention.rope_theta", 12.0),
    ("gemma3", "text_config.hidden_activation", "relu"),
    ("gemma3", "text_config.sliding_window", 4),
    ("gemma3", "vision_config.hidden_act", "relu"),
    ("gemma3", "vision_config.num_attention_heads", 4),
    ("granite", "logits_scaling", 3.0),
    ("granite", "residual_multiplier", 0.5),
    ("granite", "attention_multiplier", 0.5),
    ("granite", "embedding_multiplier", 0.5),
    ("mixtral", "num_experts_per_tok", 1),
    ("gpt2", "scale_attn_weights", False),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True),
    ("gpt2", "activation_function", "relu"),
    ("t5", "relative_attention_max_distance", 8),
    ("t5", "scale_decoder_outputs", False),
    ("t5", "layer_norm_epsilon", 0.1),
    ("switch", "tie_word_embeddings", False),
    ("bert", "is_decoder", True),
    ("bert", "num_attention_heads", 4),
    ("roberta", "pad_token_id", 0),
    ("albert", "num_hidden_layers", 3),
    ("albert", "inner_group_num", 2),
    ("deberta", "pos_att_type", ["c2p"]),
    ("deberta", "max_relative_positions", 128),
    ("esm", "token_dropout", True),
    ("clip", "text_config.eos_token_id", 3),
    ("clip", "text_config.hidden_act", "relu"),
    ("vit", "layer_norm_eps", 0.1),
    ("convnext", "layer_norm_eps", 0.1),
    ("wav2vec2", "conv_stride", [5, 3]),
    ("wav2vec2", "feat_extract_activation", "relu"),
]
# Each change leaves the output as it is.
HARMLESS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"initializer_range": 0.5, "attention_dropout": 0.3, "use_cache": False, "pretraining_tp": 2}),
    ("llama", {"max_position_embeddings": 64, "pad_token_id": 4, "eos_token_id": [3, 5], "bos_token_id": None}),
    (
        "llama",
        {"unsloth_version": "2025.1", "unsloth_fixed": True, "_name_or_path": "org/other", "torch_dtype": "float16"},
    ),
    ("llama", {"do_sample": True, "temperature": 0.2, "max_length": 7, "task_specific_params": {"a": {"b": 1}}}),
    (
        "llama",
        {"rms_norm_eps": 9.999999974752427e-07, "rope_parameters": {"rope_type": "default", "rope_theta": 10000}},
    ),
    ("llama", {"rope_parameters": None, "rope_scaling": None, "rope_theta": 10000.0}),
    ("llama", {"hidden_act": "swish", "problem_type": "regression", "finetuning_task": "sst2"}),
    ("yarn", {"rope_parameters": {**YARN, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, "type": "yarn"}}),
    ("yarn", {"max_position_embeddings": 128}),
    ("llama classifier", {"eos_token_id": 4, "problem_type": "single_label_classification"}),
    ("qwen2", {"sliding_window": 9, "max_window_layers": 1}),
    ("gemma3", {"text_config.attention_dropout": 0.5, "vision_config.attention_dropout": 0.5, "boi_token_index": 43}),
    ("llava", {"text_config.eos_token_id": 4, "image_token_index": 39}),
    ("mixtral", {"output_router_logits": True, "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.1}),
    ("gpt2", {"resid_pdrop": 0.5, "summary_first_dropout": 0.5, "activation_function": "gelu_pytorch_tanh"}),
    ("whisper", {"suppress_tokens": [1, 2], "forced_decoder_ids": [[1, 2]], "apply_spec_augment": True}),
    ("bert", {"hidden_dropout_prob": 0.5, "classifier_dropout": 0.2, "gradient_checkpointing": True}),
    ("bert", {"position_embedding_type": "absolute", "id2label": {0: "x", 1: "y"}, "pooler_fc_size": 768}),
    ("convnext", {"image_size": 56, "drop_path_rate": 0.5}),
    ("wav2vec2", {"mask_time_prob": 0.5, "ctc_loss_reduction": "mean", "ctc_zero_infinity": True, "layerdrop": 0.4}),
]


def changed(config: PretrainedConfig, changes: dict[str, Any]) -> PretrainedConfig:
    """Return a config as it is read from a file with other values, named by their paths."""
    values = copy.deepcopy(config.to_dict())
    for path, value in changes.items():
        *outer, last = path.split(".")
        inside: Any = values
        for name in outer:
            inside = inside[name]
        inside[last] = value
    made = type(config).from_dict(values)
    assert isinstance(made, PretrainedConfig)
    return made


def output(model: PreTrainedModel) -> Tensor:
    """Return all logits for a batch of long inputs with padding, pictures or sound."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 39, (2, 24), generator=generator)
    tokens[0, 20:], tokens[:, 10], tokens[:, 15] = 1, 3, 49
    pixels, kind = torch.randn(2, 3, 28, 28, generator=generator), model.config.model_type
    inputs: dict[str, Tensor]
    if kind in ("vit", "convnext"):
        inputs = {"pixel_values": pixels}
    elif kind == "wav2vec2":
        inputs = {"input_values": torch.randn(2, 400, generator=generator)}
    elif kind in ("gemma3", "llava"):
        tokens[:, 2:6] = 40
        inputs = {"input_ids": tokens, "pixel_values": pixels}
    elif kind == "clip":
        inputs = {"input_ids": tokens, "pixel_values": pixels}
    elif kind == "whisper":
        inputs = {"input_features": torch.randn(2, 4, 16, generator=generator), "decoder_input_ids": tokens}
    else:
        inputs = {"input_ids": tokens}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = tokens[:, :20]
    with torch.no_grad():
        outputs = model.eval()(**inputs)
    return torch.as_tensor(outputs["logits_per_image"] if kind == "clip" else outputs["logits"])


def built(kind: str, config: PretrainedConfig) -> PreTrainedModel:
    """Return a model with the same large random weights for every config."""
    torch.manual_seed(0)
    model: Any = MODELS[kind][0](copy.deepcopy(config))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize(("kind", "path", "value"), DIFFERENT)
def test_a_setting_that_changes_the_output_is_refused(kind: str, path: str, value: Any) -> None:
    config = MODELS[kind][1]
    target, other = built(kind, config), changed(config, {path: value})
    assert not architecture_problems(changed(config, {}), target, "org/x")
    problems = architecture_problems(other, target, "org/x")
    assert any(problem.startswith(f"different {path}") for problem in problems), problems
    assert "sources: [{id: org/x, accept: [" in problems[-1]
    before, after = output(target), output(built(kind, other))
    assert before.shape != after.shape or not torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    accepted = [problem.split()[1].rstrip(":") for problem in problems]
    assert not architecture_problems(other, target, "org/x", accepted)
    assert not architecture_problems(other, target, "org/x", [name.partition(".")[0] for name in accepted])


@pytest.mark.parametrize(("kind", "changes"), HARMLESS)
def test_settings_without_effect_are_no_problem(kind: str, changes: dict[str, Any]) -> None:
    config = MODELS[kind][1]
    target, other = built(kind, config), changed(config, changes)
    assert architecture_problems(other, target, "org/x") == []
    if "image_token_index" not in changes:
        assert torch.allclose(output(target), output(built(kind, other)), rtol=1e-5, atol=1e-5)


def variants(value: Any) -> list[Any]:
    """Return other values of the same kind, most of which a config accepts."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value // 2]
    if isinstance(value, float):
        return [value * 1.7 + 0.3]
    if isinstance(value, str):
        return ["relu", "group", "mean"]
    if isinstance(value, list):
        return [value[::-1], ["full_attention"] * len(value)]
    if isinstance(value, dict):
        return [value | {key: other} for key, inside in value.items() for other in variants(inside)[:1]]
    return [True, 4, 0.5]


def fields_of(config: PretrainedConfig, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield path and value of each field at any depth, without those that only name something."""
    for name, value in config.to_dict().items():
        inside = getattr(config, name, None)
        if isinstance(inside, PretrainedConfig):
            yield from fields_of(inside, f"{path}{name}.")
        elif name not in ("architectures", "id2label", "label2id", "model_type", "transformers_version", "vocab_size"):
            yield path + name, value


def output_of(kind: str, config: PretrainedConfig, weights: dict[str, Tensor]) -> Tensor | None:
    """Return the output for these weights; `None` if no model of this config takes them."""
    try:
        model: Any = MODELS[kind][0](copy.deepcopy(config))
        if {name: value.shape for name, value in model.state_dict().items()} != {
            name: value.shape for name, value in weights.items()
        }:
            return None
        model.load_state_dict(weights)
        return output(model)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return None


@pytest.mark.parametrize("kind", MODELS)
def test_no_field_changes_the_output_without_being_refused(kind: str) -> None:
    """Each field gets other values, one at a time; the output of the same weights tells whether it matters."""
    config = MODELS[kind][1]
    target = built(kind, config)
    weights, before, refused = target.state_dict(), output(target), 0
    # The weights show a tie. A causal classifier reads the last token before the padding of the tokenizer at hand.
    skipped = {"tie_word_embeddings"} | ({"pad_token_id"} if kind == "llama classifier" else set())
    for path, value in fields_of(config):
        if path.rpartition(".")[2] in skipped:
            continue
        for other in variants(value):
            try:
                made = changed(config, {path: other})
            except (StrictDataclassError, AttributeError, LookupError, TypeError, ValueError, ArithmeticError):
                continue
            after = output_of(kind, made, weights)
            if after is None or (before.shape == after.shape and torch.allclose(before, after, 1e-3, 1e-3, True)):
                continue
            assert architecture_problems(made, target, "org/x"), f"{path}={other!r}"
            refused += 1
    assert refused > 1


def test_settings_that_a_class_sets_itself_are_no_problem() -> None:
    """`T5EncoderModel` changes its own copy of the configuration; the files of a T5 hold the original."""
    config = MODELS["t5"][1]
    target = T5EncoderModel(copy.deepcopy(config))  # type: ignore[arg-type]
    target.config.is_encoder_decoder = False
    assert not architecture_problems(changed(config, {"is_encoder_decoder": False}), target, "org/x")


def test_every_difference_is_listed_with_a_way_to_accept_it_in_a_recipe(tmp_path: Path) -> None:
    base, source = llama_pair(tmp_path, rope_theta=1234.0, rms_norm_eps=1e-3)
    with pytest.raises(IncompatibleSourceError) as caught:
        mean(base, source)
    first, last = caught.value.problems
    assert first == "different rms_norm_eps: got 0.001, expected 1e-06"
    assert last.startswith("different rope_parameters.rope_theta: got 1234.0, expected 10000.0; ")
    advice = last.partition("accept this for the source: ")[2]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"base_model: {base}\n{advice}\nmethod: average\norder: given\nfinal_epochs: 0\n")
    read = Recipe.from_yaml(recipe)
    assert read.sources == [source] and read.config.options_of(source).accept == [
        "rms_norm_eps",
        "rope_parameters.rope_theta",
    ]
    merger = GraspMerger.from_pretrained(base, config=read.config)
    step = merger.merge(read.sources).steps[0]
    assert (
        step.moved
        and "it is accepted that it differs: ['rms_norm_eps', 'rope_parameters.rope_theta']" in step.notes[-1]
    )
    accepted = {"id": source, "accept": ["rms_norm_eps", "rope_parameters"]}
    assert merge_pretrained(base, [accepted], config=GraspConfig(method="average", **NO_TUNING)) is not None


def llama_pair(folder: Path, **changes: Any) -> tuple[str, str]:
    """Save a tiny Llama, and a copy of it with other settings in its config.json."""
    base = saved(tiny_llama(), folder / "base")
    path = copied(base, folder / "source") / "config.json"
    values = json.loads(path.read_text())
    theta = changes.pop("rope_theta", None)
    values |= {**changes, **({"rope_parameters": {"rope_type": "default", "rope_theta": theta}} if theta else {})}
    path.write_text(json.dumps(values))
    return base, str(folder / "source")


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TEXT, **changes))


def mean(base: str, *sources: Any, **config: Any) -> GraspMerger:
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **NO_TUNING, **config))
    merger.merge(sources)
    return merger


def test_text_of_a_stranger_is_shown_short_and_without_control_characters(tmp_path: Path) -> None:
    base, source = llama_pair(tmp_path, hidden_act="silu")
    target = tiny_llama()
    config = changed(target.config, {"rope_parameters.\x1b[2Jodd": "\x1b[31m" + "x" * 5000})
    (problem,) = architecture_problems(config, target, "org/x")
    assert "\x1b" not in problem and len(problem) < 400 and "\\x1b[2Jodd" in problem
    assert mean(base, source).report.steps


def test_a_setting_that_only_code_of_another_model_reads_has_no_effect() -> None:
    target = tiny_model("bert")
    for name in ("rope_theta", "query_pre_attn_scalar", "attn_logit_softcapping", "summary_type"):
        assert not architecture_problems(changed(target.config, {name: 8}), target, "org/x")
    assert architecture_problems(changed(target.config, {"layer_norm_eps": 8.0}), target, "org/x")


def test_the_settings_that_an_adapter_was_trained_with_are_compared(tmp_path: Path) -> None:
    """Some tools save the config.json of the base beside an adapter, also of a base that was loaded in 4 bits."""
    base = saved(tiny_llama(), tmp_path / "base")
    adapter = Path(saved_adapter(tiny_llama(), base, tmp_path / "adapter", target_modules=["q_proj"]))
    values = json.loads((tmp_path / "base/config.json").read_text())
    quantized = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}, "use_cache": False}
    for harmless in (json.dumps(values | quantized), json.dumps(values | {"model_type": "unheard-of"})):
        (adapter / "config.json").write_text(harmless)
        assert mean(base, str(adapter)).report.steps[0].moved
    scaled = values | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}
    (adapter / "config.json").write_text(json.dumps(scaled))
    with pytest.raises(IncompatibleSourceError, match="different rope_parameters.factor: got 4.0, expected None"):
        mean(base, str(adapter))
    recipe = {"base_model": base, "sources": [str(adapter)], "method": "average", **NO_TUNING}
    (_, row) = plan(Recipe.from_dict(recipe))
    assert row.problems[0].startswith("different rope_parameters.factor: got 4.0")
    assert mean(base, {"id": str(adapter), "accept": ["rope_parameters"]}).report.steps[0].moved
