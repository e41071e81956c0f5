"""A channel, and the other side of it."""

from __future__ import annotations

import socket

import pytest

from serve.remote.channel import Channel
from tests.serve.remote.sides import OtherSide


@pytest.fixture
def ends() -> tuple[Channel, OtherSide]:
    ours, theirs = map(Channel, socket.socketpair())
    return ours, OtherSide(theirs)
