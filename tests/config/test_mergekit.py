"""Configurations of mergekit: their translation, their refusal, and the linear merge, which is the mean."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from grasp_hf import GraspConfig, Recipe
from grasp_hf.cli import main
from grasp_hf.config.mergekit import is_mergekit, translate
from grasp_hf.errors import ConfigError
from tests.support.models import NO_TUNING, perturbed, saved, saved_adapter, tiny_model

MEAN = GraspConfig(method="average", **NO_TUNING, gate=False)
WEIGHTED = GraspConfig(method="weighted")
DATA = "data: {path: org/labelled}\n"

LINEAR = """
models:
  - model: org/a
    parameters:
      weight: 1.0
  - model: org/b@v2
    parameters:
      weight: 1
merge_method: linear
dtype: float32
"""
LINEAR_OF_BASE = """
base_model: org/base
models:
  - model: org/a
  - model: org/base
  - model: org/b
merge_method: linear
parameters: {weight: 0.3333, normalize: true}
"""
LINEAR_OF_ADAPTERS = """
models:
  - model: org/base@v1+org/lora-a
    parameters: {weight: 0.5}
  - model: org/base@v1+org/lora-b@v2
    parameters: {weight: 5e-1}
merge_method: linear
parameters: {normalize: false}
"""
TIES = """
models:
  - model: org/base
    # no parameters necessary for base model
  - model: org/a
    parameters: {density: [1, 0.7, 0.1], weight: 1.0}
  - model: org/base+org/lora@v2
    parameters:
      density: 0.5
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: org/base
parameters: {normalize: true, int8_mask: true}
dtype: float16
tokenizer_source: union
"""
SLERP = """
models:
  - model: org/a
  - model: ./local/b
merge_method: slerp
base_model: org/a
parameters: {t: 0.5}
"""
TASK_ARITHMETIC = """
models:
  - model:
      model: {path: org/base, revision: v1}
      lora: {path: org/lora, revision: v2}
  - model: {model: {path: org/a}, override_architecture: LlamaForCausalLM}
