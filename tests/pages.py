"""Pages whose blocks tests run: their files, their commands, and a folder that holds both."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


class Page:
    """`files`: blocks that begin with their name. `commands`: lines of blocks of no language."""

    def __init__(self, name: str):
        self.text = (DOCS / name).read_text()
        self.blocks = re.findall(r"^```(\w*)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        self.files = {
            found[1]: text
            for _, text in self.blocks
            if (found := re.match(r"# (\S+\.(?:py|toml))\n", text))
        }
        self.commands = [
            line for language, text in self.blocks if not language for line in text.splitlines()
        ]

    @contextmanager
    def written(self, folder: Path) -> Iterator[Path]:
        """The page's files in a folder, from which its modules are imported meanwhile."""
        for name, text in self.files.items():
            (folder / name).write_text(text)
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.syspath_prepend(folder)
            yield folder
        for name in self.files:
            sys.modules.pop(Path(name).stem, None)
