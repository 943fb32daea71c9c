"""From a name in an experiment to the thing itself: algorithm, model, data set.

A name is one of the built-in tables (`ALGORITHMS`, `ZOO`, `SETS`) or the user's
own "module:attribute". What it names is called with what the platform knows (a
data set's classes, the seed, ...) and with the options of its TOML table; these
are checked against the callable's signature first, so that a misspelt key or a
string for a number is one clear message.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn

from subfleet.config import AlgorithmTable, DataTable, Experiment, ModelTable
from subfleet.core.algorithm import Algorithm, Setting
from subfleet.core.errors import InputError, did_you_mean
from subfleet.core.supernet import SuperNetwork
from subfleet.options import Factory, Option, converted, is_needed, options, signature
from subfleet.options import check_options as check_options
from subfleet.options import examples as examples
from subfleet.options import meanings as meanings
from subfleet.options import option_names as option_names

if TYPE_CHECKING:
    from subfleet.datasets.federation import Federation

# What the platform knows and hands to a factory that has a parameter of that name.
DATA_GIVEN = frozenset({"seed", "progress"})
MODEL_GIVEN = frozenset({"input_shape", "num_classes", "vocabulary", "embedding"})

# Of these what an option can say where there are no data, and an example of each.
_INSTEAD = {"input_shape": "[1, 28, 28]", "num_classes": "10", "vocabulary": "81"}


def algorithms() -> Mapping[str, type[Algorithm]]:
    """The built-in algorithms by name."""
    from subfleet.algorithms import ALGORITHMS

    return ALGORITHMS


def models() -> Mapping[str, Factory]:
    """The built-in super-network factories by name."""
    from subfleet.models import ZOO

    return ZOO


def data_sets() -> Mapping[str, Factory]:
    """The built-in data-set factories by name."""
    from subfleet.datasets import SETS

    return SETS


# --- by name -----------------------------------------------------------------------------------


def algorithm_class(name: str) -> type[Algorithm]:
    """The algorithm that `name` names.

    >>> algorithm_class("fedavg").__name__
    'FedAvg'

    Raises:
        InputError: There is none, or it is not an `Algorithm`.
    """
    found = _look_up("algorithm", name, algorithms())
    if not _is_algorithm(found):
        raise InputError(
            f"algorithm.name = {name!r}: {found!r} is not a class derived from "
            "subfleet.Algorithm; name such a class"
        )
    _refuse_unfinished(name, found)
    return found


def algorithm_options(cls: type[Algorithm]) -> list[Option]:
    """The options of an algorithm: its fields after `setting`, as its docstrings explain them."""
    return options(cls, _given(cls))


def _is_algorithm(thing: Any) -> TypeGuard[type[Algorithm]]:
    return isinstance(thing, type) and issubclass(thing, Algorithm)


# What defines a hook already, by the hook.
_DEFINED = {
    "map_of": "subfleet.algorithms.fedpa.FedPA, where a tier trains the most that it affords",
    "plan": "subfleet.algorithms.local.IndexedAveraging, where clients train by SGD and are "
    "averaged: it asks for map_of(self, tier, round) alone",
}


def _refuse_unfinished(name: str, cls: type[Algorithm]) -> None:
    """InputError where a class leaves out what it must say."""
    missing = sorted(cls.__abstractmethods__)
    if not missing:
        return
    hooks = ", ".join(f"{hook}{_signature_text(getattr(cls, hook))}" for hook in missing)
    base = _DEFINED["map_of" if missing == ["map_of"] else "plan"]
    raise InputError(
        f"algorithm.name = {name!r}: the class {cls.__name__} does not define {hooks}; "
        f"define {'it' if len(missing) == 1 else 'them'}, or derive from {base}"
    )


def _signature_text(hook: Factory) -> str:
    """The parameters and result as they are written: `(self, tier: int) -> IndexMap`."""
    return str(inspect.signature(hook)).replace("'", "")


def model_factory(name: str) -> Factory:
    """The callable that makes the super-network `name`; raises `InputError` for none."""
    return _look_up("model", name, models())


def data_factory(name: str) -> Factory:
    """The callable that opens the data set `name`; raises `InputError` for none."""
    return _look_up("data", name, data_sets())


def _look_up(table: str, name: str, known: Mapping[str, Factory]) -> Factory:
    if ":" in name:
        return _users_own(table, name)
    if name not in known:
        kind = {"data": "data set"}.get(table, table)
        raise InputError(
            f"{table}.name = {name!r}: unknown {kind}; {did_you_mean(name, known)} "
            "(your own: 'module:attribute')"
        )
    return known[name]


def _users_own(table: str, name: str) -> Factory:
    module_name, _, attribute = name.partition(":")
    key = f"{table}.name = {name!r}"
    if not module_name or not attribute:
        raise InputError(f"{key}: not of the form 'module:attribute'; write e.g. 'my_code:thing'")
    # Last, so that nothing in the working folder can stand in for a library.
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises is the cause to show
        raise InputError(
            f"{key}: importing {module_name!r} failed: {type(error).__name__}: {error}; "
            "start in the folder that holds it, or set PYTHONPATH"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise InputError(
                f"{key}: {module_name!r} has no {attribute!r}; {_instead(table, part, found)}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise InputError(
            f"{key}: a {type(found).__name__} cannot be called; name a class or a function"
        )
    return found


def _instead(table: str, name: str, module: Any) -> str:
    """What of a module could have been meant: its own classes and functions, not its imports."""

    def home(thing: Any) -> str:
        return str(getattr(thing, "__module__", None) or "").partition(".")[0]

    package = home(module) or module.__name__.partition(".")[0]
    fits = _is_algorithm if table == "algorithm" else callable
    own = [
        item
        for item, thing in vars(module).items()
        if not item.startswith("_") and fits(thing) and home(thing) == package
    ]
    if own:
        return did_you_mean(name, own)
    wanted = "class derived from subfleet.Algorithm" if table == "algorithm" else "callable"
    return f"it defines no {wanted}; add one"


# --- built ----------------------------------------------------------------------------------------


def build_algorithm(table: AlgorithmTable, setting: Setting) -> Algorithm:
    """The algorithm of `[algorithm]` with its options, in its setting.

    Raises:
        InputError: An option is wrong, or nobody says what becomes of collected results.
    """
    cls = algorithm_class(table.name)
    checked = check_options("algorithm", cls, table.options, _given(cls), table.name)
    algorithm = cls(setting, **checked)
    if algorithm.phase(1).reduction == "collect" and cls.server_step is Algorithm.server_step:
        raise InputError(
            f"algorithm.name = {table.name!r}: the phase of {cls.__name__} collects results, and "
            f"the class does not define server_step{_signature_text(Algorithm.server_step)}; "
            'define it, `reduced` is a list of Collected, or let the phase say reduction = "sum"'
        )
    return algorithm


def model_facts(federation: Federation) -> dict[str, Any]:
    """What a super-network may ask of its data, by the names in `MODEL_GIVEN`.

    A federation of tokens says its `vocabulary` (tokens run from 0 to it, exclusive) and
    may bring word vectors: `embedding`, [vocabulary, size], or None.
    """
    return {
        "input_shape": federation.input_shape,
        "num_classes": federation.num_classes,
        "vocabulary": getattr(federation, "vocabulary", 0),
        "embedding": getattr(federation, "embedding", None),
    }


def build_model(table: ModelTable, **runtime: Any) -> Any:
    """The super-network of `[model]`; of `runtime` the factory gets what it has names for.

    A factory of the user's may make a plain `nn.Module`, such as its class: it is traced.

    Raises:
        InputError: An option is wrong, or the data are tokens and the model is for images.
    """
    factory = model_factory(table.name)
    reads_tokens = "vocabulary" in signature(factory) or ":" in table.name
    if runtime.get("vocabulary") and not reads_tokens:
        text = [name for name, known in models().items() if "vocabulary" in signature(known)]
        raise InputError(
            f"model.name = {table.name!r}: the data are tokens, which it does not read; "
            f"choose one of {', '.join(text)}, or your own: 'module:attribute'"
        )
    model = _build("model", factory, table, runtime)
    if isinstance(model, nn.Module):
        return _traced(model, table.name, {**table.options, **runtime})
    return model


def build_model_alone(table: ModelTable) -> Any:
    """As `build_model` where there are no data: what they would say is among the options.

    Raises:
        InputError: As `build_model`, or what the data would say is missing.
    """
    parameters, options = signature(model_factory(table.name)), dict(table.options)
    for name, example in _INSTEAD.items():
        if name not in options and name in parameters and is_needed(parameters[name]):
            raise InputError(
                f"model.{name} is missing, which a run takes from its data; give "
                f"--set '{name}={example}'"
            )
    shape = options.get("input_shape")
    if ":" not in table.name or "input_shape" in parameters or shape is None:
        return build_model(table)
    # A plain module is traced for a shape that its own code need not ask for.
    shape = converted("model.input_shape", options.pop("input_shape"), tuple[int, ...])
    model = build_model(ModelTable(name=table.name, **options), input_shape=shape)
    if tuple(model.input_shape) != shape:
        raise InputError(f"model.input_shape: not an option of {table.name}; remove the key")
    return model


def _traced(module: nn.Module, name: str, runtime: Mapping[str, Any]) -> SuperNetwork:
    """The super-network of a plain module, for the shape that the data have."""
    from subfleet.models import supernet

    shape = runtime.get("input_shape") or getattr(module, "input_shape", None)
    if shape is None:
        raise InputError(
            f"model.name = {name!r}: it makes a plain module, and there are no data to say what "
            f"that takes; give --set 'input_shape={_INSTEAD['input_shape']}', or return "
            "subfleet.models.supernet(module, example_input)"
        )
    dtype = torch.int64 if runtime.get("vocabulary") else torch.float32
    return supernet(module, torch.zeros(1, *shape, dtype=dtype), name=name.rpartition(":")[2])


def build_data(table: DataTable, **runtime: Any) -> Any:
    """The data set of `[data]`; of `runtime` the factory gets what it has names for."""
    factory = data_factory(table.name)
    return _build("data", factory, table, runtime)


def check_names(experiment: Experiment) -> None:
    """Raise `InputError` unless all three names, and the algorithm's options, are right.

    Nothing is opened or built, so a mistake shows before any data are read.
    """
    data_factory(experiment.data.name)
    model_factory(experiment.model.name)
    cls = algorithm_class(experiment.algorithm.name)
    table = experiment.algorithm
    check_options("algorithm", cls, table.options, _given(cls), table.name)


def _given(cls: type[Algorithm]) -> frozenset[str]:
    return frozenset({dataclasses.fields(cls)[0].name})


def _build(
    kind: str, factory: Factory, table: ModelTable | DataTable, runtime: Mapping[str, Any]
) -> Any:
    checked = check_options(kind, factory, table.options, frozenset(runtime), table.name)
    parameters = signature(factory)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    passed = {name: v for name, v in runtime.items() if takes_all or name in parameters}
    return factory(**passed, **checked)
