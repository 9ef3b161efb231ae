"""Each private upstream name still exists, has the meaning that the package expects, and is used in one file only."""

import ast
import importlib
import re
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub import get_session, set_client_factory
from huggingface_hub.utils import close_session
from packaging.requirements import Requirement
from packaging.version import Version
from peft import LoraConfig, PeftModel, PeftType, get_peft_model, load_peft_weights
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    FunnelConfig,
    FunnelModel,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    default_data_collator,
)

from grasp_hf import internals
from tests.support.models import saved, saved_adapter, tiny_data, tiny_model

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "grasp_hf"
UPSTREAM = ("accelerate", "datasets", "huggingface_hub", "peft", "torch", "transformers")


def gone(what: str) -> str:
    """Return the message of a test that fails because an upstream name has changed."""
    return f"upstream changed {what}: repair its function in grasp_hf/internals.py"


# torch


def test_buffers_outside_checkpoints_are_recognized() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.zeros(1))
    module.register_buffer("computed", torch.zeros(1), persistent=False)

    found = {name: internals.is_persistent(module, name) for name in ("kept", "computed")}

    assert found == {"kept": True, "computed": False}, gone("_non_persistent_buffers_set")


def test_children_are_restored() -> None:
    first, model = nn.Linear(1, 1), nn.Module()
    model.first, model.again = first, first
    model.add_module("empty", None)

    children = internals.child_modules(model)
    model.first = nn.ReLU()
    internals.restore_child_modules_(model, children)

    assert children == {"first": first, "again": first, "empty": None}, gone("Module._modules")
    assert model.first is first, gone("Module._modules")


def test_forward_hooks_are_restored() -> None:
    called: list[str] = []
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: called.append("own"))

    hooks = internals.forward_hooks(model)
    model.register_forward_hook(lambda *_: called.append("left"))
    model(torch.zeros(1))
    internals.restore_forward_hooks_(model, hooks)
    model(torch.zeros(1))

    assert called == ["own", "left", "own"], gone("Module._forward_hooks")


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)])
def test_every_batch_norm_is_recognized(layer: nn.Module) -> None:
    assert internals.normalizes_batches(nn.Sequential(nn.Linear(1, 1), layer)), gone("_BatchNorm")


def test_no_other_normalisation_is_taken_for_a_batch_norm() -> None:
    assert not internals.normalizes_batches(nn.Sequential(nn.LayerNorm(2), nn.GroupNorm(1, 2))), gone("_BatchNorm")


# transformers


