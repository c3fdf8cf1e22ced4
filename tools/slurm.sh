#!/usr/bin/env bash
# A Slurm on this machine's loopback, of one node and, in its partition two, of two, for tests/batch/test_slurm.py. Needs root and Debian's slurm-wlm and munge, but no systemd.
#   tools/slurm.sh install   apt-get the packages, if they are missing
#   tools/slurm.sh start     start munged, slurmctld and two slurmd, unless they run; prints the SLURM_CONF to use
#   tools/slurm.sh stop      end every job, stop all of it, and remove what they left
# All of it lives in $DMP_WB_SLURM_DIR (default: /tmp/dmp-wb-slurm) and listens on ports of its own, so a Slurm that is there already is not touched.
set -euo pipefail
D=${DMP_WB_SLURM_DIR:-/tmp/dmp-wb-slurm}
export SLURM_CONF=$D/slurm.conf
PATH=$PATH:/usr/sbin:/sbin
have() { command -v sbatch slurmctld slurmd munged > /dev/null; }
running() { local p; p=$(cat "$D/$1.pid" 2>/dev/null) && grep -qs "${1%%-*}" "/proc/$p/comm" && ! grep -qs '^State:.Z' "/proc/$p/status"; }
fail() { echo "error: $*" >&2; exit 1; }

install() {
  have && return 0
  command -v apt-get > /dev/null || fail "no apt-get here: expected Debian or Ubuntu, or Slurm and munge to be installed"
  [ "$(id -u)" = 0 ] || fail "installing packages needs root"
  export DEBIAN_FRONTEND=noninteractive
  # the packages would start daemons of their own
  local policy=/usr/sbin/policy-rc.d made=
  if [ ! -e $policy ]; then printf '#!/bin/sh\nexit 101\n' > $policy && chmod +x $policy && made=1; fi
  local status=0
  { apt-get install -y -qq --no-install-recommends slurm-wlm munge || { apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge; }; } > /dev/null 2>&1 || status=$?
  [ -z "$made" ] || rm -f $policy
  [ $status = 0 ] && have || fail "apt-get could not install slurm-wlm and munge"
}

configure() {
  local host memory cpus
  host=$(hostname -s) cpus=$(env -u OMP_NUM_THREADS nproc) memory=$(awk '/MemTotal/ {print int($2 / 1024)}' /proc/meminfo)
  mkdir -p "$D/state" "$D/spool-one" "$D/spool-two"
  chmod 755 "$D"
  [ -s "$D/munge.key" ] || { dd if=/dev/urandom of="$D/munge.key" bs=1024 count=1 status=none; chmod 400 "$D/munge.key"; }
  : > "$D/cgroup.conf"
  cat > "$SLURM_CONF" <<EOF
ClusterName=dmp-wb
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${DMP_WB_SLURM_PORT:-16817}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$D/munge.socket
CredType=cred/munge
StateSaveLocation=$D/state
SlurmdSpoolDir=$D/spool-%n
SlurmctldPidFile=$D/slurmctld.pid
SlurmdPidFile=$D/slurmd-%n.pid
SlurmctldLogFile=$D/slurmctld.log
SlurmdLogFile=$D/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
# a job that has been told to stop has this long, as on clusters that care; tests are not kept waiting for the scheduler
KillWait=60
SchedulerParameters=sched_interval=5,sched_min_interval=1,batch_sched_delay=0,preempt_send_user_signal
# jobs of the partition high take the place of those of low, which are told, and queued again
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=one NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${DMP_WB_SLURM_PORT:-16817} + 1)) CPUs=$cpus RealMemory=$memory State=UNKNOWN
NodeName=two NodeHostname=$host NodeAddr=127.0.0.1 Port=$((${DMP_WB_SLURM_PORT:-16817} + 2)) CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=one Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
PartitionName=low Nodes=one MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=one MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
PartitionName=two Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=OFF
EOF
}

start() {
  have || fail "Slurm is not installed: expected sbatch, slurmctld, slurmd and munged; tools/slurm.sh install gets them"
  [ "$(id -u)" = 0 ] || fail "slurmd needs root"
  running munged && running slurmctld && running slurmd-one && running slurmd-two || { stop; configure; }
  running munged || munged --force --key-file="$D/munge.key" --socket="$D/munge.socket" --pid-file="$D/munged.pid" --log-file="$D/munged.log" --seed-file="$D/munged.seed" 2> "$D/munged.err" || fail "munged does not start: $(tail -1 "$D/munged.err")"
  running slurmctld || slurmctld -c > "$D/slurmctld.out" 2>&1 || fail "slurmctld does not start: $(tail -1 "$D/slurmctld.out")"
  for node in one two; do
    running slurmd-$node || slurmd -N $node > "$D/slurmd-$node.out" 2>&1 || fail "slurmd does not start: $(tail -1 "$D/slurmd-$node.out")"
  done
  for _ in $(seq 120); do
    if [ "$(sinfo -h -N -p two -o %t 2> /dev/null | grep -cE '^(idle|mix|alloc)$')" = 2 ]; then echo "SLURM_CONF=$SLURM_CONF"; return 0; fi
    sleep 0.5
  done
  tail -n 5 "$D/slurmctld.log" "$D/slurmd-one.log" "$D/slurmd-two.log" >&2
  fail "the nodes did not come up: $(sinfo -h -o '%t %E' 2>&1)"
}

stop() {
  if running slurmctld && running slurmd-one; then
    scancel -f -u root 2> /dev/null || true
    for _ in $(seq 20); do [ -z "$(squeue -h 2> /dev/null)" ] && break; sleep 0.5; done
  fi
  for name in slurmd-one slurmd-two slurmctld munged; do
    if running $name; then
      kill "$(cat "$D/$name.pid")" || true
      for _ in $(seq 40); do running $name || break; sleep 0.25; done
      running $name && kill -9 "$(cat "$D/$name.pid")" || true
    fi
  done
  case $D in /|/tmp|"$HOME") fail "DMP_WB_SLURM_DIR is $D: expected a folder of its own" ;; esac
  [ ! -e "$SLURM_CONF" ] || rm -rf "$D"
}

case ${1:-} in
  install|start|stop) "$1" ;;
  *) sed -n '2,6p' "$0" | cut -c3-; exit 2 ;;
esac
