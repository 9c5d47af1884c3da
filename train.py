"""Train: one loop for every model here, and the command that wires everything together.

    python train.py                                         # digits, 10 s, no download
    python train.py --dataset mnist --normal 3 --loss l2 --lamp

Every model reconstructs its input, so one loop, `fit`, trains all that are trained. The
LAMP paper in one line: train on normal images alone, with an amplified loss; judge by
L2.

A first reading needs two functions: `fit`, the loop, and `run`, which goes from a
config to data, a model, its training, and a record of what came out. The sections
between them are optimizers and schedules, training in several processes, saving and
resuming, and the table of all defaults.

A run is made from a config, a dict. The command line sets the options that a reader of
the papers turns. DEFAULTS holds all keys. From Python any of them can be set:

    import train
    record = train.run({"dataset": "mnist", "normal": "3", "lamp": True, "width": 32})

On a CPU, the same command repeats to the last bit with the same number of threads, if
bfloat16 is chosen both times or never ("amp" in the config, see `bfloat16_is_faster`).
"""
import argparse
import functools
import io
import json
import math
import os
import platform
import re
import shlex
import sys
import time
import uuid
from pathlib import Path

# A thread that waits must sleep, not spin. On a busy machine, spinning made a command
# of 20 seconds take minutes. This is read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist
import torchvision
from torch import nn
from torch.optim.swa_utils import update_bn

import evaluate as ev
from data import DATASETS, to_float
from lamp_loss import BASE_LOSSES, ReconstructionLoss
from uniad import QUERIES, STAGES, STARTS


# ---- the loop ----

def fit(model, inputs, criterion, targets=None, *, epochs=10, batch_size=32, lr=1e-3,
        optimizer="adam", schedule="cosine", weight_decay=0.0, clip=0.0, seed=0,
        amp=False, prepare=to_float, resume=None, after_epoch=None):
    """Train a model to reconstruct its inputs, or to predict targets -> history.

    inputs: (N, C, H, W), as stored. prepare: turns them into what the model sees.
    targets: (N, ...), or None for the inputs themselves.
    criterion(x_hat, x): a scalar, summed over an image (Eq. 1 of LAMP) and averaged
        over the batch. It is divided by the number of values of an image, or of a
        target, so that one learning rate fits all sizes.
    clip: the gradient's largest norm, 0 for any. amp: multiply in bfloat16.
    after_epoch(history, state): is called after each epoch. It may add to history[-1],
        the dict of that epoch. Who keeps `state` and the model's weights can continue
        from there, with fit(..., resume=state).
    Raises FloatingPointError where the loss is not finite.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    # Convolutions are faster with the channels last in memory.
    network = in_processes(model.to(memory_format=torch.channels_last))
    optim = OPTIMIZERS[optimizer](model.named_parameters(), lr=lr,
                                  weight_decay=weight_decay)
    history = restore(resume, optim, generator) if resume else []
    for epoch in range(len(history) + 1, epochs + 1):
        started, means = time.perf_counter(), torch.zeros(2)
        batches = torch.randperm(len(inputs), generator=generator).split(batch_size)
        model.train()
        for step, index in enumerate(batches):
            # Take a batch as the model sees it. Several processes share its images.
            mine, weight = share_of(index)          # one process: all of it, weight 1
            x = prepare(inputs[mine].to(device))
            x = x.contiguous(memory_format=torch.channels_last)
            target = x if targets is None else targets[mine].to(device)

            # Reconstruct it. Compare (Eq. 1, 2) in float32: bfloat16 rounds 1 - L'.
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x_hat = network(x)
            loss = criterion(x_hat.float(), target) / target[0].numel()
            check_finite(loss, lr, epoch, step)

            # Step against the gradient, at the schedule's learning rate.
            optim.zero_grad()
            (loss * weight).backward()
            progress = (epoch - 1 + step / len(batches)) / epochs
            take_step(optim, model, lr * SCHEDULES[schedule](progress), clip, amp)
            means += losses_of(criterion, loss, target) * (len(mine) / len(inputs))

        history.append(record_epoch(epoch, means, time.perf_counter() - started))
        if is_first_process():
            if after_epoch:
                after_epoch(history, snapshot(optim, generator, history))
            print_epoch(history, epochs)
    return history


def take_step(optim, model, lr, clip, amp):
    """One step at learning rate lr. clip: the gradient's largest norm, 0 for any."""
    for group in optim.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)       # Muon moves some at lr / 20
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    device = next(model.parameters()).device.type
    with torch.autocast(device, torch.bfloat16, enabled=amp):
        optim.step()                                        # Muon multiplies matrices


def check_finite(loss, lr, epoch, step):
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()} at epoch {epoch}, step {step + 1}: try "
            f"--lr {lr / 10:.1g}")


