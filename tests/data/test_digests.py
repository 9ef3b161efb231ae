"""The digest of a whole data set, by which a state knows its data."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as Pictures

from grasp_hf.data.digests import full_digest


def test_every_sample_its_label_and_its_place_count() -> None:
    rows: dict[str, Any] = {"text": [f"text {number}" for number in range(2500)], "label": [0, 1] * 1250}
    whole = full_digest(Dataset.from_dict(rows))
    assert whole == full_digest(Dataset.from_dict(rows).with_format("torch")) and whole.startswith("2500 samples, ")
    for name, place, value in (("text", 2499, "another"), ("label", 1700, 5)):
        changed = {key: list(values) for key, values in rows.items()}
        changed[name][place] = value
        assert full_digest(Dataset.from_dict(changed)) != whole
    assert full_digest(Dataset.from_dict({name: values[::-1] for name, values in rows.items()})) != whole


@pytest.mark.parametrize("decode", [True, False])
def test_a_changed_picture_counts(decode: bool, tmp_path: Path) -> None:
    digests = []
    for level in (10, 10, 11):
        Pictures.new("RGB", (4, 4), (level, 0, 0)).save(tmp_path / "picture.png")
        data = Dataset.from_dict({"image": [str(tmp_path / "picture.png")], "label": [0]})
        digests.append(full_digest(data.cast_column("image", Image(decode=decode))))
    assert digests[0] == digests[1] != digests[2]


def test_a_data_set_of_tensors_counts_by_its_values() -> None:
    def samples(value: float) -> list[dict[str, torch.Tensor]]:
        return [{"pixel_values": torch.full((2, 2), value), "labels": torch.tensor(1)}]

    assert full_digest(samples(1.0)) == full_digest(samples(1.0)) != full_digest(samples(1.5))
