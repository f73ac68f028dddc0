"""Weights laid out for drawing text: each linear layer's matrix in the form that the device multiplies a few rows by fastest.

Drawing a token reads every weight once and multiplies it by a handful of numbers, so its time is the time to read the
weights. On a CPU, torch's own product of such thin matrices reads them at a fraction of the memory's speed; oneDNN's and
FBGEMM's, over matrices that are rearranged once, come much closer. Both come with torch. On Intel's processors MKL, torch's own
for float32, comes closest for a single row, over matrices that are transposed. On devices other than a CPU the weights are
converted to the precision that their products run in, which halves what is read.

    pack(model, device, dtype)                   float32 or bfloat16, the same products as in training up to rounding
    pack(model, device, dtype, alone=True)       the same, for one text at a time: another layout for float32 on Intel's processors
    pack(model, device, dtype, 'int8')           8-bit weights on a CPU: a quarter of the reading, and a little loss
"""
import math
import platform
import time
import warnings
from contextlib import suppress

import torch
import torch.nn as nn
from torch.nn import functional as F

from configurator import UserError

SMALLEST = 2**17  # weights; smaller matrices stay in the cache, and torch's own product has less overhead than oneDNN's
AT_HOME = 8  # times as many where MKL is at home
COPIES = 5  # that a single row may be multiplied as: on some processors oneDNN reads the weights faster then than for one row


def pack(model, device, dtype, quantize='', alone=False):
    """Prepare a model on `device`, in place, for reading only: it is in eval mode then, and cannot be trained, saved or moved any
    more. Linear layers get the better layout; on a CPU layers are called directly.

    dtype: that products run in. quantize: 'int8', or '' for none. alone: texts will be drawn one at a time, so that the product of a
    single row counts. The embedding table stays as it is. Where a device has no better layout than torch's own, the matrices stay
    as they are. Raises UserError if int8 is not to be had.
    """
    if quantize == 'int8' and (device.type != 'cpu' or 'fbgemm' not in torch.backends.quantized.supported_engines):
        raise UserError(f'--quantize=int8: runs on x86 processors only, not on this {device.type} device; leave it out')
    if quantize not in ('', 'int8'):
        raise UserError(f'--quantize={quantize}: unknown; use int8, or leave it out')
    if quantize and dtype != torch.float32:
        raise UserError('--quantize=int8: goes with --dtype=float32, which everything but the weights then is')
    model.eval()
    mkldnn = torch.ops.mkldnn
    onednn = (device.type == 'cpu' and torch.backends.mkldnn.is_available()
              and (dtype == torch.float32 or dtype == torch.bfloat16 and mkldnn._is_mkldnn_bf16_supported()))
    smallest = SMALLEST
    if one_differs(device, dtype, quantize):
        smallest = math.inf if alone else AT_HOME * SMALLEST
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, nn.Dropout):
                setattr(module, name, nn.Identity())  # which takes less time to do nothing
            elif not isinstance(layer, nn.Linear):
                continue
            elif quantize:
                setattr(module, name, Int8Linear(layer))
            elif onednn and layer.weight.numel() >= smallest:
                setattr(module, name, PackedLinear(layer, dtype))
            elif device.type == 'cpu' or layer.weight.dtype != dtype:
                weight = layer.weight.detach().to(dtype)
                if device.type == 'cpu' and weight.numel() < smallest:
                    weight = weight.t().contiguous().t()  # by which MKL multiplies a few rows up to a quarter faster
                layer.weight = nn.Parameter(weight, requires_grad=False)  # a head tied to the embedding becomes a matrix of its own
    choose_copies([module for module in model.modules() if isinstance(module, PackedLinear)])
    if device.type == 'cpu':
        model.transformer.h = nn.ModuleList(map(DirectBlock, model.transformer.h))
        for name in {'wte', 'wpe', 'drop', 'ln_f'} & set(model.transformer):
            model.transformer[name] = Direct(model.transformer[name])
        if isinstance(model.lm_head, nn.Linear):
            head = model.lm_head.weight.detach().t()
            model.lm_head = Direct(model.lm_head, lambda x: x @ head)  # x: (..., C)


def one_differs(device, dtype, quantize=''):
    """Does one text at a time want another layout than several, for these arguments of pack()?"""
    return device.type == 'cpu' and dtype == torch.float32 and not quantize and mkl_is_at_home()


def mkl_is_at_home():
    """Does torch multiply by MKL here, on a processor by Intel, for which MKL is made?

    The one that was measured multiplies a single row by MKL as fast as it reads the transposed matrix, by oneDNN a fifth slower;
    several rows by MKL faster only where the matrix is small (BENCHMARKS.md). The difference shows within a whole step, and hardly in
    a trial of the products alone; and as the two round differently, chance should not decide between them. So the maker does.
    """
    if not torch.backends.mkl.is_available():
        return False
    with suppress(OSError), open('/proc/cpuinfo', errors='replace') as file:
        return 'GenuineIntel' in file.read()
    return 'GenuineIntel' in platform.processor()  # Windows


class Direct(nn.Module):
    """A layer that, called, is nothing but its function: in a small model that takes microseconds, of which nn.Module's own __call__,
    which looks for hooks first, is a good part."""

    def __init__(self, layer, function=None):
        super().__init__()
        self.weight, self.function = getattr(layer, 'weight', None), function or function_of(layer)

    def __call__(self, x):
        return self.function(x)


