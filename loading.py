"""What a run starts from: a new model, a checkpoint or a pretrained model; and the model in a checkpoint."""

import dataclasses
import math
import os
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode

from common.checkpoint import (
    BEST,
    LATEST,
    has_run,
    latest,
    load_data,
    load_optimizer_buffers,
    plain,
    prepare_out_dir,
    read_whole,
)
from common.device import seed_all
from common.errors import UserError, say, user_errors, warn
from common.sharded import copy_part, is_sharded, part
from dataloader import dataset_name
from lora import MAX_ALPHA, add_lora, freeze_base, is_adapter, lora_of, lora_settings, merge_lora, weights_hash
from model import GPT, GPTConfig
from optim import ALONE, load_optimizer_state
from pretrained import NANOGPT_FIELDS, pretrained_model, pretrained_tokenizer
from tokenizer import check_spec, same_ids, text_vocab_size

# fields that weights fix, and that settings may ask for
SHAPE = [field.name for field in dataclasses.fields(GPTConfig) if field.name not in ('vocab_size', 'dropout')]
MAY_CHANGE = (
    'init_from',
    'out_dir',
    'eval_only',
    'compile',
)  # settings that may change on resume without being reported


# --- for scripts ------------------------------------------------------------------------------------------------------


def resume_or_not(config, ranks) -> str:
    """What --init_from= asks for, 'auto' decided: 'resume' if there is a run in out_dir, else 'scratch'. A run that is
    to be resumed is locked, so that no other can write to it. A collective: the main rank decides for all."""
    init_from, out_dir = config['init_from'], config['out_dir']
    if init_from == 'auto':
        found = ranks.sum([float(ranks.is_main and has_run(out_dir))])[0]
        init_from = 'resume' if found else 'scratch'
    if init_from == 'resume' and ranks.is_main and has_run(out_dir) and not config['eval_only']:
        prepare_out_dir(out_dir)
    return init_from


def initial_model(config, data) -> tuple[GPT, dict | None]:
    """The model that train.py starts from, in float32, and the checkpoint to resume, or None.

    The model is on the CPU; or on the meta device, if fill_weights can give it its weights part by part: if it is new,
    or was saved in parts.
    config: the settings. data: the DataSet. Existing weights bring their own shape, as in nanoGPT. UserError if weights
    are not available, or do not fit the settings that were given, or the data.
    """
    init_from, dropout, checkpoint, new_lora = config['init_from'], config['dropout'], None, None
    if init_from == 'scratch':
        if config['lora_rank']:
            reason = 'an adapter belongs to a trained model; name one by --init_from='
            raise UserError(f'--lora_rank={config["lora_rank"]}: {reason}')
        vocab_size = model_vocab_size(data.tokenizer, data.vocab_size, config['vocab_multiple'])
        shape = {key: config[key] for key in SHAPE if key in config}
        with user_errors(ValueError):
            return empty_model(GPTConfig(vocab_size=vocab_size, dropout=dropout, **shape)), None
    if init_from == 'resume':
        path = latest(config['out_dir']) or os.path.join(config['out_dir'], LATEST)
        # of a model that will be sharded, each rank keeps a part of what it reads from the file
        checkpoint = load_checkpoint(path, mmap=config['parallel'] != 'ddp')
        model, tokenizer = restore_model(checkpoint, path, dropout, merge=False), checkpoint.get('tokenizer')
        source, fixed = f'the run in {path}', {**shape_of(model), **lora_settings(model)}
        hint = 'leave it out to resume, or start another run with another --out_dir'
    else:
        model, tokenizer, _ = open_model(init_from, config['out_dir'], LATEST, dropout, merge=False)
        if config['lora_rank']:
            if is_below(init_from, config['out_dir']):
                raise UserError(f'--out_dir={config["out_dir"]}: holds the model that the adapter needs; use another')
            new_lora = {key: config[f'lora_{key}'] for key in ('rank', 'alpha', 'targets')}
            new_lora |= {'base': init_from, 'hash': weights_hash(model)}
        merge_lora(model)
        source, fixed, hint = init_from, shape_of(model), 'leave it out'
        del fixed['block_size']
        if data.tokenizer and not tokenizer:
            warn(
                f'{init_from} has no tokenizer beside it: nothing shows that its ids mean what those of {data.path} do'
            )
    with user_errors(ValueError, where=f'the tokenizer of {source} or {data.path}: '):
        same = not tokenizer or not data.tokenizer or same_ids(data.tokenizer, tokenizer)
    if not same:
        raise UserError(
            f'{source} was trained with another tokenizer than that of {data.path}: choose a --dataset in its '
            "encoding, or prepare one with that model's --tokenizer="
        )
    for key, value in fixed.items():
        if key in config.given and config[key] != value:
            message = f'--{key}={config[key]}: {source} has {key}={value}'
            if checkpoint or key not in NANOGPT_FIELDS:
                raise UserError(f'{message}; {hint}')
            warn(f'{message}, which it keeps')  # as in nanoGPT, whose fine-tuning recipes may name a shape
    needed, has = text_vocab_size(data.tokenizer) if data.tokenizer else data.vocab_size, model.config.vocab_size
    if needed > has:
        raise UserError(f'{data.path} has a vocabulary of {needed}, the model of {has}: choose another --dataset')
    asked, longest = config['block_size'], model.config.block_size
    if not checkpoint and asked < longest:
        model.crop_block_size(asked)
    elif not checkpoint and asked > longest and 'block_size' in config.given:
        raise UserError(f'--block_size={asked}: {source} has {longest} positions, use at most that')
    if new_lora:
        seed_all(config['seed'])
        add_lora(model, new_lora)
    if lora_of(model):
        freeze_base(model)
    return model, checkpoint


