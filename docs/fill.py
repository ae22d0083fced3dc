"""Puts the numbers that the experiments write into the pages: `python docs/fill.py`.

What stands between `<!-- results/x.md -->` and `<!-- end -->` in README.md and docs/*.md becomes
the content of docs/results/x.md; after `<!-- results/x.md: all, Action Reasoning -->` it is the
head of its table and these rows. A test fails while a page shows anything else.
"""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parent
PAGES = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCK = re.compile(r"(<!-- (results/\w+\.md)(?:: ([^>]+))? -->\n).*?(<!-- end -->)", re.S)


def shown(file, rows):
    text = (DOCS / file).read_text(encoding="utf-8").strip()
    if not rows:
        return text
    table = [line for line in text.split("\n") if line.startswith("|")]
    named = {line.split("|")[1].strip(): line for line in table[2:]}
    return "\n".join([*table[:2], *(named[name.strip()] for name in rows.split(","))])


def filled(text):
    return BLOCK.sub(lambda m: f"{m[1]}\n{shown(m[2], m[3])}\n\n{m[4]}", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
