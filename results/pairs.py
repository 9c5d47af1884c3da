"""Pairs: from the CSV files beside this to runs without and with LAMP, paired, with statistics.

Runs come in pairs, without and with LAMP, of one seed and one category. Seeds of one category are
no independent sample of categories, so its mean over seeds is taken first. Then, over categories
(or over seeds, of the mean over categories: --over seeds):
    difference    mean of the paired differences, with LAMP minus without
    ±             95 % Student-t interval of a mean of n: t(n - 1) s / sqrt(n)
    p             exact two-sided sign test: if LAMP were as likely ahead as behind, how likely is
                  a split at least as uneven? Ties are left out; empty below two pairs
"""
import csv
import itertools
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

RESULTS = Path(__file__).resolve().parent
OF_CATEGORIES = ("image_auroc", "image_ap", "pixel_auroc", "pixel_aupro", "threshold", "fpr", "tpr")
MORE_IS_BETTER = ("image_auroc", "auroc_not_given", "auroc_paper", "image_ap", "pixel_auroc",
                  "pixel_aupro", "tpr")
OF_LAMP = ("over", "eps", "detach", "log")                  # options that a run without it lacks
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
    """results/NAME.csv -> its rows: {option or metric: value}, those of its comment included."""
    path = RESULTS / f"{name}.csv"
    if not path.exists():
        known = ", ".join(sorted(other.stem for other in RESULTS.glob("*.csv")))
        raise ValueError(f"{name}: no such experiment; there are {known}")
    with path.open(newline="") as file:
        lines = file.readlines()
    shared = {}
    if lines[0].startswith("#"):
        shared = dict(word.split("=", 1) for word in lines.pop(0)[1:].split())
    rows = []
    for cells in csv.DictReader(lines):
        rows.append({key: parse(value) for key, value in {**shared, **cells}.items()})
    return rows


def with_setting(row):
    """A row with what it says without a column: `setting`, and no option of LAMP without LAMP."""
    classes = str(row["normal"])
    setting = "unified" if classes == "all" or "," in classes else "separate"
    lamp = bool(row.get("lamp"))
    void = {} if lamp else dict.fromkeys(OF_LAMP)
    return {**dict.fromkeys(OF_LAMP), **row, **void, "lamp": lamp, "setting": setting}


def counts(row, metric, each_epoch):
    """Whether a table of `metric` counts a row. One with a row for each epoch takes whole runs;
    others take the last epoch, of each category where the metric is one of categories."""
    whole_run = row.get("base_error") is not None or row.get("normal_error") is not None
    if row.get(metric) is None:
        return False
    if each_epoch:
        return whole_run
    last = row["epoch"] in (0, row.get("epochs"))           # 0: solved, not trained
    return last and (row["category"] != "mean" if metric in OF_CATEGORIES else whole_run)


def sort_key(values):
    return [(isinstance(value, str), value or 0) for value in values]


def cells_of(rows, keys, metric, over):
    """Rows -> {values of the options `keys`: (without LAMP, with LAMP)}, each {category: mean over
    the seeds}, over="seeds": {seed: mean over the categories}. The plain runs are those that
    the runs with LAMP are compared with, whatever the options of LAMP are; runs of a seed and
    category that only one side has are left out. Raises ValueError where runs of a cell differ in
    an option that is not among `keys`."""
    unit, other = UNITS[over], UNITS["seeds" if over == "categories" else "categories"]
    cells = defaultdict(lambda: ({}, {}))                   # each {(unit, other): row}
    for row in rows:
        if counts(row, metric, "epoch" in keys):
            if unknown := [key for key in keys if key not in row]:
                raise ValueError(f"no option {', '.join(unknown)} here; there are {', '.join(row)}")
            values = tuple(row[key] for key in keys)
            run = cells[values][row["lamp"]].setdefault((row[unit], row[other]), row)
            if run is not row:
                raise ValueError(f"runs of one row differ in {', '.join(differing(run, row))}: "
                                 "name that in --rows, or choose by --where or --best-of")
    if not cells:
        raise ValueError(f"no run with {metric} here")
    compared = {}
    for values in sorted(cells, key=sort_key):
        plain, lamp = cells[values]
        partner = without_lamp(keys, values)
        if not plain and partner in cells:
            plain = cells[partner][0]
        both = plain.keys() & lamp.keys() if plain and lamp else plain.keys() | lamp.keys()
        compared[values] = means_of(plain, both, metric), means_of(lamp, both, metric)
    return compared


