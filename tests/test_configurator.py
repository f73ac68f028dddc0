"""Settings: order, types, names, help; and how an error is reported."""

import os
import shutil
import subprocess
import sys

import pytest
from conftest import REPO, environment, run_forked

from common.errors import UserError
from configurator import Config, configure, read_settings
from model import GPTConfig


def settings():
    values = {'rate': 1e-3, 'steps': 10, 'name': 'x', 'flag': False, 'maybe': None}
    return {**values, '_hidden': 3, 'module': pytest, '__file__': __file__}


def test_order_is_left_to_right(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('steps = 20\nrate = 1\n')
    globals_ = settings()
    config = configure(globals_, ['--steps=5', str(file), '--rate=2e-4'])
    assert config == {'rate': 2e-4, 'steps': 20, 'name': 'x', 'flag': False, 'maybe': None}
    assert globals_['steps'] == 20 and config.given == {'steps', 'rate'} and isinstance(config, Config)
    assert configure(settings(), [str(file), '--steps=5'])['steps'] == 5


def test_widenings():
    config = configure(settings(), ['--rate=1', '--name=12', '--maybe=a=b', '--flag=True'])
    assert config == {'rate': 1.0, 'steps': 10, 'name': '12', 'flag': True, 'maybe': 'a=b'}
    assert type(config['rate']) is float and config['flag'] is True
    assert configure(settings(), ['--name=a=b'])['name'] == 'a=b'
    assert configure(settings(), ['--maybe=3'])['maybe'] == 3


def test_config_file_is_python(tmp_path):
    file = tmp_path / 'c.py'
    text = 'import os\nfrom math import sqrt\n_k = 2\nsteps = sum(_k * i for i in range(4)) + steps\n'
    file.write_text(text + 'name = os.path.join("ä", "b")\n', encoding='utf-8')
    config = configure(settings(), [str(file)])
    assert config['steps'] == 22 and config['name'] == 'ä/b'


@pytest.mark.parametrize(
    'argument, words',
    [
        ('--step=3', "unknown setting 'step'; the nearest is 'steps'"),
        ('--steps=3.5', 'whole number'),
        ('--steps=True', 'whole number'),
        ('--flag=1', 'True or False'),
        ('--rate=fast', 'a number'),
        ('--steps', 'write it as --steps=VALUE'),
        ('--_hidden=4', 'unknown'),
        ('--module=4', 'unknown'),
        ('absent.py', 'cannot read the config file absent.py'),
    ],
)
def test_mistakes_on_the_command_line(argument, words):
    with pytest.raises(UserError, match=words):
        configure(settings(), [argument])


@pytest.mark.parametrize(
    'text, words',
    [
        ('stepz = 3', "unknown setting 'stepz'; the nearest is 'steps'"),
        ('steps = "3"', 'whole number'),
        ('x = (', 'not valid Python'),
        ('a = 1\nsteps = 1 / 0', 'line 2: ZeroDivisionError'),
        ('name = 3', 'text in quotes'),
    ],
)
def test_mistakes_in_a_config_file(tmp_path, text, words):
    file = tmp_path / 'c.py'
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        configure(settings(), [str(file)])


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py', 'tools/plot.py', 'data/text/prepare.py'])
def test_help_explains_every_setting(script, tmp_path):
    result = run_forked(script, '--help', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split('Settings, given as')[1].splitlines()[1:]
    assert len(lines) > 3
    for line in lines:
        setting, _, comment = line.strip().partition(' ')
        assert setting.startswith('--') and '=' in setting
        assert comment.strip(), f'no comment: {line}'


@pytest.mark.parametrize('path', sorted((REPO / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path):
    """With train.py's own defaults, read without running it, and by bench.py, which has other settings."""
    train = {'__file__': str(REPO / 'train.py'), **read_settings(REPO / 'train.py')}
    config = configure(train, [str(path)], fields=GPTConfig)
    assert config.given
    bench = configure(read_settings(REPO / 'bench.py'), [str(path)], fields=GPTConfig, recipe='train.py')
    assert all(bench[key] == config[key] for key in bench.given)


def test_texts_add_up(tmp_path):
    """Each --key=text appends to a tuple of strings, an empty text empties it; a config file replaces it."""
    path = tmp_path / 'config.py'
    path.write_text("stop = ['c', '']", encoding='utf-8')
    settings = lambda: {'stop': (), 'other': 1}  # noqa: E731
    assert configure(settings(), ['--stop=a', '--stop=1', '--stop=(b'])['stop'] == ('a', '1', '(b')
    assert configure(settings(), ['--stop=a', str(path), '--stop=d'])['stop'] == ('c', 'd')
    assert configure(settings(), ['--stop=a', '--stop='])['stop'] == ()
    path.write_text('stop = 1', encoding='utf-8')
    with pytest.raises(UserError, match='stop must be a tuple of strings, not 1'):
        configure(settings(), [str(path)])


# --- the settings of another script ----------------------------------------------------------------------------------


def test_a_script_takes_the_command_line_of_another(tmp_path):
    """Config.recipe is what train.py itself makes of the same arguments, whatever the script's own settings are."""
    file = tmp_path / 'c.py'
    file.write_text("n_layer = 3\npos = 'rope'\ncompile = False\nmine = 2\ntrackers = ['a']\n")
    shared = ['--n_head=2', str(file), '--learning_rate=1', '--compile=True', '--out_dir=~/x', '--trackers=b']
    options = {'fields': GPTConfig, 'paths': ('out_dir', 'init_from')}
    train = {'__file__': str(REPO / 'train.py'), **read_settings(REPO / 'train.py'), 'mine': 1}
    expected = configure(train, shared, **options)

    script = {'__file__': __file__, 'mine': 1}
    config = configure(script, ['--mine=5', *shared, '--mine=7'], **options, recipe='train.py', recipe_flags=True)
    assert config == {'mine': 7} and script['mine'] == 7 and 'n_layer' not in script
    assert config.recipe == {key: value for key, value in expected.items() if key != 'mine'}
    assert config.given == expected.given and config.recipe.given == expected.given - {'mine'}
    assert config.recipe['bias'] is False, "train.py's default, not that of GPTConfig"


def test_flags_of_another_script_must_be_allowed(capsys):
    """Without recipe_flags they are an error, and with it a misspelt one is."""
    for options, argument in (({}, '--n_layer=2'), ({'recipe_flags': True}, '--n_layre=2')):
        with pytest.raises(UserError, match='unknown setting'):
            configure({'__file__': __file__, 'mine': 1}, [argument], recipe='train.py', **options)
    with pytest.raises(UserError, match="unknown setting 'n_layre'; the nearest is 'n_layer'"):
        configure({'__file__': __file__, 'mine': 1}, ['--n_layre=2'], recipe='train.py', recipe_flags=True)
    with pytest.raises(SystemExit):
        configure({'__file__': __file__, 'mine': 1}, ['--help'], recipe='train.py', recipe_flags=True)
    assert 'Every setting of train.py' in (text := capsys.readouterr().out) and '--mine=1' in text


# --- what a config file may do ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'text',
    [
        "exec(open(FOLDER + '/base.py').read())",
        'from base import *',
        'import base\nsteps, name = base.steps, base.name',
        "globals().update(steps=20, name='b')",
        "for _k, _v in {'steps': 20, 'name': 'b'}.items(): globals()[_k] = _v",
        "import runpy\n_b = runpy.run_path(FOLDER + '/base.py')\nglobals().update(steps=_b['steps'], name=_b['name'])",
        "def _use():\n    global steps, name\n    steps, name = 20, 'b'\n_use()",
        'import base as _b\nvars().update(vars(_b))',
        "class _Base:\n    steps = 20\nsteps = _Base.steps\nname = [c for c in 'ab'][1]",
    ],
)
def test_every_way_of_assigning_counts(tmp_path, monkeypatch, text):
    """The setting has its value, and counts as given."""
    monkeypatch.delitem(sys.modules, 'base', raising=False)
    (tmp_path / 'base.py').write_text("steps = 20\nname = 'b'\n")
    program = f'_k = FOLDER = {str(tmp_path)!r}\n{text}\nrate = 0.5\n'.replace('FOLDER', '_FOLDER')
    (tmp_path / 'c.py').write_text(program)
    config = configure(settings(), [str(tmp_path / 'c.py')])
    assert (config['steps'], config['name'], config['rate']) == (20, 'b', 0.5)
    assert config.given == {'steps', 'name', 'rate'}
    assert str(tmp_path) not in sys.path


def test_a_setting_given_its_default_is_given(tmp_path):
    (tmp_path / 'base.py').write_text('steps = 10\n')
    (tmp_path / 'c.py').write_text(f'exec(open({str(tmp_path / "base.py")!r}).read())\n')
    assert configure(settings(), [str(tmp_path / 'c.py')]).given == {'steps'}


def test_a_typo_in_an_inherited_file_is_found(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, 'typo', raising=False)
    (tmp_path / 'typo.py').write_text('stepz = 20\n')
    for text in (f'exec(open({str(tmp_path / "typo.py")!r}).read())', 'from typo import *'):
        (tmp_path / 'c.py').write_text(text)
        with pytest.raises(UserError, match="unknown setting 'stepz'; the nearest is 'steps'"):
            configure(settings(), [str(tmp_path / 'c.py')])


def test_byte_order_mark_and_imported_names(tmp_path):
    (tmp_path / 'c.py').write_bytes(b'\xef\xbb\xbfsteps = 3\r\nfrom math import pi, e as euler\r\nimport os.path\r\n')
    assert configure(settings(), [str(tmp_path / 'c.py')]).given == {'steps'}


def test_numbers_and_paths_of_other_kinds(tmp_path):
    (tmp_path / 'c.py').write_text(
        'import numpy as np\nfrom pathlib import Path\nsteps = np.int64(7)\nrate = np.float32(0.5)\n'
        'flag = np.bool_(True)\nname = Path("a") / "b"\n'
    )
    config = configure(settings(), [str(tmp_path / 'c.py')])
    assert config == {'rate': 0.5, 'steps': 7, 'name': os.path.join('a', 'b'), 'flag': True, 'maybe': None}
    assert {type(config[key]) for key in ('steps', 'rate', 'flag')} == {int, float, bool}
    assert configure(settings(), ['--steps=007'])['steps'] == 7 and configure(settings(), ['--rate=1_0'])['rate'] == 10


def test_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.setenv('USERPROFILE', str(tmp_path))
    assert configure(settings(), ['--name=~/a'], paths=('name',))['name'] == str(tmp_path) + '/a'
    assert configure(settings(), ['--name=~/a'])['name'] == '~/a', 'only paths change'


def test_fields_of_a_dataclass_are_settings(capsys):
    """With the comments of their source; a setting of the script itself comes first."""
    own = {'n_layer': 3, '__file__': __file__}
    config = configure(own, ['--pos=rope'], fields=GPTConfig)
    assert config['n_layer'] == own['n_layer'] == 3 and own['pos'] == 'rope' and config['qk_norm'] is False
    with pytest.raises(SystemExit):
        configure({'__file__': __file__}, ['--help'], fields=GPTConfig)
    assert "--pos='learned'" in (text := capsys.readouterr().out) and 'one of POSITIONS' in text


# --- errors -----------------------------------------------------------------------------------------------------------


def test_one_line_keeps_its_place(tmp_path):
    """A converted exception and lack of memory name the last file and line of the project, a UserError does not."""
    shutil.copy(REPO / 'configurator.py', tmp_path)
    shutil.copytree(REPO / 'common', tmp_path / 'common')
    (tmp_path / 'deep.py').write_text('\n\ndef work(kind):\n    raise kind("broken")\n')
    (tmp_path / 'script.py').write_text(
        'from common.errors import UserError, user_errors\nfrom configurator import configure\n'
        'from deep import work\nkind = ""\n'
        'configure(globals())\nif kind == "plain":\n    raise UserError("plain")\n'
        'kinds = dict(value=ValueError, memory=MemoryError, file=FileNotFoundError)\n'
        'with user_errors(ValueError, OSError, where="turned: "):\n    work(kinds[kind])\n'
    )

    def error(kind, **extra):
        command, env = [sys.executable, 'script.py', f'--kind={kind}'], environment(**extra)
        result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert result.returncode == 2
        return result.stderr

    assert error('value') == 'error: turned: broken [deep.py:4]\n'
    assert error('memory').startswith('error: out of memory: ') and error('memory').endswith(' [deep.py:4]\n')
    assert error('plain') == 'error: plain\n' and error('file') == 'error: turned: broken\n'
    full = error('value', SAMGPT_TRACEBACK='1')
    assert 'Traceback' in full and full.endswith('\nerror: turned: broken [deep.py:4]\n')
