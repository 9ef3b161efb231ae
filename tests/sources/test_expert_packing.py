"""LoRA of fused experts means the same in every packing: the weights are compared with sums over experts and ranks."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GptOssConfig, GptOssForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from tests.support.models import NO_TUNING

EXPERTS, RANK, ALPHA = 3, 2, 5
SIZES: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "head_dim": 8}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 2}
PARAMETERS = ("gate_up_proj", "down_proj")
PREFIX = "base_model.model.model.layers.0.mlp.experts"


def model(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "transposed":  # the experts of GPT-OSS are stored by input
        sizes: dict[str, Any] = {
            "intermediate_size": 16,
            "num_local_experts": EXPERTS,
            "layer_types": ["full_attention"],
        }
        return GptOssForCausalLM(GptOssConfig(**SIZES, **HEADS, **sizes))
    width = 16 if kind == "square" else 12
    sizes = {"moe_intermediate_size": width, "intermediate_size": 32, "num_experts": EXPERTS}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **HEADS, **sizes))


def made(kind: str, folder: Path) -> tuple[Path, Path]:
    """Write a base, and an adapter of its experts by the installed PEFT."""
    base, adapter = folder / "base", folder / "adapter"
    model(kind).save_pretrained(base)
    names = [f"mlp.experts.{name}" for name in PARAMETERS]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    adapted = peft.get_peft_model(model(kind), config)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape)
    adapted.save_pretrained(str(adapter))
    return base, adapter


def changes(adapter: Path, kind: str) -> dict[str, Tensor]:
    """Return the change of each parameter, as the installed PEFT packs it: lora_B has one expert every EXPERTS columns."""
    weights = load_file(adapter / "adapter_model.safetensors")
    wrapped = dict(zip((f"{PREFIX}.base_layer", PREFIX), order(weights), strict=True))
    found = {}
    for place, name in wrapped.items():
        a, b = weights[f"{place}.lora_A.weight"], weights[f"{place}.lora_B.weight"]
        change = torch.zeros(EXPERTS, b.shape[0], a.shape[1])
        for expert in range(EXPERTS):
            for k in range(RANK):
                change[expert] += torch.outer(b[:, k * EXPERTS + expert], a[expert * RANK + k])
        found[name] = ALPHA / RANK * (change.transpose(1, 2) if kind == "transposed" else change)
    return found


def order(weights: dict[str, Tensor]) -> tuple[str, str]:
    """Return the names of the parameters in the inner and in the outer layer: the outputs of gate and up are wider."""
    inner, outer = (weights[f"{place}.lora_B.weight"].shape[0] for place in (f"{PREFIX}.base_layer", PREFIX))
    return ("down_proj", "gate_up_proj") if inner < outer else ("gate_up_proj", "down_proj")


def rewritten(adapter: Path, *, swap: bool = False, grouped: bool = False, **options: Any) -> None:
    """Pack the weights of an adapter in another way, and change its configuration."""
    file = adapter / "adapter_model.safetensors"
    weights = load_file(file)
    for place in {key.partition(".lora_")[0] for key in weights}:
        a, b = weights[f"{place}.lora_A.weight"], weights[f"{place}.lora_B.weight"]
        if swap:  # each expert's matrix is transposed, so A and B change places
            rows = torch.stack([b[:, k * EXPERTS + e] for e in range(EXPERTS) for k in range(RANK)])
            columns = torch.stack([a[e * RANK + k] for k in range(RANK) for e in range(EXPERTS)], dim=1)
            a, b = rows, columns
        if grouped:
            b = torch.stack([b[:, k * EXPERTS + e] for e in range(EXPERTS) for k in range(RANK)], dim=1)
        weights |= {f"{place}.lora_A.weight": a.contiguous(), f"{place}.lora_B.weight": b.contiguous()}
    save_file(weights, file)
    path = adapter / "adapter_config.json"
    settings = json.loads(path.read_text()) | options
    path.write_text(json.dumps({key: value for key, value in settings.items() if value != "removed"}))


def assert_merged(base: Path, adapter: Path, kind: str, expected: dict[str, Tensor]) -> None:
    merger = GraspMerger.from_pretrained(str(base), config=GraspConfig(method="average", **NO_TUNING))
    merger.merge([str(adapter)])
    for name in PARAMETERS:
        key = f"model.layers.0.mlp.experts.{name}"
        got = merger.model.get_parameter(key) - model(kind).get_parameter(key)
        torch.testing.assert_close(got, expected[name], rtol=1e-5, atol=1e-5)


KINDS = ("oblong", "square", "transposed")


@pytest.mark.parametrize("kind", KINDS)
def test_experts_as_the_installed_peft_packs_them(kind: str, tmp_path: Path) -> None:
    base, adapter = made(kind, tmp_path)
    assert_merged(base, adapter, kind, changes(adapter, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_grouped_by_expert(kind: str, tmp_path: Path) -> None:
    base, adapter = made(kind, tmp_path)
    expected = changes(adapter, kind)
    rewritten(adapter, grouped=True, lora_B_layout="grouped_by_expert")
    assert_merged(base, adapter, kind, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("written_by", ["0.17.0", "0.18.1", "0.18.2.dev0@abcdef", "0.19.0", "0.19.1", "0.21.0"])
def test_experts_as_earlier_versions_pack_them(written_by: str, kind: str, tmp_path: Path) -> None:
    """Below 0.19 the second dimension is always the output, in 0.19.0 only for parameters that are not transposed."""
    base, adapter = made(kind, tmp_path)
    expected = changes(adapter, kind)
    below = written_by < "0.19"
    swap = (below and kind != "transposed") or (written_by == "0.19.0")
    rewritten(
        adapter, swap=swap, peft_version="removed" if written_by == "0.17.0" and kind == "transposed" else written_by
    )
    assert_merged(base, adapter, kind, expected)


@pytest.mark.parametrize("written_by", ["removed", None, "main"])
def test_a_square_parameter_needs_the_version_that_wrote_it(written_by: str | None, tmp_path: Path) -> None:
    base, adapter = made("square", tmp_path)
    rewritten(adapter, peft_version=written_by)
    with pytest.raises(IncompatibleSourceError, match=r"PEFT below 0.19.1 transposes it; expected the version"):
        assert_merged(base, adapter, "square", {})


def test_without_a_version_the_shapes_of_an_oblong_parameter_tell(tmp_path: Path) -> None:
    base, adapter = made("oblong", tmp_path)
    expected = changes(adapter, "oblong")
    rewritten(adapter, swap=True, peft_version="removed")
    assert_merged(base, adapter, "oblong", expected)


def test_an_unknown_packing_is_refused(tmp_path: Path) -> None:
    base, adapter = made("oblong", tmp_path)
    rewritten(adapter, lora_B_layout="interleaved")
    with pytest.raises(
        IncompatibleSourceError,
        match="sets lora_B_layout: 'interleaved', expected 'rank_major' or 'grouped_by_expert'",
    ):
        assert_merged(base, adapter, "oblong", {})


def test_the_packing_of_an_adapter_without_experts_does_not_matter(tmp_path: Path) -> None:
    base = tmp_path / "base"
    model("oblong").save_pretrained(base)
    adapted = peft.get_peft_model(model("oblong"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    rewritten(tmp_path / "adapter", lora_B_layout="grouped_by_expert")
    names = {name: f"model.layers.0.mlp.experts.{name}" for name in PARAMETERS}
    zeros = {name: torch.zeros_like(model("oblong").get_parameter(key)) for name, key in names.items()}
    assert_merged(base, tmp_path / "adapter", "oblong", zeros)
