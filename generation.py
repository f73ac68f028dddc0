"""Drawing tokens from a model: what the model sees, how a token is chosen, when a text is finished.

What the model sees. It has room for block_size tokens. Of a longer text it sees the end: it starts to see everything from
`window_start` on, which moves in steps of half a block. So between a half and a whole block of context is in sight at any
time, and the cache of keys and values has to be filled anew only once in half a block. Positions count from the window's
start, as in training; this holds for every kind of position embedding.

What a sample depends on: the model, its own prompt, the settings, the seed and its own number. Not on what else is drawn in
the same batch, nor on how often the cache was filled anew; but sums are rounded differently in batches of other sizes or lengths, which
in bfloat16 and 8 bits is coarse enough to now and then draw another token.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from common.errors import UserError
from dataloader import random_words
from tokenizer import TextStream

DRAWS = 1024  # uniform numbers that are made at once for each sample


class KVCache:
    """Keys and values of the tokens that a batch has read, so that reading one more costs one position, not all of them.

    The token at position p of a row lies in column p; rows may be of different lengths. Call extend(T) before the model reads
    T more tokens of every row. A row that is given fewer is filled up at the end: what stands there is overwritten before any
    later token sees it, once `lengths` has been set back to the true number. static=True keeps every shape and address as it is
    from one token to the next, which a compiled model wants; attention then passes over the empty columns too.
    """

    def __init__(self, config, rows, columns, device=None, dtype=None, static=False):
        shape = (rows, 2 * config.kv_heads, columns, config.n_embd // config.n_head)  # heads of keys, then of values
        self.layers = [
            torch.zeros(shape, device=device, dtype=dtype)  # zeros, as even a masked column must hold a number
            for _ in range(config.n_layer)
        ]
        self.lengths = [0] * rows  # tokens in each row
        self.row_ids = torch.arange(rows, device=device)[:, None]
        self.column_ids = torch.arange(columns, device=device)
        self.static = static
        if static:
            self.static_positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.static_mask = torch.zeros(rows, 1, 1, columns, dtype=torch.bool, device=device)
            for tensor in (*self.layers, self.static_positions, self.static_mask):
                torch._dynamo.mark_static_address(
                    tensor, guard=False
                )  # so that a CUDA graph writes into it, rather than into a copy

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
            self.end, self.span = end, (first, T)
            self.positions = self.column_ids[first:end]
            self.mask = self.column_ids[:end] <= self.positions[:, None] if first and T > 1 else None  # (T, S)
        else:
            self.end, self.span = end, None
            self.positions = (torch.tensor(self.lengths)[:, None] + torch.arange(T)).to(self.column_ids.device)
            self.mask = self.column_ids[:end] <= self.positions[:, None, :, None]  # (B, 1, T, S)
        self.lengths = [length + T for length in self.lengths]

    def update(self, layer, new):
        """Store the keys and values of the new tokens, (B, 2 nkv, T, hs) -> those of all tokens, (B, nkv, S, hs) each."""
        stored = self.layers[layer]
        if self.span is not None:
            stored.narrow(2, *self.span).copy_(new)
        else:
            at = self.row_ids, slice(None), self.positions  # indexes to (B, T, 2 nkv, hs)
            stored[at] = new.transpose(1, 2).to(
                stored.dtype
            )  # on CUDA, what is normalised is float32 even under autocast
        return stored.narrow(2, 0, self.end).chunk(2, dim=1)

    def put(self, rows, other, other_rows):
        """Replace the contents of some rows by rows of another cache: rows[i] by other_rows[i]."""
        width = len(other.column_ids)
        for mine, its in zip(self.layers, other.layers):
            mine[rows, :, :width] = its[other_rows]
        for row, other_row in zip(rows, other_rows):
            self.lengths[row] = other.lengths[other_row]

    def keep(self, rows):
        """Forget all rows but these."""
        self.layers = [stored[rows] for stored in self.layers]
        self.row_ids = self.row_ids[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


def window_start(n_tokens, block_size):
    """The first of n_tokens that is still seen when the next one is drawn."""
    step = max(1, block_size // 2)
    return max(0, -(-(n_tokens - block_size) // step) * step)  # rounded up


class Context:
    """Rows of tokens and, cached, what the model made of them."""

    @torch.inference_mode()
    def __init__(self, model, rows, columns, static=False):
        """rows: how many. columns: length of the longest window that will be needed, at most block_size. static: as in KVCache,
        for a compiled model; what is compiled is not called otherwise."""
        weight = model.transformer.wte.weight
        self.model, self.device = model, weight.device
        self.autocast = torch.is_autocast_enabled(weight.device.type)
        self.dtype = torch.get_autocast_dtype(weight.device.type) if self.autocast else weight.dtype
        self.cache = KVCache(model.config, rows, min(columns, model.config.block_size), self.device, self.dtype, static)
        self.forget()

    def forget(self):
        """Begin anew, all rows empty."""
        n = len(self.cache.lengths)
        self.rows, self.starts, self.cache.lengths = (
            [[] for _ in range(n)],
            [0] * n,
            [0] * n,
        )  # starts: of each row's window

    def read(self, new, last=None):
        """Append to each row its new tokens, one or more -> logits (rows, V) for the token after them. last: the last of each row,
        (rows,) int64, where the device has them already, so that they need not be sent there."""
        behind, pieces, block_size, starts, lengths = (
            [],
            [],
            self.model.config.block_size,
            self.starts,
            self.cache.lengths,
        )
        for r, (row, ids) in enumerate(zip(self.rows, new)):
            row.extend(ids)
            if len(row) > starts[r] + block_size:
                starts[r], lengths[r] = window_start(len(row), block_size), 0
            if starts[r] + lengths[r] < len(row) - 1:
                behind.append(r)  # the cache lacks more than the last token
        if behind:
            unread = [row[start + length :] for row, start, length in zip(self.rows, starts, lengths)]
            alike = len(set(map(len, unread))) == len(set(lengths)) == 1
            if alike and len(set(map(tuple, unread))) == len(unread):
                pieces = unread  # all go on from where they are, the last token with the others
            else:
                self.catch_up(behind)
        if pieces or last is None:
            pieces = np.array(pieces or [row[-1:] for row in self.rows], dtype=np.int64)
            idx = torch.as_tensor(pieces, device=self.device)  # (rows, T)
        else:
            idx = last[:, None]
        self.cache.extend(idx.size(1))
        if self.cache.static and idx.size(1) == 1:  # what may be compiled
            torch.compiler.cudagraph_mark_step_begin()  # the last call's output is no longer needed, its memory may be reused
            return self.model(idx, cache=self.cache)[0][:, -1]
        return self.model.logits(self.model.hidden(idx, self.cache, last=True)[:, -1])

    def catch_up(self, behind):
        """Read what the cache lacks of these rows, but for their last token. Rows that lack the same are read once."""
        pieces = [tuple(self.rows[r][self.starts[r] : -1]) for r in behind]
        distinct = list(dict.fromkeys(pieces))
        width = max(map(len, distinct))
        part = KVCache(self.model.config, len(distinct), width, self.device, self.dtype)
        part.extend(width)
        self.model.hidden(
            torch.tensor([piece + (0,) * (width - len(piece)) for piece in distinct], device=self.device), part
        )
        part.lengths = [len(piece) for piece in distinct]
        self.cache.put(behind, part, [distinct.index(piece) for piece in pieces])

    def keep(self, rows):
        """Forget all rows but these."""
        self.rows, self.starts = [self.rows[r] for r in rows], [self.starts[r] for r in rows]
        self.cache.keep(rows)


@dataclass
class Sampling:
    """How a token is chosen from logits. Applied in this order, which is Hugging Face's. ValueError for shares out of range."""

    temperature: float = 1.0  # divides the logits; 0: the likeliest token
    top_k: int = 0  # only among the k likeliest; 0: all
    top_p: float = 1.0  # only among the likeliest that together have this probability (Holtzman et al. 2020); 1: all
    min_p: float = (
        0.0  # only among those at least so many times as probable as the likeliest (Nguyen et al. 2024); 0: all
    )
    repetition_penalty: float = (
        1.0  # divides positive, multiplies negative logits of tokens that occurred (Keskar et al. 2019)
    )
    vocab_size: int | None = None  # ids from here on stand for no text, and are never chosen

    def __post_init__(self):
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                f'top_p={self.top_p!r}, min_p={self.min_p!r}: must be above 0 and at most 1, and from 0 to 1'
            )

    def choose(self, logits, uniform, occurred=None):
        """logits (B, V), uniform (B,) in [0, 1), occurred (B, V) bool -> ids (B,). Where the logits are not numbers, it is the first
        that is no id: vocab_size, or V if that is smaller.

        By inversion: of the probabilities side by side, the one that the row's uniform number falls into.
        """
        logits = logits[:, : self.vocab_size].float()
        n_ids = logits.size(-1)
        if occurred is not None and self.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(occurred[:, : self.vocab_size], penalized, logits)
        if self.temperature < 1e-6:  # so small a divisor would overflow
            largest, chosen = logits.max(dim=-1)
            return torch.where(largest.isnan(), n_ids, chosen)
        logits, ids, k = logits / self.temperature, None, min(self.top_k or n_ids, n_ids)
        if k < n_ids or self.top_p < 1 or self.min_p > 0:
            logits, ids = logits.topk(k)  # likeliest first
        p = logits.softmax(dim=-1)
        if self.top_p < 1:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0)
        edges = p.cumsum(dim=-1)  # (B, k)
        total = edges.narrow(-1, k - 1, 1)
        chosen = torch.searchsorted(
            edges, uniform.unsqueeze(-1) * total, right=True
        )  # how many edges lie below it, or at it; nan: all k
        if ids is not None:
            chosen = F.pad(ids, (0, 1), value=n_ids).gather(-1, chosen)
        return chosen.squeeze(-1)


