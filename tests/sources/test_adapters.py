"""An adapter of any type gives the weights of PEFT's own merge; a type that cannot be merged is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.sources.adapters import apply_adapter_
from grasp_hf.tensors.mapped import MappedTensors
from grasp_hf.tensors.units import movable_tensors
from tests.support.models import NO_TUNING, copied, saved, tiny_data, tiny_model

STILL: dict[str, Any] = {**NO_TUNING, "gate": False, "batch_size": 8, "num_batches": 2}
COPY_ALL: dict[str, Any] = {**STILL, "method": "copy", "unit": "module", "threshold": -1.0}
BODY = ["q_proj", "v_proj", "fc1"]
HEAD: dict[str, Any] = {"modules_to_save": ["classifier"]}

ADAPTERS: dict[str, tuple[str, Callable[[], Any]]] = {
    "LoRA": ("vit", lambda: peft.LoraConfig(target_modules=BODY, **HEAD)),
    "rsLoRA": ("vit", lambda: peft.LoraConfig(target_modules=BODY, use_rslora=True)),
    "DoRA": ("vit", lambda: peft.LoraConfig(target_modules=BODY, use_dora=True)),
    "LoRA bias=all": ("vit", lambda: peft.LoraConfig(target_modules=BODY, bias="all")),
    "LoRA bias=lora_only": ("vit", lambda: peft.LoraConfig(target_modules=BODY, bias="lora_only")),
    "LoRA lora_bias": ("vit", lambda: peft.LoraConfig(target_modules=BODY, lora_bias=True)),
    "LoRA patterns": (
        "vit",
        lambda: peft.LoraConfig(
            target_modules=BODY, r=2, rank_pattern={"fc1": 3}, alpha_pattern={r"layers.1.*q_proj": 5}
        ),
    ),
    "LoRA of the head": ("vit", lambda: peft.LoraConfig(target_modules=["q_proj", "classifier"])),
    "LoRA of embeddings": ("bert", lambda: peft.LoraConfig(target_modules=["word_embeddings", "query"])),
    "LoRA of transposed layers": ("gpt2", lambda: peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)),
    "LoRA of tokens": ("gpt2", lambda: peft.LoraConfig(target_modules=["c_attn"], trainable_token_indices=[1, 7])),
    "LoRA of fused experts": (
        "mixtral",
        lambda: peft.LoraConfig(
            target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
        ),
    ),
    "LoRA of convolutions": ("resnet", lambda: peft.LoraConfig(target_modules=["convolution"], **HEAD)),
    "DoRA of convolutions": ("resnet", lambda: peft.LoraConfig(target_modules=["convolution"], use_dora=True)),
    "LoHa": ("vit", lambda: peft.LoHaConfig(target_modules=BODY, **HEAD)),
    "LoHa of convolutions": ("resnet", lambda: peft.LoHaConfig(target_modules=["convolution"])),
    "LoKr": ("vit", lambda: peft.LoKrConfig(target_modules=BODY)),
    "IA3": ("vit", lambda: peft.IA3Config(target_modules=["q_proj", "fc2"], feedforward_modules=["fc2"])),
    "OFT": ("vit", lambda: peft.OFTConfig(target_modules=BODY, oft_block_size=8)),
    "BOFT": ("vit", lambda: peft.BOFTConfig(target_modules=BODY, boft_block_size=4, bias="boft_only")),
    "VeRA": ("vit", lambda: peft.VeraConfig(target_modules=["q_proj", "v_proj"], r=4)),
    "AdaLoRA": ("vit", lambda: peft.AdaLoraConfig(target_modules=BODY, total_step=10)),
    "HRA": ("vit", lambda: peft.HRAConfig(target_modules=BODY)),
    "FourierFT": ("vit", lambda: peft.FourierFTConfig(target_modules=BODY, n_frequency=20)),
    "LayerNorm tuning": ("vit", lambda: peft.LNTuningConfig(target_modules=["layernorm_before", "layernorm_after"])),
}


def save_adapter(model: PreTrainedModel, config: Any, base: str, folder: Path, seed: int = 1) -> str:
    """Write an adapter whose weights are all random."""
    torch.manual_seed(seed)
    adapter = get_peft_model(model, config)
    adapter.peft_config["default"].base_model_name_or_path = base
    with torch.no_grad():
        for parameter in adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    adapter.save_pretrained(str(folder))
    return str(folder)


def made_adapter(name: str, folder: Path) -> tuple[str, str, str]:
    """Return the kind of a model, the folder of a base and the folder of an adapter."""
    kind, config = ADAPTERS[name]
    base = saved(tiny_model(kind), folder / "base")
    return kind, base, save_adapter(tiny_model(kind), config(), base, folder / "adapter")


def by_peft(base: str, adapter: str) -> dict[str, Tensor]:
    """Return the tensors of a model that PEFT itself merged."""
    model = GraspMerger.from_pretrained(base).model
    return movable_tensors(PeftModel.from_pretrained(model, adapter).merge_and_unload())


def folder_source(folder: str | Path) -> Source:
    return Source.inspect(SourceRef(str(folder)), Path(folder))


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_source_equals_the_merge_of_peft(name: str, tmp_path: Path) -> None:
    kind, base, adapter = made_adapter(name, tmp_path)
    expected, plain = by_peft(base, adapter), movable_tensors(tiny_model(kind))
    changed = {key for key, value in expected.items() if not torch.equal(value, plain[key])}
    assert changed
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**COPY_ALL))
    step = merger.merge([adapter], train_dataset=tiny_data(kind, 16)).steps[0]
    merged = movable_tensors(merger.model)
    undefined = {unit.name for unit in step.units if unit.decision == "undefined"}
    assert not undefined or name == "LoRA of embeddings"
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, atol=1e-6, rtol=0)


def test_one_adapter_with_coefficient_one_has_the_same_effect(tmp_path: Path) -> None:
    kind, base, adapter = made_adapter("LoRA", tmp_path)
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **STILL))
    merger.merge([adapter])
    expected = PeftModel.from_pretrained(GraspMerger.from_pretrained(base).model, adapter).merge_and_unload().eval()
    inputs = tiny_data(kind, 8)[:8]
    assert torch.equal(merger.model.eval()(**inputs).logits, expected(**inputs).logits)


def test_adapters_of_different_ranks_are_averaged_as_weights(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    configs = [peft.LoraConfig(target_modules=BODY, r=r) for r in (1, 4, 7)]
    adapters = [
        save_adapter(tiny_model("vit"), config, base, tmp_path / str(config.r), seed=config.r) for config in configs
    ]
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **STILL))
    report = merger.merge(adapters)
    assert [step.units[0].coefficient for step in report.steps] == pytest.approx([1, 1 / 2, 1 / 3])
    each = [by_peft(base, adapter) for adapter in adapters]
    for key, value in movable_tensors(merger.model).items():
        torch.testing.assert_close(value, sum(tensors[key] for tensors in each) / 3, atol=1e-6, rtol=0)


def test_full_models_and_adapters_mix(tmp_path: Path) -> None:
    """The average of a unit is over the sources that hold it; an adapter does not hold the modules it leaves alone."""
    base = saved(tiny_model("vit"), tmp_path / "base")
    full = saved(tiny_model("vit", seed=5).bfloat16(), tmp_path / "full")
    adapter = save_adapter(tiny_model("vit"), peft.LoraConfig(target_modules=["fc1"]), base, tmp_path / "adapter")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **STILL))
    merger.merge([full, adapter])
    theirs, adapted = movable_tensors(tiny_model("vit", seed=5).bfloat16()), by_peft(base, adapter)
    for key, value in movable_tensors(merger.model).items():
        expected = (theirs[key].float() + adapted[key]) / 2 if "fc1" in key else theirs[key].float()
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["LoRA", "DoRA", "OFT", "LoRA of convolutions", "LoRA of embeddings"])
def test_what_an_adapter_changes_lies_in_a_file(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, base, adapter = made_adapter(name, tmp_path)
    made: list[MappedTensors] = []

    class Watched(MappedTensors):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr("grasp_hf.sources.adapters.MappedTensors", Watched)
    model = GraspMerger.from_pretrained(base).model
    before = {key: value.clone() for key, value in movable_tensors(model).items()}
    (tmp_path / "scratch").mkdir()
    applied = apply_adapter_(model, folder_source(adapter), tmp_path / "scratch")
    in_file = {tensor.data_ptr() for tensor in made[0].values()}
    for key, value in movable_tensors(applied.model).items():
        if not torch.equal(value, before[key]) and not any(key.startswith(f"{whole}.") for whole in applied.whole):
            assert value.data_ptr() in in_file, key


@pytest.mark.parametrize("name", ["LoRA", "LoRA patterns", "DoRA", "LoHa", "LoKr", "IA3", "OFT", "VeRA"])
@pytest.mark.parametrize("as_regex", [False, True])
def test_an_adapter_in_the_names_of_transformers_4(name: str, as_regex: bool, tmp_path: Path) -> None:
    """Transformers 4 called modules of a ViT attention.attention.query or output.dense; PEFT does not find them."""
    kind, base, adapter = made_adapter(name, tmp_path)
    expected = by_peft(base, adapter)
    old = copied(adapter, tmp_path / "old")
    names = {
        "q_proj": "attention.query",
        "v_proj": "attention.value",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
    }

    def renamed(key: str) -> str:
        key = key.replace("vit.layers.", "vit.encoder.layer.").replace(".mlp.", ".")
        for new, former in names.items():
            key = key.replace(f".{new}.", f".{former}.")
        return key

    weights = {renamed(key): value for key, value in load_file(old / "adapter_model.safetensors").items()}
    save_file(weights, old / "adapter_model.safetensors")
    config = json.loads((old / "adapter_config.json").read_text())
    short = {"q_proj": "query", "v_proj": "value", "fc1": "intermediate.dense", "fc2": "output.dense"}
    config["target_modules"] = [short[module] for module in config["target_modules"]]
    if as_regex:
        config["target_modules"] = rf".*\.({'|'.join(config['target_modules'])})"
    if "feedforward_modules" in config:
        config["feedforward_modules"] = ["output.dense"]
    if config.get("rank_pattern"):
        config["rank_pattern"] = {"intermediate.dense": 3}
        config["alpha_pattern"] = {r"layer.1.*query": 5}
    (old / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="(?i)target.modules"):
        by_peft(base, str(old))
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **STILL))
    merger.merge([str(old)])
    for key, value in movable_tensors(merger.model).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)


def test_an_adapter_of_a_swin_in_the_names_of_transformers_4(tmp_path: Path) -> None:
    config = SwinConfig(image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2)
    torch.manual_seed(0)
    model = SwinForImageClassification(config)
    base = str(tmp_path / "base")
    model.save_pretrained(base)
    runtime = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "attention" in name
    ]
    adapter = save_adapter(model, peft.LoraConfig(target_modules=runtime, r=2), base, tmp_path / "adapter")
    expected = by_peft(base, adapter)
    old = copied(adapter, tmp_path / "old")
    disk, memory = (
        load_file(Path(base) / "model.safetensors"),
        dict(GraspMerger.from_pretrained(base).model.named_parameters()),
    )
    former = {
        new: key
        for key, value in disk.items()
        for new, p in memory.items()
        if torch.equal(value, p) and "weight" in key
    }
    weights = load_file(old / "adapter_model.safetensors")
    found = {}
    for key, value in weights.items():
        module, _, rest = key.removeprefix("base_model.model.").partition(".lora_")
        found[f"base_model.model.{former[f'{module}.weight'].removesuffix('.weight')}.lora_{rest}"] = value
    assert found.keys() != weights.keys()
    save_file(found, old / "adapter_model.safetensors")
    values = json.loads((old / "adapter_config.json").read_text())
    values["target_modules"] = ["query", "key", "value", "attention.output.dense"]
    (old / "adapter_config.json").write_text(json.dumps(values))
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(method="average", **STILL))
    merger.merge([str(old)])
    for key, value in movable_tensors(merger.model).items():
        torch.testing.assert_close(value, expected[key], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        lambda: peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2),
        lambda: peft.PolyConfig(target_modules=["query"], r=2),
    ],
    ids=["PROMPT_TUNING", "PREFIX_TUNING", "POLY"],
)
def test_a_type_that_has_no_merge_is_refused_by_name(config: Callable[[], Any], tmp_path: Path) -> None:
    base = saved(tiny_model("bert"), tmp_path / "base")
    adapter = get_peft_model(tiny_model("bert"), config())
    adapter.peft_config["default"].base_model_name_or_path = base
    adapter.save_pretrained(str(tmp_path / "adapter"))
    kind = json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"]
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**STILL))
    with pytest.raises(IncompatibleSourceError, match=f"an adapter of type {kind} cannot be merged into weights"):
        merger.merge([str(tmp_path / "adapter")], train_dataset=tiny_data("bert", 8))


def test_another_base_can_be_accepted_by_name(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    config = peft.LoraConfig(target_modules=BODY, revision="v1")
    adapter = save_adapter(tiny_model("vit"), config, "org/copy-of-base", tmp_path / "adapter")
    data = {"train_dataset": tiny_data("vit", 8)}
    with pytest.raises(IncompatibleSourceError, match=r"accept it by name: accepted_bases=\['org/copy-of-base'\]"):
        GraspMerger.from_pretrained(base, config=GraspConfig(**STILL)).merge([adapter], **data)
    for name in ("org/copy-of-base", "org/copy-of-base@v1"):
        merger = GraspMerger.from_pretrained(base, config=GraspConfig(accepted_bases=[name], **COPY_ALL))
        assert merger.merge([adapter], **data).steps[0].moved == 6


def test_low_rank_updates_of_a_head_that_the_base_lacks_are_left_out(tmp_path: Path) -> None:
    model: Any = tiny_model("vit")
    base = saved(model.vit, tmp_path / "base")
    config = peft.LoraConfig(target_modules=["q_proj", "classifier"])
    adapter = save_adapter(tiny_model("vit"), config, base, tmp_path / "adapter")
    merger = GraspMerger.from_pretrained(
        base, config=GraspConfig(**COPY_ALL), task="image-classification", num_labels=3
    )
    before = {key: value.clone() for key, value in movable_tensors(merger.model).items() if "classifier" in key}
    step = merger.merge([adapter], train_dataset=tiny_data("vit", 8)).steps[0]
    assert [unit.name for unit in step.units] == [f"vit.layers.{index}.attention.q_proj" for index in (0, 1)]
    for key, value in before.items():
        assert torch.equal(movable_tensors(merger.model)[key], value)
