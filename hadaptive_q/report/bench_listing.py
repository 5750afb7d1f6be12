"""Measured files as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def bench_listing(results: Sequence[Mapping[str, Any]]) -> str:
    """Return what `bench.bench_files` measured for a terminal, with shares where `of_compared` has them."""
    return "\n".join(line for result in results for line in _lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    shares = result.get("of_compared", {"arm": {}})
    yield f"{result['file']}: {result['bytes']:,} bytes{_share(shares.get('bytes'))}"
    host = f"{result['host_ms_median']:.3f} ms, spread {result['host_ms_spread']:.3f}"
    yield f"  this host: {host}{_share(shares.get('host_ms_median'))}"
    for name, cost in result["arm"].items():
        classes = ", ".join(f"{kind} {count:,}" for kind, count in cost["by_class"].items())
        yield f"  {name}: {cost['instructions']:,} instructions{_share(shares['arm'].get(name))} ({classes})"
        if cost["missing_features"]:
            lacking = ", ".join(cost["missing_features"])
            yield f"    wants {lacking}, which {name} lacks: 4-bit weights ran by a scalar fallback"
        for operator, count in cost.get("operators", {}).items():
            yield f"    {count:>12,}  {operator}"


def _share(share: float | None) -> str:
    return "" if share is None else f", {share:.3f} of the compared file"
