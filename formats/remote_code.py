"""Our GPT for transformers, where none of its own models computes the same: weights with the code that uses them.

The code is this repository's: modeling_samgpt.py, model.py and what they import, as they are now, edits included.
"""

import ast
import dataclasses
import json
import os

import torch

from common.errors import UserError
from common.files import written_whole
from common.weight_files import write_weight_files

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MODELING = 'formats.modeling_samgpt'
CLASSES = {'AutoConfig': 'modeling_samgpt.SAMgptConfig', 'AutoModelForCausalLM': 'modeling_samgpt.SAMgptForCausalLM'}


def write_remote_model(model, folder: str, dtype: torch.dtype, token_ids: dict):
    """Write a GPT with its code into a folder that `AutoModelForCausalLM.from_pretrained(folder,
    trust_remote_code=True)` opens. token_ids: of config.json, such as {'eos_token_id': 0}."""
    fields = {**dataclasses.asdict(model.config), 'dropout': 0.0}
    config = {
        'architectures': ['SAMgptForCausalLM'],
        'auto_map': CLASSES,
        'model_type': 'samgpt',
        'gpt': fields,
        'dtype': str(dtype).removeprefix('torch.'),
        **token_ids,
    }
    weights = {f'gpt.{name}': weight for name, weight in model.state_dict().items()}
    if model.config.tie_weights:
        del weights['gpt.lm_head.weight']
    write_weight_files(folder, weights, dtype)
    for name, source in sources(MODELING).items():
        with open(os.path.join(folder, f'{name}.py'), 'w', encoding='utf-8') as file:
            file.write(source)
    with written_whole(os.path.join(folder, 'config.json'), 'w') as file:
        json.dump(config, file, indent=2)


def sources(module: str) -> dict[str, str]:
    """A module and those of this repository that it imports, as files of one folder that import each other relatively
    -> {name: source}. Methods that import when they are called belong to the repository and stay behind."""
    found, waiting = {}, [module]
    while waiting:
        module = waiting.pop()
        with open(os.path.join(ROOT, *module.split('.')) + '.py', encoding='utf-8') as file:
            source = file.read()
        lines = source.splitlines(keepends=True)
        for scope in [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]:
            for method in scope.body:
                if any(is_ours(node) for node in ast.walk(method)):
                    first = min([method.lineno, *(d.lineno for d in method.decorator_list)])
                    lines[first - 1 : method.end_lineno] = [''] * (method.end_lineno - first + 1)
        for node in ast.walk(ast.parse(source)):
            if is_ours(node) and lines[node.lineno - 1]:
                name = node.module.rpartition('.')[2]
                lines[node.lineno - 1] = lines[node.lineno - 1].replace(f'from {node.module} ', f'from .{name} ')
                if name not in found:
                    waiting.append(node.module)
        name = module.rpartition('.')[2]
        if found.get(name, module) != module:
            raise UserError(f'--remote_code=True: two files are called {name}.py, which one folder cannot hold')
        found[name] = ''.join(lines)
    return found


def is_ours(node) -> bool:
    """Is this the import of a module of this repository?"""
    if isinstance(node, ast.Import):
        ours = [alias.name for alias in node.names if exists(alias.name)]
        if ours:
            raise UserError(f'--remote_code=True: write "from {ours[0]} import ..." in place of "import {ours[0]}"')
    return isinstance(node, ast.ImportFrom) and exists(node.module or '')


def exists(module: str) -> bool:
    return bool(module) and os.path.isfile(os.path.join(ROOT, *module.split('.')) + '.py')
