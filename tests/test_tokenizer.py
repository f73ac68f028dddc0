"""Text to token ids and back, for any text."""

import functools
import itertools
import json
import os
import random
import sys
import unicodedata

import numpy as np
import pytest
from conftest import SHARED

from common.byte_bpe import byte_characters
from common.errors import UserError
from formats.tokenizer_files import read_tokenizer, write_tokenizer
from tokenizer import (
    GPT2_SPEC,
    ByteTokenizer,
    CharTokenizer,
    TextStream,
    check_known,
    check_spec,
    load_tokenizer,
    same_ids,
    spec_end_of_text,
    spec_from_nanogpt,
    spec_vocab_size,
    text_vocab_size,
    train_bpe,
)


def random_text(rng, n=200):
    """Characters from all over Unicode."""
    return ''.join(
        chr(rng.choice([rng.randrange(0x80), rng.randrange(0xA0, 0xD800), rng.randrange(0xE000, 0x110000)]))
        for _ in range(n)
    )


def test_characters_round_trip():
    rng = random.Random(0)
    for _ in range(20):
        text = random_text(rng)
        tokenizer = load_tokenizer(CharTokenizer.train(text).spec())
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids.tolist()) == text and tokenizer.vocab_size == len(set(text))
        assert ids.tolist() == [sorted(set(text)).index(c) for c in text]
    assert CharTokenizer.train('ab').encode('').tolist() == []


def test_unknown_characters_are_named():
    tokenizer = CharTokenizer.train('hello wörld')
    for character in ('x', '\x00', 'ÿ', '😀', '\U0010ffff'):
        with pytest.raises(ValueError) as error:
            tokenizer.encode('he' + character)
        assert f'{character!r} at position 2' in str(error.value)


def test_gpt2_is_tiktokens(gpt2_vocabulary):
    import tiktoken

    theirs = tiktoken.get_encoding('gpt2')
    rng = random.Random(1)
    texts = [random_text(rng) for _ in range(20)] + ['', 'Hello, <|endoftext|> world']
    if (SHARED / 'corpora').exists():
        texts.append((SHARED / 'corpora' / 'tinyshakespeare.txt').read_text(encoding='utf-8')[:200000])
    for text in texts:
        assert gpt2_vocabulary.encode(text).tolist() == theirs.encode_ordinary(text)
        assert gpt2_vocabulary.decode(gpt2_vocabulary.encode(text)) == text
    assert gpt2_vocabulary.encode('a<|endoftext|>', special=True)[-1] == gpt2_vocabulary.end_of_text == 50256


def test_tokenizers_library_round_trip():
    tokenizers = pytest.importorskip('tokenizers', reason='comes with transformers')
    bpe = tokenizers.ByteLevelBPETokenizer()
    rng = random.Random(2)
    texts = [random_text(rng) for _ in range(20)]
    bpe.train_from_iterator(texts, vocab_size=400, show_progress=False)
    tokenizer = load_tokenizer({'kind': 'tokenizers', 'json': bpe.to_str()})
    for text in texts:
        assert tokenizer.encode(text).tolist() == bpe.encode(text).ids
        assert tokenizer.decode(tokenizer.encode(text).tolist()) == text
    assert load_tokenizer(tokenizer.spec()).vocab_size == tokenizer.vocab_size == bpe.get_vocab_size()


def unruly_text(rng, n=40):
    """Letters, digits, marks, white space and special tokens of all kinds."""
    pieces = ['the ', 'The', " it's", "'LL", ' ', '  ', '\n', '\r\n', '\t', '\u3000', '\x85', '\x1c', '\x00']
    pieces += ['<|endoftext|>', '12', '٣', '...', 'é', 'e\u0301', '漢字', '😀']
    return ''.join(rng.choice(pieces) if rng.random() < 0.7 else random_text(rng, 1) for _ in range(rng.randrange(n)))


@pytest.fixture(scope='module')
def trained():
    """A BPE trained on unruly text -> ours, and the tokenizers library's from the same tokenizer.json."""
    tokenizers = pytest.importorskip('tokenizers', reason='trains a BPE')
    rng = random.Random(3)
    texts = [unruly_text(rng) for _ in range(3000)]
    spec = train_bpe(iter(texts), 1500)
    assert train_bpe(iter(texts), 1500) == spec, 'the same texts give the same tokenizer'
    theirs = tokenizers.Tokenizer.from_str(spec['json'])
    theirs.encode_special_tokens = True  # as text
    return load_tokenizer(spec), theirs


def test_a_trained_bpe_equals_the_tokenizers_library(trained):
    ours, theirs = trained
    assert ours.vocab_size == theirs.get_vocab_size() == 1500
    assert ours.end_of_text == theirs.token_to_id('<|endoftext|>')
    rng, merged = random.Random(4), 0
    for _ in range(3000):
        text = unruly_text(rng)
        ids = ours.encode(text).tolist()
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert ours.decode(ids) == text and ours.end_of_text not in ids
        assert ours.token_bytes()[ids].sum() == len(text.encode())
        merged += len(ids) < len(text)
    assert merged > 1000
    assert ours.encode('a<|endoftext|>b', special=True)[1] == ours.end_of_text
    assert load_tokenizer(ours.spec()).encode('the漢').tolist() == ours.encode('the漢').tolist()


