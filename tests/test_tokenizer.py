"""Text to ids and back, for any text."""
import random

import pytest
from conftest import SHARED

from tokenizer import CharTokenizer, HuggingFaceTokenizer, TextStream, check_spec, load_tokenizer, spec_from_nanogpt


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


@pytest.mark.parametrize('spec', [None, [], {}, {'kind': 'words'}, {'kind': 'char'}, {'kind': 'char', 'chars': ''},
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
