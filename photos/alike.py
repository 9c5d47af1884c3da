"""Alike: what photos look like as a whole, and which of them show the same.

    appearance      brightness, sharpness and the like, to say how new photos differ
    nearest_look    which learned photo looks most like a new one, to tell its kind
    near_copies     which photos show one part, as those of a burst do

No model is needed for any of it.
"""
import math

import torch
import torch.nn.functional as F
from scipy.sparse.csgraph import connected_components

from data import to_float
from evaluate import is_of


def numbers_of(kinds, kind):
    """Which photos are of a kind: their numbers, as a list. kinds: N names."""
    return [i for i, other in enumerate(kinds) if other == kind]


# ---- how photos differ as a whole ----

APPEARANCE = {                      # words for less and for more, and the least spread
    "brightness": ("darker", "brighter", 2.0),
    "contrast": ("poorer in contrast", "richer in contrast", 1.0),
    "color": ("bluer", "redder", 1.0),
    "sharpness": ("blurrier", "sharper", 0.05),
    "place in x": ("shifted to the left", "shifted to the right", 0.01),
    "place in y": ("shifted up", "shifted down", 0.01),
}


def appearance(pixels):
    """What APPEARANCE names, of photos (N, 3, S, S) uint8 -> (N, 6).

    Brightness, contrast and color are in gray levels. Sharpness is the logarithm of the
    mean slope by the contrast. The place is where edges lie on average, from 0 to 1.
    """
    x = pixels.float()
    gray = x.mean(1)                                                # (N, S, S)
    slope = torch.zeros_like(gray)
    slope[:, :, 1:] += gray.diff(dim=2).abs()
    slope[:, 1:] += gray.diff(dim=1).abs()
    contrast = gray.flatten(1).std(1)
    color = (x[:, 0] - x[:, 2]).flatten(1).mean(1)
    sharpness = ((slope.flatten(1).mean(1) + 0.1) / (contrast + 1)).log()
    edges = slope.square()  # noise hardly counts
    along = torch.linspace(0, 1, gray.shape[-1])
    total = edges.flatten(1).sum(1) + 1e-6
    place_x = (edges.sum(1) * along).sum(1) / total
    place_y = (edges.sum(2) * along).sum(1) / total
    brightness = gray.flatten(1).mean(1)
    return torch.stack([brightness, contrast, color, sharpness, place_x, place_y], 1)


def how_they_differ(new, learned):
    """Words for how photos differ as a whole from those learned.

    new, learned: appearances (M, 6), (N, 6). More than half of the new ones must lie
    beyond three standard deviations on one side.
    """
    words = []
    for i, (less, more, least) in enumerate(APPEARANCE.values()):
        width = max(float(learned[:, i].std(correction=0)), least)
        far = float((new[:, i].median() - learned[:, i].mean()) / width)
        if abs(far) > 3:
            words.append(more if far > 0 else less)
    return words


def aspect(shape):
    """A shape (width, height) as one number, which is equal where shapes are alike."""
    return math.log(shape[0] / shape[1])


def has_another_shape(shape, learned):
    """Whether width by height is more than 5 % off all of those learned."""
    others = {aspect(other) for other in learned}
    return all(abs(aspect(shape) - other) > 0.05 for other in others)


# ---- which kind ----

def looks_of(stored):
    """What photos look like as a whole, to tell their kinds: (N, C, h, w) -> (N, D).

    It is how the values of each channel are distributed over the photo: five quantiles
    of them. So neither where a part lies counts, nor a defect that covers a tenth of
    it.
    """
    values = to_float(stored).flatten(2).sort(2).values                 # (N, C, h w)
    places = torch.tensor([0.1, 0.3, 0.5, 0.7, 0.9]) * (values.shape[2] - 1)
    return values[:, :, places.round().long()].flatten(1)


def nearest_look(looks, learned, kinds, leave_out=False):
    """The number of the learned photo that looks most alike.

    looks: (B, D). learned: (N, D). kinds: N names. leave_out: the looks are those
    learned, and none is compared with itself. Differences count by how far photos of
    one kind differ. -> B numbers
    """
    within = torch.zeros(learned.shape[1])
    for kind in set(kinds):
        own = learned[is_of(kinds, kind)]
        within += own.var(0, correction=0) * len(own) / len(learned)
    # A value that hardly varies must not turn its noise into a large distance.
    width = within.sqrt() + 0.05 * within.sqrt().mean() + 1e-6
    distances = torch.cdist(looks / width, learned / width,
                            compute_mode="donot_use_mm_for_euclid_dist")
    if leave_out:
        distances.fill_diagonal_(math.inf)
    return distances.argmin(1).tolist()