def test_both_libraries_split_text_alike():
    """A vocabulary that shows where text is split.

    It merges each ASCII character of a class with any byte, so that a missing merge is a boundary between pieces.
    """
    tiktoken, tokenizers = pytest.importorskip('tiktoken'), pytest.importorskip('tokenizers')
    from tokenizers import models, pre_tokenizers

    from common.byte_bpe import GPT2_PATTERN

    char = byte_characters()
    vocab, merges, ranks = {char[byte]: byte for byte in range(256)}, [], {bytes([byte]): byte for byte in range(256)}
    for first in b'a1. \n':
        for byte in range(256):
            merges.append((char[first], char[byte]))
            vocab[char[first] + char[byte]] = ranks[bytes([first, byte])] = len(vocab)
    theirs = tokenizers.Tokenizer(models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = tiktoken.Encoding('pairs', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for code in [*range(0x3000), *range(0x3000, 0xD800, 53), *range(0xE000, 0x110000, 53)]:
        text = ''.join(f'{before}{chr(code)}{after}' for before, after in zip('a1. \n', 'a1. \n'))
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids, hex(code)


def test_bytes():
    tokenizer, rng = load_tokenizer({'kind': 'byte'}), random.Random(5)
    for _ in range(300):
        text = unruly_text(rng)
        ids = tokenizer.encode(text).tolist()
        assert bytes(ids) == text.encode() and tokenizer.decode(ids) == text
    assert tokenizer.encode('é<|endoftext|>', special=True).tolist() == [195, 169, 256]
    assert tokenizer.encode('', special=True).tolist() == []
    assert tokenizer.token_bytes().tolist() == [1] * 256 + [0]


def test_lone_surrogates_become_replacement_characters(trained):
    for tokenizer in (ByteTokenizer(), trained[0]):
        assert tokenizer.decode(tokenizer.encode('a\ud800b\udc00').tolist()) == 'a\ufffdb\ufffd'


def test_too_little_text_for_a_vocabulary():
    pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match='--vocab_size=4096: the text is enough for 2'):
        train_bpe(['abc abc'], 4096)


def test_spec_functions(trained, gpt2_vocabulary):
    for tokenizer in (trained[0], ByteTokenizer(), CharTokenizer.train('abc'), gpt2_vocabulary):
        assert spec_vocab_size(tokenizer.spec()) == tokenizer.vocab_size == len(tokenizer.token_bytes())
        assert spec_end_of_text(tokenizer.spec()) == tokenizer.end_of_text
    assert same_ids(GPT2_SPEC, dict(GPT2_SPEC))
    assert not same_ids(GPT2_SPEC, {'kind': 'byte'})
    assert not same_ids({'kind': 'char', 'chars': 'ab'}, {'kind': 'char', 'chars': 'ac'})


@pytest.mark.parametrize(
    'spec',
    [
        {'kind': 'bpe', 'json': json}
        for json in (
            '',
            '[]',
            '{}',
            '{"model": {"vocab": {"a": 0}}}',
            '{"model": {"vocab": {"<|endoftext|>": "x"}}}',
            '{"model": {"vocab": [1]}}',
            '{"model": {"vocab": {"<|endoftext|>": 0, "\\u4e00": 1}}}',
            '{"model": {"vocab": {"<|endoftext|>": -1}}}',
            '[' * 100000,
        )
    ],
)
def test_invalid_bpe(spec):
    pytest.importorskip('tiktoken')
    with pytest.raises(ValueError, match='not the tokenizer.json of a byte-level BPE trained here'):
        load_tokenizer(spec)


@pytest.mark.parametrize(
    'spec',
    [
        None,
        [],
        {},
        {'kind': 'bpe'},
        {'kind': 'words'},
        {'kind': 'char'},
        {'kind': 'char', 'chars': ''},
        {'kind': 'char', 'chars': 'aba'},
        {'kind': 'char', 'chars': ['a']},
        {'kind': 'tokenizers'},
    ],
)
def test_invalid_specs(spec):
    with pytest.raises(ValueError):
        check_spec(spec)


@pytest.mark.parametrize(
    'meta',
    [
        [],
        {},
        {'vocab_size': 1, 'itos': {1: 'a'}},
        {'vocab_size': 2, 'itos': {0: 'a', 1: 'a'}},
        {'vocab_size': '2', 'itos': {}},
        {'vocab_size': 0},
        {'vocab_size': -1},
        {'vocab_size': True},
        {'vocab_size': 2, 'itos': {0: 'a', 'b': 1}},
        {'vocab_size': 1, 'itos': {-1: 'a'}},
        {'vocab_size': 2, 'itos': 'ab'},
        {'vocab_size': 2, 'itos': ['a', 'b', 'c']},
        {'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 1, 'b': 0}},
    ],
)
def test_invalid_nanogpt_meta(meta):
    with pytest.raises(ValueError):
        spec_from_nanogpt(meta)


# --- tokenizers of Hugging Face models --------------------------------------------------------------------------------


@functools.cache
def gpt2_files():
    """GPT-2's tokenizer in Hugging Face's format, from tiktoken's ranks -> vocab.json, merges.txt, tokenizer.json.

    The merges are pairs. Merging the bytes of a token by lower ranks leaves two parts: the pair of its merge.
    """
    from tokenizer import load_gpt2

    char, bpe = byte_characters(), load_gpt2().bpe
    ranks = {bpe.decode_single_token_bytes(i): i for i in range(50256)}
    merges = []
    for token, rank in ranks.items():
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            lowest = min((ranks.get(a + b, rank) for a, b in zip(parts, parts[1:])))
            i = next(i for i in range(len(parts) - 1) if ranks.get(parts[i] + parts[i + 1], rank) == lowest)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append([''.join(char[byte] for byte in part) for part in parts])
    vocab = {''.join(char[byte] for byte in token): rank for token, rank in ranks.items()} | {'<|endoftext|>': 50256}
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    end = added_token(50256, '<|endoftext|>', normalized=True)
    return vocab, merges, tokenizer_json([end], byte_level, {'type': 'BPE', 'vocab': vocab, 'merges': merges})


def added_token(id, content, special=True, normalized=False):
    """An entry of 'added_tokens' in a tokenizer.json."""
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': normalized}
    return {'id': id, 'content': content, 'special': special, **flags}


def tokenizer_json(added_tokens, byte_level, model):
    """The content of a tokenizer.json."""
    unused = dict.fromkeys(('truncation', 'padding', 'normalizer', 'post_processor'))
    parts = {'added_tokens': added_tokens, 'pre_tokenizer': byte_level, 'decoder': byte_level, 'model': model}
    return {'version': '1.0', **unused, **parts}


def foreign(description, **arguments):
    """The spec for the content of a tokenizer.json."""
    return {'kind': 'tokenizers', 'json': json.dumps(description, **arguments)}


def changed(description, **model):
    return {**description, 'model': {**description['model'], **model}}


def with_token(description, token, id, special=True):
    added = {**description['added_tokens'][0], 'id': id, 'content': token, 'special': special}
    return {**description, 'added_tokens': [*description['added_tokens'], added]}


def test_gpt2_is_recognized_by_its_tokens(gpt2_vocabulary):
    """However its JSON is written; and no other tokenizer of its size is mistaken for it."""
    pytest.importorskip('tokenizers')
    vocab, merges, description = gpt2_files()
    old = foreign(changed(description, merges=[' '.join(pair) for pair in merges]), indent=1)
    assert same_ids(GPT2_SPEC, old) and same_ids(foreign(description), GPT2_SPEC)
    swapped = changed(description, vocab={**vocab, 'Ġhello': vocab['Ġworld'], 'Ġworld': vocab['Ġhello']})
    for other in (swapped, changed(description, merges=[merges[1], merges[0], *merges[2:]])):
        assert len(other['model']['vocab']) == 50257 and not same_ids(GPT2_SPEC, foreign(other))


def test_a_token_added_after_the_vocabulary_changes_no_other(gpt2_vocabulary):
    pytest.importorskip('tokenizers')
    padded = foreign(with_token(gpt2_files()[2], '[PAD]', 50257))
    assert same_ids(GPT2_SPEC, padded) and not same_ids(padded, GPT2_SPEC)  # its data may hold the id 50257
    tokenizer = load_tokenizer(padded)
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (50258, 50257)
    ids = tokenizer.encode('a[PAD]', special=True).tolist()
    assert ids == [64, 50257]
    check_known(ids, 50258, tokenizer)
    check_known([], 1, tokenizer)
    with pytest.raises(ValueError, match=r"the model has no token '\[PAD\]': it has 50257 ids, this is the id 50257"):
        check_known(ids, 50257, tokenizer)


def test_same_ids_of_small_tokenizers(trained):
    ours, library = trained
    description = json.loads(ours.spec()['json'])
    indented, model = foreign(description, indent=2), description['model']
    assert same_ids(ours.spec(), indented) and same_ids(indented, ours.spec())
    vocab = {token: id for token, id in model['vocab'].items() if id != 1499}
    fewer = foreign(changed(description, merges=model['merges'][:-1], vocab=vocab))
    assert not same_ids(ours.spec(), fewer) and not same_ids(fewer, ours.spec())
    assert not same_ids({'kind': 'byte'}, ours.spec())
    assert not same_ids({'kind': 'char', 'chars': 'ab'}, {'kind': 'char', 'chars': 'abc'})


def write_folder(folder, **files):
    """Write a model's folder: NAME=content becomes NAME.json, merges becomes merges.txt."""
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in files.items():
        if name == 'merges':
            text = '#version: 0.2\n' + ''.join(f'{a} {b}\n' for a, b in content)
            (folder / 'merges.txt').write_text(text, encoding='utf-8')
        else:
            (folder / f'{name}.json').write_text(json.dumps(content), encoding='utf-8')
    return str(folder)


def test_vocab_json_and_merges_txt_of_gpt2(tmp_path, gpt2_vocabulary):
    pytest.importorskip('tokenizers')
    vocab, merges, _ = gpt2_files()
    spec = read_tokenizer(write_folder(tmp_path / 'm', vocab=vocab, merges=merges))
    tokenizer, rng = load_tokenizer(spec), random.Random(6)
    assert same_ids(GPT2_SPEC, spec) and (tokenizer.vocab_size, tokenizer.end_of_text) == (50257, 50256)
    assert tokenizer.encode('a<|endoftext|>b', special=True).tolist() == [64, 50256, 65]
    for _ in range(200):
        text = unruly_text(rng)
        assert tokenizer.encode(text).tolist() == gpt2_vocabulary.encode(text).tolist()
        assert tokenizer.encode(text, special=True).tolist() == gpt2_vocabulary.encode(text, special=True).tolist()
    assert tokenizer.token_bytes().tolist() == gpt2_vocabulary.token_bytes().tolist()


SMALL_VOCAB = {char: i for i, char in enumerate(byte_characters())}
SMALL_VOCAB |= {'th': 256, '</s>': 257, '<|endoftext|>': 258, '<|end|>': 259}


def small(added=('</s>',), **changes):
    """The content of a small tokenizer.json."""
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True}
    tokens = [added_token(SMALL_VOCAB[token], token) for token in added]
    model = {'type': 'BPE', 'vocab': SMALL_VOCAB, 'merges': [['t', 'h']]}
    return {**tokenizer_json(tokens, byte_level, model), **changes}


def test_tokens_added_to_a_vocab_json(tmp_path):
    pytest.importorskip('tokenizers')
    files = {'vocab': SMALL_VOCAB, 'merges': [('t', 'h')]}
    bare = read_tokenizer(write_folder(tmp_path / 'm', **files))
    decoder = {
        '258': {'content': '<|endoftext|>'},
        '257': {'content': '</s>', 'special': True},
        '260': {'content': '[PAD]'},
    }
    for added in (
        {'added_tokens': {'[PAD]': 260, '</s>': 257}},
        {'tokenizer_config': {'added_tokens_decoder': decoder}},
    ):
        spec = read_tokenizer(write_folder(tmp_path / 'm', **files, **added))
        assert load_tokenizer(spec).encode('a[PAD]</s>', special=True).tolist() == [SMALL_VOCAB['a'], 260, 257]
        assert same_ids(bare, spec) and not same_ids(spec, bare)
        assert (load_tokenizer(spec).text_vocab_size, text_vocab_size(spec), text_vocab_size(bare)) == (260, 260, 260)
    both = read_tokenizer(write_folder(tmp_path / 'm', tokenizer=small(), **files))
    assert json.loads(both['json']) == small()


@pytest.mark.parametrize(
    'files, end',
    [
        ({}, 258),  # the vocabulary has <|endoftext|>
        ({'tokenizer_config': {'eos_token': '</s>'}}, 257),
        (
            {
                'tokenizer_config': {'eos_token': {'content': '<|end|>', 'special': True}},
                'config': {'eos_token_id': 257},
            },
            259,
        ),
        ({'special_tokens_map': {'eos_token': {'content': '</s>'}}}, 257),
        ({'tokenizer_config': {'eos_token': None}, 'special_tokens_map': {'eos_token': '</s>'}}, 257),
        ({'generation_config': {'eos_token_id': [50256, 257]}}, 257),
        ({'config': {'eos_token_id': 257}}, 257),
        ({'config': {'eos_token_id': 84}}, 258),  # the id of a word, like GPT-2's 50256 in other vocabularies
        ({'config': {'eos_token_id': -1}, 'generation_config': {'eos_token_id': 'x'}}, 258),
    ],
)
def test_the_folder_names_the_end_of_text(tmp_path, files, end):
    pytest.importorskip('tokenizers')
    folder = write_folder(tmp_path / 'm', tokenizer=small(), **files)
    for path in (folder, os.path.join(folder, 'tokenizer.json')):
        spec = read_tokenizer(path)
        assert load_tokenizer(spec).end_of_text == spec_end_of_text(spec) == end
        assert load_tokenizer(check_spec(json.loads(json.dumps(spec)))).spec() == spec


def test_a_vocabulary_without_an_end_of_text(tmp_path):
    pytest.importorskip('tokenizers')
    description = small(added=())
    description['model']['vocab'] = {token: id for token, id in SMALL_VOCAB.items() if id < 257}
    spec = read_tokenizer(write_folder(tmp_path / 'm', tokenizer=description, tokenizer_config={'eos_token': '</s>'}))
    assert load_tokenizer(spec).end_of_text is None
    with pytest.raises(ValueError, match="its end of text, '</s>', is not in the vocabulary"):
        load_tokenizer({**spec, 'end_of_text': '</s>'})


def test_no_text_is_truncated_or_padded(tmp_path):
    """A tokenizer.json may ask for its model's context length."""
    pytest.importorskip('tokenizers')
    padding = {'strategy': {'Fixed': 8}, 'direction': 'Right', 'pad_to_multiple_of': None}
    padding |= {'pad_id': 0, 'pad_type_id': 0, 'pad_token': '!'}
    truncation = {'max_length': 5, 'strategy': 'LongestFirst', 'stride': 0, 'direction': 'Right'}
    asking, plain = (
        load_tokenizer(foreign(small(**ask))) for ask in (dict(truncation=truncation, padding=padding), {})
    )
    for text in ('the thing </s> of it', 'th'):
        ids = asking.encode(text).tolist()
        assert ids == plain.encode(text).tolist() and asking.decode(ids) == text


def test_special_tokens_spelled_in_text_are_text(tmp_path):
    pytest.importorskip('tokenizers')
    tokenizer = load_tokenizer(foreign(small()))
    assert 257 not in tokenizer.encode('a</s>b') and tokenizer.decode(tokenizer.encode('a</s>b').tolist()) == 'a</s>b'
    assert tokenizer.encode('a</s>b', special=True).tolist() == [SMALL_VOCAB['a'], 257, SMALL_VOCAB['b']]


@pytest.mark.parametrize('kind', ['WordLevel', 'Unigram'])
def test_special_tokens_that_are_also_words(kind):
    """The library would give the special token even for its spelling in text."""
    tokenizers = pytest.importorskip('tokenizers')
    words = ['<unk>', '</s>', '<', '/', 's', '>', 'a', '/s>']
    model = (
        tokenizers.models.WordLevel({word: id for id, word in enumerate(words)}, '<unk>')
        if kind == 'WordLevel'
        else tokenizers.models.Unigram([(word, -float(len(word) == 1)) for word in words], 0)
    )
    library = tokenizers.Tokenizer(model)
    library.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    library.add_special_tokens(['<unk>', '</s>'])
    library.encode_special_tokens = True
    assert 1 in library.encode('a </s> a').ids
    tokenizer = load_tokenizer({'kind': 'tokenizers', 'json': library.to_str(), 'end_of_text': '</s>'})
    for text in ('a </s> a', '</s>', 'a </s> </s> ? a'):
        ids = tokenizer.encode(text).tolist()
        assert 1 not in ids and ids.count(2) == text.count('</s>') and ids.count(6) == text.count('a')
    assert tokenizer.encode('? a').tolist() == [0, 6] and tokenizer.encode('a</s>', special=True).tolist() == [6, 1]


@pytest.mark.parametrize(
    'files, words',
    [
        ({'tokenizer': []}, 'not a tokenizer.json'),
        ({'tokenizer': {'model': None}}, 'not a tokenizer.json'),
        (
            {'tokenizer': small(model={'type': 'BPE', 'vocab': {'a': 0, 'b': 4 * 10**9}, 'merges': []})},
            'its ids go up to 4000000000',
        ),
        ({'tokenizer': small(), 'tokenizer_config': ['</s>']}, 'tokenizer_config.json: it holds no JSON object'),
        ({'vocab': SMALL_VOCAB, 'merges': [('x', 'yz')]}, 'cannot read'),
        ({'vocab': ['a'], 'merges': []}, 'cannot read'),
        (
            {'vocab': SMALL_VOCAB, 'merges': [], 'tokenizer_config': {'tokenizer_class': 'CLIPTokenizer'}},
            'those of a CLIPTokenizer',
        ),
        ({'vocab': SMALL_VOCAB, 'merges': [], 'added_tokens': {'[PAD]': 300}}, "'.PAD.' cannot have the id 300"),
        ({'vocab': SMALL_VOCAB, 'merges': [], 'added_tokens': {'[PAD]': 'x'}}, 'does not map tokens to ids'),
        (
            {
                'vocab': SMALL_VOCAB,
                'merges': [],
                'tokenizer_config': {'added_tokens_decoder': {'x': {'content': '[PAD]'}}},
            },
            'cannot read',
        ),
    ],
)
def test_invalid_tokenizer_files(tmp_path, files, words):
    pytest.importorskip('tokenizers')
    with pytest.raises(UserError, match=words) as error:
        read_tokenizer(write_folder(tmp_path / 'm', **files))
    assert str(tmp_path) in str(error.value)


def test_a_folder_without_a_tokenizer(tmp_path):
    """Not even a model with GPT-2's vocabulary size gets GPT-2's tokenizer."""
    from pretrained import pretrained_tokenizer

    assert read_tokenizer(str(tmp_path)) is None
    assert read_tokenizer(write_folder(tmp_path / 'm', vocab=SMALL_VOCAB, config={'vocab_size': 50257})) is None
    assert pretrained_tokenizer(str(tmp_path / 'm')) is None and pretrained_tokenizer('gpt2-xl') == GPT2_SPEC


def test_without_the_tokenizers_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    for files in ({'tokenizer': small()}, {'vocab': SMALL_VOCAB, 'merges': []}):
        with pytest.raises(UserError, match='needs the package tokenizers: pip install tokenizers'):
            read_tokenizer(write_folder(tmp_path / 'm', **files))


# --- byte-level BPEs in tiktoken --------------------------------------------------------------------------------------

LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
LLAMA3 += r'|\s*[\r\n]+|\s+(?!\S)|\s+'
SHAPES = ('gpt2', 'smollm2', 'llama3', 'qwen2')


def pre_tokenizer_of(shape):
    """How the models of a family split text."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split

    if shape == 'gpt2':
        return ByteLevel(add_prefix_space=False)
    if shape == 'smollm2':
        return Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
    pattern = LLAMA3 if shape == 'llama3' else LLAMA3.replace('{1,3}', '')
    return Sequence([Split(Regex(pattern), 'isolated'), ByteLevel(add_prefix_space=False, use_regex=False)])


@functools.cache
def shaped(shape):
    """A small BPE in the shape of a family's tokenizer: split, normalized, with special and other added tokens -> the
    tokenizers library's Tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    library = Tokenizer(models.BPE(ignore_merges=shape == 'llama3'))
    library.pre_tokenizer, library.decoder = pre_tokenizer_of(shape), decoders.ByteLevel()
    if shape == 'qwen2':
        library.normalizer = normalizers.NFC()
    first = ['<|endoftext|>', '<|im_start|>'] if shape == 'smollm2' else []  # in the vocabulary, before the bytes
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    rng = random.Random(8)
    library.train_from_iterator([unruly_text(rng) + ' the 2048 times' for _ in range(1500)], trainer)
    library.add_special_tokens(
        [AddedToken('<|endoftext|>', normalized=False), AddedToken('<|im_end|>', normalized=False)]
    )
    if shape == 'qwen2':
        library.add_tokens([AddedToken('<tool>', normalized=False), AddedToken('<tool>s', normalized=False)])
    if shape == 'llama3':
        begin = library.token_to_id('<|im_end|>')
        library.post_processor = processors.TemplateProcessing('<|im_end|> $A', special_tokens=[('<|im_end|>', begin)])
    return library


def without_new(text):
    """A text without characters that are newer than Python's tables."""
    return ''.join(char for char in text if unicodedata.category(char) != 'Cn')


def added_text(rng):
    """Unruly text with added tokens, whole and broken."""
    pieces = [
        '<|im_end|>',
        '<|im_end',
        '<|endoftext|>',
        '<tool>',
        '<tool>s',
        '<tool',
        '>',
        ' 12345',
        "'S",
        "'ſ",
        '\r\n \n',
    ]
    pieces += ['e\u0301', 'Å', '\x85\x85', '   ', '½Ⅷ', 'ǅ', 'ֿ', '\ufffd', '\U0001f468\u200d\U0001f469']
    return ''.join(rng.choice(pieces) if rng.random() < 0.5 else unruly_text(rng, 6) for _ in range(rng.randrange(12)))


@pytest.mark.parametrize('shape', SHAPES)
def test_tiktoken_gives_the_ids_of_the_library(shape):
    pytest.importorskip('tiktoken')
    tokenizers = pytest.importorskip('tokenizers')
    content = shaped(shape).to_str()
    theirs, ours = tokenizers.Tokenizer.from_str(content), load_tokenizer({'kind': 'tokenizers', 'json': content})
    assert ours.fast
    rng, merged = random.Random(9), 0
    for n in range(600):
        text = added_text(rng) if n % 2 else random_text(rng, rng.randrange(60))
        text = without_new(text) if n % 10 else text
        for special in (False, True):
            theirs.encode_special_tokens = not special
            ids = theirs.encode(text, add_special_tokens=False).ids
            fast = ours.fast.encode(text, special)
            if fast is None:  # characters that are newer than Python's tables
                assert any(unicodedata.category(char) == 'Cn' for char in text)
            else:
                assert fast.dtype == np.int32 and fast.tolist() == ids, text
            assert ours.encode(text, special).tolist() == ids
            merged += fast is not None and len(fast) < len(text)
    assert merged > 100
    assert ours.fast.encode('').tolist() == [] and ours.fast.encode('', special=True).tolist() == []
    assert ours.fast.encode('a<|im_end|>b', True).tolist() == ours.encode('a<|im_end|>b', special=True).tolist()


def test_a_long_text_is_encoded_by_tiktoken(monkeypatch):
    """A short one is not worth the preparation."""
    pytest.importorskip('tiktoken')
    pytest.importorskip('tokenizers')
    tokenizer = load_tokenizer({'kind': 'tokenizers', 'json': shaped('gpt2').to_str()})
    expected = tokenizer.encode('the times ' * 20000).tolist()
    monkeypatch.setattr(tokenizer, 'encode_by_library', None)
    assert 'fast' in vars(tokenizer) and tokenizer.encode('the times ' * 20000).tolist() == expected
    short = load_tokenizer(tokenizer.spec())
    short.encode('the times ' * 20)
    assert 'fast' not in vars(short)


def test_a_real_tokenizer_in_tiktoken(gpt2_vocabulary):
    """GPT-2's, from its tokenizer.json; old files have no "type" in their model."""
    pytest.importorskip('tokenizers')
    tokenizer, rng = load_tokenizer(foreign(gpt2_files()[2])), random.Random(10)
    for _ in range(200):
        text = without_new(added_text(rng))
        for special in (False, True):
            assert tokenizer.fast.encode(text, special).tolist() == gpt2_vocabulary.encode(text, special).tolist()


def bpe_description(merges, tokens=(), shape='gpt2', **model):
    """A parsed tokenizer.json with these merges, written 'a b', and these further tokens in its vocabulary."""
    tokenizers = pytest.importorskip('tokenizers')
    pairs = [tuple(pair.split()) for pair in merges]
    vocab = {token: id for id, token in enumerate([*byte_characters(), *map(''.join, pairs), *tokens])}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, pairs, **model))
    library.pre_tokenizer, library.decoder = pre_tokenizer_of(shape), tokenizers.decoders.ByteLevel()
    return json.loads(library.to_str())


