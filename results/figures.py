"""Figures: runs of train.py side by side.

    python results/figures.py examples OUT.jpg RUN...   the paper's Fig. 4: the same test images,
                                                        as each run reconstructs them
    python results/figures.py curves OUT.png RUN...     error and AUROC over the epochs
    python results/figures.py verdicts OUT.jpg RUN...   a row a run: test images with heat maps
    python results/figures.py copying OUT.png           AUROC over epochs and over training error,
                                                        from results/table1.csv
To be run in the repository's folder, after the runs have been made (results/sweep.py).
"""
import argparse
import json
import sys
import textwrap
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pairs import mean_and_interval, read, sign_test, with_setting

ROOT = Path(__file__).resolve().parent.parent
CURVES = ("base_error", "image_auroc", "pixel_auroc")


def examples(out, runs, data_dir):
    """Input, reconstruction and error of each run, and the mask: four normals, four anomalies, from
    the smallest score of the first run to the largest. Raises ValueError: other test images."""
    sys.path.insert(0, str(ROOT))
    import evaluate as ev
    seen, first = {}, None
    for run in runs:
        state, model = ev.load_run(run)
        c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
        data, inputs, _ = ev.open_data(c, "cpu", state)
        first = first or data
        if not (first.test.equal(data.test) and first.labels.equal(data.labels)):
            raise ValueError(f"{run} has other test images, or labels, than {runs[0]}")
        if not len(data.test):
            raise ValueError(f"{run} has no test images")
        title = title_of(c) if title_of(c) not in seen else f"{title_of(c)}, {run}"
        seen[title] = (model, inputs, ev.judge(model, c, data, inputs)[1])
    footer = f"python results/figures.py examples {out} {' '.join(map(str, runs))}"
    ev.draw_examples(out, seen, data, "\n".join(textwrap.wrap(footer, 160, break_on_hyphens=False)))


def verdicts(out, runs, data_dir):
    """A row a run: two normals that pass and five anomalies that are found, the middle of each
    fifth of these by score, with the heat map laid over; at the left, how many there are of all."""
    sys.path.insert(0, str(ROOT))
    import torch

    import evaluate as ev
    from autoencoder import lay_over
    figure = Figure(figsize=(11, 1.85 * len(runs) + 0.2), layout="constrained")
    for axes, run in zip(figure.subplots(len(runs), 7, squeeze=False), runs):
        state, model = ev.load_run(run)
        c = {**state["config"], "data_dir": data_dir or state["config"]["data_dir"]}
        data, inputs, _ = ev.open_data(c, "cpu", state)
        judged = ev.judge(model, c, data, inputs)[1]
        if not len(data.test) or None in judged.thresholds:
            raise ValueError(f"{run} has no test images, or no threshold")
        order, above = judged.scores.argsort(), judged.scores > torch.tensor(judged.thresholds)
        words = [*dict.fromkeys(data.categories)]
        for label, axes_of, truth in ((0, axes[:2], "good"), (1, axes[2:], "defective")):
            alike = order[data.labels[order] == label]
            right = alike[above[alike] == bool(label)].tolist()
            for n, axis in enumerate(axes_of[:len(right)]):
                i = right[int((n + 0.5) / len(axes_of) * len(right))]
                heat = judged.maps[i] / judged.color_limit
                axis.imshow(lay_over(ev.to_float(data.test[i]), heat).permute(1, 2, 0).numpy())
                axis.set_title(f"{truth}: {'found' if label else 'passes'}", fontsize=8)
                axis.set(xticks=[], yticks=[])
            said = "found" if label else "pass"
            words.append(f"{len(right)} of {len(alike)} {said}")
        axes[0].set_ylabel("\n".join(words), fontsize=8)
    footer = f"python results/figures.py verdicts {out} {' '.join(map(str, runs))}"
    figure.supxlabel("\n".join(textwrap.wrap(footer, 220)), fontsize=5)
    figure.savefig(out, dpi=90)


def title_of(c):
    """A run in words: "L2-LAMP"; of other models than the autoencoder also their name."""
    loss = f"{c['loss'].upper()}{'-LAMP' if c['lamp'] else ''}"
    return loss if c["model"] == "ae" else f"{c['model']}, {loss}"