class DirectBlock(nn.Module):
    """model.Block, for reading only, with the functions of its layers at hand, as in Direct. Texts and positions are one dimension
    in it, and what the layers add to the residual stream is added in place."""

    def __init__(self, block):
        super().__init__()
        if block.mlp.activation is F.gelu:
            block.mlp.activation = gelu
        self.norm_1, self.norm_2 = function_of(block.ln_1), function_of(block.ln_2)
        self.qkv, self.attend, self.add_attention = function_of(block.attn.c_attn), block.attn.attend, adding(block.attn.c_proj)
        self.heads = block.attn.heads
        self.fc, self.activate, self.add_mlp = function_of(block.mlp.c_fc), block.mlp.activate, adding(block.mlp.c_proj)

    def __call__(self, x, mask=None, angles=None, cache=None, layer=0, last=False):
        B, T, C = x.shape
        rows = x.view(-1, C)
        heads = self.qkv(self.norm_1(rows))
        heads = heads.view(B, self.heads, 1, -1) if T == 1 else heads.view(B, T, self.heads, -1).transpose(1, 2)
        y = self.attend(heads, mask, angles, cache, layer, last)  # (B, nh, T, hs), or (B, nh, 1, hs)
        if last:
            rows = x[:, -1].contiguous()
        self.add_attention(rows, y.view(B, C) if T == 1 else y.transpose(1, 2).reshape(-1, C))
        self.add_mlp(rows, self.activate(self.fc(self.norm_2(rows))))
        return rows.view(B, -1, C)


def gelu(x):
    """F.gelu of x (rows, C), C even, a few rows of it as torch computes it itself. What is contiguous it hands to oneDNN, which is the
    faster for many, but whose call takes longer than all else about a few; so they are given as a transposed matrix, a single row as
    its two halves."""
    if x.size(0) > 16:
        return F.gelu(x)
    if x.size(0) == 1:
        return F.gelu(x.view(2, -1).t()).t().view(1, -1)
    return F.gelu(x.t()).t()


def function_of(layer):
    """What a layer computes, x -> y, without its hooks and without looking up its parameters by name; a linear layer's x is
    (rows, in)."""
    if isinstance(layer, nn.Linear):
        weight, bias = layer.weight.detach().t(), layer.bias
        return (lambda x: torch.mm(x, weight)) if bias is None else lambda x: torch.addmm(bias, x, weight)
    if isinstance(layer, nn.LayerNorm):
        rest = layer.normalized_shape, layer.weight, layer.bias, layer.eps
        return lambda x: torch.layer_norm(x, *rest)
    if isinstance(layer, nn.Embedding):
        table = layer.weight
        return lambda ids: torch.embedding(table, ids)
    return layer.forward


def adding(layer):
    """The function x, y -> None that adds layer(y) to x."""
    if isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32:  # in one go, for which x and the weights must be of one type
        weight, bias = layer.weight.detach().t(), layer.bias
        return (lambda x, y: x.addmm_(y, weight)) if bias is None else lambda x, y: x.add_(bias).addmm_(y, weight)
    function = function_of(layer)

    def add(x, y):
        y = function(y)  # before x.add_ is looked up, or torch.compile warns of it
        x.add_(y)
    return add


class PackedLinear(nn.Module):
    """A linear layer over oneDNN's own layout of the weights, as torch.compile uses it on CPUs when weights are frozen.

    x: (..., in) -> (..., out) in the type of the weights. A row's result does not depend on how many there are.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        self.dtype, self.copies = dtype, COPIES  # copies: what a single row is multiplied as
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.to(dtype), 64)  # 64 rows: a hint, good for 1 to 1000
        self.bias = None if linear.bias is None else linear.bias.to(dtype)

    def forward(self, x):
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        if self.copies > 1 and x.numel() == x.size(-1):
            return self.product(x.expand(self.copies, *x.shape[1:]))[:1]
        return self.product(x)

    def product(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, 'none', [], '')


@torch.inference_mode()
def choose_copies(layers):
    """Find out by a few trials of the largest layer whether this processor multiplies a single row faster alone or as COPIES of it.

    Either can be the faster by far, depending on the processor and the load on its memory. The choice changes no result: where a row
    alone is, or in bfloat16 may be, summed up in another order than several, two copies take its place.
    """
    def seconds(layer, copies):
        x = torch.ones(copies, layer.packed.size(1), dtype=layer.dtype)
        start = time.perf_counter()
        layer.product(x)
        return time.perf_counter() - start

    if not layers:
        return
    largest = max(layers, key=lambda layer: layer.packed.numel())
    alone, several = (min(times) for times in zip(*[[seconds(largest, copies) for copies in (1, COPIES)] for _ in range(6)]))
    for layer in layers if alone < several else []:
        row = torch.randn(1, layer.packed.size(1), dtype=layer.dtype, generator=torch.Generator().manual_seed(0))
        same = layer.dtype == torch.float32 and torch.equal(layer.product(row), layer.product(row.expand(2, -1))[:1])
        layer.copies = 1 if same else 2  # coarser numbers hide another order in most rows, not in all


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, a scale for each output, and 8-bit inputs, a scale for each row (Dettmers et al. 2022,
    "LLM.int8()", section 2.1), multiplied by FBGEMM. A row's result depends on that row alone.

    Both sides are symmetric: w ~ scale * q with q in [-127, 127]. Products are summed exactly, in 32-bit integers. Without VNNI
    instructions FBGEMM adds up pairs in 16 bits first: there, inputs get 7 bits, so that no pair overflows.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch calls these types deprecated; nothing that is as fast takes their place yet
            quantized = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.packed = torch.ops.quantized.linear_prepack(quantized, None)
        self.bias = None if linear.bias is None else linear.bias.float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, x):
        x = x.float()
        scale = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_min_(1e-12)  # (..., 1), the largest of a row
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.levels, self.levels + 1, self.packed)
        return y * scale if self.bias is None else torch.addcmul(self.bias, y, scale)
