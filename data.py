"""Data: any data set as a few tensors, normal images to train on and a labeled test set.

    data = load("mnist", "3")       # train on the 3s alone, test on all 10,000 digits
    data.train                      # (N, C, H, W) uint8, normal images only
    data.test, data.labels          # (M, C, H, W) uint8; (M,) 0 normal, 1 anomalous

Everything is held in memory, so there are no workers and no data loaders. For digits,
MNIST, FashionMNIST and CIFAR-10, `normal` lists the classes that count as normal, and all
other classes are anomalies. For MVTec AD it lists products, each with its own test set.

`to_inputs` prepares a data set for training. It sets some normal images aside, by which
evaluate.py finds a threshold, and it computes the CNN features where a model needs them.
Features are computed once and kept on disk.
"""
import contextlib
import hashlib
import math
import time
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import ndimage
from sklearn import datasets as sklearn_datasets


class Data(NamedTuple):
    """A data set. Normal is 0 and anomalous is 1.

    A category is what one threshold is for: a product, or all the normal classes of a
    labeled data set together.
    """
    train: torch.Tensor                 # (N, C, H, W) uint8, all normal
    train_classes: list                 # N names, among which `split` is even
    train_categories: list              # N names
    test: torch.Tensor                  # (M, C, H, W) uint8
    labels: torch.Tensor                # (M,) int64
    categories: list                    # M names
    masks: torch.Tensor = None          # (M, H, W) bool, True where defective, or None
    copies: torch.Tensor = None         # (K, C, H, W) uint8, made from some of `train`
    copy_of: torch.Tensor = None        # (K,), the number in `train` of each
    copy_in_bank: torch.Tensor = None   # (K,) bool: a memory bank holds it. The others
                                        # only widen what counts as normal


class Inputs(NamedTuple):
    """What a model is trained and judged on: images, or the features of images.

    Images are uint8 and features float16. `prepare` makes of either what a model sees.
    """
    train: torch.Tensor
    train_categories: list
    calibration: torch.Tensor           # normals set aside to find the threshold
    calibration_categories: list
    test: torch.Tensor
    prepare: Callable
    images: torch.Tensor = None         # of `train`, where that holds features
    copies: torch.Tensor = None         # as in Data
    copy_of: torch.Tensor = None
    copy_in_bank: torch.Tensor = None


def to_float(stored):
    """uint8 images become float32 in [0, 1]. Anything else becomes float32 as it is."""
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored.float()


# ---- data sets ----

def load(dataset, normal=None, data_dir="data", image_size=None, validate=False):
    """A data set by its name in DATASETS -> Data.

    normal: "3", "0,1,2" or class names; for MVTec AD "bottle,grid" or "all".
    image_size: the side in pixels. None keeps the images as they are, but MNIST's 28
        pixels are padded to 32. MVTec AD needs a size.
    validate: judge on the last sixth of the training split, not on the test images.
    Raises ValueError for a wrong `normal`, FileNotFoundError for missing files.
    """
    if dataset == "mvtec":
        if validate:
            raise ValueError("mvtec has no anomalies in its training split to judge by")
        return load_mvtec(normal, Path(data_dir, "mvtec"), image_size)
    train, test, classes = DATASETS[dataset](Path(data_dir))
    if validate:
        images, labels = train
        cut = len(images) * 5 // 6                          # MNIST: 50,000 and 10,000
        train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return one_class_against_the_rest(train, test, classes, normal, image_size)


