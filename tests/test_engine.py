"""The engine's bookkeeping: forks, lineage, lockstep with other requests, and every block returned."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from support.engines import EVERY_STEP, assert_rescored, generate, params, prompt_of, scheduler_of, worker_of
from support.laws import enumerate_law, penalised, truncated
from support.models import Tiny
from support.runners import fewer

from vllm_twist import results
from vllm_twist.engine.v1 import state as lanes


@pytest.mark.v2("caching-31")
@pytest.mark.parametrize("length", [1, 31, 32, 33, 40, 64, 65])
@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
def test_forks_at_every_step_across_blocks(clean, wide: Tiny, length: int, caching: bool):
    """110 tokens cross three or more block boundaries with a resampling at each token.

    A block table, partial block or token history that went to the wrong lane changes p0 along
    the particle's path, which a teacher-forced pass shows.
    """
    llm = clean(wide, enable_prefix_caching=caching)
    (output,) = generate(
        llm, [prompt_of(length)], params(max_tokens=110, ignore_eos=True, seed=5, twist_particles=8, **EVERY_STEP)
    )
    group = results(output)[0]
    assert group.num_resamplings == 108
    assert len({tuple(p.token_ids) for p in group.particles}) > 1
    assert_rescored(wide, output)


def test_rescoring_sees_a_wrong_fork(engine, wide: Tiny, monkeypatch):
    """The check above fails when partial blocks are not copied."""
    monkeypatch.setattr("vllm_twist.engine.v1.fork.copy_kv_cache_blocks_inplace", lambda *args: None)
    (output,) = generate(
        engine(wide), [prompt_of(40)], params(max_tokens=40, ignore_eos=True, seed=5, twist_particles=8, **EVERY_STEP)
    )
    with pytest.raises(AssertionError):
        assert_rescored(wide, output)


def test_particles_end_on_their_own(clean, wide: Tiny):
    """EOS, a stop token and max_tokens end particles one by one; the others go on resampling."""
    (output,) = generate(
        clean(wide),
        [prompt_of(20)],
        params(max_tokens=60, seed=2, stop_token_ids=[7], twist_particles=32, **EVERY_STEP),
    )
    group = results(output)[0]
    for particle in group.particles:
        ended = particle.token_ids[-1] in (1, 7)
        assert particle.finished == ended
        assert ended or len(particle.token_ids) == 60
        assert not {1, 7} & set(particle.token_ids[:-1])
    assert len({len(p.token_ids) for p in group.particles}) > 3
    assert_rescored(wide, output)


def test_ended_particles_free_their_kv_at_once(clean, wide: Tiny):
    """While others go on, an ended particle holds no block and costs no forward pass."""
    llm = clean(wide)
    core, scheduler = llm.llm_engine, scheduler_of(llm)
    core.add_request("leaving", {"prompt_token_ids": prompt_of(40)}, params(max_tokens=60, seed=2, twist_particles=32))
    live = []
    while core.has_unfinished_requests():
        outputs = core.step()
        for group in filter(lambda group: group.forked, scheduler.groups.values()):
            lanes = [lane for lane in group.lanes.values() if lane.live]
            assert {lane.request.request_id for lane in lanes} == set(scheduler.requests)
            assert set(scheduler.blocks.tables.req_to_blocks) <= set(scheduler.requests)
            live.append(len(lanes))
    assert outputs[0].finished
    assert live == sorted(live, reverse=True)
    assert len(set(live)) > 5


@pytest.mark.v2
def test_result_is_consistent(clean, wide: Tiny):
    """Weights sum to one, ESS is theirs, and the completion is the chosen particle."""
    (output,) = generate(clean(wide), [prompt_of(9)], params(seed=3, twist_particles=16, twist_return_particles=1))
    group = results(output)[0]
    weights = [math.exp(p.log_weight) for p in group.particles]
    assert sum(weights) == pytest.approx(1)
    assert group.ess == pytest.approx(1 / sum(w * w for w in weights))
    assert len(group.particles) == 16
    chosen = group.particles[group.chosen]
    assert output.outputs[0].token_ids == chosen.token_ids
    assert output.outputs[0].finish_reason == ("stop" if chosen.finished else "length")
    (bare,) = generate(clean(wide), [prompt_of(9)], params(seed=3, twist_particles=16))
    assert results(bare)[0] == dataclasses.replace(group, particles=None)


def test_seed_reproduces_whatever_else_runs(clean, wide: Tiny):
    """A seeded group is the same alone and among others."""
    llm = clean(wide)
    seeded = params(max_tokens=40, seed=11, twist_particles=8, **EVERY_STEP)
    (alone,) = generate(llm, [prompt_of(12)], seeded)
    crowd = [params(max_tokens=20 + i, temperature=0.9, twist_particles=3 + i) for i in range(5)]
    crowd.append(params(max_tokens=30, temperature=0.0, twist=0))
    among = generate(llm, [prompt_of(30 + i) for i in range(6)] + [prompt_of(12)], [*crowd, seeded])[-1]
    assert [p.token_ids for p in results(alone)[0].particles] == [p.token_ids for p in results(among)[0].particles]
    assert results(alone)[0].log_z == pytest.approx(results(among)[0].log_z, abs=1e-4)
    (other,) = generate(llm, [prompt_of(12)], params(max_tokens=40, seed=12, twist_particles=8, **EVERY_STEP))
    assert results(other)[0].log_z != results(alone)[0].log_z


def test_unseeded_requests_differ(clean, wide: Tiny):
    outputs = generate(clean(wide), [prompt_of(12)] * 8, params(max_tokens=20, twist_particles=2))
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > 1


def test_n_is_independent_groups(clean, wide: Tiny):
    """n=3 gives three groups, each with its own result, in the order of the choices."""
    (output,) = generate(
        clean(wide), [prompt_of(12)], params(n=3, max_tokens=20, seed=4, twist_particles=4, twist_return_particles=1)
    )
    groups = results(output)
    assert len(output.outputs) == len(groups) == 3
    assert len({group.log_z for group in groups}) == 3
    for completion, group in zip(output.outputs, groups, strict=True):
        assert completion.token_ids == group.particles[group.chosen].token_ids


LOGPROBS_MODES = ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"]


def with_logprobs(make: Any, tiny: Tiny, mode: str) -> Any:
    """Return an engine with this ``logprobs_mode``; the usual one has vLLM's default."""
    return make(tiny) if mode == LOGPROBS_MODES[0] else make(tiny, logprobs_mode=mode)


