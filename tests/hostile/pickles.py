"""A pickled weight file holds something else than tensors by their names, or is no pickle; the plan reads no pickle."""

import os
import pickle
import sys
from pathlib import Path

import torch

from tests.hostile.kit import Damage, main, pickled

SAYS = "its weights cannot be read: TypeError: pytorch_model.bin holds list, expected tensors by their names"
ERROR = r"its weights cannot be read|tensors of the target are not in the source|not in its files"
ONLY_MERGE = True
NAME = "pytorch_model.bin"


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch /tmp/grasp-hf-hostile-code-ran",)


def damaged(content: bytes) -> Damage:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / NAME).write_bytes(content)

    return change


INPUTS = {
    "a list": pickled(NAME, [torch.ones(1)]),
    "a tensor": pickled(NAME, torch.ones(3)),
    "a number": pickled(NAME, 7),
    "numbers by name": pickled(NAME, {"classifier.weight": 1}),
    "tensors by number": pickled(NAME, {1: torch.ones(1)}),
    "a nested dictionary": pickled(NAME, {"state_dict": {"classifier.weight": torch.ones(1)}}),
    "nothing": damaged(b""),
    "cut": damaged(b"PK\x03\x04" + bytes(40)),
    "code": damaged(pickle.dumps({"classifier.weight": Code()})),
    "text": damaged(b"<html>not found</html>"),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
