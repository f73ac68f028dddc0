"""Text to token ids and back. A tokenizer is described by a small dict (its spec) that is stored as data with the data set and in
every checkpoint: {'kind': 'char', 'chars': 'abc…'}, {'kind': 'byte'}, {'kind': 'gpt2'}, and, with the text of a tokenizer.json of the
tokenizers library, {'kind': 'bpe', 'json': '…'} for one trained here and {'kind': 'tokenizers', 'json': '…'} for any other."""
import functools
import json

import numpy as np

from configurator import UserError, one_line

GPT2_VOCAB_SIZE = 50257
GPT2_SPEC = {'kind': 'gpt2'}
END_OF_TEXT = '<|endoftext|>'


def replace_surrogates(text):
    """The text with each lone surrogate, which JSON and broken file names may hold, as U+FFFD: UTF-8 has no bytes for it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode('utf-16-le', 'surrogatepass').decode('utf-16-le', 'replace')


class CharTokenizer:
    """One id a character, in the order of `chars`. Decoding what was encoded gives the same text back."""
    end_of_text = None  # the id that ends a text, where there is one

    def __init__(self, chars):
        self.chars = chars
        self.vocab_size = len(chars)
        self.codes = np.array([ord(c) for c in chars], dtype=np.uint32)  # id -> code point
        self.ids = np.full(self.codes.max() + 1, -1, dtype=np.int32)  # code point -> id, -1 for none
        self.ids[self.codes] = np.arange(len(chars))

    @classmethod
    def train(cls, text):
        """The tokenizer of exactly the characters in the text, in code point order."""
        return cls(''.join(sorted(set(text))))

    def encode(self, text, special=False):
        """text -> ids, an int array (len(text),). Raises ValueError naming the first character not in the vocabulary. special is for
        the other tokenizers: here are no special tokens."""
        codes = np.frombuffer(text.encode('utf-32-le', 'surrogatepass'), dtype=np.uint32)
        ids = self.ids[np.minimum(codes, len(self.ids) - 1)]
        unknown = (ids < 0) | (codes >= len(self.ids))
        if unknown.any():
            position = int(unknown.argmax())
            raise ValueError(f'the character {text[position]!r} at position {position} is not among the '
                             f'{self.vocab_size} that the model knows: {one_line(repr(self.chars), 200)}')
        return ids

    def decode(self, ids):
        """ids -> text."""
        return ''.join(self.chars[i] for i in ids)

    def token_bytes(self):
        """The length of each token in bytes -> int array (vocab_size,)."""
        return np.array([len(c.encode('utf-8', 'surrogatepass')) for c in self.chars])

    def spec(self):
        return {'kind': 'char', 'chars': self.chars}


class ByteTokenizer:
    """UTF-8: the ids 0 to 255 are bytes, 256 ends a text. It knows every text, and nothing has to be learned for it."""
    vocab_size, end_of_text = 257, 256

    def encode(self, text, special=False):
        """text -> ids, an int array. special=True reads '<|endoftext|>' as the one token, else it is text like any other. A lone
        surrogate, which UTF-8 has no bytes for, becomes U+FFFD."""
        text = replace_surrogates(text)
        rows = [np.frombuffer(part.encode(), dtype=np.uint8) for part in (text.split(END_OF_TEXT) if special else [text])]
        return np.concatenate([rows[0], *(np.concatenate(([self.end_of_text], row)) for row in rows[1:])]).astype(np.int32)

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return b''.join(bytes((i,)) if i < 256 else END_OF_TEXT.encode() for i in ids).decode('utf-8', 'replace')

    def token_bytes(self):
        """The length of each token in bytes, 0 for the end of text -> int array (257,)."""
        return (np.arange(self.vocab_size) < self.end_of_text).astype(np.int64)

    def spec(self):
        return {'kind': 'byte'}


class TiktokenTokenizer:
    """A byte-level BPE in tiktoken's hands: GPT-2's 50,257 ids, or one that was trained here (see train_bpe)."""

    def __init__(self, bpe, spec):
        self.bpe, self._spec = bpe, spec
        self.vocab_size, self.end_of_text = bpe.n_vocab, bpe.eot_token

    def encode(self, text, special=False):
        """text -> ids, an int array. special=True reads '<|endoftext|>' as the one token, else it is text like any other. A lone
        surrogate, which UTF-8 has no bytes for, becomes U+FFFD."""
        text = replace_surrogates(text)
        try:
            ids = self.bpe.encode_to_numpy(text, **{'allowed_special': 'all'} if special else {'disallowed_special': ()})
        except ValueError:  # a million of white space in a row is more than its pattern can match
            half = len(text) // 2
            if not half:
                raise
            return np.concatenate((self.encode(text[:half], special), self.encode(text[half:], special)))
        return ids.astype(np.int32)

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.bpe.decode(list(ids))

    def token_bytes(self):
        """The length of each token in bytes, 0 for the end of text -> int array (vocab_size,)."""
        return np.array([0 if i == self.end_of_text else len(self.bpe.decode_single_token_bytes(i)) for i in range(self.vocab_size)])

    def spec(self):
        return self._spec


@functools.cache
def load_gpt2():
    """GPT-2's tokenizer, loaded once a process; tiktoken downloads the vocabulary once a machine."""
    try:
        bpe = import_tiktoken('the GPT-2 vocabulary').get_encoding('gpt2')
    except UserError:
        raise
    except Exception as error:  # requests' errors, OSError or ValueError, by what went wrong on the way
        raise UserError('tiktoken cannot load the GPT-2 vocabulary; it needs the network once, or TIKTOKEN_CACHE_DIR '
                        f'naming a folder that has it ({type(error).__name__})') from error
    return TiktokenTokenizer(bpe, GPT2_SPEC)


