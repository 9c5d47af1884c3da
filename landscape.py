"""The loss landscape around a trained model, after Li et al. 2018.

LAMP's argument (Park et al. 2023, Fig. 1 and 3) is a picture. Around the weights w of a
trained model, along two random directions d and e, the loss

    f(a, b) = loss(w + a d + b e)

should be steeper with LAMP. Each filter of a direction gets the norm that this filter
has in w (filter normalization), so that models of different scale can be compared.
Drawn like that it is steeper. Drawn under one loss for both models, no difference is
shown (results/landscape.md).

    python landscape.py               a linear model's surface beside its closed form
    python landscape.py RUN RUN...    runs of train.py, side by side
    python landscape.py --figure 1    the paper's Fig. 1: autoencoders, L2 and L2-LAMP
    python landscape.py --figure 3    the paper's Fig. 3: encoders that predict digits

On your own model, in evaluation mode, however its loss is computed:

    model.eval()                                # else batch norm's statistics move
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))
    loss_at = loss_at_weights(model, lambda: float(my_loss(model(x), y)), d, e)
    z = surface(loss_at, xs, ys, "my.npz")      # after Ctrl-C, the same line goes on

L2 and LAMP are different functions, so their own surfaces compare scales as well as
shapes. With --under l2 the surfaces of all runs are drawn under one loss. LAMP needs
one more choice to be drawn, see `HeldLamp`. A first reading ends at `model_surface`.
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
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from torch import nn

import evaluate as ev
import train
from autoencoder import ConvAutoencoder
from data import load_torchvision, resize, to_float
from lamp_loss import BASE_LOSSES, ReconstructionLoss, largest


# ---- directions and surfaces: to copy alone, with os, time, numpy, torch and Path ----

def filter_normalize(d, w):
    """Give each filter of direction d the norm of the same filter in the weights w.

    d, w: tensors of one shape, a parameter's. A filter is a slice along dimension 0.
    The result is zero where w.dim() <= 1, for biases and batch normalization.
    """
    if w.dim() <= 1:
        return torch.zeros_like(w)
    # Li et al., Sec. 4: d <- d / |d| * |w|, filter by filter.
    of_a_filter = dict(dim=tuple(range(1, w.dim())), keepdim=True)
    norm_of_d = torch.linalg.vector_norm(d, **of_a_filter)          # (filters, 1, ...)
    norm_of_w = torch.linalg.vector_norm(w, **of_a_filter)
    return d / (norm_of_d + 1e-10) * norm_of_w


def random_direction(parameters, seed):
    """A Gaussian direction, filter-normalized: a tensor for each of the parameters."""
    generator = torch.Generator().manual_seed(seed)
    direction = []
    for w in parameters:
        d = torch.randn(w.shape, generator=generator).to(w.device)
        direction.append(filter_normalize(d, w.detach()))
    return direction


def loss_at_weights(model, loss, d, e):
    """The function (a, b) -> loss() with the model's weights at w + a d + b e.

    d, e: a tensor for each parameter. Calling it with (0, 0) restores the weights w.
    Buffers, such as the mean and variance of batch normalization, stay as they are.
    """
    weights = [w.detach().clone() for w in model.parameters()]

    @torch.no_grad()
    def loss_at(a, b):
        for p, w, along_d, along_e in zip(model.parameters(), weights, d, e):
            p.copy_(w + a * along_d + b * along_e)
        return loss()
    return loss_at


def surface(loss_at, xs, ys, path=None):
    """z[i, j] = loss_at(xs[i], ys[j]), an array (len(xs), len(ys)).

    Each point is computed once. path: a .npz file, which is written as the surface
    grows. If it is there already, only its missing points (NaN) are computed, so delete
    it when the weights have changed. Raises ValueError where it holds another grid.
    """
    z = np.full((len(xs), len(ys)), np.nan)
    if path and Path(path).exists():
        z = read_surface(path, xs, ys)
    todo = np.argwhere(np.isnan(z))
    start = printed = time.perf_counter()
    try:
        for done, (i, j) in enumerate(todo, 1):
            z[i, j] = loss_at(float(xs[i]), float(ys[j]))

            # Every five seconds, say how far it is and write what there is.
            now = time.perf_counter()
            if now - printed > 5:
                printed = now
                left = (now - start) / done * (len(todo) - done)
                print(f"{done} of {len(todo)} points, {left:.0f} s left", flush=True)
                if path:
                    write_surface(path, z, xs, ys)
    finally:
        # Always put the weights back, by computing the loss there, and keep the points.
        if len(todo):
            loss_at(0.0, 0.0)
        if path:
            write_surface(path, z, xs, ys)
    return z


def read_surface(path, xs, ys):
    """The surface in a file. Raises ValueError where its grid is not xs, ys."""
    with np.load(path) as saved:
        same = np.array_equal(saved["xs"], xs) and np.array_equal(saved["ys"], ys)
        if not same:
            raise ValueError(f"{path} holds another grid: delete it, or name another "
                             "file")
        return saved["z"]


def write_surface(path, z, xs, ys):
    """Write beside the file, then rename: an interruption leaves no broken file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    np.savez(f"{path}.tmp.npz", z=z, xs=xs, ys=ys)
    os.replace(f"{path}.tmp.npz", path)


