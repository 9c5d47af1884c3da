"""Pairs: from the CSV files beside this to runs without and with LAMP, with statistics.

Runs come in pairs, without and with LAMP, of one seed and one category. The seeds of
one category are no independent sample of categories, so its mean over seeds is taken
first. Then, over categories (or over seeds, of the mean over categories: --over seeds):

    difference    the mean of the paired differences, with LAMP minus without
    ±             the 95 % Student-t interval of a mean of n: t(n - 1) s / sqrt(n)
    p             the exact two-sided sign test: if LAMP were as likely ahead as behind,
                  how likely is a split at least as uneven? Ties are left out. It is
                  empty below two pairs.
"""
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent
OF_CATEGORIES = (                       # metrics that each category has
    "image_auroc", "image_ap", "pixel_auroc", "pixel_aupro", "threshold", "fpr", "tpr")
MORE_IS_BETTER = (
    "image_auroc", "auroc_not_given", "auroc_paper", "image_ap", "pixel_auroc",
    "pixel_aupro", "tpr")
OF_LAMP = ("over", "eps", "detach", "log")      # options that a run without it lacks
UNITS = {"categories": "category", "seeds": "seed"}


# ---- from a CSV to cells ----

def parse(text):
    """A CSV's text -> None, bool, int, float, or the text."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def read(name):
    """results/NAME.csv -> its rows, {option or metric: value}, with its comment's."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in RESULTS.glob("*.csv")))
        raise ValueError(f"{name}: no such experiment. There are {known}")
    with path.open(newline="") as file:
        lines = file.readlines()
    shared = {}
    if lines[0].startswith("#"):
        words = lines.pop(0)[1:].split()
        shared = dict(word.split("=", 1) for word in words)
    rows = []
    for cells in csv.DictReader(lines):
        texts = {**shared, **cells}
        rows.append({key: parse(text) for key, text in texts.items()})
    return rows


def with_setting(row):
    """A row with what it says without a column.

    That is `setting`, unified or separate, and that a run without LAMP has none of
    LAMP's options.
    """
    classes = str(row["normal"])
    setting = "unified" if classes == "all" or "," in classes else "separate"
    lamp = bool(row.get("lamp"))
    none = dict.fromkeys(OF_LAMP)
    if lamp:
        return {**none, **row, "lamp": True, "setting": setting}
    return {**none, **row, **none, "lamp": False, "setting": setting}


def counts(row, metric, each_epoch):
    """Whether a table of `metric` counts this row.

    A table with a row for each epoch takes whole runs. Others take the last epoch: of
    each category, where it is a metric of categories, or else of the whole run.
    """
    if row.get(metric) is None:
        return False
    errors = row.get("base_error"), row.get("normal_error")
    whole_run = errors != (None, None)
    if each_epoch:
        return whole_run
    is_last = row["epoch"] in (0, row.get("epochs"))        # 0: solved, not trained
    if metric in OF_CATEGORIES:
        return is_last and row["category"] != "mean"
    return is_last and whole_run


def sort_key(values):
    return [(isinstance(value, str), value or 0) for value in values]


def cells_of(rows, keys, metric, over):
    """Rows -> cells, {values of the options `keys`: (without LAMP, with LAMP)}.

    Each side is {category: mean over the seeds}; over="seeds": {seed: mean over the
    categories}. The plain runs are those that the runs with LAMP are compared with,
    whatever the options of LAMP are. Runs of a seed and category that only one side has
    are left out. Raises ValueError where runs of one cell differ in an option that is
    not among `keys`.
    """
    sides = sides_of(rows, keys, metric, over)
    if not sides:
        raise ValueError(f"no run with {metric} here")
    cells = {}
    for values in sorted(sides, key=sort_key):
        plain, lamp = sides[values]
        partner = without_lamp(keys, values)
        if not plain and partner in sides:
            plain = sides[partner][0]
        if plain and lamp:
            kept = plain.keys() & lamp.keys()
        else:
            kept = plain.keys() | lamp.keys()
        cells[values] = means_of(plain, kept, metric), means_of(lamp, kept, metric)
    return cells


def sides_of(rows, keys, metric, over):
    """Rows -> {values of keys: (plain, lamp)}, each {(unit, other): row}.

    unit: what a table's intervals are over, a category or a seed. other: the other one.
    """
    unit = UNITS[over]
    other = "seed" if unit == "category" else "category"
    sides = defaultdict(lambda: ({}, {}))
    for row in rows:
        if not counts(row, metric, "epoch" in keys):
            continue
        unknown = [key for key in keys if key not in row]
        if unknown:
            raise ValueError(f"no option {', '.join(unknown)} here. There are "
                             f"{', '.join(row)}")
        values = tuple(row[key] for key in keys)
        run = sides[values][row["lamp"]].setdefault((row[unit], row[other]), row)
        if run is not row:
            names = ", ".join(differing(run, row))
            raise ValueError(f"runs of one row differ in {names}: name that in --rows, "
                             "or choose by --where or --best-of")
    return sides


