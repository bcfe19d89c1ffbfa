"""Sampling speed of one training step: the engine against transformers, with and without a KV cache, in one run.

    python -m benchmarks.bench_sampling [--counts 16 64] [--max-tokens 64] [--csv benchmarks/results/sampling.csv]

The sides draw the same number of sequences of the same length for one prompt, from the model (plain) and from the
twist-induced proposal (twisted), in turns:

    engine       the sampler of training, as a training step uses it
    generate     transformers.generate with its KV cache, the twist in a logits processor
    re-forward   a loop that passes the prefix through the model anew for every token, and keeps nothing
    full length  the same with arrays that have their final length from the start, as in the paper's code, where every
                 token costs a pass over the whole and logits and log psi of every position, of which one is read

No sequence ends early. Before anything is timed, each transformers side is made to walk through the sequences that
the engine drew, and has to give them the probabilities that the engine reports: all sides do the same work.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from benchmarks.report import HEAD, MODEL, append_row, hardware, quartiles, spread, versions
from vllm_twist import TwistHead, results
from vllm_twist.results import TwistResult
from vllm_twist.training.samplers import DrawRequest

#: By how much sequence log-probabilities of two sides may differ (nats): 64 tokens of rounding.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2.0, torch.float16: 0.5}


class Engine:
    """The sampler of training."""

    name = "engine"

    def __init__(self, args: argparse.Namespace, prompt: list[int]) -> None:
        from vllm_twist.training.samplers.vllm import EngineSampler

        self.prompt, self.drawn = tuple(prompt), 0
        self.sampler = EngineSampler(
            args.model,
            TwistHead.from_pretrained(args.twist_head),
            end_ids=frozenset(),  # no sequence ends early
            max_model_len=len(prompt) + args.max_tokens,
            max_num_seqs=max(args.counts),
            dtype=args.dtype,
            enforce_eager=not args.compile,
            kv_cache_memory_bytes=args.kv_cache_memory_bytes,
        )

    def draw(self, count: int, length: int, twisted: bool) -> Tensor:
        self.drawn += 1
        # Seeds apart, for the engine counts them up for plain sequences, but within the 32 bits that matter on a CPU.
        request = DrawRequest(self.prompt, count, "q" if twisted else "p0", self.drawn << 16, length)
        return torch.tensor(self.sampler.sample([request])[0].token_ids)

    def group(self, count: int, length: int) -> TwistResult:
        """Return as many particles of the proposal, with all that the engine reports of them."""
        from vllm import SamplingParams

        extra = {"twist_particles": count, "twist_ess_threshold": 0, "twist_return_particles": 1}
        params = SamplingParams(max_tokens=length, ignore_eos=True, detokenize=False, extra_args=extra)
        prompt = {"prompt_token_ids": list(self.prompt)}
        return results(self.sampler.llm.generate(prompt, params, use_tqdm=False)[0])[0]


class Transformers(ABC):
    """A Hugging Face model and the head, side by side; ``prompt`` [P] token ids."""

    def __init__(self, model: Any, head: TwistHead, prompt: list[int]) -> None:
        self.model, self.head = model, head
        self.prompt = torch.tensor([prompt], device=model.device)

    def log_psi(self, hidden: Tensor) -> Tensor:
        return self.head(hidden, self.model.get_output_embeddings()).float()

    @abstractmethod
    def log_q(self, tokens: Tensor, twisted: bool) -> Tensor:
        """Return log q [N] of given outputs [N, T], step by step in this side's own way."""


class Generate(Transformers):
    """transformers.generate; the LM head's input is what the twist head reads."""

    name = "generate"

    def __init__(self, model: Any, head: TwistHead, prompt: list[int]) -> None:
        super().__init__(model, head, prompt)
        self.hidden: Tensor
        model.get_output_embeddings().register_forward_pre_hook(self._keep)

    def _keep(self, module: Any, inputs: tuple[Tensor]) -> None:
        self.hidden = inputs[0][:, -1]

    def _generate(self, count: int, length: int, twisted: bool, *processors: Any) -> Tensor:
        twist = [TwistLogits(self)] if twisted else []
        output = self.model.generate(
            self.prompt,
            attention_mask=torch.ones_like(self.prompt),
            do_sample=True,
            top_k=0,
            num_return_sequences=count,
            max_new_tokens=length,
            logits_processor=LogitsProcessorList([*twist, *processors]),
        )
        return output[:, self.prompt.shape[1] :]

    def draw(self, count: int, length: int, twisted: bool) -> Tensor:
        return self._generate(count, length, twisted)

    def log_q(self, tokens: Tensor, twisted: bool) -> Tensor:
        guide = Guide(tokens, self.prompt.shape[1])
        assert torch.equal(self._generate(*tokens.shape, twisted, guide), tokens)
        return guide.log_q


