"""Choices: would another setting of photos/learn.py detect better?

    python results/choices.py            # about two hours of one core
    -> results/choices.csv, and two tables of it

Five products of MVTec AD, three draws of sixty photos each, as in sixty.py. Each
setting differs in one thing from 224 pixels, which was the default before, and the last
one in two. Rows that are there already are not made again.

There are no other anomalies than the test images, so a setting can be chosen on them
alone. To see what choosing is worth, each product is left out once: the setting that is
best on the other four is taken for it. It has not seen this product's test images.
"""
import argparse
import contextlib
import io
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from pairs import interval
from sixty import DRAWS, PRODUCTS, add_rows, by_product, folder_of, number, read

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate as ev
import train
from photos import copies, learn
from photos.images import read_folder
from uniad import NearestToken

METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro", "fpr", "tpr")
COLUMNS = ("setting", "product", "draw", *METRICS)
FIRST = "224 pixels"                    # the row that the others are compared with


# ---- the settings ----

class CosineToken(NearestToken):
    """Nearest tokens by the angle between them: all tokens have length 1.

    `forward` returns f plus the difference of the normalized tokens, so that f_hat - f
    is the error between these.
    """

    def solve(self, features, parts=None, candidates=None):
        super().solve(unit(features), parts, candidates)

    def forward(self, features, leave_out=None):
        f = unit(features)
        return features + super().forward(f, leave_out) - f


def unit(features):
    """Features (N, C, g, g), each token divided by its length."""
    return features / features.norm(dim=1, keepdim=True).clamp(min=1e-12)


def without_copies(data, backbone):
    """Instead of `add_copies`: the photos alone."""
    return data, {}


# Keys of the config, and what is replaced meanwhile: (module, name, value).
OLD = dict(image_size=224)
FOUR_COPIES = (copies, "MOVED", 4)
SETTINGS = {
    FIRST: (OLD, [FOUR_COPIES]),
    "cosine distance": (OLD, [FOUR_COPIES, (ev, "NearestToken", CosineToken)]),
    "no copies": (OLD, [(learn, "add_copies", without_copies)]),
    "no turned copies": (OLD, [FOUR_COPIES, (copies, "NEAREST_ARE_TURNED", 2.0)]),
    "stage of stride 16 alone": (
        dict(OLD, strides=(16,), grid_stride=16), [FOUR_COPIES]),
    "256 pixels": (dict(image_size=256), [FOUR_COPIES]),
    "256 pixels, two moved copies": (dict(image_size=256), [(copies, "MOVED", 2)]),
}


def measure(setting, product, draw, data_dir):
    """Learn one draw with a setting, judge the test images -> its row."""
    given, replaced = SETTINGS[setting]
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        for module, name, value in replaced:
            stack.enter_context(mock.patch.object(module, name, value))
        out = f"runs/choices/{setting.replace(' ', '-')}-{product}-{draw}"
        config = learn.config_for(given)
        c = train.with_defaults(config | {"out": out, "pictures": False})
        photos = read_folder(folder_of(product, draw, data_dir), c["image_size"])
        c, data = learn.prepare(c, photos)
        record = train.run(c, data=data, report=False)
    metrics = record["metrics"]["categories"][product]
    row = {key: metrics[key] for key in METRICS}
    return dict(row, setting=setting, product=product, draw=draw)


# ---- the table ----

def settings_and_rows():
    """{setting: its rows}. Those that miss a run are left out."""
    found = {}
    for setting in SETTINGS:
        own = [row for row in read("choices.csv") if row["setting"] == setting]
        if len(own) == len(PRODUCTS) * len(DRAWS):
            found[setting] = own
    return found


def table():
    """A row a setting, as Markdown: image AUROC by product, mean, less the first."""
    lines = [f"| setting | {' | '.join(PRODUCTS)} | mean | less the first | AUPRO |"
             " false alarms | found |", f"|{'---|' * (len(PRODUCTS) + 6)}"]
    found = settings_and_rows()
    base = np.array(list(by_product(found[FIRST], "image_auroc").values()))
    for setting, rows in found.items():
        aurocs = np.array(list(by_product(rows, "image_auroc").values()))
        cells = [setting, *map(number, aurocs), number(aurocs.mean())]
        more = aurocs - base
        cells.append("" if setting == FIRST else
                     f"{more.mean():+.3f} ± {interval(more):.3f}")
        for column in ("pixel_aupro", "fpr", "tpr"):
            cells.append(number(np.mean(list(by_product(rows, column).values()))))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def chosen_without(product):
    """The setting that is best on the other four products."""
    def mean_of_others(rows):
        means = by_product(rows, "image_auroc")
        return np.mean([means[other] for other in PRODUCTS if other != product])
    found = settings_and_rows()
    return max(found, key=lambda setting: mean_of_others(found[setting]))


def leave_one_out():
    """For each product the setting chosen on the others, and what it has there."""
    found, lines, values = settings_and_rows(), [], []
    for product in PRODUCTS:
        setting = chosen_without(product)
        values.append(by_product(found[setting], "image_auroc")[product])
        lines.append(f"| {product} | {setting} | {number(values[-1])} |")
    lines.append(f"| mean | | {number(np.mean(values))} |")
    head = "| left out | best on the other four | image AUROC on it |"
    return "\n".join([head, "|---|---|---|", *lines])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", default="data", help="default: data")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = read("choices.csv")
    done = {(row["setting"], row["product"], row["draw"]) for row in rows}
    for setting in SETTINGS:
        for draw in DRAWS:
            for product in PRODUCTS:
                if (setting, product, str(draw)) not in done:
                    row = measure(setting, product, draw, args.data_dir)
                    add_rows("choices.csv", COLUMNS, [row])
                    print(f"{setting}, {product}, draw {draw}: image AUROC "
                          f"{row['image_auroc']:.3f}", flush=True)
    print(table(), leave_one_out(), sep="\n\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
