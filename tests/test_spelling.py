"""Everything that people read or import is in American English: spelling by a closed table, and idiom."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")  # of names in snake_case and in CamelCase, too

IZE = (
    "anonym|author|binar|bott|capital|categor|character|commerc|critic|crystal|custom|discret|emphas|equal|factor|final|"
    "formal|general|harmon|hypothes|ideal|immun|incentiv|initial|internal|linear|local|material|maxim|memor|minim|mobil|"
    "modern|modular|neutral|normal|optim|organ|parallel|parametr|penal|personal|polar|popular|priorit|quant|random|raster|"
    "rational|real|recogn|regular|scrutin|sensit|serial|special|stabil|standard|steril|subsid|summar|symbol|symmetr|"
    "synchron|synthes|token|util|vector|visual|vocal"
)
DOUBLED = (
    "cancel|channel|dial|equal|fuel|label|level|marshal|model|panel|signal|spiral|total|travel|trial|tunnel|unravel"
)
OUR = (
    "arm|behavi|cand|clam|col|demean|endeav|fav|ferv|flav|harb|hon|hum|lab|neighb|od|parl|ranc|rig|rum|savi|sav|splend|"
    "tum|val|vap|vig"
)
RE = "cent|fib|calib|lit|lust|meag|manoeuv|sab|somb|spect|theat|(?<!para)met"
ENDINGS = r"(e|ed|er|ers|es|ing|able|ation|ational|ations)"
RULES = [
    (re.compile(rf"^(.*?(?:{IZE}))is{ENDINGS}$"), r"\1iz\2"),
    (re.compile(r"^(.*(?:anal|catal|paral))ys(e|ed|er|ers|ing)$"), r"\1yz\2"),
    (re.compile(rf"^(.*?(?:{DOUBLED}))l(ed|ing|er|ers)$"), r"\1\2"),
    (re.compile(rf"^(un|mis|dis|bi|tri|multi|water)?({OUR})our(.*)$"), r"\1\2or\3"),
    (re.compile(rf"^(.*?(?:{RE}))re(s?)$"), r"\1er\2"),
    (re.compile(rf"^(.*?(?:{RE}))red$"), r"\1ered"),
    (re.compile(rf"^(.*?(?:{RE}))ring$"), r"\1ering"),
    (re.compile(r"^(.*)(def|off|pret)ence(s?|less)$"), r"\1\2ense\3"),
    (re.compile(r"^(un|mis|re)?(burn|dream|lean|leap|learn|spoil)t$"), r"\1\2ed"),
    (re.compile(r"^(after|back|down|in|on|out|to|up)wards$"), r"\1ward"),
]
WORDS = {
    "acknowledgement": "acknowledgment", "ageing": "aging", "aluminium": "aluminum", "amongst": "among",
    "analogue": "analog", "analogues": "analogs", "artefact": "artifact", "artefacts": "artifacts",
    "catalogue": "catalog", "catalogues": "catalogs", "cheque": "check", "cosy": "cozy", "enrol": "enroll",
    "focussed": "focused", "focussing": "focusing", "fulfil": "fulfill", "fulfils": "fulfills", "gaol": "jail",
    "grey": "gray", "greys": "grays", "greyscale": "grayscale", "judgement": "judgment", "judgements": "judgments",
    "kerb": "curb", "licence": "license", "licences": "licenses", "likeable": "likable", "maths": "math",
    "mould": "mold", "moulds": "molds", "plough": "plow", "practise": "practice", "practised": "practiced",
    "programme": "program", "programmes": "programs", "sceptic": "skeptic", "sceptical": "skeptical",
    "sizeable": "sizable", "skilful": "skillful", "spelt": "spelled", "storey": "story", "tyre": "tire",
    "useable": "usable", "whilst": "while", "wilful": "willful",
}  # fmt: skip


# Phrases translated word for word, and what an American would write. A space also stands for a line break in prose.
GAP = r"(?:[ \t]+|[ \t]*\n[ \t]*(?:(?:#+|//)[ \t]*)?)"
ENDS = r"(?=[^\w\s\"`]|\n\n| (?:and|as|at|for|here|in|is|of|or|so|that|to|where|which|with|within|per|beside|behind)\b)"
IDIOMS = {
    r"\b(?:lie|lies)\b": "is, is stored, fits",
    r"\b(?:go|goes|going|went) on\b": "continue, resume",
    r"(?<!turn\s)\bin turns\b": "interleaved, taking turns",
    rf"\bas (?:it|they) (?:is|are|was|were){ENDS}": "unchanged, without ...",
    rf"\bof (?:its|their) own{ENDS}": "its own ..., a separate ...",
    r"\bfor nothing\b": "is not counted",
    rf"\bwhat (?:it|they) (?:is|are|was|were){ENDS}": "its description, its kind",
    r"\b(?:row|line|module|member|folder|process) an? (?:device|image|layer|member|method|net|round|stage|step|"
    r"sub-command|variant)\b": "one ... per ...",
    r"\banew\b": "again, from scratch",
    r"\b(?:was|were) at hand\b": "not tested on ...",
    r"\b(?:is|are) there already\b": "already exists",
    r"\bpoints of accuracy against\b": "accuracy points vs. ...",
    r"\bserves? the bits\b": "the best options for the bit width",
    r"\bwhoever has\b": "it is self-contained",
    r"\b(?:is|are) told of\b|\bhears? of\b": "is reported, observes",
}
URL = r"https?://\S+"
# These name both spellings: this file, and what keeps old ones for a release.
NOT_OURS = {"tests/test_spelling.py", "tests/test_moved.py", "export/moved.py", "qkd/moved.py"}
FOLDERS = ("quantizers", "export", "qkd", "tests", "benchmarks", "configs", "docs", "examples")
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".cc", ".h", ".toml", ".svg"}  # results in JSON are records, not prose


def american(word: str) -> str:
    """Return the American spelling of a word in lower case; the word itself where it is the same or unknown."""
    if word in WORDS:
        return WORDS[word]
    for pattern, replacement in RULES:
        if pattern.match(word):
            return pattern.sub(replacement, word)
    return word


def cased(word: str, like: str) -> str:
    return word.upper() if like.isupper() and len(like) > 1 else word.capitalize() if like[0].isupper() else word


def rewritten(text: str) -> str:
    """Return the text in American spelling, but for addresses."""
    kept = re.compile(URL, re.IGNORECASE)
    found, at = [], 0
    for match in kept.finditer(text):
        found += [PART.sub(lambda part: cased(american(part[0].lower()), part[0]), text[at : match.start()]), match[0]]
        at = match.end()
    return "".join([*found, PART.sub(lambda part: cased(american(part[0].lower()), part[0]), text[at:])])


def texts() -> Iterator[Path]:
    """Yield every file of prose and code in the repository, but for this one."""
    for folder in (ROOT / name for name in FOLDERS):
        yield from (path for path in sorted(folder.rglob("*")) if path.suffix in SUFFIXES)
    yield from (path for path in sorted(ROOT.iterdir()) if path.suffix in SUFFIXES or path.name == "Makefile")


FILES = [path for path in texts() if path.relative_to(ROOT).as_posix() not in NOT_OURS]


@pytest.mark.parametrize(
    ("british", "wanted"),
    [
        ("quantised", "quantized"), ("uninitialised", "uninitialized"), ("summarise", "summarize"),
        ("synchronisation", "synchronization"), ("behavioural", "behavioral"), ("neighbouring", "neighboring"),
        ("centred", "centered"), ("centres", "centers"), ("centring", "centering"), ("kilometres", "kilometers"),
        ("labelled", "labeled"), ("modelling", "modeling"), ("analysed", "analyzed"), ("defence", "defense"),
        ("learnt", "learned"), ("towards", "toward"), ("greys", "grays"),
    ],
)  # fmt: skip
def test_a_british_word_is_known(british: str, wanted: str) -> None:
    assert american(british) == wanted
    assert american(wanted) == wanted, "once is enough"


ALIKE = """
noise precise promise otherwise likewise raise exercise supervise hour four source contour tour pour course acre
parameter metric string bring scoring called controlled installed filled equally analyses rewards centers is axis basis
realistic organism optimistic minimal cancellation excellent distilled pulled spelling glamorous rigorous odd
"""


@pytest.mark.parametrize("word", re.findall(r"\S+", ALIKE))
def test_a_word_that_both_sides_spell_alike_stays(word: str) -> None:
    assert american(word) == word


def test_names_keep_their_case_and_addresses_stay() -> None:
    assert rewritten("COLOURS ColourMap my_colour Colour") == "COLORS ColorMap my_color Color"
    assert rewritten("see https://example.org/colour-modelling for modelling") == (
        "see https://example.org/colour-modelling for modeling"
    )


def test_the_guards_see_the_files() -> None:
    assert len(FILES) > 300
    assert {"README.md", "CHANGELOG.md", "ARCHITECTURE.md", "Makefile"} <= {path.name for path in FILES}


def test_everything_is_in_american_spelling() -> None:
    found = []
    for path in FILES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
        for number, (line, wanted) in enumerate(zip(text.split("\n"), rewritten(text).split("\n"), strict=True), 1):
            if line != wanted:
                words = sorted({a for a, b in zip(PART.findall(line), PART.findall(wanted), strict=True) if a != b})
                found.append(f"{name}:{number}: {', '.join(words)}: {wanted.strip()}")
        found += [f"{name}: its name"] if rewritten(name) != name else []
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", IDIOMS)
def test_nothing_is_said_in_a_translated_idiom(pattern: str) -> None:
    idiom, found = re.compile(pattern.replace(" ", GAP), re.IGNORECASE), []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for match in idiom.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{path.relative_to(ROOT)}:{line}: {' '.join(match[0].split())!r}; say: {IDIOMS[pattern]}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("text", "is_idiom"),
    [
        ("each in a folder of its own.", True), ("images of its own class", False), ("lie in [0, 1]", True),
        ("the border as it is.", True), ("as it is computed", False), ("for turn in turns:", False),
        ("it is measured in turns", True), ("# a scale of their\n    # own, which", True), ("a row a net", True),
        ("for what it is.", True), ("what it is given", False),
        ("No board was at hand.", True), ("the images at hand", False), ("x.yaml is there already", True),
    ],
)  # fmt: skip
def test_an_idiom_is_told_from_plain_use(text: str, is_idiom: bool) -> None:
    assert any(re.search(pattern.replace(" ", GAP), text) for pattern in IDIOMS) is is_idiom
