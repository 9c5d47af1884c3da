"""Evaluate: anomaly scores, metrics, threshold, pictures and tables; from a saved run to numbers.

Every model here reconstructs its input, so one score judges them all: the L2 error between input
and reconstruction, whatever the training loss (LAMP paper, Sec. 3.1, "Evaluation metric").
    autoencoder   map = sum over C of (y_hat - y)^2;   image score = its sum
    UniAD & co.   map = L2 norm over C of f_hat - f, upsampled;   score = its max (folders) or mean
AUROC is never flipped below .5 (the authors' UniAD code reports .222 as .778), the last epoch is
reported, not the best on the test set, and the threshold comes from normal images alone.
"""
import argparse
import json
import math
from collections import defaultdict, namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from scipy import ndimage, stats
from sklearn import metrics as sk

from autoencoder import PCA, ConvAutoencoder
from data import Inputs, load, read_image, resize, split, to_float, to_inputs
from lamp_loss import l2
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD, draw_tokens

LAYOUT = 2                                                  # of model.pt; raise it with a change
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro")
CURVES = ("image_auroc", "pixel_auroc", "normal_error", "anomaly_error", "from_identity")
IMAGE_MODELS = ("ae", "pca")                                # the others see features
MODELS = {                                                  # name: (config, input shape) -> model
    "ae": lambda c, shape: ConvAutoencoder(
        shape[0], c["depth"], c["width"], c["latent"], c["kernel_size"], c["patches"]),
    "pca": lambda c, shape: PCA(shape[0], shape[1], c["latent"]),
    "uniad": lambda c, shape: UniAD(shape[0], shape[1], layers=c["depth"], jitter=c["jitter"],
                                    neighbors=c["neighbors"], query=c["query"]),
    "mlp": lambda c, shape: FeatureMLP(shape[0], layers=c["depth"]),
    "cnn": lambda c, shape: FeatureCNN(shape[0], layers=c["depth"]),
}
MODELS["transformer"] = MODELS["uniad"]                     # with other defaults, in train.py
LAMP_OPTIONS = ("eps", "over", "detach", "log")
GAINS = {                                                   # where LAMP was tried: --gains draws it
    "MNIST, one digit normal, by batch size (10 digits)": dict(
        folders=["results/table1"], rows=("loss", "batch_size")),
    "MVTec AD, autoencoder, by optimizer (3 categories)": dict(
        folders=["results/table2"], rows=("loss", "optimizer"), best=("lr",)),
    "MVTec AD, one UniAD for 3 categories (3 seeds)": dict(
        folders=["results/uniad/unified/seeds"], rows=("model",), unit="seed")}
Judged = namedtuple("Judged", "maps scores limits scale")    # limits: each image's threshold


