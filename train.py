"""Train: one loop for every model here, and the command that wires everything together.

    python train.py                                         # digits, 15 seconds, no download
    python train.py --dataset mnist --normal 3 --loss l2 --lamp

The LAMP paper in one line: train on one class with an amplified loss, judge by the L2 error. `fit`
steps on Eq. 1's sum divided by C H W, a constant, so that one learning rate and one clip hold at
every image size. On a CPU a command repeats to the last bit, with the same --threads.
"""
import argparse
import functools
import json
import math
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn

import evaluate as ev
from autoencoder import NearestToken, reestimate_batch_norm, turned
from data import DATASETS, FOLDERS, cached_features, to_float
from lamp_loss import (BASE_LOSSES, OPTIMIZERS, SCHEDULES, ReconstructionLoss, draw_batches,
                       print_epoch, processes, record_epoch, restore, set_epochs, share_of,
                       snapshot, start_process, take_step, write_checkpoint)
from uniad import Backbone

B4, WARM, YES_NO = "efficientnet_b4", "warmup-cosine", argparse.BooleanOptionalAction
MODELS = ("ae", "pca", "nearest", "uniad", "transformer", "cnn", "mlp")
DEFAULTS = {                                                # all that depend on the model
    #                ae        pca       nearest   uniad        transformer  cnn     mlp
    "backbone":     ("none",   "none",   B4,       B4,          B4,          B4,     B4),
    "image_size":   (32,       32,       224,      224,         224,         224,    224),
    "depth":        (4,        1,        1,        4,           4,           6,      5),
    "width":        (16,       0,        0,        256,         256,         128,    1520),
    "latent":       (None,     8,        800,      0,           0,           0,      0),
    "steps":        (1400,     0,        0,        1000,        1000,        1500,   500),
    "batch_size":   (32,       0,        0,        8,           8,           8,      8),
    "lr":           (1e-3,     0.0,      0.0,      0.01,        0.01,        0.02,   0.02),
    "optimizer":    ("adam",   "adam",   "adam",   "muon",      "muon",      "muon", "muon"),
    "schedule":     ("cosine", "cosine", "cosine", WARM,        WARM,        WARM,   WARM),
    "weight_decay": (0.0,      0.0,      0.0,      1e-4,        1e-4,        1e-4,   1e-4),
    "neighbors":    (0,        0,        0,        7,           0,           0,      0),
    "jitter":       (0.0,      0.0,      0.0,      5.0,         0.0,         0.0,    0.0),
    "query":        ("none",   "none",   "none",   "layerwise", "first",     "none", "none"),
    "score":        ("sum",    "sum",    "mean",   "mean",      "mean",      "mean", "mean"),
}
ON_FOLDERS = {model: dict(score="standardized") for model in MODELS}        # there, these instead
ON_FOLDERS["ae"] |= dict(image_size=64, depth=5, latent=16, batch_size=8)
ON_FOLDERS["pca"] |= dict(image_size=64)
MAY_CHANGE = "eval_every", "pictures", "out", "data_dir", "device", "threads", "resume", "overwrite"
CURVES = ("image_auroc", "pixel_auroc", "normal_error", "anomaly_error", "from_identity")


# ---- the loop ----

