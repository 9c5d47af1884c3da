"""Train: one loop for every model here, and the command that wires everything together.

    python train.py                                         # digits, 15 seconds, no download
    python train.py --dataset mnist --normal 3 --loss l2 --lamp

Every model reconstructs its input, so one loop, `fit`, trains them all. The LAMP paper in
one line: train on normal images alone, with an amplified loss; judge by the L2 error.

A run is made from a config, a dict. The command line sets the options that a reader of
the papers turns. DEFAULTS holds all keys; from Python any of them can be set:

    import train
    record = train.run({"dataset": "mnist", "normal": "3", "lamp": True, "width": 32})

On a CPU, the same command repeats to the last bit with the same number of threads.
"""
import argparse
import functools
import io
import json
import math
import os
import re
import shlex
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn

import evaluate as ev
from data import DATASETS, to_float
from lamp_loss import BASE_LOSSES, ReconstructionLoss
from uniad import STAGES

# ---- defaults: every key of a config, by model ----

COMMON = dict(
    dataset="digits", normal=None, data_dir="data", validate=False, seed=0, fpr=0.05,
    device="auto", eval_every=None, pictures=True)
TRAINED = dict(
    loss="l2", lamp=False, eps=0.03, over="image", detach=True, epochs=None, clip=0.0)
BY_ADAM = dict(
    optimizer="adam", lr=1e-3, schedule="cosine", weight_decay=0.0, batch_size=32, amp=False)
BY_MUON = dict(
    optimizer="muon", lr=0.01, schedule="warmup-cosine", weight_decay=1e-4, batch_size=8,
    amp="auto")
PIXELS = dict(backbone="none", image_size=32, score="sum")
FEATURES = dict(
    backbone="efficientnet_b4", backbone_weights="imagenet", image_size=224, standardize=True,
    strides=(2, 4, 8, 16), grid_stride=16, score="mean")
TRANSFORMER = dict(
    steps=1000, depth=4, width=256, neighbors=0, jitter=0.0, dropout=0.0, query="first")

DEFAULTS = {                            # a key that means nothing to a model is not in its row
    "ae": COMMON | PIXELS | TRAINED | BY_ADAM | dict(
        steps=1400, depth=4, width=16, latent=None, kernel_size=3, patches=1),
    "pca": COMMON | PIXELS | dict(components=8),
    "uniad": COMMON | FEATURES | TRAINED | BY_MUON | TRANSFORMER | dict(
        neighbors=7, jitter=5.0, query="layerwise"),
    "transformer": COMMON | FEATURES | TRAINED | BY_MUON | TRANSFORMER,
    "cnn": COMMON | FEATURES | TRAINED | BY_MUON | dict(steps=1500, depth=6, width=128, lr=0.02),
    "mlp": COMMON | FEATURES | TRAINED | BY_MUON | dict(steps=500, depth=5, width=1520, lr=0.02),
    "nearest": COMMON | FEATURES | dict(bank_images=800, coreset=1.0),
}
PRODUCTS = ("mvtec", "photos")          # data sets whose products lie still
ON_PRODUCTS = {                         # there, these defaults instead
    "ae": dict(image_size=64, depth=5, latent=16, batch_size=8),
    "pca": dict(image_size=64),
}


def with_defaults(given):
    """A config with any keys -> one with all keys of its model. `epochs` may stay None.

    Raises ValueError for a key that the model does not have, and for values that are out
    of range or exclude each other.
    """
    given = {key: value for key, value in given.items() if value is not None}
    model, dataset = given.get("model", "ae"), given.get("dataset", "digits")
    c = {"model": model, **DEFAULTS[model]}
    if given.get("backbone", "none") != "none":
        c |= FEATURES                                       # PCA of features
    c["normal"] = "0"
    if dataset in PRODUCTS:
        c |= {"normal": "all", "score": "standardized"} | ON_PRODUCTS.get(model, {})
        if given.get("backbone", "none") != "none":
            c["image_size"] = FEATURES["image_size"]
    if model == "ae" and dataset == "digits":
        c["steps"] = 400                                    # they are small and few
    if c.get("optimizer") == "muon" and given.get("optimizer", "muon") != "muon":
        c["lr"] /= 20                                       # Muon's own ratio to Adam's rate
    for key in given:
        if key not in c and key not in ("out", "white"):
            raise ValueError(f"{flag(key)} means nothing to the model {model}: leave it out")
    c |= given
    c.setdefault("out", default_folder(c))
    check(c)
    c["device"] = pick_device(c["device"])
    return c


