"""The operations that the model's time goes into, computed in the way that suits the device."""

import ctypes
import math
import platform
from contextlib import contextmanager

import torch
from torch.nn import functional as F

short_context = 0  # attention over so many tokens or fewer is computed by plain products, see use_onednn_products


def use_onednn_products(device):
    """Let float32 products on x86 CPUs with AVX-512 run by oneDNN in place of MKL, which leaves half of an AMD processor's speed unused.

    Returns whether that takes effect here.

    For training: call it once, before anything is compiled. torch hands float32 products to oneDNN only when it may round their
    factors to bfloat16, so that is allowed where oneDNN makes no use of it: where the processor has no matrix unit (AMX), and
    the trial product below is exact. torch's fused attention then calls oneDNN for tiny products, which costs it more than it
    saves; over short contexts, plain batched products take its place.
    """
    global short_context
    settings = getattr(torch.backends.mkldnn, 'matmul', None)  # torch from 2.9 on
    if device.type != 'cpu' or settings is None or platform.machine() not in ('x86_64', 'AMD64'):
        return False
    if (
        not torch.backends.mkldnn.is_available()
        or not torch.cpu._is_avx512_supported()
        or torch.cpu._is_amx_tile_supported()
    ):
        return False
    settings.fp32_precision = 'bf16'
    x = 1 + torch.arange(64 * 64).view(64, 64) / 2**20  # needs more mantissa than bfloat16 or TF32 have
    if torch.equal(x @ torch.eye(64), x):
        short_context = 128
        return True
    settings.fp32_precision = 'ieee'
    return False


def keep_memory(device):
    """Let a CPU's process keep the memory it frees for the next step: to give it back to the system and to take it again, page by
    page, costs a fifth of a small model's step. For glibc, elsewhere nothing happens.

    To be called while no other thread allocates memory, as mallopt(3) is not safe beside one; for drawing, after the weights have
    been laid out, as what they were made from is better given back.
    """
    if device.type == 'cpu' and platform.libc_ver()[0] == 'glibc':
        trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h, in bytes
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(mmap_threshold, 2**30) or mallopt(mmap_threshold, 2**25):  # older versions take no more than 32 MiB
            mallopt(trim_threshold, 2**31 - 1)


@contextmanager
def torch_products():
    """Compute for a while as if use_onednn_products had not been called: what a step is measured against."""
    global short_context
    settings = getattr(torch.backends.mkldnn, 'matmul', None)
    if settings is None:
        yield
        return
    before = settings.fp32_precision, short_context
    settings.fp32_precision, short_context = 'ieee', 0
    try:
        yield
    finally:
        settings.fp32_precision, short_context = before


def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v, for q (B, nh, T, hs) and k, v (B, nkv, S, hs), where nkv divides nh -> (B, nh, T, hs).

    mask: (…, T, S), True where a position is seen, or a number to add; every position must see something. None: each sees itself and
    what came before, the T last of S. dropout: share of the probabilities that is dropped.
    """
    T, S = q.size(-2), k.size(-2)
    grouped = q.size(1) != k.size(1)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if T == 1 or T > short_context or q.device.type != 'cpu':
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, is_causal=mask is None and T > 1, enable_gqa=grouped
        )
    if grouped:
        k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))
    scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-1, -2)  # (B, nh, T, S)
    if mask is None:
        mask = torch.full((T, T), -math.inf, dtype=scores.dtype, device=q.device).triu(1)
    elif mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=scores.dtype).masked_fill(~mask, -math.inf)
    scores = scores + mask.to(
        scores.dtype
    )  # cheaper than masked_fill, which copies first, and has to mask the gradient too
    return F.dropout(scores.softmax(dim=-1), dropout, training=dropout > 0).to(v.dtype) @ v


def sum_in_pieces(function, x, targets, rows, parameters):
    """Sum of function(piece of x, piece of targets), a scalar each, over pieces of `rows` rows, of which one is in memory at a time.

    x: (N, C), targets: (N,). parameters: all that the function computes with and that want a gradient; others get none. The gradients of
    a piece are computed right after it, in the forward pass (as in Liger Kernel, Hsu et al. 2024, section 3.2): to keep what they are
    computed from is what costs the memory, to compute it again (torch.utils.checkpoint) costs the function a third more time.
    """
    pieces = zip(x.split(rows), targets.split(rows))
    if not torch.is_grad_enabled():
        return sum(function(*piece) for piece in pieces)
    return SumInPieces.apply(function, targets, rows, x, *parameters)


class SumInPieces(torch.autograd.Function):
    """sum_in_pieces, with its gradients."""

    @staticmethod
    def forward(ctx, function, targets, rows, x, *parameters):
        total, gradients = 0, [None] * len(parameters)
        x_gradient = torch.empty_like(x)
        for x_piece, x_gradient_piece, target in zip(x.split(rows), x_gradient.split(rows), targets.split(rows)):
            x_piece = x_piece.detach().requires_grad_()
            with torch.enable_grad():
                loss = function(x_piece, target)
                first, *rest = torch.autograd.grad(loss, (x_piece, *parameters), allow_unused=True)
            total += loss.detach()
            x_gradient_piece.copy_(first)
            for i, new in enumerate(rest):
                if gradients[i] is None:
                    gradients[i] = new
                elif new is not None:
                    gradients[i] += new
        ctx.save_for_backward(x_gradient, *gradients)
        return total

    @staticmethod
    def backward(ctx, gradient):
        return None, None, None, *(None if known is None else gradient * known for known in ctx.saved_tensors)
