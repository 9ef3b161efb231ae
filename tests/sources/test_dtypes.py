"""An adapter is merged in float32, whatever the dtype of its base, and rounded once into the dtype of the target."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import NO_TUNING

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
CONFIGS: dict[str, Any] = {
    "LoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]),
    "DoRA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "PiSSA": lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa"),
    "trained tokens": lambda: peft.LoraConfig(r=2, target_modules=["v_proj"], trainable_token_indices=[3]),
    "LoHa": lambda: peft.LoHaConfig(r=2, target_modules=["q_proj"]),
    "OFT": lambda: peft.OFTConfig(target_modules=["q_proj"], oft_block_size=8),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VeRA": lambda: peft.VeraConfig(r=4, target_modules=["q_proj"]),
}


def made(config: Any, folder: Path, base_dtype: torch.dtype, adapter_dtype: torch.dtype) -> tuple[str, str]:
    """Write a base, and an adapter that changes it by about a thousandth, as a real one does."""
    torch.manual_seed(0)
    base, adapter = str(folder / "base"), str(folder / "adapter")
    model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.to(base_dtype).save_pretrained(base)
    adapted = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 1e-3 * torch.randn(parameter.shape)
    adapted.peft_config["default"].base_model_name_or_path = base
    adapted.to(adapter_dtype).save_pretrained(adapter)
    return base, adapter


def by_peft(base: str, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of PEFT's own merge, with the base in float32."""
    model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(model, adapter)
    return movable_tensors(adapted.merge_and_unload())


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=["a32", "a16"])
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["b32", "bb16", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_half_precision_base_costs_no_part_of_an_adapter(
    name: str, base_dtype: torch.dtype, adapter_dtype: torch.dtype, tmp_path: Path
) -> None:
    base, adapter = made(CONFIGS[name](), tmp_path, base_dtype, adapter_dtype)
    expected = by_peft(base, adapter)
    for dtype in (torch.float32, torch.bfloat16):
        config = GraspConfig(method="average", **NO_TUNING)
        merger = GraspMerger.from_pretrained(base, config=config, dtype=dtype)
        merger.merge([adapter])
        for key, value in movable_tensors(merger.model).items():
            assert value.dtype == dtype
            torch.testing.assert_close(value, expected[key].to(dtype), rtol=0, atol=1e-7 if dtype.itemsize == 4 else 0)


def test_an_adapter_of_integers_is_refused(tmp_path: Path) -> None:
    base, adapter = made(CONFIGS["LoRA"](), tmp_path, torch.float32, torch.float32)
    file = Path(adapter) / "adapter_model.safetensors"
    save_file({key: value.to(torch.int32) for key, value in load_file(file).items()}, file)
    config = GraspConfig(method="average", **NO_TUNING)
    with pytest.raises(IncompatibleSourceError, match=r"got torch.int32, expected torch.float32"):
        GraspMerger.from_pretrained(base, config=config).merge([adapter])
