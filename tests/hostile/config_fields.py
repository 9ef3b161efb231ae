"""A field of `config.json` has a value of a wrong type or range."""

import sys

from tests.hostile.kit import keys, main

SAYS = "its config.json cannot be used: …"
ERROR = r"cannot be (used|read|planned|merged)|different "
INPUTS = {
    "id2label is a list": keys("config.json", id2label=["a"]),
    "id2label has words as numbers": keys("config.json", id2label={"one": "a"}),
    "model_type is a list": keys("config.json", model_type=[1]),
    "model_type is unknown": keys("config.json", model_type="none-such"),
    "hidden_size is a text": keys("config.json", hidden_size="16"),
    "num_attention_heads is zero": keys("config.json", num_attention_heads=0),
    "hidden_act is unknown": keys("config.json", hidden_act="none-such"),
    "hidden_act is a list": keys("config.json", hidden_act=["gelu"]),
    "dtype is unknown": keys("config.json", dtype="float7"),
    "quantization_config is a number": keys("config.json", quantization_config=4),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
