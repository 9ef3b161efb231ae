"""The main loop: units that move, stay or are undone, and the files that remain."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, DatasetDict
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    PreTrainedModel,
    SiglipConfig,
    SiglipForImageClassification,
    default_data_collator,
)

from grasp_hf import GraspConfig, GraspMerger, merge_pretrained
from grasp_hf.errors import ConfigError, DataError, GraspError, NonFiniteError, OutputExistsError
from grasp_hf.tensors.units import movable_tensors
from grasp_hf.validation.changes import Change
from grasp_hf.validation.losses import SampleLosses
from tests.support.hub.server import HubServer
from tests.support.models import (
    KINDS,
    LABELS,
    NO_TUNING,
    perturbed,
    saved,
    saved_adapter,
    tiny_data,
    tiny_model,
    tiny_tokenizer,
)
from tests.support.plain import mean_loss

STILL: dict[str, Any] = {**NO_TUNING, "batch_size": 8, "num_batches": 2}
BLEND: dict[str, Any] = {**STILL, "method": "blend"}
BETWEEN: dict[str, Any] = {**NO_TUNING, "method": "blend", "initial_epochs": 1, "finetune_epochs": 1, "batch_size": 8}


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: torch.nn.Module, before: dict[str, Tensor]) -> None:
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def data_for(kind: str) -> dict[str, Any]:
    return {"train_dataset": tiny_data(kind, 24, seed=1), "eval_dataset": tiny_data(kind, 12, seed=2)}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, torch.float32) for kind in (*KINDS, "gpt2")), ("bert", torch.bfloat16), ("gpt2", torch.bfloat16)],
)
def test_a_threshold_that_lets_nothing_through_changes_nothing(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model(kind), 1), tmp_path / "source")
    target = perturbed(tiny_model(kind), 2).train()
    target = target.bfloat16() if dtype == torch.bfloat16 else target
    frozen = next(target.parameters()).requires_grad_(False)
    before = state_of(target)
    merger = GraspMerger(target, GraspConfig(method="copy", threshold=1.0, **STILL))
    report = merger.merge([source], **data_for(kind))
    assert report.steps[0].moved == 0
    assert_unchanged(target, before)
    assert target.training and not frozen.requires_grad
    assert {p.dtype for p in target.parameters()} == {dtype}
    assert all(p.grad is None for p in target.parameters())


@pytest.mark.parametrize("kind", [*KINDS, "gpt2", "mixtral", "swin", "dinov2", "gpt_neox"])
def test_copying_everything_gives_the_source_with_its_statistics(kind: str, tmp_path: Path) -> None:
    source = perturbed(tiny_model(kind), 1)
    target = perturbed(tiny_model(kind), 2)
    before = state_of(target)
    merger = GraspMerger(target, GraspConfig(method="copy", threshold=-1.0, gate=False, **STILL))
    step = merger.merge_source(saved(source, tmp_path / "source"), **data_for(kind))
    undefined = {unit.name for unit in step.units if unit.decision == "undefined"}
    source_tensors = movable_tensors(source)
    for name, value in movable_tensors(target).items():
        expected = before[name] if name.rpartition(".")[0] in undefined else source_tensors[name]
        assert torch.equal(value, expected), name
    assert step.moved + len(undefined) == len(step.units)


def test_a_blend_moves_weights_and_statistics_by_the_coefficients_of_the_report(tmp_path: Path) -> None:
    source, target = perturbed(tiny_model("resnet"), 1, scale=0.2), perturbed(tiny_model("resnet"), 2)
    before = {name: value.clone() for name, value in movable_tensors(target).items()}
    merger = GraspMerger(target, GraspConfig(gate=False, unit="module", **BLEND))
    step = merger.merge_source(saved(source, tmp_path / "source"), **data_for("resnet"))
    mixes = {unit.name: (unit.keep or 0.0, unit.coefficient) for unit in step.units}
    with_tensors = {name for name, module in target.named_modules() if [*module.parameters(recurse=False)]}
    assert mixes.keys() == with_tensors and all(take > 0 for _, take in mixes.values())
    after, ends = movable_tensors(target), movable_tensors(source)
    for name, start in before.items():
        if start.is_floating_point():
            keep, take = mixes[name.rpartition(".")[0]]
            share = take if isinstance(after[name], torch.nn.Parameter) else take / (keep + take)
            expected = start + share * (ends[name] - start)  # the base is the target as it was
            torch.testing.assert_close(after[name].detach(), expected.detach(), atol=1e-6, rtol=0)


def test_the_gate_undoes_a_harmful_source_bit_for_bit(tmp_path: Path) -> None:
    target = tiny_model("vit")
    config = GraspConfig(
        method="copy", threshold=-1.0, training_arguments={"learning_rate": 0.01}, **{**STILL, "initial_epochs": 10}
    )
    merger = GraspMerger(target, config)
    merger.merge([], **data_for("vit"))
    before = state_of(target)
    bad, samples = perturbed(tiny_model("vit"), 1, scale=1.0), data_for("vit")["eval_dataset"]
    step = merger.merge_source(saved(bad, tmp_path / "bad"), **data_for("vit"))
    assert not step.accepted and step.moved == 0
    assert {unit.decision for unit in step.units} == {"undone"}, (
        "the whole source was in the model before the gate undid it"
    )
    assert step.after_transfer["loss"] == pytest.approx(mean_loss(bad, samples), abs=1e-6)
    assert step.before["loss"] == step.after["loss"] == pytest.approx(mean_loss(target, samples), abs=1e-6)
    assert step.after_transfer["loss"] > step.before["loss"]
    assert_unchanged(target, before)


def test_a_source_that_solves_the_task_is_accepted(tmp_path: Path) -> None:
    expert = GraspMerger(
        tiny_model("resnet"),
        GraspConfig(initial_epochs=20, gate=False, batch_size=8, training_arguments={"learning_rate": 0.01}),
    )
    expert.merge([], **data_for("resnet"))
    source = saved(expert.model, tmp_path / "expert")
    merger = GraspMerger(tiny_model("resnet"), GraspConfig(**{**BLEND, "num_batches": 16}))
    step = merger.merge_source(source, **data_for("resnet"))
    assert step.accepted and step.moved == len(step.units)
    samples = data_for("resnet").values()
    assert step.before["loss"] == pytest.approx(mean_loss(tiny_model("resnet"), *samples), abs=1e-6)
    assert step.after["loss"] == pytest.approx(mean_loss(merger.model, *samples), abs=1e-6)
    assert step.before["accuracy"] < step.after["accuracy"] == 1.0


@pytest.mark.parametrize("method", ["copy", "blend"])
def test_a_head_with_other_labels_is_never_touched(method: str, tmp_path: Path) -> None:
    source = perturbed(tiny_model("vit", labels=["car", "bus", "tram"]), 1)
    target = perturbed(tiny_model("vit"), 2)
    head = {name: value.clone() for name, value in target.state_dict().items() if name.startswith("classifier")}
    config = GraspConfig(method=method, threshold=-1.0, gate=False, **STILL)
    step = GraspMerger(target, config).merge_source(saved(source, tmp_path / "source"), **data_for("vit"))
    assert step.moved == len(step.units) == 5 and step.other_units == 1
    for name, value in target.state_dict().items():
        if name.startswith("classifier"):
            assert torch.equal(value, head[name])
        elif method == "copy":
            assert torch.equal(value, source.state_dict()[name]), name


def test_a_failing_fine_tune_gives_the_target_back_as_it_was(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source")
    target = perturbed(tiny_model("resnet"), 2)
    before = state_of(target)
    config = GraspConfig(
        **{**STILL, "finetune_epochs": 2},
        training_arguments={"learning_rate": 1e38, "max_grad_norm": 0.0},
    )
    merger = GraspMerger(target, config)
    with pytest.raises(NonFiniteError, match=f"while merging source 1/1 '{source}': .*lower learning_rate"):
        merger.merge([source], **data_for("resnet"))
    assert_unchanged(target, before)
    assert merger.report.steps == []


def test_steps_before_an_error_stay_done(tmp_path: Path) -> None:
    good = saved(perturbed(tiny_model("vit"), 1), tmp_path / "good")
    other = saved(tiny_model("resnet"), tmp_path / "other")
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**BLEND))
    with pytest.raises(
        GraspError, match="(?s)while merging source 2/2 .*different architecture: got resnet, expected vit"
    ) as caught:
        merger.merge([good, other], **data_for("vit"))
    assert caught.value.problems == ["different architecture: got resnet, expected vit"]
    assert [step.source for step in merger.report.steps] == [good]


def test_the_same_merge_twice_gives_the_same_weights(tmp_path: Path) -> None:
    sources = [saved(perturbed(tiny_model("bert"), seed), tmp_path / str(seed)) for seed in (1, 2)]
    base = saved(tiny_model("bert"), tmp_path / "base")
    config = GraspConfig(**BETWEEN)
    first, second = (merge_pretrained(base, sources, config=config, **data_for("bert")) for _ in range(2))
    assert_unchanged(first, state_of(second))


def test_without_a_base_model_the_first_source_is_the_start(tmp_path: Path) -> None:
    sources = [saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2)]
    config = GraspConfig(method="copy", threshold=1.0, **STILL)
    model = merge_pretrained(None, sources, config=config, **data_for("vit"))
    assert_unchanged(model, state_of(AutoModelForImageClassification.from_pretrained(sources[0])))


def test_labels_that_were_learned_validate_no_source(tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("bert"), 1), tmp_path / "source")
    config = GraspConfig(**BETWEEN)
    merger = GraspMerger(tiny_model("bert"), config)
    step = merger.merge([source], train_dataset=tiny_data("bert", 24)).steps[0]
    assert step.accepted and step.change is None and step.validated_by == ""
    assert step.before == step.after_transfer == step.after == {}
    assert "loss" not in step.summary_line() and step.row()["loss before"] is None


@pytest.mark.parametrize("length", [4, 12])
def test_a_masked_language_model_is_evaluated_with_the_same_masks_each_time(length: int, tmp_path: Path) -> None:
    def model(seed: int) -> PreTrainedModel:
        return perturbed(BertForMaskedLM(BertConfig.from_dict(tiny_model("bert").config.to_dict())), seed)

    tokenizer = tiny_tokenizer()
    tokenizer.mask_token = "[MASK]"
    sources = [saved(model(seed), tmp_path / str(seed)) for seed in (1, 2)]
    tokens = torch.randint(5, len(tokenizer), (64, length), generator=torch.Generator().manual_seed(0))
    data = Dataset.from_dict({"input_ids": tokens.tolist()})
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=True, mlm_probability=0.3)
    merger = GraspMerger(model(0), GraspConfig(final_epochs=0, batch_size=16))
    state = torch.random.get_rng_state()
    losses = [merger.judge(data, data_collator=collator).losses for _ in range(2)]
    assert torch.equal(*losses) and torch.equal(torch.random.get_rng_state(), state)
    report = merger.merge(sources, train_dataset=data, data_collator=collator)
    assert all(step.change and step.change.samples <= 64 for step in report.steps)


def test_evaluation_that_was_asked_for_needs_data() -> None:
    config = GraspConfig(training_arguments={"eval_strategy": "epoch"})
    early = GraspConfig(training_arguments={"eval_on_start": True})
    with pytest.raises(
        ConfigError, match="training_arguments.eval_on_start: got True, expected none without evaluation"
    ):
        GraspMerger(tiny_model("vit"), early).merge([], train_dataset=tiny_data("vit", 8))
    with pytest.raises(
        ConfigError, match="training_arguments.eval_strategy: got 'epoch', expected none without .* eval_dataset"
    ):
        GraspMerger(tiny_model("vit"), config).merge(["org/nowhere"], train_dataset=tiny_data("vit", 4))


def test_an_empty_data_set_is_refused_before_anything_is_loaded() -> None:
    merger = GraspMerger(tiny_model("vit"))
    with pytest.raises(DataError, match="train_dataset is empty"):
        merger.merge(["org/nowhere"], train_dataset=[])
    with pytest.raises(DataError, match="eval_dataset is empty"):
        merger.merge(["org/nowhere"], train_dataset=tiny_data("vit", 4), eval_dataset=[])


@pytest.mark.parametrize("kind", ["vit", "bert"])
def test_the_saved_folder_loads_and_holds_the_record(kind: str, tmp_path: Path) -> None:
    sources = [saved(perturbed(tiny_model(kind), seed), tmp_path / str(seed)) for seed in (1, 2)]
    base = saved(tiny_model(kind), tmp_path / "base")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**BETWEEN))
    merger.merge(sources, **data_for(kind))
    merger.save_pretrained(tmp_path / "merged")
    merger.save_pretrained(tmp_path / "merged")  # an earlier merge may be replaced

    auto = AutoModelForImageClassification if kind == "vit" else AutoModelForSequenceClassification
    batch = tiny_data(kind, 4)[:4]
    assert torch.equal(auto.from_pretrained(tmp_path / "merged")(**batch).logits, merger.model.eval()(**batch).logits)

    report = json.loads((tmp_path / "merged/grasp_report.json").read_text())
    assert [step["source"] for step in report["steps"]] == sources
    assert report["steps"][0]["units"][0].keys() == {*("name", "elements", "score", "coefficient", "decision", "keep")}
    assert report["steps"][1]["after"]["loss"] == pytest.approx(merger.report.steps[1].after["loss"])
    recipe = yaml.safe_load((tmp_path / "merged/grasp_config.yaml").read_text())
    assert (recipe["sources"], recipe["seed"], recipe["record"]["data"]["train"]["samples"]) == (sources, 42, 24)
    card = (tmp_path / "merged/README.md").read_text()
    assert "base_model_relation" not in card and str(tmp_path) not in card.split("### Configuration")[0]
    assert f"| {Path(sources[0]).name} " in str(merger.report)


def test_a_folder_with_something_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputExistsError, match="already holds something that is not a merge"):
        GraspMerger(tiny_model("vit")).save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_each_source_is_gone_before_the_next_also_from_memory_maps(tmp_path: Path) -> None:
    """Copied values are in the target's own storage, so no file of a source stays mapped."""
    source = saved(perturbed(tiny_model("vit"), 1), tmp_path / "source")
    merger = GraspMerger(tiny_model("vit"), GraspConfig(method="copy", threshold=-1.0, gate=False, **STILL))
    storages = {name: tensor.data_ptr() for name, tensor in movable_tensors(merger.model).items()}
    merger.merge_source(source, **data_for("vit"))
    assert_unchanged(merger.model, state_of(perturbed(tiny_model("vit"), 1)))
    assert {name: tensor.data_ptr() for name, tensor in movable_tensors(merger.model).items()} == storages
    assert f"{source}/" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("task", ["token-classification", "fill-mask", "AutoModelForQuestionAnswering"])
