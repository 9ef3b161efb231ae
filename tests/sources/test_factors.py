"""An adapter as a block of a mixture has the logits of PEFT; one that is more than low-rank changes is refused with words."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertModel

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.config.recipe import Recipe
from grasp_hf.errors import NonFiniteError
from grasp_hf.runs.plan import plan, problem_list
from tests.sources.test_adapters import ADAPTERS, BODY, HEAD, made_adapter, save_adapter
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model

SETTINGS: dict[str, Any] = {"method": "average", "output": "adapter", **NO_TUNING}
REFUSED = {
    "DoRA": "use_dora: got True",
    "LoRA bias=all": "bias: got 'all'",
    "LoRA bias=lora_only": "bias: got 'lora_only'",
    "LoRA lora_bias": "lora_bias: got True",
    "LoRA of tokens": "trainable_token_indices",
    "LoRA of fused experts": "target_parameters",
    "LoRA of convolutions": "a Conv2d; output='adapter' mixes adapters of linear layers and embeddings only",
    "DoRA of convolutions": "use_dora: got True",
}


@torch.no_grad()
def logits(model: Any, kind: str) -> Tensor:
    inputs = {key: value for key, value in tiny_data(kind, 8)[:8].items() if key != "labels"}
    return model.eval()(**inputs).logits


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_has_the_logits_of_peft_or_is_refused(name: str, tmp_path: Path) -> None:
    kind, base, adapter = made_adapter(name, tmp_path)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**SETTINGS))
    before = logits(merger.model, kind)
    is_lora = name.startswith(("LoRA", "DoRA", "rsLoRA"))
    if name in REFUSED or not is_lora:
        words = REFUSED.get(name, "expected LoRA with output='adapter'")
        with pytest.raises(IncompatibleSourceError, match=f"(?s){words}.*output='model'"):
            merger.merge([adapter])
        assert torch.equal(logits(merger.model, kind), before)
        return
    merger.merge([adapter])
    expected = logits(PeftModel.from_pretrained(type(merger.model).from_pretrained(base), adapter), kind)
    assert not torch.allclose(expected, before, atol=1e-4)
    torch.testing.assert_close(logits(merger.model, kind), expected, atol=1e-5, rtol=0)
    merger.save_pretrained(tmp_path / "merged")
    again = PeftModel.from_pretrained(type(merger.model).from_pretrained(base), str(tmp_path / "merged"))
    torch.testing.assert_close(logits(again, kind), expected, atol=1e-5, rtol=0)


def test_the_plan_names_what_cannot_be_a_block(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    dora = save_adapter(
        tiny_model("vit"), peft.LoraConfig(target_modules=BODY, use_dora=True), base, tmp_path / "dora"
    )
    body = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm"])
    whole = save_adapter(tiny_model("vit"), body, base, tmp_path / "whole")
    pissa = save_adapter(
        tiny_model("vit"), peft.LoraConfig(target_modules=BODY, init_lora_weights="pissa"), base, tmp_path / "pissa"
    )
    full = saved(perturbed(tiny_model("vit"), 1), tmp_path / "full")
    good = save_adapter(tiny_model("vit"), peft.LoraConfig(target_modules=BODY, **HEAD), base, tmp_path / "good")
    recipe = Recipe.from_dict({"base_model": base, "sources": [dora, whole, pissa, full, good], **SETTINGS})
    problems = problem_list(plan(recipe))
    expected = ["use_dora: got True", "whole modules (layernorm)", "init_lora_weights 'pissa'", "it is a full model"]
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected, strict=True):
        assert words in problem and "output='model'" in problem
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**SETTINGS))
    for source, words in zip((dora, whole, pissa, full), expected, strict=True):
        with pytest.raises(IncompatibleSourceError) as caught:
            merger.merge([source])
        assert words in str(caught.value)
    merger.merge([good])


def test_a_weight_that_is_not_finite_is_an_error(tmp_path: Path) -> None:
    _, base, adapter = made_adapter("LoRA", tmp_path)
    path = Path(adapter, "adapter_model.safetensors")
    weights = load_file(path)
    key = next(key for key in weights if "lora_B" in key)
    weights[key][0, 0] = float("nan")
    save_file(weights, path)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**SETTINGS))
    with pytest.raises(NonFiniteError, match="lora_B"):
        merger.merge([adapter])


def test_heads_are_matched_by_the_names_of_their_classes(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    config = peft.LoraConfig(target_modules=BODY, **HEAD)
    model = tiny_model("vit", labels=["dog", "bird", "cat"])
    adapter = save_adapter(model, config, base, tmp_path / "adapter")
    model.config.save_pretrained(adapter)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**SETTINGS))
    report = merger.merge([adapter])
    assert "classes matched by name" in report.steps[0].notes[0]
    own = PeftModel.from_pretrained(tiny_model("vit", labels=["dog", "bird", "cat"]), adapter)
    torch.testing.assert_close(logits(merger.model, "vit"), logits(own, "vit")[:, [1, 2, 0]], atol=1e-5, rtol=0)


def test_a_base_without_a_head_and_pooler(tmp_path: Path) -> None:
    """Modules that the files of the base lack are trained and saved whole, because nobody else has these values."""
    full: Any = tiny_model("bert")
    base = tmp_path / "base"
    body = BertModel(full.config, add_pooling_layer=False)
    body.load_state_dict(full.bert.state_dict(), strict=False)
    saved(body, base)
    config = GraspConfig(method="average", output="adapter", order="given", final_epochs=1)
    merger = GraspMerger.from_pretrained(
        str(base), config=config, task="text-classification", id2label=full.config.id2label, num_labels=3
    )
    sources = [
        save_adapter(
            tiny_model("bert"), peft.LoraConfig(target_modules=["query"]), str(base), tmp_path / f"{seed}", seed
        )
        for seed in (1, 2)
    ]
    merger.merge(sources, train_dataset=tiny_data("bert", 12))
    merger.save_pretrained(tmp_path / "merged")
    other = type(merger.model).from_pretrained(str(base), id2label=full.config.id2label)
    again = PeftModel.from_pretrained(other, str(tmp_path / "merged"))
    torch.testing.assert_close(logits(again, "bert"), logits(merger.model, "bert"), atol=1e-5, rtol=0)


def test_a_base_in_bfloat16_stays_as_it_is(tmp_path: Path) -> None:
    base = saved(tiny_model("gpt2").bfloat16(), tmp_path / "base")
    adapter = save_adapter(tiny_model("gpt2"), peft.LoraConfig(target_modules=["c_attn"]), base, tmp_path / "adapter")
    config = GraspConfig(output="adapter", final_epochs=1, batch_size=8, lora={"r": 2})
    merger = GraspMerger.from_pretrained(base, config=config)
    before = {name: p.clone() for name, p in merger.model.named_parameters() if "grasp" not in name}
    merger.merge([adapter], train_dataset=tiny_data("gpt2", 16))
    assert merger.model.dtype == torch.bfloat16
    assert all(torch.equal(p, before[name]) for name, p in merger.model.named_parameters() if name in before)
    merger.save_pretrained(tmp_path / "merged")
    again = type(merger.model).from_pretrained(base, dtype=torch.bfloat16)
    loaded = PeftModel.from_pretrained(again, str(tmp_path / "merged"))
    torch.testing.assert_close(logits(loaded, "gpt2"), logits(merger.model, "gpt2"), atol=2e-2, rtol=0)
