#!/bin/sh
# The first and only service of the test guest: runs scripts that come over the second serial port, each in the
# background, and sends what they write and how they end. `LinuxGuest` is the other side.
#
#   to the guest      run NUMBER, the lines of a script, end NUMBER
#   from the guest    ready RELEASE         it listens
#                     NUMBER|TEXT           a line of output
#                     NUMBER=STATUS         the script has ended
export PATH=/sbin:/bin HOME=/tmp
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t debugfs debugfs /sys/kernel/debug 2>/dev/null
mount -t tmpfs tmpfs /tmp
mkdir -p /dev/shm /mnt
mount -t tmpfs tmpfs /dev/shm
load-module virtio_pci
load-module virtio_blk

exec </dev/ttyS1 >/dev/ttyS1
stty raw -echo 115200
printf '\nready %s\n' "$(uname -r)"

run_script() {
    # Not sed: it would keep the lines until it has many.
    { sh "/tmp/$1.sh" </dev/null 2>&1; echo $? >"/tmp/$1.status"; } |
        while IFS= read -r text || [ -n "$text" ]; do
            printf '%s|%s\n' "$1" "$text"
        done
    printf '%s=%s\n' "$1" "$(cat "/tmp/$1.status")"
    rm -f "/tmp/$1.sh" "/tmp/$1.status"
}

while IFS= read -r line; do
    case $line in
    "run "*)
        number=${line#run }
        echo '. /etc/functions' >"/tmp/$number.sh"
        while IFS= read -r line && [ "$line" != "end $number" ]; do
            printf '%s\n' "$line" >>"/tmp/$number.sh"
        done
        run_script "$number" &
        ;;
    esac
done
# The host is gone.
poweroff -f
