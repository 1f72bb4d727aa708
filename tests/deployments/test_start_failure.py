"""Real messages of Serve 2.60, shortened."""

from __future__ import annotations

from herd.deployments.start_failure import root_cause

HEAD = "A replica failed to start with exception. Retrying 2 more time(s). Error:\n"
WRAPPED = (
    HEAD + "\x1b[36mray::ServeReplica:herd:Engine.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)\n"
    '  File "/lib/concurrent/futures/_base.py", line 456, in result\n'
    "    return self.__get_result()\n"
    "           ^^^^^^^^^^^^^^^^^^^\n"
    '  File "/lib/ray/serve/_private/replica.py", line 1928, in initialize\n'
    "    raise RuntimeError(traceback.format_exc()) from None\n"
    "RuntimeError: Traceback (most recent call last):\n"
    '  File "/herd/model/checkpoint.py", line 17, in open\n'
    "    return open(path)\n"
    "           ^^^^^^^^^^\n"
    "FileNotFoundError: [Errno 2] No such file or directory: 'x'\n"
    "\n"
    "The above exception was the direct cause of the following exception:\n"
    "\n"
    '  File "/herd/deployments/engine.py", line 20, in __init__\n'
    '    raise CheckpointError("12 tensors") from e\n'
)


def test_what_ended_the_replica_is_told_whole() -> None:
    message = (
        WRAPPED + "herd.model.checkpoint.CheckpointError: 2 tensors are missing:\n  model.a\n  model.b\nand 3 surplus"
    )
    assert root_cause(message) == "CheckpointError: 2 tensors are missing:\n  model.a\n  model.b\nand 3 surplus"


def test_a_type_that_says_nothing_is_left_out() -> None:
    assert root_cause(WRAPPED + "RuntimeError: no memory for the cache: lower engine.kv_memory") == (
        "no memory for the cache: lower engine.kv_memory"
    )
    assert root_cause(WRAPPED + "RuntimeError") == "RuntimeError"


def test_a_replica_that_was_killed() -> None:
    assert "too little memory" in root_cause(HEAD + "ActorDiedError()")


def test_a_message_without_a_traceback_is_kept() -> None:
    assert root_cause("Deployment needs 3 GPUs and there are none") == "Deployment needs 3 GPUs and there are none"
    assert root_cause("") == ""


def test_length_is_bounded() -> None:
    assert len(root_cause(WRAPPED + "herd.E: " + "x" * 10_000)) <= 3000
