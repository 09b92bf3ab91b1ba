"""The page of `catdog serve`, in Chromium, before a real service."""

import base64
import csv
import io
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import inference_case
import pillow_heif
import pytest
from axe_playwright_python.sync_playwright import Axe
from inference_case import encoded_drawings
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, FilePayload, Page, expect, sync_playwright
from serving_case import Process, process

from catdog.schema import PREDICTIONS_SCHEMA

pytestmark = pytest.mark.slow

DRAWINGS = encoded_drawings(12)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TOKEN = "a-token-for-this-test"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium, which is not here: apt-get install chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def served(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service whose model is unsure of most drawings."""
    directory = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(inference_case, "REVIEW_THRESHOLD", 0.9995)
        model = inference_case.save_model(str(directory / "model"))
    with process(directory, "--model", model) as started:
        yield started


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """A function that opens the page of a service. What its script raises, or the policy forbids, fails the test."""
    complaints: list[str] = []
    pages = []

    def note_violation(said: ConsoleMessage) -> None:
        if "Security Policy" in said.text:
            complaints.append(said.text)

    def open_at(url: str, *, width: int = 1280, dark: bool = False) -> Page:
        scheme = "dark" if dark else "light"
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)  # type: ignore[arg-type]
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", note_violation)
        page.goto(url)
        pages.append(page)
        return page

    yield open_at
    for page in pages:
        page.context.close()
    assert complaints == []


def upload(name: str, data: bytes, mime_type: str = "image/jpeg") -> FilePayload:
    return {"name": name, "mimeType": mime_type, "buffer": data}


def odd_files() -> dict[str, tuple[FilePayload, str | None]]:
    """Name → a file of that name, with the code of its error."""
    photo = Image.open(io.BytesIO(DRAWINGS[0]))
    heic, png = io.BytesIO(), io.BytesIO()
    pillow_heif.from_pillow(photo).save(heic)
    photo.save(png, "PNG")
    bomb = bytearray(png.getvalue())
    bomb[16:24] = (60_000).to_bytes(4) * 2  # the size that its header tells
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4)
    files = [
        (upload("IMG_0042.HEIC", heic.getvalue(), "image/heic"), None),
        (upload("bomb.png", bytes(bomb), "image/png"), "too_large"),
        (upload("letter.pdf", b"%PDF-1.7 a letter", "application/pdf"), "unsupported_format"),
        (upload("empty.jpg", b""), "empty_file"),
        (upload("page.jpg", b"<!doctype html><script>throw Error()</script>"), "unsupported_format"),
        (upload("cut.jpg", DRAWINGS[1][:1000]), "truncated"),
        (upload('=HYPERLINK("x"),.jpg', DRAWINGS[2]), None),
        (upload("-ä,\n.jpg", DRAWINGS[3]), None),
    ]
    return {file["name"]: (file, code) for file, code in files}


def choose(page: Page, *files: FilePayload) -> None:
    page.set_input_files("#choose", files)


def wait_for_all(page: Page, num: int) -> None:
    expect(page.locator(".card:is([data-state=ok], [data-state=error])")).to_have_count(num, timeout=60_000)


def test_a_picture_gets_what_the_service_says(served: Process, open_page: Callable[..., Page]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = io.BytesIO()
    Image.open(io.BytesIO(DRAWINGS[0])).save(turned, "JPEG", exif=exif)
    answer = httpx.post(f"{served.url}/v1/predict", content=turned.getvalue(), trust_env=False).json()
    (row,) = answer["predictions"]
    page = open_page(served.url)
    choose(page, upload("rex.jpg", turned.getvalue()))
    wait_for_all(page, 1)
    card = page.locator(".card")
    expect(card.locator(".name")).to_have_text("rex.jpg")
    expect(card.locator(".verdict")).to_contain_text(row["label"].capitalize())
    expect(card.locator(".confidence")).to_have_text(f"{100 * row['confidence']:.1f} %")
    assert card.locator(".review").is_visible() == row["needs_review"] == (row["review_reason"] is not None)
    assert row["read_as"] in card.locator(".read").inner_text().replace("\xa0", " ")
    assert "orientation 6" in row["read_as"]
    thumbnail = card.locator(".thumbnail")
    expect(thumbnail).to_be_visible()
    shape = thumbnail.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert shape == [row["width"], row["height"]]  # upright
    expect(page.locator("#summary")).to_have_text(re.compile("^(1 cat, 0 dogs|0 cats, 1 dog)"))
    expect(page.locator("#model")).to_contain_text(answer["model_id"][:12])


def test_odd_files_get_their_error_codes_and_all_are_in_the_csv(
    served: Process, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    odd = odd_files()
    page = open_page(served.url)
    choose(page, *(file for file, _ in odd.values()))
    wait_for_all(page, len(odd))
    for card, code in zip(page.locator(".card").all(), (code for _, code in odd.values()), strict=True):
        assert (card.get_attribute("data-state") == "error") == (code is not None)
        if code is not None:
            expect(card.locator(".detail code")).to_have_text(code)
            expect(card.locator("button")).to_be_hidden()
    for name, kind in (("IMG_0042", "HEIC"), ("bomb", "PNG"), ("letter", "PDF"), ("page", "JPG")):
        card = page.locator(".card").filter(has_text=name)
        expect(card.locator(".placeholder")).to_have_text(kind)
        expect(card.locator(".thumbnail")).to_have_count(0)
    expect(page.locator("#summary")).to_contain_text("5 errors")

    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "results.csv")
    with (tmp_path / "results.csv").open(encoding="utf-8-sig", newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert list(rows[0]) == PREDICTIONS_SCHEMA.names
    assert [row["uri"].removeprefix("'") for row in rows] == list(odd)
    assert [row["uri"][:2] for row in rows[-2:]] == ["'=", "'-"]
    assert [row["error_code"] or None for row in rows] == [code for _, code in odd.values()]
    assert {row["status"] for row in rows} == {"ok", "error"}
    required = [field.name for field in PREDICTIONS_SCHEMA if not field.nullable]
    assert all(row[name] for row in rows for name in required)
    for row, (file, code) in zip(rows, odd.values(), strict=True):
        assert int(row["num_bytes"]) == len(file["buffer"])
        if code is None:
            (said,) = httpx.post(f"{served.url}/v1/predict", content=file["buffer"], trust_env=False).json()[
                "predictions"
            ]
            assert (float(row["prob_dog"]), row["image_id"]) == (said["prob_dog"], said["image_id"])


def test_a_click_shows_why_and_another_one_the_picture(served: Process, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    choose(page, upload("rex.jpg", DRAWINGS[1]), odd_files()["IMG_0042.HEIC"][0])
    wait_for_all(page, 2)
    for card in page.locator(".card").all():
        why = card.get_by_role("button", name="Why?")
        expect(why).to_have_attribute("aria-pressed", "false")
        why.click()
        overlay = card.locator(".overlay")
        expect(overlay).to_be_visible()
        expect(why).to_have_attribute("aria-pressed", "true")
        expect(card.locator(".method")).to_contain_text("speaks for")
        page.wait_for_function("image => image.complete && image.naturalWidth > 0", arg=overlay.element_handle())
        why.click()
        expect(overlay).to_have_count(0)


def test_pictures_are_dropped_and_pasted(served: Process, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    hand_over = """([kind, text, name]) => {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const transfer = new DataTransfer();
      transfer.items.add(new File([bytes], name, { type: "image/jpeg" }));
      const options = { bubbles: true, cancelable: true, dataTransfer: transfer, clipboardData: transfer };
      const event = kind === "paste" ? new ClipboardEvent(kind, options) : new DragEvent(kind, options);
      document.querySelector("footer").dispatchEvent(event);
    }"""
    text = base64.b64encode(DRAWINGS[0]).decode()
    page.evaluate(hand_over, ["dragenter", text, "rex.jpg"])
    expect(page.locator("#veil")).to_be_visible()
    page.evaluate(hand_over, ["drop", text, "rex.jpg"])
    expect(page.locator("#veil")).to_be_hidden()
    page.evaluate(hand_over, ["paste", text, "image.png"])
    wait_for_all(page, 2)
    expect(page.locator(".name")).to_have_text(["rex.jpg", "image.png"])


def test_a_thousand_pictures(served: Process, open_page: Callable[..., Page], tmp_path: Path) -> None:
    small = io.BytesIO()
    Image.open(io.BytesIO(DRAWINGS[0])).resize((48, 48)).save(small, "JPEG")
    paths = [tmp_path / f"{number:04}.jpg" for number in range(1000)]
    for path in paths:
        path.write_bytes(small.getvalue())
    page = open_page(served.url)
    page.set_input_files("#choose", paths)
    expect(page.locator(".card")).to_have_count(1000)
    expect(page.locator("#download")).to_be_disabled()
    wait_for_all(page, 1000)
    expect(page.locator("#download")).to_be_enabled()
    expect(page.locator("#summary")).to_have_text(re.compile(r"^(1,000 cats, 0|0 cats, 1,000) dogs"))
    assert 0 < page.locator(".thumbnail").count() < 100  # those near the window
    assert page.locator(".name").all_text_contents() == [path.name for path in paths]
    page.click("#clear")
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#results")).to_be_hidden()


@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_everybody_can_use_it(served: Process, open_page: Callable[..., Page], width: int, dark: bool) -> None:
    """axe-core finds nothing, neither in the empty page nor with every kind of result; no part is cut off."""

    def check() -> None:
        assert Axe().run(page).response["violations"] == []
        assert page.evaluate("document.documentElement.scrollWidth") <= width

    page = open_page(served.url, width=width, dark=dark)
    expect(page.locator("#model")).not_to_be_empty()
    check()
    drawings = [upload(f"{number}.jpg", data) for number, data in enumerate(DRAWINGS)]
    choose(page, *(file for file, _ in odd_files().values()), *drawings, upload("a" * 200 + ".jpg", DRAWINGS[0]))
    wait_for_all(page, len(odd_files()) + len(drawings) + 1)
    assert page.locator(".review:visible").count() > 0
    page.get_by_role("button", name="Why?").first.click()
    expect(page.locator(".overlay")).to_be_visible()
    expect(page.locator("#summary")).to_contain_text("errors")
    check()


def test_the_keyboard_suffices(served: Process, open_page: Callable[..., Page]) -> None:
    page = open_page(served.url)
    page.on("filechooser", lambda _: None)  # Playwright begins to catch dialogs now, not when Enter is on its way
    expect(page.locator("#model")).not_to_be_empty()

    def tab_to(selector: str) -> None:
        for _ in range(10):
            page.keyboard.press("Tab")
            if page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        pytest.fail(f"Tab does not reach {selector}")

    tab_to("#choose")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([upload("rex.jpg", DRAWINGS[0])])
    wait_for_all(page, 1)
    expect(page.locator("#download")).to_be_enabled()
    tab_to("#download")
    with page.expect_download():
        page.keyboard.press("Enter")
    tab_to(".why button")
    page.keyboard.press("Space")
    expect(page.locator(".overlay")).to_be_visible()
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")  # Clear
    expect(page.locator(".card")).to_have_count(0)
    expect(page.locator("#choose")).to_be_focused()


@pytest.fixture(scope="module")
def narrow(browser: Browser, model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A service that wants a token, and takes one picture at a time."""
    flags = ("--model", model, "--max-queue", "1", "--num-workers", "1")
    with process(tmp_path_factory.mktemp("narrow"), *flags, environment={"CATDOG_TOKEN": TOKEN}) as started:
        yield started


def give_token(page: Page, token: str) -> None:
    page.get_by_label("Token", exact=True).fill(token)
    page.get_by_role("button", name="Use this token").click()


def test_it_asks_for_the_token_and_waits_while_the_service_is_busy(
    narrow: Process, open_page: Callable[..., Page]
) -> None:
    page = open_page(narrow.url)
    expect(page.get_by_role("dialog")).to_be_visible()
    assert Axe().run(page).response["violations"] == []
    give_token(page, "wrong")
    expect(page.locator("#token-error")).to_have_text("The service does not accept this token.")
    give_token(page, TOKEN)
    expect(page.locator("#model")).to_contain_text("Model")
    large = io.BytesIO()
    Image.open(io.BytesIO(DRAWINGS[0])).resize((3000, 3000)).save(large, "JPEG")
    choose(page, *(upload(f"{number}.jpg", large.getvalue()) for number in range(6)))
    expect(page.locator("#notice")).to_contain_text("The service is busy; trying again in 1 second")
    wait_for_all(page, 6)
    expect(page.locator(".card[data-state=ok]")).to_have_count(6)
    expect(page.locator("#notice")).to_be_empty()
    page.reload()  # the tab knows the token still
    expect(page.locator("#model")).to_contain_text("Model")
    expect(page.get_by_role("dialog")).to_be_hidden()


def test_no_picture_is_lost_without_a_token_or_a_service(narrow: Process, open_page: Callable[..., Page]) -> None:
    page = open_page(narrow.url)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator("#model")).to_have_text("No model: The service needs a token.")
    choose(page, *(upload(f"{number}.jpg", DRAWINGS[number]) for number in range(6)))
    page.get_by_role("button", name="Cancel").click()
    wait_for_all(page, 6)
    expect(page.locator(".detail code")).to_have_text(["unauthorized"] * 6)
    page.get_by_role("button", name="Try 6 pictures again").click()
    give_token(page, TOKEN)
    wait_for_all(page, 6)
    expect(page.locator("#model")).to_contain_text("Model")

    page.click("#clear")
    page.context.set_offline(True)
    choose(page, *(upload(f"{number}.jpg", DRAWINGS[number]) for number in range(6)))
    wait_for_all(page, 6)
    expect(page.locator(".detail code")).to_have_text(["unreachable"] * 6)
    page.context.set_offline(False)
    page.get_by_role("button", name="Try 6 pictures again").click()
    expect(page.locator(".card[data-state=ok]")).to_have_count(6, timeout=30_000)
