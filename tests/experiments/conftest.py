"""The text that most tests of pretraining train on."""

import pytest

from tests.experiments.pretrain_cases import write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))
