"""Models of Hugging Face's transformers, in and out: their names and ours as one table per family, read both ways.

Families are GPT-2, Llama (also SmolLM2 and TinyLlama), Qwen2 and Qwen3, by the `model_type` of a config.json. A model
comes in only if GPT computes exactly what its config.json says, and goes out only as a family that computes exactly
what GPT does: no field and no tensor is skipped unless it is known to change nothing.

What each field of a config.json does was read in transformers 5.23, models/*/configuration_*.py and modeling_*.py.
"""

import dataclasses
import json
import math
import os
import re

import torch

from common.errors import UserError, one_line, user_errors
from common.files import written_whole
from common.weight_files import WeightFiles, all_finite, read_json, shown, write_weight_files

EMBEDDING, HEAD = 'transformer.wte.weight', 'lm_head.weight'
MAX_CONFIG = 2**20  # bytes
KNOWN_FIELDS = set(  # of GPTConfig, that this file translates, or that change no logits
    """
    block_size vocab_size n_layer n_head n_embd dropout bias mlp pos norm qk_norm qk_gain n_kv_head head_size mlp_width
    qkv_bias norm_eps rope_base rope_scaling tie_weights logit_softcap zero_init
    """.split()
)


# --- the families -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Family:
    """What the models of one model_type have in common, and how it is written there and here."""

    architecture: str  # its class in transformers
    prefix: str  # of the names of all tensors but the head's; files of a model without head lack it
    fields: dict[str, str]  # of GPTConfig -> of config.json
    computes: dict[str, tuple]  # fields of GPTConfig, see traits -> values that the family can compute
    always: dict[str, object]  # fields of GPTConfig that a config.json does not name -> the family's value
    defaults: dict[str, object]  # fields of config.json that may be missing or null -> what that means
    only: dict[str, tuple]  # fields of config.json that GPT has no choice of -> values that it computes
    harmless: tuple[str, ...]  # fields of config.json that change no logits, besides HARMLESS
    modules: dict[str, tuple[str, ...]]  # ours -> theirs, stacked on dimension 0 in ours; {} is the layer
    biased: tuple[str, ...]  # modules with biases, by the end of our name
    derived: str  # regular expression of tensors that early versions saved, though config.json says all of them
    transposed: tuple[str, ...] = ()  # modules whose weight is stored (in, out), by the end of our name


FIELDS = {
    'vocab_size': 'vocab_size',
    'block_size': 'max_position_embeddings',
    'n_layer': 'num_hidden_layers',
    'n_head': 'num_attention_heads',
    'n_kv_head': 'num_key_value_heads',
    'n_embd': 'hidden_size',
    'head_size': 'head_dim',
    'mlp_width': 'intermediate_size',
    'norm_eps': 'rms_norm_eps',
    'tie_weights': 'tie_word_embeddings',
}
ROPE_FIELDS = ('rope_theta', 'rope_scaling', 'rope_parameters')  # see rope_fields
LLAMA3 = ('factor', 'low_freq_factor', 'high_freq_factor', 'original_max_position_embeddings')
LAYER = 'model.layers.{}.'
MODULES = {
    'transformer.wte': ('model.embed_tokens',),
    'transformer.h.{}.ln_1': (LAYER + 'input_layernorm',),
    'transformer.h.{}.attn.c_attn': tuple(f'{LAYER}self_attn.{part}_proj' for part in 'qkv'),
    'transformer.h.{}.attn.c_proj': (LAYER + 'self_attn.o_proj',),
    'transformer.h.{}.ln_2': (LAYER + 'post_attention_layernorm',),
    'transformer.h.{}.mlp.c_fc': (LAYER + 'mlp.gate_proj', LAYER + 'mlp.up_proj'),
    'transformer.h.{}.mlp.c_proj': (LAYER + 'mlp.down_proj',),
    'transformer.ln_f': ('model.norm',),
    'lm_head': ('lm_head',),
}
HEAD_NORMS = {f'transformer.h.{{}}.attn.{x}_norm': (f'{LAYER}self_attn.{x}_norm',) for x in 'qk'}
GPT2_MODULES = [name for name in MODULES if name != 'lm_head'] + ['transformer.wpe', 'lm_head']
GPT2_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu2': 'relu2'}
LLAMA_SHAPE = {'pos': ('rope',), 'norm': ('rmsnorm',), 'mlp': ('swiglu',), 'logit_softcap': (0,)}
LLAMA_ALWAYS = {'pos': 'rope', 'norm': 'rmsnorm', 'mlp': 'swiglu', 'bias': False}
LLAMA_ONLY = {'hidden_act': ('silu', 'swish'), 'partial_rotary_factor': (1,), 'is_causal': (True,)}
LLAMA_DEFAULTS = {'rms_norm_eps': 1e-6, 'tie_word_embeddings': False, 'head_dim': 0}
FREQUENCIES = r'(model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq'
QWEN_HARMLESS = ('attention_dropout', 'sliding_window', 'max_window_layers')  # where use_sliding_window is off

