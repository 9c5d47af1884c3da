"""Evening: bumped cameras, bursts, kinds, time. What photos/README.md says of them.

    python results/evening.py            # about half an hour of one core

-> results/evening.csv, and a table of it. Five products of MVTec AD. Most runs have
learned sixty training images, draw 0 of sixty.py. Rows that are there already are not
made again. A row's `count` is how many of `photos` test photos were called anomalous;
of the question "kinds", how many were told rightly. "cost" has `photos` alone.
"""
import argparse
import contextlib
import io
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sixty import PRODUCTS, add_rows, folder_of, read

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from photos.copies import SHIFT, moved
from photos.images import read_photo
from photos.judge import Judge
from photos.learn import learn

COLUMNS = ("question", "product", "change", "photos", "count", "cpu_seconds",
           "memory_mb", "disk_mb")
PIXEL = 1 / 256
# Changes of the bench: arguments of photos.copies.moved, several of which are tried.
MOVES = {
    "as they are": [{}],
    "shifted by 2 pixels of 256": [
        dict(right=2 * PIXEL), dict(right=-2 * PIXEL),
        dict(down=2 * PIXEL), dict(down=-2 * PIXEL)],
    "shifted by 4 pixels of 256": [
        dict(right=4 * PIXEL), dict(right=-4 * PIXEL),
        dict(down=4 * PIXEL), dict(down=-4 * PIXEL)],
    "turned by 2 degrees": [dict(degrees=2), dict(degrees=-2)],
    "brighter by a tenth": [dict(light=0.1)],
    "darker by a tenth": [dict(light=-0.1)],
    "brighter by a quarter": [dict(light=0.25)],
    "darker by a quarter": [dict(light=-0.25)],
}
QUALITIES = (90, 75)                    # of JPEG
PARTS = 20                              # of which a burst has three shots each
TOGETHER = ("bottle", "capsule", "pill", "transistor")      # kinds of one run


def quietly(call, *args, **given):
    with contextlib.redirect_stdout(io.StringIO()):
        return call(*args, **given)


def good_photos(product, data_dir):
    return sorted(Path(data_dir, "mvtec", product, "test/good").iterdir())


def anomalous(judge, images):
    return sum(verdict.anomalous for verdict in judge(images))


def linked(name, files):
    """A folder runs/evening/data/NAME with links to files, numbered."""
    folder = Path("runs/evening/data", name)
    folder.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(files):
        link = folder / f"{number:04}{file.suffix}"
        if not link.exists():
            link.symlink_to(file.resolve())
    return folder


def judge_of(name, folder):
    """Learn a folder, unless that is done -> its Judge."""
    return Judge(quietly(learn, folder, f"runs/evening/{name}"))


def sixty_of(product, data_dir):
    """The sixty photos of draw 0 alone, without the test images."""
    return folder_of(product, 0, data_dir) / product / "train" / "good"


# ---- the questions: each yields rows ----

def moved_cameras(data_dir):
    """good test photos that raise an alarm once the camera or the light has changed"""
    for product in PRODUCTS:
        judge = judge_of(f"sixty-{product}", sixty_of(product, data_dir))
        files, size = good_photos(product, data_dir), judge.config["image_size"]
        pixels = torch.stack([read_photo(file, size).pixels for file in files])
        for change, views in MOVES.items():
            count = 0
            for view in views:
                arrays = [image.permute(1, 2, 0).numpy()
                          for image in moved(pixels, **view)]
                count += anomalous(judge, arrays)
            yield dict(product=product, change=change, photos=len(files) * len(views),
                       count=count)
        for quality in QUALITIES:
            images = [as_jpeg(file, quality) for file in files]
            yield dict(product=product, change=f"as JPEG of quality {quality}",
                       photos=len(files), count=anomalous(judge, images))


def as_jpeg(file, quality):
    """A photo saved again as JPEG, and read."""
    stream = io.BytesIO()
    Image.open(file).convert("RGB").save(stream, "JPEG", quality=quality)
    return Image.open(stream)


def first_files(data_dir):
    """the first sixty files of the folder instead of sixty drawn from all of it"""
    for product in PRODUCTS:
        files = sorted(Path(data_dir, "mvtec", product, "train/good").iterdir())[:60]
        judge = judge_of(f"first-{product}", linked(f"first-{product}", files))
        files = good_photos(product, data_dir)
        yield dict(product=product, photos=len(files), count=anomalous(judge, files))


def bursts(data_dir):
    """three shots of each of twenty parts, slightly shifted and noisy"""
    for product in PRODUCTS:
        folder = burst_of(product, data_dir)
        judge = judge_of(f"burst-{product}", folder)
        files = good_photos(product, data_dir)
        yield dict(product=product, photos=len(files), count=anomalous(judge, files))


