"""An independent GPT to check model.py and its checkpoints against.

It computes in float64, the slow and obvious way: one position and one head at a time. Its parameters have nanoGPT's
names, which other people's code expects of a checkpoint. It shares no code with model.py.
"""

import math

import torch
import torch.nn as nn


class Norm(nn.Module):
    """Layer normalisation (Ba et al. 2016), or RMS normalisation (Zhang and Sennrich 2019), by their definitions."""

    def __init__(self, width, bias, rms, eps=1e-5):
        super().__init__()
        self.rms, self.eps = rms, eps
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias and not rms else None

    def forward(self, x):
        centred = x if self.rms else x - x.mean(-1, keepdim=True)
        normal = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + self.eps)
        return normal * self.weight + (0 if self.bias is None else self.bias)


def rotated(x, position, base, scaling):
    """Rotary embedding of x (..., hs) at one position, by multiplying complex numbers (Su et al. 2021). scaling: Llama
    3's, by wavelengths as in Meta's code, where model.py counts rotations."""
    half, radians = x.size(-1) // 2, []
    for i in range(half):
        frequency = base ** (-i / half)
        if scaling:
            factor, low, high, block = map(float, scaling.split(','))
            wavelength = 2 * math.pi / frequency
            if wavelength > block / low:
                frequency /= factor
            elif wavelength > block / high:
                smooth = (block / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / factor + smooth * frequency
        radians.append(position * frequency)
    angles = torch.tensor(radians, dtype=torch.float64)
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones(half).double(), angles)
    return torch.cat((z.real, z.imag), dim=-1)


def activation(kind, inner):
    """The activation that GPTConfig calls `kind`, by its definition."""
    if kind == 'swiglu':
        gate, up = inner.chunk(2, dim=-1)
        return gate / (1 + torch.exp(-gate)) * up
    if kind == 'relu2':
        return torch.where(inner > 0, inner**2, 0.0)
    if kind == 'gelu_tanh':
        return inner * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))


class ReferenceGPT(nn.Module):
    """A GPT that takes exactly nanoGPT's model_args and weights, and SAMgpt's further settings by name."""

    def __init__(
        self,
        n_layer,
        n_head,
        n_embd,
        block_size,
        bias,
        vocab_size,
        dropout,
        *,
        mlp='gelu',
        pos='learned',
        norm='layernorm',
        qk_norm=False,
        qk_gain=False,
        n_kv_head=0,
        head_size=0,
        mlp_width=0,
        qkv_bias=False,
        norm_eps=1e-5,
        rope_base=10000.0,
        rope_scaling='',
        logit_softcap=0.0,
        **ignored,
    ):
        super().__init__()
        self.n_head, self.n_kv_head, self.mlp, self.pos = n_head, n_kv_head or n_head, mlp, pos
        self.qk_norm, self.logit_softcap = qk_norm, logit_softcap
        self.eps, self.qk_gain, self.rope = norm_eps, qk_gain, (rope_base, rope_scaling)
        self.width = width = head_size or n_embd // n_head
        inner = mlp_width or (64 * math.ceil(8 * n_embd / 3 / 64) if mlp == 'swiglu' else 4 * n_embd)
        rms = norm == 'rmsnorm'
        self.transformer = nn.ModuleDict()
        self.transformer['wte'] = nn.Embedding(vocab_size, n_embd)
        if pos == 'learned':
            self.transformer['wpe'] = nn.Embedding(block_size, n_embd)
        self.transformer['h'] = nn.ModuleList()
        self.transformer['ln_f'] = Norm(n_embd, bias, rms, norm_eps)
        for _ in range(n_layer):
            layer = nn.ModuleDict()
            layer['ln_1'] = Norm(n_embd, bias, rms, norm_eps)
            layer['attn'] = nn.ModuleDict()
            rows = (n_head + 2 * self.n_kv_head) * width
            layer['attn']['c_attn'] = nn.Linear(n_embd, rows, bias=bias or qkv_bias)
            layer['attn']['c_proj'] = nn.Linear(n_head * width, n_embd, bias=bias)
            if qk_gain:
                layer['attn']['q_norm'], layer['attn']['k_norm'] = (Norm(width, False, True, norm_eps) for _ in 'qk')
            layer['ln_2'] = Norm(n_embd, bias, rms, norm_eps)
            layer['mlp'] = nn.ModuleDict()
            layer['mlp']['c_fc'] = nn.Linear(n_embd, inner * (2 if mlp == 'swiglu' else 1), bias=bias)
            layer['mlp']['c_proj'] = nn.Linear(inner, n_embd, bias=bias)
            self.transformer['h'].append(layer)
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.double()

    def forward(self, idx):
        """(B, T) ids -> (B, T, V) logits."""
        B, T = idx.shape
        x = self.transformer.wte.weight[idx]
        if self.pos == 'learned':
            x = x + self.transformer.wpe.weight[:T]
        width = self.width
        for layer in self.transformer.h:
            widths = [n * width for n in (self.n_head, self.n_kv_head, self.n_kv_head)]
            q, k, v = layer.attn.c_attn(layer.ln_1(x)).split(widths, dim=-1)
            mixed = torch.zeros(B, T, self.n_head * width, dtype=x.dtype)
            for head in range(self.n_head):
                part = slice(head * width, (head + 1) * width)
                kv = head * self.n_kv_head // self.n_head  # neighbouring heads share keys and values
                kv_part = slice(kv * width, (kv + 1) * width)
                queries, keys = q[:, :, part], k[:, :, kv_part]
                if self.qk_norm:
                    queries, keys = (z / torch.sqrt((z**2).mean(-1, keepdim=True) + self.eps) for z in (queries, keys))
                if self.qk_gain:
                    queries, keys = queries * layer.attn.q_norm.weight, keys * layer.attn.k_norm.weight
                if self.pos == 'rope':
                    queries = torch.stack([rotated(queries[:, t], t, *self.rope) for t in range(T)], dim=1)
                    keys = torch.stack([rotated(keys[:, t], t, *self.rope) for t in range(T)], dim=1)
                for t in range(T):
                    scores = torch.einsum('bc,bsc->bs', queries[:, t], keys[:, : t + 1]) / math.sqrt(width)
                    if self.pos == 'alibi':  # if n_head is a power of two
                        scores = scores - 2 ** (-8 * (head + 1) / self.n_head) * (t - torch.arange(t + 1))
                    mixed[:, t, part] = torch.einsum('bs,bsc->bc', scores.softmax(-1), v[:, : t + 1, kv_part])
            x = x + layer.attn.c_proj(mixed)
            x = x + layer.mlp.c_proj(activation(self.mlp, layer.mlp.c_fc(layer.ln_2(x))))
        logits = self.lm_head(self.transformer.ln_f(x))
        return self.logit_softcap * torch.tanh(logits / self.logit_softcap) if self.logit_softcap else logits
