"""Alerts as HL7 messages: legal by another library's rules, and delivered whatever the listener does."""

from __future__ import annotations

import hl7
import pytest
from hl7apy.consts import VALIDATION_LEVEL
from hl7apy.parser import parse_message

from dicom_node.alerts import channel as channels
from dicom_node.alerts import mllp
from dicom_node.alerts.alert import Alert, Message
from dicom_node.alerts.channel import Refused, Unreachable
from dicom_node.alerts.hl7 import ATTEMPTS_AFTER_REJECTION, Hl7Channel, compose, judge
from dicom_node.alerts.settings import Hl7
from dicom_node.configuration.sections import Tls
from dicom_node.network.tls import Identity
from tests.dicom_node.alerts.listener import END, START, Listener, acknowledgement, taken
from tests.dicom_node.alerts.made import EARLY, PATIENT, note, report, written
from tests.dicom_node.certificates import Authority

NASTY = {
    "PatientID": r"7|8^9\&~",
    "PatientName": "Ünal^Øde^Q.^Dr.^III=山田^太郎=やまだ^たろう",
    "PatientBirthDate": "unknown",
    "PatientSex": "X",
    "IssuerOfPatientID": "HOSP",
    "AccessionNumber": "A|1",
    "PlacerOrderNumberImagingServiceRequest": "P^1",
    "FillerOrderNumberImagingServiceRequest": "F&1",
    "StudyDate": "20260101",
    "StudyTime": "120000.123",
}


def settings(port: int = 2575, **changed: object) -> Hl7:
    return Hl7(name="ed", host="127.0.0.1", port=port, **changed)


def said(message: Message, alert: Alert, **changed: object) -> str:
    return compose(settings(**changed), message, alert)


def segments(text: str, name: str) -> list[list[str]]:
    return [line.split("|") for line in text.split("\r") if line.startswith(name + "|")]


def valid(text: str) -> bool:
    """hl7apy, which has the tables of version 2.5.1, finds nothing against structure, lengths, data types or order."""
    message = parse_message(text, validation_level=VALIDATION_LEVEL.STRICT)
    return message.validate()


def test_a_raised_alert_is_a_legal_preliminary_result(ledger):
    note(ledger, EARLY, final=False)
    text = said(*written(ledger), sending_facility="CT2", receiving_application="ED")
    assert valid(text)
    (msh,), (pid,), (obr,) = (segments(text, name) for name in ("MSH", "PID", "OBR"))
    assert msh[1:3] == [r"^~\&", "SCANSIDE"]
    assert msh[8] == "ORU^R01^ORU_R01"
    assert len(msh[9]) <= 20
    assert msh[10:12] == ["P", "2.5.1"]
    assert msh[14:16] == ["", ""], "with a value there the answer would be in the enhanced mode"
    assert msh[17] == "UNICODE UTF-8"
    assert (pid[3], pid[5], pid[7], pid[8]) == ("P1^^^^PI", "Muster^Änne^^^^^L^A", "19500102", "F")
    assert obr[25] == "P"
    rows = {row[3].partition("^")[0]: row for row in segments(text, "OBX")}
    assert (rows["triage-level"][5], rows["triage-level"][8], rows["triage-level"][11]) == ("critical", "AA", "P")
    volume = rows["volume-intracerebral"]
    assert (volume[2], volume[5], volume[6], volume[11]) == ("NM", "31.2", "mL^milliliter^UCUM", "P")
    assert "274100004^Cerebral hemorrhage^SCT" in volume[3]
    notes = " ".join(row[3] for row in segments(text, "NTE"))
    for word in ("Research use only, not a medical device.", "the series is still arriving", "phantom-unet 1.0"):
        assert word in notes


def test_findings_have_the_sites_codes_also_when_they_are_taken_back(ledger):
    early, final = report(missing=("x",)), report("urgent", 5)
    early["findings"][0] |= {"title": "Inner bleed", "code": ["B7", "99SITE", "Bleed, inner"]}
    final["findings"][0]["name"] = "subdural"
    note(ledger, early, final=False)
    note(ledger, final)
    first, alert = written(ledger)
    text = said(first, alert)
    assert "volume-intracerebral^Volume of Inner bleed^99SCANSIDE^B7^Bleed, inner^99SITE|" in text
    assert "CRITICAL: Inner bleed 31.2 ml" in text
    ledger.sent(first, "AA")
    rows = {row[3].partition("^")[0]: row for row in segments(said(*written(ledger)), "OBX")}
    assert rows["volume-intracerebral"][3].endswith("^B7^Bleed, inner^99SITE")
    assert rows["volume-intracerebral"][11] == "W"


