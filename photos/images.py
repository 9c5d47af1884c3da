"""Images: any photo a camera leaves, and any folder of them, as what the models learn.

    photo = read_photo("part.jpg", 256)     # .pixels (3, 256, 256) uint8, .picture
    photos = read_folder("my_images", 256)  # .data, a data.Data, and .files

`read_photo` shows a photo as a viewer would: turned as its EXIF says, transparent parts
on white, 16 and 32 bits brought to 8. `read_folder` finds out which photos are of good
parts and which are to test by, see LAYOUT. What cannot be used is named and left out.
"""
import contextlib
import hashlib
import math
import os
import re
import shlex
import sys
import warnings
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from data import Data, shrink_mask, with_progress
from evaluate import printable
from photos.alike import parts_shown

try:                                                # photos of phones, if it is there
    import pillow_heif
    pillow_heif.register_heif_opener()
except ImportError:
    pillow_heif = None

LAYOUT = """photos of good parts alone, *.jpg
or, with photos to test by: train/good/*, test/good/*, test/<defect>/*
or, of several kinds of parts: <kind>/train/good/*, <kind>/test/...
good may be called ok or normal, too. Masks of defects may lie in
ground_truth/<defect>/<name>_mask.png"""

PLACE = re.compile(r"""(?: (?P<kind>[^/]+) / )??    # tried without a kind first
    (?: train / (?P<normals>good|ok|normal)
      | test / (?: (?P<good>good|ok|normal) | (?P<bad>[^/]+) )
      | (?:ground_truth|masks?|gt) / (?!train/|test/) (?P<defect>[^/]+)
        (?: / (?P<image>[^/]+) )?                   # MVTec LOCO's folder for each image
    ) / [^/]+""", re.VERBOSE | re.IGNORECASE)

GOOD = ("good", "ok", "normal")
HEIC = {".heic", ".heif", ".hif"}                   # read if pillow-heif is installed
NO_PHOTOS = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF", "EPS"}  # known by name only


def readable_suffixes():
    """The suffixes of all formats that Pillow reads, and HEIC's, in lower case."""
    Image.init()
    formats = {*Image.OPEN, "MPO"} - NO_PHOTOS
    suffixes = {suffix for suffix, form in Image.registered_extensions().items()
                if form in formats}
    return suffixes | HEIC


SUFFIXES = readable_suffixes()
Image.MAX_IMAGE_PIXELS = 2 ** 27    # twice as many, 16,384 x 16,384, are refused

PAGE_SIDE = 320                     # the longer side in pixels of a picture on a page


class Photo(NamedTuple):
    """One photo, upright."""
    pixels: torch.Tensor  # (3, S, S) uint8, squeezed to the square a model sees
    picture: Image.Image            # small, in its own shape, to look at
    shape: tuple                    # width and height in pixels


class Folder(NamedTuple):
    """What a folder holds. Files are named relative to it."""
    data: Data
    files: list                     # N paths, of data.train
    keys: list                      # N hashes of what data.train shows
    tests: str                      # a hash of what there is to test by
    shapes: list                    # N pairs (width, height)
    root: Path
    white: float                    # see `find_white`, or None
    parts: list                     # N numbers, see `parts_shown`


# ---- a line for the reader ----

