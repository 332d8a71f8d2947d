"""One server that speaks KServe v2, such as NVIDIA Triton: a connection that is checked before it answers anything.

https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol

Only calls of the protocol itself are needed. What Triton adds is used where the server says that it has it: a model's
configuration, which carries the hashes; binary tensors over HTTP; and shared memory with a server on this machine.
"""

from __future__ import annotations

import itertools
import mmap
import os
import re
import secrets
import shlex
import time
from contextlib import suppress
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.client import HEALTH_S, LONGEST_S, Address, connect, library, told
from runtime.errors import BackendError, InferenceError, NoPlan, OutOfTime, ServerLost
from runtime.session import checked, identity, self_test

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from runtime.bundle import Bundle
    from runtime.types import SliceLabels

BUNDLE, GRAPH, PRECISION = "bundle_sha256", "graph_sha256", "precision"  # a model's parameters in the repository
CHECKED = "graph_checked_by"  # and another, where something on the server hashes the file before it runs it
VERSION = "1"  # of a model in the repository: another bundle has another name
OUTPUTS = {"labels": np.uint8, "evidence": np.float32}
MOST_VIEWS = 4  # in a request; larger batches are the server's to make, of several nodes' requests
CHECK_S = 10.0  # between looks at a model's hashes: a server may start anew behind a connection that goes on
NO_LABEL = 255  # no bundle has so many classes
SHARED = Path("/dev/shm")  # noqa: S108  # where POSIX shared memory lies on Linux: the server opens it by name
ALIGNED = 64


def model_name(bundle: Bundle, precision: str) -> str:
    """Name of the model that a bundle's precision has in a repository: it says which bundle, so that no other answers.

    So a new bundle stands beside the old one in a repository, and each node gets its own.
    """
    return re.sub(r"[^A-Za-z0-9_]", "_", f"{bundle.name}_{precision}_{bundle.digest[:12]}")