@pytest.mark.parametrize("mode", LOGPROBS_MODES)
def test_logprobs_follow_the_lineage(clean, wide: Tiny, mode: str):
    """logprobs=k are the model's or p0's (here at temperature 0.8), along the drawn particle's own history."""
    (output,) = generate(
        with_logprobs(clean, wide, mode),
        [prompt_of(20)],
        params(max_tokens=50, ignore_eos=True, temperature=0.8, logprobs=3, seed=8, twist_particles=8, **EVERY_STEP),
    )
    completion, prompt = output.outputs[0], output.prompt_token_ids
    assert len(completion.logprobs) == 50
    with torch.no_grad():
        logits = wide.model(torch.tensor([prompt + completion.token_ids])).logits[0]
    expected = logits[len(prompt) - 1 : -1] / (0.8 if mode.startswith("processed") else 1.0)
    p0 = (logits[len(prompt) - 1 : -1] / 0.8).log_softmax(-1)
    if mode.endswith("logprobs"):
        expected = expected.log_softmax(-1)
    for row, (token, entry) in enumerate(zip(completion.token_ids, completion.logprobs, strict=True)):
        best = expected[row].topk(3).indices.tolist()
        assert set(entry) == {token, *best}
        for candidate, value in entry.items():
            assert value.logprob == pytest.approx(expected[row, candidate].item(), abs=2e-4)
        assert entry[token].rank == (expected[row] > expected[row, token] + 1e-6).sum() + 1
    group = results(output)[0]
    log_prob = group.particles[group.chosen].log_prob
    assert log_prob == pytest.approx(p0.gather(1, torch.tensor(completion.token_ids)[:, None]).sum().item(), abs=1e-3)
    if mode == "processed_logprobs":
        total = sum(entry[t].logprob for t, entry in zip(completion.token_ids, completion.logprobs, strict=True))
        assert total == pytest.approx(log_prob, abs=1e-3)


