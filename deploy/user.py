"""Make a user of the team's server, or change what one may: `python deploy/user.py NAME RIGHT`.

RIGHT: `read` (sees all), `train` (and records runs), `promote` (and registers models and moves the champion).
Who asks is an administrator: MLFLOW_TRACKING_URI, MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD. A new
user's password is printed once. The experiment and the models are made here, so that nobody owns them by being
the first.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

RIGHTS = {"read": ("READ", "READ"), "train": ("EDIT", "READ"), "promote": ("EDIT", "EDIT")}


def main() -> None:
    """Make or change the user named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("right", choices=RIGHTS)
    parser.add_argument("--experiment", default="cnn-tuning", help="tracking.experiment (default: %(default)s)")
    parser.add_argument("--model", action="append", default=[], help="registry.model; may be given several times")
    asked = parser.parse_args()
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    from mlflow.exceptions import MlflowException

    try:
        print(grant(asked.name, asked.right, asked.experiment, asked.model))
    except MlflowException as error:
        sys.exit(f"{os.environ.get('MLFLOW_TRACKING_URI')}: {str(error).splitlines()[0]}")


def grant(name: str, right: str, experiment: str, models: list[str]) -> str:
    """Give a user a right on the experiment and the models, each made where missing; return what was done."""
    import mlflow
    from mlflow.server import get_app_client

    users = get_app_client("basic-auth", tracking_uri=mlflow.get_tracking_uri())
    client = mlflow.MlflowClient()
    found = client.get_experiment_by_name(experiment)
    number = found.experiment_id if found else client.create_experiment(experiment)
    said = _make(lambda: users.get_user(name), lambda: _new(users, name)) or f"{name} was there"
    on_experiment, on_model = RIGHTS[right]
    _give(users, name, "experiment", number, on_experiment)
    for model in models:
        _make(partial(client.get_registered_model, model), partial(client.create_registered_model, model))
        _give(users, name, "registered_model", model, on_model)
    return f"{said}; {on_experiment} on experiment {experiment}, {on_model} on {', '.join(models) or 'no model'}"


def _give(users: Any, name: str, kind: str, resource: str, right: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        users.grant_user_permission(name, kind, resource, right)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        users.revoke_user_permission(name, kind, resource)
        users.grant_user_permission(name, kind, resource, right)


def _make(look: Callable[[], object], make: Callable[[], Any]) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        look()
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND"):
            raise
        return make()
    return None


def _new(users: Any, name: str) -> str:
    password = secrets.token_urlsafe(18)
    users.create_user(name, password)
    return f"{name}'s password, told this once: {password}"


if __name__ == "__main__":
    main()