def test_any_model_with_a_loss_can_be_merged_when_the_user_brings_the_data(task: str, tmp_path: Path) -> None:
    labels = ["start", "end"] if task == "AutoModelForQuestionAnswering" else LABELS
    sources = [saved(perturbed(tiny_model("bert", labels=labels), seed), tmp_path / str(seed)) for seed in (1, 2)]
    tokens = tiny_data("bert", 16).remove_columns("labels")
    if task == "AutoModelForQuestionAnswering":
        data = tokens.add_column("start_positions", [1] * 16).add_column("end_positions", [2] * 16)
    elif task == "token-classification":
        data = tokens.map(lambda sample: {"labels": sample["input_ids"] % 3})
    else:
        data = tokens.map(lambda sample: {"labels": sample["input_ids"]})
    config = GraspConfig(**{**BLEND, "num_batches": 16, "coefficient_lr": 0.3, "unit": "module"})
    merger = GraspMerger.from_pretrained(sources[0], config=config, task=task)
    batch = default_data_collator(list(data))
    with torch.no_grad():
        before = float(merger.model.eval()(**batch).loss)
        step = merger.merge(sources[1:], train_dataset=data, eval_dataset=data).steps[0]
        after = float(merger.model.eval()(**batch).loss)
    assert (step.before["loss"], step.after["loss"]) == pytest.approx((before, after), abs=1e-5)
    assert step.accepted and after < before
    assert "accuracy" not in step.after


