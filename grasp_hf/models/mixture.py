"""A frozen model with a mixture of LoRA adapters: the weights of a layer are its own plus a sum of low-rank blocks.

Every step of a merge is linear in the weights. With `W = B + sum_k c_k D_k`, where `D_k` is the low-rank difference of
adapter `k`, a mix, a mean, an undo and a point on a line change only the coefficients `c_k`. So the movable tensor of a
layer is its vector of coefficients: a source is a unit vector, the base is zero, and the derivative of the loss for a
coefficient is `<dL/dW, D_k>` by the chain rule.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from ..errors import ConfigError, first_few
from ..internals import is_transposed, lora_factors
from ..tensors.units import declare_movable_, head_tensors, movable_tensors

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

SLOTS = 256  # blocks that a mixture can hold
# Values of `init_lora_weights` that leave the weights of the base as they are.
PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
ATTRIBUTE = "grasp_mixture"  # of a model with a mixture
BLOCKS, PROTECTED = ("a", "b", "slots"), "protected slots"
# Fields of `peft.LoraConfig` that make an adapter more than a low-rank change of layers.
NOT_LOW_RANK = {
    "use_dora": "DoRA rescales whole weights by their norms",
    "lora_bias": "biases are no low-rank change",
    "bias": "biases are no low-rank change",
    "target_parameters": "single parameters, such as fused experts, are no layers",
    "trainable_token_indices": "single tokens are no low-rank change",
    "layer_replication": "the layers are those of the base",
}
ADVICE = "merge it with output='model'"
CHILD = "grasp_factors"  # name of the module that is added to each layer


class Factors(NamedTuple):
    """A low-rank difference `D = b @ a` of the weights of one layer, in float32.

    Attributes:
        a: Maps the layer's input to the rank, shape `(rank, inputs)`; for an embedding the inputs are its rows.
        b: Maps the rank to the layer's output, shape `(outputs, rank)`.
    """

    a: Tensor
    b: Tensor


class LayerMixture(nn.Module):
    """The blocks of one layer, with their coefficients.

    Args:
        inputs: Size of the layer's input.
        outputs: Size of the layer's output.
        rows: Whether the layer is an embedding, whose inputs are numbers of rows.
        device: Device of the layer.
    """

    def __init__(self, inputs: int, outputs: int, *, rows: bool, device: torch.device) -> None:
        super().__init__()
        self.rows = rows
        self.coefficients = nn.Parameter(torch.zeros(SLOTS, device=device), requires_grad=False)
        self.register_buffer("a", torch.empty(0, inputs, device=device), persistent=False)
        self.register_buffer("b", torch.empty(outputs, 0, device=device), persistent=False)
        self.register_buffer("slots", torch.empty(0, dtype=torch.long, device=device), persistent=False)
        self.a: Tensor
        self.b: Tensor
        self.slots: Tensor

    @property
    def rank(self) -> int:
        """The sum of the ranks of all blocks."""
        return len(self.slots)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what the blocks add to the layer's output."""
        hidden = embedding(inputs, self.a.T) if self.rows else linear(inputs.to(self.a.dtype), self.a)
        return linear(hidden * self.coefficients[self.slots], self.b)

    def add(self, slot: int, factors: Factors) -> None:
        """Add a block; its coefficient stays as it is."""
        a, b = (factor.to(self.a.device, self.a.dtype) for factor in factors)
        self.a, self.b = torch.cat([self.a, a]), torch.cat([self.b, b], dim=1)
        self.slots = torch.cat([self.slots, self.slots.new_full((len(a),), slot)])

    def keep(self, slots: Collection[int]) -> None:
        """Remove the blocks that are not in `slots`."""
        kept = torch.tensor([slot in slots for slot in self.slots.tolist()], dtype=torch.bool, device=self.a.device)
        if not kept.all():
            self.a, self.b, self.slots = self.a[kept], self.b[:, kept], self.slots[kept]

    def factors(self) -> Factors:
        """Return the sum of all blocks as one difference, with the coefficients in `b`; its rank is the sum of ranks."""
        scales = self.coefficients.detach()[self.slots]
        used = scales != 0
        return Factors(self.a[used], self.b[:, used] * scales[used])


