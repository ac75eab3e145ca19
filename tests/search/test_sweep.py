"""A search from its start to its end, with real workers: trials, their runs, budgets, and what ends it early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pytorch_lightning.callbacks import Callback
from searching import Sweep, beside, curve, running, search_with, states, status, tags

from cnn_tuning.config import DiagnosisConfig, patch
from cnn_tuning.errors import UserError
from cnn_tuning.search import staff
from cnn_tuning.search import sweep as sweeping
from cnn_tuning.search.trial import Spent, run_trial
from cnn_tuning.tracking.run import Run
from cnn_tuning.training.fit import fit

PRUNED = {"pruner": {"name": "median", "startup_trials": 1}, "budget": {"trials": 5}}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, digits_data):
    """Return a search that has run: five trials of three epochs, poor ones given up."""
    made = Sweep(tmp_path_factory.mktemp("sweep"), digits_data, search_with(**PRUNED), ("trainer.max_epochs=3",))
    made.run()
    return made


def test_every_trial_of_the_budget_is_run_beginning_with_the_own_values(sweep):
    trials = sweep.trials()
    assert len(trials) == 5
    assert set(states(trials)) == {"COMPLETE", "PRUNED"}
    assert trials[0].state.name == "COMPLETE"
    assert trials[0].params == {"optimizer.learning_rate": 0.01, "model.dropout": "none"}
    for trial in trials:
        assert ("model.dense_dropout" in trial.params) == (trial.params["model.dropout"] == "both")
        assert trial.user_attrs["epochs"] == len(trial.intermediate_values) == max(trial.intermediate_values)
        assert trial.user_attrs["updates"] == 21 * trial.user_attrs["epochs"]
        assert trial.user_attrs["seconds"] > 0
        assert trial.user_attrs["threads"] == 1
    assert {t.user_attrs["epochs"] for t in trials if t.state.name == "PRUNED"} <= {1, 2}


def test_every_trial_is_a_run_of_the_search(sweep):
    runs = {int(tags(run)["trial.number"]): run for run in sweep.runs()}
    trials = sweep.trials()
    assert sorted(runs) == [t.number for t in trials]
    for trial in trials:
        run = runs[trial.number]
        assert "-tune-" in run[0]["parent"]
        assert run[0]["name"] == f"trial {trial.number}"
        ended = "complete" if trial.state.name == "COMPLETE" else "pruned"
        assert tags(run)["trial.state"] == ended
        assert status(run) == ("FINISHED" if ended == "complete" else "KILLED")
        recorded = {k: v for event in run if event["event"] == "params" for k, v in event["values"].items()}
        assert recorded["optimizer.learning_rate"] == trial.params["optimizer.learning_rate"]
        assert recorded["trainer.max_epochs"] == 3
        assert curve(run) == list(trial.intermediate_values.values())
        # Also of one that was given up: rules may be asked again, with other thresholds.
        kept = {Path(event["file"]).name for event in run if event["event"] == "artifact"}
        assert {"recipe.json", "recording", "findings.json", "profile.html", "times.npz"} <= kept
        assert "findings" in tags(run)


def test_the_batch_that_memory_sufficed_for_is_kept_with_the_trial(
    packed, recipe, tmp_path, tracking, monkeypatch
):
    class Full(Callback):
        def on_train_batch_start(self, trainer, module, batch, *_):
            if len(batch[1]) > 128:
                raise MemoryError("no memory")

    def with_little_memory(*given, callbacks, **more):
        return fit(*given, callbacks=[*callbacks, Full()], **more)

    monkeypatch.setattr("cnn_tuning.search.trial.fit", with_little_memory)
    halving = {"trainer.on_out_of_memory": "halve_batch", "trainer.batch_size": 256, "trainer.max_epochs": 1}
    spent = Spent()
    with Run.start(tracking(), name="trial 0", kind="trial", params={}) as tracked:
        run_trial(
            search_with(),
            patch(recipe, halving),
            packed,
            tmp_path,
            name="trial 0",
            spent=spent,
            report=lambda value, step: False,
            tracked=tracked,
            pass_on=lambda: None,
            diagnosis=DiagnosisConfig("none"),
            price_per_hour=0.0,
        )
    assert spent.attrs()["smaller_batch"] == 128


def test_a_finished_search_starts_no_worker(sweep, monkeypatch):
    monkeypatch.setattr(staff, "COMMAND", ["/nonexistent"])
    assert states(sweep.run().trials) == states(sweep.trials())


def test_nothing_is_left_of_finished_trials(sweep):
    assert not list((sweep.folder / "search" / "trials").rglob("*.ckpt"))


@pytest.mark.slow
def test_a_larger_budget_goes_on(sweep):
    before = [(t.params, t.values) for t in sweep.trials()]
    more = sweep.with_search(budget={"trials": 7}, workers=2)
    assert len(more.run().trials) == 7
    assert [(t.params, t.values) for t in more.trials()][:5] == before


def test_workers_that_cannot_start_end_the_search(tmp_path, digits_data, monkeypatch):
    failing = ["/bin/sh", "-c", "echo error: no module named torch >&2; exit 1"]
    monkeypatch.setattr(staff, "COMMAND", failing)
    broken = Sweep(tmp_path, digits_data, search_with())
    told = r"3 workers failed .*status 1 \(no module named torch\); see .*worker-0.log"
    with pytest.raises(UserError, match=told):
        broken.run()
    assert states(broken.trials()) == ["WAITING"] * 4


def test_no_trial_is_begun_when_the_time_is_spent(tmp_path, digits_data, capsys):
    spent = Sweep(tmp_path, digits_data, search_with(budget={"trials": 3, "minutes": 1e-6}))
    assert states(spent.run().trials) == ["WAITING"] * 3
    assert "its budget of 1e-06 minutes is spent; a larger one goes on from here" in capsys.readouterr().err


def test_no_trial_is_begun_when_the_money_is_spent(tmp_path, digits_data, capsys):
    first = Sweep(tmp_path, digits_data, search_with(budget={"trials": 3, "dollars": 1e-6}), price_per_hour=3600.0)
    assert states(first.run().trials) == ["WAITING"] * 3
    assert "its budget of 1e-06 US dollars is spent; a larger one goes on from here" in capsys.readouterr().err
    # What was spent before counts, at the price of now.
    first.study().set_user_attr(f"{sweeping.SPENT}of another search on this study", 4 * 3600.0)
    later = replace(first.with_search(budget={"trials": 3, "dollars": 2.0}), price_per_hour=0.5)
    assert states(later.run().trials) == ["WAITING"] * 3
    assert "its budget of 2 US dollars is spent" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_under_way_when_the_time_is_spent_goes_on_later(tmp_path, digits_data, monkeypatch):
    monkeypatch.setattr(sweeping, "NOTE_S", 0.1)
    search = search_with(budget={"trials": 1, "minutes": 1e3}, settings={"trainer.max_epochs": 40})
    first = Sweep(tmp_path, digits_data, search)

    def spend():
        first.until(running)
        first.study().set_user_attr(f"{sweeping.SPENT}of another search on this study", 6e4)

    with beside(spend):
        first.run()
    (begun,) = first.trials()
    assert begun.state.name == "WAITING"
    assert 0 < len(begun.intermediate_values) < 40
    # What was spent before counts.
    first.with_search(budget={"trials": 1, "minutes": 1001.0}).run()
    assert states(first.trials()) == ["COMPLETE"]
    (again,) = first.trials()
    assert again.params == begun.params
    assert len(again.intermediate_values) == 40
    assert "going on from" in (tmp_path / "search" / "worker-0.log").read_text()
    interrupted, finished = first.runs()
    assert (status(interrupted), tags(interrupted)["trial.state"]) == ("KILLED", "interrupted")
    assert curve(finished) == list(again.intermediate_values.values())  # all of it, not only its end


def test_a_changed_question_is_told_and_begun_anew(tmp_path, digits_data, capsys):
    spent = {"trials": 3, "minutes": 1e-6}
    Sweep(tmp_path, digits_data, search_with(budget=spent)).run()
    capsys.readouterr()
    Sweep(tmp_path, digits_data, search_with(budget=spent, seeds=2), ("optimizer.learning_rate=0.02",)).run()
    told = capsys.readouterr().err
    assert "not continuing test-" in told
    assert "(0 of 3 trials done): changed optimizer.learning_rate (0.01 → 0.02), search.seeds (1 → 2)" in told


@pytest.mark.slow
def test_several_seeds_are_averaged_and_judged_by_wilcoxons_test(tmp_path, digits_data):
    space = {"optimizer.learning_rate": {"kind": "categorical", "choices": [0.01, 1e-5]}}
    search = search_with(space=space, sampler={"name": "grid"}, seeds=5, pruner={"name": "wilcoxon"})
    made = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=1",))
    good, poor = made.run().trials
    assert (good.state.name, poor.state.name) == ("COMPLETE", "PRUNED")
    assert list(good.intermediate_values) == [0, 1, 2, 3, 4]
    assert len(set(good.intermediate_values.values())) > 1
    assert good.value == pytest.approx(sum(good.intermediate_values.values()) / 5)
    assert poor.user_attrs["reason"] == "given up after 4 of 5 seeds"  # the first at which p < 0.1 is possible
    assert (good.user_attrs["epochs"], poor.user_attrs["epochs"]) == (5, 4)


@pytest.mark.slow
def test_several_objectives(tmp_path, digits_data):
    objectives = [
        {"metric": "val/accuracy", "direction": "maximize"},
        {"metric": "model/parameters", "direction": "minimize"},
        {"metric": "time/train_seconds", "direction": "minimize"},
    ]
    space = {"model.arguments.units": {"kind": "categorical", "choices": [8, 64]}}
    search = search_with(
        space=space, objectives=objectives, pruner={"name": "none"}, budget={"trials": 2}, workers=2
    )
    made = Sweep(tmp_path, digits_data, search, ("model=lab_cnn", "trainer.max_epochs=1"))
    trials = made.run().trials
    assert states(trials) == ["COMPLETE", "COMPLETE"]
    for trial in trials:
        accuracy, parameters, seconds = trial.values
        units = int(trial.params["model.arguments.units"])
        # Two convolutions 3×3 of 32 and 64, 2×2 places left of 8×8 pixels, two dense layers.
        assert parameters == 9 * 32 + 32 + 9 * 32 * 64 + 64 + (256 + 1) * units + (units + 1) * 10
        assert 0 < accuracy <= 1
        assert seconds > 0


@pytest.mark.slow
def test_two_searches_at_once_share_the_trials(tmp_path, digits_data):
    search = search_with(budget={"trials": 6}, pruner={"name": "none"})
    made = Sweep(tmp_path, digits_data, search, ("trainer.max_epochs=6",))
    processes = [made.start(), made.start()]
    printed = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    trials = made.trials()
    assert states(trials) == ["COMPLETE"] * 6
    assert sorted(tags(run)["trial.number"] for run in made.runs()) == [str(number) for number in range(6)]
