"""How the files depend on one another, read from their imports: no circle, nothing in common/ imports from above.

That no line holds two statements is the business of ruff (E701, E702, and its formatter), which ./test.sh runs.
"""

import ast
import importlib
from graphlib import CycleError, TopologicalSorter

import pytest
from conftest import REPO

FOLDERS = ('common', 'formats', 'preflight', 'tools', 'data')
SCRIPTS = {'train', 'sample', 'evaluate', 'export', 'bench', 'plan', 'check'}  # people run them, no file imports them


def modules():
    """{module name: path} of all files but the tests and configs: 'train', 'common.errors', 'data.text.prepare'."""
    paths = [*REPO.glob('*.py'), *(path for folder in FOLDERS for path in (REPO / folder).rglob('*.py'))]
    return {'.'.join(path.relative_to(REPO).with_suffix('').parts): path for path in paths if path.stem != '__init__'}


MODULES = modules()


def imports_of(name):
    """Names of this repository's other modules that a module imports, anywhere in its code."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{name} has a relative import'
            found.add(node.module)
            found |= {f'{node.module}.{alias.name}' for alias in node.names}  # from common import errors
    return sorted(found & MODULES.keys() - {name})  # data.worker, run as a script, imports itself under its own name


ARROWS = [(name, target) for name in sorted(MODULES) for target in imports_of(name)]


def tier(name):
    """The folder of a module, '' at the top."""
    return name.split('.')[0] if '.' in name else ''


def test_the_imports_are_found():
    """The tests below would pass if none were."""
    for arrow in (('train', 'model'), ('optim', 'common.distributed'), ('data.text.prepare', 'configurator')):
        assert arrow in ARROWS


def test_common_imports_nothing_from_above():
    up = [f'{name} -> {target}' for name, target in ARROWS if tier(name) == 'common' and tier(target) != 'common']
    assert not up, f'common/ imports from above: {", ".join(up)}'


def test_tools_and_data_do_not_import_each_other():
    crossing = [f'{name} -> {target}' for name, target in ARROWS if {tier(name), tier(target)} == {'tools', 'data'}]
    assert not crossing, f'tools/ and data/ import each other: {", ".join(crossing)}'


def test_scripts_are_not_imported():
    """Nor are tools and prepare.py: importing a script would run it."""
    runs = [
        f'{name} -> {target}'
        for name, target in ARROWS
        if target in SCRIPTS or tier(target) == 'tools' or target.endswith('.prepare')
    ]
    assert not runs, f'a script is imported: {", ".join(runs)}'


def test_no_circle():
    imports = {name: [target for source, target in ARROWS if source == name] for name in MODULES}
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(f'imports in a circle: {" -> ".join(reversed(error.args[1]))}')


def test_files_keep_their_names():
    """People know these from nanoGPT, and their code imports from them."""
    missing = [f'{name}.py' for name in ('train', 'model', 'sample', 'bench', 'configurator') if name not in MODULES]
    assert not missing
    for name, attributes in (('model', 'GPT GPTConfig'), ('configurator', 'configure'), ('optim', 'make_optimizer')):
        module = importlib.import_module(name)
        assert all(hasattr(module, attribute) for attribute in attributes.split())


@pytest.mark.parametrize('name, most', [('train', 340), ('model', 335)])
def test_a_first_reading_stays_short(name, most):
    lines = len(MODULES[name].read_text(encoding='utf-8').splitlines())
    assert lines <= most, f'{name}.py has {lines} lines, more than {most}: split the subject'
