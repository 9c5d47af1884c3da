"""Sweep: makes the runs of an experiment, and the CSV that keeps what came out.

    python results/sweep.py                         # list them: runs, hours they took
    python results/sweep.py table1 --processes 2    # make the runs that the CSV lacks
    python results/sweep.py table1 --only normal=8,batch_size=32,seed=0     # check some
    python results/sweep.py table1 --again          # make all anew, replace the rows

results/experiments.py says which runs these are. results/NAME.csv has a row for each
run, epoch judged and category; `mean` is the mean over a run's categories. Its first
line holds the options that all runs share. A run lives in runs/NAME/, where `log.txt`
is what it printed. Each worker uses one thread. Start it in the repository's folder.

The same run on the same kind of machine gives the same numbers. On another one,
additions are made in another order, and training enlarges the difference. `--only` says
whether it is larger than that: by more than .005 of image AUROC for a model that is
trained, by more than .0005 for one that is solved (PCA and nearest tokens).
"""
import argparse
import contextlib
import csv
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from experiments import (EXPERIMENTS, RECORDED, WITH_PULL_AND_SPREAD, WithoutLogarithm,
                         pull_and_spread)

RESULTS = Path(__file__).resolve().parent
METRICS = (
    "image_auroc", "auroc_not_given", "auroc_paper", "image_ap", "pixel_auroc",
    "pixel_aupro", "threshold", "fpr", "tpr", "normal_error", "anomaly_error", "pull",
    "spread", "distance_to_identity", "base_error", "training_seconds", "seconds")
ALWAYS = dict(fpr=0.05, pictures=False)             # for each run, with its own options


# ---- what a CSV holds ----

def text_of(value):
    """An option's value as the CSV has it, without spaces."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def columns_of(runs):
    """The names of the options that differ among the runs, and last the seed."""
    values = {"dataset": set(), "normal": set()}    # these two first
    for run in runs:
        for key, value in run.items():
            values.setdefault(key, set()).add(value)
    apart = ("seed", "eval_every")                  # the latter changes no number
    differ = [key for key in values if len(values[key]) > 1 and key not in apart]
    return [*differ, "seed"]


def shared_options(runs):
    """The options that do not differ among the runs that have them, {option: text}."""
    options, apart = {}, {*columns_of(runs), "eval_every"}
    for run in runs:
        options |= run
    return {key: text_of(value) for key, value in options.items() if key not in apart}


def key_of(row, columns):
    """What tells a run from the others: its options as a CSV's text."""
    return tuple(text_of(row.get(key, "")) for key in columns)


def name_of(options, columns):
    """A run's name, the options that differ: normal=3,batch_size=32,lamp=True,seed=0"""
    named = [key for key in columns if options.get(key, "") != ""]
    return ",".join(f"{key}={options[key]}" for key in named)


def rows_of(record, more):
    """A run's record, as in run.json -> its rows of the CSV, {column: value} each.

    There is a row for each epoch judged, one for the last epoch, and of a run with
    several categories one for each of them. more: metrics that are not in the record.
    `training_seconds` is the time of all epochs so far, and `seconds` that of the whole
    run.
    """
    history, metrics = record["history"], record["metrics"]
    categories = metrics["categories"]
    name = "mean" if len(categories) > 1 else next(iter(categories))
    rows, training = [], 0.0
    for epoch in history:
        training += epoch["seconds"]
        if epoch.get("image_auroc") is not None and epoch is not history[-1]:
            rows.append({**epoch, "category": name, "seconds": None,
                         "training_seconds": round(training, 1)})
    trained = history[-1] if history else {}
    rows.append({**trained, **metrics, **more, "epoch": len(history), "category": name,
                 "training_seconds": round(training, 1), "seconds": record["seconds"]})
    if len(categories) > 1:
        for category, values in categories.items():
            rows.append({**values, "epoch": len(history), "category": category})
    for row in rows:
        row["machine"] = record["versions"]["machine"]
    return rows


def version_of(record):
    """What a run was made with, as one word of the CSV's comment."""
    names = ("python", "torch", "torchvision")
    parts = [f"{name}-{record['versions'][name]}" for name in names]
    return "made_with=" + "/".join(parts)


def read_csv(path):
    """A CSV -> the words of its comment, and its rows as dicts of text; or [], []."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        words = file.readline().split()[1:]
        return words, list(csv.DictReader(file))


def comment_of(runs, words):
    """The words of a CSV's comment. The versions are kept of `words`, those it had."""
    shared = [f"{key}={value}" for key, value in shared_options(runs).items()]
    versions = [word for word in words if word.startswith("made_with=")]
    return [*shared, *dict.fromkeys(versions)]


