"""A password in the address of the Hub is in no message and in no traceback."""

import traceback
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from grasp_hf import GraspError, GraspMerger
from grasp_hf.cli import main
from tests.support.hub.server import HubServer
from tests.support.models import saved, tiny_model

PASSWORD = "".join(["open", "sesame", "77"])


@pytest.fixture
def endpoint(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """Put a password into the address of the Hub."""
    address = hub.url.replace("://", f"://user:{PASSWORD}@")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", address)
    return address


def test_a_failed_push(endpoint: str, tmp_path: Path) -> None:
    merger = GraspMerger.from_pretrained(saved(tiny_model("bert"), tmp_path / "base"))
    with pytest.raises(GraspError, match="could not be pushed") as caught:
        merger.push_to_hub("org/none", token="hf_nobody")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


def test_a_source_that_is_not_there(endpoint: str, tmp_path: Path, capsys: Any, caplog: Any) -> None:
    caplog.set_level("DEBUG", "grasp_hf")
    with pytest.raises(GraspError) as caught:
        GraspMerger.from_pretrained("org/none")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("base_model: org/none\nsources: [org/none-2]\nmethod: average\n")
    assert main(["plan", str(recipe)]) == 1
    printed = capsys.readouterr()
    assert "org/none-2: " in printed.out and PASSWORD not in printed.out + printed.err + caplog.text


def test_a_hub_that_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("DEBUG", "grasp_hf")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://user:{PASSWORD}@127.0.0.1:9")
    with pytest.raises(GraspError) as caught:
        GraspMerger.from_pretrained("org/none")
    assert PASSWORD not in "".join(traceback.format_exception(caught.value)) + caplog.text
