"""The triage page's addresses and what answers at each."""

from __future__ import annotations

import asyncio
import hashlib
import socket
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import structlog
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dicom_node import status
from dicom_node.alerts.ledger import Ledger
from dicom_node.images.gate import NotAnalysed
from dicom_node.page import hazards, study
from dicom_node.page.board import SHOWN, Lookout
from dicom_node.page.guard import Guard, form_of, user_of
from dicom_node.page.login import COOKIE, SESSION_S, Attempts, LoginError, Sessions, Users
from dicom_node.page.palette import Palette
from dicom_node.page.peers import Peers
from dicom_node.page.slices import Pictures
from dicom_node.page.views import Views
from dicom_node.results import picture
from dicom_node.storage.journal import JournalError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from dicom_node.configuration.config import Config
    from dicom_node.page.board import Row
    from dicom_node.page.slices import Entry

STATIC = Path(__file__).parent / "static"
NAME_COOKIE = "scanside-name"  # of who acknowledges where nobody logs in
YEAR_S = 365 * 86400
LONGEST_NAME = 64
NOTHING = picture.png(Image.new("RGBA", (1, 1)))

log = structlog.get_logger(__name__)


class Application:
    """The page of a node, as an ASGI application.

    Parameters
    ----------
    config : of the node

    Raises
    ------
    LoginError : the users can't be read

    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._palette = Palette.of(config.codes)
        self._lookout, self._pictures, self._peers = Lookout(config), Pictures(self._palette), Peers(config)
        self._attempts = Attempts()
        self._checking = asyncio.Lock()  # each check takes 32 MiB; and none may slip by while another is counted
        self._users = Users(config.page.users) if config.page.users else None
        self._sessions = Sessions(self._users, config.node.folder) if self._users else None
        where = f"{config.node.ae_title} on {socket.gethostname()}"
        self._views = Views(config.page, tuple(hazards.find(config)), where, self._palette)
        series = "/series/{study}/{series}"
        routes = [
            Route("/", self._list),
            Route("/board", self._board),
            Route(series, self._series),
            Route(f"{series}/panel", self._panel),
            Route(f"{series}/slices", self._slices),
            Route(f"{series}/slices/{{name}}/{{window}}.png", self._slice),
            Route(f"{series}/masks/{{version}}/{{name}}.png", self._mask),
            Route("/alerts/{id:int}", self._alert),
            Route("/alerts/{id:int}/acknowledge", self._acknowledge, methods=["POST"]),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/logout", self._logout, methods=["POST"]),
            Mount("/static", StaticFiles(directory=STATIC)),
        ]
        handlers = {JournalError: _no_journal, LoginError: _no_journal, HTTPException: self._not_there}
        self._guarded = Guard(Starlette(routes=routes, exception_handlers=handlers), config.page, self._sessions)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    def start(self) -> None:
        """Begin to ask the destinations whether they answer."""
        self._peers.start()

    def stop(self) -> None:
        self._peers.stop()

    # the list

    def _list(self, request: Request) -> Response:
        content, digest = self._drawn_board(request)
        return self._views.page("list.html", request, board=content, digest=digest, user=user_of(request))

    def _board(self, request: Request) -> Response:
        return _fragment(request, *self._drawn_board(request))

    def _drawn_board(self, request: Request) -> tuple[str, str]:
        everything = "all" in request.query_params
        board = self._lookout.look()
        shown = None if everything else SHOWN
        content = self._views.fragment(
            "board.html", board=board, shown=shown, everything=everything, peers=self._peers.look()
        )
        return content, _digest(content)

    # one series

    def _series(self, request: Request) -> Response:
        row = self._row(request)
        content, digest = self._drawn_panel(request, row)
        return self._views.page(
            "series.html",
            request,
            row=row,
            panel=content,
            digest=digest,
            user=user_of(request),
            windows=picture.WINDOWS,
        )

    def _panel(self, request: Request) -> Response:
        return _fragment(request, *self._drawn_panel(request, self._row(request)))

    def _drawn_panel(self, request: Request, row: Row) -> tuple[str, str]:
        shown = study.read(self._config, row, self._pictures)
        user = user_of(request)
        content = self._views.fragment(
            "panel.html",
            row=row,
            study=shown,
            waiting=study.waiting(row),
            by=user or unquote(request.cookies.get(NAME_COOKIE, "")),
            user=user,
            viewer=study.viewer_link(self._config.page.viewer, row) if self._config.page.viewer else None,
            failed="unnamed" in request.query_params,
        )
        return content, _digest(content)

    def _slices(self, request: Request) -> Response:
        row = self._row(request)
        shown = study.read(self._config, row, self._pictures)
        return JSONResponse(study.slice_list(shown, _address(row), self._palette))

    def _slice(self, request: Request) -> Response:
        window = request.path_params["window"]
        if window not in picture.WINDOWS:
            raise HTTPException(404)
        made = self._pictures.slice(self._entry(request)[1], window)
        if isinstance(made, NotAnalysed):
            return PlainTextResponse(f"this image can't be shown: {made.reason.value}\n", 404)
        return _png(made)

    def _mask(self, request: Request) -> Response:
        row, entry = self._entry(request)
        masks = study.masks(row, self._pictures)
        made = self._pictures.mask(entry, masks)
        if made is None:  # of an older result, which has just been replaced: the browser will hear of it
            return Response(NOTHING, media_type="image/png")
        return _png(made) if masks.version == request.path_params["version"] else Response(made, media_type="image/png")

    def _row(self, request: Request) -> Row:
        board = self._lookout.look()
        row = board.find(request.path_params["study"], request.path_params["series"])
        if row is None and board.troubles:  # not that it isn't there: it can't be seen
            raise JournalError(board.troubles[0])
        if row is None:
            raise HTTPException(404)
        return row

    def _entry(self, request: Request) -> tuple[Row, Entry]:
        row = self._row(request)
        for entry in study.entries(row, self._pictures):
            if entry.name == request.path_params["name"]:
                return row, entry
        raise HTTPException(404)

    # what people do

    def _alert(self, request: Request) -> Response:
        address = self._address_of(request.path_params["id"])
        if address is None:
            raise HTTPException(404)
        return RedirectResponse(address, 303)

    async def _acknowledge(self, request: Request) -> Response:
        form = await form_of(request)
        user = user_of(request)
        by = user or " ".join(form.get("by", "").split())[:LONGEST_NAME]
        if not by.isprintable():
            by = ""
        back = await run_in_threadpool(self._address_of, request.path_params["id"])
        if back is None:
            raise HTTPException(404)
        if not by:
            return RedirectResponse(f"{back}?unnamed", 303)
        await run_in_threadpool(self._write_acknowledgement, request.path_params["id"], by, form.get("level"))
        answer = RedirectResponse(back, 303)
        if user is None:
            answer.set_cookie(NAME_COOKIE, quote(by), max_age=YEAR_S, **self._cookie_flags())
        return answer

    def _address_of(self, alert_id: int) -> str | None:
        for row in self._lookout.look().rows:
            if row.alert and row.alert.id == alert_id:
                return _address(row)
        return None

    def _write_acknowledgement(self, alert_id: int, by: str, seen: str | None) -> None:
        with closing(status.open_journal(self._config, read_only=False)) as journal:
            if Ledger(journal).acknowledge(alert_id, by, seen):
                log.info("acknowledged_on_page", alert=alert_id)
        self._lookout.expire()

    async def _login(self, request: Request) -> Response:
        if self._users is None or self._sessions is None:
            return RedirectResponse("/", 303)
        if request.method == "GET":
            return self._views.page("login.html", request, problem="", name="", user=None)
        form = await form_of(request)
        name, address = form.get("name", ""), request.client.host if request.client else ""
        whose = (f"name {name}", f"address {address}")
        async with self._checking:
            if wait_s := self._attempts.wait_s(*whose):
                problem = f"Too many wrong passwords: try again in {wait_s:.0f} s."
                return self._views.page("login.html", request, problem=problem, name=name, user=None, status=429)
            user = await run_in_threadpool(self._users.check, name, form.get("password", ""))
            if user is None:
                self._attempts.failed(*whose)
                log.warning("login_failed", address=address)
                problem = "Name or password is wrong."
                return self._views.page("login.html", request, problem=problem, name=name, user=None, status=403)
            self._attempts.succeeded(*whose)
        answer = RedirectResponse(_place(request.query_params.get("next", "")), 303)
        answer.set_cookie(COOKIE, self._sessions.open(user), max_age=int(SESSION_S), **self._cookie_flags())
        return answer

    async def _logout(self, _request: Request) -> Response:
        answer = RedirectResponse("/login", 303)
        answer.delete_cookie(COOKIE, **self._cookie_flags())
        return answer

    def _cookie_flags(self) -> dict[str, Any]:
        # lax: a link in a mail that is read in the browser leads here, too. What changes something wants more: `Guard`
        return {"httponly": True, "samesite": "lax", "secure": self._config.page.tls, "path": "/"}

    def _not_there(self, request: Request, error: Exception) -> Response:
        code = error.status_code if isinstance(error, HTTPException) else 500
        if "hx-request" in request.headers or "/slices" in request.url.path or "/masks" in request.url.path:
            return PlainTextResponse("not there\n", code)
        return self._views.page("gone.html", request, user=user_of(request), status=code)


def _no_journal(_request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"{error}\n", 503)


def _fragment(request: Request, content: str, digest: str) -> Response:
    """A part of a page, or nothing where the browser has it as it is; the clock goes along, for what counts seconds."""
    headers = {"X-Now": f"{time.time():.3f}", "X-Digest": digest}
    if request.query_params.get("have") == digest:
        return Response(status_code=204, headers=headers)
    return Response(content, media_type="text/html", headers=headers)


def _digest(content: str) -> str:
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _png(content: bytes) -> Response:
    # nobody's name is in it; a browser that kept none would ask for each slice again at every turn of the wheel
    return Response(content, media_type="image/png", headers={"Cache-Control": "private, max-age=600"})


def _place(wanted: str) -> str:
    """Where to go after a login: what was asked for before it, if that is a page of ours."""
    is_ours = wanted.startswith("/") and not wanted.startswith(("//", "/\\"))
    return quote(wanted) if is_ours else "/"


def _address(row: Row) -> str:
    return f"/series/{quote(row.study)}/{quote(row.series)}"
