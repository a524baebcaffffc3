"""A process that has imported coldtap once and forks a child for each job: a kill then costs a second, not five.

Each child is a process of its own that runs the command line, and dies as one. The server runs no torch
operation and has no thread besides the one of pyarrow's jemalloc, which knows about forks: forking it is safe.

    with ForkServer() as server:
        job = server.start("cache-features", str(source), str(store), fault="shard-renamed:3")
        assert job.wait() == -signal.SIGKILL
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.helpers.places import ROOT


class Job:
    """A command that runs in a child of the server; what it prints is in `out` and `err` when it has ended."""

    def __init__(self, server: "ForkServer", pid: int, output: Path) -> None:
        self.pid = pid
        self._server = server
        self._output = output
        self._status: int | None = None

    def wait(self) -> int:
        """Return the exit code, or minus the signal that killed it, as `subprocess` does."""
        if self._status is None:
            self._status = self._server.ask({"wait": self.pid})["status"]
        return self._status

    def send(self, number: int) -> None:
        """Send a signal to the job alone."""
        os.kill(self.pid, number)

    def has_ended(self) -> bool:
        """Whether it has ended; the server has not reaped it yet, so that its number stays its own."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    @property
    def out(self) -> str:
        return self._output.with_suffix(".out").read_text()

    @property
    def err(self) -> str:
        return self._output.with_suffix(".err").read_text()


class ForkServer:
    """Starts jobs and waits for them; those that are left when it closes are killed."""

    def __enter__(self) -> "ForkServer":
        self._folder = tempfile.TemporaryDirectory()
        self._n_jobs = 0
        self._process = subprocess.Popen(
            # Python warns of any thread when it forks.
            [sys.executable, "-W", "ignore::DeprecationWarning:__main__", "-m", "tests.helpers.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
        self._folder.cleanup()

    def start(
        self, *argv: object, fault: str | None = None, file_bytes: int | None = None, heed_modes: bool = False
    ) -> Job:
        """Run a command of `coldtap`.

        `fault` is a named fault point and how often it is passed; `file_bytes` the most that a file may hold;
        `heed_modes` takes away root's right to pass over the modes of files.
        """
        self._n_jobs += 1
        output = Path(self._folder.name) / str(self._n_jobs)
        limits = {"fault": fault, "file_bytes": file_bytes, "heed_modes": heed_modes}
        reply = self.ask({"start": [str(word) for word in argv], "output": str(output), **limits})
        return Job(self, reply["pid"], output)

    def ask(self, request: dict[str, object]) -> dict[str, int]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        reply: dict[str, int] = json.loads(self._process.stdout.readline())
        return reply


def _serve() -> None:
    # Imported once, for all children: what the commands import when they run, torch and timm with it.
    import coldtap.adaptors.training.train
    import coldtap.cli.main
    import coldtap.pipeline.job
    import coldtap.pipeline.quantisation.quantize
    import coldtap.pipeline.run.extraction  # noqa: F401

    running = set()
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            running.discard(request["wait"])
            reply = {"status": os.waitstatus_to_exitcode(status)}
        else:
            pid = os.fork()
            if pid == 0:
                _run(request)
            running.add(pid)
            reply = {"pid": pid}
        print(json.dumps(reply), flush=True)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _run(request: dict[str, Any]) -> None:
    from coldtap.cli.main import app

    code = 1
    try:
        for descriptor, suffix in ((0, None), (1, ".out"), (2, ".err")):
            path = os.devnull if suffix is None else request["output"] + suffix
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), descriptor)
        if request["fault"] is not None:
            os.environ["COLDTAP_FAULT"] = request["fault"]
        if request["file_bytes"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_bytes"],) * 2)
        if request["heed_modes"]:
            _heed_modes()
        app(request["start"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _heed_modes() -> None:
    """Give up what lets root pass over modes (capabilities(7)); for others nothing changes."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; the low words first
    assert libc.capget(header, sets) == 0
    for i in (0, 1):
        sets[i] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, sets) == 0


if __name__ == "__main__":
    _serve()
