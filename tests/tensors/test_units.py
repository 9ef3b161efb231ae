"""The units of a model, and the comparison of the tensors of two models."""

import pytest

from grasp_hf.sources.fit import tensor_problems, tie_problems
from grasp_hf.tensors.units import Unit, head_tensors, movable_tensors, partition, tied_names
from tests.support.models import KINDS, LABELS, tiny_model

NORMALIZATION = "resnet.embedder.embedder.normalization"
STAGES = ("resnet.encoder.stages.0", "resnet.encoder.stages.1")


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
@pytest.mark.parametrize("unit", ["layer", "module", "tensor", "parameter"])
def test_units_hold_every_tensor_once(kind: str, unit: str) -> None:
    model = tiny_model(kind)
    names = [name for part in partition(model, unit) for name in part.tensors]
    expected = [name for name, _ in model.named_parameters()]
    if unit != "parameter":
        expected += [name for name, _ in model.named_buffers() if name in model.state_dict()]
    assert sorted(names) == sorted(expected)


def test_a_normalisation_layer_moves_with_its_statistics() -> None:
    model = tiny_model("resnet")
    tensors = tuple(
        f"{NORMALIZATION}.{n}" for n in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    )
    for unit in ("module", "tensor"):
        assert Unit(NORMALIZATION, tensors) in partition(model, unit)
    assert Unit(f"{NORMALIZATION}.weight", (f"{NORMALIZATION}.weight",)) in partition(model, "parameter")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("resnet", ["resnet.embedder.embedder.convolution", NORMALIZATION, *STAGES, "classifier.1"]),
        ("gpt2", ["transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"]),
    ],
)
def test_a_block_or_a_stage_is_one_layer(kind: str, expected: list[str]) -> None:
    assert sorted(unit.name for unit in partition(tiny_model(kind), "layer")) == sorted(expected)


def test_weight_and_bias_of_a_module_are_one_unit() -> None:
    units = {unit.name: unit.tensors for unit in partition(tiny_model("vit"), "module")}
    name = "vit.layers.0.attention.q_proj"
    assert units[name] == (f"{name}.weight", f"{name}.bias")


def test_tied_weights_appear_once_and_position_ids_never() -> None:
    assert "lm_head.weight" not in movable_tensors(tiny_model("gpt2"))
    assert not [name for name in movable_tensors(tiny_model("bert")) if "position_ids" in name]


def test_a_tied_weight_has_a_main_name() -> None:
    assert tied_names(tiny_model("gpt2")) == {"lm_head.weight": "transformer.wte.weight"}
    assert tied_names(tiny_model("vit")) == {}


def test_the_head_consists_of_the_tensors_outside_the_base_model() -> None:
    assert head_tensors(tiny_model("resnet")) == {"classifier.1.weight", "classifier.1.bias"}
    assert head_tensors(tiny_model("bert")) == {"classifier.weight", "classifier.bias"}
    assert head_tensors(tiny_model("gpt2")) == set()


def test_equal_models_have_no_problems() -> None:
    target, source = tiny_model("vit"), tiny_model("vit", seed=1)
    assert tensor_problems(movable_tensors(target), movable_tensors(source)) == [] == tie_problems(target, source)


def test_every_other_shape_is_named() -> None:
    target, source = (movable_tensors(tiny_model("vit", labels=labels)) for labels in (LABELS, ["a", "b"]))
    problems = tensor_problems(target, source)
    assert problems == [
        "classifier.weight: got shape (2, 16), expected (3, 16)",
        "classifier.bias: got shape (2,), expected (3,)",
    ]
