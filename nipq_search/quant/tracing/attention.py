"""Attention written as two explicit products, so that their operands can be quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """Return the products of queries (..., L, E) with keys (..., S, E), shape (..., L, S)."""
    if has_torch_function((query, key)):
        return handle_torch_function(attention_scores, (query, key), query, key)
    return query @ key.transpose(-2, -1)


def attention_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Return the products of probabilities (..., L, S) with values (..., S, E): (..., L, E)."""
    if has_torch_function((probabilities, value)):
        return handle_torch_function(
            attention_values, (probabilities, value), probabilities, value
        )
    return probabilities @ value


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute `torch.nn.functional.scaled_dot_product_attention` as two explicit products.

    Args:
        query: queries, shape (..., L, E).
        key: keys, shape (..., S, E).
        value: values, shape (..., S, Ev).
        attn_mask: boolean mask (True for the positions to attend to) or additive mask,
            broadcastable to (..., L, S).
        dropout_p: dropout probability of the attention probabilities.
        is_causal: whether each query attends only to keys at its own or an earlier position.
        scale: factor applied to the scores; default: 1 / sqrt(E).
        enable_gqa: whether keys and values may have fewer heads (dimension -3) than queries.

    Returns:
        The attention output, shape (..., L, Ev).
    """
    return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)[0]


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: float | None,
    grouped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return the output and the attention probabilities."""
    if grouped and key.shape[-3] != query.shape[-3]:
        times = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(times, dim=-3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = attention_scores(query, key) * scale
    if causal:
        shape = (query.shape[-2], key.shape[-2])
        allowed = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    blocked = None
    if mask is not None:
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -math.inf)
        else:
            scores = scores + mask.to(scores.dtype)
        # A fully masked query yields zeros, where a softmax would yield NaN.
        blocked = (scores == -math.inf).all(dim=-1, keepdim=True)
        scores = scores.masked_fill(blocked, 0.0)
    probabilities = scores.softmax(dim=-1)
    if blocked is not None:
        probabilities = probabilities.masked_fill(blocked, 0.0)
    probabilities = probabilities.to(value.dtype)
    dropped = nnf.dropout(probabilities, dropout) if dropout > 0.0 else probabilities
    return attention_values(dropped, value), probabilities


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `torch.nn.functional.multi_head_attention_forward` with two explicit products.

    The parameters are those of the torch function. L is the number of queries, S the number of
    keys, N the batch size and E the embedding dimension. Inputs without a batch dimension are
    supported.

    Args:
        query: queries, shape (L, N, E).
        key: keys, shape (S, N, E).
        value: values, shape (S, N, E).
        embed_dim_to_check: ignored; torch compares it with E.
        num_heads: number of heads.
        in_proj_weight: stacked weights of the projections of queries, keys and values, shape
            (3 * E, E).
        in_proj_bias: stacked biases of these projections, shape (3 * E,).
        bias_k: key appended to the sequence, shape (1, 1, E).
        bias_v: value appended to the sequence, shape (1, 1, E).
        add_zero_attn: whether to append a key and a value of zeros.
        dropout_p: dropout probability of the attention probabilities in training.
        out_proj_weight: weight of the output projection, shape (E, E).
        out_proj_bias: bias of the output projection, shape (E,).
        training: whether to apply dropout.
        key_padding_mask: boolean mask (True for the keys to ignore) or additive mask, shape
            (N, S).
        need_weights: whether to return the attention probabilities.
        attn_mask: boolean mask (True for the positions to ignore) or additive mask, shape (L, S)
            or (N * num_heads, L, S).
        use_separate_proj_weight: whether to use the following three weights instead of
            `in_proj_weight`.
        q_proj_weight: weight of the projection of the queries, shape (E, E).
        k_proj_weight: weight of the projection of the keys, shape (E, key dimension).
        v_proj_weight: weight of the projection of the values, shape (E, value dimension).
        static_k: keys that replace the projected ones, shape (N * num_heads, S, E / num_heads).
        static_v: values that replace the projected ones, same shape.
        average_attn_weights: whether to average the returned probabilities over heads.
        is_causal: whether each query attends only to keys at its own or an earlier position;
            ignored if there is a mask.

    Returns:
        The output, shape (L, N, E), and the attention probabilities: shape (N, L, S) if averaged,
        otherwise (N, num_heads, L, S), or None unless `need_weights` is true.
    """
    batched = query.dim() == 3
    # Unsqueezing the same tensor twice would hide that both results have the same values.
    same_key, same_value = key is query, value is key
    if not batched:
        query = query.unsqueeze(1)
        key = query if same_key else key.unsqueeze(1)
        value = key if same_value else value.unsqueeze(1)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
    length, batch, width = query.shape
    if use_separate_proj_weight:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight)
        biases: Any = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            nnf.linear(x, w, b)
            for x, w, b in zip((query, key, value), weights, biases, strict=True)
        )
    elif same_key and same_value:
        assert in_proj_weight is not None
        q, k, v = nnf.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        assert in_proj_weight is not None
        biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = (
            nnf.linear(x, w, b)
            for x, w, b in zip((query, key, value), in_proj_weight.chunk(3), biases, strict=True)
        )
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, bias_v.repeat(1, batch, 1)])

    def heads(x: Tensor) -> Tensor:
        """Split a projected tensor into heads, shape (N, num_heads, length, E / num_heads)."""
        return x.reshape(len(x), batch, num_heads, -1).permute(1, 2, 0, 3)

    q = heads(q)
    k = heads(k) if static_k is None else static_k.reshape(batch, num_heads, *static_k.shape[1:])
    v = heads(v) if static_v is None else static_v.reshape(batch, num_heads, *static_v.shape[1:])
    if add_zero_attn:
        k, v = (torch.cat([t, torch.zeros_like(t[:, :, :1])], dim=2) for t in (k, v))
    mask = _joint_mask(attn_mask, key_padding_mask, q, k)
    output, probabilities = _attend(
        q, k, v, mask, dropout_p if training else 0.0, is_causal and mask is None, None
    )
    output = output.permute(2, 0, 1, 3).reshape(length, batch, -1)
    output = nnf.linear(output, out_proj_weight, out_proj_bias)
    returned = None
    if need_weights:
        returned = probabilities.mean(dim=1) if average_attn_weights else probabilities
    if batched:
        return output, returned
    return output.squeeze(1), None if returned is None else returned.squeeze(0)


def _joint_mask(
    attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Return both masks as one additive mask that broadcasts to (batch, heads, L, S)."""

    def additive(mask: Tensor) -> Tensor:
        """Return a mask in the dtype of the queries, with -inf where a boolean mask is True."""
        if mask.dtype != torch.bool:
            return mask.to(query.dtype)
        return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf)

    batch, heads, _, _ = query.shape
    total: Tensor | None = None
    if attn_mask is not None:
        total = additive(attn_mask)
        if total.dim() == 3:
            total = total.reshape(batch, heads, *total.shape[-2:])
    if padding is not None:
        rest = additive(padding)[:, None, None, :]
        total = rest if total is None else total + rest
    if total is not None and total.shape[-1] < key.shape[-2]:
        # Appended keys (bias_k, add_zero_attn) are never masked.
        total = nnf.pad(total, (0, key.shape[-2] - total.shape[-1]))
    return total
