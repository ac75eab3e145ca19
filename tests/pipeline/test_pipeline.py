"""The pipeline as a person runs it: `dvc repro` on the digits, what it gives, and what reruns when."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal
import sqlite3

import pytest
import yaml
from project import Project

STAGES = {"configure", "fetch", "fetch_weights", "preprocess", "train", "ablate", "tune", "diagnose", "evaluate"}


def ran(printed: str) -> list[str]:
    return re.findall(r"Running stage '(\w+)'", printed)


def test_one_command_gives_model_metrics_report_and_champion(digits):
    assert set(ran(digits.printed)) == STAGES
    assert ran(digits.printed)[-1] == "evaluate"
    metrics = json.loads(digits.text("results/evaluation/metrics.json"))
    registered = json.loads(digits.text("results/evaluation/registration.json"))
    for number, model in enumerate(("baseline", "tuned"), start=1):
        test = metrics[model]["test"]
        assert test["accuracy"] > 0.95
        assert test["accuracy_low"] < test["accuracy"] < test["accuracy_high"]
        assert registered[model]["version"] == str(number)
        for name in ("mistakes", "confusion", "learning_curves", "calibration"):
            assert (digits.path / f"results/evaluation/{model}/{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert registered["baseline"]["promoted"] is True
    gain = metrics["comparison"]
    assert gain["gain"] == pytest.approx(
        metrics["tuned"]["test"]["accuracy"] - metrics["baseline"]["test"]["accuracy"]
    )
    assert gain["gain_low"] <= gain["gain"] <= gain["gain_high"]
    assert registered["tuned"]["promoted"] is (gain["gain"] > 0 and gain["mcnemar_p"] < 0.05)
    assert "McNemar p =" in registered["tuned"]["reason"]


def test_what_the_ablation_concludes_is_told_and_recorded(digits):
    verdicts = digits.text("results/ablation/dropout/verdicts.txt").splitlines()
    assert len(verdicts) == 3  # three arms against the reference
    for verdict in verdicts:
        assert verdict in digits.printed
    with sqlite3.connect(digits.path / "mlflow.db") as store:
        kinds = dict(
            store.execute(
                "select t.value, count(*) from tags t join runs r using (run_uuid) "
                "where t.key = 'cnn_tuning.kind' and r.status = 'FINISHED' group by t.value"
            ).fetchall()
        )
        parents = store.execute(
            "select count(distinct p.value) from tags p join tags k using (run_uuid) "
            "where p.key = 'mlflow.parentRunId' and k.key = 'cnn_tuning.kind' and k.value = 'arm'"
        ).fetchone()
    assert (kinds["arm"], kinds["ablate"], kinds["tune"], kinds["evaluate"]) == (12, 1, 1, 2)
    assert kinds["refit"] >= 1
    assert parents == (1,)


def test_what_the_search_concludes_is_told_with_its_doubts_and_recorded(digits):
    assert "was chosen by the same validation images that measure it" in digits.printed
    assert re.search(r"refitted .* val/accuracy [\d.]+% of \d+ images \(95 % interval [\d.]+% to", digits.printed)
    with sqlite3.connect(digits.path / "mlflow.db") as store:
        recorded = store.execute(
            "select t.key from tags t join tags k using (run_uuid) "
            "where t.key like 'importance/%' and k.key = 'cnn_tuning.kind' and k.value = 'tune'"
        ).fetchall()
    assert {"importance/optimizer.learning_rate"} <= {key for (key,) in recorded}


def test_each_stage_that_writes_a_page_logs_it_with_its_runs(digits):
    pages = {
        path.parent.name: path.read_text()
        for path in (digits.path / "mlruns").rglob("report.html")
        if path.parent.name in ("ablation", "search", "evaluation")
    }
    assert pages == {name: digits.text(f"results/{name}/report.html") for name in pages}
    assert set(pages) == {"ablation", "search", "evaluation"}
    assert len(list((digits.path / "mlruns").rglob("evaluation/report.html"))) == 2  # baseline and tuned


def test_the_table_of_layers_is_logged_with_the_training(digits):
    table = digits.text("models/baseline/layers.txt")
    assert "Params" in table.splitlines()[0]
    assert table in [path.read_text() for path in (digits.path / "mlruns").rglob("model/layers.txt")]


@pytest.mark.parametrize(("stage", "out", "page"), [
    ("train", "results/training", "profile.html"),
    ("tune", "results/search", "refit/profile.html"),
])  # fmt: skip
def test_the_profile_is_in_an_output_that_is_pushed(digits, stage, out, page):
    assert "samples a second" in digits.text(f"{out}/{page}")
    outs = yaml.safe_load(digits.text("dvc.lock"))["stages"][stage]["outs"]
    (digest,) = [entry["md5"] for entry in outs if entry["path"] == out]
    kept = json.loads(digits.text(f".dvc/cache/files/md5/{digest[:2]}/{digest[2:]}"))
    assert page in [file["relpath"] for file in kept]


def test_what_the_search_found_is_told_and_recorded(digits):
    best = json.loads(digits.text("results/search/best.json"))
    rows = list(csv.DictReader(digits.text("results/search/trials.csv").splitlines()))
    assert len(rows) == 8
    assert best
    recipe = json.loads(digits.text("models/tuned/recipe.json"))
    assert recipe["trainer"]["max_epochs"] == 12  # the experiment's own, not the trials'
    with sqlite3.connect(digits.path / "mlflow.db") as store:
        left = store.execute("select count(*) from runs where status = 'RUNNING'").fetchone()
        trials = store.execute(
            "select count(*) from tags where key = 'cnn_tuning.kind' and value = 'trial'"
        ).fetchone()
    assert left == (0,)
    assert trials[0] >= 8


def test_history_measures_training_and_validation_on_the_same_footing(digits):
    rows = list(csv.DictReader(digits.text("models/baseline/history.csv").splitlines()))
    assert [int(row["epoch"]) for row in rows] == list(range(1, len(rows) + 1))
    assert float(rows[0]["train/loss"]) > float(rows[-1]["train/loss"])
    assert {"train/accuracy", "val/accuracy", "val/loss"} <= set(rows[0])
    # As many training images are measured as there are validation images: their hits are whole numbers.
    images = sum(json.loads(digits.text("data/prepared/meta.json"))["counts"]["val"])
    for row in rows:
        for split in ("train", "val"):
            hits = float(row[f"{split}/accuracy"]) * images
            assert hits == pytest.approx(round(hits), abs=1e-6)


def test_the_summary_says_what_came_out_and_what_to_do_next(digits):
    told = digits.run("cnn-tuning", "summary")
    assert "test accuracy" in told
    assert "95 % interval" in told
    assert "results/evaluation/report.html" in told
    assert "models:/digits-classifier/1" in told
    assert "tuned or baseline" in told
    assert told.count("\n") < 20


def test_show_prints_the_lineage_of_the_champion(digits):
    told = digits.run("cnn-tuning", "show", "models:/digits-classifier@champion")
    commit = digits.run("git", "rev-parse", "HEAD").strip()
    lock = yaml.safe_load(digits.text("dvc.lock"))["stages"]["preprocess"]["outs"]
    data = next(out["md5"] for out in lock if out["path"] == "data/prepared")
    for part in (commit, data, "optimizer.learning_rate", "model.arguments.stem", "test/accuracy"):
        assert part in told
    told = digits.run("cnn-tuning", "show", "models:/digits-classifier@chimpion", fails=True)
    assert "Traceback" not in told
    assert "champion" in told


def test_dvc_metrics_and_plots_read_what_the_stages_wrote(digits):
    assert "test.accuracy" in digits.run("dvc", "metrics", "show")
    told = digits.run("dvc", "plots", "show", "-o", "plots")
    assert "failed" not in told
    page = digits.text("plots/index.html")
    for picture in ("results_ablation_plots_dropout-arms.png", "results_search_plots_history.png"):
        assert picture in page
    assert "vega" in page.lower()


@pytest.fixture(scope="module")
def again(digits, tmp_path_factory) -> Project:
    """The same project with its results, to be changed: cache and data are linked, not computed."""
    path = tmp_path_factory.mktemp("again") / "project"
    shutil.copytree(digits.path, path, symlinks=True)
    return Project.at(path)


WHOLE = "experiment: digits\nseed: 0\n"
# What is tried on the baseline alone.
ALONE = "experiment: digits\nseed: 0\nablation: none\nsearch: none\n"


def test_a_second_run_computes_nothing_and_a_comment_neither(again):
    for room in ("config", "data", "training", "serving"):  # as Python leaves it behind where it may
        cache = again.path / f"src/cnn_tuning/{room}/__pycache__"
        cache.mkdir(exist_ok=True)
        (cache / "module.cpython-311.pyc").write_bytes(b"compiled")
    assert ran(again.repro()) == []
    (again.path / "params.yaml").write_text(f"# a remark\n{WHOLE}")
    assert ran(again.repro()) == ["configure"]


@pytest.mark.slow
def test_a_changed_value_reruns_exactly_what_uses_it(again):
    (again.path / "params.yaml").write_text(ALONE)
    assert set(ran(again.repro())) == {"configure", "ablate", "tune", "diagnose", "evaluate"}
    (again.path / "params.yaml").write_text(ALONE + "model: {dropout: dense}\n")
    assert set(ran(again.repro())) == STAGES - {"fetch", "fetch_weights", "preprocess"}
    registered = json.loads(again.text("results/evaluation/registration.json"))["baseline"]
    # Two models of the same quality on 359 images: the gate stays shut, and says with which figures.
    assert registered["promoted"] is False
    assert "McNemar p =" in registered["reason"]
    version = registered["version"]
    assert "model.dropout" in again.run("cnn-tuning", "show", f"models:/digits-classifier/{version}")
    before = again.run("cnn-tuning", "show", "models:/digits-classifier@champion")
    assert not before.startswith(f"models:/digits-classifier/{version} ")
    promoted = again.run("cnn-tuning", "promote", f"models:/digits-classifier/{version}")
    assert f"version {version} now" in promoted
    shown = again.run("cnn-tuning", "show", "models:/digits-classifier@champion")
    assert shown.startswith(f"models:/digits-classifier/{version} ")
    assert "promoted by hand; before: not promoted" in shown
    assert "Traceback" not in again.run("cnn-tuning", "promote", "models:/digits-classifier/99", fails=True)
    (again.path / "params.yaml").write_text(ALONE + "evaluation: {calibration_bins: 10}\n")
    # Back to the first model: the run cache gives it without training.
    printed = again.repro()
    assert "Stage 'train' is cached" in printed
    assert set(ran(printed)) == {"configure", "evaluate"}


@pytest.mark.slow
def test_a_changed_threshold_judges_again_and_trains_nothing(again):
    rule = "diagnosis: {rules: {class_imbalance: {thresholds: {ratio: 1.01}}}}\n"
    (again.path / "params.yaml").write_text(WHOLE + rule)
    printed = again.repro("diagnose")
    assert set(ran(printed)) == {"configure", "diagnose"}
    assert "class_imbalance" in printed
    assert json.loads(again.text("results/diagnosis/metrics.json"))["baseline"]["class_imbalance"] == 1
    stops = "diagnosis: {rules: {overfitting: {action: stop}}}\n"
    (again.path / "params.yaml").write_text(WHOLE + stops)
    again.repro("configure")
    assert "diagnosis.stopping" in again.run("dvc", "status", "train")  # it decides when the training ends
    wrong = "diagnosis: {rules: {class_imbalance: {thresholds: {ration: 2}}}}\n"
    (again.path / "params.yaml").write_text(WHOLE + wrong)
    told = again.run("dvc", "repro", "configure", fails=True)
    assert "did you mean 'ratio'" in told
    assert "Traceback" not in told
    (again.path / "params.yaml").write_text(WHOLE)
    again.repro()


@pytest.mark.slow
def test_verify_trains_again_to_the_same_bytes_and_notices_a_change(again):
    assert "identical" in again.run("cnn-tuning", "verify")
    with sqlite3.connect(again.path / "mlflow.db") as store:
        sql = "select distinct r.name from runs r join tags t using (run_uuid) where t.key = ? and t.value = ?"
        names = store.execute(sql, ("cnn_tuning.kind", "verify")).fetchall()
    assert names == [("verify compact_cnn_small seed 0",)]
    lock = again.path / "params.lock.yaml"
    was = lock.read_text()
    lock.write_text(was.replace("label_smoothing: 0.05", "label_smoothing: 0.06"))
    told = again.run("cnn-tuning", "verify", fails=True)
    lock.write_text(was)
    assert "weights.safetensors" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_stage_by_hand_leaves_the_tracked_outputs_alone(again):
    before = again.text("dvc.lock"), (again.path / "models/baseline/weights.safetensors").read_bytes()
    again.run("python", "-m", "cnn_tuning.stages.train", "model=lab_cnn", "trainer.max_epochs=1")
    model = json.loads(again.text("scratch/models/baseline/model.json"))
    assert model["model"]["name"] == "lab_cnn"
    assert before == (again.text("dvc.lock"), (again.path / "models/baseline/weights.safetensors").read_bytes())
    # The model from scratch/, the data from where the pipeline keeps them; nothing is registered.
    told = again.run("python", "-m", "cnn_tuning.stages.evaluate", "--inputs", "scratch")
    assert "test/accuracy" in told
    assert "tuned" not in told  # the pipeline's is another experiment's
    assert "registered" not in again.text("scratch/results/evaluation/registration.json")
    told = again.run("python", "-m", "cnn_tuning.stages.train", "experiment=mnist", fails=True)
    assert "holds digits, not mnist" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_a_stage_that_was_interrupted_goes_on_where_it_stopped(again):
    command = ("python", "-m", "cnn_tuning.stages.train", "trainer.max_epochs=40")
    process = again.start(*command)
    for line in process.stdout:
        if "epoch 3/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "SIGTERM: state saved in" in rest
    assert "Traceback" not in rest
    printed = again.run(*command)
    step = int(re.search(r"going on from .* at step (\d+) of", printed)[1])
    assert step > 2 * 21
    assert "epoch 1/" not in printed
    assert "epoch 40/40" in printed
    history = again.text("scratch/models/baseline/history.csv").splitlines()
    assert len(history) == 41
    with sqlite3.connect(again.path / "mlflow.db") as store:  # one run, from the first step to the last
        trained = store.execute("select status, run_uuid from runs where name like 'train%' order by start_time")
        *_, (status, run) = trained.fetchall()
        steps = store.execute("select count(*) from metrics where key = 'val/loss' and run_uuid = ?", [run])
        assert (status, steps.fetchone()) == ("FINISHED", (40,))


@pytest.mark.slow
def test_exp_run_composes_the_experiment_that_is_asked_for(again):
    again.commit("before exp run")
    again.run("dvc", "exp", "run", "-S", "experiment=smoke", "-S", "seed=3")
    locked = yaml.safe_load(again.text("params.lock.yaml"))
    assert (locked["experiment"], locked["seed"], locked["data"]["limit"]) == ("smoke", 3, 400)


@pytest.mark.slow
def test_mlflow_run_starts_the_entry_points_of_the_project(again):
    run = ("mlflow", "run", ".", "--env-manager", "local", "-e")
    assert "scratch/models/baseline: epoch 1 of 1" in again.run(
        *run, "train", "-P", "overrides=trainer.max_epochs=1 model=lab_cnn"
    )
    assert "test/accuracy" in again.run(*run, "evaluate", "-P", "inputs=scratch")
    assert "test accuracy" in again.run(*run, "main")
    assert "scratch/models/baseline: epoch" in again.run(*run, "train")


@pytest.mark.slow
def test_another_split_of_the_same_bytes_fetches_nothing(again):
    params = (again.path / "params.yaml").read_text()
    (again.path / "params.yaml").write_text(params + "data: {val_fraction: 0.2}\n")
    again.repro("configure")
    planned = again.repro("--dry")
    (again.path / "params.yaml").write_text(params)
    assert "preprocess" in ran(planned)
    assert "fetch" not in ran(planned)


def test_configure_by_hand_prints_and_writes_nothing(again):
    before = again.text("params.lock.yaml")
    printed = again.run("python", "-m", "cnn_tuning.stages.configure", "experiment=lab", "seed=9")
    assert yaml.safe_load(printed)["seed"] == 9
    assert again.text("params.lock.yaml") == before
