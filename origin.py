"""Where a model comes from: made anew, read from a checkpoint, or from GPT-2 weights in Hugging Face's format, and back into it."""

import dataclasses
import math
import os
from logging import getLogger

import torch

from checkpoint import BEST, LATEST, NANOGPT_FIELDS, load_checkpoint, model_args_of, restore_model, skeleton
from configurator import UserError, one_line, user_errors, warn
from model import GPT, GPTConfig
from tokenizer import GPT2_SPEC, read_tokenizer, same_ids, text_vocab_size

# what weights fix, and a setting may ask for
SHAPE = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in ('vocab_size', 'dropout')]


# --- for a script -----------------------------------------------------------------------------------------------------


def initial_model(config, data_dir, tokenizer, vocab_size):
    """What train.py starts from, as its settings say -> (GPT on the CPU in float32, the checkpoint to go on from or None).

    data_dir: folder of the data set, tokenizer: its spec or None, vocab_size: how many ids it has. Weights that exist bring their
    shape, as in nanoGPT. A checkpoint without ckpt_best.pt beside it counts as one whose best is not known. UserError if weights
    cannot be had, or do not go with the settings that were given, or with the data.
    """
    init_from, dropout, checkpoint = config['init_from'], config['dropout'], None
    if init_from == 'scratch':
        rounded = model_vocab_size(tokenizer, vocab_size, config['vocab_multiple'])
        with user_errors(ValueError):
            return GPT(
                GPTConfig(vocab_size=rounded, dropout=dropout, **{key: config[key] for key in SHAPE if key in config})
            ), None
    if init_from == 'resume':
        path = os.path.join(config['out_dir'], LATEST)
        checkpoint = load_checkpoint(path)
        model, its_tokenizer = restore_model(checkpoint, path, dropout), checkpoint.get('tokenizer')
        origin, fixed, hint = (
            f'the run in {path}',
            SHAPE,
            'leave it out to resume, or start another run with another --out_dir',
        )
        if not os.path.exists(
            os.path.join(config['out_dir'], BEST)
        ):  # as after nanoGPT: the best is what the next evaluation finds
            checkpoint['best_val_loss'], checkpoint['best_iter'] = math.inf, checkpoint['iter_num']
    else:
        model, its_tokenizer, _ = open_model(init_from, config['out_dir'], LATEST, dropout)
        origin, fixed, hint = init_from, [key for key in SHAPE if key != 'block_size'], 'leave it out'
        if tokenizer and not its_tokenizer:
            warn(f'{init_from} has no tokenizer beside it: nothing shows that its ids mean what those of {data_dir} do')
    if its_tokenizer and tokenizer and not same_ids(tokenizer, its_tokenizer):
        raise UserError(
            f'{origin} was trained with another tokenizer than that of {data_dir}: choose a --dataset in its encoding'
        )
    for key in fixed:
        if key in config.given and config[key] != getattr(model.config, key):
            message = f'--{key}={config[key]}: {origin} has {key}={getattr(model.config, key)}'
            if checkpoint or key not in NANOGPT_FIELDS:
                raise UserError(f'{message}; {hint}')
            warn(f'{message}, which it keeps')  # as in nanoGPT, whose recipes for fine-tuning may name a shape
    if (needed := text_vocab_size(tokenizer) if tokenizer else vocab_size) > model.config.vocab_size:
        raise UserError(
            f'{data_dir} has a vocabulary of {needed}, the model of {model.config.vocab_size}: choose another --dataset'
        )
    asked, longest = config['block_size'], model.config.block_size
    if not checkpoint and asked < longest:
        model.crop_block_size(asked)
    elif not checkpoint and asked > longest and 'block_size' in config.given:
        raise UserError(f'--block_size={asked}: {origin} has {longest} positions, use at most that')
    return model, checkpoint


