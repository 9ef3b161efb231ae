"""The test Hub itself: its faults and its kinds of repositories, as seen by the real client."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RemoteEntryNotFoundError, RepositoryNotFoundError

from tests.support.hub.server import HubServer

TOKEN = "hf_alice"
CARD = "---\nlicense: mit\ntags: [merge]\nmade: 2026-01-02\n---\n# A model\n"
WEIGHTS = bytes(range(256)) * 8192  # 2 MiB
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
BLOB = f"GET /lfs/{SHA256}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "README.md").write_text(CARD)
    (folder / "sub").mkdir()
    (folder / "sub/config.json").write_text("{}")
    return folder


@pytest.fixture
def other(folder: Path, tmp_path: Path) -> Iterator[HubServer]:
    with HubServer(tmp_path / "other", {TOKEN: "alice"}) as other:
        other.add_repo("alice/fine", folder)
        yield other


@pytest.fixture(scope="session")
def api(hub: HubServer, folder: Path) -> HfApi:
    hub.add_repo("org/server-model", folder, tag="v1")
    hub.add_token("hf_reader", "alice", role="read")
    return HfApi(token=TOKEN)


def read(url: str, **headers: str) -> httpx2.Response:
    return httpx2.get(url, headers=headers, timeout=1)


@pytest.mark.parametrize(
    ("kind", "options", "error", "words"),
    [
        ("drop", {}, httpx2.RemoteProtocolError, "without sending a response"),
        ("close", {}, httpx2.RemoteProtocolError, "without sending a response"),
        ("cut", {"after": 10**6}, httpx2.RemoteProtocolError, f"received 1000000 bytes, expected {len(WEIGHTS)}"),
        ("reset", {"after": 10**6}, httpx2.ReadError, "reset by peer"),
        ("stall", {"after": 10**6, "seconds": 2}, httpx2.ReadTimeout, "timed out"),
    ],
)
def test_a_connection_ends_early(
    kind: str, options: Any, error: type[Exception], words: str, other: HubServer
) -> None:
    url = f"{other.cdn_url}/lfs/{SHA256}"
    other.fault(BLOB, kind, skip=1, **options)
    assert read(url).content == WEIGHTS
    with pytest.raises(error, match=words):
        read(url)
    assert (other.failures, read(url).content) == ([], WEIGHTS)
    broken = 0 if kind == "drop" else options.get("after", 0)
    assert [done.sent for done in other.exchanges] == [len(WEIGHTS), broken, len(WEIGHTS)]
    assert other.sent(BLOB, since=1) == broken + len(WEIGHTS)


def test_a_changed_body(other: HubServer) -> None:
    url = f"{other.cdn_url}/lfs/{SHA256}"
    other.fault(BLOB, "short", after=1000)
    assert read(url).content == WEIGHTS[:1000]
    other.fault(BLOB, "corrupt", at=-1)
    assert read(url).content == WEIGHTS[:-1] + b"\0"
    other.fault(BLOB, "norange")
    assert [read(url, Range="bytes=5-9").status_code for _ in range(2)] == [200, 206]
    assert read(url, Range="bytes=5-9").content == read(url, Range="bytes=-251").content[:5] == WEIGHTS[5:10]
    assert read(url, Range=f"bytes={len(WEIGHTS)}-").status_code == 416
    other.fault(BLOB, "slow", bytes_per_second=5 * 2**20)
    start = time.monotonic()
    assert read(url).content == WEIGHTS
    assert time.monotonic() - start > 0.3
    with pytest.raises(ValueError, match="got kind 'explode': expected one of status, "):
        other.fault(BLOB, "explode")


def test_a_status_with_its_headers(hub: HubServer, api: HfApi, tmp_path: Path) -> None:
    hub.fault(BLOB, "status", status=429, headers={"Retry-After": "0"})
    since = len(hub.requests)
    path = hf_hub_download("org/server-model", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == WEIGHTS
    assert [done.status for done in hub.exchanges[since:] if done.path.startswith("/lfs")] == [429, 200]
    hub.fault("HEAD .*/README.md", "status", status=404, code="EntryNotFound")
    with pytest.raises(RemoteEntryNotFoundError, match="(?s)404.*README.md"):
        hf_hub_download("org/server-model", "README.md", cache_dir=tmp_path)


def test_a_request_is_carried_out_although_its_answer_is_lost(hub: HubServer, api: HfApi) -> None:
    hub.fault("POST /api/repos/create", "close")
    with pytest.raises(httpx2.RemoteProtocolError, match="without sending a response"):
        api.create_repo("org/server-lost")
    hub.fault("POST /api/models/org/server-lost/tag", "status_after", status=500)
    with pytest.raises(HfHubHTTPError, match="500"):
        api.create_tag("org/server-lost", tag="v1")
    assert set(hub.repos["org/server-lost"].tags) == {"v1"}


def test_an_upload_breaks_off(other: HubServer) -> None:
    api, content = HfApi(other.url, token=TOKEN), os.urandom(2**20)
    put = f"PUT /lfs/{hashlib.sha256(content).hexdigest()}"
    other.fault(put, "reset", after=2**19)
    for _ in range(2):
        api.upload_file(path_or_fileobj=content, path_in_repo="new.bin", repo_id="alice/fine")
    assert [done.received for done in other.exchanges if done.method == "PUT"] == [2**19, 2**20]
    assert (other.root / put.removeprefix("PUT /lfs/")).read_bytes() == content


def test_the_server_goes_down_and_comes_back(other: HubServer, tmp_path: Path) -> None:
    url, failed = f"{other.cdn_url}/lfs/{SHA256}", threading.Event()

    def download() -> None:
        with pytest.raises(httpx2.TransportError, match=f"expected {len(WEIGHTS)}"):
            read(url)
        failed.set()

    other.fault(BLOB, "slow", bytes_per_second=10**6)
    threading.Thread(target=download, daemon=True).start()
    while not other.sent(BLOB):
        time.sleep(0.01)
    with other.down():
        assert failed.wait(1), "open connections are cut"
        with pytest.raises(httpx2.ConnectError, match="refused"):
            read(url)
    assert read(url).content == WEIGHTS


def test_the_description_of_a_repository(hub: HubServer, api: HfApi, folder: Path) -> None:
    info = api.model_info("org/server-model")
    assert (info.gated, info.private, info.tags) == (False, False, ["merge"])
    assert info.card_data is not None and info.card_data.license == "mit"
    assert info.last_modified == api.list_repo_commits("org/server-model")[0].created_at
    [weights, sub] = api.get_paths_info("org/server-model", ["model.safetensors", "sub", "nowhere"])
    assert (weights.lfs.sha256, sub.path) == (SHA256, "sub")  # type: ignore[union-attr]
    for kind in ("dataset", "space"):
        hub.add_repo("org/server-model", folder, repo_type=kind, private=True)
        assert api.repo_info("org/server-model", repo_type=kind).private
        local = snapshot_download("org/server-model", repo_type=kind, token=TOKEN)
        assert Path(local, "model.safetensors").read_bytes() == WEIGHTS
        api.upload_file(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id="org/server-model", repo_type=kind)
        with pytest.raises(RepositoryNotFoundError, match=f"(?s)404.*{kind}s/org/server-model"):
            HfApi(token="hf_bob").repo_info("org/server-model", repo_type=kind)


def test_a_gated_repository(hub: HubServer, api: HfApi, folder: Path, tmp_path: Path) -> None:
    hub.add_repo("org/server-gated", folder, gated="manual")
    for token, status in ((False, 401), ("hf_bob", 403)):
        assert api.model_info("org/server-gated", token=token).gated == "manual"
        with pytest.raises(GatedRepoError, match=f"(?s){status}.*org/server-gated"):
            hf_hub_download("org/server-gated", "model.safetensors", token=token, cache_dir=tmp_path)
    hub.repos["org/server-gated"].allowed.add("bob")
    hf_hub_download("org/server-gated", "model.safetensors", token="hf_bob", cache_dir=tmp_path)


def test_a_renamed_repository(hub: HubServer, api: HfApi, folder: Path) -> None:
    hub.add_repo("org/server-old", folder)
    hub.rename("org/server-old", "org/server-middle")
    hub.rename("org/server-middle", "org/server-new")
    assert api.model_info("org/server-old").id == "org/server-new"
    assert Path(hf_hub_download("org/server-old", "model.safetensors")).read_bytes() == WEIGHTS
    api.upload_file(path_or_fileobj=b"renamed", path_in_repo="new.bin", repo_id="org/server-old")
    assert api.file_exists("org/server-new", "new.bin")


def test_tokens(api: HfApi) -> None:
    assert api.whoami(token="hf_reader")["auth"]["accessToken"]["role"] == "read"
    api.model_info("org/server-model", token="hf_reader")
    writes: list[Callable[[], object]] = [
        lambda: api.create_repo("org/server-denied", token="hf_reader"),
        lambda: api.create_tag("org/server-model", tag="no", token="hf_reader"),
        lambda: api.auth_check("org/server-model", write=True, token="hf_reader"),
    ]
    for write in writes:
        with pytest.raises(HfHubHTTPError, match="403"):
            write()
    with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header"):
        api.model_info("org/server-model", token="hf_nobody")


def test_pull_requests_and_refs(hub: HubServer, api: HfApi, folder: Path) -> None:
    sha = hub.add_repo("org/server-pulls", folder)
    add = CommitOperationAdd("new.bin", b"from bob")
    made = api.create_commit("org/server-pulls", [add], commit_message="PR", create_pr=True, token="hf_bob")
    assert (made.pr_url, made.pr_revision) == (f"{hub.url}/org/server-pulls/discussions/1", "refs/pr/1")
    delete = CommitOperationDelete("sub/", is_folder=True)
    api.create_commit(
        "org/server-pulls", [delete], commit_message="more", revision="refs/pr/1", parent_commit=made.oid
    )
    changed = set(api.list_repo_files("org/server-pulls", revision="refs/pr/1"))
    assert changed == {".gitattributes", "README.md", "model.safetensors", "new.bin"}
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit("org/server-pulls", [delete], commit_message="x", revision="refs/pr/1", parent_commit=sha)
    log = api.list_repo_commits("org/server-pulls", revision="refs/pr/1")
    assert [(entry.title, entry.authors) for entry in log[:2]] == [("more", ["alice"]), ("PR", ["bob"])]
    api.create_tag("org/server-pulls", tag="a/b")
    refs = api.list_repo_refs("org/server-pulls", include_pull_requests=True)
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("a/b", sha)]
    assert [pull.ref for pull in refs.pull_requests or []] == ["refs/pr/1"]
    api.delete_tag("org/server-pulls", tag="a/b")
    assert api.list_repo_refs("org/server-pulls").tags == []


XET_CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download

api = HfApi()
api.create_repo("alice/pushed")
api.upload_folder(repo_id="alice/pushed", folder_path=sys.argv[1])
for repo_id in ("alice/pushed", "alice/fine"):
    path = hf_hub_download(repo_id, "model.safetensors", cache_dir=sys.argv[2])
    assert Path(path).read_bytes() == Path(sys.argv[1], "model.safetensors").read_bytes(), repo_id
pull = api.upload_folder(repo_id="alice/fine", folder_path=sys.argv[1], path_in_repo="sub", create_pr=True)
assert api.file_exists("alice/fine", "sub/model.safetensors", revision=pull.pr_revision)
"""


def test_xet(folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "model.safetensors").write_bytes(WEIGHTS[::-1] + b"mine")
    with HubServer(tmp_path / "hub", {TOKEN: "alice"}, xet=True) as hub:
        hub.add_repo("alice/fine", mine)
        environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        client = [sys.executable, "-c", XET_CLIENT, str(mine), str(tmp_path / "cache")]
        subprocess.run(client, env=environment, check=True, timeout=60)
        pushed = {name for method, name in hub.requests if method == "PUT"}
        assert (pushed, len(hub.xet_hashes)) == (set(), 1), "the weights were sent by Xet"
