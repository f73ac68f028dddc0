"""sample.py, evaluate.py, bench.py, tools/, the prepare.py scripts and quickstart.sh, as a user runs them."""

import ast
import dataclasses
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from conftest import (
    CHARS,
    REPO,
    SHARED,
    TINY,
    environment,
    run_forked,
    run_forked_ok,
    run_ok,
    talk_and_interrupt,
    write_data,
)

from configurator import read_settings
from dataloader import Tokens, read_meta
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

SAMPLE = ['--device=cpu', '--max_new_tokens=20', '--num_samples=3']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a run in out/, and one of a model with a single layer in out-small/."""
    folder = tmp_path_factory.mktemp('trained')
    write_data(folder / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, cwd=folder)
    run_forked_ok('train.py', *TINY, '--n_layer=1', '--out_dir=out-small', cwd=folder)
    return folder


def samples(text):
    """What sample.py printed -> the samples."""
    return text.split('\n---------------\n')[:-1]


def objects(text):
    """What sample.py --json=True printed -> the objects."""
    return [json.loads(line) for line in text.splitlines()]


def python(script, *arguments):
    """The command that runs a script of the repository."""
    return [sys.executable, str(REPO / script), *arguments]


def test_sampling(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('abc\n', encoding='utf-8')
    arguments = [f'--out_dir={trained / "out"}', *SAMPLE]  # the tokenizer is in the checkpoint: no data set is here

    def sample(*more):
        return samples(run_forked_ok('sample.py', *arguments, *more, cwd=tmp_path))

    first = samples(run_ok('sample.py', *arguments, '--start=FILE:prompt.txt', cwd=tmp_path))
    assert len(first) == 3 and len(set(first)) > 1
    assert all(text.startswith('abc\n') and len(text) == 24 and set(text) <= set(CHARS) for text in first)
    assert first == sample('--start=FILE:prompt.txt')
    assert first != sample('--start=FILE:prompt.txt', '--seed=1')
    greedy = sample('--start=abc', '--temperature=0')
    assert len(set(greedy)) == 1 and greedy == sample('--start=abc', '--top_k=1')
    assert len(sample('--ckpt=ckpt_best.pt')) == 3


def test_sampling_loads_only_what_it_needs(trained):
    libraries = 'transformers tiktoken tokenizers matplotlib wandb numpy.testing torch._dynamo sympy'
    program = (
        'import runpy, sys; sys.argv = ["sample.py", "--out_dir=out", "--device=cpu", "--max_new_tokens=2"]; '
        f'runpy.run_path({str(REPO / "sample.py")!r}, run_name="__main__"); '
        f'print([name for name in {libraries!r}.split() if name in sys.modules])'
    )
    env = environment(PYTHONPATH=str(REPO))
    result = subprocess.run([sys.executable, '-c', program], cwd=trained, env=env, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == '[]', result.stderr


def test_prompts_of_several_kinds(trained, tmp_path):
    """A sample depends on its own prompt only, not on the rest of the batch or the size of the batch."""
    prompts = ['abc', 'z. once upon a time', 'b']
    (tmp_path / 'prompts.txt').write_text('abc\n\nz. once upon a time\nb\n', encoding='utf-8')
    for name, prompt in zip('xyz', prompts):
        (tmp_path / name).write_text(prompt, encoding='utf-8')
    settings = '--json=True --top_p=0.9 --min_p=0.01 --repetition_penalty=1.1 --stop=z'.split()

    def sample(*more):
        return objects(
            run_forked_ok('sample.py', f'--out_dir={trained / "out"}', *SAMPLE, *settings, *more, cwd=tmp_path)
        )

    alone = [sample(f'--start={prompt}') for prompt in prompts]
    expected = [record for records in alone for record in records]
    assert [record['prompt'] for record in expected] == [prompt for prompt in prompts for _ in range(3)]
    for record in expected:
        assert len(record['token_ids']) == len(record['log_probs']) and all(value <= 0 for value in record['log_probs'])
        assert (record['finish_reason'] == 'length') == (len(record['text']) == 20) and 'z' not in record['text']
        assert record['text'] == ''.join(CHARS[i] for i in record['token_ids'])[: len(record['text'])]
    for start in ('LINES:prompts.txt', 'FILES:x,y,z'):
        for options in ([], ['--batch_size=2']):
            got = sample(f'--start={start}', *options)
            assert len(got) == len(expected)
            for record, other in zip(got, expected):
                assert record.pop('log_probs') == pytest.approx(other['log_probs'], abs=1e-4)
                assert record == {key: value for key, value in other.items() if key != 'log_probs'}


def test_streaming_shows_the_same(trained, tmp_path):
    settings = '--device=cpu --num_samples=5 --max_new_tokens=50 --batch_size=3 --stop=z --stop=.a'.split()

    def sample(*more):
        return run_forked_ok('sample.py', f'--out_dir={trained / "out"}', *settings, *more, cwd=tmp_path)

    streamed = sample()
    assert streamed == sample('--stream=False') and len(samples(streamed)) == 5
    assert samples(streamed) == [record['prompt'] + record['text'] for record in objects(sample('--json=True'))]
    assert samples(sample('--max_new_tokens=0', '--start=ab')) == ['ab'] * 5


@pytest.mark.slow
def test_compiled_generation(trained, tmp_path, quick_compiler):
    """sample.py compiles once and generates the same text as uncompiled; bench.py does so in batches of two sizes."""
    settings = '--device=cpu --num_samples=3 --batch_size=2 --max_new_tokens=40 --stop=z'.split()
    sample = ['sample.py', f'--out_dir={trained / "out-small"}', *settings]
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = run_forked(*sample, '--compile=True', cwd=tmp_path)
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout == run_forked_ok(*sample, cwd=tmp_path)
    assert not compiled.stderr or 'torch.compile does not work here' in compiled.stderr
    settings = ['--num_samples=2', '--baseline=recompute', '--compile=True']
    assert run_forked_ok('bench.py', *DECODE, *settings, cwd=tmp_path).count('the same tokens') == 2


@pytest.mark.slow
def test_a_missing_compiler_is_noticed_before_generating(trained, tmp_path, quick_compiler):
    """Also if the compiled model is not needed at first: after a long prompt, or when a sample ends at once."""
    settings = f'--device=cpu --num_samples=1 --max_new_tokens=5 --out_dir={trained / "out-small"}'.split()
    for stops in ([], [f'--stop={character}' for character in CHARS]):
        sample = ['sample.py', *settings, f'--start={CHARS[:3]}', *stops]
        cache = str(tmp_path / 'cache')
        with torch._inductor.config.patch({'cpp.cxx': ('/nowhere/c++',)}):
            result = run_forked(*sample, '--compile=True', cwd=tmp_path, TORCHINDUCTOR_CACHE_DIR=cache)
        assert result.returncode == 0 and result.stdout == run_forked_ok(*sample, cwd=tmp_path)
        assert result.stderr.startswith('warning: torch') and result.stderr.count('\n') == 1, result.stderr


def test_conversation(trained, tmp_path):
    settings = [f'--out_dir={trained / "out"}', '--device=cpu', '--temperature=0']
    command = python('sample.py', *settings, '--interactive=True', '--max_new_tokens=10')
    pipes = dict(input='abc\n\nX\n', capture_output=True, text=True)
    result = subprocess.run(command, cwd=tmp_path, env=environment(), timeout=60, **pipes)
    assert result.returncode == 0, result.stderr
    first, second = (part[:10] for part in result.stdout.split('> ')[1:3])
    settings += ['--num_samples=1', '--start=abc', '--max_new_tokens=20']
    (once,) = samples(run_forked_ok('sample.py', *settings, cwd=tmp_path))
    assert first + second == once[3:], 'the empty line goes on where the answer ended'
    assert "character 'X'" in result.stderr and 'Traceback' not in result.stderr


def test_ctrl_c_stops_an_answer_and_not_the_program(trained, tmp_path):
    settings = '--device=cpu --interactive=True --max_new_tokens=1000000'.split()
    assert talk_and_interrupt('sample.py', f'--out_dir={trained / "out"}', *settings, cwd=tmp_path) == ''


@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_evaluation(trained, quantize):
    """The loss of the whole split is the one that train.py prints; with 8-bit weights it is close."""
    if quantize and 'fbgemm' not in torch.backends.quantized.supported_engines:
        pytest.skip('this torch comes without FBGEMM')
    text = run_forked_ok('evaluate.py', '--out_dir=out', '--device=cpu', f'--quantize={quantize}', cwd=trained)
    loss = float(re.search(r'loss ([\d.]+)', text)[1])
    settings = ['--init_from=resume', '--eval_only=True', '--eval_iters=1000']
    expected = run_forked_ok('train.py', *TINY, *settings, cwd=trained)
    assert abs(loss - float(re.search(r'val loss ([\d.]+)', expected)[1])) <= (0.02 if quantize else 1e-4)
    assert '992 tokens in windows of 16' in text


def test_sampling_from_hugging_face_with_its_own_tokenizer(tmp_path):
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(['hello world'] * 3, vocab_size=260, show_progress=False)
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=320)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model.save_pretrained(tmp_path / 'hf')
    bpe.save(str(tmp_path / 'hf' / 'tokenizer.json'))
    settings = '--start=hello --num_samples=1 --max_new_tokens=10 --temperature=0 --device=cpu'.split()
    (text,) = samples(run_forked_ok('sample.py', '--init_from=hf', *settings, cwd=tmp_path))
    ids = torch.tensor([bpe.encode('hello').ids])
    logits_end = bpe.get_vocab_size()  # the model's last 60 ids stand for nothing and must not be sampled
    for _ in range(10):
        ids = torch.cat((ids, model.eval()(ids).logits[:, -1:, :logits_end].argmax(-1)), dim=1)
    assert text == bpe.decode(ids[0].tolist())
    # offline, and perhaps with an empty cache
    result = run_forked('sample.py', '--init_from=gpt2', '--device=cpu', cwd=tmp_path)
    assert result.returncode in (0, 2) and result.stderr.count('\n') == (result.returncode == 2)


def test_a_tokenizer_that_knows_more_than_its_model(copy):
    """A [PAD] was added to the tokenizer, but the embedding was not resized.

    Sampling, preparing text, fine-tuning and sampling again work as if the token were not there; a prompt with it is an
    error. Another vocabulary of the same size is refused.
    """
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    text = 'the quick brown fox jumps over the lazy dog. ' * 60

    def save(name, words, extra):
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(words, vocab_size=270, show_progress=False, special_tokens=['<|endoftext|>'])
        torch.manual_seed(0)
        n = bpe.get_vocab_size()
        shape = dict(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=n)
        GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0)).save_pretrained(copy / name)
        bpe.add_special_tokens(extra)
        bpe.save(str(copy / name / 'tokenizer.json'))
        return n

    n = save('hf', ['the quick brown fox'], ['[PAD]'])
    assert save('other', ['sphinx of black quartz'], []) == n
    sample = '--num_samples=2 --max_new_tokens=30 --device=cpu --temperature=5 --json=True --ignore_eos=True'.split()
    records = objects(run_forked_ok(copy / 'sample.py', '--init_from=hf', '--start=the', *sample, cwd=copy))
    assert all(len(record['token_ids']) == 30 and max(record['token_ids']) < n for record in records)
    result = run_forked(copy / 'sample.py', '--init_from=hf', '--start=the[PAD]', *sample, cwd=copy)
    assert result.returncode == 2 and "no token '[PAD]'" in result.stderr
    (copy / 'fox.txt').write_text(text)
    run_forked_ok(copy / 'data/text/prepare.py', '--input=fox.txt', '--tokenizer=hf', '--workers=1', cwd=copy)
    train = """
        --dataset=text/fox --device=cpu --compile=False --block_size=32 --batch_size=2 --gradient_accumulation_steps=1
        --eval_iters=2 --max_iters=3 --decay_lr=False --learning_rate=1e-2
    """.split()
    run_forked_ok(copy / 'train.py', *train, '--init_from=hf', cwd=copy)
    saved = torch.load(copy / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['tokenizer']['kind'] == 'tokenizers' and saved['model_args']['vocab_size'] == n
    records = objects(run_forked_ok(copy / 'sample.py', '--start=the', *sample, cwd=copy))
    assert all(max(record['token_ids']) < n for record in records)
    assert 'bits per byte' in run_forked_ok(copy / 'evaluate.py', '--device=cpu', cwd=copy)
    result = run_forked(copy / 'train.py', *train, '--init_from=other', '--out_dir=o', cwd=copy)
    assert result.returncode == 2 and 'other was trained with another tokenizer than that of data' in result.stderr


BENCH = """
    --n_layer=2 --n_head=2 --n_embd=32 --block_size=16 --batch_size=4 --vocab_size=64 --device=cpu --compile=False
    --steps=3 --dataset=tiny
