#!/bin/sh
# Dump the three databases to a folder and remove the oldest: backup.sh FOLDER [KEPT]. As PostgreSQL's superuser.
# The artifacts are not in it: their bucket keeps versions. One of a kind comes back with
# `pg_restore --clean --if-exists --dbname mlflow FILE`.
set -eu
umask 077
mkdir -p "$1"
now=$(date -u +%Y%m%d-%H%M%S)
for database in mlflow mlflow_auth search; do
    pg_dump --format custom --file "$1/$database-$now.partial" "$database"
    mv "$1/$database-$now.partial" "$1/$database-$now.dump"
    ls -1 "$1/$database"-[0-9]*.dump | sort -r | tail -n "+$((${2:-14} + 1))" | xargs -r rm --
done
