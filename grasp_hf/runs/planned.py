"""The facts about one model that are known before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import first_few
from ..files import find_folder
from ..record.text import format_size, shorten

NAME_WIDTH = 42  # characters; with it the table fits in 100 columns


@dataclass
class PlannedSource:
    """The facts about one reference that are known without its weights.

    Attributes:
        reference: Reference as the user gave it.
        role: `base` or `source`.
        kind: `full` or `adapter`; empty if the model was not found.
        sha: Commit on the Hub; `None` for a folder.
        architecture: Model type, or the type of the adapter.
        dtypes: Data types of its weights, such as `float32`; empty if only reading the weights shows them.
        parameters: Number of elements in its weight files.
        labels: Names of its classes; `None` for a model that generates.
        vocabulary: Number of tokens in its embedding.
        adapter_of: Base model that the configuration of an adapter names.
        license: Licence that its card declares.
        gated: Whether a user must accept conditions before a download.
        num_bytes: Size of its weights in bytes.
        cached_bytes: Size in bytes of the weights that are already on this machine.
        problems: All reasons why it cannot be merged.
        data_problems: For the base, all reasons why its data cannot be used.
        notes: Changes that a merge makes to its head and its vocabulary, and other remarks.
        partition: For the base, lines that list the units; units whose names differ only in numbers share a line.
    """

    reference: str
    role: Literal["base", "source"]
    kind: str = ""
    sha: str | None = None
    architecture: str = ""
    dtypes: list[str] = field(default_factory=list)
    parameters: int | None = None
    labels: list[str] | None = None
    vocabulary: int | None = None
    adapter_of: str | None = None
    license: str | None = None
    gated: bool = False
    num_bytes: int = 0
    cached_bytes: int = 0
    problems: list[str] = field(default_factory=list)
    data_problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    partition: list[str] = field(default_factory=list)

    @property
    def bytes_to_download(self) -> int:
        """Size in bytes of the weights that are not on this machine."""
        return self.num_bytes - self.cached_bytes

    def problem_lines(self) -> list[str]:
        """Return every problem as a line that names the data or this model."""
        return self.data_problems + [f"{self.reference}: {problem}" for problem in self.problems]

    def row(self) -> dict[str, str | None]:
        """Return its row of the plan's table; a dash stands for an unknown value."""
        name = Path(self.reference).name if find_folder(self.reference) else self.reference
        return {
            "": self.role,
            "model": shorten(name, NAME_WIDTH),
            "kind": self.kind or "–",
            "size": format_size(self.num_bytes) if self.kind else "–",
            "download": format_size(self.bytes_to_download) if self.kind else "–",
            "problems": str(len(self.problem_lines()) or "none"),
        }

    def detail_lines(self) -> list[str]:
        """Return its reference and all other known facts as lines of text."""
        revision = self.sha[:7] if self.sha else "local" if self.kind else ""
        licence = [self.license] if self.license else []
        facts = {
            "licence": ", ".join([*licence, *(["gated"] if self.gated else [])]),
            "revision": revision,
            "architecture": self.architecture,
            "adapter of": self.adapter_of,
            "dtype": ", ".join(self.dtypes),
            "labels": first_few(self.labels, 3) if self.labels else "",
            "tokens": str(self.vocabulary or ""),
        }
        return [
            f"{self.role} {self.reference}",
            *(f"  {name + ':':13} {fact}" for name, fact in facts.items() if fact),
        ]
