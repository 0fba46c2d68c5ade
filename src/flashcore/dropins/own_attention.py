"""Find models of Transformers that bring their own attention, by reading their classes.

A layer that asks Transformers' attention interface (`ALL_ATTENTION_FUNCTIONS`) gets flashcore's
function, and hands it the mask that flashcore made. Other layers compute scores and softmax
themselves. They would misread that mask, or look for the implementation's name in a table of their
own that does not have it. And some that ask look into the mask first. No flag of a class says which
kind it is: some set `_supports_sdpa` for layers of their own, others leave it off though their
layers ask. So this module follows the names that the code of a class uses, from the class to the
layers it is built of.

A class where some layers ask and others do not gets masks as Transformers makes them for its own
implementations, which all of them understand. One where no layer asks is refused.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

INTERFACE = "ALL_ATTENTION_FUNCTIONS"
NORMALISERS = ("softmax", "Softmax", "scaled_dot_product_attention")


@dataclass(frozen=True)
class Finding:
    """A finding says how the layers of a model class attend.

    Args:
        dispatches: some of them ask Transformers' attention interface.
        own: the name of a layer that computes attention itself, or None.
        obstacle: why flashcore cannot be this class's implementation, or None if it can.
        masks: whose masks its layers read besides handing them on: "sdpa", "eager", or None if
            none of them does.
        may_deny_causality: a layer that asks may say that it is not causal; some say it under
            causal masks too.
        claims_causality: a layer that asks says that it is causal, or says nothing, which means the
            same; some do under masks that are not.
    """

    dispatches: bool
    own: str | None
    obstacle: str | None
    masks: str | None
    may_deny_causality: bool
    claims_causality: bool


@functools.cache
def examine(kind: type) -> Finding:
    """Return how the layers of a subclass of PreTrainedModel attend.

    Models within it that have a config of another class are left out: Transformers asks each of
    them for itself.
    """
    dispatches = makes_masks = reads = denies = claims = False
    own = own_masked = table = None
    for part in _parts(kind):
        names = {name for code in _codes(part) for name in code.co_names}
        makes_masks |= any(name.startswith("create_") and "mask" in name for name in names)
        table = table or _table_of_classes(part)
        if INTERFACE in names:
            dispatches = True
            reads |= any(_reads_mask(function) for function in _functions(part))
            said = list(_said_of_causality(part))
            denies |= any(value is not True for value in said)
            claims |= not said or True in said
        elif not part.__name__.endswith("Router") and "Attention" not in part.__name__:
            continue  # heads that weigh layers and the like have a softmax too
        elif _attends(part, with_mask=True):
            own_masked = own_masked or part.__name__
        elif _attends(part, with_mask=False) and "Attention" in part.__name__:
            own = own or part.__name__
    obstacle = masks = None
    supports_sdpa = bool(getattr(kind, "_supports_sdpa", False))
    if table is not None:
        obstacle = f"it chooses among the classes of {table}, which has no such entry"
    elif reads or (own_masked is not None and makes_masks):
        masks = "sdpa" if supports_sdpa else "eager"
        if not dispatches and not supports_sdpa:
            obstacle = (
                f"{own_masked} computes attention itself, from masks made for eager attention"
            )
    return Finding(dispatches, own_masked or own, obstacle, masks, denies, claims)


def _parts(kind: type) -> Iterator[type]:
    """Yield a model class and, as often as they lead on, the modules that its code names."""
    from transformers import PreTrainedModel

    config = getattr(kind, "config_class", None)
    todo, seen = [kind], {kind}
    while todo:
        part = todo.pop()
        yield part
        for function in _functions(part):
            for value in _named(function):
                for found in value.values() if isinstance(value, dict) else (value,):
                    if not isinstance(found, type) or found in seen:
                        continue
                    seen.add(found)
                    if not issubclass(found, torch.nn.Module) or _is_library(found.__module__):
                        continue
                    its_config = getattr(found, "config_class", None)
                    if issubclass(found, PreTrainedModel) and its_config is not config:
                        continue
                    todo.append(found)


def _is_library(module_name: str) -> bool:
    """Return whether a module is torch's or a part that Transformers' models share."""
    return module_name.startswith("torch.") or module_name in (
        "transformers.modeling_utils",
        "transformers.generation.utils",
    )


def _functions(part: type) -> Iterator[types.FunctionType]:
    """Return the functions of a class and of its bases, as they were before decorators."""
    for base in part.__mro__:
        if base is object or _is_library(base.__module__):
            continue
        for name, value in vars(base).items():
            if name == "_init_weights":  # names the layers of all models in the file
                continue
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            elif isinstance(value, property):
                value = value.fget
            if callable(value) and not isinstance(value, type):
                function = inspect.unwrap(value)
                if isinstance(function, types.FunctionType):
                    yield function


def _codes(part: type) -> Iterator[types.CodeType]:
    for function in _functions(part):
        yield from _nested(function.__code__)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


def _named(function: types.FunctionType) -> Iterator[Any]:
    """Return the global values that a function names."""
    for code in _nested(function.__code__):
        for name in code.co_names:
            if name in function.__globals__:
                yield function.__globals__[name]


def _table_of_classes(part: type) -> str | None:
    """Return the name of a table in which a class looks up its config's implementation, if it
    does."""
    for function in _functions(part):
        for code in _nested(function.__code__):
            if "_attn_implementation" not in code.co_names:
                continue
            for name in code.co_names:
                value = function.__globals__.get(name)
                if isinstance(value, dict) and "eager" in value:
                    return name
    return None


def _reads_mask(function: types.FunctionType) -> bool:
    """Return whether a function looks into a mask that it is given: an attribute, elements,
    torch.cat."""
    code = function.__code__
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    masks = {name for name in arguments if "mask" in name}
    if not masks:
        return False
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError):
        return False
    parents = (ast.Attribute, ast.Subscript, ast.List, ast.Tuple)
    return any(
        isinstance(child, ast.Name) and child.id in masks
        for node in ast.walk(tree)
        if isinstance(node, parents)
        for child in ast.iter_child_nodes(node)
    )


def _said_of_causality(part: type) -> Iterator[bool | None]:
    """Return the values that a layer's attribute is_causal is set to; None if it is no constant."""
    for code in _codes(part):
        steps = list(dis.get_instructions(code))
        for value, _, store in zip(steps, steps[1:], steps[2:], strict=False):
            if store.opname == "STORE_ATTR" and store.argval == "is_causal":
                yield value.argval if value.opname == "LOAD_CONST" else None


def _attends(part: type, *, with_mask: bool) -> bool:
    """Return whether a class computes a softmax itself, in a function that takes a mask or in
    any."""
    for function in _functions(part):
        helpers = [
            value
            for value in _named(function)
            if isinstance(value, types.FunctionType) and "attention" in value.__name__
        ]
        for candidate in (function, *helpers):
            code = candidate.__code__
            arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            takes_mask = any("mask" in name for name in arguments)
            names = {name for inner in _nested(code) for name in inner.co_names}
            if (takes_mask or not with_mask) and any(name in NORMALISERS for name in names):
                return True
    return False
