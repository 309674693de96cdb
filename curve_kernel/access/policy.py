"""Which client may use which channel, by the list as it is now, or as it was at the last look.

A handshake waits until the list has been read. A message does not: it is held against what the last
look found, which `revocation` renews as soon as the list changes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import datetime
from errno import EMFILE, ENFILE
from os import O_CLOEXEC, O_RDONLY, close, devnull, urandom
from os import open as open_descriptor
from types import MappingProxyType
from typing import Any, NamedTuple

import zmq

from ..clock import time
from .allowlist import MANAGER, OWN_CLIENT, AuthorizedClients, Client
from .audit import Reason
from .connection import Peer

__all__ = ["Activity", "Policy", "Speaker"]

VIEWER_CHANNELS = frozenset({"iopub", "hb"})
# Names that clients gave themselves, and senders of messages, that are kept until the list changes.
_KEPT = 4096
# A tag has a channel, a number, a key and a name of 64 letters at most. A username of more than so many
# characters may be a name with invisible ones in between.
_TAG_SIZE, _USERNAME_SIZE = 512, 256
# Characters of a request's type that are kept.
_KIND_SIZE = 64
# Letters and symbols that show nothing: Hangul's fillers and Braille's blank.
_BLANK = frozenset("\u115f\u1160\u2800")


class Speaker(NamedTuple):
    """The client whose connection a message came by, as the list is now.

    ``reason`` is why the client may not use the channel any more, or None. ``tag`` is a frame that
    names it, for a message that is sent on inside the kernel, where libzmq does not say it again.
    """

    channel: str
    peer: Peer
    reason: Reason | None
    tag: zmq.Frame


class Activity(NamedTuple):
    """What is shown of clients besides their connections.

    By public key the type of the last request and when it came; by public key when the access ends;
    and where a record is kept, or why it is not, empty if none is asked for.
    """

    last_requests: Mapping[str, tuple[str, float]] = MappingProxyType({})
    ends: Mapping[str, datetime] = MappingProxyType({})
    record: str = ""


class _Look:
    """What one look at the list found."""

    def __init__(self, listed: Mapping[bytes, tuple[Client, bool]]) -> None:
        self.listed = listed
        self.names = {_plain(client.name) for client, _ in listed.values()}
        self.ending = [client for client, ended in listed.values() if client.until and not ended]
        self.speakers: dict[tuple[str, str], Speaker] = {}
        self.tagged: dict[bytes, Speaker] = {}
        self.usernames: dict[tuple[str, str], str] = {}


class Policy:
    """Which client may use which channel.

    Parameters
    ----------
    manager_key, own_client_key : bytes
        The kernel's own public key, 40 bytes of Z85: the manager, which holds its secret key, may use
        every channel. And the key of the client inside the kernel, its debugger, which uses shell.
    clients : AuthorizedClients
        The clients that are listed.
    allow_any : bool
        Accept every client that has the server key; the list then only gives names.
    open_heartbeat : bool
        Accept every client that has the server key on hb: stock's heartbeat channels make a key pair
        that is listed nowhere, also those of a manager that holds the kernel's.
    """

    def __init__(
        self,
        manager_key: bytes,
        own_client_key: bytes,
        clients: AuthorizedClients,
        *,
        allow_any: bool,
        open_heartbeat: bool,
    ) -> None:
        self.clients = clients
        self._manager_key = manager_key
        self._own_client_key = own_client_key
        self._allow_any = allow_any
        self._open_heartbeat = open_heartbeat
        # Nobody outside this process can make a tag.
        self._tag_start = urandom(16)
        self._look = _Look(clients.listed())
        self.looks = 0
        """How many looks have found another list than the one before."""
        self.has_served = False
        """Whether a client that is listed has been accepted since the start."""
        self.requests: dict[str, tuple[str, float]] = {}
        """By public key, the type of the client's last request, and when it came."""

    # Thread: monitor

    def decide(self, channel: str, key: bytes) -> tuple[Peer, Reason | None]:
        """Return the client with public *key*, 40 bytes of Z85, and why it may not use *channel*.

        The list is read for it.
        """
        found = None
        if not self._is_own(channel, key):
            client = self.clients.find(key)
            found = client and (client, self.clients.has_ended(client))
            if found != self._look.listed.get(key):
                self.look()
        peer, reason = self._judge(channel, key, found)
        self.has_served |= bool(peer.name) and reason is None
        return peer, reason

    def look(self) -> bool:
        """Read the list, for `still` and for messages; return whether that was possible.

        While code in a cell has every file that the process may open, the list of the last look holds,
        and only time goes on. A list that can't be read for another reason lists nobody.
        """
        can_read = True
        try:
            close(open_descriptor(devnull, O_RDONLY | O_CLOEXEC))
        except OSError as error:
            can_read = error.errno not in (EMFILE, ENFILE)
        try:
            if can_read:
                listed = self.clients.listed()
            else:
                known = (client for client, _ in self._look.listed.values())
                listed = {
                    client.public_key: (client, self.clients.has_ended(client)) for client in known
                }
        except Exception:
            self._take_in({})
            raise
        self._take_in(listed)
        return can_read

    def _take_in(self, listed: Mapping[bytes, tuple[Client, bool]]) -> None:
        if listed != self._look.listed:
            self._look = _Look(listed)
            self.looks += 1

    def seconds_left(self) -> float | None:
        """Return the seconds until the next access ends, or None if none has an end."""
        return min(map(self.clients.seconds_left, self._look.ending), default=None)

    def still(self, channel: str, key: str) -> tuple[Peer, Reason | None]:
        """Return the client with that key, and why it may not go on, by the last look."""
        found = self._look.listed.get(key.encode())
        peer, reason = self._judge(channel, key.encode(), found)
        return peer, Reason.REVOKED if reason is Reason.UNKNOWN_KEY else reason

    def _is_own(self, channel: str, key: bytes) -> bool:
        """Whether the kernel itself has that key, whatever is listed."""
        return key == self._manager_key or (key == self._own_client_key and channel == "shell")

    def _judge(
        self, channel: str, key: bytes, found: tuple[Client, bool] | None
    ) -> tuple[Peer, Reason | None]:
        shown = key.decode()
        if self._is_own(channel, key):
            return Peer(MANAGER if key == self._manager_key else OWN_CLIENT, "", shown), None
        if found is None or found[1]:
            if self._allow_any or (channel == "hb" and self._open_heartbeat):
                return Peer("any", "", shown), None
            if found is not None:
                return Peer("", found[0].name, shown), Reason.ENDED
            return Peer("", "", shown), Reason.UNKNOWN_KEY
        client = found[0]
        if client.role == "viewer" and channel not in VIEWER_CHANNELS and not self._allow_any:
            return Peer(client.role, client.name, shown), Reason.NOT_FOR_VIEWERS
        return Peer(client.role, client.name, shown), None

    # Thread: any

    def speaker(self, channel: str, user_id: str) -> Speaker:
        """Return the client of a message by its connection's user id."""
        look = self._look
        if (speaker := look.speakers.get((channel, user_id))) is not None:
            return speaker
        _, _, key, _ = user_id.split(" ", 3)
        tag = self._tag_start + f"{channel} {user_id}".encode()
        peer, reason = self.still(channel, key)
        speaker = Speaker(channel, peer, reason, zmq.Frame(tag))
        if len(look.speakers) >= _KEPT:
            look.speakers.clear()
            look.tagged.clear()
        look.speakers[channel, user_id] = look.tagged[tag] = speaker
        return speaker

    def tagged(self, frame: Any) -> Speaker | None:
        """Return the client whose tag *frame* is, or None if it is no tag."""
        if len(frame) > _TAG_SIZE:
            return None
        content = frame.bytes if isinstance(frame, zmq.Frame) else bytes(frame)
        if (speaker := self._look.tagged.get(content)) is not None:
            return speaker
        if not content.startswith(self._tag_start):
            return None
        channel, user_id = content[len(self._tag_start) :].decode().split(" ", 1)
        return self.speaker(channel, user_id)

    def username(self, peer: Peer, said: object) -> str:
        """Return the username of *peer*, which says that it is *said*.

        A listed client has its name there, and one that is not listed any more has none. Everybody else
        keeps what it says, unless that can be taken for a client that is listed.
        """
        if peer.name:
            return peer.name
        if not peer.role or not isinstance(said, str):
            return ""
        look, is_short = self._look, len(said) <= _USERNAME_SIZE
        if is_short and (username := look.usernames.get((peer.role, said))) is not None:
            return username
        username = peer.role if peer.role in (MANAGER, OWN_CLIENT) else ""
        if is_short:
            if _plain(said) not in look.names:
                username = said
            if len(look.usernames) >= _KEPT:
                look.usernames.clear()
            look.usernames[peer.role, said] = username
        return username

    def requested(self, speaker: Speaker, kind: object) -> None:
        """Take note of a client's request."""
        if len(self.requests) >= _KEPT and speaker.peer.public_key not in self.requests:
            self.requests.clear()
        self.requests[speaker.peer.public_key] = str(kind)[:_KIND_SIZE], time()

    def ends(self) -> dict[str, datetime]:
        """Return by public key when the access of a listed client ends, if it does."""
        return {
            client.public_key.decode(): client.until for client in self._look.ending if client.until
        }


def _plain(name: str) -> str:
    """Return *name* as somebody reads it who does not look at its case and its invisible characters."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(
        letter
        for letter in folded
        if unicodedata.category(letter)[0] not in "CZM" and letter not in _BLANK
    )
