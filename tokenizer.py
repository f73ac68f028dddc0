"""Text to token ids and back.

A tokenizer is described by a spec, a small dict that is stored with the data set and in every checkpoint:
    {'kind': 'char', 'chars': 'abc…'}                                    one id per character
    {'kind': 'byte'}                                                     one id per byte
    {'kind': 'gpt2'}                                                     GPT-2's BPE
    {'kind': 'bpe', 'json': '…'}                                         a BPE trained here
    {'kind': 'tokenizers', 'json': '…', 'end_of_text': '</s>'}           any other tokenizer of the tokenizers library
'json' is the content of a tokenizer.json; 'end_of_text' is optional. Any spec may also carry what a model's tokenizer
files say beside the ids:
    'chat_template': '{% for …'                                          how messages become text, in Jinja
    'special_tokens': {'bos_token': '<s>', 'eos_token': '</s>'}          tokens by role, see SPECIAL_TOKENS
tokenizer_files.py reads specs from other people's files, and writes them there.
"""

import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import contextmanager

import numpy as np

from common.byte_bpe import GPT2_PATTERN, byte_characters, fast_bpe, merge_pairs
from common.errors import UserError, one_line, warn

GPT2_VOCAB_SIZE = 50257
GPT2_SPEC = {'kind': 'gpt2'}
GPT2_FILES = ('vocab.bpe', 'encoder.json')  # that tiktoken downloads
GPT2_FINGERPRINT = 'f5b6a7fc254ad51111d01578f18dd2d76307c562f14b0f3e7c0346c221607ec3'  # see fingerprint
MAX_VOCAB_SIZE = 10**7  # ids in a tokenizer.json: lists of this length still fit into memory
MAX_TEMPLATE = 10**6  # characters of a chat template; real ones have a few thousand
SPECIAL_TOKENS = ('bos_token', 'eos_token', 'unk_token', 'pad_token')
END_OF_TEXT = '<|endoftext|>'
FAST_AFTER = 100_000  # characters encoded, after which making the faster encoder pays


def replace_surrogates(text: str) -> str:
    """Replace each lone surrogate by U+FFFD. JSON and broken file names can hold them; UTF-8 cannot encode them."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


class CharTokenizer:
    """One id per character, in the order of `chars`. Lossless."""

    end_of_text = None  # the id that ends a text, if there is one
    prefix = []  # the ids that a model wants before a text, such as Llama's BOS

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars)
        self.codes = np.array([ord(c) for c in chars], dtype=np.uint32)  # id -> code point
        self.ids = np.full(self.codes.max() + 1, -1, dtype=np.int32)  # code point -> id or -1
        self.ids[self.codes] = np.arange(len(chars))

    @classmethod
    def train(cls, text):
        """A tokenizer of the characters in a text, in the order of their code points."""
        return cls(''.join(sorted(set(text))))

    def encode(self, text, special=False):
        """text -> ids, int32 (len(text),). ValueError names the first unknown character. No token is special."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        unknown = (ids < 0) | (codes >= len(self.ids))
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(
                f'the character {text[position]!r} at position {position} is not among the '
                f'{self.vocab_size} that the model knows: {one_line(repr(self.chars), 200)}'
            )
        return ids

    def decode(self, ids):
        """ids -> text."""
        return ''.join(self.chars[i] for i in ids)

    def token_bytes(self):
        """Bytes of text per id -> int (vocab_size,)."""
        return np.array([len(c.encode('utf-8', 'surrogatepass')) for c in self.chars])

    def spec(self):
        return {'kind': 'char', 'chars': self.chars}


