"""Data: a data set as a few tensors, normals to train on and labeled test images.

    data = load("mnist", "3")       # train on the 3s alone, test on all 10,000 digits
    data.train                      # (N, C, H, W) uint8, normal images only
    data.test, data.labels          # (M, C, H, W) uint8; (M,) 0 normal, 1 anomalous

Everything is held in memory, so there are no workers and no data loaders. For digits,
MNIST, FashionMNIST and CIFAR-10, `normal` lists the classes that count as normal, and
all other classes are anomalies. For MVTec AD it lists products, each of which has its
own test images.

`to_inputs` prepares a data set for training. It sets some normal images aside, by which
evaluate.py finds a threshold. Where a model needs CNN features, it computes them once
and keeps them on disk. A first reading ends at `split`, and may skip how files are read
(`load_torchvision`, MVTec AD).
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

    A category is a product, or all the normal classes of a labeled data set together.
    Each has one threshold.
    """
    train: torch.Tensor                 # (N, C, H, W) uint8, all normal
    train_classes: list                 # N names, such as "3" or "bottle"
    train_categories: list              # N names: "bottle", or "0,1,2" for all together
    test: torch.Tensor                  # (M, C, H, W) uint8
    labels: torch.Tensor                # (M,) int64
    categories: list                    # M names: by whose threshold each is judged
    masks: torch.Tensor = None          # (M, H, W) bool, True where defective, or None
    # For photos/ alone. Nearest tokens compare no image with another of the same part.
    parts: torch.Tensor = None          # (N,), near-copies in `train` share a number
    # Images of `train`, moved or turned, see photos/copies.py.
    copies: torch.Tensor = None         # (K, C, H, W) uint8
    copy_of: torch.Tensor = None        # (K,), the number in `train` of each
    copy_in_bank: torch.Tensor = None   # (K,) bool: learned, and not only judged


class Inputs(NamedTuple):
    """What a model is trained and judged on: images, or the features of images.

    Images are uint8 and features float16. `prepare` turns them into what a model sees.
    """
    train: torch.Tensor
    train_categories: list
    calibration: torch.Tensor           # normals set aside to find the threshold
    calibration_categories: list
    test: torch.Tensor
    prepare: Callable
    images: torch.Tensor = None         # the pixels of `train`, where that has features
    parts: torch.Tensor = None          # as in Data, and so are the next three
    copies: torch.Tensor = None
    copy_of: torch.Tensor = None        # no image is set aside where there are copies
    copy_in_bank: torch.Tensor = None


def to_float(stored):
    """uint8 images become float32 in [0, 1]. Anything else becomes float32 as it is."""
    return stored.float() / 255 if stored.dtype == torch.uint8 else stored.float()


# ---- data sets ----

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
DATASETS = ("digits", *TORCHVISION, "mvtec")


def load(dataset, normal=None, data_dir="data", image_size=None, validate=False):
    """A data set by its name in DATASETS -> Data.

    normal: which classes are normal, "3", "0,1,2" or names. For MVTec AD: which
        products to learn, "bottle,grid" or "all". None: the first class, all products.
    image_size: the side in pixels. None keeps the images as they are, but those of 28
        pixels are padded to 32. MVTec AD needs a size.
    validate: test on the last sixth of the training split, to choose settings without
        looking at the test images. The other five sixths are trained on.
    Raises ValueError for a wrong argument, FileNotFoundError for missing files.
    """
    if dataset not in DATASETS:
        raise ValueError(f"unknown data set {dataset!r}: use one of "
                         f"{', '.join(DATASETS)}")
    if dataset == "mvtec":
        if validate:
            raise ValueError("mvtec has no anomalies in its training split to judge by")
        if image_size is None:
            raise ValueError("mvtec needs an image_size: its products have several")
        return load_mvtec(normal, Path(data_dir, "mvtec"), image_size)
    if dataset == "digits":
        train, test, classes = load_digits()
    else:
        train, test, classes = load_torchvision(TORCHVISION[dataset], Path(data_dir))
    if validate:
        images, labels = train
        cut = len(images) * 5 // 6                          # MNIST: 50,000 and 10,000
        train, test = (images[:cut], labels[:cut]), (images[cut:], labels[cut:])
    return one_class_against_the_rest(train, test, classes, normal, image_size)


