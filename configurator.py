"""Settings for a script: its own globals, then config files, then the command line.

A script lists its settings as module globals in lower case, each with a comment at the end of the line, and then calls

    config = configure(globals())

so that `python train.py config/small.py --batch_size=32` first runs config/small.py, then sets batch_size. Arguments
apply from left to right, the last one wins; a setting that is a tuple of texts grows by one with each `--key=text`, and
`--key=` empties it. `--help` prints every setting with its default and its comment.
"""

import ast
import atexit
import dataclasses
import difflib
import io
import os
import sys
import tokenize
from collections import UserDict
from types import ModuleType

from common.errors import UserError, flush_output, one_line, report_uncaught

SETTING_TYPES = (bool, int, float, str, tuple, type(None))
ROOT = os.path.dirname(os.path.abspath(__file__))


class Config(dict):
    """The settings as a dict from name to value; `given` names those set by a config file or the command line. `recipe`: see configure."""

    def __init__(self, values, given, recipe=None):
        super().__init__(values)
        self.given, self.recipe = frozenset(given), recipe or {}


def configure(settings, argv=None, bare=None, paths=(), fields=None, recipe=None):
    """Apply config files and `--key=value` arguments to `settings` (a script's globals), in place.

    argv: the arguments, sys.argv[1:] unless given.
    bare: the setting that an argument is for which is neither a .py file nor starts with dashes.
    paths: settings that are paths, in which a leading ~ is the home folder.
    fields: a dataclass, such as GPTConfig; each of its fields that the script does not list is a setting too.
    recipe: another script, beside this one; config files may set what that script knows, and what is not a setting here goes into the
        Config's `recipe`, with that script's defaults.
    Returns a Config of every setting. Raises UserError for a missing or broken config file, an unknown key (naming the nearest known
    one) and a value of the wrong type.
    """
    sys.excepthook = report_uncaught
    atexit.register(flush_output)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(
                errors='backslashreplace'
            )  # a terminal that cannot show a character shows its number, and no traceback
    if fields:
        settings.update(
            {field.name: field.default for field in dataclasses.fields(fields) if field.name not in settings}
        )
    defaults = settings_in(settings)
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(settings, defaults, fields)
        sys.exit(0)
    elsewhere = read_settings(os.path.join(ROOT, recipe)) if recipe else {}
    values, given = dict(defaults), set()
    for argument in argv:
        if bare and not argument.startswith('-') and not argument.endswith('.py'):
            argument = f'--{bare}={argument}'
        if argument.startswith('--'):
            assigned = parse_argument(argument, defaults, values)
        else:
            assigned = run_config_file(argument, {**settings, **elsewhere, **values}, {**elsewhere, **defaults})
            elsewhere.update({key: value for key, value in assigned.items() if key not in defaults})
        values.update({key: value for key, value in assigned.items() if key in defaults})
        given.update(assigned)
    values.update({key: os.path.expanduser(values[key]) for key in paths})
    settings.update(values)
    return Config(
        values, given & defaults.keys(), {key: value for key, value in elsewhere.items() if key not in defaults}
    )


def settings_in(namespace):
    """The names in a namespace that are settings: in lower case, and of a type that an argument can have -> {name: value}."""
    return {
        key: value
        for key, value in namespace.items()
        if type(value) in SETTING_TYPES and not key.startswith('_') and not key.isupper()
    }


def read_settings(path):
    """The settings of a script and their defaults -> {name: value}: what it imports and assigns before it calls configure() is all that
    is run of it."""
    with open(path, encoding='utf-8') as file:
        body = ast.parse(file.read()).body
    before = body[: next((n for n, node in enumerate(body) if 'configure(globals()' in ast.unparse(node)), len(body))]
    namespace = {}
    exec(
        compile(
            ast.Module([node for node in before if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign))], []),
            path,
            'exec',
        ),
        namespace,
    )
    return settings_in(namespace)


def require(config, test, rule, *keys):
    """Raise UserError naming the first of `keys` whose value fails `test`; `rule` says in words what is wanted."""
    for key in keys:
        if not test(config[key]):
            raise UserError(f'--{key}={config[key]}: must be {rule}')


def parse_argument(argument, defaults, values):
    """'--key=value' -> {key: value}, the value read as the type of the key's default; `values` are the settings so far."""
    key, equals, text = argument[2:].partition('=')
    check_known(key, defaults, argument)
    if not equals:
        raise UserError(f'{argument}: write it as --{key}=VALUE')
    if isinstance(defaults[key], str):
        return {key: text}  # text stays text, even if it looks like a number
    if isinstance(defaults[key], tuple):
        return {key: values[key] + (text,) if text else ()}
    try:
        value = (
            int(text) if type(defaults[key]) is int and text.isdecimal() else ast.literal_eval(text)
        )  # 007 is a number, too
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return {key: check_type(key, value, defaults, argument)}


