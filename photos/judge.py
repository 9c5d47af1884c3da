"""Judge: a verdict for each new photo, by what photos/learn.py or train.py has learned.

    python photos/judge.py runs/my_images new_images    # files and folders

    from photos.judge import Judge                      # in a program of your own
    judge = Judge("runs/my_images")
    verdict = judge("part.jpg")                         # or a Pillow image, an array
    if verdict.anomalous:
        print(verdict.score, verdict.threshold, verdict.peak_x, verdict.peak_y)

The command's exit status is 0 where all photos are normal, 10 where some are anomalous,
and 2 where one could not be read or judged, or the command itself is wrong. No crash of
Python has one of these (it has 1).
"""
import argparse
import contextlib
import csv
import math
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))    # where evaluate.py is
import evaluate as ev
from data import resize, to_float, with_progress
from photos.alike import (appearance, has_another_shape, how_they_differ, looks_of,
                          nearest_look, numbers_of)
from photos.images import (content_key, list_images, name_some, print_any_name,
                           printable, read_photo)
from photos.page import Row, lay_over, write_page

NORMAL, ANOMALOUS, NO_VERDICT, INTERRUPTED = 0, 10, 2, 130      # exit statuses
DOUBTFUL = 0.1                      # a score so near the threshold, as a share of it
BATCH = 8                           # photos judged at a time
ENOUGH = 5                          # photos from which it is said how all differ


class Verdict(NamedTuple):
    """What is said of one photo."""
    file: str                       # as it was given, "" for an image or an array
    kind: str                       # what it was judged as
    score: float                    # how far it differs from the good ones
    threshold: float                # None where the run has none
    anomalous: bool                 # score > threshold, or None
    doubtful: bool                  # the score is within 10 % of the threshold
    heat_map: np.ndarray            # (S, S) float32, see `heat_map_of`
    peak_x: float                   # where the heat map is largest, from 0 (left) to 1
    peak_y: float                   # from 0 (top) to 1

    @property
    def word(self):
        if self.anomalous is None:
            return "no verdict"
        return "anomalous" if self.anomalous else "normal"

    @property
    def ratio(self):
        """The score in thresholds."""
        return self.score / max(self.threshold or 1.0, 1e-12)


