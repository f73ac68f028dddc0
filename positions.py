"""Position encodings that are computed rather than learned: rotary embedding and ALiBi.

Shapes: B batch, T tokens, nh heads, hs head size.
"""

import math

import torch


def rope_angles(positions, hs, dtype):
    """Angles of rotary position embedding (Su et al. 2021, eq. 34): positions (T,) or (B, T) -> their cosines and
    sines, (T, hs) or (B, 1, T, hs). Dimensions i and i + hs / 2 form a pair, as in Llama."""
    frequencies = 10000.0 ** (torch.arange(0, hs, 2, device=positions.device, dtype=dtype) / -hs)
    angles = positions[..., None].to(dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    if angles.dim() == 3:
        angles = angles[:, None]  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate each pair of x (B, nh, T, hs) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def alibi_slopes(n_head, device, dtype):
    """ALiBi's slope of each head (Press et al. 2022, section 3) -> (nh, 1, 1): 2^(-8/n), 2^(-16/n), …; the slopes of
    heads beyond a power of two lie in between."""
    power = 2 ** math.floor(math.log2(n_head))
    head = torch.arange(n_head, device=device, dtype=dtype)
    exponents = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    return torch.exp2(-exponents)[:, None, None]
