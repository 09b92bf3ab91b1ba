"""The morning report of a run of `predict`: one HTML file that needs no other, in light and dark."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from catdog.records import percent, plural
from catdog.report.html import Content, Markup, page, table, tag

_WIDTH: Final = 520
"""Of a figure, in the units of its SVG, as the other sizes here."""

_HEIGHT: Final = 210
_TOP: Final = 14
_BOTTOM: Final = 160
_LEFT: Final = 56
_RIGHT: Final = 502

_NAME_CHARS: Final = 48
"""How much of a photograph's name is shown: its end."""

State = Literal["good", "warn", "bad"]

_STAGES: Final = {
    "plan": "listing, and finding what is new",
    "label": "labelling",
    "total": "all of it",
    "decode": "reading and decoding",
    "score": "computing the model",
    "publish": "writing the predictions",
}


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A photograph to look at."""

    jpeg: bytes | None
    """A small picture of it; None if it could not be read again."""

    caption: str
    name: str
    """Where it lies, without secrets."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """Something to do next."""

    text: str
    command: str | None = None


@dataclass(frozen=True, kw_only=True)
class Cause:
    """Why some images have no label, or were skipped."""

    name: str
    count: int
    examples: Sequence[tuple[str, str]] = ()
    """(where it lies, what was wrong) of some of them."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """A number of each of the last nights, the oldest first and this one last."""

    title: str
    values: Sequence[float]
    texts: Sequence[str]
    """The values as a person reads them."""

    nights: Sequence[str]
    """The nights' names."""


@dataclass(frozen=True, kw_only=True)
class RunPage:
    """What the report says."""

    title: str
    state: State
    sentences: Sequence[str]
    """What happened, the most important first."""

    figures: Sequence[tuple[str, str]]
    """(number, what it is)."""

    steps: Sequence[Step]
    books: Sequence[tuple[str, int, str]]
    """(name, number, what it means) of all that adds up to what was listed."""

    listed: int
    labels: Mapping[str, int]
    labels_before: Mapping[str, int] | None
    edges: Sequence[float]
    confidence: Mapping[str, Sequence[int]]
    confidence_before: Sequence[int] | None
    """Of earlier nights together; None if there are none to compare with."""

    drift: str
    questions: Sequence[tuple[str, str, str]]
    """(question, what was found, how surprising that is) of the comparison with earlier nights."""

    courses: Sequence[Course]
    accuracy: str
    uncertain: Sequence[Photo]
    neither: Sequence[Photo]
    neither_count: int
    errors: Sequence[Cause]
    skipped: Sequence[Cause]
    durations_s: Mapping[str, float]
    thread_s: Mapping[str, float]
    images: int
    facts: Sequence[tuple[str, str]]
    """(name, value) of what the run was made with."""

    configuration: str


def run_page(content: RunPage) -> bytes:
    """Draw the report: one HTML file, in UTF-8, that asks for nothing else. The same content gives the same bytes."""
    return page(
        content.title,
        tag("h1", content.title),
        tag("div", [tag("p", sentence) for sentence in content.sentences], class_=f"state {content.state}"),
        figure_row(content.figures),
        section("What to do next", tag("ol", [_step(step) for step in content.steps])) if content.steps else None,
        section("The books", *_books(content)),
        section("Against earlier nights", *_comparison(content)),
        section("How right the labels are", tag("p", content.accuracy)) if content.accuracy else None,
        *_photos(content),
        *_causes(content),
        section("Throughput", *_throughput(content)) if content.images else None,
        section("The run", _facts(content.facts), _details("Configuration", tag("pre", content.configuration))),
    )


def section(title: str, *content: Content) -> Markup:
    """A part of a page, with its heading."""
    return tag("section", tag("h2", title), *content)


def _details(title: str, content: Content) -> Markup:
    return tag("details", tag("summary", title), content)


def figure_row(figures: Sequence[tuple[str, str]]) -> Markup:
    """(number, what it is) of a few numbers to remember, large."""
    shown = [tag("div", tag("b", number), tag("span", name), class_="figure") for number, name in figures]
    return tag("div", shown, class_="figures")


def _step(step: Step) -> Markup:
    return tag("li", step.text, tag("pre", step.command) if step.command else None)


def _books(content: RunPage) -> list[Content]:
    colours = {"ok": "ok", "error": "error"}
    parts = [(name, number) for name, number, _ in content.books if number]
    sum_text = " + ".join(f"{number:,} {name}" for name, number, _ in content.books)
    rows = [[name, f"{number:,}", meaning] for name, number, meaning in content.books]
    return [
        tag("p", f"{content.listed:,} listed = {sum_text}"),
        _bar([(name, number, colours.get(name, "other")) for name, number in parts]) if parts else None,
        table(["where it went", "number", "what that means"], rows, text_columns=(0, 2)),
    ]


