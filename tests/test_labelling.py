"""`catdog.labelling`: what a verdict says, what does not change it, and how many images are held at a time."""

import dataclasses
import functools
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest
from inference_case import Says, encoded_drawings
from PIL import Image

from catdog import labelling
from catdog.bundle import Arithmetic, Bundle
from catdog.engines import Outputs
from catdog.errors import BundleError, ImageError, StorageError
from catdog.images import decode
from catdog.labelling import Contents, Labelled, Labeller, Verdict

SIZE_PX = 32
PICTURES = encoded_drawings(20)
NUM_BYTES = 1000


class Brightness:
    """An engine whose logit is the mean of an image's pixels, less 100, in tenths."""

    name = "brightness"
    arithmetic: Arithmetic = "float32"

    def predict(self, images_BHWC: npt.NDArray[np.uint8]) -> Outputs:
        logits_B: npt.NDArray[np.float32] = ((images_BHWC.mean(axis=(1, 2, 3)) - 100) / 10).astype(np.float32)
        return Outputs(logits_B, None)


def encoded(pixels_HWC: npt.NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels_HWC).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture
def bundle() -> Bundle:
    card = {"image_size": SIZE_PX, "temperature": 1.5, "review_threshold": 0.7, "golden_logits": [], "files": {}}
    return Bundle(url="nowhere", card=card, model_id="m", paths={})


@pytest.fixture
def labeller(bundle: Bundle) -> Iterator[Labeller]:
    with Labeller(bundle, Brightness(), num_decoders=2, num_scorers=2) as labeller:
        yield labeller


def test_a_verdict_is_the_images_own(labeller: Labeller) -> None:
    verdicts = labeller.label(PICTURES)
    for picture, verdict in zip(PICTURES, verdicts, strict=True):
        decoded = decode(picture, SIZE_PX)
        logit = (decoded.pixels_HWC.mean() - 100) / 10
        assert verdict.prob_dog == pytest.approx(1 / (1 + np.exp(-logit / 1.5)), rel=1e-5)
        assert (verdict.width, verdict.height, verdict.num_bytes) == (decoded.width, decoded.height, len(picture))
    order = np.random.default_rng(0).permutation(len(PICTURES))
    assert labeller.label([PICTURES[i] for i in order]) == [verdicts[i] for i in order]
    assert labeller.label(PICTURES[:3]) == verdicts[:3]
    assert labeller.label([]) == []


def test_threads_give_what_one_call_gives(labeller: Labeller) -> None:
    contents: list[bytes | ImageError] = [*PICTURES[:5], ImageError("not_found", "gone"), *PICTURES[5:]]
    futures = [labeller.submit(functools.partial(list, [each]), num_bytes=NUM_BYTES) for each in contents]
    assert [verdict for future in futures for verdict in future.result().verdicts] == labeller.label(contents)


def test_what_a_logit_means(bundle: Bundle) -> None:
    logits_B = np.array([-3.0, 0.3, 6.0, 0.0], np.float32)
    with Labeller(bundle, Says(*logits_B)) as labeller:
        verdicts = labeller.label(PICTURES[:4])
    prob_dog_B = 1 / (1 + np.exp(-logits_B / 1.5))  # the bundle's temperature
    assert [verdict.prob_dog for verdict in verdicts] == pytest.approx(prob_dog_B)
    assert [verdict.label for verdict in verdicts] == ["cat", "dog", "dog", "dog"]
    assert [verdict.confidence for verdict in verdicts] == pytest.approx(np.maximum(prob_dog_B, 1 - prob_dog_B))
    assert [verdict.needs_review for verdict in verdicts] == [False, True, False, True]


def test_why_a_person_should_look(bundle: Bundle) -> None:
    grain = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    cut = encoded(grain)[:-1000]  # a tenth of its rows may be missing
    with Labeller(bundle, Says(-3.0, 0.3, -3.0, 0.3)) as labeller:
        verdicts = labeller.label([*PICTURES[:2], cut, cut])
    assert [verdict.review_reason for verdict in verdicts] == [None, "unsure", "damaged", "damaged"]
    assert [verdict.needs_review for verdict in verdicts] == [False, True, True, True]
    assert all(verdict.remark for verdict in verdicts[2:])


