"""Train: one loop for every model here, and the command that wires everything together.

    python train.py                                         # digits, ten seconds, no download
    python train.py --dataset mnist --normal 3 --loss l2 --lamp

The LAMP paper in one line: train on one class with an amplified loss, judge by the L2 error. `fit`
is the whole of training; it steps on Eq. 1's sum divided by C H W, a constant, so that one learning
rate and one clip hold at every size. On one CPU, a command repeats to the last bit; see README.md.
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
from pathlib import Path

import torch
import torch.distributed as dist
import torchvision
from torch import nn

import evaluate as ev
from autoencoder import reestimate_batch_norm
from data import DATASETS, to_float
from lamp_loss import BASE_LOSSES, ReconstructionLoss
from uniad import Backbone


class NormalizedSGD(torch.optim.SGD):
    """SGD on the gradient over its norm: as blind to the loss's scale as Adam is; a control."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        norm = nn.utils.clip_grad_norm_(parameters, math.inf)
        for p in parameters:
            p.grad /= norm.clamp(min=1e-30)
        return super().step(closure)


OPTIMIZERS = {
    "sgd": lambda p, lr, wd: torch.optim.SGD(p, lr, momentum=0.9, weight_decay=wd),
    "normalized-sgd": lambda p, lr, wd: NormalizedSGD(p, lr, momentum=0.9, weight_decay=wd),
    "rmsprop": lambda p, lr, wd: torch.optim.RMSprop(p, lr, weight_decay=wd),
    "adam": lambda p, lr, wd: torch.optim.Adam(p, lr, weight_decay=wd, fused=True),
    "adamw": lambda p, lr, wd: torch.optim.AdamW(p, lr, weight_decay=wd, fused=True),
}
SCHEDULES = {                                               # progress in [0, 1) -> factor of lr
    "constant": lambda t: 1.0,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "step": lambda t: 1.0 if t < 0.8 else 0.1,              # UniAD: epoch 800 of 1000
}
UNIAD = dict(lr=4e-4, epochs=10, batch_size=8, optimizer="adamw", schedule="step", clip=0.1,
             weight_decay=1e-4, neighbors=7, jitter=20.0, query="layerwise", depth=4)
PLAIN = dict(neighbors=0, jitter=0.0, query="none")
AE = dict(lr=3e-3, epochs=8, batch_size=32, optimizer="adam", schedule="cosine", clip=0.0,
          weight_decay=0.0, **PLAIN)
DEFAULTS = {                                                # of options left unset, by model
    "ae": AE, "pca": {**AE, "epochs": 0, "batch_size": 0}, "uniad": UNIAD,
    "cnn": {**UNIAD, **PLAIN, "depth": 6}, "mlp": {**UNIAD, **PLAIN, "depth": 5},
    "transformer": {**UNIAD, **PLAIN, "query": "first"}}
FEW_IMAGES = dict(lr=1e-3, epochs=100, latent=16)           # ae: hundreds, not thousands
RANGES = dict(                                              # smallest and largest value that works
    image_size=(1, 4096), depth=(1, 12), width=(1, 4096), latent=(1, 65536), kernel_size=(1, 99),
    patches=(1, 4096), neighbors=(0, 999), jitter=(0, 1e6), epochs=(1, 10 ** 6), clip=(0, 1e9),
    batch_size=(1, 10 ** 6), lr=(1e-12, 1e3), weight_decay=(0, 10), seed=(0, 2 ** 63 - 1),
    threads=(0, 1024), eval_every=(0, 10 ** 6), eps=(1e-6, 0.999), fpr=(1e-6, 0.999))
PCA_RANGES = {**RANGES, "latent": (0, 65536), "epochs": (0, 0), "batch_size": (0, 0)}
FITTING = "epochs batch_size lr optimizer schedule weight_decay clip seed amp".split()
YES_NO = argparse.BooleanOptionalAction
FREE = "epochs eval_every pictures out data_dir cache_dir device threads resume overwrite".split()


# ---- the loop ----

