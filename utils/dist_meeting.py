"""Ranks check in by name before they connect: who has not come is named, and nobody waits for them for ever."""

import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as torch_dist

from utils import dist

MEETING_S = 600.0  # for ranks to come, and again for them to connect: people start the second machine by hand
AGENT_S = 30.0  # torchrun holds the meeting place before it starts a rank: where it is not, it has ended
FIRST_WORD_S, NEXT_WORD_S = 5.0, 30.0  # from when on, and how often, waiting is told
POLL_S = 0.2
TELL_S = 3.0  # for a rank that fails early to reach the others
LINGER_S = 2.0  # that it stays for them to read why, where its end takes the meeting place with it

PORT_TAKEN = ("EADDRINUSE", "ddress already in use")
NO_WAY = ("connectFullMesh failed", "nable to find address", "nable to resolve")  # gloo's words
NETWORKS = (
    "where a machine has several networks, GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME must name the one that joins the "
    "machines (`ip addr` lists them); a firewall must let all ports through between them"
)
FAULT = "fault"

Say = Callable[[str], None]
logger = logging.getLogger(__name__)


class NotMet(ValueError):
    """Ranks have not come, or not connected, or one of them has ended; the same words on all that are there."""


class Card(NamedTuple):
    """Who has come."""

    rank: int
    world: int  # ranks in all, as its launcher told it
    host: str
    pid: int
    node: int
    ranks_here: int  # on its node


_stores: dict[str, torch_dist.Store] = {}
_hopeless: set[str] = set()  # places that could not be used, and are not tried again for the last words


def silent(_: str) -> None:
    """For those who need not know."""


@contextmanager
def met(say: Say = silent, patience_s: float = MEETING_S) -> Iterator[None]:
    """Wait for all ranks, then look after what the body does: connect them.

    Args:
        say: told of waiting that takes long, on one rank of each node.
        patience_s: for the ranks to come, and again for the body.

    Raises:
        ValueError: the port is taken, a rank came twice, or `NotMet`. In the body, where no exception can reach a
            thread that waits for another machine, the process ends with these words instead.
    """
    say = say if dist.local_rank() == 0 else silent
    store = _open(patience_s, say)
    _come(store)
    cards = _wait(store, say, patience_s)
    over = threading.Event()
    threading.Thread(target=_watch, args=(store, cards, say, patience_s, over), daemon=True).start()
    try:
        yield
        store.set(f"connected_{dist.rank()}", "")
    except RuntimeError as error:
        if any(sign in str(error) for sign in NO_WAY):
            raise _no_way(store, str(error).splitlines()[0]) from error
        raise
    finally:
        over.set()


def tell_others(text: str, error: Exception | None = None) -> None:
    """This rank ends before there is a run folder to say so in: those who wait for it are to know why.

    Args:
        error: a `NotMet` is everyone's, and needs no name.
    """
    agent = _agent_holds_it()
    shared = isinstance(error, NotMet)
    nobody = not _stores and (shared or (dist.is_main() and not agent and _is_one_node()))
    if dist.world_size() == 1 or nobody or _place() in _hopeless:
        return  # nobody waits, or waits in vain as this rank did, or the launcher ends them all
    rank = None if shared else dist.rank()
    with suppress(RuntimeError, ValueError):
        store = _open(TELL_S, silent)
        store.compare_set(FAULT, "", json.dumps({"rank": rank, "host": socket.gethostname(), "text": text}))
        if dist.is_main() or agent:
            time.sleep(LINGER_S)


def first_fault() -> str | None:
    """What the first rank said that ended before there was a run folder; None: nobody did, or nobody knows."""
    with suppress(RuntimeError):
        return _fault(_stores[_place()]) if _place() in _stores else None
    return None


def tell_launcher(text: str) -> None:
    """torchrun's last words are a table with what each rank left for it; without this it has none.

    The format is that of `torch.distributed.elastic.multiprocessing.errors.ErrorHandler`, without a traceback.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is not None:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}), encoding="utf-8")


# --- the meeting place ------------------------------------------------------------------------------------------------


def _address() -> tuple[str, int]:
    return os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "29500"))


def _place() -> str:
    return "{}:{}".format(*_address())


def _agent_holds_it() -> bool:
    """torchrun's agent on the first node does; otherwise rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _is_one_node() -> bool:
    return dist.ranks_here() == dist.world_size()


def _open(patience_s: float, say: Say) -> torch_dist.Store:
    """The keys and values that all ranks see. torch's own connection later uses the same port and the same server."""
    if _place() not in _stores:
        try:
            _stores[_place()] = _first_opened(patience_s, say)
        except ValueError:
            _hopeless.add(_place())
            raise
    return _stores[_place()]