def test_batches_without_labels_are_refused_before_training() -> None:
    merger = GraspMerger(tiny_model("bert"))
    with pytest.raises(
        DataError, match="returned no loss for a batch with .*input_ids.*; expected a data set with labels"
    ):
        merger.merge([], train_dataset=tiny_data("bert", 8).remove_columns("labels"))


def test_a_data_set_that_does_not_fit_the_model_is_refused_with_advice(tmp_path: Path) -> None:
    good, texts = tiny_data("bert", 8), Dataset.from_dict({"text": ["red", "blue"], "labels": [0, 1]})
    named = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": ["bird", "cat"]})
    refused: dict[str, dict[str, Any]] = {
        "train_dataset is the text 'train.csv'": {"train_dataset": "train.csv"},
        "train_dataset holds the splits train, test; expected one of them": {
            "train_dataset": DatasetDict(train=good, test=good)
        },
        "train_dataset: no batch .* with the columns text, labels: .*; expected input_ids": {"train_dataset": texts},
        "train_dataset: no batch .*labels as numbers": {"train_dataset": named},
        "eval_dataset: BertForSequenceClassification returned no loss": {
            "train_dataset": good,
            "eval_dataset": good.remove_columns("labels"),
        },
    }
    base = saved(tiny_model("bert"), tmp_path / "base")
    for message, arguments in refused.items():
        with pytest.raises(DataError, match=message):
            GraspMerger.from_pretrained(base).merge([], **arguments)


