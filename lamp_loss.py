"""LAMP, Loss AMPlification (Park et al. 2023), Sec. 2.2 and 2.3.

An autoencoder that has only seen normal images should reconstruct anomalies badly.
In practice it often learns to copy whatever it is shown. LAMP trains the same network
with a steeper loss:

    Eq. 2    L'     = L / max(L) * (1 - eps)        scale the error into [0, 1 - eps]
    Eq. 1    LAMP   = sum of -log(1 - L')           amplify it, element by element

They are computed in this order. An element is one value (h, w, c) of an image. The
slope in L', 1 / (1 - L'), rises from 1, where L' = 0, to 1/eps, where L' is largest. So
the worst elements of an image dominate the training step. The paper argues that a
steeper loss makes a sharper loss landscape, in which a network generalizes less, and so
reconstructs what it has never seen worse (landscape.py).

    criterion = ReconstructionLoss("l2", lamp=True)
    loss = criterion(y_hat, y)      # two tensors (B, C, H, W); for SSIM in [0, 1]

The paper leaves three choices open. They are arguments of `scale`: the value of eps,
what the maximum is taken over, and whether the gradient flows through that maximum.
results/mnist.md, "Which LAMP?", says how the defaults were chosen.
Eq. 1 sums over h, w and c, but its L carries no indices. We take it as the error of one
element, as the authors' poster does, and average over a batch.

Run this file to draw the paper's Fig. 2:  python lamp_loss.py
"""
import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


# ---- base losses: an error for each element, not reduced ----

def l1(y_hat, y):
    """The absolute error |y_hat - y|: (B, C, H, W) -> (B, C, H, W)."""
    return (y_hat - y).abs()


def l2(y_hat, y):
    """The squared error (y_hat - y)^2: (B, C, H, W) -> (B, C, H, W)."""
    return (y_hat - y).square()


def gaussian_window(size, sigma, like):
    """Gaussian weights (size,) that sum to 1, with the dtype and device of `like`."""
    offset = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weights = torch.exp(-0.5 * (offset / sigma) ** 2)
    return weights / weights.sum()


def local_mean(x, window):
    """The weighted mean around each pixel: (B, C, H, W) -> (B, C, H, W).

    Borders are reflected. A two-dimensional Gaussian is the product of two
    one-dimensional ones, so we average down first, and then across.
    """
    channels, radius = x.shape[1], len(window) // 2
    columns = window.view(1, 1, -1, 1).repeat(channels, 1, 1, 1)    # (C, 1, size, 1)
    rows = window.view(1, 1, 1, -1).repeat(channels, 1, 1, 1)       # (C, 1, 1, size)
    x = F.pad(x, [radius] * 4, mode="reflect")
    x = F.conv2d(x, columns, groups=channels)
    return F.conv2d(x, rows, groups=channels)


def ssim(y_hat, y, size=11, sigma=1.5, k1=0.01, k2=0.03):
    """1 - SSIM (Wang et al. 2004), from 0 (equal) to 2: (B, C, H, W) -> (B, C, H, W).

    Means, variances and the covariance are taken in a Gaussian window of size x size
    pixels. They are computed in float32 or finer, also inside torch.autocast, because
    a variance here is a small difference of large numbers. Raises ValueError where an
    image is smaller than the window.
    """
    height, width = y.shape[2:]
    if min(height, width) < size:
        raise ValueError(f"SSIM needs images of at least {size}x{size} pixels, "
                         f"got {height}x{width}: use larger images, or loss l1 or l2")
    y_hat, y = at_least_float32(y_hat), at_least_float32(y)

    # Means, variances and the covariance around each pixel, each (B, C, H, W).
    with torch.autocast(y.device.type, enabled=False):
        window = gaussian_window(size, sigma, y)
        mean_hat = local_mean(y_hat, window)
        mean = local_mean(y, window)
        variance_hat = local_mean(y_hat * y_hat, window) - mean_hat * mean_hat
        variance = local_mean(y * y, window) - mean * mean
        covariance = local_mean(y_hat * y, window) - mean_hat * mean

    # `luminance` compares the means, `structure` the deviations from them. The
    # constants, for images in [0, 1], keep both quotients finite.
    c1, c2 = k1 ** 2, k2 ** 2
    luminance = (2 * mean_hat * mean + c1) / (mean_hat ** 2 + mean ** 2 + c1)
    structure = (2 * covariance + c2) / (variance_hat + variance + c2)

    # Rounding can push 1 - SSIM slightly below 0, but Eq. 2 expects errors >= 0.
    return (1 - luminance * structure).clamp(min=0)


