"""Give a trained model to other programs, with proof that they compute the same.

python export.py --out_dir=out-novel                                    a folder for transformers: out-novel-hf
python export.py --out_dir=out-novel --format=gguf --dtype=q8_0         a file for llama.cpp: out-novel.gguf
python export.py --out_dir=out-novel --format=nanogpt --to=nano         nano/ckpt.pt, which nanoGPT samples and resumes
python export.py --init_from=SmolLM2.gguf --to=smollm2                  from one foreign format into another

What was written is opened by the other program and compared with the model here: logits, loss, generated tokens, the
tokenizer's ids. Only if they agree does it get its name, with the comparison beside it, in certificate.json.
"""

import copy
import json
import math
import os
import pickle
import shutil

import torch
import torch.nn as nn

from chat import ChatTemplate
from common.checkpoint import load_optimizer_buffers, read_whole
from common.errors import UserError, user_errors, warn
from common.files import written_whole
from common.weight_files import read_json
from configurator import configure, require
from dataloader import DataSet
from formats.certificate import GgufReader, LlamaCpp, NanoGPT, Transformers, certificate_lines, check_written, compare
from formats.huggingface import family_of, write_hf_model
from formats.remote_code import write_remote_model
from formats.tokenizer_files import write_tokenizer
from loading import checkpoint_path, load_checkpoint, load_pretrained, model_entry, restore_model
from model import GPT, GPTConfig
from optim import decay_groups
from pretrained import NANOGPT_FIELDS
from tokenizer import load_tokenizer, same_ids, text_vocab_size

CERTIFICATE = 'certificate.json'
DTYPES = {  # of each format, the default first
    'hf': ('float32', 'bfloat16', 'float16'),
    'gguf': ('float16', 'float32', 'q8_0'),
    'nanogpt': ('float32',),
}

init_from = 'resume'  # 'resume': the checkpoint in out_dir; or a run, or a model: folder, .gguf file, name on the hub
out_dir = 'out'  # folder of the checkpoint
ckpt = 'ckpt.pt'  # file in out_dir: 'ckpt.pt' is the latest, 'ckpt_best.pt' has the lowest validation loss
format = 'hf'  # 'hf': a folder for transformers; 'gguf': a file for llama.cpp; 'nanogpt': a folder with a ckpt.pt
to = ''  # the folder or file to write; '': beside out_dir, such as out-hf
dtype = ''  # of the weights: hf 'float32', 'bfloat16', 'float16'; gguf 'float16', 'float32', 'q8_0'; '': the first
remote_code = False  # hf: write model.py beside the weights, for a shape that transformers itself does not know
dataset = ''  # folder below data/, on whose validation text to compare; '': the one that the model was trained on
check_tokens = 2048  # tokens to compare on, at most
config = configure(globals(), paths=('out_dir', 'init_from', 'to'))

require(config, 'format', 'hf, gguf or nanogpt', lambda v: v in DTYPES)
require(config, 'check_tokens', 'at least 2', lambda v: v >= 2)
dtype = dtype or DTYPES[format][0]
if dtype not in DTYPES[format]:
    raise UserError(f'--dtype={dtype}: --format={format} takes {", ".join(DTYPES[format])}')
if remote_code and format != 'hf':
    raise UserError('--remote_code=True: needs --format=hf')

# --- the model and its text -------------------------------------------------------------------------------------------
path = checkpoint_path(init_from, out_dir, ckpt)
if path:
    run = read_whole(load_checkpoint(path))
    model, spec, trained_with = restore_model(run, path, dropout=0.0), run.get('tokenizer'), run['config']
else:
    model, spec = load_pretrained(init_from, dropout=0.0)
    run, trained_with = {}, {}
model.eval()
dataset = dataset or str(trained_with.get('dataset') or '')
data = DataSet(dataset) if dataset and os.path.isdir(os.path.join('data', dataset)) else None
if 'dataset' in config.given and not data:
    raise UserError(f'--dataset={dataset}: there is no folder data/{dataset}')
