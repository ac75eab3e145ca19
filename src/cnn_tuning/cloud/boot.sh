# Runs once, as root, when the host starts. The lines above it set the variables. Whatever happens, it ends in
# `leave`: log and state go to the bucket and the host shuts down, which terminates it.
set -Eeuo pipefail
umask 077
export AWS_DEFAULT_REGION="$REGION" AWS_REGION="$REGION" DEBIAN_FRONTEND=noninteractive HOME="${HOME:-/root}"
mkdir -p "$ROOT"
LOG="$ROOT/boot.log"
HERE="s3://$BUCKET/$PREFIX/runs/$RUN"
exec >>"$LOG" 2>&1

say() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*"; }

tell() { # tell STATE EXIT: what the laptop reads
  printf '{"run": "%s", "state": "%s", "exit": %s, "stage": "%s", "at": "%s"}\n' \
    "$RUN" "$1" "$2" "$STAGE" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" >"$ROOT/state.json"
  timeout 60 aws s3 cp --only-show-errors "$ROOT/state.json" "$HERE/state.json" || say "state not uploaded"
  timeout 60 aws s3 cp --only-show-errors "$LOG" "$HERE/boot.log" || say "log not uploaded"
}

leave() {
  local code=$?
  trap - EXIT ERR
  set +e
  if [ -n "${WATCH:-}" ]; then kill "$WATCH" 2>/dev/null; fi
  if [ "$code" -eq 0 ]; then tell finished 0; else say "failed in $STAGE with status $code"; tell failed "$code"; fi
  shutdown -h now
}

STAGE=guard
# Guard 1: the lifetime. The system's own timer ends the host even if this script hangs or is killed. Should it be
# refused, leaving now is cheaper than running on unguarded.
trap leave EXIT
trap 'exit 143' TERM
shutdown -h "+$LIFETIME_MINUTES"

# Guard 2: idleness. GPU below 5 % and load below 0.5 for so many minutes in a row.
busy() {
  local used load
  used=$(nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits 2>/dev/null | sort -rn | head -1 || true)
  load=$(cut -d' ' -f1 /proc/loadavg)
  [ "${used:-0}" -ge 5 ] || awk -v load="$load" 'BEGIN { exit !(load >= 0.5) }'
}
(
  trap - EXIT TERM
  idle=0
  while sleep "$LOOK_EVERY_S"; do
    if busy; then idle=0; else idle=$((idle + 1)); fi
    if [ "$idle" -ge "$IDLE_LOOKS" ]; then
      say "idle: ending the host"
      STAGE=idle tell idle 1
      shutdown -h now
      exit
    fi
    timeout 60 aws s3 cp --only-show-errors "$LOG" "$HERE/boot.log" || true
  done
) &
WATCH=$!

STAGE=system
say "host of run $RUN"
missing=""
for tool in git make unzip; do command -v "$tool" >/dev/null || missing="$missing $tool"; done
python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || missing="$missing python3-venv"
# shellcheck disable=SC2086
if [ -n "$missing" ]; then apt-get update -q && apt-get install -qy $missing; fi
command -v aws >/dev/null || snap install aws-cli --classic
tell started 0

STAGE=code
aws s3 cp --only-show-errors "$HERE/code.bundle" "$ROOT/code.bundle"
git init -q "$ROOT/project"
cd "$ROOT/project"
git fetch -q "$ROOT/code.bundle" '+refs/*:refs/remotes/bundle/*'
git -c advice.detachedHead=false checkout -q "$COMMIT"

STAGE=install
make setup
export PATH="$ROOT/project/.venv/bin:$PATH"

STAGE=data
dvc pull --allow-missing

STAGE=pipeline
dvc repro

STAGE=results
dvc push
for kept in dvc.lock params.lock.yaml; do aws s3 cp --only-show-errors "$kept" "$HERE/$kept"; done
if [ -d .state/spool ]; then aws s3 cp --only-show-errors --recursive .state/spool "$HERE/spool"; fi
STAGE=end
say "done"
