"""A source that computes something else when it is merged is refused, with the layer where the difference begins."""

import logging
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.models.probe import in_float32, probe, probe_batch
from grasp_hf.sources import adapter_options, adapters, identity, load
from grasp_hf.sources.identity import check_identity, with_tensors
from grasp_hf.tensors.units import movable_tensors
from tests.support.families import FAMILIES, family_model
from tests.support.models import NO_TUNING, saved, saved_adapter, tiny_data, tiny_model

CONFIG = GraspConfig(method="average", **NO_TUNING)
LLAMA = "model.layers.1.self_attn.q_proj"


def merge(base: str, source: str, config: GraspConfig = CONFIG) -> list[str]:
    """Merge one source whole, and return the notes on it."""
    return GraspMerger.from_pretrained(base, config=config).merge([source]).steps[0].notes


def made(folder: Path, name: str = "LLaMA", **config: Any) -> tuple[str, str]:
    """Write a base and an adapter of it."""
    base: Any = family_model(name)
    base.save_pretrained(folder / "base")
    return str(folder / "base"), saved_adapter(base, str(folder / "base"), folder / "adapter", **config)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_runs_on_a_random_batch(name: str) -> None:
    model = family_model(name)
    outputs = [probe(model, probe_batch(model, seed)) for seed in (0, 0, 1)]
    assert torch.equal(outputs[0], outputs[1]) and not torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_in_half_precision_computes_in_float32(name: str, dtype: torch.dtype) -> None:
    model = family_model(name).to(dtype)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    got = probe(model, probe_batch(model, 0))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    wide = model.float()
    expected = probe(wide, probe_batch(wide, 0))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_only_one_block_is_in_float32_at_a_time() -> None:
    model = family_model("LLaMA").bfloat16()
    most = 0

    def count(*_: Any) -> None:
        nonlocal most
        most = max(most, sum(p.numel() for p in model.parameters() if p.dtype == torch.float32))

    for module in model.modules():
        module.register_forward_hook(count)
    with in_float32(model), torch.no_grad():
        model(**probe_batch(model, 0))
    blocks = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    assert most == sum(p.numel() for p in model.parameters()) - sum(blocks) + max(blocks)