def losses_of(criterion, loss, target):
    """The loss and the error before amplification, per value of an image: (2,).

    The criterion has kept the latter as `base_error` when it was called last.
    """
    base_error = getattr(criterion, "base_error", None)
    if base_error is None:                                  # not ReconstructionLoss
        return torch.stack([loss, loss]).detach().cpu()
    return torch.stack([loss.detach(), base_error / target[0].numel()]).cpu()


def record_epoch(epoch, means, seconds):
    """The history's entry. means: (2,), the epoch's average of `losses_of`."""
    if dist.is_initialized():
        dist.all_reduce(means)
    return {"epoch": epoch, "loss": float(means[0]), "base_error": float(means[1]),
            "seconds": round(seconds, 3)}


def print_epoch(history, epochs):
    """Print a line for the newest epoch.

    It stays after each tenth of the epochs, after an epoch that was judged, and after
    the last one. Other lines are overwritten, and only a terminal shows them.
    """
    now = history[-1]
    auroc = now.get("image_auroc")
    judged = "" if auroc is None else f"   image AUROC {auroc:.4f}"
    seconds = sum(entry["seconds"] for entry in history) / len(history)
    left = seconds * (epochs - len(history))
    is_tenth = now["epoch"] % max(1, epochs // 10) == 0
    stays = auroc is not None or is_tenth or now["epoch"] == epochs
    if stays or sys.stdout.isatty():
        base = ""
        if now["base_error"] != now["loss"]:                # amplified
            base = f"   base error {now['base_error']:.5f}"
        print(f"epoch {now['epoch']:>4}/{epochs}   loss {now['loss']:.5f}{base}{judged}"
              f"   {left:.0f} s left   ",
              end="\n" if stays else "\r", flush=True)


# ---- optimizers and schedules ----

# The LAMP paper has SGD, RMSprop and Adam (Sec. 3.1). UniAD's authors take AdamW, with
# the step schedule. Muon and the other schedules are our choice.

@torch.no_grad()
def orthogonalize(g):
    """The orthogonal matrices U V^T nearest to g = U S V^T, roughly.

    (n, rows, columns) -> (n, rows, columns). Five steps of a Newton-Schulz iteration
    bring singular values above a hundredth of the norm |g| to between 0.68 and 1.13.
    """
    wide = g.shape[1] <= g.shape[2]
    x = g if wide else g.mT                                 # for the smaller product
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        # x <- 3.4445 x - 4.775 (x x^T) x + 2.0315 (x x^T)^2 x
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if wide else x.mT


class Muon(torch.optim.AdamW):
    """Muon (Keller Jordan 2024, github.com/KellerJordan/Muon).

        M <- .95 M + .05 G
        D  = orthogonalize(.95 M + .05 G)
        W <- W - lr (weight_decay W + sqrt(max(1, rows/columns)) D)

    This moves the weights W of linear layers and of convolutions, which are taken as
    matrices (out, in k k). G is the gradient. Names tell which these are: they end in
    "weight", and have no "project" in them. All other parameters (queries, positions,
    norms, biases, and the linear maps project_in and project_out) take Adam's
    step at lr / 20, without weight decay. AdamW's own `step` passes over parameters
    without a gradient. So `move_matrices` removes the gradients of those it moves.
    named_parameters: those of a model, pairs of name and parameter.

    torch.optim.Muon refuses convolutions. It also casts to bfloat16, which a CPU
    without hardware for it emulates: a step of UniAD then takes 25 s instead of 0.8 s.
    """

    def __init__(self, named_parameters, lr, weight_decay):
        rest, by_shape = [], {}                             # equal shapes move together
        for name, p in named_parameters:
            if name.endswith("weight") and p.dim() > 1 and "project" not in name:
                by_shape.setdefault(p.shape, []).append(p)
            else:
                rest.append(p)
        groups = [dict(params=rest, muon=False, weight_decay=0.0, lr=lr / 20,
                       lr_ratio=1 / 20)]
        for weights in by_shape.values():
            groups.append(dict(params=weights, muon=True))
        super().__init__(groups, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.move_matrices(group["params"], group["lr"], group["weight_decay"])
        super().step()                                      # what has a gradient left

    def move_matrices(self, weights, lr, weight_decay):
        """One step for weights of one shape. Their gradients become None."""
        directions = []
        for w in weights:
            state = self.state[w]
            if not state:                   # AdamW needs a `step` where it is resumed
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(w))
            momentum = state["momentum"].lerp_(w.grad, 0.05)
            directions.append(w.grad.lerp(momentum, 0.95).flatten(1))
            w.grad = None
        rows, columns = directions[0].shape
        factor = max(1, rows / columns) ** 0.5
        moves = orthogonalize(torch.stack(directions))      # (n, rows, columns)
        for w, move in zip(weights, moves):
            w.mul_(1 - lr * weight_decay)
            w.sub_(move.reshape(w.shape), alpha=lr * factor)


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    "rmsprop": torch.optim.RMSprop,
    "adam": functools.partial(torch.optim.Adam, fused=True),
    "adamw": functools.partial(torch.optim.AdamW, fused=True),
    "muon": Muon,
}


