"""LAMP, Loss AMPlification (Park et al. 2023), Sec. 2.2 and 2.3: Eq. 1 and Eq. 2.

Train an autoencoder on normal images only, but amplify its reconstruction error: scale the error
map into [0, 1) (Eq. 2), then take -log(1 - error) of each element and sum (Eq. 1). Its slope in the
scaled error is 1 at a small one and 1/eps at the largest, so the worst pixels count most.

    loss = ReconstructionLoss("l2", lamp=True)(y_hat, y)    # y, y_hat: (B, C, H, W) in [0, 1]

What the paper leaves open is an argument here: the value of eps, what the maximum in Eq. 2 is taken
over, and whether gradient flows through it. Of 24 readings five were tried on all digits, and gain
alike; the default's gain differs least from seed to seed (results/README.md, "Which LAMP?").
The sum in Eq. 1 is over the elements of one image, as on the authors' poster of the paper
(y_{h,w,c}); a batch is averaged. Run this file to draw the paper's Fig. 2: python lamp_loss.py

The second half holds the training conditions of Sec. 3.1, its optimizers and Muon, and the parts
of a training loop that `train.fit` is made of. Copying the loss alone needs the first half.
"""
import io
import math
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


def l1(y_hat, y):
    """Absolute error |y_hat - y|: (B, C, H, W) -> (B, C, H, W), not reduced."""
    return (y_hat - y).abs()


def l2(y_hat, y):
    """Squared error (y_hat - y)^2: (B, C, H, W) -> (B, C, H, W), not reduced."""
    return (y_hat - y).square()