def test_little_blood_is_not_told_as_none(ledger):
    note(ledger, report(ml=0.0012))
    message, alert = written(ledger)
    text = said(message, alert)
    assert valid(text)
    rows = {row[3].partition("^")[0]: row[5] for row in segments(text, "OBX")}
    assert rows["volume-intracerebral"] == "0.0012"
    assert rows["triage-text"].startswith("CRITICAL: Intracerebral haemorrhage under 0.01 ml (")


def test_the_operating_point_is_told(ledger):
    point = {"minimum_volume_ml": 0.5, "minimum_probability": 0.6, "minimum_slices": 2}
    note(ledger, report(operating_point={"intracerebral": point, "subdural": point}))
    text = said(*written(ledger))
    assert "from 0.5 ml, probability 0.6, 2 neighbouring slices" in text


def test_statuses_follow_the_alert_and_what_is_none_any_more_is_taken_back(ledger):
    note(ledger, EARLY, final=False)
    note(ledger, report())
    note(ledger, report("routine"), revision=2)
    texts = []
    for _ in range(3):
        message, alert = written(ledger)
        texts.append(said(message, alert))
        ledger.sent(message, "AA")
    assert [segments(text, "OBR")[0][25] for text in texts] == ["P", "F", "C"]
    assert all(map(valid, texts))
    rows = {row[3].partition("^")[0]: row for row in segments(texts[2], "OBX")}
    assert (rows["triage-level"][5], rows["triage-level"][8], rows["triage-level"][11]) == ("withdrawn", "N", "C")
    assert (rows["volume-intracerebral"][5], rows["volume-intracerebral"][11]) == ("", "W")


def test_a_series_that_could_not_be_analysed_has_no_decision(ledger, journal):
    note(ledger, EARLY, final=False)
    with journal.transaction() as execute:
        ledger.note_failure(execute, "1.2.3.4", "1.2.3.4.5", 1, "the worker died 3 times")
    ledger.sent(written(ledger)[0], "AA")
    text = said(*written(ledger))
    assert valid(text)
    assert {row[3].partition("^")[0]: row[11] for row in segments(text, "OBX")}["triage-level"] == "X"


def test_delimiters_and_any_script_arrive_as_they_were(ledger):
    note(ledger, report(), patient=NASTY)
    text = said(*written(ledger), assigning_authority="OTHER")
    assert valid(text)
    parsed = hl7.parse(text)
    pid = parsed.segment("PID")
    assert parsed.unescape(str(pid(3)[0](1))) == NASTY["PatientID"]
    assert str(pid(3)[0](4)) == "HOSP"
    assert [str(name) for name in pid(5)] == [
        "Ünal^Øde^Q.^III^Dr.^^L^A", "山田^太郎^^^^^L^I", "やまだ^たろう^^^^^L^P"
    ]  # fmt: skip
    (msh, obr) = segments(text, "PID")[0], segments(text, "OBR")[0]
    assert (msh[7], msh[8]) == ("", "U")
    assert (obr[2], obr[3], obr[7], obr[18]) == (r"P\S\1", r"F\T\1", "20260101120000", r"A\F\1")


def test_a_patient_without_a_number_gets_none(ledger):
    note(ledger, report(), patient={"PatientName": "Muster^Kurt\r\x0b\x1cMSH|evil"})
    text = said(*written(ledger), assigning_authority="HOSP")
    (pid,) = segments(text, "PID")
    assert pid[3] == ""
    assert text.count("MSH|") == 1
    assert not set("\x0b\x1c") & set(text)


def test_the_same_message_is_the_same_however_often_it_is_sent(ledger):
    note(ledger, EARLY, final=False)
    message, alert = written(ledger)
    first = said(message, alert)
    note(ledger, report("urgent", 12))
    ledger.acknowledge(1, "Dr A")
    assert said(*written(ledger)) == first


# the answer


def answered(text: str) -> bytes:
    return acknowledgement("", about="X1", code=text)[1:-2]


@pytest.mark.parametrize("code", ["AA", "CA", "aa "])
def test_what_is_taken(code):
    assert judge(answered(code), "X1").startswith(code.strip().upper())


