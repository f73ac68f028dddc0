"""Pretrained models by name: on the Hugging Face hub, in a folder, in a .gguf file. formats/ reads them."""

import functools
import os
import re
from logging import getLogger

import torch

from common.errors import UserError, one_line
from formats.huggingface import read_hf_model
from formats.tokenizer_files import read_tokenizer
from tokenizer import GPT2_SPEC

NANOGPT_FIELDS = ('n_layer', 'n_head', 'n_embd', 'block_size', 'bias', 'vocab_size', 'dropout')
HUB_NAMES = ('gpt2', 'gpt2-medium', 'gpt2-large', 'gpt2-xl')
HUB_FILES = ('config.json', 'generation_config.json', 'tokenizer*', 'vocab.json', 'merges.txt', 'added_tokens.json')
HUB_FILES += ('special_tokens_map.json', 'chat_template*')


def pretrained_model(name: str, make, dtype: torch.dtype = torch.float32):
    """A pretrained model -> GPT with parameters in dtype on the CPU.

    name: a name on the hub, of HUB_NAMES or 'owner/name'; a folder with config.json and weights; or a .gguf file.
    make: a function (fields of GPTConfig) -> GPT, whose parameters may be on the meta device: then the memory needed is
    that of the weights and little more.
    UserError if it is not available, is damaged, or is a model that GPT does not compute exactly.
    """
    if is_gguf(name):
        from formats.gguf_model import read_gguf_model

        return read_gguf_model(name, make, dtype)
    return read_hf_model(model_folder(name), make, dtype)


def pretrained_tokenizer(name: str) -> dict | None:
    """The tokenizer spec of a pretrained model by its name, see pretrained_model. GPT-2's for HUB_NAMES; None for a
    model without one: a vocabulary of GPT-2's size need not be GPT-2's."""
    if is_gguf(name):
        from formats.gguf_model import gguf_tokenizer

        return gguf_tokenizer(name)
    return GPT2_SPEC if name in HUB_NAMES and not os.path.isdir(name) else read_tokenizer(model_folder(name))


def is_gguf(name):
    """Is this the name of a .gguf file? UserError if it would be, but there is none."""
    if not name.endswith('.gguf') or os.path.isdir(name):
        return False
    if not os.path.isfile(name):
        raise UserError(f'--init_from={name}: there is no such file')
    return True


def model_folder(name: str) -> str:
    """The folder of a pretrained model: name itself if it is one, else where the hub's client keeps what it downloads.
    UserError if there is no such model."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, 'config.json')):
            raise UserError(f'--init_from={name}: this folder has neither the ckpt.pt of a run nor a config.json')
        return name
    if not is_hub_name(name):
        raise UserError(
            f'--init_from={name}: there is no such file or folder; must be resume, the folder or a checkpoint of a '
            f'run, the folder of a Hugging Face model, a .gguf file, {", ".join(HUB_NAMES)}, or owner/name on the '
            'Hugging Face hub (train.py also knows scratch and auto)'
        )
    return downloaded(name)


def is_hub_name(name: str) -> bool:
    """Can this be the name of a model on the hub, rather than a path with a typo? Asking the hub would take a while."""
    owner = re.fullmatch(r'([\w-][\w.-]*)/[\w-][\w.-]*', name)
    is_path = not owner or os.path.isdir(owner[1]) or name.endswith(('.pt', '.json', '.bin', '.safetensors', '.gguf'))
    return name in HUB_NAMES or not is_path


@functools.cache
def downloaded(name):
    """Download what is needed of a model on the hub, unless it was before -> its folder. UserError if that fails."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise UserError(f'{name}: needs the package huggingface_hub: pip install huggingface_hub') from error
    getLogger('huggingface_hub').setLevel('CRITICAL')  # one line at the end, not one per retry
    weights = ['model.safetensors', 'model-*.safetensors', 'model.safetensors.index.json']
    try:
        folder = snapshot_download(name, allow_patterns=[*HUB_FILES, *weights])
        if not any(file.endswith('.safetensors') for file in os.listdir(folder)):
            folder = snapshot_download(name, allow_patterns=['pytorch_model*.bin', 'pytorch_model.bin.index.json'])
        return folder
    except Exception as error:  # of the hub's client, its network library, or the disk
        raise UserError(
            f'cannot download the pretrained model {name} (is that its name on the hub, and the network reachable? a '
            f'folder works too): {one_line(str(error), 150)}'
        ) from error