def ssim(y_hat, y, size=11, sigma=1.5, k1=0.01, k2=0.03):
    """1 - SSIM (Wang et al. 2004), 0 (equal) to 2: (B, C, H, W) -> (B, C, H, W), not reduced.

    Images in [0, 1]; Gaussian window of size x size pixels. Borders are reflected, so the map keeps
    its size. Raises ValueError where an image is smaller than the window. Rounding can take
    1 - SSIM below 0, where Eq. 2 is not defined: it is clamped there.
    """
    channels, height, width = y.shape[1:]
    if min(height, width) < size:
        raise ValueError(f"SSIM needs images of at least {size}x{size} pixels, got {height}x{width}"
                         ": use larger images, or loss l1 or l2")
    offset = torch.arange(size, dtype=y.dtype, device=y.device) - size // 2
    window = torch.exp(-0.5 * (offset / sigma) ** 2)
    window = (window / window.sum()).expand(5 * channels, 1, size)      # one copy a plane
    planes = torch.cat([y_hat, y, y_hat * y_hat, y * y, y_hat * y], 1)  # (B, 5C, H, W)
    planes = F.pad(planes, [size // 2] * 4, mode="reflect")
    planes = F.conv2d(planes, window[..., None], groups=5 * channels)   # the Gaussian separates:
    planes = F.conv2d(planes, window[:, :, None], groups=5 * channels)  # columns, then rows
    mean_hat, mean, square_hat, square, product = planes.chunk(5, dim=1)
    variances = square_hat - mean_hat * mean_hat + square - mean * mean
    covariance = product - mean_hat * mean
    c1, c2 = k1 ** 2, k2 ** 2                                           # data range 1
    similarity = ((2 * mean_hat * mean + c1) * (2 * covariance + c2)
                  / ((mean_hat * mean_hat + mean * mean + c1) * (variances + c2)))
    return (1 - similarity).clamp(min=0)


BASE_LOSSES = {"l1": l1, "l2": l2, "ssim": ssim}


def largest(error, over):
    """Eq. 2's max(L): a scalar over the "batch", or (B, 1, ..., 1) with that of each "image"."""
    if over == "batch":
        return error.max()
    return error.flatten(1).amax(1).view(-1, *[1] * (error.dim() - 1))


def scale(error, eps=0.03, over="image", detach=True):
    """Eq. 2: L' = L / max(L) * (1 - eps), in [0, 1 - eps]: (B, ...) -> (B, ...), dtype kept.

    error: any map of errors >= 0.
    eps: the slope of LAMP at the largest error is 1/eps, so eps decides how far the worst pixel
        outweighs the others. The paper gives no value. At .01 the error of MNIST's normals is
        already twice that without LAMP.
    over: the maximum is that of each "image" or of the whole "batch". By image, every image weighs
        alike, however well it is reconstructed; by batch, the badly reconstructed ones weigh more.
    detach: the maximum is a constant to the gradient. Otherwise the gradient pushes the largest
        error up as strongly as all the others down: sum(error * gradient) is 0, and no step
        shrinks all errors alike.
    A maximum below 1e-30 (float16: 6e-5) counts as that, so all zero stays zero, never NaN.
    Raises ValueError for another `over`, or an eps outside (0, 1) or too small for the dtype.
    """
    if over not in ("image", "batch"):
        raise ValueError(f'over must be "image" or "batch", got {over!r}')
    info = torch.finfo(error.dtype)
    if not info.eps <= eps < 1:
        raise ValueError(f"eps must be below 1 and at least {info.eps:.1e} (or 1 - eps is rounded "
                         f"to 1 in {error.dtype}, and the logarithm infinite), got {eps}")
    maximum = largest(error, over).clamp(min=max(info.tiny, 1e-30))
    if detach:
        maximum = maximum.detach()
    return error / maximum * (1 - eps)


def lamp(error, eps=0.03, over="image", detach=True):
    """Eq. 1 before its sum: -log(1 - L') with L' from Eq. 2: (B, ...) -> (B, ...), dtype kept.

    In [0, -log(eps)], never below L'; its slope in L' is 1 / (1 - L'). Arguments as in `scale`.
    Pitfall: Eq. 2 cancels the error's scale, lamp(c * error) = lamp(error). The value of LAMP
    therefore says nothing about progress: print the base error beside it.
    """
    return -torch.log1p(-scale(error, eps, over, detach))


class ReconstructionLoss(nn.Module):
    """A training loss: base error, amplified or not, summed over C, H, W (Eq. 1), mean over B.

    loss: "l1", "l2" or "ssim"; lamp: amplify it; eps, over, detach: see `scale`.
    forward(y_hat, y): two (B, C, H, W) -> scalar. `base_error` then holds the loss before
    amplification, a detached scalar reduced alike. Raises ValueError for an unknown loss.
    """

    def __init__(self, loss="l2", lamp=False, eps=0.03, over="image", detach=True):
        super().__init__()
        if loss not in BASE_LOSSES:
            raise ValueError(f"loss must be one of {', '.join(BASE_LOSSES)}, got {loss!r}")
        self.base_loss, self.amplify = BASE_LOSSES[loss], lamp
        self.eps, self.over, self.detach = eps, over, detach
        self.base_error = None

    def forward(self, y_hat, y):
        error = self.base_loss(y_hat, y)                                # (B, C, H, W)
        self.base_error = error.detach().sum() / len(y)
        if self.amplify:
            error = lamp(error, self.eps, self.over, self.detach)
        return error.sum() / len(y)


class HeldLamp(nn.Module):
    """LAMP as a function of the weights, to draw (landscape.py): Eq. 2's maximum does not move.

    Held at its value for the trained weights, it would make 1 - L' negative where errors are far
    larger. So it is the largest error of all points drawn, of all images together
    (over="batch") or of each ("image"): `observe` every point, then call. At the trained weights,
    where errors are smaller, the loss is then amplified less than in training.
    """

    def __init__(self, loss="l2", eps=0.03, over="image"):
        super().__init__()
        self.base_loss, self.eps, self.over = BASE_LOSSES[loss], eps, over
        self.maximum = torch.tensor(1e-30)

    def observe(self, y_hat, y):
        """Raise the maximum to these errors -> their own maximum (mean over images)."""
        here = largest(self.base_loss(y_hat, y), self.over)
        self.maximum = torch.maximum(here, self.maximum)
        return here.mean()

    def forward(self, y_hat, y):
        scaled = self.base_loss(y_hat, y) / self.maximum * (1 - self.eps)
        return -torch.log1p(-scaled).sum() / len(y)


# ---- for train.py: the optimizers of Sec. 3.1, Muon (not the paper's), steps, checkpoints ----

@torch.no_grad()
def orthogonalize(g):
    """U V^T of each g = U S V^T, (n, rows, columns), roughly: five steps of a Newton-Schulz
    iteration, which take singular values above a hundredth of the norm |g| to .7 to 1.2."""
    x = g if g.shape[1] <= g.shape[2] else g.mT             # the smaller product is computed
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):                                      # x <- 3.4445 x + polynomial x
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return x if g.shape[1] <= g.shape[2] else x.mT


class Muon(torch.optim.AdamW):
    """Muon (Keller Jordan 2024, github.com/KellerJordan/Muon): matrices move by orthogonal ones.

        M <- .95 M + .05 G
        W <- W - lr (weight_decay W + sqrt(max(1, rows/columns)) orthogonalize(.95 M + .05 G))

    for the weights W of the model's layers, G their gradient: convolutions as (out, in k k), and
    those named "qkv" as three. All else (queries, positions, norms, biases, and what is named
    "project": the maps into and out of the layers) takes Adam's step, at lr / 20, without decay.
    """

    def __init__(self, model, lr, weight_decay):
        rest, alike = [], {}                                # weights of one shape move together
        for name, p in model.named_parameters():
            inside = name.endswith("weight") and p.dim() > 1 and "project" not in name
            matrices = 3 if "qkv" in name else 1            # how many a parameter holds
            (alike.setdefault((matrices, p.shape), []) if inside else rest).append(p)
        groups = [dict(params=rest, matrices=0, weight_decay=0.0, lr=lr / 20, lr_ratio=1 / 20)]
        for (matrices, _), weights in alike.items():
            groups.append(dict(params=weights, matrices=matrices))
        super().__init__(groups, lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["matrices"]:
                self.move_matrices(**group)
        super().step()                                      # what still has a gradient: the rest

    def move_matrices(self, params, lr, weight_decay, matrices, **_):
        nesterov = []
        for w in params:
            state = self.state[w]
            if not state:                                   # step: AdamW's load_state_dict reads it
                state.update(step=torch.tensor(0.0), momentum=torch.zeros_like(w))
            momentum = state["momentum"].lerp_(w.grad, 0.05)
            update = w.grad.lerp(momentum, 0.95)
            nesterov.append(update.flatten(1).unflatten(0, (matrices, -1)))
            w.grad = None                                   # so AdamW leaves it alone
        factor = max(1, nesterov[0].shape[1] / nesterov[0].shape[2]) ** 0.5
        moves = orthogonalize(torch.cat(nesterov)).split(matrices)
        for w, move in zip(params, moves):
            w.mul_(1 - lr * weight_decay)
            w.sub_(move.reshape(w.shape), alpha=lr * factor)


OPTIMIZERS = {                                              # (model, lr, weight decay) -> it
    "sgd": lambda m, lr, wd: torch.optim.SGD(m.parameters(), lr, momentum=0.9, weight_decay=wd),
    "rmsprop": lambda m, lr, wd: torch.optim.RMSprop(m.parameters(), lr, weight_decay=wd),
    "adam": lambda m, lr, wd: torch.optim.Adam(m.parameters(), lr, weight_decay=wd, fused=True),
    "adamw": lambda m, lr, wd: torch.optim.AdamW(m.parameters(), lr, weight_decay=wd, fused=True),
    "muon": Muon,
}
SCHEDULES = {                                               # progress in [0, 1) -> factor of lr
    "constant": lambda t: 1.0,
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * t)),
    "step": lambda t: 1.0 if t < 0.8 else 0.1,              # UniAD: epoch 800 of 1000
    "warmup-cosine": lambda t: min(1.0, 0.1 + 18 * t) * 0.5 * (1 + math.cos(math.pi * t)),
}


