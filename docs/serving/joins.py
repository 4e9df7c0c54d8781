"""Draws joins.svg, the figure of docs/serving.md: `python docs/serving/joins.py`.

Eight images come at different times; which of them run in a step is the server's own choice (`policy.choose`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from fastgen.serving.policy import Work, choose

OUT = Path(__file__).with_name("joins.svg")
PLACES, TICKS, STEP_S = 4, 25, 0.1
CELL, LEFT, TOP, GAP = 31, 178, 62, 5
COLOURS = ("#3b6fb6", "#d1852b", "#3f9a6c", "#a85aa8", "#c14f4f", "#2f9aa8", "#8a7a2f", "#6b6f7b")


@dataclass
class Image:
    """One request of a client. `came`: before this tick; `cancelled`: before that one."""

    name: str
    solver: str
    steps: int
    scale: float
    came: int
    client: str
    cancelled: int = TICKS
    colour: str = ""
    ticks: list[int] = field(default_factory=list)  # in which it ran

    @property
    def last(self) -> int:
        """The tick after which it left."""
        return self.ticks[-1]


IMAGES = (
    Image("A", "ddpm", 19, 3.0, 0, "x"),
    Image("B", "dpmpp-2m", 10, 2.0, 0, "x"),
    Image("C", "ddim", 8, 1.0, 2, "y"),
    Image("D", "unipc", 6, 7.5, 4, "y"),
    Image("E", "euler-ancestral", 7, 3.0, 6, "z"),
    Image("F", "deis", 12, 2.0, 11, "y", cancelled=18),
    Image("G", "ddim", 4, 1.0, 13, "z"),
    Image("H", "dpmpp-2m", 5, 1.5, 14, "x"),
)


def played() -> list[dict[int, Image]]:
    """For each tick, the images that run in it, by the place where they are drawn."""
    works = {
        i: Work(i, image.client, image.came * STEP_S, None, image.steps, 0, STEP_S, STEP_S)
        for i, image in enumerate(IMAGES)
    }
    ticks: list[dict[int, Image]] = []
    for image, colour in zip(IMAGES, COLOURS, strict=True):
        image.colour, image.ticks = colour, []
    for tick in range(TICKS):
        here = [w for i, w in works.items() if IMAGES[i].came <= tick < IMAGES[i].cancelled and w.rows_left]
        chosen = [IMAGES[work.id] for work in choose(here, PLACES, tick * STEP_S)]
        before = ticks[-1] if ticks else {}
        places = {place: image for place, image in before.items() if any(image is one for one in chosen)}
        for image in chosen:
            if not any(image is one for one in places.values()):
                places[min(set(range(PLACES)) - places.keys())] = image
            image.ticks.append(tick)
            works[IMAGES.index(image)].ran(False)
        ticks.append(places)
    return ticks


def text(x: float, y: float, words: str, *, size: int = 12, anchor: str = "start", fill: str = "#222") -> str:
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def cell(tick: int, line: float, image: Image, *, resting: bool = False) -> str:
    """An image in a tick: the number of the row that it runs, or an outline while it rests."""
    x, y, side = LEFT + tick * CELL, TOP + line, CELL - 3
    style = f'fill="none" stroke="{image.colour}" stroke-dasharray="3 2"' if resting else f'fill="{image.colour}"'
    words = image.name if resting else f"{image.name}{image.ticks.index(tick) + 1}"
    label = text(x + side / 2, y + 18, words, anchor="middle", fill=image.colour if resting else "#fff")
    return f'<rect x="{x}" y="{y:g}" width="{side}" height="26" rx="4" {style}/>{label}'


def events(tick: int) -> str:
    """Who comes before a tick and who has left after the one before it, side by side above the grid."""
    marks: list[tuple[str, str]] = []
    for image in IMAGES:
        done, cancelled = image.cancelled == TICKS, image.cancelled == tick < TICKS
        if cancelled or (done and image.last + 1 == tick):
            marks.append((image.colour, "m-3 -4 l3 4 l5 -8" if done else "m-4 -8 l8 8 m0 -8 l-8 8"))
    came = [(image.colour, "m-4 -7 h8 l-4 7 z") for image in IMAGES if image.came == tick]
    x, parts = LEFT + tick * CELL - 1.5 - 6 * (len(marks) + len(came) - 1), []
    for i, (colour, path) in enumerate([*marks, *came]):
        style = f'fill="{colour}"' if i >= len(marks) else f'fill="none" stroke="{colour}" stroke-width="2.2"'
        parts.append(f'<path d="M{x + 12 * i:g} {TOP - 7} {path}" {style}/>')
    return "".join(parts)


def svg() -> str:
    ticks, line = played(), CELL + GAP
    bottom = TOP + (PLACES + 1) * line + 8
    width, height = LEFT + TICKS * CELL + 16, bottom + 92
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        "<title>Images of different solvers join and leave a running batch</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        text(14, 26, "One step after the other: each cell is a row of the image's own solver table", size=15),
        text(14, TOP - 6, "comes, is done, cancelled"),
        *(text(14, TOP + place * line + 18, f"place {place + 1} of a step") for place in range(PLACES)),
        text(14, TOP + PLACES * line + 18, "rests, keeps its state"),
    ]
    for tick, places in enumerate(ticks):
        parts.append(events(tick))
        parts += [cell(tick, place * line, image) for place, image in places.items()]
        resting = [i for i in IMAGES if i.ticks[0] < tick < i.last and tick not in i.ticks]
        parts += [cell(tick, PLACES * line, image, resting=True) for image in resting]
    parts.append(events(len(ticks)))
    for i, image in enumerate(IMAGES):
        x, y = LEFT + (i % 4) * 198, bottom + 14 + (i // 4) * 24
        end = ", cancelled" if image.cancelled < TICKS else ""
        words = f"{image.solver}, {image.steps} steps, scale {image.scale:g}{end}"
        parts.append(f'<rect x="{x}" y="{y}" width="16" height="16" rx="4" fill="{image.colour}"/>')
        parts.append(text(x + 8, y + 12.5, image.name, anchor="middle", fill="#fff", size=11))
        parts.append(text(x + 22, y + 12.5, words, size=11))
    words = "Time goes to the right. A is the longest: it rests while shorter images run, and goes on where it stood."
    parts.append(text(LEFT, bottom + 78, words))
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    OUT.write_text(svg(), encoding="utf-8")
