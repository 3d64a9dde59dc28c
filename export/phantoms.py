"""Phantom radiographs: chest-like images made by code, with planted findings whose boxes are known.

Owns the drawing and the folder it is written to, in the NIH layout. Deterministic from a seed and an
index. Made to test and demonstrate with, without any data set; says nothing about any patient.
"""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from thoraxrt.engine.errors import DatasetError
from thoraxrt.export import Track, no_progress
from thoraxrt.export.nih import NihBox

__all__ = ["PLANTED", "Phantom", "phantom", "write_phantoms"]

PLANTED = ("Atelectasis", "Cardiomegaly", "Effusion", "Mass", "Nodule", "Pneumothorax", "Consolidation")
"""The findings that are planted, in CheXNet order; the other labels never occur."""

SIDE = 1024
"""Height and width of a phantom in pixels, as NIH publishes its images."""

_GRID = SIDE // 2  # anatomy is smooth: drawn at half size, enlarged before the detector noise is added
_IMAGES_PER_PATIENT = (1, 3, 2, 2)  # repeated
_TEST_EVERY = 4  # each fourth patient is in the test list
_NORMAL_SHARE = 0.38
_FINDING_COUNTS = (0.58, 0.30, 0.12)  # one, two or three findings, where there are any

_NO_PIXELS = np.zeros((0, 0), np.uint8)

_Map = npt.NDArray[np.float64]  # (_GRID, _GRID) unless said otherwise
_Points = npt.NDArray[np.float64]  # (n, 2): x, y in the patient's frame


@dataclass(frozen=True, kw_only=True)
class Phantom:
    """One phantom: uint8 pixels `(1024, 1024)`, 0 black to 255 white, and what is to be found in it.

    `findings` is in CheXNet order and empty for a normal one; `boxes` are in pixels, origin top left.
    """

    name: str
    patient: int
    follow_up: int
    sex: str
    age: int
    pixels: npt.NDArray[np.uint8]
    findings: tuple[str, ...]
    boxes: tuple[NihBox, ...]


def phantom(seed: int, index: int, *, planted: bool = True) -> Phantom:
    """The phantom number `index` (from 0) of the series `seed`.

    Consecutive ones share patients, so anatomy, but not pose, exposure or findings. With `planted`
    false the same patient in the same pose without the findings.
    """
    patient, follow_up = _patient(index)
    body = _Body.draw(np.random.default_rng([seed, 1, patient]))
    pose = _Pose.draw(np.random.default_rng([seed, 2, index]))
    scene = _Scene(body, pose, np.random.default_rng([seed, 3, index]))
    names = _choose(np.random.default_rng([seed, 4, index])) if planted else ()
    _distract(scene, np.random.default_rng([seed, 6, index]))
    boxes = scene.plant(names, np.random.default_rng([seed, 5, index]))
    return Phantom(
        name=f"{patient:08d}_{follow_up:03d}.png",
        patient=patient,
        follow_up=follow_up,
        sex="F" if body.breast > 0 else "M",
        age=body.age + follow_up,
        pixels=_exposed(scene.brightness(), pose, np.random.default_rng([seed, 7, index])),
        findings=names,
        boxes=boxes,
    )


def write_phantoms(folder: str | os.PathLike[str], count: int, seed: int, track: Track = no_progress) -> None:
    """Write the first `count` phantoms of the series `seed` as a data set in the NIH layout.

    The lists split by patient, one patient in four in the test list, and every planted box is
    listed. The folder appears whole or not at all.

    Raises DatasetError where `folder` exists and is not an empty folder, or cannot be written.
    """
    root = Path(folder)
    if count < 1:
        raise ValueError(f"{count} phantoms: expected at least one")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DatasetError(f"{root} exists and is not an empty folder; expected a new one: give another path")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as beside:
            made = Path(beside) / root.name
            (made / "images").mkdir(parents=True)
            phantoms = []
            for index in track(range(count), "Drawing phantoms", count):
                drawn = phantom(seed, index)
                _write_image(made / "images", drawn)
                phantoms.append(replace(drawn, pixels=_NO_PIXELS))  # the lists need no pixels
            _write_lists(made, phantoms)
            made.rename(root)
    except OSError as error:
        raise DatasetError(
            f"{root} cannot be written ({error.strerror}); expected a folder that can: check it"
        ) from error


