"""A person's mistake ends with exit status 2 and one line that says what is wrong and what to do: no traceback, nothing of
the user's overwritten, no code from a data file executed. Every case runs the real script, as a user would."""

import gzip
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys

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

RESUME = [*TINY, '--init_from=resume', '--max_iters=12']
SAMPLE = ['--device=cpu', '--num_samples=1', '--max_new_tokens=4']
BENCH = [
    '--device=cpu',
    '--compile=False',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--batch_size=2',
    '--warmup_steps=0',
    '--steps=1',
    '--dataset=tiny',
]
DECODE = [
    '--mode=decode',
    '--device=cpu',
    '--n_layer=1',
    '--n_head=2',
    '--n_embd=32',
    '--block_size=16',
    '--vocab_size=40',
    '--rounds=1',
    '--num_samples=2',
    '--prompt_tokens=4',
    '--max_new_tokens=4',
]
PREPARE = 'data/text/prepare.py'
META = 'data/tiny/meta.json'
ON_THREE = {'RANK': '0', 'LOCAL_RANK': '0', 'WORLD_SIZE': '3'}  # as torchrun sets it; there is nobody to join


class Code:
    """Unpickled by an unsuspecting reader, this runs a command."""

    def __reduce__(self):
        return os.system, ('touch executed',)


# --- ways to prepare a mistake: each gives a function of the workspace -------------------------------------------------


def put(path, content):
    """Write text, bytes, JSON (a dict or list), or an object that `torch.save` takes for a .pt, in place of a file."""

    def prepare(folder):
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == '.pt' and not isinstance(content, bytes):
            torch.save(content, target)
        else:
            text = content if isinstance(content, (bytes, str)) else json.dumps(content)
            target.write_bytes(text if isinstance(text, bytes) else text.encode())

    return prepare


def drop(*paths):
    return lambda folder: [(folder / path).unlink() for path in paths]


def cut(path, size):
    return lambda folder: os.truncate(folder / path, size)


def ids(path, *values):
    """Overwrite the first ids of a split."""

    def prepare(folder):
        with open(folder / path, 'r+b') as file:
            file.write(b''.join(value.to_bytes(2, 'little') for value in values))

    return prepare


def meta(**changes):
    """Change meta.json; a value of None takes the key out."""

    def prepare(folder):
        content = {**json.loads((folder / META).read_text()), **changes}
        (folder / META).write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    return prepare


def meta_pkl(content):
    """A nanoGPT meta.pkl, of an object or of raw bytes, in place of meta.json."""
    return both(drop(META), put('data/tiny/meta.pkl', content if isinstance(content, bytes) else pickle.dumps(content)))


def forge(change, name='ckpt.pt'):
    """Load a checkpoint, change it in place, save it again."""

    def prepare(folder):
        state = torch.load(folder / 'out' / name, weights_only=True)
        change(state)
        torch.save(state, folder / 'out' / name)

    return prepare


def both(*steps):
    return lambda folder: [step(folder) for step in steps]


def mkdir(path):
    return lambda folder: (folder / path).mkdir(parents=True)


def config(text):
    return put('c.py', text)


def files(**content):
    """Write a text file NAME.txt for each name=text."""
    return both(*(put(f'{name}.txt', text) for name, text in content.items()))


def bare_split(n_tokens):
    """Cut the validation split to so few tokens, and let meta.json tell no sizes."""
    return both(cut('data/tiny/val.bin', 2 * n_tokens), meta(tokens=None))


def library_tokenizer(kind, vocabulary, **model):
    """Give the checkpoint a tokenizer of the tokenizers library."""
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

