"""Judge: a verdict for each new photo, by what photos/learn.py or train.py has learned.

    python photos/judge.py runs/my_images new_images    # files and folders

    from photos.judge import Judge                      # the same in a program of your own
    judge = Judge("runs/my_images")
    verdict = judge("part.jpg")                         # a path, a Pillow image or an array
    if verdict.anomalous:
        print(verdict.score, verdict.threshold, verdict.peak_x, verdict.peak_y)

The command's exit status is 0 where all photos are normal, 10 where some are anomalous, and
2 where one could not be read or judged, or the command itself is wrong. No crash of Python
has one of these (it has 1).
"""
import argparse
import csv
import os
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # the folder of evaluate.py
import evaluate as ev
from data import resize, to_float, with_progress
from photos.images import (appearance, has_another_shape, how_they_differ,
                           list_images, name_some, printable, read_photo)
from photos.page import Row, lay_over, write_page

NORMAL, ANOMALOUS, NO_VERDICT = 0, 10, 2                # exit statuses


class Verdict(NamedTuple):
    """What is said of one photo."""
    file: str                       # as it was given, "" for an image or an array
    kind: str                       # what it was judged as
    score: float                    # how far it differs from the good ones
    threshold: float                # None where the run has none: then there is no verdict
    anomalous: bool                 # score > threshold, or None
    doubtful: bool                  # the score is within 15 % of the threshold
    heat_map: np.ndarray            # (S, S) float32, what gave the score; 1 is the threshold
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

    run: its folder. kind: what all photos show, of a run that has learned several kinds.
    false_alarms: the share of good parts that may be called anomalous, .01 for 1 of 100;
    None leaves what was chosen at learning. threshold: a score, instead of it.
    Raises FileNotFoundError and ValueError where that is no run, or there is no such kind.
    """

    def __init__(self, run, kind=None, false_alarms=None, threshold=None, device="cpu"):
        self.state, self.model = ev.load_run(run, device)
        self.config = self.state["config"]
        self.calibration = ev.Calibration(**self.state["calibration"])
        self.learned = self.state.get("photos")             # None of a run of train.py
        self.backbone = ev.open_backbone(self.config, device, self.state)
        self.kinds = list(self.calibration.thresholds)
        self.kind = self.checked(kind)
        self.fpr = self.config["fpr"] if false_alarms is None else false_alarms
        if not 0 < self.fpr < 1:
            raise ValueError(f"false alarms {self.fpr}: expected a share between 0 and 1, "
                             "such as .01")
        self.given = threshold
        self.thresholds = {}
        for name in self.kinds:
            limit = ev.threshold_of(name, self.calibration, self.config["score"], self.fpr)
            self.thresholds[name] = limit if threshold is None else threshold

    def checked(self, kind):
        if kind not in (None, *self.kinds):
            raise ValueError(f"kind {kind}: this run has learned {', '.join(self.kinds)}")
        return kind

    def __call__(self, images, kind=None):
        """A Verdict for a path, a Pillow image or an array (H, W, 3) uint8; a list for a list.

        Raises ValueError, which names the file, for what is no photo.
        """
        if not isinstance(images, (list, tuple)):
            return self([images], kind)[0]
        verdicts = []
        for start in range(0, len(images), 8):
            some = images[start:start + 8]
            photos = [self.read(image) for image in some]
            names = [str(image) if isinstance(image, (str, Path)) else "" for image in some]
            verdicts += self.judge(photos, names, kind)
        return verdicts

    def read(self, source):
        """A file, a Pillow image or an array -> images.Photo, as this run's model sees it."""
        channels, side, _ = self.state["image"]
        white = self.config.get("white")
        # Images of train.py's own data sets are padded or gray.
        padded = self.config["dataset"] in ("mnist", "fashion_mnist") and side == 32
        photo = read_photo(source, 28 if padded else side, white)
        pixels = resize(photo.pixels[None], side)[0]
        if channels == 1:
            pixels = pixels.float().mean(0, keepdim=True).round().byte()
        return photo._replace(pixels=pixels)

    def judge(self, photos, names, kind=None):
        """images.Photos, and their names -> a list of Verdicts."""
        if not photos:
            return []
        c, pixels = self.config, torch.stack([photo.pixels for photo in photos])
        if self.backbone is None:
            stored, prepare = pixels, to_float
        else:
            device = self.backbone.mean.device
            stored, prepare = self.backbone.extract(to_float(pixels.to(device))), \
                self.backbone.standardize
        errors = ev.error_maps(self.model, stored, prepare)                 # (B, h, w)
        scores = ev.category_scores(errors, self.kinds, c, self.calibration)        # (B, K)
        chosen = self.choose_kinds(stored.cpu(), scores, self.checked(kind) or self.kind)
        verdicts = []
        for i, name in enumerate(names):
            own = self.kinds[chosen[i]]
            heat = self.heat_map(errors[i:i + 1], own)
            score, limit = float(scores[i, chosen[i]]), self.thresholds[own]
            y, x = divmod(int(heat.argmax()), heat.shape[1])
            verdicts.append(Verdict(
                file=name, kind=own, score=score, threshold=limit,
                anomalous=None if limit is None else score > limit,
                doubtful=limit is not None and abs(score - limit) <= 0.15 * abs(limit),
                heat_map=heat, peak_x=(x + 0.5) / heat.shape[1], peak_y=(y + 0.5) / heat.shape[0]))
        return verdicts

    def choose_kinds(self, stored, scores, kind):
        """What each photo shows: `kind`, or that of the learned photo that looks most alike.

        A run of train.py keeps no looks. There it is the kind whose threshold is exceeded
        least. -> B numbers in self.kinds
        """
        if kind or len(self.kinds) == 1:
            return [self.kinds.index(kind) if kind else 0] * len(stored)
        if self.learned is None:
            limits = [self.thresholds[name] or np.inf for name in self.kinds]
            return (scores / torch.tensor(limits)).argmin(1).tolist()
        nearest = nearest_look(looks_of(stored), self.learned["looks"])
        return [self.kinds.index(self.learned["kinds"][i]) for i in nearest]

    def heat_map(self, errors, kind):
        """What gave the score, in which 1 is the threshold: (1, h, w) -> (S, S) of numpy."""
        c, size = self.config, self.calibration.size
        if c["score"] == "standardized":
            maps = ev.blurred(errors, c, size, 64)
            maps = ev.standardize(maps, self.calibration.statistics[kind])
            one = self.thresholds[kind] or 1.0
            one = one if one > 0 else 1.0
        else:
            maps = ev.blurred(errors, c, size, 32)
            one = self.calibration.color_limit / 2
        return (ev.heat_maps(maps, size)[0] / one).numpy()

    def promise(self, kind):
        """What may be expected of the threshold of a kind, as a sentence."""
        limit = self.thresholds[kind]
        if limit is None:
            return "There is no threshold: too few photos were learned."
        if self.given is not None:
            # The photos themselves come first, and after them the copies made of them.
            scores = self.calibration.scores[kind][:self.calibration.images[kind]]
            above = int((scores > self.given).sum())
            return (f"Threshold {limit:.4g}, as given. {above} of the {len(scores)} good photos "
                    "that were learned exceed it.")
        return f"Threshold {limit:.4g}. {promise(self.calibration.images[kind], self.fpr)}"