@pytest.mark.v2("options1-raw_logprobs", "options1-processed_logits")
@pytest.mark.parametrize("mode", LOGPROBS_MODES)
@pytest.mark.parametrize(
    "options", [{"temperature": 0.7}, {"temperature": 0.1, "frequency_penalty": 0.5, "top_k": 9, "logit_bias": {5: 2}}]
)
def test_logprobs_are_those_of_a_plain_request(clean, wide: Tiny, mode: str, options: dict[str, Any]):
    """A particle held to a plain request's tokens has its logprobs, ranks and all, in every mode."""
    llm = with_logprobs(clean, wide, mode)
    common = {"max_tokens": 6, "ignore_eos": True, "logprobs": 12, "seed": 1, **options}
    (plain,) = generate(llm, [prompt_of(9)], params(twist=0, **common))
    held = {"twist_pinned": list(plain.outputs[0].token_ids), "twist_particles": 1}
    # Beside a plain one, and alone.
    for others in ([], [params(twist=0, **common)]):
        output = generate(llm, [prompt_of(9)] * (1 + len(others)), [params(**common, **held), *others])[0]
        for mine, theirs in zip(output.outputs[0].logprobs, plain.outputs[0].logprobs, strict=True):
            # Which of the forbidden tokens come last among the likely ones is anybody's guess.
            ranked = [{t: x for t, x in entry.items() if x.logprob > -math.inf} for entry in (mine, theirs)]
            assert ranked[0].keys() == ranked[1].keys()
            for token, value in ranked[0].items():
                assert value.logprob == pytest.approx(theirs[token].logprob, abs=2e-4)
                assert value.rank == theirs[token].rank


@pytest.mark.v2
def test_top_k_of_some(clean, wide: Tiny):
    """Groups with top_k, without, and with one beyond the vocabulary share a batch; each is what it is alone."""
    llm = clean(wide)
    requests = [
        params(max_tokens=6, ignore_eos=True, seed=i, twist_particles=3, **options, **EVERY_STEP)
        for i, options in enumerate([{"top_k": 5}, {}, {"top_k": wide.vocab + 60}, {"top_k": -1, "top_p": 0.7}])
    ]
    prompts = [prompt_of(9)] * len(requests)
    together = generate(llm, prompts, requests)
    for request, output in zip(requests, together, strict=True):
        (alone,) = generate(llm, [prompt_of(9)], request)
        assert [p.token_ids for p in results(output)[0].particles] == [p.token_ids for p in results(alone)[0].particles]
    assert results(together[1])[0].particles != results(together[0])[0].particles


def test_more_logprobs_than_tokens(clean, small: Tiny):
    """All there are come back."""
    request = params(max_tokens=3, ignore_eos=True, logprobs=small.vocab + 3, twist_particles=2)
    (output,) = generate(clean(small), [[0, 2]], request)
    assert [set(entry) for entry in output.outputs[0].logprobs] == [set(range(small.vocab))] * 3


