#!/bin/sh
# The first program of the test guest.
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

stty -F /dev/ttyS1 raw -echo 115200
agent </dev/ttyS1 >/dev/ttyS1
# The host is gone.
poweroff -f