def test_tensors_that_loading_leaves_out_without_a_word(tmp_path: Path) -> None:
    class Ignoring(BertForSequenceClassification):
        _keys_to_ignore_on_load_unexpected = [r"old\.head"]

    config: Any = tiny_model("bert").config
    model = Ignoring(config)
    assert internals.ignored_patterns(model) == [r"old\.head", r"(^|\.)position_ids$"], gone(
        "_keys_to_ignore_on_load_unexpected"
    )
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    further = ("old.head.weight", "bert.embeddings.position_ids", "bert.new.weight")
    save_file(
        {**tensors, **{name: torch.zeros(2) for name in further}}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    loaded: Any = Ignoring.from_pretrained(tmp_path, output_loading_info=True)
    assert {*loaded[1]["unexpected_keys"]} == {"bert.new.weight"}, gone("the patterns that from_pretrained adds")
    assert r"(^|\.)inv_freq$" in internals.ignored_patterns(tiny_model("gpt_neox"))


def test_computed_tensors_are_neither_saved_nor_missed(tmp_path: Path) -> None:
    class Computing(BertForSequenceClassification):
        _keys_to_ignore_on_load_missing = [r"classifier\.b.*"]
        _keys_to_ignore_on_save = ["classifier.bias"]

    torch.manual_seed(0)
    config: Any = tiny_model("bert").config
    model = Computing(config)
    model.save_pretrained(tmp_path)
    loaded: Any = Computing.from_pretrained(tmp_path, output_loading_info=True)

    expected = ["classifier.bias", r"classifier\.b.*"]
    assert internals.computed_patterns(model) == expected, gone(
        "_keys_to_ignore_on_save or _keys_to_ignore_on_load_missing"
    )
    assert internals.computed_patterns(tiny_model("bert")) == []
    assert "classifier.bias" not in internals.saved_state(model), gone("_keys_to_ignore_on_save")
    assert not loaded[1]["missing_keys"], gone("_keys_to_ignore_on_load_missing")


@pytest.mark.parametrize("kind", ["vit", "gpt2", "gpt_neox", "mixtral"])
def test_saved_state_equals_the_files_of_save_pretrained(kind: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    expected, found = load_file(tmp_path / "model.safetensors"), internals.saved_state(model)

    assert found.keys() == expected.keys(), gone("revert_weight_conversion")
    assert all(torch.equal(found[name], expected[name]) for name in expected), gone("revert_weight_conversion")


def test_a_loaded_layer_gets_fresh_weights(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(saved(tiny_model("vit"), tmp_path))
    loaded, other = model.classifier.weight.clone(), model.vit.layernorm.weight.clone()
    with torch.no_grad():
        model.classifier.bias.fill_(3.0)

    torch.manual_seed(5)
    internals.initialize_(model.classifier, model)
    first = model.classifier.weight.clone()
    torch.manual_seed(5)
    internals.initialize_(model.classifier, model)

    assert not torch.equal(first, loaded), gone("_is_hf_initialized or _init_weights")
    assert torch.equal(model.classifier.weight, first), gone("_init_weights")
    assert 0.01 < first.std() < 0.04, gone("_init_weights")  # ViTConfig.initializer_range is 0.02
    assert not model.classifier.bias.any(), gone("_init_weights")
    assert torch.equal(model.vit.layernorm.weight, other)


def test_transformers_marks_loaded_weights_as_before(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(saved(tiny_model("vit"), tmp_path))
    before = model.classifier.weight.clone()

    model._init_weights(model.classifier)

    assert torch.equal(model.classifier.weight, before), gone("_is_hf_initialized: the mark may be unnecessary now")


def test_checkpoints_keep_the_names_in_memory_inside_the_block_only(tmp_path: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(saved(tiny_model("vit"), tmp_path))
    in_files = set(internals.saved_state(model))

    with internals.checkpoints_in_runtime_names(model):
        inside = set(internals.saved_state(model))

    assert inside == set(model.state_dict()) != in_files, gone("_weight_conversions")
    assert set(internals.saved_state(model)) == in_files, gone("_weight_conversions")


def test_a_model_without_attention_takes_a_loaded_config(tmp_path: Path) -> None:
    class Plain(PreTrainedModel):
        """A class without attention, which accepts no other kind of attention."""

        config_class = ViTConfig

    config = AutoModelForImageClassification.from_pretrained(
        saved(tiny_model("vit"), tmp_path), attn_implementation="sdpa"
    ).config
    with pytest.raises(ValueError, match="scaled_dot_product_attention"):
        Plain(config)

    internals.use_plain_attention_(config)

    assert isinstance(Plain(config), Plain), gone("_attn_implementation")


def test_tasks_and_their_auto_classes() -> None:
    tasks = internals.task_classes()
    assert tasks["text-classification"] == (AutoModelForSequenceClassification,), gone("SUPPORTED_TASKS")
    assert tasks["image-classification"] == (AutoModelForImageClassification,), gone("SUPPORTED_TASKS")
    assert "text-generation" in tasks


def test_the_class_that_an_auto_class_takes() -> None:
    found = internals.class_of(AutoModelForSequenceClassification, BertConfig())
    assert found is BertForSequenceClassification, gone("_model_mapping")
    assert internals.class_of(AutoModelForSequenceClassification, ViTConfig()) is None, gone("_model_mapping")


def test_the_first_of_several_classes_is_taken() -> None:
    assert internals.class_of(AutoModel, FunnelConfig()) is FunnelModel, gone("_model_mapping")


def test_names_of_the_classes_of_an_auto_class() -> None:
    found = internals.class_names(AutoModel)
    assert {"BertModel", "ViTModel", "FunnelModel", "FunnelBaseModel"} <= found, gone("_model_mapping._model_mapping")
    assert "BertForSequenceClassification" not in found
    assert "BertForQuestionAnswering" in internals.class_names(AutoModelForQuestionAnswering)


def test_a_model_with_code_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import BertConfig, BertForSequenceClassification\n\n\n"
        'class OwnConfig(BertConfig):\n    model_type = "own_of_test_internals"\n\n\n'
        "class OwnForSequenceClassification(BertForSequenceClassification):\n    config_class = OwnConfig\n"
    )
    (tmp_path / "config.json").write_text(
        '{"model_type": "own_of_test_internals", "auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}'
    )
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=True)

    found = internals.own_class("modeling_own.OwnForSequenceClassification", config)

    assert internals.has_own_code(config), gone("TRANSFORMERS_DYNAMIC_MODULE_NAME")
    assert not internals.has_own_code(BertConfig())
    assert found.__name__ == "OwnForSequenceClassification", gone("get_class_from_dynamic_module")
    assert issubclass(found, BertForSequenceClassification) and found.config_class is type(config)


def test_names_in_files_become_names_in_memory() -> None:
    model = tiny_model("vit")
    renamings, converters = internals.weight_conversions(model)
    name = "vit.encoder.layer.0.attention.attention.key.weight"

    assert not converters, gone("get_model_conversion_mapping")
    expected = ("vit.layers.0.attention.k_proj.weight", None)
    assert internals.runtime_name(name, renamings) == expected, gone("rename_source_key")
    without = internals.runtime_name(name.removeprefix("vit."), renamings, [], "vit", model.state_dict())
    assert without == expected, gone("rename_source_key: it should add the prefix of the base model")


def test_loading_order_is_that_of_numbers() -> None:
    names = ["h.10.b", "h.2.b", "h.2.a"]
    assert internals.in_loading_order(names) == ["h.2.a", "h.2.b", "h.10.b"], gone("dot_natural_key")


def test_experts_are_fused_as_transformers_fuses_them() -> None:
    model = tiny_model("mixtral")
    state, expected = internals.saved_state(model), model.state_dict()
    renamings, converters = internals.weight_conversions(model)
    fused = "model.layers.0.mlp.experts.down_proj"
    names = {
        key: internals.runtime_name(key, renamings, converters, "model", expected)
        for key in internals.in_loading_order(state)
    }
    parts = {key: pattern for key, (name, pattern) in names.items() if name == fused and pattern}

    assert len(parts) == 2, gone("rename_source_key")  # one file tensor for each of two experts
    [converter] = [entry for entry in converters if {*parts.values()} <= {*entry.source_patterns}]
    for key, pattern in parts.items():
        internals.collect_(converter, fused, key, pattern, state[key])
    made = internals.convert(converter, fused, model)

    assert list(made) == [fused], gone("WeightConverter.convert")
    assert torch.equal(made[fused], expected[fused]), gone("WeightConverter.add_tensor or convert")


def test_columns_that_a_model_does_not_take_are_left_out() -> None:
    collator = internals.keeping_columns(default_data_collator, ["x", "labels"])
    batch = collator([{"x": 1, "labels": 0, "text": "one"}, {"x": 2, "labels": 1, "text": "two"}])
    assert {name: values.tolist() for name, values in batch.items()} == {"x": [1, 2], "labels": [0, 1]}, gone(
        "RemoveColumnsCollator"
    )


def tiny_trainer(folder: Path, **arguments: Any) -> tuple[Trainer, list[torch.Tensor]]:
    """Return a Trainer of one step over two batches of two samples, and the list that receives the bias gradient."""
    model, gradients = tiny_model("bert"), []
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    bias: Any = model.get_parameter("classifier.bias")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: gradients.append(bias.grad.clone()))
    settings = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=1,
        max_grad_norm=0.0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        **arguments,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return Trainer(model, settings, train_dataset=tiny_data("bert", 4), optimizers=(optimizer, schedule)), gradients


def test_the_trainer_averages_accumulated_batches(tmp_path: Path) -> None:
    trainer, gradients = tiny_trainer(tmp_path)
    model: Any = trainer.model
    model.eval()
    model(**default_data_collator(list(tiny_data("bert", 4)))).loss.backward()
    expected = model.classifier.bias.grad.clone()
    model.zero_grad()
    internals.average_each_batch_(trainer)

    trainer.train()

    torch.testing.assert_close(gradients, [expected], msg=gone("model_accepts_loss_kwargs"))


def test_the_trainer_alone_would_add_accumulated_batches(tmp_path: Path) -> None:
    (averaging, expected), (adding, found) = tiny_trainer(tmp_path), tiny_trainer(tmp_path)
    internals.average_each_batch_(averaging)

    averaging.train()
    adding.train()

    reason = "the Trainer now averages itself: average_each_batch_ may be unnecessary"
    torch.testing.assert_close(found, [2 * expected[0]], msg=reason)


# accelerate


def test_autocast_leaves_the_wrapped_forward_on_a_model(tmp_path: Path) -> None:
    trainer, _ = tiny_trainer(tmp_path, bf16=True)
    model: Any = trainer.model
    trainer.train()
    assert "_original_forward" in vars(model), gone("_original_forward")

    internals.forget_original_forward_(model)
    internals.forget_original_forward_(model)

    assert "_original_forward" not in vars(model)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("CUDA out of memory."), False),
    ],
)
def test_lack_of_memory_is_recognized(error: Exception, expected: bool) -> None:
    assert internals.lacks_memory(error) is expected, gone("should_reduce_batch_size")