FAMILIES = {  # in the order in which a model that several compute is given to one
    'gpt2': Family(
        architecture='GPT2LMHeadModel',
        prefix='transformer.',
        fields={
            'vocab_size': 'vocab_size',
            'block_size': 'n_positions',
            'n_layer': 'n_layer',
            'n_head': 'n_head',
            'n_embd': 'n_embd',
            'mlp_width': 'n_inner',
            'norm_eps': 'layer_norm_epsilon',
            'tie_weights': 'tie_word_embeddings',
        },
        computes={
            'pos': ('learned',),
            'norm': ('layernorm',),
            'mlp': tuple(GPT2_ACTIVATIONS.values()),
            'n_kv_head': (0,),
            'head_size': (0,),
            'qk_norm': (False,),
            'logit_softcap': (0,),
        },
        always={'bias': True},
        defaults={'n_inner': 0, 'layer_norm_epsilon': 1e-5, 'tie_word_embeddings': True},
        only={'scale_attn_weights': (True,), 'is_causal': (True,)},
        harmless=tuple(f'summary_{x}' for x in ('type', 'use_proj', 'activation', 'proj_to_labels', 'first_dropout'))
        + ('resid_pdrop', 'embd_pdrop', 'attn_pdrop', 'n_ctx', 'n_special', 'predict_special_tokens', 'output_past')
        + ('reorder_and_upcast_attn',),  # the same product, in another order
        modules={name: (name,) for name in GPT2_MODULES},
        biased=('ln_1', 'ln_2', 'ln_f', 'c_attn', 'c_fc', 'c_proj'),
        derived=r'(transformer\.)?h\.\d+\.attn\.(masked_)?bias',  # the causal mask, and what it masks with
        transposed=('c_attn', 'c_fc', 'c_proj'),
    ),
    'llama': Family(
        architecture='LlamaForCausalLM',
        prefix='model.',
        fields=FIELDS,
        computes={**LLAMA_SHAPE, 'qk_norm': (False,), 'qkv_bias': (False,), 'n_head': (0,)},
        always=LLAMA_ALWAYS,
        defaults={**LLAMA_DEFAULTS, 'num_key_value_heads': 0},
        only={**LLAMA_ONLY, 'pretraining_tp': (0, 1), 'is_llama_config': (True,), 'activation': ('swiglu',)},
        harmless=('attention_dropout', 'attention_bias', 'mlp_bias'),  # of the two biases, see llama_bias
        modules=MODULES,
        biased=('c_attn', 'c_fc', 'c_proj'),
        derived=FREQUENCIES,
    ),
    'qwen2': Family(
        architecture='Qwen2ForCausalLM',
        prefix='model.',
        fields=FIELDS,
        computes={**LLAMA_SHAPE, 'qk_norm': (False,), 'bias': (False,)},
        always={**LLAMA_ALWAYS, 'qkv_bias': True},
        defaults=LLAMA_DEFAULTS,
        only=LLAMA_ONLY,
        harmless=QWEN_HARMLESS,
        modules=MODULES,
        biased=('c_attn',),
        derived=FREQUENCIES,
    ),
    'qwen3': Family(
        architecture='Qwen3ForCausalLM',
        prefix='model.',
        fields=FIELDS,
        computes={**LLAMA_SHAPE, 'qk_norm': (True,), 'bias': (False,), 'qkv_bias': (False,)},
        always={**LLAMA_ALWAYS, 'qk_norm': True, 'qk_gain': True},
        defaults={**LLAMA_DEFAULTS, 'head_dim': 128},
        only=LLAMA_ONLY,
        harmless=QWEN_HARMLESS,
        modules={**MODULES, **HEAD_NORMS},
        biased=(),
        derived=FREQUENCIES,
    ),
}