@pytest.mark.v2
@pytest.mark.parametrize("temperature", [0.01, 0.03, 0.2])
@pytest.mark.parametrize("options", [{}, {"top_p": 0.99}, {"repetition_penalty": 1.3}], ids=str)
def test_low_temperatures_keep_the_weights(
    engine, wide: Tiny, monkeypatch, temperature: float, options: dict[str, Any]
):
    """With logits up to 40, of thousands after the temperature, log weights are right to 1e-4 nats a step.

    Against float64, from the logits that the temperature divides.
    """
    llm = engine(wide)
    readout, seen = worker_of(llm).readout, []
    compute, head = readout.compute_logits, readout.head

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        logits = compute(hidden)
        # A handful of tokens within a few temperatures of the best.
        logits = 40 - logits.argsort(-1).argsort(-1) * temperature * 0.37 - logits.sigmoid() * temperature
        seen.append([logits[-1:].clone(), None])
        return logits

    def log_psi_of(hidden: torch.Tensor, **given: Any) -> torch.Tensor:
        seen[-1][1] = head(hidden, **given)
        return seen[-1][1]

    log_psi_of.config = head.config  # type: ignore[attr-defined]
    monkeypatch.setattr(readout, "compute_logits", logits_of)
    monkeypatch.setattr(readout, "head", log_psi_of)
    n = 6
    options = {"ignore_eos": True, "seed": 1, "twist_particles": 1, "twist_trace": 1, **EVERY_STEP, **options}
    (output,) = generate(llm, [prompt_of(5)], params(max_tokens=n, temperature=temperature, **options))
    (particle,) = results(output)[0].particles
    steps = [(logits, log_psi.double()) for logits, log_psi in seen if log_psi is not None]
    assert len(steps) == n
    before, log_w, history = 0.0, 0.0, ()
    for (logits, log_psi), token, step in zip(steps, particle.token_ids, results(output)[0].trace, strict=True):
        penalty = options.get("repetition_penalty", 1.0)
        logits = penalised(logits[0], prompt_of(5), history, penalty, 0.0, 0.0)[None]
        log_p = truncated(logits, temperature=temperature, top_p=options.get("top_p", 1.0))
        gain = (log_p + log_psi).logsumexp(-1).item() - before
        assert step.log_w[0] - log_w == pytest.approx(gain, abs=1e-4)
        before, log_w, history = log_psi[0, token].item(), step.log_w[0], (*history, token)


def test_plain_requests_among_twisted_ones(clean, wide: Tiny):
    """twist=0 requests are what a plain engine gives, alone bit for bit, and among groups by token."""
    common = {"max_tokens": 30, "logprobs": 5}
    plain = [params(temperature=0.0, **common), params(seed=1, **common)]
    prompts = [prompt_of(9), prompt_of(17)]
    reference = generate(clean(wide, twist=False), prompts, plain)
    off = [params(temperature=0.0, twist=0, **common), params(seed=1, twist=0, **common)]
    llm = clean(wide)
    for expected, got in zip(reference, generate(llm, prompts, off), strict=True):
        assert got.outputs[0].token_ids == expected.outputs[0].token_ids
        assert got.outputs[0].logprobs == expected.outputs[0].logprobs
        assert got.kv_transfer_params is None
        with pytest.raises(ValueError, match="carries no twist result"):
            results(got)
    mixed = generate(llm, prompts + [prompt_of(40)], [*off, params(max_tokens=30, twist_particles=16, **EVERY_STEP)])
    for expected, got in zip(reference, mixed[:2], strict=True):
        assert got.outputs[0].token_ids == expected.outputs[0].token_ids
    assert_rescored(wide, mixed[2])


@pytest.mark.v2
def test_prompt_logprobs_among_twisted_requests(clean, wide: Tiny):
    """vLLM reads a prompt's hidden states out after the step's own: fewer rows than lanes, none of them one."""
    core, prompt, outputs = clean(wide).llm_engine, prompt_of(4), {}
    options = {"ignore_eos": True, "seed": 1, "twist_particles": 16, **EVERY_STEP}
    core.add_request("twisted", {"prompt_token_ids": prompt_of(9)}, params(max_tokens=12, **options))
    for _ in range(5):
        core.step()
    core.add_request("plain", {"prompt_token_ids": prompt}, params(max_tokens=3, seed=2, twist=0, prompt_logprobs=2))
    while core.has_unfinished_requests():
        outputs.update({output.request_id: output for output in core.step() if output.finished})
    core.step()
    assert_rescored(wide, outputs["twisted"])
    expected = wide.log_p([prompt])[0]
    for row, (token, entry) in enumerate(zip(prompt[1:], outputs["plain"].prompt_logprobs[1:], strict=True)):
        assert entry[token].logprob == pytest.approx(expected[row, token].item(), abs=2e-4)


