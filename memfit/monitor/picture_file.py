"""A drawing becomes a file: SVG, PNG or one self-contained HTML page, by its suffix."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from memfit.errors import UserError
from memfit.monitor.canvas import Canvas

SUFFIXES = (".svg", ".png", ".html")
STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;margin:1.5rem auto;max-width:1200px;padding:0 1rem;"
    "color:#222;background:#fff}svg{max-width:100%;height:auto}pre{overflow-x:auto;font-size:13px}"
)


def check_picture(path: Path) -> None:
    """Raises UserError for a suffix of which no picture is written, and for a folder that is not there."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        hint = f"name it {path.with_suffix('.svg').name}, or with .png or .html"
        raise UserError(f"--plot {path}: no picture is written as {suffix or 'a file without suffix'}", hint)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--plot {path} cannot be written: No such file or directory", "name another file")


def write_canvas(canvas: Canvas, path: Path, page: Callable[[], str]) -> Path:
    """Write a drawing; `page()` is the HTML page around it. Raises UserError as `check_picture`, and for a file that
    cannot be written."""
    check_picture(path)
    try:
        if path.suffix.lower() == ".png":
            canvas.png(path)
        else:
            path.write_text(canvas.svg() if path.suffix.lower() == ".svg" else page(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--plot {path} cannot be written: {error.strerror or error}", "name another file") from error
    return path


def page_of(canvas: Canvas, title: str, texts: Sequence[tuple[str, str]]) -> str:
    """An HTML page: the drawing, then each text under its heading."""
    told = "".join(f"<h2>{escape(name)}</h2>\n<pre>{escape(text)}</pre>\n" for name, text in texts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head><body>\n{canvas.svg()}{told}</body></html>\n"
    )
