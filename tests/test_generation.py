"""Drawing tokens: the cache against computing everything again, a batch against each row alone, against Hugging Face's
generate() and logits processors, and texts that end as they should."""

import dataclasses
import math
import random

import pytest
import torch
from conftest import CHARS

import generation
from common.errors import UserError
from formats.huggingface import to_hugging_face
from generation import Context, KVCache, Sample, Sampling, generate, uniforms, window_start
from model import GPT, GPTConfig
from tokenizer import CharTokenizer

BLOCK, VOCAB = 16, 50
OPTIONS = [
    {},
    {'bias': False},
    {'mlp': 'gelu_tanh'},
    {'n_head': 1},
    {'pos': 'rope'},
    {'pos': 'alibi'},
    {'pos': 'none'},
    {'n_kv_head': 2},
    {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'relu2', 'qk_norm': True},
    {
        'pos': 'alibi',
        'norm': 'rmsnorm',
        'mlp': 'swiglu',
        'qk_norm': True,
        'n_kv_head': 1,
        'tie_weights': False,
        'logit_softcap': 4.0,
    },
]
SAMPLINGS = [
    Sampling(0),
    Sampling(1.0),
    Sampling(0.8, top_k=5),
    Sampling(1.2, top_p=0.7),
    Sampling(1.0, min_p=0.1),
    Sampling(1.0, 10, 0.9, 0.05, 1.3, 45),
    Sampling(0, repetition_penalty=2.0),
]


def make_model(seed=0, **options):
    """A random model in float64, where two ways to compute the same never differ enough to change a token."""
    torch.manual_seed(seed)
    model = (
        GPT(GPTConfig(**{**dict(block_size=BLOCK, vocab_size=VOCAB, n_layer=3, n_head=4, n_embd=32), **options}))
        .double()
        .eval()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3)
    return model


@torch.no_grad()
def recompute(model, prompt, n, sampling, key):
    """The definition: the model sees row[window_start:], everything is computed again for every token."""
    return recompute_all(model, prompt, n, [sampling], key)[0]


@torch.no_grad()
def recompute_all(model, prompt, n, samplings, key):
    """The same for several samplings of one prompt, whose rows are of one length at all times."""
    rows, numbers = [list(prompt) for _ in samplings], uniforms(n, (*key, 0))
    for t in range(n):
        idx = torch.tensor([row[window_start(len(row), model.config.block_size) :] for row in rows])
        logits = model(idx, idx)[0][:, -1:]
        for row, its, sampling in zip(rows, logits, samplings):
            occurred = torch.zeros(1, VOCAB, dtype=torch.bool)
            occurred[0, row] = True
            row.append(int(sampling.choose(its, numbers[t : t + 1], occurred)))
    return [row[len(prompt) :] for row in rows]


def generated(model, samples, n, sampling, **options):
    for _ in generate(model, samples, n, sampling, **options):
        pass
    return [sample.ids for sample in samples]


