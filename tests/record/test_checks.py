"""Records of strangers: every value is checked on reading, and nothing in them runs or reaches further than it says."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import grasp_hf.record.saving
from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import ConfigError
from grasp_hf.record.card import model_card
from grasp_hf.record.report import MergeReport
from grasp_hf.record.saving import read_record
from grasp_hf.runs.lineage import append_recipe
from tests.support.models import NO_TUNING, copied, perturbed, saved, tiny_data, tiny_model

TUNED = {**NO_TUNING, "initial_epochs": 1, "final_epochs": 1, "batch_size": 8}
KINDS: list[Any] = [None, "", "x", -1, 2**70, 0.5, True, [1], ["a"], {"a": 1}, [[]]]


@pytest.fixture(scope="session")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a merge whose record has an entry of every kind."""
    root = tmp_path_factory.mktemp("merge")
    merger = GraspMerger.from_pretrained(
        saved(tiny_model("resnet"), root / "base"), config=GraspConfig(**{**TUNED, "order": "loss"})
    )
    source = saved(perturbed(tiny_model("resnet"), 1), root / "source")
    merger.merge([source], train_dataset=tiny_data("resnet", 12), eval_dataset=tiny_data("resnet", 6, seed=2))
    merger.save_pretrained(root / "merged")
    return root / "merged"


