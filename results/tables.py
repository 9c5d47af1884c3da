"""Tables: the tables and pictures of the pages in results/, from its CSV files.

    python results/tables.py table1 --rows batch_size,loss --picture table1.png
    python results/tables.py table2 --rows loss,optimizer --best-of lr
    python results/tables.py gains --picture gains.png      LAMP's gain in all settings
    python results/tables.py steepness                      of the loss landscape

A table has a row for each value of the options that --rows names. Several experiments
are taken as one. results/pairs.py says what the columns mean. In parentheses stands the
paper's number, from paper.json.
"""
import argparse
import functools
import json
import re
import shlex
import sys
from collections import defaultdict

import numpy as np
from matplotlib.figure import Figure

from pairs import (OF_LAMP, RESULTS, UNITS, cells_for, differences, interval,
                   mean_and_interval, parse, read, sign_test, without_lamp)

WORDS = {                               # for options and metrics
    "loss": "{}",
    "optimizer": "{}",
    "model": "{}",
    "setting": "{}",
    "latent": "code 2x2x{}",
    "epochs": "{} epochs",
    "image_size": "{} pixels",
    "query": "queries: {}",
    "over": "maximum over the {}",
    "image_auroc": "image AUROC",
    "auroc_not_given": "image AUROC, category not given",
    "auroc_paper": "image AUROC by the paper's score",
    "pixel_auroc": "pixel AUROC",
    "pixel_aupro": "AUPRO",
    "base_error": "training error",
    "normal_error": "error of test normals",
    "anomaly_error": "error of test anomalies",
    "distance_to_identity": "distance from the identity",
}
X_LABELS = {"latent": "channels of the 2x2 code", "lr": "learning rate"}
NAMES = {
    "l1": "L1", "l2": "L2", "ssim": "SSIM", "sgd": "SGD", "rmsprop": "RMSprop",
    "adam": "Adam", "uniad": "UniAD", "mlp": "MLP", "cnn": "CNN",
    "transformer": "Transformer"}
GAINS = {                               # where LAMP was tried
    "MNIST, each loss at its own best, batch size 32 (10 digits)": dict(
        experiments=["best"], keys=["latent"], best_of=["lr"],
        where={"over": [None, "image"]}),
    "MNIST, a code of 2x2x8, each loss at its own best rate (10 digits)": dict(
        experiments=["by_size"], keys=["batch_size"], best_of=["lr"]),
    "MNIST, autoencoder with a code of 2x2x128 (10 digits; 1024: 3)": dict(
        experiments=["table1"], keys=["loss", "batch_size"]),
    "MNIST, autoencoder with a narrower code, batch size 32 (10 digits)": dict(
        experiments=["capacity"], keys=["latent"], where={"lr": [1e-3]}),
    "MNIST, a code of 2x2x128 and a larger rate, batch size 32 (10 digits)": dict(
        experiments=["capacity"], keys=["lr"], where={"lr": [3e-3, 1e-2]}),
    "MVTec AD, autoencoder of 64 x 64 pixels (4 categories, without grid)": dict(
        experiments=["settled"], keys=["epochs"],
        where={"model": ["ae"], "category!": ["grid"]}),
    "MVTec AD, the same, 30 epochs, by loss and optimizer (4 categories)": dict(
        experiments=["table2"], keys=["loss", "optimizer"], best_of=["lr"],
        where={"category!": ["grid"]}),
    "MVTec AD, autoencoder of 256 x 256 pixels (5 categories)": dict(
        experiments=["large"], keys=["image_size"]),
    "MVTec AD, one model of features, minutes "
    "(5 categories; UniAD with queries: 3)": dict(
        experiments=["minutes"], keys=["model", "query"],
        where={"setting": ["unified"]}),
    "MVTec AD, a CNN for each category (5 categories)": dict(
        experiments=["minutes"], keys=["model"],
        where={"setting": ["separate"], "model": ["cnn"]}),
    "MVTec AD, one UniAD, 816 steps of batch size 64 (5 categories)": dict(
        experiments=["unified"], keys=["query"],
        where={"model": ["uniad"], "over": [None, "image"]}),
    "MVTec AD, one UniAD from the two-step start (5 categories)": dict(
        experiments=["learned"], keys=["epochs"],
        where={"neighbors": [7], "query": ["layerwise"], "jitter": [5.0],
               "epochs": [5]}),
    "MVTec AD, the same, longer (5 categories)": dict(
        experiments=["start"], keys=["epochs"],
        where={"start": ["two-step"], "epochs": [24]}),
}
# the options of the paper's tables
OF_PAPER = ("loss", "batch_size", "optimizer", "category", "setting")
COMPARED = {
    "a": "(a) the L2 model seen through LAMP",
    "b": "(b) each model under its own loss, as in the paper",
    "c": "(c) both models under L2"}