def load_bpe(json_text):
    """A BPE trained here, from the text of its tokenizer.json. ValueError if it is anything else.

    The tokenizers library merges by its list of merges, tiktoken any two neighbours that together are a token, the lowest id
    first. For a vocabulary learned by merging, in which the ids follow the order of the merges, these are the same: a token's
    bytes, merged by what was learned before it, give one pair only. tiktoken is several times as fast.
    """
    tiktoken = import_tiktoken('this vocabulary')
    try:
        vocab = json.loads(json_text)['model']['vocab']
        end_of_text = vocab[END_OF_TEXT]
        byte_of = {char: byte for byte, char in enumerate(byte_characters())}
        ranks = {bytes(byte_of[char] for char in token): id for token, id in vocab.items() if token != END_OF_TEXT}
        if (not all(type(id) is int for id in vocab.values()) or sorted(vocab.values()) != list(range(len(vocab)))
                or not all(bytes((byte,)) in ranks for byte in range(256)) or b'' in ranks):
            raise ValueError('its ids have gaps, or bytes have none')
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(f'not the tokenizer.json of a byte-level BPE trained here: {one_line(repr(error), 100)}') from error
    bpe = tiktoken.Encoding('bpe', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text})
    return TiktokenTokenizer(bpe, {'kind': 'bpe', 'json': json_text})


# How GPT-2 cuts text into pieces before it merges bytes (Radford et al. 2019, in OpenAI's encoder.py)
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_characters():
    """The character that stands for each byte in a tokenizer.json, as in GPT-2's: itself where it can be seen, else one from 256 on."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in visible else next(others)) for byte in range(256)]


def train_bpe(texts, vocab_size):
    """Learn a byte-level BPE of vocab_size ids, of which 256 are the bytes and one is the end of text, from texts -> its spec.

    Sennrich et al. 2016, on bytes as in GPT-2, by the tokenizers library. The same texts give the same tokenizer. UserError if the
    package is missing, or the texts are too few for so many merges.
    """
    if not 257 <= vocab_size <= 10**6:
        raise UserError(f'--vocab_size={vocab_size}: must be from 257 (256 bytes and the end of text) to 1,000,000')
    try:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    except ImportError as error:
        raise UserError('training a BPE needs the package tokenizers: pip install tokenizers') from error
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(f'--vocab_size={vocab_size}: the text is enough for {tokenizer.get_vocab_size()} only, ask for no more')
    return {'kind': 'bpe', 'json': tokenizer.to_str()}


def import_tiktoken(what):
    """The package tiktoken; UserError that names it if it is missing."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f'{what} needs the package tiktoken: pip install tiktoken') from error
    return tiktoken


