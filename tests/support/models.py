"""Tiny models of real architectures, and data for them."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from grasp_hf import GraspConfig

LABELS = ["bird", "cat", "dog"]
KINDS = ("resnet", "vit", "bert")


def tiny_model(kind: str, seed: int = 0, labels: Sequence[str] = LABELS) -> PreTrainedModel:
    """Return a randomly initialised model; `resnet` has BatchNorm layers, `vit` and `bert` have dropout."""
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
    if kind == "swin":
        swin: dict[str, Any] = {
            "embed_dim": 8,
            "depths": [1, 1],
            "num_heads": [2, 2],
            "window_size": 2,
            "patch_size": 2,
        }
        return SwinForImageClassification(SwinConfig(image_size=8, **swin, **names))
    if kind == "dinov2":
        sizes = {key: value for key, value in size.items() if key != "intermediate_size"}
        return Dinov2ForImageClassification(Dinov2Config(image_size=8, patch_size=4, mlp_ratio=2, **sizes, **names))
    if kind == "gpt_neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=50, max_position_embeddings=16, **size))
    if kind == "mixtral":  # transformers fuses its experts when it loads them
        return MixtralForCausalLM(
            MixtralConfig(
                vocab_size=50, num_local_experts=2, num_key_value_heads=2, max_position_embeddings=16, **size
            )
        )
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def perturbed(model: PreTrainedModel, seed: int, scale: float = 0.05) -> PreTrainedModel:
    """Add noise to every weight and BatchNorm statistic of `model`, as a substitute for fine-tuning."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(scale * torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype))
    return model


def tiny_data(kind: str, samples: int, seed: int = 0) -> Dataset:
    """Return a data set of tensors with labels that a model can learn."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % len(LABELS)
    if kind in ("resnet", "vit", "swin", "dinov2"):
        size = 16 if kind == "resnet" else 8
        images = torch.randn(samples, 3, size, size, generator=generator) + labels[:, None, None, None] - 1.0
        columns = {"pixel_values": images.numpy(), "labels": labels.numpy()}
    else:
        tokens = torch.randint(0, 50, (samples, 8), generator=generator)
        tokens[:, 0] = labels
        columns = {
            "input_ids": tokens.numpy(),
            "labels": (tokens if kind in ("gpt2", "mixtral", "gpt_neox") else labels).numpy(),
        }
    return Dataset.from_dict(columns).with_format("torch")


WORDS = ("red", "green", "blue", "small", "large")
NO_TUNING: dict[str, Any] = {"order": "given", "initial_epochs": 0, "finetune_epochs": 0, "final_epochs": 0}
MEASURE_ONLY = GraspConfig(method="blend", num_batches=1, batch_size=8, **NO_TUNING)


def saved(model: PreTrainedModel, folder: Path) -> str:
    """Write `model` with a suitable image processor or tokenizer, and return the folder's name."""
    model.save_pretrained(folder)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 16)
        processor = ViTImageProcessorPil(
            size={"height": size, "width": size}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        processor.save_pretrained(folder)
    else:
        tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words that knows `WORDS`."""
    special = ("[PAD]", "[UNK]", "[EOS]")
    vocabulary = {word: index for index, word in enumerate((*special, *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]", model_max_length=16
    )


def saved_adapter(model: PreTrainedModel, base: str, folder: Path, seed: int = 1, **config: Any) -> str:
    """Write a LoRA adapter of `model` with random weights that names `base`, and return the folder's name."""
    torch.manual_seed(seed)
    adapter = get_peft_model(model, LoraConfig(**{"r": 2, "init_lora_weights": False, **config}))
    adapter.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for name, parameter in adapter.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn(parameter.shape))
    adapter.save_pretrained(str(folder))
    return str(folder)


def write_images(folder: Path, splits: dict[str, int], labels: Sequence[str] = LABELS, size: int = 8) -> Path:
    """Write PNG files in one folder per split and label; each label has its own brightness.

    `splits` holds the number of files per label by name of split.
    """
    generator = np.random.default_rng(0)
    for split, count in splits.items():
        for position, label in enumerate(labels):
            (folder / split / label).mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(60, size=(size, size, 3)) + 90 * position
                Image.fromarray(pixels.astype(np.uint8)).save(folder / split / label / f"{index}.png")
    return folder


def copied(folder: str, to: Path) -> Path:
    """Return a copy of a folder, in which a test can damage a file."""
    return Path(shutil.copytree(folder, to))
