"""What is known of one model before any weight is read."""

from dataclasses import dataclass, field
from pathlib import Path

from ..errors import shortened


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
        notes: What will happen to its head and its vocabulary, where there is something to say.
        partition: Of the base: the units that are decided together, those that differ in a number only on one line.
    """

    reference: str
    role: str
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
    notes: list[str] = field(default_factory=list)
    partition: list[str] = field(default_factory=list)

    @property
    def bytes_to_download(self) -> int:
        """Size of the weights that are not on this machine."""
        return self.num_bytes - self.cached_bytes

    def row(self) -> dict[str, str]:
        """Return its line of the plan."""
        name = Path(self.reference).name if Path(self.reference).is_dir() else self.reference
        licence = f"{self.license or '–'}{', gated' if self.gated else ''}"
        return {
            "": self.role,
            "model": name,
            "kind": self.kind or "–",
            "architecture": self.architecture or "–",
            "adapter of": self.adapter_of or "–",
            "dtype": ", ".join(self.dtypes) or "–",
            "labels": shortened(self.labels, 3) if self.labels else "–",
            "tokens": str(self.vocabulary or "–"),
            "licence": licence,
            "revision": (self.sha or ("local" if self.kind else "–"))[:7],
            "MB": f"{self.num_bytes / 1e6:.1f}" if self.kind else "–",
            "to download": f"{self.bytes_to_download / 1e6:.1f}" if self.kind else "–",
            "problems": str(len(self.problems) or "none"),
        }
