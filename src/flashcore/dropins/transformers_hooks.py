"""Answer for ours what Transformers asks about an implementation's name.

Transformers has two questions and no way to register an answer, so `install` puts functions in the
place of its own that answer for our names and pass on all others:

- Is it a version of flash-attn? Transformers 5 says yes to every name with "flash" in it, wants to
  import it, and denies it static caches, other models and other dtypes. We say no, except to
  continuous batching, which prepares packed sequences for such names and masks for the others.
- Does this model support it? Transformers looks at flags for "sdpa" and at nothing for other names.
  We look at the model's layers (dropins/own_attention.py).
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from typing import Any

from flashcore.dropins.own_attention import Finding, examine
from flashcore.errors import FallbackWarning, stacklevel_of_caller

_names: set[str] = set()
_warned: set[type] = set()
# Classes of configs: looked up for a model that was not asked about, and what was found.
_judged: set[type] = set()
_with_masks_of_sdpa: tuple[type, ...] = ()
_with_masks_of_eager: tuple[type, ...] = ()
_with_causality_denied: tuple[type, ...] = ()
_with_causality_claimed: tuple[type, ...] = ()


def answer_for(name: str) -> None:
    """Answer Transformers' questions about a name from now on."""
    if not _names:
        _be_no_flash_attention()
        _look_at_models()
    _names.add(name)


def _be_no_flash_attention() -> None:
    from transformers.utils import generic

    theirs = getattr(generic, "is_flash_attention_requested", None)
    if theirs is None:  # Transformers 4 looks for names that begin with "flash_attention"
        return

    def answering(own: Callable[[Any], bool]) -> Callable[..., bool]:
        """Return their function with an answer of our own, by version, for our names."""

        def is_flash_attention_requested(
            config: Any = None,
            requested_attention_implementation: str | None = None,
            version: int | list[int] | None = None,
        ) -> bool:
            name = getattr(config, "_attn_implementation", requested_attention_implementation)
            if name in _names:
                return own(version)
            return bool(theirs(config, requested_attention_implementation, version))

        return is_flash_attention_requested

    never = answering(lambda version: False)
    # Continuous batching asks whether packed sequences are taken, and then for a version of
    # flash-attn, whose functions it would import.
    of_no_version = answering(lambda version: version is None)
    for path, module in list(sys.modules.items()):  # a model's own code may have imported it too
        if getattr(module, "__dict__", {}).get("is_flash_attention_requested") is theirs:
            batches = path.startswith("transformers.generation.continuous_batching")
            module.is_flash_attention_requested = (  # type: ignore[attr-defined]
                of_no_version if batches else never
            )


def _look_at_models() -> None:
    from transformers import PreTrainedModel

    kind: Any = PreTrainedModel
    theirs = getattr(kind, "get_correct_attn_implementation", None)
    if theirs is None:  # Transformers 4.53: nothing but making a model leads to us
        make = kind.__init__

        @functools.wraps(make)
        def __init__(self: Any, config: Any, *inputs: Any, **kwargs: Any) -> None:
            judge(type(self), getattr(config, "_attn_implementation", None))
            make(self, config, *inputs, **kwargs)

        kind.__init__ = __init__
        return

    @functools.wraps(theirs)
    def get_correct_attn_implementation(
        self: Any, requested_attention: str | None, *args: Any, **kwargs: Any
    ) -> str:
        judge(type(self), requested_attention)
        return str(theirs(self, requested_attention, *args, **kwargs))

    kind.get_correct_attn_implementation = get_correct_attn_implementation


def judge(kind: type, name: str | None) -> None:
    """Refuse a model class whose layers flashcore cannot serve, if the name is one of ours.

    Args:
        kind: a subclass of PreTrainedModel.
        name: the attention implementation that is asked for.

    Raises:
        ValueError: its layers would misread flashcore's masks, or not know its name.
    """
    global _with_masks_of_sdpa, _with_masks_of_eager
    global _with_causality_denied, _with_causality_claimed
    if name not in _names:
        return
    finding = examine(kind)
    config: Any = getattr(kind, "config_class", None)
    # A part of a model that was looked at as a whole gets the masks that it understands.
    served_masks = finding.masks == "eager" and config in _with_masks_of_eager
    if finding.obstacle is not None and not served_masks:
        raise ValueError(_refusal(kind, finding, name))
    if isinstance(config, type):
        _judged.add(config)
        if finding.masks == "sdpa" and config not in _with_masks_of_sdpa:
            _with_masks_of_sdpa = (*_with_masks_of_sdpa, config)
        if finding.masks == "eager" and config not in _with_masks_of_eager:
            _with_masks_of_eager = (*_with_masks_of_eager, config)
        if finding.may_deny_causality and config not in _with_causality_denied:
            _with_causality_denied = (*_with_causality_denied, config)
        if finding.claims_causality and config not in _with_causality_claimed:
            _with_causality_claimed = (*_with_causality_claimed, config)
    if finding.own is not None and not finding.dispatches and kind not in _warned:
        _warned.add(kind)
        warnings.warn(
            f"{kind.__name__} keeps its own attention: {finding.own} does not ask for an "
            f'implementation, and attn_implementation="{name}" changes nothing in it',
            FallbackWarning,
            stacklevel=stacklevel_of_caller(),
        )


def _refusal(kind: type, finding: Finding, name: str) -> str:
    others = '"eager" or "sdpa"' if getattr(kind, "_supports_sdpa", False) else '"eager"'
    return (
        f'{kind.__name__} does not support attn_implementation="{name}": {finding.obstacle}. '
        f"Pass attn_implementation={others}, or, where it is a part of a larger model, name the "
        f'other parts, e.g. attn_implementation={{"text_config": "{name}"}}'
    )


def judge_config(config: Any) -> None:
    """Refuse a config by the model class that Transformers has for it, once per class of config.

    For models whose config was given our name after they were made, which nobody was asked about.
    """
    kind_of_config = type(config)
    if config is None or kind_of_config in _judged:
        return
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    kinds: Any = MODEL_MAPPING.get(kind_of_config, None)
    for kind in kinds if isinstance(kinds, (tuple, list)) else (kinds,):
        if isinstance(kind, type):
            judge(kind, config._attn_implementation)
    _judged.add(kind_of_config)


def masks_like(config: Any) -> str | None:
    """Return whose masks the config's model needs, "eager" or "sdpa"; None if ours will do."""
    if isinstance(config, _with_masks_of_eager):
        return "eager"
    return "sdpa" if isinstance(config, _with_masks_of_sdpa) else None


def may_deny_causality(config: Any) -> bool:
    """Return whether some layer of the config's model may say that it is not causal."""
    return isinstance(config, _with_causality_denied)


def claims_causality(config: Any) -> bool:
    """Return whether some layer of the config's model says that it is causal whatever its mask."""
    return isinstance(config, _with_causality_claimed)