# ---- LAMP as a function of the weights ----

class HeldLamp(nn.Module):
    """LAMP with a maximum in Eq. 2 that does not move, so that one function is drawn.

    It is not quite the loss that was trained, since Eq. 2's maximum changes from point
    to point. Here it is held at the largest error that any drawn point has, of each
    image (over="image") or of all together (over="batch"). Call `raise_maximum` at
    every point before the first `forward`. With a smaller maximum, 1 - L' would be
    negative somewhere.

    The price: near the trained weights L' is smaller than it was in training, so less
    is amplified there. With --maximum moving each point is divided by its own largest
    error instead.
    """

    def __init__(self, loss="l2", eps=0.03, over="image"):
        super().__init__()
        self.base_loss, self.eps, self.over = BASE_LOSSES[loss], eps, over
        self.maximum = torch.tensor(1e-30)

    def raise_maximum(self, y_hat, y):
        """Raise the maximum to these errors, for the same images at each point.

        -> the maximum of these errors alone, averaged over the images, to be printed.
        """
        here = largest(self.base_loss(y_hat, y), self.over)
        self.maximum = torch.maximum(here, self.maximum)
        return here.mean()

    def forward(self, y_hat, y):
        scaled = self.base_loss(y_hat, y) / self.maximum * (1 - self.eps)
        return -torch.log1p(-scaled).sum() / len(y)


