"""What the supervisors of a job say to each other: lines of JSON over TCP, node 0 in the middle.

In: node 0's host, ports that follow from the job and the attempt, a secret that only this submission knows. Out:
messages; which nodes were lost. The other nodes speak to node 0, node 0 speaks to all of them. A supervisor of an
earlier attempt is not let in. Nothing here waits except the meeting at the start.
"""

import contextlib
import hashlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

from ii_dist.config import ClusterError

Message = dict[str, Any]
MEET_S = 300.0
"""The tasks of a job step start within seconds of each other; a node that does not is broken."""
_HELLO_S = 2.0
_SEND_S = 5.0
_LONGEST_BYTES = 1 << 20


class Wire:
    """One connection: whole lines in, whole lines out."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setblocking(False)
        self._rest = b""
        self._early: list[bytes] = []
        """Lines that came together with the one that was waited for."""
        self.lost = False

    def send(self, message: Message) -> None:
        try:
            self._socket.settimeout(_SEND_S)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.lost = True
        finally:
            self._socket.setblocking(False)

    def take(self) -> list[Message]:
        """What has arrived; never waits. Nonsense ends the connection."""
        lines, self._early = self._early, []
        try:
            while new := self._socket.recv(1 << 16):
                *whole, self._rest = (self._rest + new).split(b"\n")
                lines += whole
                if len(self._rest) > _LONGEST_BYTES:
                    break
            self.lost = True
        except BlockingIOError:
            pass
        except OSError:
            self.lost = True
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError, RecursionError):
            self.lost = True
            return []

    def wait(self, limit_s: float) -> Message | None:
        """The next single message; None where none comes in time."""
        until_s = time.monotonic() + limit_s
        while not self.lost and (left_s := until_s - time.monotonic()) > 0:
            with selectors.DefaultSelector() as ready:
                ready.register(self._socket, selectors.EVENT_READ)
                ready.select(left_s)
            if taken := self.take():
                self._early = [json.dumps(message).encode() for message in taken[1:]]
                return taken[0]
        return None

    def close(self) -> None:
        self._socket.close()


class Bus:
    """This node's end. `wires` has every other node on node 0, and node 0 elsewhere; none where there is one node."""

    def __init__(self, node_rank: int, wires: dict[int, Wire]) -> None:
        self.node_rank = node_rank
        self._wires = wires
        self._waiting: list[tuple[int, Message]] = []

    @property
    def others(self) -> set[int]:
        return set(self._wires)

    @property
    def lost(self) -> set[int]:
        return {node for node, wire in self._wires.items() if wire.lost}

    def send(self, kind: str, **facts: Any) -> None:
        """To all others that this node speaks to."""
        for wire in self._wires.values():
            if not wire.lost:
                wire.send({"kind": kind, **facts})

    def poll(self, *kinds: str) -> list[tuple[int, Message]]:
        """What has arrived of these kinds, with the node that said it; other kinds wait for who asks for them."""
        arrived = [(node, message) for node, wire in self._wires.items() if not wire.lost for message in wire.take()]
        self._waiting += arrived
        taken = [pair for pair in self._waiting if pair[1].get("kind") in kinds]
        self._waiting = [pair for pair in self._waiting if pair[1].get("kind") not in kinds]
        return taken

    def close(self) -> None:
        for wire in self._wires.values():
            wire.close()


def lead(ports: Sequence[int], nodes: int, name: str, secret: str, stopped: Callable[[], bool]) -> Bus:
    """Node 0's end, when all other nodes have come or `stopped` says not to wait. Raises ClusterError otherwise."""
    wires: dict[int, Wire] = {}
    until_s = time.monotonic() + MEET_S
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(ports, nodes))
        listener.settimeout(0.2)
        while len(wires) < nodes - 1 and not stopped():
            if time.monotonic() > until_s:
                missing = [node for node in range(1, nodes) if node not in wires]
                raise ClusterError(f"node(s) {missing} did not reach node 0 within {MEET_S:.0f} s; see their logs")
            try:
                connection, _ = listener.accept()
            except TimeoutError:
                continue
            wire = Wire(connection)
            node = _welcome(wire, nodes, name, secret)
            if node is None or node in wires:
                wire.close()
            else:
                wires[node] = wire
    return Bus(0, wires)


def follow(host: str, ports: Sequence[int], node_rank: int, name: str, secret: str, stopped: Callable[[], bool]) -> Bus:
    """Another node's end. Tries every port until node 0 answers. Raises ClusterError when it does not."""
    until_s = time.monotonic() + MEET_S
    while not stopped():
        for port in ports:
            with contextlib.suppress(OSError):
                wire = Wire(socket.create_connection((host, port), timeout=_HELLO_S))
                nonce = secrets.token_hex(8)
                wire.send({"node": node_rank, "nonce": nonce, "proof": _proof(secret, name, f"{node_rank} {nonce}")})
                answer = wire.wait(_HELLO_S) or {}
                if _is_proof(answer.get("proof"), _proof(secret, name, f"welcome {nonce}")):
                    return Bus(node_rank, {0: wire})
                wire.close()
        if time.monotonic() > until_s:
            raise ClusterError(f"node 0 ({host}, ports {ports[0]} to {ports[-1]}) not reached within {MEET_S:.0f} s")
        time.sleep(0.2)
    return Bus(node_rank, {})


def _listen(ports: Sequence[int], nodes: int) -> socket.socket:
    for port in ports:
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), backlog=nodes)
    raise ClusterError(
        f"ports {ports[0]} to {ports[-1]} are all in use on {socket.gethostname()}: is a job left there?"
    )


def _welcome(wire: Wire, nodes: int, name: str, secret: str) -> int | None:
    """The node that speaks, once it has shown that it is of this attempt."""
    hello = wire.wait(_HELLO_S) or {}
    node, nonce = hello.get("node"), hello.get("nonce")
    if not isinstance(node, int) or not isinstance(nonce, str) or not 0 < node < nodes:
        return None
    if not _is_proof(hello.get("proof"), _proof(secret, name, f"{node} {nonce}")):
        return None
    wire.send({"proof": _proof(secret, name, f"welcome {nonce}")})
    return node


def _proof(secret: str, name: str, words: str) -> str:
    return hmac.new(secret.encode(), f"{name} {words}".encode(), hashlib.sha256).hexdigest()


def _is_proof(said: object, right: str) -> bool:
    return isinstance(said, str) and hmac.compare_digest(said.encode(), right.encode())
