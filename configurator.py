"""Settings for a script: its own globals, then config files, then the command line.

A script lists its settings as module globals in lower case, each with a comment at the end of the line, and then calls

    config = configure(globals())

so that `python train.py config/small.py --batch_size=32` first runs config/small.py, then sets batch_size. Arguments
apply from left to right, the last one wins; a setting that is a tuple of texts grows by one with each `--key=text`, and
`--key=` empties it. `--help` prints every setting with its default and its comment.
"""
import ast
import atexit
import difflib
import dis
import errno
import io
import os
import sys
import tokenize
from contextlib import contextmanager
from types import ModuleType

SETTING_TYPES = (bool, int, float, str, tuple, type(None))

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
    return text if len(text) <= limit else text[:limit - 3] + '...'


class Config(dict):
    """The settings as a dict from name to value; `given` names those set by a config file or the command line."""

    def __init__(self, values, given):
        super().__init__(values)
        self.given = frozenset(given)


def configure(settings, argv=None, bare=None):
    """Apply config files and `--key=value` arguments to `settings` (a script's globals), in place.

    argv: the arguments, sys.argv[1:] unless given. bare: the setting that an argument is for which is neither a .py file nor starts with
    dashes. Returns a Config of every setting. Raises UserError for a missing or
    broken config file, an unknown key (naming the nearest known one) and a value of the wrong type.
    """
    sys.excepthook = report_uncaught
    atexit.register(flush_output)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='replace')  # a terminal that cannot show a character shows '?', and no traceback
    defaults = {key: value for key, value in settings.items()
                if type(value) in SETTING_TYPES and not key.startswith('_') and not key.isupper()}
    argv = sys.argv[1:] if argv is None else argv
    if '--help' in argv or '-h' in argv:
        print_help(settings, defaults)
        sys.exit(0)
    values, given = dict(defaults), set()
    for argument in argv:
        if bare and not argument.startswith('-') and not argument.endswith('.py'):
            argument = f'--{bare}={argument}'
        if argument.startswith('--'):
            assigned = parse_argument(argument, defaults, values)
        else:
            assigned = run_config_file(argument, {**settings, **values}, defaults)
        values.update(assigned)
        given.update(assigned)
    settings.update(values)
    return Config(values, given)


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
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = text
    return {key: check_type(key, value, defaults, argument)}


def run_config_file(path, namespace, defaults):
    """Run a config file in `namespace`, a copy of the script's globals so far -> {key: value} of what it assigned."""
    code = compile_config_file(path)
    try:
        exec(code, namespace)
    except (Exception, SystemExit) as error:
        line = error.__traceback__.tb_next.tb_lineno if error.__traceback__.tb_next else '?'
        raise UserError(f'{path}, line {line}: {type(error).__name__}: {one_line(str(error))}') from error
    assigned = {}
    for key in dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname == 'STORE_NAME'):
        if key.startswith('_') or key not in namespace:
            continue  # a helper of the config file's own
        value = namespace[key]
        if key not in defaults and (isinstance(value, ModuleType) or callable(value)):
            continue  # an import or a function: cannot be meant as a setting
        check_known(key, defaults, path, hint=' (a helper name in a config file starts with an underscore)')
        assigned[key] = check_type(key, value, defaults, path)
    return assigned


def compile_config_file(path):
    """Read and compile a config file; UserError if it is missing or is not Python."""
    hint = '' if os.path.exists(path) else ' (settings are written --key=value, config files are paths)'
    try:
        with open(path, encoding='utf-8') as file:
            return compile(file.read(), path, 'exec')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'cannot read the config file {path}: {getattr(error, "strerror", None) or error}{hint}') from error
    except (SyntaxError, ValueError) as error:
        raise UserError(f'{path}, line {getattr(error, "lineno", "?")}: not valid Python: {error}') from error


def check_known(key, defaults, where, hint=''):
    if key not in defaults:
        nearest = difflib.get_close_matches(key, defaults, n=1, cutoff=0.0)
        known = f'the nearest is {nearest[0]!r}, --help lists all' if nearest else 'this script has none'
        raise UserError(f'{where}: unknown setting {key!r}; {known}{hint}')


def check_type(key, value, defaults, where):
    """The value, widened to the type of the key's default; UserError where the two do not fit."""
    default = defaults[key]
    if type(default) is tuple and type(value) in (tuple, list) and all(type(text) is str for text in value):
        return tuple(text for text in value if text)
    if default is None or type(default) is not tuple and type(value) is type(default):
        return value
    if type(default) is float and type(value) is int and abs(value) < sys.float_info.max:
        return float(value)
    if type(default) is int and type(value) is float and value.is_integer():
        return int(value)  # 6e5 updates
    expected = {bool: 'True or False', int: 'a whole number', float: 'a number', str: 'text in quotes',
                tuple: 'a tuple of texts'}[type(default)]
    raise UserError(f'{where}: {key} must be {expected}, not {value!r}')


def print_help(settings, defaults):
    """Print the script's docstring and every setting as `--key=default  comment`, read from its source."""
    with open(settings['__file__'], encoding='utf-8') as file:
        source = file.read()
    comments = {token.start[0]: token.string.lstrip('# ') for token in tokenize.generate_tokens(io.StringIO(source).readline)
                if token.type == tokenize.COMMENT}
    assignments = {node.targets[0].id: node.lineno for node in reversed(ast.parse(source).body)  # the first assignment counts
                   if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
    print((settings.get('__doc__') or '').strip())
    print('\nSettings, given as --key=value or assigned in a config file:')
    for key, default in defaults.items():
        print(f'  {f"--{key}={default!r}":<42} {comments.get(assignments.get(key), "")}'.rstrip())


def flush_output():
    """At exit: write out what is left for standard output; that nobody reads it, or there is no room for it, is no crash."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the interpreter tries again
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
    """sys.excepthook: a UserError, or running out of memory, is one line and exit status 2; the rest keeps its traceback."""
    if kind is KeyboardInterrupt:
        leave(130)  # the shell's status for a program that Ctrl-C ended
    if kind is BrokenPipeError:  # who reads our output has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        leave(141)
    if issubclass(kind, OSError) and error.errno == errno.ENOSPC:
        error, kind = UserError(f'{error.filename or "the output"}: {error.strerror}; free some and try again'), UserError
    text = str(error)
    if issubclass(kind, MemoryError) or issubclass(kind, RuntimeError) and ('out of memory' in text or 'DefaultCPUAllocator' in text):
        error = UserError(f'out of memory: lower --batch_size (and raise --gradient_accumulation_steps to keep the global batch), '
                          f'--num_samples, --max_new_tokens, --block_size or the size of the model ({one_line(text, 120)})')
    elif not issubclass(kind, UserError):
        sys.__excepthook__(kind, error, traceback)
        if ends_at_once:
            leave(1)
        return
    rank = os.environ.get('RANK', '0')
    text = one_line(str(error), limit=2000)
    print(f'error: {text}' if rank == '0' else f'error (rank {rank}): {text}', file=sys.stderr, flush=True)
    leave(2)  # raised inside the hook, this sets the exit status and still runs the atexit handlers
