"""For each architecture family, the merge that takes a source whole computes the logits of the source."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.tensors.units import tied_names
from tests.support.exact import TOLERANCE
from tests.support.families import FAMILIES, family_logits, family_model
from tests.support.models import NO_TUNING

# Layers that PEFT cannot wrap, because the model reads their attributes.
UNSUPPORTED = {"Mamba": ("out_proj", "conv1d", "dt_proj"), "MobileNetV2": ("convolution",)}
CONFIG = GraspConfig(method="average", **NO_TUNING)


def merged_logits(base: Path, source: Path) -> Tensor:
    merger = GraspMerger.from_pretrained(str(base), config=CONFIG)
    notes = merger.merge([str(source)]).steps[0].notes
    assert not [note for note in notes if note.startswith("not compared")]
    return family_logits(merger.model)


def assert_exact(got: Tensor, expected: Tensor, plain: Tensor) -> None:
    scale = float(expected.abs().max())
    assert float((expected - plain).abs().max()) > 100 * TOLERANCE * scale, "the source differs from the base"
    torch.testing.assert_close(got, expected, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_full_source(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    base, source = family_model(name), family_model(name, seed=1)
    base.save_pretrained(tmp_path / "base")
    source.to(dtype).save_pretrained(tmp_path / "source")
    expected = family_logits(type(source).from_pretrained(tmp_path / "source", dtype=torch.float32))
    assert_exact(merged_logits(tmp_path / "base", tmp_path / "source"), expected, family_logits(base))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_of_every_layer(name: str, tmp_path: Path) -> None:
    base: Any = family_model(name)
    base.save_pretrained(tmp_path / "base")
    tied = {key.rpartition(".")[0] for pair in tied_names(base).items() for key in pair}
    targets = [
        key
        for key, module in base.named_modules()
        if (isinstance(module, nn.Linear | Conv1D) or (isinstance(module, nn.Conv2d) and module.groups == 1))
        and key not in tied
    ]
    if name in UNSUPPORTED:
        targets = [key for key in targets if not key.endswith(UNSUPPORTED[name])]
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False)
    adapted: Any = peft.get_peft_model(family_model(name), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    model = type(base).from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = family_logits(peft.PeftModel.from_pretrained(model, str(tmp_path / "adapter")))
    assert_exact(merged_logits(tmp_path / "base", tmp_path / "adapter"), expected, family_logits(base))
