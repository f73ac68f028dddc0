"""sample.py, bench.py, plot.py, the prepare.py scripts and quickstart.sh, as a user runs them."""

import ast
import dataclasses
import hashlib
import http.server
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import threading

import numpy as np
import pytest
import torch
from conftest import CHARS, REPO, SHARED, TINY, environment, run, run_forked, run_forked_ok, run_ok

from dataloader import Tokens, read_meta
from model import GPT, GPTConfig
from tokenizer import load_tokenizer

SAMPLE = ['--device=cpu', '--max_new_tokens=20', '--num_samples=3']


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A folder with a run in out/."""
    from conftest import write_data

    folder = tmp_path_factory.mktemp('trained')
    write_data(folder / 'data' / 'tiny')
    run_forked_ok('train.py', *TINY, cwd=folder)
    return folder


def samples(text):
    return text.split('\n---------------\n')[:-1]


def test_sampling(trained, tmp_path):
    (tmp_path / 'prompt.txt').write_text('abc\n', encoding='utf-8')
    out = f'--out_dir={trained / "out"}'  # the tokenizer comes from the checkpoint: no data set is near
    first = samples(run_ok('sample.py', out, *SAMPLE, '--start=FILE:prompt.txt', cwd=tmp_path))
    assert len(first) == 3 and len(set(first)) > 1
    assert all(text.startswith('abc\n') and len(text) == 24 and set(text) <= set(CHARS) for text in first)
    assert first == samples(run_forked_ok('sample.py', out, *SAMPLE, '--start=FILE:prompt.txt', cwd=tmp_path))
    assert first != samples(
        run_forked_ok('sample.py', out, *SAMPLE, '--start=FILE:prompt.txt', '--seed=1', cwd=tmp_path)
    )
    greedy = samples(run_forked_ok('sample.py', out, *SAMPLE, '--start=abc', '--temperature=0', cwd=tmp_path))
    assert len(set(greedy)) == 1 and greedy == samples(
        run_forked_ok('sample.py', out, *SAMPLE, '--start=abc', '--top_k=1', cwd=tmp_path)
    )
    assert len(samples(run_forked_ok('sample.py', out, *SAMPLE, '--ckpt=ckpt_best.pt', cwd=tmp_path))) == 3


def test_sampling_loads_only_what_it_needs(trained):
    program = (
        'import runpy, sys; sys.argv = ["sample.py", "--out_dir=out", "--device=cpu", "--max_new_tokens=2"]; '
        f'runpy.run_path({str(REPO / "sample.py")!r}, run_name="__main__"); '
        'print([name for name in ("transformers", "tiktoken", "tokenizers", "matplotlib", "wandb", "numpy.testing", '
        '"torch._dynamo", "sympy") if name in sys.modules])'
    )
    result = subprocess.run(
        [os.sys.executable, '-c', program],
        cwd=trained,
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(REPO)),
    )
    assert result.stdout.splitlines()[-1] == '[]', result.stderr


def objects(text):
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_of_several_kinds(trained, tmp_path):
    """Each sample is what its prompt alone gives, whatever is drawn beside it and however many at once."""
    prompts = ['abc', 'z. once upon a time', 'b']
    (tmp_path / 'prompts.txt').write_text('abc\n\nz. once upon a time\nb\n', encoding='utf-8')
    for name, prompt in zip('xyz', prompts):
        (tmp_path / name).write_text(prompt, encoding='utf-8')
    common = (
        f'--out_dir={trained / "out"}',
        *SAMPLE,
        '--json=True',
        '--top_p=0.9',
        '--min_p=0.01',
        '--repetition_penalty=1.1',
        '--stop=z',
    )
    alone = [objects(run_forked_ok('sample.py', *common, f'--start={prompt}', cwd=tmp_path)) for prompt in prompts]
    expected = [record for records in alone for record in records]
    assert [record['prompt'] for record in expected] == [prompt for prompt in prompts for _ in range(3)]
    for record in expected:
        assert len(record['token_ids']) == len(record['log_probs']) and all(value <= 0 for value in record['log_probs'])
        assert (record['finish_reason'] == 'length') == (len(record['text']) == 20) and 'z' not in record['text']
        assert record['text'] == ''.join(CHARS[i] for i in record['token_ids'])[: len(record['text'])]
    for start in ('LINES:prompts.txt', 'FILES:x,y,z'):
        for options in ([], ['--batch_size=2']):
            got = objects(run_forked_ok('sample.py', *common, f'--start={start}', *options, cwd=tmp_path))
            assert len(got) == len(expected)
            for record, other in zip(got, expected):
                assert record.pop('log_probs') == pytest.approx(other['log_probs'], abs=1e-4)
                assert record == {key: value for key, value in other.items() if key != 'log_probs'}


def test_streaming_shows_the_same(trained, tmp_path):
    arguments = (
        f'--out_dir={trained / "out"}',
        '--device=cpu',
        '--num_samples=5',
        '--max_new_tokens=50',
        '--batch_size=3',
        '--stop=z',
        '--stop=.a',
    )
    streamed = run_forked_ok('sample.py', *arguments, cwd=tmp_path)
    assert (
        streamed == run_forked_ok('sample.py', *arguments, '--stream=False', cwd=tmp_path)
        and len(samples(streamed)) == 5
    )
    texts = [
        record['prompt'] + record['text']
        for record in objects(run_forked_ok('sample.py', *arguments, '--json=True', cwd=tmp_path))
    ]
    assert samples(streamed) == texts
    assert (
        samples(run_forked_ok('sample.py', *arguments, '--max_new_tokens=0', '--start=ab', cwd=tmp_path)) == ['ab'] * 5
    )


@pytest.mark.slow
def test_compiled_drawing(trained, tmp_path):
    """The same text, and one compilation for all tokens: a recompilation would be an error."""
    arguments = (
        f'--out_dir={trained / "out"}',
        '--device=cpu',
        '--num_samples=3',
        '--batch_size=2',
        '--max_new_tokens=40',
        '--stop=z',
    )
    compiled = run('sample.py', *arguments, '--compile=True', cwd=tmp_path, TORCH_LOGS='recompiles')
    assert compiled.returncode == 0 and compiled.stdout == run_forked_ok('sample.py', *arguments, cwd=tmp_path)
    if 'torch.compile does not work here' not in compiled.stderr:
        assert 'ecompil' not in compiled.stderr, compiled.stderr


@pytest.mark.slow
def test_a_missing_compiler_is_found_out_before_drawing(trained, tmp_path):
    """Also where the first tokens are not drawn by what is compiled: those after a prompt of several, and of a text that ends at once."""
    start, without = (
        CHARS[:3],
        {'CXX': '/nowhere/c++', 'PATH': '/nowhere', 'TORCHINDUCTOR_CACHE_DIR': str(tmp_path / 'cache')},
    )
    arguments = (
        f'--out_dir={trained / "out"}',
        '--device=cpu',
        '--num_samples=1',
        '--max_new_tokens=5',
        f'--start={start}',
    )
    for stops in ([], [f'--stop={character}' for character in CHARS]):
        result = run_forked('sample.py', *arguments, *stops, '--compile=True', cwd=tmp_path, **without)
        assert result.returncode == 0 and result.stdout == run_forked_ok('sample.py', *arguments, *stops, cwd=tmp_path)
        assert result.stderr.startswith('warning: torch') and result.stderr.count('\n') == 1, result.stderr


def test_conversation(trained, tmp_path):
    common = (
        f'--out_dir={trained / "out"}',
        '--device=cpu',
        '--interactive=True',
        '--max_new_tokens=10',
        '--temperature=0',
    )
    command = [os.sys.executable, str(REPO / 'sample.py'), *common]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment(), input='abc\n\nX\n', capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    first, second = (part[:10] for part in result.stdout.split('> ')[1:3])
    (once,) = samples(
        run_forked_ok(
            'sample.py',
            common[0],
            '--device=cpu',
            '--temperature=0',
            '--num_samples=1',
            '--start=abc',
            '--max_new_tokens=20',
            cwd=tmp_path,
        )
    )
    assert first + second == once[3:], 'the empty line goes on where the answer ended'
    assert "character 'X'" in result.stderr and 'Traceback' not in result.stderr


def test_ctrl_c_stops_an_answer_and_not_the_program(trained, tmp_path):
    command = [
        os.sys.executable,
        str(REPO / 'sample.py'),
        f'--out_dir={trained / "out"}',
        '--device=cpu',
        '--interactive=True',
        '--max_new_tokens=1000000',
    ]
    pipes = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), **pipes) as child:
        for _ in range(2):
            child.stdin.write(b'abc\n')
            child.stdin.flush()
            while b'> ' not in os.read(child.stdout.fileno(), 100000):
                pass
            assert os.read(child.stdout.fileno(), 10)
            child.send_signal(signal.SIGINT)
        child.stdin.close()
        while os.read(child.stdout.fileno(), 100000):
            pass
        assert child.wait(timeout=30) == 0 and child.stderr.read() == b''


@pytest.mark.parametrize('quantize', ['', 'int8'])
def test_evaluation(trained, quantize):
    """The whole split, against train.py's own evaluation; 8-bit weights come close."""
    if quantize and 'fbgemm' not in torch.backends.quantized.supported_engines:
        pytest.skip('this torch comes without FBGEMM')
    text = run_forked_ok('evaluate.py', '--out_dir=out', '--device=cpu', f'--quantize={quantize}', cwd=trained)
    loss = float(re.search(r'loss ([\d.]+)', text)[1])
    expected = run_forked_ok(
        'train.py', *TINY, '--init_from=resume', '--eval_only=True', '--eval_iters=1000', cwd=trained
    )
    assert abs(loss - float(re.search(r'val loss ([\d.]+)', expected)[1])) <= (0.02 if quantize else 1e-4)
    assert '992 tokens in windows of 16' in text


