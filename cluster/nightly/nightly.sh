#!/bin/sh
# Labels what is new, for cron and for whatever else starts a command and looks at its exit code:
#
#   nightly.sh --images /srv/photographs --output /srv/predictions
#
# There are never two at once with the same arguments: a second one ends with exit code 75. After a crash (exit code 1, or
# killed) it tries again, three times in all, because the same command does what is left. Bad usage (2), too many images
# that failed (3) and a signal are not tried again. A signal to this script goes on to `catdog predict`, which ends well.
# The exit code is that of the last `catdog predict`.
#
# CATDOG_LOCK is the file that it locks, CATDOG_PAUSE_S how long it waits between two tries, and CATDOG_NOTIFY_URL a web
# hook that each try tells how it ended.
set -u

job=$(printf '%s\n' "$@" | cksum | cut -d ' ' -f 1) # another output has a lock of its own
lock=${CATDOG_LOCK:-${XDG_RUNTIME_DIR:-/tmp}/catdog-nightly-$job.lock}
exec 9>>"$lock"
if ! flock --nonblock 9; then
  echo "nightly: another run holds $lock" >&2
  exit 75
fi

child=
signalled=
told=
pass_on() {
  signalled=yes
  tell
}
# Tells the child, once. One that has not begun its command yet would lose the signal: hence the second.
tell() {
  [ -n "$child" ] && [ -z "$told" ] || return 0
  told=yes
  sleep 1
  kill -TERM "$child" 2>/dev/null
}
trap pass_on HUP INT TERM

# Runs a command. The shell would wait for one in the foreground before it looked at a signal.
run() {
  if [ -n "$signalled" ]; then
    code=143
    return
  fi
  "$@" & # it inherits the lock, and holds it as long as it lives
  child=$!
  [ -z "$signalled" ] || tell
  while :; do
    wait "$child"
    code=$?
    [ -n "$signalled" ] && kill -0 "$child" 2>/dev/null || break # else it was the signal that ended `wait`
  done
  child=
}

export CATDOG_BEGIN="${CATDOG_BEGIN:-$(date +%s)}" # a deadline that comes between two tries is over for the second
attempt=1
while :; do
  run catdog predict "$@"
  case $code in
    1 | 137) [ "$attempt" -lt 3 ] && [ -z "$signalled" ] || break ;;
    *) break ;;
  esac
  echo "nightly: try $attempt ended with exit code $code" >&2
  attempt=$((attempt + 1))
  run sleep "${CATDOG_PAUSE_S:-600}"
done

case $code in
  0) ;;
  2) echo "nightly: bad usage: see the line above" >&2 ;;
  3) echo "nightly: too many images failed: see the newest report in _runs/ of the output" >&2 ;;
  *) echo "nightly: failed with exit code $code; what is labelled stays, and the next run does the rest" >&2 ;;
esac
exit "$code"
