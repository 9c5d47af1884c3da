"""Sweep: makes the runs of an experiment, and the CSV that keeps what came out.

    python results/sweep.py                         names them: runs, how many are done, minutes
    python results/sweep.py table1 --processes 2    makes what is missing, one thread each
    python results/sweep.py table1 --only normal=8,batch_size=32,seed=0    checks these numbers

results/experiments.py says which runs. results/NAME.csv has a row for each run, epoch judged and
category (`mean`: over a run's categories), at its top the options that all runs share. A run lives
in runs/NAME/, where `log.txt` is what it printed. To be run in the repository's folder.
"""
import argparse
import contextlib
import csv
import json
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

from experiments import (EXPERIMENTS, WITH_PULL_AND_SPREAD, WithoutLogarithm, argv_of,
                         pull_and_spread, some_photos)

RESULTS = Path(__file__).resolve().parent
METRICS = ("image_auroc", "untold_auroc", "raw_auroc", "image_ap", "pixel_auroc", "pixel_aupro",
           "threshold", "fpr", "tpr", "normal_error", "anomaly_error", "pull", "spread",
           "from_identity", "base_error", "seconds")
ALWAYS = ("--fpr", "0.05", "--threads", "1", "--no-pictures")


# ---- what a CSV holds ----

def columns_of(runs):
    """The names of the options that differ among the runs, and last the seed."""
    values = {"dataset": set(), "normal": set()}            # these two first
    for run in runs:
        for key, value in run.items():
            values.setdefault(key, set()).add(value)
    apart = ("seed", "eval_every")                          # the latter changes no number
    return [*(key for key in values if key not in apart and len(values[key]) > 1), "seed"]


def shared_options(runs):
    """The options that do not differ among the runs that have them, {option: text}."""
    options, apart = {}, {*columns_of(runs), "eval_every"}
    for run in runs:
        options |= run
    return {key: str(value) for key, value in options.items() if key not in apart}


def name_of(options, columns):
    """A run's name, the options that differ: normal=3,batch_size=32,lamp=True,seed=0"""
    return ",".join(f"{key}={options[key]}" for key in columns if options.get(key, "") != "")


def rows_of(record, more=None):
    """A run's run.json -> its rows: {column: value}, for each epoch judged and for the last one;
    of a run with several categories also one for each of them. more: metrics not in run.json."""
    history, metrics = record["history"], record["metrics"]
    categories = metrics["categories"]
    name = "mean" if len(categories) > 1 else next(iter(categories))
    rows = [{**epoch, "category": name, "seconds": None}    # a row's seconds are those of the run
            for epoch in history[:-1] if epoch.get("image_auroc") is not None]
    trained = history[-1] if history else {}
    rows.append({**trained, **metrics, **(more or {}), "seconds": record["seconds"],
                 "epoch": len(history), "category": name})
    if len(categories) > 1:
        for category, values in categories.items():
            rows.append({**values, "epoch": len(history), "category": category})
    return rows


def version_of(record):
    """What a run was made with, as one word of the CSV's comment."""
    parts = [f"{key}-{record['versions'][key]}" for key in ("python", "torch", "torchvision")]
    return "made_with=" + "/".join(parts)


def read_csv(path):
    """A CSV -> the versions it was made with, and its rows as dicts of text; or [], []."""
    if not path.exists():
        return [], []
    with path.open(newline="") as file:
        versions = [word for word in file.readline().split() if word.startswith("made_with=")]
        return versions, list(csv.DictReader(file))


def write_csv(path, name, versions, rows):
    """Beside its place, then moved into it: a kill at any moment leaves a whole file."""
    runs = list(EXPERIMENTS[name]())
    metrics = [key for key in METRICS if any(row.get(key) not in (None, "") for row in rows)]
    shared = [f"{key}={value}" for key, value in shared_options(runs).items()]
    part = path.with_suffix(".part")
    with part.open("w", newline="") as file:
        print("#", *shared, *dict.fromkeys(versions), file=file)
        writer = csv.DictWriter(file, [*columns_of(runs), "epoch", "category", *metrics],
                                extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)