# A schedule gives the factor of the learning rate, by the progress from 0 to 1.

def constant(progress):
    return 1.0


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


def step_down(progress):
    """As UniAD, which lowers the rate after 800 of 1000 epochs."""
    return 1.0 if progress < 0.8 else 0.1


def warmup_cosine(progress):
    """Muon's large rate needs a warm-up. It takes a twentieth of the steps."""
    return min(1.0, 0.1 + 18 * progress) * cosine(progress)


SCHEDULES = {"constant": constant, "cosine": cosine, "step": step_down,
             "warmup-cosine": warmup_cosine}


def bfloat16_is_faster(device):
    """Whether matrix products take less time in bfloat16 than in float32 here.

    A CPU without hardware for bfloat16 emulates it, and is a dozen times slower.
    Measuring takes some milliseconds.
    """
    if device != "cpu":
        return device == "cuda"
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        seconds = []
        for _ in range(5):                                  # the first one warms up
            started = time.perf_counter()
            x @ x
            seconds.append(time.perf_counter() - started)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] < fastest[torch.float32]


# ---- several processes: torchrun --nproc-per-node=2 train.py ... ----

def join_processes(device):
    """Under torchrun join the other processes, of which the first prints -> device."""
    if "LOCAL_RANK" not in os.environ:
        return torch.device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    if device == "cuda":
        return torch.device(f"cuda:{os.environ['LOCAL_RANK']}")
    return torch.device(device)


def processes():
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def is_first_process():
    """Whether this process is the one that prints and saves."""
    return processes()[0] == 0


def in_processes(model):
    """The model; in several processes one that averages its gradients over them."""
    if processes()[1] == 1:
        return model
    return nn.parallel.DistributedDataParallel(model)


def share_of(index):
    """This process's part of a batch, and the weight of its loss.

    With the weight, the mean of all processes' gradients is that of the whole batch, if
    the loss is a sum over images. (LAMP's maximum over="batch" is that of the part.)
    """
    rank, count = processes()
    if len(index) < count:
        raise ValueError(f"a batch of {len(index)} images is too small for {count} "
                         "processes: use another --batch-size")
    mine = index[rank::count]
    return mine, len(mine) * count / len(index)


# ---- saving and resuming ----

# model.pt is a dict: version, config, shape (of what the model sees), image (the shape
# of an image), fingerprint (of the normal images), backbone (its statistics), model
# (the weights), what `snapshot` adds, and calibration as soon as the run is judged.

def snapshot(optim, generator, history):
    """What `restore` needs besides the weights, as tensors and plain values.

    It holds the history itself, so what is added to its last entry is saved, too.
    """
    return {"optimizer": optim.state_dict(), "order": generator.get_state(),
            "rng": torch.get_rng_state(), "history": history}


def restore(state, optim, generator):
    """Put the optimizer and the random numbers back to a snapshot's -> its history.

    Dropout and jitter on a GPU draw other numbers, which are not kept.
    """
    optim.load_state_dict(state["optimizer"])
    generator.set_state(state["order"])
    if is_first_process():                                  # others go on apart
        torch.set_rng_state(state["rng"])                   # for dropout and jitter
    return list(state["history"])


class RunFolder:
    """Where a run is saved. It notices when another training begins in the folder."""

    def __init__(self, path):
        self.path = Path(path)
        self.token = uuid.uuid4().hex

    def claim(self):
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "writer.txt").write_text(self.token)

    def save(self, state):
        """Write model.pt. ValueError: another training has claimed the folder.

        It is written beside its place and then moved there, so that an interruption
        never leaves a broken file.
        """
        if (self.path / "writer.txt").read_text() != self.token:
            raise ValueError(f"another training has begun in {self.path}: this one "
                             "stops, and leaves it alone. Name another --out")
        # Straight into a file, torch would not raise an OSError where a disk is full.
        buffer = io.BytesIO()
        torch.save(state, buffer)
        part = self.path / "model.tmp"
        part.write_bytes(buffer.getbuffer())
        # These belong to an earlier state of the run. They are made again at its end.
        for name in ("run.json", "examples.png"):
            (self.path / name).unlink(missing_ok=True)
        os.replace(part, self.path / "model.pt")