def model_vocab_size(tokenizer, vocab_size, multiple):
    """The vocabulary of a new model for data of a tokenizer (its spec or None) with vocab_size ids, rounded up to a multiple."""
    return -(-(GPTConfig.vocab_size if tokenizer == GPT2_SPEC else vocab_size) // multiple) * multiple


def open_model(init_from, out_dir, name, dropout=0.0):
    """A model to start from or to use, as --init_from says -> (GPT, tokenizer spec or None, the settings it was trained with or {}).

    init_from: 'resume' for the checkpoint `name` in out_dir; a checkpoint's file, or a folder with a run's ckpt.pt; else what
    load_pretrained takes. UserError if it cannot be had.
    """
    path = os.path.join(out_dir, name) if init_from == 'resume' else init_from
    if init_from != 'resume' and os.path.exists(os.path.join(init_from, LATEST)):
        path = os.path.join(init_from, LATEST)
    if init_from != 'resume' and not os.path.isfile(path):
        return *load_pretrained(init_from, dropout), {}
    checkpoint = load_checkpoint(path)
    return restore_model(checkpoint, path, dropout), checkpoint.get('tokenizer'), checkpoint['config']


# --- GPT-2 in Hugging Face's format ------------------------------------------------------------------------------------

PRETRAINED = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HF_ACTIVATIONS = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu'}
TRANSPOSED = (
    'attn.c_attn.weight',
    'attn.c_proj.weight',
    'mlp.c_fc.weight',
    'mlp.c_proj.weight',
)  # HF's Conv1D is (in, out)


def load_pretrained(name, dropout=0.0):
    """GPT-2 weights in Hugging Face's format -> (GPT on the CPU in float32, tokenizer spec or None).

    name: 'gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl' (downloaded once and kept by transformers), or a local directory
    with config.json and weights. UserError if it cannot be had, or is not a GPT-2 that this model computes exactly.
    """
    if name not in PRETRAINED and not os.path.isdir(name):
        raise UserError(
            f'--init_from={name}: must be resume, {", ".join(PRETRAINED)}, the folder of a run, or a directory with a Hugging '
            'Face GPT-2 (train.py also knows scratch and auto)'
        )
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(f'--init_from={name} needs the package transformers: pip install transformers') from error
    logging.set_verbosity_error()
    getLogger('huggingface_hub').setLevel('CRITICAL')  # one line in the end, not one a retry
    if os.path.isdir(name):
        logging.disable_progress_bar()  # of a download it stays
    try:
        hf_config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hf_config.model_type != 'gpt2':
            raise UserError(f'--init_from={name}: is a {hf_config.model_type} model, only GPT-2 can be imported')
        hf_model, report = GPT2LMHeadModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # hub, network, JSON, weights: each library in between has errors of its own
        hint = (
            'check the files in it' if os.path.isdir(name) else 'is the network reachable? a local directory works too'
        )
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
            f'--init_from={name}: its config.json departs from GPT-2 (activation, scaling, tying or widths), not supported'
        )
    config = GPTConfig(
        n_layer=hf_config.n_layer,
        n_head=hf_config.n_head,
        n_embd=hf_config.n_embd,
        dropout=dropout,
        bias=True,
        vocab_size=hf_config.vocab_size,
        block_size=hf_config.n_positions,
        mlp=HF_ACTIVATIONS[hf_config.activation_function],
    )
    weights = {
        key: weight.t().contiguous() if key.endswith(TRANSPOSED) else weight
        for key, weight in hf_model.state_dict().items()
        if not key.endswith(('.attn.bias', '.attn.masked_bias'))
    }
    model = skeleton(config)
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model, pretrained_tokenizer(name)


def to_hugging_face(model):
    """A GPT -> transformers' GPT2LMHeadModel with the same weights, in eval mode. UserError if transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise UserError('this needs the package transformers: pip install transformers') from error
    config = model.config
    for name, value in model_args_of(config).items():
        if name not in (*NANOGPT_FIELDS, 'mlp') or name == 'mlp' and value not in HF_ACTIVATIONS.values():
            raise UserError(f'only a GPT-2 can be given to transformers, not a model with {name}={value}')
    hf_model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.block_size,
            n_embd=config.n_embd,
            n_layer=config.n_layer,
            n_head=config.n_head,
            activation_function={ours: theirs for theirs, ours in reversed(HF_ACTIVATIONS.items())}[config.mlp],
            bos_token_id=None,
            eos_token_id=None,
        )
    ).eval()
    weights = model.state_dict()
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name].t() if name.endswith(TRANSPOSED) else weights[name])
            else:
                parameter.zero_()  # a bias that our model is without
    return hf_model


def pretrained_tokenizer(name):
    """The tokenizer spec for a pretrained model: that of its folder, see tokenizer.read_tokenizer; GPT-2's for OpenAI's models on the hub.
    None for a folder without one: a vocabulary of GPT-2's size need not be GPT-2's."""
    return read_tokenizer(name) if os.path.isdir(name) else GPT2_SPEC