def one_class_against_the_rest(train, test, classes, normal, image_size):
    """Two pairs of images (N, C, H, W) uint8 and labels (N,) -> Data.

    Raises ValueError where `normal` names no class, or all of them.
    """
    numbers = {str(number): number for number in range(len(classes))}
    numbers.update({name.lower(): number for number, name in enumerate(classes)})
    words = [word.strip().lower() for word in str(normal or classes[0]).split(",")]
    chosen = sorted({numbers.get(word, -1) for word in words})
    if chosen[0] < 0 or len(chosen) == len(classes):
        raise ValueError(f"normal {normal}: expected one or more of {', '.join(classes)}, and "
                         "at least one class left to be anomalous")
    (images, labels), (test_images, test_labels) = train, test
    kept = torch.isin(labels, torch.tensor(chosen))
    anomalous = ~torch.isin(test_labels, torch.tensor(chosen))
    category = ",".join(classes[number] for number in chosen)
    return Data(
        train=resize(images[kept], image_size),
        train_classes=[classes[label] for label in labels[kept]],
        train_categories=[category] * int(kept.sum()),
        test=resize(test_images, image_size),
        labels=anomalous.long(),
        categories=[category] * len(test_images))


def resize(images, size):
    """(N, C, H, W) uint8 -> (N, C, size, size) uint8. MNIST's 28 is padded to 32."""
    if images.shape[-1] == 28 and size in (None, 32):
        return F.pad(images, [2, 2, 2, 2])
    if size in (None, images.shape[-1]):
        return images
    resized = F.interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def load_digits(data_dir):
    """The 1,797 digits of 8 x 8 pixels in scikit-learn, scaled to 32. A third is for tests."""
    digits = sklearn_datasets.load_digits()
    images = torch.tensor(digits.images[:, None] * 255 / 16).byte()
    images, labels = resize(images, 32), torch.tensor(digits.target)
    test = torch.arange(len(images)) % 3 == 2
    return (images[~test], labels[~test]), (images[test], labels[test]), list("0123456789")


def load_mnist(data_dir):
    """MNIST, downloaded by torchvision when it is missing."""
    return load_torchvision("MNIST", data_dir)


def load_fashion_mnist(data_dir):
    """FashionMNIST, downloaded by torchvision when it is missing."""
    return load_torchvision("FashionMNIST", data_dir)


def load_cifar10(data_dir):
    """CIFAR-10, downloaded by torchvision when it is missing."""
    return load_torchvision("CIFAR10", data_dir)


def load_torchvision(name, data_dir):
    """A data set as torchvision reads it -> train, test, classes.

    Raises FileNotFoundError where it is missing and cannot be downloaded, and ValueError
    where a file of MNIST is damaged, which torchvision does not notice.
    """
    folder = data_dir if name == "CIFAR10" else data_dir / name / "raw"
    for path in sorted(folder.glob("*-ubyte")):
        check_mnist_file(path)
    dataset = getattr(torchvision.datasets, name)
    parts = []
    for train in (True, False):
        try:
            part = dataset(data_dir, train=train, download=True)
        except Exception as error:                          # no network, disk, checksum
            raise FileNotFoundError(
                f"{name} is not in {folder}, or is damaged, and cannot be downloaded "
                f"({error}). {WHERE_TO_GET[name]}") from None
        images = torch.as_tensor(np.asarray(part.data))
        if images.dim() == 3:                               # gray: (N, H, W)
            images = images[:, None]
        else:                                               # color: (N, H, W, C)
            images = images.permute(0, 3, 1, 2)
        parts.append((images, torch.as_tensor(part.targets)))
    classes = [name.split(" - ")[0] for name in part.classes]       # MNIST: "3 - three"
    return *parts, classes


def check_mnist_file(path):
    """Raise ValueError where a file's length is not what its own header says."""
    sizes = 4 if "images" in path.name else 2               # magic number, then the shape
    header = np.fromfile(path, ">i4", sizes).astype(np.int64)
    if not len(header) or path.stat().st_size != 4 * len(header) + header[1:].prod():
        raise ValueError(f"{path} is damaged: it has {path.stat().st_size:,} bytes, and its "
                         "header says otherwise. Delete it, and it is made anew")


WHERE_TO_GET = {
    "MNIST": "Put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
             "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz from "
             "https://ossci-datasets.s3.amazonaws.com/mnist/ there",
    "FashionMNIST": "Put its four .gz files from "
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/ there",
    "CIFAR10": "Put cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/ there"}


# ---- MVTec AD (Bergmann et al. 2019) ----