class TwistLogits(LogitsProcessor):
    """Add log psi of every token to the model's logits."""

    def __init__(self, side: Generate) -> None:
        self.side = side

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.side.log_psi(self.side.hidden)


class Guide(LogitsProcessor):
    """Leave nothing to draw but the given tokens, and add up their log-probabilities."""

    def __init__(self, tokens: Tensor, prompt_length: int) -> None:
        self.tokens, self.prompt_length = tokens, prompt_length
        self.log_q = torch.zeros(len(tokens), device=tokens.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = self.tokens[:, input_ids.shape[1] - self.prompt_length, None]
        self.log_q += scores.log_softmax(-1).gather(1, chosen)[:, 0]
        return torch.full_like(scores, -math.inf).scatter(1, chosen, 0)


class Reforward(Transformers):
    """The prefix through the model for every token; with ``whole``, what is yet to come as well, and all read out."""

    def __init__(self, model: Any, head: TwistHead, prompt: list[int], whole: bool) -> None:
        super().__init__(model, head, prompt)
        self.whole = whole
        self.name = "full length" if whole else "re-forward"

    @torch.inference_mode()
    def _walk(self, count: int, length: int, twisted: bool, choose: Callable[[int, Tensor], Tensor]) -> Tensor:
        start = self.prompt.shape[1]
        sequences = torch.cat([self.prompt.expand(count, -1), self.prompt.new_zeros(count, length)], 1)
        for step, end in enumerate(range(start, start + length)):
            inputs = sequences if self.whole else sequences[:, :end]
            hidden = self.model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            if not self.whole:
                hidden = hidden[:, -1:]
            logits = self.model.get_output_embeddings()(hidden).float()
            if twisted:
                logits = logits + self.log_psi(hidden.flatten(0, 1)).view_as(logits)
            sequences[:, end] = choose(step, logits[:, end - 1 if self.whole else -1])[:, 0]
        return sequences[:, start:]

    def draw(self, count: int, length: int, twisted: bool) -> Tensor:
        return self._walk(count, length, twisted, lambda _, logits: torch.multinomial(logits.softmax(-1), 1))

    def log_q(self, tokens: Tensor, twisted: bool) -> Tensor:
        log_q = torch.zeros(len(tokens), device=tokens.device)

        def choose(step: int, logits: Tensor) -> Tensor:
            chosen = tokens[:, step, None]
            log_q.add_(logits.log_softmax(-1).gather(1, chosen)[:, 0])
            return chosen

        self._walk(*tokens.shape, twisted, choose)
        return log_q


@torch.inference_mode()
def check(engine: Engine, others: list[Any], count: int, length: int) -> dict[str, float]:
    """Return the largest difference (nats) between log-probabilities of the engine's particles on both sides.

    Log p0 by sequence is what the engine reports; log q follows from the weight, w = p0 psi_T / q.

    Raises:
        RuntimeError: a side samples from something else than the engine does.
    """
    group = engine.group(count, length)
    device = others[0].prompt.device
    tokens = torch.tensor([p.token_ids for p in group.particles], device=device)
    log_p = torch.tensor([p.log_prob for p in group.particles], device=device)
    log_w = torch.tensor([p.log_weight for p in group.particles], device=device) + group.log_z + math.log(count)
    prefix = torch.cat([others[0].prompt.expand(count, -1), tokens[:, :-1]], 1)
    hidden = others[0].model.base_model(input_ids=prefix).last_hidden_state[:, -1]
    log_psi = others[0].log_psi(hidden).gather(1, tokens[:, -1:])[:, 0]
    differences = {}
    for side in others:
        worst = max(
            (side.log_q(tokens, False) - log_p).abs().max().item(),
            (side.log_q(tokens, True) - (log_p + log_psi - log_w)).abs().max().item(),
        )
        tolerance = TOLERANCE[side.model.dtype]
        if not worst <= tolerance:
            raise RuntimeError(f"{side.name} and the engine differ by {worst:.3g} nats on {count} sequences")
        differences[side.name] = worst
    return differences


def measure(sides: list[Any], count: int, length: int, repeats: int) -> dict[tuple[str, bool], list[float]]:
    """Return tokens per second of each repeat by side and by whether the twist is on (one warm-up each)."""
    rates: dict[tuple[str, bool], list[float]] = {(side.name, twisted): [] for side in sides for twisted in (0, 1)}
    for repeat in range(repeats + 1):
        for side in sides:
            for twisted in (False, True):
                start = time.perf_counter()
                drawn = side.draw(count, length, twisted)
                drawn.cpu()
                seconds = time.perf_counter() - start
                assert drawn.shape == (count, length), drawn.shape
                if repeat:
                    rates[side.name, twisted].append(count * length / seconds)
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--twist-head", default=HEAD)
    parser.add_argument("--prompt", default="I bought this")
    parser.add_argument("--counts", type=int, nargs="+", default=[16, 64], help="sequences in a batch")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=[str(dtype).split(".")[1] for dtype in TOLERANCE])
    parser.add_argument("--compile", action="store_true", help="compile the engine's model, as training does on GPUs")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=2**30)
    parser.add_argument("--csv", type=Path, help="append one row per side and number of sequences")
    args = parser.parse_args()

    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    prompt = AutoTokenizer.from_pretrained(args.model)(args.prompt).input_ids
    dtype, device = getattr(torch, args.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(device).eval().requires_grad_(False)
    model.generation_config.eos_token_id = None  # as ignore_eos: no sequence ends early
    head = TwistHead.from_pretrained(args.twist_head, dtype=dtype).to(device).requires_grad_(False)
    others = [Generate(model, head, prompt), *(Reforward(model, head, prompt, whole) for whole in (False, True))]
    engine = Engine(args, prompt)  # last, as in training: it takes what is there out of the garbage collector's way
    sides = [engine, *others]

    machine, software = hardware(), versions("transformers")
    command = " ".join(["python -m benchmarks.bench_sampling", *sys.argv[1:]])
    setting = f"{args.dtype} · {torch.get_num_threads()} threads · T={args.max_tokens} · {args.repeats} repeats"
    print(f"{machine} · {software} · {args.model} · {setting}")
    print(f"{'N':>4}  {'side':<11}  {'plain, tok/s':>22}  {'twisted, tok/s':>22}  engine over it, plain  twisted")
    for count in args.counts:
        differences = check(engine, others, count, args.max_tokens)
        rates = measure(sides, count, args.max_tokens, args.repeats)
        for side in sides:
            # Paired by repeat: what else the machine does weighs on both sides.
            pairs = [zip(rates["engine", twisted], rates[side.name, twisted], strict=True) for twisted in (0, 1)]
            ratios = [statistics.median(ours / theirs for ours, theirs in pair) for pair in pairs]
            cells = "  ".join(f"{spread(rates[side.name, twisted]):>22}" for twisted in (False, True))
            print(f"{count:>4}  {side.name:<11}  {cells}  {ratios[0]:>21.2f}  {ratios[1]:>7.2f}")
            if args.csv:
                row = {
                    "date": datetime.date.today().isoformat(),
                    "hardware": machine,
                    "versions": software,
                    "command": command,
                    "model": args.model,
                    "dtype": args.dtype,
                    "threads": torch.get_num_threads(),
                    "sequences": count,
                    "max_tokens": args.max_tokens,
                    "side": side.name,
                }
                for twisted, name in enumerate(("plain", "twisted")):
                    parts = zip(("q25", "median", "q75"), quartiles(rates[side.name, twisted]), strict=True)
                    row |= {f"{name}_tokens_per_s_{part}": round(value) for part, value in parts}
                    row[f"engine_over_side_{name}"] = round(ratios[twisted], 3)
                append_row(args.csv, row)
        worst = ", ".join(f"{name} {value:.1e}" for name, value in differences.items())
        print(f"      log-probabilities of the engine's sequences agree (largest difference, nats: {worst})")


if __name__ == "__main__":
    main()
