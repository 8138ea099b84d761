"""python -m benchmarks.numerics writes its page and figure from what it measures."""

from benchmarks import numerics, token_numerics


def test_the_page_comes_from_measurements_at_toy_sizes(tmp_path, capsys):
    assert numerics.main(["--toy", "--threads", "1", "--out", str(tmp_path)]) == 0
    page = (tmp_path / "numerics.md").read_text()
    for heading in ("Time and memory", "Error against the number of chunks", "Size of a chunk", "Growth", "Roofline"):
        assert f"## {heading}" in page
    assert page.count("| 8 x 4 x 20 |") == 4  # two dtypes, two malloc settings
    assert "<svg" in (tmp_path / "error-against-chunks.svg").read_text()


def test_a_missing_folder_is_one_line(tmp_path, capsys):
    assert numerics.main(["--toy", "--out", str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_exponent_of_a_quadratic_is_two():
    assert abs(token_numerics.exponent([1, 2, 4], [3.0, 12.0, 48.0]) - 2) < 1e-12
