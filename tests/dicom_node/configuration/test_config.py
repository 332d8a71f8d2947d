"""The configuration file: what is wrong in it is said in its own words, all of it, and nothing else is raised."""

from __future__ import annotations

import json
import os
import re
import tempfile
import tomllib
from pathlib import Path

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicom_node.configuration import config, toml
from dicom_node.configuration.config import Config, ConfigError, load
from dicom_node.configuration.mistakes import Mistake
from dicom_node.configuration.sections import Destination, Node, TriageRule
from runtime.triage import Rule

PACS = '[[destinations]]\nname = "pacs"\nae_title = "PACS"\nhost = "pacs.local"\nport = 104\n'
CODE = """
[[codes]]
name = "subdural"
finding = ["35486000", "SCT", "Subdural intracranial hemorrhage"]
site = ["18545000", "SCT", "Dura"]
"""


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for variable in [name for name in os.environ if name.startswith("SCANSIDE_")]:
        monkeypatch.delenv(variable)


@pytest.fixture
def write(tmp_path):
    def write(text: str | bytes) -> Path:
        path = tmp_path / "node.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def mistakes(path: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value).splitlines()[1:]


def test_an_empty_file_is_the_defaults(write):
    path = write("")
    loaded = load(path)
    assert loaded.node == Node(folder=path.parent / "scanside-data")
    assert loaded.node.address == "127.0.0.1"
    assert loaded.model == Config().model
    assert loaded.destinations == ()


def test_every_line_of_the_example_that_is_commented_out_may_be_taken_in(write):
    text = toml.example()
    taken_in = re.sub(r"(?m)^# (\w+ = |\[)", r"\1", text)
    assert taken_in.count("\n# ") < text.count("\n# ")
    loaded = config.load(write(taken_in))
    assert (loaded.model.max_batch, loaded.model.plans.name) == (4, "plans")


def test_codes_of_a_sites_own(write):
    own = 'title = "Subdurales Hämatom"\ncolour = [0, 255, 255]\n' + CODE.replace('"subdural"', '"hygroma"').replace(
        '"35486000", "SCT"', '"T-A0100", "99HOSPITAL"'
    )
    subdural, hygroma = load(write(CODE + own)).codes
    assert subdural.finding == ("35486000", "SCT", "Subdural intracranial hemorrhage")
    assert (subdural.title, subdural.colour) == ("Subdurales Hämatom", (0, 255, 255))
    assert hygroma.finding[:2] == ("T-A0100", "99HOSPITAL")
    assert hygroma.title is None


def test_the_example_loads_and_holds_every_key_and_default(write):
    path = write(toml.example())
    loaded = load(path)
    assert loaded.triage == Config().triage
    assert loaded.series == Config().series
    assert [destination.name for destination in loaded.destinations] == ["pacs"]
    for section, field in Config.model_fields.items():
        assert f"[{section}]" in toml.example(), section
        for annotation in (field.annotation, *getattr(field.annotation, "__args__", ())):
            for key, inner in getattr(annotation, "model_fields", {}).items():
                assert f"{key} = " in toml.example(), (section, key)
                first_words = " ".join(inner.description.split()[:6])
                assert f"# {first_words}" in toml.example(), (section, key)


@pytest.mark.parametrize(
    "text",
    [
        "",
        PACS,
        "triage = []\n",
        '[node]\nname = "Röntgen 1, d\'oeil"\n',
        '[model]\nbundle = "Bündel \\\\ 1"\n[node]\nae_title = "A \\" B"\n',
        toml.example(),
    ],
)
def test_what_is_shown_loads_as_the_same(write, text):
    loaded = load(write(text))
    assert load(write(toml.show(loaded))) == loaded