def test_sampling_from_hugging_face_with_its_own_tokenizer(tmp_path):
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(['hello world'] * 3, vocab_size=260, show_progress=False)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=320, bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(tmp_path / 'hf')
    bpe.save(str(tmp_path / 'hf' / 'tokenizer.json'))
    (text,) = samples(
        run_forked_ok(
            'sample.py',
            '--init_from=hf',
            '--start=hello',
            '--num_samples=1',
            '--max_new_tokens=10',
            '--temperature=0',
            '--device=cpu',
            cwd=tmp_path,
        )
    )
    ids = torch.tensor([bpe.encode('hello').ids])
    logits_end = bpe.get_vocab_size()  # the model's last 60 ids stand for nothing and must not be drawn
    for _ in range(10):
        ids = torch.cat((ids, model.eval()(ids).logits[:, -1:, :logits_end].argmax(-1)), dim=1)
    assert text == bpe.decode(ids[0].tolist())
    result = run_forked(
        'sample.py', '--init_from=gpt2', '--device=cpu', cwd=tmp_path
    )  # HF_HUB_OFFLINE, and an empty cache
    assert result.returncode in (0, 2) and result.stderr.count('\n') == (result.returncode == 2)


def test_a_tokenizer_that_knows_more_than_its_model(copy):
    """A [PAD] was added to the tokenizer, the embeddings were not resized: sampled from, its own text prepared, fine-tuned, and sampled
    from again, as if the token were not there; where it is asked for, that is an error. Another vocabulary of the same size is refused."""
    import tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel

    text = 'the quick brown fox jumps over the lazy dog. ' * 60

    def save(name, words, extra):
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(words, vocab_size=270, show_progress=False, special_tokens=['<|endoftext|>'])
        torch.manual_seed(0)
        n = bpe.get_vocab_size()
        GPT2LMHeadModel(
            GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32, vocab_size=n, bos_token_id=0, eos_token_id=0)
        ).save_pretrained(copy / name)
        bpe.add_special_tokens(extra)
        bpe.save(str(copy / name / 'tokenizer.json'))
        return n

    n = save('hf', ['the quick brown fox'], ['[PAD]'])
    assert save('other', ['sphinx of black quartz'], []) == n
    sample = [
        '--num_samples=2',
        '--max_new_tokens=30',
        '--device=cpu',
        '--temperature=5',
        '--json=True',
        '--ignore_eos=True',
    ]
    records = objects(run_forked_ok(copy / 'sample.py', '--init_from=hf', '--start=the', *sample, cwd=copy))
    assert all(len(record['token_ids']) == 30 and max(record['token_ids']) < n for record in records)
    result = run_forked(copy / 'sample.py', '--init_from=hf', '--start=the[PAD]', *sample, cwd=copy)
    assert result.returncode == 2 and "no token '[PAD]'" in result.stderr
    (copy / 'fox.txt').write_text(text)
    run_forked_ok(copy / 'data/text/prepare.py', '--input=fox.txt', '--tokenizer=hf', '--workers=1', cwd=copy)
    train = [
        '--dataset=text/fox',
        '--device=cpu',
        '--compile=False',
        '--batch_size=2',
        '--gradient_accumulation_steps=1',
        '--eval_iters=2',
        '--max_iters=3',
        '--decay_lr=False',
        '--learning_rate=1e-2',
    ]
    run_forked_ok(copy / 'train.py', *train, '--init_from=hf', '--block_size=32', cwd=copy)
    saved = torch.load(copy / 'out' / 'ckpt.pt', weights_only=True)
    assert saved['tokenizer']['kind'] == 'tokenizers' and saved['model_args']['vocab_size'] == n
    assert all(
        max(record['token_ids']) < n
        for record in objects(run_forked_ok(copy / 'sample.py', '--start=the', *sample, cwd=copy))
    )
    assert 'bits per byte' in run_forked_ok(copy / 'evaluate.py', '--device=cpu', cwd=copy)
    result = run_forked(copy / 'train.py', *train, '--init_from=other', '--block_size=32', '--out_dir=o', cwd=copy)
    assert result.returncode == 2 and 'other was trained with another tokenizer than that of data' in result.stderr


