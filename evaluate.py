"""Evaluate: from the error of a reconstruction to AUROC, for every model here.

    error = (x_hat - x)^2       summed over the channels, at each place of an image. Of
                                features, the root of that sum at each token. It is
                                large where the model has not learned to reconstruct.
    score = the error's sum, its mean, or its largest mean of 16 x 16 pixels ("max"). Or
            "standardized": at each place (error - mean of the normals' errors) / their
            spread, then the mean of the largest 2.5 % of the places
    image AUROC                 the chance that an anomaly's score exceeds a normal's

    python evaluate.py RUN...   the numbers and pictures of saved runs, made again

The LAMP paper scores an image by the L2 between y and y_hat (Sec. 3.1), which we read
as the sum over its pixels. UniAD takes the root of a token's error, scales the map up
to the image, and scores by the largest mean of 16 x 16 pixels. The standardized score
and the thresholds are ours.

A first reading needs two sections: the metrics, and "from a model to scores". (It may
skip `aupro` and `left_out_scores`.) The others judge a test set with thresholds, read
runs from disk, print, and draw Fig. 4.

Three rules hold for every number:
  - AUROC below .5 stays below .5. (The authors' UniAD code reports .222 as .778.)
  - The last epoch counts, not the one that is best on the test images.
  - The threshold comes from normal images alone, see `threshold`.
"""
import argparse
import hashlib
import math
import textwrap
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import ndimage, stats
from sklearn import metrics as sklearn_metrics

from autoencoder import PCA, ConvAutoencoder
from data import images_needed, load, to_float, to_inputs
from uniad import Backbone, FeatureCNN, FeatureMLP, NearestToken, UniAD

VERSION = 5                             # of model.pt: raise it when its contents change
SOLVED = ("pca", "nearest")             # models that are solved, not trained by a loss
SCORES = ("sum", "mean", "max", "standardized")     # what a config's "score" may be
# Where the score is standardized, errors of images are blurred by a Gaussian. Its
# standard deviation is a 64th of an image's side for the score, which needs small
# defects, and a 32nd for pictures and pixel AUROC.
SCORE_BLUR, PICTURE_BLUR = 64, 32
METRICS = {"image_auroc": "image AUROC", "image_ap": "image AP",
           "pixel_auroc": "pixel AUROC", "pixel_aupro": "pixel AUPRO"}
FEATURE_CACHE = "runs/features"


# ---- metrics: to copy alone, with math, numpy, ndimage and sklearn_metrics ----

def auroc(scores, labels):
    """The chance that an anomaly (label 1) has a higher score than a normal image.

    scores, labels: (N,). None where all labels are alike.
    """
    if len(np.unique(labels)) < 2:
        return None
    return float(sklearn_metrics.roc_auc_score(labels, scores))


def average_precision(scores, labels):
    """The mean precision at the anomalies, ranked by score. None as for `auroc`."""
    if len(np.unique(labels)) < 2:
        return None
    return float(sklearn_metrics.average_precision_score(labels, scores))


def aupro(maps, masks, limit=0.3):
    """The area under the per-region overlap (Bergmann et al. 2020), from 0 to 1.

    maps: (N, H, W), high where anomalous. masks: (N, H, W), true where defective.
    At each threshold, the overlap of the detected pixels with a defect is averaged over
    all defects, which are the 8-connected parts of the masks. It is integrated over the
    false positive rate of all defect-free pixels, up to `limit`, and divided by it.
    Every value in the maps is a threshold, so the area is exact. None without defects,
    or without defect-free pixels. It is in neither paper; MVTec AD's authors use it.
    """
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)

    if masks.all() or not masks.any():
        return None

    # Give each defect a weight of 1, shared by its pixels, and each defect-free pixel a
    # weight of 1. The mean overlap is then the weighted share of the defective pixels
    # that are detected. So the curve is a weighted ROC curve.
    weight = np.ones(maps.shape)
    for i in np.flatnonzero(masks.any((1, 2))):
        parts, _ = ndimage.label(masks[i], np.ones((3, 3)))
        pixels = np.bincount(parts.ravel())                 # part 0 is no defect
        weight[i] = np.where(masks[i], 1 / pixels[parts], 1)
    fpr, overlap, _ = sklearn_metrics.roc_curve(
        masks.ravel(), maps.ravel(), sample_weight=weight.ravel())

    # Integrate from 0 to the limit, where the curve is interpolated.
    inside = fpr <= limit
    x = np.append(fpr[inside], limit)
    y = np.append(overlap[inside], np.interp(limit, fpr, overlap))
    area = sklearn_metrics.auc(x, y) / limit
    return float(min(area, 1.0))                            # 1 + 1e-16 is rounding


