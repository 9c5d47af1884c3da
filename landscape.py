"""The loss landscape around a trained model, after Li et al. 2018, and a number for its steepness.

LAMP's argument (Park et al. 2023, Sec. 2.1 and 3.2) is a picture: the loss over two random
directions d, e around the weights w,  f(a, b) = loss(w + a d + b e),  is steeper with LAMP. Each
filter of a direction is scaled to the norm of the same filter in w, so that models compare.

    python landscape.py                a linear model's paraboloid against its closed form
    python landscape.py RUN RUN...     2-D, 3-D and 1-D pictures of runs of train.py, side by side
    python landscape.py --figure 1     the paper's Fig. 1: autoencoders trained with L2 and L2-LAMP
    python landscape.py --figure 3     the paper's Fig. 3: an encoder that predicts MNIST's classes
    python landscape.py --steepness    three meanings of "steeper", measured with intervals

On your own model, whatever it is and however its loss is computed:
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))
    loss_at = around(model, lambda: float(my_loss(model(x), y)), d, e)
    z = surface(loss_at, xs, ys, "my.npz")       # Ctrl-C loses nothing, a rerun goes on

With `detach` (see lamp_loss.py) the surface drawn is not quite the one that training descends:
drawn is LAMP's value, in which Eq. 2's maximum moves; training holds it still at each step.
"""
import argparse
import itertools
import json
import os
import shlex
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

import evaluate as ev
import train
from autoencoder import ConvAutoencoder, reestimate_batch_norm
from data import DATASETS, resize, to_float
from lamp_loss import ReconstructionLoss


# ---- directions and surfaces ----

def filter_normalize(d, w):
    """Each filter (slice along dimension 0) of direction d gets the norm of that filter in w.

    Two tensors of one parameter -> one like them; zeros where w.dim() <= 1 (biases, batch norm).
    Nothing here is a transposed convolution, whose filters lie along dimension 1.
    """
    if w.dim() <= 1:
        return torch.zeros_like(w)
    norms = [t.flatten(1).norm(dim=1).view(-1, *[1] * (w.dim() - 1)) for t in (d, w)]
    return d * (norms[1] / (norms[0] + 1e-10))


def random_direction(parameters, seed):
    """A Gaussian direction in the space of the parameters, filter-normalized: a list of tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [filter_normalize(torch.randn(w.shape, generator=generator).to(w.device), w.detach())
            for w in parameters]


def around(model, loss, d, e):
    """-> loss_at(a, b): loss() with model's weights at w + a d + b e; loss_at(0, 0) restores w."""
    weights = [w.detach().clone() for w in model.parameters()]

    @torch.no_grad()
    def loss_at(a, b):
        for p, w, x, y in zip(model.parameters(), weights, d, e):
            p.copy_(w + a * x + b * y)
        return loss()
    return loss_at


def surface(loss_at, xs, ys, path=None):
    """z[i, j] = loss_at(xs[i], ys[j]) -> array (len(xs), len(ys)); each point is computed once.

    path: a .npz that is written as the surface grows (NaN = not yet), and gone on with if it is
    there; of another grid, ValueError.
    """
    z = np.full((len(xs), len(ys)), np.nan)
    if path and Path(path).exists():
        with np.load(path) as saved:
            if not (np.array_equal(saved["xs"], xs) and np.array_equal(saved["ys"], ys)):
                raise ValueError(f"{path} is of another grid: delete it, or name another --out")
            z = saved["z"]
    todo, start, saved_at = np.argwhere(np.isnan(z)), time.perf_counter(), time.perf_counter()
    try:
        for count, (i, j) in enumerate(todo, 1):
            z[i, j] = loss_at(float(xs[i]), float(ys[j]))
            now = time.perf_counter()
            if path and now - saved_at > 5:
                write_surface(path, z, xs, ys)
                saved_at, left = now, (now - start) / count * (len(todo) - count)
                print(f"{path}: {count} of {len(todo)} points, {left:.0f} s left", flush=True)
    finally:
        if len(todo):
            loss_at(0.0, 0.0)                               # the weights as they were
        if path:
            write_surface(path, z, xs, ys)
    return z


def write_surface(path, z, xs, ys):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez(f"{path}.tmp.npz", z=z, xs=xs, ys=ys)
    os.replace(f"{path}.tmp.npz", path)