def at_least_float32(x):
    """The tensor itself, or its float32 copy where it has only 16 bits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


BASE_LOSSES = {"l1": l1, "l2": l2, "ssim": ssim}


# ---- LAMP ----

def largest(error, over):
    """The maximum of Eq. 2, of an error (B, ...) with two or more dimensions.

    over: "image" gives one for each image, (B, 1, ..., 1). "batch" gives one for all, a
    scalar. Raises ValueError for another word.
    """
    if over not in ("image", "batch"):
        raise ValueError(f'over must be "image" or "batch", got {over!r}')
    if over == "batch":
        return error.max()
    all_but_the_batch = tuple(range(1, error.dim()))
    return error.amax(dim=all_but_the_batch, keepdim=True)          # (B, 1, ..., 1)


def scale(error, eps=0.03, over="image", detach=True):
    """Eq. 2: L' = L / max(L) * (1 - eps), in [0, 1 - eps]: (B, ...) -> (B, ...).

    error: values of 0 or more, from any base loss. Its dtype is kept.
    eps: how far the largest L' stays below 1. The largest slope in L' is 1/eps. The
        paper gives no value.
    over: "image" divides each image by its own largest error, so that every image
        counts equally. "batch" divides all of them by the largest error of the batch,
        so that badly reconstructed images count more.
    detach: if True, no gradient flows through the maximum. If False, it does. A step
        then also pushes the largest error up, which lowers all other L'.
    Raises ValueError for another `over`, and for an eps that is not below 1, or that is
    below the dtype's precision. 1 - eps could be 1 there, and its logarithm infinite.
    """
    precision = torch.finfo(error.dtype)
    if not precision.eps <= eps < 1:
        raise ValueError(f"eps must be below 1 and, in {error.dtype}, at least "
                         f"{precision.eps:.1e}, got {eps}")
    maximum = largest(error, over)
    if detach:
        maximum = maximum.detach()
    # An image without any error would give 0/0. With this bound it gives 0. The bound
    # is no smaller than 1e-30, since the gradient divides by it and must not overflow.
    maximum = maximum.clamp(min=max(precision.tiny, 1e-30))
    return error / maximum * (1 - eps)


def lamp(error, eps=0.03, over="image", detach=True):
    """The terms of Eq. 1's sum, -log(1 - L'), of each element: (B, ...) -> (B, ...).

    The values lie in [0, -log(eps)], never below L'. Arguments are those of `scale`.
    Pitfall: Eq. 2 divides by the maximum, so lamp(c * error) equals lamp(error). The
    value of LAMP need not fall as the model improves. Watch the base error instead.
    """
    return -torch.log1p(-scale(error, eps, over, detach))


class ReconstructionLoss(nn.Module):
    """A base loss, amplified or not: summed over an image, averaged over a batch.

    loss: "l1", "l2" or "ssim". lamp: whether to amplify it. eps, over, detach: see
    `scale`. Raises ValueError for an unknown loss.
    forward(y_hat, y): two tensors (B, C, H, W) -> a scalar. Afterwards `base_error`
    holds the same sum without amplification, to print beside the loss. Raises
    ValueError where the two shapes differ.
    """

    def __init__(self, loss="l2", lamp=False, eps=0.03, over="image", detach=True):
        super().__init__()
        if loss not in BASE_LOSSES:
            names = ", ".join(BASE_LOSSES)
            raise ValueError(f"loss must be one of {names}, got {loss!r}")
        self.base_loss = BASE_LOSSES[loss]
        self.amplified = lamp
        self.eps, self.over, self.detach = eps, over, detach
        self.base_error = None

    def forward(self, y_hat, y):
        if y_hat.shape != y.shape:
            raise ValueError("y_hat and y must have one shape, got "
                             f"{tuple(y_hat.shape)} and {tuple(y.shape)}")
        error = self.base_loss(y_hat, y)                            # (B, C, H, W)
        # In float16 the sum over an image could overflow.
        error = at_least_float32(error)
        self.base_error = error.detach().sum() / len(y)
        if self.amplified:
            error = lamp(error, self.eps, self.over, self.detach)
        return error.sum() / len(y)


# ---- the paper's Fig. 2 ----

def figure_2(path, eps=0.1):
    """The paper's Fig. 2: L1, L2, their LAMP and the gradients of all four.

    They are printed as a table and drawn as a picture. The error y_hat - y of one
    element runs from -1 to 1. The maximum in Eq. 2 is that of this range, 1.
    path: where the picture goes.
    eps: larger than in training, so that the steep ends stay in the picture. The paper
        does not say which one it drew.
    """
    from matplotlib.figure import Figure                # only needed for this picture

    error = (torch.arange(-200.0, 201.0) / 200).requires_grad_()    # (401,)
    columns = [error.tolist()]
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    rows = figure.subplots(2, 2)
    for base_loss, name, (left, right) in zip((l1, l2), ("L_1", "L_2"), rows):
        plain = base_loss(error, torch.zeros_like(error))
        # As the elements of one image, so that they share one maximum.
        amplified = lamp(plain[None], eps)[0]
        curves = {f"${name}$": plain, f"${name}^{{LAMP}}$": amplified}
        for label, loss in curves.items():
            # The gradient is PyTorch's, as in training.
            slope, = torch.autograd.grad(loss.sum(), error, retain_graph=True)
            left.plot(error.detach(), loss.detach(), label=label)
            right.plot(error.detach(), slope)
            columns += [loss.tolist(), slope.tolist()]
        left.set(xlabel=r"$\hat{y} - y$", ylabel="loss")
        left.legend()
        right.set(xlabel=r"$\hat{y} - y$", ylabel="gradient")

    names = ["error"]
    for name in ("L1", "L1-LAMP", "L2", "L2-LAMP"):
        names += [name, "slope"]
    print("".join(f"{name:>9}" for name in names))
    # Losses are even in the error and slopes odd, so the rows begin at an error of 0.
    for i in range(200, 401, 25):
        print("".join(f"{column[i]:9.3f}" for column in columns))
    figure.supxlabel(f"python lamp_loss.py --eps {eps}", fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw Fig. 2: LAMP and its gradients.")
    parser.add_argument("--eps", type=float, default=0.1,
                        help="Eq. 2 (default: 0.1)")
    parser.add_argument("--out", default="runs/figure2.png",
                        help="where the picture goes")
    args = parser.parse_args(argv)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure_2(args.out, args.eps)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    raise SystemExit(0)


if __name__ == "__main__":
    main()