def threshold(scores, fpr=0.05):
    """The threshold that a new normal image exceeds with a probability of at most fpr.

    scores: (n,), of normal images that were not trained on. It is their
    ceil((n + 1) (1 - fpr))-th smallest (conformal prediction). With fewer than
    1/fpr - 1 images even the largest is too small for that. It is taken all the same,
    and a new normal image exceeds it with a probability of up to 1/(n + 1).
    """
    ordered = np.sort(np.asarray(scores, dtype=float))
    return float(ordered[threshold_rank(len(ordered), fpr) - 1])


def threshold_rank(n, fpr):
    """The rank of the score that is the threshold, of n: 1 is the smallest."""
    rank = math.ceil(round((n + 1) * (1 - fpr), 9))         # 1 - 0.05 is not exact
    return min(rank, n)


# ---- from a model to scores ----

@torch.no_grad()
def error_maps(model, stored, prepare=to_float, leave_out=None):
    """The L2 error at each place: stored inputs (N, C, H, W) -> (N, H, W), on the CPU.

    prepare: turns stored inputs into what the model sees.
    Of images (up to 3 channels) the error is (x_hat - x)^2, summed over the channels.
    Of features it is the root of that, the distance of a token to its reconstruction.
    leave_out: (N,), the number whose tokens NearestToken may not use, see its `solve`.
    """
    device = next(model.parameters()).device
    model.eval()
    maps = []
    for start in range(0, len(stored), 64):
        x = prepare(stored[start:start + 64].to(device))            # (B, C, H, W)
        if leave_out is None:
            x_hat = model(x)
        else:
            x_hat = model(x, leave_out[start:start + 64])
        error = (x_hat.float() - x).square().sum(1)                 # (B, H, W)
        if x.shape[1] > 3:                          # no image has more than 3 channels
            error = error.sqrt()
        maps.append(error.cpu())
    return torch.cat(maps) if maps else torch.zeros(0, 1, 1)


def heat_maps(errors, size):
    """Errors (N, h, w) -> maps of the image's size, (N, size, size).

    Those of features are scaled up, as in UniAD. Those of images have that size.
    """
    if errors.shape[-1] == size:
        return errors
    maps = F.interpolate(errors[:, None], (size, size), mode="bilinear",
                         align_corners=True)
    return maps[:, 0]


def gaussian_blur(maps, sigma):
    """Maps (N, H, W), each blurred by a Gaussian of standard deviation sigma.

    Beyond its borders a map is continued with its border values.
    """
    smooth = ndimage.gaussian_filter(maps.numpy(), sigma, mode="nearest", truncate=3,
                                     axes=(1, 2))           # not from map to map
    return torch.from_numpy(smooth)


def place_statistics(errors):
    """What error is normal at each place: errors of normals (N, H, W) -> (2, H, W).

    The first map is the mean, the second one the `spread`.
    """
    return torch.stack([errors.mean(0), spread(errors.std(0, correction=0))])


def spread(std):
    """A map of standard deviations, plus their mean over all places.

    Without the mean, a place where the normals happen to agree would dominate a score.
    """
    return (std + std.mean()).clamp(min=1e-12)


def standardize(errors, statistics):
    """How many spreads errors (N, H, W) lie above the normals' mean at that place."""
    mean, spreads = statistics
    return (errors - mean) / spreads


