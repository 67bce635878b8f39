"""Makes `debian-handbook.txt` from the Debian package of the same name, as the README beside it says.

Usage: python extract.py debian-handbook_11.20220922_all.deb > debian-handbook.txt
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

PAGES = "usr/share/doc/debian-handbook/html/en-US"
XHTML = "{http://www.w3.org/1999/xhtml}"
BLOCKS = ("pre", "table", "ul", "ol", "dl", "div")  # a paragraph that holds one is not plain prose
MIN_CHARACTERS = 200  # shorter paragraphs are mostly captions, commands and pointers
MAX_BYTES = 270_000


def pages(folder: Path) -> Iterator[Path]:
    """The book's pages in the order of its table of contents."""
    contents = (folder / "index.html").read_text(encoding="utf-8")
    names = re.findall(r'href="([\w.-]+\.html)', contents)
    for name in dict.fromkeys(names):  # each once, first mention first
        if name != "index.html":
            yield folder / name


def paragraphs(page: Path) -> Iterator[str]:
    """The page's paragraphs of running text, one line each, without the addresses that follow them."""
    for element in ElementTree.parse(page).iter(f"{XHTML}div"):
        if element.get("class") != "para":
            continue
        parts = [element.text or ""]
        for child in element:
            parts += [*([] if child.get("class") == "url" else child.itertext()), child.tail or ""]
        inner = [node for node in element.iter() if node.get("class") != "url" and node != element]
        if any(node.tag.removeprefix(XHTML) in BLOCKS for node in inner):
            continue
        text = " ".join("".join(parts).split())
        if len(text) >= MIN_CHARACTERS and text.endswith((".", "!", "?")):
            yield text


def main(package: str) -> None:
    """Writes the text to standard output, whole paragraphs up to MAX_BYTES."""
    num_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "--extract", package, folder], check=True)
        for page in pages(Path(folder) / PAGES):
            for text in paragraphs(page):
                block = (text + "\n\n").encode()
                num_bytes += len(block)
                if num_bytes > MAX_BYTES:
                    return
                sys.stdout.buffer.write(block)


if __name__ == "__main__":
    main(sys.argv[1])
