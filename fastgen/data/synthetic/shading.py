"""Light in a table-top scene: a soft key light with shadows, a sky, mirror bounces. Linear RGB, (3, N)."""

from __future__ import annotations

import numpy as np

from fastgen.data.synthetic.rays import Array, Solid, dot, hits, nearest, normal

FLOOR = 0.52  # albedo
SKY = np.array([0.30, 0.32, 0.36], np.float32)  # ambient light from above
GROUND = np.array([0.24, 0.235, 0.23], np.float32)  # and from below
KEY = np.array([1.08, 1.04, 0.98], np.float32)
HAZE = np.array([0.52, 0.53, 0.55], np.float32)  # what the floor fades to in the distance
HAZE_LENGTH = 26


def radiance(solids: list[Solid], origin: Array, direction: Array, lights: Array, bounces: int) -> Array:
    """What is seen from `origin` (3, N or 1) along unit `direction` (3, N), ray i lit by point `lights[:, i]`."""
    distance, index = nearest(solids, origin, direction)
    colour = _floor(solids, origin, direction, distance, lights)
    for i, solid in enumerate(solids):
        rays = np.flatnonzero(index == i)
        if len(rays):
            start = origin if origin.shape[1] == 1 else origin[:, rays]
            point = start + direction[:, rays] * distance[rays]
            colour[:, rays] = _surface(solids, solid, point, direction[:, rays], lights[:, rays], bounces)
    return colour


def _floor(solids: list[Solid], origin: Array, direction: Array, distance: Array, lights: Array) -> Array:
    distance = np.minimum(distance, 60)
    point = origin + direction * distance
    point[2] = 0
    to_light = lights - point
    key = _fall_off(to_light) * to_light[2]
    sky = np.ones_like(key)
    for solid in solids:
        rays, _ = hits(solid, point, to_light)
        key[rays] = 0
        squared = (point[0] - solid.centre[0]) ** 2 + (point[1] - solid.centre[1]) ** 2 + solid.radius**2
        sky *= 1 - solid.radius**3 / (squared * np.sqrt(squared))  # a sphere's cosine-weighted share of the sky
    haze = 1 - np.exp(np.square(distance) * np.float32(-1 / HAZE_LENGTH**2))
    key *= FLOOR * (1 - haze)
    sky *= FLOOR * (1 - haze)
    return KEY[:, None] * key + SKY[:, None] * sky + HAZE[:, None] * haze


def _surface(solids: list[Solid], solid: Solid, point: Array, direction: Array, lights: Array, bounces: int) -> Array:
    n = normal(solid, point)
    point = point + n * 2e-3
    to_light = lights - point
    key = _fall_off(to_light) * np.clip(dot(to_light, n), 0, None)
    lit = np.ones_like(key)
    for other in solids:
        if other is not solid:
            lit[hits(other, point, to_light)[0]] = 0
    facing = dot(direction, n)
    mirror = direction - 2 * facing * n
    fresnel = (1 - np.clip(-facing, 0, 1)) ** 5
    upward = (n[2] * 0.5 + 0.5) * np.clip(0.45 + point[2] / (2 * solid.radius), 0, 1)
    ambient = SKY[:, None] * upward + GROUND[:, None] * (1 - upward)
    diffuse = solid.albedo[:, None] * (KEY[:, None] * key * lit + ambient)
    gloss = np.clip(dot(mirror, to_light) / np.sqrt(dot(to_light, to_light)), 0, 1)
    if not solid.metal:
        return diffuse * (1 - 0.3 * fresnel) + KEY[:, None] * lit * (0.22 * gloss**24) + 0.12 * fresnel
    shine = KEY[:, None] * lit * (1.1 * gloss**90 + 0.15 * gloss**12)
    if bounces == 0:
        return diffuse + shine
    reflected = radiance(solids, point, mirror, lights, bounces - 1)
    strength = 0.16 + 0.5 * fresnel
    tint = 0.25 + 0.75 * solid.albedo[:, None] / solid.albedo.max()
    return diffuse * (0.92 - 0.4 * fresnel) + reflected * tint * strength + shine


def _fall_off(to_light: Array) -> Array:
    """1 / distance, to be multiplied with the unnormalised cosine, times a gentle fall-off of the light; (N,)."""
    squared = dot(to_light, to_light)
    return np.float32(95) / ((squared + 25) * np.sqrt(squared))
