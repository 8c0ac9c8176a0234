"""Documents: everything shown, nothing executed, nothing fetched, readable in both colour schemes."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import pytest

from mlxkd.errors import UserError
from mlxkd.metric import Metric
from mlxkd.report import Code, Conversation, Document, Figure, Heading, Table, Text, Tiles, plots, show_value

NO_MAC = Metric(None, "J/token", "planned", note="not available here: needs macOS")
TTFT = Metric(12.34, "ms", "measured", "a CPU", n=30, p50=12.34, p95=15.2)


def sample() -> Document:
    picture = plots.curves({"train": ([0, 1], [2.0, 1.0])}, y="nats")
    return Document(
        "Title & <b>",
        [
            Text("It **holds** for `x < y`.\n\nSecond.", tone="good"),
            Tiles({"TTFT": TTFT, "energy": NO_MAC}),
            Heading("One"),
            Figure(picture, alt='falls "fast"', caption="Loss."),
            Figure(picture, alt="again"),
            Heading("Two"),
            Table(("name", "TTFT", "n"), [("a|b", TTFT, 3), ("c", NO_MAC, None)], caption="Cap"),
            Heading("Three"),
            Conversation(
                [
                    {"role": "user", "content": "<script>alert(1)</script>"},
                    {"role": "assistant", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]},
                ]
            ),
            Heading("Four"),
            Code("a `b` ```c```"),
        ],
        details={"versions": {"mlx": "1", "none": None}, "seed": 3},
    )


class Page(HTMLParser):
    """What a browser would see: tags with attributes, and whether every tag closes."""

    VOID = frozenset({"meta", "link", "br", "img", "path", "use", "input", "hr"})

    def __init__(self, text: str):
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def test_html_is_well_formed_self_contained_and_literal() -> None:
    page = Page(sample().html())
    assert page.open == []
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "b"}
    for _, attributes in page.seen:
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#")
    assert "url(http" not in sample().html() and "@import" not in sample().html()
    assert "<script>alert(1)</script>" in page.words
    assert "not available here: needs macOS" in page.words


def test_a_number_and_its_unit_stay_on_one_line() -> None:
    page = Table(("a", "b"), [("+5.0 %", "18 steps to 20 steps"), ("no 5 % here", TTFT)]).html()
    assert "+5.0\N{NO-BREAK SPACE}%" in page and "18 steps to 20\N{NO-BREAK SPACE}steps" in page
    assert "no 5 % here" in page and "12.3\N{NO-BREAK SPACE}ms" in page


def test_ids_are_unique_and_links_lead_somewhere() -> None:
    page = Page(sample().html())
    pictures = sample().html().split("<figure>")[1:]
    assert len(pictures) == 2
    anchors = [a["id"] for tag, a in page.seen if "id" in a and tag.startswith("h")]
    assert anchors == ["one", "two", "three", "four"]
    links = {a["href"] for tag, a in page.seen if tag == "a"}
    assert links == {f"#{name}" for name in anchors}


def test_two_different_pictures_do_not_share_names() -> None:
    ids = [
        set(re.findall(r'id="([^"]+)"', plots.to_svg(plots.curves({"a": ([0, 1], [float(k), 1.0])}, y="y"))))
        for k in range(2)
    ]
    assert ids[0] and not ids[0] & ids[1]


def test_accessibility_of_pictures_and_tables() -> None:
    page = Page(sample().html())
    pictures = [a for tag, a in page.seen if tag == "svg"]
    assert [a["aria-label"] for a in pictures] == ['falls "fast"', "again"]
    assert all(a["role"] == "img" for a in pictures)
    assert [a["scope"] for tag, a in page.seen if tag == "th"] == ["col"] * 3
    assert next(a["lang"] for tag, a in page.seen if tag == "html") == "en"


def _luminance(colour: str) -> float:
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_meets_wcag_in_both_schemes(scheme: int) -> None:
    """WCAG 2.1: text 4.5:1, graphics 3:1."""
    style = resources.files("mlxkd.report").joinpath("style.css").read_text()
    block = style.split("@media (prefers-color-scheme: dark)")[scheme]
    colours = dict(re.findall(r"--([a-z0-9]+): (#[0-9a-f]{6})", block))
    assert len(colours) == 15
    for name, needed in [("ink", 4.5), ("soft", 4.5), ("note", 4.5), ("good", 3), ("bad", 3), ("unsure", 3)] + [
        (f"c{i}", 3) for i in range(1, 7)
    ]:
        for ground in ("paper", "panel"):
            high, low = sorted((_luminance(colours[name]), _luminance(colours[ground])), reverse=True)
            assert (high + 0.05) / (low + 0.05) >= needed, (name, ground)


def test_light_fallbacks_of_pictures_equal_the_page_colours() -> None:
    style = resources.files("mlxkd.report").joinpath("style.css").read_text().split("@media")[0]
    for colour, variable in plots.THEME.items():
        assert f"{variable}: {colour}" in style


def test_markdown_escapes_and_names_the_method() -> None:
    text = sample().markdown()
    assert "| a\\|b | 12.3 ms (measured) | 3 |" in text
    assert "| c | not available here: needs macOS | – |" in text
    assert "````\na `b` ```c```\n````" in text
    assert "*Figure: Loss.* (falls \"fast\")" in text  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "words"),
    [
        (None, "–"),
        (True, "yes"),
        (3, "3"),
        (12345.6, "12,346"),
        (0.00001234, "1.23e-5"),
        (float("inf"), "∞"),
        (Metric(0.9712, "share", "predicted"), "97.1 %"),
        (Metric(0.9997, "share", "predicted"), "99.97 %"),
        (Metric(0.999996, "share", "predicted"), "99.99 %"),
        (Metric(1.0, "share", "predicted"), "100 %"),
        (Metric(23_400_000, "bytes", "predicted"), "23.4 MB"),
        (NO_MAC, "not available here: needs macOS"),
    ],
)
def test_values_in_words(cell: object, words: str) -> None:
    assert show_value(cell) == words  # type: ignore[arg-type]


def test_a_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table(("a", "b"), [(1, 2), (3,)])


def test_write_chooses_by_suffix(tmp_path: Path) -> None:
    assert sample().write(tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert sample().write(tmp_path / "r.md").read_text().startswith("# Title")
    with pytest.raises(UserError, match=r"a report is .html or .md, not '.pdf'"):
        sample().write(tmp_path / "r.pdf")


def test_notebook_display_is_a_fragment() -> None:
    shown = sample()._repr_html_()
    assert "<!doctype" not in shown
    assert Page(shown).open == []


def test_one_way_of_measuring_is_said_once_and_two_in_every_cell() -> None:
    same = Table(
        ["what", "a"], [["x", Metric(1.0, "ms", "measured", "CPU")], ["y", Metric(2.0, "ms", "measured", "CPU")]]
    )
    mixed = Table(["what", "a"], [["x", Metric(1.0, "ms", "measured", "CPU")], ["y", Metric(2.0, "ms", "predicted")]])
    for write in (Document("t", [same]).html, Document("t", [same]).markdown):
        assert write().count("All figures measured on CPU.") == 1
    assert '<span class="method' not in Document("t", [same]).html()
    assert Document("t", [mixed]).html().count('<span class="method') == 2
    assert Document("t", [mixed]).markdown().count("(measured)") == 1
