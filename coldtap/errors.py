"""The error tree of coldtap: one base, one exit code a branch.

    ColdtapError                 1
    ├── OptionError              2   an argument that cannot be what was meant
    ├── SourceError              3   images, labels or splits that cannot be used
    │   └── TooManyRejectedError 8   more unusable images than the run allows
    ├── ModelError               4   backbone, checkpoint or taps
    ├── StoreError               5   the path, the recipe or the gather does not fit the request
    │   ├── RecipeMismatchError  5   the store holds another recipe
    │   ├── StoreLockedError     5   another job writes to the store
    │   ├── MissingFeaturesError 5   the store lacks what an adaptor needs
    │   ├── IncompleteStoreError 6   no manifest: the job that writes it has not finished
    │   └── CorruptStoreError    6   bytes that are not what the manifest, a crc or the metadata says
    ├── MachineError             7   disk, permission or device
    ├── MissingExtraError        7   a library that is not installed, and the extra that brings it
    ├── RunError                 9   a run folder that cannot be read, resumed or overwritten
    └── InterruptedRunError    130   stopped by Ctrl-C or SIGTERM (143); finished work is kept

A message says what was asked, what was found, where, and what to do. The command line prints it as one
line and exits with the code; nothing that was already written is lost.
"""


class ColdtapError(Exception):
    """Base of every error that coldtap raises for something its caller can mend."""

    exit_code = 1


class OptionError(ColdtapError, ValueError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class SourceError(ColdtapError, ValueError):
    """A source of images, its labels or its splits cannot be used."""

    exit_code = 3


class TooManyRejectedError(SourceError):
    """More samples were unusable than the run allows."""

    exit_code = 8


class ModelError(ColdtapError, ValueError):
    """A backbone, checkpoint or tap cannot be used."""

    exit_code = 4


class StoreError(ColdtapError):
    """A store, or the path meant for one, does not fit what was asked."""

    exit_code = 5


class RecipeMismatchError(StoreError):
    """A store was made by another recipe than the one asked for."""


class StoreLockedError(StoreError):
    """Another job holds the store's lock."""


class MissingFeaturesError(StoreError, KeyError):
    """A store lacks a gather, tap, split or row that was asked for."""

    def __str__(self) -> str:
        """Return the message itself, without the quotes that KeyError adds."""
        return str(self.args[0]) if self.args else ""


class IncompleteStoreError(StoreError):
    """A store has no manifest: the job that writes it has not finished."""

    exit_code = 6


class CorruptStoreError(StoreError):
    """Stored bytes are not what the manifest, a checksum or the metadata says."""

    exit_code = 6


class MachineError(ColdtapError, OSError):
    """The machine refuses: a full disk, a missing permission, no such device."""

    exit_code = 7


class MissingExtraError(ColdtapError, ImportError):
    """An extra of the package, which a command or an argument needs, is not installed."""

    exit_code = 7


class RunError(ColdtapError):
    """A run folder cannot be read, resumed or overwritten."""

    exit_code = 9


class InterruptedRunError(ColdtapError):
    """The user or the system stopped the work; what was finished is kept."""

    exit_code = 130