MVTEC_LAYOUT = """<product>/train/good/*.png
<product>/test/good/*.png, <product>/test/<defect>/*.png
<product>/ground_truth/<defect>/<name>_mask.png
Download: https://www.mvtec.com/company/research/datasets/mvtec-ad, by hand"""


def load_mvtec(normal, root, size):
    """MVTec AD in its own layout, see MVTEC_LAYOUT -> Data, images of size x size pixels.

    normal: products, "bottle,grid", or "all". Raises ValueError for an unknown product,
    FileNotFoundError where there is none.
    """
    products = sorted(folder.parents[1].name for folder in root.glob("*/train/good"))
    if not products:
        found = ", ".join(sorted(path.name for path in root.glob("*"))[:8]) or "nothing"
        raise FileNotFoundError(f"no training images in {root}, expected there\n{MVTEC_LAYOUT}\n"
                                f"found in {root}: {found}")
    names = [name.strip() for name in str(normal or "all").split(",")]
    names = products if names == ["all"] else list(dict.fromkeys(names))
    if not set(names) <= set(products):
        raise ValueError(f"normal {normal}: use all, or some of {', '.join(products)}")

    train, train_names, test, labels, test_names, masks = [], [], [], [], [], []
    for name in names:
        for path in images_in(root / name / "train/good"):
            train.append(read_image(path, size))
            train_names.append(name)
        defects = sorted(folder.name for folder in (root / name / "test").iterdir())
        for defect in ["good", *(defect for defect in defects if defect != "good")]:
            for path in images_in(root / name / "test" / defect):
                mask = root / name / "ground_truth" / defect / f"{path.stem}_mask.png"
                test.append(read_image(path, size))
                labels.append(int(defect != "good"))
                test_names.append(name)
                masks.append(read_mask(mask, size) if mask.exists() else blank(size))
    return Data(torch.stack(train), train_names, train_names, torch.stack(test),
                torch.tensor(labels), test_names, torch.stack(masks))


def images_in(folder):
    return sorted(path for path in folder.glob("*") if path.suffix in (".png", ".jpg"))


def read_image(path, size):
    """An image file -> (3, size, size) uint8."""
    with Image.open(path) as image:
        image = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_mask(path, size):
    """The file of a mask, black where there is no defect -> (size, size) bool."""
    with Image.open(path) as mask:
        return shrink_mask(np.array(mask.convert("L")) > 0, size)


def shrink_mask(mask, size):
    """A mask (H, W) bool, of any size -> (size, size) bool.

    A pixel is True if at least half as much of it is covered as of any of its eight
    neighbors. So a defect that is thinner than a pixel does not vanish.
    """
    covered = Image.fromarray(mask.astype(np.float32))
    covered = np.array(covered.resize((size, size), Image.Resampling.BOX))
    most = ndimage.maximum_filter(covered, 3)
    return torch.from_numpy((most > 0) & (covered >= most / 2))


def blank(size):
    return torch.zeros(size, size, dtype=torch.bool)


DATASETS = {"digits": load_digits, "mnist": load_mnist, "fashion_mnist": load_fashion_mnist,
            "cifar10": load_cifar10, "mvtec": load_mvtec}


# ---- what a model is trained and judged on ----

def to_inputs(data, seed, fpr=0.05, backbone=None, cache_dir=None):
    """Data -> Inputs: the images, or the features that a Backbone computes of them.

    seed, fpr: decide which normals are set aside, see `split`.
    cache_dir: features are kept there. None keeps them in memory only.
    A Backbone that standardizes takes its statistics from the normals trained on, unless
    it has some already.
    """
    train, calibration = split(data.train_classes, seed, fpr)
    stored, test, copies, prepare, images = data.train, data.test, data.copies, to_float, None
    if backbone is not None:
        images, prepare = data.train[train], backbone.standardize
        stored = cached_features(backbone, stored, data.train_categories, cache_dir)
        test = cached_features(backbone, test, data.categories, cache_dir)
        if copies is not None:
            names = [f"{data.train_categories[i]}, copies" for i in data.copy_of]
            copies = cached_features(backbone, copies, names, cache_dir)
        if not backbone.fitted:
            backbone.fit_statistics(stored[train])
    return Inputs(
        train=stored[train],
        train_categories=[data.train_categories[i] for i in train],
        calibration=stored[calibration],
        calibration_categories=[data.train_categories[i] for i in calibration],
        test=test, prepare=prepare, images=images, copies=copies, copy_of=data.copy_of,
        copy_in_bank=data.copy_in_bank)


