"""Who may see the page: a file of names and hashed passwords, a signed cookie, and few attempts.

A line of the file is ``name:scrypt:N:r:p:salt:hash``, the last two in base64; `scanside page-password` writes it. The
file is read again when it changes. Whoever is taken out of it, or gets another password, is logged out by that.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, ClassVar

from runtime.errors import ScansideError

if TYPE_CHECKING:
    from pathlib import Path

COOKIE = "scanside"
SESSION_S = 12 * 3600.0  # a shift
N, R, P = 1 << 15, 8, 1  # OWASP's password storage cheat sheet has N = 2^17 for a server alone; 32 MiB and 0.1 s here
MAX_MEMORY = 1 << 28
ATTEMPTS, PENALTY_S = 5, 60.0  # wrong passwords for a name or from an address, and how long both then wait
MOST_REMEMBERED = 10_000
SHORTEST = 8
KEY = "page.key"


class LoginError(ScansideError):
    """A file of users that can't be read, or holds what is no user."""

    exit_code: ClassVar[int] = 2


@dataclass(frozen=True, slots=True)
class User:
    """A line of the file."""

    name: str
    line: str


def make_line(name: str, password: str) -> str:
    """A line for the file of users.

    Raises
    ------
    LoginError : a name with a colon, or a password that is too short

    """
    if not name or ":" in name or not name.isprintable() or name != name.strip():
        raise LoginError(f"{name!r} can't be a user's name: no colon, no control character, no space at an end")
    if len(password) < SHORTEST:
        raise LoginError(f"the password is shorter than {SHORTEST} characters: choose a longer one")
    salt = secrets.token_bytes(16)
    encoded = (base64.b64encode(part).decode() for part in (salt, _hash(password, salt, N, R, P)))
    return ":".join((name, "scrypt", str(N), str(R), str(P), *encoded))


class Users:
    """The file of users.

    Parameters
    ----------
    path : the file

    Raises
    ------
    LoginError : it can't be read, or a line is wrong

    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = 0
        self._users: dict[str, User] = {}
        self._nobody = make_line("nobody", secrets.token_hex())  # a name that is not there takes as long as one that is
        self.find("")

    def find(self, name: str) -> User | None:
        """The user of a name."""
        try:
            stamp = self._path.stat().st_mtime_ns
            if stamp != self._stamp:
                self._users, self._stamp = _parse(self._path), stamp
        except OSError as error:
            raise LoginError(
                f"page.users: {self._path}: {error.strerror}: `scanside page-password NAME >> {self._path}` makes it"
            ) from error
        return self._users.get(name)

    def check(self, name: str, password: str) -> User | None:
        """The user, if that is the password."""
        user = self.find(name)
        _, _, n, r, p, salt, wanted = (user.line if user else self._nobody).split(":")
        given = _hash(password, base64.b64decode(salt), int(n), int(r), int(p))
        return user if hmac.compare_digest(given, base64.b64decode(wanted)) and user else None


class Sessions:
    """Cookies that say who somebody is, and for how long. They hold over a restart of the page.

    Parameters
    ----------
    users : who there is
    folder : of the node, where the key is kept for its user alone

    """

    def __init__(self, users: Users, folder: Path) -> None:
        self._users, self._key = users, _key(folder)

    def open(self, user: User) -> str:
        """A cookie's value."""
        # without padding: a cookie with "=" in it is put in quotes, which browsers send back as part of it
        name = base64.urlsafe_b64encode(user.name.encode()).decode().rstrip("=")
        said = f"{name}.{int(time.time() + SESSION_S)}"
        return f"{said}.{self._sign(said, user)}"

    def whose(self, cookie: str) -> str | None:
        """The name in a cookie that is ours, not too old, and of a user whose password is the same still."""
        said, _, signature = cookie.rpartition(".")
        name, _, until = said.partition(".")
        try:
            user = self._users.find(base64.urlsafe_b64decode(name + "=" * (-len(name) % 4)).decode())
            expires = int(until)
        except (ValueError, binascii.Error):
            return None
        if user is None or not hmac.compare_digest(signature.encode(), self._sign(said, user).encode()):
            return None
        return user.name if expires > time.time() else None

    def _sign(self, said: str, user: User) -> str:
        return hmac.new(self._key, f"{said} {user.line}".encode(), hashlib.sha256).hexdigest()


class Attempts:
    """Wrong passwords, by name and by address: after some of them neither may try again for a while."""

    def __init__(self) -> None:
        self._wrong: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = Lock()

    def wait_s(self, *whose: str) -> float:
        """How long none of these may try."""
        now = time.monotonic()
        with self._lock:
            waits = [
                self._wrong[one][-ATTEMPTS] + PENALTY_S - now
                for one in whose
                if len(self._wrong.get(one, ())) >= ATTEMPTS
            ]
        return max([0.0, *waits])

    def failed(self, *whose: str) -> None:
        """Take note of a wrong password."""
        with self._lock:
            for one in whose:
                self._wrong[one] = [*self._wrong.get(one, []), time.monotonic()][-ATTEMPTS:]
                self._wrong.move_to_end(one)
            while len(self._wrong) > MOST_REMEMBERED:
                self._wrong.popitem(last=False)

    def succeeded(self, *whose: str) -> None:
        """Forget what was wrong before."""
        with self._lock:
            for one in whose:
                self._wrong.pop(one, None)


def _hash(password: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return hashlib.scrypt(password.encode(), salt=salt, n=n, r=r, p=p, maxmem=MAX_MEMORY, dklen=32)


def _parse(path: Path) -> dict[str, User]:
    users = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        name, *rest = line.strip().split(":")
        try:
            kind, n, r, p, salt, wanted = rest
            _hash("", base64.b64decode(salt), int(n), int(r), int(p))
            sound = kind == "scrypt" and len(base64.b64decode(wanted)) == 32
        except ValueError:
            sound = False
        if not sound or not name:
            raise LoginError(f"page.users: {path}, line {number}: not a line of `scanside page-password`")
        users[name] = User(name, line.strip())
    if not users:
        raise LoginError(f"page.users: {path}: names nobody: `scanside page-password NAME >> {path}`")
    return users


def _key(folder: Path) -> bytes:
    """The key that cookies are signed with: made once, and kept."""
    path = folder / KEY
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        key = path.read_bytes()
        if len(key) >= 32:
            return key
        handle = os.open(path, os.O_WRONLY | os.O_TRUNC)  # a crash between making and writing it
    key = secrets.token_bytes(32)
    with os.fdopen(handle, "wb") as file:
        file.write(key)
    return key