# ---- tables ----

@functools.cache
def paper_numbers():
    """paper.json -> [(the words of a number's row and column, the number), ...]."""
    numbers = []
    for entry in json.loads((RESULTS / "paper.json").read_text()):
        words = f"{entry['row']} {entry['column']}".lower().split()
        numbers.append((set(words), entry["value"]))
    return numbers


def in_paper(*words):
    """The papers' number whose words are all among these, or None.

    Of several the one of most words is taken.
    """
    words = set(" ".join(map(str, words)).lower().split())
    fits = {}
    for named, number in paper_numbers():
        if named <= words and ("lamp" in named) == ("lamp" in words):
            fits[len(named)] = number
    return fits[max(fits)] if fits else None


def markdown(header, lines):
    """A header and lines of cells -> a Markdown table."""
    rows = []
    for line in [header, ["---"] * len(header), *lines]:
        rows.append(f"| {' | '.join(map(str, line))} |")
    return "\n".join(rows)


def with_paper(values, *words):
    """Mean and interval, and the paper's number for these words, if it has one."""
    number = in_paper(*words) if values else None
    published = "" if number is None else f" ({number:.3f})"
    return mean_and_interval(values) + published


def with_mean(cells):
    """Cells of categories, and a last one over all of them."""
    sides = zip(*cells.values())
    return {**cells, ("mean",): [functools.reduce(dict.__or__, side) for side in sides]}


def table(cells, keys, metric, over="categories"):
    """Cells -> a Markdown table: without LAMP, with it, and their difference.

    A row of plain runs that rows with LAMP are compared with is left out.
    """
    if keys == ["category"] and over == "categories":
        cells = with_mean(cells)
    with_lamp = any(lamp for _, lamp in cells.values())
    compared = [without_lamp(keys, values) for values, (_, lamp) in cells.items()
                if lamp]
    lines = []
    for values, (plain, lamp) in cells.items():
        if not lamp and values in compared:
            continue
        gains = differences((plain, lamp))
        named = [value for key, value in zip(keys, values) if key in OF_PAPER]
        line = ["" if value is None else value for value in values]
        line.append(with_paper([*plain.values()], *named, metric))
        if with_lamp:
            line.append(with_paper([*lamp.values()], *named, metric, "lamp"))
            line += [mean_and_interval(gains, "+"), *sign_test(gains)]
        lines.append(line)
    header = [key.replace("_", " ") for key in keys]
    if with_lamp:
        header += [f"{in_words(metric)}, without LAMP", "with LAMP", "difference",
                   "LAMP ahead", "p"]
    else:
        header.append(in_words(metric))
    return markdown(header, lines)


def all_gains():
    """LAMP's gain in each setting of GAINS.

    Yields the setting, its row in words, the differences, and the paper's or None.
    """
    for title, options in GAINS.items():
        for values, cell in cells_for(**options).items():
            named = [values]
            if in_paper(*values, "image_auroc") is None:
                # Table 2 has a number for each category.
                named = [(*values, category) for category in cell[1]]
            published = []
            for words in named:
                with_lamp = in_paper(*words, "image_auroc", "lamp")
                if with_lamp is not None:
                    published.append(with_lamp - in_paper(*words, "image_auroc"))
            parts = [in_words(key, value) for key, value in zip(options["keys"], values)
                     if value]
            mean = np.mean(published) if published else None
            yield title, ", ".join(parts), differences(cell), mean


def gains_table():
    """LAMP's gain in image AUROC in all settings, as Markdown."""
    lines = []
    for title, words, gains, paper in all_gains():
        lines.append([title, words, mean_and_interval(gains, "+"), *sign_test(gains),
                      "" if paper is None else f"{paper:+.4f}"])
    header = ["", "setting", "difference", "LAMP ahead", "p", "the paper's"]
    return markdown(header, lines)


