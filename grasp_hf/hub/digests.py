"""Digests of local sources, which must not change while a merge reads them more than once."""

from pathlib import Path

from ..errors import IncompatibleSourceError
from ..tensors.stored import file_sum
from .reference import Source, reading

CONFIGS = ("config.json", "adapter_config.json")


class SourceDigests:
    """Remembers the files of each local source at its first use, and refuses a source that has changed since.

    A source may be judged, ranked and merged at different times. One that was replaced in between would be merged with
    the verdict on another. Files from the Hub are verified whenever they are fetched.
    """

    def __init__(self) -> None:
        self._known: dict[str, dict[str, tuple[object, str]]] = {}  # by source and file: identity, and digest

    def check(self, source: Source) -> None:
        """Take the digests of a local source, or compare them with those of its first use.

        A file is only read again if the file system shows a change, such as another time.

        Raises:
            IncompatibleSourceError: A file has changed, or cannot be read.
        """
        if source.sha is not None:
            return
        with reading(source.ref, "its files cannot be read"):
            paths = [*source.weight_files, *(path for name in CONFIGS if (path := source.folder / name).is_file())]
            earlier = self._known.get(str(source.ref))
            found = {path.name: self._describe(path, (earlier or {}).get(path.name)) for path in paths}
        digests = {name: digest for name, (_, digest) in found.items()}
        if earlier is not None:
            before = {name: digest for name, (_, digest) in earlier.items()}
            if changed := sorted(
                name for name in before.keys() | digests.keys() if before.get(name) != digests.get(name)
            ):
                raise IncompatibleSourceError(
                    f"{', '.join(changed)} changed during the merge: got other content than when the source was first "
                    "read; leave its folder alone, and start the merge again",
                    subject=source.ref,
                )
        self._known[str(source.ref)] = found

    @staticmethod
    def _describe(path: Path, earlier: tuple[object, str] | None) -> tuple[object, str]:
        stat = path.stat()
        identity = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        if earlier is not None and earlier[0] == identity:
            return earlier
        return identity, file_sum(path)
