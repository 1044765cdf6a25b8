"""The process that holds snapshots in memory, so that they outlive the trainer.

    python holder.py DIRECTORY LINGER_SECONDS

It keeps descriptors of memory files (``memfd_create``) that the trainer filled, sealed and sent over a socket
in ``DIRECTORY``; their pages live as long as one of the two has them open. It is in a session of its own, so
what kills the trainer's process group does not reach it. There is one per directory: it holds the
directory's lock. It ends, and memory is free again, when the owner tells it to, when no owner has come for
``LINGER_SECONDS``, or at SIGTERM; socket and directory then go with it.

After REFT (arXiv 2310.12670), whose snapshots a management process keeps as well.

Nothing but the standard library is imported: it is run by its path, starts in some 30 ms, and takes a few MiB
beside what it holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import socket
import struct
import sys
from typing import Any

SOCKET = "socket"
FOLDERS = "restore-"
"""How folders begin in which trainers look at snapshots."""
MESSAGE_BYTES = 1 << 16
_UCRED = struct.Struct("3i")

Files = dict[str, int]
"""Descriptors by name."""


class Owner:
    """The trainer that is connected."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
        self.pid, self.uid, _ = _UCRED.unpack(credentials)
        self.life = os.pidfd_open(self.pid)
        """Readable when the process is dead; a child that it forked may keep its socket open."""
        self.arriving: dict[str, Files] = {}

    def dead(self) -> bool:
        """Whether the process has ended."""
        return bool(select.select([self.life], [], [], 0)[0])

    def close(self) -> None:
        """Forget what it had not committed."""
        for files in self.arriving.values():
            _close(files)
        os.close(self.life)
        self.connection.close()


class Holder:
    """The snapshots, and who may ask for them."""

    def __init__(self, listener: socket.socket, linger_seconds: float) -> None:
        self._listener, self._linger_seconds = listener, linger_seconds
        self._snapshots: dict[str, Files] = {}
        self._owner: Owner | None = None

    def serve(self) -> None:
        """Until told to end, or nobody came."""
        while True:
            waiting: list[Any] = [self._listener]
            if self._owner is not None:
                waiting += [self._owner.connection, self._owner.life]
            patience = self._linger_seconds if self._owner is None else None
            ready, _, _ = select.select(waiting, [], [], patience)
            if not ready:
                return
            if self._owner is not None and ready != [self._listener]:
                if not self._hear(self._owner):  # all that it said, before somebody else is let in
                    return
            else:
                self._admit()

    def _admit(self) -> None:
        """Greet whoever has come. One who is gone already, killed perhaps, is nobody: what is held stays."""
        connection: socket.socket | None = None
        try:
            connection = self._listener.accept()[0]
            newcomer = Owner(connection)
        except OSError:
            if connection is not None:
                connection.close()
            return
        if self._owner is not None and self._owner.dead():
            self._part()
        try:
            if self._greet(newcomer):
                return
        except OSError:
            self._owner = None if self._owner is newcomer else self._owner
        newcomer.close()

    def _greet(self, newcomer: Owner) -> bool:
        """Whether it is the owner from now on."""
        if newcomer.uid != os.geteuid():
            _answer(newcomer.connection, {"error": "these snapshots belong to another user"})
        elif self._owner is not None:
            _answer(newcomer.connection, {"error": f"process {self._owner.pid} is training there"})
        else:
            self._owner = newcomer
            _answer(newcomer.connection, {"pid": os.getpid(), "snapshots": list(self._snapshots)})
            return True
        return False

    def _part(self) -> None:
        assert self._owner is not None
        self._owner.close()
        self._owner = None

    def _hear(self, owner: Owner) -> bool:
        """Do what the owner asks; whether to go on."""
        try:
            data, descriptors, _, _ = socket.recv_fds(
                owner.connection, MESSAGE_BYTES, 1, socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            if owner.dead():
                self._part()
            return True
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._part()
            return True
        message = json.loads(data)
        try:
            return self._do(owner, message["do"], message.get("snapshot", ""), message, descriptors)
        except OSError:
            self._part()
            return True

    def _do(self, owner: Owner, what: str, name: str, message: Any, descriptors: list[int]) -> bool:
        if what == "file":
            if descriptors:  # else this process has no room for another descriptor
                files = owner.arriving.setdefault(name, {})
                if (earlier := files.pop(message["file"], None)) is not None:
                    os.close(earlier)
                files[message["file"]] = descriptors[0]
            return True
        if what == "commit":
            files = owner.arriving.pop(name, {})
            whole = len(files) == message["files"]
            if whole:
                _close(self._snapshots.pop(name, {}))
                self._snapshots[name] = files
            else:
                _close(files)
            _answer(owner.connection, {"held": whole, "arrived": len(files)})
        elif what == "drop":
            _close(self._snapshots.pop(name, {}))
            _answer(owner.connection, {})
        elif what == "get":
            files = self._snapshots.get(name, {})
            for file, descriptor in files.items():
                _answer(owner.connection, {"file": file}, [descriptor])
            _answer(owner.connection, {"files": len(files)})
        else:
            assert what == "end", what
            _answer(owner.connection, {})
            return False
        return True


def _answer(connection: socket.socket, message: Any, descriptors: list[int] | None = None) -> None:
    data = json.dumps(message).encode()
    if descriptors:
        socket.send_fds(connection, [data], descriptors)
    else:
        connection.send(data)


def _close(files: Files) -> None:
    for descriptor in files.values():
        os.close(descriptor)


def main(directory: str, linger_seconds: float) -> int:
    """Run; the exit code: 0 ended as it should, 3 another one holds the directory."""
    directory = os.path.abspath(directory)  # it is left for another one below
    place = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(place).st_ino != os.stat(directory).st_ino:
            return 3  # the one before it has just removed the directory
    except OSError:
        return 3
    os.fchdir(place)  # a path to the socket would have to be short
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for harmless in (signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(harmless, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        if os.path.lexists(SOCKET):
            os.unlink(SOCKET)  # of one that was killed
        listener.bind(SOCKET)
        listener.listen()
        Holder(listener, linger_seconds).serve()
    finally:
        _clear(directory)
    return 0


def _clear(directory: str) -> None:
    """Remove what is this process's and its trainers', and the directory if nothing else is in it."""
    for name in os.listdir():
        if name == SOCKET:
            os.unlink(name)
        elif name.startswith(FOLDERS):
            shutil.rmtree(name, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rmdir(directory)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], float(sys.argv[2])))