def test_paths_are_relative_to_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    loaded = load(write('[node]\nfolder = "here"\n[model]\nbundle = "/abs/bundle"\nplans = "plans"\n'))
    assert loaded.node.folder == tmp_path / "here"
    assert loaded.model.plans == tmp_path / "plans"
    assert loaded.model.bundle == Path("/abs/bundle")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[node]\nport = 70000", "node.port: 70000 is above 65535"),
        ("[node]\nport = -1", "node.port: -1 is below 0"),
        ('[node]\nport = "many"', 'node.port: "many" is not a whole number'),
        ("[node]\nprot = 104", "node.prot: unknown key; did you mean port?"),
        ("[node]\nzzz = 1", "node.zzz: unknown key; there are ae_title, address, port"),
        ("[nodes]\nport = 104", "nodes: unknown key; did you mean node?"),
        ("_env_file = 'x'", "_env_file: unknown key"),
        ("node = 3", "node: 3 is not a table"),
        ('[node]\nae_title = "SEVENTEEN LETTERS"', 'node.ae_title: "SEVENTEEN LETTERS" is not an AE title'),
        ('[node]\nae_title = "  "', 'node.ae_title: "  " is not an AE title'),
        ('[node]\nae_title = "A\\\\B"', "is not an AE title"),
        ('[node]\nae_title = "A\\tB"', "is not an AE title"),
        ('[node]\nae_title = "RÖNTGEN"', "is not an AE title"),
        ('[node]\nname = "ct\\n1"', 'node.name: "ct\\n1" is not a name: it has a control character'),
        ('[node]\nname = "ct\\u001b[31m"', "is not a name: it has a control character"),
        ('[node]\nname = "ct\\u0000"', "is not a name: it has a control character"),
        ("[node]\nae_title = 5", "node.ae_title: 5 is not a text; put it in quotes"),
        ('[node]\nallowed_calling_aes = ["CT1", "\\\\"]', "node.allowed_calling_aes[1]: "),
        ('[node]\nallowed_calling_aes = "CT1"', 'node.allowed_calling_aes: "CT1" is not a list'),
        ("[node]\nfolder = 3", "node.folder: 3 is not a path"),
        ('[node]\nfolder = "a\\u0000b"', "is not a path"),
        ('[node]\nfolder = "~nobody-at-all/x"', "names a home folder that is not there"),
        ('[node]\naddress = "my host"', 'node.address: "my host" is not a host name'),
        ("[node]\nfree_floor_gb = nan", "node.free_floor_gb: NaN is not a finite number"),
        ("[node]\nmax_associations = 0", "node.max_associations: 0 is below 1"),
        ('[model]\nbackend = "cuda"', "model.backend: \"cuda\" is none of 'auto', 'tensorrt', 'onnxruntime'"),
        ('[model]\nplans = ""', 'model.plans: "" is not a path'),
        ('[model]\nbackend = "triton"', 'model.backend: "triton" needs servers in [triton]'),
        ("[triton]\nservers = []", "triton.servers: must not be empty"),
        (
            '[triton]\nservers = ["gpu1:8001"]',
            'triton.servers[0]: "gpu1:8001" is no address of a server: write grpc://',
        ),
        (
            '[triton]\nservers = ["grpc://a:1", "grpc://a:1/"]',
            "has grpc://a:1 more than once: each replica is a server of its own",
        ),
        ('[triton]\nservers = ["grpc://a:1"]\nfail_over = "triton"', 'triton.fail_over: "triton" is none of'),
        ('[triton]\nservers = ["grpc://a:1"]\ndeadline_s = 0', "triton.deadline_s: 0 is not above 0"),
        ('[triton]\nservers = ["grpc://a:1"]\ndeadline_s = 10', "triton.deadline_s: 10 is above 7.5"),
        (
            '[model]\nbackend = "tensorrt"\nprecision = "int8-cpu"',
            'model.precision: "int8-cpu" is not for tensorrt: it takes fp32, fp16, int8',
        ),
        ('[model]\nbackend = "onnxruntime"\nprecision = "fp16"', "is not for onnxruntime: it takes fp32, int8-cpu"),
        (
            '[model]\nbackend = "onnxruntime-cuda"\nprecision = "int8"',
            "is not for onnxruntime-cuda: it takes fp32, fp16",
        ),
        ("[model]\nthreads = 1.5", "model.threads: 1.5 is not a whole number"),
        ("[series]\nidle_timeout_s = 0", "series.idle_timeout_s: 0 is not above 0"),
        ('[series]\nbone_kernels = ["B60", "FC["]', 'series.bone_kernels[1]: "FC[" is not a regular expression'),
        ("[series]\nidle_timeout_s = []", "series.idle_timeout_s: [] is not a number"),
        (PACS.replace('name = "pacs"\n', ""), "destinations[0].name: is missing"),
        (PACS + "results = []", "destinations[0].results: must not be empty"),
        (
            PACS + 'results = ["sr", "png"]',
            "destinations[0].results[1]: \"png\" is none of 'notice', 'sr', 'sc', 'pdf' or 'seg'",
        ),
        (
            '[results]\nsegmentation = "fractional"',
            "results.segmentation: \"fractional\" is none of 'binary' or 'labelmap'",
        ),
        (CODE.replace('"SCT", "Dura"', '"SCT"'), "codes[0].site:"),
        (CODE.replace('"SCT", "Dura"', '"SCT"'), "has three parts"),
        (CODE.replace("35486000", "35486001"), "35486001 is no SNOMED CT identifier, for its check digit is wrong"),
        (CODE.replace("35486000", "3548600035486000354860"), '"3548600035486000354860" has to be 1 to 16 characters'),
        (CODE.replace('"Dura"', '"Du\\\\ra"'), "without backslash and control characters"),
        (CODE.replace('"Dura"', '""'), '"" has to be 1 to 64 characters'),
        (CODE + CODE, 'codes[1].name: "subdural" is the name of codes[0] already'),
        (CODE + "colour = [0, 300, 0]", "codes[0].colour: [0, 300, 0] is not a colour"),
        (CODE + "colour = [0, 255]", "codes[0].colour: [0, 255] is not a colour"),
        (CODE + 'title = "硬膜下血腫"', "can't be drawn"),
        (CODE + "klass = 1", "codes[0].klass: unknown key"),
        (PACS + 'levels = ["crit"]', 'destinations[0].levels[0]: "crit" is none of'),
        (PACS + PACS.replace("104", "105"), 'destinations[1].name: "pacs" is the name of destinations[0] already'),
        ('destinations = "pacs"', 'destinations: "pacs" is not a list'),
        (PACS.replace("[[", "[").replace("]]", "]"), "write [[destinations]], with double brackets"),
        ('[triage]\nlevel = "urgent"', "write [[triage]], with double brackets"),
        ("[node]\nallowed_calling_aes = {}", "node.allowed_calling_aes: {} is not a list"),
        ('[[triage]]\nlevel = "critcal"\nclasses = ["any"]\nvolume_ml = 1', 'triage[0].level: "critcal" is none of'),
        ('[[triage]]\nlevel = "urgent"\nclasses = []\nvolume_ml = 1', "triage[0].classes: must not be empty"),
        ('[[triage]]\nlevel = "urgent"\nclasses = ["any", "sdh"]\nvolume_ml = 1', "is ambiguous"),
        ('[[triage]]\nlevel = "urgent"\nclasses = ["any"]\nvolume_ml = -1', "triage[0].volume_ml: -1 is below 0"),
        ('[log]\nlevel = "loud"', 'log.level: "loud" is none of'),
    ],
)
def test_a_mistake_is_named_in_the_words_of_the_file(write, text, expected):
    found = mistakes(write(text))
    assert len(found) == 1
    assert expected in found[0]


