"""Text to token ids and back. A tokenizer is described by a small dict (its spec) that is stored as data with the data set and in
every checkpoint: {'kind': 'char', 'chars': 'abc…'}, {'kind': 'byte'}, {'kind': 'gpt2'}, and, with the text of a tokenizer.json of the
tokenizers library, {'kind': 'bpe', 'json': '…'} for one trained here and {'kind': 'tokenizers', 'json': '…', 'end_of_text': '</s>'} for
any other; its 'end_of_text' may be missing."""

import functools
import hashlib
import json
import os
import re

import numpy as np

from common.errors import UserError, one_line, user_errors

GPT2_VOCAB_SIZE = 50257
GPT2_SPEC = {'kind': 'gpt2'}
GPT2_FINGERPRINT = 'f5b6a7fc254ad51111d01578f18dd2d76307c562f14b0f3e7c0346c221607ec3'  # of its tokens, see fingerprint
MAX_VOCAB_SIZE = 10**7  # in a tokenizer.json: a list of that many tokens can be made
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
            raise ValueError(
                f'the character {text[position]!r} at position {position} is not among the '
                f'{self.vocab_size} that the model knows: {one_line(repr(self.chars), 200)}'
            )
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
        rows = [
            np.frombuffer(part.encode(), dtype=np.uint8) for part in (text.split(END_OF_TEXT) if special else [text])
        ]
        return np.concatenate([rows[0], *(np.concatenate(([self.end_of_text], row)) for row in rows[1:])]).astype(
            np.int32
        )

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
            ids = self.bpe.encode_to_numpy(
                text, **{'allowed_special': 'all'} if special else {'disallowed_special': ()}
            )
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
        return np.array(
            [0 if i == self.end_of_text else len(self.bpe.decode_single_token_bytes(i)) for i in range(self.vocab_size)]
        )

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
        raise UserError(
            'tiktoken cannot load the GPT-2 vocabulary; it needs the network once, or TIKTOKEN_CACHE_DIR '
            f'naming a folder that has it ({type(error).__name__})'
        ) from error
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
        if (
            not all(type(id) is int for id in vocab.values())
            or sorted(vocab.values()) != list(range(len(vocab)))
            or not all(bytes((byte,)) in ranks for byte in range(256))
            or b'' in ranks
        ):
            raise ValueError('its ids have gaps, or bytes have none')
    except (ValueError, KeyError, TypeError, RecursionError, AttributeError) as error:
        raise ValueError(
            f'not the tokenizer.json of a byte-level BPE trained here: {one_line(repr(error), 100)}'
        ) from error
    bpe = tiktoken.Encoding(
        'bpe', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: end_of_text}
    )
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
    import_tokenizers('training a BPE')
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if tokenizer.get_vocab_size() < vocab_size:
        raise UserError(
            f'--vocab_size={vocab_size}: the text is enough for {tokenizer.get_vocab_size()} only, ask for no more'
        )
    return {'kind': 'bpe', 'json': tokenizer.to_str()}


def import_tiktoken(what):
    """The package tiktoken; UserError that names it if it is missing."""
    try:
        import tiktoken
    except ImportError as error:
        raise UserError(f'{what} needs the package tiktoken: pip install tiktoken') from error
    return tiktoken


