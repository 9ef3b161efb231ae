"""The configuration and the recipe: refused values, their error messages, and relative paths."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from grasp_hf import GraspConfig, Recipe
from grasp_hf.data.section import DataSection
from grasp_hf.errors import ConfigError


def recipe_file(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_defaults() -> None:
    config = GraspConfig()
    assert (config.method, config.unit, config.order) == ("weighted", "layer", "loss")
    assert (config.gate, config.published, config.training_arguments) == (True, False, {})
    assert (config.initial_epochs, config.finetune_epochs, config.final_epochs, config.seed) == (0, 0, 3, 42)
    assert Recipe(sources=["org/a"]).config == config, "a recipe starts from the same defaults"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("method", "mean", r"method: got 'mean', expected one of 'weighted', 'average', 'blend', 'copy'"),
        ("top", 0, "top: got 0, expected at least 1, and order='loss' or order='rank'"),
        ("lora", {"rank": 8}, r"lora: got {'rank': 8}, expected arguments of peft.LoraConfig: .*'rank'"),
        (
            "accumulate_gradients",
            True,
            "accumulate_gradients: got True, expected False unless method='copy' and published=False",
        ),
        ("unit", "block", r"unit: got 'block', expected one of 'layer', 'module', 'tensor', 'parameter'"),
        ("order", None, r"order: got None, expected one of 'given', 'loss', 'rank'"),
        ("threshold", 1.5, r"threshold: got 1.5, expected a cosine in \[-1, 1\]"),
        ("threshold", -1.01, r"threshold: got -1.01, expected a cosine in \[-1, 1\]"),
        ("threshold", float("nan"), r"threshold: got nan, expected a cosine in \[-1, 1\]"),
        ("threshold", "3e-1", r"threshold: got '3e-1', expected float \(YAML reads 5e-5 as text: write 5.0e-5\)"),
        ("threshold", True, r"threshold: got True, expected float"),
        ("num_batches", 0, r"num_batches: got 0, expected at least 1"),
        ("num_batches", 2.5, r"num_batches: got 2.5, expected int"),
        ("num_batches", True, r"num_batches: got True, expected int"),
        ("batch_size", -4, r"batch_size: got -4, expected at least 1"),
        ("batch_size", "32", r"batch_size: got '32', expected int$"),
        ("coefficient_lr", 0, r"coefficient_lr: got 0, expected a number in \(0, 1\]"),
        ("coefficient_lr", 1.1, r"coefficient_lr: got 1.1, expected a number in \(0, 1\]"),
        ("coefficient_lr", "5e-5", r"coefficient_lr: got '5e-5', .*write 5.0e-5"),
        ("gate", 1, r"gate: got 1, expected bool"),
        ("gate", "no", r"gate: got 'no', expected bool"),
        ("initial_epochs", -1, r"initial_epochs: got -1, expected a finite number of 0 or more"),
        ("initial_epochs", float("inf"), r"initial_epochs"),
        ("finetune_epochs", -0.5, r"finetune_epochs: got -0.5, expected a finite number of 0 or more"),
        ("final_epochs", -1, r"final_epochs: got -1, expected a finite number of 0 or more"),
        ("final_epochs", float("inf"), r"final_epochs"),
        ("seed", 1.0, r"seed: got 1.0, expected int"),
        ("seed", -1, r"seed"),
        ("seed", 2**32, r"seed"),
        ("published", True, r"published: got True, expected False unless method='copy' and unit='parameter'"),
        ("training_arguments", None, r"training_arguments: got None, expected dict"),
        ("training_arguments", {"hub_token": "hf_x"}, r"training_arguments.hub_token: expected none, .* set HF_TOKEN"),
        ("training_arguments", {"metric_for_best_model": "f1"}, r"got 'f1', expected loss or accuracy"),
        ("training_arguments", ["bf16"], r"training_arguments: got \['bf16'\], expected dict"),
    ],
)
def test_one_wrong_value(field: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GraspConfig(**{field: value})


@pytest.mark.parametrize(
    "values",
    [
        {"threshold": -1},
        {"threshold": 1},
        {"num_batches": 1, "batch_size": 1},
        {"coefficient_lr": 1},
        {"initial_epochs": 0, "finetune_epochs": 0.5, "final_epochs": 0},
        {"order": "loss", "top": 1},
        {"order": "rank", "top": 1},
        {"seed": 0},
        {"published": True, "method": "copy", "unit": "parameter"},
    ],
)
def test_the_ends_of_each_range_are_fine(values: dict[str, Any]) -> None:
    config = GraspConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_all_wrong_types_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="the configuration has problems") as caught:
        GraspConfig(method="mean", threshold="0.3", gate=0)  # type: ignore[arg-type]
    assert [line.split(":")[0] for line in caught.value.problems] == ["method", "threshold", "gate"]


def test_all_values_out_of_range_are_listed_at_once() -> None:
    with pytest.raises(ConfigError, match="the configuration has problems") as caught:
        GraspConfig(threshold=2, num_batches=0, coefficient_lr=3, finetune_epochs=-1)
    names = [line.split(":")[0] for line in caught.value.problems]
    assert names == ["threshold", "num_batches", "coefficient_lr", "finetune_epochs"]


def test_top_needs_an_order_other_than_given() -> None:
    with pytest.raises(ConfigError, match="top: got 3, expected at least 1, and order='loss' or order='rank'"):
        GraspConfig(order="given", top=3)


@pytest.mark.parametrize(
    ("values", "trained", "between"),
    [
        ({}, [0, 0, 3], False),
        ({"initial_epochs": 2, "finetune_epochs": 1}, [2, 1, 3], True),
        ({"finetune_epochs": 1, "final_epochs": 0}, [0, 1, 0], True),
        ({"training_arguments": {"num_train_epochs": 7}}, [0, 0, 7], False),
        ({"training_arguments": {"num_train_epochs": 0}, "initial_epochs": 2}, [0, 0, 0], False),
        ({"training_arguments": {"num_train_epochs": 0, "max_steps": 5}, "initial_epochs": 2}, [1, 0, 1], True),
        ({"training_arguments": {"max_steps": 5}}, [0, 0, 1], False),
    ],
)
def test_when_a_model_is_fine_tuned(values: dict[str, Any], trained: list[int], between: bool) -> None:
    config = GraspConfig(**values)
    due = [config.initial_epochs, config.finetune_epochs, config.final_epochs]
    assert [config.trains(epochs) for epochs in due] == [bool(epochs) for epochs in trained]
    assert config.finetunes_between == between


def test_the_epochs_of_a_whole_merge() -> None:
    assert GraspConfig().total_epochs(5) == 3
    assert GraspConfig(initial_epochs=2, finetune_epochs=0.5, final_epochs=1).total_epochs(4) == 5
    assert GraspConfig.paper().total_epochs(2) == 9


@pytest.mark.parametrize(
    ("values", "needed"),
    [
        ({}, True),
        ({"method": "average", "order": "given", "final_epochs": 0}, False),
        ({"method": "average", "order": "loss", "final_epochs": 0}, True),
        ({"method": "average", "order": "given", "final_epochs": 1}, True),
        ({"order": "given", "final_epochs": 0, "method": "blend"}, True),
    ],
)
def test_which_settings_need_data(values: dict[str, Any], needed: bool) -> None:
    assert GraspConfig(**values).needs_data == needed


def test_paper_values_and_overrides() -> None:
    paper = GraspConfig.paper()
    assert (paper.method, paper.unit, paper.threshold, paper.published) == ("copy", "parameter", 0.3, True)
    assert (paper.num_batches, paper.batch_size, paper.gate, paper.order) == (1, 32, False, "given")
    assert (paper.initial_epochs, paper.finetune_epochs, paper.final_epochs, paper.seed) == (3, 3, 0, 42)
    assert paper.training_arguments == {
        "learning_rate": 5.0e-5,
        "weight_decay": 0.01,
        "max_grad_norm": 0.0,
        "metric_for_best_model": "accuracy",
    }
    changed = GraspConfig.paper(threshold=0.1, training_arguments={"learning_rate": 1e-3, "bf16": False})
    assert changed.threshold == 0.1
    assert changed.training_arguments == {**paper.training_arguments, "learning_rate": 1e-3, "bf16": False}
    assert GraspConfig.paper() == paper, "an override must not change the presets"


def test_a_recipe_with_overrides(tmp_path: Path) -> None:
    text = "sources: [org/a, org/b@v1]\nmethod: copy\ntraining_arguments: {weight_decay: 0.1}\n"
    overrides = [
        "training_arguments.learning_rate=1.0e-5",
        "threshold=0.2",
        "sources=[org/c]",
        "data.path=csv",
        "base_model=org/base",
        "gate=false",
    ]
    recipe = Recipe.from_yaml(recipe_file(tmp_path, text), overrides)
    assert recipe.sources == ["org/c"]
    assert (recipe.base_model, recipe.data, recipe.preset, recipe.task) == (
        "org/base",
        {"path": "csv"},
        "default",
        None,
    )
    assert recipe.config == GraspConfig(
        method="copy", threshold=0.2, gate=False, training_arguments={"weight_decay": 0.1, "learning_rate": 1e-5}
    )
    assert recipe.folder == tmp_path


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("sources: [org/a]", "sources.0=org/b"),
        ("sources: [org/a]\nmethod: copy", "method.x=1"),
        ("sources: [org/a]", "gate"),
        ("sources: [org/a]", "threshold=[1"),
    ],
)
def test_an_override_that_fits_nowhere_is_a_problem_of_the_recipe(text: str, override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"override '{override}': ")):
        Recipe.from_yaml(recipe_file(tmp_path, text), [override])


def test_an_override_fills_an_empty_section(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "sources: [org/a, org/b]\ntraining_arguments:")
    recipe = Recipe.from_yaml(path, ["training_arguments.bf16=true"])
    assert recipe.config.training_arguments == {"bf16": True}


def test_a_section_that_is_null_is_empty(tmp_path: Path) -> None:
    path = recipe_file(tmp_path, "sources: [org/a, org/b]\ndata: {path: csv}\naccepted_bases:\ntraining_arguments:")
    recipe = Recipe.from_yaml(path, ["data=null", "record=null"])
    assert recipe.data == recipe.record == recipe.config.training_arguments == {}
    assert recipe.config.accepted_bases == []
    with pytest.raises(ConfigError, match="gate: got None, expected bool"):
        Recipe.from_yaml(path, ["gate=null"])


def test_all_problems_of_a_recipe_are_in_one_error(tmp_path: Path) -> None:
    text = "treshold: 0.2\nbase_model: 3\ncoefficient_lr: 5e-5\ndata: imagefolder\npreset: papers\n"
    with pytest.raises(ConfigError, match="recipe.yaml has problems") as caught:
        Recipe.from_yaml(recipe_file(tmp_path, text))
    problems = dict(line.split(": ", 1) for line in caught.value.problems)
    assert sorted(problems) == ["base_model", "coefficient_lr", "data", "preset", "sources", "treshold"]
    assert problems["base_model"] == "got 3, expected str or null"
    assert problems["coefficient_lr"] == "got '5e-5', expected float (YAML reads 5e-5 as text: write 5.0e-5)"
    assert problems["data"] == "got 'imagefolder', expected dict"
    assert problems["preset"] == "got 'papers', expected one of 'default', 'paper'"
    assert problems["sources"] == "expected a list of at least one reference"
    assert problems["treshold"].startswith("unknown key, did you mean threshold")
    assert "threshold" in problems["treshold"] and "config" not in problems["treshold"].split(", ")


def test_ranges_are_listed_with_the_recipe_s_own_problems(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has problems") as caught:
        Recipe.from_yaml(recipe_file(tmp_path, "sources: []\nthreshold: 3\nnum_batches: 0\n"))
    lines = caught.value.problems
    assert lines == [
        "sources: expected a list of at least one reference",
        "threshold: got 3, expected a cosine in [-1, 1]",
        "num_batches: got 0, expected at least 1",
    ]


def test_sources_that_are_not_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sources: got \[1, 'org/a'\], expected .*str"):
        Recipe.from_yaml(recipe_file(tmp_path, "sources: [1, org/a]"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"sources: [a", r"recipe '.*recipe.yaml' is not valid YAML"),
        (b"- a\n- b\n", r"recipe '.*recipe.yaml' holds list, expected keys such as sources and data"),
        (b"", r"recipe '.*recipe.yaml' holds NoneType, expected keys"),
        (b"\xff\xfe\x00", r"recipe '.*recipe.yaml'"),
    ],
)
def test_a_file_that_is_not_a_recipe(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_a_recipe_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe '.*missing.yaml' cannot be read: No such file"):
        Recipe.from_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read: Is a directory"):
        Recipe.from_yaml(tmp_path)


def test_the_paper_preset(tmp_path: Path) -> None:
    text = "preset: paper\nsources: [org/a, org/b]\nthreshold: 0.1\ntraining_arguments: {learning_rate: 1.0e-3}\n"
    recipe = Recipe.from_yaml(recipe_file(tmp_path, text))
    assert recipe.config == GraspConfig.paper(threshold=0.1, training_arguments={"learning_rate": 1e-3})
    assert recipe.config.training_arguments["max_grad_norm"] == 0.0


def test_references_are_looked_up_in_the_recipe_s_folder(tmp_path: Path) -> None:
    (tmp_path / "models" / "a").mkdir(parents=True)
    recipe = Recipe.from_yaml(recipe_file(tmp_path, "sources: [models/a, org/b@v1]"))
    assert recipe.locate("models/a") == str((tmp_path / "models" / "a").resolve())
    assert recipe.locate("org/b@v1") == "org/b@v1"
    assert recipe.locate(str(tmp_path)) == str(tmp_path.resolve())


def test_data_files_are_looked_up_in_the_recipe_s_folder(tmp_path: Path) -> None:
    for name in ("train.csv", "a.csv", "b.csv"):
        (tmp_path / name).write_text("text,label\n")
    data = {"path": "csv", "data_files": {"train": "train.csv", "validation": ["a.csv", "b.csv"]}, "max_length": 7}
    section = DataSection.from_recipe(Recipe(sources=["a"], data=data, folder=tmp_path))
    here = tmp_path.resolve()
    assert section.data_files == {
        "train": str(here / "train.csv"),
        "validation": [str(here / "a.csv"), str(here / "b.csv")],
    }
    assert (section.path, section.max_length, section.text, section.label) == ("csv", 7, "text", "label")


def test_a_pattern_of_data_files_starts_from_the_recipe_s_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n")
    recipe = Recipe(sources=["a"], data={"path": "csv", "data_files": "*.csv"}, folder=tmp_path)
    assert str(tmp_path.resolve()) in DataSection.from_recipe(recipe).data_files


def test_all_problems_of_the_data_section_are_in_one_error() -> None:
    data = {"dir": "images", "label": 3, "max_length": "long"}
    with pytest.raises(ConfigError, match="the recipe has problems") as caught:
        DataSection.from_recipe(Recipe(sources=["a"], data=data))
    assert caught.value.problems == [
        "data.dir: unknown key, expected one of data_dir, data_files, image, label, max_length, name, path, revision, "
        "text, unlabeled",
        "data.path: missing, expected imagefolder, csv, json, parquet, a folder or a Hub id",
        "data.label: got 3, expected text",
        "data.max_length: got 'long', expected a number of tokens above 0",
    ]


@pytest.mark.parametrize("value", [3, None, {"train": 3}])
def test_data_files_of_a_wrong_type(value: object) -> None:
    with pytest.raises(ConfigError, match=r"data.data_files: got "):
        DataSection.from_recipe(Recipe(sources=["a"], data={"path": "csv", "data_files": value}))


def test_a_split_of_another_name() -> None:
    data = {"path": "csv", "data_files": {"train": "a.csv", "val": "b.csv"}}
    with pytest.raises(
        ConfigError, match=r"data.data_files: got .*, expected no other splits than train, validation, test"
    ):
        DataSection.from_recipe(Recipe(sources=["a"], data=data))


@pytest.mark.parametrize("value", [True, 0, -3])
def test_a_wrong_max_length(value: object) -> None:
    with pytest.raises(ConfigError, match=r"data.max_length: "):
        DataSection.from_recipe(Recipe(sources=["a"], data={"path": "csv", "max_length": value}))


@pytest.mark.parametrize(
    "text", ["sources: [a]\nsources: [b]\n", "sources: [a]\ndata: {path: csv, text: a, text: b}\n"]
)
def test_a_key_that_occurs_twice(text: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(ConfigError, match="is not valid YAML: the key '(sources|text)' occurs twice"):
        Recipe.from_yaml(tmp_path / "recipe.yaml")


def test_keys_that_are_merged_may_be_replaced(tmp_path: Path) -> None:
    text = "base_model: org/base\nsources: [a]\ndata: &d {path: csv, text: a}\nrecord: {<<: *d, text: b}\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert Recipe.from_yaml(tmp_path / "recipe.yaml").record == {"path": "csv", "text": "b"}


def test_a_trusted_folder_is_looked_up_in_the_recipe_s_folder(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    text = "base_model: org/base\nsources: [own]\ntrust_remote_code: [own, org/other]\n"
    (tmp_path / "recipe.yaml").write_text(text)
    recipe = Recipe.from_yaml(tmp_path / "recipe.yaml")
    assert recipe.config.trust_remote_code == [recipe.locate("own"), "org/other"]
    assert recipe.locate("own") == str((tmp_path / "own").resolve())


@pytest.mark.parametrize("key", ["output_dir", "push_to_hub", "hub_model_id"])
def test_arguments_of_the_trainer_that_a_merge_sets_itself(key: str) -> None:
    with pytest.raises(ConfigError, match=f"training_arguments.{key}: expected none; "):
        GraspConfig(training_arguments={key: "mine"})


def test_types_that_json_lacks_become_plain() -> None:
    arguments = {"run_name": Path("logs"), "lr_scheduler_kwargs": {"betas": (0.9, np.float32(0.5))}}
    config = GraspConfig(training_arguments=arguments, lora={"target_modules": {"value", "query"}})
    assert config.lora == {"target_modules": ["query", "value"]}
    assert config.training_arguments == {"run_name": "logs", "lr_scheduler_kwargs": {"betas": [0.9, 0.5]}}
    with pytest.raises(ConfigError, match="training_arguments: a value in it cannot be written to the record"):
        GraspConfig(training_arguments={"lr_scheduler_kwargs": {"betas": object()}})


def test_the_error_names_the_place_of_a_misplaced_trainer_argument() -> None:
    with pytest.raises(
        ConfigError, match="- learning_rate: unknown key, did you mean training_arguments.learning_rate"
    ):
        Recipe.from_dict({"sources": ["a"], "learning_rate": 1e-5})


def test_yaml_reads_no_as_false() -> None:
    config = GraspConfig(training_arguments=yaml.safe_load("{eval_strategy: no, save_strategy: no}"))
    assert config.training_arguments == {"eval_strategy": "no", "save_strategy": "no"}
