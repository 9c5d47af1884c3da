"""Figures: runs of train.py side by side.

    python results/figures.py idea OUT.jpg              normals, anomalies, their errors
    python results/figures.py examples OUT.jpg RUN...   test images, as runs see them
    python results/figures.py curves OUT.png RUN...     error and AUROC over the epochs
    python results/figures.py copying OUT.png           does AUROC fall with copying?
    python results/figures.py ways OUT.png              four ways against copying
    python results/figures.py seconds OUT.png           image AUROC over seconds
    python results/figures.py route OUT.png RUN...      which tokens make an f_hat

`examples` is the LAMP paper's Fig. 4: the same test images, as each run reconstructs
them. `copying` draws AUROC over epochs and over training error, from table1.csv. Start
it in the repository's folder, after the runs have been made (results/sweep.py). `idea`
makes its two runs itself.
"""
import argparse
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pairs import mean_and_interval, read, sign_test, with_setting

ROOT = Path(__file__).resolve().parent.parent
CURVES = ("base_error", "image_auroc", "pixel_auroc")
ANNEALED = "L2 of 3 to 8 epochs, each run to its end"


# The two autoencoders of the picture at the top of README.md.
IDEA = {
    "MNIST, trained on the digit 3": dict(
        dataset="mnist", normal="3", out="runs/idea-digits"),
    "MVTec AD, trained on good bottles": dict(
        dataset="mvtec", normal="bottle", image_size=128, latent=32, epochs=100,
        out="runs/idea-bottles"),
}


def idea(out, runs, data_dir=None):
    """The idea of both papers: an autoencoder reconstructs what it was trained on.

    Test images, their reconstructions and errors, of digits above and of a product
    below. They are not chosen: every n-th normal and every n-th anomaly is drawn.
    """
    sys.path.insert(0, str(ROOT))
    import train                                    # here alone: it takes seconds
    figure = Figure(figsize=(9, 7.6), layout="constrained")
    blocks = figure.subfigures(2, 1)
    for block, (title, config) in zip(blocks, IDEA.items()):
        config = dict(config, data_dir=data_dir or "data", pictures=False)
        if train.saved_run(config["out"]) is None:
            train.run(config, report=False)
        draw_idea(block, title, config["out"])
    figure.supxlabel(f"python results/figures.py idea {out}", fontsize=7)
    figure.savefig(out, dpi=100)


def draw_idea(block, title, run, count=4):
    """Draw `count` normals and anomalies of a run: input, reconstruction, error."""
    import evaluate as ev
    state, model = ev.load_run(run)
    data, inputs, _ = ev.open_data(state["config"], state=state)
    judged = ev.judge(model, state["config"], data, inputs)[1]
    chosen = []
    for label in (0, 1):
        mine = np.flatnonzero(data.labels == label)
        chosen += mine[::len(mine) // count][:count].tolist()
    y = ev.to_float(data.test[chosen])
    y_hat = ev.reconstruct(model, inputs, inputs.test[chosen]).clamp(0, 1)
    auroc = ev.auroc(judged.scores, data.labels)
    block.suptitle(f"{title}: image AUROC {auroc:.3f}", fontsize=10)
    axes = block.subplots(3, 2 * count)
    errors, highest = judged.maps[chosen].numpy(), judged.color_limit
    for column, (line, score) in enumerate(zip(axes.T, judged.scores[chosen])):
        line[0].imshow(y[column].expand(3, -1, -1).movedim(0, -1).numpy())
        line[1].imshow(y_hat[column].expand(3, -1, -1).movedim(0, -1).numpy())
        line[2].imshow(errors[column], cmap="inferno", vmin=0, vmax=highest)
        kind = "normal" if column < count else "anomalous"
        line[0].set_title(f"{kind}\nscore {score:.3g}", fontsize=8)
    for axis, name in zip(axes[:, 0], ("input", "reconstruction", "error")):
        axis.set_ylabel(name, fontsize=8)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])


def examples(out, runs, data_dir):
    """Input, reconstruction and error of each run, and the mask.

    Four normals and four anomalies are drawn, from the smallest score of the first run
    to the largest. Raises ValueError where another run has other test images.
    """
    sys.path.insert(0, str(ROOT))
    import evaluate as ev                           # here alone: it takes seconds
    first, shown = None, {}
    for run in runs:
        state, model = ev.load_run(run)
        c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
        data, inputs, _ = ev.open_data(c, "cpu", state)
        first = first or data
        same = first.test.equal(data.test) and first.labels.equal(data.labels)
        if not same:
            raise ValueError(f"{run} has other test images, or labels, than {runs[0]}")
        title = title_of(c)
        if title in shown:
            title = f"{title}, {run}"
        judged = ev.judge(model, c, data, inputs)[1]
        shown[title] = model, inputs, judged
    command = f"python results/figures.py examples {out} {' '.join(map(str, runs))}"
    lines = textwrap.wrap(command, 160, break_on_hyphens=False)
    ev.draw_examples(out, shown, data, "\n".join(lines))


