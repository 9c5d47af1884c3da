"""Evaluate: anomaly scores, metrics, threshold, pictures and tables; from a saved run to numbers.

Every model here reconstructs its input, so one score judges them all: the L2 error between input
and reconstruction, whatever the training loss (LAMP paper, Sec. 3.1, "Evaluation metric").
    autoencoder   map = sum over C of (y_hat - y)^2;   image score = its sum
    UniAD & co.   map = L2 norm over C of f_hat - f, upsampled;   score = max after 16x16 averaging
AUROC is never flipped below .5 (the authors' UniAD code reports .222 as .778), the last epoch is
reported (not the best on the test set), and the threshold comes from normal images alone.
    python evaluate.py RUN...                       numbers and pictures again, from what was saved
    python evaluate.py RUN --image FILE...          score, threshold, verdict, heat map of new images
    python evaluate.py --table results/ten-digits   a table of the README, in Markdown
    python evaluate.py --history F.png RUN...       error and AUROC over the epochs of several runs
"""
import argparse
import json
import math
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, stats
from sklearn import metrics as sk

from autoencoder import ConvAutoencoder, from_patches, to_patches
from data import cached_features, load, read_image, resize, split, to_float
from lamp_loss import l2
from uniad import Backbone, FeatureCNN, FeatureMLP, UniAD

LAYOUT = 1                                                  # of model.pt; raise it when that changes
METRICS = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro")
MODELS = {                                                  # name: (config, input shape) -> model
    "ae": lambda c, shape: ConvAutoencoder(shape[0], *(c[k] for k in (
        "depth", "width", "latent", "kernel_size", "patches"))),
    "uniad": lambda c, shape: UniAD(*shape[:2], **{k: c[k] for k in ("neighbors", "jitter", "query")}),
    "mlp": lambda c, shape: FeatureMLP(shape[0]),
    "cnn": lambda c, shape: FeatureCNN(shape[0]),
}
MODELS["transformer"] = MODELS["uniad"]                     # with other defaults, in train.py
# train, held, test: stored tensors; prepare: stored -> model's input; images: those of `train`
Inputs = namedtuple("Inputs", "train held test prepare images")
Judged = namedtuple("Judged", "maps scores threshold scale")


# ---- scores and metrics ----

