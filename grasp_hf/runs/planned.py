"""What is known of one model before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import first_few


@dataclass
class PlannedSource:
    """What is known of one reference without its weights.

    Attributes:
        reference: As the user gave it.
        role: `base` or `source`.
        kind: `full` or `adapter`; empty where it was not found.
        sha: Commit on the Hub.
        architecture: The model type, or the type of the adapter.
        dtypes: Of its weights, in the spelling of safetensors.
        parameters: Number of numbers in its files.
        labels: Names of its classes; `None` for a model that generates.
        vocabulary: Number of tokens that it embeds.
        adapter_of: The model that an adapter says that it belongs to.
        license: What its card declares.
        gated: Whether conditions stand before its files.
        num_bytes: Size of its weights.
        cached_bytes: How much of them lies on this machine already.
        problems: Everything that keeps it from being merged.
        data_problems: Of the base: everything that keeps its data from being used.
        notes: What will happen to its head and its vocabulary, where there is something to say.
        partition: Of the base: the units that are decided together, those that differ in a number only on one line.
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
        """Size of the weights that are not on this machine."""
        return self.num_bytes - self.cached_bytes

    def problem_lines(self) -> list[str]:
        """Return every problem as a line that names the data, or this model."""
        return self.data_problems + [f"{self.reference}: {problem}" for problem in self.problems]

    def row(self) -> dict[str, str | None]:
        """Return its line of the plan; `None` where nothing is known."""
        name = Path(self.reference).name if Path(self.reference).is_dir() else self.reference
        revision = self.sha or ("local" if self.kind else None)
        return {
            "": self.role,
            "model": name,
            "kind": self.kind or None,
            "architecture": self.architecture or None,
            "adapter of": self.adapter_of or None,
            "dtype": ", ".join(self.dtypes) or None,
            "labels": first_few(self.labels, 3) if self.labels else None,
            "tokens": str(self.vocabulary) if self.vocabulary else None,
            "licence": f"{self.license or '–'}, gated" if self.gated else self.license or None,
            "revision": revision and revision[:7],
            "MB": f"{self.num_bytes / 1e6:.1f}" if self.kind else None,
            "to download": f"{self.bytes_to_download / 1e6:.1f}" if self.kind else None,
            "problems": str(len(self.problem_lines()) or "none"),
        }