def split(classes, seed, fpr=0.05):
    """Which of the normals to train on, and which to set aside for the threshold.

    classes: N names -> two tensors of indices, sorted. Of each class a tenth is set
    aside, or as many as `fpr` needs (19 for 0.05), but at most a third. The seed draws
    them. fpr=None sets none aside.
    """
    if fpr is None:
        return torch.arange(len(classes)), torch.arange(0)
    needed = math.ceil(round(1 / fpr, 9)) - 1
    generator = torch.Generator().manual_seed(seed)
    train, calibration = [], []
    for name in sorted(set(classes)):
        members = torch.tensor([i for i, other in enumerate(classes) if other == name])
        members = members[torch.randperm(len(members), generator=generator)]
        at_least = min(1, len(members) - 1)                 # of a single image, none
        count = max(len(members) // 10, min(needed, len(members) // 3), at_least)
        calibration.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(calibration).sort().values


def cached_features(backbone, images, names, folder):
    """Features of images (N, C, H, W) uint8, not standardized: (N, C', g, g) float16.

    names: the category of each. Each category has one file in `folder`, named by a hash
    of its images and of the backbone, so that features are computed once. Where the file
    cannot be written, a line says so. folder=None keeps none.
    """
    device = backbone.mean.device
    weights = fingerprint_of(backbone)
    shape = backbone.mean.shape[0], backbone.grid, backbone.grid
    features = torch.empty(len(images), *shape, dtype=torch.half)
    for name in sorted(set(names)):
        index = [i for i, other in enumerate(names) if other == name]
        members = images[index]
        digest = hashlib.sha256(weights + members.numpy().tobytes()).hexdigest()
        path = folder and Path(folder, f"{digest}.npz")
        try:
            features[index] = torch.from_numpy(np.load(path)["features"])
        except Exception:                                   # missing or damaged, or folder=None
            parts = []
            for batch in with_progress(members.split(4), f"features of {name}", len(members)):
                parts.append(backbone.extract(to_float(batch.to(device))).cpu())
            features[index] = torch.cat(parts)
            if folder:
                keep_features(path, features[index])
    return features


def fingerprint_of(backbone):
    """A hash of all that features depend on besides the images, as bytes."""
    digest = hashlib.sha256(f"{backbone.name} {backbone.size} {backbone.grid}".encode())
    digest.update(str(backbone.strides).encode())
    for tensor in backbone.network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()


def keep_features(path, features):
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, features=features.numpy())
    except OSError as error:
        with contextlib.suppress(OSError):
            path.unlink()                                   # a part of it, where the disk is full
        print(f"features are not kept for the next run: {error}")


def with_progress(items, what, total):
    """The items; every five seconds a line says how many of `total` are done, and the rest."""
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed > 5:
            printed = now
            left = (now - started) * (len(items) / done - 1)
            left = f"{left / 60:.0f} min" if left > 90 else f"{left:.0f} s"
            print(f"{what}: {total * done // len(items):,} of {total:,}, {left} left", flush=True)
        yield item


def main():
    print("Data sets, by the name that train.py --dataset takes:", ", ".join(DATASETS))
    print(f"\nMVTec AD is expected in data/mvtec as\n{MVTEC_LAYOUT}\n")
    data = load("digits", "3")
    print("digits, normal: 3")
    print("train", tuple(data.train.shape), data.train.dtype)
    print("test ", tuple(data.test.shape), f"{int(data.labels.sum())} of them anomalous")


if __name__ == "__main__":
    main()
