"""Settings of a script: its own globals, then config files, then the command line.

A script lists its settings as module globals in lower case, each with a comment at the end of the line, then calls

    config = configure(globals())

so that `python train.py config/small.py --batch_size=32` first runs config/small.py, then sets batch_size. Arguments
apply from left to right, the last one wins. Each `--key=text` appends to a setting that is a tuple of strings, and
`--key=` empties it. `--help` prints every setting with its default and its comment.
"""

import ast
import dataclasses
import difflib
import io
import os
import sys
import tokenize
from collections import UserDict
from collections.abc import Callable
from types import ModuleType

from common.errors import UserError, install_error_handling, one_line

ROOT = os.path.dirname(os.path.abspath(__file__))
SETTING_TYPES = {  # type of a default -> its values in the words of an error line
    bool: 'True or False',
    int: 'a whole number',
    float: 'a number',
    str: 'text in quotes',
    tuple: 'a tuple of strings',
    type(None): 'anything',
}


class Config(dict):
    """The settings as a dict from name to value.

    given: names of those that a config file or the command line has set.
    recipe: the settings of another script, also a Config, see configure.
    """

    def __init__(self, values, given, recipe=None):
        super().__init__(values)
        self.given, self.recipe = frozenset(given), recipe


def configure(settings: dict, argv=None, bare=None, paths=(), fields=None, recipe=None, recipe_flags=False) -> Config:
    """Apply config files and `--key=value` arguments to `settings`, a script's globals, in place.

    Also sets up how the process reports errors: see common.errors.install_error_handling.
    argv: the arguments; default sys.argv[1:].
    bare: the setting that receives an argument which is neither a .py file nor starts with dashes.
    paths: settings that are paths, where a leading ~ is the home folder.
    fields: a dataclass, such as GPTConfig, whose fields are settings too unless the script lists them itself.
    recipe: another script's name, such as 'train.py'. Config files may set its settings too. All of them, given or with
        their defaults, end up in Config.recipe; of a setting that both scripts list, the value is this script's.
    recipe_flags: the command line may set them too, and `fields` are the recipe's: Config.recipe is then what that
        script itself would get, and Config.given names its settings too.
    Raises UserError for a missing or broken config file, an unknown key (naming the nearest known one) and a value of
    the wrong type.
    """
    install_error_handling()
    others = read_settings(os.path.join(ROOT, recipe)) if recipe else {}
    for field in dataclasses.fields(fields) if fields else ():
        (others if recipe_flags else settings).setdefault(field.name, field.default)
    own = settings_in(settings)
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(settings, own, fields, recipe if recipe_flags else None)
        sys.exit(0)
    known = {**others, **own}
    values, given = dict(known), set()
    for argument in argv:
        if bare and not argument.startswith('-') and not argument.endswith('.py'):
            argument = f'--{bare}={argument}'
        if argument.startswith('--'):
            assigned = parse_argument(argument, known if recipe_flags else own, values)
        else:
            assigned = run_config_file(argument, {**settings, **values}, known)
        values.update(assigned)
        given.update(assigned)
    values.update({key: os.path.expanduser(values[key]) for key in paths})
    settings.update({key: values[key] for key in own})
    theirs = Config({key: values[key] for key in others}, given & others.keys())
    return Config({key: values[key] for key in own}, given if recipe_flags else given & own.keys(), theirs)


def settings_in(namespace: dict) -> dict:
    """The settings in a namespace: names in lower case whose value has a type of SETTING_TYPES -> {name: value}."""
    return {
        key: value
        for key, value in namespace.items()
        if type(value) in SETTING_TYPES and not key.startswith('_') and not key.isupper()
    }


def read_settings(path: str) -> dict:
    """The settings of a script -> {name: default}. Runs only its imports and assignments above configure()."""
    with open(path, encoding='utf-8') as file:
        body = ast.parse(file.read()).body
    namespace, assignments = {}, []
    for node in body:
        if 'configure(globals()' in ast.unparse(node):
            break
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)):
            assignments.append(node)
    exec(compile(ast.Module(assignments, []), path, 'exec'), namespace)
    return settings_in(namespace)


def require(config: dict, keys: str, rule: str, test: Callable[[object], bool]):
    """Raise UserError for the first of the settings in `keys` whose value fails `test`; `rule` says what it must be.

    Example: require(config, 'batch_size block_size', 'at least 1', lambda v: v >= 1)
    """
    for key in keys.split():
        if not test(config[key]):
            raise UserError(f'--{key}={config[key]}: must be {rule}')


# --- the command line -------------------------------------------------------------------------------------------------


def parse_argument(argument, defaults, values):
    """'--key=value' -> {key: value}, the value with the type of the key's default; `values` are the settings so far."""
    key, equals, text = argument[2:].partition('=')
    check_known(key, defaults, argument)
    if not equals:
        raise UserError(f'{argument}: write it as --{key}=VALUE')
    if isinstance(defaults[key], str):
        return {key: text}  # not evaluated: a name may look like a number
    if isinstance(defaults[key], tuple):
        return {key: values[key] + (text,) if text else ()}
    try:
        value = int(text) if type(defaults[key]) is int and text.isdecimal() else ast.literal_eval(text)  # 007 is 7
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return {key: check_type(key, value, defaults, argument)}


