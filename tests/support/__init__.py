"""What the tests share: models and their laws, engines, processes beside the session."""

import pytest

pytest.register_assert_rewrite("support.engines", "support.laws")