""".split()
DECODE = """
    --mode=decode --n_layer=1 --n_head=2 --n_embd=32 --block_size=16 --vocab_size=29 --device=cpu
    --prompt_tokens=6 --max_new_tokens=10 --rounds=2
""".split()


def parts(output):
    """The parts of a step that bench.py printed -> {kind: share of the step in percent}."""
    return {
        kind: float(share) for kind, share in re.findall(r'^  (\S.*?) +-?[\d.]+ms +(-?[\d.]+)%', output, re.MULTILINE)
    }


@pytest.mark.parametrize('real', [True, False])
def test_bench(workspace, real):
    output = run_forked_ok('bench.py', *BENCH, f'--real_data={real}', f'--profile={real}', cwd=workspace)
    for words in ('tokens/s', '% of peak (', 'peak memory', 'time per step: median'):
        assert words in output
    kinds = {'linear layers', 'attention', 'activation', 'norms', 'embeddings', 'residual sums', 'head', 'loss'}
    rest = {'clipping', 'optimizer', 'everything else, such as the host'}
    assert parts(output).keys() == kinds | rest and sum(parts(output).values()) == pytest.approx(100, abs=1)
    assert output.count('GFLOP/s') == 2, 'of the linear layers and of the head'
    if real:
        assert 'aten::' in output and json.loads((workspace / 'trace.json').read_text())['traceEvents']
    else:
        output = run_forked_ok('bench.py', *BENCH, '--dataset=absent', '--breakdown=False', cwd=workspace)
        assert 'not prepared' in output and not parts(output)
        modern = '--pos=rope --norm=rmsnorm --mlp=relu2 --qk_norm=True --optimizer=muon --dropout=0.1'.split()
        output = run_forked_ok('bench.py', *BENCH, '--real_data=False', '--baseline=eager', *modern, cwd=workspace)
        assert 'eager time per step' in output and 'of the time of eager' in output and output.count('% of peak (') == 2
        assert parts(output).keys() == kinds | rest | {'dropout'}


@pytest.mark.parametrize('baseline', ['recompute', 'transformers'])
def test_bench_of_decoding(tmp_path, baseline):
    output = run_forked_ok('bench.py', *DECODE, '--num_samples=3', f'--baseline={baseline}', cwd=tmp_path)
    assert output.count('the same tokens') == 2 and 'that memory allows' in output and 'memory reads' in output
    output = run_forked_ok('bench.py', *DECODE, '--num_samples=3', cwd=tmp_path)
    for words in ('here, batch 1:', 'here, batch 3:', 'prompt tokens/s', 'peak memory'):
        assert words in output


def test_bench_of_a_trained_model(trained, tmp_path):
    settings = '--mode=decode --device=cpu --prompt_tokens=6 --max_new_tokens=10 --rounds=1'.split()
    output = run_forked_ok('bench.py', f'--init_from={trained / "out"}', *settings, cwd=tmp_path)
    assert 'of 4 bytes each' in output and 'cache of 16 tokens' in output


def test_comparing_recipes(workspace, forked_runs):
    """Two recipes, of which one reaches the target, then a command in the baseline's place."""
    (workspace / 'recipe.py').write_text("""
dataset, device, compile = 'tiny', 'cpu', False
n_layer, n_head, n_embd, block_size = 1, 2, 32, 16
batch_size, gradient_accumulation_steps = 4, 1
max_iters, warmup_iters, lr_decay_iters, eval_interval = 12, 2, 12, 4
learning_rate = 1e-4
""")

    def compare(*arguments, contender='recipe.py'):
        arguments = ['--baseline=recipe.py', f'--contender={contender}', *arguments]
        return run_forked('tools/compare.py', *arguments, cwd=workspace)

    def table(output):
        """The cells of each row."""
        return [[cell.strip() for cell in line.split('|')[1:-1]] for line in output.splitlines() if line[:1] == '|']

    contender = 'recipe.py --learning_rate=1e-2 --max_iters=20'
    result = compare('--target=3.25', '--seeds=2', contender=contender)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count('compiles nothing: the same run') == 4 and 'not at 3.25 after 12' in result.stdout
    header, _, slow, fast, ratios = table(result.stdout)
    assert {len(row) for row in table(result.stdout)} == {7} and header[6] == 'training alone'
    assert slow[:3] == ['`recipe.py`', '0 of 2 at 3.25', '12 (12 to 12)'] and slow[4] == slow[5] != slow[6]
    assert fast[:3] == [f'`{contender}`', '2 of 2 at 3.25', '20 (20 to 20)']
    assert all(re.fullmatch(r'[\d.]+ \([\d.]+ to [\d.]+\)', ratio) for ratio in ratios[4:])
    assert (workspace / 'out-speedrun' / 'speedrun.png').read_bytes().startswith(b'\x89PNG')

    lines = ''.join(f'echo step {n}: train loss 1.0, val loss {loss}; ' for n, loss in ((0, 4.0), (250, 3.1)))
    command = f'{lines} c=$TORCHINDUCTOR_CACHE_DIR; mkdir -p $c; touch {{seed}} $c/compiled; echo $c >> folders'
    result = compare('--target=3.25', '--seeds=1', f'--command={command}', contender=contender)
    assert result.returncode == 0, result.stderr
    theirs = table(result.stdout)[2]
    assert theirs[1:4] == ['1 of 1 at 3.25', '250 (250 to 250)', '3.1000 (3.1000 to 3.1000)']
    assert theirs[6] == table(result.stdout)[4][6] == 'unknown' and (workspace / '1337').exists()
    cold, warm = (workspace / 'folders').read_text().split()
    assert cold == warm and not os.path.exists(cold), 'the same cache, which was removed'
    for arguments, words in (
        (['--baseline=recipe.py --eval_only=True'], 'trained nothing'),
        (['--command=echo hello'], 'echo hello printed no line such as'),
        (['--command=echo too bad; exit 3'], 'ended with status 3: too bad'),
    ):
        result = compare('--seeds=1', *arguments)
        assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1, result.stderr


