"""An independent GPT-2 in float64, the slow and obvious way, under nanoGPT's parameter names: what others' code expects of a
checkpoint, and a computation to hold model.py against. It shares nothing with model.py."""
import math

import torch
import torch.nn as nn


class Affine(nn.Module):
    """Layer normalisation by its definition (Ba et al. 2016)."""

    def __init__(self, width, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        normal = centred / torch.sqrt((centred ** 2).mean(-1, keepdim=True) + 1e-5)
        return normal * self.weight + (0 if self.bias is None else self.bias)


class ReferenceGPT(nn.Module):
    """Accepts exactly nanoGPT's model_args, and weights by strict loading."""

    def __init__(self, n_layer, n_head, n_embd, block_size, bias, vocab_size, dropout):
        super().__init__()
        self.n_head = n_head
        layers = []
        for _ in range(n_layer):
            attn = nn.ModuleDict({'c_attn': nn.Linear(n_embd, 3 * n_embd, bias=bias), 'c_proj': nn.Linear(n_embd, n_embd, bias=bias)})
            mlp = nn.ModuleDict({'c_fc': nn.Linear(n_embd, 4 * n_embd, bias=bias), 'c_proj': nn.Linear(4 * n_embd, n_embd, bias=bias)})
            layers.append(nn.ModuleDict({'ln_1': Affine(n_embd, bias), 'attn': attn, 'ln_2': Affine(n_embd, bias), 'mlp': mlp}))
        self.transformer = nn.ModuleDict({'wte': nn.Embedding(vocab_size, n_embd), 'wpe': nn.Embedding(block_size, n_embd),
                                          'h': nn.ModuleList(layers), 'ln_f': Affine(n_embd, bias)})
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.double()

    def forward(self, idx):
        """(B, T) ids -> (B, T, V) logits, one position and one head at a time."""
        B, T = idx.shape
        x = self.transformer.wte.weight[idx] + self.transformer.wpe.weight[:T]
        width = x.size(-1) // self.n_head
        for layer in self.transformer.h:
            q, k, v = layer.attn.c_attn(layer.ln_1(x)).chunk(3, dim=-1)
            mixed = torch.zeros_like(x)
            for head in range(self.n_head):
                part = slice(head * width, (head + 1) * width)
                for t in range(T):
                    scores = torch.einsum('bc,bsc->bs', q[:, t, part], k[:, :t + 1, part]) / math.sqrt(width)
                    mixed[:, t, part] = torch.einsum('bs,bsc->bc', scores.softmax(-1), v[:, :t + 1, part])
            x = x + layer.attn.c_proj(mixed)
            inner = layer.mlp.c_fc(layer.ln_2(x))
            x = x + layer.mlp.c_proj(inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2))))
        return self.lm_head(self.transformer.ln_f(x))