def default_folder(c):
    """runs/DATASET-NORMAL-MODEL-LOSS[-lamp]-sSEED, without the loss if there is none."""
    words = [c["dataset"], c["normal"], c["model"]]
    if "loss" in c:
        words += [c["loss"], "lamp"] if c["lamp"] else [c["loss"]]
    name = "-".join([*words, f"s{c['seed']}"])
    return "runs/" + re.sub(r"[^\w.,-]", "_", name)


def flag(key):
    return "--" + key.replace("_", "-")


def check(c):
    """Raise ValueError where values are out of range or exclude each other."""
    above_zero = ("image_size", "depth", "patches", "epochs", "batch_size", "lr", "width",
                  "fpr", "latent", "bank_images", "coreset")
    for key, value in c.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            below = 1 if key in ("fpr", "dropout") else 2 ** 63
            low_enough = value < below                      # not a number is neither
            high_enough = value > 0 or (value == 0 and key not in above_zero)
            if not (low_enough and high_enough):
                raise ValueError(f"{flag(key)} {value}: expected a number "
                                 f"{'above 0' if key in above_zero else 'of 0 or more'}"
                                 f"{' and below 1' if below == 1 else ''}")
    model, features = c["model"], c["backbone"] != "none"
    if model != "pca" and features != (model != "ae"):
        raise ValueError(f"--model {model} --backbone {c['backbone']}: ae sees the image, pca "
                         "the image or features, all others features. Leave out --backbone")
    if features and c.get("loss") == "ssim":
        raise ValueError("--loss ssim compares images in [0, 1]. With CNN features use l1 or l2")
    if model in ("uniad", "transformer") and c["width"] % 8:
        raise ValueError(f"--width {c['width']}: 8 heads share it, so use a multiple of 8")
    grid = c["image_size"] // 16
    if c.get("neighbors") and c["neighbors"] // 2 >= grid // 2:
        raise ValueError(f"--neighbors {c['neighbors']} hides the whole grid of {grid}x{grid} "
                         "tokens from some of them: use fewer, or a larger --image-size")


def pick_device(name):
    """ "auto" -> the first of cuda, mps and cpu that is there. ValueError: none is."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        return next(device for device in there if there[device])
    if not there[name]:
        raise ValueError(f"--device {name}: PyTorch finds none here. Leave it out")
    return name


# ---- the loop ----

def fit(model, inputs, criterion, targets=None, *, epochs=10, batch_size=32, lr=1e-3,
        optimizer="adam", schedule="cosine", weight_decay=0.0, clip=0.0, seed=0, amp=False,
        prepare=to_float, resume=None, evaluate=lambda epoch: {}, save=lambda state: None):
    """Train a model to reconstruct its inputs, or to predict targets -> history.

    inputs: (N, C, H, W) as they are stored; prepare makes of them what the model sees.
    targets: (N, ...), or None for the inputs themselves.
    criterion(x_hat, x) -> a scalar, the sum over the values of an image (Eq. 1 of LAMP).
    It is divided by their number, so that one learning rate holds at every image size.
    After each epoch evaluate(epoch) -> metrics for the history, a dict for each epoch,
    and save(state); resume: such a state. Raises FloatingPointError where the loss is
    not finite.
    """
    device, rank = next(model.parameters()).device, processes()[0]
    order = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last)             # convolves twice as fast on a CPU
    network = in_processes(model)
    optim = OPTIMIZERS[optimizer](model, lr, weight_decay)
    history = restore(resume, optim, order) if resume else []

    for epoch in range(len(history) + 1, epochs + 1):
        start, means = time.perf_counter(), torch.zeros(2)  # of the loss and the base error
        batches = torch.randperm(len(inputs), generator=order).split(batch_size)
        model.train()
        for step, index in enumerate(batches):
            # Take the batch as the model sees it. Several processes share its images.
            mine, weight = share_of(index)
            x = prepare(inputs[mine].to(device)).contiguous(memory_format=torch.channels_last)
            target = x if targets is None else targets[mine].to(device)

            # Reconstruct it, and compare. LAMP needs the precision of float32.
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x_hat = network(x)
            values = target[0].numel()
            loss = criterion(x_hat.float(), target) / values
            check_finite(loss, lr, f"epoch {epoch}, step {step + 1}")

            # Step, at the learning rate that the schedule has come to.
            progress = (epoch - 1 + step / len(batches)) / epochs
            set_rate(optim, lr * SCHEDULES[schedule](progress))
            optim.zero_grad()
            (loss * weight).backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                optim.step()                                # Muon multiplies matrices, too

            both = torch.stack([loss.detach(), base_error_of(criterion, loss, values)])
            means += both.cpu() * (len(mine) / len(inputs))

        history.append(record_epoch(epoch, means, time.perf_counter() - start))
        if rank == 0:
            history[-1].update(evaluate(epoch))
            print_epoch(history, epochs)
            save(snapshot(optim, order, history))
    return history


def base_error_of(criterion, loss, values):
    """A value's error before amplification, or the loss where there is no such thing."""
    base = getattr(criterion, "base_error", None)
    return loss.detach() if base is None else base / values


