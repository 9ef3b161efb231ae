"""A source that does not fit is refused with its name and the reason; a source that fits is read exactly."""

import gc
import json
import re
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTForImageClassification,
)

import grasp_hf.merging.run
from grasp_hf import GraspConfig, GraspMerger, IncompatibleSourceError, merge_pretrained
from grasp_hf.errors import GraspError, NonFiniteError, SourceNotFoundError
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.models.target import fresh_tensors, load_target
from grasp_hf.sources.checkpoint import runtime_tensors
from grasp_hf.sources.headers import header_tensors
from grasp_hf.sources.load import LoadedSource, load_source
from grasp_hf.tensors.units import movable_tensors
from tests.support.hub.server import HubServer
from tests.support.models import LABELS, MEASURE_ONLY, copied, perturbed, saved, saved_adapter, tiny_data, tiny_model

LORA: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a base and a fine-tuned copy of it for each kind of model."""
    root = tmp_path_factory.mktemp("models")
    made = {kind: saved(tiny_model(kind), root / kind) for kind in ("vit", "bert", "resnet", "gpt2")}
    fine = {f"fine-{kind}": saved(perturbed(tiny_model(kind), seed=1), root / f"fine-{kind}") for kind in made}
    return made | fine


def folder_source(folder: str | Path) -> Source:
    return Source.inspect(SourceRef(str(folder)), Path(folder))


def read(folder: str | Path, base: str, target: PreTrainedModel | None = None, **kwargs: Any) -> LoadedSource:
    """Load one source for `target`, or for the model in `base`."""
    target = target or load_target(folder_source(base), task=None, dtype=torch.float32, seed=0)
    before = {name: value.clone() for name, value in movable_tensors(target).items()}
    with tempfile.TemporaryDirectory() as name:
        try:
            return load_source(folder_source(folder), target, base=folder_source(base), directory=Path(name), **kwargs)
        finally:
            assert_equal(movable_tensors(target), before)


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def with_config(folder: str, to: Path, **changes: Any) -> str:
    """Copy a model, with changed values in its config.json."""
    path = copied(folder, to) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(to)


def with_tensors(
    folder: str, to: Path, changes: dict[str, torch.Tensor | None], file: str = "model.safetensors"
) -> str:
    """Copy a model, with some tensors of its file replaced, or removed if `None`."""
    path = copied(folder, to) / file
    tensors = {name: value for name, value in (load_file(path) | changes).items() if value is not None}
    save_file(tensors, path, {"format": "pt"})
    return str(to)


def resized(folder: str, to: Path, **changes: Any) -> str:
    """Write a new model of the class in `folder`, with changes in its config."""
    torch.manual_seed(5)
    config = AutoConfig.from_pretrained(folder, **changes)
    return saved(getattr(__import__("transformers"), config.architectures[0])(config), to)


def test_a_source_that_fits_is_read_exactly(folders: dict[str, str]) -> None:
    for kind in ("vit", "bert", "resnet", "gpt2"):
        loaded = read(folders[f"fine-{kind}"], folders[kind])
        expected = perturbed(tiny_model(kind), seed=1)
        assert_equal(loaded.tensors, movable_tensors(expected))
        assert loaded.candidates == set(loaded.tensors) == set(movable_tensors(expected))


def test_another_architecture(folders: dict[str, str]) -> None:
    with pytest.raises(IncompatibleSourceError, match="different architecture: got resnet, expected vit") as caught:
        read(folders["resnet"], folders["vit"])
    assert str(caught.value).startswith(f"'{folders['resnet']}' cannot be merged:")


def test_all_shapes_that_differ_are_listed_at_once(folders: dict[str, str], tmp_path: Path) -> None:
    other = resized(folders["vit"], tmp_path / "other", num_hidden_layers=3, intermediate_size=48, id2label={0: "a"})
    with pytest.raises(IncompatibleSourceError, match="cannot be merged") as caught:
        read(other, folders["vit"])
    problems = caught.value.problems
    assert problems[0].startswith("16 tensors of the source are not in the target: vit.layers.2.")
    shapes = {line.split(":")[0]: line.split(": ")[1] for line in problems if "got shape" in line}
    assert shapes == {
        **{f"vit.layers.{i}.mlp.fc1.weight": "got shape (48, 16), expected (32, 16)" for i in (0, 1)},
        **{f"vit.layers.{i}.mlp.fc1.bias": "got shape (48,), expected (32,)" for i in (0, 1)},
        **{f"vit.layers.{i}.mlp.fc2.weight": "got shape (16, 48), expected (16, 32)" for i in (0, 1)},
    }
    assert problems[1] == "different intermediate_size: got 48, expected 32"
    assert problems[2].startswith("different num_hidden_layers: got 3, expected 2; ") and len(problems) == 9


def test_a_shallower_source(folders: dict[str, str], tmp_path: Path) -> None:
    other = resized(folders["vit"], tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(IncompatibleSourceError, match="16 tensors are not in its files, starting with vit.layers.1"):
        read(other, folders["vit"])


@pytest.mark.parametrize("labels", [["x", "y", "z"], ["a", "b"], ["a", "b", "c", "d", "e"]])
@pytest.mark.parametrize("method", ["blend", "copy"])
def test_a_head_without_a_shared_label_stays_and_the_rest_is_merged(
    labels: list[str], method: str, folders: dict[str, str], tmp_path: Path
) -> None:
    other = saved(perturbed(tiny_model("vit", seed=2, labels=labels), seed=3), tmp_path / "other")
    head = {"classifier.weight", "classifier.bias"}
    loaded = read(other, folders["vit"])
    assert loaded.notes[0].startswith(
        f"head stays: no label name is shared: got {', '.join(labels)}, expected bird, cat"
    )
    assert loaded.candidates == set(loaded.tensors) == set(movable_tensors(tiny_model("vit"))) - head

    config = GraspConfig(
        **{**vars(MEASURE_ONLY), "method": method, "gate": False, "threshold": -1.0, "num_batches": 2}
    )
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    merger.merge([other], train_dataset=tiny_data("vit", 16))
    step, before = merger.report.steps[0], movable_tensors(tiny_model("vit"))
    assert step.other_units == 1 and "classifier" not in [unit.name for unit in step.units]
    changed = {name for name, value in movable_tensors(merger.model).items() if not torch.equal(value, before[name])}
    assert changed and not changed & head
    if method == "copy":
        theirs = loaded.tensors
        assert all(torch.equal(movable_tensors(merger.model)[name], theirs[name]) for name in changed)


def test_a_checkpoint_without_a_head(folders: dict[str, str], tmp_path: Path) -> None:
    model: Any = perturbed(tiny_model("vit"), seed=1)
    body = saved(model.vit, tmp_path / "body")
    loaded = read(body, folders["vit"])
    expected = movable_tensors(perturbed(tiny_model("vit"), seed=1))
    assert_equal(loaded.tensors, {name: value for name, value in expected.items() if name.startswith("vit.")})
    assert loaded.notes == ["head stays: the source has none"]


def test_a_checkpoint_that_lacks_a_layer(folders: dict[str, str], tmp_path: Path) -> None:
    other = with_tensors(folders["bert"], tmp_path / "other", {"bert.pooler.dense.bias": None})
    with pytest.raises(IncompatibleSourceError, match="1 tensors are not in its files.*bert.pooler.dense.bias$"):
        read(other, folders["bert"])


def test_weights_that_the_target_has_no_place_for(folders: dict[str, str], tmp_path: Path) -> None:
    """Inside the base model they are refused; those of another task are left out with a note; old buffers are ignored."""
    value = torch.ones(16)
    for number, name in enumerate(
        (
            "bert.encoder.layer.0.attention.self.query.scale",
            "bert.encoder.layer.1.adapter.down.weight",
            "bert.embeddings.task_embeddings.weight",
            "bert.pooler.norm.weight",
            "encoder.layer.1.more.bias",
        )
    ):
        other = with_tensors(folders["bert"], tmp_path / f"inside-{number}", {name: value})
        whole = name if name.startswith("bert.") else f"bert.{name}"
        with pytest.raises(IncompatibleSourceError, match=f"1 tensors of the source are not in the target: {whole}$"):
            read(other, folders["bert"])
    further = {name: value.clone() for name in ("cls.predictions.bias", "bert.more.weight", "relation.weight")}
    old: dict[str, torch.Tensor | None] = {
        "bert.embeddings.position_ids": torch.arange(16),
        "bert.encoder.layer.0.mask": torch.ones(2, dtype=torch.bool),
    }
    loaded = read(with_tensors(folders["bert"], tmp_path / "outside", {**further, **old}), folders["bert"])
    first = loaded.notes[0]
    assert first.startswith(
        "3 tensors have no place in the target and are left out: bert.more.weight, cls.predictions."
    )
    notes = read(with_tensors(folders["bert"], tmp_path / "old", old), folders["bert"]).notes
    assert not [note for note in notes if "left out" in note]


def test_a_bias_of_a_layer_without_one_is_refused_by_its_setting_and_by_its_name(tmp_path: Path) -> None:
    small: dict[str, Any] = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    base = saved(LlamaForCausalLM(LlamaConfig(**small, intermediate_size=32)), tmp_path / "base")
    biased = LlamaForCausalLM(LlamaConfig(**small, intermediate_size=32, attention_bias=True, mlp_bias=True))
    source = saved(biased, tmp_path / "source")
    with pytest.raises(IncompatibleSourceError) as caught:
        read(source, base)
    problems = caught.value.problems
    assert problems[0].startswith("7 tensors of the source are not in the target: model.layers.0.mlp.down_proj.bias")
    assert problems[1] == "different attention_bias: got True, expected False"
    assert problems[2].startswith("different mlp_bias: got True, expected False; ")
    with pytest.raises(
        IncompatibleSourceError, match="(?s)different attention_bias: got False, .* 7 tensors are not in its"
    ):
        read(base, source)


def test_a_source_of_another_task_keeps_the_pooler_and_the_head_of_the_target(
    folders: dict[str, str], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    config: Any = tiny_model("bert").config
    masked = saved(BertForMaskedLM(config), tmp_path / "masked")
    loaded = read(masked, folders["bert"])
    left_out, head, _, pooler = loaded.notes
    assert left_out.startswith("5 tensors have no place in the target and are left out: cls.predictions.bias")
    assert head == "head stays: the source has none"
    assert pooler == (
        "2 tensors stay, because the source was trained without them: bert.pooler.dense.weight, bert.pooler.dense.bias"
    )
    assert not [name for name in loaded.candidates if "pooler" in name or "classifier" in name]
    expected = movable_tensors(BertForMaskedLM.from_pretrained(masked))
    for name in loaded.candidates:
        assert torch.equal(loaded.tensors[name], expected[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(value: float, folders: dict[str, str], tmp_path: Path) -> None:
    bias = torch.zeros(16)
    bias[3] = value
    other = with_tensors(folders["bert"], tmp_path / "other", {"bert.pooler.dense.bias": bias})
    with pytest.raises(NonFiniteError, match="other': bert.pooler.dense.bias holds NaN or infinite weights"):
        read(other, folders["bert"])


def test_weights_tied_in_one_model_only(folders: dict[str, str], tmp_path: Path) -> None:
    untied = resized(folders["gpt2"], tmp_path / "untied", tie_word_embeddings=False)
    assert "lm_head.weight" in load_file(f"{untied}/model.safetensors")
    with pytest.raises(
        IncompatibleSourceError,
        match="lm_head.weight and transformer.wte.weight differ, but they are tied in the target.*with untie: true",
    ):
        read(untied, folders["gpt2"])
    tensors = read(folders["gpt2"], untied).tensors
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
    assert torch.equal(
        tensors["lm_head.weight"], load_file(f"{folders['gpt2']}/model.safetensors")["transformer.wte.weight"]
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.bool, torch.complex64])
def test_weights_that_are_no_floating_point_numbers(
    dtype: torch.dtype, folders: dict[str, str], tmp_path: Path
) -> None:
    changes: dict[str, torch.Tensor | None] = {"bert.pooler.dense.bias": torch.ones(16).to(dtype)}
    other = with_tensors(folders["bert"], tmp_path / "other", changes)
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(
        IncompatibleSourceError, match=f"bert.pooler.dense.bias: got weights of dtype {name}, expected float32"
    ):
        read(other, folders["bert"])


def test_pickled_weights_that_are_sparse(folders: dict[str, str], tmp_path: Path) -> None:
    other = copied(folders["bert"], tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    torch.save(tensors | {"bert.pooler.dense.bias": torch.ones(16).to_sparse()}, other / "pytorch_model.bin")
    (other / "model.safetensors").unlink()
    with pytest.raises(IncompatibleSourceError, match=r"bias: got weights of dtype float32 \(sparse_coo\), expected"):
        read(other, folders["bert"])


def test_counts_may_be_of_another_integer_type(folders: dict[str, str], tmp_path: Path) -> None:
    name = "resnet.embedder.embedder.normalization.num_batches_tracked"
    other = with_tensors(folders["resnet"], tmp_path / "other", {name: torch.tensor(7, dtype=torch.int32)})
    assert int(read(other, folders["resnet"]).tensors[name]) == 7


def test_a_quantized_source(folders: dict[str, str], tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    other = with_config(folders["bert"], tmp_path / "other", quantization_config=quantization)
    with pytest.raises(
        IncompatibleSourceError,
        match="its weights are quantized, expected float weights; name the float model that it was made from",
    ):
        read(other, folders["bert"])


def test_quantized_weights_that_the_config_does_not_mention(folders: dict[str, str], tmp_path: Path) -> None:
    packed: dict[str, torch.Tensor | None] = {"vit.layernorm.bias": torch.zeros(16, dtype=torch.uint8)}
    other = with_tensors(folders["vit"], tmp_path / "other", packed)
    with pytest.raises(
        IncompatibleSourceError, match=r"quantized \(U8\), expected float weights; name the model that"
    ):
        read(other, folders["vit"])


@pytest.mark.parametrize("names", [["model-q4.gguf"], ["config.json", "model-q4.gguf"]])
def test_a_gguf_file(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(SourceNotFoundError, match="GGUF file has quantized weights: name the float model that it"):
        folder_source(tmp_path)


def test_a_quantized_base(folders: dict[str, str], tmp_path: Path) -> None:
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    other = with_config(folders["bert"], tmp_path / "other", quantization_config=quantization)
    with pytest.raises(IncompatibleSourceError, match="other.*quantized"):
        GraspMerger.from_pretrained(other)


def test_a_bf16_source_stays_one_and_the_target_stays_float32(folders: dict[str, str], tmp_path: Path) -> None:
    fine = perturbed(tiny_model("vit"), seed=1).bfloat16()
    other = saved(fine, tmp_path / "half")
    loaded = read(other, folders["vit"])
    assert {tensor.dtype for tensor in loaded.tensors.values()} == {torch.bfloat16}
    assert_equal(loaded.tensors, movable_tensors(fine))

    config = GraspConfig(**{**vars(MEASURE_ONLY), "method": "copy", "threshold": -1.0})
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    step = merger.merge([other], train_dataset=tiny_data("vit", 8)).steps[0]
    moved = [unit.name for unit in step.units if unit.decision == "moved"]
    assert "classifier" in moved
    assert merger.model.get_parameter("classifier.weight").dtype == torch.float32
    assert torch.equal(
        merger.model.get_parameter("classifier.weight"), fine.get_parameter("classifier.weight").float()
    )


def test_pickled_weights(folders: dict[str, str], tmp_path: Path) -> None:
    folder = copied(folders["fine-bert"], tmp_path / "pickled")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    loaded = read(folder, folders["bert"])
    assert_equal(loaded.tensors, movable_tensors(perturbed(tiny_model("bert"), seed=1)))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_a_damaged_file(name: str, content: bytes, folders: dict[str, str], tmp_path: Path) -> None:
    folder = copied(folders["bert"], tmp_path / "damaged")
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(GraspError, match="damaged'"):
        read(folder, folders["bert"])


@pytest.mark.parametrize("changes", [{"hidden_size": "16"}, {"model_type": "unheard-of"}, {"num_attention_heads": 3}])
def test_a_config_that_makes_no_model(changes: dict[str, Any], folders: dict[str, str], tmp_path: Path) -> None:
    other = with_config(folders["bert"], tmp_path / "damaged", **changes)
    with pytest.raises(IncompatibleSourceError, match="damaged'"):
        read(other, folders["bert"])


def test_a_setting_that_the_shapes_do_not_show(folders: dict[str, str], tmp_path: Path) -> None:
    for kind, key, value, expected in (("bert", "num_attention_heads", 4, 2), ("vit", "hidden_act", "relu", "gelu")):
        other = with_config(folders[kind], tmp_path / key, **{key: value})
        with pytest.raises(IncompatibleSourceError, match=f"different {key}: got {value}, expected {expected}"):
            read(other, folders[kind])


@pytest.fixture
def adapter(folders: dict[str, str], tmp_path: Path) -> str:
    return saved_adapter(tiny_model("vit"), folders["vit"], tmp_path / "adapter", **LORA)


def test_an_adapter_that_fits(folders: dict[str, str], adapter: str) -> None:
    loaded = read(adapter, folders["vit"])
    peft_model = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(folders["vit"]), adapter)
    expected = movable_tensors(peft_model.merge_and_unload())
    assert_equal(loaded.tensors, expected)
    touched = [f"vit.layers.{layer}.attention.{part}" for layer in (0, 1) for part in ("q_proj", "v_proj")]
    names = {f"{module}.{tensor}" for module in [*touched, "classifier"] for tensor in ("weight", "bias")}
    assert loaded.candidates == names
    assert set(loaded.tensors) == set(expected)
    base = movable_tensors(tiny_model("vit"))
    changed = {name for name, value in expected.items() if not torch.equal(value, base[name])}
    assert changed == {name for name in names if name.startswith("classifier") or name.endswith("weight")}


def test_merging_an_adapter_moves_what_it_touches_only(folders: dict[str, str], adapter: str) -> None:
    copying = {"method": "copy", "unit": "module", "threshold": -1.0, "gate": False}
    config = GraspConfig(**{**vars(MEASURE_ONLY), **copying})
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    step = merger.merge([adapter], train_dataset=tiny_data("vit", 8)).steps[0]
    assert (step.kind, len(step.units), step.moved) == ("adapter", 5, 5)
    assert step.other_units == 15
    assert step.num_bytes == (Path(adapter) / "adapter_model.safetensors").stat().st_size
    expected = read(adapter, folders["vit"]).tensors
    assert_equal(movable_tensors(merger.model), expected)


def test_an_adapter_of_another_base(folders: dict[str, str], tmp_path: Path) -> None:
    for named in ("org/other", folders["fine-vit"]):
        other = saved_adapter(tiny_model("vit"), named, tmp_path / named.replace("/", "-"), **LORA)
        message = f"it is an adapter of '{named}', expected an adapter of '{folders['vit']}'"
        with pytest.raises(IncompatibleSourceError, match=message):
            read(other, folders["vit"])


def test_an_adapter_without_a_known_base(folders: dict[str, str], adapter: str) -> None:
    with pytest.raises(IncompatibleSourceError, match="the base of the target is unknown; load the target with"):
        load_source(folder_source(adapter), tiny_model("vit"), base=None, directory=Path())


def test_the_base_may_be_named_by_another_path(folders: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folders["vit"])
    other = saved_adapter(tiny_model("vit"), str(tmp_path / "link"), tmp_path / "adapter", **LORA)
    assert len(read(other, folders["vit"]).candidates) == 10


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_an_adapter_that_cannot_merge(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    task = "CAUSAL_LM" if kind == "gpt2" else "SEQ_CLS"
    tuned = get_peft_model(tiny_model(kind), PromptTuningConfig(task_type=task, num_virtual_tokens=2))
    tuned.peft_config["default"].base_model_name_or_path = folders[kind]
    tuned.save_pretrained(str(tmp_path / "prompt"))
    message = (
        "prompt' cannot be merged:\n- an adapter of type PROMPT_TUNING cannot be merged into weights; expected LoRA"
    )
    with pytest.raises(IncompatibleSourceError, match=message):
        read(tmp_path / "prompt", folders[kind])


def test_an_adapter_for_other_shapes(folders: dict[str, str], tmp_path: Path) -> None:
    wide = ViTForImageClassification(AutoConfig.from_pretrained(folders["vit"], hidden_size=32))
    other = saved_adapter(wide, folders["vit"], tmp_path / "wide", **LORA)
    with pytest.raises(IncompatibleSourceError, match=r"wide' does not fit.*classifier.weight: got shape \(3, 32\)"):
        read(other, folders["vit"])


def test_an_adapter_of_modules_that_are_not_there(folders: dict[str, str], tmp_path: Path) -> None:
    other = saved_adapter(tiny_model("bert"), folders["vit"], tmp_path / "bert", target_modules=["query"])
    with pytest.raises(IncompatibleSourceError, match="bert' cannot be applied to '.*query"):
        read(other, folders["vit"])


def test_an_adapter_that_lacks_weights(folders: dict[str, str], adapter: str, tmp_path: Path) -> None:
    file = "adapter_model.safetensors"
    lost = [name for name in load_file(f"{adapter}/{file}") if "layers.1" in name and "v_proj" in name]
    assert len(lost) == 2
    other = with_tensors(adapter, tmp_path / "other", dict.fromkeys(lost), file)
    with pytest.raises(IncompatibleSourceError, match="layers.1.attention.v_proj"):
        read(other, folders["vit"])


def test_an_adapter_with_weights_that_belong_nowhere(folders: dict[str, str], adapter: str, tmp_path: Path) -> None:
    name = "base_model.model.vit.layers.7.attention.v_proj.lora_A.weight"
    other = with_tensors(adapter, tmp_path / "other", {name: torch.ones(2, 16)}, "adapter_model.safetensors")
    with pytest.raises(IncompatibleSourceError, match="layers.7.attention.v_proj"):
        read(other, folders["vit"])


def test_an_adapter_with_a_weight_that_is_no_number(folders: dict[str, str], adapter: str, tmp_path: Path) -> None:
    name = "base_model.model.vit.layers.1.attention.v_proj.lora_B.weight"
    nan = torch.full((16, 2), float("nan"))
    other = with_tensors(adapter, tmp_path / "other", {name: nan}, "adapter_model.safetensors")
    with pytest.raises(NonFiniteError, match="other': vit.layers.1.attention.v_proj.weight holds NaN"):
        read(other, folders["vit"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"no weights"),
        ("adapter_model.bin", b""),
        ("adapter_model.bin", b"no weights"),
        ("adapter_config.json", b""),
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b'{"peft_type": "UNHEARD_OF"}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "two"}'),
    ],
)
def test_a_damaged_adapter(name: str, content: bytes, folders: dict[str, str], adapter: str, tmp_path: Path) -> None:
    folder = copied(adapter, tmp_path / "damaged")
    if name.endswith(".bin"):
        (folder / "adapter_model.safetensors").unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(GraspError, match="damaged'"):
        read(folder, folders["vit"])


def test_an_adapter_cannot_be_the_target(adapter: str) -> None:
    with pytest.raises(IncompatibleSourceError, match="adapter' is an adapter; expected a full model to start from"):
        GraspMerger.from_pretrained(adapter)


def test_the_revision_of_an_adapter_s_base(hub: HubServer, folders: dict[str, str], tmp_path: Path) -> None:
    hub.add_repo("org/vit", folders["vit"], tag="v1")
    sha = hub.add_repo("org/vit", folders["fine-vit"], tag="v2")
    adapters = {
        revision: saved_adapter(tiny_model("vit"), "org/vit", tmp_path / str(revision), revision=revision, **LORA)
        for revision in (None, "v1", "v2", "main", sha)
    }

    def merge(base: str, revision: str | None) -> None:
        merger = GraspMerger.from_pretrained(base, config=MEASURE_ONLY)
        merger.merge([adapters[revision]], train_dataset=tiny_data("vit", 8))
        assert [step.kind for step in merger.report.steps] == ["adapter"]

    with pytest.raises(IncompatibleSourceError, match="adapter of 'org/vit' at revision 'v1', expected 'org/vit@v2'"):
        merge("org/vit@v2", "v1")
    merge("org/vit@v1", "v1")
    merge("org/vit@v1", None)
    for base in ("org/vit", "org/vit@v2", f"org/vit@{sha}"):
        for revision in ("v2", "main", sha):
            merge(base, revision)  # all of them name one commit


BAD = ["architecture", "shapes", "NaN", "layer", "base", "nothing", "quantized"]


@pytest.mark.parametrize("problem", BAD)
def test_a_bad_source_leaves_the_target_as_it_was(problem: str, folders: dict[str, str], tmp_path: Path) -> None:
    bad, message, error = make_bad(problem, folders, tmp_path / "bad")
    config = GraspConfig(**{**vars(MEASURE_ONLY), "finetune_epochs": 1})
    train = tiny_data("vit", 16)
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    with pytest.raises(error, match=f"^while merging source 1/1 '{bad}': '{bad}'.*{message}"):
        merger.merge([bad], train_dataset=train)
    assert_equal(movable_tensors(merger.model), movable_tensors(tiny_model("vit")))
    assert merger.report.steps == []

    good = GraspMerger.from_pretrained(folders["vit"], config=config)
    good.merge([folders["fine-vit"]], train_dataset=train)
    with pytest.raises(error, match=f"(?s)^while merging source 2/2 '{bad}': '{bad}'.*{message}"):
        merger.merge([folders["fine-vit"], bad], train_dataset=train)
    assert_equal(movable_tensors(merger.model), movable_tensors(good.model))
    assert [step.source for step in merger.report.steps] == [folders["fine-vit"]]


def make_bad(problem: str, folders: dict[str, str], to: Path) -> tuple[str, str, type[GraspError]]:
    """Return a source that does not fit the ViT, a pattern for the error, and the class of the error."""
    vit = folders["fine-vit"]
    refused = IncompatibleSourceError
    if problem == "architecture":
        return folders["resnet"], "(?s:.*)got resnet", refused
    if problem == "shapes":
        return resized(vit, to, num_hidden_layers=3), "(?s:.*)vit.layers.2", refused
    if problem == "NaN":
        nan = torch.full((3,), float("nan"))
        return with_tensors(vit, to, {"classifier.bias": nan}), "classifier.bias holds NaN", NonFiniteError
    if problem == "layer":
        return with_tensors(vit, to, {"vit.layernorm.bias": None}), "(?s:.*)vit.layernorm.bias", refused
    if problem == "base":
        return saved_adapter(tiny_model("vit"), "org/x", to, **LORA), "(?s:.*)an adapter of 'org/x'", refused
    if problem == "quantized":
        config = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
        return with_config(vit, to, **config), "(?s:.*)quantized", refused
    to.mkdir()
    return str(to), "holds no config.json", SourceNotFoundError


def test_nothing_to_start_from() -> None:
    with pytest.raises(GraspError, match="source"):
        merge_pretrained(None, [], train_dataset=tiny_data("vit", 8))


def test_a_failed_first_source_does_not_repeat_the_initial_fine_tuning(
    folders: dict[str, str], tmp_path: Path
) -> None:
    bad, _, error = make_bad("nothing", folders, tmp_path / "bad")
    config = GraspConfig(**{**vars(MEASURE_ONLY), "initial_epochs": 1})
    train = tiny_data("vit", 16)
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    with pytest.raises(error, match="while merging source 1/1"):
        merger.merge([bad], train_dataset=train)
    before = {name: value.clone() for name, value in movable_tensors(merger.model).items()}
    merger.merge([], train_dataset=train)
    assert_equal(movable_tensors(merger.model), before)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Switch off garbage collection, so that only reference counts free memory."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("method", ["blend", "copy"])
def test_two_sources_are_never_in_memory_at_once(
    method: str,
    folders: dict[str, str],
    adapter: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_collection: None,
) -> None:
    seen: list[weakref.ref] = []

    def watched(*args: Any, **kwargs: Any) -> LoadedSource:
        assert [ref() for ref in seen if ref() is not None] == [], "a source outlived its step"
        loaded = load_source(*args, **kwargs)
        seen.append(weakref.ref(loaded))
        seen.extend(weakref.ref(tensor) for tensor in loaded.tensors.values())
        return loaded

    monkeypatch.setattr(grasp_hf.merging.run, "load_source", watched)
    config = GraspConfig(
        **{**vars(MEASURE_ONLY), "method": method, "finetune_epochs": 1, "threshold": -1.0, "num_batches": 2}
    )
    half = saved(perturbed(tiny_model("vit"), seed=4).bfloat16(), tmp_path / "half")
    merger = GraspMerger.from_pretrained(folders["vit"], config=config)
    data = tiny_data("vit", 16)
    merger.merge([folders["fine-vit"], adapter, half, adapter, folders["vit"]], train_dataset=data, eval_dataset=data)
    assert len(merger.report.steps) == 5 and len(seen) > 5 * 40
    assert [ref() for ref in seen if ref() is not None] == []


def test_a_target_gets_a_fresh_head_that_the_seed_decides(folders: dict[str, str], caplog: Any) -> None:
    names: dict[str, Any] = {
        "id2label": dict(enumerate("abcde")),
        "label2id": {name: i for i, name in enumerate("abcde")},
    }
    first, second = (GraspMerger.from_pretrained(folders["vit"], **names).model for _ in range(2))
    assert first.get_parameter("classifier.weight").shape == (5, 16)
    assert "these weights are new and must be trained: classifier.bias, classifier.weight" in caplog.text
    assert torch.equal(
        first.get_parameter("vit.layernorm.weight"), tiny_model("vit").get_parameter("vit.layernorm.weight")
    )
    assert torch.equal(first.get_parameter("classifier.weight"), second.get_parameter("classifier.weight"))


def test_a_target_that_lacks_what_its_data_trains(
    folders: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = ["bert.pooler.dense.bias", "classifier.weight"]
    some = with_tensors(folders["bert"], tmp_path / "some", dict.fromkeys(names))
    GraspMerger.from_pretrained(some)
    assert f"these weights are new and must be trained: {', '.join(names)}" in caplog.text
    with pytest.raises(
        IncompatibleSourceError,
        match=f"no head that fits, .* trained without data: 2 of its tensors: {', '.join(names)}; ",
    ):
        load_target(folder_source(some), task=None, dtype=torch.float32, seed=0, needs_head=True)


def test_a_target_that_lacks_weights_below_its_head(folders: dict[str, str], tmp_path: Path) -> None:
    first, second = "bert.embeddings.LayerNorm.bias", "bert.encoder.layer.1.output.dense.weight"
    changes = {first: None, second: torch.zeros(16, 8)}
    other = with_tensors(folders["bert"], tmp_path / "other", changes)
    expected = f"2 of its tensors: {first}, {second} (got shape (16, 8), expected (16, 32)); download it again"
    with pytest.raises(IncompatibleSourceError, match=re.escape(expected)):
        GraspMerger.from_pretrained(other)


@pytest.mark.parametrize("kind", ["resnet", "vit", "bert", "swin", "dinov2", "gpt_neox", "gpt2", "mixtral"])
def test_headers_show_which_tensors_would_be_random(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind)
    whole = saved(model, tmp_path / "whole")
    tensors = load_file(tmp_path / "whole" / "model.safetensors")
    last = max(name for name in tensors if "bias" in name or "norm" in name)
    part = with_tensors(whole, tmp_path / "part", {last: None})
    for folder, lacking in ((whole, 0), (part, 1)):
        with torch.device("meta"):
            planned = type(model)(model.config)
        found, _, _ = runtime_tensors(header_tensors(folder_source(folder)) or {}, planned, Path())
        loaded: Any = type(model).from_pretrained(folder, output_loading_info=True)
        info = loaded[1]
        assert fresh_tensors(planned, found) == dict.fromkeys(info["missing_keys"], "")
        assert len(info["missing_keys"]) == lacking


def test_the_class_of_a_task(folders: dict[str, str], tmp_path: Path) -> None:
    model: Any = tiny_model("bert")
    body = saved(model.bert, tmp_path / "body")
    with pytest.raises(
        IncompatibleSourceError, match=r"architecture \['BertModel'\], which has no task on top; name the task"
    ):
        GraspMerger.from_pretrained(body)
    merger = GraspMerger.from_pretrained(body, task="text-classification")
    assert type(merger.model).__name__ == "BertForSequenceClassification"
    with pytest.raises(
        IncompatibleSourceError, match="unknown task 'text-guessing', expected .* one of .*text-classif"
    ):
        GraspMerger.from_pretrained(body, task="text-guessing")
    with pytest.raises(
        IncompatibleSourceError, match="is a bert, which has no model for the task 'image-classification'"
    ):
        GraspMerger.from_pretrained(body, task="image-classification")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"]], ids=" ".join)
def test_an_adapter_of_embeddings_or_of_the_output_layer(targets: list[str], tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    )
    base = str(tmp_path / "base")
    LlamaForCausalLM(config).save_pretrained(base)
    adapter = saved_adapter(LlamaForCausalLM.from_pretrained(base), base, tmp_path / "adapter", target_modules=targets)
    loaded = read(adapter, base)
    expected = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    assert_equal(loaded.tensors, movable_tensors(expected))
    assert {name.split(".")[-2] for name in loaded.candidates} == set(targets)


def test_the_head_of_an_adapter_has_the_labels_of_its_base(tmp_path: Path) -> None:
    """The user gives the target other labels; the adapter's head was trained for the base's and is left out."""
    base = saved(tiny_model("vit", labels=["LABEL_0", "LABEL_1", "LABEL_2"]), tmp_path / "base")
    names: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: index for index, name in enumerate(LABELS)},
    }
    same = saved_adapter(tiny_model("vit"), base, tmp_path / "same-size", **LORA)
    wide = saved_adapter(tiny_model("vit", labels=list("abcde")), base, tmp_path / "other-size", **LORA)
    bodied = saved_adapter(tiny_model("vit"), base, tmp_path / "no-head", target_modules=["q_proj"])
    target = load_target(folder_source(base), task=None, dtype=torch.float32, seed=0, new_head=True, **names)
    for folder, got in ((same, "LABEL_0, LABEL_1, LABEL_2"), (wide, "LABEL_0, LABEL_1, LABEL_2, LABEL_3, LABEL_4")):
        loaded = read(folder, base, target)
        (note,) = loaded.notes
        assert note.startswith(
            f"head stays: no label name is shared: got {got}, expected bird, cat, dog; the key `labels`"
        )
        assert {name.split(".")[-2] for name in loaded.candidates} == {"q_proj", "v_proj"}
        assert not [name for name in loaded.tensors if name.startswith("classifier")]
    loaded = read(bodied, base, target)
    assert loaded.notes == [] and loaded.candidates == {
        f"vit.layers.{layer}.attention.q_proj.{part}" for layer in (0, 1) for part in ("weight", "bias")
    }


def test_an_adapter_may_name_its_labels_in_a_config_of_its_own(tmp_path: Path) -> None:
    base = saved(tiny_model("vit", labels=["LABEL_0", "LABEL_1"]), tmp_path / "base")
    names: dict[str, Any] = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {name: index for index, name in enumerate(LABELS)},
    }
    target = load_target(folder_source(base), task=None, dtype=torch.float32, seed=0, new_head=True, **names)
    fine = tiny_model("vit", labels=["dog", "cow", "bird", "cat"])
    adapter = saved_adapter(fine, base, tmp_path / "adapter", **LORA)
    fine.config.save_pretrained(adapter)
    loaded = read(adapter, base, target)
    head = load_file(Path(adapter) / "adapter_model.safetensors")["base_model.model.classifier.weight"]
    assert torch.equal(loaded.tensors["classifier.weight"], head[[2, 3, 0]])
    assert loaded.notes == ["head: classes matched by name, 3 of 3: got dog, cow, bird, cat, expected bird, cat, dog"]


def test_an_adapter_that_names_its_base_from_its_own_folder(folders: dict[str, str], tmp_path: Path) -> None:
    copied(folders["vit"], tmp_path / "base")
    adapter = saved_adapter(tiny_model("vit"), "../../base", tmp_path / "sources" / "adapter", **LORA)
    assert read(adapter, str(tmp_path / "base")).candidates
    with pytest.raises(
        IncompatibleSourceError, match="an adapter of '../../base', .* accept it by name: accepted_bases="
    ):
        read(adapter, folders["vit"])


def test_an_adapter_of_a_wider_model_is_never_cut_to_fit(tmp_path: Path) -> None:
    """Only a head of another size may be left out; PEFT would skip every weight that does not fit."""
    base = saved(tiny_model("vit"), tmp_path / "base")
    config: Any = tiny_model("vit").config
    config.intermediate_size = 64
    wider = {**LORA, "target_modules": ["fc1"]}
    adapter = saved_adapter(ViTForImageClassification(config), base, tmp_path / "adapter", **wider)
    with pytest.raises(IncompatibleSourceError, match="(?s)adapter.*fc1.*lora_B"):
        read(adapter, base)
