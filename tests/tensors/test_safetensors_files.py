"""Safetensors files are mapped, whatever their size, and read as the library reads them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from grasp_hf.hub.download import locate
from grasp_hf.hub.reference import SourceRef
from grasp_hf.sources.checkpoint import file_tensors
from grasp_hf.sources.headers import header_tensors
from grasp_hf.tensors.safetensors_files import DTYPES, map_tensors, read_header


def write(path: Path, header: Mapping[str, object], body: bytes, size: int | None = None) -> Path:
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + body)
        if size is not None:
            file.truncate(8 + len(text) + size)  # a hole that takes no space on the disk
    return path


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_tensors_are_those_of_the_library(dtype: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(24).view(2, 3, 4).to(dtype)
    tensors = {
        "a": values,
        "odd": torch.tensor([True, False, True]),
        "b": values[0, 0].clone(),
        "none": values[:0].clone(),
    }
    tensors["one"] = values[1, 1, 1].clone()
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    expected, found = load_file(tmp_path / "a.safetensors"), map_tensors(tmp_path / "a.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    assert {(n, tuple(s)) for n, _, s in read_header(tmp_path / "a.safetensors")} == {
        (n, tuple(t.shape)) for n, t in tensors.items()
    }


def test_a_write_never_changes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    before = path.read_bytes()
    map_tensors(path)["a"].fill_(7)
    assert path.read_bytes() == before and torch.equal(map_tensors(path)["a"], torch.ones(4))
    path.chmod(0o400)
    assert torch.equal(map_tensors(path)["a"], torch.ones(4))


@pytest.mark.skipif(not hasattr(os, "sysconf"), reason="the size of the memory is not known")
def test_a_file_larger_than_memory_is_mapped(tmp_path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    size = 3 * memory // 4 * 4
    header = {
        "small": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "large": {"dtype": "F32", "shape": [size // 4], "data_offsets": [8, 8 + size]},
    }
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    write(tmp_path / "model.safetensors", header, b"\0\0\x80?\0\0\0@", 8 + size)
    source = locate(str(tmp_path))
    assert source.float_dtypes() == {"F32"} and source.ref == SourceRef(str(tmp_path))
    shapes = {name: tuple(tensor.shape) for name, tensor in (header_tensors(source) or {}).items()}
    assert shapes == {"small": (2,), "large": (size // 4,)}
    tensors = file_tensors(source)
    assert tensors["small"].tolist() == [1, 2] and float(tensors["large"][-1]) == 0


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a" * 1_001: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, "names a tensor in 1,001 characters"),
        (
            {"a": {"dtype": "U64", "shape": [1], "data_offsets": [0, 8]}},
            "a has the dtype U64, expected one of F64, F32",
        ),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, ""),
    ],
)
def test_a_file_that_cannot_be_read(header: dict[str, object], message: str, tmp_path: Path) -> None:
    body = bytes(8 if "U64" in str(header) else 4)
    with pytest.raises((ValueError, SafetensorError), match=message):
        map_tensors(write(tmp_path / "a.safetensors", header, body))


def test_a_header_that_is_too_long_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes((26_000_000).to_bytes(8, "little"))
    os.truncate(path, 30_000_000)
    with pytest.raises(ValueError, match="its header has 26,000,000 bytes, expected at most 25,000,000"):
        read_header(path)