def fit(model, inputs, criterion, targets=None, *, epochs=10, batch_size=32, lr=1e-3,
        optimizer="adam", schedule="cosine", weight_decay=0.0, clip=0.0, seed=0, amp=False,
        prepare=to_float, smallest=1, resume=None, evaluate=lambda epoch: {}, save=lambda s: None):
    """Train model to reconstruct inputs (N, C, H, W), or to predict targets (N, ...) from them.

    criterion(x_hat, x) -> scalar, a sum over C, H, W; prepare: stored inputs -> the model's;
    smallest: images a batch needs. Each epoch ends with evaluate(epoch) -> metrics for the history,
    and save(state); resume: such a state. -> history, a dict an epoch. Raises FloatingPointError
    (loss not finite), ValueError (a batch below `smallest`)."""
    device, (rank, count) = next(model.parameters()).device, processes()
    order = torch.Generator().manual_seed(seed)
    model.to(memory_format=torch.channels_last)             # twice as fast to convolve on a CPU
    network = nn.parallel.DistributedDataParallel(model) if count > 1 else model
    optim = OPTIMIZERS[optimizer](model, lr, weight_decay)
    optim.amp = amp                                         # for take_step
    history = restore(resume, optim, order) if resume else []
    for epoch in range(len(history) + 1, epochs + 1):
        start, means = time.perf_counter(), torch.zeros(2)  # of the loss and of the base error
        batches = draw_batches(len(inputs), batch_size, order, smallest * count)
        model.train()
        for step, index in enumerate(batches):
            mine, weight = share_of(index)                  # all and 1, where one process trains
            x = prepare(inputs[mine].to(device)).contiguous(memory_format=torch.channels_last)
            target = x if targets is None else targets[mine].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x_hat = network(x)
            loss = criterion(x_hat.float(), target)
            rate = lr * SCHEDULES[schedule]((epoch - 1 + step / len(batches)) / epochs)
            take_step(model, optim, loss / target[0].numel() * weight, rate, clip,
                      f"epoch {epoch}, step {step + 1}")
            both = torch.stack([loss.detach(), getattr(criterion, "base_error", loss.detach())])
            means += both.cpu() / target[0].numel() * (len(mine) / len(inputs))
        history.append(record_epoch(epoch, means, time.perf_counter() - start))
        if rank == 0:
            history[-1].update(evaluate(epoch))
            print_epoch(history, epochs)
            save(snapshot(optim, order, history))
    return history


# ---- the command line ----

