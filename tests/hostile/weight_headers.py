"""The header of a safetensors file is no header, or its offsets do not fit the file."""

import sys

from tests.hostile.kit import Damage, main, raw, safetensors

SAYS = "model.safetensors cannot be read as safetensors: …"
ERROR = r"model\.safetensors cannot be read as safetensors|tensors of the target are not in the source|are not in its files"
NAME = "classifier.weight"


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> Damage:
    return safetensors({NAME: {"dtype": dtype, "shape": shape, "data_offsets": offsets}}, bytes(4))


INPUTS = {
    "empty": raw("model.safetensors", b""),
    "shorter than its header": raw("model.safetensors", (1000).to_bytes(8, "little") + b"{}"),
    "header of 2**63 bytes": raw("model.safetensors", (2**63).to_bytes(8, "little") + b"{}"),
    "header is no JSON": safetensors(b"\xff" * 64),
    "header is a list": safetensors(b"[]"),
    "header is deep": safetensors(b'{"a":' * 100_000),
    "no tensors": safetensors({}),
    "unknown dtype": entry(dtype="F7"),
    "negative shape": entry(shape=[-1]),
    "shape overflows": entry(shape=[2**62, 2**62]),
    "offsets beyond the file": entry(shape=[2**20], offsets=[0, 2**22]),
    "offsets overlap": safetensors(
        {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in ("a", "b")}, bytes(4)
    ),
    "offsets in the wrong order": entry(offsets=[4, 0]),
    "unused bytes at the end": entry(offsets=[0, 2]),
    "metadata is a list": safetensors({"__metadata__": [1]}),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