def model_surface(model, criterion, x, y, xs, seed=0, path=None):
    """The surface of criterion(model(x), y) in two directions: (len(xs), len(xs))."""
    def loss():
        return float(criterion(model(x), y))

    def largest_error():
        return float(criterion.raise_maximum(model(x), y))

    model.eval()
    # Seeds 2 s and 2 s + 1, so that no two settings share a direction.
    d = random_direction(model.parameters(), 2 * seed)
    e = random_direction(model.parameters(), 2 * seed + 1)

    # A maximum that is held needs two passes over the points. The first one raises it,
    # and is made each time: it has no file. Only its value in the center is printed.
    if isinstance(criterion, HeldLamp):
        maxima = surface(loss_at_weights(model, largest_error, d, e), xs, xs)
        center = maxima[len(xs) // 2, len(xs) // 2]
        held = float(criterion.maximum.mean())
        print(f"Eq. 2's maximum is {center:.3f} at the trained weights, and is held at "
              f"{held:.3f}")
    return surface(loss_at_weights(model, loss, d, e), xs, xs, path)


# ---- pictures ----

class Settings(NamedTuple):
    """What all pictures share."""
    xs: np.ndarray                      # steps along a direction, 0 in the middle
    images: int = 512                   # how many training images the loss is taken of
    seed: int = 0                       # of the directions, and of a figure's training
    epochs: int = 4                     # of a figure's training
    maximum: str = "held"               # Eq. 2's: "held", or "moving" with each point
    data_dir: str = None                # None: as in the run, or data
    command: str = ""                   # for the footer


def draw_contours(axis, xs, z, levels):
    """The contour lines of one panel. A cross marks the trained weights."""
    inside = (z.min() < levels) & (levels < z.max())
    if inside.any():
        # z[i, j] is for a = xs[i], to the right, but `contour` wants rows for b first.
        axis.contour(xs, xs, z.T, levels=levels, cmap="viridis",
                     vmin=levels[0], vmax=levels[-1])
    else:
        axis.text(0, 0, f"flat: {z.min():.3g} to {z.max():.3g}\n", ha="center")
    axis.plot(0, 0, "+", color="red", markersize=10)
    axis.set(xlabel="direction d", ylabel="direction e", aspect="equal")


def draw_solid(axis, xs, z, low, high):
    """The surface of one panel as a solid. Corners that tower are cut off at `high`."""
    a, b = np.meshgrid(xs, xs, indexing="ij")
    axis.plot_surface(a, b, z.clip(max=high), cmap="viridis", vmin=low, vmax=high)
    axis.set(zlim=(min(low, 0), high), xlabel="d", ylabel="e")


def color_range(panels):
    """The smallest and nearly the largest loss of all panels, for one color scale."""
    values = np.concatenate([z.ravel() for _, z in panels])
    if not np.isfinite(values).all():
        raise ValueError("the loss is not finite at some points: use a smaller --span")
    low, high = values.min(), np.quantile(values, 0.97)
    if high <= low:                                         # all surfaces are flat
        high = low + 1
    return low, high


def draw(path, panels, settings, what, columns=None):
    """Draw surfaces with the same contour levels and colors.

    panels: [(title, z), ...]. They are drawn as solids with their contours below, side
    by side (Fig. 1). With `columns`, as contours alone, so many in a row (Fig. 3).
    what: for the footer.
    """
    xs = settings.xs
    low, high = color_range(panels)
    solid = columns is None
    columns = columns or len(panels)
    rows = 2 if solid else len(panels) // columns
    figure = Figure((4.2 * columns + 0.8, 4.0 * rows), layout="constrained")
    for number, (title, z) in enumerate(panels, 1):
        first = figure.add_subplot(rows, columns, number, title=title,
                                   projection="3d" if solid else None)
        contours = first
        if solid:
            draw_solid(first, xs, z, low, high)
            contours = figure.add_subplot(rows, columns, columns + number)
        draw_contours(contours, xs, z, np.linspace(low, high, 31))
    figure.colorbar(ScalarMappable(Normalize(low, high), "viridis"), ax=figure.axes,
                    shrink=0.5, format="%.3g", label="loss of an image")

    # The footer says what was drawn and how to draw it again.
    footer = (f"{settings.command}; {what}; +: the trained weights; directions of seed "
              f"{settings.seed}, filter-normalized; {len(xs)} x {len(xs)} points")
    figure.supxlabel("\n".join(textwrap.wrap(footer, 40 * columns)), fontsize=7)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


# ---- the models that are drawn ----

EQ_2 = {                                # how it is read, see lamp_loss.scale
    "autoencoder": dict(eps=0.03, over="image", detach=True),       # train.py's default
    # Over each image the encoder hardly learns: its accuracy is .60, not .97.
    "classifier": dict(eps=0.1, over="batch", detach=True),
}


def criterion_of(loss, lamp, eps, over, detach, maximum):
    """The loss that is drawn. maximum: "held" or "moving", see `Settings`.

    A run with detach=False was trained through the maximum, so for it the maximum moves
    in the picture, whatever `maximum` says.
    """
    if lamp and detach and maximum == "held":
        return HeldLamp(loss, eps, over)
    return ReconstructionLoss(loss, lamp, eps, over)


def open_run(run, settings):
    """A run -> its config, its model, and training images as the model sees them.

    The images are the first ones, in the order of the data set. Raises ValueError where
    the model was solved, not trained by a loss.
    """
    state, model = ev.load_run(run)
    c = dict(state["config"])
    if c["model"] in ev.SOLVED:
        raise ValueError(f"{run}: {c['model']} was not trained by a loss, so there is "
                         "no surface to draw")
    c["data_dir"] = settings.data_dir or c["data_dir"]
    inputs = ev.open_data(c, "cpu", state)[1]
    return c, model, inputs.prepare(inputs.train[:settings.images])


def train_autoencoder(lamp, batch_size, seed, settings):
    """Train on MNIST's digit 3 with L2 or L2-LAMP, unless that is done -> the run."""
    loss = "l2-lamp" if lamp else "l2"
    name = f"mnist-3-{loss}-b{batch_size}-e{settings.epochs}-s{seed}"
    config = dict(
        dataset="mnist", normal="3", data_dir=settings.data_dir or "data", lamp=lamp,
        latent=128, lr=1e-3, batch_size=batch_size, epochs=settings.epochs, seed=seed,
        eval_every=0, pictures=False, out=f"runs/landscape/{name}")
    record = train.run(config, resume=True, command=settings.command)
    if record["interrupted"]:
        raise KeyboardInterrupt
    return config["out"]


def train_classifier(lamp, batch_size, seed, settings):
    """Sec. 3.2: "the encoder part of the AE that is trained to predict class labels".

    What follows the encoder is our choice: flatten, a linear map and a sigmoid, with L2
    or L2-LAMP against one-hot labels of MNIST -> model, x, y.
    """
    (images, labels), _, _ = load_torchvision(
        "MNIST", Path(settings.data_dir or "data"))
    x = resize(images[:10000], 32)                                  # (10000, 1, 32, 32)
    y = torch.eye(10)[labels[:10000]]                               # (10000, 10)
    torch.manual_seed(seed)
    encoder = ConvAutoencoder().encoder                             # -> (B, 128, 2, 2)
    model = nn.Sequential(encoder, nn.Flatten(), nn.Linear(512, 10), nn.Sigmoid())
    loss = "L2-LAMP" if lamp else "L2"
    print(f"encoder, {loss}, batch size {batch_size}, seed {seed}")
    criterion = ReconstructionLoss("l2", lamp, **EQ_2["classifier"])
    train.fit(model, x, criterion, y, epochs=settings.epochs, batch_size=batch_size,
              seed=seed)
    # Batch normalization uses these means and variances from here on.
    train.update_bn(to_float(x).split(250), model.eval())
    return model, to_float(x[:settings.images]), y[:settings.images]


# ---- the paper's figures ----

def figure_1(settings, out):
    """The paper's Fig. 1: autoencoders trained with L2 (left) and L2-LAMP.

    The digit 3 and batch size 32 are our choice. The paper does not name its own.
    """
    runs = []
    for lamp in (False, True):
        runs.append(train_autoencoder(lamp, 32, settings.seed, settings))
    compare_runs(runs, settings, out)


def compare_runs(runs, settings, out, under="own"):
    """Draw runs side by side, along the same random draws.

    under: the loss that is drawn, each run's "own", or "l1", "l2" or "ssim" for all.
    Raises ValueError where two runs differ in their architecture.
    """
    panels, shapes_of_first = [], None
    maxima = set()                                  # which kinds of it, for the footer
    for run in runs:
        c, model, x = open_run(run, settings)

        # The same random draws need equal shapes. Each run scales them by its filters.
        shapes = [p.shape for p in model.parameters()]
        shapes_of_first = shapes_of_first or shapes
        if shapes != shapes_of_first:
            raise ValueError(f"{run} has another architecture than {runs[0]}")

        # The loss that is drawn.
        loss, lamp = (c["loss"], c["lamp"]) if under == "own" else (under, False)
        criterion = criterion_of(loss, lamp, c["eps"], c["over"], c["detach"],
                                 settings.maximum)
        if lamp:
            maxima.add("held" if isinstance(criterion, HeldLamp) else "moving")

        # Its surface. Points of the loss that are in a file are not computed again.
        drawn = loss, lamp, c["eps"], c["over"], c["detach"], settings.maximum
        path = surface_file(model, x, drawn, settings, out)
        z = model_surface(model, criterion, x, x, settings.xs, settings.seed, path)
        name = c["loss"].upper() + ("-LAMP" if c["lamp"] else "")
        panels.append((f"{name}, batch size {c['batch_size']}, under {under} loss", z))
    maximum = f"; Eq. 2's maximum {' and '.join(sorted(maxima))}" if maxima else ""
    draw(out, panels, settings, f"{', '.join(runs)}{maximum}; {len(x)} images")


def surface_file(model, x, drawn, settings, out):
    """The file of a surface, named by a checksum of all that the surface depends on."""
    tensors = *model.state_dict().values(), x
    content = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    content += settings.xs.tobytes()
    content += f"{drawn} {settings.seed}".encode()
    return f"runs/landscape/{Path(out).stem}-{zlib.crc32(content):08x}.npz"


def figure_3(settings, out):
    """The paper's Fig. 3: contours of L2 (above) and L2-LAMP, batch sizes 128, 16, 4.

    Nothing of it is kept, so after an interruption it begins anew.
    """
    panels = []
    for lamp, batch_size in itertools.product((False, True), (128, 16, 4)):
        model, x, y = train_classifier(lamp, batch_size, settings.seed, settings)
        criterion = criterion_of("l2", lamp, **EQ_2["classifier"],
                                 maximum=settings.maximum)
        z = model_surface(model, criterion, x, y, settings.xs, settings.seed)
        loss = "L2-LAMP" if lamp else "L2"
        panels.append((f"{loss}, batch size {batch_size}", z))
    what = (f"encoders that predict MNIST's classes, {settings.epochs} epochs, "
            f"{len(x)} images; maximum {settings.maximum}")
    draw(out, panels, settings, what, columns=3)


# ---- the command ----

def paraboloid():
    """A linear model under a squared loss: its surface is |r + a u + b v|^2.

    r is the error at the trained weights. u and v are what the directions add to it.
    """
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3), torch.randn(50, 4), torch.randn(50, 3)
    xs = np.linspace(-1, 1, 5)
    d, e = (random_direction(model.parameters(), seed) for seed in (0, 1))

    def loss():
        return float((model(x) - y).square().sum())

    z = surface(loss_at_weights(model, loss, d, e), xs, xs)
    r = (model(x) - y).detach()                             # (50, 3)
    u, v = x @ d[0].T, x @ e[0].T                           # zero for the bias
    print("    a     b   surface   |r + a u + b v|^2")
    for i, a in enumerate(xs):
        for j, b in enumerate(xs):
            expected = float((r + a * u + b * v).square().sum())
            print(f"{a:5.1f} {b:5.1f} {z[i, j]:9.3f} {expected:9.3f}")


