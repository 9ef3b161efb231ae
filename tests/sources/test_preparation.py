"""A source whose inputs were prepared in another way than the target's gets a note."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers import normalizers
from transformers import PreTrainedTokenizerFast, ViTImageProcessorPil

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.sources.preparation import preparation_notes
from tests.sources.test_rows import WORDS, text_model
from tests.support.models import NO_TUNING, saved, tiny_model, tiny_tokenizer

MEAN: dict[str, Any] = {"method": "average", **NO_TUNING}
SIZE = {"height": 8, "width": 8}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"image_mean": [0.1, 0.5, 0.5]}, r"image_mean: got [0.1, 0.5, 0.5], expected [0.5, 0.5, 0.5]"),
        ({"do_normalize": False}, "do_normalize: got False, expected True"),
        ({"rescale_factor": 1.0}, "rescale_factor: got 1.0, expected 0.00392"),
        ({"size": {"height": 16, "width": 16}}, "size: got {'height': 16, 'width': 16}, expected {'height': 8"),
    ],
)
def test_pictures_in_another_form_are_noted(changes: dict[str, Any], text: str, tmp_path: Path) -> None:
    base, source = (saved(tiny_model("vit", seed), tmp_path / str(seed)) for seed in (0, 1))
    ViTImageProcessorPil(size=SIZE).save_pretrained(base)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    assert merger.merge([source]).steps[0].notes == []
    ViTImageProcessorPil(size=SIZE).save_pretrained(source)
    assert merger.merge([source]).steps[1].notes == []
    ViTImageProcessorPil(**{"size": SIZE, **changes}).save_pretrained(source)
    (note,) = merger.merge([source]).steps[2].notes
    assert note.startswith("its inputs were prepared in another way than the target's: ") and text in note


def test_texts_in_another_form_are_noted(tmp_path: Path) -> None:
    base, source = (text_model(tmp_path / str(seed), WORDS, seed=seed) for seed in (0, 1))
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**MEAN))
    assert not [note for note in merger.merge([source]).steps[0].notes if "prepared" in note]
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(source)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(source)
    notes = merger.merge([source]).steps[1].notes
    assert "its inputs were prepared in another way than the target's: normalizer: got 'Lowercase()'" in notes[-1]


def test_what_cannot_be_compared_gets_no_note() -> None:
    processor, tokenizer = ViTImageProcessorPil(size=SIZE), tiny_tokenizer()
    for pair in ((None, processor), (processor, None), (None, None), (processor, tokenizer), (tokenizer, object())):
        assert preparation_notes(*pair) == []
