"""A loopback Hub for the whole session, in place before `huggingface_hub` reads its environment."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from contextlib import ExitStack

import pytest

from tests.support.hub.server import HubServer

if "huggingface_hub" in sys.modules:
    raise RuntimeError("huggingface_hub was imported before conftest.py: the tests would talk to the real Hub")

for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))]:
    del os.environ[name]

RESOURCES = ExitStack()
ROOT = RESOURCES.enter_context(tempfile.TemporaryDirectory(prefix="grasp-hf-tests-", ignore_cleanup_errors=True))
HUB = RESOURCES.enter_context(
    HubServer(f"{ROOT}/hub", users={"hf_alice": "alice", "hf_bob": "bob"}, orgs={"org": ["alice"]})
)
os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": f"{ROOT}/home",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    "HF_HUB_ETAG_TIMEOUT": "2",
    "DISABLE_SAFETENSORS_CONVERSION": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",  # tiny models: threads that wait for each other cost fifty times the work
}


def pytest_collection_finish() -> None:
    """Leave the imported modules out of garbage collection: each `Trainer.train` collects, and would walk them all."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Stop the Hub and remove its files and the cache."""
    RESOURCES.close()


@pytest.fixture(scope="session")
def hub() -> HubServer:
    """Return the Hub of the whole test run; alice ("hf_alice") and bob ("hf_bob") have tokens, alice is a member of "org".

    No token is set: pass `token=`, or set `HF_TOKEN`, which clients read at each call, with `monkeypatch.setenv`.
    """
    return HUB


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Try again at once where the package would wait for the Hub."""
    monkeypatch.setattr("grasp_hf.hub.client.PAUSES", (0.01, 0.01, 0.01))