def make_prompts(*lengths):
    rng = random.Random(0)
    return [[rng.randrange(VOCAB) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize('options', OPTIONS, ids=str)
def test_cached_equals_recomputed(options):
    model = make_model(**options)
    prompts = make_prompts(
        1, 3, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 7
    )  # of different lengths, in one batch, past the window
    prompts += [prompts[1]]
    n = 2 * BLOCK  # in which the window moves on several times
    expected = zip(*[recompute_all(model, prompt, n, SAMPLINGS, (5, i)) for i, prompt in enumerate(prompts)])
    for sampling, texts in zip(SAMPLINGS, expected, strict=True):
        for static in (
            (False, True) if sampling in SAMPLINGS[::3] else (False,)
        ):  # a static cache knows nothing of how tokens are chosen
            samples = [Sample(prompt, (5, i)) for i, prompt in enumerate(prompts)]
            assert generated(model, samples, n, sampling, static=static) == list(texts)
    alike = make_prompts(9, 9, 9)  # which go on together, from the first
    expected = [recompute(model, prompt, n, Sampling(), (5, i)) for i, prompt in enumerate(alike)]
    for static in (False, True):
        assert (
            generated(model, [Sample(prompt, (5, i)) for i, prompt in enumerate(alike)], n, Sampling(), static=static)
            == expected
        )


@pytest.mark.parametrize('block_size', [1, 2, 3])
def test_the_shortest_windows(block_size):
    model, prompts = make_model(block_size=block_size), make_prompts(1, 2, 9)
    samples = [Sample(prompt, (i,)) for i, prompt in enumerate(prompts)]
    assert generated(model, samples, 12, Sampling()) == [
        recompute(model, prompt, 12, Sampling(), (i,)) for i, prompt in enumerate(prompts)
    ]


def test_a_sample_does_not_depend_on_its_neighbours():
    model, tokenizer = make_model(vocab_size=len(CHARS)), CharTokenizer(CHARS)
    prompts = [tokenizer.encode(text).tolist() for text in ('a', 'once upon a time there was', 'b\n', 'the end. again')]
    for static in (False, True):
        together = [Sample(prompt, (7, i), tokenizer, stop=('.', 'z')) for i, prompt in enumerate(prompts)]
        generated(model, together, 40, Sampling(1.0, top_k=20), static=static)
        alone = [Sample(prompt, (7, i), tokenizer, stop=('.', 'z')) for i, prompt in enumerate(prompts)]
        for sample in alone:
            generated(model, [sample], 40, Sampling(1.0, top_k=20))
        assert [vars(sample) | {'stream': 0} for sample in together] == [
            vars(sample) | {'stream': 0} for sample in alone
        ]
        assert len({len(sample.ids) for sample in together}) > 1, 'all ended at once, so that nothing was tested'


@pytest.mark.parametrize('block_size', [1, 2, 3, 16, 1024])
def test_window(block_size):
    """Between a half and a whole block is in sight; the start never moves back and seldom forward."""
    starts = [window_start(n, block_size) for n in range(1, 5 * block_size)]
    for n, start in enumerate(starts, 1):
        assert (n <= block_size and start == 0) or min(n, block_size // 2) < n - start <= block_size
    assert starts == sorted(starts) and len(set(starts)) <= 1 + (4 * block_size) // max(1, block_size // 2)


def test_equals_hugging_face_greedy():
    model = make_model().float()
    prompts = make_prompts(5, 5, 5)
    idx = torch.tensor(prompts)
    for penalty in (1.0, 1.5):
        theirs = to_hugging_face(model).generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=BLOCK - 5,
            do_sample=False,
            pad_token_id=0,
            repetition_penalty=penalty,
        )
        ours = generated(
            model, [Sample(prompt) for prompt in prompts], BLOCK - 5, Sampling(0, repetition_penalty=penalty)
        )
        assert ours == theirs[:, 5:].tolist()


@pytest.mark.parametrize(
    'sampling',
    [
        Sampling(0.7),
        Sampling(1.0, top_k=7),
        Sampling(1.3, top_p=0.6),
        Sampling(1.0, min_p=0.15),
        Sampling(0.9, 30, 0.9, 0.02, 1.4),
        Sampling(1.0, top_p=1e-9),
        Sampling(2.0, top_k=1),
    ],
    ids=str,
)
def test_probabilities_equal_hugging_face(sampling):
    """Over uniform numbers side by side, each token is chosen as often as Hugging Face's processors give it."""
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    torch.manual_seed(0)
    n, logits, seen = 20000, 2 * torch.randn(1, VOCAB), [3, 4, 4, 17]
    penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
    processors = LogitsProcessorList([penalty, TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    processors += [TopPLogitsWarper(sampling.top_p), MinPLogitsWarper(sampling.min_p)]
    expected = processors(torch.tensor([seen]), logits.clone())[0].double().softmax(-1)
    occurred = torch.zeros(1, VOCAB, dtype=torch.bool)
    occurred[0, seen] = True
    chosen = sampling.choose(logits.expand(n, -1), (torch.arange(n) + 0.5) / n, occurred)
    assert (torch.bincount(chosen, minlength=VOCAB) / n - expected).abs().max() < 1.5 / n + 1e-6
    greedy = Sampling(0, 5, 0.5, 0.1, sampling.repetition_penalty).choose(logits, torch.zeros(1), occurred)
    assert greedy.item() == penalty(torch.tensor([seen]), logits.clone()).argmax()


def test_tokens_that_are_never_chosen():
    """Neither ids beyond the vocabulary, nor, at the edges of the uniform numbers, one that was ruled out."""
    logits = torch.tensor([[1.0, 5.0, 1.0, 9.0, 7.0]])
    edges = torch.tensor([0.0, uniforms(1, (0,)).item(), 1 - 2**-23])
    for sampling in (Sampling(1.0, vocab_size=3), Sampling(1.0, top_k=2, vocab_size=3), Sampling(0, vocab_size=3)):
        assert sampling.choose(logits.expand(3, -1), edges).max() < 3
    assert Sampling(0.01).choose(torch.tensor([[-100.0, 0.0, 0.0, -100.0]]).expand(3, -1), edges).tolist()[0] == 1
    assert Sampling(0.01).choose(torch.tensor([[-100.0, 0.0, 0.0, -100.0]]).expand(3, -1), edges).tolist()[-1] == 2


@pytest.mark.parametrize(
    'sampling',
    [
        Sampling(0),
        Sampling(0, vocab_size=4),
        Sampling(1.0),
        Sampling(1.0, vocab_size=4),
        Sampling(1.0, top_k=3, top_p=0.5, min_p=0.1),
    ],
    ids=str,
)
def test_logits_that_are_nan(sampling):
    logits = torch.stack([torch.full((VOCAB,), math.nan), torch.zeros(VOCAB), torch.zeros(VOCAB)])
    logits[2, 3] = math.nan
    assert (sampling.choose(logits, torch.full((3,), 0.5)) == (sampling.vocab_size or VOCAB)).tolist() == [
        True,
        False,
        True,
    ]
    model = make_model()
    torch.nn.init.constant_(model.transformer.ln_f.weight, math.inf)
    for log_probs in (False, True):
        for same_but in ({}, {'vocab_size': VOCAB + 9}):
            with pytest.raises(UserError, match='NaN or infinite'):
                generated(model, [Sample([1])], 2, dataclasses.replace(sampling, **same_but), log_probs=log_probs)


@pytest.mark.parametrize('shares', [{'top_p': 0.0}, {'top_p': 1.1}, {'min_p': 1.1}, {'min_p': -0.1}], ids=str)
def test_shares_that_leave_nothing(shares):
    with pytest.raises(ValueError, match='must be above 0'):
        make_model().generate(torch.tensor([[1]]), 1, **shares)


@pytest.mark.parametrize('static', [False, True])
def test_cache_takes_other_types(static):
    """As it must on CUDA, where autocast computes a norm of bfloat16 in float32."""
    cache = KVCache(make_model().config, 2, 8, dtype=torch.bfloat16, static=static)
    cache.lengths = [3, 1]
    cache.extend(1)
    new = torch.randn(2, 2, make_model().config.kv_heads, 1, cache.layers[0].size(-1))
    stored = cache.update(0, *new)
    for which in (0, 1):  # keys, values
        for row, column in enumerate((3, 1)):
            assert torch.equal(stored[which][row, :, column], new[which][row, :, 0].bfloat16())


def test_uniform_numbers_are_fixed_for_ever():
    assert uniforms(3, (1337, 0)).tolist() == [0.030196189880371094, 0.3469647765159607, 0.44626402854919434]
    numbers = uniforms(100_000, (1, 2, 3))
    assert numbers.dtype == torch.float32 and 0 <= numbers.min() and numbers.max() < 1
    assert torch.equal(uniforms(10, (1, 2, 3)), numbers[:10]) and not torch.equal(uniforms(10, (1, 2, 4)), numbers[:10])
    assert abs(numbers.mean() - 0.5) < 0.005 and abs(numbers.var() - 1 / 12) < 0.005


def test_log_probabilities_are_the_models():
    model = make_model()
    samples = [Sample(prompt, (1, i)) for i, prompt in enumerate(make_prompts(2, 6))]
    generated(model, samples, 8, Sampling(0.5, top_k=3, vocab_size=40), log_probs=True)
    for sample in samples:
        row = torch.tensor([sample.prompt + sample.ids])
        with torch.no_grad():
            expected = (
                model(row, row)[0][0, :, :40]
                .log_softmax(-1)[len(sample.prompt) - 1 : -1]
                .gather(1, row[0, len(sample.prompt) :, None])
            )
        torch.testing.assert_close(torch.tensor(sample.log_probs).double(), expected[:, 0], rtol=1e-5, atol=1e-5)


def test_a_long_prompt_is_read_in_pieces(monkeypatch):
    """Of prompts of one length and of several, the second of which is more than a piece."""
    model, n = make_model(pos='rope'), 6
    for lengths in ((13, 13), (5, 14)):
        prompts = make_prompts(*lengths)
        samples = [Sample(prompt, (i,)) for i, prompt in enumerate(prompts)]
        expected = generated(model, samples, n, Sampling())
        with monkeypatch.context() as patch:
            patch.setattr(generation, 'TOKENS_AT_ONCE', 4)
            samples = [Sample(prompt, (i,)) for i, prompt in enumerate(prompts)]
            assert generated(model, samples, n, Sampling()) == expected


@pytest.mark.parametrize('static', [False, True])
def test_a_conversation_equals_reading_all_of_it(static):
    model = make_model()
    context, row, rng = Context(model, 1, BLOCK, static), [], random.Random(1)
    context.forget()
    with torch.inference_mode():
        for _ in range(12):
            new = [rng.randrange(VOCAB) for _ in range(rng.choice([1, 2, 5, 9, 40]))]
            row += new
            expected = model(torch.tensor([row[window_start(len(row), BLOCK) :]]))[0][:, -1]
            torch.testing.assert_close(context.read([new]), expected, rtol=1e-9, atol=1e-9)


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch):
    model, rows = make_model(), []  # rows: shapes of what the model reads
    hidden = model.hidden
    monkeypatch.setattr(
        model, 'hidden', lambda idx, *args, **options: (rows.append(tuple(idx.shape)), hidden(idx, *args, **options))[1]
    )
    generated(model, [Sample([1, 2, 3, 4], (0, i)) for i in range(6)] + [Sample([5, 6], (0, 0))], 1, Sampling())
    assert rows == [(2, 3), (7, 1)]  # both prompts but for their last tokens, then the last of every row
    for static in (False, True):
        rows.clear()
        context = Context(model, 1, BLOCK, static)
        for prompt in ([1, 2, 3, 4, 5, 6], [7, 8, 9]):
            generated(model, [Sample(prompt)], 1, Sampling(), context=context)
        assert rows == [(1, 6), (1, 3)], 'a second turn reads only what is new'


def test_random_numbers_continue_from_block_to_block(monkeypatch):
    monkeypatch.setattr(generation, 'UNIFORMS_AT_ONCE', 4)
    model, prompts = make_model(), make_prompts(2, 3)
    samples = [Sample(prompt, (i,)) for i, prompt in enumerate(prompts)]
    generated(model, samples, 10, Sampling())
    for i, sample in enumerate(samples):
        numbers, row = torch.cat([uniforms(4, (i, block)) for block in range(3)]), list(sample.prompt)
        for t in range(10):
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0][:, -1]
            row.append(int(Sampling().choose(logits, numbers[t : t + 1])))
        assert row[len(sample.prompt) :] == sample.ids


def test_a_prompt_that_ends_within_a_character():
    sample = Sample([0, 1], tokenizer=CharTokenizer('a\ufffd'))
    sample.add(0)
    assert (sample.prompt_text, sample.text) == ('a\ufffd', 'a')


# --- texts ------------------------------------------------------------------------------------------------------------


def test_stop_texts():
    """Whatever was shown stays, and the text ends before the first stop text, however the pieces fall."""
    rng, tokenizer = random.Random(0), CharTokenizer('abc')
    ended = 0
    for _ in range(300):
        text = ''.join(rng.choice('abc') for _ in range(12))
        stop = [''.join(rng.choice('abc') for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(0, 3))]
        sample, shown = Sample([0], tokenizer=tokenizer, stop=stop), ''
        for token in tokenizer.encode(text).tolist():
            sample.add(token)
            assert sample.text[: sample.settled()].startswith(shown)
            shown = sample.text[: sample.settled()]
            if sample.finish_reason:
                break
        sample.finish('length')
        first_complete = min((text.find(s) + len(s) for s in stop if s in text), default=None)
        ended += sample.finish_reason == 'stop'
        assert (sample.finish_reason == 'stop') == (first_complete is not None)
        assert sample.text[: sample.settled()] == sample.text and text.startswith(sample.text)
        if first_complete is not None:
            assert len(sample.ids) == first_complete and not any(s in sample.text for s in stop)
            assert len(sample.text) == min(text[:first_complete].find(s) for s in stop if s in text[:first_complete])
        else:
            assert sample.text == text
    assert 50 < ended < 290


def test_end_of_text():
    sample = Sample([0], tokenizer=CharTokenizer('abc'), end_of_text=2)
    for token in (0, 1, 2):
        sample.add(token)
    assert (sample.text, sample.ids, sample.finish_reason) == ('ab', [0, 1, 2], 'end_of_text')
    model = make_model(vocab_size=3)
    samples = [Sample([0], (0, i), end_of_text=2) for i in range(5)]
    generated(model, samples, 30, Sampling())
    assert all(sample.ids.count(2) == (sample.finish_reason == 'end_of_text') for sample in samples)
    assert all((sample.ids[-1] == 2) == (sample.finish_reason == 'end_of_text') for sample in samples)


# --- the model's own --------------------------------------------------------------------------------------------------


def test_the_models_generate_is_nanogpts():
    model, idx = make_model(), torch.tensor(make_prompts(4, 4))
    torch.manual_seed(3)
    out = model.generate(idx, 40, temperature=0.9, top_k=10)
    assert out.shape == (2, 44) and out.dtype == idx.dtype and torch.equal(out[:, :4], idx)
    torch.manual_seed(3)
    assert torch.equal(model.generate(idx, 40, temperature=0.9, top_k=10), out)
    assert not torch.equal(model.generate(idx, 40, temperature=0.9, top_k=10), out)
    assert model.generate(idx, 0).tolist() == idx.tolist()
    assert model.generate(idx, 60, temperature=2.0, vocab_size=11)[:, 4:].max() < 11


def test_a_cache_that_is_full():
    cache = KVCache(make_model().config, 2, 4)
    cache.extend(3)
    with pytest.raises(ValueError, match='5 tokens do not fit into 4'):
        cache.extend(2)
