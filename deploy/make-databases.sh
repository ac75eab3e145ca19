#!/bin/sh
# Make the databases and their roles, or set the roles' passwords anew. As PostgreSQL's superuser, or as root with
# PSQL="runuser -u postgres -- psql". Passwords go through a pipe: no command line shows them.
set -eu
secrets=${CREDENTIALS_DIRECTORY:-/run/secrets}
mlflow=$(cat "$secrets/mlflow-database-password")
search=$(cat "$secrets/search-database-password")
${PSQL:-psql} --quiet --no-psqlrc --set ON_ERROR_STOP=1 --dbname postgres >/dev/null <<SQL
SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY['mlflow', 'search']) AS name
    WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
SET log_statement = 'none';
SET log_min_error_statement = 'panic';
ALTER ROLE mlflow PASSWORD '$mlflow';
ALTER ROLE search PASSWORD '$search';
SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
    FROM (VALUES ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow'), ('search', 'search')) AS wanted (name, owner)
    WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, search FROM PUBLIC;
SQL