# name, what prepares it (None: nothing), script, arguments, words in the error line[, environment]
FRESH = [  # in a folder with the data set data/tiny
    # settings
    (
        'unknown_key',
        None,
        'train.py',
        [*TINY, '--batchsize=3'],
        "unknown setting 'batchsize'; the nearest is 'batch_size'",
    ),
    ('float_for_int', None, 'train.py', [*TINY, '--batch_size=1.5'], 'batch_size must be a whole number'),
    ('word_for_float', None, 'train.py', [*TINY, '--learning_rate=fast'], 'learning_rate must be a number'),
    ('number_for_bool', None, 'train.py', [*TINY, '--compile=0'], 'compile must be True or False'),
    ('no_value', None, 'train.py', [*TINY, '--eval_only'], '--eval_only=VALUE'),
    ('no_dashes', None, 'train.py', [*TINY, 'batch_size=3'], 'settings are written --key=value'),
    ('number_too_large_for_a_float', None, PREPARE, ['--val_fraction=1' + 400 * '0'], 'val_fraction'),
    ('two_lines_in_a_setting', None, PREPARE, ['--input=a\nb'], 'there is no such file or folder'),
    (
        'unknown_key_of_a_script_without_settings',
        None,
        'data/python_docs_char/prepare.py',
        ['--mistake=1'],
        "unknown setting 'mistake'",
    ),
    ('config_missing', None, 'tools/plot.py', ['c.py'], 'cannot read the config file c.py'),
    ('config_is_a_folder', mkdir('c.py'), 'tools/plot.py', ['c.py'], 'cannot read the config file c.py'),
    ('config_not_text', config(b'\xff\xfe\x00'), 'tools/plot.py', ['c.py'], 'cannot read the config file c.py'),
    ('config_syntax', config('title = ""\nx = ('), 'tools/plot.py', ['c.py'], 'c.py, line 2: not valid Python'),
    (
        'config_unknown_name',
        config('runz = "out"'),
        'tools/plot.py',
        ['c.py'],
        "c.py: unknown setting 'runz'; the nearest is 'runs'",
    ),
    ('config_wrong_type', config('runs = 3'), 'tools/plot.py', ['c.py'], 'runs must be text in quotes, not 3'),
    (
        'config_raises',
        config('import os\ntitle = 1 // 0'),
        'tools/plot.py',
        ['c.py'],
        'c.py, line 2: ZeroDivisionError',
    ),
    ('config_exits', config('import sys\nsys.exit("no")'), 'tools/plot.py', ['c.py'], 'c.py, line 2'),
    # values
    ('n_embd_by_n_head', None, 'train.py', [*TINY, '--n_head=3'], 'n_embd=32 is not divisible by n_head=3'),
    ('n_layer_0', None, 'train.py', [*TINY, '--n_layer=0'], 'n_layer=0'),
    ('dropout_1', None, 'train.py', [*TINY, '--dropout=1'], '--dropout=1.0: must be in [0, 1)'),
    ('learning_rate_negative', None, 'train.py', [*TINY, '--learning_rate=-1e-3'], '--learning_rate=-0.001'),
    ('learning_rate_infinite', None, 'train.py', [*TINY, '--learning_rate=1e999'], '--learning_rate=inf'),
    ('batch_size_0', None, 'train.py', [*TINY, '--batch_size=0'], '--batch_size=0: must be at least 1'),
    ('beta1_1', None, 'train.py', [*TINY, '--beta1=1'], '--beta1=1.0'),
    (
        'data_order',
        None,
        'train.py',
        [*TINY, '--data_order=sorted'],
        "--data_order=sorted: must be 'random' or 'shuffle'",
    ),
    ('optimizer', None, 'train.py', [*TINY, '--optimizer=sgd'], "--optimizer=sgd: must be 'adamw' or 'muon'"),
    ('muon_without_a_rate', None, 'train.py', [*TINY, '--optimizer=muon', '--learning_rate=0'], '--learning_rate=0'),
    ('muon_momentum', None, 'train.py', [*TINY, '--muon_momentum=1'], '--muon_momentum=1.0: must be in [0, 1)'),
    ('pos', None, 'train.py', [*TINY, '--pos=sinus'], "pos='sinus': must be one of learned, rope, alibi, none"),
    ('norm', None, 'train.py', [*TINY, '--norm=batch'], "norm='batch': must be one of"),
    ('mlp', None, 'train.py', [*TINY, '--mlp=relu'], "mlp='relu': must be one of"),
    ('rope_odd', None, 'train.py', [*TINY, '--pos=rope', '--n_embd=30'], 'the head size must be even'),
    ('n_kv_head', None, 'train.py', [*TINY, '--n_kv_head=3'], 'n_kv_head=3: must divide n_head=2'),
    ('softcap', None, 'train.py', [*TINY, '--logit_softcap=-1'], 'logit_softcap=-1.0'),
    ('vocab_multiple_0', None, 'train.py', [*TINY, '--vocab_multiple=0'], '--vocab_multiple=0'),
    ('cooldown_negative', None, 'train.py', [*TINY, '--cooldown_iters=-1'], '--cooldown_iters=-1'),
    (
        'ramp_no_divisor',
        None,
        'train.py',
        [*TINY, '--batch_ramp_from=3', '--batch_ramp_iters=9'],
        '--batch_ramp_from=3: must divide --gradient_accumulation',
    ),
    (
        'ramp_by_ranks',
        None,
        'train.py',
        [*TINY, '--gradient_accumulation_steps=6', '--batch_ramp_from=2', '--batch_ramp_iters=9'],
        '--batch_ramp_from=2 cannot be divided among 3 ranks: use 3',
        ON_THREE,
    ),
    ('ramp_of_no_length', None, 'train.py', [*TINY, '--batch_ramp_from=1'], '--batch_ramp_from and --batch_ramp_iters'),
    (
        'ramp_endless',
        None,
        'train.py',
        [*TINY, '--batch_ramp_from=1', f'--batch_ramp_iters={10**12}'],
        '--batch_ramp_iters=',
    ),
    ('bench_baseline', None, 'bench.py', ['--baseline=recompute'], '--baseline=recompute: must be eager'),
    (
        'speedrun_no_config',
        None,
        'tools/compare.py',
        ['--contender=c.py', '--baseline=b.py', '--seeds=1'],
        'cannot read the config file b.py',
    ),
    ('speedrun_no_seeds', None, 'tools/compare.py', ['--seeds=0'], '--seeds=0: must be at least 1'),
    ('speedrun_output', None, 'tools/compare.py', ['--output=a.jpg'], '--output=a.jpg: must end in .png'),
    ('speedrun_quotes', None, 'tools/compare.py', ["--baseline=a.py --b='"], 'No closing quotation'),
    ('device_unknown', None, 'train.py', [*TINY, '--device=gpu'], '--device=gpu'),
    pytest.param(
        ('no_cuda', None, 'train.py', [*TINY, '--device=cuda'], 'use --device=auto or --device=cpu'),
        marks=pytest.mark.skipif(torch.cuda.is_available(), reason='there is one'),
    ),
    ('dtype_unknown', None, 'train.py', [*TINY, '--dtype=half'], '--dtype=half: unknown; use auto, float32'),
    ('float16_on_cpu', None, 'train.py', [*TINY, '--dtype=float16'], '--dtype=float16: needs a CUDA device'),
    (
        'accumulation_by_ranks',
        None,
        'train.py',
        TINY,
        '--gradient_accumulation_steps=2 cannot be divided among 3 ranks: use 3',
        ON_THREE,
    ),
    (
        'nccl_on_cpu',
        None,
        'train.py',
        [*TINY, '--gradient_accumulation_steps=3', '--backend=nccl'],
        '--backend=nccl: works between CUDA',
        ON_THREE,
    ),
    (
        'backend_unknown',
        None,
        'train.py',
        [*TINY, '--gradient_accumulation_steps=3', '--backend=mpi'],
        '--backend=mpi: unknown',
        ON_THREE,
    ),
    ('rank_alone', None, 'train.py', TINY, 'start several ranks by torchrun', {'RANK': '0'}),
    ('no_ranks', None, 'train.py', TINY, 'WORLD_SIZE', {**ON_THREE, 'WORLD_SIZE': '0'}),
    ('nowhere_to_join', None, 'train.py', [*TINY, '--gradient_accumulation_steps=3'], 'MASTER_ADDR', ON_THREE),
    ('model_too_large', None, 'train.py', [*TINY, '--n_embd=4000000'], 'memory'),
    ('batch_too_large', None, 'train.py', [*TINY, f'--batch_size={10**15}'], 'memory'),
    (
        'out_dir_below_a_file',
        put('file', 'mine'),
        'train.py',
        [*TINY, '--out_dir=file/out'],
        'cannot write to --out_dir=file/out',
    ),
    ('log_is_a_folder', mkdir('out/metrics.jsonl'), 'train.py', TINY, 'cannot write out/metrics.jsonl'),
    # data sets
    (
        'no_data_set',
        None,
        'train.py',
        [*TINY, '--dataset=large'],
        'there is no data set data/large: run python data/large/prepare.py',
    ),
    (
        'no_train_bin',
        drop('data/tiny/train.bin'),
        'train.py',
        TINY,
        'train.bin is missing: run python data/tiny/prepare.py',
    ),
    ('no_val_bin', drop('data/tiny/val.bin'), 'train.py', TINY, 'val.bin is missing'),
    (
        'bin_is_a_folder',
        both(drop('data/tiny/train.bin'), mkdir('data/tiny/train.bin')),
        'train.py',
        TINY,
        'data/tiny/train.bin',
    ),
    ('bin_empty', cut('data/tiny/train.bin', 0), 'train.py', TINY, 'train.bin: it is empty'),
    ('bin_cut_short', cut('data/tiny/val.bin', 1001), 'train.py', TINY, 'it was cut short'),
    (
        'bin_of_another_size',
        cut('data/tiny/train.bin', 4000),
        'train.py',
        TINY,
        'holds 2000 tokens, meta.json says 4000',
    ),
    (
        'id_beyond_vocabulary',
        ids('data/tiny/val.bin', 1, 29),
        'train.py',
        TINY,
        'val.bin holds the id 29, the vocabulary ends at 28',
    ),
    ('dtype_in_meta', meta(dtype='float64'), 'train.py', TINY, "'dtype' is 'float64', must be uint16 or uint32"),
    ('wider_dtype_in_meta', meta(dtype='uint32'), 'train.py', TINY, 'holds 2000 tokens, meta.json says 4000'),
    ('meta_not_json', put(META, '{"tokens": '), 'train.py', TINY, 'meta.json is not a data set description'),
    ('meta_no_object', put(META, [1, 2]), 'train.py', TINY, 'it holds no JSON object'),
    ('meta_nested_deep', put(META, 100000 * '['), 'train.py', TINY, 'meta.json is not a data set description'),
    (
        'tokenizer_unknown',
        meta(tokenizer={'kind': 'words'}),
        'train.py',
        TINY,
        'data/tiny/meta: unknown kind of tokenizer',
    ),
    (
        'tokenizer_repeats',
        meta(tokenizer={'kind': 'char', 'chars': 'aa'}),
        'train.py',
        TINY,
        'no character stands twice',
    ),
    ('meta_pkl_with_code', meta_pkl(Code()), 'train.py', TINY, 'meta.pkl is not a nanoGPT meta.pkl: it asks to import'),
    ('meta_pkl_corrupt', meta_pkl(b'\x80\x04\x95\xff'), 'train.py', TINY, 'meta.pkl is not a nanoGPT meta.pkl'),
    (
        'meta_pkl_without_vocab_size',
        meta_pkl({'itos': dict(enumerate(CHARS))}),
        'train.py',
        TINY,
        "data/tiny/meta: it has no 'vocab_size'",
    ),
    (
        'meta_pkl_mixed_keys',
        meta_pkl({'vocab_size': 2, 'itos': {0: 'a', 'b': 'c'}}),
        'train.py',
        TINY,
        "its 'itos' does not map",
    ),
    ('meta_pkl_huge', meta_pkl({'vocab_size': 10**15}), 'train.py', TINY, 'memory'),
    ('block_beyond_train', None, 'train.py', [*TINY, '--block_size=4000'], 'train.bin holds 4000 tokens, too few'),
    ('block_beyond_val', None, 'train.py', [*TINY, '--block_size=1000'], 'val.bin holds 1000 tokens, too few'),
    ('block_huge', None, 'train.py', [*TINY, f'--block_size={10**14}'], 'block_size'),
    # pretrained weights
    ('init_from_unknown', None, 'train.py', [*TINY, '--init_from=gpt5'], '--init_from=gpt5: must be resume, gpt2'),
    (
        'init_from_empty_folder',
        mkdir('hf'),
        'train.py',
        [*TINY, '--init_from=hf'],
        'cannot load the pretrained model hf (check the files',
    ),
    (
        'init_from_bert',
        put('hf/config.json', {'model_type': 'bert'}),
        'train.py',
        [*TINY, '--init_from=hf'],
        'only GPT-2 can be imported',
    ),
    (
        'init_from_no_weights',
        put('hf/config.json', GPT2_CONFIG),
        'train.py',
        [*TINY, '--init_from=hf'],
        'cannot load the pretrained',
    ),
    (
        'init_from_code_in_weights',
        both(put('hf/config.json', GPT2_CONFIG), lambda f: torch.save(Code(), f / 'hf/pytorch_model.bin')),
        'train.py',
        [*TINY, '--init_from=hf'],
        'cannot load the pretrained model hf',
    ),
    # before there is a run
    ('resume_nothing', None, 'train.py', RESUME, 'there is no out/ckpt.pt: train first'),
    ('sample_nothing', None, 'sample.py', SAMPLE, 'there is no out/ckpt.pt: train first'),
    ('plot_nothing', None, 'tools/plot.py', [], 'cannot read out/metrics.jsonl, train first or check --runs'),
    ('plot_no_metrics', put('out/metrics.jsonl', 'nothing yet\n'), 'tools/plot.py', [], 'holds no losses yet'),
    ('plot_no_folder', None, 'tools/plot.py', ['--runs='], '--runs='),
    ('plot_axis', None, 'tools/plot.py', ['--x=epochs'], "--x=epochs: must be 'iter' or 'seconds'"),
    (
        'plot_format',
        put('out/metrics.jsonl', LOSS),
        'tools/plot.py',
        ['--output=out/metrics.jsonl'],
        'must end in .png',
    ),
    (
        'plot_output_below_a_file',
        put('out/metrics.jsonl', LOSS),
        'tools/plot.py',
        ['--output=out/metrics.jsonl/x.png'],
        'cannot write',
    ),
    (
        'plot_loss_is_text',
        put('out/metrics.jsonl', {'iter': 0, 'loss': {'a': 1}}),
        'tools/plot.py',
        [],
        'out/metrics.jsonl',
    ),
    (
        'plot_half_an_evaluation',
        put('out/metrics.jsonl', {'iter': 0, 'val/loss': 3.4}),
        'tools/plot.py',
        [],
        'out/metrics.jsonl',
    ),
    (
        'plot_no_times',
        put('out/metrics.jsonl', {'iter': 0, 'loss': 3.4}),
        'tools/plot.py',
        ['--x=seconds'],
        'out/metrics.jsonl',
    ),
    ('bench_shape', None, 'bench.py', [*BENCH, '--n_head=3'], 'n_embd=32 is not divisible by n_head=3'),
    (
        'bench_vocabulary',
        None,
        'bench.py',
        [*BENCH, '--vocab_size=10'],
        'train.bin holds the id 28, the vocabulary ends at 9',
    ),
    ('bench_block', None, 'bench.py', [*BENCH, '--block_size=4000'], 'train.bin holds 4000 tokens, too few'),
    ('bench_memory', None, 'bench.py', [*BENCH, f'--block_size={10**13}'], 'memory'),
    (
        'bench_trace',
        None,
        'bench.py',
        [*BENCH, '--profile=True', '--trace_file=no/t.json'],
        'cannot write --trace_file=no/t.json',
    ),
    ('bench_mode', None, 'bench.py', [*DECODE, '--mode=Decode'], '--mode=Decode: must be train or decode'),
    (
        'decode_baseline',
        None,
        'bench.py',
        [*DECODE, '--baseline=hf'],
        '--baseline=hf: must be transformers or recompute',
    ),
    ('decode_quantize', None, 'bench.py', [*DECODE, '--quantize=int4'], '--quantize=int4: unknown; use int8'),
    ('decode_rounds_0', None, 'bench.py', [*DECODE, '--rounds=0'], '--rounds=0: must be at least 1'),
    ('decode_no_prompt', None, 'bench.py', [*DECODE, '--prompt_tokens=0'], '--prompt_tokens=0: must be from 1'),
    (
        'decode_nothing_after_the_first',
        None,
        'bench.py',
        [*DECODE, '--max_new_tokens=1'],
        '--max_new_tokens=1: must be from 2',
    ),
    ('decode_shape', None, 'bench.py', [*DECODE, '--n_head=3'], 'n_embd=32 is not divisible by n_head=3'),
    ('decode_prompt_beyond_memory', None, 'bench.py', [*DECODE, f'--prompt_tokens={10**15}'], '--prompt_tokens'),
    ('decode_beyond_int64', None, 'bench.py', [*DECODE, f'--max_new_tokens={10**30}'], '--max_new_tokens'),
    ('decode_vocabulary_beyond_int64', None, 'bench.py', [*DECODE, f'--vocab_size={10**30}'], 'vocab_size'),
    ('decode_many_at_once', None, 'bench.py', [*DECODE, '--num_samples=65537'], '--num_samples=65537'),
    (
        'decode_beyond_block_of_baseline',
        None,
        'bench.py',
        [*DECODE, '--prompt_tokens=14', '--baseline=transformers'],
        '--baseline=transformers',
    ),
    ('train_quantized', None, 'bench.py', [*BENCH, '--quantize=int8'], '--quantize=int8'),
    ('train_with_baseline', None, 'bench.py', [*BENCH, '--baseline=recompute'], '--baseline=recompute'),
    ('decode_profile', None, 'bench.py', [*DECODE, '--profile=True'], '--profile=True'),
    ('evaluate_nothing', None, 'evaluate.py', ['--device=cpu'], 'there is no out/ckpt.pt: train first'),
    (
        'evaluate_before_training',
        None,
        'evaluate.py',
        ['--device=cpu', '--dataset=tiny', '--init_from=scratch'],
        '--init_from=scratch: must be resume',
    ),
    # texts
    ('text_missing', None, PREPARE, ['--input=mistake.txt'], '--input=mistake.txt: there is no such file or folder'),
    ('text_none', None, PREPARE, [], 'which text? give --input=FILE_OR_FOLDER'),
    (
        'text_binary',
        put('mistake.txt', bytes(range(256))),
        PREPARE,
        ['--input=mistake.txt'],
        'is not UTF-8 text (byte 128)',
    ),
    ('text_zeros', put('mistake.txt', 1000 * b'\0\1'), PREPARE, ['--input=mistake.txt'], 'mistake.txt'),
    ('text_empty', put('mistake.txt', ''), PREPARE, ['--input=mistake.txt'], 'there is no text in mistake.txt'),
    ('text_one_character', put('mistake.txt', 'a'), PREPARE, ['--input=mistake.txt'], 'too few to split'),
    (
        'text_folder_without',
        put('mistake/image.png', b'\x89PNG\xff'),
        PREPARE,
        ['--input=mistake'],
        'there is no text in mistake',
    ),
    (
        'text_val_fraction',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--val_fraction=1'],
        '--val_fraction=1.0',
    ),
    (
        'text_tokenizer',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--tokenizer=word'],
        '--tokenizer=word: must be',
    ),
    (
        'text_name',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--name=../mistake'],
        "--name='../mistake': must be",
    ),
    (
        'text_no_json',
        put('mistake.jsonl', '{"text": "abc"}\n{"text": \n'),
        PREPARE,
        ['--input=mistake.jsonl'],
        'mistake.jsonl, byte 16: this is no line of JSON',
    ),
    (
        'text_json_list',
        put('mistake.jsonl', '["abc"]\n'),
        PREPARE,
        ['--input=mistake.jsonl', '--tokenizer=byte'],
        'no JSON object with',
    ),
    (
        'text_json_without',
        put('mistake.jsonl', '{"content": "abc"}\n'),
        PREPARE,
        ['--input=mistake.jsonl', '--tokenizer=byte'],
        "mistake.jsonl, byte 0: no JSON object with a text 'text'; --text_key= names another field",
    ),
    (
        'text_gz_is_none',
        put('mistake.jsonl.gz', b'no gzip'),
        PREPARE,
        ['--input=mistake.jsonl.gz'],
        'cannot read mistake.jsonl.gz',
    ),
    (
        'text_gz_cut_short',
        put('mistake.jsonl.gz', gzip.compress(b'{"text": "abc"}\n' * 99)[:-9]),
        PREPARE,
        ['--input=mistake.jsonl.gz'],
        'cannot read mistake.jsonl.gz',
    ),
    (
        'text_zst_is_none',
        put('mistake.jsonl.zst', b'no zstandard'),
        PREPARE,
        ['--input=mistake.jsonl.zst'],
        'mistake.jsonl.zst',
    ),
    (
        'text_parquet_is_none',
        put('mistake.parquet', b'no table'),
        PREPARE,
        ['--input=mistake.parquet'],
        'mistake.parquet',
    ),
    ('text_bare_argument', None, PREPARE, ['novel.txt'], '--input=novel.txt: there is no such file or folder'),
    ('text_pipe', None, PREPARE, ['--input=/dev/null'], '/dev/null is neither a file nor a folder'),
    (
        'text_blank_lines',
        put('mistake.jsonl', '\n\n'),
        PREPARE,
        ['--input=mistake.jsonl', '--tokenizer=byte'],
        'there is no text in the input',
    ),
    (
        'text_not_utf8_json',
        put('mistake.jsonl', b'\xff\xfe\n'),
        PREPARE,
        ['--input=mistake.jsonl'],
        'byte 0: this is no line of JSON',
    ),
    (
        'unfinished_preparation',
        lambda f: ((f / 'data/tiny/train.bin').unlink(), (f / 'data/tiny/preparing').mkdir()),
        'train.py',
        TINY,
        'train.bin is missing: its preparation is not finished',
    ),
    (
        'text_one_document',
        put('mistake.jsonl', '{"text": "abc"}\n'),
        PREPARE,
        ['--input=mistake.jsonl'],
        'fewer than two different documents',
    ),
    (
        'tokenizer_bpe_without',
        meta(tokenizer={'kind': 'bpe', 'json': '{}'}),
        'train.py',
        TINY,
        'not the tokenizer.json of a',
    ),
    (
        'text_vocab_size',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--tokenizer=bpe', '--vocab_size=256'],
        '--vocab_size=256: must be from 257',
    ),
    (
        'text_vocab_too_large',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--tokenizer=bpe'],
        'the text is enough for',
    ),
    (
        'text_workers',
        put('mistake.txt', 'abc' * 99),
        PREPARE,
        ['--input=mistake.txt', '--workers=-1'],
        '--workers=-1: must be 0 or more',
    ),
    (
        'align_without_ends',
        None,
        'train.py',
        [*TINY, '--align_documents=True'],
        'data/tiny has no token that ends a document',
    ),
    (
        'text_of_shakespeare',
        None,
        'data/shakespeare_char/prepare.py',
        ['--input=mistake.txt'],
        'cannot read mistake.txt',
    ),
    # what is not what it was taken for
    (
        'text_html',
        put('mistake.html', '<p>abc'),
        PREPARE,
        ['--input=mistake.html'],
        'mistake.html: .html files are not read, make it',
    ),
    (
        'text_json_object',
        put('mistake.json', '{\n"name": "abc"\n}'),
        PREPARE,
        ['--input=mistake.json'],
        'mistake.json is neither an array',
    ),
    (
        'text_json_array',
        put('mistake.json', '["abc", "def"'),
        PREPARE,
        ['--input=mistake.json'],
        'mistake.json is no array of JSON: after',
    ),
    (
        'text_csv_column',
        put('mistake.csv', 'n,content\n1,abc\n'),
        PREPARE,
        ['--input=mistake.csv'],
        "must name one column 'text'",
    ),
    (
        'text_csv_fields',
        put('mistake.csv', 'n,text\n1,a, b\n'),
        PREPARE,
        ['--input=mistake.csv'],
        'mistake.csv, line 2: 3 fields',
    ),
    (
        'text_link',
        lambda f: ((f / 'mistake').mkdir(), (f / 'mistake/a.txt').symlink_to('gone')),
        PREPARE,
        ['--input=mistake'],
        'mistake/a.txt is a link to something that is not there',
    ),
    (
        'text_tokenizer_folder',
        both(mkdir('hf'), put('mistake.txt', 'abc' * 99)),
        PREPARE,
        ['--input=mistake.txt', '--tokenizer=hf'],
        '--tokenizer=hf: there is no tokenizer.json in it',
    ),
    (
        'text_tokenizer_broken',
        both(put('hf/tokenizer.json', '{"model":'), put('mistake.txt', 'abc' * 99)),
        PREPARE,
        ['--input=mistake.txt', '--tokenizer=hf'],
        'cannot read hf/tokenizer.json: not a tokenizer.json',
    ),
    (
        'meta_vocab_size',
        meta(vocab_size=-29),
        'train.py',
        TINY,
        "meta.json is not a data set description (prepare the data again): 'vocab",
    ),
    (
        'meta_tokens',
        meta(tokens={'train': '4000'}),
        'train.py',
        TINY,
        "'tokens' must be a whole number for train and one for val",
    ),
    (
        'meta_pkl_two_ways',
        meta_pkl({'vocab_size': 2, 'itos': {0: 'a', 1: 'b'}, 'stoi': {'a': 1, 'b': 0}}),
        'train.py',
        TINY,
        'contradict',
    ),
    (
        'bin_wider',
        both(meta(tokens=None), put('data/tiny/train.bin', b'\1\0\0\0' * 500)),
        'train.py',
        TINY,
        'data/tiny/train.bin: every second id is 0',
    ),
]
TRAINED = [  # the same, and a run of 8 updates in out/
    # checkpoints that are none
    (
        'resume_random_bytes',
        put('out/ckpt.pt', bytes(range(256)) * 99),
        'train.py',
        RESUME,
        'out/ckpt.pt cannot be read as a checkpoint',
    ),
    ('resume_cut_short', cut('out/ckpt.pt', 20000), 'train.py', RESUME, 'out/ckpt.pt cannot be read as a checkpoint'),
    ('sample_cut_short', cut('out/ckpt.pt', 20000), 'sample.py', SAMPLE, 'out/ckpt.pt cannot be read as a checkpoint'),
    (
        'resume_other_dict',
        put('out/ckpt.pt', {'epoch': 3}),
        'train.py',
        RESUME,
        "of SAMgpt or nanoGPT: it has no 'model'",
    ),
    ('resume_list', put('out/ckpt.pt', [1, 2]), 'train.py', RESUME, 'is not a checkpoint of SAMgpt or nanoGPT'),
    (
        'sample_tensor',
        put('out/ckpt.pt', torch.ones(3)),
        'sample.py',
        SAMPLE,
        'is not a checkpoint of SAMgpt or nanoGPT',
    ),
    (
        'resume_code',
        put('out/ckpt.pt', Code()),
        'train.py',
        RESUME,
        'out/ckpt.pt cannot be read as a checkpoint: it holds code',
    ),
    (
        'sample_code',
        put('out/ckpt.pt', Code()),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt cannot be read as a checkpoint: it holds code',
    ),
    (
        'resume_bare_pickle',
        put('out/ckpt.pt', pickle.dumps(Code())),
        'train.py',
        RESUME,
        'out/ckpt.pt cannot be read as a checkpoint',
    ),
    (
        'code_in_old_format',
        lambda f: torch.save({'model': Code()}, f / 'out/ckpt.pt', _use_new_zipfile_serialization=False),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt cannot be read as a checkpoint: it holds code',
    ),
    # checkpoints that contradict the settings or themselves
    (
        'resume_other_shape',
        None,
        'train.py',
        [*RESUME, '--n_layer=3'],
        '--n_layer=3: the run in out/ckpt.pt has n_layer=2',
    ),
    (
        'weights_of_other_width',
        forge(lambda s: s['model_args'].update(n_embd=64)),
        'train.py',
        [a for a in RESUME if 'n_embd' not in a],
        'out/ckpt.pt: the weights do not fit the model_args',
    ),
    (
        'weights_missing',
        forge(lambda s: s['model'].pop('transformer.ln_f.weight')),
        'sample.py',
        SAMPLE,
        'the weights do not fit',
    ),
    (
        'weights_are_text',
        forge(lambda s: s['model'].update({'transformer.ln_f.weight': 'x'})),
        'sample.py',
        SAMPLE,
        'not tensors',
    ),
    (
        'weights_without_names',
        forge(lambda s: s['model'].update({1: torch.ones(2)})),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt',
    ),
    (
        'weights_not_finite',
        forge(lambda s: s['model']['transformer.ln_f.weight'].fill_(float('nan'))),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt',
    ),
    (
        'forged_n_layer',
        forge(lambda s: s['model_args'].update(n_layer=10**9)),
        'sample.py',
        SAMPLE,
        'n_layer=1000000000, but there are',
    ),
    (
        'forged_vocab_size',
        forge(lambda s: s['model_args'].update(vocab_size=10**14)),
        'sample.py',
        SAMPLE,
        'the weights do not fit',
    ),
    (
        'forged_vocab_size_beyond_int64',
        forge(lambda s: s['model_args'].update(vocab_size=10**30)),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt',
    ),
    (
        'forged_field',
        forge(lambda s: s['model_args'].update(n_expert=8)),
        'sample.py',
        SAMPLE,
        'the weights do not fit the model_args',
    ),
    (
        'forged_expanded_weights',
        forge(
            lambda s: (
                s['model_args'].update(block_size=10**13),
                s['model'].update(
                    {'transformer.wpe.weight': torch.zeros(1, 1, dtype=torch.float16).expand(10**13, 32)}
                ),
            )
        ),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt',
    ),
    ('forged_iter_num', forge(lambda s: s.update(iter_num=-3)), 'train.py', RESUME, 'out/ckpt.pt'),
    ('forged_best_val_loss', forge(lambda s: s.update(best_val_loss=None)), 'train.py', RESUME, 'out/ckpt.pt'),
    (
        'forged_best_iter',
        forge(lambda s: s.update(best_iter='x')),
        'train.py',
        [*RESUME, '--patience=1'],
        'out/ckpt.pt',
    ),
    ('forged_evaluated_at', forge(lambda s: s.update(evaluated_at='x')), 'train.py', RESUME, 'out/ckpt.pt'),
    (
        'forged_tokenizer',
        forge(lambda s: s.update(tokenizer={'kind': 'char', 'chars': ''})),
        'sample.py',
        SAMPLE,
        'out/ckpt.pt is not a sound checkpoint: a char',
    ),
    (
        'tokenizer_of_other_size',
        forge(lambda s: s.update(tokenizer={'kind': 'char', 'chars': CHARS + 'ABC'})),
        'sample.py',
        SAMPLE,
        'the tokenizer has 32 ids, the model 29',
    ),
    (
        'tokenizer_of_other_data',
        lambda f: write_data(f / 'data/other', chars=CHARS.upper()),
        'train.py',
        [*RESUME, '--dataset=other'],
        'was trained with another tokenizer than that of data/other',
    ),
    # optimizer files
    ('optimizer_missing', drop(f'out/{OPTIMIZER}'), 'train.py', RESUME, f'there is no out/{OPTIMIZER}'),
    (
        'optimizer_elsewhere',
        both(forge(lambda s: s.update(optimizer_file='../optimizer.pt')), put('optimizer.pt', {'optimizer': {}})),
        'train.py',
        RESUME,
        'names no optimizer file',
    ),
    (
        'optimizer_random_bytes',
        put(f'out/{OPTIMIZER}', b'\0' * 999),
        'train.py',
        RESUME,
        f'out/{OPTIMIZER} cannot be read',
    ),
    (
        'optimizer_code',
        put(f'out/{OPTIMIZER}', {'optimizer': Code()}),
        'train.py',
        RESUME,
        f'out/{OPTIMIZER} cannot be read',
    ),
    ('optimizer_other_dict', put(f'out/{OPTIMIZER}', {'optimizer': [1]}), 'train.py', RESUME, 'is not one'),
    (
        'optimizer_groups',
        forge(lambda s: s['optimizer'].update(param_groups=[1, 2]), OPTIMIZER),
        'train.py',
        RESUME,
        'optimizer',
    ),
    (
        'optimizer_of_other_shape',
        forge(lambda s: s['optimizer']['state'][1].update(exp_avg=torch.ones(3, 5)), OPTIMIZER),
        'train.py',
        RESUME,
        'exp_avg of parameter 1 is not a tensor of (16, 32)',
    ),
    (
        'optimizer_index',
        forge(lambda s: s['optimizer']['state'].update({99: {'exp_avg': torch.ones(2)}}), OPTIMIZER),
        'train.py',
        RESUME,
        'optimizer',
    ),
    (
        'optimizer_half',
        forge(lambda s: s['optimizer']['state'][1].pop('exp_avg_sq'), OPTIMIZER),
        'train.py',
        RESUME,
        'optimizer',
    ),
    (
        'resume_log_is_a_folder',
        both(drop('out/metrics.jsonl'), mkdir('out/metrics.jsonl')),
        'train.py',
        RESUME,
        'out/metrics.jsonl',
    ),
    # sampling
    (
        'prompt_of_other_characters',
        None,
        'sample.py',
        [*SAMPLE, '--start=abcX'],
        "the character 'X' at position 3 is not among the 29",
    ),
    ('prompt_empty', None, 'sample.py', [*SAMPLE, '--start='], 'at least one token'),
    ('prompt_file_missing', None, 'sample.py', [*SAMPLE, '--start=FILE:p.txt'], 'cannot read the prompt p.txt'),
    (
        'prompt_file_not_text',
        put('p.txt', b'ab\xff'),
        'sample.py',
        [*SAMPLE, '--start=FILE:p.txt'],
        'cannot read the prompt p.txt',
    ),
    ('num_samples_0', None, 'sample.py', [*SAMPLE, '--num_samples=0'], '--num_samples=0: must be at least 1'),
    ('temperature_negative', None, 'sample.py', [*SAMPLE, '--temperature=-1'], '--temperature=-1.0: must be 0 or more'),
    (
        'out_dir_missing',
        None,
        'sample.py',
        [*SAMPLE, '--out_dir=elsewhere'],
        'there is no elsewhere/ckpt.pt: train first, or check',
    ),
    ('prompt_path_empty', None, 'sample.py', [*SAMPLE, '--start=FILE:'], 'cannot read the prompt'),
    ('prompt_file_is_a_folder', None, 'sample.py', [*SAMPLE, '--start=LINES:data'], 'cannot read the prompt data'),
    (
        'prompt_file_empty',
        files(p=''),
        'sample.py',
        [*SAMPLE, '--start=FILE:p.txt'],
        'p.txt: a prompt must have at least one',
    ),
    (
        'prompt_lines_all_blank',
        files(p='\n\n\n'),
        'sample.py',
        [*SAMPLE, '--start=LINES:p.txt'],
        'no lines with anything',
    ),
    (
        'prompt_lines_not_text',
        put('p.txt', b'ab\ncd\xff\n'),
        'sample.py',
        [*SAMPLE, '--start=LINES:p.txt'],
        'cannot read the prompt p.txt',
    ),
    ('prompt_third_line', files(p='abc\nabc\nabX\n'), 'sample.py', [*SAMPLE, '--start=LINES:p.txt'], 'line 3'),
    (
        'prompt_second_file_missing',
        files(a='abc'),
        'sample.py',
        [*SAMPLE, '--start=FILES:a.txt,b.txt'],
        'cannot read the prompt b.txt',
    ),
    (
        'prompt_list_ends_in_a_comma',
        files(a='abc'),
        'sample.py',
        [*SAMPLE, '--start=FILES:a.txt,'],
        'cannot read the prompt',
    ),
    (
        'prompt_second_file',
        files(a='abc', second='abX'),
        'sample.py',
        [*SAMPLE, f'--start=FILES:{"./" * 20}a.txt,second.txt'],
        "second.txt: the character 'X'",
    ),
    (
        'prompt_second_file_empty',
        files(a='abc', second=''),
        'sample.py',
        [*SAMPLE, f'--start=FILES:{"./" * 20}a.txt,second.txt'],
        'second.txt: a prompt must have',
    ),
    (
        'prompt_path_in_lower_case',
        files(p='abc'),
        'sample.py',
        [*SAMPLE, '--start=file:p.txt'],
        "the character ':' at position 4",
    ),
    (
        'prompt_not_unicode',
        library_tokenizer('BPE', {'a': 0}, merges=[]),
        'sample.py',
        [*SAMPLE, '--start=a\udcff'],
        '--start=a',
    ),
    (
        'prompt_of_unknown_words',
        library_tokenizer('WordLevel', {'a': 0}, unk_token='?'),
        'sample.py',
        [*SAMPLE, '--start=z'],
        '--start=z',
    ),
    (
        'prompt_of_no_known_piece',
        library_tokenizer('BPE', {'a': 0}, merges=[]),
        'sample.py',
        [*SAMPLE, '--start=az'],
        "no token for the character 'z' at position 1",
    ),
    (
        'tokenizer_with_holes',
        library_tokenizer('BPE', {'a': 0, 'b': 300}, merges=[]),
        'sample.py',
        [*SAMPLE, '--start=b'],
        'they do not belong together',
    ),
    (
        'tokenizer_json_broken',
        forge(lambda s: s.update(tokenizer={'kind': 'tokenizers', 'json': '{"model":'})),
        'sample.py',
        SAMPLE,
        'not a tokenizer.json of the tokenizers library',
    ),
    ('top_p_nan', None, 'sample.py', [*SAMPLE, '--top_p=nan'], 'top_p must be a number'),
    (
        'top_p_nan_in_config',
        config('top_p = float("nan")'),
        'sample.py',
        [*SAMPLE, 'c.py'],
        '--top_p=nan: must be above 0 and at most 1',
    ),
    ('top_p_0', None, 'sample.py', [*SAMPLE, '--top_p=0'], '--top_p=0.0: must be above 0 and at most 1'),
    ('top_p_percent', None, 'sample.py', [*SAMPLE, '--top_p=95'], '--top_p=95.0: must be above 0 and at most 1'),
    ('top_p_with_decimal_comma', None, 'sample.py', [*SAMPLE, '--top_p=0,9'], 'top_p must be a number, not (0, 9)'),
    ('min_p_negative', None, 'sample.py', [*SAMPLE, '--min_p=-0.1'], '--min_p=-0.1: must be from 0 to 1'),
    ('min_p_infinite', None, 'sample.py', [*SAMPLE, '--min_p=1e999'], '--min_p=inf: must be from 0 to 1'),
    (
        'temperature_nan_in_config',
        config('temperature = float("nan")'),
        'sample.py',
        [*SAMPLE, 'c.py'],
        '--temperature=nan: must be',
    ),
    ('top_k_negative', None, 'sample.py', [*SAMPLE, '--top_k=-1'], '--top_k=-1: must be 0 or more'),
    ('seed_negative', None, 'sample.py', [*SAMPLE, '--seed=-1'], '--seed=-1: must be 0 or more'),
    (
        'repetition_penalty_0',
        None,
        'sample.py',
        [*SAMPLE, '--repetition_penalty=0'],
        '--repetition_penalty=0.0: must be from 0.01',
    ),
    (
        'repetition_penalty_infinite',
        None,
        'sample.py',
        [*SAMPLE, '--repetition_penalty=1e999'],
        '--repetition_penalty=inf',
    ),
    (
        'repetition_penalty_near_0',
        None,
        'sample.py',
        [*SAMPLE, '--repetition_penalty=1e-40'],
        '--repetition_penalty=1e-40',
    ),
    ('max_new_tokens_beyond_memory', None, 'sample.py', [*SAMPLE, f'--max_new_tokens={10**15}'], '--max_new_tokens'),
    (
        'too_many_at_once',
        None,
        'sample.py',
        [*SAMPLE, '--batch_size=1e10'],
        '--batch_size=10000000000: must be from 1 to 65536',
    ),
    ('stop_without_value', None, 'sample.py', [*SAMPLE, '--stop'], '--stop: write it as --stop=VALUE'),
    (
        'stop_number_in_config',
        config('stop = 5'),
        'sample.py',
        [*SAMPLE, 'c.py'],
        'c.py: stop must be a tuple of texts, not 5',
    ),
    (
        'stop_bare_text_in_config',
        config('stop = ("end")'),
        'sample.py',
        [*SAMPLE, 'c.py'],
        "stop must be a tuple of texts, not 'end'",
    ),
    ('stop_mixed_in_config', config('stop = ("end", 5)'), 'sample.py', [*SAMPLE, 'c.py'], "not ('end', 5)"),
    (
        'interactive_json',
        None,
        'sample.py',
        [*SAMPLE, '--interactive=True', '--json=True'],
        '--interactive=True and --json=True: choose',
    ),
    (
        'interactive_prompt',
        None,
        'sample.py',
        [*SAMPLE, '--interactive=True', '--start=abX'],
        "--start=abX: the character 'X'",
    ),
    (
        'interactive_many_prompts',
        files(p='ab\ncd\n'),
        'sample.py',
        [*SAMPLE, '--interactive=True', '--start=LINES:p.txt'],
        '--interactive=True',
    ),
    (
        'quantize_unknown',
        None,
        'sample.py',
        [*SAMPLE, '--quantize=int4'],
        '--quantize=int4: unknown; use int8, or leave it out',
    ),
    (
        'overflowing_quantized',
        forge(lambda s: [w.mul_(1e12) for w in s['model'].values()]),
        'sample.py',
        [*SAMPLE, '--quantize=int8'],
        'numbers that are not finite',
    ),
    # evaluating
    ('evaluate_split', None, 'evaluate.py', ['--device=cpu', '--split=test'], '--split=test: must be train or val'),
    (
        'evaluate_block',
        None,
        'evaluate.py',
        ['--device=cpu', '--block_size=17'],
        '--block_size=17: the model has 16 positions',
    ),
    (
        'evaluate_batch_size_0',
        None,
        'evaluate.py',
        ['--device=cpu', '--batch_size=0'],
        '--batch_size=0: must be from 1',
    ),
    (
        'evaluate_batch_size_beyond_int64',
        None,
        'evaluate.py',
        ['--device=cpu', f'--batch_size={10**30}'],
        '--batch_size',
    ),
    (
        'evaluate_eval_iters',
        None,
        'evaluate.py',
        ['--device=cpu', '--eval_iters=-1'],
        '--eval_iters=-1: must be 0 or more',
    ),
    ('evaluate_quantize', None, 'evaluate.py', ['--device=cpu', '--quantize=INT8'], '--quantize=INT8: unknown'),
    ('evaluate_setting_of_sample', None, 'evaluate.py', ['--device=cpu', '--top_p=0.5'], "unknown setting 'top_p'"),
    ('evaluate_optimizer_file', None, 'evaluate.py', ['--device=cpu', f'--ckpt={OPTIMIZER}'], "it has no 'model'"),
    (
        'evaluate_no_data_set',
        None,
        'evaluate.py',
        ['--device=cpu', '--dataset=large'],
        'there is no data set data/large',
    ),
    (
        'evaluate_data_set_gone',
        forge(lambda s: s['config'].update(dataset='gone')),
        'evaluate.py',
        ['--device=cpu'],
        'there is no data set data/gone',
    ),
    (
        'evaluate_data_set_unnamed',
        forge(lambda s: s['config'].pop('dataset')),
        'evaluate.py',
        ['--device=cpu'],
        '--dataset= is needed',
    ),
    (
        'evaluate_data_set_no_text',
        forge(lambda s: s['config'].update(dataset=5)),
        'evaluate.py',
        ['--device=cpu'],
        '--dataset= is needed',
    ),
    ('evaluate_no_val_bin', drop('data/tiny/val.bin'), 'evaluate.py', ['--device=cpu'], 'val.bin is missing'),
    (
        'evaluate_id_beyond_vocabulary',
        ids('data/tiny/val.bin', 1, 29),
        'evaluate.py',
        ['--device=cpu'],
        'val.bin holds the id 29',
    ),
    ('evaluate_one_token', bare_split(1), 'evaluate.py', ['--device=cpu'], 'val.bin holds 1 tokens, too few'),
    (
        'evaluate_other_tokenizer',
        lambda f: write_data(f / 'data/other', chars=CHARS.upper()),
        'evaluate.py',
        ['--device=cpu', '--dataset=other'],
        'data/other was prepared with another tokenizer',
    ),
    (
        'evaluate_other_characters_of_nanogpt',
        meta_pkl({'vocab_size': 29, 'itos': dict(enumerate(CHARS.upper()))}),
        'evaluate.py',
        ['--device=cpu'],
        'data/tiny was prepared with another tokenizer',
    ),
    (
        'evaluate_tokenizer_unknown',
        meta(tokenizer={'kind': 'words'}),
        'evaluate.py',
        ['--device=cpu'],
        'data/tiny/meta: unknown kind of tokenizer',
    ),
    (
        'evaluate_overflowing',
        forge(lambda s: [w.mul_(1e12) for w in s['model'].values()]),
        'evaluate.py',
        ['--device=cpu'],
        'not finite',
    ),
    (
        'no_best',
        drop('out/ckpt_best.pt'),
        'sample.py',
        [*SAMPLE, '--ckpt=ckpt_best.pt'],
        'there is no out/ckpt_best.pt',
    ),
]


