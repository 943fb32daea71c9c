"""Makes `import torchvision` work beside a torch that its compiled part does not fit.

The torchvision wheel that the package index serves is built for CUDA. Beside a
CPU-only torch its compiled part cannot be loaded, and the import then dies where
Python code refers to operators that this part would have declared: "operator
torchvision::nms does not exist". Declaring their schemas first lets everything
written in Python work (transforms, data sets, models). Calling one of the two
operators still fails, as it should: there is no code behind it.

Anything inside `subfleet`, and any module imported after it, may simply write
`import torchvision`: `install` has put a finder in place that mends it on the
way. `from subfleet._torchvision import torchvision` says so explicitly.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

# The operators that torchvision 0.28 registers fake kernels for, unconditionally.
_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}

_libraries: list[Any] = []  # a torch.library.Library takes its schemas along when it is freed


def declare_operators() -> bool:
    """Declare torchvision's schemas if its compiled part cannot be loaded.

    Returns whether it was necessary. Idempotent.
    """
    import torch

    if _compiled_part_loads(torch):
        return False
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(schema)
            _libraries.append(library)
    return True


def _compiled_part_loads(torch: ModuleType) -> bool:
    spec = PathFinder.find_spec("torchvision")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    for folder in folders:
        for library in (*Path(folder).glob("_C*.so"), *Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
                return True
            except (ImportError, OSError):
                continue
    return False


class _Finder:
    """Finds nothing; it only mends torchvision just before the real finders find it."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        del path, target
        if name == "torchvision" and _Finder in sys.meta_path:
            sys.meta_path.remove(_Finder)  # pyright: ignore[reportArgumentType]
            declare_operators()
        return None


def install() -> None:
    """Mend torchvision when it is first imported; costs nothing until then."""
    if "torchvision" not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)  # pyright: ignore[reportArgumentType]


def __getattr__(name: str) -> Any:
    if name != "torchvision":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    declare_operators()
    import torchvision

    return torchvision