@pytest.mark.parametrize('real', [True, False])
def test_bench(workspace, real):
    shape = [
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=16',
        '--batch_size=4',
        '--vocab_size=64',
        '--device=cpu',
        '--compile=False',
        '--steps=3',
        '--dataset=tiny',
        f'--real_data={real}',
    ]
    output = (run_ok if real else run_forked_ok)('bench.py', *shape, f'--profile={real}', cwd=workspace)
    assert (
        'tokens/s' in output
        and 'mfu unknown' in output
        and 'peak memory' in output
        and 'time per step: median' in output
    )
    if real:
        assert 'aten::' in output and json.loads((workspace / 'trace.json').read_text())['traceEvents']
    else:
        assert 'not prepared' in run_forked_ok(
            'bench.py', *shape, '--real_data=True', '--dataset=absent', cwd=workspace
        )
        modern = ['--pos=rope', '--norm=rmsnorm', '--mlp=relu2', '--qk_norm=True', '--optimizer=muon']
        output = run_forked_ok('bench.py', *shape, *modern, '--baseline=eager', cwd=workspace)
        assert 'eager time per step' in output and 'of the time of eager' in output and output.count('GFLOP/s') == 2


@pytest.mark.slow
def test_speedrun(workspace):
    recipe = workspace / 'recipe.py'
    recipe.write_text(
        '\n'.join(
            f'{key} = {value!r}'
            for key, value in dict(
                dataset='tiny',
                device='cpu',
                compile=False,
                n_layer=1,
                n_head=2,
                n_embd=32,
                block_size=16,
                batch_size=4,
                gradient_accumulation_steps=1,
                eval_interval=4,
                max_iters=12,
                learning_rate=1e-4,
                warmup_iters=2,
                lr_decay_iters=12,
            ).items()
        )
    )
    output = run_forked_ok(
        'tools/compare.py',
        '--baseline=recipe.py',
        '--contender=recipe.py --learning_rate=1e-2 --max_iters=20',
        '--target=3.25',
        '--seeds=2',
        cwd=workspace,
    )
    assert (
        'baseline, recipe.py: 0 of 2 at 3.25' in output
        and 'contender, recipe.py --learning_rate=1e-2 --max_iters=20: 2 of 2' in output
    )
    assert output.count('time of the contender over that of the baseline') == 2
    assert (workspace / 'out-speedrun' / 'speedrun.png').read_bytes().startswith(b'\x89PNG')
    for arguments, words in (
        (['--target=9'], '--target=9.0: recipe.py is there before its first update'),
        (['--baseline=recipe.py --eval_only=True'], 'trained nothing'),
    ):
        result = run_forked(
            'tools/compare.py', '--baseline=recipe.py', '--contender=recipe.py', '--seeds=1', *arguments, cwd=workspace
        )
        assert result.returncode == 2 and words in result.stderr and result.stderr.count('\n') == 1


