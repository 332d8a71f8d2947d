"""The tables of the journal, version by version: each adds to the one before, and is never changed again."""

from __future__ import annotations

_TABLES = (
    """CREATE TABLE series (
        study_uid TEXT NOT NULL,
        series_uid TEXT NOT NULL,
        revision INTEGER NOT NULL,
        state TEXT NOT NULL,
        reason TEXT,
        slices INTEGER NOT NULL,
        report_json TEXT,
        recorded REAL NOT NULL,
        PRIMARY KEY (study_uid, series_uid, revision)
    )""",
    """CREATE TABLE outbox (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        study_uid TEXT NOT NULL,
        series_uid TEXT NOT NULL,
        revision INTEGER NOT NULL,
        role TEXT NOT NULL,
        path TEXT NOT NULL,
        sop_class_uid TEXT NOT NULL,
        sop_uid TEXT NOT NULL,
        destination TEXT NOT NULL,
        state TEXT NOT NULL,
        attempts INTEGER NOT NULL,
        next_try REAL NOT NULL,
        last_error TEXT,
        created REAL NOT NULL,
        sent REAL,
        UNIQUE (sop_uid, destination),
        FOREIGN KEY (study_uid, series_uid, revision) REFERENCES series
    )""",
    "CREATE INDEX outbox_by_destination ON outbox (destination, state)",
    "PRAGMA user_version = 1",
)
_TRIES = ("ALTER TABLE outbox ADD COLUMN tries INTEGER NOT NULL DEFAULT 0", "PRAGMA user_version = 2")

# What scanners say of what they send. `step`: a performed procedure step;
# `announced`: an instance of a series, and by whom;
# `commitment`: a report, JSON, that is owed for a request.
_ANNOUNCED = (
    """CREATE TABLE step (
        sop_uid TEXT PRIMARY KEY,
        calling_ae TEXT NOT NULL,
        state TEXT NOT NULL,
        changed REAL NOT NULL
    )""",
    """CREATE TABLE announced (
        series_uid TEXT NOT NULL,
        sop_uid TEXT NOT NULL,
        source TEXT NOT NULL,
        PRIMARY KEY (series_uid, sop_uid, source)
    ) WITHOUT ROWID""",
    """CREATE TABLE commitment (
        transaction_uid TEXT NOT NULL,
        calling_ae TEXT NOT NULL,
        report TEXT NOT NULL,
        created REAL NOT NULL,
        tries INTEGER NOT NULL DEFAULT 0,
        next_try REAL NOT NULL,
        last_error TEXT,
        told REAL,
        PRIMARY KEY (transaction_uid, calling_ae)
    )""",
    "PRAGMA user_version = 3",
)

# Whether a destination keeps what it took.
_CONFIRMATION = (
    "ALTER TABLE outbox ADD COLUMN transaction_uid TEXT",
    "ALTER TABLE outbox ADD COLUMN asked INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE outbox ADD COLUMN confirmed REAL",
    "CREATE INDEX outbox_by_transaction ON outbox (transaction_uid)",
    "CREATE INDEX outbox_by_series ON outbox (study_uid, series_uid)",
    "PRAGMA user_version = 4",
)

# When it was announced: what is old goes.
_AGES = (
    "ALTER TABLE announced ADD COLUMN announced REAL NOT NULL DEFAULT 0",
    "UPDATE announced SET announced = CAST(strftime('%s', 'now') AS REAL)",
    "PRAGMA user_version = 5",
)

# Who has to be told at once, and has been (`dicom_node.alerts.ledger`). `alert`: one a series; `acknowledgement`: each
# that was ever given, at which level; `message`: one a channel and occasion, with what it says; `attempt`: each try.
_ALERTS = (
    """CREATE TABLE alert (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        study_uid TEXT NOT NULL,
        series_uid TEXT NOT NULL,
        revision INTEGER NOT NULL,
        level TEXT NOT NULL,
        reason TEXT NOT NULL,
        state TEXT NOT NULL,
        raised REAL NOT NULL,
        changed REAL NOT NULL,
        acknowledged REAL,
        acknowledged_by TEXT,
        patient TEXT NOT NULL,
        evidence TEXT NOT NULL,
        UNIQUE (study_uid, series_uid)
    )""",
    """CREATE TABLE acknowledgement (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        alert_id INTEGER NOT NULL REFERENCES alert ON DELETE CASCADE,
        by TEXT NOT NULL,
        at REAL NOT NULL,
        raised REAL NOT NULL,
        level TEXT NOT NULL
    )""",
    """CREATE TABLE message (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        alert_id INTEGER NOT NULL REFERENCES alert ON DELETE CASCADE,
        channel TEXT NOT NULL,
        occasion TEXT NOT NULL,
        level TEXT NOT NULL,
        control_id TEXT NOT NULL UNIQUE,
        standing TEXT NOT NULL,
        said TEXT NOT NULL,
        state TEXT NOT NULL,
        due REAL NOT NULL,
        holds INTEGER NOT NULL DEFAULT 0,
        attempts INTEGER NOT NULL DEFAULT 0,
        refusals INTEGER NOT NULL DEFAULT 0,
        last_error TEXT,
        created REAL NOT NULL,
        sent REAL
    )""",
    "CREATE INDEX message_by_channel ON message (channel, state)",
    "CREATE INDEX message_by_alert ON message (alert_id)",
    """CREATE TABLE attempt (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        message_id INTEGER NOT NULL REFERENCES message ON DELETE CASCADE,
        began REAL NOT NULL,
        ended REAL,
        outcome TEXT NOT NULL,
        detail TEXT
    )""",
    "CREATE INDEX attempt_by_message ON attempt (message_id)",
    "PRAGMA user_version = 6",
)

# Which node a row is of, and which one sends it. `node`: one that shares the database (`membership`), by the database's
# clock; `token`: which folder that is; `keeper`: who finishes what it has left; `open`: its series without a result,
# JSON.
_NODES = (
    "ALTER TABLE series ADD COLUMN node TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE outbox ADD COLUMN node TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE outbox ADD COLUMN sender TEXT",
    "ALTER TABLE commitment ADD COLUMN node TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE alert ADD COLUMN node TEXT NOT NULL DEFAULT ''",
    "ALTER TABLE message ADD COLUMN sender TEXT",
    """CREATE TABLE node (
        name TEXT PRIMARY KEY,
        token TEXT NOT NULL,
        folder TEXT NOT NULL,
        shared INTEGER NOT NULL,
        seen REAL NOT NULL,
        expires REAL NOT NULL,
        keeper TEXT,
        emptied REAL,
        open TEXT NOT NULL DEFAULT '[]'
    )""",
    "PRAGMA user_version = 7",
)

# A node that has made the same result as the one that recorded it, of how many slices, and when.
_TWINS = (
    """CREATE TABLE twin (
        study_uid TEXT NOT NULL,
        series_uid TEXT NOT NULL,
        revision INTEGER NOT NULL,
        node TEXT NOT NULL,
        slices INTEGER NOT NULL,
        recorded REAL NOT NULL,
        PRIMARY KEY (study_uid, series_uid, revision, node),
        FOREIGN KEY (study_uid, series_uid, revision) REFERENCES series ON DELETE CASCADE
    )""",
    "PRAGMA user_version = 8",
)

VERSIONS = (_TABLES, _TRIES, _ANNOUNCED, _CONFIRMATION, _AGES, _ALERTS, _NODES, _TWINS)