def promise(photos, fpr):
    """What a threshold set by so many photos promises, as a sentence."""
    needed = round(1 / fpr + 0.499999) - 1
    if photos >= needed:
        return (f"About {percent(fpr)} of new good parts will exceed it. (It was set by {photos} "
                "good photos.)")
    return (f"It was set by {photos} good photos, which are too few to promise {percent(fpr)}: up "
            f"to {percent(1 / (photos + 1))} of new good parts may exceed it. For {percent(fpr)}, "
            f"at least {needed} photos are needed.")


def percent(share):
    return f"{100 * share:.2g} %"


# ---- which kind ----

def looks_of(stored):
    """What photos look like as a whole, to tell their kinds: (N, C, h, w) -> (N, D).

    It is how the values of each channel are distributed over the photo, five quantiles of
    them. So neither where a part lies counts, nor a defect that covers a tenth of it.
    """
    values = to_float(stored).flatten(2).sort(2).values                     # (N, C, h w)
    places = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]) * (values.shape[2] - 1)
    return values[:, :, places.round().long()].flatten(1)


def nearest_look(looks, learned, leave_out=False):
    """The number of the learned photo that looks most alike: (B, D), (N, D) -> B numbers.

    leave_out: the looks are those learned, and none is compared with itself.
    """
    width = learned.std(0, correction=0).clamp(min=1e-6)
    distances = torch.cdist(looks / width, learned / width)
    if leave_out:
        distances.fill_diagonal_(float("inf"))
    return distances.argmin(1).tolist()


# ---- what a call leaves on disk ----

COLUMNS = ["file", "score", "threshold", "verdict", "kind", "peak_x", "peak_y"]


