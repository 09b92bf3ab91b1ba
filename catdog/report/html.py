"""HTML, of which the text is escaped whatever it holds: elements are made by `tag`, and only those are not escaped.

The pages that labelling writes are made with this, because labelling does not install Jinja.
"""

import html
from collections.abc import Iterable
from importlib.resources import files
from typing import Final, TypeAlias

_VOID: Final = frozenset({"img", "meta", "br", "rect", "line", "polyline", "circle"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Content: TypeAlias = str | Iterable["Content"] | None
"""What an element may hold: text, elements, nothing, or many of them."""


def tag(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """An element.

    Args:
        name: its name.
        content: what it holds. A text that is not `Markup` is escaped.
        attributes: an underscore in a name stands for a hyphen, and one at its end for nothing. Those that are None are
            left out. Values are escaped.

    Example:
        >>> tag("p", "a < b", class_="note")
        '<p class="note">a &lt; b</p>'
    """
    said = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    if name in _VOID:
        return Markup(f"<{name}{said}>" if name in {"img", "meta", "br"} else f"<{name}{said}/>")
    return Markup(f"<{name}{said}>{text(content)}</{name}>")


def text(content: Content) -> Markup:
    """Content as HTML, escaped where it is no `Markup`."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, str):
        return Markup(html.escape(content))
    return Markup("".join(text(each) for each in content))


def page(title: str, *content: Content) -> bytes:
    """A whole page, in light and dark, that asks for nothing else: neither files, nor scripts, nor fonts.

    A browser is told so, too (`Content-Security-Policy`): were a text to get through as HTML, nothing would run.
    """
    style = Markup(files("catdog.report").joinpath("page.css").read_text("utf-8"))
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", style),
    )
    body = tag("body", tag("main", *content))
    # A path may hold bytes that are no UTF-8, which Python has as surrogates.
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n".encode(errors="backslashreplace")


def table(heads: Iterable[str], rows: Iterable[Iterable[Content]], *, text_columns: Iterable[int] = (0,)) -> Markup:
    """A table, whose columns are numbers but for some."""
    left = set(text_columns)

    def cells(name: str, row: Iterable[Content]) -> list[Markup]:
        return [tag(name, cell, class_="text" if index in left else None) for index, cell in enumerate(row)]

    head = tag("thead", tag("tr", cells("th", heads)))
    body = tag("tbody", [tag("tr", cells("td", row)) for row in rows])
    return tag("div", tag("table", head, body), class_="wide", tabindex="0")