def steps(span, grid):
    """Steps from -span to span. grid: how many, odd, so that the middle one is 0."""
    xs = np.linspace(-span, span, grid)
    xs[grid // 2] = 0.0                             # exactly, for the trained weights
    return xs


def parse(argv):
    """The command line -> its parser, for errors, and the options."""
    description = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    add = parser.add_argument
    add("runs", nargs="*", metavar="RUN",
        help="folders that train.py wrote, of one architecture")
    add("--figure", type=int, choices=(1, 3),
        help="the paper's figure, with the training it needs")
    add("--under", choices=("own", *BASE_LOSSES), default="own",
        help="the loss that is drawn: each run's own, or one for all (default: own)")
    add("--maximum", choices=("held", "moving"), default="held",
        help="of LAMP's Eq. 2: held for all points (default; not with --no-detach), or "
             "each point's own")
    add("--grid", type=int, default=31, help="points on a side, odd (default: 31)")
    add("--span", type=float, default=1.0,
        help="the largest step, in weights' norms (default: 1)")
    add("--images", type=int, default=512, help="training images (default: 512)")
    add("--seed", type=int, default=0,
        help="of directions and a figure's training (default: 0)")
    add("--epochs", type=int, default=4, help="of a figure's training (default: 4)")
    add("--data-dir", help="where the data sets are (default: as in the run, or data)")
    add("--out", help="the picture (default: in runs/landscape)")
    args = parser.parse_args(argv)
    if args.grid < 3 or args.grid % 2 == 0:
        parser.error(f"--grid {args.grid}: use an odd number from 3 on, so that the "
                     "center is a point")
    if not 0 < args.span <= 1e3:
        parser.error(f"--span {args.span}: use a step above 0 and at most 1000")
    if min(args.images, args.epochs) < 1 or args.seed < 0:
        parser.error("--images and --epochs start at 1, --seed at 0")
    if args.runs and args.figure:
        parser.error("give runs, or --figure, not both")
    if args.under != "own" and not args.runs:
        parser.error("--under is for runs: give their folders")
    return parser, args


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    parser, args = parse(argv)
    settings = Settings(
        xs=steps(args.span, args.grid),
        images=args.images,
        seed=args.seed,
        epochs=args.epochs,
        maximum=args.maximum,
        data_dir=args.data_dir,
        command=shlex.join(["python", "landscape.py", *argv]))
    # Denormal numbers, which are tiny, are slow on a CPU. They are rounded to 0.
    torch.set_flush_denormal(True)
    try:
        if args.figure == 1:
            figure_1(settings, args.out or "runs/landscape/figure1.png")
        elif args.figure == 3:
            figure_3(settings, args.out or "runs/landscape/figure3.png")
        elif args.runs:
            out = args.out or "runs/landscape/landscape.png"
            compare_runs(args.runs, settings, out, args.under)
        else:
            paraboloid()
    except (ValueError, OSError, FloatingPointError) as error:
        parser.exit(2, f"landscape.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: the same command goes on with the surfaces of "
                         "runs where this one stopped (--figure 3 begins anew)\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