class Report:
    """The table and the page of one call, in a folder of its own.

    folder: an empty one, or None, which writes nothing. pictures: make the page, too.
    several: whether the run has learned several kinds.
    """

    def __init__(self, folder, pictures=True, several=False):
        self.folder, self.pictures, self.several, self.rows = folder, pictures, several, []
        self.stream = open(os.devnull, "w")
        if folder is None:
            return
        if pictures:
            (folder / "pictures").mkdir()
        self.stream = open(folder / "judged.csv", "w", newline="", encoding="utf-8",
                           errors="backslashreplace", buffering=1)
        self.table = csv.writer(self.stream)
        self.table.writerow(COLUMNS)

    def add(self, file, photo, verdict):
        """A row for a photo. photo, verdict: None where it cannot be read."""
        if self.folder is None:
            return
        if verdict is None:
            self.table.writerow([file, "", "", "not read", "", "", ""])
            self.rows.append(Row(printable(file), "", "", 1e9, "cannot be read", ("unreadable",)))
            return
        v = verdict
        self.table.writerow([file, v.score, v.threshold, v.word, v.kind, v.peak_x, v.peak_y])
        addresses = "", ""
        if self.pictures:
            name = f"pictures/{len(self.rows) + 1:05}"
            addresses = f"{name}.jpg", f"{name}-heat.jpg"
            photo.picture.save(self.folder / addresses[0], quality=80)
            lay_over(photo.picture, v.heat_map).save(self.folder / addresses[1], quality=80)
        text = f"{v.word}, score {v.score:.4g}"
        if v.threshold is not None and v.threshold > 0:
            text += f", {v.ratio:.2f} x the threshold"
        if self.several:
            text += f", as {printable(v.kind)}"
        tags = (v.word, "doubtful") if v.doubtful else (v.word,)
        self.rows.append(Row(printable(file), *addresses, v.ratio, text, tags))

    def close(self, facts):
        """Write the page. facts: lines for its top."""
        self.stream.close()
        if self.folder is None or not self.pictures:
            return
        title = f"{len(self.rows):,} photos, judged {time.strftime('%Y-%m-%d %H:%M')}"
        write_page(self.folder / "judged.html", title, facts, self.rows)


def new_folder(run, out):
    """The folder of this call's table and page, or None where none can be written.

    It is `out`, or else a new one in RUN/judged, named by the time. So no call ever
    replaces what another has written. Raises ValueError where `out` is not empty.
    """
    if out is not None:
        folder = Path(out)
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"--out {printable(out)} is not empty. Name a new folder: nothing is "
                             "replaced")
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    try:
        (Path(run) / "judged").mkdir(exist_ok=True)
        name, number = time.strftime("%Y-%m-%d_%H-%M-%S"), 1
        while True:
            folder = Path(run) / "judged" / (name if number == 1 else f"{name}_{number}")
            try:
                folder.mkdir()
                return folder
            except FileExistsError:                         # of another call in this second
                number += 1
    except OSError as error:
        print(f"no table and no page are written ({error}). --out names a folder for them",
              file=sys.stderr)
        return None


# ---- the command ----

class Seen:
    """What the photos of one call add up to."""

    def __init__(self):
        self.normal = self.anomalous = self.doubtful = 0
        self.interrupted = False
        self.unreadable, self.no_verdict, self.other_shape = [], [], []
        self.appearances = {}                               # kind: a list of (6,)

    def add(self, file, photo, verdict, learned):
        if verdict is None:
            self.unreadable.append(file)
            return
        self.normal += verdict.anomalous is False
        self.anomalous += verdict.anomalous is True
        self.doubtful += verdict.doubtful
        if verdict.anomalous is None:
            self.no_verdict.append(file)
        if learned is None:
            return
        own = [shape for shape, kind in zip(learned["shapes"], learned["kinds"])
               if kind == verdict.kind]
        if has_another_shape(photo.shape, own):
            self.other_shape.append((file, photo.shape, own[0]))
        looks = self.appearances.setdefault(verdict.kind, [])
        looks.append(appearance(photo.pixels[None])[0])

    def status(self):
        if self.interrupted:
            return 130
        if self.unreadable or self.no_verdict:
            return NO_VERDICT
        return ANOMALOUS if self.anomalous else NORMAL


def judge_files(judge, files, report, seen, show_all=False):
    """Judge files one by one, into a Report and Seen. Each that is anomalous gets a line."""
    batches = [files[start:start + 8] for start in range(0, len(files), 8)]
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
            verdict = verdicts.get(file)
            report.add(file, photos.get(file), verdict)
            seen.add(file, photos.get(file), verdict, judge.learned)
            if verdict and (show_all or verdict.anomalous is not False):
                print(line_of(verdict, len(judge.kinds) > 1))


def line_of(verdict, several):
    """A verdict as a line."""
    kind = f", as {printable(verdict.kind)}" if several else ""
    near = ", near the threshold" if verdict.doubtful else ""
    return f"{verdict.word:<10} {printable(verdict.file)}   score {verdict.score:.4g}{kind}{near}"


