"""Rays against the solids of a table-top scene. Vectors are float32, component first, (3, N); the floor is z = 0."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

FAR = np.float32(1e9)
BEVEL = 0.16  # rounded edges, as a share of the radius: normals only, the outline stays sharp


@dataclass(frozen=True)
class Solid:
    """A cube, sphere or cylinder that stands on the floor."""

    shape: str
    albedo: Array  # (3,) linear RGB
    centre: Array  # (3,)
    radius: float  # half the extent along z
    angle: float  # rotation about z in radians
    metal: bool  # mirror-like, else matte


def nearest(solids: list[Solid], origin: Array, direction: Array) -> tuple[Array, NDArray[np.int8]]:
    """Distance (N,), FAR if there is none, and index (N,) of what each ray meets first; -1 is the floor."""
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = -origin[2] / direction[2]
    distance[~(distance > 0)] = FAR
    index = np.full(distance.shape, -1, np.int8)
    for i, solid in enumerate(solids):
        rays, t = hits(solid, origin, direction)
        closer = t < distance[rays]
        distance[rays[closer]] = t[closer]
        index[rays[closer]] = i
    return distance, index


def hits(solid: Solid, origin: Array, direction: Array) -> tuple[NDArray[np.intp], Array]:
    """The rays (M,) that meet the solid and the distances (M,), in lengths of `direction`, at which they enter it.

    `origin` is (3, N) or (3, 1) and outside of the solid.
    """
    reach = solid.radius * {"sphere": 1.0, "cylinder": 2**0.5, "cube": 3**0.5}[solid.shape]
    x, y, z = solid.centre[:, None] - origin
    along = x * direction[0] + y * direction[1] + z * direction[2]
    ahead = along > 0
    if origin.shape[1] == 1:
        ahead &= along * along > float(x[0] ** 2 + y[0] ** 2 + z[0] ** 2 - reach**2) * dot(direction, direction)
    else:
        ahead &= along * along > (x * x + y * y + z * z - reach**2) * dot(direction, direction)
    rays = np.flatnonzero(ahead)
    t = _enter(solid, origin if origin.shape[1] == 1 else origin[:, rays], direction[:, rays])
    met = t < FAR
    return rays[met], t[met]


def _enter(solid: Solid, origin: Array, direction: Array) -> Array:
    o, d = to_local(solid, origin), turn(direction, -solid.angle) if solid.shape == "cube" else direction
    with np.errstate(divide="ignore", invalid="ignore"):
        if solid.shape == "sphere":
            enter, leave = _ball(o, d, solid.radius)
        elif solid.shape == "cube":
            enter, leave = _slab(o[0], d[0], solid.radius)
            for axis in (1, 2):
                near, far = _slab(o[axis], d[axis], solid.radius)
                enter, leave = np.maximum(enter, near), np.minimum(leave, far)
        else:
            enter, leave = _ball(o[:2], d[:2], solid.radius)
            near, far = _slab(o[2], d[2], solid.radius)
            enter, leave = np.maximum(enter, near), np.minimum(leave, far)
        return np.where((enter < leave) & (enter > 1e-4), enter, FAR)


def dot(a: Array, b: Array) -> Array:
    """Scalar products (N,) of vectors (3, N)."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _ball(o: Array, d: Array, radius: float) -> tuple[Array, Array]:
    """Where rays are inside a ball (3 components) or an upright tube (2)."""
    a = (d * d).sum(0)
    b = (o * d).sum(0)
    root = np.sqrt(b * b - a * ((o * o).sum(0) - radius * radius))  # nan: missed, and nan compares false
    return (-b - root) / a, (-b + root) / a


def _slab(o: Array, d: Array, radius: float) -> tuple[Array, Array]:
    first, second = (-radius - o) / d, (radius - o) / d
    return np.minimum(first, second), np.maximum(first, second)


def to_local(solid: Solid, point: Array) -> Array:
    """Points (3, N) relative to the solid's centre, turned back for cubes."""
    relative = point - solid.centre[:, None]
    return turn(relative, -solid.angle) if solid.shape == "cube" else relative


def turn(vector: Array, angle: float) -> Array:
    """Vectors (3, N) rotated about z."""
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return np.stack([c * vector[0] - s * vector[1], s * vector[0] + c * vector[1], vector[2]])


def normal(solid: Solid, point: Array) -> Array:
    """Unit outward normals (3, N) at points on the surface, bent over edges as if they were bevelled."""
    local = to_local(solid, point) / solid.radius
    if solid.shape == "sphere":
        bent = local
    elif solid.shape == "cube":
        bent = np.sign(local) * np.maximum(np.abs(local) - (1 - BEVEL), 1e-6)
    else:
        radial = np.sqrt(local[0] ** 2 + local[1] ** 2)
        side = np.maximum(radial - (1 - BEVEL), 1e-6) / np.maximum(radial, 1e-6)
        top = np.sign(local[2]) * np.maximum(np.abs(local[2]) - (1 - BEVEL), 1e-6)
        bent = np.stack([local[0] * side, local[1] * side, top])
    bent = bent / np.sqrt((bent * bent).sum(0))
    return turn(bent, solid.angle) if solid.shape == "cube" else bent
