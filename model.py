"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") and what came after it.

Decoder-only, pre-norm. By default it is GPT-2 under nanoGPT's names and shapes, so that checkpoints load both here and
there. Every other choice is a field of GPTConfig.

Shapes in comments:  B batch   T tokens   S keys that a query may see (T, or all that a cache holds)   C width (n_embd)
                     nh heads   nkv heads of keys and values   hs head size (by default C / nh)   V vocabulary
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.attention import attend, document_blocks, flex_pays
from common.chunked import chunked_sum
from common.dropout import Dropout
from positions import alibi_slopes, rope_angles, rope_frequencies, rotate

POSITIONS = ('learned', 'rope', 'alibi', 'none')
NORMS = ('layernorm', 'rmsnorm')
ACTIVATIONS = {
    'gelu': F.gelu,  # exact, by erf: nanoGPT's
    'gelu_tanh': lambda x: F.gelu(x, approximate='tanh'),  # OpenAI's and Hugging Face's GPT-2 ('gelu_new')
    'relu2': lambda x: F.relu(x).square(),  # So et al. 2021, "Primer"
    'swiglu': F.silu,  # of a gate (Shazeer 2020, eq. 6)
}
MAX_LOGITS = 2**26  # 256 MiB in float32; the loss of a batch with more logits is computed in chunks


