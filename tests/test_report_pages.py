"""The pages of labelling: text is escaped whatever it holds, and Jinja and Matplotlib are not asked for."""

import dataclasses
import io
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from catdog.report.html import Markup, page, table, tag, text
from catdog.report.morning import Cause, Course, Photo, RunPage, Step, photo_grid, run_page

EVIL = "\"'><script>alert(1)</script>&amp;"
ESCAPED = "&quot;&#x27;&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;"


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 12), "teal").save(buffer, "JPEG")
    return buffer.getvalue()


def content(**changes: Any) -> RunPage:
    """A report whose every text is as evil as it can be."""
    photo = Photo(jpeg=picture(), caption=EVIL, name=EVIL)
    made = RunPage(
        title=EVIL,
        state="warn",
        sentences=[EVIL],
        figures=[(EVIL, EVIL)],
        steps=[Step(text=EVIL, command=EVIL)],
        books=[("ok", 3, EVIL), (EVIL, 1, EVIL)],
        listed=4,
        labels={"cat": 2, "dog": 1},
        labels_before={"cat": 1, "dog": 1},
        edges=(0.5, 0.9, 1.0),
        confidence={"cat": [1, 1], "dog": [0, 1]},
        confidence_before=[2, 5],
        drift=EVIL,
        questions=[(EVIL, EVIL, EVIL)],
        courses=[Course(title=EVIL, values=[1.0, 2.0], texts=[EVIL, EVIL], nights=[EVIL, EVIL])],
        accuracy=EVIL,
        uncertain=[photo],
        neither=[photo, Photo(jpeg=None, caption=EVIL, name=EVIL)],
        neither_count=2,
        errors=[Cause(name=EVIL, count=1, examples=[(EVIL, EVIL)])],
        skipped=[Cause(name=EVIL, count=1)],
        durations_s={EVIL: 1.0, "total": 2.0},
        thread_s={EVIL: 1.0},
        images=3,
        facts=[(EVIL, EVIL)],
        configuration=EVIL,
    )
    return dataclasses.replace(made, **changes)


def test_a_name_that_is_no_utf_8_is_written_with_a_backslash() -> None:
    assert b"<p>caf\\udce9.jpg caf\xc3\xa9</p>" in page("a page", tag("p", "caf\udce9.jpg café"))


def test_every_text_is_escaped() -> None:
    found = run_page(content()).decode()
    assert "<script" not in found
    assert "alert(1)</script>" not in found
    assert found.count("&lt;script&gt;alert(1)&lt;/script&gt;") > 25
    assert tag("p", EVIL, title=EVIL) == f'<p title="{ESCAPED}">{ESCAPED}</p>'


def test_only_what_tag_made_is_html() -> None:
    assert text(["a<b", tag("i", "c&d"), None, ["e"]]) == "a&lt;b<i>c&amp;d</i>e"
    assert isinstance(tag("i"), Markup)
    assert text(str(tag("i", "x")).replace("x", "y")) == "&lt;i&gt;y&lt;/i&gt;"  # a plain text again


def test_a_page_says_that_it_needs_nothing_else() -> None:
    found = page("title", "body").decode()
    assert found.startswith("<!doctype html>")
    assert "default-src &#x27;none&#x27;" in found
    assert "prefers-color-scheme: dark" in found
    assert "url(" not in found
    assert "@import" not in found


def test_photographs_of_neither_and_those_that_are_gone() -> None:
    found = run_page(content()).decode()
    assert "Neither cat nor dog" in found
    assert "2 photographs may show neither a cat nor a dog." in found
    assert found.count("data:image/jpeg;base64,") == 2
    assert "could not be read again" in found


def test_the_same_content_gives_the_same_bytes() -> None:
    assert run_page(content()) == run_page(content())


@pytest.mark.parametrize(
    "changes",
    [
        {
            "labels": {"cat": 0, "dog": 0},
            "confidence": {"cat": [0, 0], "dog": [0, 0]},
            "labels_before": None,
            "confidence_before": None,
            "courses": [],
            "images": 0,
            "books": [("ok", 0, "")],
            "listed": 0,
        },
        {"labels_before": None, "confidence_before": None, "courses": [], "uncertain": [], "neither": []},
        {"courses": [Course(title="t", values=[0.0], texts=["0 %"], nights=["1.1."])]},
        {"durations_s": {}, "thread_s": {"decode": 0.0}, "steps": [], "errors": [], "skipped": [], "accuracy": ""},
    ],
)
def test_a_night_may_be_quiet(changes: dict[str, Any]) -> None:
    assert run_page(content(**changes)).startswith(b"<!doctype html>")


def test_a_table_may_be_empty() -> None:
    assert "<tbody></tbody>" in table(["a"], [])


def test_the_pages_need_neither_jinja_nor_matplotlib() -> None:
    code = (
        "import sys; sys.modules['jinja2'] = sys.modules['matplotlib'] = None; from catdog import report; "
        "print(report.run_page.__name__, report.RunPage.__name__, report.comparison_page.__name__)"
    )
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout == "run_page RunPage comparison_page\n"


def test_the_package_gives_its_names_as_often_as_they_are_asked_for() -> None:
    from catdog import report

    for name in ("run_page", "comparison_page", "RunPage"):
        assert getattr(report, name) is getattr(report, name)
        assert callable(getattr(report, name))
    with pytest.raises(AttributeError):
        report.nothing_of_the_kind  # noqa: B018


def test_a_member_of_an_archive_is_called_by_its_own_name() -> None:
    name = f"zip://train/cat.1.jpg::s3://bucket/{99 * 'x'}.zip"
    grid = str(photo_grid([Photo(jpeg=None, caption="cat 99.0 %", name=name)]))
    assert ">zip://train/cat.1.jpg<" in grid
    assert f'title="{name}"' in grid
