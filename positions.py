"""Position encodings that are computed rather than learned: rotary embedding and ALiBi.

Shapes: B batch, T tokens, nh heads, hs head size.
"""

import math

import torch


def rope_frequencies(config, device=None, dtype=torch.float32):
    """Radians per position by which each pair of channels rotates (Su et al. 2021, eq. 15) -> (hs / 2,).

    config.rope_scaling: 'factor,low_freq_factor,high_freq_factor,block_size', as in Llama 3.1 (its release's model.py):
    of a model trained with block_size positions, pairs that rotate fewer than low_freq_factor times in a block are
    slowed down by factor, those that rotate more than high_freq_factor times stay, the others lie in between; '' for
    none. ValueError if the config's values make no sense.
    """
    base, scaling, hs = config.rope_base, config.rope_scaling, config.head_dim
    if hs % 2:
        raise ValueError(f'heads of {hs} channels: pos=rope needs an even head size, see n_embd, n_head')
    if not 1 <= base < math.inf:
        raise ValueError(f'rope_base={base!r}: must be at least 1')
    frequencies = 1.0 / base ** (torch.arange(0, hs, 2, device=device, dtype=dtype) / hs)
    if not scaling:
        return frequencies
    try:
        factor, low, high, block_size = map(float, scaling.split(','))
        if not (1 <= factor < math.inf and 0 < low < high < math.inf and 1 <= block_size < math.inf):
            raise ValueError
    except ValueError:
        names = 'factor,low_freq_factor,high_freq_factor,block_size'
        raise ValueError(f'rope_scaling={scaling!r}: must be {names}, such as 8,1,4,8192') from None
    rotations = block_size * frequencies / (2 * math.pi)
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * frequencies / factor + kept * frequencies


def rope_angles(config, positions, dtype):
    """Angles of rotary position embedding (Su et al. 2021, eq. 34): positions (T,) or (B, T) -> their cosines and
    sines, (T, hs) or (B, 1, T, hs), in float32 or better, the first half of the sines negative, as rotate() takes them.
    Dimensions i and i + hs / 2 form a pair, as in Llama."""
    dtype = torch.promote_types(dtype, torch.float32)  # angles need more digits than bfloat16 has
    angles = positions[..., None].to(dtype) * rope_frequencies(config, positions.device, dtype)
    if angles.dim() == 3:
        angles = angles[:, None]  # the same for all heads
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x, cos, sin):
    """Rotate each pair of x (B, nh, T, hs) by its angle."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).to(x.dtype)  # each channel's partner is half a head away


def alibi_slopes(n_head, device, dtype):
    """ALiBi's slope of each head (Press et al. 2022, section 3) -> (nh, 1, 1): 2^(-8/n), 2^(-16/n), …; the slopes of
    heads beyond a power of two lie in between."""
    power = 2 ** math.floor(math.log2(n_head))
    head = torch.arange(n_head, device=device, dtype=dtype)
    exponents = torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power
    return torch.exp2(-exponents)[:, None, None]
