"""Data: any data set as a few tensors, normal images to train on and a labeled test set.

    data = load("mnist", "3")       # train on the 3s alone, test on all 10,000 digits
    data.train                      # (N, C, H, W) uint8, normal images only
    data.test, data.labels          # (M, C, H, W) uint8; (M,) 0 normal, 1 anomalous

All is held in memory. Of labeled images (digits, mnist, fashion_mnist, cifar10) `normal` names
the classes that are normal, of folders (mvtec, folder) categories, each with its own test set.
"""
import glob
import hashlib
import math
import re
import time
import warnings
from collections import defaultdict, namedtuple
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from scipy import ndimage
from sklearn import datasets as sklearn_datasets

Data = namedtuple("Data", "train train_classes test labels masks categories files white",
                  defaults=(None, None))
Data.__doc__ = """What `load` returns.
train: (N, C, H, W) uint8, all normal; train_classes: N names, the class or category of each
test: (M, C, H, W) uint8; labels: (M,) int64, 0 normal, 1 anomalous; categories: M names
masks: (M, H, W) bool, true where defective, or None; an anomaly of which all is false has none
files: of folders, where each of `train` was read; white: see `find_white`"""
Inputs = namedtuple("Inputs", "train train_classes held held_classes test prepare images "
                              "train_keys held_keys")
Inputs.__doc__ = """Images, or features (then `images` are those of train). held: set aside for the
threshold; prepare: stored -> what a model sees; keys: the `content_keys`"""
Category = namedtuple("Category", "normals good bad masks")  # {(defect, image): mask files}
FOLDER_LAYOUT = """<category>/train/good/*.png  (or ok, normal)
<category>/test/good/*.png, <category>/test/<defect>/*.png  (optional)
<category>/ground_truth/<defect>/<name>_mask.png  (optional)
or, of one category, train/good/*.png, ..., or normal images alone, *.png
MVTec AD: https://www.mvtec.com/company/research/datasets/mvtec-ad, by hand"""
PLACE = re.compile(r"""(?: (?P<category>[^/]+) / )??       # tried without a category first
    (?: train / (?P<normals>good|ok|normal)
      | test / (?: (?P<good>good|ok|normal) | (?P<bad>[^/]+) )
      | (?:ground_truth|masks?|gt) / (?!train/|test/) (?P<defect>[^/]+) (?: / (?P<image>[^/]+) )?
    ) / [^/]+""", re.VERBOSE | re.IGNORECASE)               # image: MVTec LOCO's folder for each
SUFFIXES = set(".png .jpg .jpeg .jfif .jp2 .bmp .gif .tif .tiff .webp .tga .pgm .ppm .heic".split())
Image.MAX_IMAGE_PIXELS = 2 ** 27    # Pillow refuses more than twice as many, 16,384 x 16,384


