"""The padding of texts: model, tokenizer and saved files name the same token, and padding changes no prediction."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..errors import DataError, IncompatibleSourceError
from .batches import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # relative to the largest logit
HALF_TOLERANCE = 5e-2


def tokenizer_of(processing_class: Any) -> PreTrainedTokenizerBase | None:
    """Return a tokenizer, or the tokenizer of a processor; `None` if there is none."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return tokenizer if isinstance(tokenizer, PreTrainedTokenizerBase) else None


def unify_padding_(model: PreTrainedModel, processing_class: Any) -> None:
    """Change the config of `model` and its tokenizer to the same padding token, so that both are saved with it.

    The token is that of the config if the tokenizer has it as a special token, because many models compute with it: a causal
    classifier looks for the last token that is no padding. Otherwise it is that of the tokenizer, and the end of a text if
    the tokenizer has none. A token without an embedding is never the one. Without any token nothing is changed.

    Raises:
        IncompatibleSourceError: The model counts its positions from the id of its padding token, or ignores that id in its
            loss, and the tokenizer has another one.
    """
    tokenizer, config = tokenizer_of(processing_class), _text_config(model)
    if tokenizer is None:
        return
    own, rows = getattr(config, "pad_token_id", None), _token_rows(model) or len(tokenizer)
    candidates = [own if own in _padding_ids(tokenizer) else None, tokenizer.pad_token_id, tokenizer.eos_token_id]
    chosen = next((number for number in candidates if number is not None and number < rows), None)
    if chosen is None:
        return
    if own not in (None, chosen) and (position_offset(model) or type(model).__name__.endswith("ForCTC")):
        raise IncompatibleSourceError(
            f"the padding token of its config has the id {own}, and that of its tokenizer, {tokenizer.pad_token!r}, has the "
            f"id {tokenizer.pad_token_id}. A {type(model).__name__} computes with this id, so both must name the same token: "
            "correct pad_token_id in config.json, or pad_token in tokenizer_config.json",
            subject=model.config.name_or_path or type(model).__name__,
        )
    if tokenizer.pad_token_id != chosen:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chosen)
    if own != chosen:
        logger.info("padding: the token %r with the id %d, instead of %s", tokenizer.pad_token, chosen, own)
    model.config.pad_token_id = config.pad_token_id = chosen
    generation = getattr(model, "generation_config", None)
    if generation is not None and generation.pad_token_id in (None, own):  # a model of sounds generates other tokens
        generation.pad_token_id = chosen


def _text_config(model: PreTrainedModel) -> Any:
    """Return the config of the tokens that a model takes; one that it generates may have tokens of its own."""
    return getattr(model.config, "text_config", None) or model.config


def _padding_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of special tokens that can be padding, because they stand neither at the start nor inside a text."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    inside = {tokenizer.bos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id}
    return {*tokenizer.all_special_ids, *special} - (inside - {tokenizer.eos_token_id, tokenizer.pad_token_id})


def _token_rows(model: PreTrainedModel) -> int | None:
    """Return the number of token embeddings of a text model; `None` for another model."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def position_offset(model: PreTrainedModel) -> int:
    """Return how many positions a model never uses: RoBERTa and its kin count from the id of the padding token plus 1."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def max_tokens(model: PreTrainedModel) -> int | None:
    """Return the largest number of tokens that a model takes; `None` for no limit."""
    positions = getattr(_text_config(model), "max_position_embeddings", None) or 0
    return positions - position_offset(model) if positions > 0 else None  # the config of an XLNet says -1


def check_padding(model: PreTrainedModel, batch: Batch) -> None:
    """Compare the prediction for the most padded text of a batch with that for the text alone.

    Only batches with `input_ids` are compared, and only logits. Without an `attention_mask`, texts count as padded if two of
    them end in two padding tokens or more: one could be a token of the text. The model must be in eval mode.

    Raises:
        DataError: The predictions differ, so that the merged model would depend on the texts that share a batch. Or the text
            has no tokens.
    """
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.ndim}
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        return
    if mask is None:
        pad = getattr(_text_config(model), "pad_token_id", None)
        padding = (ids == (-1 if pad is None else pad)).flip(1).cumprod(1).flip(1)
        mask = 1 - padding if int((padding.sum(1) > 1).sum()) > 1 else None
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        return
    if any(len(value) != len(ids) for value in tensors.values()):  # such as the patches of several pictures
        return
    lengths = mask.bool().sum(1)
    row, longest = int(lengths.argmin()), int(lengths.argmax())
    if not lengths[row]:
        raise DataError("a text has no tokens; remove empty texts, because pipelines refuse them too")
    kept = mask[row].nonzero().squeeze(1)
    if lengths[row] == ids.shape[1] or int(kept[-1] - kept[0]) + 1 != len(kept):  # a mask with holes is no padding
        return
    if not model.config.is_encoder_decoder:
        tensors.pop("labels", None)
    cut = {
        key for key in tensors if tensors[key].shape[:2] == ids.shape and not key.startswith(("labels", "decoder_"))
    }
    rest = {key: value for key, value in batch.items() if not isinstance(value, Tensor) or not value.ndim}
    together = model(**rest, **{key: value[[row, longest]] for key, value in tensors.items()})
    alone = model(
        **rest, **{key: value[[row]][:, kept] if key in cut else value[[row]] for key, value in tensors.items()}
    )
    for key in ("logits", "start_logits", "end_logits"):
        first, second = together.get(key), alone.get(key)
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            continue
        first, second = first[0].float(), second[0].float()
        if first.shape != second.shape:
            first = first[kept] if len(first) == ids.shape[1] else first[: len(second)]
        difference, scale = float((first - second).abs().max()), float(second.abs().max())
        if first.shape == second.shape and not difference <= TOLERANCE.get(model.dtype, HALF_TOLERANCE) * scale:
            raise DataError(
                f"padding changes what the {type(model).__name__} predicts: its logits for a text of {len(kept)} tokens "
                f"differ by {difference:.2g} (of {scale:.2g}) between the text alone and a batch that fills it up to "
                f"{ids.shape[1]}. Expected the same, as pipelines take texts alone: pad on the other side (padding_side of "
                "the tokenizer), give an attention_mask, or set batch_size to 1"
            )
