"""Read shapes as the benchmark names them: "B4 H32/8 S4096 D128 causal"."""

from __future__ import annotations

import re
from typing import Any

from flashcore.bench.workloads import MASKS, Workload

GROUP = "given"
_DTYPES = ("float16", "bfloat16", "float32")
_PAIR = re.compile(r"(\d+)(?:/(\d+))?")
_FORM = (
    '"B4 H32/8 S4096/8192 D128 causal", which may go on with a dtype, "window 1024,0", '
    '"softcap 30" and "bool mask" (or padding, additive)'
)


def parse_shape(text: str) -> Workload:
    """Return the workload that a name describes; bfloat16 unless it names a dtype.

    Args:
        text: sizes B, H, S and D, then "full" or "causal" and options, as in `Workload.name`. H32/8
            has 8 heads of k and v, S1/16384 has 16384 keys.

    Raises:
        ValueError: the text is nothing of that form.
    """
    words = text.split()
    sizes: dict[str, tuple[int, int | None]] = {}
    options: dict[str, Any] = {"causal": False, "dtype": "bfloat16"}
    while words:
        word = words.pop(0)
        size = _PAIR.fullmatch(word[1:])
        if word[0] in "BHSD" and size and word[0] not in sizes:
            first, second = size.groups()
            if second is not None and word[0] in "BD":
                raise _wrong(text, word)
            sizes[word[0]] = int(first), None if second is None else int(second)
        elif word in ("full", "causal"):
            options["causal"] = word == "causal"
        elif word in _DTYPES:
            options["dtype"] = word
        elif word in MASKS and words[:1] == ["mask"]:
            options["mask"] = word
            words.pop(0)
        elif word in ("window", "softcap") and words:
            options[word] = _option(text, word, words.pop(0))
        else:
            raise _wrong(text, word)
    if set(sizes) != set("BHSD"):
        raise ValueError(f"shape={text!r} is not of the form {_FORM}: B, H, S and D are needed")
    (batch, _), (heads, heads_kv), (seqlen, keys), (dim, _) = (sizes[name] for name in "BHSD")
    if not all((batch, heads, seqlen, dim)) or heads_kv == 0 or keys == 0:
        raise ValueError(f"shape={text!r}: there is nothing to time with a size of 0")
    if heads % (heads_kv or heads):
        raise ValueError(f"shape={text!r}: {heads} heads are not a multiple of {heads_kv}")
    return Workload(
        GROUP, batch, heads, seqlen, dim, num_heads_kv=heads_kv, seqlen_k=keys, **options
    )


def _option(text: str, name: str, value: str) -> Any:
    try:
        if name == "softcap":
            return float(value)
        left, right = value.split(",")
        return int(left), int(right)
    except ValueError as error:
        raise _wrong(text, f"{name} {value}") from error


def _wrong(text: str, word: str) -> ValueError:
    return ValueError(f"shape={text!r}: {word!r} does not belong to the form {_FORM}")
