"""Generating tokens from a model: what the model sees, how a token is chosen, when a sample is finished.

What the model sees. A model reads at most block_size tokens. Of a longer text it sees the part from `window_start` on,
which moves in steps of half a block. So between half a block and a whole block of context is visible at any time, and
the cache of keys and values is recomputed only once per half block. Positions count from the window's start, as in
training; this holds for every position encoding.

What a sample depends on: the model, its own prompt, the settings, the seed and its own number. It does not depend on
the rest of the batch, nor on how often the cache was recomputed. But sums are rounded differently in batches of other
sizes or lengths, which in bfloat16 and int8 is coarse enough to change a token now and then.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from common.device import uncompiled
from common.errors import UserError, warn
from dataloader import random_words
from tokenizer import TextStream, load_tokenizer

UNIFORMS_AT_ONCE = 1024  # random numbers made at once for each sample
TOKENS_AT_ONCE = 2048  # of a prompt: activations and masks of more would take gigabytes


class KVCache:
    """Keys and values of the tokens that a batch has read, so that one more token costs one position, not all of them.

    The token at position p of a row lies in column p; rows may have different lengths. Call extend(T) before the model
    reads T more tokens of every row. A row with fewer new tokens is padded at the end: set `lengths` back to the true
    numbers afterwards, and the padding is overwritten before any later token attends to it.
    static=True keeps every shape and address the same from token to token, as a compiled model wants; attention then
    computes the empty columns too.
    """

    def __init__(self, config, rows: int, columns: int, device=None, dtype=None, static: bool = False):
        """config: GPTConfig. rows: sequences in the batch. columns: tokens that fit into each."""
        shape = (2, rows, config.kv_heads, columns, config.head_dim)  # keys and values
        # zeros, as a masked column must not hold NaN
        self.layers = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.lengths = [0] * rows  # tokens in each row
        self.row_ids = torch.arange(rows, device=device)[:, None]
        self.column_ids = torch.arange(columns, device=device)
        self.static = static
        if static:
            self.static_positions = torch.zeros(rows, 1, dtype=torch.long, device=device)
            for tensor in (*self.layers, self.static_positions):  # so that a CUDA graph writes into it, not into a copy
                torch._dynamo.mark_static_address(tensor, guard=False)

    def extend(self, T: int):
        """Reserve the next T columns of every row; sets `positions`, (T,) or (B, T), and `end`, the number of columns
        in use, for the model's next call. ValueError if the columns do not suffice."""
        first, columns = self.lengths[0], len(self.column_ids)
        self.end = max(self.lengths) + T
        if self.end > columns:
            raise ValueError(f'{self.end} tokens do not fit into {columns} columns')
        self.span = None  # of the new columns, where it is the same in all rows
        if self.static and T == 1:
            self.end = columns
            self.positions = self.static_positions.copy_(torch.tensor(self.lengths)[:, None])
        elif self.end == min(self.lengths) + T:
            self.span = (first, T)
            self.positions = self.column_ids[first : self.end]
        else:
            positions = torch.tensor(self.lengths)[:, None] + torch.arange(T)
            self.positions = positions.to(self.column_ids.device)
        self.lengths = [length + T for length in self.lengths]

    def update(self, layer, k, v):
        """Store the keys and values of the new tokens, (B, nkv, T, hs) each -> those of all tokens, (B, nkv, S, hs)."""
        for stored, new in zip(self.layers[layer], (k, v)):
            if self.span is not None:
                stored.narrow(2, *self.span).copy_(new)
            else:
                stored[self.row_ids, :, self.positions] = new.transpose(1, 2).to(stored.dtype)
        return self.layers[layer].narrow(3, 0, self.end).unbind()

    def put(self, rows, other, other_rows):
        """Replace row rows[i] by row other_rows[i] of another cache, for each i."""
        width = len(other.column_ids)
        for mine, its in zip(self.layers, other.layers):
            mine[:, rows, :, :width] = its[:, other_rows]
        for row, other_row in zip(rows, other_rows):
            self.lengths[row] = other.lengths[other_row]

    def keep(self, rows):
        """Forget all rows but these."""
        self.layers = [stored[:, rows] for stored in self.layers]
        self.row_ids = self.row_ids[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


def window_start(n_tokens: int, block_size: int) -> int:
    """The first of n_tokens that the model still sees when it generates the next one."""
    step = max(1, block_size // 2)
    return max(0, -(-(n_tokens - block_size) // step) * step)  # rounded up


class Context:
    """Rows of tokens and, in a cache, what the model computed from them."""

    @torch.inference_mode()
    def __init__(self, model, rows: int, columns: int, static: bool = False):
        """rows: sequences in the batch. columns: tokens of each for which there is memory from the start, at most
        block_size; more is taken as needed. static: as in KVCache, for a compiled model; only calls for a single token
        use the compiled function, and columns must suffice."""
        weight = model.transformer.wte.weight
        self.model, self.device = model, weight.device
        self.autocast = torch.is_autocast_enabled(weight.device.type)
        self.dtype = torch.get_autocast_dtype(weight.device.type) if self.autocast else weight.dtype
        columns = min(columns, model.config.block_size)
        self.cache = KVCache(model.config, rows, columns, self.device, self.dtype, static)
        self.forget()

    def forget(self):
        """Start again with empty rows."""
        n = len(self.cache.lengths)
        self.rows = [[] for _ in range(n)]
        self.starts, self.cache.lengths = [0] * n, [0] * n  # starts: of each row's window

    def read(self, new: list[list[int]], last: torch.Tensor | None = None) -> torch.Tensor:
        """Append one or more new tokens to each row -> logits (rows, V) for the next token.

        new: lists of ids, one per row. last: (rows,) int64, the last id of each row, where it is on the device already
        and need not be copied there.
        """
        behind, unread = [], None
        starts, lengths = self.starts, self.cache.lengths
        for r, (row, ids) in enumerate(zip(self.rows, new)):
            row.extend(ids)
            start = window_start(len(row), self.model.config.block_size)
            if start != starts[r]:  # the window moved on, or back after rewind()
                starts[r], lengths[r] = start, 0
            if starts[r] + lengths[r] < len(row) - 1:
                behind.append(r)  # the cache lacks more than the last token
        if behind:
            unread = [row[start + length :] for row, start, length in zip(self.rows, starts, lengths)]
            alike = len(set(map(len, unread))) == len(set(lengths)) == 1
            if not alike or len(set(map(tuple, unread))) < len(unread):
                self.catch_up(behind)
                unread = None
        if unread is None and last is not None:
            idx = last[:, None]
        else:
            idx = torch.tensor(unread or [row[-1:] for row in self.rows], device=self.device)  # (rows, T)
        self.reserve(max(self.cache.lengths) + idx.size(1))
        if self.cache.static and idx.size(1) == 1:
            self.cache.extend(1)
            torch.compiler.cudagraph_mark_step_begin()  # the last call's output is no longer needed
            return self.model(idx, cache=self.cache)[0][:, -1]
        return self.model.logits(self.fill(self.cache, idx))

    def fill(self, cache, idx):
        """Let the model read idx (rows, T) into a cache, in pieces -> the last token's hidden states (rows, C)."""
        for piece in idx.split(TOKENS_AT_ONCE, dim=1):
            cache.extend(piece.size(1))
            x = self.model.hidden(piece, cache=cache)
        return x[:, -1]

    def catch_up(self, behind):
        """Read all that the cache lacks of these rows except their last token. Equal rows are read once."""
        pieces = [tuple(self.rows[r][self.starts[r] : -1]) for r in behind]
        distinct = list(dict.fromkeys(pieces))
        width = max(map(len, distinct))
        part = KVCache(self.model.config, len(distinct), width, self.device, self.dtype)
        padded = [piece + (0,) * (width - len(piece)) for piece in distinct]
        self.fill(part, torch.tensor(padded, device=self.device))
        part.lengths = [len(piece) for piece in distinct]
        self.reserve(width)
        self.cache.put(behind, part, [distinct.index(piece) for piece in pieces])

    def reserve(self, columns: int):
        """Give the cache at least so many columns; it grows to twice its size, so that this is seldom needed."""
        n, has, config = len(self.rows), len(self.cache.column_ids), self.model.config
        if columns > has and not self.cache.static:
            larger = KVCache(config, n, min(config.block_size, max(columns, 2 * has)), self.device, self.dtype)
            larger.put(range(n), self.cache, range(n))
            self.cache = larger

    def rewind(self, row: int, n: int):
        """Forget all but the first n tokens of a row. What the window still sees of them need not be read again."""
        del self.rows[row][n:]
        self.cache.lengths[row] = max(0, min(self.cache.lengths[row], n - self.starts[row]))

    def keep(self, rows):
        """Forget all rows but these."""
        self.rows, self.starts = [self.rows[r] for r in rows], [self.starts[r] for r in rows]
        self.cache.keep(rows)


@dataclass
class Sampling:
    """How a token is chosen from logits, applied in Hugging Face's order. ValueError for values out of range."""

    temperature: float = 1.0  # divides the logits; 0: always the most likely token
    top_k: int = 0  # keep the k most likely tokens; 0: all
    top_p: float = 1.0  # keep the most likely tokens that together have this probability (Holtzman et al. 2020)
    min_p: float = 0.0  # keep tokens with p >= min_p * p_max (Nguyen et al. 2024)
    repetition_penalty: float = 1.0  # makes tokens that occurred less likely (Keskar et al. 2019); 1: no change
    vocab_size: int | None = None  # ids at or above this have no text, and are never chosen

    def __post_init__(self):
        if not (0 < self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError(
                f'top_p={self.top_p!r}, min_p={self.min_p!r}: must be above 0 and at most 1, and from 0 to 1'
            )

    def choose(self, logits, uniform, occurred=None) -> torch.Tensor:
        """Choose a token for each row by inverting the cumulative distribution at the row's uniform number.

        logits: (B, V). uniform: (B,) in [0, 1). occurred: (B, V) bool, tokens for the repetition penalty.
        Returns ids (B,); where the logits are NaN, the first invalid id: vocab_size, or V if that is smaller.
        """
        logits = logits[:, : self.vocab_size].float()
        n_ids = logits.size(-1)
        if occurred is not None and self.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(occurred[:, : self.vocab_size], penalized, logits)
        if self.temperature < 1e-6:  # dividing by so little would overflow
            largest, chosen = logits.max(dim=-1)
            return torch.where(largest.isnan(), n_ids, chosen)
        logits, ids, k = logits / self.temperature, None, min(self.top_k or n_ids, n_ids)
        if k < n_ids or self.top_p < 1 or self.min_p > 0:
            logits, ids = logits.topk(k)  # most likely first
        p = logits.softmax(dim=-1)
        if self.top_p < 1:
            p = p.masked_fill(p.cumsum(dim=-1) - p >= self.top_p, 0)
        if self.min_p > 0:
            p = p.masked_fill(p < self.min_p * p[:, :1], 0)
        edges = p.cumsum(dim=-1)  # (B, k)
        total = edges.narrow(-1, k - 1, 1)
        chosen = torch.searchsorted(edges, uniform.unsqueeze(-1) * total, right=True)  # edges at or below; k for NaN
        if ids is not None:
            chosen = F.pad(ids, (0, 1), value=n_ids).gather(-1, chosen)
        return chosen.squeeze(-1)


def uniforms(n: int, key: tuple) -> torch.Tensor:
    """n float32 numbers in [0, 1), a function of the key, a tuple of integers: the same on every device and version."""
    words = random_words(n, *key)
    numbers = np.minimum((words >> np.uint64(40)) / 2**24, 1 - 2**-23)  # below 1 even after rounding to float32
    return torch.from_numpy(numbers.astype(np.float32))


class Sample:
    """A prompt and the tokens generated after it.

    ids: the generated tokens. log_probs: the model's own log-probability of each, before temperature and filters.
    text: the text of the ids, up to a stop text if one occurred. finish_reason: None while it is unfinished, then
    'length', 'stop', 'end_of_text', or the argument of finish(). Without a tokenizer there is no text, and only the
    length ends a sample.
    """

    def __init__(self, prompt, seed=(0,), tokenizer=None, stop=(), end_of_text=None):
        """prompt: ids, at least one. seed: a tuple of integers, different for every sample. stop: texts that end the
        sample. end_of_text: the id that ends it, a set of such ids, or None."""
        self.prompt, self.seed, self.stop = list(prompt), seed, tuple(stop)
        self.ends = end_of_text if isinstance(end_of_text, set) else {end_of_text}
        self.ids, self.log_probs, self.text, self.finish_reason = [], [], '', None
        self.stream = TextStream(tokenizer) if tokenizer else None
        self.prompt_text = self.stream.push(self.prompt) + self.stream.flush() if tokenizer else ''

    def add(self, token, log_prob=None):
        """Append a generated token."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        if token in self.ends:
            self.finish('end_of_text')
        elif self.stream:
            searched = len(self.text)
            self.text += self.stream.push([token])
            ends = (self.text.find(stop, max(0, searched - len(stop) + 1)) for stop in self.stop)
            found = [end for end in ends if end >= 0]
            if found:
                self.text = self.text[: min(found)]
                self.finish_reason = 'stop'

    def finish(self, reason):
        """End the sample, unless it has ended."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.text += self.stream.flush() if self.stream else ''

    def settled(self):
        """The number of characters of `text` that no later token can take back: all but a possible beginning of a stop
        text."""
        if self.finish_reason:
            return len(self.text)
        longest = max(map(len, self.stop), default=1) - 1
        for at in range(max(0, len(self.text) - longest), len(self.text)):
            if any(stop.startswith(self.text[at:]) for stop in self.stop):
                return at
        return len(self.text)


@torch.inference_mode()
def generate(model, samples: list, max_new_tokens: int, sampling, log_probs=False, context=None, static=False):
    """Generate up to max_new_tokens for each sample, all in one batch; yields after every token.

    samples: list of Sample, which receive the tokens.
    sampling: a Sampling.
    log_probs: also fill in the samples' log_probs.
    context: a Context with one row per sample, to continue from; it ends having read all but the last token.
    static: for a compiled model, keep finished samples in the batch so that no shape changes.
    Raises UserError if the model's logits are NaN or infinite.
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
        if n % UNIFORMS_AT_ONCE == 0:
            numbers = [uniforms(UNIFORMS_AT_ONCE, (*sample.seed, n // UNIFORMS_AT_ONCE)) for sample in live]
            numbers = torch.stack(numbers, dim=1).to(context.device)  # (UNIFORMS_AT_ONCE, B)
        chosen = sampling.choose(logits, numbers[n % UNIFORMS_AT_ONCE], occurred)
        ids = chosen.tolist()  # waits for the device
        V = logits.size(-1)
        if max(ids) >= min(sampling.vocab_size or V, V):
            raise UserError("the model's logits are NaN or infinite: its weights are broken, or --dtype overflows")
        chosen_log_probs = [None] * len(ids)
        if log_probs:
            all_log_probs = logits[:, : sampling.vocab_size].float().log_softmax(dim=-1)
            chosen_log_probs = all_log_probs.gather(-1, chosen[:, None]).squeeze(-1).tolist()
        for sample, token, log_prob in zip(live, ids, chosen_log_probs):
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
            live, new = [live[r] for r in going], [new[r] for r in going]
            numbers, chosen = numbers[:, going], chosen[going]
            occurred = None if occurred is None else occurred[going]


def generate_rows(model, idx, max_new_tokens, **sampling):
    """nanoGPT's model.generate: rows of ids idx (B, T), T >= 1 -> (B, T + max_new_tokens). sampling: fields of
    Sampling. Seeded by torch's global generator."""
    samples = [Sample(row, seed=(int(torch.randint(2**62, ())), i)) for i, row in enumerate(idx.tolist())]
    for _ in generate(model, samples, max_new_tokens, Sampling(**sampling)):
        pass
    new = torch.tensor([sample.ids for sample in samples], dtype=idx.dtype, device=idx.device)
    return torch.cat((idx, new.view(len(idx), max_new_tokens)), dim=1)


def tokenizer_of_samples(data):
    """The tokenizer of a DataSet, for sample_texts; None, with a warning, if it does not say what its ids mean."""
    if data.tokenizer:
        return load_tokenizer(data.tokenizer)
    warn(f'no samples, as {data.path} does not say what its ids mean')
    return None


def sample_texts(model, tokenizer, n=3, max_new_tokens=200, start='\n') -> list[str]:
    """What the model writes after `start`, or after the first token of a vocabulary without it: n texts, always from
    the same random numbers, so that they can be compared. The model's mode and torch's random state stay as they were.
    An empty list, with a warning, if the model's logits are NaN or infinite."""
    n_ids = min(tokenizer.vocab_size, model.config.vocab_size)
    try:
        prompt = tokenizer.encode(start).tolist()
    except ValueError:  # a character that is not in the vocabulary
        prompt = []
    if not prompt or max(prompt) >= n_ids:
        prompt = [0]
    samples = [Sample(prompt, (i,), tokenizer, end_of_text=tokenizer.end_of_text) for i in range(n)]
    # all ranks compute a sharded model together, so all for as many tokens: this sample has no end before
    sharded = hasattr(model, 'unshard')
    pace = [Sample(prompt)] if sharded else []
    sampling = Sampling(temperature=0.8, top_k=200, vocab_size=n_ids)
    was_training = model.training
    model.eval()
    try:
        if sharded:
            model.unshard()  # embedding and head; its own call would do that, layers do it themselves
        with uncompiled():
            for _ in generate(model, samples + pace, max_new_tokens, sampling):
                pass
    except UserError as error:
        warn(f'no samples: {error}')
        return []
    finally:
        model.train(was_training)
        if sharded:
            model.reshard()
    return [sample.text for sample in samples]
