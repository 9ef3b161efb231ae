"""The predictions of the sources on the user's inputs, in files: one source at a time, `terms x classes` numbers each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..models.batches import Link
from ..validation.losses import Outputs, SampleLosses
from .pool import Array, FittedPool, fit_pool, mixture_weights

KINDS = ("labelled", "unlabeled")


@dataclass(frozen=True)
class Member:
    """The predictions of one model.

    Attributes:
        name: The reference of a source.
        labelled: Logits for the labelled terms, shape `(terms, classes)`.
        unlabeled: Logits for the terms of the unlabelled inputs, in the same form; `None` without such inputs.
    """

    name: str
    labelled: Array
    unlabeled: Array | None = None


class Predictions:
    """The predictions of several models on the same inputs.

    The logits are in files. In memory there are only the labels, and one number for each model and label: its
    log-likelihood.

    Args:
        directory: Folder for the files.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._likelihoods: dict[str, NDArray[np.float32]] = {}
        self._truth: Outputs | None = None
        self._files: dict[str, list[Path]] = {}

    def __len__(self) -> int:
        return len(self._likelihoods)

    @property
    def truth(self) -> Outputs | None:
        """The labels, with the logits of the first model; `None` if the models are no classifiers and no regressions."""
        return self._truth

    def add(self, name: str, losses: SampleLosses, unlabeled: Tensor | None = None) -> None:
        """Keep the predictions of a model.

        Args:
            name: Reference of the source.
            losses: Its losses on the labelled samples, with their outputs.
            unlabeled: Its logits for the unlabelled inputs, shape `(terms, classes)`.
        """
        outputs = losses.outputs
        own = losses.token_losses if outputs is None else outputs.losses()
        if own is None:
            own = losses.losses
        self._likelihoods[name] = -own.numpy().astype(np.float32)
        if outputs is not None:
            self._write(name, outputs, unlabeled)

    def _write(self, name: str, outputs: Outputs, unlabeled: Tensor | None) -> None:
        self._truth = self._truth or outputs
        found = [outputs.logits] if unlabeled is None else [outputs.logits, unlabeled]
        self._directory.mkdir(exist_ok=True)
        number = list(self._likelihoods).index(name)  # a source that comes twice has the same files
        self._files[name] = []
        for kind, logits in zip(KINDS, found, strict=False):
            path = self._directory / f"{number}-{kind}.npy"
            np.save(path, logits.numpy())
            self._files[name].append(path)

    def saved(self, name: str) -> tuple[dict[str, Tensor], Link | None]:
        """Return what is known of a model, as tensors with their link; `restore` takes it."""
        found = {"likelihoods": torch.from_numpy(self._likelihoods[name])}
        if name not in self._files or self._truth is None:
            return found, None
        logits = [torch.from_numpy(np.load(path)) for path in self._files[name]]
        found |= dict(zip(KINDS, logits, strict=False))
        return {**found, "targets": self._truth.targets, "samples": self._truth.samples}, self._truth.link

    def restore(self, name: str, tensors: Mapping[str, Tensor], link: Link | None) -> None:
        """Take what `saved` returned in an earlier process."""
        self._likelihoods[name] = tensors["likelihoods"].numpy()
        if link is not None:
            outputs = Outputs(tensors["labelled"], tensors["targets"], tensors["samples"], link)
            self._write(name, outputs, tensors.get("unlabeled"))

    def keep(self, names: Sequence[str]) -> None:
        """Forget the predictions of all other models."""
        for name in self._likelihoods.keys() - set(names):
            del self._likelihoods[name]
            for path in self._files.pop(name, []):
                path.unlink()

    def weights(self) -> dict[str, float]:
        """Return the merge weight of each model: how much its predictions are worth on the labels, with the mean 1.

        These are the weights of a mixture of the models' predictions, see `mixture_weights`. Two numbers that a regression
        predicts are compared by their squared errors, in units of the smallest mean squared error.
        """
        names = list(self._likelihoods)
        table = np.stack([self._likelihoods[name] for name in names]).astype(np.float64)
        if self._truth is not None and self._truth.link == "identity":
            table /= 2 * max(float((-table).mean(1).min()), 1e-12)
        elif self._truth is not None and self._truth.link == "sigmoid":
            table *= self._truth.logits.shape[1]  # the loss is a mean over classes, the likelihood a sum
        return dict(zip(names, map(float, mixture_weights(table) * len(names)), strict=True))

    def members(self) -> list[Member]:
        """Return the logits of the models, read from their files."""
        found = []
        for name, paths in self._files.items():
            arrays = [np.load(path).astype(np.float64) for path in paths]
            found.append(Member(name, *arrays))
        return found


def fit_teacher(members: list[Member], truth: Outputs, seed: int) -> FittedPool:
    """Fit a pool of the members on the labels; see `fit_pool`."""
    targets: Any = truth.targets.double().numpy()
    return fit_pool([member.labelled for member in members], targets, truth.samples.numpy(), truth.link, seed)
