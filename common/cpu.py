"""What is done for speed on CPUs alone. Without this file and its calls everything computes the same, but for int8 and
int4.

    pack(model, device, dtype)            before generating: another layout of the weights, the same products
    pack(model, device, dtype, 'int8')    8-bit weights: a quarter of the memory, for hardly any quality
    pack(model, device, dtype, 'int4')    4-bit weights, 5 bits with their scales, for some more
    use_onednn_products(device, 64)       before training, on x86 processors with AVX-512

Generating a token reads every weight once and multiplies it by a few numbers, so it takes as long as reading them from
memory. torch's own product of such thin matrices reads them at a fraction of the memory's speed; oneDNN's and
FBGEMM's products, over matrices rearranged once, come much closer. All come with torch. On other devices pack()
converts the weights to the precision of the products, which halves what is read.

pack() replaces layers of exactly the type nn.Linear by layers that can be called and nothing else. A subclass, or a
layer with a hook, may compute something of its own and stays. Code that reads a layer's weight, instead of calling the
layer, would fail or compute something else: so the packed model is compared with the original on a small batch first.
"""

import math
import platform
import warnings
from contextlib import contextmanager

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.device import autocast
from common.errors import UserError, one_line, warn

MIN_PACKED_WEIGHTS = 2**17  # smaller matrices stay in the processor's cache, where torch's product has less overhead
GROUP = 32  # weights that share a scale in int4
SHORT_CONTEXT = 128  # tokens; over so few, batched products beat fused attention with oneDNN's products


def pack(model: nn.Module, device: torch.device, dtype: torch.dtype, quantize: str = ''):
    """Rearrange the weights of a model on `device`, in place, for generation: it is in eval mode afterwards, and cannot
    be trained, saved or moved.

    dtype: of products, under autocast unless it is float32. quantize: 'int8', 'int4', or '' for neither.
    Embedding tables stay as they are; a head tied to one gets a matrix of its own. Both layouts are in memory until the
    check has passed. If the packed model computes anything else, up to rounding, the model is left as it was, with one
    line of warning. UserError if int8 or int4 is not available.
    """
    if quantize not in ('', 'int8', 'int4'):
        raise UserError(f'--quantize={quantize}: unknown; use int8 or int4, or leave it out')
    fbgemm = 'fbgemm' in torch.backends.quantized.supported_engines
    if quantize == 'int8' and (device.type != 'cpu' or not fbgemm):
        raise UserError(f'--quantize=int8: runs on x86 processors only, not on this {device.type} device; leave it out')
    if quantize == 'int4' and (device.type != 'cpu' or not hasattr(torch.ops.aten, '_weight_int4pack_mm_for_cpu')):
        raise UserError(f'--quantize=int4: torch {torch.__version__} has it on CPUs only, or not at all; leave it out')
    if quantize and dtype != torch.float32:
        raise UserError(f'--quantize={quantize}: needs --dtype=float32, the type of everything but the weights')
    model.eval()
    places = {}  # each plain layer: its paths in the model, several if it is shared
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
        f'the weights stay as they are, which is slower{" and not 8-bit" if quantize else ""}: the model does more '
        f'with its linear layers than calling them ({reason}); in model.py, call a layer where its weight is read'
    )


