"""An option of an adapter that changes what it computes is honoured, or refused by its name."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.config.recipe import Recipe
from grasp_hf.runs.plan import plan, problem_list
from tests.support.models import NO_TUNING, saved, saved_adapter, tiny_model

CONFIG = GraspConfig(method="average", **NO_TUNING)


def made(folder: Path, options: dict[str, Any], **config: Any) -> tuple[str, str]:
    """Write a base, and an adapter whose adapter_config.json has `options` in addition."""
    base = saved(tiny_model("vit"), folder / "base")
    adapter = saved_adapter(tiny_model("vit"), base, folder / "adapter", **{"target_modules": ["q_proj"], **config})
    path = Path(adapter) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | options))
    return base, adapter


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a field of a newer PEFT": (
        {"rotate_weights": True},
        "sets rotate_weights: true, an option that PEFT .* does not",
    ),
    "a number": ({"rope_stretch": 2.5}, "sets rope_stretch: 2.5, an option that PEFT"),
    "a section": ({"gate_config": {"size": 4}}, 'sets gate_config: {"size": 4}, an option that PEFT'),
    "merged layers of 2021": ({"enable_lora": [True, False]}, r"sets enable_lora: \[true, false\], an option that"),
    "replicated layers": (
        {"layer_replication": [[0, 2], [0, 2]]},
        "sets layer_replication: the adapted model has other",
    ),
    "activated LoRA": (
        {"alora_invocation_tokens": [3]},
        "sets alora_invocation_tokens: it acts on the tokens after an",
    ),
    "a router": ({"arrow_config": {"top_k": 1}}, "sets arrow_config: it chooses among adapters for each token"),
    "a random start": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4, which changed the"),
    "a start from data": (
        {"init_lora_weights": "corda"},
        "init_lora_weights: corda, which changed the weights of the",
    ),
    "a start from gradients": (
        {"init_lora_weights": "lora_ga"},
        "init_lora_weights: lora_ga, which changed the weights",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_that_no_merge_can_honour(name: str, tmp_path: Path) -> None:
    options, message = REFUSED[name]
    base, adapter = made(tmp_path, options)
    with pytest.raises(IncompatibleSourceError, match=message):
        GraspMerger.from_pretrained(base, config=CONFIG).merge([adapter])
    (problem,) = problem_list(plan(Recipe(base_model=base, sources=[adapter], config=CONFIG)))
    assert next(iter(options)) in problem and adapter in problem


@pytest.mark.parametrize(
    "options",
    [
        {"new_option": None},
        {"new_option": False},
        {"new_option": []},
        {"merge_weights": True},
        {"runtime_config": {"ephemeral_gpu_offload": False}},
        {"lora_dropout": 0.3},
    ],
    ids=str,
)
def test_an_option_without_effect(options: dict[str, Any], tmp_path: Path) -> None:
    base, plain = made(tmp_path / "plain", {})
    _, adapter = made(tmp_path / "options", options)
    states = []
    for source in (plain, adapter):
        path = Path(source) / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))
        merger = GraspMerger.from_pretrained(base, config=CONFIG)
        merger.merge([source])
        states.append(merger.model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_warnings_of_peft_become_notes(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, {"fan_in_fan_out": True})
    merger = GraspMerger.from_pretrained(base, config=CONFIG)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        notes = merger.merge([adapter]).steps[0].notes
    assert notes == [
        "PEFT: fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
        "Setting fan_in_fan_out to False."
    ]


def test_a_plain_adapter_has_no_notes(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, {}, modules_to_save=["classifier"])
    assert GraspMerger.from_pretrained(base, config=CONFIG).merge([adapter]).steps[0].notes == []