def one_class_against_the_rest(train, test, classes, normal, image_size):
    """Two pairs of images (N, C, H, W) uint8 and labels (N,) -> Data.

    Raises ValueError where `normal` names no class, or all of them.
    """
    # A class is given by its number or by its name.
    numbers = {str(number): number for number in range(len(classes))}
    for number, name in enumerate(classes):
        numbers[name.lower()] = number
    words = [word.strip().lower() for word in str(normal or classes[0]).split(",")]
    unknown = [word for word in words if word not in numbers]
    chosen = sorted({numbers[word] for word in words if word in numbers})
    if unknown or len(chosen) == len(classes):
        raise ValueError(f"normal {normal}: expected one or more of "
                         f"{', '.join(classes)}, and at least one class left to be "
                         "anomalous")

    # Train on the normal classes alone, and test on all.
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
    """(N, C, H, W) uint8 -> (N, C, size, size) uint8.

    28 pixels, as MNIST has, are padded to 32, which can be halved four times.
    """
    if images.shape[-1] == 28 and size in (None, 32):
        return F.pad(images, [2, 2, 2, 2])
    if size in (None, images.shape[-1]):
        return images
    images = images.float()
    resized = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
    return resized.round().clamp(0, 255).byte()


def load_digits():
    """The 1,797 digits that scikit-learn has, of 8 x 8 pixels, scaled to 32 x 32.

    Every third one is a test image.
    """
    digits = sklearn_datasets.load_digits()
    images = digits.images[:, None] * 255 / 16              # values were 0 to 16
    images = resize(torch.tensor(images).byte(), 32)        # (1797, 1, 32, 32)
    labels = torch.tensor(digits.target)
    is_test = torch.arange(len(images)) % 3 == 2
    train = images[~is_test], labels[~is_test]
    test = images[is_test], labels[is_test]
    return train, test, list("0123456789")


def load_torchvision(name, data_dir):
    """A data set as torchvision reads it -> train, test, classes.

    train, test: pairs of images (N, C, H, W) uint8 and labels (N,). torchvision
    downloads what is missing. Raises FileNotFoundError where it cannot, and where a
    file is damaged.
    """
    folder = data_dir if name == "CIFAR10" else data_dir / name / "raw"
    dataset = getattr(torchvision.datasets, name)
    parts = []
    for train in (True, False):
        try:
            part = dataset(data_dir, train=train, download=True)
        except Exception as error:
            # There may be no connection, no space, or half a file.
            raise FileNotFoundError(
                f"{name} is not in {folder} and cannot be downloaded, or a file there "
                f"is damaged: {error}. Delete what is there of it. "
                f"{WHERE_TO_GET[name]}") from None
        images = torch.as_tensor(np.asarray(part.data))
        if images.dim() == 3:                               # gray: (N, H, W)
            images = images[:, None]
        else:                                               # color: (N, H, W, C)
            images = images.permute(0, 3, 1, 2)
        parts.append((images, torch.as_tensor(part.targets)))
    # MNIST calls its classes "3 - three".
    classes = [words.split(" - ")[0] for words in part.classes]
    return *parts, classes


WHERE_TO_GET = {
    "MNIST": "Put train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, "
             "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz from "
             "https://ossci-datasets.s3.amazonaws.com/mnist/ there",
    "FashionMNIST": "Put its four .gz files from "
                    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/ there",
    "CIFAR10": "Put cifar-10-python.tar.gz from "
               "https://www.cs.toronto.edu/~kriz/ there"}


# ---- MVTec AD (Bergmann et al. 2019) ----

MVTEC_LAYOUT = """<product>/train/good/*.png
<product>/test/good/*.png, <product>/test/<defect>/*.png
<product>/ground_truth/<defect>/<name>_mask.png
Download: https://www.mvtec.com/company/research/datasets/mvtec-ad, by hand"""


