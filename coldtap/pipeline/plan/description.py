"""What a job is, in values that travel: every process that is told them does the same blocks."""

from dataclasses import dataclass
from typing import Any, Self

from coldtap.errors import OptionError
from coldtap.pipeline.images.sources import Source, open_source
from coldtap.pipeline.plan.options import EncodingOptions, ExtractorOptions, RowOptions


@dataclass(frozen=True, kw_only=True)
class JobDescription:
    """All that decides a store's bytes; `source` may also be an opened one."""

    source: Any
    extractor: ExtractorOptions
    rows: RowOptions
    encoding: EncodingOptions

    def dumps(self) -> bytes:
        """Pickle it, with the classes that only `__main__` has.

        Raises:
            OptionError: a source or a module from Python cannot be pickled.
        """
        import cloudpickle  # type: ignore[import-untyped] # of the extra `cluster`

        try:
            return bytes(cloudpickle.dumps(self))
        except Exception as error:  # whatever the pickling of a caller's object raises
            raise OptionError(
                f"`workers` sends source and model to other processes, and one of them cannot be pickled "
                f"({type(error).__name__}: {error}): mend that, or use `workers=1`"
            ) from error

    @classmethod
    def loads(cls, pickled: bytes) -> Self:
        """Return the description of `dumps`.

        Raises:
            OptionError: the source or the module cannot be made anew in this process.
        """
        import cloudpickle

        try:
            description = cloudpickle.loads(pickled)
        except Exception as error:
            raise OptionError(
                f"a worker process cannot make source or model anew ({type(error).__name__}: {error}): "
                "define their classes in a module that can be imported, or use `workers=1`"
            ) from error
        assert isinstance(description, cls)
        return description

    def open_source(self) -> Source:
        """List the images.

        Raises:
            SourceError: they cannot be used.
        """
        if hasattr(self.source, "listing") and hasattr(self.source, "read"):
            opened: Source = self.source
            return opened
        return open_source(self.source, seed=self.rows.seed)
