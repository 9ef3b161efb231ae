"""Pushes of a merge: the files on the Hub, the disk use during a push, and the state after any request fails."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from httpx2 import Timeout
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.utils import close_session, get_session
from transformers import PreTrainedModel

from grasp_hf import GraspMerger
from grasp_hf.errors import PushError
from grasp_hf.hub import push
from tests.support.hub.server import HubServer
from tests.support.hub.store import Entry, Repo
from tests.support.models import perturbed, saved, saved_adapter, tiny_data, tiny_model

TOKEN = "hf_alice"
LOST = "POST /api/models/[^ ]*/commit/main"
RECORD = {"README.md", "config.json", "grasp_config.yaml", "grasp_report.json"}
PLACES = [("vit", "10KB"), ("mixtral", "15KB"), ("bert", "9KB"), ("gpt2", "9KB"), ("vit", "5GB"), ("gpt2", "5GB")]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the pauses between attempts of the client."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)


def merger_of(kind: str, folder: Path, seed: int = 0) -> GraspMerger:
    """Return a merger of a tiny model whose weights no other test uses."""
    return GraspMerger.from_pretrained(saved(perturbed(tiny_model(kind), seed=1000 + seed), folder))


@pytest.fixture
def merger(tmp_path: Path) -> GraspMerger:
    return merger_of("vit", tmp_path / "vit")


def content(hub: HubServer, entry: Entry) -> bytes:
    return (hub.root / entry.key).read_bytes()


def head(repo: Repo, revision: str = "main") -> dict[str, Entry]:
    """Return the files of a revision except `.gitattributes`, which the Hub creates."""
    return {name: entry for name, entry in repo.commits[repo.resolve(revision)].items() if name != ".gitattributes"}


def weights(hub: HubServer, repo: Repo, revision: str = "main") -> dict[str, bytes]:
    """Return the content of the weight files and of their index, by name."""
    tree = head(repo, revision)
    return {name: content(hub, tree[name]) for name in tree if name.startswith(("model", "pytorch_model"))}


def expected_weights(model: PreTrainedModel, folder: Path, size: str = "5GB") -> dict[str, bytes]:
    """Return the content of the weight files that transformers writes, by name."""
    model.save_pretrained(folder, max_shard_size=size)
    return {path.name: path.read_bytes() for path in folder.glob("model*")}


def forget(hub: HubServer, files: dict[str, bytes]) -> set[str]:
    """Remove large files from the Hub, so that a push must upload them; return their checksums."""
    shas = {hashlib.sha256(data).hexdigest() for name, data in files.items() if name.endswith(".safetensors")}
    for sha in shas:
        (hub.root / sha).unlink(missing_ok=True)
    return shas


def commits(hub: HubServer, since: int) -> list[tuple[str, str]]:
    return [(method, path) for method, path in hub.requests[since:] if "/commit/" in path]


@pytest.mark.parametrize(("kind", "size"), PLACES)
def test_the_pushed_files_are_those_that_transformers_writes(
    kind: str, size: str, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger, repo_id = merger_of(kind, tmp_path / "model"), f"org/push-{kind}-{size}".lower()
    expected = expected_weights(merger.model, tmp_path / "expected", size)
    shards = sorted(name for name in expected if name.endswith(".safetensors"))
    assert len(shards) == 1 if size == "5GB" else len(shards) >= 3
    forget(hub, expected)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    held, upload = [], HfApi.preupload_lfs_files

    def watched(self: HfApi, *arguments: Any, **options: Any) -> None:
        assert set(hub.repos[repo_id].commits[hub.repos[repo_id].resolve("main")]) == {".gitattributes"}
        held.append([path.name for path in scratch.rglob("*.safetensors")])
        upload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", watched)
    url = merger.push_to_hub(repo_id, token=TOKEN, max_shard_size=size)
    assert sorted(name for names in held for name in set(names)) == shards, (
        "each shard is on disk only during its upload"
    )
    assert max(map(len, held)) == 1 and list(scratch.iterdir()) == []

    repo = hub.repos[repo_id]
    assert url == f"{hub.url}/{repo_id}/commit/{repo.resolve('main')}"
    assert len(repo.commits) == 2 and RECORD <= set(head(repo))
    assert weights(hub, repo) == expected
    loaded = type(merger.model).from_pretrained(repo_id)
    inputs = {key: value for key, value in tiny_data(kind, 4)[:].items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, merger.model.eval()(**inputs).logits)
    assert ModelCard.load(repo_id).data.library_name == "transformers"
    assert GraspMerger.from_pretrained(repo_id).processing_class is not None


def broken_pushes(hub: HubServer, merger: GraspMerger, kind: str, expected: dict[str, bytes]) -> Iterator[str]:
    """Break each request of a push in turn, check the Hub, push again, and yield a description of the outcome."""
    shas = forget(hub, expected)
    since = len(hub.requests)
    merger.push_to_hub(f"org/push-{kind}-clean", token=TOKEN, max_shard_size="10KB")
    asked = hub.requests[since:]
    assert len(shas) == len([path for method, path in asked if method == "PUT"]) >= 3
    for number, (method, path) in enumerate(asked):
        forget(hub, expected)
        repo_id, since = f"org/push-{kind}-{number}", len(hub.requests)
        where = f"{kind} at {method} {path}"
        hub.fault(".*", kind, skip=number)
        outcome = "done"
        try:
            merger.push_to_hub(repo_id, token=TOKEN, max_shard_size="10KB")
        except PushError as error:
            outcome = "failed"
            assert str(error).startswith(f"'{repo_id}'") and "push again" in str(error), where
        assert hub.requests[since + number][0] == method and hub.failures == [], where
        repo = hub.repos.get(repo_id)
        if outcome == "done":
            assert repo and weights(hub, repo) == expected and repo.tags == {"v1": repo.resolve("main")}, where
        merger.push_to_hub(repo_id, token=TOKEN, max_shard_size="10KB")
        repo = hub.repos[repo_id]
        assert weights(hub, repo) == expected and RECORD <= set(head(repo)), where
        assert len(repo.commits) == 2, f"{where}: one commit, not two"
        assert repo.tags == {"v1": repo.resolve("main")}, where
        sent = Counter(path.rpartition("/")[2] for method, path in hub.requests[since:] if method == "PUT")
        assert sent == {sha: 2 if path.endswith(sha) and method == "PUT" else 1 for sha in shas}, where
        yield f"{outcome} after {where}"


@pytest.mark.parametrize("kind", ["status", "drop", "close"])
def test_any_request_may_fail(kind: str, hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    expected = expected_weights(merger.model, tmp_path / "expected", "10KB")
    outcomes = list(broken_pushes(hub, merger, kind, expected))
    assert len(outcomes) > 20
    assert [outcome for outcome in outcomes if outcome.startswith("failed")] == []


@pytest.mark.parametrize(("kind", "options"), [("status", {}), ("drop", {}), ("status", {"status": 403})])
def test_the_hub_may_go_down_at_any_request(
    kind: str, options: dict[str, int], hub: HubServer, merger: GraspMerger, tmp_path: Path
) -> None:
    expected = expected_weights(merger.model, tmp_path / "expected", "10KB")
    name = f"org/push-gone-{kind}-{options.get('status', 0)}"
    forget(hub, expected)
    since = len(hub.requests)
    merger.push_to_hub(f"{name}-clean", token=TOKEN, max_shard_size="10KB")
    asked = hub.requests[since:]
    committed = next(number for number, (_, path) in enumerate(asked) if "/commit/" in path)
    tagging = next(number for number, (_, path) in enumerate(asked) if path.endswith("/refs"))
    for number in range(len(asked)):
        forget(hub, expected)
        repo_id = f"{name}-{number}"
        hub.fault(".*", kind, times=10_000, skip=number, **options)
        try:
            if number < tagging:
                with pytest.raises(PushError, match=f"^'{repo_id}'"):
                    merger.push_to_hub(repo_id, token=TOKEN, max_shard_size="10KB")
            else:
                merger.push_to_hub(repo_id, token=TOKEN, max_shard_size="10KB")
        finally:
            hub.failures.clear()
        repo = hub.repos.get(repo_id)
        assert weights(hub, repo) == (expected if number > committed else {}) if repo else number == 0
        since = len(hub.requests)
        merger.push_to_hub(repo_id, token=TOKEN, max_shard_size="10KB")
        assert len(hub.repos[repo_id].commits) == 2 and weights(hub, hub.repos[repo_id]) == expected
        assert hub.repos[repo_id].tags == {"v1": hub.repos[repo_id].resolve("main")}
        before = [path for _, path in asked[:number] if path.endswith("/verify")]
        sent = [path for method, path in hub.requests[since:] if method == "PUT"]
        assert len(sent) <= 4 - len(before), "files on the Hub are not sent again"


def test_the_error_contains_the_hubs_reason_for_a_refused_upload(
    hub: HubServer, merger: GraspMerger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = [{"oid": "0" * 64, "error": {"code": 413, "message": "storage is full"}}]
    monkeypatch.setattr("huggingface_hub._commit_api.post_lfs_batch_info", lambda **_: ([], answer, "basic"))
    with pytest.raises(
        PushError, match="'org/push-full': model.safetensors could not be uploaded: (?s:.)*storage is full"
    ):
        merger.push_to_hub("org/push-full", token=TOKEN)
    assert head(hub.repos["org/push-full"]) == {}


@pytest.mark.parametrize("fault", [None, "status", "drop", "close"])
def test_a_pull_request(fault: str | None, hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    repo_id = f"alice/push-pr-{fault}"
    merger.push_to_hub(repo_id, token=TOKEN)
    repo = hub.repos[repo_id]
    main, changed = repo.resolve("main"), merger_of("vit", tmp_path / "other", seed=1)
    before = dict(repo.commits)
    for number, token in enumerate((TOKEN, "hf_bob"), start=1):  # bob may open a pull request, but not write
        if fault:
            hub.fault(LOST, fault)
        url = changed.push_to_hub(repo_id, token=token, create_pr=True)
        assert url == f"{hub.url}/{repo_id}/discussions/{number}" and hub.failures == []
        ref = f"refs/pr/{number}"
        assert (repo.resolve("main"), list(repo.pulls)[-1], len(repo.pulls)) == (main, ref, number)
        expected = expected_weights(changed.model, tmp_path / f"expected-{number}")
        assert weights(hub, repo, ref) == expected
        assert repo.history[repo.pulls[ref]]["parent"] == main or repo.pulls[ref] in before
        assert repo.tags == {"v1": main}
    assert weights(hub, repo) != weights(hub, repo, "refs/pr/1")


def test_more_commits_for_a_pull_request(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    merger.push_to_hub("org/push-pr-twice", token=TOKEN)
    merger_of("vit", tmp_path / "one", seed=1).push_to_hub("org/push-pr-twice", token=TOKEN, create_pr=True)
    repo, last = hub.repos["org/push-pr-twice"], merger_of("vit", tmp_path / "two", seed=2)
    main = repo.resolve("main")
    hub.fault("POST /api/models/[^ ]*/commit/", "close")
    last.push_to_hub("org/push-pr-twice", token=TOKEN, revision="refs/pr/1")
    assert list(repo.pulls) == ["refs/pr/1"] and repo.resolve("main") == main
    assert weights(hub, repo, "refs/pr/1") == expected_weights(last.model, tmp_path / "expected")
    assert list(repo.tags) == ["v1"] and len(repo.commits) == 4


def test_a_pull_request_without_changes_returns_the_existing_commit(hub: HubServer, merger: GraspMerger) -> None:
    merger.push_to_hub("org/push-pr-same", token=TOKEN)
    repo = hub.repos["org/push-pr-same"]
    url = merger.push_to_hub("org/push-pr-same", token=TOKEN, create_pr=True)
    assert url == f"{hub.url}/org/push-pr-same/commit/{repo.resolve('main')}"
    assert (len(repo.commits), repo.pulls) == (2, {})


def test_a_branch_an_organisation_and_privacy(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    assert "/alice/push-own/commit/" in merger.push_to_hub("push-own", token=TOKEN)
    card = content(hub, head(hub.repos["alice/push-own"])["README.md"]).decode()
    assert 'from_pretrained("alice/push-own")' in card
    merger.push_to_hub("org/push-branch", token=TOKEN, revision="trial/one", private=True)
    repo = hub.repos["org/push-branch"]
    assert repo.private and head(repo) == {} and repo.tags == {}, "version tags are for the main branch"
    assert weights(hub, repo, "trial/one") == expected_weights(merger.model, tmp_path / "expected")
    merger.push_to_hub("org/push-branch", token=TOKEN, revision="main")
    assert repo.tags == {"v1": repo.resolve("main")}
    assert weights(hub, repo) == weights(hub, repo, "trial/one")


def test_a_token_that_may_only_read(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    hub.add_token("hf_reads", "alice", role="read")
    merger.push_to_hub("org/push-reads", token=TOKEN)
    before = dict(hub.repos["org/push-reads"].branches)
    other = merger_of("vit", tmp_path / "other", seed=1)
    for repo_id in ("org/push-reads", "org/push-reads-new", "alice/push-reads-new"):
        for create_pr in (False, True):
            with pytest.raises(
                PushError, match=f"^'{repo_id}' could not be pushed to the Hub: (?s:.)*`hf auth login`"
            ):
                other.push_to_hub(repo_id, token="hf_reads", create_pr=create_pr)
    assert hub.repos["org/push-reads"].branches == before
    assert "org/push-reads-new" not in hub.repos and "alice/push-reads-new" not in hub.repos


def test_someone_elses_change_is_not_overwritten(
    hub: HubServer, merger: GraspMerger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merger.push_to_hub("org/push-race", token=TOKEN)
    repo, other = hub.repos["org/push-race"], merger_of("vit", tmp_path / "other", seed=1)
    upload = HfApi.preupload_lfs_files

    def raced(self: HfApi, *arguments: Any, **options: Any) -> None:
        monkeypatch.setattr(HfApi, "preupload_lfs_files", upload)
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "NOTES.md").write_text("by someone else")
        hub.add_repo("org/push-race", tmp_path / "notes")
        upload(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", raced)
    with pytest.raises(PushError, match="^'org/push-race' was changed by someone else during the upload"):
        other.push_to_hub("org/push-race", token=TOKEN)
    assert set(head(repo)) == {"NOTES.md"} and len(repo.commits) == 3
    assert list(repo.tags) == ["v1"]
    other.push_to_hub("org/push-race", token=TOKEN)
    assert {"NOTES.md", "model.safetensors"} <= set(head(repo)), "the file of the other user stays"
    assert repo.tags["v2"] == repo.resolve("main")


@pytest.mark.parametrize("kind", ["close", "status_after"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_lost_answer_to_the_commit_is_not_a_change(
    kind: str, times: int, hub: HubServer, merger: GraspMerger, tmp_path: Path
) -> None:
    repo_id = f"org/push-lost-{kind}-{times}".replace("_", "-")
    merger.push_to_hub(repo_id, token=TOKEN)
    repo, other = hub.repos[repo_id], merger_of("vit", tmp_path / "other", seed=1)
    since = len(hub.requests)
    hub.fault(LOST, kind, times=times)
    try:
        url = other.push_to_hub(repo_id, token=TOKEN)
    finally:
        hub.failures.clear()
    assert url == f"{hub.url}/{repo_id}/commit/{repo.resolve('main')}"
    assert len(commits(hub, since)) == 1 and len(repo.commits) == 3
    assert weights(hub, repo) == expected_weights(other.model, tmp_path / "expected")
    assert repo.tags["v2"] == repo.resolve("main")


def test_a_push_without_changes_makes_no_commit(hub: HubServer, merger: GraspMerger) -> None:
    first = merger.push_to_hub("org/push-same", token=TOKEN, max_shard_size="10KB")
    repo, since = hub.repos["org/push-same"], len(hub.requests)
    assert merger.push_to_hub("org/push-same", token=TOKEN, max_shard_size="10KB") == first
    assert commits(hub, since) == [] and len(repo.commits) == 2 and list(repo.tags) == ["v1"]
    assert not any(method == "PUT" for method, _ in hub.requests[since:])


def test_earlier_weights_are_deleted_in_the_same_commit(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    names = ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "notes.txt"]
    for name in [*names, "model.safetensors", "adapter_notes.bin"]:
        (earlier / name).write_text(f"{name} of an earlier push")
    (earlier / "onnx").mkdir()
    (earlier / "onnx" / "model.safetensors").write_text("another export")
    hub.add_repo("org/push-stale", earlier)
    repo = hub.repos["org/push-stale"]
    for count, size in enumerate(("10KB", "5GB", "10KB"), start=1):
        merger.push_to_hub("org/push-stale", token=TOKEN, max_shard_size=size)
        assert weights(hub, repo) == expected_weights(merger.model, tmp_path / f"expected-{count}", size)
        assert {"notes.txt", "adapter_notes.bin", "onnx/model.safetensors"} <= set(head(repo))
        assert len(repo.commits) == 2 + count
    assert [repo.tags[f"v{number}"] for number in (1, 2, 3)] == list(repo.commits)[2:]


def test_a_merge_replaces_an_adapter(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    hub.add_repo("org/push-adapter", saved_adapter(tiny_model("vit"), "org/base", tmp_path / "adapter", **lora))
    merger.push_to_hub("org/push-adapter", token=TOKEN)
    assert not any(name.startswith("adapter") for name in head(hub.repos["org/push-adapter"]))
    loaded = type(merger.model).from_pretrained("org/push-adapter").eval()
    inputs = {key: value for key, value in tiny_data("vit", 4)[:].items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, merger.model.eval()(**inputs).logits)


def test_chat_templates_in_a_folder_arrive(hub: HubServer, tmp_path: Path) -> None:
    merger = merger_of("gpt2", tmp_path / "gpt2")
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    merger.processing_class.chat_template = dict(templates)
    merger.push_to_hub("org/push-chat", token=TOKEN)
    assert "additional_chat_templates/tool_use.jinja" in head(hub.repos["org/push-chat"])
    assert GraspMerger.from_pretrained("org/push-chat").processing_class.chat_template == templates


def test_a_temporary_directory_without_space(hub: HubServer, merger: GraspMerger) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # the record fits, and the weights do not
    try:
        with pytest.raises(PushError, match="^'org/push-room': the files to upload could not be .*TMPDIR"):
            merger.push_to_hub("org/push-room", token=TOKEN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert head(hub.repos["org/push-room"]) == {}
    merger.push_to_hub("org/push-room", token=TOKEN)


def test_every_request_has_a_time_limit(hub: HubServer, merger: GraspMerger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit also holds in the new session that the client makes after a refused connection."""
    found, upload, commit = [], HfApi.preupload_lfs_files, HfApi.create_commit

    def refused(self: HfApi, *arguments: Any, **options: Any) -> None:
        close_session()  # the client does this after a refused connection
        upload(self, *arguments, **options)

    def committed(self: HfApi, *arguments: Any, **options: Any) -> Any:
        found.append(get_session().timeout)
        return commit(self, *arguments, **options)

    monkeypatch.setattr(HfApi, "preupload_lfs_files", refused)
    monkeypatch.setattr(HfApi, "create_commit", committed)
    merger.push_to_hub("org/push-limit", token=TOKEN)
    assert found == [Timeout(push.TIMEOUT)] and get_session().timeout == Timeout(None)