def test_arguments_in_the_wrong_place_are_refused_with_advice(tmp_path: Path) -> None:
    model = tiny_model("bert")
    base: Any = saved(model, tmp_path / "base")
    with pytest.raises(ConfigError, match="final_epochs: it belongs in the configuration: config=GraspConfig"):
        GraspMerger.from_pretrained(base, final_epochs=3)
    config: Any = {"final_epochs": 3}
    with pytest.raises(ConfigError, match="config: got a dict, expected a GraspConfig"):
        GraspMerger.from_pretrained(base, config=config)
    base = model
    with pytest.raises(ConfigError, match="got a BertForSequenceClassification, .*GraspMerger.model. takes a model"):
        GraspMerger.from_pretrained(base)
    with pytest.raises(ConfigError, match="sources: got a BertForSequenceClassification, expected references"):
        GraspMerger(model).merge([base], train_dataset=tiny_data("bert", 8))


def test_a_source_that_changes_no_loss_is_accepted(tmp_path: Path) -> None:
    """The gate accepts a source that equals the target."""
    target = perturbed(tiny_model("vit"), 1)
    config = GraspConfig(method="copy", threshold=-1.0, **STILL)
    step = GraspMerger(target, config).merge_source(saved(target, tmp_path / "same"), **data_for("vit"))
    assert step.accepted and step.moved == len(step.units) == 6
    assert step.after_transfer == step.before