def title_of(c):
    """A run in words: "L2-LAMP", and of other models than ae also their name.

    UniAD is named with its start.
    """
    if "loss" not in c:
        return c["model"]
    loss = c["loss"].upper() + ("-LAMP" if c["lamp"] else "")
    start = f" {c['start']} start,\n" if c["model"] == "uniad" else " "
    return loss if c["model"] == "ae" else f"{c['model']},{start}{loss}"


def curves(out, runs, data_dir=None):
    """A panel for each of CURVES that some run has, with a line for each run."""
    records = [json.loads(Path(run, "run.json").read_text()) for run in runs]
    points = {key: {} for key in CURVES}            # {curve: {number of a run: points}}
    for key in CURVES:
        for number, record in enumerate(records):
            known = [(h["epoch"], h[key]) for h in record["history"]
                     if h.get(key) is not None]
            if known:
                points[key][number] = known
    shown = [key for key in CURVES if points[key]]
    if not shown:
        raise ValueError("these runs have no history: they were solved, not trained")
    figure = Figure(figsize=(4.5 * len(shown), 3.4), layout="constrained")
    axes = figure.subplots(1, len(shown), squeeze=False)[0]
    for axis, key in zip(axes, shown):
        for number, known in points[key].items():
            epochs, values = zip(*known)
            title = f"{title_of(records[number]['config'])} ({runs[number]})"
            axis.plot(epochs, values, "o-", markersize=3, label=title)
        axis.set(xlabel="epoch", title=key.replace("_", " "))
    axes[0].legend(fontsize=7)
    command = f"python results/figures.py curves {out} {' '.join(map(str, runs))}"
    figure.supxlabel(command, fontsize=7)
    figure.savefig(out, dpi=110)


def equal_error(plain, lamp):
    """How far LAMP's AUROC is ahead of L2's, when L2 had the same training error.

    plain, lamp: curves of one class, [(epoch, training error, AUROC), ...]. LAMP counts
    at its last epoch. L2's AUROC between two epochs lies on a line. None where L2 never
    had that training error.
    """
    _, error, auroc = lamp[-1]
    errors, aurocs = zip(*sorted(point[1:] for point in plain))
    if not errors[0] <= error <= errors[-1]:
        return None
    return auroc - np.interp(error, errors, aurocs)


def judged_on_the_way():
    """Curves of table1 at batch size 32 -> {loss: {(class, seed): curve}}.

    A curve is [(epoch, training error, AUROC), ...]. That of ANNEALED is made of whole
    runs: of 3 to 7 epochs, from annealed.csv, and of 8.
    """
    found = {loss: defaultdict(list) for loss in ("L2", ANNEALED, "L2-LAMP")}
    for row in map(with_setting, read("table1")):
        if row["batch_size"] == 32 and row["seed"] > 0:     # seed 0: at its end only
            key, point = point_of(row)
            found["L2-LAMP" if row["lamp"] else "L2"][key].append(point)
            if not row["lamp"] and row["epoch"] == row["epochs"]:
                found[ANNEALED][key].append(point)
    for row in read("annealed"):
        key, point = point_of(row)
        found[ANNEALED][key].append(point)
    return found


def point_of(row):
    """A row -> whose curve it belongs to, and its point there."""
    point = row["epoch"], row["base_error"], row["image_auroc"]
    return (row["category"], row["seed"]), point


def print_at_equal_error(found, loss):
    """How far L2-LAMP is ahead of L2 when the two have the same training error."""
    ahead = defaultdict(list)                       # {class: the gains of its seeds}
    for (category, seed), curve in found["L2-LAMP"].items():
        gain = equal_error(found[loss][category, seed], curve)
        if gain is not None:
            ahead[category].append(gain)
    means = [np.mean(gains) for gains in ahead.values()]
    print(f"L2-LAMP - {loss}, at equal training error: {mean_and_interval(means, '+')},"
          f" ahead on {sign_test(means)[0]} digits")


