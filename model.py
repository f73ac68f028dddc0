"""The GPT-2 transformer (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Decoder-only, pre-norm, learned positions, tied embedding and head. Parameter names and shapes are nanoGPT's, so that its
checkpoints load here and ours load there.

Letters in the shape comments:  B batch   T tokens   C width (n_embd)   nh heads   hs head size (C / nh)   V vocabulary
                                S positions that the cache holds
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F

MLP_ACTIVATIONS = {
    'gelu': nn.GELU,                                    # exact, by erf: nanoGPT's
    'gelu_tanh': lambda: nn.GELU(approximate='tanh'),   # OpenAI's and Hugging Face's GPT-2 ('gelu_new')
}


@dataclass
class GPTConfig:
    """A model's shape. Raises ValueError for values that describe no model."""
    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 that matrix units like
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # in the linear and normalisation layers, as in GPT-2
    mlp: str = 'gelu'

    def __post_init__(self):
        for name in ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd'):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f'{name}={value!r}: must be a whole number of at least 1')
        if self.n_embd % self.n_head:
            raise ValueError(f'n_embd={self.n_embd} is not divisible by n_head={self.n_head}: every head gets an equal share')
        if not 0 <= self.dropout < 1:
            raise ValueError(f'dropout={self.dropout!r}: must be in [0, 1)')
        if self.mlp not in MLP_ACTIVATIONS:
            raise ValueError(f'mlp={self.mlp!r}: must be one of {", ".join(MLP_ACTIVATIONS)}')


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a position sees itself and what came before it (Vaswani et al. 2017, eq. 1)."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # queries, keys and values in one product
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind()  # (B, nh, T, hs) each
        mask = None
        if cache is not None:  # k and v of everything read so far, S positions of it
            (k, v), mask = cache.update(layer, k, v), cache.mask
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Two linear layers around an activation, four times as wide inside."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = MLP_ACTIVATIONS[config.mlp]()
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))  # (B, T, C) -> (B, T, 4C) -> (B, T, C)


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attn(self.ln_1(x), cache, layer)
        x = x + self.mlp(self.ln_2(x))
        return x