def test_the_head_of_a_classifier_without_a_base_model_can_be_kept(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    models = {
        name: SiglipForImageClassification(
            SiglipConfig(
                vision_config={**vision, "image_size": 8, "patch_size": 4},
                text_config={**vision, "vocab_size": 9},
                id2label=dict(enumerate(labels)),
            )
        )
        for name, labels in {"source": ["x", "y", "z"], "target": LABELS}.items()
    }
    head = {name: value.clone() for name, value in models["target"].classifier.state_dict().items()}
    config = GraspConfig(method="copy", threshold=-1.0, gate=False, **STILL)
    models["source"].save_pretrained(tmp_path / "source")
    step = GraspMerger(models["target"], config).merge_source(str(tmp_path / "source"), **data_for("vit"))
    assert step.other_units == 1
    assert_unchanged(models["target"].classifier, head)
    assert_unchanged(models["target"].vision_model.encoder, state_of(models["source"].vision_model.encoder))


def test_numbers_of_numpy_are_written_like_others(tmp_path: Path) -> None:
    config = GraspConfig(threshold=np.float64(0.25), training_arguments={"learning_rate": np.float32(0.5)})
    GraspMerger(tiny_model("vit"), config).save_pretrained(tmp_path / "merged")
    written = yaml.safe_load((tmp_path / "merged/grasp_config.yaml").read_text())
    assert (written["threshold"], written["training_arguments"]) == (0.25, {"learning_rate": 0.5})


def test_the_card_has_evaluation_rows_and_the_strictest_licence(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    sources = [saved(perturbed(tiny_model("vit"), seed), tmp_path / str(seed)) for seed in (1, 2)]
    for folder, license in zip((base, *sources), ("mit", "mit", "apache-2.0"), strict=True):
        (Path(folder) / "README.md").write_text(f"---\nlicense: {license}\n---\n")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(gate=False, **STILL))
    merger.merge(sources[:1], **data_for("vit"))
    merger.save_pretrained(tmp_path / "merged")
    data = ModelCard.load(tmp_path / "merged/README.md").data
    assert data.license == "mit" and data.pipeline_tag == "image-classification"
    rows = {row.metric_type: row.metric_value for row in data.eval_results}
    assert (
        "\n1 of 1 sources merged into one `ViTForImageClassification`" in (tmp_path / "merged/README.md").read_text()
    )
    assert rows == {key: pytest.approx(value, abs=1e-4) for key, value in merger.report.steps[0].after.items()}
    merger.merge(sources[1:], **data_for("vit"))
    merger.save_pretrained(tmp_path / "merged")
    assert ModelCard.load(tmp_path / "merged/README.md").data.license == "apache-2.0"
    (held,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if not torch.cuda.is_available():  # otherwise the report holds the memory of the GPU
        assert merger.report.steps[1].peak_memory == pytest.approx(1024 * int(held), rel=0.05)


def test_an_adapter_moves_its_part_of_a_layer(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    adapter = saved_adapter(tiny_model("vit"), base, tmp_path / "adapter", target_modules=["q_proj"])
    config = GraspConfig(method="copy", unit="layer", threshold=-1.0, gate=False, **STILL)
    merger = GraspMerger.from_pretrained(base, config=config)
    before = state_of(merger.model)
    step = merger.merge_source(adapter, **data_for("vit"))
    assert [unit.name for unit in step.units] == ["vit.layers.0", "vit.layers.1"] and step.moved == 2
    changed = {name for name, value in merger.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"vit.layers.{layer}.attention.q_proj.weight" for layer in (0, 1)}


def test_parameters_without_a_gradient_are_undefined_stay_and_are_counted(tmp_path: Path) -> None:
    """A Dinov2 has a mask token, which no classifier uses."""
    source = saved(perturbed(tiny_model("dinov2"), 1), tmp_path / "source")
    target = tiny_model("dinov2")
    config = GraspConfig(method="copy", unit="tensor", threshold=-1.0, **{**STILL, "gate": False})
    report = GraspMerger(target, config).merge([source], **data_for("dinov2"))
    undefined = [unit.name for unit in report.steps[0].units if unit.decision == "undefined"]
    name = "dinov2.embeddings.mask_token"
    assert undefined == [name]
    assert torch.equal(target.get_parameter(name), tiny_model("dinov2").get_parameter(name))
    assert report.steps[0].row()["undefined"] == "1"


def test_an_old_bert_with_gamma_and_beta(tmp_path: Path) -> None:
    source = perturbed(tiny_model("bert"), 1)
    folder = Path(saved(source, tmp_path / "source"))
    ends = {".weight": ".gamma", ".bias": ".beta"}
    tensors = load_file(folder / "model.safetensors")
    for key in [key for key in tensors if "LayerNorm" in key]:
        stem, _, end = key.rpartition(".")
        tensors[stem + ends[f".{end}"]] = tensors.pop(key)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    target = tiny_model("bert")
    GraspMerger(target, GraspConfig(method="average", **{**STILL, "gate": False})).merge([str(folder)])
    for name, value in movable_tensors(source).items():
        assert torch.equal(movable_tensors(target)[name], value), name


AVERAGE = GraspConfig(method="average", **NO_TUNING, gate=False)


@pytest.mark.parametrize(
    "dtypes", [("float32",) * 4, ("float32", "bfloat16", "float16", "float32")], ids=["one", "mixed"]
)
@pytest.mark.parametrize("kind", ["resnet", "gpt2"])
def test_the_streaming_average_is_the_mean_of_all_sources(kind: str, dtypes: Any, tmp_path: Path) -> None:
    models = [perturbed(tiny_model(kind), seed).to(getattr(torch, dtype)) for seed, dtype in enumerate(dtypes)]
    sources = [saved(model, tmp_path / str(number)) for number, model in enumerate(models)]
    from_a_base = GraspMerger.from_pretrained(saved(tiny_model(kind, seed=9), tmp_path / "base"), config=AVERAGE)
    from_a_base.merge(sources)
    results = [from_a_base.model, merge_pretrained(None, sources, config=AVERAGE)]
    for merged in results:
        for name, value in movable_tensors(merged).items():
            if value.is_floating_point():
                each = [movable_tensors(model)[name].float() for model in models]
                torch.testing.assert_close(value, torch.stack(each).mean(0), atol=1e-6, rtol=1e-6)
        assert all(not name.endswith("grad") and p.grad is None for name, p in merged.named_parameters())


def test_an_average_does_not_count_a_rejected_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good, bad = perturbed(tiny_model("vit"), 1), perturbed(tiny_model("vit"), 2)
    changes = iter([-1.0, -1.0, 1.0, 1.0, -1.0, -1.0])  # each step compares the losses as validated and as merged
    monkeypatch.setattr("grasp_hf.merging.step.paired_change", lambda *losses: Change(next(changes), 0.1, 12))
    sources = [saved(model, tmp_path / str(number)) for number, model in enumerate((good, bad, good))]
    merger = GraspMerger(tiny_model("vit"), GraspConfig(method="average", **STILL))
    steps = merger.merge(sources, **data_for("vit")).steps
    assert [step.accepted for step in steps] == [True, False, True]
    assert [step.units[0].coefficient for step in steps] == [1, 1 / 2, 1 / 2]
    assert_unchanged(merger.model, state_of(good))


def test_only_an_average_without_fine_tuning_can_do_without_data(tmp_path: Path) -> None:
    source = saved(tiny_model("vit"), tmp_path / "source")
    orders = [GraspConfig(**{**STILL, "order": order}) for order in ("loss", "rank")]
    for config in (GraspConfig(**BLEND), GraspConfig(**{**STILL, "final_epochs": 1}), *orders):
        with pytest.raises(DataError, match="train_dataset is missing; expected labelled samples. Only an average"):
            GraspMerger(tiny_model("vit"), config).merge([source])


@pytest.mark.parametrize("method", ["blend", "copy"])
@pytest.mark.parametrize("dtypes", [("float32", "float16"), ("bfloat16", "float32"), ("bfloat16", "float16")])
def test_sources_and_targets_of_other_dtypes(method: Any, dtypes: tuple[str, str], tmp_path: Path) -> None:
    mine, theirs = (getattr(torch, dtype) for dtype in dtypes)
    source = saved(perturbed(tiny_model("bert"), 1, scale=0.3).to(theirs), tmp_path / "source")
    target = tiny_model("bert").to(mine)
    exact = tiny_model("bert").to(mine).float()
    config = GraspConfig(method=method, threshold=-1.0, **{**STILL, "gate": False, "num_batches": 1})
    step, reference = (GraspMerger(m, config).merge([source], **data_for("bert")).steps[0] for m in (target, exact))
    assert {p.dtype for p in target.parameters()} == {mine}
    scores, expected = ({u.name: u.score for u in s.units if u.score is not None} for s in (step, reference))
    assert scores == pytest.approx({name: expected[name] for name in scores}, abs=0.1)
    if method == "copy":
        assert torch.equal(
            target.get_parameter("classifier.weight").float(),
            exact.get_parameter("classifier.weight").to(mine).float(),
        )


@pytest.mark.parametrize("unit", ["module", "layer"])
@pytest.mark.parametrize("method", ["blend", "copy"])
def test_a_compiled_model_gives_what_a_plain_one_gives(method: Any, unit: Any, tmp_path: Path) -> None:
    source = saved(perturbed(tiny_model("bert"), 1), tmp_path / "source")
    plain, compiled = (tiny_model("bert") for _ in range(2))
    compiled.compile(backend="aot_eager")
    config = GraspConfig(method=method, unit=unit, **{**STILL, "gate": False})
    one, two = (GraspMerger(model, config).merge([source], **data_for("bert")).steps[0] for model in (plain, compiled))
    assert "moved" in {unit.decision for unit in one.units}
    assert [(unit.name, unit.decision) for unit in one.units] == [(unit.name, unit.decision) for unit in two.units]
    for name, value in movable_tensors(plain).items():
        torch.testing.assert_close(movable_tensors(compiled)[name], value, atol=1e-5, rtol=1e-5)


def test_a_compiled_wrapper_is_refused_with_advice() -> None:
    with pytest.raises(ConfigError, match=r"got a OptimizedModule, expected a PreTrainedModel; .* model.compile\(\)"):
        GraspMerger(torch.compile(tiny_model("vit")))  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_target_keeps_its_attention_kernel(attention: str, tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    source = saved(perturbed(tiny_model("vit"), 1), tmp_path / "source")
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**STILL), attn_implementation=attention)
    merger.merge([source], **data_for("vit"))
    assert merger.model.config._attn_implementation == attention


@pytest.mark.parametrize("name", ["trust_remote_code", "cache_dir", "local_files_only", "force_download"])
def test_an_argument_that_would_have_no_effect_is_refused_with_advice(name: str, tmp_path: Path) -> None:
    base, asked = saved(tiny_model("vit"), tmp_path / "base"), dict[str, Any]({name: "x"})
    with pytest.raises(ConfigError, match=f"^{name}: leave it out; "):
        GraspMerger.from_pretrained(base, **asked)
    GraspMerger.from_pretrained(base, **{**asked, name: False})


def test_a_subfolder_is_an_argument_too(hub: HubServer, tmp_path: Path) -> None:
    model = perturbed(tiny_model("vit"), seed=3)
    saved(model, tmp_path / "repository" / "inner")
    hub.add_repo("org/merger-inner", tmp_path / "repository")
    for merger in (
        GraspMerger.from_pretrained("org/merger-inner", subfolder="inner"),
        GraspMerger.from_pretrained("org/merger-inner/inner"),
    ):
        assert torch.equal(*(m.get_parameter("classifier.weight") for m in (merger.model, model)))


def test_a_model_spread_by_a_device_map_is_refused_with_advice(tmp_path: Path) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    with pytest.raises(ConfigError, match="device_map: leave it out; Accelerate chooses the device"):
        GraspMerger.from_pretrained(base, device_map="auto")
    spread = AutoModelForImageClassification.from_pretrained(
        base, device_map={"vit": "cpu", "classifier": "disk"}, offload_folder=tmp_path / "offload"
    )
    with pytest.raises(ConfigError, match="spread over several devices by a device_map; load it without one"):
        GraspMerger(spread)


class Interrupting:
    """Samples that raise a KeyboardInterrupt after `most` reads."""

    def __init__(self, samples: Dataset, most: float) -> None:
        self.samples, self.left = samples, most

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt("at a sample")
        return self.samples[index]


def test_a_record_holds_no_fine_tuning_that_an_interrupt_undid(tmp_path: Path) -> None:
    source, whole = saved(perturbed(tiny_model("vit"), 1), tmp_path / "source"), 1e9
    config = GraspConfig(**{**STILL, "final_epochs": 2}, method="average")
    reads = Interrupting(tiny_data("vit", 12, seed=2), whole)
    assert (
        GraspMerger(tiny_model("vit"), config).merge([source], **{**data_for("vit"), "eval_dataset": reads}).run.final
    )
    merger = GraspMerger(tiny_model("vit"), config)
    stopped = Interrupting(reads.samples, whole - reads.left - 1)  # at the last sample of the last evaluation
    with pytest.raises(KeyboardInterrupt, match="at a sample"):
        merger.merge([source], **{**data_for("vit"), "eval_dataset": stopped})
    assert merger.report.run.final is None and not merger.report.finetuned
    assert [step.accepted for step in merger.report.steps] == [True]


def test_a_second_merge_does_not_keep_the_end_of_the_first(tmp_path: Path) -> None:
    sources = [saved(perturbed(tiny_model("vit"), n), tmp_path / str(n)) for n in (1, 2, 3)]
    config = {**STILL, "method": "average", "gate": False}
    merger = GraspMerger(tiny_model("vit"), GraspConfig(**{**config, "final_epochs": 1, "order": "loss"}))
    first = merger.merge(sources[:2], **data_for("vit"))
    assert first.run.final and first.run.ranking
    twin = merger.with_config(GraspConfig(**config), anew=True)
    assert twin.report.run.final is None and not twin.report.run.ranking and not twin.report.steps
    second = merger.with_config(GraspConfig(**config)).merge(sources[2:], **data_for("vit"))
    assert len(second.steps) == 3 and second.run.final is None and not second.run.ranking


def test_a_mean_in_half_precision_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sources = [saved(perturbed(tiny_model("vit"), n), tmp_path / str(n)) for n in (1, 2)]
    warning = "the target is in bfloat16: its mean is rounded after every source"
    for dtype, names, warned in (
        (None, sources, False),
        ("bfloat16", sources[:1], False),
        ("bfloat16", sources, True),
    ):
        caplog.clear()
        model = tiny_model("vit") if dtype is None else tiny_model("vit").bfloat16()
        GraspMerger(model, GraspConfig(method="average", **STILL)).merge(names)
        assert (warning in caplog.text) is warned


def test_fine_tuning_alone_needs_labels_and_leaves_the_model(tmp_path: Path) -> None:
    target = perturbed(tiny_model("vit"), 1)
    before = state_of(target)
    with pytest.raises(DataError, match="train_dataset"):
        GraspMerger(target, GraspConfig(method="average", **STILL)).finetuned_alone(
            1, tiny_data("vit", 8), train_dataset=None
        )
    assert_unchanged(target, before)


def test_a_second_interrupt_waits_until_all_weights_are_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger = GraspMerger(tiny_model("vit"), GraspConfig(num_batches=1, batch_size=8, **NO_TUNING))
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}

    def interrupted(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)

    def again(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            signal.raise_signal(signal.SIGINT)
            tensor.data.copy_(values[name])

    monkeypatch.setattr("grasp_hf.merging.step.paired_change", interrupted)
    monkeypatch.setattr("grasp_hf.merging.run.overwrite_", again)
    source = saved(perturbed(tiny_model("vit"), seed=1), tmp_path / "source")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        with pytest.raises(KeyboardInterrupt, match=re.escape(source)):
            merger.merge([source], train_dataset=tiny_data("vit", 12))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.model.state_dict().items())


@pytest.mark.parametrize(
    "config",
    [
        {"order": "rank"},
        {"method": "copy", "accumulate_gradients": True, "order": "given"},
        {"order": "given", "finetune_epochs": 2, "training_arguments": {"save_only_model": False}},
    ],
    ids=lambda config: "-".join(map(str, config)),
)
def test_fine_tuning_finds_only_the_files_that_it_needs(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one checkpoint at most and, during a training, no file of a source or of gradients."""
    base = saved(tiny_model("bert"), tmp_path / "base")
    names = {"target_modules": "all-linear"}
    sources = [saved_adapter(tiny_model("bert"), base, tmp_path / f"a{n}", seed=n, **names) for n in (1, 2)]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    seen: list[set[str]] = []

    def collator(samples: list[dict[str, Any]]) -> dict[str, Tensor]:
        seen.append({path.name.partition("-")[0] if path.is_dir() else path.name for path in temporary.glob("*/*")})
        assert len([*temporary.glob("*/training-*/checkpoint-*")]) < 2
        return {key: torch.stack([torch.as_tensor(sample[key]) for sample in samples]) for key in samples[0]}

    config = {"num_batches": 1, "batch_size": 8, "final_epochs": 3, **config}
    merger = GraspMerger.from_pretrained(base, config=GraspConfig(**config))
    merger.merge(sources, data_collator=collator, **data_for("bert"))
    training = [files for files in seen if "training" in files]
    files = set().union(*seen)
    assert training and "source" in files and {"rank": "gradients", "given": "source"}[config["order"]] in files
    assert all(not files & {"source", "gradients", "source-gradients"} for files in training), training
    assert not [*temporary.iterdir()]


def test_test_data_are_evaluated_once_at_the_end_and_choose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = saved(tiny_model("vit"), tmp_path / "base")
    source = saved(perturbed(tiny_model("vit"), seed=1), tmp_path / "source")
    config = GraspConfig(num_batches=1, batch_size=8, final_epochs=1, order="given")
    test = tiny_data("vit", 10, seed=9)
    evaluated: list[Any] = []
    judge = GraspMerger.judge

    def judge_and_note(merger: GraspMerger, data: Any, **options: Any) -> SampleLosses:
        evaluated.append(data)
        return judge(merger, data, **options)

    monkeypatch.setattr(GraspMerger, "judge", judge_and_note)
    merger, twin = (GraspMerger.from_pretrained(base, config=config) for _ in range(2))
    report = merger.merge([source], test_dataset=test, **data_for("vit"))
    twin.merge([source], **data_for("vit"))
    assert [id(data) for data in evaluated] == [id(test)]
    for name, tensor in movable_tensors(twin.model).items():
        assert torch.equal(tensor, movable_tensors(merger.model)[name]), name
    assert report.run.test == merger.evaluate(test) and report.run.data["test"]["samples"] == 10
    assert twin.report.run.test == {} and "test" not in twin.report.run.data
    model = merge_pretrained(base, [source], config=config, test_dataset=test, **data_for("vit"))
    assert len(evaluated) == 3 and evaluated[-1] is test
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), merger.model.parameters(), strict=True))
    before = [parameter.clone() for parameter in twin.model.parameters()]
    with pytest.raises(DataError, match="test_dataset is empty"):
        twin.merge([source], test_dataset=test.select([]), **data_for("vit"))
    assert all(torch.equal(a, b) for a, b in zip(before, twin.model.parameters(), strict=True))