def steepness_table():
    """How many times steeper LAMP is than L2, as Markdown.

    Means and 95 % intervals are over the seeds.
    """
    measures = ("gradient", "curvature", "gradient_per_loss", "curvature_per_loss")
    groups = defaultdict(list)
    for row in read("steepness"):
        groups[row["network"], row["batch_size"], row["compared"]].append(row)
    lines = []
    for (network, batch_size, compared), rows in groups.items():
        line = [network, batch_size, COMPARED[compared]]
        for key in measures:
            line.append(mean_and_interval([row[key] for row in rows], digits=2))
        lines.append(line)
    return markdown(["network", "batch size", "compared", "gradient", "curvature",
                     "gradient / loss", "curvature / loss"], lines)


def near_table():
    """How many times steeper LAMP is than L2 near the trained weights, as Markdown."""
    rows = read("near")
    spans = sorted({row["span"] for row in rows}, reverse=True)
    groups = defaultdict(lambda: defaultdict(list))
    for row in rows:
        compared = row["compared"], row["maximum"]
        groups[compared][row["span"]].append(row["gradient"])
    lines = []
    for (compared, maximum), by_span in groups.items():
        cells = [mean_and_interval(by_span[span], digits=2) for span in spans]
        lines.append([f"({compared})", maximum or "none, both under L2", *cells])
    titles = [f"within ±{span:g}" for span in spans]
    return markdown(["compared", "Eq. 2's maximum", *titles], lines)


# ---- pictures ----

def in_words(name, *values):
    """A metric or an option and its value, as a picture shows it."""
    name_alone = name.replace("_", " ")
    words = WORDS.get(name, f"{name_alone} {{}}" if values else name_alone)
    return words.format(*(NAMES.get(value, value) for value in values))


def curves(cells, keys):
    """Cells -> {a line's words: {first of keys: (values, differences)}}.

    Plain runs that several lines are compared with are drawn once.
    """
    with_lamp = any(lamp for _, lamp in cells.values())
    lines = defaultdict(dict)
    for (x, *rest), (plain, lamp) in cells.items():
        options = dict(zip(keys[1:], rest))
        options = {key: value for key, value in options.items() if value is not None}
        words = [in_words(key, value) for key, value in options.items()]
        if plain and not set(OF_LAMP) & set(options):
            name = ["without LAMP"] if with_lamp else []
            lines[", ".join([*name, *words])][x] = list(plain.values()), []
        if lamp:
            gains = differences((plain, lamp))
            lines[", ".join(["with LAMP", *words])][x] = list(lamp.values()), gains
    return lines


def gains_of(lines):
    """Lines of `curves` -> {words: {x: differences}}, where there are two or more."""
    gains = {}
    for name, points in lines.items():
        several = {x: gain for x, (_, gain) in points.items() if len(gain) > 1}
        if several:
            gains[name] = several
    return gains


