"""The names, shapes and dtypes of weights, read from the headers of their files; no weight is read."""

import json
from collections.abc import Iterable

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import IncompatibleSourceError
from ..hub.client import hub_errors, retry
from ..hub.listing import Listing
from ..hub.reference import Source

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
    "BOOL": torch.bool,
}  # any other dtype is shown as bytes; only F64, F32, F16 and BF16 are merged


def header_tensors(
    source: Source, listing: Listing | None = None, *, token: str | None = None
) -> dict[str, Tensor] | None:
    """Return the tensors of a source on the meta device, by their names in its files; `None` if the files are pickled.

    With `listing`, the files are on the Hub. The first kilobytes of each file are downloaded and not stored.

    Raises:
        IncompatibleSourceError: A header cannot be read.
        DownloadError: The Hub cannot be reached.
    """
    names = listing.weights if listing else [str(path) for path in source.weight_files]
    if not all(name.endswith(".safetensors") for name in names):
        return None
    found: dict[str, Tensor] = {}
    for name in names:
        rows = _read_remote_header(listing, name, token) if listing else _read_local_header(source, name)
        found |= {
            key: torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta") for key, dtype, shape in rows
        }
    return found


def _read_remote_header(listing: Listing, name: str, token: str | None) -> Iterable[tuple[str, str, list[int]]]:
    api = HfApi(token=token)
    try:
        with hub_errors(listing.ref, token):
            header = retry(
                lambda: api.parse_safetensors_file_metadata(listing.repo_id, name, revision=listing.sha),
                f"reading the header of {name} of '{listing.ref}'",
            )
    except (SafetensorsParsingError, NotASafetensorsRepoError, json.JSONDecodeError) as error:
        raise IncompatibleSourceError(f"{name} cannot be read as safetensors: {error}", subject=listing.ref) from error
    return [(key, tensor.dtype, tensor.shape) for key, tensor in header.tensors.items()]


def _read_local_header(source: Source, name: str) -> Iterable[tuple[str, str, list[int]]]:
    try:
        with safe_open(name, "pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            return [(key, part.get_dtype(), part.get_shape()) for key, part in slices.items()]
    except (SafetensorError, OSError) as error:
        path = name.rpartition("/")[2]
        raise IncompatibleSourceError(f"{path} cannot be read as safetensors: {error}", subject=source.ref) from error