# Fields of any config.json that say how to train, generate, classify or store, and change no logits
HARMLESS = set(
    """
    model_type architectures transformers_version torch_dtype dtype _name_or_path name_or_path _commit_hash use_cache
    attn_implementation _attn_implementation initializer_range gradient_checkpointing is_decoder return_dict
    output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss tokenizer_class prefix
    bos_token_id eos_token_id pad_token_id sep_token_id unk_token_id decoder_start_token_id forced_bos_token_id
    forced_eos_token_id bad_words_ids suppress_tokens begin_suppress_tokens max_length min_length max_new_tokens
    do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size num_return_sequences
    output_scores return_dict_in_generate remove_invalid_values exponential_decay_length_penalty
    finetuning_task task_specific_params problem_type id2label label2id num_labels _num_labels
    transformers.js_config unsloth_version unsloth_fixed max_sequence_length model_max_length neftune_noise_alpha
    _flash_attn_2_enabled
    """.split()
)


# --- fields -----------------------------------------------------------------------------------------------------------


def gpt_fields(config: dict, path: str) -> dict:
    """The fields of GPTConfig of a config.json, a dict. path: of the file, for messages. UserError if GPT computes
    another function than transformers would, or may do so: it names the field of config.json."""
    model_type = config.get('model_type')
    if model_type not in FAMILIES:
        raise UserError(
            f'{path}: model_type is {one_line(repr(model_type), 100)}, only {", ".join(FAMILIES)} are known here'
        )
    family, rope = FAMILIES[model_type], model_type != 'gpt2'
    translated = {*family.fields.values(), *(ROPE_FIELDS if rope else ('activation_function',))}
    for name, value in config.items():
        if name not in HARMLESS and name not in family.harmless and name not in translated:
            check_field(family, name, value, f'{path}: {one_line(name, 100)}={one_line(repr(value), 100)}')
    fields = dict(family.always)
    for ours, theirs in family.fields.items():
        value = config.get(theirs)
        fields[ours] = family.defaults.get(theirs) if value is None else checked(ours, value, f'{path}: {theirs}')
        if fields[ours] is None:
            raise UserError(f'{path} has no {theirs}')
    if rope:
        fields.update(rope_fields(config, path))
    else:
        activation = config.get('activation_function', 'gelu_new')
        if activation not in GPT2_ACTIVATIONS:
            raise UserError(f'{path}: activation_function is {activation!r}, must be {" or ".join(GPT2_ACTIVATIONS)}')
        fields['mlp'] = GPT2_ACTIVATIONS[activation]
    if model_type == 'llama':
        fields['bias'] = llama_bias(config, path)
    return without_defaults(fields)


def check_field(family, name, value, where):
    """UserError unless a field that is neither translated nor harmless has a value that changes nothing."""
    if name == 'layer_types':
        fits = value is None or isinstance(value, list) and all(kind == 'full_attention' for kind in value)
    elif name in family.only:
        fits = value is None or value in family.only[name]
    else:
        fits = value in (None, False, '', [], {})  # zero is False
    if not fits:
        raise UserError(f'{where}: this {family.architecture} computes, or may compute, what is not supported here')