def test_every_mistake_is_listed_at_once(write):
    found = mistakes(
        write(
            '[node]\nport = 70000\nprot = 1\n[model]\nbackend = "cuda"\n'
            + PACS
            + PACS.replace("104", '"x"')
            + PACS.replace("pacs.local", "127.0.0.1").replace("104", "70000")
        )
    )
    assert [line.split(":")[0] for line in found] == [
        "destinations[1].name",
        "destinations[2].name",
        "destinations[2].host",
        "node.port",
        "node.prot",
        "model.backend",
        "destinations[1].port",
        "destinations[2].port",
    ]


def test_ports_of_the_node_are_not_the_same(write):
    assert mistakes(write("[page]\nport = 11112\n[web]\nport = 11112\n")) == [
        "web.port: 11112 is node.port already: each needs one of its own",
        "page.port: 11112 is node.port already: each needs one of its own",
    ]
    assert load(write("[node]\nport = 0\n[page]\nport = 0\n")).page.port == 0


@pytest.mark.parametrize(
    ("address", "host", "same"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "localhost", True),
        ("0.0.0.0", "localhost", True),
        ("::", "::1", True),
        ("0.0.0.0", "10.0.0.7", False),
        ("127.0.0.1", "10.0.0.7", False),
        ("scanside.local", "scanside.local", True),
        ("scanside.local", "pacs.local", False),
    ],
)
def test_a_destination_is_not_the_node_itself(write, address, host, same):
    text = f'[node]\naddress = "{address}"\nport = 104\n' + PACS.replace("pacs.local", host)
    if same:
        assert "is this node itself" in mistakes(write(text))[0]
    else:
        assert load(write(text)).destinations[0].host == host


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[node]\nport == 3\n", "line 2"),
        (b"[node]\nae_title = '\xff'\n", "is not UTF-8"),
        ("a = 1\na = 2\n", "line 2"),
    ],
)
def test_what_is_no_toml_says_where(write, content, expected):
    with pytest.raises(ConfigError, match=expected):
        load(write(content))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match="No such file or directory; `scanside config --example"):
        load(tmp_path / "node.toml")
    with pytest.raises(ConfigError, match="is a folder; name the configuration file itself"):
        load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory; name a configuration file that can be read"):
        load(tmp_path / "file" / "node.toml")