@pytest.mark.parametrize(("code", "attempts"), [("AE", 6), ("CE", 6), ("AR", ATTEMPTS_AFTER_REJECTION), ("CR", 3)])
def test_what_is_refused_and_how_long_it_is_tried(code, attempts):
    with pytest.raises(Refused) as refusal:
        judge(acknowledgement("", code, about="X1", words="no patient Muster")[1:-2], "X1")
    assert refusal.value.attempts == attempts
    assert "no patient Muster" in refusal.value.full
    assert "Muster" not in str(refusal.value), "the log must not quote a listener: it may quote the patient"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"hello",
        b"MSH|^~\\&|",
        b"MSH|^~\\&|A|B|C|D|1||ACK|1|P|2.5\rMSA",
        b"MSH|^~\\&|A|B|C|D|1||ACK|1|P|2.5\rMSA|AA",
        b"MSH|^~\\&|A|B|C|D|1||ACK|1|P|2.5\rMSA|AA|another",
        b"MSH|^~\\&|A|B|C|D|1||ACK|1|P|2.5\rMSA|ZZ|X1",
        b"MSH|^~\\&|A|B|C|D|1||ACK|1|P|2.5\rPID|1",
        b"\xff\xfe\x00\x01",
        b"MSH" * 9000,
        b"MSA|AA|X1",
    ],
)
def test_an_answer_that_is_none_is_no_answer(answer):
    with pytest.raises(Unreachable):
        judge(answer, "X1")


# the wire


def test_a_listener_takes_a_message(ledger):
    note(ledger, report())
    message, alert = written(ledger)
    with Listener() as listener:
        channel = Hl7Channel(settings(listener.port), None)
        assert "takes connections" in channel.reach()
        assert channel.send(message, alert).startswith("AA")
    assert listener.control_ids() == [message.control_id]
    assert listener.got == [said(message, alert)]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda _: None, "gave no answer"),
        (lambda _: START + b"MSH", "cuts its answer"),
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n" + END, "cuts its answer"),
        (lambda _: START + b"A" * (mllp.LONGEST_ANSWER + 9000), "more than"),
        (lambda text: acknowledgement(text, about="7"), "another message"),
    ],
)
def test_what_is_no_answer_is_sent_again(ledger, answer, problem):
    note(ledger, report())
    with Listener(answer) as listener, pytest.raises(Unreachable, match=problem):
        Hl7Channel(settings(listener.port), None).send(*written(ledger))


def test_nobody_listens(ledger):
    note(ledger, report())
    with Listener() as listener:
        pass
    with pytest.raises(Unreachable, match="refused"):
        Hl7Channel(settings(listener.port), None).send(*written(ledger))


def test_a_listener_that_says_nothing_holds_nobody_up_for_ever(ledger, monkeypatch):
    import threading

    note(ledger, report())
    monkeypatch.setattr(channels.Deadline.__init__, "__defaults__", (0.2,))
    gate = threading.Event()
    with Listener(lambda _: gate.wait(20) and None) as listener:
        with pytest.raises(Unreachable, match="too long"):
            Hl7Channel(settings(listener.port), None).send(*written(ledger))
        gate.set()


def test_a_listener_that_never_shakes_hands_holds_nobody_up_for_ever(ledger, tmp_path, monkeypatch):
    import socket
    import threading

    note(ledger, report())
    message, alert = written(ledger)
    monkeypatch.setattr(channels.Deadline.__init__, "__defaults__", (0.3,))
    node = Identity(Tls.model_validate(vars(Authority(tmp_path / "pki").issue("node"))))
    answers: list[str] = []

    def send(port: int) -> None:
        try:
            Hl7Channel(settings(port, tls=True), node).send(message, alert)
        except Unreachable as error:
            answers.append(str(error))

    with socket.create_server(("127.0.0.1", 0)) as silent:
        sending = threading.Thread(target=send, args=(silent.getsockname()[1],), daemon=True)
        sending.start()
        sending.join(10)
    assert ["takes too long" in each for each in answers] == [True]


def test_who_wants_tls_is_told_nothing_without(ledger):
    note(ledger, report())
    with Listener() as listener, pytest.raises(Unreachable, match="TLS"):
        Hl7Channel(settings(listener.port, tls=True), None).send(*written(ledger))
    assert listener.got == []


def test_over_tls_both_show_their_certificates(ledger, tmp_path):
    note(ledger, report())
    message, alert = written(ledger)
    authority = Authority(tmp_path / "pki")
    node, peer = (Identity(Tls.model_validate(vars(authority.issue(name)))) for name in ("node", "peer"))
    stranger = Identity(Tls.model_validate(vars(Authority(tmp_path / "other").issue("stranger"))))
    with Listener(taken, tls=peer.acceptor()) as listener:
        channel = Hl7Channel(settings(listener.port, tls=True), node)
        assert channel.send(message, alert).startswith("AA")
        assert "over TLS" in channel.reach()
        with pytest.raises(Unreachable, match="certificate is not taken"):
            Hl7Channel(settings(listener.port, tls=True), stranger).send(message, alert)
        with pytest.raises(Unreachable):
            Hl7Channel(settings(listener.port), None).send(message, alert)
    assert listener.control_ids() == [message.control_id]


def test_patients_are_the_listeners_business(ledger):
    note(ledger, report())
    assert PATIENT["PatientID"] in said(*written(ledger))
