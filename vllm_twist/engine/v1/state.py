"""Lanes on the worker (Model Runner V1): their SMC state, and one weigh-resample-sample step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_twist.engine.groups import effective_sample_size
from vllm_twist.engine.logit_rows import lineage_logprobs
from vllm_twist.engine.wire import LaneSpec, TwistStep, conditions_of
from vllm_twist.kernels import compiled, reference
from vllm_twist.kernels.schemes import is_uneven, may_resample

#: Tokens for which the keys of their random numbers are made at once.
KEYS_AHEAD = 32


def _members_of(specs: list[LaneSpec]) -> dict[str, list[int]]:
    """Return where each group's lanes stand among ``specs``, by their own index.

    Not by row: where a lane stands in the batch must not change what is drawn.
    """
    members: dict[str, list[int]] = {}
    for position in sorted(range(len(specs)), key=lambda i: specs[i].index):
        members.setdefault(specs[position].group_id, []).append(position)
    return members


def _seats_of(specs: list[LaneSpec], members: dict[str, list[int]]) -> tuple[list[list[int]], list[list[bool]]]:
    """Return [G, K] where the lane of each index stands, and whether it is there.

    Each at its own index, whoever else is there; places without a lane point at the group's first and are never live.
    """
    width = 1 + max(spec.index for spec in specs)
    seats = [[group[0]] * width for group in members.values()]
    live = [[False] * width for _ in members]
    for seat, taken, group in zip(seats, live, members.values(), strict=True):
        for position in group:
            index = specs[position].index
            seat[index], taken[index] = position, True
    return seats, live


class _Layout:
    """Index tensors and current state for one composition of the batch: L lanes in G groups of at most K."""

    def __init__(
        self,
        rows: list[int],
        specs: list[LaneSpec],
        slots: list[int],
        group_sizes: dict[str, int],
        device: torch.device,
    ) -> None:
        def tensor(values: list, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        self.rows, self.slots = tensor(rows), tensor(slots)
        self.lane_ids = [spec.lane_id for spec in specs]
        self.log_w: Tensor
        self.log_psi: Tensor
        self.log_p: Tensor
        self.position: Tensor
        self.identity = torch.arange(len(rows), device=device)
        seeds, lanes = tensor([spec.seed for spec in specs]), tensor([spec.index for spec in specs])
        self.token_keys = reference.lane_keys(seeds, reference.TOKEN_STREAM, lanes)
        self.scale = tensor([spec.scale for spec in specs], torch.float32)[:, None]
        self.scaled = any(spec.scale != 1.0 for spec in specs)
        top_k = [spec.top_k if spec.top_k > 0 else 2**31 - 1 for spec in specs]
        self.top_k = tensor(top_k, torch.int32) if any(spec.top_k > 0 for spec in specs) else None
        top_p = [spec.top_p for spec in specs]
        self.top_p = tensor(top_p, torch.float32) if min(top_p) < 1 else None

        self.groups = members = _members_of(specs)
        self.last = [specs[group[0]].last_position for group in members.values()]
        seats, live = _seats_of(specs, members)
        self.members, self.live = tensor(seats), tensor(live, torch.bool)
        firsts = [specs[group[0]] for group in members.values()]
        self.thresholds = [spec.ess_threshold for spec in firsts]
        self.schemes = tensor([spec.scheme for spec in firsts])
        group_seeds = tensor([spec.seed for spec in firsts])
        self.group_keys = reference.lane_keys(group_seeds, reference.RESAMPLE_STREAM, torch.zeros_like(group_seeds))
        conditions = conditions_of(specs)
        self.conditions = None if conditions is None else torch.from_numpy(conditions).to(device)
        #: Pinned lanes, and their continuations.
        self.pins = [(i, spec.pinned) for i, spec in enumerate(specs) if spec.pinned is not None]
        # Lane 0 of a group is its first member, unless it has ended.
        pinned = [spec.pinned is not None for spec in firsts]
        self.pinned = tensor(pinned, torch.bool) if any(pinned) else None
        base = [spec.base_proposal for spec in specs]
        self.base_proposal = tensor(base, torch.bool)[:, None] if any(base) else None
        self.complete = [len(group) == group_sizes[group_id] for group_id, group in members.items()]
        #: By group: the last token of all its lanes; None where some are ahead.
        self.common: list[int | None] = []
        #: Of the token about to be drawn, [L].
        self.keys: Tensor
        self._keys_ahead: Iterator[Tensor] = iter(())

    def enter(self, **state: Tensor) -> None:
        """Take over the lanes' state, [L] each."""
        for name, values in state.items():
            setattr(self, name, values)
        positions = self.position.tolist()
        for group in self.groups.values():
            here = {positions[i] for i in group}
            self.common.append(here.pop() if len(here) == 1 else None)

    def may_resample(self) -> list[bool]:
        """Return which groups may: those whose live lanes are all here, at the same token."""
        return [
            complete and at is not None and may_resample(at, last) and threshold > 0 and len(group) > 1
            for complete, at, last, threshold, group in zip(
                self.complete, self.common, self.last, self.thresholds, self.groups.values(), strict=True
            )
        ]

    def advance(self) -> None:
        """Go on to the next token."""
        self.position += 1
        keys = next(self._keys_ahead, None)
        if keys is None:
            # A dozen small operations, each of which costs more than its work: once for many tokens.
            positions = self.position + torch.arange(KEYS_AHEAD, device=self.position.device)[:, None]
            self._keys_ahead = iter(reference.at_position(self.token_keys, positions).unbind())
            keys = next(self._keys_ahead)
        self.keys = keys
        self.common = [None if position is None else position + 1 for position in self.common]