if dataset and not data:
    warn(f'data/{dataset}, which the model was trained on, is not here: the comparison uses another text')
spec = spec or (data.tokenizer if data else None)
with user_errors(ValueError, where='the tokenizer of the model, or of the data set: '):
    if data and data.tokenizer and not same_ids(data.tokenizer, spec):
        raise UserError(f'--dataset={dataset}: was prepared with another tokenizer than that of the model')
    if spec and text_vocab_size(spec) > model.config.vocab_size:
        sizes = f'{text_vocab_size(spec)} ids, the model {model.config.vocab_size}'
        raise UserError(f'the tokenizer has {sizes}: they do not belong together')
    tokenizer = load_tokenizer(spec) if spec else None
if not tokenizer:
    warn('the model comes with no tokenizer: none is written, and people cannot give it text')
name = os.path.basename(os.path.abspath(out_dir if init_from == 'resume' else init_from)).removesuffix('.gguf')
beside = os.path.abspath(out_dir) if init_from == 'resume' else name
to = os.path.abspath(to or beside + {'hf': '-hf', 'gguf': '.gguf', 'nanogpt': '-nanogpt'}[format])
if format == 'gguf' and not to.endswith('.gguf'):
    to += '.gguf'
certificate_file = f'{to}.{CERTIFICATE}' if format == 'gguf' else os.path.join(to, CERTIFICATE)
part = f'{to}.part'  # a folder, where all is written first
if os.path.exists(part):
    raise UserError(f'{part} is there already: of an export that was interrupted, or is under way; remove it')
earlier = []  # files of an earlier export, which this one replaces
if os.path.exists(to):
    with user_errors(UserError, where=f'--to={to}: exists, and is no earlier export; choose another name: '):
        earlier = list(map(str, read_json(certificate_file).get('files', [])))
    own = {*os.listdir(to)} - {*earlier, CERTIFICATE} if os.path.isdir(to) else set()
    source = os.path.realpath(path or init_from)
    if own or source == os.path.realpath(to) or source.startswith(os.path.realpath(to) + os.sep):
        other = min(own, default=os.path.basename(source))
        raise UserError(f'--to={to}: holds {other}, which would be lost; choose another name')


