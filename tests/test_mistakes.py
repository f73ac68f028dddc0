"""A person's mistake ends with exit status 2 and one line that says what is wrong and what to do.

No traceback is printed, no file of the user's is changed, no code in a data file runs. Every case runs the real script.
"""

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from typing import Callable, NamedTuple

import pytest
import torch
from conftest import (
    CHARS,
    REPO,
    TINY,
    copy_scripts,
    environment,
    run_forked,
    run_forked_ok,
    run_forked_ranks,
    write_data,
)

SAMPLE = ['--device=cpu', '--num_samples=1', '--max_new_tokens=4']
BENCH = """
    --device=cpu --compile=False --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --batch_size=2
    --warmup_steps=0 --steps=1 --dataset=tiny
""".split()
DECODE = """
    --mode=decode --device=cpu --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --vocab_size=40
    --rounds=1 --num_samples=2 --prompt_tokens=4 --max_new_tokens=4
""".split()
META = 'data/tiny/meta.json'
ON_THREE = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '3'}  # as torchrun sets it; the other two do not exist


class Code:
    """Runs a command when it is unpickled."""

    def __reduce__(self):
        return os.system, ('touch executed',)


# --- ways to prepare a mistake: each returns a function that changes a workspace --------------------------------------


def put(path, content):
    """Write a file: text, bytes, an object for torch.save if it ends in .pt, else a dict or list as JSON."""

    def prepare(folder):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        elif target.suffix == '.pt':
            torch.save(content, target)
        else:
            text = content if isinstance(content, str) else json.dumps(content)
            target.write_text(text, encoding='utf-8')

    return prepare


def drop(*paths):
    """Delete files."""
    return lambda folder: [(folder / path).unlink() for path in paths]


def cut(path, size):
    """Truncate a file to `size` bytes."""
    return lambda folder: os.truncate(folder / path, size)


def ids(path, *values):
    """Overwrite the first ids of a split."""

    def prepare(folder):
        with open(folder / path, 'r+b') as file:
            file.write(b''.join(value.to_bytes(2, 'little') for value in values))

    return prepare


def meta(**changes):
    """Change keys of meta.json; None deletes a key."""

    def prepare(folder):
        content = {**json.loads((folder / META).read_text()), **changes}
        (folder / META).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return prepare


def meta_pkl(content):
    """Replace meta.json by a nanoGPT meta.pkl, with an object or with raw bytes in it."""
    return both(drop(META), put('data/tiny/meta.pkl', content if isinstance(content, bytes) else pickle.dumps(content)))


def forge(change, name='ckpt.pt'):
    """Load a checkpoint, call change(checkpoint), save it again."""

    def prepare(folder):
        state = torch.load(folder / 'out' / name, weights_only=True)
        change(state)
        torch.save(state, folder / 'out' / name)

    return prepare


def both(*steps):
    """Do several of these."""
    return lambda folder: [step(folder) for step in steps]


def mkdir(path):
    """Make a folder."""
    return lambda folder: (folder / path).mkdir(parents=True)


def config(text):
    """Write the config file c.py."""
    return put('c.py', text)


def files(**content):
    """Write the text file <name>.txt for each name=text."""
    return both(*(put(f'{name}.txt', text) for name, text in content.items()))


def bare_split(n_tokens):
    """Truncate the validation split to n_tokens, and delete the sizes from meta.json."""
    return both(cut('data/tiny/val.bin', 2 * n_tokens), meta(tokens=None))


def library_tokenizer(kind, vocabulary, **model):
    """Put a tokenizer of the tokenizers library into the checkpoint. kind: its model, such as 'BPE'."""
    description = {
        'version': '1.0',
        'truncation': None,
        'padding': None,
        'added_tokens': [],
        'normalizer': None,
        'pre_tokenizer': None,
        'post_processor': None,
        'decoder': None,
        'model': {'type': kind, 'vocab': vocabulary, **model},
    }
    return forge(lambda s: s.update(tokenizer={'kind': 'tokenizers', 'json': json.dumps(description)}))


OPTIMIZER = 'ckpt_optimizer_00000008.pt'
GPT2_CONFIG = {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'n_layer': 1,
    'n_head': 2,
    'n_embd': 8,
    'n_positions': 16,
    'vocab_size': 29,
}
LOSS = {'iter': 0, 'loss': 3.4, 'time_ms': 1.0}


class Case(NamedTuple):
    """A mistake, and what the user is told."""

    name: str
    words: str  # in the error line
    script: str
    arguments: list
    given: Callable  # prepares the workspace
    env: dict  # environment variables


def cases_of(script, *settings):
    """A function that makes a Case of this script; these settings come before the case's own arguments."""

    def case(name, words, arguments='', given=lambda folder: None, env=None):
        """arguments: a list, or a string with blanks between them. For the rest, see Case."""
        arguments = arguments.split() if isinstance(arguments, str) else arguments
        return Case(name, words, script, [*settings, *arguments], given, env or {})

    return case


train = cases_of('train.py', *TINY)
resume = cases_of('train.py', *TINY, '--init_from=resume', '--max_iters=12')
sample = cases_of('sample.py', *SAMPLE)
evaluate = cases_of('evaluate.py', '--device=cpu')
bench = cases_of('bench.py', *BENCH)
decode = cases_of('bench.py', *DECODE)
text = cases_of('data/text/prepare.py')
plot = cases_of('tools/plot.py')
compare = cases_of('tools/compare.py')