def to_float(x):
    """Stored -> what a model sees: uint8 images to float32 in [0, 1], anything else to float32."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def load(dataset, normal=None, data_dir="data", image_size=None, validate=False, white=None):
    """A data set as `Data`. normal: "3", "0,1,2", class names, or for folders categories or "all".
    image_size: pixels; None: as it is (MNIST's 28 padded to 32), not of folders. validate: judge on
    a sixth of the training split. white: a saved run's. Raises ValueError, FileNotFoundError."""
    if dataset in FOLDERS:
        if validate:
            raise ValueError(f"--validate: {dataset} has no anomalies in its training split")
        return load_folder(normal, Path(data_dir, FOLDERS[dataset]), image_size, white)
    (images, labels), test, classes = DATASETS[dataset](Path(data_dir))
    if validate:
        cut = len(images) * 5 // 6                                  # MNIST: 50,000 and 10,000
        images, labels, test = images[:cut], labels[:cut], (images[cut:], labels[cut:])
    return labeled((images, labels), test, classes, normal, image_size)


def report(items, what):
    """One line for all that is passed over: how many, and the first three by name."""
    if items:
        names = ", ".join(map(str, items[:3])) + (", ..." if len(items) > 3 else "")
        print(f"{len(items):,} {what}: {names if names.isprintable() else ascii(names)}")


def with_progress(items, what, total):
    """The items, and every five seconds a line: how many of the `total` are done, time left."""
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        if time.monotonic() - printed > 5:
            printed = time.monotonic()
            left = (printed - started) * (len(items) / done - 1)
            print(f"{what}: {total * done // len(items)} of {total}, {left:.0f} s left", flush=True)
        yield item


def split(classes, seed, fpr=0.05):
    """Indices of the normals to train on, and of those set aside for the threshold by the seed: of
    a class a tenth, or as many as `fpr` needs (19 for .05) up to a third; without fpr none."""
    if fpr is None:
        return torch.arange(len(classes)), torch.arange(0)
    generator, classes = torch.Generator().manual_seed(seed), np.array(classes)
    needed = math.ceil(round(1 / fpr, 9)) - 1
    train, held = [], []
    for name in sorted(set(classes.tolist())):
        mine = torch.from_numpy(np.flatnonzero(classes == name))
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = max(len(mine) // 10, min(needed, len(mine) // 3), min(1, len(mine) - 1))
        held.append(mine[:count])
        train.append(mine[count:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def content_keys(images):
    """(N, ...) -> (N,) int64: the first 8 bytes of the SHA-256 of each image's bytes."""
    digests = [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]
    return torch.tensor([int.from_bytes(d[:8], "little", signed=True) for d in digests]).long()


def split_by_content(data, seed, fpr, keys):
    """`split` of data.train, copies left out -> train, held, and the keys of all. keys: None, or a
    saved run's (train_keys, held_keys), which then decide. ValueError: they know no image here."""
    present = content_keys(data.train)
    once = torch.from_numpy(np.sort(np.unique(present.numpy(), return_index=True)[1]))
    if len(once) < len(present):
        print(f"{len(present) - len(once):,} training images are copies of others, left out")
    if keys is None:
        train, held = split([data.train_classes[i] for i in once], seed, fpr)
        return once[train], once[held], present
    train, held = (once[torch.isin(present[once], saved)] for saved in keys)
    new = once[~torch.isin(present[once], torch.cat(keys))].tolist()
    report([data.files[i] if data.files else i for i in new], "normal images are not those this "
           "run was trained on, left out: train again to use them")
    if len(train) + len(held) < len(torch.cat(keys)):
        print(f"{len(torch.cat(keys)) - len(train) - len(held):,} of its normal images are gone")
    if not len(train):
        raise ValueError("no image this run was trained on is here: --data-dir says where they are")
    return train, held, present


def to_inputs(data, seed, backbone=None, cache_dir=None, statistics=None, keys=None, fpr=0.05):
    """Data -> Inputs: images, or a Backbone's features, kept in cache_dir (None: in memory only).
    statistics, keys: a saved run's (mean and std of features; see `split_by_content`), or None."""
    train, held, present = split_by_content(data, seed, fpr, keys)
    stored, test, prepare, images = data.train, data.test, to_float, None
    if backbone is not None:
        images, prepare = data.train[train], backbone.standardize
        stored = cached_features(backbone, data.train, data.train_classes, cache_dir)
        test = cached_features(backbone, data.test, data.categories, cache_dir)
        if statistics is not None:
            backbone.load_state_dict(statistics, strict=False)
        elif backbone.standardizes:
            backbone.fit_statistics(stored[train])
    return Inputs(stored[train], [data.train_classes[i] for i in train],
                  stored[held], [data.train_classes[i] for i in held],
                  test, prepare, images, present[train], present[held])


def cached_features(backbone, images, owners, folder):
    """Raw features (N, C', g, g), float16, of images (N, C, H, W), uint8, computed once: of each of
    the `owners`, N names, a file in `folder` is named by a hash of its images and the backbone."""
    weights = hashlib.sha256(f"{backbone.name} {backbone.size}".encode())
    for tensor in backbone.stages.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    blank = torch.zeros(1, 3, backbone.size, backbone.size, device=backbone.mean.device)
    features = torch.empty(len(images), *backbone.raw(blank).shape[1:], dtype=torch.half)
    for name in sorted(set(owners)):
        index = [i for i, owner in enumerate(owners) if owner == name]
        mine = images[index]
        digest = hashlib.sha256(weights.digest() + mine.numpy().tobytes())
        path = folder and Path(folder, f"{digest.hexdigest()}.npz")
        try:
            features[index] = torch.from_numpy(np.load(path)["features"])
        except Exception:                                           # missing, or damaged (its CRC)
            batches = with_progress(mine.split(32), f"features of {name}", len(mine))
            parts = [backbone.raw(to_float(x.to(backbone.mean.device))).cpu() for x in batches]
            features[index] = torch.cat(parts)
            if folder:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savez(path, features=features[index].numpy())
    return features


def labeled(train, test, classes, normal, image_size):
    """Data from two (images, labels) pairs, images (N, C, H, W) uint8, by the normal classes."""
    numbers = {name.lower(): number for number, name in enumerate(classes)}
    numbers.update({str(number): number for number in range(len(classes))})
    names = [name.strip().lower() for name in str(normal or classes[0]).split(",")]
    chosen = sorted({numbers.get(name, -1) for name in names})
    if chosen[0] < 0 or len(chosen) == len(classes):
        raise ValueError(f"--normal {normal}: expected one or more of {', '.join(classes)}, and "
                         "at least one class left to be anomalous")
    (images, owners), (test_images, test_owners) = train, test
    keep = torch.isin(owners, torch.tensor(chosen))
    anomalous = ~torch.isin(test_owners, torch.tensor(chosen))
    return Data(resize(images[keep], image_size), [classes[i] for i in owners[keep]],
                resize(test_images, image_size), anomalous.long(), None,
                [",".join(classes[number] for number in chosen)] * len(test_images))


def resize(images, size):
    """(N, C, H, W) uint8 -> (N, C, size, size) uint8; MNIST's 28 is padded with black to 32."""
    if images.shape[-1] == 28 and size in (None, 32):
        return F.pad(images, [2, 2, 2, 2])
    if size in (None, images.shape[-1]):
        return images
    small = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).byte()


def load_digits(data_dir):
    """The 1,797 digits of 8x8 pixels in scikit-learn, scaled to 32; every third is a test image."""
    bundle = sklearn_datasets.load_digits()
    images = resize(torch.tensor(bundle.images[:, None] * 255 / 16).byte(), 32)
    labels, test = torch.tensor(bundle.target), torch.arange(1797) % 3 == 2
    return (images[~test], labels[~test]), (images[test], labels[test]), list("0123456789")


def load_torchvision(name, data_dir):
    """MNIST, FashionMNIST or CIFAR10 as torchvision reads them, downloaded when missing."""
    folder = Path(data_dir, "" if name == "CIFAR10" else f"{name}/raw")
    for path in sorted(folder.glob("*-ubyte")):                     # torchvision names no file
        header = np.fromfile(path, ">i4", 4 if "images" in path.name else 2).astype(np.int64)
        if path.stat().st_size != 4 * len(header) + header[1:].prod() or not len(header):
            raise ValueError(f"{path}: damaged, its {path.stat().st_size:,} bytes are not what its "
                             "header says; delete it, and it is made anew")
    kind, splits = getattr(torchvision.datasets, name), []
    for train in (True, False):
        try:
            part = kind(data_dir, train=train, download=True)
        except Exception as error:                                  # no network, disk, checksum
            files = [file[0] for file in getattr(kind, "resources", [["cifar-10-python.tar.gz"]])]
            mirrors = getattr(kind, "mirrors", ["https://www.cs.toronto.edu/~kriz/"])
            url = [mirror for mirror in mirrors if "lecun" not in mirror][0]    # that one is dead
            raise FileNotFoundError(
                f"{name} is not in {folder}, or damaged, and cannot be downloaded ({error}). Put "
                f"{', '.join(files)} from {url} there, or say where it is by --data-dir") from None
        images = torch.as_tensor(np.asarray(part.data))
        images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
        splits.append((images, torch.as_tensor(part.targets)))
    return *splits, [name.split(" - ")[0] for name in part.classes]         # MNIST: "3 - three"


def load_folder(normal, root, image_size, white=None):
    """A user's own images, see FOLDER_LAYOUT; MVTec AD (Bergmann et al. 2019) is such a folder."""
    categories = sort_files(root)
    names = [normal] if normal in categories else str(normal or "all").split(",")
    names = list(categories) if names == ["all"] else list(dict.fromkeys(map(str.strip, names)))
    if not set(names) <= set(categories):
        raise ValueError(f"--normal {normal}: use all, or some of {', '.join(categories)}")
    report([name for name in names if not categories[name].good],
           "categories without normal test images (test/good), so without AUROC")
    train, test, labels = [], [], []                                # (file, category)
    for name in names:
        category = categories[name]
        train += [(path, name) for path in category.normals]
        test += [(path, name) for path in category.good + category.bad]
        labels += [0] * len(category.good) + [1] * len(category.bad)
    files = [path for path, _ in train + test]
    white = white or find_white(files[:len(train)])
    images = torch.empty(len(files), 3, image_size, image_size, dtype=torch.uint8)
    for i, path in enumerate(with_progress(files, "images", len(files))):
        images[i] = read_image(path, image_size, white)
    masks = read_masks(test, labels, {name: categories[name].masks for name in names}, image_size)
    return Data(images[:len(train)], [name for _, name in train], images[len(train):],
                torch.tensor(labels).long(), masks, [name for _, name in test],
                files[:len(train)], white)


def sort_files(root):
    """Images below root, by their place in FOLDER_LAYOUT -> {name: Category}; or a clear error."""
    found, other = defaultdict(lambda: Category([], [], [], defaultdict(list))), []
    for path in list_images([root] if root.is_dir() else []):
        place = PLACE.fullmatch(path.relative_to(root).as_posix())
        category = found[place and place["category"] or root.resolve().name]
        if not place:
            other.append(path)
        elif place["defect"]:
            image = place["image"] or re.sub("(?i)[-_.](mask|gt|label)$", "", path.stem)
            category.masks[place["defect"].lower(), image].append(path)
        else:
            getattr(category, place.lastgroup).append(path)         # normals, good or bad
    if not any(category.normals for category in found.values()):    # a folder of images alone
        found[root.resolve().name].normals.extend(path for path in other if path.parent == root)
        other = [path for path in other if path.parent != root]
    report(other, "images passed over, for they lie elsewhere than in train/good, test/<name>")
    report([name for name, c in found.items() if not c.normals and (c.good or c.bad)],
           "categories without normal images to train on (train/good), left out")
    found = {name: category for name, category in found.items() if category.normals}
    for category in found.values():
        for files in (category.normals, category.good):
            folders = sorted({str(path.parent) for path in files})
            if len(folders) > 1:
                raise ValueError(f"{' and '.join(folders)}: which holds the normal ones? Keep one")
    if not found:
        there = ", ".join(path.name for path in sorted(root.glob("*"))[:8]) or "nothing"
        raise FileNotFoundError(f"no normal images, expected in {root} (--data-dir) as\n"
                                f"{FOLDER_LAYOUT}\nfound in {root}: {there}")
    return found


def list_images(paths):
    """Files and folders -> files: those named, and the images in the folders and below them."""
    found, other = [], []
    for path in map(Path, paths):
        names = glob.glob("**/*", root_dir=path, recursive=True) if path.is_dir() else [""]
        for file in sorted(path / name for name in names if not (path / name).is_dir()):
            (found if file == path or file.suffix.lower() in SUFFIXES else other).append(file)
    report(other, "files passed over (no images)")
    return found


@contextmanager
def opened(path):
    """A file as a Pillow image. Whatever Pillow objects to becomes a ValueError naming the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                yield image
    except Exception as error:                                      # of many kinds, by format
        raise ValueError(f"{path}: not a readable image ({error}); use PNG or JPEG") from None


def find_white(files):
    """The value that becomes 255 in images of 16 or 32 bits, one for all, so that they stay
    comparable: the first of 1 (or 5 % above), 2^8 - 1, 2^10 - 1, ... that none exceeds; or None."""
    largest = 0
    for path in files:
        with opened(path) as image:
            if image.mode[0] in "IF":
                largest = max(largest, float(np.max(image)))
    whites = [1, *(2.0 ** bits - 1 for bits in range(8, 130, 2)), math.inf]
    return next(white for white in whites if largest <= max(white, 1.05)) if largest else None


def to_rgb(image, white, background):
    """A Pillow image, upright, as RGB of 8 bits, its transparent pixels on the background."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":     # a phone's has a preview
        raise ValueError(f"{image.n_frames} pages; save each as a file of its own")
    if ";16" in str(image.tile) and image.mode[0] != "I" and np.max(image) < 16:
        raise ValueError("of 16 bits a color only the lowest 12 are used; save it with 8")
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode[0] in "IF":                                       # 16 or 32 bits, or floats
        values = np.asarray(image, np.float32)
        if not (values.min() >= 0 and values.max() < math.inf):
            raise ValueError("negative or infinite values")
        image = Image.fromarray((values / white * 255).clip(0, 255).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        canvas = Image.new("RGBA", image.size, background)
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    return image.convert("RGB")


def read_image(path, size, white=None):
    """Any image Pillow reads, see `to_rgb` -> (3, size, size) uint8; white: None: of this file."""
    white = white or find_white([path]) or 1
    with opened(path) as image:
        small = to_rgb(image, white, "white").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(small)).permute(2, 0, 1)


def read_masks(test, labels, masks, size):
    """-> (M, size, size) bool, or None where there are none; says what has or is no mask. True is a
    pixel covered at least half as much as any of its 8 neighbors, so that thin defects stay."""
    if not any(masks.values()):
        return None
    result, missing = torch.zeros(len(test), size, size, dtype=torch.bool), []
    for i, (path, name) in enumerate(test):
        files = masks[name].pop((path.parent.name.lower(), path.stem), [])
        if labels[i] and files:
            covered = read_mask(files, path).resize((size, size), Image.Resampling.BOX)
            most = ndimage.maximum_filter(covered, 3)
            result[i] = torch.from_numpy((most > 0) & (covered >= most / 2))
        if labels[i] and not result[i].any():
            missing.append(path)
    report(missing, "anomalous images without a mask, or an empty one: not in pixel metrics")
    unmatched = [files[0] for left in masks.values() for files in left.values()]
    report(unmatched, "masks match no image, ground_truth/<defect>/<name>_mask.png")
    return result


def read_mask(files, image_path):
    """The masks of an image, united, as a Pillow image: 1. where they have any color but black."""
    with opened(image_path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        marked = np.zeros((image.height, image.width), bool)
    for path in files:
        with opened(path) as mask:
            noise = 64 if mask.format == "JPEG" else 0
            colors = np.asarray(to_rgb(mask, 1, "black"))           # (H, W, 3)
        if colors.shape[:2] != marked.shape:
            raise ValueError(f"{path}: {colors.shape[:2]} rows, columns; its image {marked.shape}")
        marked |= colors.max(2) > noise
    return Image.fromarray(marked.astype(np.float32))


FOLDERS = {"mvtec": "mvtec", "folder": "."}                         # in --data-dir
DATASETS = {"digits": load_digits, "mnist": partial(load_torchvision, "MNIST"),
            "fashion_mnist": partial(load_torchvision, "FashionMNIST"),
            "cifar10": partial(load_torchvision, "CIFAR10"), **FOLDERS}

if __name__ == "__main__":
    print(f"--dataset {', '.join(DATASETS)}\n{FOLDER_LAYOUT}")
