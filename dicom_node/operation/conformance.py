"""The DICOM conformance statement (PS3.2), made of what the code itself goes by."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pynetdicom import PYNETDICOM_IMPLEMENTATION_UID, PYNETDICOM_IMPLEMENTATION_VERSION
from pynetdicom.sop_class import UnifiedProcedureStepPush

from dicom_node.alerts import worklist
from dicom_node.alerts.channel import ATTEMPTS_BEFORE_PARKING
from dicom_node.delivery import confirmation, outbox, sender, storing
from dicom_node.images.gate import Reason
from dicom_node.intake import commitment, mpps, receiver
from dicom_node.network import connection, requestor, services
from dicom_node.network.tls import CIPHERS
from dicom_node.network.wire import FROM_CT_SCANNERS
from dicom_node.operation.trial import name_of

if TYPE_CHECKING:
    from collections.abc import Mapping

SERVICES = (mpps.SOP_CLASS, commitment.SOP_CLASS)
RESULTS = tuple(dict.fromkeys(one for role in ("sr", "sc", "pdf", "seg") for one in storing.SOP_CLASSES[role]))

PAGE = """# DICOM conformance statement

Made by `scanside conformance`. Research use only; not a medical device.

A node is one application entity. It takes what a scanner sends, analyses head CT, and sends results to storage SCPs.

## Associations that peers ask for

