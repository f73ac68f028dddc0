"""The documents: README's diffs apply and train, links lead somewhere, what is generated or counted is up to date."""

import re
import subprocess

import pytest
from conftest import REPO, TINY, copy_scripts, metrics, run_forked_ok, run_ok

README = (REPO / 'README.md').read_text(encoding='utf-8')
DOCUMENTS = [REPO / 'README.md', *REPO.glob('[A-Z]*.md'), *REPO.glob('docs/*.md'), *REPO.glob('data/*/readme.md')]
CHANGES = re.findall(r'```diff\n(.*?)```.*?```\n(.*?)```', README, re.DOTALL)  # (diff, commands) of each


@pytest.fixture
def clone(workspace):
    """The scripts in a folder of their own, with the data set data/tiny."""
    return copy_scripts(workspace)


def losses(clone, out, *arguments):
    """Train in the clone -> the losses of its iterations."""
    run_forked_ok(clone / 'train.py', *TINY, '--block_size=32', f'--out_dir={out}', *arguments, cwd=clone)
    return [record['loss'] for record in metrics(clone / out)[0]]


@pytest.mark.parametrize('change', range(3))
def test_a_worked_change(clone, change):
    diff, commands = CHANGES[change]
    before = losses(clone, 'before')
    subprocess.run(['git', 'apply', '-'], input=diff, text=True, cwd=clone, check=True)
    if 'prepare.py' in commands:
        run_ok(clone / re.search(r'python (data/\S+/prepare.py)', commands)[1], cwd=clone)
    train = re.search(r'python train.py (.*)', commands)[1]
    settings = [setting for setting in re.findall(r'--\S+=\S+', train) if not setting.startswith('--out_dir')]
    assert settings and before != losses(clone, 'after', *settings)
    if 'attention_window' in train:
        assert losses(clone, 'wide', '--attention_window=32') == pytest.approx(before, abs=1e-4)
        sample = ['--out_dir=after', '--device=cpu', '--num_samples=2', '--max_new_tokens=50']
        assert run_forked_ok(clone / 'sample.py', *sample, cwd=clone).count('---------------') == 2


def test_sizes():
    assert len(CHANGES) == 3
    assert len(README.split()) <= 1600
    assert len((REPO / 'BENCHMARKS.md').read_text(encoding='utf-8').splitlines()) <= 140


def anchors(document):
    """The anchors that GitHub gives a document's headings."""
    headings = re.findall(r'^#+ (.*)', document.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def test_links():
    for document in DOCUMENTS:
        text = re.sub(r'```.*?```', '', document.read_text(encoding='utf-8'), flags=re.DOTALL)
        for link in re.findall(r'\]\(([^)\s]+)\)', text):
            if not link.startswith('https://'):
                path, _, anchor = link.partition('#')
                target = document.parent / path if path else document
                assert target.exists(), f'{document.name}: {link}'
                assert not anchor or anchor in anchors(target), f'{document.name}: {link}'


def test_the_file_tree_is_complete():
    tree = re.search(r'## Files\n\n```\n(.*?)```', README, re.DOTALL)[1]
    named = re.findall(r'\S+\.py', tree)
    paths = [
        path for folder in ('', 'formats', 'preflight', 'common', 'tools') for path in (REPO / folder).glob('*.py')
    ]
    assert sorted(named) == sorted(path.name for path in paths if path.name != '__init__.py')


def test_the_list_of_settings_is_up_to_date(tmp_path):
    expected = run_forked_ok('tools/settings.py', cwd=tmp_path)
    assert (REPO / 'docs' / 'settings.md').read_text(encoding='utf-8') == expected, 'see its first line'
    assert str(REPO) not in expected


def test_one_version():
    version = re.search(r'^version = "(.*)"', (REPO / 'pyproject.toml').read_text(encoding='utf-8'), re.MULTILINE)[1]
    newest = re.search(r'^## (\S+)', (REPO / 'CHANGELOG.md').read_text(encoding='utf-8'), re.MULTILINE)[1]
    assert version == newest
    assert 'version:' not in (REPO / 'CITATION.cff').read_text(encoding='utf-8').replace('cff-version:', '')
    assert version not in ''.join(path.read_text(encoding='utf-8') for path in REPO.glob('*.py'))