def parse(argv):
    """The command line -> parser, config: a dict of all options, those left unset filled in."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        epilog="What has no default here has one that depends on model and data: train.DEFAULTS.")
    first_options(parser.add_argument_group("what everyone needs").add_argument)
    other_options(parser.add_argument_group("model, training, experiments").add_argument)
    try:
        return parser, fill(vars(parser.parse_args(argv)))
    except ValueError as error:
        parser.error(str(error))


def first_options(add):
    add("--dataset", choices=DATASETS, default="digits", help="digits come with scikit-learn")
    add("--normal", help="classes (3 or 0,1,2; default 0) or categories (default all)")
    add("--data-dir", default="data", help="where data sets are; for folder, the folder itself")
    add("--model", choices=MODELS, default="ae", help="what reconstructs (default: ae)")
    add("--loss", choices=BASE_LOSSES, default="l2", help="base reconstruction loss (default: l2)")
    add("--lamp", action="store_true", default=False, help="amplify it: Eq. 1 and 2 of the paper")
    add("--backbone", choices=("none", *Backbone.NAMES), help="frozen CNN; none: sees the image")
    add("--epochs", type=int, help="passes over the images (default: from DEFAULTS' steps)")
    add("--fpr", type=float, default=0.05, help="false alarms the threshold allows (default: .05)")
    add("--seed", type=int, default=0, help="weights, order, images set aside (default: 0)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="auto: the first")
    add("--threads", type=int, default=0, help="CPU threads (default: all cores)")
    add("--out", help="folder of the run (default: runs/DATASET-NORMAL-MODEL-LOSS[-lamp]-sSEED)")
    add("--resume", action="store_true", default=False, help="go on where the run in --out stopped")
    add("--overwrite", action="store_true", default=False, help="replace the run in --out")


def other_options(add):
    add("--image-size", type=int, help="side in pixels")
    add("--depth", type=int, help="layers; ae: on each side")
    add("--width", type=int, help="channels of the hidden layers; ae: of the first one")
    add("--latent", type=int, help="of ae's code; pca: components; nearest: images, with copies")
    add("--kernel-size", type=int, default=3, help="ae: odd (default: 3)")
    add("--patches", type=int, default=1, help="ae: n x n patches apart (default: 1)")
    add("--turns", type=int, default=0, help="nearest: positions of an image; 0: 8 if these help")
    add("--neighbors", type=int, help="side of UniAD's mask, 0 for none")
    add("--jitter", type=float, help="scale of UniAD's feature jitter, 0 for none")
    add("--dropout", type=float, default=0.0, help="of UniAD and the transformer (default: 0)")
    add("--query", choices=("layerwise", "first", "none"), help="UniAD's learned queries")
    add("--backbone-weights", default="imagenet", help="imagenet, random, or a file (state dict)")
    add("--standardize", action=YES_NO, default=True, help="features, channel by channel")
    add("--batch-size", type=int, help="images a step")
    add("--lr", type=float, help="learning rate")
    add("--optimizer", choices=OPTIMIZERS, help="SGD has momentum .9; muon: lamp_loss.Muon")
    add("--schedule", choices=SCHEDULES, help="of the learning rate")
    add("--weight-decay", type=float, help="of the optimizer")
    add("--clip", type=float, default=0.0, help="largest gradient norm (default: 0, for any)")
    add("--amp", action="store_true", default=False, help="bfloat16 where that is safe")
    add("--eps", type=float, default=0.03, help="LAMP, Eq. 2: epsilon (default: .03)")
    add("--over", choices=("image", "batch"), default="image", help="Eq. 2: the maximum's scope")
    add("--detach", action=YES_NO, default=True, help="Eq. 2: no gradient through the maximum")
    add("--score", choices=ev.SCORES, help="of an image, from its error map")
    add("--eval-every", type=int, help="epochs; 0: at the end alone (default: a quarter of them)")
    add("--validate", action="store_true", default=False, help="judge on training images instead")
    add("--pictures", action=YES_NO, default=True, help="draw examples (default: yes)")


def fill(given):
    """Given options -> config: all options; raises ValueError where they exclude each other.
    `epochs` and `eval_every` stay None where the number of images decides, see `set_epochs`."""
    model, dataset = given["model"], given["dataset"]
    c = {key: of_models[MODELS.index(model)] for key, of_models in DEFAULTS.items()}
    c |= {"normal": "all" if dataset in FOLDERS else "0", "epochs": None, "eval_every": None}
    if dataset in FOLDERS:
        c |= ON_FOLDERS[model]
    elif dataset == "digits" and model == "ae":
        c["steps"] = 400                                    # they are small and few
    if given.get("backbone", "none") != "none":
        c["image_size"] = 224
    if c["optimizer"] == "muon" and given.get("optimizer", "muon") != "muon":
        c["lr"] /= 20                                       # Muon's own ratio, see there
    c |= given
    lamp = "-lamp" if c["lamp"] else ""
    name = f"{dataset}-{c['normal']}-{model}-{c['loss']}{lamp}-s{c['seed']}"
    c.setdefault("out", "runs/" + re.sub(r"[^\w.,-]", "_", name))
    check(c)
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if c["device"] == "auto":
        c["device"] = next(device for device in found if found[device])
    if not found[c["device"]]:
        raise ValueError(f"--device {c['device']}: PyTorch finds none here; leave it out")
    return c


def check(c):
    """Raise ValueError where options are out of range or exclude each other."""
    model, solved, grid = c["model"], c["model"] in ev.SOLVED, c["image_size"] // 16
    positive = {"image_size", "depth", "patches", "fpr"}
    positive |= set() if solved else {"epochs", "batch_size", "lr", "width"}
    for key, value in c.items():
        if isinstance(value, (int, float)):
            top = 1 if key in ("fpr", "dropout") else 2 ** 63
            if not (0 < value < top or value == 0 and key not in positive):     # NaN is neither
                raise ValueError(f"--{key.replace('_', '-')} {value}: expected a number "
                                 f"{'above 0' if key in positive else 'of 0 or more'}"
                                 f"{' and below 1' if top == 1 else ''}")
    if c["resume"] and c["overwrite"]:
        raise ValueError("--resume goes on with the run, --overwrite replaces it: give one of them")
    if solved and (c["lamp"] or c["epochs"] or c["batch_size"]):
        raise ValueError(f"--model {model} is solved, not trained by a loss: leave out --lamp, "
                         "--epochs and --batch-size")
    if (c["backbone"] == "none") != (model == "ae") and model != "pca":
        raise ValueError(f"--model {model} --backbone {c['backbone']}: ae sees the image (none), "
                         "pca it or features, the others features: leave out --backbone")
    if model in ("uniad", "transformer") and c["width"] % 8:
        raise ValueError(f"--width {c['width']}: 8 heads share it, so use a multiple of 8")
    if c["neighbors"] and c["neighbors"] // 2 >= grid // 2:
        raise ValueError(f"--neighbors {c['neighbors']} hides the whole grid of {grid}x{grid} "
                         "tokens from some of them: lower it, or raise --image-size")
    if c["loss"] == "ssim" and c["backbone"] != "none":
        raise ValueError("--loss ssim compares images in [0, 1]; with CNN features use l1 or l2")


# ---- a run ----

def open_folder(c):
    """The run's folder -> the state to resume from, or None where it starts afresh."""
    out = Path(c["out"])
    out.mkdir(parents=True, exist_ok=True)
    if c["overwrite"] or not (out / "model.pt").exists():
        return None
    state, _ = ev.load_run(out, finished=False)
    old, begun = state["config"], state["history"] or "known" in state
    if not begun and not c["resume"]:
        return None                                         # it failed before its first epoch
    if not c["resume"]:
        raise ValueError(f"{out} already holds a run of {len(state['history'])} of {old['epochs']} "
                         "epochs: --resume goes on, --overwrite replaces it, or name another --out")
    c["epochs"] = c["epochs"] or old["epochs"]
    if c["model"] == "nearest":                             # what the normals decided
        c |= {key: old.get(key) for key in ("turns", "latent")}
    if c["schedule"] == "constant":                         # others are planned for their epochs
        old["epochs"] = c["epochs"]
    changed = [f"--{key.replace('_', '-')} {old.get(key)} (now {c[key]})" for key in c
               if key not in MAY_CHANGE and c[key] != old.get(key)]
    if changed:
        raise ValueError("--resume goes on as it began (--epochs may change with --schedule "
                         f"constant alone); the run has {', '.join(changed)}")
    return state


