"""Models of Hugging Face's in and out: against transformers on tiny random models, and what must be refused."""

import json
import os
import pickle
import struct
import sys
import zipfile

import pytest
import torch
from conftest import run_forked
from test_mistakes import is_one_error_line

from common.errors import UserError
from common.weight_files import WeightFiles, write_weight_files
from data.pipeline import model_tokenizer
from formats.huggingface import family_of, gpt_fields, hf_config, to_hugging_face, write_hf_model
from loading import empty_model, load_pretrained, open_model
from model import GPT, GPTConfig
from pretrained import pretrained_model

transformers = pytest.importorskip('transformers')
safetensors_torch = pytest.importorskip('safetensors.torch')
ROPE_KEY = 'rope_parameters' if transformers.__version__ >= '5' else 'rope_scaling'

GPT2 = dict(n_layer=2, n_head=4, n_embd=32, n_positions=48, vocab_size=97)
LLAMA = dict(
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=80,
    max_position_embeddings=48, vocab_size=97,
)  # fmt: skip
LLAMA3 = dict(rope_type='llama3', factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
LLAMA3['original_max_position_embeddings'] = 16  # the last 32 positions lie beyond it
IDS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)

THEIRS = {  # model_type, fields of its config
    'gpt2': ('gpt2', GPT2),
    'gpt2 erf': ('gpt2', {**GPT2, 'activation_function': 'gelu', 'layer_norm_epsilon': 1e-3}),
    'gpt2 untied, width': ('gpt2', {**GPT2, 'tie_word_embeddings': False, 'n_inner': 56}),
    'gpt2 relu2': ('gpt2', {**GPT2, 'activation_function': 'relu2'}),
    'llama': ('llama', {**LLAMA, 'tie_word_embeddings': True, 'rms_norm_eps': 1e-3}),
    'llama untied, head size': ('llama', {**LLAMA, 'head_dim': 12, 'num_key_value_heads': 1}),
    'llama biases': ('llama', {**LLAMA, 'attention_bias': True, 'mlp_bias': True}),
    'llama 3': ('llama', {**LLAMA, 'rope_theta': 500.0, ROPE_KEY: LLAMA3}),
    'qwen2': ('qwen2', {**LLAMA, 'rope_theta': 1e6, 'tie_word_embeddings': True}),
    'qwen2 untied': ('qwen2', {**LLAMA, 'num_key_value_heads': 4}),
    'qwen3': ('qwen3', {**LLAMA, 'head_dim': 16, 'tie_word_embeddings': True}),
    'qwen3 untied': ('qwen3', {**LLAMA, 'head_dim': 8}),
}
LLAMA_SHAPE = dict(pos='rope', norm='rmsnorm', mlp='swiglu', bias=False, n_kv_head=2)
SHAPE = dict(n_layer=2, n_head=4, n_embd=32, block_size=48, vocab_size=97)
OURS = {  # family, fields of GPTConfig
    'gpt2': ('gpt2', dict(dropout=0.25)),
    'gpt2 without biases': ('gpt2', dict(bias=False, mlp='gelu_tanh')),
    'gpt2 some biases': ('gpt2', dict(bias=False, qkv_bias=True, mlp='relu2', mlp_width=72, tie_weights=False)),
    'llama': ('llama', dict(**LLAMA_SHAPE, mlp_width=80, norm_eps=1e-4)),
    'llama biases': ('llama', {**LLAMA_SHAPE, 'bias': True, 'tie_weights': False, 'head_size': 10}),
    'llama scaled': ('llama', dict(**LLAMA_SHAPE, rope_base=1234.5, rope_scaling='8.5,1.25,4,16')),
    'qwen2': ('qwen2', dict(**LLAMA_SHAPE, qkv_bias=True)),
    'qwen2 uneven heads': ('qwen2', {**LLAMA_SHAPE, 'n_head': 6, 'head_size': 8}),
    'qwen3': ('qwen3', dict(**LLAMA_SHAPE, qk_norm=True, qk_gain=True, head_size=16, tie_weights=False)),
    'qwen3 without gains': ('qwen3', dict(**LLAMA_SHAPE, qk_norm=True)),
}


def randomized(model):
    """Weights large enough that a mistake shows, biases and gains included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.3 if parameter.dim() > 1 else 0.5)
    return model.eval()


def their_model(kind):
    """A random model of transformers'."""
    model_type, fields = THEIRS[kind]
    config = transformers.AutoConfig.for_model(model_type, **fields, **IDS)
    return randomized(transformers.AutoModelForCausalLM.from_config(config))


def our_model(kind):
    """A random GPT, and its family."""
    family, fields = OURS[kind]
    return randomized(GPT(GPTConfig(**{**SHAPE, **fields}))), family


def in_folder(folder, kind='llama', tensors=None, **config):
    """Save a random model of transformers', with other tensors, and other fields in its config.json -> the folder."""
    their_model(kind).save_pretrained(folder)
    if tensors is not None:
        safetensors_torch.save_file(tensors, folder / 'model.safetensors')
    content = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**content, **config}))
    return str(folder)


