"""GPT-2 weights in Hugging Face's format: in and out, under our names."""

import os
from logging import getLogger

import torch

from common.errors import UserError, one_line
from tokenizer import GPT2_SPEC, read_tokenizer

NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HF_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}  # Hugging Face's to ours
TRANSPOSED = ('attn.c_attn.weight', 'attn.c_proj.weight', 'mlp.c_fc.weight', 'mlp.c_proj.weight')  # Conv1D's (in, out)


def read_pretrained(name: str) -> tuple[dict, dict]:
    """A GPT-2 in Hugging Face's format -> (fields of GPTConfig, state dict under our names in float32 on the CPU).

    name: one of HUB_NAMES, which transformers downloads once and keeps, or a folder with config.json and weights.
    UserError if it is not available, or is not a GPT-2 that our model computes exactly.
    """
    is_folder = os.path.isdir(name)
    if name not in HUB_NAMES and not is_folder:
        raise UserError(
            f'--init_from={name}: must be resume, {", ".join(HUB_NAMES)}, the folder or a checkpoint of a run, or a '
            'directory with a Hugging Face GPT-2 (train.py also knows scratch and auto)'
        )
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f'--init_from={name} needs the package transformers: pip install transformers') from error
    logging.set_verbosity_error()
    getLogger('huggingface_hub').setLevel('CRITICAL')  # one line at the end, not one per retry
    if is_folder:
        logging.disable_progress_bar()
    try:
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hf_config.model_type != 'gpt2':
            raise UserError(f'--init_from={name}: is a {hf_config.model_type} model, only GPT-2 can be imported')
        hf_model, report = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # hub, network, JSON, weights: each library in between has errors of its own
        hint = 'check the files in it' if is_folder else 'is the network reachable? a local directory works too'
        raise UserError(f'cannot load the pretrained model {name} ({hint}): {one_line(str(error), 150)}') from error
    missing = [key for key in report['missing_keys'] if key != 'lm_head.weight'] + list(report['mismatched_keys'])
    if missing:
        raise UserError(
            f'--init_from={name}: its weights do not fit its config.json, {missing[0]} is missing or of another shape'
        )
    exact = (
        hf_config.activation_function in HF_ACTIVATIONS
        and hf_config.scale_attn_weights
        and hf_config.tie_word_embeddings
        and not hf_config.scale_attn_by_inverse_layer_idx
        and hf_config.layer_norm_epsilon == 1e-5
        and hf_config.n_inner in (None, 4 * hf_config.n_embd)
    )
    if not exact:
        raise UserError(
            f'--init_from={name}: its config.json departs from GPT-2 (activation, scaling, tying or widths), '
            'not supported'
        )
    fields = {
        'n_layer': hf_config.n_layer,
        'n_head': hf_config.n_head,
        'n_embd': hf_config.n_embd,
        'vocab_size': hf_config.vocab_size,
        'block_size': hf_config.n_positions,
        'mlp': HF_ACTIVATIONS[hf_config.activation_function],
        'bias': True,
    }
    weights = {
        key: weight.t().contiguous() if key.endswith(TRANSPOSED) else weight
        for key, weight in hf_model.state_dict().items()
        if not key.endswith(('.attn.bias', '.attn.masked_bias'))  # causal masks
    }
    return fields, weights


def pretrained_tokenizer(name: str) -> dict | None:
    """The tokenizer spec of a pretrained model: its folder's, see tokenizer.read_tokenizer; GPT-2's for HUB_NAMES. None
    for a folder without one: a vocabulary of GPT-2's size need not be GPT-2's."""
    return read_tokenizer(name) if os.path.isdir(name) else GPT2_SPEC


def to_hugging_face(model):
    """A GPT -> transformers' GPT2LMHeadModel with the same weights, in eval mode. UserError if it is no GPT-2, or the
    package is missing."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError('this needs the package transformers: pip install transformers') from error
    config, defaults = model.config, type(model.config)()
    for name, value in vars(config).items():
        known = name in NANOGPT_FIELDS or value == getattr(defaults, name)
        if value not in HF_ACTIVATIONS.values() if name == 'mlp' else not known:
            raise UserError(f'only a GPT-2 can be given to transformers, not a model with {name}={value}')
    activations = {ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}
    hf_config = GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        activation_function=activations[config.mlp],
        bos_token_id=None,
        eos_token_id=None,
    )
    hf_model, weights = GPT2LMHeadModel(hf_config).eval(), model.state_dict()
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].t() if name.endswith(TRANSPOSED) else weights[name])
            else:
                parameter.zero_()  # a bias that our model does not have
    return hf_model
