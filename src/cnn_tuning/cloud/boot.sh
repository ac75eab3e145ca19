# Runs once, as root, when the host starts. The lines above it set the variables. Whatever happens, it ends in
# `leave`: log and state go to the bucket and the host shuts down, which terminates it.
set -Eeuo pipefail
umask 077
export AWS_DEFAULT_REGION="$REGION" AWS_REGION="$REGION" DEBIAN_FRONTEND=noninteractive HOME="${HOME:-/root}"
export PATH="$PATH:/snap/bin"
mkdir -p "$ROOT"
LOG="$ROOT/boot.log"
TOLD="$ROOT/told.json" # the last word, once it is said: nobody speaks after it
HERE="s3://$BUCKET/$PREFIX/runs/$RUN"
BEGAN=$(date +%s)
exec >>"$LOG" 2>&1

say() { echo "$(date -u +%Y-%m-%dT%H:%M:%SZ) $*"; }

about() { # about PATH: what the instance metadata service (IMDSv2) says, as JSON
  local service="${AWS_EC2_METADATA_SERVICE_ENDPOINT:-http://169.254.169.254}" token found
  token=$(curl -sf -m 2 --noproxy '*' -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$service/latest/api/token") &&
    found=$(curl -sf -m 2 --noproxy '*' -H "X-aws-ec2-metadata-token: $token" "$service/latest/meta-data/$1") &&
    printf '"%s"' "$found" || printf null
}

upload() { timeout 60 aws s3 cp --only-show-errors "$1" "$HERE/$2"; }

tell() { # tell STATE EXIT: what the laptop reads
  printf '{"run": "%s", "attempt": %s, "state": "%s", "exit": %s, "stage": "%s", "at": "%s", "instance": %s, "type": %s}\n' \
    "$RUN" "$ATTEMPT" "$1" "$2" "$STAGE" "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${INSTANCE:=$(about instance-id)}" \
    "${TYPE:=$(about instance-type)}" >"$ROOT/state.json"
  upload "$ROOT/state.json" state.json || say "state not uploaded"
  upload "$LOG" boot.log || say "log not uploaded"
}

leave() {
  local code=$?
  trap - EXIT ERR
  set +e
  if [ -n "${WATCH:-}" ]; then kill "$WATCH" 2>/dev/null; fi
  if [ -e "$TOLD" ]; then
    upload "$TOLD" state.json # idle; or interrupted, over-budget: as the agent has said
    upload "$LOG" boot.log
  elif [ "$code" -eq 0 ]; then
    tell finished 0
  else
    say "failed in $STAGE with status $code"
    tell failed "$code"
  fi
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
      cp "$ROOT/state.json" "$TOLD"
      # The agent saves while network and disk are still there; whether it is done or not, the host goes.
      pkill -TERM -P $$ -f cnn_tuning.cloud.agent || true
      for _ in {1..120}; do
        pgrep -P $$ -f cnn_tuning.cloud.agent >/dev/null || break
        sleep 1
      done
      shutdown -h now
      exit
    fi
    upload "$LOG" boot.log || true
  done
) &
WATCH=$!

STAGE=system
say "host of run $RUN, attempt $ATTEMPT"
missing=""
for tool in git make unzip; do command -v "$tool" >/dev/null || missing="$missing $tool"; done
python3 -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' || missing="$missing python3-venv"
if [ -n "$missing" ]; then
  # At the first boot the system's own updates hold apt's locks; the one of the lists is not waited for by apt itself.
  for left in {29..0}; do
    if apt-get -o DPkg::Lock::Timeout=300 update -q; then break; fi
    [ "$left" -gt 0 ]
    sleep 10
  done
  # shellcheck disable=SC2086
  apt-get -o DPkg::Lock::Timeout=300 install -qy $missing
fi
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

agent() { # agent COMMAND …: the host's side of the run, in Python from here on
  python -m cnn_tuning.cloud.agent --at "$HERE" --region "$REGION" --attempt "$ATTEMPT" --told "$TOLD" \
    --began "$BEGAN" ${PRICE_PER_HOUR:+--price "$PRICE_PER_HOUR"} "$@"
}

STAGE=restore
agent restore

STAGE=data
agent pull

ENDS=$((BEGAN + 60 * LIFETIME_MINUTES))
if [ "$MODE" = interactive ]; then
  STAGE=ready
  python -c 'import secrets; print(secrets.token_urlsafe(32))' >"$ROOT/jupyter.token"
  upload "$ROOT/jupyter.token" jupyter.token
  tell started 0
  # shellcheck disable=SC2016
  agent run --ends-at "$ENDS" -- bash -c 'mlflow ui --host 127.0.0.1 --port 5000 &
    JUPYTER_TOKEN=$(cat "$1") exec jupyter lab --no-browser --allow-root --ip 127.0.0.1 --port 8888' - "$ROOT/jupyter.token"
  exit
fi

# Saves and ends with 75 on a spot notice, and before the lifetime is over.
STAGE=pipeline
agent run --ends-at "$ENDS" -- dvc --wait-for-lock repro

STAGE=results
dvc --wait-for-lock push
agent results
STAGE=end
say "done"
