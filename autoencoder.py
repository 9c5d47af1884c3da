"""The convolutional autoencoder of the LAMP paper (Park et al. 2023, Sec. 3.1, "Implementation
details"): trained on normal images only, it should reconstruct nothing else well.

Encoder, each layer:  convolution -> batch normalization -> leaky ReLU
Decoder, each layer:  upsampling -> convolution -> batch normalization -> leaky ReLU
The paper has six layers a side, four for MNIST (`depth`); no skip connections (they would let
anomalies pass around the code). Patch-wise reconstruction (the paper's [16]): the image is cut into
n x n patches, each reconstructed by the same network, then reassembled.

The paper gives no widths and tunes the kernel size. Here: kernels of 3 x 3, stride 2, upsampling by
2 (nearest), a leak of .2; `width` filters in the first layer, doubled with each up to 8 x width,
also in the code; the decoder's last layer ends in a sigmoid instead of batch normalization and
leaky ReLU, since images lie in [0, 1]. `PCA` and `NearestToken`, solved, show what training adds.

The second half is the paper's "Evaluation metric", for every model here: from a
reconstruction to error maps, scores, a threshold, AUROC. To see the layers: python autoencoder.py
"""
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def to_patches(y, n):
    """Cut images into n x n patches, row by row: (B, C, H, W) -> (B n n, C, H/n, W/n).

    Raises ValueError where n does not divide H and W.
    """
    batch, channels, height, width = y.shape
    if n < 1 or height % n or width % n:
        raise ValueError(f"{n}x{n} patches do not divide an image of {height}x{width} pixels")
    y = y.reshape(batch, channels, n, height // n, n, width // n)
    return y.permute(0, 2, 4, 1, 3, 5).reshape(batch * n * n, channels, height // n, width // n)


def from_patches(patches, n):
    """Reassemble the images: (B n n, C, H/n, W/n) -> (B, C, H, W), the inverse of `to_patches`."""
    count, channels, height, width = patches.shape
    y = patches.reshape(count // (n * n), n, n, channels, height, width)
    return y.permute(0, 3, 1, 4, 2, 5).reshape(count // (n * n), channels, n * height, n * width)


class ConvAutoencoder(nn.Module):
    """y -> y_hat: (B, C, H, W) -> (B, C, H, W) in (0, 1); code (latent, H / 2^depth, W / 2^depth).

    channels: C of the images; depth: layers a side; width: filters of the first layer;
    latent: channels of the code, where it shall be narrower than its layer's filters (None);
    kernel_size: odd, the same in all layers; patches: n, for n x n patches reconstructed apart.
    Raises ValueError for an even kernel, and in `forward` for H, W not divisible by n 2^depth.
    """

    def __init__(self, channels=1, depth=4, width=16, latent=None, kernel_size=3, patches=1):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, to keep a layer's grid, got {kernel_size}")
        self.depth, self.patches = depth, patches
        widths = [channels] + [width * min(2 ** i, 8) for i in range(depth)]
        widths[-1] = latent or widths[-1]
        padding = kernel_size // 2
        encoder, decoder = [], []
        for c_in, c_out in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(c_in, c_out, kernel_size, stride=2, padding=padding),
                        nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        widths.reverse()
        for c_in, c_out in zip(widths, widths[1:]):
            decoder += [nn.Upsample(scale_factor=2),
                        nn.Conv2d(c_in, c_out, kernel_size, padding=padding),
                        nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        decoder[-2:] = [nn.Sigmoid()]                           # the image itself, in (0, 1)
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def forward(self, y):
        height, width = y.shape[2:]
        unit = self.patches * 2 ** self.depth                   # each patch: a multiple of 2^depth
        if height % unit or width % unit:
            below = height // unit * unit
            near = f"{below} or {below + unit}" if below else unit
            raise ValueError(f"{self.patches}x{self.patches} patches of depth {self.depth} need a "
                             f"side that {unit} divides, got {height}x{width}: use {near}")
        y = to_patches(y, self.patches)                         # (B n n, C, H/n, W/n)
        return from_patches(self.decoder(self.encoder(y)), self.patches)

    def smallest_batch(self, size):
        """Images of size x size a training batch needs: batch norm cannot train on one value."""
        return 2 if size == 2 ** self.depth and self.patches == 1 else 1


class PCA(nn.Module):
    """The linear autoencoder with the least L2 error, solved instead of trained.

    y -> mean + its projection on the first `latent` principal components of the normals, over all
    C H W values of an image or of a feature map; with latent 0 the mean, whatever y is.
    channels, size: C, and the side H = W. forward: (B, C, H, W) -> (B, C, H, W); `solve` first.
    """

    def __init__(self, channels, size, latent):
        super().__init__()
        values = channels * size * size
        self.mean = nn.Parameter(torch.zeros(values), requires_grad=False)
        self.components = nn.Parameter(torch.zeros(latent, values), requires_grad=False)

    def solve(self, y):
        """Set mean and components from normals (N, C, H, W). Raises ValueError: too few of them."""
        latent, values = self.components.shape
        if latent > min(len(y), values):
            raise ValueError(f"{latent} components of {len(y)} images with {values} values each: "
                             f"use at most {min(len(y), values)}")
        y = y.flatten(1).cpu()                                  # (N, values)
        mean = y.mean(0, dtype=torch.float64)
        centered = y - mean
        few = len(y) < values                                   # the smaller matrix is decomposed:
        gram = centered @ centered.T if few else centered.T @ centered      # N^2 or values^2
        vectors = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :latent]  # largest variance first
        components = vectors.T @ centered if few else vectors.T
        self.mean.copy_(mean)
        self.components.copy_(F.normalize(components, eps=1e-6))            # no variance: stays 0

    def forward(self, y):
        code = (y.flatten(1) - self.mean) @ self.components.T   # (B, latent)
        return (self.mean + code @ self.components).view_as(y)


def turned(images, angle):
    """Images (N, C, S, S), uint8, turned about their center by an angle in radians, mirrored at
    their borders."""
    cos, sin = math.cos(angle), math.sin(angle)
    turn = torch.tensor([[cos, -sin, 0.0], [sin, cos, 0.0]]).expand(len(images), 2, 3)
    grid = F.affine_grid(turn, images.shape, align_corners=False)
    y = F.grid_sample(images.float(), grid, padding_mode="reflection", align_corners=False)
    return y.round().byte()


class NearestToken(nn.Module):
    """Each token of features becomes the mean of the 3 nearest ones (L2) in a bank, the tokens of
    normal images: what no normal image shows, it cannot reconstruct. The memory bank of PatchCore
    (Roth et al. 2022), without its coreset and its pooling of adjacent places.

    f -> f_hat, (B, C, g, g) -> (B, C, g, g). An image in the bank is compared with the others
    alone, not with itself or its copies: it would have no error. channels: C; grid: g; images: how
    many the bank holds; turns: positions of each, the first as it is. `solve` fills the bank.
    """

    def __init__(self, channels, grid, images, turns=1):
        super().__init__()
        bank = torch.zeros(images, turns * grid * grid, channels)
        self.bank = nn.Parameter(bank, requires_grad=False)

    def solve(self, features):
        """Fill the bank: normals (N, C, g, g), or with their copies (N, turns, C, g, g)."""
        self.bank.copy_(features.flatten(-2).mT.reshape(self.bank.shape))

    def forward(self, features):
        norms = self.bank.square().sum(2)                       # (images, turns g g)
        tokens = features.flatten(2).mT                         # (B, g g, C)
        f_hat = torch.empty_like(tokens)
        for i, image in enumerate(tokens):
            itself = (self.bank[:, :len(image)] == image).flatten(1).all(1)     # (images,)
            usable = norms if itself.all() else norms.masked_fill(itself[:, None], math.inf)
            f_hat[i] = self.reconstruct(image, usable.flatten())
        return f_hat.mT.view_as(features)

    def reconstruct(self, tokens, norms):                       # (g g, C) -> (g g, C)
        bank, nearest = self.bank.flatten(0, 1), []
        count = min(3, int(norms.isfinite().sum()))
        for some in tokens.split(max(1, 2 ** 25 // len(bank))):             # up to 128 MB at a time
            distances = torch.addmm(norms, some, bank.T, alpha=-2)          # squared, less token^2
            nearest.append(distances.topk(count, largest=False).indices)
        return bank[torch.cat(nearest)].mean(1)


# ---- from a reconstruction to a score (Sec. 3.1, "Evaluation metric"), for every model here ----

@torch.no_grad()
def error_maps(model, x, prepare=lambda stored: stored):
    """L2 error at each place: stored inputs (N, C, H, W) -> (N, H, W) float32, on the CPU.

    prepare: stored -> what the model sees. Images (up to 3 channels): (y_hat - y)^2, summed over
    channels. Features: the root of that, the distance between a token and its reconstruction.
    """
    device = next(model.parameters(), x).device
    model.eval()
    maps = []
    for batch in x.split(64):
        y = prepare(batch.to(device))
        error = (model(y).float() - y).square().sum(1)          # (B, H, W)
        maps.append((error if y.shape[1] <= 3 else error.sqrt()).cpu())
    return torch.cat(maps)


def heat_maps(errors, size):
    """Errors (N, H, W) as maps of the image's size, (N, size, size): those of features are scaled
    up (bilinear, corners aligned), those of images are maps of that size already."""
    if errors.shape[-1] == size:
        return errors
    return F.interpolate(errors[:, None], (size, size), mode="bilinear", align_corners=True)[:, 0]


def gaussian_blur(maps, sigma):
    """(N, H, W) convolved with a Gaussian of standard deviation sigma, borders repeated."""
    radius = max(1, round(3 * sigma))
    offset = torch.arange(-radius, radius + 1.0)
    window = torch.exp(-0.5 * (offset / sigma) ** 2)
    window = (window / window.sum()).view(1, 1, -1, 1)
    maps = F.pad(maps[:, None], [radius] * 4, mode="replicate")
    return F.conv2d(F.conv2d(maps, window), window.mT)[:, 0]


def place_statistics(errors):
    """What is normal where: errors of normal images (N, H, W) -> their mean and spread, (2, H, W).

    The spread is the standard deviation plus its own mean over all places, so that a place where
    the normals happen to agree does not decide alone.
    """
    spread = errors.std(0, correction=0)
    return torch.stack([errors.mean(0), (spread + spread.mean()).clamp(min=1e-12)])


def standardize(errors, statistics):
    """How far errors (N, H, W) lie above the normals' own at that place, in their spread."""
    mean, spread = statistics
    return (errors - mean) / spread


def image_scores(maps, how="sum"):
    """One score an image: (N, H, W) -> (N,). how: "sum" (the LAMP paper's), "mean", "max" (UniAD's,
    after averaging over 16x16 pixels), or "top", the mean of the largest 2.5 %."""
    values = maps.flatten(1)
    if how == "max":
        side = min(16, maps.shape[-1])
        return F.avg_pool2d(maps[:, None], side, stride=1).flatten(1).amax(1)
    if how == "top":
        return values.topk(max(1, round(0.025 * values.shape[1]))).values.mean(1)
    return values.sum(1) if how == "sum" else values.mean(1)


def left_out_scores(errors):
    """Standardized scores of normals (N, H, W), each by statistics of the others (of 2: both)."""
    scores = []
    for i in range(len(errors)):
        others = torch.cat([errors[:i], errors[i + 1:]]) if len(errors) > 2 else errors
        z = standardize(errors[i:i + 1], place_statistics(others))
        scores.append(image_scores(z, "top"))
    return torch.cat(scores)


def threshold(scores, fpr=0.05):
    """The ceil((n + 1)(1 - fpr))-th smallest of n scores of normal images that were not trained on.

    A new normal image exceeds it with probability at most fpr (conformal prediction), if n is at
    least 1/fpr - 1; below that no score is large enough, the largest is returned, and the
    probability is 1/(n + 1).
    """
    scores = torch.as_tensor(scores).sort().values
    rank = math.ceil(round((len(scores) + 1) * (1 - fpr), 9))
    return float(scores[min(rank, len(scores)) - 1])


def promise(images, fpr):
    """What a threshold from so many normal images can promise, as text."""
    needed = math.ceil(1 / fpr) - 1
    if images >= needed:
        return f"exceeded by about {100 * fpr:.3g}% of new normal images"
    return (f"too few normal images: {images} to set it by, so that {1 / (images + 1):.0%} of new "
            f"ones may exceed it; {100 * fpr:.3g}% needs at least {needed}, of {3 * needed} in all "
            f"(--model nearest: of {needed})")


def auroc(scores, labels):
    """The chance that an anomaly (label 1) outranks a normal; None where one kind is missing."""
    from sklearn.metrics import roc_auc_score
    return float(roc_auc_score(labels, scores)) if len(np.unique(labels)) == 2 else None


def average_precision(scores, labels):
    """Mean precision at each anomaly, ranked by score; None where one kind is missing."""
    from sklearn.metrics import average_precision_score
    return float(average_precision_score(labels, scores)) if len(np.unique(labels)) == 2 else None


def mean_of(values):                                        # None of none
    return float(np.mean([float(value) for value in values])) if len(values) else None


def aupro(maps, masks, limit=0.3):
    """Area under the per-region overlap (Bergmann et al. 2020): (N, H, W) twice -> 0 to 1, or None.

    At each threshold: the overlap of the detected pixels with each defect (8-connected part of a
    mask), averaged over defects, against the false positive rate over all defect-free pixels,
    those of normal images included. Exact; integrated up to FPR = limit and divided by limit.
    """
    from scipy import ndimage
    from sklearn.metrics import auc
    maps, masks = np.asarray(maps), np.asarray(masks, dtype=bool)
    weight, defects = np.zeros(maps.shape), 0               # a defect's pixels share weight 1
    for i in np.flatnonzero(masks.any((1, 2))):
        parts, count = ndimage.label(masks[i], np.ones((3, 3)))
        pixels = np.bincount(parts.ravel())
        weight[i] = np.where(parts > 0, 1 / pixels[parts], 0)
        defects += count
    if defects == 0 or masks.all():
        return None
    order = np.argsort(-maps, axis=None, kind="stable")
    normal = ~masks.ravel()[order]
    last = np.append(np.diff(maps.ravel()[order]) != 0, True)               # equal values together
    fpr = np.append(0, (np.cumsum(normal) / normal.sum())[last])
    overlap = np.append(0, (np.cumsum(weight.ravel()[order]) / defects)[last])
    below = fpr <= limit
    fpr_to_limit = np.append(fpr[below], limit)
    overlap_to_limit = np.append(overlap[below], np.interp(limit, fpr, overlap))
    return float(min(auc(fpr_to_limit, overlap_to_limit) / limit, 1.0))     # 1 + 1e-16 is rounding


def draw_columns(path, rows, titles, color_limit, footer, inches=1.5):
    """A column an image: rows {name: images (N, C, H, W), or maps (N, H, W), or None: left out}.

    Maps are drawn as heat, from 0 to color_limit; masks, which are boolean, in black and white.
    """
    import warnings
    from matplotlib.figure import Figure
    rows = {name: row for name, row in rows.items() if row is not None}
    size = (inches * len(titles) + 1, inches * len(rows) + 0.8)
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, row) in zip(axes, rows.items()):
        line[0].set_ylabel(name, fontsize=7, parse_math=False)
        for axis, x in zip(line, row):
            if x.dim() == 3:                                                # (C, H, W)
                axis.imshow(x.clamp(0, 1).expand(3, -1, -1).movedim(0, -1).numpy())
            else:
                top = 1 if x.dtype == torch.bool else color_limit
                axis.imshow(x.numpy(), cmap="inferno", vmin=0, vmax=top)
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles):
        axis.set_title(title, fontsize=8, parse_math=False)
    figure.supxlabel(footer, fontsize=7, parse_math=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")               # names in any script
        figure.savefig(path, dpi=90)


def lay_over(image, heat):
    """An image (C, H, W) in [0, 1] under its heat map (H, W), which hides it where it is 1."""
    from matplotlib import colormaps
    heat = heat.clamp(0, 1)
    colors = torch.from_numpy(colormaps["inferno"](heat.numpy())[..., :3]).float().movedim(-1, 0)
    opacity = 0.9 * heat
    return (1 - opacity) * image.expand(3, -1, -1) + opacity * colors       # (3, H, W)


def draw_laid_over(path, image, heat, titles):
    """An image, and beside it its heat map laid over it."""
    both = torch.stack([image.expand(3, -1, -1), lay_over(image, heat)])
    draw_columns(path, {"": both}, titles, 1, "", inches=4)


@torch.no_grad()
def reestimate_batch_norm(model, batches):
    """Batch norm's running statistics, anew: a plain average over `batches`, what the model sees.

    Needed before an evaluation: with momentum .1 they remember ten batches, ten images at batch
    size 1; with .01, a short training does not fill them. Training never reads them, and no random
    number is drawn, so this changes no training. Leaves eval mode, and PyTorch's momentum of .1.
    """
    model.eval()                                                # dropout stays quiet
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None                                    # PyTorch's sign for a plain average
        norm.train()
    for y in batches:
        model(y)
    for norm in norms:
        norm.momentum = 0.1
        norm.eval()


def describe(model, size):
    """Print the layers of an autoencoder for images of size x size: output shapes, parameters."""
    y = torch.zeros(2, model.encoder[0].in_channels, size, size)
    print(f"{'input':<14}{str(tuple(y.shape[1:])):<18}")
    for layer in [*model.encoder, *model.decoder]:
        y = layer(y)
        count = sum(p.numel() for p in layer.parameters())
        print(f"{type(layer).__name__:<14}{str(tuple(y.shape[1:])):<18}{count:>10,}")
    print(f"{'all':<32}{sum(p.numel() for p in model.parameters()):>10,}\n")


def main(argv=None):
    print(f"{'layer':<14}{'C, H, W':<18}{'parameters':>10}    (patch-wise: of one patch)")
    describe(ConvAutoencoder(), 32)
    describe(ConvAutoencoder(channels=3, depth=6), 128)
    raise SystemExit(0)


if __name__ == "__main__":
    main()
