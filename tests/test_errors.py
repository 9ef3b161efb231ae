"""Messages of errors, and the problems that they carry."""

import copy
import errno
import pickle
import traceback
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
    first_few,
    first_line,
    one_line,
    printable,
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


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[31mb\x07", "a\\x1b[31mb\\x07"),
        ("a\tb\x00", "a b\\x00"),
        ("evil\u202etxt.exe\u2066", "evil\\u202etxt.exe\\u2066"),
        ("line\u2028separator \x85", "line\\u2028separator \\x85"),
        ("half \ud800", "half \\ud800"),
        ("grün, 绿, \U0001f7e2", "grün, 绿, \U0001f7e2"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_no_message_holds_a_character_that_changes_the_terminal(text: str, shown: str) -> None:
    assert str(GraspError(text)) == printable(text) == shown
    error = GraspError("problems", subject=text, problems=[text])
    assert error.problems == [shown] and text not in str(error) or text == shown


def test_the_text_of_a_stranger_is_one_short_line() -> None:
    assert one_line("a\n\n# heading\x1b[0m") == "a # heading\\x1b[0m"
    assert one_line("a" * 10_000_000, 100) == "a" * 100 + " …"
    assert first_few(["a\nb", "c" * 5_000]) == "a b, " + "c" * 200 + " …"
    assert len(str(GraspError("problems", subject="a" * 10**6, problems=["b" * 10**6]))) < 5_000


SECRET = "".join(["s", "3", "cret"])
ADDRESSES = [
    f"http://user:{SECRET}@host/models",
    f"HTTPS://{SECRET}@host",
    f"https://host/file?X-Amz-Signature={SECRET}&size=1",
    f"https://host/file?size=1&token={SECRET}",
    f"token hf_{SECRET * 6}",
]


@pytest.mark.parametrize("address", ADDRESSES)
def test_no_message_and_no_traceback_shows_a_secret(address: str) -> None:
    with pytest.raises(PushError) as caught:
        try:
            try:
                raise OSError(f"'{address}' is wrong")
            except OSError as error:
                raise ValueError(f"no answer from {address}") from error
        except ValueError as error:
            assert SECRET not in first_line(error)
            raise PushError(f"could not be pushed: {error}", problems=[address]) from error
    text = "".join(traceback.format_exception(caught.value))
    assert "could not be pushed" in text and "no answer" in text and "is wrong" in text
    assert SECRET not in text


@pytest.mark.parametrize(
    "text", ["user@host", "org/name@v1", "https://host/a?size=1&page=2", "org/hf_model_for_tokens"]
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert printable(text) == text