@pytest.mark.slow
@pytest.mark.parametrize('baseline', ['recompute', 'transformers'])
def test_bench_of_decoding(tmp_path, baseline):
    shape = [
        '--n_layer=2',
        '--n_head=2',
        '--n_embd=32',
        '--block_size=32',
        '--vocab_size=64',
        '--device=cpu',
        '--prompt_tokens=6',
        '--max_new_tokens=20',
        '--num_samples=3',
        '--rounds=2',
    ]
    output = run_forked_ok('bench.py', '--mode=decode', *shape, f'--baseline={baseline}', cwd=tmp_path)
    assert output.count('the same tokens') == 2 and 'that memory allows' in output and 'memory reads' in output
    output = run_forked_ok('bench.py', '--mode=decode', *shape, cwd=tmp_path)
    assert (
        'here, batch 1:' in output
        and 'here, batch 3:' in output
        and 'prompt tokens/s' in output
        and 'peak memory' in output
    )
    if baseline == 'recompute':  # by a compiled model too, several rounds of two sizes
        output = run_forked_ok(
            'bench.py', '--mode=decode', *shape, f'--baseline={baseline}', '--compile=True', cwd=tmp_path
        )
        assert output.count('the same tokens') == 2


@pytest.mark.parametrize('x', ['iter', 'seconds'])
def test_plot(trained, tmp_path, x):
    png = tmp_path / 'loss.png'
    with open(trained / 'out' / 'metrics.jsonl', 'a', encoding='utf-8') as file:
        file.write('{"iter": 9, "lo')  # as a crash leaves it
    run_forked_ok(
        'tools/plot.py', f'--runs={trained / "out"},{trained / "out"}', f'--output={png}', f'--x={x}', cwd=tmp_path
    )
    assert png.read_bytes().startswith(b'\x89PNG')


