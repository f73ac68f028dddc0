"""Models in GGUF files, llama.cpp's format: in and out, under our names.

    read_gguf_model(path, make)                      a GPT with the weights of a file
    gguf_tokenizer(path)                             the spec of its tokenizer
    write_gguf(model, spec, path, type='f16')        a file that llama.cpp runs

places() is the table of names, used in both directions; KEYS is that of the metadata. What we do not compute is refused
by name. Names and metadata: llama.cpp's gguf-py/gguf/constants.py, its conversion/*.py and src/models/*.cpp.
"""

import math
from contextlib import closing
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from common.errors import UserError, user_errors
from common.files import written_whole
from common.gguf_file import import_gguf, quoted, read_gguf, read_tensor
from formats.gguf_tokens import gguf_tokenizer, n_tokens, vocabulary_metadata  # noqa: F401
from formats.huggingface import check_known_fields
from positions import rope_frequencies

KEYS = {  # key after the architecture's name: field of GPTConfig
    'block_count': 'n_layer',
    'context_length': 'block_size',
    'embedding_length': 'n_embd',
    'feed_forward_length': 'mlp_width',
    'attention.head_count': 'n_head',
    'attention.head_count_kv': 'n_kv_head',
}
ROPE_KEYS = {'attention.key_length': 'head_size', 'rope.freq_base': 'rope_base'}  # the same of models with pos=rope
FLOATS = ('norm_eps', 'rope_base')  # the other fields are whole numbers
HEAD_KEYS = ('attention.value_length', 'rope.dimension_count')  # must be the size of a head, too
NORM_KEYS = {'layernorm': 'attention.layer_norm_epsilon', 'rmsnorm': 'attention.layer_norm_rms_epsilon'}
NEUTRAL = {  # keys that may stand in a file with a value that changes nothing
    'attention.causal': True,
    'attention.sliding_window': 0,
    'expert_count': 0,
    'expert_used_count': 0,
    'rope.scaling.type': 'none',
    'rope.scaling.factor': 1.0,
    'rope.scaling.attn_factor': 1.0,
    'use_parallel_residual': False,
}
UNUSED = ('vocab_size', 'tensor_data_layout', 'rope.scaling.finetuned')  # keys that llama.cpp computes nothing from
ROPE_SCALING = 'samgpt.rope_scaling'  # our key beside ROPE_FREQS, which GPTConfig.rope_scaling cannot be read out of
ROPE_FREQS = 'rope_freqs.weight'
LLAMA3_SCALING = '1.0,4.0,8192.0'  # what Llama 3.1 and 3.2 have beside their factor
ARCHITECTURES = {  # fields that stand for each; qwen2 is llama with biases of q, k, v, qwen3 with norms of q and k
    'gpt2': {'pos': 'learned', 'norm': 'layernorm', 'mlp': 'gelu_tanh', 'bias': True},
    'llama': {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu'},
    'qwen2': {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'qkv_bias': True},
    'qwen3': {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False, 'qk_norm': True, 'qk_gain': True},
}
FILE_TYPES = {'f32': 0, 'f16': 1, 'q8_0': 7}  # llama_ftype


# --- the table of names -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a tensor of a file is in our model."""

    theirs: str  # its name in the file
    ours: str  # the parameter that it is, or is part of
    shape: tuple[int, ...]
    start: int = 0  # its first row in the parameter
    heads: int = 0  # the number of heads in which rows are permuted, see permuted; 0: they are not


def places(architecture, c):
    """All tensors of a model, as Places. c has GPTConfig's fields and head_dim, kv_heads, mlp_dim."""
    gpt2, permutes = architecture == 'gpt2', architecture == 'llama'
    yield Place('token_embd.weight', 'transformer.wte.weight', (c.vocab_size, c.n_embd))
    if gpt2:
        yield Place('position_embd.weight', 'transformer.wpe.weight', (c.block_size, c.n_embd))
    q, kv, ff = c.n_head * c.head_dim, c.kv_heads * c.head_dim, c.mlp_dim
    c_attn = [('attn_q', q, c.n_head), ('attn_k', kv, c.kv_heads), ('attn_v', kv, 0)]
    linears = {  # ours: columns, biases?, parts of the rows under their names: rows, permuted heads
        'attn.c_attn': (c.n_embd, c.bias or c.qkv_bias, [('attn_qkv', q + 2 * kv, 0)] if gpt2 else c_attn),
        'attn.c_proj': (q, c.bias, [('attn_output', c.n_embd, 0)]),
        'mlp.c_fc': (c.n_embd, c.bias, [('ffn_up', ff, 0)] if gpt2 else [('ffn_gate', ff, 0), ('ffn_up', ff, 0)]),
        'mlp.c_proj': (ff, c.bias, [('ffn_down', c.n_embd, 0)]),
    }
    norms = {'ln_1': ('attn_norm', c.n_embd), 'ln_2': ('ffn_norm', c.n_embd)}
    if c.qk_gain:
        norms.update({'attn.q_norm': ('attn_q_norm', c.head_dim), 'attn.k_norm': ('attn_k_norm', c.head_dim)})
    kinds = ('weight', 'bias') if gpt2 else ('weight',)
    for layer in range(c.n_layer):
        ours, theirs = f'transformer.h.{layer}.', f'blk.{layer}.'
        for name, (part, size) in norms.items():
            for kind in kinds:
                yield Place(f'{theirs}{part}.{kind}', f'{ours}{name}.{kind}', (size,))
        for name, (columns, biased, parts) in linears.items():
            start = 0
            for part, rows, heads in parts:
                heads = heads if permutes else 0
                yield Place(f'{theirs}{part}.weight', f'{ours}{name}.weight', (rows, columns), start, heads)
                if biased:
                    yield Place(f'{theirs}{part}.bias', f'{ours}{name}.bias', (rows,), start, heads)
                start += rows
    for kind in kinds:
        yield Place(f'output_norm.{kind}', f'transformer.ln_f.{kind}', (c.n_embd,))
    if not c.tie_weights:
        yield Place('output.weight', 'lm_head.weight', (c.vocab_size, c.n_embd))


def permuted(rows, heads):
    """Rows of q or k in our order -> in llama.cpp's for the architecture llama, where the two channels that RoPE
    rotates together are neighbours: 0, hs/2, 1, hs/2 + 1, … (its conversion/llama.py). qwen2 and qwen3 have ours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def unpermuted(rows, heads):
    """The inverse of permuted."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


# --- in ---------------------------------------------------------------------------------------------------------------


def read_gguf_model(path: str, make, dtype: torch.dtype = torch.float32):
    """The model in a GGUF file of the architecture gpt2, llama, qwen2 or qwen3 -> GPT on the CPU, with its weights
    dequantized to dtype. make: a function (fields of GPTConfig) -> GPT, whose parameters may be on the meta device.

    Takes little more memory than the weights. UserError naming what stands in the way if the file is damaged, or has
    metadata or tensors that our model does not compute.
    """
    file = read_gguf(path)
    architecture, fields = read_fields(file)
    c = numbers(fields)
    table = {place.theirs: place for place in places(architecture, c)}
    for name in table.keys() ^ (file.tensors.keys() - {ROPE_FREQS}):
        known = name in table
        raise UserError(f'{path}: {"has no" if known else "cannot use the"} tensor {quoted(name)} of a {architecture}')
    for name, place in table.items():  # before make(): a forged shape takes no memory
        shape = file.tensors[name].shape
        if shape != place.shape:
            raise UserError(f'{path}: the tensor {name} has the shape {shape}, its metadata ask for {place.shape}')
    with user_errors(ValueError, where=f'{path}: '):
        model = make(fields)
    # the last part of a parameter ends where that does
    shapes = {place.ours: (place.start + place.shape[0], *place.shape[1:]) for place in table.values()}
    weights = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    for name, place in table.items():
        rows = weights[place.ours][place.start : place.start + place.shape[0]]
        read_tensor(file, name, rows)
        if place.heads:
            rows.copy_(unpermuted(rows, place.heads))
    if c.tie_weights:
        weights['lm_head.weight'] = weights['transformer.wte.weight']
    with user_errors(RuntimeError, where=f'{path}: '):  # make() may have changed a field
        model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def read_fields(file):
    """Metadata of a file -> architecture, fields of GPTConfig. UserError names the key that we cannot compute."""
    path, metadata = file.path, file.metadata
    architecture = metadata.get('general.architecture')
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        known = ', '.join(ARCHITECTURES)
        raise UserError(f'{path}: its general.architecture is {quoted(architecture)}, only {known} can be read')
    whole = str(metadata.get('general.type', 'model')) == 'model' and str(metadata.get('split.count', 1)) in '01'
    if not whole:
        raise UserError(f'{path}: is not a whole model (see general.type and split.count in its metadata)')
    fields, rope = dict(ARCHITECTURES[architecture]), architecture != 'gpt2'
    keys = {**KEYS, NORM_KEYS[fields['norm']]: 'norm_eps', **(ROPE_KEYS if rope else {})}
    known = {*keys, *NEUTRAL, *UNUSED, *(HEAD_KEYS if rope else ())}
    for key, value in metadata.items():
        part = key.removeprefix(architecture + '.')
        neutral = part not in NEUTRAL or not isinstance(value, np.ndarray) and value == NEUTRAL[part]
        if part != key and not (part in known and neutral):
            raise UserError(f'{path}: has {quoted(key)} = {quoted(value)}, which our model does not compute')

    def number(key, default=None):
        value = metadata.get(f'{architecture}.{key}', default)
        kind = float if keys.get(key) in FLOATS else int
        if type(value) is not kind or not 0 < value < 2**31:
            raise UserError(f'{path}: its {architecture}.{key} is {quoted(value)}, not a positive {kind.__name__}')
        # single precision has 1e-05 as 9.999999747378752e-06: the shortest decimal is what was meant
        return float(str(np.float32(value))) if kind is float else value

    n_head, n_embd = number('attention.head_count'), number('embedding_length')
    defaults = {'n_kv_head': n_head, 'head_size': max(1, n_embd // n_head), 'rope_base': 10000.0}
    fields.update({field: number(key, defaults.get(field)) for key, field in keys.items()})
    for key in HEAD_KEYS if rope else ():
        if number(key, fields['head_size']) != fields['head_size']:
            raise UserError(f'{path}: its {architecture}.{key} is not its {architecture}.attention.key_length')
    embedding = file.tensors.get('token_embd.weight')
    fields['vocab_size'] = embedding.shape[0] if embedding else 0
    fields['tie_weights'] = 'output.weight' not in file.tensors
    if architecture == 'llama':
        fields['bias'] = 'blk.0.attn_output.bias' in file.tensors
        fields['qkv_bias'] = not fields['bias'] and 'blk.0.attn_q.bias' in file.tensors
    if fields['n_layer'] > len(file.tensors):
        raise UserError(f'{path}: has {len(file.tensors)} tensors, too few for {fields["n_layer"]} layers')
    if n_tokens(file) not in (0, fields['vocab_size']):
        raise UserError(f'{path}: has {n_tokens(file)} tokens, but embeddings of {fields["vocab_size"]}')
    if ROPE_FREQS in file.tensors:
        fields['rope_scaling'] = read_rope_scaling(file, fields)
    return architecture, plain(fields)


def numbers(fields):
    """Fields of GPTConfig -> what places() needs, without making a config, which the values may not fit."""
    c = {'bias': False, 'qkv_bias': False, 'qk_gain': False, **fields}
    c['head_dim'] = fields.get('head_size') or fields['n_embd'] // fields['n_head']
    c['kv_heads'] = fields.get('n_kv_head') or fields['n_head']
    return SimpleNamespace(**c, mlp_dim=fields.get('mlp_width') or 4 * fields['n_embd'])


def plain(fields):
    """Fields without those that say what holds without them."""
    implied = {'n_kv_head': fields['n_head'], 'head_size': fields['n_embd'] / fields['n_head']}
    if fields['mlp'] != 'swiglu':
        implied['mlp_width'] = 4 * fields['n_embd']
    return {name: value for name, value in fields.items() if value != implied.get(name)}


def read_rope_scaling(file, fields):
    """GPTConfig.rope_scaling of a file with ROPE_FREQS, by which the frequency of each pair of channels is divided.

    They do not determine rope_scaling. So it is what our own key says, or Llama 3's with their largest value as the
    factor; UserError if these are other values.
    """
    path, size = file.path, fields['head_size'] // 2
    if file.metadata['general.architecture'] != 'llama' or file.tensors[ROPE_FREQS].shape != (size,):
        raise UserError(f'{path}: cannot use its tensor {ROPE_FREQS}')
    divisors = torch.empty(size)
    read_tensor(file, ROPE_FREQS, divisors)
    own = file.metadata.get(ROPE_SCALING)
    scaling = own if isinstance(own, str) else f'{divisors.max().item()},{LLAMA3_SCALING}'
    if (divisors == 1).all():
        return ''
    with user_errors(ValueError, where=f'{path}: '):
        expected = rope_divisors(rope_of(fields, scaling))
    if not torch.allclose(divisors, expected, rtol=1e-4):
        raise UserError(f'{path}: its tensor {ROPE_FREQS} is not the scaling of Llama 3, {quoted(scaling)}')
    return scaling


def rope_of(fields, scaling):
    """What rope_frequencies needs of a config."""
    return SimpleNamespace(rope_base=fields['rope_base'], rope_scaling=scaling, head_dim=fields['head_size'])


def rope_divisors(config):
    """ROPE_FREQS of a config: unscaled by scaled frequencies -> (hs / 2,)."""
    unscaled = SimpleNamespace(rope_base=config.rope_base, rope_scaling='', head_dim=config.head_dim)
    return rope_frequencies(unscaled) / rope_frequencies(config)


# --- out --------------------------------------------------------------------------------------------------------------


def gguf_architecture(config) -> str:
    """The architecture of llama.cpp that computes a GPT of this config. UserError names the setting that none has."""

    def refuse(field, why):
        raise UserError(f'{field}={getattr(config, field)}: {why}, so the model cannot be written as GGUF')

    check_known_fields(config)
    if config.logit_softcap:
        refuse('logit_softcap', "llama.cpp's gpt2, llama, qwen2 and qwen3 have none")
    if config.pos == 'learned':
        if config.norm != 'layernorm':
            refuse('norm', 'with pos=learned, as in GPT-2, it must be layernorm')
        if not config.mlp.startswith('gelu'):
            refuse('mlp', 'with pos=learned, as in GPT-2, it must be gelu or gelu_tanh')
        for field in ('qk_norm', 'n_kv_head', 'head_size'):
            implied = {'n_kv_head': config.n_head, 'head_size': config.n_embd / config.n_head}.get(field)
            if getattr(config, field) not in (0, False, implied):
                refuse(field, 'GPT-2 has none')
        return 'gpt2'
    for field, value in ARCHITECTURES['llama'].items():
        if getattr(config, field) != value:
            refuse(
                field, f'llama.cpp knows pos=learned with the rest of GPT-2, or {field}={value} with the rest of Llama'
            )
    architecture = 'qwen3' if config.qk_norm else 'qwen2' if config.qkv_bias and not config.bias else 'llama'
    if architecture == 'qwen3':
        for field in ('bias', 'qkv_bias'):
            if getattr(config, field):
                refuse(field, 'with qk_norm=True, as in Qwen3, there are no biases')
    if architecture == 'qwen2' and config.head_dim * config.n_head != config.n_embd:
        refuse('head_size', 'with qkv_bias=True, as in Qwen2, it must be n_embd / n_head')
    if architecture != 'llama' and config.rope_scaling:
        refuse('rope_scaling', f'llama.cpp has none for {architecture}')
    return architecture


def write_gguf(model, spec: dict | None, path: str, type: str = 'f16', name: str = ''):
    """Write a GPT and the spec of its tokenizer as a GGUF file that llama.cpp runs -> lines about what llama.cpp does
    otherwise, [] if nothing.

    type: of matrices, 'f32', 'f16' or 'q8_0'; rows that q8_0's blocks of 32 do not divide are f16. Norms, biases and
    position embeddings are f32. name: general.name. Rows of the embedding beyond the tokenizer's tokens are left out.
    The file appears when it is complete.
    On CPUs llama.cpp looks GELU up in a table of half precision, so a GPT-2's logits are off by some 0.001 there.
    UserError if llama.cpp has no such model or tokenizer, a weight is too large for f16, the file cannot be written, or
    gguf is missing.
    """
    gguf, config = import_gguf('writing a GGUF file'), model.config
    if type not in FILE_TYPES:
        raise UserError(f'type={type}: must be one of {", ".join(FILE_TYPES)}')
    architecture = gguf_architecture(config)
    rows, vocabulary, notes = vocabulary_metadata(spec, config.vocab_size)
    if config.mlp == 'gelu':
        notes.append('llama.cpp computes GELU by tanh, this model by erf: logits differ slightly')
    # what the model lacks and the format has: biases of zeros, gains of ones
    extra = {'bias': True} if architecture == 'gpt2' else {'qk_gain': config.qk_norm}
    derived = {'head_dim': config.head_dim, 'kv_heads': config.kv_heads, 'mlp_dim': config.mlp_dim}
    c = SimpleNamespace(**{**vars(config), **derived, **extra, 'vocab_size': rows})
    table = {place.theirs: (place, storage(gguf, place, type)) for place in places(architecture, c)}
    metadata = model_metadata(architecture, c, config)
    scaled = config.pos == 'rope' and config.rope_scaling
    metadata.update({'general.name': name, 'general.file_type': FILE_TYPES[type], **vocabulary})
    with user_errors(OSError, where=f'cannot write {path}: '), written_whole(path) as file:
        # the writer opens the unfinished file once more, by its name
        with closing(gguf.GGUFWriter(file.name, architecture)) as writer:
            for key, value in metadata.items():
                add_value(gguf, writer, key, value)
            if scaled:
                add_tensor_info(gguf, writer, ROPE_FREQS, (config.head_dim // 2,), gguf.GGMLQuantizationType.F32)
            for theirs, (place, kind) in table.items():
                add_tensor_info(gguf, writer, theirs, place.shape, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if scaled:
                writer.write_tensor_data(rope_divisors(config).numpy())
            weights = model.state_dict()
            for place, kind in table.values():
                writer.write_tensor_data(encoded(gguf, place, kind, our_rows(weights, place)))
    return notes


def model_metadata(architecture, c, config):
    """The metadata that describe a model."""
    keys = {**KEYS, NORM_KEYS[c.norm]: 'norm_eps', **({} if architecture == 'gpt2' else ROPE_KEYS)}
    actual = {'n_kv_head': c.kv_heads, 'head_size': c.head_dim, 'mlp_width': c.mlp_dim}
    metadata = {key: actual.get(field, getattr(c, field)) for key, field in keys.items()}
    metadata.update({key: float(metadata[key]) for key, field in keys.items() if field in FLOATS})
    if architecture != 'gpt2':
        metadata.update(dict.fromkeys(HEAD_KEYS, c.head_dim))
    metadata['vocab_size'] = c.vocab_size
    metadata = {f'{architecture}.{key}': value for key, value in metadata.items()}
    if architecture == 'llama' and config.rope_scaling:
        metadata[ROPE_SCALING] = config.rope_scaling
    return {'general.type': 'model', 'general.quantization_version': 2, **metadata}


def add_value(gguf, writer, key, value):
    """Give a GGUFWriter a value of metadata; '' is left out."""
    types = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    types.get(value.__class__, writer.add_array)(key, value)


def add_tensor_info(gguf, writer, name, shape, kind):
    """Announce a tensor to a GGUFWriter."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    writer.add_tensor_info(name, shape, np.dtype(np.float32), math.prod(shape) // block * block_bytes, raw_dtype=kind)


def storage(gguf, place, type):
    """The gguf.GGMLQuantizationType in which a tensor is stored, see write_gguf."""
    kinds = gguf.GGMLQuantizationType
    if type == 'f32' or len(place.shape) == 1 or place.theirs == 'position_embd.weight':
        return kinds.F32
    return kinds.Q8_0 if type == 'q8_0' and place.shape[-1] % 32 == 0 else kinds.F16


def our_rows(weights, place):
    """The tensor of a place out of our weights, in float32; zeros or, for a gain, ones if the model has none."""
    weight = weights.get(place.ours)
    if weight is None:
        fill = torch.ones if place.ours.endswith('norm.weight') else torch.zeros
        return fill(place.shape)
    rows = weight[place.start : place.start + place.shape[0]].detach().cpu().float()
    return permuted(rows, place.heads) if place.heads else rows


def encoded(gguf, place, kind, rows):
    """float32 -> the numpy array to write. UserError if it exceeds what float16 can hold."""
    if kind == gguf.GGMLQuantizationType.F16 and rows.abs().max() > torch.finfo(torch.float16).max:
        raise UserError(f'{place.ours} has weights beyond the range of f16: write f32')
    return gguf.quants.quantize(np.ascontiguousarray(rows.numpy()), kind)
