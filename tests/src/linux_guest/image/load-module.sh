#!/bin/sh
# load-module NAME [PARAMETER=VALUE ...]: a kernel module, behind those that it needs.
name=$1
shift
while read -r module; do
    if [ ! -e "/sys/module/$module" ]; then
        if [ "$module" = "$name" ]; then
            insmod "/lib/modules/$module.ko" "$@" || exit
        else
            insmod "/lib/modules/$module.ko" || exit
        fi
    fi
done <"/lib/modules/$name.order"