def saved_run(out):
    """The state of the run in a folder, or None where no epoch of it was finished."""
    if not (Path(out) / "model.pt").exists():
        return None
    state = ev.load_run(out, finished=False)[0]
    return state if state["history"] or "calibration" in state else None


MAY_CHANGE = ("device", "data_dir", "epochs")


def resumed_config(out, given):
    """The config of the run in `out`, with those keys of `given` that may change.

    Epochs may change only if the learning rate is constant: other schedules are planned
    for their number.
    """
    state = saved_run(out)
    if state is None:
        raise ValueError(f"{out} holds no run to go on with")
    c = {**state["config"], "out": str(out)}
    for key, value in given.items():
        if key not in MAY_CHANGE:
            raise ValueError(f"--resume takes {flag(key)} from the run: leave it out")
        planned = c.get("schedule") != "constant" and value != c.get("epochs")
        if key == "epochs" and planned:
            raise ValueError(f"--epochs {value}: the learning rate of this run was "
                             f"planned for {c.get('epochs')} epochs. Train anew, with "
                             "another --out")
        c[key] = value
    c["device"] = ev.pick_device(c["device"])
    return c


# ---- configs: every key, with its default by model ----

# The LAMP paper gives the depth (4 on MNIST, 6 else; at 64 pixels we take 5) and the
# batch sizes. Width, eps, rates, schedules and steps are our choice. What UniAD's
# authors take, and why these defaults differ, stands at the top of uniad.py.
COMMON = dict(
    dataset="digits", normal="0", data_dir="data", seed=0, device="auto",
    validate=False,                     # judge on a sixth of the training split
    fpr=0.05,                           # the false alarms that the threshold allows
    eval_every=None,                    # epochs; None: four times; 0: at the end alone
    pictures=True)
PIXELS = dict(backbone="none", image_size=32, score="sum")
FEATURES = dict(
    backbone="efficientnet_b4", backbone_weights="imagenet", image_size=224,
    standardize=True, strides=(2, 4, 8, 16), grid_stride=16, score="mean")
TRAINED = dict(
    loss="l2", lamp=False, eps=0.03, over="image", detach=True,
    epochs=None,                        # None: as many as make `steps`
    clip=0.0)                           # the largest norm of the gradient, 0 for any
BY_ADAM = dict(
    optimizer="adam", lr=3e-3, schedule="cosine", weight_decay=0.0, batch_size=32,
    amp=False)
BY_MUON = dict(
    optimizer="muon", lr=0.01, schedule="warmup-cosine", weight_decay=1e-4,
    batch_size=8,
    amp="auto")                         # bfloat16 where it is faster, see above
OF_TRANSFORMER = dict(
    steps=1000, depth=4, width=256, dropout=0.0,
    neighbors=0, jitter=0.0, query="first", start="random")

DEFAULTS = {                            # a model has only the keys that mean something
    "ae": COMMON | PIXELS | TRAINED | BY_ADAM | dict(
        steps=1400, depth=4, width=16, kernel_size=3, patches=1,
        latent=8),                      # as the rate: chosen on MNIST's training images
    "pca": COMMON | PIXELS | dict(components=8),
    "uniad": COMMON | FEATURES | TRAINED | BY_MUON | OF_TRANSFORMER | dict(
        neighbors=7, jitter=5.0, query="layerwise", start="two-step"),
    "transformer": COMMON | FEATURES | TRAINED | BY_MUON | OF_TRANSFORMER,
    "cnn": COMMON | FEATURES | TRAINED | BY_MUON | dict(
        steps=1500, depth=6, width=128, lr=0.02),
    "mlp": COMMON | FEATURES | TRAINED | BY_MUON | dict(
        steps=500, depth=5, width=1520, lr=0.02),
    "nearest": COMMON | FEATURES | dict(
        bank_images=800,                # at most so many images
        coreset=1.0),                   # the share of their tokens that is kept
}
PRODUCTS = ("mvtec", "photos")          # data sets with these defaults instead
ON_PRODUCTS = {
    "ae": dict(image_size=64, depth=5, latent=16, batch_size=8, lr=1e-3),
    "pca": dict(image_size=64),
}
# Any config may have these. white: the brightest value of photos of 16 bits.
OF_A_RUN = ("out", "white")