def fit(model, inputs, criterion, targets=None, *, epochs=10, batch_size=32, lr=1e-3,
        optimizer="adam", schedule="cosine", weight_decay=0.0, clip=0.0, seed=0, amp=False,
        prepare=to_float, smallest=1, resume=None, evaluate=lambda epoch: {}, save=lambda s: None):
    """Train model to reconstruct inputs (N, C, H, W), or to predict targets (N, ...) from them.

    criterion(x_hat, x) -> scalar, a sum over C, H, W; prepare: stored inputs -> the model's; an
    epoch ends with evaluate(epoch) -> metrics for the history, and save(state); resume: a state.
    Raises FloatingPointError (loss not finite), ValueError (a batch below `smallest`)."""
    device, order = next(model.parameters()).device, torch.Generator().manual_seed(seed)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model.to(memory_format=torch.channels_last)             # twice as fast to convolve on a CPU
    runner = nn.parallel.DistributedDataParallel(model) if world > 1 else model
    optim = OPTIMIZERS[optimizer](model.parameters(), lr, weight_decay)
    history = restore(resume, optim, order) if resume else []
    for epoch in range(len(history) + 1, epochs + 1):
        start, totals = time.perf_counter(), torch.zeros(2)
        batches = draw_batches(len(inputs), batch_size, order, smallest * world)
        model.train()
        for step, index in enumerate(batches):
            mine = index[rank::world]                       # all of it, where there is one process
            x = prepare(inputs[mine].to(device)).contiguous(memory_format=torch.channels_last)
            y = x if targets is None else targets[mine].to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                x_hat = runner(x)
            share = len(mine) * world / len(index)          # the processes' gradients are averaged
            loss = criterion(x_hat.float(), y) / y[0].numel() * share
            rate = lr * SCHEDULES[schedule]((epoch - 1 + step / len(batches)) / epochs)
            take_step(model, optim, loss, rate, clip, f"epoch {epoch}, step {step + 1}")
            base = float(getattr(criterion, "base_error", 0)) / y[0].numel() * share
            totals += torch.tensor([loss.item(), base]) * (len(index) / len(inputs) / world)
        if world > 1:
            dist.all_reduce(totals)
        history.append({"epoch": epoch, "loss": float(totals[0]), "base_error": float(totals[1]),
                        "seconds": round(time.perf_counter() - start, 3)})
        if rank == 0:
            history[-1].update(evaluate(epoch))
            print_epoch(history, epochs)
            save({"optimizer": optim.state_dict(), "order": order.get_state(),
                  "rng": torch.get_rng_state(), "history": history})
    return history


def restore(state, optim, order):
    """Optimizer and generators as they were when `state` was saved -> its history."""
    optim.load_state_dict(state["optimizer"])
    order.set_state(state["order"])
    torch.set_rng_state(state["rng"])                       # dropout and jitter draw from this one
    return list(state["history"])


def draw_batches(n, size, generator, smallest):
    """Indices of an epoch's batches; a last one below `smallest` joins the one before it."""
    batches = list(torch.randperm(n, generator=generator).split(size))
    if len(batches) > 1 and len(batches[-1]) < smallest:
        batches[-2:] = [torch.cat(batches[-2:])]
    if len(batches[0]) < smallest:
        raise ValueError(f"a batch of {len(batches[0])} is too small for batch norm or for "
                         f"the processes: use --batch-size {smallest} or more, and as many images")
    return batches


def take_step(model, optim, loss, rate, clip, where):
    """One update at learning rate `rate`, gradient norm at most `clip` (0: no limit)."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()} at {where}, learning rate {rate:.2g}: try "
                                 f"--lr {rate / 10:.1g} or --clip 1; the last epoch is kept")
    for group in optim.param_groups:
        group["lr"] = rate
    optim.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    optim.step()


def print_epoch(history, epochs):
    h, known = history[-1], history[-1].get("image_auroc") is not None
    auroc = f"   image AUROC {h['image_auroc']:.4f}" if known else ""
    left = sum(e["seconds"] for e in history) / len(history) * (epochs - len(history))
    print(f"epoch {h['epoch']:>4}/{epochs}   loss {h['loss']:.5f}   base error "
          f"{h['base_error']:.5f}{auroc}   {h['seconds']:.1f} s, {left:.0f} s left", flush=True)


# ---- the command ----

def parse(argv):
    """The command line -> parser, config: a dict of all options, those left unset by DEFAULTS."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog='python train.py --each "OPTIONS" "OPTIONS" ...: several runs, in one process')
    model_options(parser)
    run_options(parser)
    given = vars(parser.parse_args(argv))
    few = given["model"] == "ae" and given["dataset"] in ("digits", "mvtec", "folder")
    first = {**DEFAULTS[given["model"]], **(FEW_IMAGES if few else {})}
    return parser, complete({**first, **given}, parser)


