"""What differs between the supported versions of vLLM, each asked of vLLM itself.

                                                          0.32   0.33
an output takes its request's error to the client          no    yes    ``error_fields``, else a patch in ``compat``
``Sampler._sample_random`` has ``has_topp_only_rows``      no    yes    ``TwistSampler`` passes on what it is given
the scheduler is asked ``has_request``                     no    yes    ``TwistSchedulerMixin`` has it for both

``tests/test_upstream.py`` holds vLLM to this table.
"""

from __future__ import annotations

from typing import Any

from vllm import outputs
from vllm.v1.engine import EngineCoreOutput

#: Whether an engine's output takes an error along, which the server raises to the client.
OUTPUTS_CARRY_ERRORS = "error" in EngineCoreOutput.__struct_fields__


def error_fields(message: str) -> dict[str, Any]:
    """Return the fields of an ``EngineCoreOutput`` that tell its client what went wrong; none before 0.33."""
    if not OUTPUTS_CARRY_ERRORS:
        return {}
    return {"error": outputs.RequestError(code="twist", message=message)}
