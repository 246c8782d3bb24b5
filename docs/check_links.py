"""Every internal link of the built site leads to a file and an anchor in it, no page loads anything from elsewhere, and
tables are tables.
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse


class Page(HTMLParser):
    "Links, anchors, and what is loaded."

    def __init__(self, file):
        super().__init__()
        self.links, self.anchors, self.loads = [], set(), []
        text = file.read_text(encoding="utf-8")
        self.bars = re.findall(r"<p>(\|[^<]{,60})[^<]*\|[-—]+\|", text)  # a table in Markdown, left as it was
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.anchors |= {a[k] for k in ("id", "name") if a.get(k)}
        if tag == "a" and a.get("href"):
            self.links.append(a["href"])
        if tag in ("script", "img", "source", "iframe") and a.get("src"):
            self.loads.append(a["src"])
        if tag == "link" and a.get("rel") in ("stylesheet", "icon", "preload") and a.get("href"):
            self.loads.append(a["href"])


def problems(folder: Path):
    pages = {file.resolve(): Page(file) for file in folder.rglob("*.html")}
    for file, page in pages.items():
        yield from (f"{file.relative_to(folder)}: a table was not rendered: {bars}" for bars in page.bars)
        for link in [*page.links, *page.loads]:
            address, anchor = urldefrag(link)
            if urlparse(link).scheme or link.startswith("//"):
                if link in page.loads and not link.startswith("data:"):
                    yield f"{file.name}: loads {link} from elsewhere"
                continue
            target = (file.parent / unquote(urlparse(address).path)).resolve() if address else file
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                yield f"{file.relative_to(folder)}: {link}"
            elif anchor and target in pages and unquote(anchor) not in pages[target].anchors:
                yield f"{file.relative_to(folder)}: {link} (no such anchor)"


if __name__ == "__main__":
    found = list(problems(Path(sys.argv[1]).resolve()))
    if found:
        sys.exit("\n".join(["The site has faults:", *found]))
