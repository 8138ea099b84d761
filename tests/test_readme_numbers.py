"""README's numbers are those of the committed results."""

import json

from benchmarks import readme


def test_the_table_is_what_the_json_says():
    (path,) = readme.quick_results()
    text = readme.README.read_text()
    assert readme.written(text, path) == text
    document = json.loads(path.read_text())
    assert document["machine"]["commit"] in path.name and "dirty" not in path.name


def test_another_result_would_change_the_table(tmp_path, monkeypatch):
    (path,) = readme.quick_results()
    document = json.loads(path.read_text())
    document["cases"][0]["rows"]["ours"]["times_floor"]["median"] = 98.76
    other = tmp_path / path.name
    other.write_text(json.dumps(document))
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = readme.README.read_text()
    assert "98.76" in readme.written(text, other) != text