def write_csv(path, runs, words, rows):
    """Write a CSV beside its place, then move it there: it is never half written."""
    metrics = []
    for key in (*METRICS, "machine"):
        if any(row.get(key) not in (None, "") for row in rows):
            metrics.append(key)
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        print("#", *comment_of(runs, words), file=file)
        columns = [*columns_of(runs), "epoch", "category", *metrics]
        writer = csv.DictWriter(file, columns, extrasaction="ignore",
                                lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


def replace_rows(rows, old, new):
    """Put the new rows where the old ones were, or at the end where there were none."""
    place = rows.index(old[0]) if old else len(rows)
    kept = [row for row in rows if row not in old]
    return [*kept[:place], *new, *kept[place:]]


# ---- one run, in a worker ----

def make_run(experiment, options, out, places, afresh):
    """One run -> its rows, and the version it was made with.

    places: device and data_dir. afresh: do not go on with a run that is in the folder
    `out`. What it prints goes to log.txt there. Where it fails, so does the traceback,
    and a RuntimeError is raised.
    """
    log = Path(out, "log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                config = {**ALWAYS, **options, **places, "out": out}
                return train_and_measure(experiment, config, afresh)
            except Exception as error:
                traceback.print_exc()
                words = f"{type(error).__name__}: {error} (see {log})"
                raise RuntimeError(words) from None


def train_and_measure(experiment, config, afresh):
    import evaluate                                 # in workers alone, once each
    import torch
    import train
    torch.set_num_threads(1)
    criterion = None                                # that of the config
    if not config.pop("log", True):
        criterion = WithoutLogarithm(config["eps"], config["over"], config["detach"])
    lever = contextlib.nullcontext()
    if "lever" in config:
        import levers
        lever, afresh = levers.pulled(config.pop("lever")), True    # none is resumed
    out = config["out"]
    command = f"python results/sweep.py {experiment}, its run {Path(out).name}"
    goes_on = not afresh and is_begun(train, config)
    with lever:
        record = train.run(config, criterion=criterion, resume=goes_on, command=command)
    more = {}
    if experiment in WITH_PULL_AND_SPREAD:
        state, model = evaluate.load_run(out, record["config"]["device"])
        data, inputs, _ = evaluate.open_data(state["config"], config["device"], state)
        more = pull_and_spread(model, inputs, data.labels)
    return rows_of(record, more), version_of(record)


def is_begun(train, config):
    """Whether the run's folder holds a part of this very run, with the same options."""
    try:
        state = train.saved_run(config["out"])
    except ValueError:                              # damaged, or of another version
        return False
    may_differ = ("data_dir", "device")
    return state is not None and all(
        state["config"].get(key) == value for key, value in config.items()
        if key not in may_differ)


def start_worker():
    """Prepare a worker. It ends at once with Ctrl-C, and when its parent has ended.

    Else it would go on unseen, beside the same run of the sweep started again. A run
    that was cut short goes on later.
    """
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.path.insert(0, str(RESULTS.parent))         # train.py and what it imports


# ---- the sweep ----

def number_or_text(text):
    """ "3e-3" and "0.003" are the same number, "l2" is none."""
    try:
        return float(text)
    except ValueError:
        return text


def matches(options, wanted):
    """Whether a run has these options, {option: text}."""
    for key, text in wanted.items():
        if number_or_text(text_of(options.get(key, ""))) != number_or_text(text):
            return False
    return True


def parse_only(text, columns):
    """ "normal=8,batch_size=32" -> {option: text}. A value may hold commas: 0,1,2"""
    words = re.split(r",(?=\w+=)", text) if text else []
    wanted = dict(word.partition("=")[::2] for word in words)
    unknown = [key for key in wanted if key not in columns]
    if unknown:
        raise ValueError(f"--only: no option {', '.join(unknown)} differs in this "
                         f"experiment. These do: {', '.join(columns)}")
    return wanted


def list_experiments():
    """Print a line for each experiment: its runs, those done, and what they took."""
    titles = f"{'experiment':<12}{'runs':>6}{'done':>6}{'min each':>10}{'hours':>8}"
    print(f"{titles}  it shows")
    total = 0
    for name, experiment in EXPERIMENTS.items():
        runs = list(experiment())
        columns = columns_of(runs)
        rows = read_csv(RESULTS / f"{name}.csv")[1]
        done = {key_of(row, columns) for row in rows}
        seconds = [float(row["seconds"]) for row in rows if row["seconds"]]
        each = sum(seconds) / len(seconds) / 60 if seconds else 0
        hours = sum(seconds) / 3600
        total += hours
        print(f"{name:<12}{len(runs):>6}{len(done):>6}{each:>10.2f}{hours:>8.1f}  "
              f"{experiment.__doc__}{' (recorded)' if name in RECORDED else ''}")
    print(f"{'all':<12}{'':>22}{total:>8.1f}  hours of one core, or of a GPU")


def last_of(rows):
    """Of a run's rows that of the whole run, after its last epoch."""
    return next(row for row in reversed(rows) if row.get("seconds") not in (None, ""))


def compare(held, made, options):
    """Print a run that was made again beside what the CSV holds, and a verdict."""
    print(f"{'':<20}{'in the CSV':>14}{'now':>14}{'difference':>14}")
    for key in METRICS:
        if held.get(key) and made.get(key) is not None:
            old, new = float(held[key]), float(made[key])
            print(f"{key:<20}{old:>14.6g}{new:>14.6g}{new - old:>+14.2g}")
    print(verdict(float(held["image_auroc"]), made["image_auroc"], options), flush=True)


def verdict(held, made, options):
    """Say whether two image AUROCs of one run differ by more than machines do."""
    trained = options.get("model") not in ("pca", "nearest")
    limit = 0.005 if trained else 0.0005
    kind = "trained" if trained else "solved"
    difference = abs(made - held)
    if difference == 0:
        return "Image AUROC is equal to the last digit."
    if difference <= limit:
        return (f"Image AUROC differs by {difference:.2g}. This is within what "
                f"machines differ by: up to {limit} for a model that is {kind}.")
    return (f"DIFFERENT: image AUROC differs by {difference:.2g}. Machines differ by "
            f"up to {limit} for a model that is {kind}.")


def make_all(jobs, processes):
    """Make runs in worker processes. jobs: tuples of make_run's arguments.

    Yields, as each ends: its options, None or the error, and what make_run returned.
    Ctrl-C ends the workers as well.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        futures = {pool.submit(make_run, *job): job[1] for job in jobs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ChildProcessError("a worker was killed, perhaps because "
                                            "memory ran out: start the command again")
                yield futures[future], error, None if error else future.result()
        except BaseException:                       # else the workers end by themselves
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def plan(name, only, again, places):
    """Which runs there are to make -> jobs, tuples of make_run's arguments.

    These are the runs that the CSV lacks, or those that `only` names, or all (`again`).
    A run that the CSV has starts afresh. Others go on where they were cut short.
    """
    if name in RECORDED:
        raise ValueError(f"the rows of {name} were made by an earlier version, and are "
                         "kept as they are")
    runs = list(EXPERIMENTS[name]())
    columns = columns_of(runs)
    words, rows = read_csv(RESULTS / f"{name}.csv")
    if rows and words != comment_of(runs, words):
        raise ValueError(f"the rows of {name}.csv were made with other options than "
                         "experiments.py names now: delete the file to make all anew")
    done = {key_of(row, columns) for row in rows}
    wanted = parse_only(only, columns)
    jobs = []
    for options in runs:
        known = key_of(options, columns) in done
        if matches(options, wanted) and (only or again or not known):
            folder = f"runs/{name}/{name_of(options, columns)}"
            jobs.append((name, options, folder, places, known))
    if only and not jobs:
        raise ValueError(f"--only {only}: {name} has no such run")
    return jobs


def sweep(name, only, again, processes, places):
    """Make the runs of `plan`, and write or compare their rows -> how many failed."""
    path, runs = RESULTS / f"{name}.csv", list(EXPERIMENTS[name]())
    columns = columns_of(runs)
    jobs, failed, start = plan(name, only, again, places), 0, time.perf_counter()
    hint = "" if jobs else ". --only checks some of them, --again makes all anew"
    print(f"{name}: {len(jobs)} runs to make{hint}", flush=True)
    for number, (options, error, made) in enumerate(make_all(jobs, processes), 1):
        left = (time.perf_counter() - start) / number * (len(jobs) - number) / 60
        title = f"{number} of {len(jobs)}  {name_of(options, columns)}"
        if error:
            failed += 1
            print(f"{title}  FAILED: {error}", flush=True)
            continue
        new_rows, version = made
        last = last_of(new_rows)
        print(f"{title}  image AUROC {last['image_auroc']:.4f}  "
              f"{last['seconds']:.0f} s, {left:.0f} min left", flush=True)

        words, rows = read_csv(path)
        old = [row for row in rows if key_of(row, columns) == key_of(options, columns)]
        if old:
            compare(last_of(old), last, options)
        if again or not old:
            own = {key: text_of(options.get(key, "")) for key in columns}
            new = [{**row, **own} for row in new_rows]
            write_csv(path, runs, [*words, version], replace_rows(rows, old, new))
    return failed


def main(argv=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("name", nargs="?", choices=EXPERIMENTS,
        help="an experiment (default: list them)")
    add("--processes", type=int, default=1,
        help="workers, of one thread each (default: 1)")
    add("--only", default="", metavar="OPTION=VALUE,...",
        help="these runs alone; one that is done is made again and compared")
    add("--again", action="store_true",
        help="make runs that are done anew, and replace their rows")
    add("--data-dir", default="data", help="where the data sets are (default: data)")
    add("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    if args.name is None:
        list_experiments()
        raise SystemExit(0)
    places = {"data_dir": args.data_dir, "device": args.device}
    try:
        failed = sweep(args.name, args.only, args.again, args.processes, places)
    except (ValueError, OSError) as error:
        parser.exit(2, f"sweep.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: the same command goes on\n")
    parser.exit(2 if failed else 0, f"{failed} runs failed\n" if failed else None)


if __name__ == "__main__":
    main()
