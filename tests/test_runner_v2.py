"""The engine on Model Runner V2, with the synchronous and with the asynchronous scheduler.

Without a GPU that runner works under Triton's interpreter, which has to be chosen before anything imports
Triton: so each scheduler has a pytest process of its own, in which the engine's tests run again, with fewer
groups, and those of ``cases_v2``. A test here stands for all cases of one test there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from support.processes import Line
from support.runners import ENVIRONMENT

MODES = ("v2", "v2-async")
#: Tests of other files, whole or by case, and those of ``cases_v2``.
TESTS = [
    "test_engine_exact.py::test_unbiased",
    "test_engine_exact.py::test_sampling_parameters_define_p0",
    "test_engine_exact.py::test_prompt_against_block",
    "test_engine_exact.py::test_every_kind_of_head",
    "test_engine_exact.py::test_optimal_twist_has_no_variance",
    "test_engine_exact.py::test_optimal_twist_with_the_base_model_as_proposal_has_variance",
    "test_engine_exact.py::test_scale_invariance",
    "test_engine_exact.py::test_single_particle_is_the_twist_induced_proposal",
    "test_engine_exact.py::test_broken_engines_fail",
    "test_engine.py::test_preemption_keeps_the_estimate",
    "test_pinned.py::test_reciprocal_unbiased[8-500-1.0-residual-twist]",
    "test_condition.py::test_samples_the_conditional_target[3]",
    "test_soak.py::test_random_load[1]",
    "test_engine.py::test_forks_at_every_step_across_blocks[caching-31]",
    "test_engine.py::test_result_is_consistent",
    "test_engine.py::test_prompt_logprobs_among_twisted_requests",
    "test_engine.py::test_token_budget_smaller_than_the_group",
    "test_engine.py::test_prefix_cache_reset_mid_way",
    "test_engine.py::test_abort[2]",
    "test_engine.py::test_head_gone_wrong_ends_its_request_alone",
    "test_engine.py::test_all_weights_zero_end_the_request",
    "test_pinned.py::test_impossible_continuations_end_their_request_alone[options0]",
    "test_condition.py::test_conditions_are_not_mixed_up",
    "test_condition.py::test_preemption_keeps_the_condition",
    "test_condition.py::test_abort[2]",
    "test_condition.py::test_prompt_logprobs_beside_a_condition",
    "test_scheduler.py::test_worker_and_scheduler_hold_the_same_tables[no-caching]",
    "test_scheduler.py::test_pause_at_any_moment[1-wait]",
    "test_fuzz.py::test_every_request_ends_once[wide]",
    "test_scoring.py::test_other_requests_go_on",
    "test_engine.py::test_logprobs_are_those_of_a_plain_request[options1-raw_logprobs]",
    "test_engine.py::test_logprobs_are_those_of_a_plain_request[options1-processed_logits]",
    "test_engine.py::test_top_k_of_some",
    "test_engine.py::test_low_temperatures_keep_the_weights",
    "test_logits_processors.py::test_ban_per_request",
    "test_logits_processors.py::test_state_follows_the_particles[count]",
    "test_logits_processors.py::test_without_copies_the_state_is_wrong",
    "test_stop_strings.py::test_target_ends_at_the_stop_string[4-800-1.0-options1]",
    "test_stop_strings.py::test_forks_and_preemption_keep_the_text",
    "test_stop_strings.py::test_others_are_not_held_up",
    "test_trace.py::test_trace_agrees_with_the_particles[1.0]",
    "cases_v2.py::test_runner_and_scheduler_are_the_ones_meant",
    "cases_v2.py::test_light_kernels_store_what_triton_says",
    "cases_v2.py::test_same_as_model_runner_v1",
    "cases_v2.py::test_state_survives_a_preemption",
    "cases_v2.py::test_same_with_the_kernels",
    "cases_v2.py::test_same_with_a_low_rank_head_in_factors",
    "cases_v2.py::test_rescoring_sees_a_wrong_fork",
    "cases_v2.py::test_memory_is_measured_with_the_head",
    "cases_v2.py::test_particle_that_ends_leaves_one_step_later",
    "cases_v2.py::test_plain_rows_are_drawn_by_vllm",
    "cases_v2.py::test_the_check_for_waiting_sees_it",
    "cases_v2.py::test_the_step_never_waits_for_the_device",
]


def start_elsewhere(line: Line, request: pytest.FixtureRequest) -> None:
    """Run what was selected in a process per mode, after one that finds the outcomes of the paths on V1."""
    items = [item for item in request.session.items if item.path == Path(__file__)]
    make_folder = request.getfixturevalue("tmp_path_factory").mktemp
    reference = make_folder("reference") / "outcomes.json"
    line.add_tests("v1", ["tests/support/reference_outcomes.py"], {"TWIST_TEST_REFERENCE": str(reference)}, make_folder("v1"))
    for mode in MODES:
        chosen = [f"tests/{item.callspec.params['test']}" for item in items if item.callspec.params["mode"] == mode]
        if chosen:
            environment = {**ENVIRONMENT, "TWIST_TEST_RUNNER": mode, "TWIST_TEST_REFERENCE": str(reference)}
            line.add_tests(mode, chosen, environment, make_folder(mode), after="v1")


@pytest.fixture(scope="module")
def outcomes(line: Line) -> Callable[[str], dict[str, str]]:
    """Return what gives the outcomes of a mode's tests."""
    return functools.cache(line.outcomes)


@pytest.mark.parametrize("test", TESTS)
@pytest.mark.parametrize("mode", MODES)
def test_on_model_runner_v2(outcomes: Callable[[str], dict[str, str]], line: Line, mode: str, test: str):
    assert line.exit_code("v1") == 0, line.said("v1")
    name = test.replace(".py::", ".")
    cases = {case: failure for case, failure in outcomes(mode).items() if case == name or case.startswith(f"{name}[")}
    assert cases, f"It did not run. {line.said(mode)}"
    failed = {case: failure for case, failure in cases.items() if failure}
    assert not failed, "\n".join(f"{case}:\n{failure}" for case, failure in failed.items())
    assert line.exit_code(mode) == any(outcomes(mode).values()), line.said(mode)