def _first_opened(patience_s: float, say: Say) -> torch_dist.Store:
    host, port = _address()
    holds = dist.is_main() and not _agent_holds_it()
    if not holds:
        _knock(patience_s, say)
    try:
        server = _connected(host, port, holds, min(patience_s, AGENT_S))
    except (torch_dist.DistNetworkError, NoAnswer) as error:
        if any(sign in str(error) for sign in PORT_TAKEN):
            raise ValueError(
                f"port {port} of {host}, at which the ranks meet, is taken, most likely by another run; give this one "
                f"its own: --master_port={port + 1} before train.py"
            ) from error
        me, why = f"{socket.gethostname()} (rank {dist.rank()})", (str(error) or "it says nothing").splitlines()[0]
        if holds:
            mend = "--master_addr must be the address of the machine with rank 0, as the others see it"
            raise ValueError(f"{me} cannot use {_place()}, where the ranks meet: {why}; {mend}") from error
        raise ValueError(
            f"{me}: something answers at {_place()}, where the ranks meet, but not as rank 0 would ({why}): is the "
            "port that of another service, or has rank 0 just ended? --master_addr must be the address of the machine "
            "with rank 0, and --master_port one that is free there, the same on all machines"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun may use the same server again
    return torch_dist.PrefixStore(f"reelpipe/{attempt}", server)


def _connected(host: str, port: int, holds: bool, patience_s: float) -> torch_dist.TCPStore:
    """In a thread: where something answers and then says nothing, torch waits for ever, whatever its timeout.

    Raises:
        DistNetworkError: in torch's words.
        NoAnswer: without words.
    """
    made: Future[torch_dist.TCPStore] = Future()

    def connect() -> None:
        try:
            timeout = timedelta(seconds=patience_s)
            made.set_result(
                torch_dist.TCPStore(host, port, None, holds, timeout, wait_for_workers=False, multi_tenant=True)
            )
        except RuntimeError as error:
            made.set_exception(error)

    threading.Thread(target=connect, name="meeting place", daemon=True).start()
    server = made.result(1.5 * patience_s + TELL_S)  # torch may be at one more attempt
    server.set_timeout(timedelta(seconds=AGENT_S))
    return server


def _knock(patience_s: float, say: Say) -> None:
    """Wait until somebody answers there. A socket of ours: torch's own attempts end in many lines of C++."""
    patience_s = min(patience_s, AGENT_S) if _agent_holds_it() else patience_s
    started, told = time.monotonic(), time.monotonic() - NEXT_WORD_S + FIRST_WORD_S
    while True:
        try:
            socket.create_connection(_address(), timeout=5.0).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        now = time.monotonic()
        silence = f"rank 0: nobody answers at {_place()} ({reason})"
        if now - started > patience_s:
            raise NotMet(
                f"{socket.gethostname()} (rank {dist.rank()}) waited {patience_s:g} s for {silence}; is the launcher "
                "running on the first machine (--node_rank=0), and what does it say? --master_addr must be its address "
                "and --master_port the same on all machines; a firewall must let it through"
            )
        if now - told > NEXT_WORD_S:
            told = now
            say(f"waiting for {silence}")
        time.sleep(POLL_S)


# --- who is there -----------------------------------------------------------------------------------------------------


def _come(store: torch_dist.Store) -> None:
    rank, host = dist.rank(), socket.gethostname()
    card = Card(rank, dist.world_size(), host, os.getpid(), dist.node(), dist.ranks_here())
    if store.add(f"came_{rank}", 1) > 1:
        there = ""
        if store.check([_key(rank)]):
            other = _card(store, rank)
            there = f", process {other.pid} of {other.host} and process {card.pid} of {host}"
        raise ValueError(
            f"rank {rank} came twice to {_place()}{there}: each machine needs a --node_rank of its own, from 0; or an "
            "earlier start still waits there: end it, or give this one another --master_port"
        )
    store.set(_key(rank), json.dumps(card))


def _wait(store: torch_dist.Store, say: Say, patience_s: float) -> list[Card]:
    """Until all have come; their cards, by rank."""
    world, started = dist.world_size(), time.monotonic()
    told, missing = started - NEXT_WORD_S + FIRST_WORD_S, list(range(world))
    try:
        while not store.check([_key(rank) for rank in missing]):
            if (fault := _fault(store)) is not None:
                raise NotMet(fault)
            now = time.monotonic()
            if now - told > NEXT_WORD_S or now - started > patience_s:
                told = now
                missing = [rank for rank in missing if not store.check([_key(rank)])]
                if not missing:  # the last ones have come just now
                    break
                cards = [_card(store, rank) for rank in range(world) if rank not in missing]
                if now - started > patience_s:
                    raise NotMet(_not_come(cards, missing, now - started))
                say(f"waiting for {len(missing)} of {world} ranks: {absent(cards, missing)}")
            time.sleep(POLL_S)
        cards = [_card(store, rank) for rank in range(world)]
    except RuntimeError as error:
        lost = f"{_place()}, where the ranks meet, is gone ({str(error).splitlines()[0]})"
        raise NotMet(f"{lost}: the launcher of the first machine, or rank 0, has ended; it says why") from error
    others = [card for card in cards if card.world != world]
    if others:
        raise ValueError(
            f"rank {dist.rank()} was told of {world} ranks, and {_names([card.rank for card in others])} on "
            f"{others[0].host} of {others[0].world}: the launchers must be given the same number of machines and ranks"
        )
    return cards


def absent(cards: Sequence[Card], missing: Sequence[int]) -> str:
    """`rank 2 and rank 3, all of node 1`: the ranks, and the nodes as far as those who came let us know."""
    sizes = {card.ranks_here for card in cards}
    size = sizes.pop() if len(sizes) == 1 else 0
    if size == 0 or any(card.node != card.rank // size for card in cards):
        return _names(missing)  # nodes of several sizes, or ranks that are not numbered node by node
    words, hosts = [], {card.node: card.host for card in cards}
    for node in sorted({rank // size for rank in missing}):
        ranks = [rank for rank in missing if rank // size == node]
        place = f"on {hosts[node]}" if node in hosts else f"all of node {node}"
        words.append(f"{_names(ranks)}, {place}")
    return "; ".join(words)


def _not_come(cards: Sequence[Card], missing: Sequence[int], seconds: float) -> str:
    there = "; ".join(
        f"{_names([card.rank for card in cards if card.host == host])} on {host}"
        for host in dict.fromkeys(card.host for card in cards)
    )
    return (
        f"{len(missing)} of {dist.world_size()} ranks did not come to {_place()} within {seconds:.0f} s: "
        f"{absent(cards, missing)}\n  {'came' if len(cards) > 1 else 'only'}: {there}\n  start the launcher on every "
        f"machine, each with its own --node_rank and all with --master_addr={_address()[0]} "
        f"--master_port={_address()[1]}; where it runs, look at what it says, and at the firewall between the machines"
    )


def _watch(store: torch_dist.Store, cards: Sequence[Card], say: Say, patience_s: float, over: threading.Event) -> None:
    """Ends the process where connecting takes too long, or another rank has given it up."""
    started, told, why = time.monotonic(), False, ""
    while not over.wait(POLL_S) and not why:
        seconds = time.monotonic() - started
        if seconds > FIRST_WORD_S and not told:
            told = True
            hint = "" if dist.on_gpu() else "; the first time on a machine DeepSpeed compiles a small library"
            say(f"connecting {len(cards)} ranks{hint}")
        with suppress(RuntimeError):  # gone with rank 0: then what connects fails too, or the time ends it
            if (fault := _fault(store)) is not None:
                why = fault
            elif seconds > patience_s:
                silent_ones = [card for card in cards if not store.check([f"connected_{card.rank}"])]
                why = _not_connected(silent_ones, len(cards), seconds)
                store.compare_set(FAULT, "", json.dumps({"rank": None, "host": "", "text": why}))
        if seconds > patience_s + AGENT_S:
            why = why or _not_connected(cards, len(cards), seconds)
    if over.wait(LINGER_S):  # it may come to its own error meanwhile
        return
    tell_launcher(why)
    if dist.local_rank() == 0:
        logger.error("%s", why)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _no_way(store: torch_dist.Store, words: str) -> ValueError:
    """What to tell of gloo's words. A rank that gives up closes its connections before it can say why."""
    deadline = time.monotonic() + (LINGER_S if "by peer" in words else 0.0)
    while (fault := _fault(store)) is None and time.monotonic() < deadline:
        time.sleep(POLL_S)
    if fault is not None:
        return NotMet(fault)
    reason = words.rpartition("] ")[2].partition("$")[0]
    return ValueError(
        f"{socket.gethostname()} (rank {dist.rank()}) came to {_place()}, but cannot connect to the other ranks: "
        f"{reason}\n  {NETWORKS}"
    )


def _not_connected(waiting: Sequence[Card], world: int, seconds: float) -> str:
    them = " and ".join(f"rank {card.rank} on {card.host}" for card in waiting)
    return (
        f"all {world} ranks came to {_place()}, but they do not reach each other: after {seconds:.0f} s these still "
        f"wait: {them}\n  {NETWORKS}"
    )


def _fault(store: torch_dist.Store) -> str | None:
    if not store.check([FAULT]):
        return None
    fault = json.loads(store.get(FAULT))
    return (
        fault["text"]
        if fault["rank"] is None
        else f"rank {fault['rank']} on {fault['host']} ended first: " + (fault["text"])
    )


def _key(rank: int) -> str:
    return f"rank_{rank}"


def _card(store: torch_dist.Store, rank: int) -> Card:
    return Card(*json.loads(store.get(_key(rank))))


def _names(ranks: Sequence[int]) -> str:
    names = [f"rank {rank}" for rank in ranks]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