def check_finite(loss, lr, where):
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()} at {where}: try --lr {lr / 10:.1g}. "
                                 "The last full epoch is kept")


def record_epoch(epoch, means, seconds):
    """The history's entry of an epoch. means: this process's part of loss and base error."""
    if dist.is_initialized():
        dist.all_reduce(means)
    return {"epoch": epoch, "loss": float(means[0]), "base_error": float(means[1]),
            "seconds": round(seconds, 3)}


def print_epoch(history, epochs):
    """A line that stays for every tenth of the epochs. A terminal shows the others briefly."""
    now = history[-1]
    auroc = now.get("image_auroc")
    judged = "" if auroc is None else f"   image AUROC {auroc:.4f}"
    left = sum(h["seconds"] for h in history) / len(history) * (epochs - len(history))
    stays = judged or now["epoch"] % max(1, epochs // 10) == 0 or now["epoch"] == epochs
    if stays or sys.stdout.isatty():
        print(f"epoch {now['epoch']:>4}/{epochs}   loss {now['loss']:.5f}   base error "
              f"{now['base_error']:.5f}{judged}   {left:.0f} s left   ",
              end="\n" if stays else "\r", flush=True)


@torch.no_grad()
def reestimate_batch_norm(model, batches):
    """Compute batch norm's running statistics anew, as a plain average over `batches`.

    batches: tensors as the model sees them. With PyTorch's momentum of 0.1 the running
    statistics remember about ten batches, and at batch size 1 ten images. Training never
    reads them, and no random number is drawn, so this does not change the training.
    """
    model.eval()                                            # no dropout meanwhile
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                # PyTorch's sign for a plain average
        norm.train()
    for x in batches:
        model(x)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


# ---- optimizers (LAMP, Sec. 3.1) and schedules ----

@torch.no_grad()
def orthogonalize(g):
    """The orthogonal matrices U V^T nearest to g = U S V^T, roughly: (n, rows, columns).

    Five steps of a Newton-Schulz iteration. They bring singular values above a hundredth
    of the norm |g| to between 0.7 and 1.2.
    """
    x = g if g.shape[1] <= g.shape[2] else g.mT             # the smaller product is computed
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                                      # x <- 3.4445 x - 4.775 x^3 + ...
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """Muon (Keller Jordan 2024, github.com/KellerJordan/Muon): matrices turn, they don't grow.

        M <- .95 M + .05 G
        W <- W - lr (weight_decay W + sqrt(max(1, rows/columns)) orthogonalize(.95 M + .05 G))

    This moves the weights W of linear layers and of convolutions, which are taken as
    matrices (out, in k k). G is the gradient. All other parameters (queries, positions,
    norms, biases, and the maps named "project" into and out of the layers) take Adam's
    step at lr / 20, without weight decay.

    torch.optim.Muon refuses convolutions. It also casts to bfloat16, which a CPU without
    hardware for it emulates: a step of UniAD then takes 25 s instead of 0.8 s.
    """

    def __init__(self, model, lr, weight_decay):
        rest, by_shape = [], {}                             # equal shapes are moved together
        for name, p in model.named_parameters():
            if name.endswith("weight") and p.dim() > 1 and "project" not in name:
                by_shape.setdefault(p.shape, []).append(p)
            else:
                rest.append(p)
        groups = [dict(params=rest, muon=False, weight_decay=0.0, lr=lr / 20, lr_ratio=1 / 20)]
        for weights in by_shape.values():
            groups.append(dict(params=weights, muon=True))
        super().__init__(groups, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["muon"]:
                self.move_matrices(group["params"], group["lr"], group["weight_decay"])
        super().step()                                      # AdamW moves what has a gradient left

    def move_matrices(self, weights, lr, weight_decay):
        """One step for weights of one shape, (out, ...). Their gradients become None."""
        directions = []
        for w in weights:
            state = self.state[w]
            if not state:                                   # AdamW expects `step` to be there
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


def sgd(model, lr, weight_decay):
    return torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=weight_decay)


def rmsprop(model, lr, weight_decay):
    return torch.optim.RMSprop(model.parameters(), lr, weight_decay=weight_decay)


def adam(model, lr, weight_decay):
    return torch.optim.Adam(model.parameters(), lr, weight_decay=weight_decay, fused=True)


def adamw(model, lr, weight_decay):
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True)