def test_vocabularies_that_tiktoken_would_merge_differently():
    """Of tokens that merging their own bytes does not give."""
    pytest.importorskip('tiktoken')
    for merges, tokens, ignores_merges, same in (
        (['a b', 'ab c'], (), False, True),
        (['b c', 'a b', 'ab c'], (), False, False),  # abc is a, bc; tiktoken would take it whole
        (['b c', 'a b', 'ab c'], (), True, False),  # xabc is x, a, bc; tiktoken would make it x, abc
        (['b c', 'a b', 'ab c', 'a bc'], (), True, True),
        (['a b'], ['xyz'], False, True),  # a word that nothing makes
        (['a b'], ['xyz'], True, True),  # a word that is taken only as a whole
        (['a b'], ['abc'], True, False),  # xabc is x, ab, c; tiktoken would make it x, abc
        (['a b', 'b c', 'ab c', 'x y', 'a bc'], (), True, False),  # the merges that make abc lie apart
    ):
        tokenizer = load_tokenizer(foreign(bpe_description(merges, tokens, ignore_merges=ignores_merges)))
        assert bool(tokenizer.fast) == same, (merges, tokens, ignores_merges)
        for text in itertools.product('abcxyz', repeat=4) if same else ():
            text = ''.join(text)
            assert tokenizer.fast.encode(text).tolist() == tokenizer.encode(text).tolist(), text