class KVCache:
    """Keys and values of the tokens that a batch has read, so that reading one more costs one position, not all of them.

    The token at position p of a row lies in column p; rows may be of different lengths. Call extend(T) before the model reads
    T more tokens of every row. A row that is given fewer is filled up at the end: what stands there is overwritten before any
    later token sees it, once `lengths` has been set back to the true number. static=True keeps every shape and address as it is
    from one token to the next, which a compiled model wants; attention then passes over the empty columns too.
    """

    def __init__(self, config, rows, columns, device=None, dtype=None, static=False):
        shape = (rows, config.n_head, columns, config.n_embd // config.n_head)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
                                  for _ in range(2))  # zeros, as even a masked column must hold a number
        self.lengths = [0] * rows  # tokens in each row
        self.row_ids = torch.arange(rows, device=device)[:, None]
        self.column_ids = torch.arange(columns, device=device)
        self.static = static
        if static:
            self.static_positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.static_mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
            for tensor in (*self.keys, *self.values, self.static_positions, self.static_mask):
                torch._dynamo.mark_static_address(tensor, guard=False)  # so that a CUDA graph writes into it, rather than into a copy

    def extend(self, T):
        """Reserve the next T columns of every row: sets what the model's next call reads. ValueError if there are too few."""
        first, end, columns = self.lengths[0], max(self.lengths) + T, len(self.column_ids)
        if end > columns:
            raise ValueError(f'{end} tokens do not fit into {columns} columns')
        if self.static and T == 1:
            self.end, self.span, self.positions, self.mask = columns, None, self.static_positions, self.static_mask
            self.positions.copy_(torch.tensor(self.lengths)[:, None])
            self.mask.copy_(self.column_ids <= self.positions[:, :, None, None])
        elif end == min(self.lengths) + T:  # all rows alike: a slice, and no mask unless several tokens follow others
            self.end, self.span = end, slice(first, end)
            self.positions = self.column_ids[self.span]
            self.mask = self.column_ids[:end] <= self.positions[:, None] if first and T > 1 else None  # (T, S)
        else:
            self.end, self.span = end, None
            self.positions = (torch.tensor(self.lengths)[:, None] + torch.arange(T)).to(self.column_ids.device)
            self.mask = self.column_ids[:end] <= self.positions[:, None, :, None]  # (B, 1, T, S)
        self.lengths = [length + T for length in self.lengths]

    def update(self, layer, k, v):
        """Store the keys and values of the new tokens, (B, nh, T, hs) each -> those of all tokens, (B, nh, S, hs) each."""
        keys, values = self.keys[layer], self.values[layer]
        if self.span is not None:
            keys[:, :, self.span], values[:, :, self.span] = k, v
        else:
            at = (self.row_ids, slice(None), self.positions)  # indexes to (B, T, nh, hs)
            keys[at], values[at] = k.transpose(1, 2), v.transpose(1, 2)
        return keys[:, :, :self.end], values[:, :, :self.end]

    def put(self, rows, other, other_rows):
        """Replace the contents of some rows by rows of another cache: rows[i] by other_rows[i]."""
        width = len(other.column_ids)
        for mine, its in zip(self.keys + self.values, other.keys + other.values):
            mine[rows, :, :width] = its[other_rows]
        for row, other_row in zip(rows, other_rows):
            self.lengths[row] = other.lengths[other_row]

    def keep(self, rows):
        """Forget all rows but these."""
        self.keys, self.values = ([stored[rows] for stored in layers] for layers in (self.keys, self.values))
        self.row_ids = self.row_ids[:len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


class GPT(nn.Module):
    """Token ids in, logits for the next token out."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie_weights()
        self.init_weights()

    def tie_weights(self):
        """Let the embedding and the head be one matrix (Press and Wolf 2017)."""
        self.transformer.wte.weight = self.lm_head.weight

    @torch.no_grad()
    def init_weights(self):
        """GPT-2's initialisation: N(0, 0.02), biases zero, and each layer's two writes into the residual stream scaled
        down by the square root of their number, so that the stream's variance does not grow with depth (section 2.3)."""
        std = 0.02
        for name, parameter in self.named_parameters():
            if name.endswith('c_proj.weight'):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layer))
            elif parameter.dim() >= 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith('bias'):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)  # normalisation gains

    def hidden(self, idx, cache=None):
        """idx: (B, T) int64 token ids, T <= block_size -> the final hidden states, (B, T, C). With a KVCache, extended by T, idx
        continues what was read before. Raises ValueError if T exceeds block_size."""
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={self.config.block_size}')
        positions = torch.arange(T, device=idx.device) if cache is None else cache.positions
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))
        for layer, block in enumerate(self.transformer.h):
            x = block(x, cache, layer)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """idx, cache: as in hidden(). targets: (B, T) ids to predict, -1 where there is none.

        Returns (logits, loss). With targets: logits (B, T, V) and the mean cross-entropy in nats, a scalar. Without: logits
        of the last position only, (B, 1, V), and None.
        """
        x = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **sampling):
        """Extend each row of idx (B, T), T >= 1, by max_new_tokens drawn tokens -> (B, T + max_new_tokens).

        What temperature, top_k and the rest of generation.Sampling mean is said there. torch's global generator gives the seed.
        Put the model into eval() first, or dropout is sampled from too.
        """
        from generation import Sample, Sampling, generate  # the room that builds on this one; here for whoever calls it as in nanoGPT
        samples = [Sample(row, seed=(int(torch.randint(2**62, ())), i)) for i, row in enumerate(idx.tolist())]
        for _ in generate(self, samples, max_new_tokens, Sampling(temperature, top_k or 0, **sampling)):
            pass
        new = torch.tensor([sample.ids for sample in samples], dtype=idx.dtype, device=idx.device)
        return torch.cat((idx, new.view(len(idx), max_new_tokens)), dim=1)

    def num_params(self, non_embedding=True):
        """Number of parameters; those of the position table are not counted unless non_embedding=False."""
        total = sum(parameter.numel() for parameter in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self):
        """Floating-point operations of forward and backward for one token of a full block (PaLM, Chowdhery et al. 2022,
        appendix B): 6 per parameter, and 12 per layer, channel and position for attention's two products."""
        config = self.config
        return 6 * self.num_params() + 12 * config.n_layer * config.n_embd * config.block_size

    def crop_block_size(self, block_size):
        """Shorten the context to block_size <= config.block_size tokens by dropping the later position embeddings."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f'block_size={block_size}: the model has {self.config.block_size} positions and can only be cropped')
        self.config.block_size = block_size
        self.transformer.wpe = nn.Embedding.from_pretrained(self.transformer.wpe.weight[:block_size].detach().clone(), freeze=False)

