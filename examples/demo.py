"""Plain and twisted samples of the same prompts, side by side, from one engine.

make demo
"""

from __future__ import annotations

import os
import statistics
import sys
import textwrap
import time
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from tqdm import tqdm

from benchmarks.bench_generate import measure
from benchmarks.report import HEAD, MODEL, hardware, versions
from examples.common import quiet, seconds_bar
from vllm_twist import results

PROMPTS = ["I bought this", "The battery", "After two weeks", "My daughter"]
PARTICLES = 16


#: Of what is printed: 80 columns, the least that a terminal has.
WIDTH = 80


def show(title: str, text: str, note: str = "") -> None:
    lines = textwrap.wrap(" ".join(text.split()), WIDTH, initial_indent="      ", subsequent_indent="      ")
    print(f"    {title}{note}".rstrip(), *lines, sep="\n")


def main() -> None:
    print("\nvllm-twist: sampling from a reweighted language model inside vLLM\n")
    print(f"  model  {MODEL}: a tiny LM that writes product reviews, good and bad")
    print(f"  twist  {HEAD}: a head trained to steer it towards positive reviews")
    print(f"  on     {hardware()}\n         {versions()}\n")
    started = time.perf_counter()
    with seconds_bar("  starting the engine", expected=25), quiet():
        from vllm import LLM, SamplingParams

        llm = LLM(
            MODEL,
            twist_head=HEAD,
            twist_particles=PARTICLES,
            max_num_seqs=64,
            max_model_len=512,
            kv_cache_memory_bytes=2**30,
            enforce_eager=True,
        )
    print(f"  engine up after {time.perf_counter() - started:.0f} s\n")

    common: dict[str, Any] = {"max_tokens": 60, "seed": 1}
    plain = llm.generate(PROMPTS, SamplingParams(**common, extra_args={"twist": 0}), use_tqdm=False)
    twisted = llm.generate(PROMPTS, SamplingParams(**common), use_tqdm=False)
    print(f"  One plain sample, and one draw from the target p0 · psi by {PARTICLES} particles,")
    print("  per prompt. log Z says how likely the target is under the model (nats; the")
    print("  estimate of Z is unbiased), ESS how many of the particles count in the end.\n")
    for prompt, before, after in zip(PROMPTS, plain, twisted, strict=True):
        group = results(after)[0]
        print(f"  {prompt!r}")
        show("plain  ", prompt + before.outputs[0].text)
        show(
            "twisted",
            prompt + after.outputs[0].text,
            f"   log Z {group.log_z:+.2f} · ESS {group.ess:.1f} of {PARTICLES} · resampled {group.num_resamplings}×",
        )
        print()

    repeats, max_tokens = 7, 128
    hidden = not sys.stdout.isatty()
    bars = tqdm(total=2 * (repeats + 1), desc="  measuring speed", leave=False, file=sys.stdout, disable=hidden)
    with bars as bar:
        rates = measure(
            llm, PROMPTS[0], particles=PARTICLES, max_tokens=max_tokens, repeats=repeats, progress=bar.update
        )
    plain_rate, twisted_rate = (statistics.median(rates[name]) for name in ("plain", "twisted"))
    print(f"  Speed, {PARTICLES} sequences of {max_tokens} tokens, median of {repeats}:")
    print(f"    plain, n={PARTICLES}        {plain_rate:7.0f} tokens/s")
    print(f"    twisted, K={PARTICLES}      {twisted_rate:7.0f} tokens/s   {twisted_rate / plain_rate:.2f} of plain\n")


if __name__ == "__main__":
    main()