# ---- one run, in a worker ----

def make_run(experiment, options, out, argv):
    """One run -> its rows, and the versions it was made with. What it prints goes to log.txt, with
    the traceback where it fails (RuntimeError)."""
    log = Path(out, "log.txt")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            return train_and_measure(experiment, options, out, argv)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            raise RuntimeError(f"{type(error).__name__}: {error} (see {log})") from None


def train_and_measure(experiment, options, out, argv):
    import evaluate                                         # in workers alone, once each
    import train
    arguments = [*ALWAYS, *argv_of(options), "--out", out, *argv]
    if "photos" in options:
        arguments += ["--data-dir", some_photos(options, train.parse(arguments)[1]["data_dir"])]
    config = train.parse(arguments)[1]
    criterion = None                                        # that of the config
    if options.get("log") is False:
        criterion = WithoutLogarithm(options["eps"], options["over"], options["detach"])
    command = f"python results/sweep.py {experiment}, its run {Path(out).name}"
    if status := train.run(config, command, criterion):
        raise RuntimeError(f"train.py ended with status {status}")
    record, more = json.loads(Path(out, "run.json").read_text()), {}
    if experiment in WITH_PULL_AND_SPREAD:
        state, model = evaluate.load_run(out, config["device"])
        data, inputs, _ = evaluate.open_data(config, config["device"], state)
        more = pull_and_spread(model, inputs, data.labels)
    return rows_of(record, more), version_of(record)


def start_worker():
    """Ctrl-C ends a worker at once (its run resumes later), and so does the end of its parent:
    else a run would go on unseen beside the same run of the sweep started again."""
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.path.insert(0, str(RESULTS.parent))                 # train.py and what it imports


# ---- the sweep ----

def key_of(row, columns):
    """What tells a run from the others: its options as a CSV's text."""
    return tuple(str(row.get(key, "")) for key in columns)


def number_or_text(text):
    """"3e-3" and "0.003" are the same number, "l2" is none."""
    try:
        return float(text)
    except ValueError:
        return text


def matches(options, wanted):
    """Whether a run has these options, {option: text}."""
    return all(number_or_text(str(options.get(key, ""))) == number_or_text(text)
               for key, text in wanted.items())


def parse_only(text, columns):
    """"normal=8,batch_size=32" -> {option: text}; a value may hold commas: normal=0,1,2,3,4."""
    words = re.split(r",(?=\w+=)", text) if text else []
    wanted = dict(word.partition("=")[::2] for word in words)
    if unknown := [key for key in wanted if key not in columns]:
        raise ValueError(f"--only: no option {', '.join(unknown)} differs in this experiment; "
                         f"these do: {', '.join(columns)}")
    return wanted


def list_experiments():
    """A line for each experiment: its runs, how many are done, minutes of one and of all."""
    print(f"{'experiment':<20} {'runs':>5} {'done':>5} {'min each':>9} {'min all':>8}  it shows")
    for name, experiment in EXPERIMENTS.items():
        runs = list(experiment())
        columns = columns_of(runs)
        rows = read_csv(RESULTS / f"{name}.csv")[1]
        done = {key_of(row, columns) for row in rows}
        seconds = [float(row["seconds"]) for row in rows if row["seconds"]]
        each = sum(seconds) / len(seconds) / 60 if seconds else 0
        print(f"{name:<20} {len(runs):>5} {len(done):>5} {each:>9.2f} {each * len(runs):>8.0f}  "
              f"{experiment.__doc__}")


def last_of(rows):                                          # of a run's rows the whole run's last
    return next(row for row in reversed(rows) if row.get("seconds") not in (None, ""))


