"""What a configuration says of who is told: every mistake at once, and read back as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from pydantic import ValidationError

from dicom_node.alerts.settings import Webhook
from dicom_node.configuration import config as configuration
from dicom_node.configuration import toml
from dicom_node.configuration.config import ConfigError
from dicom_node.operation.check import check
from dicom_node.reload import merge
from tests.dicom_node.alerts.listener import Listener

# pynetdicom leaves the socket of a connection that could not be opened to garbage collection
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

WORKED = """
[[hl7]]
name = "emergency"
host = "127.0.0.1"
port = 2575

[[webhooks]]
name = "paging"
url = "https://hooks.hospital/alerts"
secret = "paging.secret"
ca = "ca.pem"

[[emails]]
name = "on-call"
host = "mail.hospital"
sender = "scanside@hospital.example"
recipients = ["on-call@hospital.example"]
after_s = 300
quiet_hours = "22:00-06:30"
user = "scanside"
password = "mail-password"

[[worklists]]
name = "reading"
ae_title = "WORKLIST"
host = "192.0.2.30"
port = 11112
retrieve_ae_title = "PACS"
levels = ["critical"]
"""
WRONG = """
[[hl7]]
name = "a"
host = "127.0.0.1"
port = 70000
tls = true
sending_facility = "A|B"

[[webhooks]]
name = "a"
url = "https://user:password@hooks.hospital/"
secret = "x"
link = "https://node/{patient}"

[[emails]]
name = "b"
host = "mail.hospital"
sender = "nobody"
recipients = []
quiet_hours = "10pm"
user = "x"
levels = ["routine"]
after_s = -1

[[worklists]]
name = "c"
ae_title = "A"
host = "x"
port = 1
labell = "x"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "node.toml"
    path.write_text(text)
    return path


def test_a_worked_configuration_is_read_and_shown_as_it_is(tmp_path: Path):
    config = configuration.load(write(tmp_path, WORKED))
    assert [each.name for each in config.channels] == ["emergency", "paging", "on-call", "reading"]
    assert (config.webhooks[0].secret, config.webhooks[0].ca) == (tmp_path / "paging.secret", tmp_path / "ca.pem")
    assert config.emails[0].password == tmp_path / "mail-password"
    assert config.emails[0].its_port == 587
    assert configuration.load(write(tmp_path, toml.show(config))) == config


def test_the_configuration_in_the_manual_can_be_used(tmp_path: Path):
    manual = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    block = manual.partition("## Alerts\n")[2].partition("```toml\n")[2].partition("```")[0]
    config = configuration.load(write(tmp_path, block))
    assert [(each.name, each.after_s) for each in config.channels] == [
        ("emergency", 0), ("paging", 0), ("on-call", 300), ("head", 900), ("reading", 0)
    ]  # fmt: skip


def test_every_mistake_is_told_at_once(tmp_path: Path):
    with pytest.raises(ConfigError) as error:
        configuration.load(write(tmp_path, WRONG))
    lines = str(error.value).splitlines()[1:]
    expected = {
        "hl7[0].port": "above 65535",
        "hl7[0].tls": "needs certificate, key and ca in [tls]",
        "hl7[0].sending_facility": "",
        "webhooks[0].name": "is the name of hl7[0] already",
        "webhooks[0].url": "without a name and a password in it",
        "webhooks[0].link": "placeholders that nothing fills (patient)",
        "emails[0].sender": "is not an e-mail address",
        "emails[0].recipients": "must not be empty",
        "emails[0].quiet_hours": 'write them as "22:00-06:30"',
        "emails[0].user": "needs `password`",
        "emails[0].levels[0]": "is none of 'critical' or 'urgent'",
        "emails[0].after_s": "is below 0",
        "worklists[0].retrieve_ae_title": "is missing",
        "worklists[0].labell": "did you mean label?",
    }
    told = {line.partition(": ")[0]: line for line in lines}
    assert told.keys() == expected.keys(), "\n".join(lines)
    for key, words in expected.items():
        assert words in told[key]


@pytest.mark.parametrize("link", ["https://v/{alert:d}{study_uid:d}", "https://v/{study_uid!z}", "https://v/{alert"])
def test_a_link_that_no_alert_could_fill_in_is_refused(link: str):
    told = {"name": "a", "url": "https://a/", "secret": "s", "link": link}
    with pytest.raises(ValidationError, match=r"more in its braces|is no template"):
        Webhook.model_validate(told)


def test_the_example_names_all_of_them():
    text = toml.example()
    for section in configuration.CHANNELS:
        assert f"[[{section}]]" in text


def test_they_change_while_the_node_runs(tmp_path: Path):
    running = configuration.load(write(tmp_path, ""))
    wanted = configuration.load(write(tmp_path, WORKED))
    merged, changed, waiting = merge(running, wanted)
    assert set(changed) == set(configuration.CHANNELS)
    assert waiting == []
    assert merged.channels == wanted.channels


def test_check_reaches_for_each_and_tells_them_nothing(tmp_path: Path):
    with Listener() as listener:
        text = WORKED.replace("2575", str(listener.port)).replace("mail.hospital", "127.0.0.1").replace(
            "192.0.2.30", "127.0.0.1"
        ).replace("11112", "1")  # fmt: skip
        config = configuration.load(write(tmp_path, text + '[node]\nfolder = "data"\nport = 0\n'))
        items = {item.name: item for item in check(config) if item.name.startswith("channel ")}
        assert listener.got == []
    assert items["channel emergency"].ok is True
    assert {name: item.ok for name, item in items.items() if name != "channel emergency"} == dict.fromkeys(
        ("channel paging", "channel on-call", "channel reading"), False
    )
    assert items["channel paging"].kind == "environment"
    assert "paging.secret: No such file" in items["channel paging"].message
    assert "mail-password: No such file" in items["channel on-call"].message
    assert items["channel reading"].kind == "finding"
    gc.collect()
