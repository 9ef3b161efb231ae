"""The method `weighted`: the mean of all accepted sources so far, weighted by what their predictions are worth.

The weights come from `grasp_hf.teaching.predictions`; they reach a method as `Inputs.average`.
"""

from .average import candidates

__all__ = ["candidates"]
