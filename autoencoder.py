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
lie in [0, 1]. Run this file to see the layers: python autoencoder.py
"""
import torch
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
    """y -> y_hat, (B, C, H, W) -> (B, C, H, W) in (0, 1); the code is latent x H/2^depth x W/2^depth.

    channels: C of the images; depth: layers a side; width: filters of the first layer;
    latent: channels of the code, the number that contains generalization most directly;
    kernel_size: odd, the same in all layers; patches: n, for n x n patches reconstructed apart.
    Raises ValueError for an even kernel, and in `forward` for H, W not divisible by n 2^depth.
    """

    def __init__(self, channels=1, depth=4, width=16, latent=16, kernel_size=3, patches=1):
        super().__init__()
        if kernel_size % 2 == 0 or kernel_size < 1:
            raise ValueError(f"kernel_size must be odd, so that a layer keeps its grid, got {kernel_size}")
        self.depth, self.patches = depth, patches
        widths = [channels] + [width * min(2 ** i, 8) for i in range(depth - 1)] + [latent]
        encoder, decoder = [], []
        for c_in, c_out in zip(widths, widths[1:]):
            encoder += [nn.Conv2d(c_in, c_out, kernel_size, stride=2, padding=kernel_size // 2),
                        nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        for c_in, c_out in zip(widths[::-1], widths[-2::-1]):
            decoder += [nn.Upsample(scale_factor=2),
                        nn.Conv2d(c_in, c_out, kernel_size, padding=kernel_size // 2),
                        nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
        decoder[-2:] = [nn.Sigmoid()]                           # the image itself, in (0, 1)
        self.encoder, self.decoder = nn.Sequential(*encoder), nn.Sequential(*decoder)

    def forward(self, y):
        fits, (height, width) = self.patches * 2 ** self.depth, y.shape[2:]
        if height % fits or width % fits:
            down, up = height // fits * fits, -(-height // fits) * fits
            raise ValueError(f"{self.patches}x{self.patches} patches of depth {self.depth} need a side "
                             f"that {fits} divides, got {height}x{width}: use {down or up} or {up}")
        y = to_patches(y, self.patches)                         # (B n n, C, H/n, W/n)
        return from_patches(self.decoder(self.encoder(y)), self.patches)

    def smallest_batch(self, size):
        """Images of size x size a training batch needs: batch norm cannot train on one value."""
        return 2 if size == 2 ** self.depth and self.patches == 1 else 1


@torch.no_grad()
def reestimate_batch_norm(model, batches):
    """Batch norm's running statistics, anew: a plain average over `batches`, what the model sees.

    Needed before an evaluation: with momentum .1 they remember ten batches, ten images at batch size
    1; with .01, a short training does not fill them. Training never reads them, and no random
    number is drawn, so this changes no training. Of other layers it changes nothing.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model.eval()
    for m in norms:
        m.reset_running_stats()
        m.momentum = None                                       # PyTorch's sign for a plain average
        m.train()
    for y in batches if norms else ():
        model(y)
    for m in norms:
        m.momentum = 0.1
    model.eval()


def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Print the autoencoder's layers: shape, parameters.")
    for name, default, text in (("channels", 1, "of the images"), ("depth", 4, "layers a side"),
                                ("width", 16, "filters of the first layer"),
                                ("latent", 16, "channels of the code"), ("kernel-size", 3, "odd"),
                                ("patches", 1, "n, for n x n patches"), ("size", 32, "image side")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    args = vars(parser.parse_args(argv))
    y = torch.zeros(2, args["channels"], args["size"], args["size"])
    del args["size"]
    try:
        model = ConvAutoencoder(**args).eval()
        with torch.no_grad():
            model(y)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    print(f"{'layer':<36}{'shape (C, H, W)':<20}{'parameters':>10}")
    x = to_patches(y, model.patches)
    print(f"{'input' if model.patches == 1 else 'one patch':<36}{str(tuple(x.shape[1:])):<20}{0:>10,}")
    for layer in [*model.encoder, *model.decoder]:
        x = layer(x)
        count = sum(p.numel() for p in layer.parameters())
        print(f"{str(layer)[:34]:<36}{str(tuple(x.shape[1:])):<20}{count:>10,}")
    print(f"{'all':<56}{sum(p.numel() for p in model.parameters()):>10,}")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
