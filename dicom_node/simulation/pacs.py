"""A small archive for the demo and the tests: takes whatever is stored to it and remembers when."""

from __future__ import annotations

import time
from threading import Condition
from typing import TYPE_CHECKING

from pynetdicom import AllStoragePresentationContexts

from dicom_node.intake.receiver import Receiver
from dicom_node.storage.spool import Spool

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from dicom_node.storage.spool import Instance

Received = tuple[float, str, "Path"]


class Pacs:
    """Storage SCP for every storage class, on this machine only; an intake of its own receiver.

    Parameters
    ----------
    folder : where objects are kept, ``<study>/<series>/<instance>.dcm``
    ae_title : its AE title
    port : 0 is any free one

    Attributes
    ----------
    received : (``time.time()``, SOP Class UID, path) of each new object, in order of arrival

    """

    def __init__(self, folder: Path, *, ae_title: str = "PACS", port: int = 0) -> None:
        self.folder = folder
        self.received: list[Received] = []
        self._arrival = Condition()
        self._receiver = Receiver(
            ae_title=ae_title,
            address="127.0.0.1",
            port=port,
            spool=Spool(folder, free_floor_gb=0),
            intake=self,
            sop_classes=[context.abstract_syntax for context in AllStoragePresentationContexts],
        )

    @property
    def port(self) -> int:
        return self._receiver.port

    def start(self) -> None:
        self._receiver.start()

    def stop(self) -> None:
        self._receiver.stop()

    def wait_for(self, wanted: int | Callable[[list[Received]], bool], timeout_s: float) -> bool:
        """Wait until so many objects are here, or until `wanted` is true of those that are; False when time ran out."""

        def fulfilled() -> bool:
            return wanted(self.received) if callable(wanted) else len(self.received) >= wanted

        with self._arrival:
            return self._arrival.wait_for(fulfilled, timeout_s)

    def instance_stored(self, association: str, instance: Instance) -> None:  # noqa: ARG002 (Intake)
        with self._arrival:
            self.received.append((time.time(), instance.sop_class_uid, instance.path))
            self._arrival.notify_all()

    def association_ended(self, association: str, *, released: bool) -> None:
        """Nothing to do: each object stands for itself."""