def draw(path, tables, keys, command):
    """A panel for each metric, over the first of keys, a line for each other value.

    tables: {metric: cells}. The last panel has the difference in the first metric, with
    its interval.
    """
    drawn = {in_words(metric): curves(cells, keys) for metric, cells in tables.items()}
    first, lines = next(iter(drawn.items()))
    ticks = list(set().union(*lines.values()))
    if not all(isinstance(x, (int, float)) for x in ticks):
        raise ValueError(f"--picture draws over numbers, and {keys[0]}, first of "
                         "--rows, is none")
    by_factors = keys[0] in ("latent", "batch_size", "lr") and min(ticks) > 0
    gains = gains_of(lines)
    count = len(tables) + bool(gains)
    figure = Figure(figsize=(4.2 * count, 4.2), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    colors = {name: f"C{i}" for i, name in enumerate(lines)}
    for panel, (title, its_lines) in zip(panels, drawn.items()):
        panel.set_title(title)
        draw_lines(panel, its_lines, colors)
    if gains:
        panels[-1].set_title(f"{first}: with LAMP - without")
        draw_gain_lines(panels[-1], gains, colors, by_factors)
    for panel in panels:
        panel.set_xlabel(X_LABELS.get(keys[0], keys[0].replace("_", " ")))
        if by_factors:
            panel.set_xscale("log", base=2)
            panel.set_xticks(ticks, ticks)
    if len(lines) > 1:
        handles = panels[0].get_legend_handles_labels()
        columns = 2 if max(map(len, handles[1])) > 40 else 3
        figure.legend(*handles, loc="outside upper left", ncols=columns, fontsize=8)
    save(figure, path, command)


def draw_lines(panel, lines, colors):
    """The mean over categories or seeds, line by line."""
    for name, points in lines.items():
        means = [np.mean(values) for values, _ in points.values()]
        marker = "o" if name.startswith("with LAMP") else "s"
        panel.plot([*points], means, marker + "-", color=colors[name], label=name)


def draw_gain_lines(panel, gains, colors, by_factors):
    """Mean differences with intervals, each line a little to the right of the last."""
    panel.axhline(0, color="black", linewidth=0.8)
    for i, (name, points) in enumerate(gains.items()):
        shift = 0.15 * (i - (len(gains) - 1) / 2)
        xs = [x * 2 ** shift if by_factors else x + shift for x in points]
        means = [np.mean(gain) for gain in points.values()]
        widths = [interval(gain) for gain in points.values()]
        panel.errorbar(xs, means, widths, fmt="o-", capsize=3, color=colors[name])


def save(figure, path, command):
    figure.supxlabel(command, fontsize=6)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def draw_gains(path, command):
    """LAMP's gain in image AUROC in all settings, with intervals and the paper's."""
    groups = defaultdict(list)
    for title, words, gains, paper in all_gains():
        groups[title].append((words, gains, paper))
    sizes = [len(group) for group in groups.values()]
    figure = Figure(figsize=(9, 0.27 * sum(sizes) + 2.4), layout="constrained")
    panels = figure.subplots(len(groups), sharex=True, height_ratios=sizes)
    for panel, (title, group) in zip(panels, groups.items()):
        for y, (_, gains, paper) in enumerate(group):
            here = panel.errorbar(np.mean(gains), y, xerr=interval(gains), fmt="o",
                                  color="C0", capsize=3)
            if paper is not None:               # below, so as not to hide the interval
                published, = panel.plot(paper, y + 0.25, "D", color="C1",
                                        markerfacecolor="none", markersize=5)
        names = [words for words, _, _ in group]
        panel.set_yticks(range(len(group)), names, fontsize=8)
        panel.set_title(title, fontsize=9, loc="left")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_ylim(len(group) - 0.4, -0.6)      # the first on top
    panels[-1].set_xlabel("image AUROC: with LAMP - without")
    figure.legend([here, published], ["here, mean and 95 % interval", "the paper"],
                  ncols=2, loc="outside upper right", fontsize=8)
    save(figure, path, command)


# ---- the command ----

def parse_where(text):
    """ "seed=0,seed=1,category!=grid" -> {"seed": [0, 1], "category!": ["grid"]}"""
    where = defaultdict(list)
    for word in re.split(r",(?=\w+!?=)", text) if text else []:
        option, _, value = word.partition("=")
        where[option].append(parse(value))
    return where


def print_tables(args, command):
    """Print what the command line asks for, and draw it where --picture is given."""
    if args.names == ["steepness"]:
        print(steepness_table())
    elif args.names == ["near"]:
        print(near_table())
    elif args.names == ["gains"]:
        print(gains_table())
        if args.picture:
            draw_gains(args.picture, command)
    else:
        keys, where = args.rows.split(","), parse_where(args.where)
        tables = {}
        for metric in args.metric.split(","):
            tables[metric] = cells_for(args.names, keys, metric, args.best_of,
                                       args.chosen_on, args.over, where)
        texts = []
        for metric, cells in tables.items():
            texts.append(table(cells, keys, metric, args.over))
        print("\n\n".join(texts))
        if args.picture:
            draw(args.picture, tables, keys, command)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("names", nargs="+", metavar="EXPERIMENT",
        help="one or more; or gains; or steepness; or near")
    add("--rows", default="category",
        help="options, a row for each of their values (default: category)")
    add("--metric", default="image_auroc",
        help="a table for each of these (default: image_auroc)")
    add("--where", default="", metavar="OPTION=VALUE,OPTION!=VALUE,...",
        help="of these runs alone")
    add("--over", choices=UNITS, default="categories",
        help="what the intervals are over")
    add("--best-of", default=(), type=lambda s: s.split(","),
        help="the best over these options")
    add("--chosen-on", choices=("itself", "others"), default="itself",
        help="best on the category itself (default), or on the mean of the others")
    add("--picture", metavar="FILE", help="draw it, too")
    args = parser.parse_args(argv)
    if args.best_of and args.over == "seeds":
        parser.error("--best-of chooses by category: leave out --over seeds")
    try:
        print_tables(args, shlex.join(["python", "results/tables.py", *argv]))
    except (ValueError, OSError) as error:
        parser.exit(2, f"tables.py: {error}\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