FRESH = [  # in a folder with the data set data/tiny, before any training
    # settings
    train('unknown_key', "unknown setting 'batchsize'; the nearest is 'batch_size'", '--batchsize=3'),
    train('float_for_int', 'batch_size must be a whole number', '--batch_size=1.5'),
    train('word_for_float', 'learning_rate must be a number', '--learning_rate=fast'),
    train('number_for_bool', 'eval_only must be True or False', '--eval_only=0'),
    train('no_value', '--eval_only=VALUE', '--eval_only'),
    train('no_dashes', 'settings are written --key=value', 'batch_size=3'),
    text('number_too_large_for_a_float', 'val_fraction', ['--val_fraction=1' + 400 * '0']),
    text('two_lines_in_a_setting', 'there is no such file or folder', ['--input=a\nb']),
    cases_of('data/python_docs_char/prepare.py')(
        'unknown_key_of_a_script_without_settings', "unknown setting 'mistake'", '--mistake=1'
    ),
    plot('config_missing', 'cannot read the config file c.py', 'c.py'),
    plot('config_is_a_folder', 'cannot read the config file c.py', 'c.py', given=mkdir('c.py')),
    plot('config_not_text', 'cannot read the config file c.py', 'c.py', given=config(b'\xff\xfe\x00')),
    plot('config_syntax', 'c.py, line 2: not valid Python', 'c.py', given=config('title = ""\nx = (')),
    plot(
        'config_unknown_name',
        "c.py: unknown setting 'runz'; the nearest is 'runs'",
        'c.py',
        given=config('runz = "out"'),
    ),
    plot('config_wrong_type', 'runs must be text in quotes, not 3', 'c.py', given=config('runs = 3')),
    plot('config_raises', 'c.py, line 2: ZeroDivisionError', 'c.py', given=config('import os\ntitle = 1 // 0')),
    plot('config_exits', 'c.py, line 2', 'c.py', given=config('import sys\nsys.exit("no")')),
    # values
    train('n_embd_by_n_head', 'n_embd=32 is not divisible by n_head=3', '--n_head=3'),
    train('n_layer_0', 'n_layer=0', '--n_layer=0'),
    train('dropout_1', '--dropout=1.0: must be in [0, 1)', '--dropout=1'),
    train('learning_rate_negative', '--learning_rate=-0.001', '--learning_rate=-1e-3'),
    train('learning_rate_infinite', '--learning_rate=inf', '--learning_rate=1e999'),
    train('batch_size_0', '--batch_size=0: must be at least 1', '--batch_size=0'),
    train('beta1_1', '--beta1=1.0', '--beta1=1'),
    train('data_order', "--data_order=sorted: must be 'random' or 'shuffle'", '--data_order=sorted'),
    train('optimizer', "--optimizer=sgd: must be 'adamw' or 'muon'", '--optimizer=sgd'),
    train('muon_without_a_rate', '--learning_rate=0', '--optimizer=muon --learning_rate=0'),
    train('muon_momentum', '--muon_momentum=1.0: must be in [0, 1)', '--muon_momentum=1'),
    train('pos', "pos='sinus': must be one of learned, rope, alibi, none", '--pos=sinus'),
    train('norm', "norm='batch': must be one of", '--norm=batch'),
    train('mlp', "mlp='relu': must be one of", '--mlp=relu'),
    train('rope_odd', 'pos=rope needs an even head size', '--pos=rope --n_embd=30'),
    train('n_kv_head', 'n_kv_head=3: must divide n_head=2', '--n_kv_head=3'),
    train('softcap', 'logit_softcap=-1.0', '--logit_softcap=-1'),
    train('vocab_multiple_0', '--vocab_multiple=0', '--vocab_multiple=0'),
    train('cooldown_negative', '--cooldown_iters=-1', '--cooldown_iters=-1'),
    train(
        'ramp_no_divisor',
        '--batch_ramp_from=3: must divide --gradient_accumulation',
        '--batch_ramp_from=3 --batch_ramp_iters=9',
    ),
    train(
        'ramp_by_ranks',
        '--batch_ramp_from=2 cannot be divided among 3 ranks: use 3',
        '--gradient_accumulation_steps=6 --batch_ramp_from=2 --batch_ramp_iters=9',
        env=ON_THREE,
    ),
    train('timeout_0', '--timeout=0: must be at least 5', '--timeout=0'),
    train('ramp_of_no_length', '--batch_ramp_from and --batch_ramp_iters', '--batch_ramp_from=1'),
    train('ramp_endless', '--batch_ramp_iters=', f'--batch_ramp_from=1 --batch_ramp_iters={10**12}'),
    cases_of('bench.py')('bench_baseline', '--baseline=recompute: must be eager', '--baseline=recompute'),
    compare('speedrun_no_config', 'cannot read the config file b.py', '--contender=c.py --baseline=b.py --seeds=1'),
    compare('speedrun_no_seeds', '--seeds=0: must be at least 1', '--seeds=0'),
    compare('speedrun_output', '--output=a.jpg: must end in .png', '--output=a.jpg'),
    compare('speedrun_quotes', 'No closing quotation', ["--baseline=a.py --b='"]),
    train('device_unknown', '--device=gpu', '--device=gpu'),
    pytest.param(
        train('no_cuda', 'use --device=auto or --device=cpu', '--device=cuda'),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one'),
    ),
    train('dtype_unknown', '--dtype=half: unknown; use auto, float32', '--dtype=half'),
    train('float16_on_cpu', '--dtype=float16: needs a CUDA device', '--dtype=float16'),
    train(
        'accumulation_by_ranks', '--gradient_accumulation_steps=2 cannot be divided among 3 ranks: use 3', env=ON_THREE
    ),
    train(
        'nccl_on_cpu',
        '--backend=nccl: works between CUDA',
        '--gradient_accumulation_steps=3 --backend=nccl',
        env=ON_THREE,
    ),
    train('backend_unknown', '--backend=mpi: unknown', '--gradient_accumulation_steps=3 --backend=mpi', env=ON_THREE),
    train('rank_alone', 'start several ranks with torchrun', env={'RANK': '0'}),
    train('no_ranks', 'WORLD_SIZE', env={**ON_THREE, 'WORLD_SIZE': '0'}),
    train('nowhere_to_join', 'MASTER_ADDR', '--gradient_accumulation_steps=3', env=ON_THREE),
    train('model_too_large', 'memory', f'--n_embd={10**12}'),
    train('batch_too_large', 'memory', f'--batch_size={10**15}'),
    train(
        'out_dir_below_a_file', 'cannot write to --out_dir=file/out', '--out_dir=file/out', given=put('file', 'mine')
    ),
    train('log_is_a_folder', 'cannot write out/metrics.jsonl', given=mkdir('out/metrics.jsonl')),
    # data sets
    train('no_data_set', 'there is no data set data/large: run python data/large/prepare.py', '--dataset=large'),
    train('no_train_bin', 'train.bin is missing: run python data/tiny/prepare.py', given=drop('data/tiny/train.bin')),
    train('no_val_bin', 'val.bin is missing', given=drop('data/tiny/val.bin')),
    train(
        'bin_is_a_folder', 'data/tiny/train.bin', given=both(drop('data/tiny/train.bin'), mkdir('data/tiny/train.bin'))
    ),
    train('bin_empty', 'train.bin: it is empty', given=cut('data/tiny/train.bin', 0)),
    train('bin_cut_short', 'it was cut short', given=cut('data/tiny/val.bin', 1001)),
    train('bin_of_another_size', 'holds 2000 tokens, meta.json says 4000', given=cut('data/tiny/train.bin', 4000)),
    train(
        'id_beyond_vocabulary',
        'val.bin holds the id 29, the vocabulary ends at 28',
        given=ids('data/tiny/val.bin', 1, 29),
    ),
    train('dtype_in_meta', "'dtype' is 'float64', must be uint16 or uint32", given=meta(dtype='float64')),
    train('wider_dtype_in_meta', 'holds 2000 tokens, meta.json says 4000', given=meta(dtype='uint32')),
    train('meta_not_json', 'meta.json is not a data set description', given=put(META, '{"tokens": ')),
    train('meta_no_object', 'it holds no JSON object', given=put(META, [1, 2])),
    train('meta_nested_deep', 'meta.json is not a data set description', given=put(META, 100000 * '[')),
    train('tokenizer_unknown', 'data/tiny/meta: unknown kind of tokenizer', given=meta(tokenizer={'kind': 'words'})),
    train(
        'tokenizer_repeats', 'a text without repeated characters', given=meta(tokenizer={'kind': 'char', 'chars': 'aa'})
    ),
    train('meta_pkl_with_code', 'meta.pkl is not a nanoGPT meta.pkl: it asks to import', given=meta_pkl(Code())),
    train('meta_pkl_corrupt', 'meta.pkl is not a nanoGPT meta.pkl', given=meta_pkl(b'\x80\x04\x95\xff')),
    train(
        'meta_pkl_without_vocab_size',
        "data/tiny/meta: it has no 'vocab_size'",
        given=meta_pkl({'itos': dict(enumerate(CHARS))}),
    ),
    train(
        'meta_pkl_mixed_keys', "its 'itos' does not map", given=meta_pkl({'vocab_size': 2, 'itos': {0: 'a', 'b': 'c'}})
    ),
    train('meta_pkl_huge', 'memory', given=meta_pkl({'vocab_size': 10**15})),
    train('block_beyond_train', 'train.bin holds 4000 tokens, too few', '--block_size=4000'),
    train('block_beyond_val', 'val.bin holds 1000 tokens, too few', '--block_size=1000'),
    train('block_huge', 'block_size', f'--block_size={10**14}'),
    # pretrained weights
    train('init_from_unknown', '--init_from=gpt5: there is no such file or folder', '--init_from=gpt5'),
    train(
        'init_from_empty_folder',
        'this folder has neither the ckpt.pt of a run nor a config.json',
        '--init_from=hf',
        given=mkdir('hf'),
    ),
    train(
        'init_from_bert',
        "hf/config.json: model_type is 'bert', only gpt2, llama",
        '--init_from=hf',
        given=put('hf/config.json', {'model_type': 'bert'}),
    ),
    train(
        'init_from_no_weights',
        'hf has no model.safetensors',
        '--init_from=hf',
        given=put('hf/config.json', GPT2_CONFIG),
    ),
    train(
        'init_from_code_in_weights',
        'hf/pytorch_model.bin cannot be read',
        '--init_from=hf',
        given=both(put('hf/config.json', GPT2_CONFIG), lambda f: torch.save(Code(), f / 'hf/pytorch_model.bin')),
    ),
    # before there is a run
    resume('resume_nothing', 'there is no out/ckpt.pt: train first'),
    sample('sample_nothing', 'there is no out/ckpt.pt: train first'),
    plot('plot_nothing', 'cannot read out/metrics.jsonl, train first or check --runs'),
    plot('plot_no_metrics', 'holds no losses yet', given=put('out/metrics.jsonl', 'nothing yet\n')),
    plot('plot_no_folder', '--runs=', '--runs='),
    plot('plot_axis', "--x=epochs: must be 'iter' or 'seconds'", '--x=epochs'),
    plot('plot_format', 'must end in .png', '--output=out/metrics.jsonl', given=put('out/metrics.jsonl', LOSS)),
    plot(
        'plot_output_below_a_file',
        'cannot write',
        '--output=out/metrics.jsonl/x.png',
        given=put('out/metrics.jsonl', LOSS),
    ),
    plot('plot_loss_is_text', 'out/metrics.jsonl', given=put('out/metrics.jsonl', {'iter': 0, 'loss': {'a': 1}})),
    plot(
        'plot_half_an_evaluation', 'out/metrics.jsonl', given=put('out/metrics.jsonl', {'iter': 0, 'train/loss': 3.4})
    ),
    plot('plot_no_times', 'out/metrics.jsonl', '--x=seconds', given=put('out/metrics.jsonl', {'iter': 0, 'loss': 3.4})),
    bench('bench_shape', 'n_embd=32 is not divisible by n_head=3', '--n_head=3'),
    bench('bench_vocabulary', 'train.bin holds the id 28, the vocabulary ends at 9', '--vocab_size=10'),
    bench('bench_block', 'train.bin holds 4000 tokens, too few', '--block_size=4000'),
    bench('bench_memory', 'memory', f'--block_size={10**13}'),
    bench('bench_trace', 'cannot write --trace_file=no/t.json', '--profile=True --trace_file=no/t.json'),
    decode('bench_mode', '--mode=Decode: must be train, decode or accept', '--mode=Decode'),
    decode('decode_baseline', '--baseline=hf: must be transformers or recompute', '--baseline=hf'),
    decode('decode_quantize', '--quantize=int5: unknown; use int8', '--quantize=int5'),
    decode('decode_rounds_0', '--rounds=0: must be at least 1', '--rounds=0'),
    decode('decode_no_prompt', '--prompt_tokens=0: must be from 1', '--prompt_tokens=0'),
    decode('decode_nothing_after_the_first', '--max_new_tokens=1: must be from 2', '--max_new_tokens=1'),
    decode('decode_shape', 'n_embd=32 is not divisible by n_head=3', '--n_head=3'),
    decode('decode_prompt_beyond_memory', '--prompt_tokens', f'--prompt_tokens={10**15}'),
    decode('decode_beyond_int64', '--max_new_tokens', f'--max_new_tokens={10**30}'),
    decode('decode_vocabulary_beyond_int64', 'vocab_size', f'--vocab_size={10**30}'),
    decode('decode_many_at_once', '--num_samples=65537', '--num_samples=65537'),
    decode('decode_beyond_block_of_baseline', '--baseline=transformers', '--prompt_tokens=14 --baseline=transformers'),
    bench('train_quantized', '--quantize=int8', '--quantize=int8'),
    bench('train_with_baseline', '--baseline=recompute', '--baseline=recompute'),
    decode('decode_profile', '--profile=True', '--profile=True'),
    evaluate('evaluate_nothing', 'there is no out/ckpt.pt: train first'),
    evaluate('evaluate_before_training', 'must be resume', '--dataset=tiny --init_from=scratch'),
    # texts
    text('text_missing', '--input=mistake.txt: there is no such file or folder', '--input=mistake.txt'),
    text('text_none', 'which text? give --input=FILE_OR_FOLDER'),
    text(
        'text_binary',
        'is not UTF-8 text (byte 128)',
        '--input=mistake.txt',
        given=put('mistake.txt', bytes(range(256))),
    ),
    text('text_zeros', 'mistake.txt', '--input=mistake.txt', given=put('mistake.txt', 1000 * b'\0\1')),
    text('text_empty', 'there is no text in mistake.txt', '--input=mistake.txt', given=put('mistake.txt', '')),
    text('text_one_character', 'too few to split', '--input=mistake.txt', given=put('mistake.txt', 'a')),
    text(
        'text_folder_without',
        'there is no text in mistake',
        '--input=mistake',
        given=put('mistake/image.png', b'\x89PNG\xff'),
    ),
    text(
        'text_val_fraction',
        '--val_fraction=1.0',
        '--input=mistake.txt --val_fraction=1',
        given=put('mistake.txt', 'abc' * 99),
    ),
    text(
        'text_tokenizer',
        '--tokenizer=word: must be',
        '--input=mistake.txt --tokenizer=word',
        given=put('mistake.txt', 'abc' * 99),
    ),
    text(
        'text_name',
        "--name='../mistake': must be",
        '--input=mistake.txt --name=../mistake',
        given=put('mistake.txt', 'abc' * 99),
    ),
    text(
        'text_no_json',
        'mistake.jsonl, byte 16: this is not a line of JSON',
        '--input=mistake.jsonl',
        given=put('mistake.jsonl', '{"text": "abc"}\n{"text": \n'),
    ),
    text(
        'text_json_list',
        'not a JSON object with',
        '--input=mistake.jsonl --tokenizer=byte',
        given=put('mistake.jsonl', '["abc"]\n'),
    ),
    text(
        'text_json_without',
        "mistake.jsonl, byte 0: not a JSON object with a text 'text'; --text_key= names another field",
        '--input=mistake.jsonl --tokenizer=byte',
        given=put('mistake.jsonl', '{"content": "abc"}\n'),
    ),
    text(
        'text_gz_is_none',
        'cannot read mistake.jsonl.gz',
        '--input=mistake.jsonl.gz',
        given=put('mistake.jsonl.gz', b'no gzip'),
    ),
    text(
        'text_gz_cut_short',
        'cannot read mistake.jsonl.gz',
        '--input=mistake.jsonl.gz',
        given=put('mistake.jsonl.gz', gzip.compress(b'{"text": "abc"}\n' * 99)[:-9]),
    ),
    text(
        'text_zst_is_none',
        'mistake.jsonl.zst',
        '--input=mistake.jsonl.zst',
        given=put('mistake.jsonl.zst', b'no zstandard'),
    ),
    text(
        'text_parquet_is_none', 'mistake.parquet', '--input=mistake.parquet', given=put('mistake.parquet', b'no table')
    ),
    text('text_bare_argument', '--input=novel.txt: there is no such file or folder', 'novel.txt'),
    text('text_pipe', '/dev/null is neither a file nor a folder', '--input=/dev/null'),
    text(
        'text_blank_lines',
        'there is no text in the input',
        '--input=mistake.jsonl --tokenizer=byte',
        given=put('mistake.jsonl', '\n\n'),
    ),
    text(
        'text_not_utf8_json',
        'byte 0: this is not a line of JSON',
        '--input=mistake.jsonl',
        given=put('mistake.jsonl', b'\xff\xfe\n'),
    ),
    train(
        'unfinished_preparation',
        'train.bin is missing: its preparation is not finished',
        given=lambda f: ((f / 'data/tiny/train.bin').unlink(), (f / 'data/tiny/preparing').mkdir()),
    ),
    text(
        'text_one_document',
        'fewer than two different documents',
        '--input=mistake.jsonl',
        given=put('mistake.jsonl', '{"text": "abc"}\n'),
    ),
    train('tokenizer_bpe_without', 'not the tokenizer.json of a', given=meta(tokenizer={'kind': 'bpe', 'json': '{}'})),
    text(
        'text_vocab_size',
        '--vocab_size=256: must be from 257',
        '--input=mistake.txt --tokenizer=bpe --vocab_size=256',
        given=put('mistake.txt', 'abc' * 99),
    ),
    text(
        'text_vocab_too_large',
        'the text is enough for',
        '--input=mistake.txt --tokenizer=bpe',
        given=put('mistake.txt', 'abc' * 99),
    ),
    text(
        'text_workers',
        '--workers=-1: must be 0 or more',
        '--input=mistake.txt --workers=-1',
        given=put('mistake.txt', 'abc' * 99),
    ),
    train('align_without_ends', 'data/tiny has no token that ends a document', '--align_documents=True'),
    cases_of('data/shakespeare_char/prepare.py')(
        'text_of_shakespeare', 'cannot read mistake.txt', '--input=mistake.txt'
    ),
    # files of another kind than expected
    text(
        'text_html',
        'mistake.html: .html files are not read, make it',
        '--input=mistake.html',
        given=put('mistake.html', '<p>abc'),
    ),
    text(
        'text_json_object',
        'mistake.json is neither an array',
        '--input=mistake.json',
        given=put('mistake.json', '{\n"name": "abc"\n}'),
    ),
    text(
        'text_json_array',
        'mistake.json is not a JSON array: after',
        '--input=mistake.json',
        given=put('mistake.json', '["abc", "def"'),
    ),
    text(
        'text_csv_column',
        "must name one column 'text'",
        '--input=mistake.csv',
        given=put('mistake.csv', 'n,content\n1,abc\n'),
    ),
    text(
        'text_csv_fields',
        'mistake.csv, line 2: 3 fields',
        '--input=mistake.csv',
        given=put('mistake.csv', 'n,text\n1,a, b\n'),
    ),
    text(
        'text_link',
        'mistake/a.txt is a broken link',
        '--input=mistake',
        given=lambda f: ((f / 'mistake').mkdir(), (f / 'mistake/a.txt').symlink_to('gone')),
    ),
    text(
        'text_tokenizer_folder',
        '--tokenizer=hf: there is no tokenizer.json in it',
        '--input=mistake.txt --tokenizer=hf',
        given=both(mkdir('hf'), put('mistake.txt', 'abc' * 99)),
    ),
    text(
        'text_tokenizer_broken',
        'cannot read hf/tokenizer.json: not a tokenizer.json',
        '--input=mistake.txt --tokenizer=hf',
        given=both(put('hf/tokenizer.json', '{"model":'), put('mistake.txt', 'abc' * 99)),
    ),
    train(
        'meta_vocab_size',
        "meta.json is not a data set description (prepare the data again): 'vocab",
        given=meta(vocab_size=-29),
    ),
    train(
        'meta_tokens', "'tokens' must be a whole number for train and one for val", given=meta(tokens={'train': '4000'})
    ),
    train(
        'meta_pkl_two_ways',
        'contradict',
        given=meta_pkl({'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 1, 'b': 0}}),
    ),
    train(
        'bin_wider',
        'data/tiny/train.bin: every second id is 0',
        given=both(meta(tokens=None), put('data/tiny/train.bin', b'\1\0\0\0' * 500)),
    ),
]
TRAINED = [  # with a run of 8 iterations in out/, too
    # files that are not checkpoints
    resume(
        'resume_random_bytes',
        'out/ckpt.pt cannot be read as a checkpoint',
        given=put('out/ckpt.pt', bytes(range(256)) * 99),
    ),
    resume('resume_cut_short', 'out/ckpt.pt cannot be read as a checkpoint', given=cut('out/ckpt.pt', 20000)),
    sample('sample_cut_short', 'out/ckpt.pt cannot be read as a checkpoint', given=cut('out/ckpt.pt', 20000)),
    resume('resume_other_dict', "of SAMgpt or nanoGPT: it has no 'model'", given=put('out/ckpt.pt', {'epoch': 3})),
    resume('resume_list', 'is not a checkpoint of SAMgpt or nanoGPT', given=put('out/ckpt.pt', [1, 2])),
    sample('sample_tensor', 'is not a checkpoint of SAMgpt or nanoGPT', given=put('out/ckpt.pt', torch.ones(3))),
    resume(
        'resume_code', 'out/ckpt.pt cannot be read as a checkpoint: it holds code', given=put('out/ckpt.pt', Code())
    ),
    sample(
        'sample_code', 'out/ckpt.pt cannot be read as a checkpoint: it holds code', given=put('out/ckpt.pt', Code())
    ),
    resume(
        'resume_bare_pickle',
        'out/ckpt.pt cannot be read as a checkpoint',
        given=put('out/ckpt.pt', pickle.dumps(Code())),
    ),
    sample(
        'code_in_old_format',
        'out/ckpt.pt cannot be read as a checkpoint: it holds code',
        given=lambda f: torch.save({'model': Code()}, f / 'out/ckpt.pt', _use_new_zipfile_serialization=False),
    ),
    # checkpoints that contradict the settings or themselves
    resume('resume_other_shape', '--n_layer=3: the run in out/ckpt.pt has n_layer=2', '--n_layer=3'),
    cases_of('train.py')(
        'weights_of_other_width',
        'out/ckpt.pt: the weights do not fit the model_args',
        [*(a for a in TINY if 'n_embd' not in a), '--init_from=resume', '--max_iters=12'],
        given=forge(lambda s: s['model_args'].update(n_embd=64)),
    ),
    sample(
        'weights_missing', 'the weights do not fit', given=forge(lambda s: s['model'].pop('transformer.ln_f.weight'))
    ),
    sample(
        'weights_are_text', 'not tensors', given=forge(lambda s: s['model'].update({'transformer.ln_f.weight': 'x'}))
    ),
    sample('weights_without_names', 'out/ckpt.pt', given=forge(lambda s: s['model'].update({1: torch.ones(2)}))),
    sample(
        'weights_not_finite',
        'out/ckpt.pt',
        given=forge(lambda s: s['model']['transformer.ln_f.weight'].fill_(float('nan'))),
    ),
    sample(
        'forged_n_layer',
        'n_layer=1000000000, but there are',
        given=forge(lambda s: s['model_args'].update(n_layer=10**9)),
    ),
    sample(
        'forged_vocab_size', 'the weights do not fit', given=forge(lambda s: s['model_args'].update(vocab_size=10**14))
    ),
    sample(
        'forged_vocab_size_beyond_int64',
        'out/ckpt.pt',
        given=forge(lambda s: s['model_args'].update(vocab_size=10**30)),
    ),
    sample(
        'forged_field',
        'the weights do not fit the model_args',
        given=forge(lambda s: s['model_args'].update(n_expert=8)),
    ),
    sample(
        'forged_expanded_weights',
        'out/ckpt.pt',
        given=forge(
            lambda s: (
                s['model_args'].update(block_size=10**13),
                s['model'].update(
                    {'transformer.wpe.weight': torch.zeros(1, 1, dtype=torch.float16).expand(10**13, 32)}
                ),
            )
        ),
    ),
    resume('forged_iter_num', 'out/ckpt.pt', given=forge(lambda s: s.update(iter_num=-3))),
    resume('forged_best_val_loss', 'out/ckpt.pt', given=forge(lambda s: s.update(best_val_loss=None))),
    resume('forged_best_iter', 'out/ckpt.pt', '--patience=1', given=forge(lambda s: s.update(best_iter='x'))),
    resume('forged_evaluated_at', 'out/ckpt.pt', given=forge(lambda s: s.update(evaluated_at='x'))),
    sample(
        'forged_tokenizer',
        'out/ckpt.pt is not a sound checkpoint: a char',
        given=forge(lambda s: s.update(tokenizer={'kind': 'char', 'chars': ''})),
    ),
    sample(
        'tokenizer_of_other_size',
        'the tokenizer has 32 ids, the model 29',
        given=forge(lambda s: s.update(tokenizer={'kind': 'char', 'chars': CHARS + 'ABC'})),
    ),
    resume(
        'tokenizer_of_other_data',
        'was trained with another tokenizer than that of data/other',
        '--dataset=other',
        given=lambda f: write_data(f / 'data/other', chars=CHARS.upper()),
    ),
    # optimizer files
    resume(
        'optimizer_missing', f'out/{OPTIMIZER}, the state of the optimizer, is missing', given=drop(f'out/{OPTIMIZER}')
    ),
    resume(
        'optimizer_elsewhere',
        'names no optimizer file',
        given=both(forge(lambda s: s.update(optimizer_file='../optimizer.pt')), put('optimizer.pt', {'optimizer': {}})),
    ),
    resume('optimizer_random_bytes', f'out/{OPTIMIZER} cannot be read', given=put(f'out/{OPTIMIZER}', b'\0' * 999)),
    resume('optimizer_code', f'out/{OPTIMIZER} cannot be read', given=put(f'out/{OPTIMIZER}', {'optimizer': Code()})),
    resume('optimizer_other_dict', 'is broken', given=put(f'out/{OPTIMIZER}', {'optimizer': [1]})),
    resume(
        'optimizer_groups', 'optimizer', given=forge(lambda s: s['optimizer'].update(param_groups=[1, 2]), OPTIMIZER)
    ),
    resume(
        'optimizer_of_other_shape',
        'exp_avg of parameter 1 is not a tensor of (16, 32)',
        given=forge(lambda s: s['optimizer']['state'][1].update(exp_avg=torch.ones(3, 5)), OPTIMIZER),
    ),
    resume(
        'optimizer_index',
        'optimizer',
        given=forge(lambda s: s['optimizer']['state'].update({99: {'exp_avg': torch.ones(2)}}), OPTIMIZER),
    ),
    resume(
        'optimizer_half', 'optimizer', given=forge(lambda s: s['optimizer']['state'][1].pop('exp_avg_sq'), OPTIMIZER)
    ),
    resume(
        'resume_log_is_a_folder', 'out/metrics.jsonl', given=both(drop('out/metrics.jsonl'), mkdir('out/metrics.jsonl'))
    ),
    # sampling
    sample('prompt_of_other_characters', "the character 'X' at position 3 is not among the 29", '--start=abcX'),
    sample('prompt_empty', 'at least one token', '--start='),
    sample('prompt_file_missing', 'cannot read the prompt p.txt', '--start=FILE:p.txt'),
    sample('prompt_file_not_text', 'cannot read the prompt p.txt', '--start=FILE:p.txt', given=put('p.txt', b'ab\xff')),
    sample('num_samples_0', '--num_samples=0: must be at least 1', '--num_samples=0'),
    sample('temperature_negative', '--temperature=-1.0: must be 0 or more', '--temperature=-1'),
    sample('out_dir_missing', 'there is no elsewhere/ckpt.pt: train first, or check', '--out_dir=elsewhere'),
    sample('prompt_path_empty', 'cannot read the prompt', '--start=FILE:'),
    sample('prompt_file_is_a_folder', 'cannot read the prompt data', '--start=LINES:data'),
    sample('prompt_file_empty', 'p.txt: a prompt must have at least one', '--start=FILE:p.txt', given=files(p='')),
    sample('prompt_lines_all_blank', 'no lines with anything', '--start=LINES:p.txt', given=files(p='\n\n\n')),
    sample(
        'prompt_lines_not_text',
        'cannot read the prompt p.txt',
        '--start=LINES:p.txt',
        given=put('p.txt', b'ab\ncd\xff\n'),
    ),
    sample('prompt_third_line', 'line 3', '--start=LINES:p.txt', given=files(p='abc\nabc\nabX\n')),
    sample(
        'prompt_second_file_missing', 'cannot read the prompt b.txt', '--start=FILES:a.txt,b.txt', given=files(a='abc')
    ),
    sample('prompt_list_ends_in_a_comma', 'cannot read the prompt', '--start=FILES:a.txt,', given=files(a='abc')),
    sample(
        'prompt_second_file',
        "second.txt: the character 'X'",
        f'--start=FILES:{"./" * 20}a.txt,second.txt',
        given=files(a='abc', second='abX'),
    ),
    sample(
        'prompt_second_file_empty',
        'second.txt: a prompt must have',
        f'--start=FILES:{"./" * 20}a.txt,second.txt',
        given=files(a='abc', second=''),
    ),
    sample('prompt_path_in_lower_case', "the character ':' at position 4", '--start=file:p.txt', given=files(p='abc')),
    sample('prompt_not_unicode', '--start=a', ['--start=a\udcff'], given=library_tokenizer('BPE', {'a': 0}, merges=[])),
    sample(
        'prompt_of_unknown_words',
        '--start=z',
        '--start=z',
        given=library_tokenizer('WordLevel', {'a': 0}, unk_token='?'),
    ),
    sample(
        'prompt_of_no_known_piece',
        "no token for the character 'z' at position 1",
        '--start=az',
        given=library_tokenizer('BPE', {'a': 0}, merges=[]),
    ),
    sample(
        'tokenizer_with_holes',
        'they do not belong together',
        '--start=b',
        given=library_tokenizer('BPE', {'a': 0, 'b': 300}, merges=[]),
    ),
    sample(
        'tokenizer_json_broken',
        'not a tokenizer.json of the tokenizers library',
        given=forge(lambda s: s.update(tokenizer={'kind': 'tokenizers', 'json': '{"model":'})),
    ),
    sample('top_p_nan', 'top_p must be a number', '--top_p=nan'),
    sample(
        'top_p_nan_in_config',
        '--top_p=nan: must be above 0 and at most 1',
        'c.py',
        given=config('top_p = float("nan")'),
    ),
    sample('top_p_0', '--top_p=0.0: must be above 0 and at most 1', '--top_p=0'),
    sample('top_p_percent', '--top_p=95.0: must be above 0 and at most 1', '--top_p=95'),
    sample('top_p_with_decimal_comma', 'top_p must be a number, not (0, 9)', '--top_p=0,9'),
    sample('min_p_negative', '--min_p=-0.1: must be from 0 to 1', '--min_p=-0.1'),
    sample('min_p_infinite', '--min_p=inf: must be from 0 to 1', '--min_p=1e999'),
    sample(
        'temperature_nan_in_config', '--temperature=nan: must be', 'c.py', given=config('temperature = float("nan")')
    ),
    sample('top_k_negative', '--top_k=-1: must be 0 or more', '--top_k=-1'),
    sample('seed_negative', '--seed=-1: must be 0 or more', '--seed=-1'),
    sample('repetition_penalty_0', '--repetition_penalty=0.0: must be from 0.01', '--repetition_penalty=0'),
    sample('repetition_penalty_infinite', '--repetition_penalty=inf', '--repetition_penalty=1e999'),
    sample('repetition_penalty_near_0', '--repetition_penalty=1e-40', '--repetition_penalty=1e-40'),
    sample('max_new_tokens_beyond_memory', '--max_new_tokens', f'--max_new_tokens={10**15}'),
    sample('too_many_at_once', '--batch_size=10000000000: must be from 1 to 65536', '--batch_size=1e10'),
    sample('stop_without_value', '--stop: write it as --stop=VALUE', '--stop'),
    sample('stop_number_in_config', 'c.py: stop must be a tuple of strings, not 5', 'c.py', given=config('stop = 5')),
    sample(
        'stop_bare_text_in_config', "stop must be a tuple of strings, not 'end'", 'c.py', given=config('stop = ("end")')
    ),
    sample('stop_mixed_in_config', "not ('end', 5)", 'c.py', given=config('stop = ("end", 5)')),
    sample('interactive_json', '--interactive=True and --json=True: choose', '--interactive=True --json=True'),
    sample('interactive_prompt', "--start=abX: the character 'X'", '--interactive=True --start=abX'),
    sample(
        'interactive_many_prompts',
        '--interactive=True',
        '--interactive=True --start=LINES:p.txt',
        given=files(p='ab\ncd\n'),
    ),
    sample('quantize_unknown', '--quantize=int5: unknown; use int8 or int4, or leave it out', '--quantize=int5'),
    sample(
        'overflowing_quantized',
        'logits are NaN or infinite',
        '--quantize=int8',
        given=forge(lambda s: [w.mul_(1e12) for w in s['model'].values()]),
    ),
    # evaluating
    evaluate('evaluate_split', '--split=test: must be train or val', '--split=test'),
    evaluate('evaluate_block', '--block_size=17: the model has 16 positions', '--block_size=17'),
    evaluate('evaluate_batch_size_0', '--batch_size=0: must be from 1', '--batch_size=0'),
    evaluate('evaluate_batch_size_beyond_int64', '--batch_size', f'--batch_size={10**30}'),
    evaluate('evaluate_eval_iters', '--eval_iters=-1: must be 0 or more', '--eval_iters=-1'),
    evaluate('evaluate_quantize', '--quantize=INT8: unknown', '--quantize=INT8'),
    evaluate('evaluate_setting_of_sample', "unknown setting 'top_p'", '--top_p=0.5'),
    evaluate('evaluate_optimizer_file', "it has no 'model'", f'--ckpt={OPTIMIZER}'),
    evaluate('evaluate_no_data_set', 'there is no data set data/large', '--dataset=large'),
    evaluate(
        'evaluate_data_set_gone',
        'there is no data set data/gone',
        given=forge(lambda s: s['config'].update(dataset='gone')),
    ),
    evaluate('evaluate_data_set_unnamed', '--dataset= is needed', given=forge(lambda s: s['config'].pop('dataset'))),
    evaluate('evaluate_data_set_no_text', '--dataset= is needed', given=forge(lambda s: s['config'].update(dataset=5))),
    evaluate('evaluate_no_val_bin', 'val.bin is missing', given=drop('data/tiny/val.bin')),
    evaluate('evaluate_id_beyond_vocabulary', 'val.bin holds the id 29', given=ids('data/tiny/val.bin', 1, 29)),
    evaluate('evaluate_one_token', 'val.bin holds 1 tokens, too few', given=bare_split(1)),
    evaluate(
        'evaluate_other_tokenizer',
        'data/other was prepared with another tokenizer',
        '--dataset=other',
        given=lambda f: write_data(f / 'data/other', chars=CHARS.upper()),
    ),
    evaluate(
        'evaluate_other_characters_of_nanogpt',
        'data/tiny was prepared with another tokenizer',
        given=meta_pkl({'vocab_size': 29, 'itos': dict(enumerate(CHARS.upper()))}),
    ),
    evaluate(
        'evaluate_tokenizer_unknown',
        'data/tiny/meta: unknown kind of tokenizer',
        given=meta(tokenizer={'kind': 'words'}),
    ),
    evaluate(
        'evaluate_overflowing',
        'the loss is NaN or infinite',
        given=forge(lambda s: [w.mul_(1e12) for w in s['model'].values()]),
    ),
    sample('no_best', 'there is no out/ckpt_best.pt', '--ckpt=ckpt_best.pt', given=drop('out/ckpt_best.pt')),
]


# --- the tests --------------------------------------------------------------------------------------------------------


def files_in(folder):
    """All files below a folder, except Python's cache -> {path: content}."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts}


def preload(case):
    """Import the slow libraries that a case needs, here and once for all forks."""
    if case.script.startswith('tools/'):
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # noqa: F401
        from matplotlib.figure import Figure  # noqa: F401


def is_one_error_line(result):
    """Did a script end as a mistake should: with status 2 and one line?"""
    text = result.stderr
    return result.returncode == 2 and text.startswith('error: ') and text.endswith('\n') and text.count('\n') == 1


def check(folder, case):
    """Make a mistake -> one error line with its words, and no file has changed."""
    case.given(folder)
    where = copy_scripts(folder / 'copied') if case.script.startswith('data/') else REPO
    before = files_in(folder)
    preload(case)
    result = run_forked(where / case.script, *case.arguments, cwd=folder, **case.env)
    assert is_one_error_line(result), f'{result.stdout}\n{result.stderr}'
    assert 'Traceback' not in result.stdout
    assert case.words in result.stderr
    after = files_in(folder)
    assert not (folder / 'executed').exists(), 'code from a data file was executed'
    assert {path: after.get(path) for path in before} == before, 'a file has changed'
    assert not [path for path in after if path not in before], 'a mistake left a file behind'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workspace with a run of 8 iterations; each case gets a copy of it."""
    workspace = tmp_path_factory.mktemp('trained')
    write_data(workspace / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, cwd=workspace)
    assert (workspace / 'out' / OPTIMIZER).exists() and (workspace / 'out' / 'ckpt_best.pt').exists()
    return workspace


@pytest.mark.parametrize('case', FRESH, ids=lambda case: case.name)
def test_mistakes(workspace, forked_runs, case):
    check(workspace, case)


@pytest.mark.parametrize('case', TRAINED, ids=lambda case: case.name)
def test_mistakes_with_a_run(trained, tmp_path, case):
    check(shutil.copytree(trained, tmp_path / 'copy'), case)


def check_two_ranks(folder, case):
    """Make a mistake on two ranks: at least one says its words, and none says anything else."""
    case.given(folder)
    preload(case)
    results = run_forked_ranks(2, case.script, *case.arguments, cwd=folder)
    errors = [line for result in results for line in result.stderr.splitlines() if line.startswith('error')]
    # A rank that waits for the other one may report that it is gone.
    lost = ('connection to another rank', 'cannot connect the ranks')
    errors = [line for line in errors if not any(text in line for text in lost)]
    assert errors and all(case.words in line for line in errors), [result.stderr for result in results]
    for result in results:
        assert result.returncode in (2, -signal.SIGKILL) and 'Traceback' not in result.stdout + result.stderr


def for_two_ranks(cases):
    """Parametrize a test by those of the cases that run train.py and set no environment."""
    cases = [case for case in cases if isinstance(case, Case) and case.script == 'train.py' and not case.env]
    return pytest.mark.parametrize('case', cases, ids=lambda case: case.name)


@for_two_ranks(FRESH)
def test_mistakes_on_two_ranks(workspace, case):
    check_two_ranks(workspace, case)


@for_two_ranks(TRAINED)
def test_mistakes_with_a_run_on_two_ranks(trained, tmp_path, case):
    check_two_ranks(shutil.copytree(trained, tmp_path / 'copy'), case)


def run_process(folder, script, *arguments, env=None, **streams):
    """Run a script as a process of its own, with these streams -> CompletedProcess."""
    command = [sys.executable, str(REPO / script), *arguments]
    env = environment(**(env or {}))
    return subprocess.run(command, cwd=folder, env=env, stderr=subprocess.PIPE, text=True, timeout=120, **streams)


def test_no_consent_to_code(workspace):
    """The code beside a model, which transformers would ask about, is never run."""
    put('hf/config.json', {'model_type': 'other', 'auto_map': {'AutoConfig': 'other.Other'}})(workspace)
    put('hf/other.py', 'open("executed", "w")\nclass Other: pass\n')(workspace)
    arguments, env = ['--init_from=hf', '--device=cpu'], {'HF_HOME': str(workspace / 'home')}
    result = run_process(workspace, 'sample.py', *arguments, env=env, input='y\n', stdout=subprocess.PIPE)
    assert is_one_error_line(result), result.stderr
    assert "hf/config.json: model_type is 'other'" in result.stderr
    assert not (workspace / 'executed').exists(), 'code from a data file was executed'


def test_diverging(workspace):
    """A learning rate that is far too high ends the run with one line, too, and saves no broken model."""
    result = run_forked('train.py', *TINY, '--learning_rate=1e30', '--min_lr=1e30', cwd=workspace)
    assert is_one_error_line(result), result.stderr
    assert 'lower --learning_rate' in result.stderr
    assert torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 0


# --- standard input and output ----------------------------------------------------------------------------------------


def test_int8_on_an_unsupported_processor(trained, monkeypatch):
    """As on an ARM processor."""
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', ['none'])
    for script, arguments in (('sample.py', SAMPLE), ('evaluate.py', ['--device=cpu']), ('bench.py', DECODE)):
        result = run_forked(script, *arguments, '--quantize=int8', cwd=trained)
        assert is_one_error_line(result), result.stderr
        assert '--quantize=int8: runs on x86 processors only' in result.stderr


def test_baseline_not_installed(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    result = run_forked('bench.py', *DECODE, '--baseline=transformers', cwd=workspace)
    assert is_one_error_line(result), result.stderr
    assert 'pip install transformers' in result.stderr


def test_interactive_input(trained, monkeypatch):
    """Text that cannot be continued gives one line, and sample.py goes on; the end of the input is no mistake."""

    def talk(*arguments):
        return run_forked('sample.py', *SAMPLE, '--interactive=True', *arguments, cwd=trained)

    typed = trained.parent / 'typed'
    typed.write_bytes(b'abX\nab\xff\n\ncd\n')
    monkeypatch.setattr(sys, 'stdin', open(typed, encoding='utf-8', errors='surrogateescape'))
    result = talk()
    assert result.returncode == 0, result.stderr
    expected = 'this cannot be continued: the character '
    assert [line[: len(expected)] for line in result.stderr.splitlines()] == 2 * [expected], result.stderr
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))
    assert talk().returncode == 0
    monkeypatch.setattr(sys, 'stdin', None)  # as `<&-` leaves it
    result = talk()
    assert is_one_error_line(result), result.stderr


def test_interactive_prompt_file(trained, monkeypatch):
    """--start=FILE:path means the content of the file here, too."""
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))
    prompt = trained.parent / 'prompt.txt'
    prompt.write_text('abc')
    result = run_forked('sample.py', *SAMPLE, '--interactive=True', f'--start=FILE:{prompt}', cwd=trained)
    assert result.returncode == 0 and not result.stderr, result.stderr


def test_reader_gone(trained):
    """`... | head -1` gives no error message, whether the output is flushed line by line or at the end."""
    reading, writing = os.pipe()
    os.close(reading)
    for script, *arguments in (['sample.py', *SAMPLE, '--json=True'], ['evaluate.py', '--device=cpu']):
        result = run_process(trained, script, *arguments, env={'PYTHONUNBUFFERED': ''}, stdout=writing)
        assert result.stderr == ''
    os.close(writing)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no such device')
def test_disk_full(trained):
    """`... > samples.jsonl` on a full disk."""
    with open('/dev/full', 'w') as full:
        result = run_process(trained, 'sample.py', *SAMPLE, '--json=True', stdout=full)
    assert is_one_error_line(result) and 'No space left' in result.stderr, result.stderr
