"""Lines of text, rendered with Debian's fonts, as a recogniser of text reads them: 48x320 pixels, RGB.

    python benchmarks/text_lines.py --out runs/lines
    resvit-export calibrate --model rec.onnx --data runs/lines/lines.npz --input-shape 3,48,320 --task other ...
    python benchmarks/where_lost.py RUN --data runs/lines/lines.npz --images 100

Writes ``train-lines.npz`` and ``lines.npz`` (``images`` uint8 [N, 48, 320, 3]) with ``texts.json`` beside them. Words,
numbers, dates, prices and number plates in many fonts, sizes and colours, a little turned, blurred and noisy: the same
seed gives the same lines wherever the same fonts are installed (package ``fonts-dejavu``).
"""

from __future__ import annotations

import json
import string
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter, ImageFont

HEIGHT, WIDTH = 48, 320
FONTS = Path("/usr/share/fonts")
_VOWELS, _OTHERS = "aeiou", "bcdfghjklmnprstvwz"


@click.command(help=(__doc__ or "").split("\n\n", maxsplit=1)[0])
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=Path("runs/lines"), show_default=True)
@click.option("--calibration", default=128, show_default=True)
@click.option("--test", default=400, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(*, out: Path, calibration: int, test: int, seed: int) -> None:
    """Render both sets."""
    out.mkdir(parents=True, exist_ok=True)
    fonts = fonts_in(FONTS)
    random = np.random.default_rng(seed)
    for name, count in (("train-lines", calibration), ("lines", test)):
        texts = [text_of(random) for _ in range(count)]
        np.savez_compressed(out / f"{name}.npz", images=np.stack([line(text, fonts, random) for text in texts]))
        (out / f"{name}.json").write_text(json.dumps(texts, indent=0))
    click.echo(f"{calibration} and {test} lines in {len(fonts)} fonts: {out}")


def fonts_in(folder: Path) -> list[Path]:
    """The fonts that have letters."""
    fonts = sorted(path for path in folder.rglob("*.ttf") if "Math" not in path.name)
    if not fonts:
        raise click.ClickException(f"No font lies in {folder}: apt-get install fonts-dejavu")
    return fonts


def text_of(random: np.random.Generator) -> str:
    """A line of one to four words or numbers."""
    kinds = (word, word, word, number, date, price, plate)
    return " ".join(kinds[random.integers(len(kinds))](random) for _ in range(random.integers(1, 4)))


def word(random: np.random.Generator) -> str:
    """Syllables; some words begin with a capital, some are capitals alone."""
    made = "".join(
        random.choice(list(_OTHERS)) + random.choice(list(_VOWELS)) + (random.choice(["", "", "n", "r", "s", "t"]))
        for _ in range(random.integers(1, 4))
    )
    return str(random.choice([made, made, made.capitalize(), made.upper()]))


def number(random: np.random.Generator) -> str:
    """Up to six digits."""
    return str(random.integers(10 ** random.integers(1, 7)))


def date(random: np.random.Generator) -> str:
    """A date with dots, dashes or slashes."""
    sign = random.choice(list(".-/"))
    return f"{random.integers(1, 29):02d}{sign}{random.integers(1, 13):02d}{sign}{random.integers(1990, 2040)}"


def price(random: np.random.Generator) -> str:
    """A price."""
    return f"${random.integers(1, 1000)}.{random.integers(100):02d}"


def plate(random: np.random.Generator) -> str:
    """Capitals and digits, as on a number plate."""
    letters = "".join(random.choice(list(string.ascii_uppercase), 2))
    return f"{letters}-{random.integers(10, 100)}{random.choice(list(string.ascii_uppercase))}"


def line(text: str, fonts: list[Path], random: np.random.Generator) -> npt.NDArray[np.uint8]:
    """The text as an image uint8 [48, 320, 3], from the left; what is too long is made narrower."""
    font = ImageFont.truetype(str(fonts[random.integers(len(fonts))]), int(random.integers(22, 35)))
    left, top, right, bottom = font.getbbox(text)
    paper, ink = random.integers(150, 256, 3), random.integers(0, 100, 3)
    if random.random() < 0.2:
        paper, ink = ink, paper
    canvas = Image.new("RGB", (int(right - left) + 16, HEIGHT), tuple(int(value) for value in paper))
    place = 8 - left, (HEIGHT - (bottom - top)) / 2 - top
    ImageDraw.Draw(canvas).text(place, text, font=font, fill=tuple(int(value) for value in ink))
    canvas = canvas.rotate(
        float(random.uniform(-1.5, 1.5)), Image.Resampling.BICUBIC, fillcolor=canvas.getpixel((0, 0))
    )
    canvas = canvas.filter(ImageFilter.GaussianBlur(float(random.uniform(0.0, 1.0))))
    if canvas.width > WIDTH:
        canvas = canvas.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    full = Image.new("RGB", (WIDTH, HEIGHT), canvas.getpixel((canvas.width - 1, 0)))
    full.paste(canvas, (0, 0))
    noisy = np.asarray(full, np.float64) + random.normal(0.0, random.uniform(0.0, 8.0), (HEIGHT, WIDTH, 3))
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


if __name__ == "__main__":
    main()