def name_some(names, most=3):
    """ "a, b, c and 9 more" """
    names = [printable(name) for name in names]
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def print_any_name():
    """Let names in any script be printed, also by a terminal that knows a few."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(names, one, many):
    """Print a line that counts and names what is passed over, if there is anything."""
    if names:
        what = one if len(names) == 1 else f"{len(names):,} {many}"
        print(f"{what}: {name_some(names)}")


# ---- one photo ----

@contextlib.contextmanager
def opened(source):
    """A path, an open file, a Pillow image or an array as a Pillow image.

    Whatever Pillow objects to becomes a ValueError that names the file.
    """
    name = "the image"
    if isinstance(source, (np.ndarray, torch.Tensor)):
        source = from_array(np.asarray(source))
    try:
        if isinstance(source, Image.Image):
            yield source
        else:
            if not hasattr(source, "read"):
                name = printable(source)
                if Path(source).is_fifo():          # reading would wait for ever
                    raise ValueError("it is a pipe, not a file")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with Image.open(source) as image:
                    yield image
    except FileNotFoundError:
        raise ValueError(f"no such file or folder: {name}") from None
    except Exception as error:                      # of many kinds, by format
        raise ValueError(f"{name} cannot be read ({error}){advice_on(error, name)}"
                         ) from None


def advice_on(error, name):
    """What to do about a photo that cannot be read, where one can tell."""
    if Path(name).suffix.lower() in HEIC and pillow_heif is None:
        return ". For photos of this format: pip install pillow-heif"
    if isinstance(error, UnidentifiedImageError):
        return ". Save it as PNG or JPEG"
    if isinstance(error, Image.DecompressionBombError):
        return ". Make it smaller"
    return ""


def from_array(array):
    """(H, W), (H, W, 3) or (H, W, 4) uint8, or (H, W) uint16 -> a Pillow image."""
    gray = array.ndim == 2 and array.dtype in (np.uint8, np.uint16)
    color = array.ndim == 3 and array.shape[2] in (3, 4) and array.dtype == np.uint8
    if not (gray or color) or not array.size:
        raise ValueError(
            f"an array of shape {array.shape} and type {array.dtype}: expected (height,"
            " width, 3) uint8, red first. Of an image of OpenCV, "
            "cv2.cvtColor(image, cv2.COLOR_BGR2RGB) makes that")
    return Image.fromarray(np.ascontiguousarray(array))


def upright_shape(image):
    """Width and height of a Pillow image as a viewer shows it."""
    turned_by_90 = image.getexif().get(0x0112, 1) >= 5      # EXIF's orientation
    return image.size[::-1] if turned_by_90 else image.size


def largest_value(image):
    """The largest value in an image of 16 or 32 bits, and 0 in any other."""
    return float(np.max(image)) if image.mode[0] in "IF" else 0.0


def find_white(largest):
    """The value that becomes 255 in images of 16 or 32 bits, by their largest value.

    There is one for all images of a folder, so that they stay comparable: the first of
    1 (or 5 % above), 2^8 - 1, 2^10 - 1, 2^12 - 1, ... that none exceeds. None where all
    have 8 bits.
    """
    if not largest:
        return None
    if largest <= 1.05:
        return 1.0
    bits = 8
    while largest > 2.0 ** bits - 1:
        bits += 2
    return 2.0 ** bits - 1


def to_rgb(image, white, background):
    """A Pillow image, upright, in RGB of 8 bits, laid on the background.

    white: see `read_photo`.
    """
    # A phone's MPO has a preview as a second page. Of other files, which page is meant?
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"{image.n_frames} pages; save each as a file of its own")
    # Of colors of 16 bits Pillow keeps the upper 8, hardly used where there are 12.
    bits_16 = ";16" in str(getattr(image, "tile", "")) and image.mode[0] != "I"
    if bits_16 and np.max(image) < 16:
        raise ValueError("of 16 bits a color only the lowest 12 are used; save it with "
                         "8")

    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":                       # 16 or 32 bits, or floats
        values = np.asarray(image, np.float32)
        if not (values.min() >= 0 and values.max() < math.inf):
            raise ValueError("negative or infinite values")
        if white == 0:
            raise ValueError("it has 16 or 32 bits, and those learned have 8; save it "
                             "with 8")
        white = white or find_white(values.max()) or 1
        values = (values / white * 255).clip(0, 255).round()
        image = Image.fromarray(values.astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def read_photo(source, size, white=None):
    """A path, an open file, a Pillow image or an array -> Photo of size x size pixels.

    white: of 16 and 32 bits the value that becomes 255, see `find_white`. None finds it
    for this photo alone, and 0 refuses photos of so many bits. Raises ValueError, which
    names the file, for what is no photo.
    """
    with opened(source) as image:
        image = to_rgb(image, white, "white")
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR))
        shape = image.size
        image.thumbnail((PAGE_SIDE, PAGE_SIDE))     # of a copy, which `to_rgb` has made
    return Photo(torch.from_numpy(pixels).permute(2, 0, 1), image, shape)


# ---- a folder ----

def list_images(paths):
    """Files and folders -> the files named, and the images in and below the folders.

    What learning and judging have written themselves is no input: the pictures of a
    page, and the files of a run. Other files that are no images are named. A folder
    that cannot be opened is listed as it is: nothing can be read from it.
    """
    found, other, closed = [], [], []
    for path in map(Path, paths):
        if not path.is_dir():
            found.append(path)
            continue
        visited = {path.resolve()}                      # links may lead back
        for folder, folders, names in os.walk(path, onerror=closed.append,
                                              followlinks=True):
            own = own_names({*folders, *names})
            # Folders come before links, so that a file keeps its own name.
            below = [Path(folder, name) for name in {*folders} - own]
            below.sort(key=lambda path: (path.is_symlink(), path.name))
            folders[:] = []
            for path_below in below:
                if path_below.resolve() not in visited:
                    visited.add(path_below.resolve())
                    folders.append(path_below.name)
            for name in sorted({*names} - own):
                image = Path(name).suffix.lower() in SUFFIXES
                (found if image else other).append(Path(folder, name))
    say(other, "1 file is no image by the end of its name, and is passed over",
        "files are no images by the ends of their names, and are passed over")
    return found + [Path(error.filename) for error in closed]


def own_names(names):
    """Which names in a folder are hidden, or were written by learning or judging."""
    own = {name for name in names if name[0] == "."}
    own |= {"judged.csv", "judged.html", "learned.html"}
    if "judged.csv" in names:
        own.add("pictures")
    if "model.pt" in names:                         # it is a run
        own |= {"model.pt", "run.json", "writer.txt", "examples.png"}
    return own


class Kind(NamedTuple):
    """The files of one kind of parts, by their place in LAYOUT."""
    normals: list
    good: list
    bad: list
    masks: dict                     # (defect, image): its files


def by_place(root):
    """Images below root, by their place in LAYOUT -> {name: Kind}, and the others."""
    found, other = defaultdict(lambda: Kind([], [], [], defaultdict(list))), []
    paths = list_images([root])
    closed = [path for path in paths if path.is_dir()]
    say(closed, "1 folder cannot be opened, and is left out",
        "folders cannot be opened, and are left out")
    for path in paths:
        if path in closed:
            continue
        place = PLACE.fullmatch(path.relative_to(root).as_posix())
        if not place:
            other.append(path)
            continue
        kind = found[place["kind"] or root.resolve().name]
        if place["defect"]:
            image = place["image"] or re.sub("(?i)[-_.](mask|gt|label)$", "", path.stem)
            kind.masks[place["defect"].lower(), image].append(path)
        elif place["normals"]:
            kind.normals.append(path)
        else:
            (kind.good if place["good"] else kind.bad).append(path)
    return found, other


def sort_files(root):
    """Images below root, by their place in LAYOUT -> {name: Kind}, or a clear error."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {printable(root)}")
    found, other = by_place(root)
    if not any(kind.normals for kind in found.values()):    # a folder of photos alone
        alone = [path for path in other if path.parent == root]
        other = [path for path in other if path.parent != root]
        found[root.resolve().name].normals.extend(alone)
    say(other,
        "1 image lies elsewhere than in train/good or test/<name>, and is left out",
        "images lie elsewhere than in train/good or test/<name>, and are left out")
    untaught = [name for name, kind in found.items() if not kind.normals]
    say([name for name in untaught if found[name].good or found[name].bad],
        "1 kind has no photos to learn from (train/good), and is left out",
        "kinds have no photos to learn from (train/good), and are left out")
    found = {name: kind for name, kind in sorted(found.items()) if kind.normals}
    for kind in found.values():
        check_one_folder(kind.normals)
        check_one_folder(kind.good)
    if not found:
        there = sorted(root.glob("*"))
        names = name_some([path.name for path in there], 8)
        advice = ("Photos in folders of other names, such as one a day, go into one "
                  "folder together")
        for path in there:
            if path.is_dir() and path.name.lower() in GOOD:
                folder = shlex.quote(printable(path))
                advice = f"Learn the good ones: python photos/learn.py {folder}"
        raise FileNotFoundError(
            f"there are no photos of good parts in {printable(root)}, expected as\n"
            f"{LAYOUT}\nfound there: {names or 'nothing'}. {advice}")
    return found


