"""One end of the socket between the server's process and the engine's: whole messages, and no waiting."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable

from serve.remote.messages import Message, decode, encode

_LENGTH = struct.Struct("!Q")  # of the message that follows
_CHUNK = 1 << 18  # bytes read at once


class Channel:
    """Sends from any thread, without waiting for the other side; one thread hands over what it says.

    What the other side does not take at once waits here, and goes out from the thread that is in `serve`.
    """

    def __init__(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._socket = end
        self._sending = threading.Lock()
        self._waiting: deque[memoryview] = deque()  # sent, and not taken
        self._receiving = threading.RLock()
        self._received = bytearray()
        self._bell, self._rope = os.pipe()  # wakes `serve` when something waits
        os.set_blocking(self._rope, False)
        self._behind = self._over = False

    @property
    def is_behind(self) -> bool:
        """Whether the other side has not taken all that was sent; `serve` says when it has."""
        with self._sending:
            return self._behind

    def send(self, message: Message) -> None:
        """Where the other side is gone, nobody is told: `serve` ends."""
        data = encode(message)
        with self._sending:
            self._waiting.append(memoryview(_LENGTH.pack(len(data)) + data))
            if not self._behind:
                self._flush()
                if self._waiting and not self._over:
                    self._behind = True
                    os.write(self._rope, b"!")

    def receive(self, handle: Callable[[Message], None]) -> None:
        """Hand over what has come, in order. Raises EOFError once the other side is gone.

        It may be called from any thread: one message is handled at a time.
        """
        with self._receiving:
            while self._read():
                for message in self._messages():
                    handle(message)

    def serve(self, handle: Callable[[Message], None], caught_up: Callable[[], None] = lambda: None) -> None:
        """Hand over every message as it comes, until the other side is gone. `caught_up` is called each time
        that this side was behind, and is no more."""
        poll = select.poll()
        poll.register(self._bell, select.POLLIN)
        try:
            while True:
                poll.register(self._socket, select.POLLIN | (select.POLLOUT if self.is_behind else 0))
                ready = dict(poll.poll())
                if self._bell in ready:
                    os.read(self._bell, 64)
                self.receive(handle)
                if self._has_caught_up():
                    caught_up()
        except EOFError:
            pass
        finally:
            with self._sending:
                self._behind, self._over = False, True
                self._waiting.clear()
                self._socket.close()
                os.close(self._rope)
                os.close(self._bell)

    def close(self, timeout: float = 0.0) -> None:
        """Let the other side know that this one is gone; it gets `timeout` seconds to take what waits."""
        with self._sending:
            with contextlib.suppress(OSError):  # or it is gone itself, or does not take it in time
                self._socket.settimeout(timeout)
                while self._waiting:
                    self._socket.sendall(self._waiting.popleft())
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def _has_caught_up(self) -> bool:
        with self._sending:
            was_behind = self._behind
            self._flush()
            self._behind = was_behind and bool(self._waiting)
            return was_behind and not self._behind

    def _flush(self) -> None:
        while self._waiting:
            try:
                sent = self._socket.send(self._waiting[0])
            except BlockingIOError:
                return
            except OSError:  # nobody is there
                self._waiting.clear()
                return
            self._waiting[0] = self._waiting[0][sent:]
            if not self._waiting[0]:
                self._waiting.popleft()

    def _read(self) -> bool:
        """Whether something has come."""
        try:
            chunk = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            chunk = b""
        if not chunk:
            raise EOFError
        self._received += chunk
        return True

    def _messages(self) -> list[Message]:
        """Those that have come whole."""
        found, at, received = list[Message](), 0, self._received
        while len(received) - at >= _LENGTH.size:
            begin = at + _LENGTH.size
            end = begin + _LENGTH.unpack_from(received, at)[0]
            if end > len(received):
                break
            found.append(decode(bytes(received[begin:end])))
            at = end
        del received[:at]
        return found