class Server:
    """A connection to a model on a server; a `Session`, which lasts until something fails.

    Parameters
    ----------
    deadline_s : for each slice of a request, padding included; the answer that takes longer is given up, and so is
        one that takes longer than half of `LONGEST_S`
    until : clock (`time.monotonic`) at which whatever is asked is given up; as an attribute it can be set anew

    Raises
    ------
    BackendError : no tritonclient, no server, one that is not ready, or has another model
    SelfTestFailed, InferenceError : its answers on the golden slices are not the bundle's

    """

    def __init__(self, address: Address, bundle: Bundle, precision: str, deadline_s: float, until: float = inf) -> None:
        self._address, self._deadline_s, self.until, self._has_answered = address, deadline_s, until, False
        self._model = model_name(bundle, precision)
        self._bundle, self._precision = bundle, precision
        self._classes, self._view = len(bundle.classes), bundle.view
        self._memory: _Shared | None = None
        self._library = library(address)
        self._client = connect(address)
        try:
            with told(address):
                self._open()
            self_test(self, bundle)
        except BaseException:
            self.close()
            raise

    def infer(self, hu: NDArray[np.int16] | NDArray[np.int32]) -> list[SliceLabels]:
        """Labels of the slices that N views answer, from HU ``(N, shown, H, W)``.

        Raises
        ------
        ServerLost : no answer in time, no connection, or a server that can't go on
        OutOfTime : one of these, which `until` gave less time than the server has
        NoPlan : the model is of slices of another size
        InferenceError : the server refuses the request, or its answer is not valid

        """
        if time.monotonic() - self._checked > CHECK_S:
            try:
                with told(self._address):
                    self._check_hashes()
            except BackendError as error:
                raise ServerLost(str(error)) from None
        size = hu.shape[2:]
        if self.sizes is not None and size not in self.sizes:
            raise NoPlan(f"{self._address}: {self._model} takes slices of {self.sizes[0]}, not of {size}")
        answers: list[SliceLabels] = []
        first = self.max_batch if self._has_answered else 1  # a server whose inference alone hangs costs one deadline
        for start, end in itertools.pairwise(sorted({0, *range(first, len(hu), self.max_batch), len(hu)})):
            views = hu[start:end]
            slices = len(views) * self._view.answered
            if self._fixed:
                views = np.pad(views, ((0, self._fixed - len(views)), (0, 0), (0, 0), (0, 0)), mode="edge")
            arrays = self._ask(views, (len(views) * self._view.answered, *size))
            answers += checked(*(array[:slices] for array in arrays), self._classes, (slices, *size))
            self._has_answered = True
        return answers

    def reconnect(self) -> None:
        """Go on by another connection and other memory: what was given up may still come by those there are."""
        self.close()
        self._client, self._checked = connect(self._address), -inf

    def close(self) -> None:
        """Give back the memory that is shared, and the connection."""
        try:
            if self._memory:
                with told(self._address):
                    self._client.unregister_system_shared_memory(self._memory.name, client_timeout=HEALTH_S)
        except InferenceError:  # it is gone, and its mapping with it
            pass
        finally:
            if self._memory:
                self._memory.close()
                self._memory = None
            self._client.close()

    # opening

    def _open(self) -> None:
        address, (server, model) = self._address, self._look()
        extensions = server.get("extensions", ())
        self._tells_hashes = "model_configuration" in extensions
        self._check_hashes()
        self._take_shape(model)
        self._is_binary = address.scheme == "grpc" or "binary_tensor_data" in extensions
        self._shares = address.scheme == "grpc" and address.is_here and "system_shared_memory" in extensions
        engine = f"{server.get('name', 'KServe')} {server.get('version', '')} {model.get('platform', '')}"
        self.identity = identity(self._bundle, self._precision, " ".join(engine.split()))
        self.why = f"{address}, {self._way()}"

    def _look(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What server and model say of themselves, once they are ready."""
        try:
            if not (self._call("is_server_live") and self._call("is_server_ready")):
                raise BackendError(f"{self._address}: the server is not ready: see its log")
            server = self._call("get_server_metadata", **self._as_json)
            if not self._call("is_model_ready", self._model, VERSION):
                raise BackendError(f"{self._address}: no model {self._model} that is ready: {self._remedy}")
            return server, self._call("get_model_metadata", self._model, VERSION, **self._as_json)
        except OutOfTime as error:
            raise BackendError(str(error)) from None
        except InferenceError as error:
            raise BackendError(f"{error}: does a server that speaks KServe v2 run there?") from None

    def _check_hashes(self) -> None:
        """Refuse a model that was not written from this bundle, where the server tells what it was written from."""
        self._checked = time.monotonic()
        if not self._tells_hashes:
            return
        config = self._call("get_model_config", self._model, VERSION, **self._as_json)
        parameters = config.get("config", config).get("parameters", {})
        self._is_checked = CHECKED in parameters
        graph = self._bundle.sha256(self._precision)
        for key, ours in ((BUNDLE, self._bundle.digest), (GRAPH, graph), (PRECISION, self._precision)):
            theirs = parameters.get(key, {}).get("string_value")
            if theirs != ours:
                raise BackendError(
                    f"{self._address}: {self._model} is another model: its {key} is {theirs or 'not told'}, that of "
                    f"{self._bundle.folder} is {ours}: {self._remedy}"
                )

    @property
    def _remedy(self) -> str:
        words = "scanside", "bundle", "triton", str(self._bundle.folder), "--precision", self._precision
        return f"`{shlex.join(words)} --out REPOSITORY` writes it"

    @property
    def _as_json(self) -> dict[str, bool]:
        return {"as_json": True} if self._address.scheme == "grpc" else {}

    def _take_shape(self, model: dict[str, Any]) -> None:
        """Look what the model takes: any size and number of views, or only one."""
        tensors = {one["name"]: one for one in [*model.get("inputs", ()), *model.get("outputs", ())]}
        shape = [int(side) for side in tensors.get("hu", {}).get("shape", ())]
        told = tensors.get("hu", {}).get("datatype")
        if len(shape) != 4 or shape[1] != self._view.shown or told != "INT32" or not OUTPUTS.keys() <= tensors.keys():
            raise BackendError(
                f"{self._address}: {self._model} takes {told} {shape} and answers {', '.join(sorted(tensors))}: "
                f"scanside's take INT32 (N, {self._view.shown}, H, W) as hu and answer {', '.join(OUTPUTS)}"
            )
        batch, _, height, width = shape
        self.sizes = ((height, width),) if height > 0 and width > 0 else None
        self._fixed = max(batch, 0)
        self.max_batch = self._fixed or MOST_VIEWS

    def _way(self) -> str:
        """How tensors travel; memory can be shared only with a server that sees it, and a container may not."""
        way = "gRPC" if self._address.scheme == "grpc" else "HTTP" if self._is_binary else "HTTP, tensors as text"
        if self._shares:
            try:
                self._share(1)
            except (InferenceError, OSError) as error:
                self._shares = False
                way += f", no shared memory ({error})"
            else:
                way += " with shared memory"
        if not self._tells_hashes:
            return f"{way}; known by its name: it tells no hashes"
        if self._is_checked:
            return f"{way}; hashes as the bundle says, the graph's by its file"
        return f"{way}; its configuration says the bundle's hashes, which nobody holds against the files"

    # a request

    def _ask(self, views: NDArray[np.int16] | NDArray[np.int32], shape: tuple[int, ...]) -> list[NDArray[Any]]:
        """Answers to a batch as arrays: labels of this shape, evidence."""
        request = self._library.InferInput("hu", list(views.shape), "INT32")
        seconds = min(self._deadline_s * shape[0], LONGEST_S / 2)  # however large: another server has to have time left
        if self._shares:
            try:
                return self._ask_shared(request, views, shape, seconds)
            except OSError as error:  # no room for so much: this goes the other way, and what comes after it
                self._shares = False
                self.why += f", which is full ({error.strerror})"
        binary = {} if self._address.scheme == "grpc" else {"binary_data": self._is_binary}
        request.set_data_from_numpy(np.ascontiguousarray(views, dtype=np.int32), **binary)
        wanted = [self._library.InferRequestedOutput(name, **binary) for name in OUTPUTS]
        result = self._call("infer", self._model, [request], VERSION, outputs=wanted, seconds=seconds)
        with told(self._address):
            arrays = [result.as_numpy(name) for name in OUTPUTS]
        return self._of_kinds(arrays)

    def _ask_shared(self, request: Any, views: NDArray[Any], shape: tuple[int, ...], seconds: float) -> list[Any]:
        shapes = {"labels": shape, "evidence": (shape[0], self._classes)}
        kinds = {"hu": (views.shape, np.int32)} | {name: (shapes[name], kind) for name, kind in OUTPUTS.items()}
        sizes = [-(-int(np.prod(one)) * np.dtype(kind).itemsize // ALIGNED) * ALIGNED for one, kind in kinds.values()]
        places = dict(zip(kinds, itertools.accumulate(sizes, initial=0), strict=False))
        memory = self._share(sum(sizes))
        arrays = {name: memory.array(places[name], *kinds[name]) for name in kinds}
        arrays["hu"][:] = views
        arrays["labels"][:], arrays["evidence"][:] = NO_LABEL, np.nan  # the last answer must not pass for this one
        request.set_shared_memory(memory.name, arrays["hu"].nbytes, offset=places["hu"])
        wanted = [self._library.InferRequestedOutput(name) for name in OUTPUTS]
        for one in wanted:
            one.set_shared_memory(memory.name, arrays[one.name()].nbytes, offset=places[one.name()])
        result = self._call("infer", self._model, [request], VERSION, outputs=wanted, seconds=seconds)
        for name in OUTPUTS:
            told = result.get_output(name)
            given = told and tuple(told.shape)
            if given != shapes[name]:
                raise InferenceError(f"{self._address}: {name} of shape {given}, not {shapes[name]}")
        return self._of_kinds([arrays[name].copy() for name in OUTPUTS])

    def _of_kinds(self, arrays: list[NDArray[Any] | None]) -> list[NDArray[Any]]:
        for array, (name, kind) in zip(arrays, OUTPUTS.items(), strict=True):
            if array is None or array.dtype != kind:
                raise InferenceError(f"{self._address}: {name} is {'missing' if array is None else array.dtype}")
        return arrays

    def _share(self, size: int) -> _Shared:
        """Memory of at least this size that the server sees too."""
        if self._memory is None or self._memory.size < size:
            old, self._memory = self._memory, None
            if old:
                with suppress(InferenceError):  # "in use": Triton answers before it lets go; it keeps these few MB then
                    self._call("unregister_system_shared_memory", old.name)
                old.close()
            memory = _Shared(size)
            try:
                self._call("register_system_shared_memory", memory.name, memory.key, memory.size)
            except InferenceError:
                memory.close()
                raise
            finally:
                memory.unlink()  # both have it open: nothing is left behind, however either ends
            self._memory = memory
        return self._memory

    def _call(self, name: str, *arguments: Any, seconds: float = HEALTH_S, **options: Any) -> Any:
        """Call the client, for so many seconds at most in all, and never beyond `until`.

        Raises
        ------
        ServerLost, OutOfTime, InferenceError : as of `infer`

        """
        left = self.until - time.monotonic()
        if left <= 0:
            raise OutOfTime(f"{self._address}: no time was left to ask it")
        try:
            return self._call_within(min(seconds, left), name, *arguments, **options)
        except ServerLost as error:
            if left < seconds:
                raise OutOfTime(f"{error} ({left:.1f} s were left for it)") from None
            raise

    def _call_within(self, seconds: float, name: str, *arguments: Any, **options: Any) -> Any:
        method = getattr(self._client, name)
        with told(self._address):
            if self._address.scheme == "grpc":
                return method(*arguments, client_timeout=seconds, **options)
            from gevent import Timeout  # noqa: PLC0415  # of tritonclient's HTTP, whose timeouts are each read's

            with Timeout(seconds, TimeoutError(f"no answer within {seconds:g} s")):
                return method(*arguments, **options)


class _Shared:
    """Memory that a server on this machine can open by name until it is unlinked; OSError where there is no room."""

    def __init__(self, size: int) -> None:
        self.name = f"scanside-{os.getpid()}-{secrets.token_hex(4)}"
        self.key, self.size = f"/{self.name}", size
        handle = os.open(SHARED / self.name, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            os.posix_fallocate(handle, 0, size)  # or writing would end the process where there is no room
            self._map = mmap.mmap(handle, size)
        except OSError:
            self.unlink()
            raise
        finally:
            os.close(handle)

    def array(self, offset: int, shape: tuple[int, ...], kind: Any) -> NDArray[Any]:
        return np.frombuffer(self._map, kind, int(np.prod(shape)), offset).reshape(shape)

    def unlink(self) -> None:
        (SHARED / self.name).unlink()

    def close(self) -> None:
        with suppress(BufferError):  # arrays of a request that failed: it goes with them
            self._map.close()