def shape_of(model) -> dict:
    """The fields of SHAPE of a model."""
    return {key: getattr(model.config, key) for key in SHAPE}


def is_below(path: str, folder: str) -> bool:
    """Is this the path of a folder, or of something in it? Not so of a name on the hub."""
    path, folder = os.path.realpath(path), os.path.realpath(folder)
    return os.path.exists(path) and (path + os.sep).startswith(folder + os.sep)


def fill_weights(model: GPT, checkpoint: dict | None, seed: int):
    """Give a model that initial_model() left on the meta device, and that has memory now, its weights: those saved in
    parts, or initial ones, the same for a seed however the model is sharded. Each rank reads or keeps its own parts."""
    if checkpoint is None:
        seed_all(seed)
        model.init_weights(copy_part)
        return
    saved = checkpoint['parts']
    saved.read({f'model.{name}': weight for name, weight in model.state_dict().items()})
    if not all_finite(model):
        raise UserError(f'{saved.folder}: some of its weights are NaN or infinite; use another save')


def initial_progress(checkpoint: dict | None, config, text: dict) -> dict:
    """How far the run has come: {'iter_num', 'best_val_loss', 'best_iter', 'evaluated_at', 'seconds', 'windows_taken'}.

    checkpoint: the one to resume, or None. text: checksums of the splits. Prints what has changed since the save.
    UserError if the run cannot continue with these settings.
    """
    progress = {
        'iter_num': 0,  # steps made
        'best_val_loss': math.inf,
        'best_iter': 0,
        'evaluated_at': -1,  # the iteration of the last evaluation
        'seconds': 0.0,  # of training
        'windows_taken': 0,  # by the data order 'shuffle'
    }
    if not checkpoint:
        return progress
    progress.update({key: checkpoint[key] for key in progress})
    before, out_dir = checkpoint['config'], config['out_dir']
    changed = [
        f'{key} {old!r} -> {config[key]!r}'
        for key, old in before.items()
        if key in config and key not in MAY_CHANGE and config[key] != old
    ]
    settings = f', with changed settings: {", ".join(changed)}' if changed else ''
    say(f'resuming the run in {out_dir} after {progress["iter_num"]} iterations{settings}')
    optimizer = before.get('optimizer', 'adamw')
    if optimizer != config['optimizer'] and not config['eval_only']:
        raise UserError(
            f'--optimizer={config["optimizer"]}: the run in {out_dir} has the state of {optimizer}; '
            f'--init_from={out_dir} with another --out_dir starts a new run from its weights'
        )
    same_text = checkpoint.get('text', text) == text
    if not same_text or dataset_name(str(before.get('dataset', config['dataset']))) != config['dataset']:
        say(f'this is not the text that the run in {out_dir} was trained on: the best validation loss is reset')
        progress.update(evaluated_at=-1, windows_taken=0)
        best_is_known = False
    else:
        best_is_known = latest(out_dir, BEST) is not None  # nanoGPT leaves none
        batch = ('batch_size', 'gradient_accumulation_steps')
        other_batch = any(before.get(key, config[key]) != config[key] for key in batch)
        if progress['windows_taken'] is None and config['data_order'] == 'shuffle' and other_batch:
            warn(f'the run in {out_dir} had batches of another size, and no position in the data: some may be repeated')
    if not best_is_known:
        progress.update(best_val_loss=math.inf, best_iter=progress['iter_num'])
    return progress


