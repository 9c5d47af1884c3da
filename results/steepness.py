"""Steepness: how much steeper LAMP's loss landscape is than L2's, in three senses.

    python results/steepness.py          # rows of results/steepness.csv, about an hour
    python results/steepness.py --near   # rows of results/near.csv, about ten minutes

Two networks (the autoencoder of Fig. 1, the encoder of Fig. 3), three batch sizes,
three seeds. Each is compared with the L2 model under L2, by the mean over four pairs of
random directions:
    a    the L2 model, seen through LAMP
    b    the LAMP model under LAMP, as the paper draws it
    c    the LAMP model under L2, so that both are seen under one loss

`--near` compares (b) and (c) nearer to the trained weights, for the autoencoder of
Fig. 1. LAMP's maximum in Eq. 2 is then one of three:
    figure    held at the largest error in the whole figure, up to a step of 1
    own       held at the largest error up to this step alone
    moving    each point's own, which is the loss that training descends

A row is appended as soon as it is measured, and what is there is not measured again.
"""
import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from landscape import (EQ_2, Settings, criterion_of, model_surface, open_run, steps,
                       train_autoencoder, train_classifier)


def steepness(z, xs, ys):
    """How steep a surface z, (len(xs), len(ys)), is -> four numbers by name.

    gradient: the mean over the grid of the gradient's norm (central differences).
    curvature: the mean of the second differences along both axes.
    Each is also divided by the loss at the center, so as not to see the loss's scale.
    """
    gradient = np.hypot(*np.gradient(z, xs, ys)).mean()
    along_x = np.diff(z, 2, axis=0).mean() / (xs[1] - xs[0]) ** 2
    along_y = np.diff(z, 2, axis=1).mean() / (ys[1] - ys[0]) ** 2
    curvature = (along_x + along_y) / 2
    center = z[len(xs) // 2, len(ys) // 2]
    return {"gradient": gradient, "curvature": curvature,
            "gradient_per_loss": gradient / center,
            "curvature_per_loss": curvature / center}


def mean_steepness(network, model, lamp, x, y, seed, settings):
    """`steepness` under L2 or L2-LAMP, the mean over four pairs of directions: (4,)."""
    found = []
    for pair in range(4):
        criterion = criterion_of("l2", lamp, **EQ_2[network],
                                 maximum=settings.maximum)
        z = model_surface(model, criterion, x, y, settings.xs, 10 * seed + pair)
        found.append(list(steepness(z, settings.xs, settings.xs).values()))
    return np.mean(found, axis=0)


def trained_pair(network, batch_size, seed, settings):
    """The models trained with L2 and with L2-LAMP, and x, y to compute the loss on."""
    models = []
    for lamp in (False, True):
        if network == "autoencoder":
            run = train_autoencoder(lamp, batch_size, seed, settings)
            _, model, x = open_run(run, settings)
            y = x
        else:
            model, x, y = train_classifier(lamp, batch_size, seed, settings)
        models.append(model)
    return *models, x, y


def measure_steepness(network, batch_size, seed, settings):
    """Three lines of the CSV: how many times steeper, by the meanings a, b and c."""
    plain, amplified, x, y = trained_pair(network, batch_size, seed, settings)
    base = mean_steepness(network, plain, False, x, y, seed, settings)
    lines = ""
    for meaning, model, lamp in (("a", plain, True), ("b", amplified, True),
                                 ("c", amplified, False)):
        ratios = mean_steepness(network, model, lamp, x, y, seed, settings) / base
        cells = ",".join(f"{ratio:.4f}" for ratio in ratios)
        lines += f"{network},{batch_size},{seed},{meaning},{cells}\n"
    return lines


# ---- nearer to the trained weights ----

SPANS = (1.0, 0.3, 0.1)


def near_surfaces(model, maximum, x, seed, grid=11):
    """The surfaces of a model at all SPANS, in one pair of directions -> {span: z}.

    maximum: "figure", "own" or "moving" of LAMP, or None for L2.
    """
    surfaces, criterion = {}, None
    for span in SPANS:                              # the widest first
        # A maximum that is held only grows, so one criterion keeps the figure's.
        if criterion is None or maximum != "figure":
            held = "moving" if maximum == "moving" else "held"
            reading = EQ_2["autoencoder"]
            criterion = criterion_of("l2", maximum is not None, **reading, maximum=held)
        xs = steps(span, grid)
        surfaces[span] = model_surface(model, criterion, x, x, xs, seed)
    return surfaces


def measure_near(seed, settings, batch_size=32):
    """Lines of near.csv for one training seed: how many times L2's gradient is LAMP's.

    Gradients are means over four pairs of directions.
    """
    plain, amplified, x, _ = trained_pair("autoencoder", batch_size, seed, settings)

    def gradients(model, maximum):
        found = {span: [] for span in SPANS}
        for pair in range(4):
            surfaces = near_surfaces(model, maximum, x, 10 * seed + pair)
            for span, z in surfaces.items():
                xs = steps(span, len(z))
                found[span].append(steepness(z, xs, xs)["gradient"])
        return {span: np.mean(values) for span, values in found.items()}

    base, lines = gradients(plain, None), ""
    for compared, maximum in (("b", "figure"), ("b", "own"), ("b", "moving"),
                              ("c", None)):
        of_lamp = gradients(amplified, maximum)
        for span in SPANS:
            ratio = of_lamp[span] / base[span]
            lines += f"{compared},{maximum or ''},{span:g},{seed},{ratio:.4f}\n"
    return lines


def measure_all_near(settings, out):
    """Append to near.csv the seeds that it lacks."""
    path = Path(out)
    if not path.exists():
        path.write_text(f"# network=autoencoder batch_size=32 images={settings.images} "
                        f"grid=11 epochs={settings.epochs} torch={torch.__version__}\n"
                        "compared,maximum,span,seed,gradient\n")
    held = path.read_text()
    for seed in range(3):
        if f",0.1,{seed}," not in held:
            lines = measure_near(seed, settings)
            with path.open("a") as file:
                file.write(lines)
            print(lines, end="", flush=True)
    print(f"wrote {out}")


def header(settings):
    """The first two lines of the CSV: what all rows share, and the columns."""
    words = [f"images={settings.images}", f"grid={len(settings.xs)}",
             f"span={settings.xs[-1]:g}", f"epochs={settings.epochs}",
             f"maximum={settings.maximum}"]
    for network, reading in EQ_2.items():
        words.append(f"{network}={reading['over']},eps-{reading['eps']}")
    return (f"# {' '.join(words)} torch={torch.__version__}\n"
            "network,batch_size,seed,compared,gradient,curvature,gradient_per_loss,"
            "curvature_per_loss\n")


def measure_all(settings, out):
    """Append the rows that the CSV lacks. ValueError where it has other options."""
    path = Path(out)
    if not path.exists():
        path.write_text(header(settings))
    held = path.read_text()
    if not held.startswith(header(settings)):
        raise ValueError(f"{out} was measured with other options: delete it, or name "
                         f"another --out. Expected: {header(settings).splitlines()[0]}")
    networks, batch_sizes, seeds = ("autoencoder", "classifier"), (128, 16, 4), range(3)
    for task in itertools.product(networks, batch_sizes, seeds):
        if ",".join(map(str, task)) + ",c," not in held:
            lines = measure_steepness(*task, settings)
            with path.open("a") as file:
                file.write(lines)
            print(lines, end="", flush=True)
    print(f"wrote {out}")


def main(argv=None):
    summary = __doc__.split("\n\n")[0]
    parser = argparse.ArgumentParser(description=summary, allow_abbrev=False)
    parser.add_argument("--maximum", choices=("held", "moving"), default="held")
    parser.add_argument("--span", type=float, default=1.0,
                        help="the largest step (default: 1)")
    parser.add_argument("--near", action="store_true",
                        help="nearer to the trained weights, see above")
    parser.add_argument("--data-dir", help="where MNIST is (default: data)")
    parser.add_argument("--out", help="default: results/steepness.csv, or near.csv")
    args = parser.parse_args(argv)
    settings = Settings(steps(args.span, 11), images=128, maximum=args.maximum,
                        data_dir=args.data_dir,
                        command="python results/steepness.py")
    torch.set_flush_denormal(True)
    measure = measure_all_near if args.near else measure_all
    name = "near" if args.near else "steepness"
    try:
        measure(settings, args.out or str(ROOT / f"results/{name}.csv"))
    except (ValueError, OSError) as error:
        parser.exit(2, f"steepness.py: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ninterrupted: the same command goes on\n")
    raise SystemExit(0)


if __name__ == "__main__":
    main()
