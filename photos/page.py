"""A page to look at: photos with their heat maps, worst first, as one plain HTML file.

It opens from disk, and needs no server and no other software. The buttons at its top
show the anomalous photos alone, or the doubtful ones; so does judged.html#anomalous.
"""
import base64
import html
import io
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from PIL import Image


class Row(NamedTuple):
    """One photo on a page."""
    name: str                       # its file
    photo: str                      # the address of its picture, or "" without one
    heat: str                       # the same with the heat map laid over
    ratio: float                    # the score in thresholds; rows are sorted by it
    text: str
    tags: tuple                     # of TAGS


TAGS = ("anomalous", "doubtful", "normal", "unreadable", "unusual", "all")


def lay_over(picture, heat):
    """A picture (Pillow) under its heat map (H, W), in which 1 is the threshold.

    The colors go from 0, which is clear, to 2, through which the picture is still seen.
    """
    heat = Image.fromarray(np.asarray(heat, np.float32))
    heat = heat.resize(picture.size, Image.Resampling.BILINEAR)
    heat = (np.asarray(heat) / 2).clip(0, 1)                        # (H, W)
    colors = colormaps["inferno"](heat)[..., :3] * 255              # (H, W, 3)
    opacity = 0.7 * (heat[..., None] * 1.6 - 0.2).clip(0, 1)
    mixed = (1 - opacity) * np.asarray(picture.convert("RGB")) + opacity * colors
    return Image.fromarray(mixed.round().astype(np.uint8))


def embedded(picture):
    """A picture as an address that holds it, so that the page needs no file beside."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 0; color: #222;
       background: #f4f4f2 }
header { background: #fff; border-bottom: 1px solid #ddd; padding: 1em 1.5em }
h1 { font-size: 1.25em; margin: 0 0 .3em }
header p { margin: .15em 0; max-width: 60em }
pre { white-space: pre-wrap; font-size: .9em; max-width: 75em }
summary { cursor: pointer }
nav { position: sticky; top: 0; z-index: 1; background: #fff; padding: .5em 1.5em;
      border-bottom: 1px solid #ddd }
nav a { color: #222; text-decoration: none; padding: .2em .7em; border: 1px solid #bbb;
        border-radius: 1em; margin-right: .4em; white-space: nowrap }
nav a.on { background: #222; color: #fff }
main { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr));
       gap: 14px; padding: 1.2em 1.5em }
figure { margin: 0; background: #fff; border-radius: 6px; overflow: hidden;
         border-top: 5px solid #7a9 }
figure.doubtful, figure.unusual { border-color: #e3a020 }
figure.anomalous { border-color: #c8322b }
figure.unreadable { border-color: #888 }
figure[hidden] { display: none }
.both { position: relative; display: flex; height: 230px; background: #e4e4e1 }
.both img { position: absolute; width: 100%; height: 100%; object-fit: contain }
.both:hover .heat { opacity: 0 }
figcaption { padding: .5em .7em .6em; overflow-wrap: anywhere; font-size: .87em }
figcaption b, figcaption small { display: block }
figcaption small { color: #777 }
.scale { display: inline-block; width: 150px; height: 11px; vertical-align: -1px;
         margin: 0 .4em; background: linear-gradient(90deg, SCALE) }
"""

SCRIPT = """
function show() {
  const wanted = location.hash.slice(1) || "all";
  for (const row of document.querySelectorAll("figure"))
    row.hidden = wanted !== "all" && !row.classList.contains(wanted);
  for (const link of document.querySelectorAll("nav a"))
    link.classList.toggle("on", link.hash === "#" + wanted);
}
addEventListener("hashchange", show);
show();
"""


def scale_colors():
    """The heat map's colors as CSS names them, from 0 to twice the threshold."""
    stops = colormaps["inferno"](np.linspace(0, 1, 9), bytes=True)[:, :3]
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in stops)


def write_page(path, title, facts, rows):
    """Write the page. facts: lines for its top. rows: Rows; the worst come first."""
    rows = sorted(rows, key=lambda row: -row.ratio)
    links, figures = [], []
    for tag in TAGS:
        count = sum(tag == "all" or tag in row.tags for row in rows)
        if count:
            links.append(f'<a href="#{tag}">{tag} ({count:,})</a>')
    for row in rows:
        figures.append(figure(row))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width">
<style>{STYLE.replace("SCALE", scale_colors())}</style></head><body>
<header><h1>{html.escape(title)}</h1>
{text_of(facts)}<p>Heat map: as usual<span class="scale"></span>twice the threshold
or more. The threshold is in the middle. Point at a photo to see it without its heat
map.</p></header>
<nav>{"".join(links)}</nav>
<main>
{"".join(figures)}</main>
<script>{SCRIPT}</script></body></html>
"""
    with open(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write(page)


def text_of(facts):
    """Lines as HTML. Of many, only warnings are shown until all are asked for."""
    many = len(facts) > 8
    shown = [fact for fact in facts if not many or "WARNING" in fact or "LOOK" in fact]
    text = "".join(f"<p>{html.escape(fact)}</p>\n" for fact in shown)
    if many:
        text += ("<details><summary>What was said</summary><pre>"
                 + html.escape("\n".join(facts)) + "</pre></details>\n")
    return text


def figure(row):
    """A row as HTML."""
    pictures = ""
    for kind in ("photo", "heat"):
        address = getattr(row, kind)
        if address:
            address = html.escape(address)
            pictures += f'<img class="{kind}" src="{address}" loading="lazy" alt="">'
    folder, _, name = row.name.rpartition("/")
    folder = html.escape(folder).replace("/", "/<wbr>")     # a long one breaks there
    return (f'<figure class="{" ".join(row.tags)}"><div class="both">{pictures}</div>'
            f"<figcaption><b>{html.escape(name)}</b>{html.escape(row.text)}"
            f"<small>{folder}</small></figcaption></figure>\n")