def is_plain(layer):
    """Does this module compute x W^T + b and nothing else? No subclass of nn.Linear (a parametrized layer is one), no
    hooks, no forward of its own, no weight that is a subclass of Parameter."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and 'forward' not in vars(layer)
        and not layer._forward_hooks
        and not layer._forward_pre_hooks
    )


def packed_layer(layer, dtype, quantize):
    """The packed replacement of a plain layer on a CPU."""
    if quantize:
        return {'int8': Int8Linear, 'int4': Int4Linear}[quantize](layer)
    bfloat16 = dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    onednn = torch.backends.mkldnn.is_available() and (dtype == torch.float32 or bfloat16)
    return (PackedLinear if onednn and layer.weight.numel() >= MIN_PACKED_WEIGHTS else PlainLinear)(layer, dtype)


class Trial(nn.Module):
    """Stands in for a layer during the check: compares the packed layer's output with the original's and returns the
    original's. So the logits come out unchanged in every precision, unless the model bypasses the layer's call."""

    def __init__(self, layer, packed):
        super().__init__()
        self.pair = (layer, packed)  # in a tuple, which hides them from named_modules
        self.calls, self.reason = [], ''

    def record(self, layer, args, keywords, output):
        """A forward hook of the original layer, so that its output need not be computed twice."""
        x = args[0] if args else keywords['input']
        self.calls.append((x.clone(), output.clone()))  # cloned, as the model may change them in place

    def forward(self, input):  # the argument's name is nn.Linear's
        layer, packed = self.pair
        known, y = self.calls.pop(0) if self.calls else (None, None)
        if known is None or not torch.equal(input, known):
            y = layer(input)
        # the rounding of weights is coarse: only an output as wrong as zeros is a difference there
        tolerance = 1 if isinstance(packed, (Int8Linear, Int4Linear)) else max(1e-3, 4 * torch.finfo(y.dtype).eps)
        self.reason = self.reason or difference(packed(input), y, tolerance, f'{type(packed).__name__} is')
        return y


def batch_logits(model, device):
    """The model's logits for a few tokens, the same at every call, (2, T, V); its loss is computed too."""
    shape = (2, min(4, model.config.block_size))
    idx = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return model(idx, idx)[0]


def difference(y, expected, tolerance, what):
    """'' if y differs from `expected` by at most `tolerance` of its norm, else a text led by `what`. Elements that are
    NaN or infinite in `expected` are not compared: such a model is reported when it generates."""
    if y.shape != expected.shape:
        return f'{what} of another shape'
    y, expected = y.cpu().float(), expected.cpu().float()
    size, gap = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (expected, y - expected))
    if not math.isfinite(size):
        finite = expected.isfinite()
        return difference(y[finite], expected[finite], tolerance, what)
    return '' if gap <= tolerance * size else f'{what} off by {gap:.1g} of {size:.1g}'


# --- packed layers --------------------------------------------------------------------------------------------------


class PlainLinear(nn.Module):
    """A linear layer over torch's own product, for small matrices or processors without oneDNN.

    x: (..., in) in the weights' dtype, or under autocast -> (..., out).
    """

    def __init__(self, linear, dtype):
        super().__init__()
        self.matrix = linear.weight.detach().to(dtype).t().contiguous().t()  # MKL multiplies a few rows faster by it
        self.vector = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, input):
        return F.linear(input, self.matrix, self.vector)


class PackedLinear(nn.Module):
    """A linear layer over oneDNN's layout of the weights, which torch.compile uses on CPUs for frozen weights.

    x: (..., in) -> (..., out) in the weights' dtype.
    """

    def __init__(self, linear, dtype):
        super().__init__()
        rows = 64  # a hint of the batch's size, good for 1 to 1000
        self.dtype = dtype
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().to(dtype), rows)
        self.vector = None if linear.bias is None else linear.bias.detach().to(dtype)

    def forward(self, input):
        return torch.ops.mkldnn._linear_pointwise(input.to(self.dtype), self.matrix, self.vector, 'none', [], '')