def checked(ours, value, where):
    """A value of config.json for a field of ours, if it is of the right type. UserError otherwise."""
    number = type(value) in (int, float) and math.isfinite(value)
    if ours == 'tie_weights':
        fits, expected = type(value) is bool, 'true or false'
    elif ours == 'norm_eps':
        fits, expected = number and 0 <= value < 1, 'a number of at least 0 and below 1'
    else:
        fits, expected = type(value) is int and 1 <= value < 2**31, 'a whole number of at least 1, below 2^31'
    if not fits:
        raise UserError(f'{where} is {one_line(repr(value), 100)}, must be {expected}')
    return value


def rope_fields(config, path):
    """rope_base and rope_scaling from a config.json: rope_theta and rope_scaling of transformers 4, or the
    rope_parameters of transformers 5, or both if they agree. UserError for other scalings than Llama 3's."""
    base_4, scaling_4 = rope_settings('rope_scaling', config, path)
    base_5, scaling_5 = rope_settings('rope_parameters', config, path)
    if config.get('rope_scaling') and config.get('rope_parameters') and scaling_4 != scaling_5:
        raise UserError(f'{path}: rope_scaling and rope_parameters contradict each other')
    bases = [base for base in (config.get('rope_theta'), base_4, base_5) if base is not None] or [10000.0]
    if any(type(base) not in (int, float) or base != bases[0] for base in bases):
        raise UserError(f'{path}: rope_theta is {one_line(" and ".join(map(repr, bases)), 100)}, must be one number')
    return {'rope_base': float(bases[0]), 'rope_scaling': scaling_4 or scaling_5}


def rope_settings(name, config, path):
    """rope_theta, or None, and GPTConfig.rope_scaling from the object that a config.json has under a name."""
    given = config.get(name) or {}
    if not isinstance(given, dict):
        raise UserError(f'{path}: {name} is {one_line(repr(given), 100)}, must be an object or null')
    values = {key: value for key, value in given.items() if key not in ('type', 'rope_type', 'rope_theta')}
    kind = given.get('rope_type', given.get('type', 'default'))
    if kind not in ('default', 'llama3'):
        raise UserError(f'{path}: {name} is of type {one_line(repr(kind), 100)}, must be default or llama3')
    if values.get('partial_rotary_factor') in (None, 1):
        values.pop('partial_rotary_factor', None)
    expected = LLAMA3 if kind == 'llama3' else ()
    if kind == 'llama3':
        values.setdefault(LLAMA3[-1], config.get('max_position_embeddings'))
    if values.keys() != set(expected):
        wrong = one_line(', '.join(sorted(values.keys() ^ set(expected))), 100)
        raise UserError(f'{path}: {name} of type {kind}: {wrong} is missing or not supported')
    numbers = [values[key] for key in expected]
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in numbers):
        raise UserError(f'{path}: {name} is {one_line(repr(given), 200)}, must hold positive numbers')
    return given.get('rope_theta'), ','.join(repr(float(number)).removesuffix('.0') for number in numbers)


def rope_config(config):
    """rope_fields the other way: fields of a config.json for both versions of transformers, and for others."""
    scaling = dict(zip(LLAMA3, map(float, config.rope_scaling.split(',')))) if config.rope_scaling else {}
    if scaling:
        block_size = scaling[LLAMA3[-1]]
        scaling[LLAMA3[-1]] = int(block_size) if block_size.is_integer() else block_size
        scaling['rope_type'] = 'llama3'
    return {
        'rope_theta': config.rope_base,  # with rope_scaling: transformers 4, llama.cpp, vLLM
        'rope_scaling': scaling or None,
        'rope_parameters': {'rope_type': 'default', **scaling, 'rope_theta': config.rope_base},  # transformers 5
    }


def llama_bias(config, path):
    """Has a Llama biases? UserError if only some of its layers have."""
    attention, mlp = config.get('attention_bias') or False, config.get('mlp_bias') or False
    if attention != mlp or type(attention) is not bool:
        raise UserError(
            f'{path}: attention_bias={attention!r} with mlp_bias={mlp!r}: supported are both true and both false'
        )
    return attention