def image_scores(maps, how="sum"):
    """One score for each image: (N, H, W) -> (N,).

    how: "sum" is the LAMP paper's score. "mean" gives the same ranking. "max" is the
    score of UniAD, the largest average over 16 x 16 pixels of a map of 224. "top" is
    the mean of the largest 2.5 % of the values. Raises ValueError for another word.
    """
    values = maps.flatten(1)
    if how == "sum":
        return values.sum(1)
    if how == "mean":
        return values.mean(1)
    if how == "max":
        side = min(16, maps.shape[-1])
        return F.avg_pool2d(maps[:, None], side, stride=1).flatten(1).amax(1)
    if how != "top":
        raise ValueError(f"score must be sum, mean, max or top, got {how!r}")
    count = max(1, round(0.025 * values.shape[1]))
    return values.topk(count).values.mean(1)


def left_out_scores(errors, parts=None):
    """Standardized scores of normals, each by the statistics of the others.

    Only nearest tokens need it, since no image is set aside for them.
    errors: (N, H, W). parts: (N,), what each map shows; maps of one part have one
    number, and are left out together. With fewer than three parts none is left out.
    -> (N,)
    """
    if parts is None:
        parts = torch.arange(len(errors))
    if len(parts.unique()) < 3:
        return image_scores(standardize(errors, place_statistics(errors)), "top")
    # The sums over the others are those over all, less those over the image's own.
    errors = errors.double()
    total, squares = errors.sum(0), errors.square().sum(0)
    scores = torch.empty(len(errors))
    for part in parts.unique():
        own = parts == part
        others = len(errors) - int(own.sum())
        mean = (total - errors[own].sum(0)) / others
        variance = (squares - errors[own].square().sum(0)) / others - mean.square()
        statistics = mean, spread(variance.clamp(min=0).sqrt())
        above = standardize(errors[own], statistics)
        scores[own] = image_scores(above, "top").float()
    return scores


# ---- judging a test set ----

# `calibrate` takes from normal images what `judge` needs to judge the test images.

class Calibration(NamedTuple):
    """What judging takes from normal images. It is saved with a run."""
    size: int                           # the side of the images in pixels
    statistics: dict                    # category: (2, H, W), see `place_statistics`
    thresholds: dict                    # category: a number, or None without images
    images: dict                        # category: how many of its own were scored
    color_limit: float                  # the upper end of the heat maps' color scale
    scores: dict                        # category: the scores of those images, (n,)


class Judged(NamedTuple):
    """What judging says of M test images."""
    maps: torch.Tensor                  # (M, H, W), errors as heat maps
    scores: torch.Tensor                # (M,)
    thresholds: list                    # M, of each image's category
    color_limit: float


def sees_features(c):
    """Whether the model of this config sees features, or else the image itself."""
    return c["backbone"] != "none"


def is_of(categories, name):
    """Which of N images are of a category: (N,) bool."""
    return torch.tensor([other == name for other in categories], dtype=torch.bool)


def blurred(errors, c, size, divisor):
    """Errors of images, blurred by size/divisor pixels where the score is standardized.

    The error of a single pixel is mostly noise. Features need no blur. Scores that are
    not standardized are the papers' own, so their errors stay as they are.
    """
    if sees_features(c) or c["score"] != "standardized":
        return errors
    return gaussian_blur(errors, size / divisor)


def category_scores(errors, names, c, size, statistics):
    """Errors (N, H, W) -> the score of each image if it were of category k: (N, K).

    names: the K categories. There is more than one where a model learns many products.
    size, statistics: as in `Calibration`.
    """
    if c["score"] != "standardized":                        # one for all categories
        scores = image_scores(heat_maps(errors, size), c["score"])
        return scores[:, None].expand(-1, len(names))
    errors = blurred(errors, c, size, SCORE_BLUR)
    columns = []
    for name in names:
        above = standardize(errors, statistics[name])
        columns.append(image_scores(above, "top"))
    return torch.stack(columns, 1)


class NormalErrors(NamedTuple):
    """Error maps of normal images."""
    maps: torch.Tensor                  # (N, H, W)
    categories: list                    # N
    numbers: torch.Tensor               # (N,), which image each was made from
    parts: torch.Tensor = None          # (N,), what that image shows: near-copies share
                                        # a number. Of nearest tokens alone.


