"""Whatever AWS, or MLflow on the way to it, raises comes in; one line that a person can act on goes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from cnn_tuning.cloud.aws import code_of, hide_account, telling
from cnn_tuning.errors import UserError

NO_BUCKET = "there is no such bucket: check its name and the credentials' account"
NEEDS = "docs/deploying.md lists what is needed"


@contextmanager
def asking(doing: str) -> Iterator[None]:
    """Turn what is raised inside into a `UserError` that says what was being done."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        with telling(doing):
            try:
                yield
            except ClientError as error:
                raise _own_words(error, doing) from None
    except BotoCoreError as error:  # no connection among them
        reason = hide_account(" ".join(str(error).split()))
        raise UserError(f"{doing}: AWS cannot be reached ({reason}); check network and region") from None


def _own_words(error: Exception, doing: str) -> Exception:
    """Return a line for what means something else here than where hosts are rented; else the error itself."""
    code = code_of(error)
    if code in ("NoSuchBucket", "404"):
        return UserError(f"{doing}: {code}: {NO_BUCKET}")
    if code in ("AccessDenied", "AccessDeniedException", "403"):
        said = hide_account(" ".join(str(error).split()))
        return UserError(f"{doing}: not allowed ({said}); {NEEDS}")
    return error


@contextmanager
def asking_mlflow(doing: str) -> Iterator[None]:
    """Do so for calls through MLflow, which puts some errors of AWS into its own."""
    from mlflow.exceptions import MlflowException

    try:
        with asking(doing):
            yield
    except MlflowException as error:
        raise UserError(f"{doing}: {hide_account(' '.join(str(error.message).split()))[:300]}") from None