# peft


def test_layers_of_adapters_that_merge() -> None:
    from peft.tuners.lora import LoraLayer
    from peft.tuners.tuners_utils import BaseTunerLayer

    assert internals.merging_layer(PeftType.LORA) is LoraLayer, gone("tuner_layer_cls")
    assert issubclass(internals.merging_layer(PeftType.IA3), BaseTunerLayer), gone("tuner_layer_cls")
    assert internals.merging_layer(PeftType.PREFIX_TUNING) is None, gone("tuner_layer_cls")


def test_modules_that_unload_themselves() -> None:
    config = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    adapted = get_peft_model(tiny_model("bert"), config)
    found = {name for name, module in adapted.get_base_model().named_modules() if internals.unloads_itself(module)}
    assert found == {"classifier"}, gone("unload_and_optionally_merge_module")


def test_parameters_of_adapters_begin_as_before() -> None:
    found = {kind: internals.parameter_prefix(kind) for kind in (PeftType.LORA, PeftType.IA3, PeftType.LOHA)}
    expected = {PeftType.LORA: "lora_", PeftType.IA3: "ia3_", PeftType.LOHA: "hada_"}
    assert found == expected, gone("PEFT_TYPE_TO_PREFIX_MAPPING")


def test_patterns_of_ranks() -> None:
    patterns = {"query": 4, r"layer\.1\..*value": 8}
    names = ("encoder.layer.0.query", "encoder.layer.1.x.value", "encoder.layer.0.x.value")
    found = [internals.matching_pattern(patterns, name) for name in names]
    assert found == ["query", r"layer\.1\..*value", "encoder.layer.0.x.value"], gone("get_pattern_key")


