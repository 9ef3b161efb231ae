"""Pictures reach the model as a pipeline of the merged model would show them."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from datasets import Image as Feature
from PIL import Image
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessorPil, pipeline
from transformers.image_utils import load_image

from grasp_hf import GraspConfig, Recipe
from grasp_hf.data.pictures import load_picture
from grasp_hf.data.tasks import prepare_images
from grasp_hf.errors import DataError
from grasp_hf.runs.prepare import prepare
from tests.support.models import LABELS, NO_TUNING, saved, tiny_model, write_images

NOISE = np.random.default_rng(0).integers(256, size=(16, 8, 4)).astype(np.uint8)
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB")
ENDINGS = {"CMYK": "jpg", "YCbCr": "tiff", "LAB": "tiff", "PA": "tiff"}


def picture_of(mode: str, folder: Path, orientation: int | None = None) -> str:
    """Write a picture of noise with the given mode and EXIF orientation, and return its path."""
    image = Image.fromarray(NOISE, "RGBA")
    if mode in ("CMYK", "YCbCr", "LAB"):
        image = Image.frombytes(mode, (8, 16), NOISE[..., : len(Image.new(mode, (1, 1)).getbands())].tobytes())
    elif mode == "PA":
        image = image.convert("RGB").convert("P").convert("PA")
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    path = folder / f"{mode}-{orientation}.{ENDINGS.get(mode, 'png')}"
    image.save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("orientation", [None, 6])
def test_a_picture_is_the_one_that_transformers_loads(mode: str, orientation: int | None, tmp_path: Path) -> None:
    path = picture_of(mode, tmp_path, orientation)
    expected = load_image(path)
    assert expected.size == ((16, 8) if orientation else (8, 16))
    for value in ({"path": path, "bytes": None}, {"path": None, "bytes": Path(path).read_bytes()}, Image.open(path)):
        assert load_picture(value).mode == "RGB"
        assert np.array_equal(np.asarray(load_picture(value)), np.asarray(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_of_a_phone_is_upright(orientation: int, tmp_path: Path) -> None:
    value = {"path": picture_of("RGB", tmp_path, orientation), "bytes": None}
    assert np.array_equal(np.asarray(load_picture(value)), np.asarray(Feature().decode_example(value)))


def test_the_merged_model_sees_in_a_pipeline_what_it_was_trained_on(tmp_path: Path) -> None:
    """The pipeline on each file gives the scores of the prepared sample."""
    model = tiny_model("vit").eval()
    folder = saved(model, tmp_path / "model")
    paths = [picture_of(mode, tmp_path, 6) for mode in MODES]
    splits = DatasetDict(train=Dataset.from_dict({"image": paths}).cast_column("image", Feature()))
    samples, collator = prepare_images(splits, "image", AutoImageProcessor.from_pretrained(folder))
    with torch.no_grad():
        expected = model(**collator([samples["train"][i] for i in range(len(paths))])).logits.softmax(-1)
    for row, scores in zip(expected, pipeline("image-classification", folder)(paths, batch_size=2), strict=True):
        found = [
            score["score"] for name in model.config.id2label.values() for score in scores if score["label"] == name
        ]
        assert torch.allclose(torch.tensor(found), row, atol=1e-6)


def test_a_model_of_one_channel_sees_shades_of_grey(tmp_path: Path) -> None:
    """No pipeline runs such a model, so its card shows none."""
    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    labels: dict[str, Any] = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    model = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **size, **labels))
    model.save_pretrained(tmp_path / "base")
    grey = ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5])
    grey.save_pretrained(tmp_path / "base")
    write_images(tmp_path / "images", {"train": 1})
    data = {"path": "imagefolder", "data_dir": "images"}
    config = GraspConfig(method="average", **NO_TUNING)
    merger, _, samples = prepare(Recipe(sources=["base"], data=data, config=config, folder=tmp_path))
    merger.merge([str(tmp_path / "base")], **samples.keywords())
    picture = Image.open(tmp_path / "images" / "train" / LABELS[0] / "0.png").convert("L")
    assert torch.equal(samples.train[0]["pixel_values"], grey(picture, return_tensors="pt")["pixel_values"][0])
    merger.save_pretrained(tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "pipeline(" not in card and "ViTForImageClassification.from_pretrained" in card


def test_a_model_of_another_number_of_channels_is_refused() -> None:
    splits = DatasetDict(train=Dataset.from_dict({"image": ["x.png"]}).cast_column("image", Feature()))
    with pytest.raises(
        DataError, match="takes images of 4 channels, and a recipe can prepare 1 or 3; prepare the data"
    ):
        prepare_images(splits, "image", ViTImageProcessorPil(), channels=4)


@pytest.mark.parametrize(("dtype", "mode"), [(np.uint16, "I;16"), (np.int32, "I"), (np.float32, "F")])
def test_pixels_that_a_pipeline_would_cut_off_are_refused(dtype: Any, mode: str, tmp_path: Path) -> None:
    path = str(tmp_path / "deep.tiff")
    Image.fromarray(np.array([[0, 200], [300, 65535]], dtype)).save(path)
    assert np.asarray(load_image(path))[..., 0].tolist() == [[0, 200], [255, 255]]
    message = f"deep.tiff' cannot be read: its pixels are of type {mode}, which pipelines cut off at 255; save the"
    with pytest.raises(DataError, match=message):
        load_picture({"path": path, "bytes": None})


def test_a_picture_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = picture_of("RGB", tmp_path)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 60)
    with pytest.raises(
        DataError, match=r"RGB-None.png' cannot be read: Image size \(128 pixels\) exceeds limit of 120"
    ):
        load_picture({"path": path, "bytes": None})


def test_a_picture_whose_pixels_git_has_not_fetched(tmp_path: Path) -> None:
    path = tmp_path / "bird.png"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match="bird.png' cannot be read: it is a git-LFS pointer, not the file itself; run"):
        load_picture({"path": str(path), "bytes": None})


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_of_every_kind_are_named() -> None:
    """Pillow raises errors of many types for damaged files."""
    generator = np.random.default_rng(0)
    for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA"):
        buffer = io.BytesIO()
        Image.fromarray(NOISE[..., :3]).save(buffer, kind)
        for _ in range(100):
            damaged = bytearray(buffer.getvalue())
            for place in generator.integers(len(damaged), size=4):
                damaged[place] = generator.integers(256)
            try:
                load_picture({"path": f"x.{kind}", "bytes": bytes(damaged)})
            except DataError as error:
                assert str(error).startswith(f"the picture 'x.{kind}' cannot be read: ")