def compare(held, made):
    """Print a run that was made again beside what the CSV holds."""
    print(f"{'':<16}{'in the CSV':>14}{'now':>14}{'difference':>14}")
    for key in METRICS:
        if held.get(key) and made.get(key) is not None:
            old, new = float(held[key]), float(made[key])
            print(f"{key:<16}{old:>14.6g}{new:>14.6g}{new - old:>+14.2g}")


def make_all(jobs, processes):
    """Make runs in worker processes, jobs being make_run's arguments. As each ends: its options,
    None or the error, and what make_run returned. Ctrl-C ends the workers as well."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=start_worker) as pool:
        futures = {pool.submit(make_run, *job): job[1] for job in jobs}
        try:
            for future in as_completed(futures):
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise ChildProcessError("a worker was killed (memory?): start it again")
                yield futures[future], error, None if error else future.result()
        except BaseException:                               # else the workers end by themselves
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.terminate()
            raise


def plan(name, only, argv):
    """What there is to make: arguments of make_run, one tuple a run. That is what the CSV lacks,
    or all that `only` names; a run that the CSV has starts afresh, others go on."""
    runs = list(EXPERIMENTS[name]())
    columns = columns_of(runs)
    done = {key_of(row, columns) for row in read_csv(RESULTS / f"{name}.csv")[1]}
    chosen = [run for run in runs if matches(run, parse_only(only, columns))]
    if not chosen:
        raise ValueError(f"--only {only}: {name} has no such run")
    jobs = []
    for options in chosen:
        known = key_of(options, columns) in done
        if only or not known:
            start = "--overwrite" if known else "--resume"
            folder = f"runs/{name}/{name_of(options, columns)}"
            jobs.append((name, options, folder, [*argv, start]))
    return jobs


def sweep(name, only, processes, argv):
    """Make the runs that are missing, or that `only` names -> how many failed."""
    path, columns = RESULTS / f"{name}.csv", columns_of(list(EXPERIMENTS[name]()))
    jobs, failed, start = plan(name, only, argv), 0, time.perf_counter()
    print(f"{name}: {len(jobs)} runs to make" + ("" if jobs else "; --only makes them again"))
    for number, (options, error, made) in enumerate(make_all(jobs, processes), 1):
        left = (time.perf_counter() - start) / number * (len(jobs) - number) / 60
        title = f"{number} of {len(jobs)}  {name_of(options, columns)}"
        if error:
            failed += 1
            print(f"{title}  FAILED: {error}", flush=True)
            continue
        last = last_of(made[0])
        print(f"{title}  image AUROC {last['image_auroc']:.4f}  {last['seconds']:.0f} s, "
              f"{left:.0f} min left", flush=True)
        versions, rows = read_csv(path)
        same = [row for row in rows if key_of(row, columns) == key_of(options, columns)]
        if same:
            compare(last_of(same), last)
        else:
            new = [{**row, **{key: options.get(key, "") for key in columns}} for row in made[0]]
            write_csv(path, name, [*versions, made[1]], [*rows, *new])
    return failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("name", nargs="?", choices=EXPERIMENTS, help="an experiment (default: list them)")
    add("--processes", type=int, default=1, help="workers, one thread each (default: 1)")
    add("--only", default="", metavar="OPTION=VALUE,...",
        help="these runs alone; one that is done is made again and compared")
    add("--data-dir", default="data", help="where the data sets are (default: data)")
    add("--device", default="cpu", help="default: cpu")
    args = parser.parse_args(argv)
    if args.name is None:
        raise SystemExit(list_experiments())
    places = ["--data-dir", args.data_dir, "--device", args.device]
    try:
        failed = sweep(args.name, args.only, args.processes, places)
    except (ValueError, OSError) as error:
        parser.exit(2, f"sweep.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: the same command goes on\n")
    parser.exit(2 if failed else 0, f"{failed} runs failed\n" if failed else None)


if __name__ == "__main__":
    main()
