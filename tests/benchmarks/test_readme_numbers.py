"""README's numbers are those of the results that were kept last."""

import json

from benchmarks.report import plots, readme, storage


def kept():
    path = storage.newest("-quick")
    assert path is not None
    return path


def test_the_table_is_what_the_json_says():
    path, text = kept(), readme.README.read_text()
    assert readme.written(text, path) == text
    document = json.loads(path.read_text())
    assert document["machine"]["commit"] in path.name and "dirty" not in path.name


def test_another_result_would_change_the_table(tmp_path, monkeypatch):
    path = kept()
    document = json.loads(path.read_text())
    document["cases"][0]["rows"]["ours"]["times_floor"]["median"] = 98.76
    document["cases"][0]["rows"]["liger"] = {"times_floor": {"median": 54.32}}
    document["cases"][0]["rows"]["compile"] = {"times_floor": {"median": 98.70}}  # level with ours
    other = tmp_path / path.name
    other.write_text(json.dumps(document))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = readme.README.read_text()
    changed = readme.written(text, other)
    assert "98.76" in changed != text
    (row,) = [line for line in changed.splitlines() if "98.76" in line and line.startswith("|")]
    assert "54.32" in row and "| liger |" in changed  # a peer that ran has a column
    assert (
        f"Slower than liger: {document['cases'][0]['op']} in {document['cases'][0]['dtype']} "
        "(1.82)." in changed
    )
    assert "(1.00)" not in changed


def test_the_figure_of_growth_stands_there_for_both_themes_once_it_is_measured(
    tmp_path, monkeypatch
):
    path = kept()
    before = readme.section(path)
    assert ("<picture>" in before) == (storage.newest("-scaling") is not None)
    measured = tmp_path / "scaling.json"
    monkeypatch.setattr(readme, "newest", lambda kind: measured)
    section = readme.section(path)
    assert (
        'srcset="docs/plots/time-dark.svg"' in section
        and 'src="docs/plots/time-light.svg"' in section
    )


def test_the_scaling_page_and_its_figures_are_what_the_json_says(tmp_path):
    path = storage.newest("-scaling")
    if path is None:
        assert not (plots.DOCS / "growth.md").exists()
        return
    source = f"../{path.relative_to(plots.environment.ROOT)}"
    for written in plots.draw(json.loads(path.read_text()), source, tmp_path):
        if written.suffix == ".md":
            assert written.read_text() == (plots.DOCS / written.name).read_text()
        else:  # another matplotlib draws the same numbers with other bytes
            assert (plots.DOCS / plots.FOLDER / written.name).exists()
