"""The rows of benchmarks/exchange_time.py as Markdown and as plots."""

from __future__ import annotations

import csv
from pathlib import Path

from laboratory import bits_per_second
from records import ROOT

RESULTS = ROOT / "benchmarks" / "results"
CELL = ("rate", "hosts", "model", "mode")
KEY = (*CELL, "method", "plan")
LOOPBACK = "loopback"
HEADINGS = {
    "method": "method",
    "plan": "plan",
    "ms": "ms (10 % to 90 %)",
    "float32_over_this": "float32 / this",
    "wire_ms": "wire ms",
    "this_over_wire": "this / wire",
    "fp16_wire_ms": "fp16's wire ms",
    "bits_per_coordinate": "bits",
    "cpu_ms": "CPU ms",
    "codec_ms": "codec alone",
    "cpu_over_codec": "CPU / codec",
    "cpu_beyond_codec_us_per_parameter": "CPU beyond the codec, us per parameter",
}
MARKERS = "osD^vP*X"  # of a plot's numbers of hosts, in their order


def newest(folder: Path = RESULTS) -> list[dict]:
    """The newest row of every method in every cell, in the order in which they first came."""
    with open(folder / "exchange_time.csv", newline="") as file:
        return list({tuple(row[name] for name in KEY): row for row in csv.DictReader(file)}.values())


def table(rows: list[dict] | None = None) -> str:
    """Markdown: a table for every cell, then eight hosts over three; None is all of the newest rows."""
    rows = newest() if rows is None else rows
    return "\n\n".join([*(_cell_table(found) for found in _by_cell(rows)), *_growth_table(rows)])


def brief_table(rows: list[dict] | None = None) -> str:
    """Markdown: a line for every cell with a network: Horovod's own, the faster plan at 4 bits, and the ratios."""
    lines = [_brief(found) for found in _by_cell(newest() if rows is None else rows) if found[0]["rate"] != LOOPBACK]
    headings = ["link", "hosts", "gradient", "timed", "Horovod, float32", "fp16", "qgenx, 4 bits", "plan",
                "float32 / qgenx", "fp16's wire alone / qgenx"]  # fmt: skip
    return "\n".join(_markdown(headings, lines))


def _brief(rows: list[dict]) -> list[str]:
    """Milliseconds; empty where a cell lacks the method."""
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    first, best = rows[0], min(by_method["wrapper_4"], key=lambda row: float(row["ms_median"]))
    shown = [(by_method.get(name) or [{"ms_median": ""}])[0]["ms_median"] for name in ("stock_float32", "stock_fp16")]
    times = [float(best["float32_over_this"]), float(best["fp16_wire_ms"]) / float(best["ms_median"])]
    ratios = [f"{ratio:.1f}" for ratio in times]
    place = [first["rate"], str(first["hosts"]), f"{first['model']}, {int(first['numel']):,}", first["mode"]]
    return [*place, *shown, str(best["ms_median"]), best["plan"], *ratios]


def summary(rows: list[dict]) -> list[str]:
    """A sentence for every cell, about the fastest of what is coded."""
    lines = []
    for found in _by_cell(rows):
        coded = [row for row in found if row["codec_ms"]]
        if not coded:
            continue
        best = min(coded, key=lambda row: float(row["ms_median"]))
        beside = [
            f"{float(row['ms_median']) / float(best['ms_median']):.2f} x as fast as {row['method']}"
            for row in found
            if row["method"].startswith("stock")
        ]
        wire = [f"{best['this_over_wire']} x its wire bound"] if best["this_over_wire"] else []
        cpu = f"CPU {best['cpu_over_codec']} x the codec's"
        place = ", ".join(str(best[name]) for name in CELL)
        lines.append(f"{place}: {best['method']}/{best['plan']} is {', '.join([*beside, *wire, cpu])}")
    return lines


def _by_cell(rows: list[dict]) -> list[list[dict]]:
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        cells.setdefault(tuple(str(row[name]) for name in CELL), []).append(row)
    return list(cells.values())


def _cell_table(rows: list[dict]) -> str:
    first = rows[0]
    cores = first["device"].split(", ")[-1]
    place = "on loopback" if first["rate"] == LOOPBACK else f"links of {first['rate']}"
    title = (
        f"{first['model']}: {int(first['numel']):,} coordinates in {int(first['num_parameters']):,} parameters; "
        f"{first['hosts']} hosts, {place}; timed: {first['mode']}. The hosts share {cores}, "
        "so codec time counts against what is coded."
    )
    if any(row["this_over_wire"] and float(row["this_over_wire"]) < 1 for row in rows):
        title += " A link lets 256 KiB through at once: what is not many times larger can be faster than its bound."
    return "\n".join([title, "", *_markdown(HEADINGS.values(), [_cells(row) for row in rows])])


