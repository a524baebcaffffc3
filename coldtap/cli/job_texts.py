"""What a job that wrote a store says at its end, as a sentence and in JSON; extraction and conversion say it alike."""

from typing import Any

from coldtap.text import show_bytes, show_seconds


def sentence(report: Any) -> str:
    """Return how a job ended, with what there is and where."""
    rejected = f", {report.n_rejected} rejected (see rejected.parquet)" if report.n_rejected else ""
    match report.status:
        case "forecast":
            ahead = report.forecast
            size, time = show_bytes(ahead.n_bytes), show_seconds(ahead.seconds)
            return f"would write {ahead.n_rows} rows, {size}, in about {time} to {report.store}; nothing was written"
        case "unchanged":
            return f"{report.store} is complete: {report.n_rows} rows{rejected}; nothing to do"
        case "relabelled":
            return f"{report.store} is complete: {report.n_rows} rows{rejected}; its labels were replaced"
        case _:
            return f"{report.store}: {report.n_rows} rows{rejected}; digest {report.digest}"


def as_dict(report: Any, **more: Any) -> dict[str, Any]:
    """Return the parts of a report for JSON, the forecast last."""
    ahead = report.forecast
    return {
        "store": str(report.store),
        "status": report.status,
        "digest": report.digest,
        "rows": report.n_rows,
        "rejected": report.n_rejected,
        **more,
        "forecast": ahead
        and {"rows": ahead.n_rows, "bytes": ahead.n_bytes, "seconds": ahead.seconds, "free_bytes": ahead.free_bytes},
    }
