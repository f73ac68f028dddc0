"""Conversations for fine-tuning: which tokens are learned, in several families' templates; reading, packing, audit."""

import gzip
import json
import os
import random
import re

import numpy as np
import pytest
from conftest import copy_scripts, run_forked
from test_chat import CONVERSATIONS, SYSTEM, TEMPLATES, assistant, hugging_face_tokenizer, make_spec, user

from chat import ChatTemplate
from common.errors import UserError
from data.chat.conversations import Conversation, messages_of, pack, read_rows, write
from data.chat.python_docs import conversations as python_conversations
from dataloader import DataSet
from tokenizer import load_tokenizer

# How a search for texts finds the answers: what precedes one, and the token that ends it.
MARKS = {
    'chatml': ('<|im_start|>assistant\n', '<|im_end|>'),
    'llama 2': ('[/INST]', '</s>'),
    'llama 3': ('<|start_header_id|>assistant<|end_header_id|>\n\n', '<|eot_id|>'),
    'mistral': ('[/INST]', '</s>'),
    'gemma': ('<start_of_turn>model\n', '<end_of_turn>'),
    'zephyr': ('<|assistant|>\n', '</s>'),
}
# The same templates as transformers marks answers in them, written anew.
SAID = '{% generation %}{{ said }}{% endgeneration %}'
ANNOTATED = {
    'chatml': """{% if messages[0].role != 'system' %}<|im_start|>system
You help.<|im_end|>
{% endif %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set said = m.content + '<|im_end|>' %}
{%- if m.role == 'assistant' %}SAID{% else %}{{ said }}{% endif %}{{ '\n' }}{% endfor %}""",
    'llama 2': """{% set start = namespace(text='') %}{% for m in messages %}
{%- if m.role == 'system' %}{% set start.text = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}
{%- elif m.role == 'user' %}{{ bos_token + '[INST] ' + (start.text + m.content).strip() + ' [/INST]' }}
{%- set start.text = '' %}{% else %}{% set said = ' ' + m.content.strip() + ' </s>' %}SAID{% endif %}{% endfor %}""",
    'llama 3': """<s>{{ '<|start_header_id|>system<|end_header_id|>\n\n' }}
{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\n\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}{% endif %}<|eot_id|>
{%- for m in messages %}{% if m.role != 'system' %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}{% set said = m.content | trim + '<|eot_id|>' %}
{%- if m.role == 'assistant' %}SAID{% else %}{{ said }}{% endif %}{% endif %}{% endfor %}""",
    'gemma': """<s>{% for m in messages %}{% set said = m.content | trim + '<end_of_turn>' %}
{%- if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}SAID
{%- else %}{{ '<start_of_turn>user\n' + said }}{% endif %}{{ '\n' }}{% endfor %}""",
    'zephyr': """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}{% set said = m.content + '</s>' %}
{%- if m.role == 'assistant' %}SAID{% else %}{{ said }}{% endif %}{{ '\n' }}{% endfor %}""",
}
# Removes the thoughts from all answers but those after the last question, and writes empty ones there.
THINKS = """{% set last = namespace(question=0) %}{% for m in messages if m.role == 'user' %}
{%- set last.question = loop.index %}{% endfor %}{% set n = namespace(questions=0) %}{% for m in messages %}
{%- set said = m.content.split('</think>')[-1].strip() %}
{%- if m.role == 'user' %}{% set n.questions = n.questions + 1 %}{% endif %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and n.questions == last.question %}
{{- '<think>\n' }}{% if '</think>' in m.content %}
{{- m.content.split('</think>')[0].split('<think>')[-1].strip() }}{% endif %}
{{- '\n</think>\n\n' }}{% endif %}{{ said + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
SKIPPED = [SYSTEM, user('Hello'), assistant('How are you?'), assistant('Well?'), user('there')]


def learned(spec, messages):
    """The conversation by encode_supervised -> ids, mask, tokenizer, with the ids checked against encode()."""
    tokenizer, template = load_tokenizer(spec), ChatTemplate(spec)
    ids, mask = template.encode_supervised(messages, tokenizer)
    assert ids.tolist() == template.encode(messages, tokenizer, add_generation_prompt=False)
    assert len(mask) == len(ids) and mask.dtype == bool
    return ids, mask, tokenizer


def runs(ids, mask, tokenizer):
    """The text of each run of learned tokens."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return [tokenizer.decode(ids[start:end].tolist()) for start, end in edges.reshape(-1, 2)]


