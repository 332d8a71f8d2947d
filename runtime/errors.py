"""Everything the runtime raises on purpose.

::

    ScansideError
    ├── GeometryError         planes that make no stack (not parallel, no extent)
    ├── BundleError           a model bundle that can't be read or trusted
    │   ├── BundleTampered    a file's hash or the signature is not what it should be
    │   └── NotVerified       a precision that no verdict has passed
    ├── BackendError          an inference engine that can't be opened
    │   └── NotForBackend     a precision that it takes on no machine
    ├── InferenceError        an engine that ran and gave no valid answer
    │   ├── NoPlan            slices of a size that no plan is for
    │   └── DeviceLost        a GPU that failed or hangs: only a new process helps
    │       └── ServerLost    no server answers, and no local engine may: a new process waits for one
    │           └── OutOfTime no answer in what others had left of the time, which says nothing about the server
    └── SelfTestFailed        an engine whose answers on the golden slices are not the bundle's

Each message names the thing, the reason and the remedy. `exit_code` is what the command line ends with: 1 where a
check found something, 2 for what the user wrote, 3 for what the machine lacks.
"""

from typing import ClassVar


class ScansideError(Exception):
    """Base of all errors that scanside raises on purpose."""

    exit_code: ClassVar[int] = 2


class GeometryError(ScansideError):
    """Planes that do not form a stack of parallel slices."""


class BundleError(ScansideError):
    """A model bundle that can't be read: a file missing, a manifest of another kind."""


class BundleTampered(BundleError):
    """A file of the bundle has not the SHA-256 that the manifest records."""

    exit_code: ClassVar[int] = 1


class NotVerified(BundleError):
    """A precision of the bundle that has not passed `scanside verify`, or has changed since."""

    exit_code: ClassVar[int] = 1


class BackendError(ScansideError):
    """The asked-for inference backend can't be opened on this machine."""

    exit_code: ClassVar[int] = 3


class NotForBackend(BackendError):
    """A precision that the asked-for backend takes on no machine."""

    exit_code: ClassVar[int] = 2


class InferenceError(ScansideError):
    """The engine ran and its output is not a valid answer."""

    exit_code: ClassVar[int] = 1


class NoPlan(InferenceError):
    """Slices of a size that TensorRT has no plan for."""

    exit_code: ClassVar[int] = 3


class DeviceLost(InferenceError):
    """CUDA reported an error, or a batch did not end: the process that holds the GPU must start anew."""

    exit_code: ClassVar[int] = 3


class ServerLost(DeviceLost):
    """No server that has the model answers: nothing is wrong with the slices, which the next process gets again."""


class OutOfTime(ServerLost):
    """A server gave no answer in less time than it has: others took the rest, and it may well be in good health."""


class SelfTestFailed(ScansideError):
    """The engine's answers on the bundle's golden slices differ from those recorded."""

    exit_code: ClassVar[int] = 1
