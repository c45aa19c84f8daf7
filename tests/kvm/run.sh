#!/usr/bin/env bash
# All checks of -accel kvm, those that need real hardware among them; called by `make test-kvm`. What cannot run here is
# named, with the reason. The status is not 0 if a check failed.
set -uo pipefail
cd "$(dirname "$0")/../.."
# FTVM_PROFILE= (empty) takes a debug build.
profile=${FTVM_PROFILE---release}
ftvm=${FTVM:-target/release/ftvm}
guests=${FTVM_GUESTS:-build/guests}
passed=0 failed=0 skipped=()
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

say() { printf '%s\n' "$*"; }
check() { # name, command...
    local name=$1 log
    shift
    log=$work/$(tr -c 'a-z0-9\n' _ <<<"$name").log
    local start=$SECONDS
    if "$@" >"$log" 2>&1; then
        passed=$((passed + 1))
        say "ok       $name ($((SECONDS - start)) s)"
        grep -E '^(  )?(round |to |.* moves there|.* instructions; beyond|skipped:|ratio )' "$log" | sed 's/^/         /'
    else
        failed=$((failed + 1))
        say "FAILED   $name"
        tail -n 30 "$log" | sed 's/^/         /'
    fi
}
skip() { # name, reason
    skipped+=("$1: $2")
    say "skipped  $1: $2"
}

if [ "${1:-}" = list ]; then
    say "not part of this (make test-kvm runs it where the processor has VMX or SVM): -accel kvm with Linux kernels of one and \
four processors, Debian from its disk image, and its speed against tcg"
    [ -w /dev/kvm ] || say "skipped here for want of /dev/kvm: all tests of -accel kvm"
    exit 0
fi
if ! [ -r /dev/kvm ] || ! [ -w /dev/kvm ]; then
    say "/dev/kvm cannot be opened: nothing of this can run here (is the module loaded, and this user in the group kvm?)"
    exit 2
fi

# Hardware executes guest kernels; a KVM that emulates them is too slow and lacks instructions.
hardware() { grep -qwE 'vmx|svm' /proc/cpuinfo; }
reason='the processor shows neither VMX nor SVM, so this KVM emulates guest kernels'

check 'the processor, step by step and on threads, in states and moves' \
    timeout 900 cargo test -q $profile -p ftvm-accel --lib kvm:: -- --nocapture
check 'a machine with firmware, disk and monitors; moves to tcg and back' \
    timeout 1800 cargo test -q $profile --test kvm -- --nocapture

boot() { # seconds, mark, args...
    local limit=$1 mark=$2 pid
    shift 2
    rm -f "$work/console"
    timeout "$limit" "$ftvm" -accel kvm -display none -serial "file:$work/console" "$@" &
    pid=$!
    for _ in $(seq $((limit * 10))); do
        if grep -qs -- "$mark" "$work/console"; then
            kill $pid 2>/dev/null
            wait $pid 2>/dev/null
            return 0
        fi
        kill -0 $pid 2>/dev/null || break
        sleep 0.1
    done
    kill $pid 2>/dev/null
    tail -n 5 "$work/console" 2>/dev/null
    return 1
}

tiny=(-m 256 -kernel "$guests/vmlinuz" -initrd "$guests/tiny.cpio.gz" -append 'console=ttyS0')
if ! hardware; then
    skip 'a Linux kernel with one processor' "$reason"
    skip 'a Linux kernel with four processors' "$reason"
    skip 'Debian from its disk image, and its kvmclock' "$reason"
    skip 'speed against tcg' "$reason"
elif ! [ -e "$guests/tiny.cpio.gz" ]; then
    skip 'Linux guests' "there is no $guests/tiny.cpio.gz (make guests)"
else
    check 'a Linux kernel with one processor' boot 60 'tiny guest ready' "${tiny[@]}" -cpu host
    check 'a Linux kernel with four processors' boot 60 'tiny guest ready' "${tiny[@]}" -cpu host -smp 4
    if [ -e "$guests/debian.qcow2" ]; then
        check 'Debian from its disk image, and its kvmclock' boot 120 'login:' -m 1G -smp 2 -cpu host \
            -drive "file=$guests/debian.qcow2,if=virtio,snapshot=on" -nic user,model=virtio
    else
        skip 'Debian from its disk image' "there is no $guests/debian.qcow2 (make guests)"
    fi
    speed() {
        local t0 kvm tcg
        t0=$(date +%s%N)
        boot 120 'tiny guest ready' "${tiny[@]}" || return 1
        kvm=$((($(date +%s%N) - t0) / 1000000))
        t0=$(date +%s%N)
        timeout 120 "$ftvm" -accel tcg -display none -no-reboot -serial "file:$work/tcg" "${tiny[@]}" \
            -append 'console=ttyS0 halt' || return 1
        tcg=$((($(date +%s%N) - t0) / 1000000))
        say "ratio $kvm ms on kvm, $tcg ms on tcg"
        [ "$kvm" -lt "$tcg" ]
    }
    check 'speed against tcg' speed
fi

say "$passed passed, $failed failed, ${#skipped[@]} skipped"
for s in ${skipped[@]+"${skipped[@]}"}; do say "  not run: $s"; done
[ "$failed" -eq 0 ]
