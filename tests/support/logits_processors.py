"""Logits processors as a user may bring them, for either model runner."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessor
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

#: May come twice at most in an output of a request that asks for it.
WATCHED = 7
#: (what was counted, what there is), whenever a processor has looked.
seen: list[tuple[int, int]] = []


def wanted(params: Any, key: str) -> Any:
    return (params.extra_args or {}).get(key)


class ByRow(LogitsProcessor):
    """Keeps a dictionary by row of the batch."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        self.rows: dict[int, Any] = {}
        self.spelled = {row: str(row) for row in range(64)}

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        process_dict_updates(self.rows, batch_update, self.enter)

    def enter(self, params: Any, prompt: Any, output: list[int]) -> Any:
        raise NotImplementedError

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        assert self.spelled == {row: str(row) for row in range(64)}
        for row, state in self.rows.items():
            self.change(logits[row], state)
        return logits

    def change(self, logits: torch.Tensor, state: Any) -> None:
        raise NotImplementedError


class Ban(ByRow):
    """Forbids a token that the request names."""

    def enter(self, params: Any, prompt: Any, output: list[int]) -> int | None:
        return wanted(params, "ban")

    def change(self, logits: torch.Tensor, state: int) -> None:
        logits[state] = -torch.inf


class Counter(ByRow):
    """Counts a token as it comes, in a state that holds the output too."""

    def enter(self, params: Any, prompt: Any, output: list[int]) -> Any:
        return {"count": 0, "length": 0, "output": output} if wanted(params, "count") else None

    def change(self, logits: torch.Tensor, state: dict[str, Any]) -> None:
        output = state["output"]
        while state["length"] < len(output):
            state["count"] += output[state["length"]] == WATCHED
            state["length"] += 1
        seen.append((state["count"], output.count(WATCHED)))
        if state["count"] >= 2:
            logits[WATCHED] = -torch.inf


class Closure(AdapterLogitsProcessor):
    """The same in a closure."""

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(self, params: Any) -> Any:
        if not wanted(params, "closure"):
            return None
        count: int | None = None

        def process(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count = output.count(WATCHED) if count is None else count + (output[-1] == WATCHED)
            seen.append((count, output.count(WATCHED)))
            if count >= 2:
                logits[WATCHED] = -torch.inf
            return logits

        return process


class Told(Counter):
    """Is told of forks."""

    def enter(self, params: Any, prompt: Any, output: list[int]) -> Any:
        return {"count": 0, "length": 0, "output": output} if wanted(params, "told") else None

    def fork(self, child: int, parent: int) -> None:
        if parent in self.rows:
            self.rows[child] = {**self.rows[parent], "output": self.rows[child]["output"]}


class Stubborn(ByRow):
    """Keeps what cannot be copied."""

    def enter(self, params: Any, prompt: Any, output: list[int]) -> Iterator[int] | None:
        return iter(x for x in range(9)) if wanted(params, "stubborn") else None

    def change(self, logits: torch.Tensor, state: Any) -> None:
        pass


class BanV2(LogitsProcessorV2):
    """Forbids a token that the request names."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.ban = torch.full((req_states.max_num_reqs,), -1, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        token = wanted(sampling_params, "ban")
        self.ban[req_idx] = -1 if token is None else token
        return token is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        banned = self.ban[ctx.expanded_idx_mapping.long()]
        tokens = torch.arange(logits.shape[1], device=logits.device)
        return logits.masked_fill_(tokens == banned[:, None], -torch.inf)


class CounterV2(LogitsProcessorV2):
    """Counts a token as it comes."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        self.states = req_states
        self.count = torch.zeros(req_states.max_num_reqs, dtype=torch.int64, device=req_states.device)
        self.asked = torch.zeros(req_states.max_num_reqs, dtype=torch.bool, device=req_states.device)

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        self.count[req_idx] = 0
        self.asked[req_idx] = bool(wanted(sampling_params, "count"))
        return bool(self.asked[req_idx])

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        slots = ctx.expanded_idx_mapping.long()
        prompt = self.states.prompt_len.gpu[slots]
        self.count[slots] += (ctx.input_ids == WATCHED) & (ctx.pos >= prompt)
        for slot, start, end in zip(slots.tolist(), prompt.tolist(), (ctx.pos + 1).tolist(), strict=True):
            if self.asked[slot]:
                history = self.states.all_token_ids.gpu[slot, start:end]
                seen.append((int(self.count[slot]), int((history == WATCHED).sum())))
        logits[:, WATCHED].masked_fill_(self.asked[slots] & (self.count[slots] >= 2), -torch.inf)
        return logits