# ---- which photos show one part ----

def near_copies(pixels):
    """Which photos are nearly the same: (N, 3, S, S) uint8 -> N numbers of groups.

    Distances are those of thumbnails. Photos are moved over each other before, and mean
    and contrast are made alike, so neither a small shift nor the exposure matters. Two
    photos are near-copies if their distance is below .16 of the 90 % quantile of one
    photo's distances to all others, or below .01.
    Turns, and another distance of the camera, are not undone, so shots turned by a
    degree may be missed. Where nearly all photos show one part, nothing tells that
    they are alike.
    """
    batches = pixels.split(64)
    reference = sum(details(batch).sum(0) for batch in batches) / len(pixels)
    thumbnails = torch.cat([aligned(batch, reference) for batch in batches]).flatten(1)
    thumbnails -= thumbnails.mean(1, keepdim=True)
    thumbnails /= thumbnails.std(1, keepdim=True) + 8
    distances = torch.cdist(thumbnails, thumbnails,
                            compute_mode="donot_use_mm_for_euclid_dist")
    near = distances < 0.01                         # nothing but the exposure differs
    if len(pixels) >= 4:                            # of fewer, no distance is usual
        large = distances.clone().fill_diagonal_(math.nan).nanquantile(0.9, 1)
        near |= distances < 0.16 * large[:, None]
    return connected_components(near.numpy(), directed=False)[1].tolist()


def details(pixels):
    """What is finer than a 15th of the side: (B, 3, S, S) uint8 -> (B, S, S)."""
    gray = pixels.float().mean(1)
    return gray - F.interpolate(
        F.interpolate(gray[:, None], (15, 15), mode="area"), gray.shape[1:],
        mode="bilinear")[:, 0]


def aligned(pixels, reference):
    """Thumbnails of photos, each moved to where its details fit a reference best.

    pixels: (B, 3, S, S) uint8. reference: (S, S), see `details`. -> (B, 3, 48, 48).
    They fit best where their cross-correlation is largest. A parabola through the
    values beside it tells fractions of a pixel, without which most shots of a moved
    hand are not found. At most S/28 pixels are tried.
    """
    side = len(reference)
    most = min(max(1, side // 28), side // 4)
    spectrum = torch.fft.rfft2(details(pixels)) * torch.fft.rfft2(reference).conj()
    shifts = torch.arange(-most - 1, most + 2)              # one more on each side
    places = shifts % side                                  # the last is shift -1
    fit = torch.fft.irfft2(spectrum, (side, side))[:, places][:, :, places]
    best = fit[:, 1:-1, 1:-1].flatten(1).argmax(1)
    y, x = best // (2 * most + 1) + 1, best % (2 * most + 1) + 1
    i = torch.arange(len(pixels))
    at = fit[i, y, x]
    down = y - 1 - most + top_of_parabola(fit[i, y - 1, x], at, fit[i, y + 1, x])
    right = x - 1 - most + top_of_parabola(fit[i, y, x - 1], at, fit[i, y, x + 1])

    # Move each back by that, and leave out the border, most of which may be new.
    matrix = torch.eye(2, 3).repeat(len(pixels), 1, 1)
    matrix[:, 0, 2], matrix[:, 1, 2] = 2 * right / side, 2 * down / side
    grid = F.affine_grid(matrix, pixels.shape, align_corners=False)
    moved = F.grid_sample(pixels.float(), grid, padding_mode="border",
                          align_corners=False)
    inner = slice(most, side - most)
    return F.interpolate(moved[:, :, inner, inner], (48, 48), mode="area")


def top_of_parabola(before, at, after):
    """Where the parabola through values at -1, 0 and 1 is highest, from -.5 to .5."""
    curvature = (before + after - 2 * at).clamp(max=-1e-9)
    return ((before - after) / (2 * curvature)).clamp(-0.5, 0.5)


def parts_shown(data):
    """Which part each training photo shows: N numbers. Near-copies share one."""
    kinds = data.train_categories
    parts, first = [0] * len(kinds), 0
    for kind in sorted(set(kinds)):
        members = numbers_of(kinds, kind)
        for i, number in zip(members, near_copies(data.train[members])):
            parts[i] = first + number
        first = max(parts) + 1
    return parts
