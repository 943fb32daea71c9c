"""torchvision works beside a torch that its compiled part does not fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from subfleet import _torchvision
from subfleet._torchvision import torchvision


def python(code: str, root: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_transforms_run_on_tensors() -> None:
    from torchvision.transforms import v2

    pictures = torch.arange(2 * 3 * 8 * 8, dtype=torch.float32).reshape(2, 3, 8, 8) / 400
    flipped = v2.functional.horizontal_flip(pictures)
    assert torch.equal(flipped, pictures.flip(-1))
    smaller = v2.Compose([v2.Resize(4), v2.Normalize([0.5] * 3, [0.5] * 3)])(pictures)
    assert smaller.shape == (2, 3, 4, 4)


def test_models_run() -> None:
    net = torchvision.models.mobilenet_v2(weights=None, num_classes=5).eval()
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 5)


def test_a_plain_import_works_once_subfleet_is_imported(root: Path) -> None:
    code = "import subfleet, torchvision; print(torchvision.__version__)"
    assert python(code, root).startswith("0.28")


def test_nothing_is_imported_until_it_is_needed(root: Path) -> None:
    code = "import subfleet, sys; print('torch' in sys.modules, 'torchvision' in sys.modules)"
    assert python(code, root) == "False False"


def test_declaring_twice_is_harmless() -> None:
    assert _torchvision.declare_operators() == _torchvision.declare_operators()