def load_mvtec(normal, root, size):
    """MVTec AD in its own layout, see MVTEC_LAYOUT -> Data of size x size pixels.

    normal: products, "bottle,grid", or "all". Raises ValueError for an unknown product,
    FileNotFoundError where there is none.
    """
    train, train_names = [], []
    test, labels, test_names, masks = [], [], [], []
    for name in products_in(root, normal):
        # Training images are all normal.
        for path in images_in(root / name / "train/good"):
            train.append(read_image(path, size))
            train_names.append(name)

        # Test images: the normal ones first, then each kind of defect with its masks.
        kinds = sorted(folder.name for folder in (root / name / "test").iterdir())
        kinds.sort(key=lambda kind: kind != "good")
        for kind in kinds:
            for path in images_in(root / name / "test" / kind):
                test.append(read_image(path, size))
                labels.append(int(kind != "good"))
                test_names.append(name)
                mask = root / name / "ground_truth" / kind / f"{path.stem}_mask.png"
                # A defect without a mask does not count for the pixels' metrics.
                if mask.exists():
                    masks.append(read_mask(mask, size))
                else:
                    masks.append(torch.zeros(size, size, dtype=torch.bool))

    return Data(
        train=torch.stack(train),
        train_classes=train_names,
        train_categories=train_names,
        test=torch.stack(test),
        labels=torch.tensor(labels),
        categories=test_names,
        masks=torch.stack(masks))


def products_in(root, normal):
    """The names of the products in folder `root` that `normal` lists."""
    products = sorted(folder.parents[1].name for folder in root.glob("*/train/good"))
    if not products:
        found = sorted(path.name for path in root.glob("*"))[:8]
        raise FileNotFoundError(
            f"no training images in {root}, expected there\n{MVTEC_LAYOUT}\n"
            f"found in {root}: {', '.join(found) or 'nothing'}")
    names = [name.strip() for name in str(normal or "all").split(",")]
    if names == ["all"]:
        return products
    if not set(names) <= set(products):
        raise ValueError(f"normal {normal}: use all, or some of {', '.join(products)}")
    return list(dict.fromkeys(names))                       # each once, in this order


