"""Pages as a person sees them: headless Chromium, what it complains of, what it has drawn."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
# In a container there is neither a sandbox nor a GPU, and nothing but the page is to be asked for.
OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
PATIENCE_MS = 120_000  # a busy machine draws a page many times as slowly


@dataclass(frozen=True)
class Opened:
    """A page in a window of its own.

    `page` is Playwright's. `errors` grows as they come: what scripts wrote as errors, threw
    and did not catch, and asked for and did not get. `requests` are the addresses of
    everything that the page asked for, its own first.
    """

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def ink(self, selector: str) -> list[float]:
        """For each element, the share of its pixels that are not of its commonest colour."""
        return [ink(pixels) for pixels in self.pixels(selector)]

    def pixels(self, selector: str, most: int | None = None) -> list[np.ndarray]:
        """What is seen of each element, or the first ones: uint8 [height, width, RGB]."""
        found = self.page.locator(selector).all()[:most]
        return [pixels_of(element.screenshot()) for element in found]

    def overflow(self) -> int:
        """By how many pixels the page is wider than its window; 0 if one need not scroll."""
        return self.page.evaluate(
            "Math.max(0, document.documentElement.scrollWidth - window.innerWidth)"
        )


class Chromium:
    """A headless Chromium that opens pages until it is closed with its block."""

    def __init__(self, browser: Any):
        self._browser = browser

    def open_page(self, url: str, width: int = 1280, height: int = 900) -> Opened:
        """The page of an address, `http:` or `file:`, once it is loaded; nothing is cached."""
        page = self._browser.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(PATIENCE_MS)
        opened = Opened(page)
        page.on("console", lambda said: _hear(opened.errors, said))
        page.on("pageerror", lambda error: opened.errors.append(f"uncaught: {error}"))
        page.on("requestfailed", lambda r: opened.errors.append(f"{r.failure}: {r.url}"))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(url)
        return opened


def _hear(errors: list[str], said: Any) -> None:
    if said.type == "error":
        errors.append(f"{said.text} ({said.location.get('url', '')})")


@contextmanager
def chromium() -> Iterator[Chromium]:
    """Chromium for the length of the block; skips the test where there is none."""
    reason = "needs Playwright: pip install -c constraints.txt playwright"
    playwright = pytest.importorskip("playwright.sync_api", reason=reason)
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=[*OPTIONS])
        try:
            yield Chromium(browser)
        finally:
            browser.close()


def pixels_of(png: bytes) -> np.ndarray:
    """A PNG file as uint8 [height, width, RGB]."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def ink(pixels: np.ndarray) -> float:
    """The share of a picture's pixels that are not of its commonest colour.

    >>> ink(np.array([[[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [255, 0, 0]]]))
    0.25
    """
    _, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    return 1.0 - float(counts.max()) / counts.sum().item()


def coloured(pixels: np.ndarray) -> float:
    """The share of a picture's pixels that are of a strong colour, not of some grey.

    >>> coloured(np.array([[[90, 90, 90], [255, 120, 0]]]))
    0.5
    """
    spread = pixels.max(axis=2).astype(int) - pixels.min(axis=2)
    return float((spread > 80).mean())