# --- who and what --------------------------------------------------------------------------------


def _patient(index: int) -> tuple[int, int]:
    """The patient's number, from 1, and the number of the follow-up, from 0."""
    cycle, rest = divmod(index, sum(_IMAGES_PER_PATIENT))
    for number, images in enumerate(_IMAGES_PER_PATIENT):
        if rest < images:
            return cycle * len(_IMAGES_PER_PATIENT) + number + 1, rest
        rest -= images
    raise AssertionError("the remainder of a division is below its divisor")


def _choose(rng: np.random.Generator) -> tuple[str, ...]:
    if rng.random() < _NORMAL_SHARE:
        return ()
    count = 1 + int(rng.choice(len(_FINDING_COUNTS), p=_FINDING_COUNTS))
    chosen = rng.choice(len(PLANTED), size=count, replace=False)
    return tuple(PLANTED[i] for i in sorted(chosen))


@dataclass(frozen=True, kw_only=True)
class _Body:
    """A patient, in a frame where the image's half width is about 1, x to the image's right, y down.

    Pairs are for the image's left (the patient's right) and the image's right.
    """

    age: int
    width: float  # of the thorax, 1 on average
    thickness: float
    apex: float
    domes: tuple[float, float]
    breast: float  # 0 for none
    heart: float  # size, 1 on average
    heart_tilt: float
    aorta: float
    rib_spacing: float
    rib_slope: float
    rib_density: float
    shoulder: float
    vessels: int  # seed of the vessel tree

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Body:
        female = rng.random() < 0.45
        dome = rng.uniform(0.30, 0.46)
        return cls(
            age=int(rng.integers(22, 88)),
            width=rng.uniform(0.90, 1.06) * (0.96 if female else 1.0),
            thickness=rng.uniform(0.85, 1.25),
            apex=rng.uniform(-0.72, -0.62),
            domes=(dome, dome + rng.uniform(0.0, 0.08)),
            breast=rng.uniform(0.06, 0.20) if female else 0.0,
            heart=rng.uniform(0.86, 1.08),
            heart_tilt=rng.uniform(0.45, 0.85),
            aorta=rng.uniform(0.7, 1.15),
            rib_spacing=rng.uniform(0.112, 0.128),
            rib_slope=rng.uniform(0.16, 0.30),
            rib_density=rng.uniform(0.6, 1.2),
            shoulder=rng.uniform(-0.74, -0.62),
            vessels=int(rng.integers(2**31)),
        )


@dataclass(frozen=True, kw_only=True)
class _Pose:
    """How one image was taken: where the patient stands, the exposure, and what lies on the skin."""

    scale: float
    angle: float  # radians
    shift: tuple[float, float]
    gain: float
    gamma: float
    tilt: tuple[float, float]  # exposure gradient
    noise: float  # gray levels
    breath: float  # of the diaphragm
    collimated: tuple[int, int, int, int]  # black pixels left, top, right, bottom
    marker: int  # 0: none, else which letter and place

    @classmethod
    def draw(cls, rng: np.random.Generator) -> _Pose:
        border = rng.integers(0, 44, size=4) * (rng.random(4) < 0.3)
        return cls(
            scale=rng.uniform(1.02, 1.20),
            angle=rng.normal(0.0, 0.030),
            shift=(rng.normal(0.0, 0.035), rng.normal(0.06, 0.035)),
            gain=rng.uniform(0.84, 1.02),
            gamma=rng.uniform(0.80, 1.30),
            tilt=(rng.normal(0.0, 0.05), rng.normal(0.0, 0.05)),
            noise=rng.uniform(1.5, 4.5),
            breath=rng.normal(0.0, 0.02),
            collimated=(int(border[0]), int(border[1]), int(border[2]), int(border[3])),
            marker=int(rng.integers(0, 4)),
        )


# --- the scene: how much air and bone each ray meets ------------------------------------------------