class Int8Linear(nn.Module):
    """A linear layer with 8-bit weights, one scale per output, multiplied by FBGEMM. A row's result does not depend on
    other rows.

    x: (..., in) -> (..., out) in float32. Both sides are symmetric: w ~ scale * q with q in [-127, 127]. An input is
    the sum of two integers of 8 bits, the second of what the first leaves: a row's largest element may be a hundred
    times the others, which one alone would round to nothing (Dettmers et al. 2022, "LLM.int8()", section 4). Products
    are summed exactly, in 32-bit integers. Without VNNI instructions FBGEMM first adds pairs in 16 bits; there the
    integers have 7 bits, so that no pair overflows.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.detach().float()
        scale = weight.abs().amax(dim=1).clamp_min(1e-12) / 127
        zero = torch.zeros(len(scale), dtype=torch.long)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch deprecates these types, but has no replacement that is as fast yet
            quantized = torch.quantize_per_channel(weight, scale.double(), zero, 0, torch.qint8)
        self.matrix = torch.ops.quantized.linear_prepack(quantized, None)
        self.vector = None if linear.bias is None else linear.bias.detach().float()
        self.levels = 127 if torch.cpu._is_vnni_supported() else 63

    def forward(self, input):
        x = input.float()
        scale = torch.linalg.vector_norm(x, math.inf, dim=-1, keepdim=True).clamp_min_(1e-12) / self.levels  # (..., 1)
        x = x / scale
        high = x.round()
        pair = torch.stack((high, (x - high) * (2 * self.levels)))  # (2, ..., in): what is left is at most 1/2
        multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        high, low = multiply(pair, 1.0, self.levels + 1, self.matrix)
        y = torch.add(high, low, alpha=1 / (2 * self.levels))
        return y * scale if self.vector is None else torch.addcmul(self.vector, y, scale)


class Int4Linear(nn.Module):
    """A linear layer with 4-bit weights, each GROUP in a row with a scale and an offset in bfloat16: 5 bits per
    weight, as in llama.cpp's Q4_1. Torch multiplies them, with inputs in bfloat16.

    x: (..., in) -> (..., out) in float32.
    """

    def __init__(self, linear):
        super().__init__()
        self.n_out, n_in = linear.weight.shape
        self.padding = -n_in % GROUP
        weight = F.pad(linear.weight.detach().float(), (0, self.padding, 0, -self.n_out % 16))  # the kernel's blocks
        groups = weight.view(len(weight), -1, GROUP)
        least, most = groups.aminmax(dim=-1, keepdim=True)
        scale = ((most - least) / 15).clamp_min(1e-30)
        self.scales = torch.cat(
            (scale, least + 8 * scale), dim=-1
        ).bfloat16()  # (out, groups, 2): w ~ scale * (q - 8) + b
        scale, offset = self.scales.float().split(1, dim=-1)
        q = ((groups - offset) / scale + 8).round().clamp(0, 15).int().view_as(weight)
        self.scales = self.scales.transpose(0, 1).contiguous()  # (groups, out, 2)
        self.matrix = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
        self.vector = None if linear.bias is None else linear.bias.detach().float()

    def forward(self, input):
        x = F.pad(input, (0, self.padding)) if self.padding else input
        x = x.reshape(-1, x.size(-1)).bfloat16()
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.matrix, GROUP, self.scales)[:, : self.n_out].float()
        y = y.view(*input.shape[:-1], self.n_out)
        return y if self.vector is None else y + self.vector


# --- training -------------------------------------------------------------------------------------------------------


def use_onednn_products(device: torch.device, block_size: int) -> bool:
    """Let oneDNN compute float32 products on x86 CPUs with AVX-512, where MKL leaves half of an AMD processor's speed
    unused. Call it before anything is compiled. Returns whether it takes effect.

    torch gives float32 products to oneDNN only when it may round their factors to bfloat16. So that is allowed only
    where oneDNN makes no use of it: without a matrix unit (AMX), and if a trial product is exact. torch's fused
    attention then calls oneDNN for tiny products, which is slow; at a block_size up to SHORT_CONTEXT it is turned off,
    and attention runs as batched products.
    """
    settings = getattr(torch.backends.mkldnn, 'matmul', None)  # torch 2.9 and later
    if device.type != 'cpu' or settings is None or platform.machine() not in ('x86_64', 'AMD64'):
        return False
    avx512 = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
    if not avx512 or torch.cpu._is_amx_tile_supported():
        return False
    settings.fp32_precision = 'bf16'
    x = 1 + torch.arange(64 * 64).view(64, 64) / 2**20  # needs more mantissa than bfloat16 or TF32 have
    if not torch.equal(x @ torch.eye(64), x):
        settings.fp32_precision = 'ieee'
        return False
    torch.backends.cuda.enable_flash_sdp(block_size > SHORT_CONTEXT)  # the switch holds for CPUs too
    return True


@contextmanager
def torch_products():
    """Compute as if use_onednn_products had not been called: the baseline that a step is compared with."""
    settings = getattr(torch.backends.mkldnn, 'matmul', None)
    if settings is None:
        yield
        return
    before = settings.fp32_precision, torch.backends.cuda.flash_sdp_enabled()
    settings.fp32_precision = 'ieee'
    torch.backends.cuda.enable_flash_sdp(True)
    try:
        yield
    finally:
        settings.fp32_precision = before[0]
        torch.backends.cuda.enable_flash_sdp(before[1])
