"""Sources arrive whole or not at all through faults of the network, the Hub and the disk; the disk use is bounded."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from stat import S_ISREG
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from filelock import FileLock
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import DownloadError, IncompatibleSourceError, NonFiniteError, SourceNotFoundError
from grasp_hf.hub.download import _remove_partial, locate, resolve
from grasp_hf.hub.pull import Puller, ShardedSource
from grasp_hf.hub.reference import Source, SourceRef
from grasp_hf.tensors.mixing import blend_
from grasp_hf.tensors.units import movable_tensors
from tests.support.hub.server import HubServer
from tests.support.models import LABELS, MEASURE_ONLY, copied, perturbed, saved, saved_adapter, tiny_data, tiny_model

COPY_ALL = GraspConfig(**{**vars(MEASURE_ONLY), "method": "copy", "threshold": -1.0, "gate": False})
CHUNK = 2**12  # a tiny model has six chunks
WEIGHTS = "GET /lfs/"
HEAD = "HEAD /org/pull-1/resolve/.*/model.safetensors"
INFO = "GET /api/models/org/pull-1"
SIX = [f"org/pull-{number}" for number in range(1, 7)]


@pytest.fixture(scope="session")
def folders(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Publish six fine-tunes of one base and an adapter, and return their local folders."""
    root = tmp_path_factory.mktemp("models")
    made = {"org/pull-base": saved(tiny_model("vit"), root / "base")}
    for number, repo_id in enumerate(SIX, start=1):
        made[repo_id] = saved(perturbed(tiny_model("vit"), seed=number), root / str(number))
    lora: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["classifier"]}
    made["org/pull-lora"] = saved_adapter(tiny_model("vit"), "org/pull-base", root / "lora", **lora)
    for repo_id, folder in made.items():
        hub.add_repo(repo_id, folder)
    return {repo_id: Path(folder) for repo_id, folder in made.items()}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> Iterator[Path]:
    """Give each test its own HF_HOME with a file of the user, which must be unchanged after the test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(hub, "failures", [])
    mine = tmp_path / "home" / "hub" / "models--org--mine" / "blobs" / "0123"
    mine.parent.mkdir(parents=True)
    mine.write_text("a file of the user")
    yield tmp_path / "home"
    assert mine.read_text() == "a file of the user"
    assert files_in(tmp_path / "home" / "grasp_hf") == {}


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the pauses of the client, which are several seconds."""
    quick = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(min(seconds, 0.01))})
    monkeypatch.setattr("huggingface_hub.file_download.time", quick)
    monkeypatch.setattr("huggingface_hub.utils._http.time", quick)


def files_in(folder: Path) -> dict[str, bytes]:
    """Return the content of every file in a folder, by its relative path."""
    found = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found if path.exists()}


def weights_here(home: Path) -> set[str]:
    """Return the checksums of the weight files, complete or partial, in the package's own folder."""
    names = (name for _, _, names in os.walk(home / "grasp_hf") for name in names)
    return {name.split(".")[0] for name in names if len(name.split(".")[0]) == 64}


def checksum(hub: HubServer, repo_id: str, name: str = "model.safetensors") -> str:
    repo = hub.repos[repo_id]
    return str(repo.commits[repo.resolve("main")][name].sha256)


