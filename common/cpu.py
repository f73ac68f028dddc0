"""The layout of a model's weights for generating text: each linear layer's matrix in the form that the device multiplies a few rows by
fastest. How the layers are computed changes, what the model computes does not.

To generate a token is to read every weight once and to multiply it by a handful of numbers, so its time is the time to read the
weights. On a CPU, torch's own product of such thin matrices reads them at a fraction of the memory's speed; oneDNN's and
FBGEMM's, over matrices that are rearranged once, come much closer. Both come with torch. On other devices the weights are
converted to the precision that their products run in, which halves what is read.

    pack(model, device, dtype)            float32 or bfloat16, the same products as in training up to rounding
    pack(model, device, dtype, 'int8')    8-bit weights on a CPU: a quarter of the reading, and a little loss

The model is run as model.py has it. What is replaced are its plain layers, of exactly the type nn.Linear, by layers that can be
called and nothing else; a subclass, or a layer with a hook, may compute something of its own and stays. Code that reads a layer's
weight, rather than calling the layer, then fails, or computes something else, and is found out on a small batch before
anything is replaced for good.
"""

import ctypes
import math
import platform
import warnings
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.device import autocast
from common.errors import UserError, one_line, warn

SMALLEST = 2**17  # weights; smaller matrices stay in the cache, and torch's own product has less overhead than oneDNN's


def pack(model, device, dtype, quantize=''):
    """Lay out the weights of a model on `device`, in place, for reading only: it is in eval mode then, and cannot be trained, saved or
    moved any more.

    dtype: that products run in, under autocast unless it is float32. quantize: 'int8', or '' for none. The embedding tables stay as they
    are; a head that is tied to one gets a matrix of its own. Until the check has passed, both layouts are in memory.

    If the model does not compute the same afterwards, up to rounding, it is left as it was, after one line of warning on standard error.
    Raises UserError if int8 is not to be had.
    """
    if quantize == 'int8' and (device.type != 'cpu' or 'fbgemm' not in torch.backends.quantized.supported_engines):
        raise UserError(f'--quantize=int8: runs on x86 processors only, not on this {device.type} device; leave it out')
    if quantize not in ('', 'int8'):
        raise UserError(f'--quantize={quantize}: unknown; use int8, or leave it out')
    if quantize and dtype != torch.float32:
        raise UserError('--quantize=int8: goes with --dtype=float32, which everything but the weights then is')
    model.eval()
    places = {}  # of each plain layer: its paths in the model, several if it is shared
    for path, layer in model.named_modules(remove_duplicate=False):
        if is_plain(layer):
            places.setdefault(layer, []).append(path)
    weights = {layer: layer.weight for layer in places}
    packed = {layer: packed_layer(layer, dtype, quantize) for layer in places} if device.type == 'cpu' else {}
    trials = {layer: Trial(layer, other) for layer, other in packed.items()}

    def put(others):
        for layer, other in others.items():
            for path in places[layer]:
                model.set_submodule(path, other)

    with torch.no_grad(), autocast(device, dtype):
        hooks = [layer.register_forward_hook(trial.record, with_kwargs=True) for layer, trial in trials.items()]
        expected = batch_logits(model, device)
        for hook in hooks:
            hook.remove()
        put(trials)
        if device.type != 'cpu':
            for layer, weight in weights.items():
                layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        try:
            reason = difference(batch_logits(model, device), expected, 1e-4, 'the logits are')
        except Exception as error:  # of any kind: a person's code meets layers that it was not written for
            reason = f'{type(error).__name__}: {one_line(str(error), 150)}'
    reason = reason or next((trial.reason for trial in trials.values() if trial.reason), '')
    if not reason:
        return put(packed)
    put({layer: layer for layer in packed})
    for layer, weight in weights.items():
        layer.weight = weight
    warn(
        f'the weights stay as they are, which is slower{" and not 8-bit" if quantize else ""}: the model does more with its linear layers '
        f'than to call them ({reason}); in model.py, call a layer where its weight is read'
    )


