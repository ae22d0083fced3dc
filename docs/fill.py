"""The numbers in the pages are those of the files that the benchmarks write: `python docs/fill.py` puts them there.

What stands between `<!-- results/x.md -->` and `<!-- end -->` in README.md and docs/*.md becomes the content of
docs/results/x.md. A test fails while a page shows anything else.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- (results/\w+\.md) -->\n).*?(<!-- end -->)", re.S)


def filled(text):
    return BLOCK.sub(lambda m: f"{m[1]}\n{(DOCS / m[2]).read_text(encoding='utf-8').strip()}\n\n{m[3]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