def test_versions_continue_from_the_existing_tags(hub: HubServer, merger: GraspMerger, tmp_path: Path) -> None:
    hub.add_repo("org/push-tags", merger.report.base, tag="v7")
    repo = hub.repos["org/push-tags"]
    repo.tags |= {"v1.0": repo.resolve("main"), "release": repo.resolve("main")}
    merger.push_to_hub("org/push-tags", token=TOKEN)
    assert repo.tags["v8"] == repo.resolve("main") and len(repo.tags) == 4


def test_no_pushed_file_holds_the_token(hub: HubServer, merger: GraspMerger, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add_token("hf_a_long_secret", "alice")
    monkeypatch.setenv("HF_TOKEN", "hf_a_long_secret")
    merger.push_to_hub("org/push-token", token="hf_a_long_secret", max_shard_size="10KB")
    files = {name: content(hub, entry) for name, entry in head(hub.repos["org/push-token"]).items()}
    assert len(files) > 6 and [name for name, data in files.items() if b"hf_a_long_secret" in data] == []


XET_CLIENT = """
import sys
import torch
from huggingface_hub import constants
from transformers import AutoModelForImageClassification
from grasp_hf import GraspMerger

assert not constants.HF_HUB_DISABLE_XET
merger = GraspMerger.from_pretrained(sys.argv[1])
url = merger.push_to_hub("org/merged", max_shard_size="10KB")
assert merger.push_to_hub("org/merged", max_shard_size="10KB") == url
pulled = GraspMerger.from_pretrained("org/merged").model.state_dict()
loaded = AutoModelForImageClassification.from_pretrained("org/merged").state_dict()
for name, value in merger.model.state_dict().items():
    assert torch.equal(pulled[name], value) and torch.equal(loaded[name], value), name
"""


def test_by_xet(merger: GraspMerger, tmp_path: Path) -> None:
    with HubServer(tmp_path / "hub", {TOKEN: "alice"}, {"org": ["alice"]}, xet=True) as hub:
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        client = [sys.executable, "-c", XET_CLIENT, merger.report.base]
        hub.fault(LOST, "close")  # the client repeats the request, and the Hub reports a conflict
        done = subprocess.run(client, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        repo = hub.repos["org/merged"]
        assert weights(hub, repo) == expected_weights(merger.model, tmp_path / "expected", "10KB")
        assert len(hub.xet_hashes) == 3 and not any(method == "PUT" for method, _ in hub.requests)
        assert len(repo.commits) == 2 and repo.tags == {"v1": repo.resolve("main")}
