"""Why a run was stopped has words and a status, and time is kept."""

from utils.train.stopping import AT_ONCE, REQUEUED, SPARE_S, TimeLimit, age_s, early_status, exit_status, reason
from utils.train.triggers import Decision


def test_what_has_run_out_of_time_is_queued_again_and_what_was_ended_is_not():
    assert exit_status(AT_ONCE | Decision.WARNED, 85, False) == 85
    assert exit_status(AT_ONCE | Decision.TIME_UP, 85, False) == 85
    assert exit_status(AT_ONCE | Decision.TIME_UP, 85, True) == 0, "it came to its end nevertheless"
    assert exit_status(AT_ONCE | Decision.TERMINATED, 85, False) == 0
    assert exit_status(Decision.CHECKPOINT | Decision.SAVE | Decision.QUIT, 85, False) == 0


def test_a_start_that_was_ended_has_the_status_that_shells_give_it():
    ended = (Decision.INTERRUPTED, Decision.TERMINATED, Decision.HUNG_UP, Decision.ORPHANED)
    assert [early_status(cause, 85) for cause in ended] == [130, 143, 129, 143]
    assert early_status(Decision.WARNED, 85) == early_status(Decision.TIME_UP, 85) == 85


def test_every_cause_has_words():
    causes = [each for each in Decision if each not in Decision.SAVE | Decision.CHECKPOINT | Decision.QUIT]
    assert all(reason(cause) for cause in causes if cause)
    assert reason(Decision.TERMINATED | Decision.TIME_UP) == "SIGTERM came and max_runtime_minutes is nearly over"
    ctrl_c = Decision.INTERRUPTED | Decision.TERMINATED | Decision.ORPHANED
    assert reason(ctrl_c) == "Ctrl-C", "the launcher sends SIGTERM because of it, and ends"
    assert REQUEUED == Decision.WARNED | Decision.TIME_UP


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def rounds(limit: TimeLimit, clock: Clock, *seconds: float) -> list[bool]:
    """What is decided after each round."""
    decided = []
    for each in seconds:
        clock.now += each
        decided.append(bool(limit.poll() & Decision.TIME_UP))
    return decided


def test_there_is_time_for_the_longest_round_and_a_checkpoint():
    clock = Clock()
    limit = TimeLimit(10, save_s=30, clock=clock, age=100.0)  # ends after 500 s
    assert rounds(limit, clock, 10, 60, 10) == [False] * 3
    limit.saved(100)
    latest = 500 - 60 - 100 - SPARE_S - (10 + 60 + 10)  # s, from here
    assert rounds(limit, clock, *[latest / 20] * 20)[-2:] == [False, True]


def test_in_an_evaluation_there_is_time_for_the_micro_batches_until_all_have_left_it():
    """However long the whole of it would take, and the rounds before it."""
    clock = Clock()
    limit = TimeLimit(10, save_s=30, clock=clock, age=100.0)  # ends after 500 s
    rounds(limit, clock, 1)
    looks = []
    for seconds in (*[1] * 10, *[8] * 60):
        clock.now += seconds
        looks.append(bool(limit.look(3) & Decision.TIME_UP))
    latest = 500 - 3 * 8 - 30 - SPARE_S - 1  # s, from the first look on
    assert looks.index(True) == 10 + (latest - 10) // 8
    clock.now += 300
    limit = TimeLimit(10, clock=clock, age=0.0)
    clock.now += 200
    assert not limit.look(0) and not limit.look(9), "a save that took long is no micro-batch"


def test_a_round_long_ago_is_forgotten():
    clock = Clock()
    limit = TimeLimit(10, clock=clock, age=0.0)
    assert rounds(limit, clock, 400, *[1] * 99)[-1]
    clock = Clock()
    limit = TimeLimit(20, clock=clock, age=0.0)
    assert not any(rounds(limit, clock, 400, *[1] * 100, *[1] * 300))


def test_without_a_limit_time_is_never_up():
    clock = Clock()
    assert not any(rounds(TimeLimit(None, clock=clock), clock, 1e9, 1e9))


def test_the_time_counts_from_the_start_of_the_process():
    assert 0 < age_s() < 3600