@pytest.mark.parametrize(("dora", "rank"), [(False, 3), (True, None)])
def test_a_layer_of_plain_lora_has_a_rank(dora: bool, rank: int | None) -> None:
    config = LoraConfig(r=3, target_modules=["query"], use_dora=dora)
    adapted = get_peft_model(tiny_model("bert"), config)
    found = {name: internals.lora_rank(module) for name, module in adapted.named_modules() if name.endswith("query")}
    assert found and set(found.values()) == {rank}
    assert internals.lora_rank(adapted) is None


def test_layers_of_fused_experts_are_known() -> None:
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.gate_up_proj"]
    )
    layers = internals.expert_layers(get_peft_model(tiny_model("mixtral"), config))
    shapes = {"base_layer": (2, 64, 16), "experts": (2, 16, 32)}
    prefix = "base_model.model.model.layers.0.mlp.experts"
    assert {key: layer.shape for key, layer in layers.items() if key.startswith(prefix)} == {
        f"{prefix}.base_layer": shapes["base_layer"],
        prefix: shapes["experts"],
    }
    assert all(layer.reads_second and not layer.is_transposed for layer in layers.values())
    assert not internals.expert_layers(get_peft_model(tiny_model("bert"), LoraConfig(target_modules=["query"])))


def test_ranks_follow_the_same_patterns_in_peft() -> None:
    patterns = {r"layer\.1\..*query": 3}
    config = LoraConfig(r=2, target_modules=["query"], rank_pattern=patterns)
    adapted = get_peft_model(tiny_model("bert"), config)
    ranks = {
        name: module.r["default"] for name, module in adapted.get_base_model().named_modules() if hasattr(module, "r")
    }
    assert len(ranks) == 2
    for name, rank in ranks.items():
        matched = internals.matching_pattern(patterns, name)
        assert rank == patterns.get(matched, config.r), gone("get_pattern_key")