def test_every_run_is_in_the_legend(trained, tmp_path, monkeypatch):
    """Whatever its folder is called: mathematics between dollars, and a name that matplotlib would leave out."""
    for name in ('a$_$', '_run', 'x\\frac'):
        (tmp_path / name).mkdir()
        shutil.copy(trained / 'out' / 'metrics.jsonl', tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.sys, 'argv', ['tools/plot.py', '--runs=a$_$,_run,x\\frac', '--output=p.png'])
    monkeypatch.setattr(os.sys, 'excepthook', os.sys.excepthook)
    labels = [
        text.get_text() for text in runpy.run_path(str(REPO / 'tools' / 'plot.py'))['axes'].get_legend().get_texts()
    ]
    assert len(labels) == 9 and all(
        sum(label.endswith(f', {name}') for label in labels) == 3 for name in ('a$_$', '_run', 'x\\frac')
    )


def test_json_in_any_code_page(trained, tmp_path):
    """Whatever encoding standard output has, every line is valid JSON and nothing in it is lost."""
    chars = 'naïve €東京\n'
    state = torch.load(trained / 'out' / 'ckpt.pt', weights_only=True)
    state['tokenizer']['chars'] = chars + ''.join(c for c in CHARS if c not in chars)
    state['tokenizer']['chars'] = state['tokenizer']['chars'][: len(CHARS)]
    torch.save(state, tmp_path / 'ckpt.pt')
    rows = []
    for encoding in ('utf-8', 'cp1252', 'ascii'):
        command = [
            os.sys.executable,
            str(REPO / 'sample.py'),
            f'--out_dir={tmp_path}',
            *SAMPLE,
            '--start=naïve 東',
            '--json=True',
        ]
        result = subprocess.run(command, cwd=tmp_path, env=environment(PYTHONIOENCODING=encoding), capture_output=True)
        assert result.returncode == 0, result.stderr
        rows.append([json.loads(line) for line in result.stdout.decode('utf-8').splitlines()])
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 3 and rows[0][0]['prompt'] == 'naïve 東'
    assert all(set(row['text']) <= set(chars + CHARS) for row in rows[0])


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository's tracked kind of files, so that nothing is written into the real one."""
    target = tmp_path / 'copy'
    left_out = ('.git', '.venv*', 'out*', '*.bin', 'meta.*', 'input.txt', '__pycache__', 'wandb')
    shutil.copytree(REPO, target, ignore=shutil.ignore_patterns(*left_out))
    return target


