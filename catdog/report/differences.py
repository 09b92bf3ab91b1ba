"""The page of `catdog compare`: one HTML file that needs no other, in light and dark."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from catdog.report.html import Content, Markup, page, table, tag
from catdog.report.morning import Photo, figure_row, photo_grid, section

_OUTCOMES: Final = ("cat", "dog", "error", "absent")


@dataclass(frozen=True, kw_only=True)
class ComparisonPage:
    """What the page says."""

    title: str
    sides: Sequence[tuple[str, str, str]]
    """(side, output, model)."""

    figures: Sequence[tuple[str, str]]
    """(number, what it is)."""

    flows: Mapping[str, Mapping[str, int]]
    """What was said before → what is said after → number of images."""

    quantiles: Sequence[tuple[str, str]]
    """(share of the images, how far their probability moved at most)."""

    flips: Sequence[Photo]
    shifts: Sequence[Photo]
    lists: Sequence[tuple[str, int, Sequence[tuple[str, str]]]]
    """(what they are, how many, (where it lies, what was wrong) of some)."""


def comparison_page(content: ComparisonPage) -> bytes:
    """Draw the page: one HTML file, in UTF-8, that asks for nothing else. The same content gives the same bytes."""
    flips = "The photographs whose label flipped, those first whose probability moved farthest."
    shifts = "The photographs that kept their label, but whose probability moved far."
    return page(
        content.title,
        tag("h1", content.title),
        table(["", "output", "model"], [[*side[:2], side[2][:12]] for side in content.sides], text_columns=(0, 1, 2)),
        figure_row(content.figures),
        section("From what to what", _flows(content.flows)),
        section("How far the probabilities moved", _quantiles(content.quantiles)) if content.quantiles else None,
        section("Flips", tag("p", flips, class_="quiet"), photo_grid(content.flips)) if content.flips else None,
        section("Shifts", tag("p", shifts, class_="quiet"), photo_grid(content.shifts)) if content.shifts else None,
        [section(title, *_names(count, names)) for title, count, names in content.lists if count],
    )


def _flows(flows: Mapping[str, Mapping[str, int]]) -> Markup:
    """A table of what was said before and after. What stayed is quiet."""
    shown = [name for name in _OUTCOMES if flows.get(name) or any(name in counts for counts in flows.values())]
    rows: list[list[Content]] = []
    for one in shown:
        cells: list[Content] = [f"{one} before"]
        for two in shown:
            count = f"{flows.get(one, {}).get(two, 0):,}"
            cells.append(tag("span", count, class_="quiet") if one == two or count == "0" else tag("b", count))
        rows.append(cells)
    return table(["", *(f"{name} after" for name in shown)], rows)


def _quantiles(quantiles: Sequence[tuple[str, str]]) -> Markup:
    rows = [[f"{share} of the images", f"by at most {value}"] for share, value in quantiles]
    return table(["", "the probability of dog moved"], rows)


def _names(count: int, names: Sequence[tuple[str, str]]) -> list[Content]:
    has_texts = any(text for _, text in names)
    rows = [[tag("code", name), text][: 1 + has_texts] for name, text in names]
    more = f"The first {len(names):,} of {count:,}." if count > len(names) else f"{count:,} in all."
    return [
        tag("p", more, class_="quiet"),
        table(["image", "what was wrong"][: 1 + has_texts], rows, text_columns=(0, 1)),
    ]
