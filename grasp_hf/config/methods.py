"""The table of the merge methods: what each needs, and what the card says of it.

The code of a method is the function `candidates` of `grasp_hf/methods/NAME.py`.
"""

from dataclasses import dataclass

GRASP = """
## Citation

```bibtex
@misc{grasp2026,
  title = {GRASP},
  year = {2026},
  eprint = {2606.14900},
  archivePrefix = {arXiv}
}
```
"""

ADAMERGING = """
```bibtex
@inproceedings{adamerging2024,
  title = {AdaMerging: Adaptive Model Merging for Multi-Task Learning},
  author = {Yang, Enneng and Wang, Zhenyi and Shen, Li and Liu, Shiwei and Guo, Guibing and Wang, Xingwei and Tao, Dacheng},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  eprint = {2310.02575},
  archivePrefix = {arXiv}
}
```
"""


@dataclass(frozen=True)
class Method:
    """One method.

    Attributes:
        card: The sentences on the card that say what was done.
        citation: Section of the card with the works that it follows, in Markdown.
        needs_data: Whether it measures sources on labelled samples.
        learns: Whether labels teach coefficients. Halves of the labels then validate, and a file keeps the weights that the
            merge began with.
        counts_units: Whether it keeps a mean, so that it must know how many sources each unit holds.
        stores_gradients: Whether it keeps a set of gradients in a file.
        reads_once: Whether it reads each weight of a source only once, so that a large source may come in shards.
    """

    card: str
    citation: str = ""
    needs_data: bool = True
    learns: bool = False
    counts_units: bool = True
    stores_gradients: bool = False
    reads_once: bool = False


METHODS = {
    "average": Method(
        card="Each unit is the mean over the accepted sources that bring it.",
        needs_data=False,
        reads_once=True,
    ),
    "blend": Method(
        card="How much of the merge so far and of the next source each unit takes was learned on the target data, as "
        "[AdaMerging](https://arxiv.org/abs/2310.02575) learns it for all sources at once. Where the learned coefficients "
        "were not clearly better on the data than the mean of all sources so far, that mean was taken: plain or, where "
        "that was clearly better, weighted by [Fisher information](https://arxiv.org/abs/2111.09832).",
        citation=GRASP + ADAMERGING,
        learns=True,
    ),
    "copy": Method(
        card="Units whose gradients agree with the target's were copied from each source.",
        citation=GRASP,
        counts_units=False,
        stores_gradients=True,
    ),
}
