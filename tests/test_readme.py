"""The README says what the repository has measured, and what it shows works."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("benchmark", ["bytes_sent", "codec_speed"])
def test_the_table_is_that_of_the_committed_rows(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    table = re.search(rf"<!-- table: benchmarks/{benchmark}.py -->\n(.*?)\n<!-- end -->", README, re.S)
    assert table and table.group(1) == importlib.import_module(benchmark).table()


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