def options_of(row):
    """A row's options. They stand before its epoch."""
    return list(itertools.takewhile(lambda key: key != "epoch", row))


def differing(run, other):
    """The options in which two rows differ."""
    return [key for key in options_of(run) if run[key] != other[key]]


def without_lamp(keys, values):
    """The values of the plain runs that runs with these values are compared with."""
    return tuple(None if key in OF_LAMP else value for key, value in zip(keys, values))


def means_of(runs, kept, metric):
    """{(unit, other): row} -> {unit: mean of the metric over the `kept` ones}."""
    numbers = defaultdict(list)
    for (unit, other), row in runs.items():
        if (unit, other) in kept:
            numbers[unit].append(row[metric])
    return {unit: float(np.mean(values)) for unit, values in numbers.items()}


def pick(settings, category, chosen_on):
    """The setting, {category: value}, with the highest value.

    chosen_on: on the category "itself", as the paper has it, or on the mean of the
    "others", which can be known before this one is judged.
    """
    scores = []
    for setting in settings:
        if chosen_on == "itself":
            seen = [setting[category]]
        else:
            seen = [value for name, value in setting.items() if name != category]
        scores.append(np.mean(seen) if seen else -np.inf)
    if max(scores) == -np.inf:
        raise ValueError("--chosen-on others: there is no other category than "
                         f"{category}")
    return settings[int(np.argmax(scores))]


def best_cells(rows, keys, metric, options, chosen_on):
    """As `cells_of`, but of the runs that differ in `options` the best one.

    It is chosen for each category, of plain runs and of runs with LAMP apart. Raises
    ValueError for a metric of which more is not better.
    """
    if metric not in MORE_IS_BETTER:
        raise ValueError(f"--best-of takes the largest {metric}: use one of "
                         f"{', '.join(MORE_IS_BETTER)}")
    kept = [key for key in keys if key != "category"]
    groups = defaultdict(list)
    for values, cell in cells_of(rows, [*kept, *options], metric, "categories").items():
        groups[values[:len(kept)]].append(cell)
    best = defaultdict(lambda: ({}, {}))
    for values, group in groups.items():
        for side in (0, 1):
            sides = [cell[side] for cell in group]
            for category in dict.fromkeys(itertools.chain(*sides)):
                settings = [setting for setting in sides if category in setting]
                chosen = pick(settings, category, chosen_on)
                known = {**dict(zip(kept, values)), "category": category}
                place = tuple(known[key] for key in keys)
                best[place][side][category] = chosen[category]
    return {values: best[values] for values in sorted(best, key=sort_key)}


def cells_for(experiments, keys, metric="image_auroc", best_of=(), chosen_on="itself",
              over="categories", where=()):
    """The cells of a table of experiments.

    where: {option: allowed values}, or {"option!": values that are left out}.
    """
    rows = []
    for name in experiments:
        rows += [with_setting(row) for row in read(name)]
    # Of several experiments, each row has the options of all, None where it lacks one.
    options = dict.fromkeys(key for row in rows for key in options_of(row))
    rows = [{**options, **row} for row in rows]
    for word, values in dict(where).items():
        option = word.removesuffix("!")
        if option not in rows[0]:
            raise ValueError(f"--where: no {option} here. There are "
                             f"{', '.join(rows[0])}")
        wanted = not word.endswith("!")
        rows = [row for row in rows if (row.get(option) in values) == wanted]
        if not rows:
            raise ValueError(f"--where: no run has {word} "
                             f"{' or '.join(map(str, values))}")
    if best_of:
        return best_cells(rows, keys, metric, best_of, chosen_on)
    return cells_of(rows, keys, metric, over)


# ---- statistics ----

def interval(values):
    """Half the width of the 95 % Student-t interval of the mean of several values."""
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def mean_and_interval(values, sign="", digits=4):
    """As text. Of one value without the interval, of none empty."""
    if not len(values):
        return ""
    mean = f"{np.mean(values):{sign}.{digits}f}"
    return f"{mean} ± {interval(values):.{digits}f}" if len(values) > 1 else mean


def differences(cell):
    """With LAMP minus without, of each category or seed that has both."""
    plain, lamp = cell
    return [lamp[unit] - plain[unit] for unit in lamp if unit in plain]


def sign_test(values):
    """Texts: how often a difference is above 0, and p of the exact sign test."""
    if not values:
        return "", ""
    ahead, behind = sum(x > 0 for x in values), sum(x < 0 for x in values)
    p = ""
    if ahead + behind > 1:
        p = f"{stats.binomtest(ahead, ahead + behind).pvalue:.3f}"
    return f"{ahead} of {len(values)}", p