def summary(judge, seen):
    """How many of how many, and what speaks against trusting it: lines."""
    judged = seen.normal + seen.anomalous
    count = judged + len(seen.unreadable) + len(seen.no_verdict)
    parts = [f"{seen.anomalous:,} anomalous, {seen.normal:,} normal"]
    if seen.doubtful:
        parts.append(f"{seen.doubtful:,} of these near the threshold: look at them")
    if seen.no_verdict:
        parts.append(f"{len(seen.no_verdict):,} without a verdict, for the run has no threshold")
    if seen.unreadable:
        parts.append(f"{len(seen.unreadable):,} could not be read")
    lines = [f"{count:,} photo{'s' * (count != 1)}: {'; '.join(parts)}."]
    if seen.other_shape:
        names, shapes, learned = zip(*seen.other_shape)
        lines.append(f"WARNING: {len(names):,} have another shape than the photos learned "
                     f"({shapes[0][0]} x {shapes[0][1]} pixels, learned {learned[0][0]} x "
                     f"{learned[0][1]}): {name_some(names)}. Their verdicts mean little. Take "
                     "them, or crop them, in the same shape.")
    words = differences(judge, seen)
    if words:
        lines.append(f"WARNING: as a whole the photos are {' and '.join(words)} than those learned. "
                     "If that is how they will be from now on, add some of good parts to the folder "
                     "and learn again.")
    elif judged >= 5 and seen.anomalous > 0.5 * judged:
        lines.append("WARNING: more than half are anomalous. If these parts are good, the photos "
                     "differ from those learned: add some of them to the folder and learn again.")
    return lines


def differences(judge, seen):
    """Words for how the new photos differ as a whole from those learned."""
    words = []
    for kind, looks in seen.appearances.items():
        if len(looks) < 5:
            continue
        own = [i for i, other in enumerate(judge.learned["kinds"]) if other == kind]
        for word in how_they_differ(torch.stack(looks), judge.learned["appearance"][own]):
            if word not in words:
                words.append(word)
    return words


def latest(folder, run):
    """Let RUN/judged.html lead to the page in `folder`. A run that cannot be written stays."""
    try:
        address = os.path.relpath(folder / "judged.html", run).replace(os.sep, "/")
        part = Path(run) / f"judged-{os.getpid()}.tmp"
        part.write_text(f'<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" '
                        f'content="0; url={address}"><a href="{address}">the latest page</a>\n')
        os.replace(part, Path(run) / "judged.html")
    except (OSError, ValueError):
        pass


def parser():
    p = argparse.ArgumentParser(
        description="Judge new photos.", allow_abbrev=False,
        epilog="Exit status: 0 all are normal, 10 some are anomalous, 2 something could not be "
               "read or judged.")
    add = p.add_argument
    add("run", help="a folder that photos/learn.py or train.py wrote")
    add("images", nargs="+", help="files, and folders of files")
    add("--kind", help="what they show, where several kinds were learned (default: it is told "
                       "from each photo)")
    add("--false-alarms", type=float, metavar="SHARE",
        help="the share of good parts that may be called anomalous, such as .01 (default: as "
             "learned)")
    add("--threshold", type=float, help="a score: what exceeds it is anomalous")
    add("--all", action="store_true", help="print a line for normal photos, too")
    add("--page", action=argparse.BooleanOptionalAction, default=True,
        help="make the page and its pictures (default)")
    add("--out", help="a new folder for table and page (default: RUN/judged/DATE_TIME)")
    add("--device", default="cpu", help="default: cpu")
    return p


def main(argv=None):
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):                             # names in any script
        getattr(stream, "reconfigure", dict)(errors="backslashreplace")
    try:
        status = run_command(args)
    except (ValueError, OSError, RuntimeError, AssertionError) as error:    # of torch: no CUDA
        parser().exit(NO_VERDICT, f"judge.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(130, "\ninterrupted\n")
    raise SystemExit(status)


def run_command(args):
    """Judge what the command line names -> the exit status."""
    judge = Judge(args.run, args.kind, args.false_alarms, args.threshold, args.device)
    files = list_images(args.images)
    if not files:
        raise ValueError(f"there are no images in {name_some(args.images)}: nothing was judged")
    facts = []
    for kind in [judge.kind] if judge.kind else judge.kinds:
        facts.append(f"{printable(kind)}: {judge.promise(kind)}")
    print("\n".join(facts))
    folder = new_folder(args.run, args.out)
    report, seen = Report(folder, args.page, len(judge.kinds) > 1), Seen()
    try:
        judge_files(judge, files, report, seen, args.all)
    except KeyboardInterrupt:
        print(f"\ninterrupted, {len(files):,} were to be judged")
        seen.interrupted = True
    finally:                                                # what was judged stays, whatever comes
        lines = summary(judge, seen)
        report.close(lines + facts)
    print("\n" + "\n".join(lines))
    if folder:
        print(f"table: {printable(folder / 'judged.csv')}")
        if args.page:
            print(f"page:  {printable(folder / 'judged.html')}   (open it in a browser)")
            latest(folder, args.run)
    return seen.status()


if __name__ == "__main__":
    main()
