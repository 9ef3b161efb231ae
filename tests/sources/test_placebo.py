"""A placebo is as far from the base as its source in each tensor, and random; the references are PEFT and NumPy."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.hub.download import locate
from grasp_hf.hub.reference import SourceRef
from grasp_hf.sources.load import LoadedSource, load_source
from grasp_hf.sources.placebo import Placebo
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import NO_TUNING, perturbed, saved, tiny_model

Tensors = dict[str, Tensor]
BODY = ["q_proj", "v_proj", "fc1"]


def copies(model: PreTrainedModel) -> Tensors:
    return {name: tensor.detach().clone() for name, tensor in movable_tensors(model).items()}


def placebo_of(kind: str, source: str, base: str, folder: Path, *, seed: int = 0, named: str = "org/a") -> Tensors:
    """Return the placebo of a source; `named` is the reference that the source is taken to have."""
    target, root = tiny_model(kind), locate(SourceRef.parse(base))
    loaded = load_source(locate(SourceRef.parse(source)), target, base=root, directory=folder)
    return Placebo(seed, copies(target)).replace(loaded, named, target, folder).tensors


def saved_adapter(kind: str, config: Any, folder: Path, scale: float = 0.5) -> tuple[str, str]:
    """Write a model and an adapter of it whose weights are all random; return the names of both folders."""
    base = saved(tiny_model(kind), folder / "base")
    adapter = peft.get_peft_model(tiny_model(kind), config)
    adapter.peft_config["default"].base_model_name_or_path = base
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape))
    adapter.save_pretrained(str(folder / "adapter"))
    return base, str(folder / "adapter")


def merged_by_peft(kind: str, adapter: str) -> Tensors:
    return copies(PeftModel.from_pretrained(tiny_model(kind), adapter).merge_and_unload())


def rank(matrix: Tensor) -> int:
    values = np.linalg.svd(matrix.flatten(1).double().numpy(), compute_uv=False)
    return int((values > 1e-5 * values[0]).sum())


def distance(value: Tensor, base: Tensor) -> float:
    return float(np.sqrt(((value.double() - base.double()).numpy() ** 2).sum()))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "resnet"])
def test_each_parameter_of_a_full_source_moves_as_far_in_a_random_direction(kind: str, tmp_path: Path) -> None:
    base = saved(tiny_model(kind), tmp_path / "base")
    source = saved(perturbed(tiny_model(kind), 1), tmp_path / "source")
    real, start = copies(perturbed(tiny_model(kind), 1)), copies(tiny_model(kind))
    found = placebo_of(kind, source, base, tmp_path)
    parameters = dict(tiny_model(kind).named_parameters())
    assert found.keys() == start.keys()
    products, squares = 0.0, 0.0
    for name in parameters:
        assert distance(found[name], start[name]) == pytest.approx(distance(real[name], start[name]), rel=1e-5), name
        products += float(((found[name] - start[name]) * (real[name] - start[name])).sum())
        squares += distance(real[name], start[name]) ** 2
    assert abs(products / squares) < 5 / np.sqrt(sum(p.numel() for p in parameters.values()))
    for name in start.keys() - parameters.keys():
        assert torch.equal(found[name], start[name]), "statistics are those of the base"


ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA": ("vit", lambda: peft.LoraConfig(r=2, target_modules=BODY, modules_to_save=["classifier"])),
    "rank pattern": ("vit", lambda: peft.LoraConfig(r=2, target_modules=BODY, rank_pattern={"fc1": 3})),
    "DoRA": ("vit", lambda: peft.LoraConfig(r=2, target_modules=BODY, use_dora=True)),
    "embeddings": ("bert", lambda: peft.LoraConfig(r=2, target_modules=["word_embeddings", "query"])),
    "convolutions": ("resnet", lambda: peft.LoraConfig(r=2, target_modules=["convolution"])),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_each_tensor_of_an_adapter_keeps_its_norm_and_its_rank(name: str, tmp_path: Path) -> None:
    kind, config = ADAPTERS[name]
    base, adapter = saved_adapter(kind, config(), tmp_path)
    real, start = merged_by_peft(kind, adapter), copies(tiny_model(kind))
    found = placebo_of(kind, adapter, base, tmp_path)
    changed = {key for key, value in real.items() if not torch.equal(value, start[key])}
    assert changed
    ranks = set()
    for key, value in found.items():
        if key not in changed:
            assert torch.equal(value, start[key]), key
            continue
        assert distance(value, start[key]) == pytest.approx(distance(real[key], start[key]), rel=1e-4), key
        assert not torch.allclose(value, real[key], rtol=0, atol=1e-3), key
        if value.ndim > 1:
            assert rank(value - start[key]) == rank(real[key] - start[key]), key
            ranks.add(rank(value - start[key]))
    assert {"rank pattern": 3, "DoRA": 16}.get(name, 2) in ranks


def test_a_placebo_is_the_same_for_the_same_seed_source_and_tensor_only(tmp_path: Path) -> None:
    base, adapter = saved_adapter("vit", ADAPTERS["LoRA"][1](), tmp_path)
    first = placebo_of("vit", adapter, base, tmp_path)
    first = {name: tensor.clone() for name, tensor in first.items()}
    again = placebo_of("vit", adapter, base, tmp_path)
    assert all(torch.equal(again[name], tensor) for name, tensor in first.items())
    moved = [name for name, tensor in first.items() if not torch.equal(tensor, copies(tiny_model("vit"))[name])]
    for other in ({"seed": 1}, {"named": "org/b"}):
        differing = placebo_of("vit", adapter, base, tmp_path, **other)
        assert moved and not any(torch.allclose(differing[name], first[name]) for name in moved)
    same_shape = [name for name in moved if first[name].shape == (16, 16)]
    start = copies(tiny_model("vit"))
    units = [(first[name] - start[name]) / distance(first[name], start[name]) for name in same_shape]
    assert len(units) > 1 and not torch.allclose(units[0], units[1], atol=1e-3)


def test_shards_are_replaced_as_they_arrive(tmp_path: Path) -> None:
    target, source = tiny_model("bert"), copies(perturbed(tiny_model("bert"), 1))
    names = sorted(source)
    parts = [{name: source[name] for name in names[start::2]} for start in range(2)]
    asked: list[int] = []

    def shards() -> Any:
        for index, part in enumerate(parts):
            asked.append(index)
            yield dict(part)

    meta = {name: tensor.to("meta") for name, tensor in source.items()}
    placebo = Placebo(0, copies(target))
    whole = placebo.replace(LoadedSource(source, set(source)), "org/a", target, tmp_path).tensors
    sharded = placebo.replace(LoadedSource(meta, set(meta), shards=shards()), "org/a", target, tmp_path)
    assert asked == []
    arrived = []
    for index, values in enumerate(sharded.shards):
        assert asked == list(range(index + 1)) and values.keys() == parts[index].keys()
        assert all(torch.equal(value, whole[name]) for name, value in values.items())
        arrived += list(values)
    assert sorted(arrived) == names


def test_a_merger_with_a_placebo_merges_it_in_place_of_the_source(tmp_path: Path) -> None:
    base, adapter = saved_adapter("vit", ADAPTERS["LoRA"][1](), tmp_path)
    config = GraspConfig(method="average", gate=False, **NO_TUNING)
    origin = GraspMerger.from_pretrained(base, config=config)
    start = copies(origin.model)
    merger = origin.with_config(config, placebo=Placebo(0, start))
    merger.merge([adapter])
    expected = placebo_of("vit", adapter, base, tmp_path, named=adapter)
    for name, tensor in movable_tensors(merger.model).items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=0, atol=0)
    assert merger.with_config(config)._placebo is None
