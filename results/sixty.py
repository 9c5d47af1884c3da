"""Sixty: what photos/learn.py makes of sixty photos of good parts -> results/sixty.csv

    python results/sixty.py              # about a quarter of an hour of one core

Of five products of MVTec AD sixty training images are drawn, three times. All test
images are judged. Rows that are there already are not made again.
"""
import argparse
import contextlib
import csv
import io
import json
import random
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRODUCTS = ("bottle", "capsule", "grid", "pill", "transistor")
DRAWS = (0, 1, 2)
METRICS = ("image_auroc", "pixel_auroc", "pixel_aupro", "threshold", "fpr", "tpr")
COLUMNS = ("product", "draw", *METRICS, "cpu_seconds", "machine")


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

    from photos.learn import learn
    torch.set_num_threads(1)
    folder, out = folder_of(product, draw, data_dir), f"runs/sixty/{product}-{draw}"
    started = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        learn(folder, out, again=True)
    seconds = round(time.process_time() - started, 1)
    record = json.loads(Path(out, "run.json").read_text())
    row = {key: record["metrics"]["categories"][product][key] for key in METRICS}
    machine = record["versions"]["machine"]
    return dict(row, product=product, draw=draw, cpu_seconds=seconds, machine=machine)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", default="data", help="default: data")
    args = parser.parse_args(argv)
    path = ROOT / "results/sixty.csv"
    if not path.exists():
        path.write_text(",".join(COLUMNS) + "\n")
    with path.open() as file:
        done = {(row["product"], row["draw"]) for row in csv.DictReader(file)}
    for draw in DRAWS:
        for product in PRODUCTS:
            if (product, str(draw)) not in done:
                row = measure(product, draw, args.data_dir)
                with path.open("a", newline="") as file:
                    csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
                auroc = f"image AUROC {row['image_auroc']:.3f}"
                print(product, draw, auroc, flush=True)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
