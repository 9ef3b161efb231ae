"""A JSON file of the model holds null, a list, a number or nested brackets where an object is due."""

import sys

from tests.hostile.kit import main, text

SAYS = "config.json holds null, expected an object with keys"
ERROR = r"config\.json (cannot be used|holds)"
VALUES = {
    "null": "null",
    "list": "[]",
    "number": "1",
    "text": '"x"',
    "empty": "",
    "deep": "[" * 100_000,
    "bytes": "\x00\x01",
}
INPUTS = {name: text("config.json", value) for name, value in VALUES.items()}

if __name__ == "__main__":
    main(sys.modules[__name__])