def errors_of_normals(model, c, inputs):
    """Errors of normals that the model has seen, and of others -> two NormalErrors.

    The first ones make the statistics, the second ones the threshold. A model that is
    trained has not seen the images set aside. For nearest tokens none are set aside:
    each image is compared with all the others, so one set of errors serves as both.
    """
    if c["model"] == "nearest":
        left_out = errors_of_left_out(model, inputs)
        return left_out, left_out
    seen = None
    if c["score"] == "standardized":                        # else nobody asks for it
        maps = error_maps(model, inputs.train, inputs.prepare)
        seen = NormalErrors(maps, inputs.train_categories, torch.arange(len(maps)))
    maps = error_maps(model, inputs.calibration, inputs.prepare)
    new = NormalErrors(maps, inputs.calibration_categories, torch.arange(len(maps)))
    return seen, new


def errors_of_left_out(model, inputs):
    """Errors of nearest tokens, with each image's own tokens left out of the bank.

    So are those of its near-copies, where photos/ has found some. Copies that photos/
    has made, and that the bank does not hold, are judged, too.
    """
    stored, numbers = inputs.train, torch.arange(len(inputs.train))
    if inputs.copies is not None:
        apart = ~inputs.copy_in_bank
        stored = torch.cat([stored, inputs.copies[apart]])
        numbers = torch.cat([numbers, inputs.copy_of[apart]])
    parts = numbers if inputs.parts is None else inputs.parts[numbers]
    maps = error_maps(model, stored, inputs.prepare, leave_out=parts)
    categories = [inputs.train_categories[number] for number in numbers]
    return NormalErrors(maps, categories, numbers, parts)


def calibrate(model, c, inputs, size):
    """Statistics, thresholds and the color scale, from normal images -> Calibration."""
    seen, new = errors_of_normals(model, c, inputs)
    standardized, nearest = c["score"] == "standardized", c["model"] == "nearest"
    statistics, scores, images, maps = {}, {}, {}, []
    for name in sorted(set(inputs.train_categories)):
        # What error is normal at each place, from images that the model has seen.
        if standardized:
            errors = seen.maps[is_of(seen.categories, name)]
            errors = blurred(errors, c, size, SCORE_BLUR)
            statistics[name] = place_statistics(errors)

        # The scores of other images, which set the threshold. For nearest tokens they
        # are the same ones, so each is left out of the statistics it is judged by.
        mine = is_of(new.categories, name)
        errors, numbers = new.maps[mine], new.numbers[mine]
        if standardized and nearest:
            scores[name] = left_out_scores(errors, new.parts[mine])
        else:
            scores[name] = category_scores(errors, [name], c, size, statistics)[:, 0]
        images[name] = len(numbers.unique())
        if len(errors):
            maps.append(heat_maps(blurred(errors, c, size, PICTURE_BLUR), size))

    # The color scale ends at twice the error that one normal pixel of 1,000 exceeds.
    highest = float(np.quantile(torch.cat(maps), 0.999)) if maps else 0.0
    color_limit = 2 * highest if highest > 0 else 1.0
    calibration = Calibration(size, statistics, {}, images, color_limit, scores)
    thresholds = {name: threshold_of(name, calibration, c["score"], c["fpr"])
                  for name in scores}
    return calibration._replace(thresholds=thresholds)


def set_by(name, calibration, how, fpr):
    """Which categories' scores set the threshold of a category: a list of names.

    Standardized scores of all categories have one unit. So where a category has too few
    images of its own for `fpr`, those of all categories serve.
    """
    if how == "standardized" and calibration.images[name] < images_needed(fpr):
        return list(calibration.scores)
    return [name]


def threshold_of(name, calibration, how, fpr):
    """The threshold of a category, or None without images."""
    names = set_by(name, calibration, how, fpr)
    scores = torch.cat([calibration.scores[other] for other in names])
    return threshold(scores, fpr) if len(scores) else None