def uniforms(n, key):
    """n numbers in [0, 1) as float32, a function of the key, a tuple of integers: the same on every device and version."""
    words = random_words(n, *key)
    return torch.from_numpy(
        np.minimum((words >> np.uint64(40)) / 2**24, 1 - 2**-23).astype(np.float32)
    )  # times any sum < the sum


class Sample:
    """One text in the making: a prompt, and what was drawn after it.

    ids: the tokens drawn. log_probs: the logarithm of the model's own probability of each, before temperature and the like.
    text: what they stand for, up to a stop text if one was met. finish_reason: None while it is being drawn, then 'length',
    'stop', 'end_of_text', or whatever finish() was told. Without a tokenizer there is no text, and only the length ends it.
    """

    def __init__(self, prompt, seed=(0,), tokenizer=None, stop=(), end_of_text=None):
        """prompt: ids, at least one. seed: a tuple of integers, different for every sample. stop: texts that end it.
        end_of_text: the id that ends it, or None."""
        self.prompt, self.seed, self.stop, self.end_of_text = list(prompt), seed, tuple(stop), end_of_text
        self.ids, self.log_probs, self.text, self.finish_reason = [], [], '', None
        self.stream = TextStream(tokenizer) if tokenizer else None
        self.prompt_text = self.stream.push(self.prompt) + self.stream.flush() if tokenizer else ''

    def add(self, token, log_prob=None):
        """Take in the next token that was drawn."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if token == self.end_of_text:
            self.finish('end_of_text')
        elif self.stream:
            searched = len(self.text)
            self.text += self.stream.push([token])
            found = [
                at for at in (self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop) if at >= 0
            ]
            if found:
                self.text = self.text[: min(found)]
                self.finish_reason = 'stop'

    def finish(self, reason):
        """End it, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text += self.stream.flush() if self.stream else ''

    def settled(self):
        """How much of `text` will stay, whatever comes: all but what may be the beginning of a stop text."""
        if self.finish_reason:
            return len(self.text)
        longest = max(map(len, self.stop), default=1) - 1
        return next(
            (
                at
                for at in range(max(0, len(self.text) - longest), len(self.text))
                if any(stop.startswith(self.text[at:]) for stop in self.stop)
            ),
            len(self.text),
        )