def test_plain_rows_are_never_written(engine, wide: Tiny, monkeypatch):
    """In a mixed batch the logits rows of plain requests leave the processor bit for bit as they came."""
    from vllm_twist.engine.v1.logits_processor import TwistLogitsProcessor

    seen = []
    real = TwistLogitsProcessor.apply

    def spy(self: Any, logits: torch.Tensor) -> torch.Tensor:
        before = logits.clone()
        after = real(self, logits)
        lanes = set(self.rows)
        others = [row for row in range(len(before)) if row not in lanes]
        seen.append((len(lanes), len(others)))
        assert torch.equal(after[others], before[others])
        for row in lanes:
            assert (after[row] == 0).sum() == 1
        return after

    monkeypatch.setattr(TwistLogitsProcessor, "apply", spy)
    generate(
        engine(wide),
        [prompt_of(9), prompt_of(17), prompt_of(5)],
        [
            params(max_tokens=30, ignore_eos=True, seed=1, twist=0),
            params(max_tokens=20, ignore_eos=True, twist_particles=7),
            params(max_tokens=30, ignore_eos=True, twist=0),
        ],
    )
    assert any(lanes == 7 and others == 2 for lanes, others in seen)


def test_lanes_alone_are_drawn_once(clean, wide: Tiny, monkeypatch):
    """vLLM draws where a batch holds a plain request, and only there; the tokens appended are those weighed."""
    llm = clean(wide)
    inner = worker_of(llm).model_runner.sampler.topk_topp_sampler.sampler
    sizes = []
    real = inner.forward

    def spy(logits: torch.Tensor, *args: Any) -> Any:
        sizes.append(len(logits))
        return real(logits, *args)

    monkeypatch.setattr(inner, "forward", spy)
    twisted = params(max_tokens=12, ignore_eos=True, twist_particles=6, seed=1, **EVERY_STEP)
    (alone,) = generate(llm, [prompt_of(9)], twisted)
    assert_rescored(wide, alone)
    assert not sizes
    plain = params(max_tokens=5, ignore_eos=True, seed=2, twist=0)
    beside, _ = generate(llm, [prompt_of(9), prompt_of(5)], [twisted, plain])
    assert len(sizes) == 5 and max(sizes) == 7
    assert beside.outputs[0].token_ids == alone.outputs[0].token_ids


@pytest.mark.parametrize("ahead", [1, 5])
def test_keys_made_ahead_are_those_of_their_tokens(clean, wide: Tiny, monkeypatch, ahead: int):
    """Keys of how many tokens are made at once changes nothing, nor does a neighbour's end that cuts them short."""
    llm = clean(wide)
    prompts = [prompt_of(9), prompt_of(5)]
    requests = [params(max_tokens=n, ignore_eos=True, twist_particles=3, seed=n, **EVERY_STEP) for n in (70, 7)]
    expected = [results(output)[0].particles for output in generate(llm, prompts, requests)]
    monkeypatch.setattr(lanes, "KEYS_AHEAD", ahead)
    assert [results(output)[0].particles for output in generate(llm, prompts, requests)] == expected


def test_more_groups_than_slots(clean, wide: Tiny):
    """Gang admission: ten groups of 40 lanes and plain requests share 64 slots; all finish."""
    llm = clean(wide)
    prompts = [prompt_of(5 + i) for i in range(16)]
    requests = [
        params(max_tokens=12, twist_particles=40, seed=i, **EVERY_STEP) if i % 3 else params(max_tokens=12, twist=0)
        for i in range(16)
    ]
    outputs = generate(llm, prompts, requests)
    for i, output in enumerate(outputs):
        assert output.finished
        if i % 3:
            assert_rescored(wide, output)