def test_a_file_from_windows_notepad_has_a_byte_order_mark(write):
    assert load(write(b"\xef\xbb\xbf[node]\nport = 104\n")).node.port == 104


def test_what_is_sound_stands_beside_the_mistakes(write, tmp_path, monkeypatch):
    monkeypatch.setenv("SCANSIDE_NOED__PORT", "1")
    rule = '[[triage]]\nlevel = "urgent"\nclasses = ["sdh"]\nvolume_ml = '
    text = '[node]\nport = 70000\nfolder = "here"\n[model]\nbundle = "b"\nzzz = 1\n'
    sound, found = config.examine(write(text + PACS + PACS.replace('"pacs"', '"x"').replace("104", "0") + rule + "-1"))
    assert [mistake.key for mistake in found] == [
        "SCANSIDE_NOED__PORT",
        "node.port",
        "model.zzz",
        "destinations[1].port",
        "triage[0].volume_ml",
    ]
    assert (sound.node.folder, sound.model.bundle) == (tmp_path / "here", tmp_path / "b")
    assert sound.node.port == Node().port
    assert [destination.name for destination in sound.destinations] == ["pacs"]
    assert sound.triage == ()


def test_a_default_in_a_wrong_values_place_may_clash_and_is_no_mistake(write):
    here = PACS.replace("pacs.local", "127.0.0.1").replace("104", str(Node().port))
    sound, found = config.examine(write("[node]\nport = 70000\n" + here))
    assert [mistake.key for mistake in found] == ["node.port"]
    assert sound.destinations == ()


@pytest.mark.parametrize(
    ("wrong", "key", "concerns"),
    [
        ("node.port", "node.port", True),
        ("node", "node.port", True),
        ("node.allowed_calling_aes[1]", "node.allowed_calling_aes", True),
        ("destinations[0].port", "destinations", True),
        ("node.port", "node.folder", False),
        ("node.folder", "node.folders", False),
        ("nodes", "node.port", False),
    ],
)
def test_a_mistake_concerns_what_it_is_about(wrong, key, concerns):
    assert Mistake(wrong, "is wrong").concerns(key) is concerns