@torch.inference_mode()
def generate(model, samples, max_new_tokens, sampling, log_probs=False, context=None, static=False):
    """Draw up to max_new_tokens for each of the samples, all in one batch; yields after every token.

    What was drawn is in the samples. log_probs: fill them in too. context: one with as many rows as there are samples, which go on
    from what it has read; it is left having read all but the last token drawn. static: for a compiled model, keep finished samples
    in the batch, so that no shape changes. Raises UserError if the model's output is not numbers.
    """
    if context is None:
        columns = model.config.block_size if static else max(len(sample.prompt) for sample in samples) + max_new_tokens
        context = Context(model, len(samples), columns, static)
    live, new = list(samples), [sample.prompt for sample in samples]
    occurred = chosen = None
    for n in range(max_new_tokens):
        logits = context.read(new, chosen)
        if sampling.repetition_penalty != 1:
            if occurred is None:
                occurred = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
                new = context.rows
            for row, ids in zip(occurred, new):
                row[ids] = True
        if n % DRAWS == 0:
            draws = [uniforms(DRAWS, (*sample.seed, n // DRAWS)) for sample in live]
            draws = torch.stack(draws, dim=1).to(context.device)  # (DRAWS, B)
        chosen = sampling.choose(logits, draws[n % DRAWS], occurred)
        ids = chosen.tolist()  # waits for the device
        V = logits.size(-1)
        if max(ids) >= min(sampling.vocab_size or V, V):
            raise UserError(
                'the model computes numbers that are not finite: its weights are broken, or --dtype is too narrow for them'
            )
        drawn = [None] * len(ids)
        if log_probs:
            drawn = (
                logits[:, : sampling.vocab_size]
                .float()
                .log_softmax(dim=-1)
                .gather(-1, chosen[:, None])
                .squeeze(-1)
                .tolist()
            )
        for sample, token, log_prob in zip(live, ids, drawn):
            if sample.finish_reason is None:
                sample.add(token, log_prob)
                if n + 1 == max_new_tokens:
                    sample.finish('length')
        new = [[token] for token in ids]
        yield
        going = [r for r, sample in enumerate(live) if sample.finish_reason is None]
        if not going:
            return
        if len(going) < len(live) and not static:
            context.keep(going)
            live, new, draws, chosen = [live[r] for r in going], [new[r] for r in going], draws[:, going], chosen[going]
            occurred = None if occurred is None else occurred[going]
