#!/bin/sh
# The team's MLflow server: compose.yaml, systemd/cnn-tuning-mlflow.service and tests/pipeline/test_team.py run this.
# In: the variables of team.env, and a file a secret in $CREDENTIALS_DIRECTORY (systemd) or /run/secrets (compose).
set -eu

secrets=${CREDENTIALS_DIRECTORY:-/run/secrets}
secret() {
    cat "$secrets/$1" || { echo "start-mlflow: make the secrets first: deploy/make-secrets.sh FOLDER" >&2; exit 1; }
}

# libpq's own variables: no password in an address, none on a command line. PGHOST and PGPORT come from team.env.
PGPASSWORD=$(secret mlflow-database-password)
MLFLOW_AUTH_ADMIN_PASSWORD=$(secret mlflow-admin-password) # read at the first start only
MLFLOW_FLASK_SERVER_SECRET_KEY=$(secret mlflow-secret-key)
export PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY
if [ -e "$secrets/s3-access-key-id" ]; then # without them: the role of the machine
    AWS_ACCESS_KEY_ID=$(secret s3-access-key-id)
    AWS_SECRET_ACCESS_KEY=$(secret s3-secret-access-key)
    export AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY
fi

run=${RUNTIME_DIRECTORY:-$(mktemp -d)}
cat >"$run/auth.ini" <<INI
[mlflow]
default_permission = ${TEAM_DEFAULT_PERMISSION:-READ}
database_uri = postgresql+psycopg://mlflow@/mlflow_auth
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
# Without a cache every request pays for a password's hash; a changed password holds after this many seconds.
auth_cache_ttl_seconds = 60
INI

unset MLFLOW_TRACKING_URI
export MLFLOW_AUTH_CONFIG_PATH="$run/auth.ini"
export MLFLOW_BASIC_AUTH_FAIL_CLOSED=true
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
export MLFLOW_ALLOW_PICKLE_DESERIALIZATION=false
export MLFLOW_DISABLE_TELEMETRY=true
set -- --app-name basic-auth --workers "${TEAM_WORKERS:-2}" \
    --host "${TEAM_HOST:-127.0.0.1}" --port "${TEAM_PORT:-5000}" \
    --backend-store-uri postgresql+psycopg://mlflow@/mlflow \
    --artifacts-destination "${TEAM_ARTIFACTS:?name the bucket in team.env: s3://BUCKET/PREFIX}" \
    --allowed-hosts "${TEAM_ALLOWED_HOSTS:?name in team.env the names that browsers and clients use}"
if [ -n "${TEAM_ORIGINS:-}" ]; then
    set -- "$@" --cors-allowed-origins "$TEAM_ORIGINS"
fi
exec mlflow server "$@"
