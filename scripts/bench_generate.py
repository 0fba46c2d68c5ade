"""Measure tokens a second of Transformers' generate(): attn_implementation="flashcore" beside
"sdpa".

    python scripts/bench_generate.py --json generate.json
    python scripts/bench_generate.py --profile --setups llama-1b --caches dynamic

Models are made from a config, with random weights. Each setup runs with each kind of cache by each
implementation, in alternating rounds; the median counts. The time is that of generate(), prompt
included. Every round has a prompt of another length, longer than all before, so that nothing was
ever prepared for its lengths ("first"), and is then repeated ("again"). The first round, which
compiles, does not count.

`--profile` prints instead what the host does in a decode step: the functions of Python that take
longest (cProfile), the operators of torch, and how often the host waited for the GPU.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import itertools
import json
import pstats
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flashcore.base import machine
from flashcore.integrations.transformers import register
from flashcore.ops.eager import launched_by

VOCABULARY = 32000
IMPLEMENTATIONS = ("sdpa", "flashcore")
# Transformers compiles a decode step with a static cache (mode "reduce-overhead") unless it is told
# not to.
CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static-eager": {"cache_implementation": "static", "disable_compile": True},
    "static": {"cache_implementation": "static"},
}


@dataclass(frozen=True)
class Setup:
    """A setup holds a Llama and a batch. Of a padded batch every second sequence is half
    padding."""

    layers: int
    width: int
    num_heads_q: int
    num_heads_kv: int
    batch: int = 1
    padded: bool = False


SETUPS = {
    "llama-1b": Setup(22, 2048, 32, 4),
    "llama-1b-padded": Setup(22, 2048, 32, 4, batch=8, padded=True),
    "llama-1b-16": Setup(16, 2048, 32, 8),
    "small": Setup(22, 512, 8, 8),
    "tiny": Setup(2, 64, 4, 2),
}
DEFAULT_SETUPS = ("llama-1b", "llama-1b-padded", "small")


def make_model(setup: Setup, positions: int, device: str) -> Any:
    """Return a Llama with random weights, float16 on a GPU, bfloat16 on a CPU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=setup.width,
        intermediate_size=setup.width * 11 // 4,
        num_hidden_layers=setup.layers,
        num_attention_heads=setup.num_heads_q,
        num_key_value_heads=setup.num_heads_kv,
        max_position_embeddings=positions,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    dtype = torch.float16 if device == "cuda" else torch.bfloat16
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config).to(dtype).eval()


