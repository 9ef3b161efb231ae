"""A gradient pass gives the gradients of a plain backward and leaves nothing on the model."""

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import ConfigError
from grasp_hf.models.gradients import checkpointing, gradient_pass, preserved_state, visit_gradients
from tests.support.models import KINDS, NO_TUNING, perturbed, saved, tiny_data, tiny_model


def batch_of(kind: str) -> dict[str, Tensor]:
    return tiny_data(kind, 6)[:6]


def hooks_on(model: torch.nn.Module) -> int:
    return sum(len(parameter._post_accumulate_grad_hooks or {}) for parameter in model.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "gpt2"])
def test_visited_gradients_equal_those_of_a_plain_backward(kind: str) -> None:
    model, batch = tiny_model(kind).eval(), batch_of(kind)
    visited: dict[str, Tensor] = {}
    gradient_pass(model, batch, visited.__setitem__)
    assert all(parameter.grad is None for parameter in model.parameters())
    model(**batch).loss.backward()
    assert set(visited) == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(visited[name], parameter.grad, atol=0, rtol=0)


def test_gradients_are_freed_while_backward_goes_on() -> None:
    model = tiny_model("vit").eval()
    alive: list[int] = []
    seen: list[weakref.ref[Tensor]] = []

    def visit(name: str, gradient: Tensor) -> None:
        alive.append(sum(reference() is not None for reference in seen))
        seen.append(weakref.ref(gradient))

    gradient_pass(model, batch_of("vit"), visit)
    assert len(alive) == len(list(model.parameters()))
    # The frame of the last hook may still hold the gradient before this one.
    assert max(alive) <= 1


def test_hooks_and_gradients_are_gone_when_the_block_raises() -> None:
    model = tiny_model("bert")

    def visit(name: str, gradient: Tensor) -> None:
        raise KeyError(name)

    with pytest.raises(KeyError, match="classifier"):
        gradient_pass(model, batch_of("bert"), visit)
    assert hooks_on(model) == 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_are_there_inside_the_block_only() -> None:
    model = tiny_model("resnet")
    with visit_gradients(model, lambda name, gradient: None):
        assert hooks_on(model) == len(list(model.parameters()))
    assert hooks_on(model) == 0


def test_frozen_parameters_are_measured_and_stay_frozen() -> None:
    model = tiny_model("vit")
    for parameter in model.base_model.parameters():
        parameter.requires_grad_(False)
    visited: dict[str, Tensor] = {}
    gradient_pass(model, batch_of("vit"), visited.__setitem__)
    assert set(visited) == dict(model.named_parameters()).keys()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_preserved_state_restores_modes_and_requires_grad() -> None:
    model = tiny_model("resnet").train()
    model.resnet.embedder.eval()
    next(model.parameters()).requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(RuntimeError, match="inside"), preserved_state(model):
        model.eval()
        model.requires_grad_(True)
        raise RuntimeError("inside")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()].count(False) == 1


def test_nothing_keeps_the_model_alive() -> None:
    model = tiny_model("resnet")
    gradient_pass(model, batch_of("resnet"), lambda name, gradient: None)
    reference = weakref.ref(model)
    del model
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("kind", ["vit", "bert", "gpt2", "mixtral"])
def test_checkpointed_gradients_equal_plain_ones_and_keep_fewer_activations(kind: str) -> None:
    model, batch = tiny_model(kind).eval(), tiny_data(kind, 8)[:8]

    def measured() -> tuple[dict[str, Tensor], int]:
        found: dict[str, Tensor] = {}
        kept: list[int] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            gradient_pass(model, batch, lambda name, gradient: found.update({name: gradient.clone()}))
        return found, sum(kept)

    plain, activations = measured()
    with checkpointing(model, asked=True):
        checkpointed, fewer = measured()
        assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert plain.keys() == checkpointed.keys() and fewer < activations
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, atol=1e-6, rtol=1e-5)
    assert measured()[1] == activations


def test_checkpointing_is_never_reentrant() -> None:
    """A reentrant checkpoint would call the hook of a layer once per use, with partial gradients."""
    model, batch = tiny_model("vit").eval(), tiny_data("vit", 8)[:8]
    layers: Any = model.get_submodule("vit.layers")
    layers[1] = layers[0]
    model.gradient_checkpointing_enable({"use_reentrant": True})
    seen: list[str] = []
    gradient_pass(model, batch, lambda name, gradient: seen.append(name))
    assert len(seen) == len(set(seen)) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_a_merge_with_checkpointing_gives_what_one_without_gives(name: str, tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("bert"), 1), tmp_path / "source")
    data = tiny_data("bert", 16)
    models = []
    for arguments in ({}, {name: True}):
        config = GraspConfig(
            **{**NO_TUNING, "finetune_epochs": 1},
            method="blend",
            num_batches=2,
            batch_size=8,
            training_arguments=arguments,
        )
        models.append(tiny_model("bert"))
        GraspMerger(models[-1], config).merge([source], train_dataset=data, eval_dataset=data)
    for plain, checkpointed in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(checkpointed, plain, atol=1e-4, rtol=1e-4)


def test_a_model_that_cannot_checkpoint_says_so(tmp_path: Path) -> None:
    config = GraspConfig(initial_epochs=1, training_arguments={"gradient_checkpointing": True})
    with pytest.raises(ConfigError, match="training_arguments: gradient_checkpointing: .*ResNet"):
        GraspMerger(tiny_model("resnet"), config).merge([], train_dataset=tiny_data("resnet", 8))


def test_checkpointing_of_an_encoder_and_a_decoder_with_configs_of_their_own() -> None:
    """The encoder and the decoder of a T5 have one config each, with its own `use_cache`."""
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "decoder_start_token_id": 0}
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    ids = torch.arange(16).view(2, 8)
    found: list[dict[str, Tensor]] = []
    for asked in (False, True):
        gradients: dict[str, Tensor] = {}
        with checkpointing(model, asked):
            gradient_pass(model, {"input_ids": ids, "labels": ids}, lambda n, g, into=gradients: into.update({n: g}))  # type: ignore[misc]
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)
    assert all(part.config.use_cache for part in (model, model.decoder))
