"""Table-top scenes in the manner of CLEVR (Johnson et al. 2017, arXiv:1612.06890): layout, camera, picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastgen.data.synthetic.rays import Array, Solid
from fastgen.data.synthetic.shading import radiance

# sRGB, from the CLEVR generator's properties.json
COLOURS = {
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
SLOTS = 3
SUPERSAMPLING = 4  # rays per pixel and axis; each of the 16 sees another point of the light, which makes shadows soft
HALF_VIEW = 0.225  # half the width of the image plane at distance 1
RAYS_AT_ONCE = 1 << 16  # keeps the working arrays in the cache


@dataclass(frozen=True)
class Scene:
    """Everything but the labels: the camera, the light, and three slots that objects can take."""

    eye: Array  # (3,)
    target: Array  # (3,)
    light: Array  # (3,) centre of a disc of radius 1
    exposure: float
    position: Array  # (SLOTS, 2) on the floor
    radius: Array  # (SLOTS,)
    angle: Array  # (SLOTS,)
    metal: NDArray[np.bool_]  # (SLOTS,)


def draw_scene(rng: np.random.Generator) -> Scene:
    """A random scene whose slots lie in view and do not hide each other."""
    azimuth, height = rng.uniform(-0.12, 0.12), rng.uniform(7.6, 8.8)
    eye = np.array([13.0 * np.sin(azimuth), -13.0 * np.cos(azimuth), height], np.float32)
    target = np.array([rng.uniform(-0.12, 0.12), rng.uniform(-0.12, 0.12), 0.2], np.float32)
    side = rng.choice((-1, 1))
    light = np.array([side * rng.uniform(2.5, 6.0), rng.uniform(-5.0, -0.5), rng.uniform(6.5, 8.5)], np.float32)
    radius = rng.uniform(0.68, 0.84, SLOTS).astype(np.float32)
    return Scene(
        eye=eye,
        target=target,
        light=light,
        exposure=float(rng.uniform(0.94, 1.1)),
        position=_place(rng, eye, target, radius),
        radius=radius,
        angle=rng.uniform(0, np.pi / 2, SLOTS).astype(np.float32),
        metal=rng.random(SLOTS) < 0.4,
    )


def _place(rng: np.random.Generator, eye: Array, target: Array, radius: Array, tries: int = 256) -> Array:
    """The first of `tries` random layouts (SLOTS, 2) that is in view and well apart, else the best of them."""
    ground = rng.uniform((-2.8, -3.2), (2.8, 3.0), (tries, SLOTS, 2)).astype(np.float32)
    centre = np.concatenate([ground, np.broadcast_to(radius[None, :, None], (tries, SLOTS, 1))], -1)
    right, up, forward = camera_axes(eye, target)
    depth = ((centre - eye) * forward).sum(-1) * HALF_VIEW  # (tries, SLOTS); the picture spans -1 to 1
    u, v = ((centre - eye) * right).sum(-1) / depth, ((centre - eye) * up).sum(-1) / depth
    size = radius / depth
    slack = (1 - 1.4 * size - np.maximum(np.abs(u), np.abs(v))).min(-1)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        seen = np.hypot(u[:, i] - u[:, j], v[:, i] - v[:, j]) - 1.4 * (size[:, i] + size[:, j])
        floor = np.hypot(*(ground[:, i] - ground[:, j]).T) - 1.3 * (radius[i] + radius[j])
        slack = np.minimum(slack, np.minimum(seen, floor))
    good = np.flatnonzero(slack > 0)
    return ground[good[0] if len(good) else np.argmax(slack)]


def camera_axes(eye: Array, target: Array) -> tuple[Array, Array, Array]:
    """Unit vectors right, up and forward of a camera at `eye` that looks at `target`."""
    forward = (target - eye) / np.linalg.norm(target - eye)
    right = np.cross(forward, np.array([0, 0, 1], np.float32))
    right = right / np.linalg.norm(right)
    return right.astype(np.float32), np.cross(right, forward).astype(np.float32), forward.astype(np.float32)


def place_objects(scene: Scene, labels: Sequence[str]) -> list[Solid]:
    """Label i ("red cube") takes slot i of the scene."""
    solids = []
    for i, label in enumerate(labels):
        colour, shape = label.split()
        radius = float(scene.radius[i]) * {"cube": 0.86, "sphere": 1.0, "cylinder": 0.9}[shape]
        centre = np.array([*scene.position[i], radius], np.float32)
        albedo = to_linear(np.array(COLOURS[colour], np.float32) / 255)
        solids.append(Solid(shape, albedo, centre, radius, float(scene.angle[i]), bool(scene.metal[i])))
    return solids


def render(scene: Scene, labels: Sequence[str], size: int) -> Image.Image:
    """The scene with one object per label (at most SLOTS), size x size pixels, RGB."""
    k = SUPERSAMPLING
    solids = place_objects(scene, labels)
    right, up, forward = camera_axes(scene.eye, scene.target)
    axis = (((np.arange(size * k) + 0.5) / (size * k) * 2 - 1) * HALF_VIEW).astype(np.float32)
    light = _light_points(scene.light)  # (3, k, k)
    step = max(1, RAYS_AT_ONCE // (size * k * k))  # rows of pixels
    bands = []
    for top in range(0, size, step):
        v = -axis[top * k : (top + step) * k]
        direction = forward[:, None, None] + right[:, None, None] * axis + up[:, None, None] * v[:, None]
        direction /= np.sqrt((direction * direction).sum(0))  # (3, rows * k, size * k)
        lights = np.tile(light, (1, len(v) // k, size)).reshape(3, -1)
        colour = radiance(solids, scene.eye[:, None], direction.reshape(3, -1), lights, bounces=1)
        bands.append(colour.reshape(3, -1, k, size, k).mean((2, 4)))  # (3, rows, size)
    linear = np.moveaxis(np.concatenate(bands, 1), 0, -1) * scene.exposure  # (size, size, 3)
    return Image.fromarray((to_srgb(linear) * 255 + 0.5).astype(np.uint8))


def _light_points(centre: Array) -> Array:
    """(3, k, k): one point of the light's disc for each ray of a pixel, on a golden-angle spiral."""
    k = SUPERSAMPLING
    n = np.arange(k * k) * 7 % (k * k)
    spread, turn = np.sqrt((n + 0.5) / (k * k)), n * np.pi * (3 - np.sqrt(5))
    right, up, _ = camera_axes(centre, np.zeros(3, np.float32))
    points = centre[:, None] + spread * (right[:, None] * np.cos(turn) + up[:, None] * np.sin(turn))
    return points.reshape(3, k, k).astype(np.float32)


def to_linear(srgb: NDArray[np.floating]) -> Array:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4).astype(np.float32)


def to_srgb(linear: NDArray[np.floating]) -> Array:
    """Linear light, clipped to [0, 1], to sRGB."""
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055).astype(np.float32)