def steepness(z, xs, ys):
    """How steep a surface is -> {gradient, curvature, and both divided by the loss at the center}.

    gradient: mean over the grid of the gradient's norm (central differences); curvature: mean of
    the second differences along both axes. Divided by the center they do not see the loss's scale.
    """
    gradient = np.hypot(*np.gradient(z, xs, ys)).mean()
    second = (np.diff(z, 2, axis=0).mean() / (xs[1] - xs[0]) ** 2
              + np.diff(z, 2, axis=1).mean() / (ys[1] - ys[0]) ** 2) / 2
    center = z[len(xs) // 2, len(ys) // 2]
    return {"gradient": gradient, "curvature": second, "gradient / loss": gradient / center,
            "curvature / loss": second / center}


def model_surface(model, criterion, x, y, xs, seed=0, path=None, recompute=False):
    """The surface of criterion(model(x), y) around a model, on two directions drawn from `seed`."""
    model.eval()
    d, e = (random_direction(model.parameters(), 2 * seed + i) for i in (0, 1))

    def loss():
        if recompute:
            reestimate_batch_norm(model, [x])
        return float(criterion(model(x), y))
    return surface(around(model, loss, d, e), xs, xs, path)


# ---- pictures ----

def draw(path, panels, xs, footer, rows=1, solid=True):
    """panels: [(title, z), ...] on one color scale: contour lines in several rows (Fig. 3), or each
    with the surface and its contour projection above (Fig. 1) and cuts through the center below."""
    everything = np.concatenate([z.ravel() for _, z in panels])
    low, high = everything.min(), np.quantile(everything, 0.97)             # corners may tower
    style = dict(levels=np.linspace(low, high, 31), vmin=low, vmax=high, cmap="viridis")
    columns, rows = len(panels) // rows, 3 if solid else rows
    figure = Figure(figsize=(3.6 * columns + 0.6, 3.3 * rows), layout="constrained")
    for n, (title, z) in enumerate(panels, 1):
        flat = figure.add_subplot(rows, columns, n + columns * solid)
        lines = flat.contour(xs, xs, z.T, **style)
        flat.set(xlabel="direction d", ylabel="direction e", aspect="equal", title=title)
        if solid:
            top = figure.add_subplot(rows, columns, n, projection="3d")
            a, b = np.meshgrid(xs, xs, indexing="ij")
            top.plot_surface(a, b, z, cmap="viridis", vmin=low, vmax=high, rcount=60, ccount=60)
            top.contour(a, b, z, zdir="z", offset=0, **style)
            top.set(zlim=(0, everything.max()), xlabel="d", ylabel="e")
            cut = figure.add_subplot(rows, columns, n + 2 * columns)
            cut.plot(xs, z[:, len(xs) // 2], label="along d")
            cut.plot(xs, z[len(xs) // 2], label="along e")
            cut.set(xlabel="step along the direction", ylabel="loss", ylim=(0, high))
            cut.legend(fontsize=8)
    figure.colorbar(lines, ax=figure.axes, shrink=0.5, format="%.3g", label="loss of an image")
    figure.supxlabel("\n".join(textwrap.wrap(footer, 32 * columns)), fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def footer(args, what):
    return (f"{what}, {args.images} images; directions of seed {args.seed}, filter-normalized; "
            f"{args.grid} x {args.grid} points; batch norm statistics {args.bn}")


def grid_of(args):
    xs = np.linspace(-args.span, args.span, args.grid)
    xs[args.grid // 2] = 0.0                                # exactly the trained weights
    return xs


def load_with_images(run, args):
    """A run -> (config, model, its first training images as the model sees them)."""
    state, model = ev.load_run(run)
    c = {**state["config"], "data_dir": args.data_dir or state["config"]["data_dir"]}
    inputs = ev.open_data(c, mean_std=state["backbone"])[1]
    return c, model, inputs.prepare(inputs.train[:args.images])


def compare_runs(runs, args, out):
    """Runs side by side (Fig. 1): same seed of directions, axes and contour levels; same images, if
    the runs have data set and seed in common."""
    loaded, panels = [load_with_images(run, args) for run in runs], []
    shapes = [[p.shape for p in model.parameters()] for _, model, _ in loaded]
    for number, (c, model, x) in enumerate(loaded):
        if shapes[number] != shapes[0]:
            raise ValueError(f"{runs[number]} is of another architecture than {runs[0]}")
        loss, lamp = (c["loss"], c["lamp"]) if args.under == "own" else (args.under, False)
        reading = c["eps"], c["over"], c["detach"], c.get("log", True)
        criterion = ReconstructionLoss(loss, lamp, *reading)
        known = b"".join(t.numpy().tobytes() for t in (*model.state_dict().values(), x))
        options = f"{zlib.crc32(known):08x}-{args.under}-{args.bn}-s{args.seed}"
        path = f"{Path(out).with_suffix('')}-{options}.npz"
        z = model_surface(model, criterion, x, x, grid_of(args), args.seed, path,
                          args.bn == "recompute")
        name = c["loss"].upper() + "-LAMP" * c["lamp"]
        panels.append((f"{name}, batch size {c['batch_size']}\nunder {args.under} loss", z))
    draw(out, panels, grid_of(args), footer(args, ", ".join(runs)))


# ---- what the paper draws, and what it suggests ----

# LAMP as steep as it still trains well, nearer than the default to the paper's "slightly less
# than 1"; with learning rate and code of the time when the README's figures were made
STEEP = dict(eps=0.1, over="image")
TRAINED = "--eps 0.1 --over image --latent 16 --lr 1e-3".split()


def train_pair(batch_size, seed, args):
    """Autoencoders of MNIST's digit 3, L2 and L2-LAMP, same start and order -> two run folders."""
    folders = []
    for lamp in ([], ["--lamp"]):
        out = f"runs/landscape/mnist-3-l2{''.join(lamp)}-b{batch_size}-e{args.epochs}-s{seed}"
        argv = ["--dataset", "mnist", "--normal", "3", "--batch-size", str(batch_size), "--seed",
                str(seed), "--epochs", str(args.epochs), "--data-dir", args.data_dir or "data",
                "--eval-every", "0", "--no-pictures", "--resume", "--out", out, *lamp, *TRAINED,
                "--threads", str(args.threads)]
        if train.run(train.parse(argv)[1], shlex.join(["python", "train.py", *argv])):
            raise KeyboardInterrupt                         # caught there, to save; here, to stop
        folders.append(out)
    return folders


def train_classifier(lamp, batch_size, seed, args):
    """Sec. 3.2: "the encoder part of the AE that is trained to predict class labels" of MNIST:
    encoder, flatten, linear, sigmoid; L2 or L2-LAMP against one-hot labels -> model, x, y."""
    (images, labels), _, _ = DATASETS["mnist"](Path(args.data_dir or "data"))
    x, y = resize(images[:10000], 32), torch.eye(10)[labels[:10000]]
    torch.manual_seed(seed)
    encoder = ConvAutoencoder(latent=16).encoder                            # (B, 16, 2, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(64, 10), nn.Sigmoid())
    print(f"encoder, {'L2-LAMP' if lamp else 'L2'}, batch size {batch_size}, seed {seed}")
    train.fit(model, x, ReconstructionLoss("l2", lamp, **STEEP), y, epochs=args.epochs,
              batch_size=batch_size, seed=seed)
    reestimate_batch_norm(model, to_float(x).split(250))
    return model, to_float(x[:args.images]), y[:args.images]


def figure_3(args, out):
    """The paper's Fig. 3: contours of L2 and L2-LAMP for batch sizes 128, 16 and 4."""
    panels = []
    for lamp, batch_size in itertools.product((False, True), (128, 16, 4)):
        model, x, y = train_classifier(lamp, batch_size, args.seed, args)
        z = model_surface(model, ReconstructionLoss("l2", lamp, **STEEP), x, y, grid_of(args),
                          args.seed, recompute=args.bn == "recompute")
        panels.append((f"{'L2-LAMP' if lamp else 'L2'}, batch size {batch_size}", z))
    text = footer(args, f"encoders that predict MNIST's classes, {args.epochs} epochs")
    draw(out, panels, grid_of(args), text, rows=2, solid=False)


MEANINGS = {"a": "the L2 model seen through LAMP",
            "b": "each model under its own loss, as in the paper", "c": "both models under L2"}


def measure_steepness(kind, batch_size, seed, args):
    """{meaning: {measure: LAMP / L2}}, means over four pairs of directions."""
    if kind == "autoencoder":
        (_, plain, x), (_, amplified, _) = (load_with_images(run, args)
                                            for run in train_pair(batch_size, seed, args))
        y = x
    else:
        (plain, x, y), (amplified, _, _) = (train_classifier(lamp, batch_size, seed, args)
                                            for lamp in (False, True))
    l2, lamp, totals = ReconstructionLoss("l2"), ReconstructionLoss("l2", True, **STEEP), {}
    for name, model, criterion in (("base", plain, l2), ("a", plain, lamp), ("b", amplified, lamp),
                                   ("c", amplified, l2)):
        each = [steepness(model_surface(model, criterion, x, y, grid_of(args), 10 * seed + pair),
                          grid_of(args), grid_of(args)) for pair in range(4)]
        totals[name] = {key: sum(s[key] for s in each) for key in each[0]}
    return {name: {key: totals[name][key] / totals["base"][key] for key in totals[name]}
            for name in MEANINGS}


def steepness_table(args, out):
    """How many times steeper LAMP is, by three meanings: ratios, 95 % intervals over 3 seeds."""
    lines, results = [], {}
    for kind, batch_size in itertools.product(("autoencoder", "classifier"), (128, 16, 4)):
        ratios = [measure_steepness(kind, batch_size, seed, args) for seed in range(3)]
        results[f"{kind}-{batch_size}"] = ratios
        for name, meaning in MEANINGS.items():
            values = {key: [r[name][key] for r in ratios] for key in ratios[0][name]}
            cells = [f"{np.mean(v):.2f} ± {ev.interval(v):.2f}" for v in values.values()]
            lines.append(f"| {kind} | {batch_size} | ({name}) {meaning} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    lines[:0] = [f"| network | batch size | compared | {' | '.join(values)} |", "|---" * 7 + "|"]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("\n".join(lines) + "\n")
    Path(out).with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join([*lines, f"wrote {out}"]))


# ---- the command ----

def paraboloid():
    """A linear model under a quadratic loss: its surface is |r + a u + b v|^2, a paraboloid."""
    torch.manual_seed(0)
    model, x, y, xs = nn.Linear(4, 3), torch.randn(50, 4), torch.randn(50, 3), np.linspace(-1, 1, 5)
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))
    z = surface(around(model, lambda: float((model(x) - y).square().sum()), d, e), xs, xs)
    r, u, v = (model(x) - y).detach(), x @ d[0].T, x @ e[0].T              # d, e: zero for the bias
    print("    a     b   surface   r^2 + 2a ru + 2b rv + a^2 u^2 + b^2 v^2 + 2ab uv")
    for (i, a), (j, b) in itertools.product(enumerate(xs), enumerate(xs)):
        closed = ((r * r).sum() + 2 * a * (r * u).sum() + 2 * b * (r * v).sum()
                  + a * a * (u * u).sum() + b * b * (v * v).sum() + 2 * a * b * (u * v).sum())
        print(f"{a:5.1f} {b:5.1f} {z[i, j]:9.3f} {float(closed):9.3f}")
    print("See --help for the landscapes of runs, and the paper's figures.")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote, of one architecture")
    add("--figure", type=int, choices=(1, 3), help="the paper's figure, with the training it needs")
    add("--steepness", action="store_true", help="measure three meanings of steeper, 3 seeds")
    add("--under", choices=("own", "l1", "l2", "ssim"), default="own",
        help="the loss that is drawn: each run's own, or one for all (default: own)")
    add("--bn", choices=("frozen", "recompute"), default="frozen",
        help="batch norm statistics: the trained model's, or anew at each point (default: frozen)")
    add("--grid", type=int, help="points a side, odd (default: 51; 11 for --steepness)")
    add("--span", type=float, default=1.0, help="largest step, in weights' norms (default: 1)")
    add("--images", type=int, help="training images the loss is of (default: 1024; 128)")
    add("--seed", type=int, default=0, help="of directions and a figure's training (default: 0)")
    add("--epochs", type=int, default=4, help="of a figure's training (default: 4)")
    add("--threads", type=int, default=0, help="CPU threads, 0 for all cores (default: 0)")
    add("--data-dir", help="where the data sets are (default: as in the run, or data)")
    add("--out", help="picture or table (default: in figures, runs/landscape, results/steepness)")
    args = parser.parse_args(argv)
    if args.grid is None:
        args.grid = 11 if args.steepness else 51
    if args.images is None:
        args.images = 128 if args.steepness else 1024
    if args.grid < 3 or args.grid % 2 == 0:
        parser.error(f"--grid {args.grid}: an odd number from 3 on, so that the center is a point")
    if not 0 < args.span <= 1e3:
        parser.error(f"--span {args.span}: a step above 0, at most 1000")
    if min(args.images, args.epochs) < 1 or min(args.seed, args.threads) < 0:
        parser.error("--images and --epochs start at 1, --seed and --threads at 0")
    if bool(args.runs) + bool(args.figure) + args.steepness > 1:
        parser.error("give runs, or --figure, or --steepness")
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count())
    torch.set_flush_denormal(True)
    try:
        if args.steepness:
            steepness_table(args, args.out or "results/steepness/table.md")
        elif args.figure == 3:
            figure_3(args, args.out or "figures/figure3.png")
        elif args.figure == 1:
            compare_runs(train_pair(32, args.seed, args), args, args.out or "figures/figure1.png")
        elif args.runs:
            compare_runs(args.runs, args, args.out or "runs/landscape/landscape.png")
        else:
            paraboloid()
    except (ValueError, OSError) as error:
        parser.exit(2, f"landscape.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; what was computed of a surface is kept\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