def set_epochs(c, images):
    """Fill in, where not given, `epochs`, from the model's `steps`, and `eval_every`."""
    if c["epochs"] is None:
        steps_an_epoch = math.ceil(images / max(1, c["batch_size"]))
        least = min(1, c["steps"])                          # none where a model is solved
        c["epochs"] = max(least, round(c["steps"] / steps_an_epoch))
    if c["eval_every"] is None:
        c["eval_every"] = max(1, c["epochs"] // 4)


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
    """One update at learning rate `rate`, gradient norm at most `clip` (0: no limit); where: the
    step's name, for an error. optim.amp: the optimizer's own products (Muon's) in bfloat16."""
    if not torch.isfinite(loss):
        raise FloatingPointError(f"loss {loss.item()} at {where}, learning rate {rate:.2g}: try "
                                 f"--lr {rate / 10:.1g} or --clip 1; the last epoch is kept")
    for group in optim.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)
    optim.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    with torch.autocast(loss.device.type, torch.bfloat16, enabled=getattr(optim, "amp", False)):
        optim.step()


def snapshot(optim, order, history):
    """What `restore` needs, a dict of tensors and plain values."""
    return {"optimizer": optim.state_dict(), "order": order.get_state(),
            "rng": torch.get_rng_state(), "history": history}


def restore(state, optim, order):
    """Optimizer and generators as they were when `state` was saved -> its history."""
    optim.load_state_dict(state["optimizer"])
    order.set_state(state["order"])
    torch.set_rng_state(state["rng"])                       # dropout and jitter draw from this one
    return list(state["history"])


