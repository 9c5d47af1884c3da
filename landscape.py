"""The loss landscape around a trained model, after Li et al. 2018, and a number for its steepness.

LAMP's argument (Park et al. 2023, Sec. 2.1 and 3.2) is a picture: the loss over two random
directions d, e around the weights w,  f(a, b) = loss(w + a d + b e),  is steeper with LAMP. Each
filter of a direction is scaled to the norm of the same filter in w, so that models compare.

    python landscape.py                a linear model's paraboloid against its closed form
    python landscape.py RUN RUN...     runs of train.py side by side, as solids and contours
    python landscape.py --figure 1     the paper's Fig. 1: autoencoders, L2 and L2-LAMP
    python landscape.py --figure 3     the paper's Fig. 3: an encoder that predicts MNIST's classes
    python landscape.py --steepness    three meanings of "steeper", measured: rows of a CSV

On your own model, whatever it is and however its loss is computed:
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))
    loss_at = around(model, lambda: float(my_loss(model(x), y)), d, e)
    z = surface(loss_at, xs, ys, "my.npz")       # Ctrl-C loses nothing, a rerun goes on

With `detach` Eq. 2's maximum is a constant to a training step, and held here, too, at the largest
error of all points drawn (`HeldLamp`). Otherwise, or by --maximum moving, each point has its own.
"""
import argparse
import itertools
import os
import shlex
import sys
import textwrap
import time
import zlib
from pathlib import Path

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import nn

import evaluate as ev
import train
from autoencoder import ConvAutoencoder, reestimate_batch_norm
from data import DATASETS, resize, to_float
from lamp_loss import HeldLamp, ReconstructionLoss


# ---- directions and surfaces ----

def filter_normalize(d, w):
    """Each filter (slice along dimension 0) of direction d gets the norm of that filter in w.

    Two tensors of one parameter -> one like them; zeros where w.dim() <= 1 (biases, batch norm).
    """
    if w.dim() <= 1:
        return torch.zeros_like(w)
    norm_of_d, norm_of_w = d.flatten(1).norm(dim=1), w.flatten(1).norm(dim=1)   # (filters,)
    ratio = norm_of_w / (norm_of_d + 1e-10)
    return d * ratio.view(-1, *[1] * (w.dim() - 1))


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
        for p, w, along_d, along_e in zip(model.parameters(), weights, d, e):
            p.copy_(w + a * along_d + b * along_e)
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
    todo = np.argwhere(np.isnan(z))
    start = reported = time.perf_counter()
    try:
        for count, (i, j) in enumerate(todo, 1):
            z[i, j] = loss_at(float(xs[i]), float(ys[j]))
            now = time.perf_counter()
            if now - reported > 5:
                reported, left = now, (now - start) / count * (len(todo) - count)
                print(f"{count} of {len(todo)} points, {left:.0f} s left", flush=True)
                if path:
                    write_surface(path, z, xs, ys)
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


def model_surface(model, criterion, x, y, xs, seed=0, path=None):
    """The surface of criterion(model(x), y) around a model, on two directions drawn from `seed`."""
    model.eval()
    d, e = (random_direction(model.parameters(), 2 * seed + i) for i in (0, 1))

    def surface_of(value, path):
        loss_at = around(model, lambda: float(value(model(x), y)), d, e)
        return surface(loss_at, xs, xs, path)
    if isinstance(criterion, HeldLamp):
        maxima = surface_of(criterion.observe, None)        # of each point; it keeps the largest
        print(f"Eq. 2's maximum is {maxima[len(xs) // 2, len(xs) // 2]:.3f} at the trained "
              f"weights, held at {float(criterion.maximum.mean()):.3f}")
    return surface_of(criterion, path)


