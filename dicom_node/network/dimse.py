"""DIMSE command sets (PS3.7 section 6.3 and annex E): group 0000 in Implicit VR Little Endian, as they travel.

Keys are element numbers: a command set has no other group, and few kinds of values.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import TYPE_CHECKING

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from collections.abc import Mapping

AFFECTED_SOP_CLASS_UID = 0x0002
REQUESTED_SOP_CLASS_UID = 0x0003
COMMAND_FIELD = 0x0100
MESSAGE_ID = 0x0110
MESSAGE_ID_BEING_RESPONDED_TO = 0x0120
COMMAND_DATA_SET_TYPE = 0x0800
STATUS = 0x0900
ERROR_COMMENT = 0x0902
AFFECTED_SOP_INSTANCE_UID = 0x1000
REQUESTED_SOP_INSTANCE_UID = 0x1001
EVENT_TYPE_ID = 0x1002
ACTION_TYPE_ID = 0x1008

NO_DATA_SET = 0x0101  # any other COMMAND_DATA_SET_TYPE: one follows
RESPONSE = 0x8000  # set in the command field of every response

# Status of any service, PS3.7 annex C
SUCCESS = 0x0000
INVALID_ATTRIBUTE_VALUE = 0x0106
PROCESSING_FAILURE = 0x0110
DUPLICATE_INSTANCE = 0x0111
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
INVALID_INSTANCE = 0x0117
NO_SUCH_ACTION = 0x0123
UNRECOGNISED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213

_TEXT = {AFFECTED_SOP_CLASS_UID, REQUESTED_SOP_CLASS_UID, AFFECTED_SOP_INSTANCE_UID, REQUESTED_SOP_INSTANCE_UID}


class Request(IntEnum):
    """Command fields of requests (PS3.7 table E.1-1)."""

    C_STORE = 0x0001
    C_ECHO = 0x0030
    N_EVENT_REPORT = 0x0100
    N_SET = 0x0120
    N_ACTION = 0x0130
    N_CREATE = 0x0140
    C_CANCEL = 0x0FFF


class CommandError(ScansideError):
    """Bytes that are no command set."""


class Command:
    """A command set that was received.

    Parameters
    ----------
    encoded : all of its elements

    Raises
    ------
    CommandError : elements of another group, or cut off, or no command field

    """

    __slots__ = ("_values",)

    def __init__(self, encoded: bytes | bytearray) -> None:
        self._values: dict[int, bytes] = {}
        at = 0
        while at < len(encoded):
            try:
                group, element, length = struct.unpack_from("<HHL", encoded, at)
            except struct.error as error:
                raise CommandError("the command set is cut off") from error
            at += 8 + length
            if group != 0 or at > len(encoded):
                raise CommandError(
                    "the command set is cut off" if group == 0 else f"group {group:04X} in a command set"
                )
            self._values[element] = bytes(encoded[at - length : at])
        for needed in (COMMAND_FIELD, COMMAND_DATA_SET_TYPE):
            self.number(needed)

    @property
    def field(self) -> int:
        """What is asked for, or answered."""
        return self.number(COMMAND_FIELD)

    @property
    def has_data_set(self) -> bool:
        return self.number(COMMAND_DATA_SET_TYPE) != NO_DATA_SET

    def number(self, element: int) -> int:
        """Value of a US element.

        Raises
        ------
        CommandError : it is not there, or no number

        """
        value = self._values.get(element, b"")
        if len(value) != 2:
            raise CommandError(f"the command set has no (0000,{element:04X})")
        return int.from_bytes(value, "little")

    def text(self, element: int) -> str:
        """Value of a UI or AE element without its padding, empty where it is not there."""
        return self._values.get(element, b"").decode("latin-1").strip("\0 ")


def encode(values: Mapping[int, int | str]) -> bytes:
    """A command set: numbers as US, UIDs padded with NUL and other text with a space, the group's length before all."""
    elements = []
    for element in sorted(values):
        value = values[element]
        if isinstance(value, int):
            encoded = value.to_bytes(2, "little")
        else:
            encoded = value.encode("latin-1", "replace")
            encoded += (b"\0" if element in _TEXT else b" ") * (len(encoded) % 2)
        elements.append(struct.pack("<HHL", 0, element, len(encoded)) + encoded)
    body = b"".join(elements)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def response(request: Command, status: int, comment: str = "") -> bytes:
    """The response to a request, without a data set (PS3.7 sections 9.3 and 10.3).

    Of `comment`, the ErrorComment, 64 characters are kept.
    """
    values: dict[int, int | str] = {
        COMMAND_FIELD: request.field | RESPONSE,
        MESSAGE_ID_BEING_RESPONDED_TO: request.number(MESSAGE_ID),
        COMMAND_DATA_SET_TYPE: NO_DATA_SET,
        STATUS: status,
    }
    # a response names as "affected" what its request may have named as "requested"
    named = {
        AFFECTED_SOP_CLASS_UID: request.text(AFFECTED_SOP_CLASS_UID) or request.text(REQUESTED_SOP_CLASS_UID),
        AFFECTED_SOP_INSTANCE_UID: request.text(AFFECTED_SOP_INSTANCE_UID) or request.text(REQUESTED_SOP_INSTANCE_UID),
        ERROR_COMMENT: ascii(comment)[1:-1].replace("\\", "/")[:64],  # LO: 64 characters, no backslash
    }
    return encode(values | {element: text for element, text in named.items() if text})