# --- the tests --------------------------------------------------------------------------------------------------------


def files_in(folder):
    """Every file below a folder, but for Python's own -> {path: content}."""
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and '__pycache__' not in path.parts}


def preload(arguments):
    """Import here, once for all forks, what a case needs that takes seconds to import."""
    if any(argument.startswith('--init_from=') for argument in arguments):
        from transformers import AutoConfig, GPT2LMHeadModel  # noqa: F401


def check(folder, name, prepare, script, arguments, words, env=None):
    if prepare:
        prepare(folder)
    where = copy_scripts(folder / 'copied') if script.startswith('data/') else REPO
    before = files_in(folder)
    preload(arguments)
    result = run_forked(where / script, *arguments, cwd=folder, **(env or {}))
    assert result.returncode == 2, f'{result.stdout}\n{result.stderr}'
    assert 'Traceback' not in result.stdout + result.stderr
    assert (
        result.stderr.startswith('error: ') and result.stderr.endswith('\n') and len(result.stderr.splitlines()) == 1
    ), result.stderr
    assert words in result.stderr
    after = files_in(folder)
    assert not (folder / 'executed').exists(), 'code from a data file was executed'
    assert {path: after.get(path) for path in before} == before, 'a file has changed'
    assert not [path for path in after if path not in before], 'a mistake left a file behind'


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A workspace in which train.py has made 8 updates; cases get a copy of it."""
    workspace = tmp_path_factory.mktemp('trained')
    write_data(workspace / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, cwd=workspace)
    assert (workspace / 'out' / OPTIMIZER).exists() and (workspace / 'out' / 'ckpt_best.pt').exists()
    return workspace


@pytest.mark.parametrize('case', FRESH, ids=lambda case: case[0])
def test_mistakes(workspace, case):
    check(workspace, *case)


@pytest.mark.parametrize('case', TRAINED, ids=lambda case: case[0])
def test_mistakes_with_a_run(trained, tmp_path, case):
    check(shutil.copytree(trained, tmp_path / 'copy'), *case)


def check_two_ranks(folder, name, prepare, script, arguments, words, env=None):
    """Two ranks say what one says: at least one of them, and none anything else."""
    if prepare:
        prepare(folder)
    preload(arguments)
    results = run_forked_ranks(2, script, *arguments, cwd=folder)
    errors = [line for result in results for line in result.stderr.splitlines() if line.startswith('error')]
    errors = [
        line for line in errors if 'connection to another rank' not in line and 'cannot connect the ranks' not in line
    ]
    assert errors and all(words in line for line in errors), [result.stderr for result in results]
    assert all(
        result.returncode in (2, -signal.SIGKILL) and 'Traceback' not in result.stdout + result.stderr
        for result in results
    )


@pytest.mark.parametrize(
    'case', [case for case in FRESH if case[2] == 'train.py' and len(case) == 5], ids=lambda case: case[0]
)
def test_mistakes_on_two_ranks(workspace, case):
    check_two_ranks(workspace, *case)


@pytest.mark.parametrize(
    'case', [case for case in TRAINED if case[2] == 'train.py' and len(case) == 5], ids=lambda case: case[0]
)
def test_mistakes_with_a_run_on_two_ranks(trained, tmp_path, case):
    check_two_ranks(shutil.copytree(trained, tmp_path / 'copy'), *case)


def test_no_consent_to_code(workspace):
    """transformers offers to run the code beside a model; a y on standard input, piped in or typed, must not reach it."""
    put('hf/config.json', {'model_type': 'other', 'auto_map': {'AutoConfig': 'other.Other'}})(workspace)
    put('hf/other.py', 'open("executed", "w")\nclass Other: pass\n')(workspace)
    result = subprocess.run(
        [sys.executable, str(REPO / 'sample.py'), '--init_from=hf', '--device=cpu'],
        cwd=workspace,
        input='y\n',
        env=environment(HF_HOME=str(workspace / 'home')),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert 'cannot load the pretrained model hf' in result.stderr
    assert not (workspace / 'executed').exists(), 'code from a data file was executed'


def test_diverging(workspace):
    """A learning rate far too high ends the run in one line, too, and nothing broken is saved."""
    result = run_forked('train.py', *TINY, '--learning_rate=1e30', '--min_lr=1e30', cwd=workspace)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert 'lower --learning_rate' in result.stderr
    assert torch.load(workspace / 'out' / 'ckpt.pt', weights_only=True)['iter_num'] == 0


# --- standard input and output ----------------------------------------------------------------------------------------


def test_int8_where_it_cannot_be_had(trained, monkeypatch):
    """As on an ARM processor."""
    monkeypatch.setattr(type(torch.backends.quantized), 'supported_engines', ['none'])
    for script, arguments in (('sample.py', SAMPLE), ('evaluate.py', ['--device=cpu']), ('bench.py', DECODE)):
        result = run_forked(script, *arguments, '--quantize=int8', cwd=trained)
        assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
        assert '--quantize=int8: runs on x86 processors only' in result.stderr


def test_baseline_not_installed(workspace, monkeypatch):
    monkeypatch.setitem(sys.modules, 'transformers', None)
    result = run_forked('bench.py', *DECODE, '--baseline=transformers', cwd=workspace)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert 'pip install transformers' in result.stderr


def test_interactive_input(trained, monkeypatch):
    """What cannot be continued is one line, and the next line is read; the end of the input is no mistake; no input is one."""

    def talk(*arguments):
        return run_forked('sample.py', *SAMPLE, '--interactive=True', *arguments, cwd=trained)

    typed = trained.parent / 'typed'
    typed.write_bytes(b'abX\nab\xff\n\ncd\n')
    monkeypatch.setattr(sys, 'stdin', open(typed, encoding='utf-8', errors='surrogateescape'))
    result = talk()
    assert result.returncode == 0, result.stderr
    assert [line[:40] for line in result.stderr.splitlines()] == 2 * ['this cannot be continued: the character '], (
        result.stderr
    )
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))
    assert talk().returncode == 0
    monkeypatch.setattr(sys, 'stdin', None)  # as `<&-` leaves it
    result = talk()
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1, result.stderr


def test_interactive_prompt_file(trained, monkeypatch):
    """--start=FILE: is the file's content here too, not a text that begins with FILE."""
    monkeypatch.setattr(sys, 'stdin', open(os.devnull))
    prompt = trained.parent / 'prompt.txt'
    prompt.write_text('abc')
    result = run_forked('sample.py', *SAMPLE, '--interactive=True', f'--start=FILE:{prompt}', cwd=trained)
    assert result.returncode == 0 and not result.stderr, result.stderr


READERS = [
    ['sample.py', *SAMPLE, '--json=True'],
    ['evaluate.py', '--device=cpu'],
]  # flushed line by line, and at the exit


def test_reader_gone(trained):
    """`... | head -1`: who has read enough is told nothing."""
    reading, writing = os.pipe()
    os.close(reading)
    started = [
        subprocess.Popen(
            [sys.executable, str(REPO / arguments[0]), *arguments[1:]],
            cwd=trained,
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(PYTHONUNBUFFERED=''),
        )
        for arguments in READERS
    ]
    os.close(writing)
    complaints = [process.communicate(timeout=120)[1] for process in started]
    assert complaints == ['' for _ in READERS]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no such device')
def test_disk_full(trained):
    """`... > texts.jsonl` on a full disk."""
    with open('/dev/full', 'w') as full:
        result = subprocess.run(
            [sys.executable, str(REPO / 'sample.py'), *SAMPLE, '--json=True'],
            cwd=trained,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
            timeout=120,
        )
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1 and 'No space left' in result.stderr, (
        result.stderr
    )