def unset(text, key=None):                                  # an option left out until `complete`
    text += f" (default: ae {DEFAULTS['ae'][key]}, uniad {DEFAULTS['uniad'][key]})" if key else ""
    return dict(default=argparse.SUPPRESS, help=text)


def model_options(parser):
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=DATASETS, default="digits", help="digits come with scikit-learn")
    add("--normal", **unset("classes (3 or 0,1,2; default 0) or categories (default all)"))
    add("--data-dir", default="data", help="where data sets are; for folder, the folder itself")
    add("--image-size", type=int, **unset("side (default: ae 32, of folders 128; others 224)"))
    add("--validate", action="store_true", help="judge on a part of the training split instead")
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=BASE_LOSSES, default="l2", help="base reconstruction loss")
    add("--lamp", action="store_true", help="amplify it: Eq. 1 and 2 of the LAMP paper")
    add("--eps", type=float, default=0.5, help="Eq. 2's epsilon")
    add("--over", choices=("image", "batch"), default="batch", help="what Eq. 2's maximum is over")
    add("--detach", action=YES_NO, default=True, help="no gradient through Eq. 2's maximum")
    add("--log", action=YES_NO, default=True, help="--no-log: Eq. 2 without Eq. 1's logarithm")
    add = parser.add_argument_group("model").add_argument
    add("--model", choices=DEFAULTS, default="ae", help="what reconstructs")
    add("--depth", type=int, **unset("layers (ae 4, from 128 pixels 6; uniad 4, mlp 5, cnn 6)"))
    add("--width", type=int, default=16, help="ae: filters of the first layer")
    add("--latent", type=int, **unset("channels of ae's code (8, few images 16); pca: components"))
    add("--kernel-size", type=int, default=3, help="ae: side of the kernels, odd")
    add("--patches", type=int, default=1, help="ae: n, for n x n patches reconstructed apart")
    add("--backbone", choices=Backbone.NAMES, default="efficientnet_b4", help="others: frozen CNN")
    add("--backbone-weights", default="imagenet", help="imagenet, random, or a file (state dict)")
    add("--standardize", action=YES_NO, default=True, help="others: features, channel by channel")
    add("--neighbors", type=int, **unset("side of the neighbor mask, 0 for none", "neighbors"))
    add("--jitter", type=float, **unset("scale of the feature jitter, 0 for none", "jitter"))
    add("--query", choices=("layerwise", "first", "none"), **unset("learned queries", "query"))
    add("--cache", action=YES_NO, default=True, help="others: compute features once, keep them")
    add("--cache-dir", default="runs/features", help="where features are kept")


def run_options(parser):
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=int, **unset("(default: ae 8, digits and folders 100; others 10)"))
    add("--batch-size", type=int, **unset("images a step", "batch_size"))
    add("--lr", type=float, **unset("(default: ae 3e-3, digits and folders 1e-3; others 4e-4)"))
    add("--weight-decay", type=float, **unset("of the optimizer", "weight_decay"))
    add("--clip", type=float, **unset("largest gradient norm, 0 for any", "clip"))
    add("--optimizer", choices=OPTIMIZERS, **unset("SGD has momentum .9", "optimizer"))
    add("--schedule", choices=SCHEDULES, **unset("of the learning rate", "schedule"))
    add("--reestimate", action=YES_NO, default=True, help="batch norm statistics before evaluating")
    add("--amp", action="store_true", help="bfloat16 where that is safe")
    add("--seed", type=int, default=0, help="weights, order, and the part set aside")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="first one there")
    add("--threads", type=int, default=0, help="CPU threads, 0 for all cores")
    add = parser.add_argument_group("evaluation and output").add_argument
    scores = dict(choices=("sum", "max", "mean", "std"))
    add("--score", **scores, **unset("(default: ae sum; others max for folders, else mean)"))
    add("--fpr", type=float, default=0.05, help="false positive rate the threshold aims at")
    add("--eval-every", type=int, **unset("epochs, 0: at the end alone (default: a tenth of all)"))
    add("--pictures", action=YES_NO, default=True, help="draw curves and examples")
    add("--out", **unset("folder of the run (default: runs/DATASET-NORMAL-MODEL-LOSS-sSEED)"))
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="go on where the run in --out stopped, or start")
    add("--overwrite", action="store_true", help="replace the run in --out")


