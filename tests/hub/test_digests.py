"""A local source that changes during a merge is refused."""

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp_hf import GraspConfig, GraspMerger
from grasp_hf.errors import GraspError, IncompatibleSourceError
from grasp_hf.hub.digests import SourceDigests
from grasp_hf.hub.download import locate
from tests.support.models import NO_TUNING, perturbed, saved, tiny_data, tiny_model


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(saved(perturbed(tiny_model("resnet"), 1), tmp_path / "source"))


def in_place(folder: Path) -> None:
    """Change one weight, and keep size and time of the file."""
    path = folder / "model.safetensors"
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replaced(folder: Path) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "other", metadata={"format": "pt"})
    (folder / "other").rename(folder / "model.safetensors")


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1_000)


def relabelled(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["id2label"]["0"] = "other"
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [in_place, replaced, cut, relabelled])
def test_a_change_is_noticed(change: Callable[[Path], None], source: Path) -> None:
    digests = SourceDigests()
    digests.check(locate(str(source)))
    digests.check(locate(str(source)))
    change(source)
    with pytest.raises(IncompatibleSourceError, match=r"source': (model|config)\.\w+ changed during the merge"):
        digests.check(locate(str(source)))


def test_a_copy_with_the_same_content_is_the_same_source(source: Path) -> None:
    digests = SourceDigests()
    digests.check(locate(str(source)))
    shutil.copytree(source, source.with_name("copy"))
    shutil.rmtree(source)
    source.with_name("copy").rename(source)
    os.utime(source / "model.safetensors")
    digests.check(locate(str(source)))


def test_files_are_only_read_again_where_the_file_system_shows_a_change(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = SourceDigests()
    read: list[str] = []

    def file_sum(path: Path) -> str:
        read.append(path.name)
        return str(path)

    monkeypatch.setattr("grasp_hf.hub.digests.file_sum", file_sum)
    for _ in range(3):
        digests.check(locate(str(source)))
    assert sorted(read) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("order", ["loss", "rank"])
def test_a_source_that_is_replaced_after_it_was_ranked_is_not_merged(order: str, source: Path, tmp_path: Path) -> None:
    base = saved(tiny_model("resnet"), tmp_path / "base")
    config = GraspConfig(**{**NO_TUNING, "method": "average", "order": order, "batch_size": 8})
    merger = GraspMerger.from_pretrained(base, config=config)
    before = {name: tensor.clone() for name, tensor in merger.model.state_dict().items()}

    class Replaces(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "ranked by" in record.getMessage():
                replaced(source)

    logger, handler = logging.getLogger("grasp_hf"), Replaces()
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        with pytest.raises(GraspError, match="model.safetensors changed during the merge"):
            merger.merge([str(source), str(source)], train_dataset=tiny_data("resnet", 12))
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert all(torch.equal(before[name], tensor) for name, tensor in merger.model.state_dict().items())
