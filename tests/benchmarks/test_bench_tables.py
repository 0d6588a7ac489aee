"""Pictures and tables, drawn from the CSV of results alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench_common import MACHINE, NO_TIME, PEAKS
from benchmarks import front, harness, plot, rows, runner


def sweep_rows() -> list[rows.Row]:
    """A sweep of two providers over five sizes and one further shape, as they come back from a file."""
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    for n, d in ((256, 128), (512, 128), (1024, 128), (2048, 128), (4096, 128), (512, 512)):
        case = harness.Case("nt_xent", {"N": n, "D": d})
        for provider, factor in (("sslfast", 1.0), ("eager", 4.0)):
            times = [factor * n / 256 * scale for scale in (0.9, 1.0, 1.2)]
            made.report.rows.append(made._row(case, provider, "time_ms", times, 0.5, 4.0 / factor))
            made.report.rows.append(made._row(case, provider, "peak_mib", [factor * n], None, None))
    return [{key: str(value) for key, value in row.items()} for row in made.report.rows]


def test_the_longest_sweep_is_found() -> None:
    of_op = [row for row in sweep_rows() if row["op"] == "nt_xent"]
    key, fixed, chosen = plot.sweep(of_op)
    assert (key, fixed) == ("N", {"D": 128})
    assert {json.loads(row["shape"])["N"] for row in chosen} == {256, 512, 1024, 2048, 4096}
    assert plot.sweep([row for row in of_op if json.loads(row["shape"])["N"] > 1024]) is None


def test_what_ran_out_of_memory_says_so_in_the_table() -> None:
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    case = harness.Case("clip", {"N": 65536, "D": 512}, "bfloat16", "both", "cuda")
    made.report.rows.append(made._row(case, "sslfast", "time_ms", [40.0] * 5, 0.5, None))
    made.report.rows.append(made._row(case, "eager", "out_of_memory", [], None, None))
    text = plot.markdown("clip", [{key: str(value) for key, value in row.items()} for row in made.report.rows])
    assert "| N | D | eager PyTorch [ms] | sslfast [ms] |" in text
    assert "| 65536 | 512 | out of memory | 40 (40–40) |" in text


def test_names_at_the_line_ends_do_not_overlap() -> None:
    assert plot.spread([1.0, 1.1, 9.0], 2.0) == [1.0, 2.0, 9.0]
    assert plot.spread([], 2.0) == []


def test_a_sweep_is_drawn_small_and_from_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "cpu.csv"
    rows.write_csv(path, sweep_rows())
    (picture,) = plot.draw(path)
    data = picture.read_bytes()
    assert picture.name == "cpu-nt_xent-float32.png"
    assert data.startswith(b"\x89PNG") and 5_000 < len(data) < 150_000


def test_the_readme_block_is_rewritten_from_the_csv(tmp_path: Path) -> None:
    rows.write_csv(tmp_path / "cpu.csv", sweep_rows())
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- benchmark:nt_xent -->\nold numbers\n<!-- /benchmark -->\nbelow\n")
    command = ["--results", str(tmp_path), "--readme", str(readme)]
    assert plot.main(command) == 0
    text = readme.read_text()
    assert text.startswith("above\n<!-- benchmark:nt_xent -->\n") and text.endswith("<!-- /benchmark -->\nbelow\n")
    assert "old numbers" not in text and "**AMD EPYC, 2 threads**" in text
    assert "| N | D | eager PyTorch [ms] | sslfast [ms] | speed-up |" in text
    assert "| 4096 | 128 | 64 (60.2–71.7) | 16 (15–17.9) | 4.0× | 50% | 16400 | 4100 |" in text
    assert plot.main(command) == 0 and readme.read_text() == text


def front_rows(command: str = "python -m benchmarks adapters nt_xent") -> list[rows.Row]:
    """What the README's table needs: four losses without and with sslfast, and the sweep of the picture."""
    made = runner.Runner(MACHINE, PEAKS, NO_TIME)
    for loss, n, d in front.CHOSEN:
        case = harness.Case("adapters", {"package": "lightly 1.6.0", "loss": loss, "N": n, "D": d})
        for provider, factor in (("unpatched", 12.0), ("sslfast", 1.0)):
            # The median of the rounds' ratios is another number than the ratio of the medians, which the table shows.
            made.report.rows.append(made._row(case, provider, "time_ms", [100.0 * factor] * 5, 0.5, 7.0 / factor))
            made.report.rows.append(made._row(case, provider, "peak_mib", [8.0 * factor], None, None))
    found = [{key: str(value) for key, value in row.items()} for row in made.report.rows] + sweep_rows()
    return [{**row, "command": command} for row in found]


def test_the_front_table_is_short_and_of_one_run() -> None:
    made = front_rows()
    text = front.table(made)
    assert "| lightly 1.6.0 `VICRegLoss` | N = 256, D = 8192 | 1,200 ms | 100 ms | 12× | 12× |" in text
    assert text.count("\n| ") == len(front.CHOSEN) and "another run" not in text
    assert max(len(line) for line in text.splitlines() if not line.startswith("|")) <= 100

    earlier = [{**row, "command": "earlier"} if row["op"] == "nt_xent" else row for row in made]
    assert "The picture is of another run" in front.table(earlier)
    mixed = [{**row, "command": "earlier"} if row["provider"] == "unpatched" else row for row in made]
    with pytest.raises(ValueError, match="would be of 2 runs; run python -m benchmarks adapters nt_xent"):
        front.table(mixed)
    with pytest.raises(ValueError, match="lacks NTXentLoss 2048 × 128; run python -m benchmarks"):
        front.table([row for row in made if '"N": 2048, "D": 128' not in row["shape"] or row["op"] != "adapters"])
    assert front.table(sweep_rows()) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no block", "has no block"),
        ("<!-- benchmark:nt_xent -->\nnever closed", "each needs its own line"),
        ("<!-- benchmark:other -->\n<!-- /benchmark -->", "benchmark:other has no results"),
    ],
)
def test_a_readme_without_a_proper_block_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot.rewrite(text, {"nt_xent": "table"})