def complete(c, parser):
    """Fill what depends on other options, check ranges and combinations (else exit status 2)."""
    folders, is_ae = c["dataset"] in ("mvtec", "folder"), c["model"] in ev.IMAGE_MODELS
    c.setdefault("normal", "all" if folders else "0")
    c.setdefault("image_size", (128 if folders else 32) if is_ae else 224)
    c.setdefault("latent", 8)
    c.setdefault("depth", 4 if c["image_size"] < 128 else 6)
    c.setdefault("eval_every", max(1, c["epochs"] // 10))
    c.setdefault("score", "sum" if is_ae else "max" if folders else "mean")
    name = f"{c['dataset']}-{c['normal']}-{c['model']}-{c['loss']}" + "-lamp" * c["lamp"]
    c.setdefault("out", "runs/" + re.sub(r"[^\w.,-]", "_", f"{name}-s{c['seed']}"))
    for key, (low, high) in (PCA_RANGES if c["model"] == "pca" else RANGES).items():
        if not low <= c[key] <= high:                       # NaN fails this, too
            parser.error(f"--{key.replace('_', '-')} {c[key]}: expected {low} to {high}")
    if c["neighbors"] and c["neighbors"] // 2 >= c["image_size"] // 32:     # before features cost
        grid = c["image_size"] // 16
        parser.error(f"--neighbors {c['neighbors']} hides the whole grid of {grid}x{grid} tokens")
    if c["model"] == "pca" and c["lamp"]:
        parser.error("--model pca is solved, not trained by a loss: leave out --lamp")
    if c["loss"] == "ssim" and not is_ae:
        parser.error("--loss ssim compares images in [0, 1]; with CNN features use l1 or l2")
    found = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if c["device"] == "auto":
        c["device"] = next(device for device in found if found[device])
    if not found[c["device"]]:
        parser.error(f"--device {c['device']}: PyTorch finds none on this machine; leave it out")
    return c


def open_folder(c):
    """The run's folder -> the state to resume from, or None where it starts afresh."""
    out = Path(c["out"])
    if c["overwrite"] or not (out / "model.pt").exists():
        out.mkdir(parents=True, exist_ok=True)
        return None
    state, _ = ev.load_run(out)
    old = state["config"]
    if not c["resume"]:
        raise ValueError(f"{out} already holds a run of {len(state['history'])} of {old['epochs']} "
                         "epochs: --resume goes on, --overwrite replaces it, or name another --out")
    changed = [f"--{k.replace('_', '-')} {old.get(k)} (now {c[k]})" for k in c
               if k not in FREE and c[k] != old.get(k)]
    if changed:
        raise ValueError(f"--resume changes nothing but --epochs; the run has {', '.join(changed)}")
    return state


def write_checkpoint(path, fixed, model, progress):
    """model.pt beside its place, then moved into it: a kill at any moment leaves a whole one."""
    buffer = io.BytesIO()                                   # a full disk is then a plain OSError
    torch.save({**progress, **fixed, "model": model.state_dict()}, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    path.with_name("run.json").unlink(missing_ok=True)      # of an earlier, shorter run
    os.replace(path.with_suffix(".tmp"), path)


def assess(c, model, data, inputs):
    """Settle batch norm, then judge the test set -> metrics, Judged."""
    if c["reestimate"]:
        batches = inputs.train.tensor_split(-(-len(inputs.train) // 256))
        reestimate_batch_norm(model, (inputs.prepare(x.to(c["device"])) for x in batches))
    return ev.judge(model, c, data, inputs)


def curve_point(epoch, c, model, data, inputs):
    """For the history: AUROC every --eval-every epochs, else None; nothing is chosen by it."""
    due = c["eval_every"] and epoch % c["eval_every"] == 0 and epoch < c["epochs"]
    metrics = assess(c, model, data, inputs)[0] if due else {}
    return {key: metrics.get(key) for key in ev.CURVES}


def finish(c, model, data, inputs, save, state, command, started):
    """Evaluate the last epoch; write model.pt with the threshold, run.json and the pictures."""
    metrics, judged = assess(c, model, data, inputs)
    history, out = state["history"], Path(c["out"])
    seconds = sum(h["seconds"] for h in history)
    metrics.update(train_seconds=round(seconds, 2), images_per_second=round(
        len(inputs.train) * len(history) / max(seconds, 1e-9), 1),
        parameters=sum(p.numel() for p in model.parameters()))
    if history:
        history[-1].update({key: metrics.get(key) for key in ev.CURVES})
    limits = {name: each["threshold"] for name, each in metrics["categories"].items()}
    save({**state, "threshold": metrics["threshold"], "limits": limits, "scale": judged.scale})
    versions = {"python": sys.version.split()[0], "torch": torch.__version__,
                "torchvision": torchvision.__version__, "threads": torch.get_num_threads()}
    record = {"command": command, "config": c, "versions": versions, "history": history,
              "seconds": round(time.perf_counter() - started, 2), "metrics": metrics}
    (out / "run.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    if c["pictures"]:
        ev.draw_curves(out / "curves.png", record, judged, data.labels)
        ev.draw_examples(out / "examples.png", {"": (model, inputs, judged)}, data.test,
                         data.labels, data.masks)
    print_result(record, out)


def print_result(record, out):
    print(f"{ev.describe(record['metrics'])}\n{len(record['history'])} epochs, "
          f"{record['seconds']:.0f} s; files: {', '.join(sorted(map(str, out.glob('*.*'))))}")


def run(c, command):
    """One run, from config to metrics on disk: open, build, fit, finish -> exit status."""
    started, out, status = time.perf_counter(), Path(c["out"]), 0
    device, rank = start_process(c)
    print("  ".join(f"{key}={value}" for key, value in sorted(c.items())))
    state = open_folder(c)
    if state and len(state["history"]) >= c["epochs"] and (out / "run.json").exists():
        print_result(json.loads((out / "run.json").read_text()), out)
        return 0
    if dist.is_initialized():
        dist.barrier()                                      # all have looked before one writes
    data, inputs, backbone = ev.open_data(c, device, state and state["backbone"])
    print_sizes(data, inputs)
    shape = list(inputs.prepare(inputs.train[:1].to(device)).shape[1:])
    torch.manual_seed(c["seed"] + rank)                     # own noise; all get rank 0's weights
    model = ev.MODELS[c["model"]](c, shape).to(device)
    if c["model"] == "pca":
        model.solve(to_float(inputs.train))
    fixed = {"layout": ev.LAYOUT, "config": c, "shape": shape, "image": list(data.train.shape[1:]),
             "backbone": backbone and {"mean": backbone.mean.cpu(), "std": backbone.std.cpu()}}
    save = functools.partial(write_checkpoint, out / "model.pt", fixed, model)
    if state:
        model.load_state_dict(state["model"])
    elif rank == 0:
        save({"history": []})                               # where this fails, it fails now
    criterion = ReconstructionLoss(*(c[k] for k in "loss lamp eps over detach log".split()))
    try:
        fit(model, inputs.train, criterion, **{key: c[key] for key in FITTING}, save=save,
            prepare=inputs.prepare, resume=state if state and state["history"] else None,
            smallest=model.smallest_batch(c["image_size"]) if c["model"] == "ae" else 1,
            evaluate=lambda epoch: curve_point(epoch, c, model, data, inputs))
    except KeyboardInterrupt:
        print("\ninterrupted: evaluating the last full epoch, from which --resume goes on")
        status = 130
    if rank == 0:
        state, trained = ev.load_run(out)
        model.load_state_dict(trained.state_dict())
        finish(c, model, data, inputs, save, state, command, started)
    return status


def print_sizes(data, inputs):
    n, held, bad = len(data.train), len(inputs.held), int(data.labels.sum())
    print(f"{n} normal ({n - held} train, {held} threshold), 0 anomalous (by design); test "
          f"{len(data.labels) - bad} normal, {bad} anomalous")


def start_process(c):
    """Threads and device; under torchrun, join the others -> device, rank (only rank 0 prints)."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(c["threads"] or max(1, os.cpu_count() // world))
    torch.set_flush_denormal(True)                          # LAMP's tiny gradients are slow
    if "LOCAL_RANK" not in os.environ:
        return torch.device(c["device"]), 0
    dist.init_process_group("cpu:gloo,cuda:nccl" if c["device"] == "cuda" else "gloo")
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")
    local = f":{os.environ['LOCAL_RANK']}" * (c["device"] == "cuda")
    return torch.device(c["device"] + local), dist.get_rank()


def run_each(lines):
    """A run for each line of options, torch imported once -> the largest exit status."""
    statuses = [0]
    for line in lines:
        try:
            main(shlex.split(line))
        except SystemExit as stop:
            statuses.append(stop.code)
        if statuses[-1] == 130:                             # Ctrl-C ends them all
            break
    return max(statuses)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["--each"]:
        raise SystemExit(run_each(argv[1:]))
    parser, config = parse(argv)
    try:
        status = run(config, shlex.join(["python", "train.py", *argv]))
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"train.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted\n")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