def steepness(z, xs, ys):
    """How steep a surface is -> {gradient, curvature, and both divided by the loss at the center}.

    gradient: mean over the grid of the gradient's norm (central differences); curvature: mean of
    the second differences along both axes. Divided by the center they do not see the loss's scale.
    """
    gradient = np.hypot(*np.gradient(z, xs, ys)).mean()
    along_x = np.diff(z, 2, axis=0).mean() / (xs[1] - xs[0]) ** 2
    along_y = np.diff(z, 2, axis=1).mean() / (ys[1] - ys[0]) ** 2
    curvature = (along_x + along_y) / 2
    center = z[len(xs) // 2, len(ys) // 2]
    return {"gradient": gradient, "curvature": curvature, "gradient_per_loss": gradient / center,
            "curvature_per_loss": curvature / center}


# ---- pictures ----

def draw_contours(axis, xs, z, levels):
    """Contour lines of one panel; a cross marks the trained weights."""
    if ((z.min() < levels) & (levels < z.max())).any():
        axis.contour(xs, xs, z.T, levels=levels, vmin=levels[0], vmax=levels[-1], cmap="viridis")
    else:
        axis.text(0, 0, f"flat: {z.min():.3g} to {z.max():.3g}\n", ha="center")
    axis.plot(0, 0, "+", color="red", markersize=10)
    axis.set(xlabel="direction d", ylabel="direction e", aspect="equal")


def draw(path, panels, args, what, rows=1, solid=True):
    """panels: [(title, z), ...], all with the same contour levels and colors: contours in several
    rows (Fig. 3), or in one row below their solids (Fig. 1). Corners that tower are cut off."""
    xs, values = args.xs, np.concatenate([z.ravel() for _, z in panels])
    if not np.isfinite(values).all():
        raise ValueError("the loss is not finite at some points: lower --span")
    low, high = values.min(), np.quantile(values, 0.97)
    high = high if high > low else low + 1                  # flat
    columns = len(panels) // rows
    rows = 2 if solid else rows
    figure = Figure((4.2 * columns + 0.8, 4.0 * rows), layout="constrained")
    for n, (title, z) in enumerate(panels, 1):
        flat = figure.add_subplot(rows, columns, n + columns * solid, title="" if solid else title)
        draw_contours(flat, xs, z, np.linspace(low, high, 31))
        if solid:
            top = figure.add_subplot(rows, columns, n, projection="3d", title=title)
            a, b = np.meshgrid(xs, xs, indexing="ij")
            top.plot_surface(a, b, z.clip(max=high), cmap="viridis", vmin=low, vmax=high)
            top.set(zlim=(min(low, 0), high), xlabel="d", ylabel="e")
    colors = ScalarMappable(Normalize(low, high), "viridis")
    figure.colorbar(colors, ax=figure.axes, shrink=0.5, format="%.3g", label="loss of an image")
    text = (f"{args.command}; {what}; +: the trained weights; directions of "
            f"seed {args.seed}, filter-normalized; {args.grid} x {args.grid} points")
    figure.supxlabel("\n".join(textwrap.wrap(text, 40 * columns)), fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# ---- the models that are drawn, and their losses ----

READINGS = {"autoencoder": dict(eps=0.03, over="image", detach=True),       # as train.py has it
            "classifier": dict(eps=0.1, over="batch", detach=True)}         # by image: accuracy .60


def criterion_of(args, loss, lamp, eps, over, detach):
    if lamp and detach and args.maximum == "held":
        return HeldLamp(loss, eps, over)
    return ReconstructionLoss(loss, lamp, eps, over)


def open_run(run, args):
    """A run -> (config, model, its first training images as the model sees them)."""
    state, model = ev.load_run(run)
    c = {**state["config"], "data_dir": args.data_dir or state["config"]["data_dir"]}
    inputs = ev.open_data(c, "cpu", state)[1]
    return c, model, inputs.prepare(inputs.train[:args.images])


def train_run(lamp, batch_size, seed, args):
    """An autoencoder of MNIST's digit 3, L2 or L2-LAMP -> its folder, where it may be already."""
    name = f"mnist-3-{'l2-lamp' if lamp else 'l2'}-b{batch_size}-e{args.epochs}-s{seed}"
    argv = ["--dataset=mnist", "--normal=3", "--lr=1e-3", "--eval-every=0", "--no-pictures",
            f"--batch-size={batch_size}", f"--epochs={args.epochs}", f"--seed={seed}",
            f"--threads={args.threads}", f"--data-dir={args.data_dir or 'data'}",
            f"--out=runs/landscape/{name}", "--resume", *(["--lamp"] if lamp else [])]
    try:
        train.main(argv)
    except SystemExit as stop:
        if stop.code:
            raise                                           # train.py has said why
    return f"runs/landscape/{name}"


def train_classifier(lamp, batch_size, seed, args):
    """Sec. 3.2: "the encoder part of the AE that is trained to predict class labels" of MNIST. The
    rest is ours: flatten, linear, sigmoid; L2 or L2-LAMP against one-hot labels -> model, x, y."""
    (images, labels), _, _ = DATASETS["mnist"](Path(args.data_dir or "data"))
    x, y = resize(images[:10000], 32), torch.eye(10)[labels[:10000]]
    torch.manual_seed(seed)
    encoder = ConvAutoencoder().encoder                                     # (B, 128, 2, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(512, 10), nn.Sigmoid())
    print(f"encoder, {'L2-LAMP' if lamp else 'L2'}, batch size {batch_size}, seed {seed}")
    criterion = ReconstructionLoss("l2", lamp, **READINGS["classifier"])
    train.fit(model, x, criterion, y, epochs=args.epochs, batch_size=batch_size, seed=seed)
    reestimate_batch_norm(model, to_float(x).split(250))
    return model, to_float(x[:args.images]), y[:args.images]


# ---- what the paper draws, and what it suggests ----

def compare_runs(runs, args, out):
    """Runs side by side (Fig. 1): same draws, and same images where data set and seed are."""
    loaded = [open_run(run, args) for run in runs]
    shapes = [[p.shape for p in model.parameters()] for _, model, _ in loaded]
    panels = []
    for number, (c, model, x) in enumerate(loaded):
        if shapes[number] != shapes[0]:
            raise ValueError(f"{runs[number]} is of another architecture than {runs[0]}")
        loss, lamp = (c["loss"], c["lamp"]) if args.under == "own" else (args.under, False)
        criterion = criterion_of(args, loss, lamp, c["eps"], c["over"], c["detach"])
        content = b"".join(t.numpy().tobytes() for t in (*model.state_dict().values(), x))
        options = f"{args.under} {args.maximum} {args.seed}".encode()
        path = f"runs/landscape/{Path(out).stem}-{zlib.crc32(content + options):08x}.npz"
        z = model_surface(model, criterion, x, x, args.xs, args.seed, path)
        name = c["loss"].upper() + ("-LAMP" if c["lamp"] else "")
        panels.append((f"{name}, batch size {c['batch_size']}, under {args.under} loss", z))
    held = any(c["lamp"] and c["detach"] for c, _, _ in loaded)
    maximum = f"; Eq. 2's maximum {args.maximum}" if held else ""
    draw(out, panels, args, f"{', '.join(runs)}{maximum}; {len(x)} images")


def figure_3(args, out):
    """The paper's Fig. 3: contours of L2 and L2-LAMP (see READINGS), batch sizes 128, 16 and 4."""
    panels = []
    for lamp, batch_size in itertools.product((False, True), (128, 16, 4)):
        model, x, y = train_classifier(lamp, batch_size, args.seed, args)
        criterion = criterion_of(args, "l2", lamp, **READINGS["classifier"])
        z = model_surface(model, criterion, x, y, args.xs, args.seed)
        panels.append((f"{'L2-LAMP' if lamp else 'L2'}, batch size {batch_size}", z))
    what = f"encoders that predict MNIST's classes, {args.epochs} epochs, {len(x)} images"
    draw(out, panels, args, f"{what}; maximum {args.maximum}", rows=2, solid=False)


def mean_steepness(network, model, lamp, x, y, seed, args):
    """`steepness` under L2 or L2-LAMP, as an array: its mean over four pairs of directions."""
    found = []
    for pair in range(4):
        criterion = criterion_of(args, "l2", lamp, **READINGS[network])
        z = model_surface(model, criterion, x, y, args.xs, 10 * seed + pair)
        found.append([*steepness(z, args.xs, args.xs).values()])
    return np.mean(found, axis=0)


def measure_steepness(network, batch_size, seed, args):
    """How many times steeper LAMP is than L2, by three meanings -> three lines of the CSV.

    a: the L2 model seen through LAMP; b: each model under its own loss, as in the paper; c: both
    models under L2.
    """
    models = []
    for lamp in (False, True):
        if network == "autoencoder":
            _, model, x = open_run(train_run(lamp, batch_size, seed, args), args)
            y = x
        else:
            model, x, y = train_classifier(lamp, batch_size, seed, args)
        models.append(model)
    plain, amplified = models
    base, lines = mean_steepness(network, plain, False, x, y, seed, args), ""
    for compared, model, lamp in (("a", plain, True), ("b", amplified, True),
                                  ("c", amplified, False)):
        ratios = mean_steepness(network, model, lamp, x, y, seed, args) / base
        cells = ",".join(f"{ratio:.4f}" for ratio in ratios)
        lines += f"{network},{batch_size},{seed},{compared},{cells}\n"
    return lines


def measure_all(args, out):
    """Steepness of 2 networks x 3 batch sizes x 3 seeds, appended to a CSV as each ends; what is
    there already is not measured again. Raises ValueError where that has other options."""
    readings = [f"{network}={r['over']},eps-{r['eps']}" for network, r in READINGS.items()]
    head = (f"# images={args.images} grid={args.grid} span={args.span:g} epochs={args.epochs} "
            f"maximum={args.maximum} {' '.join(readings)} torch={torch.__version__}\nnetwork,"
            "batch_size,seed,compared,gradient,curvature,gradient_per_loss,curvature_per_loss\n")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(head)
    known = path.read_text()
    if not known.startswith(head):
        raise ValueError(f"{out} was measured with other options: delete it, or name another --out "
                         f"(expected: {head.splitlines()[0]})")
    for task in itertools.product(("autoencoder", "classifier"), (128, 16, 4), range(3)):
        if ",".join(map(str, task)) + ",c," not in known:
            lines = measure_steepness(*task, args)
            with path.open("a") as file:
                file.write(lines)
            print(lines, end="", flush=True)
    print(f"wrote {out}")


# ---- the command ----

def paraboloid():
    """A linear model under a quadratic loss: its surface is |r + a u + b v|^2, a paraboloid."""
    torch.manual_seed(0)
    model, x, y, xs = nn.Linear(4, 3), torch.randn(50, 4), torch.randn(50, 3), np.linspace(-1, 1, 5)
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))
    z = surface(around(model, lambda: float((model(x) - y).square().sum()), d, e), xs, xs)
    r, u, v = (model(x) - y).detach(), x @ d[0].T, x @ e[0].T              # d, e: zero for the bias
    print("    a     b   surface   |r + a u + b v|^2")
    for (i, a), (j, b) in itertools.product(enumerate(xs), enumerate(xs)):
        print(f"{a:5.1f} {b:5.1f} {z[i, j]:9.3f} {float((r + a * u + b * v).square().sum()):9.3f}")


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN", help="folders that train.py wrote, of one architecture")
    add("--figure", type=int, choices=(1, 3), help="the paper's figure, with the training it needs")
    add("--steepness", action="store_true", help="measure three meanings of steeper, 3 seeds")
    add("--under", choices=("own", "l1", "l2", "ssim"), default="own",
        help="the loss that is drawn: each run's own, or one for all (default: own)")
    add("--maximum", choices=("held", "moving"), default="held",
        help="Eq. 2's, of LAMP: of all points drawn, or of each point its own (default: held)")
    add("--grid", type=int, default=31, help="points a side, odd (default: 31)")
    add("--span", type=float, default=1.0, help="largest step, in weights' norms (default: 1)")
    add("--images", type=int, default=512, help="training images (default: 512)")
    add("--seed", type=int, default=0, help="of directions and a figure's training (default: 0)")
    add("--epochs", type=int, default=4, help="of a figure's training (default: 4)")
    add("--threads", type=int, default=0, help="CPU threads, 0 for all cores (default: 0)")
    add("--data-dir", help="where the data sets are (default: as in the run, or data)")
    add("--out", help="picture or CSV (default: in figures, runs/landscape, results/steepness.csv)")
    args = parser.parse_args(argv)
    args.command = shlex.join(["python", "landscape.py", *(argv or sys.argv[1:])])
    if args.grid < 3 or args.grid % 2 == 0:
        parser.error(f"--grid {args.grid}: an odd number from 3 on, so that the center is a point")
    if not 0 < args.span <= 1e3:
        parser.error(f"--span {args.span}: a step above 0, at most 1000")
    if min(args.images, args.epochs) < 1 or min(args.seed, args.threads) < 0:
        parser.error("--images and --epochs start at 1, --seed and --threads at 0")
    if bool(args.runs) + bool(args.figure) + args.steepness > 1:
        parser.error("give runs, or --figure, or --steepness")
    args.xs = np.linspace(-args.span, args.span, args.grid)
    args.xs[args.grid // 2] = 0.0                           # exactly the trained weights
    return parser, args


def main(argv=None):
    parser, args = parse(argv)
    torch.set_num_threads(args.threads or os.cpu_count())
    torch.set_flush_denormal(True)
    try:
        if args.steepness:
            measure_all(args, args.out or "results/steepness.csv")
        elif args.figure == 3:
            figure_3(args, args.out or "figures/figure3.png")
        elif args.figure == 1:
            runs = [train_run(lamp, 32, args.seed, args) for lamp in (False, True)]
            compare_runs(runs, args, args.out or "figures/figure1.png")
        elif args.runs:
            compare_runs(args.runs, args, args.out or "runs/landscape/landscape.png")
        else:
            paraboloid()
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"landscape.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted; the same command keeps the runs and rows that are done\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