def tensors_of(folder):
    """The tensors of a folder's model.safetensors by the library."""
    return safetensors_torch.load_file(os.path.join(folder, 'model.safetensors'))


@pytest.fixture
def ids():
    torch.manual_seed(1)
    return torch.randint(97, (2, 48))


def assert_same_function(ours, theirs, ids):
    with torch.no_grad():
        expected = theirs(ids).logits
        torch.testing.assert_close(ours.eval()(ids, ids)[0], expected, rtol=1e-5, atol=1e-5 * expected.std().item())


def assert_same_weights(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name


# --- exactly ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('kind', THEIRS)
def test_in_and_out_again(kind, ids, tmp_path):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path)
    ours, tokenizer = load_pretrained(str(tmp_path))
    assert tokenizer is None and ours.config.tie_weights == theirs.config.tie_word_embeddings
    assert_same_function(ours, theirs, ids)
    assert family_of(ours.config) == theirs.config.model_type
    assert_same_weights(to_hugging_face(ours), theirs)
    (tmp_path / 'out').mkdir()
    write_hf_model(ours, str(tmp_path / 'out'))
    again, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / 'out', output_loading_info=True, dtype=torch.float32
    )
    assert not any(report.values()), report
    assert_same_weights(again, theirs)
    assert_same_function(ours, again.eval(), ids)


@pytest.mark.parametrize('kind', OURS)
def test_out_and_in_again(kind, ids, tmp_path):
    ours, family = our_model(kind)
    assert family_of(ours.config) == family
    assert_same_function(ours, to_hugging_face(ours), ids)
    write_hf_model(ours, str(tmp_path))
    assert_same_function(ours, transformers.AutoModelForCausalLM.from_pretrained(tmp_path), ids)
    again, _ = load_pretrained(str(tmp_path))
    assert_same_function(again, to_hugging_face(ours), ids)
    weights = ours.state_dict()
    for name, weight in again.state_dict().items():
        filler = 1.0 if name.endswith('norm.weight') else 0.0
        assert torch.equal(weight, weights.get(name, torch.full_like(weight, filler))), name
    assert weights.keys() <= again.state_dict().keys()
    same = ['block_size', 'norm_eps', 'tie_weights', 'rope_base', 'rope_scaling', 'head_dim', 'kv_heads', 'mlp_dim']
    assert [getattr(again.config, name) for name in same] == [getattr(ours.config, name) for name in same]


def test_from_pretrained_as_in_nanogpt(ids, tmp_path):
    folder = in_folder(tmp_path, 'gpt2')
    ours = GPT.from_pretrained(folder, override_args={'dropout': 0.1})
    assert ours.config.dropout == 0.1
    assert_same_function(ours, their_model('gpt2'), ids)


@pytest.mark.parametrize('kind', ['gpt2', 'llama 3', 'qwen2', 'qwen3'])
def test_greedy_generation(kind, ids, tmp_path):
    theirs = their_model(kind)
    ours, _ = load_pretrained(in_folder(tmp_path, kind))
    settings = dict(max_new_tokens=40, do_sample=False, pad_token_id=0, attention_mask=torch.ones_like(ids[:, :5]))
    expected = theirs.generate(ids[:, :5], **settings)
    assert ours.eval().generate(ids[:, :5], 40, temperature=0).tolist() == expected.tolist()


def test_gpt2s_without_their_prefix_and_with_masks(ids, tmp_path):
    """As OpenAI's on the hub: no 'transformer.', and the causal masks of early versions."""
    theirs = their_model('gpt2')
    tensors = {name.removeprefix('transformer.'): tensor for name, tensor in theirs.state_dict().items()}
    del tensors['lm_head.weight']
    for layer in range(2):
        tensors[f'h.{layer}.attn.bias'] = torch.ones(1, 1, 48, 48).tril().byte()
        tensors[f'h.{layer}.attn.masked_bias'] = torch.tensor(-1e4)
    ours, _ = load_pretrained(in_folder(tmp_path, 'gpt2', tensors))
    assert_same_function(ours, theirs, ids)


@pytest.mark.parametrize('kind', ['gpt2', 'llama'])
def test_tied_weights_under_either_name_or_both(kind, ids, tmp_path):
    theirs, family = their_model(kind), THEIRS[kind][0]
    embedding = {'gpt2': 'transformer.wte.weight', 'llama': 'model.embed_tokens.weight'}[family]
    tensors = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    assert_same_function(load_pretrained(in_folder(tmp_path, kind, tensors))[0], theirs, ids)
    del tensors[embedding]
    assert_same_function(load_pretrained(in_folder(tmp_path, kind, tensors))[0], theirs, ids)
    tensors[embedding] = tensors['lm_head.weight'] + 0.1
    with pytest.raises(UserError, match='lm_head.weight differs from the embedding'):
        load_pretrained(in_folder(tmp_path, kind, tensors))


