"""``mconv train``: plans, runs on this machine and as torchrun's rank, and refuses in one line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

torch = pytest.importorskip("torch")

from mconv.cli import cli  # noqa: E402
from mconv.errors import ConfigError  # noqa: E402
from mconv.trainer.delivery.demo import documents  # noqa: E402
from mconv.trainer.metrics import read_metrics  # noqa: E402
from mconv.trainer.text.token_file import write_tokens  # noqa: E402
from mconv.trainer.text.tokenizer import encode_documents  # noqa: E402
from mconv.trainer.text.train_tokenizer import train_tokenizer  # noqa: E402

RUN = """
[model]
vocab_size = 320
hidden_size = 32
intermediate_size = 48
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2

[train]
steps = 3
seq_len = 32
batch = 8
micro_batch = 1
threads = 1

[optim]
lr = 1e-3

[data]
tokens = "tokens.npy"
tokenizer = "tokenizer"

[save]
folder = "run"
"""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    train_tokenizer(documents(), folder / "tokenizer", 320)
    write_tokens(folder / "tokens.npy", encode_documents(documents(), folder / "tokenizer"))
    (folder / "run.toml").write_text(RUN)
    return folder


def mconv(*args: object) -> Result:
    return CliRunner().invoke(cli, ["train", *map(str, args)])


def test_plan(prepared: Path) -> None:
    run = prepared / "run.toml"
    layout = ("--set", "parallel.pp=2", "--set", "parallel.tp=2", "--nproc", 8)
    said = mconv(run, "--dry-run", *layout)
    assert said.exit_code == 0, said.output
    assert "pp=2 dp_shard=2 tp=2 on 8 processes" in said.output
    assert "256 tokens: 8 sequences of 32, 4 per data parallel rank in 4 batches" in said.output
    plan = json.loads(mconv(run, "--dry-run", "--json", *layout).stdout)
    assert [rank["layers"] for rank in plan["ranks"]] == [
        [[0, 1, 2]],
        [[3]],
    ]  # the head weighs, too
    assert not (prepared / "run").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--set", "optim.l=1"), "unknown key 'l' .did you mean 'lr'"),
        (("--set", "lr"), "expected section.key=value"),
        (("--set", "train.steps=three"), "steps must be of type int, not 'three'"),
        (("--set", "train.steps.more=1"), "steps is no section"),
        (("--set", "parallel.tp=4", "--nproc", 4), "tp=4 does not divide num_key_value_heads=2"),
        (("--nproc", 3), "does not divide batch=8"),
    ],
)
def test_mistakes_are_refused_before_anything_starts(
    prepared: Path, args: tuple[str, ...], said: str
) -> None:
    done = mconv(prepared / "run.toml", *args)
    assert isinstance(done.exception, ConfigError)
    with pytest.raises(ConfigError, match=said):
        raise done.exception
    assert not (prepared / "run").exists()


def test_run_on_this_machine(prepared: Path) -> None:
    """Values of --set reach the ranks; text needs no quotes, paths start at the TOML file."""
    values = ("train.steps=2", "save.folder=other", "schedule.kind=constant")
    settings = [word for value in values for word in ("--set", value)]
    done = mconv(prepared / "run.toml", "--nproc", 2, "--json", *settings)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["folder"] == str(prepared / "other")
    assert said["last"]["step"] == 2
    assert said["last"]["lr"] == 1e-3
    assert [m.step for m in read_metrics(prepared / "other")] == [1, 2]


def test_rank_of_torchrun(prepared: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "mconv", "train", str(prepared / "run.toml")]
    command += ["--set", "save.folder=single", "--set", "train.steps=2"]
    done = subprocess.run(command, env={**os.environ, **place, **where}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert [m.step for m in read_metrics(prepared / "single")] == [1, 2]


def test_termination_reaches_the_ranks(prepared: Path) -> None:
    """The command passes the signal on; ranks save and end well."""
    command = [sys.executable, "-m", "mconv", "train", str(prepared / "run.toml"), "--nproc", "2"]
    command += ["--set", "save.folder=long", "--set", "train.steps=100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        deadline = time.monotonic() + 90
        while not read_metrics(prepared / "long") and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr
    assert 0 < read_metrics(prepared / "long")[-1].step < 100000
    assert list((prepared / "long").glob("step-*"))


def test_ranks_save_and_end_without_their_launcher(prepared: Path) -> None:
    psutil = pytest.importorskip("psutil")
    command = [sys.executable, "-m", "mconv", "train", str(prepared / "run.toml"), "--nproc", "2"]
    command += ["--set", "save.folder=orphans", "--set", "train.steps=100000", "-q"]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 90
        while not read_metrics(prepared / "orphans") and time.monotonic() < deadline:
            time.sleep(0.1)
        ranks = psutil.Process(process.pid).children()
        process.kill()
    assert len(ranks) == 2
    left = psutil.wait_procs(ranks, timeout=60)[1]
    for rank in left:
        rank.kill()
    assert not left
    (saved,) = (prepared / "orphans").glob("step-*")
    done = mconv(prepared / "run.toml", "--set", "save.folder=orphans", "--nproc", 1,
                 "--set", f"train.steps={int(saved.name[5:]) + 1}")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"goes on from {saved}" in done.output


DYING = """
import os, sys
from pathlib import Path
from mconv.cli import main
from mconv.trainer import loop

step, died = loop.one_step, Path(sys.argv[1])

def one_step(run):
    if run.state.step == 3 and os.environ["RANK"] == "1" and not died.exists():
        died.touch()
        os._exit(3)
    return step(run)

loop.one_step = one_step
main(["train", *sys.argv[2:]])
"""


def dying_run(prepared: Path, name: str, dead: str) -> list[str]:
    """Return script and arguments of a run whose rank 1 dies once, in its fourth step."""
    script = prepared / "dying.py"
    script.write_text(DYING)
    values = (f"save.folder={name}", "save.every=3", "train.steps=5")
    settings = [word for value in values for word in ("--set", value)]
    return [str(script), str(prepared / dead), str(prepared / "run.toml"), *settings]


def check_it_went_on(folder: Path) -> None:
    assert [m.step for m in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert [p.name for p in sorted(folder.glob("step-*"))] == ["step-00000003", "step-00000005"]


def test_torchrun_starts_again_after_a_death(prepared: Path) -> None:
    """A rank dies in its fourth step; torchrun starts both again, from the third's checkpoint.

    On gloo the second start once met stale keys of the first one's store (pytorch#135712).
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    run = dying_run(prepared, "restarted", "died")
    done = subprocess.run([*torchrun, "--nproc-per-node=2", *run], capture_output=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (prepared / "died").exists()
    check_it_went_on(prepared / "restarted")


def test_two_machines_start_again_after_a_death(prepared: Path) -> None:
    """Two agents, as on two machines, meet by c10d; the rank of one dies, and both go on.

    Their ranks meet without the agents' store, as ``docs/training.md`` says: it outlives them.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    torchrun += ["--max-restarts=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    command = [*torchrun, "--rdzv-id=two", "--local-addr=127.0.0.1"]
    command += dying_run(prepared, "machines", "died-too")
    env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    agents = []
    try:
        for number in range(2):
            with (prepared / f"agent-{number}.log").open("wb") as log:
                agents.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
        codes = [agent.wait(200) for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    said = "".join((prepared / f"agent-{n}.log").read_text()[-1500:] for n in range(2))
    assert codes == [0, 0], said
    assert (prepared / "died-too").exists()
    check_it_went_on(prepared / "machines")
