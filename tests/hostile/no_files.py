"""What should be a file is a folder, a pipe, a device, or a link to nothing or to itself."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from tests.hostile.kit import Damage, main

SAYS = "tokenizer.json is neither a file nor a folder"
ERROR = r"is neither a file nor a folder|holds no (config\.json|weights)|folder cannot be read|cannot be (used|read)"


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return change


def link_to(target: str) -> Callable[[Path], object]:
    return lambda path: path.symlink_to(target)


INPUTS = {
    f"{name} is {kind}": instead(name, make)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    for kind, make in {
        "a pipe": os.mkfifo,
        "an endless device": link_to("/dev/zero"),
        "a folder": Path.mkdir,
        "a link to itself": lambda path: path.symlink_to(path),
        "a link to nothing": link_to("/none/such"),
    }.items()
    # Without tokenizer.json and README.md the model can still be merged.
    if name in ("config.json", "model.safetensors") or kind in ("a pipe", "an endless device")
}

if __name__ == "__main__":
    main(sys.modules[__name__])