@torch.no_grad()
def anomaly_maps(model, x, size, prepare=to_float):
    """Error of each pixel: stored inputs (N, C, H, W) -> (N, size, size) float32, on the CPU.

    The squared L2 error summed over channels. For features (more than 3 channels) its root, the L2
    norm of each token's error, upsampled (bilinear, corners aligned).
    """
    device, maps = next(model.parameters(), x).device, [torch.empty(0, size, size)]
    model.eval()
    for batch in x.split(64):
        y = prepare(batch.to(device))
        error = l2(model(y).float(), y).sum(1, keepdim=True)                # (B, 1, H, W)
        if y.shape[1] > 3:
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
    return float(sk.roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else None


def average_precision(scores, labels):
    """Mean precision at each anomaly, ranked by score; None where one kind is missing."""
    one_kind = len(np.unique(labels)) < 2
    return None if one_kind else float(sk.average_precision_score(labels, scores))


def pixel_auroc(maps, masks):
    """AUROC of single pixels, from maps and masks (N, H, W); None where none is defective."""
    return auroc(np.asarray(maps).ravel(), np.asarray(masks).ravel())


def aupro(maps, masks, limit=0.3):
    """Area under the per-region overlap (Bergmann et al. 2020): (N, H, W) twice -> 0 to 1, or None.

    At each threshold: the overlap of the detected pixels with each defect (8-connected part of a
    mask), averaged over defects, against the false positive rate over all defect-free pixels,
    those of normal images included. Exact; integrated up to FPR = limit and divided by limit.
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
    last = np.append(np.diff(maps.ravel()[order]) != 0, True)               # equal values together
    fpr = np.append(0, (np.cumsum(~masks.ravel()[order]) / (~masks).sum())[last])
    pro = np.append(0, (np.cumsum(weight.ravel()[order]) / parts)[last])
    fpr_to_limit = np.append(fpr[fpr <= limit], limit)
    pro_to_limit = np.append(pro[fpr <= limit], np.interp(limit, fpr, pro))
    return float(min(sk.auc(fpr_to_limit, pro_to_limit) / limit, 1.0))      # 1 + 1e-16 is rounding


def threshold(scores, fpr=0.05):
    """The ceil((n + 1)(1 - fpr))-th smallest of n scores of normal images that were not trained on.

    A new normal image exceeds it with probability at most fpr (conformal prediction), if n is at
    least 1/fpr - 1; below that no score is large enough, and the largest is returned.
    """
    scores = torch.as_tensor(scores).sort().values
    rank = math.ceil(round((len(scores) + 1) * (1 - fpr), 9))
    return float(scores[min(rank, len(scores)) - 1])


def measure(scores, maps, data):
    """Metrics of a test set: of each category, and their mean; None where one does not apply."""
    labels, owner, each = data.labels.numpy(), np.array(data.categories), {}
    for name in dict.fromkeys(data.categories):
        mine, m = owner == name, dict.fromkeys(METRICS)
        m["image_auroc"] = auroc(scores[mine], labels[mine])
        m["image_ap"] = average_precision(scores[mine], labels[mine])
        if data.masks is not None:                          # an anomaly without mask is left out
            known = np.flatnonzero(mine & (data.masks.flatten(1).any(1).numpy() | (labels == 0)))
            m["pixel_auroc"] = pixel_auroc(maps[known], data.masks[known])
            m["pixel_aupro"] = aupro(maps[known], data.masks[known])
        each[name] = m
    known = {key: [m[key] for m in each.values() if m[key] is not None] for key in METRICS}
    return {**{k: float(np.mean(v)) if v else None for k, v in known.items()}, "categories": each}


def open_data(c, device="cpu", mean_std=None):
    """Config -> Data, Inputs, Backbone or None; mean_std: those of a saved run's features."""
    native = c["model"] not in IMAGE_MODELS and c["dataset"] not in ("mvtec", "folder")
    data = load(c["dataset"], c["normal"], c["data_dir"],       # native: Backbone scales
                None if native else c["image_size"], c["validate"])
    backbone = open_backbone(c, device)
    return data, to_inputs(data, c["seed"], backbone, c["cache_dir"] if c["cache"] else None,
                           mean_std if c["standardize"] else {}), backbone


def open_backbone(c, device):
    if c["model"] not in IMAGE_MODELS:
        return Backbone(c["backbone"], c["backbone_weights"], c["image_size"]).to(device)


def load_run(path, device="cpu"):
    """A run's folder -> (state, model); nothing in its model.pt is executed.

    state: the dict in model.pt (config, shape, history, threshold, ...). Raises FileNotFoundError,
    and ValueError where the file is damaged, of another layout, or holds another model's tensors.
    """
    path = Path(path) / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a folder that train.py wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # of many kinds, all about this file
        raise ValueError(f"{path}: damaged, or holds more than tensors and plain values; not "
                         f"loaded ({str(error)[:80]!r})") from None
    if not isinstance(state, dict) or state.get("layout") != LAYOUT:
        raise ValueError(f"{path}: not a run of this version (layout {LAYOUT}); train it again")
    model = MODELS[state["config"]["model"]](state["config"], state["shape"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit its config: {error}") from None
    return state, model.to(device, memory_format=torch.channels_last).eval()


@torch.no_grad()
def movement(model, inputs, labels):
    """What reconstruction does to the test images -> (pull, spread), of up to 500 of a kind.

    pull: how near it brings anomalies to the normal, the squared distance of y_hat to its nearest
    training image over that of y, mean; 1: not at all. spread: variance of the normals' y_hat
    over that of the normals; 0: the same picture whatever the input. None where not defined.
    """
    def ratio(a, b):
        return float((a[b > 0] / b[b > 0]).mean()) if (b > 0).any() else None
    device, pairs = next(model.parameters()).device, []
    for x in (inputs.test[labels == label] for label in (1, 0)):
        y = [inputs.prepare(part.to(device)) for part in x[::max(1, -(-len(x) // 500))].split(64)]
        pairs.append([torch.cat(v).flatten(1) for v in ([model.eval()(part) for part in y], y)])
    train = inputs.prepare(inputs.train.to(device)).flatten(1)
    near = [torch.cdist(v, train).amin(1).square() for v in pairs[0]]
    return ratio(*near), ratio(*(v.var(0).mean() for v in pairs[1]))


def judge(model, c, data, inputs):
    """The test set -> metrics as in run.json, and what they come from. scale: the upper end of all
    heat maps' color scale, twice the 99.9 % quantile of the error of held-out normal pixels."""
    held, maps = (anomaly_maps(model, x, data.test.shape[-1], inputs.prepare)
                  for x in (inputs.held, inputs.test))
    scores, limit, limits, scale = image_scores(maps, c["score"]), None, {}, 1.0
    if len(held):
        normal, owner = image_scores(held, c["score"]), np.array(data.train_classes)
        owner, limit = owner[split(owner, c["seed"])[1]], threshold(normal, c["fpr"])
        limits = {name: threshold(normal[owner == name], c["fpr"]) for name in {*owner.tolist()}}
        scale = 2 * float(np.quantile(held.numpy(), 0.999))
    result = {**measure(scores, maps, data), **alarms(scores, data.labels, limit)}
    for name, each in result["categories"].items():
        mine = torch.from_numpy(np.array(data.categories) == name)
        each.update(alarms(scores[mine], data.labels[mine], limits.get(name, limit)))
    for label, error in enumerate(("normal_error", "anomaly_error")):
        mine = scores[data.labels == label]
        result[error] = float(mine.mean()) if len(mine) else None
    if c["model"] in IMAGE_MODELS:
        result["pull"], result["spread"] = movement(model, inputs, data.labels)
    if (c["model"], c["depth"]) == ("mlp", 1):
        result["from_identity"] = model.from_identity()
    limits = [limits.get(name, limit) for name in data.categories]
    return result, Judged(maps, scores, limits, scale)


def alarms(scores, labels, limit):
    """What a threshold does on a test set: the share of normals and of anomalies above it."""
    result = {"threshold": limit, "fpr": None, "tpr": None}
    for label, rate in enumerate(("fpr", "tpr")):
        mine = scores[labels == label]
        if limit is not None and len(mine):
            result[rate] = float((mine > limit).float().mean())
    return result


def describe(m):
    """Metrics as lines to print: of each category, their mean, and what the threshold does."""
    lines = [" " * 20 + "".join(f"{key.replace('_', ' '):>13}" for key in METRICS)]
    each = [*m["categories"].items()] if len(m["categories"]) > 1 else []
    for name, row in [*each, ("mean", m)]:
        lines.append(f"{name[:19]:<20}" + "".join(f"{number(row[key]):>13}" for key in METRICS))
    if m["image_auroc"] is None:
        lines.append("-: a metric needs both normal and anomalous test images")
    for name, row in [*each, ("all", m)]:
        lines.append(f"threshold {name} {number(row.get('threshold'))}: on the test set false "
                     f"positive rate {number(row.get('fpr'))}, true {number(row.get('tpr'))}")
    return "\n".join(lines)


def number(value, form=".4f"):
    return "-" if value is None else f"{value:{form}}"


def draw_curves(path, record, judged, labels):
    """A run's error and AUROC over its epochs, ROC, and the scores of its test set."""
    figure = Figure(figsize=(16, 3.2), layout="constrained")
    axes = figure.subplots(1, 5)
    for axis, key in zip(axes, ("base_error", "image_auroc", "pixel_auroc")):
        known = [(h["epoch"], h[key]) for h in record["history"] if h.get(key) is not None]
        axis.plot(*zip(*known or [(0, math.nan)]), "o-")
        axis.set(xlabel="epoch", title=key.replace("_", " "))
    axes[0].set(yscale="log")
    if len(np.unique(labels)) == 2:
        axes[3].plot(*sk.roc_curve(labels, judged.scores)[:2])
        axes[3].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        kinds = [judged.scores[labels == label].numpy() for label in (0, 1)]
        axes[4].hist(kinds, np.linspace(0, float(judged.scores.quantile(0.99)), 50), density=True,
                     histtype="stepfilled", alpha=0.6, label=["normal", "anomalous"])
        limits = [limit for limit in {*judged.limits} if limit is not None]
        axes[4].vlines(limits, *axes[4].get_ylim(), color="black", label="threshold")
        axes[4].set(xlabel="anomaly score", yticks=[], title="test images")
        axes[4].legend(fontsize=7)
    figure.supxlabel(record["command"], fontsize=7)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def reconstruct(model, inputs, stored):
    """What the model makes of stored inputs, as images (N, C, H, W) in [0, 1]; of features, see
    `uniad.draw_tokens`, None where no training images are at hand."""
    device = next(model.parameters()).device
    y_hat = model.eval()(inputs.prepare(stored.to(device))).float()
    if inputs.images is None:
        return y_hat.cpu() if y_hat.shape[1] <= 3 else None
    some = slice(None, None, -(-len(inputs.train) // 400))                  # up to 400 images
    bank = torch.cat([inputs.prepare(f.to(device)) for f in inputs.train[some].split(64)])
    return draw_tokens(y_hat, bank, to_float(inputs.images[some]))


def draw_examples(path, runs, images, labels=None, masks=None):
    """Columns of input, reconstruction, error and mask (the paper's Fig. 4), on one color scale.

    runs: {name: (model, inputs, judged)}, the first of which decides scale, order and verdicts.
    With labels: four normals, then four anomalies, from the smallest score to the largest.
    """
    picked, judged = torch.arange(len(images)), next(iter(runs.values()))[2]
    if labels is not None:
        order = judged.scores.argsort()
        kinds = [order[labels[order] == label] for label in (0, 1)]
        picked = torch.cat([i[torch.linspace(0, len(i) - 1, min(4, len(i))).long()] for i in kinds])
    if not len(picked):
        return
    rows, scales = {"input": images[picked]}, {}
    for name, (model, inputs, own) in runs.items():
        rows[f"{name}reconstruction"] = reconstruct(model, inputs, inputs.test[picked])
        rows[f"{name}error"], scales[f"{name}error"] = own.maps[picked], judged.scale
    rows["mask"] = None if masks is None else masks[picked]
    rows = {k: v for k, v in rows.items() if v is not None}
    figure = Figure((1.5 * len(picked) + 1, 1.7 * len(rows) + 0.4), layout="constrained")
    axes = figure.subplots(len(rows), len(picked), squeeze=False)
    for line, (name, row) in zip(axes, rows.items()):
        line[0].set_ylabel(name.replace("/", "/\n"), fontsize=7)     # of runs, a folder a line
        for axis, x in zip(line, row):
            x = to_float(x).movedim(0, -1).clamp(0, 1).expand(-1, -1, 3) if x.dim() == 3 else x
            axis.imshow(x.numpy(), cmap="inferno", vmin=0, vmax=scales.get(name, 1))
            axis.set(xticks=[], yticks=[])
    for axis, i in zip(axes[0], picked):
        kind = "score" if labels is None else ("normal", "anomaly")[labels[i]]
        limit = number(judged.limits[i], ".3g")
        axis.set_title(f"{kind} {judged.scores[i]:.3g}\n{verdict(judged, i)} ({limit})", fontsize=8)
    figure.supxlabel(f"score, verdict (threshold) of each image; error 0 to {judged.scale:.3g}")
    figure.savefig(path, dpi=90)


def verdict(judged, i):
    limit = judged.limits[i]
    return "no verdict" if limit is None else "anomalous" if judged.scores[i] > limit else "passes"


def interval(values, level=0.95):
    """Half the width of the Student-t confidence interval of the mean of two or more values."""
    return float(stats.sem(values) * stats.t.ppf((1 + level) / 2, len(values) - 1))


def read_results(folders, rows, metric, unit="category"):
    """All run.json below folders -> {values of the options `rows`: [of plain runs, of LAMP's]},
    each {category: mean over seeds}, or with unit "seed" {seed: mean over categories}; with "epoch"
    in rows, of the history. LAMP's options are None for a plain run, all readings' partner."""
    cells = defaultdict(lambda: [defaultdict(list), defaultdict(list)])
    paths = sorted(path for folder in folders for path in Path(folder).rglob("run.json"))
    runs = [json.loads(path.read_text()) for path in paths]
    for run in (r for r in runs if len(r["history"]) >= r["config"]["epochs"]):     # whole ones
        c, each = {"log": True, **run["config"]}, run["metrics"]["categories"].items()
        if "epoch" in rows or metric not in METRICS:
            points = run["history"] if "epoch" in rows else [run["metrics"]]
            each = [(c["normal"], point) for point in points]
        c["setting"] = "unified" if c["normal"] == "all" or "," in c["normal"] else "separate"
        for category, values in each:
            known = {**values, **c, "category": category}
            if unknown := {*rows} - {*known}:
                raise ValueError(f"--rows: no {', '.join(unknown)} in {c['out']}/run.json")
            row = tuple(None if k in LAMP_OPTIONS and not c["lamp"] else known[k] for k in rows)
            if values.get(metric) is not None:
                cells[row][c["lamp"]][known[unit]].append(values[metric])
    if not cells:
        raise ValueError(f"{', '.join(folders)}: no run.json of a finished run with {metric} below")
    for row, cell in [*cells.items()]:
        plain = tuple(None if k in LAMP_OPTIONS else v for k, v in zip(rows, row))
        if not cell[0] and plain in cells:
            cell[0] = {k: v for k, v in cells[plain][0].items() if k in cell[1]}
    return {row: [{k: float(np.mean(v)) for k, v in side.items()} for side in cells[row]]
            for row in sorted(cells, key=lambda r: [(isinstance(v, str), v or 0) for v in r])}


def differences(plain, lamp):
    return [lamp[name] - plain[name] for name in lamp if name in plain]


def best_of(folders, rows, metric, options, elsewhere):
    """As read_results, but of the runs that differ in `options` the best one, of plain and LAMP
    apart: the best on the category itself, as the paper has it, or (`elsewhere`) the one with the
    best mean over the other categories, which can be known before the category is judged."""
    keys = tuple(k for k in rows if k != "category")
    found = read_results(folders, (*keys, *options), metric)
    cells = defaultdict(lambda: [{}, {}])
    for row, side in [(row[:len(keys)], side) for row in found for side in (0, 1)]:
        tried = [cell[side] for r, cell in found.items() if r[:len(keys)] == row]
        for category in dict.fromkeys(name for values in tried for name in values):
            def known(values):
                seen = [v for name, v in values.items() if (name != category) == elsewhere]
                return np.mean(seen) if seen else -math.inf
            best = max((values for values in tried if category in values), key=known)
            if known(best) == -math.inf:
                raise ValueError(f"--elsewhere: no other category than {category} is there")
            named = dict(zip(keys, row), category=category)
            cells[tuple(named[k] for k in rows)][side][category] = best[category]
    return cells


def cells_of(folders, rows, metric="image_auroc", best=(), elsewhere=False, unit="category"):
    if best:
        return best_of(folders, rows, metric, best, elsewhere)
    return read_results(folders, rows, metric, unit)


def paper_numbers(path="results/paper.json"):
    entries = json.loads(Path(path).read_text()) if Path(path).exists() else ()
    return {frozenset(f"{n['row']} {n['column']}".lower().split()): n["value"] for n in entries}


def in_paper(known, *words):
    """The papers' number whose words are all among these, of several the one of most; or None."""
    words = {*" ".join(map(str, words)).lower().split()}
    fits = [key for key in known if key <= words and ("lamp" in key) == ("lamp" in words)]
    return known[max(fits, key=len)] if fits else None


def table(folders, rows=("category",), metric="image_auroc", best=(), elsewhere=False,
          unit="category", paper="results/paper.json"):
    """Markdown, a row for each value of the options `rows`: base loss, LAMP, paired difference.

    Means over categories (of means over all runs that `rows` does not tell apart, or of the best
    of those that differ in the options `best`), 95 % intervals over categories; wins with the
    exact sign test; in parentheses paper.json's number, if any. unit "seed": all over seeds.
    """
    cells, known = cells_of(folders, rows, metric, best, elsewhere, unit), paper_numbers(paper)
    if (*rows, unit) == ("category", "category"):
        cells["mean",] = [{c: v for row in cells for c, v in cells[row][k].items()} for k in (0, 1)]
    lines = [[", ".join(rows), "base loss", "LAMP", "difference", "wins", "p"], ["---"] * 6]
    for row, cell in cells.items():
        d, line = differences(*cell), [", ".join(map(str, row))]
        wins, played = sum(x > 0 for x in d), sum(x != 0 for x in d)
        for side, name in zip(cell, ("", "lamp")):
            value = in_paper(known, *row, metric, name) if side else None
            line.append(summary([*side.values()]) + ("" if value is None else f" ({value:.3f})"))
        lines.append([*line, summary(d, "+"), f"{wins} of {len(d)}" * bool(d),
                      f"{stats.binomtest(wins, played).pvalue:.3f}" if played > 1 else ""])
    width = 6 if any(lamp for _, lamp in cells.values()) else 2
    return "\n".join(f"| {' | '.join(line[:width])} |" for line in lines)


def draw_table(path, folders, rows, metrics):
    """Tables as a picture: a panel for each metric over the first of `rows`; where there is LAMP,
    one more: LAMP minus base loss of the first metric, with its interval over categories."""
    tables = [read_results(folders, rows, metric) for metric in metrics]
    gains = {row: d for row, cell in tables[0].items() if len(d := differences(*cell)) > 1}
    titles = [*metrics, *[f"{metrics[0]}: LAMP - base loss"] * bool(gains)]
    two = any(lamp for _, lamp in tables[0].values())       # losses, to be told apart
    figure = Figure(figsize=(4.2 * len(titles), 3.6), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    xs = dict.fromkeys(row[0] for row in tables[0])
    place = {x: x if len({*map(type, xs)}) == 1 else str(x) for x in xs}
    groups, colors = dict.fromkeys(row[1:] for row in tables[0]), {}    # a line's, in all panels
    for panel, cells in zip(panels, tables):
        for rest in groups:
            mine = {place[row[0]]: cell for row, cell in cells.items() if row[1:] == rest}
            plain = tuple(None if k in LAMP_OPTIONS else v for k, v in zip(rows[1:], rest))
            for side, name in enumerate(("base loss", "LAMP")):
                means = {x: np.mean([*c[side].values()]) for x, c in mine.items() if c[side]}
                if means and (side or plain == rest or plain not in groups):    # base loss once
                    name = " ".join([name] * two + [str(v) for v in rest if v is not None])
                    color = colors.setdefault(name, f"C{len(colors)}")
                    panel.plot([*means], [*means.values()], "so"[side] + "-", c=color, label=name)
            pairs = {place[row[0]]: d for row, d in gains.items() if row[1:] == rest}
            if panel is panels[0] and pairs:
                panels[-1].errorbar([*pairs], [*map(np.mean, pairs.values())],
                                    [*map(interval, pairs.values())], capsize=3, c=color)
    for panel, title in zip(panels, titles):
        panel.set(xlabel=rows[0], title=title.replace("_", " "))
        if rows[0] in ("latent", "batch_size", "lr") and min(xs) > 0:
            panel.set_xscale("log", base=2)
            panel.set_xticks([*xs], [*xs])
    if len(colors) > 1:
        panels[0].legend(fontsize=7)
    if gains:
        panels[-1].axhline(0, color="black", linewidth=0.8)
    figure.savefig(path, dpi=110)


def draw_gains(path):
    """LAMP minus base loss in image AUROC: each setting of GAINS, 95 % interval, and the paper's
    difference (hollow; for Table 2 of the same categories)."""
    found, known = {title: cells_of(**spec) for title, spec in GAINS.items()}, paper_numbers()
    figure = Figure(figsize=(9, 0.25 * sum(map(len, found.values())) + 2.4), layout="constrained")
    panels = figure.subplots(len(found), sharex=True, height_ratios=[*map(len, found.values())])
    for panel, (title, cells) in zip(panels, found.items()):
        for y, (row, cell) in enumerate(cells.items()):
            d, words = differences(*cell), [(*row, "image_auroc")]
            panel.errorbar(np.mean(d), y, xerr=interval(d), fmt="o", color="C0", capsize=3)
            if in_paper(known, *words[0]) is None:          # Table 2 has a number a category
                words = [(*words[0], category) for category in cell[1]]
            pairs = [(in_paper(known, *w), in_paper(known, *w, "lamp")) for w in words]
            gains = [lamp - base for base, lamp in pairs if lamp]
            if gains:
                panel.plot(np.mean(gains), y, "D", color="C1", markerfacecolor="none")
        panel.set_yticks(range(len(cells)), [" ".join(map(str, row)) for row in cells], fontsize=8)
        panel.set_title(title, fontsize=9, loc="left")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.invert_yaxis()
    panels[-1].set_xlabel("image AUROC: LAMP - base loss (hollow: the paper's)")
    figure.savefig(path, dpi=110)


def summary(values, sign=""):
    """Mean and 95 % interval as text; without the interval for one value, empty for none."""
    spread = f" ± {interval(values):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.4f}{spread}" if values else ""


def evaluate_run(run, data_dir, device):
    """Numbers and pictures of a saved run; its scores reduced in all four ways -> what was used."""
    state, model = load_run(run, device)
    c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
    data, inputs, _ = open_data(c, device, state["backbone"])
    metrics, judged = judge(model, c, data, inputs)
    record = {"command": f"python evaluate.py {run}", "config": c, "history": state["history"]}
    draw_curves(Path(run) / "curves.png", record, judged, data.labels)
    draw_examples(Path(run) / "examples.png", {"": (model, inputs, judged)}, data.test,
                  data.labels, data.masks)
    print(f"{run}\n{describe(metrics)}\nimage AUROC with each --score:")
    for how in ("sum", "max", "mean", "std"):
        m = measure(image_scores(judged.maps, how), None, data._replace(masks=None))
        print(f"{how:<20}{number(m['image_auroc']):>13}")
    return data, (model, inputs, judged)


def judge_files(run, files, device, category=None):
    """Score, threshold, verdict of new images; heat maps of the first 40 go to RUN/judged.png.
    The threshold is that of all normals, or of `category`. Raises ValueError where unknown."""
    state, model = load_run(run, device)
    c, (channels, side, _), prepare = state["config"], state["image"], to_float
    if backbone := open_backbone(c, device):
        backbone.load_state_dict(state["backbone"], strict=False)
        prepare = lambda x: backbone(to_float(x))
    padded = c["dataset"] in ("mnist", "fashion_mnist") and side == 32      # as in training
    images = resize(torch.stack([read_image(file, 28 if padded else side) for file in files]), side)
    if channels == 1:
        images = images.float().mean(1, keepdim=True).round().byte()
    maps = anomaly_maps(model, images, side, prepare)
    scores, limits = image_scores(maps, c["score"]), state.get("limits", {})
    if category is not None and category not in limits:
        raise ValueError(f"--category {category}: {run} has thresholds of {', '.join(limits)}")
    limit = limits.get(category, state.get("threshold"))
    judged = Judged(maps, scores, [limit] * len(files), state.get("scale", 1))
    inputs = Inputs(None, None, images, prepare, None)
    draw_examples(Path(run) / "judged.png", {"": (model, inputs, judged)}, images[:40])
    for i, file in enumerate(files):
        print(f"{file}: score {scores[i]:.5g}, threshold {number(limit)}, {verdict(judged, i)}")
    print(f"wrote {run}/judged.png")


def work(args):
    """What the command line asks for: a picture of all gains, tables, new images, saved runs."""
    rows, metrics, seen = tuple(args.rows.split(",")), args.metric.split(","), {}
    best = tuple(args.best.split(",")) if args.best else ()
    if args.gains:
        draw_gains(args.gains)
    if args.table:
        print("\n\n".join(table(args.table, rows, metric, best, args.elsewhere, args.unit)
                          for metric in metrics))
        if args.picture:
            draw_table(args.picture, args.table, rows, metrics)
    for run in args.runs:
        if args.image:
            judge_files(run, args.image, args.device, args.category)
        else:
            seen[run] = evaluate_run(run, args.data_dir, args.device)
    if args.compare:
        data, _ = seen[args.runs[0]]
        if not all(torch.equal(data.test, other.test) for other, _ in seen.values()):
            raise ValueError("--compare: these runs have different test images")
        named = {f"{run}\n": parts for run, (_, parts) in seen.items()}
        draw_examples(args.compare, named, data.test, data.labels, data.masks)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="numbers and pictures of these runs, anew")
    one = parser.add_mutually_exclusive_group().add_argument
    one("--image", nargs="+", metavar="FILE", help="judge these images by the threshold of RUN")
    add("--category", help="with --image: its own threshold, not that of all categories")
    one("--compare", metavar="FILE", help="draw the same test images as each of RUNs sees them")
    one("--table", nargs="+", metavar="FOLDER", help="print a Markdown table of all runs below")
    one("--gains", metavar="FILE", help="draw LAMP's gain in all sweeps of the README")
    add("--rows", default="category", help="its rows: options joined by commas (default: category)")
    add("--metric", default="image_auroc", help="a table for each of these (default: image_auroc)")
    either = parser.add_mutually_exclusive_group().add_argument
    either("--best", metavar="OPTIONS", help="of the runs that differ in these, the best one")
    either("--unit", choices=("category", "seed"), default="category", help="of intervals")
    add("--elsewhere", action="store_true", help="best on all other categories, not on its own")
    add("--picture", metavar="FILE", help="and draw it")
    add("--data-dir", help="where the data sets are (default: where the run found them)")
    add("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    if not (args.runs or args.table or args.gains):
        parser.error("name one or more runs, or --table FOLDER")
    if args.category and not args.image:
        parser.error("--category chooses the threshold of new images: give them by --image")
    try:
        work(args)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
