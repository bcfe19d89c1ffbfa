#!/usr/bin/env bash
# transformers 5.19.0: a GPT-2 sequence classifier gives one text different scores in different batches when the tokenizer
# pads on the left, although the attention mask is passed. Positions are counted from the padding, not from the text, and
# GPT-2's are learned; `generate` derives them from the mask, the classifier does not. A reward model served in batches then
# depends on its neighbours. Padding on the right, or passing position_ids, gives the score of the text alone.
# Seen (random weights, float32; the exact differences vary with them):
#   padded on the right: off by less than 1e-5
#   padded on the left: off by more than 1e-2
#   padded on the left, position_ids from the mask: off by less than 1e-5
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.19.0
"$folder/venv/bin/python" - <<'P'
import torch
from transformers import GPT2Config, GPT2ForSequenceClassification

torch.manual_seed(0)
PAD = 0
config = GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=2, num_labels=1, pad_token_id=PAD,
                    initializer_range=0.3)
model = GPT2ForSequenceClassification(config).eval()
text, width = [7, 3, 9, 4], 12


@torch.no_grad()
def score(ids, mask, **kwargs):
    return model(input_ids=torch.tensor([ids]), attention_mask=torch.tensor([mask]), **kwargs).logits.item()


alone = score(text, [1] * 4)
padding, none, ones = [PAD] * (width - 4), [0] * (width - 4), [1] * 4
positions = torch.tensor([[0] * (width - 4) + list(range(4))])
for name, got, differs in (
    ("padded on the right", score(text + padding, ones + none), False),
    ("padded on the left", score(padding + text, none + ones), True),
    ("padded on the left, position_ids from the mask", score(padding + text, none + ones, position_ids=positions), False),
):
    off = abs(got - alone)
    print(f"{name}: off by {off:.2g}")
    assert (off > 1e-2) if differs else (off < 1e-5), "this has changed"
P
