"""Low-rank adapters (Hu et al. 2021, "LoRA: Low-rank adaptation of large language models"): fine-tuning that trains,
beside each chosen linear layer, two thin matrices in place of its weight.

The layer's weight stays, and its output gets a second term: x W' + alpha / rank x A' B' (section 4.1, eq. 3). A is
random and B zero at first, so training starts from the base model. For generation both terms are one matrix again.
A checkpoint holds A and B, and which model they belong to; loading.py finds that again.
"""

import hashlib
import math
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.nn as nn
from torch.nn import functional as F

from common.errors import UserError
from configurator import require

MAX_ALPHA = 10**6


class LoRALinear(nn.Linear):
    """A linear layer with an adapter: (..., in) -> (..., out). Its own weight and bias keep their names."""

    def forward(self, x):
        return super().forward(x) + F.linear(self.scale * F.linear(x, self.lora_a), self.lora_b)


def check_lora(config: dict):
    """UserError for settings of this file that cannot work, alone or together with others."""
    require(config, 'lora_rank', 'at least 0', lambda v: v >= 0)
    require(config, 'lora_alpha', f'at least 1 and at most {MAX_ALPHA:,}', lambda v: 1 <= v <= MAX_ALPHA)
    if config['lora_rank'] and config['optimizer'] == 'muon':
        reason = 'Muon is for whole weight matrices, an adapter has two factors of their change; use adamw'
        raise UserError(f'--optimizer=muon: not with --lora_rank={config["lora_rank"]}: {reason}')


def lora_of(model) -> dict | None:
    """What is known of a model's adapter, {'rank', 'alpha', 'targets', 'base', 'hash'}; None if it has none."""
    return getattr(model, 'lora', None)


def lora_settings(model) -> dict:
    """The settings of train.py that a model's adapter fixes."""
    lora = lora_of(model)
    return {f'lora_{key}': lora[key] for key in ('rank', 'alpha', 'targets')} if lora else {'lora_rank': 0}


def describe_trained(model) -> str:
    """What the line at the start says of a model with an adapter: ' (4,884,480 of them trained)', or nothing."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f' ({trained:,} of them trained)' if lora_of(model) else ''


def is_adapter(name: str) -> bool:
    """Is this the name of a parameter of an adapter?"""
    return name.endswith(('.lora_a', '.lora_b'))


def target_layers(model, targets: str) -> list[nn.Linear]:
    """The linear layers that --lora_targets= names, in the model's order. UserError if a name is not one of a layer.

    targets: parts of module paths, comma-separated: 'attn' is all of every attention, 'attn.c_proj' one layer of each.
    """
    # a subclass of nn.Linear may compute something else
    layers = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    uses = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    chosen = set()
    for target in targets.split(','):
        found = [path for path in layers if f'.{target.strip()}.' in f'.{path}.']
        if not found:
            known = dict.fromkeys(re.sub(r'.*\.\d+\.', '', path) for path in layers)
            raise UserError(
                f'--lora_targets={targets}: no linear layer is called {target!r}; there are {", ".join(known)}'
            )
        tied = [path for path in found if uses[layers[path].weight] > 1]
        if tied:  # merged, the adapter would change both
            raise UserError(f'--lora_targets={targets}: {tied[0]} shares its weight with another layer; leave it out')
        chosen.update(found)
    return [layer for path, layer in layers.items() if path in chosen]


def add_lora(model, lora: dict, device='cpu'):
    """Give a model an adapter, in place. lora: see lora_of.

    On the CPU it gets its initial values, the same for a state of torch's random generator. On the meta device it gets
    shapes but no memory, for load_state_dict(..., assign=True). UserError if the adapter does not fit the model.
    """
    rank = lora['rank']
    layers = target_layers(model, lora['targets'])
    most = min(min(layer.weight.shape) for layer in layers)
    if rank > most:
        raise UserError(f'--lora_rank={rank}: must be at most {most}, the smaller side of a weight that it changes')
    for layer in layers:
        layer.__class__ = LoRALinear  # the same layer, whoever holds it; torch's fully_shard does so too
        layer.scale = lora['alpha'] / rank
        layer.lora_a = nn.Parameter(torch.empty(rank, layer.in_features, device=device))
        layer.lora_b = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
        if not layer.lora_a.is_meta:
            nn.init.kaiming_uniform_(layer.lora_a, a=math.sqrt(5))  # as nn.Linear starts its weight
    model.lora = dict(lora)


def freeze_base(model):
    """Let the adapter's parameters alone be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))


@torch.no_grad()
def merge_lora(model):
    """Make a model with an adapter a plain one that computes the same, in place -> the model."""
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.weight.addmm_(layer.lora_b, layer.lora_a, alpha=layer.scale)
            layer.__class__ = nn.Linear
            del layer.lora_a, layer.lora_b, layer.scale
    model.lora = None
    return model


def weights_hash(model) -> str:
    """SHA-256 of the names, shapes and values of a model's parameters, in hexadecimal: by it a base is known again.

    The weights are on the CPU. It costs one pass over them, by all cores.
    """

    def digest(item):
        name, weight = item
        found = hashlib.sha256(f'{name} {list(weight.shape)} {weight.dtype}'.encode())
        found.update(weight.detach().contiguous().view(-1).view(torch.uint8).numpy())
        return found.digest()

    with ThreadPoolExecutor() as pool:
        return hashlib.sha256(b''.join(pool.map(digest, model.named_parameters()))).hexdigest()
