"""Evaluate: anomaly scores, metrics, threshold and pictures; from a saved run to numbers.

Every model here reconstructs its input, so one score judges them all: the L2 error between input
and reconstruction, whatever the training loss (LAMP paper, Sec. 3.1, "Evaluation metric").
    autoencoder   map = sum over C of (y_hat - y)^2;   image score = its sum
    UniAD & co.   map = L2 norm over C of f_hat - f, upsampled;   score = max after 16x16 averaging
AUROC is never flipped below .5 (the authors' UniAD code reports .222 as .778), the last epoch is
reported (not the best on the test set), and the threshold comes from normal images alone.

    python evaluate.py RUN...                     recompute numbers and pictures
    python evaluate.py RUN --image FILE...        score, threshold, verdict and heat map of new images
    python evaluate.py --table results/ten-digits print a table of the README
"""
import argparse
import json
import math
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from sklearn import metrics as sk

from autoencoder import ConvAutoencoder
from data import load, read_image, resize, to_float
from lamp_loss import l2
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD, cached_features

LAYOUT = 1                                                  # of model.pt; raise it when that changes


def unified(c, shape):
    return UniAD(shape[0], shape[1], neighbors=c["neighbors"], jitter=c["jitter"], query=c["query"])


MODELS = {                                                  # name: (config, input shape) -> model
    "ae": lambda c, shape: ConvAutoencoder(shape[0], c["depth"], c["width"], c["latent"],
                                           c["kernel_size"], c["patches"]),
    "uniad": unified, "transformer": unified,
    "mlp": lambda c, shape: FeatureMLP(shape[0]), "cnn": lambda c, shape: FeatureCNN(shape[0]),
}


# ---- scores and metrics ----

@torch.no_grad()
def anomaly_maps(model, x, size, prepare=to_float, batch_size=64):
    """Error of each pixel: inputs (N, C, H, W) -> (N, size, size) float32, on the CPU.

    The squared L2 error summed over channels. Where the model's grid is coarser than `size` (CNN
    features) its root, the L2 norm of each token's error, is upsampled (bilinear, corners aligned).
    prepare: stored inputs -> what the model sees.
    """
    device, maps = next(model.parameters(), x).device, [torch.empty(0, size, size)]
    model.eval()
    for batch in x.split(batch_size):
        y = prepare(batch.to(device))
        error = l2(model(y).float(), y).sum(1, keepdim=True)                # (B, 1, H, W)
        if error.shape[-1] != size:
            error = F.interpolate(error.sqrt(), (size, size), mode="bilinear", align_corners=True)
        maps.append(error[:, 0].cpu())
    return torch.cat(maps)


def image_scores(maps, how="sum"):
    """One score an image: (N, H, W) -> (N,). how: sum, mean or std over its pixels, or max after
    averaging over 16x16 pixels (as the authors of UniAD do), so that no single pixel decides."""
    if how == "max":
        return F.avg_pool2d(maps[:, None], min(16, maps.shape[-1]), stride=1).flatten(1).amax(1)
    return {"sum": torch.sum, "mean": torch.mean, "std": torch.std}[how](maps.flatten(1), 1)


def auroc(scores, labels):
    """The chance that an anomaly (label 1) outranks a normal; None where one kind is missing."""
    return float(sk.roc_auc_score(labels, scores)) if 0 < sum(labels) < len(labels) else None


def average_precision(scores, labels):
    """Area under precision against recall; None where one kind is missing."""
    labels = np.asarray(labels)
    return float(sk.average_precision_score(labels, scores)) if 0 < labels.sum() < labels.size else None


def pixel_auroc(maps, masks):
    """AUROC of single pixels: maps (N, H, W), masks (N, H, W) bool; None without any mask."""
    return auroc(np.asarray(maps).ravel(), np.asarray(masks).ravel()) if len(maps) else None


