"""The pages say what the repository has measured, and what they show is there."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize(
    ("page", "benchmark", "option"),
    [
        ("README.md", "experiment", " --brief"),
        ("docs/experiment.md", "experiment", ""),
        ("docs/exchange.md", "bytes_sent", ""),
        ("docs/speed.md", "codec_speed", ""),
        ("docs/levels.md", "staleness", ""),
        ("docs/levels.md", "levels_table", ""),
        ("docs/levels.md", "drills", ""),
        ("docs/exchange.md", "two_phase_error", ""),
        ("docs/exchange.md", "exchange_memory", ""),
        ("docs/exchange.md", "exchange_time", ""),
        ("docs/exchange.md", "overlap_time", ""),
        ("docs/probe.md", "auto_choice", ""),
        ("docs/ddp.md", "ddp_time", ""),
        ("docs/ddp.md", "ddp_loss", ""),
    ],
)
def test_tables_are_those_of_the_committed_rows(monkeypatch, page, benchmark, option):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module(benchmark)
    table = module.brief_table() if option else module.table()
    shown = re.search(
        rf"<!-- table: benchmarks/{benchmark}.py{option} -->\n(.*?)\n<!-- end -->", (ROOT / page).read_text(), re.S
    )
    assert shown and shown.group(1) == table


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_are_there(page):
    links = re.findall(r"\]\((?!https:)([^)#]+)\)", page.read_text())
    assert all((page.parent / link).exists() for link in links), links


def test_the_readme_shows_a_picture_and_links_every_page():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"!\[[^]]+\]\(benchmarks/results/\w+\.png\)", readme)
    linked = {link.split("#")[0] for link in re.findall(r"\]\(([^)]+)\)", readme)}
    assert {str(page.relative_to(ROOT)) for page in PAGES} - {"README.md"} <= linked


def test_figures_of_the_readmes_text_are_those_of_the_tables(monkeypatch):
    """The sentences round figures of the tables off, or repeat them."""
    readme, exchange = " ".join((ROOT / "README.md").read_text().split()), (ROOT / "docs" / "exchange.md").read_text()
    ratio = float(re.search(r"qgenx\(bits=4\)`: adaptive.*\| ([\d.]+) \| [\d.]+ \|$", exchange, re.M).group(1))
    fp16 = float(re.search(r"`Compression.fp16` .*\| ([\d.]+) \| not measured", exchange).group(1))
    assert f"**{ratio:.0f} times fewer bytes**" in readme
    # K c < 2 d and K c < d, for the largest K.
    assert f"against float32 up to {int(2 * ratio)} ranks, and against fp16 up to {int(2 * ratio / fp16)}" in readme
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    times = importlib.import_module("exchange_time").brief_table()
    resnet, wgan = (
        re.search(rf"\| {link} \| 3 \| {model}.*\| step .*\| ([\d.]+) \| ([\d.]+) \|$", times, re.M).groups()
        for link, model in (("1gbit", "resnet50"), ("100mbit", "wgan"))
    )
    assert f"**{resnet[0]} times faster exchanges**" in readme and f"{wgan[0]} times for a WGAN at 100 Mbit/s" in readme
    assert f"fp16's bytes alone on those links {resnet[1]} and {wgan[1]} times" in readme
