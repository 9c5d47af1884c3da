"""Experiments: the runs behind each table of results/README.md, by name.

Each function yields its runs, each a dict of options of train.py. All that a number depends on are
named here, so that other defaults in train.py change no experiment; `eval_every` says which epochs
are judged on the way, and changes none. Made by `python results/sweep.py`.
"""
import contextlib
import os
import random
from pathlib import Path

# ---- which runs ----

PLAIN = dict(lamp=False)
LAMP = dict(lamp=True, over="image", eps=0.03, detach=True)
BATCH_MOVING = dict(lamp=True, over="batch", eps=0.1, detach=False)     # the maximum moves
BATCH_HELD = dict(lamp=True, over="batch", eps=0.5, detach=True)
AUTOENCODER = dict(
    validate=False, model="ae", kernel_size=3, patches=1, loss="l2", optimizer="adam",
    schedule="cosine", weight_decay=0.0, clip=0.0, score="sum", seed=0, eval_every=0)
MNIST = dict(AUTOENCODER, dataset="mnist", image_size=32, depth=4, latent=128, batch_size=32,
             lr=1e-3, epochs=8)
HIGH_RATE = dict(MNIST, lr=3e-3)                            # where LAMP gains less, see reading()
MVTEC = dict(AUTOENCODER, dataset="mvtec", image_size=64, depth=5, latent=16, batch_size=8,
             lr=1e-3, score="standardized")
CATEGORIES = ("bottle", "capsule", "grid", "pill", "transistor")
FEATURES = dict(
    dataset="mvtec", normal=",".join(CATEGORIES), validate=False, image_size=224,
    backbone="efficientnet_lite2", backbone_weights="imagenet", standardize=True, seed=0)
RECIPE = dict(
    FEATURES, loss="l2", lamp=False, optimizer="muon", lr=0.01, schedule="warmup-cosine",
    weight_decay=1e-4, clip=0.0, batch_size=64, epochs=48, amp=True, dropout=0.0,
    score="standardized", eval_every=0)
UNIAD = dict(RECIPE, model="uniad", depth=4, neighbors=7, jitter=5.0, query="layerwise")
NO_QUERY = dict(UNIAD, query="none")
TRANSFORMER = dict(UNIAD, model="transformer", neighbors=0, jitter=0.0, query="first")
MLP = dict(RECIPE, model="mlp", depth=5, width=1520)
CNN = dict(RECIPE, model="cnn", depth=6, width=128)
ON_THREE = dict(normal="bottle,capsule,transistor", batch_size=8, epochs=10)     # they lie still
BEFORE = dict(optimizer="adamw", lr=4e-4, schedule="step", clip=0.1, jitter=20.0, dropout=0.1)
DIGITS = "0123456789"
RATES = (                                           # batch size, learning rate, epochs, seeds
    (1024, 6e-3, 240, 1), (128, 2e-3, 32, 1), (32, 1e-3, 8, 3), (16, 7e-4, 8, 1), (4, 4e-4, 4, 1),
    (1, 2e-4, 2, 1))


def reading():
    """what Eq. 2 leaves open: 24 readings on four digits, five on all, on training images"""
    readings = [PLAIN]
    for over in ("batch", "image"):
        for detach in (False, True):
            for eps in (0.3, 0.1, 0.05, 0.03, 0.02, 0.01):
                readings.append(dict(lamp=True, over=over, detach=detach, eps=eps))
    moving = (("batch", 0.3), ("batch", 0.1), ("image", 0.1), ("image", 0.03))
    best = [PLAIN, LAMP, *(dict(lamp=True, over=o, detach=False, eps=e) for o, e in moving)]
    for seed in (0, 1):
        for normal in DIGITS:
            for lamp in readings if seed == 0 and normal in "2358" else best:
                yield dict(HIGH_RATE, validate=True, normal=normal, seed=seed, eval_every=2, **lamp)
            for lamp in (PLAIN, LAMP):                      # and the default's learning rate
                yield dict(MNIST, validate=True, normal=normal, seed=seed, eval_every=2, **lamp)


