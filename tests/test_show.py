"""H.show: what stands on the page is the code that runs, docstrings and checks of arguments aside."""

import ast
import importlib.util
import inspect
import re
import sys
import textwrap

import pytest

import llada_helpers as h

CODE = '''
import functools


def plain(x, y=1):
    """One line."""
    # a comment stays
    return x + y  # and so does this one


def checked(x, y=1):
    """Many lines.

    >>> checked(1)
    2
    """
    if x is None: raise ValueError("x: pass a number")
    if y < 0:
        raise ValueError(
            f"y={y}: "
            "pass a positive number"
        )
    _check_sizes(x, y)
    _check_sizes(
        x,
        y=y,
    )
    z = _check_sizes(x, y)  # its value is used
    if z:
        return x
    elif y > 9:
        raise ValueError("y")
    return x + y


def decides(x):
    if x:
        x = 2
        raise ValueError("not a check alone")
    if x == 0:
        raise ValueError("there is another way")
    else:
        x = 3
    return x


def outer(x):
    """Outer."""
    def inner(y):
        """Inner."""
        if y:
            raise ValueError("y")
        return y

    text = """not a docstring"""
    return inner(x), text


def _check_sizes(x, y):
    return x


def wrap(function):
    @functools.wraps(function)
    def wrapped(*args):
        return function(*args)

    return wrapped


@wrap
def decorated(x):
    """Found behind its wrapper."""
    return x


class Thing:
    """A class."""

    size: int = 3  # what it is

    def method(self, x):
        """A method."""
        if x:
            raise ValueError("x")
        return self.size
'''

SHOWN = {
    "plain": """
def plain(x, y=1):
    # a comment stays
    return x + y  # and so does this one
""",
    "checked": """
def checked(x, y=1):
    z = _check_sizes(x, y)  # its value is used
    if z:
        return x
    return x + y
""",
    "decides": """
def decides(x):
    if x:
        x = 2
        raise ValueError("not a check alone")
    if x == 0:
        raise ValueError("there is another way")
    else:
        x = 3
    return x
""",
    "outer": '''
def outer(x):
    def inner(y):
        return y

    text = """not a docstring"""
    return inner(x), text
''',
    "decorated": """
@wrap
def decorated(x):
    return x
""",
    "Thing": """
class Thing:

    size: int = 3  # what it is

    def method(self, x):
        return self.size
""",
    "Thing.method": """
def method(self, x):
    return self.size
""",
}


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """The functions of CODE by their names."""
    path = tmp_path_factory.mktemp("show") / "shown_things.py"
    path.write_text(CODE)
    spec = importlib.util.spec_from_file_location("shown_things", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "shown_things", module)
        spec.loader.exec_module(module)
        yield {**vars(module), "Thing.method": module.Thing.method}


@pytest.mark.parametrize("name", SHOWN)
def test_docstrings_and_checks_are_hidden_and_nothing_else(things, name):
    assert h.shown_source(things[name]) == SHOWN[name].strip()


def display(monkeypatch, *things) -> str:
    """The Markdown that show displays."""
    displayed = []
    monkeypatch.setattr(h, "display", displayed.append)
    h.show(*things)
    (markdown,) = displayed
    return markdown.data


def test_show_displays_highlighted_markdown(things, monkeypatch):
    """One cell of code, whatever is shown; IPython renders Markdown where no kernel runs, too."""
    shown = display(monkeypatch, things["plain"], things["Thing.method"])
    code = f"```python\n{SHOWN['plain'].strip()}\n\n\n{SHOWN['Thing.method'].strip()}\n```"
    assert shown == f"<div style='font-family: monospace'>\n\n{code}\n\n</div>"


# --- what the notebook shows ---


def written_here(thing) -> bool:
    """A class or a function of the helper, not one that a dataclass made."""
    if inspect.isclass(thing):
        return thing.__module__ == h.__name__
    return inspect.isfunction(thing) and inspect.unwrap(thing).__code__.co_filename == h.__file__


def public() -> dict[str, object]:
    """Functions, classes and their methods, as they can be shown."""
    found = {name: thing for name, thing in vars(h).items() if not name.startswith("_") and written_here(thing)}
    for name, owner in [(name, thing) for name, thing in found.items() if inspect.isclass(thing)]:
        found |= {f"{name}.{key}": method for key, method in vars(owner).items() if written_here(method)}
    return found


def without_hidden(node: ast.AST) -> ast.AST:
    """The tree without docstrings, checks and what only refuses: `hidden` said in the language of trees."""

    class Hide(ast.NodeTransformer):
        def visit_Expr(self, node):
            called = getattr(node.value, "func", None)
            check = isinstance(called, ast.Name) and called.id.startswith("_check")
            return None if check or isinstance(node.value, ast.Constant) else node

        def visit_If(self, node):
            refuses = isinstance(node.body[0], ast.Raise) and not node.orelse
            return None if refuses else self.generic_visit(node)

    return Hide().visit(node)


@pytest.mark.parametrize("name", public())
def test_what_is_shown_is_what_runs(name):
    """It compiles, it has the meaning of the source, checks aside, and its lines are the source's, in their order."""
    thing = public()[name]
    source, shown = textwrap.dedent(inspect.getsource(thing)), h.shown_source(thing)
    assert ast.dump(ast.parse(shown)) == ast.dump(without_hidden(ast.parse(source)))
    compile(shown, name, "exec")
    lines = iter(source.split("\n"))
    assert all(line in lines for line in shown.split("\n")), "a subsequence"


@pytest.mark.parametrize("name", ["forward_process", "Block.forward", "training_loop", "reverse_process", "generate_ar", "nelbo"])
def test_what_the_notebook_shows_fits_a_screen(name, monkeypatch):
    shown = display(monkeypatch, public()[name])
    assert shown.count("\n") <= 54 and f"def {name.split('.')[-1]}(" in shown
    assert not re.search(r'"""|^ *_check|\braise\b', shown, re.M)
    assert [line for line in shown.split("\n") if line.startswith("```")] == ["```python", "```"], "nothing else ends the code"