class _Drawn(NamedTuple):
    """What a step has drawn, [L].

    Attributes:
        token, log_p, log_psi: the tokens, with log p0 and log psi of each.
        log_w: the lanes' weights after them.
        lse0: normaliser of each lane's p0, whosever token it drew.
        ancestors: whose children drew; None where no group resampled.
        resampled: which groups did.
    """

    token: Tensor
    log_p: Tensor
    log_psi: Tensor
    log_w: Tensor
    lse0: Tensor
    ancestors: Tensor | None
    resampled: list[bool]


#: Names of the state tensors, of a table by slot and of a layout by lane.
_STATE = ("log_w", "log_psi", "log_p", "position")


class LaneTable:
    """SMC state of all lanes on the worker, one slot each, and the step that advances it.

    A lane keeps its slot, and so its weight, while it is out of the batch (kept back or preempted);
    ``release`` frees it. ``truncate`` applies top-k and top-p as the engine does; ``compile`` has the passes over
    the vocabulary compiled; ``logprobs_mode`` is the engine's.
    """

    def __init__(
        self,
        device: torch.device,
        truncate: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
        compile: bool = False,
        logprobs_mode: str = "processed_logprobs",
    ) -> None:
        self.device = device
        self.truncate = truncate
        self.logprobs_mode = logprobs_mode
        self.passes: Any = compiled if compile else reference
        self.slots: dict[str, int] = {}
        self.group_sizes: dict[str, int] = {}
        self._free: list[int] = []
        self._groups: dict[str, str] = {}
        self.log_w = torch.zeros(0, device=device, dtype=torch.float64)
        self.log_psi = torch.zeros(0, device=device)
        self.log_p = torch.zeros(0, device=device, dtype=torch.float64)
        #: Index of the last token drawn, from 1.
        self.position = torch.zeros(0, device=device, dtype=torch.int64)
        # While the batch stays as it is, the layout holds the lanes' state and the slots are stale.
        self._layout: tuple[list[int], list[LaneSpec], _Layout] | None = None
        self._drawn: Tensor | None = None

    def warm_up(self, vocab_size: int) -> None:
        """Compile what is compiled, so that no request has to wait for it."""
        if self.passes is compiled:
            compiled.warm_up(vocab_size, self.device)

    @torch.inference_mode()
    def add(self, spec: LaneSpec) -> None:
        """Give a lane a slot with fresh state; a lane that has one keeps it."""
        if spec.lane_id in self.slots:
            return
        self._write_back()
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self.slots[spec.lane_id] = slot
        self._groups[spec.lane_id] = spec.group_id
        self.group_sizes[spec.group_id] = self.group_sizes.get(spec.group_id, 0) + 1
        for name in _STATE:
            getattr(self, name)[slot] = 0

    @torch.inference_mode()
    def release(self, lane_ids: Iterable[str]) -> None:
        """Free the slots of lanes whose particles have ended; others are ignored."""
        for lane_id in lane_ids:
            slot = self.slots.pop(lane_id, None)
            if slot is None:
                continue
            self._write_back()
            self._free.append(slot)
            group_id = self._groups.pop(lane_id)
            self.group_sizes[group_id] -= 1
            if not self.group_sizes[group_id]:
                del self.group_sizes[group_id]

    def _grow(self) -> None:
        size = len(self.log_w)
        more = max(size, 64)
        for name in _STATE:
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, old.new_zeros(more)]))
        self._free.extend(range(size + more - 1, size - 1, -1))

    def _lay_out(self, rows: list[int], specs: list[LaneSpec]) -> _Layout:
        if self._layout is None or self._layout[0] != rows or self._layout[1] != specs:
            self._write_back()
            slots = [self.slots[spec.lane_id] for spec in specs]
            layout = _Layout(rows, specs, slots, self.group_sizes, self.device)
            layout.enter(**{name: getattr(self, name)[layout.slots] for name in _STATE})
            self._layout = rows, specs, layout
        return self._layout[2]

    def _write_back(self) -> None:
        """Write the layout's state to the slots, before either changes."""
        if self._layout is not None:
            layout = self._layout[2]
            for name in _STATE:
                getattr(self, name)[layout.slots] = getattr(layout, name)
            self._layout = None

    @torch.inference_mode()
    def conditions(self, rows: list[int], specs: list[LaneSpec]) -> Tensor | None:
        """Return the lanes' conditions [L, H], None if they have none."""
        return self._lay_out(rows, specs).conditions

    @torch.inference_mode()
    def step(
        self,
        logits: Tensor,
        rows: list[int],
        specs: list[LaneSpec],
        log_psi: Tensor,
        raw: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> TwistStep:
        """Weigh, resample, then sample one token for every lane in the batch.

            log_w += log Z^pi_t - log psi_{t-1}          (Zhao et al. 2024, Prop. 3.3)
            ancestors, log_w = resample(log_w)           if all live lanes are here, 1 < t < last
            s_t ~ softmax(logits[a] + log_psi[a])        a = the lane's ancestor; a pinned lane takes its own

        (with the base proposal  s_t ~ softmax(logits[a]), then log_w += log psi_t - log psi_{t-1}).
        With the twist-induced proposal the weight does not depend on the token drawn, so it is
        complete before the draw, and children of one parent draw different tokens.

        Args:
            logits: [N, V] float32, after temperature and every logits processor. Where there are other
                rows, those of the lanes are overwritten so that the engine's sampler can only pick the drawn
                token; else ``take_drawn`` has the tokens.
            rows: row of each lane, [L].
            specs: the lanes' settings, aligned with ``rows``.
            log_psi: log psi_t(prefix, .) of every next token, [L, V].
            raw: logits [W, V] as the model gave them, of the lanes that ask for logprobs, if the mode is a raw one.
            offsets: what has been taken off every row of ``logits``, [N]; None is nothing.

        Returns:
            what the scheduler has to mirror.
        """
        layout = self._lay_out(rows, specs)
        # Rows are sorted: if there are no others, they are the whole batch.
        base = logits if len(rows) == len(logits) else logits[layout.rows]
        top_k = None if layout.top_k is None else layout.top_k.clamp(max=base.shape[-1])
        base = self.truncate(base, top_k, layout.top_p)
        log_psi = log_psi.to(torch.float32)
        if layout.scaled:
            log_psi = log_psi * layout.scale

        layout.advance()
        drawn = self._weigh_and_draw(layout, base, log_psi)
        if layout.pins or layout.base_proposal is not None:
            drawn = self._pin_and_gain(layout, drawn, base, log_psi)
        ancestors, log_p = layout.identity, layout.log_p
        if drawn.ancestors is not None:
            ancestors, log_p = drawn.ancestors, log_p[drawn.ancestors]
        layout.log_w, layout.log_p = drawn.log_w, log_p + drawn.log_p
        layout.log_psi = reference.kept_log_psi(drawn.log_psi)

        flags = [False] * len(specs)
        for group, fired in zip(layout.groups.values(), drawn.resampled, strict=True):
            for i in group:
                flags[i] = fired
        taken_off = None if offsets is None else offsets[rows]
        logprobs = self._logprobs(specs, base, drawn.lse0, ancestors, drawn.token, raw, taken_off)
        self._drawn = drawn.token if len(rows) == len(logits) else None
        if self._drawn is None:
            logits[layout.rows] = float("-inf")
            logits[layout.rows, drawn.token] = 0.0
        return TwistStep(
            lane_ids=layout.lane_ids,
            ancestors=ancestors.tolist(),
            log_w=layout.log_w.tolist(),
            log_p=layout.log_p.tolist(),
            log_psi=layout.log_psi.tolist(),
            resampled=flags,
            logprobs=logprobs,
        )

    def _weigh_and_draw(self, layout: _Layout, base: Tensor, log_psi: Tensor) -> _Drawn:
        """Weigh, resample, then draw, but for what base proposals and pinned lanes have of their own.

        Args:
            base: logits of p0 [L, V].
            log_psi: of every next token [L, V].
        """
        may = layout.may_resample()
        if not any(may) and layout.base_proposal is None:
            lse0, log_w, token, log_p, token_log_psi = self.passes.weigh_and_sample(
                base, log_psi, layout.keys, layout.log_w, layout.log_psi
            )
            return _Drawn(token, log_p, token_log_psi, log_w, lse0, None, may)
        log_psi_q, due = log_psi, layout.log_psi
        if layout.base_proposal is not None:
            # The proposal sees nothing of the twist.
            log_psi_q = log_psi.masked_fill(layout.base_proposal, 0.0)
            due = due.masked_fill(layout.base_proposal[:, 0], 0.0)
        lse0, lse_psi = self.passes.twist_softmax(base, log_psi_q)
        log_w = layout.log_w + (lse_psi - lse0 - due)
        resampled, ancestors = self._resample(layout, log_w, may)
        token, log_p, token_log_psi = self.passes.twist_sample(base, log_psi_q, lse0, ancestors, layout.keys)
        return _Drawn(token, log_p, token_log_psi, log_w, lse0, ancestors, resampled)

    def _pin_and_gain(self, layout: _Layout, drawn: _Drawn, base: Tensor, log_psi: Tensor) -> _Drawn:
        """Put the pinned lanes' own tokens in the place of those drawn; weigh what was drawn from p0."""
        token, log_w = drawn.token, drawn.log_w
        ancestors = layout.identity if drawn.ancestors is None else drawn.ancestors
        if layout.pins:
            places = layout.position.tolist()
            for i, continuation in layout.pins:
                token[i] = continuation[min(places[i], len(continuation)) - 1]
        log_p, token_log_psi = base[ancestors, token] - drawn.lse0[ancestors], log_psi[ancestors, token]
        if layout.base_proposal is not None:
            log_w = log_w + reference.base_gain(layout.base_proposal[:, 0], token_log_psi, layout.log_psi[ancestors])
        return drawn._replace(token=token, log_p=log_p, log_psi=token_log_psi, log_w=log_w)

    def _resample(self, layout: _Layout, log_w: Tensor, may: list[bool]) -> tuple[list[bool], Tensor | None]:
        """Resample the groups that may and need to, their ``log_w`` [L] in place.

        Returns:
            which groups did, and each lane's ancestor [L], None where no group did.
        """
        # Decided on the host: the engine reads the step back anyway, and few numbers are involved.
        weights = log_w.tolist()
        resampled = [
            can and is_uneven(effective_sample_size([weights[i] for i in group]), threshold, len(group))
            for can, threshold, group in zip(may, layout.thresholds, layout.groups.values(), strict=True)
        ]
        if not any(resampled):
            return resampled, None
        # Where lanes are apart nothing is chosen, whatever the position.
        positions = torch.tensor([at or 0 for at in layout.common], device=self.device)
        chosen = torch.tensor(resampled, device=self.device)
        keys = reference.at_position(layout.group_keys, positions)
        members, live = layout.members, layout.live
        picked, new_log_w, _, _ = reference.resample(
            log_w[members],
            live,
            chosen,
            torch.ones_like(chosen, dtype=torch.float64),
            layout.schemes,
            reference.counter_uniforms(keys, members.shape[1]),
            layout.pinned,
        )
        ancestors = torch.empty_like(layout.slots)
        ancestors[members[live]] = members.gather(1, picked)[live]
        log_w[members[live]] = new_log_w[live]
        return resampled, ancestors

    def take_drawn(self) -> Tensor | None:
        """Return the tokens of the last step [L], once, if its lanes were the whole batch: nothing is left to draw."""
        drawn, self._drawn = self._drawn, None
        return drawn

    def _logprobs(
        self,
        specs: list[LaneSpec],
        base: Tensor,
        lse0: Tensor,
        ancestors: Tensor,
        token: Tensor,
        raw: Tensor | None,
        offsets: Tensor | None,
    ) -> dict[str, tuple[list[int], list[float], int]]:
        """Return (token ids, logprobs of the engine's mode, rank) of the drawn token and the top ones, if wanted."""
        wanted = {i: spec.num_logprobs for i, spec in enumerate(specs) if spec.num_logprobs is not None}
        if not wanted:
            return {}
        index = torch.tensor(list(wanted), device=self.device)
        parents, mode = ancestors[index], self.logprobs_mode
        if raw is not None:
            # Those of the wanted lanes alone, and so of their ancestors: a group wants them all or none.
            scores = raw[torch.searchsorted(index, parents)]
            scores = scores.log_softmax(-1) if mode == "raw_logprobs" else scores
        elif mode == "processed_logits":
            scores = base[parents] if offsets is None else base[parents] + offsets[parents, None]
        else:
            scores = base[parents] - lse0[parents, None]
        ids, values, ranks = (x.tolist() for x in lineage_logprobs(scores, token[index], max(wanted.values())))
        return {
            specs[i].lane_id: (ids[j][: count + 1], values[j][: count + 1], ranks[j])
            for j, (i, count) in enumerate(wanted.items())
        }
