"""The README says what the repository has measured, and what it shows works."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_is_that_of_the_committed_rows(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    import bytes_sent

    table = re.search(r"<!-- table: benchmarks/bytes_sent.py -->\n(.*?)\n<!-- end -->", README, re.S)
    assert table and table.group(1) == bytes_sent.table()


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
