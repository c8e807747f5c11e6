"""Writes lightning_moe/REFERENCE.md: the public names, as their signatures and docstrings have them.

`PYTHONPATH=. python .ci/reference.py`
"""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

from lightning.pytorch import Callback

import lightning_moe

PAGE = Path(lightning_moe.__file__).with_name("REFERENCE.md")
LISTS, TEXTS = ("Args", "Attributes", "Raises"), ("Returns", "Yields")  # sections of docstrings
TITLE = """# Reference

Every public name of `lightning_moe`. `.ci/reference.py` writes this page from the docstrings.
"""
WIDTH = 100


def page() -> str:
    """The page, as the docstrings are now."""
    found = {name: getattr(lightning_moe, name) for name in lightning_moe.__all__}
    index = "\n".join(f"- [`{name}`](#{name.lower()}): {_summary(each)}" for name, each in found.items())
    text = "\n".join([TITLE, index, *(line for name, each in found.items() for line in _entry(name, each))])
    return re.sub(r"\n{3,}", "\n\n", text)


def _summary(found: Any) -> str:
    return (inspect.getdoc(found) or "").partition("\n\n")[0].replace("\n", " ")


def _entry(name: str, found: Any) -> Iterator[str]:
    yield f"\n## {name}\n"
    yield _signature(name, found)
    yield from _markdown(inspect.getdoc(found) or "")
    for member, of in vars(found).items() if inspect.isclass(found) else ():
        # A Trainer's hooks, and what a class has from another library's, are documented there.
        if member.startswith("_") or hasattr(Callback, member) or not inspect.getdoc(of):
            continue
        if isinstance(of, property):
            yield f"### `{name}.{member}`\n"
        elif inspect.isroutine(of):
            yield f"### `{name}.{member}()`\n"
            yield _signature(f"{name}.{member}", getattr(found, member))
        else:
            continue
        yield from _markdown(inspect.getdoc(of) or "")


def _signature(name: str, found: Any) -> str:
    """A call, its types without the modules that they are in."""
    is_class = inspect.isclass(found)
    own = next((maker for maker in ("__init__", "__new__") if is_class and maker in vars(found)), None)
    signature = inspect.signature(getattr(found, own) if own else found)
    arguments = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        if inspect.isfunction(parameter.default):
            parameter = parameter.replace(default=_Named(parameter.default.__name__))
        arguments.append(str(parameter))
    returned = "" if is_class else f" -> {inspect.formatannotation(signature.return_annotation)}"
    arguments, returned = [_short(each) for each in arguments], _short(returned)
    call = f"{name}({', '.join(arguments)}){returned}"
    if len(call) > WIDTH:
        call = f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){returned}"
    return f"```python\n{call}\n```\n"


def _short(annotation: str) -> str:
    return re.sub(r"'([A-Z]\w*)'", r"\1", re.sub(r"\b(?:\w+\.)+(?=[A-Z])", "", annotation))


class _Named(str):
    """A default that is shown as its name."""

    def __repr__(self) -> str:
        return str(self)


def _markdown(docstring: str) -> Iterator[str]:
    """A docstring in Google's style as Markdown: its sections as lists, its examples as code."""
    for paragraph in re.split(r"\n\n+", docstring):
        heading, _, items = paragraph.partition(":\n")
        if heading in LISTS:
            yield f"**{heading.replace('Args', 'Arguments')}**\n"
            yield re.sub(r"^(\w+): ", r"- `\1`: ", dedent(items), flags=re.MULTILINE)
        elif heading in TEXTS:
            yield f"**{heading}**\n\n{dedent(items)}"
        elif paragraph.startswith(">>>"):
            yield f"```pycon\n{paragraph}\n```"
        else:
            yield paragraph
        yield ""


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
