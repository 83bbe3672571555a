"""Screenshots of a report for the documentation, with Debian's chromium: docs/pictures/report-*.png, each below 200 kB.

    python tools/report_pictures.py [report.html] [--out docs/pictures]

Without a file the newest runs/*/report.html is taken. The page is shown in light and dark, wide and on a phone.
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageChops

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 200_000  # bytes of one picture
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Headless chromium lays a page out no narrower than this; narrower pages are shown in a frame.
NARROWEST = 500


@dataclass(frozen=True)
class Shot:
    """One picture: the window in CSS pixels, and what it shows: the page from its top, or one of its sections."""

    name: str
    width: int
    height: int
    section: str = ""
    dark: bool = False


SHOTS = (
    Shot("report", 1160, 1420),
    Shot("report-documents", 1160, 1250, "documents"),
    Shot("report-training", 1160, 900, "training"),
    Shot("report-dark", 1160, 980, dark=True),
    Shot("report-phone", 400, 1500),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, nargs="?", help="report.html; default: the newest under runs/")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/pictures")
    given = parser.parse_args()
    report = given.report or newest()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if report is None or not report.is_file():
        print(f"{report or 'runs/*/report.html'} is missing\n\nhint: make demo writes one", file=sys.stderr)
        return 1
    if browser is None:
        print("no chromium on this machine\n\nhint: apt-get install chromium", file=sys.stderr)
        return 1
    given.out.mkdir(parents=True, exist_ok=True)
    for shot in SHOTS:
        path = given.out / f"{shot.name}.png"
        path.write_bytes(small(take(browser, report.resolve(), shot)))
        print(f"{path}  {path.stat().st_size:,} bytes")
    return 0


def newest() -> Path | None:
    """The report that was written last."""
    found = sorted(ROOT.glob("runs/*/report.html"), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def take(browser: str, page: Path, shot: Shot) -> Image.Image:
    """The window as a picture; blank paper below the end of the page is cut off."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "shot.png"
        command = [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"),
            *("--disable-background-networking", "--allow-file-access-from-files"),
            f"--blink-settings=preferredColorScheme={0 if shot.dark else 1}",
            f"--user-data-dir={folder}/profile",
            f"--window-size={max(shot.width, NARROWEST)},{shot.height}",
            f"--screenshot={target}",
            prepared(page, shot, Path(folder)).as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if not target.is_file():
            sys.exit(f"{browser} made no picture:\n{done.stderr[-2000:]}")
        image = Image.open(target).convert("RGB")
    return without_empty_end(image.crop((0, 0, shot.width, image.height)))


def prepared(page: Path, shot: Shot, folder: Path) -> Path:
    """The page itself, a copy that shows one section only, or a frame as narrow as a phone."""
    if shot.section:
        style = f"header, footer, main > :not(#{shot.section}) {{ display: none }} h2 {{ margin-top: 0; border: 0 }}"
        copy = folder / "section.html"
        copy.write_text(
            page.read_text(encoding="utf-8").replace("</head>", f"<style>{style}</style></head>", 1), encoding="utf-8"
        )
        return copy
    if shot.width < NARROWEST:
        style = f"border:0;width:{shot.width}px;height:{shot.height}px"
        frame = folder / "frame.html"
        frame.write_text(f'<body style="margin:0"><iframe src="{page.as_uri()}" style="{style}"></iframe></body>')
        return frame
    return page


def without_empty_end(image: Image.Image) -> Image.Image:
    """Without the rows at the end that hold nothing but the colour of the last one."""
    background = image.getpixel((0, image.height - 1))
    plain = Image.new("RGB", image.size, background)
    box = ImageChops.difference(image, plain).getbbox()
    return image if box is None else image.crop((0, 0, image.width, min(image.height, box[3] + 24)))


def small(image: Image.Image) -> bytes:
    """PNG below LIMIT: with fewer colours first, then with fewer pixels."""
    for factor in (1.0, 0.85, 0.7, 0.55, 0.4):
        size = (round(image.width * factor), round(image.height * factor))
        scaled = image if factor == 1.0 else image.resize(size, Image.Resampling.LANCZOS)
        for colours in (256, 96):
            buffer = io.BytesIO()
            scaled.quantize(colours, dither=Image.Dither.NONE).save(buffer, "png", optimize=True)
            if len(buffer.getvalue()) < LIMIT:
                return buffer.getvalue()
    sys.exit(f"the picture stays above {LIMIT:,} bytes")


if __name__ == "__main__":
    sys.exit(main())