def tuning():
    """learning rate and epochs of each batch size, on training images of two digits"""
    cells = ((32, 1e-3, 8), (32, 3e-3, 8), (32, 1e-2, 8), (128, 3e-3, 16), (128, 1e-2, 16),
             (16, 3e-3, 8), (16, 1e-2, 8), (4, 1e-3, 4), (4, 3e-3, 4), (4, 1e-2, 4), (1, 1e-4, 2),
             (1, 3e-4, 2), (1, 1e-3, 2), (1024, 1e-2, 40), (128, 3e-2, 16), (16, 1e-3, 8),
             (4, 3e-4, 4), (4, 1e-3, 8), (1, 1e-3, 4), (1024, 3e-3, 40))
    for number, (batch_size, lr, epochs) in enumerate(cells):
        for normal in "58":
            for lamp in (PLAIN, BATCH_MOVING, LAMP) if number < 14 else (PLAIN, BATCH_MOVING):
                yield dict(HIGH_RATE, validate=True, normal=normal, batch_size=batch_size, lr=lr,
                           epochs=epochs, eval_every=max(1, epochs // 4), **lamp)


def table1():
    """LAMP on MNIST by batch size: the paper's Table 1"""
    for batch_size, lr, epochs, seeds in RATES:
        for seed in range(seeds):
            for normal in DIGITS if batch_size < 1024 else "012":
                for lamp in (PLAIN, LAMP):
                    yield dict(MNIST, normal=normal, batch_size=batch_size, lr=lr, epochs=epochs,
                               seed=seed, **lamp,
                               eval_every=max(2, epochs // 8) if seed or batch_size > 128 else 0)


def pca():
    """principal components instead of a network; how many, chosen on training images"""
    options = dict(dataset="mnist", image_size=32, model="pca", score="sum", seed=0, eval_every=0)
    for normal in DIGITS:
        for latent in (0, 5, 10, 15, 20, 30, 40, 60, 100):
            yield dict(options, normal=normal, latent=latent, validate=True)
        for latent in (0, 30):
            yield dict(options, normal=normal, latent=latent, validate=False)


def capacity():
    """LAMP by the width of the code, and by learning rate; 2x2x128 at 1e-3 is in table1"""
    cells = [(latent, 1e-3) for latent in (2, 4, 8, 16, 32, 64)]
    for latent, lr in (*cells, (128, 3e-3), (128, 1e-2)):
        for normal in DIGITS:
            for lamp in (PLAIN, LAMP):
                yield dict(MNIST, normal=normal, latent=latent, lr=lr, **lamp)


def controls():
    """Eq. 2 without the logarithm, and the first steps at batch size 1024"""
    for normal in DIGITS:
        yield dict(MNIST, normal=normal, **LAMP, log=False)     # see sweep.py
        for lamp in (PLAIN, LAMP):
            yield dict(MNIST, normal=normal, batch_size=1024, lr=6e-3, epochs=30, eval_every=3,
                       **lamp)


def table2():
    """LAMP on MVTec AD by base loss, optimizer, learning rate: the paper's Table 2"""
    rates = dict(sgd=(0.03, 0.3, 3.0), rmsprop=(1e-4, 3e-4, 1e-3), adam=(3e-4, 1e-3, 3e-3))
    for normal in CATEGORIES:
        for loss in ("l2", "l1", "ssim"):
            for optimizer in rates:
                for lr in rates[optimizer]:
                    for lamp in (PLAIN, LAMP):
                        yield dict(MVTEC, normal=normal, loss=loss, optimizer=optimizer, lr=lr,
                                   epochs=30, **lamp)


def settled():
    """LAMP on five categories of MVTec AD, small images and many steps; and PCA"""
    for epochs in (100, 300):
        for normal in CATEGORIES:
            for lamp in (PLAIN, LAMP):
                yield dict(MVTEC, normal=normal, epochs=epochs, **lamp)
    for normal in CATEGORIES:
        yield dict(dataset="mvtec", normal=normal, validate=False, model="pca", latent=128,
                   image_size=64, score="standardized", seed=0, eval_every=0)


def minutes():
    """what minutes of one core give: UniAD on three categories, two other models on five; LAMP"""
    cnn = dict(CNN, batch_size=8, lr=0.02, epochs=12)
    three = dict(UNIAD, **ON_THREE)
    for seed in (0, 1, 2):
        for lamp in (PLAIN, LAMP):
            yield dict(three, seed=seed, eval_every=5 if seed else 2, **lamp)
    for normal in three["normal"].split(","):               # a model for each
        yield dict(three, normal=normal)
    for lamp in (PLAIN, LAMP):
        yield dict(NO_QUERY, batch_size=8, epochs=8, **lamp)
        for seed in (0, 1, 2):
            yield dict(cnn, seed=seed, **lamp)
        for normal in CATEGORIES:                           # a model for each
            yield dict(cnn, normal=normal, **lamp)


def unified():
    """one model for five categories, longer: UniAD, its parts, baselines, LAMP"""
    for model in (UNIAD, NO_QUERY, CNN, MLP):
        yield from (model, dict(model, seed=1))
    yield from (dict(CNN, seed=2), TRANSFORMER)
    yield from (dict(UNIAD, **LAMP), dict(UNIAD, **BATCH_HELD), dict(NO_QUERY, **LAMP))
    for latent in (2, 30, 100, 400):
        yield dict(FEATURES, model="pca", latent=latent, score="standardized", eval_every=0)
    yield dict(FEATURES, model="nearest", latent=800, turns=1, score="standardized", eval_every=0)


def parts():
    """UniAD without its mask, with one query, without jitter: on five categories, and on three"""
    without = [dict(UNIAD, **part) for part in (
        dict(neighbors=0), dict(query="first"), dict(jitter=0.0))]
    yield from (*without, dict(NO_QUERY, neighbors=0))
    for seed in (0, 1, 2):                                  # the whole one is in minutes
        for model in without:
            yield {**model, **ON_THREE, "seed": seed}
    for model in (CNN, dict(MLP, depth=1)):                 # for a picture
        yield {**model, **ON_THREE}
    yield {**UNIAD, **ON_THREE, **BEFORE, "eval_every": 2}


def shortcut():
    """does a model that may copy its input learn to? a single layer, and four models, long"""
    yield dict(MLP, batch_size=16, epochs=100, eval_every=20)
    yield dict(MLP, depth=1, batch_size=16, epochs=100, eval_every=10)
    yield dict(CNN, batch_size=16, epochs=100, eval_every=20)
    for model in (TRANSFORMER, UNIAD, dict(UNIAD, seed=1)):
        yield {**model, **ON_THREE, "batch_size": 16, "epochs": 24, "eval_every": 6}


def cifar10():
    """a sample of CIFAR-10: UniAD on the first of the paper's four splits, PCA and a CNN on all"""
    options = dict(dataset="cifar10", score="mean")
    for model in (UNIAD, NO_QUERY):
        yield dict(model, **options, normal="0,1,2,3,4")
    for normal in ("0,1,2,3,4", "5,6,7,8,9", "0,2,4,6,8", "1,3,5,7,9"):
        yield dict(FEATURES, **options, normal=normal, model="pca", latent=30, eval_every=0)
        yield dict(CNN, **options, normal=normal, batch_size=8, lr=0.02, epochs=3)


def photos():
    """your own images: 20 to 200 photos of one kind, by model and score; three draws of 60"""
    features = dict(backbone="efficientnet_lite2", image_size=224, score="standardized")
    nearest = dict(features, model="nearest", latent=400, turns=1)
    pca = dict(features, model="pca", latent=20)
    ae = dict(model="ae", backbone="none", image_size=64, depth=5, latent=16, batch_size=8, lr=1e-3,
              optimizer="adam", schedule="cosine", lamp=False, epochs=200, score="standardized")
    cells = [dict(nearest, photos=n, seed=0) for n in (20, 30, 60, 120, 200)]
    for seed in (0, 1, 2):
        for model in (dict(nearest, turns=0, latent=800), pca, ae):
            cells.append(dict(model, photos=60, seed=seed))
    for model, raw in ((nearest, "max"), (pca, "max"), (ae, "sum")):
        cells.append(dict(model, photos=60, seed=0, score=raw))
    for normal in CATEGORIES:
        for cell in cells:
            yield dict(cell, dataset="folder", normal=normal, fpr=0.05, eval_every=0)


EXPERIMENTS = {experiment.__name__: experiment for experiment in (
    reading, tuning, table1, pca, capacity, controls, table2, settled, minutes, unified,
    parts, shortcut, cifar10, photos)}
WITH_PULL_AND_SPREAD = ("table1", "table2")


# ---- what train.py does not know ----

class WithoutLogarithm:
    """Eq. 2 of the LAMP paper without the logarithm of Eq. 1, on the squared error; a control."""

    def __init__(self, eps, over, detach):
        self.eps, self.over, self.detach = eps, over, detach

    def __call__(self, y_hat, y):                           # (B, C, H, W) twice -> scalar
        from lamp_loss import l2, scale
        error = l2(y_hat, y)
        self.base_error = error.detach().sum() / len(y)
        return scale(error, self.eps, self.over, self.detach).sum() / len(y)


def argv_of(options):
    """Options -> the arguments of train.py, but for `log` and `photos`, which it does not know."""
    argv = []
    for key, value in options.items():
        flag = "--" + key.replace("_", "-")
        if key in ("log", "photos"):
            continue
        if value is True:
            argv.append(flag)
        elif value is False:
            argv += [] if key in ("lamp", "validate", "amp") else [flag.replace("--", "--no-", 1)]
        else:
            argv += [flag, str(value)]
    return argv


def some_photos(options, data_dir):
    """A folder that shows `photos` normal images of a category of MVTec AD, drawn by the seed, and
    its whole test set: links in runs/photos/data -> its path, for --data-dir."""
    name, seed = options["normal"], options["seed"]
    source = Path(data_dir, "mvtec", name).resolve()
    folder = Path(f"runs/photos/data/{name}-{options['photos']}-s{seed}")
    if not folder.exists():
        files = sorted((source / "train/good").iterdir())
        random.Random(seed).shuffle(files)
        part = Path(f"{folder}.{os.getpid()}", name)        # two workers may make one folder
        (part / "train/good").mkdir(parents=True)
        for file in files[:options["photos"]]:
            (part / "train/good" / file.name).symlink_to(file)
        for other in ("test", "ground_truth"):
            (part / other).symlink_to(source / other)
        with contextlib.suppress(OSError):                  # the other was first
            part.parent.rename(folder)
    return str(folder)


def pull_and_spread(model, inputs, labels):
    """What reconstruction does to up to 500 test images of a kind -> {"pull": , "spread": }.

    pull: how near it brings anomalies to the normal, the squared distance of y_hat to its nearest
    training image over that of y, mean; 1: not at all. spread: variance of the normals' y_hat over
    that of the normals; 0: the same picture whatever the input. None where not defined.
    """
    import torch                                            # in workers alone, see sweep.py
    device = next(model.parameters()).device
    train = inputs.prepare(inputs.train.to(device)).flatten(1)
    pairs = []                                              # of anomalies, of normals: y_hat, y
    with torch.no_grad():
        for label in (1, 0):
            stored = inputs.test[labels == label]
            stored = stored[::max(1, -(-len(stored) // 500))].to(device)
            batches = [inputs.prepare(batch) for batch in stored.split(64)]
            y_hat = torch.cat([model.eval()(batch) for batch in batches]).flatten(1)
            pairs.append((y_hat, torch.cat(batches).flatten(1)))
    nearest = [torch.cdist(images, train).amin(1).square() for images in pairs[0]]
    variances = [images.var(0).mean() for images in pairs[1]]
    return {"pull": mean_ratio(*nearest), "spread": mean_ratio(*variances)}


def mean_ratio(a, b):
    """Mean of a / b where b > 0; None where it nowhere is."""
    return float((a[b > 0] / b[b > 0]).mean()) if (b > 0).any() else None
