"""A field of `adapter_config.json` has a value of a wrong type, or the file holds something else."""

import sys

from tests.hostile.kit import keys, main, text

MODEL = "adapter"
FILE = "adapter_config.json"
SAYS = "its adapter_config.json cannot be used: …"
ERROR = r"adapter_config\.json (cannot be used|holds)|cannot be (applied|merged|read|planned)|it is an adapter of|does not fit"
ONLY_MERGE = True  # the plan does not apply adapters
INPUTS = {
    "null": text(FILE, "null"),
    "a list": text(FILE, "[]"),
    "deep": text(FILE, "[" * 100_000),
    "peft_type is unknown": keys(FILE, peft_type="NONE_SUCH"),
    "peft_type is a list": keys(FILE, peft_type=["LORA"]),
    "base is a list": keys(FILE, base_model_name_or_path=["a"]),
    "base is long": keys(FILE, base_model_name_or_path="a" * 5_000),
    "base has a zero byte": keys(FILE, base_model_name_or_path="a\0b"),
    "base of nobody's home": keys(FILE, base_model_name_or_path="~none-such/model"),
    "r is a text": keys(FILE, r="2"),
    "r is negative": keys(FILE, r=-2),
    "r is null": keys(FILE, r=None),
    "lora_alpha is a list": keys(FILE, lora_alpha=[1]),
    "target_modules is a number": keys(FILE, target_modules=7),
    "target_modules is no expression": keys(FILE, target_modules="(["),
    "target_modules is empty": keys(FILE, target_modules=[]),
    "rank_pattern is a list": keys(FILE, rank_pattern=[1]),
    "bias is unknown": keys(FILE, bias="maybe"),
    "layers_to_transform is a text": keys(FILE, layers_to_transform="all"),
    "init_lora_weights is unknown": keys(FILE, init_lora_weights="none-such"),
}

if __name__ == "__main__":
    main(sys.modules[__name__])