class ByteTokenizer:
    """UTF-8: the ids 0 to 255 are bytes, 256 ends a text. Encodes any text without training."""

    vocab_size, end_of_text, prefix = 257, 256, []

    def encode(self, text, special=False):
        """text -> ids, int32. special: '<|endoftext|>' is the token, else text. Lone surrogates become U+FFFD."""
        text = replace_surrogates(text)
        ids = []
        for n, part in enumerate(text.split(END_OF_TEXT) if special else [text]):
            ids += [[self.end_of_text]] * (n > 0) + [np.frombuffer(part.encode(), dtype=np.uint8)]
        return np.concatenate(ids).astype(np.int32)

    def decode(self, ids):
        """ids -> text; invalid UTF-8 becomes U+FFFD."""
        return b''.join(bytes((i,)) if i < 256 else END_OF_TEXT.encode() for i in ids).decode('utf-8', 'replace')

    def token_bytes(self):
        """Bytes of text per id, 0 for the end of text -> int (257,)."""
        return (np.arange(self.vocab_size) < self.end_of_text).astype(np.int64)

    def spec(self):
        return {'kind': 'byte'}


class TiktokenTokenizer:
    """A byte-level BPE run by tiktoken: GPT-2's, or one trained here (see load_bpe)."""

    prefix = []

    def __init__(self, bpe, spec):
        self.bpe, self._spec = bpe, spec
        self.vocab_size, self.end_of_text = bpe.n_vocab, bpe.eot_token

    def encode(self, text, special=False):
        """text -> ids, int32. special: '<|endoftext|>' is the token, else text. Lone surrogates become U+FFFD."""
        text = replace_surrogates(text)
        try:
            ids = self.bpe.encode_to_numpy(text, allowed_special='all' if special else set(), disallowed_special=())
        except ValueError:  # the pattern cannot match a million white-space characters in a row: encode half at a time
            half = len(text) // 2
            if not half:
                raise
            return np.concatenate((self.encode(text[:half], special), self.encode(text[half:], special)))
        return ids.astype(np.int32)

    def decode(self, ids):
        """ids -> text; invalid UTF-8 becomes U+FFFD."""
        return self.bpe.decode(list(ids))

    def token_bytes(self):
        """Bytes of text per id, 0 for the end of text -> int (vocab_size,)."""
        lengths = [len(self.bpe.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        lengths[self.end_of_text] = 0
        return np.array(lengths)

    def spec(self):
        return self._spec


@functools.cache
def load_gpt2():
    """GPT-2's tokenizer, loaded once per process. tiktoken downloads the vocabulary once per machine."""
    try:
        bpe = import_tiktoken('the GPT-2 vocabulary').get_encoding('gpt2')
    except UserError:
        raise
    except Exception as error:  # of requests, OSError or ValueError, depending on what failed
        raise UserError(
            'tiktoken cannot load the GPT-2 vocabulary; it needs the network once, or TIKTOKEN_CACHE_DIR '
            f'naming a folder that has it ({type(error).__name__})'
        ) from error
    return TiktokenTokenizer(bpe, GPT2_SPEC)


def gpt2_is_cached() -> bool:
    """Has tiktoken downloaded GPT-2's vocabulary to where it looks now?"""
    default = os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    folder = os.environ.get('TIKTOKEN_CACHE_DIR', os.environ.get('DATA_GYM_CACHE_DIR', default))
    urls = (f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{name}' for name in GPT2_FILES)
    return all(os.path.exists(os.path.join(folder, hashlib.sha1(url.encode()).hexdigest())) for url in urls)


def load_bpe(spec):
    """Load a BPE trained here from its spec. ValueError if its tokenizer.json is that of any other tokenizer.

    tiktoken encodes several times as fast as the tokenizers library. The library applies its list of merges in order;
    tiktoken merges the pair of neighbours whose union has the lowest id. Both give the same ids for a vocabulary
    learned by merging, because its ids follow the order of the merges.
    """
    tiktoken = import_tiktoken('this vocabulary')
    try:
        vocab = json.loads(spec['json'])['model']['vocab']
        end_of_text = vocab[END_OF_TEXT]
        byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        ranks = {bytes(byte_of[char] for char in token): id for token, id in vocab.items() if token != END_OF_TEXT}
        if (
            not all(type(id) is int for id in vocab.values())
            or sorted(vocab.values()) != list(range(len(vocab)))
            or not all(bytes((byte,)) in ranks for byte in range(256))
            or b'' in ranks
        ):
            raise ValueError('its ids have gaps, or some bytes have no id')
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(
            f'not the tokenizer.json of a byte-level BPE trained here: {one_line(repr(error), 100)}'
        ) from error
    bpe = tiktoken.Encoding(
        'bpe', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text}
    )
    return TiktokenTokenizer(bpe, spec)


def train_bpe(texts: Iterable[str], vocab_size: int) -> dict:
    """Train a byte-level BPE on an iterable of texts -> its spec.

    vocab_size counts the 256 bytes, the end of text and the merges. Sennrich et al. 2016, on bytes as in GPT-2, by the
    tokenizers library; the same texts give the same tokenizer. UserError if the package is missing or the texts are too
    short for that many merges.
    """
    if not 257 <= vocab_size <= 10**6:
        raise UserError(f'--vocab_size={vocab_size}: must be from 257 (256 bytes and the end of text) to 1,000,000')
    import_tokenizers('training a BPE')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [END_OF_TEXT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f'--vocab_size={vocab_size}: the text is enough for {tokenizer.get_vocab_size()} only; lower it'
        )
    return {'kind': 'bpe', 'json': tokenizer.to_str()}


def import_tiktoken(what):
    """Import tiktoken; UserError says what needs it if it is missing."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f'{what} needs the package tiktoken: pip install tiktoken') from error
    return tiktoken


def import_tokenizers(what):
    """Import tokenizers; UserError says what needs it if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f'{what} needs the package tokenizers: pip install tokenizers') from error
    return tokenizers


@contextmanager
def library_errors(what):
    """Turn what the tokenizers library raises in the block into ValueError: plain Exception, or a panic of its own."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != 'PanicException':
            raise  # Ctrl-C
        raise ValueError(f'{what}: {error}') from error


class HuggingFaceTokenizer:
    """Any tokenizer of the tokenizers library, from the content of its tokenizer.json."""

    def __init__(self, spec):
        """spec: its 'json' is the content of a tokenizer.json, its 'end_of_text' the token that ends a text; without
        the latter, that is '<|endoftext|>' if the vocabulary has it.

        ValueError if it is not a tokenizer or lacks that token.
        """
        tokenizers = import_tokenizers('this tokenizer')
        self._spec, self.json, end_of_text = spec, spec['json'], spec.get('end_of_text')
        with library_errors('not a tokenizer.json of the tokenizers library'):
            self.tokenizer = tokenizers.Tokenizer.from_str(self.json)
        self.tokenizer.no_truncation()  # some files ask for the context length of a model
        self.tokenizer.no_padding()
        self.tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)  # see encode_with_offsets
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f'its ids go up to {self.vocab_size - 1}')
        # without the tokens added after the vocabulary
        self.text_vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        description = json.loads(self.json)
        self.drops_unknown = drops_unknown(description)
        added = self.tokenizer.get_added_tokens_decoder()
        self.special = {id: token.content for id, token in added.items() if token.special}
        self.end_of_text = self.tokenizer.token_to_id(end_of_text or END_OF_TEXT)
        if end_of_text and self.end_of_text is None:
            raise ValueError(f'its end of text, {end_of_text!r}, is not in the vocabulary')
        self.encoded = 0  # characters, see encode
        self.missing_bytes = None  # a pattern, see encode
        if is_byte_level(description) and not getattr(self.tokenizer.model, 'unk_token', None):
            known = self.tokenizer.get_vocab()
            missing = bytes(byte for byte, char in enumerate(byte_characters()) if char not in known)
            self.missing_bytes = re.compile(b'[' + re.escape(missing) + b']') if missing else None

    @functools.cached_property
    def fast(self):
        """The same tokenizer in tiktoken, None if that would not give the same ids."""
        return fast_bpe(json.loads(self.json), self.tokenizer)

    @functools.cached_property
    def prefix(self):
        """The ids that the model wants before a text, such as Llama's BOS, [] for none."""
        processor = json.loads(self.json).get('post_processor') or {}
        steps = processor.get('processors', [processor])
        template = next((step for step in steps if step.get('type') == 'TemplateProcessing'), {'single': []})
        before = itertools.takewhile(lambda piece: 'SpecialToken' in piece, template['single'])
        return [id for piece in before for id in template['special_tokens'][piece['SpecialToken']['id']]['ids']]

    def encode(self, text, special=False):
        """text -> ids, int32. special: special tokens such as '<|endoftext|>' are tokens, else text. Lone surrogates
        become U+FFFD.

        ValueError names the first character that the tokenizer has no token for. Some byte-level vocabularies lack
        bytes that were not in their training text, and models are trained without them: these are left out, with one
        line of warning.
        """
        text = replace_surrogates(text)
        self.warn_of_missing(text)
        self.encoded += len(text)
        ids = self.fast.encode(text, special) if self.encoded > FAST_AFTER and self.fast else None
        return self.encode_by_library(text, special) if ids is None else ids

    def encode_with_offsets(self, text):
        """text with its special tokens -> ids, and where in the text each token starts and ends, int (T,) each. White
        space that a special token takes from around it is not counted. Errors as in encode."""
        text = replace_surrogates(text)
        self.warn_of_missing(text)
        encoded = self.library_encoding(text, special=True)
        offsets = encoded.offsets
        for n, id in enumerate(encoded.ids):
            if id in self.special:
                start = text.find(self.special[id], *offsets[n])
                offsets[n] = offsets[n] if start < 0 else (start, start + len(self.special[id]))
        starts, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        return np.array(encoded.ids, dtype=np.int32), starts, ends

    def warn_of_missing(self, text):
        """Say once if the text has bytes that the vocabulary lacks."""
        if self.missing_bytes and self.missing_bytes.search(text.encode()):
            lost = self.missing_bytes.search(text.encode())[0]
            warn(f'the tokenizer has no token for the byte {lost!r} and possibly others: they are left out of the text')
            self.missing_bytes = None

    def library_encoding(self, text, special):
        """text -> the library's Encoding."""
        self.tokenizer.encode_special_tokens = not special
        with library_errors('the tokenizer cannot encode this text'):
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
        if self.drops_unknown:
            known = np.zeros(len(text), dtype=bool)
            for start, end in encoded.offsets:
                known[start:end] = True
            lost = next((i for i, char in enumerate(text) if not known[i] and not char.isspace()), None)
            if lost is not None:
                raise ValueError(f'the tokenizer has no token for the character {text[lost]!r} at position {lost}')
        return encoded

    def encode_by_library(self, text, special):
        ids = self.library_encoding(text, special).ids
        words = [] if special else [self.special[id] for id in self.special.keys() & set(ids)]
        words = [word for word in words if len(word) > 1]
        if words:
            # The vocabulary also has special tokens as words. Where the text spells one, encode the parts before and
            # after its first character separately, so that it stays text. The library would give the token.
            cuts = [0, *(match.start() + 1 for match in re.finditer('|'.join(map(re.escape, words)), text)), len(text)]
            if len(cuts) > 2:
                return np.concatenate(
                    [self.encode_by_library(text[start:end], False) for start, end in zip(cuts, cuts[1:])]
                )
        return np.array(ids, dtype=np.int32)

    def decode(self, ids):
        """ids -> text, including special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self):
        """Bytes of text per id, 0 for special tokens -> int (vocab_size,); None if the tokenizer is not byte-level."""
        if not is_byte_level(json.loads(self.json)):
            return None
        lengths = [len(self.tokenizer.id_to_token(i) or '') for i in range(self.vocab_size)]  # a character per byte
        for id, token in self.tokenizer.get_added_tokens_decoder().items():
            lengths[id] = 0 if token.special else len(token.content.encode())
        return np.array(lengths)

    def spec(self):
        return self._spec


def drops_unknown(description):
    """Does the library silently skip unknown characters with this parsed tokenizer.json?"""
    model = description['model']
    return (
        not is_byte_level(description)
        and not model.get('unk_token')
        and not model.get('byte_fallback')
        and model.get('unk_id') is None
    )


def is_byte_level(description):
    """Are the tokens of a parsed tokenizer.json bytes, written as byte_characters()?"""
    return (description.get('decoder') or {}).get('type') == 'ByteLevel'


class TextStream:
    """Decodes ids as they arrive: a character is returned once all of its bytes are there.

    The pieces joined are the text of all the ids decoded at once.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before = []  # ids of the last piece: some tokenizers need them to put the right space before the next
        self.pending = []  # ids not returned yet

    def push(self, ids):
        """Add ids -> the text that they complete, possibly ''."""
        self.pending.extend(ids)
        text = self.tokenizer.decode(self.before + self.pending)
        if text.endswith('\ufffd'):  # an incomplete character
            return ''
        return self.emit(text)

    def flush(self):
        """The rest of the text; an incomplete character is U+FFFD."""
        return self.emit(self.tokenizer.decode(self.before + self.pending)) if self.pending else ''

    def emit(self, text):
        piece = text[len(self.tokenizer.decode(self.before)) :]
        self.before, self.pending = self.pending, []
        return piece


def spec_vocab_size(spec: dict) -> int:
    """Vocabulary size of a valid spec; loads the tokenizer only if it must."""
    if spec['kind'] == 'char':
        return len(spec['chars'])
    return GPT2_VOCAB_SIZE if spec['kind'] == 'gpt2' else load_tokenizer(spec).vocab_size


def spec_end_of_text(spec: dict) -> int | None:
    """The id that ends a text, None if there is none; loads the tokenizer only if it must."""
    return GPT2_VOCAB_SIZE - 1 if spec['kind'] == 'gpt2' else load_tokenizer(spec).end_of_text


def text_vocab_size(spec: dict) -> int:
    """Vocabulary size without tokens added after the vocabulary, such as padding, which a model may lack."""
    return load_tokenizer(spec).text_vocab_size if spec['kind'] == 'tokenizers' else spec_vocab_size(spec)


def check_known(ids: list[int], vocab_size: int, tokenizer):
    """Raise ValueError, naming the token, if a model with vocab_size ids lacks one of these, see text_vocab_size."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f'the model has no token {tokenizer.decode([largest])!r}: it has {vocab_size} ids, this is the id {largest}'
        )


def same_ids(spec: dict, other: dict) -> bool:
    """Can ids of one tokenizer be used with the other: same tokens, merged in the same order?

    `other` may have more tokens, added after its vocabulary. Takes valid specs; ValueError if one cannot be loaded.
    """
    if spec == other:
        return True
    checksum, n, _ = fingerprint(spec)
    other_checksum, other_n, other_text_n = fingerprint(other, n)
    return other_text_n <= n <= other_n and checksum == other_checksum


def fingerprint(spec, n=None):
    """Checksum of a tokenizer's first n tokens (default: all) and its merges -> checksum, vocab_size, text_vocab_size.

    It does not depend on how the JSON is written. GPT-2's is a constant, because its vocabulary may not be available.
    """
    if spec['kind'] == 'gpt2':
        return GPT2_FINGERPRINT if n in (None, GPT2_VOCAB_SIZE) else None, GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE
    tokens, merges, text_n = tokens_and_merges(spec)
    size = max(tokens) + 1
    content = repr(([tokens.get(id) for id in range(n or size)], merges))
    return hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest(), size, text_n


def tokens_and_merges(spec):
    """The vocabulary of a spec other than 'gpt2' -> tokens, merges, text_vocab_size.

    tokens: {id: bytes}, or {id: str} if the tokenizer is not byte-level.
    merges: the ids that the merges make, in the order of the merges.
    """
    if spec['kind'] == 'char':
        return dict(enumerate(spec['chars'])), [], len(spec['chars'])
    if spec['kind'] == 'byte':
        return {**{byte: bytes((byte,)) for byte in range(256)}, 256: END_OF_TEXT.encode()}, [], 257
    tokenizer, description = HuggingFaceTokenizer(spec), json.loads(spec['json'])
    byte_of = {char: byte for byte, char in enumerate(byte_characters())} if is_byte_level(description) else {}
    ids = tokenizer.tokenizer.get_vocab()
    tokens = {id: token for token, id in ids.items()}
    for id, token in tokens.items():
        if byte_of.keys() >= set(token):
            tokens[id] = bytes(map(byte_of.get, token))
    for id, token in tokenizer.tokenizer.get_added_tokens_decoder().items():  # stored as plain text
        tokens[id] = token.content.encode('utf-8', 'surrogatepass') if byte_of else token.content
    return tokens, [ids.get(''.join(pair)) for pair in merge_pairs(description)], tokenizer.text_vocab_size


def check_spec(spec: object) -> dict:
    """Return a spec if it is valid, else raise ValueError. Anyone may have written the file it comes from."""
    if not isinstance(spec, dict) or spec.get('kind') not in ('char', 'byte', 'gpt2', 'bpe', 'tokenizers'):
        raise ValueError(f'unknown kind of tokenizer: {one_line(repr(spec), 100)}')
    if spec['kind'] == 'char':
        chars = spec.get('chars')
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError("a character tokenizer needs 'chars', a text without repeated characters")
    if spec['kind'] in ('bpe', 'tokenizers') and not isinstance(spec.get('json'), str):
        raise ValueError("a tokenizer of the tokenizers library needs 'json', the content of its tokenizer.json")
    if not isinstance(spec.get('end_of_text', ''), str):
        raise ValueError("'end_of_text' of a tokenizer must be the text of a token")
    template = spec.get('chat_template', '')
    if not isinstance(template, str) or len(template) > MAX_TEMPLATE:
        raise ValueError(f"'chat_template' of a tokenizer must be a text of at most {MAX_TEMPLATE:,} characters")
    named = spec.get('special_tokens', {})
    if not isinstance(named, dict) or not all(
        role in SPECIAL_TOKENS and isinstance(token, str) and len(token) <= 1000 for role, token in named.items()
    ):
        raise ValueError(
            f"'special_tokens' of a tokenizer may name {', '.join(SPECIAL_TOKENS)}, each the text of a token"
        )
    return spec


def load_tokenizer(spec):
    """Make the tokenizer of a spec. ValueError for an invalid spec, UserError for a missing package or vocabulary."""
    kind = check_spec(spec)['kind']
    if kind == 'char':
        return CharTokenizer(spec['chars'])
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'gpt2':
        return load_gpt2()
    return load_bpe(spec) if kind == 'bpe' else HuggingFaceTokenizer(spec)


def spec_from_meta(meta: dict) -> dict | None:
    """The spec in the description of a data set (see dataloader.read_meta).

    GPT-2's if it names neither tokenizer nor vocabulary, as with nanoGPT's GPT-2 bins; None if only the number of ids
    is known. ValueError if it is invalid.
    """
    if 'tokenizer' in meta:
        return check_spec(meta['tokenizer'])
    return spec_from_nanogpt(meta['nanogpt']) if 'nanogpt' in meta else GPT2_SPEC


def spec_from_nanogpt(meta: object) -> dict | None:
    """The spec for a nanoGPT meta.pkl, {'vocab_size': n, 'itos': {id: char}, 'stoi': {char: id}}.

    One of 'itos' and 'stoi' is enough. None unless each id has a character: ids may be words or notes, and nanoGPT
    then uses only vocab_size. ValueError if the content contradicts itself.
    """
    if not isinstance(meta, dict) or type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
        raise ValueError("it has no 'vocab_size', a positive integer")
    n, itos, stoi = meta['vocab_size'], meta.get('itos'), meta.get('stoi')
    if itos is None and isinstance(stoi, dict):
        itos = {id: char for char, id in stoi.items() if type(id) is int}
    if isinstance(itos, (list, tuple)):
        itos = dict(enumerate(itos))
    if itos is None:
        return None
    if not isinstance(itos, dict) or not all(type(id) is int and 0 <= id < n for id in itos):
        raise ValueError(f"its 'itos' does not map the ids 0 to {n - 1}")
    if len(itos) < n or not all(isinstance(char, str) and len(char) == 1 for char in itos.values()):
        return None
    if isinstance(stoi, dict) and any(stoi.get(char) != id for id, char in itos.items()):
        raise ValueError("its 'itos' and its 'stoi' contradict each other")
    return check_spec({'kind': 'char', 'chars': ''.join(itos[i] for i in range(n))})
