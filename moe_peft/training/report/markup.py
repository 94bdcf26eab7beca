"""HTML and SVG from Python calls, in which every text is escaped unless it is markup already."""

import html
from collections.abc import Iterable, Sequence

# The elements of HTML that have no end tag.
_VOID = {"br", "meta"}


class Markup(str):
    """Text that is HTML already; any other ``str`` is escaped where it joins a page."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """An element: ``tag("a", "R&D", href="#x")`` is ``<a href="#x">R&amp;D</a>``.

    Args:
        children: markup, or anything else, whose ``str`` is escaped; None is left out.
        attributes: ``class_`` is ``class``, an underscore within a name a hyphen; None leaves one out.
    """
    parts = []
    for key, value in attributes.items():
        if value is not None:
            parts.append(f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value))}"')
    head = f"<{name}{''.join(parts)}>"
    return Markup(head if name in _VOID else f"{head}{join(children)}</{name}>")


def join(children: Iterable[object], between: str = "") -> Markup:
    """Several children as one piece of markup."""
    pieces = (
        child if isinstance(child, Markup) else Markup(html.escape(str(child)))
        for child in children
        if child is not None
    )
    return Markup(html.escape(between).join(pieces))


def table(
    head: Sequence[object], rows: Iterable[Sequence[object]], *, caption: str, class_: str | None = None
) -> Markup:
    """A table with a caption for those who cannot see what stands around it; a row's first cell is its head."""
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head))),
            tag(
                "tbody",
                *(tag("tr", tag("th", row[0], scope="row"), *(tag("td", cell) for cell in row[1:])) for row in rows),
            ),
            class_=class_,
        ),
        class_="scroll",
        tabindex=0,
        role="region",
        aria_label=caption,
    )


def folded(summary: object, *children: object, class_: str | None = None) -> Markup:
    """Children that a click opens, without any script."""
    return tag("details", tag("summary", summary), *children, class_=class_)
