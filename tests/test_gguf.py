"""GGUF: models and tokenizers from llama.cpp's files and back, against the packages gguf and llama_cpp."""

import json
import random
import struct
import subprocess

import numpy as np
import pytest
import torch
from conftest import SHARED

gguf = pytest.importorskip('gguf', reason='reads and writes GGUF files')

from common.errors import UserError
from common.gguf_file import read_gguf, read_tensor
from formats import gguf_model, gguf_tokens
from formats.gguf_model import gguf_tokenizer, read_gguf_model, write_gguf
from loading import empty_model
from model import GPT, GPTConfig
from tokenizer import END_OF_TEXT, load_tokenizer, train_bpe

TINY = {'block_size': 64, 'vocab_size': 96, 'n_layer': 2, 'n_head': 4, 'n_embd': 64}
LLAMA = {**TINY, 'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'n_kv_head': 2}
MODELS = {
    'gpt2': {**TINY, 'mlp': 'gelu_tanh'},
    'gpt2-untied': {**TINY, 'mlp': 'gelu_tanh', 'tie_weights': False, 'mlp_width': 96, 'norm_eps': 1e-6},
    'llama': {**LLAMA, 'mlp_width': 96, 'rope_base': 500},
    'llama-biases': {**LLAMA, 'bias': True, 'tie_weights': False, 'head_size': 24, 'mlp_width': 96, 'rope_base': 5e3},
    'llama3': {**LLAMA, 'n_kv_head': 1, 'rope_scaling': '8,1,4,32', 'rope_base': 100.0, 'mlp_width': 96},
    'qwen2': {**LLAMA, 'qkv_bias': True, 'mlp_width': 96},
    'qwen3': {**LLAMA, 'qk_norm': True, 'qk_gain': True, 'head_size': 32, 'mlp_width': 96, 'norm_eps': 1e-6},
}


def random_model(**fields):
    """A GPT in which no weight is zero or one."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    return model


def make(fields):
    return empty_model(GPTConfig(**fields))


def tokens_model(n, **more):
    """A tiny GPT-2 with n tokens."""
    return random_model(block_size=64, vocab_size=n, n_layer=1, n_head=1, n_embd=4, mlp='gelu_tanh', **more)


def logits_of(model, ids):
    """(B, T) -> (B, T, V)."""
    with torch.no_grad():
        return model.logits(model.hidden(ids))


@pytest.fixture
def llama_cpp(monkeypatch):
    """A function (path) -> llama_cpp.Llama."""
    package = pytest.importorskip('llama_cpp', reason='pip install llama-cpp-python builds it, in some ten minutes')
    defaults, opened = package.llama_cpp.llama_model_default_params, []

    def without_amx():  # whose instructions some virtual machines announce and refuse
        parameters = defaults()
        parameters.use_extra_bufts = False
        return parameters

    monkeypatch.setattr(package.llama_cpp, 'llama_model_default_params', without_amx)

    def open_model(path, **options):
        exact = {'type_k': 0, 'type_v': 0}  # a cache in float32
        one_thread = {'n_threads': 1, 'n_threads_batch': 1}
        opened.append(package.Llama(str(path), n_ctx=256, verbose=False, **one_thread, **exact, **options))
        return opened[-1]

    yield open_model
    for model in opened:
        model.close()


# --- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('name', MODELS)
def test_weights_return_as_they_left(name, tmp_path):
    model, path = random_model(**MODELS[name]), str(tmp_path / 'model.gguf')
    assert write_gguf(model, None, path, 'f32') == []
    again = read_gguf_model(path, make)
    assert again.config == model.config
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert (again.lm_head.weight is again.transformer.wte.weight) == model.config.tie_weights
    half = read_gguf_model(path, make, torch.bfloat16)
    assert all(torch.equal(weight, before[key].bfloat16()) for key, weight in half.state_dict().items())
    assert not list(tmp_path.glob('*.part'))


@pytest.mark.slow
@pytest.mark.parametrize('name', MODELS)
def test_llama_cpp_computes_our_logits(name, tmp_path, llama_cpp):
    """llama.cpp looks GELU up in a table of half precision, and quantizes what it multiplies with 8-bit weights."""
    model, ids = random_model(**MODELS[name]), torch.randint(96, (1, 40))
    for kind, tolerance in {'f32': 3e-3 if name.startswith('gpt2') else 1e-4, 'f16': 0.02, 'q8_0': 0.3}.items():
        write_gguf(model, None, str(tmp_path / kind), kind)
        theirs = llama_cpp(tmp_path / kind, logits_all=True)
        theirs.eval(ids[0].tolist())
        torch.testing.assert_close(
            torch.from_numpy(theirs.scores[:40]), logits_of(model, ids)[0], atol=tolerance, rtol=0
        )


@pytest.mark.slow
def test_what_a_model_lacks_is_written_as_zeros_and_ones(tmp_path, llama_cpp):
    ids = torch.randint(96, (1, 40))
    without_biases = {**TINY, 'mlp': 'gelu_tanh', 'bias': False}
    without_gains = {**LLAMA, 'qk_norm': True, 'head_size': 16}
    for fields, tolerance in ((without_biases, 3e-3), (without_gains, 1e-4)):
        model, path = random_model(**fields), str(tmp_path / 'model.gguf')
        write_gguf(model, None, path, 'f32')
        torch.testing.assert_close(logits_of(read_gguf_model(path, make), ids), logits_of(model, ids))
        theirs = llama_cpp(path, logits_all=True)
        theirs.eval(ids[0].tolist())
        torch.testing.assert_close(
            torch.from_numpy(theirs.scores[:40]), logits_of(model, ids)[0], atol=tolerance, rtol=0
        )


def test_gelu_by_erf_is_said_to_differ(tmp_path):
    notes = write_gguf(random_model(**TINY), None, str(tmp_path / 'model.gguf'))
    assert len(notes) == 1 and 'tanh' in notes[0]


REFUSED = {  # setting that stands in the way: the model
    'logit_softcap': {**LLAMA, 'logit_softcap': 30.0},
    'mlp': {**TINY, 'mlp': 'relu2'},
    'norm': {**TINY, 'norm': 'rmsnorm'},
    'n_kv_head': {**TINY, 'n_kv_head': 2},
    'qk_norm': {**TINY, 'qk_norm': True},
    'pos': {**LLAMA, 'pos': 'alibi'},
    'bias': {**LLAMA, 'qk_norm': True, 'bias': True},
    'qkv_bias': {**LLAMA, 'qk_norm': True, 'qkv_bias': True},
    'head_size': {**LLAMA, 'qkv_bias': True, 'head_size': 24},
    'rope_scaling': {**LLAMA, 'qkv_bias': True, 'rope_scaling': '8,1,4,32'},
}


@pytest.mark.parametrize('field', REFUSED)
def test_a_shape_that_llama_cpp_lacks_is_refused(field, tmp_path):
    with pytest.raises(UserError, match=rf'^{field}='):
        write_gguf(random_model(**REFUSED[field]), None, str(tmp_path / 'model.gguf'))
    assert not list(tmp_path.iterdir())


def test_types_of_tensors(tmp_path):
    """Rows that blocks of 32 do not divide are f16; gguf's own reader finds what we wrote."""
    model, path = random_model(**{**MODELS['llama'], 'mlp_width': 80}), tmp_path / 'model.gguf'
    write_gguf(model, None, str(path), 'q8_0', name='tiny')
    reader = gguf.GGUFReader(path)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types['blk.0.ffn_up.weight'] == types['token_embd.weight'] == 'Q8_0'
    assert types['blk.0.ffn_down.weight'] == 'F16' and types['blk.0.ffn_norm.weight'] == 'F32'
    for tensor in reader.tensors:
        if tensor.name == 'token_embd.weight':
            expected = gguf.quants.quantize(model.transformer.wte.weight.detach().numpy(), tensor.tensor_type)
            assert np.array_equal(tensor.data, expected)
    assert reader.fields['general.name'].contents() == 'tiny' and reader.fields['general.file_type'].contents() == 7
    with pytest.raises(UserError, match='f16'):
        model.transformer.wte.weight.data[3, 3] = 1e5
        write_gguf(model, None, str(path), 'f16')
    with pytest.raises(UserError, match='type=q4_0'):
        write_gguf(model, None, str(path), 'q4_0')
    with pytest.raises(UserError, match='cannot write'):
        write_gguf(model, None, str(tmp_path / 'missing' / 'model.gguf'), 'f32')


def write_tensors(path, tensors, metadata=()):
    """Write {name: (array of bytes or numbers, type)} and metadata by gguf's own writer, with the sizes in `TINY`."""
    writer = gguf.GGUFWriter(path, 'llama')
    for key, value in metadata:
        gguf_model.add_value(gguf, writer, key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


TYPES = 'F32 F16 BF16 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS'.split()


def test_dequantized_as_by_gguf(tmp_path, monkeypatch):
    """Of every type, in parts that divide the rows unevenly."""
    rng, path, arrays = np.random.default_rng(0), str(tmp_path / 'types.gguf'), {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        n = 7 * 512 // block
        data = rng.integers(0, 60, (n, block_bytes), dtype=np.uint8)  # whose scales are small numbers in float16
        arrays[name] = data.reshape(7, -1), kind
    write_tensors(path, arrays)
    monkeypatch.setattr('common.gguf_file.CHUNK', 1024 + 512)
    file = read_gguf(path)
    for name, (data, kind) in arrays.items():
        assert file.tensors[name].shape == (7, 512)
        for dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(7, 512, dtype=dtype)
            read_tensor(file, name, out)
            assert torch.equal(out, torch.from_numpy(gguf.quants.dequantize(data, kind)).to(dtype)), name


def test_types_that_gguf_cannot_dequantize_and_nan_are_refused(tmp_path):
    kinds = gguf.GGMLQuantizationType
    infinite = np.full((1, 4), np.nan, np.float32)
    write_tensors(tmp_path / 'm', {'a': (np.ones((1, 4), np.int32), kinds.I32), 'b': (infinite, kinds.F32)})
    file = read_gguf(str(tmp_path / 'm'))
    for name, reason in {'a': 'I32', 'b': 'NaN'}.items():
        with pytest.raises(UserError, match=reason):
            read_tensor(file, name, torch.empty(1, 4))


def rewritten(path, changes=(), without=(), tensors=()):
    """A copy of a GGUF file by gguf's own reader and writer, with other metadata, and tensors more or fewer -> path."""
    reader, copy = gguf.GGUFReader(path), path.with_name('copy.gguf')
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith('GGUF.')}
    writer = gguf.GGUFWriter(copy, metadata.pop('general.architecture'))
    for key, value in {**metadata, **dict(changes)}.items():
        if value is not None:
            gguf_model.add_value(gguf, writer, key, value)
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in dict(tensors).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(copy)


UNKNOWN = {
    'llama.rope.scaling.type': 'yarn',
    'llama.rope.scaling.factor': 2.0,
    'llama.attention.sliding_window': 4096,
    'llama.expert_count': 8,
    'llama.logit_scale': 0.5,
    'llama.attention.scale': 0.1,
    'llama.attention.key_length': 8,
    'llama.attention.value_length': 8,
    'llama.rope.dimension_count': 8,
    'llama.attention.head_count_kv': [2, 1],
    'llama.embedding_scale': 2.0,
    'llama.anything': 'x',
    'llama.block_count': 2**30,
    'llama.context_length': None,
    'llama.feed_forward_length': 2**30,
    'split.count': 2,
    'general.type': 'adapter',
}


@pytest.mark.parametrize('key', UNKNOWN)
def test_metadata_that_we_do_not_compute_are_named(key, tmp_path):
    path = tmp_path / 'model.gguf'
    write_gguf(random_model(**MODELS['llama']), None, str(path), 'f32')
    with pytest.raises(UserError) as error:
        read_gguf_model(rewritten(path, {key: UNKNOWN[key]}), make)
    named = {'llama.block_count': 'layers', 'llama.feed_forward_length': 'blk.0.ffn_gate.weight'}.get(key, key)
    assert named in str(error.value).replace('] ', '')


def test_neutral_metadata_and_unknown_tensors(tmp_path):
    path = tmp_path / 'model.gguf'
    write_gguf(random_model(**MODELS['llama']), None, str(path), 'f32')
    neutral = {'llama.rope.scaling.type': 'none', 'llama.expert_count': 0, 'llama.vocab_size': 7, 'other.key': 'x'}
    neutral.update({'llama.attention.key_length': None, 'llama.rope.freq_base': None, 'llama.attention.causal': True})
    assert read_gguf_model(rewritten(path, neutral), make).config.rope_base == 10000
    for name, options in {
        'blk.1.ffn_norm.weight': {'without': ['blk.1.ffn_norm.weight']},
        'blk.0.attn_q_norm.weight': {'tensors': {'blk.0.attn_q_norm.weight': np.ones(16, np.float32)}},
        'rope_freqs.weight': {'tensors': {'rope_freqs.weight': np.linspace(1, 3, 8, dtype=np.float32)}},
    }.items():
        with pytest.raises(UserError, match=name):
            read_gguf_model(rewritten(path, **options), make)
    with pytest.raises(UserError, match='mamba'):
        write_tensors(tmp_path / 'm', {}, {'general.architecture': 'mamba'}.items())
        read_gguf_model(str(tmp_path / 'm'), make)


def test_llama_3_scaling_is_recognized(tmp_path):
    """Without our own key, as in files of llama.cpp's converter; and its tensor is what that computes."""
    path, scaling = tmp_path / 'model.gguf', '32.0,1.0,4.0,8192.0'
    fields = {**MODELS['llama'], 'head_size': 64, 'rope_base': 5e5, 'rope_scaling': scaling}
    write_gguf(random_model(**fields), None, str(path), 'f32')
    assert read_gguf_model(rewritten(path, {'samgpt.rope_scaling': None}), make).config.rope_scaling == scaling
    expected = []
    for i in range(32):  # conversion/llama.py, generate_extra_tensors
        wavelength = 2 * np.pi * 5e5 ** (2 * i / 64)
        smooth = (8192 / wavelength - 1) / 3
        expected.append(1 if smooth > 1 else 32 if smooth < 0 else 1 / ((1 - smooth) / 32 + smooth))
    file, divisors = read_gguf(str(path)), torch.empty(32)
    read_tensor(file, 'rope_freqs.weight', divisors)
    torch.testing.assert_close(divisors, torch.tensor(expected), rtol=1e-4, atol=0)


# --- hostile files ----------------------------------------------------------------------------------------------------


def text(value):
    """A text as a GGUF file has it."""
    return struct.pack('<Q', len(value)) + value.encode()


def header(n_tensors=0, n_values=0, version=3, magic=b'GGUF'):
    return magic + struct.pack('<IQQ', version, n_tensors, n_values)


def tensor(name='a', dims=(32,), kind=0, offset=0, n_dims=None):
    dims_bytes = struct.pack(f'<{len(dims)}Q', *dims)
    return (
        text(name)
        + struct.pack('<I', len(dims) if n_dims is None else n_dims)
        + dims_bytes
        + struct.pack('<IQ', kind, offset)
    )


def value(kind, data, key='k'):
    return text(key) + struct.pack('<I', kind) + data


ROWS = bytes(1024)
HOSTILE = {
    'empty': b'',
    'only a magic': b'GGUF',
    'another magic': header(magic=b'GGML'),
    'version 1': header(version=1),
    'big-endian': header(version=3 << 24),
    '2^60 tensors': header(n_tensors=2**60) + ROWS,
    '2^63 values': header(n_values=2**63) + ROWS,
    'a text of 10 TB': header(n_values=1) + struct.pack('<Q', 10**13) + ROWS,
    'a value of 10 TB': header(n_values=1) + value(8, struct.pack('<Q', 10**13)) + ROWS,
    '2^61 numbers': header(n_values=1) + value(9, struct.pack('<IQ', 6, 2**61)) + ROWS,
    '2^61 texts': header(n_values=1) + value(9, struct.pack('<IQ', 8, 2**61)) + ROWS,
    'arrays in arrays': header(n_values=1) + value(9, struct.pack('<IQ', 9, 1) * 50) + ROWS,
    'an unknown type of values': header(n_values=1) + value(99, b'') + ROWS,
    'no UTF-8': header(n_values=1) + struct.pack('<Q', 1) + b'\xff' + struct.pack('<II', 4, 1) + ROWS,
    'a key twice': header(n_values=2) + value(4, bytes(4)) * 2 + ROWS,
    'a tensor twice': header(n_tensors=2) + tensor() + tensor(offset=128) + ROWS,
    'overlapping tensors': header(n_tensors=2) + tensor() + tensor('b', offset=64) + ROWS,
    'a misaligned tensor': header(n_tensors=1) + tensor(offset=8) + ROWS,
    'beyond the end': header(n_tensors=1) + tensor(offset=2048) + ROWS,
    'an offset of 2^63': header(n_tensors=1) + tensor(offset=2**63) + ROWS,
    '2^32 dimensions': header(n_tensors=1) + tensor(n_dims=2**32 - 1) + ROWS,
    'no dimensions': header(n_tensors=1) + tensor(dims=()) + ROWS,
    'an overflowing product': header(n_tensors=1) + tensor(dims=(2**32, 2**32)) + ROWS,
    'an empty tensor': header(n_tensors=1) + tensor(dims=(0, 4)) + ROWS,
    'an unknown type': header(n_tensors=1) + tensor(kind=12345) + ROWS,
    'a broken block': header(n_tensors=1) + tensor(dims=(33,), kind=8) + ROWS,
    'no alignment': header(n_values=1) + value(4, struct.pack('<I', 0), key='general.alignment') + ROWS,
    'an alignment of 48': header(n_values=1) + value(4, struct.pack('<I', 48), key='general.alignment') + ROWS,
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_headers_end_in_a_line(name, tmp_path):
    path = tmp_path / 'hostile.gguf'
    path.write_bytes(HOSTILE[name])
    for read in (read_gguf, gguf_tokenizer, lambda path: read_gguf_model(path, make)):
        with pytest.raises(UserError, match='is not a sound GGUF file') as error:
            read(str(path))
        assert '\n' not in str(error.value) and len(str(error.value)) < 500


def test_every_truncation_and_many_flipped_bytes_end_in_a_line(tmp_path):
    path, cut = tmp_path / 'model.gguf', tmp_path / 'cut.gguf'
    spec = {'kind': 'byte'}
    write_gguf(tokens_model(257), spec, str(path), 'f32')
    whole, rng = path.read_bytes(), random.Random(0)
    start = whole.index(b'token_embd.weight') + 600
    for size in [*range(0, start, 97), len(whole) - 40]:
        cut.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_gguf_model(str(cut), make)
    for _ in range(150):
        flipped = bytearray(whole)
        for _ in range(rng.choice([1, 1, 8])):
            flipped[rng.randrange(start)] = rng.randrange(256)
        cut.write_bytes(flipped)
        try:  # either it is fine, or it is one line: nothing else is raised
            gguf_tokenizer(str(cut))
            read_gguf_model(str(cut), make)
        except UserError:
            pass


def test_a_missing_file(tmp_path):
    with pytest.raises(UserError, match='cannot read'):
        read_gguf(str(tmp_path / 'missing.gguf'))


def test_without_the_package_gguf(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'gguf', None)
    for action in (lambda: read_gguf('x.gguf'), lambda: write_gguf(random_model(**TINY), None, 'x.gguf')):
        with pytest.raises(UserError, match='pip install gguf'):
            action()


# --- tokenizers -------------------------------------------------------------------------------------------------------

PIECES = [
    'the ',
    'The',
    " it's",
    "'LL",
    "'Re",
    ' ',
    '  ',
    '\n',
    '\n\n',
    '\r\n',
    '\t',
    ' \n ',
    '12',
    '1234567',
    '٣',
    '...',
]
PIECES += [
    ' (a',
    '=>',
    '"',
    'é',
    'e\u0301',
    '漢字',
    '日本語',
    '😀',
    'нещо',
    'κ',
    '\u3000',
    '_',
    "don't",
    '$5',
    'x',
    END_OF_TEXT,
]


def random_text(rng, n=30):
    return ''.join(rng.choice(PIECES) for _ in range(rng.randrange(1, n)))


TEXTS = [random_text(random.Random(i), 60) for i in range(300)]


def trained(pre, **more):
    """A byte-level BPE that splits text as tokenizer.ggml.pre says, trained by the tokenizers library -> its spec."""
    tokenizers = pytest.importorskip('tokenizers')
    split, ignore_merges = gguf_tokens.SPLITS[pre]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    description = json.loads(bpe.to_str())
    description['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': split}
    description['normalizer'] = {'type': 'NFC'} if pre in gguf_tokens.NORMALIZED else None
    bpe = tokenizers.Tokenizer.from_str(json.dumps(description))
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END_OF_TEXT, '<|im_end|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    return {'kind': 'tokenizers', 'json': bpe.to_str(), **more}


def sentencepiece_spec(tmp_path, prefix=True):
    """SentencePiece's BPE as Llama 2 has it, out of a file by gguf's own writer -> spec."""
    tokenizers = pytest.importorskip('tokenizers')
    trainer = tokenizers.SentencePieceBPETokenizer()
    trainer.train_from_iterator(TEXTS, vocab_size=300, show_progress=False)
    vocabulary = trainer.get_vocab()
    tokens = ['<unk>', '<s>', '</s>', *(f'<0x{byte:02X}>' for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    learned = sorted((token for token in vocabulary if len(token) > 1 and token != '<unk>'), key=vocabulary.get)
    learned += sorted(token for token in vocabulary if len(token) == 1)
    metadata = {
        'tokenizer.ggml.model': 'llama',
        'tokenizer.ggml.tokens': tokens + learned,
        'tokenizer.ggml.token_type': types + [1] * len(learned),
        'tokenizer.ggml.scores': [0.0] * len(tokens) + [-float(i) for i in range(len(learned))],
        'tokenizer.ggml.add_space_prefix': prefix,
    }
    write_tensors(tmp_path / 'vocabulary', {}, metadata.items())
    return gguf_tokenizer(str(tmp_path / 'vocabulary'))


def specs(tmp_path):
    """{name: (spec, is every text encoded as here?)}"""
    template = {
        'chat_template': '{{ messages }}',
        'special_tokens': {'eos_token': '<|im_end|>', 'pad_token': '<|im_end|>'},
    }
    found = {pre: trained(pre) for pre in ('smollm', 'llama-bpe', 'smaug-bpe', 'qwen2', 'default')}
    found['gpt-2'] = trained('gpt-2', end_of_text='<|im_end|>', **template)
    found['bpe'] = train_bpe(TEXTS, 400)
    found['byte'] = {'kind': 'byte'}
    found['char'] = {'kind': 'char', 'chars': ''.join(sorted(set(''.join(TEXTS)) | set('\\\x00\x7f\u2581')))}
    found['llama'] = sentencepiece_spec(tmp_path)
    found['llama without prefix'] = sentencepiece_spec(tmp_path, prefix=False)
    return found


SPECS = 'smollm llama-bpe smaug-bpe qwen2 default gpt-2 bpe byte char llama'.split() + ['llama without prefix']


def written(spec, tmp_path, **options):
    """Write a tokenizer with a tiny model -> path, notes."""
    path, n = tmp_path / 'model.gguf', load_tokenizer(spec).vocab_size
    return path, write_gguf(tokens_model(n + 7), spec, str(path), **options)


@pytest.fixture(scope='module')
def all_specs(tmp_path_factory):
    return specs(tmp_path_factory.mktemp('specs'))


@pytest.mark.parametrize('name', SPECS)
def test_tokenizers_return_as_they_left(name, all_specs, tmp_path):
    spec = all_specs[name]
    path, notes = written(spec, tmp_path)
    assert bool(notes) == (name in ('qwen2', 'char')), notes
    again, ours = load_tokenizer(gguf_tokenizer(str(path))), load_tokenizer(spec)
    assert again.vocab_size == ours.vocab_size == read_gguf_model(str(path), make).config.vocab_size
    assert again.end_of_text == ours.end_of_text
    for special in (False, True):
        for text in TEXTS:
            ids = ours.encode(text, special=special)
            assert again.encode(text, special=special).tolist() == ids.tolist()
            assert again.decode(ids.tolist()) == ours.decode(ids.tolist())
    if name == 'char':
        assert gguf_tokenizer(str(path)) == spec
    if name == 'gpt-2':
        assert {key: gguf_tokenizer(str(path))[key] for key in ('chat_template', 'end_of_text')} == {
            key: spec[key] for key in ('chat_template', 'end_of_text')
        }


@pytest.mark.slow
@pytest.mark.parametrize('name', SPECS)
def test_llama_cpp_encodes_and_decodes_as_we_do(name, all_specs, tmp_path, llama_cpp):
    spec = all_specs[name]
    path, _ = written(spec, tmp_path)
    theirs, ours = llama_cpp(path, vocab_only=True), load_tokenizer(spec)
    for text in TEXTS:
        if name == 'qwen2':
            text = text.replace('e\u0301', '')  # which only we normalize
        ids = ours.encode(text).tolist()
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == ids, text
        decoded = theirs._model.detokenize(ids, special=True).decode()
        assert decoded.removeprefix(' ' if name == 'llama' else '') == ours.decode(ids)
    special = name not in ('char', 'llama', 'llama without prefix')
    if special:
        ids = ours.encode(f'a{END_OF_TEXT}b', special=True).tolist()
        assert theirs.tokenize(f'a{END_OF_TEXT}b'.encode(), add_bos=False, special=True) == ids
    assert theirs.token_eos() == (-1 if ours.end_of_text is None else ours.end_of_text)


@pytest.mark.slow
def test_gpt2s_vocabulary(gpt2_vocabulary, tmp_path, llama_cpp):
    path = tmp_path / 'model.gguf'
    model = random_model(block_size=64, vocab_size=50304, n_layer=1, n_head=1, n_embd=4)
    write_gguf(model, {'kind': 'gpt2'}, str(path))
    again, theirs = load_tokenizer(gguf_tokenizer(str(path))), llama_cpp(path, vocab_only=True)
    assert theirs.n_vocab() == 50257 and theirs.token_eos() == again.end_of_text == 50256
    for text in TEXTS[:100]:
        ids = gpt2_vocabulary.encode(text).tolist()
        assert again.encode(text).tolist() == theirs.tokenize(text.encode(), add_bos=False, special=False) == ids


@pytest.mark.slow
def test_what_is_added_to_a_text(all_specs, tmp_path, llama_cpp):
    """SentencePiece's <s>, and that of a BPE with a template, as Llama 3 has."""
    tokenizers = pytest.importorskip('tokenizers')
    bpe = json.loads(all_specs['llama-bpe']['json'])
    bpe['post_processor'] = {
        'type': 'Sequence',
        'processors': [
            {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False, 'use_regex': True},
            {
                'type': 'TemplateProcessing',
                'single': [
                    {'SpecialToken': {'id': END_OF_TEXT, 'type_id': 0}},
                    {'Sequence': {'id': 'A', 'type_id': 0}},
                ],
                'pair': [{'Sequence': {'id': 'A', 'type_id': 0}}, {'Sequence': {'id': 'B', 'type_id': 0}}],
                'special_tokens': {END_OF_TEXT: {'id': END_OF_TEXT, 'ids': [0], 'tokens': [END_OF_TEXT]}},
            },
        ],
    }
    named = {'special_tokens': {'bos_token': END_OF_TEXT, 'eos_token': '<|im_end|>'}, 'end_of_text': '<|im_end|>'}
    with_bos = {'kind': 'tokenizers', 'json': json.dumps(bpe), **named}
    for spec in (all_specs['llama'], with_bos, all_specs['llama-bpe']):
        path, _ = written(spec, tmp_path)
        again, theirs = gguf_tokenizer(str(path)), llama_cpp(path, vocab_only=True)
        for description in (spec, again):
            ids = tokenizers.Tokenizer.from_str(description['json']).encode('the end').ids
            assert theirs.tokenize(b'the end', add_bos=True, special=False) == ids
    other = {**with_bos, 'special_tokens': {'bos_token': '<|im_end|>'}}
    with pytest.raises(UserError, match='bos'):
        written(other, tmp_path)


def test_rows_of_the_embedding_and_tokens(tmp_path):
    """Padding rows are cut; tokens that the model lacks are left out if they were added later."""
    path, spec = tmp_path / 'model.gguf', {'kind': 'byte'}
    write_gguf(tokens_model(300), spec, str(path), 'f32')
    assert read_gguf_model(str(path), make).config.vocab_size == 257
    assert load_tokenizer(gguf_tokenizer(str(path))).vocab_size == 257
    assert torch.equal(
        read_gguf_model(str(path), make).transformer.wte.weight, tokens_model(300).transformer.wte.weight[:257]
    )
    with pytest.raises(UserError, match='257 tokens'):
        write_gguf(tokens_model(200), spec, str(path))
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer.from_str(trained('gpt-2')['json'])
    bpe.add_special_tokens(['<pad>'])
    n = bpe.get_vocab_size()
    write_gguf(tokens_model(n - 1), {'kind': 'tokenizers', 'json': bpe.to_str()}, str(path))
    assert '<pad>' not in read_gguf(str(path)).metadata['tokenizer.ggml.tokens']
    assert len(read_gguf(str(path)).metadata['tokenizer.ggml.tokens']) == n - 1


@pytest.mark.slow
def test_user_defined_tokens_stay_words(tmp_path, llama_cpp):
    """Tokens that are added but not special are found in every text."""
    tokenizers = pytest.importorskip('tokenizers')
    bpe = tokenizers.Tokenizer.from_str(trained('gpt-2')['json'])
    bpe.add_tokens([tokenizers.AddedToken('<tool call>', normalized=False)])
    spec = {'kind': 'tokenizers', 'json': bpe.to_str()}
    path, _ = written(spec, tmp_path)
    ids = load_tokenizer(spec).encode('a <tool call>b').tolist()
    assert load_tokenizer(gguf_tokenizer(str(path))).encode('a <tool call>b').tolist() == ids
    assert llama_cpp(path, vocab_only=True).tokenize(b'a <tool call>b', add_bos=False) == ids


def test_tokenizers_that_llama_cpp_lacks_are_refused(tmp_path):
    tokenizers = pytest.importorskip('tokenizers')

    def changed(**changes):
        return {'kind': 'tokenizers', 'json': json.dumps({**json.loads(trained('gpt-2')['json']), **changes})}

    model = json.loads(trained('gpt-2')['json'])['model']
    wordpiece = tokenizers.Tokenizer(tokenizers.models.WordPiece({'[UNK]': 0, 'a': 1}, unk_token='[UNK]')).to_str()
    stripping = {'id': 0, 'content': END_OF_TEXT, 'special': True, 'normalized': False, 'single_word': False}
    for reason, spec in {
        'splits text': changed(pre_tokenizer={'type': 'Whitespace'}),
        'ignore_merges=True': changed(model={**model, 'ignore_merges': True}),
        'Lowercase': changed(normalizer={'type': 'Lowercase'}),
        'dropout': changed(model={**model, 'dropout': 0.1}),
        'lstrip': changed(added_tokens=[{**stripping, 'lstrip': True, 'rstrip': False}]),
        'neither a byte-level BPE': changed(decoder=None),
        'WordPiece': {'kind': 'tokenizers', 'json': wordpiece},
        'UTF-8': {'kind': 'char', 'chars': 'a\ud800'},
    }.items():
        with pytest.raises(UserError, match=reason):
            write_gguf(tokens_model(400), spec, str(tmp_path / 'model.gguf'))
    llama = json.loads(sentencepiece_spec(tmp_path)['json'])
    llama['model']['merges'].pop(7)
    with pytest.raises(UserError, match='do not follow from scores'):
        write_gguf(tokens_model(999), {'kind': 'tokenizers', 'json': json.dumps(llama)}, str(tmp_path / 'model.gguf'))
    no_end = json.loads(trained('gpt-2')['json'].replace(END_OF_TEXT, '<other>'))
    notes = write_gguf(
        tokens_model(400), {'kind': 'tokenizers', 'json': json.dumps(no_end)}, str(tmp_path / 'model.gguf')
    )
    assert 'names no end of text' in notes[0]


def test_tokenizers_that_we_lack_are_refused(tmp_path):
    path = tmp_path / 'model.gguf'
    write_gguf(tokens_model(257), {'kind': 'byte'}, str(path))
    n, tokens = 257, read_gguf(str(path)).metadata['tokenizer.ggml.tokens']
    for reason, changes in {
        'deepseek-llm': {'pre': 'deepseek-llm'},
        'tokenizer.ggml.pre': {'pre': None},
        'bert': {'model': 'bert'},
        'merges': {'merges': None},
        'precompiled_charsmap': {'precompiled_charsmap': [1, 2]},
        'add_space_prefix': {'add_space_prefix': True},
        'token_type': {'token_type': [1] * (n - 1)},
        'eos_token_id': {'eos_token_id': n},
        'twice': {'tokens': [*tokens[:-1], tokens[0]]},
        'scores': {'model': 'llama'},
        'several characters': {'model': 'rwkv'},
        'tokenizer.ggml.tokens': {'tokens': None},
        'not a tokenizer.json': {'merges': ['nothing known']},
        '1000000 characters': {'tokens': [*tokens[:-1], 'x' * 10**6]},
    }.items():
        copy = rewritten(path, {f'tokenizer.ggml.{key}': value for key, value in changes.items()})
        with pytest.raises(UserError, match=reason):
            gguf_tokenizer(copy)
    assert gguf_tokenizer(rewritten(path, {'tokenizer.ggml.model': None})) is None
    fewer = {'tokenizer.ggml.tokens': tokens[:-1], 'tokenizer.ggml.token_type': [1] * (n - 1)}
    with pytest.raises(UserError, match='256 tokens'):
        read_gguf_model(rewritten(path, fewer), make)


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def smollm2():
    """The path of SmolLM2-135M-Instruct in Q4_1."""
    script = SHARED / 'smollm2.sh'
    if not script.exists():
        pytest.skip('../shared/smollm2.sh, which has a real model, is not here')
    result = subprocess.run([script], capture_output=True, text=True)
    if result.returncode:
        pytest.skip(result.stderr)
    return result.stdout.strip()


def test_smollm2_continues(smollm2):
    tokenizer = load_tokenizer(gguf_tokenizer(smollm2))
    model = read_gguf_model(smollm2, make).eval()
    assert model.config.vocab_size == tokenizer.vocab_size == 49152
    ids = torch.from_numpy(tokenizer.encode('The capital of France is'))[None].long()
    assert tokenizer.decode(model.generate(ids, 2, temperature=0)[0].tolist()) == 'The capital of France is Paris.'


@pytest.mark.slow
def test_smollm2s_tokenizer(smollm2, llama_cpp):
    spec = gguf_tokenizer(smollm2)
    assert spec['end_of_text'] == '<|im_end|>' and '<|im_start|>' in spec['chat_template']
    tokenizer, theirs = load_tokenizer(spec), llama_cpp(smollm2, vocab_only=True)
    rng = random.Random(5)
    texts = TEXTS[:100] + [''.join(chr(rng.choice(range(32, 0xD800))) for _ in range(40)) for _ in range(100)]
    for text in texts:
        assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text).tolist(), text