def check_one_folder(files):
    """Raise ValueError where good photos lie in two folders, such as good and ok."""
    folders = sorted({printable(path.parent) for path in files})
    if len(folders) > 1:
        raise ValueError(f"{' and '.join(folders)}: which holds the good ones? Keep "
                         "that folder alone")


def read_folder(root, size):
    """A folder of photos, see LAYOUT -> Folder. Photos are squeezed to size x size.

    Photos that cannot be read are named and left out. So are exact copies of others and
    photos to test by that are learned, too. Raises ValueError where nothing is left,
    FileNotFoundError where there was nothing.
    """
    root = Path(root)
    train, test, masks = [], [], {}                 # (file, kind, 0 or 1 for defective)
    for name, kind in sort_files(root).items():
        train += [(path, name, 0) for path in kind.normals]
        test += [(path, name, 0) for path in kind.good]
        test += [(path, name, 1) for path in kind.bad]
        masks[name] = kind.masks
    white = white_of([path for path, _, _ in train])
    photos = read_all([path for path, _, _ in train + test], size, white or 0)
    keys = {path: content_key(photo.pixels) for path, photo in photos.items()}
    train, test = usable(train, test, keys)
    if not train:
        raise ValueError(f"none of the photos in {printable(root)} can be read")

    data = as_data(train, test, photos, masks, size)
    return Folder(
        data=data, root=root, white=white,
        files=[path.relative_to(root).as_posix() for path, _, _ in train],
        keys=[keys[path] for path, _, _ in train],
        tests=tests_key([(keys[path], name, label) for path, name, label in test],
                        data.masks),
        shapes=[photos[path].shape for path, _, _ in train],
        parts=parts_shown(data))