@pytest.mark.parametrize("kind", ["bert", "mixtral"])
def test_weights_of_an_adapter_come_in_runtime_names(kind: str, tmp_path: Path) -> None:
    base = saved(tiny_model(kind), tmp_path / "base")
    target = ["query"] if kind == "bert" else ["q_proj"]
    adapter = saved_adapter(tiny_model(kind), base, tmp_path / "adapter", target_modules=target)
    adapted = PeftModel.from_pretrained(tiny_model(kind), adapter)

    found = internals.adapter_weights_in_runtime_names(adapted, load_peft_weights(adapter, device="cpu"))

    parameters = {
        name.replace(".default.", "."): parameter for name, parameter in adapted.named_parameters() if "lora_" in name
    }
    assert found.keys() == parameters.keys(), gone("convert_peft_adapter_state_dict_for_transformers")
    for name, parameter in parameters.items():
        assert torch.equal(found[name], parameter), gone("convert_peft_adapter_state_dict_for_transformers")


def test_the_base_of_an_adapter_forgets_it(recwarn: pytest.WarningsRecorder) -> None:
    def warned() -> bool:
        get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
        return any("multiple adapters" in str(warning.message) for warning in recwarn)

    model = tiny_model("bert")
    assert not warned()
    assert "peft_config" in vars(model), gone("peft_config on the base model")

    internals.forget_adapter_(model)

    assert "peft_config" not in vars(model)
    assert not warned(), gone("peft_config on the base model")
    assert warned(), "PEFT no longer warns of a configuration left on a base model: forget_adapter_ may be unnecessary"


# datasets


def test_formats_of_files() -> None:
    found = internals.file_formats()
    assert {"imagefolder", "csv", "json", "parquet"} <= found, gone("_PACKAGED_DATASETS_MODULES")
    assert "glue" not in found


# huggingface_hub


def test_folder_names_in_the_cache() -> None:
    assert internals.cache_folder_name("org/name") == "models--org--name", gone("repo_folder_name")


def test_the_next_session_is_made_by_another_factory() -> None:
    before, session = internals.client_factory(), get_session()
    made = []

    def make() -> Any:
        made.append(before())
        return made[-1]

    try:
        internals.replace_client_factory(make)
        assert get_session() is session and not made, gone("_GLOBAL_CLIENT_FACTORY: the session in use was closed")
        assert internals.client_factory() is make, gone("_GLOBAL_CLIENT_FACTORY")
        close_session()
        assert get_session() is made[0], gone("_GLOBAL_CLIENT_FACTORY")
    finally:
        internals.replace_client_factory(before)
        close_session()


def test_the_factory_of_the_user_is_found() -> None:
    before = internals.client_factory()

    def make() -> Any:
        return before()

    try:
        set_client_factory(make)
        assert internals.client_factory() is make, gone("_GLOBAL_CLIENT_FACTORY")
    finally:
        set_client_factory(before)


# The rule


# Modules whose public names are documented beyond `__all__`.
DOCUMENTED = {
    "huggingface_hub": {"constants"},
    "peft.tuners.tuners_utils": {"BaseTunerLayer"},
    "peft.utils.merge_utils": {"dare_linear", "ties"},
    "transformers.utils": {"ModelOutput", "SAFE_WEIGHTS_INDEX_NAME", "is_liger_kernel_available", "logging"},
}
WHOLE = ("huggingface_hub.errors",)  # modules in which every name is documented
# Packages whose public names are those in `__all__`, or those without an underscore if there is no `__all__`.
EXPORTING = (
    "accelerate",
    "datasets",
    "huggingface_hub",
    "huggingface_hub.utils",
    "peft",
    "peft.utils",
    "transformers",
)
# Undocumented names without an underscore that internals.py wraps.
WRAPPED = {
    "SUPPORTED_TASKS",
    "active_peft_config",
    "add_tensor",
    "model_accepts_loss_kwargs",
    "tuner_layer_cls",
    "unload_and_optionally_merge_module",
}
NAMED_TUPLES = {"_replace"}  # Python's own attributes
TEXTS = {
    "_strategy",
    "_token",
    "_batch_size",
    "_name_or_path",
}  # suffixes of keys, and a key in the files of old models
PRIVATE = re.compile(r"_[a-zA-Z]\w*")