def without_defaults(fields):
    """The same fields, with 0 for the widths that GPTConfig has by default: GPT-2 has no others, as in nanoGPT."""
    if fields.get('n_kv_head') == fields['n_head']:
        fields['n_kv_head'] = 0
    if fields.get('head_size', 0) * fields['n_head'] == fields['n_embd']:
        fields['head_size'] = 0
    if fields['mlp_width'] == 4 * fields['n_embd'] and fields.get('mlp') != 'swiglu':
        fields['mlp_width'] = 0
    return fields


def traits(config) -> dict:
    """The fields of a GPTConfig, with 0 or False where a value computes the same as that, for Family.computes."""
    return {
        **vars(config),
        'n_kv_head': 0 if config.kv_heads == config.n_head else config.n_kv_head,
        'head_size': 0 if config.head_dim * config.n_head == config.n_embd else config.head_size,
        'qkv_bias': config.qkv_bias and not config.bias,
        'n_head': config.n_head if config.n_embd % config.n_head else 0,  # transformers' LlamaConfig refuses it
    }


def check_known_fields(config):
    """UserError if somebody's new field of GPTConfig is in use: no other program knows what it computes."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in KNOWN_FIELDS and value != field.default:
            raise UserError(f'--{field.name}={value}: is new in model.py, and no other program computes it')


def family_of(config) -> str:
    """The family that computes exactly what a GPT with this GPTConfig does: 'gpt2', 'llama', 'qwen2' or 'qwen3', the
    first of those that do. UserError naming the settings that stand in the way if none does."""
    check_known_fields(config)
    shape, obstacles = traits(config), {}
    for name, family in FAMILIES.items():
        obstacles[name] = [key for key, values in family.computes.items() if shape[key] not in values]
        if not obstacles[name]:
            return name
    nearest = min(obstacles, key=lambda name: len(obstacles[name]))
    settings = ', '.join(f'--{key}={shape[key]}' for key in obstacles[nearest])
    raise UserError(
        f'{settings}: no family of Hugging Face models computes this; with other values it would be a {nearest}'
    )


def hf_config(config, family: str, dtype: torch.dtype = torch.float32, **ids) -> dict:
    """The content of a config.json for a GPT with this GPTConfig as a model of a family that family_of names.

    dtype: of the weights beside it. ids: bos_token_id, eos_token_id and pad_token_id, None unless given.
    """
    known = FAMILIES[family]
    actual = {'n_kv_head': config.kv_heads, 'head_size': config.head_dim, 'mlp_width': config.mlp_dim}
    ours = {**vars(config), **actual}
    content = {
        'model_type': family,
        'architectures': [known.architecture],
        'torch_dtype': str(dtype).removeprefix('torch.'),
        **{theirs: ours[name] for name, theirs in known.fields.items()},
        'bos_token_id': None,  # the defaults of transformers are ids of one vocabulary
        'eos_token_id': None,
        'pad_token_id': None,
        **ids,
    }
    if family == 'gpt2':
        activations = {ours: theirs for theirs, ours in reversed(GPT2_ACTIVATIONS.items())}
        dropouts = dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), config.dropout)
        return {**content, 'activation_function': activations[config.mlp], **dropouts}
    if family == 'llama':
        content.update(attention_bias=config.bias, mlp_bias=config.bias)
    return {**content, 'hidden_act': 'silu', **rope_config(config)}


# --- tensors ----------------------------------------------------------------------------------------------------------


def pieces(family: str, config, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Where a parameter of ours is in a model of a family -> views of the tensor, by their names there."""
    module, _, kind = name.rpartition('.')
    layer = re.search(r'\.h\.(\d+)\.', module)
    generic = module.replace(layer[0], '.h.{}.') if layer else module
    if generic not in FAMILIES[family].modules:
        raise UserError(f'the parameter {name} has no place in a {family} model')
    theirs = [f'{theirs.format(layer and layer[1])}.{kind}' for theirs in FAMILIES[family].modules[generic]]
    if kind == 'weight' and module.endswith(FAMILIES[family].transposed):
        return {theirs[0]: tensor.t()}
    heads = [count * config.head_dim for count in (config.n_head, config.kv_heads, config.kv_heads)]
    rows = {1: [len(tensor)], 2: [config.mlp_dim] * 2, 3: heads}[len(theirs)]
    return dict(zip(theirs, tensor.split(rows)))


