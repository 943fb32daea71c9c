"""The card of an exported network: `model.json` for machines, `README.md` for people."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from subfleet import __version__
from subfleet.core.cost import CONVENTIONS
from subfleet.core.scaling import Scaling
from subfleet.core.supernet import SuperNetwork
from subfleet.core.units import IndexMap
from subfleet.datasets.meaning import LABELS
from subfleet.fitted import Fitted, Target
from subfleet.platform.files import to_jsonable
from subfleet.platform.metrics import params_sha256
from subfleet.trained import TrainedRun

FORMAT = 1
_WHERE = ("source", "cache")  # places on the disk of who trained it


@dataclass(frozen=True)
class Input:
    """What the program takes: rows of a shape and type; `scale` is None where it is not known.

    `numbering` says what the tokens are, if that is known.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    scale: Scaling | None
    tokens: bool = False
    vocabulary: int = 0
    numbering: str = ""

    @property
    def type_name(self) -> str:
        """Such as "uint8"."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def meaning(self) -> str:
        """What a value is, in words."""
        if self.tokens:
            bound = f", 0 to {self.vocabulary - 1}" if self.vocabulary else ""
            how = f": {self.numbering}" if self.numbering else "; of what, is not known here"
            return f"tokens as the data set numbers them{bound}{how}"
        if self.scale is None:
            return "values scaled as the run's data set scales them; by what is not known here"
        kind = "pixels, 0 to 255," if self.dtype == torch.uint8 else "numbers"
        return f"{kind} as the data set stores them"


def card(
    run: TrainedRun,
    target: Target,
    small: Fitted,
    takes: Input,
    tensors: Mapping[str, Tensor],
    program: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of `model.json`, but for the sizes of the files.

    `program`: the batch it takes, "any" or a number, and how far it was from the network.
    """
    experiment = run.experiment
    return {
        "format": FORMAT,
        "subnetwork": {target.kind: target.value, "tier": small.tier} | _width(run, small.map),
        "task": {
            "data": experiment.data.name,
            "data_options": {k: v for k, v in experiment.data.options.items() if k not in _WHERE},
            "num_classes": run.net.num_classes,
            "labels": _labels(run),
            "input": _input(takes),
            "output": {"shape": ["batch", run.net.num_classes], "values": "class scores (logits)"},
        },
        "accuracy": small.accuracy,
        "cost": _cost(run.net, small.map, tensors),
        "weights": small.weights,
        "batchnorm_statistics": small.statistics,
        "clients_own_tensors": list(small.own),
        "program": program,
        "model": {"name": experiment.model.name, "options": experiment.model.options},
        "algorithm": {
            "name": experiment.algorithm.name,
            "options": experiment.algorithm.options,
        },
        "run": {
            "round": run.round,
            "rounds": experiment.run.rounds,
            "seed": experiment.run.seed,
            "params_sha256": params_sha256(run.params),
            "fingerprint": run.folder.fingerprint,
        },
        "versions": {
            "export": {
                "subfleet": __version__,
                "torch": torch.__version__,
                "python": sys.version.split()[0],
            },
            "run": run.facts.get("packages", {}) | {"python": run.facts.get("python")},
        },
        "units": _units(run.net, small.map),
        "tensors": {name: list(tensor.shape) for name, tensor in sorted(tensors.items())},
    }


def _width(run: TrainedRun, map: IndexMap) -> dict[str, int]:
    """Channels and neurons, of the sub-network and of all."""
    space = run.net.space
    counts, used = space.counts_by_group(map), space.used(map)
    kept = sum(counts[group] for group in space.widths if group in used)
    return {"units": kept, "units_of": space.num_units}


def _labels(run: TrainedRun) -> list[str] | None:
    """What each class stands for, where the data set is one whose labels are known."""
    labels = LABELS.get(run.experiment.data.name, ())
    return list(labels) if len(labels) == run.net.num_classes else None