@dataclass
class GPTConfig:
    """A model's shape. Raises ValueError for values that describe no model."""

    block_size: int = 1024  # context length in tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64, which matrix units prefer
    n_layer: int = 12  # transformer layers
    n_head: int = 12  # attention heads per layer
    n_embd: int = 768  # width
    dropout: float = 0.0  # share of activations dropped during training
    bias: bool = True  # biases in linear and normalization layers, as in GPT-2
    mlp: str = 'gelu'  # one of ACTIVATIONS; 'swiglu' has a gate, and is narrower to make up for it
    pos: str = 'learned'  # position encoding, one of POSITIONS
    norm: str = 'layernorm'  # one of NORMS
    qk_norm: bool = False  # normalize queries and keys to unit RMS, which bounds attention's logits by sqrt(hs)
    qk_gain: bool = False  # with qk_norm: learned gains after it, one per channel of a head (Qwen3)
    n_kv_head: int = 0  # heads of keys and values, shared by groups of queries (Ainslie et al. 2023); 0: n_head
    head_size: int = 0  # channels of a head; 0: n_embd / n_head
    mlp_width: int = 0  # width inside the MLP; 0: 4 n_embd, with 'swiglu' 8/3 n_embd rounded up to a multiple of 64
    qkv_bias: bool = False  # biases of queries, keys and values, even with bias=False (Qwen2)
    norm_eps: float = 1e-5  # added to the variance or the mean square in every norm
    rope_base: float = 10000.0  # pos='rope': the slowest pair rotates by nearly 1 / rope_base radians per position
    rope_scaling: str = ''  # pos='rope': stretched as in Llama 3, 'factor,low_freq_factor,high_freq_factor,block_size'
    tie_weights: bool = True  # embedding and head share one matrix (Press and Wolf 2017)
    logit_softcap: float = 0.0  # squash logits into (-cap, cap) by tanh (Gemma 2, section 2); 0: leave them
    zero_init: bool = False  # projections into the residual stream start at zero, so each layer starts as the identity

    def __post_init__(self):
        at_least = dict.fromkeys(('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'), 1)
        for name, least in {**at_least, 'n_kv_head': 0, 'head_size': 0, 'mlp_width': 0}.items():
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)!r}: must be a whole number of at least {least}')
        for name, least, most in (('dropout', 0, 1), ('logit_softcap', 0, math.inf), ('norm_eps', 0, 1)):
            if not least <= getattr(self, name) < most:
                raise ValueError(f'{name}={getattr(self, name)!r}: must be at least {least} and below {most}')
        for name, known in (('mlp', ACTIVATIONS), ('pos', POSITIONS), ('norm', NORMS)):
            if getattr(self, name) not in known:
                raise ValueError(f'{name}={getattr(self, name)!r}: must be one of {", ".join(known)}')
        if self.n_embd % self.n_head and not self.head_size:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: give a head_size')
        if self.n_head % self.kv_heads:
            raise ValueError(f'n_kv_head={self.n_kv_head!r}: must divide n_head={self.n_head}, or be 0 for as many')
        if self.qk_gain and not self.qk_norm:
            raise ValueError('qk_gain=True: needs qk_norm=True')
        if self.pos == 'rope':
            rope_frequencies(self)

    @property
    def head_dim(self):
        """Channels of a head."""
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self):
        """Number of heads of keys and values."""
        return self.n_kv_head or self.n_head

    @property
    def mlp_dim(self):
        """Width inside the MLP: with a gate 8/3 C by default, so that three matrices cost as much as two of 4C."""
        return self.mlp_width or (-(-8 * self.n_embd // 192) * 64 if self.mlp == 'swiglu' else 4 * self.n_embd)


def attention_mask(config, positions, S, dtype, starts=None):
    """Which keys each query attends to: all masks are made here.

    positions: (T,) or (B, T), of the queries; (T,) means the last T of S in every row. The keys' are 0 to S - 1.
    starts: (B, T), the position where each query's document starts, and what it sees; None: all start at 0.
    Returns None where every query sees all keys up to itself (fused kernels need no mask for that), else a mask that
    broadcasts to (B, nh, T, S): bool, True where a query sees a key, or numbers of `dtype` to add to the logits; or a
    BlockMask of flex attention.
    """
    special = config.pos == 'alibi'  # add any other choice that hides or weighs earlier keys
    if not special and starts is None and positions.dim() == 1 and positions.size(0) in (1, S):
        return None
    if not special and not config.dropout and flex_pays(starts):
        return document_blocks(starts)
    keys = torch.arange(S, device=positions.device)
    distance = positions[..., None] - keys  # (T, S) or (B, T, S)
    if distance.dim() == 3:
        distance = distance[:, None]  # the same for all heads
    seen = distance >= 0
    if starts is not None:
        seen = seen & (keys >= starts[:, None, :, None])  # (B, 1, T, S)
    if config.pos == 'alibi':
        slopes = alibi_slopes(config.n_head, positions.device, torch.promote_types(dtype, torch.float32))
        return torch.where(seen, -slopes * distance, -math.inf).to(dtype)
    return seen


def make_norm(config):
    """A normalization layer over C."""
    if config.norm == 'rmsnorm':
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)


class HeadNorm(nn.RMSNorm):
    """Normalization of queries and keys, over hs, in the precision that they come in."""

    def forward(self, x):
        return F.rms_norm(x, self.normalized_shape, None if self.weight is None else self.weight.to(x.dtype), self.eps)


class CausalSelfAttention(nn.Module):
    """Multi-head attention of each position to itself and earlier ones (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config, layer):
        super().__init__()
        self.head_dim, self.dropout = config.head_dim, config.dropout
        self.layer = layer  # number of the layer, by which a cache knows it
        self.head_counts = (config.n_head, config.kv_heads, config.kv_heads)  # of q, k and v
        self.c_attn = nn.Linear(config.n_embd, sum(self.head_counts) * config.head_dim, config.bias or config.qkv_bias)
        norm = HeadNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(config.head_dim, config.norm_eps, config.qk_gain) for _ in 'qk')
        self.c_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, mask=None, angles=None, cache=None):
        """x: (B, T, C) -> (B, T, C). mask: from attention_mask. angles: from rope_angles, or None."""
        B, T, _ = x.shape
        q, k, v = self.c_attn(x).view(B, T, -1, self.head_dim).transpose(1, 2).split(self.head_counts, dim=1)
        q, k = self.q_norm(q), self.k_norm(k)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        if cache is not None:  # generation: keys and values of the earlier tokens too, see generation.KVCache
            k, v = cache.update(self.layer, k, v)  # (B, nkv, S, hs)
        y = attend(q, k, v, mask, self.dropout if self.training else 0.0)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """Two linear layers around an activation, wider inside."""

    def __init__(self, config):
        super().__init__()
        self.gated = config.mlp == 'swiglu'
        self.c_fc = nn.Linear(config.n_embd, config.mlp_dim * (2 if self.gated else 1), bias=config.bias)
        self.activation = ACTIVATIONS[config.mlp]
        self.c_proj = nn.Linear(config.mlp_dim, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        """(B, T, C) -> (B, T, C)."""
        x = self.c_fc(x)  # (B, T, 4C)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = self.activation(gate) * value
        else:
            x = self.activation(x)
        return self.dropout(self.c_proj(x))


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config, layer):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, mask=None, angles=None, cache=None):
        """(B, T, C) -> (B, T, C); the arguments are those of attention."""
        x = x + self.attn(self.ln_1(x), mask, angles, cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """Token ids in, logits for the next token out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict()
        self.transformer.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == 'learned':
            self.transformer.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.transformer.drop = Dropout(config.dropout)
        self.transformer.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.transformer.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Make embedding and head one matrix if config.tie_weights says so."""
        if self.config.tie_weights:
            self.transformer.wte.weight = self.lm_head.weight

    @torch.no_grad()
    def init_weights(self, put=torch.Tensor.copy_):
        """GPT-2's initialization: N(0, 0.02), biases zero. The two projections of each layer into the residual stream
        are scaled down by the square root of their number, so that its variance does not grow with depth (section
        2.3); with zero_init they start at zero (Zhang et al. 2019, "Fixup"). The random numbers are the CPU's on every
        device. put(parameter, value): stores a value, or a rank's part of it."""
        std = 0.02
        for name, parameter in self.named_parameters():
            if parameter.is_meta:  # has no memory yet: loading.py gives it some and comes here again
                continue
            value = torch.empty(parameter.shape, device='cpu')
            if name.endswith('c_proj.weight'):
                depth_std = 0.0 if self.config.zero_init else std / math.sqrt(2 * self.config.n_layer)
                nn.init.normal_(value, std=depth_std)
            elif name.endswith('.bias'):
                nn.init.zeros_(value)
            elif name.endswith(('ln_1.weight', 'ln_2.weight', 'ln_f.weight', 'q_norm.weight', 'k_norm.weight')):
                nn.init.ones_(value)
            else:
                known = ('wte.weight', 'wpe.weight', 'lm_head.weight', 'c_attn.weight', 'c_fc.weight')
                assert name.endswith(known), f'no initialization for {name}'
                nn.init.normal_(value, std=std)
            put(parameter, value)

    def hidden(self, idx, starts=None, cache=None):
        """Token ids idx (B, T), T <= block_size -> final hidden states (B, T, C). With a generation.KVCache, extended
        by T, idx continues the tokens read before. starts (B, T): the column, of all tokens read, where each token's
        document starts: it sees no earlier one, and positions count from there. ValueError if T exceeds block_size."""
        T, config = idx.size(1), self.config
        if T > config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={config.block_size}')
        columns, S = (torch.arange(T, device=idx.device), T) if cache is None else (cache.positions, cache.end)
        positions = columns if starts is None else columns - starts
        x = self.transformer.wte(idx)
        if config.pos == 'learned':
            x = x + self.transformer.wpe(positions)
        angles = rope_angles(config, positions, x.dtype) if config.pos == 'rope' else None
        mask = attention_mask(config, columns, S, x.dtype, starts)
        x = self.transformer.drop(x)
        for block in self.transformer.h:
            x = block(x, mask, angles, cache)
        return self.transformer.ln_f(x)

    def logits(self, x):
        """Hidden states (..., C) -> logits (..., V)."""
        logits, cap = self.lm_head(x), self.config.logit_softcap
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, idx, targets=None, starts=None, cache=None, with_logits: bool = True):
        """Token ids idx (B, T) and targets (B, T), -1 where there is none -> (logits, loss).

        With targets: logits (B, T, V) and the mean cross-entropy in nats, a scalar; with_logits=False returns no logits
        and need never have all of a large vocabulary's in memory. Without targets: logits of the last position only,
        (B, 1, V), and None. starts, cache: as in hidden()."""
        x = self.hidden(idx, starts, cache)
        if targets is None:
            return self.logits(x[:, -1:]), None
        logits, max_rows = None, MAX_LOGITS // self.config.vocab_size
        if with_logits or targets.numel() <= max_rows:
            logits = self.logits(x)
            loss = self.summed_loss(logits, targets)
        else:
            rows = (x.flatten(0, 1), targets.flatten(), max(1, max_rows))
            loss = chunked_sum(lambda x, y: self.summed_loss(self.logits(x), y), *rows, self.parameters())
        return logits if with_logits else None, loss / (targets >= 0).sum().clamp_min(1)

    def summed_loss(self, logits, targets):
        """Logits (..., V) and targets (...), -1 where there is none -> the sum of their cross-entropies in nats."""
        exact = torch.promote_types(logits.dtype, torch.float32)
        return F.cross_entropy(logits.flatten(0, -2).to(exact), targets.flatten(), ignore_index=-1, reduction='sum')

    @classmethod
    def from_pretrained(cls, name: str, override_args: dict | None = None) -> 'GPT':
        """A pretrained model in float32 on the CPU. name: 'gpt2', another name on the Hugging Face hub, a folder or a
        .gguf file. override_args: other values of GPTConfig, such as dropout. UserError as pretrained_model."""
        from pretrained import pretrained_model

        return pretrained_model(name, lambda fields: cls(GPTConfig(**{**fields, **(override_args or {})})))

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **sampling):
        """Extend each row of idx (B, T), T >= 1, by max_new_tokens sampled tokens -> (B, T + max_new_tokens). sampling:
        fields of generation.Sampling. Seeded by torch's global generator. Call eval() first, or dropout is active."""
        from generation import generate_rows

        return generate_rows(self, idx, max_new_tokens, temperature=temperature, top_k=top_k or 0, **sampling)

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, without the position embeddings unless non_embedding=False."""
        omitted = self.transformer.wpe.weight.numel() if non_embedding and self.config.pos == 'learned' else 0
        return sum(parameter.numel() for parameter in self.parameters()) - omitted

    def flops_per_token(self) -> int:
        """FLOPs of forward and backward per token of a full block (PaLM, Chowdhery et al. 2022, appendix B): 6 per
        parameter of a matrix product, and 12 per layer, channel of a query and position in attention."""
        config = self.config
        multiplied = self.num_params() - (0 if config.tie_weights else self.transformer.wte.weight.numel())
        return 6 * multiplied + 12 * config.n_layer * config.n_head * config.head_dim * config.block_size

    def crop_block_size(self, block_size: int):
        """Shorten the context, dropping the later position embeddings. ValueError if the model has fewer."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: can only be cropped, from {self.config.block_size} positions')
        self.config.block_size = block_size
        if self.config.pos == 'learned':
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)
