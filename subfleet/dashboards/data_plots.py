"""Pictures of a partition: who holds which labels, and how many samples."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from subfleet.core.errors import InputError
from subfleet.datasets.federation import Federation


def partition_plot(data: Federation, path: str | os.PathLike, *, clients: int = 100) -> Path:
    """Draws label x client shares and a histogram of sizes into a PNG file.

    The heat map shows `clients` clients spread evenly over all, sorted by their
    most frequent label, so that a block structure shows; the histogram counts all.
    InputError: `clients` is below 1, or `path` is no .png file that can be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if clients < 1:
        raise InputError(f"--clients {clients} is too few; draw at least 1")
    path = Path(path)
    if path.suffix != ".png":
        raise InputError(f"{str(path)!r} does not end in .png; give e.g. -o partition.png")
    shown = np.unique(np.linspace(0, data.num_clients - 1, clients).astype(np.int64))
    counts = data.label_counts(shown, "all").astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    shares = shares[np.lexsort((-shares.max(axis=1), shares.argmax(axis=1)))]
    sizes = data.sizes(np.arange(data.num_clients), "all")
    # Not pyplot: it keeps figures alive and would choose a window system.
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    heat, histogram = figure.subplots(1, 2, width_ratios=(2, 1))
    image = heat.imshow(shares.T, aspect="auto", origin="lower", cmap="cividis", vmin=0)
    heat.set_xlabel(f"{len(shown)} of {data.num_clients:,} clients, by most frequent label")
    heat.set_ylabel("label")
    figure.colorbar(image, ax=heat, label="share of the client's samples")
    histogram.hist(sizes, bins=min(50, max(5, int(np.ptp(sizes)) + 1)), color="#0072B2")
    histogram.set_xlabel("samples of a client")
    histogram.set_ylabel("clients")
    histogram.set_title(f"mean {sizes.mean():,.1f}, sd {sizes.std():,.1f}")
    figure.suptitle(f"{data.name}: {int(sizes.sum()):,} samples, {data.num_classes} classes")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be written ({error}); give another file, e.g. -o partition.png"
        ) from None
    return path