def _input(takes: Input) -> dict[str, Any]:
    described: dict[str, Any] = {
        "shape": ["batch", *takes.shape],
        "dtype": takes.type_name,
        "values": takes.meaning,
    }
    if takes.tokens:
        return described | {"vocabulary": takes.vocabulary or None}
    scale = takes.scale
    by = None if scale is None else {"factor": scale.factor, "shift": scale.shift}
    return described | {"scaling": by, "scaled_by_program": scale is not None}


def _cost(net: SuperNetwork, map: IndexMap, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Entries, bytes, and multiply-accumulates of one row in each convention."""
    papers = net.cost(map)
    macs = {convention: net.cost(map, convention).macs for convention in CONVENTIONS}
    constants = [tensor for name, tensor in tensors.items() if name not in net.space.shapes]
    return {
        "params": net.stored_params(map, "local"),
        "weights": papers.params,
        "statistics": net.space.slice_numel(map) - net.stored_params(map, "local"),
        "constants": sum(tensor.numel() for tensor in constants),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "not_counted": list(net.uncounted),
        **{name if name == "macs" else f"macs_{name}": value for name, value in macs.items()},
    }


def _units(net: SuperNetwork, map: IndexMap) -> dict[str, Any]:
    """For each group: how many units it has, and which are kept; of a skipped block none."""
    used = net.space.used(map)
    return {
        group: {"of": size, "kept": np.arange(size)[used[group]].tolist() if group in used else []}
        for group, size in net.space.groups.items()
    }


_NUMBERS = re.compile(r"\[\s+((?:-?\d+,\s+)*-?\d+)\s+\]")


def card_bytes(content: Mapping[str, Any]) -> bytes:
    r"""The card as JSON, indented, lists of numbers on one line.

    >>> card_bytes({"kept": [0, 1]})
    b'{\n  "kept": [0, 1]\n}\n'
    """
    text = json.dumps(to_jsonable(content), indent=2, allow_nan=False)
    return (_NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text) + "\n").encode()


# --- for people ---------------------------------------------------------------------------------


def readme(said: Mapping[str, Any]) -> str:
    """The model card, from the content of `model.json`."""
    task, run = said["task"], said["run"]
    return _README.format(
        title=f"{said['model']['name']} for {_subject(said)}",
        what=_what(said),
        snippet=snippet(said),
        classes=task["num_classes"],
        labels=_labels_line(task["labels"]),
        data=task["data"],
        input_line=_input_line(task["input"]),
        batch_line=_batch_line(said),
        accuracy=_accuracy_lines(said["accuracy"]),
        cost=_cost_lines(said["cost"]),
        weights=said["weights"],
        statistics=said["batchnorm_statistics"],
        algorithm=said["algorithm"]["name"],
        round=run["round"],
        rounds=run["rounds"],
        seed=run["seed"],
        sha=run["params_sha256"],
        subfleet=said["versions"]["export"]["subfleet"],
        torch=said["versions"]["export"]["torch"],
    )


def snippet(said: Mapping[str, Any]) -> str:
    """Plain torch that loads the program and runs it; to be started in the folder."""
    takes = said["task"]["input"]
    batch = 1 if said["program"]["batch"] == "any" else said["program"]["batch"]
    shape = ", ".join(str(size) for size in (batch, *takes["shape"][1:]))
    return (
        "import torch\n"
        'net = torch.export.load("model.pt2").module()\n'
        f"x = torch.zeros({shape}, dtype=torch.{takes['dtype']})\n"
        "with torch.no_grad():\n"
        "    scores = net(x)\n"
        "print(scores.argmax(dim=1))"
    )


def _subject(said: Mapping[str, Any]) -> str:
    cut = said["subnetwork"]
    if "client" in cut:
        return f"client {cut['client']} of tier {cut['tier']}"
    return f"tier {cut['tier']}" if cut["tier"] is not None else f"width {cut['width']:g}"


def _what(said: Mapping[str, Any]) -> str:
    cut = said["subnetwork"]
    if not cut["units_of"]:
        return "It is the whole network, which has no units that could be left out."
    return f"It has {cut['units']:,} of the super-network's {cut['units_of']:,} units."


def _input_line(takes: Mapping[str, Any]) -> str:
    shape = ", ".join(str(size) for size in takes["shape"])
    line = f"`{takes['dtype']}` of shape [{shape}]: {takes['values']}"
    by = takes.get("scaling")
    if by is None:
        return line
    sign = "-" if by["shift"] < 0 else "+"
    formula = f"x * {by['factor']:.10g} {sign} {abs(by['shift']):.10g}"
    return (
        f"{line}. The program itself makes the network's input, `{formula}`; who loads the "
        "weights alone must do that first"
    )


def _labels_line(labels: Sequence[str] | None) -> str:
    if labels is None:
        return "what the labels stand for is not known here; they are the data set's own"
    if all(len(label) == 1 for label in labels):
        return f"class i is character i of `{json.dumps(''.join(labels))}`"
    return ", ".join(f"{i} is {label}" for i, label in enumerate(labels))


def _batch_line(said: Mapping[str, Any]) -> str:
    batch = said["program"]["batch"]
    return "a batch of any size" if batch == "any" else f"a batch of {batch}"


def _accuracy_lines(accuracy: Mapping[str, Any]) -> str:
    lines = []
    if measured := accuracy.get("measured"):
        clients = "1 client" if measured["clients"] == 1 else f"{measured['clients']:,} clients"
        lines.append(
            f"* {measured['accuracy']:.4f}, this network on {measured['rows']:,} rows of {clients} "
            f"({measured['on']}), at export"
        )
    else:
        lines.append(f"* not measured at export: {accuracy.get('why_not')}")
    if of_run := accuracy.get("run"):
        lines.append(
            f"* {of_run['accuracy']:.4f}, what the run measured for the tier after round "
            f"{of_run['round']}"
        )
    return "\n".join(lines)


def _cost_lines(cost: Mapping[str, Any]) -> str:
    rows = [
        ("parameters", cost["params"]),
        ("of these weights, without biases and norms", cost["weights"]),
        ("running statistics", cost["statistics"]),
        ("constants", cost["constants"]),
        ("bytes of all tensors", cost["bytes"]),
        ("multiply-accumulates a row", cost["macs"]),
        ("the same as ADDS counts", cost["macs_adds"]),
        ("the same as DWNP counts", cost["macs_dwnp"]),
        ("the same with norms", cost["macs_profiler"]),
    ]
    lines = [f"| {name} | {value:,} |" for name, value in rows]
    if left_out := cost["not_counted"]:
        lines += ["", f"Multiply-accumulates do not count {', '.join(left_out)}."]
    return "\n".join(lines)


_README = """\
# {title}

Trained by federated learning to tell {classes} classes of `{data}` apart. {what}
PyTorch is all that it needs.

```python
{snippet}
```

* **Input**: {input_line}.
* **Output**: class scores, `float32` of shape [batch, {classes}], for {batch_line}.
* **Classes**: {labels}.

The program is in evaluation mode as it is: `eval()` is neither needed nor possible.

## Accuracy

{accuracy}

The weights: {weights}. BatchNorm's running statistics: {statistics}.

## Cost

| | |
| --- | ---: |
{cost}

## Where it comes from

Algorithm `{algorithm}`, round {round} of {rounds}, seed {seed}. The super-network it was cut from
has the digest `{sha}`.
Exported by subfleet {subfleet} with torch {torch}.

## Files

* `model.pt2`: the program, for `torch.export.load`.
* `model.safetensors`: all of its tensors by name, constants included.
* `model.json`: this card for machines, with the kept units of each group.
"""