@pytest.mark.v2
def test_token_budget_smaller_than_the_group(clean, wide: Tiny):
    """With 16 tokens a step, 40 lanes advance in turns: lockstep holds the ones ahead."""
    llm = clean(wide, max_num_batched_tokens=16, max_num_seqs=16)
    requests = [params(max_tokens=10, twist_particles=9, seed=i, **EVERY_STEP) for i in range(4)]
    for output in generate(llm, [prompt_of(50 + i) for i in range(4)], requests):
        assert_rescored(wide, output)


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
def test_whole_groups_are_preempted(clean, wide: Tiny, monkeypatch, caching: bool):
    """Four groups that fit one at a time at full length: parked ones come back, weights and tokens intact."""
    llm = clean(wide, num_gpu_blocks_override=40, enable_prefix_caching=caching)
    parked = []
    real = type(scheduler_of(llm))._park
    monkeypatch.setattr(
        type(scheduler_of(llm)), "_park", lambda self, group: (parked.append(group.id), real(self, group))[1]
    )
    requests = [params(max_tokens=100, ignore_eos=True, twist_particles=8, seed=i, **EVERY_STEP) for i in range(4)] + [
        params(max_tokens=100, ignore_eos=True, twist=0)
    ]
    outputs = generate(llm, [prompt_of(20 + i) for i in range(5)], requests)
    assert parked, "the test must preempt"
    for output in outputs[:4]:
        assert all(len(p.token_ids) == 100 for p in results(output)[0].particles)
        assert_rescored(wide, output)


@pytest.mark.v2
def test_preemption_keeps_the_estimate(clean, small: Tiny):
    """E[Z-hat] = Z where groups are preempted again and again in a cache of 12 blocks."""
    prompt = [0, 2, 3, 2] * 7 + [3, 2]  # 30 tokens: every lane needs a second block at its third token
    llm = clean(small, num_gpu_blocks_override=12)
    n = fewer(300)
    requests = [params(max_tokens=4, twist_particles=5, seed=i, **EVERY_STEP) for i in range(n)]
    z_hat = torch.tensor([math.exp(results(o)[0].log_z) for o in generate(llm, [prompt] * n, requests)])
    z = math.exp(enumerate_law(small, prompt, 4).log_z)
    # Fixed seeds; 4 standard errors: odds of a false alarm 6e-5.
    assert abs(z_hat.mean().item() - z) < 4 * z_hat.std().item() / n**0.5


@pytest.mark.v2
def test_prefix_cache_reset_mid_way(clean, wide: Tiny):
    """Resetting the prefix cache with running requests parks groups whole; they finish as they should."""
    llm = clean(wide)
    core = llm.llm_engine
    for i in range(2):
        core.add_request(
            f"r{i}",
            {"prompt_token_ids": prompt_of(40)},
            params(max_tokens=30, ignore_eos=True, twist_particles=6, seed=i, **EVERY_STEP),
        )
    outputs = []
    for step in range(400):
        outputs += [o for o in core.step() if o.finished]
        if step == 10:
            assert llm.reset_prefix_cache(reset_running_requests=True)
        if not core.has_unfinished_requests():
            break
    assert len(outputs) == 2
    for output in outputs:
        assert_rescored(wide, output)


@pytest.mark.v2("2")
@pytest.mark.parametrize("step", [0, 1, 2, 5])
def test_abort(clean, wide: Tiny, step: int):
    """Aborting while staged, at prefill, while forking or later returns every lane and block."""
    llm = clean(wide)
    core = llm.llm_engine
    for i in range(3):
        core.add_request(
            f"a{step}-{i}", {"prompt_token_ids": prompt_of(40)}, params(max_tokens=30, twist_particles=30, **EVERY_STEP)
        )
    for _ in range(step):
        core.step()
    core.abort_request([f"a{step}-0", f"a{step}-2"])
    outputs = []
    for _ in range(200):
        outputs += [output for output in core.step() if output.finished]
        if not core.has_unfinished_requests():
            break
    core.step()
    assert [output.request_id for output in outputs] == [f"a{step}-1"]
    assert_rescored(wide, outputs[0])


