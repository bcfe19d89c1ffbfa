"""Lanes under Model Runner V2: their state on the device, by request slot, and the step over it.

The step makes no call that waits for the device and has no loop over lanes: who is a lane, and in which
group, is kept in arrays on the host that change only when requests come and go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_twist.engine.logit_rows import COLD, centre, lineage_logprobs
from vllm_twist.engine.wire import LaneSpec, conditions_of
from vllm_twist.kernels import ops, reference

NO_LOGPROBS = -1


@dataclass(frozen=True)
class LaneRows:
    """The L lanes among the rows of a batch.

    Attributes:
        rows: their rows, int64 [L]; None where they are the whole batch.
        rows_np: the same on the host, always.
        slots: their request slots, int64 [L].
        slots_np: the same on the host.
    """

    rows: Tensor | None
    rows_np: np.ndarray
    slots: Tensor
    slots_np: np.ndarray


@dataclass(frozen=True)
class Pins:
    """What pinned lanes are pinned to, one continuation after the other.

    Attributes:
        tokens: int32, as many as all of them have.
        starts: where each slot's begins, int64 [slots].
        lengths: how many it has, int64 [slots]; 0 in other slots.
    """

    tokens: Tensor
    starts: Tensor
    lengths: Tensor


@dataclass(frozen=True)
class Drawn:
    """What one step gave, all on the device.

    Attributes:
        token: int64 [L].
        ancestors: int64 [L], indices into the lanes.
        report: float64 [len(REPORT), L] (``ops.settle``).
        wanted: which lanes asked for logprobs (on the host), and ids, values and ranks for them.
    """

    token: Tensor
    ancestors: Tensor
    report: Tensor
    wanted: np.ndarray
    logprobs: tuple[Tensor, Tensor, Tensor] | None


class SlotTable:
    """SMC state of all lanes in preallocated tensors, one row per request slot of the runner.

    ``add`` and ``remove`` note on the host what has changed, ``flush`` sends it to the device.
    """

    def __init__(
        self,
        num_slots: int,
        device: torch.device,
        backend: str = "auto",
        logprobs_mode: str = "processed_logprobs",
    ) -> None:
        def zeros(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.zeros(num_slots, *shape, dtype=dtype, device=device)

        self.device, self.backend, self.num_slots = device, backend, num_slots
        self.logprobs_mode = logprobs_mode
        #: The batch's logits as the model gave them, during its step: what logprobs of a raw mode are of.
        self.raw: Tensor | None = None
        self.lanes = reference.Lanes(
            log_w=zeros(torch.float64),
            log_p=zeros(torch.float64),
            log_psi=zeros(torch.float32),
            position=zeros(torch.int32),
            last=zeros(torch.int32),
            ended=zeros(torch.bool),
            keys=zeros(torch.int64),
            stops=zeros(torch.int32, 1),
        )
        self.inverse_temperature, self.scale = zeros(torch.float32), zeros(torch.float32)
        self.base_proposal = zeros(torch.bool)
        #: What has been taken off the logits of lanes of low temperature, after it.
        self.offsets = zeros(torch.float32)
        #: None while no lane is pinned.
        self.pins: Pins | None = None
        #: What a conditional head reads beside the prefix, float32 [slots, H]; None before the first such lane.
        self.conditions: Tensor | None = None
        self.row_of = zeros(torch.int32)
        self.order = torch.arange(num_slots, dtype=torch.int32, device=device)
        self.groups: reference.Groups | None = None
        #: By row of a group; see ``_group_rows``.
        self.totals = reference.Totals(
            log_w_ended=zeros(torch.float64).fill_(-math.inf),
            log_z=zeros(torch.float64),
            num_resamplings=zeros(torch.int32),
        )
        #: Whether any group may ever resample.
        self.forks = False

        self._set_up_host(num_slots)

    def _set_up_host(self, num_slots: int) -> None:
        """Make what is kept on the host: slots by lane id, groups (rows of the arrays below) by group id."""
        self.slots: dict[str, int] = {}
        self.is_lane = np.zeros(num_slots, dtype=bool)
        #: Which requests compute a condition.
        self.is_condition = np.zeros(num_slots, dtype=bool)
        self._seat: dict[str, tuple[str, int]] = {}
        self._group_rows: dict[str, int] = {}
        self._free_rows = list(range(num_slots - 1, -1, -1))
        self._members = np.full((num_slots, num_slots), -1, dtype=np.int32)
        self._present = np.zeros(num_slots, dtype=np.int64)
        self._width = np.zeros(num_slots, dtype=np.int64)
        self._sizes = np.zeros(num_slots, dtype=np.int32)
        self._particles = np.zeros(num_slots, dtype=np.int32)
        self._thresholds = np.zeros(num_slots, dtype=np.float64)
        self._schemes = np.zeros(num_slots, dtype=np.int64)
        self._seeds = np.zeros(num_slots, dtype=np.int64)
        self._scaled = np.zeros(num_slots, dtype=bool)
        self._tempered = np.zeros(num_slots, dtype=bool)
        self._from_base = np.zeros(num_slots, dtype=bool)
        self._is_pinned = np.zeros(num_slots, dtype=bool)
        self._has_pinned = np.zeros(num_slots, dtype=bool)
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._num_logprobs = np.full(num_slots, NO_LOGPROBS, dtype=np.int64)
        #: Continuations of the pinned lanes by slot, on the device, int32; whether ``pins`` has yet to follow.
        self._continuations: dict[int, Tensor] = {}
        self._repin = False
        self._staged: dict[int, tuple[LaneSpec, list[int]]] = {}
        #: Groups that began or came back, and slots of lanes that are gone since the last flush.
        self._entered: dict[int, LaneSpec] = {}
        self._gone: dict[int, list[tuple[int, bool]]] = {}
        self._changed = False

    # ---- coming and going -----------------------------------------------------------------

    def add(self, slot: int, spec: LaneSpec, stops: Iterable[int]) -> None:
        """Seat a lane in a slot, with the state that its spec carries."""
        self.remove([spec.lane_id])
        row = self._group_rows.get(spec.group_id)
        if row is None:
            row = self._group_rows[spec.group_id] = self._free_rows.pop()
            self._members[row] = -1
            self._present[row] = self._width[row] = self._has_pinned[row] = 0
            self._thresholds[row], self._schemes[row], self._seeds[row] = spec.ess_threshold, spec.scheme, spec.seed
            self._particles[row] = spec.particles
            self._entered[row] = spec
        self._members[row, spec.index] = slot
        self._present[row] += 1
        self._width[row] = max(self._width[row], spec.index + 1)
        self._sizes[row] = spec.group_size
        self.slots[spec.lane_id] = slot
        self._seat[spec.lane_id] = spec.group_id, spec.index
        self.is_lane[slot] = True
        self._scaled[slot], self._tempered[slot] = spec.scale != 1.0, spec.inverse_temperature != 1.0
        self._from_base[slot], self._is_pinned[slot] = spec.base_proposal, spec.pinned is not None
        self._has_pinned[row] |= self._is_pinned[slot]
        if spec.pinned is not None:
            self._continuations[slot] = self._upload(spec.pinned, torch.int32)
            self._repin = True
        self._temperature[slot] = spec.temperature
        self._num_logprobs[slot] = NO_LOGPROBS if spec.num_logprobs is None else spec.num_logprobs
        self._staged[slot] = spec, sorted(set(stops))
        self._changed = True

    def remove(self, lane_ids: Iterable[str], ended: bool = False) -> None:
        """Forget lanes whose requests have left the runner; others are ignored.

        ``ended`` says that the scheduler has ended them: a stop string is not seen on the device.
        """
        for lane_id in lane_ids:
            slot = self.slots.pop(lane_id, None)
            if slot is None:
                continue
            group_id, index = self._seat.pop(lane_id)
            row = self._group_rows[group_id]
            self._members[row, index] = -1
            self._present[row] -= 1
            self._sizes[row] -= 1
            self._gone.setdefault(row, []).append((slot, ended))
            if not self._present[row]:
                del self._group_rows[group_id], self._gone[row]
                self._entered.pop(row, None)
                self._free_rows.append(row)
            self.is_lane[slot] = False
            self._repin |= self._continuations.pop(slot, None) is not None
            self._staged.pop(slot, None)
            self._changed = True

    def flush(self) -> None:
        """Send what has changed to the device."""
        if self._gone:
            self._keep_weights_of_ended()
        if self._entered:
            self._write_totals()
        if self._staged:
            self._write_lanes()
        if self._repin:
            self._write_pins()
        if self._changed:
            self._lay_out()

    def _upload(self, values: Any, dtype: torch.dtype) -> Tensor:
        return async_tensor_h2d(np.asarray(values), self.device, dtype)

    def _keep_weights_of_ended(self) -> None:
        """Keep the weights of particles that have ended, whose slots others may take now."""
        most = max(map(len, self._gone.values()))
        gone = [seats + [(-1, False)] * (most - len(seats)) for seats in self._gone.values()]
        slots = self._upload([[slot for slot, _ in seats] for seats in gone], torch.int64)
        ended = self._upload([[by_host for _, by_host in seats] for seats in gone], torch.bool)
        rows = self._upload(list(self._gone), torch.int64)
        at = slots.clamp(min=0)
        ended = (slots >= 0) & (ended | self.lanes.ended[at])
        weights = torch.where(ended, self.lanes.log_w[at], float("-inf"))
        before = self.totals.log_w_ended[rows, None]
        self.totals.log_w_ended.index_copy_(0, rows, torch.logsumexp(torch.cat([before, weights], 1), -1))
        self._gone.clear()

    def _write_totals(self) -> None:
        rows = self._upload(list(self._entered), torch.int64)
        for name in ("log_w_ended", "num_resamplings"):
            target = getattr(self.totals, name)
            values = [getattr(spec, name) for spec in self._entered.values()]
            target.index_copy_(0, rows, self._upload(values, target.dtype))
        self._entered.clear()

    def _write_lanes(self) -> None:
        specs = [spec for spec, _ in self._staged.values()]
        most = max(len(stops) for _, stops in self._staged.values())
        width = self.lanes.stops.shape[1]
        if most > width:
            more = 1 << (most - 1).bit_length()
            grown = torch.nn.functional.pad(self.lanes.stops, (0, more - width), value=-1)
            self.lanes, width = self.lanes._replace(stops=grown), more
        stops = [tokens + [-1] * (width - len(tokens)) for _, tokens in self._staged.values()]
        seeds, lanes = (torch.tensor([getattr(spec, name) for spec in specs]) for name in ("seed", "index"))
        keys = reference.lane_keys(seeds, reference.TOKEN_STREAM, lanes)
        slots = self._upload(list(self._staged), torch.int64)

        def write(target: Tensor, values: Any) -> None:
            target.index_copy_(0, slots, self._upload(values, target.dtype))

        for name in ("log_w", "log_p", "log_psi", "position"):
            write(getattr(self.lanes, name), [getattr(spec, name) for spec in specs])
        write(self.lanes.last, [spec.last_position for spec in specs])
        write(self.lanes.ended, [False] * len(specs))
        write(self.offsets, [0.0] * len(specs))
        write(self.lanes.keys, keys.numpy())
        write(self.lanes.stops, stops)
        write(self.scale, [spec.scale for spec in specs])
        write(self.base_proposal, [spec.base_proposal for spec in specs])
        write(self.inverse_temperature, [spec.inverse_temperature for spec in specs])
        conditions = conditions_of(specs)
        if conditions is not None:
            if self.conditions is None:
                self.conditions = torch.zeros(self.num_slots, conditions.shape[1], device=self.device)
            write(self.conditions, conditions)
        self._staged.clear()

    def _write_pins(self) -> None:
        self._repin = False
        slots, tokens = list(self._continuations), list(self._continuations.values())
        if not slots:
            self.pins = None
            return
        starts, lengths = np.zeros((2, self.num_slots), dtype=np.int64)
        lengths[slots] = [len(continuation) for continuation in tokens]
        starts[slots] = np.cumsum(lengths[slots]) - lengths[slots]
        self.pins = Pins(torch.cat(tokens), self._upload(starts, torch.int64), self._upload(lengths, torch.int64))

    def _lay_out(self) -> None:
        self._changed = False
        rows = np.fromiter(self._group_rows.values(), dtype=np.int64, count=len(self._group_rows))
        if not len(rows):
            self.groups, self.forks = None, False
            return
        width = int(self._width[rows].max())
        seeds = torch.from_numpy(self._seeds[rows])
        keys = reference.lane_keys(seeds, reference.RESAMPLE_STREAM, torch.zeros_like(seeds))
        self.groups = reference.Groups(
            members=self._upload(self._members[rows, :width], torch.int32),
            sizes=self._upload(self._sizes[rows], torch.int32),
            thresholds=self._upload(self._thresholds[rows], torch.float64),
            schemes=self._upload(self._schemes[rows], torch.int64),
            keys=self._upload(keys.numpy(), torch.int64),
            particles=self._upload(self._particles[rows], torch.int32),
            rows=self._upload(rows, torch.int32),
            pinned=self._upload(self._has_pinned[rows], torch.bool),
        )
        self.forks = bool(((self._thresholds[rows] > 0) & (self._width[rows] > 1)).any())

    # ---- the step -------------------------------------------------------------------------

    def find(self, idx_mapping: Tensor, idx_mapping_np: np.ndarray, partial: np.ndarray) -> LaneRows | None:
        """Return the lanes of a batch, given each row's slot, [N], and whether its prefill goes on."""
        chosen = self.is_lane[idx_mapping_np] & ~partial
        if not chosen.any():
            return None
        rows_np = np.flatnonzero(chosen)
        if len(rows_np) == len(chosen):
            return LaneRows(None, rows_np, idx_mapping, idx_mapping_np)
        rows = self._upload(rows_np, torch.int64)
        return LaneRows(rows, rows_np, idx_mapping[rows], idx_mapping_np[rows_np])

    def find_conditions(self, idx_mapping_np: np.ndarray, partial: np.ndarray) -> np.ndarray:
        """Return the rows of a batch whose last hidden states are conditions, on the host; see ``find``."""
        return np.flatnonzero(self.is_condition[idx_mapping_np] & ~partial)

    def conditions_of(self, found: LaneRows) -> Tensor | None:
        """Return what a conditional head reads beside the lanes' hidden states, [L, H]."""
        return None if self.conditions is None else self.conditions[found.slots]

    @torch.inference_mode()
    def centre_cold(self, logits: Tensor, slots_np: np.ndarray) -> None:
        """Take its maximum off each row of a lane of low temperature, given the slots of all rows."""
        rows_np = np.flatnonzero(self.is_lane[slots_np] & (self._temperature[slots_np] < COLD))
        if not len(rows_np):
            return
        slots_np = slots_np[rows_np]
        peak = centre(logits, self._upload(rows_np, torch.int64))[:, 0]
        temperature = self._upload(self._temperature[slots_np], torch.float32)
        self.offsets.index_copy_(0, self._upload(slots_np, torch.int64), peak.float() / temperature)

    @torch.inference_mode()
    def step(self, logits: Tensor, found: LaneRows, log_psi: Tensor | reference.LowRank) -> Drawn:
        """Weigh, resample, then sample one token for every lane in the batch (Zhao et al. 2024, Prop. 3.3).

        Args:
            logits: [N, V] of the whole batch, as p0 is drawn from but for the lanes' own temperatures.
            found: the lanes in it.
            log_psi: log psi of every next token, [L, V] or in factors.
        """
        rows, slots, where = found.rows, found.slots, found.slots_np
        beta = self.inverse_temperature[slots] if self._tempered[where].any() else None
        scale = self.scale[slots] if self._scaled[where].any() else None
        on = {"backend": self.backend}
        base = self.base_proposal[slots] if self._from_base[where].any() else None
        # The proposal's: a scale of zero is no twist.
        scale_q = scale if base is None else torch.where(base, 0.0, 1.0 if scale is None else scale)
        lse0, lse_psi = ops.twist_softmax(logits, log_psi, beta, scale_q, rows, **on)
        if base is not None:
            before = self.lanes.log_psi[slots]
            # The weight of the last token was complete when it was drawn: nothing is due.
            lse_psi = torch.where(base, lse0 + before, lse_psi)
        self.row_of.fill_(-1)
        self.row_of.index_copy_(0, slots, self.order[: len(where)])
        assert self.groups is not None, "a batch with lanes before flush()"
        moved = ops.advance(self.lanes, self.groups, self.row_of, lse0, lse_psi, **on)
        ancestors = moved.ancestors
        token, log_p, token_log_psi = ops.twist_sample(
            logits, log_psi, lse0, ancestors, moved.keys, beta, scale_q, rows, **on
        )
        pinned = self._is_pinned[where].any()
        if pinned:
            assert self.pins is not None, "a batch with pinned lanes before flush()"
            at = self.lanes.position[slots].long() - 1
            # Past the end of its own, if it has one, a lane reads something else, which is not taken.
            index = (self.pins.starts[slots] + at).clamp(max=len(self.pins.tokens) - 1)
            token = torch.where(at < self.pins.lengths[slots], self.pins.tokens[index].long(), token)
        if pinned or base is not None:
            log_p, token_log_psi = self._values_of(token, logits, log_psi, lse0, ancestors, beta, scale, rows)
        gain = None
        if base is not None:
            gain = reference.base_gain(base, token_log_psi, before[ancestors])
        report = ops.settle(
            self.lanes, self.groups, self.totals, self.row_of, moved, token, log_p, token_log_psi, gain, **on
        )
        wanted, logprobs = self._logprobs(logits, found, token, ancestors, lse0, beta)
        return Drawn(token, ancestors, report, wanted, logprobs)

    def _logprobs(
        self, logits: Tensor, found: LaneRows, token: Tensor, ancestors: Tensor, lse0: Tensor, beta: Tensor | None
    ) -> tuple[np.ndarray, tuple[Tensor, Tensor, Tensor] | None]:
        """Return which lanes want logprobs (on the host), and ids, values of the engine's mode and ranks for them."""
        rows, slots = found.rows, found.slots
        counts = self._num_logprobs[found.slots_np]
        wanted = np.flatnonzero(counts != NO_LOGPROBS)
        if not len(wanted):
            return wanted, None
        index = self._upload(wanted, torch.int64)
        parents, mode = ancestors[index], self.logprobs_mode
        given = self.raw if mode.startswith("raw") and self.raw is not None else logits
        scores = given[parents if rows is None else rows[parents]].float()
        if mode.startswith("processed") and beta is not None:
            scores = scores * beta[parents, None]
        if mode == "processed_logits":
            scores = scores + self.offsets[slots[parents], None]
        # Ranks are those of the logits, as vLLM has them.
        ids, values, ranks = lineage_logprobs(scores, token[index], int(counts.max()))
        if mode == "processed_logprobs":
            values = values - lse0[parents, None]
        elif mode == "raw_logprobs":
            values = values - scores.logsumexp(-1, keepdim=True)
        return wanted, (ids, values, ranks)

    @staticmethod
    def _values_of(
        token: Tensor,
        logits: Tensor,
        log_psi: Tensor | reference.LowRank,
        lse0: Tensor,
        ancestors: Tensor,
        beta: Tensor | None,
        scale: Tensor | None,
        rows: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return log p0 and log psi of given tokens, as ``ops.twist_sample`` does of those it draws."""
        log_p = logits[ancestors if rows is None else rows[ancestors], token].float()
        if beta is not None:
            log_p = log_p * beta[ancestors]
        if isinstance(log_psi, reference.LowRank):
            value = log_psi.at(ancestors, token)
        else:
            value = log_psi[ancestors, token].float()
        if scale is not None:
            value = torch.where(scale[ancestors] == 0, 0.0, value * scale[ancestors])
        return log_p - lse0[ancestors], value

    def num_logprobs(self, found: LaneRows) -> np.ndarray:
        """Return how many logprobs each lane wants, [L]; ``NO_LOGPROBS`` for none at all."""
        return self._num_logprobs[found.slots_np]
