"""Counting what was rejected, and ending a job that rejects too much."""

from coldtap.errors import TooManyRejectedError
from coldtap.pipeline.images.sources import Source
from coldtap.stores.format.journal import JournalLine
from coldtap.stores.format.rows import RowPlan


class Rejections:
    """Samples with a rejected row, against the share that a job allows."""

    def __init__(self, plan: RowPlan, source: Source, share: float) -> None:
        self._plan = plan
        self._source = source
        self._share = share
        self._reasons: dict[int, str] = {}
        self.n_rows = 0

    def count(self, line: JournalLine) -> None:
        """Take in a finished block.

        Raises:
            TooManyRejectedError: the share is passed; the blocks that are done stay.
        """
        samples = {row.number: row.sample for row in self._plan.block(line.block)} if line.rejected else {}
        for rejection in line.rejected:
            self._reasons.setdefault(samples[rejection.row], rejection.reason)
        self.n_rows += len(line.rejected)
        if len(self._reasons) > self._share * self._plan.n_samples:
            examples = [f"{self._source.where(s)}: {reason}" for s, reason in list(self._reasons.items())[:3]]
            raise TooManyRejectedError(
                f"{len(self._reasons)} of {self._plan.n_samples} samples cannot be used, more than "
                f"`max_rejected={self._share:g}` allows: {'; '.join(examples)}. Mend or remove those images (and "
                f"choose a new store path), or allow more{self._advice()}"
            )

    def _advice(self) -> str:
        overflows = any("overflows" in reason for reason in self._reasons.values())
        return "; `tier='bfloat16'` or float32 keeps values of any size" if overflows else ""
