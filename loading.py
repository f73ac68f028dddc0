"""Where a model comes from: made anew, read from a checkpoint, or from GPT-2 weights in Hugging Face's format, and back into it."""

import dataclasses
import math
import os

import torch
from torch.overrides import TorchFunctionMode

from common.checkpoint import BEST, LATEST, load_data, plain
from common.errors import UserError, user_errors, warn
from model import GPT, GPTConfig
from pretrained import NANOGPT_FIELDS, pretrained_tokenizer, read_pretrained
from tokenizer import GPT2_SPEC, check_spec, same_ids, text_vocab_size

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


def load_pretrained(name, dropout=0.0):
    """A model that read_pretrained knows -> (GPT on the CPU in float32, tokenizer spec or None). UserError as there."""
    fields, weights = read_pretrained(name)
    model = skeleton(GPTConfig(**fields, dropout=dropout))
    model.load_state_dict(weights, assign=True)
    model.tie_weights()
    return model, pretrained_tokenizer(name)


def model_args_of(config):
    """A GPTConfig as the dict that a checkpoint stores: nanoGPT's fields, and others only where they are not the default,
    so that nanoGPT opens every model that it can represent and refuses the rest."""
    defaults = GPTConfig()
    args = dataclasses.asdict(config)
    return {name: value for name, value in args.items() if name in NANOGPT_FIELDS or value != getattr(defaults, name)}


def model_entry(model):
    """The part of a checkpoint that describes the model: {'model': weights, 'model_args': shape, …}.

    OpenAI's GPT-2 computes GELU by tanh, nanoGPT runs it with erf and is hardly off. So that nanoGPT opens a fine-tuned
    GPT-2 of ours, this one choice is written beside model_args rather than into it.
    """
    model_args = model_args_of(model.config)
    entry = {'model': model.state_dict(), 'model_args': model_args}
    if model_args.get('mlp') == 'gelu_tanh':
        entry['mlp'] = model_args.pop('mlp')
    return entry


def load_checkpoint(path):
    """A checkpoint of SAMgpt's or nanoGPT's -> dict, its weights under plain names. UserError if it is anything else."""
    checkpoint = load_data(path)
    wanted = {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}
    if isinstance(checkpoint, dict):
        checkpoint.update(
            {key: plain(value) for key, value in checkpoint.items() if key not in ('model', 'optimizer', 'tokenizer')}
        )
    for key, kind in wanted.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise UserError(f'{path} is not a checkpoint of SAMgpt or nanoGPT: it has no {key!r}')
    with user_errors(ValueError, TypeError, where=f'{path} is not a sound checkpoint: '):
        checkpoint['best_val_loss'] = float(checkpoint.get('best_val_loss', 'inf'))
        if math.isnan(checkpoint['best_val_loss']):
            raise ValueError('its best_val_loss is not a number')
        checkpoint['seconds'] = float(checkpoint.get('seconds', 0.0))  # of training so far
        if not 0 <= checkpoint['seconds'] < math.inf:
            raise ValueError('its seconds are no time')
        checkpoint.setdefault('best_iter', checkpoint['iter_num'])
        checkpoint.setdefault('evaluated_at', -1)  # the step at which it was last evaluated; -1: not known
        checkpoint.setdefault('windows_taken', None)  # see dataloader.TrainBatches; None: not known
        if type(checkpoint['best_iter']) is not int or not 0 <= checkpoint['best_iter'] <= checkpoint['iter_num']:
            raise ValueError('its iter_num or best_iter counts no updates')
        if type(checkpoint['evaluated_at']) is not int:
            raise ValueError('its evaluated_at counts no updates')
        if checkpoint['windows_taken'] is not None and not (
            type(checkpoint['windows_taken']) is int and 0 <= checkpoint['windows_taken']
        ):
            raise ValueError('its windows_taken counts no windows')
        if not all(isinstance(name, str) for name in checkpoint['model']):
            raise ValueError('its weights have no names')
        if checkpoint.get('tokenizer') is not None:
            check_spec(checkpoint['tokenizer'])
    weights = {
        name.replace('_orig_mod.', '').removeprefix('module.'): weight for name, weight in checkpoint['model'].items()
    }
    # nanoGPT's attention without flash keeps its causal mask as a buffer; here it needs none
    checkpoint['model'] = {
        name: weight for name, weight in weights.items() if not name.endswith(('.attn.bias', '.attn.masked_bias'))
    }
    if 'mlp' in checkpoint:
        checkpoint['model_args']['mlp'] = checkpoint['mlp']
    return checkpoint


def restore_model(checkpoint, path, dropout=None):
    """The model of a loaded checkpoint, on the CPU in float32. dropout replaces the one it was trained with.

    UserError if model_args describes no model or another one than the weights. Nothing large is allocated before that is
    known, so that a forged shape cannot exhaust the memory.
    """
    args, weights = dict(checkpoint['model_args']), checkpoint['model']
    if dropout is not None:
        args['dropout'] = dropout
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    with user_errors(ValueError, TypeError, RuntimeError, where=f'{path}: the weights do not fit the model_args: '):
        if args.get('n_layer') != len(layers):
            raise ValueError(f'n_layer={args.get("n_layer")!r}, but there are weights of {len(layers)} layers')
        if not all(torch.is_tensor(weight) and weight.is_floating_point() for weight in weights.values()):
            raise ValueError('some of them are not tensors of numbers')
        if any(weight.untyped_storage().nbytes() < weight.nbytes for weight in weights.values()):
            raise ValueError('some of them claim to be larger than they are')
        embedding, head = 'transformer.wte.weight', 'lm_head.weight'
        if args.get('tie_weights', True):  # a file may hold the one matrix once or twice
            if (head in weights) != (embedding in weights):
                weights = {
                    **weights,
                    head: weights.get(head, weights.get(embedding)),
                    embedding: weights.get(embedding, weights.get(head)),
                }
            elif head in weights and not torch.equal(weights[head].nan_to_num(), weights[embedding].nan_to_num()):
                raise ValueError(
                    'the head differs from the embedding, so they are not the one matrix that tie_weights=True makes them'
                )
        model = skeleton(GPTConfig(**args))
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise UserError(f'{path}: some of its weights are not finite numbers; use another checkpoint')
    return model


class NoInit(TorchFunctionMode):
    """Where torch.nn.init would fill a tensor, leaves it: on the meta device that costs an import of the compiler, 1.5 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return function(*args, **kwargs)


def skeleton(config):
    """A GPT whose parameters have shapes but no memory, to be given weights by load_state_dict(..., assign=True)."""
    with torch.device('meta'), NoInit():
        return GPT(config)