def judge(model, c, data, inputs):
    """Judge a test set -> metrics (as in run.json), Judged, Calibration.

    Each image's score is that of its category. Two more image AUROCs stand beside it:
    `auroc_not_given` takes each image's lowest score over all categories, as if its
    category were not known; `auroc_paper` takes the papers' own score. (On CIFAR-10 it
    is not the paper's: there UniAD's code takes the map's mean.)
    """
    calibration = calibrate(model, c, inputs, data.test.shape[-1])

    # The score of each image by its own category, and its error as a heat map.
    names = list(calibration.thresholds)
    errors = error_maps(model, inputs.test, inputs.prepare)
    scores = category_scores(errors, names, c, calibration.size,
                             calibration.statistics)                        # (M, K)
    given = [names.index(name) for name in data.categories]
    smooth = blurred(errors, c, calibration.size, PICTURE_BLUR)
    judged = Judged(
        maps=heat_maps(smooth, calibration.size),
        scores=scores[torch.arange(len(errors)), given],
        thresholds=[calibration.thresholds[name] for name in data.categories],
        color_limit=calibration.color_limit)
    metrics = metrics_of(judged, data, calibration, c)

    # The same AUROC by two other scores.
    how = "max" if sees_features(c) else "sum"
    papers = image_scores(heat_maps(errors, calibration.size), how)
    metrics["auroc_not_given"] = mean_auroc(scores.amin(1), data, names)
    metrics["auroc_paper"] = mean_auroc(papers, data, names)
    sums = image_scores(errors, "sum")
    metrics["normal_error"] = mean_of(sums[data.labels == 0])
    metrics["anomaly_error"] = mean_of(sums[data.labels == 1])
    if c["model"] == "mlp" and c["depth"] == 1:
        metrics["distance_to_identity"] = model.distance_to_identity()
    return metrics, judged, calibration


def metrics_of(judged, data, calibration, c):
    """Metrics of a test set: of each category, and their mean. None: does not apply.

    fpr and tpr are the shares of normals and of anomalies above the threshold. An
    anomaly without a mask counts for the image's metrics only.
    """
    categories = {}
    for name, limit in calibration.thresholds.items():
        mine = is_of(data.categories, name)
        scores, labels = judged.scores[mine], data.labels[mine]
        setters = set_by(name, calibration, c["score"], c["fpr"])
        images = sum(calibration.images[setter] for setter in setters)
        m = {"image_auroc": auroc(scores, labels),
             "image_ap": average_precision(scores, labels),
             "pixel_auroc": None, "pixel_aupro": None,
             "threshold": limit, "threshold_images": images,
             "threshold_pooled": len(setters) > 1,
             "fpr": None, "tpr": None,
             "normals": int((labels == 0).sum()), "anomalies": int((labels == 1).sum())}
        if data.masks is not None:
            usable = data.masks[mine].flatten(1).any(1) | (labels == 0)
            maps = judged.maps[mine][usable].numpy()
            masks = data.masks[mine][usable].numpy()
            m["pixel_auroc"] = auroc(maps.ravel(), masks.ravel())
            m["pixel_aupro"] = aupro(maps, masks)
        if limit is not None:
            m["fpr"] = mean_of(scores[labels == 0] > limit)
            m["tpr"] = mean_of(scores[labels == 1] > limit)
        categories[name] = m

    mean = {}
    for key in (*METRICS, "fpr", "tpr"):
        mean[key] = mean_of([m[key] for m in categories.values() if m[key] is not None])
    limits = list(calibration.thresholds.values())
    mean["threshold"] = limits[0] if len(limits) == 1 else None
    return {**mean, "categories": categories}


def mean_auroc(scores, data, names):
    """The mean over categories of image AUROC by other scores (M,), or None."""
    aurocs = []
    for name in names:
        mine = is_of(data.categories, name)
        aurocs.append(auroc(scores[mine], data.labels[mine]))
    return mean_of([value for value in aurocs if value is not None])


def mean_of(values):
    """The mean as a float, or None of no values."""
    return float(np.mean([float(value) for value in values])) if len(values) else None


# ---- a run on disk ----

