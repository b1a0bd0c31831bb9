"""A recorded run comes out the same again: of a scheduler, of an engine, from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastpage import _C, LLM, SamplingParams, replay


def config(**options: object) -> _C.SchedulerConfig:
    defaults = {"num_blocks": 32, "block_size": 4, "max_num_seqs": 4, "max_model_len": 64}
    return _C.SchedulerConfig(**{**defaults, **options})


def run(scheduler: _C.Scheduler) -> int:
    """Three requests to their end; returns the number of steps."""
    for i in range(3):
        params = _C.SamplingParams(max_tokens=4, n=2, ignore_eos=True)
        scheduler.add_request([i, 1, 2, 3, 4], params, seed=i)
    batch = _C.InputBatch()
    steps = 0
    while scheduler.has_unfinished():
        step = scheduler.schedule()
        scheduler.prepare(step, batch)
        scheduler.update(step, np.arange(batch.num_samples, dtype=np.int32))
        steps += 1
    return steps


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "scheduler.log"
    scheduler = _C.Scheduler(config())
    scheduler.record(str(path))
    run(scheduler)
    return path


def test_a_recorded_run_is_the_same_again(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.log"
    scheduler = _C.Scheduler(config())
    scheduler.record(str(path))
    steps = run(scheduler)
    # Read while the scheduler goes on: nothing waits in a buffer.
    result = _C.replay(str(path))
    assert (result.divergence, result.complete, result.num_steps) == ("", True, steps)
    assert result.num_calls == 3 + 3 * steps
    assert _C.replay(str(path), check_integrity=False).num_calls == result.num_calls


def test_recording_ends_when_told(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.log"
    scheduler = _C.Scheduler(config())
    scheduler.record(str(path))
    scheduler.record(None)
    run(scheduler)
    assert _C.replay(str(path)).num_calls == 0


def test_the_command_says_how_it_went(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert replay.main([str(log)]) == 0
    assert "as recorded" in capsys.readouterr().out

    whole = log.read_bytes()
    log.write_bytes(whole[:-1])
    assert replay.main([str(log), "--no-checks"]) == 0
    assert "ends in the midst of a call" in capsys.readouterr().out

    # The last byte belongs to the digest of the last update.
    log.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert replay.main([str(log)]) == 1
    assert "update of step" in capsys.readouterr().out


def test_what_is_no_log_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("nothing of the kind")
    for path in (other, tmp_path / "missing", tmp_path):
        assert replay.main([str(path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(_C.InvalidArgument, match="cannot write"):
        _C.Scheduler(config()).record(str(tmp_path / "no" / "such" / "folder"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_speculative_tokens": 3},
        {"async_scheduling": True, "host_cache_memory": "16MiB"},
    ],
    ids=["speculation", "two steps in flight"],
)
def test_a_run_of_the_real_model_is_the_same_again(
    smollm2_gguf: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    path = tmp_path / "engine.log"
    llm = LLM(
        str(smollm2_gguf),
        dtype="bfloat16",
        max_model_len=256,
        num_kv_blocks=20,
        **options,
        record_scheduler=str(path),
    )
    params = [
        SamplingParams(temperature=0, max_tokens=24),
        SamplingParams(temperature=0.9, n=3, max_tokens=24),
        SamplingParams(beam_width=3, temperature=0, max_tokens=12),
        SamplingParams(temperature=0.9, best_of=3, n=2, max_tokens=24, seed=5),
    ]
    llm.generate(["one two one two one", "Once upon a time", "The sky is", "Rain"], params)
    result = _C.replay(str(path))
    assert (result.divergence, result.complete) == ("", True)
    assert result.num_steps > 12
    del llm
    command = [sys.executable, "-m", "fastpage.replay", str(path)]
    assert "as recorded" in subprocess.run(command, capture_output=True, text=True).stdout
