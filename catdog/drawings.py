"""Drawn pictures of cats and dogs: data for the demo and the tests that everyone may use.

Both animals share their colours, coats, poses, sizes, places and backgrounds. What tells them apart is what tells the
real animals apart: ears, muzzle, eyes, whiskers, tail.
"""

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

Point = tuple[float, float]
Colour = tuple[int, int, int]

_CANVAS: Final = 400
"""Pixels per side of the layer that an animal is drawn on. The finished picture is much smaller."""

_COATS: Final[Sequence[Colour]] = (
    (92, 64, 44),
    (201, 150, 92),
    (226, 205, 170),
    (120, 120, 124),
    (58, 54, 56),
    (240, 236, 228),
    (176, 98, 46),
    (150, 130, 110),
)
_DARK: Final = (28, 22, 22)
_WHITE: Final = (250, 248, 244)


def draw(label: str, seed: Sequence[int]) -> Image.Image:
    """Draw one RGB picture of a `cat` or a `dog`. The same label and seed give the same picture."""
    rng = np.random.default_rng([*seed])
    width, height = (int(side) for side in rng.integers(150, 260, size=2))
    picture = _background(width, height, rng)
    animal = _Animal(label, rng).layer
    if rng.random() < 0.5:
        animal = animal.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    side = int(min(width, height) * rng.uniform(0.8, 1.15))
    animal = animal.resize((side, side), Image.Resampling.LANCZOS)
    animal = animal.rotate(rng.uniform(-18, 18), Image.Resampling.BICUBIC, expand=True)
    left = (width - animal.width) / 2 + rng.uniform(-0.12, 0.12) * width
    top = (height - animal.height) / 2 + rng.uniform(-0.12, 0.12) * height
    picture.paste(animal, (int(left), int(top)), animal)
    return _photographed(picture, rng)