def family_parameters(family: str, config) -> list[str]:
    """Our names of all parameters that a model of a family has."""
    known, names = FAMILIES[family], []
    for module in known.modules:
        biased = module.endswith(known.biased) and (family != 'llama' or config.bias)
        for layer in range(config.n_layer) if '{}' in module else [0]:
            names += [f'{module.format(layer)}.{kind}' for kind in (('weight', 'bias') if biased else ('weight',))]
    return [name for name in names if name != HEAD or not config.tie_weights]


def their_tensors(model, family: str) -> dict[str, torch.Tensor]:
    """The parameters of a GPT under a family's names, as views. Biases that GPT lacks are zero, gains one; tied weights
    are there once. UserError for a parameter that has no place there."""
    ours, config, tensors = dict(model.named_parameters()), model.config, {}
    for name in family_parameters(family, config):
        module, _, kind = name.rpartition('.')
        tensor = ours.pop(name, None)
        if tensor is None and kind == 'bias':
            tensor = torch.zeros(len(model.get_parameter(f'{module}.weight')))
        elif tensor is None:  # gains in the norms of queries and keys
            tensor = torch.ones(config.head_dim)
        tensors.update(pieces(family, config, name, tensor.detach()))
    if ours:
        raise UserError(f'the parameter {min(ours)} has no place in a {family} model')
    return tensors


# --- in ---------------------------------------------------------------------------------------------------------------


def read_hf_model(folder: str, make, dtype: torch.dtype = torch.float32):
    """pretrained_model of a folder. Each tensor is copied from its mapped file to its place."""
    path = os.path.join(folder, 'config.json')
    content = read_json(path, MAX_CONFIG)
    with user_errors(TypeError, OverflowError, where=f'{path} is not sound: '):  # a list as a number, 400 digits
        fields, family = gpt_fields(content, path), content['model_type']
    files = WeightFiles(folder)
    check_size(fields, files, path)
    with user_errors(ValueError, TypeError, where=f'{path}: '):
        model = make(fields)
    reader = TensorReader(files, family, folder, model.config.tie_weights)
    weights = {}
    for name, parameter in model.named_parameters():
        ready = not parameter.is_meta and parameter.dtype == dtype
        weights[name] = parameter.detach() if ready else torch.empty(parameter.shape, dtype=dtype, device='cpu')
    # The largest first: while it is read it is in memory twice, and the others are not there yet
    for name in sorted(weights, key=lambda name: -weights[name].numel()):
        reader.read(pieces(family, model.config, name, weights[name]))
    if model.config.tie_weights:
        reader.check_tied_head(weights[EMBEDDING])
        weights[HEAD] = weights[EMBEDDING]
    reader.check_all_read()
    for name, weight in weights.items():
        if not all_finite(weight):
            raise UserError(f'{folder}: some of its weights are NaN or infinite ({name}); use another copy')
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model


def check_size(fields, files, path):
    """UserError if the matrices of a model with these fields have more numbers than there are in its files, or it has
    another number of layers, before any memory is taken for it."""
    C, heads, kv_heads = (fields.get(name) for name in ('n_embd', 'n_head', 'n_kv_head'))
    hs, mlp_width = fields.get('head_size') or C // heads, fields['mlp_width'] or 4 * C
    attention = 2 * C * hs * (heads + (kv_heads or heads))
    mlp = C * mlp_width * (3 if fields['mlp'] == 'swiglu' else 2)
    needed = fields['vocab_size'] * C + fields['n_layer'] * (attention + mlp)
    needed += fields['block_size'] * C if fields.get('pos', 'learned') == 'learned' else 0
    found = sum(math.prod(shape) for shape in files.shapes.values())
    layers = {layer[1] for name in files.shapes if (layer := re.search(r'(?:^|\.)(?:h|layers)\.(\d+)\.', name))}
    if fields['n_layer'] != len(layers):
        raise UserError(f'{path} describes {fields["n_layer"]} layers, there are weights of {len(layers)} beside it')
    if needed > found:
        raise UserError(
            f'{path} describes a model with over {needed - 1:,} parameters, the weights beside it are {found:,}: one '
            'of them is of another model, or a file is missing'
        )


