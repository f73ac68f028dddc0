"""Byte-level BPEs of the tokenizers library, encoded by tiktoken to the same ids, several times as fast."""

import random
import re
from itertools import groupby
from unicodedata import category, normalize

import numpy as np

# GPT-2 splits text by this pattern and merges bytes only within the pieces (Radford et al. 2019, OpenAI's encoder.py)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same, within what lies between digits: each digit, or each run of them, is a piece first (the library's Digits).
AMONG_DIGITS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


def byte_characters():
    """The character that represents each byte in a tokenizer.json, as in GPT-2's -> list of 256.

    Visible characters represent themselves, the other bytes get the characters 256 and up.
    """
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def merge_pairs(description):
    """The merges in a parsed tokenizer.json -> list of pairs of tokens. Old files write a pair as 'a b'."""
    merges = description['model'].get('merges') or ()
    return [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in merges]


class FastBPE:
    """Encodes as a byte-level BPE of the tokenizers library does. Made by fast_bpe."""

    def __init__(self, bpe, ids, added, normalizer):
        """bpe: a tiktoken.Encoding that knows the tokens by their ranks. ids: the id of each rank, -1 for none.
        added: the library's added tokens, {id: AddedToken}. normalizer: the library's, or None."""
        self.bpe, self.ids, self.normalizer = bpe, ids, normalizer
        self.added = {token.content: id for id, token in added.items()}
        self.special = {token.content for token in added.values() if token.special}
        longest_first = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile('|'.join(map(re.escape, longest_first)) or r'(?!)')

    def encode(self, text, special=False):
        """text, without lone surrogates -> ids, int32; None if only the library encodes it surely as the library does.

        special: special tokens are tokens, else text. The other added tokens are always tokens.
        """
        if not text.isascii() and any(category(char) == 'Cn' for char in set(text)):
            return None  # characters newer than Python's tables: one library may know them as letters, the other not
        parts, start = [], 0
        try:
            for match in self.pattern.finditer(text) if special or len(self.special) < len(self.added) else ():
                if special or match[0] not in self.special:
                    parts += [self.encode_plain(text[start : match.start()]), [self.added[match[0]]]]
                    start = match.end()
            parts.append(self.encode_plain(text[start:]))
        except ValueError:  # the pattern cannot match a million white-space characters in a row
            return None
        ids = np.concatenate(parts).astype(np.int32)
        return None if (ids < 0).any() else ids

    def encode_plain(self, text):
        """Text without added tokens -> ids."""
        if self.normalizer and not text.isascii():
            text = self.normalizer.normalize_str(text)
        return self.ids[self.bpe.encode_to_numpy(text, disallowed_special=())]


def fast_bpe(description: dict, library) -> FastBPE | None:
    """A tokenizer of the tokenizers library -> the same in tiktoken, None if the ids might differ.

    description: its parsed tokenizer.json. library: the tokenizers.Tokenizer made of it.

    Both apply the merge of the lowest rank first, the leftmost of several. The library knows merges as pairs, tiktoken
    as the bytes that they make, and tiktoken takes a piece that is a token as it is. That is the same if merging the
    bytes of each token makes that token: two neighbours in a text are tokens that merging their bytes alone also makes,
    so no other pair can make it. The library's ignore_merges also takes a piece that is a token as it is; then merging
    may get stuck, but not at two parts, which tiktoken would merge.
    """
    try:
        import tiktoken

        pattern = split_pattern(description['pre_tokenizer'])
        tokens = mergeable_tokens(description, library)
        added = library.get_added_tokens_decoder()
        if not pattern or not tokens or not added_tokens_are_plain(added, library.normalizer, description):
            return None
        ranks = {**{bytes((byte,)): byte for byte in range(256)}, **{t: 256 + n for n, t in enumerate(tokens)}}
        vocab, char = description['model']['vocab'], byte_characters()
        ids = np.array([vocab.get(char[byte], -1) for byte in range(256)] + list(tokens.values()), dtype=np.int64)
        if added.keys() & set(ids.tolist()):  # text may spell a special token, and the library would give its id
            return None
        fast = FastBPE(
            tiktoken.Encoding('fast', pat_str=pattern, mergeable_ranks=ranks, special_tokens={}),
            ids,
            added,
            library.normalizer,
        )
    except (ImportError, KeyError, TypeError, AttributeError, ValueError):  # a file of another form
        return None
    return fast if encodes_alike(fast, library, list(tokens)) else None


