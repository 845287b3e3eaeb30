"""The table of `adamss.summary` in a notebook."""

from html.parser import HTMLParser

import pytest

from adamss.verbs.table import Summary, SummaryRow, total

COLUMNS = ["layer", "shape", "K", "R", "q", "trained", "active"]
HOSTILE = "</td></table><script>alert('&')</script>"


class Reader(HTMLParser):
    """Collects the text of each cell and of the caption, as a browser would show it, and which tags there are."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = set(), {}
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag != "br":
            self.inside = tag
            self.texts.setdefault(tag, []).append("")

    def handle_data(self, data):
        self.texts[self.inside][-1] += data


@pytest.mark.parametrize("path", ["layer.0.query", HOSTILE])
def test_a_notebook_shows_what_is_printed_and_no_markup_of_a_file(path):
    row = SummaryRow(path, (3, 4), K=2, R=3, q=2, trained=1000, active=1)
    summary = Summary((row,), total([row]), saved=7, targets=(path, "value"), tokens=5, name=path)
    shown = Reader(summary._repr_html_())
    assert shown.tags == {"table", "caption", "br", "thead", "tbody", "tr", "th", "td"}
    assert [text.strip() for text in shown.texts["th"]] == COLUMNS
    cells = [text.strip() for text in shown.texts["td"]]
    assert cells == [path, "3 x 4", "2", "3", "2", "1,000", "1/2", "total", "", "2", "", "2", "1,000", "1/2"]
    assert shown.texts["caption"][0].strip().splitlines() == [
        f"adapter: {path}",
        f"targets: {path}, value",
        "trained_tokens: 5 parameters",
        "modules_to_save: 7 trained parameters",
    ]


def test_a_table_without_notes_has_no_caption():
    row = SummaryRow("query", (3, 4), K=2, R=3, q=2, trained=1000, active=1)
    assert "caption" not in Reader(Summary((row,), total([row]))._repr_html_()).tags
