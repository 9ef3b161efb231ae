"""The settings as rows: all fields of `GraspConfig`, with their defaults and whole sentences."""

from dataclasses import fields

import pytest
import yaml

from grasp_hf import GraspConfig
from grasp_hf.config.settings import GROUPS, settings, settings_help


def test_every_setting_is_in_one_group() -> None:
    names = [row.name for row in settings()]
    assert sorted(names) == sorted(field.name for field in fields(GraspConfig))
    assert names == [name for group in GROUPS.values() for name in group]


def test_the_defaults_are_those_of_the_configuration_as_yaml() -> None:
    values = {row.name: yaml.safe_load(row.default) for row in settings()}
    assert GraspConfig(**values) == GraspConfig() and values == vars(GraspConfig())


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("order", "given | loss | rank"),
        ("threshold", "number"),
        ("top", "integer | null"),
        ("gate", "true | false"),
        ("lora", "section | null"),
        ("accepted_bases", "list"),
    ],
)
def test_the_values_that_a_setting_takes(name: str, values: str) -> None:
    assert {row.name: row.values for row in settings()}[name] == values


def test_every_setting_has_a_meaning_that_begins_with_a_short_sentence() -> None:
    for row in settings():
        assert row.meaning.endswith(".") and "  " not in row.meaning, row.name
        assert row.summary and len(row.summary) <= 110 and "`" not in row.summary, row.name
        assert row.meaning.replace("`", "").startswith(f"{row.summary}."), row.name
    assert {row.name: row.meaning for row in settings()}["final_epochs"] == (
        "Epochs of fine-tuning after the last source. `num_train_epochs` in `training_arguments` replaces those of "
        "`initial_epochs`, `finetune_epochs` and `final_epochs` that are not 0."
    )


@pytest.mark.parametrize("width", [60, 100])
def test_the_help_fits_in_the_terminal(width: int) -> None:
    lines = settings_help(width).splitlines()
    assert max(map(len, lines)) <= width
    assert "  seed=42                     Seeds the shuffling of" in "\n".join(lines)
