"""Scaled dot-product attention, by what is fastest where it runs; see model.attention_mask for the masks.

Shapes: B batch, T queries, S keys, nh heads, nkv heads of keys and values, hs head size.
"""

import math

import torch
from torch.nn import functional as F

from common.dropout import dropout_mask, masks_pay


def attend(q, k, v, mask, dropout: float = 0.0) -> torch.Tensor:
    """softmax(q k^T / sqrt(hs) + mask) v (Vaswani et al. 2017, eq. 1) -> (B, nh, T, hs).

    q: (B, nh, T, hs). k, v: (B, nkv, S, hs), where nkv divides nh. dropout: share of the attention weights dropped.
    mask: None for causal attention; a tensor that broadcasts to (B, nh, T, S), bool (True where a query sees a key) or
    numbers to add to the logits; or a BlockMask from document_blocks.
    """
    groups = k.size(1) < q.size(1)
    if mask is not None and not torch.is_tensor(mask):
        return flex(q, k, v, mask, groups)
    if dropout and masks_pay(q):
        return attend_with_dropout(q, k, v, mask, dropout)
    causal = mask is None and q.size(2) > 1
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=groups)


def attend_with_dropout(q, k, v, mask, dropout: float) -> torch.Tensor:
    """attend() by plain products, as torch does with dropout on CPUs too, but with faster masks."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool).tril(k.size(2) - q.size(2))
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    weights = ((q * q.size(-1) ** -0.5) @ k.mT + mask).softmax(dim=-1)  # (B, nh, T, S)
    return (weights * dropout_mask(weights.shape, dropout)).to(v.dtype) @ v


# --- flex attention: skips blocks of keys that no query sees (Dong et al. 2024). It pays where it is compiled, on CUDA;
# --- elsewhere a mask says the same ---------------------------------------------------------------------------------


def flex_pays(starts) -> bool:
    """Is this being compiled for CUDA? starts: a tensor there, or None."""
    return starts is not None and starts.is_cuda and torch.compiler.is_compiling()


def document_blocks(starts: torch.Tensor):
    """A BlockMask for queries that see the keys of their own document up to themselves. starts: (B, T), the column
    where the document of each token starts."""
    from torch.nn.attention.flex_attention import create_block_mask

    def seen(b, head, query, key):
        return (key <= query) & (key >= starts[b, query])

    B, T = starts.shape
    return create_block_mask(seen, B, None, T, T, device=starts.device)


def flex(q, k, v, blocks, enable_gqa: bool = False):
    """scaled_dot_product_attention of q (B, nh, T, hs) and k, v (B, nkv, T, hs) with a BlockMask for its mask."""
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=blocks, enable_gqa=enable_gqa)