| | |
|---|---|
| Implementation Class UID, version name | {uid}, {version} (pynetdicom's, whose codecs are used) |
| Called AE title | any |
| Calling AE title | any, or those of `node.allowed_calling_aes`; others are rejected for good, as not recognised |
| Addresses | any, or those of `node.allowed_addresses`; others are closed at once |
| Associations at a time | `node.max_associations`, from one address `node.max_associations_per_peer` |
| One more | rejected, transient, local limit exceeded |
| Largest PDU | {largest_pdu:,} bytes |
| Asynchronous operations | none |
| Silence | aborted after {artim_s} s without a request, {stall_s} s within a message, {idle_s} s between two |
| Slowness | aborted where a PDU takes longer than {stall_s} s |
| TLS | with `node.tls`: 1.2 or newer, `{ciphers}` (BCP 195), both sides show a certificate |

### Presentation contexts

| SOP Class | UID | role | transfer syntaxes |
|---|---|---|---|
{contexts}

{syntaxes}

Of several in one context the first of the list is taken. Instances are kept byte for byte as they came.

### C-STORE

| status | reason |
|---|---|
{store}

A status other than 0000 comes with an ErrorComment. Private attributes, attributes of other modules and illegal values
are kept.

### Modality Performed Procedure Step

N-CREATE and N-SET. Of a step that is COMPLETED or DISCONTINUED the Performed Series Sequence is used: with all of its
instances here the series is closed, without some it never is before `series.idle_timeout_s`, and its report says how
many are missing.

| status | reason |
|---|---|
{mpps}

### Storage Commitment Push Model

N-ACTION; the N-EVENT-REPORT goes to the port that `[[scanners]]` names for the calling AE title, on an association
that the node asks for in the role of the SCP, until it is taken or 90 days old; to others on the association of the
N-ACTION. An instance is committed when its file is on the disk and can be read. It stays there until its study's days
(`node.keep_days`) are over, or somebody removes it ([operations](operations.md)); the node is no archive.

| status | reason |
|---|---|
{commitment}

| FailureReason | |
|---|---|
{failures}

Destinations report at the same port on what they were asked to commit to: N-EVENT-REPORT, the role of the SCP selected
by them.

| status | reason |
|---|---|
{reports}

### What is not analysed

CT, Enhanced CT and Legacy Converted Enhanced CT images are analysed, of the latter two each frame by its functional
groups. An image, a frame, or a series of such, with one of these reasons is kept and not analysed:

{reasons}

## Associations that the node asks for

To each of `[[destinations]]`, one for all that it is owed at a time. To those that get results of every decision it is
opened when a series of a head closes, while its results are made; it is released where none come within {ahead_s:g} s.

| SOP Class | UID | role | transfer syntaxes |
|---|---|---|---|
{results}

Destinations with `confirm = "commitment"` are asked (N-ACTION) on the same association, those with `confirm = "query"`
are searched there for each object (C-FIND, IMAGE level, one query a series, StudyInstanceUID, SeriesInstanceUID and a
list of SOPInstanceUIDs as keys).

0000 and warnings: delivered. {final}: offered {attempts} times, then parked. Any other status,
an abort or no answer within {dimse_s:g} s: tried again after 2 s, doubling to {longest_s:g} s, without end.
`scanside check` asks each for a C-ECHO.

To each of `[[worklists]]`, one for each alert that it is told of:

| SOP Class | UID | role | transfer syntaxes |
|---|---|---|---|
| {ups.name} | {ups} | SCU | {ups_syntaxes} |

N-CREATE with all attributes of types 1 and 2 of PS3.4 table CC.2.5-3, priority HIGH (critical) or MEDIUM (urgent),
workitem (110005, DCM, Interpretation), as input the key slices of the findings and, once there is one, the SR. N-ACTION
Request UPS Cancel where the alert is withdrawn; where its level changes, another step takes the place of the cancelled
one. 0111 (duplicate) to N-CREATE counts as success, as do to N-ACTION {cancelled}. {busy} and no answer: tried again
after 2 s, doubling to 60 s, without end. Any other status: offered {ups_attempts} times, then parked.

Results are written with SpecificCharacterSet ISO_IR 192; of the source any character set that pydicom decodes is taken.

## Audit trail

With `[audit]`, messages of PS3.15 annex A.5, into a file and to a syslog server by the profiles of annexes A.6 (TLS)
and A.7 (UDP): facility 10, severity 5, MSGID DICOM+RFC3881, no structured data. Nothing is received.

- Application Activity: start and stop of the node.
- DICOM Instances Transferred, at an association's end: one for each study, for what is new (C), what was here already
  (R), and what went into quarantine (C, minor failure).
- Begin Transferring DICOM Instances and DICOM Instances Transferred, for results that set out for a destination, and
  that it has (R) or has not taken (R, minor failure): one for each study of a batch.
- DICOM Study Deleted: a study whose days (`node.keep_days`) are over.
- Security Alert, Node Authentication: an AE title or an address that is not allowed, TLS that fails.
- Security Alert, Security or Software Configuration: a reload that changes something.

UserID is the node's process ID, and of a peer what the log calls it: `AE@address:port`, or the name of a destination.
The patient takes part by the PatientID of the objects, empty where they have none; names stay empty. The identity of
the source is `AE title@host name`.
"""


def compose() -> str:
    """The statement, as Markdown."""
    contexts = receiver.contexts(FROM_CT_SCANNERS, SERVICES)
    lists = list(dict.fromkeys(tuple(context.transfer_syntax) for context in contexts))
    letters = dict(zip(lists, "ABC", strict=True))
    return PAGE.format(
        uid=PYNETDICOM_IMPLEMENTATION_UID,
        version=PYNETDICOM_IMPLEMENTATION_VERSION,
        largest_pdu=receiver.LARGEST_PDU,
        artim_s=connection.ARTIM_S,
        stall_s=connection.STALL_S,
        idle_s=receiver.IDLE_TIMEOUT_S,
        ciphers=CIPHERS,
        contexts="\n".join(
            f"| {one.abstract_syntax.name} | {one.abstract_syntax} | SCP{', SCU' * bool(one.scp_role)} "
            f"| {letters[tuple(one.transfer_syntax)]} |"
            for one in contexts
        ),
        syntaxes="\n".join(
            f"- {letter}: {', '.join(f'{syntax.name} ({syntax})' for syntax in syntaxes)}"
            for syntaxes, letter in letters.items()
        ),
        store=_statuses(receiver.STATUSES),
        mpps=_statuses(services.STATUSES | mpps.STATUSES),
        commitment=_statuses(services.STATUSES | commitment.STATUSES),
        failures=_statuses(commitment.FAILURES),
        reports=_statuses(services.STATUSES | confirmation.STATUSES),
        reasons="\n".join(f"- {reason.value}" for reason in Reason),
        results="\n".join(
            f"| {name_of(one)} | {one} | SCU | {', '.join(syntax.name for syntax in confirmation.SYNTAXES)} |"
            for one in (*RESULTS, *confirmation.CONTEXTS.values())
        ),
        final=", ".join(f"{status:04X}" for status in sorted(storing.FINAL_STATUSES) if status < 0xA900) + " and A9xx",
        attempts=outbox.ATTEMPTS_BEFORE_PARKING,
        dimse_s=requestor.DIMSE_TIMEOUT_S,
        ahead_s=sender.AHEAD_S,
        ups=UnifiedProcedureStepPush,
        ups_syntaxes=", ".join(syntax.name for syntax in confirmation.SYNTAXES),
        ups_attempts=ATTEMPTS_BEFORE_PARKING,
        cancelled=", ".join(f"{status:04X}" for status in sorted(worklist.CANCELLED) if status),
        busy=" and ".join(f"{status:04X}" for status in sorted(worklist.BUSY)),
        longest_s=outbox.LONGEST_WAIT_S,
    )


def _statuses(reasons: Mapping[int, str]) -> str:
    return "\n".join(f"| {status:04X} | {reason} |" for status, reason in sorted(reasons.items()))
