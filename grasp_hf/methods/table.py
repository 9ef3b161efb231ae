"""Finds the code of a method by its name. `grasp_hf/config/methods.py` holds the table of the methods."""

from importlib import import_module

from .candidates import Candidate, Inputs


def find_candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the candidates of the method of `inputs.config` by name; that of the method itself comes first.

    Raises:
        NonFiniteLossError: A loss is NaN or infinite while the model holds something of the source.
    """
    found: dict[str, Candidate] = import_module(f".{inputs.config.method}", __package__).candidates(inputs)
    return found