def with_defaults(given):
    """A config with any keys -> one with all the keys of its model.

    Raises ValueError for a model that is not there, a key that it does not have, and
    values that are out of range or exclude each other.
    """
    given = {key: value for key, value in given.items() if value is not None}
    model, dataset = given.get("model", "ae"), given.get("dataset", "digits")
    if model not in DEFAULTS:
        raise ValueError(f"unknown model {model!r}: use one of {', '.join(DEFAULTS)}")
    asks_for_features = given.get("backbone", "none") != "none"
    c = {"model": model, **DEFAULTS[model]}
    if asks_for_features:
        c |= FEATURES                                       # PCA, too, can see features
    if dataset in PRODUCTS:
        c |= {"normal": "all", "score": "standardized"}
        if not asks_for_features:
            c |= ON_PRODUCTS.get(model, {})
    # The two-step start is for a model with a mask, and a learned query in each layer.
    masked = given.get("neighbors", 7) > 0
    if "start" in c and not (masked and given.get("query", "layerwise") == "layerwise"):
        c["start"] = "random"
    if model == "ae" and dataset == "digits":
        c["steps"] = 400                                    # they are small and few
    if c.get("optimizer") == "muon" and given.get("optimizer", "muon") != "muon":
        c["lr"] /= 20                                       # Muon's ratio to Adam
    for key in given:
        if key not in (*c, *OF_A_RUN):
            raise ValueError(f"{flag(key)} means nothing to the model {model}: "
                             "leave it out")
    differs = [key for key in c if given.get(key, c[key]) != c[key]]
    c |= given
    c.setdefault("out", default_folder(c, differs))
    check(c)
    c["device"] = ev.pick_device(c["device"])
    return c


# Keys of a config that a run's folder is named by anyway, or that change no result.
NOT_IN_NAME = ("dataset", "normal", "model", "loss", "lamp", "seed", "out", "data_dir",
               "device", "pictures", "eval_every")


def default_folder(c, differs):
    """runs/DATASET-NORMAL-MODEL-LOSS[-lamp]-sSEED, without a loss if there is none.

    differs: the keys whose values are not the usual ones. They follow, as -lr-0.001, so
    that two commands do not share a folder.
    """
    words = [c["dataset"], str(c["normal"]), c["model"]]
    if "loss" in c:
        words.append(c["loss"])
    if c.get("lamp"):
        words.append("lamp")
    words.append(f"s{c['seed']}")
    words += [f"{key}-{c[key]}" for key in differs if key not in NOT_IN_NAME]
    return "runs/" + re.sub(r"[^\w.,-]", "_", "-".join(words))


def flag(key):
    return "--" + key.replace("_", "-")


ABOVE_ZERO = ("image_size", "depth", "patches", "epochs", "batch_size", "lr", "width",
              "fpr", "latent", "bank_images", "coreset", "eps")