def burst_of(product, data_dir):
    """A folder with PARTS photos, and with two more shots of each."""
    files = sorted(sixty_of(product, data_dir).iterdir())[:PARTS]
    folder = linked(f"burst-{product}", files)
    for number, file in enumerate(files * 2):
        image = np.asarray(Image.open(file).convert("RGB"))
        pixels = torch.from_numpy(image.copy()).movedim(2, 0)[None]
        draw = random.Random(number)
        shot = moved(pixels, draw.uniform(-SHIFT, SHIFT), draw.uniform(-SHIFT, SHIFT))
        noise = np.random.default_rng(number).normal(0, 2, image.shape)
        noisy = shot[0].movedim(0, 2).numpy() + noise
        Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8)).save(
            folder / f"shot-{number}.png")
    return folder


def kinds(data_dir):
    """a run of four kinds: which is told from the photo itself?"""
    folder = Path("runs/evening/data/kinds")
    for product in TOGETHER:
        place = folder / product / "train"
        place.mkdir(parents=True, exist_ok=True)
        if not (place / "good").exists():
            (place / "good").symlink_to(sixty_of(product, data_dir).resolve())
    judge = judge_of("kinds", folder)
    for product in TOGETHER:
        files = good_photos(product, data_dir)
        right = sum(verdict.kind == product for verdict in judge(files))
        yield dict(product=product, photos=len(files), count=right)


def cost(data_dir):
    """CPU seconds of one core, memory, and what is written"""
    files = sorted(Path(data_dir, "mvtec/capsule/test").glob("*/*"))
    many = linked("many", [files[i % len(files)] for i in range(2000)]).resolve()
    sixty = sixty_of("capsule", data_dir).resolve()
    with tempfile.TemporaryDirectory() as empty:        # it keeps no features yet
        run, out = Path(empty, "run"), Path(empty, "judged")
        used = usage_of(empty, "learn.py", sixty, "--out", run)
        yield dict(product="capsule", change="learn", photos=60,
                   disk_mb=megabytes([run / "model.pt"]), **used)
        used = usage_of(empty, "judge.py", run, many, "--out", out)
        written = [path for path in out.rglob("*") if path.is_file()]
        yield dict(product="capsule", change="judge", photos=2000,
                   disk_mb=megabytes(written), **used)


# A child's peak of memory is at least its parent's size. So a small process starts it.
SMALL_PARENT = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(process.pid, 0)
print(os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, used.ru_maxrss)
"""


def usage_of(folder, script, *arguments):
    """Run a command of photos/ in a folder, on one thread -> what it has used."""
    command = [sys.executable, "-c", SMALL_PARENT, sys.executable,
               ROOT / "photos" / script, *arguments]
    said = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"},
                          cwd=folder, stdout=subprocess.PIPE, check=True, text=True)
    status, seconds, kilobytes = map(float, said.stdout.split())
    if status not in (0, 10):                               # 10: some are anomalous
        raise RuntimeError(f"{script} failed")
    return dict(cpu_seconds=round(seconds, 1), memory_mb=round(kilobytes / 1024))


def megabytes(files):
    return round(sum(file.stat().st_size for file in files) / 2 ** 20, 1)


QUESTIONS = {function.__name__: function for function in (
    moved_cameras, first_files, bursts, kinds, cost)}


# ---- the table ----

def table():
    """Photos called anomalous, by product and by what was changed, as Markdown."""
    cells = {}
    for row in read("evening.csv"):
        name = {"first_files": "the first sixty files learned",
                "bursts": "a burst learned"}.get(row["question"], row["change"])
        if row["question"] in ("moved_cameras", "first_files", "bursts"):
            text = f"{row['count']} of {row['photos']}"
            cells.setdefault(name, {})[row["product"]] = text
    lines = [f"| | {' | '.join(PRODUCTS)} |", f"|{'---|' * (len(PRODUCTS) + 1)}"]
    for name, own in cells.items():
        lines.append(f"| {name} | {' | '.join(own[product] for product in PRODUCTS)} |")
    return "\n".join(lines)


def other_lines():
    """What the questions "kinds" and "cost" have found, as lines."""
    rows = read("evening.csv")
    told = [row for row in rows if row["question"] == "kinds"]
    right, photos = (sum(int(row[key]) for row in told) for key in ("count", "photos"))
    lines = [f"The kind was told rightly for {right} of {photos} good test photos."]
    for row in rows:
        if row["question"] == "cost":
            lines.append(f"{row['change']} {row['photos']} photos: "
                         f"{row['cpu_seconds']} CPU s, {row['memory_mb']} MB of "
                         f"memory, {row['disk_mb']} MB written")
    return lines


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", default="data", help="default: data")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    done = {row["question"] for row in read("evening.csv")}
    for name, question in QUESTIONS.items():
        if name in done:
            continue
        rows = [dict(row, question=name) for row in question(args.data_dir)]
        add_rows("evening.csv", COLUMNS, rows)
        print(f"{name}: {question.__doc__}", flush=True)
    print(table(), *other_lines(), sep="\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
