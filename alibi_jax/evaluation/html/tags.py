"""HTML as nested calls: what is not markup already is escaped, so nothing can be forgotten."""

import html
from collections.abc import Iterable, Sequence
from typing import NamedTuple

_VOID = ("br", "meta")


class Html(str):
    """Markup. Any other string is text."""

    __slots__ = ()


def text(value: object) -> Html:
    """Escape anything but markup, for content and for attributes in quotes."""
    if isinstance(value, Html):
        return value
    # Names of files may hold what is not UTF-8.
    return Html(html.escape(str(value).encode("utf-8", "replace").decode("utf-8")))


def join(parts: Iterable[object]) -> Html:
    """One after the other."""
    return Html("".join(map(text, parts)))


def tag(name: str, /, *content: object, **attributes: object) -> Html:
    """Write an element.

    Args:
        name: Of the element.
        content: What it holds; strings that are no `Html` are escaped.
        attributes: Their names with `_` for `-`, and `class_`; None leaves one out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>" + ("" if name in _VOID else f"{join(content)}</{name}>"))


def lines(*parts: object) -> Html:
    """The parts that are not empty, one a line."""
    return Html("<br>".join(text(part) for part in parts if part))


class Cell(NamedTuple):
    """A table cell with a class of the style sheet."""

    content: object
    class_: str


def table(caption: str, header: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """Write a table whose first column names its rows; a wide one scrolls by itself."""

    def cell(name: str, content: object, scope: str | None = None) -> Html:
        if isinstance(content, Cell):
            return tag(name, content.content, scope=scope, class_=content.class_)
        return tag(name, content, scope=scope)

    head = tag("tr", *(cell("th", content, "col") for content in header))
    body = [
        tag("tr", cell("th", name, "row"), *(cell("td", content) for content in contents))
        for name, *contents in rows
    ]
    title = tag("caption", tag("span", caption))
    whole = tag("table", title, tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)
