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
import errno
import io
import os
import sys
import tokenize
from collections import UserDict
from contextlib import contextmanager
from types import ModuleType

SETTING_TYPES = (bool, int, float, str, tuple, type(None))
ROOT = os.path.dirname(os.path.abspath(__file__))
READER_GONE = {errno.EPIPE, errno.EIO} | (
    {errno.EINVAL} if sys.platform == 'win32' else set()
)  # of a pipe or of a closed terminal

ends_at_once = False  # see leave_at_once


class UserError(Exception):
    """A person's mistake. Uncaught, it ends the script with one line on standard error and exit status 2.

    The message says what is wrong, where, and what to do. A bug raises anything else and keeps its traceback.
    """


@contextmanager
def user_errors(*kinds, where=''):
    """Turn exceptions of the given kinds, raised in the block, into UserError; `where` leads the message."""
    try:
        yield
    except kinds as error:
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        raise UserError(where + one_line(text)) from error


def one_line(text, limit=300):
    """The text on one line, cut to `limit` characters."""
    text = ' '.join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + '...'


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


def say(*words, file=None):
    """Print a line at once. That nobody reads it any more, as when the terminal was closed, is no reason to stop."""
    file = file or sys.stdout
    try:
        print(*words, file=file, flush=True)
    except OSError as error:
        if error.errno not in READER_GONE:
            raise
        silence(file)


def warn(text):
    """Print one line of warning on standard error."""
    say(f'warning: {one_line(text, 500)}', file=sys.stderr)


def silence(stream):
    """Let what is still written to a stream go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_output():
    """At exit: write out what is left for standard output; that nobody reads it, or there is no room for it, is no crash."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)  # the interpreter tries again
        if error.errno == errno.ENOSPC:
            print('error: cannot write the output: No space left on device', file=sys.stderr)
            os._exit(2)


def leave_at_once():
    """From now on, end without the interpreter's clean-up: threads that a library has left behind can hang or abort in it."""
    global ends_at_once
    if not ends_at_once:
        ends_at_once = True
        atexit.register(leave, 0)


def leave(status):
    """End with this exit status; see leave_at_once."""
    if ends_at_once:
        flush_output()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def report_uncaught(kind, error, traceback):
    """sys.excepthook: a UserError, no more memory, or a lost rank is one line and exit status 2; the rest keeps its traceback.

    A line that another exception was turned into ends with its place in the project: people change this code, and what looks like a
    mistake in a file or a setting may be one in theirs. SAMGPT_TRACEBACK=1 shows all of it.
    """
    if kind is KeyboardInterrupt:
        leave(130)  # the shell's status for a program that Ctrl-C ended
    if kind is BrokenPipeError:  # who reads our output has read enough
        silence(sys.stdout)
        leave(141)
    text, place = str(error), ''
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        text = f'{error.filename or "the output"}: {error.strerror}; free some and try again'
    elif (
        issubclass(kind, MemoryError)
        or issubclass(kind, RuntimeError)
        and ('out of memory' in text or 'DefaultCPUAllocator' in text)
    ):
        text = (
            f'out of memory: lower --batch_size (and raise --gradient_accumulation_steps to keep the global batch), '
            f'--num_samples, --max_new_tokens, --block_size or the size of the model ({one_line(text, 120)})'
        )
        place = place_in_project(traceback)
    elif kind.__name__.startswith('Dist') or 'gloo' in text and issubclass(kind, RuntimeError):
        text = f'the connection to another rank was lost; if that one has ended, its own line says why ({one_line(text, 120)})'
        place = place_in_project(traceback)
    elif not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, traceback)
        if ends_at_once:
            leave(1)
        return
    elif error.__cause__ and not isinstance(error.__cause__, (OSError, UnicodeError, ImportError)):
        place = place_in_project(error.__cause__.__traceback__)
    if os.environ.get('SAMGPT_TRACEBACK', '0') not in ('', '0'):
        sys.__excepthook__(kind, error, traceback)
    rank = os.environ.get('RANK', '0')
    print(
        'error: ' if rank == '0' else f'error (rank {rank}): ',
        one_line(text, limit=2000),
        place,
        sep='',
        file=sys.stderr,
        flush=True,
    )
    leave(2)  # raised inside the hook, this sets the exit status and still runs the atexit handlers


def place_in_project(traceback):
    """The last file and line of the project that a traceback goes through -> ' [model.py:120]', or '' if there is none."""
    place = ''
    while traceback:
        path = traceback.tb_frame.f_code.co_filename
        if path.startswith(ROOT + os.sep) and path != __file__ and 'site-packages' not in path:
            place = f' [{os.path.relpath(path, ROOT)}:{traceback.tb_lineno}]'
        traceback = traceback.tb_next
    return place
