"""TensorBoard of a run, on the cluster, while somebody on a laptop uses it.

    python -m cluster board --run RUN

While the run's job runs, it is a step of the job on the job's first node; otherwise it runs here,
on the login node. It prints where it listens, and exits when its standard input closes.
`make tunnel` starts it.
"""

from __future__ import annotations

import os
import re
import select
import subprocess
import sys
from pathlib import Path

from cluster.errors import Parser
from cluster.runs import clusters, folders, history
from cluster.site.file import load_site
from cluster.slurm import notation
from cluster.slurm.call import PASSED, Slurm
from runfolder import attempts, launch, records
from runfolder.errors import UserError, printable

LISTENS = "tensorboard listens at"
# What TensorBoard prints when it is ready.
READY = re.compile(r"TensorBoard \S+ at http://\S+:(\d+)/")
END_S = 20


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parser = Parser(prog="python -m cluster board", description=__doc__, allow_abbrev=False)
    parser.add_argument("--run", required=True, help="which run")
    options = parser.parse_args(argv)
    folder = folders.find(options.run)
    if not any((folder / "tensorboard").glob("events.*")):
        raise UserError(
            f"{folder / 'tensorboard'}: holds no curves yet; to see how far the run is: "
            f"make logs RUN={history.name_of(folder)}"
        )
    if not (folder / launch.NAME).exists():
        raise UserError(
            f"RUN={options.run}: was started by an older Sluice, and this one cannot start its "
            f"TensorBoard; copy {folder / 'tensorboard'} to a machine that has TensorBoard"
        )
    address, step = _place(folder)
    words = [*step, "slurm/board.sh", address]
    environment = {key: value for key, value in os.environ.items() if PASSED.fullmatch(key)}
    environment |= {"SLUICE_RUN_FOLDER": str(folder)}
    with subprocess.Popen(
        words,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
    ) as board:
        try:
            return _serve(board, address)
        finally:
            assert board.stdin is not None
            board.stdin.close()
            for end in (board.terminate, board.kill):
                try:
                    board.wait(END_S)
                except subprocess.TimeoutExpired:
                    end()


def _place(folder: Path) -> tuple[str, list[str]]:
    """Return the address to listen on, and the command prefix that runs a command there."""
    last = records.submissions(folder)[-1:]
    made = [each for each in attempts.read_all(folder) if last and each.is_of(last[0].job_id)]
    # If the folder shows that the job is over, Slurm need not answer.
    if last and not history.is_settled(last[0], made):
        queue = clusters.at(Slurm.from_site(load_site()), last[0].cluster)
        job = clusters.look(queue, {folder: last[0]}).get(folder)
        if job is not None and job.state == "RUNNING" and made and made[-1].nodes:
            node = made[-1].nodes[0]
            shown = notation.fields_of(queue.call("scontrol", "show", "node", node, "--oneliner"))
            step = [*queue.words("srun", f"--jobid={job.job_id}"), "--overlap", "--mem=0"]
            step += ["--nodes=1", "--ntasks=1", f"--nodelist={node}", "--cpus-per-task=1"]
            step += ["--gpus=0", "--unbuffered"]
            return shown.get("NodeAddr", node), [*queue.prefix, *step]
    return "127.0.0.1", []


def _serve(board: subprocess.Popen[bytes], address: str) -> int:
    """Print where it listens, and wait until nobody needs it; return the exit code."""
    assert board.stdout is not None
    said: list[str] = []
    rest = b""
    while True:
        ready, _, _ = select.select([board.stdout, sys.stdin.buffer], [], [])
        if sys.stdin.buffer in ready and not os.read(sys.stdin.fileno(), 4096):
            return 0
        if board.stdout not in ready:
            continue
        data = os.read(board.stdout.fileno(), 65536)
        if not data:
            last = [line for line in said if line.strip()][-1:] or ["no output"]
            raise UserError(f"tensorboard has ended: {printable(last[0])}")
        *lines, rest = (rest + data).split(b"\n")
        said = [*said, *(line.decode(errors="replace") for line in lines)][-20:]
        for line in said:
            if found := READY.search(line):
                print(f"{LISTENS} {address} {found[1]}", flush=True)
                said = []
                break