def prepare(copy, name, *arguments, **extra):
    command = [os.sys.executable, str(copy / 'data' / name / 'prepare.py'), *arguments]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment(**extra), timeout=120)


def hashes(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in ('.bin', '.json')
    }


def test_text_of_ones_own(copy):
    text = 'Größe: 3 ≤ 4.\r\nZweite Zeile.\n' * 50
    (copy / 'novel.txt').write_bytes(b'\xef\xbb\xbf' + text.encode())
    for _ in range(2):  # the second time gives the same bytes, in a locale of ASCII too
        assert prepare(copy, 'text', '--input=novel.txt', LC_ALL='C', PYTHONUTF8='0').returncode == 0
        folder = copy / 'data' / 'text' / 'novel'
        assert hashes(folder) == (seen := hashes(folder))
    meta = read_meta(str(folder))
    tokenizer = load_tokenizer(meta['tokenizer'])
    expected = text.replace('\r\n', '\n')
    parts = [
        tokenizer.decode(Tokens(str(folder), split, meta)[0 : meta['tokens'][split]].tolist())
        for split in ('train', 'val')
    ]
    assert ''.join(parts) == expected and len(parts[0]) == int(0.9 * len(expected))
    assert prepare(copy, 'text', '--input=novel.txt', '--name=other', '--val_fraction=0.5').returncode == 0
    assert (
        hashes(folder) == seen
        and read_meta(str(folder.parent / 'other'))['tokens']['val'] == len(expected) - len(expected) // 2
    )


def test_a_folder_of_text(copy, gpt2_vocabulary):
    folder = copy / 'texts'
    (folder / 'b').mkdir(parents=True)
    (folder / '.git').mkdir()
    for name, content in (
        ('b/two.md', 'Second text. ' * 9),
        ('a.txt', 'First text. ' * 9),
        ('.git/x', 'hidden'),
        ('empty.txt', ''),
    ):
        (folder / name).write_text(content)
    (folder / 'image.png').write_bytes(b'\x89PNG\0\0')
    result = prepare(copy, 'text', '--input=texts', '--tokenizer=gpt2', '--val_fraction=0.25')
    assert result.returncode == 0 and 'passed over 1 files' in result.stdout
    data = copy / 'data' / 'text' / 'texts'
    meta = read_meta(str(data))
    ids = np.concatenate(
        [Tokens(str(data), split, meta)[0 : meta['tokens'][split]] for split in ('train', 'val')]
    ).tolist()
    assert (
        meta['vocab_size'] == 50257 and ids.count(50256) == 2 and ids[-1] == 50256
    )  # one after each text, none where the split cuts
    assert gpt2_vocabulary.decode([i for i in ids if i != 50256]) == 'First text. ' * 9 + 'Second text. ' * 9