def _cells(row: dict) -> list[str]:
    shown = {**row, "ms": f"{row['ms_median']} ({row['ms_p10']} to {row['ms_p90']})"}
    return [str(shown[name]) for name in HEADINGS]


def _growth_table(rows: list[dict]) -> list[str]:
    """One table, or none where no cell has both numbers of hosts."""
    times = {tuple(str(row[name]) for name in KEY): float(row["ms_median"]) for row in rows}
    lines = []
    for (rate, hosts, *rest), time in times.items():
        if hosts == "8" and (three := times.get((rate, "3", *rest))):
            lines.append([rate, *rest, f"{three:.4g}", f"{time:.4g}", f"{time / three:.2f}"])
    headings = ["rate", "model", "timed", "method", "plan", "3 hosts, ms", "8 hosts, ms", "8 / 3"]
    return ["\n".join(_markdown(headings, lines))] if lines else []


def _markdown(headings, lines: list[list[str]]) -> list[str]:
    headings = list(headings)
    rows = [f"| {' | '.join(cells)} |" for cells in [headings, *lines]]
    rows.insert(1, f"|{'---|' * len(headings)}")
    while any("|  |" in row for row in rows):  # empty cells have one space
        rows = [row.replace("|  |", "| |") for row in rows]
    return rows


def plot(rows: list[dict], folder: Path) -> None:
    """Pictures for each mode: how much faster than stock float32, and how far above the own wire bound."""
    try:
        import matplotlib
    except ImportError:
        return print("matplotlib is not installed, there is no plot (pip install 'hvd_qgenx[benchmarks]')")
    matplotlib.use("Agg")
    rows = [row for row in rows if row["rate"] != LOOPBACK]
    for mode in dict.fromkeys(row["mode"] for row in rows):
        here = [row for row in rows if row["mode"] == mode]
        _draw(here, "float32_over_this", "stock float32's time / this", folder / f"exchange_time_{mode}.png")
        _draw(here, "this_over_wire", "time / own wire bound", folder / f"exchange_time_{mode}_wire.png")


def _draw(rows: list[dict], column: str, title: str, path: Path) -> None:
    """A panel for each model, a line of it for each method; colours are rates, markers numbers of hosts."""
    from matplotlib import pyplot

    models, labels = _values(rows, "model"), list(dict.fromkeys(map(_label, rows)))
    kinds = sorted({(bits_per_second(row["rate"]), int(row["hosts"])) for row in rows})
    size = {"figsize": (4.5 * len(models) + 3, 0.3 * len(labels) + 1.5), "squeeze": False, "layout": "constrained"}
    figure, axes = pyplot.subplots(1, len(models), sharey=True, **size)
    for model, panel in zip(models, axes[0], strict=True):
        for rate, hosts in kinds:
            here = [row for row in rows if (row["model"], int(row["hosts"])) == (model, hosts)]
            points = {_label(row): float(row[column]) for row in here if bits_per_second(row["rate"]) == rate}
            _points(panel, kinds, (rate, hosts), [(points[label], labels.index(label)) for label in points])
        panel.axvline(1, color="black", linewidth=0.8)
        panel.set(title=model, xlabel=title)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    axes[0, 0].set_yticks(range(len(labels)), labels)
    axes[0, 0].invert_yaxis()
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _points(panel, kinds: list[tuple[float, int]], kind: tuple[float, int], points: list[tuple[float, int]]) -> None:
    rates, counts = sorted({rate for rate, _ in kinds}), sorted({hosts for _, hosts in kinds})
    rate, hosts = kind
    style = {"color": f"C{rates.index(rate)}", "marker": MARKERS[counts.index(hosts) % len(MARKERS)], "linestyle": ""}
    xs, ys = [x for x, _ in points], [y for _, y in points]
    panel.plot(xs, ys, **style, alpha=0.7, label=f"{rate / 1e6:g} Mbit/s, {hosts} hosts")


def _label(row: dict) -> str:
    return f"{row['method']}/{row['plan']}"


def _values(rows: list[dict], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))
