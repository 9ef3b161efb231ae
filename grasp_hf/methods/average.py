"""The method `average`: the mean of all accepted sources so far, `T + (S - T) / k`."""

from .candidates import AVERAGE, Candidate, Inputs


def candidates(inputs: Inputs) -> dict[str, Candidate]:
    """Return the mean of all sources so far, unit by unit."""
    mixes = inputs.average_mixes()
    return {AVERAGE: inputs.candidate(mixes, dict.fromkeys(mixes))}
