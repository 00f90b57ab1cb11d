"""A check's report: as a short table for people, as one object for programs."""

import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sdtune.data.buckets import Bucket, bucket_table, table_lines
from sdtune.data.captions import counted, first_of
from sdtune.data.check import Report
from sdtune.data.check_findings import Finding
from sdtune.data.check_sizes import size_tables

WIDTH = 100  # of the table, in characters
SHOWN = 3  # names under a finding


def as_text(report: Report, title: str, facts: Sequence[tuple[str, str]]) -> str:
    """The table: what was found, the worst first; then sizes and other facts; then whether training would fail.

    Args:
        title: what was checked.
        facts: further lines, each a label and a text.
    """
    size = sum(look.size for look in report.good)
    of_entries = Counter(each.reading.entry.label for each in report.pictures)
    parts = ", ".join(f"{label} {count}" for label, count in of_entries.items())
    pictures = counted(len(report.pictures), "picture") + (f" ({parts})" if len(of_entries) > 1 else "")
    lines = [f"{title}: {pictures}, {counted(report.captions, 'caption')}, {megabytes(size)}", ""]
    for finding in report.findings:
        lines += _finding(finding)
    lines += [""] if report.findings else []
    for label, text in [*_sizes(report), *facts]:
        lines += textwrap.wrap(text, WIDTH, initial_indent=f"{label:<13}", subsequent_indent=" " * 13)
    lines += ["", *table_lines(_buckets(report))] if report.frame.buckets else []
    fatal = sum(finding.level == "fatal" for finding in report.findings)
    kinds = "1 kind of fault stands" if fatal == 1 else f"{fatal} kinds of faults stand"
    lines += ["", f"training would fail: {kinds} in its way" if fatal else "nothing stands in the way of training"]
    return "\n".join(lines)


def as_values(report: Report, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report for `--json`; every name is in it."""
    findings = [
        {
            "level": each.level,
            "kind": each.kind,
            "count": each.count,
            "what": each.what,
            "do": each.do,
            "names": list(each.names),
        }
        for each in report.findings
    ]
    return {
        "fails": report.fatal,
        "pictures": len(report.pictures),
        "captions": report.captions,
        "bytes": sum(look.size for look in report.good),
        "findings": findings,
        "sizes": size_tables(report.good, report.frame),
        "buckets": [asdict(each) for each in _buckets(report)],
        "equal": [[report.pictures[number].name for number in group] for group in report.equal],
        "alike": [[report.pictures[number].name for number in group] for group in report.alike],
        **facts,
    }


def _buckets(report: Report) -> list[Bucket]:
    """The sizes that instance pictures have in training; none without buckets."""
    buckets = report.frame.buckets
    return bucket_table(buckets, [(look.height, look.width) for look in report.learnt]) if buckets else []


def megabytes(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "KB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}" if unit != "bytes" else f"{size:.0f} bytes"
        size /= 1000
    return f"{size:.1f} GB"


def _finding(finding: Finding) -> Iterator[str]:
    head, indent = f"{finding.level:<8}{finding.count:>6}  ", " " * 16
    yield from textwrap.wrap(finding.what, WIDTH, initial_indent=head, subsequent_indent=indent)
    if finding.names:
        yield from textwrap.wrap(first_of(finding.names, SHOWN), WIDTH, initial_indent=indent, subsequent_indent=indent)
    yield from textwrap.wrap(f"-> {finding.do}", WIDTH, initial_indent=indent, subsequent_indent=indent + "   ")


def _sizes(report: Report) -> Iterator[tuple[str, str]]:
    tables = size_tables(report.good, report.frame)
    if not tables:
        return
    side, resize = tables["shorter_side"], tables["resize"]
    counts = ",  ".join(f"{name}: {number}" for name, number in tables["sides"].items())
    yield "shorter side", f"{side['least']} to {side['most']} px, median {side['median']}.  {counts}"
    yield "aspect", ",  ".join(f"{name} {number}" for name, number in tables["aspects"].items())
    yield "modes", ",  ".join(f"{name} {number}" for name, number in tables["modes"].items())
    yield (
        "resizing",
        f"to {report.frame.name}: {resize['enlarged']} enlarged, {resize['reduced']} reduced; "
        f"{resize['cropped_mean']:.0%} of a picture is cropped away on average",
    )