def test_the_environment_overrides_the_file(write, monkeypatch):
    monkeypatch.setenv("SCANSIDE_NODE__PORT", "4242")
    monkeypatch.setenv("SCANSIDE_NODE__ALLOWED_CALLING_AES", '["CT1", "CT2"]')
    pacs = {"name": "env", "ae_title": "PACS", "host": "pacs", "port": 1}
    monkeypatch.setenv("SCANSIDE_DESTINATIONS", json.dumps([pacs]))
    monkeypatch.setenv("SCANSIDE_NVONNXPARSER", "a test's, and no configuration")
    loaded = load(write('[node]\nport = 104\nae_title = "FILE"\n' + PACS))
    assert (loaded.node.port, loaded.node.ae_title) == (4242, "FILE")
    assert loaded.node.allowed_calling_aes == ("CT1", "CT2")
    assert loaded.destinations == (Destination(**pacs),)


@pytest.mark.parametrize(
    ("variable", "value", "expected"),
    [
        ("SCANSIDE_NODE__PORT", "70000", 'node.port: "70000" is above 65535 (from SCANSIDE_NODE__PORT)'),
        ("SCANSIDE_NODE__PROT", "1", "node.prot: unknown key; did you mean port? (from SCANSIDE_NODE__PROT)"),
        ("SCANSIDE_NOED__PORT", "1", "SCANSIDE_NOED__PORT: unknown section; did you mean node?"),
        ("SCANSIDE_NODE__ALLOWED_CALLING_AES", "CT1,CT2", "lists are JSON: SCANSIDE_NODE__ALLOWED_CALLING_AES="),
        (
            "SCANSIDE_MODEL_BACKEND",
            "tensorrt",
            "SCANSIDE_MODEL_BACKEND: unknown; did you mean SCANSIDE_MODEL__BACKEND?",
        ),
        ("SCANSIDE_PORT", "1", "SCANSIDE_PORT: unknown section; there are node, model"),
        ("SCANSIDE_MODEL__PLANS", "", 'model.plans: "" is not a path (from SCANSIDE_MODEL__PLANS)'),
        ("SCANSIDE_NODE", "3", "node: 3 is not a table (from SCANSIDE_NODE)"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(write, monkeypatch, variable, value, expected):
    monkeypatch.setenv(variable, value)
    found = mistakes(write(""))
    assert len(found) == 1
    assert expected in found[0]


def test_the_environment_does_not_reach_a_config_made_in_code(monkeypatch):
    monkeypatch.setenv("SCANSIDE_NODE__PORT", "4242")
    assert Config().node.port == 11112


def test_a_config_is_frozen_and_checked_in_code_too():
    pacs = Destination(name="pacs", ae_title=" PACS ", host="pacs", port=104)
    assert pacs.ae_title == "PACS"
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        Config().node.port = 3
    with pytest.raises(pydantic.ValidationError, match="is the name of"):
        Config(destinations=(pacs, pacs))


def test_a_triage_row_is_a_rule_of_the_runtime():
    row = TriageRule(level="urgent", classes=("any",), volume_ml=1, also=["subdural"], reason="two kinds")
    assert Rule(**row.model_dump()) == Rule("urgent", ("any",), 1.0, ("subdural",), "two kinds")


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
KEYS = {
    **{
        name: sorted(type(section).model_fields)
        for name, section in Config()
        if isinstance(section, pydantic.BaseModel)
    },
    "destinations": sorted(Destination.model_fields),
    "triage": sorted(TriageRule.model_fields),
}


@given(st.data())
def test_any_value_anywhere_is_either_taken_or_a_mistake(data):
    section = data.draw(st.sampled_from(sorted(KEYS)))
    inner = st.dictionaries(st.sampled_from(KEYS[section]) | st.text(max_size=8), VALUES, max_size=4)
    table = {section: data.draw(VALUES | inner | st.lists(inner, max_size=3))}
    try:
        Config.model_validate(table)
    except pydantic.ValidationError as error:
        for details in error.errors():
            assert str(config._mistake(details))
        sound = config._what_is_sound(table, error)
        assert Config.model_validate(sound.model_dump()) == sound


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_any_file_is_either_loaded_or_a_config_error(content):
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(content)
        file.flush()
        try:
            loaded = load(Path(file.name))
        except ConfigError:
            return
    tomllib.loads(toml.show(loaded))