def test_python_docs_import_nothing(copy):
    first = prepare(copy, 'python_docs_char')
    assert first.returncode == 0, first.stderr
    data = copy / 'data' / 'python_docs_char'
    seen = hashes(data)
    assert prepare(copy, 'python_docs_char').returncode == 0 and hashes(data) == seen
    assert read_meta(str(data))['tokens']['train'] > 300000
    imported = {
        alias.name
        for node in ast.walk(ast.parse((data / 'prepare.py').read_text()))
        if isinstance(node, ast.Import)
        for alias in node.names
    }
    assert 'pydoc_data' not in imported and 'importlib' not in imported


def test_tiny_shakespeare(copy, gpt2_vocabulary):
    text = SHARED / 'corpora' / 'tinyshakespeare.txt'
    if not text.exists():
        pytest.skip('no copy of Tiny Shakespeare beside the repository')
    for name, counts in (
        ('shakespeare_char', {'train': 1003854, 'val': 111540}),
        ('shakespeare', {'train': 301966, 'val': 36059}),
    ):
        assert prepare(copy, name, f'--input={text}').returncode == 0
        meta = read_meta(str(copy / 'data' / name))
        assert meta['tokens'] == counts
    ids = Tokens(str(copy / 'data' / 'shakespeare'), 'val', meta)[0:100].tolist()
    assert gpt2_vocabulary.decode(ids) in text.read_text(encoding='utf-8')


class Flaky(http.server.BaseHTTPRequestHandler):
    """Fails once, breaks off once, then serves."""

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
    assert Flaky.calls == calls, 'what is there is not fetched again'
    with pytest.raises(UserError, match='checksum'):
        download.download(url, path + '2', '0' * 64)
    with pytest.raises(UserError, match='there already'):
        download.download(url, path, '0' * 64)
    assert os.listdir(tmp_path) == ['input.txt'] and (tmp_path / 'input.txt').read_bytes() == Flaky.content
    server.shutdown()


# --- quickstart -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_quickstart(copy):
    """With the packages of the running Python in place of an installation: trains on a text, and the second time goes on."""
    (copy / '.venv' / 'bin').mkdir(parents=True)
    (copy / '.venv' / 'bin' / 'python').write_text(f'#!/bin/sh\nexec {os.sys.executable} "$@"\n')
    (copy / '.venv' / 'bin' / 'python').chmod(0o755)
    shutil.copy(copy / 'requirements.txt', copy / '.venv' / 'installed.txt')
    (copy / 'my novel.txt').write_text('It was a dark and stormy night; the rain fell in torrents. ' * 60)
    command = [
        './quickstart.sh',
        'my novel.txt',
        '--max_iters=4',
        '--eval_iters=2',
        '--eval_interval=2',
        '--device=cpu',
    ]

    def quickstart(*arguments):
        result = subprocess.run(
            [*command, *arguments], cwd=copy, capture_output=True, text=True, env=environment(), timeout=120
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    assert 'done: 4 updates' in quickstart()
    assert (copy / 'out-quickstart-my novel' / 'loss.png').read_bytes().startswith(b'\x89PNG')
    again = quickstart()
    assert 'nothing to do' in again and again.count('---------------') == 3
    (copy / 'my novel.txt').write_text('Another text; the rain fell in torrents. ' * 60)
    assert 'moved to' in quickstart()


def test_an_untouched_model_has_the_shape_of_the_defaults():
    """bench.py and train.py agree with GPTConfig on what GPT-2 is."""
    for script in ('bench.py', 'train.py'):
        values = {
            node.targets[0].id: ast.literal_eval(node.value)
            for node in ast.parse((REPO / script).read_text()).body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
        }
        for field in dataclasses.fields(GPTConfig):
            if field.name not in ('vocab_size', 'bias'):  # train.py takes the data's; nanoGPT trains without biases
                assert values.get(field.name, field.default) == field.default, f'{script}: {field.name}'
    with torch.device('meta'):
        assert GPT(GPTConfig()).num_params() > 123e6