def split_by(pattern, behavior='Isolated', invert=False):
    byte_level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': False}
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': behavior, 'invert': invert}
    return {'type': 'Sequence', 'pretokenizers': [split, byte_level]}


@pytest.mark.parametrize(
    'change, fast',
    [
        ({}, True),
        ({'pre_tokenizer': split_by(LLAMA3)}, True),
        ({'pre_tokenizer': split_by(LLAMA3, 'Removed', invert=True)}, True),
        ({'pre_tokenizer': split_by(LLAMA3, 'Removed')}, False),
        ({'pre_tokenizer': split_by(r'\p{L}+|.')}, False),  # line ends lie between its matches; tiktoken drops them
        ({'pre_tokenizer': split_by(r'(')}, False),
        ({'pre_tokenizer': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True}}, False),
        ({'pre_tokenizer': None}, False),
        ({'normalizer': {'type': 'NFC'}}, True),
        ({'normalizer': {'type': 'NFKC'}}, False),
        ({'normalizer': {'type': 'Lowercase'}}, False),
        ({'added_tokens': [{**added_token(258, '</s>'), 'lstrip': True}]}, False),
        ({'added_tokens': [{**added_token(258, '</s>'), 'single_word': True}]}, False),
        ({'added_tokens': [added_token(258, '</s>'), added_token(259, '<s>', normalized=True)]}, False),
        ({'added_tokens': [added_token(256, 'th')]}, False),  # merges make it too
    ],
)
def test_where_the_library_encodes(change, fast):
    """Whatever tiktoken might encode differently; silently, as the ids are what they were."""
    pytest.importorskip('tiktoken')
    description = {**bpe_description(['t h', 'th e']), **change}
    if 'pattern' in str(change) and '(' in str(change) and len(str(change)) < 250:
        with pytest.raises(ValueError):
            load_tokenizer(foreign(description))
        return
    assert bool(load_tokenizer(foreign(description)).fast) == fast