def _bar(parts: Sequence[tuple[str, int, str]]) -> Markup:
    """Shares of a whole, one beside the other."""
    total = sum(number for _, number, _ in parts)
    shown = [
        tag("i", class_=colour, style=f"width:{100 * number / total:.2f}%", title=f"{number:,} {name}")
        for name, number, colour in parts
    ]
    legend = [
        tag("span", tag("i", class_=f"key {colour}"), f"{name} {percent(number / total)}")
        for name, number, colour in parts
    ]
    return tag("div", tag("div", shown, class_="bar"), tag("div", legend, class_="legend"))


def _comparison(content: RunPage) -> list[Content]:
    found: list[Content] = [tag("p", content.drift)]
    if content.questions:
        found.append(table(["question", "what was found", "verdict"], content.questions, text_columns=(0, 1, 2)))
    if sum(content.labels.values()):
        found.append(
            tag(
                "div",
                tag("div", tag("h3", "Confidence of the labels"), _histogram(content)),
                tag("div", tag("h3", "Labels"), *_mix(content)),
                *(tag("div", tag("h3", course.title), _course(course)) for course in content.courses),
                class_="two",
            )
        )
    return found


def _mix(content: RunPage) -> list[Content]:
    found: list[Content] = [_bar([(name, number, name) for name, number in content.labels.items()])]
    if content.labels_before and sum(content.labels_before.values()):
        found += [
            tag("p", "Earlier nights together:", class_="quiet"),
            _bar([(name, number, name) for name, number in content.labels_before.items()]),
        ]
    return found


def _svg(*content: Content, label: str) -> Markup:
    return tag("svg", *content, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=label)


def _label(x: float, y: float, content: str, anchor: str = "middle", class_: str = "quiet") -> Markup:
    return tag("text", content, x=round(x, 1), y=round(y, 1), text_anchor=anchor, class_=class_)


def _grid(highest: float, unit: str = " %") -> list[Markup]:
    """Lines across a figure whose largest number is `highest`."""
    found = []
    for share in (0.0, 0.5, 1.0):
        y = _BOTTOM - share * (_BOTTOM - _TOP)
        found += [
            tag("line", x1=_LEFT, x2=_RIGHT, y1=y, y2=y, class_="grid"),
            _label(_LEFT - 6, y + 4, f"{_round(share * highest)}{unit}", "end"),
        ]
    return found


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == 0 else f"{value:.2g}"


def _histogram(content: RunPage) -> Markup:
    """Bars of tonight's shares, cats below dogs, and a line of those of earlier nights."""
    total = sum(map(sum, content.confidence.values())) or 1
    shares = {name: [100 * number / total for number in counts] for name, counts in content.confidence.items()}
    stacks: list[float] = [sum(bars) for bars in zip(*shares.values(), strict=True)]
    before: list[float] = []
    if content.confidence_before and (num_before := sum(content.confidence_before)):
        before = [100 * number / num_before for number in content.confidence_before]
    highest = max([*stacks, *before, 1.0])
    step = (_RIGHT - _LEFT) / len(stacks)

    def height(share: float) -> float:
        return round(share / highest * (_BOTTOM - _TOP), 1)

    bars: list[Content] = []
    for index, stack in enumerate(stacks):
        x, y = _LEFT + index * step, float(_BOTTOM)
        title = f"confidence {_edge(content.edges[index])} to {_edge(content.edges[index + 1])} %: {stack:.2f} %"
        title += f"; earlier nights {before[index]:.2f} %" if before else ""
        drawn = []
        for name, values in shares.items():
            y -= height(values[index])
            rect = {"x": round(x + 2, 1), "y": round(y, 1), "width": round(step - 4, 1)}
            drawn.append(tag("rect", **rect, height=height(values[index]), class_=name))
        bars.append(tag("g", tag("title", title), drawn))
    line = None
    if before:
        points = [
            f"{round(x, 1)},{round(_BOTTOM - height(share), 1)}"
            for index, share in enumerate(before)
            for x in (_LEFT + index * step, _LEFT + (index + 1) * step)
        ]
        line = tag("polyline", points=" ".join(points), class_="before")
    ticks = [_label(_LEFT + index * step, _BOTTOM + 17, _edge(edge)) for index, edge in enumerate(content.edges[:-1])]
    ticks.append(_label(_RIGHT, _BOTTOM + 17, "100"))
    legend = [tag("span", tag("i", class_=f"key {name}"), f"{name}s tonight") for name in shares]
    if before:
        legend.append(tag("span", "— all earlier nights"))
    figure = _svg(
        _grid(highest),
        bars,
        line,
        ticks,
        _label((_LEFT + _RIGHT) / 2, _BOTTOM + 38, "confidence in %; the bins get narrower"),
        label="Histogram of the confidence of the labels, tonight and on earlier nights",
    )
    return tag("div", figure, tag("div", legend, class_="legend"))