def until(condition: Callable[[], Any], seconds: float = 20) -> None:
    """Wait until another thread or process fulfils a condition."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the condition is still false"
        time.sleep(0.002)


def check_weights(source: Source, folder: Path) -> None:
    """Check that the pulled weights equal the published ones."""
    (path,) = source.weight_files
    got, expected = load_file(path), load_file(folder / path.name)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


TEMPORARY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cut": (WEIGHTS, "cut", {"after": 3 * CHUNK}),
    "cut at once": (WEIGHTS, "cut", {"after": 0}),
    "cut five times": (WEIGHTS, "cut", {"after": CHUNK, "times": 5}),
    "cut in the configuration": ("GET .*/config.json", "cut", {"after": 100}),
    "reset": (WEIGHTS, "reset", {"after": 3 * CHUNK}),
    "reset three times": (WEIGHTS, "reset", {"after": 3 * CHUNK, "times": 3}),
    "stall": (WEIGHTS, "stall", {"after": 3 * CHUNK}),
    "slow": (WEIGHTS, "slow", {"bytes_per_second": 50_000}),
    "no answer": (WEIGHTS, "drop", {}),
    "corrupt": (WEIGHTS, "corrupt", {"at": 20_000}),
    "corrupt at the end": (WEIGHTS, "corrupt", {"at": -1}),
    "corrupt three times": (WEIGHTS, "corrupt", {"at": 20_000, "times": 3}),
    "corrupt configuration": ("GET .*/config.json", "corrupt", {"at": 100}),
    "short": (WEIGHTS, "short", {"after": 3 * CHUNK}),
    "short configuration": ("GET .*/config.json", "short", {"after": 100}),
    "429": (WEIGHTS, "status", {"status": 429, "headers": {"Retry-After": "1"}}),
    "500": (WEIGHTS, "status", {"status": 500}),
    "503": (WEIGHTS, "status", {"status": 503, "times": 3}),
    "expired address": (WEIGHTS, "status", {"status": 403}),
    "HEAD lost": (HEAD, "drop", {}),
    "HEAD answer lost": (HEAD, "close", {"times": 3}),
    "HEAD 500": (HEAD, "status", {"status": 500}),
    "HEAD 429": (HEAD, "status", {"status": 429, "headers": {"Retry-After": "1"}}),
    "listing 500": (INFO, "status", {"status": 500}),
    "listing 429": (INFO, "status", {"status": 429, "times": 3}),
    "listing lost": (INFO, "drop", {}),
    "listing cut": (INFO, "cut", {"after": 100}),
}


@pytest.mark.parametrize("what", TEMPORARY)
def test_a_temporary_fault(what: str, hub: HubServer, folders: dict[str, Path], home: Path, impatient: None) -> None:
    pattern, kind, options = TEMPORARY[what]
    hub.fault(pattern, kind, **options)
    with Puller() as puller, puller.pull(SIX[0]) as source:
        assert hub.failures == [], "the fault happened"
        check_weights(source, folders[SIX[0]])
        assert (source.folder / "config.json").read_bytes() == (folders[SIX[0]] / "config.json").read_bytes()


def test_a_cut_download_is_resumed(hub: HubServer, folders: dict[str, Path], home: Path, impatient: None) -> None:
    hub.fault(WEIGHTS, "cut", after=4 * CHUNK + 100)
    since = len(hub.exchanges)
    with Puller() as puller, puller.pull(SIX[0]) as source:
        assert hub.sent("/lfs/", since) == source.num_bytes + 100
        check_weights(source, folders[SIX[0]])


def test_a_server_that_ignores_the_range_of_a_request(
    hub: HubServer, folders: dict[str, Path], home: Path, impatient: None
) -> None:
    hub.fault(WEIGHTS, "cut", after=4 * CHUNK)
    hub.fault(WEIGHTS, "norange")
    with Puller() as puller, puller.pull(SIX[0]) as source:
        assert hub.failures == []
        check_weights(source, folders[SIX[0]])


LASTING: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "cut": (WEIGHTS, "cut", {"after": 100}, "could not be downloaded: model.safetensors: peer closed connection"),
    "reset": (
        WEIGHTS,
        "reset",
        {"after": 3 * CHUNK},
        "could not be downloaded: .*; check the network and the free disk space, and run it again",
    ),
    "corrupt": (
        WEIGHTS,
        "corrupt",
        {"at": 20_000},
        "could not be downloaded: model.safetensors: its checksum differs .*; run it again",
    ),
    "corrupt configuration": ("GET .*/config.json", "corrupt", {"at": 100}, "downloaded: config.json: its checksum"),
    "short": (WEIGHTS, "short", {"after": 3 * CHUNK}, "Consistency check failed: file should be of size 25812"),
    "429": (WEIGHTS, "status", {"status": 429}, "could not be downloaded: model.safetensors: .*429"),
    "500": (WEIGHTS, "status", {"status": 500}, "could not be downloaded: .*500"),
    "503": (WEIGHTS, "status", {"status": 503}, "could not be downloaded: .*503"),
    "HEAD lost": (HEAD, "drop", {}, "could not be downloaded"),
    "HEAD 500": (HEAD, "status", {"status": 500}, "could not be downloaded"),
    "listing 500": (INFO, "status", {"status": 500}, "could not be downloaded, and no complete copy is cached"),
    "listing lost": (INFO, "drop", {}, "could not be downloaded, and no complete copy is cached"),
}


@pytest.mark.parametrize("what", LASTING)
def test_a_lasting_fault(what: str, hub: HubServer, folders: dict[str, Path], home: Path, impatient: None) -> None:
    pattern, kind, options, message = LASTING[what]
    before = files_in(home)
    hub.fault(pattern, kind, **options, times=1000)
    with Puller() as puller:
        with pytest.raises(DownloadError, match=f"^'org/pull-1' .*{message}"):
            with puller.pull(SIX[0]):
                pass
        assert not [path for path in home.glob("grasp_hf/run-*/*") if path.name != ".lock"], "no file is left"
        hub.failures.clear()
        with puller.pull(SIX[0]) as source:
            check_weights(source, folders[SIX[0]])
    assert files_in(home) == before


def test_a_hub_that_restarts_during_a_download(hub: HubServer, folders: dict[str, Path], home: Path) -> None:
    hub.fault(WEIGHTS, "slow", bytes_per_second=20_000)
    bodies = len(hub.exchanges)

    def restart() -> None:
        until(lambda: hub.sent("/lfs/", bodies) > CHUNK)
        with hub.down():
            time.sleep(0.5)

    thread = threading.Thread(target=restart)
    thread.start()
    with Puller() as puller, puller.pull(SIX[0]) as source:
        check_weights(source, folders[SIX[0]])
    thread.join()


def test_a_hub_that_stays_down(hub: HubServer, folders: dict[str, Path], home: Path, impatient: None) -> None:
    hub.fault(WEIGHTS, "slow", bytes_per_second=20_000)
    before, bodies, enough = files_in(home), len(hub.exchanges), threading.Event()

    def stop() -> None:
        until(lambda: hub.sent("/lfs/", bodies) > CHUNK)
        with hub.down():
            enough.wait()

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        with pytest.raises(DownloadError, match="^'org/pull-1' could not be downloaded"):
            with Puller() as puller, puller.pull(SIX[0]):
                pass
        assert files_in(home) == before
        with pytest.raises(DownloadError, match="^'org/pull-1' could not be downloaded, and no complete copy"):
            with Puller() as puller, puller.pull(SIX[0]):
                pass
        assert files_in(home) == before
    finally:
        enough.set()
        thread.join()
    with Puller() as puller, puller.pull(SIX[0]) as source:
        check_weights(source, folders[SIX[0]])


def subprocess_of(script: str, home: Path, **environment: str) -> "subprocess.Popen[str]":
    """Start a Python process with its own HF_HOME."""
    variables = {**os.environ, "HF_HOME": str(home), "HF_HUB_CACHE": str(home / "hub"), **environment}
    command = [sys.executable, "-c", script]
    return subprocess.Popen(
        command, env=variables, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


FULL_DISK = """
import os, resource, signal
from pathlib import Path
from grasp_hf.errors import DownloadError
from grasp_hf.hub.pull import Puller

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
with Puller() as puller:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, hard))  # the configuration fits, the weights do not
    try:
        with puller.pull("org/pull-1"):
            pass
    except DownloadError as error:
        print(error)
    print([path.name for path in Path(os.environ["HF_HOME"], "grasp_hf").glob("run-*/*")])
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    with puller.pull("org/pull-1") as source:
        print(source.num_bytes)