def images_in(folder):
    """The paths of the images in a folder, sorted."""
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

    The defect covers a share of each new pixel. A pixel is True where its share is at
    least half of the largest one among itself and its eight neighbors. So a defect that
    is thinner than a pixel does not vanish.
    """
    mask = Image.fromarray(mask.astype(np.float32))
    share = np.array(mask.resize((size, size), Image.Resampling.BOX))
    largest = ndimage.maximum_filter(share, 3)
    return torch.from_numpy((largest > 0) & (share >= largest / 2))


# ---- what a model is trained and judged on ----

def to_inputs(data, seed, fpr=0.05, backbone=None, cache_dir=None):
    """Data -> Inputs: the images, or the features that a Backbone computes of them.

    seed, fpr: decide which normals are set aside, see `split`.
    cache_dir: features are kept there. None keeps them in memory only.
    A Backbone that standardizes takes its statistics from the normals that are trained
    on, unless it has some already.
    """
    train, calibration = split(data.train_classes, seed, fpr)
    if len(calibration) and (data.copies is not None or data.parts is not None):
        raise ValueError("copies and parts count all images, so none may be set aside: "
                         "use fpr=None")

    # Without a Backbone, a model sees the images themselves.
    normals, test, copies = data.train, data.test, data.copies
    prepare, images = to_float, None

    # With one, it sees the features of all images, standardized.
    if backbone is not None:
        prepare, images = backbone.standardize, data.train[train]
        normals = cached_features(backbone, normals, data.train_categories, cache_dir)
        test = cached_features(backbone, test, data.categories, cache_dir)
        if copies is not None:
            names = [f"{data.train_categories[i]}, copies" for i in data.copy_of]
            copies = cached_features(backbone, copies, names, cache_dir)
        if not backbone.fitted:
            backbone.fit_statistics(normals[train])

    return Inputs(
        train=normals[train],
        train_categories=[data.train_categories[i] for i in train],
        calibration=normals[calibration],
        calibration_categories=[data.train_categories[i] for i in calibration],
        test=test, prepare=prepare, images=images, parts=data.parts, copies=copies,
        copy_of=data.copy_of, copy_in_bank=data.copy_in_bank)


def split(classes, seed, fpr=0.05):
    """Which of the normals to train on, and which to set aside for the threshold.

    classes: N names -> two tensors of indices, sorted. The seed draws them.
    fpr: the share of false alarms (the false positive rate) that the threshold shall
        allow. Each class sets aside as many images as it needs for that, but at most a
        third of its own and at least a tenth. A class of two or more sets aside at
        least one. None sets no image aside.
    """
    if fpr is None:
        return torch.arange(len(classes)), torch.arange(0)

    generator = torch.Generator().manual_seed(seed)
    train, calibration = [], []
    for name in sorted(set(classes)):
        # The images of this class, in random order.
        members = torch.tensor([i for i, other in enumerate(classes) if other == name])
        members = members[torch.randperm(len(members), generator=generator)]

        # A class with a single image keeps it for training.
        tenth, third = len(members) // 10, len(members) // 3
        at_least = min(1, len(members) - 1)
        count = max(tenth, min(images_needed(fpr), third), at_least)
        calibration.append(members[:count])
        train.append(members[count:])
    return torch.cat(train).sort().values, torch.cat(calibration).sort().values


def images_needed(fpr):
    """How many normal images can promise a share fpr of false alarms: 19 for 0.05.

    A new normal scores above all of k others with a probability of 1 / (k + 1). For a
    threshold that only a share fpr of the normals exceeds, it takes k = 1 / fpr - 1.
    """
    return math.ceil(round(1 / fpr, 9)) - 1         # 1 / (1/49) is 49.00000000000001


def cached_features(backbone, images, names, folder):
    """Features of images (N, C, H, W) uint8, not standardized: (N, C', g, g) float16.

    names: the category of each, to print how far it has come. Each image has a file in
    `folder`, named by a hash of the image and of the backbone. So features are computed
    once, and only new images take time. Where a file cannot be written, a line says so.
    folder=None keeps none.
    """
    fingerprint = hash_of_backbone(backbone)
    shape = len(backbone.mean), backbone.grid, backbone.grid
    features = torch.empty(len(images), *shape, dtype=torch.half)
    paths = {}                                              # {number: its file}
    missing = {}                                            # {category: numbers}
    for i, image in enumerate(images):
        # Read the features if they are on disk already.
        kept = None
        if folder:
            content = fingerprint + image.numpy().tobytes()
            paths[i] = Path(folder, f"{hashlib.sha256(content).hexdigest()}.npz")
            kept = read_features(paths[i], shape)
        if kept is None:
            missing.setdefault(names[i], []).append(i)
        else:
            features[i] = kept

    # Compute them if they are not, and keep them.
    for name, numbers in sorted(missing.items()):
        features[numbers] = compute_features(backbone, images[numbers], name)
        if folder:
            keep_features([paths[i] for i in numbers], features[numbers])
    return features


def read_features(path, shape):
    """The features in a file, or None where it is missing or damaged."""
    try:
        with np.load(path) as saved:
            features = torch.from_numpy(saved["features"])
    except Exception:
        return None
    return features if features.shape == shape else None


def compute_features(backbone, images, name):
    """Features of images (N, C, H, W) uint8, four at a time: (N, C', g, g) float16."""
    device = backbone.mean.device
    batches = images.split(4)
    features = []
    for batch in with_progress(batches, f"features of {name}", len(images)):
        batch = to_float(batch.to(device))
        features.append(backbone.extract(batch).cpu())
    return torch.cat(features)


def hash_of_backbone(backbone):
    """A hash of its settings and weights, as bytes."""
    settings = f"{backbone.name} {backbone.size} {backbone.grid}{backbone.strides}"
    digest = hashlib.sha256(settings.encode())
    for tensor in backbone.network.state_dict().values():
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.digest()


def keep_features(paths, features):
    """Write each image's features to its file. Where that fails, a line says so."""
    for path, of_image in zip(paths, features):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, features=of_image.numpy())
        except OSError as error:
            # A full disk may have left a part of the file.
            with contextlib.suppress(OSError):
                path.unlink()
            print(f"features are not kept for the next run: {error}")
            return


def with_progress(items, what, total):
    """Yield the items (batches, say). Every five seconds, print how far it has come.

    total: how many there are in all batches together, for the printed line.
    """
    started = printed = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - printed > 5:
            printed = now
            seconds = (now - started) * (len(items) / done - 1)
            left = f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
            count = total * done // len(items)
            print(f"{what}: {count:,} of {total:,}, {left} left", flush=True)
        yield item


def main():
    print("Data sets, by the name that train.py --dataset takes:", ", ".join(DATASETS))
    print(f"\nMVTec AD is expected in data/mvtec as\n{MVTEC_LAYOUT}\n")
    data = load("digits", "3")
    print("digits, normal: 3")
    print("train", tuple(data.train.shape), data.train.dtype)
    anomalous = int(data.labels.sum())
    print("test ", tuple(data.test.shape), f"{anomalous} of them anomalous")


if __name__ == "__main__":
    main()
