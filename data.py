"""Data: any data set as a few tensors, normal images to train on and a labeled test set.

    data = load("mnist", "3")       # train on the 3s alone, test on all 10,000 digits
    data.train                      # (N, C, H, W) uint8, normal images only
    data.test, data.labels          # (M, C, H, W) uint8; (M,) 0 normal, 1 anomalous

Everything is held in memory as uint8 tensors (all of MNIST: 72 MB), so a batch is one indexing
operation; no workers, no transforms, no pickling. Two kinds of data sets:
- labeled images (digits, mnist, fashion_mnist, cifar10): `normal` names the classes that are normal
- folders in MVTec AD's layout (mvtec, folder): `normal` names categories, each with its test set
Run this file to see which are found, and where they are looked for: python data.py
"""
import hashlib
import os
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits

Data = namedtuple("Data", "train train_classes test labels masks categories")
Data.__doc__ = """What `load` returns.
train: (N, C, H, W) uint8, all normal; train_classes: N names, the class or category of each
test: (M, C, H, W) uint8; labels: (M,) int64, 0 normal, 1 anomalous
masks: (M, H, W) bool, true where defective, or None. An anomalous image without any true pixel
    has no known mask, and is left out of pixel metrics.
categories: M names; metrics are computed for each category, then averaged
"""
Inputs = namedtuple("Inputs", "train held test prepare images")
Inputs.__doc__ = """What models are fed: stored tensors to train on, held for the threshold, and to
test; prepare: stored -> what the model sees; images: those of `train`, where it sees features."""
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
LAYOUT = """{root}/<category>/train/good/*.png
{root}/<category>/test/good/*.png, {root}/<category>/test/<defect>/*.png
{root}/<category>/ground_truth/<defect>/<name>_mask.png  (masks, optional)"""


def to_float(x):
    """Stored -> what a model sees: uint8 images to float32 in [0, 1], anything else to float32."""
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()