def restore_optimizer(optimizer, scaler, checkpoint: dict, out_dir: str):
    """Give an optimizer and a GradScaler the state that was saved with a checkpoint, and free the checkpoint's tensors.
    UserError if it is missing or does not fit."""
    sharded = any(is_sharded(p) for group in optimizer.param_groups for p in group['params'])
    saved = load_optimizer_buffers(checkpoint, out_dir, optimizer, mmap=sharded)
    kinds = (ValueError, TypeError, KeyError, AttributeError, RuntimeError)
    with user_errors(*kinds, where=f'the optimizer state in {out_dir}: '):
        load_optimizer_state(optimizer, saved['optimizer'])
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
    checkpoint.pop('optimizer', None)
    checkpoint.pop('model')


def model_vocab_size(tokenizer: dict | None, vocab_size: int, multiple: int) -> int:
    """The vocabulary of a new model, a multiple of `multiple`, for data of a tokenizer (its spec or None) with
    vocab_size ids. For GPT-2's tokenizer it is GPTConfig's default, as in nanoGPT."""
    least = GPTConfig.vocab_size if tokenizer and tokenizer['kind'] == 'gpt2' else vocab_size
    return -(-least // multiple) * multiple


def open_model(
    init_from: str, out_dir: str, name: str, dropout: float = 0.0, merge: bool = True
) -> tuple[GPT, dict | None, dict]:
    """The model that --init_from= names -> (GPT, tokenizer spec or None, the settings it was trained with or {}).

    init_from: 'resume' for the checkpoint `name` in out_dir; a checkpoint's file; a folder with a run's ckpt.pt; or as
    in load_pretrained. merge=False: an adapter stays one. UserError if it is not available.
    """
    path = checkpoint_path(init_from, out_dir, name)
    if path is None:
        return *load_pretrained(init_from, dropout=dropout), {}
    checkpoint = read_whole(load_checkpoint(path))
    return restore_model(checkpoint, path, dropout, merge), checkpoint.get('tokenizer'), checkpoint['config']


def checkpoint_path(init_from: str, out_dir: str, name: str) -> str | None:
    """The file of the checkpoint that --init_from= names, see open_model; None if it names a pretrained model."""
    if init_from == 'resume':
        return latest(out_dir, name) or os.path.join(out_dir, name)
    path = init_from
    if has_run(init_from):
        path = latest(init_from)
    elif os.path.basename(init_from).startswith('ckpt'):  # ckpt_best.pt is ckpt_best.json in a sharded run
        path = latest(os.path.dirname(init_from), os.path.basename(init_from)) or path
    return path if os.path.isfile(path) and not path.endswith('.gguf') else None


def load_pretrained(name: str, **override) -> tuple[GPT, dict | None]:
    """A model by the name that pretrained_model takes -> (GPT on the CPU in float32, tokenizer spec or None). override:
    other values of GPTConfig, such as dropout."""
    model = pretrained_model(name, lambda fields: empty_model(GPTConfig(**{**fields, **override})))
    return model, pretrained_tokenizer(name)


# --- the model in a checkpoint ----------------------------------------------------------------------------------------


def model_entry(model: GPT, ranks=ALONE) -> dict:
    """The part of a checkpoint that describes the model: {'model': weights, 'model_args': shape, …}. A collective.

    Of a model with an adapter the weights are the adapter's alone, and 'lora' says what they belong to, see lora_of.

    model_args has nanoGPT's fields, and others only where they differ from the default, so that nanoGPT opens every
    model that it can represent and refuses the rest. OpenAI's GPT-2 computes GELU by tanh, nanoGPT runs it with erf and
    is hardly off: so this one choice is stored beside model_args, and nanoGPT opens a GPT-2 fine-tuned here.
    UserError if weights are NaN or infinite.
    """
    if ranks.sum([float(not all_finite(model))])[0]:
        raise UserError(
            'the weights are NaN or infinite, nothing was saved: lower --learning_rate, and continue from the last '
            'save with --init_from=resume'
        )
    defaults = GPTConfig()
    args = {
        name: value
        for name, value in dataclasses.asdict(model.config).items()
        if name in NANOGPT_FIELDS or value != getattr(defaults, name)
    }
    entry = {'model': model.state_dict(), 'model_args': args}
    if lora_of(model):
        entry = {
            'model': {name: weight for name, weight in entry['model'].items() if is_adapter(name)},
            'model_args': args,
            'lora': lora_of(model),
        }
    if args.get('mlp') == 'gelu_tanh':
        entry['mlp'] = args.pop('mlp')
    return entry


def load_checkpoint(path: str, mmap: bool = False) -> dict:
    """A checkpoint of SAMgpt or nanoGPT, complete and with weights under plain names. UserError if it is not one."""
    checkpoint = load_data(path, mmap)
    if isinstance(checkpoint, dict):
        tensors = ('model', 'optimizer', 'parts', 'tokenizer')
        with user_errors(RecursionError, RuntimeError, where=f'{path} is not a sound checkpoint: '):
            checkpoint.update({key: plain(value) for key, value in checkpoint.items() if key not in tensors})
    for key, kind in {'model': dict, 'model_args': dict, 'iter_num': int, 'config': dict}.items():
        if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get(key), kind):
            raise UserError(f'{path} is not a checkpoint of SAMgpt or nanoGPT: it has no {key!r}')
    defaults = {  # nanoGPT's has no more than the first
        'best_val_loss': math.inf,
        'best_iter': checkpoint['iter_num'],
        'evaluated_at': -1,  # the iteration of the last evaluation; -1: not known
        'seconds': 0.0,  # of training so far
        'windows_taken': None,  # see dataloader.TrainBatches; None: not known
        'trackers': {},
        'lora': None,
    }
    valid = {
        'best_val_loss': lambda value: not math.isnan(value),
        'best_iter': lambda value: type(value) is int and 0 <= value <= checkpoint['iter_num'],
        'evaluated_at': lambda value: type(value) is int,
        'seconds': lambda value: 0 <= value < math.inf,
        'windows_taken': lambda value: value is None or type(value) is int and value >= 0,
        'trackers': lambda value: isinstance(value, dict),
        'lora': lambda value: value is None or is_lora(value),
    }
    with user_errors(ValueError, TypeError, where=f'{path} is not a sound checkpoint: '):
        for key, default in defaults.items():
            if not valid[key](checkpoint.setdefault(key, default)):
                raise ValueError(f'its {key} is {checkpoint[key]!r}')
        if not all(isinstance(name, str) for name in checkpoint['model']):
            raise ValueError('its weights have no names')
        if checkpoint.get('tokenizer') is not None:
            check_spec(checkpoint['tokenizer'])
    weights = {
        name.replace('_orig_mod.', '').removeprefix('module.'): weight for name, weight in checkpoint['model'].items()
    }
    masks = ('.attn.bias', '.attn.masked_bias')  # buffers of nanoGPT's attention without flash
    checkpoint['model'] = {name: weight for name, weight in weights.items() if not name.endswith(masks)}
    if 'mlp' in checkpoint:
        checkpoint['model_args']['mlp'] = checkpoint['mlp']
    return checkpoint


