"""The names, shapes and dtypes of weights, read from the headers of their files; no weight is read."""

from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from torch import Tensor

from ..hub.client import hub_errors, retry
from ..hub.listing import Listing
from ..hub.reference import Source, reading, reads
from ..tensors.safetensors_files import DTYPES, read_header


@reads("the headers of its weight files cannot be used")
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
            # Any other dtype is shown as bytes; only F64, F32, F16 and BF16 are merged.
            key: torch.empty(shape, dtype=DTYPES.get(dtype, torch.uint8), device="meta")
            for key, dtype, shape in rows
        }
    return found


def _read_remote_header(listing: Listing, name: str, token: str | None) -> Iterable[tuple[str, str, list[int]]]:
    api = HfApi(token=token)
    with reading(listing.ref, f"{name} cannot be read as safetensors"), hub_errors(listing.ref, token):
        header = retry(
            lambda: api.parse_safetensors_file_metadata(listing.repo_id, name, revision=listing.sha),
            f"reading the header of {name} of '{listing.ref}'",
        )
        return [(key, tensor.dtype, tensor.shape) for key, tensor in header.tensors.items()]


def _read_local_header(source: Source, name: str) -> Iterable[tuple[str, str, list[int]]]:
    with reading(source.ref, f"{Path(name).name} cannot be read as safetensors"):
        return read_header(Path(name))
