"""Makes the pictures of pages that the documents show, each as wide as a desk's and a phone's.

    python tests/screenshots.py --tensorboard runs/demo
    python tests/screenshots.py --report runs/devices --title "Phones of two kinds"

The first is of what `subfleet demo --out runs/demo` leaves, the second of two seeds each of FedPA,
FedRolex and FedAvg at the smallest width, 40 rounds of `examples/devices.toml`.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

from browser import Opened, chromium
from PIL import Image

from subfleet.cli_dashboard import started
from subfleet.dashboards.report import report as write_report

DOCS = Path(__file__).resolve().parent.parent / "docs"
COLOURS = 64  # enough for pages of text and lines, at a third of the bytes
WIDE, PHONE = 1280, 390


def tensorboard(runs: Path, out: Path) -> None:
    """The charts of the tab "Custom Scalars"."""
    address = started(runs, None)
    for name, width in (("tensorboard.png", WIDE), ("tensorboard-phone.png", PHONE)):
        with chromium() as browser:
            opened = browser.open_page(f"{address}#custom_scalars", width, 1000)
            charts = "tf-custom-scalar-multi-line-chart-card vz-line-chart2"
            opened.page.locator(f"{charts} path.line[d]").nth(10).wait_for(state="attached")
            opened.page.wait_for_timeout(2000)  # lines are drawn in steps
            save(opened, out / name)


def report(runs: Path, out: Path, title: str | None) -> None:
    """The top of a report."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page = write_report([runs], Path(folder) / "report.html", title=title)
        for name, width, height in (
            ("report.png", WIDE, 1180),
            ("report-phone.png", PHONE, 1500),
        ):
            save(browser.open_page(page.as_uri(), width, height), out / name)


def save(opened: Opened, path: Path) -> None:
    """What is seen of a page, as a small PNG file; says where it is."""
    picture = Image.open(io.BytesIO(opened.page.screenshot())).convert("RGB")
    picture.quantize(COLOURS).save(path, optimize=True)
    print(path)


def main() -> None:
    """Writes the pictures that are asked for."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--tensorboard", type=Path, metavar="RUNS", help="show these runs")
    arguments.add_argument("--report", type=Path, metavar="RUNS", help="compare these runs")
    arguments.add_argument("--title", help="of the report")
    arguments.add_argument("--out", type=Path, default=DOCS, help="a folder; by default docs")
    options = arguments.parse_args()
    if options.tensorboard is None and options.report is None:
        arguments.error("give --tensorboard RUNS, --report RUNS or both")
    if options.tensorboard is not None:
        tensorboard(options.tensorboard, options.out)
    if options.report is not None:
        report(options.report, options.out, options.title)


if __name__ == "__main__":
    main()
