"""The argument structs of csrc/kernel_params.h are filled by field name, and no field is left to
its zero."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMMENT = re.compile(r"//.*")
STRUCTS = {
    name: re.findall(r"(\w+)(?=[,;])", COMMENT.sub("", body))
    for name, body in re.findall(
        r"struct (\w+Rows\w*) "
        r"{(.*?)\n};",
        (CSRC / "kernel_params.h").read_text(),
        re.S,
    )
}
SOURCES = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".hpp", ".cpp", ".cu")]


def initialisers(text: str, struct: str) -> list[str]:
    """The braces behind every `Struct<...> name`."""
    return re.findall(rf"\b{struct}<[^>]*>\s+\w+{{(.*?)}};", COMMENT.sub("", text), re.S)


def names(initialiser: str) -> list[str]:
    return re.findall(r"(?:^|,)\s*\.(\w+) =", initialiser)


@pytest.mark.parametrize("struct", STRUCTS)
def test_the_argument_checks_fill_every_field_by_name(struct):
    checks = "".join(
        (CSRC / name).read_text() for name in ("dispatch.h", "dispatch_cross_entropy.h")
    )
    (filled,) = initialisers(checks, struct)
    assert names(filled) == STRUCTS[struct]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_no_argument_struct_is_filled_by_position(path):
    for struct in STRUCTS:
        for filled in initialisers(path.read_text(), struct):
            assert names(filled) or not filled.strip(), f"{struct} {filled}"
