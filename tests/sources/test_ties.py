"""A source or an adapter of tied weights gives its own function, or is refused unless the target is untied."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.config.recipe import Recipe
from grasp_hf.errors import ConfigError
from grasp_hf.models.target import untie_
from grasp_hf.runs.plan import plan, problem_list
from grasp_hf.tensors.units import tied_names
from tests.support.models import NO_TUNING

TOKENS = torch.arange(3, 19)[None]
SIZES: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
TIE = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture
def base(tmp_path: Path) -> str:
    torch.manual_seed(0)
    Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def merged(base: str, source: str, *, untie: bool) -> GraspMerger:
    """Return the merge that takes one source whole."""
    config = GraspConfig(method="average", untie=untie, **NO_TUNING)
    merger = GraspMerger.from_pretrained(base, config=config)
    merger.merge([source])
    return merger


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


def adapter_of(base: str, folder: Path, **config: Any) -> tuple[str, Tensor]:
    """Write an adapter with random weights; return its folder and its logits as PEFT computes them."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM.from_pretrained(base)
    model.name_or_path = base
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **config)
    )
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    adapted.save_pretrained(str(folder))
    return str(folder), logits(peft.PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), str(folder)))


ONE_SIDE: dict[str, dict[str, Any]] = {
    "LoRA of the output layer": {"target_modules": ["q_proj", "lm_head"]},
    "LoRA of the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "LoRA of both": {"target_modules": ["embed_tokens", "lm_head"]},
    "trained output layer": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "trained embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "trained embedding and output layer": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
    },
}
BOTH_SIDES: dict[str, dict[str, Any]] = {
    "LoRA, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "trained embedding, tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "trained tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    "neither": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("name", ONE_SIDE)
def test_an_adapter_of_one_side_of_a_tie(name: str, base: str, tmp_path: Path) -> None:
    adapter, expected = adapter_of(base, tmp_path / "adapter", **ONE_SIDE[name])
    with pytest.raises(
        IncompatibleSourceError, match=r"lm_head.weight and model.embed_tokens.weight differ.*with untie: true"
    ):
        merged(base, adapter, untie=False)
    model = merged(base, adapter, untie=True).model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("untie", [False, True])
@pytest.mark.parametrize("name", BOTH_SIDES)
def test_an_adapter_of_both_sides_of_a_tie(name: str, untie: bool, base: str, tmp_path: Path) -> None:
    adapter, expected = adapter_of(base, tmp_path / "adapter", **BOTH_SIDES[name])
    model = merged(base, adapter, untie=untie).model
    assert bool(tied_names(model)) is not untie
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("saved", [[], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_embeddings_that_an_adapter_brings_along(saved: list[str], base: str, tmp_path: Path) -> None:
    """PEFT can save the embeddings of the base with an adapter, trained ones under two names."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=saved)
    adapted = peft.get_peft_model(Qwen2ForCausalLM.from_pretrained(base), config)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "adapter/adapter_model.safetensors"))
    expected = logits(
        peft.PeftModel.from_pretrained(Qwen2ForCausalLM.from_pretrained(base), str(tmp_path / "adapter"))
    )
    merger = merged(base, str(tmp_path / "adapter"), untie=False)
    assert merger.report.steps[0].notes == []
    torch.testing.assert_close(logits(merger.model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]], ids=str)
def test_an_adapter_of_a_resized_base_is_refused_with_advice(saved: Any, base: str, tmp_path: Path) -> None:
    model = Qwen2ForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(53)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=saved))
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(
        IncompatibleSourceError,
        match=r"got shape \(53, 16\), expected \(50, 16\); the base has 50 tokens, and the adapter belongs to 53: merge it",
    ):
        merged(base, str(tmp_path / "adapter"), untie=False)


def test_an_untied_merge_is_saved_as_two_matrices(base: str, tmp_path: Path) -> None:
    adapter, expected = adapter_of(base, tmp_path / "adapter", **ONE_SIDE["LoRA of the output layer"])
    merged(base, adapter, untie=True).save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    assert set(TIE) <= load_file(tmp_path / "out/model.safetensors").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not tied_names(GraspMerger.from_pretrained(str(tmp_path / "out")).model)


def test_an_untied_model_computes_the_same(base: str) -> None:
    model = Qwen2ForCausalLM.from_pretrained(base)
    before = logits(model)
    untie_(model)
    assert not tied_names(model) and model.config.tie_word_embeddings is False
    assert torch.equal(logits(model), before)
    model.tie_weights()
    assert not tied_names(model)


def test_every_tie_of_a_model_is_undone() -> None:
    model = BertForMaskedLM(BertConfig(**SIZES, num_attention_heads=2, max_position_embeddings=32))
    assert len(tied_names(model)) == 2  # the weight and the bias of the decoder
    untie_(model)
    assert not tied_names(model)


def test_an_architecture_that_scales_tied_weights_stays_tied() -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    config: Any = UMT5Config(**sizes, decoder_start_token_id=0)
    model = UMT5ForConditionalGeneration(config)
    assert tied_names(model)
    with pytest.raises(ConfigError, match="untie: a UMT5ForConditionalGeneration computes something else"):
        untie_(model)


def test_files_whose_tied_names_differ_are_two_matrices(base: str, tmp_path: Path) -> None:
    """Transformers loads them as two matrices, although the config says that they are tied."""
    other = tmp_path / "other"
    Qwen2ForCausalLM.from_pretrained(base).save_pretrained(other)
    tensors = load_file(other / "model.safetensors")
    save_file(tensors | {TIE[1]: torch.randn(50, 16)}, other / "model.safetensors", {"format": "pt"})
    expected = logits(Qwen2ForCausalLM.from_pretrained(other))
    with pytest.raises(IncompatibleSourceError, match="differ, but they are tied in the target"):
        merged(base, str(other), untie=False)
    for target, untie in ((base, True), (str(other), False)):
        merger = merged(target, str(other), untie=untie)
        assert torch.equal(logits(merger.model), expected)
        merger.save_pretrained(tmp_path / "out")
        assert torch.equal(logits(Qwen2ForCausalLM.from_pretrained(tmp_path / "out")), expected)
    adapter, expected = adapter_of(str(other), tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    model = merged(str(other), adapter, untie=False).model
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_tied_source_fills_both_matrices_of_an_untied_target(base: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    source = Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=True))
    source.save_pretrained(tmp_path / "source")
    assert torch.equal(logits(merged(base, str(tmp_path / "source"), untie=True).model), logits(source))


def test_the_plan_knows_ties(base: str, tmp_path: Path) -> None:
    sources = {"tied": True, "untied": False}
    for name, tie in sources.items():
        Qwen2ForCausalLM(Qwen2Config(**SIZES, **HEADS, tie_word_embeddings=tie)).save_pretrained(tmp_path / name)
    for untie in (False, True):
        config = GraspConfig(method="average", untie=untie, **NO_TUNING)
        recipe = Recipe(base_model=base, sources=[str(tmp_path / name) for name in sources], config=config)
        problems = problem_list(plan(recipe))
        assert len(problems) == (0 if untie else 1)
        assert untie or "weights are tied in the target but not in the source" in problems[0]