def import_tokenizers(what):
    """The package tokenizers; UserError that names it if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(f'{what} needs the package tokenizers: pip install tokenizers') from error
    return tokenizers


class HuggingFaceTokenizer:
    """Any tokenizer of the `tokenizers` library, from the text of its tokenizer.json."""

    def __init__(self, json, end_of_text=None):
        """end_of_text: the token that ends a text; without it '<|endoftext|>', if there is such a token. ValueError if this is no
        tokenizer, or has no such token."""
        tokenizers = import_tokenizers('this tokenizer')
        self.json, self._spec = (
            json,
            {'kind': 'tokenizers', 'json': json, **({'end_of_text': end_of_text} if end_of_text else {})},
        )
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(json)
        except Exception as error:  # the library raises plain Exception
            raise ValueError(f'not a tokenizer.json of the tokenizers library: {error}') from error
        self.tokenizer.no_truncation()  # which some files ask for, to the length of a model
        self.tokenizer.no_padding()
        self.vocab_size = max(self.tokenizer.get_vocab().values(), default=-1) + 1  # ids may have gaps
        if self.vocab_size > MAX_VOCAB_SIZE:
            raise ValueError(f'its ids go up to {self.vocab_size - 1}')
        self.text_vocab_size = max(self.tokenizer.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        self.drops_unknown = drops_unknown(json)
        self.special = {
            id: token.content for id, token in self.tokenizer.get_added_tokens_decoder().items() if token.special
        }
        self.end_of_text = self.tokenizer.token_to_id(end_of_text or END_OF_TEXT)
        if end_of_text and self.end_of_text is None:
            raise ValueError(f'its end of text, {end_of_text!r}, is not in the vocabulary')

    def encode(self, text, special=False):
        """text -> ids, an int array. special=True reads '<|endoftext|>' and the like as tokens, else they are text like any other.
        ValueError, naming the first, if there are characters for which the tokenizer has no token."""
        self.tokenizer.encode_special_tokens = not special
        try:
            encoded = self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # the library raises plain Exception, or TypeError for what is not Unicode
            raise ValueError(f'the tokenizer cannot encode this text: {error}') from error
        ids = encoded.ids
        if self.drops_unknown:
            known = np.zeros(len(text), dtype=bool)
            for start, end in encoded.offsets:
                known[start:end] = True
            lost = next(
                (position for position, char in enumerate(text) if not known[position] and not char.isspace()), None
            )
            if lost is not None:
                raise ValueError(f'the tokenizer has no token for the character {text[lost]!r} at position {lost}')
        words = (
            [] if special else [self.special[id] for id in self.special.keys() & set(ids) if len(self.special[id]) > 1]
        )
        if words:  # the vocabulary has them as words, too: where they are spelled, encode before and behind their first character
            cuts = [0, *(match.start() + 1 for match in re.finditer('|'.join(map(re.escape, words)), text)), len(text)]
            if len(cuts) > 2:
                return np.concatenate([self.encode(text[start:end]) for start, end in zip(cuts, cuts[1:])])
        return np.array(ids, dtype=np.int32)

    def decode(self, ids):
        """ids -> text, special tokens included."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_bytes(self):
        """The length of each token in bytes, 0 for special ones -> int array (vocab_size,); None if the tokens are not bytes of text."""
        if not is_byte_level(json.loads(self.json)):
            return None
        added = {
            id: 0 if token.special else len(token.content.encode())
            for id, token in self.tokenizer.get_added_tokens_decoder().items()
        }
        return np.array(
            [added[i] if i in added else len(self.tokenizer.id_to_token(i) or '') for i in range(self.vocab_size)]
        )

    def spec(self):
        return self._spec


def drops_unknown(text):
    """Does the library pass over, without a word, what is not in the vocabulary of the tokenizer with this tokenizer.json?"""
    description = json.loads(text)
    model = description['model']
    return (
        not is_byte_level(description)
        and not model.get('unk_token')
        and not model.get('byte_fallback')
        and model.get('unk_id') is None
    )


def is_byte_level(description):
    """Are the tokens of a tokenizer.json bytes, written as byte_characters()?"""
    return (description.get('decoder') or {}).get('type') == 'ByteLevel'


# --- tokenizers of Hugging Face models --------------------------------------------------------------------------------


def read_tokenizer(path):
    """The spec of the tokenizer in a folder in Hugging Face's format, or in a tokenizer.json; None if the folder has none that can be read.

    A folder has a tokenizer.json, or GPT-2's kind of vocab.json and merges.txt. What ends a text is the eos token that the files beside it
    name, see named_end_of_text. UserError if a file cannot be read, or is not what its name says.
    """
    folder, file = (
        (path, os.path.join(path, 'tokenizer.json')) if os.path.isdir(path) else (os.path.dirname(path), path)
    )
    vocabulary, merges = os.path.join(folder, 'vocab.json'), os.path.join(folder, 'merges.txt')
    if os.path.exists(file):
        with user_errors(OSError, ValueError, where=f'cannot read {file}: '), open(file, encoding='utf-8') as opened:
            tokenizer = HuggingFaceTokenizer(opened.read())
    elif os.path.exists(vocabulary) and os.path.exists(merges):
        with user_errors(OSError, ValueError, where=f'cannot read {vocabulary} and {merges}: '):
            tokenizer = HuggingFaceTokenizer(from_vocabulary_and_merges(folder, vocabulary, merges))
    else:
        return None
    return HuggingFaceTokenizer(tokenizer.json, named_end_of_text(folder, tokenizer.tokenizer)).spec()