def test_open_ended_request_is_cut_to_the_cache(clean, wide: Tiny):
    """Without max_tokens a group grows as far as its particles fit, as if the context ended there."""
    llm = clean(wide, num_gpu_blocks_override=20)
    (output,) = generate(llm, [prompt_of(10)], params(max_tokens=None, ignore_eos=True, twist_particles=8, seed=0))
    assert output.outputs[0].finish_reason == "length"
    assert len(output.outputs[0].token_ids) == 2 * 32 - 10  # 19 blocks for 8 particles: two each


@pytest.mark.v2
def test_head_gone_wrong_ends_its_request_alone(clean, wide: Tiny):
    """Twist values that overflow end their request with a reason; others in the batch go on."""
    llm = clean(wide)
    good, bad = generate(
        llm,
        [prompt_of(20), prompt_of(21)],
        [
            params(max_tokens=20, twist_particles=8, seed=1, **EVERY_STEP),
            params(max_tokens=20, twist_particles=8, twist_scale=3e38),
        ],
    )
    assert_rescored(wide, good)
    assert bad.outputs[0].finish_reason == "error"
    with pytest.raises(RuntimeError, match="NaN, infinite or all zero: check the head"):
        results(bad)


@pytest.mark.parametrize("value, fails", [(-math.inf, False), (0.0, False), (math.nan, True), (math.inf, True)])
def test_zero_weights_of_some_are_no_failure(clean, wide: Tiny, monkeypatch, value: float, fails: bool):
    """Lanes of weight zero do not fail their group; one that is NaN or infinite does."""
    from vllm_twist.engine.scheduler import TwistSchedulerMixin

    real = TwistSchedulerMixin._mirror

    def mirror(self: Any, step: Any) -> None:
        if len(step.lane_ids) == 4:
            step.log_w[1] = value
        real(self, step)

    monkeypatch.setattr(TwistSchedulerMixin, "_mirror", mirror)
    (output,) = generate(clean(wide), [prompt_of(9)], params(max_tokens=6, ignore_eos=True, twist_particles=4))
    assert output.outputs[0].finish_reason == ("error" if fails else "length")


@pytest.mark.v2
def test_all_weights_zero_end_the_request(clean, wide: Tiny, monkeypatch):
    """A twist of zero everywhere leaves no weight in the group, which is an error that says so."""
    head = worker_of(clean(wide)).readout.head
    monkeypatch.setattr(
        worker_of(clean(wide)).readout, "head", lambda hidden, **given: head(hidden, **given) - math.inf
    )
    (bad,) = generate(clean(wide), [prompt_of(9)], params(max_tokens=10, twist_particles=4))
    with pytest.raises(RuntimeError, match="all zero"):
        results(bad)


BAD_REQUESTS = [
    ({"twist_particles": 0}, r"`twist_particles` must be at least 1, got 0"),
    ({"twist_particles": -3}, r"`twist_particles` must be at least 1, got -3"),
    ({"twist_particles": 65}, r"`twist_particles` must be at most `max_num_seqs`=64, got 65"),
    ({"twist_particles": 2.5}, r"`twist_particles` must be an integer of at least 1, got 2.5"),
    ({"twist_particles": "many"}, r"`twist_particles` must be an integer of at least 1, got 'many'"),
    ({"twist_ess_threshold": -0.1}, r"`twist_ess_threshold` must lie in \[0, inf\), got -0.1"),
    ({"twist_ess_threshold": math.inf}, r"`twist_ess_threshold` must lie in \[0, inf\), got inf"),
    ({"twist_ess_threshold": math.nan}, r"`twist_ess_threshold` must lie in \[0, inf\), got nan"),
    ({"twist_resampling": "systemic"}, r"`twist_resampling` must be one of .*did you mean 'systematic'\?"),
    ({"twist_particle": 4}, r"unknown request key `twist_particle` \(did you mean 'twist_particles'\?\)"),
    ({"twist_colour": 4}, r"unknown request key `twist_colour`"),
    ({"twist_scale": math.nan}, r"`twist_scale` must be a finite number, got nan"),
    ({"twist": 2}, r"`twist` must be 0 or 1"),
    ({"temperature": 0.0}, r"`temperature` must be above 0 with a twist, got 0.0"),
    ({"prompt_logprobs": 1}, r"`prompt_logprobs` is not supported together with a twist"),
]


