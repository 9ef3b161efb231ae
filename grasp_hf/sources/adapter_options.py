"""The options in an adapter's configuration that change what it computes: they are honoured, or refused by name."""

from __future__ import annotations

import copy
import json
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from ..hub.reference import Source

if TYPE_CHECKING:
    from peft import PeftConfig

LAYOUT = "lora_B_layout"  # written by other trainers; PEFT ignores it
WITHOUT_EFFECT = {LAYOUT, "runtime_config", "merge_weights"}
NOT_WEIGHTS = {
    "layer_replication": "the adapted model has other layers than its base",
    "alora_invocation_tokens": "it acts on the tokens after an invocation only, which no weights express",
    "arrow_config": "it chooses among adapters for each token, which no weights express",
    "sample_at_inference": "it draws random numbers for each input, which no weights express",
}
# Ways to start that change the weights of the base: by a random method, or by data that only the trainer had.
CHANGES_BASE = ("pissa_niter_", "corda", "lora_ga")


def stored_options(adapter: Source) -> dict[str, Any]:
    """Return the content of adapter_config.json."""
    found: dict[str, Any] = json.loads((adapter.folder / "adapter_config.json").read_text(encoding="utf-8"))
    return found


def option_problems(config: PeftConfig, adapter: Source) -> list[str]:
    """List the options of an adapter that a merge cannot honour.

    An option that PEFT does not know comes from a newer version, or from another trainer. Its default is unknown, so only
    an empty value or `false` is taken as one.
    """
    known = {field.name for field in fields(config)} | WITHOUT_EFFECT
    problems = [
        f"its adapter_config.json sets {name}: {json.dumps(value)[:100]}, an option that PEFT {version('peft')} does not "
        "know; update PEFT, or remove the option if it has no effect"
        for name, value in stored_options(adapter).items()
        if name not in known and value
    ]
    problems += [
        f"its adapter_config.json sets {name}: {why}"
        for name, why in NOT_WEIGHTS.items()
        if getattr(config, name, None)
    ]
    start = getattr(config, "init_lora_weights", None)
    if isinstance(start, str) and start.startswith(CHANGES_BASE):
        problems.append(
            f"it was started with init_lora_weights: {start}, which changed the weights of the base, and its files do "
            "not hold the changed ones; save it again with path_initial_model_for_weight_conversion"
        )
    return problems


def for_inference(config: PeftConfig) -> Any:
    """Return a copy of an adapter's configuration without dropout, which has no effect on a trained adapter.

    PEFT refuses some adapters with dropout, such as those of fused experts.
    """
    config = copy.deepcopy(config)
    config.inference_mode = True
    for field in fields(config):
        if field.name.endswith("dropout") and getattr(config, field.name):
            setattr(config, field.name, 0.0)
    return config