class Mixture:
    """A frozen model with a mixture of adapters. While it is attached, `movable_tensors(model)` are its tensors.

    Args:
        model: The model; its forward pass adds the mixture from now on, and its own weights stay as they are.
        fresh: Names of tensors that the model's files lack. Their modules are trained and saved whole, like the head.

    Attributes:
        model: The model.
        whole: Names of the modules that move whole: the head of a classifier, and modules with fresh tensors.
        base: The tensors of these modules before the merge, by name, on the CPU.
        fresh: Names of the tensors that the model's files lack.
        layers: The mixture of each layer that adapters can change, by the name of the layer.
        protected: The slots of blocks that `add` keeps even if they have no coefficient.
    """

    def __init__(self, model: PreTrainedModel, fresh: Collection[str] = ()) -> None:
        self.model = model
        tensors = movable_tensors(model)
        self.whole = whole_modules(model, fresh)
        self.fresh = {*fresh}
        own = {name: tensor for name, tensor in tensors.items() if self.is_whole(name)}
        self.base = {name: tensor.detach().cpu().clone() for name, tensor in own.items()}
        self.layers: dict[str, LayerMixture] = {}
        model.requires_grad_(False)
        for name, module in [*model.named_modules()]:
            if (shape := layer_shape(module)) is None or self.is_whole(f"{name}.weight"):
                continue
            device = next(module.parameters()).device
            layer = LayerMixture(*shape, rows=isinstance(module, nn.Embedding), device=device)
            module.add_module(CHILD, layer)
            module.register_forward_hook(_add_mixture)
            self.layers[name] = layer
        coefficients = {f"{name}.weight": layer.coefficients for name, layer in self.layers.items()}
        declare_movable_(model, {**coefficients, **own})
        vars(model)[ATTRIBUTE] = self
        self.protected = set[int]()

    @property
    def layer_names(self) -> dict[str, str]:
        """The name of the layer behind each movable tensor that is a vector of coefficients."""
        return {f"{name}.weight": name for name in self.layers}

    def is_whole(self, name: str) -> bool:
        """Whether the tensor `name` of the model belongs to a module that moves whole."""
        return any(name.startswith(f"{module}.") for module in self.whole)

    @property
    def used(self) -> set[int]:
        """The slots of the blocks with a coefficient other than 0 in some layer."""
        return {slot for layer in self.layers.values() for slot in layer.slots[self._scales(layer) != 0].tolist()}

    @staticmethod
    def _scales(layer: LayerMixture) -> Tensor:
        return layer.coefficients.detach()[layer.slots]

    def protect(self) -> None:
        """Remove unused blocks, and let `add` keep the others, which the files of a run refer to."""
        self.protected = self.used
        self.remove_unused()

    def remove_unused(self) -> None:
        """Remove the blocks that have no coefficient now, and had none when the run began."""
        kept = self.used | self.protected
        for layer in self.layers.values():
            layer.keep(kept)

    def add(self, factors: Mapping[str, Factors], *, remove_unused: bool = False) -> int:
        """Add a block with the coefficient 0, by name of the layer, and return its slot.

        Args:
            factors: The difference of each layer that the block changes.
            remove_unused: Whether to remove first the blocks without a coefficient, such as those of rejected sources.
        """
        if remove_unused:
            self.remove_unused()
        taken = {slot for layer in self.layers.values() for slot in layer.slots.tolist()} | self.protected
        free = [slot for slot in range(SLOTS) if slot not in taken]
        if not free:
            raise ConfigError(
                f"an adapter merge holds at most {SLOTS} adapters; set rank to compress them, and append"
            )
        for name, own in factors.items():
            self.layers[name].add(free[0], own)
        return free[0]

    def vectors(self, slot: int) -> dict[str, Tensor]:
        """Return the coefficients of the model that is the base plus one block, for every layer."""
        found = {}
        for name, layer in self.layers.items():
            vector = torch.zeros(SLOTS)
            vector[slot] = float(slot in layer.slots)
            found[f"{name}.weight"] = vector
        return found

    def factors(self) -> dict[str, Factors]:
        """Return the present difference to the base of each layer that differs from it."""
        found = {name: layer.factors() for name, layer in self.layers.items()}
        return {name: factors for name, factors in found.items() if len(factors.a)}

    @property
    def rank(self) -> int:
        """The largest rank of a layer; 0 if the model is the base."""
        return max((len(factors.a) for factors in self.factors().values()), default=0)

    @torch.no_grad()
    def compress_(self, rank: int) -> tuple[float, str, float]:
        """Replace the mixture by one block of at most `rank` in each layer.

        Returns:
            The Frobenius norm of the change over that of the difference to the base, over all layers; the layer with the
            largest relative error, and this error.
        """
        found, errors, norms = {}, {}, {}
        for name, factors in self.factors().items():
            found[name], errors[name], norms[name] = compress(factors, rank)
        for layer in self.layers.values():
            layer.keep(())
            layer.coefficients.zero_()
        self.protected = set()
        slot = self.add(found)
        for name in found:
            self.layers[name].coefficients[slot] = 1.0
        total, lost = (math.hypot(*values.values()) for values in (norms, errors))
        relative = {name: errors[name] / norms[name] if norms[name] else 0.0 for name in found}
        worst = max(relative, key=lambda name: relative[name], default="")
        return lost / total if total else 0.0, worst, relative.get(worst, 0.0)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return all tensors that a merge may change, with the blocks of a mixture; `restore_state_` takes them."""
    tensors, mixture = movable_tensors(model), mixture_of(model)
    if mixture is None:
        return tensors
    blocks = {f"{name} {part}": getattr(layer, part) for name, layer in mixture.layers.items() for part in BLOCKS}
    return {**tensors, **blocks, PROTECTED: torch.tensor(sorted(mixture.protected), dtype=torch.long)}


@torch.no_grad()
def restore_state_(model: nn.Module, values: Iterable[tuple[str, Tensor]]) -> None:
    """Change `model` to the tensors that `state_tensors` returned in an earlier process."""
    tensors, mixture = movable_tensors(model), mixture_of(model)
    for name, value in values:
        layer, _, part = name.rpartition(" ")
        if name in tensors:
            tensors[name].copy_(value)
        elif mixture is not None and name == PROTECTED:
            mixture.protected = {*value.tolist()}
        elif mixture is not None:
            device = mixture.layers[layer].coefficients.device
            setattr(mixture.layers[layer], part, value.to(device))


def mixture_of(model: nn.Module) -> Mixture | None:
    """Return the mixture that is attached to `model`; `None` if there is none."""
    found: Mixture | None = vars(model).get(ATTRIBUTE)
    return found


def compress(factors: Factors, rank: int) -> tuple[Factors, float, float]:
    """Return the best approximation of a difference by `rank`, the Frobenius norm of its error, and that of the difference.

    The singular value decomposition is that of the whole difference, but is computed in the span of its factors (Core Space,
    arXiv:2509.17786): with `b = Q R` and `a^T = P S` the difference is `Q (R S^T) P^T`, and `R S^T` is small.
    """
    a, b = factors.a.double(), factors.b.double()
    left, inner_left = torch.linalg.qr(b)
    right, inner_right = torch.linalg.qr(a.T)
    u, values, v = torch.linalg.svd(inner_left @ inner_right.T, full_matrices=False)
    kept = values[:rank].sqrt()
    small = Factors(((right @ v[:rank].T) * kept).T.float(), ((left @ u[:, :rank]) * kept).float())
    return small, float(values[rank:].norm()), float(values.norm())


def count_weights(model: nn.Module) -> dict[str, int]:
    """Return the number of weights behind each movable tensor: those of the whole layer for a vector of coefficients."""
    mixture = mixture_of(model)
    layers = mixture.layers if mixture is not None else {}
    own = {f"{name}.weight": layer.a.shape[1] * layer.b.shape[0] for name, layer in layers.items()}
    return {name: own.get(name, tensor.numel()) for name, tensor in movable_tensors(model).items()}


def type_of_weights(model: PreTrainedModel) -> str:
    """Return the type of the weights of `model` for the record, such as `bfloat16`, `4 bits` or `8 bits`."""
    found: Any = getattr(model.config, "quantization_config", None)
    if found is None:
        return str(model.dtype).removeprefix("torch.")
    values = found if isinstance(found, dict) else found.to_dict()
    bits = next((bits for bits in (4, 8) if values.get(f"load_in_{bits}bit")), None)
    return f"{bits} bits" if bits else str(values.get("quant_method", "a quantized type"))


def lora_layers(adapted: PeftModel) -> Iterator[tuple[str, Any]]:
    """Yield the layers of a LoRA adapter in memory by their names in the base model."""
    modules: Any = adapted.get_base_model().named_modules()
    yield from ((name, module) for name, module in modules if hasattr(module, "lora_variant"))


def lora_blocks(adapted: PeftModel) -> dict[str, Factors]:
    """Return a copy of the difference that each layer of a plain LoRA adapter in memory makes."""
    found = {}
    for name, layer in lora_layers(adapted):
        a, b, scaling = lora_factors(layer)
        found[name] = Factors(a.detach().float().clone(), b.detach().float() * scaling)
    return found


def block_problems(config: PeftConfig, whole: Collection[str]) -> list[str]:
    """List the problems in an adapter's configuration that keep it from being a block of a mixture.

    Args:
        config: The configuration.
        whole: Names of the modules of the target that move whole, such as its head.
    """
    from peft import PeftType  # imported late, because peft takes seconds and full models do not need it

    kind = PeftType(config.peft_type)
    if kind != PeftType.LORA:
        return [f"it is an adapter of type {kind.value}, expected LoRA with output='adapter'; {ADVICE}"]
    problems = []
    values: dict[str, Any] = vars(config)
    if values["init_lora_weights"] not in PLAIN_STARTS:
        problems.append(
            f"its init_lora_weights '{values['init_lora_weights']}' also changes the weights of the base, which stay as they "
            f"are with output='adapter'; {ADVICE}, or convert it (path_initial_model_for_weight_conversion of PEFT)"
        )
    for field, meaning in NOT_LOW_RANK.items():
        if values.get(field) not in (None, False, [], {}, "none"):
            problems.append(
                f"{field}: got {values[field]!r}, expected none with output='adapter', because {meaning}; {ADVICE}"
            )
    ends = tuple(whole)
    saved = [name for name in values["modules_to_save"] or () if not any(_is_end(name, end) for end in ends)]
    if saved:
        problems.append(
            f"it replaces whole modules ({first_few(saved)}), expected low-rank changes and the head of a classifier with "
            f"output='adapter'; {ADVICE}"
        )
    return problems


def _is_end(name: str, module: str) -> bool:
    """Whether `name` names `module`, a module around it, or one inside it by the first part of its name."""
    return module == name or module.endswith(f".{name}") or name.startswith(f"{module}.")


def layer_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the sizes of the input and the output of a layer that a low-rank block can change; `None` for others.

    The layers are linear ones, also quantized ones, the transposed ones of GPT-2, and embeddings.
    """
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if is_transposed(module):
        inputs, outputs = dict(module.named_parameters())["weight"].shape
        return inputs, outputs
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _add_mixture(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
    layer: Any = module.get_submodule(CHILD)
    return (output + layer(arguments[0])).to(output.dtype) if layer.rank else output


def whole_modules(model: PreTrainedModel, fresh: Collection[str]) -> list[str]:
    """Return the names of the modules that move whole: the head of a classifier, and those with `fresh` tensors."""
    head = set() if model.can_generate() else head_tensors(model)
    parts = {name.partition(".")[0] if name in head else name.rpartition(".")[0] for name in {*head, *fresh}}
    return sorted(name for name in parts if not any(name.startswith(f"{other}.") for other in parts))
