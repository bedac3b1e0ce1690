"""Ranks that meet, and what those are told that wait in vain: real ranks, as forks of one process."""

import logging
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import forked
from utils import dist_meeting
from utils.dist_meeting import Card, absent

PATIENCE_S = 2.0
RANKS = 4


def meet(body=lambda: None) -> tuple[str, list[str]]:
    """What it ended with and what was told."""
    told: list[str] = []
    try:
        with dist_meeting.met(told.append, PATIENCE_S):
            body()
            time.sleep(0.5)  # connecting ends for all at the same time
    except ValueError as error:
        dist_meeting.tell_others(str(error), error)
        return str(error), told
    time.sleep(1 if rank_number() == 0 else 0)  # the place goes with rank 0, and some may be slow
    return "met", told


def rank_number() -> int:
    return int(os.environ["RANK"])


def laid_out(action):
    """Two nodes of two ranks, as a launcher tells of them."""
    rank = rank_number()
    os.environ |= {"LOCAL_RANK": str(rank % 2), "LOCAL_SIZE": "2", "CROSS_RANK": str(rank // 2)}
    return action()


def all_come():
    return meet()


def three_come():
    if rank_number() == 3:
        return "stayed away", []
    return meet()


def nobody_holds_the_place():
    if rank_number() == 0:
        return "stayed away", []
    return meet()


def one_comes_twice():
    if rank_number() == 3:
        os.environ["RANK"] = "2"
        time.sleep(0.5)
    return meet()


def one_fails_early():
    if rank_number() == 3:
        dist_meeting.tell_others("a GPU is absent")
        return "failed", []
    return meet()


def launchers_disagree():
    if rank_number() == 1:
        os.environ["WORLD_SIZE"] = "2"
    return meet(lambda: time.sleep(1))


def something_else_answers():
    """A service of its own for each rank but the first: one that greets, one that only listens, one that hangs up."""
    if rank_number() == 0:
        return "stayed away", []
    place, callers = socket.create_server(("127.0.0.1", 0)), []
    os.environ["MASTER_PORT"] = str(place.getsockname()[1])

    def serve():
        while True:
            callers.append(place.accept()[0])
            if rank_number() == 1:
                callers[-1].sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
            elif rank_number() == 3:
                callers[-1].close()

    threading.Thread(target=serve, daemon=True).start()
    words, _ = meet()
    tried = len(callers)
    dist_meeting.tell_others(words)
    return words, [len(callers) - tried]


def nobody_connects():
    """All wait in C code, where nothing can be raised; so the words are in the log."""
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    return meet(lambda: time.sleep(60))


CASES = (
    nobody_connects, all_come, three_come, nobody_holds_the_place, one_comes_twice, one_fails_early, launchers_disagree,
    something_else_answers,
)  # fmt: skip


def worker(folder: Path, _: None) -> dict[str, list]:
    started = time.monotonic()
    cases = {
        case.__name__: forked.start(RANKS, folder / case.__name__, lambda case=case: laid_out(case)) for case in CASES
    }
    told = {"statuses": forked.statuses(cases["nobody_connects"], 30), "seconds": [time.monotonic() - started]}
    told["nobody_connects"] = [rank.log.read_text() for rank in cases.pop("nobody_connects")]
    for name, ranks in cases.items():
        assert forked.statuses(ranks, 30) == [0] * RANKS, [rank.log.read_text() for rank in ranks]
        told[name] = [torch.load(folder / name / f"result_{rank}.pt") for rank in range(RANKS)]
    return told


@pytest.fixture(scope="module")
def told(tmp_path_factory) -> dict[str, list]:
    return forked.run_forked("tests.unit.test_dist_meeting:worker", tmp_path_factory.mktemp("met"))


def test_all_come(told):
    assert told["all_come"] == [("met", [])] * RANKS


def test_who_has_not_come_is_named(told):
    *came, _ = (words for words, _ in told["three_come"])
    assert len(set(came)) == 1
    assert came[0].startswith("1 of 4 ranks did not come to 127.0.0.1:")
    assert "within 2 s: rank 3, on " in came[0], "the node is known by rank 2, which came"
    assert "came: rank 0, rank 1 and rank 2 on " in came[0]
    assert "--node_rank" in came[0] and "--master_addr=127.0.0.1 --master_port=" in came[0]


def test_a_place_that_nobody_holds(told):
    for words, _ in told["nobody_holds_the_place"][1:]:
        assert "for rank 0: nobody answers at 127.0.0.1:" in words and "(Connection refused)" in words
        assert "--node_rank=0" in words


def test_a_place_that_is_of_something_else(told):
    for words, tried_again in told["something_else_answers"][1:]:
        assert ": something answers at 127.0.0.1:" in words and "is the port that of another service" in words
        assert tried_again == [0], "for the last words it is not knocked at again"
    assert "(Ping failed" in told["something_else_answers"][1][0]
    assert "(it says nothing)" in told["something_else_answers"][2][0]


def test_a_rank_that_comes_twice(told):
    words = {words for words, _ in told["one_comes_twice"]}
    assert any(text.startswith("rank 2 came twice to ") and "a --node_rank of its own" in text for text in words)
    assert all("rank 2 came twice to " in text for text in words), "the others hear of it"


def test_a_rank_that_fails_early_is_heard_of(told):
    *waiting, _ = (words for words, _ in told["one_fails_early"])
    assert all(words.startswith("rank 3 on ") and words.endswith("ended first: a GPU is absent") for words in waiting)


def test_launchers_that_were_told_otherwise(told):
    words = [words for words, _ in told["launchers_disagree"]]
    assert any("of 4 ranks, and rank 1 on " in text and text.count(" of 2: the launchers must") for text in words)


def test_ranks_that_do_not_reach_each_other_end(told):
    assert told["statuses"] == [1] * RANKS
    assert told["seconds"][0] < 20
    for rank, said in enumerate(told["nobody_connects"]):
        assert ("all 4 ranks came to 127.0.0.1:" in said) == (rank % 2 == 0), "the first of each node tells"
    assert "still wait: rank 0 on " in told["nobody_connects"][0] and "GLOO_SOCKET_IFNAME" in told["nobody_connects"][0]


@pytest.mark.parametrize(
    ("came", "words"),
    [
        ([(0, 0), (1, 0)], "rank 2 and rank 3, all of node 1"),
        ([(0, 0), (2, 1)], "rank 1, on host0; rank 3, on host1"),
        ([(0, 0), (1, 1)], "rank 2 and rank 3"),
    ],
    ids=["a node", "a rank of each", "ranks not numbered node by node"],
)
def test_nodes_are_named_as_far_as_known(came, words):
    cards = [Card(rank, 4, f"host{node}", 1, node, 2) for rank, node in came]
    missing = sorted({0, 1, 2, 3} - {rank for rank, _ in came})
    assert absent(cards, missing) == words
