"""On a GPU: the numbers of the CPU, one copy of the weights, and half precision."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.comparison.methods import METHODS
from grasp_hf.comparison.run import compare
from grasp_hf.config.recipe import Recipe
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model, write_images
from tests.support.plain import mean_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STILL: dict[str, Any] = {"method": "blend", "gate": False, "batch_size": 8, "num_batches": 2, **NO_TUNING}


def test_a_merge_on_a_gpu_gives_the_model_back_on_the_cpu(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source")
    target = perturbed(tiny_model("resnet"), 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    config = GraspConfig(method="copy", threshold=1.0, **NO_TUNING)
    data = tiny_data("resnet", 16)
    step = GraspMerger(target, config).merge_source(source, train_dataset=data, eval_dataset=data)
    assert step.before["loss"] == pytest.approx(mean_loss(target, data), abs=1e-3)
    for name, value in target.state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Let every Accelerator inside the block choose the CPU."""
    reset()
    Accelerator(cpu=True)  # all later ones share its state
    try:
        yield
    finally:
        reset()


def reset() -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()


@pytest.fixture(autouse=True)
def _on_the_gpu() -> None:
    reset()
    assert Accelerator().device.type == "cuda"


@pytest.mark.parametrize("method", ["blend", "copy", "average"])
@pytest.mark.parametrize("kind", ["resnet", "vit", "bert", "gpt2"])
def test_scores_and_weights_equal_those_of_the_cpu(kind: str, method: Any, tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model(kind), 1), tmp_path / "source")
    config = GraspConfig(**{**STILL, "method": method, "threshold": -1.0})

    def merged() -> tuple[PreTrainedModel, Any]:
        model = tiny_model(kind)
        return model, GraspMerger(model, config).merge([source], train_dataset=tiny_data(kind, 16)).steps[0]

    gpu, on_gpu = merged()
    with on_the_cpu():
        cpu, on_cpu = merged()
    scores, expected = ({u.name: u.score for u in step.units if u.score is not None} for step in (on_gpu, on_cpu))
    assert scores == pytest.approx(expected, abs=1e-3)
    for name, value in movable_tensors(cpu).items():
        torch.testing.assert_close(movable_tensors(gpu)[name], value, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["blend", "copy"])
def test_the_allocator_holds_one_model_and_one_layer(method: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"hidden_size": 256, "num_hidden_layers": 8, "num_labels": 10}
    config = ViTConfig(image_size=32, patch_size=16, **sizes)
    target, other = ViTForImageClassification(config), ViTForImageClassification(config)
    source = saved(other, tmp_path / "source")
    weights = sum(p.numel() * p.element_size() for p in target.parameters())
    layer = sum(p.numel() * p.element_size() for p in target.vit.layers[0].parameters())
    images: Any = [{"pixel_values": torch.randn(3, 32, 32), "labels": index % 10} for index in range(4)]
    settings = GraspConfig(**{**STILL, "method": method, "batch_size": 2})
    GraspMerger(tiny_model("vit"), GraspConfig(**STILL)).merge(
        [saved(tiny_model("vit"), tmp_path / "tiny")], train_dataset=tiny_data("vit", 16)
    )  # from here on, cuBLAS has its workspaces
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    GraspMerger(target, settings).merge([source], train_dataset=images)
    activations = 16 * 2**20  # more than two images of five patches need
    assert weights < torch.cuda.max_memory_allocated() - before <= 1.15 * weights + layer + activations


def test_half_precision_on_the_gpu(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("bert"), 1).bfloat16(), tmp_path / "source")
    target = tiny_model("bert").bfloat16()
    data = tiny_data("bert", 16)
    step = (
        GraspMerger(target, GraspConfig(**{**STILL, "gate": True}))
        .merge([source], train_dataset=data, eval_dataset=data)
        .steps[0]
    )
    assert {p.dtype for p in target.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in target.parameters())
    assert step.after["loss"] <= step.before["loss"] + 1e-6


def test_every_method_of_a_comparison_gives_the_numbers_of_the_cpu(tmp_path: Path) -> None:
    names = ("base", "fine", "other")
    for seed, name in enumerate(names):
        saved(perturbed(tiny_model("vit"), seed) if seed else tiny_model("vit"), tmp_path / name)
    write_images(tmp_path / "images", {"train": 8, "test": 34})

    def recipe(**arguments: Any) -> Recipe:
        return Recipe.from_dict(
            {
                "base_model": f"{tmp_path}/base",
                "sources": [f"{tmp_path}/{name}" for name in names[1:]],
                "data": {"path": "imagefolder", "data_dir": f"{tmp_path}/images"},
                "batch_size": 4,
                "final_epochs": 1,
                "training_arguments": {
                    "learning_rate": 0.0,
                    **arguments,
                },  # with this rate, a training changes nothing, so dropout does not matter
            }
        )

    on_gpu = compare(recipe(), tmp_path / "gpu", seeds=[1])
    assert {result.method for result in on_gpu.results} >= METHODS.keys()
    assert not [result for result in on_gpu.results if result.problem]
    random_methods = {"pearl", "published"}  # their dropout differs between devices
    with on_the_cpu():
        on_cpu = compare(recipe(use_cpu=True), tmp_path / "cpu", seeds=[1], methods=[*METHODS.keys() - random_methods])
    expected = {result.method: result.final for result in on_cpu.results}
    for result in on_gpu.results:
        if result.method in expected:
            assert result.final == pytest.approx(expected[result.method], abs=1e-3), result.method
