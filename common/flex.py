"""Attention within documents by flex attention, which skips blocks of keys that no query sees (Dong et al. 2024, "Flex
Attention"). It pays where it is compiled, on CUDA; elsewhere a mask says the same."""

import torch


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
