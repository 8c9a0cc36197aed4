"""The README says what the repository has measured, and what it shows works."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("page", "benchmark"),
    [
        ("README.md", "bytes_sent"),
        ("README.md", "staleness"),
        ("README.md", "codec_speed"),
        ("docs/levels.md", "levels_table"),
    ],
)
def test_tables_are_those_of_the_committed_rows(monkeypatch, page, benchmark):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    table = importlib.import_module(benchmark).table()
    shown = re.search(
        rf"<!-- table: benchmarks/{benchmark}.py -->\n(.*?)\n<!-- end -->", (ROOT / page).read_text(), re.S
    )
    assert shown and shown.group(1) == table


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
