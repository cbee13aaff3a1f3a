"""What tests of the page share: a reader of HTML that checks as it reads."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Reader(HTMLParser):
    """Asserts that tags balance, and that nothing is loaded or run. `text`: all that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.figures: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self._check(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self._check(tag, attrs)
        assert "svg" in self.open, f"<{tag}/> closes itself in SVG alone"

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        if not {"style", "title"} & set(self.open) or "svg" in self.open:
            self.text += data + "\n"
        if self.open[-1:] == ["figcaption"]:
            self.figures.append(data)

    def _check(self, tag, attrs):
        self.tags.append(tag)
        assert tag not in ("script", "img", "iframe", "object", "embed", "link", "base"), tag
        for name, value in attrs:
            assert not name.startswith("on") and name not in ("src", "href", "xlink:href", "style")
            assert "//" not in (value or ""), (name, value)