class Judge:
    """A run, ready to judge photos.

    run: its folder. kind: what all photos show, of a run that has learned several
    kinds. false_alarms: the share of good parts that may be called anomalous, .01 for 1
    of 100. None leaves what was chosen at learning. threshold: a score, instead of it.
    Raises FileNotFoundError and ValueError where that is no run, or there is no such
    kind.
    """

    def __init__(self, run, kind=None, false_alarms=None, threshold=None, device="cpu"):
        self.state, self.model = ev.load_run(run, device)
        self.config = self.state["config"]
        self.calibration = ev.Calibration(**self.state["calibration"])
        self.learned = self.state.get("photos")         # None of a run of train.py
        self.backbone = ev.open_backbone(self.config, device, self.state)
        self.kinds = list(self.calibration.thresholds)
        self.kind = self.checked(kind)
        self.fpr = self.config["fpr"] if false_alarms is None else false_alarms
        if not 0 < self.fpr < 1:
            raise ValueError(f"false alarms {self.fpr:g}: expected a share between 0 "
                             "and 1, such as .05 for 5 %")
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"threshold {threshold}: expected a number")
        if threshold is not None and false_alarms is not None:
            raise ValueError("give a threshold or a share of false alarms, not both")
        self.given, self.thresholds = threshold, {}
        for name in self.kinds:
            how = self.config["score"]
            learned = ev.threshold_of(name, self.calibration, how, self.fpr)
            self.thresholds[name] = learned if threshold is None else threshold

    def checked(self, kind):
        """The kind, or a ValueError where the run has not learned it."""
        if kind not in (None, *self.kinds):
            there = ", ".join(self.kinds)
            raise ValueError(f"kind {kind}: this run has learned {there}")
        return kind

    def __call__(self, images, kind=None):
        """A Verdict for a path, an open file, a Pillow image or an array (H, W, 3).

        For a list of these, a list. Arrays are uint8. Raises ValueError, which names
        the file, for what is no photo.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], kind)[0]
        verdicts = []
        for start in range(0, len(images), BATCH):
            photos, names = [], []
            for image in images[start:start + BATCH]:
                photos.append(self.read(image))
                names.append(str(image) if isinstance(image, (str, Path)) else "")
            verdicts += self.judge(photos, names, kind)
        return verdicts

    def read(self, source):
        """What `__call__` takes -> images.Photo, as the model sees it."""
        channels, side, _ = self.state["image"]
        # Images of train.py's own data sets are padded or gray.
        mnist = self.config["dataset"] in ("mnist", "fashion_mnist")
        size = 28 if mnist and side == 32 else side
        # Where photos of 8 bits were learned, nothing says what is white in others.
        white = self.config.get("white", 0 if self.learned else None)
        photo = read_photo(source, size, white)
        pixels = resize(photo.pixels[None], side)[0]
        if channels == 1:
            pixels = pixels.float().mean(0, keepdim=True).round().byte()
        return photo._replace(pixels=pixels)

    def judge(self, photos, names, kind=None):
        """images.Photos, and their names -> a list of Verdicts."""
        if not photos:
            return []
        stored, prepare = torch.stack([photo.pixels for photo in photos]), to_float
        if self.backbone is not None:
            pixels = to_float(stored.to(self.backbone.mean.device))
            stored, prepare = self.backbone.extract(pixels), self.backbone.standardize
        errors = ev.error_maps(self.model, stored, prepare)             # (B, h, w)
        scores = ev.category_scores(errors, self.kinds, self.config,
                                    self.calibration.size, self.calibration.statistics)
        kind = self.checked(kind) or self.kind
        chosen = self.choose_kinds(stored.cpu(), scores, kind)
        verdicts = []
        for i, (name, number) in enumerate(zip(names, chosen)):
            own, score = self.kinds[number], float(scores[i, number])
            verdicts.append(self.verdict(name, own, score, errors[i]))
        return verdicts

    def verdict(self, name, kind, score, errors):
        """A score and an error map (h, w) -> Verdict."""
        limit = self.thresholds[kind]
        heat = heat_map_of(errors, kind, limit, self.config, self.calibration)
        y, x = divmod(int(heat.argmax()), heat.shape[1])
        near = limit is not None and abs(score - limit) <= DOUBTFUL * abs(limit)
        return Verdict(
            file=name, kind=kind, score=score, threshold=limit,
            # A score that is no number is not normal.
            anomalous=None if limit is None else not score <= limit, doubtful=near,
            heat_map=heat,
            peak_x=(x + 0.5) / heat.shape[1], peak_y=(y + 0.5) / heat.shape[0])

    def choose_kinds(self, stored, scores, kind):
        """What each photo shows: `kind`, or that of the learned photo most like it.

        stored: (B, C, h, w). scores: (B, K). A run of train.py keeps no looks. There it
        is the kind whose threshold is exceeded least. -> B numbers in self.kinds
        """
        if kind or len(self.kinds) == 1:
            return [self.kinds.index(kind) if kind else 0] * len(stored)
        if self.learned is None:
            limits = [math.inf if limit is None else max(limit, 1e-12)
                      for limit in self.thresholds.values()]
            return (scores / torch.tensor(limits)).argmin(1).tolist()
        looks, kinds = self.learned["looks"], self.learned["kinds"]
        nearest = nearest_look(looks_of(stored), looks, kinds)
        return [self.kinds.index(kinds[i]) for i in nearest]

    def promise(self, kind):
        """What may be expected of the threshold of a kind, as sentences."""
        limit = self.thresholds[kind]
        if limit is None:
            return "There is no threshold: too few photos were learned."
        if self.given is None:
            return f"Threshold {limit:.4g}. {promise_of(self.state, kind, self.fpr)}"
        # The photos themselves come first, and after them the copies made of them.
        photos = self.calibration.images[kind]
        scores = self.calibration.scores[kind][:photos]
        above = int((scores > limit).sum())
        return (f"Threshold {limit:.4g}, as given. {above} of the {photos} good photos "
                "that set the learned threshold exceed this one.")


def heat_map_of(errors, kind, limit, c, calibration):
    """What gave the score: an error map (h, w) -> (S, S) of numpy.

    Of standardized scores, 1 is the threshold `limit`. Of the papers' own scores, 2 is
    the upper end of the color scale.
    """
    errors, size = errors[None], calibration.size
    if c["score"] == "standardized":
        maps = ev.blurred(errors, c, size, ev.SCORE_BLUR)
        maps = ev.standardize(maps, calibration.statistics[kind])
        one = limit if limit and limit > 0 else 1.0
    else:
        maps = ev.blurred(errors, c, size, ev.PICTURE_BLUR)
        one = calibration.color_limit / 2
    return (ev.heat_maps(maps, size)[0] / one).numpy()


def promise_of(state, kind, fpr):
    """What the threshold of a kind promises, as sentences. state: of the run."""
    calibration = ev.Calibration(**state["calibration"])
    # Where a kind has too few photos of its own, those of all kinds set its threshold.
    kinds = ev.set_by(kind, calibration, state["config"]["score"], fpr)
    photos = sum(calibration.images[name] for name in kinds)
    parts = state.get("photos", {}).get("different")        # None of a run of train.py
    different = sum(parts[name] for name in kinds) if parts else photos
    apart = state["config"]["model"] == "nearest"   # it compares no near-copies
    return promise(photos, fpr, different, " of all kinds" * (len(kinds) > 1), apart)


def promise(photos, fpr, different, of_kinds="", apart=False):
    """What a threshold set by so many photos promises, as sentences.

    different: how many parts they show, where near-copies count as one photo. of_kinds:
    a word on which photos they are. apart: near-copies were not compared with each
    other. Else a near-copy fits its twin better than a new part fits any photo, so that
    the share is a lower bound.
    """
    or_more = "" if apart or different == photos else ", or more"
    needed = ev.images_needed(fpr)
    together = ", of all kinds together," if of_kinds else ""
    by = f"{photos} good photo{'s' * (photos != 1)}{of_kinds}"
    if different < photos:
        by += f" that show about {different} different part{'s' * (different != 1)}"
    if different >= needed:
        return (f"About {percent(fpr)} of new good parts{together} will exceed it"
                f"{or_more}. (It was set by {by}.)")
    return (f"It was set by {by}. These are too few to promise {percent(fpr)}: about "
            f"{percent(1 / (different + 1))} of new good parts{together} may exceed it"
            f"{or_more}. For {percent(fpr)}, photos of at least {needed} different "
            "parts are needed.")


def percent(share):
    return f"{100 * share:.2g} %"


# ---- what a call leaves on disk ----

COLUMNS = ["file", "score", "threshold", "verdict", "kind", "peak_x", "peak_y"]


class Report:
    """The table and the page of one call, in a folder of its own.

    folder: an empty one, or None, which writes nothing. page: make the page, too.
    several: whether the run has learned several kinds.
    """

    def __init__(self, folder, page=True, several=False):
        self.folder, self.page, self.several, self.rows = folder, page, several, []
        self.stream, self.broken = None, False
        if folder is None:
            return
        if page:
            (folder / "pictures").mkdir()
        self.stream = open(folder / "judged.csv", "w", newline="", encoding="utf-8",
                           errors="backslashreplace", buffering=1)      # line by line
        csv.writer(self.stream).writerow(COLUMNS)

    def add(self, file, photo, verdict):
        """A row for a photo. photo, verdict: None where it cannot be read.

        Where the disk is full, say, a line says so, and nothing more is written.
        """
        if self.stream is None:
            return
        try:
            self.write_row(file, photo, verdict)
        except OSError as error:
            print(f"table and page end here: {error}", file=sys.stderr)
            self.stream, self.broken = None, True

    def write_row(self, file, photo, v):
        table = csv.writer(self.stream)
        if v is None:
            table.writerow([file, "", "", "not read", "", "", ""])
            self.rows.append(Row(printable(file), "", "", math.inf, "cannot be read",
                                 ("unreadable",)))
            return
        table.writerow([file, v.score, v.threshold, v.word, v.kind, v.peak_x, v.peak_y])
        if not self.page:
            return
        name = f"pictures/{len(self.rows) + 1:05}"
        addresses = f"{name}.jpg", f"{name}-heat.jpg"
        heat = lay_over(photo.picture, v.heat_map)
        photo.picture.save(self.folder / addresses[0], quality=80)
        heat.save(self.folder / addresses[1], quality=80)
        text = f"{v.word}, score {v.score:.4g}"
        if v.threshold is not None and v.threshold > 0:
            text += f", {v.ratio:.2f} x the threshold"
        if self.several:
            text += f", as {printable(v.kind)}"
        tags = (v.word, "doubtful") if v.doubtful else (v.word,)
        self.rows.append(Row(printable(file), *addresses, v.ratio, text, tags))

    def close(self, facts):
        """Write the page. facts: lines for its top.

        -> the files that are complete: table and page, those that were asked for.
        """
        if self.stream is None:
            return []
        complete = []
        try:
            self.stream.close()
            # Where its folder was deleted meanwhile, no file has a name any more.
            (self.folder / "judged.csv").stat()
            complete.append(self.folder / "judged.csv")
            if self.page:
                title = f"Judged on {time.strftime('%Y-%m-%d at %H:%M')}"
                write_page(self.folder / "judged.html", title, facts, self.rows)
                complete.append(self.folder / "judged.html")
        except OSError as error:
            print(f"table and page are not complete: {error}", file=sys.stderr)
            self.broken = True
        return complete


def new_folder(run, out):
    """The folder of this call's table and page, or None where none can be written.

    It is `out`, or else a new one in RUN/judged, named by the time. So no call ever
    replaces what another has written. Raises ValueError where `out` is not empty.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {printable(out)} is there and not empty. Name a "
                             "new folder: nothing is replaced")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    try:
        (Path(run) / "judged").mkdir(exist_ok=True)
        name, number = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
        while True:
            folder = Path(run, "judged", name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:                     # of another call in this second
                number += 1
    except OSError as error:
        print(f"no table and no page are written ({error}). --out names a folder for "
              "them", file=sys.stderr)
        return None


def lead_to_latest(folder, run):
    """Let RUN/judged.html lead to the page in `folder`, if the run can be written."""
    part = Path(run) / f"judged-{os.getpid()}.tmp"
    try:
        page = os.path.relpath(folder / "judged.html", run)
        address = quote(page.replace(os.sep, "/"))
        part.write_text(
            '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" '
            f'content="0; url={address}"><a href="{address}">the latest page</a>\n',
            encoding="utf-8")
        os.replace(part, Path(run) / "judged.html")
    except (OSError, ValueError):               # a read-only run, or another drive
        with contextlib.suppress(OSError):
            part.unlink()


# ---- what a call adds up to ----

class Seen:
    """What the photos of one call add up to."""

    def __init__(self):
        self.normal = self.anomalous = self.doubtful = 0
        self.interrupted = False
        self.unreadable, self.no_verdict = [], []       # files
        self.learned = []                               # files that were learned, too
        self.other_shape = []                           # file, its shape, a learned one
        self.appearances = {}                           # kind: a list of (6,)

    def add(self, file, photo, verdict, learned):
        """Count a photo. photo, verdict: None where it cannot be read."""
        if verdict is None:
            self.unreadable.append(file)
            return
        self.normal += verdict.anomalous is False
        self.anomalous += verdict.anomalous is True
        self.doubtful += verdict.doubtful
        if verdict.anomalous is None:
            self.no_verdict.append(file)
        if learned is None:                             # a run of train.py
            return
        if content_key(photo.pixels) in learned["keys"]:
            self.learned.append(file)
        own = [shape for shape, kind in zip(learned["shapes"], learned["kinds"])
               if kind == verdict.kind]
        if has_another_shape(photo.shape, own):
            self.other_shape.append((file, photo.shape, own[0]))
        looks = self.appearances.setdefault(verdict.kind, [])
        looks.append(appearance(photo.pixels[None])[0])

    def count(self):
        """How many photos there were."""
        without = len(self.unreadable) + len(self.no_verdict)
        return self.normal + self.anomalous + without

    def status(self):
        """The exit status."""
        if self.interrupted:
            return INTERRUPTED
        if self.unreadable or self.no_verdict:
            return NO_VERDICT
        return ANOMALOUS if self.anomalous else NORMAL


def summary(judge, seen):
    """How many of how many, and what speaks against trusting it: lines."""
    judged, count = seen.normal + seen.anomalous, seen.count()
    parts = [f"{seen.anomalous:,} anomalous, {seen.normal:,} normal"]
    if seen.doubtful:
        parts.append(f"{seen.doubtful:,} of all within 10 % of the threshold")
    if seen.no_verdict:
        parts.append(f"{len(seen.no_verdict):,} without a verdict, as the run has no "
                     "threshold")
    if seen.unreadable:
        parts.append(f"{len(seen.unreadable):,} could not be read")
    lines = [f"{count:,} photo{'s' * (count != 1)}: {'; '.join(parts)}."]
    if seen.learned:
        lines.append("WARNING: these have been learned as good, their scores are too "
                     f"low: {name_some(seen.learned)}")
    if seen.other_shape:
        lines.append(about_shapes(seen.other_shape))
    words = differences(judge, seen)
    advice = "add some photos of good parts like these to the folder, and learn again."
    if words:
        lines.append(f"WARNING: as a whole the photos are {' and '.join(words)} than "
                     f"those learned. If they will be like this from now on, {advice}")
    elif judged >= ENOUGH and seen.anomalous > judged / 2:
        lines.append("WARNING: more than half are anomalous. If these parts are good, "
                     f"the photos differ from those learned: {advice}")
    return lines


def about_shapes(other_shape):
    """A line about photos of another shape. other_shape: see `Seen`."""
    names, shapes, learned = zip(*other_shape)
    new, usual = (f"{width} x {height}" for width, height in (shapes[0], learned[0]))
    return (f"WARNING: {len(names):,} have another shape than those learned ({new} "
            f"pixels, learned {usual}): {name_some(names)}. Their verdicts mean "
            "little. Take or crop photos in the same shape.")


def differences(judge, seen):
    """Words for how the new photos differ as a whole from those learned."""
    words = []
    for kind, looks in seen.appearances.items():
        if len(looks) < ENOUGH:
            continue
        own = numbers_of(judge.learned["kinds"], kind)
        learned = judge.learned["appearance"][own]
        for word in how_they_differ(torch.stack(looks), learned):
            if word not in words:
                words.append(word)
    return words


# ---- the command ----

def judge_files(judge, files, report, seen, show_all=False):
    """Judge files, into a Report and Seen. A line is printed for each anomalous one."""
    batches = [files[start:start + BATCH] for start in range(0, len(files), BATCH)]
    for batch in with_progress(batches, "judged", len(files)):
        photos = {}
        for file in batch:
            try:
                photos[file] = judge.read(file)
            except ValueError as error:
                print(error, file=sys.stderr)
        verdicts = judge.judge([*photos.values()], [str(file) for file in photos])
        verdicts = dict(zip(photos, verdicts))
        for file in batch:
            photo, verdict = photos.get(file), verdicts.get(file)
            report.add(file, photo, verdict)
            seen.add(file, photo, verdict, judge.learned)
            if verdict and (show_all or verdict.anomalous is not False):
                print(line_of(verdict, len(judge.kinds) > 1))


def line_of(verdict, several):
    """A verdict as a line."""
    kind = f", as {printable(verdict.kind)}" if several else ""
    near = ", near the threshold" if verdict.doubtful else ""
    return (f"{verdict.word:<10} {printable(verdict.file)}   score {verdict.score:.4g}"
            f"{kind}{near}")


def run_command(args):
    """Judge what the command line names -> the exit status."""
    judge = Judge(args.run, args.kind, args.false_alarms, args.threshold,
                  ev.pick_device(args.device))
    if not any(map(os.path.lexists, args.images)):
        raise ValueError(f"no such file or folder: {name_some(args.images)}")
    files = list(dict.fromkeys(list_images(args.images)))       # each once
    if not files:
        raise ValueError(f"there are no images in {name_some(args.images)}: nothing "
                         "was judged")
    promises = []
    for kind in [judge.kind] if judge.kind else judge.kinds:
        promises.append(f"{printable(kind)}: {judge.promise(kind)}")
    print("\n".join(promises))

    folder = new_folder(args.run, args.out)
    report, seen = Report(folder, args.page, len(judge.kinds) > 1), Seen()
    try:
        judge_files(judge, files, report, seen, args.all)
    except KeyboardInterrupt:
        print("\ninterrupted")
        seen.interrupted = True
    finally:                                            # what was judged stays
        lines = summary(judge, seen)
        if seen.count() < len(files):
            lines.insert(0, f"WARNING: broken off after {seen.count():,} of "
                            f"{len(files):,} photos.")
        complete = report.close(lines + promises)

    print("\n" + "\n".join(lines))
    for path in complete:
        if path.suffix == ".csv":
            print(f"table: {printable(path)}")
        else:
            lead_to_latest(folder, args.run)
            print(f"page:  {printable(path)}   (open it in a browser)")
    return NO_VERDICT if report.broken else seen.status()


def parser():
    p = argparse.ArgumentParser(
        description="Judge new photos.", allow_abbrev=False,
        epilog="Exit status: 0 all are normal, 10 some are anomalous, 2 something "
               "could not be read or judged, whatever the others are, or a disk is "
               "full.")
    add = p.add_argument
    add("run", help="a folder that photos/learn.py or train.py wrote")
    add("images", nargs="+", help="files, and folders of files")
    add("--kind", help="what they show, where several kinds were learned (default: it "
                       "is told from each photo)")
    add("--false-alarms", type=float, metavar="SHARE",
        help="the share of good parts that may be called anomalous, such as .01 "
             "(default: as learned)")
    add("--threshold", type=float,
        help="a score, instead of --false-alarms: what exceeds it is anomalous")
    add("--all", action="store_true", help="print a line for normal photos, too")
    add("--page", action=argparse.BooleanOptionalAction, default=True,
        help="make the page and its pictures (default)")
    add("--out", help="a new folder for table and page (default: RUN/judged/DATE_TIME)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="cpu",
        help="default: cpu")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    print_any_name()
    try:
        status = run_command(args)
    except (ValueError, OSError, RuntimeError) as error:
        parser().exit(NO_VERDICT, f"judge.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(INTERRUPTED, "\ninterrupted\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