class _Scene:
    """One patient in one pose, as maps of what each ray meets: to plant findings in, then to expose."""

    def __init__(self, body: _Body, pose: _Pose, rng: np.random.Generator) -> None:
        self.body, self.pose, self.rng = body, pose, rng
        self.x, self.y = _frame(pose)
        self.heart_size = body.heart * rng.uniform(0.97, 1.03)
        self.lungs = self._lung(-1, body.apex) + self._lung(1, body.apex)
        self.air = self.lungs * (1.0 - self._solid())  # 0..1: the share of the ray that is lung
        self.opacity = np.zeros_like(self.air)  # 0..1: the share of that air that a finding took
        self.pleural = np.zeros_like(self.air)  # 0..1: air outside the lung, without vessels
        self.lines = np.zeros_like(self.air)  # thin or dense things in front of it all

    def plant(self, names: Sequence[str], rng: np.random.Generator) -> tuple[NihBox, ...]:
        """Plant the named findings, no two in one zone of the lungs; the boxes of their visible extent."""
        boxes = []
        if "Cardiomegaly" in names:
            self.heart_size = rng.uniform(1.30, 1.56)
            self.air = self.lungs * (1.0 - self._solid())
            boxes.append(_box("Cardiomegaly", self._heart() > 0.0))
        for name, side, lower in _sites(names, rng):
            changed = _PLANTERS[name](self, side, lower, rng)
            boxes.append(_box(name, changed > 0.22 * changed.max()))
        return tuple(boxes)

    def brightness(self) -> _Map:
        """The developed picture before exposure and noise, 0 (air) to 1 (thick tissue)."""
        air = self.air * (1.0 - self.opacity)
        air_and_vessels = air * (0.80 + 0.17 * self.pleural) - 0.30 * air * (1.0 - self.pleural) * self._vessels()
        torso = self._torso()
        soft = torso * (1.0 - air_and_vessels)
        bone = self.body.rib_density * (0.30 * self._ribs() + 0.42 * self._clavicles()) + 0.35 * self._spine()
        total = soft + bone * (torso > 0) - 0.40 * self._gas() + self.lines
        picture: _Map = 1.0 - np.exp(-0.95 * np.maximum(total, 0.0))
        return picture

    # Soft tissue

    def _torso(self) -> _Map:
        """Thickness of the body, with neck, shoulders, arms and breasts."""
        y, ax = self.y, np.abs(self.x) / self.body.width
        slope = _step((y - self.body.shoulder) / 0.34)
        half = 0.22 + 0.10 * _step((-0.80 - y) / 0.2) + 0.90 * slope - 0.14 * _step((y + 0.30) / 0.5)
        thick = np.sqrt(np.clip(1.0 - (ax / half) ** 2, 0.0, 1.0))
        base = self.body.thickness * (1.25 + 0.30 * _step((y + 0.5) / 0.9) + 0.9 * _step((y - 0.35) / 0.4))
        return base * thick + self._breasts()

    def _breasts(self) -> _Map:
        if not self.body.breast:
            return np.zeros_like(self.x)
        u, v = (np.abs(self.x) - 0.44) / 0.34, (self.y - 0.26) / 0.30
        return 2.2 * self.body.breast * np.sqrt(np.clip(1.0 - u * u - v * v, 0.0, 1.0))

    def _lung(self, side: int, apex: float, squeeze: _Map | float = 0.0) -> _Map:
        """The profile of one lung (side -1: the image's left), 0 outside, 1 where it is deepest."""
        u, dome = self._lung_coordinate(side, apex, squeeze)
        profile = np.sqrt(np.clip(1.0 - u * u * u, 0.0, 1.0))
        cut: _Map = profile * _step((dome - self.y) / 0.035)
        return cut

    def _lung_coordinate(self, side: int, apex: float, squeeze: _Map | float = 0.0) -> tuple[_Map, _Map]:
        """Distance from the lung's middle line (1 at its border), and the diaphragm's height there."""
        w = self.body.width
        v = np.clip((0.15 - self.y) / (0.15 - apex), 0.0, 1.0)
        half = (0.315 + 0.03 * _step(self.y / 0.4)) * w * np.sqrt(np.clip(1.0 - v * v * v, 0.0, 1.0))
        centre = (0.375 - 0.10 * v) * w - squeeze * half  # a collapsing lung keeps its inner border
        x = side * self.x
        u = np.abs(x - centre) / np.maximum(half * (1.0 - squeeze), 1e-3)
        arch = (x - 0.33 * w) / (0.36 * w)
        dome = self.body.domes[(side + 1) // 2] + self.pose.breath + 0.17 * arch * arch
        return np.where(x > 0, u, 9.0), dome

    def _solid(self) -> _Map:
        """The mediastinum with the heart, 0..1: what the lungs make room for."""
        band = _step((0.135 + 0.03 * _step((-self.y - 0.3) / 0.3) - np.abs(self.x)) / 0.03)
        knob = _disc(self.x - 0.115, self.y + 0.27, 0.085 * self.body.aorta)
        hila = 0.45 * (_disc(self.x + 0.17, self.y + 0.02, 0.085) + _disc(self.x - 0.16, self.y + 0.06, 0.075))
        return np.minimum(np.maximum(np.maximum(band, 0.9 * self._heart()), np.maximum(0.85 * knob, hila)), 1.0)

    def _heart(self) -> _Map:
        c, s = np.cos(self.body.heart_tilt), np.sin(self.body.heart_tilt)
        tall = np.sqrt(self.heart_size)  # it grows in width more than in height, and rests on the diaphragm
        x, y = self.x - 0.09 * self.heart_size, self.y - self.pose.breath - 0.47 + 0.23 * tall
        u, v = (c * x + s * y) / (0.33 * self.heart_size), (c * y - s * x) / (0.22 * tall)
        heart: _Map = np.sqrt(np.clip(4.0 * (1.0 - u * u - v * v), 0.0, 1.0))
        return heart

    def _gas(self) -> _Map:
        """The stomach's bubble under the image's right dome, in some."""
        if self.rng.random() < 0.5:
            return np.zeros_like(self.x)
        x0, y0 = self.rng.uniform(0.32, 0.46), self.body.domes[1] + self.pose.breath + self.rng.uniform(0.12, 0.2)
        return _disc((self.x - x0) / 1.7, self.y - y0, self.rng.uniform(0.04, 0.08))

    # Bone and vessels: drawn as lines

    def _ribs(self) -> _Map:
        back, front = [], []
        for number in range(10):
            top = self.body.apex - 0.03 + number * self.body.rib_spacing
            for side in (-1, 1):
                reach = self._chest_wall(top + 0.16)
                t = np.linspace(0.0, 1.0, 24)
                slope = self.body.rib_slope * (0.7 + 0.06 * number)
                back.append(
                    _curve(
                        side * (0.06 + (reach - 0.06) * np.sin(t * 1.5708)),
                        top - 0.05 * np.sin(3.1 * t) + slope * t * t,
                    )
                )
                if number < 7:
                    end = top + slope
                    front.append(_curve(side * (reach - (reach - 0.26) * t**1.5), end + 0.10 * t + 0.17 * t * t))
        return self._bones(back, 0.050) + 0.7 * self._bones(front, 0.056)

    def _chest_wall(self, y: float) -> float:
        v = min(max((0.15 - y) / (0.15 - self.body.apex), 0.0), 1.0)
        return float(self.body.width * (0.375 - 0.10 * v + 0.34 * np.sqrt(1.0 - v**3)))

    def _clavicles(self) -> _Map:
        t = np.linspace(0.0, 1.0, 24)
        y = -0.50 + (self.body.shoulder + 0.50) * t + 0.035 * np.sin(6.3 * t)
        bones = self._bones([_curve(side * (0.06 + 0.62 * t), y) for side in (-1, 1)], 0.055)
        blade = [_curve(side * (0.78 - 0.20 * np.sin(3.1 * t)), -0.55 + 0.75 * t) for side in (-1, 1)]
        heads = sum(
            _disc(self.x - side * 0.84 * self.body.width, self.y - self.body.shoulder - 0.12, 0.11) for side in (-1, 1)
        )
        return bones + 0.35 * self._drawn(blade, [0.02] * 2, 0.006) + 0.5 * heads

    def _spine(self) -> _Map:
        column = _step((0.085 - np.abs(self.x)) / 0.02)
        discs = np.cos(self.y * (6.2832 / 0.115)) > 0.78
        windpipe = _step((0.045 - np.abs(self.x + 0.005)) / 0.02) * _step((-0.16 - self.y) / 0.05)
        return column * (1.0 - 0.30 * discs) - 1.5 * windpipe

    def _bones(self, curves: list[_Points], width: float) -> _Map:
        """Tubes: a dense rim around a lighter middle."""
        rim = self._drawn(curves, [width] * len(curves), 0.004)
        return rim - 0.45 * self._drawn(curves, [0.62 * width] * len(curves), 0.006)

    def _vessels(self) -> _Map:
        rng = np.random.default_rng(self.body.vessels)
        curves: list[_Points] = []
        widths: list[float] = []
        for side in (-1, 1):
            for angle in np.linspace(-1.35, 1.35, 11):
                start = (side * 0.15, 0.0)
                _branch(rng, start, angle + rng.normal(0, 0.12), side, 0.019, curves, widths)
        return self._drawn(curves, widths, 0.0035)

    def _drawn(self, curves: Sequence[_Points], widths: Sequence[float], blur: float) -> _Map:
        """Lines of the given widths (in the patient's frame), 0..1, edges softened by `blur`."""
        canvas = np.zeros((_GRID, _GRID), np.uint8)
        for curve, width in zip(curves, widths, strict=True):
            points = np.rint(_pixels(curve, self.pose) * 16.0).astype(np.int32)
            thickness = max(1, round(width * self.pose.scale * _GRID / 2))
            level = min(255, int(60 + 255 * width * self.pose.scale * _GRID / 12))
            cv2.polylines(canvas, [points], False, level, thickness, cv2.LINE_AA, 4)
        drawn: _Map = cv2.GaussianBlur(canvas, (0, 0), blur * _GRID / 2).astype(np.float64)
        return drawn / 255.0


def _branch(
    rng: np.random.Generator,
    start: tuple[float, float],
    angle: float,
    side: int,
    width: float,
    curves: list[_Points],
    widths: list[float],
) -> None:
    """One vessel and its branches, from the hilum outwards, each thinner than the one before."""
    length = rng.uniform(0.10, 0.20)
    t = np.linspace(0.0, 1.0, 6)
    bend = rng.normal(0.0, 0.25)
    x = start[0] + side * length * t * np.cos(angle + bend * t)
    y = start[1] + length * t * np.sin(angle + bend * t)
    curves.append(_curve(x, y))
    widths.append(width)
    if width > 0.005:
        for turn in (-1, 1):
            following = angle + turn * rng.uniform(0.15, 0.5)
            _branch(rng, (float(x[-1]), float(y[-1])), following, side, width * rng.uniform(0.5, 0.72), curves, widths)


# --- findings ----------------------------------------------------------------------------------------
#
# Each planter changes the scene and returns the map of what it changed, 0 where nothing.


def _sites(names: Sequence[str], rng: np.random.Generator) -> list[tuple[str, int, bool]]:
    """A zone for each finding but the heart's: name, side (-1 or 1) and whether it is the lower one."""
    upper = [-1, 1] if rng.random() < 0.5 else [1, -1]
    lower = [-1, 1] if rng.random() < 0.5 else [1, -1]
    sites = []
    for name in sorted((n for n in names if n != "Cardiomegaly"), key=_PLANTERS_ORDER.index):
        repeat = 2 if len(names) == 1 and name in ("Nodule", "Effusion") and rng.random() < 0.3 else 1
        for _ in range(repeat):
            down = name in ("Effusion", "Atelectasis") or (name != "Pneumothorax" and rng.random() < 0.5)
            down = down if (lower if down else upper) else not down
            sites.append((name, (lower if down else upper).pop(), down))
    return sites


def _site(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> tuple[float, float]:
    """A point of one zone of the lungs, well within what can be seen of them."""
    visible = scene.air * (1.0 - scene.opacity) * (1.0 - scene.pleural)
    best, point = -1.0, (0.0, 0.0)
    for _ in range(12):
        y = rng.uniform(0.02, 0.30) if lower else rng.uniform(-0.42, -0.06)
        x = side * rng.uniform(0.20, 0.56) * scene.body.width
        column, row = np.rint(_pixels(_curve(np.array([x]), np.array([y])), scene.pose)[0]).astype(int)
        depth = float(visible[row, column])
        if depth > best:
            best, point = depth, (x, y)
        if best > 0.75:
            break
    return point


def _add(scene: _Scene, opacity: _Map) -> _Map:
    """Take `opacity` (0..1) of the air that is still there; what that changed."""
    changed: _Map = scene.air * (1.0 - scene.opacity) * opacity
    scene.opacity = 1.0 - (1.0 - scene.opacity) * (1.0 - opacity)
    return changed


def _nodule(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    x, y = _site(scene, side, lower, rng)
    radius = rng.uniform(0.045, 0.085)
    return _add(scene, rng.uniform(0.32, 0.60) * _ball(scene.x - x, (scene.y - y) * rng.uniform(0.85, 1.2), radius))


def _mass(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    """Three overlapping balls: a lobulated outline."""
    x, y = _site(scene, side, lower, rng)
    radius = rng.uniform(0.11, 0.19)
    balls = np.zeros_like(scene.x)
    for angle in rng.uniform(0, 2.1) + np.array([0.0, 2.1, 4.2]):
        dx, dy = 0.42 * radius * np.cos(angle), 0.42 * radius * np.sin(angle)
        balls = np.maximum(balls, _ball(scene.x - x - dx, scene.y - y - dy, radius * rng.uniform(0.7, 0.95)))
    return _add(scene, rng.uniform(0.55, 0.85) * balls)


def _consolidation(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    """A patchy opacity without a border, crossed by air-filled bronchi."""
    x, y = _site(scene, side, lower, rng)
    u, v = (scene.x - x) / rng.uniform(0.13, 0.22), (scene.y - y) / rng.uniform(0.13, 0.24)
    patches = 0.5 + 0.9 * _clouds(rng, 20) + 0.7 * _clouds(rng, 48)
    fluffy = np.clip(patches, 0.0, 1.0) * np.clip(1.6 * np.exp(-(u * u + v * v)) - 0.2, 0.0, 1.0)
    bronchi = [
        _curve(x + 0.15 * side * np.array([-1.0, 1.0]), y + 0.1 * np.array([-1.0, 1.0]) * k) for k in (-0.4, 0.8)
    ]
    fluffy *= 1.0 - 0.6 * scene._drawn(bronchi, [0.010] * 2, 0.004)
    return _add(scene, rng.uniform(0.55, 0.85) * fluffy)


def _atelectasis(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    """Plate-like: a few parallel streaks over the diaphragm."""
    x, y = _site(scene, side, lower, rng)
    angle = side * rng.uniform(-0.5, 0.2)
    p = (scene.x - x) * np.cos(angle) + (scene.y - y) * np.sin(angle)
    q = (scene.y - y) * np.cos(angle) - (scene.x - x) * np.sin(angle)
    plates = np.zeros_like(p)
    for k in range(int(rng.integers(1, 4))):
        centre, offset = rng.normal(0.0, 0.03), (k - 1) * rng.uniform(0.045, 0.065)
        thin = (q - offset + 0.4 * p * p) / rng.uniform(0.012, 0.022)
        plates = np.maximum(plates, np.exp(-thin * thin) * _step((rng.uniform(0.12, 0.20) - np.abs(p - centre)) / 0.05))
    return _add(scene, rng.uniform(0.32, 0.6) * plates)


def _effusion(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    """Fluid on the diaphragm: opaque, its upper border a meniscus that climbs the chest wall."""
    dome = scene.body.domes[(side + 1) // 2] + scene.pose.breath
    level = dome + 0.10 - rng.uniform(0.12, 0.36)
    outward = np.clip((side * scene.x / scene.body.width - 0.15) / 0.5, 0.0, 1.2)
    border = level + rng.uniform(0.08, 0.16) * (1.0 - outward * outward)
    return _add(scene, 0.92 * _step((scene.y - border) / 0.06) * (side * scene.x > 0))


def _pneumothorax(scene: _Scene, side: int, lower: bool, rng: np.random.Generator) -> _Map:
    """Air between chest wall and lung, from the apex down: dark, without vessels, edged by a thin line."""
    depth, reach = rng.uniform(0.14, 0.32), rng.uniform(-0.05, 0.30)
    squeeze = depth * _step((reach - scene.y) / 0.6)
    apex = scene.body.apex + rng.uniform(0.25, 0.6) * depth
    u, _ = scene._lung_coordinate(side, apex, squeeze)
    whole, _ = scene._lung_coordinate(side, scene.body.apex)
    inside = (whole < 1.0) * (scene.air > 0.02) * (side * scene.x > 0.2) * (scene.y < reach)
    space = inside * _step((u - 1.0) / 0.04)
    pleura = inside * np.exp(-(((u - 1.0) / 0.022) ** 2))
    scene.pleural = np.maximum(scene.pleural, space)
    scene.lines = scene.lines + 0.12 * pleura
    return space


_Planter = Callable[[_Scene, int, bool, np.random.Generator], _Map]
_PLANTERS: dict[str, _Planter] = {
    "Effusion": _effusion,  # in this order: what needs a zone of its own kind chooses first
    "Pneumothorax": _pneumothorax,
    "Atelectasis": _atelectasis,
    "Mass": _mass,
    "Consolidation": _consolidation,
    "Nodule": _nodule,
}
_PLANTERS_ORDER = tuple(_PLANTERS)


def _box(finding: str, visible: npt.NDArray[np.bool_]) -> NihBox:
    """The box around `visible` (on the half-size grid), in pixels of the image."""
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    x, y = 2.0 * columns[0], 2.0 * rows[0]
    width, height = 2.0 * (columns[-1] + 1) - x, 2.0 * (rows[-1] + 1) - y
    return NihBox(finding=finding, x=float(x), y=float(y), width=float(width), height=float(height))


# --- what only looks like a finding ------------------------------------------------------------------


def _distract(scene: _Scene, rng: np.random.Generator) -> None:
    """Leads, electrodes, calcified granulomas and skin folds: never labelled."""
    if rng.random() < 0.30:
        _leads(scene, rng)
    for _ in range(int(rng.integers(0, 4)) if rng.random() < 0.4 else 0):
        x, y, size = rng.uniform(-0.6, 0.6), rng.uniform(-0.45, 0.3), rng.uniform(0.006, 0.012)
        scene.lines = scene.lines + rng.uniform(0.5, 0.9) * _disc(scene.x - x, scene.y - y, size)
    if rng.random() < 0.25:
        side, t = rng.choice((-1, 1)), np.linspace(0.0, 1.0, 16)
        x = side * (rng.uniform(0.40, 0.58) + 0.10 * t * t)
        fold = [_curve(x, -0.45 + rng.uniform(0.5, 0.9) * t)]
        scene.lines = scene.lines + 0.2 * scene._drawn(fold, [0.008], 0.003)


def _leads(scene: _Scene, rng: np.random.Generator) -> None:
    t, wires = np.linspace(0.0, 1.0, 24), []
    for _ in range(int(rng.integers(1, 4))):
        x0, y0 = rng.uniform(-0.6, 0.6), rng.uniform(-0.5, 0.3)
        x1, y1 = rng.uniform(-0.9, 0.9), rng.uniform(0.6, 1.0)
        sag = rng.normal(0.0, 0.15) * np.sin(np.pi * t)
        wires.append(_curve(x0 + (x1 - x0) * t + sag, y0 + (y1 - y0) * t))
        electrode = _disc(scene.x - x0, scene.y - y0, 0.030) - 0.7 * _disc(scene.x - x0, scene.y - y0, 0.018)
        scene.lines = scene.lines + 0.6 * electrode
    scene.lines = scene.lines + 0.6 * scene._drawn(wires, [0.008] * len(wires), 0.002)


# --- exposure ------------------------------------------------------------------------------------------


def _exposed(brightness: _Map, pose: _Pose, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Tone, exposure gradient, texture and noise, collimation and side marker: uint8 `(SIDE, SIDE)`."""
    across = np.linspace(-1.0, 1.0, _GRID)
    gradient = 1.0 + pose.tilt[0] * across + pose.tilt[1] * across[:, None] - 0.06 * (across**2 + across[:, None] ** 2)
    texture = 1.0 + 0.012 * _clouds(rng, 30) + 0.020 * _clouds(rng, 128)
    toned = 248.0 * pose.gain * gradient * texture * brightness**pose.gamma + 6.0
    large = cv2.resize(toned.astype(np.float32), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    grains = rng.integers(0, 256, size=(2, SIDE, SIDE), dtype=np.uint8).astype(np.float32)
    noise = cv2.GaussianBlur(grains[0] - grains[1], (0, 0), 0.7) * np.float32(pose.noise / 52.0)
    pixels = np.clip(np.rint(large + noise), 0, 255).astype(np.uint8)
    return _marked(pixels, pose)


def _marked(pixels: npt.NDArray[np.uint8], pose: _Pose) -> npt.NDArray[np.uint8]:
    if pose.marker:
        letter, x = ("L", 930) if pose.marker == 1 else ("R", 50)
        cv2.putText(pixels, letter, (x, 120), cv2.FONT_HERSHEY_DUPLEX, 1.8, 235, 5, cv2.LINE_AA)
    left, top, right, bottom = pose.collimated
    pixels[:top], pixels[SIDE - bottom :] = 0, 0
    pixels[:, :left], pixels[:, SIDE - right :] = 0, 0
    return pixels


# --- geometry and small shapes ---------------------------------------------------------------------------


def _frame(pose: _Pose) -> tuple[_Map, _Map]:
    """The patient's x and y at the centre of each pixel of the half-size grid."""
    across = (np.arange(_GRID) + 0.5) * (2.0 / _GRID) - 1.0
    x, y = across[None, :] - pose.shift[0], across[:, None] - pose.shift[1]
    c, s = np.cos(pose.angle) / pose.scale, np.sin(pose.angle) / pose.scale
    return c * x + s * y, c * y - s * x


def _pixels(points: _Points, pose: _Pose) -> _Points:
    """The inverse of `_frame`: points of the patient's frame in grid pixels, 0 the centre of the first."""
    c, s = np.cos(pose.angle) * pose.scale, np.sin(pose.angle) * pose.scale
    x = c * points[:, 0] - s * points[:, 1] + pose.shift[0]
    y = s * points[:, 0] + c * points[:, 1] + pose.shift[1]
    return (np.stack((x, y), axis=1) + 1.0) * (_GRID / 2) - 0.5


def _curve(x: _Points, y: _Points) -> _Points:
    points: _Points = np.column_stack((x, y))
    return points


def _step(x: _Map) -> _Map:
    """0 below 0, 1 above 1, smooth between."""
    t = np.clip(x, 0.0, 1.0)
    smooth = 3.0 - 2.0 * t
    smooth *= t
    smooth *= t
    return smooth


def _disc(x: _Map, y: _Map, radius: float) -> _Map:
    """1 inside, falling to 0 at the rim."""
    return _step((1.0 - (x * x + y * y) / (radius * radius)) * 2.0)


def _ball(x: _Map, y: _Map, radius: float) -> _Map:
    """The thickness of a ball, 1 in the middle."""
    return np.sqrt(np.clip(1.0 - (x * x + y * y) / (radius * radius), 0.0, 1.0))


def _clouds(rng: np.random.Generator, cells: int) -> _Map:
    """Smooth noise with about `cells` cells across, mean 0, about -1 to 1."""
    coarse = rng.normal(0.0, 0.6, size=(cells, cells))
    smooth: _Map = cv2.resize(coarse, (_GRID, _GRID), interpolation=cv2.INTER_CUBIC).astype(np.float64)
    return smooth


# --- the folder ------------------------------------------------------------------------------------------


def _write_image(folder: Path, made: Phantom) -> None:
    encoded, png = cv2.imencode(".png", made.pixels, (cv2.IMWRITE_PNG_COMPRESSION, 1))
    assert encoded
    (folder / made.name).write_bytes(png.tobytes())


def _write_lists(root: Path, phantoms: Sequence[Phantom]) -> None:
    for name, test in (("train_val_list.txt", False), ("test_list.txt", True)):
        listed = [made.name for made in phantoms if (made.patient % _TEST_EVERY == 0) is test]
        (root / name).write_text("\n".join(listed), encoding="utf-8")  # no final newline, as in NIH's
    boxes = [(m.name, b.finding, b.x, b.y, b.width, b.height) for m in phantoms for b in m.boxes]
    _write_csv(root / "BBox_List_2017.csv", ("Image Index", "Finding Label", "Bbox [x,y,w,h]", "", "", ""), boxes)
    _write_csv(root / "Data_Entry_2017.csv", _ENTRY_HEADER, [_entry(made) for made in phantoms])


_ENTRY_HEADER = (
    "Image Index",
    "Finding Labels",
    "Follow-up #",
    "Patient ID",
    "Patient Age",
    "Patient Gender",
    "View Position",
    "OriginalImage[Width,Height]",
    "",
    "OriginalImagePixelSpacing[x,y]",
    "",
)


def _entry(made: Phantom) -> tuple[object, ...]:
    labels = "|".join(made.findings) or "No Finding"
    return made.name, labels, made.follow_up, made.patient, made.age, made.sex, "PA", SIDE, SIDE, 0.34, 0.34


def _write_csv(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