def test_frequencies_in_old_llama_files(ids, tmp_path):
    theirs = their_model('llama')
    tensors = theirs.state_dict()
    tensors['model.layers.0.self_attn.rotary_emb.inv_freq'] = torch.ones(4)
    del tensors['lm_head.weight']
    assert_same_function(load_pretrained(in_folder(tmp_path, 'llama', tensors))[0], theirs, ids)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_precisions_of_files(dtype, ids, tmp_path):
    theirs = their_model('llama').to(dtype)
    theirs.save_pretrained(tmp_path)
    ours, _ = load_pretrained(str(tmp_path))
    assert ours.lm_head.weight.dtype == torch.float32
    assert_same_weights(to_hugging_face(ours), theirs.float())


def test_a_precision_asked_for(tmp_path):
    folder = in_folder(tmp_path, 'qwen3')
    exact = pretrained_model(folder, lambda fields: GPT(GPTConfig(**fields)))
    half = pretrained_model(folder, lambda fields: GPT(GPTConfig(**fields)), torch.bfloat16)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert_same_weights(half, exact.bfloat16())


@pytest.mark.parametrize('kind', ['gpt2 untied, width', 'qwen2'])
def test_sharded_files(kind, ids, tmp_path):
    theirs = their_model(kind)
    theirs.save_pretrained(tmp_path, max_shard_size='20KB')
    assert not (tmp_path / 'model.safetensors').exists() and len(list(tmp_path.glob('*.safetensors'))) > 2
    assert_same_weights(to_hugging_face(load_pretrained(str(tmp_path))[0]), theirs)


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('shards', [1, 3])
def test_pickled_files(legacy, shards, tmp_path):
    theirs = their_model('llama untied, head size')
    names = sorted(tensors := theirs.state_dict())
    theirs.config.save_pretrained(tmp_path)
    files = {n: f'pytorch_model-{n}.bin' if shards > 1 else 'pytorch_model.bin' for n in range(shards)}
    for n, file in files.items():
        part = {name: tensors[name] for name in names[n::shards]}
        torch.save(part, tmp_path / file, _use_new_zipfile_serialization=not legacy)
    if shards > 1:
        index = {'weight_map': {name: files[i % shards] for i, name in enumerate(names)}}
        (tmp_path / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    assert_same_weights(to_hugging_face(load_pretrained(str(tmp_path))[0]), theirs)


def test_files_are_mapped_anew(monkeypatch, tmp_path):
    """However often: it is how memory is let go of."""
    theirs = their_model('qwen2')
    theirs.save_pretrained(tmp_path)
    monkeypatch.setattr('common.weight_files.MAPPED', 0)
    assert_same_weights(to_hugging_face(load_pretrained(str(tmp_path))[0]), theirs)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('shard', [10**9, 5000])
def test_written_files(dtype, shard, tmp_path):
    """By the safetensors library: the numbers, the names, and the metadata that transformers asks for."""
    tensors = {f't{n}': torch.randn(n, 40).t() for n in range(1, 20)}
    write_weight_files(str(tmp_path), tensors, dtype, shard)
    paths = sorted(tmp_path.glob('*.safetensors'))
    assert (len(paths) > 1) == (shard == 5000) == (tmp_path / 'model.safetensors.index.json').exists()
    found = {}
    for path in paths:
        assert path.stat().st_size < shard + 4000
        found.update(safetensors_torch.load_file(path))
        assert struct.unpack('<Q', path.read_bytes()[:8])[0] % 8 == 0  # so that mapped numbers are aligned
        with safetensors_torch.safe_open(path, 'pt') as file:
            assert file.metadata() == {'format': 'pt'}
    assert found.keys() == tensors.keys() and all(torch.equal(found[n], tensors[n].to(dtype)) for n in tensors)
    files = WeightFiles(str(tmp_path))
    assert all(torch.equal(files.read(n), found[n]) for n in found)
    write_weight_files(str(tmp_path), tensors, dtype, shard)  # over itself
    with pytest.raises(UserError, match='is of another model: remove it'):
        write_weight_files(str(tmp_path), tensors, dtype, 10**9 if shard == 5000 else 5000)


def test_numbers_too_large_for_float16(tmp_path):
    model, _ = our_model('gpt2')
    model.transformer.h[1].mlp.c_fc.bias.data[3] = 1e5
    with pytest.raises(UserError, match=r'transformer.h.1.mlp.c_fc.bias has NaN or infinite numbers in torch.float16'):
        write_hf_model(model, str(tmp_path), torch.float16)
    assert not list(tmp_path.iterdir())


def test_ids_of_special_tokens(tmp_path):
    model, _ = our_model('llama')
    write_hf_model(model, str(tmp_path), eos_token_id=7)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.eos_token_id == 7 and config.bos_token_id is None


@pytest.mark.parametrize('version', [4, 5])
@pytest.mark.parametrize('scaling', ['', '8,1,4,16'])
def test_rope_of_either_version(version, scaling, tmp_path):
    """A config.json as transformers 4 or 5 writes it, without the fields of the other."""
    model = randomized(GPT(GPTConfig(**SHAPE, **LLAMA_SHAPE, rope_base=123.0, rope_scaling=scaling)))
    write_hf_model(model, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    for name in ('rope_theta', 'rope_scaling') if version == 5 else ('rope_parameters',):
        del config[name]
    (tmp_path / 'config.json').write_text(json.dumps(config))
    ours, _ = load_pretrained(str(tmp_path))
    assert ours.config == GPTConfig(**{**vars(model.config), 'mlp_width': model.config.mlp_dim})


SMOLLM2 = dict(
    architectures=['LlamaForCausalLM'], attention_bias=False, attention_dropout=0.0, bos_token_id=1, eos_token_id=2,
    hidden_act='silu', hidden_size=576, initializer_range=0.041666666666666664, intermediate_size=1536,
    is_llama_config=True, max_position_embeddings=8192, mlp_bias=False, model_type='llama', num_attention_heads=9,
    num_hidden_layers=30, num_key_value_heads=3, pad_token_id=2, pretraining_tp=1, rms_norm_eps=1e-05,
    rope_interleaved=False, rope_scaling=None, rope_theta=100000, tie_word_embeddings=True, torch_dtype='bfloat16',
    transformers_version='4.42.3', use_cache=True, vocab_size=49152,
)  # fmt: skip
LLAMA_3_2 = dict(
    architectures=['LlamaForCausalLM'], attention_bias=False, attention_dropout=0.0, bos_token_id=128000,
    eos_token_id=[128001, 128008, 128009], head_dim=64, hidden_act='silu', hidden_size=2048, initializer_range=0.02,
    intermediate_size=8192, max_position_embeddings=131072, mlp_bias=False, model_type='llama', num_attention_heads=32,
    num_hidden_layers=16, num_key_value_heads=8, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0,
    rope_scaling=dict(
        factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0, original_max_position_embeddings=8192,
        rope_type='llama3',
    ), tie_word_embeddings=True, torch_dtype='bfloat16', transformers_version='4.45.0.dev0', use_cache=True,
    vocab_size=128256,
)  # fmt: skip
QWEN2_5 = dict(
    architectures=['Qwen2ForCausalLM'], attention_dropout=0.0, bos_token_id=151643, eos_token_id=151643,
    hidden_act='silu', hidden_size=896, initializer_range=0.02, intermediate_size=4864, max_position_embeddings=32768,
    max_window_layers=24, model_type='qwen2', num_attention_heads=14, num_hidden_layers=24, num_key_value_heads=2,
    rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768, tie_word_embeddings=True, torch_dtype='bfloat16',
    transformers_version='4.40.1', use_cache=True, use_mrope=False, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
QWEN3 = dict(
    architectures=['Qwen3ForCausalLM'], attention_bias=False, attention_dropout=0.0, bos_token_id=151643,
    eos_token_id=151645, head_dim=128, hidden_act='silu', hidden_size=1024, initializer_range=0.02,
    intermediate_size=3072, max_position_embeddings=40960, max_window_layers=28, model_type='qwen3',
    num_attention_heads=16, num_hidden_layers=28, num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None,
    rope_theta=1000000, sliding_window=None, tie_word_embeddings=True, torch_dtype='bfloat16',
    transformers_version='4.51.0', use_cache=True, use_sliding_window=False, vocab_size=151936,
)  # fmt: skip
OPENAI = dict(
    activation_function='gelu_new', architectures=['GPT2LMHeadModel'], attn_pdrop=0.1, bos_token_id=50256,
    embd_pdrop=0.1, eos_token_id=50256, initializer_range=0.02, layer_norm_epsilon=1e-05, model_type='gpt2',
    n_ctx=1024, n_embd=1024, n_head=16, n_layer=24, n_positions=1024, n_special=0, predict_special_tokens=True,
    resid_pdrop=0.1, summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True,
    summary_type='cls_index', summary_use_proj=True,
    task_specific_params={'text-generation': {'do_sample': True, 'max_length': 50}}, vocab_size=50257,
)  # fmt: skip


@pytest.mark.parametrize(
    'config, parameters, fields',
    [
        (OPENAI, 354_823_168, dict(mlp='gelu_tanh', block_size=1024, mlp_width=0)),
        (SMOLLM2, 134_515_008, dict(rope_base=1e5, norm_eps=1e-5, n_kv_head=3, tie_weights=True, head_size=0)),
        (LLAMA_3_2, 1_235_814_400, dict(rope_base=5e5, rope_scaling='32,1,4,8192', block_size=131072)),
        (QWEN2_5, 494_032_768, dict(rope_base=1e6, norm_eps=1e-6, qkv_bias=True, bias=False)),
        (QWEN3, 596_049_920, dict(rope_base=1e6, head_size=128, qk_norm=True, qk_gain=True, qkv_bias=False)),
    ],
    ids=['gpt2-medium', 'SmolLM2-135M-Instruct', 'Llama-3.2-1B', 'Qwen2.5-0.5B', 'Qwen3-0.6B'],
)
def test_config_json_of_real_models(config, parameters, fields):
    """As on the hub, with the number of parameters that it shows."""
    read = {'qkv_bias': False, **gpt_fields(config, 'config.json')}
    assert {name: read[name] for name in fields} == fields
    assert empty_model(GPTConfig(**read)).num_params(non_embedding=False) == parameters


def test_fine_tuning_a_llama(workspace):
    """By the scripts: in, trained, saved, sampled, and out again."""
    from conftest import CHARS, TINY, run_forked_ok

    in_folder(workspace / 'hf')  # its vocabulary is larger than that of the data
    assert len(CHARS) < 97
    settings = [s for s in TINY if not s.startswith('--n_')]
    run_forked_ok('train.py', *settings, '--init_from=hf', '--max_iters=2', cwd=workspace)
    saved = torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['model_args']['pos'] == 'rope' and saved['model_args']['block_size'] == 16
    run_forked_ok('sample.py', '--device=cpu', '--max_new_tokens=5', cwd=workspace)


# --- what must be refused ---------------------------------------------------------------------------------------------

UNSUPPORTED = [
    ('llama', 'model_type', 'mistral'),
    ('llama', 'model_type', None),
    ('gpt2', 'activation_function', 'relu'),
    ('gpt2', 'scale_attn_weights', False),
    ('gpt2', 'scale_attn_by_inverse_layer_idx', True),
    ('gpt2', 'add_cross_attention', True),
    ('gpt2', 'is_encoder_decoder', True),
    ('gpt2', 'pruned_heads', {'0': [1]}),
    ('gpt2', 'n_inner', 100),
    ('gpt2', 'n_positions', 47),
    ('gpt2', 'n_layer', 3),
    ('gpt2', 'n_layer', 1),
    ('gpt2', 'n_layer', '2'),
    ('gpt2', 'n_layer', 2.0),
    ('gpt2', 'n_embd', 10**400),
    ('gpt2', 'n_embd', [32]),
    ('gpt2', 'layer_norm_epsilon', 2),
    ('gpt2', 'layer_norm_epsilon', '1e-5'),
    ('gpt2', 'tie_word_embeddings', 1),
    ('gpt2', 'vocab_size', 98),
    ('gpt2', 'rope_theta', 10000.0),
    ('llama', 'hidden_act', 'gelu'),
    ('llama', 'attention_bias', True),
    ('llama', 'mlp_bias', True),
    ('llama', 'pretraining_tp', 2),
    ('llama', 'partial_rotary_factor', 0.5),
    ('llama', 'head_dim', 4),
    ('llama', 'num_key_value_heads', 4),
    ('llama', 'num_attention_heads', 3),
    ('llama', 'hidden_size', None),
    ('llama', 'rope_theta', 'ten thousand'),
    ('llama', 'rope_theta', [1]),
    ('llama', 'rope_scaling', {'type': 'linear', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'dynamic', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'yarn', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': 'longrope'}),
    ('llama', 'rope_scaling', {'rope_type': 'default', 'factor': 2.0}),
    ('llama', 'rope_scaling', {'rope_type': ['llama3']}),
    ('llama', 'rope_scaling', {**LLAMA3, 'beta_fast': 32}),
    ('llama', 'rope_scaling', {**LLAMA3, 'factor': None}),
    ('llama', 'rope_scaling', {**LLAMA3, 'factor': 0.5}),
    ('llama', 'rope_scaling', 'llama3'),
    ('llama', 'rope_parameters', {'full_attention': {'rope_theta': 10000.0}}),
    ('llama', 'rope_parameters', {'rope_type': 'default', 'partial_rotary_factor': 0.5}),
    ('llama', 'quantization_config', {'quant_method': 'gptq'}),
    ('llama', 'sliding_window', 4096),
    ('llama', 'is_causal', False),
    ('llama', 'auto_map', {'AutoModelForCausalLM': 'modeling.Llama'}),
    ('llama', 'residual_multiplier', 0.5),
    ('llama', 'logits_scaling', 8),
    ('qwen2', 'use_sliding_window', True),
    ('qwen2', 'layer_types', ['full_attention', 'sliding_attention']),
    ('qwen2', 'hidden_act', 'relu'),
    ('qwen3', 'attention_bias', True),
    ('qwen3', 'use_sliding_window', True),
    ('qwen3', 'layer_types', ['sliding_attention', 'full_attention']),
    ('qwen3', 'head_dim', None),  # 128
]


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """Folders of one model per family."""
    return {kind: in_folder(tmp_path_factory.mktemp(kind), kind) for kind in ('gpt2', 'llama', 'qwen2', 'qwen3')}


@pytest.mark.parametrize('kind, name, value', UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_an_unsupported_field(kind, name, value, saved, tmp_path):
    """It is named, with the file; or the tensor is that does not fit it."""
    config = json.load(open(f'{saved[kind]}/config.json'))
    (tmp_path / 'config.json').write_text(json.dumps({**config, name: value}))
    os.link(f'{saved[kind]}/model.safetensors', tmp_path / 'model.safetensors')
    with pytest.raises(UserError) as error:
        load_pretrained(str(tmp_path))
    text = str(error.value)
    assert str(tmp_path) in text and '\n' not in text
    # of these, the tensor is named that does not fit, or the size of the whole
    shapes = 'n_inner n_positions n_embd vocab_size head_dim num_key_value_heads num_attention_heads'.split()
    assert name in text or name in shapes or name == 'n_layer' and 'layers' in text, text


@pytest.mark.parametrize(
    'name, value',
    [
        ('rope_theta', 20000.0),
        ('rope_theta', 10000.5),
        ('rope_scaling', LLAMA3),
        ('rope_parameters', {'rope_type': 'default', 'rope_theta': 1.0}),
    ],
    ids=str,
)
def test_spellings_of_rope_that_contradict_each_other(name, value, tmp_path):
    model, _ = our_model('llama scaled')
    write_hf_model(model, str(tmp_path))
    config = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps({**config, name: value}))
    with pytest.raises(UserError, match='rope_'):
        load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    'name, value',
    [
        ('attention_dropout', 0.1),
        ('eos_token_id', [1, 2]),
        ('rope_interleaved', False),
        ('some_new_field', None),
        ('another', {}),
        ('hidden_act', 'swish'),
        ('layer_types', ['full_attention', 'full_attention']),
        ('pretraining_tp', 1),
    ],
)
def test_a_harmless_field(name, value, saved, ids, tmp_path):
    load_pretrained(in_folder(tmp_path, 'llama', **{name: value}))


@pytest.mark.parametrize('kind', ['gpt2 untied, width', 'llama biases', 'qwen2', 'qwen3'])
def test_a_tensor_too_few_too_many_or_misshapen(kind, tmp_path):
    """Whichever it is."""
    folder = in_folder(tmp_path, kind)
    tensors = tensors_of(folder)
    for name, tensor in list(tensors.items()):
        safetensors_torch.save_file({n: t for n, t in tensors.items() if n != name}, tmp_path / 'model.safetensors')
        with pytest.raises(UserError, match=f'{name} is missing|one of them is of another model'):
            load_pretrained(folder)
        changed = {**tensors, name: torch.cat((tensor, tensor[:1]))}
        safetensors_torch.save_file(changed, tmp_path / 'model.safetensors')
        with pytest.raises(UserError, match=f'{name} has the shape'):
            load_pretrained(folder)
        safetensors_torch.save_file({**tensors, name + '_scale': torch.ones(1)}, tmp_path / 'model.safetensors')
        with pytest.raises(UserError, match=f'{name}_scale has no place'):
            load_pretrained(folder)


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
def test_broken_numbers(value, tmp_path):
    folder = in_folder(tmp_path)
    tensors = tensors_of(folder)
    tensors['model.layers.1.mlp.up_proj.weight'][5, 7] = value
    with pytest.raises(UserError, match='NaN or infinite'):
        load_pretrained(in_folder(tmp_path, 'llama', tensors))


@pytest.mark.parametrize('dtype', [torch.int32, torch.int8, torch.float8_e4m3fn])
def test_tensors_of_other_kinds(dtype, tmp_path):
    folder = in_folder(tmp_path)
    tensors = tensors_of(folder)
    name = 'model.layers.1.mlp.up_proj.weight'
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(UserError, match='must be 16, 32 or 64-bit floats'):
        load_pretrained(in_folder(tmp_path, 'llama', tensors))


@pytest.mark.parametrize(
    'fields, words',
    [
        (dict(pos='alibi'), '--pos=alibi: no family of Hugging Face models computes this; .* a gpt2'),
        (dict(pos='none'), '--pos=none'),
        (dict(logit_softcap=3.0), '--logit_softcap=3.0'),
        (dict(norm='rmsnorm'), '--norm=rmsnorm'),
        (dict(mlp='swiglu'), '--mlp=swiglu'),
        (dict(n_kv_head=2), '--n_kv_head=2'),
        (dict(head_size=10), '--head_size=10'),
        (dict(qk_norm=True), '--qk_norm=True'),
        ({**LLAMA_SHAPE, 'mlp': 'relu2'}, '--mlp=relu2: .* a llama'),
        ({**LLAMA_SHAPE, 'norm': 'layernorm'}, '--norm=layernorm: .* a llama'),
        ({**LLAMA_SHAPE, 'qk_norm': True, 'bias': True}, '--.*: .* a (llama|qwen3)'),
        ({**LLAMA_SHAPE, 'n_head': 6, 'head_size': 8, 'bias': True}, '--n_head=6: .* a llama'),
    ],
    ids=str,
)
def test_a_shape_of_no_family(fields, words):
    with pytest.raises(UserError, match=words):
        family_of(GPTConfig(**{**SHAPE, **fields}))


def test_a_parameter_of_ones_own(tmp_path):
    model, _ = our_model('llama')
    model.scale = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match='the parameter scale has no place in a llama model'):
        write_hf_model(model, str(tmp_path))


def test_config_json_that_others_read():
    """Both spellings of rotary positions, as AutoConfig of this transformers reads them."""
    config = GPTConfig(**SHAPE, **LLAMA_SHAPE, rope_base=500.0, rope_scaling='8,1,4,16')
    read = transformers.AutoConfig.for_model(**hf_config(config, 'llama'))
    rope = read.rope_scaling
    assert rope['rope_type'] == 'llama3' and rope['factor'] == 8.0 and rope['original_max_position_embeddings'] == 16
    assert getattr(read, 'rope_theta', None) == 500.0 or rope['rope_theta'] == 500.0


# --- hostile files ----------------------------------------------------------------------------------------------------


def header(content, length=None):
    """The beginning of a .safetensors file."""
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack('<Q', len(text) if length is None else length) + text


def tensor(dtype='F32', shape=(2, 2), offsets=(0, 16)):
    return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}


HOSTILE_SAFETENSORS = {
    'header of 10 TB': header({}, length=10**13),
    'header of 90 MB in a small file': header({}, length=90 * 2**20),
    'empty': b'',
    'cut in its length': b'\x01\x00',
    'nested': header(b'{"a":' * 100000),
    'not json': header(b'\xff\xfe{'),
    'list': header(b'[1, 2]'),
    'offsets out of range': header({'a': tensor(offsets=(0, 2**60))}) + bytes(16),
    'offsets negative': header({'a': tensor(offsets=(-16, 0))}) + bytes(16),
    'offsets backwards': header({'a': tensor(offsets=(16, 0))}) + bytes(16),
    'overlapping': header({'a': tensor(), 'b': tensor()}) + bytes(16),
    'shape of 2^60': header({'a': tensor(shape=(2**30, 2**30))}) + bytes(16),
    'shape that overflows': header({'a': tensor(shape=(2**32, 2**32, 4))}) + bytes(16),
    'shape negative': header({'a': tensor(shape=(-2, -2))}) + bytes(16),
    'dtype unknown': header({'a': tensor(dtype='F31')}) + bytes(16),
    'data cut short': header({'a': tensor()}) + bytes(15),
    'data too long': header({'a': tensor()}) + bytes(17),
}


class Code:
    def __reduce__(self):
        return open, ('executed', 'w')


def resized():
    """A tensor that claims a size of 2^60, of a storage of one number."""
    return torch.zeros(1).expand(2**30, 2**30)


HOSTILE_PICKLES = {
    'code': lambda path: torch.save({'a': Code()}, path),
    'code, plain pickle': lambda path: path.write_bytes(pickle.dumps({'a': Code()})),
    'larger than it is': lambda path: torch.save({'model.embed_tokens.weight': resized()}, path),
    'no dict': lambda path: torch.save([torch.zeros(1)], path),
    'no tensors': lambda path: torch.save({'a': 1}, path),
    'names that are numbers': lambda path: torch.save({1: torch.zeros(1)}, path),
    'truncated': lambda path: (torch.save({'a': torch.zeros(1000)}, path), os.truncate(path, 2000)),
    'noise': lambda path: path.write_bytes(bytes(range(256)) * 9),
    'empty': lambda path: path.write_bytes(b''),
}
HOSTILE_INDICES = {
    'outside': {'weight_map': {'a': '../../etc/passwd.bin'}},
    'absolute': {'weight_map': {'a': '/etc/model.safetensors'}},
    'folder': {'weight_map': {'a': '.'}},
    'other kind': {'weight_map': {'a': 'config.json'}},
    'missing': {'weight_map': {'a': 'model-00001-of-00002.safetensors'}},
    'number': {'weight_map': {'a': 3}},
    'no map': {'weight_map': []},
    'list': [],
}


def refused(folder):
    """One line from a script, and nothing executed."""
    result = run_forked('sample.py', '--init_from=hf', '--device=cpu', cwd=folder)
    assert is_one_error_line(result), result.stderr
    assert not (folder / 'executed').exists() and 'hf' in result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with the folder hf, in which is the config.json of a Llama."""
    (tmp_path / 'hf').mkdir()
    config = {'model_type': 'llama', **LLAMA}
    (tmp_path / 'hf' / 'config.json').write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize('name', HOSTILE_SAFETENSORS)
def test_hostile_safetensors(name, folder):
    (folder / 'hf' / 'model.safetensors').write_bytes(HOSTILE_SAFETENSORS[name])
    refused(folder)


@pytest.mark.parametrize('name', HOSTILE_PICKLES)
def test_hostile_pickles(name, folder):
    HOSTILE_PICKLES[name](folder / 'hf' / 'pytorch_model.bin')
    refused(folder)


def test_a_compressed_pickle(folder):
    """A zip bomb would become a lot of memory."""
    path = folder / 'hf' / 'pytorch_model.bin'
    torch.save({'a': torch.zeros(1)}, folder / 'stored')
    with zipfile.ZipFile(folder / 'stored') as stored, zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
        for name in stored.namelist():
            file.writestr(name, stored.read(name))
    with pytest.raises(UserError, match='pytorch_model.bin: torch.save compresses nothing'):
        WeightFiles(str(folder / 'hf'))


def test_a_tensor_larger_than_its_storage(folder):
    """torch.save keeps what expand() says: 2^60 numbers, of which the file has one."""
    torch.save({'a': resized()}, folder / 'hf' / 'pytorch_model.bin')
    with pytest.raises(UserError, match='not a dict of whole tensors'):
        WeightFiles(str(folder / 'hf'))


def test_a_config_of_many_bytes(folder):
    path = folder / 'hf' / 'config.json'
    path.write_text(path.read_text() + ' ' * 2**20)
    with pytest.raises(UserError, match='config.json: it has more than 1048576 bytes'):
        load_pretrained(str(folder / 'hf'))


@pytest.mark.parametrize('name', ['../outside.safetensors', '/outside.safetensors', 'sub/outside.safetensors'])
def test_a_shard_outside_the_folder(name, folder):
    """Though there is one."""
    (folder / 'hf' / 'sub').mkdir()
    name = str(folder / 'hf' / 'sub' / 'outside.safetensors') if name.startswith('/') else name
    safetensors_torch.save_file({'a': torch.zeros(1)}, folder / 'hf' / name)
    index = {'weight_map': {'a': name}}
    (folder / 'hf' / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='not the plain name of a weight file in this folder'):
        WeightFiles(str(folder / 'hf'))


@pytest.mark.parametrize('name', HOSTILE_INDICES)
def test_hostile_indices(name, folder):
    (folder / 'hf' / 'model.safetensors.index.json').write_text(json.dumps(HOSTILE_INDICES[name]))
    refused(folder)


@pytest.mark.parametrize(
    'text', [b'[' * 10**6, b'{"a": ' * 10**5, b'\xff', b'', b'[]', b' ' * 2**21, b'{"model_type": {}}']
)
def test_hostile_configs(text, folder):
    (folder / 'hf' / 'config.json').write_bytes(text)
    refused(folder)


def test_a_config_of_a_model_that_fits_no_memory(folder):
    """It is found out before memory is taken."""
    config = {'model_type': 'llama', **LLAMA, 'hidden_size': 2**20, 'num_hidden_layers': 2**30}
    (folder / 'hf' / 'config.json').write_text(json.dumps(config))
    write_weight_files(str(folder / 'hf'), {'model.embed_tokens.weight': torch.zeros(97, 32)}, torch.float32)
    with pytest.raises(UserError, match='config.json describes'):
        pretrained_model(str(folder / 'hf'), lambda fields: pytest.fail('a model was made'))


def test_two_files_with_one_tensor(folder):
    for n in (1, 2):
        safetensors_torch.save_file({'a': torch.zeros(1)}, folder / 'hf' / f'{n}.safetensors')
    index = {'weight_map': {'a': '1.safetensors', 'b': '2.safetensors'}}
    (folder / 'hf' / 'model.safetensors.index.json').write_text(json.dumps(index))
    with pytest.raises(UserError, match='the tensor a is in .* too'):
        WeightFiles(str(folder / 'hf'))


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'name', ['out-shakspeare', 'gpt5', 'hf/typo', 'a/b/c', '../x', '/no/folder', 'no.gguf', '', 'o/ckpt.pt']
)
def test_a_name_with_a_typo(name, folder, monkeypatch):
    """No network is asked for."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr('pretrained.downloaded', lambda name: pytest.fail('the hub was asked'))
    with pytest.raises(UserError, match='there is no such file'):
        load_pretrained(name)


def test_a_name_on_the_hub(monkeypatch, saved):
    """Offline it is one line; otherwise the client's folder is read like any other."""
    with pytest.raises(UserError, match='cannot download the pretrained model nobody/nothing'):
        load_pretrained('nobody/nothing')
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        return saved['qwen2']

    monkeypatch.setattr('huggingface_hub.snapshot_download', snapshot_download)
    model, tokenizer = load_pretrained('somebody/something')
    assert model.config.qkv_bias and tokenizer is None and asked == ['somebody/something']
    with pytest.raises(UserError, match='there is no tokenizer.json in it'):  # nor in the folder that was downloaded
        model_tokenizer('somebody/something')
    assert asked == ['somebody/something']


def test_a_gguf_file(tmp_path):
    """It is not taken for a checkpoint."""
    from formats.gguf_model import write_gguf

    path = str(tmp_path / 'model.gguf')
    with pytest.raises(UserError, match='there is no such file'):
        open_model(path, 'out', 'ckpt.pt')
    write_gguf(GPT(GPTConfig(**{**SHAPE, 'mlp': 'gelu_tanh'})), None, path)
    model, tokenizer, settings = open_model(path, 'out', 'ckpt.pt')
    assert model.config == GPTConfig(**{**SHAPE, 'mlp': 'gelu_tanh'}) and tokenizer is None and settings == {}


def test_without_the_packages(folder, monkeypatch):
    safetensors_torch.save_file({'a': torch.zeros(1)}, folder / 'hf' / 'model.safetensors')
    monkeypatch.setitem(sys.modules, 'safetensors', None)
    with pytest.raises(UserError, match='pip install safetensors'):
        load_pretrained(str(folder / 'hf'))
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(UserError, match='pip install huggingface_hub'):
        load_pretrained('somebody/else')
    monkeypatch.setitem(sys.modules, 'transformers', None)
    with pytest.raises(UserError, match='pip install transformers'):
        to_hugging_face(our_model('llama')[0])