def aupro(maps, masks, limit=0.3):
    """Area under the per-region overlap (Bergmann et al. 2020): (N, H, W) twice -> 0 to 1, or None.

    At each threshold: the overlap of the detected pixels with each defect (8-connected part of a
    mask), averaged over defects, against the false positive rate over all defect-free pixels,
    those of normal images included. Integrated up to FPR = limit and divided by limit; exact, a
    threshold at every value.
    """
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    weight, parts = np.zeros(maps.shape), 0                 # the pixels of a defect share weight 1
    for i in np.flatnonzero(masks.any((1, 2))):
        part, count = ndimage.label(masks[i], np.ones((3, 3)))
        weight[i] = np.where(part > 0, 1 / np.bincount(part.ravel())[part], 0)
        parts += count
    if parts == 0 or masks.all():
        return None
    order = np.argsort(-maps, axis=None, kind="stable")
    threshold_here = np.append(np.diff(maps.ravel()[order]) != 0, True)     # equal values go together
    fpr = np.cumsum(~masks.ravel()[order])[threshold_here] / (~masks).sum()
    pro = np.cumsum(weight.ravel()[order])[threshold_here] / parts
    fpr, pro = np.append(0, fpr), np.append(0, pro)
    inside = fpr <= limit
    at_limit = np.interp(limit, fpr, pro)
    area = sk.auc(np.append(fpr[inside], limit), np.append(pro[inside], at_limit))
    return float(min(area / limit, 1.0))                    # 1 + 1e-16 is rounding


def threshold(scores, fpr=0.05):
    """The ceil((n + 1)(1 - fpr))-th smallest of n scores of normal images that were not trained on.

    A new normal image exceeds it with probability at most fpr (conformal prediction), if n is at
    least 1/fpr - 1; below that no score is large enough, and the largest is returned.
    """
    scores = torch.as_tensor(scores).sort().values
    rank = math.ceil(round((len(scores) + 1) * (1 - fpr), 9))
    return float(scores[min(rank, len(scores)) - 1])


