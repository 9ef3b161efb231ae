"""Reads files that clients upload by Xet, the newer transfer protocol of the Hub.

There is no Xet server. A client with hf_xet accepts a folder (`local://...`) in place of the server's address and
writes its own storage format there.
"""

from __future__ import annotations

import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

RECORD = 48  # Every record of a shard has this many bytes.
END = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


def download_from_xet(folder: Path, sha256: str, target: Path) -> str | None:
    """Write the file with this hash from a Xet store to `target`; return its Xet hash, or None if it is not there."""
    import hf_xet

    for xet_hash, content_hash, size in files_in(folder):
        if content_hash == sha256:
            with tempfile.TemporaryDirectory(dir=target.parent) as copy:
                # The uploading client may still hold the store's lock, so read from a copy.
                shutil.copytree(folder / "xet/xorbs", f"{copy}/xet/xorbs", copy_function=_copy_open_store)
                url, session, expiry = f"local://{copy}", hf_xet.XetSession(), int(time.time()) + 3600
                with session.new_file_download_group(url, token="t", token_expiry_unix_secs=expiry) as group:
                    group.start_download_file(hf_xet.XetFileInfo(xet_hash, size), f"{copy}/content")
                os.replace(f"{copy}/content", target)
            return xet_hash
    return None


def _copy_open_store(source: str, target: str) -> None:
    """Copy the database, which the client locks; link all other files, which never change."""
    with suppress(FileNotFoundError):  # The client is still busy with other files.
        (shutil.copy if source.endswith(".redb") else os.link)(source, target)


def files_in(folder: Path) -> Iterator[tuple[str, str, int]]:
    """Yield (Xet hash, sha256, size in bytes) of each file in the shards of a local Xet store.

    A shard lists each file as a header (Xet hash, flags, number of segments), its segments, as many verification
    records if the flags say so, and a record with the sha256 if they say so. A header of set bits ends the list.
    """
    for shard in folder.glob("xet/xorbs/shards/*.mdb"):
        data, offset = shard.read_bytes(), RECORD  # The first record is the shard's own header.
        while (header := data[offset : offset + 32]) != END:
            flags, count = struct.unpack_from("<II", data, offset + 32)
            offset += RECORD
            size = sum(struct.unpack_from("<I", data, offset + RECORD * index + 36)[0] for index in range(count))
            offset += RECORD * count * (2 if flags & HAS_VERIFICATION else 1)
            if flags & HAS_SHA256:
                yield _hex(header), _hex(data[offset : offset + 32]), size
                offset += RECORD


def _hex(digest: bytes) -> str:
    """Write a hash as Xet does: four little-endian numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))
