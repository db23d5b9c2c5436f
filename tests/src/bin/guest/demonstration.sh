# The default script of `cargo xtask guest`: verified writes, random reads, and what the queues say of them.
disk=/dev/vda
cpus=$(nproc)
mib=$((96 / cpus))
run() {
    fio --filename=$disk --direct=1 --ioengine=io_uring --group_reporting --numjobs="$cpus" --thread \
        --cpus_allowed=0-$((cpus - 1)) --cpus_allowed_policy=split --offset_increment=${mib}m --size=${mib}m \
        --eta=never "$@" >/tmp/fio
    status=$?
    # The lines with the speed, and after a failure all.
    if [ $status = 0 ]; then grep IOPS= /tmp/fio; else cat /tmp/fio; exit $status; fi
}
echo "$(uname -sr), $cpus CPUs, $disk: $(($(cat /sys/block/vda/size) / 2048)) MiB"
echo
echo 'fio writes blocks of 4 to 64 KiB and verifies the checksum of each:'
run --name=verify --rw=randwrite --bsrange=4k-64k --iodepth=32 --verify=crc32c --verify_fatal=1
echo
echo 'fio reads 4 KiB at random for five seconds:'
run --name=read --rw=randread --bs=4k --iodepth=32 --time_based --runtime=5
echo
rings