OPTIMIZERS = {"sgd": sgd, "rmsprop": rmsprop, "adam": adam, "adamw": adamw, "muon": Muon}


def cosine(progress):
    return 0.5 * (1 + math.cos(math.pi * progress))


SCHEDULES = {                           # progress in [0, 1) -> the factor of the learning rate
    "constant": lambda progress: 1.0,
    "cosine": cosine,
    "step": lambda progress: 1.0 if progress < 0.8 else 0.1,        # UniAD: epoch 800 of 1000
    "warmup-cosine": lambda progress: min(1.0, 0.1 + 18 * progress) * cosine(progress),
}


def set_rate(optim, lr):
    """Set the learning rate. Muon's group for Adam's steps keeps its ratio to it."""
    for group in optim.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)


def bfloat16_is_faster(device):
    """Whether products of matrices take less time in bfloat16 than in float32 here.

    A CPU without hardware for bfloat16 emulates it and is a dozen times slower. Measuring
    takes some milliseconds.
    """
    if device != "cpu":
        return device == "cuda"
    fastest = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(256, 256, dtype=dtype)
        seconds = []
        for _ in range(5):                                  # the first one warms up
            start = time.perf_counter()
            x @ x
            seconds.append(time.perf_counter() - start)
        fastest[dtype] = min(seconds)
    return fastest[torch.bfloat16] < fastest[torch.float32]


# ---- several processes: torchrun --nproc-per-node=2 train.py ... ----

def join_processes(device):
    """Under torchrun join the other processes, of which only the first prints -> device."""
    if "LOCAL_RANK" not in os.environ:
        return torch.device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    return torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device)


def processes():
    """This process's rank, and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def in_processes(model):
    """The model, in several processes one that averages its gradients over them."""
    return nn.parallel.DistributedDataParallel(model) if processes()[1] > 1 else model


def share_of(index):
    """This process's part of a batch, and the weight of its loss.

    With the weight, the mean of all processes' gradients is that of the whole batch, if
    the loss is a sum over images. (LAMP's maximum over="batch" is that of the part.)
    """
    rank, count = processes()
    if len(index) < count:
        raise ValueError(f"a batch of {len(index)} images is too small for {count} processes: "
                         "use another --batch-size")
    mine = index[rank::count]
    return mine, len(mine) * count / len(index)


# ---- saving and resuming ----

def snapshot(optim, order, history):
    """What `restore` needs, as tensors and plain values."""
    return {"optimizer": optim.state_dict(), "order": order.get_state(),
            "rng": torch.get_rng_state(), "history": history}


def restore(state, optim, order):
    """Put the optimizer and the random numbers back to a snapshot's -> its history."""
    optim.load_state_dict(state["optimizer"])
    order.set_state(state["order"])
    torch.set_rng_state(state["rng"])                       # dropout and jitter draw from it
    return list(state["history"])


class RunFolder:
    """Where a run is saved. It notices when another training has begun in the same folder."""

    def __init__(self, path):
        self.path = Path(path)
        self.token = uuid.uuid4().hex

    def claim(self):
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "writer.txt").write_text(self.token)

    def save(self, state):
        """Write model.pt. Raises ValueError where another training has claimed the folder.

        It is written beside its place and then moved there, so that an interruption never
        leaves a broken file.
        """
        if (self.path / "writer.txt").read_text() != self.token:
            raise ValueError(f"another training has begun in {self.path}: this one stops, and "
                             "leaves it alone. Name another --out")
        buffer = io.BytesIO()                               # a full disk is then a plain OSError
        torch.save(state, buffer)
        part = self.path / "model.tmp"
        part.write_bytes(buffer.getbuffer())
        for name in ("run.json", "examples.png"):           # they are of an earlier state
            (self.path / name).unlink(missing_ok=True)
        os.replace(part, self.path / "model.pt")


