"""Attention as the two products that it is, so that their operands can be quantized."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def attention_scores(query: Tensor, key: Tensor) -> Tensor:
    """Products of queries (..., L, E) with keys (..., S, E): shape (..., L, S)."""
    if has_torch_function((query, key)):
        return handle_torch_function(attention_scores, (query, key), query, key)
    return query @ key.transpose(-2, -1)


def attention_values(probabilities: Tensor, value: Tensor) -> Tensor:
    """Products of probabilities (..., L, S) with values (..., S, E): shape (..., L, E)."""
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
    """What `torch.nn.functional.scaled_dot_product_attention` computes, same arguments."""
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
    """Output and probabilities."""
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
        # A query that may look at nothing gets zeros; a softmax over it would be NaN.
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
    """What `torch.nn.functional.multi_head_attention_forward` computes, same arguments."""
    batched = query.dim() == 3
    # Stacked anew, equal tensors would no longer be one.
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
    seen = None
    if need_weights:
        seen = probabilities.mean(dim=1) if average_attn_weights else probabilities
    if batched:
        return output, seen
    return output.squeeze(1), None if seen is None else seen.squeeze(0)


def _joint_mask(
    attn_mask: Tensor | None, padding: Tensor | None, query: Tensor, key: Tensor
) -> Tensor | None:
    """Both masks as one additive mask that broadcasts to (batch, heads, L, S)."""

    def additive(mask: Tensor) -> Tensor:
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
        # Keys that were appended (bias_k, add_zero_attn) may always be looked at.
        total = nnf.pad(total, (0, key.shape[-2] - total.shape[-1]))
    return total