def places(values: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of each value in nested lists and dictionaries; of a list only the first entry."""
    if isinstance(values, dict):
        return [path] * bool(path) + [found for key in values for found in places(values[key], (*path, key))]
    return [path] + (places(values[0], (*path, 0)) if isinstance(values, list) and values else [])


def changed(values: Any, path: tuple[Any, ...], new: Any) -> Any:
    values = json.loads(json.dumps(values))
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return values


def test_any_value_of_any_type_anywhere_is_refused_or_read_whole(merged: Path, tmp_path: Path) -> None:
    """Nothing but a clear error may come out, and a record that is read can be shown, written and continued."""
    values = json.loads((merged / "grasp_report.json").read_text())
    model = tiny_model("resnet")
    file, tried, refused = tmp_path / "grasp_report.json", 0, 0
    for path in places(values):
        for new in KINDS:
            file.write_text(json.dumps(changed(values, path, new)))
            tried += 1
            try:
                record = MergeReport.from_json(file)
            except ConfigError as error:
                refused += 1
                assert str(error).startswith("'grasp_report.json' is not the record of a merge by grasp_hf: ")
                assert len(str(error)) < 2_500
                continue
            shown = record.without_paths()
            assert str(record) and shown.table() and shown.configuration() and shown.outcome() is not None
            assert not record.run.config or "# merged" in str(model_card(model, shown, "org/merged"))
            record.to_json(tmp_path / "again.json")
            assert MergeReport.from_json(tmp_path / "again.json") == record
    assert tried > 1_000 and refused > tried / 2


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("steps", 0, "seconds"), "", r"steps\[0\].seconds: got '', expected a number"),
        (("steps", 0, "notes"), None, r"steps\[0\].notes: got None, expected a list"),
        (("steps", 0, "license"), [1], r"steps\[0\].license: got \[1\], expected a text"),
        (
            ("steps", 0, "units", 0, "elements"),
            -1,
            r"steps\[0\].units\[0\].elements: got -1, expected an integer of 0",
        ),
        (("steps", 0, "units", 0, "decision"), "stolen", r"expected one of 'moved', "),
        (("steps", 0, "kind"), "other", r"steps\[0\].kind: got 'other', expected full or adapter"),
        (("run", "config", "method"), "none-such", r"run.config.method: got 'none-such', expected one of weighted, "),
        (("run", "final", "fraction"), 7.0, r"run.final.fraction: got 7.0, expected a number from 0 to 1"),
        (("run", "final", "losses"), {"0.0": 1.0}, r"run.final.losses: expected those at 0.0 and at"),
        (("continued_steps",), 5, r"continued_steps: got 5, expected at most 1"),
        (("base_sha",), "../../etc", r"base_sha: got '../../etc', expected a commit"),
        (("unknown",), 1, r"TypeError: .*unexpected keyword argument 'unknown'"),
    ],
)
def test_a_wrong_value_is_named(path: tuple[Any, ...], value: Any, message: str, merged: Path, tmp_path: Path) -> None:
    values = json.loads((merged / "grasp_report.json").read_text())
    (tmp_path / "grasp_report.json").write_text(json.dumps(changed(values, path, value)))
    with pytest.raises(ConfigError, match=message):
        read_record(tmp_path)


@pytest.mark.parametrize("content", ["null", "[]", "1", '"x"', "{}", "[" * 100_000, "{", '{"steps": 1}', "\x00"])
def test_a_file_that_is_no_record(content: str, tmp_path: Path) -> None:
    (tmp_path / "grasp_report.json").write_text(content)
    with pytest.raises(ConfigError, match=r"'grasp_report.json' is not the record of a merge by grasp_hf: "):
        read_record(tmp_path)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("training_arguments", "report_to", "wandb"),
        ("training_arguments", "deepspeed", "/tmp/deepspeed.json"),
        ("training_arguments", "accelerator_config", {"split_batches": "/tmp/x"}),
        ("training_arguments", "logging_dir", "/tmp/logs"),
        ("training_arguments", "resume_from_checkpoint", "/tmp/checkpoint"),
        ("lora", "megatron_core", "antigravity"),
        ("lora", "eva_config", {"path": "x"}),
    ],
)
def test_only_the_user_may_give_settings_that_reach_further(
    section: str, key: str, value: Any, merged: Path, tmp_path: Path
) -> None:
    folder = copied(str(merged), tmp_path / "merged")
    config = yaml.safe_load((folder / "grasp_config.yaml").read_text())
    config["data"] = {"path": "none"}
    config[section] = {**(config[section] or {}), key: value}
    (folder / "grasp_config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=f"only if you give them yourself.*\n- {section}.{key}="):
        append_recipe(str(folder), ["org/new"])
    recipe = append_recipe(str(folder), ["org/new"], [f"{section}={{}}"])
    assert not getattr(recipe.config, section)


def test_settings_that_only_choose_are_used(merged: Path, tmp_path: Path) -> None:
    folder = copied(str(merged), tmp_path / "merged")
    config = yaml.safe_load((folder / "grasp_config.yaml").read_text())
    config["data"] = {"path": "none"}
    arguments = {
        "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-5},
        "optim": "sgd",
        "eval_strategy": "no",
        "use_cpu": True,
    }
    config |= {
        "training_arguments": arguments,
        "lora": {"r": 4, "target_modules": ["query"], "rank_pattern": {"q": 2}},
    }
    (folder / "grasp_config.yaml").write_text(yaml.safe_dump(config))
    recipe = append_recipe(str(folder), ["org/new"])
    assert recipe.config.training_arguments == arguments and recipe.config.lora == config["lora"]


@pytest.mark.parametrize("part", ["model_card", "save_figures"])
def test_a_card_that_fails_is_a_warning(
    part: str, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    def fail(*arguments: Any, **options: Any) -> Callable[..., Any]:
        raise KeyError("no such label")

    folder = copied(str(merged), tmp_path / "merged")
    merger = GraspMerger.from_pretrained(str(folder))
    with torch.no_grad():
        next(merger.model.parameters()).add_(1)
    monkeypatch.setattr(grasp_hf.record.saving, part, fail)
    with caplog.at_level(logging.WARNING):
        merger.save_pretrained(folder)
    assert "the model is saved, but its card could not be made: KeyError: 'no such label'" in caplog.text
    assert read_record(folder) == read_record(merged) and not (folder / "README.md").exists()
    again = GraspMerger.from_pretrained(str(folder)).model.state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merger.model.state_dict().items())