@pytest.mark.parametrize('x', ['iter', 'seconds'])
def test_plot(trained, tmp_path, x):
    png = tmp_path / 'loss.png'
    with open(trained / 'out' / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write('{"iter": 9, "lo')  # as a crash leaves it
    run = trained / 'out'
    run_forked_ok('tools/plot.py', f'--runs={run},{run}', f'--output={png}', f'--x={x}', cwd=tmp_path)
    assert png.read_bytes().startswith(b'\x89PNG')


def test_every_run_is_in_the_legend(trained, tmp_path, monkeypatch):
    """Whatever its folder is called: a formula between dollars, or a name that matplotlib would leave out."""
    names = ('a$_$', '_run', 'x\\frac')
    for name in names:
        (tmp_path / name).mkdir()
        shutil.copy(trained / 'out' / 'metrics.jsonl', tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', ['tools/plot.py', f'--runs={",".join(names)}', '--output=p.png'])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)
    axes = runpy.run_path(str(REPO / 'tools' / 'plot.py'))['axes']
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert len(labels) == 6
    for name in names:
        assert sum(label.endswith(f', {name}') for label in labels) == 2


def test_json_in_any_code_page(trained, tmp_path):
    """Whatever the encoding of standard output, every line is valid JSON, and no character is lost."""
    chars = 'naïve €東京\n'
    state = torch.load(trained / 'out' / 'ckpt.pt', weights_only=True)
    state['tokenizer']['chars'] = chars + ''.join(c for c in CHARS if c not in chars)
    state['tokenizer']['chars'] = state['tokenizer']['chars'][: len(CHARS)]
    torch.save(state, tmp_path / 'ckpt.pt')
    arguments = [f'--out_dir={tmp_path}', *SAMPLE, '--start=naïve 東', '--json=True']
    rows = [objects(run_forked_ok('sample.py', *arguments, cwd=tmp_path))]  # in UTF-8
    for encoding in ('cp1252', 'ascii'):
        command = python('sample.py', *arguments)
        result = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONIOENCODING=encoding), capture_output=True)
        assert result.returncode == 0, result.stderr
        rows.append([json.loads(line) for line in result.stdout.decode('utf-8').splitlines()])
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 3 and rows[0][0]['prompt'] == 'naïve 東'
    assert all(set(row['text']) <= set(chars + CHARS) for row in rows[0])


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, without data, runs and the like, to write into."""
    target = tmp_path / 'copy'
    left_out = ('.git', '.venv*', 'out*', '*.bin', 'meta.*', 'input.txt', '__pycache__', 'wandb')
    shutil.copytree(REPO, target, ignore=shutil.ignore_patterns(*left_out))
    return target


def prepare(copy, name, *arguments, **extra):
    """Run data/<name>/prepare.py of the copy -> CompletedProcess. extra: environment variables."""
    command = [sys.executable, str(copy / 'data' / name / 'prepare.py'), *arguments]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment(**extra), timeout=120)


def hashes(folder):
    """The checksums of a prepared data set -> {file name: SHA-256}."""
    files = [path for path in folder.iterdir() if path.suffix in ('.bin', '.json')]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_text_of_ones_own(copy):
    text = 'Größe: 3 ≤ 4.\r\nZweite Zeile.\n' * 50
    (copy / 'novel.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    folder = copy / 'data' / 'text' / 'novel'
    assert prepare(copy, 'text', '--input=novel.txt').returncode == 0
    seen = hashes(folder)
    assert prepare(copy, 'text', '--input=novel.txt', LC_ALL='C', PYTHONUTF8='0').returncode == 0
    assert hashes(folder) == seen, 'an ASCII locale makes a difference'
    meta = read_meta(str(folder))
    tokenizer = load_tokenizer(meta['tokenizer'])
    expected = text.replace('\r\n', '\n')
    ids = [Tokens(str(folder), split, meta)[0 : meta['tokens'][split]] for split in ('train', 'val')]
    parts = [tokenizer.decode(split.tolist()) for split in ids]
    assert ''.join(parts) == expected and len(parts[0]) == int(0.9 * len(expected))
    assert prepare(copy, 'text', '--input=novel.txt', '--name=other', '--val_fraction=0.5').returncode == 0
    other = read_meta(str(folder.parent / 'other'))
    assert hashes(folder) == seen and other['tokens']['val'] == len(expected) - len(expected) // 2


def test_a_folder_of_text(copy, gpt2_vocabulary):
    folder = copy / 'texts'
    (folder / 'b').mkdir(parents=True)
    (folder / '.git').mkdir()
    texts = {'b/two.md': 'Second text. ' * 9, 'a.txt': 'First text. ' * 9, '.git/x': 'hidden', 'empty.txt': ''}
    for name, content in texts.items():
        (folder / name).write_text(content)
    (folder / 'image.png').write_bytes(b'\x89PNG\0\0')
    result = prepare(copy, 'text', '--input=texts', '--tokenizer=gpt2', '--val_fraction=0.25')
    assert result.returncode == 0 and 'skipped 1 files' in result.stdout
    data = copy / 'data' / 'text' / 'texts'
    meta = read_meta(str(data))
    splits = [Tokens(str(data), split, meta)[0 : meta['tokens'][split]] for split in ('train', 'val')]
    ids = np.concatenate(splits).tolist()
    # one end of text after each text, none where the split cuts
    assert meta['vocab_size'] == 50257 and ids.count(50256) == 2 and ids[-1] == 50256
    assert gpt2_vocabulary.decode([i for i in ids if i != 50256]) == 'First text. ' * 9 + 'Second text. ' * 9


def test_python_docs_import_nothing(copy):
    first = prepare(copy, 'python_docs_char')
    assert first.returncode == 0, first.stderr
    data = copy / 'data' / 'python_docs_char'
    seen = hashes(data)
    assert prepare(copy, 'python_docs_char').returncode == 0 and hashes(data) == seen
    assert read_meta(str(data))['tokens']['train'] > 300000
    nodes = ast.walk(ast.parse((data / 'prepare.py').read_text()))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    assert 'pydoc_data' not in imported and 'importlib' not in imported


def test_tiny_shakespeare(copy, gpt2_vocabulary):
    text = SHARED / 'corpora' / 'tinyshakespeare.txt'
    if not text.exists():
        pytest.skip('no copy of Tiny Shakespeare beside the repository')
    counts = {'shakespeare_char': {'train': 1003854, 'val': 111540}, 'shakespeare': {'train': 301966, 'val': 36059}}
    for name, expected in counts.items():
        assert prepare(copy, name, f'--input={text}').returncode == 0
        meta = read_meta(str(copy / 'data' / name))
        assert meta['tokens'] == expected
    ids = Tokens(str(copy / 'data' / 'shakespeare'), 'val', meta)[0:100].tolist()
    assert gpt2_vocabulary.decode(ids) in text.read_text(encoding='utf-8')


class Flaky(http.server.BaseHTTPRequestHandler):
    """A server that fails once, breaks off once, then works."""

    content, calls = b'some text\n' * 1000, 0

    def do_GET(self):
        type(self).calls += 1
        self.send_response(503 if self.calls == 1 else 200)
        self.send_header('content-length', str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content[:500] if self.calls == 2 else self.content)

    def log_message(self, *args):
        pass


def test_download(tmp_path, monkeypatch):
    from common.errors import UserError
    from data import download

    monkeypatch.setattr(download.time, 'sleep', lambda seconds: None)
    server = http.server.HTTPServer(('127.0.0.1', 0), Flaky)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, path = f'http://127.0.0.1:{server.server_port}/text', str(tmp_path / 'input.txt')
    right = hashlib.sha256(Flaky.content).hexdigest()
    with pytest.raises(UserError, match='cannot download'):
        download.download(url, path, right, tries=2)
    assert os.listdir(tmp_path) == []
    download.download(url, path, right)
    assert (tmp_path / 'input.txt').read_bytes() == Flaky.content and os.listdir(tmp_path) == ['input.txt']
    calls = Flaky.calls
    download.download(url, path, right)
    assert Flaky.calls == calls, 'a complete file is not downloaded again'
    with pytest.raises(UserError, match='checksum'):
        download.download(url, path + '2', '0' * 64)
    with pytest.raises(UserError, match='there already'):
        download.download(url, path, '0' * 64)
    assert os.listdir(tmp_path) == ['input.txt'] and (tmp_path / 'input.txt').read_bytes() == Flaky.content
    server.shutdown()


# --- quickstart -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quickstart(copy):
    """Trains on a text; the second time it has nothing to do; with another text it starts anew.

    In place of an installation, the Python that runs the tests. It leaves out the scripts that are named in SKIP.
    """
    (copy / '.venv' / 'bin').mkdir(parents=True)
    python = copy / '.venv' / 'bin' / 'python'
    python.write_text(f'#!/bin/sh\ncase "$SKIP" in *"$1"*) exit 0;; esac\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    installed = (copy / name for name in ('requirements.txt', 'requirements-lock.txt'))
    (copy / '.venv' / 'installed.txt').write_bytes(b''.join(path.read_bytes() for path in installed))
    text = copy / 'my novel.txt'
    settings = '--max_iters=4 --eval_iters=2 --eval_interval=2 --device=cpu'.split()

    def quickstart(skip):
        command = ['./quickstart.sh', text.name, *settings]
        env = environment(SKIP=skip)
        result = subprocess.run(command, cwd=copy, capture_output=True, text=True, env=env, timeout=120)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    text.write_text('It was a dark and stormy night; the rain fell in torrents. ' * 60)
    assert 'done: 4 ' in quickstart(skip='sample.py')
    assert (copy / 'out-quickstart-my novel' / 'loss.png').read_bytes().startswith(b'\x89PNG')
    again = quickstart(skip='tools/plot.py')
    assert 'nothing to do' in again and again.count('---------------') == 3
    text.write_text('Another text; the rain fell in torrents. ' * 60)
    assert 'moved to' in quickstart(skip='sample.py tools/plot.py')


@pytest.mark.parametrize('version, kept', [('2.7.0+cu126', True), ('2.5.1', False), (None, False)])
def test_quickstart_keeps_a_torch_that_is_there(copy, tmp_path, version, kept):
    """The environment in use has a stub of torch, .venv a stub of pip that installs nothing."""
    site = f'lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages'
    theirs, ours = tmp_path / 'theirs', copy / '.venv'
    for venv in (theirs, ours):
        subprocess.run([sys.executable, '-m', 'venv', '--without-pip', venv], check=True)
    (ours / site / 'pip').mkdir()
    (ours / site / 'pip' / '__main__.py').write_text('import sys; print("pip", *sys.argv[1:])')
    if version:
        for name in ('torch', f'torch-{version}.dist-info'):
            (theirs / site / name).mkdir()
        (theirs / site / 'torch' / '__init__.py').touch()
        (theirs / site / f'torch-{version}.dist-info' / 'METADATA').write_text(f'Name: torch\nVersion: {version}\n')
    env = environment(PATH=f'{theirs}/bin:{os.environ["PATH"]}')
    result = subprocess.run(['./quickstart.sh', '--install'], cwd=copy, env=env, capture_output=True, text=True)
    assert result.returncode == 0 and 'pip install' in result.stdout, result.stdout + result.stderr
    locked = (ours / 'lock.txt').read_text()
    assert kept == (ours / site / 'torch.pth').exists() == (f'torch=={version}\n' in locked)
    assert kept == ('using torch' in result.stdout)
    assert kept or locked == (REPO / 'requirements-lock.txt').read_text()


def test_an_untouched_model_has_the_shape_of_the_defaults():
    """The settings of bench.py and train.py have the same defaults as GPTConfig."""
    for script in ('bench.py', 'train.py'):
        values = read_settings(REPO / script)
        for field in dataclasses.fields(GPTConfig):
            if field.name not in ('vocab_size', 'bias'):  # the data decides; nanoGPT trains without biases
                assert values.get(field.name, field.default) == field.default, f'{script}: {field.name}'
    with torch.device('meta'):
        assert GPT(GPTConfig()).num_params() > 123e6