def saved_run(out):
    """The state of the run in a folder, or None where no epoch of it was finished."""
    if not (Path(out) / "model.pt").exists():
        return None
    state = ev.load_run(out, finished=False)[0]
    return state if state["history"] or "calibration" in state else None


def resumed_config(out, given):
    """The config of the run in `out`, with what may change -> config.

    Only device, data_dir and, where the learning rate is constant, epochs may change.
    """
    state = saved_run(out)
    if state is None:
        raise ValueError(f"{out} holds no run to go on with")
    c = {**state["config"], "out": str(out)}
    for key, value in given.items():
        if key == "epochs" and c.get("schedule") != "constant" and value != c.get("epochs"):
            raise ValueError(f"--epochs {value}: the learning rate of this run was planned for "
                             f"{c.get('epochs')} epochs. Train anew, with another --out")
        if key not in ("epochs", "device", "data_dir"):
            raise ValueError(f"--resume takes {flag(key)} from the run: leave it out")
        c[key] = value
    c["device"] = pick_device(c["device"])
    return c


# ---- a run ----

CURVES = ("image_auroc", "pixel_auroc", "normal_error", "anomaly_error", "distance_to_identity")


def run(config, data=None, criterion=None, resume=False, command="train.run", report=True):
    """One run, from a config to a folder on disk -> its record, as in run.json.

    config: any keys of DEFAULTS. data: a Data, where it does not come from data.load.
    criterion: what to train by, in place of the config's loss.
    resume: go on with the run in config["out"], if one is there, with that run's config.
    command: what made it, for the record. report: print what is learned, and the result.
    After Ctrl-C the last full epoch is judged, and the record says "interrupted".
    """
    started = time.perf_counter()
    torch.set_flush_denormal(True)                          # LAMP's tiny gradients are slow
    c = with_defaults(config)
    folder = RunFolder(c["out"])
    state = saved_run(c["out"]) if resume else None
    if state:
        c = resumed_config(c["out"], {"device": c["device"], "data_dir": c["data_dir"]})
    device, rank = join_processes(c["device"]), processes()[0]
    data, inputs, backbone = ev.open_data(c, device, state, data)
    settle(c, len(inputs.train))
    if report:
        print_start(c, data, inputs)

    model, state = first_model(c, inputs, backbone, device, rank, state)
    fixed = {"version": ev.VERSION, "config": c, "fingerprint": ev.fingerprint_of(data),
             "shape": shape_of(inputs), "image": list(data.train.shape[1:]),
             "backbone": backbone and (backbone.mean.cpu(), backbone.std.cpu())}

    def save(progress):
        folder.save({**progress, **fixed, "model": model.state_dict()})

    if rank == 0:
        folder.claim()
        save(state)                                         # where this fails, it fails now
    interrupted = train_model(c, model, inputs, criterion, state, save, functools.partial(
        curve_point, c=c, model=model, data=data, inputs=inputs))
    if rank > 0:
        return {}
    record = finish(c, model, data, inputs, save, command)
    record |= {"seconds": round(time.perf_counter() - started, 2), "interrupted": interrupted}
    (folder.path / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if report:
        print_end(record)
    return record


def settle(c, images):
    """Set what depends on the number of images or on the machine: epochs, eval_every, amp."""
    if "epochs" in c:
        if c["epochs"] is None:
            c["epochs"] = max(1, round(c["steps"] / math.ceil(images / c["batch_size"])))
        if c["eval_every"] is None:
            c["eval_every"] = max(1, c["epochs"] // 4)
        if c["amp"] == "auto":
            c["amp"] = bfloat16_is_faster(c["device"])


def shape_of(inputs):
    """(C, H, W) of what the model sees."""
    return list(inputs.train.shape[1:])


def first_model(c, inputs, backbone, device, rank, state):
    """The model before training, or as it was saved, or solved -> model, state."""
    bank_tokens, bank = 0, None
    if c["model"] == "nearest":
        bank, numbers = bank_features(c, inputs)
        tokens = len(bank) * bank[0, 0].numel()
        bank_tokens = len(state["model"]["bank"]) if state else max(1, round(c["coreset"] * tokens))
    torch.manual_seed(c["seed"] + rank)                     # each process jitters on its own
    model = ev.build_model(c, shape_of(inputs), bank_tokens).to(device)
    if state:
        model.load_state_dict(state["model"])
        return model, state
    if c["model"] == "pca":
        model.solve(inputs.prepare(inputs.train.to(device)))
    if c["model"] == "nearest":
        model.solve(inputs.prepare(bank.to(device)), numbers)
    return model, {"history": []}


def bank_features(c, inputs):
    """What the bank of nearest tokens holds: features (N, C, g, g), and their numbers (N,).

    Of the normals at most `bank_images` are drawn, always the same ones, and with each
    the copies made of it.
    """
    order = torch.randperm(len(inputs.train), generator=torch.Generator().manual_seed(0))
    drawn = order[:c["bank_images"]]
    if inputs.copies is None:
        return inputs.train[drawn], drawn
    kept = torch.isin(inputs.copy_of, drawn)
    features = torch.cat([inputs.train[drawn], inputs.copies[kept]])
    return features, torch.cat([drawn, inputs.copy_of[kept]])


def train_model(c, model, inputs, criterion, state, save, evaluate):
    """Train by the config -> whether Ctrl-C has ended it after at least one epoch."""
    if c["model"] in ev.SOLVED:
        return False
    if criterion is None:
        criterion = ReconstructionLoss(c["loss"], c["lamp"], c["eps"], c["over"], c["detach"])
    chosen = {key: c[key] for key in ("epochs", "batch_size", "lr", "optimizer", "schedule",
                                      "weight_decay", "clip", "seed", "amp")}
    try:
        fit(model, inputs.train, criterion, **chosen, prepare=inputs.prepare,
            resume=state if state["history"] else None, evaluate=evaluate, save=save)
    except KeyboardInterrupt:
        if saved_run(c["out"]) is None:
            raise
        print(f"\ninterrupted: judging the last full epoch. python train.py --resume {c['out']} "
              "goes on from it")
        return True
    return False


def judge_now(c, model, data, inputs):
    """Re-estimate batch norm's statistics, then judge -> as `evaluate.judge`."""
    batches = inputs.train.tensor_split(-(-len(inputs.train) // 256))
    reestimate_batch_norm(model, (inputs.prepare(x.to(c["device"])) for x in batches))
    return ev.judge(model, c, data, inputs)


def curve_point(epoch, c, model, data, inputs):
    """AUROC for the history, every `eval_every` epochs. Nothing is chosen by it."""
    due = c["eval_every"] and epoch % c["eval_every"] == 0 and epoch < c["epochs"]
    metrics = judge_now(c, model, data, inputs)[0] if due else {}
    return {key: metrics.get(key) for key in CURVES}


def finish(c, model, data, inputs, save, command):
    """Judge the last full epoch, save its calibration, draw examples -> the record."""
    state, last_full_epoch = ev.load_run(c["out"], finished=False)
    model.load_state_dict(last_full_epoch.state_dict())
    metrics, judged, calibration = judge_now(c, model, data, inputs)
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    history = state["history"]
    if history:
        history[-1].update({key: metrics.get(key) for key in CURVES})
    save({**state, "calibration": calibration._asdict()})
    if c["pictures"]:
        ev.draw_examples(Path(c["out"]) / "examples.png", {"": (model, inputs, judged)}, data,
                         command)
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "torchvision": torchvision.__version__, "threads": torch.get_num_threads()}
    return {"command": command, "config": c, "versions": versions, "history": history,
            "metrics": metrics}


def print_start(c, data, inputs):
    """What is trained on what, and the options that differ from the defaults."""
    anomalies = int(data.labels.sum())
    print(f"{c['model']} on {c['dataset']} {c['normal']}: {len(inputs.train)} normal images to "
          f"train on, {len(inputs.calibration)} set aside for the threshold; to test "
          f"{len(data.labels) - anomalies} normal and {anomalies} anomalous ones")
    usual = with_defaults({"model": c["model"], "dataset": c["dataset"], "backbone": c["backbone"]})
    settle(usual, len(inputs.train))
    for title, differ in (("chosen", True), ("default", False)):
        words = [f"{key}={c[key]}" for key in c if (c[key] != usual.get(key)) == differ]
        print(f"{title}: {' '.join(words)}")
    if usual.get("amp") and c["amp"]:
        print("bfloat16 is faster here, and is used where that is safe")


def print_end(record):
    """The metrics, where the run lies, and what to try next."""
    c = record["config"]
    out = shlex.quote(c["out"])
    print(f"\n{len(record['history'])} epochs, {record['seconds']:.0f} s. The run is in {out}"
          f"{': examples.png shows it' if c['pictures'] else ''}")
    if "lamp" in c and not c["lamp"]:
        print("Next: --lamp amplifies the loss; --normal names another class")
    print(ev.report(record["metrics"], c["fpr"]))


# ---- the command line ----

def known_dataset(name):
    if name == "folder":
        raise argparse.ArgumentTypeError("your own photos are learned by: python photos/learn.py "
                                         "FOLDER")
    return name


def parser():
    """The options that a reader of the papers turns, in groups."""
    p = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="Options without a default here have one that depends on the model and the data "
               "set: see DEFAULTS in train.py. It has further keys, to be set from Python.")
    add = p.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, type=known_dataset, help="default: digits, no download")
    add("--normal", help="classes, such as 3 or 0,1,2 (default: 0), or products (default: all)")
    add("--data-dir", help="the folder where data sets are (default: data)")
    add("--image-size", type=int, help="the side in pixels")

    add = p.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, help="what reconstructs (default: ae, the autoencoder)")
    add("--depth", type=int, help="the number of layers; of ae, uniad: on each side")
    add("--latent", type=int, help="ae: the channels of its code")
    add("--kernel-size", type=int, help="ae: the side of its kernels, odd")
    add("--patches", type=int, help="ae: n, to reconstruct n x n patches separately")
    add("--backbone", choices=("none", *STAGES), help="the frozen CNN; none: sees the image")
    add("--neighbors", type=int, help="uniad: the side of its neighbor mask, 0 for none")
    add("--jitter", type=float, help="uniad: the scale of its feature jitter, 0 for none")
    add("--query", choices=("layerwise", "first", "none"), help="uniad: which layers learn one")

    add = p.add_argument_group("loss").add_argument
    add("--loss", choices=BASE_LOSSES, help="the reconstruction loss (default: l2)")
    add("--lamp", action="store_true", help="amplify it: Eq. 1 and 2 of the LAMP paper")
    add("--eps", type=float, help="LAMP, Eq. 2: epsilon (default: .03)")
    add("--over", choices=("image", "batch"), help="LAMP, Eq. 2: what the maximum is over")
    add("--detach", action=argparse.BooleanOptionalAction,
        help="LAMP, Eq. 2: no gradient flows through the maximum (default)")

    add = p.add_argument_group("training").add_argument
    add("--epochs", type=int, help="passes over the training images")
    add("--batch-size", type=int, help="images for one step")
    add("--lr", type=float, help="the learning rate")
    add("--optimizer", choices=OPTIMIZERS, help="sgd has a momentum of .9")
    add("--seed", type=int, help="of weights, order and images set aside (default: 0)")

    add = p.add_argument_group("this run").add_argument
    add("--out", help="its folder (default: runs/DATASET-NORMAL-MODEL-LOSS[-lamp]-sSEED)")
    add("--overwrite", action="store_true", help="replace the run that is there")
    add("--resume", metavar="RUN", help="go on with this run, with all of its options")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), help="default: the first there is")
    return p


def config_of(argv):
    """The command line -> (config, whether to resume). Raises ValueError."""
    given = vars(parser().parse_args(argv))
    if out := given.pop("resume", None):
        return resumed_config(out, given), True
    overwrite = given.pop("overwrite", False)
    c = with_defaults(given)
    state = saved_run(c["out"])
    if state and not overwrite:
        raise ValueError(f"{c['out']} already holds a run of {len(state['history'])} epochs: "
                         f"--resume {shlex.quote(c['out'])} goes on with it, --overwrite "
                         "replaces it, --out names another folder")
    return c, False


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")     # names in any script
    try:
        config, resume = config_of(argv)
        command = shlex.join(["python", "train.py", *argv])
        record = run(config, resume=resume, command=command)
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser().exit(2, f"train.py: {error}\n")
    except KeyboardInterrupt:
        parser().exit(130, "\ninterrupted\n")
    raise SystemExit(130 if record.get("interrupted") else 0)


if __name__ == "__main__":
    main()