# --- config files -----------------------------------------------------------------------------------------------------


class Recorder(UserDict):
    """The local namespace of a config file: records the names assigned in it, also by exec and `from x import *`."""

    def __init__(self, namespace):
        self.data = namespace
        self.assigned = {}  # as an ordered set

    def __setitem__(self, key, value):
        self.data[key] = value
        self.assigned[key] = None


def run_config_file(path, namespace, defaults):
    """Run a config file in `namespace`, a copy of the script's globals so far -> {key: value} of assigned settings.

    The file may assign them in any way: directly, by imports, exec, or through globals().
    """
    path = os.path.expanduser(path)
    tree, code = compile_config_file(path)
    before, recorder, folder = dict(namespace), Recorder(namespace), os.path.dirname(os.path.abspath(path))
    sys.path.append(folder)  # so that it can import from files beside it
    try:
        exec(code, namespace, recorder)
    except (Exception, SystemExit) as error:
        line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else '?'
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {one_line(str(error))}') from error
    finally:
        sys.path.remove(folder)
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name.partition('.')[0] for node in imports for alias in node.names}
    through_globals = [key for key in defaults if namespace.get(key) is not before[key]]
    assigned = {}
    for key in dict.fromkeys((*recorder.assigned, *through_globals)):
        if key.startswith('_') or key not in namespace:
            continue  # a helper variable, or deleted again
        value = namespace[key]
        if key not in defaults and (isinstance(value, ModuleType) or callable(value) or key in imported):
            continue  # an import or a function, not a misspelt setting
        check_known(key, defaults, path, hint=' (start the names of helper variables with an underscore)')
        assigned[key] = check_type(key, value, defaults, path)
    return assigned


def compile_config_file(path):
    """Read and compile a config file -> (syntax tree, code). UserError if it is missing or not Python."""
    hint = '' if os.path.exists(path) else ' (settings are written --key=value, config files are paths)'
    try:
        with open(path, encoding='utf-8-sig') as file:
            tree = ast.parse(file.read(), path)
            return tree, compile(tree, path, 'exec')
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'cannot read the config file {path}: {reason}{hint}') from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, 'msg', None) or error
        raise UserError(f'{path}, line {getattr(error, "lineno", "?")}: not valid Python: {reason}') from error


# --- names and types --------------------------------------------------------------------------------------------------


def check_known(key, defaults, where, hint=''):
    """Raise UserError naming the nearest setting if there is none called `key`."""
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)
        known = f'the nearest is {nearest[0]!r}, --help lists all' if nearest else 'this script has none'
        raise UserError(f'{where}: unknown setting {key!r}; {known}{hint}')


def check_type(key, value, defaults, where):
    """The value, converted to the type of the key's default where nothing is lost; UserError for any other type."""
    default = defaults[key]
    if getattr(value, 'ndim', None) == 0 and hasattr(value, 'item'):
        value = value.item()  # a numpy number
    if type(default) is str and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if type(default) is tuple and type(value) in (tuple, list) and all(type(text) is str for text in value):
        return tuple(text for text in value if text)
    if default is None or type(default) is not tuple and type(value) is type(default):
        return value
    if default == 'auto' and type(value) is bool:
        return str(value)  # such as compile = False
    if type(default) is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)  # such as max_iters = 6e5
    raise UserError(f'{where}: {key} must be {SETTING_TYPES[type(default)]}, not {value!r}')


# --- help -------------------------------------------------------------------------------------------------------------


def print_help(settings, defaults, fields=None, recipe=None):
    """Print the script's docstring and every setting as `--key=default  comment`, the comment read from the source.

    recipe: another script whose settings this one accepts too, which its own --help lists.
    """
    comments = read_comments(sys.modules[fields.__module__].__file__) if fields else {}
    comments.update(read_comments(settings['__file__']))
    print((settings.get('__doc__') or '').strip())
    if recipe:
        print(f'\nEvery setting of {recipe} is one of this script too: python {recipe} --help lists them.')
    print('\nSettings, given as --key=value or assigned in a config file:')
    for key, default in defaults.items():
        print(f'  {f"--{key}={default!r}":<42} {comments.get(key, "")}'.rstrip())


def read_comments(path):
    """The end-of-line comments of a file's assignments, at the top level and in classes -> {name: comment}.

    The first assignment to a name counts.
    """
    with open(path, encoding='utf-8') as file:
        source = file.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {token.start[0]: token.string.lstrip('# ') for token in tokens if token.type == tokenize.COMMENT}
    body = ast.parse(source).body
    nodes = [*body, *(node for scope in body if isinstance(scope, ast.ClassDef) for node in scope.body)]
    comments = {}
    for node in nodes:
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            if isinstance(target, ast.Name):
                comments.setdefault(target.id, lines.get(node.end_lineno, ''))
    return comments