class HuggingFaceTokenizer:
    """Any tokenizer of the `tokenizers` library, from the text of its tokenizer.json."""

    def __init__(self, json):
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise UserError('this tokenizer needs the package tokenizers: pip install tokenizers') from error
        self.json = json
        try:
            self.tokenizer = Tokenizer.from_str(json)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f'not a tokenizer.json of the tokenizers library: {error}') from error
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.end_of_text = self.tokenizer.token_to_id(END_OF_TEXT)

    def encode(self, text, special=False):
        """text -> ids, an int array. special=True reads '<|endoftext|>' and the like as tokens, else they are text like any other."""
        self.tokenizer.encode_special_tokens = not special
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception, or TypeError for what is not Unicode
            raise ValueError(f'the tokenizer cannot encode this text: {error}') from error
        return np.array(ids, dtype=np.int32)

    def decode(self, ids):
        """ids -> text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self):
        """The length of each token in bytes, 0 for special ones -> int array (vocab_size,); None if the tokens are not bytes of text."""
        if (json.loads(self.json).get('decoder') or {}).get('type') != 'ByteLevel':
            return None
        added = {id: 0 if token.special else len(token.content.encode()) for id, token in self.tokenizer.get_added_tokens_decoder().items()}
        return np.array([added[i] if i in added else len(self.tokenizer.id_to_token(i) or '') for i in range(self.vocab_size)])

    def spec(self):
        return {'kind': 'tokenizers', 'json': self.json}


class TextStream:
    """Text from ids as they come: a character appears once all of its bytes are there, and what has appeared stays.

    The pieces together are the text that decoding all the ids at once gives.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before, self.pending = [], []  # ids of the last piece, which some tokenizers need to space the next; ids not yet shown

    def push(self, ids):
        """The next ids -> the text that they complete, maybe ''."""
        self.pending.extend(ids)
        text = self.tokenizer.decode(self.before + self.pending)
        if text.endswith('\ufffd'):  # how an incomplete character decodes
            return ''
        return self.emit(text)

    def flush(self):
        """What is left, an incomplete character as U+FFFD."""
        return self.emit(self.tokenizer.decode(self.before + self.pending)) if self.pending else ''

    def emit(self, text):
        piece = text[len(self.tokenizer.decode(self.before)):]
        self.before, self.pending = self.pending, []
        return piece


def spec_vocab_size(spec):
    """Vocabulary size of a checked spec, without loading the tokenizer where that can be avoided."""
    if spec['kind'] == 'char':
        return len(spec['chars'])
    return GPT2_VOCAB_SIZE if spec['kind'] == 'gpt2' else load_tokenizer(spec).vocab_size


def spec_end_of_text(spec):
    """The id that ends a text in a checked spec, None if it has none, without loading the tokenizer where that can be avoided."""
    return GPT2_VOCAB_SIZE - 1 if spec['kind'] == 'gpt2' else load_tokenizer(spec).end_of_text


def same_ids(spec, other):
    """May ids of the one tokenizer be read by the other? Between GPT-2's and a tokenizer.json from elsewhere, which may hold GPT-2's,
    the answer is yes."""
    return spec == other or {spec['kind'], other['kind']} == {'gpt2', 'tokenizers'}


def check_spec(spec):
    """The spec itself if it is a sound one, else ValueError. Specs come from files that anyone may have written."""
    if not isinstance(spec, dict) or spec.get('kind') not in ('char', 'byte', 'gpt2', 'bpe', 'tokenizers'):
        raise ValueError(f'unknown kind of tokenizer: {one_line(repr(spec), 100)}')
    if spec['kind'] == 'char':
        chars = spec.get('chars')
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError("a character tokenizer needs 'chars', a text in which no character stands twice")
    if spec['kind'] in ('bpe', 'tokenizers') and not isinstance(spec.get('json'), str):
        raise ValueError("a tokenizer of the tokenizers library needs 'json', the text of its tokenizer.json")
    return spec


def load_tokenizer(spec):
    """spec -> tokenizer. Raises ValueError for an unsound spec, UserError for a missing package or vocabulary."""
    kind = check_spec(spec)['kind']
    if kind == 'char':
        return CharTokenizer(spec['chars'])
    if kind == 'byte':
        return ByteTokenizer()
    if kind == 'gpt2':
        return load_gpt2()
    return load_bpe(spec['json']) if kind == 'bpe' else HuggingFaceTokenizer(spec['json'])


def spec_from_meta(meta):
    """The spec in a data set's description (see dataloader.read_meta); GPT-2's if it has none, as with nanoGPT's GPT-2 bins; None
    if a nanoGPT meta.pkl holds sizes only. Raises ValueError if it is unsound."""
    if 'tokenizer' in meta:
        return check_spec(meta['tokenizer'])
    return spec_from_nanogpt(meta['nanogpt']) if 'nanogpt' in meta else GPT2_SPEC


def spec_from_nanogpt(meta):
    """The spec for the content of a nanoGPT meta.pkl, {'vocab_size': n, 'itos': {id: char}, 'stoi': {char: id}}; None if it
    holds sizes only. Raises ValueError if it is anything else."""
    if not isinstance(meta, dict) or not isinstance(meta.get('vocab_size'), int):
        raise ValueError("it has no 'vocab_size'")
    if 'itos' not in meta:
        return None
    itos, n = meta['itos'], meta['vocab_size']
    if (not isinstance(itos, dict) or len(itos) != n or set(itos) != set(range(n))
            or not all(isinstance(c, str) and len(c) == 1 for c in itos.values())):
        raise ValueError(f"its 'itos' does not map the ids 0 to {n - 1} to one character each")
    return check_spec({'kind': 'char', 'chars': ''.join(itos[i] for i in range(n))})
