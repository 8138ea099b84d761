"""What tests of several adapters start from."""

import pytest


@pytest.fixture
def fresh_accelerate():
    """Accelerate keeps its state in singletons."""
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState, GradientState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState):
        state._reset_state()
