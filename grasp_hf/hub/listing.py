"""The files that a repository on the Hub holds."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..internals import cache_folder_name
from .reference import INDEX, Source, SourceRef, main_weights

TOKENIZERS = ("*.model", "*.spm", "*.tiktoken", "bpe.codes")  # those that are neither JSON nor text
CONFIG_FILES = ("*.json", "*.txt", *TOKENIZERS, "*.jinja", "README.md", "grasp_config.yaml")
CHAT_TEMPLATES = "additional_chat_templates"
NOT_NEEDED = ("trainer_state.json", "*results.json")


@dataclass(frozen=True)
class RemoteFile:
    """One file of a commit.

    Attributes:
        size: In bytes.
        sha256: Checksum of a large file; `None` for a small one.
        git_sha1: Checksum of a small one, as git makes it; that of a large one is of its pointer.
    """

    size: int
    sha256: str | None
    git_sha1: str

    def matches(self, path: Path) -> bool:
        """Tell whether the file at `path` has this content, by its checksum: the size alone says too little."""
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
        ref: What the user named.
        repo_id: The repository's name now; another one than in `ref` where it was renamed.
        sha: The commit.
        files: What it holds, by path.
        license: What its card declares.
        gated: Whether conditions stand before its files.
        trusted: Whether its Python files are wanted.
        shards: Names of the weight files, where an index says which they are.
    """

    ref: SourceRef
    repo_id: str
    sha: str
    files: dict[str, RemoteFile]
    license: str | None = None
    gated: bool = False
    trusted: bool = False
    shards: tuple[str, ...] = ()

    def select(self, patterns: Sequence[str]) -> list[str]:
        """Return the files in the reference's folder that match one of `patterns`."""
        return [
            path
            for path in self.files
            if path.startswith(self.folder)
            and any(fnmatch(name := path.removeprefix(self.folder), p) for p in patterns)
            if "/" not in name and not any(fnmatch(name, pattern) for pattern in NOT_NEEDED)
        ]

    @property
    def folder(self) -> str:
        """The reference's folder in the repository, with a slash at its end; empty for the root."""
        return f"{self.ref.subfolder}/" if self.ref.subfolder else ""

    @property
    def cache_name(self) -> str:
        """The repository's folder in a cache of the client."""
        return cache_folder_name(self.repo_id)

    @property
    def names(self) -> list[str]:
        """The files in the reference's folder, by name."""
        return sorted(Path(path).name for path in self.select(["*"]))

    @property
    def exports(self) -> list[str]:
        """The names of files in folders below, where exports for other frameworks lie."""
        below = (path.removeprefix(self.folder) for path in self.files if path.startswith(self.folder))
        return sorted(path for path in below if "/" in path)

    def inspect(self) -> Source:
        """Return what it is, before anything is downloaded; raises as `Source.inspect`."""
        return Source.inspect(self.ref, Path(), self.sha, files=self.names, exports=self.exports)

    @property
    def configuration(self) -> list[str]:
        """Paths of the configuration files; chat templates beside the first one lie in a folder of their own."""
        templates = [path for path in self.files if path.startswith(f"{self.folder}{CHAT_TEMPLATES}/")]
        return templates + self.select([*CONFIG_FILES, "*.py"] if self.trusted else CONFIG_FILES)

    @property
    def main_weights(self) -> str | None:
        """Path of the file that holds the weights, or of the index of those that do."""
        name = main_weights(self.names)
        return self.folder + name if name else None

    @property
    def weights(self) -> list[str]:
        """Paths of the weight files, of one format only."""
        main = self.main_weights
        if main is None or not main.endswith(INDEX):
            return [main] if main else []
        return [self.folder + name for name in self.shards]

    @property
    def num_bytes(self) -> int:
        """Size of the weight files in bytes."""
        return sum(self.files[path].size for path in self.weights)