def make_batch(setup: Setup, prompt: int, device: str) -> dict[str, torch.Tensor]:
    """Return token ids and where they are tokens; padding is on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (setup.batch, prompt), generator=generator)
    tokens = torch.ones(setup.batch, prompt, dtype=torch.int64)
    if setup.padded:
        tokens[::2, : prompt // 2] = 0
        ids[::2, : prompt // 2] = 0
    return {"input_ids": ids.to(device), "attention_mask": tokens.to(device)}


def wait(device: str) -> None:
    """Wait until the GPU has nothing left to do."""
    if device == "cuda":
        torch.cuda.synchronize()


def generate(
    model: Any,
    batch: dict[str, torch.Tensor],
    implementation: str,
    cache: str,
    new_tokens: int,
    **options: Any,
) -> torch.Tensor:
    """Generate, and return all tokens, those of the prompt first."""
    if model.config._attn_implementation != implementation:
        model.set_attn_implementation(implementation)
    tokens: torch.Tensor = model.generate(
        **batch, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        **CACHES[cache], **options,
    )  # fmt: skip
    return tokens


def measure(
    name: str, model: Any, cache: str, arguments: argparse.Namespace, deadline: float
) -> dict[str, Any]:
    """Return one line of the table."""
    setup, device = SETUPS[name], arguments.device
    seconds: dict[tuple[str, str], list[float]] = {}
    failed: dict[str, str] = {}
    # A compiled step would be compiled again for another length of its cache.
    again = ("again",) * arguments.again
    times = again if cache == "static" else ("first", *again)
    for number in range(arguments.rounds + 1):
        if number > 1 and time.monotonic() > deadline:
            break
        apart = 0 if cache == "static" else number * (arguments.new_tokens + 1)
        batch = make_batch(setup, arguments.prompt + apart, device)
        for which in times:
            for implementation in IMPLEMENTATIONS:
                wait(device)
                start = time.perf_counter()
                generate_or_say(failed, model, batch, implementation, cache, arguments.new_tokens)
                wait(device)
                if number and implementation not in failed:
                    elapsed = time.perf_counter() - start
                    seconds.setdefault((implementation, which), []).append(elapsed)
    tokens = setup.batch * arguments.new_tokens
    line: dict[str, Any] = {"setup": name, "cache": cache}
    for which in dict.fromkeys(times):
        for implementation in IMPLEMENTATIONS:
            values = seconds.get((implementation, which))
            if values:
                line[f"{implementation} {which}"] = round(tokens / statistics.median(values), 1)
                line["rounds"] = len(values)
        theirs, ours = (line.get(f"{implementation} {which}") for implementation in IMPLEMENTATIONS)
        if theirs and ours:
            line[f"ratio {which}"] = round(ours / theirs, 3)
    if failed:
        line["failed"] = failed
    return line


def generate_or_say(failed: dict[str, str], model: Any, batch: Any, *how: Any) -> None:
    """Generate, and return a failure as a result, too."""
    if how[0] not in failed:
        try:
            generate(model, batch, *how)
        except Exception as error:
            failed[how[0]] = f"{type(error).__name__}: {error}"[:300]


def step_times(
    model: Any, batch: dict[str, torch.Tensor], implementation: str, cache: str, new_tokens: int
) -> list[float]:
    """Return milliseconds of each decode step, from one new token to the next."""
    times: list[float] = []

    def stamp(input_ids: torch.Tensor, scores: Any, **options: Any) -> torch.Tensor:
        times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    generate(model, batch, implementation, cache, new_tokens, stopping_criteria=[stamp])
    return [1e3 * (after - before) for before, after in itertools.pairwise(times)]


def profile(name: str, model: Any, cache: str, arguments: argparse.Namespace) -> None:
    """Print what the host does, for each implementation."""
    device = arguments.device
    batch = make_batch(SETUPS[name], arguments.prompt, device)
    for implementation in IMPLEMENTATIONS:
        title = f"{name}, {cache} cache, {implementation}"
        for time_of in ("first", "second", "third"):
            times = step_times(model, batch, implementation, cache, arguments.new_tokens)
            print(
                f"==== {title}, {time_of} time: ms a step: median {statistics.median(times):.2f}, "
                f"mean {statistics.mean(times):.2f}, in turn {' '.join(f'{t:.1f}' for t in times)}"
            )
        profiler = cProfile.Profile()
        profiler.enable()
        generate(model, batch, implementation, cache, arguments.new_tokens)
        wait(device)
        profiler.disable()
        for order in ("tottime", "cumulative"):
            text = io.StringIO()
            stats = pstats.Stats(profiler, stream=text)
            stats.sort_stats(order).print_stats("" if order == "tottime" else "flashcore|attn", 40)
            print(text.getvalue())
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as operators:
            generate(model, batch, implementation, cache, 8)
            wait(device)
        averages = operators.key_averages()
        for order in ("self_cpu_time_total", "self_device_time_total")[: len(activities)]:
            table = averages.table(sort_by=order, row_limit=25, max_name_column_width=60)
            print(f"---- {title}: 8 tokens, by {order}\n{table}")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--setups", nargs="+", choices=SETUPS, default=list(DEFAULT_SETUPS))
    parser.add_argument("--caches", nargs="+", choices=CACHES, default=["dynamic", "static-eager"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--again", type=int, default=2, help="repetitions in a round")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--limit-s", type=float, default=90, help="no new round after that")
    parser.add_argument("--json", type=Path, help="where the result goes")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    import transformers

    transformers.logging.set_verbosity_error()
    register()
    launcher = launched_by(arguments.device)
    started = time.monotonic()
    lines: list[dict[str, Any]] = []
    parts = len(arguments.setups) * len(arguments.caches)
    for name in arguments.setups:
        positions = arguments.prompt + (arguments.rounds + 2) * (arguments.new_tokens + 1)
        model = make_model(SETUPS[name], positions, arguments.device)
        for cache in arguments.caches:
            if arguments.profile:
                profile(name, model, cache, arguments)
                continue
            share = arguments.limit_s * (len(lines) + 1) / parts
            lines.append(measure(name, model, cache, arguments, started + share))
            print(json.dumps(lines[-1]), flush=True)
        del model
    if arguments.profile:
        return 0
    document = {
        "kind": "generate",
        "date": machine.now(),
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "cpu": machine.cpu_name(),
        "versions": machine.versions() | {"transformers": transformers.__version__},
        "launcher": launcher,
        "prompt": arguments.prompt,
        "new_tokens": arguments.new_tokens,
        "results": lines,
    }
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
