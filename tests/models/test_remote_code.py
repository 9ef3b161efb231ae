"""Models with Python code of their own, which are refused unless the user names them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from grasp_hf import GraspConfig, GraspMerger, Recipe
from grasp_hf.cli import main
from grasp_hf.errors import IncompatibleSourceError
from grasp_hf.runs.plan import plan
from tests.support.hub.server import HubServer
from tests.support.models import NO_TUNING

CONFIGURATION = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "grasp-own"

    def __init__(self, width=4, **kwargs):
        self.width = width
        super().__init__(**kwargs)
"""
MODEL = """
import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from .configuration_own import OwnConfig


class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = torch.nn.Linear(config.width, config.width)
        self.classifier = torch.nn.Linear(config.width, 2)
        self.post_init()

    def forward(self, features=None, labels=None):
        logits = self.classifier(self.body(features))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
"""


@pytest.fixture(scope="session")
def own(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Push three models with their code, filled with 0, 1 and 2, and return their ids."""
    names: dict[str, Any] = {}
    exec(CONFIGURATION + MODEL.replace("from .configuration_own import OwnConfig", ""), names)
    made = []
    for index in range(3):
        folder = tmp_path_factory.mktemp("own") / "model"
        model = names["OwnModel"](names["OwnConfig"]())
        for parameter in model.parameters():
            parameter.data.fill_(index)
        model.config.auto_map = {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForSequenceClassification": "modeling_own.OwnModel",
        }
        model.save_pretrained(folder)
        (folder / "configuration_own.py").write_text(CONFIGURATION)
        (folder / "modeling_own.py").write_text(MODEL)
        hub.add_repo(f"org/own-{index}", folder)
        made.append(f"org/own-{index}")
    return made


def test_code_is_refused_unless_its_model_is_named(own: list[str], hub: HubServer) -> None:
    since = len(hub.requests)
    with pytest.raises(
        IncompatibleSourceError, match=r"'org/own-0' needs Python code .* trust_remote_code: \['org/own-0'\]"
    ):
        GraspMerger.from_pretrained(own[0])
    rows = plan(Recipe(sources=own[1:], base_model=own[0], config=GraspConfig(trust_remote_code=own[:1])))
    assert ["needs Python code" in "".join(row.problems) for row in rows] == [False, True, True]
    asked = {path.split("/")[2] for _, path in hub.requests[since:] if path.endswith(".py")}
    assert asked == {"own-0"}, "untrusted code is not even downloaded"


def test_code_runs_where_its_model_is_named(own: list[str], tmp_path: Path) -> None:
    config = GraspConfig(method="average", **NO_TUNING, trust_remote_code=own)
    merger = GraspMerger.from_pretrained(own[0], config=config)
    merger.merge(own[1:])
    assert {float(value) for parameter in merger.model.parameters() for value in parameter.flatten()} == {1.5}
    merger.save_pretrained(tmp_path / "merged")
    again = GraspMerger.from_pretrained(
        str(tmp_path / "merged"), config=GraspConfig(trust_remote_code=[str(tmp_path / "merged")])
    )
    assert torch.equal(again.model.get_parameter("body.weight"), torch.full((4, 4), 1.5))
    card = (tmp_path / "merged" / "README.md").read_text()
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1].replace(
        '"merged"', repr(str(tmp_path / "merged"))
    )
    assert "trust_remote_code=True" in snippet
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert torch.equal(names["model"].get_parameter("body.weight"), torch.full((4, 4), 1.5))


def test_one_trusted_source_does_not_make_another_one_trusted(own: list[str]) -> None:
    config = GraspConfig(method="average", **NO_TUNING, trust_remote_code=own[:2])
    merger = GraspMerger.from_pretrained(own[0], config=config)
    with pytest.raises(IncompatibleSourceError, match="'org/own-2' needs Python code"):
        merger.merge(own[1:])
    assert [step.source for step in merger.report.steps] == ["org/own-1"]


def test_a_saved_merge_with_its_code_is_pushed_by_the_command_line_where_it_is_trusted(
    own: list[str], hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    merger = GraspMerger.from_pretrained(
        own[0], config=GraspConfig(method="average", **NO_TUNING, trust_remote_code=own)
    )
    merger.merge(own[1:])
    merger.save_pretrained(tmp_path / "merged")
    assert main(["push", str(tmp_path / "merged"), "org/own-merged"]) == 1
    assert "needs Python code" in capsys.readouterr().err
    assert main(["push", str(tmp_path / "merged"), "org/own-merged", "--trust-remote-code"]) == 0
    again = GraspMerger.from_pretrained("org/own-merged", config=GraspConfig(trust_remote_code=["org/own-merged"]))
    assert torch.equal(again.model.get_parameter("body.weight"), torch.full((4, 4), 1.5))


@pytest.fixture
def hostile(own: list[str], hub: HubServer, tmp_path: Path, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """Push a merge whose code writes a file and whose record trusts itself; return its id and the path of the file."""
    ran = tmp_path / "ran"
    merger = GraspMerger.from_pretrained(
        own[0], config=GraspConfig(method="average", **NO_TUNING, trust_remote_code=own)
    )
    merger.merge(own[1:])
    folder = tmp_path / "hostile"
    merger.save_pretrained(folder)
    for code in folder.glob("*.py"):
        code.write_text(f"open({str(ran)!r}, 'w').close()\n" + code.read_text())
    repo_id = f"org/hostile-{request.node.name.partition('[')[2].rstrip(']')}"
    record = folder / "grasp_config.yaml"
    values = yaml.safe_load(record.read_text())
    values["trust_remote_code"] += [repo_id, str(folder)]
    record.write_text(yaml.safe_dump(values))
    hub.add_repo(repo_id, folder)
    return repo_id, ran


@pytest.mark.parametrize("command", ["append", "reproduce"])
def test_a_record_lets_no_code_run(
    command: str,
    hostile: tuple[str, Path],
    own: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    repo_id, ran = hostile
    more = [own[1], "--output", str(tmp_path / "out")] if command == "append" else []
    assert main([command, repo_id, *more]) == 1
    printed = capsys.readouterr().err
    assert not ran.exists(), "untrusted code ran"
    needed = repo_id if command == "append" else own[0]
    assert re.search(rf"'{needed}(@\w+)?' needs Python code of its own", printed)
    assert f"'{own[0]}'" in printed and f"'{repo_id}'" in printed, "the record's own list is shown"
    assert "does not run unless you allow it" in printed


def test_the_user_of_this_run_lets_the_code_of_a_record_run(
    own: list[str], hub: HubServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merger = GraspMerger.from_pretrained(
        own[0], config=GraspConfig(method="average", **NO_TUNING, trust_remote_code=own)
    )
    merger.merge(own[1:])
    merger.save_pretrained(tmp_path / "merged")
    hub.add_repo("org/own-recorded", tmp_path / "merged")
    assert main(["reproduce", "org/own-recorded", f"trust_remote_code=[{', '.join(own)}]"]) == 0
    assert "reproduced: all" in capsys.readouterr().out
    trusted = f"trust_remote_code=[org/own-recorded, {', '.join(own)}]"
    assert main(["append", "org/own-recorded", own[1], trusted, "--output", str(tmp_path / "more")]) == 0