def is_lora(value) -> bool:
    """Is this what lora_of describes?"""
    kinds = {'rank': int, 'alpha': int, 'targets': str, 'base': str, 'hash': str}
    sound = isinstance(value, dict) and all(type(value.get(key)) is kind for key, kind in kinds.items())
    return sound and value['rank'] >= 1 and 1 <= value['alpha'] <= MAX_ALPHA


def restore_model(checkpoint: dict, path: str, dropout: float | None = None, merge: bool = True) -> GPT:
    """The model of a loaded checkpoint, in float32, on the CPU, or on the meta device if its weights are there. dropout
    replaces the one it was trained with. merge=False: an adapter stays one.

    UserError if model_args describe no model, or another one than the weights. Nothing large is allocated before that
    is known, so a forged shape cannot exhaust the memory.
    """
    if checkpoint.get('lora'):
        model = restore_adapter(checkpoint, path, dropout or 0.0)
        return merge_lora(model) if merge else model
    args, weights = dict(checkpoint['model_args']), checkpoint['model']
    if dropout is not None:
        args['dropout'] = dropout
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    with user_errors(ValueError, TypeError, RuntimeError, where=f'{path}: the weights do not fit the model_args: '):
        if args.get('n_layer') != len(layers):
            raise ValueError(f'n_layer={args.get("n_layer")!r}, but there are weights of {len(layers)} layers')
        check_tensors(weights)
        if args.get('tie_weights', True):
            weights = with_both_ties(weights)
        model = empty_model(GPTConfig(**args))
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, assign=True)
    model.tie_weights()
    if not all_finite(model):
        raise UserError(f'{path}: some of its weights are NaN or infinite; use another checkpoint')
    return model


