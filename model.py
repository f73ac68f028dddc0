"""The GPT-2 transformer (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"), and what came after it.

Decoder-only, pre-norm. By default it is GPT-2: learned positions, layer norm, GELU, tied embedding and head, under nanoGPT's
names and shapes, so that its checkpoints load here and ours load there. Every other choice is a field of GPTConfig.

Letters in the shape comments:  B batch   T tokens   C width (n_embd)   nh heads   hs head size (C / nh)   V vocabulary
                                nkv heads of keys and values   S positions that the cache holds
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from common import cpu
from common.chunked import sum_in_pieces

POSITIONS = ('learned', 'rope', 'alibi', 'none')
NORMS = ('layernorm', 'rmsnorm')
LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in float32; more of them are made and used up in pieces
ACTIVATIONS = {
    'gelu': F.gelu,  # exact, by erf: nanoGPT's
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # OpenAI's and Hugging Face's GPT-2 ('gelu_new')
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021, "Primer"
    'swiglu': F.silu,  # of a gate (Shazeer 2020, eq. 6)
}


@dataclass
class GPTConfig:
    """A model's shape. Raises ValueError for values that describe no model."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 that matrix units like
    n_layer: int = 12  # transformer layers
    n_head: int = 12  # attention heads in a layer
    n_embd: int = 768  # width, divisible by n_head
    dropout: float = 0.0  # share of activations dropped while training
    bias: bool = True  # in the linear and normalisation layers, as in GPT-2
    mlp: str = 'gelu'  # one of ACTIVATIONS; 'swiglu' has a gate, and is narrower in turn
    pos: str = 'learned'  # one of POSITIONS
    norm: str = 'layernorm'  # one of NORMS
    qk_norm: bool = False  # normalize queries and keys to unit RMS, so that no logit of attention outgrows sqrt(hs)
    n_kv_head: int = 0  # heads of keys and values, shared by groups of queries (Ainslie et al. 2023); 0: n_head
    tie_weights: bool = True  # embedding and head are one matrix (Press and Wolf 2017)
    logit_softcap: float = 0.0  # squash logits into (-cap, cap) by tanh (Gemma 2, section 2); 0: leave them
    zero_init: bool = False  # projections into the residual stream start at zero: each layer starts as the identity

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name}={value!r}: must be a whole number of at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(
                f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head gets an equal share'
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout!r}: must be in [0, 1)')
        for name, known in (('mlp', ACTIVATIONS), ('pos', POSITIONS), ('norm', NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r}: must be one of {", ".join(known)}')
        if type(self.n_kv_head) is not int or self.n_kv_head < 0 or self.n_head % (self.n_kv_head or 1):
            raise ValueError(f'n_kv_head={self.n_kv_head!r}: must divide n_head={self.n_head}, or be 0 for as many')
        if self.pos == 'rope' and self.n_embd // self.n_head % 2:
            raise ValueError(
                f'n_embd={self.n_embd}, n_head={self.n_head}: pos=rope turns pairs, the head size must be even'
            )
        if not 0 <= self.logit_softcap < math.inf:
            raise ValueError(f'logit_softcap={self.logit_softcap!r}: must be a number from 0 on')

    @property
    def kv_heads(self):
        """Heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_width(self):
        """Width inside the MLP: 4C; a gated one has three matrices in place of two, so 8/3 C, up to a multiple of 64."""
        return -(-8 * self.n_embd // 192) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd


def make_norm(config):
    """A normalisation layer over C."""
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, eps=1e-5)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rope_angles(positions, hs, dtype):
    """Angles by which rotary embedding turns each pair at each position (Su et al. 2021, eq. 34): positions (T,) or (B, T) ->
    their cosines and sines, (T, hs) or (B, 1, T, hs). The pairs are i and i + hs / 2, as in Llama."""
    frequencies = 10000.0 ** (torch.arange(0, hs, 2, device=positions.device, dtype=dtype) / -hs)
    angles = positions[..., None].to(dtype) * frequencies
    angles = torch.cat((angles, angles), dim=-1)
    if angles.dim() == 3:
        angles = angles[:, None]  # the same for all heads
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair of x (B, nh, T, hs) by its angle."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


def alibi_mask(positions, S, mask, n_head, dtype):
    """What ALiBi adds to attention's logits (Press et al. 2022, section 3): a slope of the head's times the distance, -inf where
    a position is not seen. positions: (T,) or (B, T), mask: what may be seen, of the S columns -> (nh, T, S) or (B, nh, T, S)."""
    power = 2 ** math.floor(
        math.log2(n_head)
    )  # slopes 2^(-8/n), 2^(-16/n), …; heads beyond a power of two lie in between
    head = torch.arange(n_head, device=positions.device, dtype=dtype)
    slopes = torch.exp2(-torch.where(head < power, 8 * (head + 1), 4 * (2 * (head - power) + 1)) / power)
    columns = torch.arange(S, device=positions.device)
    distance = (columns - positions[..., None]).to(dtype)  # (T, S) or (B, T, S), 0 or less where it counts
    if distance.dim() == 3:
        distance = distance[:, None]
    seen = columns <= positions[..., None] if mask is None else mask
    return (slopes[:, None, None] * distance).masked_fill(~seen, -math.inf)


def attention(q, k, v, mask=None, dropout=0.0):
    """softmax(q k^T / sqrt(hs)) v, for q (B, nh, T, hs) and k, v (B, nkv, S, hs), where nkv divides nh -> (B, nh, T, hs).

    mask: (…, T, S), True where a position is seen, or a number to add; every position must see something. None: each sees itself and
    what came before, the T last of S. dropout: share of the probabilities that is dropped.
    """
    T, S = q.size(-2), k.size(-2)
    grouped = q.size(1) != k.size(1)
    if mask is None and 1 < T < S:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    if T == 1 or T > cpu.short_context or q.device.type != 'cpu':
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


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head, self.qk_norm = config.n_head, config.kv_heads, config.qk_norm
        self.dropout = config.dropout
        self.heads = self.n_head + 2 * self.n_kv_head  # of q, k and v together
        self.c_attn = nn.Linear(
            config.n_embd, self.heads * config.n_embd // config.n_head, bias=config.bias
        )  # q, k and v in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, mask=None, angles=None, cache=None, layer=0, last=False):
        B, T, _ = x.shape
        heads = self.c_attn(x).view(B, T, self.heads, -1).transpose(1, 2)
        y = self.attend(heads, mask, angles, cache, layer, last)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))

    def attend(self, heads, mask, angles, cache, layer, last):
        """Heads of queries, keys and values side by side, (B, nh + 2 nkv, T, hs) -> what those of the queries gather, (B, nh, T, hs);
        that of the last position alone, (B, nh, 1, hs), if `last`."""
        q, k, v = heads.split_with_sizes((self.n_head, self.n_kv_head, self.n_kv_head), dim=1)
        if self.qk_norm:
            q, k = (F.rms_norm(x, x.shape[-1:], eps=1e-5) for x in (q, k))
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:
            changed = self.qk_norm or angles is not None
            new = (
                torch.cat((k, v), dim=1) if changed else heads.narrow(1, self.n_head, 2 * self.n_kv_head)
            )  # without copying
            k, v = cache.update(layer, new)  # those of everything read so far, S positions of it
        if last:
            q, mask = q[:, :, -1:], None if mask is None else mask[..., -1:, :]
        return attention(q, k, v, mask, self.dropout if self.training else 0.0)


class MLP(nn.Module):
    """Two linear layers around an activation, wider inside."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == 'swiglu'
        self.c_fc = nn.Linear(
            config.n_embd, config.mlp_width * (1 + self.gated), bias=config.bias
        )  # gate and value in one product
        self.activation = ACTIVATIONS[config.mlp]
        self.c_proj = nn.Linear(config.mlp_width, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activate(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)

    def activate(self, x):
        """What lies between the two products; of gate and value side by side, the value, gated."""
        if not self.gated:
            return self.activation(x)
        gate, value = x.chunk(2, dim=-1)
        return self.activation(gate) * value


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, angles=None, cache=None, layer=0, last=False):
        y = self.attn(self.ln_1(x), mask, angles, cache, layer, last)
        x = (x[:, -1:] if last else x) + y
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits for the next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.vocab_size, config.n_embd),
                **(dict(wpe=nn.Embedding(config.block_size, config.n_embd)) if config.pos == 'learned' else {}),
                drop=nn.Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=make_norm(config),
            )
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Let the embedding and the head be one matrix, if config.tie_weights says so."""
        if self.config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases zero, and each layer's two writes into the residual stream scaled
        down by the square root of their number, so that the stream's variance does not grow with depth (section 2.3); with
        zero_init they start at zero (Zhang et al. 2019, "Fixup")."""
        std = 0.02
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(
                    parameter, std=0.0 if self.config.zero_init else std / math.sqrt(2 * self.config.n_layer)
                )
            elif name.endswith(('.bias', 'ln_1.weight', 'ln_2.weight', 'ln_f.weight')):
                nn.init.constant_(parameter, 0.0 if name.endswith('.bias') else 1.0)  # gains are 1
            else:
                assert name.endswith(('wte.weight', 'wpe.weight', 'lm_head.weight', 'c_attn.weight', 'c_fc.weight')), (
                    name
                )
                nn.init.normal_(parameter, std=std)

    def hidden(self, idx, cache=None, last=False):
        """idx: (B, T) int64 token ids, T <= block_size -> the final hidden states, (B, T, C); of the last position alone, (B, 1, C),
        if `last`: most of the last layer's work is left out then. With a KVCache, extended by T, idx continues what was read
        before. Raises ValueError if T exceeds block_size."""
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={config.block_size}')
        positions, mask = (torch.arange(T, device=idx.device), None) if cache is None else (cache.positions, cache.mask)
        parts = self.transformer
        x = parts.wte(idx)
        dtype = torch.promote_types(x.dtype, torch.float32)
        angles = None
        if config.pos == 'learned':
            x = x + parts.wpe(positions)
        elif config.pos == 'rope':
            angles = rope_angles(positions, config.n_embd // config.n_head, dtype)
        elif config.pos == 'alibi':
            mask = alibi_mask(positions, T if cache is None else cache.end, mask, config.n_head, dtype)
        x = parts.drop(x)
        for layer, block in enumerate(parts.h):
            x = block(x, mask, angles, cache, layer, last and T > 1 and layer + 1 == config.n_layer)
        return parts.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx, targets=None, cache=None, with_logits=True):
        """idx, cache: as in hidden(). targets: (B, T) ids to predict, -1 where there is none.

        Returns (logits, loss). With targets: logits (B, T, V) and the mean cross-entropy in nats, a scalar. Without: logits
        of the last position only, (B, 1, V), and None. with_logits=False leaves logits out, None in their place, so that those of
        a large vocabulary are never in memory all at once.
        """
        if targets is None:
            return self.logits(self.hidden(idx, cache, last=True)), None
        x, logits = self.hidden(idx, cache), None
        if with_logits or targets.numel() * self.config.vocab_size <= LOGITS_AT_ONCE:
            logits = self.logits(x)
            loss = self.summed_loss(logits, targets)
        else:
            rows = max(1, LOGITS_AT_ONCE // self.config.vocab_size)
            loss = sum_in_pieces(
                lambda x, targets: self.summed_loss(self.logits(x), targets),
                x.flatten(0, 1),
                targets.flatten(),
                rows,
                [parameter for parameter in self.parameters() if parameter.requires_grad],
            )
        return logits if with_logits else None, loss / (targets >= 0).sum().clamp_min(1)

    def summed_loss(self, logits, targets):
        """Logits (..., V) and targets (...), -1 where there is none -> the sum of their cross-entropies in nats."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, -2).to(exact), targets.flatten(), ignore_index=-1, reduction='sum')

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **sampling):
        """Extend each row of idx (B, T), T >= 1, by max_new_tokens drawn tokens -> (B, T + max_new_tokens).

        What temperature, top_k and the rest of generation.Sampling mean is said there. torch's global generator gives the seed.
        Put the model into eval() first, or dropout is sampled from too.
        """
        from generation import Sample, Sampling, generate

        samples = [Sample(row, seed=(int(torch.randint(2**62, ())), i)) for i, row in enumerate(idx.tolist())]
        for _ in generate(self, samples, max_new_tokens, Sampling(temperature, top_k or 0, **sampling)):
            pass
        new = torch.tensor([sample.ids for sample in samples], dtype=idx.dtype, device=idx.device)
        return torch.cat((idx, new.view(len(idx), max_new_tokens)), dim=1)

    def num_params(self, non_embedding=True):
        """Number of parameters; those of the position table are not counted unless non_embedding=False."""
        total = sum(parameter.numel() for parameter in self.parameters())
        positions = self.transformer.wpe.weight.numel() if self.config.pos == 'learned' else 0
        return total - positions if non_embedding else total

    def flops_per_token(self):
        """Floating-point operations of forward and backward for one token of a full block (PaLM, Chowdhery et al. 2022,
        appendix B): 6 per parameter that is multiplied by, and 12 per layer, channel and position for attention's two products."""
        config = self.config
        multiplied = self.num_params() - (0 if config.tie_weights else self.transformer.wte.weight.numel())
        return 6 * multiplied + 12 * config.n_layer * config.n_embd * config.block_size

    def crop_block_size(self, block_size):
        """Shorten the context to block_size <= config.block_size tokens by dropping the later position embeddings."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(
                f'block_size={block_size}: the model has {self.config.block_size} positions and can only be cropped'
            )
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            self.transformer.wpe = nn.Embedding.from_pretrained(
                self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False
            )