def fitting(family):
    """The conversations that a family's template takes and shows completely; one of them does not alternate."""
    found = [*CONVERSATIONS, *([SKIPPED] if family in ('chatml', 'llama 3', 'zephyr') else [])]
    if family == 'mistral':  # moves a system message to the last question
        found = [messages for messages in found if len(messages) < 4 or messages[0] is not SYSTEM]
    return [messages for messages in found if family != 'gemma' or messages[0] is not SYSTEM]


@pytest.mark.parametrize('family', MARKS)
def test_learned_tokens_equal_a_search_for_the_text(family):
    """Between what precedes an answer and the token that ends it, by the text of each token alone."""
    header, end = map(re.escape, MARKS[family])
    for messages in fitting(family):
        ids, mask, tokenizer = learned(make_spec(TEMPLATES[family]), messages)
        pieces = [bytes(tokenizer.tokenizer.decode([id], skip_special_tokens=False), 'utf-8') for id in ids.tolist()]
        text = tokenizer.decode(ids.tolist())
        if not text.isascii():  # characters of several tokens are no text alone
            continue
        ends = np.cumsum([len(piece) for piece in pieces])
        expected = np.zeros(len(ids), dtype=bool)
        for match in re.finditer(f'(?s){header}(.*?{end})', text):
            expected |= (match.start(1) < ends) & (ends <= match.end(1))
        assert mask.tolist() == expected.tolist()
        assert len(runs(ids, mask, tokenizer)) == sum(message['role'] == 'assistant' for message in messages)


@pytest.mark.parametrize('kind', ['bytes', 'metaspace'])
@pytest.mark.parametrize('family', ANNOTATED)
def test_learned_tokens_equal_transformers(family, kind):
    """transformers marks what the annotated template says; we find it in the plain one, and read the annotated one."""
    spec, annotated = (make_spec(t, kind) for t in (TEMPLATES[family], ANNOTATED[family].replace('SAID', SAID)))
    theirs = hugging_face_tokenizer(annotated)
    for messages in fitting(family):
        expected = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        for ours in (spec, annotated):
            ids, mask, _ = learned(ours, messages)
            assert ids.tolist() == expected['input_ids']
            assert mask.astype(int).tolist() == expected['assistant_masks']


def test_what_is_learned():
    """By hand: empty answers are their end alone, the next turn's start ends one where nothing else does."""
    messages = [user('Hello'), assistant(''), user('you'), assistant('  Well \n')]
    for family, expected in (
        ('chatml', ['<|im_end|>', '  Well \n<|im_end|>']),
        ('llama 3', ['<|eot_id|>', 'Well<|eot_id|>']),
        ('llama 2', ['  </s>', ' Well </s>']),
        ('glm', ['\n<|user|>', '\n  Well \n']),
    ):
        assert runs(*learned(make_spec(TEMPLATES[family]), messages)) == expected
    assert not learned(make_spec(TEMPLATES['chatml']), messages[:1])[1].any()


def test_templates_that_rewrite_answers():
    """What is learned is what the template writes, in the form that the model will write it in."""
    said = [user('a'), assistant('<think>\nso\n</think>\n\nHello'), user('b'), assistant('<think>and</think>you')]
    assert runs(*learned(make_spec(THINKS), said)) == ['Hello<|im_end|>', '<think>\nand\n</think>\n\nyou<|im_end|>']
    plain = [user('a'), assistant('Hello'), user('b'), assistant('you'), assistant('are')]
    empty = '<think>\n\n</think>\n\n'
    expected = ['Hello<|im_end|>', f'{empty}you<|im_end|>', f'{empty}are<|im_end|>']
    assert runs(*learned(make_spec(THINKS), plain)) == expected