def test_the_twin_of_a_model_shares_its_values_and_no_module() -> None:
    model = family_model("Qwen2")
    tensors = {name: tensor + 1 for name, tensor in movable_tensors(model).items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    twin = with_tensors(model, tensors)
    assert twin.lm_head.weight.data_ptr() == tensors["model.embed_tokens.weight"].data_ptr()
    assert not {*map(id, twin.modules())} & {*map(id, model.modules())}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_layer_where_a_difference_begins_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made(tmp_path, target_modules=["q_proj", "v_proj"])
    assert merge(base, adapter) == []
    real = adapters.apply_adapter_

    def wrong(*arguments: Any) -> Any:
        applied = real(*arguments)
        applied.model.get_parameter(f"{LLAMA}.weight").data *= 1.1
        return applied

    monkeypatch.setattr(adapters, "apply_adapter_", wrong)
    message = (
        rf"'{adapter}' computes something else when merged: .*; the difference begins in {LLAMA};.*\(--no-check\)"
    )
    with pytest.raises(IncompatibleSourceError, match=message):
        merge(base, adapter)
    merge(base, adapter, GraspConfig(method="average", check=False, **NO_TUNING))


def test_a_difference_in_a_full_source_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family_model("BERT").save_pretrained(tmp_path / "base")
    family_model("BERT", seed=1).save_pretrained(tmp_path / "source")
    assert not [note for note in merge(str(tmp_path / "base"), str(tmp_path / "source")) if "not compared" in note]
    real, name = load.runtime_tensors, "bert.encoder.layer.0.attention.self.query.weight"

    def wrong(*arguments: Any) -> Any:
        tensors, problems, notes = real(*arguments)
        return tensors | {name: tensors[name].T.contiguous()}, problems, notes

    monkeypatch.setattr(load, "runtime_tensors", wrong)
    with pytest.raises(IncompatibleSourceError, match=r"begins in bert.encoder.layer.0.attention.self.query"):
        merge(str(tmp_path / "base"), str(tmp_path / "source"))


def test_a_layer_whose_adapter_the_model_does_not_call(tmp_path: Path) -> None:
    """A Mamba reads the weight of this layer and does not call it, so PEFT has no effect there, and the merge has one."""
    base, adapter = made(tmp_path, "Mamba", target_modules=["dt_proj"])
    with pytest.raises(IncompatibleSourceError, match=r"the difference begins in backbone.layers.0.mixer"):
        merge(base, adapter)


def test_what_is_drawn_when_an_adapter_is_loaded_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = made(tmp_path, target_modules=["q_proj"], init_lora_weights="pissa_niter_2")
    monkeypatch.setattr(adapter_options, "CHANGES_BASE", ("none",))
    with pytest.raises(IncompatibleSourceError, match=r"the difference begins in model.layers.0.self_attn.q_proj"):
        merge(base, adapter)


def test_a_difference_by_chance_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a rounding, a router may choose another expert in one batch."""
    model = family_model("LLaMA")
    model.save_pretrained(tmp_path)
    source = Source.inspect(SourceRef(str(tmp_path)), tmp_path)
    batches: list[int] = []

    def differs(*_: Any) -> str:
        batches.append(1)
        return "off" if len(batches) == 1 else ""

    monkeypatch.setattr(identity, "_difference", differs)
    assert check_identity(source, lambda: model, movable_tensors(model), model) == []
    assert len(batches) == 2


def test_a_source_without_a_head_is_compared_below_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    model: Any = tiny_model("vit", seed=1)
    body = saved(model.vit, tmp_path / "body")
    with caplog.at_level(logging.DEBUG, logger="grasp_hf"):
        assert merge(base, body) == ["head stays: the source has none"]
    assert re.search(r"body' computes the same when merged \(\d+\.\d s\)", caplog.text)


def test_other_labels_and_tokens_are_compared_as_the_source_has_them(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    other = saved(tiny_model("vit", seed=1, labels=["dog", "eel"]), tmp_path / "other")
    (note,) = merge(base, other)
    assert note.startswith("head: only shared classes move, 1 of 3")


def test_inputs_of_the_data_serve_where_random_ones_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = (saved(tiny_model("vit", seed), tmp_path / str(seed)) for seed in (0, 1))

    def unfit(*_: Any) -> Any:
        return {"pixel_values": torch.zeros(2, 1)}

    monkeypatch.setattr(identity, "probe_batch", unfit)
    (note,) = merge(base, source)
    assert note.startswith("not compared with its own library")
    merger = GraspMerger.from_pretrained(base, config=CONFIG)
    assert merger.merge([source], train_dataset=tiny_data("vit", 8)).steps[0].notes == []


def test_a_source_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, source = (saved(tiny_model("vit", seed), tmp_path / str(seed)) for seed in (0, 1))
    seen: list[str] = []

    def note(source: Source, *_: Any) -> list[str]:
        seen.append(str(source.ref))
        return []

    monkeypatch.setattr(load, "check_identity", note)
    config = GraspConfig(**{**NO_TUNING, "order": "loss"}, batch_size=4, num_batches=1)
    GraspMerger.from_pretrained(base, config=config).merge([source], train_dataset=tiny_data("vit", 16))
    assert seen == [source]


def test_a_source_that_fits_the_memory_only_once_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, source = (saved(tiny_model("vit", seed), tmp_path / str(seed)) for seed in (0, 1))
    monkeypatch.setattr(load, "fits_twice", lambda source: False)
    monkeypatch.setattr(load, "check_identity", lambda *_: pytest.fail("compared"))
    (note,) = merge(base, source)
    assert note == "not compared with its own library, because the memory does not hold it twice"


def test_loading_the_source_again_draws_no_random_number(tmp_path: Path) -> None:
    base, adapter = made(tmp_path, target_modules=["q_proj"])
    states = []
    for check in (True, False):
        torch.manual_seed(3)
        merge(base, adapter, GraspConfig(method="average", check=check, **NO_TUNING))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_an_adapter_of_a_half_precision_base_is_compared_in_float32(tmp_path: Path) -> None:
    base: Any = family_model("LLaMA").bfloat16()
    base.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted: Any = peft.get_peft_model(family_model("LLaMA"), config)
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    for dtype in (torch.float32, "auto"):
        merger = GraspMerger.from_pretrained(str(tmp_path / "base"), config=CONFIG, dtype=dtype)
        assert merger.merge([str(tmp_path / "adapter")]).steps[0].notes == []