def differing(run, other):
    """The options in which two rows differ; options stand before the epoch."""
    options = itertools.takewhile(lambda key: key != "epoch", run)
    return [key for key in options if run[key] != other.get(key)]


def without_lamp(keys, values):
    """The values of the plain runs that runs with these values are compared with."""
    return tuple(None if key in OF_LAMP else value for key, value in zip(keys, values))


def means_of(runs, kept, metric):
    """{(unit, other): row} -> {unit: mean of the metric over the `kept` ones}."""
    numbers = defaultdict(list)
    for key, row in runs.items():
        if key in kept:
            numbers[key[0]].append(row[metric])
    return {unit: float(np.mean(mine)) for unit, mine in numbers.items()}


def pick(settings, category, chosen_on):
    """Of settings, {category: value} each, that with the highest value on the category itself (as
    the paper has it), or mean over the others, which can be known before this one is judged."""
    scores = []
    for setting in settings:
        seen = [value for name, value in setting.items()
                if (name == category) == (chosen_on == "itself")]
        scores.append(np.mean(seen) if seen else -np.inf)
    if max(scores) == -np.inf:
        raise ValueError(f"--chosen-on others: there is no other category than {category}")
    return settings[int(np.argmax(scores))]


def best_cells(rows, keys, metric, options, chosen_on):
    """As cells_of, but of the runs that differ in `options` the best one, of plain and LAMP apart,
    for each category. Raises ValueError for a metric of which more is not better."""
    if metric not in MORE_IS_BETTER:
        raise ValueError(f"--best-of takes the largest {metric}: use {', '.join(MORE_IS_BETTER)}")
    kept = [key for key in keys if key != "category"]
    groups = defaultdict(list)
    for values, cell in cells_of(rows, [*kept, *options], metric, "categories").items():
        groups[values[:len(kept)]].append(cell)
    best = defaultdict(lambda: ({}, {}))
    for values, group in groups.items():
        for side in (0, 1):
            sides = [cell[side] for cell in group]
            for category in dict.fromkeys(itertools.chain(*sides)):
                settings = [values for values in sides if category in values]
                known = {**dict(zip(kept, values)), "category": category}
                place = tuple(known[key] for key in keys)
                best[place][side][category] = pick(settings, category, chosen_on)[category]
    return {values: best[values] for values in sorted(best, key=sort_key)}


def cells_for(experiments, keys, metric="image_auroc", best_of=(), chosen_on="itself",
              over="categories", where=()):
    """What a table is made of, from the experiments' names on; where: {option: allowed values}."""
    rows = [with_setting(row) for row in itertools.chain(*map(read, experiments))]
    for option, allowed in dict(where).items():
        if option not in rows[0]:
            raise ValueError(f"--where: no {option} here; there are {', '.join(rows[0])}")
        rows = [row for row in rows if row.get(option) in allowed]
        if not rows:
            raise ValueError(f"--where: no run has {option} {' or '.join(map(str, allowed))}")
    if best_of:
        return best_cells(rows, keys, metric, best_of, chosen_on)
    return cells_of(rows, keys, metric, over)


# ---- statistics ----

def interval(values):
    """Half the width of the 95 % Student-t interval of the mean of two or more values."""
    return float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))


def mean_and_interval(values, sign="", digits=4):
    """As text; without the interval for one value, empty for none."""
    width = f" ± {interval(values):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):{sign}.{digits}f}{width}" if len(values) else ""


def differences(cell):
    """With LAMP minus without, of each category or seed that has both."""
    plain, lamp = cell
    return [lamp[unit] - plain[unit] for unit in lamp if unit in plain]


def sign_test(values):
    """How often a difference is above 0, as text, and p of the exact two-sided sign test."""
    ahead, behind = sum(x > 0 for x in values), sum(x < 0 for x in values)
    p = f"{stats.binomtest(ahead, ahead + behind).pvalue:.3f}" if ahead + behind > 1 else ""
    return (f"{ahead} of {len(values)}" if values else ""), p