def measure(scores, maps, data):
    """Metrics of a test set: of each category, and their mean; null where one does not apply."""
    labels, owner, each = data.labels.numpy(), np.array(data.categories), {}
    for name in dict.fromkeys(data.categories):
        mine, pixel = owner == name, {"pixel_auroc": None, "pixel_aupro": None}
        if data.masks is not None:                          # an anomaly without mask is left out
            known = np.flatnonzero(mine & (data.masks.flatten(1).any(1).numpy() | (labels == 0)))
            pixel = {"pixel_auroc": pixel_auroc(maps[known], data.masks[known]),
                     "pixel_aupro": aupro(maps[known], data.masks[known])}
        each[name] = {"image_auroc": auroc(scores[mine], labels[mine]),
                      "image_ap": average_precision(scores[mine], labels[mine]), **pixel}
    values = {key: [m[key] for m in each.values() if m[key] is not None]
              for key in ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro")}
    return {**{key: float(np.mean(v)) if v else None for key, v in values.items()}, "categories": each}


# ---- from a configuration to inputs, from a run to a model ----

Inputs = namedtuple("Inputs", "train held test prepare")    # stored tensors; stored -> model's input


def split(classes, seed, share=0.1):
    """Indices of the normals to train on, and of those set aside for the threshold: 10 % of each
    class (at least one, where it has two), drawn by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    train, held, classes = [], [], np.array(classes)
    for name in sorted(set(classes.tolist())):
        mine = torch.from_numpy(np.flatnonzero(classes == name))
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = max(int(share * len(mine)), min(1, len(mine) - 1))
        held.append(mine[:count])
        train.append(mine[count:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def open_data(c, device="cpu", standardized=None):
    """Config -> Data, Inputs, Backbone (None for images).

    standardized: the features' mean and std in a saved run; fitted on the training part when None.
    """
    native = c["model"] != "ae" and c["dataset"] not in ("mvtec", "folder")     # scaled by the Backbone
    data = load(c["dataset"], c["normal"], c["data_dir"], None if native else c["image_size"],
                c["validate"])
    train, held = split(data.train_classes, c["seed"])
    if c["model"] == "ae":
        return data, Inputs(data.train[train], data.train[held], data.test, to_float), None
    backbone = Backbone(c["backbone"], c["backbone_weights"], c["image_size"]).to(device)
    stored, test, prepare = data.train, data.test, lambda x: backbone(to_float(x))
    if c["cache"]:
        stored = cached_features(backbone, data.train, data.train_classes, c["cache_dir"])
        test = cached_features(backbone, data.test, data.categories, c["cache_dir"])
        prepare = backbone.standardize
    if standardized:
        backbone.load_state_dict(standardized, strict=False)
    elif c["standardize"]:
        backbone.fit(stored[train])
    return data, Inputs(stored[train], stored[held], test, prepare), backbone


def load_run(path, device="cpu"):
    """A run folder (or its model.pt) -> (state, model), with nothing executed from the file.

    state: the dict in model.pt (config, shape, history, threshold, ...). Raises FileNotFoundError,
    and ValueError where the file is damaged, not of this layout, or holds another model's tensors.
    """
    path = Path(path) / "model.pt" if Path(path).suffix != ".pt" else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a folder that train.py wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # of many kinds, all of them about the file
        raise ValueError(f"{path}: damaged, or holds more than tensors and plain values, and was not "
                         f"loaded ({str(error).splitlines()[0][:80]})") from None
    if not isinstance(state, dict) or state.get("layout") != LAYOUT:
        raise ValueError(f"{path}: not a run of this version (layout {LAYOUT}); train it again")
    model = MODELS[state["config"]["model"]](state["config"], state["shape"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit its config: {error}") from None
    return state, model.to(device).eval()


Judged = namedtuple("Judged", "maps scores held_scores threshold scale")


def judge(model, c, data, inputs):
    """Test set -> metrics as in run.json, and what they come from.

    scale: the upper end of the heat maps' color scale, twice the 99.9 % quantile of the error of
    normal pixels that were not trained on, the same for all pictures of a run.
    """
    size = data.test.shape[-1]
    held = anomaly_maps(model, inputs.held, size, inputs.prepare)
    maps = anomaly_maps(model, inputs.test, size, inputs.prepare)
    scores, held_scores = image_scores(maps, c["score"]), image_scores(held, c["score"])
    limit = threshold(held_scores, c["fpr"]) if len(held) else None
    scale = 2 * float(np.quantile(held.numpy(), 0.999)) if len(held) else 1.0
    result = {**measure(scores, maps, data), "threshold": limit}
    for key, label in (("fpr", 0), ("tpr", 1)):
        mine = scores[data.labels == label]
        result[key] = float((mine > limit).float().mean()) if len(mine) and len(held) else None
        result["normal_error anomaly_error".split()[label]] = float(mine.mean()) if len(mine) else None
    return result, Judged(maps, scores, held_scores, limit, scale)


def describe(m):
    """The metrics as lines to print: of each category where there are several, then of all."""
    show = lambda v: "   -  " if v is None else f"{v:.4f}"
    keys = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro")
    lines = [f"{'':<20}" + "".join(f"{key.replace('_', ' '):>13}" for key in keys)]
    each = m["categories"].items() if len(m["categories"]) > 1 else ()
    for name, values in [*each, ("mean" if each else "result", m)]:
        lines.append(f"{name[:19]:<20}" + "".join(f"{show(values[key]):>13}" for key in keys))
    if m["image_auroc"] is None:
        lines.append("no metric without both normal and anomalous test images")
    if m["threshold"] is not None:
        lines.append(f"threshold {m['threshold']:.5g}: false positive rate {show(m['fpr'])}, "
                     f"true positive rate {show(m['tpr'])} on the test set")
    return "\n".join(lines)
def draw_curves(*a): pass
def draw_examples(*a): pass