def test_what_looks_like_neither_needs_review(bundle: Bundle) -> None:
    grain = np.random.default_rng(0).integers(0, 255, (200, 200, 3), np.uint8)
    pictures = [*PICTURES[:3], encoded(grain)[:-1000]]
    knowing = dataclasses.replace(bundle, card=bundle.card | {"neither": {"threshold": 2.5, "golden_scores": [0.0]}})
    engine = Says(-3.0, 0.3, -3.0, -3.0, scores=(2.6, 2.6, 2.5, 9.0))
    with Labeller(knowing, engine) as labeller:
        verdicts = labeller.label(pictures)
    assert [verdict.review_reason for verdict in verdicts] == ["neither", "neither", None, "damaged"]
    assert [verdict.label for verdict in verdicts] == ["cat", "dog", "cat", "cat"]
    with Labeller(bundle, engine) as labeller:
        assert [verdict.review_reason for verdict in labeller.label(pictures)] == [None, "unsure", None, "damaged"]


def test_a_bad_image_is_a_verdict_and_disturbs_no_other(labeller: Labeller) -> None:
    bad = ImageError("decode_failed", "two\nlines, and \udc80" + "x" * 1000)
    one, broken, cut, other = labeller.label([PICTURES[0], bad, PICTURES[1][:500], PICTURES[1]])
    assert [one, other] == labeller.label(PICTURES[:2])
    assert broken == Verdict(error_code="decode_failed", error_message=broken.error_message)
    assert str(broken.error_message).startswith("two lines, and \\udc80x")
    assert (cut.error_code, cut.num_bytes, cut.label, cut.width) == ("truncated", 500, None, None)
    assert cut.image_id is not None


def test_a_model_that_gives_no_number_is_an_error(bundle: Bundle) -> None:
    with (
        Labeller(bundle, Says(np.nan)) as labeller,
        pytest.raises(BundleError, match="the model must give finite numbers"),
    ):
        labeller.label(PICTURES[:1])


def test_portions_under_way_are_few_in_number_and_in_bytes(labeller: Labeller, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    taken: list[Future[Labelled]] = []

    def read() -> Contents:
        let_go.wait(30)
        return PICTURES[:1]

    def taken_of(num: int, num_bytes: int, expected: int) -> None:
        """Of `num` portions `expected` are taken, and no more before they are done; then the others."""
        let_go.clear()
        taken.clear()

        def submit() -> None:
            for _ in range(num):
                taken.append(labeller.submit(read, num_bytes=num_bytes))

        thread = threading.Thread(target=submit, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while len(taken) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.3)
        assert len(taken) == expected
        let_go.set()
        thread.join(30)
        assert len([future.result(30) for future in taken]) == num

    taken_of(50, num_bytes=1, expected=2 * 2 + 2)  # two for each of two decoders, one for each of two scorers
    taken_of(6, num_bytes=labelling.MAX_BYTES // 2, expected=2)
    labeller.submit(lambda: PICTURES[:1], num_bytes=2 * labelling.MAX_BYTES).result()  # alone it may be larger


def test_after_a_failure_nothing_is_taken_any_more(labeller: Labeller) -> None:
    def fail() -> Contents:
        raise StorageError("the disk is gone")

    failed = labeller.submit(fail, num_bytes=NUM_BYTES)
    with pytest.raises(StorageError, match="the disk is gone"):
        failed.result()
    with pytest.raises(StorageError, match="the disk is gone"):
        labeller.submit(lambda: PICTURES[:1], num_bytes=NUM_BYTES)


def test_labelling_needs_neither_duckdb_nor_ray_nor_tensorflow() -> None:
    code = """if True:
        import sys
        import catdog.labelling
        print(*({"duckdb", "ray", "tensorflow", "keras", "matplotlib", "pandas"} & sys.modules.keys()))
    """
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "\n"
