"""The files of a commit on the Hub."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..internals import cache_folder_name
from .companions import TOKENIZERS, files_below
from .reference import INDEX, Source, SourceRef, main_weights

CONFIG_FILES = ("*.json", "*.txt", *TOKENIZERS, "*.jinja", "README.md", "grasp_config.yaml")
NOT_NEEDED = ("trainer_state.json", "*results.json")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        size: Size in bytes.
        sha256: Checksum of a large file; `None` for a small file.
        git_sha1: Checksum that git computes: of the content of a small file, of the pointer to a large file.
    """

    size: int
    sha256: str | None
    git_sha1: str

    def matches(self, path: Path) -> bool:
        """Whether the file at `path` has the same size and the same checksum."""
        if path.stat().st_size != self.size:
            return False
        digest = hashlib.sha256() if self.sha256 else hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
        return digest.hexdigest() == (self.sha256 or self.git_sha1)


@dataclass(frozen=True)
class Listing:
    """One commit of a repository.

    Attributes:
        ref: Reference from the user.
        repo_id: Current name of the repository. It differs from that in `ref` after a renaming.
        sha: Hash of the commit.
        files: Files of the commit, by path.
        license: Licence on the model card.
        base_models: Models that the card names as those that this one was made from.
        gated: Whether the Hub asks users to accept conditions before a download.
        trusted: Whether the user trusts its Python files, which are then downloaded too.
        shards: Names of the weight files, if an index lists them.
    """

    ref: SourceRef
    repo_id: str
    sha: str
    files: dict[str, RemoteFile]
    license: str | None = None
    base_models: tuple[str, ...] = ()
    gated: bool = False
    trusted: bool = False
    shards: tuple[str, ...] = ()

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Return the paths of the files in the reference's folder that match one of `patterns`."""
        names = [path.removeprefix(self.folder) for path in self.files if path.startswith(self.folder)]
        return [
            self.folder + name
            for name in names
            if "/" not in name
            and any(fnmatch(name, pattern) for pattern in patterns)
            and not any(fnmatch(name, pattern) for pattern in NOT_NEEDED)
        ]

    @property
    def folder(self) -> str:
        """Folder of the reference in the repository, with a final slash; empty for the root."""
        return f"{self.ref.subfolder}/" if self.ref.subfolder else ""

    @property
    def cache_name(self) -> str:
        """Name of the repository's folder in a cache of the client."""
        return cache_folder_name(self.repo_id)

    @property
    def names(self) -> list[str]:
        """Names of the files in the reference's folder, sorted."""
        return sorted(Path(path).name for path in self.select(["*"]))

    @property
    def below(self) -> list[str]:
        """Relative paths of the files in subfolders, which may be other models, or exports for other frameworks."""
        below = (path.removeprefix(self.folder) for path in self.files if path.startswith(self.folder))
        return sorted(path for path in below if "/" in path)

    def inspect(self) -> Source:
        """Return the source of this commit, before anything is downloaded; see `Source.inspect` for errors."""
        return Source.inspect(self.ref, Path(), self.sha, files=self.names, below=self.below)

    @property
    def configuration(self) -> list[str]:
        """Paths of the configuration files; further chat templates and some modules are in folders of their own."""
        own = [path.removeprefix(self.folder) for path in self.files if path.startswith(self.folder)]
        return [self.folder + path for path in files_below(own)] + self.select(
            [*CONFIG_FILES, "*.py"] if self.trusted else CONFIG_FILES
        )

    @property
    def main_weights(self) -> str | None:
        """Path of the single weight file, or of the index of several; `None` if there are no weights."""
        name = main_weights(self.names)
        return self.folder + name if name else None

    @property
    def weights(self) -> list[str]:
        """Paths of the weight files, in one format only."""
        main = self.main_weights
        if main is None or not main.endswith(INDEX):
            return [main] if main else []
        return [self.folder + name for name in self.shards]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(self.files[path].size for path in self.weights)
