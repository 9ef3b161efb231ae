"""Types and options of adapters with the outcome of a merge that takes one whole: exact, or refused.

`python -m tests.support.exact --table` prints the table; the tests in `tests/sources/test_exact.py` prove it.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora.config import BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from grasp_hf import GraspConfig, GraspMerger
from tests.support.models import NO_TUNING, tiny_model

TOLERANCE = 1e-5  # of the largest logit
TOKENS = torch.arange(48)[None]
BODY = ["q_proj", "v_proj", "up_proj"]
BOTH = ["embed_tokens", "lm_head"]
NO_MERGE = "cannot be merged into weights"
RANDOM_START = "sets init_lora_weights|started with init_lora_weights"


@dataclass(frozen=True)
class Case:
    """An adapter.

    Attributes:
        config: Returns its configuration.
        model: Kind of its base: `"lm"`, a language model, or a kind of `tiny_model`.
        refused: Regular expression of the error; empty if the merge is exact.
        splits: Whether it changes one of two tied weights, or both in different ways.
    """

    config: Callable[[], Any]
    model: str = "lm"
    refused: str = ""
    splits: bool = False


def lora(*, model: str = "lm", refused: str = "", splits: bool = False, **options: Any) -> Case:
    """Return a LoRA adapter of rank 2."""
    return Case(lambda: peft.LoraConfig(**{"r": 2, "target_modules": BODY, **options}), model, refused, splits)


def other(name: str, *, model: str = "lm", refused: str = "", splits: bool = False, **options: Any) -> Case:
    """Return an adapter of another type; `name` is that of its configuration in PEFT."""
    return Case(lambda: getattr(peft, name)(**{"target_modules": BODY, **options}), model, refused, splits)


CASES: dict[str, Case] = {
    "LoRA": lora(),
    "LoRA with dropout": lora(lora_dropout=0.5),
    "rsLoRA": lora(use_rslora=True),
    "DoRA": lora(use_dora=True),
    "LoRA, `bias: all`": lora(bias="all"),
    "LoRA, `bias: lora_only`": lora(bias="lora_only"),
    "LoRA, `lora_bias`": lora(lora_bias=True, target_modules=["q_proj", "v_proj"]),
    "LoRA, rank and alpha patterns": lora(rank_pattern={"up_proj": 3}, alpha_pattern={r"layers.1.*q_proj": 5}),
    "LoRA of some layers": lora(layers_to_transform=[1]),
    "LoRA, `exclude_modules`": lora(exclude_modules=["up_proj"]),
    "LoRA by regular expression": lora(target_modules=r".*layers\.0.*(q|k)_proj"),
    "LoRA, `all-linear`": lora(target_modules="all-linear"),
    "LoRA, trained head": lora(modules_to_save=["classifier"], target_modules=["query"], model="bert"),
    "LoRA of the output layer": lora(target_modules=["q_proj", "lm_head"], splits=True),
    "LoRA of the embedding": lora(target_modules=["q_proj", "embed_tokens"], splits=True),
    "LoRA of embedding and output layer": lora(target_modules=BOTH, splits=True),
    "LoRA of both, `ensure_weight_tying`": lora(target_modules=BOTH, ensure_weight_tying=True),
    "trained output layer": lora(modules_to_save=["lm_head"], splits=True),
    "trained embedding": lora(modules_to_save=["embed_tokens"], splits=True),
    "trained embedding and output layer": lora(modules_to_save=BOTH, splits=True),
    "trained embedding, `ensure_weight_tying`": lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "LoRA and trained tokens": lora(trainable_token_indices=[1, 7]),
    "LoRA and trained tokens of both": lora(trainable_token_indices={"embed_tokens": [1, 7], "lm_head": [1, 7]}),
    "trained tokens": Case(lambda: peft.TrainableTokensConfig(token_indices=[1, 7])),
    "LoRA of transposed layers": lora(model="gpt2", target_modules=["c_attn"], fan_in_fan_out=True),
    "LoRA of fused experts": lora(
        model="mixtral", target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    ),
    "LoRA of convolutions": lora(model="resnet", target_modules=["convolution"]),
    "DoRA of convolutions": lora(model="resnet", target_modules=["convolution"], use_dora=True),
    "LoRA, `gaussian`": lora(init_lora_weights="gaussian"),
    "LoRA, `orthogonal`": lora(init_lora_weights="orthogonal"),
    "LoRA, `olora`": lora(init_lora_weights="olora"),
    "LoRA, `mica`": lora(init_lora_weights="mica"),
    "LoRA, `eva`": lora(init_lora_weights="eva", eva_config=peft.EvaConfig()),
    "PiSSA": lora(init_lora_weights="pissa"),
    "PiSSA by a random method": lora(init_lora_weights="pissa_niter_4", refused=RANDOM_START),
    "LoRA-GA, not converted": lora(
        init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig(), refused=RANDOM_START
    ),
    "QALoRA": lora(use_qalora=True, qalora_group_size=8),
    "BD-LoRA": lora(use_bdlora=BdLoraConfig(["q_proj"], ["v_proj", "up_proj"], nblocks=2)),
    "VeLoRA": lora(velora_config=VeloraConfig()),
    "KaSA": lora(kasa_config=KasaConfig()),
    "MonteCLoRA": lora(monteclora_config=MontecloraConfig()),
    "activated LoRA": lora(alora_invocation_tokens=[1], task_type="CAUSAL_LM", refused="sets alora_invocation_tokens"),
    "LoRA of replicated layers": lora(layer_replication=[(0, 2), (1, 2)], refused="sets layer_replication"),
    "AdaLoRA": other("AdaLoraConfig", total_step=10),
    "AdaMSS": other("AdamssConfig", r=8, num_subspaces=2, subspace_rank=1),
    "BEFT": other("BeftConfig", target_modules=["v_proj"]),
    "BOFT": other("BOFTConfig", boft_block_size=4),
    "C3A": other("C3AConfig", block_size=8),
    "DEFT": other("DeftConfig", r=2),
    "DeLoRA": other("DeloraConfig", r=2),
    "FourierFT": other("FourierFTConfig", n_frequency=20),
    "FRoD": other("FrodConfig", target_modules=["q_proj", "v_proj"], progressbar=False),
    "GLoRA": other("GloraConfig", r=2),
    "GraLoRA": other("GraloraConfig", r=4, gralora_k=2),
    "HiRA": other("HiraConfig", r=2),
    "HRA": other("HRAConfig", r=2),
    "HRA, `apply_GS`": other("HRAConfig", r=2, apply_GS=True),
    "IA3": other("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LayerNorm tuning": other("LNTuningConfig", target_modules=["input_layernorm", "norm"]),
    "Lily": other("LilyConfig", r=2, refused=NO_MERGE),
    "LoHa": other("LoHaConfig", r=2),
    "LoHa of convolutions": other("LoHaConfig", r=2, model="resnet", target_modules=["convolution"]),
    "LoKr": other("LoKrConfig", r=2),
    "LoKr, `decompose_both`": other("LoKrConfig", r=2, decompose_both=True, decompose_factor=4),
    "MiSS": other("MissConfig", r=2),
    "MiSS, `bat`": other("MissConfig", r=8, init_weights="bat"),
    "MiSS, `mini`": other("MissConfig", r=4, mini_r=2, init_weights="mini"),
    "OFT": other("OFTConfig", oft_block_size=8),
    "OFT, `coft`": other("OFTConfig", oft_block_size=8, coft=True, eps=0.1),
    "OFT, `block_share`": other("OFTConfig", oft_block_size=8, block_share=True),
    "OFT without Cayley–Neumann": other("OFTConfig", oft_block_size=8, use_cayley_neumann=False),
    "OSF": other("OSFConfig", effective_rank=4),
    "PEANuT": other("PeanutConfig", r=2),
    "Poly": other("PolyConfig", r=2, refused=NO_MERGE),
    "prefix tuning": Case(lambda: peft.PrefixTuningConfig("CAUSAL_LM", num_virtual_tokens=2), refused=NO_MERGE),
    "prompt tuning": Case(lambda: peft.PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=2), refused=NO_MERGE),
    "PSOFT": other("PsoftConfig", r=4),
    "PVeRA": other("PveraConfig", r=4, target_modules=["q_proj"]),
    "PVeRA, `sample_at_inference`": other(
        "PveraConfig", r=4, target_modules=["q_proj"], sample_at_inference=True, refused="sets sample_at_inference"
    ),
    "RandLoRA": other("RandLoraConfig", r=4),
    "RandLoRA, projection from its seed": other("RandLoraConfig", r=4, save_projection=False),
    "RoAd": other("RoadConfig", group_size=8),
    "Shadow": Case(lambda: peft.ShadowConfig(r=2), refused=NO_MERGE),
    "SHiRA": other("ShiraConfig", r=2),
    "SuperTuning": other("SupertuningConfig"),
    "TinyLoRA": other("TinyLoraConfig"),
    "TinyLoRA, projection from its seed": other("TinyLoraConfig", save_projection=False),
    "UniLoRA": other("UniLoraConfig", theta_d_length=16),
    "VB-LoRA": other("VBLoRAConfig", r=2, num_vectors=8, vector_length=8),
    "VB-LoRA, top k only": other("VBLoRAConfig", r=2, num_vectors=8, vector_length=8, save_only_topk_weights=True),
    "VeRA": other("VeraConfig", r=4, target_modules=["q_proj"]),
    "VeRA, projection from its seed": other("VeraConfig", r=4, target_modules=["q_proj"], save_projection=False),
    "WaveFT": other("WaveFTConfig", n_frequency=20),
}


def base_model(kind: str, *, tied: bool = False) -> Any:
    """Return a tiny base model, whose weights are large enough that a change of them shows in the logits."""
    torch.manual_seed(0)
    if kind != "lm":
        return tiny_model(kind)
    sizes: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=50, **sizes, **heads, tie_word_embeddings=tied))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3)
    return model


def save_case(case: Case, folder: Path, *, tied: bool = False, dtypes: tuple[Any, Any] = (torch.float32,) * 2) -> Any:
    """Write a base and a random adapter of it in two dtypes.

    Returns:
        The model's class, and the folders of the base and of the adapter.
    """
    base, adapter = str(folder / "base"), str(folder / "adapter")
    model = base_model(case.model, tied=tied)
    model.to(dtypes[0]).save_pretrained(base)
    cls = type(model)
    adapted: Any = peft.get_peft_model(cls.from_pretrained(base, dtype=torch.float32), case.config())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter += 0.1 * torch.randn(parameter.shape)
    adapted.peft_config["default"].base_model_name_or_path = base
    for name, tensor in adapted.named_parameters():
        if tensor.requires_grad and tensor.is_floating_point() and "base_layer" not in name:
            tensor.data = tensor.data.to(dtypes[1])
    adapted.save_pretrained(adapter)
    return cls, base, adapter


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Return the logits of a model in float32 on fixed inputs."""
    model = model.float().eval()
    name = model.main_input_name if isinstance(model, PreTrainedModel) else model.get_base_model().main_input_name
    if name == "pixel_values":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16).sin()).logits
    return model(input_ids=TOKENS[:, :16] if model.config.model_type in ("bert", "gpt2", "mixtral") else TOKENS).logits


def logits_of_peft(cls: Any, base: str, adapter: str) -> Tensor:
    """Return the logits with the adapter active, as PEFT runs it on the base in float32."""
    return logits(peft.PeftModel.from_pretrained(cls.from_pretrained(base, dtype=torch.float32), adapter))


def merged(base: str, adapter: str, *, untie: bool = False, dtype: Any = torch.float32) -> Any:
    """Return the merge that takes the adapter whole."""
    config = GraspConfig(method="average", untie=untie, **NO_TUNING)
    merger = GraspMerger.from_pretrained(base, config=config, dtype=dtype)
    merger.merge([adapter])
    return merger.model


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", required=True, help="print the table")
    parser.parse_args()
    print("| adapter | base | merge | weights tied in the base |\n|---|---|---|---|")
    for name, case in CASES.items():
        outcome = "refused" if case.refused else "exact"
        tied = "" if case.model != "lm" else "refused; exact with `untie`" if case.splits else outcome
        print(f"| {name} | {case.model} | {outcome} | {tied} |")


if __name__ == "__main__":
    main()