def write_checkpoint(path, fixed, model, progress):
    """model.pt beside its place, then moved into it: a kill at any moment leaves a whole one."""
    buffer = io.BytesIO()                                   # a full disk is then a plain OSError
    torch.save({**progress, **fixed, "model": model.state_dict()}, buffer)
    path.with_suffix(".tmp").write_bytes(buffer.getbuffer())
    for name in ("run.json", "examples.png", "judged.csv"):     # of an earlier run
        path.with_name(name).unlink(missing_ok=True)
    os.replace(path.with_suffix(".tmp"), path)


def start_process(c):
    """Threads and device; under torchrun, join the others, of which only rank 0 prints."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(c["threads"] or max(1, os.cpu_count() // world))
    torch.set_flush_denormal(True)                          # LAMP's tiny gradients are slow
    if "LOCAL_RANK" not in os.environ:
        return torch.device(c["device"])
    dist.init_process_group("cpu:gloo,cuda:nccl" if c["device"] == "cuda" else "gloo")
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")
    local = f"{c['device']}:{os.environ['LOCAL_RANK']}"
    return torch.device(local if c["device"] == "cuda" else c["device"])


def processes():
    """(this process's rank, their count): (0, 1) but under torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def share_of(index):
    """A process's part of a batch, and the factor that makes the mean of all processes' gradients
    that of the whole batch (if the loss is a sum over images: a maximum over="batch" is not)."""
    rank, count = processes()
    mine = index[rank::count]
    return mine, len(mine) * count / len(index)


def record_epoch(epoch, means, seconds):
    """An epoch's entry in the history. means: this process's part of mean loss and base error."""
    if dist.is_initialized():
        dist.all_reduce(means)
    return {"epoch": epoch, "loss": float(means[0]), "base_error": float(means[1]),
            "seconds": round(seconds, 3)}


def print_epoch(history, epochs):
    """A line, which stays at every tenth of the epochs; a terminal shows the others meanwhile."""
    now = history[-1]
    auroc = now.get("image_auroc")
    judged = "" if auroc is None else f"   image AUROC {auroc:.4f}"
    left = sum(h["seconds"] for h in history) / len(history) * (epochs - len(history))
    stays = judged or now["epoch"] % max(1, epochs // 10) == 0 or now["epoch"] == epochs
    if stays or sys.stdout.isatty():
        print(f"epoch {now['epoch']:>4}/{epochs}   loss {now['loss']:.5f}   base error "
              f"{now['base_error']:.5f}{judged}   {left:.0f} s left   ",
              end="\n" if stays else "\r", flush=True)


def figure_2(path, eps=0.1):
    """The paper's Fig. 2: L1, L2, their LAMP and the gradients, as a table and a picture at path.

    One pixel's error y_hat - y runs from -1 to 1; Eq. 2's maximum is that range's, 1.
    """
    from matplotlib.figure import Figure
    error = (torch.arange(-200.0, 201.0) / 200).requires_grad_()
    columns = []
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    for base_loss, name, panels in zip((l1, l2), ("L_1", "L_2"), figure.subplots(2, 2)):
        plain = base_loss(error, torch.zeros_like(error))
        amplified = lamp(plain[None], eps)[0]                           # a batch of one
        for loss, label in ((plain, f"${name}$"), (amplified, f"${name}^{{LAMP}}$")):
            slope, = torch.autograd.grad(loss.sum(), error, retain_graph=True)
            panels[0].plot(error.detach(), loss.detach(), label=label)
            panels[1].plot(error.detach(), slope)
            columns += [loss.tolist(), slope.tolist()]
        panels[0].set(xlabel=r"$\hat{y} - y$", ylabel="loss")
        panels[0].legend()
        panels[1].set(xlabel=r"$\hat{y} - y$", ylabel="gradient")
    print(" error       L1    slope  L1-LAMP    slope       L2    slope  L2-LAMP    slope")
    for i in range(200, 401, 25):                                       # symmetric: from 0 on
        numbers = [f"{column[i]:9.3f}" for column in columns]
        print(f"{i / 200 - 1:6.3f}", *numbers, sep="")
    figure.supxlabel(f"python lamp_loss.py --eps {eps}", fontsize=8)
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")


def main(argv=None):
    import argparse
    from pathlib import Path
    parser = argparse.ArgumentParser(description="Draw the paper's Fig. 2: LAMP and its gradients.")
    parser.add_argument("--eps", type=float, default=0.1, help="Eq. 2's epsilon (default: 0.1)")
    parser.add_argument("--out", default="figures/figure2.png", help="default: figures/figure2.png")
    args = parser.parse_args(argv)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        figure_2(args.out, args.eps)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    raise SystemExit(0)


if __name__ == "__main__":
    main()