def split_pattern(pre_tokenizer):
    """The pattern by which a pre_tokenizer of a tokenizer.json splits text, for tiktoken; None if there is none.

    Known are ByteLevel (GPT-2), Digits and ByteLevel (SmolLM2), Split and ByteLevel (Llama 3, Qwen2, Qwen3).
    """
    steps = pre_tokenizer['pretokenizers'] if pre_tokenizer['type'] == 'Sequence' else [pre_tokenizer]
    *before, last = steps
    if last['type'] != 'ByteLevel' or last['add_prefix_space'] or len(before) > 1:
        return None
    splits_again = last.get('use_regex', True)
    if not before:
        return GPT2_PATTERN if splits_again else None
    step = before[0]
    if step['type'] == 'Digits' and splits_again:
        return (r'\p{N}|' if step['individual_digits'] else r'\p{N}+|') + AMONG_DIGITS
    keeps_matches = (step.get('behavior'), step.get('invert')) in (('Isolated', False), ('Removed', True))
    if step['type'] == 'Split' and keeps_matches and not splits_again:
        return step['pattern'].get('Regex')
    return None


def mergeable_tokens(description, library):
    """The tokens that text can become, other than bytes and added tokens, in the order of their merges -> {bytes: id}.

    None unless tiktoken, which merges by this order, makes the same of every piece, see fast_bpe.
    """
    model, vocab = library.model, description['model']['vocab']
    odd = model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix
    char = byte_characters()
    if type(model).__name__ != 'BPE' or odd or any(char[byte] not in vocab for byte in range(32, 127)):
        return None
    joined = [''.join(pair) for pair in merge_pairs(description)]
    tokens = [token for token, _ in groupby(joined)]  # merges that make the same token follow one another
    ignores_merges = getattr(model, 'ignore_merges', False)
    if ignores_merges:
        known = {*tokens, *char}
        tokens += [token for token in vocab if token not in known]
    if len(set(tokens)) != len(tokens) or '' in tokens or set(tokens) & set(char):
        return None
    try:
        if ignores_merges:
            model.ignore_merges = False
        parts = [len(model.tokenize(token)) for token in tokens]
    finally:
        if ignores_merges:
            model.ignore_merges = True
    if any(n == 2 if ignores_merges else n != 1 for n in parts):
        return None
    # each character stands for a byte; one that does not becomes one that Latin-1 cannot encode, a ValueError
    table = {**dict.fromkeys(range(256), 0x100), **{ord(c): byte for byte, c in enumerate(char)}}
    return {token.translate(table).encode('latin-1'): vocab[token] for token in tokens}


def added_tokens_are_plain(added, normalizer, description):
    """Are the added tokens found in a text wherever it spells them, the longest first, and the rest of it normalized to
    NFC or not at all?"""
    flags = {token.normalized for token in added.values()}
    if normalizer and (description['normalizer']['type'] != 'NFC' or True in flags):
        return False
    odd = any(token.lstrip or token.rstrip or token.single_word or not token.content for token in added.values())
    return not odd and len(flags) <= 1


def encodes_alike(fast, library, tokens):
    """Do both give the same ids for texts of all kinds? Each library has its own Unicode tables and its own dialect of
    regular expressions, which depend on its version."""
    for special in (False, True):
        library.encode_special_tokens = not special
        for text in probing_texts(fast, tokens):
            ids = fast.encode(text, special)
            if ids is not None and ids.tolist() != library.encode(text, add_special_tokens=False).ids:
                return False
    return True


def probing_texts(fast, tokens):
    """Yield texts in which splitting, merging, normalizing or finding added tokens may go wrong; always the same."""
    rng = random.Random(0)
    chars = [chr(code) for code in range(0x80, 0x33000, 97)]
    chars = [char for char in chars if category(char) not in ('Cn', 'Cs')]
    yield ''.join(f'a{char}1{char}.{char} {char}\n{char}' for char in chars)
    for code in range(128):
        yield f'a{chr(code)}1{chr(code)}.{chr(code)} {2 * chr(code)}\n{chr(code)}'
    pieces = [token.decode('utf-8', 'ignore') for token in rng.sample(tokens, min(len(tokens), 300))]
    pieces += [' ', '   ', '\n', '\n\n', '\r\n', '\t', '\u3000', '\x85', '\xa0', '\u200b', "'s", "'LL", "'\u017f", '__']
    pieces += [
        '1',
        '23',
        '456789',
        '٣',
        '²',
        'Ⅷ',
        'e\u0301',
        normalize('NFD', 'Å한'),
        'ﬁ',
        '漢字',
        '😀',
        '👨‍👩‍👧',
        '...',
        '/',
    ]
    pieces += [token[:end] for token in list(fast.added)[:100] for end in (None, -1)]
    for _ in range(100):
        yield ''.join(rng.choices(pieces, k=20))
