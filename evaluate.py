"""Evaluate: from errors to verdicts; judge a saved run anew, or new images.

    python evaluate.py RUN...                           # numbers and pictures of saved runs
    python evaluate.py RUN --image FILE-OR-FOLDER...    # a verdict and a heat map for each image

The same scores judge every model: the L2 error, or how far it lies above the normals' own there.
AUROC is never flipped below .5 (the authors' UniAD code reports .222 as .778), the last epoch
counts, not the best on the test set, and the threshold comes from normal images alone.
"""
import argparse
import csv
import os
import shutil
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
from scipy import stats

from autoencoder import (PCA, ConvAutoencoder, NearestToken, aupro, auroc, average_precision,
                         draw_columns, draw_laid_over, error_maps, gaussian_blur, heat_maps,
                         image_scores, left_out_scores, mean_of, place_statistics, promise,
                         standardize, threshold)
from data import FOLDERS, list_images, load, read_image, resize, to_float, to_inputs
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD, draw_tokens

VERSION = 4                                                 # of model.pt; raise it with a change
SOLVED = ("pca", "nearest")                                 # not trained by a loss
SCORES = ("sum", "mean", "max", "standardized")
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro")
FEATURE_CACHE = "runs/features"
Judged = namedtuple("Judged", "maps scores thresholds color_limit")     # (M, H, W), (M,), M


# ---- a run on disk; models are built here, so that it is read without what trains them ----

