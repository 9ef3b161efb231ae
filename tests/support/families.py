"""Tiny models of many architecture families, and inputs for them."""

from typing import Any

import torch
import transformers
from torch import Tensor

WIDTH: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT: dict[str, Any] = {**WIDTH, "vocab_size": 60, "max_position_embeddings": 64}
GROUPED: dict[str, Any] = {**TEXT, "num_key_value_heads": 1, "head_dim": 8}
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
IMAGE: dict[str, Any] = {**WIDTH, "image_size": 16, "patch_size": 4}
BOTH: dict[str, Any] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
SPEECH: dict[str, Any] = {
    **WIDTH,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}

# Name of the family -> name of its classes before "Config", name of the class, arguments of the configuration.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ALBERT": ("Albert", "AlbertForSequenceClassification", {**TEXT, "embedding_size": 8}),
    "BART": ("Bart", "BartForConditionalGeneration", {**BOTH, **SPECIAL, "vocab_size": 60}),
    "BERT": ("Bert", "BertForSequenceClassification", TEXT),
    "BERT, masked": ("Bert", "BertForMaskedLM", TEXT),
    "BLOOM": ("Bloom", "BloomForCausalLM", {"vocab_size": 60, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "ConvNeXT": (
        "ConvNext",
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    ),
    "DeBERTa": ("DebertaV2", "DebertaV2ForSequenceClassification", TEXT),
    "DeiT": ("DeiT", "DeiTForImageClassification", IMAGE),
    "DINOv2": ("Dinov2", "Dinov2ForImageClassification", {**IMAGE, "mlp_ratio": 2}),
    "DistilBERT": (
        "DistilBert",
        "DistilBertForSequenceClassification",
        {"vocab_size": 60, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_position_embeddings": 64},
    ),
    "ELECTRA": ("Electra", "ElectraForSequenceClassification", {**TEXT, "embedding_size": 8}),
    "Falcon": ("Falcon", "FalconForCausalLM", {**TEXT, "new_decoder_architecture": False}),
    "Gemma 2": ("Gemma2", "Gemma2ForCausalLM", GROUPED),
    "Gemma 3": ("Gemma3Text", "Gemma3ForCausalLM", GROUPED),
    "GPT-2": (
        "GPT2",
        "GPT2LMHeadModel",
        {"vocab_size": 60, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "GPT-NeoX": ("GPTNeoX", "GPTNeoXForCausalLM", TEXT),
    "GPT-OSS": (
        "GptOss",
        "GptOssForCausalLM",
        {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": ["full_attention"] * 2},
    ),
    "Granite": ("Granite", "GraniteForCausalLM", GROUPED),
    "LLaMA": ("Llama", "LlamaForCausalLM", GROUPED),
    "Mamba": (
        "Mamba",
        "MambaForCausalLM",
        {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4},
    ),
    "Mistral": ("Mistral", "MistralForCausalLM", GROUPED),
    "Mixtral": ("Mixtral", "MixtralForCausalLM", {**GROUPED, "num_local_experts": 4}),
    "MobileNetV2": ("MobileNetV2", "MobileNetV2ForImageClassification", {"image_size": 32, "depth_multiplier": 0.25}),
    "ModernBERT": ("ModernBert", "ModernBertForSequenceClassification", {**TEXT, **SPECIAL}),
    "OLMo 2": ("Olmo2", "Olmo2ForCausalLM", {**TEXT, "num_key_value_heads": 2}),
    "OPT": (
        "OPT",
        "OPTForCausalLM",
        {**TEXT, "ffn_dim": 32, "word_embed_proj_dim": 16},
    ),
    "Phi-3": ("Phi3", "Phi3ForCausalLM", {**TEXT, **SPECIAL, "num_key_value_heads": 2}),
    "Qwen2": ("Qwen2", "Qwen2ForCausalLM", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3", "Qwen3ForCausalLM", GROUPED),
    "Qwen3, experts": (
        "Qwen3Moe",
        "Qwen3MoeForCausalLM",
        {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "ResNet": (
        "ResNet",
        "ResNetForImageClassification",
        {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"},
    ),
    "RoBERTa": ("Roberta", "RobertaForSequenceClassification", {**TEXT, **SPECIAL}),
    "SmolLM 3": ("SmolLM3", "SmolLM3ForCausalLM", {**GROUPED, **SPECIAL}),
    "Swin": (
        "Swin",
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2},
    ),
    "T5": (
        "T5",
        "T5ForConditionalGeneration",
        {
            "vocab_size": 60,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
    "ViT": ("ViT", "ViTForImageClassification", IMAGE),
    "Wav2Vec 2": ("Wav2Vec2", "Wav2Vec2ForSequenceClassification", {**SPEECH, "classifier_proj_size": 8}),
    "Whisper": (
        "Whisper",
        "WhisperForConditionalGeneration",
        {
            **BOTH,
            **SPECIAL,
            "vocab_size": 60,
            "num_mel_bins": 8,
            "max_source_positions": 20,
            "max_target_positions": 30,
            "suppress_tokens": [],
        },
    ),
    "XLM-RoBERTa": ("XLMRoberta", "XLMRobertaForSequenceClassification", {**TEXT, **SPECIAL}),
}


def family_model(name: str, seed: int = 0) -> Any:
    """Return a tiny model with random weights."""
    prefix, cls, arguments = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}Config")(**arguments)
    model = getattr(transformers, cls)(config)
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and key.endswith(("weight", "bias")):
                tensor.add_(0.1 * torch.randn(tensor.shape))
    return model.eval()


def family_inputs(model: Any) -> dict[str, Tensor]:
    """Return inputs for a tiny model."""
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = max(getattr(model.config, "image_size", 16), 16)
        return {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    inputs = {"input_ids": torch.randint(3, 60, (2, 12), generator=generator)}
    if model.main_input_name == "input_features":
        inputs = {"input_features": torch.randn(2, 8, 40, generator=generator)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.randint(3, 60, (2, 6), generator=generator)
    return inputs


@torch.no_grad()
def family_logits(model: Any) -> Tensor:
    """Return the logits of a model in float32 on fixed inputs; of a speech model, too."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    found: Tensor = model.eval().float()(**family_inputs(base)).logits
    return found
