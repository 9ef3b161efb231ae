"""Placebo sources: each difference to the base is replaced by a random one, as a control of what sources teach."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..models.mixture import LayerMixture, mixture_of
from ..tensors.mapped import MappedTensors
from ..tensors.units import movable_tensors
from .load import LoadedSource

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "placebo"


@dataclass(frozen=True)
class Placebo:
    """Replaces sources by placebos, which are as far from the base as the sources but know nothing.

    Each parameter that a source changes becomes the base's plus a random difference of the same Frobenius norm: normal
    numbers or, where a LoRA adapter changes the parameter, a product of normal factors of the adapter's rank. Statistics
    of normalisation layers become the base's, because random ones would break the model. Tied weights are one parameter.

    A difference depends on the seed, the source's reference and the name of the parameter only. In a type shorter than
    float32, rounding changes its norm and rank as it changes those of the source.

    Args:
        seed: Seeds the random differences.
        base: The tensors of the base by runtime name.
    """

    seed: int
    base: Mapping[str, Tensor]

    def replace(self, loaded: LoadedSource, reference: str, target: PreTrainedModel, directory: Path) -> LoadedSource:
        """Return the placebo of a source.

        Memory: private memory holds a few copies of one tensor. A file in `directory` holds the parameters that the
        source changes, unless the source comes in shards; then each shard is replaced when it arrives.

        Args:
            loaded: The source.
            reference: The source's reference.
            target: The model that the source will be merged into.
            directory: Folder for the file.
        """
        tensors = {
            name: tensor for name, tensor in movable_tensors(target).items() if isinstance(tensor, nn.Parameter)
        }
        parameters = loaded.candidates & tensors.keys()
        if (mixture := mixture_of(target)) is not None:
            for name in sorted(parameters & mixture.layer_names.keys()):
                self._replace_block_(mixture.layers[mixture.layer_names[name]], loaded.tensors[name], name, reference)
            parameters -= mixture.layer_names.keys()

        def differing(name: str, value: Tensor) -> Tensor:
            if name in parameters:
                return self._differ(value, name, reference, loaded.ranks.get(name))
            return self.base[name] if name in loaded.candidates and name not in tensors else value

        def shards() -> Iterator[dict[str, Tensor]]:
            for shard in loaded.shards:
                values = {name: differing(name, value) for name, value in shard.items()}
                yield values
                values.clear()

        if any(tensor.is_meta for tensor in loaded.tensors.values()):
            return LoadedSource(loaded.tensors, loaded.candidates, loaded.notes, shards())
        buffer = MappedTensors(directory / NAME, {name: loaded.tensors[name] for name in sorted(parameters)})
        values = {}
        for name, value in loaded.tensors.items():
            found = differing(name, value)
            values[name] = buffer[name].copy_(found) if name in parameters else found
        return LoadedSource(values, loaded.candidates, loaded.notes)

    @torch.no_grad()
    def _replace_block_(self, layer: LayerMixture, vector: Tensor, name: str, reference: str) -> None:
        """Change the block of a source in one layer to a product of random factors, with the same norm and rank."""
        (slot,) = vector.nonzero().flatten().tolist()
        own = layer.slots == slot
        a, b = layer.a[own].double(), layer.b[:, own].double()
        norm = ((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt()
        generator = self._generator(name, reference)
        left = torch.randn(len(b), len(a), generator=generator).to(b)
        right = torch.randn(a.shape, generator=generator).to(a)
        size = ((right @ right.T) * (left.T @ left)).sum().sqrt()
        layer.a[own], layer.b[:, own] = right.to(layer.a), (left * (norm / size)).to(layer.b)

    def _generator(self, name: str, reference: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}\0{reference}\0{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7]))

    def _differ(self, value: Tensor, name: str, reference: str, rank: int | None) -> Tensor:
        """Return the base's parameter plus a random difference with the norm of that of `value`, and with its type."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        base = self.base[name].to(dtype)
        norm = torch.linalg.vector_norm(value.to(dtype) - base, dtype=torch.float64)
        generator = self._generator(name, reference)
        if rank is None:
            random = torch.randn(value.shape, generator=generator, dtype=dtype)
        else:
            rows, columns = value.flatten(1).shape
            left = torch.randn(rows, rank, generator=generator, dtype=dtype)
            right = torch.randn(rank, columns, generator=generator, dtype=dtype)
            random = (left @ right).view(value.shape)
        scale = norm / torch.linalg.vector_norm(random, dtype=torch.float64)
        return torch.add(base, random, alpha=float(scale)).to(value.dtype)
