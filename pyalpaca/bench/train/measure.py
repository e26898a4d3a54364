"""Measuring: every contestant lives in processes of its own and trains a few steps whenever it is its turn."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from tqdm import tqdm

from pyalpaca.bench.machine import limits, rounded
from pyalpaca.bench.process import INTERVAL, own_bytes, status
from pyalpaca.bench.train.cases import CONTESTANTS, REFERENCE, Scale, model_config
from pyalpaca.plan import teraflops


@dataclass
class Team:
    """The processes of one contestant, and what they have shown so far.

    own, resident: most memory of its own, and of VmHWM, of all processes together, in bytes.
    """

    name: str
    processes: list[subprocess.Popen[str]]
    complaints: IO[bytes]
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    own: int = 0
    resident: int = 0

    def tell(self, line: str) -> None:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()

    def answers(self) -> list[str]:
        """A line of each process. ValueError with the last line of its complaints if one has ended."""
        lines = [process.stdout.readline() if process.stdout else "" for process in self.processes]
        if not all(lines):
            with suppress(subprocess.TimeoutExpired):  # it may still have something to say
                self.processes[lines.index("")].wait(timeout=10)
            self.complaints.seek(0)
            said = self.complaints.read().decode(errors="replace").strip()
            print(said, file=sys.stderr)
            raise ValueError(f"{self.name}: ended with {said.splitlines()[-1] if said else 'no message'}")
        return lines

    def train(self, steps: int, counts: bool) -> None:
        """Let it train; the slowest process says how long a step takes."""
        self.tell(f"{steps}\n")
        with _Watch(self):
            found = [json.loads(line) for line in self.answers()]
        self.losses += found[-1]["losses"]
        if counts:
            self.seconds += [max(times) for times in zip(*(answer["seconds"] for answer in found), strict=True)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
        self.complaints.close()


class _Watch:
    """While in the block, a thread looks at the memory of a team's processes."""

    def __init__(self, team: Team) -> None:
        self._team, self._done = team, threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        over = False
        while not over:
            over = self._done.wait(INTERVAL)
            fields = [status(process.pid) for process in self._team.processes]
            self._team.own = max(self._team.own, sum(map(own_bytes, fields)))
            self._team.resident = max(self._team.resident, sum(f.get("VmHWM", 0) for f in fields))

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _start(name: str, scale: Scale, threads: int) -> Team:
    who = CONTESTANTS[name]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    each = max(1, threads // who.processes)
    complaints = tempfile.TemporaryFile()  # noqa: SIM115 - the team closes it
    processes = []
    for rank in range(who.processes):
        environment = {**os.environ, "OMP_NUM_THREADS": str(each)}
        if who.processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(who.processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "pyalpaca.bench.train.worker", json.dumps(asdict(scale)), name, str(each)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        processes.append(subprocess.Popen(command, stderr=complaints, env=environment, **pipes))
    return Team(name, processes, complaints)


def measure(
    names: Sequence[str], scale: Scale, steps: int, rounds: int, threads: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """(a row for each contestant, the machine's limits): all live at once, and each trains while the others wait.

    In every round each trains `steps` steps; the order is turned round from round to round. The first step of each, which
    compiles and allocates, does not count. The matrix products are measured before each round.
    """
    teams: list[Team] = []
    found: list[dict[str, float]] = []
    try:
        with tqdm(total=len(names) * (rounds + 1), desc="training", unit="turn", disable=None) as bar:
            for name in names:
                bar.set_postfix_str(name)
                teams.append(_start(name, scale, threads))
                teams[-1].answers()
                teams[-1].train(1, counts=False)
                bar.update()
            for i in range(rounds):
                found.append(limits())
                for team in teams if i % 2 == 0 else reversed(teams):
                    bar.set_postfix_str(team.name)
                    team.train(steps, counts=True)
                    bar.update()
    finally:
        for team in teams:
            team.close()
    rates = {key: statistics.median(each[key] for each in found) for key in found[0]}
    return _rows(teams, scale, rates["sgemm_flops"]), rates


def _rows(teams: Sequence[Team], scale: Scale, sgemm: float) -> list[dict[str, Any]]:
    by_name = {team.name: team for team in teams}
    rows = []
    for team in teams:
        who = CONTESTANTS[team.name]
        seconds = statistics.median(team.seconds)
        peers = {
            name: other
            for name, other in by_name.items()
            if name != team.name and CONTESTANTS[name].group == who.group and team.name == REFERENCE[who.group]
        }
        sequences = scale.batch * who.batches
        mfu = teraflops(3, sequences, scale.seq_length, model_config(scale), seconds, 1) * 1e12 / sgemm
        rows.append(
            {
                "name": f"{team.name}/{scale.name}",
                "seconds": rounded(seconds),
                "tokens_per_second": rounded(sequences * scale.seq_length / seconds),
                "limit": "sgemm",
                "limit_share": round(mfu, 3),
                "vs": {name: round(statistics.median(other.seconds) / seconds, 3) for name, other in peers.items()},
                "own_bytes": team.own,
                "peak_bytes": team.resident,
                "memory_vs": {name: round(other.resident / team.resident, 3) for name, other in peers.items() if team.resident},
                "losses": [rounded(loss, 6) for loss in team.losses[:3]],
                "timings": [rounded(s) for s in team.seconds],
            }
        )
    return rows