def text_to_compare():
    """Ids (n, T) of the data set's validation text, else of the README, else at random; and what they are."""
    longest = min(model.config.block_size, check_tokens)
    if data:
        tokens, where = data.tokens('val', model.config.vocab_size), f'{data.path}, val'
        ids = torch.from_numpy(tokens[0 : min(len(tokens), check_tokens)].astype('int64'))
    elif tokenizer:
        where = "SAMgpt's README"
        readme = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'README.md')
        with open(readme, encoding='utf-8') as file, user_errors(ValueError, where='--dataset= is needed: '):
            ids = torch.from_numpy(tokenizer.encode(file.read()[: 8 * check_tokens])[:check_tokens]).long()
    else:
        where = 'random ids'
        ids = torch.randint(model.config.vocab_size, (check_tokens,), generator=torch.Generator().manual_seed(0))
    T = min(longest, len(ids))
    if T < 2:
        raise UserError(f'{where} has {len(ids)} tokens, too few to compare on')
    return ids[: len(ids) // T * T].view(-1, T), f'{where}, in windows of {T}'


def cut_vocabulary(model, vocab_size):
    """Drop the last rows of the embedding and the head, in place: padding, of which no text consists."""
    model.config.vocab_size = vocab_size
    weight = model.lm_head.weight[:vocab_size].detach().clone()
    embedding = model.transformer.wte.weight[:vocab_size].detach().clone()
    model.transformer.wte = nn.Embedding.from_pretrained(embedding, freeze=False)
    model.lm_head = nn.Linear(model.config.n_embd, vocab_size, bias=False)
    model.lm_head.weight = nn.Parameter(weight)
    model.tie_weights()


def rounded(model, dtype):
    """A copy of the model with its weights rounded to a type, in float32 again."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return other


if tokenizer and format != 'nanogpt' and text_vocab_size(spec) < model.config.vocab_size:
    cut_vocabulary(model, max(text_vocab_size(spec), min(tokenizer.vocab_size, model.config.vocab_size)))
ids, where = text_to_compare()
n_parameters = sum(p.numel() for p in model.parameters())


# --- one function per format: writes it -> (GPT with the weights as written, the program that opens it) ---------------
def write_hf(folder):
    """config.json, model.safetensors, generation_config.json and the tokenizer's files."""
    token_ids = write_tokenizer(spec, folder, model.config.block_size) if spec else {}
    weights_dtype = getattr(torch, dtype)
    if remote_code:
        write_remote_model(model, folder, weights_dtype, token_ids)
    else:
        try:
            family_of(model.config)
        except UserError as error:
            raise UserError(f'{error}; --remote_code=True writes the model with its code') from None
        write_hf_model(model, folder, weights_dtype, **token_ids)
    generation = {key: id for key, id in token_ids.items() if id is not None}
    if spec and spec.get('chat_template'):
        try:
            ends = sorted(ChatTemplate(spec).end_of_turn(tokenizer))
            generation.update({'eos_token_id': ends} if ends else {})
        except UserError as error:
            warn(f'generation_config.json does not say which token ends an answer: {error}')
    write_json(os.path.join(folder, 'generation_config.json'), generation)
    written = model if dtype == 'float32' else rounded(model, weights_dtype)
    return written, Transformers(folder, bool(spec), remote_code)


def write_gguf(folder):
    """One file with weights and tokenizer."""
    from formats import gguf_model

    file = os.path.join(folder, os.path.basename(to))
    for note in gguf_model.write_gguf(model, spec, file, {'float16': 'f16', 'float32': 'f32'}.get(dtype, dtype), name):
        warn(note)
    if model.config.pos == 'learned':
        warn(f'llama.cpp ends the process beyond {model.config.block_size} tokens, as the model has no more positions')
    written = gguf_model.read_gguf_model(file, lambda fields: GPT(GPTConfig(**fields))).eval()
    check_written(model, written, dtype)
    try:
        return written, LlamaCpp(file, ids.size(1), dtype)
    except ImportError:
        warn('llama-cpp-python is not installed, so llama.cpp itself has not opened the file')
        return written, GgufReader(file, written)


def write_nanogpt(folder):
    """ckpt.pt as nanoGPT's train.py writes it, with the optimizer's state; meta.pkl for a vocabulary of characters."""
    entry = model_entry(model)
    beyond = [f'{key}={value}' for key, value in entry['model_args'].items() if key not in NANOGPT_FIELDS]
    if beyond:
        raise UserError(f'--format=nanogpt: nanoGPT has no model with {", ".join(beyond)}')
    if 'mlp' in entry:
        warn('this model computes GELU by tanh as OpenAI does, nanoGPT by erf: its logits are a little off')
    content = {
        'model': entry['model'],
        'optimizer': nanogpt_optimizer(),
        'model_args': entry['model_args'],
        'iter_num': run.get('iter_num', 0),
        'best_val_loss': run.get('best_val_loss', math.inf),
        'config': trained_with,
        **{key: entry[key] for key in entry.keys() & {'mlp'}},  # ours alone reads it
    }
    file = os.path.join(folder, 'ckpt.pt')
    with user_errors(RuntimeError, where=f'cannot write {file}: '):
        torch.save(content, file)
    if spec and spec['kind'] == 'char':
        itos = dict(enumerate(spec['chars']))
        meta = {'vocab_size': len(itos), 'itos': itos, 'stoi': {char: id for id, char in itos.items()}}
        with open(os.path.join(folder, 'meta.pkl'), 'wb') as opened:
            pickle.dump(meta, opened)
    return model, NanoGPT(file)


def nanogpt_optimizer():
    """The state of nanoGPT's AdamW: this run's, or a fresh one where this run has none that fits."""
    has_file = run.keys() & {'optimizer_file', 'optimizer', 'parts'}
    if trained_with.get('optimizer', 'adamw') == 'adamw' and has_file and not run['lora']:
        optimizer = decayed_adamw(model)
        return load_optimizer_buffers(run, os.path.dirname(path), optimizer)['optimizer']
    warn("nanoGPT's train.py will start with a fresh state of its optimizer: there is none of AdamW to give it")
    return decayed_adamw(model).state_dict()


def decayed_adamw(model):
    """nanoGPT's optimizer with its default settings; train.py there takes the settings of its own command line."""
    return torch.optim.AdamW(decay_groups(list(model.parameters()), 0.1), lr=6e-4, betas=(0.9, 0.95))


# --- write, compare, publish ------------------------------------------------------------------------------------------
def model_card(proof):
    """README.md for a folder of transformers': what this is, how to use it, where it comes from, how it was checked."""
    folder = os.path.basename(to)
    code = ', trust_remote_code=True' if remote_code else ''
    usage = ['from transformers import AutoModelForCausalLM, AutoTokenizer', '']
    usage += [f'model = AutoModelForCausalLM.from_pretrained({folder!r}{code})']
    if spec:
        usage += [f'tokenizer = AutoTokenizer.from_pretrained({folder!r}{code})']
        if spec.get('chat_template'):
            usage += ["messages = [{'role': 'user', 'content': 'Hello'}]"]
            kinds = "add_generation_prompt=True, return_dict=True, return_tensors='pt'"
            usage += [f'inputs = tokenizer.apply_chat_template(messages, {kinds})']
        else:
            usage += ["inputs = tokenizer('Once upon', return_tensors='pt')"]
        usage += ['print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50, do_sample=True)[0]))']
    text = [
        '---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- samgpt\n---\n',
        f'# {folder}\n\nA GPT of {n_parameters:,} parameters in {dtype}, written by SAMgpt.\n',
        *('```python', *usage, '```\n'),
        '## Where it comes from\n',
    ]
    if run:
        best = f', best validation loss {run["best_val_loss"]:.4f}' if math.isfinite(run['best_val_loss']) else ''
        text += [
            f'Trained with SAMgpt. Data set `{trained_with.get("dataset")}`, {run["iter_num"]:,} iterations{best}.\n'
        ]
        settings = [f'- `{key} = {value!r}`' for key, value in trained_with.items()]
        text += ['<details><summary>Settings</summary>\n', *settings, '\n</details>\n']
    else:
        text += [f'Converted from `{os.path.basename(os.path.abspath(init_from))}`, whose licence it has.\n']
    return '\n'.join([*text, '## Certificate\n', '```', *certificate_lines(proof), '```', ''])


def write_json(file, content):
    with written_whole(file, 'w') as opened:
        json.dump(content, opened, indent=2)


WRITERS = {'hf': write_hf, 'gguf': write_gguf, 'nanogpt': write_nanogpt}
print(f'writing {to}, and opening it again to compare ...', flush=True)
with user_errors(OSError, where=f'cannot write {to}: '):
    os.makedirs(part)
    try:
        written, theirs = WRITERS[format](part)
        proof = {**compare(model, written, theirs, ids, tokenizer), 'text': where, 'dtype': dtype}
        if proof['problem']:
            raise UserError(f'nothing was exported, as {theirs.name} does not compute the same: {proof["problem"]}')
        if format == 'hf':
            with open(os.path.join(part, 'README.md'), 'w', encoding='utf-8') as file:
                file.write(model_card(proof))
        proof['files'] = sorted(os.listdir(part))
        write_json(os.path.join(part, os.path.basename(certificate_file)), proof)
        if os.path.exists(certificate_file):
            os.remove(certificate_file)  # first, as it proves what goes now
        if format == 'gguf':
            os.replace(os.path.join(part, os.path.basename(to)), to)
            os.replace(os.path.join(part, os.path.basename(certificate_file)), certificate_file)
        else:
            if os.path.isdir(to):
                shutil.rmtree(to)
            os.rename(part, to)
    finally:
        shutil.rmtree(part, ignore_errors=True)
print(f'{n_parameters:,} parameters, {dtype}', *certificate_lines(proof), sep='\n  ')