def build_model(c, shape):
    """Config, and shape (C, H, W) of what the model sees -> the model, not trained."""
    channels, side, _ = shape
    name, depth = c["model"], c["depth"]
    if name == "ae":
        return ConvAutoencoder(channels, depth, c["width"], c["latent"], c["kernel_size"],
                               c["patches"])
    if name == "pca":
        return PCA(channels, side, c["latent"])
    if name == "nearest":
        return NearestToken(channels, side, c["latent"] // c["turns"], c["turns"])
    if name in ("mlp", "cnn"):
        return {"mlp": FeatureMLP, "cnn": FeatureCNN}[name](channels, c["width"], depth)
    return UniAD(channels, side, c["width"], layers=depth, neighbors=c["neighbors"],
                 jitter=c["jitter"], dropout=c["dropout"], query=c["query"])    # transformer, too


def sees_features(c):
    return c["backbone"] != "none"


def open_backbone(c, device):
    if sees_features(c):
        return Backbone(c["backbone"], c["backbone_weights"], c["image_size"],
                        c["standardize"]).to(device)


def open_data(c, device="cpu", state=None):
    """Config -> Data, Inputs, Backbone or None. state: of a saved run, whose feature statistics and
    images set aside then hold."""
    size = c["image_size"] if c["dataset"] in FOLDERS or not sees_features(c) else None
    saved = state or dict(white=None, backbone=None, keys=None)
    data = load(c["dataset"], c["normal"], c["data_dir"], size, c["validate"], saved["white"])
    backbone = open_backbone(c, device)                     # which scales labeled images itself
    inputs = to_inputs(data, c["seed"], backbone, FEATURE_CACHE, saved["backbone"], saved["keys"],
                       None if c["model"] == "nearest" else c["fpr"])
    if c["dataset"] not in FOLDERS:                         # its normal classes are one category
        task = data.categories[0]
        inputs = inputs._replace(train_classes=[task] * len(inputs.train),
                                 held_classes=[task] * len(inputs.held))
    return data, inputs, backbone


def load_run(path, device="cpu", finished=True):
    """A run's folder -> state, the dict in its model.pt, and model; nothing in it is executed.
    Raises FileNotFoundError, ValueError (damaged, of another version, not finished)."""
    path = Path(path) / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a folder that train.py wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # of many kinds, all about this file
        raise ValueError(f"{path}: damaged, or not plain: not loaded ({error!r:.80})") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path}: not a run of this version ({VERSION}); train it again")
    if finished and "known" not in state:
        raise ValueError(f"{path}: its training was cut short: train.py --resume ends it")
    model = build_model(state["config"], state["shape"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit its config: {error}") from None
    return state, model.to(device, memory_format=torch.channels_last).eval()


# ---- judging ----

def of_category(owners, name):
    """Which images are of a category: N names -> (N,) bool."""
    return torch.tensor([owner == name for owner in owners], dtype=torch.bool)


def smooth(errors, c, size, share):
    """Errors of images (N, H, W) blurred with a sigma of size/share pixels, a single pixel being
    mostly noise (64 for scores, 32 for maps). Features' stay, and all where the score is raw."""
    raw = sees_features(c) or c["score"] != "standardized"
    return errors if raw else gaussian_blur(errors, size / share)


def category_scores(errors, names, c, known):
    """Errors (N, H, W) -> each image's score if it were of category k: (N, K) for K names."""
    if c["score"] != "standardized":
        scores = image_scores(heat_maps(errors, known["size"]), c["score"])
        return scores[:, None].expand(-1, len(names))
    errors = smooth(errors, c, known["size"], 64)
    return torch.stack([image_scores(standardize(errors, known["statistics"][name]), "top")
                        for name in names], 1)


def calibrate(model, c, inputs, size):
    """What judging takes from normal images, a dict: `size` of the images; `statistics` of the
    errors by category; `thresholds`, {category: (threshold or None, number of its own images)};
    `color_limit`, the upper end of the heat maps' color scale."""
    known, scores, maps = dict(size=size, statistics={}, thresholds={}), {}, []
    standardized, nearest = c["score"] == "standardized", c["model"] == "nearest"
    held = error_maps(model, inputs.held, inputs.prepare)                   # of nearest none
    trained = error_maps(model, inputs.train, inputs.prepare) if standardized or nearest else None
    for name in sorted(set(inputs.train_classes)):
        seen = of_category(inputs.train_classes, name)
        new = trained[seen] if nearest else held[of_category(inputs.held_classes, name)]
        if standardized:
            known["statistics"][name] = place_statistics(smooth(trained[seen], c, size, 64))
        if standardized and nearest:
            scores[name] = left_out_scores(new)
        else:
            scores[name] = category_scores(new, [name], c, known)[:, 0]
        maps.append(heat_maps(smooth(new, c, size, 32), size))
    for name, mine in scores.items():
        own = len(mine)                                     # what the threshold can promise
        if standardized and own < 1 / c["fpr"] - 1:
            mine = torch.cat(list(scores.values()))         # of one unit, so that all may serve
        known["thresholds"][name] = (threshold(mine, c["fpr"]) if len(mine) else None, own)
    maps = torch.cat(maps)
    known["color_limit"] = 2 * float(np.quantile(maps, 0.999)) if maps.any() else 1.0
    return known


def judge(model, c, data, inputs):
    """The test set -> metrics as in run.json, Judged, and what `calibrate` returns. untold_auroc:
    by each image's lowest score over the categories; raw_auroc: by the papers' own score."""
    known = calibrate(model, c, inputs, data.test.shape[-1])
    names, thresholds = [*known["thresholds"]], known["thresholds"]
    if lost := {*data.categories} - {*names}:
        raise ValueError(f"{', '.join(lost)}: all normal images are gone, or copies of others")
    errors = error_maps(model, inputs.test, inputs.prepare)
    scores = category_scores(errors, names, c, known)                       # (M, K)
    told = scores[range(len(errors)), [names.index(name) for name in data.categories]]
    maps = heat_maps(smooth(errors, c, known["size"], 32), known["size"])
    judged = Judged(maps, told, [thresholds[name][0] for name in data.categories],
                    known["color_limit"])
    m = measure(judged, data, thresholds)
    papers = image_scores(heat_maps(errors, known["size"]), "max" if sees_features(c) else "sum")
    no_masks = data._replace(masks=None)
    for key, others in (("untold_auroc", scores.amin(1)), ("raw_auroc", papers)):
        m[key] = measure(judged._replace(scores=others), no_masks, thresholds)["image_auroc"]
    sums = image_scores(errors, "sum")
    m["normal_error"], m["anomaly_error"] = (mean_of(sums[data.labels == i]) for i in (0, 1))
    if (c["model"], c["depth"]) == ("mlp", 1):
        m["from_identity"] = model.from_identity()
    return m, judged, known


def measure(judged, data, thresholds):
    """Metrics of a test set: of each category, and their mean; None where one does not apply."""
    categories = {}
    for name, (limit, normals) in thresholds.items():
        mine = of_category(data.categories, name)
        scores, labels = judged.scores[mine], data.labels[mine]
        m = dict(image_auroc=auroc(scores, labels), image_ap=average_precision(scores, labels),
                 pixel_auroc=None, pixel_aupro=None, threshold=limit, threshold_images=normals)
        if data.masks is not None:                          # an anomaly without mask is left out
            marked = data.masks[mine].flatten(1).any(1) | (labels == 0)
            maps, masks = judged.maps[mine][marked].numpy(), data.masks[mine][marked].numpy()
            m["pixel_auroc"] = auroc(maps.ravel(), masks.ravel())
            m["pixel_aupro"] = aupro(maps, masks)
        for rate, label in (("fpr", 0), ("tpr", 1)):
            m[rate] = None if limit is None else mean_of(scores[labels == label] > limit)
        m["normals"] = int((labels == 0).sum())
        categories[name] = m
    mean = {key: mean_of([m[key] for m in categories.values() if m[key] is not None])
            for key in (*METRICS, "fpr", "tpr")}
    mean["threshold"] = m["threshold"] if len(categories) == 1 else None
    return {**mean, "categories": categories}


# ---- what is printed and drawn ----

def describe(m, fpr):
    """Metrics as lines to print, and what to know before trusting the thresholds."""
    rows, lines = [*m["categories"].items()], [" " * 20 + "".join(f"{key:>13}" for key in METRICS)]
    for name, row in [*rows, ("mean", m)] if len(rows) > 1 else rows:
        numbers = "".join(f"{number(row[key]):>13}" for key in METRICS)
        lines.append(f"{printable(name)[:19]:<20}{numbers}")
    if m["image_auroc"] is None:
        lines.append("-: a metric needs both normal and anomalous test images")
    for name, row in rows:
        lines.append(f"threshold of {name} {number(row['threshold'])}, "
                     f"{promise(row['threshold_images'], fpr)}")
        for key, kind in (("fpr", "normal"), ("tpr", "anomalous")):
            if row[key] is not None:
                lines[-1] += f"; {row[key]:.4f} of the {kind} test images exceed it"
        above, normals = round((row["fpr"] or 0) * row["normals"]), row["normals"]
        if normals and stats.binomtest(above, normals, fpr, "greater").pvalue < 0.01:
            lines.append(f"WARNING: {above} of {normals} normal test images of {name} exceed it: "
                         "they differ from those trained on; add images like them to train/good")
        if row["image_auroc"] is not None and row["image_auroc"] < 0.6:
            lines.append(f"WARNING: image AUROC {row['image_auroc']:.2f} of {name}, hardly better "
                         "than chance or worse: do not use these verdicts; try another --model")
    return "\n".join(lines)


def printable(name):
    return str(name) if str(name).isprintable() else ascii(str(name))


def number(value, form=".4f"):
    return "-" if value is None else f"{value:{form}}"


def verdict(score, limit):
    return "no verdict" if limit is None else "normal" if score <= limit else "anomalous"


@torch.no_grad()
def reconstruct(model, inputs, stored):
    """Stored inputs -> their reconstructions as images; of features, see `uniad.draw_tokens`."""
    device = next(model.parameters()).device
    y_hat = model.eval()(inputs.prepare(stored.to(device))).float()
    if inputs.images is None:
        return y_hat.cpu()
    some = slice(None, None, -(-len(inputs.train) // 400))                  # up to 400 images
    bank = torch.cat([inputs.prepare(f.to(device)) for f in inputs.train[some].split(64)])
    return draw_tokens(y_hat, bank, to_float(inputs.images[some]))


def draw_examples(path, runs, data, footer):
    """The paper's Fig. 4: four normals and four anomalies, from the smallest score to the largest.
    runs: {name: (model, inputs, judged)}; the first decides the order, titles and color scale."""
    judged = next(iter(runs.values()))[2]
    order, picked = judged.scores.argsort(), []
    for label in (0, 1):
        mine = order[data.labels[order] == label]
        picked += mine[torch.linspace(0, len(mine) - 1, min(4, len(mine))).long()].tolist()
    if not picked:
        return
    rows, titles = {"input": to_float(data.test[picked])}, []
    for name, (model, inputs, own) in runs.items():
        rows[f"{name} reconstruction"] = reconstruct(model, inputs, inputs.test[picked])
        rows[f"{name} error"] = own.maps[picked]
    rows["mask"] = None if data.masks is None else data.masks[picked]
    for i in picked:
        score, limit = judged.scores[i], judged.thresholds[i]
        kind = "anomaly" if data.labels[i] else "normal"
        titles.append(f"{kind}: {verdict(score, limit)}\n{score:.3g} ({number(limit, '.3g')})")
    draw_columns(path, rows, titles, judged.color_limit, footer)


# ---- new images ----

def judge_files(run, paths, device, category, pictures):
    """A verdict, a row of RUN/judged.csv and a picture in RUN/judged for each image in files and
    folders -> exit status: 0; 1: one is anomalous; 2: one has no verdict or cannot be read."""
    state, model = load_run(run, device)
    c, known, prepare, status = state["config"], state["known"], to_float, 0
    if sees_features(c):
        backbone = open_backbone(c, device)
        backbone.load_state_dict(state["backbone"], strict=False)
        prepare = lambda x: backbone(to_float(x))
    if category not in (None, *known["thresholds"]):
        raise ValueError(f"--category {category}: {run} knows {', '.join(known['thresholds'])}")
    names = [category] if category else [*known["thresholds"]]
    for name in names:
        limit, images = known["thresholds"][name]
        print(f"threshold of {name} {number(limit)}, {promise(images, c['fpr'])}")
    files = list_images(paths)
    if not files:
        raise ValueError(f"no images in {', '.join(map(str, paths))}: nothing was judged")
    rows, folder = open_report(Path(run), pictures)
    for start in range(0, len(files), 32):
        part = files[start:start + 32]
        readable, images = read_batch(part, state)
        status = 2 if len(readable) < len(part) else status
        errors = error_maps(model, images, prepare)
        maps = heat_maps(smooth(errors, c, known["size"], 32), known["size"])
        scores = category_scores(errors, names, c, known).tolist()
        for file, image, error, own in zip(readable, images, maps, scores):
            name, score, limit = best_fit(own, names, known["thresholds"])
            word, of = verdict(score, limit), f", {name}" if len(names) > 1 else ""
            print(f"{printable(file)}: {word}, score {score:.5g}, threshold {number(limit)}{of}")
            y, x = divmod(int(error.argmax()), known["size"])
            rows.writerow([file, score, limit, word, name, x / known["size"], y / known["size"]])
            status = max(status, ("normal", "anomalous", "no verdict").index(word))
            if folder:
                path = folder / f"{len(list(folder.iterdir())) + 1:05}-{file.stem[:60]}.png"
                draw_laid_over(path, to_float(image), error / known["color_limit"],
                               [printable(file.name), f"{word}, {score:.4g}"])
    return status


def best_fit(scores, names, thresholds):
    """-> name, score and threshold of the category whose threshold an image exceeds least."""
    limits = [thresholds[name][0] for name in names]
    excess = [float("inf") if limit is None else score / max(limit, 1e-12)
              for score, limit in zip(scores, limits)]
    best = excess.index(min(excess))
    return names[best], scores[best], limits[best]


def read_batch(files, state):
    """-> those of the files that are images, and these as the run's model was fed them."""
    channels, side, _ = state["image"]
    padded = state["config"]["dataset"] in ("mnist", "fashion_mnist") and side == 32    # as trained
    readable, images = [], torch.empty(len(files), 3, side, side, dtype=torch.uint8)
    for file in files:
        try:
            image = read_image(file, 28 if padded else side, state["white"])
            images[len(readable)] = resize(image[None], side)[0]
            readable.append(file)
        except ValueError as error:
            print(error, file=sys.stderr)
    images = images[:len(readable)]
    gray = images.float().mean(1, keepdim=True).round().byte()
    return readable, gray if channels == 1 else images


def open_report(run, pictures):
    """-> a CSV writer, and the pictures' folder or None; a read-only run is no reason to stop."""
    folder = run / "judged"
    try:
        shutil.rmtree(folder, ignore_errors=True)           # of an earlier call
        if pictures:
            folder.mkdir()
        stream = open(run / "judged.csv", "w", newline="", buffering=1, encoding="utf-8",
                      errors="backslashreplace")
    except OSError as error:
        print(f"no CSV and no pictures are written: {error}", file=sys.stderr)
        pictures, stream = False, open(os.devnull, "w")
    rows = csv.writer(stream)
    rows.writerow(["file", "score", "threshold", "verdict", "category", "peak_x", "peak_y"])
    return rows, folder if pictures else None


def evaluate_run(run, data_dir, device):
    state, model = load_run(run, device)
    c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
    data, inputs, _ = open_data(c, device, state)
    metrics, judged, _ = judge(model, c, data, inputs)
    draw_examples(Path(run) / "examples.png", {"": (model, inputs, judged)}, data,
                  f"python evaluate.py {run}")
    print(f"{run}\n{describe(metrics, c['fpr'])}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="a folder that train.py wrote")
    add("--image", nargs="+", metavar="FILE", help="judge these images, or all in these folders")
    add("--category", help="with --image: what they show, of a run of several categories")
    add("--pictures", action=argparse.BooleanOptionalAction, default=True, help="with --image")
    add("--data-dir", help="where the data sets are (default: where the run found them)")
    add("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")     # names in any script
    if args.category and not args.image:
        parser.error("--category says what new images show: give them by --image")
    status = 0
    try:
        for run in args.runs:
            if args.image:
                judged = judge_files(run, args.image, args.device, args.category, args.pictures)
                status = max(status, judged)
            else:
                evaluate_run(run, args.data_dir, args.device)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:    # of torch: no CUDA
        parser.exit(2, f"evaluate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