@torch.no_grad()
def anomaly_maps(model, x, size, prepare=to_float):
    """Error of each pixel: stored inputs (N, C, H, W) -> (N, size, size) float32, on the CPU.

    The squared L2 error summed over channels. Where the model's grid is coarser than `size` (CNN
    features) its root, the L2 norm of each token's error, is upsampled (bilinear, corners aligned).
    prepare: stored inputs -> what the model sees.
    """
    device, maps = next(model.parameters(), x).device, [torch.empty(0, size, size)]
    model.eval()
    for batch in x.split(64):
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
    """The chance that an anomaly (label 1) outranks a normal (0); None where one kind is missing."""
    return float(sk.roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else None


def average_precision(scores, labels):
    """Area under precision against recall; None where one kind is missing."""
    return float(sk.average_precision_score(labels, scores)) if len(np.unique(labels)) == 2 else None


def pixel_auroc(maps, masks):
    """AUROC of single pixels: maps (N, H, W), masks (N, H, W) bool; None where none is defective."""
    return auroc(np.asarray(maps).ravel(), np.asarray(masks).ravel())


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
    last = np.append(np.diff(maps.ravel()[order]) != 0, True)               # equal values go together
    fpr = np.append(0, (np.cumsum(~masks.ravel()[order]) / (~masks).sum())[last])
    pro = np.append(0, (np.cumsum(weight.ravel()[order]) / parts)[last])
    inside = fpr <= limit
    area = sk.auc(np.append(fpr[inside], limit), np.append(pro[inside], np.interp(limit, fpr, pro)))
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
    values = {key: [m[key] for m in each.values() if m[key] is not None] for key in METRICS}
    return {**{key: float(np.mean(v)) if v else None for key, v in values.items()}, "categories": each}


# ---- from a configuration to inputs, from a run to a model, from both to a judgment ----

def open_data(c, device="cpu", standardized=None):
    """Config -> Data, Inputs, Backbone (None for images). standardized: the mean and std of the
    features in a saved run; when None, they are fitted on the training part."""
    native = c["model"] != "ae" and c["dataset"] not in ("mvtec", "folder")     # scaled by Backbone
    data = load(c["dataset"], c["normal"], c["data_dir"], None if native else c["image_size"],
                c["validate"])
    train, held = split(data.train_classes, c["seed"])
    if c["model"] == "ae":
        return data, Inputs(data.train[train], data.train[held], data.test, to_float, None), None
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
    return data, Inputs(stored[train], stored[held], test, prepare, data.train[train]), backbone


def load_run(path, device="cpu"):
    """A run's folder, or its model.pt -> (state, model); nothing in the file is executed.

    state: the dict in model.pt (config, shape, history, threshold, ...). Raises FileNotFoundError,
    and ValueError where the file is damaged, of another layout, or holds another model's tensors.
    """
    path = Path(path) if Path(path).suffix == ".pt" else Path(path) / "model.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a run is a folder that train.py wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # of many kinds, all about this file
        raise ValueError(f"{path}: damaged, or holds more than tensors and plain values; not loaded "
                         f"({str(error)[:80]!r})") from None
    if not isinstance(state, dict) or state.get("layout") != LAYOUT:
        raise ValueError(f"{path}: not a run of this version (layout {LAYOUT}); train it again")
    model = MODELS[state["config"]["model"]](state["config"], state["shape"])
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise ValueError(f"{path}: its tensors do not fit its config: {error}") from None
    return state, model.to(device, memory_format=torch.channels_last).eval()


def judge(model, c, data, inputs):
    """The test set -> metrics as in run.json, and what they come from.

    scale: the upper end of the heat maps' color scale, twice the 99.9 % quantile of the error of
    normal pixels that were not trained on, one for all pictures of a run.
    """
    held, maps = (anomaly_maps(model, x, data.test.shape[-1], inputs.prepare)
                  for x in (inputs.held, inputs.test))
    scores = image_scores(maps, c["score"])
    limit = threshold(image_scores(held, c["score"]), c["fpr"]) if len(held) else None
    scale = 2 * float(np.quantile(held.numpy(), 0.999)) if len(held) else 1.0
    result = {**measure(scores, maps, data), "threshold": limit}
    for label, rate, error in ((0, "fpr", "normal_error"), (1, "tpr", "anomaly_error")):
        mine = scores[data.labels == label]
        result[rate] = float((mine > limit).float().mean()) if len(mine) and len(held) else None
        result[error] = float(mine.mean()) if len(mine) else None
    return result, Judged(maps, scores, limit, scale)


def describe(m):
    """Metrics as lines to print: of each category where there are several, and their mean."""
    lines = [" " * 20 + "".join(f"{key.replace('_', ' '):>13}" for key in METRICS)]
    for name, row in [*(m["categories"].items() if len(m["categories"]) > 1 else ()), ("mean", m)]:
        lines.append(f"{name[:19]:<20}" + "".join(
            f"{'-':>13}" if row[key] is None else f"{row[key]:13.4f}" for key in METRICS))
    if m["image_auroc"] is None:
        lines.append("-: a metric needs both normal and anomalous test images")
    if m["threshold"] is not None:
        rates = [math.nan if m[key] is None else m[key] for key in ("fpr", "tpr")]
        lines.append(f"threshold {m['threshold']:.5g}: false positive rate {rates[0]:.4f}, true "
                     f"positive rate {rates[1]:.4f} on the test set")
    return "\n".join(lines)


# ---- pictures ----

def canvas(rows, columns, width, height):
    import matplotlib
    matplotlib.use("Agg")                                   # files only, no screen
    import matplotlib.pyplot as plt
    plt.close("all")
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def draw_curves(path, records, judged=None, labels=None):
    """Error and AUROC over the epochs of runs; of one judged run, ROC and test scores as well."""
    figure, (axes,) = canvas(1, 5 if judged else 3, 16 if judged else 11, 3.2)
    for r in records:
        for axis, key in zip(axes, ("base_error", "image_auroc", "pixel_auroc")):
            known = [(h["epoch"], h[key]) for h in r["history"] if h.get(key) is not None]
            axis.plot(*zip(*known or [(0, math.nan)]), "o-", ms=3, label=Path(r["config"]["out"]).name)
            axis.set(xlabel="epoch", title=key.replace("_", " "))
    axes[0].set(yscale="log")
    axes[0].legend(fontsize=7)
    if judged and len(np.unique(labels)) == 2:
        axes[3].plot(*sk.roc_curve(labels, judged.scores)[:2])
        axes[3].set(xlabel="false positive rate", ylabel="true positive rate", title="ROC")
        bins = np.linspace(0, float(judged.scores.quantile(0.99)), 50)
        for label, name in enumerate(("normal", "anomalous")):
            axes[4].hist(judged.scores[labels == label], bins, alpha=0.6, density=True, label=name)
        axes[4].axvline(judged.threshold or 0, color="black", label="threshold")
        axes[4].set(xlabel="anomaly score", yticks=[], title="test images")
        axes[4].legend(fontsize=7)
    figure.supxlabel("\n".join(r["command"] for r in records), fontsize=7)
    figure.savefig(path, dpi=100)


@torch.no_grad()
def reconstruct(model, inputs, stored):
    """What the model makes of stored inputs, as images (N, C, H, W) in [0, 1].

    Features show a person nothing: each reconstructed token is drawn as the 16x16 image patch of
    its nearest token among up to 400 normal training images (None where these are not at hand).
    """
    device = next(model.parameters()).device
    y_hat = model.eval()(inputs.prepare(stored.to(device))).float()
    if inputs.images is None:
        return y_hat.cpu() if y_hat.shape[1] <= 3 else None
    every, grid = -(-len(inputs.train) // 400), y_hat.shape[-1]
    bank = torch.cat([inputs.prepare(f.to(device)) for f in inputs.train[::every].split(64)])
    bank = bank.movedim(1, -1).flatten(0, 2)                                # (M g g, C)
    images = F.interpolate(to_float(inputs.images[::every]), 16 * grid, mode="bilinear")
    patches = to_patches(images, grid)                                      # (M g g, 3, 16, 16)
    nearest = [torch.cdist(f_hat.flatten(1).T, bank).argmin(1).cpu() for f_hat in y_hat]
    return torch.cat([from_patches(patches[index], grid) for index in nearest])


def draw_examples(path, model, inputs, images, stored, judged, labels=None, masks=None):
    """Columns of input, reconstruction, error and mask (the paper's Fig. 4), on one color scale.

    With labels: four normals, then four anomalies, from the smallest score to the largest.
    """
    picked, names = torch.arange(len(images)), ("normal", "anomaly")
    if labels is not None:
        order = judged.scores.argsort()
        order = [order[labels[order] == k] for k in (0, 1)]
        picked = torch.cat([i[torch.linspace(0, len(i) - 1, min(4, len(i))).long()] for i in order])
    if not len(picked):
        return
    rows = {"input": images[picked], "reconstruction": reconstruct(model, inputs, stored[picked]),
            "error": judged.maps[picked], "mask": None if masks is None else masks[picked]}
    rows = {name: row for name, row in rows.items() if row is not None}
    figure, axes = canvas(len(rows), len(picked), 1.5 * len(picked) + 1, 1.7 * len(rows) + 0.3)
    for (name, row), line in zip(rows.items(), axes):
        line[0].set_ylabel(name)
        for axis, x in zip(line, row):
            x = to_float(x).movedim(0, -1).clamp(0, 1).expand(-1, -1, 3) if x.dim() == 3 else x
            axis.imshow(x, cmap="inferno", vmin=0, vmax=judged.scale if name == "error" else 1)
            axis.set(xticks=[], yticks=[])
    for axis, i in zip(axes[0], picked):
        axis.set_title(f"{'' if labels is None else names[labels[i]]} {judged.scores[i]:.3g}\n"
                       f"{verdict(judged.scores[i], judged.threshold)}", fontsize=8)
    figure.supxlabel(f"score above each image, threshold {judged.threshold or math.nan:.4g}; "
                     f"error from 0 to {judged.scale:.3g}", fontsize=8)
    figure.savefig(path, dpi=90)


def verdict(score, limit):
    return "no threshold" if limit is None else "anomalous" if score > limit else "passes"


# ---- tables ----

def interval(values, level=0.95):
    """Half the width of the Student-t confidence interval of a mean; NaN for a single value."""
    return stats.t.ppf((1 + level) / 2, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan


def read_results(folder, rows, metric):
    """{row: {lamp: {category: mean over seeds}}} of all run.json below a folder; a row is what the
    options `rows` are. Options of LAMP are None in a plain run."""
    cells = {}
    for path in sorted(Path(folder).rglob("run.json")):
        run = json.loads(path.read_text())
        c = {**run["metrics"], **run["config"]}
        c.update({} if c["lamp"] else dict.fromkeys(("eps", "over", "detach")))
        c["setting"] = "unified" if c["normal"] == "all" or "," in c["normal"] else "separate"
        for c["category"], values in c["categories"].items():
            value = {**c, **values}[metric]
            cell = cells.setdefault(tuple(c[key] for key in rows), {True: {}, False: {}})[c["lamp"]]
            cell.setdefault(c["category"], []).extend([] if value is None else [value])
    return {row: {lamp: {k: float(np.mean(v)) for k, v in cell[lamp].items() if v} for lamp in cell}
            for row, cell in cells.items()}


def table(folder, rows=("category",), metric="image_auroc", paper="results/paper.json"):
    """Markdown, a row for each value of the options `rows`: base loss, LAMP, their paired difference.

    Means over categories (of means over seeds) with 95 % intervals over categories; wins with the
    exact two-sided sign test. In parentheses the paper's number, where paper.json has one.
    """
    cells, known = read_results(folder, rows, metric), {}
    for row in [r for r in cells if not cells[r][False]]:   # a plain run is every reading's partner
        plain = tuple(None if k in ("eps", "over", "detach") else v for k, v in zip(rows, row))
        cells[row][False] = cells.get(plain, cells[row])[False]
    if rows == ("category",):
        cells["mean",] = {k: {c: cells[c,][k][c] for (c,) in cells if cells[c,][k]} for k in (0, 1)}
    for n in json.loads(Path(paper).read_text()) if Path(paper).exists() else ():
        known[frozenset(f"{n['row']} {n['column']}".lower().split())] = f" ({n['value']:.3f})"

    def text(values, sign="", words=()):
        spread = f" ± {interval(values):.4f}" if len(values) > 1 else ""
        return f"{np.mean(values):{sign}.4f}{spread}{known.get(frozenset(words), '')}" if values else ""

    lines = [f"| {', '.join(rows)} | base loss | LAMP | difference | wins | p |", "|---" * 6 + "|"]
    for row in sorted(cells, key=lambda r: [(v == "mean", isinstance(v, str), v or 0) for v in r]):
        plain, lamp = cells[row][False], cells[row][True]
        words = " ".join(str(v).lower() for v in [*row, metric]).split()
        d = [lamp[c] - plain[c] for c in lamp if c in plain]
        wins, played = sum(x > 0 for x in d), sum(x != 0 for x in d)
        p = f"{stats.binomtest(wins, played).pvalue:.3f}" if played > 1 else ""
        lines.append(f"| {', '.join(str(v) for v in row)} | {text([*plain.values()], '', words)} | "
                     f"{text([*lamp.values()], '', [*words, 'lamp'])} | {text(d, '+')} | "
                     f"{f'{wins} of {len(d)}' if d else ''} | {p} |")
    return "\n".join(lines)


# ---- the command ----

def evaluate_run(run, data_dir, device):
    """Numbers and pictures of a saved run; its scores reduced in all four ways."""
    state, model = load_run(run, device)
    c = {**state["config"], **({"data_dir": data_dir} if data_dir else {})}
    data, inputs, _ = open_data(c, device, state["backbone"])
    metrics, judged = judge(model, c, data, inputs)
    record = {"command": f"python evaluate.py {run}", "config": c, "history": state["history"]}
    draw_curves(Path(run) / "curves.png", [record], judged, data.labels)
    draw_examples(Path(run) / "examples.png", model, inputs, data.test, inputs.test, judged,
                  data.labels, data.masks)
    print(f"{run}\n{describe(metrics)}")
    for how in ("sum", "max", "mean", "std"):
        m = measure(image_scores(judged.maps, how), None, data._replace(masks=None))
        print(f"image AUROC with --score {how:<5} {m['image_auroc'] or math.nan:.4f}")


def judge_files(run, files, device):
    """Score, threshold and verdict of new images; their heat maps go to RUN/judged.png."""
    state, model = load_run(run, device)
    c, (channels, side, _), prepare = state["config"], state["image"], to_float
    if c["model"] != "ae":
        backbone = Backbone(c["backbone"], c["backbone_weights"], c["image_size"]).to(device)
        backbone.load_state_dict(state["backbone"], strict=False)
        prepare = lambda x: backbone(to_float(x))
    padded = c["dataset"] in ("mnist", "fashion_mnist") and side == 32      # as in training
    images = torch.stack([read_image(file, 28 if padded else side) for file in files])
    if channels == 1:
        images = images.float().mean(1, keepdim=True).round().byte()
    images, limit = resize(images, side), state.get("threshold")
    maps = anomaly_maps(model, images, side, prepare)
    judged = Judged(maps, image_scores(maps, c["score"]), limit, state.get("scale", 1.0))
    draw_examples(Path(run) / "judged.png", model, Inputs(None, None, None, prepare, None), images,
                  images, judged)
    for file, score in zip(files, judged.scores):
        print(f"{file}: score {score:.5g}, threshold {limit or math.nan:.5g}, {verdict(score, limit)}")
    print(f"wrote {run}/judged.png")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--image", nargs="+", default=[], metavar="FILE", help="judge images by RUN's threshold")
    add("--table", metavar="FOLDER", help="print a table of all runs below this folder")
    add("--rows", default="category", help="options, joined by commas: its rows (default: category)")
    add("--metric", default="image_auroc", help="what it holds (default: image_auroc)")
    add("--history", metavar="PICTURE", help="draw the curves of RUN... in one picture")
    add("--data-dir", help="where the data sets are (default: where the run found them)")
    add("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    if not args.runs and not args.table:
        parser.error("name one or more runs, or --table FOLDER")
    try:
        if args.table:
            print(table(args.table, tuple(args.rows.split(",")), args.metric))
        elif args.history:
            records = [json.loads((Path(run) / "run.json").read_text()) for run in args.runs]
            draw_curves(args.history, records)
        elif args.image:
            judge_files(args.runs[0], args.image, args.device)
        else:
            for run in args.runs:
                evaluate_run(run, args.data_dir, args.device)
    except (ValueError, OSError, RuntimeError, KeyError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
