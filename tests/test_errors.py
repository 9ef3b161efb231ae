"""Messages of errors, and the problems that they carry."""

import copy
import errno
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from grasp_hf.errors import (
    ConfigError,
    DiskFullError,
    DownloadError,
    GraspError,
    IncompatibleSourceError,
    OutputExistsError,
    PushError,
    SourceNotFoundError,
    StaleMergeError,
)


def classes(of: type[GraspError] = GraspError) -> list[type[GraspError]]:
    return [of, *(found for cls in of.__subclasses__() for found in classes(cls))]


def test_the_message_lists_all_problems() -> None:
    error = ConfigError("the configuration has problems", problems=["top: got 0", "seed: got -1"])
    assert str(error) == "the configuration has problems:\n- top: got 0\n- seed: got -1"
    assert error.problems == ["top: got 0", "seed: got -1"]


@pytest.mark.parametrize("problems", [(), []])
def test_a_message_without_a_list_is_the_one_problem(problems: Any) -> None:
    error = ConfigError("top: got 0", problems=problems)
    assert str(error) == "top: got 0" and error.problems == ["top: got 0"] and error.args == ("top: got 0",)


def test_a_problem_may_have_lines_of_its_own() -> None:
    problems = ["lora: expected arguments of peft.LoraConfig:\n- r\n- alpha", "seed: got -1"]
    error = ConfigError("the configuration has problems", problems=problems)
    assert error.problems == problems
    assert str(error).endswith(":\n- lora: expected arguments of peft.LoraConfig:\n- r\n- alpha\n- seed: got -1")


def test_a_subject_is_named_in_front_of_the_message() -> None:
    error = SourceNotFoundError("no such model", subject="org/a@v1")
    assert str(error) == "'org/a@v1': no such model" and error.problems == [str(error)]
    assert error.problems_of("org/a@v1") == ["no such model"]
    assert error.problems_of("org/b") == ["'org/a@v1': no such model"]


def test_a_message_that_names_its_subject_itself_stays_whole() -> None:
    error = SourceNotFoundError("'org/a': no such model")
    assert error.subject is None and error.problems_of("org/a") == ["'org/a': no such model"]


def test_listed_problems_are_those_of_every_subject() -> None:
    error = IncompatibleSourceError("'org/a' cannot be merged", problems=["different hidden_act"])
    assert error.problems_of("org/a") == error.problems_of("org/b") == ["different hidden_act"]


def test_the_list_of_an_error_cannot_be_changed_from_outside() -> None:
    problems = ["top: got 0"]
    error = ConfigError("problems", problems=problems)
    problems.append("more")
    error.problems.append("more")
    assert error.problems == ["top: got 0"]


@pytest.mark.parametrize("cls", classes())
@pytest.mark.parametrize(
    "again",
    [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))],
    ids=["copy", "deep", "pickle"],
)
def test_a_copy_has_the_same_message_and_problems(
    cls: type[GraspError], again: Callable[[GraspError], GraspError]
) -> None:
    error = cls("cannot be used", subject="org/a", problems=["no config.json", "no weights"])
    error.add_note("while merging")
    twin = again(error)
    assert type(twin) is cls and twin is not error
    assert str(twin) == str(error) == "'org/a': cannot be used:\n- no config.json\n- no weights"
    assert twin.problems == ["no config.json", "no weights"]
    assert twin.subject == "org/a" and twin.__notes__ == ["while merging"]

    plain = again(cls("cannot be used", subject="org/a"))
    assert str(plain) == "'org/a': cannot be used" and plain.problems == ["'org/a': cannot be used"]
    assert plain.problems_of("org/a") == ["cannot be used"]


@pytest.mark.parametrize("cls", classes())
def test_more_context_keeps_the_problems(cls: type[GraspError]) -> None:
    cause = cls("'org/a' cannot be merged", problems=["no config.json", "no weights"])
    with pytest.raises(cls, match="^while merging source 1/2: 'org/a' cannot be merged:\n- no") as caught:
        raise cause.reworded(f"while merging source 1/2: {cause}") from cause
    assert type(caught.value) is cls and caught.value.__cause__ is cause
    assert caught.value.problems == ["no config.json", "no weights"]
    assert caught.value.reworded("twice").problems == ["no config.json", "no weights"]


@pytest.mark.parametrize("cls", classes())
def test_more_context_of_an_error_without_a_list_is_part_of_its_problem(cls: type[GraspError]) -> None:
    cause = cls("no such model", subject="org/a")
    told = cause.reworded(f"while merging: {cause}")
    assert str(told) == "while merging: 'org/a': no such model" and told.problems == [str(told)]
    other = type(cause)(f"while merging: {cause}")
    assert type(other) is cls and str(other) == str(told) and other.problems == told.problems


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [
        (DiskFullError, OSError),
        (DownloadError, ConnectionError),
        (OutputExistsError, FileExistsError),
        (PushError, ConnectionError),
        (StaleMergeError, ConnectionError),
        (SourceNotFoundError, FileNotFoundError),
    ],
)
def test_errors_of_the_system(cls: type[GraspError], builtin: type[OSError]) -> None:
    with pytest.raises(builtin, match=r"^cannot be used:\n- \[Errno 28\] no room$") as caught:
        raise cls("cannot be used", problems=[f"[Errno {errno.ENOSPC}] no room"])
    error = caught.value
    assert isinstance(error, cls) and error.args == (str(error),)
    assert isinstance(error, OSError) and error.errno is None and error.filename is None
