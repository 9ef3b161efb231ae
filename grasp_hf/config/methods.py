"""The table of the merge methods: what each method needs, and its text on the model card.

The code of a method is the function `candidates` in `grasp_hf/methods/NAME.py`.
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
    """One merge method.

    Attributes:
        summary: One sentence on what the method does, for the help text.
        card: Sentences on the model card about what was done.
        citation: Section of the card that cites the works behind the method, in Markdown.
        needs_data: Whether the method measures sources on labelled samples.
        learns: Whether the method learns coefficients from labels. Each half of the labels then validates the
            coefficients learned from the other half, and a file keeps the weights from before the merge.
        counts_units: Whether the method keeps a mean. The merge then counts the sources in each unit.
        stores_gradients: Whether the method keeps a set of gradients in a file.
        weighs: Whether the method weighs sources by their predictions, so that every source is read once more before the
            merge.
        reads_once: Whether the method reads each weight of a source only once. A large source may then be downloaded
            shard by shard.
    """

    summary: str
    card: str
    citation: str = ""
    needs_data: bool = True
    learns: bool = False
    counts_units: bool = True
    stores_gradients: bool = False
    weighs: bool = False
    reads_once: bool = False


METHODS = {
    "weighted": Method(
        summary="Keeps a mean of all accepted sources, weighted by how much the predictions of each are worth.",
        card="Each unit is a weighted mean of the accepted sources that contain it. The weights are those that a mixture of "
        "the sources' predictions gets on the labels: a source whose predictions add nothing to those of the others gets "
        "little weight.",
        citation=GRASP,
        stores_gradients=True,
        weighs=True,
    ),
    "average": Method(
        summary="Keeps the mean of all accepted sources so far in each unit: `T + (S - T) / n`.",
        card="Each unit is the mean of the accepted sources that contain it.",
        needs_data=False,
        reads_once=True,
    ),
    "blend": Method(
        summary="Learns coefficients of the target and the source in each unit from the training data.",
        card="Each unit is a mix of the merge so far and the next source. The two coefficients of each mix were learned "
        "on the target data, as [AdaMerging](https://arxiv.org/abs/2310.02575) learns them for all sources at once. If "
        "the learned coefficients were not clearly better on the data than the mean of all sources so far, the mean was "
        "used instead.",
        citation=GRASP + ADAMERGING,
        learns=True,
    ),
    "copy": Method(
        summary="Copies the units of the source whose gradients agree with those of the target.",
        card="Units whose gradients agree with the target's were copied from each source.",
        citation=GRASP,
        counts_units=False,
        stores_gradients=True,
    ),
}