BELOW_ONE = ("fpr", "dropout", "eps")
WORDS = {                               # what keys that are words may be
    "loss": BASE_LOSSES, "over": ("image", "batch"), "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES, "score": ev.SCORES, "query": QUERIES, "start": STARTS}


def check(c):
    """Raise ValueError where values are out of range or exclude each other."""
    for key, value in c.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            check_range(key, value)
        if key in WORDS and value not in WORDS[key]:
            raise ValueError(f"{flag(key)} {value}: use one of "
                             f"{', '.join(WORDS[key])}")
    model, features = c["model"], c["backbone"] != "none"
    needs_features = model not in ("ae", "pca")
    if (model == "ae" and features) or (needs_features and not features):
        raise ValueError(f"--model {model} --backbone {c['backbone']}: ae sees the "
                         "image, pca the image or features, all others features. Leave "
                         "out --backbone")
    if features and c.get("loss") == "ssim":
        raise ValueError("--loss ssim compares images in [0, 1]. With CNN features use "
                         "l1 or l2")
    if model in ("uniad", "transformer") and c["width"] % 8:
        raise ValueError(f"--width {c['width']}: 8 heads share it, so use a multiple "
                         "of 8")
    grid = c["image_size"] // c.get("grid_stride", 16)
    if c.get("neighbors") and c["neighbors"] // 2 >= grid // 2:
        raise ValueError(f"--neighbors {c['neighbors']} hides the whole grid of "
                         f"{grid}x{grid} tokens from some of them: use fewer, or a "
                         "larger --image-size")


def check_range(key, value):
    # Seeds and counts must fit into 64 bits.
    below_limit = value < (1 if key in BELOW_ONE else 2 ** 63)
    above_limit = value > 0 or (value == 0 and key not in ABOVE_ZERO)
    if below_limit and above_limit:                         # NaN is neither
        return
    least = "above 0" if key in ABOVE_ZERO else "of 0 or more"
    most = " and below 1" if key in BELOW_ONE else ""
    raise ValueError(f"{flag(key)} {value}: expected a number {least}{most}")


# ---- a run ----

CURVES = ("image_auroc", "pixel_auroc", "normal_error", "anomaly_error",
          "distance_to_identity")


def run(config, data=None, criterion=None, resume=False, command="train.run",
        report=True):
    """One run, from a config to a folder on disk -> its record, as in run.json.

    config: any keys of DEFAULTS. data: a Data to use, instead of loading one.
    criterion: what to train by, in place of the config's loss.
    resume: if config["out"] holds a run already, go on with it. Of the config only the
        keys MAY_CHANGE count then. Without `resume`, a run that is there is replaced.
    command: what made it, for the record. report: print what is learned, and a result.
    After Ctrl-C the last full epoch is judged, and record["interrupted"] is True.
    """
    started = time.perf_counter()
    torch.set_flush_denormal(True)      # LAMP's tiny gradients become 0: they are slow
    c = with_defaults(config)
    state = saved_run(c["out"]) if resume else None     # of a run to go on with
    if state:
        may_change = {key: config[key] for key in MAY_CHANGE if key in config}
        c = resumed_config(c["out"], may_change)

    # 1. The images, or their features: normal ones to train on, and all to test.
    device = join_processes(c["device"])
    data, inputs, backbone = ev.open_data(c, device, state, data)
    settle(c, len(inputs.train))                    # epochs, eval_every and amp
    check_batch_norm(c, len(inputs.train))
    if report:
        print_start(c, data, inputs)

    # 2. The model, with its first weights or those of a saved run. It is saved once
    # now, so that a full disk shows before an epoch is trained.
    model = first_model(c, inputs, device, state)
    save = saver(c, model, data, inputs, backbone)
    save(state or {"history": []})

    # 3. Train it: normal images alone, by the base loss or LAMP (Eq. 1 and 2).
    interrupted = train_model(c, model, data, inputs, criterion, state, save)
    if not is_first_process():
        return {}                                   # the first process does the rest
    if interrupted and report:
        print_interrupted(c["out"])

    # 4. Judge the test images by the error of their reconstruction, and keep it all.
    record = judge_and_save(c, model, data, inputs, save, command)
    record["seconds"] = round(time.perf_counter() - started, 2)
    record["interrupted"] = interrupted
    text = json.dumps(record, indent=1, allow_nan=False)
    (Path(c["out"]) / "run.json").write_text(text + "\n")
    if report:
        print_end(record)
    return record


def settle(c, images):
    """Fill in what is None or "auto" in a config, for so many training images."""
    if "epochs" not in c:                                   # solved, not trained
        return
    if c["epochs"] is None:
        steps_an_epoch = math.ceil(images / c["batch_size"])
        c["epochs"] = max(1, round(c["steps"] / steps_an_epoch))
    if c["eval_every"] is None:
        c["eval_every"] = math.ceil(c["epochs"] / 4)
    if c["amp"] == "auto":
        c["amp"] = bfloat16_is_faster(c["device"])


def check_batch_norm(c, images):
    """Raise ValueError where batch norm would see a single value of each channel."""
    if c["model"] != "ae" or c["patches"] > 1:
        return
    side = c["image_size"] // 2 ** c["depth"]               # of the code
    last = images % c["batch_size"] or c["batch_size"]      # images in the last batch
    if side == 1 and last == 1:
        raise ValueError(
            f"--batch-size {c['batch_size']}: of {images} images, one batch has a "
            "single one. With a code of 1x1, batch normalization then has one value "
            "for each channel. Use another --batch-size, or fewer layers (--depth)")


def shape_of(inputs):
    """(C, H, W) of what the model sees."""
    return list(inputs.train.shape[1:])


def first_model(c, inputs, device, state):
    """The model before training, or as it was saved, or solved."""
    # Another seed in each process gives each its own jitter and dropout.
    torch.manual_seed(c["seed"] + processes()[0])
    if c["model"] == "nearest" and not state:
        return nearest_model(c, inputs, device)
    bank_tokens = len(state["model"].get("bank", ())) if state else 0
    model = ev.build_model(c, shape_of(inputs), bank_tokens).to(device)
    if state:
        model.load_state_dict(state["model"])
    elif c["model"] == "ae":
        model.check_size(*shape_of(inputs)[1:])     # before a run is replaced
    elif c["model"] == "pca":
        model.solve(inputs.prepare(inputs.train.to(device)))
    return model


def nearest_model(c, inputs, device):
    """Nearest tokens, with a bank of at most `bank_images` normals and their copies.

    The images are drawn by a fixed seed. Copies come from photos/ alone. An image is
    judged without its own tokens, its copies' and its near-copies'.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(inputs.train), generator=generator)
    numbers = order[:c["bank_images"]]
    features = inputs.train[numbers]                        # (N, C, g, g)
    tokens = len(features) * features[0, 0].numel()
    if inputs.copies is not None:
        kept = torch.isin(inputs.copy_of, numbers) & inputs.copy_in_bank
        features = torch.cat([features, inputs.copies[kept]])
        numbers = torch.cat([numbers, inputs.copy_of[kept]])
    # Copies compete with the images for a bank as large as without them.
    kept_tokens = min(tokens, max(1, round(c["coreset"] * tokens)))
    model = ev.build_model(c, shape_of(inputs), kept_tokens).to(device)
    parts = numbers if inputs.parts is None else inputs.parts[numbers]
    model.solve(inputs.prepare(features.to(device)), parts, candidates=tokens)
    return model


def saver(c, model, data, inputs, backbone):
    """Claim the run's folder -> a function that saves the model and a state there."""
    folder = RunFolder(c["out"])
    fixed = {"version": ev.VERSION, "config": c, "shape": shape_of(inputs),
             "image": list(data.train.shape[1:]),
             "fingerprint": ev.fingerprint_of(data),
             "backbone": backbone and (backbone.mean.cpu(), backbone.std.cpu())}
    if dist.is_initialized():
        dist.barrier()                                      # all have read what is here
    if not is_first_process():
        return lambda state: None
    folder.claim()
    return lambda state: folder.save({**state, **fixed, "model": model.state_dict()})


def train_model(c, model, data, inputs, criterion, state, save):
    """Train by the config -> whether Ctrl-C has ended it, after a full epoch."""
    if c["model"] in ev.SOLVED:
        return False
    if criterion is None:
        criterion = ReconstructionLoss(c["loss"], c["lamp"], c["eps"], c["over"],
                                       c["detach"])

    def after_epoch(history, now):
        history[-1].update(curve_point(len(history), c, model, data, inputs))
        save(now)

    keys = ("epochs", "batch_size", "lr", "optimizer", "schedule", "weight_decay",
            "clip", "seed", "amp")
    chosen = {key: c[key] for key in keys}
    try:
        fit(model, inputs.train, criterion, **chosen, prepare=inputs.prepare,
            resume=state if state and state["history"] else None,
            after_epoch=after_epoch)
    except KeyboardInterrupt:
        if saved_run(c["out"]) is None:
            raise
        return True
    return False


def judge_now(c, model, data, inputs):
    """Judge the model as it is now -> as `evaluate.judge`."""
    # Batch norm's running statistics become an average over all training images. This
    # is our choice; the paper says nothing of it. With PyTorch's momentum of 0.1 they
    # remember about ten batches, and at batch size 1 ten images. Training never reads
    # them, and no random number is drawn, so training stays the same.
    batches = inputs.train.tensor_split(math.ceil(len(inputs.train) / 256))
    seen = (inputs.prepare(x.to(c["device"])) for x in batches)
    update_bn(seen, model.eval())
    return ev.judge(model, c, data, inputs)


def curve_point(epoch, c, model, data, inputs):
    """Metrics for the history, every `eval_every` epochs. Nothing is chosen by them."""
    if not c["eval_every"] or epoch % c["eval_every"] or epoch == c["epochs"]:
        return {}
    metrics = judge_now(c, model, data, inputs)[0]
    return {key: metrics.get(key) for key in CURVES}


def judge_and_save(c, model, data, inputs, save, command):
    """Judge the last full epoch, save its calibration, draw examples -> the record.

    After Ctrl-C the model is in the middle of an epoch. The file has the last full one.
    """
    state, last_full_epoch = ev.load_run(c["out"], finished=False)
    model.load_state_dict(last_full_epoch.state_dict())
    metrics, judged, calibration = judge_now(c, model, data, inputs)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    history = state["history"]
    if history:
        history[-1].update({key: metrics.get(key) for key in CURVES})
    save({**state, "calibration": calibration._asdict()})
    if c["pictures"]:
        ev.draw_examples(Path(c["out"]) / "examples.png", {"": (model, inputs, judged)},
                         data, command)
    return {"command": command, "config": c, "versions": versions(c["device"]),
            "history": history, "metrics": metrics}


def versions(device):
    """What a result may depend on besides the config."""
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "torchvision": torchvision.__version__, "threads": torch.get_num_threads(),
            "machine": machine_name(device)}