def test_bytes_that_a_vocabulary_lacks():
    """SmolLM2's lacks a few: the library drops them."""
    pytest.importorskip('tiktoken')
    description = bpe_description(['t h'])
    for byte in (4, 0xF1, 0xFF):
        del description['model']['vocab'][byte_characters()[byte]]
    tokenizer = load_tokenizer(foreign(description))
    assert tokenizer.fast.encode('t\x04h') is None and tokenizer.fast.encode('\U00040000') is None
    assert tokenizer.encode('t\x04h').tolist() == [description['model']['vocab'][letter] for letter in 'th']
    assert tokenizer.fast.encode('t\x05h😀').tolist() == tokenizer.encode('t\x05h😀').tolist()


def test_without_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, 'tiktoken', None)
    assert load_tokenizer(foreign(bpe_description(['t h']))).fast is None


def test_white_space_without_end():
    """tiktoken's pattern gives up at some length; the library does not."""
    pytest.importorskip('tiktoken')
    tokenizer = load_tokenizer(foreign(bpe_description(['Ġ Ġ'])))
    assert tokenizer.fast.encode(' ' * 1_200_000 + 'a') is None


def test_prefix():
    """What the model wants before a text: Llama's BOS."""
    pytest.importorskip('tokenizers')
    llama = load_tokenizer({'kind': 'tokenizers', 'json': shaped('llama3').to_str()})
    assert llama.prefix == [shaped('llama3').token_to_id('<|im_end|>')]
    assert llama.prefix + llama.encode('the').tolist() == shaped('llama3').encode('the').ids
    assert llama.prefix[0] not in llama.encode('the')
    assert load_tokenizer({'kind': 'tokenizers', 'json': shaped('gpt2').to_str()}).prefix == []
    assert ByteTokenizer().prefix == CharTokenizer.train('a').prefix == []


