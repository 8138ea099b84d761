"""python -m benchmarks.suites.numerics writes its pages and figure from what it measures."""

import pytest
import torch

from benchmarks.measure import gemm_times
from benchmarks.suites.numerics import __main__ as numerics

pytestmark = pytest.mark.programs


def test_the_pages_come_from_measurements_at_toy_sizes(tmp_path, capsys):
    assert numerics.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "numerics.md").read_text()
    for heading in ("Time and memory", "Size of a chunk", "Roofline"):
        assert f"## {heading}" in page
    assert page.count("| 8 x 4 x 20 |") == 4  # two dtypes, two malloc settings
    latent = (tmp_path / "implicit-numerics.md").read_text()
    for line in (
        "| 8 x 4 | float32 |",
        "| 8 x 4 | bfloat16 |",
        "| 16 |",
        "| alignment 8 x 4 |",
        "| swiglu 8 x 4 |",
    ):
        assert latent.count(line) == 1
    assert (tmp_path / "plan-numerics.md").read_text().count("| residual 8 x 4 x 20 |") == 4


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert numerics.main(["--toy", "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_exponent_of_a_quadratic_is_two():
    assert abs(gemm_times.exponent([1, 2, 4], [3.0, 12.0, 48.0]) - 2) < 1e-12


def test_every_library_that_is_timed_forms_the_product():
    for dtype in gemm_times.DTYPES.values():
        rows, gradient, weight = (
            torch.randn(shape).to(dtype) for shape in ((24, 16), (24, 40), (40, 16))
        )
        for a, b in ((rows, weight.t()), (gradient, weight), (gradient.t(), rows)):
            out = torch.empty(a.shape[0], b.shape[1], dtype=dtype)
            exact = (a.double() @ b.double()).to(dtype)
            for run in (
                gemm_times.multiplied("", a, b, out) | gemm_times.own("", a, b, out)
            ).values():
                out.zero_()
                written = run()
                found = written if isinstance(written, torch.Tensor) else out
                torch.testing.assert_close(found, exact, rtol=2.0**-7, atol=1e-4, check_dtype=False)


def test_the_faster_library_is_chosen_a_product_and_its_rounds_are_added():
    times = {"mm a": [3.0, 3.0], "onednn a": [1.0, 2.0], "mm b": [5.0, 7.0], "ours": [9.0, 9.0]}
    assert gemm_times.faster(times) == [6.0, 9.0]