def load(dataset, normal=None, data_dir="data", image_size=None, validate=False):
    """A data set as `Data`. normal: "3", "0,1,2", class names, or for folders categories or "all".

    image_size: side in pixels, images are resized to it; None keeps the native size (MNIST's 28 is
    padded to 32), folders need a number. validate: of labeled images, the last sixth of the
    training split is the test set, for choosing options without the real one. Raises ValueError
    (unknown name, class or category; damaged image; mask that does not fit; more than memory) and
    FileNotFoundError (saying what was expected where).
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: use one of {', '.join(DATASETS)}")
    if DATASETS[dataset] in (load_mvtec, load_folder):
        if validate:
            raise ValueError(f"--validate: {dataset} has no anomalies in its training split")
        return DATASETS[dataset](normal, Path(data_dir), image_size)
    (images, labels), test, classes = DATASETS[dataset](Path(data_dir))
    if validate:
        cut = len(images) * 5 // 6                                  # MNIST: 50,000 and 10,000
        images, labels, test = images[:cut], labels[:cut], (images[cut:], labels[cut:])
    return labeled((images, labels), test, classes, normal, image_size)


def split(classes, seed, share=0.1):
    """Indices of the normals to train on, and of those set aside for the threshold: 10 % of each
    class (at least one, where it has two), drawn by the seed alone."""
    generator, classes = torch.Generator().manual_seed(seed), np.array(classes)
    train, held = [], []
    for name in sorted(set(classes.tolist())):
        mine = torch.from_numpy(np.flatnonzero(classes == name))
        mine = mine[torch.randperm(len(mine), generator=generator)]
        count = max(int(share * len(mine)), min(1, len(mine) - 1))
        held.append(mine[:count])
        train.append(mine[count:])
    return torch.cat(train).sort().values, torch.cat(held).sort().values


def to_inputs(data, seed, backbone=None, cache_dir=None, mean_std=None):
    """Data -> Inputs: images, or a Backbone's features (computed each time if cache_dir is None).

    The features are standardized by mean_std (a state dict), or else by their own mean and std on
    the training part; mean_std = {} leaves them as they are.
    """
    train, held = split(data.train_classes, seed)
    if backbone is None:
        return Inputs(data.train[train], data.train[held], data.test, to_float, None)
    stored, test, prepare = data.train, data.test, lambda x: backbone(to_float(x))
    if cache_dir is not None:
        stored = cached_features(backbone, data.train, data.train_classes, cache_dir)
        test = cached_features(backbone, data.test, data.categories, cache_dir)
        prepare = backbone.standardize
    if mean_std is None:
        raw = backbone.raw if cache_dir is None else torch.Tensor.half      # cached ones are raw
        parts = (to_float(x.to(backbone.mean.device)) for x in stored[train].split(32))
        backbone.fit(torch.cat([raw(x).cpu() for x in parts]))
    else:
        backbone.load_state_dict(mean_std, strict=False)
    return Inputs(stored[train], stored[held], test, prepare, data.train[train])


# ---- labeled images: one class, or several, is normal ----

def labeled(train, test, classes, normal, image_size):
    """Data from two (images, labels) pairs, images (N, C, H, W) uint8, by the normal classes."""
    names = [name.lower() for name in classes]
    wanted = [str(part).strip().lower() for part in str(normal or classes[0]).split(",")]
    chosen = [names.index(w) if w in names else int(w) if w.isdigit() else -1 for w in wanted]
    if not all(0 <= c < len(classes) for c in chosen) or len(set(chosen)) == len(classes):
        raise ValueError(f"--normal {normal}: expected one or more of {', '.join(classes)}, "
                         "separated by commas, and at least one class left to be anomalous")
    keep = torch.isin(train[1], torch.tensor(chosen))
    images, labels = resize(train[0][keep], image_size), train[1][keep]
    task = ",".join(classes[c] for c in sorted(set(chosen)))
    return Data(images, [classes[i] for i in labels.tolist()], resize(test[0], image_size),
                (~torch.isin(test[1], torch.tensor(chosen))).long(), None, [task] * len(test[1]))


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
    bundle = sklearn_digits()
    images = resize(torch.tensor(bundle.images[:, None] * 255 / 16).byte(), 32)
    labels, test = torch.tensor(bundle.target), torch.arange(1797) % 3 == 2
    return (images[~test], labels[~test]), (images[test], labels[test]), list("0123456789")


def load_torchvision(kind):
    """A loader of a torchvision data set: read from data_dir, downloaded when missing."""
    def loader(data_dir):
        splits = []
        for train in (True, False):
            try:
                split = kind(data_dir, train=train)
            except RuntimeError:                                    # not there: torchvision's way
                split = download(kind, data_dir, train)
            images = torch.as_tensor(np.asarray(split.data))
            images = images[:, None] if images.dim() == 3 else images.permute(0, 3, 1, 2)
            splits.append((images, torch.as_tensor(split.targets)))
        return *splits, [name.split(" - ")[0] for name in split.classes]    # MNIST: "3 - three"
    return loader


def download(kind, data_dir, train):
    try:
        return kind(data_dir, train=train, download=True)
    except Exception as error:                                      # no network, disk, checksum
        where = data_dir / (getattr(kind, "base_folder", "") or f"{kind.__name__}/raw")
        files = [name for name, _ in getattr(kind, "resources", [])] or [kind.filename]
        urls = getattr(kind, "mirrors", [getattr(kind, "url", "")])
        raise FileNotFoundError(
            f"{kind.__name__} is not in {where} and could not be downloaded ({error}). Get "
            f"{', '.join(files)} from {urls[-1]} on another machine and unpack in {where}, "
            "or say where it is with --data-dir") from None


# ---- features: computed once ----

def cached_features(backbone, images, owners, folder):
    """A Backbone's raw features of images (N, C, H, W) uint8: float16 (N, C', g, g), computed once.

    owners: N names; each category is one file in `folder`, named by a hash of its images and of the
    backbone's weights and size. A file that is damaged or of something else is never used.
    """
    zero = torch.zeros(1, 3, backbone.size, backbone.size, device=backbone.mean.device)
    out = torch.empty(len(images), *backbone.raw(zero).shape[1:], dtype=torch.half)
    weights, owners = hashlib.sha256(f"{backbone.name} {backbone.size}".encode()), np.array(owners)
    for tensor in backbone.stages.state_dict().values():
        weights.update(tensor.cpu().numpy().tobytes())
    for name in sorted(set(owners.tolist())):
        index, digest = torch.from_numpy(np.flatnonzero(owners == name)), weights.copy()
        digest.update(f"{list(images[index].shape)}".encode() + images[index].numpy().tobytes())
        path = Path(folder) / f"{digest.hexdigest()}.pt"
        out[index] = read_or_compute(backbone, images[index], path)
    return out


def read_or_compute(backbone, images, path):
    def checksum(features):
        return hashlib.sha256(features.numpy().tobytes()).hexdigest()
    try:
        stored = torch.load(path, weights_only=True)
        if stored["key"] == path.stem and stored["checksum"] == checksum(stored["features"]):
            return stored["features"]
    except Exception:                                               # missing or damaged: compute it
        pass
    features = torch.cat([backbone.raw(to_float(x.to(backbone.mean.device))).cpu()
                          for x in images.split(32)])
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}")                      # two runs may write one file
    torch.save({"key": path.stem, "checksum": checksum(features), "features": features}, part)
    os.replace(part, path)
    return features


# ---- folders in MVTec AD's layout ----

def load_mvtec(normal, data_dir, image_size):
    """MVTec AD (Bergmann et al. 2019), data_dir/mvtec/<category>/...; never downloaded."""
    root = data_dir / "mvtec"
    if not find_categories(root):
        page = "https://www.mvtec.com/company/research/datasets/mvtec-ad"
        raise layout_error(root, f"MVTec AD is downloaded by hand, from {page}, and unpacked as")
    return load_folder(normal, root, image_size)


def find_categories(root):
    """{name: folder}, each folder with train/good; root itself may be the only category."""
    if (root / "train" / "good").is_dir():
        return {root.resolve().name: root}
    return {path.name: path for path in subfolders(root) if (path / "train" / "good").is_dir()}


def layout_error(root, why):
    found = ", ".join(path.name for path in sorted(root.glob("*"))[:8]) or "nothing"
    return FileNotFoundError(f"{why}\n{LAYOUT.format(root=root)}\nfound in {root}: {found}")


def load_folder(normal, root, image_size):
    """A user's own images in MVTec AD's layout; masks, and the whole of test/, are optional."""
    categories = find_categories(root)
    if not categories:
        raise layout_error(root, f"expected in {root} (--data-dir)")
    wanted = list(categories) if normal in (None, "all") else [n.strip() for n in normal.split(",")]
    if not set(wanted) <= set(categories):
        raise ValueError(f"--normal {normal}: {root} holds the categories {', '.join(categories)}; "
                         "name one or more, separated by commas, or all")
    wanted = list(dict.fromkeys(wanted))
    train = [(path, name) for name in wanted
             for path in image_files(categories[name] / "train/good")]
    test = [(path, name) for name in wanted for defect in subfolders(categories[name] / "test")
            for path in image_files(defect)]
    for name in set(wanted) - {owner for _, owner in train}:
        raise ValueError(f"{categories[name] / 'train/good'}: no image in it (of the kinds "
                         f"{' '.join(sorted(IMAGE_SUFFIXES))}); put normal images there")
    check_memory((len(train) + len(test)) * 3 * image_size ** 2)
    masks, missing = read_masks(test, categories, image_size)
    if missing and masks is not None:
        print(f"no mask for {len(missing)} anomalous images, left out of pixel metrics: "
              f"{', '.join(map(str, missing[:3]))}{' ...' * (len(missing) > 3)}")
    return Data(read_images(train, image_size), [name for _, name in train],
                read_images(test, image_size),
                torch.tensor([int(path.parent.name != "good") for path, _ in test]).long(),
                masks, [name for _, name in test])


def subfolders(folder):
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def image_files(folder):
    """The images directly in a folder, by name; other files are passed over."""
    return sorted(p for p in folder.iterdir()
                  if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))


def check_memory(needed):
    """Raise ValueError, before anything is read, where the machine has less than `needed` bytes."""
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        if needed > free:
            raise ValueError(f"these images need {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} "
                             "GB are there: lower --image-size, or name fewer categories")


def read_image(path, size):
    """Any image Pillow reads, grey, palette, RGBA, CMYK or 16 bit -> (3, size, size) uint8.

    Raises ValueError naming a damaged, truncated or suspiciously large file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                if image.mode == "F":
                    raise ValueError("its pixels are floating-point numbers of unknown range")
                if image.mode.startswith("I"):      # 16 bit; Pillow's own conversion clips to white
                    wide = np.asarray(image).astype(np.int64).clip(0, 65535)
                    image = Image.fromarray((wide // 257).astype(np.uint8))
                image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except (OSError, SyntaxError, ValueError, Warning, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable image ({error}); replace or remove it") from None
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_images(items, size):
    images = [read_image(path, size) for path, _ in items]
    return torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)


def read_masks(test, categories, size):
    """-> (M, size, size) bool, or None where no image has a mask; and the anomalies without one."""
    masks, missing, found = torch.zeros(len(test), size, size, dtype=torch.bool), [], False
    for i, (path, name) in enumerate(test):
        if path.parent.name == "good":
            continue
        folder = categories[name] / "ground_truth" / path.parent.name
        paths = [folder / f"{path.stem}{ending}{suffix}" for ending in ("_mask", "")
                 for suffix in (path.suffix, *sorted(IMAGE_SUFFIXES))]
        mask_path = next((p for p in paths if p.is_file()), None)
        if mask_path is None:
            missing.append(path)
            continue
        masks[i], found = read_mask(mask_path, path, size), True
    return (masks if found else None), missing


def read_mask(mask_path, image_path, size):
    try:
        with Image.open(mask_path) as mask, Image.open(image_path) as image:
            if mask.size != image.size:
                raise ValueError(f"{mask_path} has {mask.width}x{mask.height} pixels, its image "
                                 f"{image_path} {image.width}x{image.height}: they must be equal")
            mask = np.asarray(mask.convert("L").resize((size, size), Image.Resampling.NEAREST))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{mask_path}: not a readable mask ({error}); replace it") from None
    return torch.from_numpy(mask > mask.max() / 2)      # defects may be marked by 1 as well as 255


TORCHVISION = {"mnist": torchvision.datasets.MNIST, "cifar10": torchvision.datasets.CIFAR10,
               "fashion_mnist": torchvision.datasets.FashionMNIST}
DATASETS = {"digits": load_digits, "mvtec": load_mvtec, "folder": load_folder,
            **{name: load_torchvision(kind) for name, kind in TORCHVISION.items()}}


def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Show which data sets are found, and where.")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="default: data")
    data_dir = parser.parse_args(argv).data_dir
    print("digits          found, with scikit-learn")
    for name, kind in TORCHVISION.items():
        where = data_dir / getattr(kind, "base_folder", f"{kind.__name__}/raw")
        try:
            counts = [len(kind(data_dir, train=train)) for train in (True, False)]
            print(f"{name:<15} found in {where}: {counts[0]:,} training, {counts[1]:,} test images")
        except RuntimeError:
            print(f"{name:<15} not in {where}: downloaded at first use")
    for name, root in (("mvtec", data_dir / "mvtec"), ("folder", data_dir)):
        found = [f"{category} ({len(image_files(path / 'train/good'))} training images)"
                 for category, path in find_categories(root).items()]
        print(f"{name:<15} {'found' if found else 'not'} in {root}: {', '.join(found) or '-'}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
