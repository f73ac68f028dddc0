"""Text to ids and back, for any text."""
import random

import pytest
from conftest import SHARED

from configurator import UserError
from tokenizer import (
    GPT2_SPEC,
    ByteTokenizer,
    CharTokenizer,
    HuggingFaceTokenizer,
    TextStream,
    byte_characters,
    check_spec,
    load_tokenizer,
    same_ids,
    spec_end_of_text,
    spec_from_nanogpt,
    spec_vocab_size,
    train_bpe,
)


def random_text(rng, n=200):
    """Characters from all over Unicode."""
    return ''.join(chr(rng.choice([rng.randrange(0x80), rng.randrange(0xA0, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(n))


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
    """Letters, digits, marks, white space and special tokens of all kinds, in a row."""
    pieces = ['the ', 'The', " it's", "'LL", ' ', '  ', '\n', '\r\n', '\t', '\u3000', '\x85', '\x1c', '\x00', '<|endoftext|>', '12', '٣',
              '...', 'é', 'e\u0301', '漢字', '😀']
    return ''.join(rng.choice(pieces) if rng.random() < 0.7 else random_text(rng, 1) for _ in range(rng.randrange(n)))


@pytest.fixture(scope='module')
def trained():
    """A BPE trained on unruly text -> (ours, the tokenizers library's own from the same json)."""
    tokenizers = pytest.importorskip('tokenizers', reason='trains a BPE')
    rng = random.Random(3)
    texts = [unruly_text(rng) for _ in range(3000)]
    spec = train_bpe(iter(texts), 1500)
    assert train_bpe(iter(texts), 1500) == spec, 'the same texts give the same tokenizer'
    theirs = tokenizers.Tokenizer.from_str(spec['json'])
    theirs.encode_special_tokens = True  # that is, as text
    return load_tokenizer(spec), theirs


def test_a_trained_bpe_is_the_tokenizers_librarys(trained):
    ours, theirs = trained
    assert ours.vocab_size == theirs.get_vocab_size() == 1500 and ours.end_of_text == theirs.token_to_id('<|endoftext|>')
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


def test_both_libraries_cut_text_alike():
    """A vocabulary that shows between which characters a piece ends: every pair of an ASCII character of each class and a byte."""
    tiktoken, tokenizers = pytest.importorskip('tiktoken'), pytest.importorskip('tokenizers')
    from tokenizers import models, pre_tokenizers

    from tokenizer import GPT2_PATTERN
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


def test_facts_of_a_spec(trained, gpt2_vocabulary):
    for tokenizer in (trained[0], ByteTokenizer(), CharTokenizer.train('abc'), gpt2_vocabulary):
        assert spec_vocab_size(tokenizer.spec()) == tokenizer.vocab_size == len(tokenizer.token_bytes())
        assert spec_end_of_text(tokenizer.spec()) == tokenizer.end_of_text
    foreign = {'kind': 'tokenizers', 'json': '{}'}
    assert same_ids(GPT2_SPEC, foreign) and same_ids(GPT2_SPEC, dict(GPT2_SPEC))
    assert not same_ids(GPT2_SPEC, {'kind': 'byte'}) and not same_ids({'kind': 'char', 'chars': 'ab'}, {'kind': 'char', 'chars': 'ac'})


@pytest.mark.parametrize('spec', [{'kind': 'bpe', 'json': json} for json in (
    '', '[]', '{}', '{"model": {"vocab": {"a": 0}}}', '{"model": {"vocab": {"<|endoftext|>": "x"}}}', '{"model": {"vocab": [1]}}',
    '{"model": {"vocab": {"<|endoftext|>": 0, "\\u4e00": 1}}}', '{"model": {"vocab": {"<|endoftext|>": -1}}}', '[' * 100000)])
def test_unsound_bpe(spec):
    pytest.importorskip('tiktoken')
    with pytest.raises(ValueError, match='not the tokenizer.json of a byte-level BPE trained here'):
        load_tokenizer(spec)


@pytest.mark.parametrize('spec', [None, [], {}, {'kind': 'bpe'}, {'kind': 'words'}, {'kind': 'char'}, {'kind': 'char', 'chars': ''},
                                  {'kind': 'char', 'chars': 'aba'}, {'kind': 'char', 'chars': ['a']}, {'kind': 'tokenizers'}])
def test_unsound_specs(spec):
    with pytest.raises(ValueError):
        check_spec(spec)


@pytest.mark.parametrize('meta', [[], {}, {'vocab_size': 2, 'itos': {0: 'a'}}, {'vocab_size': 1, 'itos': {1: 'a'}},
                                  {'vocab_size': 2, 'itos': {0: 'a', 1: 'a'}}, {'vocab_size': 1, 'itos': {0: 'ab'}},
                                  {'vocab_size': '2', 'itos': {}}])
def test_unsound_nanogpt_meta(meta):
    with pytest.raises(ValueError):
        spec_from_nanogpt(meta)




def unicode_text(rng, n=40):
    """Text of every length of UTF-8, with marks that combine and a real U+FFFD."""
    return ''.join(rng.choice(['a', ' ', 'é', '€', '漢', '😀', '👨‍👩‍👧', '\ufffd', '\n', 'the ', 'ß', 'e\u0301']) for _ in range(n))


def make_tokenizers():
    """Each kind of tokenizer; of the library's, one of bytes and one that spaces words by their neighbours."""
    import tokenizers
    yield CharTokenizer.train(unicode_text(random.Random(0), 400))
    yield ByteTokenizer()
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(['the theme of the thesis €'], vocab_size=280, show_progress=False)
    yield HuggingFaceTokenizer(bpe.to_str())
    spaced = tokenizers.SentencePieceBPETokenizer()
    spaced.train_from_iterator([unicode_text(random.Random(1), 400)], vocab_size=60, show_progress=False)
    yield HuggingFaceTokenizer(spaced.to_str())


def test_a_stream_shows_whole_characters_and_loses_none():
    for tokenizer in make_tokenizers():
        for seed in range(30):
            rng = random.Random(seed)
            text = unicode_text(rng)
            ids = tokenizer.encode(text).tolist()
            check_stream(tokenizer, ids, whole=tokenizer.decode(ids).count('\ufffd') == text.count('\ufffd'))
            check_stream(tokenizer, [rng.randrange(tokenizer.vocab_size) for _ in range(40)])  # not UTF-8, mostly


def test_a_stream_of_gpt2s(gpt2_vocabulary):
    for seed in range(30):
        rng = random.Random(seed)
        check_stream(gpt2_vocabulary, gpt2_vocabulary.encode(unicode_text(rng)).tolist(), whole=True)
        check_stream(gpt2_vocabulary, [rng.randrange(256) for _ in range(40)])


def check_stream(tokenizer, ids, whole=False):
    stream = TextStream(tokenizer)
    pieces = [stream.push([i]) for i in ids] + [stream.flush()]
    assert ''.join(pieces) == tokenizer.decode(ids)
    if whole:  # a piece has U+FFFD only where the text has
        assert sum(piece.count('\ufffd') for piece in pieces) == tokenizer.decode(ids).count('\ufffd')