def test_a_token_across_the_start_of_an_answer_is_not_learned():
    """The prompt holds its first character, so the model never writes it. Nor where the tokenizer's offsets leave white
    space out, as GPT-2's do."""
    from tokenizers import Tokenizer, processors

    template = (
        "{% for m in messages %}{{ m.role + ': ' }}{% generation %}{{ m.content }}</s>{% endgeneration %}{% endfor %}"
    )
    spec = make_spec(template)
    library = Tokenizer.from_str(spec['json'])
    library.post_processor = processors.ByteLevel(trim_offsets=True)
    for each in (spec, {**spec, 'json': library.to_str()}):
        ids, mask, tokenizer = learned(each, [assistant('you')])
        across = [tokenizer.decode([id]) for id in ids[~mask].tolist()][-1]
        assert across.startswith(' y') and runs(ids, mask, tokenizer) == ['you</s>'[len(across) - 1 :]]


def test_special_tokens_that_take_white_space():
    """As Phi-3's: the token that ends a turn takes the line end after it, the header the start of the answer."""
    from tokenizers import AddedToken, Tokenizer

    spec = make_spec(TEMPLATES['zephyr'].replace('eos_token', "'<|end|>'"))
    library = Tokenizer.from_str(spec['json'])
    library.add_special_tokens([AddedToken('<|end|>', rstrip=True), AddedToken('<|assistant|>', rstrip=True)])
    spec['json'] = library.to_str()
    messages = [user('a'), assistant('Hello'), user('b'), assistant(' you')]
    assert runs(*learned(spec, messages)) == ['Hello<|end|>', 'you<|end|>']


@pytest.mark.parametrize(
    'template, messages, expected',
    [
        (TEMPLATES['mistral'], CONVERSATIONS[4], 'message 3: .*not write the conversation before this answer'),
        (
            TEMPLATES['chatml'].replace("assistant\n' }}", "assistant\n<think>' }}"),
            CONVERSATIONS[1],
            'message 2: .*writes the prompt for it',
        ),
        ('{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}', CONVERSATIONS[1], 'not the answer as it is'),
        ('{{ messages[0].content }}', CONVERSATIONS[1], 'not the answer as it is'),
        ('{% for m in messages %}{{ m.content ~ m.content }}{% endfor %}', CONVERSATIONS[1], 'not the answer as it is'),
        (
            '{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}',
            CONVERSATIONS[1],
            "ignores add_generation_prompt, so 'assistant: ' would",
        ),
        (
            '{% macro turn(m) %}{{ m.role }}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro %}'
            '{% for m in messages %}{{ turn(m) }}{% endfor %}',
            CONVERSATIONS[1],
            'a block whose text it writes elsewhere',
        ),
        (TEMPLATES['llama 2'], [user('a'), user('b')], 'take turns'),
    ],
)
def test_templates_that_do_not_show_the_answers(template, messages, expected):
    spec = make_spec(template)
    with pytest.raises(UserError, match=expected):
        ChatTemplate(spec).encode_supervised(messages, load_tokenizer(spec))


