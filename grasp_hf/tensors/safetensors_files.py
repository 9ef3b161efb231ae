"""Safetensors files, mapped into memory even where they are larger than it.

The library reserves memory for the whole of a file that it opens for torch, because a write to a tensor would need it.
The system refuses that for a file larger than its memory.
"""

import json
import mmap
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LARGEST_HEADER = 25_000_000  # bytes, as on the Hub
LONGEST_NAME = 1_000  # characters of the name of a tensor
NO_RESERVE = 0x4000 if sys.platform == "linux" else 0  # MAP_NORESERVE, which Python 3.11 does not name


def read_header(path: Path) -> list[tuple[str, str, list[int]]]:
    """Return name, dtype (as in the file, such as `F32`) and shape of each tensor in a file.

    The library checks the header: the tensors fill the file without gap or overlap.

    Raises:
        ValueError, SafetensorError, OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise ValueError(f"its header has {size:,} bytes, expected at most {LARGEST_HEADER:,}")
    with safe_open(path, "np") as weights:  # for numpy, it maps the file without reserving memory
        slices = {name: weights.get_slice(name) for name in weights.keys()}
    if long := [name for name in slices if len(name) > LONGEST_NAME]:
        raise ValueError(f"it names a tensor in {len(long[0]):,} characters, expected at most {LONGEST_NAME:,}")
    return [(name, part.get_dtype(), part.get_shape()) for name, part in slices.items()]


def map_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, mapped: a value is read when it is used.

    A write to a tensor changes a page in memory and never the file.

    Raises:
        ValueError, SafetensorError, OSError: The file cannot be read.
    """
    rows = read_header(path)
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        flags = mmap.MAP_PRIVATE | NO_RESERVE
        memory = mmap.mmap(file.fileno(), 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    found = {}
    for name, dtype, shape in rows:
        if dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {dtype}, expected one of {', '.join(DTYPES)}")
        count = torch.Size(shape).numel()
        if not count:
            found[name] = torch.empty(shape, dtype=DTYPES[dtype])
            continue
        begin, _ = header[name]["data_offsets"]
        offset = 8 + size + begin
        found[name] = torch.frombuffer(memory, dtype=DTYPES[dtype], count=count, offset=offset).view(shape)
    return found