def machine_name(device):
    """The model of the GPU or of the processor, as it calls itself."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    if sys.platform == "linux":
        found = re.search(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text())
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def print_start(c, data, inputs):
    """Print what is trained on what, and all options."""
    anomalies = int(data.labels.sum())
    normals = len(data.labels) - anomalies
    print(f"{c['model']} on {c['dataset']} {c['normal']}: {len(inputs.train)} normal "
          f"images to train on, {len(inputs.calibration)} set aside for the threshold.")
    print(f"To test: {normals} normal images and {anomalies} anomalous ones.")
    print("options:", *(f"{key}={value}" for key, value in c.items()))
    if c.get("amp"):
        print("Products of matrices are computed in bfloat16, which is faster here.")


def print_interrupted(out):
    print(f"\ninterrupted: judging the last full epoch. python train.py --resume "
          f"{shlex.quote(out)} goes on from it")


def print_end(record):
    """Print the metrics, where the run and its picture lie, and what to try next."""
    c, out = record["config"], shlex.quote(record["config"]["out"])
    print(f"\n{ev.report(record['metrics'], c['fpr'])}")
    epochs = f"{len(record['history'])} epochs, " if record["history"] else ""
    picture = f"; look at {out}/examples.png" if c["pictures"] else ""
    print(f"{epochs}{record['seconds']:.0f} s. The run is in {out}{picture}.")
    if "lamp" in c and not c["lamp"]:
        print("Next: amplify the loss (--lamp), learn another class (--normal), or "
              f"judge again: python evaluate.py {out}")


# ---- the command line ----

def parser():
    """The options that a reader of the papers turns, in groups."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Options without a default here have one that depends on the model and "
               "the data set: see DEFAULTS in train.py. It has further keys, to be set "
               "from Python.")
    add_data_and_model(p)
    add_loss_and_training(p)
    add = p.add_argument_group("this run").add_argument
    add("--out", help="its folder (runs/DATASET-NORMAL-MODEL-LOSS[-lamp]-sSEED, and "
                      "the options that are not the usual ones)")
    add("--overwrite", action="store_true", help="replace the run that is there")
    add("--resume", metavar="RUN", help="go on with this run, with all of its options")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="default: auto")
    return p


