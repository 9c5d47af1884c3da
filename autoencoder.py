"""The convolutional autoencoder of the LAMP paper (Park et al. 2023, Sec. 3.1, "Implementation
details"): trained on normal images only, it should reconstruct nothing else well.

Encoder, each layer:  convolution (stride 2) -> batch normalization -> leaky ReLU
Decoder, each layer:  upsampling (x2) -> convolution -> batch normalization -> leaky ReLU
Six layers a side, four for images below 128 pixels; no skip connections (they would let anomalies
pass around the code). Patch-wise reconstruction (the paper's [16]): the image is cut into n x n
patches, each reconstructed by the same network, then reassembled.

The paper gives neither widths nor kernel sizes. Here: `width` filters in the first layer, doubled
with each layer up to 8 x width, `latent` channels in the code; and the decoder's last layer, whose
output is the image, ends in a sigmoid instead of batch normalization and leaky ReLU, since images
lie in [0, 1]. `PCA` and `NearestToken`, solved instead of trained, show what a network adds. Run
this file to see the layers: python autoencoder.py
"""
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
    latent: channels of the code, the bottleneck;
    kernel_size: odd, the same in all layers; patches: n, for n x n patches reconstructed apart.
    Raises ValueError for an even kernel, and in `forward` for H, W not divisible by n 2^depth.
    """

    def __init__(self, channels=1, depth=4, width=16, latent=8, kernel_size=3, patches=1):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, to keep a layer's grid, got {kernel_size}")
        self.depth, self.patches = depth, patches
        widths = [channels] + [width * min(2 ** i, 8) for i in range(depth - 1)] + [latent]
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
        unit = self.patches * 2 ** self.depth                   # pixels to one value of the code
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


class NearestToken(nn.Module):
    """Each token of features becomes the nearest one (L2) in a bank of the normals' tokens.

    f -> f_hat, (B, C, g, g) -> (B, C, g, g); the error ||f_hat - f|| is the distance to the nearest
    normal token. channels: C; tokens: size of the bank, which `solve` fills.
    """

    def __init__(self, channels, tokens):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(tokens, channels), requires_grad=False)

    def solve(self, features, seed=0):
        """Draw the bank from normals' features (N, C, g, g); fewer tokens than it has repeat."""
        tokens = features.movedim(1, -1).flatten(0, 2)                      # (N g g, C)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))
        drawn = order[torch.arange(len(self.bank)) % len(order)]
        self.bank.copy_(tokens[drawn])

    def forward(self, features):
        tokens = features.movedim(1, -1)                                    # (B, g, g, C)
        parts = tokens.flatten(0, 2).split(256)                             # bounds the memory
        nearest = [torch.cdist(part, self.bank).argmin(1) for part in parts]
        return self.bank[torch.cat(nearest)].view(tokens.shape).movedim(-1, 1)


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