def own_names(tree: ast.AST) -> set[str]:
    """Return the names that a file defines: functions, classes, variables, and attributes of `self`."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def is_public(module: str, name: str) -> bool:
    """Whether an upstream module exports or documents a name."""
    if any(part.startswith("_") for part in (*module.split("."), name)):
        return False
    if module.partition(".")[0] == "torch" or module in WHOLE or name in DOCUMENTED.get(module, ()):
        return True
    if module not in EXPORTING:
        return False
    package = importlib.import_module(module)
    return name in getattr(package, "__all__", {name}) and not isinstance(getattr(package, name, None), ModuleType)


def private_uses(source: str, own: set[str]) -> list[str]:
    """Return the uses of private upstream names in `source`, with their lines.

    Args:
        source: Code of a module.
        own: Private names that the package defines itself.
    """
    tree, found = ast.parse(source), []
    in_f_strings = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            paths = [alias.name.rpartition(".") for alias in node.names if alias.name.partition(".")[0] in UPSTREAM]
            names = [f"{module}.{name}" for module, _, name in paths if module and not is_public(module, name)]
        elif isinstance(node, ast.ImportFrom) and not node.level and str(node.module).partition(".")[0] in UPSTREAM:
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names if not is_public(module, alias.name)]
        elif isinstance(node, ast.Attribute):
            if node.attr in WRAPPED or (PRIVATE.fullmatch(node.attr) and node.attr not in own | NAMED_TUPLES):
                names = [node.attr]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in in_f_strings:
            if PRIVATE.fullmatch(node.value) and node.value not in TEXTS:
                names = [repr(node.value)]
        found += [f"line {getattr(node, 'lineno', 0)}: {name}" for name in names]
    return found


def test_private_upstream_names_are_used_in_one_file() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
    own = set().union(*(own_names(ast.parse(source)) for source in sources.values()))
    del sources[PACKAGE / "internals.py"]

    found = [
        f"{path.relative_to(ROOT)}, {use}" for path, source in sources.items() for use in private_uses(source, own)
    ]

    assert not found, "move each into a function of grasp_hf/internals.py, with a test:\n" + "\n".join(found)
    assert len(sources) > 50


@pytest.mark.parametrize(
    "source",
    [
        "from transformers.core_model_loading import rename_source_key",
        "from transformers import _private",
        "from huggingface_hub.utils import _http",
        "from peft.utils.other import get_pattern_key",
        "from torch.nn.modules.batchnorm import _BatchNorm",
        "from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as FORMATS",
        "import transformers.core_model_loading",
        "from transformers import core_model_loading, pipelines",
        "model._keys_to_ignore_on_save",
        "config._name_or_path",
        "self._keys_to_ignore_on_save",
        "model._weight_conversions = []",
        "vars(model).pop('_weight_conversions')",
        "getattr(model, '_weight_conversions', None)",
        "pipelines.SUPPORTED_TASKS",
    ],
)
def test_a_new_private_use_is_noticed(source: str) -> None:
    assert private_uses(source, {"_own"})


@pytest.mark.parametrize(
    "source",
    [
        "from transformers import PreTrainedModel, Trainer",
        "from huggingface_hub import HfApi, constants",
        "from datasets import load_dataset",
        "from accelerate import Accelerator",
        "from torch.utils.data import DataLoader",
        "import torch",
        "from .internals import _anything",
        "self._own = other._own",
        "model.__dict__",
        "parts._replace(query='')",
    ],
)
def test_public_and_own_names_are_left_alone(source: str) -> None:
    assert private_uses(source, {"_own"}) == []


def test_importing_the_file_imports_no_library() -> None:
    tree = ast.parse((PACKAGE / "internals.py").read_text(encoding="utf-8"))
    imported = {
        name.partition(".")[0]
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names])
        if name
    }
    assert imported == {"__future__", "collections", "contextlib", "typing"}


def test_every_function_has_a_test() -> None:
    functions = {
        node.name
        for node in ast.parse((PACKAGE / "internals.py").read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef)
    }
    tested = {
        node.attr
        for node in ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "internals"
    }
    assert functions == tested


# Versions


def requirements() -> dict[str, Requirement]:
    """Return the requirements in `pyproject.toml`, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {found.name: found for found in map(Requirement, project["dependencies"])}


def pinned_versions() -> dict[str, Version]:
    """Return the versions that `.ci/constraints.txt` pins, by name."""
    lines = (ROOT / ".ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return {name: Version(number) for name, _, number in (line.partition("==") for line in lines) if number}


@pytest.mark.parametrize("name", [name for name in UPSTREAM if name != "torch"])
def test_versions_are_bounded_where_private_names_may_change(name: str) -> None:
    specifier, tested = requirements()[name].specifier, pinned_versions()[name]
    following = f"0.{tested.minor + 1}" if tested.major == 0 else f"{tested.major + 1}"

    assert tested in specifier, f"{name} {tested} is tested, but pyproject.toml does not allow it"
    assert following not in specifier, f"{name} {following} is not tested, but pyproject.toml allows it"