class Recorder(UserDict):
    """A namespace that remembers what is assigned in it, also by a file that the one in it runs or imports from."""

    def __init__(self, namespace):
        self.data, self.assigned = namespace, {}

    def __setitem__(self, key, value):
        self.data[key] = value
        self.assigned[key] = None


def run_config_file(path, namespace, defaults):
    """Run a config file in `namespace`, a copy of the script's globals so far -> {key: value} of what it assigned, however it got there."""
    path = os.path.expanduser(path)
    tree, code = compile_config_file(path)
    before, recorder, folder = dict(namespace), Recorder(namespace), os.path.dirname(os.path.abspath(path))
    sys.path.append(folder)  # a config file may import from its neighbours
    try:
        exec(code, namespace, recorder)
    except (Exception, SystemExit) as error:
        line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else '?'
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {one_line(str(error))}') from error
    finally:
        sys.path.remove(folder)
    imported = {
        alias.asname or alias.name.partition('.')[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    behind = (key for key in defaults if namespace.get(key) is not before[key])  # assigned by way of globals()
    assigned = {}
    for key in dict.fromkeys((*recorder.assigned, *behind)):
        if key.startswith('_') or key not in namespace:
            continue  # a helper of the config file's own
        value = namespace[key]
        if key not in defaults and (isinstance(value, ModuleType) or callable(value) or key in imported):
            continue  # an import or a function: cannot be meant as a setting
        check_known(key, defaults, path, hint=' (a helper name in a config file starts with an underscore)')
        assigned[key] = check_type(key, value, defaults, path)
    return assigned


def compile_config_file(path):
    """Read and compile a config file -> its syntax tree, its code. UserError if it is missing or is not Python."""
    hint = '' if os.path.exists(path) else ' (settings are written --key=value, config files are paths)'
    try:
        with open(path, encoding='utf-8-sig') as file:
            tree = ast.parse(file.read(), path)
            return tree, compile(tree, path, 'exec')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'cannot read the config file {path}: {getattr(error, "strerror", None) or error}{hint}'
        ) from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f'{path}, line {getattr(error, "lineno", "?")}: not valid Python: {error}') from error


def check_known(key, defaults, where, hint=''):
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)
        known = f'the nearest is {nearest[0]!r}, --help lists all' if nearest else 'this script has none'
        raise UserError(f'{where}: unknown setting {key!r}; {known}{hint}')


def check_type(key, value, defaults, where):
    """The value, widened to the type of the key's default; UserError where the two do not fit."""
    default = defaults[key]
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
        value = value.item()  # a numpy number
    if type(default) is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(default) is tuple and type(value) in (tuple, list) and all(type(text) is str for text in value):
        return tuple(text for text in value if text)
    if default is None or type(default) is not tuple and type(value) is type(default):
        return value
    if type(default) is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)  # 6e5 updates
    expected = {
        bool: 'True or False',
        int: 'a whole number',
        float: 'a number',
        str: 'text in quotes',
        tuple: 'a tuple of texts',
    }[type(default)]
    raise UserError(f'{where}: {key} must be {expected}, not {value!r}')


def print_help(settings, defaults, fields=None):
    """Print the script's docstring and every setting as `--key=default  comment`, read from its source, and from that of `fields`."""
    comments = {
        **(read_comments(sys.modules[fields.__module__].__file__) if fields else {}),
        **read_comments(settings['__file__']),
    }
    print((settings.get('__doc__') or '').strip())
    print('\nSettings, given as --key=value or assigned in a config file:')
    for key, default in defaults.items():
        print(f'  {f"--{key}={default!r}":<42} {comments.get(key, "")}'.rstrip())


def read_comments(path):
    """The comments at the end of a file's assignments, at the top and in its classes -> {name: comment}; of several, the first counts."""
    with open(path, encoding='utf-8') as file:
        source = file.read()
    comments = {
        token.start[0]: token.string.lstrip('# ')
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    body = ast.parse(source).body
    nodes = [*body, *(node for scope in body if isinstance(scope, ast.ClassDef) for node in scope.body)]
    assigned = [
        (node.target if isinstance(node, ast.AnnAssign) else node.targets[0], node.end_lineno)
        for node in nodes
        if isinstance(node, (ast.Assign, ast.AnnAssign))
    ]
    return {target.id: comments.get(line, '') for target, line in reversed(assigned) if isinstance(target, ast.Name)}
