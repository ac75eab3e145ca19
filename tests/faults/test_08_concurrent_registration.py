"""Row 8: eight processes register and promote at once; versions are distinct and the alias loads."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from cnn_tuning.tracking.gate import Gate, write_predictions
from cnn_tuning.tracking.run import Run

NAME, CANDIDATES, IMAGES = "eight-at-once", 8, 500


@pytest.fixture(params=["sqlite", "server"])
def store(request, store_db):
    """Return a store's URI and its database."""
    if request.param == "sqlite":
        return f"sqlite:///{store_db}", store_db
    server = request.getfixturevalue("mlflow_server")
    return server.uri, server.folder / "mlflow.db"


@pytest.mark.slow
def test_one_champion(store, tracking, tmp_path, tiny_model, rows):
    uri, database = store
    barrier, gate = threading.Barrier(CANDIDATES), Gate(0.05, 0.0)

    def register(number):
        predictions = tmp_path / f"predictions-{number}.csv"
        wrong = 10 * (number + 1)  # candidate 0 is the best, and each is significantly worse than the one before
        write_predictions(predictions, "split", ((i, i % 10, (i + (i < wrong)) % 10, 0.9) for i in range(IMAGES)))
        # Each spool folder has a deliverer process of its own, and that one registers.
        config = tracking(uri=uri, spool=str(tmp_path / f"spool-{number}"), wait_s=120.0)
        barrier.wait()
        with Run.start(config, name=f"candidate-{number}", kind="evaluate", params={}) as run:
            run.register(
                tiny_model,
                name=NAME,
                alias="champion",
                predictions=predictions,
                gate=gate,
                description="",
            )
        return run.delivery

    with ThreadPoolExecutor(CANDIDATES) as pool:
        deliveries = list(pool.map(register, range(CANDIDATES)))
    assert [delivery.state for delivery in deliveries] == ["delivered"] * CANDIDATES, deliveries
    registered = [delivery.registered for delivery in deliveries]
    assert sorted(int(r["version"]) for r in registered) == list(range(1, CANDIDATES + 1))
    ((champion,),) = rows(database, "select version from registered_model_aliases where name = ?", NAME)
    # In whatever order they came: the best one beats whoever was there before it, and nobody beats it.
    assert int(registered[0]["version"]) == champion
    assert registered[0]["promoted"]
    sql = "select version, value from model_version_tags where key = 'gate' and name = ?"
    tags = dict(rows(database, sql, NAME))
    assert {int(r["version"]): r["reason"] for r in registered} == tags
    assert sum("first champion" in r["reason"] for r in registered) == 1

    import mlflow
    import pandas as pd

    mlflow.set_tracking_uri(uri)
    loaded = mlflow.pyfunc.load_model(f"models:/{NAME}@champion")
    assert loaded.predict(pd.DataFrame({"image": ["x", "y"]}))["label"].tolist() == ["seven", "seven"]