# --- what the files beside a tokenizer say ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    'files, template',
    [
        ({}, None),
        ({'tokenizer_config': {'chat_template': '{{ a }}'}}, '{{ a }}'),
        ({'chat_template': {'chat_template': '{{ b }}'}, 'tokenizer_config': {'chat_template': '{{ a }}'}}, '{{ b }}'),
        (
            {
                'tokenizer_config': {
                    'chat_template': [
                        {'name': 'tool_use', 'template': '{{ t }}'},
                        {'name': 'default', 'template': '{{ d }}'},
                    ]
                }
            },
            '{{ d }}',
        ),
        ({'tokenizer_config': {'chat_template': [{'name': 'rag', 'template': '{{ r }}'}, 'x']}}, None),
    ],
)
def test_the_chat_template(tmp_path, files, template):
    pytest.importorskip('tokenizers')
    folder = write_folder(tmp_path / 'm', tokenizer=small(), **files)
    assert read_tokenizer(folder).get('chat_template') == template
    (tmp_path / 'm/chat_template.jinja').write_text('{{ é }}\n', encoding='utf-8')
    assert read_tokenizer(folder)['chat_template'] == '{{ é }}\n'


def test_special_tokens_by_name(tmp_path):
    pytest.importorskip('tokenizers')
    config = {'bos_token': {'content': '<|end|>'}, 'pad_token': '[none]', 'unk_token': None, 'eos_token': '</s>'}
    files = {'special_tokens_map': {'unk_token': '</s>', 'bos_token': '</s>'}, 'tokenizer_config': config}
    spec = read_tokenizer(write_folder(tmp_path / 'm', tokenizer=small(), **files))
    assert spec['special_tokens'] == {'bos_token': '<|end|>', 'unk_token': '</s>', 'eos_token': '</s>'}
    assert 'special_tokens' not in read_tokenizer(write_folder(tmp_path / 'm', tokenizer=small()))
    plain = foreign(small())
    assert same_ids(spec, plain) and load_tokenizer(spec).spec() == spec
    for kind in ({'kind': 'byte'}, {'kind': 'char', 'chars': 'ab'}, GPT2_SPEC):
        more = {**kind, 'chat_template': '{{ a }}', 'special_tokens': {'eos_token': '<|endoftext|>'}}
        assert check_spec(more) == more and same_ids(more, kind) and same_ids(kind, more)