def bank_features(c, inputs, backbone, turns):
    """What a bank of c["latent"] images holds: normals as the model sees them, drawn, always the
    same, each with its copies turned by 360 / turns degrees, itself first: (N, turns, C, g, g)."""
    order = torch.randperm(len(inputs.train), generator=torch.Generator().manual_seed(0))
    drawn = order[:max(1, c["latent"] // turns)]
    features = [inputs.train[drawn]]
    for turn in range(1, turns):
        copies = turned(inputs.images[drawn], 2 * math.pi * turn / turns)
        owners = [f"copies, turn {turn} of {turns}"] * len(copies)
        features.append(cached_features(backbone, copies, owners, ev.FEATURE_CACHE))
    return inputs.prepare(torch.stack(features, 1).to(backbone.mean.device))


def settle_bank(c, inputs, backbone):
    """Fill in `latent`, what the bank holds, and `turns` where it is 0. On folders: 8 where copies
    lower the normals' squared error by more than 10 %, each image left out in turn (of 30)."""
    if c["turns"] == 0 and c["dataset"] in FOLDERS:
        errors = []
        for turns in (1, 8):
            bank = bank_features(c, inputs, backbone, turns)
            model = NearestToken(*bank.shape[2:4], len(bank), turns).to(bank.device)
            model.solve(bank)
            errors.append(float(ev.error_maps(model, bank[:30, 0]).square().mean()))
        fall = 1 - errors[1] / errors[0] if errors[0] else 0.0
        c["turns"] = 8 if fall > 0.1 else 1
        kept = "kept, as where things lie anyhow" if fall > 0.1 else "not kept: things lie alike"
        print(f"8 turned copies of each image lower the error of the others by {fall:.0%}: {kept}")
    c["turns"] = c["turns"] or 1
    c["latent"] = c["turns"] * min(len(inputs.train), max(1, c["latent"] // c["turns"]))


def assess(c, model, data, inputs):
    """Re-estimate batch norm's statistics, judge the test set -> what `evaluate.judge` returns."""
    batches = inputs.train.tensor_split(-(-len(inputs.train) // 256))
    reestimate_batch_norm(model, (inputs.prepare(x.to(c["device"])) for x in batches))
    return ev.judge(model, c, data, inputs)


def curve_point(epoch, c, model, data, inputs):
    """For the history: AUROC every --eval-every epochs, else None; nothing is chosen by it."""
    due = c["eval_every"] and epoch % c["eval_every"] == 0 and epoch < c["epochs"]
    metrics = assess(c, model, data, inputs)[0] if due else {}
    return {key: metrics.get(key) for key in CURVES}


def train_model(c, model, inputs, criterion, state, save, evaluate):
    """`fit` by the config -> exit status: 130 where Ctrl-C has ended it, else 0."""
    chosen = {key: c[key] for key in ("epochs", "batch_size", "lr", "optimizer", "schedule",
                                      "weight_decay", "clip", "seed", "amp")}
    smallest = model.smallest_batch(c["image_size"]) if c["model"] == "ae" else 1
    if criterion is None:
        criterion = ReconstructionLoss(c["loss"], c["lamp"], c["eps"], c["over"], c["detach"])
    try:
        fit(model, inputs.train, criterion, **chosen, prepare=inputs.prepare, smallest=smallest,
            resume=state if state and state["history"] else None, evaluate=evaluate, save=save)
    except KeyboardInterrupt:
        if not ev.load_run(c["out"], finished=False)[0]["history"]:
            raise
        print("\ninterrupted: evaluating the last full epoch, from which --resume goes on")
        return 130
    return 0


def finish(c, model, data, inputs, save, command, started):
    """Judge the last full epoch; write model.pt with the thresholds, run.json and the pictures."""
    out, (state, last_full_epoch) = Path(c["out"]), ev.load_run(c["out"], finished=False)
    model.load_state_dict(last_full_epoch.state_dict())
    metrics, judged, known = assess(c, model, data, inputs)
    history = state["history"]
    metrics["parameters"] = sum(p.numel() for p in model.parameters())
    if history:
        history[-1].update({key: metrics.get(key) for key in CURVES})
    save({**state, "known": known})
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "torchvision": torchvision.__version__, "threads": torch.get_num_threads()}
    record = {"command": command, "config": c, "versions": versions, "history": history,
              "seconds": round(time.perf_counter() - started, 2), "metrics": metrics}
    (out / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if c["pictures"]:
        ev.draw_examples(out / "examples.png", {"": (model, inputs, judged)}, data, command)
    print(ev.describe(metrics, c["fpr"]))
    print(f"{len(history)} epochs, {record['seconds']:.0f} s, all in {out}; judge other images by "
          f"python evaluate.py {shlex.quote(str(out))} --image FILE-OR-FOLDER")


def run(c, command, criterion=None):
    """One run, from config to metrics on disk -> exit status: 0, or 130 after Ctrl-C.
    criterion: what to train by, in place of the config's loss (for experiments)."""
    started, out = time.perf_counter(), Path(c["out"])
    device, rank = start_process(c), processes()[0]
    state = open_folder(c)
    if dist.is_initialized():
        dist.barrier()                                      # all have looked before one writes
    data, inputs, backbone = ev.open_data(c, device, state)
    set_epochs(c, len(inputs.train))
    print_start(c, data, inputs)
    if c["model"] == "nearest" and not state:
        settle_bank(c, inputs, backbone)

    shape = list(inputs.prepare(inputs.train[:1].to(device)).shape[1:])
    torch.manual_seed(c["seed"] + rank)                     # own noise; all get rank 0's weights
    model = ev.build_model(c, shape).to(device)
    if state:
        model.load_state_dict(state["model"])
    elif c["model"] == "pca":
        model.solve(inputs.prepare(inputs.train.to(device)))
    elif c["model"] == "nearest":
        model.solve(bank_features(c, inputs, backbone, c["turns"]))
    fixed = {"version": ev.VERSION, "config": c, "shape": shape, "white": data.white,
             "image": list(data.train.shape[1:]), "keys": (inputs.train_keys, inputs.held_keys),
             "backbone": backbone and {"mean": backbone.mean.cpu(), "std": backbone.std.cpu()}}
    save = functools.partial(write_checkpoint, out / "model.pt", fixed, model)
    if rank == 0 and not state:
        if (out / "model.pt").exists():                     # of the run that is replaced
            shutil.rmtree(out / "judged", ignore_errors=True)
        save({"history": []})                               # where this fails, it fails now

    status = train_model(c, model, inputs, criterion, state, save, functools.partial(
        curve_point, c=c, model=model, data=data, inputs=inputs))
    if rank == 0:
        finish(c, model, data, inputs, save, command, started)
    return status


def print_start(c, data, inputs):
    """What is trained on what; then the options, those that differ from the defaults first."""
    bad = int(data.labels.sum())
    print(f"{c['model']}, {c['dataset']} {c['normal']}: {len(inputs.train)} normal to train on, "
          f"{len(inputs.held)} set aside; to test {len(data.labels) - bad} normal, {bad} anomalous")
    usual = parse(["--model", c["model"], "--dataset", c["dataset"]])[1]
    set_epochs(usual, len(inputs.train))
    print("chosen:", *(f"{key}={c[key]}" for key in c if c[key] != usual[key]))
    print("default:", *(f"{key}={c[key]}" for key in c if c[key] == usual[key]))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, config = parse(argv)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")     # names in any script
    try:
        status = run(config, shlex.join(["python", "train.py", *argv]))
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        parser.exit(2, f"train.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