def from_vocabulary_and_merges(folder, vocabulary, merges):
    """GPT-2's kind of vocab.json and merges.txt, and the special tokens that the files beside them name -> the text of a tokenizer.json.
    ValueError if they are of another kind, or broken."""
    settings = read_object(folder, 'tokenizer_config.json')
    kind = settings.get('tokenizer_class')
    if kind not in (
        None,
        'GPT2Tokenizer',
        'GPT2TokenizerFast',
    ):  # other kinds cut text in another way, which these files do not tell
        raise ValueError(
            f'they are those of a {kind}, which only a tokenizer.json describes in full: have transformers save one'
        )
    try:
        tokenizer = import_tokenizers('this tokenizer').ByteLevelBPETokenizer(
            vocabulary, merges, add_prefix_space=settings.get('add_prefix_space') is True
        )
    except UserError:
        raise
    except Exception as error:  # the library raises plain Exception
        raise ValueError(str(error)) from error
    added = read_object(folder, 'added_tokens.json')
    for id, token in dict(settings.get('added_tokens_decoder') or {}).items():
        added[str(token.get('content') if isinstance(token, dict) else token)] = int(id)
    if not all(type(id) is int for id in added.values()):
        raise ValueError('added_tokens.json beside them does not map tokens to ids')
    if tokenizer.token_to_id(END_OF_TEXT) is not None:
        tokenizer.add_special_tokens([END_OF_TEXT])  # else its text would be cut up like any other
    for token in sorted(added, key=added.get):
        tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != added[token]:  # the library gives a new token the next id
            raise ValueError(
                f'the token {token!r} cannot have the id {added[token]} that the files beside them give it'
            )
    return tokenizer.to_str()


def named_end_of_text(folder, tokenizer):
    """The token that ends a text by the files of a model's folder: the eos token of tokenizer_config.json, special_tokens_map.json,
    generation_config.json or config.json, the first that the library's tokenizer has; None if they name none."""
    for name in ('tokenizer_config.json', 'special_tokens_map.json'):
        token = read_object(folder, name).get('eos_token')
        token = token.get('content') if isinstance(token, dict) else token
        if isinstance(token, str) and tokenizer.token_to_id(token) is not None:
            return token
    special = tokenizer.get_added_tokens_decoder()
    for name in (
        'generation_config.json',
        'config.json',
    ):  # these tell ids; some tell GPT-2's by default, which may be any word
        ids = read_object(folder, name).get('eos_token_id')
        for id in ids if isinstance(ids, list) else [ids]:
            if type(id) is int and id in special and special[id].special:
                return special[id].content
    return None


def read_object(folder, name):
    """The object in a JSON file, {} if there is no such file. UserError if it holds anything else."""
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        return {}
    with (
        user_errors(OSError, ValueError, RecursionError, where=f'cannot read {path}: '),
        open(path, encoding='utf-8') as file,
    ):
        content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError('it holds no JSON object')
        return content


