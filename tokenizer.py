"""Text to token ids and back. A tokenizer is described by a small dict (its spec) that is stored as data with the data
set and in every checkpoint: {'kind': 'char', 'chars': 'abc…'}, {'kind': 'gpt2'}, {'kind': 'tokenizers', 'json': '…'}."""
import functools

import numpy as np

from configurator import UserError, one_line

GPT2_VOCAB_SIZE = 50257
GPT2_SPEC = {'kind': 'gpt2'}


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

    def encode(self, text):
        """text -> ids, an int array (len(text),). Raises ValueError naming the first character not in the vocabulary."""
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

    def spec(self):
        return {'kind': 'char', 'chars': self.chars}


class GPT2Tokenizer:
    """GPT-2's byte-level BPE of 50,257 ids, by tiktoken, which downloads its vocabulary once and keeps it."""

    def __init__(self):
        self.vocab_size = GPT2_VOCAB_SIZE
        try:
            import tiktoken
        except ImportError as error:
            raise UserError('the GPT-2 vocabulary needs the package tiktoken: pip install tiktoken') from error
        try:
            self.bpe = tiktoken.get_encoding('gpt2')
        except Exception as error:  # requests' errors, OSError or ValueError, by what went wrong on the way
            raise UserError('tiktoken cannot load the GPT-2 vocabulary; it needs the network once, or TIKTOKEN_CACHE_DIR '
                            f'naming a folder that has it ({type(error).__name__})') from error
        self.end_of_text = self.bpe.eot_token

    def encode(self, text, special=False):
        """text -> ids, an int array. special=True reads '<|endoftext|>' as the one token, else it is text like any other."""
        ids = self.bpe.encode(text, allowed_special='all') if special else self.bpe.encode_ordinary(text)
        return np.array(ids, dtype=np.int32)

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8 become U+FFFD."""
        return self.bpe.decode(list(ids))

    def spec(self):
        return GPT2_SPEC


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
        self.end_of_text = self.tokenizer.token_to_id('<|endoftext|>')

    def encode(self, text):
        """text -> ids, an int array, without added special tokens."""
        try:
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises plain Exception, or TypeError for what is not Unicode
            raise ValueError(f'the tokenizer cannot encode this text: {error}') from error
        return np.array(ids, dtype=np.int32)

    def decode(self, ids):
        """ids -> text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

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


def check_spec(spec):
    """The spec itself if it is a sound one, else ValueError. Specs come from files that anyone may have written."""
    if not isinstance(spec, dict) or spec.get('kind') not in ('char', 'gpt2', 'tokenizers'):
        raise ValueError(f'unknown kind of tokenizer: {one_line(repr(spec), 100)}')
    if spec['kind'] == 'char':
        chars = spec.get('chars')
        if not isinstance(chars, str) or not chars or len(set(chars)) != len(chars):
            raise ValueError("a character tokenizer needs 'chars', a text in which no character stands twice")
    if spec['kind'] == 'tokenizers' and not isinstance(spec.get('json'), str):
        raise ValueError("a tokenizer of the tokenizers library needs 'json', the text of its tokenizer.json")
    return spec


def load_tokenizer(spec):
    """spec -> tokenizer. Raises ValueError for an unsound spec, UserError for a missing package or vocabulary."""
    kind = check_spec(spec)['kind']
    if kind == 'char':
        return CharTokenizer(spec['chars'])
    return load_gpt2() if kind == 'gpt2' else HuggingFaceTokenizer(spec['json'])


@functools.cache
def load_gpt2():
    """The GPT-2 tokenizer, loaded once a process."""
    return GPT2Tokenizer()


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
