"""Weights that are not finite, or out of all proportion to the target's, never reach a merge."""

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import GraspError, IncompatibleSourceError, NonFiniteError
from grasp_hf.sources.values import check_values
from tests.support.models import NO_TUNING, copied, perturbed, saved, saved_adapter, tiny_data, tiny_model

AVERAGE = GraspConfig(method="average", **NO_TUNING)
NAME = "bert.embeddings.word_embeddings.weight"


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("values")
    made = {"base": saved(tiny_model("bert"), root / "base")}
    for dtype in ("float32", "float16", "bfloat16"):
        fine = perturbed(tiny_model("bert"), seed=1).to(getattr(torch, dtype))
        made[dtype] = saved(fine, root / dtype)
    made["adapter"] = saved_adapter(tiny_model("bert"), made["base"], root / "adapter", target_modules=["query"])
    return made


def flipped(folder: str, to: Path, file: str, name: str, bit: int, dtype: str) -> str:
    """Return a copy of a model in which one bit of the first weight of a tensor is flipped."""
    path = copied(folder, to) / file
    tensors = load_file(path)
    bits = tensors[name].view(torch.int32 if dtype == "float32" else torch.int16).flatten()
    bits[0] ^= (
        torch.tensor(1 << bit).to(bits.dtype) if bit < 15 else torch.tensor(1 << bit, dtype=torch.int64).to(bits.dtype)
    )
    save_file(tensors, path, metadata={"format": "pt"})
    return str(to)


@pytest.mark.parametrize(("dtype", "bit"), [("float32", 30), ("float16", 14), ("bfloat16", 14)])
@pytest.mark.parametrize("data", [False, True])
def test_a_flipped_bit_of_an_exponent_is_refused_with_data_or_without(
    dtype: str, bit: int, data: bool, bert: dict[str, str], tmp_path: Path
) -> None:
    source = flipped(bert[dtype], tmp_path / "flipped", "model.safetensors", NAME, bit, dtype)
    merger = GraspMerger.from_pretrained(bert["base"], config=AVERAGE)
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    datasets: dict[str, Any] = {"train_dataset": tiny_data("bert", 8)} if data else {}
    with pytest.raises(GraspError, match=f"{NAME}: its largest weight is .*the file is damaged"):
        merger.merge([source], **datasets)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.model.state_dict().items())
    merger.merge([bert[dtype]], **datasets)


def test_a_flipped_bit_in_an_adapter_is_refused(bert: dict[str, str], tmp_path: Path) -> None:
    name = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_A.weight"
    source = flipped(bert["adapter"], tmp_path / "flipped", "adapter_model.safetensors", name, 30, "float32")
    with pytest.raises(GraspError, match="query.weight(: its largest weight is| holds NaN or infinite)"):
        GraspMerger.from_pretrained(bert["base"], config=AVERAGE).merge([source])


def test_a_ranking_names_a_source_out_of_proportion(bert: dict[str, str], tmp_path: Path) -> None:
    source = flipped(bert["float32"], tmp_path / "flipped", "model.safetensors", NAME, 30, "float32")
    merger = GraspMerger.from_pretrained(
        bert["base"], config=GraspConfig(method="average", order="rank", final_epochs=0)
    )
    rows = merger.rank([bert["float32"], source], train_dataset=tiny_data("bert", 8))
    assert rows[0].problem is None and "its largest weight is" in str(rows[1].problem)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_base_that_is_not_finite_is_refused(value: float, bert: dict[str, str], tmp_path: Path) -> None:
    folder = copied(bert["base"], tmp_path / "base")
    tensors = load_file(folder / "model.safetensors")
    tensors[NAME][3, 1] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match=f"base': {NAME} holds NaN or infinite weights"):
        GraspMerger.from_pretrained(str(folder))


def test_weights_in_proportion_are_allowed() -> None:
    target = {"weight": torch.tensor([0.1, -2.0]), "bias": torch.zeros(2), "steps": torch.tensor(3)}
    check_values("org/a", {name: tensor.clone() for name, tensor in target.items()}, target)
    check_values("org/a", {"weight": torch.tensor([1_999.0, 0.0]), "bias": torch.tensor([-199.0, 0.0])}, target)
    check_values("org/a", {"steps": torch.tensor(10**9), "weight": torch.empty(0)}, target)
    for name, value in (("weight", -2_001.0), ("bias", 201.0)):
        with pytest.raises(IncompatibleSourceError, match=f"'org/a': {name}: its largest weight is "):
            check_values("org/a", {name: torch.tensor([value, 0.0])}, target)


def test_no_flipped_bit_leaves_a_weight_far_out_of_range() -> None:
    """Flip every bit of many weights: what passes is as small as the weights of the target."""
    generator = random.Random(0)
    target = {"weight": torch.tensor([generator.gauss(0, 0.05) for _ in range(256)])}
    largest = float(target["weight"].abs().max())
    refused = 0
    for index in range(64):
        value = float(target["weight"][index])
        for bit in range(32):
            (bits,) = struct.unpack("<I", struct.pack("<f", value))
            (wrong,) = struct.unpack("<f", struct.pack("<I", bits ^ (1 << bit)))
            source = target["weight"].clone()
            source[index] = wrong
            try:
                check_values("org/a", {"weight": source}, target)
            except (NonFiniteError, IncompatibleSourceError):
                refused += 1
            else:
                assert abs(wrong) <= 1_000 * largest
    assert refused >= 64