#: What becomes of every sampling parameter on a lane: "p0" shapes the model that is sampled; "end" ends particles;
#: "group" is taken care of here; "client" concerns the answer alone, in the frontend; "engine" has no effect in an
#: engine with a twist head; "own" is set by vLLM. Values are what is refused.
PARAMETERS_OF_VLLM: dict[str, Any] = {
    **dict.fromkeys(
        ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
         "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "extra_args"], "p0"),
    **dict.fromkeys(["max_tokens", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output"], "end"),
    **dict.fromkeys(["n", "seed", "logprobs", "skip_reading_prefix_cache"], "group"),
    **dict.fromkeys(
        ["detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind", "stream_interval",
         "flat_logprobs", "skip_clone"], "client"),
    # Of options that `twist_head` refuses, and of prompt logprobs.
    **dict.fromkeys(["watermarking", "routed_experts_prompt_start", "prompt_logprob_start"], "engine"),
    **dict.fromkeys(
        ["output_text_buffer_length", "_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped",
         "_bad_words_token_ids"], "own"),
    "prompt_logprobs": [0, 1, -1],
    "prompt_logprob_token_ids": [[[3]]],
    "logprob_token_ids": [[3], []],
    "thinking_token_budget": [0, 3],
    "repetition_detection": [{"max_pattern_size": 2, "min_count": 2}],
    "structured_outputs": [{"regex": "a*"}],
    "trace_decode_token_ids": [[3]],
}  # fmt: skip


def test_every_sampling_parameter_is_decided_on():
    """One that a later vLLM brings fails this, until somebody has decided what it means on a lane."""
    from vllm import SamplingParams

    assert set(PARAMETERS_OF_VLLM) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize("name", [name for name, values in PARAMETERS_OF_VLLM.items() if isinstance(values, list)])
def test_what_a_lane_cannot_honour_is_refused(name: str):
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    from vllm_twist.engine.admission import _check_params

    make = {"repetition_detection": RepetitionDetectionParams, "structured_outputs": StructuredOutputsParams}
    _check_params(SamplingParams())
    for value in PARAMETERS_OF_VLLM[name]:
        value = make[name](**value) if name in make else value
        value = torch.tensor(value).numpy() if name == "prompt_logprob_token_ids" else value
        with pytest.raises(ValueError, match=f"`{name}` is not supported together with a twist, got"):
            _check_params(SamplingParams(**{name: value}))


@pytest.mark.parametrize("options, message", BAD_REQUESTS, ids=lambda value: str(value)[:40])
def test_bad_requests(clean, wide: Tiny, options: dict[str, Any], message: str):
    llm = clean(wide)
    with pytest.raises(ValueError, match=message):
        generate(llm, [prompt_of(5)], params(**options))


def test_group_that_never_fits(clean, wide: Tiny):
    """Refused with the numbers; the same group with fewer tokens runs."""
    llm = clean(wide, num_gpu_blocks_override=20)
    message = (
        r"`twist_particles`=16 can never fit into the KV cache: a prompt of 10 and `max_tokens`=100 need up to "
        r"64 blocks of 32 tokens, the cache has 19"
    )
    with pytest.raises(ValueError, match=message):
        generate(llm, [prompt_of(10)], params(max_tokens=100, twist_particles=16))
    generate(llm, [prompt_of(10)], params(max_tokens=20, twist_particles=16))


def test_plain_engine_ignores_twist_keys(clean, wide: Tiny):
    """Without a head nothing is checked, added or changed."""
    (output,) = generate(clean(wide, twist=False), [prompt_of(5)], params(temperature=0.0, twist_particles=0))
    assert output.kv_transfer_params is None