merge_method: task_arithmetic
base_model: {model: {path: org/base, revision: v1}}
"""


def recipe_of(text: str, folder: Path, *overrides: str) -> Recipe:
    path = folder / "mergekit.yaml"
    path.write_text(text)
    return Recipe.from_yaml(path, overrides)


@pytest.mark.parametrize(
    ("text", "overrides", "sources", "base", "config"),
    [
        (LINEAR, [], ["org/a", "org/b@v2"], None, MEAN),
        (LINEAR.replace("1.0", "0.5").replace("weight: 1", "weight: 0.5"), [], ["org/a", "org/b@v2"], None, MEAN),
        (LINEAR.replace("merge_method", "base_model: org/c\nmerge_method"), [], ["org/a", "org/b@v2"], "org/c", MEAN),
        (LINEAR_OF_BASE, [], ["org/base", "org/a", "org/b"], None, MEAN),
        (LINEAR_OF_BASE.replace("  - model: org/base\n", ""), [], ["org/base", "org/a", "org/b"], None, MEAN),
        (LINEAR_OF_BASE.replace("org/b\n", "org/base\n"), [], ["org/base", "org/base", "org/a"], None, MEAN),
        (LINEAR_OF_ADAPTERS, [], ["org/lora-a", "org/lora-b@v2"], "org/base@v1", MEAN),
        (TIES + DATA, [], ["org/a", "org/lora@v2"], "org/base", WEIGHTED),
        (TIES, ["data.path=org/labelled"], ["org/a", "org/lora@v2"], "org/base", WEIGHTED),
        (TIES, ["method=average"], ["org/a", "org/lora@v2"], "org/base", MEAN),
        (TIES.replace("ties", "dare_ties") + DATA, [], ["org/a", "org/lora@v2"], "org/base", WEIGHTED),
        (SLERP + DATA, [], ["./local/b"], "org/a", WEIGHTED),
        (SLERP, ["method=average"], ["org/a", "./local/b"], None, MEAN),
        (SLERP.replace("- model: org/a\n  ", ""), ["method=average"], ["org/a", "./local/b"], None, MEAN),
        (TASK_ARITHMETIC + DATA, [], ["org/lora@v2", "org/a"], "org/base@v1", WEIGHTED),
        (LINEAR.replace("1.0", "0.7"), ["method=average"], ["org/a", "org/b@v2"], None, MEAN),
        (
            LINEAR.replace("1.0", "0.7") + DATA,
            ["method=blend"],
            ["org/a", "org/b@v2"],
            None,
            GraspConfig(method="blend"),
        ),
        (LINEAR_OF_BASE + DATA, ["method=blend"], ["org/a", "org/b"], "org/base", GraspConfig(method="blend")),
        (LINEAR + DATA, ["preset=paper"], ["org/a", "org/b@v2"], None, GraspConfig.paper()),
    ],
)
def test_the_recipe_of_a_configuration(
    text: str, overrides: list[str], sources: list[str], base: str | None, config: GraspConfig, tmp_path: Path
) -> None:
    recipe = recipe_of(text, tmp_path, *overrides)
    assert (recipe.sources, recipe.base_model, recipe.config) == (sources, base, config)
    has_data = "data:" in text or "data.path=org/labelled" in overrides
    assert recipe.data == ({"path": "org/labelled"} if has_data else {})
    assert recipe.folder == tmp_path


def test_the_keys_of_a_recipe_win(tmp_path: Path) -> None:
    text = LINEAR + DATA + "task: text-generation\nfinetune_epochs: 2\ngate: true\nunit: module\n"
    recipe = recipe_of(text, tmp_path, "training_arguments.bf16=true")
    assert recipe.task == "text-generation"
    assert recipe.config == GraspConfig(
        **{**NO_TUNING, "finetune_epochs": 2}, method="average", unit="module", training_arguments={"bf16": True}
    )


@pytest.mark.parametrize(
    ("text", "overrides", "warnings"),
    [
        (LINEAR, [], []),
        (LINEAR_OF_BASE, [], []),
        (
            LINEAR.replace("float32", "bfloat16") + "tokenizer_source: base\nchat_template: auto\nname: mine\n"
            "tokenizer: {source: union}\nout_dtype: float32\nparameters: {int8_mask: true, normalize: true}\n",
            [],
            [
                "these keys are not used: parameters.int8_mask, dtype: bfloat16, tokenizer_source: base, tokenizer, "
                "chat_template: auto, name: mine"
            ],
        ),
        (
            TIES + DATA,
            [],
            [
                "these keys are not used: merge_method: ties (method weighted instead), parameters.normalize, "
                "parameters.int8_mask, models.parameters.density, models.parameters.weight, "
                "dtype: float16, tokenizer_source: union"
            ],
        ),
        (
            TASK_ARITHMETIC + DATA,
            ["method=copy"],
            ["merge_method: task_arithmetic (method copy instead), models[1].model.override_architecture"],
        ),
        (
            SLERP.replace("model: ./local/b", "model: ./local/b\n    weight: 0.3"),
            ["method=average"],
            ["these keys are not used: merge_method: slerp (method average instead), parameters.t, models[1].weight"],
        ),
        (LINEAR_OF_ADAPTERS, [], ["an adapter is part of the mean only in the units that it adapts"]),
    ],
)
def test_a_warning_lists_the_keys_that_are_not_used(
    text: str, overrides: list[str], warnings: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="grasp_hf"):
        recipe_of(text, tmp_path, *overrides)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * len(warnings)
    for record, expected in zip(caplog.records, warnings, strict=True):
        message = record.getMessage()
        assert expected in message and "mergekit.yaml" in message
        assert message.endswith(expected) == ("not used" in message)


NOT_SUPPORTED = "is not supported; add data: .* learned from labelled data, or set method=average for their mean"
MERGE_FIRST = r"merge it into '{}' first \(merge_and_unload\(\) of PEFT\) and name the result"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TIES, f"merge_method: ties {NOT_SUPPORTED}"),
        (TASK_ARITHMETIC, f"merge_method: task_arithmetic {NOT_SUPPORTED}"),
        (SLERP, f"merge_method: slerp {NOT_SUPPORTED}"),
        (SLERP.replace("slerp", "della_linear") + "data: {}\n", f"merge_method: della_linear {NOT_SUPPORTED}"),
        (
            LINEAR.replace("1.0", "0.7"),
            "weight: got 0.7, 1, expected the same number for all models; leave .* mean, or",
        ),
        (LINEAR.replace("1.0", "0.7") + DATA, "weight: got 0.7, 1, .* add data: and method: blend"),
        (LINEAR.replace("1.0", "[0, 1]"), r"weight: got \[0, 1\], 1, expected the same number for all models"),
        (
            LINEAR.replace("1.0", "[{filter: mlp, value: 1}]"),
            r"weight: got \[\{'filter': 'mlp', .*expected the same number",
        ),
        (LINEAR.replace("1.0", "high"), r"weight: got high, 1, expected the same number for all models"),
        (LINEAR.replace("1.0", "true"), r"weight: got True, 1, expected the same number for all models"),
        (LINEAR.replace("weight: 1.0", "density: 1"), r"weight: got none, 1, expected the same number for all models"),
        (
            LINEAR.replace("1.0", "0").replace("weight: 1", "weight: 0"),
            "weight: got 0 for all models, expected a number other than 0",
        ),
        (
            LINEAR + "parameters: {weight: 0.5}\nbase_model: org/c\n",
            "weight: got 1.0, 1, 0.5, expected the same number",
        ),
        (LINEAR + "parameters: {normalize: false}\n", "parameters.normalize: got false with weights that sum to 2"),
        (LINEAR + "parameters: {normalize: [1]}\n", r"parameters.normalize: got \[1\], expected true or false"),
        (LINEAR + "parameters: 3\n", "parameters: got 3, expected keys such as weight"),
        (
            TIES.replace("org/base+", "org/other+") + DATA,
            r"models\[2\].model: 'org/lora@v2' is named as an adapter of 'org/other', expected an adapter of "
            "the base model 'org/base'; " + MERGE_FIRST.format("org/other"),
        ),
        (
            TIES.replace("org/base+", "org/base@v1+") + DATA,
            r"models\[2\].model: .* adapter of 'org/base@v1', expected an adapter of the base model 'org/base'",
        ),
        (
            LINEAR_OF_ADAPTERS.replace("v1+org/lora-b", "v2+org/lora-b"),
            r"models\[1\].model: .* adapter of 'org/base@v2', expected an adapter of one base model for all",
        ),
        (
            TIES.replace("base_model: org/base", "base_model: org/base+org/x") + DATA,
            r"base_model: 'org/base\+org/x' names",
        ),
        (TIES.replace("base_model: org/base", "base_model: 3") + DATA, "base_model: got 3, expected org/name"),
        (
            LINEAR.replace("org/a", "org/a+org/b+org/c"),
            r"models\[0\].model: got 'org/a\+org/b\+org/c', expected a model, or",
        ),
        (LINEAR.replace("org/a", "org/a+"), r"models\[0\].model: got 'org/a\+', expected a model, or model\+adapter"),
        (LINEAR.replace("v2", "v2@v3"), r"models\[1\].model: got 'org/b@v2@v3', expected one @ before the revision"),
        (
            LINEAR.replace("org/a", ""),
            r"models\[0\].model: got None, expected org/name, org/name@revision or a folder",
        ),
        (LINEAR.replace("org/a", "{path: org/a}"), r"models\[0\].model: got None, expected org/name"),
        (
            LINEAR.replace("org/a", "{model: {path: org/a, revision: 3}}"),
            r"models\[0\].model: got \{'path': 'org/a', .*3\}",
        ),
        ("merge_method: linear\nmodels: [org/a, org/b]\n", r"models\[0\]: got 'org/a', expected the key model"),
        ("merge_method: linear\nmodels: []\n", r"models: got \[\], expected a list such as"),
        ("merge_method: linear\n", r"models: got None, expected a list such as"),
        ("models: [{model: org/a}, {model: org/b}]\n", "merge_method: got None, expected a name .* under sources"),
        (
            "merge_method: linear\nmodels: [{model: org/a}]\n",
            "sources: got one model and no base_model, expected two models",
        ),
        (
            f"merge_method: ties\nbase_model: org/a\nmodels: [{{model: org/a}}]\n{DATA}",
            "models: 'org/a' is the base model; expected a second model",
        ),
        (
            "merge_method: passthrough\nslices:\n  - sources: [{model: org/a, layer_range: [0, 24]}]\n",
            "slices: a model made of layers or parts of others is not supported, expected models: whole models",
        ),
        (
            "merge_method: slerp\nbase_model: org/a\nslices:\n  - sources:\n"
            "    - {model: org/a, layer_range: [0, 32]}\n"
            f"    - {{model: org/b, layer_range: [0, 32]}}\n{DATA}",
            r"slices: .* \(write slices that cover all layers as models\)",
        ),
        ("merge_method: linear\nmodules: {text_decoder: {models: []}}\n", "modules: a model made of layers or parts"),
        (LINEAR + "tresold: 3\n", "tresold: unknown key"),
        (f"{LINEAR}\n---\n{TIES}", "holds several YAML documents, expected one; .* write one file for each"),
    ],
)
def test_refused_configurations(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_of(text, tmp_path)


def test_all_problems_are_in_one_error(tmp_path: Path) -> None:
    text = "merge_method: ties\nbase_model: org/base+org/x\nmodels:\n- org/a\n- model: org/b+org/c\n- model: a@b@c\n"
    with pytest.raises(ConfigError, match="mergekit.yaml, a mergekit configuration, has problems:\n- ") as caught:
        recipe_of(text, tmp_path)
    problems = [line.split(": ")[0] for line in caught.value.problems]
    assert sorted(problems) == ["base_model", "merge_method", "models[0]", "models[1].model", "models[2].model"]


@pytest.mark.parametrize("values", [{"sources": ["org/a"]}, {"sources": ["org/a"], "models": 3}, {}, {"data": {}}])
def test_a_recipe_stays_as_it_is(values: dict[str, Any]) -> None:
    assert not is_mergekit(values)
    assert translate(values) is values


def test_the_configuration_is_not_changed() -> None:
    values = yaml.safe_load(TIES + DATA)
    translate(values)
    assert values == yaml.safe_load(TIES + DATA)


def test_an_undefined_alias_is_not_reported_as_a_second_document(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML: .*undefined alias"):
        recipe_of("models: *all\n", tmp_path)


def merged(folder: Path, configuration: dict[str, Any], *overrides: str) -> dict[str, torch.Tensor]:
    """Run `plan` and `merge` on `configuration`, and return the merged weights."""
    (folder / "mergekit.yaml").write_text(yaml.safe_dump(configuration))
    assert main(["plan", str(folder / "mergekit.yaml"), *overrides]) == 0
    assert main(["merge", str(folder / "mergekit.yaml"), "--output", str(folder / "out"), *overrides]) == 0
    return load_file(folder / "out" / "model.safetensors")


def assert_mean(found: dict[str, torch.Tensor], folders: list[Path]) -> None:
    weights = [load_file(folder / "model.safetensors") for folder in folders]
    assert found.keys() == weights[0].keys()
    expected = {name: torch.stack([each[name] for each in weights]).mean(0) for name in found}
    torch.testing.assert_close(found, expected)


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    """Return the folders of three models with tokenizers, fine-tuned from the same weights."""
    for seed in range(3):
        saved(perturbed(tiny_model("gpt2"), seed=seed), tmp_path / f"m{seed}")
    return [tmp_path / f"m{seed}" for seed in range(3)]


def test_a_linear_merge_is_the_mean(models: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"model": path.name, "parameters": {"weight": 1.0}} for path in models]
    found = merged(tmp_path, {"models": entries, "merge_method": "linear", "dtype": "bfloat16"})
    assert_mean(found, models)
    output = capsys.readouterr()
    lines = [line for line in output.out.splitlines() if line.startswith("|")]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:5]]
    assert [row[:2] for row in table] == [["base", "m0"], ["source", "m1"], ["source", "m2"]]
    assert (
        output.err.count("mergekit.yaml is a mergekit configuration; these keys are not used: dtype: bfloat16\n") == 2
    )


def test_the_mean_of_a_slerp_counts_the_base_and_that_of_ties_does_not(models: list[Path], tmp_path: Path) -> None:
    entries = [{"model": path.name} for path in models]
    ties = {"models": entries, "base_model": "m0", "merge_method": "ties"}
    assert_mean(merged(tmp_path, ties, "method=average"), models[1:])
    slerp = {"models": entries[:2], "base_model": "m1", "merge_method": "slerp"}
    assert_mean(merged(tmp_path, slerp, "method=average"), models[:2])


def test_a_linear_merge_of_adapters_that_adapt_the_same_is_the_mean(models: list[Path], tmp_path: Path) -> None:
    base, folders = str(models[0]), []
    for seed in (1, 2):
        model = tiny_model("gpt2").from_pretrained(base)
        saved_adapter(model, base, tmp_path / f"lora{seed}", seed=seed, target_modules=["c_attn"], fan_in_fan_out=True)
        folders.append(tmp_path / f"lora{seed}")
    entries = [{"model": f"m0+{folder.name}", "parameters": {"weight": 0.5}} for folder in folders]
    found = merged(tmp_path, {"models": entries, "merge_method": "linear"})
    start, expected = (load_file(models[0] / "model.safetensors") for _ in range(2))
    for folder in folders:
        state = load_file(folder / "adapter_model.safetensors")
        scale = yaml.safe_load((folder / "adapter_config.json").read_text())["lora_alpha"] / 2
        for layer in (0, 1):
            key = f"base_model.model.transformer.h.{layer}.attn.c_attn.lora_{{}}.weight"
            change = scale * state[key.format("B")] @ state[key.format("A")]
            expected[f"transformer.h.{layer}.attn.c_attn.weight"] += change.T / 2
    torch.testing.assert_close(found, expected)
    assert any(not torch.equal(expected[name], start[name]) for name in expected)


def test_a_refused_configuration_is_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mergekit.yaml").write_text(TIES)
    assert main(["merge", str(tmp_path / "mergekit.yaml"), "--output", str(tmp_path / "out")]) == 1
    assert "- merge_method: ties is not supported" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
