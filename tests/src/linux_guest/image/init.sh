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
# Both variables come from the kernel's command line.
load-module "${block_driver:-virtio_blk}" $block_driver_parameters

stty -F /dev/ttyS1 raw -echo 115200
agent </dev/ttyS1 >/dev/ttyS1
# The host is gone.
poweroff -f