def copying(out, runs, data_dir=None):
    """Does AUROC fall as a model learns to copy? At equal copying, who detects more?

    The mean curves of a code of 2x2x128 at batch size 32, and a line of print.
    """
    found = judged_on_the_way()
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    over_epochs, over_error = figure.subplots(1, 2, sharey=True)
    for loss, of_classes in found.items():
        curves_by_epoch = [sorted(curve) for curve in of_classes.values()]
        epochs, errors, aurocs = np.mean(curves_by_epoch, axis=0).T
        over_epochs.plot(epochs, aurocs, "o-", markersize=4, label=loss)
        over_error.plot(errors, aurocs, "o-", markersize=4)
    for loss in ("L2", ANNEALED):
        print_at_equal_error(found, loss)
    over_epochs.set(xlabel="epoch", ylabel="image AUROC, mean over the digits")
    over_error.set(xlabel="training error (squared, a pixel): falls to the right",
                   xscale="log")
    over_error.invert_xaxis()
    over_error.minorticks_off()
    over_error.set_xticks([0.02, 0.01, 0.005], ["0.02", "0.01", "0.005"])
    over_epochs.set_title("MNIST, a code of 2x2x128", fontsize=9)
    over_error.set_title("batch size 32, seeds 1 and 2", fontsize=9)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    figure.supxlabel(f"python results/figures.py copying {out}", fontsize=7)
    figure.savefig(out, dpi=110)


def route(out, runs, data_dir=None):
    """Which tokens does the reconstruction of the middle one depend on, in UniAD runs?

    For each run and category: |d f_hat_i / d f_j| of each token j, the norm over all
    channels, averaged over four normal test images. The square is the mask's window
    around i. Its share of all squared influence, and that of i alone, stand above. So
    does how well the run has learned images that it has not seen, see `over_mean_map`.
    """
    sys.path.insert(0, str(ROOT))
    import evaluate as ev                           # here alone: it takes seconds
    maps, errors = {}, {}
    for run in runs:
        state, model = ev.load_run(run)
        c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
        data, inputs, _ = ev.open_data(c, "cpu", state)
        for category in sorted(set(data.categories)):
            normal = ev.is_of(data.categories, category) & (data.labels == 0)
            trained_on = ev.is_of(inputs.train_categories, category)
            f = inputs.prepare(inputs.test[normal])                 # (B, C, g, g)
            name = f"{c['start']} start, {c['epochs']} epochs"
            maps[name, category] = influence(model, f[:4])
            mean_map = inputs.prepare(inputs.train[trained_on]).mean(0)
            errors[name, category] = over_mean_map(model, f, mean_map)
    window = c["neighbors"]
    names, categories = (list(dict.fromkeys(part)) for part in zip(*maps))
    figure = Figure((2.1 * len(categories), 2.7 * len(names) + 0.4),
                    layout="constrained")
    axes = figure.subplots(len(names), len(categories), squeeze=False)
    for line, name in zip(axes, names):
        print(name)
        line[0].set_ylabel(name)
        for axis, category in zip(line, categories):
            title = f"{category}\n{errors[name, category]:.2f} of the mean map's error"
            draw_influence(axis, maps[name, category], window, title)
    command = f"python results/figures.py route {out} {' '.join(map(str, runs))}"
    lines = textwrap.wrap(command, 140, break_on_hyphens=False)
    figure.supxlabel("\n".join(lines), fontsize=7)
    figure.savefig(out, dpi=110)


def influence(model, f, draws=16):
    """Features (B, C, g, g) -> the squared norm of d f_hat_i / d f_j, i in the middle.

    It is the mean over random directions v of |d (v f_hat_i) / d f_j|^2: (g, g).
    """
    import torch
    middle, total = f.shape[-1] // 2, 0
    generator = torch.Generator().manual_seed(0)
    f = f.clone().requires_grad_()
    f_hat = model.eval()(f)[:, :, middle, middle]                   # (B, C)
    for _ in range(draws):
        v = torch.randn(f_hat.shape, generator=generator)
        slope, = torch.autograd.grad((v * f_hat).sum(), f, retain_graph=True)
        total = total + slope.square().sum(1).mean(0)               # (g, g)
    return (total / draws).numpy()


def over_mean_map(model, f, mean_map):
    """The squared error of f_hat over that of the mean map, for all of f together.

    f: features of images that were not trained on, (B, C, g, g). mean_map: the mean of
    the training images' features, (C, g, g). A model that has learned no more than it
    has about 1.
    """
    import torch
    with torch.no_grad():
        f_hat = torch.cat([model.eval()(part) for part in f.split(8)])
    return float((f_hat - f).square().mean() / (mean_map - f).square().mean())