def curves(out, runs, data_dir=None):
    """A panel for each of CURVES that some run has, a line a run."""
    records = [json.loads(Path(run, "run.json").read_text()) for run in runs]
    points = {}                                             # (curve, run's number): epochs, values
    for key in CURVES:
        for number, record in enumerate(records):
            known = [(h["epoch"], h[key]) for h in record["history"] if h.get(key) is not None]
            if known:
                points[key, number] = known
    shown = [key for key in CURVES if any(curve == key for curve, _ in points)]
    if not shown:
        raise ValueError("these runs have no history: they were solved, not trained")
    figure = Figure(figsize=(4.5 * len(shown), 3.4), layout="constrained")
    axes = dict(zip(shown, figure.subplots(1, len(shown), squeeze=False)[0]))
    for (key, number), known in points.items():
        epochs, values = zip(*known)
        title = f"{title_of(records[number]['config'])} ({runs[number]})"
        axes[key].plot(epochs, values, "o-", markersize=3, label=title)
        axes[key].set(xlabel="epoch", title=key.replace("_", " "))
    axes[shown[0]].legend(fontsize=7)
    footer = f"python results/figures.py curves {out} {' '.join(map(str, runs))}"
    figure.supxlabel(footer, fontsize=7)
    figure.savefig(out, dpi=110)


def equal_error(plain, lamp):
    """Curves of one class, [(epoch, training error, AUROC)] -> by how much LAMP is ahead at its end
    of L2 when that had the same training error; None where it never had."""
    _, error, auroc = lamp[-1]
    errors, aurocs = zip(*sorted(point[1:] for point in plain))     # between epochs: on a line
    inside = errors[0] <= error <= errors[-1]
    return auroc - np.interp(error, errors, aurocs) if inside else None


def copying(out, runs, data_dir=None):
    """At 2x2x128, batch size 32: does AUROC fall as a model learns to copy? And at equal copying,
    who detects more? Mean curves, and a line of print at equal training error."""
    curves = {"L2": defaultdict(list), "L2-LAMP": defaultdict(list)}    # {class and seed: curve}
    for row in map(with_setting, read("table1")):
        if row["batch_size"] == 32 and row["seed"] > 0:     # judged on the way
            curve = curves["L2-LAMP" if row["lamp"] else "L2"][row["category"], row["seed"]]
            curve.append((row["epoch"], row["base_error"], row["image_auroc"]))
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    over_epochs, over_error = figure.subplots(1, 2, sharey=True)
    for loss, of_classes in curves.items():
        epochs, errors, aurocs = np.mean([*of_classes.values()], axis=0).T
        over_epochs.plot(epochs, aurocs, "o-", markersize=4, label=loss)
        over_error.plot(errors, aurocs, "o-", markersize=4)
    ahead = defaultdict(list)                               # {class: its seeds'}
    for key, curve in curves["L2-LAMP"].items():
        gain = equal_error(curves["L2"][key], curve)
        if gain is not None:
            ahead[key[0]].append(gain)
    means = [np.mean(gains) for gains in ahead.values()]
    print(f"L2-LAMP at equal training error: {mean_and_interval(means, '+')}, ahead on "
          f"{sign_test(means)[0]} digits")
    over_epochs.set(xlabel="epoch", ylabel="image AUROC, mean over the digits")
    over_error.set(xlabel="training error (squared, a pixel): falls to the right", xscale="log")
    over_error.invert_xaxis()
    over_error.minorticks_off()
    over_error.set_xticks([0.02, 0.01, 0.005], ["0.02", "0.01", "0.005"])
    figure.legend(loc="outside upper left", ncols=2, fontsize=8)
    figure.suptitle("MNIST, a code of 2x2x128, batch size 32, seeds 1 and 2", fontsize=9)
    figure.supxlabel(f"python results/figures.py copying {out}", fontsize=7)
    figure.savefig(out, dpi=110)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("figure", choices=("examples", "curves", "verdicts", "copying"))
    add("out", help="the picture")
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote")
    add("--data-dir", help="where the data sets are (default: where the run found them)")
    args = parser.parse_args(argv)
    if bool(args.runs) == (args.figure == "copying"):
        parser.error("name runs, but none for copying, which reads results/table1.csv")
    draw = dict(examples=examples, curves=curves, verdicts=verdicts, copying=copying)[args.figure]
    try:
        draw(args.out, args.runs, args.data_dir)
    except (ValueError, OSError) as error:
        parser.exit(2, f"figures.py: {error}\n")
    print(f"wrote {args.out}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