def build_model(c, shape, bank_tokens=0):
    """The model of a config, with its first weights.

    shape: (C, H, W) of what it sees. bank_tokens: the size of nearest tokens' bank.
    """
    channels, side, _ = shape
    if c["model"] == "ae":
        return ConvAutoencoder(channels, c["depth"], c["width"], c["latent"],
                               c["kernel_size"], c["patches"])
    if c["model"] == "pca":
        return PCA(channels, side, c["components"])
    if c["model"] == "nearest":
        return NearestToken(channels, bank_tokens)
    if c["model"] == "mlp":
        return FeatureMLP(channels, c["width"], c["depth"])
    if c["model"] == "cnn":
        return FeatureCNN(channels, c["width"], c["depth"])
    # "uniad", or "transformer", which is UniAD without mask and jitter, with one query.
    return UniAD(channels, side, c["width"], layers=c["depth"], query=c["query"],
                 neighbors=c["neighbors"], jitter=c["jitter"], dropout=c["dropout"],
                 start=c["start"])


def open_backbone(c, device="cpu", state=None):
    """The Backbone of a config, or None. It takes the statistics of a saved state."""
    if not sees_features(c):
        return None
    backbone = Backbone(c["backbone"], c["backbone_weights"], c["image_size"],
                        c["standardize"], c["strides"], c["grid_stride"])
    if state is not None:
        backbone.set_statistics(*state["backbone"])
    return backbone.to(device)


def open_data(c, device="cpu", state=None, data=None):
    """A config -> Data, Inputs, and Backbone or None.

    data: where it does not come from `load`. state: a saved run. Raises ValueError
    where the normal images are not those it was trained on: its threshold would not
    hold.
    """
    if data is None and c["dataset"] == "photos":
        raise ValueError("this run learned photos: python photos/judge.py judges more "
                         "of them, python photos/learn.py learns them again")
    if data is None:
        # MNIST and CIFAR-10 stay small. The Backbone enlarges them.
        scaled = c["dataset"] == "mvtec" or not sees_features(c)
        data = load(c["dataset"], c["normal"], c["data_dir"],
                    c["image_size"] if scaled else None, c["validate"])
    if state is not None and state["fingerprint"] != fingerprint_of(data):
        raise ValueError("the normal images are not those this run was trained on: its "
                         "data set has changed. Train again (--overwrite replaces it)")
    backbone = open_backbone(c, device, state)
    fpr = None if c["model"] == "nearest" else c["fpr"]
    return data, to_inputs(data, c["seed"], fpr, backbone, FEATURE_CACHE), backbone


def fingerprint_of(data):
    """A hash of the normal images."""
    return hashlib.sha256(data.train.numpy().tobytes()).hexdigest()