def add_data_and_model(p):
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, help="default: digits")
    add("--normal", help="classes, as 3 or 0,1,2 (default: 0), or products (all)")
    add("--data-dir", help="the folder where data sets are (default: data)")
    add("--image-size", type=int, help="the side in pixels")

    add = p.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, help="what reconstructs (default: ae)")
    add("--depth", type=int, help="layers; of ae and uniad: on each side")
    add("--latent", type=int, help="ae: the channels of its code")
    add("--kernel-size", type=int, help="ae: the side of its kernels, odd")
    add("--patches", type=int, help="ae: n, for n x n patches reconstructed separately")
    add("--backbone", choices=("none", *STAGES), help="the frozen CNN")
    add("--neighbors", type=int, help="uniad: the side of its mask, 0 for none")
    add("--jitter", type=float, help="uniad: the scale of its feature jitter")
    add("--query", choices=QUERIES, help="uniad: which decoder layers learn one")
    add("--start", choices=STARTS, help="uniad: its first weights")


def add_loss_and_training(p):
    add = p.add_argument_group("loss").add_argument
    add("--loss", choices=BASE_LOSSES, help="the reconstruction loss (default: l2)")
    add("--lamp", action="store_true", help="amplify it: Eq. 1 and 2 of the LAMP paper")
    add("--eps", type=float, help="LAMP, Eq. 2: epsilon (default: .03)")
    add("--over", choices=("image", "batch"), help="LAMP, Eq. 2: the maximum's scope")
    add("--detach", action=argparse.BooleanOptionalAction,
        help="LAMP, Eq. 2: no gradient flows through the maximum (default)")

    add = p.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images for one step")
    add("--lr", type=float, help="the learning rate")
    add("--optimizer", choices=OPTIMIZERS, help="sgd has a momentum of .9")
    add("--seed", type=int, help="of weights, order and images set aside (default: 0)")


def config_of(argv):
    """The command line -> (config, whether to resume). Raises ValueError."""
    given = vars(parser().parse_args(argv))
    overwrite = given.pop("overwrite", False)
    if out := given.pop("resume", None):
        if overwrite:
            raise ValueError("--resume goes on with a run, --overwrite replaces it: "
                             "give one of them")
        return resumed_config(out, given), True
    c = with_defaults(given)
    # A run that is damaged, or of another version, can be replaced as well.
    state = None if overwrite else saved_run(c["out"])
    if state:
        out = shlex.quote(c["out"])
        epochs = len(state["history"])
        raise ValueError(f"{out} already holds a run of {epochs} epochs: "
                         f"--resume {out} goes on with it, --overwrite replaces it, "
                         "--out names another folder")
    return c, False


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if hasattr(sys.stdout, "reconfigure"):                  # names in any script
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        config, resume = config_of(argv)
        command = shlex.join(["python", "train.py", *argv])
        record = run(config, resume=resume, command=command)
    except (ValueError, OSError, FloatingPointError) as error:
        parser().exit(2, f"train.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(130, "\ninterrupted\n")
    raise SystemExit(130 if record.get("interrupted") else 0)


if __name__ == "__main__":
    main()
