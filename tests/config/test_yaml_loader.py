"""YAML of strangers: bounded time and memory, and one kind of error."""

import time

import pytest
import yaml

from grasp_hf.config.yaml_loader import LARGEST_TEXT, load_yaml


def bomb(levels: int) -> str:
    """Return a text whose aliases expand to 8**levels values."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(12), "it holds more than 50000 values"),
        ("a: &a [*a]", "it holds an alias of itself"),
        ("a: &a {<<: *a}", "it holds an alias of itself"),
        ("[" * 5_000, "it has too many levels"),
        ("a: x\n" * (LARGEST_TEXT // 4), "characters, expected at most"),
        ("a: 1\na: 2", "the key 'a' occurs twice"),
        ("a: 2020-13-45", "a value cannot be read: month must be in 1..12"),
        ("a: !!int x", "a value cannot be read: invalid literal"),
        ("a: 1" + "0" * 5_000, "a value cannot be read: Exceeds the limit"),
        ("{[a]: 1}", "unhashable|unacceptable"),
        ("!!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: \x00", "special characters are not allowed"),
    ],
)
def test_a_hostile_text_is_refused_in_seconds(text: str, message: str) -> None:
    began = time.perf_counter()
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)
    assert time.perf_counter() - began < 10


def test_aliases_that_stay_small_are_read() -> None:
    assert load_yaml("a: &a {b: 1}\nc: {<<: *a, d: *a}") == {"a": {"b": 1}, "c": {"b": 1, "d": {"b": 1}}}
    assert len(load_yaml(bomb(4))["a3"]) == 8