def pick_device(name):
    """The device of a name: "auto" is the first of cuda, mps and cpu that is there.

    Raises ValueError where there is no such device.
    """
    there = {"cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device in there if there[device])
    if not there.get(name):
        raise ValueError(f"--device {name}: PyTorch finds none here. Leave it out")
    return name


def load_run(path, device="cpu", finished=True):
    """A run's folder -> state, the dict in its model.pt, and the model.

    Nothing in the file is executed. finished: refuse a run that was cut short.
    Raises FileNotFoundError, and ValueError for a file that is damaged or of another
    version.
    """
    path = Path(path) / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file. A run is a folder that "
                                "train.py or photos/learn.py wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                  # torch raises many for a damaged file
        raise ValueError(f"{path} is damaged, or holds more than tensors and plain "
                         f"values. It was not loaded ({error!r:.80})") from None
    if not isinstance(state, dict) or state.get("version") != VERSION:
        raise ValueError(f"{path} is not a run of this version ({VERSION}): train it "
                         "again")
    if finished and "calibration" not in state:
        raise ValueError(f"{path}: its training was cut short. Finish it with "
                         f"python train.py --resume {path.parent}")
    bank_tokens = len(state["model"].get("bank", ()))
    model = build_model(state["config"], state["shape"], bank_tokens)
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        words = f"{path}: its tensors do not fit its config: {error}"
        raise ValueError(words) from None
    return state, model.to(device, memory_format=torch.channels_last).eval()


# ---- what is printed ----

def report(metrics, fpr):
    """Metrics as lines to print, the one number that counts last."""
    rows = metrics["categories"]
    shown = {**rows, "mean": metrics} if len(rows) > 1 else rows
    keys = [key for key in METRICS
            if any(row[key] is not None for row in rows.values())]
    lines = []
    if keys:                                    # there are test images of both kinds
        lines.append(" " * 20 + "".join(f"{METRICS[key]:>13}" for key in keys))
        for name, row in shown.items():
            numbers = "".join(f"{number(row[key]):>13}" for key in keys)
            lines.append(f"{printable(name)[:19]:<20}{numbers}")
    for name, row in rows.items():
        lines += about_threshold(name, row, fpr)
    if metrics["image_auroc"] is not None:
        lines.append(f"image AUROC {metrics['image_auroc']:.4f}: the chance that an "
                     "anomaly has a higher score than a normal image")
    return "\n".join(lines)


def about_threshold(name, row, fpr):
    """Lines about one category: what its threshold promises, and what was seen."""
    name = printable(name)
    lines = [f"threshold of {name}: {number(row['threshold'])}. "
             f"{promise(row['threshold_images'], fpr, row['threshold_pooled'])}"]
    normals, anomalies = row["normals"], row["anomalies"]
    if row["threshold"] is None or normals + anomalies == 0:
        return lines
    false_alarms = round((row["fpr"] or 0) * normals)
    found = round((row["tpr"] or 0) * anomalies)
    lines.append(f"  On the test images: {false_alarms} of {normals} normal ones and "
                 f"{found} of {anomalies} anomalous ones exceed it.")
    # A threshold that all categories have set promises nothing of a single one.
    own = normals and not row["threshold_pooled"]
    if own and more_than_promised(false_alarms, normals, row, fpr):
        lines.append("  WARNING: more normal test images exceed it than promised. They "
                     "differ from those trained on: add images like them to these.")
    if row["image_auroc"] is not None and row["image_auroc"] < 0.6:
        lines.append(f"  WARNING: image AUROC {row['image_auroc']:.2f} is hardly "
                     "better than chance, or worse. Do not use these verdicts: try "
                     "another model.")
    return lines


def more_than_promised(false_alarms, normals, row, fpr):
    """Whether chance gives so many false alarms in less than one case of a hundred.

    The threshold is the rank-th of n scores. If the test images are like those, how
    many of them exceed it has a beta-binomial distribution.
    """
    n = row["threshold_images"]
    rank = threshold_rank(n, fpr)
    chance = stats.betabinom(normals, n + 1 - rank, rank).sf(false_alarms - 1)
    return chance < 0.01


def promise(images, fpr, pooled=False):
    """What a threshold set by so many normal images promises, as a sentence.

    pooled: whether they are of all categories. Then so is the promise.
    """
    needed = images_needed(fpr)
    if images >= needed:
        of_all = " of all categories together" if pooled else ""
        return (f"About {fpr:.3g} of new normal images{of_all} exceed it, on average "
                f"over draws of the {images} normal images that set it.")
    most = 1 / (images + 1)
    return (f"It was set by too few normal images to promise {fpr:.3g}: by {images}, "
            f"where at least {needed} are needed. Up to {most:.2g} of new ones may "
            "exceed it.")


def printable(name):
    return str(name) if str(name).isprintable() else ascii(str(name))


def number(value, form=".4f"):
    return "-" if value is None else f"{value:{form}}"


# ---- what is drawn: the paper's Fig. 4 ----

def draw_examples(path, runs, data, footer):
    """The paper's Fig. 4: four normals and four anomalies, as runs reconstruct them.

    runs: {name: (model, inputs, judged)}. The first one decides titles, color scale and
    the choice: from the smallest to the largest score, evenly.
    """
    _, _, judged = next(iter(runs.values()))
    order = judged.scores.argsort()
    chosen = []
    for label in (0, 1):
        mine = order[data.labels[order] == label]
        evenly = torch.linspace(0, len(mine) - 1, min(4, len(mine))).long()
        chosen += mine[evenly].tolist()
    if not chosen:
        return
    rows = {"input": to_float(data.test[chosen])}
    for name, (model, inputs, own) in runs.items():
        rows[f"{name} reconstruction"] = reconstruct(model, inputs, inputs.test[chosen])
        rows[f"{name} error"] = own.maps[chosen]
    if data.masks is not None:
        rows["mask"] = data.masks[chosen]
    titles = []
    for i in chosen:
        kind = "anomaly" if data.labels[i] else "normal"
        score, limit = judged.scores[i], judged.thresholds[i]
        titles.append(f"{kind}\nscore {score:.3g} (threshold {number(limit, '.3g')})")
    draw_columns(path, rows, titles, judged.color_limit, footer)


@torch.no_grad()
def reconstruct(model, inputs, stored):
    """Stored inputs -> their reconstructions as images (N, C, H, W)."""
    device = next(model.parameters()).device
    x_hat = model.eval()(inputs.prepare(stored.to(device))).float()
    if inputs.images is None:
        return x_hat.cpu()
    step = math.ceil(len(inputs.train) / 400)               # of up to 400 images
    features = []
    for some in inputs.train[::step].split(64):
        features.append(inputs.prepare(some.to(device)))
    return draw_tokens(x_hat, torch.cat(features), to_float(inputs.images[::step]))


@torch.no_grad()
def draw_tokens(f_hat, bank, images):
    """Features as images to look at: (N, C', g, g) -> (N, C, 16 g, 16 g).

    UniAD's authors train a decoder to draw them. Here each token becomes the image
    patch of its nearest token in a bank.
    bank: (M, C', g, g), the features of `images`, (M, C, H, W).
    """
    grid = f_hat.shape[-1]
    tokens = bank.movedim(1, -1).flatten(0, 2)                      # (M g g, C')
    resized = F.interpolate(images, 16 * grid, mode="bilinear")
    patches = F.unfold(resized, 16, stride=16).mT.flatten(0, 1)     # (M g g, C 16 16)
    nearest = [torch.cdist(f.flatten(1).T, tokens).argmin(1).cpu() for f in f_hat]
    drawn = patches[torch.stack(nearest)]                           # (N, g g, C 16 16)
    return F.fold(drawn.mT, 16 * grid, 16, stride=16)


def draw_columns(path, rows, titles, color_limit, footer):
    """A picture with a column for each image.

    rows: {name: images (N, C, H, W), or error maps (N, H, W), or masks (N, H, W) bool}.
    Errors are drawn as heat, from 0 to color_limit. titles: N, over the columns.
    """
    size = 1.5 * len(titles) + 1, 1.5 * len(rows) + 0.8
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, row) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=7, parse_math=False)
        for axis, x in zip(line, row):
            if x.dim() == 3:                                                # (C, H, W)
                axis.imshow(x.clamp(0, 1).expand(3, -1, -1).movedim(0, -1).numpy())
            else:
                highest = 1 if x.dtype == torch.bool else color_limit
                axis.imshow(x.numpy(), cmap="inferno", vmin=0, vmax=highest)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=7, parse_math=False)
    footer = "\n".join(textwrap.wrap(footer, 160))
    figure.supxlabel(footer, fontsize=7, parse_math=False)
    with warnings.catch_warnings():                         # names in any script
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(path, dpi=90)


# ---- the command ----

def evaluate_run(run, data_dir=None, device="cpu"):
    """Judge the test set of a saved run again: print its metrics, draw examples.png.

    The threshold is taken anew, too, from the same normal images.
    """
    state, model = load_run(run, device)
    c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
    data, inputs, _ = open_data(c, device, state)
    metrics, judged, _ = judge(model, c, data, inputs)
    draw_examples(Path(run) / "examples.png", {"": (model, inputs, judged)}, data,
                  f"python evaluate.py {run}")
    print(f"{run}\n{report(metrics, c['fpr'])}")


def main(argv=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folders by train.py")
    parser.add_argument("--data-dir", help="where data are (default: as in the run)")
    parser.add_argument("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    try:
        device = pick_device(args.device)
        for run in args.runs:
            evaluate_run(run, args.data_dir, device)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