def as_data(train, test, photos, masks, size):
    """Photos that were read -> data.Data.

    train, test: lists of (file, kind, label). photos: {file: Photo}. masks: see
    `read_masks`.
    """
    kinds = [name for _, name, _ in train]
    labels = [label for _, _, label in test]
    images = torch.empty(len(test), 3, size, size, dtype=torch.uint8)   # there may be 0
    for i, (path, _, _) in enumerate(test):
        images[i] = photos[path].pixels
    return Data(
        train=torch.stack([photos[path].pixels for path, _, _ in train]),
        train_classes=kinds, train_categories=kinds,
        test=images,
        labels=torch.tensor(labels).long(),
        categories=[name for _, name, _ in test],
        masks=read_masks([(path, name) for path, name, _ in test], labels, masks, size))


def usable(train, test, keys):
    """Leave out what could not be read, copies, and test photos that are learned, too.

    train, test: lists of (file, kind, label). keys: {file: a hash of what it shows}.
    """
    first, once, copies = set(), [], []
    for row in train:
        key = keys.get(row[0])
        if key is not None:
            (copies if key in first else once).append(row)
            first.add(key)
    say([row[0] for row in copies],
        "1 photo is an exact copy of another, and is left out",
        "photos are exact copies of others, and are left out")
    kinds = {kind for _, kind, _ in once}
    untaught = [row[0] for row in test if row[0] in keys and row[1] not in kinds]
    say(untaught,
        "1 photo to test by is of a kind that has none to learn, and is left out",
        "photos to test by are of kinds that have none to learn, and are left out")
    test = [row for row in test if row[0] in keys and row[1] in kinds]
    learned = [row[0] for row in test if keys[row[0]] in first]
    say(learned,
        "1 photo to test by is learned, too. It proves nothing, and is left out",
        "photos to test by are learned, too. They prove nothing, and are left out")
    return once, [row for row in test if keys[row[0]] not in first]


