"""On a GPU: the numbers of the CPU, one copy of the weights, half precision, and nothing left behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.matching import movable_tensors
from tests.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STILL: dict[str, Any] = {"method": "blend", "gate": False, "batch_size": 8, "num_batches": 2, **NO_TUNING}


@pytest.mark.parametrize("method", ["blend", "copy"])
def test_a_merge_on_a_gpu_gives_the_model_back_on_the_cpu(method: Any, tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source")
    target = perturbed(tiny_model("resnet"), 2)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    config = GraspConfig(method=method, threshold=1.0, coefficient_lr=1e-30, **NO_TUNING)
    data = tiny_data("resnet", 16)
    step = GraspMerger(target, config).merge_source(source, train_dataset=data, eval_dataset=data)
    assert step.before["loss"] > 0
    for name, value in target.state_dict().items():
        assert value.device.type == "cpu"
        torch.testing.assert_close(value, before[name], atol=1e-6, rtol=0)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraspMerger, "_accelerator", property(lambda self: _accelerator(cpu=True)))


def _accelerator(**kwargs: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    AcceleratorState._reset_state()
    PartialState._reset_state()
    return Accelerator(**kwargs)


@pytest.mark.parametrize("method", ["blend", "copy", "average"])
@pytest.mark.parametrize("kind", ["resnet", "vit", "bert", "gpt2"])
def test_scores_and_weights_equal_those_of_the_cpu(
    kind: str, method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(perturbed(tiny_model(kind), 1), tmp_path / "source")
    config = GraspConfig(**{**STILL, "method": method, "threshold": -1.0})

    def merged() -> tuple[PreTrainedModel, Any]:
        model = tiny_model(kind)
        return model, GraspMerger(model, config).merge([source], train_dataset=tiny_data(kind, 16)).steps[0]

    gpu, on_gpu = merged()
    on_the_cpu(monkeypatch)
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
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    GraspMerger(target, settings).merge([source], train_dataset=images)
    activations = 16 * 2**20  # generous for two images of five patches
    assert torch.cuda.max_memory_allocated() - before <= 1.15 * weights + layer + activations


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
