"""H.show: what stands on the page is the code that runs, with the first paragraph of each docstring."""

import ast
import importlib.util
import inspect
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


def lengthy(x, y=1):
    r"""Shapes, and the equation \\alpha.

    >>> lengthy(1)
    2
    """
    if x is None:
        raise ValueError("x: pass a number")
    """
    A string that is no docstring is shortened as one, and stays a string.

    Not this.
    """
    return x + y


def wordy(x):
    """A paragraph
    of two lines.

    And more.
    """
    return x


def closed_below(x):
    """One paragraph.
    """
    return x


def outer(x):
    """Outer.

    More of it.
    """
    def inner(y):
        """Inner.

        More of it.
        """
        return y

    text = """not a docstring

    nor shortened"""
    return inner(x), text


def _checked(function):
    @functools.wraps(function)
    def wrapped(*args):
        return function(*args)

    return wrapped


@_checked
@functools.cache
def decorated(x):
    """Found behind its wrapper."""
    return x


class Thing:
    """A class.

    Of which there is more to say.
    """

    size: int = 3  # what it is

    @_checked
    def method(self, x):
        """A method.

        >>> 1
        """
        return self.size
'''

SHOWN = {
    "plain": '''
def plain(x, y=1):
    """One line."""
    # a comment stays
    return x + y  # and so does this one
''',
    "lengthy": '''
def lengthy(x, y=1):
    r"""Shapes, and the equation \\alpha."""
    if x is None:
        raise ValueError("x: pass a number")
    """
    A string that is no docstring is shortened as one, and stays a string."""
    return x + y
''',
    "wordy": '''
def wordy(x):
    """A paragraph
    of two lines."""
    return x
''',
    "closed_below": '''
def closed_below(x):
    """One paragraph."""
    return x
''',
    "outer": '''
def outer(x):
    """Outer."""
    def inner(y):
        """Inner."""
        return y

    text = """not a docstring

    nor shortened"""
    return inner(x), text
''',
    "decorated": '''
@functools.cache
def decorated(x):
    """Found behind its wrapper."""
    return x
''',
    "Thing": '''
class Thing:
    """A class."""

    size: int = 3  # what it is

    def method(self, x):
        """A method."""
        return self.size
''',
    "Thing.method": '''
def method(self, x):
    """A method."""
    return self.size
''',
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


def display(monkeypatch, *things) -> str:
    """The Markdown that show displays."""
    displayed = []
    monkeypatch.setattr(h, "display", displayed.append)
    h.show(*things)
    (markdown,) = displayed
    return markdown.data


def shown_source(monkeypatch, thing) -> str:
    """The code alone."""
    return display(monkeypatch, thing).split("```python\n")[1].removesuffix("\n```\n\n</div>")


@pytest.mark.parametrize("name", SHOWN)
def test_docstrings_are_shortened_and_nothing_else_changes(things, name, monkeypatch):
    assert shown_source(monkeypatch, things[name]) == SHOWN[name].strip()


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
    here = {name: thing for name, thing in vars(h).items() if not name.startswith("_") and written_here(thing)}
    found = {name: thing for name, thing in here.items() if not (inspect.isclass(thing) and issubclass(thing, tuple))}
    for name, owner in [(name, thing) for name, thing in found.items() if inspect.isclass(thing)]:
        found |= {f"{name}.{key}": method for key, method in vars(owner).items() if written_here(method)}
    return found


class Reduced(ast.NodeTransformer):
    """The tree with the first paragraph of each docstring, and no private decorator: what `show` does, said of trees."""

    def visit_Expr(self, node):
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return ast.Expr(ast.Constant(node.value.value.split("\n\n")[0].rstrip()))
        return node

    def visit_FunctionDef(self, node):
        called = [(d, getattr(getattr(d, "func", d), "id", "")) for d in node.decorator_list]
        node.decorator_list = [d for d, name in called if not name.startswith("_")]
        return self.generic_visit(node)


@pytest.mark.parametrize("name", public())
def test_what_is_shown_is_what_runs(name, monkeypatch):
    """It compiles, it has the meaning of the source, and its lines are the source's, in their order, but for closing quotes."""
    thing = public()[name]
    source, shown = textwrap.dedent(inspect.getsource(thing)), shown_source(monkeypatch, thing)
    assert ast.dump(ast.parse(shown)) == ast.dump(Reduced().visit(ast.parse(source)))
    compile(shown, name, "exec")
    lines = iter(line.removesuffix('"""') for line in source.split("\n"))
    assert all(line.removesuffix('"""') in lines for line in shown.split("\n")), "a subsequence"


SCREEN = ["forward_process", "Block.forward", "training_loop", "reverse_process", "generate_ar", "nelbo", "llada_loss"]


@pytest.mark.parametrize("name", SCREEN)
def test_what_the_notebook_shows_fits_a_screen(name, monkeypatch):
    """With the line that carries shapes and equation, where there is one, and nothing of examples."""
    shown = display(monkeypatch, public()[name])
    assert shown.count("\n") <= 54 and f"def {name.split('.')[-1]}(" in shown and ">>>" not in shown
    if documented := public()[name].__doc__:
        assert f'"""{documented.splitlines()[0]}' in shown
    assert [line for line in shown.split("\n") if line.startswith("```")] == ["```python", "```"], "nothing else ends the code"
