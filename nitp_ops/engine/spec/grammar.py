"""The one-line spelling of a spec. Parsed, never evaluated.

spec    := term { "+" term }
term    := [ label ":" ] [ weight "*" ] name [ "(" [ options ] ")" ]
weight  := number | "schedule" "(" options ")" | list
options := key "=" literal { "," key "=" literal }
literal := number | "quoted" | word { "+" word } | "true" | "false" | "null" | list
list    := "[" [ literal { "," literal } ] "]"      (round brackets do as well)
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from .validation import MOST_TERMS, SpecError, too_many_terms

_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?(?![\w.]))
          |(?P<word>[A-Za-z_]\w*)
          |(?P<string>"[^"]*"|'[^']*')
          |(?P<mark>[-+*:=,()\[\]]))""",
    re.VERBOSE | re.ASCII,
)
_WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
_CLOSING = {"(": ")", "[": "]"}
_SPACE = re.compile(r"\s*", re.ASCII)
#: Of a whole expression: several times what every objective takes with all of its options.
_MOST_CHARACTERS = 4000
#: Of a number without a point: more than any option takes, fewer than `int` refuses.
_MOST_DIGITS = 100
#: Lists inside one another: more than any option takes, fewer than Python's stack.
_DEEPEST = 20


class Token(NamedTuple):
    kind: str
    text: str
    column: int


class ParsedTerm(NamedTuple):
    """One term as written; options hold the weight too, if one was given."""

    label: str | None
    name: str
    options: dict[str, Any]


def parse_expression(text: str) -> tuple[list[ParsedTerm], list[str]]:
    """(terms, problems): every term that can be read, and one line for each that cannot.

    Example:
        >>> parse_expression("ntp + late: 0.1*nitp(target_layer=8)")[0][1]
        ParsedTerm(label='late', name='nitp', options={'weight': 0.1, 'target_layer': 8})
    """
    if len(text) > _MOST_CHARACTERS:
        expected = f"expected at most {_MOST_CHARACTERS} (or a mapping, which may be longer)"
        return [], [f"expression: {len(text)} characters, {expected}"]
    terms, problems = [], []
    try:
        groups = _split(_tokens(text))
    except SpecError as error:
        return [], list(error.problems)
    if len(groups) > MOST_TERMS:
        return [], [too_many_terms(len(groups))]
    for group in groups:
        try:
            terms.append(_Reader(group).term())
        except SpecError as error:
            problems += error.problems
    return terms, problems


def _tokens(text: str) -> list[Token]:
    tokens, position, end = [], 0, len(text.rstrip())
    while position < end:
        match = _TOKEN.match(text, position)
        if match is None:
            index = _end_of_space(text, position)
            raise SpecError(
                [f"expression: {text[index]!r} at column {index + 1} is not part of the grammar"]
            )
        kind = str(match.lastgroup)
        start = match.start(kind)
        # in "ntp +0.8*nitp" and "1+2" the sign joins two terms, it belongs to no number
        joins = kind == "number" and match[kind][0] == "+"
        kind, word = ("mark", "+") if joins else (kind, match[kind])
        tokens.append(Token(kind, word, start + 1))
        position = start + len(word)
    return [*tokens, Token("end", "the end", len(text) + 1)]


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _split(tokens: list[Token]) -> list[list[Token]]:
    """One list of tokens a term, each closed by an end token: cut at every "+" outside brackets."""
    groups: list[list[Token]] = [[]]
    depth = 0
    for token in tokens:
        depth += (
            (token.text in _CLOSING) - (token.text in _CLOSING.values())
            if token.kind == "mark"
            else 0
        )
        if token.kind == "mark" and token.text == "+" and depth <= 0:
            groups[-1].append(Token("end", "+", token.column))
            groups.append([])
        else:
            groups[-1].append(token)
    return groups


class _Reader:
    """Recursive descent over the tokens of one term."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens = tokens
        self.index = 0
        self.depth = 0

    def term(self) -> ParsedTerm:
        label = None
        if self.tokens[0].kind == "word" and self.tokens[1].text == ":":
            label = self.take("word", "a label").text
            self.mark(":")
        options: dict[str, Any] = {}
        if self.peek().kind == "number" or self.peek().text in _CLOSING:
            options["weight"] = self.literal()
            self.mark("*")
        name = self.take("word", "the name of an objective").text
        if name == "schedule" and self.peek().text == "(":
            options["weight"] = self.options()
            self.mark("*")
            name = self.take("word", "the name of an objective").text
        if self.peek().text == "(":
            column = self.peek().column
            inside = self.options()
            for key in ("weight", "label", "type"):
                if key in inside:
                    where = "label: weight*name(...)"
                    raise SpecError(
                        [
                            f"expression: {key} at column {column} is an option, expected it in "
                            f"{where}"
                        ]
                    )
            options |= inside
        self.take("end", '"+" or the end')
        return ParsedTerm(label, name, options)

    def options(self) -> dict[str, Any]:
        self.mark("(")
        options: dict[str, Any] = {}
        while self.peek().text != ")":
            key = self.take("word", 'an option or ")"')
            if key.text in options:
                raise SpecError(
                    [f"expression: {key.text} at column {key.column} is given twice, expected once"]
                )
            self.mark("=")
            options[key.text] = self.literal()
            if self.peek().text != ")":
                self.mark(",")
        self.mark(")")
        return options

    def literal(self) -> Any:
        token = self.peek()
        if token.kind == "mark" and token.text in _CLOSING:
            return self.items(_CLOSING[token.text])
        self.index += 1
        if token.kind == "number":
            return self.number(token)
        if token.kind == "string":
            return token.text[1:-1]
        if token.kind != "word":
            self.refuse(token, "a value")
        text = token.text
        while self.peek().kind == "mark" and self.peek().text == "+":
            self.mark("+")
            text += "+" + self.take("word", "a word").text
        return _WORDS.get(text, text)

    def number(self, token: Token) -> int | float:
        if not re.fullmatch(r"[-+]?\d+", token.text):
            return float(token.text)
        if len(token.text) > _MOST_DIGITS:
            digits = f"a number of {len(token.text)} digits at column {token.column}"
            raise SpecError([f"expression: {digits}, expected at most {_MOST_DIGITS}"])
        return int(token.text)

    def items(self, closing: str) -> list[Any]:
        if self.depth == _DEEPEST:
            self.refuse(self.peek(), f"at most {_DEEPEST} lists inside one another")
        self.depth += 1
        self.index += 1
        items = []
        while self.peek().text != closing:
            items.append(self.literal())
            if self.peek().text != closing:
                self.mark(",")
        self.mark(closing)
        self.depth -= 1
        return items

    def peek(self) -> Token:
        return self.tokens[self.index]

    def mark(self, text: str) -> None:
        self.take("mark", f'"{text}"', text)

    def take(self, kind: str, expected: str, text: str | None = None) -> Token:
        token = self.peek()
        if token.kind != kind or (text is not None and token.text != text):
            self.refuse(token, expected)
        self.index += kind != "end"
        return token

    def refuse(self, token: Token, expected: str) -> None:
        raise SpecError(
            [f'expression: "{token.text}" at column {token.column}, expected {expected}']
        )