"""


def test_a_full_disk_is_one_clear_error(hub: HubServer, folders: dict[str, Path], home: Path) -> None:
    before, since = files_in(home), len(hub.exchanges)
    output, errors = subprocess_of(FULL_DISK, home).communicate(timeout=60)
    error, left, size = output.splitlines()
    assert error.startswith("'org/pull-1' could not be downloaded: model.safetensors: [Errno 27] File too large"), (
        errors
    )
    assert error.endswith("check the network and the free disk space, and run it again")
    assert (left, int(size)) == ("['.lock']", (folders[SIX[0]] / "model.safetensors").stat().st_size)
    assert len([done for done in hub.exchanges[since:] if "/lfs/" in done.path]) == 2, (
        "a full disk causes no further attempts"
    )
    assert files_in(home) == before


def test_a_folder_that_cannot_be_written(
    hub: HubServer, folders: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "file").write_text("")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(home / "file"))
    with Puller() as puller, pytest.raises(DownloadError, match="^'org/pull-1' could not be downloaded: .*directory"):
        with puller.pull(SIX[0]):
            pass


def merged(sources: list[str], **config: Any) -> GraspMerger:
    merger = GraspMerger.from_pretrained("org/pull-base", config=GraspConfig(**{**vars(COPY_ALL), **config}))
    merger.merge(sources, train_dataset=tiny_data("vit", 8))
    return merger


def equal(left: GraspMerger, right: GraspMerger) -> bool:
    mine, others = movable_tensors(left.model), movable_tensors(right.model)
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


AVERAGE: dict[str, Any] = {"method": "average", "threshold": 0.0}


@pytest.mark.parametrize("prefetch", [True, False])
def test_a_merge_through_faults_is_the_merge_without_them(
    prefetch: bool, hub: HubServer, folders: dict[str, Path], home: Path, impatient: None
) -> None:
    sources = [*SIX[:3], "org/pull-lora", SIX[3]]
    expected = merged(sources, prefetch=prefetch)
    hub.fault(f"{WEIGHTS}{checksum(hub, SIX[0])}", "corrupt", at=20_000)
    hub.fault(f"{WEIGHTS}{checksum(hub, SIX[1])}", "reset", after=5000)
    hub.fault(f"{WEIGHTS}{checksum(hub, SIX[2])}", "cut", after=2 * CHUNK)
    hub.fault(f"{WEIGHTS}{checksum(hub, 'org/pull-lora', 'adapter_model.safetensors')}", "status", status=503)
    hub.fault(f"GET /api/models/{SIX[3]}", "status", status=500, times=2)
    assert equal(merged(sources, prefetch=prefetch), expected)
    assert hub.failures == []


def test_a_merge_that_a_lasting_fault_stopped_can_go_on(
    hub: HubServer, folders: dict[str, Path], home: Path, impatient: None
) -> None:
    expected = merged(SIX[:3])
    merger = GraspMerger.from_pretrained("org/pull-base", config=COPY_ALL)
    hub.fault(f"{WEIGHTS}{checksum(hub, SIX[1])}", "corrupt", at=20_000, times=1000)
    message = "^while merging source 2/3 'org/pull-2': 'org/pull-2' could not be downloaded: model.safetensors: its"
    with pytest.raises(DownloadError, match=message):
        merger.merge(SIX[:3], train_dataset=tiny_data("vit", 8))
    assert [step.source for step in merger.report.steps] == SIX[:1]
    assert equal(merger, merged(SIX[:1]))
    hub.failures.clear()
    merger.merge(SIX[1:3], train_dataset=tiny_data("vit", 8))
    assert equal(merger, expected)


@contextmanager
def watched(home: Path) -> Iterator[list[int]]:
    """Count the weight files in the package's own folder every millisecond."""
    counts, over = [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            counts.append(len(weights_here(home)))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield counts
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("prefetch", "most"), [(True, 2), (False, 1)])
def test_the_disk_holds_no_more_than_two_sources(
    prefetch: bool, most: int, hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    before = files_in(home)
    with watched(home) as counts, Puller(prefetch=prefetch) as puller:
        for number, reference in enumerate(SIX, start=1):
            with puller.pull(reference, *SIX[number : number + 1]) as source:
                here = {checksum(hub, name) for name in SIX[number - 1 : number - 1 + most]}
                until(lambda: weights_here(home) == here)  # noqa: B023
                time.sleep(0.02)  # no other file arrives
                assert weights_here(home) == here
                check_weights(source, folders[reference])
            assert checksum(hub, reference) not in weights_here(home)
        assert weights_here(home) == set()
    assert max(counts) == most
    assert files_in(home) == before


def test_the_disk_during_a_merge(hub: HubServer, folders: dict[str, Path], home: Path) -> None:
    merger = GraspMerger.from_pretrained("org/pull-base", config=COPY_ALL)
    before = files_in(home)
    with watched(home) as counts:
        merger.merge(SIX, train_dataset=tiny_data("vit", 8))
    assert len(merger.report.steps) == 6 and max(counts) in (1, 2)
    assert files_in(home) == before


@pytest.mark.parametrize("repo_id", [SIX[0], "org/pull-lora"])
def test_a_source_in_the_users_cache_is_read_there(
    repo_id: str, hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    name = "adapter_model.safetensors" if "lora" in repo_id else "model.safetensors"
    cached = Path(hf_hub_download(repo_id, name))  # without its configuration
    before, since = files_in(home), len(hub.requests)
    with Puller() as puller, puller.pull(repo_id) as source:
        assert [path.resolve() for path in source.weight_files] == [cached.resolve()]
        check_weights(source, folders[repo_id])
    assert not any("/lfs/" in path for _, path in hub.requests[since:])
    assert cached.exists() and files_in(home) == before


def test_downloads_that_are_kept_are_used_again(
    hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    """A part of the files may be links to those in the user's cache."""
    hf_hub_download(SIX[0], "config.json")
    kept = tmp_path / "kept"
    for attempt in range(2):
        since = len(hub.requests)
        with pytest.raises(KeyError, match="stop"), Puller(keep_in=kept) as puller, puller.pull(SIX[0]) as source:
            check_weights(source, folders[SIX[0]])
            raise KeyError("stop")
        assert any("/lfs/" in path for _, path in hub.requests[since:]) == (attempt == 0)
    with Puller(keep_in=kept) as puller, puller.pull(SIX[0]) as source:
        check_weights(source, folders[SIX[0]])
    assert not [*kept.iterdir()], "used files are removed"


def test_a_damaged_file_in_the_users_cache_is_not_used(hub: HubServer, folders: dict[str, Path], home: Path) -> None:
    cached = Path(hf_hub_download(SIX[0], "model.safetensors"))
    content = bytearray(cached.read_bytes())
    content[-1] ^= 0xFF
    cached.write_bytes(content)
    before = files_in(home)
    with Puller() as puller, puller.pull(SIX[0]) as source:
        check_weights(source, folders[SIX[0]])
    assert files_in(home) == before


def test_one_source_many_times(hub: HubServer, folders: dict[str, Path], home: Path) -> None:
    with Puller() as puller:
        for following in ([SIX[0]], [SIX[0]], []):
            with puller.pull(SIX[0], *following) as source:
                check_weights(source, folders[SIX[0]])
        with puller.pull(str(folders[SIX[1]]), SIX[2]) as source:
            assert source.folder == folders[SIX[1]]
        with puller.pull(SIX[3]) as source:  # another source than announced
            check_weights(source, folders[SIX[3]])
    assert folders[SIX[1]].is_dir()


def test_an_error_of_the_next_source_is_raised_when_it_is_pulled(
    hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    missing = "org/pull-missing"
    with Puller() as puller:
        since = len(hub.requests)
        with puller.pull(SIX[0], missing) as source:
            until(lambda: ("GET", f"/api/spaces/{missing}") in hub.requests[since:])
            check_weights(source, folders[SIX[0]])
        with pytest.raises(SourceNotFoundError, match="'org/pull-missing': no such model"):
            with puller.pull(missing, SIX[1]):
                pass
        hub.fail(f"GET /api/models/{SIX[1]}", 500, times=4)
        with puller.pull(SIX[0], SIX[1]) as source:
            until(lambda: hub.failures == [])
            check_weights(source, folders[SIX[0]])
        with pytest.raises(DownloadError, match="'org/pull-2' could not be downloaded, and no complete copy"):
            with puller.pull(SIX[1]):
                pass
        with puller.pull(SIX[1]) as source:
            check_weights(source, folders[SIX[1]])


@pytest.mark.parametrize(
    ("kind", "error"),
    [("slow", ValueError), ("slow", KeyboardInterrupt), ("stall", KeyboardInterrupt), ("stall", None)],
)
def test_a_download_that_is_no_longer_needed_is_stopped(
    kind: str, error: type[BaseException] | None, hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    before, since = files_in(home), len(hub.exchanges)
    weights = f"GET /lfs/{checksum(hub, SIX[1])}"
    hub.fault(weights, kind, bytes_per_second=5000, after=CHUNK)
    with ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error, match="left"))
        with Puller() as puller, puller.pull(SIX[0], SIX[1]):
            until(lambda: hub.sent(weights, since) >= CHUNK)
            left = time.monotonic()
            if error is not None:
                raise error("left")
    assert time.monotonic() - left < 4, "the whole download takes longer"
    assert not pulling()
    assert files_in(home) == before
    assert list(home.glob("grasp_hf/*")) == []


def pulling() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "grasp_hf-pull"]


@pytest.mark.parametrize("what", ["weights", "listing", "head"])
def test_a_connection_that_has_stalled_is_not_waited_for(
    what: str,
    hub: HubServer,
    folders: dict[str, Path],
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    # The client waits six times for a stalled download, a minute in total, before it checks anything else.
    monkeypatch.setattr("grasp_hf.hub.pull.PATIENCE", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    before, since = files_in(home), len(hub.requests)
    path = f"/lfs/{checksum(hub, SIX[1])}" if what == "weights" else f"/api/models/{SIX[1]}"
    if what == "head":  # the client waits, asks again, and makes its folders when it has the answer
        pattern = f"HEAD /{SIX[1]}/resolve/.*/model.safetensors"
        hub.fault(pattern, "status", times=2, status=429, headers={"Retry-After": "1"})
        happened = lambda: hub.failures == []  # noqa: E731
    else:
        request.getfixturevalue("impatient")
        hub.fault(f"GET {path}", "stall", times=1000 if what == "weights" else 1, seconds=1.5)
        happened = lambda: ("GET", path) in hub.requests[since:]  # noqa: E731
    with pytest.raises(KeyboardInterrupt, match="left"):
        with Puller() as puller, puller.pull(SIX[0], SIX[1]):
            until(happened)
            left = time.monotonic()
            raise KeyboardInterrupt("left")
    assert time.monotonic() - left < 1
    assert len(pulling()) == 1 and all(thread.daemon for thread in pulling())
    assert list(home.glob("grasp_hf/*")) == []
    until(lambda: not pulling())
    assert list(home.glob("grasp_hf/*")) == [], "no folder comes back"
    assert files_in(home) == before


KILLED = """
import sys
import tempfile
from pathlib import Path
from grasp_hf.hub.pull import Puller
from grasp_hf.files import workspace

with workspace(Path(tempfile.gettempdir()), "grasp_hf-") as scratch:
    (scratch / "weights").write_bytes(b"0" * 1000)
    with Puller(prefetch=False) as puller, puller.pull("org/pull-2"):
        print("pulled", flush=True)
        sys.stdin.read()
"""


def test_files_of_a_killed_run_are_removed_by_the_next_run(
    hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    slow = f"GET /lfs/{checksum(hub, SIX[1])}"
    hub.fault(slow, "slow", bytes_per_second=2000)
    since = len(hub.exchanges)
    killed = subprocess_of(KILLED, home, TMPDIR=str(temporary))
    until(lambda: hub.sent(slow, since) >= CHUNK, seconds=60)
    living = subprocess_of(KILLED, home, TMPDIR=str(temporary))
    assert living.stdout is not None and living.stdout.readline() == "pulled\n"
    assert [len(list(home.glob("grasp_hf/run-*"))), len(list(temporary.iterdir()))] == [2, 2]
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert [len(list(home.glob("grasp_hf/run-*"))), len(list(temporary.iterdir()))] == [2, 2]

    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    merger = GraspMerger.from_pretrained("org/pull-base", config=COPY_ALL)
    merger.merge(SIX[:1], train_dataset=tiny_data("vit", 8))
    (left,) = home.glob("grasp_hf/run-*")
    (scratch,) = temporary.iterdir()
    assert weights_here(home) == {checksum(hub, SIX[1])}, "the files of the running process stay"
    assert (scratch / "weights").stat().st_size == 1000
    _, errors = living.communicate(timeout=60)
    assert living.returncode == 0, errors
    assert not left.exists() and not scratch.exists()


@pytest.fixture
def gated(hub: HubServer, folders: dict[str, Path]) -> str:
    if "org/pull-gated" not in hub.repos:
        hub.add_token("hf_carol", "carol", "read")
        hub.add_repo("org/pull-gated", folders[SIX[4]], gated="manual", allowed=["carol"])
    return "org/pull-gated"


def test_a_gated_source(hub: HubServer, folders: dict[str, Path], home: Path, gated: str) -> None:
    for token in (None, "hf_bob"):
        with pytest.raises(SourceNotFoundError, match=f"'{gated}' is gated: accept the conditions on its page"):
            with Puller(token=token) as puller, puller.pull(gated):
                pass
    for token in ("hf_alice", "hf_carol"):
        with Puller(token=token) as puller, puller.pull(gated) as source:
            assert source.gated
            check_weights(source, folders[SIX[4]])


def test_a_gated_source_is_named_in_a_merge(hub: HubServer, folders: dict[str, Path], home: Path, gated: str) -> None:
    with pytest.raises(SourceNotFoundError, match=f"^while merging source 2/3 '{gated}': '{gated}' is gated: accept"):
        merged([SIX[0], gated, SIX[1]])


def test_a_private_source(
    hub: HubServer, folders: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/pull-private", folders[SIX[4]], private=True)
    for token in (None, "hf_bob"):
        with pytest.raises(
            SourceNotFoundError, match="'org/pull-private': no such model on the Hub, or it is private"
        ):
            with Puller(token=token) as puller, puller.pull("org/pull-private"):
                pass
    with Puller(token="hf_alice") as puller, puller.pull("org/pull-private") as source:
        check_weights(source, folders[SIX[4]])
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    with Puller() as puller, puller.pull("org/pull-private") as source:
        check_weights(source, folders[SIX[4]])


def test_a_renamed_source(
    hub: HubServer, folders: dict[str, Path], home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sha = hub.add_repo("org/pull-old", folders[SIX[4]])
    hub.rename("org/pull-old", "alice/pull-new")
    with Puller() as puller, puller.pull("org/pull-old") as source:
        assert (str(source.ref), source.sha) == ("org/pull-old", sha)
        check_weights(source, folders[SIX[4]])
    assert "'org/pull-old' was renamed on the Hub: it is now 'alice/pull-new'" in caplog.text


@pytest.mark.parametrize(("repo_type", "name"), [("dataset", "a data set"), ("space", "a Space")])
def test_a_repository_that_is_not_a_model(
    repo_type: str, name: str, hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    hub.add_repo(f"org/pull-{repo_type}", folders[SIX[4]], repo_type=repo_type)
    message = f"'org/pull-{repo_type}': got {name} on the Hub, expected a model or an adapter"
    with pytest.raises(SourceNotFoundError, match=message):
        with Puller() as puller, puller.pull(f"org/pull-{repo_type}"):
            pass


def test_a_refused_token_is_an_error_even_if_all_files_are_cached(
    hub: HubServer, folders: dict[str, Path], home: Path
) -> None:
    for name in ("model.safetensors", "config.json", "preprocessor_config.json"):
        hf_hub_download(SIX[0], name)
    with pytest.raises(SourceNotFoundError, match="'org/pull-1': the Hub refused the token: log in again"):
        with Puller(token="hf_nobody") as puller, puller.pull(SIX[0]):
            pass


def test_offline(hub: HubServer, folders: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    huggingface_hub.snapshot_download(SIX[0])
    before, since = files_in(home), len(hub.requests)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with Puller() as puller:
        with puller.pull(SIX[0], SIX[1]) as source:
            check_weights(source, folders[SIX[0]])
        with pytest.raises(
            DownloadError, match="'org/pull-2' could not be downloaded, and no complete copy is cached"
        ):
            with puller.pull(SIX[1]):
                pass
    assert hub.requests[since:] == []
    assert files_in(home) == before


def test_offline_a_damaged_file_is_not_used(
    hub: HubServer, folders: dict[str, Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(huggingface_hub.snapshot_download(SIX[0]), "model.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="'org/pull-1': model.safetensors is damaged in the cache; run it again"):
        with Puller() as puller, puller.pull(SIX[0]):
            pass


def test_offline_a_copy_without_all_its_shards_is_not_used(
    hub: HubServer, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    perturbed(tiny_model("vit"), seed=2).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    hub.add_repo("org/pull-cached-shards", tmp_path / "shards")
    cached = locate("org/pull-cached-shards").weight_files
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate("org/pull-cached-shards").weight_files == cached and len(cached) >= 3
    lost = cached[1]
    lost.unlink()
    with pytest.raises(
        DownloadError, match=f"^'org/pull-cached-shards' is not complete in the cache: {lost.name} miss"
    ):
        locate("org/pull-cached-shards")


@pytest.mark.parametrize("going_on", [False, True])
def test_parts_of_a_killed_download_in_the_users_cache_are_removed(going_on: bool, hub: HubServer, home: Path) -> None:
    sha = checksum(hub, SIX[0])
    cache, name = Path(huggingface_hub.constants.HF_HUB_CACHE), f"models--{SIX[0].replace('/', '--')}"
    left = cache / name / "blobs" / f"{sha}.0123abcd.incomplete"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    lock = cache / ".locks" / name / f"{sha}.lock"
    lock.parent.mkdir(parents=True)
    listing = resolve(SourceRef.parse(SIX[0]))
    assert listing is not None
    with FileLock(lock) if going_on else nullcontext():
        _remove_partial(listing, "model.safetensors")
    assert left.exists() == going_on
    locate(SIX[0])
    assert [path.name for path in left.parent.glob("*incomplete")] == []


def test_shards(hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path, impatient: None) -> None:
    perturbed(tiny_model("vit"), seed=1).save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    hub.add_repo("org/pull-shards", tmp_path / "shards")
    names = sorted(path.name for path in (tmp_path / "shards").glob("*.safetensors"))
    assert len(names) >= 3
    hub.fault(WEIGHTS, "corrupt", skip=1, at=-1)
    hub.fault(WEIGHTS, "status", skip=1, status=503)
    since = len(hub.requests)
    with Puller() as puller, puller.pull("org/pull-shards") as source:
        assert [path.name for path in source.weight_files] == names
        for path in source.weight_files:
            assert path.read_bytes() == (tmp_path / "shards" / path.name).read_bytes()
        assert hub.failures == []
    assert len([path for _, path in hub.requests[since:] if "/lfs/" in path]) == len(names) + 2, (
        "each complete shard is downloaded once"
    )


PARTS = {"org/pull-parts": LABELS, "org/pull-more-parts": LABELS, "org/pull-permuted-parts": LABELS[::-1]}
IN_PARTS = list(PARTS)[:2]


def larger_model(seed: int, labels: list[str] = LABELS) -> PreTrainedModel:
    """Return a model whose shards are larger than the first request for a header, 100 KB."""
    names: dict[str, Any] = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
    size: dict[str, Any] = {
        "image_size": 8,
        "patch_size": 4,
        "hidden_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return perturbed(ViTForImageClassification(ViTConfig(**size, intermediate_size=256, **names)), seed)


@pytest.fixture(scope="session")
def parts(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Publish fine-tunes in shards, the last one with its classes in another order, and return their local folders."""
    found = {}
    for number, (repo_id, labels) in enumerate(PARTS.items(), start=1):
        found[repo_id] = tmp_path_factory.mktemp("parts")
        larger_model(number, labels).save_pretrained(found[repo_id], max_shard_size="270KB")
        hub.add_repo(repo_id, found[repo_id])
    return found


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def averaged(sources: list[str], data: bool = False, merger: GraspMerger | None = None, **config: Any) -> GraspMerger:
    """Average `sources` into `merger` or a new model, with evaluation data if `data` is set."""
    settings = {**vars(COPY_ALL), **AVERAGE, **config}
    merger = merger or GraspMerger(larger_model(0), GraspConfig(**settings))
    merger.merge(sources, eval_dataset=tiny_data("vit", 4) if data else None)
    return merger


@contextmanager
def weighed(home: Path) -> Iterator[dict[str, int]]:
    """Measure the most bytes of weights in the package's own folder, and the most removed files that are still mapped."""
    most, over = {"files": 0, "removed": 0}, threading.Event()

    def watch() -> None:
        while not over.is_set():
            held = 0
            for parent, _, names in os.walk(home / "grasp_hf"):
                for name in names:
                    with suppress(OSError):
                        status = os.lstat(Path(parent, name))
                        held += status.st_size if len(name.split(".")[0]) == 64 and S_ISREG(status.st_mode) else 0
            most["files"] = max(most["files"], held)
            maps = Path("/proc/self/maps")
            mapped = maps.read_text().splitlines() if maps.exists() else []
            removed = sum("grasp_hf/run-" in line and line.endswith("(deleted)") for line in mapped)
            most["removed"] = max(most["removed"], removed)
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(("data", "prefetch", "at_once"), [(True, True, 2), (True, False, 1), (False, True, 2)])
def test_an_average_reads_shards_one_by_one(
    data: bool, prefetch: bool, at_once: int, hub: HubServer, parts: dict[str, Path], home: Path
) -> None:
    expected = averaged([str(parts[repo_id]) for repo_id in IN_PARTS], data)
    sizes = [path.stat().st_size for path in shards_of(parts[IN_PARTS[0]])]
    assert len(sizes) >= 5 and min(sizes) > 125_000
    hub.fault(WEIGHTS, "slow", bytes_per_second=3_000_000, times=100)
    with weighed(home) as most:
        merger = averaged(IN_PARTS, data, prefetch=prefetch)
    assert equal(merger, expected)
    assert (at_once - 0.5) * min(sizes) < most["files"] <= at_once * max(sizes)
    assert most["removed"] == 0
    assert [step.num_bytes for step in merger.report.steps] == [sum(sizes)] * 2
    assert [step.units for step in merger.report.steps] == [step.units for step in expected.report.steps]


def test_shards_are_downloaded_together_if_that_needs_less_disk(
    hub: HubServer, parts: dict[str, Path], home: Path
) -> None:
    expected = averaged([str(parts[repo_id]) for repo_id in IN_PARTS])
    whole = sum(path.stat().st_size for path in shards_of(parts[IN_PARTS[0]]))
    with weighed(home) as most:  # no copy of the target is needed, which is as large as the source
        assert equal(averaged(IN_PARTS, prefetch=False), expected)
    assert most["files"] == whole
    for repo_id in IN_PARTS:
        huggingface_hub.snapshot_download(repo_id)
    before, since = files_in(home), len(hub.exchanges)
    assert equal(averaged(IN_PARTS, data=True), averaged([str(parts[repo_id]) for repo_id in IN_PARTS], data=True))
    assert hub.sent("/lfs/", since) == 0 and files_in(home) == before


@pytest.mark.parametrize("prefetch", [True, False])
def test_shards_that_the_users_cache_holds_stay_there(
    prefetch: bool, hub: HubServer, parts: dict[str, Path], home: Path
) -> None:
    for path in shards_of(parts[IN_PARTS[0]])[1:3]:
        hf_hub_download(IN_PARTS[0], path.name)
    before, since = files_in(home), len(hub.exchanges)
    merger = averaged(IN_PARTS[:1], data=True, prefetch=prefetch)
    assert equal(merger, averaged([str(parts[IN_PARTS[0]])], data=True))
    assert files_in(home) == before
    whole = {done.path for done in hub.exchanges[since:] if "/lfs/" in done.path and not done.range}
    assert len(whole) == len(shards_of(parts[IN_PARTS[0]])) - 2


@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("kind", ["cut", "corrupt", "status"])
def test_a_lasting_fault_in_a_later_shard(
    kind: str, data: bool, hub: HubServer, parts: dict[str, Path], home: Path, impatient: None
) -> None:
    names = [path.name for path in shards_of(parts[IN_PARTS[1]])]
    merger = averaged(IN_PARTS[:1], data)
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    moved: list[str] = []

    def blend(tensors: Any, start: Any, values: Any, *rest: Any) -> None:
        moved.extend(values)
        blend_(tensors, start, values, *rest)

    pattern = f"{WEIGHTS}{checksum(hub, IN_PARTS[1], names[1])}"
    hub.fault(pattern, kind, skip=1, after=120_000, at=-1, times=1 if kind == "cut" else 1000)  # the header arrives
    hub.fault(pattern, "status", skip=1, times=1000)
    message = f"^while merging source 1/1 '{IN_PARTS[1]}': '{IN_PARTS[1]}' could not be downloaded"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(DownloadError, match=message):
        patch.setattr("grasp_hf.merging.mixed.blend_", blend)
        averaged(IN_PARTS[1:], data, merger)
    assert moved, "the failure comes after weights have changed"
    assert all(torch.equal(tensor, before[name]) for name, tensor in merger.model.state_dict().items())
    assert len(merger.report.steps) == 1
    hub.failures.clear()
    averaged(IN_PARTS[1:], data, merger)
    assert equal(merger, averaged([str(parts[repo_id]) for repo_id in IN_PARTS], data))


def test_a_temporary_fault_in_a_later_shard(
    hub: HubServer, parts: dict[str, Path], home: Path, impatient: None
) -> None:
    for kind, path in zip(("cut", "corrupt", "status"), shards_of(parts[IN_PARTS[0]])[1:4], strict=True):
        pattern = f"{WEIGHTS}{checksum(hub, IN_PARTS[0], path.name)}"
        hub.fault(pattern, kind, skip=1, after=120_000, at=-1, status=503)
    assert equal(averaged(IN_PARTS[:1]), averaged([str(parts[IN_PARTS[0]])]))
    assert hub.failures == []


@pytest.mark.parametrize("number", [0, 2])
def test_a_weight_that_is_not_finite_in_a_shard(
    number: int, hub: HubServer, parts: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    folder = copied(str(parts[IN_PARTS[0]]), tmp_path / "nan")
    paths = shards_of(folder)
    tensors = load_file(paths[number])
    name = max(tensors, key=lambda name: tensors[name].numel())
    tensors[name][0] = torch.nan
    save_file(tensors, paths[number], {"format": "pt"})
    hub.add_repo("org/pull-nan", folder)
    slow = f"{WEIGHTS}{checksum(hub, 'org/pull-nan', paths[number + 1].name)}"  # the merge fails before this shard
    hub.fault(slow, "slow", skip=1, bytes_per_second=20_000)
    merger = GraspMerger(larger_model(0), GraspConfig(**{**vars(COPY_ALL), **AVERAGE}))
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}
    with pytest.raises(NonFiniteError, match=f"'org/pull-nan': .*{name.rpartition('.')[2]} holds NaN"):
        averaged(["org/pull-nan"], merger=merger)
    assert all(torch.equal(tensor, before[name]) for name, tensor in merger.model.state_dict().items())


def test_a_shard_that_is_no_longer_needed(hub: HubServer, parts: dict[str, Path], home: Path) -> None:
    second, since = shards_of(parts[IN_PARTS[0]])[1], len(hub.exchanges)
    pattern = f"{WEIGHTS}{checksum(hub, IN_PARTS[0], second.name)}"
    hub.fault(pattern, "slow", bytes_per_second=20_000)
    with Puller(undo_bytes=0) as puller:
        with puller.pull(IN_PARTS[0]) as source:
            assert isinstance(source, ShardedSource)
            shards = source.shards()
            assert [next(shards).name] == [path.name for path in source.weight_files]
            until(lambda: hub.sent(pattern, since) > 0)
        left = time.monotonic()
        with puller.pull(IN_PARTS[1]) as source:
            assert isinstance(source, ShardedSource)
            assert time.monotonic() - left < 4, "the whole download takes longer"
            assert len(list(home.glob("grasp_hf/run-*/*/models--*"))) == 1, "no file of the first source is left"
            arrived = [(path.name, path.read_bytes()) for path in source.shards()]
        assert arrived == [(path.name, path.read_bytes()) for path in shards_of(parts[IN_PARTS[1]])]


def test_shards_that_do_not_fit_are_refused_by_their_headers(
    hub: HubServer, parts: dict[str, Path], home: Path
) -> None:
    target = ViTForImageClassification(ViTConfig(**{**larger_model(0).config.to_dict(), "intermediate_size": 32}))
    merger, since = GraspMerger(target, GraspConfig(**{**vars(COPY_ALL), **AVERAGE})), len(hub.exchanges)
    with pytest.raises(IncompatibleSourceError, match="got shape \\(256, 128\\), expected \\(32, 128\\)"):
        averaged(IN_PARTS[:1], data=True, merger=merger)
    whole = [done for done in hub.exchanges[since:] if "/lfs/" in done.path and not done.range]
    assert len(whole) == 1, "only the first shard was downloaded"


def test_shards_whose_rows_are_matched_by_name_are_downloaded_together(
    hub: HubServer, parts: dict[str, Path], home: Path
) -> None:
    sources = ["org/pull-permuted-parts", *IN_PARTS]
    merger = averaged(sources)
    assert equal(merger, averaged([str(parts[repo_id]) for repo_id in sources]))
    assert "classes matched by name" in merger.report.steps[0].notes[0]


def test_a_subfolder_of_a_revision(hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path) -> None:
    for number, tag in ((0, "v1"), (1, "v2")):
        root = tmp_path / tag
        shutil.copytree(folders[SIX[number]], root / "deep" / "er")
        shutil.copytree(folders[SIX[5]], root, dirs_exist_ok=True)
        hub.add_repo("org/pull-deep", root, tag=tag)
    since = len(hub.requests)
    for reference, repo_id in {"deep/er@v1": SIX[0], "deep/er": SIX[1]}.items():
        with Puller() as puller, puller.pull(f"org/pull-deep/{reference}") as source:
            assert source.folder.name == "er"
            check_weights(source, folders[repo_id])
    asked = {path for _, path in hub.requests[since:] if "/lfs/" in path}
    assert asked == {f"/lfs/{checksum(hub, repo_id)}" for repo_id in SIX[:2]}
    with Puller() as puller, puller.pull("org/pull-deep@v1") as source:
        check_weights(source, folders[SIX[5]])
    with pytest.raises(SourceNotFoundError, match="'org/pull-deep/nowhere@v1' holds no config.json.*no files"):
        with Puller() as puller, puller.pull("org/pull-deep/nowhere@v1"):
            pass


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "model.gguf",
            "holds no weights: expected .*; found: .*; a GGUF file has quantized weights: name the float",
        ),
        ("model.onnx", "holds no weights: expected one of .*; found: .*model.onnx.*; an export for another framework"),
        ("onnx/model.onnx", "holds no weights: expected one of .*; found: .*; an export for another framework"),
    ],
)
def test_other_formats_are_refused_before_any_download(
    name: str, message: str, hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path
) -> None:
    folder = copied(str(folders[SIX[0]]), tmp_path / "other")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "model.safetensors").rename(folder / name)
    repo_id = f"org/pull-{name.replace('/', '-').replace('.', '-')}"
    hub.add_repo(repo_id, folder)
    since = len(hub.requests)
    with pytest.raises(SourceNotFoundError, match=f"'{repo_id}' {message}"):
        with Puller() as puller, puller.pull(repo_id):
            pass
    assert not any("/resolve/" in path for _, path in hub.requests[since:])


def test_one_format_of_weights_is_pulled(hub: HubServer, folders: dict[str, Path], home: Path, tmp_path: Path) -> None:
    folder = copied(str(folders[SIX[0]]), tmp_path / "both")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "adapter").mkdir()
    hub.add_repo("org/pull-both", folder)
    lora = copied(str(folders["org/pull-lora"]), tmp_path / "lora")
    shutil.copy(folder / "model.safetensors", lora)
    shutil.copy(folder / "config.json", lora)
    hub.add_repo("org/pull-beside", lora)
    for repo_id, name in {
        "org/pull-both": "model.safetensors",
        "org/pull-beside": "adapter_model.safetensors",
    }.items():
        since = len(hub.requests)
        with Puller() as puller, puller.pull(repo_id) as source:
            assert source.kind == ("adapter" if "adapter" in name else "full")
            check_weights(source, folder if source.kind == "full" else lora)
        asked = [path for _, path in hub.requests[since:] if "/lfs/" in path]
        assert asked == [f"/lfs/{checksum(hub, repo_id, name)}"]


XET = """
import os, sys
from pathlib import Path
from huggingface_hub import HfApi
from grasp_hf.hub.pull import Puller

api = HfApi(token="hf_alice")
for number, folder in enumerate(FOLDERS):
    api.create_repo(f"alice/pull-{number}")
    api.upload_folder(repo_id=f"alice/pull-{number}", folder_path=folder)
same = []
with Puller() as puller:
    for number, folder in enumerate(FOLDERS):
        with puller.pull(f"alice/pull-{number}", *[f"alice/pull-{number + 1}"][: len(FOLDERS) - 1 - number]) as source:
            (path,) = source.weight_files
            same.append(path.read_bytes() == Path(folder, path.name).read_bytes())
print(same)
"""


def test_xet(folders: dict[str, Path], home: Path, tmp_path: Path) -> None:
    before = files_in(home)
    with HubServer(tmp_path / "hub", {"hf_alice": "alice"}, xet=True) as hub:
        names = [str(folders[repo_id]) for repo_id in SIX[:3]]
        script = f"FOLDERS = {names}\n{XET}"
        output, errors = subprocess_of(script, home, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="0").communicate(
            timeout=60
        )
        assert output == "[True, True, True]\n", errors
        assert len(hub.xet_hashes) == 3 and hub.sent("/lfs/") == 0, "the weights were sent by Xet"
        assert any("xet-read-token" in path for _, path in hub.requests)
    after = {name: content for name, content in files_in(home).items() if not name.startswith("xet/logs/")}
    assert after == before