def is_plain(layer):
    """Does this module compute x W^T + b, and nothing else? A subclass of nn.Linear may do more, and a parametrized layer is one; so may a
    layer with hooks before or after it, with a forward of its own, or over a weight that is a subclass of Parameter."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and 'forward' not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def packed_layer(layer, dtype, quantize):
    """The layer that takes the place of a plain one on a CPU."""
    if quantize:
        return Int8Linear(layer)
    onednn = torch.backends.mkldnn.is_available() and (  # which is asked itself what it multiplies on this processor
        dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
    return PackedLinear(layer, dtype) if onednn and layer.weight.numel() >= SMALLEST else PlainLinear(layer, dtype)


# --- the check --------------------------------------------------------------------------------------------------------


class Trial(nn.Module):
    """Stands in a layer's place for one batch: compares the packed layer with the old one, and passes on what the old one gives. So the
    logits come out as they were, whatever the precision, unless something goes around the layer, or asks what it is.
    """

    def __init__(self, layer, packed):
        super().__init__()
        self.pair, self.calls, self.reason = (layer, packed), [], ''  # in a tuple, where modules are not looked for

    def record(self, layer, args, keywords, output):
        """A forward hook for the old layer, so that it need not compute again what it has."""
        x = args[0] if args else keywords['input']
        self.calls.append((x.clone(), output.clone()))  # which the model may go on to change in place

    def forward(self, input):  # as nn.Linear calls it
        layer, packed = self.pair
        known, y = self.calls.pop(0) if self.calls else (None, None)
        if known is None or not torch.equal(input, known):
            y = layer(input)
        coarse = (
            1 if isinstance(packed, Int8Linear) else max(1e-3, 4 * torch.finfo(y.dtype).eps)
        )  # 1: as wrong as zeros
        self.reason = self.reason or difference(packed(input), y, coarse, f'{type(packed).__name__} is')
        return y


def batch_logits(model, device):
    """The model's logits for a few random tokens, the same at every call, (2, T, V); its loss is computed beside them."""
    shape = 2, min(4, model.config.block_size)
    idx = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return model(idx, idx)[0]


def difference(y, expected, tolerance, what):
    """'' if y is as `expected`, but for a share `tolerance` of its norm; else how far it is off, a text led by `what`. What is
    NaN or infinite in `expected` is not compared: such a model is told so when it generates."""
    if y.shape != expected.shape:
        return f'{what} of another shape'
    y, expected = y.cpu().float(), expected.cpu().float()
    size, gap = (
        torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (expected, y - expected)
    )  # no square overflows
    if not math.isfinite(size):
        finite = expected.isfinite()
        return difference(y[finite], expected[finite], tolerance, what)
    return '' if gap <= tolerance * size else f'{what} off by {gap:.1g} of {size:.1g}'


# --- packed layers: they can be called, and that is all ------------------------------------------------------------------


class PlainLinear(nn.Module):
    """A linear layer over torch's own product, for matrices that are too small for oneDNN's, or where there is none. x: (..., in) in the
    type of the weights, or under autocast -> (..., out).
    """

    def __init__(self, linear, dtype):
        super().__init__()
        self.matrix = (
            linear.weight.detach().to(dtype).t().contiguous().t()
        )  # by which MKL multiplies a few rows somewhat faster
        self.vector = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, input):
        return F.linear(input, self.matrix, self.vector)


class PackedLinear(nn.Module):
    """A linear layer over oneDNN's own layout of the weights, as torch.compile uses it on CPUs when weights are frozen.

    x: (..., in) -> (..., out) in the type of the weights.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        self.dtype = dtype
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype), 64
        )  # 64 rows: a hint, good for 1 to 1000
        self.vector = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, input):
        return torch.ops.mkldnn._linear_pointwise(input.to(self.dtype), self.matrix, self.vector, 'none', [], '')


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, a scale for each output, and 8-bit inputs, a scale for each row (Dettmers et al. 2022,
    "LLM.int8()", section 2.1), multiplied by FBGEMM. A row's result depends on that row alone.

    x: (..., in) -> (..., out) in float32. Both sides are symmetric: w ~ scale * q with q in [-127, 127]. Products are summed exactly, in
    32-bit integers. Without VNNI instructions FBGEMM adds up pairs in 16 bits first: there, inputs get 7 bits, so that no pair overflows.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter(
                'ignore'
            )  # torch calls these types deprecated; nothing that is as fast takes their place yet
            quantized = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.matrix = torch.ops.quantized.linear_prepack(quantized, None)
        self.vector = None if linear.bias is None else linear.bias.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, input):
        x = input.float()
        scale = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_min_(
            1e-12
        )  # (..., 1), the largest of a row
        y = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x / scale, 1 / self.levels, self.levels + 1, self.matrix
        )
        return y * scale if self.vector is None else torch.addcmul(self.vector, y, scale)


# --- training ---

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
