#!/bin/sh
# Write the secrets of a team's server that are not there yet, each a file: make-secrets.sh FOLDER
# The folder keeps all others out; the files are readable, as in a container their reader has another number.
set -eu
umask 022
mkdir -p "$1"
chmod 0700 "$1"
for name in postgres-password mlflow-database-password search-database-password mlflow-admin-password mlflow-secret-key; do
    test -e "$1/$name" || head -c 24 /dev/urandom | od -An -tx1 | tr -d ' \n' >"$1/$name"
done