def content_key(pixels):
    """A hash of what a photo shows, at the size that a model sees."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def tests_key(rows, masks):
    """A hash of what there is to test by. rows: (what a photo shows, kind, label)."""
    shown = b"" if masks is None else masks.numpy().tobytes()
    return hashlib.sha256(repr(sorted(rows)).encode() + shown).hexdigest()


def white_of(files):
    """`find_white` for all of these files. What cannot be read is found out later."""
    largest = 0.0
    for path in files:
        with contextlib.suppress(ValueError), opened(path) as image:
            if largest_value(image) > largest:
                to_rgb(image, None, "white")            # what is refused does not count
                largest = largest_value(image)
    return find_white(largest)


def read_all(files, size, white):
    """-> {file: Photo}, without those that cannot be read, which are named."""
    photos, unreadable = {}, []
    for path in with_progress(files, "photos read", len(files)):
        try:
            photo = read_photo(path, size, white)
        except ValueError as error:
            print(error, file=sys.stderr)
            unreadable.append(path)
        else:
            # Pictures to look at would take much memory: the page reads its few again.
            photos[path] = photo._replace(picture=None)
    say(unreadable, "1 photo cannot be read, and is left out",
        "photos cannot be read, and are left out")
    return photos


# ---- masks ----

def read_masks(test, labels, masks, size):
    """-> (M, size, size) bool, or None where there are none. See data.shrink_mask.

    test: M pairs (file, kind). masks: {kind: {(defect, image): files}}. Lines say which
    defects have no mask, which masks have no photo, and which cannot be used.
    """
    if not any(masks.values()):
        return None
    result, missing = torch.zeros(len(test), size, size, dtype=torch.bool), []
    for i, (path, name) in enumerate(test):
        files = masks[name].pop((path.parent.name.lower(), path.stem), [])
        if labels[i] and files:
            try:
                result[i] = shrink_mask(read_mask(files, path), size)
            except ValueError as error:
                print(error, file=sys.stderr)
        if labels[i] and not result[i].any():
            missing.append(path)
    say(missing,
        "1 defect has no mask, or an empty one: it counts for whole photos only",
        "defects have no mask, or an empty one: they count for whole photos only")
    unmatched = [files[0] for left in masks.values() for files in left.values()]
    expected = "expected as ground_truth/<defect>/<name>_mask.png"
    say(unmatched, f"1 mask matches no photo, {expected}",
        f"masks match no photo, {expected}")
    return result


def read_mask(files, photo):
    """The masks of a photo, united: (H, W) bool, True where any color but black is."""
    with opened(photo) as image:
        width, height = upright_shape(image)
    marked = np.zeros((height, width), bool)
    for path in files:
        with opened(path) as mask:
            noise = 64 if mask.format == "JPEG" else 0
            colors = np.asarray(to_rgb(mask, 1, "black"))           # (H, W, 3)
        if colors.shape[:2] != marked.shape:
            rows, columns = colors.shape[:2]
            raise ValueError(
                f"{printable(path)}: the mask has {columns} x {rows} pixels, its photo "
                f"{width} x {height}. It is not used")
        marked |= colors.max(2) > noise
    return marked