class TextStream:
    """Text from ids as they come: a character appears once all of its bytes are there, and what has appeared stays.

    The pieces together are the text that decoding all the ids at once gives.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.before, self.pending = (
            [],
            [],
        )  # ids of the last piece, which some tokenizers need to space the next; ids not yet shown

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
        piece = text[len(self.tokenizer.decode(self.before)) :]
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


def text_vocab_size(spec):
    """Vocabulary size of a checked spec without the tokens that were added behind it, such as one to pad with: a model may lack those."""
    return load_tokenizer(spec).text_vocab_size if spec['kind'] == 'tokenizers' else spec_vocab_size(spec)


def check_known(ids, vocab_size, tokenizer):
    """Raise ValueError, naming the token, if an id is one that a model of so many ids lacks: see text_vocab_size."""
    largest = max(ids, default=0)
    if largest >= vocab_size:
        raise ValueError(
            f'the model has no token {tokenizer.decode([largest])!r}: it has {vocab_size} ids, this is the id {largest}'
        )


def same_ids(spec, other):
    """Does every id of the one tokenizer mean the same token to the other, and are they merged in the same order? The other may have more
    tokens that were added behind its vocabulary. Both are checked specs; ValueError if one turns out unsound."""
    if spec == other:
        return True
    checksum, n, _ = fingerprint(spec)
    other_checksum, other_n, other_text_n = fingerprint(other, n)
    return other_text_n <= n <= other_n and checksum == other_checksum


def fingerprint(spec, n=None):
    """A checksum of the first n tokens of a checked spec, by default of all, and of its merges; its vocabulary size; its text_vocab_size.

    The checksum depends on nothing else, such as how the JSON is written. GPT-2's is known: its vocabulary may not be at hand.
    """
    if spec['kind'] == 'gpt2':
        return GPT2_FINGERPRINT if n in (None, GPT2_VOCAB_SIZE) else None, GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE
    tokens, merges, text_n = tokens_and_merges(spec)
    size = max(tokens) + 1
    content = repr(([tokens.get(id) for id in range(n or size)], merges))
    return hashlib.sha256(content.encode('utf-8', 'surrogatepass')).hexdigest(), size, text_n


def tokens_and_merges(spec):
    """What the ids of a checked spec, not GPT-2's, stand for -> {id: bytes}, or {id: text} where tokens are not bytes; the ids that its
    merges make, in their order; its text_vocab_size."""
    if spec['kind'] == 'char':
        return dict(enumerate(spec['chars'])), [], len(spec['chars'])
    if spec['kind'] == 'byte':
        return {**{byte: bytes((byte,)) for byte in range(256)}, 256: END_OF_TEXT.encode()}, [], 257
    tokenizer, description = HuggingFaceTokenizer(spec['json']), json.loads(spec['json'])
    byte_of = {char: byte for byte, char in enumerate(byte_characters())} if is_byte_level(description) else {}
    ids = tokenizer.tokenizer.get_vocab()
    tokens = {
        id: bytes(map(byte_of.get, token)) if byte_of.keys() >= set(token) else token for token, id in ids.items()
    }
    for id, token in tokenizer.tokenizer.get_added_tokens_decoder().items():  # these stand as they are
        tokens[id] = token.content.encode('utf-8', 'surrogatepass') if byte_of else token.content
    merges = (pair.split(' ') if isinstance(pair, str) else pair for pair in description['model'].get('merges') or ())
    return tokens, [ids.get(''.join(pair)) for pair in merges], tokenizer.text_vocab_size


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
    if not isinstance(spec.get('end_of_text', ''), str):
        raise ValueError("'end_of_text' of a tokenizer must be the text of a token")
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
    return load_bpe(spec['json']) if kind == 'bpe' else HuggingFaceTokenizer(spec['json'], spec.get('end_of_text'))


def spec_from_meta(meta):
    """The spec in a data set's description (see dataloader.read_meta); GPT-2's if it tells nothing, as with nanoGPT's GPT-2 bins; None if
    it tells how many ids there are but not what they mean. Raises ValueError if it is unsound."""
    if 'tokenizer' in meta:
        return check_spec(meta['tokenizer'])
    return spec_from_nanogpt(meta['nanogpt']) if 'nanogpt' in meta else GPT2_SPEC


def spec_from_nanogpt(meta):
    """The spec for the content of a nanoGPT meta.pkl, {'vocab_size': n, 'itos': {id: char}, 'stoi': {char: id}}, of which one of the latter
    two is enough; None if it does not tell a character for each id: its ids may be words or notes, of which nanoGPT too asks only how many
    there are. Raises ValueError if it contradicts itself."""
    if not isinstance(meta, dict) or type(meta.get('vocab_size')) is not int or meta['vocab_size'] < 1:
        raise ValueError("it has no 'vocab_size', a whole number from 1 on")
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