@pytest.mark.parametrize(
    'more',
    [
        {'chat_template': 5},
        {'chat_template': 'x' * 1_000_001},
        {'special_tokens': []},
        {'special_tokens': {'bos_token': 1}},
        {'special_tokens': {'bos_token': 'x' * 1001}},
        {'special_tokens': {'image_token': '<i>'}},
    ],
)
def test_invalid_additions(tmp_path, more):
    with pytest.raises(ValueError, match=next(iter(more))):
        check_spec({'kind': 'byte', **more})
    if 'chat_template' in more:
        pytest.importorskip('tokenizers')
        with pytest.raises(UserError, match='cannot use the tokenizer in .*chat_template'):
            read_tokenizer(write_folder(tmp_path / 'm', tokenizer=small(), tokenizer_config=more))


def test_hostile_files(tmp_path):
    """One line, and no memory taken."""
    pytest.importorskip('tokenizers')
    resource = pytest.importorskip('resource')
    folder = write_folder(tmp_path / 'm', tokenizer=small(), tokenizer_config={})
    huge = tmp_path / 'huge'
    huge.touch()
    os.truncate(huge, 2**30)  # takes no space on the disk
    (tmp_path / 'deep').write_text('[' * 5_000_000)
    os.mkfifo(tmp_path / 'pipe')
    (tmp_path / 'bytes').write_bytes(b'\xff\xfe')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for source, name, words in (
        ('huge', 'tokenizer.json', 'it has 1,073,741,824 bytes, more than'),
        ('huge', 'tokenizer_config.json', 'it has 1,073,741,824 bytes, more than'),
        ('huge', 'chat_template.jinja', 'it has 1,073,741,824 bytes, more than'),
        ('deep', 'tokenizer.json', 'not a tokenizer.json'),
        ('deep', 'tokenizer_config.json', 'recursion'),
        ('pipe', 'tokenizer.json', 'it is not a plain file'),
        ('pipe', 'special_tokens_map.json', 'it is not a plain file'),
        ('bytes', 'tokenizer.json', 'decode'),
    ):
        write_folder(tmp_path / 'm', tokenizer=small(), tokenizer_config={})
        (tmp_path / 'm' / name).unlink(missing_ok=True)
        (tmp_path / 'm' / name).symlink_to(tmp_path / source)
        with pytest.raises(UserError, match=words) as error:
            read_tokenizer(folder)
        assert name in str(error.value) and '\n' not in str(error.value) and len(str(error.value)) < 600
    write_folder(tmp_path / 'm', vocab=SMALL_VOCAB)
    (tmp_path / 'm/merges.txt').symlink_to(huge)
    with pytest.raises(UserError, match='it has 1,073,741,824 bytes'):
        read_tokenizer(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KB


# --- out: transformers opens what we write ----------------------------------------------------------------------------

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}\n{% endfor %}"


def specs_to_write(kind):
    """A spec of each kind, to be written."""
    rng = random.Random(11)
    if kind == 'char':
        return CharTokenizer.train(''.join(added_text(rng) for _ in range(500)).replace('\u0378', '')).spec()
    if kind == 'bpe':
        return train_bpe([added_text(rng) for _ in range(500)], 400)
    if kind in SHAPES:
        named = {'bos_token': '<|endoftext|>', 'pad_token': '<|im_end|>', 'eos_token': '<|im_end|>'}
        spec = {
            'kind': 'tokenizers',
            'json': shaped(kind).to_str(),
            'end_of_text': '<|im_end|>',
            'special_tokens': named,
        }
        return {**spec, 'chat_template': CHAT}
    return {'kind': kind.removeprefix('our ')}


@pytest.fixture
def auto_tokenizer(tmp_path):
    """A function that opens tmp_path in transformers, as the tokenizer of a model of some type."""
    transformers = pytest.importorskip('transformers')
    transformers.logging.set_verbosity_error()

    def load(model_type):
        (tmp_path / 'config.json').write_text(json.dumps({'model_type': model_type}))
        return transformers.AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)

    return load


