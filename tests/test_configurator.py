"""Settings: order, types, names, help."""
import pytest
from conftest import REPO, run

from configurator import Config, UserError, configure


def settings():
    return {'rate': 1e-3, 'steps': 10, 'name': 'x', 'flag': False, 'maybe': None, '_hidden': 3, 'module': pytest, '__file__': __file__}


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
    assert type(config['rate']) is float and config['name'] == '12' and config['maybe'] == 'a=b' and config['flag'] is True
    assert configure(settings(), ['--name=a=b'])['name'] == 'a=b'
    assert configure(settings(), ['--maybe=3'])['maybe'] == 3


def test_config_file_is_python(tmp_path):
    file = tmp_path / 'c.py'
    file.write_text('import os\nfrom math import sqrt\n_k = 2\nsteps = sum(_k * i for i in range(4)) + steps\n'
                    'name = os.path.join("ä", "b")\n', encoding='utf-8')
    config = configure(settings(), [str(file)])
    assert config['steps'] == 22 and config['name'] == 'ä/b'


@pytest.mark.parametrize('argument, words', [
    ('--step=3', "unknown setting 'step'; the nearest is 'steps'"),
    ('--steps=3.5', 'whole number'),
    ('--steps=True', 'whole number'),
    ('--flag=1', 'True or False'),
    ('--rate=fast', 'a number'),
    ('--steps', 'write it as --steps=VALUE'),
    ('--_hidden=4', 'unknown'),
    ('--module=4', 'unknown'),
    ('absent.py', 'cannot read the config file absent.py'),
])
def test_mistakes_on_the_command_line(argument, words):
    with pytest.raises(UserError, match=words):
        configure(settings(), [argument])


@pytest.mark.parametrize('text, words', [
    ('stepz = 3', "unknown setting 'stepz'; the nearest is 'steps'"),
    ('steps = "3"', 'whole number'),
    ('x = (', 'not valid Python'),
    ('a = 1\nsteps = 1 / 0', 'line 2: ZeroDivisionError'),
    ('name = 3', 'text in quotes'),
])
def test_mistakes_in_a_config_file(tmp_path, text, words):
    file = tmp_path / 'c.py'
    file.write_text(text)
    with pytest.raises(UserError, match=words):
        configure(settings(), [str(file)])


@pytest.mark.parametrize('script', ['train.py', 'sample.py', 'bench.py', 'plot.py', 'data/text/prepare.py'])
def test_help_explains_every_setting(script, tmp_path):
    result = run(script, '--help', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.split('Settings, given as')[1].splitlines()[1:]
    assert len(lines) > 3
    for line in lines:
        setting, _, comment = line.strip().partition(' ')
        assert setting.startswith('--') and '=' in setting
        assert comment.strip(), f'no comment: {line}'


@pytest.mark.parametrize('path', sorted((REPO / 'config').glob('*.py')), ids=lambda path: path.stem)
def test_every_recipe_is_accepted(path):
    """Against train.py's own defaults, read without running it."""
    import ast
    tree = ast.parse((REPO / 'train.py').read_text(encoding='utf-8'))
    end = next(node.lineno for node in tree.body if isinstance(node, ast.Assign) and 'configure' in ast.dump(node))
    head = [node for node in tree.body if isinstance(node, ast.Assign) and node.lineno < end]
    defaults = {'__file__': str(REPO / 'train.py')}
    exec(compile(ast.Module(body=head, type_ignores=[]), 'train.py', 'exec'), defaults)
    assert configure(defaults, [str(path)]).given


def test_texts_add_up(tmp_path):
    """A tuple of texts grows by one with each --key=text, an empty one empties it; a config file replaces it."""
    path = tmp_path / 'config.py'
    path.write_text("stop = ['c', '']", encoding='utf-8')
    settings = lambda: {'stop': (), 'other': 1}  # noqa: E731
    assert configure(settings(), ['--stop=a', '--stop=1', '--stop=(b']) ['stop'] == ('a', '1', '(b')
    assert configure(settings(), ['--stop=a', str(path), '--stop=d'])['stop'] == ('c', 'd')
    assert configure(settings(), ['--stop=a', '--stop='])['stop'] == ()
    path.write_text('stop = 1', encoding='utf-8')
    with pytest.raises(UserError, match='stop must be a tuple of texts, not 1'):
        configure(settings(), [str(path)])
