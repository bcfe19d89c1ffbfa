#!/usr/bin/env bash
# torch 2.13.0: a CPU generator accepts 64-bit seeds and uses their low 32 bits, without a warning. Seeds made as
# "index * 2**32 + run", hashes cut to their upper bits, or -1 and 2**32 - 1 give the very same random numbers; samplers
# that seed one generator per request (as serving engines do) then return the same sample for different seeds.
# Seen:
#   seeds 5, 5 + 2**32 and 5 + 2**40: equal
#   seeds -1 and 2**32 - 1: equal
#   seeds 5 and 6: different
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" - <<'P'
import torch


def numbers(seed):
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # It remembers the whole seed: nothing shows that most of it is not used.
    assert generator.initial_seed() == seed % 2**64
    return torch.rand(1000, generator=generator)


def check(*seeds, equal):
    first, *others = map(numbers, seeds)
    seen = all(torch.equal(first, other) for other in others)
    print(f"seeds {seeds}: {'equal' if seen else 'different'}")
    assert seen == equal, "this has changed"


check(5, 5 + 2**32, 5 + 2**40, equal=True)
check(-1, 2**32 - 1, equal=True)
check(5, 6, equal=False)
P
