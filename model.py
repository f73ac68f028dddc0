"""The GPT-2 transformer (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

Decoder-only, pre-norm, learned positions, tied embedding and head. Parameter names and shapes are nanoGPT's, so that its
checkpoints load here and ours load there.

Letters in the shape comments:  B batch   T tokens   C width (n_embd)   nh heads   hs head size (C / nh)   V vocabulary
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

    def forward(self, x):
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # each (B, nh, T, hs)
                   for part in self.c_attn(x).split(C, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
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

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


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

    def forward(self, idx, targets=None):
        """idx: (B, T) int64 token ids, T <= block_size. targets: (B, T) ids to predict, -1 where there is none.

        Returns (logits, loss). With targets: logits (B, T, V) and the mean cross-entropy in nats, a scalar. Without: logits
        of the last position only, (B, 1, V), and None. Raises ValueError if T exceeds block_size.
        """
        B, T = idx.shape
        if T > self.config.block_size:
            raise ValueError(f'{T} tokens do not fit into block_size={self.config.block_size}')
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(positions))  # (B, T, C)
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        logits = self.lm_head(x)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)
        return logits, loss

    @torch.no_grad()
    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, vocab_size=None, generator=None):
        """Extend each row of idx (B, T), T >= 1, by max_new_tokens sampled tokens -> (B, T + max_new_tokens).

        temperature: divides the logits; 0 takes the likeliest token. top_k: sample among the k likeliest only, None or 0
        for all. vocab_size: never sample an id at or above it (a padded vocabulary has ids that stand for no text).
        The model sees the last block_size tokens. Put the model into eval() first, or dropout is sampled from too.
        """
        for _ in range(max_new_tokens):
            logits, _ = self(idx[:, -self.config.block_size:])
            next_id = sample_token(logits[:, -1, :vocab_size].float(), temperature, top_k, generator)
            idx = torch.cat((idx, next_id), dim=1)
        return idx

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


def sample_token(logits, temperature=1.0, top_k=None, generator=None):
    """One id a row from logits (B, V) -> (B, 1). temperature 0 takes the likeliest; top_k keeps only the k likeliest."""
    if temperature < 1e-6:  # so small a divisor would overflow
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        threshold = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator)