class TensorReader:
    """Reads the tensors of a folder by the names of its family, and knows which have been read."""

    def __init__(self, files: WeightFiles, family: str, folder: str, tied: bool):
        self.files, self.folder = files, folder
        self.unread = {name for name in files.shapes if not re.fullmatch(FAMILIES[family].derived, name)}
        self.prefix = FAMILIES[family].prefix
        self.has_prefix = any(name.startswith(self.prefix) for name in self.unread)
        embedding = self.name_in_files(FAMILIES[family].modules['transformer.wte'][0] + '.weight')
        # some tools keep only this name of a tied matrix
        self.instead = {embedding: HEAD} if tied and embedding not in self.unread else {}

    def name_in_files(self, name):
        """A name as these files have it: transformers saves a model without head without the prefix."""
        return name if self.has_prefix else name.removeprefix(self.prefix)

    def read(self, places: dict[str, torch.Tensor]):
        """Read tensors into their places. UserError if one is missing, or of another shape."""
        for name, place in places.items():
            name = self.name_in_files(name)
            name = self.instead.get(name, name)
            if name not in self.files.shapes:
                raise UserError(f'{self.folder}: the tensor {name} is missing from its weights')
            if self.files.shapes[name] != place.shape:
                shapes = f'{list(self.files.shapes[name])}, by its config.json {list(place.shape)}'
                raise UserError(f'{self.folder}: the tensor {name} has the shape {shapes}')
            place.copy_(self.files.read(name))
            self.unread.discard(name)

    def check_tied_head(self, embedding):
        """UserError if there is a head that differs from the embedding, though config.json says that they are one."""
        if HEAD in self.unread:
            head, rows = self.files.read(HEAD), 4096  # rows that are converted at a time
            same = head.shape == embedding.shape and all(
                torch.equal(ours, theirs.to(ours.dtype))
                for ours, theirs in zip(embedding.split(rows), head.split(rows))
            )
            if not same:
                raise UserError(
                    f'{self.folder}: {HEAD} differs from the embedding, though config.json says that they are one '
                    'matrix (tie_word_embeddings)'
                )
            self.unread.discard(HEAD)

    def check_all_read(self):
        """UserError if there are tensors that have no place in the model."""
        if self.unread:
            raise UserError(
                f'{self.folder}: the tensor {shown(min(self.unread))} has no place in the model that config.json '
                f'describes, nor have {len(self.unread) - 1} more'
            )


# --- out --------------------------------------------------------------------------------------------------------------


def write_hf_model(model, folder: str, dtype: torch.dtype = torch.float32, **ids):
    """Write config.json and the weights of a GPT to a folder, which must exist, for transformers and what reads its
    format.

    dtype: of the written weights: float32, float16 or bfloat16. ids: as in hf_config.
    UserError as family_of, their_tensors and write_weight_files; OSError as open and write do.
    """
    family = family_of(model.config)
    content = hf_config(model.config, family, dtype, **ids)
    write_weight_files(folder, their_tensors(model, family), dtype)
    with written_whole(os.path.join(folder, 'config.json'), 'w') as file:  # last: without it, it is no model
        json.dump(content, file, indent=2)


def to_hugging_face(model):
    """A GPT -> transformers' model of its family with the same weights, in eval mode. UserError if no family computes
    the same, or the package is missing."""
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError as error:
        raise UserError('this needs the package transformers: pip install transformers') from error
    family = family_of(model.config)
    hf_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**hf_config(model.config, family)))
    tensors = their_tensors(model, family)
    missing, unexpected = hf_model.load_state_dict(tensors, strict=False)
    assert not unexpected and set(missing) <= {HEAD}, (missing, unexpected)
    return hf_model.eval()