def restore_adapter(checkpoint: dict, path: str, dropout: float) -> GPT:
    """restore_model of a checkpoint that holds an adapter: opens its base, and puts the adapter beside its weights.

    UserError if the base is missing, or is not the model that the adapter was trained on.
    """
    lora, args = checkpoint['lora'], checkpoint['model_args']
    base = checkpoint_path(lora['base'], '', LATEST)
    if base and os.path.realpath(base) == os.path.realpath(path):
        raise UserError(f'{path} holds an adapter, and names itself as its base: move it back where it was trained')
    with user_errors(UserError, where=f'{path} holds an adapter, its base cannot be opened: '):
        model, *_ = open_model(lora['base'], '', LATEST, dropout, merge=False)
    same = weights_hash(model) == lora['hash']  # before a base's own adapter is merged, which rounds as machines do
    merge_lora(model)
    with user_errors(ValueError, TypeError, RuntimeError, where=f'{path}: the adapter does not fit its base: '):
        config = GPTConfig(**{**args, 'dropout': dropout})
        if config.block_size != model.config.block_size:
            model.crop_block_size(config.block_size)
        if not same or config != model.config:
            raise UserError(
                f'{path} holds an adapter of {lora["base"]}, which has changed since: bring back the model that it was '
                'trained on'
            )
        check_tensors(weights := read_whole(checkpoint)['model'])
        add_lora(model, lora, device='meta')
        if weights.keys() != set(filter(is_adapter, model.state_dict())):
            raise ValueError('other layers have one')
        model.load_state_dict({name: weight.float() for name, weight in weights.items()}, strict=False, assign=True)
    if not all_finite(model):
        raise UserError(f'{path}: some of its weights are NaN or infinite; use another checkpoint')
    return model


def check_tensors(weights: dict):
    """ValueError if these are not tensors of numbers that are as large as they say."""
    if not all(torch.is_tensor(weight) and weight.is_floating_point() for weight in weights.values()):
        raise ValueError('some of them are not tensors of numbers')
    if any(weight.untyped_storage().nbytes() < weight.nbytes for weight in weights.values()):
        raise ValueError('some of them claim to be larger than they are')


def all_finite(model) -> bool:
    """Are all weights, as far as this rank holds them, neither NaN nor infinite? True on the meta device."""
    return all(parameter.is_meta or part(parameter).isfinite().all() for parameter in model.parameters())


def with_both_ties(weights):
    """Weights with the tied matrix under both of its names, of which a file may hold one. ValueError if it holds two
    that differ."""
    head, embedding = weights.get('lm_head.weight'), weights.get('transformer.wte.weight')
    both = head is not None and embedding is not None and head is not embedding
    if both and (head.is_meta or not torch.equal(head.nan_to_num(), embedding.nan_to_num())):
        raise ValueError('the head differs from the embedding, though tie_weights=True makes them one matrix')
    tied = head if embedding is None else embedding
    return weights if tied is None else {**weights, 'lm_head.weight': tied, 'transformer.wte.weight': tied}


class NoInit(TorchFunctionMode):
    """Skips torch.nn.init, whose only effect on the meta device is to import torch's compiler: over a second of every
    start of sample.py."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, '__module__', '') == 'torch.nn.init':
            return kwargs['tensor'] if 'tensor' in kwargs else args[0]
        return function(*args, **kwargs)


@contextmanager
def parameters_on_meta():
    """Within the block, modules are made with parameters that have shapes but no memory. Buffers and other tensors are
    real, as their values are given where they are made. Each parameter has memory for a moment, which nothing fills."""
    register = torch.nn.Module.register_parameter

    def register_on_meta(module, name, parameter):
        if parameter is not None and not parameter.is_meta:  # tied weights stay one parameter
            parameter = torch.nn.Parameter(parameter.detach().to('meta'), parameter.requires_grad)
        register(module, name, parameter)

    torch.nn.Module.register_parameter = register_on_meta
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register


def empty_model(config: GPTConfig) -> GPT:
    """A GPT whose parameters have no memory: for load_state_dict(..., assign=True), or for fill_weights."""
    with parameters_on_meta(), NoInit():
        return GPT(config)
