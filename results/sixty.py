"""Sixty: what photos/learn.py makes of sixty photos of good parts -> results/sixty.csv

    python results/sixty.py              # about twenty minutes of one core

Of five products of MVTec AD sixty training images are drawn, three times. All test
images are judged. Rows that are there already are not made again. At the end stands the
table of photos/README.md, with two models of anomalib beside ours (peers.py).
"""
import argparse
import contextlib
import csv
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from pairs import interval

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRODUCTS = ("bottle", "capsule", "grid", "pill", "transistor")
DRAWS = (0, 1, 2)
METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro", "threshold", "fpr", "tpr")
MORE_ALARMS = 0.1                       # a second share of false alarms to allow
COLUMNS = ("product", "draw", *METRICS, "more_fpr", "more_tpr", "cpu_seconds",
           "machine")
PEERS = {                               # name: its method and size in peers.csv
    "PatchCore": ("patchcore", "224"), "PatchCore, 256 pixels": ("patchcore", "256"),
    "PaDiM": ("padim", "224")}


def folder_of(product, draw, data_dir):
    """A folder with links to sixty drawn photos of a product and to its test images."""
    source = Path(data_dir, "mvtec", product).resolve()
    folder = Path(f"runs/sixty/data/{product}-{draw}/{product}")
    if not folder.exists():
        files = sorted((source / "train/good").iterdir())
        random.Random(draw).shuffle(files)
        (folder / "train/good").mkdir(parents=True)
        for file in files[:60]:
            (folder / "train/good" / file.name).symlink_to(file)
        for other in ("test", "ground_truth"):
            (folder / other).symlink_to(source / other)
    return folder.parent


def measure(product, draw, data_dir):
    """Learn one draw -> its row."""
    import torch

    import evaluate as ev
    from photos.learn import learn
    torch.set_num_threads(1)
    folder, out = folder_of(product, draw, data_dir), f"runs/sixty/{product}-{draw}"
    with tempfile.TemporaryDirectory() as empty, contextlib.redirect_stdout(
            io.StringIO()):
        # The time is that of the sixty photos alone, with no features on disk.
        ev.FEATURE_CACHE = empty
        started = time.process_time()
        learn(folder / product / "train" / "good", f"{empty}/run")
        seconds = round(time.process_time() - started, 1)
        # The rest is learned with the test images beside them, which changes no score.
        learn(folder, out, again=True)
    record = json.loads(Path(out, "run.json").read_text())
    row = {key: record["metrics"]["categories"][product][key] for key in METRICS}
    row["more_fpr"], row["more_tpr"] = with_more_alarms(out, product, data_dir)
    machine = record["versions"]["machine"]
    return dict(row, product=product, draw=draw, cpu_seconds=seconds, machine=machine)


def with_more_alarms(run, product, data_dir):
    """The shares of good and of defective test photos that judge.py calls anomalous.

    Its threshold is that of --false-alarms MORE_ALARMS.
    """
    from photos.judge import Judge
    judge, called = Judge(run, false_alarms=MORE_ALARMS), ([], [])
    for photo in sorted(Path(data_dir, "mvtec", product, "test").glob("*/*")):
        called[photo.parent.name != "good"].append(judge(photo).anomalous)
    return [float(np.mean(verdicts)) for verdicts in called]


# ---- the table ----

def read(name):
    """The rows of a CSV in results/, without its comment."""
    if not (ROOT / "results" / name).exists():
        return []
    with (ROOT / "results" / name).open(newline="") as file:
        return list(csv.DictReader(line for line in file if line[0] != "#"))


def add_rows(name, columns, rows):
    """Append rows to a CSV in results/, which is begun where there is none."""
    path = ROOT / "results" / name
    begun = path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerows(rows)


def peer(name):
    """The rows of one of PEERS."""
    return [row for row in read("peers.csv")
            if (row["method"], row["size"]) == PEERS[name]]


def by_product(rows, column):
    """{product: the mean of a column over its draws}"""
    means = {}
    for product in PRODUCTS:
        own = [float(row[column]) for row in rows if row["product"] == product]
        means[product] = float(np.mean(own))
    return means


def number(value):
    """.971, as the pages write it."""
    return f"{value:.3f}".removeprefix("0")


def table():
    """Ours beside the peers', as Markdown: image AUROC by product, means over them."""
    ours = read("sixty.csv")
    more = f"the same, `--false-alarms {MORE_ALARMS:g}`"
    methods = {"`photos/learn.py`": (ours, "fpr", "tpr", "cpu_seconds"),
               more: (ours, "more_fpr", "more_tpr", "cpu_seconds")}
    for name in PEERS:
        methods[name] = peer(name), "alarms", "found", "learn_s"
    titles = ("", *PRODUCTS, "mean", "false alarms", "found", "CPU s to learn")
    lines = [f"| {' | '.join(titles)} |".replace("|  |", "| |"),
             f"|{'---|' * len(titles)}"]
    for name, (rows, alarms, found, seconds) in methods.items():
        aurocs = list(by_product(rows, "image_auroc").values())
        cells = [name, *map(number, aurocs),
                 f"{number(np.mean(aurocs))} ± {number(interval(aurocs))}"]
        for column in (alarms, found):
            missing = rows[0][column] == ""                 # no threshold was set
            cells.append("" if missing else
                         number(np.mean(list(by_product(rows, column).values()))))
        cells.append(f"{np.mean(list(by_product(rows, seconds).values())):.0f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def difference(name):
    """Image AUROC of ours less a peer's, on the draws that both have: a line."""
    rivals = peer(name)
    draws = {row["draw"] for row in rivals}
    ours = [row for row in read("sixty.csv") if row["draw"] in draws]
    ours, theirs = (by_product(rows, "image_auroc") for rows in (ours, rivals))
    ahead = {product: ours[product] - theirs[product] for product in PRODUCTS}
    named = ", ".join(f"{product} {value:+.3f}" for product, value in ahead.items())
    values = list(ahead.values())
    return (f"ours - {name}: {np.mean(values):+.3f} ± {interval(values):.3f} "
            f"({named}; draws {', '.join(sorted(draws))})")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", default="data", help="default: data")
    args = parser.parse_args(argv)
    done = {(row["product"], row["draw"]) for row in read("sixty.csv")}
    for draw in DRAWS:
        for product in PRODUCTS:
            if (product, str(draw)) not in done:
                row = measure(product, draw, args.data_dir)
                add_rows("sixty.csv", COLUMNS, [row])
                auroc = f"image AUROC {row['image_auroc']:.3f}"
                print(product, draw, auroc, f"{row['cpu_seconds']} s", flush=True)
    print(table(), *map(difference, PEERS), sep="\n\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