# --- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('window, longest', [(64, 64), (64, 20), (7, 7), (1000, 300)])
def test_packing(window, longest):
    """Every conversation once; equal to a search through all windows for the one that is left the fullest; so no two
    windows that are half empty."""
    lengths = [random.Random(longest).randint(1, longest) for _ in range(400)]
    windows = pack(lengths, window)
    assert sorted(i for numbers in windows for i in numbers) == list(range(400))
    assert windows == pack(lengths, window)
    fills = []
    for length in sorted(lengths, reverse=True):
        fitting = [w for w, fill in enumerate(fills) if fill + length <= window]
        if not fitting:
            fills.append(0)
        w = max(fitting, key=fills.__getitem__, default=len(fills) - 1)
        fills[w] += length
    assert sorted(fills) == sorted(sum(lengths[i] for i in numbers) for numbers in windows)
    assert sum(fill <= window // 2 for fill in fills) <= 1


# --- files ------------------------------------------------------------------------------------------------------------


def test_formats():
    messages = [user('a'), assistant('b')]
    assert messages_of({'messages': messages, 'id': 3}) == messages
    assert messages_of({'prompt': 'a', 'completion': 'b'}) == messages
    assert messages_of({'prompt': messages[:1], 'completion': messages[1:]}) == messages
    assert messages_of({'prompt': messages[:1], 'completion': 'b', 'messages': None}) == messages
    turns = [{'from': 'human', 'value': 'a'}, {'from': 'gpt', 'value': 'b'}]
    assert messages_of({'conversations': turns}) == messages
    system = {'role': 'system', 'content': 's'}
    assert messages_of({'conversations': [{'from': 'system', 'value': 's'}, *turns]}) == [system, *messages]
    assert messages_of({'system': 's', 'conversations': turns}) == [system, *messages]
    assert messages_of({'messages': [user('\ud83d'), *messages]})[0] == user('\ufffd')


@pytest.mark.parametrize(
    'row, expected',
    [
        ([], 'no object with "messages"'),
        ({'text': 'a'}, 'no object with "messages"'),
        ({'completion': 'a'}, '"prompt" and "completion"'),
        ({'messages': 'a'}, 'a list of messages was expected'),
        ({'messages': []}, 'without messages'),
        ({'messages': ['a']}, "not an object with a role and a text, but 'a'"),
        ({'messages': [{'role': 'tool', 'content': 'a'}]}, "by 'tool': it must be one of system, user"),
        ({'messages': [{'role': ['user'], 'content': 'a'}]}, 'it must be one of'),
        ({'messages': [user(None)]}, 'message 1 must hold a text, not None'),
        ({'messages': [user([{'type': 'image', 'url': 'a'}])]}, 'must hold a text'),
        ({'messages': [{**assistant(''), 'tool_calls': [1]}]}, "has 'tool_calls', which is not read"),
    ],
)
def test_rows_that_are_no_conversations(row, expected):
    with pytest.raises(ValueError, match=expected):
        messages_of(row)


def test_reading(tmp_path):
    """A folder of all kinds of files, in the order of their names; errors name the line."""
    rows = [{'messages': [user(f'{n}'), assistant('b')]} for n in range(12)]
    lines = [json.dumps(row) + '\n' for row in rows]
    (tmp_path / 'a.jsonl').write_text('\ufeff' + '\n'.join(lines[:3]))
    (tmp_path / 'b.json').write_text(json.dumps(rows[3:6], indent=1))
    (tmp_path / 'c.jsonl.gz').write_bytes(gzip.compress(''.join(lines[6:9]).encode()))
    (tmp_path / 'd.json.zst').write_bytes(pytest.importorskip('zstandard').compress(''.join(lines[9:11]).encode()))
    (tmp_path / 'readme.md').write_text('no conversations')
    arrow = pytest.importorskip('pyarrow')
    import pyarrow.parquet

    pyarrow.parquet.write_table(arrow.Table.from_pylist([{'id': 1, **rows[11]}]), tmp_path / 'e.parquet')
    read = list(read_rows(str(tmp_path)))
    assert [messages_of(row) for _, row in read] == [row['messages'] for row in rows]
    assert [os.path.basename(where) for where, _ in read[::5]] == [
        'a.jsonl, line 1',
        'b.json, number 3',
        'd.json.zst, line 2',
    ]
    (tmp_path / 'a.jsonl').write_text(lines[0] + '{"messages"')
    with pytest.raises(UserError, match='a.jsonl, line 2: this is not a line of JSON'):
        list(read_rows(str(tmp_path)))
    with pytest.raises(UserError, match='readme.md: conversations are read from .jsonl, .json and .parquet'):
        list(read_rows(str(tmp_path / 'readme.md')))


MODULE = '''"""Things to count with. More is in the manual.

Not this paragraph.
"""
def add(a, b=1, *, c: int = {}):
    """Add two numbers
    and a third."""
def _private():
    """Do something that nobody asks about."""
class Counter:
    """A class whose documentation is %s."""
    def clear(self):
        """Set the count to zero, from now on."""
    def again(self):
        """Set the count to zero, from now on."""
    def short(self):
        """Too short."""
def signature():
    """signature() -> nothing that reads as a sentence."""
''' % ('far longer than an answer may be, ' * 20)


def test_what_python_ships(tmp_path, monkeypatch):
    """Each thing is asked about once, with what its docstring begins with; nothing is imported."""
    (tmp_path / 'things').mkdir()
    (tmp_path / 'things' / 'count.py').write_text(MODULE + 'raise SystemExit')
    (tmp_path / 'things' / 'broken.py').write_text('def')
    monkeypatch.setattr('data.chat.python_docs.STDLIB', str(tmp_path))
    found = list(python_conversations())
    answers = [m['content'] for messages in found for m in messages if m['role'] == 'assistant']
    assert answers == [
        '`things.count`: Things to count with. More is in the manual.',
        '`things.count.add(a, b=1, *, c: int={})`: Add two numbers and a third.',
        '`things.count.Counter.clear()`: Set the count to zero, from now on.',
    ]
    questions = [m['content'] for messages in found for m in messages if m['role'] == 'user']
    assert all('things.count' in question for question in questions) and found == list(python_conversations())


# --- prepare.py and audit.py ------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The scripts in a folder of their own, with the tokenizers of two models."""
    folder = copy_scripts(tmp_path_factory.mktemp('copy'))
    for name, template in (('model', TEMPLATES['chatml']), ('base', '')):
        (folder / name).mkdir()
        spec = make_spec(template)
        (folder / name / 'tokenizer.json').write_text(spec['json'], encoding='utf-8')
        config = {**spec['special_tokens'], **({'chat_template': template} if template else {})}
        (folder / name / 'tokenizer_config.json').write_text(json.dumps(config))
    return folder


def make_rows(count=60):
    rng = random.Random(count)
    words = 'Hello there you and you are well then'.split()

    def text(longest=12):
        return ' '.join(rng.choices(words, k=rng.randint(1, longest)))

    rows = []
    for n in range(count):
        turns = [message for _ in range(rng.randint(1, 3)) for message in (user(f'{n} {text()}'), assistant(text()))]
        rows.append([SYSTEM, *turns] if n % 3 == 0 else turns)
    return rows


LONG = [user('too long'), assistant('you are ' * 100), user('Then'), assistant('x')]
EMPTY = [user('no answer')]
UNSEEN = [user('you are ' * 100), assistant('never seen')]


def prepare(copy, rows, name, *arguments):
    path = copy / f'{name}.jsonl'
    path.write_text(''.join(json.dumps(row if isinstance(row, dict) else {'messages': row}) + '\n' for row in rows))
    settings = [f'--input={name}.jsonl', '--tokenizer=model', '--block_size=128', *arguments]
    return run_forked(copy / 'data/chat/prepare.py', *settings, cwd=copy)


def read(copy, name, split):
    folder = copy / 'data/chat' / name
    meta = json.loads((folder / 'meta.json').read_text())
    files = [np.fromfile(folder / f'{split}{part}.bin', dtype) for part, dtype in PARTS]
    return meta, *files


PARTS = (('', '<u2'), ('_mask', 'u1'), ('_documents', '<u8'))


def test_a_data_set(copy, monkeypatch):
    """The files hold every conversation once, whole, as encode_supervised gives it, in windows; nothing else."""
    rows = make_rows()
    result = prepare(copy, [*rows, LONG, EMPTY, UNSEEN], 'set')
    assert result.returncode == 0, result.stderr
    monkeypatch.chdir(copy)
    spec = DataSet('chat/set').tokenizer
    assert spec['chat_template'] == TEMPLATES['chatml']
    template, tokenizer = ChatTemplate(spec), load_tokenizer(spec)
    encoded = [template.encode_supervised(messages, tokenizer) for messages in [*rows, LONG]]
    expected = sorted((ids[:128].tolist(), mask[:128].tolist()) for ids, mask in encoded)
    n_long = sum(len(ids) > 128 for ids, _ in encoded)
    found, n_val = [], 0
    for split in ('train', 'val'):
        meta, tokens, mask, documents = read(copy, 'set', split)
        assert len(tokens) == len(mask) == meta['tokens'][split] == len(DataSet('chat/set').tokens(split))
        assert len(tokens) % 128 == 1 and documents[0] == 0 and (np.diff(documents) > 0).all()
        assert set(range(0, len(tokens), 128)) <= set(documents.tolist()), 'no conversation crosses a window'
        padding = 0
        for start, end in zip(documents, [*documents[1:], len(tokens)]):
            ids, learn = tokens[start:end].tolist(), mask[start:end].astype(bool).tolist()
            if any(learn):
                found.append((ids, learn))
                n_val += split == 'val'
            else:
                assert set(ids) == {tokenizer.end_of_text}
                padding += len(ids)
        assert meta['padding'][split] == padding and meta['supervised'][split] == mask.sum()
    assert sorted(found) == expected
    assert meta['conversations'] == {'train': 61 - n_val, 'val': n_val} and 1 <= n_val < 20
    assert [meta[key] for key in ('window', 'truncated', 'empty', 'skipped')] == [128, n_long, 2, 0]
    assert f'{n_long:,} are longer than a window and lose their end, 2 without an answer' in result.stdout


def test_the_same_input_gives_the_same_files(copy):
    """And a conversation stays in its split, whatever else is there."""
    rows = make_rows()
    contents = []
    for name in ('first', 'second'):
        assert prepare(copy, rows, name).returncode == 0
        folder = copy / 'data/chat' / name
        contents.append({path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    assert contents[0] == contents[1]
    assert {f'{s}{part}.bin' for s in ('train', 'val') for part, _ in PARTS} | {'meta.json'} == set(contents[0])
    before = in_val(copy, 'first')
    (copy / 'data/chat/first/train_000.bin').write_bytes(b'stale')
    result = prepare(copy, rows[20:], 'first')
    assert 'replacing the data set chat/first' in result.stdout
    assert in_val(copy, 'first') and in_val(copy, 'first') <= before
    assert not (copy / 'data/chat/first/train_000.bin').exists()


def in_val(copy, name):
    """The conversations for validation, in tokens."""
    _, tokens, mask, documents = read(copy, name, 'val')
    edges = [*documents.tolist(), len(tokens)]
    return {tuple(tokens[a:b].tolist()) for a, b in zip(edges, edges[1:]) if mask[a:b].any()}


def test_a_failure_keeps_the_earlier_data_set(copy):
    """A full disk while the files are written: nothing of the new ones is there, the old ones are."""
    import data.chat.conversations as module

    folder = copy / 'data/chat/kept'
    assert prepare(copy, make_rows(), 'kept').returncode == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    spec = make_spec(TEMPLATES['chatml'])
    conversation = module.Conversation(np.arange(5), np.arange(5) > 2)
    bad = module.Conversation(np.arange(5), None)
    with pytest.raises(AttributeError):
        module.write(str(folder), {'train': [conversation], 'val': [bad]}, 8, 0, {'tokenizer': spec, 'dtype': 'uint16'})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize('renamed', range(7))
def test_a_crash_leaves_nothing_to_train_on(tmp_path, monkeypatch, renamed):
    """However many of the seven files have got their names: without train.bin, training does not start."""
    import common.files
    import data.chat.conversations as module

    conversations = [module.Conversation(np.arange(5), np.arange(5) > 2)]
    arguments = str(tmp_path), {'train': conversations, 'val': conversations}, 8, 0, {'dtype': 'uint16'}
    module.write(*arguments)
    assert len(list(tmp_path.iterdir())) == 7
    replace, done = common.files.replace, []

    def crash(part, path):
        if len(done) == renamed:
            raise KeyboardInterrupt
        done.append(path)
        replace(part, path)

    monkeypatch.setattr(common.files, 'replace', crash)
    with pytest.raises(KeyboardInterrupt):
        module.write(*arguments)
    assert not (tmp_path / 'train.bin').exists() and not list(tmp_path.glob('*.part'))


def test_two_conversations_are_enough(copy):
    """Each split gets one, at any val_fraction."""
    for fraction in ('0.001', '0.999'):
        assert prepare(copy, make_rows(2), 'two', f'--val_fraction={fraction}').returncode == 0
        assert read(copy, 'two', 'val')[0]['conversations'] == {'train': 1, 'val': 1}


def test_a_template_of_ones_own(copy):
    """For a model without one; it is stored with the data, and with every model trained on them."""
    (copy / 'own.jinja').write_text(TEMPLATES['zephyr'])
    settings = '--tokenizer=base', '--chat_template=own.jinja'
    assert prepare(copy, make_rows(), 'own', *settings).returncode == 0
    assert read(copy, 'own', 'val')[0]['tokenizer']['chat_template'] == TEMPLATES['zephyr']


def test_bad_rows_can_be_left_out(copy):
    rows = [*make_rows(5), {'text': 'a'}, [user('a'), {'role': 'tool', 'content': ''}]]
    result = prepare(copy, rows, 'bad', '--skip_bad=True')
    assert result.returncode == 0 and '2 unreadable ones are left out' in result.stdout
    assert result.stderr.startswith('warning: bad.jsonl, line 6: no object with') and result.stderr.count('\n') == 1


@pytest.mark.parametrize(
    'rows, arguments, expected',
    [
        ([{'text': 'a'}], '', 'bad.jsonl, line 1: no object with "messages"'),
        (
            [*make_rows(2), [user('a'), {'role': 'tool', 'content': ''}]],
            '',
            "bad.jsonl, line 3: message 2 is by 'tool'",
        ),
        ([EMPTY], '', 'none of its conversations has an answer to learn from'),
        (make_rows(1) * 2, '', 'fewer than two different conversations'),
        (make_rows(2), '--tokenizer=', 'which model is to be fine-tuned?'),
        (make_rows(2), '--tokenizer=none', '--tokenizer=none: must be the tokenizer.json of a Hugging Face model'),
        (make_rows(2), '--tokenizer=base', 'has no chat template; give one, as --chat_template='),
        (make_rows(2), '--chat_template=none.jinja', 'cannot read none.jinja: No such file'),
        (make_rows(2), '--input=none.jsonl', '--input=none.jsonl: there is no such file or folder'),
        (make_rows(2), '--input=', 'which conversations?'),
        (make_rows(2), '--name=a/b', "--name='a/b': must be a plain name, it becomes a folder in data/chat"),
        (make_rows(2), '--block_size=1', '--block_size=1: must be from 2 to'),
        (make_rows(2), '--val_fraction=1', '--val_fraction=1.0: must be between 0 and 1'),
    ],
)
def test_mistakes(copy, rows, arguments, expected):
    result = prepare(copy, rows, 'bad', *arguments.split())
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    assert expected in result.stderr


def audit(copy, *arguments):
    return run_forked(copy / 'data/chat/audit.py', *arguments, cwd=copy)


def test_audit(copy):
    assert prepare(copy, [*make_rows(), LONG, EMPTY], 'seen').returncode == 0
    result = audit(copy, 'seen', '--show=2')
    assert result.returncode == 0 and not result.stderr, result.stderr
    meta, tokens, mask, _ = read(copy, 'seen', 'train')
    assert f'{mask.mean():.1%} are learned, {meta["padding"]["train"] / len(tokens):.1%} are padding' in result.stdout
    n = sum(meta['conversations'].values()) + 1
    shares = f'{meta["truncated"] / n:.1%}) are cut at the end of a window; 1 ({1 / n:.1%}) without an answer'
    assert f'{meta["truncated"]} ({shares}' in result.stdout
    assert 'with the end of the turn' in result.stdout
    assert result.stdout.count('\ntrain at ') == 2
    shown = [m['content'] for example in meta['examples'][:2] for m in example['messages'] if m['role'] == 'assistant']
    assert re.findall(r'\[\[(.*?)<\|im_end\|>]]', result.stdout) == shown
    assert '8 conversations encoded again give the stored tokens, here and in transformers' in result.stdout


@pytest.mark.parametrize(
    'part, value, expected', [('_mask', 0, 'is all zeros: no token of the split is a target'), ('', 9, 'other tokens')]
)
def test_audit_finds_what_is_wrong(copy, part, value, expected):
    assert prepare(copy, make_rows(), 'wrong').returncode == 0
    path = copy / f'data/chat/wrong/train{part}.bin'
    content = np.fromfile(path, dict(PARTS)[part])
    at = read(copy, 'wrong', 'train')[0]['examples'][0]['at']
    content[slice(at, at + 1) if value else slice(None)] = value
    content.tofile(path)
    result = audit(copy, 'wrong')
    assert result.returncode == 2 and result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
    assert expected in result.stderr


def test_audit_warns_of_answers_without_an_end(copy):
    (copy / 'endless.jinja').write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert prepare(copy, make_rows(), 'endless', '--chat_template=endless.jinja').returncode == 0
    result = audit(copy, 'endless')
    assert result.returncode == 0 and '0.0% with the end of the turn' in result.stdout
    for split, line in zip(('train', 'val'), result.stderr.splitlines(), strict=True):
        assert line.startswith(f'warning: {split}: no answer ends with a token that ends a turn')


def test_audit_of_something_else(copy):
    (copy / 'data/chat/text').mkdir()
    (copy / 'data/chat/text/meta.json').write_text('{"vocab_size": 3}')
    for name, expected in (('text', 'is not a data set of conversations'), ('', 'which data set?')):
        result = audit(copy, f'--name={name}')
        assert result.returncode == 2 and expected in result.stderr


def test_a_template_that_marks_the_wrong_turns():
    """What the user wrote, or more than the answers."""
    turn = '{% generation %}{{ m.content }}</s>{% endgeneration %}'
    for condition in ("m.role == 'user'", 'true'):
        marked = '{% if ' + condition + ' %}' + turn + '{% else %}{{ m.content }}{% endif %}'
        template = '{% for m in messages %}' + marked + '{% endfor %}'
        spec = make_spec(template)
        with pytest.raises(UserError, match='which are not the 1 answers'):
            ChatTemplate(spec).encode_supervised([user('Hello'), assistant('you')], load_tokenizer(spec))


def test_a_data_set_that_lost_its_mask_or_documents(tmp_path):
    """It is not taken for one where all is learned, or nothing kept apart."""
    conversations = [Conversation(np.arange(5), np.arange(5) > 2)] * 3
    meta = {'tokenizer': {'kind': 'byte'}, 'vocab_size': 257, 'dtype': 'uint16'}
    write(str(tmp_path), {'train': conversations, 'val': conversations}, 8, 0, meta)
    data = DataSet(str(tmp_path))
    assert data.tokens('train', mask_documents=True).marks_documents
    mask, documents = tmp_path / 'train_mask.bin', tmp_path / 'train_documents.bin'
    content = mask.read_bytes()
    mask.write_bytes(content[:-1] + bytes([1]))
    with pytest.raises(UserError, match='marks 7 targets, meta.json says 6'):
        data.tokens('train')
    mask.unlink()
    with pytest.raises(UserError, match='train_mask.bin is missing'):
        data.tokens('train')
    mask.write_bytes(content)
    for wrong in (documents.read_bytes()[:-3], documents.read_bytes()[:-8]):
        documents.write_bytes(wrong)
        with pytest.raises(UserError, match='it must hold 7 offsets of 8 bytes'):
            data.tokens('train', mask_documents=True)
    documents.unlink()
    with pytest.raises(UserError, match='cannot read .*train_documents.bin'):
        data.tokens('train', mask_documents=True)
