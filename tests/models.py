"""Tiny real models and data for the tests."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

LABELS = ["bird", "cat", "dog"]
KINDS = ("resnet", "vit", "bert")


def tiny_model(kind: str, seed: int = 0, labels: Sequence[str] = LABELS) -> PreTrainedModel:
    """Return a randomly initialised model: convolutions with BatchNorm, a ViT or a BERT (both with dropout), a GPT-2."""
    torch.manual_seed(seed)
    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: index for index, name in enumerate(labels)},
    }
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    if kind == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", **names)
        return ResNetForImageClassification(config)
    if kind == "vit":
        return ViTForImageClassification(
            ViTConfig(image_size=8, patch_size=4, hidden_dropout_prob=0.1, **size, **names)
        )
    if kind == "bert":
        return BertForSequenceClassification(BertConfig(vocab_size=50, max_position_embeddings=16, **size, **names))
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """Add noise to every weight of `model` and other statistics to its BatchNorm layers: a stand-in for a fine-tune."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(scale * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def tiny_data(kind: str, samples: int, seed: int = 0) -> Dataset:
    """Return labelled samples whose label can be learned, as a data set of tensors."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % len(LABELS)
    if kind in ("resnet", "vit"):
        size = 16 if kind == "resnet" else 8
        images = torch.randn(samples, 3, size, size, generator=generator) + labels[:, None, None, None] - 1.0
        columns = {"pixel_values": images.numpy(), "labels": labels.numpy()}
    else:
        tokens = torch.randint(0, 50, (samples, 8), generator=generator)
        tokens[:, 0] = labels
        columns = {"input_ids": tokens.numpy(), "labels": (tokens if kind == "gpt2" else labels).numpy()}
    return Dataset.from_dict(columns).with_format("torch")