def _background(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A gradient between two colours in a random direction, with a few blurred shapes on it."""
    ends = rng.integers(20, 236, size=(2, 3))
    angle = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    slope = (x * math.cos(angle) + y * math.sin(angle))[..., None]
    slope = (slope - slope.min()) / (slope.max() - slope.min())
    picture = Image.fromarray((ends[0] * (1 - slope) + ends[1] * slope).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 8)):
        left, top = rng.uniform(-0.2, 1, size=2) * (width, height)
        across, down = rng.uniform(0.1, 0.5, size=2) * (width, height)
        box = (left, top, left + across, top + down)
        colour = tuple(int(c) for c in rng.integers(20, 236, size=3))
        shape = pen.ellipse if rng.random() < 0.5 else pen.rectangle
        shape(box, fill=colour)
    return picture.filter(ImageFilter.GaussianBlur(rng.uniform(0.5, 4)))


def _photographed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The picture with the marks of a camera: exposure, colour cast, a little blur and sensor noise."""
    picture = picture.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    exposed_HWC = np.asarray(picture) * rng.uniform(0.7, 1.15) * rng.uniform(0.9, 1.1, size=3) + rng.uniform(-15, 15)
    noise_HWC = rng.normal(0, rng.uniform(2, 12), size=exposed_HWC.shape)
    return Image.fromarray((exposed_HWC + noise_HWC).clip(0, 255).astype(np.uint8))


class _Animal:
    """One animal on a transparent layer, drawn from back to front."""

    def __init__(self, label: str, rng: np.random.Generator) -> None:
        self.rng = rng
        self.layer = Image.new("RGBA", (_CANVAS, _CANVAS))
        self.pen = ImageDraw.Draw(self.layer)
        coat, second = (_COATS[index] for index in rng.choice(len(_COATS), size=2, replace=False))
        self.coat = coat
        self.patch = second if rng.random() < 0.5 else _shade(coat, 1.15)
        self.dark = _shade(coat, 0.72)
        self.is_cat = label == "cat"
        pose = rng.choice(["portrait", "sitting", "standing"])
        if pose == "sitting":
            self._sitting_body()
            self._head((200, 130), size=rng.uniform(82, 100))
        elif pose == "standing":
            self._standing_body()
            self._head((115, 150), size=rng.uniform(72, 88))
        else:
            self._ellipse((200, 342), 118, 58, self.coat)
            self._head((200, 195), size=rng.uniform(110, 130))

    def _jitter(self, amount: float = 0.1) -> float:
        return float(self.rng.uniform(1 - amount, 1 + amount))

    def _ellipse(self, centre: Point, across: float, down: float, fill: Colour, outline: Colour | None = None) -> None:
        x, y = centre
        self.pen.ellipse((x - across, y - down, x + across, y + down), fill=fill, outline=outline, width=3)

    def _tail(self, root: Point) -> None:
        """Draw the tail: a cat's is long and thin, and curls; a dog's is short and thick."""
        x, y = root
        if self.is_cat:
            lift = self.rng.uniform(90, 150)
            points = [(x + 62 * math.sin(t * 3.6) * t**0.5 + 20 * t, y - lift * t) for t in np.linspace(0, 1, 24)]
            width = 17.0
        else:
            reach, lift = self.rng.uniform(45, 65), self.rng.uniform(30, 60)
            points = [(x + reach * t, y - lift * t**1.6) for t in np.linspace(0, 1, 12)]
            width = 25.0
        for step, point in enumerate(points):
            radius = width / 2 * (1 if self.is_cat else 1.15 - 0.6 * step / len(points))
            self._ellipse(point, radius, radius, self.dark)

    def _sitting_body(self) -> None:
        self._tail((275, 345))
        self._ellipse((200, 290), 82 * self._jitter(), 112, self.coat)
        self._ellipse((200, 285), 42, 78, self.patch)
        for x in (135, 265):
            self._ellipse((x, 350), 40, 36, self.coat, self.dark)
        for x in (172, 228):
            self._ellipse((x, 372), 24, 18, self.patch, self.dark)

    def _standing_body(self) -> None:
        self._tail((330, 225))
        for x in (165, 195, 290, 320):
            self.pen.rounded_rectangle((x - 15, 250, x + 15, 385), radius=14, fill=self.dark if x % 2 else self.coat)
        self._ellipse((240, 245), 112, 58 * self._jitter(), self.coat)
        for _ in range(self.rng.integers(0, 5)):
            spot = (float(self.rng.uniform(190, 310)), float(self.rng.uniform(220, 265)))
            self._ellipse(spot, 16 * self._jitter(0.4), 13 * self._jitter(0.4), self.patch)

    def _head(self, centre: Point, size: float) -> None:
        if self.is_cat:
            self._cat_head(centre, size)
        else:
            self._dog_head(centre, size)

    def _cat_head(self, centre: Point, r: float) -> None:
        x, y = centre
        height = self._jitter() * 0.62 * r
        for side in (-1, 1):
            outer = [(x + side * 0.88 * r, y - 0.15 * r), (x + side * 0.25 * r, y - 0.72 * r)]
            tip = (x + side * 0.86 * r, y - 0.72 * r - height)
            self.pen.polygon([*outer, tip], fill=self.coat)
            inner = [(x + side * 0.76 * r, y - 0.4 * r), (x + side * 0.44 * r, y - 0.72 * r)]
            self.pen.polygon([*inner, (x + side * 0.79 * r, y - 0.72 * r - 0.65 * height)], fill=(222, 150, 150))
        self._ellipse(centre, r, 0.85 * r, self.coat)
        if self.rng.random() < 0.5:  # a tabby's stripes
            for shift in (-0.22, 0, 0.22):
                self.pen.line((x + shift * r, y - 0.8 * r, x + shift * 0.7 * r, y - 0.45 * r), self.dark, int(0.08 * r))
        iris = [(150, 190, 70), (220, 180, 60), (110, 170, 210)][self.rng.integers(3)]
        for side in (-1, 1):
            eye = (x + side * 0.42 * r, y - 0.08 * r)
            self._ellipse(eye, 0.23 * r, 0.19 * r, iris, _DARK)
            self._ellipse(eye, 0.06 * r, 0.17 * r, _DARK)
            self._ellipse((x + side * 0.17 * r, y + 0.45 * r), 0.24 * r, 0.19 * r, self.patch)
        self.pen.polygon(
            [(x - 0.12 * r, y + 0.24 * r), (x + 0.12 * r, y + 0.24 * r), (x, y + 0.38 * r)], fill=(214, 120, 128)
        )
        self._mouth((x, y + 0.38 * r), 0.2 * r)
        whisker = _WHITE if sum(self.coat) < 420 else _DARK
        for side in (-1, 1):
            for droop in (-0.14, 0.02, 0.18):
                start = (x + side * 0.3 * r, y + (0.42 + droop / 3) * r)
                end = (x + side * 1.3 * r * self._jitter(0.05), y + (0.42 + droop * 1.8) * r)
                self.pen.line((*start, *end), whisker, max(2, int(0.025 * r)))

    def _dog_head(self, centre: Point, r: float) -> None:
        x, y = centre
        self._ellipse(centre, 0.82 * r, 0.92 * r, self.coat)
        if self.rng.random() < 0.5:  # a patch over one eye
            self._ellipse((x + 0.36 * r, y - 0.2 * r), 0.3 * r, 0.34 * r, self.patch)
        length = self._jitter() * 0.62 * r
        for side in (-1, 1):
            tilt = math.radians(side * self.rng.uniform(6, 24))
            root = (x + side * 0.72 * r, y - 0.52 * r)
            around = [(0.26 * r * math.cos(turn), length + length * math.sin(turn)) for turn in np.linspace(0, 6.3, 48)]
            ear = [
                (
                    root[0] + dx * math.cos(tilt) + dy * math.sin(tilt),
                    root[1] - dx * math.sin(tilt) + dy * math.cos(tilt),
                )
                for dx, dy in around
            ]
            self.pen.polygon(ear, fill=self.dark)
        for side in (-1, 1):
            eye = (x + side * 0.32 * r, y - 0.2 * r)
            self._ellipse(eye, 0.13 * r, 0.14 * r, (74, 48, 30), _DARK)
            self._ellipse((eye[0] + 0.04 * r, eye[1] - 0.05 * r), 0.04 * r, 0.04 * r, _WHITE)
        if self.rng.random() < 0.5:  # panting
            self.pen.rounded_rectangle(
                (x - 0.14 * r, y + 0.6 * r, x + 0.14 * r, y + 1.05 * r), radius=0.13 * r, fill=(226, 110, 120)
            )
        self._ellipse((x, y + 0.42 * r), 0.46 * r, 0.38 * r, self.patch, self.dark)
        self._ellipse((x, y + 0.22 * r), 0.2 * r, 0.15 * r, _DARK)
        self._mouth((x, y + 0.36 * r), 0.24 * r)

    def _mouth(self, top: Point, size: float) -> None:
        x, y = top
        self.pen.line((x, y, x, y + 0.6 * size), _DARK, 3)
        for left in (x - size, x):
            self.pen.arc((left, y, left + size, y + size), 10, 170, _DARK, 3)


def _shade(colour: Colour, factor: float) -> Colour:
    red, green, blue = (min(255, int(part * factor)) for part in colour)
    return red, green, blue
