"""Makes the pictures of pages that the documents show: `python tests/screenshots.py RUNS`.

RUNS is the folder of `subfleet demo`, or any other with runs below it.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from browser import chromium
from PIL import Image

from subfleet.cli_dashboard import started

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = 64  # enough for pages of text and lines, at a third of the bytes


def tensorboard(runs: Path, out: Path) -> None:
    """The charts of the tab "Custom Scalars", 1280 pixels wide."""
    address = started(runs, None)
    with chromium() as browser:
        opened = browser.open_page(f"{address}#custom_scalars", 1280, 1000)
        charts = "tf-custom-scalar-multi-line-chart-card vz-line-chart2"
        opened.page.locator(f"{charts} path.line[d]").nth(10).wait_for(state="attached")
        opened.page.wait_for_timeout(2000)  # lines are drawn in steps
        png = opened.page.screenshot()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(COLOURS).save(out, optimize=True)


def main() -> None:
    """Writes every picture and says where."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("runs", type=Path)
    options = arguments.parse_args()
    tensorboard(options.runs, DOCS / "tensorboard.png")
    print(DOCS / "tensorboard.png")


if __name__ == "__main__":
    main()