def draw_influence(axis, squared, window, title):
    middle, radius = len(squared) // 2, window // 2
    near = slice(middle - radius, middle + radius + 1)
    share = squared[near, near].sum() / squared.sum()
    own = squared[middle, middle] / squared.sum()
    words = title.replace("\n", ": ")
    print(f"{words}; of the window {share:.3f}, of the token itself {own:.3f}")
    axis.imshow(np.sqrt(squared), cmap="inferno")
    corner = middle - radius - 0.5
    axis.add_patch(Rectangle((corner, corner), window, window, fill=False, color="w"))
    axis.set_title(f"{title}\nwindow {share:.0%}, itself {own:.0%}", fontsize=8)
    axis.set(xticks=[], yticks=[])


def ways(out, runs, data_dir=None):
    """Four ways to keep a network from copying, as AUROC over the training error.

    A narrow code, a larger learning rate and LAMP are from tuned.csv: a line for each
    code and loss, whose points are the learning rates. A short training is from
    annealed.csv and table1.csv, a line whose points are runs of 3 to 8 epochs.
    """
    cells = defaultdict(list)
    for row in read("tuned"):
        if row["seed"] == 0 and row["over"] != "batch":
            line = f"{'LAMP' if row['lamp'] else 'L2'}, code 2x2x{row['latent']}"
            cells[line, row["lr"]].append((row["base_error"], row["image_auroc"]))
    lines = defaultdict(list)
    for (line, _), values in sorted(cells.items()):
        lines[line].append(np.mean(values, axis=0))
    short = [sorted(curve) for curve in judged_on_the_way()[ANNEALED].values()]
    lines["L2, code 2x2x128, 3 to 8 epochs"] = np.mean(short, axis=0)[:, 1:]

    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axis = figure.subplots()
    for line, points in lines.items():
        errors, aurocs = np.transpose(points)
        style = "s--" if "epochs" in line else "o-" if "LAMP" in line else "s-"
        axis.plot(errors, aurocs, style, markersize=4, label=line)
    axis.set(xscale="log", xlabel="training error (squared, a pixel): more copying to "
             "the right", ylabel="image AUROC, mean over the digits")
    axis.invert_xaxis()
    axis.legend(fontsize=8)
    axis.set_title("MNIST, batch size 32; points: learning rates .0003 to .03, or "
                   "3 to 8 epochs", fontsize=9)
    figure.supxlabel(f"python results/figures.py ways {out}", fontsize=7)
    figure.savefig(out, dpi=110)


def seconds(out, runs, data_dir=None):
    """How good is a model after so many seconds of one core? From seconds.csv.

    The seconds are those of training up to an epoch, and of judging all test images
    once. A model that is solved instead of trained has a line over its size.
    """
    judged, lines = defaultdict(list), defaultdict(list)
    for row in read("seconds"):
        if row["category"] == "mean":
            size = row.get("components") or row.get("bank_images")
            judged[row["model"], row.get("start"), size].append(row)
    for (model, start, _), rows in judged.items():
        last = rows[-1]
        judging = (last["seconds"] - last["training_seconds"]) / len(rows)
        name = f"{NAMES[model]}, {start} start" if start else NAMES[model]
        for row in rows:
            lines[name].append((row["training_seconds"] + judging, row["image_auroc"]))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, points in lines.items():
        axis.plot(*zip(*points), "o-", markersize=4, label=name)
    axis.set(xscale="log", ylabel="image AUROC, mean over the products",
             xlabel="seconds of one core, to learn and to judge (features at hand)",
             title="One model for five products of MVTec AD, standardized score")
    axis.legend(fontsize=8)
    figure.supxlabel(f"python results/figures.py seconds {out}", fontsize=7)
    figure.savefig(out, dpi=110)


NAMES = {"uniad": "UniAD", "cnn": "CNN", "pca": "PCA", "nearest": "nearest tokens"}
FIGURES = {"idea": idea, "examples": examples, "curves": curves, "copying": copying,
           "ways": ways, "seconds": seconds, "route": route}


def main(argv=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("figure", choices=FIGURES)
    add("out", help="the picture")
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--data-dir", help="where the data sets are (default: as in the run)")
    args = parser.parse_args(argv)
    without_runs = ("idea", "copying", "ways", "seconds")
    if bool(args.runs) == (args.figure in without_runs):
        parser.error("name runs, but none for idea, which makes them, and for copying, "
                     "ways and seconds, which read CSV files")
    try:
        FIGURES[args.figure](args.out, args.runs, args.data_dir)
    except (ValueError, OSError) as error:
        parser.exit(2, f"figures.py: {error}\n")
    print(f"wrote {args.out}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
