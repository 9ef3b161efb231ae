"""A number in `config.json` makes a library build or count what nobody has: labels, layers, experts."""

import sys

from tests.hostile.kit import keys, main

SAYS = "config.json holds num_hidden_layers: 1,000,000, expected at most 2,000"
ERROR = r"config\.json holds .*expected at most|more than \d+ levels|cannot be (planned|merged|read|used)"
INPUTS = {
    "a billion labels": keys("config.json", num_labels=10**9),
    "a million named labels": keys("config.json", id2label={str(number): "a" for number in range(1_000_000)}),
    "a million layers": keys("config.json", num_hidden_layers=10**6),
    "layers in a part": keys("config.json", text_config={"num_hidden_layers": 10**9}),
    "experts": keys("config.json", num_local_experts=10**8),
    "experts in many layers": keys("config.json", num_local_experts=9_000, num_hidden_layers=100),
    "stages": keys("config.json", depths=[2, 10**9]),
    "an integer of 5,000 digits": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "bert", "num_labels": 1' + "0" * 5_000 + "}"
    ),
    "nested": lambda folder: (folder / "config.json").write_text(
        '{"model_type": "bert", "a": ' + "[" * 500 + "]" * 500 + "}"
    ),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