@pytest.mark.parametrize('kind', ['char', 'byte', 'our gpt2', 'bpe', *SHAPES])
def test_transformers_gives_our_ids_and_our_text(tmp_path, auto_tokenizer, kind, request):
    if kind == 'our gpt2':
        request.getfixturevalue('gpt2_vocabulary')
    spec = specs_to_write(kind)
    ids = write_tokenizer(spec, str(tmp_path), 64)
    ours, rng = load_tokenizer(spec), random.Random(12)
    for theirs in map(auto_tokenizer, ('gpt2', 'llama', 'qwen3', *(['qwen2'] if kind == 'qwen2' else []))):
        assert (len(theirs), theirs.model_max_length) == (ours.vocab_size, 64)
        assert theirs.eos_token_id == ids['eos_token_id'] == ours.end_of_text
        for _ in range(30):
            text = added_text(rng)
            if kind == 'char':
                text = ''.join(char for char in text if char in spec['chars'])
            for special in (True, False):
                encoded = ours.encode(text, special).tolist()
                bare = theirs(text, add_special_tokens=False, split_special_tokens=not special)
                assert bare['input_ids'] == encoded, text
                assert theirs.decode(encoded) == ours.decode(encoded)
            assert theirs('a' if kind == 'char' else text)['input_ids'] == [
                *ours.prefix,
                *ours.encode('a' if kind == 'char' else text, special=True).tolist(),
            ]
        some = [rng.randrange(ours.vocab_size) for _ in range(300)]  # also bytes that are no UTF-8
        assert theirs.decode(some) == ours.decode(some)
        for text in ('\n', ' a', 'a ', 'a  b', 'a .', '\n\n a\n', 'e\u0301'):
            assert theirs.decode(theirs(text, add_special_tokens=False)['input_ids']) in (text, 'é')
    if 'chat_template' in spec:
        messages = [{'role': 'user', 'content': 'the <|im_end|>'}]
        assert theirs.apply_chat_template(messages, tokenize=False) == '<|im_start|>user\nthe <|im_end|>\n'
        assert (theirs.bos_token, theirs.pad_token_id) == ('<|endoftext|>', ids['pad_token_id'])


@pytest.mark.parametrize('kind', ['char', 'byte', 'bpe', *SHAPES])
def test_what_we_write_we_read(tmp_path, kind):
    pytest.importorskip('tokenizers')
    spec = specs_to_write(kind)
    ids = write_tokenizer(spec, str(tmp_path), 64)
    again = read_tokenizer(str(tmp_path))
    assert same_ids(spec, again) and same_ids(again, spec)
    assert spec_end_of_text(again) == spec_end_of_text(spec) == ids['eos_token_id']
    for key in ('chat_template', 'special_tokens'):
        assert key not in spec or again[key] == spec[key]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ['tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json']
        + ['chat_template.jinja'] * ('chat_template' in spec)
    )


def test_characters_that_a_written_vocabulary_lacks(tmp_path, auto_tokenizer):
    """The library raises an exception, as we do: it has no token for them and drops nothing."""
    write_tokenizer({'kind': 'char', 'chars': 'ab \n'}, str(tmp_path), 8)
    with pytest.raises(Exception, match='UNK'):
        auto_tokenizer('gpt2')('abc')
    with pytest.raises(UserError, match='half a character'):
        write_tokenizer({'kind': 'char', 'chars': 'a\ud800'}, str(tmp_path), 8)


def test_an_end_of_text_that_was_a_word(tmp_path, auto_tokenizer):
    """A vocab.json may hold it like any other token; what we write makes it special."""
    description = bpe_description(['t h'], ['<|endoftext|>'])
    ids = write_tokenizer(foreign(description), str(tmp_path), 8)
    assert ids == {'bos_token_id': None, 'eos_token_id': 257, 'pad_token_id': None}
    assert auto_tokenizer('llama')('th<|endoftext|>')['input_ids'] == [256, 257]


# --- streams ----------------------------------------------------------------------------------------------------------


def unicode_text(rng, n=40):
    """Characters of every length in UTF-8, combining marks and a real U+FFFD."""
    return ''.join(
        rng.choice(['a', ' ', 'é', '€', '漢', '😀', '👨‍👩‍👧', '\ufffd', '\n', 'the ', 'ß', 'e\u0301']) for _ in range(n)
    )


def make_tokenizers():
    """Each kind of tokenizer; of the library, a byte-level one and one that adds spaces between words."""
    import tokenizers

    yield CharTokenizer.train(unicode_text(random.Random(0), 400))
    yield ByteTokenizer()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(['the theme of the thesis €'], vocab_size=280, show_progress=False)
    yield load_tokenizer({'kind': 'tokenizers', 'json': bpe.to_str()})
    spaced = tokenizers.SentencePieceBPETokenizer()
    spaced.train_from_iterator([unicode_text(random.Random(1), 400)], vocab_size=60, show_progress=False)
    yield load_tokenizer({'kind': 'tokenizers', 'json': spaced.to_str()})


def test_a_stream_returns_complete_characters_and_loses_none():
    for tokenizer in make_tokenizers():
        for seed in range(30):
            rng = random.Random(seed)
            text = unicode_text(rng)
            ids = tokenizer.encode(text).tolist()
            check_stream(tokenizer, ids, whole=tokenizer.decode(ids).count('\ufffd') == text.count('\ufffd'))
            check_stream(tokenizer, [rng.randrange(tokenizer.vocab_size) for _ in range(40)])  # mostly invalid UTF-8


def test_a_stream_of_gpt2_ids(gpt2_vocabulary):
    for seed in range(30):
        rng = random.Random(seed)
        check_stream(gpt2_vocabulary, gpt2_vocabulary.encode(unicode_text(rng)).tolist(), whole=True)
        check_stream(gpt2_vocabulary, [rng.randrange(256) for _ in range(40)])


def check_stream(tokenizer, ids, whole=False):
    stream = TextStream(tokenizer)
    pieces = [stream.push([i]) for i in ids] + [stream.flush()]
    assert ''.join(pieces) == tokenizer.decode(ids)
    if whole:  # a piece has U+FFFD only where the text has it
        assert sum(piece.count('\ufffd') for piece in pieces) == tokenizer.decode(ids).count('\ufffd')


def test_bytes_without_a_token_are_told(capsys):
    """SmolLM2's vocabulary lacks some bytes, which the library drops; so do we, as its model knows no better."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {char: id for id, char in enumerate(byte_characters()[32:127])}
    library = Tokenizer(models.BPE(vocab, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    tokenizer = load_tokenizer({'kind': 'tokenizers', 'json': library.to_str()})
    assert tokenizer.decode(tokenizer.encode('plain')) == 'plain' and not capsys.readouterr().err
    for _ in range(2):
        assert tokenizer.decode(tokenizer.encode('a\x04b')) == 'ab'
    assert capsys.readouterr().err.count("no token for the byte b'\\x04'") == 1