def _edge(edge: float) -> str:
    return f"{100 * edge:g}"


def _course(course: Course) -> Markup:
    """A line through the last nights; the last point is tonight."""
    highest = max([*course.values, 1e-9])
    step = (_RIGHT - _LEFT - 16) / max(1, len(course.values) - 1)
    places = [
        (round(_LEFT + 8 + index * step, 1), round(_BOTTOM - value / highest * (_BOTTOM - _TOP), 1))
        for index, value in enumerate(course.values)
    ]
    marks = [
        tag("g", tag("title", f"{night}: {text}"), tag("circle", cx=x, cy=y, r=3, class_="dot"))
        for night, text, (x, y) in zip(course.nights, course.texts, places, strict=True)
    ]
    marks.append(tag("circle", cx=places[-1][0], cy=places[-1][1], r=5, class_="now"))
    unit = " %" if course.texts[-1].endswith("%") else ""
    first = _label(_LEFT + 8, _BOTTOM + 17, course.nights[0], "start") if len(places) > 1 else None
    return _svg(
        _grid(highest, unit),
        tag("polyline", points=" ".join(f"{x},{y}" for x, y in places), class_="course"),
        marks,
        first,
        _label(places[-1][0], _BOTTOM + 17, f"tonight: {course.texts[-1]}", "end" if len(places) > 1 else "start", ""),
        label=f"{course.title} over the last nights",
    )


def _photos(content: RunPage) -> list[Content]:
    found: list[Content] = []
    if content.uncertain:
        text = "The photographs of this run with the least confidence in their label."
        found.append(section("Most uncertain", tag("p", text, class_="quiet"), photo_grid(content.uncertain)))
    if content.neither:
        number = plural(content.neither_count, "photograph")
        text = (
            f"{number} may show neither a cat nor a dog. Where that is so, the label means nothing. "
            "A few cats and dogs are always among them."
        )
        found.append(section("Neither cat nor dog", tag("p", text, class_="quiet"), photo_grid(content.neither)))
    return found


def photo_grid(photos: Sequence[Photo]) -> Markup:
    """Photographs with their captions."""
    return tag("div", [_photo(photo) for photo in photos], class_="photos")


def _photo(photo: Photo) -> Markup:
    if photo.jpeg is None:
        picture = tag("p", "could not be read again", class_="quiet")
    else:
        source = f"data:image/jpeg;base64,{base64.b64encode(photo.jpeg).decode()}"
        picture = tag("img", src=source, alt=photo.caption)
    name = photo.name.partition("::")[0]  # of a member, its name in the archive
    name = name if len(name) <= _NAME_CHARS else f"…{name[-_NAME_CHARS:]}"
    caption = photo.caption.replace(" %", "\N{NO-BREAK SPACE}%")
    return tag("figure", picture, tag("figcaption", tag("b", caption), tag("span", name, title=photo.name)))


def _causes(content: RunPage) -> list[Content]:
    found: list[Content] = []
    for title, causes in (("Errors", content.errors), ("Skipped", content.skipped)):
        if causes:
            heads = ["cause", "number", *(["for example"] if any(cause.examples for cause in causes) else [])]
            rows = [[cause.name, f"{cause.count:,}", _examples(cause)][: len(heads)] for cause in causes]
            found.append(section(title, table(heads, rows, text_columns=(0, 2))))
    return found


def _examples(cause: Cause) -> list[Markup]:
    return [tag("div", tag("code", name), f": {text}" if text else "") for name, text in cause.examples]


def _throughput(content: RunPage) -> list[Content]:
    total = content.durations_s.get("total", 0.0)
    clock = [
        [_STAGES.get(stage, stage), f"{seconds:,.1f}", f"{100 * seconds / total:.0f} %" if total else "–"]
        for stage, seconds in content.durations_s.items()
    ]
    busy = sum(content.thread_s.values())
    threads = [
        [
            _STAGES.get(stage, stage),
            f"{seconds:,.1f}",
            f"{100 * seconds / busy:.0f} %" if busy else "–",
            f"{1000 * seconds / content.images:,.1f}",
        ]
        for stage, seconds in content.thread_s.items()
    ]
    return [
        tag(
            "div",
            tag("div", tag("h3", "By the clock"), table(["stage", "seconds", "share"], clock)),
            tag(
                "div",
                tag("h3", "Over all threads"),
                table(["stage", "seconds", "share", "ms per image"], threads),
            ),
            class_="two",
        )
    ]


def _facts(facts: Sequence[tuple[str, str]]) -> Markup:
    return table(["", ""], facts, text_columns=(0, 1))
