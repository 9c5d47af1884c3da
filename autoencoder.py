"""The convolutional autoencoder of the LAMP paper (Park et al. 2023, Sec. 3.1).

It is trained on normal images only, so it should reconstruct nothing else well. There
are no skip connections. Through them an anomaly could bypass the code.

    encoder layer    convolution -> batch normalization -> leaky ReLU
    decoder layer    upsampling -> convolution -> batch normalization -> leaky ReLU

The paper uses six layers on each side, and four for MNIST (`depth`). It also tunes a
number of patches. With `patches` = n an image is cut into n x n patches. Each goes
through the same network, and the results are put together again.

The paper gives no numbers of filters, and it tunes the kernel size. What we chose:
  - kernels of 3 x 3, with a stride of 2 in the encoder;
  - nearest-neighbor upsampling by 2 in the decoder, and a leak of 0.2;
  - `width` filters in the first layer, doubled in each layer up to 8 x width;
  - a sigmoid at the end instead of batch normalization and leaky ReLU, since images lie
    in [0, 1].

`PCA` is the linear autoencoder. It is solved instead of trained, and it shows what the
network adds. Run this file to see the layers:  python autoencoder.py
"""
import torch
from torch import nn


# ---- patch-wise reconstruction ----

def to_patches(y, n):
    """Cut images into n x n patches, row by row: (B, C, H, W) -> (B n n, C, H/n, W/n).

    Raises ValueError where n does not divide H and W.
    """
    batch, channels, height, width = y.shape
    if n < 1 or height % n or width % n:
        raise ValueError(f"{n}x{n} patches do not divide an image of "
                         f"{height}x{width} pixels")
    y = y.reshape(batch, channels, n, height // n, n, width // n)
    # (B, C, n, H/n, n, W/n): rows of patches, rows in a patch, and so for columns.
    y = y.permute(0, 2, 4, 1, 3, 5)                         # (B, n, n, C, H/n, W/n)
    return y.reshape(batch * n * n, channels, height // n, width // n)


def from_patches(patches, n):
    """Put the images together again: (B n n, C, H/n, W/n) -> (B, C, H, W)."""
    count, channels, patch_height, patch_width = patches.shape
    batch = count // (n * n)
    y = patches.reshape(batch, n, n, channels, patch_height, patch_width)
    y = y.permute(0, 3, 1, 4, 2, 5)                         # (B, C, n, H/n, n, W/n)
    return y.reshape(batch, channels, n * patch_height, n * patch_width)


# ---- the network ----

class ConvAutoencoder(nn.Module):
    """The autoencoder y -> y_hat: (B, C, H, W) -> (B, C, H, W), with values in (0, 1).

    channels: C of the images.
    depth: the number of layers on each side. Each halves or doubles height and width.
    width: the number of filters in the first layer.
    latent: the channels of the code, (latent, H / 2^depth, W / 2^depth). None means
        width * min(2^(depth-1), 8). A smaller number lets less of the image through.
    kernel_size: odd, the same in all layers.
    patches: n, to reconstruct n x n patches separately.
    Raises ValueError for an even kernel size, and in `forward` where n 2^depth does not
    divide H and W.
    """

    def __init__(self, channels=1, depth=4, width=16, latent=None, kernel_size=3,
                 patches=1):
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError("kernel_size must be odd, so that its padding is equal on "
                             f"both sides, got {kernel_size}")
        self.depth, self.patches = depth, patches
        padding = kernel_size // 2

        # The channels of the image, then those after each layer of the encoder.
        widths = [channels]
        for layer in range(depth):
            widths.append(width * min(2 ** layer, 8))
        if latent is not None:
            widths[-1] = latent

        # Each layer of the encoder halves height and width.
        encoder = []
        for c_in, c_out in zip(widths, widths[1:]):
            conv = nn.Conv2d(c_in, c_out, kernel_size, stride=2, padding=padding)
            encoder += [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]

        # Each layer of the decoder doubles them, through the same channels backwards.
        decoder = []
        backwards = widths[::-1]
        for c_in, c_out in zip(backwards, backwards[1:]):
            conv = nn.Conv2d(c_in, c_out, kernel_size, padding=padding)
            decoder += [nn.Upsample(scale_factor=2), conv]
            decoder += [nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        # The last layer ends in a sigmoid, without batch normalization and leaky ReLU.
        decoder = decoder[:-2] + [nn.Sigmoid()]

        self.encoder = nn.Sequential(*encoder)
        self.decoder = nn.Sequential(*decoder)

    def forward(self, y):
        self.check_size(*y.shape[2:])
        y = to_patches(y, self.patches)                     # (B n n, C, H/n, W/n)
        code = self.encoder(y)                              # (B n n, latent, h, w)
        y_hat = self.decoder(code)                          # (B n n, C, H/n, W/n)
        return from_patches(y_hat, self.patches)            # (B, C, H, W)

    def check_size(self, height, width):
        """Raise ValueError where a patch cannot be halved `depth` times."""
        n, depth = self.patches, self.depth
        unit = n * 2 ** depth
        if height % unit or width % unit:
            raise ValueError(f"{n}x{n} patches and {depth} layers need an image size "
                             f"that {unit} divides, got {height}x{width}: "
                             f"use {max(unit, height // unit * unit)}")


class PCA(nn.Module):
    """The linear autoencoder with the smallest squared error (scikit-learn's PCA).

    The reconstruction is the mean of the normal images, plus the projection of the
    difference to it onto the first principal components. With 0 it is the mean alone.
    channels, size: C and the side H = W of the images or feature maps.
    components: how many principal components to use.
    forward: (B, C, H, W) -> (B, C, H, W), after `solve` has been called.
    """

    def __init__(self, channels, size, components):
        super().__init__()
        values = channels * size * size
        mean, directions = torch.zeros(values), torch.zeros(components, values)
        # As parameters they are saved, moved and counted like those of other models.
        self.mean = nn.Parameter(mean, requires_grad=False)
        self.components = nn.Parameter(directions, requires_grad=False)

    def solve(self, y):
        """Set the mean and the components from normals (N, C, H, W).

        Raises ValueError where there are more components than images or values.
        """
        count, values = self.components.shape
        most = min(len(y), values)
        if count > most:
            raise ValueError(f"{count} components of {len(y)} images with {values} "
                             f"values each: use at most {most}")
        from sklearn import decomposition                   # for this baseline alone

        # With more images than values, the covariance (values x values) is the smaller
        # matrix.
        solver = "covariance_eigh" if len(y) > values else "full"
        y = y.flatten(1).double().cpu().numpy()             # (N, values)
        pca = decomposition.PCA(count, svd_solver=solver).fit(y)
        self.mean.copy_(torch.from_numpy(pca.mean_))
        self.components.copy_(torch.from_numpy(pca.components_))

    def forward(self, y):
        centered = y.flatten(1) - self.mean                 # (B, values)
        code = centered @ self.components.T                 # (B, components)
        y_hat = self.mean + code @ self.components          # (B, values)
        return y_hat.view_as(y)


# ---- the layers, printed ----

def print_layers(model, size):
    """Print each layer's output shape and parameters, for images of size x size."""
    y = torch.zeros(2, model.encoder[0].in_channels, size, size)
    print(f"{'layer':<14}{'C, H, W':<18}{'parameters':>10}")
    print(f"{'input':<14}{str(tuple(y.shape[1:])):<18}")
    for layer in [*model.encoder, *model.decoder]:
        y = layer(y)
        name, shape = type(layer).__name__, str(tuple(y.shape[1:]))
        count = sum(p.numel() for p in layer.parameters())
        print(f"{name:<14}{shape:<18}{count:>10,}")
    total = sum(p.numel() for p in model.parameters())
    print(f"{'all':<32}{total:>10,}\n")


def main():
    print("MNIST, 32 x 32 pixels, four layers on each side, a code of 2 x 2 x 8")
    print_layers(ConvAutoencoder(latent=8), 32)
    print("The paper's six layers on each side, for 128 x 128 pixels in color")
    print_layers(ConvAutoencoder(channels=3, depth=6), 128)


if __name__ == "__main__":
    main()
